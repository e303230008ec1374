package helpertest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/qemu"
	"virtfs-proxy-helper/codec"
)

// Client is a qemu.Client that fails the test where that returns an error. The
// test's end closes it.
type Client struct {
	*qemu.Client
	tb testing.TB
}

// Answer is an answer with its descriptor as a file.
type Answer struct {
	qemu.Answer
	File *os.File // nil if there was none; the garbage collector closes it at the latest
}

// NewClient returns the client on its end of a connection, and owns f.
func NewClient(tb testing.TB, f *os.File) *Client {
	tb.Helper()
	c, err := qemu.Adopt(f, Patience)
	if err != nil {
		tb.Fatal(err)
	}
	return newClient(tb, c)
}

func newClient(tb testing.TB, c *qemu.Client) *Client {
	tb.Cleanup(c.Close)
	return &Client{c, tb}
}

// Dial connects to a name.
func Dial(tb testing.TB, name string) *Client {
	tb.Helper()
	c, err := qemu.Dial(name, Patience)
	if err != nil {
		tb.Fatal(err)
	}
	return newClient(tb, c)
}

// Send sends bytes, which need not be a frame.
func (c *Client) Send(b []byte) {
	c.tb.Helper()
	if err := c.TrySend(b); err != nil {
		c.tb.Fatalf("send: %v", err)
	}
}

// TrySend is Send for goroutines other than the test's.
func (c *Client) TrySend(b []byte) error { return c.Client.Send(b) }

// Unread returns how many bytes have come that were not read.
func (c *Client) Unread(tb testing.TB) (n int) {
	tb.Helper()
	raw, err := c.Conn().SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

// Read receives the answer to a request of type t.
func (c *Client) Read(t codec.Type) Answer {
	c.tb.Helper()
	a, err := c.TryRead(t)
	if err != nil {
		c.tb.Fatalf("answer to %v: %v", t, err)
	}
	return a
}

// TryRead is Read for goroutines other than the test's.
func (c *Client) TryRead(t codec.Type) (Answer, error) {
	a, err := c.Receive(t)
	return Answer{a, a.File()}, err
}

// Do sends a request and receives its answer.
func (c *Client) Do(t codec.Type, q codec.Request) Answer {
	c.tb.Helper()
	a, err := c.TryDo(t, q)
	if err != nil {
		c.tb.Fatalf("%v: %v", t, err)
	}
	return a
}

// TryDo is Do for goroutines other than the test's.
func (c *Client) TryDo(t codec.Type, q codec.Request) (Answer, error) {
	a, err := c.Client.Do(t, q)
	return Answer{a, a.File()}, err
}

// Want is Do, and fails unless the answer is errno, or success if that is 0.
func (c *Client) Want(errno unix.Errno, t codec.Type, q codec.Request) Answer {
	c.tb.Helper()
	a := c.Do(t, q)
	if a.Errno != errno {
		c.tb.Errorf("%v %.80q: %v, want %v", t, q.Path, a.Errno, errno)
	}
	return a
}

// WantEOF fails unless the helper has closed the connection, and sends nothing
// more before.
func (c *Client) WantEOF() {
	c.tb.Helper()
	if err := c.Ended(); err != nil {
		c.tb.Error(err)
	}
}

// Path returns a path as QEMU sends that of a fid: with its NUL.
func Path(s string) codec.CString { return qemu.Path(s) }

package helpertest

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// Client is a Peer of a test, which ends it. It fails the test where Peer
// returns an error.
type Client struct {
	*Peer
	tb testing.TB
}

// NewClient returns the client on its end of a connection, and owns f.
func NewClient(tb testing.TB, f *os.File) *Client {
	tb.Helper()
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		tb.Fatal(err)
	}
	return newClient(tb, newPeer(conn.(*net.UnixConn)))
}

func newClient(tb testing.TB, c *Peer) *Client {
	tb.Cleanup(c.Close)
	return &Client{c, tb}
}

// Dial connects to a name.
func Dial(tb testing.TB, name string) *Client {
	tb.Helper()
	c, err := TryDial(tb, name)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// TryDial is Dial for goroutines of their own.
func TryDial(tb testing.TB, name string) (*Client, error) {
	c, err := DialPeer(name)
	if err != nil {
		return nil, err
	}
	return newClient(tb, c), nil
}

// Send sends bytes, whatever they are.
func (c *Client) Send(b []byte) {
	c.tb.Helper()
	if err := c.TrySend(b); err != nil {
		c.tb.Fatalf("send: %v", err)
	}
}

// Read is TryRead, which must not fail.
func (c *Client) Read(t codec.Type) Answer {
	c.tb.Helper()
	a, err := c.TryRead(t)
	if err != nil {
		c.tb.Fatalf("answer to %v: %v", t, err)
	}
	return a
}

// Do asks and reads the answer.
func (c *Client) Do(t codec.Type, q codec.Request) Answer {
	c.tb.Helper()
	a, err := c.TryDo(t, q)
	if err != nil {
		c.tb.Fatalf("%v: %v", t, err)
	}
	return a
}

// Want asks, and fails unless the answer is errno, or success if that is 0.
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
	c.conn.SetReadDeadline(time.Now().Add(Patience))
	b := make([]byte, 64)
	n, err := c.conn.Read(b)
	// A helper that closes with bytes unread resets the connection.
	if n != 0 || err != io.EOF && !errors.Is(err, unix.ECONNRESET) {
		c.tb.Errorf("read %x, %v: want the end of the connection", b[:n], err)
	}
}

// Path returns a path as QEMU sends that of a fid: with its NUL.
func Path(s string) codec.CString { return codec.CString(s + "\x00") }

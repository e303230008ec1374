package helpertest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// Client is the QEMU side of a connection. Nothing that it does takes longer
// than Patience.
type Client struct {
	tb   testing.TB
	conn *net.UnixConn
	oob  []byte
}

// Answer is what came back, with the descriptor that came with it.
type Answer struct {
	codec.Answer
	Raw  []byte
	File *os.File // nil if there was none; closed when the test ends, at the latest
}

// NewClient returns the client on its end of a connection, and owns f.
func NewClient(tb testing.TB, f *os.File) *Client {
	tb.Helper()
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		tb.Fatal(err)
	}
	c := &Client{tb: tb, conn: conn.(*net.UnixConn), oob: make([]byte, unix.CmsgSpace(4*4))}
	tb.Cleanup(func() { c.conn.Close() })
	return c
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
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	c := &Client{tb: tb, conn: conn, oob: make([]byte, unix.CmsgSpace(4*4))}
	tb.Cleanup(func() { c.conn.Close() })
	return c, nil
}

// Conn returns the connection, for what is not the protocol.
func (c *Client) Conn() *net.UnixConn { return c.conn }

// Close ends the connection.
func (c *Client) Close() { c.conn.Close() }

// TrySend sends bytes, whatever they are.
func (c *Client) TrySend(b []byte) error {
	c.conn.SetWriteDeadline(time.Now().Add(Patience))
	_, err := c.conn.Write(b)
	return err
}

// Send sends bytes, whatever they are.
func (c *Client) Send(b []byte) {
	c.tb.Helper()
	if err := c.TrySend(b); err != nil {
		c.tb.Fatalf("send: %v", err)
	}
}

// TryRead reads the answer to a request of type t, with as many calls as QEMU
// makes: a descriptor must come in one message with its 4 bytes.
func (c *Client) TryRead(t codec.Type) (a Answer, err error) {
	c.conn.SetReadDeadline(time.Now().Add(Patience))
	if t.AnswersFD() {
		a.Raw = make([]byte, 4)
		n, oobn, flags, _, err := c.conn.ReadMsgUnix(a.Raw, c.oob)
		if err != nil {
			return a, err
		}
		a.File, err = fileIn(c.oob[:oobn])
		switch {
		case err != nil:
			return a, err
		case n == 0:
			return a, io.EOF
		case n != 4 || flags&unix.MSG_CTRUNC != 0:
			return a, fmt.Errorf("%v is answered by %d bytes with flags %#x", t, n, flags)
		}
	} else {
		a.Raw = make([]byte, codec.HeaderSize, codec.HeaderSize+codec.StatSize)
		if err := c.readFull(a.Raw); err != nil {
			return a, err
		}
		size := binary.NativeEndian.Uint32(a.Raw[4:])
		if size > codec.MaxPayload {
			return a, fmt.Errorf("%v is answered by a frame of %d bytes", t, size)
		}
		a.Raw = append(a.Raw, make([]byte, size)...)
		if err := c.readFull(a.Raw[codec.HeaderSize:]); err != nil {
			return a, err
		}
	}
	var n int
	a.Answer, n = codec.ParseAnswer(t, a.Raw)
	switch {
	case n != len(a.Raw):
		return a, fmt.Errorf("%v is answered by %x", t, a.Raw)
	case t.AnswersFD() && (a.File != nil) != (a.Errno == 0):
		return a, fmt.Errorf("%v is answered by %x, descriptor %v", t, a.Raw, a.File)
	}
	return a, nil
}

// readFull reads bytes that no descriptor may come with.
func (c *Client) readFull(b []byte) error {
	for have := 0; have < len(b); {
		n, oobn, _, _, err := c.conn.ReadMsgUnix(b[have:], c.oob)
		switch {
		case err != nil:
			return err
		case oobn != 0:
			return errors.New("a descriptor where none belongs")
		case n == 0 && have > 0:
			return io.ErrUnexpectedEOF
		case n == 0:
			return io.EOF
		}
		have += n
	}
	return nil
}

func fileIn(oob []byte) (*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(msgs) != 1 || len(fds) != 1 {
		return nil, fmt.Errorf("%d control messages, %d descriptors: %v", len(msgs), len(fds), err)
	}
	return os.NewFile(uintptr(fds[0]), "received"), nil
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

// TryDo asks and reads the answer.
func (c *Client) TryDo(t codec.Type, q codec.Request) (Answer, error) {
	if err := c.TrySend(q.Append(nil, t)); err != nil {
		return Answer{}, err
	}
	return c.TryRead(t)
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

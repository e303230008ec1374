// Package qemu is QEMU's side of a connection to a proxy helper: the client of
// bench, of the soak and of the tests.
//
// It makes the system calls that QEMU makes: a write for a request; a read for
// the header of an answer and one for its payload; for an answer of OPEN and
// CREATE one recvmsg, of 4 bytes and the descriptor. A client refuses an
// answer that no helper gives, and does not read on.
package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// Patience is the time limit that tests set. It is no measure of speed: only
// what hangs takes so long.
const Patience = 60 * time.Second

var (
	// ErrFrame reports an answer in a shape that the protocol does not have.
	ErrFrame = errors.New("malformed answer")
	// ErrDescriptor reports a descriptor without success, success of OPEN or
	// CREATE without one descriptor, or control messages of another kind.
	// The frames stay in step: the next answer can be read.
	ErrDescriptor = errors.New("descriptor missing or unexpected")
)

// Client is one connection. One goroutine may send while another one reads.
type Client struct {
	conn     *net.UnixConn // nil in a blocking client
	fd       int           // of a blocking client
	patience time.Duration // for each Send and each Read; 0 is forever

	// The last answer, as it was read.
	buf   [codec.MaxFrame]byte
	n     int // length in buf
	oob   [64]byte
	oobn  int // length in oob
	flags int // of the last recvmsg

	iov unix.Iovec
	msg unix.Msghdr
}

// Answer is one answer. Its bytes are valid until the client's next Read.
type Answer struct {
	codec.Answer
	Raw []byte // all of it, as it came
	FD  int    // the descriptor that came with it, which the caller owns; or -1
}

// File returns the descriptor as a file, which owns it; nil if there is none.
func (a *Answer) File() *os.File {
	if a.FD < 0 {
		return nil
	}
	return os.NewFile(uintptr(a.FD), "received")
}

// Dial connects to the socket of that name. Each Send and each Read fails after
// patience, unless that is 0.
func Dial(name string, patience time.Duration) (*Client, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return newClient(conn, patience), nil
}

// Adopt returns the client on a connection that f refers to, and owns f. As
// to patience see Dial.
func Adopt(f *os.File, patience time.Duration) (*Client, error) {
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return newClient(conn.(*net.UnixConn), patience), nil
}

func newClient(conn *net.UnixConn, patience time.Duration) *Client {
	return &Client{conn: conn, patience: patience}
}

// NewBlocking returns the client on a blocking socket, which it owns, for a
// goroutine that has a thread of its own. Its system calls are not announced
// to Go's scheduler, and its Send, Read and Answer neither allocate nor yield
// the thread: a yield of a locked thread costs two context switches. There is
// no time limit; Shutdown ends what blocks.
func NewBlocking(fd int) *Client {
	c := &Client{fd: fd}
	c.iov.Base = &c.buf[0]
	c.iov.SetLen(4)
	c.msg.Iov = &c.iov
	c.msg.Iovlen = 1
	return c
}

// Conn returns the connection, for what is not the protocol; nil in a blocking
// client.
func (c *Client) Conn() *net.UnixConn { return c.conn }

// Shutdown ends the connection of a blocking client, and what blocks in it.
func (c *Client) Shutdown() { unix.Shutdown(c.fd, unix.SHUT_RDWR) }

// Close closes the connection.
func (c *Client) Close() {
	if c.conn == nil {
		unix.Close(c.fd)
	} else {
		c.conn.Close()
	}
}

// Send sends bytes, which need not be a frame.
//
//go:nosplit
func (c *Client) Send(b []byte) error {
	if c.conn != nil {
		return c.sendConn(b)
	}
	n, _, e := unix.RawSyscall(unix.SYS_WRITE, uintptr(c.fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	switch {
	case e != 0:
		return e
	case int(n) != len(b):
		return io.ErrShortWrite
	}
	return nil
}

func (c *Client) sendConn(b []byte) error {
	if c.patience > 0 {
		c.conn.SetWriteDeadline(time.Now().Add(c.patience))
	}
	_, err := c.conn.Write(b)
	return err
}

// Read reads the bytes of the answer to a request of type t. The error is
// io.EOF if the connection has ended before it.
//
//go:nosplit
func (c *Client) Read(t codec.Type) error {
	c.n, c.oobn, c.flags = 0, 0, 0
	if c.conn != nil && c.patience > 0 {
		c.conn.SetReadDeadline(time.Now().Add(c.patience))
	}
	if t.AnswersFD() {
		return c.fill(4, true)
	}
	if err := c.fill(codec.HeaderSize, false); err != nil {
		return err
	}
	size := binary.NativeEndian.Uint32(c.buf[4:])
	if size > codec.MaxPayload {
		return codec.ErrSize
	}
	return c.fill(codec.HeaderSize+int(size), false)
}

// fill reads until buf holds end bytes: in one message if rights may come with
// them, else in as many as it takes.
//
//go:nosplit
func (c *Client) fill(end int, rights bool) error {
	for c.n < end {
		var n int
		var err error
		switch {
		case c.conn != nil:
			n, c.oobn, c.flags, _, err = c.conn.ReadMsgUnix(c.buf[c.n:end], c.oob[:])
		case rights:
			n, err = c.recvmsg()
		default:
			n, err = c.read(end)
		}
		switch {
		case err != nil && !errors.Is(err, io.EOF): // which is an error of ReadMsgUnix
			return err
		case n == 0 && c.n == 0:
			return io.EOF
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		c.n += n
		if rights && c.n < end || !rights && c.oobn > 0 {
			return c.refuse()
		}
	}
	return nil
}

// read is read(2) of a blocking client.
//
//go:nosplit
//go:norace
func (c *Client) read(end int) (int, error) {
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(c.fd),
			uintptr(unsafe.Pointer(&c.buf[c.n])), uintptr(end-c.n))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, e
		}
	}
}

// recvmsg is recvmsg(2) of a blocking client.
//
//go:nosplit
//go:norace
func (c *Client) recvmsg() (int, error) {
	for {
		c.msg.Control = &c.oob[0]
		c.msg.SetControllen(len(c.oob))
		n, _, e := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(c.fd),
			uintptr(unsafe.Pointer(&c.msg)), unix.MSG_CMSG_CLOEXEC)
		if e == 0 {
			c.oobn, c.flags = int(c.msg.Controllen), int(c.msg.Flags)
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, e
		}
	}
}

// Answer returns the answer that Read has read. On an error its descriptors
// are closed.
//
//go:nosplit
func (c *Client) Answer(t codec.Type) (a Answer, err error) {
	var n int
	a.Raw, a.FD = c.buf[:c.n], -1
	a.Answer, n = codec.ParseAnswer(t, a.Raw)
	failed := binary.NativeEndian.Uint32(c.buf[:]) != uint32(codec.Success)
	if t.AnswersFD() {
		failed = int32(binary.NativeEndian.Uint32(c.buf[:])) != codec.FDFollows
		a.FD = c.descriptor()
	}
	const maxErrno = 4095
	switch {
	case n == 0 || n != c.n || failed != (a.Errno != 0) || a.Errno > maxErrno:
		err = c.refuse()
	case t.AnswersFD() && failed != (c.oobn == 0) || !failed && t.AnswersFD() != (a.FD >= 0):
		err = c.refuseDescriptor()
	}
	if err != nil {
		a.FD = -1
	}
	return a, err
}

// descriptor returns the only descriptor in oob, or -1.
//
//go:nosplit
func (c *Client) descriptor() int {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c.oob[0]))
	if c.oobn < unix.SizeofCmsghdr+4 || int(h.Len) != unix.SizeofCmsghdr+4 ||
		h.Level != unix.SOL_SOCKET ||
		h.Type != unix.SCM_RIGHTS || c.flags&unix.MSG_CTRUNC != 0 {
		return -1
	}
	return int(int32(binary.NativeEndian.Uint32(c.oob[unix.SizeofCmsghdr:])))
}

func (c *Client) refuse() error {
	if c.oobn > 0 {
		return c.refuseDescriptor()
	}
	return fmt.Errorf("%w: %.80x", ErrFrame, c.buf[:c.n])
}

func (c *Client) refuseDescriptor() error {
	return fmt.Errorf("%w: %.80x with %d descriptors, flags %#x", ErrDescriptor, c.buf[:c.n],
		CloseRights(c.oob[:c.oobn]), c.flags)
}

// CloseRights closes the descriptors of control messages, and returns how many
// there were.
func CloseRights(oob []byte) (n int) {
	messages, _ := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i])
		for _, fd := range fds {
			unix.Close(fd)
			n++
		}
	}
	return n
}

// Receive is Read and Answer. Unlike that of Answer, the result is a copy.
func (c *Client) Receive(t codec.Type) (Answer, error) {
	err := c.Read(t)
	if err != nil {
		return Answer{FD: -1}, err
	}
	a, err := c.Answer(t)
	if err != nil {
		return a, fmt.Errorf("%v: %w", t, err)
	}
	a.Raw = append([]byte(nil), a.Raw...)
	a.Answer, _ = codec.ParseAnswer(t, a.Raw)
	return a, nil
}

// Do sends a request and receives its answer.
func (c *Client) Do(t codec.Type, q codec.Request) (Answer, error) {
	if err := c.Send(q.Append(nil, t)); err != nil {
		return Answer{FD: -1}, err
	}
	return c.Receive(t)
}

// Ended returns nil if the helper has closed the connection and sends nothing
// before. It waits for up to the client's patience.
func (c *Client) Ended() error {
	n, err := c.readByte(c.patience)
	// A helper that closes with bytes unread resets the connection.
	if n == 0 && (err == io.EOF || errors.Is(err, unix.ECONNRESET)) {
		return nil
	}
	return fmt.Errorf("%d bytes more and %v, want the end of the connection", n, err)
}

// Silent returns nil if nothing comes for d, and the connection goes on.
func (c *Client) Silent(d time.Duration) error {
	n, err := c.readByte(d)
	if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return fmt.Errorf("%d bytes more and %v, want silence", n, err)
}

func (c *Client) readByte(d time.Duration) (int, error) {
	c.conn.SetReadDeadline(time.Now().Add(d))
	return c.conn.Read(c.buf[:1])
}

// Path returns a path as QEMU sends that of a fid: with its NUL.
func Path(s string) codec.CString { return codec.CString(s + "\x00") }

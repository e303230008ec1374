// Package ipc is what passes between the supervisor and a server: messages on a
// socket pair, and the descriptors that a server is started with.
package ipc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Control is one end of the socket pair (SOCK_SEQPACKET) between the supervisor
// and a server. Each message is its kind and what follows.
type Control struct{ file *os.File }

// Kind is what a message says.
type Kind byte

// Hello is the first message in each direction: Version in a byte. A supervisor
// adds the server's number u32.
const Hello Kind = 'v'

// To the server.
const (
	Conn     Kind = 'c' // serve connection u32, u64 in the log, with its descriptor
	Stop     Kind = 's' // end all connections and leave
	HandOver Kind = 'h' // give all connections back and leave
	Ping     Kind = 'p' // let each loop count in pool/progress
)

// To the supervisor.
const (
	Filter   Kind = 'f' // its violations, by descriptor, are to be supervised
	Ready    Kind = 'r' // connections are taken
	Error    Kind = 'e' // the server can't start: text
	Ended    Kind = 'x' // connection u32 has ended
	Returned Kind = 'b' // connection u32 is given back, for another server
	NoRoom   Kind = 'n' // connection u32 has come without its descriptor
)

const maxMessage = 4096

// StopTime is how long requests in work may take after SIGTERM.
const StopTime = 10 * time.Second

// Files are the descriptors that a server is started with, in this order from 3
// on. The exported directory comes behind them: sandbox.Config.Start adds it.
type Files struct {
	Control  *os.File // the server's end of the socket pair
	Inflight *os.File // the server's own memory of requests in flight
	Progress *os.File // the memory of pool/progress, the same for all servers
	Program  *os.File // O_PATH, what the server is started from
}

// The numbers of Files and of the export in a server.
const (
	controlFD = 3 + iota
	inflightFD
	progressFD
	ProgramFD
	ExportFD
)

// Extra returns the files for exec.Cmd.ExtraFiles.
func (f Files) Extra() []*os.File {
	return []*os.File{f.Control, f.Inflight, f.Progress, f.Program}
}

// InheritedControl returns the control that this process, a server, was started
// with.
func InheritedControl() *Control { return &Control{inherited(controlFD, "control")} }

// Inherited returns what else it was started with, where AwaitHello has found
// this Version. The program is closed: nothing needs it any more.
func Inherited() (inflight, progress *os.File) {
	unix.Close(ProgramFD)
	return inherited(inflightFD, "inflight"), inherited(progressFD, "progress")
}

// New returns both ends; theirs is the one for the server.
func New() (ours *Control, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return &Control{os.NewFile(uintptr(fds[0]), "control")}, os.NewFile(uintptr(fds[1]), "control"), nil
}

func inherited(fd int, name string) *os.File {
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), name)
}

// Close closes this end.
func (c *Control) Close() error { return c.file.Close() }

// Shutdown ends what can be received, after what has come already.
func (c *Control) Shutdown() {
	if raw, err := c.file.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
}

// Send sends a message. The end may be closed meanwhile: its descriptor stays
// until this returns.
func (c *Control) Send(k Kind, body, oob []byte, flags int) error {
	msg := append([]byte{byte(k)}, body...)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return err
	}
	closed := raw.Control(func(fd uintptr) {
		err = unix.EINTR
		for err == unix.EINTR {
			err = unix.Sendmsg(int(fd), msg, oob, nil, unix.MSG_NOSIGNAL|flags)
		}
	})
	if closed != nil {
		return os.ErrClosed
	}
	return err
}

// SendConn sends a message about a connection, with its descriptor unless that
// is -1.
func (c *Control) SendConn(k Kind, id uint32, fd, flags int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	return c.Send(k, binary.NativeEndian.AppendUint32(nil, id), oob, flags)
}

// SendNewConn gives the server a connection: its slot, its number in the log and
// its descriptor.
func (c *Control) SendNewConn(id uint32, number uint64, fd, flags int) error {
	body := binary.NativeEndian.AppendUint32(nil, id)
	body = binary.NativeEndian.AppendUint64(body, number)
	return c.Send(Conn, body, unix.UnixRights(fd), flags)
}

// Message is one as it has come.
type Message struct {
	Kind Kind
	Body []byte
	FD   int // -1 for none
}

// Conn returns the connection that the message is about.
func (m Message) Conn() (id uint32, ok bool) {
	if len(m.Body) != 4 && (m.Kind != Conn || len(m.Body) != 12) {
		return 0, false
	}
	return binary.NativeEndian.Uint32(m.Body), true
}

// Number returns the number in the log of a connection that is to be served.
func (m Message) Number() uint64 {
	if len(m.Body) != 12 {
		return 0
	}
	return binary.NativeEndian.Uint64(m.Body[4:])
}

// Recv returns a message; io.EOF when the other side has gone.
func (c *Control) Recv() (Message, error) { return c.recv(0) }

func (c *Control) recv(flags int) (Message, error) {
	msg := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(int(c.file.Fd()), msg, oob, unix.MSG_CMSG_CLOEXEC|flags)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ECONNRESET || err == nil && n == 0:
			return Message{}, io.EOF
		case err != nil:
			return Message{}, err
		}
		m := Message{Kind(msg[0]), msg[1:n], -1}
		if cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(cmsgs) == 1 {
			if fds, err := unix.ParseUnixRights(&cmsgs[0]); err == nil && len(fds) == 1 {
				m.FD = fds[0]
			}
		}
		return m, nil
	}
}

// SendHello tells the server, before it is started, that it is number n.
func (c *Control) SendHello(n uint32) error {
	return c.Send(Hello, binary.NativeEndian.AppendUint32([]byte{Version}, n), nil, 0)
}

// AwaitHello exchanges version numbers with the supervisor and returns the
// server's own number. It does not wait: the supervisor has spoken first, if it
// has a version at all.
func (c *Control) AwaitHello() (n uint32, err error) {
	m, err := c.recv(unix.MSG_DONTWAIT)
	switch {
	case err == unix.EAGAIN:
		return 0, &VersionError{}
	case err != nil:
		return 0, fmt.Errorf("the supervisor's first message: %w", err)
	case m.Kind != Hello || len(m.Body) == 0:
		return 0, &VersionError{}
	case m.Body[0] != Version || len(m.Body) != 5:
		return 0, &VersionError{m.Body[0]}
	}
	return binary.NativeEndian.Uint32(m.Body[1:]), c.Send(Hello, []byte{Version}, nil, 0)
}

// VersionError says that the other side, or the memory that it has made, is of
// another version.
type VersionError struct{ Other byte } // 0 for none

func (e *VersionError) Error() string {
	other := "without a version"
	if e.Other != 0 {
		other = fmt.Sprint("of version ", e.Other)
	}
	return fmt.Sprintf("supervisor and server do not fit: one is %s, the other of version %d: "+
		"restart the helper to change the program", other, Version)
}

// SendReady tells the supervisor that the server takes connections.
func (c *Control) SendReady() error { return c.Send(Ready, nil, nil, 0) }

// SendFilter lets the supervisor supervise the server.
func (c *Control) SendFilter(violations *os.File) error {
	return c.Send(Filter, nil, unix.UnixRights(int(violations.Fd())), 0)
}

// SendError tells the supervisor why the server can't start.
func (c *Control) SendError(err error) error {
	text := err.Error()
	return c.Send(Error, []byte(text[:min(len(text), maxMessage-1)]), nil, 0)
}

// SendGone tells the supervisor that the server has closed a connection: it has
// ended, or another server is to go on with it.
func (c *Control) SendGone(id uint32, ended bool) error {
	if ended {
		return c.SendConn(Ended, id, -1, 0)
	}
	return c.SendConn(Returned, id, -1, 0)
}

// AwaitReady waits until the server takes connections.
func (c *Control) AwaitReady(supervise func(violations *os.File)) error {
	for greeted := false; ; {
		m, err := c.Recv()
		switch {
		case err != nil:
			return err
		case m.Kind == Hello && !greeted && len(m.Body) == 1 && m.Body[0] == Version:
			greeted = true
			continue
		case m.Kind == Filter && greeted && m.FD >= 0:
			supervise(os.NewFile(uintptr(m.FD), "violations"))
			continue
		}
		if m.FD >= 0 {
			unix.Close(m.FD)
		}
		switch {
		case m.Kind == Error:
			return errors.New(string(m.Body))
		case m.Kind == Hello && len(m.Body) > 0:
			return &VersionError{m.Body[0]}
		case !greeted:
			return &VersionError{}
		case m.Kind == Ready:
			return nil
		}
		return fmt.Errorf("the server says %q before it is ready", byte(m.Kind))
	}
}

// Serve is the server's side: it hands each connection to add, and calls ping
// when asked to, until the supervisor asks for the end (nil), in one way or the
// other, or is gone (io.EOF).
func (c *Control) Serve(
	add func(fd int, id uint32, number uint64), ping func(),
) (handOver bool, err error) {
	for {
		m, err := c.Recv()
		if err != nil {
			return false, err
		}
		switch id, ok := m.Conn(); {
		case m.Kind == Stop || m.Kind == HandOver:
			return m.Kind == HandOver, nil
		case m.Kind == Ping:
			ping()
		case m.Kind == Conn && ok && m.FD >= 0:
			add(m.FD, id, m.Number())
		case m.Kind == Conn && ok:
			// This process has as many descriptors as it may have.
			if err := c.SendConn(NoRoom, id, -1, 0); err != nil {
				return false, err
			}
		}
	}
}

package supervisor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Control is one end of the socket pair (SOCK_SEQPACKET) between the supervisor
// and a server. Each message is its kind and what follows.
type Control struct{ file *os.File }

type kind byte

// To the server.
const (
	msgConn     kind = 'c' // serve connection u32, with its descriptor
	msgStop     kind = 's' // end all connections and leave
	msgHandOver kind = 'h' // give all connections back and leave
)

// To the supervisor.
const (
	msgFilter   kind = 'f' // its violations, by descriptor, are to be supervised
	msgReady    kind = 'r' // connections are taken
	msgError    kind = 'e' // the server can't start: text
	msgEnded    kind = 'x' // connection u32 has ended
	msgReturned kind = 'b' // connection u32 is given back, for another server
	msgNoRoom   kind = 'n' // connection u32 has come without its descriptor
)

const maxMessage = 4096

// Descriptors that a server finds open.
const (
	ControlFD = 3
	JournalFD = 4
	programFD = 5 // what it has been started from, O_PATH
	ExportFD  = 6 // for confine.Enter
)

// newControl returns both ends; theirs is the one for the server.
func newControl() (ours *Control, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return &Control{os.NewFile(uintptr(fds[0]), "control")}, os.NewFile(uintptr(fds[1]), "control"), nil
}

// ServerControl returns the server's end, in the server.
func ServerControl() *Control { return &Control{inherited(ControlFD, "control")} }

// ServerJournal returns the in-flight memory, in the server.
func ServerJournal() *os.File {
	unix.Close(programFD)
	return inherited(JournalFD, "journal")
}

func inherited(fd int, name string) *os.File {
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), name)
}

// Close closes this end.
func (c *Control) Close() error { return c.file.Close() }

// shutdown ends what can be received, after what has come already.
func (c *Control) shutdown() {
	if raw, err := c.file.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
}

// send sends a message. The end may be closed meanwhile: its descriptor stays
// until this returns.
func (c *Control) send(k kind, body, oob []byte, flags int) error {
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

// sendConn sends a message about a connection, with its descriptor unless that
// is -1.
func (c *Control) sendConn(k kind, id uint32, fd, flags int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	return c.send(k, binary.NativeEndian.AppendUint32(nil, id), oob, flags)
}

// message is one as it has come.
type message struct {
	kind kind
	body []byte
	fd   int // -1 for none
}

// conn returns the connection that the message is about.
func (m message) conn() (id uint32, ok bool) {
	if len(m.body) != 4 {
		return 0, false
	}
	return binary.NativeEndian.Uint32(m.body), true
}

// recv returns a message; io.EOF when the other side has gone.
func (c *Control) recv() (message, error) {
	msg := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(int(c.file.Fd()), msg, oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ECONNRESET || err == nil && n == 0:
			return message{}, io.EOF
		case err != nil:
			return message{}, err
		}
		m := message{kind(msg[0]), msg[1:n], -1}
		if cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(cmsgs) == 1 {
			if fds, err := unix.ParseUnixRights(&cmsgs[0]); err == nil && len(fds) == 1 {
				m.fd = fds[0]
			}
		}
		return m, nil
	}
}

// SendReady tells the supervisor that the server takes connections.
func (c *Control) SendReady() error { return c.send(msgReady, nil, nil, 0) }

// SendFilter lets the supervisor supervise the server.
func (c *Control) SendFilter(violations *os.File) error {
	return c.send(msgFilter, nil, unix.UnixRights(int(violations.Fd())), 0)
}

// SendError tells the supervisor why the server can't start.
func (c *Control) SendError(err error) error {
	text := err.Error()
	return c.send(msgError, []byte(text[:min(len(text), maxMessage-1)]), nil, 0)
}

// SendGone tells the supervisor that the server has closed a connection: it has
// ended, or another server is to go on with it.
func (c *Control) SendGone(id uint32, ended bool) error {
	if ended {
		return c.sendConn(msgEnded, id, -1, 0)
	}
	return c.sendConn(msgReturned, id, -1, 0)
}

// awaitReady waits until the server takes connections.
func (c *Control) awaitReady(supervise func(violations *os.File)) error {
	for {
		m, err := c.recv()
		switch {
		case err != nil:
			return err
		case m.kind == msgFilter && m.fd >= 0:
			supervise(os.NewFile(uintptr(m.fd), "violations"))
		case m.kind == msgReady:
			return nil
		default:
			return errors.New(string(m.body))
		}
	}
}

// Serve is the server's side: it hands each connection to add, until the
// supervisor asks for the end (nil), in one way or the other, or is gone (io.EOF).
func (c *Control) Serve(add func(fd int, id uint32)) (handOver bool, err error) {
	for {
		m, err := c.recv()
		if err != nil {
			return false, err
		}
		switch id, ok := m.conn(); {
		case m.kind == msgStop || m.kind == msgHandOver:
			return m.kind == msgHandOver, nil
		case m.kind == msgConn && ok && m.fd >= 0:
			add(m.fd, id)
		case m.kind == msgConn && ok:
			// This process has as many descriptors as it may have.
			if err := c.sendConn(msgNoRoom, id, -1, 0); err != nil {
				return false, err
			}
		}
	}
}

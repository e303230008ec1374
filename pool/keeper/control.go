package keeper

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Control is one end of the socket pair (SOCK_SEQPACKET) between keeper and
// server. To the server: a connection with its descriptor, or stop. To the
// keeper, once: ready, or why the server can't start. Each message is its
// first byte and what follows.
type Control struct{ file *os.File }

const (
	msgConn  = 'c' // with one SCM_RIGHTS descriptor
	msgStop  = 's'
	msgReady = 'r'
	msgError = 'e' // and a text
)

const maxMessage = 4096

// ControlFD is the descriptor on which a server finds its end.
const ControlFD = 3

// newControl returns both ends; theirs is the one for the server.
func newControl() (ours *Control, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return &Control{os.NewFile(uintptr(fds[0]), "control")}, os.NewFile(uintptr(fds[1]), "control"), nil
}

// ServerControl returns the server's end, in the server.
func ServerControl() *Control {
	unix.CloseOnExec(ControlFD)
	return &Control{os.NewFile(ControlFD, "control")}
}

// Close closes this end.
func (c *Control) Close() error { return c.file.Close() }

func (c *Control) send(msg, oob []byte) error {
	for {
		err := unix.Sendmsg(int(c.file.Fd()), msg, oob, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}

// recv returns a message and the descriptor in it, or -1; io.EOF when the
// other side has gone.
func (c *Control) recv() (msg []byte, fd int, err error) {
	msg = make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4))
	var n, oobn, flags int
	for {
		n, oobn, flags, _, err = unix.Recvmsg(int(c.file.Fd()), msg, oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err == unix.ECONNRESET || err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, -1, err
	}
	fd = -1
	if cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(cmsgs) == 1 {
		if fds, err := unix.ParseUnixRights(&cmsgs[0]); err == nil && len(fds) == 1 {
			fd = fds[0]
		}
	}
	if fd < 0 && flags&unix.MSG_CTRUNC != 0 {
		return msg[:n], -1, unix.EMFILE
	}
	return msg[:n], fd, nil
}

// SendConn gives a copy of a connection's descriptor to the server.
func (c *Control) SendConn(fd int) error { return c.send([]byte{msgConn}, unix.UnixRights(fd)) }

// SendStop asks the server to end its connections and leave.
func (c *Control) SendStop() error { return c.send([]byte{msgStop}, nil) }

// SendReady tells the keeper that the server takes connections.
func (c *Control) SendReady() error { return c.send([]byte{msgReady}, nil) }

// SendError tells the keeper why the server can't start.
func (c *Control) SendError(err error) error {
	text := err.Error()
	return c.send(append([]byte{msgError}, text[:min(len(text), maxMessage-1)]...), nil)
}

func (c *Control) awaitReady() error {
	msg, _, err := c.recv()
	switch {
	case err != nil:
		return err
	case msg[0] == msgReady:
		return nil
	default:
		return errors.New(string(msg[1:]))
	}
}

// Serve is the server's side: it hands each connection to add, until the
// keeper asks for a stop (nil) or is gone (io.EOF).
func (c *Control) Serve(add func(fd int)) error {
	for {
		msg, fd, err := c.recv()
		switch {
		case err == unix.EMFILE:
			// The connection is lost: its client sees an end of file.
		case err != nil:
			return err
		case msg[0] == msgStop:
			return nil
		case fd >= 0:
			add(fd)
		}
	}
}

// Package ipc is what passes between the supervisor and a server: messages on a
// socket pair, and the descriptors that a server is started with.
package ipc

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Version is that of the messages, of the descriptors and of the memory that a
// server is started with. A program serves for a supervisor of its own version
// only.

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
	Config   Kind = 'C' // the second message: what to serve, in JSON
	Conn     Kind = 'c' // serve a connection: a NewConn, with its descriptor
	Stop     Kind = 's' // end all connections and leave
	HandOver Kind = 'h' // give all connections back and leave
	Ping     Kind = 'p' // let each loop count in pool/progress
)

// To the supervisor, which has a table of what a server may say when.
const (
	Filter   Kind = 'f' // its violations, by descriptor, are to be supervised
	Ready    Kind = 'r' // connections are taken
	Error    Kind = 'e' // the server can't start: text
	Ended    Kind = 'x' // connection u32 has ended
	Returned Kind = 'b' // connection u32 is given back, for another server
	NoRoom   Kind = 'n' // connection u32 has come without its descriptor
	Refused  Kind = 'd' // connection u32 can't be served, by no server
)

// Sizes of messages. A server's answer about a connection has 5 bytes.
const (
	maxMessage = 4096
	maxConfig  = 1 << 16
)

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

// Inherited returns the memories that this process, a server, was started with,
// where AwaitHello has found this Version. The program is closed: nothing needs
// it any more.
func Inherited() (inflight, progress *os.File) {
	unix.Close(ProgramFD)
	return inherited(inflightFD, "inflight"), inherited(progressFD, "progress")
}

// InheritedControl returns the end of the socket pair that this process, a
// server, was started with: its parent has made it, as the same user or as one that
// has given privileges away, in a user namespace, and can't have got any. It fails in a
// process that no supervisor has started.
func InheritedControl() (*Control, error) {
	kind, err := unix.GetsockoptInt(controlFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		return nil, fmt.Errorf("descriptor %d is no supervisor's socket: "+
			"a server is started by a supervisor, and by nothing else", controlFD)
	}
	peer, err := unix.GetsockoptUcred(controlFD, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d: peer of the control socket: %w", controlFD, err)
	}
	noNew, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("look at no_new_privs: %w", err)
	}
	// Both numbers are 0 in a PID namespace of the server's own.
	if int(peer.Pid) != os.Getppid() || int(peer.Uid) != os.Geteuid() && noNew == 0 {
		return nil, fmt.Errorf("descriptor %d is a socket of process %d, user %d: "+
			"a server is started by its supervisor, and by nothing else",
			controlFD, peer.Pid, peer.Uid)
	}
	return &Control{inherited(controlFD, "control")}, nil
}

// New returns both ends; theirs is the one for the server.
func New() (ours *Control, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours = &Control{os.NewFile(uintptr(fds[0]), "control")}
	return ours, os.NewFile(uintptr(fds[1]), "control"), nil
}

func inherited(fd int, name string) *os.File {
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), name)
}

// Close closes this end.
func (c *Control) Close() error { return c.file.Close() }

// Shutdown ends what can be received, after what has come already.
func (c *Control) Shutdown() {
	c.use(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
}

// RefuseDescriptors has the kernel refuse what the other side attaches to its
// messages from now on, where it can (Linux 6.16): a descriptor may be one whose
// last close waits, and whoever drops it waits then.
func (c *Control) RefuseDescriptors() { c.use(RefuseDescriptors) }

// RefuseDescriptors is the same for any unix socket; those that a listener makes
// are as it is. What was sent before can still be received.
func RefuseDescriptors(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSRIGHTS, 0)
}

// use calls f with the descriptor, which stays what it is until f returns, even
// if this end is closed meanwhile.
func (c *Control) use(f func(fd int) error) error {
	raw, err := c.file.SyscallConn()
	if err != nil {
		return err
	}
	closed := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	if closed != nil {
		return os.ErrClosed
	}
	return err
}

// Send sends a message.
func (c *Control) Send(k Kind, body, oob []byte, flags int) error {
	msg := append([]byte{byte(k)}, body...)
	return c.use(func(fd int) error {
		for {
			if err := unix.Sendmsg(fd, msg, oob, nil, unix.MSG_NOSIGNAL|flags); err != unix.EINTR {
				return err
			}
		}
	})
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

// NewConn is what a server is told of a connection: 21 bytes, in this order.
type NewConn struct {
	ID     uint32 // of its slot
	Number uint64 // in the log
	Peer   uint64 // connections of one number belong to the same machine
	// Raw promises that no descriptors can come by it (RefuseDescriptors): the
	// last close of one may wait.
	Raw bool
}

const newConnSize = 21

// SendNewConn gives the server a connection.
func (c *Control) SendNewConn(n NewConn, fd, flags int) error {
	body := binary.NativeEndian.AppendUint32(nil, n.ID)
	body = binary.NativeEndian.AppendUint64(body, n.Number)
	body = binary.NativeEndian.AppendUint64(body, n.Peer)
	if n.Raw {
		body = append(body, 1)
	} else {
		body = append(body, 0)
	}
	return c.Send(Conn, body, unix.UnixRights(fd), flags)
}

// Message is one as it has come.
type Message struct {
	Kind Kind
	Body []byte
	FD   int // -1 for none
	// Cut says that there was more than there was room for: bytes or
	// descriptors, which are closed.
	Cut bool
}

// Conn returns the connection that a server's message is about.
func (m Message) Conn() (id uint32, ok bool) {
	if len(m.Body) != 4 {
		return 0, false
	}
	return binary.NativeEndian.Uint32(m.Body), true
}

// NewConn returns the connection of a Conn.
func (m Message) NewConn() (n NewConn, ok bool) {
	b := m.Body
	if m.Kind != Conn || len(b) != newConnSize {
		return NewConn{}, false
	}
	return NewConn{
		ID:     binary.NativeEndian.Uint32(b),
		Number: binary.NativeEndian.Uint64(b[4:]),
		Peer:   binary.NativeEndian.Uint64(b[12:]),
		Raw:    b[20] == 1,
	}, true
}

// Close closes the descriptor, if there is one.
func (m Message) Close() {
	if m.FD >= 0 {
		unix.Close(m.FD)
	}
}

// Recv returns a message with room for so many descriptors, none or one; io.EOF
// when the other side has gone. Of what else comes with it nothing stays open.
// An empty message has the kind 0.
func (c *Control) Recv(descriptors int) (Message, error) {
	return c.recv(maxMessage, descriptors, 0)
}

func (c *Control) recv(size, descriptors, flags int) (m Message, err error) {
	msg := make([]byte, size)
	var oob []byte
	if descriptors > 0 {
		// CmsgSpace has room for two.
		oob = make([]byte, unix.CmsgLen(4*descriptors))
	}
	var n, oobn, got int
	err = c.use(func(fd int) error {
		for {
			n, oobn, got, _, err = unix.Recvmsg(fd, msg, oob, unix.MSG_CMSG_CLOEXEC|flags)
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.ECONNRESET || err == nil && n == 0 && oobn == 0 && hungUp(fd):
				return io.EOF
			}
			return err
		}
	})
	if err != nil {
		return Message{}, err
	}
	m = Message{FD: -1, Cut: got&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0}
	if n > 0 {
		m.Kind, m.Body = Kind(msg[0]), msg[1:n]
	}
	fds := descriptorsIn(oob[:oobn])
	if len(fds) == 1 && !m.Cut {
		m.FD = fds[0]
		return m, nil
	}
	for _, fd := range fds {
		unix.Close(fd)
		m.Cut = true
	}
	return m, nil
}

// hungUp tells the end of the stream from an empty message.
func hungUp(fd int) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if _, err := unix.Poll(fds, 0); err != unix.EINTR {
			return err != nil || fds[0].Revents != 0
		}
	}
}

// descriptorsIn returns all descriptors of all control messages.
func descriptorsIn(oob []byte) (fds []int) {
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range cmsgs {
		if some, err := unix.ParseUnixRights(&cmsgs[i]); err == nil {
			fds = append(fds, some...)
		}
	}
	return fds
}

// SendConfig tells a server that is to be started what it is to do.
func (c *Control) SendConfig(config any) error {
	b, err := json.Marshal(config)
	if err == nil && len(b) >= maxConfig {
		err = fmt.Errorf("%d bytes, more than %d: give fewer options", len(b), maxConfig-1)
	}
	if err == nil {
		err = c.Send(Config, b, nil, unix.MSG_DONTWAIT)
	}
	if err != nil {
		return fmt.Errorf("configure the server: %w", err)
	}
	return nil
}

// RecvConfig is the server's side.
func (c *Control) RecvConfig(config any) error {
	m, err := c.recv(maxConfig, 0, 0)
	switch {
	case err != nil:
		return fmt.Errorf("what to serve: %w", err)
	case m.Kind != Config || m.Cut:
		return errors.New("what to serve: the supervisor does not say so first")
	}
	if err := json.Unmarshal(m.Body, config); err != nil {
		return fmt.Errorf("what to serve: %w", err)
	}
	return nil
}

// SendHello tells the server, before it is started, that it is number n.
func (c *Control) SendHello(n uint32) error {
	return c.Send(Hello, binary.NativeEndian.AppendUint32([]byte{Version}, n), nil, 0)
}

// AwaitHello exchanges version numbers with the supervisor and returns the
// server's own number. It does not wait: the supervisor has spoken first, if it
// has a version at all.
func (c *Control) AwaitHello() (n uint32, err error) {
	m, err := c.recv(maxMessage, 0, unix.MSG_DONTWAIT)
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

// Serve is the server's side: it hands each connection to add, and calls ping
// when asked to, until the supervisor asks for the end (nil), in one way or the
// other, or is gone (io.EOF). A connection that add fails for is refused.
func (c *Control) Serve(add func(fd int, n NewConn) error, ping func()) (handOver bool, err error) {
	for {
		m, err := c.Recv(1)
		if err != nil {
			return false, err
		}
		n, ok := m.NewConn()
		switch {
		case m.Kind == Stop || m.Kind == HandOver:
			return m.Kind == HandOver, nil
		case m.Kind == Ping:
			ping()
		case ok && m.FD >= 0:
			if add(m.FD, n) != nil {
				err = c.SendConn(Refused, n.ID, -1, 0)
			}
		case ok:
			// This process has as many descriptors as it may have.
			err = c.SendConn(NoRoom, n.ID, -1, 0)
		}
		if err != nil {
			return false, err
		}
	}
}

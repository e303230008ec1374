package helpertest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// Peer is the QEMU side of a connection. Nothing that it does takes longer than
// Patience.
type Peer struct {
	conn *net.UnixConn
	oob  []byte
}

// Answer is what came back, with the descriptor that came with it.
type Answer struct {
	codec.Answer
	Raw  []byte
	File *os.File // nil if there was none; closed by the garbage collector, at the latest
}

func newPeer(conn *net.UnixConn) *Peer {
	return &Peer{conn: conn, oob: make([]byte, unix.CmsgSpace(4*4))}
}

// DialPeer connects to a name.
func DialPeer(name string) (*Peer, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return newPeer(conn), nil
}

// Conn returns the connection, for what is not the protocol.
func (c *Peer) Conn() *net.UnixConn { return c.conn }

// Close ends the connection.
func (c *Peer) Close() { c.conn.Close() }

// TrySend sends bytes, whatever they are.
func (c *Peer) TrySend(b []byte) error {
	c.conn.SetWriteDeadline(time.Now().Add(Patience))
	_, err := c.conn.Write(b)
	return err
}

// TryRead reads the answer to a request of type t, with as many calls as QEMU
// makes: a descriptor must come in one message with its 4 bytes.
func (c *Peer) TryRead(t codec.Type) (a Answer, err error) {
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
func (c *Peer) readFull(b []byte) error {
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

// TryDo asks and reads the answer.
func (c *Peer) TryDo(t codec.Type, q codec.Request) (Answer, error) {
	if err := c.TrySend(q.Append(nil, t)); err != nil {
		return Answer{}, err
	}
	return c.TryRead(t)
}

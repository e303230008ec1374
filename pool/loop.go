package pool

import (
	"fmt"
	"sync/atomic"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/ops"
)

// loop is a gnet event loop and the one connection that it serves, if any. All
// fields are the loop's own thread's, but fd, which changes under Server.mu.
type loop struct {
	gnet.BuiltinEventEngine

	srv    *Server
	client *gnet.Client
	fd     int         // -1 between connections
	opened atomic.Bool // tells Add that OnOpen has run

	in   inbox
	call ops.Call
	tx   sender
	pace pace
	slot bool // taken from the crowd

	served  atomic.Uint64 // answers, for Server.count
	counted uint64        // of them; under Server.mu
}

// newLoop starts an event loop of its own.
func newLoop(s *Server) (*loop, error) {
	l := &loop{srv: s, fd: -1}
	client, err := gnet.NewClient(l,
		gnet.WithNumEventLoop(1),
		gnet.WithReadBufferCap(smallFrames),
		gnet.WithLogger(gnetLog{s.log}))
	if err == nil {
		err = client.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("event loop: %w", err)
	}
	l.client = client
	return l, nil
}

// OnOpen begins with a connection. gnet only reads when epoll says that it
// can, so the socket may be a blocking one: recv and send choose by call.
func (l *loop) OnOpen(c gnet.Conn) ([]byte, gnet.Action) {
	l.opened.Store(true)
	if err := prepareSocket(c.Fd()); err != nil {
		l.srv.log.Error("connection refused", "error", err)
		return nil, gnet.Close
	}
	l.pace = newPace()
	l.srv.mu.Lock()
	defer l.srv.mu.Unlock()
	l.fd = c.Fd()
	if l.srv.draining {
		l.refuse()
	}
	l.srv.log.Info("client connected", "connection", l.fd)
	return nil, gnet.None
}

// OnClose ends with a connection; gnet closes the descriptor afterwards.
func (l *loop) OnClose(_ gnet.Conn, err error) gnet.Action {
	if n := l.in.end - l.in.start; n > 0 {
		l.srv.log.Warn("client left in the middle of a request", "connection", l.fd, "bytes", n)
		l.in.start = l.in.end
	}
	l.in.rest()
	l.srv.log.Info("client left", "connection", l.fd)
	l.srv.mu.Lock()
	l.fd = -1
	l.srv.mu.Unlock()
	l.srv.drop(l)
	return gnet.None
}

// refuse lets the kernel refuse what the client sends from now on; what it has
// sent already can still be read. The caller holds Server.mu.
func (l *loop) refuse() {
	if l.fd >= 0 {
		unix.Shutdown(l.fd, unix.SHUT_RD)
	}
}

// OnTraffic is a connection's turn: it serves what has come and all that comes
// while the connection stays (stay.go). It leaves nothing in gnet's buffers.
func (l *loop) OnTraffic(c gnet.Conn) gnet.Action {
	defer l.giveSlot()
	b, _ := c.Next(-1)
	for len(b) > 0 {
		b = b[l.in.put(b):]
		if action := l.serveFrames(); action != gnet.None {
			return action
		}
	}
	for l.await() {
		if action := l.serveFrames(); action != gnet.None {
			return action
		}
	}
	l.in.rest()
	return gnet.None
}

// serveFrames serves the whole frames that have come.
func (l *loop) serveFrames() gnet.Action {
	for {
		t, payload, ok, err := l.in.frame()
		if err != nil {
			l.srv.log.Warn("connection closed: not the proxy protocol", "connection", l.fd, "request", t.String(), "error", err)
			return gnet.Close
		}
		if !ok {
			return gnet.None
		}
		if action := l.serve(t, payload); action != gnet.None {
			return action
		}
	}
}

// serve does one request and answers it.
func (l *loop) serve(t codec.Type, payload []byte) gnet.Action {
	l.srv.workers.Begin()
	l.srv.fs.Do(t, payload, &l.call)
	l.srv.workers.End()

	l.answering()
	errno := l.tx.send(l.fd, l.call.Out, l.call.FD)
	if l.call.FD >= 0 {
		unix.Close(l.call.FD)
		// The kernel may be out of room for descriptors under way, which
		// is an answer, too.
		if errno != 0 && errno != unix.EPIPE && errno != unix.ECONNRESET {
			l.call.Out = codec.AppendErrno(l.call.Out[:0], t, errno)
			errno = l.tx.send(l.fd, l.call.Out, -1)
		}
	}
	if errno != 0 {
		return gnet.Close // the client has left
	}
	if l.call.Stray {
		l.srv.log.Error("a thread could not take back the identity of a request: its connection ends", "connection", l.fd, "request", t.String())
		return gnet.Shutdown // the loop's goroutine, locked to the thread, ends, and the thread with it
	}
	return gnet.None
}

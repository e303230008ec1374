// Package pool serves connections: it reads their frames, gives each its turn
// in the file system and sends the answers.
//
//	pool.go      the server: connections come and go
//	loop.go      one connection on its event loop: frames in, answers out
//	stay.go      the one place that decides where a connection spends its time
//	buffer.go    the pooled buffer that frames are read into and decoded in
//	workers.go   the bound of requests in the file system at once
//	socket.go    recv and send, without a copy and without an allocation
//	keeper/      the process outside the export: the socket's name, the daemon
//
// # The way of a request
//
// Each connection has a gnet event loop of its own, and the thread that reads
// a request does it and answers it: QEMU waits for each answer, so a hand-off
// to another thread buys nothing and costs two wake-ups, more than most
// requests. What a pool is for remains: [Workers] bounds the requests that are
// in the file system at once, and a request that hangs there hangs alone.
//
// gnet says when a connection is readable, reads what came first and closes it
// when the peer has left. In between a connection that is being served stays
// on its thread, past gnet (stay.go).
//
// # Who owns what
//
// A connection's descriptor belongs to gnet from Add on. Only its loop's own
// thread reads and writes it, so it can't be closed and its number given to
// another connection in between. A descriptor that goes with an answer belongs
// to the loop from ops.FS.Do until it is sent.
package pool

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"github.com/panjf2000/gnet/v2/pkg/pool/goroutine"
	"virtfs-proxy-helper/ops"
)

// spareLoops is how many loops without a connection are kept for the next.
const spareLoops = 8

// gnet starts a goroutine pool for things that are not used here, in every
// process that links it. It would wake up twice a second.
func init() { goroutine.DefaultWorkerPool.Release() }

// Server serves any number of connections to one file system.
type Server struct {
	fs      *ops.FS
	log     *slog.Logger
	workers *Workers
	crowd   *crowd

	mu       sync.Mutex
	spare    []*loop
	serving  map[*loop]struct{}
	counted  int64 // when connections were last counted, in ns
	draining bool
	left     func()        // after each connection's end, with the number that remain
	empty    chan struct{} // closed when draining and nothing is being served
}

// NewServer returns a server of fs that has at most n requests in the file
// system at once.
func NewServer(fs *ops.FS, n int, log *slog.Logger) *Server {
	return &Server{
		fs:      fs,
		log:     log,
		workers: NewWorkers(n),
		crowd:   newCrowd(n),
		serving: make(map[*loop]struct{}),
		empty:   make(chan struct{}),
	}
}

// OnEmpty sets what is called when a connection has ended and none is left.
// It is to be set before the first Add.
func (s *Server) OnEmpty(f func()) { s.left = f }

// Add serves a connected stream socket, wherever it comes from, and owns fd
// whether it succeeds or not.
func (s *Server) Add(fd int) error {
	file := os.NewFile(uintptr(fd), "connection")
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		return err
	}
	l, err := s.take()
	if err != nil {
		conn.Close()
		return err
	}
	// Enroll closes conn and returns once the loop has the connection.
	// It forgets to tell of a connection that epoll would not take.
	_, err = l.client.Enroll(conn)
	if err == nil && !l.opened.Swap(false) {
		err = errors.New("epoll did not take the connection")
	}
	if err != nil {
		s.drop(l)
		return fmt.Errorf("enroll: %w", err)
	}
	return nil
}

// take returns a loop that serves no connection.
func (s *Server) take() (*loop, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return nil, errors.New("the server is stopping")
	}
	var l *loop
	if n := len(s.spare); n > 0 {
		l, s.spare = s.spare[n-1], s.spare[:n-1]
	} else {
		var err error
		if l, err = newLoop(s); err != nil {
			return nil, err
		}
	}
	s.serving[l] = struct{}{}
	return l, nil
}

// drop takes a loop back whose connection has ended. It is called on the loop
// itself, before its descriptor is closed.
func (s *Server) drop(l *loop) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.serving, l)
	if !l.call.Stray && len(s.spare) < spareLoops {
		s.spare = append(s.spare, l)
	} else {
		go l.client.Stop()
	}
	if len(s.serving) > 0 {
		return
	}
	if s.draining {
		close(s.empty)
	} else if s.left != nil {
		go s.left()
	}
}

// Serving returns the number of connections.
func (s *Server) Serving() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.serving)
}

// Drain ends all connections: what their clients have sent is answered, what
// they send from now on is refused by the kernel, so that none is ended while
// it waits for an answer. The channel closes when all have ended.
func (s *Server) Drain() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return s.empty
	}
	s.draining = true
	if len(s.serving) == 0 {
		close(s.empty)
	}
	for l := range s.serving {
		l.refuse()
	}
	return s.empty
}

// gnetLog passes on what gnet has to say, as debugging of ours: it reports
// each loop that starts, and errors that OnClose is told, too.
type gnetLog struct{ log *slog.Logger }

func (g gnetLog) Debugf(format string, args ...any) {}
func (g gnetLog) Infof(format string, args ...any)  {}
func (g gnetLog) Warnf(format string, args ...any)  { g.log.Warn(fmt.Sprintf("gnet: "+format, args...)) }
func (g gnetLog) Errorf(format string, args ...any) {
	g.log.Error(fmt.Sprintf("gnet: "+format, args...))
}
func (g gnetLog) Fatalf(format string, args ...any) { g.Errorf(format, args...) }

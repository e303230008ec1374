// Package pool serves connections: it reads their frames, gives each its turn
// in the file system and sends the answers.
//
//	pool.go      the server: connections come, rest in an epoll loop, and go
//	loop.go      the epoll loops: who rests there gets a turn, or is served there
//	conn.go      one connection's turn: frames in, answers out
//	stay.go      the one place that decides where a connection spends its time
//	monitor.go   what the Go runtime costs when little is asked
//	workers.go   the bound of requests in the file system at once
//	inflight/    what is in work, in memory that outlives the server
//	progress/    how far servers are, for the supervisor
//	supervisor/      the process outside the export: the socket's name, the daemon
//
// # The way of a request
//
// Idle connections rest in an epoll loop, gnet's. When a request comes, the
// connection gets a turn on a thread: that reads the request into its slot of
// the in-flight memory, copies it to a pooled buffer, decodes it there in place, does it
// and answers it. QEMU waits for each answer, so a hand-off to another thread
// buys nothing and costs two wake-ups, more than most requests; it is made once
// for a turn, which lasts as long as requests keep coming. What a pool is for
// remains: [Workers] bounds the requests that are in the file system at once,
// and a request that hangs there hangs alone.
//
// Where one CPU serves many connections, none of which asks for much of all, a
// change of threads costs more than most requests. Their loop serves them
// itself then, one after the other; a request that takes long keeps that
// thread, and another one goes on with the loop (loop.go).
//
// gnet's own connections are not used, only its poller: they would read into
// gnet's memory, and a request that is there when the server dies is lost.
//
// # Who owns what
//
// A connection's descriptor belongs to its conn, from Add until Server.finish
// closes it; only its turn, or the loop that serves it instead, reads and
// writes it, so it can't be closed and its number given to another connection
// in between. A descriptor that goes with an answer belongs to the turn from
// ops.FS.Do until it is sent.
package pool

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/progress"
)

// maxIdleThreads are kept for turns to come. A thread takes some 60 KiB, which an
// idle connection should not.
const maxIdleThreads = 8

// Server serves any number of connections to one file system.
type Server struct {
	fs       *ops.FS
	inflight *inflight.Memory
	progress *progress.Memory
	log      *slog.Logger
	workers  *Workers
	crowd    *crowd
	gone     func(id uint32, ended bool)

	idleThreads atomic.Int32 // threads that have ended a turn
	handingOver atomic.Bool
	handoverFD  int // an eventfd, readable once handing over has begun
	loops       []*loop

	mu       sync.Mutex
	turns    map[*conn]struct{}
	leaving  int // connections that are in neither any more, but not yet closed
	draining bool
	sealed   bool // nobody adds connections any more
	closed   sync.Once
	empty    chan struct{} // closed when draining or handing over, and nothing is served
}

// Memories are what a server shares with the supervisor.
type Memories struct {
	Inflight *inflight.Memory
	Progress *progress.Memory
	Server   uint32 // the server's number in Progress
}

// NewServer returns a server of fs that has at most n requests in the file
// system at once. gone is called when it has closed a connection: ended, or as
// it is, for another server to go on with. It must not wait.
func NewServer(
	fs *ops.FS, m Memories, n int, gone func(id uint32, ended bool), log *slog.Logger,
) (*Server, error) {
	s := &Server{
		fs:       fs,
		inflight: m.Inflight,
		progress: m.Progress,
		log:      log,
		workers:  NewWorkers(n),
		crowd:    newCrowd(n),
		gone:     gone,
		turns:    make(map[*conn]struct{}),
		empty:    make(chan struct{}),
	}
	var err error
	if s.handoverFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	records := m.Progress.Loops(m.Server)
	for i := range Loops() {
		l, err := newLoop(s, &records[i])
		if err != nil {
			return nil, err
		}
		s.loops = append(s.loops, l)
	}
	return s, nil
}

// Loops returns the number of epoll loops of a server, which takes three
// descriptors for each.
func Loops() int {
	return min(progress.MaxLoops, max(1, runtime.NumCPU()/2)) // the other CPUs are the clients'
}

// Close ends the epoll loops of a server that has no connections any more.
func (s *Server) Close() error {
	var err error
	for _, l := range s.loops {
		err = errors.Join(err, l.close())
	}
	return errors.Join(err, unix.Close(s.handoverFD))
}

// Add serves a connected stream socket, which the server owns from now on.
// What another server has left of it is in its slot of the in-flight memory,
// which is id. number is what the log calls it. raw promises that no descriptors
// can come by it: the last close of one may wait, which must not happen in a call
// that the scheduler does not see.
func (s *Server) Add(fd int, id uint32, number uint64, raw bool) error {
	c := &conn{srv: s, id: id, number: number, fd: fd, raw: raw, pace: newPace(),
		loop: s.loops[int(id)%len(s.loops)],
		slot: s.inflight.Slot(id), progress: s.progress.Conn(id)}
	if c.slot == nil || c.progress == nil {
		c.close(true)
		return fmt.Errorf("no memory for connection %d", id)
	}
	if err := prepare(fd); err != nil {
		c.close(true)
		return err
	}
	c.log().Debug("connection")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turns[c] = struct{}{}
	if s.draining {
		c.refuse()
	}
	go s.serve(c)
	return nil
}

// serve is the goroutine of a turn.
func (s *Server) serve(c *conn) {
	if s.idleThreads.Add(-1) < 0 {
		s.idleThreads.Add(1)
	}
	end := c.take()
	s.mu.Lock()
	closing := s.finish(c, end)
	s.mu.Unlock()
	if closing != nil {
		closing()
	}
	if s.idleThreads.Add(1) <= maxIdleThreads {
		return
	}
	s.idleThreads.Add(-1)
	s.mu.Lock()
	last := len(s.turns) == 0 && nanotime() > s.crowd.lately // a crowd has no turns
	s.mu.Unlock()
	if last { // of many: what they took goes back to the system
		debug.FreeOSMemory()
	}
	runtime.LockOSThread() // the thread ends with this goroutine
}

// finish ends a turn. The caller holds mu. What closes the connection, if that is
// to be, is returned: it may wait, so the caller runs it without mu, and not
// where others wait for it.
func (s *Server) finish(c *conn, end outcome) (closing func()) {
	if end == idle && s.handingOver.Load() {
		end = handedOver
	}
	var failed error
	switch end {
	case tainted:
		go s.serve(c) // on another thread: this goroutine ends, and its thread with it
		return nil
	case idle:
		if failed = c.loop.rest(c); failed == nil {
			return nil
		}
		end = peerClosed
	}
	delete(s.turns, c)
	s.leaving++
	return s.closing(c, end, failed)
}

// closing returns what closes a connection, for the reason end, or failed if
// that is not nil.
func (s *Server) closing(c *conn, end outcome, failed error) func() {
	return func() {
		switch n := c.slot.Pending(); {
		case failed != nil:
			c.log().Error("connection closed", "error", failed)
		case end == peerClosed && n > 0 && !c.told:
			c.log().Warn("client left in the middle of a request", "bytes", n)
		}
		c.close(end == peerClosed)
		s.gone(c.id, end == peerClosed)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.leaving--
		s.closeIfEmpty()
	}
}

func (s *Server) closeIfEmpty() {
	if (s.draining || s.sealed || s.handingOver.Load()) && s.serving() == 0 && s.leaving == 0 {
		s.closed.Do(func() { close(s.empty) })
	}
}

// Serving returns the number of connections.
func (s *Server) Serving() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serving()
}

func (s *Server) serving() int {
	n := len(s.turns)
	for _, l := range s.loops {
		n += len(l.resting)
	}
	return n
}

// Ping makes each loop count that it has come round.
func (s *Server) Ping() {
	for _, l := range s.loops {
		unix.Write(l.pingFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

// Drain ends all connections: what their clients have sent is answered, what
// they send from now on is refused by the kernel, so that none is ended while
// it waits for an answer. The channel closes when all have ended.
func (s *Server) Drain() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.handingOver.Load() {
		return s.empty
	}
	s.draining = true
	for c := range s.turns {
		c.refuse()
	}
	for _, l := range s.loops {
		for _, c := range l.resting {
			c.refuse()
		}
	}
	s.closeIfEmpty()
	return s.empty
}

// Empty returns a channel that closes when no connection is left, if none is
// added any more.
func (s *Server) Empty() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed = true
	s.closeIfEmpty()
	return s.empty
}

// HandOver leaves all connections to another server, each once its request in
// work is answered. The channel closes when all have gone.
func (s *Server) HandOver() <-chan struct{} {
	for _, closing := range s.handOver() {
		closing()
	}
	return s.empty
}

// handOver begins it, and returns what closes the connections that rest.
func (s *Server) handOver() (closing []func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.handingOver.Load() {
		return nil
	}
	s.handingOver.Store(true)
	unix.Write(s.handoverFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	for _, l := range s.loops {
		for _, c := range l.resting {
			if c != l.here { // the loop sees to that
				l.unrest(c)
				closing = append(closing, s.finish(c, handedOver))
			}
		}
	}
	s.closeIfEmpty()
	return closing
}

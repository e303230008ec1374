// Package pool serves connections: an epoll loop reads their requests, a bounded
// pool of workers does them.
//
//	server.go    the server: connections come and go, and are parked or leased
//	loop.go      the epoll loop, in which connections are parked
//	workers.go   the bounded pool, and whose turn it is
//	conn.go      a lease: requests in, answers out
//	wait.go      how a worker waits for the next request
//	policy.go    how long, and when a lease ends: it decides, others do
//	runtime.go   what the Go runtime is told
//	run.go       the server process
//	inflight/    what is in work, in memory that outlives the server
//	progress/    how far servers are, for the supervisor
//	supervisor/  the process outside the export: the socket's name, the daemon
//
// # The way of a request
//
//	        a whole request, or room for an answer
//	      .----------------------------------------.
//	      |                                        v
//	   parked                                   leased
//	in the epoll loop                   to a worker, or in its queue
//	      ^                                        |
//	      '----------------------------------------'
//	        nothing asked for long, others wait, or
//	        the client does not read its answer
//
// The loop, gnet's poller, receives what comes into the connection's slot of the
// in-flight memory. A connection with a whole request goes to a worker, which is a
// thread: that copies the request to a pooled buffer, decodes it there in place,
// does it and answers. QEMU waits for each answer, so to hand requests from thread
// to thread buys nothing and costs two wake-ups, more than most requests: the worker
// keeps the connection while requests keep coming (a lease). A request that hangs
// hangs alone. What has no thread to wait on waits without one: an answer that the
// client does not read in the loop, a file that is leased (fcntl(2)) for a timer.
//
// gnet's own connections are not used, only its poller: they would read into
// gnet's memory, and a request that is there when the server dies is lost.
//
// # Who owns what
//
// A connection's descriptor belongs to its conn, from Add until Server.leave closes
// it; only its worker, or the loop while it is parked, reads and writes it, so it
// can't be closed and its number given to another connection in between. A
// descriptor that goes with an answer belongs to the connection from ops.FS.Do until
// it is sent.
package pool

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/progress"
)

// Server serves any number of connections to one file system.
type Server struct {
	fs       *ops.FS
	inflight *inflight.Memory
	progress *progress.Memory
	log      *slog.Logger
	workers  *workers
	loop     *loop
	noBusy   bool // no busy-polling
	gone     func(id uint32, ended bool)

	handingOver atomic.Bool
	handoverFD  int // an eventfd, readable once handing over has begun

	mu       sync.Mutex
	conns    map[*conn]struct{} // parked or leased
	peers    map[uint64]*peer   // of conns
	leaving  int                // connections that are not in conns any more, but not yet closed
	used     bool               // since memory was given back
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

// Loops is the number of epoll loops of a server, which takes three descriptors
// for each.
const Loops = 1

// NewServer returns a server of fs as cfg says. gone is called when it has closed a
// connection: ended, or as it is, for another server to go on with. It must not
// wait.
func NewServer(
	fs *ops.FS, m Memories, cfg *Config, gone func(id uint32, ended bool), log *slog.Logger,
) (*Server, error) {
	s := &Server{
		fs:       fs,
		inflight: m.Inflight,
		progress: m.Progress,
		log:      log,
		noBusy:   cfg.NoBusyPoll,
		gone:     gone,
		conns:    make(map[*conn]struct{}),
		peers:    make(map[uint64]*peer),
		empty:    make(chan struct{}),
	}
	s.workers = newWorkers(cfg.Workers, s.lease)
	var err error
	if s.handoverFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	s.loop, err = newLoop(s, &m.Progress.Loops(m.Server)[0])
	return s, err
}

// Close ends the loop and the workers of a server that has no connections any more.
func (s *Server) Close() error {
	s.workers.close()
	return errors.Join(s.loop.close(), unix.Close(s.handoverFD))
}

// Add serves a connected stream socket, which the server owns from now on. What
// another server has left of it is in its slot of the in-flight memory.
func (s *Server) Add(fd int, n ipc.NewConn) error {
	c := &conn{srv: s, id: n.ID, number: n.Number, fd: fd, raw: n.Raw,
		slot: s.inflight.Slot(n.ID), progress: s.progress.Conn(n.ID)}
	c.policy.noBusyPoll = s.noBusy
	if c.slot == nil || c.progress == nil {
		c.close(true)
		return fmt.Errorf("no memory for connection %d", n.ID)
	}
	if err := prepare(fd); err != nil {
		c.close(true)
		return err
	}
	c.log().Debug("connection")
	s.mu.Lock()
	defer s.mu.Unlock()
	c.peer = s.peers[n.Peer]
	if c.peer == nil {
		c.peer = &peer{number: n.Peer}
		s.peers[n.Peer] = c.peer
	}
	c.peer.conns++
	s.conns[c] = struct{}{}
	s.used = true
	if s.draining {
		c.refuse()
	}
	s.workers.submit(c)
	return nil
}

// lease is what a worker does with a connection. Once that is parked or submitted it
// is another thread's.
func (s *Server) lease(c *conn) (sound bool) {
	setSlack(workerSlack)
	end, sound := c.serve()
	switch end {
	case queues:
		s.workers.submit(c)
		return sound
	case retries:
		time.AfterFunc(c.retryIn(), func() { s.workers.submit(c) })
		return sound
	}
	s.mu.Lock()
	var failed error
	if end == parks && !s.handingOver.Load() {
		if failed = s.loop.park(c); failed == nil {
			s.mu.Unlock()
			return sound
		}
	}
	closing := s.leave(c, end == ends || failed != nil, failed)
	s.mu.Unlock()
	closing()
	return sound
}

// leave takes out a connection that is neither parked nor leased any more. The
// caller holds mu. It returns what closes the connection, which may wait: the caller
// runs it without mu, and not where others wait for it.
func (s *Server) leave(c *conn, ended bool, failed error) (closing func()) {
	delete(s.conns, c)
	if c.peer.conns--; c.peer.conns == 0 {
		delete(s.peers, c.peer.number)
	}
	s.leaving++
	return func() {
		switch n := c.slot.Pending(); {
		case failed != nil:
			c.log().Error("connection closed", "error", failed)
		case ended && n > 0 && !c.told:
			c.log().Warn("client left in the middle of a request", "bytes", n)
		}
		c.close(ended)
		s.gone(c.id, ended)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.leaving--
		s.closeIfEmpty()
	}
}

func (s *Server) closeIfEmpty() {
	if (s.draining || s.sealed || s.handingOver.Load()) && len(s.conns) == 0 && s.leaving == 0 {
		s.closed.Do(func() { close(s.empty) })
	}
}

// Serving returns the number of connections.
func (s *Server) Serving() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// hungAfter is how old a request is that is not going to make its worker busy.
const hungAfter = time.Second

// Ping makes the loop count that it has come round. The supervisor asks for it each
// second, or each few while nothing is in work.
func (s *Server) Ping() {
	s.loop.ping()
	s.mu.Lock()
	defer s.mu.Unlock()
	hung, now := int32(0), progress.Now()
	for c := range s.conns {
		if w := c.progress.Work(); w.Age(now) > hungAfter && !w.Answering() {
			hung++
		}
	}
	s.workers.hung.Store(hung)
	switch {
	case s.workers.leases.Load() > 0:
		s.used = true
	case s.used: // what requests took goes back to the system
		s.used = false
		s.workers.procs.rest()
		go debug.FreeOSMemory()
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
	for c := range s.conns {
		c.refuse()
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
// work is answered, or the answer is there for the other server to send. The
// channel closes when all have gone.
func (s *Server) HandOver() <-chan struct{} {
	for _, closing := range s.handOver() {
		closing()
	}
	return s.empty
}

// handOver begins it, and returns what closes the connections that no worker has.
func (s *Server) handOver() (closing []func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.handingOver.Load() {
		return nil
	}
	s.handingOver.Store(true)
	unix.Write(s.handoverFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	for _, c := range s.loop.parked {
		s.loop.unpark(c)
		closing = append(closing, s.leave(c, false, nil))
	}
	for _, c := range s.workers.takeBack(s.peers) {
		closing = append(closing, s.leave(c, false, nil))
	}
	s.closeIfEmpty()
	return closing
}

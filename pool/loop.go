package pool

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	gerrors "github.com/panjf2000/gnet/v2/pkg/errors"
	glogging "github.com/panjf2000/gnet/v2/pkg/logging"
	"github.com/panjf2000/gnet/v2/pkg/netpoll"
	"github.com/panjf2000/gnet/v2/pkg/queue"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/pool/progress"
)

// stuckAfter is how long a request may take on a loop before another thread
// leads that. It is more than a thread waits that a client takes the CPU from.
const stuckAfter = 8 * time.Millisecond

// waitTakes is what it takes at least to wait in epoll, rather than to find
// there what has come already.
const waitTakes = 4 * time.Microsecond

// loop is an epoll loop, where connections rest. A request that comes there
// gives its connection a turn on a thread, or is served by the loop itself
// (stay.go says which): with many connections that saves the change of threads,
// most of what a request costs then.
//
// A request may hang. So the thread that leads the loop is watched: if it
// serves one connection for longer than stuckAfter, another thread leads from
// there on, and the connection keeps the old one for a turn of its own.
type loop struct {
	srv    *Server
	poller *netpoll.Poller
	// pingFD is an eventfd in the poller. It is level-triggered, unlike the
	// poller's own: a leader that hangs with it in its list takes nothing from the
	// next one.
	pingFD   int
	progress *progress.Loop

	// Under Server.mu:
	resting  map[int]*conn // in the poller, by descriptor
	leader   *leader
	here     *conn // that the leader serves itself, and
	began    int64 // since when, in ns
	ended    int64 // when it last did so
	visits   uint  // how often it has done so
	watching bool
	recent   struct{ visits, waits uint } // since idles was asked
}

// leader is the goroutine that leads a loop.
type leader struct{ turn turn }

// gnetLog is what gnet logs by: else it would open a time zone's file, and write
// to this process' descriptors.
type gnetLog struct{ log *slog.Logger }

func (g gnetLog) Debugf(format string, a ...any) {
	g.log.Debug("gnet", "text", fmt.Sprintf(format, a...))
}
func (g gnetLog) Infof(format string, a ...any) {
	g.log.Info("gnet", "text", fmt.Sprintf(format, a...))
}
func (g gnetLog) Warnf(format string, a ...any) {
	g.log.Warn("gnet", "text", fmt.Sprintf(format, a...))
}
func (g gnetLog) Errorf(format string, a ...any) {
	g.log.Error("gnet", "text", fmt.Sprintf(format, a...))
}
func (g gnetLog) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }

func newLoop(s *Server, record *progress.Loop) (*loop, error) {
	glogging.SetDefaultLoggerAndFlusher(gnetLog{s.log}, nil)
	p, err := netpoll.OpenPoller()
	if err != nil {
		return nil, fmt.Errorf("epoll loop: %w", err)
	}
	l := &loop{srv: s, poller: p, resting: make(map[int]*conn), progress: record}
	if l.pingFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := p.AddRead(&netpoll.PollAttachment{FD: l.pingFD}, false); err != nil {
		return nil, fmt.Errorf("epoll loop: %w", err)
	}
	record.Moved() // it is there
	l.lead()
	return l, nil
}

// lead starts a goroutine that leads the loop until Close, or until another
// one leads. The caller holds mu, or is the only one who knows the loop.
func (l *loop) lead() {
	me := &leader{newTurn()}
	l.leader, l.here = me, nil
	go func() {
		defer me.turn.end()
		beginThread()
		err := l.poller.Polling(func(fd int, _ netpoll.IOEvent, _ netpoll.IOFlags) error {
			return l.wake(me, fd)
		})
		switch {
		case !errors.Is(err, gerrors.ErrEngineShutdown):
			panic(fmt.Sprintf("epoll loop: %v", err)) // the supervisor starts another server
		case l.led(me):
			l.poller.Close()
			unix.Close(l.pingFD)
		}
	}()
}

func (l *loop) led(by *leader) bool {
	l.srv.mu.Lock()
	defer l.srv.mu.Unlock()
	return l.leader == by
}

// close ends a loop without connections.
func (l *loop) close() error {
	end := func(any) error { return gerrors.ErrEngineShutdown }
	return l.poller.Trigger(queue.HighPriority, end, nil)
}

// rest puts a connection into the poller. The caller holds mu.
func (l *loop) rest(c *conn) error {
	err := l.poller.AddRead(&netpoll.PollAttachment{FD: c.fd}, false)
	if err == nil {
		delete(l.srv.turns, c)
		l.resting[c.fd] = c
	}
	return err
}

// unrest takes a connection out of the poller. The caller holds mu.
func (l *loop) unrest(c *conn) {
	l.poller.Delete(c.fd)
	delete(l.resting, c.fd)
	l.srv.turns[c] = struct{}{}
}

// wake serves a connection or gives it a turn: bytes have come, or the client
// has left.
func (l *loop) wake(me *leader, fd int) error {
	s := l.srv
	s.mu.Lock() // also for a ping: a loop that can't have it serves nothing
	defer s.mu.Unlock()
	if fd == l.pingFD {
		var count [8]byte
		unix.Read(fd, count[:])
		l.progress.Moved()
		return nil
	}
	c := l.resting[fd]
	if c == nil {
		return nil
	}
	now := nanotime()
	if !s.loopServes(c, now) {
		c.minor.Store(false)
		l.unrest(c)
		go s.serve(c)
		return nil
	}
	if !l.watching {
		l.watching = true
		go l.watch()
	}
	l.visits++
	l.recent.visits++
	if now-l.ended > waitTakes.Nanoseconds() {
		l.recent.waits++
	}
	l.here, l.began = c, now
	s.mu.Unlock()
	end := c.visit(&me.turn)
	s.mu.Lock()
	l.ended = nanotime()
	if l.leader != me { // it was stuck, and has had a turn
		goClose(s.finish(c, end))
		return gerrors.ErrEngineShutdown
	}
	l.here = nil
	if end == idle && !s.handingOver.Load() {
		return nil
	}
	l.unrest(c)
	goClose(s.finish(c, end))
	if end == tainted { // this thread is to end
		l.lead()
		return gerrors.ErrEngineShutdown
	}
	return nil
}

// goClose closes a connection elsewhere, if there is something to close.
func goClose(closing func()) {
	if closing != nil {
		go closing()
	}
}

// idles tells whether the loop has waited for many of the requests that it has
// served itself since it was last asked. The caller holds mu.
func (l *loop) idles() bool {
	const enough, batch = 32, 3
	r := l.recent
	if r.visits < enough {
		return false
	}
	l.recent = struct{ visits, waits uint }{}
	return r.waits*batch > r.visits
}

// watch looks whether the leader is stuck, as long as it serves connections.
// It has a thread of its own: the runtime's timers may be late (monitor.go).
func (l *loop) watch() {
	runtime.LockOSThread() // and ends with it
	beginThread()
	tick := unix.NsecToTimespec(stuckAfter.Nanoseconds())
	seen, idle := uint(0), 0
	for {
		unix.Nanosleep(&tick, nil)
		l.srv.mu.Lock()
		if c := l.here; c != nil && nanotime()-l.began > stuckAfter.Nanoseconds() {
			l.unrest(c)
			c.apart = nanotime() + apartFor.Nanoseconds()
			l.lead()
		}
		if l.visits != seen {
			seen, idle = l.visits, 0
		} else if idle++; idle > 100 {
			l.watching = false
			l.srv.mu.Unlock()
			return
		}
		l.srv.mu.Unlock()
	}
}

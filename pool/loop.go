package pool

import (
	"errors"
	"fmt"
	"log/slog"

	gerrors "github.com/panjf2000/gnet/v2/pkg/errors"
	glogging "github.com/panjf2000/gnet/v2/pkg/logging"
	"github.com/panjf2000/gnet/v2/pkg/netpoll"
	"github.com/panjf2000/gnet/v2/pkg/queue"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/pool/progress"
)

// loop is the epoll loop in which connections are parked: for a request to come,
// or for the client to read an answer. It reads what comes, without waiting, and
// leases a connection to a worker when a whole request is there.
type loop struct {
	srv    *Server
	poller *netpoll.Poller
	// pingFD is an eventfd in the poller, by which the supervisor sees it move.
	pingFD   int
	progress *progress.Loop
	parked   map[int]*conn // by descriptor, under Server.mu
}

func newLoop(s *Server, record *progress.Loop) (*loop, error) {
	glogging.SetDefaultLoggerAndFlusher(gnetLog{s.log}, nil)
	p, err := netpoll.OpenPoller()
	if err != nil {
		return nil, fmt.Errorf("epoll loop: %w", err)
	}
	l := &loop{srv: s, poller: p, parked: make(map[int]*conn), progress: record}
	if l.pingFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := p.AddRead(&netpoll.PollAttachment{FD: l.pingFD}, false); err != nil {
		return nil, fmt.Errorf("epoll loop: %w", err)
	}
	record.Moved() // it is there
	go l.run()
	return l, nil
}

// run is the loop's goroutine, until close.
func (l *loop) run() {
	err := l.poller.Polling(func(fd int, _ netpoll.IOEvent, _ netpoll.IOFlags) error {
		l.wake(fd)
		return nil
	})
	if !errors.Is(err, gerrors.ErrEngineShutdown) {
		panic(fmt.Sprintf("epoll loop: %v", err)) // the supervisor starts another server
	}
	l.poller.Close()
	unix.Close(l.pingFD)
}

// close ends a loop without connections.
func (l *loop) close() error {
	end := func(any) error { return gerrors.ErrEngineShutdown }
	return l.poller.Trigger(queue.HighPriority, end, nil)
}

// ping has the loop count that it moves.
func (l *loop) ping() { unix.Write(l.pingFD, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// park puts a connection into the poller. The caller holds mu.
func (l *loop) park(c *conn) error {
	add := l.poller.AddRead
	if c.unsent.bytes != nil {
		add = l.poller.AddWrite
	}
	err := add(&netpoll.PollAttachment{FD: c.fd}, false)
	if err == nil {
		l.parked[c.fd] = c
	}
	return err
}

// unpark takes a connection out of the poller. The caller holds mu.
func (l *loop) unpark(c *conn) {
	l.poller.Delete(c.fd)
	delete(l.parked, c.fd)
}

// wake acts on what has come for a descriptor. It holds mu, as reading does not
// wait, so that a loop that can't have mu does not move.
func (l *loop) wake(fd int) {
	s := l.srv
	s.mu.Lock()
	defer s.mu.Unlock()
	if fd == l.pingFD {
		var count [8]byte
		unix.Read(fd, count[:])
		l.progress.Moved()
		return
	}
	c := l.parked[fd]
	if c == nil { // it was taken out after this event
		return
	}
	if c.raw && c.unsent.bytes == nil {
		n := received(c.slot.Receive(fd, unix.MSG_DONTWAIT, true))
		if n < 0 {
			l.unpark(c)
			go s.leave(c, true, nil)()
			return
		}
		if !c.ready() {
			return
		}
	}
	l.unpark(c)
	s.workers.submit(c)
}

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

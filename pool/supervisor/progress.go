package supervisor

import (
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/progress"
)

// tickTime is how often progress is looked at. The time to the next tick begins
// when the last one is over, so that one that comes late counts as one: a
// supervisor that was stopped, with its machine or alone, does not count that.
const tickTime = time.Second

// stuckTicks is for how many ticks a loop may not move, although it is asked to,
// until the server is replaced.
const stuckTicks = 10

// lateTime is how old a request is that the log tells of, and lateLines how many
// of them it tells of at a tick.
const (
	lateTime  = 5 * time.Second
	lateLines = 8
)

func (sv *supervisor) tick() {
	sv.logLate(progress.Now())
	if s := sv.current; s != nil && !sv.stopping && !s.killed {
		sv.checkLoops(s)
	}
}

// checkLoops ends a server whose loops do not all move, and asks them to. The
// server's socket may be full of what it was asked before.
func (sv *supervisor) checkLoops(s *server) {
	if !s.loops.moved() {
		s.loops.still++
	} else {
		s.loops.still = 0
	}
	if s.loops.still > stuckTicks { // the first of them was not asked for
		sv.log.Error("killing the server: it is alive, but its loop does not move", "pid", s.pid(), "ticks", stuckTicks)
		s.kill()
		return
	}
	s.control.Send(ipc.Ping, nil, nil, unix.MSG_DONTWAIT)
}

// loops are what a server's loops have counted.
type loops struct {
	records *[progress.MaxLoops]progress.Loop
	seen    [progress.MaxLoops]uint64
	still   int // ticks in which one of them has not counted
}

// newLoops returns those of a server that is not yet started.
func (sv *supervisor) newLoops(number uint32) loops {
	l := loops{records: sv.progress.Loops(number)}
	for i := range l.records {
		l.records[i].Reset()
	}
	return l
}

// moved tells that each loop has counted since the last call, of those that
// there are or were.
func (l *loops) moved() bool {
	all, any := true, false
	for i := range l.records {
		n := l.records[i].Count()
		if n != 0 || l.seen[i] != 0 {
			all, any = all && n != l.seen[i], true
		}
		l.seen[i] = n
	}
	return all && any
}

// logLate tells of requests that have been in work for long, and of the end of
// those that it has told of.
func (sv *supervisor) logLate(now int64) {
	lines := 0
	for id, c := range sv.conns {
		if c.server == nil || lines == lateLines {
			continue
		}
		was, is := c.late, sv.progress.Conn(id).Work()
		age := is.Age(now)
		switch same := is.Same(was); {
		case was != progress.Work{} && !same:
			sv.log.Info("a late request is answered", "connection", id, "request", was.Type().String(),
				"age", was.Age(now).Round(tickTime/10))
			c.late = progress.Work{}
			lines++
		case age < lateTime || is == was:
		case is.Answering():
			sv.log.Warn("a client does not read its answer", "connection", id, "request", is.Type().String(),
				"age", age.Round(tickTime/10))
			c.late = is
			lines++
		case !same:
			sv.log.Warn("a request is late: it has no answer yet", "connection", id, "request", is.Type().String(),
				"age", age.Round(tickTime/10))
			c.late = is
			lines++
		}
	}
}

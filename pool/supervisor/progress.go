package supervisor

import (
	"context"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/progress"
)

// tickTime is how often progress is looked at. The time to the next tick begins
// when the last one is over, so that one that comes late counts as one: a
// supervisor that was stopped, with its machine or alone, does not count that.
const tickTime = time.Second

// quietTime is the time to the next tick while nothing is in work and all loops
// move: both processes wake up for a tick, 2 ms of CPU.
const quietTime = 5 * tickTime

// stuckTicks is for how many ticks a loop may not move, although it is asked to,
// until the server is replaced.
const stuckTicks = 10

// lateTime is how old a request is that the log tells of, and lateLines how many
// of them it tells of at a tick.
const (
	lateTime  = 5 * time.Second
	lateLines = 8
)

// tick looks at progress and returns the time to the next tick.
func (sv *supervisor) tick() time.Duration {
	next := quietTime
	if sv.logLate(progress.Now()) {
		next = tickTime
	}
	if s := sv.current; s != nil && !sv.stopping && !s.killed {
		sv.checkLoops(s)
		if s.loops.still > 0 {
			next = tickTime
		}
	}
	return next
}

// checkLoops ends a server whose loops do not all move, and asks them to. The
// server's socket may be full of what it was asked before.
func (sv *supervisor) checkLoops(s *server) {
	if !s.loops.moved() {
		s.loops.still++
	} else {
		s.loops.still = 0
	}
	if s.loops.still > stuckTicks {
		sv.log.Error("killing the server: it is alive, but its loop does not move",
			"pid", s.pid(), "ticks", stuckTicks)
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
// those that it has told of. It returns whether any is in work.
func (sv *supervisor) logLate(now int64) (busy bool) {
	lines := 0
	for id, c := range sv.conns {
		was, is := c.late, sv.progress.Conn(id).Work()
		busy = busy || is != progress.Work{}
		if c.server == nil || lines == lateLines {
			continue
		}
		log := func(level slog.Level, msg string, w progress.Work) {
			sv.log.Log(context.Background(), level, msg, "connection", c.number,
				"request", w.Type().String(), "age", w.Age(now).Round(tickTime/10))
			lines++
		}
		age := is.Age(now)
		switch same := is.Same(was); {
		case was != progress.Work{} && !same:
			log(slog.LevelInfo, "a late request is answered", was)
			c.late = progress.Work{}
		case age < lateTime || is == was:
		case is.Answering():
			log(slog.LevelWarn, "a client does not read its answer", is)
			c.late = is
		case !same:
			log(slog.LevelWarn, "a request is late: it has no answer yet", is)
			c.late = is
		}
	}
	return busy
}

package logging

import (
	"log/slog"
	"sync"
	"time"
)

// rate is how many lines of a kind are logged: burst at once, then so many a
// second.
type rate struct{ burst, perSecond float64 }

var (
	messageRate = rate{200, 2}  // of one message
	serverRate  = rate{500, 20} // of one server's records
	// Who asks for each request gets more; the bound is for one that lies.
	serverDebugRate = rate{100_000, 50_000}
)

// tellEvery is how often it is told what was left out.
const tellEvery = 5 * time.Second

// limiter bounds the rate of lines, each kind's by itself. There are as many
// kinds as messages in the program, and servers.
type limiter struct {
	log func(slog.Record)

	mu    sync.Mutex
	kinds map[string]*kind
}

type kind struct {
	lines   float64 // that may be logged now
	at      time.Time
	leftOut int
}

func newLimiter(log func(slog.Record)) *limiter {
	return &limiter{log: log, kinds: make(map[string]*kind)}
}

// allow tells that a line may be logged, and counts it if it may not.
func (l *limiter) allow(name string, r rate) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.kinds[name]
	now := time.Now()
	if k == nil {
		k = &kind{lines: r.burst, at: now}
		l.kinds[name] = k
	}
	k.lines = min(r.burst, k.lines+r.perSecond*now.Sub(k.at).Seconds())
	k.at = now
	if k.lines >= 1 {
		k.lines--
		return true
	}
	if k.leftOut++; k.leftOut == 1 {
		time.AfterFunc(tellEvery, func() { l.tell(name) })
	}
	return false
}

// tell logs how many lines of a kind were left out.
func (l *limiter) tell(name string) {
	l.mu.Lock()
	n := 0
	if k := l.kinds[name]; k != nil {
		n, k.leftOut = k.leftOut, 0
	}
	l.mu.Unlock()
	if n > 0 {
		r := slog.NewRecord(time.Now(), slog.LevelWarn, "too many lines: some were left out", 0)
		r.Add("of", name, "count", n)
		l.log(r)
	}
}

func (l *limiter) tellAll() {
	l.mu.Lock()
	var names []string
	for name := range l.kinds {
		names = append(names, name)
	}
	l.mu.Unlock()
	for _, name := range names {
		l.tell(name)
	}
}

// forget ends a kind.
func (l *limiter) forget(name string) {
	l.tell(name)
	l.mu.Lock()
	delete(l.kinds, name)
	l.mu.Unlock()
}

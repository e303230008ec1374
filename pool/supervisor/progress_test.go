package supervisor

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/pool/logging"
	"virtfs-proxy-helper/pool/progress"
)

// withProgress returns a supervisor of n connections, and the memory as a server
// has it.
func withProgress(t *testing.T, n int) (sv *supervisor, server *progress.Memory, log *bytes.Buffer) {
	t.Helper()
	f, err := progress.Create(n)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	log = &bytes.Buffer{}
	sv = &supervisor{conns: make(map[uint32]*conn)}
	sv.log = &logging.Log{Logger: slog.New(slog.NewTextHandler(log, nil))}
	if sv.progress, err = progress.Map(f); err != nil {
		t.Fatal(err)
	}
	if server, err = progress.Map(f); err != nil {
		t.Fatal(err)
	}
	for id := range uint32(n) {
		sv.conns[id] = &conn{server: &aServer}
	}
	return sv, server, log
}

var aServer = server{}

// Whatever a server says of its requests, the log grows by so many lines at a
// tick, and all that is true is told in time.
func TestHostileProgress(t *testing.T) {
	const n = 100
	sv, hostile, log := withProgress(t, n)
	later := progress.Now() + int64(2*lateTime)
	for tick := range 50 {
		for id := range uint32(n) {
			hostile.Conn(id).Begin(codec.Type(tick))
		}
		log.Reset()
		if !sv.logLate(later + int64(tick)) {
			t.Fatal("nothing is in work")
		}
		if lines := strings.Count(log.String(), "\n"); lines != lateLines {
			t.Fatalf("%d lines at a tick\n%s", lines, log)
		}
	}
	for id := range uint32(n) {
		hostile.Conn(id).End()
	}
	log.Reset()
	for range 2 * n / lateLines {
		if sv.logLate(later) {
			t.Fatal("something is in work")
		}
	}
	if strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "is answered") {
		t.Errorf("when all is answered:\n%s", log)
	}
	for id, c := range sv.conns {
		if c.late != (progress.Work{}) {
			t.Errorf("connection %d is late for ever", id)
		}
	}
}

// A request is told of once, and once more if its answer is not read.
func TestLateOnce(t *testing.T) {
	sv, server, log := withProgress(t, 1)
	c := server.Conn(0)
	c.Begin(codec.Mkdir)
	now := progress.Now()
	for i := range 20 {
		if i == 10 {
			c.Answering()
		}
		sv.logLate(now + int64(i)*int64(tickTime))
	}
	c.End()
	sv.logLate(now + 20*int64(tickTime))
	sv.logLate(now + 21*int64(tickTime))
	if n := strings.Count(log.String(), "request=MKDIR age="); n != 3 || strings.Count(log.String(), "\n") != 3 {
		t.Errorf("%s", log)
	}
}

// All loops must move, those of this server alone.
func TestLoopsMoved(t *testing.T) {
	sv, server, _ := withProgress(t, 1)
	server.Loops(3)[7].Moved() // of one before, by the same records
	l := sv.newLoops(3)
	records := server.Loops(3)
	if l.moved() {
		t.Error("no loop has moved")
	}
	records[0].Moved()
	records[1].Moved()
	if !l.moved() {
		t.Error("the loops have not moved at their start")
	}
	if l.moved() {
		t.Error("the loops have moved twice")
	}
	records[0].Moved()
	server.Loops(4)[1].Moved()
	if l.moved() {
		t.Error("the second loop has moved")
	}
	records[0].Moved()
	records[1].Moved()
	if !l.moved() {
		t.Error("the loops have not moved")
	}
	records[1].Reset() // by a hostile server
	if l.moved() {
		t.Error("a loop that is not there any more has moved")
	}
}

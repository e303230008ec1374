package progress

import (
	"math"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// both returns the memory as the supervisor and a server map it.
func both(tb testing.TB, n int) (supervisor, server *Memory) {
	tb.Helper()
	f, err := Create(n)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	var m [2]*Memory
	for i := range m {
		if m[i], err = Map(f); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { unix.Munmap(m[i].mem) })
	}
	if err := unix.Ftruncate(int(f.Fd()), 0); err == nil {
		tb.Error("a server can shrink the memory under others")
	}
	return m[0], m[1]
}

func TestRecords(t *testing.T) {
	if unsafe.Sizeof(Conn{}) != recordSize || unsafe.Sizeof(Loop{}) != recordSize {
		t.Fatal("records are not of one size")
	}
	supervisor, server := both(t, 3)
	if server.Conn(3) != nil || server.Conn(math.MaxUint32) != nil {
		t.Error("a connection beyond the last has a record")
	}
	before := Now()
	c := server.Conn(2)
	c.Begin(codec.Lremovexattr)
	w := supervisor.Conn(2).Work()
	if w.Type() != codec.Lremovexattr || w.Answering() {
		t.Errorf("%v, answering %v", w.Type(), w.Answering())
	}
	// The time lacks its low byte.
	if age, most := w.Age(Now()), time.Duration(Now()-before+lowByte); age < 0 || age > most {
		t.Errorf("age %v, at most %v", age, most)
	}
	if age := w.Age(Now() + int64(time.Hour)); age < time.Hour {
		t.Errorf("age %v in an hour", age)
	}
	c.Answering()
	if v := supervisor.Conn(2).Work(); !v.Answering() || !v.Same(w) || v.Type() != w.Type() {
		t.Errorf("%#x becomes %#x", w, v)
	}
	for _, n := range []uint32{0, 1} {
		if w := supervisor.Conn(n).Work(); w != (Work{}) {
			t.Errorf("connection %d: %#x", n, w)
		}
	}
	c.End()
	if w := supervisor.Conn(2).Work(); w.Age(math.MaxInt64) != 0 {
		t.Errorf("%#x at the end", w)
	}
	loops := server.Loops(servers + 1)
	loops[MaxLoops-1].Moved()
	if n := supervisor.Loops(1)[MaxLoops-1].Count(); n != 1 {
		t.Errorf("a loop has moved %d times", n)
	}
	for i := range supervisor.Loops(2) {
		if n := supervisor.Loops(2)[i].Count(); n != 0 {
			t.Errorf("loop %d of another server has moved", i)
		}
	}
}

// Whatever a server writes, the supervisor finds a type that has a name and an
// age that is none or past.
func TestHostileRecords(t *testing.T) {
	supervisor, server := both(t, 1)
	words := []uint64{1, lowByte, answering, 1 << 63, math.MaxUint64, math.MaxInt64, uint64(Now()) + 1<<40}
	for _, word := range words {
		server.Conn(0).work.Store(word)
		w := supervisor.Conn(0).Work()
		if age := w.Age(Now()); age < 0 || age > time.Duration(Now()) || w.Type().String() == "" {
			t.Errorf("%#x: %v, age %v", word, w.Type(), age)
		}
	}
}

func TestClock(t *testing.T) {
	// The same in every process, so it is the system's.
	if d := time.Duration(Now() - monotonic()); d < -time.Minute || d > time.Minute {
		t.Errorf("differs from CLOCK_MONOTONIC by %v", d)
	}
}

func TestNoAllocation(t *testing.T) {
	_, server := both(t, 1)
	c := server.Conn(0)
	if n := testing.AllocsPerRun(100, func() { c.Begin(codec.Lstat); c.Answering(); c.End() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRequest(b *testing.B) {
	_, server := both(b, 1)
	c := server.Conn(0)
	for b.Loop() {
		c.Begin(codec.Lstat)
		c.Answering()
		c.End()
	}
}

package pool

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// leases is a pool whose leases last until they are ended.
type leases struct {
	*workers
	mu    sync.Mutex
	began []*conn // in this order
	end   map[*conn]chan bool
}

func newLeases(t *testing.T, most int) *leases {
	l := &leases{end: map[*conn]chan bool{}}
	l.workers = newWorkers(most, func(c *conn) bool {
		end := make(chan bool)
		l.mu.Lock()
		l.began = append(l.began, c)
		l.end[c] = end
		l.mu.Unlock()
		return <-end
	})
	t.Cleanup(l.close)
	return l
}

// await returns the connections that were leased, once they are n.
func (l *leases) await(t *testing.T, n int) []*conn {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		began := l.began
		l.mu.Unlock()
		if len(began) >= n {
			return began
		}
		if time.Now().After(end) {
			t.Fatalf("%d leases, want %d", len(began), n)
		}
	}
}

func (l *leases) finish(c *conn, sound bool) {
	l.mu.Lock()
	end := l.end[c]
	l.mu.Unlock()
	end <- sound
}

func conns(n int, p *peer) (all []*conn) {
	for range n {
		all = append(all, &conn{peer: p})
	}
	return all
}

// No peer has more than half of the workers, and those who wait take turns.
func TestShares(t *testing.T) {
	l := newLeases(t, 4)
	greedy := conns(10, &peer{})
	for _, c := range greedy {
		l.submit(c)
	}
	l.await(t, 2)
	other := conns(3, &peer{})
	for _, c := range other {
		l.submit(c)
	}
	began := l.await(t, 4)
	for _, want := range []*conn{greedy[0], greedy[1], other[0], other[1]} { // on threads of their own
		if !slices.Contains(began, want) {
			t.Errorf("leased are %v, without %p", began, want)
		}
	}
	if n := l.waiting.Load(); n != 9 {
		t.Errorf("%d wait, want 9", n)
	}
	third := &conn{peer: &peer{}}
	l.submit(third)
	l.finish(other[0], true)
	if began = l.await(t, 5); began[4] != third {
		t.Error("a peer that has half of the workers has one more, before one that has none")
	}
	l.finish(other[1], true)
	if began = l.await(t, 6); began[5] != other[2] {
		t.Error("not the one that is left of the other peer")
	}
	l.finish(third, true)
	l.finish(other[2], true)
	for i := 2; i < len(greedy); i++ {
		l.finish(greedy[i-2], true)
		if began = l.await(t, 5+i); began[4+i] != greedy[i] {
			t.Fatalf("lease %d is not the one that waits longest", 4+i)
		}
	}
	l.finish(greedy[8], true)
	l.finish(greedy[9], true)
}

// A worker whose thread is spoilt is replaced, even if it is the only one.
func TestSpoiltThread(t *testing.T) {
	l := newLeases(t, 1)
	c := conns(2, &peer{})
	l.submit(c[0])
	l.await(t, 1)
	l.submit(c[1])
	l.finish(c[0], false)
	if began := l.await(t, 2); began[1] != c[1] {
		t.Error("another one")
	}
	l.finish(c[1], true)
}

// Connections that wait can be taken back, and nothing of them is left.
func TestTakeBack(t *testing.T) {
	l := newLeases(t, 2)
	p, q := &peer{number: 1}, &peer{number: 2}
	mine, other := conns(3, p), conns(2, q)
	for _, c := range append(mine, other...) {
		l.submit(c)
	}
	l.await(t, 2)
	if back := l.takeBack(map[uint64]*peer{1: p, 2: q}); len(back) != 3 || l.waiting.Load() != 0 {
		t.Errorf("%d taken back, %d wait", len(back), l.waiting.Load())
	}
	l.finish(mine[0], true)
	l.finish(other[0], true)
	l.submit(mine[1])
	if began := l.await(t, 3); began[2] != mine[1] {
		t.Error("another one")
	}
	l.finish(mine[1], true)
}

func TestRing(t *testing.T) {
	var r ring[int]
	in, out := 0, 0
	for i := range 1000 {
		for range i % 7 {
			r.push(in)
			in++
		}
		for range min(i%5, r.len()) {
			if v := r.pop(); v != out {
				t.Fatalf("%d, want %d", v, out)
			}
			out++
		}
	}
	if r.len() != in-out {
		t.Errorf("%d left, want %d", r.len(), in-out)
	}
}

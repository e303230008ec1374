package pool

import "sync/atomic"

// Workers bounds how many requests are in the file system at once. Threads
// come and wait in the order in which they ask; one that finds the bound not
// reached pays one atomic addition.
type Workers struct {
	free atomic.Int64  // below 0: so many wait
	turn chan struct{} // hands a place to one that waits
}

// NewWorkers returns a bound of n.
func NewWorkers(n int) *Workers {
	w := &Workers{turn: make(chan struct{})}
	w.free.Store(int64(n))
	return w
}

// Begin waits for a place.
func (w *Workers) Begin() {
	if w.free.Add(-1) < 0 {
		<-w.turn
	}
}

// End gives the place back, or to the one that has waited longest.
func (w *Workers) End() {
	if w.free.Add(1) <= 0 {
		w.turn <- struct{}{}
	}
}

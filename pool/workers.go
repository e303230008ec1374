package pool

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// maxIdleWorkers wait for connections to come. A thread takes some 60 KiB, which a
// quiet server should not.
const maxIdleWorkers = 8

// workers is the bounded pool: so many connections are leased at once, each to a
// thread of its own. Others wait, each peer's in a queue of its own, and the peers
// take turns. No peer has more than half of the workers.
type workers struct {
	max   int
	lease func(c *conn) (sound bool) // serves c; false: the thread is to end
	procs procs

	leases  atomic.Int32 // changes under mu
	polling atomic.Int32 // leases that wait in a poll
	hung    atomic.Int32 // leases whose request hangs, at the last look
	waiting atomic.Int32 // connections; changes under mu

	mu    sync.Mutex
	turns ring[*peer] // have connections waiting, and may have a worker
	idle  []chan *conn
}

// peer is whom connections belong to. What is not marked is under workers.mu.
type peer struct {
	number uint64
	conns  int // under Server.mu
	leases atomic.Int32
	ready  ring[*conn] // wait for a worker
	queued bool        // in workers.turns
}

func newWorkers(most int, lease func(*conn) bool) *workers {
	w := &workers{max: most, lease: lease}
	w.procs.fit(0)
	return w
}

// share is how many leases a peer may have.
func (w *workers) share() int { return max(1, w.max/2) }

// load is what the policy of a connection of p's is told of. A poll is long: it
// begins only while both p and all have at most half of the workers that they may
// have, so that others hardly ever wait for its end.
func (w *workers) load(p *peer) load {
	leases := int(w.leases.Load())
	busy := leases - int(w.polling.Load()+w.hung.Load())
	return load{
		waiting: w.waiting.Load() > 0,
		alone:   busy <= max(1, runtime.NumCPU()/2),
		mayPoll: 2*leases <= w.max && 2*int(p.leases.Load()) <= w.share(),
	}
}

// submit leases a connection to a worker: now, or once one is free.
func (w *workers) submit(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.peer.ready.push(c)
	w.waiting.Add(1)
	w.queue(c.peer)
	if int(w.leases.Load()) == w.max {
		return
	}
	next := w.next()
	if next == nil {
		return
	}
	w.leases.Add(1)
	if last := len(w.idle) - 1; last >= 0 {
		w.idle[last] <- next // has room
		w.idle = w.idle[:last]
		return
	}
	go w.work(next, nil)
}

// work is a worker. It begins with c, or with the end of a lease of freed's.
func (w *workers) work(c *conn, freed *peer) {
	w.procs.fit(w.leases.Load())
	more := make(chan *conn, 1)
	for c != nil || freed != nil {
		if c == nil {
			c, freed = w.another(freed, more), nil
			continue
		}
		freed = c.peer
		if sound := w.lease(c); !sound {
			go w.work(nil, freed)
			break
		}
		c = nil
	}
	runtime.LockOSThread() // the thread ends with this goroutine
}

// another ends a lease of p's and returns the next connection, waiting for it in
// more, or nil if there are enough workers who wait.
func (w *workers) another(p *peer, more chan *conn) *conn {
	w.mu.Lock()
	p.leases.Add(-1)
	w.queue(p)
	c := w.next()
	if c != nil {
		w.mu.Unlock()
		return c
	}
	w.leases.Add(-1)
	stays := len(w.idle) < maxIdleWorkers
	if stays {
		w.idle = append(w.idle, more)
	}
	w.mu.Unlock()
	if !stays {
		return nil
	}
	return <-more
}

// queue gives p a turn if it waits for one and may have it. The caller holds mu.
func (w *workers) queue(p *peer) {
	if !p.queued && p.ready.len() > 0 && int(p.leases.Load()) < w.share() {
		p.queued = true
		w.turns.push(p)
	}
}

// next returns the connection whose turn it is, for a lease, or nil. The caller
// holds mu.
func (w *workers) next() *conn {
	if w.turns.len() == 0 {
		return nil
	}
	p := w.turns.pop()
	c := p.ready.pop()
	p.leases.Add(1)
	p.queued = false
	w.waiting.Add(-1)
	w.queue(p)
	return c
}

// takeBack returns the connections that wait, which are not leased any more.
func (w *workers) takeBack(peers map[uint64]*peer) (conns []*conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range peers {
		for p.ready.len() > 0 {
			conns = append(conns, p.ready.pop())
		}
		p.queued = false
	}
	w.turns = ring[*peer]{}
	w.waiting.Store(0)
	return conns
}

// close ends the workers who wait.
func (w *workers) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, worker := range w.idle {
		worker <- nil
	}
	w.idle = nil
}

// ring is a queue.
type ring[T any] struct {
	buf     []T // its length is a power of two
	head, n int
}

func (r *ring[T]) len() int { return r.n }

func (r *ring[T]) push(v T) {
	if r.n == len(r.buf) {
		buf := make([]T, max(4, 2*r.n))
		for i := range r.n {
			buf[i] = r.buf[(r.head+i)%r.n]
		}
		r.buf, r.head = buf, 0
	}
	r.buf[(r.head+r.n)%len(r.buf)] = v
	r.n++
}

func (r *ring[T]) pop() T {
	var none T
	v := r.buf[r.head]
	r.buf[r.head] = none
	r.head = (r.head + 1) % len(r.buf)
	r.n--
	return v
}

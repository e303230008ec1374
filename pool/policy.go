package pool

import (
	"slices"
	"time"
)

// A connection that a worker has keeps it while requests keep coming. Between an
// answer and the next request the worker waits in one of three ways, from the
// fastest to the cheapest. QEMU's next request depends on this answer, so the
// way there and back is what counts. In µs, on two cores: to wake a thread on
// another core takes 15 to 30, an LSTAT 2.
const (
	// busyPollFor is how long the socket is asked again and again: that saves
	// the wake-up where the client has a core of its own, and takes the client's
	// time where it has not. Longer than the slowest wake-up it gains nothing.
	busyPollFor = 40 * time.Microsecond
	// blockFor is how long a receive waits that the Go scheduler does not know
	// of: nothing but the system call. The runtime's monitor interrupts the
	// thread after 10 ms anyway.
	blockFor = 10 * time.Millisecond
	// pollFor is how long a poll waits that the scheduler knows of: for clients
	// that ask now and then, as the way through the epoll loop wakes two threads
	// instead of one. A guest's own pauses are mostly below a second.
	pollFor = 800 * time.Millisecond
	// quantum is how long a lease lasts at most while other connections wait for
	// a worker: some hundred requests, so that the change costs a percent.
	quantum = 5 * time.Millisecond
)

// Busy-polling is tried again and again, as whether it pays depends on where the
// kernel runs client and worker. Time is cut in windows, counted in requests.
const (
	probe     = 16   // requests in the other way, then as many in the way in use, both measured
	window    = 1024 // requests until the next probe: what a probe in vain costs is below 1 %
	maxMisses = 3    // busy-polls in vain, one after the other, that end it until the next probe
	minGain   = 12   // percent by which the median time to the next request has to be shorter
)

// event is what has happened to a connection that a worker has.
type event int

const (
	answered    event = iota // and nothing more has come
	empty                    // the wait was in vain
	interrupted              // the runtime wants the thread: it must get to know of the next wait
)

// action is where the worker waits next.
type action int

const (
	busyPoll action = iota
	block
	pollBriefly // for a tenth of a quantum
	poll
	park // nowhere: the connection goes back to the epoll loop
)

// load is what else the server has to do.
type load struct {
	waiting bool // connections wait for a worker
	alone   bool // each busy client and its worker can have a CPU
	mayPoll bool // enough workers are left for others
}

// policy decides for one connection. It knows no clock, no socket and no lock;
// times are in ns of any clock that does not go back.
type policy struct {
	noBusyPoll bool
	began      int64 // the lease
	at         action
	sparse     bool // the last request came later than blockFor after the answer

	polling bool // in the rest of the window: busy-polling pays
	request int  // in the window
	misses  int
	asked   int64       // when the last measured answer left
	gaps    [2]struct { // without busy-polling, and with it
		ns [probe]int64 // from an answer to the next request
		n  int
	}
}

// lease begins a lease.
func (p *policy) lease(now int64) { p.began = now }

// expired tells whether the worker is to go on with another connection, if one
// waits.
func (p *policy) expired(now int64) bool { return now-p.began >= quantum.Nanoseconds() }

// measures tells whether the policy wants to know times.
func (p *policy) measures() bool { return p.request < 2*probe }

// sends is to be called before an answer leaves, with the time if the policy
// measures: a client that the answer wakes may take this CPU at once.
func (p *policy) sends(now int64) {
	switch p.request++; {
	case p.request == 2*probe:
		p.judge()
	case p.request >= window:
		p.request, p.misses = 0, 0
		p.gaps[0].n, p.gaps[1].n = 0, 0
	}
	p.asked = now
}

// next returns where to wait. now counts where others wait.
func (p *policy) next(e event, now int64, l load) action {
	switch {
	case e == answered && l.waiting && p.expired(now):
		p.at = park
	case e == answered && p.sparse:
		p.at = pollOrPark(l)
	case e == answered && l.waiting: // who thinks for longer keeps nobody from a worker
		p.at = pollBriefly
	case e == answered && p.busyPolls() && l.alone:
		p.at = busyPoll
	case e == answered:
		p.at = block
	case p.at == busyPoll:
		p.misses++
		p.at = block
	case p.at == block && e == interrupted:
		p.at = pollOrPark(l)
	case p.at == block:
		p.sparse = true
		p.at = pollOrPark(l)
	default:
		p.at = park
	}
	return p.at
}

func pollOrPark(l load) action {
	if l.waiting || !l.mayPoll {
		return park
	}
	return poll
}

// came notes that a request has come in time, at now if the policy measures.
func (p *policy) came(now int64) {
	if p.at == busyPoll {
		p.misses = 0
	}
	if !p.measures() || p.asked == 0 {
		return
	}
	way := &p.gaps[0]
	if p.busyPolls() {
		way = &p.gaps[1]
	}
	if way.n < probe {
		way.ns[way.n] = now - p.asked
		way.n++
	}
}

// polled notes how long a poll took in which something came.
func (p *policy) polled(ns int64) { p.sparse = ns >= blockFor.Nanoseconds() }

// busyPolls tells which way is in use: the other one in the first requests of a
// window.
func (p *policy) busyPolls() bool {
	return !p.noBusyPoll && p.polling != (p.request < probe) && p.misses < maxMisses
}

// judge chooses the way for the rest of the window.
func (p *policy) judge() {
	without, with := &p.gaps[0], &p.gaps[1]
	p.polling = p.misses < maxMisses && with.n > probe/2 && without.n > 0 &&
		100*median(with.ns[:with.n]) < (100-minGain)*median(without.ns[:without.n])
	p.misses = 0
}

func median(ns []int64) int64 {
	slices.Sort(ns)
	return ns[len(ns)/2]
}

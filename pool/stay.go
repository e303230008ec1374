package pool

import (
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// This file decides where a connection spends its time between an answer and
// the next request. QEMU's next request depends on this answer, so what matters
// is the way there and back, not parallelism. In µs, on two cores: waking a
// thread on another core takes 15 to 30, an LSTAT 2. From the fastest place to
// the cheapest, each for a while:
//
//	spin   polls the socket for spinFor: saves the wake-up where the client
//	       has a core of its own, and costs the client its time where it has
//	       not. So it is measured, again and again (pace), and only done while
//	       those who are busy can have two CPUs each (crowd).
//	sleep  is a recv that the Go scheduler does not know of: nothing but the
//	       system call. It holds a Go processor, of which there are enough.
//	doze   is a poll that the scheduler knows of: it costs nothing while it
//	       lasts, and more when it ends. For connections that ask now and then.
//	       As long as these are few (dozers) it is not told: a signal interrupts
//	       each of them every 10 ms then, but it wakes two threads less for a
//	       request.
//	epoll  is for connections that are idle, all on one thread: the way back
//	       costs an epoll_ctl and two wake-ups. And it is for those of a crowd:
//	       there is no way back, the loop serves them itself. With 64
//	       connections on one CPU, the clients' on another, that is 1.9 times
//	       the C helper's throughput, and 1.2 with a thread each.
const (
	spinFor  = 40 * time.Microsecond
	sleepFor = 10 * time.Millisecond // the runtime's monitor interrupts a thread then anyway
	dozeFor  = 800 * time.Millisecond
	dozers   = 2
)

// slackProcs are the Go processors beside those of connections that sleep: for
// the runtime, for new connections, for requests on other loops.
const slackProcs = 8

// await waits for bytes on this thread and returns how many have come, 0 when
// the epoll loop is the place to wait, and less when the client has left.
func (c *conn) await() int {
	if c.minor.Load() {
		return 0
	}
	p := &c.pace
	n := 0
	if p.busy && !c.raw {
		n = c.sleep()
	} else if p.busy && c.takeSeat(0) {
		if p.spins() && c.srv.crowd.thin() {
			n = c.spin()
			p.spun(n)
		}
		if n == 0 {
			n = c.sleep()
		}
	}
	if n == 0 {
		if !c.takeSeat(c.srv.crowd.forBusy) {
			c.giveSeat()
		}
		n = c.doze()
	}
	if n > 0 {
		p.measure()
	}
	return n
}

// spin, sleep and doze return how many bytes have come, 0 if none have, and -1
// when the client has left.

func (c *conn) spin() int {
	for until := nanotime() + spinFor.Nanoseconds(); ; {
		for range 8 {
			if n, errno := c.slot.Receive(c.fd, unix.MSG_DONTWAIT, c.raw); errno != unix.EAGAIN {
				return received(n, errno)
			}
		}
		if nanotime() > until {
			return 0
		}
	}
}

func (c *conn) sleep() int {
	// At EINTR the runtime wants this thread to stop: it can, in doze.
	n, errno := c.slot.Receive(c.fd, 0, c.raw)
	if errno == unix.EAGAIN {
		c.pace.busy = false
	}
	return received(n, errno)
}

func (c *conn) doze() int {
	began := nanotime()
	if !c.readable(dozeFor) {
		return 0
	}
	c.pace.busy = nanotime()-began < sleepFor.Nanoseconds()
	return received(c.slot.Receive(c.fd, unix.MSG_DONTWAIT, c.raw))
}

// received returns what comes of a receive: a client has left at the end of its
// stream, and a connection that can't be received from is none; what the kernel
// lacks now it has later.
func received(n int, errno unix.Errno) int {
	switch {
	case errno == 0 && n > 0:
		return n
	case errno == unix.EAGAIN, errno == unix.EINTR, errno == unix.ENOMEM, errno == unix.ENOBUFS:
		return 0
	}
	return -1
}

// crowd knows who is busy. With many connections that ask for a part of all
// each, the loop that they rest in serves them itself: from one to the next it
// takes no change of threads, as long as it finds requests there and need not
// wait for them. Whoever asks for much, or slowly, has a thread still.
type crowd struct {
	seats   atomic.Int32 // that are left: connections that may sleep, a Go processor each
	forBusy int32        // of the seats: the others may doze
	busy    atomic.Int32 // connections that were, at the last count
	spin    int32        // so many may spin: half the CPUs, as each one's client needs one, too
	cpus    int
	parts   uint64 // who asks for more than 1/parts of all is not one of a crowd

	// Under Server.mu:
	much     bool    // is asked
	in       int     // counts since it was little
	lately   int64   // until when a few that come at once are a crowd again, in ns
	apart    int64   // until when no loop serves, in ns
	counted  int64   // when the last count was, in ns
	visitors []*conn // that loops have served since then
}

func newCrowd(seats int) *crowd {
	runtime.GOMAXPROCS(seats + slackProcs)
	cpus := runtime.NumCPU()
	c := &crowd{
		cpus: cpus, spin: int32(max(1, cpus/2)), parts: uint64(4 * cpus),
		forBusy: int32(seats - dozers),
	}
	c.seats.Store(int32(seats))
	return c
}

// thin tells that whoever is busy may spin.
func (c *crowd) thin() bool { return c.busy.Load() <= c.spin }

// takeSeat makes sure that the connection may sleep, and tells whether so many
// others still could. It keeps the seat until its turn ends, or giveSeat.
func (c *conn) takeSeat(others int32) bool {
	if !c.raw {
		return false
	}
	seats := &c.srv.crowd.seats
	if c.seat {
		return seats.Load() >= others
	}
	if seats.Add(-1) < others {
		seats.Add(1)
		return false
	}
	c.seat = true
	return true
}

func (c *conn) giveSeat() {
	if c.seat {
		c.seat = false
		c.srv.crowd.seats.Add(1)
	}
}

// count counts who has been busy since the last count, which a request that
// hangs is not.
func (s *Server) count() {
	if s.mu.TryLock() {
		s.countAt(nanotime())
		s.mu.Unlock()
	}
}

// countAt is count for a caller who holds mu.
func (s *Server) countAt(now int64) {
	crowd := s.crowd
	passed := now - crowd.counted
	if passed < minCountEvery.Nanoseconds() {
		return
	}
	crowd.counted = now
	for c := range s.turns {
		crowd.note(c)
	}
	busy, total := int32(0), uint64(0)
	for _, c := range crowd.visitors {
		served := c.served.Load()
		c.recent, c.count = served-c.count, served
		if total += c.recent; c.recent >= busyIfServed {
			busy++
		}
	}
	crowd.busy.Store(busy)
	switch perMs := total * uint64(time.Millisecond) / uint64(passed); {
	case perMs < muchUntil:
		crowd.in, crowd.much = 0, false
	case perMs >= muchFrom:
		crowd.in++
		crowd.much = crowd.much || crowd.in >= muchFor || now < crowd.lately
	}
	if crowd.much {
		crowd.lately = now + latelyFor.Nanoseconds()
	}
	for _, l := range s.loops {
		// Threads have other CPUs, each by its client, where there are some:
		// they do better there than a loop that waits.
		if l.idles() && crowd.cpus > 1 {
			crowd.apart = now + apartFor.Nanoseconds()
		}
	}
	for _, c := range crowd.visitors {
		c.minor.Store(crowd.much && now >= max(crowd.apart, c.apart) &&
			c.recent*crowd.parts < total)
		c.visitor, c.counted = false, now
	}
	clear(crowd.visitors)
	crowd.visitors = crowd.visitors[:0]
}

const (
	minCountEvery = 2 * time.Millisecond
	busyIfServed  = 8  // requests from one count to the next
	muchFrom      = 20 // requests a ms of all,
	muchFor       = 3  // counts long, as a burst is no crowd,
	muchUntil     = 10 // and fewer end it: nobody is to move to and fro
	latelyFor     = time.Second / 2
	apartFor      = time.Second // for so long it is not tried again
)

// note has the next count look at a connection.
func (crowd *crowd) note(c *conn) {
	if !c.visitor {
		c.visitor = true
		crowd.visitors = append(crowd.visitors, c)
	}
}

// loopServes decides whether the loop that a connection rests in serves it
// itself now. The caller holds mu.
func (s *Server) loopServes(c *conn, now int64) bool {
	crowd := s.crowd
	s.countAt(now)
	switch {
	case !crowd.much && (now >= crowd.lately || len(s.turns) < int(crowd.parts)):
		return false
	case !c.raw, !c.recovered, now < c.apart, now < crowd.apart:
		return false
	case c.counted == crowd.counted && !c.minor.Load():
		return false
	}
	crowd.note(c)
	return true
}

// pace learns whether spinning pays for a connection. Time is cut in windows:
// one begins with probeRequests in the other way and as many in the way in
// use, both measured, and goes on in the better one.
type pace struct {
	busy     bool // the last request came within sleepFor
	spinning bool
	request  int // since the window began
	window   int // its length in requests
	misses   int // spins in vain since the last that was not
	answered int64
	gaps     [2][probeRequests]int64 // answer to request in ns, asleep and spinning
	count    [2]int
}

const (
	probeRequests = 16
	minWindow     = 1024
	maxWindow     = 16 * minWindow // after probes in vain
	maxMisses     = 3              // give spinning up until the next window
	minGain       = 12             // percent that spinning has to be faster by
	breathe       = 256            // requests between two visits to the scheduler
)

func newPace() pace { return pace{window: minWindow} }

func (p *pace) probing() bool  { return p.request < probeRequests }
func (p *pace) measured() bool { return p.request < 2*probeRequests }
func (p *pace) spins() bool    { return p.spinning != p.probing() && p.misses < maxMisses }

// way indexes what is measured.
func (p *pace) way() int {
	if p.spins() {
		return 1
	}
	return 0
}

// answering is called before each answer leaves: sending it wakes the client,
// who may well take this processor at once.
func (c *conn) answering() {
	p := &c.pace
	c.served.Add(1)
	p.request++
	switch {
	case p.request == 2*probeRequests:
		p.judge()
	case p.request >= p.window:
		p.request, p.misses, p.count = 0, 0, [2]int{}
	case p.request%breathe == 0:
		c.srv.count()
		// The runtime takes a thread's processor away that has not been
		// scheduled for 10 ms, at each of its system calls.
		runtime.Gosched()
	}
	if p.measured() {
		p.answered = nanotime()
	}
}

// spun notes what a spin has brought.
func (p *pace) spun(n int) {
	if n > 0 {
		p.misses = 0
	} else {
		p.misses++
	}
}

// measure notes the time from the answer to the request that has come now.
func (p *pace) measure() {
	if way := p.way(); p.measured() && p.count[way] < probeRequests {
		p.gaps[way][p.count[way]] = nanotime() - p.answered
		p.count[way]++
	}
}

// judge chooses the way for the rest of the window by the medians.
func (p *pace) judge() {
	was := p.spinning
	p.spinning = p.misses < maxMisses && p.count[1] > probeRequests/2 &&
		100*p.median(1) < (100-minGain)*p.median(0)
	p.misses = 0
	if p.spinning || was {
		p.window = minWindow
	} else {
		p.window = min(2*p.window, maxWindow)
	}
}

func (p *pace) median(way int) int64 {
	gaps := p.gaps[way][:p.count[way]]
	if len(gaps) == 0 {
		return 0
	}
	slices.Sort(gaps)
	return gaps[len(gaps)/2]
}

var epoch = time.Now()

// nanotime is a clock for differences.
func nanotime() int64 { return int64(time.Since(epoch)) }

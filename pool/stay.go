package pool

import (
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// This file decides where a connection spends its time between an answer and
// the next request: spinning on its thread, asleep on its thread in recv, or
// back in gnet's epoll. QEMU's next request depends on this answer, so what
// matters is the way there and back, not parallelism. In µs, on two cores:
// waking a thread on another core takes 15 to 30, an LSTAT 2.
//
//   - Staying in recv instead of epoll saves two epoll_waits and gnet's read.
//     A connection that asks now and then is better off in epoll: one whose
//     last pause was longer than a stay does not stay.
//   - Spinning saves the wake-up where the client has a core of its own, and
//     costs the client its time where it has not. So it is measured, again and
//     again (pace), and done only while each connection that is being served
//     can have two processors: its own and its client's.
const (
	// stayFor bounds the sleep in recv. The runtime's monitor interrupts a
	// thread after 10 ms anyway. Past it a connection costs nothing.
	stayFor = 10 * time.Millisecond
	// spinFor bounds a spin: longer than a client takes to wake up and ask,
	// where spinning pays at all.
	spinFor = 40 * time.Microsecond
)

// slackProcs are the Go processors beside those of connections that stay: for
// the runtime, for new connections, for requests on other loops.
const slackProcs = 8

// crowd counts the connections that are in their turn.
type crowd struct {
	hot  atomic.Int32
	stay int32 // so many may stay: each keeps a Go processor while it is in a raw recv
	spin int32 // so many may spin: half the CPUs, as each one's client needs one, too
}

func newCrowd(stay int) *crowd {
	runtime.GOMAXPROCS(stay + slackProcs)
	return &crowd{stay: int32(stay), spin: int32(max(1, runtime.NumCPU()/2))}
}

// begin is called when a connection's turn begins, and tells if it may stay
// for more than what has come.
func (c *crowd) begin() bool { return c.hot.Add(1) <= c.stay }

// end is called when the turn ends.
func (c *crowd) end() { c.hot.Add(-1) }

// thin tells that whoever is in its turn may spin.
func (c *crowd) thin() bool { return c.hot.Load() <= c.spin }

// await waits for bytes on this thread (true), or decides that gnet's epoll is
// the place to wait (false).
func (l *loop) await() bool {
	room := l.in.room()
	p := &l.pace
	n := 0
	if p.spins() && l.srv.crowd.thin() {
		if n = l.spin(room); n <= 0 {
			p.missed()
		} else {
			p.hit()
		}
	}
	if n == 0 {
		n = l.sleep(room)
	}
	if n <= 0 {
		return false
	}
	if p.measured() {
		p.measure(nanotime())
	}
	l.in.received(n)
	return true
}

// spin polls for bytes: how many have come, 0 in vain, -1 when the client has
// left.
func (l *loop) spin(room []byte) int {
	for until := nanotime() + spinFor.Nanoseconds(); ; {
		for range 8 {
			n, errno := recv(l.fd, room, unix.MSG_DONTWAIT)
			if n != -1 || errno != unix.EAGAIN {
				return leftIfNone(n)
			}
		}
		if nanotime() > until {
			return 0
		}
	}
}

// sleep waits for bytes until stayFor has passed, or the runtime wants this
// thread to stop (EINTR): how many have come, -1 when none or when the client
// has left, which gnet is to see.
func (l *loop) sleep(room []byte) int {
	n, _ := recv(l.fd, room, 0)
	return leftIfNone(n)
}

func leftIfNone(n int) int {
	if n == 0 {
		return -1
	}
	return n
}

// pace learns whether spinning pays for a connection. Time is cut in windows:
// one begins with probeRequests in the other way and as many in the way in
// use, both measured, and goes on in the better one.
type pace struct {
	left     int64 // when the last turn ended, in ns

	spinning bool
	request  int // since the window began
	window   int // its length in requests
	misses   int // spins in vain since the last that was not
	answered int64 // when the last answer was about to leave, in ns, if measured
	gaps     [2][probeRequests]int64
	count    [2]int
}

const (
	probeRequests = 16
	minWindow     = 1024
	maxWindow     = 16 * minWindow // after probes in vain
	maxMisses     = 3              // give spinning up until the next window
	minGain       = 12             // percent that spinning has to be faster by
)

func newPace() pace { return pace{window: minWindow} }

// busy tells, when a turn begins, that a stay would have paid since the last.
func (p *pace) busy() bool { return nanotime()-p.left < stayFor.Nanoseconds() }

// leave notes when the connection went back to epoll.
func (p *pace) leave() { p.left = nanotime() }

func (p *pace) probing() bool  { return p.request < probeRequests }
func (p *pace) measured() bool { return p.request < 2*probeRequests }
func (p *pace) spins() bool    { return p.spinning != p.probing() && p.misses < maxMisses }

// answer is called before an answer leaves: its sending wakes the client, who
// may well take this processor at once.
func (p *pace) answer() {
	p.request++
	if p.measured() {
		p.answered = nanotime()
	}
	switch {
	case p.request == 2*probeRequests:
		p.judge()
	case p.request >= p.window:
		p.request, p.misses, p.count = 0, 0, [2]int{}
	case p.request%256 == 0:
		// The runtime takes a thread's processor away that has not been
		// scheduled for 10 ms, at each of its system calls.
		runtime.Gosched()
	}
}

func (p *pace) hit()    { p.misses = 0 }
func (p *pace) missed() { p.misses++ }

// measure notes the time from an answer to the next request, which came now.
func (p *pace) measure(now int64) {
	way := 0
	if p.spins() {
		way = 1
	}
	if p.count[way] < probeRequests {
		p.gaps[way][p.count[way]] = now - p.answered
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

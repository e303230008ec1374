package pool

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What the Go runtime is told, so that a thread for each connection costs no more
// than it does in C.
const (
	// monitorSlack is how late the timers of the runtime's monitor thread may be.
	// After every wake-up of an idle process it looks around each 20 µs for a
	// millisecond, which is 30 times the CPU of a request: traffic that comes now
	// and then would cost mainly that. What the monitor is for, threads that are
	// stuck in a system call, is met by a processor for each worker.
	monitorSlack = 50 * time.Millisecond
	// workerSlack is Linux' own.
	workerSlack = 50 * time.Microsecond

	// slackProcs are the Go processors beside the workers': for the epoll loop, the
	// log, the supervisor's messages and the runtime. fewWorkers have theirs always.
	slackProcs = 8
	fewWorkers = 8

	// breathe is after how many requests a worker calls the scheduler: it takes a
	// thread's processor away that has not been there for 10 ms, and again at each
	// of its system calls.
	breathe = 256
)

// procs gives each worker a Go processor, which one keeps that waits in a raw
// system call. There are no more than that, as each collection starts a thread for
// each fourth: their number is doubled when needed, which stops the world.
type procs struct {
	mu      sync.Mutex   // held while workers changes
	workers atomic.Int32 // that have one
}

// fit makes sure that there are enough for so many workers.
func (p *procs) fit(workers int32) {
	if workers > 0 && workers <= p.workers.Load() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	have := max(fewWorkers, p.workers.Load())
	for have < workers {
		have *= 2
	}
	p.set(have)
}

// rest leaves what few workers need.
func (p *procs) rest() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(fewWorkers)
}

// set is for a caller who holds mu.
func (p *procs) set(workers int32) {
	if p.workers.Swap(workers) != workers {
		runtime.GOMAXPROCS(int(workers) + slackProcs)
	}
}

// StartCalm starts a server process by start: it inherits the timer slack of the
// thread that starts it, and so does the monitor, its first thread.
func StartCalm(start func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	setSlack(monitorSlack)
	defer setSlack(workerSlack)
	return start()
}

// setSlack sets the timer slack of this thread: a worker's is not the monitor's.
func setSlack(d time.Duration) {
	unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, uintptr(d.Nanoseconds()), 0)
}

var epoch = time.Now()

// nanotime is a clock for differences.
func nanotime() int64 { return int64(time.Since(epoch)) }

package pool

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// monitorSlack is how late the timers of the runtime's monitor thread may be.
const monitorSlack = 50 * time.Millisecond

// CalmMonitor lets the Go runtime's monitor thread (sysmon) sleep longer than
// it means to. After every wake-up of an idle process it looks around each
// 20 µs for a millisecond, which is 30 times the CPU of a request: traffic that
// comes now and then would cost mainly that. What the monitor is for, threads
// that are stuck in a system call, the server has spare processors for.
//
// The monitor is the first thread that a Go process starts. Another thread's
// slack is set through /proc, with CAP_SYS_NICE: it is to be called before the
// process is confined.
func CalmMonitor() error {
	dir, err := os.Open("/proc/self/task")
	if err != nil {
		return err
	}
	defer dir.Close()
	threads, err := dir.Readdirnames(2) // in the order of their starts
	if err != nil {
		return err
	}
	if len(threads) < 2 {
		return fmt.Errorf("no monitor thread")
	}
	slack := fmt.Append(nil, monitorSlack.Nanoseconds())
	return os.WriteFile("/proc/"+threads[1]+"/timerslack_ns", slack, 0)
}

// beginThread gives the thread of a turn Linux' own slack: one that the
// monitor has started inherits the monitor's.
func beginThread() {
	const standard = 50 * time.Microsecond
	unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, uintptr(standard.Nanoseconds()), 0)
}

package supervisor

import (
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// hungUp is the signal of a terminal that is gone, in SIGHUP's place.
type hungUp struct{}

func (hungUp) Signal()        {}
func (hungUp) String() string { return "the terminal has hung up" }

// hangUpTakes is how long the kernel may take from the signal to the moment
// when the terminal is gone.
const hangUpTakes = 50 * time.Millisecond

// catchSignals returns the signals that end and renew a helper. SIGHUP renews;
// where it comes because the terminal of a supervisor in the foreground has
// hung up, it is hungUp, and under nohup(1), which is to keep the supervisor,
// nothing. The signals themselves don't differ.
func catchSignals() <-chan os.Signal {
	stays, terminal := signal.Ignored(unix.SIGHUP), hasTerminal()
	caught, signals := make(chan os.Signal, 8), make(chan os.Signal, 8)
	signal.Notify(caught, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	if !terminal {
		return caught
	}
	go func() {
		for sig := range caught {
			if sig == unix.SIGHUP {
				time.Sleep(hangUpTakes)
				if !hasTerminal() {
					sig = hungUp{}
				}
			}
			if sig != (hungUp{}) || !stays {
				signals <- sig
			}
		}
	}()
	return signals
}

// hasTerminal tells that this process has a controlling terminal.
func hasTerminal() bool {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

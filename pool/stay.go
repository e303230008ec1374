package pool

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// stayFor is how long a connection stays on its thread after an answer. QEMU's
// next request mostly comes within microseconds; past this the connection
// waits in epoll, where it costs nothing.
const stayFor = 50 * time.Millisecond

// slackProcs are the Go processors beside those of connections that stay: for
// the runtime, for new connections, for requests on other loops.
const slackProcs = 8

// reserveProcs makes room for n connections that stay: a thread in a raw recv
// keeps its processor.
func reserveProcs(n int) { runtime.GOMAXPROCS(n + slackProcs) }

// pace is what is known of a connection's rhythm.
type pace struct{}

// await decides where a connection waits for its next request: here, in recv,
// for a while (true: bytes have come), or back in gnet's epoll (false).
func (l *loop) await() bool {
	room := l.in.room()
	for {
		n, errno := recv(l.fd, room, 0)
		switch {
		case n > 0:
			l.in.received(n)
			return true
		case errno == unix.EINTR:
			// The runtime wants this thread to stop: let it.
			runtime.Gosched()
		default:
			// Time is up, or the client has left, which gnet is to see.
			return false
		}
	}
}

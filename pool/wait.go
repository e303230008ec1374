package pool

import (
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// await waits for bytes where the policy says.
func (c *conn) await() outcome {
	if c.requests++; c.requests%breathe == 0 {
		runtime.Gosched()
	}
	w := c.srv.workers
	for e := answered; ; {
		load, now := w.load(c.peer), int64(0)
		if load.waiting {
			now = nanotime()
		}
		a := c.policy.next(e, now, load)
		var n int
		var errno unix.Errno
		switch a {
		case busyPoll:
			n, errno = c.busyPoll()
		case block:
			n, errno = c.slot.Receive(c.fd, 0, c.raw)
		case pollBriefly:
			n, errno = -1, unix.EAGAIN
			if c.readable(quantum / 10) {
				n, errno = c.slot.Receive(c.fd, unix.MSG_DONTWAIT, c.raw)
			}
		case poll:
			began := nanotime()
			w.polling.Add(1)
			came := c.readable(pollFor)
			w.polling.Add(-1)
			n, errno = -1, unix.EAGAIN
			if came {
				c.policy.polled(nanotime() - began)
				n, errno = c.slot.Receive(c.fd, unix.MSG_DONTWAIT, c.raw)
			}
		case park:
			c.slot.Rest()
			return parks
		}
		switch n = received(n, errno); {
		case c.srv.handingOver.Load():
			return handedOver
		case n < 0:
			return ends
		case n > 0:
			now = 0
			if c.policy.measures() {
				now = nanotime()
			}
			c.policy.came(now)
			return goesOn
		}
		e = empty
		if errno == unix.EINTR {
			e = interrupted
		}
	}
}

// busyPoll receives again and again.
func (c *conn) busyPoll() (n int, errno unix.Errno) {
	for until := nanotime() + busyPollFor.Nanoseconds(); ; {
		for range 8 {
			if n, errno = c.slot.Receive(c.fd, unix.MSG_DONTWAIT, c.raw); errno != unix.EAGAIN {
				return n, errno
			}
		}
		if nanotime() > until {
			return n, errno
		}
	}
}

// readable waits until bytes or the end of the stream have come; false when
// nothing has within d, or a handing over has begun.
func (c *conn) readable(d time.Duration) bool {
	fds := [2]unix.PollFd{
		{Fd: int32(c.fd), Events: unix.POLLIN},
		{Fd: int32(c.srv.handoverFD), Events: unix.POLLIN},
	}
	left := unix.NsecToTimespec(d.Nanoseconds()) // which the kernel counts down
	for {
		_, _, errno := unix.Syscall6(unix.SYS_PPOLL,
			uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)),
			uintptr(unsafe.Pointer(&left)), 0, 0, 0)
		if errno != unix.EINTR {
			return errno == 0 && fds[0].Revents != 0
		}
	}
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

package pool

import (
	"log/slog"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/valyala/bytebufferpool"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/ops"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/progress"
)

// conn is a connection. It rests in an epoll loop, or has a turn on a thread;
// all fields but those marked are the turn's alone, or the loop's while it
// serves the connection itself.
type conn struct {
	srv  *Server
	loop *loop  // where it rests
	id   uint32 // the supervisor's number of its slot
	fd   int
	raw  bool           // no descriptor can come with what is received
	slot *inflight.Slot // what has been received and is in work

	progress *progress.Conn // since when something is in work, for the supervisor
	number   uint64         // in the log, never used again

	recovered bool // what another server has left is done
	told      bool // why it is closed is logged
	turn      turn // good during a turn

	pace   pace
	seat   bool          // taken from the crowd
	served atomic.Uint64 // answers, for Server.count
	minor  atomic.Bool   // one of a crowd, at the last count

	// Under Server.mu, for the crowd:
	visitor bool   // it is among crowd.visitors
	counted int64  // when it last was counted, in ns
	count   uint64 // of served, then
	recent  uint64 // of served, from the count before to that
	apart   int64  // until when no loop serves it, in ns
}

// turn is what a connection needs while it is served.
type turn struct {
	call    ops.Call
	request *bytebufferpool.ByteBuffer // the payload: it is decoded in place
	answer  *bytebufferpool.ByteBuffer // call.Out
}

var buffers bytebufferpool.Pool

func newTurn() turn {
	t := turn{request: buffers.Get(), answer: buffers.Get()}
	t.call.Out = t.answer.B
	return t
}

func (t *turn) end() {
	t.answer.B = t.call.Out
	buffers.Put(t.request)
	buffers.Put(t.answer)
}

// outcome is how a turn ends.
type outcome int

const (
	idle       outcome = iota // nothing asked for long
	peerClosed                // by the client, or to be closed
	handedOver                // to another server
	tainted                   // to be gone on with on another thread
)

// prepare makes fd a blocking socket whose recv waits for sleepFor at most.
// With a timeout a signal interrupts recv for sure (signal(7)), which the Go
// runtime relies on when it wants to stop a thread in a raw call.
func prepare(fd int) error {
	if err := unix.SetNonblock(fd, false); err != nil {
		return err
	}
	tv := unix.NsecToTimeval(sleepFor.Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// take is a turn: it serves what has come and all that comes while the
// connection stays (stay.go).
func (c *conn) take() outcome {
	beginThread()
	c.turn = newTurn()
	defer func() {
		c.turn.end()
		c.turn = turn{}
		c.giveSeat()
	}()
	if !c.recovered {
		c.recovered = true
		if end := c.recover(); end != idle || c.slot.Pending() == 0 {
			return end
		}
	}
	for {
		if end := c.serveFrames(); end != idle {
			return end
		}
		switch n := c.await(); {
		case c.srv.handingOver.Load():
			return handedOver
		case n < 0:
			return peerClosed
		case n == 0:
			c.slot.Rest()
			return idle
		}
	}
}

// visit is what comes of bytes on a loop: it serves what there is, with the
// loop's buffers.
func (c *conn) visit(t *turn) outcome {
	switch n := received(c.slot.Receive(c.fd, unix.MSG_DONTWAIT, c.raw)); {
	case n == 0:
		return idle
	case n < 0:
		return peerClosed
	}
	c.turn = *t
	end := c.serveFrames()
	*t, c.turn = c.turn, turn{}
	if end == idle && c.slot.Pending() == 0 {
		c.slot.Rest()
	}
	return end
}

// serveFrames serves the whole frames that have come. It ends with resting if
// nothing stands against going on.
func (c *conn) serveFrames() outcome {
	for {
		t, payload, ok, err := c.slot.Frame()
		if err != nil {
			c.told = true
			c.log().Warn("connection closed: not the proxy protocol",
				"request", t.String(), "error", err)
			return peerClosed
		}
		if !ok {
			return idle
		}
		c.slot.Begin()
		c.progress.Begin(t)
		c.do(t, payload)
		if end := c.answer(t, len(payload), 0); end != idle {
			return end
		}
		if c.srv.handingOver.Load() {
			return handedOver
		}
	}
}

// do does one request, in a copy of its own.
func (c *conn) do(t codec.Type, payload []byte) {
	c.turn.request.Set(payload)
	c.turn.call.Connection = c.number
	c.srv.workers.Begin()
	c.srv.fs.Do(t, c.turn.request.B, &c.turn.call)
	c.srv.workers.End()
}

// answer sends the answer that do has left, less what was sent before. size is
// that of the request's payload.
func (c *conn) answer(t codec.Type, size, sent int) outcome {
	call := &c.turn.call
	c.answering()
	c.progress.Answering()
	defer c.progress.End()
	errno := c.slot.Send(c.fd, call.Out, sent, call.FD)
	if call.FD >= 0 {
		unix.Close(call.FD)
		// The kernel may be out of room for descriptors under way, which
		// is an answer, too.
		if errno != 0 && errno != unix.EPIPE && errno != unix.ECONNRESET && sent == 0 {
			call.Out = codec.AppendErrno(call.Out[:0], t, errno)
			errno = c.slot.Send(c.fd, call.Out, 0, -1)
		}
	}
	if errno != 0 {
		return peerClosed
	}
	c.slot.Done(size)
	if call.Tainted {
		c.log().Error("a thread could not take back the identity of a request: it serves no other",
			"request", t.String())
		return tainted
	}
	return idle
}

// recover answers the request that a server has died over, if there is one: it
// is done again where that harms nothing and no second server is risked.
func (c *conn) recover() outcome {
	w, ok, err := c.slot.Recover()
	if err != nil {
		c.told = true
		c.log().Error("connection closed", "error", err)
		return peerClosed
	}
	if !ok {
		return idle
	}
	c.progress.Begin(w.Type)
	c.turn.request.Set(w.Payload)
	again := w.Tries == 0 && ops.Repeatable(w.Type, c.turn.request.B)
	c.log().Warn("a server has died over a request", "request", w.Type.String(), "again", again)
	call := &c.turn.call
	if again {
		c.do(w.Type, w.Payload)
	} else {
		call.Out, call.FD = codec.AppendErrno(call.Out[:0], w.Type, unix.EIO), -1
	}
	if w.Sent > 0 && len(call.Out) != w.Total {
		c.progress.End()
		c.told = true
		c.log().Error("connection closed: half of an answer was sent", "request", w.Type.String())
		return peerClosed
	}
	return c.answer(w.Type, len(w.Payload), w.Sent)
}

// refuse lets the kernel refuse what the client sends from now on; what it has
// sent already can still be read.
func (c *conn) refuse() { unix.Shutdown(c.fd, unix.SHUT_RD) }

// close closes the server's descriptor of the connection. The client notices
// if it has ended, although the supervisor has a descriptor as well.
func (c *conn) close(ended bool) {
	if ended {
		unix.Shutdown(c.fd, unix.SHUT_RDWR)
	}
	unix.Close(c.fd)
}

func (c *conn) log() *slog.Logger { return c.srv.log.With("connection", c.number) }

// readable waits until bytes or the end of the stream have come; false when
// nothing has within d, or a handing over has begun. With a seat it is a raw
// call, like Receive.
func (c *conn) readable(d time.Duration) bool {
	fds := [2]unix.PollFd{
		{Fd: int32(c.fd), Events: unix.POLLIN},
		{Fd: int32(c.srv.handoverFD), Events: unix.POLLIN},
	}
	left := unix.NsecToTimespec(d.Nanoseconds()) // which the kernel counts down
	for {
		var errno unix.Errno
		if c.seat {
			_, _, errno = unix.RawSyscall6(unix.SYS_PPOLL,
				uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)),
				uintptr(unsafe.Pointer(&left)), 0, 0, 0)
		} else {
			_, _, errno = unix.Syscall6(unix.SYS_PPOLL,
				uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)),
				uintptr(unsafe.Pointer(&left)), 0, 0, 0)
		}
		if errno != unix.EINTR {
			return errno == 0 && fds[0].Revents != 0
		}
		runtime.Gosched()
	}
}

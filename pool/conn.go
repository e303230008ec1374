package pool

import (
	"log/slog"
	"time"

	"github.com/valyala/bytebufferpool"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/ops"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/progress"
)

// conn is a connection. Its fields are its worker's during a lease, and the loop's
// while it is parked.
type conn struct {
	srv      *Server
	id       uint32 // the supervisor's number of its slot
	number   uint64 // in the log, never used again
	fd       int
	raw      bool           // no descriptor can come with what is received
	peer     *peer          // whose it is
	slot     *inflight.Slot // what has been received and is in work
	progress *progress.Conn // since when something is in work, for the supervisor
	policy   policy

	recovered bool   // what another server has left is done
	told      bool   // why it is closed is logged
	unsent    answer // that the client does not read, if it has bytes
	retries   int    // of a request that can't be done yet
	requests  uint   // for breathe
	turn      turn   // good during a lease
}

// turn is what a connection needs during a lease.
type turn struct {
	call    ops.Call
	request *bytebufferpool.ByteBuffer // the payload: it is decoded in place
	answer  *bytebufferpool.ByteBuffer // call.Out
}

var buffers bytebufferpool.Pool

func (t *turn) begin() {
	t.request, t.answer = buffers.Get(), buffers.Get()
	t.call.Out = t.answer.B
}

func (t *turn) end() {
	t.answer.B = t.call.Out
	buffers.Put(t.request)
	buffers.Put(t.answer)
	*t = turn{}
}

// answer is what a client is to get for a request.
type answer struct {
	bytes []byte
	fd    int // that goes with it, and is to be closed; -1 for none
	t     codec.Type
	size  int  // of the request's payload
	kept  bool // bytes lie in the slot
}

// outcome is what a connection does next.
type outcome int

const (
	goesOn     outcome = iota // with its lease
	parks                     // in the loop
	queues                    // for a worker: there is a whole request
	retries                   // its request some time later
	ends                      // the client has left, or is not to be served
	handedOver                // it goes to another server
)

// Send buffers, in bytes before the kernel doubles them.
const (
	// fewUnread has room for some six answers that the client does not read. The
	// kernel counts descriptors under way for the user that sends them: a client
	// that reads none could take all there are.
	fewUnread = 2304
	// manyBytes is for an answer that does not fit there at once.
	manyBytes = 128 << 10
)

// prepare makes fd a blocking socket whose recv waits for blockFor at most. With a
// timeout a signal interrupts recv for sure (signal(7)), which the Go runtime
// relies on when it wants to stop a thread in a raw call.
func prepare(fd int) error {
	if err := unix.SetNonblock(fd, false); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, fewUnread); err != nil {
		return err
	}
	tv := unix.NsecToTimeval(blockFor.Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// serve is a lease: it serves what has come, and all that comes while the policy
// lets the worker wait. The thread is not sound if it could not take back the
// identity of a request, whatever becomes of the connection: it is to end.
func (c *conn) serve() (end outcome, sound bool) {
	if c.srv.handingOver.Load() {
		return handedOver, true
	}
	c.turn.begin()
	defer c.turn.end()
	c.policy.lease(nanotime())
	end = c.resume()
	for end == goesOn {
		if end = c.serveFrames(); end == goesOn {
			end = c.await()
		}
	}
	return end, !c.turn.call.Tainted
}

// resume answers what was in work before the lease.
func (c *conn) resume() outcome {
	switch {
	case !c.recovered:
	case c.unsent.bytes != nil:
		return c.send(c.unsent)
	case c.raw || c.ready():
		return goesOn
	default: // the loop has not received what has come
		return c.receive()
	}
	c.recovered = true
	if end := c.recover(); end != goesOn {
		return end
	}
	if !c.ready() { // most connections are idle when they come
		return parks
	}
	return goesOn
}

// receive receives what has come, by a call that the scheduler knows of.
func (c *conn) receive() outcome {
	if received(c.slot.Receive(c.fd, unix.MSG_DONTWAIT, false)) < 0 {
		return ends
	}
	return goesOn
}

// ready tells that a whole request has come, or something else than a request.
func (c *conn) ready() bool {
	_, _, ok, err := c.slot.Frame()
	return ok || err != nil
}

// serveFrames serves the whole requests that have come.
func (c *conn) serveFrames() outcome {
	for first := true; ; first = false {
		t, payload, ok, err := c.slot.Frame()
		switch {
		case err != nil:
			c.told = true
			c.log().Warn("connection closed: not the proxy protocol",
				"request", t.String(), "error", err)
			return ends
		case !ok:
			return goesOn
		case !first && c.srv.workers.waiting.Load() > 0 && c.policy.expired(nanotime()):
			return queues
		}
		c.slot.Begin()
		if c.retries == 0 {
			c.progress.Begin(t)
		}
		c.do(t, payload)
		if c.turn.call.Again {
			c.slot.Undo()
			c.retries++
			return retries
		}
		c.retries = 0
		if end := c.answer(t, len(payload)); end != goesOn {
			return end
		}
	}
}

// do does one request, in a copy of its own.
func (c *conn) do(t codec.Type, payload []byte) {
	c.turn.request.Set(payload)
	c.turn.call.Connection, c.turn.call.MayWait = c.number, c.retries >= maxRetries
	c.srv.fs.Do(t, c.turn.request.B, &c.turn.call)
}

// answer sends the answer that do has left, less what was sent before. size is
// that of the request's payload.
func (c *conn) answer(t codec.Type, size int) outcome {
	call := &c.turn.call
	now := int64(0)
	if c.policy.measures() {
		now = nanotime()
	}
	c.policy.sends(now)
	if call.Tainted {
		c.log().Error("a thread could not take back the identity of a request: it serves no other",
			"request", t.String())
	}
	if end := c.send(answer{bytes: call.Out, fd: call.FD, t: t, size: size}); end != goesOn {
		return end
	}
	switch {
	case call.Tainted:
		return queues // for another thread
	case c.srv.handingOver.Load():
		return handedOver
	}
	return goesOn
}

// send sends an answer. What the client does not read lies in the slot from then
// on, and waits in the loop.
func (c *conn) send(a answer) outcome {
	long := len(a.bytes) > fewUnread/2
	if long && !a.kept {
		unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, manyBytes)
	}
	done, errno := c.slot.Send(c.fd, a.bytes, a.fd)
	if !done && errno == 0 {
		if !a.kept {
			a.bytes, a.kept = c.slot.Keep(a.bytes, a.fd >= 0), true
		}
		c.unsent = a
		c.progress.Answering()
		return parks
	}
	c.unsent = answer{}
	if a.fd >= 0 {
		unix.Close(a.fd)
		if errno != 0 && errno != unix.EPIPE && errno != unix.ECONNRESET {
			// The kernel may be out of room for descriptors under way, which
			// is an answer, too.
			out := codec.AppendErrno(c.turn.call.Out[:0], a.t, errno)
			c.turn.call.Out = out
			return c.send(answer{bytes: out, fd: -1, t: a.t, size: a.size})
		}
	}
	c.progress.End()
	if errno != 0 {
		return ends
	}
	if long {
		unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, fewUnread)
	}
	c.slot.Done(a.size)
	return goesOn
}

// recover answers the request that a server has died over, or handed over, if
// there is one: it is done again where that harms nothing and no second server is
// risked.
func (c *conn) recover() outcome {
	w, ok, err := c.slot.Recover()
	if err != nil {
		c.told = true
		c.log().Error("connection closed", "error", err)
		return ends
	}
	if !ok {
		return goesOn
	}
	c.progress.Begin(w.Type)
	size := len(w.Payload)
	if w.Answer != nil {
		return c.send(answer{bytes: w.Answer, fd: -1, t: w.Type, size: size, kept: true})
	}
	c.turn.request.Set(w.Payload)
	again := w.Tries == 0 && ops.Repeatable(w.Type, c.turn.request.B)
	c.log().Warn("a server has died over a request", "request", w.Type.String(), "again", again)
	call := &c.turn.call
	if again {
		c.do(w.Type, w.Payload)
		if call.Again {
			c.slot.Undo()
			c.retries++
			return retries
		}
	} else {
		call.Out, call.FD = codec.AppendErrno(call.Out[:0], w.Type, unix.EIO), -1
	}
	if w.Sent > 0 && len(call.Out) != w.Total {
		c.progress.End()
		c.told = true
		c.log().Error("connection closed: half of an answer was sent", "request", w.Type.String())
		return ends
	}
	return c.answer(w.Type, size)
}

// maxRetries take a minute. Then the worker waits, as whoever opens a file does
// that another process has leased.
const maxRetries = 1000

// retryIn is how long a request that can't be done yet is left: longer each time.
func (c *conn) retryIn() time.Duration { return time.Millisecond << min(c.retries, 6) }

// refuse lets the kernel refuse what the client sends from now on; what it has
// sent already can still be read.
func (c *conn) refuse() { unix.Shutdown(c.fd, unix.SHUT_RD) }

// close closes the server's descriptors of the connection. The client notices if
// it has ended, although the supervisor has a descriptor as well.
func (c *conn) close(ended bool) {
	if ended {
		unix.Shutdown(c.fd, unix.SHUT_RDWR)
	}
	if c.unsent.bytes != nil && c.unsent.fd >= 0 {
		unix.Close(c.unsent.fd)
	}
	unix.Close(c.fd)
}

func (c *conn) log() *slog.Logger { return c.srv.log.With("connection", c.number) }

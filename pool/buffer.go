package pool

import (
	"github.com/valyala/bytebufferpool"

	"virtfs-proxy-helper/codec"
)

// smallFrames is the room for frames that nearly all traffic needs, in bytes.
const smallFrames = 4096

var buffers bytebufferpool.Pool

// inbox holds the bytes that a client has sent and that have not been served.
// It grows beyond smallFrames only for a frame whose header has been checked,
// so it takes codec.MaxFrame at most, and nothing at all while it is empty.
type inbox struct {
	buf        *bytebufferpool.ByteBuffer
	start, end int // of what is there, in buf.B[:cap]
}

// frame takes the next whole frame. ok is false if it is not all there; then
// room has place for what is missing. An error ends the connection. The
// payload is good until the next call of room.
func (in *inbox) frame() (t codec.Type, payload []byte, ok bool, err error) {
	have := in.end - in.start
	if have < codec.HeaderSize {
		return 0, nil, false, nil
	}
	b := in.buf.B[in.start:in.end]
	t, size, err := codec.ParseHeader(b)
	if err != nil {
		return t, nil, false, err
	}
	n := codec.HeaderSize + size
	if have < n {
		in.reserve(n)
		return t, nil, false, nil
	}
	in.start += n
	return t, b[codec.HeaderSize:n:n], true, nil
}

// reserve makes room for n bytes from start on.
func (in *inbox) reserve(n int) {
	if in.buf == nil {
		in.buf = buffers.Get()
		in.start, in.end = 0, 0
	}
	if c := cap(in.buf.B); c-in.start < n {
		to := in.buf.B[:c]
		if c < n {
			to = make([]byte, max(n, smallFrames))
		}
		in.end = copy(to, in.buf.B[in.start:in.end])
		in.start = 0
		in.buf.B = to
	}
	in.buf.B = in.buf.B[:cap(in.buf.B)]
}

// room returns where to receive to; it is never empty.
func (in *inbox) room() []byte {
	if in.start == in.end {
		in.start, in.end = 0, 0
	}
	if in.buf == nil || in.end == cap(in.buf.B) || in.start > 0 {
		in.reserve(max(smallFrames, in.end-in.start+1))
	}
	return in.buf.B[in.end:]
}

// received says that n bytes have come into room.
func (in *inbox) received(n int) { in.end += n }

// put adds bytes that lie elsewhere and returns how many it had room for.
func (in *inbox) put(b []byte) int {
	n := copy(in.room(), b)
	in.received(n)
	return n
}

// rest gives the buffer back if nothing is in it.
func (in *inbox) rest() {
	if in.buf != nil && in.start == in.end {
		buffers.Put(in.buf)
		*in = inbox{}
	}
}

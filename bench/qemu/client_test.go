package qemu

import (
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// pair returns a client of each kind in turn, and the helper's end.
func pair(t testing.TB, blocking bool) (c *Client, helper int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if blocking {
		c = NewBlocking(fds[0])
	} else if c, err = Adopt(os.NewFile(uintptr(fds[0]), "client's end"), Patience); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, fds[1]
}

// message is one sendmsg of the helper: bytes, and how many descriptors.
type message struct {
	text        string
	descriptors int
}

func (m message) send(t testing.TB, fd int) {
	t.Helper()
	var rights []byte
	if m.descriptors > 0 {
		fds := make([]int, m.descriptors) // of stdin
		rights = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(fd, []byte(m.text), rights, nil, 0); err != nil {
		t.Fatal(err)
	}
}

// eof stands for the end of the connection.
var eof = message{}

func plain(pieces ...string) (list []message) {
	for _, text := range pieces {
		list = append(list, message{text: text})
	}
	return list
}

// Little-endian literals: what a helper sends, and what the client makes of it.
var answers = []struct {
	name    string
	t       codec.Type
	sent    []message
	errno   unix.Errno
	payload string
	fd      bool
	err     error
}{
	{name: "status", t: codec.Chmod,
		sent: plain("\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"), payload: "\x00\x00\x00\x00"},
	{name: "empty", t: codec.Readlink, sent: plain("\x00\x00\x00\x00\x00\x00\x00\x00")},
	{name: "in pieces", t: codec.Readlink,
		sent: plain("\x00\x00", "\x00\x00\x04\x00\x00", "\x00\x02", "\x00a", "b"), payload: "\x02\x00ab"},
	{name: "longest", t: codec.Readlink, sent: plain("\x00\x00\x00\x00\x00\x00\x01\x00" + strings.Repeat("x", 65536)),
		payload: strings.Repeat("x", 65536)},
	{name: "errno", t: codec.Lstat,
		sent: plain("\x01\x00\x00\x00\x04\x00\x00\x00\xfe\xff\xff\xff"), errno: unix.ENOENT,
		payload: "\xfe\xff\xff\xff"},
	{name: "descriptor", t: codec.Open, sent: []message{{"\xff\xff\xff\x7f", 1}}, fd: true},
	{name: "errno of CREATE", t: codec.Create, sent: plain("\xef\xff\xff\xff"), errno: unix.EEXIST},

	{name: "end", t: codec.Lstat, sent: []message{eof}, err: io.EOF},
	{name: "end of OPEN", t: codec.Open, sent: []message{eof}, err: io.EOF},
	{name: "end in the header", t: codec.Lstat, sent: []message{{"\x00\x00\x00", 0}, eof}, err: io.ErrUnexpectedEOF},
	{name: "end before the payload", t: codec.Lstat, sent: []message{{"\x00\x00\x00\x00\x04\x00\x00\x00", 0}, eof},
		err: io.ErrUnexpectedEOF},
	{name: "end in the payload", t: codec.Lstat, sent: []message{{"\x00\x00\x00\x00\x04\x00\x00\x00\x00", 0}, eof},
		err: io.ErrUnexpectedEOF},
	{name: "too long", t: codec.Lstat, sent: plain("\x00\x00\x00\x00\x01\x00\x01\x00"), err: codec.ErrSize},
	{name: "no answer's type", t: codec.Lstat,
		sent: plain("\x02\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"), err: ErrFrame},
	{name: "long errno", t: codec.Lstat,
		sent: plain("\x01\x00\x00\x00\x08\x00\x00\x00\xfe\xff\xff\xff\xff\xff\xff\xff"),
		err:  ErrFrame},
	{name: "error 0", t: codec.Lstat, sent: plain("\x01\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"), err: ErrFrame},
	{name: "positive errno", t: codec.Lstat,
		sent: plain("\x01\x00\x00\x00\x04\x00\x00\x00\x02\x00\x00\x00"), err: ErrFrame},
	{name: "no errno", t: codec.Open, sent: plain("\x00\xf0\xff\xff"), err: ErrFrame},
	{name: "0 of OPEN", t: codec.Open, sent: plain("\x00\x00\x00\x00"), err: ErrFrame},
	{name: "half of OPEN", t: codec.Open, sent: plain("\xfe\xff"), err: ErrFrame},
	{name: "half with descriptor", t: codec.Open, sent: []message{{"\xff\xff", 1}}, err: ErrDescriptor},
	{name: "no descriptor", t: codec.Open, sent: plain("\xff\xff\xff\x7f"), err: ErrDescriptor},
	{name: "descriptor later", t: codec.Open,
		sent: []message{{"\xff\xff\xff\x7f", 0}, {"\xff\xff\xff\x7f", 1}}, err: ErrDescriptor},
	{name: "two descriptors", t: codec.Open, sent: []message{{"\xff\xff\xff\x7f", 2}}, err: ErrDescriptor},
	{name: "more than there is room for", t: codec.Open,
		sent: []message{{"\xff\xff\xff\x7f", 20}}, err: ErrDescriptor},
	{name: "descriptor with an errno", t: codec.Open, sent: []message{{"\xfe\xff\xff\xff", 1}}, err: ErrDescriptor},
}

func TestAnswers(t *testing.T) {
	for _, blocking := range []bool{false, true} {
		for _, test := range answers {
			name := test.name
			if blocking {
				name += ", blocking"
			}
			t.Run(name, func(t *testing.T) {
				c, helper := pair(t, blocking)
				before := descriptors(t)
				send := func() {
					defer unix.Close(helper)
					for _, m := range test.sent {
						if m == eof {
							return
						}
						m.send(t, helper)
					}
				}
				var sent sync.WaitGroup
				if blocking { // and Go's scheduler does not know it
					send()
				} else {
					sent.Go(send)
				}
				a, err := c.Receive(test.t)
				sent.Wait()
				if !errors.Is(err, test.err) || (err != nil) != (test.err != nil) {
					t.Fatalf("error %v, want %v", err, test.err)
				}
				if err != nil && a.FD >= 0 {
					t.Errorf("descriptor %d with an error", a.FD)
				}
				if err == nil && (a.Errno != test.errno || string(a.Payload) != test.payload ||
					(a.FD >= 0) != test.fd) {
					t.Errorf("%v, %.80q, descriptor %d", a.Errno, a.Payload, a.FD)
				}
				f := a.File()
				if (f != nil) != test.fd {
					t.Errorf("file %v", f)
				}
				if f != nil {
					if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
						t.Errorf("flags %#x, %v", flags, err)
					}
					f.Close()
				}
				if now := descriptors(t); now != before-1 { // the helper's end
					t.Errorf("%d descriptors, had %d", now, before)
				}
			})
		}
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// A frame that a descriptor comes with is refused; a blocking client, which
// reads by read(2) as QEMU does, does not see it.
func TestFrameWithDescriptor(t *testing.T) {
	c, helper := pair(t, false)
	defer unix.Close(helper)
	message{"\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00", 1}.send(t, helper)
	if _, err := c.Receive(codec.Chmod); !errors.Is(err, ErrDescriptor) {
		t.Errorf("error %v, want %v", err, ErrDescriptor)
	}
}

// Requests go out as literals, answers are read one by one, and a descriptor
// that does not belong leaves the next answer in its place.
func TestRequests(t *testing.T) {
	for _, blocking := range []bool{false, true} {
		c, helper := pair(t, blocking)
		defer unix.Close(helper)
		message{"\xff\xff\xff\x7f", 0}.send(t, helper)
		message{"\x01\x00\x00\x00\x04\x00\x00\x00\xfe\xff\xff\xff", 0}.send(t, helper)
		if _, err := c.Do(codec.Open, codec.Request{Path: Path("/a")}); !errors.Is(err, ErrDescriptor) {
			t.Errorf("OPEN: %v", err)
		}
		if a, err := c.Do(codec.Lstat, codec.Request{Path: Path("/a")}); err != nil || a.Errno != unix.ENOENT {
			t.Errorf("LSTAT: %v, %v", a.Errno, err)
		}
		const want = "\x02\x00\x00\x00\x09\x00\x00\x00\x03\x00/a\x00\x00\x00\x00\x00" +
			"\x08\x00\x00\x00\x05\x00\x00\x00\x03\x00/a\x00"
		b := make([]byte, 100)
		if n, err := unix.Read(helper, b); err != nil || string(b[:n]) != want {
			t.Errorf("sent %q, %v, want %q", b[:max(n, 0)], err, want)
		}
	}
}

func TestEnd(t *testing.T) {
	c, helper := pair(t, false)
	if err := c.Silent(time.Millisecond); err != nil {
		t.Error(err)
	}
	message{"x", 0}.send(t, helper)
	if c.Silent(time.Second) == nil {
		t.Error("a byte is silence")
	}
	message{"x", 0}.send(t, helper)
	if c.Ended() == nil {
		t.Error("a byte is the end")
	}
	unix.Close(helper)
	if c.Silent(time.Second) == nil {
		t.Error("the end is silence")
	}
	if err := c.Ended(); err != nil {
		t.Error(err)
	}
}

func TestPatience(t *testing.T) {
	c, helper := pair(t, false)
	defer unix.Close(helper)
	c.patience = time.Millisecond
	if _, err := c.Receive(codec.Lstat); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	err := error(nil)
	for range 1000 { // until the socket's buffer is full
		if err = c.Send(make([]byte, 65536)); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write: %v", err)
	}
}

func TestShutdown(t *testing.T) {
	c, helper := pair(t, true)
	defer unix.Close(helper)
	c.Shutdown()
	if err := c.Read(codec.Lstat); err != io.EOF {
		t.Errorf("read: %v", err)
	}
}

// bench measures without the garbage collector's help.
func TestBlockingDoesNotAllocate(t *testing.T) {
	c, helper := pair(t, true)
	defer unix.Close(helper)
	const runs = 20
	frame := []byte("\x08\x00\x00\x00\x05\x00\x00\x00\x03\x00/a\x00")
	for range runs + 1 { // AllocsPerRun warms up
		message{"\x01\x00\x00\x00\x04\x00\x00\x00\xfe\xff\xff\xff", 0}.send(t, helper)
		message{"\xff\xff\xff\x7f", 1}.send(t, helper)
	}
	exchange := func(typ codec.Type, errno unix.Errno) {
		err := errors.Join(c.Send(frame), c.Read(typ))
		a, err2 := c.Answer(typ)
		if err != nil || err2 != nil || a.Errno != errno {
			t.Errorf("%v: %v, %v, %v", typ, a.Errno, err, err2)
		}
		if a.FD >= 0 {
			unix.Close(a.FD)
		}
	}
	if n := testing.AllocsPerRun(runs, func() {
		exchange(codec.Lstat, unix.ENOENT)
		exchange(codec.Open, 0)
	}); n != 0 {
		t.Errorf("%v allocations in two requests", n)
	}
}

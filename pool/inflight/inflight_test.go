package inflight

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// pair returns a slot and both ends of its connection.
func pair(t *testing.T) (file *os.File, s *Slot, server, client int) {
	t.Helper()
	file, err := Create(2)
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	// As the rules for raw calls want it.
	timeout := unix.Timeval{Usec: 10_000}
	if err := unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		file.Close()
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	return file, next(t, file), fds[0], fds[1]
}

// next is the slot as the next server finds it.
func next(t *testing.T, file *os.File) *Slot {
	t.Helper()
	j, err := Map(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(j.mem) })
	return j.Slot(1)
}

func lstat(path string) []byte {
	return (&codec.Request{Path: codec.CString(path)}).Append(nil, codec.Lstat)
}

func write(t *testing.T, fd int, b []byte) {
	t.Helper()
	if n, err := unix.Write(fd, b); n != len(b) {
		t.Fatal(n, err)
	}
}

func receive(t *testing.T, s *Slot, fd, want int) {
	t.Helper()
	if n, errno := s.Receive(fd, unix.MSG_DONTWAIT, true); n != want || errno != 0 {
		t.Fatalf("received %d, %v, want %d", n, errno, want)
	}
}

func wantFrame(t *testing.T, s *Slot, frame []byte) {
	t.Helper()
	typ, payload, ok, err := s.Frame()
	if !ok || err != nil || typ != codec.Lstat || !bytes.Equal(payload, frame[codec.HeaderSize:]) {
		t.Fatalf("frame %v %q, %v, %v: want %q", typ, payload, ok, err, frame)
	}
}

// A server may die between any two steps of a request. The next one finds what
// was received, and what has to be answered.
func TestDeathAtEachStep(t *testing.T) {
	first, second := lstat("/first\x00"), lstat("/second\x00")
	answer := codec.AppendErrno(nil, codec.Lstat, unix.ENOENT)
	steps := []struct {
		name    string
		do      func(t *testing.T, s *Slot, fd int)
		work    bool // the first request is to be answered by the next server
		pending []byte
	}{
		{"nothing received", func(*testing.T, *Slot, int) {}, false, nil},
		{"received", func(t *testing.T, s *Slot, fd int) { receive(t, s, fd, len(first)+len(second)) }, false, first},
		{"begun", func(t *testing.T, s *Slot, fd int) { s.Begin() }, true, nil},
		{"about to send", func(t *testing.T, s *Slot, fd int) { s.head.phase = uint32(len(answer)) }, true, nil},
		{"sent", func(t *testing.T, s *Slot, fd int) {
			send(t, s, fd, answer)
		}, false, second},
		{"done, in part", func(t *testing.T, s *Slot, fd int) {
			m := &s.head.rx[s.head.cur]
			m.start = s.head.frame + uint32(len(first))
		}, false, second},
		{"done", func(t *testing.T, s *Slot, fd int) { s.Done(len(first) - codec.HeaderSize) }, false, second},
		{"the second one done", func(t *testing.T, s *Slot, fd int) {
			s.Begin()
			send(t, s, fd, answer)
			s.Done(len(second) - codec.HeaderSize)
		}, false, nil},
		{"emptied in part", func(t *testing.T, s *Slot, fd int) { s.head.rx[s.head.cur].count.set(0) }, false, nil},
	}
	for last := range steps {
		t.Run(steps[last].name, func(t *testing.T) {
			file, s, fd, client := pair(t)
			write(t, client, append(append([]byte(nil), first...), second...))
			for _, step := range steps[:last+1] {
				step.do(t, s, fd)
			}
			s = next(t, file)
			w, ok, err := s.Recover()
			if err != nil || ok != steps[last].work {
				t.Fatalf("recovered %+v, %v, %v", w, ok, err)
			}
			if ok {
				if w.Type != codec.Lstat || !bytes.Equal(w.Payload, first[codec.HeaderSize:]) ||
					w.Tries != 0 || w.Sent != 0 {
					t.Errorf("work %+v", w)
				}
				// Over the same request once more: the next but one is told.
				s = next(t, file)
				if w, ok, err := s.Recover(); !ok || err != nil || w.Tries != 1 {
					t.Errorf("recovered again: %+v, %v, %v", w, ok, err)
				}
				s.Done(len(w.Payload))
				wantFrame(t, s, second)
				return
			}
			if steps[last].pending != nil {
				wantFrame(t, s, steps[last].pending)
				return
			}
			if last == 0 {
				receive(t, s, fd, len(first)+len(second))
				wantFrame(t, s, first)
				return
			}
			if n := s.Pending(); n != 0 {
				t.Errorf("%d bytes pending", n)
			}
			write(t, client, first)
			receive(t, s, fd, len(first))
			wantFrame(t, s, first)
		})
	}
}

// The kernel notes what was sent, although the server dies in the call's last
// moment: only msg_len tells.
func TestPartOfAnAnswer(t *testing.T) {
	file, s, fd, client := pair(t)
	write(t, client, lstat("/\x00"))
	receive(t, s, fd, len(lstat("/\x00")))
	s.Begin()
	s.head.phase = 1000
	s.head.tx.count.len = 300
	s = next(t, file)
	w, ok, err := s.Recover()
	if !ok || err != nil || w.Total != 1000 || w.Sent != 300 {
		t.Fatalf("recovered %+v, %v, %v", w, ok, err)
	}
	answer := bytes.Repeat([]byte("0123456789"), 100)
	send(t, s, fd, answer)
	got := make([]byte, 2000)
	if n, err := unix.Read(client, got); err != nil || !bytes.Equal(got[:n], answer[300:]) {
		t.Errorf("read %d, %v", n, err)
	}
	if sent := s.Sent(); sent != 1000 {
		t.Errorf("%d noted as sent", sent)
	}
}

// Of an answer that the client did not read, the next server sends the rest. One
// that a descriptor goes with is done again, as often as servers come and go.
func TestKeptAnswer(t *testing.T) {
	answer := bytes.Repeat([]byte("0123456789"), codec.MaxPayload/10)
	file, s, fd, client := pair(t)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1); err != nil {
		t.Fatal(err)
	}
	write(t, client, lstat("/\x00"))
	receive(t, s, fd, len(lstat("/\x00")))
	s.Begin()
	if done, errno := s.Send(fd, answer, -1); done || errno != 0 {
		t.Fatal(done, errno)
	}
	if kept := s.Keep(answer, false); !bytes.Equal(kept, answer) {
		t.Fatal("kept something else")
	}
	for i := range answer {
		answer[i] = '?' // its buffer is used again
	}
	var got []byte
	for servers := 0; len(got) < len(answer); servers++ {
		s = next(t, file)
		w, ok, err := s.Recover()
		if !ok || err != nil || w.Sent == 0 || w.Tries != servers || len(w.Answer) != len(answer) {
			t.Fatalf("server %d: %v, %v, sent %d, tries %d, answer of %d bytes", servers, ok, err,
				w.Sent, w.Tries, len(w.Answer))
		}
		b := make([]byte, len(answer))
		n, err := unix.Read(client, b)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, b[:n]...)
		if done, errno := s.Send(fd, w.Answer, -1); errno != 0 {
			t.Fatal(errno)
		} else if done {
			n, _ = unix.Read(client, b)
			got = append(got, b[:n]...)
			break
		}
	}
	if want := bytes.Repeat([]byte("0123456789"), codec.MaxPayload/10); !bytes.Equal(got, want) {
		t.Errorf("got %d bytes, not those of the answer, which has %d", len(got), len(want))
	}

	s.Done(len(lstat("/\x00")) - codec.HeaderSize)
	write(t, client, lstat("/\x00"))
	receive(t, s, fd, len(lstat("/\x00")))
	for range 3 {
		if typ, _, ok, err := s.Frame(); !ok || err != nil {
			t.Fatal(typ, ok, err)
		}
		s.Begin()
		s.Keep(codec.AppendFD(nil), true)
		s = next(t, file)
		w, ok, err := s.Recover()
		if !ok || err != nil || w.Answer != nil || w.Tries != 0 {
			t.Fatalf("recovered %+v, %v, %v", w, ok, err)
		}
		s.Undo()
	}
}

// send sends an answer that the socket has room for.
func send(t *testing.T, s *Slot, fd int, answer []byte) {
	t.Helper()
	if done, errno := s.Send(fd, answer, -1); !done || errno != 0 {
		t.Fatal(done, errno)
	}
}

// Frames of all sizes come through in any pieces, whatever lies in front.
func TestFramesThroughTheInbox(t *testing.T) {
	file, s, fd, client := pair(t)
	var stream []byte
	var sizes []int
	for i := range 300 {
		size := []int{1, 30, 500, 4000, 4096, 9000, 65000, 65530}[i*7%8] - i%3
		q := codec.Request{Path: codec.CString(bytes.Repeat([]byte{byte('a' + i%26)}, max(0, size)))}
		stream = q.Append(stream, codec.Lstat)
		sizes = append(sizes, len(q.Path)+2)
	}
	go func() {
		for rest, i := stream, 0; len(rest) > 0; i++ {
			n := min(len(rest), 1+i*977%20000)
			n, _ = unix.Write(client, rest[:n])
			rest = rest[max(n, 0):]
		}
	}()
	for served := 0; served < len(sizes); {
		if n, errno := s.Receive(fd, 0, true); n == 0 || errno != 0 && errno != unix.EAGAIN && errno != unix.EINTR {
			t.Fatal(n, errno)
		}
		for {
			_, payload, ok, err := s.Frame()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			if len(payload) != sizes[served] {
				t.Fatalf("frame %d has %d bytes, want %d", served, len(payload), sizes[served])
			}
			want := byte('a' + served%26)
			if len(payload) > 2 && (payload[2] != want || payload[len(payload)-1] != want) {
				t.Fatalf("frame %d: %q", served, payload[2])
			}
			s.Begin()
			s.Done(len(payload))
			served++
		}
		s.Rest()
		if served%10 == 0 { // another server goes on in the middle
			s = next(t, file)
			if _, ok, err := s.Recover(); ok || err != nil {
				t.Fatal(ok, err)
			}
		}
	}
}

// damage writes words over a slot's head: word n of the head becomes value.
func damage(h *head, words []uint32) {
	all := unsafe.Slice((*uint32)(unsafe.Pointer(h)), unsafe.Sizeof(*h)/4)
	copy(all, words)
}

// words returns the head of a slot as damage writes it.
func words(scribble func(h *head)) []uint32 {
	var h head
	scribble(&h)
	return slices.Clone(unsafe.Slice((*uint32)(unsafe.Pointer(&h)), unsafe.Sizeof(h)/4))
}

// damages are heads that ended a server, or would have.
func damages() [][]uint32 {
	frame := uint32(len(lstat("/\x00")))
	received := func(h *head) { h.rx[0].count = counter{base: 3 * frame} }
	return [][]uint32{
		words(func(h *head) {}),
		words(received),
		words(func(h *head) { h.cur = 7 }),
		words(func(h *head) { h.cur = 1; received(h) }),
		words(func(h *head) { h.rx[0].count = counter{len: 1 << 31, base: 1 << 31} }),
		words(func(h *head) { h.rx[0].count = counter{base: inboxSize + 1} }),
		words(func(h *head) { h.rx[0].count = counter{base: inboxSize} }),
		words(func(h *head) { h.rx[0].start = 1 << 30 }),
		words(func(h *head) { received(h); h.rx[0].start = 1 }),
		words(func(h *head) { h.phase, h.frame = begun, 1<<31 }),
		words(func(h *head) { h.phase = 1 << 20 }),
		words(func(h *head) { h.phase = begun }), // over nothing
		words(func(h *head) { h.phase, h.tx.count.len = 100, 200 }),
		words(func(h *head) { received(h); h.phase, h.tx.count.base = begun, 5 }),
		words(func(h *head) { received(h); h.phase, h.tx.count = begun, counter{1 << 31, 1 << 31} }),
		words(func(h *head) { received(h); h.phase, h.tx.count = 100, counter{1 << 31, 1 << 31} }),
		words(func(h *head) { received(h); h.phase, h.tx.count = 100, counter{len: 99} }),
		words(func(h *head) { received(h); h.phase, h.tries = begun, 1<<32-1 }),
		words(func(h *head) { received(h); h.phase, h.kept = 100, answerKept }),
		words(func(h *head) { received(h); h.phase, h.kept, h.tx.count.len = 100, keptOfFD, 1 }),
		words(func(h *head) { received(h); h.phase, h.kept = codec.MaxFrame, 1<<32-1 }),
		words(func(h *head) { received(h); h.tx.count = counter{1 << 31, 1<<31 + 5} }),
		words(func(h *head) {
			received(h)
			h.rx[0].hdr, h.rx[0].iov.len = msghdr{name: 1, namelen: 9, iovlen: 99, control: 1, controllen: 9}, 1<<40
			h.tx.hdr, h.tx.iov.base, h.tx.iov.len = h.rx[0].hdr, 1, 1<<40
		}),
	}
}

// serveDamaged is what a server does with a slot whose head and inbox hold
// anything, and then with a client that sends frames and reads the answers.
func serveDamaged(t *testing.T, headWords []uint32, inbox []byte) {
	_, s, fd, client := pair(t)
	damage(s.head, headWords)
	copy(s.inbox, inbox)
	guard := s.mem[headSize+inboxSize:] // the outbox is nobody's here, too
	for i := range guard {
		guard[i] = 0xa5
	}
	s.prepare() // as Memory.Slot has done it before
	answer := bytes.Repeat([]byte("0123456789"), codec.MaxFrame/10+1)
	send := func(size, b []byte, sent int) {
		t.Helper()
		send(t, s, fd, b)
		got := make([]byte, len(b)+1)
		n := 0
		for n < len(b)-sent {
			m, err := unix.Read(client, got[n:])
			if err != nil {
				t.Fatal(err)
			}
			n += m
		}
		if !bytes.Equal(got[:n], b[sent:]) {
			t.Fatalf("the client gets %d bytes, not those from %d of %d on", n, sent, len(b))
		}
		s.Done(len(size))
	}
	w, ok, err := s.Recover()
	if err != nil {
		return // the connection ends
	}
	if ok {
		size := w.Total
		if size == 0 {
			size = 20
		}
		b := answer[:size]
		if w.Answer != nil {
			b = w.Answer
		}
		send(w.Payload, b, w.Sent)
	}
	unix.SetNonblock(client, true)
	good := lstat("/next\x00")
	for served := 0; served < 40; {
		_, payload, ok, err := s.Frame()
		if err != nil {
			return
		}
		if ok {
			s.Begin()
			send(payload, answer[:len(payload)%len(answer)+1], 0)
			served++
			continue
		}
		if n := s.Pending(); n < 0 || n > codec.MaxFrame {
			t.Fatalf("%d bytes pending of a frame", n)
		}
		if _, err := unix.Write(client, good); err != nil {
			t.Fatal(err)
		}
		if n, errno := s.Receive(fd, unix.MSG_DONTWAIT, true); n <= 0 || errno != 0 {
			t.Fatalf("received %d, %v", n, errno)
		}
		served++
	}
	for i, b := range guard {
		if b != 0xa5 {
			t.Fatalf("byte %d behind the inbox is written", i)
		}
	}
}

func framesInbox() []byte { return bytes.Repeat(lstat("/\x00"), inboxSize/len(lstat("/\x00"))) }

// What a server finds in memory that something has scribbled on ends the
// connection at most, however far the server goes on with it.
func TestDamagedMemory(t *testing.T) {
	for i, d := range damages() {
		t.Run(fmt.Sprint(i), func(t *testing.T) { serveDamaged(t, d, framesInbox()) })
	}
	// Each word of a slot that was in use, one after the other.
	good := words(func(h *head) {
		h.rx[0].count = counter{base: 3 * uint32(len(lstat("/\x00")))}
		h.phase = 30
	})
	values := []uint32{
		0, 1, 2, 5, 29, 30, 31, codec.MaxFrame, codec.MaxFrame + 1, inboxSize, inboxSize + 1, 1 << 31, 1<<32 - 1,
	}
	for n := range good {
		t.Run(fmt.Sprint("word ", n), func(t *testing.T) {
			for _, value := range values {
				d := slices.Clone(good)
				d[n] = value
				t.Run(fmt.Sprint(value), func(t *testing.T) { serveDamaged(t, d, framesInbox()[:3000]) })
			}
		})
	}
}

// FuzzDamagedMemory does the same with any words. Only the low bits of most
// make a state that Recover accepts.
func FuzzDamagedMemory(f *testing.F) {
	bytesOf := func(w []uint32) []byte {
		return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), 4*len(w))
	}
	for _, d := range damages() {
		f.Add(bytesOf(d), framesInbox()[:300])
	}
	f.Fuzz(func(t *testing.T, headBytes, inbox []byte) {
		d := make([]uint32, len(headBytes)/4)
		for i := range d {
			d[i] = binary.NativeEndian.Uint32(headBytes[4*i:])
		}
		serveDamaged(t, d, inbox)
	})
}

// Memory is taken for what is used and given back.
func TestMemory(t *testing.T) {
	file, s, fd, client := pair(t)
	used := func() int64 { // beside the memory's head
		var st unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks*512 - slotsAt
	}
	if n := used(); n > pageSize {
		t.Errorf("empty slots take %d bytes", n)
	}
	long := lstat(string(make([]byte, 65000)))
	go unix.Write(client, long)
	for s.Pending() < len(long) {
		if n, errno := s.Receive(fd, 0, true); n == 0 || errno != 0 && errno != unix.EAGAIN && errno != unix.EINTR {
			t.Fatal(n, errno)
		}
	}
	s.Begin()
	s.Done(len(long) - codec.HeaderSize)
	if n := used(); n < 60000 {
		t.Errorf("a long frame takes %d bytes: not in the in-flight memory?", n)
	}
	write(t, client, lstat("/\x00"))
	receive(t, s, fd, len(lstat("/\x00"))) // which begins in front again
	s.Rest()
	if n := used(); n > 2*pageSize {
		t.Errorf("a resting slot takes %d bytes", n)
	}
	wantFrame(t, s, lstat("/\x00"))
	if err := Clear(file, 1); err != nil {
		t.Fatal(err)
	}
	if n := used(); n > pageSize {
		t.Errorf("a cleared slot takes %d bytes", n)
	}
	if err := unix.Ftruncate(int(file.Fd()), 0); err == nil {
		t.Error("a server can shrink the in-flight memory under others")
	}
}

// A slot that was copied has what it had, and what is written to the old memory
// later does not reach it.
func TestCopy(t *testing.T) {
	file, s, fd, client := pair(t)
	first := lstat("/first\x00")
	write(t, client, first)
	receive(t, s, fd, len(first))
	s.Begin()
	s.inbox[inboxSize-1] = 0x5a // in the last page
	to, err := Create(2)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	dirty := next(t, to)
	for i := range dirty.mem {
		dirty.mem[i] = 0xff // of a connection before
	}
	if err := Copy(to, file, 1); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(to.Fd()), &st); err != nil || st.Blocks*512 > 10*pageSize {
		t.Errorf("%v, the copy takes %d bytes", err, st.Blocks*512)
	}
	for i := range s.mem { // by a hostile server
		s.mem[i] = 0xff
	}
	s = next(t, to)
	if b := s.inbox[len(first) : inboxSize-1]; len(bytes.Trim(b, "\x00")) != 0 || s.inbox[inboxSize-1] != 0x5a {
		t.Error("the copy of the inbox is not what it was")
	}
	w, ok, err := s.Recover()
	if !ok || err != nil || w.Type != codec.Lstat || !bytes.Equal(w.Payload, first[codec.HeaderSize:]) {
		t.Errorf("recovered %+v, %v, %v", w, ok, err)
	}
	s.Done(len(w.Payload))
	write(t, client, first)
	receive(t, s, fd, len(first))
	wantFrame(t, s, first)
}

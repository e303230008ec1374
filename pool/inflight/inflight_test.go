package inflight

import (
	"bytes"
	"os"
	"testing"

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
	if err := unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10_000}); err != nil {
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
	if n, errno := s.Receive(fd, unix.MSG_DONTWAIT); n != want || errno != 0 {
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
			if errno := s.Send(fd, answer, 0, -1); errno != 0 {
				t.Fatal(errno)
			}
		}, false, second},
		{"done, in part", func(t *testing.T, s *Slot, fd int) {
			m := &s.head.rx[s.head.cur]
			m.start = s.head.frame + uint32(len(first))
		}, false, second},
		{"done", func(t *testing.T, s *Slot, fd int) { s.Done(len(first) - codec.HeaderSize) }, false, second},
		{"the second one done", func(t *testing.T, s *Slot, fd int) {
			s.Begin()
			if errno := s.Send(fd, answer, 0, -1); errno != 0 {
				t.Fatal(errno)
			}
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
				if w.Type != codec.Lstat || !bytes.Equal(w.Payload, first[codec.HeaderSize:]) || w.Tries != 0 || w.Sent != 0 {
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
	if errno := s.Send(fd, answer, w.Sent, -1); errno != 0 {
		t.Fatal(errno)
	}
	got := make([]byte, 2000)
	if n, err := unix.Read(client, got); err != nil || !bytes.Equal(got[:n], answer[300:]) {
		t.Errorf("read %d, %v", n, err)
	}
	if sent := s.head.tx.count.total(); sent != 1000 {
		t.Errorf("%d noted as sent", sent)
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
		if n, errno := s.Receive(fd, 0); n == 0 || errno != 0 && errno != unix.EAGAIN && errno != unix.EINTR {
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
			if want := byte('a' + served%26); len(payload) > 2 && (payload[2] != want || payload[len(payload)-1] != want) {
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

// What a server finds in memory that something has scribbled on ends the
// connection at most.
func TestDamagedJournal(t *testing.T) {
	for _, scribble := range []func(h *head){
		func(h *head) { h.cur = 7 },
		func(h *head) { h.rx[0].count = counter{len: 1 << 31, base: 1 << 31} },
		func(h *head) { h.rx[0].count = counter{base: inboxSize + 1} },
		func(h *head) { h.rx[0].start = 1 << 30 },
		func(h *head) { h.phase, h.frame = 1, 1<<31 },
		func(h *head) { h.phase = 1 << 20 },
		func(h *head) { h.phase = begun }, // over nothing
		func(h *head) { h.phase, h.tx.count.len = 100, 200 },
	} {
		file, s, _, _ := pair(t)
		scribble(s.head)
		s = next(t, file)
		if w, ok, err := s.Recover(); err == nil && (ok || s.Pending() != 0) {
			t.Errorf("recovered %+v, %d pending", w, s.Pending())
		}
	}
}

// Memory is taken for what is used and given back.
func TestMemory(t *testing.T) {
	file, s, fd, client := pair(t)
	used := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	if n := used(); n > pageSize {
		t.Errorf("empty slots take %d bytes", n)
	}
	long := lstat(string(make([]byte, 65000)))
	go unix.Write(client, long)
	for s.Pending() < len(long) {
		if n, errno := s.Receive(fd, 0); n == 0 || errno != 0 && errno != unix.EAGAIN && errno != unix.EINTR {
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

package pool_test

import (
	"encoding/binary"
	"flag"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/ops"
	"virtfs-proxy-helper/pool"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/progress"
)

// These tests run the server within a test process of their own (ownProcess),
// where the fuzzer sees which code runs and the collector can be called. The
// process' root directory is an empty tmpfs: the file operations are real ones.

// patience bounds every wait: only what hangs takes so long.
const patience = 60 * time.Second

// slots is how many connections a test may have at once.
const slots = 64

// host is what servers of one process share, as the supervisor would keep it.
var host = sync.OnceValue(func() (h struct {
	fs      *ops.FS
	file    *os.File // of the in-flight memory
	memory  pool.Memories
	threads *os.File // /proc/self/task
}) {
	check := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	var err error
	h.threads, err = os.Open("/proc/self/task")
	check(err)
	fds, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(err)
	// Files are mounted, and the root is changed, for this process alone.
	dir, err := os.MkdirTemp("", "inside")
	check(err)
	check(unix.Mount("none", dir, "tmpfs", 0, "size=32m,nr_inodes=2000"))
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(err)
	check(unix.Unmount(dir, unix.MNT_DETACH)) // it goes with the process
	check(os.Remove(dir))
	check(unix.Fchdir(root))
	check(unix.Chroot("."))
	check(unix.Close(root))
	check(unix.Chdir("/"))
	unix.Umask(0)
	h.fs, err = ops.New(fds, ops.Options{}, quiet)
	check(err)
	h.file, err = inflight.Create(slots)
	check(err)
	h.memory.Inflight, err = inflight.Map(h.file)
	check(err)
	file, err := progress.Create(slots)
	check(err)
	h.memory.Progress, err = progress.Map(file)
	check(err)
	check(file.Close())
	return h
})

var quiet = slog.New(slog.DiscardHandler)

// inProcess is a server with what the supervisor knows of its connections.
type inProcess struct {
	*pool.Server
	mu    sync.Mutex
	ended map[uint32]bool
}

func newInProcess(tb testing.TB) *inProcess {
	tb.Helper()
	return newInProcessOf(tb, slots)
}

func newInProcessOf(tb testing.TB, workers int) *inProcess {
	tb.Helper()
	s := &inProcess{ended: map[uint32]bool{}}
	var err error
	cfg := &pool.Config{Workers: workers}
	s.Server, err = pool.NewServer(host().fs, host().memory, cfg, func(id uint32, ended bool) {
		s.mu.Lock()
		s.ended[id] = ended
		s.mu.Unlock()
	}, quiet)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func socketPair(tb testing.TB) (ours, theirs int) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	return fds[0], fds[1]
}

// answers reads until the end of the stream, and closes the descriptors that
// come with it.
func answers(fd int) (stream []byte, descriptors int, err error) {
	b, oob := make([]byte, 1<<16), make([]byte, unix.CmsgSpace(4*16))
	for {
		n, oobn, _, _, err := unix.Recvmsg(fd, b, oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ECONNRESET || err == nil && n == 0:
			return stream, descriptors, nil
		case err != nil:
			return stream, descriptors, err
		}
		stream = append(stream, b[:n]...)
		messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for i := range messages {
			fds, _ := unix.ParseUnixRights(&messages[i])
			for _, fd := range fds {
				descriptors++
				unix.Close(fd)
			}
		}
	}
}

// FuzzServer sends a stream of bytes, in pieces of the given size, to a server
// that gives the connection over to another one behind the piece renew. Each
// request is answered once, in the order of the requests, in its own shape;
// what is no request ends the connection; no descriptor is left.
func FuzzServer(f *testing.F) {
	helpertest.NeedRoot(f) // for a root directory of its own
	if !fuzzing() && !ownProcess(f) {
		f.Fuzz(func(*testing.T, []byte, uint16, uint8) {}) // the corpus has been run there
		return
	}
	path := func(s string) codec.CString { return codec.CString(s + "\x00") }
	var all []byte
	for t := codec.Open; t < codec.NumTypes; t++ {
		q := codec.Request{
			Path: path("/f"), NewPath: path("/g"), Target: path("/g"), Name: path("user.a"), Value: []byte("value"),
			Flags: unix.O_CREAT | unix.O_RDWR, Mode: unix.S_IFREG | 0o644, Size: 5,
		}
		all = q.Append(all, t)
		f.Add(q.Append(nil, t), uint16(100), uint8(0))
		q.UID, q.GID, q.Path = 1000, 1000, path("/no/such/directory")
		f.Add(q.Append(nil, t), uint16(3), uint8(2))
	}
	f.Add(all, uint16(64), uint8(4))
	f.Add(append(all, 0xff), uint16(5000), uint8(1))
	f.Add([]byte("\x08\x00\x00\x00\x01\x00\x01\x00"), uint16(8), uint8(0))
	f.Add([]byte("\x13\x00\x00\x00\x00\x00\x01\x00"+string(make([]byte, 65536))), uint16(4096), uint8(3))
	f.Fuzz(func(t *testing.T, stream []byte, piece uint16, renew uint8) {
		if len(stream) > 4*codec.MaxFrame {
			t.Skip("longer than it pays")
		}
		host()
		before := openFDs(t)
		serve(t, stream, max(1, int(piece)), int(renew))
		for end := time.Now().Add(patience); openFDs(t) > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d descriptors, were %d", openFDs(t), before)
			}
		}
	})
}

func serve(t *testing.T, stream []byte, piece, renew int) {
	if err := inflight.Clear(host().file, 0); err != nil {
		t.Fatal(err)
	}
	ours, theirs := socketPair(t)
	defer unix.Close(ours)
	s := newInProcess(t)
	keeps, err := unix.FcntlInt(uintptr(theirs), unix.F_DUPFD_CLOEXEC, 0) // as the supervisor does
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Add(theirs, ipc.NewConn{ID: 0, Number: 1, Peer: 1, Raw: true}); err != nil {
		t.Fatal(err)
	}
	type result struct {
		stream      []byte
		descriptors int
		err         error
	}
	got := make(chan result, 1)
	go func() {
		b, n, err := answers(ours)
		got <- result{b, n, err}
	}()
	ended := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.ended[0]
	}
	rest := stream
	for i := 0; len(rest) > 0; i++ {
		n := min(piece, len(rest))
		if _, err := unix.Write(ours, rest[:n]); err != nil {
			break // ended by what is no request
		}
		rest = rest[n:]
		if i == renew {
			<-s.HandOver()
			s.Close()
			if !ended() {
				s = newInProcess(t)
				if err := s.Add(keeps, ipc.NewConn{ID: 0, Number: 1, Peer: 1, Raw: true}); err != nil {
					t.Fatal(err)
				}
				keeps = -1
			}
		}
	}
	unix.Shutdown(ours, unix.SHUT_WR)
	if keeps >= 0 {
		unix.Close(keeps)
	}
	r := <-got
	<-s.Empty()
	s.Close()
	if r.err != nil {
		t.Fatal(r.err)
	}
	checkAnswers(t, stream, r.stream, r.descriptors)
}

// checkAnswers compares what was asked with what was answered.
func checkAnswers(t *testing.T, asked, answered []byte, descriptors int) {
	for len(asked) >= codec.HeaderSize {
		typ, size, err := codec.ParseHeader(asked)
		if err != nil || len(asked) < codec.HeaderSize+size {
			break
		}
		asked = asked[codec.HeaderSize+size:]
		a, n := codec.ParseAnswer(typ, answered)
		if n <= 0 {
			t.Fatalf("%v is answered by %x", typ, answered[:min(len(answered), 32)])
		}
		if a.Errno >= 4096 {
			t.Fatalf("%v: errno %d", typ, a.Errno)
		}
		if typ.AnswersFD() && a.Errno == 0 {
			descriptors--
		}
		answered = answered[n:]
	}
	if len(answered) > 0 || descriptors != 0 {
		t.Fatalf("%d bytes and %d descriptors beyond the answers", len(answered), descriptors)
	}
}

func openFDs(t *testing.T) int {
	var n int
	for fd := range 256 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			n++
		}
	}
	return n
}

// The collector stops all threads, those in raw system calls, too, again and
// again, on one CPU: nothing may hang.
func TestCollectedGarbage(t *testing.T) {
	helpertest.NeedRoot(t) // for a root directory of its own
	if !ownProcess(t) {
		return
	}
	s := newInProcess(t)
	pinToOneCPU(t)
	request := (&codec.Request{Path: codec.CString("/\x00")}).Append(nil, codec.Lstat)
	var answered atomic.Int64
	var clients sync.WaitGroup
	var stop atomic.Bool
	for id := range uint32(slots) {
		if err := inflight.Clear(host().file, id); err != nil {
			t.Fatal(err)
		}
		ours, theirs := socketPair(t)
		tv := unix.NsecToTimeval(patience.Nanoseconds())
		if err := unix.SetsockoptTimeval(ours, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			t.Fatal(err)
		}
		if err := s.Add(theirs, ipc.NewConn{ID: id, Number: uint64(id), Peer: uint64(id), Raw: true}); err != nil {
			t.Fatal(err)
		}
		clients.Go(func() {
			defer unix.Close(ours)
			for b := make([]byte, codec.HeaderSize+codec.StatSize); !stop.Load(); answered.Add(1) {
				if _, err := unix.Write(ours, request); err != nil {
					t.Error(err)
					return
				}
				for n := 0; n < len(b); {
					m, err := unix.Read(ours, b[n:])
					if err == unix.EINTR {
						continue
					}
					if err != nil || m == 0 {
						t.Errorf("no answer: %d, %v", m, err)
						return
					}
					n += m
				}
				if size := binary.NativeEndian.Uint32(b[4:]); size != codec.StatSize {
					t.Errorf("answer %x", b)
					return
				}
				if id%2 == 0 { // longer than a connection sleeps, shorter than it dozes
					time.Sleep(25 * time.Millisecond)
				}
			}
		})
	}
	for range 5 {
		before := answered.Load()
		runtime.GC()
		for end := time.Now().Add(patience); answered.Load() < before+slots; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("nothing is answered any more")
			}
		}
	}
	stop.Store(true)
	clients.Wait()
	<-s.Empty()
	s.Close()
}

// A client passes a descriptor whose last close waits: that of a TCP connection
// with unsent bytes and SO_LINGER. The kernel drops it in the call that receives.
// Where that can't be forbidden the connection's own thread waits there, and
// nobody else, not even when the world is stopped.
func TestPassedDescriptorWaits(t *testing.T) {
	helpertest.NeedRoot(t)
	if !ownProcess(t) {
		return
	}
	s := newInProcess(t)
	add := func(id uint32, raw bool) (client int) {
		if err := inflight.Clear(host().file, id); err != nil {
			t.Fatal(err)
		}
		ours, theirs := socketPair(t)
		if err := s.Add(theirs, ipc.NewConn{ID: id, Number: uint64(id), Peer: uint64(id), Raw: raw}); err != nil {
			t.Fatal(err)
		}
		return ours
	}
	hostile, other := add(0, false), add(1, true)
	lingering, peer := lingeringSocket(t)
	request := (&codec.Request{Path: codec.CString("/\x00")}).Append(nil, codec.Lstat)
	if err := unix.Sendmsg(hostile, request[:1], unix.UnixRights(lingering), nil, 0); err != nil {
		t.Fatal(err)
	}
	go unix.Close(lingering) // it waits if the server has dropped its own already
	answer := make([]byte, codec.HeaderSize+codec.StatSize)
	for range 20 {
		if _, err := unix.Write(other, request); err != nil {
			t.Fatal(err)
		}
		readAll(t, other, answer)
		runtime.GC()
	}
	unix.Close(peer) // which resets the connection, and ends the wait
	if _, err := unix.Write(hostile, request[1:]); err != nil {
		t.Fatal(err)
	}
	readAll(t, hostile, answer)
	unix.Close(hostile)
	unix.Close(other)
	<-s.Empty()
	s.Close()
}

// What a worker has to receive itself is received, even where it may not wait: each
// request comes after a pause, and there is one worker for all.
func TestReceivedByWorker(t *testing.T) {
	helpertest.NeedRoot(t)
	if !ownProcess(t) {
		return
	}
	s := newInProcessOf(t, 1)
	request := (&codec.Request{Path: codec.CString("/\x00")}).Append(nil, codec.Lstat)
	var clients []int
	for id := range uint32(3) {
		if err := inflight.Clear(host().file, id); err != nil {
			t.Fatal(err)
		}
		ours, theirs := socketPair(t)
		if err := s.Add(theirs, ipc.NewConn{ID: id, Number: uint64(id), Peer: 1}); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, ours)
	}
	answer := make([]byte, codec.HeaderSize+codec.StatSize)
	for range 5 {
		for _, client := range clients {
			if _, err := unix.Write(client, request); err != nil {
				t.Fatal(err)
			}
			readAll(t, client, answer)
		}
		time.Sleep(25 * time.Millisecond) // longer than a worker blocks
	}
	for _, client := range clients {
		unix.Close(client)
	}
	<-s.Empty()
	s.Close()
}

// readAll fills b from a socket within patience.
func readAll(t *testing.T, fd int, b []byte) {
	t.Helper()
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(b); {
		m, err := unix.Read(fd, b[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || m == 0 {
			t.Fatalf("no answer: %d, %v", m, err)
		}
		n += m
	}
}

// lingeringSocket returns a socket whose last close waits until peer, the other
// end of its connection, is closed.
func lingeringSocket(t *testing.T) (fd, peer int) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(err)
	defer unix.Close(listener)
	check(unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	check(unix.Listen(listener, 1))
	address, err := unix.Getsockname(listener)
	check(err)
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(err)
	check(unix.Connect(fd, address))
	peer, _, err = unix.Accept4(listener, unix.SOCK_CLOEXEC)
	check(err)
	check(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 600}))
	check(unix.SetNonblock(fd, true))
	for err == nil { // until nothing more fits
		_, err = unix.Write(fd, make([]byte, 1<<16))
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	check(unix.SetNonblock(fd, false)) // else close does not wait
	return fd, peer
}

// pinToOneCPU lets all threads of the process, and those to come, share a CPU
// until the test ends.
func pinToOneCPU(t *testing.T) {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	pin := func(cpus *unix.CPUSet) {
		host().threads.Seek(0, io.SeekStart)
		names, err := host().threads.Readdirnames(-1)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			tid, _ := strconv.Atoi(name)
			if err := unix.SchedSetaffinity(tid, cpus); err != nil && err != unix.ESRCH {
				t.Fatal(err)
			}
		}
	}
	pin(&one)
	t.Cleanup(func() { pin(&all) })
}

// ownProcessEnv marks the process that ownProcess starts.
const ownProcessEnv = "VIRTFS_TEST_OWN_PROCESS"

// ownProcess runs the calling test again in a process of its own, which may
// change its root, and returns true there. In the process that
// other tests run in, too, it reports what came of that, and returns false.
func ownProcess(tb testing.TB) bool {
	tb.Helper()
	if os.Getenv(ownProcessEnv) != "" {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+tb.Name()+"$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), ownProcessEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+tb.Name()) {
		tb.Errorf("in a process of its own: %v\n%s", err, out)
	}
	return false
}

// fuzzing tells that this process is the fuzzer or one of its workers.
func fuzzing() bool {
	pattern, worker := flag.Lookup("test.fuzz"), flag.Lookup("test.fuzzworker")
	return pattern.Value.String() != "" || worker.Value.String() == "true"
}

package pool_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/bench/slowfs"
	"virtfs-proxy-helper/codec"
)

func TestMain(m *testing.M) { helpertest.Main(m) }

func frame(t codec.Type, path string) []byte {
	q := codec.Request{Path: helpertest.Path(path)}
	return q.Append(nil, t)
}

// export has three files, told apart by their modes.
func export(t *testing.T) string {
	dir := t.TempDir()
	fill(t, dir)
	return dir
}

func fill(t *testing.T, dir string) {
	t.Helper()
	for i, name := range []string{"a", "b", "c"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, os.FileMode(0o600+i)); err != nil {
			t.Fatal(err)
		}
	}
}

// fillStuck is a fill that mounts a file system which does not answer on /stuck.
func fillStuck(fs **slowfs.FS) func(t *testing.T, export string) {
	return func(t *testing.T, export string) {
		t.Helper()
		fill(t, export)
		dir := filepath.Join(export, "stuck")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if *fs, err = slowfs.Mount(dir, t.TempDir(), slowfs.Options{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*fs).Close() })
		(*fs).Hold(slowfs.Lookups)
	}
}

// Answers come in the order of the requests, descriptors among them.
func TestPipelined(t *testing.T) {
	_, c := helpertest.Pair(t, helpertest.Ours(t), export(t))
	var all []byte
	types := []codec.Type{codec.Lstat, codec.Open, codec.Remove, codec.Open}
	paths := []string{"/a", "/b", "/none", "/nor this"}
	for range 250 {
		for i := range types {
			all = append(all, frame(types[i], paths[i])...)
		}
	}
	go c.TrySend(all)
	for i := range 250 {
		a, f := c.Read(codec.Lstat), c.Read(codec.Open)
		if mode := a.Payload[24]; a.Errno != 0 || mode != 0o600&0xff {
			t.Fatalf("round %d: %v, mode %o", i, a.Errno, mode)
		}
		if f.Errno != 0 || f.File == nil {
			t.Fatalf("round %d: no descriptor: %v", i, f.Errno)
		}
		f.File.Close()
		if e1, e2 := c.Read(codec.Remove).Errno, c.Read(codec.Open).Errno; e1 != unix.ENOENT || e2 != unix.ENOENT {
			t.Fatalf("round %d: %v, %v", i, e1, e2)
		}
	}
}

// A frame may come in any pieces.
func TestPieces(t *testing.T) {
	_, c := helpertest.Pair(t, helpertest.Ours(t), export(t))
	b := append(frame(codec.Lstat, "/a"), frame(codec.Open, "/b")...)
	for cut := 1; cut < len(b); cut++ {
		c.Send(b[:cut])
		time.Sleep(200 * time.Microsecond) // mostly enough for the helper to see a piece
		c.Send(b[cut:])
		if a, f := c.Read(codec.Lstat), c.Read(codec.Open); a.Errno != 0 || f.Errno != 0 {
			t.Fatalf("cut at %d: %v, %v", cut, a.Errno, f.Errno)
		} else {
			f.File.Close()
		}
	}
}

// What is no request ends the connection, after the answers before it.
func TestNotTheProtocol(t *testing.T) {
	_, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	for _, header := range []string{
		"\x00\x00\x00\x00\x00\x00\x00\x00", "\x16\x00\x00\x00\x00\x00\x00\x00",
		"\x08\x00\x00\x00\x01\x00\x01\x00", "\xff\xff\xff\xff\xff\xff\xff\xff",
	} {
		c := helpertest.Dial(t, name)
		c.Send(append(frame(codec.Lstat, "/a"), header...))
		if a := c.Read(codec.Lstat); a.Errno != 0 {
			t.Errorf("%q: the request before: %v", header, a.Errno)
		}
		c.WantEOF()
		c.Close()
	}
}

// A client that does not read, and one that sends half of the largest frame,
// hold bounded memory, and lose nothing.
func TestBoundedMemory(t *testing.T) {
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	helpertest.Dial(t, name).Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	before := helpertest.RSS(t, p.Server())
	const requests, clients = 50_000, 50
	deaf := helpertest.Dial(t, name)
	sent := make(chan error, 1)
	go func() {
		var all []byte
		for range requests {
			all = append(all, frame(codec.Lstat, "/a")...)
		}
		sent <- deaf.TrySend(all)
	}()
	for range clients {
		c := helpertest.Dial(t, name)
		c.Send(append([]byte("\x08\x00\x00\x00\x00\x00\x01\x00"), make([]byte, 40_000)...))
		defer c.Close()
	}
	helpertest.Dial(t, name).Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	if grown := helpertest.RSS(t, p.Server()) - before; grown > helpertest.MemoryFactor*(clients+1)*(256<<10) {
		t.Errorf("the server grew by %d KiB", grown>>10)
	}
	for i := range requests {
		if a := deaf.Read(codec.Lstat); a.Errno != 0 {
			t.Fatalf("answer %d: %v", i, a.Errno)
		}
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// 10,000 connections leave nothing behind.
func TestManyConnections(t *testing.T) {
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t), "--log-level=warn")
	round := func(n int) {
		for range n {
			c := helpertest.Dial(t, name)
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			c.Close()
		}
	}
	round(500)
	server := p.Server()
	fds, threads, rss := len(helpertest.FDs(t, server)), len(helpertest.Threads(t, server)), helpertest.RSS(t, server)
	many := 10_000
	if testing.Short() {
		many = 1000
	}
	round(many)
	helpertest.Eventually(t, "descriptors as before", func() bool { return len(helpertest.FDs(t, server)) <= fds+8 })
	if n := len(helpertest.Threads(t, server)); n > threads+16 {
		t.Errorf("%d threads, were %d", n, threads)
	}
	if n := helpertest.RSS(t, server); n > rss+helpertest.MemoryFactor*(8<<20) {
		t.Errorf("%d KiB, were %d", n>>10, rss>>10)
	}
}

// mountHang mounts a FUSE file system that does not answer, until release.
func mountHang(t *testing.T, dir string) (release func()) {
	t.Helper()
	helpertest.NeedFUSE(t)
	fs, err := slowfs.Mount(dir, t.TempDir(), slowfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fs.Close() })
	fs.Hold(slowfs.Lookups)
	return fs.Release
}

// A request that hangs, hangs alone; once all workers hang that a peer may have, its
// others wait, and go on afterwards.
func TestStuckRequest(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		var fs *slowfs.FS
		h := way.Start(t, helpertest.Setup{Fill: fillStuck(&fs), Args: []string{"--workers=4"}})
		before := h.Dial()
		first, second := h.Dial(), h.Dial()
		first.Send(frame(codec.Lstat, "/stuck/x"))
		for range 200 {
			before.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			c := h.Dial()
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
			c.Close()
		}
		second.Send(frame(codec.Lstat, "/stuck/y"))
		helpertest.Eventually(t, "both hang", func() bool { return fs.Waiting() == 2 })
		waiting := h.Dial()
		waiting.Send(frame(codec.Lstat, "/a"))
		fs.Release()
		for _, c := range []*helpertest.Client{first, second} {
			if a := c.Read(codec.Lstat); a.Errno == 0 {
				t.Error("the hanging file system has answered")
			}
		}
		if a := waiting.Read(codec.Lstat); a.Errno != 0 {
			t.Error(a.Errno)
		}
	})
}

// More connections ask all the time than there are workers for their peer, some of them for what
// hangs: all the others are served, by the first server and by those after it.
func TestMoreThanWorkers(t *testing.T) {
	const clients, hanging = 48, 4
	dir := export(t)
	stuck := filepath.Join(dir, "stuck")
	if err := os.Mkdir(stuck, 0o755); err != nil {
		t.Fatal(err)
	}
	release := mountHang(t, stuck)
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir, "--workers=24")
	var asking sync.WaitGroup
	done := make(chan struct{})
	var served [clients]atomic.Uint64
	for i := range clients {
		c := helpertest.Dial(t, name)
		asking.Go(func() {
			for n := 0; ; n++ {
				q := codec.Request{Path: helpertest.Path([]string{"/a", "/b", "/none"}[n%3])}
				if i < hanging && n == 500 {
					q.Path = helpertest.Path("/stuck/x")
				}
				a, err := c.TryDo(codec.Lstat, q)
				if err != nil {
					t.Errorf("client %d, request %d: %v", i, n, err)
					return
				}
				if right := a.Errno == 0; right != (n%3 != 2) && !(i < hanging && n == 500) {
					t.Errorf("client %d, request %d: %v", i, n, a.Errno)
				}
				served[i].Add(1)
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	all := func(what string, first int) {
		t.Helper()
		var from [clients]uint64
		for i := range served {
			from[i] = served[i].Load()
		}
		helpertest.Eventually(t, what, func() bool {
			for i := first; i < clients; i++ {
				if served[i].Load() < from[i]+300 {
					return false
				}
			}
			return true
		})
	}
	helpertest.Eventually(t, "some hang", func() bool {
		for i := range hanging {
			if served[i].Load() != 500 {
				return false
			}
		}
		return true
	})
	all("the others go on", hanging)
	t.Logf("%d threads", len(helpertest.Threads(t, p.Server())))
	unix.Kill(p.PID, unix.SIGHUP)
	all("they go on with another server", hanging)
	release()
	all("all go on", 0)
	unix.Kill(p.Server(), unix.SIGKILL)
	all("all go on with a third", 0)
	close(done)
	asking.Wait()
}

// After SIGTERM each request that could be sent is answered, OPENs with their
// descriptor: QEMU mistakes an end of file for one. Some send it twice, and
// some to all processes.
func TestTerminate(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		sent := make(chan int)
		go func() {
			n := 0
			for c.TrySend(frame(codec.Open, "/a")) == nil {
				n++
			}
			sent <- n
		}()
		answered := 0
		for ; ; answered++ {
			if answered == 100 {
				syscall.Kill(h.Server(), syscall.SIGTERM)
				h.Signal(syscall.SIGTERM)
				h.Signal(syscall.SIGTERM)
			}
			a, err := c.TryRead(codec.Open)
			if err != nil {
				break
			}
			if a.Errno != 0 {
				t.Fatal(a.Errno)
			}
			a.File.Close()
		}
		if n := <-sent; n != answered {
			t.Errorf("%d requests sent, %d answered", n, answered)
		}
		if status := h.Wait(); status != 0 {
			t.Errorf("status %d\n%s", status, h.Output())
		}
		if entries, err := os.ReadDir(h.Dir); err != nil || len(entries) != 1 {
			t.Errorf("names and pidfile are still there: %v, %v", entries, err)
		}
	})
}

// The helper leaves with its last client if told so, and always with --fd.
func TestOnce(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		var once []string
		if !way.FD {
			once = []string{"--once"}
		}
		h := way.Start(t, helpertest.Setup{Fill: fill, Args: once})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		c.Close()
		if status := h.Wait(); status != 0 {
			t.Errorf("status %d\n%s", status, h.Output())
		}
	})
}

// Without a supervisor the server goes on for the clients that it has.
func TestKilledSupervisor(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		server := h.Server()
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		helpertest.Eventually(t, "the server listens to its supervisor", func() bool {
			waits, _ := threads(server)
			return waits
		})
		h.Signal(syscall.SIGKILL)
		h.Wait()
		rests := 0
		helpertest.Eventually(t, "the server has noticed, and rests", func() bool {
			if waits, runs := threads(server); waits || runs {
				rests = 0
			} else {
				rests++
			}
			return rests == 3 // its work may change threads while they are looked at
		})
		for range 100 {
			a, err := c.TryDo(codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			if err != nil || a.Errno != 0 {
				t.Fatalf("the VM is lost with the supervisor: %v, %v", err, a.Errno)
			}
		}
		c.Close()
		helpertest.Eventually(t, "the server leaves with its last client", func() bool {
			return helpertest.Ended(server)
		})
	})
}

// threads tells that a thread of a server waits for a message of its supervisor,
// and that one runs.
func threads(server int) (waits, runs bool) {
	const control = 3 // the socket between the two
	for _, call := range helpertest.Syscalls(server) {
		waits = waits || strings.HasPrefix(call, fmt.Sprintf("%d %#x ", unix.SYS_RECVMSG, control))
		runs = runs || call == "running"
	}
	return waits, runs
}

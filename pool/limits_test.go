package pool_test

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// limitFDs lets a process of a helper have at most n descriptors, until the
// function it returns is called. Without CAP_SYS_RESOURCE, which a container's
// root does not have, only its own user may do that.
func limitFDs(t *testing.T, h *helpertest.Helper, pid, n int) (lift func()) {
	t.Helper()
	id := uint32(h.Way.UID())
	prlimit := func(args ...string) string {
		t.Helper()
		status, output := helpertest.Run(t, helpertest.Command{
			Path: "prlimit",
			Args: append([]string{"--pid", strconv.Itoa(pid)}, args...),
			Cred: &syscall.Credential{Uid: id, Gid: id},
		})
		if status != 0 {
			t.Fatalf("prlimit %q: status %d, %s", args, status, output)
		}
		return strings.TrimSpace(output)
	}
	old := prlimit("--nofile", "--output=SOFT", "--noheadings")
	prlimit(fmt.Sprintf("--nofile=%d:", n))
	return func() { prlimit("--nofile=" + old + ":") }
}

// CVE-2020-10717: a guest that makes the helper run out of descriptors. The
// request that needs one is answered with EMFILE, others are served; a client
// that comes meanwhile waits, without a busy loop, and is served afterwards.
func TestCVE2020_10717_OutOfDescriptors(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		for _, process := range []struct {
			what string
			pid  int
		}{{"server", h.Server()}, {"supervisor", h.PID}} {
			lift := limitFDs(t, h, process.pid, 4)
			if process.what == "server" {
				for range 100 {
					c.Want(unix.EMFILE, codec.Open, codec.Request{Path: helpertest.Path("/a")})
					c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
				}
			}
			late := h.Dial()
			late.Send(frame(codec.Lstat, "/b"))
			before := helpertest.CPU(t, h.PID) + helpertest.CPU(t, h.Server())
			time.Sleep(500 * time.Millisecond)
			if used := helpertest.CPU(t, h.PID) + helpertest.CPU(t, h.Server()) - before; used > 250*time.Millisecond {
				t.Errorf("%s without descriptors: %v of CPU in half a second of waiting", process.what, used)
			}
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			lift()
			if a := late.Read(codec.Lstat); a.Errno != 0 {
				t.Error(a.Errno)
			}
			late.Close()
			if a := c.Want(0, codec.Open, codec.Request{Path: helpertest.Path("/a")}); a.File != nil {
				a.File.Close()
			}
		}
	})
}

// Beyond --max-connections clients wait until one leaves.
func TestMaxConnections(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill, Args: []string{"--max-connections=2"}})
		first, second := h.Dial(), h.Dial()
		for _, c := range []*helpertest.Client{first, second} {
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		}
		third := h.Dial()
		third.Send(frame(codec.Lstat, "/a"))
		if err := third.Silent(100 * time.Millisecond); err != nil {
			t.Errorf("a third client is served: %v", err)
		}
		second.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
		first.Close()
		if a := third.Read(codec.Lstat); a.Errno != 0 {
			t.Error(a.Errno)
		}
	})
}

// A client that pipelines as fast as it can gets its share, not that of one
// that asks one thing at a time: with a single worker both are served in turn.
func TestFairness(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill, Args: []string{"--workers=1"}})
		greedy, quiet := h.Dial(), h.Dial()
		// A turn serves up to 4096 bytes, which are 300 of these requests, and a loaded
		// machine may have the greedy one's turns follow each other for some time.
		const requests, others = 1_000_000, 100
		go func() {
			var all []byte
			for range 1000 {
				all = append(all, frame(codec.Lstat, "/a")...)
			}
			for range requests / 1000 {
				if greedy.TrySend(all) != nil {
					return
				}
			}
		}()
		answered := make(chan int, 1)
		stop := make(chan struct{})
		go func() {
			n := 0
			for ; ; n++ {
				select {
				case <-stop:
					answered <- n
					return
				default:
				}
				if _, err := greedy.TryRead(codec.Lstat); err != nil {
					answered <- n
					return
				}
			}
		}()
		for range others {
			quiet.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
		}
		close(stop)
		if n := <-answered; n >= requests {
			t.Errorf("all %d requests of the greedy client came before %d of the other", n, others)
		}
	})
}

// A client that reads none of its answers has only a few descriptors under way: the
// kernel counts them for all helpers of a user.
func TestUnreadDescriptors(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		var all []byte
		const asked = 500
		for range asked {
			all = append(all, frame(codec.Open, "/a")...)
		}
		c.Send(all)
		const size = 4 // of an answer
		helpertest.Eventually(t, "the server waits for the client", func() bool {
			n := c.Unread(t)
			time.Sleep(50 * time.Millisecond)
			return n > 0 && n == c.Unread(t)
		})
		if n := c.Unread(t) / size; n > 8 {
			t.Errorf("%d descriptors that nobody has read", n)
		}
		for i := range asked {
			a := c.Read(codec.Open)
			if a.Errno != 0 || a.File == nil {
				t.Fatalf("answer %d: %v", i, a.Errno)
			}
			a.File.Close()
		}
	})
}

// Answers that nobody reads hold no thread, and no worker.
func TestDeafClients(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill, Args: []string{"--workers=4"}})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		threads := len(helpertest.Threads(t, h.Server()))
		var all []byte
		for range 50 {
			all = append(all, frame(codec.Lstat, "/a")...)
		}
		var deaf []*helpertest.Client
		for range 100 {
			d := h.Dial()
			d.Send(all)
			deaf = append(deaf, d)
		}
		for _, d := range deaf {
			helpertest.Eventually(t, "it has answers", func() bool { return d.Unread(t) > 0 })
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		}
		if n := len(helpertest.Threads(t, h.Server())); n > threads+20 {
			t.Errorf("%d threads, were %d", n, threads)
		}
		for _, d := range deaf {
			for range 50 {
				if a := d.Read(codec.Lstat); a.Errno != 0 {
					t.Fatal(a.Errno)
				}
			}
		}
	})
}

// What does not fit into a small send buffer comes whole, and so does what is
// behind it.
func TestLongAnswers(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		target := strings.Repeat("x", 4000)
		c.Want(0, codec.Symlink, codec.Request{Path: helpertest.Path("/long"), Target: helpertest.Path(target)})
		q := codec.Request{Path: helpertest.Path("/long"), Size: 5000}
		var all []byte
		const asked = 100
		for range asked {
			all = append(q.Append(all, codec.Readlink), frame(codec.Open, "/a")...)
		}
		c.Send(all)
		for i := range asked {
			if a := c.Read(codec.Readlink); a.Errno != 0 || len(a.Payload) != 2+len(target) {
				t.Fatalf("round %d: %v, %d bytes", i, a.Errno, len(a.Payload))
			}
			a := c.Read(codec.Open)
			if a.Errno != 0 {
				t.Fatalf("round %d: %v", i, a.Errno)
			}
			a.File.Close()
		}
	})
}

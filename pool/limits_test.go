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

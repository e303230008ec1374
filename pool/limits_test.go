package pool_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// limitFDs lets a process have at most n descriptors, until the function it
// returns is called.
func limitFDs(t *testing.T, pid, n int) (lift func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(n), Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil); err != nil {
			t.Error(err)
		}
	}
}

// CVE-2020-10717: a guest that makes the helper run out of descriptors. The
// request that needs one is answered with EMFILE, others are served; a client
// that comes meanwhile waits, without a busy loop, and is served afterwards.
func TestCVE2020_10717_OutOfDescriptors(t *testing.T) {
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	for _, process := range []struct {
		what string
		pid  int
	}{{"server", p.Server()}, {"supervisor", p.PID}} {
		lift := limitFDs(t, process.pid, 4)
		if process.what == "server" {
			for range 100 {
				c.Want(unix.EMFILE, codec.Open, codec.Request{Path: helpertest.Path("/a")})
				c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			}
		}
		late := helpertest.Dial(t, name)
		late.Send(frame(codec.Lstat, "/b"))
		before := helpertest.CPU(t, p.PID) + helpertest.CPU(t, p.Server())
		time.Sleep(500 * time.Millisecond)
		if used := helpertest.CPU(t, p.PID) + helpertest.CPU(t, p.Server()) - before; used > 250*time.Millisecond {
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
}

// Beyond --max-connections clients wait until one leaves.
func TestMaxConnections(t *testing.T) {
	_, name := helpertest.Listen(t, helpertest.Ours(t), export(t), "--max-connections=2")
	first, second := helpertest.Dial(t, name), helpertest.Dial(t, name)
	for _, c := range []*helpertest.Client{first, second} {
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	}
	third := helpertest.Dial(t, name)
	third.Send(frame(codec.Lstat, "/a"))
	if err := third.Silent(100 * time.Millisecond); err != nil {
		t.Errorf("a third client is served: %v", err)
	}
	second.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
	first.Close()
	if a := third.Read(codec.Lstat); a.Errno != 0 {
		t.Error(a.Errno)
	}
}

// A client that pipelines as fast as it can gets its share, not that of one
// that asks one thing at a time: with a single worker both are served in turn.
func TestFairness(t *testing.T) {
	_, name := helpertest.Listen(t, helpertest.Ours(t), export(t), "--workers=1")
	greedy, quiet := helpertest.Dial(t, name), helpertest.Dial(t, name)
	const requests = 200_000
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
	for range 1000 {
		quiet.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
	}
	close(stop)
	if n := <-answered; n >= requests {
		t.Errorf("all %d requests of the greedy client came before 1000 of the other", n)
	}
}

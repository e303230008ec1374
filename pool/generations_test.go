package pool_test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/bench/slowfs"
	"virtfs-proxy-helper/codec"
)

// deaf is a client that asks more than its answers have room for, and does not
// read them. It returns how many answers it is owed, when the server waits.
func deaf(t *testing.T, c *helpertest.Client) (owed int) {
	t.Helper()
	var all []byte
	for range 2000 {
		all = append(all, frame(codec.Lstat, "/a")...)
	}
	c.Send(all)
	helpertest.Eventually(t, "the server waits for the client", func() bool {
		n := c.Unread(t)
		time.Sleep(50 * time.Millisecond)
		return n > 0 && n == c.Unread(t)
	})
	return 2000
}

// A client that does not read its answers keeps no server: the next one sends the
// rest of them.
func TestRenewedWhileDeaf(t *testing.T) {
	helpertest.EachWay(t, fourWays, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		owed := deaf(t, c)
		for range 2 {
			old := h.Server()
			unix.Kill(h.PID, unix.SIGHUP)
			if !way.FD { // the others are served at once
				h.Dial().Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			}
			helpertest.Eventually(t, "the old server is gone", func() bool {
				pids := helpertest.Children(h.PID)
				return len(pids) == 1 && pids[0] != old
			})
		}
		if h.Logged("killing the old server") {
			t.Errorf("an old server did not leave by itself:\n%s", h.Output())
		}
		for range owed {
			if a := c.Read(codec.Lstat); a.Errno != 0 {
				t.Fatal(a.Errno)
			}
		}
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
	})
}

// fourWays leaves out most ways for tests that take long.
func fourWays(w helpertest.Way) (reason string) {
	if w.Sandbox != "namespace" || w.Foreground == w.Rootless {
		return "what is tested does not depend on it, and takes long"
	}
	return ""
}

// An old server that does nothing at all is killed, and the new one goes on with
// its clients.
func TestRenewedWhileStopped(t *testing.T) {
	t.Parallel()
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	old := p.Server()
	unix.Kill(old, unix.SIGSTOP)
	unix.Kill(p.PID, unix.SIGHUP)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	helpertest.Eventually(t, "the old server is gone", func() bool {
		pids := helpertest.Children(p.PID)
		return len(pids) == 1 && pids[0] != old
	})
}

// Stopping is no failure where a client does not take its answers.
func TestStoppedWhileDeaf(t *testing.T) {
	t.Parallel()
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	c := helpertest.Dial(t, name)
	deaf(t, c)
	other := helpertest.Dial(t, name)
	other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	p.Signal(syscall.SIGTERM)
	if status := p.Wait(); status != 0 {
		t.Errorf("status %d\n%s", status, p.Output())
	}
	if !p.Logged("connections that were not answered") {
		t.Errorf("it is not logged:\n%s", p.Output())
	}
	other.WantEOF()
	c.Read(codec.Lstat) // what was sent is there
}

// A server that lives but does not serve is replaced.
func TestStoppedServer(t *testing.T) {
	helpertest.EachWay(t, fourWays, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		old := h.Server()
		unix.Kill(old, unix.SIGSTOP)
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		helpertest.Eventually(t, "it is logged", func() bool { return h.Logged("its loop does not move") })
		helpertest.Eventually(t, "the server is replaced", func() bool {
			servers := h.Servers()
			return len(servers) == 1 && servers[0] != old
		})
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
	})
}

// Time in which the supervisor does not run does not count against the server:
// both are stopped with a machine, a container, a debugger.
func TestSuspended(t *testing.T) {
	t.Parallel()
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	for _, first := range []bool{true, false} { // the server is stopped first, or not at all
		// How long the supervisor runs while the server is stopped is up to the
		// machine: too long proves nothing.
		helpertest.Eventually(t, "the supervisor runs shortly", func() bool {
			server, ran := p.Server(), time.Duration(0)
			began := time.Now()
			if first {
				unix.Kill(server, unix.SIGSTOP)
				time.Sleep(quietTime + 1500*time.Millisecond) // it is asked, in vain
			}
			unix.Kill(p.PID, unix.SIGSTOP)
			ran += time.Since(began)
			time.Sleep(stuckTime + 2*time.Second)
			began = time.Now()
			unix.Kill(p.PID, unix.SIGCONT)
			time.Sleep(500 * time.Millisecond)
			unix.Kill(server, unix.SIGCONT)
			ran += time.Since(began)
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			helpertest.Dial(t, name).Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
			if ran > stuckTime {
				return false
			}
			if p.Server() != server {
				t.Fatalf("the server is replaced, stopped: %v\n%s", first, p.Output())
			}
			return true
		})
	}
}

// stuckTime is how long the loop of a server that is replaced has not moved.
// quietTime is how long it may take until a loop is asked to.
const (
	stuckTime = 10 * time.Second
	quietTime = 5 * time.Second
)

// A request that a file system does not answer is logged, and again when it is
// answered. Its server stays: it serves the others.
func TestLateRequest(t *testing.T) {
	helpertest.NeedRoot(t)
	t.Parallel()
	var fs *slowfs.FS
	dir := t.TempDir()
	fillStuck(&fs)(t, dir)
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir)
	other, c := helpertest.Dial(t, name), helpertest.Dial(t, name)
	other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	server := p.Server()
	c.Send(frame(codec.Mkdir, "/stuck/x"))
	helpertest.Eventually(t, "the request is logged", func() bool { return p.Logged("a request is late") })
	const says = "connection=2 request=MKDIR age="
	if !p.Logged(says) || p.Logged("is answered") {
		t.Errorf("no %q, or too much:\n%s", says, p.Output())
	}
	time.Sleep(stuckTime)
	other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	if p.Server() != server {
		t.Errorf("the server is replaced\n%s", p.Output())
	}
	fs.Release()
	c.Read(codec.Mkdir)
	helpertest.Eventually(t, "the answer is logged", func() bool { return p.Logged("a late request is answered") })
	if n := strings.Count(p.Output(), says); n != 2 {
		t.Errorf("%d lines\n%s", n, p.Output())
	}
}

// A client that does not read its answer is told apart from that.
func TestDeafClient(t *testing.T) {
	t.Parallel()
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	c := helpertest.Dial(t, name)
	owed := deaf(t, c)
	helpertest.Eventually(t, "it is logged", func() bool { return p.Logged("a client does not read its answer") })
	if p.Logged("a request is late") {
		t.Errorf("the request is late, too:\n%s", p.Output())
	}
	for range owed {
		c.Read(codec.Lstat)
	}
	helpertest.Eventually(t, "the end is logged", func() bool { return p.Logged("a late request is answered") })
}

// An old server that is killed while a file system holds a request of it is not
// waited for.
func TestRenewedWhileHeld(t *testing.T) {
	helpertest.NeedRoot(t)
	t.Parallel()
	var fs *slowfs.FS
	dir := t.TempDir()
	fillStuck(&fs)(t, dir)
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir)
	c := helpertest.Dial(t, name)
	c.Send(append(frame(codec.Mkdir, "/stuck/x"), frame(codec.Lstat, "/a")...))
	helpertest.Eventually(t, "the request hangs", func() bool { return fs.Waiting() == 1 })
	unix.Kill(p.PID, unix.SIGHUP)
	// The request is not done twice, as it changes something.
	if a := c.Read(codec.Mkdir); a.Errno != unix.EIO {
		t.Errorf("%v, want EIO", a.Errno)
	}
	if a := c.Read(codec.Lstat); a.Errno != 0 {
		t.Error(a.Errno)
	}
	fs.Release()
	helpertest.Eventually(t, "one server", func() bool { return len(helpertest.Children(p.PID)) == 1 })
}

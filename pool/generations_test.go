package pool_test

import (
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// deaf is a client that asks more than its answers have room for, and does not
// read them. It returns how many answers it is owed, when the server waits.
func deaf(t *testing.T, name string) (c *helpertest.Client, owed int) {
	t.Helper()
	c = helpertest.Dial(t, name)
	var all []byte
	for range 2000 {
		all = append(all, frame(codec.Lstat, "/a")...)
	}
	c.Send(all)
	// It waits when no more answers come.
	raw, err := c.Conn().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	before := -1
	helpertest.Eventually(t, "the server waits for the client", func() bool {
		n := 0
		raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
		was := before
		before = n
		unix.Nanosleep(&unix.Timespec{Nsec: 5e7}, nil)
		return err == nil && n > 0 && n == was
	})
	return c, 2000
}

// An old server that a client keeps is killed, and the new one goes on with that
// client.
func TestRenewedWhileDeaf(t *testing.T) {
	t.Parallel()
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	other := helpertest.Dial(t, name)
	c, owed := deaf(t, name)
	old := p.Server()
	unix.Kill(p.PID, unix.SIGHUP)
	helpertest.Eventually(t, "the old server is gone", func() bool {
		pids := helpertest.Children(p.PID)
		return len(pids) == 1 && pids[0] != old
	})
	if !p.Logged("killing the old server") {
		t.Errorf("it is not logged:\n%s", p.Output())
	}
	other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	for range owed {
		if a := c.Read(codec.Lstat); a.Errno != 0 {
			t.Fatal(a.Errno)
		}
	}
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
}

// So is one that does nothing at all.
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
	c, _ := deaf(t, name)
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

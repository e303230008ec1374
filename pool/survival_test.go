package pool_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
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

// disturb does something to the server again and again until the test ends,
// and returns how often it has done so.
func disturb(t *testing.T, what func(), every time.Duration) (count *atomic.Int32, end func()) {
	var n atomic.Int32
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(every):
				what()
				n.Add(1)
			}
		}
	}()
	end = sync.OnceFunc(func() {
		close(stop)
		<-stopped
	})
	t.Cleanup(end)
	return &n, end
}

// killer kills the server that a supervisor has now, if it has one.
func killer(p *helpertest.Process) func() {
	return func() {
		for _, pid := range helpertest.Children(p.PID) {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// vm is a client that knows what each of its answers has to be.
type vm struct {
	c    *helpertest.Client
	dir  string // its own, as the guest says
	host string // as the host says
	n    int
	eio  int // answers of requests that a server died over
}

// step makes, looks at, opens, renames and removes a file. Each answer is the
// only right one, or EIO where a server may have died over a change; then the
// host tells what has become of it.
func (v *vm) step() error {
	v.n++
	name := fmt.Sprintf("%s/file%d", v.dir, v.n)
	path, other := helpertest.Path(name), helpertest.Path(name+"-renamed")
	mode := uint32(0o600 + v.n%0o100)
	try := func(t codec.Type, q codec.Request, want unix.Errno) (helpertest.Answer, error) {
		a, err := v.c.TryDo(t, q)
		switch {
		case err != nil:
			return a, fmt.Errorf("%v %s: %w", t, q.Path.Text(), err)
		case a.Errno == unix.EIO && want == 0:
			v.eio++
		case a.Errno != want:
			return a, fmt.Errorf("%v %s: %v, want %v", t, q.Path.Text(), a.Errno, want)
		}
		return a, nil
	}
	exists := func(suffix string) bool {
		_, err := os.Lstat(filepath.Join(v.host, fmt.Sprintf("file%d%s", v.n, suffix)))
		return err == nil
	}
	a, err := try(codec.Create, codec.Request{Path: path, Flags: unix.O_RDWR | unix.O_CREAT | unix.O_EXCL, Mode: mode}, 0)
	if err != nil {
		return err
	}
	if a.Errno != 0 {
		if !exists("") {
			return nil
		}
	} else if _, err := fmt.Fprint(a.File, v.n); err != nil {
		return err
	} else {
		a.File.Close()
	}
	if a, err = try(codec.Lstat, codec.Request{Path: path}, 0); err != nil {
		return err
	} else if a.Errno != 0 || a.Payload[24] != byte(mode) {
		return fmt.Errorf("LSTAT %s: %v, %x, want mode %o", name, a.Errno, a.Payload, mode)
	}
	if a, err = try(codec.Open, codec.Request{Path: path}, 0); err != nil {
		return err
	} else if a.Errno != 0 {
		return fmt.Errorf("OPEN %s: %w", name, a.Errno)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(a.File.Fd()), &st); err != nil || uint32(st.Mode)&0o777 != mode {
		return fmt.Errorf("OPEN %s: %v, mode %o", name, err, st.Mode)
	}
	a.File.Close()
	if _, err = try(codec.Lstat, codec.Request{Path: helpertest.Path(name + "-none")}, unix.ENOENT); err != nil {
		return err
	}
	if a, err = try(codec.Rename, codec.Request{Path: path, Other: other}, 0); err != nil {
		return err
	}
	last := other
	if !exists("-renamed") {
		if a.Errno == 0 {
			return fmt.Errorf("RENAME %s: answered, not done", name)
		}
		last = path
	}
	if a, err = try(codec.Remove, codec.Request{Path: last}, 0); err != nil {
		return err
	}
	if gone := !exists("") && !exists("-renamed"); a.Errno == 0 && !gone {
		return fmt.Errorf("REMOVE %s: answered, not done", name)
	}
	return nil
}

// run lets VMs work for d and returns how many steps they made, and how many
// answers were EIO.
func run(t *testing.T, name, dir string, vms int, d time.Duration) (steps, eio int) {
	t.Helper()
	all := make(chan error)
	list := make([]*vm, vms)
	for i := range list {
		v := &vm{dir: fmt.Sprintf("//vm%d", i)}
		v.host = filepath.Join(dir, v.dir)
		if err := os.MkdirAll(v.host, 0o755); err != nil {
			t.Fatal(err)
		}
		v.c = helpertest.Dial(t, name)
		list[i] = v
	}
	until := time.Now().Add(d)
	for _, v := range list {
		go func() {
			var err error
			for err == nil && time.Now().Before(until) {
				err = v.step()
			}
			all <- err
		}()
	}
	for range list {
		if err := <-all; err != nil {
			t.Error(err)
		}
	}
	for _, v := range list {
		steps, eio = steps+v.n, eio+v.eio
	}
	return steps, eio
}

// Killed at any moment, the server comes back and no VM notices but by an EIO
// where the last server may have begun a change.
func TestKilledServer(t *testing.T) {
	dir := t.TempDir()
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir)
	kills, _ := disturb(t, killer(p), 700*time.Millisecond)
	steps, eio := run(t, name, dir, 4, 6*time.Second)
	t.Logf("%d kills, %d steps, %d times EIO", kills.Load(), steps, eio)
	if kills.Load() < 4 || steps < 100 {
		t.Errorf("%d kills, %d steps: not much of a test", kills.Load(), steps)
	}
	if eio > 4*int(kills.Load()) {
		t.Errorf("%d times EIO with %d kills: at most one for each VM and kill", eio, kills.Load())
	}
}

// SIGHUP moves all VMs to a new server, and none notices at all.
func TestRenewedServer(t *testing.T) {
	dir := t.TempDir()
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir)
	idle := helpertest.Dial(t, name)
	idle.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
	first := p.Server()
	renewals, end := disturb(t, func() { unix.Kill(p.PID, unix.SIGHUP) }, 300*time.Millisecond)
	steps, eio := run(t, name, dir, 4, 4*time.Second)
	end() // there are two servers at times
	t.Logf("%d renewals, %d steps", renewals.Load(), steps)
	if eio != 0 {
		t.Errorf("%d times EIO", eio)
	}
	if renewals.Load() < 4 || steps < 100 || p.Server() == first {
		t.Errorf("%d renewals, %d steps: not much of a test", renewals.Load(), steps)
	}
	idle.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
}

// helperOfOwn returns a helper that the test may replace on disk.
func helperOfOwn(t *testing.T) string {
	t.Helper()
	program, err := os.ReadFile(helpertest.Ours(t))
	if err != nil {
		t.Fatal(err)
	}
	helper := filepath.Join(t.TempDir(), "helper")
	replace(t, helper, string(program))
	return helper
}

// replace puts another program in the place of one, as an upgrade does.
func replace(t *testing.T, helper, program string) {
	t.Helper()
	next := helper + ".new"
	if err := errors.Join(os.WriteFile(next, []byte(program), 0o755), os.Rename(next, helper)); err != nil {
		t.Fatal(err)
	}
}

// A program on disk that can't serve leaves the old server where it is.
func TestRenewedByNothing(t *testing.T) {
	helper := helperOfOwn(t)
	p, name := helpertest.Listen(t, helper, export(t))
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	server := p.Server()
	replace(t, helper, "#!/bin/false\n")
	unix.Kill(p.PID, unix.SIGHUP)
	helpertest.Eventually(t, "the failure is logged", func() bool { return p.Logged("the new server does not start") })
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	if p.Server() != server {
		t.Error("another server")
	}
	// One that dies is started again from what was running, not from the disk.
	unix.Kill(server, unix.SIGKILL)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
}

// A server that hangs at its start is given up, and does not keep others from
// being started.
func TestRenewedBySilence(t *testing.T) {
	helper := helperOfOwn(t)
	p, name := helpertest.Listen(t, helper, export(t))
	c := helpertest.Dial(t, name)
	server := p.Server()
	replace(t, helper, "#!/bin/sh\nexec sleep 1000\n")
	unix.Kill(p.PID, unix.SIGHUP)
	helpertest.Eventually(t, "two servers", func() bool { return len(helpertest.Children(p.PID)) == 2 })
	unix.Kill(server, unix.SIGKILL)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	if !p.Logged("the new server does not start") {
		t.Error("the failure is not logged")
	}
}

// Requests that came together are answered once each and in order, whenever
// the server dies in between, and so is a frame that had come in part.
func TestKilledPipeline(t *testing.T) {
	dir := export(t)
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir)
	c := helpertest.Dial(t, name)
	kills, _ := disturb(t, killer(p), 600*time.Millisecond)
	value := make([]byte, 60_000)
	long := codec.Request{Path: helpertest.Path("/a"), Name: codec.CString("user.long"), Value: value, Size: int64(len(value))}
	types := []codec.Type{codec.Lstat, codec.Open, codec.Readlink, codec.Lsetxattr, codec.Statfs}
	var all []byte
	for i, typ := range types {
		q := codec.Request{Path: helpertest.Path("/" + string("abcab"[i])), Size: 100}
		if typ == codec.Lsetxattr {
			q = long
		}
		all = q.Append(all, typ)
	}
	done := make(chan error, 1)
	var rounds atomic.Int32
	stop := make(chan struct{})
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			cut := int(rounds.Load()) * 997 % len(all)
			if err := errors.Join(c.TrySend(all[:cut]), c.TrySend(all[cut:])); err != nil {
				done <- err
				return
			}
			rounds.Add(1)
		}
	}()
	answered := int32(0)
	read := func() {
		for _, typ := range types {
			a, err := c.TryRead(typ)
			if err != nil {
				t.Fatalf("round %d, %v: %v\n%s", answered, typ, err, p.Output())
			}
			switch {
			case typ == codec.Readlink && a.Errno == unix.EINVAL:
			case typ == codec.Lsetxattr && (a.Errno == unix.EIO || a.Errno == unix.ENOSPC || a.Errno == unix.E2BIG):
			case a.Errno != 0:
				t.Fatalf("round %d, %v: %v", answered, typ, a.Errno)
			}
			if a.File != nil {
				a.File.Close()
			}
		}
		answered++
	}
	for until := time.Now().Add(5 * time.Second); time.Now().Before(until); {
		read()
	}
	close(stop)
	for err := error(nil); ; {
		select {
		case err = <-done:
			if err != nil {
				t.Fatal(err)
			}
			for answered < rounds.Load() {
				read()
			}
			t.Logf("%d kills, %d rounds", kills.Load(), answered)
			return
		default:
			read()
		}
	}
}

// A client that leaves while there is no server is gone for the next one, and
// a server that dies again and again is started with growing pauses.
func TestDyingServers(t *testing.T) {
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	leaves := helpertest.Dial(t, name)
	leaves.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	had := len(helpertest.FDs(t, p.PID))
	for range 5 {
		server := p.Server()
		unix.Kill(server, unix.SIGKILL)
		helpertest.Eventually(t, "the server is dead", func() bool { return p.Server() != server })
	}
	leaves.Close()
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	helpertest.Eventually(t, "the pauses grow", func() bool { return p.Logged("pause=40ms") })
	helpertest.Eventually(t, "who has left is forgotten", func() bool { return p.Logged("client left") })
	helpertest.Eventually(t, "the supervisor has a descriptor less than before", func() bool { return len(helpertest.FDs(t, p.PID)) == had-1 })
}

// A server that is killed while a file system holds a thread of it, which
// nobody can kill then, is replaced all the same.
func TestKilledWhileHeld(t *testing.T) {
	helpertest.NeedFUSE(t)
	helpertest.NeedLinux(t, 6, 9, "a pidfd of a thread, to see the death of a process that is held")
	dir := export(t)
	stuck := filepath.Join(dir, "stuck")
	if err := os.Mkdir(stuck, 0o755); err != nil {
		t.Fatal(err)
	}
	fs, err := slowfs.Mount(stuck, t.TempDir(), slowfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fs.Close() })
	fs.Hold(slowfs.Lookups)
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir)
	held, c := helpertest.Dial(t, name), helpertest.Dial(t, name)
	held.Send(frame(codec.Lstat, "/stuck/x"))
	helpertest.Eventually(t, "the request hangs", func() bool { return fs.Waiting() == 1 })
	unix.Kill(p.Server(), unix.SIGKILL)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	fs.Release()
	if a := held.Read(codec.Lstat); a.Errno != unix.ENOENT {
		t.Errorf("%v, want what the file system says", a.Errno)
	}
	helpertest.Eventually(t, "the dead server is gone", func() bool { return len(helpertest.Children(p.PID)) == 1 })
}

// Stopping after a renewal with a request that hangs in the old server still
// answers the others, and ends.
func TestRenewedWhileStuck(t *testing.T) {
	dir := export(t)
	stuck := filepath.Join(dir, "stuck")
	if err := os.Mkdir(stuck, 0o755); err != nil {
		t.Fatal(err)
	}
	release := mountHang(t, stuck)
	p, name := helpertest.Listen(t, helpertest.Ours(t), dir)
	waits, other := helpertest.Dial(t, name), helpertest.Dial(t, name)
	other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	waits.Send(frame(codec.Lstat, "/stuck/x"))
	time.Sleep(50 * time.Millisecond) // most likely it hangs now; if not, the rest holds as well
	p.Server()
	unix.Kill(p.PID, syscall.SIGHUP)
	helpertest.Eventually(t, "two servers", func() bool { return len(helpertest.Children(p.PID)) == 2 })
	other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	release()
	if a := waits.Read(codec.Lstat); a.Errno == 0 {
		t.Error("the hanging file system has answered")
	}
	waits.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
	helpertest.Eventually(t, "one server", func() bool { return len(helpertest.Children(p.PID)) == 1 })
}

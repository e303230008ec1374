package pool_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/bench/model"
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

// killer kills the server that a helper has now, if it has one.
func killer(h *helpertest.Helper, events *model.Events) func() {
	return func() {
		for _, pid := range h.Servers() {
			events.Kill(pid)
		}
	}
}

// vms is how many VMs a survival test has at most.
const vms = 4

// fillVMs makes the directories of VMs.
func fillVMs(t *testing.T, export string) {
	if err := model.MakeShared(export); err != nil {
		t.Fatal(err)
	}
	for i := range vms {
		if err := os.Mkdir(filepath.Join(export, fmt.Sprintf("vm%d", i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// run lets as many VMs as there can be work, until enough says so, and returns
// how many requests were answered, and how many of them with EIO. Each answer is
// the only right one, or EIO where events say that a server has died; after each
// batch the host has the same tree.
func run(t *testing.T, h *helpertest.Helper, events *model.Events, enough func(answers int) bool) (answers, eio int) {
	t.Helper()
	list := make([]*model.VM, vms)
	if helpertest.ManyVMs(h.Way) != "" {
		list = list[:1]
	}
	for i := range list {
		v, err := model.NewVM(events, h.Export, fmt.Sprintf("vm%d", i), uint64(time.Now().UnixNano()), i)
		if err != nil {
			t.Fatal(err)
		}
		v.Client, v.Thorough = h.Dial().Client, true
		v.IDs = model.IDs{Rootless: h.Way.Rootless, Root: helpertest.Someone, First: helpertest.SomeRange}
		list[i] = v
	}
	var over atomic.Bool
	go func() {
		for end := time.Now().Add(helpertest.Patience); !over.Load() && !enough(int(events.Answered.Load())); {
			if time.Now().After(end) {
				t.Error("it takes too long")
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		over.Store(true)
	}()
	var all sync.WaitGroup
	for _, v := range list {
		all.Go(func() {
			if err := errors.Join(v.Run(&over), v.Compare()); err != nil {
				t.Errorf("%s: %v", v.Dir, err)
				over.Store(true)
			}
		})
	}
	all.Wait()
	for _, v := range list {
		eio += v.Errnos[unix.EIO]
	}
	return int(events.Answered.Load()), eio
}

// Killed at any moment, the server comes back and no VM notices but by an EIO
// where the last server may have begun a change.
func TestKilledServer(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fillVMs})
		var events model.Events
		kills, _ := disturb(t, killer(h, &events), 700*time.Millisecond)
		answers, eio := run(t, h, &events, func(answers int) bool { return kills.Load() >= 4 && answers >= 600 })
		t.Logf("%d kills, %d answers, %d times EIO", kills.Load(), answers, eio)
		if eio > 4*int(kills.Load()) {
			t.Errorf("%d times EIO with %d kills: at most one for each VM and kill", eio, kills.Load())
		}
	})
}

// SIGHUP moves all VMs to a new server, and none notices at all.
func TestRenewedServer(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fillVMs})
		var idle *helpertest.Client
		if !way.FD {
			idle = h.Dial()
			idle.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
		}
		first := h.Server()
		renewals, end := disturb(t, func() { unix.Kill(h.PID, unix.SIGHUP) }, 300*time.Millisecond)
		enough := func(answers int) bool { return renewals.Load() >= 4 && answers >= 600 }
		answers, eio := run(t, h, new(model.Events), enough)
		end() // there are two servers at times
		t.Logf("%d renewals, %d answers", renewals.Load(), answers)
		if eio != 0 {
			t.Errorf("%d times EIO", eio)
		}
		if h.Server() == first {
			t.Error("the first server is still there")
		}
		if idle != nil {
			idle.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
		}
	})
}

// helperOfOwn returns a helper that the test may replace on disk.
func helperOfOwn(t *testing.T) string {
	t.Helper()
	program, err := os.ReadFile(helpertest.Ours(t))
	if err != nil {
		t.Fatal(err)
	}
	dir := helpertest.ShortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	helper := filepath.Join(dir, "helper")
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
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		helper := helperOfOwn(t)
		h := way.Start(t, helpertest.Setup{Fill: fill, Program: helper})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		server := h.Server()
		replace(t, helper, "#!/bin/false\n")
		unix.Kill(h.PID, unix.SIGHUP)
		helpertest.Eventually(t, "the failure is logged", func() bool {
			return h.Logged("the new server does not start")
		})
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		if h.Server() != server {
			t.Error("another server")
		}
		// One that dies is started again from what was running, not from the disk.
		unix.Kill(server, unix.SIGKILL)
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	})
}

// A server that hangs at its start is given up, and does not keep others from
// being started.
func TestRenewedBySilence(t *testing.T) {
	silence := func(w helpertest.Way) (reason string) {
		if w.FD || w.Rootless || w.Sandbox != "namespace" {
			return "10 s each are long, and twice is enough"
		}
		return ""
	}
	helpertest.EachWay(t, silence, func(t *testing.T, way helpertest.Way) {
		helper := helperOfOwn(t)
		h := way.Start(t, helpertest.Setup{Fill: fill, Program: helper})
		c := h.Dial()
		server := h.Server()
		replace(t, helper, "#!/bin/sh\nexec sleep 1000\n")
		unix.Kill(h.PID, unix.SIGHUP)
		helpertest.Eventually(t, "two servers", func() bool { return len(h.Servers()) == 2 })
		unix.Kill(server, unix.SIGKILL)
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		if !h.Logged("the new server does not start") {
			t.Error("the failure is not logged")
		}
	})
}

// Requests that came together are answered once each and in order, whenever
// the server dies in between, and so is a frame that had come in part.
func TestKilledPipeline(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		c := h.Dial()
		kills, _ := disturb(t, killer(h, new(model.Events)), 600*time.Millisecond)
		value := make([]byte, 60_000)
		long := codec.Request{
			Path: helpertest.Path("/a"), Name: codec.CString("user.long"),
			Value: value, Size: int64(len(value)),
		}
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
		var rounds atomic.Int32 // that the client has begun to send
		stop := make(chan struct{})
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				cut := int(rounds.Add(1)) * 997 % len(all)
				if err := errors.Join(c.TrySend(all[:cut]), c.TrySend(all[cut:])); err != nil {
					done <- err
					return
				}
			}
		}()
		answered := int32(0)
		read := func() {
			for _, typ := range types {
				a, err := c.TryRead(typ)
				if err != nil {
					t.Fatalf("round %d, %v: %v\n%s", answered, typ, err, h.Output())
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
		for kills.Load() < 4 {
			read()
		}
		close(stop)
		for sending := true; sending || answered < rounds.Load(); {
			if answered < rounds.Load() { // what is begun comes
				read()
				continue
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			sending = false
		}
		t.Logf("%d kills, %d rounds", kills.Load(), answered)
	})
}

// A client that leaves while there is no server is gone for the next one, and
// a server that dies again and again is started with growing pauses.
func TestDyingServers(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		leaves := h.Dial()
		leaves.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		had := len(helpertest.FDs(t, h.PID))
		for range 5 {
			server := h.Server()
			unix.Kill(server, unix.SIGKILL)
			helpertest.Eventually(t, "the server is dead", func() bool { return h.Server() != server })
		}
		leaves.Close()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		helpertest.Eventually(t, "the pauses grow", func() bool { return h.Logged("pause=40ms") })
		helpertest.Eventually(t, "who has left is forgotten", func() bool { return h.Logged("client left") })
		helpertest.Eventually(t, "the supervisor has a descriptor less than before", func() bool {
			return len(helpertest.FDs(t, h.PID)) == had-1
		})
	})
}

// A server that is killed while a file system holds a thread of it, which
// nobody can kill then, is replaced all the same.
func TestKilledWhileHeld(t *testing.T) {
	helpertest.NeedFUSE(t)
	helpertest.NeedLinux(t, 6, 9, "a pidfd of a thread, to see the death of a process that is held")
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		var fs *slowfs.FS
		h := way.Start(t, helpertest.Setup{Fill: fillStuck(&fs)})
		held, c := h.Dial(), h.Dial()
		held.Send(frame(codec.Lstat, "/stuck/x"))
		helpertest.Eventually(t, "the request hangs", func() bool { return fs.Waiting() == 1 })
		unix.Kill(h.Server(), unix.SIGKILL)
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		fs.Release()
		if a := held.Read(codec.Lstat); a.Errno != unix.ENOENT {
			t.Errorf("%v, want what the file system says", a.Errno)
		}
		helpertest.Eventually(t, "the dead server is gone", func() bool { return len(h.Servers()) == 1 })
	})
}

// Stopping after a renewal with a request that hangs in the old server still
// answers the others, and ends.
func TestRenewedWhileStuck(t *testing.T) {
	helpertest.EachWay(t, helpertest.ManyVMs, func(t *testing.T, way helpertest.Way) {
		var fs *slowfs.FS
		h := way.Start(t, helpertest.Setup{Fill: fillStuck(&fs)})
		waits, other := h.Dial(), h.Dial()
		other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		waits.Send(frame(codec.Lstat, "/stuck/x"))
		helpertest.Eventually(t, "the request hangs", func() bool { return fs.Waiting() == 1 })
		h.Server()
		unix.Kill(h.PID, syscall.SIGHUP)
		helpertest.Eventually(t, "two servers", func() bool { return len(h.Servers()) == 2 })
		other.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
		fs.Release()
		if a := waits.Read(codec.Lstat); a.Errno == 0 {
			t.Error("the hanging file system has answered")
		}
		waits.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/b")})
		helpertest.Eventually(t, "one server", func() bool { return len(h.Servers()) == 1 })
	})
}

// mappings returns the inodes of the memories of a name that a process has
// mapped.
func mappings(t *testing.T, pid int, name string) (inodes []string) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if f := strings.Fields(line); len(f) > 5 && f[5] == "/memfd:"+name && !slices.Contains(inodes, f[4]) {
			inodes = append(inodes, f[4])
		}
	}
	return inodes
}

// Each server has in-flight memory of its own, and the supervisor closes that of
// servers that have ended.
func TestOwnMemory(t *testing.T) {
	p, name := helpertest.Listen(t, helpertest.Ours(t), export(t))
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	var seen []string
	for i := range 4 {
		server := p.Server()
		inodes := mappings(t, server, "inflight")
		if len(inodes) != 1 || slices.Contains(seen, inodes[0]) {
			t.Errorf("server %d maps %v, those before it %v", i, inodes, seen)
		}
		seen = append(seen, inodes...)
		if i%2 == 0 {
			unix.Kill(server, unix.SIGKILL)
		} else {
			unix.Kill(p.PID, unix.SIGHUP)
		}
		helpertest.Eventually(t, "another server", func() bool {
			pids := helpertest.Children(p.PID)
			return len(pids) == 1 && pids[0] != server
		})
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
	}
	helpertest.Eventually(t, "the supervisor has one memory", func() bool {
		n := 0
		for _, to := range helpertest.FDs(t, p.PID) {
			if strings.HasPrefix(to, "/memfd:inflight") {
				n++
			}
		}
		return n == 1
	})
}

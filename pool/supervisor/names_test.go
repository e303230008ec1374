package supervisor_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// stranger is a user that is neither root nor helpertest.Someone.
const stranger = 65534

// way is a way of starting a helper.
type way struct {
	name string
	uid  int // of the user that starts it
}

var ways = []way{{"foreground", 0}, {"daemon", 0}, {"rootless", helpertest.Someone}}

// inWays runs f in each way of starting.
func inWays(t *testing.T, f func(t *testing.T, w way)) {
	helpertest.NeedRoot(t)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) { f(t, w) })
	}
}

// command returns a helper of the way with its options.
func (w way) command(t *testing.T, options ...string) helpertest.Command {
	t.Helper()
	ours := helpertest.Ours(t)
	switch w.name {
	case "daemon":
		return helpertest.Command{Path: ours, Args: append(options, "-u65534", "-g65533")}
	case "foreground":
		return helpertest.Command{Path: ours, Args: append(options, "-n", "-u65534", "-g65533")}
	}
	id := strconv.Itoa(w.uid)
	args := helpertest.WithSomeone(t, "someone:700000:65536\n", append([]string{"setpriv", "--pdeathsig", "TERM",
		"--reuid", id, "--regid", id, "--clear-groups", "--", ours, "-n"}, options...)...)
	return helpertest.Command{Path: "/usr/bin/" + args[0], Args: args[1:]}
}

// helper is a helper that has been started.
type helper struct {
	t       *testing.T
	process *helpertest.Process // the command; the supervisor itself in the foreground
	path    string              // its socket's
	w       way
}

// begin starts a helper on a socket, and waits for nothing. As a daemon it is
// ready, or has failed.
func (w way) begin(t *testing.T, path string, options ...string) *helper {
	t.Helper()
	options = append([]string{"-p", exportFor(t, w), "-s", path}, options...)
	h := &helper{t, helpertest.Start(t, w.command(t, options...)), path, w}
	if w.name == "daemon" {
		h.process.Wait()
		t.Cleanup(func() { h.end(unix.SIGTERM) })
	}
	return h
}

// start starts a helper that listens.
func (w way) start(t *testing.T, path string, options ...string) *helper {
	t.Helper()
	h := w.begin(t, path, options...)
	helpertest.Eventually(t, "the helper listens on "+path, func() bool {
		if w.name == "daemon" && h.supervisor() == 0 || w.name != "daemon" && !h.process.Alive() {
			t.Fatalf("the helper has ended\n%s", h.process.Output())
		}
		return helpertest.Listening(t, path)
	})
	return h
}

// supervisor returns the supervisor's process, 0 if there is none.
func (h *helper) supervisor() int {
	for _, pid := range helpertest.With(h.path) {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, after, _ := strings.Cut(string(stat), ") ")
		f := strings.Fields(after)
		if len(f) < 4 {
			continue // ended meanwhile
		}
		parent, session := f[1], f[3]
		// The others are its servers, and what has started it.
		if h.w.name == "foreground" && pid == h.process.PID ||
			h.w.name == "daemon" && session == strconv.Itoa(pid) ||
			h.w.name == "rootless" && parent == strconv.Itoa(h.process.PID) {
			return pid
		}
	}
	return 0
}

// end ends the helper by a signal and waits for that.
func (h *helper) end(sig syscall.Signal) {
	h.t.Helper()
	if h.w.name == "daemon" {
		if pid := h.supervisor(); pid != 0 {
			unix.Kill(pid, sig)
		}
	} else if pid := h.supervisor(); pid != 0 && h.process.Alive() {
		unix.Kill(pid, sig)
	}
	h.process.Wait()
	helpertest.Eventually(h.t, "the helper ends", func() bool { return len(helpertest.With(h.path)) == 0 })
}

// exportFor returns a directory to export.
func exportFor(t *testing.T, w way) string {
	t.Helper()
	dir := helpertest.ShortDir(t)
	if err := os.Chown(dir, w.uid, w.uid); err != nil {
		t.Fatal(err)
	}
	return dir
}

// dirFor returns a directory for names, which the way's user may write to.
func dirFor(t *testing.T, w way) string {
	t.Helper()
	return exportFor(t, w)
}

func serves(t *testing.T, path string) {
	t.Helper()
	c := helpertest.Dial(t, path)
	c.Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
	c.Close()
}

func mustDo(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// treasure is a file of the helper's user that nobody else may touch.
type treasure struct {
	ino  uint64
	name string
	is   string
}

// describe says all about a file that a helper could change.
func describe(path string) (uint64, string) {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0, ""
	}
	content := ""
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		b, _ := os.ReadFile(path)
		content = string(b)
	}
	return st.Ino, fmt.Sprintf("%d:%d, mode %o, %q", st.Uid, st.Gid, st.Mode, content)
}

// asStranger calls f again and again on a thread of another user, until the
// function that it returns is called.
func asStranger(t *testing.T, f func()) (end func()) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and ends with the thread
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, errno := unix.RawSyscall(call, stranger, stranger, stranger); errno != 0 {
				done <- errno
				return
			}
		}
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
				f()
			}
		}
	}()
	return func() {
		close(stop)
		mustDo(t, <-done)
	}
}

// Who may write to the directory exchanges names in it, all the time, with files
// that are not the helper's: none of them is given away, changed or lost.
func TestExchangedNames(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		mustDo(t, os.Chmod(dir, 0o777))
		var treasures []treasure
		isTreasure := map[uint64]bool{}
		for i := range 6 {
			name := fmt.Sprint("treasure", i)
			path := filepath.Join(dir, name)
			switch {
			case i == 5:
				mustDo(t, os.Mkdir(path, 0o700), os.WriteFile(path+"/file", []byte(name), 0o600))
			case i == 4:
				outside := filepath.Join(t.TempDir(), "file")
				mustDo(t, os.WriteFile(outside, []byte(name), 0o600), os.Link(outside, path))
			default:
				mustDo(t, os.WriteFile(path, []byte(name), 0o600))
			}
			mustDo(t, os.Chown(path, w.uid, w.uid))
			ino, is := describe(path)
			treasures = append(treasures, treasure{ino, name, is})
			isTreasure[ino] = true
		}
		d, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		mustDo(t, err)
		defer unix.Close(d)
		path, pidfile := filepath.Join(dir, "s"), filepath.Join(dir, "p")
		served, rounds := 0, map[string]int{"foreground": 25, "daemon": 12, "rootless": 9}[w.name]
		for round := range rounds {
			// Mostly only in between, so that helpers start; names are never away.
			attacked := [][]string{{"s", ".s"}, {"p"}, {"s", ".s", "p"}}[round%3]
			if _, err := os.Lstat(pidfile); err != nil {
				mustDo(t, os.WriteFile(pidfile, []byte("1\n"), 0o600), os.Chown(pidfile, w.uid, w.uid))
			}
			end := asStranger(t, func() {
				victim := treasures[rand.IntN(len(treasures))].name
				name := attacked[rand.IntN(len(attacked))]
				if unix.Renameat2(d, name, d, victim, unix.RENAME_EXCHANGE) == nil {
					unix.Renameat2(d, name, d, victim, unix.RENAME_EXCHANGE)
				}
				if round%2 == 0 {
					time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond)
				}
			})
			h := w.begin(t, path, "--pidfile", pidfile)
			helpertest.Eventually(t, "the helper has started, or failed", func() bool {
				pid := h.supervisor()
				if pid != 0 && len(helpertest.Children(pid)) > 0 {
					served++
					return true
				}
				return !h.process.Alive()
			})
			h.end([]syscall.Signal{unix.SIGTERM, unix.SIGTERM, unix.SIGKILL}[rand.IntN(3)])
			end()
			found := map[uint64]string{}
			names := map[uint64]string{}
			filepath.WalkDir(dir, func(path string, _ fs.DirEntry, _ error) error {
				ino, is := describe(path)
				found[ino], names[ino] = is, path
				return nil
			})
			for _, v := range treasures {
				if found[v.ino] != v.is {
					t.Fatalf("round %d: %s was %s, is %q\n%s", round, v.name, v.is, found[v.ino], h.process.Output())
				}
			}
			// As before, but for what a helper may have left.
			var tidy []func() error
			for ino, name := range names {
				switch {
				case name == dir || filepath.Dir(name) != dir && !isTreasure[ino]:
				case isTreasure[ino]:
					tidy = append(tidy, func() error { return os.Rename(name, name+"."+fmt.Sprint(ino)) })
				case round%2 == 0:
					tidy = append(tidy, func() error { return os.RemoveAll(name) })
				}
			}
			for _, v := range treasures {
				tidy = append(tidy, func() error {
					left, _ := filepath.Glob(dir + "/*." + fmt.Sprint(v.ino))
					for _, path := range left {
						if st, err := os.Lstat(path); err == nil && st.IsDir() {
							continue // exchanged for a private directory, which is cleared
						}
						if err := os.Rename(path, filepath.Join(dir, v.name)); err != nil {
							return err
						}
					}
					return nil
				})
			}
			for _, f := range tidy {
				mustDo(t, f())
			}
		}
		t.Logf("%d of %d helpers started", served, rounds)
	})
}

// Another's pidfile is replaced, not written to; what is no pidfile stays.
func TestPIDFileReplaces(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		pidfile, other := filepath.Join(dir, "pid"), filepath.Join(dir, "other")
		for what, before := range map[string]func(){
			"nothing": func() {},
			"stranger's file": func() {
				mustDo(t, os.WriteFile(pidfile, []byte("1\n"), 0o666), os.Chown(pidfile, stranger, stranger))
			},
			"hard link": func() { mustDo(t, os.Link(other, pidfile)) },
			"empty":     func() { mustDo(t, os.WriteFile(pidfile, nil, 0o600), os.Chown(pidfile, w.uid, w.uid)) },
		} {
			mustDo(t, os.WriteFile(other, []byte("1\n"), 0o600), os.Chown(other, w.uid, w.uid))
			before()
			h := w.start(t, filepath.Join(dir, "s"), "--pidfile", pidfile)
			var st unix.Stat_t
			mustDo(t, unix.Lstat(pidfile, &st))
			if int(st.Uid) != w.uid || st.Mode != unix.S_IFREG|0o644 || st.Nlink != 1 {
				t.Errorf("%s: of %d, mode %o, %d links", what, st.Uid, st.Mode, st.Nlink)
			}
			if b, _ := os.ReadFile(pidfile); string(b) != fmt.Sprintln(h.supervisor()) {
				t.Errorf("%s: %q, not %d", what, b, h.supervisor())
			}
			if b, _ := os.ReadFile(other); string(b) != "1\n" {
				t.Errorf("%s: the other file is %q", what, b)
			}
			h.end(unix.SIGTERM)
			if entries, _ := os.ReadDir(dir); len(entries) != 1 {
				t.Errorf("%s: left behind: %v", what, entries)
			}
		}
	})
}

func TestPIDFileRefuses(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		pidfile, other := filepath.Join(dir, "pid"), filepath.Join(dir, "other")
		for what, before := range map[string]func(){
			"text":           func() { mustDo(t, os.WriteFile(pidfile, []byte("root:x:0:0"), 0o600)) },
			"long number":    func() { mustDo(t, os.WriteFile(pidfile, []byte(strings.Repeat("1", 100)), 0o600)) },
			"FIFO":           func() { mustDo(t, unix.Mkfifo(pidfile, 0o600)) },
			"directory":      func() { mustDo(t, os.Mkdir(pidfile, 0o700)) },
			"link":           func() { mustDo(t, os.Symlink(other, pidfile)) },
			"link to nobody": func() { mustDo(t, os.Symlink("nobody", pidfile)) },
		} {
			mustDo(t, os.WriteFile(other, []byte("1\n"), 0o600), os.Chown(other, w.uid, w.uid))
			before()
			mustDo(t, os.Lchown(pidfile, w.uid, w.uid))
			ino, is := describe(pidfile)
			h := w.begin(t, filepath.Join(dir, "s"), "--pidfile", pidfile)
			if status := h.process.Wait(); status != 1 || !h.process.Logged("--pidfile") {
				t.Errorf("%s: status %d, %q", what, status, h.process.Output())
			}
			if ino2, is2 := describe(pidfile); ino2 != ino || is2 != is {
				t.Errorf("%s: was %s, is %s", what, is, is2)
			}
			if b, _ := os.ReadFile(other); string(b) != "1\n" {
				t.Errorf("%s: the other file is %q", what, b)
			}
			if entries, _ := os.ReadDir(dir); len(entries) != 2 {
				t.Errorf("%s: left behind: %v", what, entries)
			}
			mustDo(t, os.RemoveAll(pidfile))
		}
	})
}

// Two helpers have one pidfile after each other: its reader always sees a whole
// number, and the end of the first helper does not remove the second's.
func TestPIDFileOfTheNext(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		pidfile := filepath.Join(dir, "pid")
		last := w.start(t, filepath.Join(dir, "s0"), "--pidfile", pidfile)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				b, err := os.ReadFile(pidfile)
				if _, bad := strconv.Atoi(strings.TrimSuffix(string(b), "\n")); err != nil || bad != nil {
					t.Errorf("the pidfile is %q, %v", b, err)
					return
				}
			}
		})
		for i := range 3 {
			next := w.start(t, filepath.Join(dir, fmt.Sprint("s", i+1)), "--pidfile", pidfile)
			last.end(unix.SIGTERM)
			if b, err := os.ReadFile(pidfile); string(b) != fmt.Sprintln(next.supervisor()) {
				t.Errorf("%q, %v, not the next helper's %d", b, err, next.supervisor())
			}
			last = next
		}
		close(stop)
		wg.Wait()
		// Written by others meanwhile: not this helper's any more.
		mustDo(t, os.WriteFile(pidfile, []byte("1\n"), 0o644))
		last.end(unix.SIGTERM)
		if b, err := os.ReadFile(pidfile); string(b) != "1\n" {
			t.Errorf("another's number is %q now: %v", b, err)
		}
	})
}

// remove removes a file or a directory that a helper may just fill again.
func remove(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		helpertest.Eventually(t, path+" is removed", func() bool { return os.RemoveAll(path) == nil })
	}
}

// Whichever names go, and however, they come back, and new VMs connect.
func TestNamesComeBack(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		path, private := filepath.Join(dir, "s"), filepath.Join(dir, ".s")
		h := w.start(t, path)
		before := helpertest.Dial(t, path)
		_, is := describe(path)
		for what, away := range map[string]func(){
			"public":               func() { remove(t, path) },
			"private":              func() { remove(t, private) },
			"private, then public": func() { remove(t, private, path) },
			"public, then private": func() { remove(t, path, private) },
			"private, moved":       func() { mustDo(t, os.Rename(private, private+".moved")); remove(t, path) },
			"content of private":   func() { remove(t, private+"/s") },
			"content, then public": func() { remove(t, private+"/s", path) },
			"private, made again": func() {
				remove(t, private)
				os.Mkdir(private, 0o700) // unless the helper has
				mustDo(t, os.Chown(private, w.uid, w.uid))
			},
		} {
			for range 3 {
				away()
				helpertest.Eventually(t, what+": the names are back", func() bool {
					_, err := os.Lstat(private + "/s")
					return err == nil && helpertest.Listening(t, path)
				})
				serves(t, path)
				if _, is2 := describe(path); is2 != is {
					t.Errorf("%s: was %s, is %s", what, is, is2)
				}
				remove(t, private+".moved")
			}
			// As after QEMU, once more.
			mustDo(t, os.Remove(path))
			helpertest.Eventually(t, what+": the name is back", func() bool { return helpertest.Listening(t, path) })
			serves(t, path)
		}
		before.Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
		next := w.begin(t, path)
		if status := next.process.Wait(); status != 1 || !next.process.Logged("in use") {
			t.Errorf("a second helper: status %d, %q", status, next.process.Output())
		}
		h.end(unix.SIGTERM)
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("left behind: %v", entries)
		}
	})
}

// The names' directory is removed or moved, or one above it, and made again.
func TestDirectoryComesBack(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		top := dirFor(t, w)
		above := filepath.Join(top, "a")
		dir := filepath.Join(above, "b")
		again := func() {
			mustDo(t, os.MkdirAll(dir, 0o755), os.Chown(dir, w.uid, w.uid))
		}
		again()
		path := filepath.Join(dir, "s")
		h := w.start(t, path)
		before := helpertest.Dial(t, path)
		for what, away := range map[string]func(){
			"removed":     func() { remove(t, dir) },
			"moved":       func() { mustDo(t, os.Rename(dir, top+"/moved")) },
			"above moved": func() { mustDo(t, os.Rename(above, top+"/moved")); unix.Kill(h.supervisor(), unix.SIGHUP) },
			"no signal":   func() { mustDo(t, os.Rename(above, top+"/moved")) },
		} {
			away()
			again()
			helpertest.Eventually(t, what+": the names are back", func() bool { return helpertest.Listening(t, path) })
			serves(t, path)
			mustDo(t, os.Remove(path))
			helpertest.Eventually(t, what+": the name is back", func() bool { return helpertest.Listening(t, path) })
			helpertest.Eventually(t, what+": the old names go", func() bool {
				left, _ := filepath.Glob(top + "/moved/s")
				below, _ := filepath.Glob(top + "/moved/b/s")
				return len(left)+len(below) == 0
			})
			remove(t, top+"/moved")
		}
		before.Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
		h.end(unix.SIGTERM)
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("left behind: %v", entries)
		}
	})
}

// Clients that wait to be accepted are, also after the names have gone.
func TestWaitingClientsStay(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		path := filepath.Join(dir, "s")
		h := w.start(t, path, "--max-connections", "1")
		clients := []*helpertest.Client{helpertest.Dial(t, path)}
		clients[0].Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
		for range 3 {
			for range 3 {
				clients = append(clients, helpertest.Dial(t, path))
			}
			remove(t, filepath.Join(dir, ".s"), path)
			helpertest.Eventually(t, "the names are back", func() bool { return helpertest.Listening(t, path) })
		}
		clients = append(clients, helpertest.Dial(t, path))
		// Those of different listeners come in any order.
		var wg sync.WaitGroup
		for _, c := range clients {
			wg.Go(func() {
				a, err := c.TryDo(codec.Statfs, codec.Request{Path: helpertest.Path("/")})
				if err != nil || a.Errno != 0 {
					t.Errorf("a client that waited: %v, %v", a.Errno, err)
				}
				c.Close()
			})
		}
		wg.Wait()
		h.end(unix.SIGTERM)
	})
}

// Whoever may read the directory may lock it, and keeps nobody from starting.
func TestStrangersLock(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		mustDo(t, os.Chmod(dir, 0o755))
		locked := make(chan error, 1)
		var fd int
		end := asStranger(t, sync.OnceFunc(func() {
			var err error
			if fd, err = unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
				err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
			}
			locked <- err
		}))
		mustDo(t, <-locked)
		end()
		defer unix.Close(fd)
		path := filepath.Join(dir, "s")
		h := w.start(t, path, "--pidfile", filepath.Join(dir, "p"))
		serves(t, path)
		// Nobody but root and its user can lock what keeps others from starting.
		var st unix.Stat_t
		mustDo(t, unix.Lstat(filepath.Join(dir, ".s"), &st))
		if int(st.Uid) != w.uid || st.Mode != unix.S_IFDIR|0o700 {
			t.Errorf("private directory: of %d, mode %o", st.Uid, st.Mode)
		}
		own, err := unix.Open(filepath.Join(dir, ".s"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		mustDo(t, err)
		defer unix.Close(own)
		if err := unix.Flock(own, unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
			t.Errorf("the private directory is not locked: %v", err)
		}
		h.end(unix.SIGTERM)
	})
}

// Of two helpers that start at once, one serves, whatever a dead one has left.
func TestTwoStartAtOnce(t *testing.T) {
	helpertest.NeedRoot(t)
	dir := helpertest.ShortDir(t)
	path := filepath.Join(dir, "s")
	w := ways[0]
	for round := range 20 {
		two := [2]*helper{w.begin(t, path), w.begin(t, path)}
		var winner *helper
		helpertest.Eventually(t, "one of two helpers has ended", func() bool {
			for i, h := range two {
				if !h.process.Alive() {
					winner = two[1-i]
					if !h.process.Logged("in use") {
						t.Errorf("round %d: %s", round, h.process.Output())
					}
					h.process.Wait()
					return true
				}
			}
			return false
		})
		helpertest.AwaitName(t, winner.process, path)
		serves(t, path)
		winner.end([]syscall.Signal{unix.SIGKILL, unix.SIGTERM}[round%2])
	}
}

// Guests own all names in the export.
func TestNameInExport(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		export, outside := filepath.Join(dir, "export"), filepath.Join(dir, "outside")
		sub, link, bound, within := export+"/sub", dir+"/link", dir+"/bound", export+"/within"
		for _, d := range []string{export, sub, outside, bound, within} {
			mustDo(t, os.Mkdir(d, 0o755), os.Chown(d, w.uid, w.uid))
		}
		mustDo(t, os.Symlink(sub, link))
		mount := func(from, to string) {
			mustDo(t, unix.Mount(from, to, "", unix.MS_BIND, ""))
			t.Cleanup(func() { unix.Unmount(to, unix.MNT_DETACH) })
		}
		mount(sub, bound)
		mount(outside, within)
		for _, c := range []struct{ in, export string }{
			{export, export}, {sub, export}, {link, export}, {bound, export}, {within, export}, {outside, export},
			{dir + "/outside/../export", export}, {sub, link}, {bound, sub}, {sub, bound},
		} {
			for _, options := range [][]string{
				{"-s", c.in + "/s"}, {"-s", dir + "/s", "--pidfile", c.in + "/pid"},
			} {
				p := helpertest.Start(t, w.command(t, append(options, "-p", c.export)...))
				if status := p.Wait(); status != 1 || !p.Logged("is inside the export") || !p.Logged("outside") {
					t.Errorf("%v of %s: status %d, %q", options, c.export, status, p.Output())
				}
			}
		}
		for _, d := range []string{export, sub, outside, dir} {
			for _, name := range []string{"/s", "/.s", "/pid"} {
				if _, err := os.Lstat(d + name); err == nil {
					t.Errorf("left behind: %s", d+name)
				}
			}
		}
		// Beside it is none of the guests' business.
		mustDo(t, unix.Unmount(within, 0))
		h := w.start(t, outside+"/s", "-p", export, "--pidfile", dir+"/export.pid")
		serves(t, outside+"/s")
		h.end(unix.SIGTERM)
	})
}

// What somebody else has put where a helper has its private directory stays,
// and is named; what dead helpers have left goes.
func TestForeignPrivateDirectory(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		path, private := filepath.Join(dir, "s"), filepath.Join(dir, ".s")
		mkdir := func(mode os.FileMode, uid int) {
			mustDo(t, os.Mkdir(private, 0), os.Chmod(private, mode), os.Chown(private, uid, uid))
		}
		deadSocket := func(path string) {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			mustDo(t, err, unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Close(fd),
				os.Chown(path, w.uid, w.uid))
		}
		for what, c := range map[string]struct {
			make func()
			says string
		}{
			"stranger's":      {func() { mkdir(0o700, stranger) }, ".s"},
			"for all to read": {func() { mkdir(0o755, w.uid) }, "only its user can enter"},
			"for a group":     {func() { mkdir(0o770, w.uid) }, "only its user can enter"},
			"with a file": {func() {
				mkdir(0o700, w.uid)
				mustDo(t, os.WriteFile(private+"/file", nil, 0o600))
			}, "holds file"},
			"with a file of that name": {func() {
				mkdir(0o700, w.uid)
				mustDo(t, os.WriteFile(private+"/s", nil, 0o600), os.Chown(private+"/s", w.uid, w.uid))
			}, "not a socket"},
			"a file": {func() { mustDo(t, os.WriteFile(private, []byte("x"), 0o600)) }, "not a socket"},
			"a link": {func() { mustDo(t, os.Symlink(t.TempDir(), private)) }, "not a socket"},
			"old":    {func() { deadSocket(private) }, ""},
			"dead":   {func() { mkdir(0o700, w.uid); deadSocket(private + "/s") }, ""},
			"killed": {func() {
				mkdir(0o700, w.uid)
				deadSocket(private + "/s")
				deadSocket(private + "/aside")
			}, ""},
			"empty": {func() { mkdir(0o700, w.uid) }, ""},
		} {
			c.make()
			ino, is := describe(private)
			h := w.begin(t, path)
			if c.says == "" {
				helpertest.Eventually(t, what+": it serves", func() bool { return helpertest.Listening(t, path) })
				h.end(unix.SIGTERM)
			} else {
				if status := h.process.Wait(); status != 1 || !h.process.Logged(c.says) {
					t.Errorf("%s: status %d, %q, not %q", what, status, h.process.Output(), c.says)
				}
				if ino2, is2 := describe(private); ino2 != ino || is2 != is {
					t.Errorf("%s: was %s, is %s", what, is, is2)
				}
				mustDo(t, os.RemoveAll(private))
			}
			if entries, _ := os.ReadDir(dir); len(entries) > 0 {
				t.Errorf("%s: left behind: %v", what, entries)
			}
		}
	})
}

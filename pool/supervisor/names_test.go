package supervisor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

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

// Another's pidfile is replaced, not written to; what is no pidfile stays.
func TestPIDFileReplaces(t *testing.T) {
	inWays(t, func(t *testing.T, w way) {
		dir := dirFor(t, w)
		pidfile, other := filepath.Join(dir, "pid"), filepath.Join(dir, "other")
		for what, before := range map[string]func(){
			"nothing":         func() {},
			"stranger's file": func() { mustDo(t, os.WriteFile(pidfile, []byte("1\n"), 0o666), os.Chown(pidfile, stranger, stranger)) },
			"hard link":       func() { mustDo(t, os.Link(other, pidfile)) },
			"empty":           func() { mustDo(t, os.WriteFile(pidfile, nil, 0o600), os.Chown(pidfile, w.uid, w.uid)) },
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

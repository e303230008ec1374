package supervisor_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

func TestMain(m *testing.M) { helpertest.Main(m) }

// Whatever is wrong is told in one line, with status 1, and nothing is left
// behind or taken away.
func TestRefusals(t *testing.T) {
	dir := helpertest.ShortDir(t)
	file, link, live := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "live")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", link); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", live)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := func(name string) []string { return []string{"-p", dir, "-u", "0", "-g", "0", "-s", name} }
	for _, c := range []struct {
		args []string
		says string
	}{
		{s(live), "in use"},
		{s(file), "not a socket"},
		{s(link), "not a socket"},
		{s(dir), "not a socket"},
		{s(filepath.Join(dir, strings.Repeat("x", 108))), "too long"},
		{s(filepath.Join(dir, "none", "s")), "no such file"},
		{[]string{"-p", dir + "/none", "-s", dir + "/s", "-u", "0", "-g", "0"}, "no such file"},
		{[]string{"-p", file, "-s", dir + "/s", "-u", "0", "-g", "0"}, "not a directory"},
		{[]string{"-p", dir, "-s", dir + "/s"}, "--uid"},
		{[]string{"-p", dir, "-s", dir + "/s", "--uid=x", "--gid=0"}, "invalid"},
		{[]string{"-p", dir, "-s", dir + "/s", "--uid=-1", "--gid=0"}, "not a user id"},
		{[]string{"-p", dir, "-s", dir + "/s", "-f", "0", "-u", "0", "-g", "0"}, "contradict"},
		{[]string{"-p", dir}, "nowhere to serve"},
		{[]string{"-f", "0"}, "no directory"},
		{[]string{"-p", dir, "-f", "77"}, "not an open descriptor"},
		{[]string{"-p", dir, "-f", "0"}, "not a connected unix stream socket"},
		{append(s(dir+"/s"), "--workers", "0"), "--workers"},
		{append(s(dir+"/s"), "--readonly", "--sandbox=chroot"), "use --sandbox=namespace"},
		{append(s(dir+"/s"), "--readonly", "--sandbox=none"), "use --sandbox=namespace"},
		{append(s(dir+"/s"), "--log-level=loud"), "--log-level"},
		{append(s(dir+"/s"), "more"), "unexpected argument"},
		{append(s(dir+"/s"), "--pidfile", dir+"/none/pid"), "--pidfile"},
	} {
		for _, args := range [][]string{c.args, append([]string{"-n"}, c.args...)} {
			status, out := helpertest.Run(t, helpertest.Command{Path: helpertest.Ours(t), Args: args})
			last := out[strings.LastIndex(strings.TrimRight(out, "\n"), "\n")+1:]
			if status != 1 || !strings.HasPrefix(last, "virtfs-proxy-helper: ") || !strings.Contains(last, c.says) {
				t.Errorf("%q: status %d, said %q, not %q", args, status, out, c.says)
			}
			if args[0] != "-n" && strings.Count(out, "\n") != 1 {
				t.Errorf("%q: not one line: %q", args, out)
			}
		}
	}
	entries, _ := os.ReadDir(dir)
	if b, _ := os.ReadFile(file); len(entries) != 3 || string(b) != "mine" {
		t.Errorf("left behind or taken away: %v", entries)
	}
}

// The command returns when the name takes connections, and keeps nothing of
// its caller's.
func TestDaemon(t *testing.T) {
	dir := helpertest.ShortDir(t)
	name, pidfile := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	ours := helpertest.Ours(t)
	umask := unix.Umask(0o777)
	status, out := helpertest.Run(t, helpertest.Command{
		Path: ours, Dir: dir,
		Args: []string{"--path=.", "--socket", "s", "--uid=65534", "-g65533", "--pidfile", "pid"},
		Env:  []string{"SECRET=of the caller"},
	})
	unix.Umask(umask)
	if status != 0 || out != "" {
		t.Fatalf("status %d, %q", status, out)
	}
	b, err := os.ReadFile(pidfile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(pid, syscall.SIGTERM)
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/pid")})
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil || st.Uid != 65534 || st.Gid != 65533 || st.Mode != unix.S_IFSOCK|0o660 {
		t.Errorf("name: %v, %d:%d, mode %o", err, st.Uid, st.Gid, st.Mode)
	}
	if session, tty := helpertest.Session(t, pid); session != pid || tty != 0 {
		t.Errorf("session %d of %d, tty %d", session, pid, tty)
	}
	if cwd, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); cwd != "/" {
		t.Errorf("works in %s", cwd)
	}
	if env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); strings.Contains(string(env), "SECRET") {
		t.Error("keeps the environment")
	}
	for fd, to := range helpertest.FDs(t, pid) {
		if fd < 3 && to != "/dev/null" && !strings.HasPrefix(to, "pipe:") {
			t.Errorf("descriptor %d is %s", fd, to)
		}
	}
	c.Close()
	syscall.Kill(pid, syscall.SIGTERM)
	helpertest.Eventually(t, "names and pidfile go", func() bool {
		entries, _ := os.ReadDir(dir)
		return len(entries) == 0
	})
}

// QEMU unlinks the name; no connection is refused for that.
func TestNameComesBack(t *testing.T) {
	_, name := helpertest.Listen(t, helpertest.Ours(t), t.TempDir())
	for i := range 200 {
		c := helpertest.Dial(t, name)
		c.Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
		c.Close()
		var err error
		if i%2 == 0 {
			err = os.Remove(name)
		} else {
			err = os.Rename(name, name+".old")
		}
		if err != nil {
			t.Fatal(err)
		}
		helpertest.Eventually(t, "the name is back", func() bool { _, err := os.Lstat(name); return err == nil })
	}
}

// A dead socket is replaced; of two helpers on one name, one wins.
func TestClaims(t *testing.T) {
	p, name := helpertest.Listen(t, helpertest.Ours(t), t.TempDir())
	args := []string{"-n", "-p", t.TempDir(), "-s", name, "-u", "0", "-g", "0"}
	if status, out := helpertest.Run(t, helpertest.Command{Path: helpertest.Ours(t), Args: args}); status != 1 || !strings.Contains(out, "in use") {
		t.Errorf("second helper: status %d, %q", status, out)
	}
	p.Signal(syscall.SIGKILL)
	p.Wait()
	next := helpertest.Start(t, helpertest.Command{Path: helpertest.Ours(t), Args: args})
	helpertest.AwaitName(t, next, name)
	helpertest.Dial(t, name).Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
}

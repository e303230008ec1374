package supervisor_test

import (
	"fmt"
	"io"
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

func TestMain(m *testing.M) {
	if name := os.Getenv(dialEnv); name != "" {
		dialer(name)
	}
	helpertest.Main(m)
}

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
	export := t.TempDir()
	s := func(name string) []string { return []string{"-p", export, "-u", "0", "-g", "0", "-s", name} }
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
		{[]string{"-p", dir, "-f", "2"}, "stderr"},
		{[]string{"-p", dir, "-f", "4294967296"}, "not a descriptor"},
		{[]string{"-p", dir, "-f", "-1"}, "not a descriptor"},
		{[]string{"-p", dir, "-f", "9223372036854775808"}, "integer"},
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
			if strings.Count(out, "\n") != 1 {
				t.Errorf("%q: not one line: %q", args, out)
			}
		}
	}
	entries, _ := os.ReadDir(dir)
	if b, _ := os.ReadFile(file); len(entries) != 3 || string(b) != "mine" {
		t.Errorf("left behind or taken away: %v", entries)
	}
}

// The connection is not where the log goes, by whatever number.
func TestConnectionIsLog(t *testing.T) {
	for _, fd := range []int{0, 1, 2, 3, 9} {
		for _, mode := range []string{"-n", "--log-level=info"} {
			ours, theirs := helpertest.SocketPair(t)
			status, _ := helpertest.Run(t, helpertest.Command{Path: "/bin/sh", Files: []*os.File{theirs},
				Args: []string{"-c", fmt.Sprintf(`[ %d = 2 ] || exec %[1]d<&3; exec 2>&3; exec "$@"`, fd), "sh",
					helpertest.Ours(t), mode, "-p", t.TempDir(), "-f", strconv.Itoa(fd)}})
			said, err := io.ReadAll(ours)
			if status != 1 || err != nil || !strings.Contains(string(said), "that is stderr") {
				t.Errorf("--fd %d %s: status %d, %q, %v", fd, mode, status, said, err)
			}
			ours.Close()
		}
	}
}

// The command returns when the name takes connections, and keeps nothing of
// its caller's.
func TestDaemon(t *testing.T) {
	daemon := func(w helpertest.Way) (reason string) {
		if w.Foreground || w.FD {
			return "it is not a daemon with a name"
		}
		return ""
	}
	helpertest.EachWay(t, daemon, func(t *testing.T, way helpertest.Way) {
		uid, gid := uint32(65534), uint32(65533)
		if way.Rootless {
			uid, gid = helpertest.Someone, helpertest.SomeRange+999
		}
		h := way.Start(t, helpertest.Setup{
			Wrap: []string{"sh", "-c", `umask 777; exec "$@"`, "sh"},
			Args: []string{
				"--path=export", "--socket", "socket", fmt.Sprint("--uid=", uid), fmt.Sprint("-g", gid),
				"--pidfile", "pid",
			},
			Env: []string{"SECRET=of the caller"},
		})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
		var st unix.Stat_t
		if err := unix.Lstat(h.Name, &st); err != nil ||
			st.Uid != uid || st.Gid != gid || st.Mode != unix.S_IFSOCK|0o660 {
			t.Errorf("name: %v, %d:%d, mode %o", err, st.Uid, st.Gid, st.Mode)
		}
		if session, tty := helpertest.Session(t, h.PID); session != h.PID || tty != 0 {
			t.Errorf("session %d of %d, tty %d", session, h.PID, tty)
		}
		if cwd, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", h.PID)); cwd != "/" {
			t.Errorf("works in %s", cwd)
		}
		if env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", h.PID)); strings.Contains(string(env), "SECRET") {
			t.Error("keeps the environment")
		}
		for fd, to := range helpertest.FDs(t, h.PID) {
			if fd < 3 && to != "/dev/null" && !strings.HasPrefix(to, "pipe:") {
				t.Errorf("descriptor %d is %s", fd, to)
			}
		}
		h.Signal(syscall.SIGTERM)
		c.WantEOF()
		helpertest.Eventually(t, "names and pidfile go", func() bool {
			entries, _ := os.ReadDir(h.Dir)
			return len(entries) == 1
		})
	})
}

// named is why a test of names does not apply in a way, or "".
func named(w helpertest.Way) (reason string) {
	if w.FD {
		return "it has no name"
	}
	return ""
}

// QEMU unlinks the name; no connection is refused for that.
func TestNameComesBack(t *testing.T) {
	helpertest.EachWay(t, named, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{})
		for i := range 200 {
			c := h.Dial()
			c.Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
			c.Close()
			var err error
			if i%2 == 0 {
				err = os.Remove(h.Name)
			} else {
				err = os.Rename(h.Name, h.Name+".old")
			}
			if err != nil {
				t.Fatal(err)
			}
			helpertest.Eventually(t, "the name is back", func() bool { _, err := os.Lstat(h.Name); return err == nil })
		}
	})
}

// A dead socket is replaced; of two helpers on one name, one wins.
func TestClaims(t *testing.T) {
	helpertest.EachWay(t, named, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{})
		same := helpertest.Setup{Dir: h.Dir}
		if status, out := way.Refused(t, same); status != 1 || !strings.Contains(out, "in use") {
			t.Errorf("second helper: status %d, %q", status, out)
		}
		c := h.Dial()
		c.Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
		c.Close() // its server would stay for it
		h.Signal(syscall.SIGKILL)
		h.Wait()
		way.Start(t, same).Dial().Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
	})
}

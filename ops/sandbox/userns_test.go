package sandbox_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// What /etc/subuid and /etc/subgid give to someone, if anything.
const (
	withRange   = "someone:700000:65536\n"
	numberRange = "54321:700000:65536\n"
	noRange     = "other:700000:65536\n"
	wrongRange  = "someone:4294967290:65536\n" // that newuidmap refuses

	someRange = helpertest.SomeRange
)

const someone = helpertest.Someone

// asSomeone returns the command that runs args as someone.
func asSomeone(t *testing.T, ranges string, args ...string) helpertest.Command {
	t.Helper()
	args = helpertest.AsSomeone(t, ranges, args...)
	return helpertest.Command{Path: args[0], Args: args[1:]}
}

// exportOf returns a directory that someone shares, in one where it may make a
// socket.
func exportOf(t *testing.T) string {
	t.Helper()
	dir := export(t)
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chown(d, someone, someone); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// rootless is a helper that someone has started in the foreground.
type rootless struct {
	*helpertest.Process
	dir, name string
}

func startRootless(t *testing.T, ranges string, options ...string) *rootless {
	t.Helper()
	dir := exportOf(t)
	r := &rootless{dir: dir, name: filepath.Join(filepath.Dir(dir), "s")}
	r.Process = helpertest.Start(t, asSomeone(t, ranges,
		append([]string{helpertest.Ours(t), "-n", "-p", dir, "-s", r.name, "--pidfile", r.pidfile()}, options...)...))
	helpertest.AwaitName(t, r.Process, r.name)
	return r
}

func (r *rootless) pidfile() string { return r.name + ".pid" }

func (r *rootless) supervisor(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(r.pidfile())
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func (r *rootless) server(t *testing.T) (pid int) {
	t.Helper()
	supervisor := r.supervisor(t)
	helpertest.Eventually(t, "the supervisor has a server", func() bool {
		pids := helpertest.Children(supervisor)
		if len(pids) == 1 {
			pid = pids[0]
		}
		return len(pids) == 1
	})
	return pid
}

func (r *rootless) owner(t *testing.T, path string) [2]uint32 {
	t.Helper()
	return owner(t, filepath.Join(r.dir, path))
}

func request(path string, id uint32) codec.Request {
	return codec.Request{Path: helpertest.Path(path), Target: helpertest.Path("target"), UID: id, GID: id,
		Mode: 0o640 | unix.S_IFREG, Flags: unix.O_CREAT | unix.O_RDWR, Name: helpertest.Path("user.x")}
}

// makers are the requests that make a file for its owner.
var makers = []codec.Type{codec.Create, codec.Mknod, codec.Mkdir, codec.Symlink}

// makeAll makes a file by each of them.
func makeAll(t *testing.T, c *helpertest.Client, id uint32, want unix.Errno) (names []string) {
	t.Helper()
	for _, m := range makers {
		name := fmt.Sprintf("/%v.%d", m, id)
		if a := c.Want(want, m, request(name, id)); a.File != nil {
			a.File.Close()
		}
		names = append(names, name)
	}
	return names
}

var sandboxes = []string{"namespace", "chroot", "none"}

// The guest's root is someone, its other users are from someone's range.
func TestRootlessRange(t *testing.T) {
	t.Parallel()
	for _, sandbox := range sandboxes {
		t.Run(sandbox, func(t *testing.T) {
			t.Parallel()
			r := startRootless(t, withRange, "--sandbox="+sandbox)
			c := helpertest.Dial(t, r.name)
			owners := map[uint32]uint32{
				0: someone, 1: someRange, 1000: someRange + 999, 65534: someRange + 65533, 65536: someRange + 65535,
			}
			for id, host := range owners {
				for _, name := range makeAll(t, c, id, 0) {
					if got := r.owner(t, name); got != [2]uint32{host, host} {
						t.Errorf("%s is of %v on the host, not %d", name, got, host)
					}
				}
			}
			c.Want(0, codec.Mkdir, request("/given", 0))
			for id, host := range owners {
				c.Want(0, codec.Chown, request("/given", id))
				if got := r.owner(t, "given"); got != [2]uint32{host, host} {
					t.Errorf("given to %d it is of %v, not %d", id, got, host)
				}
			}
			makeAll(t, c, 65537, unix.EPERM)
			makeAll(t, c, ^uint32(0), unix.EINVAL)
			c.Want(unix.EPERM, codec.Chown, request("/given", 65537))
			c.Want(unix.EPERM, codec.Chown, codec.Request{Path: helpertest.Path("/given"), UID: 0, GID: 65537})
			c.Want(0, codec.Chown, codec.Request{Path: helpertest.Path("/given"), UID: ^uint32(0), GID: 0})
			if r.Logged("EPERM") {
				t.Errorf("warns:\n%s", r.Output())
			}
		})
	}
}

func TestRootlessNumberInSubuid(t *testing.T) {
	t.Parallel()
	r := startRootless(t, numberRange)
	makeAll(t, helpertest.Dial(t, r.name), 1000, 0)
}

// Without a range there is the guest's root alone, and a word about that.
func TestRootlessAlone(t *testing.T) {
	t.Parallel()
	for ranges, says := range map[string]string{noRange: "someone:100000:65536", wrongRange: "newuidmap"} {
		for _, sandbox := range sandboxes {
			t.Run(fmt.Sprintf("%.5s %s", ranges, sandbox), func(t *testing.T) {
				t.Parallel()
				r := startRootless(t, ranges, "--sandbox="+sandbox)
				c := helpertest.Dial(t, r.name)
				for _, name := range makeAll(t, c, 0, 0) {
					if got := r.owner(t, name); got != [2]uint32{someone, someone} {
						t.Errorf("%s is of %v on the host", name, got)
					}
				}
				for _, name := range makeAll(t, c, 1000, unix.EPERM) {
					if _, err := os.Lstat(filepath.Join(r.dir, name)); err == nil {
						t.Errorf("%s is there", name)
					}
				}
				const none = ^uint32(0)
				for _, ids := range [][2]uint32{{1000, 1000}, {0, 1000}, {1000, 0}, {1000, none}, {none, 24}} {
					q := codec.Request{Path: helpertest.Path("/MKDIR.0"), UID: ids[0], GID: ids[1]}
					c.Want(unix.EPERM, codec.Chown, q)
					q = codec.Request{Path: helpertest.Path("/d"), UID: ids[0] & 1023, GID: ids[1] & 1023}
					c.Want(unix.EPERM, codec.Mkdir, q)
				}
				c.Want(unix.ENOENT, codec.Chown, request("/none", 1000))
				c.Want(0, codec.Chown, request("/MKDIR.0", 0))
				if strings.Count(r.Output(), "EPERM") != 1 || !r.Logged(says) {
					t.Errorf("does not say once that there is no range:\n%s", r.Output())
				}
			})
		}
	}
}

// Files of others are strangers': they seem to be nobody's, and the helper may
// do to them what someone may.
func TestRootlessStrangers(t *testing.T) {
	t.Parallel()
	r := startRootless(t, withRange)
	secret := filepath.Join(r.dir, "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := helpertest.Dial(t, r.name)
	const overflow = 65534 // kernel.overflowuid
	if a := c.Want(0, codec.Lstat, request("/secret", 0)); len(a.Payload) < 36 ||
		binary.NativeEndian.Uint32(a.Payload[28:]) != overflow ||
		binary.NativeEndian.Uint32(a.Payload[32:]) != overflow {
		t.Errorf("a stranger's file is of %x", a.Payload)
	}
	c.Want(unix.EACCES, codec.Open, codec.Request{Path: helpertest.Path("/secret")})
	c.Want(unix.EPERM, codec.Chmod, request("/secret", 0))
	c.Want(unix.EPERM, codec.Chown, request("/secret", 0))
	c.Want(unix.EPERM, codec.Mknod, codec.Request{
		Path: helpertest.Path("/dev"), Mode: unix.S_IFCHR | 0o600, Rdev: 0x103,
	})
	c.Want(unix.EPERM, codec.Lsetxattr, codec.Request{Path: helpertest.Path("/"), Name: helpertest.Path("trusted.x")})
	c.Want(0, codec.Remove, request("/secret", 0)) // it is someone's directory
}

// Both processes have a root that is someone's, and what a root's have.
func TestRootlessThreads(t *testing.T) {
	t.Parallel()
	for ranges, groups := range map[string]string{withRange: "", noRange: "4 24"} {
		r := startRootless(t, ranges)
		makeAll(t, helpertest.Dial(t, r.name), 0, 0)
		for pid, want := range map[int]capSets{
			r.supervisor(t): {CapPrm: namespace, CapEff: names, CapBnd: namespace},
			r.server(t):     {CapPrm: seven, CapEff: seven},
		} {
			for _, st := range helpertest.Threads(t, pid) {
				if got := threadCaps(t, st); got != want {
					t.Errorf("%s: %x, want %x", st["Name"], got, want)
				}
				if st["NoNewPrivs"] != "1" || st["Seccomp"] != "2" || st["Groups"] != groups ||
					strings.Fields(st["Uid"])[0] != strconv.Itoa(someone) {
					t.Errorf("%d: NoNewPrivs %s, Seccomp %s, groups %q, uid %s",
						pid, st["NoNewPrivs"], st["Seccomp"], st["Groups"], st["Uid"])
				}
			}
		}
		points, _ := mountpoints(t, r.server(t))
		if !slices.Equal(points, []string{"/"}) {
			t.Errorf("the server has mounts at %v", points)
		}
		// Whatever the sets are called, none is one of the host's.
		for _, pid := range []int{r.supervisor(t), r.server(t)} {
			mine, _ := os.Readlink("/proc/self/ns/user")
			if its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pid)); err != nil || its == mine {
				t.Errorf("%d is in the host's user namespace: %v", pid, err)
			}
		}
	}
}

// To its starter a rootless helper is as any: a killed server is followed by
// another, signals get where they should.
func TestRootlessLife(t *testing.T) {
	t.Parallel()
	r := startRootless(t, withRange)
	if got := owner(t, r.name); got != [2]uint32{someone, someone} {
		t.Errorf("the socket is of %v", got)
	}
	a, b := helpertest.Dial(t, r.name), helpertest.Dial(t, r.name)
	next := func(sig syscall.Signal, pid, old int) {
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		helpertest.Eventually(t, "another server", func() bool { return r.server(t) != old })
		for _, c := range []*helpertest.Client{a, b} {
			c.Want(0, codec.Lstat, request("/", 0))
		}
	}
	next(syscall.SIGKILL, r.server(t), r.server(t))
	next(syscall.SIGHUP, r.supervisor(t), r.server(t))
	if !signal.Ignored(syscall.SIGHUP) { // by nohup(1), which is to keep the helper
		next(syscall.SIGHUP, r.PID, r.server(t)) // what someone has started itself passes it on
	}
	makeAll(t, a, 1000, 0)
	r.Signal(syscall.SIGTERM)
	if status := r.Wait(); status != 0 {
		t.Errorf("SIGTERM: status %d", status)
	}
	if entries, err := os.ReadDir(filepath.Dir(r.name)); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// Nothing outlives the process that someone has started.
func TestRootlessKilled(t *testing.T) {
	t.Parallel()
	r := startRootless(t, withRange)
	supervisor, server := r.supervisor(t), r.server(t)
	r.Signal(syscall.SIGKILL)
	r.Wait()
	helpertest.Eventually(t, "all have ended", func() bool {
		return helpertest.Ended(supervisor) && helpertest.Ended(server)
	})
	if _, err := os.Lstat(r.name); err == nil {
		t.Error("the name stands")
	}
	r = startRootless(t, withRange)
	if err := syscall.Kill(r.supervisor(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if status := r.Wait(); status != 1 || !r.Logged("killed") {
		t.Errorf("the supervisor is killed: status %d, %q", status, r.Output())
	}
}

// The inherited socket, and any of its numbers.
func TestRootlessFD(t *testing.T) {
	t.Parallel()
	for _, fd := range []int{0, 3, 7} {
		dir := exportOf(t)
		ours, theirs := helpertest.SocketPair(t)
		cmd := asSomeone(t, withRange, "sh", "-c", fmt.Sprintf(`exec %d<&3 "$@"`, fd), "sh",
			helpertest.Ours(t), "-n", "-p", dir, "-f", strconv.Itoa(fd))
		cmd.Files = []*os.File{theirs}
		p := helpertest.Start(t, cmd)
		c := helpertest.NewClient(t, ours)
		makeAll(t, c, 1000, 0)
		c.Close()
		if status := p.Wait(); status != 0 {
			t.Errorf("--fd %d: status %d\n%s", fd, status, p.Output())
		}
	}
}

func TestRootlessReadOnly(t *testing.T) {
	t.Parallel()
	r := startRootless(t, withRange, "--readonly")
	c := helpertest.Dial(t, r.name)
	makeAll(t, c, 0, unix.EROFS)
	c.Want(0, codec.Lstat, request("/", 0))
	if _, options := mountpoints(t, r.server(t)); !slices.Contains(strings.Split(options["/"], ","), "ro") {
		t.Errorf("the server's mount is %s", options["/"])
	}
}

// What the host mounts and unmounts below the export while it is served comes
// and goes there as well.
func TestRootlessMounts(t *testing.T) {
	t.Parallel()
	dir := exportOf(t)
	mount(t, dir)
	sub := filepath.Join(dir, "sub")
	if err := errors.Join(unix.Mount("", dir, "", unix.MS_SHARED, ""), os.Mkdir(sub, 0o755)); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(filepath.Dir(dir), "s")
	p := helpertest.Start(t, asSomeone(t, withRange, helpertest.Ours(t), "-n", "-p", dir, "-s", name))
	helpertest.AwaitName(t, p, name)
	c := helpertest.Dial(t, name)
	mount(t, sub)
	if err := os.Mkdir(filepath.Join(sub, "late"), 0o755); err != nil {
		t.Fatal(err)
	}
	answers := func(errno unix.Errno) func() bool {
		return func() bool {
			a, err := c.TryDo(codec.Lstat, request("/sub/late", 0))
			if err != nil {
				t.Fatal(err)
			}
			return a.Errno == errno
		}
	}
	helpertest.Eventually(t, "the guest has what the host mounts", answers(0))
	if err := unix.Unmount(sub, 0); err != nil {
		t.Errorf("the helper keeps what the host unmounts: %v", err)
	}
}

// What is wrong is told as to root, in one line.
func TestRootlessRefusals(t *testing.T) {
	t.Parallel()
	dir := exportOf(t)
	name, secret := filepath.Join(filepath.Dir(dir), "s"), filepath.Join(dir, "secret")
	if err := os.Mkdir(secret, 0o700); err != nil {
		t.Fatal(err)
	}
	helper := func(args ...string) []string { return append([]string{helpertest.Ours(t), "-p", dir}, args...) }
	for _, c := range []struct {
		ranges string
		args   []string
		says   string
	}{
		{withRange, helper("-s", name, "-u", "64055"), "--uid 64055"},
		{withRange, helper("-s", name, "-g", "0"), "--gid 0"},
		{withRange, helper("-s", dir+"/none/s"), "no such file"},
		{withRange, helper("-f", "7"), "not an open descriptor"},
		{withRange, helper("-s", "/"), "names a directory"},
		{withRange, helper("-p", dir+"/none", "-s", name), "no such file"},
		{withRange, helper("-p", secret, "-s", name), "permission denied"},
		{withRange, helper("-s", name, "-u", "-1"), "not a user id"},
		// Where the system lets nobody make user namespaces.
		{noRange, append([]string{
			"unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c",
			`echo 0 >/proc/sys/user/max_user_namespaces && ` +
				`exec setpriv --ambient-caps=-all --inh-caps=-all "$@"`, "sh",
		}, helper("-s", name)...), "user.max_user_namespaces"},
	} {
		for _, mode := range []string{"-n", "--log-level=info"} {
			status, out := helpertest.Run(t, asSomeone(t, c.ranges, append(c.args, mode)...))
			last := out[strings.LastIndex(strings.TrimRight(out, "\n"), "\n")+1:]
			if status != 1 || !strings.HasPrefix(last, "virtfs-proxy-helper: ") || !strings.Contains(last, c.says) {
				t.Errorf("%q: status %d, said %q, not %q", c.args, status, out, c.says)
			}
			if mode != "-n" && strings.Count(out, "\n") != 1 {
				t.Errorf("%q: not one line: %q", c.args, out)
			}
		}
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func owner(t *testing.T, path string) [2]uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return [2]uint32{st.Uid, st.Gid}
}

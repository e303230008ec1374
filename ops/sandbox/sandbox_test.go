package sandbox_test

import (
	"fmt"
	"os"
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

func TestMain(m *testing.M) {
	if len(os.Args) > 2 {
		switch os.Args[1] {
		case inContainer:
			enterContainer(os.Args[2:])
		case inService:
			enterService(os.Args[2], os.Args[3], os.Args[4:])
		}
	}
	helpertest.Main(m)
}

const (
	seven     = 0x80000db
	names     = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER
	namespace = seven | 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SETPCAP | 1<<unix.CAP_SYS_NICE
	chroot    = namespace | 1<<unix.CAP_SYS_CHROOT
)

// capSets are the sets of a thread in /proc.
type capSets struct{ CapInh, CapPrm, CapEff, CapBnd, CapAmb uint64 }

func threadCaps(t *testing.T, st map[string]string) (c capSets) {
	t.Helper()
	for set, v := range map[string]*uint64{
		"CapInh": &c.CapInh, "CapPrm": &c.CapPrm, "CapEff": &c.CapEff, "CapBnd": &c.CapBnd, "CapAmb": &c.CapAmb,
	} {
		var err error
		if *v, err = strconv.ParseUint(st[set], 16, 64); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// export returns a directory to share, for which the helper has to know
// nothing of this machine.
func export(t *testing.T) string {
	t.Helper()
	helpertest.NeedRoot(t)
	dir := filepath.Join(helpertest.ShortDir(t), "export")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// listen starts a helper of dir as a root that has everything that a shell
// has, and makes it do a bit of all.
func listen(t *testing.T, dir string, options ...string) (*helpertest.Process, string) {
	t.Helper()
	name := filepath.Join(helpertest.ShortDir(t), "s")
	p := helpertest.Start(t, helpertest.Command{
		Path: helpertest.Ours(t),
		Args: append([]string{"-n", "-p", dir, "-s", name, "-u", "0", "-g", "0"}, options...),
		Cred: &syscall.Credential{Groups: []uint32{4, 24}},
	})
	helpertest.AwaitName(t, p, name)
	for i := range 20 {
		c := helpertest.Dial(t, name)
		c.Want(0, codec.Mkdir, codec.Request{Path: helpertest.Path(fmt.Sprintf("/%d", i)), UID: 1000, GID: 1000})
		c.Want(0, codec.Remove, codec.Request{Path: helpertest.Path(fmt.Sprintf("/%d", i))})
		os.Remove(name)
		helpertest.Eventually(t, "the name is back", func() bool { _, err := os.Lstat(name); return err == nil })
	}
	return p, name
}

// exercise makes a helper do a bit of all.
func exercise(t *testing.T, h *helpertest.Helper) {
	t.Helper()
	c := h.Dial()
	for i := range 20 {
		c.Want(0, codec.Mkdir, codec.Request{Path: helpertest.Path(fmt.Sprintf("/%d", i)), UID: 1000, GID: 1000})
		c.Want(0, codec.Remove, codec.Request{Path: helpertest.Path(fmt.Sprintf("/%d", i))})
		if h.Name == "" {
			continue
		}
		c = h.Dial()
		os.Remove(h.Name)
		helpertest.Eventually(t, "the name is back", func() bool { _, err := os.Lstat(h.Name); return err == nil })
	}
}

// Every thread of both processes.
func TestThreads(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{})
		exercise(t, h)
		supervisor := map[string]uint64{"namespace": namespace, "chroot": chroot}[way.Sandbox]
		for pid, want := range map[int]capSets{
			h.PID:      {CapPrm: supervisor, CapEff: names, CapBnd: supervisor},
			h.Server(): {CapPrm: seven, CapEff: seven},
		} {
			for _, st := range helpertest.Threads(t, pid) {
				if got := threadCaps(t, st); got != want {
					t.Errorf("%s: %x, want %x", st["Name"], got, want)
				}
				uid := strings.Fields(st["Uid"])[0]
				if st["NoNewPrivs"] != "1" || st["Seccomp"] != "2" || st["Groups"] != "" ||
					uid != strconv.Itoa(way.UID()) {
					t.Errorf("%d: NoNewPrivs %s, Seccomp %s, groups %q, uid %s",
						pid, st["NoNewPrivs"], st["Seccomp"], st["Groups"], uid)
				}
			}
		}
	})
}

// Without a sandbox both processes are as they were started.
func TestNoSandbox(t *testing.T) {
	p, _ := listen(t, export(t), "--sandbox=none", "--seccomp=none")
	mine := threadCaps(t, helpertest.Status(t, "self"))
	for _, pid := range []int{p.PID, p.Server()} {
		// Threads of the server that have made files have less in effect.
		st := helpertest.Status(t, strconv.Itoa(pid))
		if got := threadCaps(t, st); got.CapBnd != mine.CapBnd || pid == p.PID && got != mine ||
			st["Groups"] != "4 24" || st["NoNewPrivs"] != "0" {
			t.Errorf("%x, groups %q: not as started", got, st["Groups"])
		}
	}
}

var namespaces = []string{"mnt", "net", "ipc", "uts", "pid"}

// own returns which namespaces of a process are not those of another.
func own(t *testing.T, pid, other int) (kinds []string) {
	t.Helper()
	for _, kind := range namespaces {
		mine, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", other, kind))
		if err != nil {
			t.Fatal(err)
		}
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err != nil {
			t.Fatal(err)
		}
		if its != mine {
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// mountpoints returns where a process has mounts, and their options.
func mountpoints(t *testing.T, pid int) (points []string, options map[string]string) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		t.Fatal(err)
	}
	options = map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		points, options[f[4]] = append(points, f[4]), f[5]
	}
	slices.Sort(points)
	return points, options
}

// The server has the export and what is mounted below it, no network, and no
// other process.
func TestNamespaces(t *testing.T) {
	confined := func(w helpertest.Way) (reason string) {
		if w.Sandbox != "namespace" {
			return "it has no namespaces"
		}
		return ""
	}
	helpertest.EachWay(t, confined, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: func(t *testing.T, export string) {
			mount(t, export)
			sub := filepath.Join(export, "sub")
			if err := os.Mkdir(sub, 0o755); err != nil {
				t.Fatal(err)
			}
			mount(t, sub)
			if err := os.Chown(sub, way.UID(), way.UID()); err != nil {
				t.Fatal(err)
			}
		}})
		server := h.Server()
		// The test starts some with other mounts.
		othersMounts := way.Rootless || !way.Foreground
		if got := own(t, h.PID, os.Getpid()); got != nil &&
			!(slices.Equal(got, []string{"mnt"}) && othersMounts) {
			t.Errorf("the supervisor has %v of its own", got)
		}
		if got := own(t, server, h.PID); !slices.Equal(got, namespaces) {
			t.Errorf("the server has only %v of its own", got)
		}
		points, options := mountpoints(t, server)
		if !slices.Equal(points, []string{"/", "/sub"}) {
			t.Errorf("the server has mounts at %v", points)
		}
		for point, o := range options {
			for _, want := range []string{"nosuid", "nodev", "noexec", "rw"} {
				if !slices.Contains(strings.Split(o, ","), want) {
					t.Errorf("the server's %s is %s, not %s", point, o, want)
				}
			}
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", server))
		if err != nil || strings.Count(string(b), ":") != 1 || !strings.Contains(string(b), "lo:") {
			t.Errorf("the server's network: %v\n%s", err, b)
		}
		h.Dial().Want(0, codec.Mkdir, codec.Request{Path: helpertest.Path("/sub/dir")})
		if _, err := os.Stat(filepath.Join(h.Export, "sub/dir")); err != nil {
			t.Error(err)
		}
	})
}

// What only a chroot gives up: the namespaces.
func TestChroot(t *testing.T) {
	check := func(t *testing.T, supervisor, server int, dir string) {
		t.Helper()
		if got := own(t, server, supervisor); got != nil {
			t.Errorf("the server has %v of its own", got)
		}
		for tid := range helpertest.Threads(t, server) {
			if root, _ := os.Readlink(fmt.Sprintf("/proc/%d/task/%s/root", server, tid)); root != dir {
				t.Errorf("a thread has the root %s", root)
			}
		}
	}
	dir := export(t)
	p, _ := listen(t, dir, "--sandbox=none")
	check(t, p.PID, p.Server(), dir)
	changed := func(w helpertest.Way) (reason string) {
		if w.Sandbox != "chroot" {
			return "it has namespaces"
		}
		return ""
	}
	helpertest.EachWay(t, changed, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{})
		exercise(t, h)
		check(t, h.PID, h.Server(), h.Export)
	})
}

// What the host mounts and unmounts below the export while it is served is seen
// soon; what the server does to its mounts stays with it.
func TestMountsComeOneWay(t *testing.T) {
	dir := export(t)
	mount(t, dir)
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	// Other tests that run now have mounts in other temporary directories.
	hosts := func() []string {
		points, _ := mountpoints(t, os.Getpid())
		return slices.DeleteFunc(points, func(p string) bool {
			return strings.HasPrefix(p, os.TempDir()) && !strings.HasPrefix(p, dir)
		})
	}
	before := hosts()
	p, name := listen(t, dir)
	if after := hosts(); !slices.Equal(after, before) {
		t.Errorf("the host's mounts were %v, are %v", before, after)
	}
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	mount(t, sub)
	if err := os.Mkdir(filepath.Join(sub, "late"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := helpertest.Dial(t, name)
	is := func(want unix.Errno) func() bool {
		return func() bool {
			return c.Do(codec.Lstat, codec.Request{Path: helpertest.Path("/sub/late")}).Errno == want
		}
	}
	helpertest.Eventually(t, "the mount appears", is(0))
	if err := unix.Unmount(sub, 0); err != nil {
		t.Errorf("the server keeps what the host unmounts: %v", err)
	}
	helpertest.Eventually(t, "the mount goes", is(unix.ENOENT))
	p.Signal(syscall.SIGTERM)
	p.Wait()
	if after := hosts(); !slices.Equal(after, before) {
		t.Errorf("the host's mounts were %v, are %v", before, after)
	}
}

// Where all of the host's mounts are shared, as systemd makes them.
func TestSharedHost(t *testing.T) {
	dir := export(t)
	name := filepath.Join(helpertest.ShortDir(t), "s")
	p := helpertest.Start(t, helpertest.Command{
		Path: "/usr/bin/unshare",
		Args: []string{"--mount", "--propagation", "private", "sh", "-c", `mount --make-rshared / && exec "$@"`, "sh",
			helpertest.Ours(t), "-n", "-p", dir, "-s", name, "-u", "0", "-g", "0"},
	})
	helpertest.AwaitName(t, p, name)
	helpertest.Dial(t, name).Want(0, codec.Statfs, codec.Request{Path: helpertest.Path("/")})
	points, _ := mountpoints(t, p.PID)
	if mine, _ := mountpoints(t, os.Getpid()); !slices.Equal(points, mine) {
		t.Errorf("the host's mounts were %v, are %v", mine, points)
	}
	if points, _ := mountpoints(t, p.Server()); !slices.Equal(points, []string{"/"}) {
		t.Errorf("the server's mounts are %v", points)
	}
}

// Without the right to make namespaces the start fails, and says what helps.
func TestNoNamespaces(t *testing.T) {
	dir := export(t)
	name := filepath.Join(filepath.Dir(dir), "s")
	start := func(mode string, drop string) (int, string) {
		return helpertest.Run(t, helpertest.Command{
			Path: "/usr/bin/setpriv",
			Args: []string{"--bounding-set", drop,
				helpertest.Ours(t), "-p", dir, "-s", name, "-u", "0", "-g", "0", "--sandbox=" + mode},
		})
	}
	if status, out := start("namespace", "-sys_admin"); status != 1 ||
		!strings.Contains(out, "SYS_ADMIN") || !strings.Contains(out, "--sandbox=chroot") {
		t.Errorf("status %d, %q", status, out)
	}
	if status, out := start("chroot", "-sys_admin,-sys_chroot"); status != 1 || !strings.Contains(out, "SYS_CHROOT") {
		t.Errorf("status %d, %q", status, out)
	}
}

// mount mounts a tmpfs for the test.
func mount(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount("none", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// A service may be started with few descriptors: each process gets what it
// needs, or says what it lacks.
func TestDescriptors(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		start := func(limit string) *helpertest.Helper {
			lacks := `setpriv --bounding-set -sys_resource "$@"`
			if way.Rootless { // and so has it not
				lacks = `"$@"`
			}
			return way.Start(t, helpertest.Setup{
				Wrap: []string{"sh", "-c", "ulimit " + limit + " && exec " + lacks, "sh"},
			})
		}
		want := 1024 + 4*64 + 64
		if way.FD { // a single VM
			want = 1 + 4 + 64
		}
		h := start("-Sn 256")
		for _, pid := range []int{h.PID, h.Server()} {
			if got := maxFDs(t, pid); got < want {
				t.Errorf("may have %d descriptors, want %d", got, want)
			}
		}
		if h.Logged("LimitNOFILE") {
			t.Errorf("complains of enough descriptors:\n%s", h.Output())
		}
		if h := start("-n 256"); h.Logged("LimitNOFILE") == way.FD {
			t.Errorf("does not say that it has few descriptors, or says it of enough:\n%s", h.Output())
		}
	})
}

// maxFDs returns how many descriptors a process may have.
func maxFDs(t *testing.T, pid int) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(b), "Max open files")
	if _, err := fmt.Sscan(line, &n); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	return n
}

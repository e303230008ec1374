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

// mapped gives the guest's ids 0 to 1999 to the starter's from 1000 on.
var mapped = []string{"--translate-uid=map:0:1000:2000", "--translate-gid=map:0:1000:2000"}

// mappedRoot returns the test's number of the guest's root under mapped.
func mappedRoot(way helpertest.Way) int {
	if way.Rootless {
		return someRange + 999
	}
	return 1000
}

// With map: the server is in a user namespace with these ids alone, which changes
// nothing of its other walls, nor of its life under the supervisor.
func TestMappedServer(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Args: mapped})
		root := mappedRoot(way)
		helpertest.Eventually(t, "it says how the export's owner is mended", func() bool {
			return h.Logged(fmt.Sprintf("chown %d:%[1]d %s", root, h.Export))
		})
		if err := os.Chown(h.Export, root, root); err != nil {
			t.Fatal(err)
		}
		c := h.Dial()
		for _, id := range []uint32{0, 1000} {
			for _, name := range makeAll(t, c, id, 0) {
				want := [2]uint32{uint32(root) + id, uint32(root) + id}
				if got := owner(t, filepath.Join(h.Export, name)); got != want {
					t.Errorf("%s is of %v on the host, not %v", name, got, want)
				}
			}
		}
		makeAll(t, c, 2000, unix.EPERM)
		server := h.Server()
		for _, kind := range []string{"uid_map", "gid_map"} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", server, kind))
			got, want := strings.Fields(string(b)), []string{"0", strconv.Itoa(root), "2000"}
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s: %v, %v", kind, got, err)
			}
		}
		kinds := own(t, server, h.PID)
		supervisor := uint64(chroot)
		if way.Sandbox == "namespace" {
			supervisor = namespace
			if points, options := mountpoints(t, server); !slices.Equal(points, []string{"/"}) ||
				!strings.Contains(options["/"], "nosuid,nodev,noexec") || !slices.Equal(kinds, namespaces) {
				t.Errorf("the server has mounts at %v, %v, and of its own %v", points, options, kinds)
			}
		}
		for pid, want := range map[int]capSets{
			h.PID:  {CapPrm: supervisor, CapEff: names, CapBnd: supervisor},
			server: {CapPrm: seven, CapEff: seven},
		} {
			for _, st := range helpertest.Threads(t, pid) {
				if got := threadCaps(t, st); got != want || st["NoNewPrivs"] != "1" ||
					st["Seccomp"] != "2" || st["Groups"] != "" {
					t.Errorf("%s: %x, want %x; NoNewPrivs %s, Seccomp %s, groups %q",
						st["Name"], got, want, st["NoNewPrivs"], st["Seccomp"], st["Groups"])
				}
			}
		}
		if h.Logged("sparse traffic") {
			t.Errorf("the runtime's monitor is as it was:\n%s", h.Output())
		}
		next := func(sig unix.Signal, pid int) {
			old := h.Server()
			if err := unix.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
			c.Want(0, codec.Lstat, request("/", 0))
			helpertest.Eventually(t, "another server", func() bool {
				pids := h.Servers()
				return len(pids) == 1 && pids[0] != old
			})
			c.Want(0, codec.Chown, request("/CREATE.0", 1000))
		}
		next(unix.SIGKILL, server)
		next(unix.SIGHUP, h.PID)
		if way.Sandbox == "namespace" && way.FD { // it takes 5 s
			unix.Kill(h.Server(), unix.SIGSTOP)
			next(unix.SIGHUP, h.PID) // the supervisor can kill it
		}
	})
}

// An export that no id of the guest may enter is an error, with what mends it.
func TestMappedExportIsClosed(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		status, out := way.Refused(t, helpertest.Setup{Args: mapped, Fill: func(t *testing.T, export string) {
			if err := os.Chmod(export, 0o700); err != nil {
				t.Fatal(err)
			}
		}})
		root := mappedRoot(way)
		if status != 1 || !strings.Contains(out, "permission denied") ||
			!strings.Contains(out, fmt.Sprintf("chown %d:%[1]d /", root)) {
			t.Errorf("status %d\n%s", status, out)
		}
	})
}

// Ids that the starter has not can't be given to the guest.
func TestMappedIDsAreMissing(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"uid", "gid"} {
		for ranges, id := range map[string]int{withRange: 65536, noRange: 1} {
			if kind == "gid" && ranges == noRange {
				continue // TestMappedAlone
			}
			dir := exportOf(t)
			status, out := helpertest.Run(t, asSomeone(t, ranges, helpertest.Ours(t), "-p", dir, "-s",
				filepath.Join(filepath.Dir(dir), "s"), fmt.Sprintf("--translate-%s=map:5:%d:2", kind, id)))
			says := fmt.Sprintf("--translate-%s map:5:%d:2: this process has not all", kind, id)
			if status != 1 || !strings.Contains(out, says) || !strings.Contains(out, kind+"_map") {
				t.Errorf("%s: status %d, %q", ranges, status, out)
			}
		}
	}
}

// The kernel takes no range of ids across two of someone's: its own and the others.
func TestMappedAcrossRanges(t *testing.T) {
	t.Parallel()
	r := startRootless(t, withRange, "--translate-uid=map:100:0:50", "--translate-gid=map:0:0:50")
	c := helpertest.Dial(t, r.name)
	for id, host := range map[uint32]uint32{0: someone, 1: someRange, 49: someRange + 48} {
		name := fmt.Sprintf("/%d", id)
		c.Want(0, codec.Mkdir, codec.Request{Path: helpertest.Path(name), UID: 100 + id, GID: id})
		if got := r.owner(t, name); got != [2]uint32{host, host} {
			t.Errorf("%s is of %v, not %d", name, got, host)
		}
	}
	c.Want(unix.EPERM, codec.Mkdir, codec.Request{Path: helpertest.Path("/x"), UID: 150, GID: 0})
}

// Without a range someone can map itself alone, and not its group, as it can't leave
// the others that it has.
func TestMappedAlone(t *testing.T) {
	t.Parallel()
	r := startRootless(t, noRange, "--translate-uid=map:7:0:1")
	c := helpertest.Dial(t, r.name)
	c.Want(0, codec.Mkdir, codec.Request{Path: helpertest.Path("/dir"), UID: 7, GID: 0})
	if got := r.owner(t, "dir"); got != [2]uint32{someone, someone} {
		t.Errorf("dir is of %v", got)
	}
	makeAll(t, c, 0, unix.EPERM)
	dir := exportOf(t)
	status, out := helpertest.Run(t, asSomeone(t, noRange, helpertest.Ours(t), "-p", dir, "-s",
		filepath.Join(filepath.Dir(dir), "s"), "--translate-gid=map:8:0:1"))
	if status != 1 || !strings.Contains(out, "--translate-gid") || !strings.Contains(out, "/etc/subgid") {
		t.Errorf("its group: status %d, %q", status, out)
	}
}

// Without a sandbox the ids are walls all the same, and the host's root of the
// guest, as one of them, has what root of a user namespace has.
func TestMappedWithoutSandbox(t *testing.T) {
	t.Parallel()
	for _, uids := range []string{"map:0:1000:2000", "map:0:0:1", "map:5:0:1"} {
		dir := export(t)
		first := 0
		if uids == mapped[0][len("--translate-uid="):] {
			first = 1000
		}
		if err := os.Chown(dir, first, first); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(filepath.Dir(dir), "s")
		p := helpertest.Start(t, helpertest.Command{
			Path: helpertest.Ours(t),
			Args: []string{
				"-n", "-p", dir, "-s", name, "-u", "0", "-g", "0",
				"--sandbox=none", "--seccomp=none", "--translate-uid", uids, "--translate-gid", uids,
			},
			Cred: &syscall.Credential{Groups: []uint32{4, 24}},
		})
		helpertest.AwaitName(t, p, name)
		c := helpertest.Dial(t, name)
		a := c.Want(0, codec.Open, request("/opened", 0))
		a.File.Close()
		if got := owner(t, filepath.Join(dir, "opened")); got != [2]uint32{uint32(first), uint32(first)} {
			t.Errorf("%s: opened is of %v", uids, got)
		}
		c.Want(unix.EPERM, codec.Mknod, codec.Request{
			Path: helpertest.Path("/dev"), Mode: unix.S_IFCHR | 0o600, Rdev: 0x103,
		})
		if groups := helpertest.Status(t, fmt.Sprint(p.Server()))["Groups"]; groups != "" {
			t.Errorf("%s: the server has the groups %s", uids, groups)
		}
	}
}

// The user that servers run as must be able to execute the program.
func TestMappedProgramIsClosed(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(helpertest.Ours(t))
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(helpertest.ShortDir(t), "helper")
	if err := os.WriteFile(program, b, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := export(t)
	status, out := helpertest.Run(t, helpertest.Command{Path: program, Args: append([]string{
		"-p", dir, "-s", filepath.Join(filepath.Dir(dir), "s"), "-u", "0", "-g", "0"}, mapped...)})
	if status != 1 || !strings.Contains(out, "chmod a+rx") {
		t.Errorf("status %d, %q", status, out)
	}
}

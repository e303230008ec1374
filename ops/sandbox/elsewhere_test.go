package sandbox_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// startInUserNamespace starts our helper of dir as root of a new user namespace,
// in the test's mount namespace, as LXD and Incus do: the same words on its
// command line, the connection as descriptor 3.
func startInUserNamespace(t *testing.T, dir, setgroups string, options ...string) (
	*helpertest.Process, *helpertest.Client,
) {
	t.Helper()
	helpertest.NeedProgram(t, "setpriv", "util-linux")
	ours, theirs := helpertest.SocketPair(t)
	groups := map[string]string{"allow": "--clear-groups", "deny": "--keep-groups"}[setgroups]
	// Capabilities come with the namespace; root is there once the test has mapped it.
	const awaitRoot = `until grep -q . /proc/self/uid_map; do sleep 0.05; done; exec "$@"`
	p := helpertest.Start(t, helpertest.Command{
		Path: "/usr/bin/unshare",
		Args: append([]string{"--user", "--keep-caps", "sh", "-c", awaitRoot, "sh",
			"setpriv", "--reuid", "0", "--regid", "0", groups, "--inh-caps=-all", "--ambient-caps=-all",
			helpertest.Ours(t), "--nodaemon", "--fd", "3", "--path", dir}, options...),
		Files: []*os.File{theirs},
	})
	mine, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	helpertest.Eventually(t, "a user namespace", func() bool {
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", p.PID))
		return err == nil && its != mine
	})
	for _, write := range [][2]string{
		{"setgroups", setgroups},
		{"gid_map", fmt.Sprintf("0 %d 65536", someRange)},
		{"uid_map", fmt.Sprintf("0 %d 65536", someRange)},
	} {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", p.PID, write[0]), []byte(write[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
	return p, helpertest.NewClient(t, ours)
}

// Root of a user namespace that does not own its mount namespace.
func TestLauncherInUserNamespace(t *testing.T) {
	t.Parallel()
	for _, setgroups := range []string{"allow", "deny"} {
		t.Run("setgroups "+setgroups, func(t *testing.T) {
			t.Parallel()
			dir := export(t)
			if err := os.Chown(dir, someRange, someRange); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
				t.Fatal(err)
			}
			p, c := startInUserNamespace(t, dir, setgroups)
			for _, id := range []uint32{0, 1000} {
				for _, name := range makeAll(t, c, id, 0) {
					want := [2]uint32{someRange + id, someRange + id}
					if got := owner(t, filepath.Join(dir, name)); got != want {
						t.Errorf("%s is of %v on the host, not %v", name, got, want)
					}
				}
			}
			server := p.Server()
			if got := own(t, server, p.PID); !slices.Equal(got, namespaces) {
				t.Errorf("the server has only %v of its own", got)
			}
			if points, _ := mountpoints(t, server); !slices.Equal(points, []string{"/"}) {
				t.Errorf("the server has mounts at %v", points)
			}
			for pid, want := range map[int]capSets{
				p.PID:  {CapPrm: namespace, CapEff: names, CapBnd: namespace},
				server: {CapPrm: seven, CapEff: seven},
			} {
				for _, st := range helpertest.Threads(t, pid) {
					if got := threadCaps(t, st); got != want || st["NoNewPrivs"] != "1" || st["Seccomp"] != "2" {
						t.Errorf("%s: %x, want %x; NoNewPrivs %s, Seccomp %s",
							st["Name"], got, want, st["NoNewPrivs"], st["Seccomp"])
					}
				}
			}
			if err := unix.Kill(server, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			c.Want(0, codec.Lstat, request("/", 0)) // by another server
			c.Close()
			if status := p.Wait(); status != 0 {
				t.Errorf("status %d\n%s", status, p.Output())
			}
		})
	}
}

// It can make a user namespace in its own, for map:.
func TestMapsInUserNamespace(t *testing.T) {
	t.Parallel()
	exportOf := func(uid, gid int) string {
		dir := export(t)
		if err := errors.Join(os.Chown(dir, uid, gid), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for _, setgroups := range []string{"allow", "deny"} {
		dir := exportOf(someRange+1000, someRange+1000)
		p, c := startInUserNamespace(t, dir, setgroups, mapped...)
		for _, id := range []uint32{0, 1000} {
			for _, name := range makeAll(t, c, id, 0) {
				want := [2]uint32{someRange + 1000 + id, someRange + 1000 + id}
				if got := owner(t, filepath.Join(dir, name)); got != want {
					t.Errorf("setgroups %s: %s is of %v on the host, not %v", setgroups, name, got, want)
				}
			}
		}
		makeAll(t, c, 2000, unix.EPERM)
		c.Close()
		p.Wait()
		// One kind alone: the others are those of the outer namespace.
		dir = exportOf(someRange+1000, someRange)
		p, c = startInUserNamespace(t, dir, setgroups, mapped[0])
		c.Want(0, codec.Mkdir, codec.Request{Path: helpertest.Path("/dir"), UID: 5, GID: 65535})
		if got := owner(t, filepath.Join(dir, "dir")); got != [2]uint32{someRange + 1005, someRange + 65535} {
			t.Errorf("setgroups %s: dir is of %v", setgroups, got)
		}
		c.Want(unix.EPERM, codec.Mkdir, codec.Request{Path: helpertest.Path("/dir2"), UID: 5, GID: 65536})
		c.Close()
		p.Wait()
	}
}

// inContainer makes the test binary a process in a container: it executes its
// further arguments under Docker's default filter.
const inContainer = "-in-container"

// denied are the system calls that Docker's documentation names as blocked by
// its default profile without capabilities beyond the default ones, and those
// of the new interface to mounts.
var denied = []string{
	"acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "delete_module", "finit_module", "get_mempolicy",
	"init_module", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mbind", "mount",
	"move_pages", "open_by_handle_at", "perf_event_open", "personality", "pivot_root", "process_vm_readv",
	"process_vm_writev", "ptrace", "quotactl", "reboot", "request_key", "set_mempolicy", "setns", "settimeofday",
	"swapoff", "swapon", "umount2", "unshare", "userfaultfd",
	"fsconfig", "fsmount", "fsopen", "fspick", "mount_setattr", "move_mount", "open_tree",
}

// enterContainer executes args as Docker does.
func enterContainer(args []string) {
	const cloneNew = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
		unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	runtime.LockOSThread()
	err := seccomp.LoadFilter(seccomp.Filter{
		NoNewPrivs: false, // as Docker: only its root's capabilities are fewer
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls: []seccomp.SyscallGroup{{
				Action: seccomp.ActionErrno | seccomp.Action(unix.EPERM),
				Names:  denied,
				NamesWithCondtions: []seccomp.NameWithConditions{{
					Name: "clone",
					Conditions: []seccomp.Condition{{
						Argument: 0, Operation: seccomp.BitsSet, Value: cloneNew,
					}},
				}},
			}, {
				Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS),
				Names:  []string{"clone3"},
			}},
		},
	})
	if err == nil {
		err = syscall.Exec(args[0], args, os.Environ())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(99)
}

// dockerCaps are the capabilities of a container's root.
const dockerCaps = "-all,+chown,+dac_override,+fsetid,+fowner,+mknod,+net_raw,+setgid,+setuid,+setfcap,+setpcap," +
	"+net_bind_service,+sys_chroot,+kill,+audit_write"

// container returns the command that runs our helper of dir in a container.
func container(t *testing.T, caps, dir string, options ...string) helpertest.Command {
	t.Helper()
	helpertest.NeedProgram(t, "setpriv", "util-linux")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return helpertest.Command{Path: self, Args: append([]string{inContainer,
		"/usr/bin/setpriv", "--bounding-set", caps,
		helpertest.Ours(t), "-p", dir, "-s", filepath.Join(filepath.Dir(dir), "s"), "-u", "0", "-g", "0",
	}, options...)}
}

// Under Docker's default profile: no namespaces, which is said with the remedy;
// a chroot with all that it promises, but for paths that take a working directory.
func TestContainer(t *testing.T) {
	for _, caps := range []string{dockerCaps, "+all"} { // as --cap-add=ALL, were that not another profile
		dir := export(t)
		status, out := helpertest.Run(t, container(t, caps, dir))
		if status != 1 || !strings.Contains(out, "--sandbox=chroot") || strings.Count(out, "\n") != 1 {
			t.Errorf("%s: status %d, %q", caps, status, out)
		}
	}
	// Nor user namespaces, which is said with another remedy.
	dir := export(t)
	status, out := helpertest.Run(t, container(t, dockerCaps, dir, "--sandbox=chroot", mapped[1]))
	if status != 1 || !strings.Contains(out, "leave map: out") || !strings.Contains(out, "--translate-gid") ||
		strings.Count(out, "\n") != 1 {
		t.Errorf("with map: status %d, %q", status, out)
	}
	p := helpertest.Start(t, container(t, dockerCaps, dir, "-n", "--sandbox=chroot"))
	name := filepath.Join(filepath.Dir(dir), "s")
	helpertest.AwaitName(t, p, name)
	if !p.Logged("no detached /proc/self/fd") {
		t.Errorf("silent about what it can't do:\n%s", p.Output())
	}
	c := helpertest.Dial(t, name)
	makeAll(t, c, 1000, 0)
	deep := deepPath(t, c)
	for _, op := range []codec.Type{
		codec.Statfs, codec.Truncate, codec.Lgetxattr, codec.Llistxattr, codec.Lsetxattr, codec.Lremovexattr,
	} {
		r := request(deep, 0)
		r.Flags = 0
		c.Want(unix.ENAMETOOLONG, op, r)
	}
	c.Want(0, codec.Lstat, request(deep, 0))
	server := p.Server()
	for _, st := range helpertest.Threads(t, server) {
		if got, want := threadCaps(t, st), (capSets{CapPrm: seven, CapEff: seven}); got != want {
			t.Errorf("%s: %x, want %x", st["Name"], got, want)
		}
	}
	for tid := range helpertest.Threads(t, server) {
		root, err := os.Readlink(fmt.Sprintf("/proc/%d/task/%s/root", server, tid))
		if err == nil && root != dir {
			t.Errorf("a thread has the root %s", root)
		}
	}
	if err := unix.Kill(server, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.Want(0, codec.Lstat, request("/", 0)) // by another server
}

// deepPath makes a file whose path is longer than PATH_MAX, and returns that.
func deepPath(t *testing.T, c *helpertest.Client) string {
	t.Helper()
	name := "/" + strings.Repeat("d", 254)
	path := ""
	for len(path) <= unix.PathMax {
		path += name
		c.Want(0, codec.Mkdir, request(path, 0))
	}
	return path
}

// inService makes the test binary a process of a service: it executes arguments
// after the first two under options of systemd, in a mount namespace.
const inService = "-in-service"

// serviceOptions are what systemd's options do to the mounts; dir is writable.
var serviceOptions = map[string]func(dir string) error{
	"ProtectSystem=strict": func(dir string) error {
		for _, keep := range []string{dir, "/proc", "/sys", "/dev"} {
			if err := unix.Mount(keep, keep, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
				return err
			}
		}
		readOnly := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, readOnly); err != nil {
			return err
		}
		for _, keep := range []string{dir, "/proc", "/sys", "/dev"} {
			writable := &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
			if err := unix.MountSetattr(unix.AT_FDCWD, keep, unix.AT_RECURSIVE, writable); err != nil {
				return err
			}
		}
		return nil
	},
	"ProcSubset=pid": func(string) error {
		return unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "subset=pid")
	},
	"PrivateDevices=yes": func(string) error {
		// After a bind mount elsewhere, as the new /dev covers the old one.
		null, err := unix.OpenTree(unix.AT_FDCWD, "/dev/null", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755"); err != nil {
			return err
		}
		if err := os.WriteFile("/dev/null", nil, 0o666); err != nil {
			return err
		}
		return unix.MoveMount(null, "", unix.AT_FDCWD, "/dev/null", unix.MOVE_MOUNT_F_EMPTY_PATH)
	},
	"ProtectKernelTunables=yes": func(string) error {
		return errors.Join(unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""),
			unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	},
	"no devices": func(string) error {
		return unix.Mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755")
	},
}

// enterService executes args under options, which are separated by commas.
func enterService(options, dir string, args []string) {
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	for option := range strings.SplitSeq(options, ",") {
		if err == nil {
			err = serviceOptions[option](dir)
		}
	}
	if err == nil {
		err = syscall.Exec(args[0], args, os.Environ())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(99)
}

// In a user namespace the kernel mounts no /proc where a part of one is hidden.
func TestMapsWithoutWholeProc(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := func(options ...string) (c helpertest.Command, name string) {
		dir := export(t)
		room := filepath.Dir(dir)
		name = filepath.Join(room, "s")
		return helpertest.Command{Path: self, Args: append([]string{inService, "ProtectKernelTunables=yes", room,
			helpertest.Ours(t), "-p", dir, "-s", name, "-u", "0", "-g", "0"}, options...)}, name
	}
	c, _ := start(mapped...)
	status, out := helpertest.Run(t, c)
	if status != 1 || !strings.Contains(out, "ProtectKernelTunables=") || !strings.Contains(out, "--sandbox=chroot") {
		t.Errorf("status %d, %q", status, out)
	}
	for _, options := range [][]string{{"-n"}, append(slices.Clone(mapped), "-n", "--sandbox=chroot")} {
		c, name := start(options...)
		helpertest.AwaitName(t, helpertest.Start(t, c), name)
		helpertest.Dial(t, name).Want(0, codec.Lstat, request("/", 0))
	}
}

// Under options of systemd that take away what is mounted, the daemon and the
// foreground start and serve.
func TestServiceManager(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, options := range []string{
		"ProtectSystem=strict", "ProcSubset=pid", "PrivateDevices=yes", "no devices",
		"ProtectSystem=strict,ProcSubset=pid,PrivateDevices=yes",
	} {
		for _, mode := range []string{"--nodaemon", "--log-level=info"} {
			t.Run(options+" "+mode, func(t *testing.T) {
				dir := export(t)
				room := filepath.Dir(dir)
				name, pidfile := filepath.Join(room, "s"), filepath.Join(room, "pid")
				start := helpertest.Command{Path: self, Args: []string{inService, options, room, helpertest.Ours(t),
					"-p", dir, "-s", name, "-u", "0", "-g", "0", "--pidfile", pidfile, mode}}
				p := helpertest.Start(t, start)
				if mode != "--nodaemon" {
					if status := p.Wait(); status != 0 {
						t.Fatalf("status %d\n%s", status, p.Output())
					}
				}
				helpertest.Eventually(t, "the name is there", func() bool {
					if mode == "--nodaemon" && !p.Alive() {
						t.Fatalf("the helper has ended\n%s", p.Output())
					}
					return helpertest.Listening(t, name)
				})
				b, err := os.ReadFile(pidfile)
				if err != nil {
					t.Fatal(err)
				}
				pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
				if err != nil {
					t.Fatal(err)
				}
				if mode != "--nodaemon" {
					t.Cleanup(func() {
						unix.Kill(pid, unix.SIGTERM)
						helpertest.Eventually(t, "the helper has ended", func() bool { return helpertest.Ended(pid) })
					})
				}
				c := helpertest.Dial(t, name)
				makeAll(t, c, 1000, 0)
				servers := helpertest.Children(pid)
				if len(servers) != 1 {
					t.Fatalf("servers %v", servers)
				}
				if points, _ := mountpoints(t, servers[0]); !slices.Equal(points, []string{"/"}) {
					t.Errorf("the server has mounts at %v", points)
				}
				if err := unix.Kill(servers[0], unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				c.Want(0, codec.Lstat, request("/", 0)) // by another server
			})
		}
	}
}

package sandbox_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
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

// namespaceWays are those in which mounts can be covered.
func namespaceWays(w helpertest.Way) (reason string) {
	if w.Sandbox != "namespace" {
		return "it has the host's mounts"
	}
	return ""
}

// shared makes dir a mount whose peers and slaves get what is mounted below it.
func shared(t *testing.T, dir string) {
	t.Helper()
	mount(t, dir)
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
}

// mountAt makes a directory and mounts a file system on it.
func mountAt(t *testing.T, dir, source, fstype string, flags uintptr) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(source, dir, fstype, flags, ""); err != nil {
		t.Fatalf("mount %s: %v", fstype, err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// bindFile makes a file and mounts another one on it.
func bindFile(t *testing.T, source, file string) {
	t.Helper()
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(source, file, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(file, unix.MNT_DETACH) })
}

// serverFlags fails unless every mount of a server has the flags that it must have.
func serverFlags(t *testing.T, pid int) {
	t.Helper()
	_, options := mountpoints(t, pid)
	for point, o := range options {
		for _, want := range []string{"nosuid", "nodev", "noexec"} {
			if !slices.Contains(strings.Split(o, ","), want) {
				t.Errorf("the server's %s is %s, not %s", point, o, want)
			}
		}
	}
}

func lstat(path string) codec.Request { return codec.Request{Path: helpertest.Path(path)} }

// What leads to the host's processes and devices is empty in the export, where it
// was mounted before the start and where it is mounted later on.
func TestCoveredMounts(t *testing.T) {
	helpertest.EachWay(t, namespaceWays, func(t *testing.T, way helpertest.Way) {
		covered := []string{"a \\\n\"dir/proc", "sys", "dev", "part", "tmp/proc", "ns", "version"}
		fill := func(t *testing.T, export string) {
			mountAt(t, filepath.Join(export, covered[0]), "proc", "proc", 0)
			mountAt(t, filepath.Join(export, "sys"), "sysfs", "sysfs", 0)
			mountAt(t, filepath.Join(export, "dev"), "devtmpfs", "devtmpfs", 0)
			mountAt(t, filepath.Join(export, "dev/pts"), "devpts", "devpts", 0)
			mountAt(t, filepath.Join(export, "part"), "/proc/self", "", unix.MS_BIND)
			mountAt(t, filepath.Join(export, "tmp"), "none", "tmpfs", 0)
			mountAt(t, filepath.Join(export, "tmp/proc"), "proc", "proc", 0)
			bindFile(t, "/proc/self/ns/net", filepath.Join(export, "ns"))
			bindFile(t, "/proc/version", filepath.Join(export, "version"))
			if err := os.WriteFile(filepath.Join(export, "tmp/mine"), nil, 0o666); err != nil {
				t.Fatal(err)
			}
		}
		h := way.Start(t, helpertest.Setup{Fill: func(t *testing.T, export string) {
			shared(t, export)
			if !way.Rootless { // else the export's content is given to someone, but not /proc's
				fill(t, export)
			}
		}})
		if way.Rootless {
			fill(t, h.Export)
		}
		c := h.Dial()
		check := func() {
			t.Helper()
			helpertest.Eventually(t, "the server has the mounts", func() bool {
				return c.Do(codec.Lstat, lstat("/tmp/mine")).Errno == 0
			})
			serverFlags(t, h.Server())
			for _, name := range []string{
				"/a \\\n\"dir/proc/self", "/sys/kernel", "/dev/null", "/dev/pts/ptmx", "/part/root",
				"/tmp/proc/1/root/etc/passwd",
			} {
				c.Want(unix.ENOENT, codec.Lstat, lstat(name))
				c.Want(unix.ENOENT, codec.Open, lstat(name))
			}
			c.Want(unix.EROFS, codec.Mkdir, codec.Request{Path: helpertest.Path("/dev/dir")})
			for _, name := range covered {
				c.Want(unix.EROFS, codec.Chmod, codec.Request{Path: helpertest.Path("/" + name), Mode: 0o777})
			}
			c.Want(0, codec.Lstat, lstat("/tmp/mine"))
			for _, name := range covered {
				logged := filepath.Join(h.Export, name)
				if strings.ContainsAny(name, " \n") {
					logged = strconv.Quote(logged)
				}
				if n := strings.Count(h.Output(), " mount="+logged+" "); n != 1 {
					t.Errorf("%s is told of %d times:\n%s", logged, n, h.Output())
				}
			}
		}
		check()
		unix.Kill(h.Server(), unix.SIGKILL) // the next one covers, too, and all is told
		check()
		mountAt(t, filepath.Join(h.Export, "late"), "proc", "proc", 0)
		mountAt(t, filepath.Join(h.Export, "seen"), "none", "tmpfs", 0)
		if err := os.WriteFile(filepath.Join(h.Export, "seen/mine"), nil, 0o666); err != nil {
			t.Fatal(err)
		}
		helpertest.Eventually(t, "what is mounted late is seen", func() bool {
			if a := c.Do(codec.Lstat, lstat("/late/self")); a.Errno != unix.ENOENT {
				t.Fatalf("the late /proc: %v", a.Errno)
			}
			return c.Do(codec.Lstat, lstat("/seen/mine")).Errno == 0
		})
		check()
	})
}

// Where nothing can be covered, and for the export itself, the start is refused.
func TestMountsRefused(t *testing.T) {
	way := helpertest.Way{Foreground: true, Sandbox: "namespace"}
	for path, says := range map[string]string{"/proc": "proc", "/sys/kernel": "sysfs", "/dev": ""} {
		var st unix.Statfs_t
		if unix.Statfs(path, &st) != nil || says == "" && !isDevtmpfs(t) {
			continue
		}
		status, out := way.Refused(t, helpertest.Setup{Args: []string{"--path", path}})
		if status != 1 || !strings.Contains(out, says) || !strings.Contains(out, "files of its own") {
			t.Errorf("%s: status %d, %q", path, status, out)
		}
	}
	for _, sandbox := range []string{"chroot", "none"} {
		for _, rootless := range []bool{false, true} {
			way := helpertest.Way{Foreground: true, Sandbox: sandbox, Rootless: rootless}
			status, out := way.Refused(t, helpertest.Setup{Fill: func(t *testing.T, export string) {
				mount(t, export)
				mountAt(t, filepath.Join(export, "root/fs"), "none", "tmpfs", 0)
				mountAt(t, filepath.Join(export, "root/fs/proc"), "none", "tmpfs", 0)
				if err := os.Remove(filepath.Join(export, "root/fs/proc")); err == nil {
					t.Fatal("removed a mount")
				}
				mountAt(t, filepath.Join(export, "sys"), "mqueue", "mqueue", 0)
			}})
			if status != 1 || !strings.Contains(out, "unmount it") || !strings.Contains(out, "/export/sys") {
				t.Errorf("%s: status %d, %q", sandbox, status, out)
			}
		}
	}
}

func isDevtmpfs(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(b), " /dev devtmpfs ")
}

// What the host mounts later on comes with the flags of all others, and what it
// unmounts goes.
func TestLateMounts(t *testing.T) {
	helpertest.EachWay(t, namespaceWays, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: func(t *testing.T, export string) {
			shared(t, export)
		}})
		c := h.Dial()
		late := filepath.Join(h.Export, "late")
		mountAt(t, late, "none", "tmpfs", 0)
		if err := unix.Mknod(filepath.Join(late, "zero"), unix.S_IFCHR|0o666, 0x105); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(late, "dir"), 0o755); err != nil {
			t.Fatal(err)
		}
		helpertest.Eventually(t, "a late mount appears", func() bool {
			for _, pid := range h.Servers() {
				if !helpertest.Ended(pid) {
					flagsOfLiving(t, pid)
				}
			}
			return c.Do(codec.Lstat, lstat("/late/dir")).Errno == 0
		})
		serverFlags(t, h.Server())
		dir := c.Want(0, codec.Open, codec.Request{Path: helpertest.Path("/late/dir"), Flags: unix.O_DIRECTORY}).File
		fd, err := unix.Openat(int(dir.Fd()), "../zero", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != unix.EACCES {
			unix.Close(fd)
			t.Errorf("the device opens: %v", err)
		}
		dir.Close()
		if own(t, h.PID, os.Getpid()) == nil { // a mount's own flags don't reach other namespaces
			if err := unix.Mount("", late, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			helpertest.Eventually(t, "the mount is read-only", func() bool {
				q := codec.Request{Path: helpertest.Path("/late/dir"), Mode: 0o700}
				return c.Do(codec.Chmod, q).Errno == unix.EROFS
			})
			serverFlags(t, h.Server())
		}
		if err := unix.Unmount(late, 0); err != nil {
			t.Fatalf("the server keeps what the host unmounts: %v", err)
		}
		helpertest.Eventually(t, "the server lets go", func() bool {
			points, _ := mountpoints(t, h.Server())
			return !slices.Contains(points, "/late")
		})
		c.Want(unix.ENOENT, codec.Lstat, lstat("/late/dir"))
	})
}

// flagsOfLiving is serverFlags for a server that may end meanwhile, and may not have
// taken its place yet.
func flagsOfLiving(t *testing.T, pid int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[4] == "/late" && !strings.Contains(f[5], "nodev") {
			t.Errorf("a server's %s is %s", f[4], f[5])
		}
	}
}

// walks are what someone tries with two descriptors of directories that were passed
// for a guest: 3 is /sub, 4 is /bind/sub below a bind mount. The export is in a
// directory that someone can't enter.
var walks = map[string]string{
	"up":            "cat /proc/self/fd/3/../../secret",
	"up from above": "cat /proc/self/fd/4/../../../secret",
	"link out":      "cat /proc/self/fd/3/../link",
	"device":        "head -c 1 /proc/self/fd/3/../zero | tr '\\0' s",
	"setuid":        "/proc/self/fd/3/../id -u",
	"reopened":      "exec 5</proc/self/fd/3/.. && cat /proc/self/fd/5/../secret",
}

// walk returns what each of walks prints.
func walk(t *testing.T, sandbox string) map[string]string {
	t.Helper()
	dir := helpertest.Tmpfs(t)
	middle := filepath.Join(dir, "middle")
	if err := os.Mkdir(middle, 0o755); err != nil {
		t.Fatal(err)
	}
	h := helpertest.Way{Foreground: true, Sandbox: sandbox}.Start(t, helpertest.Setup{
		Dir: middle,
		Fill: func(t *testing.T, export string) {
			id, err := exec.LookPath("id")
			if err != nil {
				t.Fatal(err)
			}
			program, err := os.ReadFile(id)
			if err != nil {
				t.Fatal(err)
			}
			for _, err := range []error{
				os.Chmod(dir, 0o700),
				os.WriteFile(filepath.Join(middle, "secret"), []byte("secret"), 0o644),
				os.Mkdir(filepath.Join(export, "sub"), 0o755),
				os.Symlink("../secret", filepath.Join(export, "link")),
				os.WriteFile(filepath.Join(export, "id"), program, 0o755),
				os.Chmod(filepath.Join(export, "id"), 0o755|os.ModeSetuid),
				unix.Mknod(filepath.Join(export, "zero"), unix.S_IFCHR, 0x105),
				os.Chmod(filepath.Join(export, "zero"), 0o666),
				os.MkdirAll(filepath.Join(middle, "other/sub"), 0o755),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			mountAt(t, filepath.Join(export, "bind"), filepath.Join(middle, "other"), "", unix.MS_BIND)
		},
	})
	c := h.Dial()
	open := func(path string) *os.File {
		return c.Want(0, codec.Open, codec.Request{Path: helpertest.Path(path), Flags: unix.O_DIRECTORY}).File
	}
	sub, bind := open("/sub"), open("/bind/sub")
	defer sub.Close()
	defer bind.Close()
	printed := map[string]string{}
	for name, script := range walks {
		cmd := exec.Command("sh", "-c", script)
		cmd.ExtraFiles = []*os.File{sub, bind}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: someone, Gid: someone}}
		var out bytes.Buffer
		cmd.Stdout = &out
		cmd.Run()
		printed[name] = strings.TrimSpace(out.String())
	}
	return printed
}

// QEMU's user gets nothing by a directory that it is given but what is in the
// export, and no device or setuid file there.
func TestPassedDirectory(t *testing.T) {
	for name, got := range walk(t, "namespace") {
		if got != "" { // a program would not run as root, but is not to run at all
			t.Errorf("%s: %s prints %q", name, walks[name], got)
		}
	}
}

// The same with a chroot leads out, which README says. It shows that the walks are
// real.
func TestPassedDirectoryOfChroot(t *testing.T) {
	want := map[string]string{"device": "s", "setuid": "0"}
	for name, got := range walk(t, "chroot") {
		if w, other := want[name]; got != "secret" && (!other || got != w) {
			t.Errorf("%s: %s prints %q", name, walks[name], got)
		}
	}
}

// hangup sends SIGHUP, and waits until a server has what the export's name has now.
func hangup(t *testing.T, h *helpertest.Helper, c *helpertest.Client, path string) {
	t.Helper()
	h.Send(unix.SIGHUP)
	helpertest.Eventually(t, "the server has the export of now", func() bool {
		return c.Do(codec.Lstat, lstat(path)).Errno == 0
	})
}

func TestExportReplaced(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Args: []string{"--path", "export"}})
		c := h.Dial()
		c.Want(0, codec.Lstat, lstat("/"))
		replace(t, h)
		c.Want(unix.ENOENT, codec.Lstat, lstat("/next"))
		hangup(t, h, c, "/next")
		if h.Logged("stays") {
			t.Errorf("fails:\n%s", h.Output())
		}
	})
}

// replace puts a directory that holds "next" in the place of the export.
func replace(t *testing.T, h *helpertest.Helper) {
	t.Helper()
	other := filepath.Join(h.Dir, "other")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(other, "next"), 0o755),
		os.Rename(h.Export, filepath.Join(h.Dir, "last")),
		os.Rename(other, h.Export),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestExportMountedOver(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		dir := helpertest.Tmpfs(t)
		if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
			t.Fatal(err)
		}
		h := way.Start(t, helpertest.Setup{Dir: dir})
		c := h.Dial()
		c.Want(0, codec.Mkdir, codec.Request{Path: helpertest.Path("/below")})
		mountAt(t, h.Export, "none", "tmpfs", 0)
		if err := os.Mkdir(filepath.Join(h.Export, "next"), 0o755); err != nil {
			t.Fatal(err)
		}
		c.Want(0, codec.Lstat, lstat("/below"))
		hangup(t, h, c, "/next")
		c.Want(unix.ENOENT, codec.Lstat, lstat("/below"))
	})
}

// An export that is removed, or unmounted, is empty, and stays so when a server dies.
func TestExportRemoved(t *testing.T) {
	for _, unmounted := range []bool{false, true} {
		t.Run(fmt.Sprint("unmounted ", unmounted), func(t *testing.T) {
			unless := namespaceWays
			if !unmounted { // a chroot keeps what is unmounted
				unless = nil
			}
			helpertest.EachWay(t, unless, func(t *testing.T, way helpertest.Way) {
				dir := helpertest.Tmpfs(t)
				if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
					t.Fatal(err)
				}
				h := way.Start(t, helpertest.Setup{Dir: dir, Fill: func(t *testing.T, export string) {
					if unmounted {
						mount(t, export)
						if err := os.Mkdir(filepath.Join(export, "file"), 0o755); err != nil {
							t.Fatal(err)
						}
					}
				}})
				c := h.Dial()
				c.Want(0, codec.Lstat, lstat("/"))
				if unmounted {
					if err := unix.Unmount(h.Export, unix.MNT_DETACH); err != nil {
						t.Fatal(err)
					}
				} else if err := os.Remove(h.Export); err != nil {
					t.Fatal(err)
				}
				for range 2 {
					helpertest.Eventually(t, "the export is empty", func() bool {
						return c.Do(codec.Lstat, lstat("/file")).Errno == unix.ENOENT
					})
					file := codec.Request{Path: helpertest.Path("/new"), Mode: 0o644, Flags: unix.O_CREAT | unix.O_RDWR}
					c.Want(unix.ENOENT, codec.Open, file)
					c.Want(unix.ENOENT, codec.Create, file)
					c.Want(unix.ENOENT, codec.Mkdir, file)
					unix.Kill(h.Server(), unix.SIGKILL)
				}
				replaced := filepath.Join(h.Export, "next")
				if err := os.MkdirAll(replaced, 0o755); err != nil {
					t.Fatal(err)
				}
				hangup(t, h, c, "/next")
			})
		})
	}
}

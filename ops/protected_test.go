package ops_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/ops"
)

// fs.protected_regular is obeyed at each of its levels, as
// Documentation/admin-guide/sysctl/fs.rst has it. That it is as the kernel
// does, on this machine's level, TestConformance compares.
func TestProtectedRegular(t *testing.T) {
	for level := range 3 {
		l := newLocal(t, helpertest.ShortDir(t), ops.Options{Sysctls: ops.Sysctls{ProtectedRegular: level}})
		for i, c := range []struct {
			mode uint32 // of the directory, which is 5's
			file int    // whose it is
			as   uint32 // who would create it
			from int    // the level that refuses that
		}{
			{0o1777, 1000, 1001, 1},
			{0o1777, 1000, 0, 1}, // root is no exception
			{0o1777, 1000, 1000, 9},
			{0o1777, 5, 1001, 9}, // the directory's owner may do that anyway
			{0o1775, 1000, 1001, 2},
			{0o1755, 1000, 1001, 9},
			{0o777, 1000, 1001, 9},
		} {
			dir := filepath.Join(l.root, fmt.Sprint(i))
			file := filepath.Join(dir, "file")
			if err := errors.Join(
				os.Mkdir(dir, 0o755), os.WriteFile(file, nil, 0o666),
				os.Chown(file, c.file, 7), os.Chown(dir, 5, 7), unix.Chmod(dir, c.mode),
				os.Symlink(filepath.Base(dir)+"/file", dir+"link"), os.Link(file, dir+"hard"),
			); err != nil {
				t.Fatal(err)
			}
			var errno unix.Errno
			if level >= c.from {
				errno = unix.EACCES
			}
			deep := dir + strings.Repeat("/.", 3000) + "/file"
			for path, errno := range map[string]unix.Errno{
				file: errno, deep: errno, dir + "link": errno, dir + "hard": 0,
			} {
				for _, s := range []step{
					create(path, unix.O_CREAT|unix.O_RDWR, 0o600, c.as, 7),
					create(path, unix.O_CREAT, 0o600, c.as, 0),
				} {
					onThreadOfItsOwn(func() {
						if got := l.do(s.t, s.frame(true)[codec.HeaderSize:]); got != errno {
							t.Errorf("level %d, directory %o, file of %d, %v: %v, want %v",
								level, c.mode, c.file, s, got, errno)
						}
						s.q.Flags &^= unix.O_CREAT
						if got := l.do(s.t, s.frame(true)[codec.HeaderSize:]); got != 0 {
							t.Errorf("level %d, without O_CREAT: %v", level, got)
						}
					})
				}
			}
		}
	}
}

// A service manager hides /proc/sys (ProcSubset=pid). What can't be read is not
// off: the file of somebody else in a sticky directory is not to be had.
func TestProtectedRegularUnknown(t *testing.T) {
	helpertest.NeedRoot(t)
	dir := helpertest.ShortDir(t)
	tmp := filepath.Join(dir, "tmp")
	file := filepath.Join(tmp, "file")
	for _, err := range []error{
		os.Chmod(dir, 0o755), os.Mkdir(tmp, 0o755), os.WriteFile(file, nil, 0o666),
		os.Chown(file, 1000, 1000), unix.Chmod(tmp, unix.S_ISVTX|0o777),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	name := filepath.Join(helpertest.ShortDir(t), "socket")
	p := helpertest.Start(t, helpertest.Command{
		Path: "unshare",
		Args: []string{"--mount", "--propagation", "private", "sh", "-c",
			`mount -t proc -o subset=pid proc /proc && exec "$@"`, "sh",
			helpertest.Ours(t), "-n", "-p", dir, "-s", name, "-u", "0", "-g", "0"},
	})
	helpertest.AwaitName(t, p, name)
	create := codec.Request{
		Path: helpertest.Path("/tmp/file"), Flags: unix.O_CREAT | unix.O_RDWR, Mode: 0o600, UID: 1001, GID: 1001,
	}
	helpertest.Dial(t, name).Want(unix.EACCES, codec.Create, create)
}

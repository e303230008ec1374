package ops_test

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
)

// tree is what every case begins with, made new for each. Where a case needs
// more, it makes that by requests.
var tree = []struct {
	path     string
	mode     uint32 // with the type
	uid, gid int
	data     string   // content, or target of a link
	xattrs   []string // names and values
}{
	{path: "file", mode: unix.S_IFREG | 0o644, uid: 1000, gid: 1000, data: "content\n",
		xattrs: []string{"user.a", "value", "user.empty", "", "security.test", "s"}},
	{path: "suid", mode: unix.S_IFREG | 0o6755, uid: 1000, gid: 1000, data: "#!/bin/sh\n"},
	{path: "secret", mode: unix.S_IFREG, data: "root's"},
	{path: "big", mode: unix.S_IFREG | 0o666, data: strings.Repeat("0123456789abcdef", 1<<9)},
	{path: "dir", mode: unix.S_IFDIR | 0o755, uid: 1000, gid: 1000},
	{path: "dir/file", mode: unix.S_IFREG | 0o600, uid: 1000, gid: 1000, data: "below"},
	{path: "dir/sub", mode: unix.S_IFDIR | 0o700, uid: 1, gid: 1},
	{path: "dir/up", mode: unix.S_IFLNK, data: "../file"},
	{path: "empty", mode: unix.S_IFDIR | 0o777},
	{path: "sgid", mode: unix.S_IFDIR | 0o2777, gid: 100},
	{path: "sticky", mode: unix.S_IFDIR | 0o1777, uid: 5},
	{path: "sticky/file", mode: unix.S_IFREG | 0o644, uid: 5},
	{path: "link", mode: unix.S_IFLNK, uid: 1000, gid: 1000, data: "file"},
	{path: "dirlink", mode: unix.S_IFLNK, data: "dir"},
	{path: "abslink", mode: unix.S_IFLNK, data: "/dir/file"},
	{path: "dangling", mode: unix.S_IFLNK, data: "made"},
	{path: "dangling2", mode: unix.S_IFLNK, data: "/dir/../dangling"},
	{path: "danglingdir", mode: unix.S_IFLNK, data: "nowhere/made"},
	{path: "loop", mode: unix.S_IFLNK, data: "loop"},
	{path: "fifolink", mode: unix.S_IFLNK, data: "fifo"},
	{path: "out", mode: unix.S_IFLNK, data: "/etc/passwd"},
	{path: "outup", mode: unix.S_IFLNK, data: "../../../../../../../../etc/passwd"},
	{path: "outdir", mode: unix.S_IFLNK, data: "/etc"},
	{path: "fifo", mode: unix.S_IFIFO | 0o666},
	{path: "null", mode: unix.S_IFCHR | 0o666, data: "1:3"},
	{path: "block", mode: unix.S_IFBLK | 0o666, data: "7:200"},
	{path: "sock", mode: unix.S_IFSOCK | 0o666},
	{path: "\xff\xfe", mode: unix.S_IFREG | 0o644, data: "not UTF-8"},
}

// epoch is the time of all files in a new tree.
var epoch = time.Unix(1_000_000_000, 123456789)

// makeTree makes the tree in dir. What was there goes to a directory beside it:
// ext4 is slow to make files while it remembers deleted ones.
func makeTree(t testing.TB, dir string) {
	t.Helper()
	helpertest.NeedRoot(t) // for its owners and devices
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(dir)
	check(err)
	if len(entries) > 0 {
		attic, err := os.MkdirTemp(filepath.Dir(dir), "attic")
		check(err)
		for _, e := range entries {
			check(os.Rename(filepath.Join(dir, e.Name()), filepath.Join(attic, e.Name())))
		}
	}
	at := []unix.Timespec{unix.NsecToTimespec(epoch.UnixNano()), unix.NsecToTimespec(epoch.UnixNano())}
	for _, e := range tree {
		path := filepath.Join(dir, e.path)
		switch e.mode & unix.S_IFMT {
		case unix.S_IFREG:
			check(os.WriteFile(path, []byte(e.data), 0o600))
		case unix.S_IFDIR:
			check(os.Mkdir(path, 0o700))
		case unix.S_IFLNK:
			check(os.Symlink(e.data, path))
		default:
			var major, minor uint32
			fmt.Sscanf(e.data, "%d:%d", &major, &minor)
			check(unix.Mknod(path, e.mode, int(unix.Mkdev(major, minor))))
		}
		check(unix.Lchown(path, e.uid, e.gid))
		if e.mode&unix.S_IFMT != unix.S_IFLNK {
			check(unix.Chmod(path, e.mode&0o7777))
		}
		for i := 0; i < len(e.xattrs); i += 2 {
			err := unix.Lsetxattr(path, e.xattrs[i], []byte(e.xattrs[i+1]), 0)
			if err == unix.EOPNOTSUPP {
				helpertest.NeedLinux(t, 6, 6, "user attributes on a tmpfs")
			}
			check(err)
		}
	}
	check(os.Link(filepath.Join(dir, "file"), filepath.Join(dir, "hard")))
	for _, name := range listXattr(t, dir) {
		check(unix.Lremovexattr(dir, name))
	}
	check(os.Chmod(dir, 0o755))
	check(os.Chown(dir, 0, 0))
	for _, e := range slices.Backward(tree) {
		check(unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, e.path), at, unix.AT_SYMLINK_NOFOLLOW))
	}
	check(unix.UtimesNanoAt(unix.AT_FDCWD, dir, at, 0))
}

// look describes all that is in dir, a line a path. What can't be the same
// twice is left out: the inode's number, its change time, and times that are
// not before now.
func look(t testing.TB, dir string, now time.Time) map[string]string {
	t.Helper()
	seen := map[uint64]string{}
	m := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, dir)
		if first, ok := seen[st.Ino]; ok {
			m[rel] = "hard link of " + first
			return nil
		}
		seen[st.Ino] = rel
		m[rel] = describe(t, path, &st, now)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// describe describes a file; path may be /proc/self/fd/N.
func describe(t testing.TB, path string, st *unix.Stat_t, now time.Time) string {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "mode %o owner %d:%d nlink %d rdev %x size %d", st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev, st.Size)
	for _, at := range []unix.Timespec{st.Atim, st.Mtim} {
		if at.Nano() >= now.UnixNano() {
			b.WriteString(" now")
		} else {
			fmt.Fprintf(&b, " %d.%09d", at.Sec, at.Nsec)
		}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		content, err := readUpTo(path, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, " %.20q %x", content, crc32.ChecksumIEEE(content))
	case unix.S_IFLNK:
		if to, err := os.Readlink(path); err == nil {
			fmt.Fprintf(&b, " -> %q", to)
		}
	}
	if strings.HasPrefix(path, "/proc/") {
		return b.String()
	}
	for _, name := range listXattr(t, path) {
		value := getXattr(t, path, name)
		fmt.Fprintf(&b, " %s=%.20q:%d:%x", name, value, len(value), crc32.ChecksumIEEE(value))
	}
	return b.String()
}

// listXattr returns the sorted names of the attributes of a file.
func listXattr(t testing.TB, path string) []string {
	t.Helper()
	n, err := unix.Llistxattr(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 {
		return nil
	}
	names := make([]byte, n)
	if _, err = unix.Llistxattr(path, names); err != nil {
		t.Fatal(err)
	}
	list := strings.Split(string(names[:n-1]), "\x00")
	slices.Sort(list)
	return list
}

func getXattr(t testing.TB, path, name string) []byte {
	t.Helper()
	value := make([]byte, 65536)
	n, err := unix.Lgetxattr(path, name, value)
	if err != nil {
		t.Fatal(err)
	}
	return value[:n]
}

// readUpTo reads what a file begins with: it may be as long as a request said.
func readUpTo(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// difference lists where two trees differ.
func difference(ours, theirs map[string]string) string {
	var b strings.Builder
	paths := maps.Clone(ours)
	maps.Copy(paths, theirs)
	for _, p := range slices.Sorted(maps.Keys(paths)) {
		if ours[p] != theirs[p] {
			fmt.Fprintf(&b, "%q\n  ours: %s\n  C's:  %s\n", p, ours[p], theirs[p])
		}
	}
	return b.String()
}

// generation is the inode's, as the kernel says it. It waits for nothing, and
// is 0 where there is none.
func generation(path string) uint32 {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	v, _ := unix.IoctlGetUint32(fd, 0x80087601) // FS_IOC_GETVERSION
	return v
}

func u64(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }

func u32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }

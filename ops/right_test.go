package ops_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// The tests in this file are of our helper alone: the C helper hangs, aborts or
// gives away its memory on these requests, so it can't say what is right. Those
// of faults that have a number are in cve_test.go, with a table of all.

// newOurs starts our helper on a new tree.
func newOurs(t *testing.T, options ...string) (dir string, c *helpertest.Client, p *helpertest.Process) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "export")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	makeTree(t, dir)
	p, c = helpertest.Pair(t, helpertest.Ours(t), dir, options...)
	return dir, c, p
}

func ask(t *testing.T, c *helpertest.Client, s step) helpertest.Answer {
	t.Helper()
	c.Send(s.frame(true))
	return c.Read(s.t)
}

func want(t *testing.T, c *helpertest.Client, errno unix.Errno, steps ...step) {
	t.Helper()
	for _, s := range steps {
		a := ask(t, c, s)
		if a.Errno != errno {
			t.Errorf("%v: %v, want %v", s, a.Errno, errno)
		}
		if a.File != nil {
			a.File.Close()
		}
	}
}

func TestGetVersion(t *testing.T) {
	t.Parallel()
	dir, c, _ := newOurs(t)
	for path, at := range map[string]string{
		"/": "", "/file": "file", "/dir": "dir", "/link": "file",
		"/dirlink/file": "dir/file", "/abslink": "dir/file", "/secret": "secret",
	} {
		a := ask(t, c, getversion(path))
		want := generation(filepath.Join(dir, at))
		if a.Errno != 0 || len(a.Payload) != 8 || u64(a.Payload) != uint64(want) {
			t.Errorf("%s: %x, %v, want %#x in 8 bytes", path, a.Payload, a.Errno, want)
		}
	}
	want(t, c, unix.ENOENT, getversion("/missing"), getversion("/dangling"), getversion("/out"), getversion(""))
	want(t, c, unix.ELOOP, getversion("/loop"))
}

// A file system uses an inode's number again for another file, of any type.
func TestGetVersionOfUsedNumbers(t *testing.T) {
	t.Parallel()
	dir, c, _ := newOurs(t)
	again := 0
	for range 100 {
		want(t, c, 0, mknod("/used", unix.S_IFREG|0o644, 0, 0, 0), getversion("/used"), getversion("/used"))
		var before, after unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, "used"), &before); err != nil {
			t.Fatal(err)
		}
		want(t, c, 0, remove("/used"), mknod("/used", unix.S_IFIFO|0o644, 0, 0, 0))
		want(t, c, unix.ENOTTY, getversion("/used"))
		if err := unix.Lstat(filepath.Join(dir, "used"), &after); err != nil {
			t.Fatal(err)
		}
		if before.Ino == after.Ino {
			again++
		}
		want(t, c, 0, remove("/used"))
	}
	if again == 0 {
		t.Error("the file system has not used a number again: no test")
	}
}

func TestLengthsThatLie(t *testing.T) {
	t.Parallel()
	dir, c, p := newOurs(t)
	for _, size := range []int{6, 100, 65536, 1 << 30, 1<<31 - 1, -1, -1 << 31} {
		want(t, c, unix.EINVAL, lsetxattr("/file", "user.lie", "value", size, 0))
	}
	want(t, c, unix.ENODATA, lgetxattr("/file", "user.lie", 0))
	for _, size := range []int{-1, -2, -65536, -1 << 31} {
		want(t, c, unix.EINVAL, lgetxattr("/file", "user.a", size), llistxattr("/file", size), readlink("/link", size))
	}
	before := memory(t, p.Server())
	for range 50 {
		for _, size := range []int{1 << 30, 1<<31 - 1} {
			want(t, c, 0, lgetxattr("/file", "user.a", size), llistxattr("/file", size), readlink("/link", size))
			want(t, c, unix.ENODATA, lgetxattr("/file", "user.no", size))
		}
	}
	if grown := memory(t, p.Server()) - before; grown > 256<<20 {
		t.Errorf("a guest's bufsize took %d MiB of memory", grown>>20)
	}
	if v := getXattr(t, filepath.Join(dir, "file"), "user.a"); string(v) != "value" {
		t.Errorf("the attribute is %q now", v)
	}
}

// memory is the most address space that a process ever had, touched or not.
func memory(t *testing.T, pid int) int {
	t.Helper()
	kb, err := strconv.Atoi(strings.TrimSuffix(helpertest.Status(t, strconv.Itoa(pid))["VmPeak"], " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

// creates are all requests that make a file of an owner.
func creates(path string, uid, gid uint32) []step {
	return []step{
		create(path+"create", unix.O_CREAT|unix.O_RDWR, 0o640, uid, gid),
		mknod(path+"mknod", unix.S_IFIFO|0o640, 0, uid, gid),
		mkdir(path+"mkdir", 0o750, uid, gid),
		symlink("target", path+"symlink", uid, gid),
	}
}

// Root of the guest may have another group (newgrp). That, and what it does
// afterwards, works; as it does for any other user.
func TestCreateAsRootOfAnotherGroup(t *testing.T) {
	t.Parallel()
	dir, c, p := newOurs(t)
	n := 0
	for range 3 {
		for _, owner := range [][2]uint32{{0, 1000}, {1000, 0}, {0, 0}, {0, 100}, {1000, 1000}, {none - 1, none - 1}} {
			n++
			path := fmt.Sprintf("/dir/sub/%d", n)
			for _, s := range creates(path, owner[0], owner[1]) {
				want(t, c, 0, s)
				var st unix.Stat_t
				err := unix.Lstat(filepath.Join(dir, string(s.q.Path)), &st)
				if err != nil || st.Uid != owner[0] || st.Gid != owner[1] {
					t.Errorf("%v: owner %d:%d, %v", s, st.Uid, st.Gid, err)
				}
			}
			// Nobody but 0:0 has more than CAP_DAC_OVERRIDE.
			device := mknod(path+"device", unix.S_IFCHR|0o600, 0x103, owner[0], owner[1])
			if owner == [2]uint32{0, 0} {
				want(t, c, 0, device)
			} else {
				want(t, c, unix.EPERM, device)
			}
			// And nothing is lost.
			want(t, c, 0,
				chown("/secret", uint32(n), 7), chmod("/secret", 0o4755), chown("/secret", 0, 0),
				mknod(path+"0", unix.S_IFCHR|0o600, 0x103, 0, 0))
		}
	}
	for tid, st := range helpertest.Threads(t, p.Server()) {
		if st["Uid"] != "0\t0\t0\t0" || st["Gid"] != "0\t0\t0\t0" || st["CapEff"] != st["CapPrm"] {
			t.Errorf("thread %s is left as uid %s, gid %s, capabilities %s", tid, st["Uid"], st["Gid"], st["CapEff"])
		}
	}
}

func TestCreateAsNobody(t *testing.T) {
	t.Parallel()
	dir, c, _ := newOurs(t)
	before := look(t, dir, time.Unix(1<<40, 0))
	for _, owner := range [][2]uint32{{none, 0}, {0, none}, {none, none}, {1000, none}, {none, 1000}} {
		want(t, c, unix.EINVAL, creates("/dir/x", owner[0], owner[1])...)
		want(t, c, unix.EINVAL, create("/file", unix.O_RDWR, 0, owner[0], owner[1]))
	}
	if d := difference(look(t, dir, time.Unix(1<<40, 0)), before); d != "" {
		t.Errorf("changed:\n%s", d)
	}
	want(t, c, 0, creates("/dir/x", 1000, 1000)...)
}

// The longest values of extended attributes: a reply holds 65534 bytes.
func TestLongXattr(t *testing.T) {
	t.Parallel()
	w := newWorld(t, helpertest.Tmpfs(t))
	for _, side := range []side{w.ours, w.theirs} {
		for name, sizes := range map[string][]int{
			"values": {65533, 65534, 65535, 65536}, "names": nil, "manynames": nil,
		} {
			path := filepath.Join(side.dir, name)
			if err := os.WriteFile(path, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, n := range sizes {
				setXattr(t, path, fmt.Sprintf("security.%d", n), strings.Repeat("v", n))
			}
		}
		// Lists of 65534 and of 65536 bytes, from names of at most 255.
		for name, sizes := range map[string][]int{"names": sizesOf(65534), "manynames": sizesOf(65536)} {
			for i, n := range sizes {
				padding := strings.Repeat("x", n-1-len("security.0000"))
				setXattr(t, filepath.Join(side.dir, name), fmt.Sprintf("security.%04d%s", i, padding), "")
			}
		}
	}
	for _, c := range []struct {
		step
		errno unix.Errno
		size  int // of what is asked for
	}{
		{lgetxattr("/values", "security.65533", 65536), 0, 65533},
		{lgetxattr("/values", "security.65534", 65534), 0, 65534},
		{lgetxattr("/values", "security.65534", 65533), unix.ERANGE, 0},
		{lgetxattr("/values", "security.65534", 1<<20), 0, 65534},
		{lgetxattr("/values", "security.65535", 65535), unix.ENOBUFS, 0},
		{lgetxattr("/values", "security.65535", 65536), unix.ENOBUFS, 65535},
		{lgetxattr("/values", "security.65536", 65536), unix.ENOBUFS, 65536},
		{lgetxattr("/values", "security.65536", 65535), unix.ERANGE, 0},
		{lgetxattr("/values", "security.65536", 1<<20), unix.ENOBUFS, 65536},
		{lgetxattr("/values", "security.65536", 0), 0, 65536},
		{llistxattr("/names", 65534), 0, 65534},
		{llistxattr("/names", 65533), unix.ERANGE, 0},
		{llistxattr("/names", 0), 0, 65534},
		{llistxattr("/manynames", 65536), unix.ENOBUFS, 65536},
		{llistxattr("/manynames", 0), 0, 65536},
	} {
		// The C helper answers 65536 bytes with none: its length has 16 bits.
		if c.errno != unix.ENOBUFS || c.size != 65536 {
			if err := w.compare(c.step, true, coarseNow()); err != nil {
				t.Error(err)
			}
		}
		a := ask(t, w.ours.client, c.step)
		size := len(a.Payload) - 2
		if c.q.Size == 0 {
			size = int(int32(u32(a.Payload)))
		}
		if a.Errno != c.errno || c.errno == 0 && size != c.size {
			t.Errorf("%v: %v, %d bytes, want %v, %d", c.step, a.Errno, size, c.errno, c.size)
		}
	}
}

// sizesOf divides a length into those of names.
func sizesOf(total int) (sizes []int) {
	for total > 256+30 {
		sizes, total = append(sizes, 256), total-256
	}
	return append(sizes, total/2, total-total/2)
}

func setXattr(t *testing.T, path, name, value string) {
	t.Helper()
	if err := unix.Lsetxattr(path, name, []byte(value), 0); err != nil {
		t.Fatalf("%.20s: %v", name, err)
	}
}

// deepPath returns a path of that length whose pieces are names of directories.
func deepPath(length int) string {
	var b strings.Builder
	for n := 0; b.Len() < length; n++ {
		piece := min(200, length-b.Len()-1)
		if rest := length - b.Len() - 1 - piece; rest > 0 && rest < 2 {
			piece -= 2 // so that the last piece is a name
		}
		b.WriteString("/" + fmt.Sprintf("%03d%s", n, strings.Repeat("d", 200))[:piece])
	}
	return b.String()
}

// openDeep opens a directory whose path is too long for the kernel.
func openDeep(t *testing.T, dir, path string) int {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	for piece := range strings.SplitSeq(path[1:], "/") {
		if err != nil {
			t.Fatal(err)
		}
		var next int
		next, err = unix.Openat(fd, piece, unix.O_PATH|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		fd = next
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// Every request works with a path as long as its frame can hold, built step by
// step as a guest would.
func TestLongPaths(t *testing.T) {
	t.Parallel()
	dir, c, _ := newOurs(t)
	const length = 65300
	deep, middle := deepPath(length), deepPath(32600)
	for i := range deep {
		if i > 0 && deep[i] == '/' {
			want(t, c, 0, mkdir(deep[:i], 0o755, 1000, 1001))
		}
	}
	want(t, c, 0, mkdir(deep, 0o755, 1000, 1001))
	want(t, c, unix.EEXIST, mkdir(deep, 0o755, 0, 0))
	for i := len(middle) - 200; i < len(middle); i++ { // which is none of deep's
		if middle[i] == '/' || i == len(middle)-1 {
			s := mkdir(strings.TrimSuffix(middle[:i+1], "/"), 0o755, 0, 0)
			if a := ask(t, c, s); a.Errno != 0 && a.Errno != unix.EEXIST {
				t.Errorf("%v: %v", s, a.Errno)
			}
		}
	}
	at, atMiddle := openDeep(t, dir, deep), openDeep(t, dir, middle)
	stat := func(at int, name string) (st unix.Stat_t, err error) {
		err = unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		return st, err
	}
	xattr := func(at int, name, attr string) string {
		b := make([]byte, 100)
		n, err := unix.Lgetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", at, name), attr, b)
		if err != nil {
			return err.Error()
		}
		return string(b[:n])
	}

	for _, r := range []struct {
		make  func(path string) step
		check func(name string, a helpertest.Answer) bool
	}{
		{func(p string) step { return open(p, unix.O_RDWR) }, nil},
		{func(p string) step { return open(p, unix.O_RDWR|unix.O_CREAT) }, nil},
		{func(p string) step { return open(p+"-", unix.O_RDWR|unix.O_CREAT) },
			func(name string, _ helpertest.Answer) bool {
				_, err := stat(at, name+"-")
				return err == nil
			}},
		{func(p string) step { return create(p+"-", unix.O_CREAT|unix.O_RDWR, 0o640, 1000, 1001) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name+"-")
				return err == nil && st.Uid == 1000 && st.Gid == 1001 && st.Mode == unix.S_IFREG|0o640
			}},
		{func(p string) step { return mknod(p+"-", unix.S_IFCHR|0o600, 0x103, 0, 0) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name+"-")
				return err == nil && st.Rdev == 0x103
			}},
		{func(p string) step { return mkdir(p+"-", 0o700, 1000, 1001) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name+"-")
				return err == nil && st.Uid == 1000 && st.Mode == unix.S_IFDIR|0o700
			}},
		{func(p string) step { return symlink("t", p+"-", 1000, 1001) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name+"-")
				return err == nil && st.Uid == 1000 && st.Mode == unix.S_IFLNK|0o777
			}},
		{func(p string) step { return link("/file", p+"-") },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name+"-")
				return err == nil && st.Size == int64(len("content\n"))
			}},
		{func(p string) step { return link(p, "/linked") },
			func(string, helpertest.Answer) bool {
				_, err := os.Lstat(dir + "/linked")
				return err == nil
			}},
		{lstat, func(_ string, a helpertest.Answer) bool { return u32(a.Payload[24:]) == unix.S_IFREG|0o644 }},
		{func(p string) step { return readlink(p+"l", 100) },
			func(_ string, a helpertest.Answer) bool {
				return string(a.Payload) == "\x06\x00target"
			}},
		{statfs, func(_ string, a helpertest.Answer) bool { return len(a.Payload) == codec.StatfsSize }},
		{func(p string) step { return chmod(p, 0o4711) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name)
				return err == nil && st.Mode == unix.S_IFREG|0o4711
			}},
		{func(p string) step { return chown(p, 5, 6) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name)
				return err == nil && st.Uid == 5 && st.Gid == 6
			}},
		{func(p string) step { return truncate(p, 12345) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name)
				return err == nil && st.Size == 12345
			}},
		{func(p string) step { return utime(p, 1, 2, 3, 4) },
			func(name string, _ helpertest.Answer) bool {
				st, err := stat(at, name)
				return err == nil && st.Atim.Nano() == 1e9+2 && st.Mtim.Nano() == 3e9+4
			}},
		{func(p string) step { return rename(p, "/renamed") },
			func(name string, _ helpertest.Answer) bool {
				_, err := stat(at, name)
				_, err2 := os.Lstat(dir + "/renamed")
				return err == unix.ENOENT && err2 == nil
			}},
		{func(p string) step { return rename("/suid", p+"-") },
			func(name string, _ helpertest.Answer) bool {
				_, err := stat(at, name+"-")
				return err == nil
			}},
		{remove, func(name string, _ helpertest.Answer) bool {
			_, err := stat(at, name)
			return err == unix.ENOENT
		}},
		{func(p string) step { return remove(p + "d") },
			func(name string, _ helpertest.Answer) bool {
				_, err := stat(at, name+"d")
				return err == unix.ENOENT
			}},
		{func(p string) step { return lgetxattr(p, "user.a", 10) },
			func(_ string, a helpertest.Answer) bool {
				return string(a.Payload) == "\x01\x00x"
			}},
		{func(p string) step { return llistxattr(p, 100) },
			func(_ string, a helpertest.Answer) bool {
				return string(a.Payload) == "\x07\x00user.a\x00"
			}},
		{func(p string) step { return lsetxattr(p, "user.b", "new", 3, 0) },
			func(name string, _ helpertest.Answer) bool {
				return xattr(at, name, "user.b") == "new"
			}},
		{func(p string) step { return lremovexattr(p, "user.a") },
			func(name string, _ helpertest.Answer) bool {
				return xattr(at, name, "user.a") == unix.ENODATA.Error()
			}},
		{getversion, func(_ string, a helpertest.Answer) bool { return len(a.Payload) == 8 }},
	} {
		// The frame is as long as can be: the name fills it.
		s := r.make(deep + "/")
		name := strings.Repeat("n", codec.MaxFrame-len(s.frame(true)))
		s = r.make(deep + "/" + name)
		if n := len(s.frame(true)); n != codec.MaxFrame {
			t.Fatalf("%v: a frame of %d bytes", s.t, n)
		}
		fd, err := unix.Openat(at, name, unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fsetxattr(fd, "user.a", []byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		if err := unix.Symlinkat("target", at, name+"l"); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mkdirat(at, name+"d", 0o755); err != nil {
			t.Fatal(err)
		}
		a := ask(t, c, s)
		if a.File != nil {
			a.File.Close()
		}
		if a.Errno != 0 || r.check != nil && !r.check(name, a) {
			t.Errorf("%v of %d bytes: %v, and not as it should be", s.t, len(s.frame(true)), a.Errno)
		}
		for _, n := range []string{name, name + "l", name + "-"} {
			unix.Unlinkat(at, n, 0)
		}
		unix.Unlinkat(at, name+"d", unix.AT_REMOVEDIR)
		unix.Unlinkat(at, name+"-", unix.AT_REMOVEDIR)
		os.Remove(dir + "/linked")
		// The thread is again where it was.
		want(t, c, 0, lstat("dir/file"), statfs("dir/sub"), lgetxattr("file", "user.a", 0))
	}

	// Both names long.
	want(t, c, 0,
		create(middle+"/a", unix.O_CREAT, 0o644, 0, 0),
		rename(middle+"/a", middle+"/b"), link(middle+"/b", middle+"/c"),
		mkdir(middle+"/d", 0o755, 0, 0), rename(middle+"/c", middle+"/d/c"))
	if st, err := stat(atMiddle, "d/c"); err != nil || st.Nlink != 2 {
		t.Errorf("renamed and linked with long paths: %d links, %v", st.Nlink, err)
	}

	// Names and errors are as they are in short paths.
	slashes, dots := strings.Repeat("/", 30000), strings.Repeat("/.", 15000)
	up := strings.Repeat("/..", 10000)
	want(t, c, 0,
		lstat(slashes+"file"), lstat(dots+"/file"), lstat(up+"/file"), lstat("/dir"+dots+"/file"), statfs(up+"/dir"),
		lstat(strings.Repeat("/dir/..", 9000)+"/file"), open(strings.Repeat("/dirlink/../dir/..", 30)+dots+"/link", 0),
		lstat("."+dots+"/file"))
	want(t, c, unix.ENOENT,
		lstat("/missing"+dots+"/file"), lstat(dots+"/missing"), chmod(dots+"/out", 0o777), open(up+"/etc/passwd", 0),
		statfs(up+"/out"), getversion(dots+"/dangling"))
	want(t, c, unix.ENOTDIR, lstat("/file"+dots+"/x"), truncate(up+"/file/x", 0))
	want(t, c, unix.ENAMETOOLONG,
		lstat("/"+strings.Repeat("n", 60000)), lstat(dots+"/"+strings.Repeat("n", 256)),
		statfs("/"+strings.Repeat("n", 5000)), rename("/file", "/"+strings.Repeat("n", 5000)+"/x"))
	want(t, c, unix.ENXIO, open(dots+"/fifo", 0), open(dots+"/null", unix.O_RDWR))
	want(t, c, unix.ENOTEMPTY, remove(up))
	want(t, c, unix.ELOOP, open(strings.Repeat("/dirlink/..", 5000)+"/file", 0), lstat("/loop"+dots+"/x"))
	want(t, c, unix.EEXIST, create(dots+"/file", unix.O_CREAT|unix.O_EXCL, 0, 1000, 1000))

	// And the way back, step by step.
	want(t, c, 0, remove(middle+"/b"), remove(middle+"/d/c"), remove(middle+"/d"))
	for path := deep; path != ""; path = path[:strings.LastIndexByte(path, '/')] {
		if a := ask(t, c, remove(path)); a.Errno != 0 {
			if a.Errno != unix.ENOTEMPTY {
				t.Fatalf("remove a path of %d bytes: %v", len(path), a.Errno)
			}
			break // where middle branches off
		}
	}
}

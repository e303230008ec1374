package ops_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// mountAgain binds dir to a new place with other flags.
func mountAgain(t *testing.T, dir string, flags uintptr) string {
	t.Helper()
	at := helpertest.ShortDir(t)
	if err := unix.Mount(dir, at, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	if err := unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
		t.Fatal(err)
	}
	return at
}

// newReadOnlyWorld has our helper with --readonly of a writable tree as one
// side, and without it of a read-only mount of another as the other.
func newReadOnlyWorld(t *testing.T, dir string) *world {
	t.Helper()
	w := &world{}
	for _, s := range []struct {
		*side
		name    string
		flags   uintptr
		options []string
	}{
		{&w.ours, "option", unix.MS_NOATIME, []string{"--readonly"}}, // a read-only mount counts no reading
		{&w.theirs, "mount", unix.MS_RDONLY, nil},
	} {
		tree := filepath.Join(dir, s.name)
		if err := os.Mkdir(tree, 0o755); err != nil {
			t.Fatal(err)
		}
		makeTree(t, tree)
		s.dir = mountAgain(t, tree, s.flags)
		_, s.client = helpertest.Pair(t, helpertest.Ours(t), s.dir, s.options...)
	}
	return w
}

// With --readonly each request is answered as on a read-only mount, where all
// of what TestConformance asks is asked, and much at random. Nothing changes.
func TestReadOnly(t *testing.T) {
	for name, dir := range map[string]func(testing.TB) string{
		"disk":  func(tb testing.TB) string { return tb.TempDir() },
		"tmpfs": helpertest.Tmpfs,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newReadOnlyWorld(t, dir(t))
			before := look(t, w.ours.dir, epoch.AddDate(1000, 0, 0))
			now := coarseNow()
			compare := func(s step, nul bool) {
				t.Helper()
				if s.t.AnswersFD() && s.q.Flags&unix.O_ACCMODE == unix.O_ACCMODE {
					return // TestReadOnlyAccessMode3
				}
				if err := w.compare(s, nul, now); err != nil {
					t.Error(err)
				}
			}
			for _, c := range cases {
				for _, s := range c.steps {
					if !testing.Short() {
						compare(s, false)
					}
					compare(s, true)
				}
			}
			for i, f := range ofPath {
				for j, p := range paths {
					if testing.Short() && (i+j)%10 != 0 {
						continue
					}
					compare(f(p), (i+j)%2 == 0)
				}
			}
			for i, path := range paths {
				if testing.Short() && i%10 != 0 {
					continue
				}
				for _, flags := range []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_TRUNC} {
					for _, more := range []int{
						0, unix.O_CREAT, unix.O_CREAT | unix.O_EXCL, unix.O_DIRECTORY, unix.O_TMPFILE,
						unix.O_PATH | unix.O_CREAT, unix.O_NOFOLLOW, unix.O_NOFOLLOW | unix.O_CREAT, unix.O_APPEND,
					} {
						compare(open(path, flags|more), false)
						compare(create(path, flags|more, 0o644, 1000, 1000), true)
					}
				}
			}
			g := &generator{rand.New(rand.NewPCG(7, 0)), w.theirs.dir}
			random := 10000
			if testing.Short() {
				random = 500
			}
			for range random {
				compare(g.next(), g.IntN(2) == 0)
			}
			if d := difference(look(t, w.ours.dir, epoch.AddDate(1000, 0, 0)), before); d != "" {
				t.Errorf("changed:\n%s", d)
			}
		})
	}
}

// Where something would have changed, the answer is EROFS: for each request
// there is a case that a writable export would have done.
func TestReadOnlyRefuses(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	makeTree(t, tree)
	dir := mountAgain(t, tree, unix.MS_NOATIME) // the test itself reads
	_, c := helpertest.Pair(t, helpertest.Ours(t), dir, "--readonly")
	before := look(t, dir, epoch.AddDate(1000, 0, 0))
	want(t, c, unix.EROFS,
		open("/file", unix.O_WRONLY), open("/file", unix.O_RDWR), open("/link", unix.O_RDWR|unix.O_CREAT),
		open("/file", unix.O_TRUNC), open("/new", unix.O_CREAT), open("/dangling", unix.O_CREAT),
		open("/dir", unix.O_TMPFILE|unix.O_RDWR), create("/new", unix.O_CREAT|unix.O_RDWR, 0o644, 1000, 1000),
		create("/file", unix.O_RDWR, 0, 0, 0), create("/new", unix.O_CREAT, 0, 0, 1000),
		mknod("/new", unix.S_IFREG, 0, 0, 0), mkdir("/new", 0o755, 1000, 1000), mkdir("/new/", 0o755, 0, 0),
		symlink("x", "/new", 0, 0), link("/file", "/new"), chmod("/file", 0o600),
		chown("/file", 1, 1), chown("/file", none, none), truncate("/file", 0), utime("/file", 1, 1, 1, 1),
		rename("/file", "/new"), rename("/missing", "/new"), remove("/file"), remove("/empty"),
		lsetxattr("/file", "user.new", "x", 1, 0), lremovexattr("/file", "user.a"))
	want(t, c, unix.ENOENT, creates(deepPath(5000), 1000, 1000)...)
	want(t, c, unix.EROFS, creates(strings.Repeat("/.", 5000)+"/new", 1000, 1000)...)
	want(t, c, unix.ENAMETOOLONG, creates("/"+strings.Repeat("n", 5000), 0, 0)...)
	// What changes nothing works, and what is wrong anyway is told.
	want(t, c, 0,
		open("/file", 0), open("/file", unix.O_CREAT), create("/file", unix.O_CREAT, 0, 1000, 1000),
		open("/dir", unix.O_DIRECTORY), open("/file", unix.O_PATH|unix.O_RDWR), lstat("/file"), readlink("/link", 100),
		statfs("/"), lgetxattr("/file", "user.a", 10), llistxattr("/file", 100), getversion("/file"))
	want(t, c, unix.EEXIST,
		mkdir("/dir", 0, 0, 0), symlink("x", "/file", 0, 0), mknod("/null", unix.S_IFREG, 0, 1, 1),
		link("/file", "/hard"), open("/file", unix.O_CREAT|unix.O_EXCL))
	want(t, c, unix.ENXIO, open("/fifo", unix.O_RDWR), create("/null", unix.O_CREAT|unix.O_RDWR, 0, 0, 0))
	if d := difference(look(t, dir, epoch.AddDate(1000, 0, 0)), before); d != "" {
		t.Errorf("changed:\n%s", d)
	}
}

// Access mode 3 asks for the right to write, so it is refused, as on a file
// system that is read-only itself; a read-only mount of a writable one forgets.
func TestReadOnlyAccessMode3(t *testing.T) {
	t.Parallel()
	dir := helpertest.Tmpfs(t)
	makeTree(t, dir)
	_, option := helpertest.Pair(t, helpertest.Ours(t), dir, "--readonly")
	want(t, option, unix.EROFS, open("/file", 3), create("/file", 3|unix.O_CREAT, 0, 1000, 1000))
	want(t, option, unix.EISDIR, open("/dir", 3))
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, fs := helpertest.Pair(t, helpertest.Ours(t), dir)
	want(t, fs, unix.EROFS, open("/file", 3), create("/file", 3|unix.O_CREAT, 0, 1000, 1000))
	want(t, fs, unix.EISDIR, open("/dir", 3))
}

// With --readonly the mount is read-only, not the answers alone: QEMU can't
// change anything through a descriptor that it has been given.
func TestReadOnlyReopened(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	makeTree(t, dir)
	_, c := helpertest.Pair(t, helpertest.Ours(t), dir, "--readonly")
	opened := func(path string) int {
		a, err := c.TryDo(codec.Open, codec.Request{Path: helpertest.Path(path)})
		if err != nil || a.Errno != 0 {
			t.Fatalf("OPEN %s: %v, %v", path, a.Errno, err)
		}
		t.Cleanup(func() { a.File.Close() })
		return int(a.File.Fd())
	}
	file, sub := opened("/file"), opened("/dir")
	again := fmt.Sprintf("/proc/self/fd/%d", file)
	fd, err := unix.Open(again, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	for what, err := range map[string]error{
		"open it for writing": err,
		"truncate it":         unix.Truncate(again, 0),
		"fchmod it":           unix.Fchmod(file, 0o777),
		"make a file":         unix.Mknodat(sub, "new", unix.S_IFREG|0o600, 0),
		"make a directory":    unix.Mkdirat(sub, "new", 0o700),
	} {
		if err != unix.EROFS {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
}

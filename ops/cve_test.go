package ops_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// The known holes of 9p servers and of what is like them, and the faults of
// QEMU's own helper. Each has a test here that fails where the hole is open.
//
//	hole            what                                                test
//	CVE-2023-2861   special files are opened: a guest reaches devices   TestCVE2023_2861
//	                of the host, or hangs the helper by a FIFO          TestCVE2023_2861Race
//	CVE-2022-0358   groups of whoever started the server decide about   TestCVE2022_0358
//	                setgid bits
//	CVE-2020-28914  read-only is left to the guest                      TestReadOnly, TestReadOnlyRefuses
//	CVE-2016-9602   links lead out of the export                        TestCVE2016_9602, TestCVE2016_9602Race
//	CVE-2016-8578   an empty string crashes                             TestCVE2016_8578
//	CVE-2016-7116   ".." leads out of the export                        TestCVE2016_9602
//
//	QEMU's helper   GETVERSION tells of its stack                       TestGetVersion
//	                OPEN, GETVERSION of a FIFO or device hang           TestCVE2023_2861
//	                LSETXATTR sizes beyond the value: its heap          TestLengthsThatLie
//	                LGETXATTR, READLINK of negative sizes abort it      TestLengthsThatLie
//	                LGETXATTR of 1 GiB takes that                       TestLengthsThatLie
//	                creates as 0:gid lose its capabilities              TestCreateAsRootOfAnotherGroup,
//	                                                                    TestIdentityIsTakenBack
//	                so do those as -1                                   TestCreateAsNobody
//	                its starter's groups are kept                       TestCVE2022_0358
//	                no path of more than 4095 bytes                     TestLongPaths
//	                values of more than 65534 bytes                     TestLongXattr
//	                what is wrong at start is not told                  pool/supervisor: TestRefusals
//	                a second VM is not served                           pool/supervisor: TestNameComesBack

// opener is a thread that opens a FIFO, which blocks until another process
// opens the other end.
type opener struct {
	path string
	tid  int
	done chan struct{}
}

func newOpener(t *testing.T, path string, flags int) *opener {
	t.Helper()
	o := &opener{path: path, done: make(chan struct{})}
	tid := make(chan int)
	go func() {
		defer close(o.done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		if fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0); err == nil {
			unix.Close(fd)
		}
	}()
	o.tid = <-tid
	o.mustBlock(t)
	return o
}

// mustBlock fails the test if somebody has opened the FIFO's other end. That
// wakes the thread, so it no longer sleeps in its open.
func (o *opener) mustBlock(t *testing.T) {
	t.Helper()
	helpertest.Eventually(t, "the opener of the FIFO sleeps", func() bool {
		select {
		case <-o.done:
			t.Fatal("the helper has opened the FIFO")
		default:
		}
		task := fmt.Sprintf("/proc/self/task/%d/", o.tid)
		call, _ := os.ReadFile(task + "syscall")
		stat, _ := os.ReadFile(task + "stat")
		_, state, _ := strings.Cut(string(stat), ") ")
		return strings.HasPrefix(string(call), strconv.Itoa(unix.SYS_OPENAT)+" ") && strings.HasPrefix(state, "S")
	})
}

// release lets the thread go on.
func (o *opener) release(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	<-o.done
}

// watchOpens returns a function that fails the test if any of the files has
// been opened since.
func watchOpens(t *testing.T, dir string, names ...string) func() {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for _, name := range names {
		if _, err := unix.InotifyAddWatch(fd, filepath.Join(dir, name), unix.IN_OPEN); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		t.Helper()
		if n, err := unix.Read(fd, make([]byte, 4096)); err != unix.EAGAIN {
			t.Errorf("opened %d of %q, %v", n/unix.SizeofInotifyEvent, names, err)
		}
	}
}

// Special files are never opened or, where all mounts refuse devices, no device and
// no socket is, and a FIFO never waited for.
func TestCVE2023_2861(t *testing.T) {
	t.Parallel()
	for _, sandbox := range []string{"chroot", "namespace"} {
		t.Run(sandbox, func(t *testing.T) { wantNoSpecialFiles(t, sandbox == "chroot", "--sandbox="+sandbox) })
	}
}

func wantNoSpecialFiles(t *testing.T, never bool, options ...string) {
	dir, c, _ := newOurs(t, options...)
	fifo := filepath.Join(dir, "fifo")
	watched := []string{"null", "block", "sock"}
	blocked := func(flags int) (still, release func()) { return func() {}, func() {} }
	if never {
		watched = append(watched, "fifo")
		blocked = func(flags int) (still, release func()) {
			o := newOpener(t, fifo, flags)
			return func() { o.mustBlock(t) }, func() { o.release(t, fifo) }
		}
	}
	notOpened := watchOpens(t, dir, watched...)
	still, release := blocked(unix.O_WRONLY)
	for _, path := range []string{"/fifo", "/fifolink"} {
		want(t, c, unix.ENXIO,
			open(path, unix.O_RDONLY), open(path, unix.O_RDONLY|unix.O_NONBLOCK),
			open(path, unix.O_RDONLY|unix.O_CREAT), open(path, unix.O_RDWR), open(path, 3),
			create(path, unix.O_RDONLY, 0, 1000, 1000), create(path, unix.O_RDONLY|unix.O_CREAT, 0o600, 0, 0))
		want(t, c, unix.ENOTTY, getversion(path))
	}
	for _, path := range []string{"/null", "/block", "/sock"} {
		want(t, c, unix.ENXIO,
			open(path, unix.O_RDWR), open(path, unix.O_CREAT|unix.O_WRONLY), open(path, unix.O_RDONLY),
			open(path, unix.O_RDONLY|unix.O_NONBLOCK), open(path, 3),
			create(path, unix.O_CREAT, 0o600, 1000, 1000))
	}
	want(t, c, unix.ENOTTY, getversion("/null"), getversion("/block"))
	want(t, c, unix.ENXIO, getversion("/sock"))
	still()
	notOpened()
	release()

	notOpened = watchOpens(t, dir, watched...)
	still, release = blocked(unix.O_RDONLY)
	want(t, c, unix.ENXIO,
		open("/fifo", unix.O_WRONLY), open("/fifo", unix.O_WRONLY|unix.O_TRUNC),
		open("/fifo", unix.O_WRONLY|unix.O_NONBLOCK),
		create("/fifolink", unix.O_WRONLY|unix.O_CREAT, 0o600, 1000, 1000))
	still()
	notOpened()
	release()
}

// What was opened has the flags that were asked for, and no others.
func TestOpenFlags(t *testing.T) {
	t.Parallel()
	for _, sandbox := range []string{"chroot", "namespace"} {
		t.Run(sandbox, func(t *testing.T) {
			_, c, _ := newOurs(t, "--sandbox="+sandbox)
			for _, flags := range []int{
				unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR | unix.O_APPEND, unix.O_RDWR | unix.O_NONBLOCK,
				unix.O_RDONLY | unix.O_NOATIME, unix.O_WRONLY | unix.O_SYNC, unix.O_RDWR | unix.O_CREAT,
				unix.O_WRONLY | unix.O_TRUNC | unix.O_APPEND | unix.O_NONBLOCK,
			} {
				a := ask(t, c, open("/file", flags))
				if a.Errno != 0 {
					t.Fatalf("%#o: %v", flags, a.Errno)
				}
				const kept = unix.O_ACCMODE | unix.O_APPEND | unix.O_NONBLOCK | unix.O_NOATIME | unix.O_SYNC
				got, err := unix.FcntlInt(a.File.Fd(), unix.F_GETFL, 0)
				if err != nil || got&kept != flags&kept {
					t.Errorf("%#o: the descriptor has %#o, %v", flags, got, err)
				}
				a.File.Close()
			}
		})
	}
}

// A process that has leased a file, and does not let go, keeps whoever opens it
// waiting, but no worker and nobody else.
func TestLeasedFile(t *testing.T) {
	t.Parallel()
	for _, sandbox := range []string{"chroot", "namespace"} {
		t.Run(sandbox, func(t *testing.T) {
			dir := t.TempDir()
			makeTree(t, dir)
			_, name := helpertest.Listen(t, helpertest.Ours(t), dir, "--workers=4", "--sandbox="+sandbox)
			f, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
				t.Fatal(err)
			}
			asked := open("/file", unix.O_RDWR)
			var waiting []*helpertest.Client
			for range 20 {
				c := helpertest.Dial(t, name)
				c.Send(asked.frame(true))
				waiting = append(waiting, c)
			}
			other := helpertest.Dial(t, name)
			want(t, other, unix.EAGAIN, open("/file", unix.O_RDWR|unix.O_NONBLOCK))
			for range 100 {
				want(t, other, 0, lstat("/file"))
			}
			for _, c := range waiting {
				if err := c.Silent(time.Millisecond); err != nil {
					t.Fatalf("an answer while the file is leased: %v", err)
				}
			}
			if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
				t.Fatal(err)
			}
			for _, c := range waiting {
				a := c.Read(asked.t)
				if a.Errno != 0 {
					t.Fatal(a.Errno)
				}
				a.File.Close()
			}
		})
	}
}

// A file that a user makes in a setgid directory of a group that is not his
// loses its setgid bit, whatever groups the helper was started with.
func TestCVE2022_0358(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	makeTree(t, dir)
	ours, theirs := helpertest.SocketPair(t)
	p := helpertest.Start(t, helpertest.Command{
		Path:  helpertest.Ours(t),
		Args:  []string{"-n", "-p", dir, "-f", "3"},
		Files: []*os.File{theirs},
		Cred:  credential(0, 0, 100, 200),
	})
	c := helpertest.NewClient(t, ours)
	want(t, c, 0,
		create("/sgid/new", unix.O_CREAT, 0o2775, 1000, 1000),
		mknod("/sgid/nod", unix.S_IFREG|0o2775, 0, 1000, 1000), open("/sgid", unix.O_DIRECTORY),
		create("/sgid/as200", unix.O_CREAT, 0o2775, 1000, 200), create("/sgid/root", unix.O_CREAT, 0o2775, 0, 1000),
		create("/sgid/own", unix.O_CREAT, 0o2775, 1000, 100)) // his group: the bit is his to set
	for name, mode := range map[string]os.FileMode{
		"new": 0o775, "nod": 0o775, "as200": 0o775, "root": 0o775, "own": 0o775 | os.ModeSetgid,
	} {
		st, err := os.Stat(filepath.Join(dir, "sgid", name))
		if err != nil || st.Mode() != mode {
			t.Errorf("%s: mode %v, %v, want %v", name, st.Mode(), err, mode)
		}
	}
	for tid, st := range helpertest.Threads(t, p.Server()) {
		if st["Groups"] != "" {
			t.Errorf("thread %s is in groups %s", tid, st["Groups"])
		}
	}
}

// exchange swaps pairs of names, again and again, until the test is over.
func exchange(t *testing.T, pairs ...[2]string) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		for {
			for _, p := range pairs {
				if err := unix.Renameat2(unix.AT_FDCWD, p[0], unix.AT_FDCWD, p[1], unix.RENAME_EXCHANGE); err != nil {
					done <- err
					return
				}
			}
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		if err := <-done; err != nil {
			t.Error("exchange:", err)
		}
	})
}

// race runs round about a second, and on until both sides of the race have been
// seen: that tells the test took place.
func race(t *testing.T, round func() (one, other bool)) {
	t.Helper()
	var one, other bool
	for start := time.Now(); !t.Failed() && (time.Since(start) < time.Second || !one || !other); {
		if time.Since(start) > helpertest.Patience {
			t.Fatalf("no race: seen %v, %v", one, other)
		}
		a, b := round()
		one, other = one || a, other || b
	}
}

// A name is now a regular file, now a FIFO, a device or a socket. Whatever
// the helper finds, it answers, and gives away nothing but the regular file.
func TestCVE2023_2861Race(t *testing.T) {
	t.Parallel()
	for _, sandbox := range []string{"chroot", "namespace"} {
		t.Run(sandbox, func(t *testing.T) { raceForSpecialFiles(t, sandbox == "chroot", "--sandbox="+sandbox) })
	}
}

func raceForSpecialFiles(t *testing.T, never bool, options ...string) {
	dir, c, _ := newOurs(t, options...)
	watched := []string{"null", "sock"}
	if never {
		watched = append(watched, "fifo")
	}
	notOpened := watchOpens(t, dir, watched...)
	var pairs [][2]string
	var paths []string
	for _, special := range []string{"fifo", "null", "sock"} {
		name := "was-" + special
		if err := os.WriteFile(filepath.Join(dir, name), []byte("regular"), 0o666); err != nil {
			t.Fatal(err)
		}
		pairs = append(pairs, [2]string{filepath.Join(dir, name), filepath.Join(dir, special)})
		paths = append(paths, "/"+name, "/"+special)
	}
	if err := os.Symlink("was-fifo", filepath.Join(dir, "to")); err != nil {
		t.Fatal(err)
	}
	t.Run("swapping", func(t *testing.T) {
		exchange(t, pairs...)
		race(t, func() (regular, special bool) {
			for _, path := range append(paths, "/to") {
				for _, s := range []step{
					open(path, unix.O_RDONLY), open(path, unix.O_WRONLY), open(path, unix.O_RDWR|unix.O_CREAT),
					open(path, unix.O_TRUNC|unix.O_WRONLY), open(path, unix.O_CREAT|unix.O_EXCL),
					create(path, unix.O_CREAT|unix.O_RDWR, 0o600, 1000, 1000), create(path, unix.O_WRONLY, 0, 0, 0),
					getversion(path),
				} {
					a := ask(t, c, s)
					switch {
					case a.Errno == unix.ENXIO || s.t == codec.GetVersion && a.Errno == unix.ENOTTY:
						special = true
					case a.Errno == unix.EEXIST && s.q.Flags&unix.O_EXCL != 0:
					case a.Errno != 0:
						t.Errorf("%v: %v", s, a.Errno)
					case a.File != nil:
						regular = true
						if st, err := a.File.Stat(); err != nil || !st.Mode().IsRegular() {
							t.Errorf("%v: opened %v, %v", s, st.Mode(), err)
						}
						a.File.Close()
					}
				}
			}
			return regular, special
		})
	})
	notOpened()
}

// outside is what lies beside the export, and what it must not be told by: the
// file's size, attribute and target are nowhere else.
const outsideSize = 4242

// newOutside makes an export and a directory beside it, with links to that in
// the export, and returns a check that it is as it was.
func newOutside(t *testing.T) (dir, outside string, c *helpertest.Client, check func()) {
	t.Helper()
	dir, c, _ = newOurs(t)
	outside = filepath.Join(filepath.Dir(dir), "outside")
	for _, err := range []error{
		os.MkdirAll(outside+"/sub", 0o755),
		os.WriteFile(outside+"/file", make([]byte, outsideSize), 0o644),
		os.Symlink("outside's", outside+"/link"),
		os.Mkdir(outside+"/only-here", 0o755),
		unix.Setxattr(outside+"/file", "user.outside", []byte("outside's"), 0),
		os.Symlink(outside, dir+"/absolute"),
		os.Symlink("../outside", dir+"/relative"),
		os.Symlink("../../../../../../../.."+outside, dir+"/up"),
		os.Symlink("/proc/self/root"+outside, dir+"/proc"),
		os.Symlink("/proc/self/cwd/../outside", dir+"/cwd"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	far := epoch.AddDate(1000, 0, 0)
	look(t, outside, far) // reading may count, once a day
	before := look(t, outside, far)
	return dir, outside, c, func() {
		t.Helper()
		if d := difference(look(t, outside, far), before); d != "" {
			t.Errorf("changed outside:\n%s", d)
		}
	}
}

// mustBeInside fails the test if an answer tells of anything outside.
func mustBeInside(t *testing.T, s step, a helpertest.Answer) {
	t.Helper()
	told := false
	if a.File != nil {
		st, err := a.File.Stat()
		told = err != nil || st.Size() == outsideSize
		if names, _ := a.File.Readdirnames(-1); slices.Contains(names, "only-here") {
			told = true
		}
		a.File.Close()
	}
	switch {
	case a.Errno != 0:
	case s.t == codec.Lstat:
		told = u64(a.Payload[44:]) == outsideSize
	case s.t == codec.Readlink, s.t == codec.Lgetxattr, s.t == codec.Llistxattr:
		told = strings.Contains(string(a.Payload), "outside's") || strings.Contains(string(a.Payload), "user.outside")
	}
	if told {
		t.Errorf("%v: %x: that is outside", s, a.Raw)
	}
}

// No link and no ".." leads out, for no request.
func TestCVE2016_9602(t *testing.T) {
	t.Parallel()
	_, outside, c, check := newOutside(t)
	for _, way := range []string{
		"/absolute", "/relative", "/up", "/proc", "/cwd", "/..", "/../..", "..",
		"../outside", "/../outside", "/dir/../../outside", "/dirlink/../../outside",
		"/../../../../../../.." + outside, outside, strings.Repeat("/..", 5000) + outside,
	} {
		for _, below := range []string{"/file", "/link", "/sub", "/new", ""} {
			for _, f := range append(ofPath,
				func(p string) step { return lgetxattr(p, "user.outside", 100) },
				func(p string) step { return open(p, unix.O_DIRECTORY) },
				func(p string) step { return open(p, unix.O_TMPFILE|unix.O_RDWR) }) {
				s := f(way + below)
				if s.t == codec.Remove || s.t == codec.Rename {
					continue // below
				}
				mustBeInside(t, s, ask(t, c, s))
			}
		}
	}
	for _, way := range []string{"/absolute", "/relative", "/up", "/proc", "/cwd", "/..", outside} {
		for _, below := range []string{"/file", "/link", "/sub", ""} {
			for _, s := range []step{rename(way+below, "/renamed"), rename("/suid", way+below), remove(way + below)} {
				mustBeInside(t, s, ask(t, c, s))
			}
		}
	}
	check()
}

// A name is now a directory, now a link out of the export, while requests go
// through it.
func TestCVE2016_9602Race(t *testing.T) {
	t.Parallel()
	dir, _, c, check := newOutside(t)
	var pairs [][2]string
	var ways []string
	for _, link := range []string{"absolute", "relative", "up"} {
		name := "was-" + link
		if err := os.Mkdir(filepath.Join(dir, name), 0o777); err != nil {
			t.Fatal(err)
		}
		pairs = append(pairs, [2]string{filepath.Join(dir, name), filepath.Join(dir, link)})
		ways = append(ways, "/"+name, "/"+link, "/dir/../"+link+"/../"+name, strings.Repeat("/.", 3000)+"/"+name)
	}
	t.Run("swapping", func(t *testing.T) {
		exchange(t, pairs...)
		n := 0
		race(t, func() (inside, outside bool) {
			way := ways[n%len(ways)]
			n++
			file := way + "/file"
			for _, s := range []step{
				create(file, unix.O_CREAT|unix.O_RDWR, 0o666, 1000, 1000), lstat(file),
				open(file, unix.O_RDWR), open(file, unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY), chmod(file, 0o777),
				chown(file, 5, 5), truncate(file, 1), utime(file, 1, 2, 3, 4), lsetxattr(file, "user.a", "x", 1, 0),
				lgetxattr(file, "user.outside", 100), llistxattr(file, 1000), lremovexattr(file, "user.outside"),
				statfs(file), getversion(file), readlink(way+"/link", 100), remove(way + "/link"), remove(way + "/sub"),
				open(way, unix.O_DIRECTORY), open(way, unix.O_TMPFILE|unix.O_RDWR), link("/file", way+"/hard"),
				rename(file, way+"/renamed"), rename(way+"/renamed", file), mkdir(way+"/new", 0o755, 0, 0),
				remove(way + "/new"), symlink("x", way+"/new", 1000, 1000), remove(way + "/new"),
				mknod(way+"/new", unix.S_IFREG, 0, 0, 0), remove(way + "/new"), remove(way + "/hard"), remove(file),
			} {
				a := ask(t, c, s)
				if s.t == codec.Create {
					inside, outside = inside || a.Errno == 0, outside || a.Errno == unix.ENOENT
				}
				mustBeInside(t, s, a)
			}
			return inside, outside
		})
	})
	check()
}

// Each string of each request may be empty, with its NUL or without.
func TestCVE2016_8578(t *testing.T) {
	t.Parallel()
	dir, c, _ := newOurs(t)
	before := look(t, dir, time.Unix(1<<40, 0))
	paths := func(make func(path string) step) []step { return []step{make("")} }
	empty := map[codec.Type][]step{
		codec.Open: {
			open("", 0), open("", unix.O_CREAT|unix.O_RDWR), open("", unix.O_TMPFILE|unix.O_RDWR),
			open("", unix.O_PATH), open("", unix.O_DIRECTORY),
		},
		codec.Create: {
			create("", unix.O_CREAT, 0o644, 0, 0), create("", unix.O_CREAT|unix.O_RDWR, 0o644, 1000, 1000),
			create("", 0, 0, 0, 1000),
		},
		codec.Mknod:        paths(func(p string) step { return mknod(p, unix.S_IFREG, 0, 1000, 1000) }),
		codec.Mkdir:        paths(func(p string) step { return mkdir(p, 0o755, 1000, 1000) }),
		codec.Symlink:      {symlink("", "/new", 1000, 1000), symlink("x", "", 1000, 1000), symlink("", "", 0, 0)},
		codec.Link:         {link("", "/new"), link("/file", ""), link("", "")},
		codec.Lstat:        paths(lstat),
		codec.Statfs:       paths(statfs),
		codec.Remove:       paths(remove),
		codec.GetVersion:   paths(getversion),
		codec.Readlink:     {readlink("", 100), readlink("", 2)},
		codec.Chmod:        paths(func(p string) step { return chmod(p, 0o777) }),
		codec.Chown:        paths(func(p string) step { return chown(p, 5, 5) }),
		codec.Truncate:     paths(func(p string) step { return truncate(p, 0) }),
		codec.Utime:        paths(func(p string) step { return utime(p, 1, 1, 1, 1) }),
		codec.Rename:       {rename("", "/new"), rename("/file", ""), rename("", "")},
		codec.Lgetxattr:    {lgetxattr("", "user.a", 100), lgetxattr("", "user.a", 0)},
		codec.Llistxattr:   {llistxattr("", 100), llistxattr("", 0)},
		codec.Lsetxattr:    {lsetxattr("", "user.new", "v", 1, 0), lsetxattr("", "user.new", "", 0, 0)},
		codec.Lremovexattr: {lremovexattr("", "user.a")},
	}
	for typ := codec.Open; typ < codec.NumTypes; typ++ {
		if empty[typ] == nil {
			t.Errorf("%v has not been asked for", typ)
		}
		for _, s := range empty[typ] {
			for _, nul := range []bool{false, true} {
				c.Send(s.frame(nul))
				if a := c.Read(s.t); a.Errno != unix.ENOENT {
					t.Errorf("%v (NUL: %v): %v", s, nul, a.Errno)
				}
			}
		}
		// And a frame with no field at all.
		want(t, c, unix.ENOBUFS, raw(typ))
	}
	want(t, c, unix.ERANGE,
		lgetxattr("/file", "", 100), lgetxattr("/file", "", 0), lsetxattr("/file", "", "v", 1, 0),
		lremovexattr("/file", ""))
	want(t, c, unix.EINVAL, lsetxattr("/file", "user.new", "", 1, 0))
	if d := difference(look(t, dir, time.Unix(1<<40, 0)), before); d != "" {
		t.Errorf("changed:\n%s", d)
	}
	want(t, c, 0, lsetxattr("/file", "user.new", "", 0, 0), lgetxattr("/file", "user.new", 0))
}

package ops_test

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/ops"
)

// local is the file system served in this process: its root is the root, so
// paths begin with that of a tree made for the test.
type local struct {
	fs   *ops.FS
	call ops.Call
	buf  []byte
	root string
}

func newLocal(tb testing.TB, dir string, opts ops.Options) *local {
	tb.Helper()
	helpertest.NeedRoot(tb)
	fds, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fds) })
	fs, err := ops.New(fds, opts, slog.New(slog.DiscardHandler))
	if err != nil {
		tb.Fatal(err)
	}
	root := filepath.Join(dir, "export")
	if err := os.Mkdir(root, 0o755); err != nil {
		tb.Fatal(err)
	}
	makeTree(tb, root)
	if err := os.Chmod(dir, 0o755); err != nil { // creates are by others than the directory's maker
		tb.Fatal(err)
	}
	return &local{fs: fs, root: root}
}

// do asks for a payload, and gives a descriptor back at once.
func (l *local) do(t codec.Type, payload []byte) unix.Errno {
	l.buf = append(l.buf[:0], payload...) // Do overwrites it
	l.fs.Do(t, l.buf, &l.call)
	if l.call.FD >= 0 {
		unix.Close(l.call.FD)
	}
	a, _ := codec.ParseAnswer(t, l.call.Out)
	return a.Errno
}

// onThreadOfItsOwn runs f on a thread that ends with it: what a request
// changes there, this process would keep.
func onThreadOfItsOwn(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// sequence is some requests that leave the tree as it was.
type sequence struct {
	name  string
	steps []step
}

// steady holds each request in each of its ways through this package, as it is
// asked for again and again. Paths are below the tree's root.
func steady() []sequence {
	long := strings.Repeat("/.", 3000)
	deep := strings.Repeat("/dir/..", 1000)
	return []sequence{
		{"Open", []step{open("/file", unix.O_RDWR), open("/link", unix.O_RDONLY)}},
		{"OpenDirectory", []step{open("/dir", unix.O_DIRECTORY), open("/dir", unix.O_PATH)}},
		{"OpenCreate", []step{
			open("/file", unix.O_RDWR|unix.O_CREAT),
			open("/new", unix.O_CREAT|unix.O_RDWR|unix.O_EXCL), remove("/new"),
		}},
		{"Create", []step{create("/empty/new", unix.O_RDWR|unix.O_CREAT, 0o644, 1000, 1000), remove("/empty/new")}},
		{"CreateAsRoot", []step{create("/new", unix.O_RDWR|unix.O_CREAT, 0o644, 0, 0), remove("/new")}},
		{"CreateAsRootOfAnotherGroup", []step{
			create("/new", unix.O_RDWR|unix.O_CREAT, 0o644, 0, 1000), remove("/new"),
		}},
		{"CreateWhereTheHostWouldNotLet", []step{
			create("/dir/sub/new", unix.O_RDWR|unix.O_CREAT, 0o644, 1000, 1000), remove("/dir/sub/new"),
		}},
		{"Mknod", []step{mknod("/empty/new", unix.S_IFIFO|0o644, 0, 1000, 1000), remove("/empty/new")}},
		{"Mkdir", []step{mkdir("/empty/new", 0o755, 1000, 1000), remove("/empty/new")}},
		{"Symlink", []step{symlink("target", "/empty/new", 1000, 1000), remove("/empty/new")}},
		{"Link", []step{link("/file", "/new"), remove("/new")}},
		{"Lstat", []step{lstat("/file")}},
		{"Readlink", []step{readlink("/link", 4096)}},
		{"Statfs", []step{statfs("/file")}},
		{"Chmod", []step{chmod("/file", 0o644)}},
		{"Chown", []step{chown("/file", 1000, 1000)}},
		{"Truncate", []step{truncate("/file", 8)}},
		{"Utime", []step{utime("/file", 1, 2, 3, 4)}},
		{"Rename", []step{rename("/file", "/new"), rename("/new", "/file")}},
		{"Remove", []step{mkdir("/new", 0o755, 0, 0), remove("/new")}},
		{"Lgetxattr", []step{lgetxattr("/file", "user.a", 65536), lgetxattr("/file", "user.a", 0)}},
		{"Llistxattr", []step{llistxattr("/file", 65536)}},
		{"Lsetxattr", []step{lsetxattr("/file", "user.new", "value", 5, 0)}},
		{"ACL", []step{
			lsetxattr("/big", "system.posix_acl_access", acl, len(acl), 0),
			lgetxattr("/big", "system.posix_acl_access", 100),
		}},
		{"Lremovexattr", []step{lsetxattr("/file", "user.new", "value", 5, 0), lremovexattr("/file", "user.new")}},
		{"GetVersion", []step{getversion("/file")}},
		{"LongPath", []step{
			lstat(long + "/file"), open(deep+"/file", 0),
			create(long+"/dir/sub/new", unix.O_CREAT, 0o644, 1000, 1000), rename(long+"/dir/sub/new", deep+"/new"),
			statfs(long), lgetxattr(long+"/file", "user.a", 100), remove(deep + "/new"),
		}},
	}
}

// run asks for a sequence, again and again as loop says.
func (l *local) run(tb testing.TB, s sequence, loop func(once func())) {
	tb.Helper()
	type frame struct {
		step
		payload []byte
	}
	var frames []frame
	for _, st := range s.steps {
		st.q.Path = append([]byte(l.root), st.q.Path...)
		if st.t == codec.Link || st.t == codec.Rename {
			st.q.NewPath = append([]byte(l.root), st.q.NewPath...)
		}
		frames = append(frames, frame{st, bytes.Clone(st.frame(true)[codec.HeaderSize:])})
	}
	onThreadOfItsOwn(func() {
		loop(func() {
			for _, f := range frames {
				errno := l.do(f.t, f.payload)
				if f.t == codec.GetVersion && errno == unix.ENOTTY {
					continue // a tmpfs below a file system that has versions
				}
				if errno != 0 && !tb.Failed() {
					tb.Errorf("%v: %v", f.step, errno)
				}
			}
		})
	})
}

// No request takes memory once its connection's buffers have grown.
func TestRequestsAllocateNothing(t *testing.T) {
	asked := map[codec.Type]bool{}
	var ids ops.IDMap
	if err := ids.Set("guest:1000:101000:1"); err != nil {
		t.Fatal(err)
	}
	for name, l := range map[string]*local{
		"disk":       newLocal(t, helpertest.ShortDir(t), ops.Options{}),
		"tmpfs":      newLocal(t, helpertest.Tmpfs(t), ops.Options{}),
		"translated": newLocal(t, helpertest.ShortDir(t), ops.Options{UIDs: ids, GIDs: ids}),
	} {
		for _, s := range steady() {
			for _, st := range s.steps {
				asked[st.t] = true
			}
			l.run(t, s, func(once func()) {
				if n := testing.AllocsPerRun(50, once); n != 0 {
					t.Errorf("%s: %s allocates %v times", name, s.name, n)
				}
			})
		}
	}
	for typ := codec.Open; typ < codec.NumTypes; typ++ {
		if !asked[typ] {
			t.Errorf("%v was not asked for", typ)
		}
	}
}

func BenchmarkDo(b *testing.B) {
	for _, s := range steady() {
		b.Run(s.name, func(b *testing.B) {
			l := newLocal(b, helpertest.ShortDir(b), ops.Options{})
			l.run(b, s, func(once func()) {
				b.ReportAllocs()
				for b.Loop() {
					once()
				}
			})
		})
	}
}

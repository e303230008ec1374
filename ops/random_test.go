package ops_test

import (
	"flag"
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

var (
	seed     = flag.Uint64("seed", 0, "of TestRandom, instead of its own few")
	requests = flag.Int("requests", 3000, "of TestRandom, for each seed")
)

const tmpfile = unix.O_TMPFILE &^ unix.O_DIRECTORY

// generator makes requests up in a small space of names, so that they meet.
type generator struct {
	*rand.Rand
	theirs string // the C helper's tree: what it must not be asked depends on that
}

func pick[T any](g *generator, of ...T) T { return of[g.IntN(len(of))] }

func (g *generator) path() string {
	var b strings.Builder
	for range 1 + g.IntN(3) {
		b.WriteString(pick(g, "/", "/", "/", "//", "/./"))
		b.WriteString(pick(g, "a", "b", "c", "a", "b", "c", "file", "dir", "link", "..",
			"fifo", "null", "dangling", "loop", "abslink", "sgid", "sticky"))
	}
	return b.String() + pick(g, "", "", "", "", "", "/")
}

// any path, also those that make no sense.
func (g *generator) anyPath() string {
	if g.IntN(20) == 0 {
		return pick(g, "", "/", ".", "a", "//", "/out/x",
			"/"+strings.Repeat("n", 256), strings.Repeat("/a", 2047), "\xff", "/..")
	}
	return g.path()
}

func (g *generator) mode() uint32 {
	return pick[uint32](g, 0, 0o600, 0o644, 0o755, 0o777, 0o2775, 0o4755, 0o6777, 0o1777, g.Uint32N(0o10000))
}

func (g *generator) flags() int32 {
	f := pick(g, unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, 3)
	for range g.IntN(4) {
		f |= pick(g, unix.O_CREAT, unix.O_CREAT, unix.O_CREAT, unix.O_EXCL, unix.O_TRUNC,
			unix.O_APPEND, unix.O_NONBLOCK, unix.O_DIRECTORY, unix.O_NOFOLLOW, unix.O_NOATIME,
			unix.O_SYNC, unix.O_PATH, unix.O_TMPFILE, unix.O_CLOEXEC, unix.O_NOCTTY)
	}
	if g.IntN(50) == 0 {
		f = int(g.Uint32())
	}
	if f&tmpfile != 0 {
		f |= unix.O_TMPFILE | unix.O_RDWR
	}
	return int32(f)
}

func (g *generator) time() codec.Time {
	return codec.Time{
		Sec:  pick[int64](g, 0, 1, 1_000_000_000, -5, g.Int64N(1<<33)),
		Nsec: pick[int64](g, 0, 1, 999_999_999, unix.UTIME_NOW, unix.UTIME_OMIT, 1_000_000_000, -1),
	}
}

// next is a request that the C helper survives.
func (g *generator) next() step {
	for {
		s := step{t: codec.Open + codec.Type(g.IntN(int(codec.NumTypes-codec.Open))), q: codec.Request{
			Path:    cs(g.anyPath()),
			NewPath: cs(g.anyPath()),
			Name: cs(pick(g, "user.a", "user.a", "user.b", "user.", "", "security.test", "trusted.a",
				"system.posix_acl_access", "system.posix_acl_default", "none")),
			Value: []byte(pick(g, "", "v", "value\x00", acl, acl, strings.Repeat("v", 1+g.IntN(2000)))),
			Mode:  g.mode(),
			Flags: g.flags(),
			Size:  pick[int64](g, 0, 1, 2, 5, 100, 4096, 65535, 65536, g.Int64N(70000)),
			Rdev:  pick[uint64](g, 0x103, 0, 0x107, 1<<40),
			Atime: g.time(),
			Mtime: g.time(),
		}}
		switch s.t {
		case codec.Symlink:
			s.q.Target = s.q.NewPath
		case codec.Mknod:
			s.q.Mode |= pick[uint32](g, unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFDIR, 0)
		case codec.Lsetxattr:
			s.q.Size = int64(g.IntN(len(s.q.Value) + 1))
			s.q.Flags = pick[int32](g, 0, 0, 0, 1, 2, 3, -1)
		case codec.Truncate:
			s.q.Size = pick(g, s.q.Size, s.q.Size, -1, 1<<40)
		case codec.Open, codec.Create, codec.GetVersion:
			// It opens before it looks: a FIFO without O_NONBLOCK, or
			// with access mode 3, which only the kernel refuses.
			typ := g.typeOf(string(s.q.Path))
			device := typ == unix.S_IFCHR || typ == unix.S_IFBLK
			if typ == unix.S_IFIFO || s.t == codec.GetVersion && device {
				if s.t == codec.GetVersion {
					continue
				}
				s.q.Flags = s.q.Flags&^1 | unix.O_NONBLOCK
			}
		}
		owner := pick(g, [2]uint32{0, 0}, [2]uint32{1000, 1000}, [2]uint32{1001, 100})
		s.q.UID, s.q.GID = owner[0], owner[1]
		if s.t == codec.Chown {
			s.q.UID, s.q.GID = pick[uint32](g, 0, 1000, none), pick[uint32](g, 0, 1000, none)
		}
		if g.IntN(50) == 0 { // cut short
			frame := s.frame(g.IntN(2) == 0)
			frame = frame[:codec.HeaderSize+g.IntN(len(frame)-codec.HeaderSize+1)]
			var q codec.Request
			if payload := append([]byte{}, frame[codec.HeaderSize:]...); !q.Decode(s.t, payload) {
				s.raw = frame[codec.HeaderSize:]
			}
		}
		return s
	}
}

// typeOf is the type of the file that path leads to in the C helper's tree.
func (g *generator) typeOf(path string) uint32 {
	root, err := unix.Open(g.theirs, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT,
	})
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	unix.Fstat(fd, &st)
	return st.Mode & unix.S_IFMT
}

// TestRandom runs long sequences of requests against both helpers. Each answer
// and, from time to time, all of the trees must be the same.
func TestRandom(t *testing.T) {
	seeds := []uint64{1, 2, 3, 4}
	if testing.Short() {
		seeds, *requests = seeds[:1], min(*requests, 500)
	}
	if *seed != 0 {
		seeds = []uint64{*seed}
	}
	worlds(t, func(t *testing.T, w *world) {
		for _, seed := range seeds {
			g := &generator{rand.New(rand.NewPCG(seed, 0)), w.theirs.dir}
			makeTree(t, w.ours.dir)
			makeTree(t, w.theirs.dir)
			now := coarseNow()
			var last []string
			for i := range *requests {
				s := g.next()
				if last = append(last, s.String()); len(last) > 20 {
					last = last[1:]
				}
				err := w.compare(s, g.IntN(2) == 0, now)
				if err == nil && (i%100 == 99 || i == *requests-1) {
					if d := difference(look(t, w.ours.dir, now), look(t, w.theirs.dir, now)); d != "" {
						err = fmt.Errorf("the trees differ:\n%s", d)
					}
				}
				if err != nil {
					t.Fatalf("-seed %d, request %d: %v\nafter:\n%s", seed, i, err, strings.Join(last, "\n"))
				}
			}
		}
	})
}

// What lies on another file system below the export behaves as that does.
func TestMountsBelow(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		below := map[string]string{"empty": helpertest.Tmpfs(t), "sgid": t.TempDir()}
		for i, side := range []side{w.ours, w.theirs} {
			makeTree(t, side.dir)
			for name, dir := range below {
				at, from := filepath.Join(side.dir, name), filepath.Join(dir, fmt.Sprint(i))
				if err := os.Mkdir(from, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := unix.Mount(from, at, "", unix.MS_BIND, ""); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
			}
		}
		now := coarseNow()
		for _, s := range []step{
			create("/empty/f", unix.O_CREAT|unix.O_RDWR, 0o640, 1000, 1000),
			create("/sgid/f", unix.O_CREAT|unix.O_RDWR, 0o640, 1000, 1000), getversion("/empty"),
			getversion("/empty/f"), getversion("/sgid"), getversion("/sgid/f"), getversion("/file"),
			rename("/empty/f", "/f"), link("/empty/f", "/f"), rename("/file", "/sgid/g"),
			statfs("/empty/f"), statfs("/sgid"), remove("/empty"), rename("/empty", "/e"), lstat("/empty/.."),
			open("/empty/f", unix.O_RDWR), open("/empty", unix.O_TMPFILE|unix.O_RDWR),
		} {
			if err := w.compare(s, true, now); err != nil {
				t.Error(err)
			}
		}
	})
}

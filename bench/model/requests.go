package model

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// request is the n-th request of a VM.
type request struct {
	n     int
	t     codec.Type
	q     codec.Request
	frame []byte
	short bool // the payload ends before its fields do
}

func (r *request) String() string {
	s := fmt.Sprintf("request %d: %v %q", r.n, r.t, text(r.q.Path))
	switch r.t {
	case codec.Link, codec.Rename:
		s += fmt.Sprintf(" %q", text(r.q.NewPath))
	case codec.Symlink:
		s += fmt.Sprintf(" %q", text(r.q.Target))
	case codec.Lgetxattr, codec.Lsetxattr, codec.Lremovexattr:
		s += fmt.Sprintf(" %q", text(r.q.Name))
	}
	return s + fmt.Sprintf(" mode %o, flags %#x, size %d, owner %d:%d, short %v",
		r.q.Mode, r.q.Flags, r.q.Size, int32(r.q.UID), int32(r.q.GID), r.short)
}

// generator generates a VM's requests. The space of names is small, so that
// requests often concern the same file. The requests depend on the seed alone,
// not on any answer.
type generator struct {
	*rand.Rand
	dir string // of the VM, in the export
	n   int
}

func newGenerator(seed uint64, vm int, dir string) *generator {
	return &generator{Rand: rand.New(rand.NewPCG(seed, uint64(vm))), dir: dir}
}

func pick[T any](g *generator, of ...T) T { return of[g.IntN(len(of))] }

func (g *generator) oneIn(n int) bool { return g.IntN(n) == 0 }

func (g *generator) name() string { return pick(g, "a", "b", "c", "d", "e", "f") }

// cstring encodes s with a NUL, as QEMU sends the path of a fid, or without, as it
// sends a path that it has just built.
func (g *generator) cstring(s string) codec.CString {
	if g.oneIn(2) {
		s += "\x00"
	}
	return codec.CString(s)
}

// text returns a string of a frame without its NUL, if it has one.
func text(s codec.CString) string { return strings.TrimSuffix(string(s), "\x00") }

func (g *generator) path() string {
	s := "//" + g.dir + "/" + g.name()
	if g.oneIn(2) {
		s += pick(g, "/", "/", "//") + g.name()
	}
	return s
}

func (g *generator) openFlags() int32 {
	flags := pick(g, unix.O_RDONLY, unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR)
	for _, f := range []int{unix.O_TRUNC, unix.O_APPEND, unix.O_NONBLOCK, unix.O_NOFOLLOW} {
		if g.oneIn(6) {
			flags |= f
		}
	}
	return int32(flags)
}

func (g *generator) mtime() codec.Time {
	return codec.Time{
		Sec: g.Int64N(1 << 31),
		Nsec: pick[int64](g,
			0, 1, 999_999_999, unix.UTIME_NOW, unix.UTIME_OMIT, 1_000_000_000),
	}
}

// Requests of these types are more frequent than others: reads as with a real
// VM, makes to keep the tree full.
var (
	reads = []codec.Type{codec.Lstat, codec.Lstat, codec.Lstat, codec.GetVersion, codec.Open}
	makes = []codec.Type{codec.Create, codec.Create, codec.Mkdir, codec.Symlink}
)

func (g *generator) next() *request {
	g.n++
	r := &request{n: g.n, t: codec.Open + codec.Type(g.IntN(int(codec.NumTypes-codec.Open)))}
	switch g.IntN(5) {
	case 0, 1:
		r.t = pick(g, reads...)
	case 2:
		r.t = pick(g, makes...)
	}
	owner := pick(g, [2]uint32{0, 0}, [2]uint32{1000, 1000}, [2]uint32{1001, 100})
	value := []byte(strings.Repeat(g.name(), g.IntN(200)))
	r.q = codec.Request{
		Path:    g.cstring(g.path()),
		NewPath: g.cstring(g.path()),
		Name:    codec.CString("user." + g.name()),
		Value:   value,
		UID:     owner[0],
		GID:     owner[1],
		Mode:    g.Uint32N(0o1000),
		Flags:   g.openFlags(),
		Size:    pick[int64](g, 0, 1, 2, 4, 100, 300, 65536),
		Atime:   codec.Time{Sec: g.Int64N(1 << 31), Nsec: pick[int64](g, 0, 7, unix.UTIME_NOW)},
		Mtime:   g.mtime(),
	}
	switch r.t {
	case codec.Open:
		switch g.IntN(8) {
		case 0:
			r.q.Flags = unix.O_PATH
		case 1:
			r.q.Flags = unix.O_DIRECTORY
		case 2:
			r.q.Flags |= unix.O_CREAT
		}
	case codec.Create:
		r.q.Flags |= unix.O_CREAT
		if g.oneIn(2) {
			r.q.Flags |= unix.O_EXCL
		}
	case codec.Mknod:
		r.q.Mode |= pick[uint32](g, unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR)
		if r.q.Mode&unix.S_IFMT == unix.S_IFCHR {
			r.q.Rdev = 0x103
		}
	case codec.Symlink:
		r.q.Target = g.cstring(pick(g, g.name(), g.name(), "none", g.name()+"/"+g.name()))
	case codec.Truncate:
		r.q.Size = pick(g, g.Int64N(100), g.Int64N(20_000), -1)
	case codec.Chown:
		r.q.UID, r.q.GID = pick[uint32](g, 0, 1000, 1<<32-1), pick[uint32](g, 0, 1000, 1<<32-1)
	case codec.Lsetxattr:
		r.q.Size = int64(g.IntN(len(value) + 1))
		r.q.Flags = pick[int32](g, 0, 0, unix.XATTR_CREATE, unix.XATTR_REPLACE)
		switch {
		case g.oneIn(20): // a long frame
			r.q.Value = append(value, make([]byte, 60_000)...)
		case g.oneIn(20):
			r.q.Size = int64(len(value)) + 1
		}
	case codec.Lstat, codec.Readlink, codec.Statfs,
		codec.Lgetxattr, codec.Llistxattr, codec.GetVersion:
		if g.oneIn(4) {
			r.q.Path = g.cstring(pick(g,
				"/shared/file",
				"//shared/dir",
				"//shared/dir/inner",
				"/shared/link",
				"/shared/none",
				"//"+g.dir,
			))
		}
	}
	if r.t == codec.Open && g.oneIn(4) {
		path := pick(g, "/shared/file", "//shared/dir", "/shared/link", "//"+g.dir)
		r.q.Path, r.q.Flags = g.cstring(path), unix.O_RDONLY
	}
	r.frame = r.q.Append(nil, r.t)
	switch {
	case g.oneIn(50):
		r.cut(codec.HeaderSize + g.IntN(len(r.frame)-codec.HeaderSize))
	case g.oneIn(30): // bytes behind the fields are ignored
		r.cut(len(r.frame))
		r.frame = append(r.frame, make([]byte, g.IntN(100))...)
		r.resize()
	}
	return r
}

// cut ends the frame early.
func (r *request) cut(n int) {
	r.frame = r.frame[:n]
	r.resize()
	var q codec.Request
	r.short = !q.Decode(r.t, append([]byte(nil), r.frame[codec.HeaderSize:]...))
	if !r.short { // the last string may have been cut
		r.frame = r.q.Append(nil, r.t)
	}
}

func (r *request) resize() {
	binary.NativeEndian.PutUint32(r.frame[4:], uint32(len(r.frame)-codec.HeaderSize))
}

package ops_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// step is one request: of fields, or a payload as it is.
type step struct {
	t   codec.Type
	q   codec.Request
	raw []byte
}

func (s step) String() string {
	if s.raw != nil {
		return fmt.Sprintf("%v payload %.60x", s.t, s.raw)
	}
	q := s.q
	b := fmt.Sprintf("%v %.60q", s.t, q.Path)
	if q.NewPath != nil {
		b += fmt.Sprintf(" %.60q", q.NewPath)
	}
	if q.Target != nil {
		b += fmt.Sprintf(" %.60q", q.Target)
	}
	if q.Name != nil {
		b += fmt.Sprintf(" %q=%.20q", q.Name, q.Value)
	}
	return b + fmt.Sprintf(" flags %#x mode %o owner %d:%d size %d rdev %x %v %v",
		q.Flags, q.Mode, int32(q.UID), int32(q.GID), q.Size, q.Rdev, q.Atime, q.Mtime)
}

// frame builds the request; nul ends its paths by NULs, as QEMU's fids do.
func (s step) frame(nul bool) []byte {
	if s.raw != nil {
		b := binary.NativeEndian.AppendUint32(nil, uint32(s.t))
		return append(binary.NativeEndian.AppendUint32(b, uint32(len(s.raw))), s.raw...)
	}
	q := s.q
	if nul {
		for _, p := range []*codec.CString{&q.Path, &q.NewPath, &q.Target, &q.Name} {
			*p = append((*p)[:len(*p):len(*p)], 0)
		}
	}
	return q.Append(nil, s.t)
}

func cs(s string) codec.CString { return codec.CString(s) }

// The requests, with their fields in the order of the C calls.

func open(path string, flags int) step {
	return step{t: codec.Open, q: codec.Request{Path: cs(path), Flags: int32(flags)}}
}

func create(path string, flags int, mode, uid, gid uint32) step {
	return step{t: codec.Create, q: codec.Request{Path: cs(path), Flags: int32(flags), Mode: mode, UID: uid, GID: gid}}
}

func mknod(path string, mode uint32, rdev uint64, uid, gid uint32) step {
	return step{t: codec.Mknod, q: codec.Request{Path: cs(path), Mode: mode, Rdev: rdev, UID: uid, GID: gid}}
}

func mkdir(path string, mode, uid, gid uint32) step {
	return step{t: codec.Mkdir, q: codec.Request{Path: cs(path), Mode: mode, UID: uid, GID: gid}}
}

func symlink(target, path string, uid, gid uint32) step {
	return step{t: codec.Symlink, q: codec.Request{Target: cs(target), Path: cs(path), UID: uid, GID: gid}}
}

func link(old, new string) step {
	return step{t: codec.Link, q: codec.Request{Path: cs(old), NewPath: cs(new)}}
}

func rename(old, new string) step {
	return step{t: codec.Rename, q: codec.Request{Path: cs(old), NewPath: cs(new)}}
}

func lstat(path string) step      { return step{t: codec.Lstat, q: codec.Request{Path: cs(path)}} }
func statfs(path string) step     { return step{t: codec.Statfs, q: codec.Request{Path: cs(path)}} }
func remove(path string) step     { return step{t: codec.Remove, q: codec.Request{Path: cs(path)}} }
func getversion(path string) step { return step{t: codec.GetVersion, q: codec.Request{Path: cs(path)}} }

func readlink(path string, bufsize int) step {
	return step{t: codec.Readlink, q: codec.Request{Path: cs(path), Size: int64(bufsize)}}
}

func chmod(path string, mode uint32) step {
	return step{t: codec.Chmod, q: codec.Request{Path: cs(path), Mode: mode}}
}

func chown(path string, uid, gid uint32) step {
	return step{t: codec.Chown, q: codec.Request{Path: cs(path), UID: uid, GID: gid}}
}

func truncate(path string, size int64) step {
	return step{t: codec.Truncate, q: codec.Request{Path: cs(path), Size: size}}
}

func utime(path string, asec, ansec, msec, mnsec int64) step {
	atime, mtime := codec.Time{Sec: asec, Nsec: ansec}, codec.Time{Sec: msec, Nsec: mnsec}
	return step{t: codec.Utime, q: codec.Request{Path: cs(path), Atime: atime, Mtime: mtime}}
}

func lgetxattr(path, name string, bufsize int) step {
	return step{t: codec.Lgetxattr, q: codec.Request{Path: cs(path), Name: cs(name), Size: int64(bufsize)}}
}

func llistxattr(path string, bufsize int) step {
	return step{t: codec.Llistxattr, q: codec.Request{Path: cs(path), Size: int64(bufsize)}}
}

func lsetxattr(path, name, value string, size, flags int) step {
	return step{t: codec.Lsetxattr, q: codec.Request{
		Path: cs(path), Name: cs(name), Value: []byte(value), Size: int64(size), Flags: int32(flags),
	}}
}

func lremovexattr(path, name string) step {
	return step{t: codec.Lremovexattr, q: codec.Request{Path: cs(path), Name: cs(name)}}
}

func raw(t codec.Type, payload ...byte) step {
	return step{t: t, raw: append([]byte{}, payload...)}
}

const none = ^uint32(0) // -1: leave an id as it is

// testCase is a sequence of requests to a new tree.
type testCase struct {
	name  string
	steps []step
}

func do(name string, steps ...step) testCase { return testCase{name, steps} }

// cases are run against our helper and the C helper. Each answer and, after
// the last, all that is below the export are compared.
var cases = []testCase{
	do("open flags as given: access modes",
		open("/file", unix.O_RDONLY), open("/file", unix.O_WRONLY), open("/file", unix.O_RDWR), open("/file", 3),
		open("/secret", unix.O_RDWR), open("/dir", unix.O_RDONLY), open("/dir", unix.O_RDWR), open("/dir", 3),
		open("/empty", unix.O_WRONLY)),
	do("open flags as given: of the descriptor",
		open("/file", unix.O_APPEND|unix.O_RDWR), open("/file", unix.O_NONBLOCK),
		open("/file", unix.O_SYNC|unix.O_WRONLY), open("/file", unix.O_DSYNC|unix.O_WRONLY),
		open("/file", unix.O_NOATIME), open("/file", unix.O_ASYNC), open("/file", unix.O_NOCTTY),
		open("/file", unix.O_CLOEXEC), open("/file", unix.O_LARGEFILE), open("/big", unix.O_DIRECT),
		open("/big", unix.O_DIRECT|unix.O_RDWR), open("/file", 0x40000000), open("/file", -1<<31), open("/file", -1)),
	do("open O_DIRECTORY and O_NOFOLLOW",
		open("/dir", unix.O_DIRECTORY), open("/file", unix.O_DIRECTORY),
		open("/dirlink", unix.O_DIRECTORY), open("/link", unix.O_DIRECTORY), open("/link", unix.O_NOFOLLOW),
		open("/dirlink", unix.O_NOFOLLOW|unix.O_DIRECTORY), open("/dirlink/file", unix.O_NOFOLLOW),
		open("/dangling", unix.O_NOFOLLOW)),
	do("open O_TRUNC",
		open("/big", unix.O_TRUNC|unix.O_WRONLY), open("/suid", unix.O_TRUNC), open("/dir", unix.O_TRUNC)),
	do("open O_PATH",
		open("/file", unix.O_PATH), open("/dir", unix.O_PATH|unix.O_DIRECTORY), open("/link", unix.O_PATH),
		open("/file", unix.O_PATH|unix.O_RDWR), open("/file", unix.O_PATH|unix.O_CREAT),
		open("/missing", unix.O_PATH|unix.O_CREAT), open("/file", unix.O_PATH|unix.O_TRUNC),
		open("/file", unix.O_PATH|unix.O_DIRECTORY), open("/fifo", unix.O_PATH), open("/null", unix.O_PATH),
		open("/sock", unix.O_PATH), open("/loop", unix.O_PATH)),
	do("open O_CREAT: the mode is 0", open("/new", unix.O_CREAT|unix.O_RDWR), open("/new", unix.O_RDONLY)),
	do("open O_CREAT of what exists",
		open("/file", unix.O_CREAT), open("/file", unix.O_CREAT|unix.O_EXCL),
		open("/link", unix.O_CREAT|unix.O_WRONLY), open("/link", unix.O_CREAT|unix.O_EXCL), open("/dir", unix.O_CREAT),
		open("/dir", unix.O_CREAT|unix.O_DIRECTORY), open("/big", unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY)),
	do("open O_CREAT through a dangling link", open("/dangling", unix.O_CREAT|unix.O_RDWR), lstat("/made")),
	do("open O_CREAT through two dangling links", open("/dangling2", unix.O_CREAT|unix.O_RDWR), lstat("/made")),
	do("open O_CREAT through links that lead nowhere",
		open("/danglingdir", unix.O_CREAT), open("/loop", unix.O_CREAT), open("/out", unix.O_CREAT),
		open("/outup", unix.O_CREAT), open("/outdir/passwd", unix.O_CREAT), open("/dangling", unix.O_CREAT|unix.O_EXCL),
		open("/dangling", unix.O_CREAT|unix.O_NOFOLLOW)),
	do("open O_CREAT with a slash at the end",
		open("/new/", unix.O_CREAT), open("/dir/", unix.O_CREAT), open("/file/", unix.O_CREAT), open("/", unix.O_CREAT),
		open("/dir/.", unix.O_CREAT), open("/dir/..", unix.O_CREAT)),
	do("open O_TMPFILE",
		open("/dir", unix.O_TMPFILE|unix.O_RDWR), open("/dir", unix.O_TMPFILE|unix.O_WRONLY),
		open("/dir", unix.O_TMPFILE), open("/file", unix.O_TMPFILE|unix.O_RDWR),
		open("/missing", unix.O_TMPFILE|unix.O_RDWR), open("/dirlink", unix.O_TMPFILE|unix.O_RDWR),
		open("/dir", unix.O_TMPFILE|unix.O_CREAT|unix.O_RDWR), open("/dir", unix.O_TMPFILE|unix.O_EXCL|unix.O_RDWR)),
	do("open of a device, FIFO or socket",
		open("/null", 0), open("/null", unix.O_RDWR), open("/block", 0), open("/sock", 0),
		open("/sock", unix.O_RDWR|unix.O_NONBLOCK), open("/fifo", unix.O_NONBLOCK),
		open("/fifo", unix.O_WRONLY|unix.O_NONBLOCK), open("/fifo", unix.O_RDWR), open("/fifolink", unix.O_NONBLOCK),
		open("/null", unix.O_CREAT|unix.O_RDWR), open("/fifo", unix.O_CREAT|unix.O_RDWR), open("/sock", unix.O_CREAT),
		open("/null", unix.O_TRUNC|unix.O_WRONLY), open("/null", unix.O_DIRECTORY), open("/sock", unix.O_DIRECTORY),
		open("/fifo", unix.O_CREAT|unix.O_EXCL)),
	do("create of a device, FIFO or socket",
		create("/null", unix.O_RDWR, 0o600, 0, 0), create("/sock", unix.O_CREAT, 0o600, 1000, 1000),
		create("/fifo", unix.O_CREAT|unix.O_RDWR, 0o600, 1000, 1000),
		create("/fifo", unix.O_RDONLY|unix.O_NONBLOCK, 0o600, 0, 0), create("/block", unix.O_CREAT, 0o600, 1000, 1000)),

	do("create as uid:gid: owner and group are exactly those",
		create("/new", unix.O_CREAT|unix.O_RDWR, 0o640, 1000, 1001),
		create("/dir/new", unix.O_CREAT|unix.O_WRONLY, 0o777, 65534, 65534), lstat("/new"), lstat("/dir/new")),
	do("create as 0:0",
		create("/new", unix.O_CREAT|unix.O_RDWR|unix.O_EXCL, 0o644, 0, 0),
		create("/new", unix.O_CREAT|unix.O_EXCL, 0o644, 0, 0)),
	do("create as uid:0",
		create("/new", unix.O_CREAT|unix.O_RDWR, 0o644, 1000, 0), create("/new2", unix.O_CREAT, 0o644, 0, 0)),
	do("create: umask is 0",
		create("/new", unix.O_CREAT, 0o777, 1000, 1000), mkdir("/newdir", 0o777, 1000, 1000),
		mknod("/newnod", unix.S_IFREG|0o777, 0, 1000, 1000)),
	do("create: setuid and setgid are kept",
		create("/a", unix.O_CREAT, 0o6777, 1000, 1000), create("/b", unix.O_CREAT, 0o6777, 0, 0),
		create("/c", unix.O_CREAT, 0o7777, 1000, 100)),
	do("create in a setgid directory",
		create("/sgid/a", unix.O_CREAT, 0o2775, 1000, 1000), create("/sgid/b", unix.O_CREAT, 0o2775, 0, 0),
		create("/sgid/c", unix.O_CREAT, 0o2775, 1000, 100), create("/sgid/d", unix.O_CREAT, 0o2765, 1000, 1000),
		mkdir("/sgid/dir", 0o755, 1000, 1000), mkdir("/sgid/dir2", 0o2755, 1000, 1000),
		mknod("/sgid/nod", unix.S_IFREG|0o2775, 0, 1000, 1000), symlink("x", "/sgid/link", 1000, 1000)),
	do("create in a directory of somebody else: CAP_DAC_OVERRIDE",
		create("/dir/sub/a", unix.O_CREAT|unix.O_RDWR, 0o600, 1000, 1000), mkdir("/dir/sub/d", 0o700, 1000, 1000),
		create("/secret", unix.O_CREAT|unix.O_RDWR, 0o600, 1000, 1000)),
	do("create without O_CREAT",
		create("/file", unix.O_RDWR, 0o600, 1000, 1000), create("/missing", unix.O_RDWR, 0o600, 1000, 1000),
		create("/secret", unix.O_RDONLY, 0, 1000, 1000), create("/file", unix.O_NOATIME, 0, 1001, 1001),
		create("/file", unix.O_NOATIME, 0, 1000, 1000)),
	do("create O_TRUNC of a setuid file as another user",
		create("/suid", unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY, 0o600, 1001, 1001)),
	do("create O_TRUNC of a setuid file as its owner",
		create("/suid", unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY, 0o600, 1000, 1000)),
	do("create O_TRUNC of a setuid file as 0:0", create("/suid", unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY, 0o600, 0, 0)),
	do("create of what exists in a sticky directory",
		create("/sticky/file", unix.O_CREAT|unix.O_WRONLY, 0o600, 1000, 1000),
		create("/sticky/file", unix.O_CREAT|unix.O_WRONLY, 0o600, 0, 0)),
	do("create of another's file in a sticky directory: fs.protected_regular and fs.protected_fifos",
		create("/sticky/a", unix.O_CREAT, 0o666, 1000, 1000), mknod("/sticky/fifo", unix.S_IFIFO|0o666, 0, 1000, 1000),
		mknod("/sticky/sock", unix.S_IFSOCK|0o666, 0, 1000, 1000),
		mknod("/sticky/null", unix.S_IFCHR|0o666, 0x103, 0, 0), symlink("sticky/a", "/tosticky", 1001, 1001),
		create("/sticky/a", unix.O_CREAT|unix.O_RDWR, 0o600, 1001, 1001),
		create("/sticky/a", unix.O_CREAT|unix.O_RDWR, 0o600, 0, 0),
		create("/sticky/a", unix.O_CREAT|unix.O_RDWR, 0o600, 1000, 5),
		create("/sticky/a", unix.O_RDWR, 0o600, 1001, 1001),
		create("/sticky/a", unix.O_CREAT|unix.O_EXCL, 0o600, 1001, 1001),
		create("/sticky/a", unix.O_CREAT|unix.O_PATH, 0o600, 1001, 1001),
		open("/sticky/a", unix.O_CREAT), open("/sticky/a", unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY),
		open("/sticky/a", 0), open("/tosticky", unix.O_CREAT), create("/tosticky", unix.O_CREAT, 0o600, 1001, 1001),
		open("/tosticky", unix.O_CREAT|unix.O_NOFOLLOW), open("/sticky/file", unix.O_CREAT),
		create("/sticky/fifo", unix.O_CREAT|unix.O_RDWR, 0, 1001, 1001),
		create("/sticky/sock", unix.O_CREAT, 0, 1001, 1001), create("/sticky/null", unix.O_CREAT, 0, 1001, 1001),
		open("/sticky/null", unix.O_CREAT|unix.O_RDWR), open("/sticky/sock", unix.O_CREAT),
		open("/sticky/fifo", unix.O_CREAT|unix.O_RDWR), open("/sticky/sock", 0),
		chmod("/sticky", 0o1770), open("/sticky/a", unix.O_CREAT), create("/sticky/a", unix.O_CREAT, 0, 1001, 1001),
		open("/sticky/fifo", unix.O_CREAT|unix.O_RDWR), open("/sticky/sock", unix.O_CREAT),
		chmod("/sticky", 0o1755), open("/sticky/a", unix.O_CREAT), open("/sticky/fifo", unix.O_CREAT|unix.O_RDWR),
		open("/sticky/sock", unix.O_CREAT),
		chmod("/sticky", 0o777), open("/sticky/a", unix.O_CREAT), open("/sticky/sock", unix.O_CREAT),
		mkdir("/sticky/dir", 0o777, 9, 9), chmod("/sticky", 0o1777), open("/sticky/dir", unix.O_CREAT)),
	do("create through links",
		create("/dangling", unix.O_CREAT, 0o640, 1000, 1001),
		create("/dangling2", unix.O_CREAT|unix.O_RDWR, 0o600, 1000, 1000), create("/link", unix.O_CREAT, 0o600, 1, 1),
		create("/out", unix.O_CREAT|unix.O_RDWR, 0o600, 1, 1), create("/loop", unix.O_CREAT, 0o600, 1, 1)),
	do("create O_TMPFILE and O_PATH",
		create("/dir", unix.O_TMPFILE|unix.O_RDWR, 0o640, 1000, 1000), create("/file", unix.O_PATH, 0, 1000, 1000),
		create("/dir", unix.O_TMPFILE|unix.O_RDWR, 0o4755, 0, 0)),
	do("create with odd modes",
		create("/a", unix.O_CREAT, 0, 1000, 1000), create("/b", unix.O_CREAT, unix.S_IFDIR|0o644, 1000, 1000),
		create("/c", unix.O_CREAT, none, 1000, 1000)),
	do("create as the greatest ids",
		create("/a", unix.O_CREAT, 0o644, none-1, none-1), mkdir("/b", 0o755, none-1, 1), lstat("/a"), lstat("/b")),
	do("create as one, as another, as root again",
		create("/a", unix.O_CREAT, 0o644, 1000, 1000), create("/b", unix.O_CREAT, 0o644, 0, 0), chown("/a", 5, 5),
		mknod("/n", unix.S_IFCHR|0o600, 0x103, 0, 0), create("/c", unix.O_CREAT, 0o644, 1001, 1001),
		chmod("/secret", 0o4711)),

	do("mknod of a device as another user",
		mknod("/n", unix.S_IFCHR|0o666, 0x103, 1000, 1000), mknod("/n", unix.S_IFBLK|0o666, 0x700, 1000, 0)),
	do("mknod of a device as 0:0",
		mknod("/c", unix.S_IFCHR|0o666, 0x103, 0, 0), mknod("/b", unix.S_IFBLK|0o660, 0x10000712, 0, 0),
		mknod("/c", unix.S_IFCHR, 1, 0, 0)),
	do("mknod of what is no device",
		mknod("/a", unix.S_IFIFO|0o644, 0, 1000, 1000), mknod("/b", unix.S_IFSOCK|0o600, 0, 1000, 1000),
		mknod("/c", unix.S_IFREG|0o4755, 0, 1000, 1000), mknod("/d", unix.S_IFIFO|0o600, 0x505, 0, 0)),
	do("mknod mode without a type", mknod("/a", 0o644, 0, 1000, 1000), mknod("/b", 0, 7, 0, 0)),
	do("mknod S_IFDIR and others",
		mknod("/a", unix.S_IFDIR|0o755, 0, 0, 0), mknod("/b", unix.S_IFLNK|0o777, 0, 0, 0),
		mknod("/c", unix.S_IFDIR|0o755, 0, 1000, 1000), mknod("/d", unix.S_IFMT, 0, 0, 0),
		mknod("/e", 0o30000, 0, 0, 0)),
	do("mknod with a long rdev",
		mknod("/a", unix.S_IFCHR, 0x1_0000_0103, 0, 0), mknod("/b", unix.S_IFREG, 1<<63, 0, 0),
		mknod("/c", unix.S_IFCHR, 0xffffffff, 0, 0)),
	do("mknod of what exists",
		mknod("/file", unix.S_IFREG|0o600, 0, 0, 0), mknod("/dangling", unix.S_IFREG|0o600, 0, 0, 0),
		mknod("/dir/", unix.S_IFREG, 0, 0, 0), mknod("/new/", unix.S_IFREG, 0, 0, 0),
		mknod("/", unix.S_IFREG, 0, 0, 0)),

	do("mkdir",
		mkdir("/new", 0o755, 1000, 1001), mkdir("/new/", 0o755, 0, 0), mkdir("/new2/", 0o7777, 0, 0),
		mkdir("/file", 0o755, 0, 0), mkdir("/dangling", 0o755, 0, 0), mkdir("/", 0o755, 0, 0),
		mkdir("/missing/x", 0o755, 0, 0), mkdir("/new/.", 0o755, 0, 0), mkdir("/file/x", 0, 0, 0),
		mkdir("/new3", unix.S_IFDIR|0o1700, 1000, 1000)),
	do("symlink",
		symlink("target", "/new", 1000, 1001), symlink("", "/empty1", 0, 0), symlink("x", "/new", 0, 0),
		symlink("/", "/dir/l", 0, 0), symlink(strings.Repeat("t", 4095), "/long", 0, 0),
		symlink(strings.Repeat("t", 4096), "/toolong", 0, 0), symlink("x", "/dangling", 0, 0), symlink("x", "", 0, 0),
		symlink("x", "/new/", 0, 0)),
	do("link does not follow",
		link("/link", "/l2"), link("/dangling", "/l3"), link("/fifo", "/l4"), link("/null", "/l5"),
		readlink("/l2", 100), lstat("/l3")),
	do("link",
		link("/file", "/l"), link("/dir", "/l2"), link("/missing", "/l3"), link("/file", "/dir"),
		link("/file", "/dangling"), link("/file", "/"), link("/file/", "/l4"), link("/file", "/l5/"),
		link("/suid", "/l6"), link("", "/l7"), link("/secret", "")),
	do("rename",
		rename("/file", "/new"), rename("/dir/file", "/link"), rename("/dir", "/empty"), rename("/empty", "/sgid/e"),
		lstat("/sgid/e/sub")),
	do("rename of and onto special names",
		rename("/", "/x"), rename("/file", "/"), rename("/dir", "/dir/x"), rename("/dir/sub", "/dir"),
		rename("/file", "/hard"), rename("/missing", "/x"), rename("/file", "/dir"), rename("/dir", "/file"),
		rename("/link", "/l"), rename("/dir/.", "/x"), rename("/dir", "/dir/.."), rename("/file", "/missing/x"),
		rename("/dir/", "/newdir/"), rename("/file/", "/x"), rename("/file", "/y/"), rename("", "/x"),
		rename("/file", "")),
	do("rename of a device, FIFO, socket",
		rename("/fifo", "/f"), rename("/null", "/n"), rename("/sock", "/s"), rename("/block", "/null")),
	do("remove",
		remove("/file"), remove("/hard"), remove("/empty"), remove("/dir"), remove("/link"), remove("/dirlink"),
		remove("/dangling"), remove("/fifo"), remove("/null"), remove("/sock"), remove("/dir/up"), remove("/missing"),
		remove("/sticky/file"), remove("/sticky")),
	do("remove of special names",
		remove("/"), remove(""), remove("."), remove(".."), remove("/dir/."), remove("/dir/.."), remove("/file/"),
		remove("/dirlink/"), remove("/empty/"), remove("/empty/."), remove("/loop/x"), remove("/file/x"), remove("//"),
		remove("/..")),
	do("remove and rename of the root", remove("/"), rename("/", "/x"), rename("/dir", "/")),

	do("readlink bufsize",
		readlink("/link", 0), readlink("/link", 1), readlink("/link", 2), readlink("/link", 4), readlink("/link", 5),
		readlink("/link", 6), readlink("/link", 4096), readlink("/link", 65536), readlink("/link", 1<<20)),
	do("readlink of what is no link",
		readlink("/file", 100), readlink("/dir", 100), readlink("/missing", 100), readlink("/", 100), readlink("", 100),
		readlink("/dirlink/", 100), readlink("/file", 0), readlink("/missing", 1)),
	do("readlink of a long target",
		symlink(strings.Repeat("t", 4095), "/long", 0, 0), readlink("/long", 4096), readlink("/long", 4095),
		readlink("/long", 5000), readlink("/long", 100), readlink("/out", 4096)),
	do("chmod follows links",
		chmod("/link", 0o600), chmod("/dirlink", 0o711), chmod("/dangling", 0o600), chmod("/loop", 0),
		chmod("/abslink", 0o4755), chmod("/fifo", 0o600), chmod("/null", 0o600), chmod("/sock", 0o7777),
		chmod("/", 0o1777)),
	do("chmod modes",
		chmod("/file", 0o7777), chmod("/secret", 0), chmod("/suid", none), chmod("/big", unix.S_IFDIR|0o644),
		chmod("/dir", 0o6755)),
	do("chown does not follow",
		chown("/link", 5, 6), chown("/dangling", 7, 8), chown("/out", 9, 9), chown("/fifo", 10, 10), chown("/", 11, 11),
		chown("/missing", 1, 1)),
	do("chown -1 leaves an id",
		chown("/file", none, 6), chown("/dir", 6, none), chown("/secret", none, none), chown("/big", none-1, none-1)),
	do("chown of a setuid file", chown("/suid", 1001, none)),
	do("chown of a setuid file to itself", chown("/suid", none, none), chown("/sgid", 3, 3)),
	do("truncate",
		truncate("/big", 0), truncate("/file", 3), truncate("/secret", 1<<30), truncate("/dir/file", 5),
		truncate("/link", 2), truncate("/abslink", 1), truncate("/suid", 0)),
	do("truncate of what can't be",
		truncate("/dir", 0), truncate("/fifo", 0), truncate("/null", 0), truncate("/sock", 0), truncate("/dangling", 0),
		truncate("/missing", 0), truncate("/file", -1), truncate("/file", 1<<62), truncate("/loop", 0),
		truncate("/", 0), truncate("", 0)),
	do("utime",
		utime("/file", 1, 2, 3, 4), utime("/link", 5, 6, 7, 8), utime("/dangling", 9, 10, 11, 12),
		utime("/dir", 13, 0, 1<<32, 999999999), utime("/secret", -1, 0, -1<<31, 0), utime("/fifo", 1<<33, 1, 1<<34, 1),
		utime("/", 1, 1, 1, 1)),
	do("utime now and omit",
		utime("/file", 0, unix.UTIME_NOW, 0, unix.UTIME_OMIT), utime("/big", 0, unix.UTIME_OMIT, 5, 6),
		utime("/secret", 7, 8, 0, unix.UTIME_NOW), utime("/suid", 1, unix.UTIME_OMIT, 1, unix.UTIME_OMIT),
		utime("/missing", 0, unix.UTIME_OMIT, 0, unix.UTIME_OMIT)),
	do("utime out of range",
		utime("/file", 1, -1, 1, 1), utime("/file", 1, 1_000_000_000, 1, 1), utime("/file", 1, 1, 1, 1<<40),
		utime("/file", 1<<62, 0, -1<<62, 0), utime("/missing", 1, -1, 1, 1), utime("", 1, 1, 1, 1)),

	do("lgetxattr",
		lgetxattr("/file", "user.a", 0), lgetxattr("/file", "user.a", 5), lgetxattr("/file", "user.a", 4),
		lgetxattr("/file", "user.a", 1), lgetxattr("/file", "user.a", 100), lgetxattr("/file", "user.a", 65536),
		lgetxattr("/file", "user.a", 1<<17), lgetxattr("/file", "user.empty", 0), lgetxattr("/file", "user.empty", 1),
		lgetxattr("/file", "security.test", 10)),
	do("lgetxattr of what there is not",
		lgetxattr("/file", "user.b", 0), lgetxattr("/file", "user.b", 10), lgetxattr("/missing", "user.a", 10),
		lgetxattr("/link", "user.a", 10), lgetxattr("/dangling", "user.a", 0), lgetxattr("/file", "", 10),
		lgetxattr("/file", "a", 10), lgetxattr("/file", "user.", 10), lgetxattr("/file", "other.a", 10),
		lgetxattr("/file", "trusted.a", 10), lgetxattr("/fifo", "user.a", 10),
		lgetxattr("/file", strings.Repeat("n", 300), 10), lgetxattr("", "user.a", 0),
		lgetxattr("/file", "security.capability", 0)),
	do("llistxattr",
		llistxattr("/file", 0), llistxattr("/file", 65536), llistxattr("/file", 1<<17), llistxattr("/file", 5),
		llistxattr("/secret", 0), llistxattr("/secret", 100), llistxattr("/link", 100), llistxattr("/missing", 0),
		llistxattr("/missing", 100), llistxattr("", 100), llistxattr("/", 0), llistxattr("/dir/", 10)),
	do("lsetxattr",
		lsetxattr("/file", "user.b", "v", 1, 0), lsetxattr("/file", "user.a", "other", 5, 0),
		lsetxattr("/file", "user.c", "abc", 2, 0), lsetxattr("/file", "user.d", "abc", 0, 0),
		lsetxattr("/file", "user.e", "", 0, 0), lsetxattr("/file", "user.f", "a\x00b\xff", 4, 0),
		lsetxattr("/dir", "user.a", "d", 1, 0), lgetxattr("/file", "user.f", 100), lgetxattr("/file", "user.d", 0)),
	do("lsetxattr flags",
		lsetxattr("/file", "user.a", "x", 1, unix.XATTR_CREATE),
		lsetxattr("/file", "user.b", "x", 1, unix.XATTR_REPLACE),
		lsetxattr("/file", "user.a", "x", 1, unix.XATTR_REPLACE),
		lsetxattr("/file", "user.b", "x", 1, unix.XATTR_CREATE), lsetxattr("/file", "user.c", "x", 1, 3),
		lsetxattr("/file", "user.c", "x", 1, 4), lsetxattr("/file", "user.c", "x", 1, -1)),
	do("lsetxattr trusted.*, user.* on what may not have it",
		lsetxattr("/file", "trusted.a", "x", 1, 0), lsetxattr("/link", "user.a", "x", 1, 0),
		lsetxattr("/fifo", "user.a", "x", 1, 0), lsetxattr("/null", "user.a", "x", 1, 0),
		lsetxattr("/file", "security.other", "x", 1, 0), lsetxattr("/file", "security.capability", "x", 1, 0),
		lsetxattr("/file", "", "x", 1, 0), lsetxattr("/file", "none.a", "x", 1, 0),
		lsetxattr("/missing", "user.a", "x", 1, 0), lsetxattr("/file", "system.other", "x", 1, 0)),
	do("lsetxattr system.posix_acl_access",
		lsetxattr("/file", "system.posix_acl_access", acl, len(acl), 0),
		lgetxattr("/file", "system.posix_acl_access", 100), llistxattr("/file", 100), lstat("/file"),
		chmod("/file", 0o640), lremovexattr("/file", "system.posix_acl_access"),
		lsetxattr("/dir", "system.posix_acl_default", acl, len(acl), 0),
		create("/dir/new", unix.O_CREAT, 0o666, 1000, 1000), mkdir("/dir/newdir", 0o777, 1000, 1000),
		lgetxattr("/dir/newdir", "system.posix_acl_default", 0),
		lsetxattr("/file", "system.posix_acl_access", "bad", 3, 0),
		lsetxattr("/file", "system.posix_acl_default", acl, len(acl), 0)),
	do("lsetxattr of a long value",
		lsetxattr("/file", "user.long", strings.Repeat("l", 3000), 3000, 0), lgetxattr("/file", "user.long", 0),
		lgetxattr("/file", "user.long", 3000), lgetxattr("/file", "user.long", 2999),
		lsetxattr("/file", "user.longer", strings.Repeat("l", 65000), 65000, 0),
		lgetxattr("/file", "user.longer", 65536)),
	do("lremovexattr",
		lremovexattr("/file", "user.a"), lremovexattr("/file", "user.a"), lremovexattr("/file", "security.test"),
		lremovexattr("/link", "user.a"), lremovexattr("/file", ""), lremovexattr("/file", "trusted.a"),
		lremovexattr("/missing", "user.a"), lremovexattr("/file", "bad"), lremovexattr("/file", "user.")),

	do("a link out of the export is resolved inside",
		chmod("/out", 0o777), chmod("/outup", 0o777), open("/out", 0), open("/outup", unix.O_RDWR), truncate("/out", 0),
		truncate("/outup", 0), statfs("/out"), getversion("/out"), statfs("/outdir"), lstat("/outdir/passwd"),
		open("/outdir/passwd", 0), mkdir("/outdir/x", 0o755, 0, 0), readlink("/out", 100), lstat("/out")),
	do("a link out of the export, when the export has that path, too",
		mkdir("/etc", 0o755, 0, 0), create("/etc/passwd", unix.O_CREAT|unix.O_WRONLY, 0o640, 0, 0),
		chmod("/out", 0o777), truncate("/outup", 10), open("/out", 0), lstat("/outdir/passwd")),
	do("names of any bytes",
		lstat("/\xff\xfe"), create("/\x01\n\xc0", unix.O_CREAT, 0o600, 0, 0), rename("/\xff\xfe", "/\x80"),
		symlink("\xff", "/\x7f", 0, 0), readlink("/\x7f", 10)),
	do("names too long",
		create("/"+strings.Repeat("n", 255), unix.O_CREAT, 0o600, 1000, 1000),
		create("/"+strings.Repeat("n", 256), unix.O_CREAT, 0o600, 1000, 1000), lstat("/"+strings.Repeat("n", 256)),
		mkdir("/dir/"+strings.Repeat("d", 255), 0o755, 0, 0), rename("/file", "/"+strings.Repeat("n", 256))),

	do("payload ends before its fields do",
		raw(codec.Open), raw(codec.Create), raw(codec.Mknod), raw(codec.Mkdir), raw(codec.Symlink), raw(codec.Link),
		raw(codec.Lstat), raw(codec.Readlink), raw(codec.Statfs), raw(codec.Chmod), raw(codec.Chown),
		raw(codec.Truncate), raw(codec.Utime), raw(codec.Rename), raw(codec.Remove), raw(codec.Lgetxattr),
		raw(codec.Llistxattr), raw(codec.Lsetxattr), raw(codec.Lremovexattr), raw(codec.GetVersion)),
	do("payload ends within a field",
		raw(codec.Lstat, 5), raw(codec.Open, 2, 0, '/', 0, 0, 0, 0), raw(codec.Chmod, 2, 0, '/', 0),
		raw(codec.Rename, 1, 0, '/', 9), raw(codec.Mkdir, 0, 0, 0, 0, 0, 0, 0),
		raw(codec.Create, 2, 0, '/', 'x', 0, 0)),
	do("bytes left over are ignored",
		raw(codec.Lstat, 2, 0, '/', 0, 1, 2, 3, 4),
		raw(codec.Chmod, 5, 0, '/', 'f', 'i', 'l', 'e', 0x80, 1, 0, 0, 9, 9, 9),
		raw(codec.Open, append([]byte{1, 0, '/', 0, 0, 0, 0}, make([]byte, 1000)...)...)),
	do("a NUL within a string ends it",
		raw(codec.Lstat, 9, 0, '/', 'f', 'i', 'l', 'e', 0, '/', 'x', 'y'), raw(codec.Lstat, 3, 0, 0, '/', 'f'),
		raw(codec.Rename, 7, 0, '/', 'f', 'i', 'l', 'e', 0, 'z', 5, 0, '/', 'n', 0, 'w', 'x')),
	do("an empty string",
		raw(codec.Lstat, 0, 0), raw(codec.Lstat, 1, 0, 0), raw(codec.Remove, 0, 0), raw(codec.Rename, 0, 0, 0, 0)),
}

// acl is u::rw- u:1001:rwx g::r-- m::rwx o::---, as in linux/posix_acl_xattr.h.
const acl = "\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" +
	"\x02\x00\x07\x00\xe9\x03\x00\x00" +
	"\x04\x00\x04\x00\xff\xff\xff\xff" +
	"\x10\x00\x07\x00\xff\xff\xff\xff" +
	"\x20\x00\x00\x00\xff\xff\xff\xff"

// paths are those of which each request is asked.
var paths = []string{
	"/", "//", "", ".", "..", "/.", "/..", "/../../..", "/../file", "/dir/../../file", "../file",
	"file", "./file", "/file", "//file", "//dir//file", "/file/", "/file/.", "/file/x",
	"/dir", "/dir/", "/dir/sub/..", "/dir/up",
	"/link", "/link/", "/dirlink", "/dirlink/", "/dirlink/file", "/abslink",
	"/dangling", "/danglingdir", "/loop", "/loop/x", "/out", "/outup", "/outdir", "/outdir/passwd",
	"/null", "/block", "/sock", "/secret", "/missing", "/missing/", "/missing/x", "/empty", "/sticky/file",
	"/" + strings.Repeat("n", 256),
	strings.Repeat("/", 4000) + "file",
	strings.Repeat("/.", 2045) + "/file", // 4095
}

// ofPath are all requests of a path, in a form that works on most of them.
var ofPath = []func(path string) step{
	func(p string) step { return open(p, unix.O_RDONLY) },
	func(p string) step { return open(p, unix.O_RDWR|unix.O_CREAT) },
	func(p string) step { return create(p, unix.O_RDWR|unix.O_CREAT, 0o640, 1000, 1001) },
	func(p string) step { return create(p, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o640, 0, 0) },
	func(p string) step { return mknod(p, unix.S_IFIFO|0o640, 0, 1000, 1001) },
	func(p string) step { return mkdir(p, 0o750, 1000, 1001) },
	func(p string) step { return symlink("target", p, 1000, 1001) },
	func(p string) step { return link(p, "/linked") },
	func(p string) step { return link("/suid", p) },
	lstat,
	func(p string) step { return readlink(p, 4096) },
	statfs,
	func(p string) step { return chmod(p, 0o751) },
	func(p string) step { return chown(p, 1001, 1002) },
	func(p string) step { return truncate(p, 4) },
	func(p string) step { return utime(p, 1, 2, 3, 4) },
	func(p string) step { return rename(p, "/renamed") },
	func(p string) step { return rename("/suid", p) },
	func(p string) step { return rename("/empty", p) },
	remove,
	func(p string) step { return lgetxattr(p, "user.a", 100) },
	func(p string) step { return llistxattr(p, 1000) },
	func(p string) step { return lsetxattr(p, "user.n", "x", 1, 0) },
	func(p string) step { return lremovexattr(p, "user.a") },
	getversion,
}

// crashesC tells that the C helper does not survive a request, or never
// answers it: what is right then stands in right_test.go.
func crashesC(s step) bool {
	return s.t == codec.GetVersion &&
		(bytes.HasPrefix(s.q.Path, cs("/null")) || bytes.HasPrefix(s.q.Path, cs("/block")))
}

// side is one of the two helpers that are compared.
type side struct {
	dir    string
	client *helpertest.Client
}

// world is a file system with a tree for each helper.
type world struct {
	ours, theirs side

	fresh bool              // the trees are as makeTree made them
	now   time.Time         // when that was
	tree  map[string]string // and how they looked
}

func newWorld(t *testing.T, dir string) *world {
	t.Helper()
	w := &world{}
	for _, s := range []struct {
		*side
		name, path string
	}{{&w.ours, "ours", helpertest.Ours(t)}, {&w.theirs, "theirs", helpertest.C(t)}} {
		s.dir = filepath.Join(dir, s.name)
		if err := os.Mkdir(s.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		_, s.client = helpertest.Pair(t, s.path, s.dir)
	}
	return w
}

// worlds runs a test on the file systems that the helpers are compared on: that
// of the temporary directory, ext4 on most machines, and a tmpfs.
func worlds(t *testing.T, test func(*testing.T, *world)) {
	helpertest.NeedRoot(t)
	for name, dir := range map[string]func(testing.TB) string{
		"disk":  func(tb testing.TB) string { return tb.TempDir() },
		"tmpfs": helpertest.Tmpfs,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := dir(t)
			// What a test mounts later on reaches the server, as where systemd has made all mounts shared.
			if err := errors.Join(
				unix.Mount(dir, dir, "", unix.MS_BIND, ""),
				unix.Mount("", dir, "", unix.MS_SHARED, ""),
			); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
			test(t, newWorld(t, dir))
		})
	}
}

// compare asks both helpers, and says where their answers differ.
func (w *world) compare(s step, nul bool, now time.Time) error {
	frame := s.frame(nul)
	var said [2]string
	for i, side := range []side{w.ours, w.theirs} {
		if err := side.client.TrySend(frame); err != nil {
			return err
		}
		a, err := side.client.TryRead(s.t)
		if err != nil {
			return fmt.Errorf("helper %d of 2: %w", i+1, err)
		}
		if said[i], err = mask(side.dir, s.t, a, now); err != nil {
			return err
		}
	}
	if said[0] != said[1] {
		return fmt.Errorf("%v\n  ours: %s\n  C's:  %s", s, said[0], said[1])
	}
	return nil
}

// mask describes an answer byte by byte, but for what can't be the same twice:
// see look. A descriptor is described by what it leads to; it is closed.
func mask(dir string, t codec.Type, a helpertest.Answer, now time.Time) (string, error) {
	b := a.Raw
	p := a.Payload
	if a.Errno == 0 {
		switch t {
		case codec.Lstat:
			clear(p[8:16])    // inode
			clear(p[100:116]) // ctime
			for _, at := range [][]byte{p[68:84], p[84:100]} {
				sec, nsec := int64(u64(at)), int64(u64(at[8:]))
				if sec > now.Unix() || sec == now.Unix() && nsec >= int64(now.Nanosecond()) {
					copy(at, "after its setup!")
				}
			}
		case codec.Statfs: // blocks and inodes that are free
			clear(p[24:40])
			clear(p[48:56])
		case codec.GetVersion: // the generation: TestGetVersion
			clear(p)
		}
	}
	said := fmt.Sprintf("%x (%v)", b, a.Errno)
	if a.File == nil {
		return said, nil
	}
	defer a.File.Close()
	fd := int(a.File.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return "", err
	}
	to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	if strings.Contains(to, "/#") {
		to = "O_TMPFILE"
	}
	// In the server's own mount namespace paths begin at the export.
	to = strings.TrimPrefix(strings.TrimPrefix(to, dir), "/")
	said += fmt.Sprintf(" %s flags %o mode %o owner %d:%d nlink %d size %d",
		to, flags&^unix.O_NOFOLLOW, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size)
	if st.Mode&unix.S_IFMT == unix.S_IFREG && flags&(unix.O_PATH|unix.O_DIRECT|unix.O_ACCMODE) == 0 {
		content, err := io.ReadAll(io.LimitReader(a.File, 1<<20))
		if err != nil {
			return "", err
		}
		said += fmt.Sprintf(" %d bytes %.20q", len(content), content)
	}
	return said, nil
}

// run runs a case on new trees, or on those of the last case if that has left
// them as they were.
func (w *world) run(t *testing.T, c testCase, nul bool) {
	if !w.fresh {
		makeTree(t, w.ours.dir)
		makeTree(t, w.theirs.dir)
		w.now = coarseNow()
		w.tree = look(t, w.ours.dir, w.now)
		if d := difference(w.tree, look(t, w.theirs.dir, w.now)); d != "" {
			t.Fatalf("the trees differ from the beginning:\n%s", d)
		}
	}
	for _, s := range c.steps {
		if err := w.compare(s, nul, w.now); err != nil {
			t.Errorf("%s (NUL: %v): %v", c.name, nul, err)
		}
	}
	after := look(t, w.ours.dir, w.now)
	if d := difference(after, look(t, w.theirs.dir, w.now)); d != "" {
		t.Errorf("%s (NUL: %v): the trees differ:\n%s", c.name, nul, d)
	}
	w.fresh = maps.Equal(w.tree, after)
}

// coarseNow is the time that files get now: the kernel's clock of its last
// tick.
func coarseNow() time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts); err != nil {
		panic(err)
	}
	return time.Unix(ts.Unix())
}

func TestConformance(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		for i, c := range cases {
			if testing.Short() && i%3 != 0 {
				continue
			}
			if !testing.Short() {
				w.run(t, c, false)
			}
			w.run(t, c, true)
		}
		for i, f := range ofPath {
			for j, p := range paths {
				if testing.Short() && (i+j)%len(paths) != 0 {
					continue
				}
				if s := f(p); !crashesC(s) {
					w.run(t, do("each request of each path", s), (i+j)%2 == 0)
				}
			}
		}
	})
}

package model

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// fsKind is the file system that a VM lives on.
type fsKind int64

// These are the f_type values of statfs(2).
const (
	ext      fsKind = 0xef53
	btrfs    fsKind = 0x9123683e
	xfs      fsKind = 0x58465342
	reiserfs fsKind = 0x52654973
)

const tmpfs fsKind = 0x01021994

// TmpfsInodes is the limit of inodes (nr_inodes) that a tmpfs which VMs fill
// must be mounted with.
const TmpfsInodes = 24

// versions reports whether the file system supports GETVERSION.
func (k fsKind) versions() bool { return k == ext || k == btrfs || k == xfs || k == reiserfs }

// want describes the right answer: errno, or a payload that check accepts.
type want struct {
	errno unix.Errno
	check func(payload []byte) error // nil for a status 0
	node  *node                      // the inode that the descriptor must refer to
}

// apply performs a request in the world and returns the right answer to it.
func (w *world) apply(r *request, v *VM) want {
	path, newPath := text(r.q.Path), text(r.q.NewPath)
	q := &r.q
	switch {
	case r.t == codec.GetVersion && !v.around.versions():
		return exactly(codec.AppendVersion(nil, 0))
	case r.short:
		return want{errno: unix.ENOBUFS}
	}
	n, errno := (*node)(nil), unix.Errno(0)
	switch r.t {
	case codec.Open:
		n, errno = w.open(path, int(q.Flags), 0, 0, 0)
		return want{errno: errno, node: n}
	case codec.Create:
		n, errno = w.open(path, int(q.Flags), q.Mode, q.UID, q.GID)
		return want{errno: errno, node: n}
	case codec.Mknod:
		var p place
		switch p, errno = w.free(path); {
		case errno != 0:
		case q.Mode&unix.S_IFMT == unix.S_IFCHR && (q.UID != 0 || v.IDs.Rootless):
			errno = unix.EPERM
		default:
			n = newNode(q.Mode, q.UID, q.GID)
			n.rdev = q.Rdev
			p.set(n)
		}
	case codec.Mkdir:
		_, errno = w.create(path, unix.S_IFDIR|q.Mode, q.UID, q.GID)
	case codec.Symlink:
		if n, errno = w.create(path, unix.S_IFLNK|0o777, q.UID, q.GID); errno == 0 {
			n.data = text(q.Target)
		}
	case codec.Link:
		var p place
		if n, errno = w.find(path, false); errno != 0 {
			break
		}
		switch p, errno = w.free(newPath); {
		case errno != 0:
		case n.is(unix.S_IFDIR):
			errno = unix.EPERM
		default:
			n.nlink++
			p.set(n)
		}
	case codec.Lstat:
		if n, errno = w.find(path, false); errno == 0 {
			return want{check: func(b []byte) error { return n.matchesWire(b, v.kindOf(path)) }}
		}
	case codec.Readlink:
		if q.Size < 2 {
			return want{errno: unix.EINVAL}
		}
		if n, errno = w.find(path, false); errno == 0 && !n.is(unix.S_IFLNK) {
			errno = unix.EINVAL
		}
		if errno == 0 {
			return exactString(n.data[:min(int64(len(n.data)), q.Size-1)])
		}
	case codec.Statfs:
		if _, errno = w.find(path, true); errno == 0 {
			return want{check: func(b []byte) error { return matchesStatfs(b, v.kindOf(path)) }}
		}
	case codec.Chmod:
		if n, errno = w.find(path, true); errno == 0 {
			n.mode = n.mode&unix.S_IFMT | q.Mode
		}
	case codec.Chown:
		if n, errno = w.find(path, false); errno == 0 {
			if q.UID != 1<<32-1 {
				n.uid = q.UID
			}
			if q.GID != 1<<32-1 {
				n.gid = q.GID
			}
		}
	case codec.Truncate:
		if q.Size < 0 {
			return want{errno: unix.EINVAL}
		}
		switch n, errno = w.find(path, true); {
		case errno != 0:
		case n.is(unix.S_IFDIR):
			errno = unix.EISDIR
		case !n.is(unix.S_IFREG):
			errno = unix.EINVAL
		default:
			n.resize(int(q.Size))
		}
	case codec.Utime:
		t := q.Mtime
		n, errno = w.find(path, false)
		switch {
		case errno != 0 || t.Nsec == unix.UTIME_OMIT:
		case t.Nsec == unix.UTIME_NOW:
			n.mtime = nil
		case t.Nsec > 999_999_999:
			errno = unix.EINVAL
		default:
			n.mtime = &t
		}
	case codec.Rename:
		errno = w.rename(path, newPath)
	case codec.Remove:
		errno = w.remove(path)
	case codec.GetVersion:
		switch n, errno = w.find(path, true); {
		case errno != 0:
		case n.is(unix.S_IFSOCK):
			errno = unix.ENXIO
		case !n.is(unix.S_IFREG) && !n.is(unix.S_IFDIR) || !v.kindOf(path).versions():
			errno = unix.ENOTTY
		default:
			return want{check: n.matchesVersion}
		}
	case codec.Lgetxattr, codec.Llistxattr, codec.Lsetxattr, codec.Lremovexattr:
		return w.xattr(r, path)
	}
	return want{errno: errno}
}

func (w *world) xattr(r *request, path string) want {
	q, name := &r.q, text(r.q.Name)
	if r.t == codec.Lsetxattr && q.Size > int64(len(q.Value)) {
		return want{errno: unix.EINVAL}
	}
	n, errno := w.find(path, false)
	if errno != 0 {
		return want{errno: errno}
	}
	value, has := n.xattrs[name]
	holds := n.is(unix.S_IFREG) || n.is(unix.S_IFDIR)
	sized := func(length int, w want) want {
		switch {
		case q.Size == 0:
			return exactly(codec.AppendStatus(nil, int32(length)))
		case int64(length) > q.Size:
			return want{errno: unix.ERANGE}
		}
		return w
	}
	switch r.t {
	case codec.Lgetxattr:
		if !has {
			return want{errno: unix.ENODATA}
		}
		return sized(len(value), exactString(value))
	case codec.Llistxattr:
		names, length := slices.Sorted(maps.Keys(n.xattrs)), 0
		for _, name := range names {
			length += len(name) + 1
		}
		return sized(length, want{check: func(b []byte) error {
			if len(b) != 2+length {
				return fmt.Errorf("%d bytes, want %d", len(b), 2+length)
			}
			got := strings.FieldsFunc(string(b[2:]), func(r rune) bool { return r == 0 })
			if slices.Sort(got); !slices.Equal(got, names) {
				return fmt.Errorf("%q, want %q", got, names)
			}
			return nil
		}})
	case codec.Lsetxattr:
		switch {
		case !holds:
			errno = unix.EPERM
		case has && q.Flags&unix.XATTR_CREATE != 0:
			errno = unix.EEXIST
		case !has && q.Flags&unix.XATTR_REPLACE != 0:
			errno = unix.ENODATA
		default:
			n.xattrs[name] = string(q.Value[:q.Size])
		}
	case codec.Lremovexattr:
		switch {
		case !holds:
			errno = unix.EPERM
		case !has:
			errno = unix.ENODATA
		default:
			delete(n.xattrs, name)
		}
	}
	return want{errno: errno}
}

// exactly returns a want for the payload of answer, which includes a header.
func exactly(answer []byte) want {
	return want{check: func(b []byte) error {
		if string(b) != string(answer[codec.HeaderSize:]) {
			return fmt.Errorf("%.80x, want %.80x", b, answer[codec.HeaderSize:])
		}
		return nil
	}}
}

func exactString(s string) want {
	answer, room := codec.StringRoom(nil, len(s))
	return exactly(codec.FinishString(answer, copy(room, s)))
}

func (n *node) matchesWire(b []byte, kind fsKind) error {
	if len(b) != codec.StatSize {
		return fmt.Errorf("%d bytes, want %d", len(b), codec.StatSize)
	}
	d := func(at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
	q := func(at int) uint64 { return binary.NativeEndian.Uint64(b[at:]) }
	st := unix.Stat_t{
		Ino:  q(8),
		Mode: d(24),
		Uid:  d(28),
		Gid:  d(32),
		Rdev: q(36),
		Size: int64(q(44)),
		Mtim: unix.Timespec{Sec: int64(q(84)), Nsec: int64(q(92))},
	}
	set(&st.Nlink, q(16))
	return n.matches(&st, kind)
}

// set sets a field whose type depends on the architecture.
func set[T uint32 | uint64](field *T, v uint64) { *field = T(v) }

func (n *node) matchesVersion(b []byte) error {
	if len(b) != 8 {
		return fmt.Errorf("%d bytes, want 8", len(b))
	}
	version := binary.NativeEndian.Uint64(b)
	if n.version == nil {
		n.version = &version
	}
	if version != *n.version || version>>32 != 0 {
		return fmt.Errorf("version %#x, want %#x, of 32 bits", version, *n.version)
	}
	return nil
}

func matchesStatfs(b []byte, kind fsKind) error {
	if len(b) != codec.StatfsSize {
		return fmt.Errorf("%d bytes, want %d", len(b), codec.StatfsSize)
	}
	if got := fsKind(binary.NativeEndian.Uint64(b)); got != kind {
		return fmt.Errorf("file system %#x, want %#x", got, kind)
	}
	return nil
}

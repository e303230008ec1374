package ops

import (
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// maxXattr is the longest value or list of names that Linux has, in bytes.
const maxXattr = 65536

// lgetxattr serves LGETXATTR: d bufsize, s path, s name; lgetxattr(path,
// name, buf, bufsize). ERANGE when the value is longer.
func (fs *FS) lgetxattr(c *Call) unix.Errno {
	return c.readXattr(func(name *byte, room []byte) (int, unix.Errno) {
		n, errno := lgetxattr(name, c.req.Name.Pointer(), room)
		if fs.translates && errno == 0 && len(room) > 0 && isACL(c.req.Name) {
			translateACL(room[:n], fs.uids.guest, fs.gids.guest)
		}
		return n, errno
	})
}

// llistxattr serves LLISTXATTR: d bufsize, s path; llistxattr(path, buf,
// bufsize).
func (fs *FS) llistxattr(c *Call) unix.Errno {
	return c.readXattr(llistxattr)
}

// readXattr answers with what read gets, or with its length where the request
// has no buffer for it. bufsize is the guest's; the room never exceeds what
// Linux can fill.
func (c *Call) readXattr(read func(name *byte, room []byte) (int, unix.Errno)) unix.Errno {
	if c.req.Size < 0 {
		return unix.EINVAL
	}
	var room []byte
	c.Out, room = codec.StringRoom(c.Out, int(min(c.req.Size, maxXattr)))
	var n int
	errno := c.byName(c.req.Path, func(name *byte) (errno unix.Errno) {
		n, errno = read(name, room)
		return errno
	})
	switch {
	case errno != 0:
		return errno
	case c.req.Size == 0:
		c.Out = codec.AppendStatus(c.Out, int32(n))
	case n > codec.MaxString:
		return unix.ENOBUFS
	default:
		c.Out = codec.FinishString(c.Out, n)
	}
	return 0
}

// lsetxattr serves LSETXATTR: s path, s name, s value, d size, d flags;
// lsetxattr(path, name, value, size, flags). The size may be less than the
// value's, not more: EINVAL.
func (fs *FS) lsetxattr(c *Call) unix.Errno {
	q := &c.req
	if q.Size < 0 || q.Size > int64(len(q.Value)) {
		return unix.EINVAL
	}
	return c.byName(q.Path, func(name *byte) unix.Errno {
		return lsetxattr(name, q.Name.Pointer(), q.Value[:q.Size], int(q.Flags))
	})
}

// lremovexattr serves LREMOVEXATTR: s path, s name; lremovexattr(path, name).
func (fs *FS) lremovexattr(c *Call) unix.Errno {
	return c.byName(c.req.Path, func(name *byte) unix.Errno {
		return lremovexattr(name, c.req.Name.Pointer())
	})
}

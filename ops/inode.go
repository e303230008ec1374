package ops

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// lstat serves LSTAT: s path; lstat(path).
func (fs *FS) lstat(c *Call) unix.Errno {
	at, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	if errno = fstatat(at.dir, at.name, &c.stat, unix.AT_SYMLINK_NOFOLLOW); errno == 0 {
		if fs.translates {
			c.stat.Uid, _ = fs.uids.guest(c.stat.Uid)
			c.stat.Gid, _ = fs.gids.guest(c.stat.Gid)
		}
		c.Out = codec.AppendStat(c.Out, &c.stat)
	}
	at.close()
	return errno
}

// readlink serves READLINK: s path, d bufsize; readlink(path, buf, bufsize-1).
func (fs *FS) readlink(c *Call) unix.Errno {
	size := min(c.req.Size-1, unix.PathMax)
	if size <= 0 {
		return unix.EINVAL
	}
	at, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	var room []byte
	c.Out, room = codec.StringRoom(c.Out, int(size))
	n, errno := readlinkat(at.dir, at.name, room)
	if errno == 0 {
		c.Out = codec.FinishString(c.Out, n)
	}
	at.close()
	return errno
}

// statfs serves STATFS: s path; statfs(path), which follows links.
func (fs *FS) statfs(c *Call) unix.Errno {
	errno := c.byName(c.req.Path, func(name *byte) unix.Errno { return statfs(name, &c.statbuf) })
	if errno == 0 {
		c.Out = codec.AppendStatfs(c.Out, &c.statbuf)
	}
	return errno
}

// chmod serves CHMOD: s path, d mode; chmod(path, mode), which follows links.
func (fs *FS) chmod(c *Call) unix.Errno {
	at, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	return fchmodat(at.dir, at.name, c.req.Mode)
}

// chown serves CHOWN: s path, d uid, d gid; lchown(path, uid, gid), where -1
// leaves an id as it is. EPERM if the user namespace has no such id, as for what
// is made for it.
func (fs *FS) chown(c *Call) unix.Errno {
	at, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	errno = fchownat(at.dir, at.name, c.req.UID, c.req.GID, unix.AT_SYMLINK_NOFOLLOW)
	if errno == unix.EINVAL && c.idUnmapped(c.req.UID, c.req.GID) {
		return unix.EPERM
	}
	return errno
}

// truncate serves TRUNCATE: s path, q size; truncate(path, size), which
// follows links and refuses FIFOs and devices by itself (EINVAL).
func (fs *FS) truncate(c *Call) unix.Errno {
	return c.byName(c.req.Path, func(name *byte) unix.Errno { return truncate(name, c.req.Size) })
}

// utime serves UTIME: s path, q atime s, ns, q mtime s, ns; utimensat(path)
// without following; UTIME_NOW and UTIME_OMIT pass through.
func (fs *FS) utime(c *Call) unix.Errno {
	at, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	a, m := c.req.Atime, c.req.Mtime
	c.times = [2]unix.Timespec{{Sec: a.Sec, Nsec: a.Nsec}, {Sec: m.Sec, Nsec: m.Nsec}}
	return utimensat(at.dir, at.name, &c.times, unix.AT_SYMLINK_NOFOLLOW)
}

// getversion serves GETVERSION: s path; ioctl(FS_IOC_GETVERSION) on the file
// that path leads to, as a u64 whose upper half is 0. Nothing but regular
// files and directories is opened: ENXIO for a socket, ENOTTY for FIFOs and
// devices.
//
// It is a quarter of a guest's requests, and open, ioctl and close cost two and
// a half times a stat. Where probeVersions saw that the file handle holds the
// generation, nothing is opened at all; and what the handle does not tell, the
// file's type, is looked at once for each inode: it never changes.
func (fs *FS) getversion(c *Call) unix.Errno {
	version, errno := fs.version(c, c.req.Path)
	if errno == 0 {
		c.Out = codec.AppendVersion(c.Out, uint64(version))
	}
	return errno
}

func (fs *FS) version(c *Call, path codec.CString) (uint32, unix.Errno) {
	at, errno := resolve(path)
	if errno != 0 {
		return 0, errno
	}
	defer at.close()
	byHandle := fs.handles && c.versionByHandle(at) && c.mount == fs.mount
	if byHandle && fs.openable.has(c.inode) {
		return c.inode.generation, 0
	}
	if errno = fstatat(at.dir, at.name, &c.stat, 0); errno != 0 {
		return 0, errno
	}
	switch c.stat.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
	case unix.S_IFSOCK:
		return 0, unix.ENXIO
	default:
		return 0, unix.ENOTTY
	}
	if byHandle && c.stat.Ino == uint64(c.inode.number) { // not exchanged in between
		fs.openable.add(c.inode)
		return c.inode.generation, 0
	}
	return fs.versionByIoctl(c, path)
}

// inode is one for good: a number is used again, with another generation.
type inode struct{ number, generation uint32 }

// inodeSet remembers some inodes. It forgets one when another needs its place.
type inodeSet [8192]atomic.Uint64

func (s *inodeSet) place(i inode) (at *atomic.Uint64, value uint64) {
	return &s[i.number%uint32(len(s))], uint64(i.number)<<32 | uint64(i.generation)
}

func (s *inodeSet) has(i inode) bool {
	at, value := s.place(i)
	return at.Load() == value
}

func (s *inodeSet) add(i inode) {
	at, value := s.place(i)
	at.Store(value)
}

func (fs *FS) versionByIoctl(c *Call, path codec.CString) (uint32, unix.Errno) {
	const flags = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC
	if errno := fs.openExisting(c, path, flags, 0); errno != 0 {
		return 0, errno
	}
	errno := getversion(c.FD, &c.version)
	closefd(c.FD)
	c.FD = -1
	return c.version, errno
}

// fileHandle is the kernel's struct file_handle with room for the handles
// that are understood here.
type fileHandle struct {
	size uint32
	kind int32
	data [16]byte
}

// versionByHandle takes the inode's generation from its file handle, where
// that has the layout of FILEID_INO32_GEN: u32 inode, u32 generation (ext2 to
// ext4, xfs with 32-bit inodes). It fills in c.inode and c.mount.
func (c *Call) versionByHandle(at resolved) bool {
	const fileidIno32Gen = 1
	h := &c.handle
	h.size = uint32(len(h.data))
	errno := nameToHandleAt(at.dir, at.name, h, &c.mount, unix.AT_SYMLINK_FOLLOW)
	if errno != 0 || h.kind != fileidIno32Gen || h.size != 8 {
		return false
	}
	c.inode = inode{binary.NativeEndian.Uint32(h.data[:]), binary.NativeEndian.Uint32(h.data[4:])}
	return true
}

// probeVersions finds out how GETVERSION is answered. Like the C helper it
// looks once, at the root: elsewhere than on these file systems it is 0.
func (fs *FS) probeVersions() error {
	const (
		btrfs    = 0x9123683e
		ext      = 0xef53
		reiserfs = 0x52654973
		xfs      = 0x58465342
	)
	var c Call
	if errno := statfs(root.Pointer(), &c.statbuf); errno != 0 {
		return errno
	}
	switch c.statbuf.Type {
	case btrfs, ext, reiserfs, xfs:
		fs.versions = true
	default:
		return nil
	}
	want, errno := fs.versionByIoctl(&c, root)
	if errno != 0 {
		return nil // each request is told the same
	}
	at := resolved{unix.AT_FDCWD, root.Pointer()}
	fs.handles = c.versionByHandle(at) && c.inode.generation == want
	fs.mount = c.mount
	return nil
}

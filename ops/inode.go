package ops

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// lstat serves LSTAT: s path; lstat(path).
func (fs *FS) lstat(c *Call) unix.Errno {
	at, errno := locate(c.req.Path)
	if errno != 0 {
		return errno
	}
	if errno = fstatat(at.dir, at.name, &c.stat, unix.AT_SYMLINK_NOFOLLOW); errno == 0 {
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
	at, errno := locate(c.req.Path)
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
	at, errno := locate(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	return fchmodat(at.dir, at.name, c.req.Mode)
}

// chown serves CHOWN: s path, d uid, d gid; lchown(path, uid, gid), where -1
// leaves an id as it is.
func (fs *FS) chown(c *Call) unix.Errno {
	at, errno := locate(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	return fchownat(at.dir, at.name, c.req.UID, c.req.GID, unix.AT_SYMLINK_NOFOLLOW)
}

// truncate serves TRUNCATE: s path, q size; truncate(path, size), which
// follows links and refuses FIFOs and devices by itself (EINVAL).
func (fs *FS) truncate(c *Call) unix.Errno {
	return c.byName(c.req.Path, func(name *byte) unix.Errno { return truncate(name, c.req.Size) })
}

// utime serves UTIME: s path, q atime s, ns, q mtime s, ns; utimensat(path)
// without following; UTIME_NOW and UTIME_OMIT pass through.
func (fs *FS) utime(c *Call) unix.Errno {
	at, errno := locate(c.req.Path)
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
// It is a quarter of a guest's requests, and open, ioctl and close cost three
// times a stat. Where probeVersions saw that the file handle holds the
// generation, nothing is opened at all.
func (fs *FS) getversion(c *Call) unix.Errno {
	version, errno := fs.version(c, c.req.Path)
	if errno == 0 {
		c.Out = codec.AppendVersion(c.Out, uint64(version))
	}
	return errno
}

func (fs *FS) version(c *Call, path codec.CString) (uint32, unix.Errno) {
	at, errno := locate(path)
	if errno != 0 {
		return 0, errno
	}
	defer at.close()
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
	if fs.handles {
		if version, ok := c.versionByHandle(at); ok && c.mount == fs.mount {
			return version, 0
		}
	}
	return fs.versionByIoctl(c, path)
}

func (fs *FS) versionByIoctl(c *Call, path codec.CString) (uint32, unix.Errno) {
	if errno := fs.openExisting(c, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); errno != 0 {
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
// ext4, xfs with 32-bit inodes). It leaves the mount's number in c.mount.
func (c *Call) versionByHandle(at place) (version uint32, ok bool) {
	const fileidIno32Gen = 1
	h := &c.handle
	h.size = uint32(len(h.data))
	errno := nameToHandleAt(at.dir, at.name, h, &c.mount, unix.AT_SYMLINK_FOLLOW)
	if errno != 0 || h.kind != fileidIno32Gen || h.size != 8 {
		return 0, false
	}
	return binary.NativeEndian.Uint32(h.data[4:]), true
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
	got, ok := c.versionByHandle(place{unix.AT_FDCWD, root.Pointer()})
	fs.handles, fs.mount = ok && got == want, c.mount
	return nil
}

package ops

import (
	"bytes"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// A read-only export answers each request as a read-only mount does: EROFS
// where something would change, but only after all that the kernel finds wrong
// before it looks whether it may write. The kernel itself is asked for that,
// by calls that cannot change anything: with an empty path, or with a second
// path on another mount.

// readOnlyTable is the table of a read-only export. OPEN and CREATE are as
// ever: open.go asks where a file would be made or opened to write.
var readOnlyTable = func() [codec.NumTypes]func(*FS, *Call) unix.Errno {
	t := table
	for typ, before := range map[codec.Type]func(*FS, *Call) unix.Errno{
		codec.Mknod:        (*FS).mknodReadOnly,
		codec.Mkdir:        (*FS).mkdirReadOnly,
		codec.Symlink:      (*FS).symlinkReadOnly,
		codec.Link:         (*FS).linkReadOnly,
		codec.Chmod:        followReadOnly,
		codec.Chown:        noFollowReadOnly,
		codec.Truncate:     (*FS).truncateReadOnly,
		codec.Utime:        (*FS).utimeReadOnly,
		codec.Rename:       (*FS).renameReadOnly,
		codec.Remove:       (*FS).removeReadOnly,
		codec.Lsetxattr:    noFollowReadOnly,
		codec.Lremovexattr: noFollowReadOnly,
	} {
		change := table[typ]
		t[typ] = func(fs *FS, c *Call) unix.Errno { return fs.refuse(c, change, before) }
	}
	return t
}()

var empty = codec.CString("\x00")

// refuse answers a request that change would do. before finds what is wrong
// with its paths.
func (fs *FS) refuse(c *Call, change, before func(*FS, *Call) unix.Errno) unix.Errno {
	path := c.req.Path
	c.req.Path = empty // which is ENOENT, at the latest
	errno := change(fs, c)
	c.req.Path = path
	if errno != unix.ENOENT {
		return errno // success is a UTIME of neither time
	}
	if errno = before(fs, c); errno != 0 {
		return errno
	}
	return unix.EROFS
}

// probeInode finds what is wrong with the path of an inode. It leaves c.stat.
func (c *Call) probeInode(flags int) unix.Errno {
	at, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	return fstatat(at.dir, at.name, &c.stat, flags)
}

// probeNewName finds what is wrong with the path of a file to be made. A link to
// another mount is refused as the last of that.
func (fs *FS) probeNewName(path codec.CString) unix.Errno {
	at, errno := resolve(path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	return ignoreEXDEV(linkat(fs.fds, fs.self.Pointer(), at.dir, at.name))
}

// probeParent finds what is wrong with the path of a name to be taken away, up to
// the directory that it is in.
func (fs *FS) probeParent(path codec.CString) unix.Errno {
	at, errno := resolve(path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	return ignoreEXDEV(renameat(at.dir, at.name, fs.fds, fs.self.Pointer()))
}

// ignoreEXDEV is what a call with one path in fds says of the other.
func ignoreEXDEV(errno unix.Errno) unix.Errno {
	if errno == unix.EXDEV {
		return 0
	}
	return errno
}

func followReadOnly(_ *FS, c *Call) unix.Errno { return c.probeInode(0) }

func noFollowReadOnly(_ *FS, c *Call) unix.Errno {
	return c.probeInode(unix.AT_SYMLINK_NOFOLLOW)
}

func (fs *FS) mknodReadOnly(c *Call) unix.Errno { return fs.probeNewName(c.req.Path) }

func (fs *FS) mkdirReadOnly(c *Call) unix.Errno {
	return fs.probeNewName(trimSlashes(c.req.Path))
}

func (fs *FS) symlinkReadOnly(c *Call) unix.Errno {
	if len(c.req.Target.Text()) == 0 {
		return unix.ENOENT
	}
	return fs.probeNewName(c.req.Path)
}

func (fs *FS) linkReadOnly(c *Call) unix.Errno {
	if errno := c.probeInode(unix.AT_SYMLINK_NOFOLLOW); errno != 0 {
		return errno
	}
	return fs.probeNewName(c.req.NewPath)
}

func (fs *FS) truncateReadOnly(c *Call) unix.Errno {
	errno := c.probeInode(0)
	switch {
	case errno != 0:
		return errno
	case c.stat.Mode&unix.S_IFMT == unix.S_IFDIR:
		return unix.EISDIR
	case c.stat.Mode&unix.S_IFMT != unix.S_IFREG:
		return unix.EINVAL
	}
	return 0
}

func (fs *FS) utimeReadOnly(c *Call) unix.Errno {
	if errno := c.probeInode(unix.AT_SYMLINK_NOFOLLOW); errno != 0 {
		return errno
	}
	for _, t := range []codec.Time{c.req.Atime, c.req.Mtime} {
		if t.Nsec != unix.UTIME_NOW && t.Nsec != unix.UTIME_OMIT && uint64(t.Nsec) >= 1e9 {
			return unix.EINVAL
		}
	}
	return 0
}

func (fs *FS) renameReadOnly(c *Call) unix.Errno {
	for _, path := range []codec.CString{c.req.Path, c.req.NewPath} {
		if errno := fs.probeParent(path); errno != 0 {
			return errno
		}
	}
	for _, path := range []codec.CString{c.req.Path, c.req.NewPath} {
		if lastName(path) == nil {
			return unix.EBUSY
		}
	}
	return 0
}

func (fs *FS) removeReadOnly(c *Call) unix.Errno {
	if errno := fs.probeParent(c.req.Path); errno != 0 || lastName(c.req.Path) != nil {
		return errno
	}
	switch path := bytes.TrimRight(c.req.Path.Text(), "/"); {
	case bytes.HasSuffix(path, []byte("..")):
		return unix.ENOTEMPTY
	case bytes.HasSuffix(path, []byte(".")):
		return unix.EINVAL
	}
	return unix.EBUSY // the root
}

// createReadOnly answers an open that would make a file where path is free.
// What path leads to else is EEXIST.
func (fs *FS) createReadOnly(path codec.CString, flags int, mode uint32) unix.Errno {
	errno := wrongFlags(flags, mode)
	switch {
	case errno != 0:
	case flags&tmpfile != 0:
		var fd int
		if fd, errno = openPath(path, unix.O_DIRECTORY|flags&unix.O_NOFOLLOW); errno == 0 {
			closefd(fd)
		}
	case bytes.HasSuffix(path.Text(), []byte("/")) && lastName(path) != nil:
		if errno = fs.probeParent(path); errno == 0 {
			errno = unix.EISDIR
		}
	default:
		errno = fs.probeNewName(path)
	}
	if errno == 0 {
		errno = unix.EROFS
	}
	return errno
}

// wrongFlags is what is wrong with flags for any path.
func wrongFlags(flags int, mode uint32) unix.Errno {
	if _, errno := openat(unix.AT_FDCWD, empty.Pointer(), flags, mode); errno != unix.ENOENT {
		return errno
	}
	return 0
}

// writes tells that an open with flags is one to write. Access mode 3 gives
// a descriptor for neither reading nor writing, but asks for the right to both.
func writes(flags int) bool {
	return flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
}

// lastName returns the name that a path ends in; nil if that is none: "/",
// "." and "..".
func lastName(path codec.CString) []byte {
	text := bytes.TrimRight(path.Text(), "/")
	name := text[bytes.LastIndexByte(text, '/')+1:]
	switch string(name) {
	case "", ".", "..":
		return nil
	}
	return name
}

// trimSlashes cuts the slashes that a path ends in: a directory to be made may
// have them.
func trimSlashes(path codec.CString) codec.CString {
	if lastName(path) == nil {
		return path
	}
	n := len(bytes.TrimRight(path.Text(), "/"))
	path[n] = 0
	return path[:n+1]
}

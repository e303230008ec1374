package ops

import (
	"strconv"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// maxLinks is how many symbolic links a path may go through, as in Linux.
const maxLinks = 40

// tmpfile is what O_TMPFILE has beside O_DIRECTORY.
const tmpfile = unix.O_TMPFILE &^ unix.O_DIRECTORY

// open serves OPEN: s path, d flags; open(path, flags), which follows links.
// Flags are as given: O_CREAT (the mode is 0), O_PATH, O_TMPFILE and access
// mode 3 work. ENXIO for all but regular files and directories.
func (fs *FS) open(c *Call) unix.Errno {
	return fs.openAny(c, 0)
}

// create serves CREATE: s path, d flags, d mode, d uid, d gid; open(path,
// flags, mode) as uid:gid. Without O_CREAT in the flags it is an OPEN as
// uid:gid.
func (fs *FS) create(c *Call) unix.Errno {
	return c.withCredentials(c.req.UID, c.req.GID, func() unix.Errno {
		return fs.openAny(c, c.req.Mode)
	})
}

// openAny sets c.FD. A file is created only where there is none (O_EXCL), and
// what is there is opened so that a FIFO is not waited for and a device never
// opened, not even if names are exchanged in between.
func (fs *FS) openAny(c *Call, mode uint32) unix.Errno {
	path, flags := c.req.Path, int(c.req.Flags)|unix.O_CLOEXEC
	switch {
	case flags&unix.O_PATH != 0:
		return fs.openExisting(c, path, flags, mode)
	case flags&(unix.O_CREAT|unix.O_DIRECTORY) == unix.O_DIRECTORY:
		// The kernel itself opens nothing but directories, or an unnamed
		// file in one (O_TMPFILE). Half of a guest's OPENs are these.
		return fs.openAt(c, path, flags, mode)
	case flags&unix.O_CREAT == 0 && fs.noDevices && flags&unix.O_ACCMODE != unix.O_ACCMODE &&
		!(fs.readOnly && writes(flags)):
		return fs.openNow(c, path, flags, mode)
	case flags&unix.O_CREAT == 0:
		return fs.openExisting(c, path, flags, mode)
	}
	for range maxLinks {
		errno := fs.openAt(c, path, flags|unix.O_EXCL, mode)
		if errno != unix.EEXIST || flags&unix.O_EXCL != 0 {
			return errno
		}
		errno = fs.openExisting(c, path, flags, mode)
		if errno != unix.ENOENT {
			return errno
		}
		// There is a name but no file: a dangling link, whose target is to
		// be created, or a file that went away just now.
		if path, errno = followLink(path); errno != 0 {
			return errno
		}
	}
	return unix.ELOOP
}

// openAt opens what flags can't lead astray.
func (fs *FS) openAt(c *Call, path codec.CString, flags int, mode uint32) unix.Errno {
	if fs.readOnly && flags&(unix.O_CREAT|tmpfile) != 0 {
		return fs.createReadOnly(path, flags, mode)
	}
	at, errno := resolve(path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	fd, errno := openat(at.dir, at.name, flags, mode)
	if errno == 0 {
		c.FD = fd
	}
	return errno
}

// openNow opens what path leads to, and closes it again if that is neither a
// regular file nor a directory. It is for mounts that let no device be opened. A
// FIFO may be open for a moment, which wakes a process of the host that waits on its
// other end; to look first, as openExisting does, takes 2.7 µs more.
func (fs *FS) openNow(c *Call, path codec.CString, flags int, mode uint32) unix.Errno {
	at, errno := resolve(path)
	if errno != 0 {
		return errno
	}
	fd, errno := c.openFile(at.dir, at.name, flags, mode)
	at.close()
	switch {
	case errno == unix.EACCES: // a device, perhaps
		return fs.openExisting(c, path, flags, mode)
	case errno != 0:
		return errno
	}
	if errno = fstat(fd, &c.stat); errno == 0 {
		if kind := c.stat.Mode & unix.S_IFMT; kind == unix.S_IFREG || kind == unix.S_IFDIR {
			c.FD = fd
			return 0
		}
		errno = unix.ENXIO
	}
	closefd(fd)
	return errno
}

// openFile is openat of what may be leased (fcntl(2), F_SETLEASE): the kernel asks
// the holder to let go, who may take lease-break-time, 45 s. Such a request is to be
// done Again. The descriptor has the flags that were asked for.
func (c *Call) openFile(dir int, name *byte, flags int, mode uint32) (int, unix.Errno) {
	if c.MayWait || flags&unix.O_NONBLOCK != 0 {
		return openat(dir, name, flags, mode)
	}
	fd, errno := openat(dir, name, flags|unix.O_NONBLOCK, mode)
	switch errno {
	case 0:
		if errno = setFlags(fd, flags); errno != 0 {
			closefd(fd)
			return -1, errno
		}
	case unix.EAGAIN:
		c.Again = true
	}
	return fd, errno
}

// openExisting opens what path leads to if it is a regular file or a
// directory. An O_PATH descriptor pins the file without opening it; once its
// type is known, that same file is opened through /proc/self/fd.
func (fs *FS) openExisting(c *Call, path codec.CString, flags int, mode uint32) unix.Errno {
	fd, errno := openPath(path, flags&(unix.O_NOFOLLOW|unix.O_DIRECTORY))
	if errno != 0 {
		return errno
	}
	if errno = fs.mayOpen(c, fd, flags, mode); errno == 0 {
		if flags&unix.O_PATH != 0 {
			c.FD = fd
			return 0
		}
		c.FD, errno = fs.reopen(c, fd, flags&^unix.O_NOFOLLOW, mode)
	}
	closefd(fd)
	return errno
}

// mayOpen finds what speaks against an open of the file under an O_PATH
// descriptor, but for what the kernel finds itself.
func (fs *FS) mayOpen(c *Call, fd, flags int, mode uint32) unix.Errno {
	if errno := fstat(fd, &c.stat); errno != 0 {
		return errno
	}
	kind := c.stat.Mode & unix.S_IFMT
	if flags&unix.O_PATH == 0 {
		if kind == unix.S_IFLNK { // O_NOFOLLOW
			return unix.ELOOP
		}
		if flags&unix.O_CREAT != 0 {
			if errno := fs.mayCreate(c, fd); errno != 0 {
				return errno
			}
		}
	}
	switch {
	case kind != unix.S_IFREG && kind != unix.S_IFDIR:
		return unix.ENXIO
	case fs.readOnly && writes(flags) && kind == unix.S_IFREG && flags&unix.O_PATH == 0:
		if errno := wrongFlags(flags, mode); errno != 0 {
			return errno
		}
		return unix.EROFS
	}
	return 0
}

// reopen opens the file under an O_PATH descriptor; -1 if that fails.
func (fs *FS) reopen(c *Call, fd, flags int, mode uint32) (int, unix.Errno) {
	return c.openFile(fs.fds, c.nameOf(fd), flags, mode)
}

// nameOf returns the name of a descriptor in fds.
func (c *Call) nameOf(fd int) *byte {
	return &append(strconv.AppendInt(c.digits[:0], int64(fd), 10), 0)[0]
}

// openPath returns an O_PATH descriptor of what path leads to.
func openPath(path codec.CString, flags int) (int, unix.Errno) {
	at, errno := resolve(path)
	if errno != 0 {
		return -1, errno
	}
	defer at.close()
	return openat(at.dir, at.name, unix.O_PATH|unix.O_CLOEXEC|flags, 0)
}

// followLink returns the path that the link at path leads to; path itself
// where there is no link (any more).
func followLink(path codec.CString) (codec.CString, unix.Errno) {
	at, errno := resolve(path)
	if errno != 0 {
		return nil, errno
	}
	defer at.close()
	target := make([]byte, unix.PathMax)
	n, errno := readlinkat(at.dir, at.name, target)
	switch {
	case errno == unix.ENOENT || errno == unix.EINVAL:
		return path, 0
	case errno != 0:
		return nil, errno
	}
	var next codec.CString
	if target[0] != '/' {
		dir, _ := splitPath(path)
		next = append(next, dir...)
	}
	return append(append(next, target[:n]...), 0), 0
}

package ops

import "golang.org/x/sys/unix"

// mknod serves MKNOD: d uid, d gid, s path, d mode, q rdev; mknod(path, mode,
// rdev) as uid:gid. A mode without a type makes a regular file; devices need
// 0:0.
func (fs *FS) mknod(c *Call) unix.Errno {
	q := &c.req
	if q.Rdev>>32 != 0 {
		return unix.EINVAL // the kernel's dev_t has 32 bits
	}
	return c.createAt(func(at resolved) unix.Errno {
		return mknodat(at.dir, at.name, q.Mode, uint32(q.Rdev))
	})
}

// mkdir serves MKDIR: d uid, d gid, s path, d mode; mkdir(path, mode) as
// uid:gid.
func (fs *FS) mkdir(c *Call) unix.Errno {
	return c.createAt(func(at resolved) unix.Errno {
		return mkdirat(at.dir, at.name, c.req.Mode)
	})
}

// symlink serves SYMLINK: d uid, d gid, s target, s path; symlink(target,
// path) as uid:gid.
func (fs *FS) symlink(c *Call) unix.Errno {
	return c.createAt(func(at resolved) unix.Errno {
		return symlinkat(c.req.Target.Pointer(), at.dir, at.name)
	})
}

// createAt runs a system call that makes the name c.req.Path as its owner to be.
func (c *Call) createAt(do func(resolved) unix.Errno) unix.Errno {
	return c.withCredentials(c.req.UID, c.req.GID, func() unix.Errno {
		at, errno := resolve(c.req.Path)
		if errno != 0 {
			return errno
		}
		defer at.close()
		return do(at)
	})
}

// link serves LINK: s old, s new; link(old, new), which does not follow old.
func (fs *FS) link(c *Call) unix.Errno {
	return c.resolveTwo(func(from, to resolved) unix.Errno {
		return linkat(from.dir, from.name, to.dir, to.name)
	})
}

// rename serves RENAME: s old, s new; rename(old, new).
func (fs *FS) rename(c *Call) unix.Errno {
	return c.resolveTwo(func(from, to resolved) unix.Errno {
		return renameat(from.dir, from.name, to.dir, to.name)
	})
}

func (c *Call) resolveTwo(do func(from, to resolved) unix.Errno) unix.Errno {
	from, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer from.close()
	to, errno := resolve(c.req.NewPath)
	if errno != 0 {
		return errno
	}
	defer to.close()
	return do(from, to)
}

// remove serves REMOVE: s path; remove(path), which is unlink, or rmdir of a
// directory.
func (fs *FS) remove(c *Call) unix.Errno {
	at, errno := resolve(c.req.Path)
	if errno != 0 {
		return errno
	}
	defer at.close()
	if errno = unlinkat(at.dir, at.name, 0); errno == unix.EISDIR {
		errno = unlinkat(at.dir, at.name, unix.AT_REMOVEDIR)
	}
	return errno
}

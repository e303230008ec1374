package ops

import (
	"bytes"
	"runtime"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// resolved is where a path leads, as *at system calls want it: a name, relative
// to dir. dir is AT_FDCWD, which is the root of the export, except for paths
// that are too long for one system call.
type resolved struct {
	dir  int
	name *byte
}

// resolve finds the place of a path. One beyond PATH_MAX is walked, piece by
// piece and as the kernel would: the process' root is the export's, so neither
// ".." nor a link leads out of it. The place is to be closed.
func resolve(path codec.CString) (resolved, unix.Errno) {
	at := resolved{unix.AT_FDCWD, path.Pointer()}
	for len(path) > unix.PathMax {
		end := bytes.LastIndexByte(path[:unix.PathMax-1], '/')
		// The last piece must be a name: a path may end in slashes.
		if end <= 0 || len(bytes.Trim(path[end:], "/\x00")) == 0 {
			at.close()
			return resolved{}, unix.ENAMETOOLONG
		}
		path[end] = 0
		dir, errno := openat(at.dir, path.Pointer(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		path[end] = '/'
		at.close()
		if errno != 0 {
			return resolved{}, errno
		}
		path = path[end+1:]
		for path[0] == '/' {
			path = path[1:]
		}
		at = resolved{dir, path.Pointer()}
	}
	return at, 0
}

func (at resolved) close() {
	if at.dir != unix.AT_FDCWD {
		closefd(at.dir)
	}
}

// byName runs a system call that has no *at form, with a name that is good
// for it. Beyond PATH_MAX the working directory is the place's meanwhile: as
// all threads share one, this thread gets its own first; where a container
// forbids that, the path is too long.
func (c *Call) byName(path codec.CString, do func(name *byte) unix.Errno) unix.Errno {
	at, errno := resolve(path)
	if errno != 0 {
		return errno
	}
	if at.dir == unix.AT_FDCWD {
		return do(at.name)
	}
	defer at.close()
	runtime.LockOSThread()
	c.switched = true
	if errno = unshareFS(); errno == unix.EPERM {
		errno = unix.ENAMETOOLONG
	}
	if errno == 0 {
		errno = fchdir(at.dir)
	}
	if errno == 0 {
		errno = do(at.name)
	}
	if chdir(root.Pointer()) != 0 {
		c.Tainted = true
		return errno
	}
	c.switched = false
	runtime.UnlockOSThread()
	return errno
}

var root = codec.CString("/\x00")

// splitPath splits a path behind its last slash but trailing ones. The name
// holds the NUL.
func splitPath(path codec.CString) (dir []byte, name codec.CString) {
	trimmed := bytes.TrimRight(path.Text(), "/")
	i := bytes.LastIndexByte(trimmed, '/') + 1
	return path[:i], path[i:]
}

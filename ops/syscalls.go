package ops

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of this package take pointers into the request's own
// buffer: package unix would copy each path into a new string. They announce
// themselves to the scheduler, as any of them may wait for a disk or a file
// server, and start again on EINTR: the runtime's own signals interrupt some
// file systems.

//go:uintptrescapes
func call(trap, a, b, c, d, e uintptr) (int, unix.Errno) {
	for {
		r, _, errno := unix.Syscall6(trap, a, b, c, d, e, 0)
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

func openat(dir int, name *byte, flags int, mode uint32) (int, unix.Errno) {
	fd, errno := call(unix.SYS_OPENAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(flags|unix.O_LARGEFILE), uintptr(mode), 0)
	if errno != 0 {
		return -1, errno
	}
	return fd, 0
}

// setFlags is fcntl(F_SETFL): the access mode and what only open knows stay.
func setFlags(fd, flags int) unix.Errno {
	_, errno := call(unix.SYS_FCNTL, uintptr(fd), unix.F_SETFL, uintptr(flags), 0, 0)
	return errno
}

// closefd ignores what close says: the descriptor is gone in any case, and
// what was written is told to whoever wrote it.
func closefd(fd int) { unix.Syscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func fstat(fd int, st *unix.Stat_t) unix.Errno {
	_, errno := call(unix.SYS_FSTAT, uintptr(fd), uintptr(unsafe.Pointer(st)), 0, 0, 0)
	return errno
}

func fstatat(dir int, name *byte, st *unix.Stat_t, flags int) unix.Errno {
	_, errno := call(unix.SYS_NEWFSTATAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(st)), uintptr(flags), 0)
	return errno
}

func readlinkat(dir int, name *byte, room []byte) (int, unix.Errno) {
	return call(unix.SYS_READLINKAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(unsafe.SliceData(room))), uintptr(len(room)), 0)
}

func mknodat(dir int, name *byte, mode, rdev uint32) unix.Errno {
	_, errno := call(unix.SYS_MKNODAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(mode), uintptr(rdev), 0)
	return errno
}

func mkdirat(dir int, name *byte, mode uint32) unix.Errno {
	_, errno := call(unix.SYS_MKDIRAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(mode), 0, 0)
	return errno
}

func symlinkat(target *byte, dir int, name *byte) unix.Errno {
	_, errno := call(unix.SYS_SYMLINKAT,
		uintptr(unsafe.Pointer(target)),
		uintptr(dir), uintptr(unsafe.Pointer(name)), 0, 0)
	return errno
}

func linkat(olddir int, oldname *byte, newdir int, newname *byte) unix.Errno {
	_, errno := call(unix.SYS_LINKAT,
		uintptr(olddir), uintptr(unsafe.Pointer(oldname)),
		uintptr(newdir), uintptr(unsafe.Pointer(newname)), 0)
	return errno
}

func renameat(olddir int, oldname *byte, newdir int, newname *byte) unix.Errno {
	_, errno := call(unix.SYS_RENAMEAT2,
		uintptr(olddir), uintptr(unsafe.Pointer(oldname)),
		uintptr(newdir), uintptr(unsafe.Pointer(newname)), 0)
	return errno
}

func unlinkat(dir int, name *byte, flags int) unix.Errno {
	_, errno := call(unix.SYS_UNLINKAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(flags), 0, 0)
	return errno
}

func fchmodat(dir int, name *byte, mode uint32) unix.Errno {
	_, errno := call(unix.SYS_FCHMODAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(mode), 0, 0)
	return errno
}

func fchownat(dir int, name *byte, uid, gid uint32, flags int) unix.Errno {
	_, errno := call(unix.SYS_FCHOWNAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(uid), uintptr(gid), uintptr(flags))
	return errno
}

func utimensat(dir int, name *byte, times *[2]unix.Timespec, flags int) unix.Errno {
	_, errno := call(unix.SYS_UTIMENSAT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(times)), uintptr(flags), 0)
	return errno
}

func statfs(name *byte, st *unix.Statfs_t) unix.Errno {
	_, errno := call(unix.SYS_STATFS,
		uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(st)), 0, 0, 0)
	return errno
}

func truncate(name *byte, size int64) unix.Errno {
	_, errno := call(unix.SYS_TRUNCATE, uintptr(unsafe.Pointer(name)), uintptr(size), 0, 0, 0)
	return errno
}

func lgetxattr(name, attr *byte, room []byte) (int, unix.Errno) {
	return call(unix.SYS_LGETXATTR,
		uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(attr)),
		uintptr(unsafe.Pointer(unsafe.SliceData(room))), uintptr(len(room)), 0)
}

func llistxattr(name *byte, room []byte) (int, unix.Errno) {
	return call(unix.SYS_LLISTXATTR,
		uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(unsafe.SliceData(room))), uintptr(len(room)), 0, 0)
}

func lsetxattr(name, attr *byte, value []byte, flags int) unix.Errno {
	_, errno := call(unix.SYS_LSETXATTR,
		uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(attr)),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(len(value)),
		uintptr(flags))
	return errno
}

func lremovexattr(name, attr *byte) unix.Errno {
	_, errno := call(unix.SYS_LREMOVEXATTR,
		uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(attr)), 0, 0, 0)
	return errno
}

// nameToHandleAt fills h, whose size says how much room it has, and mount,
// which names the mount that the file is on.
func nameToHandleAt(dir int, name *byte, h *fileHandle, mount *int32, flags int) unix.Errno {
	_, errno := call(unix.SYS_NAME_TO_HANDLE_AT,
		uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(h)), uintptr(unsafe.Pointer(mount)), uintptr(flags))
	return errno
}

// getversion fills in version: the kernel writes 32 bits, although the ioctl's
// number says long.
func getversion(fd int, version *uint32) unix.Errno {
	const fsIocGetversion = 0x80087601 // _IOR('v', 1, long)
	_, errno := call(unix.SYS_IOCTL,
		uintptr(fd), fsIocGetversion,
		uintptr(unsafe.Pointer(version)), 0, 0)
	return errno
}

func chdir(name *byte) unix.Errno {
	_, errno := call(unix.SYS_CHDIR, uintptr(unsafe.Pointer(name)), 0, 0, 0, 0)
	return errno
}

func fchdir(fd int) unix.Errno {
	_, errno := call(unix.SYS_FCHDIR, uintptr(fd), 0, 0, 0, 0)
	return errno
}

// unshareFS gives this thread a root and a working directory of its own.
func unshareFS() unix.Errno {
	_, errno := call(unix.SYS_UNSHARE, unix.CLONE_FS, 0, 0, 0, 0)
	return errno
}

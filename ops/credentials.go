package ops

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/sandbox"
)

// withCredentials runs do, which makes a file, while this thread has the
// credentials uid:gid: effective ids, which the file system ids follow, and of
// the capabilities at most CAP_DAC_OVERRIDE, as the guest has checked
// permissions already. For 0:0, where that is what every thread is anyway, it
// keeps all that the process has.
//
// A uid other than 0 has no capabilities. Most files are made where
// their owner may write, so CAP_DAC_OVERRIDE comes back only if do fails for
// the want of it; do has made nothing then.
func (c *Call) withCredentials(uid, gid uint32, do func() unix.Errno) unix.Errno {
	const invalid = ^uint32(0)
	switch {
	case uid == invalid || gid == invalid:
		return unix.EINVAL
	case uid == 0 && gid == 0 && own == identity{}:
		return do()
	}
	errno := c.assume(uid, gid)
	if errno == 0 {
		if errno = do(); errno == unix.EACCES && uid != 0 {
			if errno = capset(&createCaps); errno == 0 {
				errno = do()
			}
		}
	}
	c.restore(uid, gid)
	return errno
}

// assume switches this thread to uid:gid. It is EPERM, not the kernel's EINVAL,
// if the user namespace has no such id. The calls are raw ones: identity
// belongs to a thread, and the C library's (and Go's) setters change all of
// them. The goroutine is locked to its thread until restore, which also keeps
// the runtime from cloning new threads, and with them the identity, from this
// one.
func (c *Call) assume(uid, gid uint32) (errno unix.Errno) {
	runtime.LockOSThread()
	c.switched = true
	c.uid = uid
	if gid != own.gid {
		errno = setegid(gid)
	}
	if errno == 0 && uid != own.uid {
		errno = seteuid(uid) // and the kernel empties the effective set, if root becomes another
	}
	switch {
	case errno != 0:
	case uid == 0:
		errno = capset(&createCaps)
	case own.uid != 0:
		errno = capset(&noCaps)
	}
	if errno == unix.EINVAL {
		return unix.EPERM
	}
	return errno
}

// idUnmapped tells that the user namespace has no such user or group; -1 stands
// for none.
func (c *Call) idUnmapped(uid, gid uint32) bool {
	if uid == noID {
		uid = own.uid
	}
	if gid == noID {
		gid = own.gid
	}
	return c.withCredentials(uid, gid, func() unix.Errno { return 0 }) == unix.EPERM
}

// restore takes assume back. The real ids are the process' own, so it needs no
// capability. If it fails all the same, the thread is lost to further requests.
func (c *Call) restore(uid, gid uint32) {
	var errno unix.Errno
	if uid != own.uid {
		errno = seteuid(own.uid) // and the kernel makes root's permitted set effective
	}
	if errno == 0 && (uid == own.uid || own.uid != 0) {
		errno = capset(&allCaps)
	}
	if errno == 0 && gid != own.gid {
		errno = setegid(own.gid)
	}
	if errno != 0 {
		c.Tainted = true
		return
	}
	c.switched = false
	c.uid = own.uid
	runtime.UnlockOSThread()
}

// identity is a user and a group.
type identity struct{ uid, gid uint32 }

// own is what the process runs as: 0:0, or the first ids that a MAP names.
var own = identity{uint32(os.Geteuid()), uint32(os.Getegid())}

// capData is the kernel's struct __user_cap_data_struct, both halves of it.
type capData [2]unix.CapUserData

var (
	capHeader  = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // pid 0: this thread
	allCaps    = capSets(sandbox.Mask())
	createCaps = capSets(1 << unix.CAP_DAC_OVERRIDE)
	noCaps     = capSets(0)
)

func capSets(effective uint64) capData {
	permitted := sandbox.Mask()
	return capData{
		{Effective: uint32(effective), Permitted: uint32(permitted)},
		{Effective: uint32(effective >> 32), Permitted: uint32(permitted >> 32)},
	}
}

func setegid(gid uint32) unix.Errno {
	return identityCall(unix.SYS_SETRESGID, ^uintptr(0), uintptr(gid), ^uintptr(0))
}

func seteuid(uid uint32) unix.Errno {
	return identityCall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
}

func capset(data *capData) unix.Errno {
	return identityCall(unix.SYS_CAPSET,
		uintptr(unsafe.Pointer(&capHeader)), uintptr(unsafe.Pointer(data)), 0)
}

// identityCall never waits: no need to tell the scheduler.
//
//go:uintptrescapes
func identityCall(trap, a, b, c uintptr) unix.Errno {
	_, _, errno := unix.RawSyscall(trap, a, b, c)
	return errno
}

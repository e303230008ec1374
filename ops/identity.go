package ops

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/confine"
)

// become makes this thread create files as uid:gid, until revert: effective
// ids, which the file system ids follow, and of the capabilities
// CAP_DAC_OVERRIDE alone, as the guest has checked permissions already. 0:0
// is what every thread is anyway: it keeps all that the process has.
//
// The calls are raw ones: identity belongs to a thread, and the C library's
// (and Go's) setters change all of them. The goroutine is locked to its
// thread meanwhile, which also keeps the runtime from cloning new threads,
// and with them the identity, from this one.
func (c *Call) become(uid, gid uint32) unix.Errno {
	const invalid = ^uint32(0)
	if uid == invalid || gid == invalid {
		return unix.EINVAL
	}
	if uid == 0 && gid == 0 {
		return 0
	}
	runtime.LockOSThread()
	c.switched = true
	errno := setegid(gid)
	if errno == 0 {
		errno = seteuid(uid)
	}
	if errno == 0 {
		errno = capset(&createCaps)
	}
	if errno != 0 {
		c.revert()
	}
	return errno
}

// revert takes become back. The real ids are 0, so it needs no capability. If
// it fails all the same, the thread is lost to further requests.
func (c *Call) revert() {
	if !c.switched {
		return
	}
	if seteuid(0) != 0 || setegid(0) != 0 || capset(&allCaps) != 0 {
		c.Stray = true
		return
	}
	c.switched = false
	runtime.UnlockOSThread()
}

// capData is the kernel's struct __user_cap_data_struct, both halves of it.
type capData [2]unix.CapUserData

var (
	capHeader  = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // pid 0: this thread
	allCaps    = capSets(confine.Mask())
	createCaps = capSets(1 << unix.CAP_DAC_OVERRIDE)
)

func capSets(effective uint64) capData {
	permitted := confine.Mask()
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
	return identityCall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&capHeader)), uintptr(unsafe.Pointer(data)), 0)
}

// identityCall never waits: no need to tell the scheduler.
//
//go:uintptrescapes
func identityCall(trap, a, b, c uintptr) unix.Errno {
	_, _, errno := unix.RawSyscall(trap, a, b, c)
	return errno
}

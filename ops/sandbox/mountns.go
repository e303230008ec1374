package sandbox

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// parentDeathSignal is what this process gets when its parent dies. It is asked
// for on the main thread, where initialization runs: other threads have none.
var parentDeathSignal = func() (sig uint32) {
	unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&sig)), 0, 0, 0)
	return sig
}()

// OwnMountNamespace executes this program again in a mount namespace of its
// own, if it is root of a user namespace that does not own the mount namespace:
// LXD and Incus start it so, and only the owner may copy mounts. It stays the
// same process, with the same descriptors. Mounts that come later appear in the
// new namespace as well: the kernel makes slaves of what another user namespace
// gets.
//
// Where no namespace can be made it does nothing: Check or Start says what is
// missing.
func (c Config) OwnMountNamespace() error {
	if c.Sandbox != SandboxNamespace || copyMounts() != unix.EPERM {
		return nil
	}
	runtime.LockOSThread() // execve takes the namespace of the calling thread
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		runtime.UnlockOSThread()
		return nil
	}
	// Without this, a system that allows namespaces but no copies would be tried for ever.
	if err := copyMounts(); err != nil {
		return needsNamespaces("copy mounts", err)
	}
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(parentDeathSignal), 0, 0, 0); err != nil {
		return fmt.Errorf("keep the parent's death signal: %w", err)
	}
	return &os.PathError{Op: "execute in a mount namespace of its own", Path: "/proc/self/exe",
		Err: syscall.Exec("/proc/self/exe", os.Args, os.Environ())}
}

// copyMounts tries what Start does with the export's mounts, where nothing is
// mounted below: of what another user namespace owns only whole trees are copied.
func copyMounts() error {
	const flags = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/proc/self/fd", flags)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

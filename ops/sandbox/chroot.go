package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// chrootLater starts a process that shares the root and the working directory
// of this one and keeps the capabilities that this one has now. change has it
// make the export both, and waits for its end. In between this process drops
// its capabilities, with a /proc where it finds all its threads.
//
// A thread with a root of its own would do as well, but containers forbid
// unshare(2), even with CLONE_FS alone.
func chrootLater(export int) (change func() error, err error) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The runtime handles no signal in the new process.
	var all, was unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &was); err != nil {
		return nil, fmt.Errorf("block signals: %w", err)
	}
	pid, errno := cloneChroot(uintptr(pipe[0]), uintptr(pipe[1]), uintptr(export))
	err = unix.PthreadSigmask(unix.SIG_SETMASK, &was, nil)
	unix.Close(pipe[0])
	if errno != 0 {
		unix.Close(pipe[1])
		return nil, fmt.Errorf("clone: %w", errno)
	}
	return func() error {
		_, writeErr := unix.Write(pipe[1], []byte{1})
		closeErr := unix.Close(pipe[1])
		var status unix.WaitStatus
		_, waitErr := unix.Wait4(pid, &status, 0, nil)
		for waitErr == unix.EINTR {
			_, waitErr = unix.Wait4(pid, &status, 0, nil)
		}
		if err := errors.Join(writeErr, closeErr, waitErr); err != nil {
			return fmt.Errorf("chroot: %w", err)
		}
		if !status.Exited() || status.ExitStatus() != 0 {
			return fmt.Errorf("chroot: %w", unix.Errno(max(status.ExitStatus(), 1)))
		}
		return unix.Close(export)
	}, err
}

var dot, slash = [2]byte{'.'}, [2]byte{'/'}

// cloneChroot returns the number of the process, whose exit status is an errno.
// In that process nothing of the runtime works: it makes raw system calls, and
// no call that may grow the stack.
//
//go:norace
//go:noinline
//go:nosplit
func cloneChroot(r, w, export uintptr) (pid int, errno unix.Errno) {
	const flags = uintptr(unix.SIGCHLD) | unix.CLONE_FS
	p, _, errno := unix.RawSyscall6(unix.SYS_CLONE, flags, 0, 0, 0, 0, 0)
	if errno != 0 || p != 0 {
		return int(p), errno
	}
	unix.RawSyscall(unix.SYS_CLOSE, w, 0, 0)
	var n uintptr
	n, _, errno = unix.RawSyscall(unix.SYS_READ, r, uintptr(unsafe.Pointer(&wake)), 1)
	if errno == 0 && n != 1 {
		errno = unix.EPIPE
	}
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_FCHDIR, export, 0, 0)
	}
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_CHROOT, uintptr(unsafe.Pointer(&dot)), 0, 0)
	}
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(&slash)), 0, 0)
	}
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(errno), 0, 0)
	}
}

var wake [1]byte

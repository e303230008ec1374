// Package sandbox takes away from the two processes that outlive the start
// whatever they don't need, for good. The server, which reads what guests
// send, ends up with the export as its root directory and nothing else
// mounted, in namespaces of its own, with seven capabilities and a list of
// system calls; the supervisor with what it takes to start servers like that.
//
//	sandbox.go      how strictly; the server's way in, step by step
//	mounts.go       the export becomes the root: pivot_root in own namespaces, or chroot
//	mountns.go      a mount namespace for root of a user namespace that has none
//	chroot.go       the root of all threads is changed by another process
//	mountinfo.go    the export's mounts, as the kernel lists them
//	covers.go       what is mounted on those that guests must not reach
//	filesystems.go  which those are
//	caps.go         capabilities of both processes, on all threads
//	seccomp.go      the filters of system calls, and who is told of a violation
//	syscalls.go     the lists
//	limits.go       descriptors and threads
//	userns.go       a user namespace, for a helper that is not started as root
//	idmaps.go       a user namespace for servers, with certain ids alone
//
// The supervisor calls Keep, once, then Start for each server and Supervise with
// what that server hands out; the server calls Enter, before it does anything
// else.
package sandbox

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Config is how strictly, for both processes the same. Less than the strictest
// is for debugging, and for containers that don't let their root make
// namespaces. There is no falling back: what can't be done is an error.
type Config struct {
	Sandbox  Sandbox
	Seccomp  Seccomp
	ReadOnly bool // nobody can change the export; needs SandboxNamespace
	// UIDs and GIDs are the ids that servers have, in a user namespace. Nil is all
	// that this process has; both nil is no user namespace.
	UIDs, GIDs []syscall.SysProcIDMap
}

// Sandbox is how the export becomes the server's root directory.
type Sandbox string

const (
	// SandboxNamespace: pivot_root in a mount namespace that has nothing but
	// the export, and network, IPC, UTS and PID namespaces without anything.
	SandboxNamespace Sandbox = "namespace"
	// SandboxChroot: chroot, in the caller's namespaces. Privileges are
	// dropped all the same.
	SandboxChroot Sandbox = "chroot"
	// SandboxNone: chroot, as paths begin at the export, and nothing else:
	// both processes keep the groups and, but on threads that have made files,
	// the capabilities that they were started with. A hostile guest that takes
	// over the server has the host; with UIDs and GIDs, what these own there.
	SandboxNone Sandbox = "none"
)

// Valid tells whether a user's word is one of the above.
func (s Sandbox) Valid() bool {
	return s == SandboxNamespace || s == SandboxChroot || s == SandboxNone
}

// Inside is what a server has that is confined.
type Inside struct {
	// FDs is a descriptor of the process' own /proc/self/fd, the only way left
	// to it: a directory without a parent, that holds nothing but the
	// descriptors that the process has anyway.
	FDs int
	// Violations is for the supervisor, see Config.Supervise; nil without a filter.
	Violations *os.File
}

// Enter confines this process, a server that Start has started, and runs
// nothing else yet. export is the descriptor that Start has given to it.
func (c Config) Enter(export int, log *slog.Logger) (*Inside, error) {
	in := &Inside{}
	var err error
	if in.FDs, err = openFDs(log); err != nil {
		return nil, err
	}
	unix.Umask(0) // modes are the guest's, whole
	if c.Sandbox == SandboxNone {
		err = changeRoot(export)
	} else {
		err = c.enterSandbox(export)
	}
	if err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	if in.Violations, err = c.filterServer(); err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	return in, nil
}

// enterSandbox changes the root and drops privileges. The latter needs a /proc
// that shows all threads, when they have lost theirs, or will: with namespaces
// the thread that does it gets a view of its own, and ends; else another process
// changes the root.
func (c Config) enterSandbox(export int) error {
	if c.Sandbox == SandboxChroot {
		change, err := chrootLater(export)
		if err != nil {
			return err
		}
		if err := dropAllButServerCaps(); err != nil {
			return err // and the other process ends with this one
		}
		return change()
	}
	// From here on nothing that is mounted or unmounted reaches the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return needsNamespaces("make all mounts private", err)
	}
	return onThreadThatEnds(func() error {
		if err := c.ownMounts(); err != nil {
			return err
		}
		done := make(chan error)
		go func() { done <- c.pivotRoot(export) }()
		if err := <-done; err != nil {
			return err
		}
		return dropAllButServerCaps()
	})
}

// onThreadThatEnds runs f on a thread that does nothing afterwards. The main
// thread never ends, so it is held while another is used.
func onThreadThatEnds(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err := onThreadThatEnds(f)
			runtime.UnlockOSThread()
			done <- err
			return
		}
		done <- f() // and the thread ends with this goroutine, locked to it
	}()
	return <-done
}

// needsNamespaces says what to do where a container forbids them.
func needsNamespaces(what string, err error) error {
	for _, forbidden := range []unix.Errno{
		unix.EPERM, unix.EACCES, unix.ENOSYS, unix.EINVAL, unix.ENOSPC,
	} {
		if errors.Is(err, forbidden) {
			return fmt.Errorf("%s: %w: "+
				"if this system allows no namespaces, --sandbox=chroot does without", what, err)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Package confine shuts the process into the export, for good: its root
// directory, no supplementary groups, seven capabilities, no new privileges.
// It is entered once, by a process that runs nothing else yet.
package confine

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// kept are the capabilities that requests need; they are all that remains.
var kept = []cap.Value{cap.CHOWN, cap.DAC_OVERRIDE, cap.FOWNER, cap.FSETID, cap.SETGID, cap.SETUID, cap.MKNOD}

// Mask returns the capabilities that requests need as the kernel's bit mask.
func Mask() uint64 {
	var m uint64
	for _, v := range kept {
		m |= 1 << v
	}
	return m
}

// Check says what the process lacks to be confined and to serve, and what to
// do about it.
func Check() error {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Errorf("needs root to act for the guest's users, runs as uid %d: start it with sudo or from a system service", uid)
	}
	have := cap.GetProc()
	var missing []string
	for _, v := range append([]cap.Value{cap.SYS_CHROOT, cap.SETPCAP}, kept...) {
		if ok, err := have.GetFlag(cap.Effective, v); err != nil || !ok {
			missing = append(missing, strings.ToUpper(v.String()))
		}
	}
	if missing != nil {
		return fmt.Errorf("runs as root but without %s: grant them (docker: --cap-add; systemd: CapabilityBoundingSet=)", strings.Join(missing, ", "))
	}
	return nil
}

// Enter makes the directory export the root of the process and drops all
// privileges but Mask, on every thread. It returns a descriptor of the
// process' own /proc/self/fd, the only way left to it: a directory without a
// parent, that holds nothing but the descriptors that the process has anyway.
func Enter(export string, log *slog.Logger) (fds int, err error) {
	dir, err := unix.Open(export, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "export", Path: export, Err: err}
	}
	if fds, err = openFDs(log); err != nil {
		return -1, err
	}
	unix.Umask(0) // modes are the guest's, whole

	// The thread that drops capabilities has to see /proc after the others
	// have changed their root: it gets a root directory of its own, and ends.
	err = onThreadThatEnds(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		done := make(chan error)
		go func() { done <- changeRoot(dir) }()
		if err := <-done; err != nil {
			return err
		}
		return Drop(kept...)
	})
	if err != nil {
		return -1, fmt.Errorf("confine: %w", err)
	}
	return fds, nil
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

// openFDs returns a detached mount of /proc/self/fd: nothing lies above it.
func openFDs(log *slog.Logger) (int, error) {
	const path = "/proc/self/fd"
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		return fd, nil
	}
	log.Warn("no detached /proc/self/fd: the server keeps a descriptor into /proc, which no request can reach", "error", err)
	if fd, err = unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("%s: %w: is /proc mounted?", path, err)
	}
	return fd, nil
}

func changeRoot(dir int) error {
	if err := unix.Fchdir(dir); err != nil {
		return fmt.Errorf("chdir to the export: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	unix.Close(dir)
	return os.Chdir("/")
}

// Drop leaves the process the capabilities keep, no supplementary groups and
// no way to get more. It changes all threads, those to come included.
func Drop(keep ...cap.Value) error {
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	for v := range cap.MaxBits() {
		if err := cap.DropBound(v); err != nil {
			return fmt.Errorf("drop %s from the bounding set: %w", v, err)
		}
	}
	if err := cap.SetGroups(0); err != nil { // which lowers all effective capabilities, too
		return fmt.Errorf("drop supplementary groups: %w", err)
	}
	set := cap.NewSet()
	for _, flag := range []cap.Flag{cap.Effective, cap.Permitted} {
		if err := set.SetFlag(flag, true, keep...); err != nil {
			return err
		}
	}
	if err := set.SetProc(); err != nil {
		return fmt.Errorf("keep no more than %s: %w", set, err)
	}
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

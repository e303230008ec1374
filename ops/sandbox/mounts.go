package sandbox

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start starts a server: cmd.Start, in new namespaces, with the supervisor's whole
// privileges. The server finds its export behind the files that cmd has
// already. dir is the exported directory.
//
// A thread of a process can't change namespaces for all others, so a server is
// made in its own. Mounts can't be copied out of another namespace by
// descriptor: the copy is made here, and is nowhere until the server puts it
// in its place.
func (c Config) Start(cmd *exec.Cmd, dir *os.File) error {
	return c.withCaps(func() error {
		export := dir
		if c.Sandbox == SandboxNamespace {
			tree, err := unix.OpenTree(int(dir.Fd()), "", unix.OPEN_TREE_CLONE|
				unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
			if err != nil {
				return needsNamespaces("copy the export's mounts", err)
			}
			export = os.NewFile(uintptr(tree), "export")
			defer export.Close()
			if cmd.SysProcAttr == nil {
				cmd.SysProcAttr = &syscall.SysProcAttr{}
			}
			cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNS | unix.CLONE_NEWNET |
				unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, export)
		err := cmd.Start()
		if err != nil && c.Sandbox == SandboxNamespace {
			err = needsNamespaces("start in namespaces of its own", err)
		}
		return err
	})
}

// pivotRoot makes the export's mounts, which Start has copied, the only ones.
//
// The server itself executes nothing, opens no device and trusts no setuid
// file: its copy of the mounts forbids all three, whatever the host's say. What
// the host mounts below the export later on appears here as well, as the
// mounts are slaves of the host's; unless they are to be read-only, which
// those would not be.
func (c Config) pivotRoot(export int) error {
	attr := &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_SLAVE,
	}
	if c.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
		attr.Propagation = unix.MS_PRIVATE
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"restrict the export's mounts", func() error {
			return unix.MountSetattr(export, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, attr)
		}},
		{"mount the export", func() error {
			return unix.MoveMount(export, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH)
		}},
		{"chdir to the export", func() error { return unix.Fchdir(export) }},
		// The old root comes to lie on the new one, and goes.
		{"pivot_root", func() error { return unix.PivotRoot(".", ".") }},
		{"unmount all but the export", func() error { return unix.Unmount(".", unix.MNT_DETACH) }},
		{"chdir", func() error { return unix.Chdir("/") }},
	} {
		if err := step.do(); err != nil {
			return needsNamespaces(step.what, err)
		}
	}
	return unix.Close(export)
}

func changeRoot(export int) error {
	if err := unix.Fchdir(export); err != nil {
		return fmt.Errorf("chdir to the export: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return errors.Join(unix.Chdir("/"), unix.Close(export))
}

// ownMounts gives this thread mounts of its own, with the process' own PID
// namespace at /proc.
func ownMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return needsNamespaces("unshare", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", "/proc", "proc", flags, ""); err != nil {
		return needsNamespaces("mount /proc", err)
	}
	return nil
}

// openFDs returns a detached mount of /proc/self/fd: nothing lies above it.
func openFDs(log *slog.Logger) (int, error) {
	const path = "/proc/self/fd"
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		return fd, nil
	}
	log.Warn("no detached /proc/self/fd: "+
		"the server keeps a descriptor into /proc, which no request can reach", "error", err)
	if fd, err = unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("%s: %w: is /proc mounted?", path, err)
	}
	return fd, nil
}

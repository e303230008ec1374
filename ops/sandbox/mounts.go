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
// already. dir is the exported directory, and m what MountsOf has just returned
// for it.
//
// A thread of a process can't change namespaces for all others, so a server is
// made in its own. Mounts can't be copied out of another namespace by
// descriptor: the copy is made here, and is nowhere until the server puts it
// in its place.
func (c Config) Start(cmd *exec.Cmd, dir *os.File, m *Mounts) error {
	if err := c.check(dir, m); err != nil {
		return err
	}
	return c.withCaps(func() error {
		export := dir
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		if c.Sandbox == SandboxNamespace {
			var err error
			if export, err = copyExport(dir, m); err != nil {
				return err
			}
			defer export.Close()
			cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNS | unix.CLONE_NEWNET |
				unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, export)
		if c.mapsIDs() {
			if err := c.intoUserNamespace(cmd); err != nil {
				return err
			}
		}
		err := cmd.Start()
		switch {
		case err != nil && c.mapsIDs():
			err = needsMaps(err)
		case err != nil && c.Sandbox == SandboxNamespace:
			err = needsNamespaces("start in namespaces of its own", err)
		}
		return err
	})
}

// copyExport returns a detached copy of a directory's mounts; a pipe, where that is
// gone and the server makes something else its root.
func copyExport(dir *os.File, m *Mounts) (*os.File, error) {
	if m.Gone {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		w.Close()
		return r, nil
	}
	const flags = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC |
		unix.AT_EMPTY_PATH | unix.AT_RECURSIVE
	tree, err := unix.OpenTree(int(dir.Fd()), "", flags)
	if err != nil {
		return nil, needsNamespaces("copy the export's mounts", err)
	}
	return os.NewFile(uintptr(tree), "export"), nil
}

// pivotRoot makes the export's mounts, which Start has copied, the only ones. What
// is mounted on the host later on never comes in: the copy is private.
//
// The server itself executes nothing, opens no device and trusts no setuid
// file: its copy of the mounts forbids all three, whatever the host's say.
func (c Config) pivotRoot(export int) error {
	var st unix.Stat_t
	if err := unix.Fstat(export, &st); err != nil {
		return err
	}
	cover := func() error { return coverMounts(export) }
	finish := func() error { return nil }
	if st.Mode&unix.S_IFMT == unix.S_IFIFO {
		b, err := mountBlanks()
		if err != nil {
			return needsNamespaces("mount a directory in place of the export", err)
		}
		unix.Close(export)
		if export, err = b.clone(blankGone); err != nil {
			return err
		}
		cover, finish = finish, b.removeGone
	}
	if err := unix.Fchdir(export); err != nil {
		return fmt.Errorf("chdir to the export: %w", err)
	}
	attr := &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE,
	}
	if c.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
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
		{"cover mounts below the export", cover},
		// The old root comes to lie on the new one, and goes.
		{"pivot_root", func() error { return unix.PivotRoot(".", ".") }},
		{"unmount all but the export", func() error { return unix.Unmount(".", unix.MNT_DETACH) }},
		{"chdir", func() error { return unix.Chdir("/") }},
		{"remove the directory in place of the export", finish},
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
func (c Config) ownMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return needsNamespaces("unshare", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", "/proc", "proc", flags, ""); err != nil {
		what := "mount /proc"
		if c.mapsIDs() {
			what += ", which map: takes where nothing hides a part of it " +
				"(systemd: without ProtectKernelTunables=)"
		}
		return needsNamespaces(what, err)
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

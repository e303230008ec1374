package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// coverRounds is how often mounts are looked for that are not covered. Guests may
// move directories on the way to one, and so win a round.
const coverRounds = 100

// coverMounts hides the mounts below the export that guests must not reach. export
// is the server's own copy, already mounted at "/" above the old root, that this
// thread still has.
func coverMounts(export int) error {
	id, err := mountID(export)
	if err != nil {
		return err
	}
	info, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer info.Close()
	var b *blanks
	var last error
	for range coverRounds {
		if _, err := info.Seek(0, io.SeekStart); err != nil {
			return err
		}
		m, err := readMounts(info, id, "/")
		if err != nil {
			return err
		}
		covered := m.Covered()
		if len(covered) == 0 {
			return nil
		}
		if b == nil {
			if b, err = mountBlanks(); err != nil {
				return err
			}
			defer unix.Close(b.root)
		}
		for _, i := range covered {
			if err := b.cover(export, i.Mountpoint); err != nil {
				last = fmt.Errorf("%s at %q: %w", i.FSType, i.Mountpoint, err)
			}
		}
	}
	return errors.Join(errors.New("guests move it all the time"), last)
}

// blanks is a file system with the files that are mounted in place of others. root
// is its root directory (O_PATH).
type blanks struct{ root int }

// The names in a blanks.
const (
	blankDir  = "dir"
	blankFile = "file"
	blankGone = "gone" // a directory that removeGone removes
)

// mountBlanks mounts it where it is lost with the old root. Nothing needs /proc by
// its name from here on.
func mountBlanks() (*blanks, error) {
	const at = "/proc"
	err := unix.Mount("none", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC,
		"mode=555,size=4k,nr_inodes=4")
	if err != nil {
		return nil, err
	}
	root, err := unix.Open(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	b := &blanks{root}
	return b, errors.Join(
		unix.Mkdirat(root, blankDir, 0o555),
		unix.Mkdirat(root, blankGone, 0o555),
		unix.Mknodat(root, blankFile, unix.S_IFREG|0o444, 0),
	)
}

// clone returns a detached, read-only mount of a name.
func (b *blanks) clone(name string) (int, error) {
	fd, err := unix.OpenTree(b.root, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, err
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV |
			unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE,
	})
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// cover mounts an empty directory, or file, on what is at a path. It goes from name
// to name, as the path may be longer than a system call takes, and follows no link:
// guests can put one there. The caller looks afterwards whether it was the right one.
func (b *blanks) cover(export int, path string) error {
	at := export
	defer func() {
		if at != export {
			unix.Close(at)
		}
	}()
	for name := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		next, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if at != export {
			unix.Close(at)
		}
		at = next
	}
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return err
	}
	name := blankFile
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		name = blankDir
	}
	fd, err := b.clone(name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.MoveMount(fd, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// removeGone removes the directory that a clone has for its root: all that is done
// there is answered ENOENT from then on.
func (b *blanks) removeGone() error {
	return errors.Join(unix.Unlinkat(b.root, blankGone, unix.AT_REMOVEDIR), unix.Close(b.root))
}

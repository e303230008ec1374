// Package guestsuite asks of a file system, by ordinary system calls, what POSIX and Linux promise.
//
// It is meant for a guest whose file system is served by the helper, and is a test of the helper
// because each of the protocol's requests stands behind one of those calls. It runs just as well on
// a file system of the host, which shows that the tests themselves are right:
//
//	go test ./scripts/guestsuite                  on a temporary directory
//	go test ./scripts/guestsuite -dir /some/dir   there; /some/dir must not exist yet
//
// and in a guest, from the root of the clone, as guest_test.go does it:
//
//	CGO_ENABLED=0 go test -c -o suite ./scripts/guestsuite
//	scripts/guest --put suite suite -dir /mnt/suite
package guestsuite

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Manifest describes every file at and below dir, one line each. Made in the guest and again on the
// host, it must come out the same: what the guest believes it did is what has happened.
//
// Access times are left out because reading changes them, directories' sizes because they are the
// file system's own affair, and inode numbers because the guest has its own: a file shows by the
// first of its names.
func Manifest(dir string) (string, error) {
	var lines strings.Builder
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("lstat %q: %w", path, err)
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if first[st.Ino] == "" {
			first[st.Ino] = name
		}
		fmt.Fprintf(&lines, "%q file=%q mode=%o owner=%d:%d links=%d rdev=%#x",
			name, first[st.Ino], st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev)
		fmt.Fprintf(&lines, " mtime=%d.%09d ctime=%d.%09d",
			st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			fmt.Fprintf(&lines, " size=%d", st.Size)
			fallthrough
		case unix.S_IFDIR:
			attrs, err := xattrs(path)
			if err != nil {
				return fmt.Errorf("extended attributes of %q: %w", path, err)
			}
			fmt.Fprintf(&lines, " xattrs=%q", attrs)
		case unix.S_IFLNK:
			target := make([]byte, unix.PathMax)
			n, err := unix.Readlink(path, target)
			if err != nil {
				return fmt.Errorf("readlink %q: %w", path, err)
			}
			fmt.Fprintf(&lines, " target=%q", target[:n])
		}
		lines.WriteByte('\n')
		return nil
	})
	return lines.String(), err
}

// xattrs returns the user attributes of path as sorted name=value pairs.
func xattrs(path string) ([]string, error) {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		return nil, err
	}
	var attrs []string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if !strings.HasPrefix(name, "user.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, err
		}
		attrs = append(attrs, name+"="+string(value[:n]))
	}
	slices.Sort(attrs)
	return attrs, nil
}

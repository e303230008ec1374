// Cases about names: making, linking, renaming and removing files of every kind.

package guestsuite

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	longest   = strings.Repeat("n", unix.NAME_MAX)   // a name as long as a name may be
	tooLong   = strings.Repeat("n", unix.NAME_MAX+1) // one byte more
	reg       = uint32(unix.S_IFREG)
	directory = uint32(unix.S_IFDIR)
	symbolic  = uint32(unix.S_IFLNK | 0o777)
	fifo      = uint32(unix.S_IFIFO)
	char      = uint32(unix.S_IFCHR)
	block     = uint32(unix.S_IFBLK)
	socket    = uint32(unix.S_IFSOCK)
)

func TestMkdir(t *testing.T) {
	run(t, []testCase{
		{"as root", []step{
			{root, mkdir("d", 0o750), ok},
			{root, is("d", directory|0o750, 0, 0), ok},
		}},
		{"as a user", []step{
			{user, mkdir("d", 0o700), ok},
			{user, is("d", directory|0o700, 1000, 1000), ok},
			{other, mkdir("d/e", 0o755), unix.EACCES},
			{other, lstat("d/e"), unix.EACCES},
			{user, lstat("d/e"), unix.ENOENT},
		}},
		{"umask", []step{
			{user, umask(0o027), ok},
			{user, mkdir("d", 0o777), ok},
			{user, is("d", directory|0o750, 1000, 1000), ok},
		}},
		{"sticky bit is kept", []step{
			{user, mkdir("d", 0o1777), ok},
			{user, is("d", directory|0o1777, 1000, 1000), ok},
		}},
		{"setgid is inherited, with the group", []step{
			{root, mkdir("d", 0o777), ok},
			{root, chown("d", 0, 2000), ok},
			{root, chmod("d", 0o2777), ok},
			{user, mkdir("d/e", 0o755), ok},
			{user, is("d/e", directory|0o2755, 1000, 2000), ok},
		}},
		{"where something is", []step{
			{root, create("f", 0o644), ok},
			{root, symlink("nowhere", "dangling"), ok},
			{root, mkdir("f", 0o755), unix.EEXIST},
			{root, mkdir("dangling", 0o755), unix.EEXIST},
			{root, mkdir(".", 0o755), unix.EEXIST},
			{root, mkdir("f/d", 0o755), unix.ENOTDIR},
			{root, mkdir("missing/d", 0o755), unix.ENOENT},
			{root, mkdir("", 0o755), unix.ENOENT},
		}},
		{"long names", []step{
			{root, mkdir(longest, 0o755), ok},
			{root, mkdir(longest+"/"+longest, 0o755), ok},
			{root, is(longest+"/"+longest, directory|0o755, 0, 0), ok},
			{root, mkdir(tooLong, 0o755), unix.ENAMETOOLONG},
			{root, mkdir(longest+"/"+tooLong, 0o755), unix.ENAMETOOLONG},
		}},
		{"names of any bytes", []step{
			{root, mkdir(" \t\n\x01\\\"'*", 0o755), ok},
			{root, mkdir("\xff\xfe\x80", 0o755), ok}, // no UTF-8
			{root, mkdir("\xff\xfe\x80/-", 0o755), ok},
			{root, is(" \t\n\x01\\\"'*", directory|0o755, 0, 0), ok},
			{root, is("\xff\xfe\x80/-", directory|0o755, 0, 0), ok},
		}},
	})
}

func TestRmdir(t *testing.T) {
	run(t, []testCase{
		{"empty", []step{
			{root, mkdir("d", 0o755), ok},
			{root, rmdir("d"), ok},
			{root, lstat("d"), unix.ENOENT},
		}},
		{"not empty", []step{
			{root, mkdir("d", 0o755), ok},
			{root, symlink("nowhere", "d/l"), ok},
			{root, rmdir("d"), unix.ENOTEMPTY},
			{root, unlink("d/l"), ok},
			{root, rmdir("d"), ok},
		}},
		{"no directory", []step{
			{root, create("f", 0o644), ok},
			{root, mkdir("d", 0o755), ok},
			{root, symlink("d", "l"), ok},
			{root, rmdir("f"), unix.ENOTDIR},
			{root, rmdir("l"), unix.ENOTDIR},
			{root, rmdir("missing"), unix.ENOENT},
			{root, rmdir("f/d"), unix.ENOTDIR},
			{root, rmdir("d/."), unix.EINVAL},
			{root, rmdir("d/.."), unix.ENOTEMPTY},
			{root, rmdir(tooLong), unix.ENAMETOOLONG},
		}},
		{"of somebody else", []step{
			{user, mkdir("d", 0o755), ok},
			{user, mkdir("d/e", 0o777), ok},
			{other, rmdir("d/e"), unix.EACCES},
			{user, mkdir("sticky", 0o1777), ok},
			{user, mkdir("sticky/e", 0o777), ok},
			{other, rmdir("sticky/e"), unix.EPERM},
			{user, rmdir("sticky/e"), ok},
		}},
		{"of the working directory", []step{
			{root, mkdir("d", 0o755), ok},
			{root, chdir("d"), ok},
			{root, rmdir("../d"), ok},
			{root, create("f", 0o644), unix.ENOENT},
		}},
	})
}

func TestUnlink(t *testing.T) {
	run(t, []testCase{
		{"every kind", []step{
			{root, create("f", 0o644), ok},
			{root, symlink("f", "l"), ok},
			{root, mkfifo("p", 0o644), ok},
			{root, mknod("c", char|0o644, unix.Mkdev(1, 3)), ok},
			{root, mknod("s", socket|0o644, 0), ok},
			{root, unlink("l"), ok},
			{root, lstat("f"), ok}, // only the link is gone
			{root, unlink("f"), ok},
			{root, unlink("p"), ok},
			{root, unlink("c"), ok},
			{root, unlink("s"), ok},
			{root, lstat("f"), unix.ENOENT},
			{root, lstat("l"), unix.ENOENT},
			{root, lstat("p"), unix.ENOENT},
			{root, lstat("c"), unix.ENOENT},
			{root, lstat("s"), unix.ENOENT},
		}},
		{"what cannot be", []step{
			{root, mkdir("d", 0o755), ok},
			{root, create("f", 0o644), ok},
			{root, unlink("d"), unix.EISDIR},
			{root, unlink("missing"), unix.ENOENT},
			{root, unlink("f/x"), unix.ENOTDIR},
			{root, unlink(""), unix.ENOENT},
			{root, unlink(tooLong), unix.ENAMETOOLONG},
		}},
		{"of somebody else", []step{
			{user, mkdir("d", 0o755), ok},
			{user, create("d/f", 0o666), ok},
			{other, unlink("d/f"), unix.EACCES},
			{user, chmod("d", 0o777), ok},
			{other, unlink("d/f"), ok}, // the directory's permission counts, not the file's
		}},
		{"in a sticky directory", []step{
			{user, mkdir("d", 0o1777), ok},
			{other, create("d/others", 0o666), ok},
			{member, create("d/f", 0o666), ok},
			{other, unlink("d/f"), unix.EPERM},
			{user, unlink("d/others"), ok}, // the directory is the user's
			{root, unlink("d/f"), ok},
		}},
		{"open file lives on", []step{
			{root, use("f", unix.O_CREAT|unix.O_RDWR, 0o644, func(fd int) error {
				if err := unix.Unlink("f"); err != nil {
					return err
				}
				if err := writeAll(fd, "still here"); err != nil {
					return err
				}
				buf := make([]byte, 20)
				n, err := unix.Pread(fd, buf, 0)
				if err != nil {
					return err
				}
				return same(string(buf[:n]), "still here")
			}), ok},
			{root, lstat("f"), unix.ENOENT},
		}},
		{"open file can be asked about", []step{
			{root, use("f", unix.O_CREAT|unix.O_RDWR, 0o644, func(fd int) error {
				if err := unix.Unlink("f"); err != nil {
					return err
				}
				var st unix.Stat_t
				if err := unix.Fstat(fd, &st); err != nil {
					return err
				}
				return same(st.Nlink, 0)
			}), ok},
		}},
		{"open file can be truncated", []step{
			{root, use("f", unix.O_CREAT|unix.O_RDWR, 0o644, func(fd int) error {
				if err := unix.Unlink("f"); err != nil {
					return err
				}
				return unix.Ftruncate(fd, 10)
			}), ok},
		}},
		{"another file gets the name of an open one", []step{
			{root, use("f", unix.O_CREAT|unix.O_RDWR, 0o644, func(old int) error {
				if err := unix.Unlink("f"); err != nil {
					return err
				}
				new, err := unix.Open("f", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
				if err != nil {
					return err
				}
				defer unix.Close(new)
				if err := writeAll(old, "old file"); err != nil {
					return err
				}
				return writeAll(new, "new file")
			}), ok},
			{root, contains("f", "new file"), ok},
		}},
	})
}

func TestLink(t *testing.T) {
	run(t, []testCase{
		{"counts", []step{
			{root, create("a", 0o644), ok},
			{root, links("a", 1), ok},
			{root, link("a", "b"), ok},
			{root, mkdir("d", 0o755), ok},
			{root, link("b", "d/c"), ok},
			{root, links("a", 3), ok},
			{root, links("d/c", 3), ok},
			{root, sameFile("a", "d/c"), ok},
			{root, unlink("a"), ok},
			{root, links("b", 2), ok},
			{root, unlink("b"), ok},
			{root, links("d/c", 1), ok},
		}},
		{"one file under two names", []step{
			{root, create("a", 0o644), ok},
			{root, link("a", "b"), ok},
			{root, write("a", 0, "by a"), ok},
			{root, contains("b", "by a"), ok},
			{root, chmod("b", 0o600), ok},
			{root, chown("b", 1000, 2000), ok},
			{root, is("a", reg|0o600, 1000, 2000), ok},
		}},
		{"of other kinds", []step{
			{root, mkfifo("p", 0o644), ok},
			{root, link("p", "p2"), ok},
			{root, links("p", 2), ok},
			{root, symlink("nowhere", "l"), ok},
			{root, link("l", "l2"), ok}, // the link itself, not where it points
			{root, sameFile("l", "l2"), ok},
			{root, pointsTo("l2", "nowhere"), ok},
			{root, mknod("c", char|0o600, unix.Mkdev(1, 3)), ok},
			{root, link("c", "c2"), ok},
			{root, device("c2", unix.Mkdev(1, 3)), ok},
		}},
		{"what cannot be", []step{
			{root, create("f", 0o644), ok},
			{root, create("g", 0o644), ok},
			{root, mkdir("d", 0o755), ok},
			{root, link("f", "g"), unix.EEXIST},
			{root, link("f", "d"), unix.EEXIST},
			{root, link("d", "d2"), unix.EPERM},
			{root, link("missing", "m2"), unix.ENOENT},
			{root, link("f", "missing/f"), unix.ENOENT},
			{root, link("f", "g/f"), unix.ENOTDIR},
			{root, link("f", tooLong), unix.ENAMETOOLONG},
			{root, link("f", longest), ok},
			{user, create("mine", 0o644), ok}, // of others it depends on fs.protected_hardlinks
			{user, link("mine", "d/f"), unix.EACCES},
		}},
	})
}

func TestSymlink(t *testing.T) {
	targets := []step{}
	for name, target := range map[string]string{
		"relative": "../a/./b//c/", "absolute": "/etc/passwd", "bytes": "\xff \n\x01", "itself": "itself",
		"longest": strings.Repeat("/longest", 511) + "/target", // 4095 bytes
	} {
		targets = append(targets,
			step{root, symlink(target, name), ok},
			step{root, pointsTo(name, target), ok},
			step{root, size(name, int64(len(target))), ok})
	}
	run(t, []testCase{
		{"targets are kept as they are", targets},
		{"owner", []step{
			{user, symlink("f", "l"), ok},
			{user, is("l", symbolic, 1000, 1000), ok},
			{root, symlink("f", "l2"), ok},
			{root, is("l2", symbolic, 0, 0), ok},
		}},
		{"setgid directory gives its group", []step{
			{root, mkdir("d", 0o777), ok},
			{root, chown("d", 0, 2000), ok},
			{root, chmod("d", 0o2777), ok},
			{user, symlink("f", "d/l"), ok},
			{user, is("d/l", symbolic, 1000, 2000), ok},
		}},
		{"is followed", []step{
			{root, mkdir("d", 0o755), ok},
			{root, symlink("d", "to-d"), ok},
			{root, symlink("to-d/f", "to-f"), ok},
			{root, write("to-f", unix.O_CREAT, "through two links"), ok},
			{root, contains("d/f", "through two links"), ok},
			{root, contains("to-d/f", "through two links"), ok},
		}},
		{"dangling", []step{
			{root, symlink("nowhere", "l"), ok},
			{root, open("l", unix.O_RDONLY, 0), unix.ENOENT},
			{root, create("l", 0o644), unix.EEXIST},
			{root, open("l", unix.O_CREAT|unix.O_WRONLY, 0o644), ok},
			{root, is("nowhere", reg|0o644, 0, 0), ok},
		}},
		{"loop", []step{
			{root, symlink("b", "a"), ok},
			{root, symlink("a", "b"), ok},
			{root, open("a", unix.O_RDONLY, 0), unix.ELOOP},
			{root, chmod("a", 0o644), unix.ELOOP},
			{root, truncate("a/x", 0), unix.ELOOP},
		}},
		{"what cannot be", []step{
			{root, create("f", 0o644), ok},
			{root, symlink("x", "f"), unix.EEXIST},
			{root, symlink("", "l"), unix.ENOENT},
			{root, symlink("x", "f/l"), unix.ENOTDIR},
			{root, symlink("x", "missing/l"), unix.ENOENT},
			{root, symlink("x", tooLong), unix.ENAMETOOLONG},
			{root, symlink("x", longest), ok},
			{root, symlink(strings.Repeat("x", unix.PathMax), "l"), unix.ENAMETOOLONG},
			{root, pointsTo("f", ""), unix.EINVAL},
			{root, pointsTo("missing", ""), unix.ENOENT},
			{root, mkdir("d", 0o755), ok},
			{user, symlink("x", "d/l"), unix.EACCES},
		}},
		{"readlink cuts what does not fit", []step{
			{root, symlink("0123456789", "l"), ok},
			{root, check("readlink into 4 bytes", func() error {
				buf := make([]byte, 4)
				n, err := unix.Readlink("l", buf)
				if err != nil {
					return err
				}
				return same(string(buf[:n]), "0123")
			}), ok},
		}},
	})
}

func TestMknod(t *testing.T) {
	big := unix.Mkdev(0xabc, 0x54321) // more than 8 bits of either number
	run(t, []testCase{
		{"FIFO and socket", []step{
			{user, mkfifo("p", 0o640), ok},
			{user, is("p", fifo|0o640, 1000, 1000), ok},
			{user, mknod("s", socket|0o600, 0), ok},
			{user, is("s", socket|0o600, 1000, 1000), ok},
			{root, mkfifo("p2", 0o644), ok},
			{root, is("p2", fifo|0o644, 0, 0), ok},
			{user, mkfifo("p", 0o644), unix.EEXIST},
			{user, mkfifo("missing/p", 0o644), unix.ENOENT},
			{user, mkfifo(tooLong, 0o644), unix.ENAMETOOLONG},
			{user, mkfifo(longest, 0o644), ok},
		}},
		{"regular file", []step{
			{user, mknod("f", reg|0o604, 0), ok},
			{user, is("f", reg|0o604, 1000, 1000), ok},
		}},
		{"device", []step{
			{root, mknod("c", char|0o666, unix.Mkdev(1, 3)), ok},
			{root, is("c", char|0o666, 0, 0), ok},
			{root, device("c", unix.Mkdev(1, 3)), ok},
			{root, mknod("b", block|0o660, big), ok},
			{root, is("b", block|0o660, 0, 0), ok},
			{root, device("b", big), ok},
			{user, mknod("c2", char|0o666, unix.Mkdev(1, 3)), unix.EPERM},
			{user, mknod("b2", block|0o666, big), unix.EPERM},
		}},
		// Needs a directory on a file system mounted without nodev, in the guest and natively.
		{"device works", []step{
			{root, mknod("zero", char|0o666, unix.Mkdev(1, 5)), ok},
			{user, use("zero", unix.O_RDWR, 0, func(fd int) error {
				buf := []byte("xxx")
				if _, err := unix.Read(fd, buf); err != nil {
					return err
				}
				return same(string(buf), "\x00\x00\x00")
			}), ok},
			{root, mknod("none", block|0o666, unix.Mkdev(0xabc, 0)), ok},
			{root, open("none", unix.O_RDONLY, 0), unix.ENXIO},
		}},
		{"umask and setgid directory", []step{
			{root, mkdir("d", 0o777), ok},
			{root, chown("d", 0, 2000), ok},
			{root, chmod("d", 0o2777), ok},
			{user, umask(0o022), ok},
			{user, mkfifo("d/p", 0o666), ok},
			{user, is("d/p", fifo|0o644, 1000, 2000), ok},
		}},
	})
}

func TestRename(t *testing.T) {
	run(t, []testCase{
		{"file", []step{
			{root, write("a", unix.O_CREAT, "a"), ok},
			{root, rename("a", "b"), ok},
			{root, lstat("a"), unix.ENOENT},
			{root, contains("b", "a"), ok},
			{root, mkdir("d", 0o755), ok},
			{root, rename("b", "d/"+longest), ok},
			{root, contains("d/"+longest, "a"), ok},
			{root, rename("d/"+longest, "d/"+tooLong), unix.ENAMETOOLONG},
			{root, rename("missing", "x"), unix.ENOENT},
			{root, rename("d/"+longest, "missing/x"), unix.ENOENT},
		}},
		{"every kind", []step{
			{root, mkfifo("p", 0o644), ok},
			{root, rename("p", "p2"), ok},
			{root, is("p2", fifo|0o644, 0, 0), ok},
			{root, symlink("nowhere", "l"), ok},
			{root, rename("l", "l2"), ok},
			{root, pointsTo("l2", "nowhere"), ok},
			{root, mknod("c", char|0o644, unix.Mkdev(1, 3)), ok},
			{root, rename("c", "c2"), ok},
			{root, device("c2", unix.Mkdev(1, 3)), ok},
		}},
		{"over a file", []step{
			{root, write("a", unix.O_CREAT, "a"), ok},
			{root, write("b", unix.O_CREAT, "b"), ok},
			{root, link("b", "b2"), ok},
			{root, rename("a", "b"), ok},
			{root, contains("b", "a"), ok},
			{root, contains("b2", "b"), ok},
			{root, links("b2", 1), ok},
		}},
		{"over a link, not where it points", []step{
			{root, write("a", unix.O_CREAT, "a"), ok},
			{root, write("b", unix.O_CREAT, "b"), ok},
			{root, symlink("b", "l"), ok},
			{root, rename("a", "l"), ok},
			{root, is("l", reg|0o644, 0, 0), ok},
			{root, contains("b", "b"), ok},
		}},
		{"over an open file", []step{
			{root, write("new", unix.O_CREAT, "new"), ok},
			{root, write("old", unix.O_CREAT, "old"), ok},
			{root, use("old", unix.O_RDONLY, 0, func(fd int) error {
				if err := unix.Rename("new", "old"); err != nil {
					return err
				}
				got, err := readAll(fd)
				if err != nil {
					return err
				}
				return same(got, "old")
			}), ok},
			{root, contains("old", "new"), ok},
		}},
		{"directories", []step{
			{root, mkdir("a", 0o755), ok},
			{root, write("a/f", unix.O_CREAT, "f"), ok},
			{root, rename("a", "b"), ok},
			{root, contains("b/f", "f"), ok},
			{root, mkdir("empty", 0o755), ok},
			{root, rename("b", "empty"), ok}, // over an empty one
			{root, contains("empty/f", "f"), ok},
			{root, mkdir("c", 0o755), ok},
			{root, rename("c", "empty"), unix.ENOTEMPTY},
			{root, rename("empty", "empty/f/x"), unix.ENOTDIR},
			{root, rename("empty", "empty/inside"), unix.EINVAL},
			{root, mkdir("empty/d", 0o755), ok},
			{root, rename("empty/d", "empty"), unix.ENOTEMPTY},
			{root, rename(".", "x"), unix.EBUSY},
		}},
		{"a file is no directory", []step{
			{root, create("f", 0o644), ok},
			{root, mkdir("d", 0o755), ok},
			{root, rename("f", "d"), unix.EISDIR},
			{root, rename("d", "f"), unix.ENOTDIR},
			{root, rename("f", "g/"), unix.ENOTDIR},
		}},
		{"onto itself or a link to it", []step{
			{root, create("a", 0o644), ok},
			{root, link("a", "b"), ok},
			{root, rename("a", "a"), ok},
			{root, rename("a", "b"), ok}, // does nothing, says POSIX
			{root, links("a", 2), ok},
			{root, links("b", 2), ok},
		}},
		{"of what is open and in use", []step{
			{root, mkdir("d", 0o755), ok},
			{root, use("d/f", unix.O_CREAT|unix.O_RDWR, 0o644, func(fd int) error {
				if err := unix.Rename("d", "e"); err != nil {
					return err
				}
				if err := writeAll(fd, "moved"); err != nil {
					return err
				}
				if err := unix.Fchmod(fd, 0o600); err != nil { // by the path that the file has now
					return err
				}
				var st unix.Stat_t
				return unix.Fstat(fd, &st)
			}), ok},
			{root, contains("e/f", "moved"), ok},
			{root, is("e/f", reg|0o600, 0, 0), ok},
			{root, chdir("e"), ok},
			{root, rename("../e", "../g"), ok},
			{root, contains("f", "moved"), ok},
		}},
		{"of somebody else", []step{
			{user, mkdir("d", 0o755), ok},
			{user, create("d/f", 0o666), ok},
			{other, rename("d/f", "f"), unix.EACCES},
			{other, create("g", 0o666), ok},
			{other, rename("g", "d/g"), unix.EACCES},
			{user, chmod("d", 0o1777), ok},
			{other, rename("d/f", "f"), unix.EPERM},
			{other, rename("g", "d/f"), unix.EPERM},
			{other, rename("g", "d/g"), ok},
		}},
		// The Linux client of 9p2000.L knows no flags: its protocol's rename has none.
		{"without replacing", []step{
			{root, write("a", unix.O_CREAT, "a"), ok},
			{root, write("b", unix.O_CREAT, "b"), ok},
			{root, renameat2("a", "b", unix.RENAME_NOREPLACE), unix.EEXIST},
			{root, renameat2("a", "b", unix.RENAME_EXCHANGE), ok},
			{root, contains("a", "b"), ok},
		}},
	})
}

// Root creates for another group: its own is another, as after newgrp, or the directory is setgid.
// This stands last, for it is the end of QEMU's own helper, the one in C: that drops its capabilities
// for good and aborts at the next create.
func TestRootOfAnotherGroup(t *testing.T) {
	run(t, []testCase{
		{"makes every kind", []step{
			{newgrp, create("f", 0o640), ok},
			{newgrp, is("f", reg|0o640, 0, 1000), ok},
			{newgrp, mkdir("d", 0o755), ok},
			{newgrp, is("d", directory|0o755, 0, 1000), ok},
			{newgrp, symlink("f", "l"), ok},
			{newgrp, is("l", symbolic, 0, 1000), ok},
			{newgrp, mkfifo("p", 0o777), ok},
			{newgrp, is("p", fifo|0o777, 0, 1000), ok},
			{root, create("f2", 0o666), ok}, // and is itself again after that
			{root, is("f2", reg|0o666, 0, 0), ok},
			{user, mkdir("d2", 0o777), ok},
			{user, is("d2", directory|0o777, 1000, 1000), ok},
		}},
		{"by a setgid directory", []step{
			{root, mkdir("d", 0o777), ok},
			{root, chown("d", 0, 2000), ok},
			{root, chmod("d", 0o2777), ok},
			{root, create("d/f", 0o644), ok},
			{root, is("d/f", reg|0o644, 0, 2000), ok},
			{root, mkdir("d/d", 0o755), ok},
			{root, is("d/d", directory|0o2755, 0, 2000), ok},
		}},
		{"is still root", []step{
			{user, mkdir("d", 0o700), ok},
			{newgrp, create("d/f", 0o600), ok},
			{newgrp, chmod("d", 0o755), ok},
			{newgrp, chown("d/f", 1000, 2000), ok},
			{newgrp, unlink("d/f"), ok},
		}},
		{"makes devices", []step{
			{newgrp, mknod("c", char|0o666, unix.Mkdev(1, 3)), ok},
			{newgrp, is("c", char|0o666, 0, 1000), ok},
		}},
	})
}

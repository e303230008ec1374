// Cases about what an inode says: permissions, owners, times, extended attributes; and statfs.
//
// The inode's generation, for which QEMU asks with every look at a file, stays between QEMU and the
// guest's kernel: 9p has neither FS_IOC_GETVERSION nor file handles for programs.

package guestsuite

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestChmod(t *testing.T) {
	var every []step
	for _, mode := range []uint32{0, 0o111, 0o644, 0o777, 0o1777, 0o2755, 0o4755, 0o7777} {
		every = append(every,
			step{user, chmod("f", mode), ok}, step{user, is("f", reg|mode, 1000, 1000), ok},
			step{user, chmod("d", mode), ok}, step{user, is("d", directory|mode, 1000, 1000), ok},
			step{user, chmod("p", mode), ok}, step{user, is("p", fifo|mode, 1000, 1000), ok})
	}
	run(t, []testCase{
		{"every bit", append([]step{
			{user, create("f", 0o644), ok},
			{user, mkdir("d", 0o755), ok},
			{user, mkfifo("p", 0o644), ok},
		}, every...)},
		{"of a device and a socket", []step{
			{root, mknod("c", char|0o600, unix.Mkdev(1, 3)), ok},
			{root, chmod("c", 0o666), ok},
			{root, is("c", char|0o666, 0, 0), ok},
			{root, mknod("s", socket|0o600, 0), ok},
			{root, chmod("s", 0o777), ok},
			{root, is("s", socket|0o777, 0, 0), ok},
		}},
		{"follows links", []step{
			{root, create("f", 0o644), ok},
			{root, symlink("f", "l"), ok},
			{root, chmod("l", 0o600), ok},
			{root, is("f", reg|0o600, 0, 0), ok},
			{root, is("l", symbolic, 0, 0), ok},
			{root, symlink("nowhere", "dangling"), ok},
			{root, chmod("dangling", 0o600), unix.ENOENT},
		}},
		{"by descriptor", []step{
			{user, use("f", unix.O_CREAT|unix.O_RDONLY, 0, func(fd int) error { return unix.Fchmod(fd, 0o751) }), ok},
			{user, is("f", reg|0o751, 1000, 1000), ok},
		}},
		{"who may", []step{
			{user, create("f", 0o666), ok},
			{other, chmod("f", 0o777), unix.EPERM},
			{root, chmod("f", 0o600), ok},
			{root, is("f", reg|0o600, 1000, 1000), ok},
			{root, chmod("missing", 0), unix.ENOENT},
			{root, chmod("f/x", 0), unix.ENOTDIR},
			{root, chmod(tooLong, 0), unix.ENAMETOOLONG},
		}},
		{"setgid only for a member of the group", []step{
			{root, create("f", 0o644), ok},
			{root, chown("f", 1000, 2000), ok},
			{user, chmod("f", 0o2755), ok},
			{user, is("f", reg|0o755, 1000, 2000), ok},
			{member, chmod("f", 0o2755), ok},
			{member, is("f", reg|0o2755, 1000, 2000), ok},
		}},
		{"permissions are checked", []step{
			{user, write("f", unix.O_CREAT, "secret"), ok},
			{user, chmod("f", 0o440), ok},
			{user, open("f", unix.O_RDONLY, 0), ok},
			{user, open("f", unix.O_WRONLY, 0), unix.EACCES},
			{user, truncate("f", 0), unix.EACCES},
			{user, access("f", unix.W_OK), unix.EACCES},
			{user, access("f", unix.X_OK), unix.EACCES},
			{other, open("f", unix.O_RDONLY, 0), unix.EACCES},
			{root, open("f", unix.O_RDWR, 0), ok},
			{user, chmod("f", 0), ok},
			{user, open("f", unix.O_RDONLY, 0), unix.EACCES},
			{root, contains("f", "secret"), ok},
			{user, mkdir("d", 0o300), ok},
			{user, open("d", unix.O_RDONLY|unix.O_DIRECTORY, 0), unix.EACCES},
			{user, create("d/f", 0o644), ok},
			{user, chmod("d", 0o600), ok},
			{user, lstat("d/f"), unix.EACCES},
			{root, lstat("d/f"), ok},
		}},
	})
}

func TestChown(t *testing.T) {
	run(t, []testCase{
		{"by root", []step{
			{root, create("f", 0o644), ok},
			{root, chown("f", 1234, 5678), ok},
			{root, is("f", reg|0o644, 1234, 5678), ok},
			{root, chown("f", -1, 1), ok},
			{root, is("f", reg|0o644, 1234, 1), ok},
			{root, chown("f", 2, -1), ok},
			{root, is("f", reg|0o644, 2, 1), ok},
			{root, chown("f", -1, -1), ok},
			{root, is("f", reg|0o644, 2, 1), ok},
			{root, chown("f", 0xfffffffe, 0x80000000), ok},
			{root, is("f", reg|0o644, 0xfffffffe, 0x80000000), ok},
		}},
		{"of every kind", []step{
			{root, mkdir("d", 0o755), ok},
			{root, chown("d", 1000, 1000), ok},
			{root, is("d", directory|0o755, 1000, 1000), ok},
			{root, mkfifo("p", 0o644), ok},
			{root, chown("p", 1000, 1000), ok},
			{root, is("p", fifo|0o644, 1000, 1000), ok},
			{root, mknod("c", char|0o644, unix.Mkdev(1, 3)), ok},
			{root, chown("c", 1000, 1000), ok},
			{root, is("c", char|0o644, 1000, 1000), ok},
		}},
		{"links", []step{
			{root, create("f", 0o644), ok},
			{root, symlink("f", "l"), ok},
			{root, lchown("l", 1000, 2000), ok},
			{root, is("l", symbolic, 1000, 2000), ok},
			{root, is("f", reg|0o644, 0, 0), ok},
			{root, chown("l", 1001, 1001), ok},
			{root, is("l", symbolic, 1000, 2000), ok},
			{root, is("f", reg|0o644, 1001, 1001), ok},
			{root, symlink("nowhere", "dangling"), ok},
			{root, chown("dangling", 1, 1), unix.ENOENT},
			{root, lchown("dangling", 1, 1), ok},
			{root, is("dangling", symbolic, 1, 1), ok},
		}},
		{"who may", []step{
			{member, create("f", 0o644), ok},
			{member, chown("f", 1001, -1), unix.EPERM},
			{member, chown("f", -1, 3000), unix.EPERM},
			{other, chown("f", 1001, 1001), unix.EPERM},
			{member, chown("f", -1, 2000), ok},
			{member, is("f", reg|0o644, 1000, 2000), ok},
			{member, chown("f", 1000, 1000), ok},
			{user, chown("f", -1, 2000), unix.EPERM},
			{root, chown("missing", 0, 0), unix.ENOENT},
			{root, chown("f/x", 0, 0), unix.ENOTDIR},
			{root, chown(tooLong, 0, 0), unix.ENAMETOOLONG},
		}},
		{"takes setuid and setgid away", []step{
			{member, create("f", 0o644), ok},
			{member, chmod("f", 0o6755), ok},
			{member, chown("f", -1, 2000), ok},
			{member, is("f", reg|0o755, 1000, 2000), ok},
			{root, chmod("f", 0o6755), ok},
			{root, chown("f", 0, 0), ok},
			{root, is("f", reg|0o755, 0, 0), ok},
			{root, mkdir("d", 0o755), ok},
			{root, chmod("d", 0o2755), ok},
			{root, chown("d", 1000, 1000), ok}, // not from a directory
			{root, is("d", directory|0o2755, 1000, 1000), ok},
		}},
	})
}

// utimens sets times of name itself by descriptor of its directory, the general form of them all.
func utimens(name string, atime, mtime unix.Timespec) op {
	return call(func() error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{atime, mtime}, unix.AT_SYMLINK_NOFOLLOW)
	}, "utimensat", name, atime, mtime)
}

func times(name string, atime, mtime unix.Timespec) op {
	return stats(name, func(st *unix.Stat_t) error {
		return same([2]unix.Timespec{st.Atim, st.Mtim}, [2]unix.Timespec{atime, mtime})
	}, fmt.Sprintf("has times %v", [2]unix.Timespec{atime, mtime}))
}

// updates checks that do brings one of the times of name to now, and that by more than it was.
func updates(name string, which func(*unix.Stat_t) unix.Timespec, do op) op {
	return check(do.name+" updates a time of "+name, func() error {
		var before, after unix.Stat_t
		if err := unix.Lstat(name, &before); err != nil {
			return err
		}
		time.Sleep(30 * time.Millisecond) // longer than the kernel's clock tick
		if err := do.do(); err != nil {
			return err
		}
		if err := unix.Lstat(name, &after); err != nil {
			return err
		}
		was, is := which(&before), which(&after)
		if is.Nano() <= was.Nano() {
			return fmt.Errorf("was %v, is %v", was, is)
		}
		return nil
	})
}

func mtime(st *unix.Stat_t) unix.Timespec { return st.Mtim }
func ctime(st *unix.Stat_t) unix.Timespec { return st.Ctim }

func TestTimes(t *testing.T) {
	var (
		t1    = unix.Timespec{Sec: 1_000_000_000}
		t2    = unix.Timespec{Sec: 2_000_000_000}
		t3    = unix.Timespec{Sec: 1_500_000_000}
		old   = unix.Timespec{Sec: -1_000_000}
		nanos = unix.Timespec{Sec: 1_000_000_000, Nsec: 123_456_789}
		far   = unix.Timespec{Sec: 5_000_000_000} // beyond 32 bits
		now   = unix.Timespec{Nsec: unix.UTIME_NOW}
		omit  = unix.Timespec{Nsec: unix.UTIME_OMIT}
	)
	// recent checks that a time is of this minute. The guest's clock and the host's, which gives the
	// time, are both the host's hardware clock.
	recent := func(name string, which func(*unix.Stat_t) unix.Timespec) op {
		return stats(name, func(st *unix.Stat_t) error {
			at := which(st)
			if age := time.Since(time.Unix(at.Unix())); age.Abs() > time.Minute {
				return fmt.Errorf("%v ago", age)
			}
			return nil
		}, "has a recent time")
	}
	atime := func(st *unix.Stat_t) unix.Timespec { return st.Atim }
	run(t, []testCase{
		{"both given", []step{
			{user, create("f", 0o644), ok},
			{user, utimens("f", t1, t2), ok},
			{user, times("f", t1, t2), ok},
			{user, utimens("f", t2, t1), ok},
			{user, times("f", t2, t1), ok},
			{user, utimens("f", far, far), ok},
			{user, times("f", far, far), ok},
			{user, mkdir("d", 0o755), ok},
			{user, utimens("d", t1, t2), ok},
			{user, times("d", t1, t2), ok},
			{user, mkfifo("p", 0o644), ok},
			{user, utimens("p", t1, t2), ok},
			{user, times("p", t1, t2), ok},
		}},
		{"before 1970", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", old, old), ok},
			{root, times("f", old, old), ok},
		}},
		{"nanoseconds", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", nanos, nanos), ok},
			{root, times("f", nanos, nanos), ok},
		}},
		{"modification time alone", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", t1, t2), ok},
			{root, utimens("f", omit, t3), ok},
			{root, times("f", t1, t3), ok},
		}},
		{"access time alone", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", t1, t2), ok},
			{root, utimens("f", t3, omit), ok},
			{root, times("f", t3, t2), ok},
		}},
		{"neither", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", t1, t2), ok},
			{root, utimens("f", omit, omit), ok},
			{root, times("f", t1, t2), ok},
		}},
		{"both now", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", t1, t2), ok},
			{root, utimens("f", now, now), ok},
			{root, recent("f", atime), ok},
			{root, recent("f", mtime), ok},
		}},
		{"now and given", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", t1, now), ok},
			{root, stats("f", func(st *unix.Stat_t) error {
				return same(st.Atim, t1)
			}, "has the access time given"), ok},
			{root, recent("f", mtime), ok},
		}},
		{"of a link itself", []step{
			{root, create("f", 0o644), ok},
			{root, utimens("f", t1, t1), ok},
			{root, symlink("f", "l"), ok},
			{root, utimens("l", t2, t2), ok},
			{root, stats("l", func(st *unix.Stat_t) error { // reading a link sets its atime
				return same(st.Mtim, t2)
			}, "has the time given"), ok},
			{root, times("f", t1, t1), ok},
		}},
		{"who may", []step{
			{user, create("f", 0o666), ok},
			{other, utimens("f", t1, t1), unix.EPERM},
			{other, utimens("f", now, now), ok}, // who may write may do this
			{user, chmod("f", 0o644), ok},
			{other, utimens("f", now, now), unix.EACCES},
			{user, utimens("missing", t1, t1), unix.ENOENT},
			{user, utimens("f/x", t1, t1), unix.ENOTDIR},
		}},
		{"are kept by what happens", []step{
			{root, write("f", unix.O_CREAT, "0"), ok},
			{root, updates("f", mtime, write("f", 0, "1")), ok},
			{root, updates("f", mtime, truncate("f", 0)), ok},
			{root, updates("f", ctime, chmod("f", 0o600)), ok},
			{root, updates("f", ctime, chown("f", 1, 1)), ok},
			{root, updates("f", ctime, link("f", "f2")), ok},
			{root, updates("f", ctime, setxattr("f", "user.a", "1", 0)), ok},
			{root, updates("f", ctime, rename("f2", "f3")), ok},
			{root, updates("f", ctime, unlink("f3")), ok},
			{root, updates(".", mtime, create("g", 0o644)), ok},
			{root, updates(".", mtime, unlink("g")), ok},
			{root, updates(".", mtime, mkdir("d", 0o755)), ok},
			{root, updates(".", mtime, rmdir("d")), ok},
		}},
	})
}

func TestXattr(t *testing.T) {
	binary := "\x00\xff\n" + strings.Repeat("\x00z", 1000) // has NULs, and some length
	run(t, []testCase{
		{"set, replaced, listed, removed", []step{
			{user, create("f", 0o644), ok},
			{user, listsXattrs("f"), ok},
			{user, setxattr("f", "user.a", "1", 0), ok},
			{user, hasXattr("f", "user.a", "1"), ok},
			{user, setxattr("f", "user.a", "another", 0), ok},
			{user, hasXattr("f", "user.a", "another"), ok},
			{user, setxattr("f", "user.b", binary, 0), ok},
			{user, hasXattr("f", "user.b", binary), ok},
			{user, listsXattrs("f", "user.a", "user.b"), ok},
			{user, removexattr("f", "user.a"), ok},
			{user, listsXattrs("f", "user.b"), ok},
			{user, getxattr("f", "user.a", 10), unix.ENODATA},
		}},
		{"of a directory", []step{
			{user, mkdir("d", 0o755), ok},
			{user, setxattr("d", "user.\xff \n", "1", 0), ok},
			{user, hasXattr("d", "user.\xff \n", "1"), ok},
		}},
		{"many", []step{
			{root, create("f", 0o644), ok},
			{root, setxattr("f", "user.a", "1", 0), ok},
			{root, setxattr("f", "user.b", "2", 0), ok},
			{root, setxattr("f", "user.c", "3", 0), ok},
			{root, setxattr("f", "user."+strings.Repeat("n", 250), "4", 0), ok},
			{root, listsXattrs("f", "user.a", "user.b", "user.c", "user."+strings.Repeat("n", 250)), ok},
			{root, hasXattr("f", "user."+strings.Repeat("n", 250), "4"), ok},
		}},
		{"only new, only existing", []step{
			{root, create("f", 0o644), ok},
			{root, setxattr("f", "user.a", "1", unix.XATTR_CREATE), ok},
			{root, setxattr("f", "user.a", "2", unix.XATTR_REPLACE), ok},
			{root, hasXattr("f", "user.a", "2"), ok},
		}},
		{"create what exists", []step{
			{root, create("f", 0o644), ok},
			{root, setxattr("f", "user.a", "1", 0), ok},
			{root, setxattr("f", "user.a", "2", unix.XATTR_CREATE), unix.EEXIST},
			{root, hasXattr("f", "user.a", "1"), ok},
		}},
		{"replace what is missing", []step{
			{root, create("f", 0o644), ok},
			{root, setxattr("f", "user.a", "1", unix.XATTR_REPLACE), unix.ENODATA},
			{root, listsXattrs("f"), ok},
		}},
		{"remove what is missing", []step{
			{root, create("f", 0o644), ok},
			{root, removexattr("f", "user.a"), unix.ENODATA},
		}},
		{"empty value", []step{
			{root, create("f", 0o644), ok},
			{root, setxattr("f", "user.a", "", 0), ok},
			{root, hasXattr("f", "user.a", ""), ok},
			{root, listsXattrs("f", "user.a"), ok},
		}},
		{"sizes", []step{
			{root, create("f", 0o644), ok},
			{root, setxattr("f", "user.a", "12345", 0), ok},
			{root, getxattr("f", "user.a", 4), unix.ERANGE},
			{root, getxattr("f", "user.a", 5), ok},
			{root, setxattr("f", "user.a", strings.Repeat("x", 65537), 0), unix.E2BIG},
			{root, setxattr("f", "user."+strings.Repeat("n", 251), "1", 0), unix.ERANGE},
			{root, check("llistxattr into 3 bytes", func() error {
				_, err := unix.Llistxattr("f", make([]byte, 3))
				return err
			}), unix.ERANGE},
		}},
		{"what cannot be", []step{
			{root, create("f", 0o644), ok},
			{root, symlink("f", "l"), ok},
			{root, mkfifo("p", 0o644), ok},
			{root, setxattr("l", "user.a", "1", 0), unix.EPERM},
			{root, setxattr("p", "user.a", "1", 0), unix.EPERM},
			{root, setxattr("f", "nonsense.a", "1", 0), unix.EOPNOTSUPP},
			{root, setxattr("missing", "user.a", "1", 0), unix.ENOENT},
			{root, getxattr("missing", "user.a", 1), unix.ENOENT},
			{root, removexattr("missing", "user.a"), unix.ENOENT},
			{root, getxattr("f/x", "user.a", 1), unix.ENOTDIR},
		}},
		{"who may", []step{
			{user, create("f", 0o644), ok},
			{user, setxattr("f", "user.a", "1", 0), ok},
			{other, getxattr("f", "user.a", 1), ok},
			{other, setxattr("f", "user.a", "2", 0), unix.EACCES},
			{other, removexattr("f", "user.a"), unix.EACCES},
			{user, chmod("f", 0o600), ok},
			{other, getxattr("f", "user.a", 1), unix.EACCES},
			{user, setxattr("f", "trusted.a", "1", 0), unix.EPERM},
			{user, hasXattr("f", "user.a", "1"), ok},
		}},
		{"trusted", []step{
			{root, create("f", 0o644), ok},
			{root, setxattr("f", "trusted.a", "1", 0), ok},
			{root, hasXattr("f", "trusted.a", "1"), ok},
		}},
	})
}

func TestStatfs(t *testing.T) {
	sane := func(st *unix.Statfs_t) error {
		if st.Bsize <= 0 || st.Blocks == 0 || st.Bfree > st.Blocks || st.Bavail > st.Bfree ||
			st.Ffree > st.Files || st.Namelen != unix.NAME_MAX {
			return fmt.Errorf("%+v", *st)
		}
		return nil
	}
	run(t, []testCase{
		{"of any file", []step{
			{root, mkdir("d", 0o755), ok},
			{root, create("d/f", 0o600), ok},
			{user, check("statfs(d/f)", func() error {
				var st, up unix.Statfs_t
				if err := unix.Statfs("d/f", &st); err != nil {
					return err
				}
				if err := unix.Statfs(".", &up); err != nil {
					return err
				}
				if st.Type != up.Type || st.Fsid != up.Fsid || st.Blocks != up.Blocks {
					return fmt.Errorf("%+v and %+v in one file system", st, up)
				}
				return sane(&st)
			}), ok},
			{root, check("statfs(missing)", func() error {
				return unix.Statfs("missing", new(unix.Statfs_t))
			}), unix.ENOENT},
		}},
		{"by descriptor", []step{
			{root, use("f", unix.O_CREAT|unix.O_RDONLY, 0o644, func(fd int) error {
				var st unix.Statfs_t
				if err := unix.Fstatfs(fd, &st); err != nil {
					return err
				}
				return sane(&st)
			}), ok},
		}},
	})
}

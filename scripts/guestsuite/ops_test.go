// The steps that cases are made of: one constructor a system call, then the checks.

package guestsuite

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// call makes an op that shows its system call the way strace would.
func call(do func() error, name string, args ...any) op {
	text := make([]string, len(args))
	for i, arg := range args {
		switch arg := arg.(type) {
		case string:
			text[i] = fmt.Sprintf("%q", arg)
		case uint32: // a mode
			text[i] = fmt.Sprintf("%#o", arg)
		default:
			text[i] = fmt.Sprint(arg)
		}
	}
	return op{name + "(" + strings.Join(text, ", ") + ")", do}
}

func mkdir(name string, mode uint32) op {
	return call(func() error { return unix.Mkdir(name, mode) }, "mkdir", name, mode)
}

func rmdir(name string) op {
	return call(func() error { return unix.Rmdir(name) }, "rmdir", name)
}

// create makes an empty file that must not exist.
func create(name string, mode uint32) op {
	return open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, mode)
}

func open(name string, flags int, mode uint32) op {
	return use(name, flags, mode, func(int) error { return nil })
}

// use opens a file, does something with it, and closes it.
func use(name string, flags int, mode uint32, do func(fd int) error) op {
	return call(func() error {
		fd, err := unix.Open(name, flags|unix.O_CLOEXEC, mode)
		if err != nil {
			return err
		}
		if err := do(fd); err != nil {
			unix.Close(fd)
			return err
		}
		return unix.Close(fd)
	}, "open", name, fmt.Sprintf("%#x", flags), mode)
}

// write opens name with flags and writes data.
func write(name string, flags int, data string) op {
	return use(name, unix.O_WRONLY|flags, 0o644, func(fd int) error { return writeAll(fd, data) })
}

func writeAll(fd int, data string) error {
	n, err := unix.Write(fd, []byte(data))
	if err == nil && n != len(data) {
		err = fmt.Errorf("wrote %d bytes of %d", n, len(data))
	}
	return err
}

func mknod(name string, mode uint32, dev uint64) op {
	return call(func() error { return unix.Mknod(name, mode, int(dev)) }, "mknod", name, mode, dev)
}

func mkfifo(name string, mode uint32) op { return mknod(name, unix.S_IFIFO|mode, 0) }

func symlink(target, name string) op {
	return call(func() error { return unix.Symlink(target, name) }, "symlink", target, name)
}

func link(old, new string) op {
	return call(func() error { return unix.Link(old, new) }, "link", old, new)
}

func unlink(name string) op {
	return call(func() error { return unix.Unlink(name) }, "unlink", name)
}

func rename(old, new string) op {
	return call(func() error { return unix.Rename(old, new) }, "rename", old, new)
}

func renameat2(old, new string, flags uint) op {
	return call(func() error {
		return unix.Renameat2(unix.AT_FDCWD, old, unix.AT_FDCWD, new, flags)
	}, "renameat2", old, new, flags)
}

func chmod(name string, mode uint32) op {
	return call(func() error { return unix.Chmod(name, mode) }, "chmod", name, mode)
}

func chown(name string, uid, gid int) op {
	return call(func() error { return unix.Chown(name, uid, gid) }, "chown", name, uid, gid)
}

func lchown(name string, uid, gid int) op {
	return call(func() error { return unix.Lchown(name, uid, gid) }, "lchown", name, uid, gid)
}

func truncate(name string, size int64) op {
	return call(func() error { return unix.Truncate(name, size) }, "truncate", name, size)
}

func umask(mask int) op {
	return call(func() error { unix.Umask(mask); return nil }, "umask", mask)
}

func setxattr(name, attr, value string, flags int) op {
	return call(func() error {
		return unix.Lsetxattr(name, attr, []byte(value), flags)
	}, "lsetxattr", name, attr, len(value), flags)
}

func removexattr(name, attr string) op {
	return call(func() error { return unix.Lremovexattr(name, attr) }, "lremovexattr", name, attr)
}

// getxattr asks for attr with a buffer of size bytes.
func getxattr(name, attr string, size int) op {
	return call(func() error {
		_, err := unix.Lgetxattr(name, attr, make([]byte, size))
		return err
	}, "lgetxattr", name, attr, size)
}

func chdir(name string) op {
	return call(func() error { return unix.Chdir(name) }, "chdir", name)
}

func access(name string, mode uint32) op {
	return call(func() error { return unix.Access(name, mode) }, "access", name, mode)
}

func lstat(name string) op {
	return call(func() error { var st unix.Stat_t; return unix.Lstat(name, &st) }, "lstat", name)
}

// is checks type, permissions and ownership of name itself, not of what it links to.
func is(name string, mode uint32, uid, gid uint32) op {
	return stats(name, func(st *unix.Stat_t) error {
		if st.Mode != mode || st.Uid != uid || st.Gid != gid {
			return fmt.Errorf("%#o %d:%d", st.Mode, st.Uid, st.Gid)
		}
		return nil
	}, fmt.Sprintf("is %#o %d:%d", mode, uid, gid))
}

func links(name string, n uint64) op {
	return stats(name, func(st *unix.Stat_t) error { return same(uint64(st.Nlink), n) }, fmt.Sprintf("has %d links", n))
}

func size(name string, n int64) op {
	return stats(name, func(st *unix.Stat_t) error { return same(st.Size, n) }, fmt.Sprintf("has size %d", n))
}

func device(name string, dev uint64) op {
	return stats(name, func(st *unix.Stat_t) error { return same(st.Rdev, dev) }, fmt.Sprintf("is device %#x", dev))
}

// stats checks something of what lstat says about name.
func stats(name string, right func(st *unix.Stat_t) error, what string) op {
	return op{fmt.Sprintf("%q %s", name, what), func() error {
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		return right(&st)
	}}
}

// sameFile checks that two names are of one inode.
func sameFile(a, b string) op {
	return stats(a, func(sta *unix.Stat_t) error {
		var stb unix.Stat_t
		if err := unix.Lstat(b, &stb); err != nil {
			return err
		}
		return same(stb.Ino, sta.Ino)
	}, fmt.Sprintf("is the same file as %q", b))
}

// contains checks all that is in a file.
func contains(name, content string) op {
	return op{fmt.Sprintf("%q contains %.40q", name, content), func() error {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		got, err := readAll(fd)
		if err != nil {
			return err
		}
		return same(got, content)
	}}
}

func readAll(fd int) (string, error) {
	var all bytes.Buffer
	buf := make([]byte, 100_000) // crosses page and message boundaries
	for {
		n, err := unix.Read(fd, buf)
		if n <= 0 || err != nil {
			return all.String(), err
		}
		all.Write(buf[:n])
	}
}

// pointsTo checks what a symbolic link says.
func pointsTo(name, target string) op {
	return op{fmt.Sprintf("%q points to %.40q", name, target), func() error {
		buf := make([]byte, unix.PathMax+1)
		n, err := unix.Readlink(name, buf)
		if err != nil {
			return err
		}
		return same(string(buf[:n]), target)
	}}
}

// hasXattr checks an attribute: its length as asked with an empty buffer, then its value.
func hasXattr(name, attr, value string) op {
	return op{fmt.Sprintf("%q has %q = %.40q", name, attr, value), func() error {
		n, err := unix.Lgetxattr(name, attr, nil)
		if err != nil {
			return err
		}
		if n != len(value) {
			return fmt.Errorf("length %d, want %d", n, len(value))
		}
		buf := make([]byte, n+1)
		n, err = unix.Lgetxattr(name, attr, buf)
		if err != nil {
			return err
		}
		return same(string(buf[:n]), value)
	}}
}

// listsXattrs checks the names of all user attributes; others are the host's own (SELinux).
func listsXattrs(name string, want ...string) op {
	return op{fmt.Sprintf("%q lists %q", name, want), func() error {
		n, err := unix.Llistxattr(name, nil)
		if err != nil {
			return err
		}
		buf := make([]byte, n)
		n, err = unix.Llistxattr(name, buf)
		if err != nil {
			return err
		}
		got := slices.DeleteFunc(strings.Split(string(buf[:n]), "\x00"), func(attr string) bool {
			return !strings.HasPrefix(attr, "user.")
		})
		slices.Sort(got)
		return same(strings.Join(got, " "), strings.Join(want, " "))
	}}
}

// same compares what is with what should be.
func same[T comparable](got, want T) error {
	if got == want {
		return nil
	}
	return fmt.Errorf("got %s, want %s", short(got), short(want))
}

// short shows a value, which may be the content of a file, in a few words.
func short(value any) string {
	text := fmt.Sprintf("%+v", value)
	if len(text) > 200 {
		text = fmt.Sprintf("%d bytes starting with %s", len(text), text[:200])
	}
	return text
}

// check is an op of several calls, described in words.
func check(what string, do func() error) op { return op{what, do} }

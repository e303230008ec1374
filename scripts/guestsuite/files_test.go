// Cases about opening files, what is in them, directories' contents, and traffic between processes.

package guestsuite

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpen(t *testing.T) {
	run(t, []testCase{
		{"create as anybody", []step{
			{root, create("f0", 0o644), ok},
			{root, is("f0", reg|0o644, 0, 0), ok},
			{user, create("f1", 0o604), ok},
			{user, is("f1", reg|0o604, 1000, 1000), ok},
			{other, create("f2", 0o666), ok},
			{other, is("f2", reg|0o666, 1001, 1001), ok},
		}},
		{"create with umask", []step{
			{user, umask(0o077), ok},
			{user, create("f", 0o666), ok},
			{user, is("f", reg|0o600, 1000, 1000), ok},
		}},
		{"create with special bits", []step{
			{root, create("f0", 0o7755), ok},
			{root, is("f0", reg|0o7755, 0, 0), ok},
			{user, create("f1", 0o6755), ok},
			{user, is("f1", reg|0o6755, 1000, 1000), ok},
		}},
		{"create in a setgid directory", []step{
			{root, mkdir("d", 0o777), ok},
			{root, chown("d", 0, 2000), ok},
			{root, chmod("d", 0o2777), ok},
			{user, create("d/f0", 0o644), ok},
			{user, is("d/f0", reg|0o644, 1000, 2000), ok},
			{user, create("d/f1", 0o2755), ok}, // an executable for a group that is not the user's
			{user, is("d/f1", reg|0o755, 1000, 2000), ok},
			{member, create("d/f2", 0o2755), ok},
			{member, is("d/f2", reg|0o2755, 1000, 2000), ok},
		}},
		{"create what one may not open", []step{
			{user, use("f", unix.O_CREAT|unix.O_RDWR, 0, func(fd int) error { return writeAll(fd, "once") }), ok},
			{user, open("f", unix.O_RDWR, 0), unix.EACCES},
			{root, contains("f", "once"), ok},
			{root, mkdir("d", 0o755), ok},
			{user, create("d/f", 0o644), unix.EACCES},
		}},
		{"O_EXCL", []step{
			{root, create("f", 0o644), ok},
			{root, create("f", 0o644), unix.EEXIST},
			{root, mkdir("d", 0o755), ok},
			{root, create("d", 0o644), unix.EEXIST},
			{root, mkfifo("p", 0o644), ok},
			{root, create("p", 0o644), unix.EEXIST},
			{root, open("f", unix.O_CREAT|unix.O_WRONLY, 0o600), ok},
			{root, is("f", reg|0o644, 0, 0), ok}, // the mode is for new files
		}},
		{"O_TRUNC", []step{
			{user, write("f", unix.O_CREAT, "something"), ok},
			{user, write("f", 0, "any-"), ok},
			{user, contains("f", "any-thing"), ok},
			{user, write("f", unix.O_TRUNC, "short"), ok},
			{user, contains("f", "short"), ok},
			{user, write("f", unix.O_CREAT|unix.O_TRUNC, ""), ok},
			{user, size("f", 0), ok},
			{other, open("f", unix.O_WRONLY|unix.O_TRUNC, 0), unix.EACCES},
		}},
		{"O_APPEND", []step{
			{root, write("f", unix.O_CREAT|unix.O_APPEND, "one "), ok},
			{root, use("f", unix.O_WRONLY|unix.O_APPEND, 0, func(a int) error {
				return use("f", unix.O_WRONLY|unix.O_APPEND, 0, func(b int) error {
					return errors.Join(writeAll(a, "two "), writeAll(b, "three "), writeAll(a, "four"))
				}).do()
			}), ok},
			{root, contains("f", "one two three four"), ok},
		}},
		{"O_DIRECTORY, O_NOFOLLOW, O_PATH", []step{
			{root, create("f", 0o644), ok},
			{root, mkdir("d", 0o755), ok},
			{root, symlink("d", "l"), ok},
			{root, open("f", unix.O_DIRECTORY, 0), unix.ENOTDIR},
			{root, open("d", unix.O_DIRECTORY, 0), ok},
			{root, open("l", unix.O_DIRECTORY, 0), ok},
			{root, open("l", unix.O_NOFOLLOW, 0), unix.ELOOP},
			{root, use("l", unix.O_PATH|unix.O_NOFOLLOW, 0, func(fd int) error {
				var st unix.Stat_t
				if err := unix.Fstat(fd, &st); err != nil {
					return err
				}
				return same(st.Mode, symbolic)
			}), ok},
		}},
		{"what cannot be", []step{
			{root, create("f", 0o644), ok},
			{root, mkdir("d", 0o755), ok},
			{root, open("missing", unix.O_RDONLY, 0), unix.ENOENT},
			{root, open("f/x", unix.O_RDONLY, 0), unix.ENOTDIR},
			{root, open("missing/x", unix.O_CREAT|unix.O_WRONLY, 0o644), unix.ENOENT},
			{root, open("d", unix.O_WRONLY, 0), unix.EISDIR},
			{root, open("d", unix.O_RDWR|unix.O_CREAT, 0), unix.EISDIR},
			{root, open(tooLong, unix.O_CREAT|unix.O_WRONLY, 0o644), unix.ENAMETOOLONG},
			{root, open(longest, unix.O_CREAT|unix.O_WRONLY, 0o644), ok},
			{root, mknod("s", socket|0o666, 0), ok},
			{root, open("s", unix.O_RDWR, 0), unix.ENXIO},
		}},
		{"a program", []step{
			{user, use("p", unix.O_CREAT|unix.O_WRONLY, 0o755, func(fd int) error {
				return writeAll(fd, "#!/bin/sh\nexit 7\n")
			}), ok},
			{user, access("p", unix.X_OK), ok},
			{user, check("run p", func() error {
				err := exec.Command("./p").Run() // a child has the directory and the identity of its thread
				var exit *exec.ExitError
				if !errors.As(err, &exit) {
					return err
				}
				return same(exit.ExitCode(), 7)
			}), ok},
			{user, chmod("p", 0o644), ok},
			{user, check("run p", func() error { return exec.Command("./p").Run() }), unix.EACCES},
		}},
	})
}

func TestTruncate(t *testing.T) {
	run(t, []testCase{
		{"shrink and grow", []step{
			{user, write("f", unix.O_CREAT, "0123456789"), ok},
			{user, truncate("f", 4), ok},
			{user, contains("f", "0123"), ok},
			{user, truncate("f", 8), ok},
			{user, contains("f", "0123\x00\x00\x00\x00"), ok},
			{user, truncate("f", 0), ok},
			{user, contains("f", ""), ok},
		}},
		{"far beyond 32 bits", []step{
			{user, create("f", 0o644), ok},
			{user, truncate("f", 1<<40), ok},
			{user, size("f", 1<<40), ok},
			{user, stats("f", func(st *unix.Stat_t) error { return same(st.Blocks, 0) }, "takes no blocks"), ok},
			{user, truncate("f", 1), ok},
		}},
		{"follows links", []step{
			{user, write("f", unix.O_CREAT, "0123456789"), ok},
			{user, symlink("f", "l"), ok},
			{user, truncate("l", 1), ok},
			{user, contains("f", "0"), ok},
		}},
		{"by descriptor", []step{
			{user, use("f", unix.O_CREAT|unix.O_RDWR, 0o400, func(fd int) error { return unix.Ftruncate(fd, 5) }), ok},
			{user, size("f", 5), ok},
			{user, use("f", unix.O_RDONLY, 0, func(fd int) error { return unix.Ftruncate(fd, 1) }), unix.EINVAL},
		}},
		{"what cannot be", []step{
			{user, create("f", 0o644), ok},
			{user, mkdir("d", 0o755), ok},
			{user, truncate("d", 0), unix.EISDIR},
			{user, truncate("missing", 0), unix.ENOENT},
			{user, truncate("f/x", 0), unix.ENOTDIR},
			{user, truncate("f", -1), unix.EINVAL},
			{user, truncate(tooLong, 0), unix.ENAMETOOLONG},
			{other, truncate("f", 0), unix.EACCES},
			{user, mkfifo("p", 0o644), ok},
			{user, truncate("p", 0), unix.EINVAL},
		}},
	})
}

func TestData(t *testing.T) {
	var pattern strings.Builder
	for i := range 200_000 {
		fmt.Fprintf(&pattern, "%07d\n", i)
	}
	big := pattern.String() // 1.6 MB: several of 9p's messages
	run(t, []testCase{
		{"much of it", []step{
			{user, write("f", unix.O_CREAT, big), ok},
			{user, size("f", int64(len(big))), ok},
			{user, contains("f", big), ok},
			{user, write("f", unix.O_APPEND, "end"), ok},
			{user, contains("f", big+"end"), ok},
			{user, stats("f", func(st *unix.Stat_t) error {
				if st.Blocks*512 < int64(len(big)) || st.Blksize <= 0 {
					return fmt.Errorf("%d blocks, best in units of %d", st.Blocks, st.Blksize)
				}
				return nil
			}, "takes as many blocks as it needs"), ok},
		}},
		{"at any place", []step{
			{user, use("f", unix.O_CREAT|unix.O_RDWR, 0o644, func(fd int) error {
				if _, err := unix.Pwrite(fd, []byte("there"), 1_000_001); err != nil {
					return err
				}
				if _, err := unix.Pwrite(fd, []byte("here"), 4093); err != nil {
					return err
				}
				if err := unix.Fsync(fd); err != nil {
					return err
				}
				buf := make([]byte, 10)
				n, err := unix.Pread(fd, buf, 4090)
				if err != nil {
					return err
				}
				if err := same(string(buf[:n]), "\x00\x00\x00here\x00\x00\x00"); err != nil {
					return err
				}
				n, err = unix.Pread(fd, buf, 1_000_003)
				if err != nil {
					return err
				}
				if err := same(string(buf[:n]), "ere"); err != nil {
					return err
				}
				n, err = unix.Pread(fd, buf, 2_000_000)
				if err != nil {
					return err
				}
				return same(n, 0)
			}), ok},
			{user, size("f", 1_000_006), ok},
		}},
		{"mapped for reading", []step{
			{user, write("f", unix.O_CREAT, big), ok},
			{user, use("f", unix.O_RDONLY, 0, func(fd int) error {
				mapped, err := unix.Mmap(fd, 0, len(big), unix.PROT_READ, unix.MAP_PRIVATE)
				if err != nil {
					return err
				}
				defer unix.Munmap(mapped)
				return same(string(mapped), big)
			}), ok},
		}},
		// A guest that mounts without a cache has no pages to share.
		{"mapped for writing", []step{
			{user, write("f", unix.O_CREAT, "abc"), ok},
			{user, use("f", unix.O_RDWR, 0, func(fd int) error {
				mapped, err := unix.Mmap(fd, 0, 3, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				if err != nil {
					return err
				}
				defer unix.Munmap(mapped)
				copy(mapped, "ABC")
				return unix.Msync(mapped, unix.MS_SYNC)
			}), ok},
			{user, contains("f", "ABC"), ok},
		}},
		// Fails where QEMU runs as root: it writes on the descriptor, and root may keep the bits.
		{"writing takes setuid and setgid away", []step{
			{user, create("f", 0o777), ok},
			{user, chmod("f", 0o6777), ok},
			{other, write("f", 0, "trojan"), ok},
			{user, is("f", reg|0o777, 1000, 1000), ok},
			{user, chmod("f", 0o6777), ok},
			{other, truncate("f", 1), ok},
			{user, is("f", reg|0o777, 1000, 1000), ok},
		}},
	})
}

func TestDirectories(t *testing.T) {
	const many = 1000 // more than one answer to readdir holds
	var names []string
	for i := range many {
		names = append(names, fmt.Sprintf("%0100d", i))
	}
	list := func(name string) ([]string, error) {
		entries, err := os.ReadDir(name)
		var got []string
		for _, e := range entries {
			got = append(got, e.Name())
		}
		return got, err
	}
	run(t, []testCase{
		{"every name once", []step{
			{user, mkdir("d", 0o755), ok},
			{user, check("list 1000 links that were made", func() error {
				for _, name := range names {
					if err := unix.Symlink("x", "d/"+name); err != nil {
						return err
					}
				}
				got, err := list("d")
				if err != nil {
					return err
				}
				return same(strings.Join(got, "\n"), strings.Join(names, "\n"))
			}), ok},
			{user, check("remove them while reading", func() error {
				d, err := os.Open("d")
				if err != nil {
					return err
				}
				defer d.Close()
				removed := 0
				for {
					names, err := d.Readdirnames(10)
					for _, name := range names {
						if err := unix.Unlink("d/" + name); err != nil {
							return err
						}
						removed++
					}
					if err == io.EOF {
						return same(removed, many)
					}
					if err != nil {
						return err
					}
				}
			}), ok},
			{user, rmdir("d"), ok},
		}},
		{"types", []step{
			{root, create("file", 0), ok},
			{root, mkdir("directory", 0), ok},
			{root, symlink("nowhere", "symlink"), ok},
			{root, mkfifo("fifo", 0), ok},
			{root, mknod("char", char, unix.Mkdev(1, 3)), ok},
			{root, mknod("block", block, unix.Mkdev(7, 1)), ok},
			{root, mknod("socket", socket, 0), ok},
			{root, check("readdir and lstat agree", func() error {
				entries, err := os.ReadDir(".")
				if err != nil {
					return err
				}
				for _, e := range entries {
					info, err := os.Lstat(e.Name())
					if err != nil {
						return err
					}
					if e.Type() != info.Mode().Type() {
						return fmt.Errorf("%s: %v and %v", e.Name(), e.Type(), info.Mode().Type())
					}
				}
				return same(len(entries), 7)
			}), ok},
		}},
		{"read again", []step{
			{root, mkdir("d", 0o755), ok},
			{root, check("a name appears after a rewind", func() error {
				d, err := os.Open("d")
				if err != nil {
					return err
				}
				defer d.Close()
				if names, err := d.Readdirnames(-1); err != nil || len(names) != 0 {
					return fmt.Errorf("%q, %w", names, err)
				}
				if err := create("d/new", 0o644).do(); err != nil {
					return err
				}
				if _, err := d.Seek(0, 0); err != nil {
					return err
				}
				names, err := d.Readdirnames(-1)
				if err != nil {
					return err
				}
				return same(strings.Join(names, " "), "new")
			}), ok},
		}},
		{"deep tree", deep(200, "d")},
		// It can be walked only step by step, as rm -r does, yet QEMU asks for each file by all of it.
		{"path longer than PATH_MAX", deep(30, strings.Repeat("d", 200))},
		{"path as long as a guest may name", longPath()},
	})
}

// longPath does by path what can be done by one of 4095 bytes, PATH_MAX less
// its NUL. The share's own path comes before it.
func longPath() (steps []step) {
	as := func(o op) { steps = append(steps, step{root, o, ok}) }
	var dirs []string
	for dir := ""; len(dir) < 16*255; {
		dir += strings.Repeat("d", 254)
		dirs = append(dirs, dir)
		as(mkdir(dir, 0o755))
		dir += "/"
	}
	dir := dirs[len(dirs)-1]
	name := func(c string) string { return dir + "/" + strings.Repeat(c, 4095-len(dir)-1) }
	file, other := name("f"), name("o")
	as(create(file, 0o644))
	as(write(file, unix.O_WRONLY, "long"))
	as(contains(file, "long"))
	as(chmod(file, 0o600))
	as(chown(file, 1000, 1000))
	as(is(file, reg|0o600, 1000, 1000))
	as(truncate(file, 2))
	as(size(file, 2))
	as(setxattr(file, "user.a", "b", 0))
	as(hasXattr(file, "user.a", "b"))
	as(listsXattrs(file, "user.a"))
	as(removexattr(file, "user.a"))
	as(link(file, other))
	as(links(file, 2))
	as(rename(other, name("r")))
	as(unlink(name("r")))
	as(unlink(file))
	as(symlink("target", file))
	as(pointsTo(file, "target"))
	as(unlink(file))
	as(mkfifo(file, 0o644))
	as(unlink(file))
	as(mkdir(file, 0o755))
	as(rmdir(file))
	steps = append(steps, step{root, create(file+"x", 0o644), unix.ENAMETOOLONG})
	for i := len(dirs) - 1; i >= 0; i-- {
		as(rmdir(dirs[i]))
	}
	return steps
}

// deep goes down a tree by descriptors, does at its bottom what is done by path elsewhere, and takes
// it away on the way up.
func deep(levels int, name string) []step {
	what := fmt.Sprintf("%d levels of directories with names of %d bytes", levels, len(name))
	return []step{{root, check(what, func() error {
		fds := []int{unix.AT_FDCWD}
		defer func() {
			for _, fd := range fds[1:] {
				unix.Close(fd)
			}
		}()
		for level := range levels {
			at := fds[level]
			if err := unix.Mkdirat(at, name, 0o755); err != nil {
				return fmt.Errorf("mkdirat at level %d: %w", level, err)
			}
			fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("openat at level %d: %w", level, err)
			}
			fds = append(fds, fd)
		}
		bottom := fds[levels]
		fd, err := unix.Openat(bottom, "f", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		buf := make([]byte, 8)
		var st unix.Stat_t
		_, errLink := unix.Readlinkat(bottom, "l", buf)
		err = errors.Join(
			writeAll(fd, "deep"),
			unix.Fchmod(fd, 0o600),
			unix.Ftruncate(fd, 2),
			unix.Linkat(bottom, "f", bottom, "f2", 0),
			unix.Renameat(bottom, "f2", bottom, "f3"),
			unix.Fstatat(bottom, "f3", &st, unix.AT_SYMLINK_NOFOLLOW),
			same(st.Nlink, 2),
			same(st.Size, 2),
			same(errLink, error(unix.ENOENT)),
			unix.Symlinkat("deep", bottom, "l"),
			unix.Fchownat(bottom, "l", 1000, 1000, unix.AT_SYMLINK_NOFOLLOW),
			unix.Unlinkat(bottom, "l", 0),
			unix.Unlinkat(bottom, "f", 0),
			unix.Unlinkat(bottom, "f3", 0),
			unix.Close(fd),
		)
		if err != nil {
			return err
		}
		for level := levels - 1; level >= 0; level-- {
			if err := unix.Unlinkat(fds[level], name, unix.AT_REMOVEDIR); err != nil {
				return fmt.Errorf("unlinkat at level %d: %w", level, err)
			}
		}
		return nil
	}), ok}}
}

func TestProcesses(t *testing.T) {
	run(t, []testCase{
		{"FIFO between two", []step{
			{user, mkfifo("p", 0o600), ok},
			{user, open("p", unix.O_WRONLY|unix.O_NONBLOCK, 0), unix.ENXIO}, // nobody reads
			{user, check("one writes, the other reads", func() error {
				writer := exec.Command("/bin/sh", "-c", "echo through a FIFO >p")
				if err := writer.Start(); err != nil {
					return err
				}
				return errors.Join(contains("p", "through a FIFO\n").do(), writer.Wait())
			}), ok},
		}},
		{"socket between two", []step{
			{user, check("bind, connect, say, close", func() error {
				server, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(server)
				name := &unix.SockaddrUnix{Name: "s"}
				if err := errors.Join(unix.Bind(server, name), unix.Listen(server, 1)); err != nil {
					return err
				}
				client, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(client)
				if err := unix.Connect(client, name); err != nil {
					return err
				}
				accepted, _, err := unix.Accept(server)
				if err != nil {
					return err
				}
				defer unix.Close(accepted)
				if err := writeAll(client, "hello"); err != nil {
					return err
				}
				buf := make([]byte, 10)
				n, err := unix.Read(accepted, buf)
				if err != nil {
					return err
				}
				return same(string(buf[:n]), "hello")
			}), ok},
			{user, is("s", socket|0o777, 1000, 1000), ok},
			{user, check("bind to the name again", func() error {
				fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				return unix.Bind(fd, &unix.SockaddrUnix{Name: "s"})
			}), unix.EADDRINUSE},
			{user, check("connect to the name that nobody serves", func() error {
				fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				return unix.Connect(fd, &unix.SockaddrUnix{Name: "s"})
			}), unix.ECONNREFUSED},
		}},
		{"several users at a time", []step{
			{root, check("each owns what it makes", severalUsers), ok},
		}},
	})
}

// severalUsers has several identities create, rename and remove at the same time in the working
// directory. Whose request it is must never get mixed up.
func severalUsers() error {
	home, err := os.Getwd()
	if err != nil {
		return err
	}
	people := []who{root, user, other, {1002, 100, nil}, {1000, 1001, nil}}
	errs := make([]error, len(people))
	var group sync.WaitGroup
	for i, w := range people {
		group.Go(func() {
			runtime.LockOSThread()
			if err := w.become(); err != nil {
				errs[i] = err
				return
			}
			for round := range 40 {
				name := filepath.Join(home, fmt.Sprintf("%d.%d", i, round))
				mine := func(mode uint32) op { return is(name, mode, uint32(w.uid), uint32(w.gid)) }
				for _, o := range slices.Concat(
					[]op{create(name+"~", 0o644), rename(name+"~", name), mine(reg | 0o644), unlink(name)},
					[]op{mkdir(name, 0o755), mine(directory | 0o755), rmdir(name)},
					[]op{mkfifo(name, 0o644), mine(fifo | 0o644), unlink(name)},
					[]op{symlink("x", name), mine(symbolic)},
				) {
					if err := o.do(); err != nil {
						errs[i] = fmt.Errorf("%d:%d, round %d: %s: %w", w.uid, w.gid, round, o.name, err)
						return
					}
				}
			}
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

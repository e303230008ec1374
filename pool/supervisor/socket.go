package supervisor

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxName is the longest name of a socket in bytes: sockaddr_un less its NUL.
const maxName = 107

// socketMode is the socket's mode: its owner and group may connect.
const socketMode = 0o660

// socketName is a socket's name in the file system.
//
// QEMU unlinks the name once it is connected, and the next VM must find it
// again. So the socket is bound to a private name beside it, ".NAME", and the
// public name is a hard link to that: put back as often as it goes, without
// ever binding again, so that no connection is refused in between.
type socketName struct {
	Listener int // listening, blocking

	dir           int    // the directory that both names are in
	path          string // as the user said it
	base, private string // the names in dir
	ino           uint64 // of the socket
	watch         *os.File

	mu       sync.Mutex // of released, and of making and removing names
	released bool
}

// claimSocket binds the private name, listens, and makes sure that the public name
// is free or what a dead process left. Nothing can connect before publish. It
// removes dead sockets, never anything else.
func claimSocket(path string, uid, gid int) (*socketName, error) {
	if len(path) > maxName {
		return nil, fmt.Errorf("--socket: name of %d bytes is too long for a socket, at most %d: %s", len(path), maxName, path)
	}
	n := &socketName{path: path, base: filepath.Base(path), Listener: -1}
	if strings.HasSuffix(path, "/") || n.base == "." || n.base == ".." {
		return nil, fmt.Errorf("--socket: %s names a directory, not a socket in one", path)
	}
	if n.private = "." + n.base; len(n.private) > 80 { // it must fit behind /proc/self/fd/N/
		n.private = fmt.Sprintf(".%x", sha256.Sum256([]byte(n.base)))
	}
	var err error
	if n.dir, err = unix.Open(filepath.Dir(path), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, &os.PathError{Op: "--socket: directory", Path: filepath.Dir(path), Err: err}
	}
	if err := n.claim(uid, gid); err != nil {
		n.release()
		return nil, fmt.Errorf("--socket: %w", err)
	}
	return n, nil
}

// claim does claimSocket's work while no other process does it in this directory.
func (n *socketName) claim(uid, gid int) error {
	unlock, err := lockDir(n.dir)
	if err != nil {
		return fmt.Errorf("%s: lock the directory: %w", filepath.Dir(n.path), err)
	}
	defer unlock()
	// The private name stands as long as its supervisor lives, so it is asked
	// first: the public one may be missing just now.
	for _, name := range []string{n.private, n.base} {
		if err := n.clear(name); err != nil {
			return err
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	n.Listener = fd
	umask := unix.Umask(0o777 &^ socketMode)
	err = unix.Bind(fd, n.addr(n.private))
	unix.Umask(umask)
	if err != nil {
		return &os.PathError{Op: "bind", Path: n.in(n.private), Err: err}
	}
	var st unix.Stat_t
	err = errors.Join(
		unix.Fchownat(n.dir, n.private, uid, gid, unix.AT_SYMLINK_NOFOLLOW),
		unix.Fstatat(n.dir, n.private, &st, unix.AT_SYMLINK_NOFOLLOW),
		unix.Listen(fd, 1024))
	if err != nil {
		return &os.PathError{Op: fmt.Sprintf("give to %d:%d and listen", uid, gid), Path: n.in(n.private), Err: err}
	}
	n.ino = st.Ino
	return nil
}

// clear removes what a dead process left at name. It finds out with a socket
// of the wrong type: a live owner never notices.
func (n *socketName) clear(name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(n.dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == unix.ENOENT:
		return nil
	case err != nil:
		return &os.PathError{Op: "stat", Path: n.in(name), Err: err}
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return fmt.Errorf("%s exists and is not a socket: remove it, or choose another name", n.in(name))
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, n.addr(name)); err != unix.ECONNREFUSED {
		return fmt.Errorf("%s is in use by a running process: stop that, or choose another name", n.in(name))
	}
	if err := unix.Unlinkat(n.dir, name, 0); err != nil {
		return &os.PathError{Op: "remove the dead socket", Path: n.in(name), Err: err}
	}
	return nil
}

// publish makes the public name, and makes it again whenever it goes.
func (n *socketName) publish(log *slog.Logger) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w: see /proc/sys/fs/inotify/max_user_instances", err)
	}
	n.watch = os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, fmt.Sprintf("/proc/self/fd/%d", n.dir), unix.IN_DELETE|unix.IN_MOVED_FROM); err != nil {
		return fmt.Errorf("inotify: watch %s: %w: see /proc/sys/fs/inotify/max_user_watches", filepath.Dir(n.path), err)
	}
	if err := n.link(); err != nil {
		return fmt.Errorf("--socket: %w", err)
	}
	go n.putBack(log)
	return nil
}

func (n *socketName) link() error {
	if err := unix.Linkat(n.dir, n.private, n.dir, n.base, 0); err != nil {
		return &os.LinkError{Op: "link", Old: n.in(n.private), New: n.path, Err: err}
	}
	return nil
}

// putBack links the public name again when it has been removed. Whatever else
// somebody puts there stays.
func (n *socketName) putBack(log *slog.Logger) {
	events := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for {
		size, err := n.watch.Read(events)
		if err != nil {
			return // release has closed it
		}
		if !n.concerned(events[:size]) {
			continue
		}
		n.mu.Lock()
		if n.released {
			n.mu.Unlock()
			return
		}
		err = n.link()
		n.mu.Unlock()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			log.Error("can't put the socket's name back: no new VM can connect", "error", err)
		} else if err != nil && !n.ours(n.base) {
			log.Error("the socket's name is taken by something else: no new VM can connect until it is removed", "socket", n.path)
		}
	}
}

// concerned tells whether the public name may have gone: it is named, or the
// kernel could not queue all events.
func (n *socketName) concerned(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(events[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		name, _, _ := strings.Cut(string(events[unix.SizeofInotifyEvent:end]), "\x00")
		if name == n.base || mask&unix.IN_Q_OVERFLOW != 0 {
			return true
		}
		events = events[end:]
	}
	return false
}

// release gives the names up; connections stay.
func (n *socketName) release() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.released {
		return
	}
	n.released = true
	if n.watch != nil {
		n.watch.Close()
	}
	if n.Listener >= 0 {
		unix.Shutdown(n.Listener, unix.SHUT_RDWR) // ends accept
		for _, name := range []string{n.base, n.private} {
			if n.ours(name) {
				unix.Unlinkat(n.dir, name, 0)
			}
		}
	}
}

// ours tells whether name is this socket.
func (n *socketName) ours(name string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(n.dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Ino == n.ino && st.Mode&unix.S_IFMT == unix.S_IFSOCK
}

func (n *socketName) in(name string) string { return filepath.Join(filepath.Dir(n.path), name) }

// addr is the name's address: its path, which tools show, if that fits.
func (n *socketName) addr(name string) *unix.SockaddrUnix {
	path := n.in(name)
	if len(path) > maxName {
		path = fmt.Sprintf("/proc/self/fd/%d/%s", n.dir, name)
	}
	return &unix.SockaddrUnix{Name: path}
}

// lockDir keeps other helpers from claiming names in dir for the moment.
// Whoever may read the directory could hold the lock for good: the patience
// is bounded.
func lockDir(dir int) (unlock func(), err error) {
	for range 100 {
		if err = unix.Flock(dir, unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK && err != unix.EINTR {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return func() { unix.Flock(dir, unix.LOCK_UN) }, err
}

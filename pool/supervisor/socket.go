package supervisor

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/pool/ipc"
)

// maxName is the longest name of a socket in bytes: sockaddr_un less its NUL.
const maxName = 107

// socketMode is the socket's mode: its owner and group may connect.
const socketMode = 0o660

// How often the socket's names are looked at: while something is wrong with
// them, and else, as not all that moves a directory causes an event.
const (
	retryNames = 200 * time.Millisecond
	checkNames = 5 * time.Second
)

// settleTime is how long a name's directory is left alone that somebody is
// removing or making again.
const settleTime = 100 * time.Millisecond

// socketName is a socket's name in the file system.
//
// QEMU unlinks the name once it is connected, and the next VM must find it
// again. So the socket is bound in a private directory beside it, ".NAME", and
// the public name is a hard link to that: put back as often as it goes, without
// ever binding again, so that no connection is refused in between. Only if the
// private directory goes, or the one that both are in, it is bound anew.
type socketName struct {
	path     string // as the user said it
	dirPath  string // the directory, absolute and without symbolic links
	base     string // the name in that
	inner    string // the name in the private directory
	uid, gid int    // the socket's owner and group

	log *slog.Logger
	// serve takes connections from a new listener until it is shut down, and
	// closes it.
	serve func(listener int)
	// withCaps calls its argument with the capabilities to bind anew.
	withCaps func(func() error) error
	wake     chan struct{} // look at the names now

	mu       sync.Mutex // of all below, and of making and removing names
	bound    *binding
	trouble  string // what was last logged to be wrong
	released bool
}

// binding is a listening socket with its names in one directory.
type binding struct {
	dir      int // owned
	dirID    fileID
	private  *privateDir // nil once its place has been taken by the next binding
	listener int         // blocking; owned by socketName.serve if served
	served   bool
	id       fileID   // of the socket in the file system
	watch    *os.File // inotify; nil before publish
}

// claimSocket binds the socket, listens, and makes sure that the public name is
// free or what a dead process left. Nothing can connect before publish. It
// removes dead sockets, never anything else.
func claimSocket(
	path string, uid, gid int, export *os.File, withCaps func(func() error) error,
) (*socketName, error) {
	if len(path) > maxName {
		return nil, fmt.Errorf("--socket: name of %d bytes is too long for a socket, "+
			"at most %d: %s", len(path), maxName, path)
	}
	n := &socketName{
		path: path, base: filepath.Base(path), uid: uid, gid: gid,
		withCaps: withCaps,
		wake:     make(chan struct{}, 1),
	}
	if strings.HasSuffix(path, "/") || n.base == "." || n.base == ".." {
		return nil, fmt.Errorf("--socket: %s names a directory, not a socket in one", path)
	}
	n.inner = n.base[:min(len(n.base), 80)] // it must fit behind /proc/PID/fd/N/
	dir, err := openDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("--socket: %w", err)
	}
	if err = checkOutside(path, dir, export); err == nil {
		n.dirPath, err = filepath.EvalSymlinks(filepath.Dir(path))
	}
	if err == nil {
		n.dirPath, err = filepath.Abs(n.dirPath)
	}
	if err != nil {
		unix.Close(dir)
		return nil, fmt.Errorf("--socket: %w", err)
	}
	if n.bound, err = n.bind(dir); err != nil {
		return nil, fmt.Errorf("--socket: %w", err)
	}
	return n, nil
}

// bind claims the name in dir, binds a socket in its private directory and
// listens. It owns dir.
func (n *socketName) bind(dir int) (_ *binding, err error) {
	b := &binding{dir: dir, listener: -1}
	defer func() {
		if err != nil {
			b.remove(n)
		}
	}()
	if b.dirID, err = idOf(dir, ""); err != nil {
		return nil, err
	}
	if b.private, err = n.openPrivate(dir); errors.Is(err, errInUse) {
		return nil, n.inUse(n.base)
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Dir(n.path), err)
	}
	// What a killed helper has left in the private directory, and nothing else:
	// it may be any directory of this user that somebody has moved there.
	names, err := b.private.names()
	for _, name := range names {
		if name != n.inner && name != aside {
			return nil, fmt.Errorf("%s holds %s, which is not from this program: move it away",
				n.in("."+n.base), name)
		}
		err = errors.Join(err, n.clear(b.private.fd, name, b.private))
	}
	if err != nil {
		return nil, err
	}
	if n.bound == nil || !n.bound.id.is(dir, n.base) {
		if err := n.clear(dir, n.base, b.private); err != nil {
			return nil, err
		}
	}
	return b, n.listen(b)
}

// openPrivate opens the private directory in dir. Older versions had a socket
// of that name.
func (n *socketName) openPrivate(dir int) (*privateDir, error) {
	p, err := openPrivate(dir, "."+n.base)
	if !errors.Is(err, unix.ENOTDIR) {
		return p, err
	}
	tmp, err := tempPrivate(dir, n.base)
	if err != nil {
		return nil, err
	}
	err = n.clear(dir, "."+n.base, tmp)
	tmp.remove()
	if err != nil {
		return nil, err
	}
	return openPrivate(dir, "."+n.base)
}

// listen makes the socket in the private directory of b.
func (n *socketName) listen(b *binding) (err error) {
	b.listener, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ipc.RefuseDescriptors(b.listener) // not before Linux 6.16
	dir := b.private.fd
	if err = unix.Bind(b.listener, fdAddr(dir, n.inner)); err == nil {
		b.id, err = idOf(dir, n.inner)
	}
	if err != nil {
		return &os.PathError{Op: "bind", Path: n.path, Err: err}
	}
	// By descriptor, once it is known what that is.
	fd, err := unix.Openat(dir, n.inner, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if b.id.kind != unix.S_IFSOCK || !b.id.is(fd, "") {
		return fmt.Errorf("%s is exchanged in a directory that is this user's own", n.inner)
	}
	err = errors.Join(
		unix.Fchmodat(unix.AT_FDCWD, fdPath(fd), socketMode, 0),
		unix.Fchownat(fd, "", n.uid, n.gid, unix.AT_EMPTY_PATH),
		unix.Listen(b.listener, 1024))
	if err != nil {
		op := fmt.Sprintf("give to %d:%d and listen", n.uid, n.gid)
		return &os.PathError{Op: op, Path: n.path, Err: err}
	}
	return nil
}

// clear removes what a dead process left at dir/name, by way of p. It finds out
// with a socket of the wrong type: a live owner never notices.
func (n *socketName) clear(dir int, name string, p *privateDir) error {
	file, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: n.in(name), Err: err}
	}
	defer unix.Close(file)
	id, err := idOf(file, "")
	if err != nil {
		return &os.PathError{Op: "stat", Path: n.in(name), Err: err}
	}
	if id.kind != unix.S_IFSOCK {
		return fmt.Errorf("%s exists and is not a socket: remove it, or choose another name",
			n.in(name))
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: fdPath(file)}); err {
	case unix.ECONNREFUSED:
	case nil, unix.EPROTOTYPE:
		return n.inUse(name)
	default:
		return &os.PathError{Op: "find out if a process has", Path: n.in(name), Err: err}
	}
	if dir == p.fd {
		err = unix.Unlinkat(dir, name, 0)
	} else {
		err = p.discard(dir, name, id)
	}
	if err != nil {
		return &os.PathError{Op: "remove the dead socket", Path: n.in(name), Err: err}
	}
	return nil
}

func (n *socketName) inUse(name string) error {
	return fmt.Errorf("%s is %w: stop that, or choose another name", n.in(name), errInUse)
}

// publish makes the public name, gives serve the listener, and makes the names
// again whenever they go.
func (n *socketName) publish(log *slog.Logger, serve func(listener int)) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log, n.serve = log, serve
	if err := n.announce(n.bound); err != nil {
		return fmt.Errorf("--socket: %w", err)
	}
	go n.keep()
	return nil
}

// announce makes b's public name and begins to watch and to serve it.
func (n *socketName) announce(b *binding) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w: see /proc/sys/fs/inotify/max_user_instances", err)
	}
	b.watch = os.NewFile(uintptr(fd), "inotify")
	const gone = unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	for _, dir := range []int{b.dir, b.private.fd} {
		if _, err := unix.InotifyAddWatch(fd, fdPath(dir), gone); err != nil {
			return fmt.Errorf("inotify: watch %s: %w: see /proc/sys/fs/inotify/max_user_watches",
				n.dirPath, err)
		}
	}
	if err := n.link(b); err != nil {
		return err
	}
	go n.await(b.watch)
	b.served = true
	go n.serve(b.listener)
	return nil
}

// link makes b's public name, unless that is there.
func (n *socketName) link(b *binding) error {
	err := unix.Linkat(b.private.fd, n.inner, b.dir, n.base, 0)
	switch {
	case err == nil || b.id.is(b.dir, n.base):
		return nil
	case err == unix.EEXIST:
		return fmt.Errorf("%s is taken by something else: remove that", n.path)
	}
	return &os.LinkError{Op: "link", Old: n.inner, New: n.path, Err: err}
}

// await wakes keep by whatever happens in the directories that are watched. What
// the events say does not matter.
func (n *socketName) await(watch *os.File) {
	events := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for {
		if _, err := watch.Read(events); err != nil {
			return // closed
		}
		n.look()
	}
}

// look makes the names again if they have gone. It does not wait for that.
func (n *socketName) look() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// keep makes the names again when they have gone. Whatever else somebody puts
// there stays.
func (n *socketName) keep() {
	for pause := checkNames; ; {
		select {
		case <-n.wake:
		case <-time.After(pause):
		}
		n.mu.Lock()
		whole := n.released || n.whole()
		n.mu.Unlock()
		if !whole {
			time.Sleep(settleTime)
		}
		n.mu.Lock()
		if n.released {
			n.mu.Unlock()
			return
		}
		pause = checkNames
		if err := n.restore(); err != nil {
			pause = retryNames
			if n.trouble != err.Error() {
				n.log.Error("can't put the socket's name back: no new VM can connect", "error", err)
				n.trouble = err.Error()
			}
		} else if n.trouble != "" {
			n.log.Info("the socket's name is back", "socket", n.path)
			n.trouble = ""
		}
		n.mu.Unlock()
	}
}

// whole tells that all but the public name is where it should be.
func (n *socketName) whole() bool {
	b := n.bound
	return b.private != nil && b.dirID.is(unix.AT_FDCWD, n.dirPath) &&
		b.private.there() && b.id.is(b.private.fd, n.inner)
}

// restore makes again what is missing.
func (n *socketName) restore() error {
	switch b := n.bound; {
	case !n.whole():
		return n.bindAgain()
	case b.id.is(b.dir, n.base):
		return nil
	default:
		return n.link(b)
	}
}

// bindAgain replaces the binding by another one, in the directory that has the
// path now. Clients that wait for the old one are accepted.
func (n *socketName) bindAgain() error {
	// No symbolic links: the path was without them at the start.
	dir, err := unix.Openat2(unix.AT_FDCWD, n.dirPath, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return &os.PathError{Op: "open the directory", Path: n.dirPath, Err: err}
	}
	old := n.bound
	here := old.dirID.is(dir, "")
	if here && old.private != nil { // it may still have the name, and the lock
		old.removePrivate(n)
	}
	var b *binding
	err = n.withCaps(func() error {
		b, err = n.bind(dir)
		return err
	})
	if err != nil {
		return err
	}
	if here {
		err = b.private.discard(dir, n.base, old.id)
	}
	if err == nil {
		err = n.announce(b)
	}
	if err != nil {
		b.remove(n)
		return err
	}
	n.bound = b
	old.remove(n)
	n.log.Warn("the socket's names were removed: bound anew", "socket", n.path)
	return nil
}

// release gives the names up; connections stay.
func (n *socketName) release() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.released {
		n.released = true
		n.bound.remove(n)
		n.look() // ends keep
	}
}

// remove removes the names, as far as they are still b's. New connections are
// refused; serve still accepts those that wait, and closes the listener.
func (b *binding) remove(n *socketName) {
	if b.watch != nil {
		b.watch.Close()
	}
	if b.served {
		unix.Shutdown(b.listener, unix.SHUT_RDWR)
	} else {
		unix.Close(b.listener)
	}
	if b.private != nil {
		if err := b.private.discard(b.dir, n.base, b.id); err != nil && n.log != nil {
			n.log.Warn("the socket's name stays", "error", err)
		}
		b.removePrivate(n)
	}
	unix.Close(b.dir)
}

func (b *binding) removePrivate(n *socketName) {
	if b.id.is(b.private.fd, n.inner) {
		unix.Unlinkat(b.private.fd, n.inner, 0)
	}
	b.private.remove()
	b.private = nil
}

func (n *socketName) in(name string) string { return filepath.Join(filepath.Dir(n.path), name) }

// fdPath is a path to what a descriptor is of, whatever names that has. Its
// number in /proc is this process' in other processes, too: so tools find the
// socket by the name that it is bound to.
func fdPath(fd int) string {
	self, err := os.Readlink("/proc/self")
	if err != nil {
		self = "self"
	}
	return fmt.Sprintf("/proc/%s/fd/%d", self, fd)
}

func fdAddr(dir int, name string) *unix.SockaddrUnix {
	return &unix.SockaddrUnix{Name: fdPath(dir) + "/" + name}
}

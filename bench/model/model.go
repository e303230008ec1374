// Package model is a model of the exported file system. The VMs of the soak and
// of pool's tests send requests that are generated from a seed, and compare each
// answer, each descriptor and the tree with the model. Each answer must be the
// only right one, or an error that a disturbance explains.
//
//	vm.go        a VM: sends requests, checks each answer and each descriptor
//	model.go     the expected content of a VM's directory
//	answers.go   the expected answers
//	requests.go  the generator of requests
//	spans.go     the times of servers' deaths and of lack of descriptors
package model

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// world is the expected content of a VM's part of the export. After a server has
// died during a change there are several possible worlds.
type world struct {
	root   *node
	opened []opened // descriptors from answers, not checked yet
}

// opened is a descriptor that came with an answer, and the inode that it must
// refer to.
type opened struct {
	fd   *os.File
	node *node
	r    *request
}

// node is an inode. ino, version and mtime are taken from the first answer that
// holds them while they are 0 or nil, and must stay the same from then on.
type node struct {
	mode     uint32 // type and permissions
	uid, gid uint32
	nlink    int // number of names
	rdev     uint64
	data     string           // content of a file, target of a symbolic link
	entries  map[string]*node // of a directory
	xattrs   map[string]string
	ino      uint64
	version  *uint64
	mtime    *codec.Time // set by UTIME, nil after other changes
}

func newNode(mode, uid, gid uint32) *node {
	n := &node{mode: mode, uid: uid, gid: gid, nlink: 1, xattrs: map[string]string{}}
	if n.is(unix.S_IFDIR) {
		n.entries = map[string]*node{}
	}
	return n
}

func (n *node) is(kind uint32) bool { return n.mode&unix.S_IFMT == kind }

// links returns st_nlink, as this kind of file system counts.
func (n *node) links(kind fsKind) int {
	switch {
	case n.nlink == 0 || !n.is(unix.S_IFDIR):
		return n.nlink
	case kind == btrfs:
		return 1
	}
	links := 2
	for _, e := range n.entries {
		if e.is(unix.S_IFDIR) {
			links++
		}
	}
	return links
}

// names returns the number of names and of their attributes below n.
func (n *node) names() int {
	sum := len(n.entries)
	for _, e := range n.entries {
		sum += e.names() + len(e.xattrs)
	}
	return sum
}

// clone returns a deep copy, which keeps hard links.
func (w *world) clone() *world {
	copies := map[*node]*node{}
	var copyOf func(*node) *node
	copyOf = func(n *node) *node {
		if c := copies[n]; c != nil {
			return c
		}
		c := *n
		copies[n] = &c
		c.xattrs = maps.Clone(n.xattrs)
		if n.entries != nil {
			c.entries = map[string]*node{}
			for name, e := range n.entries {
				c.entries[name] = copyOf(e)
			}
		}
		return &c
	}
	w2 := &world{root: copyOf(w.root)}
	for _, o := range w.opened {
		w2.opened = append(w2.opened, opened{o.fd, copyOf(o.node), o.r})
	}
	return w2
}

const sharedText = "what all VMs read\n"

// MakeShared makes the directory "shared" of an export, which all VMs read.
func MakeShared(export string) error {
	dir := filepath.Join(export, "shared")
	err := errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(filepath.Join(dir, "dir"), 0o755))
	for _, name := range []string{"file", "dir/inner"} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte(sharedText), 0o644))
	}
	return errors.Join(err, os.Symlink("file", filepath.Join(dir, "link")))
}

// sharedTree returns the tree that MakeShared makes.
func sharedTree() *node {
	file := func() *node {
		n := newNode(unix.S_IFREG|0o644, 0, 0)
		n.data = sharedText
		return n
	}
	link := newNode(unix.S_IFLNK|0o777, 0, 0)
	link.data = "file"
	dir := newNode(unix.S_IFDIR|0o755, 0, 0)
	dir.entries["inner"] = file()
	shared := newNode(unix.S_IFDIR|0o755, 0, 0)
	shared.entries["file"] = file()
	shared.entries["dir"] = dir
	shared.entries["link"] = link
	return shared
}

// place is a resolved path: a name in a directory. node is nil if the name does
// not exist.
type place struct {
	dir  *node
	name string
	node *node
}

func (p place) set(n *node) {
	p.dir.mtime = nil
	if n == nil {
		delete(p.dir.entries, p.name)
	} else {
		p.dir.entries[p.name] = n
	}
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// walk resolves a path, following symbolic links as the kernel does.
func (w *world) walk(path string, follow bool) (place, unix.Errno) {
	dir, rest, links := w.root, split(path), 0
	for {
		if !dir.is(unix.S_IFDIR) {
			return place{}, unix.ENOTDIR
		}
		name := rest[0]
		rest = rest[1:]
		n := dir.entries[name]
		switch {
		case n != nil && n.is(unix.S_IFLNK) && (len(rest) > 0 || follow):
			if links++; links > 40 {
				return place{}, unix.ELOOP
			}
			rest = append(split(n.data), rest...)
		case len(rest) == 0:
			return place{dir, name, n}, 0
		case n == nil:
			return place{}, unix.ENOENT
		default:
			dir = n
		}
	}
}

// find resolves a path that must exist.
func (w *world) find(path string, follow bool) (*node, unix.Errno) {
	p, errno := w.walk(path, follow)
	if errno == 0 && p.node == nil {
		errno = unix.ENOENT
	}
	return p.node, errno
}

// free resolves a path that must not exist.
func (w *world) free(path string) (place, unix.Errno) {
	p, errno := w.walk(path, false)
	if errno == 0 && p.node != nil {
		errno = unix.EEXIST
	}
	return p, errno
}

// create makes a new inode and its name.
func (w *world) create(path string, mode, uid, gid uint32) (*node, unix.Errno) {
	p, errno := w.free(path)
	if errno != 0 {
		return nil, errno
	}
	n := newNode(mode, uid, gid)
	p.set(n)
	return n, 0
}

func (w *world) open(path string, flags int, mode, uid, gid uint32) (*node, unix.Errno) {
	const exclusive = unix.O_CREAT | unix.O_EXCL
	p, errno := w.walk(path, flags&unix.O_NOFOLLOW == 0 && flags&exclusive != exclusive)
	n := p.node
	writes := flags&(unix.O_ACCMODE|unix.O_TRUNC) != 0
	switch {
	case errno != 0:
		return nil, errno
	case n == nil && flags&unix.O_CREAT == 0:
		return nil, unix.ENOENT
	case n == nil:
		n = newNode(unix.S_IFREG|mode, uid, gid)
		p.set(n)
	case flags&exclusive == exclusive:
		return nil, unix.EEXIST
	case n.is(unix.S_IFLNK):
		return nil, unix.ELOOP
	case n.is(unix.S_IFDIR):
		if flags&unix.O_CREAT != 0 || writes {
			return nil, unix.EISDIR
		}
	case flags&unix.O_DIRECTORY != 0:
		return nil, unix.ENOTDIR
	case !n.is(unix.S_IFREG):
		return nil, unix.ENXIO
	case flags&unix.O_TRUNC != 0:
		n.resize(0)
	}
	return n, 0
}

func (n *node) resize(size int) {
	n.mtime = nil
	if size <= len(n.data) {
		n.data = n.data[:size]
	} else {
		n.data += string(make([]byte, size-len(n.data)))
	}
}

// write does what pwrite(2) does.
func (n *node) write(b []byte, at int) {
	n.resize(max(len(n.data), at+len(b)))
	n.data = n.data[:at] + string(b) + n.data[at+len(b):]
}

func (w *world) rename(from, to string) unix.Errno {
	src, errno := w.walk(from, false)
	if errno != 0 {
		return errno
	}
	dst, errno := w.walk(to, false)
	switch {
	case errno != 0:
		return errno
	case src.node == nil:
		return unix.ENOENT
	case src.node.above(dst.dir):
		return unix.EINVAL
	case dst.node != nil && dst.node.above(src.dir):
		return unix.ENOTEMPTY
	case dst.node == src.node: // the same name, or another of the same inode
		return 0
	}
	if dst.node != nil {
		switch isDir := src.node.is(unix.S_IFDIR); {
		case isDir && !dst.node.is(unix.S_IFDIR):
			return unix.ENOTDIR
		case !isDir && dst.node.is(unix.S_IFDIR):
			return unix.EISDIR
		case len(dst.node.entries) > 0:
			return unix.ENOTEMPTY
		}
		dst.node.nlink--
	}
	src.set(nil)
	dst.set(src.node)
	return 0
}

// above reports whether dir is n, or below it.
func (n *node) above(dir *node) bool {
	if n == dir {
		return true
	}
	for _, e := range n.entries {
		if e.above(dir) {
			return true
		}
	}
	return false
}

func (w *world) remove(path string) unix.Errno {
	p, errno := w.walk(path, false)
	switch {
	case errno != 0:
		return errno
	case p.node == nil:
		return unix.ENOENT
	case len(p.node.entries) > 0:
		return unix.ENOTEMPTY
	}
	p.node.nlink--
	p.set(nil)
	return 0
}

// compare reads the tree on the host and returns its first difference from n,
// nil if there is none.
func (n *node) compare(path string, kind fsKind, ids IDs, seen map[uint64]*node) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	st.Uid, st.Gid = ids.guest(st.Uid), ids.guest(st.Gid)
	if err := n.matches(&st, kind); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if other := seen[st.Ino]; other != nil && other != n {
		return fmt.Errorf("%s is inode %d, as another one", path, st.Ino)
	}
	seen[st.Ino] = n
	xattrs, err := readXattrs(path)
	if err != nil || !maps.Equal(xattrs, n.xattrs) {
		return fmt.Errorf("%s has attributes %q (%v), want %q", path, xattrs, err, n.xattrs)
	}
	switch {
	case n.is(unix.S_IFLNK):
		if to, err := os.Readlink(path); err != nil || to != n.data {
			return fmt.Errorf("%s leads to %q (%v), want %q", path, to, err, n.data)
		}
	case n.is(unix.S_IFREG):
		if b, err := os.ReadFile(path); err != nil || string(b) != n.data {
			return fmt.Errorf("%s holds %.80q (%v), want %.80q", path, b, err, n.data)
		}
	case n.is(unix.S_IFDIR):
		entries, err := os.ReadDir(path)
		if err != nil {
			return err
		}
		if err := n.listed(entries); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for name, e := range n.entries {
			if err := e.compare(filepath.Join(path, name), kind, ids, seen); err != nil {
				return err
			}
		}
	}
	return nil
}

// matches compares the attributes of an inode with n. The first call sets n.ino.
func (n *node) matches(st *unix.Stat_t, kind fsKind) error {
	if n.ino == 0 {
		n.ino = st.Ino
	}
	size := st.Size
	if n.is(unix.S_IFREG) || n.is(unix.S_IFLNK) {
		size = int64(len(n.data))
	}
	const format = "mode %o, owner %d:%d, %d links, rdev %x, %d bytes, inode %d"
	got := fmt.Sprintf(format,
		st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev, st.Size, st.Ino)
	want := fmt.Sprintf(format,
		n.mode, n.uid, n.gid, n.links(kind), n.rdev, size, n.ino)
	if got != want {
		return fmt.Errorf("%s; want %s", got, want)
	}
	if t := n.mtime; t != nil && *t != (codec.Time{Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}) {
		return fmt.Errorf("modified at %v, want %v", st.Mtim, *t)
	}
	return nil
}

// listed compares the entries of a directory with those of n.
func (n *node) listed(entries []fs.DirEntry) error {
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(got)
	if want := slices.Sorted(maps.Keys(n.entries)); !slices.Equal(got, want) {
		return fmt.Errorf("lists %q, want %q", got, want)
	}
	return nil
}

func readXattrs(path string) (map[string]string, error) {
	xattrs, b := map[string]string{}, make([]byte, 65536)
	n, err := unix.Llistxattr(path, b)
	if err != nil {
		return nil, err
	}
	for name := range strings.FieldsFuncSeq(string(b[:n]), func(r rune) bool { return r == 0 }) {
		n, err := unix.Lgetxattr(path, name, b)
		if err != nil {
			return nil, err
		}
		xattrs[name] = string(b[:n])
	}
	return xattrs, nil
}

package supervisor

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// QEMU's user may often write to the directory that a socket or a pidfile is
// in, and can exchange names there between any two system calls. So nothing is
// made, given away or removed under such a name: that happens in a directory
// inside that only this user can enter, and names are moved there and back.

// errInUse tells that another process has locked a private directory.
var errInUse = errors.New("in use by a running process")

// fileID identifies a file as long as something refers to it.
type fileID struct {
	dev, ino uint64
	kind     uint32 // S_IFMT
}

func idOf(dir int, name string) (fileID, error) {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
	return fileID{uint64(st.Dev), st.Ino, st.Mode & unix.S_IFMT}, err
}

// is tells that dir/name is the file id.
func (id fileID) is(dir int, name string) bool {
	other, err := idOf(dir, name)
	return err == nil && other == id
}

// privateDir is a directory that only this user can enter, inside one that
// others may write to. It is locked while it is open.
type privateDir struct {
	parent int // not owned
	name   string
	fd     int // owned
	id     fileID
}

// aside is the name in a private directory of what has been moved there.
const aside = "aside"

// openPrivate opens parent/name and makes it if there is none. The caller
// checks what is inside: another directory of this user may have been moved to
// the name.
func openPrivate(parent int, name string) (*privateDir, error) {
	unix.Umask(0o077) // from here on: this process makes nothing for others
	for range 100 {
		err := unix.Mkdirat(parent, name, 0o700)
		if err != nil && err != unix.EEXIST {
			return nil, fmt.Errorf("make a directory in it: %w", err)
		}
		p := &privateDir{parent: parent, name: name}
		p.fd, err = unix.Openat(parent, name,
			unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT || err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open %s in it: %w", name, err)
		}
		if err := p.check(); err != nil {
			unix.Close(p.fd)
			return nil, err
		}
		// A helper that has ended meanwhile has removed the directory.
		if p.there() {
			return p, nil
		}
		unix.Close(p.fd)
	}
	return nil, fmt.Errorf("%s is removed or exchanged again and again", name)
}

// tempPrivate makes a private directory with a name of its own beside base.
func tempPrivate(parent int, base string) (*privateDir, error) {
	p, err := openPrivate(parent, fmt.Sprintf(".%.200s.%s", base, rand.Text()))
	if err != nil {
		return nil, err
	}
	if names, err := p.names(); err != nil || len(names) > 0 {
		unix.Close(p.fd)
		return nil, fmt.Errorf("%s is exchanged", p.name)
	}
	return p, nil
}

// check verifies that nobody else can enter the directory, and locks it: only
// processes that can enter it can.
func (p *privateDir) check() error {
	var st unix.Stat_t
	if err := unix.Fstat(p.fd, &st); err != nil {
		return err
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s exists and is not a directory of this program, "+
			"which only its user can enter: remove it", p.name)
	}
	p.id = fileID{uint64(st.Dev), st.Ino, unix.S_IFDIR}
	// Some network file systems lock no directories. A live socket is found there
	// all the same.
	if err := unix.Flock(p.fd, unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return errInUse
	}
	return nil
}

// there tells that the directory still has its name.
func (p *privateDir) there() bool { return p.id.is(p.parent, p.name) }

// names returns what is in the directory.
func (p *privateDir) names() ([]string, error) {
	fd, err := unix.Openat(p.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), p.name)
	defer f.Close()
	return f.Readdirnames(-1)
}

// discard removes dir/name, which is in the same file system, if it is the file
// id: moved here and looked at once more, as another file may have got the name
// meanwhile. That one is put back.
func (p *privateDir) discard(dir int, name string, id fileID) error {
	if !id.is(dir, name) {
		return nil
	}
	if err := rename(dir, name, p.fd, aside, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	if id.is(p.fd, aside) {
		return unix.Unlinkat(p.fd, aside, 0)
	}
	return p.putBack(aside, dir, name)
}

// putBack gives what somebody else has put at dir/name, and is here as from,
// its name back, or another one if that is taken.
func (p *privateDir) putBack(from string, dir int, name string) error {
	err := rename(p.fd, from, dir, name, unix.RENAME_NOREPLACE)
	if err == unix.EEXIST {
		other := name + "." + rand.Text()
		if err = rename(p.fd, from, dir, other, unix.RENAME_NOREPLACE); err == nil {
			return fmt.Errorf("%s is exchanged all the time: what was there is %s now", name, other)
		}
	}
	if err != nil {
		return fmt.Errorf("put %s back, which is %s in %s now: %w", name, from, p.name, err)
	}
	return nil
}

// remove removes the directory, if it is empty, and unlocks it.
func (p *privateDir) remove() {
	// An empty directory that gets the name at this moment goes as well: whoever
	// can give it the name can remove it.
	if p.there() {
		unix.Unlinkat(p.parent, p.name, unix.AT_REMOVEDIR)
	}
	unix.Close(p.fd)
}

// rename is renameat2, or renameat where the file system knows no flags.
func rename(oldDir int, oldName string, newDir int, newName string, flags uint) error {
	err := unix.Renameat2(oldDir, oldName, newDir, newName, flags)
	if err == unix.EINVAL && flags == unix.RENAME_NOREPLACE {
		if _, err := idOf(newDir, newName); err == nil {
			return unix.EEXIST
		}
		return unix.Renameat(oldDir, oldName, newDir, newName)
	}
	return err
}

// openDir opens the directory of a name to work in.
func openDir(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open the directory", Path: path, Err: err}
	}
	return fd, nil
}

// checkOutside tells that path, a name in dir, is not in the export, whose
// guests would own the name. What can't be found out is no error.
func checkOutside(path string, dir int, export *os.File) error {
	mounts, err := readMounts()
	if err != nil {
		return nil
	}
	exported, mine := mounts.locate(int(export.Fd())), mounts.locate(dir)
	if exported == nil || mine == nil {
		return nil
	}
	trees := []mount{*exported}
	for _, m := range mounts {
		if within(m.point, exported.point) {
			trees = append(trees, m)
		}
	}
	for _, tree := range trees {
		if tree.dev == mine.dev && within(mine.root, tree.root) {
			return fmt.Errorf("%s is inside the export %s, where guests can replace it: "+
				"choose a name outside, or do without one (--fd)", path, export.Name())
		}
	}
	return nil
}

// mount is a directory tree of a file system and where it is seen.
type mount struct {
	dev   string // the file system
	root  string // the directory's path in that
	point string // the directory's path here
}

// mounts are those of this process, by their number.
type mounts map[string]mount

func readMounts() (mounts, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	unescape := strings.NewReplacer(
		`\040`, " ", `\011`, "\t", `\012`, "\n", `\043`, "#", `\134`, `\`)
	all := mounts{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			all[f[0]] = mount{f[2], unescape.Replace(f[3]), unescape.Replace(f[4])}
		}
	}
	return all, nil
}

// locate returns where an open directory is, nil if that is unknown.
func (all mounts) locate(fd int) *mount {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return nil
	}
	path, err := os.Readlink(fdPath(fd))
	if err != nil {
		return nil
	}
	_, id, _ := strings.Cut(string(info), "mnt_id:")
	id, _, _ = strings.Cut(strings.TrimSpace(id), "\n")
	m, ok := all[id]
	if !ok || !within(path, m.point) {
		return nil
	}
	return &mount{m.dev, filepath.Join(m.root, path[len(m.point):]), path}
}

// within tells that path is dir or below it; both are clean and absolute.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

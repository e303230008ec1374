package sandbox

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mounts are an exported directory's mounts as this process has them.
type Mounts struct {
	// All are the mount that the directory is on, and those below the directory
	// that a path from there reaches.
	All []*mountinfo.Info
	// Gone means that the directory was removed, or its mount was unmounted: no
	// copy can be made.
	Gone bool
}

// Covered returns the mounts of All that guests must not reach.
func (m *Mounts) Covered() (mounts []*mountinfo.Info) {
	for _, i := range m.All {
		if covers(i.FSType) {
			mounts = append(mounts, i)
		}
	}
	return mounts
}

// Equal tells that nothing was mounted, unmounted or remounted in between.
func (m *Mounts) Equal(other *Mounts) bool { return m.text() == other.text() }

func (m *Mounts) text() string {
	var b strings.Builder
	for _, i := range m.All {
		fmt.Fprintf(&b, "%d %d %q %q %s %s %s\n",
			i.ID, i.Parent, i.Root, i.Mountpoint, i.Options, i.FSType, i.VFSOptions)
	}
	return b.String()
}

// MountsOf looks at the mounts of an exported directory. It asks the kernel's list
// alone, and so waits for no file system. The directory may be closed meanwhile.
func MountsOf(dir *os.File) (*Mounts, error) {
	raw, err := dir.SyscallConn()
	if err != nil {
		return nil, err
	}
	var m *Mounts
	closed := raw.Control(func(fd uintptr) { m, err = mountsOf(int(fd)) })
	if closed != nil {
		return nil, os.ErrClosed
	}
	return m, err
}

func mountsOf(fd int) (*Mounts, error) {
	id, err := mountID(fd)
	if err != nil {
		return nil, err
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	if removed(fd, dir) {
		return &Mounts{Gone: true}, nil
	}
	info, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer info.Close()
	return readMounts(info, id, dir)
}

// readMounts reads a mountinfo, for a directory on the mount id.
func readMounts(info io.Reader, id int, dir string) (*Mounts, error) {
	below := strings.TrimSuffix(dir, "/") + "/"
	var root *mountinfo.Info
	children := map[int][]*mountinfo.Info{}
	_, err := mountinfo.GetMountsFromReader(info, func(i *mountinfo.Info) (skip, stop bool) {
		switch {
		case i.ID == id:
			root = i
		case strings.HasPrefix(i.Mountpoint, below) && i.Mountpoint != below:
			children[i.Parent] = append(children[i.Parent], i)
		}
		return true, false
	})
	if err != nil {
		return nil, fmt.Errorf("read the list of mounts: %w", err)
	}
	if root == nil {
		return &Mounts{Gone: true}, nil
	}
	m := &Mounts{All: []*mountinfo.Info{root}}
	for _, i := range children[id] {
		m.add(i, children)
	}
	return m, nil
}

// add adds a mount and those on it. If one lies on its root no path leads to
// anything else on it.
func (m *Mounts) add(i *mountinfo.Info, children map[int][]*mountinfo.Info) {
	for _, above := range children[i.ID] {
		if above.Mountpoint == i.Mountpoint {
			m.add(above, children)
			return
		}
	}
	m.All = append(m.All, i)
	for _, child := range children[i.ID] {
		m.add(child, children)
	}
}

// mountID returns the number of the mount that a descriptor is on. It is asked of
// /proc, as statx asks the file system.
func mountID(fd int) (int, error) {
	name := fmt.Sprintf("/proc/self/fdinfo/%d", fd)
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(id))
		}
	}
	return 0, fmt.Errorf("%s has no mnt_id", name)
}

// removed tells that a directory, which /proc has this name of, is removed.
func removed(fd int, name string) bool {
	if !strings.HasSuffix(name, " (deleted)") {
		return false
	}
	var is, named unix.Stat_t // it may just be called so
	return unix.Lstat(name, &named) != nil || unix.Fstat(fd, &is) != nil ||
		is.Dev != named.Dev || is.Ino != named.Ino
}

// CheckExport refuses a directory on one of the kernel's file systems. It asks the
// file system, and may wait for it.
func CheckExport(dir *os.File) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return nil // requests get the same
	}
	if name, covered := coveredMagic(uint32(st.Type)); covered {
		return needsFiles(dir, name)
	}
	return nil
}

// check refuses mounts that can't be covered. It finds also what the magic number
// does not tell.
func (c Config) check(dir *os.File, m *Mounts) error {
	for _, i := range m.Covered() {
		if i == m.All[0] {
			return needsFiles(dir, i.FSType)
		}
		if c.Sandbox != SandboxNamespace {
			return fmt.Errorf("--sandbox=%s can't cover the mount of %s at %q, "+
				"through which guests "+
				"would reach the host: unmount it, or use --sandbox=namespace",
				c.Sandbox, i.FSType, i.Mountpoint)
		}
	}
	return nil
}

func needsFiles(dir *os.File, filesystem string) error {
	return fmt.Errorf("--path: export %s: it is on %s, through which guests would reach the host: "+
		"export a directory on a file system with files of its own", dir.Name(), filesystem)
}

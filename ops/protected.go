package ops

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// Sysctls are the kernel's settings that an open through /proc/self/fd gets
// round, so that they are obeyed here: what the files in a sticky directory
// are protected from. 1 is for directories that anybody may write to, 2 also
// for those that a group may write to.
type Sysctls struct {
	ProtectedRegular int // fs.protected_regular
	ProtectedFIFOs   int // fs.protected_fifos
}

// strictest is what a setting counts as that can't be read: /proc/sys is hidden
// from many services (ProcSubset=pid, mount -o subset=pid).
const strictest = 2

// ReadSysctls reads what is set now; before the process is sandboxed, as it
// sees /proc/sys no more then.
func ReadSysctls() (s Sysctls, err error) {
	for name, value := range map[string]*int{
		"protected_regular": &s.ProtectedRegular,
		"protected_fifos":   &s.ProtectedFIFOs,
	} {
		b, err := os.ReadFile("/proc/sys/fs/" + name)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			*value = strictest
			continue
		}
		if err == nil {
			*value, err = strconv.Atoi(string(bytes.TrimSpace(b)))
		}
		if err != nil {
			return s, fmt.Errorf("sysctl fs.%s: %w", name, err)
		}
	}
	return s, nil
}

// mayCreate is EACCES where O_CREAT must not get the file that is there: the
// one under an O_PATH descriptor, which c.stat describes. Somebody may have put
// it into a sticky directory for whoever thinks to make it.
func (fs *FS) mayCreate(c *Call, fd int) unix.Errno {
	file, level := c.stat, 1 // the kernel lets no device or socket be had this way
	switch file.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return 0
	case unix.S_IFREG:
		level = fs.sysctls.ProtectedRegular
	case unix.S_IFIFO:
		level = fs.sysctls.ProtectedFIFOs
	}
	if level == 0 || file.Uid == c.uid {
		return 0
	}
	errno := fs.statParent(c, fd)
	dir := c.stat
	c.stat = file
	switch {
	case errno == unix.ENAMETOOLONG: // so deep that nothing but this helper gets there
		return 0
	case errno != 0:
		return errno
	case dir.Mode&unix.S_ISVTX == 0 || dir.Uid == file.Uid:
		return 0
	case dir.Mode&0o002 != 0 || dir.Mode&0o020 != 0 && level >= 2:
		return unix.EACCES
	}
	return 0
}

// statParent fills c.stat with the directory of the file under an O_PATH
// descriptor, which c.stat describes before. It is ENOENT if the file is moved
// meanwhile.
func (fs *FS) statParent(c *Call, fd int) unix.Errno {
	file := c.stat
	path := make([]byte, unix.PathMax+1)
	n, errno := readlinkat(fs.fds, c.nameOf(fd), path[:unix.PathMax])
	if errno != 0 {
		return errno
	}
	slash := bytes.LastIndexByte(path[:n], '/')
	if slash < 0 {
		return unix.ENOENT
	}
	name := codec.CString(path[slash+1 : n+1])
	parent, errno := openPath(append(bytes.Clone(path[:slash]), "/\x00"...), unix.O_DIRECTORY)
	if errno != 0 {
		return errno
	}
	defer closefd(parent)
	errno = fstatat(parent, name.Pointer(), &c.stat, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errno != 0:
		return errno
	case c.stat.Ino != file.Ino || c.stat.Dev != file.Dev:
		return unix.ENOENT
	}
	return fstat(parent, &c.stat)
}

package sandbox_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// The server holds no descriptor that leads out of the export: neither at rest
// nor after it has served, nor one that came with its start.
func TestServerDescriptors(t *testing.T) {
	for _, mode := range []string{"namespace", "chroot", "none"} {
		t.Run(mode, func(t *testing.T) {
			p, name := listen(t, export(t), "--sandbox="+mode)
			c := helpertest.Dial(t, name)
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
			server := p.Server()
			for fd := range helpertest.FDs(t, server) {
				if what := leads(t, server, fd); what != "" {
					t.Errorf("descriptor %d: %s", fd, what)
				}
			}
		})
	}
}

// leads says what is wrong with a descriptor of a process.
func leads(t *testing.T, pid, fd int) string {
	t.Helper()
	link := fmt.Sprintf("/proc/%d/fd/%d", pid, fd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	to, err := os.Readlink(link)
	if err == nil {
		err = unix.Stat(link, &st)
	}
	if err == nil {
		err = unix.Statfs(link, &fs)
	}
	if err != nil {
		return "" // it is closed by now
	}
	where := fmt.Sprintf("%s, mode %o, device %d, inode %d, file system %#x", to, st.Mode, st.Dev, st.Ino, fs.Type)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFSOCK, unix.S_IFIFO:
		return "" // connections, the control, the log
	case unix.S_IFCHR:
		if st.Rdev == unix.Mkdev(1, 3) && fd < 3 {
			return ""
		}
	case unix.S_IFDIR:
		var fds unix.Stat_t
		err := unix.Stat(fmt.Sprintf("/proc/%d/fd", pid), &fds)
		if err == nil && fs.Type == unix.PROC_SUPER_MAGIC && fds.Ino == st.Ino {
			return "" // its own descriptors
		}
	case unix.S_IFREG:
		if strings.HasPrefix(to, "/memfd:") || fd < 3 { // the log of a test is a file
			return ""
		}
	case 0: // eventfd, epoll
		if strings.HasPrefix(to, "anon_inode:[event") {
			return ""
		}
	}
	return where
}

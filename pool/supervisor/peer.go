package supervisor

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// peer is the other end of a connection, at the time of connect.
type peer struct {
	attrs []any // for the log: the process, its user and its machine
	// key is the same for connections that share what there is: those of a machine
	// that a manager such as libvirt runs, else those of a process. It is empty for
	// a process of another PID namespace.
	key string
}

// peerOf returns the other end of a connection. Its process is told by the number
// in the supervisor's PID namespace.
func peerOf(fd int) peer {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return peer{}
	}
	p := peer{attrs: []any{"pid", cred.Pid, "uid", cred.Uid}}
	if cred.Pid == 0 { // of another PID namespace
		return p
	}
	p.key = fmt.Sprint("process ", cred.Pid)
	if f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", cred.Pid)); err == nil {
		defer f.Close()
		if scope := machineScope(f); scope != "" {
			p.key = scope
			p.attrs = append(p.attrs, "machine", scope)
		}
	}
	return p
}

// machineScope returns the machine's scope in /proc/PID/cgroup, if that has one:
// "machine-qemu\x2d1\x2dvm.scope". It is the outermost, as a user may make such
// a name in a part of the tree that is the user's.
func machineScope(cgroups io.Reader) string {
	const most = 64 << 10 // of a file with some 15 lines
	lines := bufio.NewScanner(io.LimitReader(cgroups, most))
	for lines.Scan() {
		// number:controllers:path
		f := strings.SplitN(lines.Text(), ":", 3)
		if len(f) < 3 {
			continue
		}
		for name := range strings.SplitSeq(f[2], "/") {
			if strings.HasPrefix(name, "machine-") && strings.HasSuffix(name, ".scope") {
				return name
			}
		}
	}
	return ""
}

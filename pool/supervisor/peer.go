package supervisor

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// peerAttrs says which process a connection comes from, for the log: its number,
// its user and, if a machine manager such as libvirt runs it, its machine. The
// number is that at the time of connect, and in the supervisor's PID namespace.
func peerAttrs(fd int) []any {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil
	}
	attrs := []any{"pid", cred.Pid, "uid", cred.Uid}
	if cred.Pid == 0 { // of another PID namespace
		return attrs
	}
	if f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", cred.Pid)); err == nil {
		defer f.Close()
		if scope := machineScope(f); scope != "" {
			attrs = append(attrs, "machine", scope)
		}
	}
	return attrs
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

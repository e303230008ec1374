package sandbox

import (
	"fmt"
	"math"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// Descriptors lets this process and those that it starts have n descriptors
// each, or as many as the hard limit allows, and returns how many that are. More
// than the hard limit takes CAP_SYS_RESOURCE, so it is to be called before
// DropSupervisorPrivileges.
func Descriptors(n uint64) (uint64, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("getrlimit: %w", err)
	}
	more := unix.Rlimit{Cur: max(limit.Cur, n), Max: max(limit.Max, n)}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &more) == nil {
		return more.Cur, nil
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("setrlimit: %w", err)
	}
	return limit.Cur, nil
}

// Threads returns an error, with what raises the limit, if this process and
// its servers may not have n threads. It looks at files of the host and
// is to be called before DropSupervisorPrivileges, never by a server.
func (c Config) Threads(n uint64) error {
	return threads("", n, !isHostRoot() || c.UIDs != nil && first(c.UIDs).HostID != 0)
}

// threads is Threads with the host's files below root. user means that the limit of
// a user's processes counts.
func threads(root string, n uint64, user bool) error {
	limits := append(pidsMax(root), threadLimit{
		readNumber(root + "/proc/sys/kernel/threads-max"), "sysctl kernel.threads-max",
	})
	var nproc unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &nproc); err == nil && user {
		limits = append(limits, threadLimit{
			nproc.Cur, "ulimit -u, for all processes of this user; systemd: LimitNPROC=",
		})
	}
	least := limits[0]
	for _, l := range limits[1:] {
		if l.threads < least.threads {
			least = l
		}
	}
	if least.threads >= n {
		return nil
	}
	return fmt.Errorf("%d threads are allowed, %d may be needed: raise the limit (%s) or lower "+
		"--max-connections and --workers", least.threads, n, least.raisedBy)
}

// threadLimit is a limit of threads, and what raises it.
type threadLimit struct {
	threads  uint64
	raisedBy string
}

// pidsMax returns the limits of this process' cgroup and of those above it. In a
// container only the lower ones are in sight.
func pidsMax(root string) (limits []threadLimit) {
	const remedy = "the cgroup's pids.max; systemd: TasksMax=, docker: --pids-limit"
	b, err := os.ReadFile(root + "/proc/self/cgroup")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // number, controllers, path
		if len(f) != 3 || f[1] != "" && f[1] != "pids" {
			continue
		}
		top := path.Join(root, "/sys/fs/cgroup", f[1])
		for dir := path.Join("/", f[2]); ; dir = path.Dir(dir) {
			n := readNumber(path.Join(top, dir, "pids.max"))
			limits = append(limits, threadLimit{n, remedy})
			if dir == "/" {
				break
			}
		}
	}
	return limits
}

// readNumber returns the number in a file, the highest one if there is none.
func readNumber(name string) uint64 {
	b, err := os.ReadFile(name)
	if err != nil {
		return math.MaxUint64
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil { // "max"
		return math.MaxUint64
	}
	return n
}

// isHostRoot reports whether this process' user is the host's root, which the
// kernel lets have any number of processes, and not an ordinary one or one that
// is root only in a user namespace.
func isHostRoot() bool {
	uids, err := user.CurrentProcessUIDMap()
	if err != nil {
		return false
	}
	root, _ := user.IdentityMapping{UIDMaps: uids}.RootPair()
	return os.Getuid() == 0 && root == 0
}

package sandbox

import (
	"fmt"
	"os"
	"slices"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// The lists name calls as amd64 does. Another architecture is supported if
// otherNames says what it lacks: a name that is missing unexpectedly would be
// found by a killed server, at a request.

// otherNames are, for each architecture that a filter can be made for, the names
// of calls that the library has otherwise there; "" for one that does not exist.
var otherNames = map[string]map[string]string{
	"amd64": {},
	"arm64": {
		"newfstatat": "fstatat",
		// Their successors are on the lists, too, and the only ones in use.
		"access": "", "arch_prctl": "", "epoll_wait": "", "poll": "",
	},
}

// runtimeCalls are what Go, and with cgo the C library, needs once it runs.
var runtimeCalls = []string{
	"brk", "clock_gettime", "clock_nanosleep", "close", "exit", "exit_group", "futex", "getpid",
	"getrandom", "gettid", "madvise", "mincore", "munmap", "nanosleep", "restart_syscall", "rseq",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
	"set_robust_list", "sigaltstack",
	"epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "pipe2", "poll", "ppoll",
	"read", "write", "fcntl", "fstat",
}

// serviceCalls are a connection's: the control to the supervisor, frames, answers.
var serviceCalls = []string{"recvmmsg", "recvmsg", "sendmmsg", "sendmsg", "shutdown"}

// fileCalls are what requests do (package ops), and as whom.
var fileCalls = []string{
	"chdir", "fchdir", "fchmodat", "fchownat", "lgetxattr", "linkat", "llistxattr", "lremovexattr",
	"lsetxattr", "mkdirat", "mknodat", "name_to_handle_at", "newfstatat", "openat", "readlinkat",
	"renameat", "renameat2", "statfs", "symlinkat", "truncate", "unlinkat", "utimensat",
	"capset", "setresgid", "setresuid",
}

// startCalls are what it takes beside the above to start a process, to confine
// a server, and to own a socket's name.
var startCalls = []string{
	"arch_prctl", "access", "capget", "chroot", "close_range", "dup", "dup3", "execve", "execveat",
	"faccessat", "faccessat2", "fallocate", "ftruncate", "getcwd", "getdents64", "getegid",
	"geteuid", "getgid", "getppid", "getrlimit", "getsockname", "getsockopt", "getuid", "lseek",
	"memfd_create", "mount", "mount_setattr", "move_mount", "mremap", "open_tree", "openat2",
	"pidfd_open", "pidfd_send_signal", "pivot_root", "pread64", "prlimit64", "pwrite64",
	"seccomp", "set_tid_address", "setgid", "setgroups", "setpgid", "setrlimit", "setsid",
	"setuid", "sysinfo", "tgkill",
	"umask", "umount2", "uname", "unshare",
	"kill", "wait4", "waitid",
	"accept4", "bind", "connect", "flock", "inotify_add_watch", "inotify_init1", "inotify_rm_watch",
	"listen", "sendto", "socket", "socketpair", "tkill",
	"clone", "ioctl", "mmap", "mprotect", "prctl", "setsockopt",
}

// serverCalls is what a server may do once it is confined.
func serverCalls(goarch string) ([]seccomp.SyscallGroup, error) {
	names := [][]string{runtimeCalls, serviceCalls, fileCalls}
	return list(goarch, names, []seccomp.NameWithConditions{
		// Threads, no processes.
		only("clone", condition(0, seccomp.BitsSet, unix.CLONE_THREAD)),
		// No memory becomes code.
		only("mmap", condition(2, seccomp.BitsNotSet, unix.PROT_EXEC)),
		only("mprotect", condition(2, seccomp.BitsNotSet, unix.PROT_EXEC)),
		// Signals to its own threads.
		only("tgkill", equal(0, uint64(os.Getpid()))),
		// FS_IOC_GETVERSION. The kernel looks at 32 bits alone.
		only("ioctl", equal(1, 0x80087601)),
		// Go names its memory; a thread of a turn sets its own slack.
		only("prctl", equal(0, unix.PR_SET_VMA)),
		only("prctl", equal(0, unix.PR_SET_TIMERSLACK)),
		// A connection's.
		only("setsockopt", equal(1, unix.SOL_SOCKET), equal(2, unix.SO_RCVTIMEO)),
		only("setsockopt", equal(1, unix.SOL_SOCKET), equal(2, unix.SO_SNDBUF)),
		// A thread's own working directory.
		only("unshare", equal(0, unix.CLONE_FS)),
	})
}

// supervisorCalls is what the supervisor may do, and no server more than that.
func supervisorCalls(goarch string) ([]seccomp.SyscallGroup, error) {
	return list(goarch, [][]string{runtimeCalls, serviceCalls, fileCalls, startCalls}, nil)
}

// list lets these calls pass. clone3 keeps its arguments where no filter sees
// them: the C library takes clone if there is none.
func list(goarch string, names [][]string, conditions []seccomp.NameWithConditions) (
	[]seccomp.SyscallGroup, error) {
	other, ok := otherNames[goarch]
	known, err := arch.GetInfo(goarch)
	if !ok || err != nil {
		return nil, fmt.Errorf("no list of system calls for %s, only for amd64 and arm64: "+
			"--seccomp=none does without", goarch)
	}
	local := func(name string) (string, error) {
		there, renamed := other[name]
		if !renamed {
			there = name
		}
		if _, ok := known.SyscallNames[there]; !ok && there != "" {
			return "", fmt.Errorf("list of system calls: %s has no %s", goarch, name)
		}
		return there, nil
	}
	allow := seccomp.SyscallGroup{Action: seccomp.ActionAllow}
	for _, name := range slices.Concat(names...) {
		there, err := local(name)
		if err != nil {
			return nil, err
		}
		if there != "" {
			allow.Names = append(allow.Names, there)
		}
	}
	for _, c := range conditions {
		if c.Name, err = local(c.Name); err != nil {
			return nil, err
		}
		allow.NamesWithCondtions = append(allow.NamesWithCondtions, c)
	}
	return []seccomp.SyscallGroup{
		allow,
		{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}},
	}, nil
}

func only(name string, conditions ...seccomp.Condition) seccomp.NameWithConditions {
	return seccomp.NameWithConditions{Name: name, Conditions: conditions}
}

func condition(argument uint32, op seccomp.Operation, value uint64) seccomp.Condition {
	return seccomp.Condition{Argument: argument, Operation: op, Value: value}
}

func equal(argument uint32, value uint64) seccomp.Condition {
	return condition(argument, seccomp.Equal, value)
}

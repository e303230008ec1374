package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Seccomp is what comes of a system call that is not on the list (syscalls.go).
type Seccomp string

const (
	// SeccompKill: in the server, it is not made, and Supervise tells of it, so
	// that the server is killed. In the supervisor it is not made: ENOSYS.
	SeccompKill Seccomp = "kill"
	// SeccompLog: it is made. Supervise tells of the server's, the kernel's
	// audit log of the supervisor's.
	SeccompLog Seccomp = "log"
	// SeccompNone: there is no list.
	SeccompNone Seccomp = "none"
)

// Valid tells whether a user's word is one of the above.
func (s Seccomp) Valid() bool {
	return s == SeccompKill || s == SeccompLog || s == SeccompNone
}

// unlisted marks the default action in a program until it is known. As a
// verdict it means ENOSYS where no tracer is, and gives way to a notification:
// a server is under its supervisor's filter as well as its own, and the kernel
// takes the verdict that comes first in seccomp(2)'s order.
const unlisted = seccomp.ActionTrace

// filterServer puts all threads under the server's list, and returns what the
// kernel tells of other calls by. The thread that makes one waits in it.
func (c Config) filterServer() (*os.File, error) {
	if c.Seccomp == SeccompNone {
		return nil, nil
	}
	fd, err := filter(serverCalls, unix.SECCOMP_RET_USER_NOTIF,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH)
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "violations"), nil
}

// filterSupervisor puts all threads, and the servers that they start, under the
// supervisor's list.
func (c Config) filterSupervisor() error {
	verdict := uint32(unlisted)
	switch c.Seccomp {
	case SeccompNone:
		return nil
	case SeccompLog:
		verdict = unix.SECCOMP_RET_LOG
	}
	_, err := filter(supervisorCalls, verdict, 0)
	return err
}

// filter puts all threads of the process under a list: what is not on it gets
// the verdict.
func filter(calls func(goarch string) ([]seccomp.SyscallGroup, error),
	verdict uint32, flags uintptr) (int, error) {
	list, err := calls(runtime.GOARCH)
	if err != nil {
		return -1, err
	}
	policy := seccomp.Policy{DefaultAction: unlisted, Syscalls: list}
	program, err := policy.Assemble()
	if err != nil {
		return -1, fmt.Errorf("list of system calls: %w", err)
	}
	for i := range program {
		if program[i] == bpf.Instruction(bpf.RetConstant{Val: uint32(unlisted)}) {
			program[i] = bpf.RetConstant{Val: verdict}
		}
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return -1, fmt.Errorf("list of system calls: %w", err)
	}
	// The other threads get it with the filter.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("set no_new_privs: %w", err)
	}
	prog := unix.SockFprog{
		Len:    uint16(len(raw)),
		Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(raw))),
	}
	// Nothing here is to run slower for the sake of code that it does not run.
	flags |= unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP,
		unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w: "+
			"if this system allows no filters, --seccomp=none does without", errno)
	}
	return int(fd), nil
}

// Supervise tells of each system call that is not on the server's list, until
// no thread of the server is left; listener is its Inside.Violations, which it
// closes. The thread that has made one waits until the server is killed, or
// with SeccompLog goes on; it is told once for each call then.
func (c Config) Supervise(listener *os.File, violated func(call string)) {
	defer listener.Close()
	fd := int(listener.Fd())
	var told []string
	for {
		n, err := nextNotification(fd)
		if err != nil {
			return
		}
		name := n.call()
		if c.Seccomp != SeccompLog {
			violated(name)
			continue
		}
		if !slices.Contains(told, name) {
			told = append(told, name)
			violated(name)
		}
		answerNotification(fd, &notifyResponse{
			id:    n.id,
			flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE,
		})
	}
}

// notification is struct seccomp_notif, notifyResponse is struct
// seccomp_notif_resp of linux/seccomp.h.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type notifyResponse struct {
	id    uint64
	val   int64
	error int32
	flags uint32
}

// nextNotification waits for one; an error says that there are no more.
func nextNotification(fd int) (*notification, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return nil, err
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return nil, errors.New("nobody is under the filter any more")
		}
		n := &notification{}
		switch errno := ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(n)); errno {
		case 0:
			return n, nil
		case unix.EINTR, unix.ENOENT: // the thread has been killed meanwhile
		default:
			return nil, errno
		}
	}
}

// answerNotification lets the thread go on. One that is gone is nobody's loss.
func answerNotification(fd int, r *notifyResponse) {
	ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(r))
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	return errno
}

// call names the system call.
func (n *notification) call() string {
	own, err := arch.GetInfo("")
	if err != nil || uint32(own.ID) != n.arch {
		return fmt.Sprintf("number %d of architecture %#x", n.nr, n.arch)
	}
	if name, ok := own.SyscallNumbers[int(n.nr)]; ok {
		return name
	}
	return fmt.Sprintf("number %d", n.nr)
}

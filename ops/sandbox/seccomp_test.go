package sandbox

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

const childEnv = "CONFINE_TEST_CHILD"

func init() { // the tests outside the package have TestMain
	if mode := os.Getenv(childEnv); mode != "" {
		filteredChild(mode)
		os.Exit(0)
	}
}

// attempt is a system call with arguments that harm nothing, should it be made.
type attempt struct {
	name string
	args [6]uintptr
}

const noFD = ^uintptr(0)

// attempts are all calls that the list does not name, and those that it names
// with other arguments than it lets pass.
func attempts() []attempt {
	pages := uintptr(os.Getpagesize())
	list := []attempt{
		{"clone", [6]uintptr{unix.CLONE_VM | unix.CLONE_VFORK}},
		{"mmap", [6]uintptr{0, pages, unix.PROT_READ | unix.PROT_EXEC, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, noFD}},
		{"mprotect", [6]uintptr{0, pages, unix.PROT_EXEC}},
		{"tgkill", [6]uintptr{uintptr(os.Getppid()), uintptr(os.Getppid())}},
		{"ioctl", [6]uintptr{noFD, unix.TIOCSTI}},
		{"prctl", [6]uintptr{unix.PR_SET_DUMPABLE, 1}},
		{"setsockopt", [6]uintptr{noFD, unix.SOL_SOCKET, unix.SO_DEBUG}},
		{"unshare", [6]uintptr{unix.CLONE_NEWUSER}},
	}
	known, err := arch.GetInfo("")
	if err != nil {
		panic(err)
	}
	named := []string{
		"clone3",              // the list answers it itself
		"uretprobe", "uprobe", // the kernel lets them by filters: they kill whoever makes them
	}
	for _, group := range mustList(serverCalls(runtime.GOARCH)) {
		named = append(named, group.Names...)
		for _, c := range group.NamesWithCondtions {
			named = append(named, c.Name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(known.SyscallNames)) {
		if !slices.Contains(named, name) {
			list = append(list, attempt{name, [6]uintptr{noFD, noFD, noFD, noFD, noFD, noFD}})
		}
	}
	return list
}

// filteredChild is the child of the tests below: it hands its violations to
// the parent, tries what is not on the list, and prints "name: errno" for each.
func filteredChild(mode string) {
	calls := attempts()
	// Threads that are there before the filter are under it, too.
	work, done := make(chan attempt), make(chan unix.Errno)
	go func() {
		runtime.LockOSThread()
		for a := range work {
			_, _, errno := unix.RawSyscall6(number(a.name),
				a.args[0], a.args[1], a.args[2], a.args[3], a.args[4], a.args[5])
			done <- errno
		}
	}()
	listener, err := Config{Seccomp: Seccomp(mode)}.filterServer()
	if err != nil {
		panic(err)
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(listener.Fd())), nil, 0); err != nil {
		panic(err)
	}
	if Seccomp(mode) == SeccompLog {
		calls = []attempt{{name: "getsid"}, {name: "getsid"}, {name: "getppid"}}
	}
	for _, a := range calls {
		work <- a
		fmt.Printf("%s: %d\n", a.name, <-done)
	}
	_, _, errno := unix.RawSyscall(number("clone3"), 0, 0, 0)
	fmt.Printf("clone3: %d\n", errno)
}

func number(name string) uintptr {
	known, err := arch.GetInfo("")
	if err != nil {
		panic(err)
	}
	return uintptr(known.SyscallNames[name])
}

// startFiltered starts the child, and returns what its violations are told by
// and what it has printed in the end.
func startFiltered(t *testing.T, mode Seccomp) (listener *os.File, output func() string) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	defer theirs.Close()
	defer unix.Close(fds[0])
	var out, errors strings.Builder
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{childEnv + "=" + string(mode)}
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stdout, cmd.Stderr = &out, &errors
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	// Before Linux 6.11 its listener hangs up only when the child has been waited for.
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	oob := make([]byte, unix.CmsgSpace(4))
	if _, _, _, _, err := unix.Recvmsg(fds[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		<-ended
		t.Fatalf("the child has sent nothing: %v, %s", err, errors.String())
	}
	got, err := unix.ParseUnixRights(&cmsgs[0])
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(got[0]), "violations"), func() string {
		if err := <-ended; err != nil {
			t.Errorf("the child: %v, %s", err, errors.String())
		}
		return out.String()
	}
}

// CVE-2018-16359 was a filter that let through what it was to stop. Every call
// of the architecture that is not on the list is told of and not made.
func TestCVE2018_16359TheFilterFilters(t *testing.T) {
	listener, output := startFiltered(t, SeccompKill)
	defer listener.Close()
	const verdict = unix.EUNATCH // no call says that by itself
	var told []string
	for {
		n, err := nextNotification(int(listener.Fd()))
		if err != nil {
			break
		}
		told = append(told, n.call())
		answerNotification(int(listener.Fd()), &notifyResponse{id: n.id, error: -int32(verdict)})
	}
	want := attempts()
	if len(want) < 200 {
		t.Fatalf("only %d calls to try", len(want))
	}
	printed := output()
	lines := strings.Split(printed, "\n")
	for i, a := range want {
		if !slices.Contains(told, a.name) {
			t.Errorf("%s: not told", a.name)
		}
		if !slices.Contains(lines, fmt.Sprintf("%s: %d", a.name, int(verdict))) {
			t.Errorf("attempt %d, %s: made", i, a.name)
		}
	}
	slices.Sort(told)
	if told = slices.Compact(told); len(told) != len(want) { // one that a signal interrupts is told twice
		t.Errorf("%d violations told of %d", len(told), len(want))
	}
	if !strings.Contains(printed, fmt.Sprintf("clone3: %d\n", int(unix.ENOSYS))) {
		t.Error("clone3 is there")
	}
}

func TestSeccompLog(t *testing.T) {
	listener, output := startFiltered(t, SeccompLog)
	var told []string
	Config{Seccomp: SeccompLog}.Supervise(listener, func(call string) { told = append(told, call) })
	if want := []string{"getsid", "getppid"}; !slices.Equal(told, want) {
		t.Errorf("told of %q, want %q", told, want)
	}
	if got, want := output(), "getsid: 0\ngetsid: 0\ngetppid: 0\nclone3: 38\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func mustList(list []seccomp.SyscallGroup, err error) []seccomp.SyscallGroup {
	if err != nil {
		panic(err)
	}
	return list
}

// Each call of the lists exists on each architecture that is claimed, or is
// said to be missing there; the numbers are those of the kernel's headers.
func TestArchitectures(t *testing.T) {
	for goarch, numbers := range map[string]map[string]int{
		"amd64": {"newfstatat": 262, "openat": 257, "recvmmsg": 299, "sendmmsg": 307, "renameat": 264},
		"arm64": {"fstatat": 79, "openat": 56, "recvmmsg": 243, "sendmmsg": 269, "renameat": 38},
	} {
		known, err := arch.GetInfo(goarch)
		if err != nil {
			t.Fatal(err)
		}
		for what, calls := range map[string]func(string) ([]seccomp.SyscallGroup, error){
			"server": serverCalls, "supervisor": supervisorCalls,
		} {
			list, err := calls(goarch)
			if err != nil {
				t.Errorf("%s: %s: %v", goarch, what, err)
				continue
			}
			for name, number := range numbers {
				if !slices.Contains(list[0].Names, name) || known.SyscallNames[name] != number {
					t.Errorf("%s: the %s's %s is not on its list as number %d", goarch, what, name, number)
				}
			}
		}
	}
	for _, goarch := range []string{"riscv64", "ppc64le", "s390x", "386", "arm", "mips64"} {
		if _, err := serverCalls(goarch); err == nil || !strings.Contains(err.Error(), "--seccomp=none") {
			t.Errorf("%s: %v", goarch, err)
		}
	}
	if _, err := list("arm64", [][]string{{"epoll_create"}}, nil); err == nil {
		t.Error("a call that arm64 lacks is left out without a word")
	}
}

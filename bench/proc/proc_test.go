package proc

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// childEnv makes this binary a child that does what its value says, then says
// so on stdout and waits for the end of stdin.
const childEnv = "PROC_TEST_CHILD"

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		said := child(what)
		fmt.Println(said)
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const memfdSize = 8 << 20

func child(what string) (said any) {
	switch what {
	case "burn": // 30 ms on a thread that ends
		done := make(chan int64)
		go func() {
			runtime.LockOSThread()
			if unix.Gettid() == unix.Getpid() { // which never ends: let another goroutine be locked to another
				go func() { runtime.LockOSThread(); done <- burn() }()
				select {}
			}
			done <- burn()
		}()
		return <-done
	case "inherit": // map descriptor 3 and touch it, with a child that does, too
		if err := touch(3); err != nil {
			return err
		}
		if os.Getenv("PROC_TEST_LAST") == "" {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "PROC_TEST_LAST=1")
			cmd.ExtraFiles = []*os.File{os.NewFile(3, "memfd")}
			cmd.Stdin = os.Stdin
			out, _ := cmd.StdoutPipe()
			if err := cmd.Start(); err != nil {
				return err
			}
			line, _ := bufio.NewReader(out).ReadString('\n')
			return strings.TrimSpace(line)
		}
		return "touched"
	}
	return "what?"
}

// burn returns the CPU time that this thread has used.
func burn() (used int64) {
	for used < 30e6 {
		var t unix.Timespec
		unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
		used = t.Nano()
	}
	return used
}

func touch(fd int) error {
	b, err := unix.Mmap(fd, 0, memfdSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	return nil
}

// start returns a child that has done what it was to do, and what it said.
func start(t *testing.T, what string, files ...*os.File) (pid int, said string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+what)
	cmd.ExtraFiles = files
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	said, err = bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid, strings.TrimSpace(said)
}

// The time of a thread that has ended belongs to its process, to the
// nanosecond.
func TestCPUTimeOfEndedThreads(t *testing.T) {
	pid, said := start(t, "burn")
	var burnt float64
	if _, err := fmt.Sscan(said, &burnt); err != nil {
		t.Fatal(said)
	}
	if got := CPUTime([]int{pid}); !(got >= burnt) {
		t.Errorf("%v ns, of which one thread that has ended used %v", got, burnt)
	}
	if got := CPUTime([]int{pid, 1 << 22}); !math.IsNaN(got) {
		t.Errorf("with a process that isn't there: %v", got)
	}
}

// What two processes share counts once: a memory file too, whoever maps it.
func TestMemoryCountsSharedOnce(t *testing.T) {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "memfd")
	defer file.Close()
	if err := file.Truncate(memfdSize); err != nil {
		t.Fatal(err)
	}
	parent, said := start(t, "inherit", file)
	if said != "touched" {
		t.Fatal(said)
	}
	pids := Descendants([]int{parent})
	if len(pids) != 2 || pids[0] != parent {
		t.Fatalf("descendants: %v", pids)
	}
	both, bare := MemoryOf(pids), MemoryOf([]int{parent})
	if both.RSS < 2*memfdSize || both.PSS < memfdSize || both.PSS > both.RSS-memfdSize {
		t.Errorf("both: %+v", both)
	}
	// One of two that map it has it whole: it can't be had without.
	if bare.PSS < memfdSize || bare.PageTables <= 0 || bare.Threads < 2 {
		t.Errorf("one: %+v", bare)
	}
	// And who only holds it open has it, too.
	if self := MemoryOf([]int{os.Getpid()}); self.PSS < memfdSize {
		t.Errorf("holder: %+v", self)
	}
	if gone := MemoryOf([]int{1 << 22}); !math.IsNaN(gone.PSS) {
		t.Errorf("nobody: %+v", gone)
	}
	if n := Descriptors([]int{parent}); n < 4 {
		t.Errorf("%d descriptors", n)
	}
	if !slices.Contains(Descendants([]int{os.Getpid()}), pids[1]) {
		t.Error("a grandchild is no descendant")
	}
}

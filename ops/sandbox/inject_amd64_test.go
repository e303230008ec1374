package sandbox_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// inject has a sleeping thread of a process make a system call, as code that
// an attacker runs there would.
func inject(t *testing.T, pid int, call uint64) {
	t.Helper()
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	tid := sleeping(t, pid)
	if err := unix.PtraceSeize(tid); err != nil {
		t.Fatal(err)
	}
	defer unix.PtraceDetach(tid)
	if err := unix.PtraceInterrupt(tid); err != nil {
		t.Fatal(err)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(tid, &status, unix.WALL, nil); err != nil || !status.Stopped() {
		t.Fatalf("thread %d: %v, %#x", tid, err, status)
	}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		t.Fatal(err)
	}
	regs.Rip -= 2 // the instruction before is the system call that it sleeps in
	regs.Rax = call
	regs.Orig_rax = ^uint64(0) // which is not to go on
	if err := unix.PtraceSetRegs(tid, &regs); err != nil {
		t.Fatal(err)
	}
}

func sleeping(t *testing.T, pid int) int {
	t.Helper()
	found := 0
	helpertest.Eventually(t, "a thread sleeps in a system call", func() bool {
		for tid, call := range helpertest.Syscalls(pid) {
			if strings.HasPrefix(call, fmt.Sprint(unix.SYS_FUTEX, " ")) {
				found = tid
			}
		}
		return found != 0
	})
	return found
}

// A server that makes a call which is not on its list is killed and named, and
// its VMs go on with the next one.
func TestViolation(t *testing.T) {
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{})
		c := h.Dial()
		c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
		for call, number := range map[string]uint64{
			"socket": unix.SYS_SOCKET, "execve": unix.SYS_EXECVE, "ptrace": unix.SYS_PTRACE,
		} {
			server := h.Server()
			inject(t, server, number)
			helpertest.Eventually(t, "the call is named", func() bool {
				return h.Logged(fmt.Sprintf("call=%s pid=%d", call, server))
			})
			helpertest.Eventually(t, "there is another server", func() bool { return h.Server() != server })
			c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
		}
	})
}

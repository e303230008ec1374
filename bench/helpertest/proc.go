package helpertest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"virtfs-proxy-helper/bench/proc"
)

// Children returns the processes whose parent is pid.
func Children(pid int) []int { return proc.Children(pid) }

// With returns the processes that have arg, whole, among their arguments.
func With(arg string) (pids []int) {
	for _, p := range processes() {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
		for a := range strings.SplitSeq(string(cmdline), "\x00") {
			if a == arg {
				pids = append(pids, p)
				break
			}
		}
	}
	return pids
}

func processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// statFields returns the fields of /proc/PID/stat, of which proc(5) has number
// n at n-1; nil if there is no such process.
func statFields(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	name := strings.LastIndexByte(string(b), ')')
	return append([]string{strconv.Itoa(pid), ""}, strings.Fields(string(b[name+1:]))...)
}

// Session returns the session of a process and its controlling terminal, 0 if
// it has none.
func Session(tb testing.TB, pid int) (session, tty int) {
	tb.Helper()
	f := statFields(pid)
	if f == nil {
		tb.Fatalf("no process %d", pid)
	}
	session, _ = strconv.Atoi(f[5])
	tty, _ = strconv.Atoi(f[6])
	return session, tty
}

// Status returns the fields of /proc/PID/status, or of a thread's, which has
// its path below /proc.
func Status(tb testing.TB, dir string) map[string]string {
	tb.Helper()
	m, err := status(dir)
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

func status(dir string) (map[string]string, error) {
	return fields(filepath.Join("/proc", dir, "status"))
}

// fields returns the lines "name: value" of a file.
func fields(path string) (map[string]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		m[k] = strings.TrimSpace(v)
	}
	return m, nil
}

// RSS returns the bytes that a process has in memory. The sum in its status is
// wrong before Linux 6.2, by up to 64 pages for each thread.
func RSS(tb testing.TB, pid int) int {
	tb.Helper()
	m, err := fields(filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup"))
	if err != nil {
		tb.Fatal(err)
	}
	var kb int
	if _, err := fmt.Sscanf(m["Rss"], "%d kB", &kb); err != nil {
		tb.Fatalf("Rss of %d: %v", pid, err)
	}
	return kb << 10
}

// FDs returns where the descriptors of a process lead.
func FDs(tb testing.TB, pid int) map[int]string {
	tb.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		tb.Fatal(err)
	}
	m := map[int]string{}
	for _, e := range entries {
		n, _ := strconv.Atoi(e.Name())
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			m[n] = to
		}
	}
	return m
}

// Threads returns what /proc/PID/task/TID/status says of each thread of a
// process. One that ends meanwhile is left out.
func Threads(tb testing.TB, pid int) map[string]map[string]string {
	tb.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		tb.Fatal(err)
	}
	threads := map[string]map[string]string{}
	for _, e := range entries {
		if st, err := status(fmt.Sprintf("%d/task/%s", pid, e.Name())); err == nil {
			threads[e.Name()] = st
		}
	}
	return threads
}

// Syscalls returns the system call that each thread of a process sleeps in, as
// "NUMBER 0xARGUMENT..." of proc(5), or "running".
func Syscalls(pid int) (calls map[int]string) {
	calls = map[int]string{}
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, e := range entries {
		tid, _ := strconv.Atoi(e.Name())
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/syscall", pid, tid))
		if err == nil {
			calls[tid] = strings.TrimSuffix(string(b), "\n")
		}
	}
	return calls
}

// CPU returns the time that a process has spent on CPUs.
func CPU(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	const tick = time.Second / 100 // USER_HZ
	var sum time.Duration
	f := statFields(pid)
	if len(f) < 15 {
		tb.Fatalf("process %d has ended", pid)
	}
	for _, field := range f[13:15] { // utime, stime
		n, err := strconv.Atoi(field)
		if err != nil {
			tb.Fatalf("/proc/%d/stat: %v", pid, err)
		}
		sum += time.Duration(n) * tick
	}
	return sum
}

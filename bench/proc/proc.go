// Package proc measures other processes: CPU time, memory, threads, descriptors.
package proc

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Descendants returns the processes roots and all that descend from them, as
// they are now, zombies left out.
func Descendants(roots []int) []int {
	children := children()
	all := slices.Clone(roots)
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// Children returns the processes whose parent is pid, zombies left out.
func Children(pid int) []int { return children()[pid] }

func children() map[int][]int {
	children := map[int][]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // the process has ended
		}
		// pid (comm) state ppid: comm may hold anything, but the last ) ends it
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if ppid, err := strconv.Atoi(fields[1]); err == nil && fields[0] != "Z" {
			children[ppid] = append(children[ppid], pid)
		}
	}
	return children
}

// CPUTime returns the CPU time in nanoseconds that the processes have used
// until now: user and system, all threads, those that have ended too. It is
// NaN if one of them is gone.
//
// For a thread that is running on another CPU the kernel returns the time of the
// last timer tick, up to 4 ms ago. For an exact value, call CPUTime when the
// processes sleep.
func CPUTime(pids []int) float64 {
	sum := 0.0
	for _, pid := range pids {
		var t unix.Timespec
		// A process's clock is numbered so by the kernel's ABI:
		// clock_getcpuclockid(3) computes the same.
		if err := unix.ClockGettime(int32(^pid<<3|2), &t); err != nil {
			return math.NaN()
		}
		sum += float64(t.Nano())
	}
	return sum
}

// Memory is the memory of processes, in bytes.
type Memory struct {
	RSS float64 // resident memory; a page counts once for each process that maps it
	// PSS counts each page once: a page that several processes map is divided
	// among them. Memory files (memfd_create) count once and whole, mapped or
	// not, as long as a process has them open or mapped.
	PSS        float64
	PageTables float64 // page tables in the kernel, which RSS and PSS do not include
	Threads    int
}

// MemoryOf adds up the memory of the processes; NaN if one of them is gone.
func MemoryOf(pids []int) (m Memory) {
	memfds := map[uint64]float64{} // by inode
	for _, pid := range pids {
		if err := m.add(pid, memfds); err != nil {
			return Memory{math.NaN(), math.NaN(), math.NaN(), 0}
		}
	}
	for _, size := range memfds {
		m.PSS += size
	}
	return m
}

func (m *Memory) add(pid int, memfds map[uint64]float64) error {
	dir := fmt.Sprintf("/proc/%d/", pid)
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		switch name, value, _ := strings.Cut(line, ":"); name {
		case "VmPTE":
			m.PageTables += kibibytes(value)
		case "Threads":
			n, _ := strconv.Atoi(strings.TrimSpace(value))
			m.Threads += n
		}
	}
	fds, err := filepath.Glob(dir + "fd/*")
	if err != nil {
		return err
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && isMemfd(to) {
			noteMemfd(fd, memfds)
		}
	}
	maps, err := os.Open(dir + "smaps")
	if err != nil {
		return err
	}
	defer maps.Close()
	memfd := false
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		switch {
		case strings.Contains(name, "-") && strings.Contains(name, " "):
			// START-END PERMS OFFSET MAJOR:MINOR INODE PATH
			fields := strings.Fields(lines.Text())
			memfd = len(fields) > 5 && isMemfd(fields[5])
			if memfd {
				noteMemfd(dir+"map_files/"+fields[0], memfds)
			}
		case name == "Rss":
			m.RSS += kibibytes(value)
		case name == "Pss" && !memfd:
			m.PSS += kibibytes(value)
		}
	}
	return lines.Err()
}

func isMemfd(path string) bool { return strings.HasPrefix(path, "/memfd:") }

func noteMemfd(path string, memfds map[uint64]float64) {
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil {
		memfds[st.Ino] = float64(st.Blocks) * 512
	}
}

// kibibytes reads "123 kB".
func kibibytes(s string) float64 {
	digits := strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(s), "kB"))
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return math.NaN()
	}
	return n * 1024
}

// Descriptors returns the number of open descriptors of the processes, -1 if one
// of them is gone.
func Descriptors(pids []int) (n int) {
	for _, pid := range pids {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return -1
		}
		n += len(entries)
	}
	return n
}

var faults = regexp.MustCompile(`panic|DATA RACE|fatal error|goroutine \d+ \[`)

// Faults returns the part of a Go program's output that begins with the first
// line of a fault.
func Faults(output string) string {
	if at := faults.FindStringIndex(output); at != nil {
		return output[strings.LastIndexByte(output[:at[0]], '\n')+1:]
	}
	return ""
}

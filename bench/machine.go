package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// placement says on which CPUs clients and servers run.
type placement struct {
	name           string
	client, server int
}

const anyCPU = -1

func placements(names []string) (list []placement, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	var cpus []int
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	for _, name := range names {
		switch {
		case name == "unpinned":
			list = append(list, placement{name, anyCPU, anyCPU})
		case name == "shared":
			list = append(list, placement{name, cpus[len(cpus)-1], cpus[len(cpus)-1]})
		case name == "split" && len(cpus) > 1:
			list = append(list, placement{name, cpus[0], cpus[len(cpus)-1]})
		case name == "split":
			return nil, errors.New("placement split needs two CPUs")
		default:
			return nil, fmt.Errorf("no placement %q: there are split, shared, unpinned", name)
		}
	}
	return list, nil
}

// pinThread pins the calling thread to cpu, unless that is anyCPU.
func pinThread(cpu int) error {
	if cpu == anyCPU {
		return nil
	}
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}

// claimThread locks the calling goroutine to its thread for good, and makes
// the thread fit to block in system calls that are not announced to Go's
// scheduler: the scheduler's preemption signal would interrupt them.
func claimThread(cpu int) error {
	runtime.LockOSThread()
	var set unix.Sigset_t
	set.Val[0] = 1 << (unix.SIGURG - 1)
	return errors.Join(unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil), pinThread(cpu))
}

// descendants returns the processes roots and all that descend from them, as
// they are now.
func descendants(roots []int) []int {
	children := map[int][]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		// pid (comm) state ppid: comm may hold anything, but the last ) ends it
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if ppid, err := strconv.Atoi(fields[1]); err == nil {
			children[ppid] = append(children[ppid], pid)
		}
	}
	all := slices.Clone(roots)
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// cpuTime returns the CPU time in nanoseconds that the processes have used
// until now: user and system, all threads, those that have ended too. It is
// NaN if one of them is gone.
func cpuTime(pids []int) float64 {
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

// residentSize returns the memory, in bytes, that is resident in the processes.
func residentSize(pids []int) float64 {
	pages := 0.0
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		fields := strings.Fields(string(text))
		if err != nil || len(fields) < 2 {
			return math.NaN()
		}
		n, _ := strconv.ParseFloat(fields[1], 64)
		pages += n
	}
	return pages * float64(os.Getpagesize())
}

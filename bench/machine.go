package main

import (
	"errors"
	"fmt"
	"runtime"

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

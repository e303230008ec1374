package main

import (
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// floorArg stands before a helper's arguments when bench itself is started as
// the floor.
const floorArg = "--serve-floor"

// serveFloor measures the lower bound of every helper's latency: it reads each
// request once and answers it with a constant LSTAT answer.
func serveFloor(fd int) error {
	if err := claimThread(anyCPU); err != nil {
		return err
	}
	debug.SetGCPercent(-1) // a collection would wait forever for this thread in a raw system call
	buf := make([]byte, 4096)
	answer := codec.AppendStat(nil, &unix.Stat_t{})
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READ,
			uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		if e == 0 && n > 0 {
			_, _, e = unix.RawSyscall(unix.SYS_WRITE,
				uintptr(fd), uintptr(unsafe.Pointer(&answer[0])), uintptr(len(answer)))
		} else if e == 0 {
			return nil
		}
		if e != 0 && e != unix.EINTR {
			return e
		}
	}
}

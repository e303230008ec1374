package pool

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// prepareSocket makes fd a blocking socket whose recv waits for sleepFor at
// most. With a timeout a signal interrupts recv for sure (signal(7)), which
// the Go runtime relies on when it wants to stop a thread in a raw call.
func prepareSocket(fd int) error {
	if err := unix.SetNonblock(fd, false); err != nil {
		return err
	}
	tv := unix.NsecToTimeval(sleepFor.Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// recv is recv(2), as a raw call: it does not announce itself to the
// scheduler, so the thread keeps its processor while it waits.
//
// The rules for a raw call that waits: it ends on a signal, and what follows
// is a point where the goroutine can be stopped.
func recv(fd int, room []byte, flags int) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(room))), uintptr(len(room)), uintptr(flags), 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(n), 0
}

// readable waits until bytes or the end of the stream have come; false when
// nothing has within d, or the wait was interrupted for long.
func readable(fd int, d time.Duration) bool {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds[:], int(d.Milliseconds()))
		if err != unix.EINTR {
			return n > 0
		}
	}
}

// sender sends answers. Its fields are what sendmsg takes, kept from one
// answer to the next.
type sender struct {
	msg unix.Msghdr
	iov unix.Iovec
	oob struct {
		hdr unix.Cmsghdr
		fd  int32
		_   int32
	}
}

// send sends an answer, with the descriptor fd in the same message unless it
// is -1. The descriptor goes with the first byte. A client that does not read
// is waited for, on this thread alone.
func (s *sender) send(sock int, b []byte, fd int) unix.Errno {
	s.msg = unix.Msghdr{Iov: &s.iov}
	s.msg.SetIovlen(1)
	if fd >= 0 {
		s.oob.hdr = unix.Cmsghdr{Level: unix.SOL_SOCKET, Type: unix.SCM_RIGHTS}
		s.oob.hdr.SetLen(unix.CmsgLen(4))
		s.oob.fd = int32(fd)
		s.msg.Control = (*byte)(unsafe.Pointer(&s.oob))
		s.msg.SetControllen(unix.CmsgSpace(4))
	}
	for len(b) > 0 {
		s.iov.Base = unsafe.SliceData(b)
		s.iov.SetLen(len(b))
		n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(sock), uintptr(unsafe.Pointer(&s.msg)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if errno == unix.EAGAIN {
			n, _, errno = unix.Syscall(unix.SYS_SENDMSG, uintptr(sock), uintptr(unsafe.Pointer(&s.msg)), unix.MSG_NOSIGNAL)
		}
		switch errno {
		case 0:
			b = b[n:]
			s.msg.Control = nil
			s.msg.SetControllen(0)
		case unix.EINTR:
		default:
			return errno
		}
	}
	return 0
}

package main

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// request is one frame to send and the answer that is expected to it.
type request struct {
	frame []byte
	op    int // whose latency it is: index into the workload's names
	typ   codec.Type
	errno unix.Errno
	size  int // of a successful answer's payload; anySize if it isn't known
}

const anySize = -1

// client is one connection and the thread that drives it as QEMU does. For
// each request it writes the frame, blocks until the answer's header is there,
// and reads header and payload (a descriptor's answer: one recvmsg of 4
// bytes): three system calls, and two readings of the clock around them.
// Checking the answer, closing a descriptor and the loop come after the second
// reading. Percentiles are made of the samples when the chunk is over.
type client struct {
	fd      int
	cpu     int           // to run on, or anyCPU
	stagger time.Duration // so that the requests of sparse clients don't come in bursts
	work    chan job

	began, ended int64 // of the last job, by nanotime
	err          error // ended the connection
	wrong        int   // answers of another kind than expected
	firstWrong   string

	buf  [codec.MaxFrame]byte
	oob  [64]byte
	iov  unix.Iovec
	msg  unix.Msghdr
	seen struct { // the first wrong answer, to be put in words after the job
		req   *request
		errno unix.Errno
		size  int
	}
}

type job struct {
	requests []request
	pause    time.Duration // before each request
	elapsed  []int64       // nanoseconds of each request; nil if nobody wants to know
	done     *sync.WaitGroup
}

// nanotime is the monotonic clock without the chance to be preempted that lies
// in time.Since: it would fall between the answer and the second reading.
//
//go:linkname nanotime runtime.nanotime
func nanotime() int64

func newClient(fd, cpu int, stagger time.Duration) *client {
	c := &client{fd: fd, cpu: cpu, stagger: stagger, work: make(chan job)}
	c.iov.Base = &c.buf[0]
	c.iov.SetLen(4)
	c.msg.Iov = &c.iov
	c.msg.Iovlen = 1
	go c.loop()
	return c
}

// loop does jobs until work is closed. Its thread is locked, and ends with it,
// because of what is changed about it here.
func (c *client) loop() {
	c.err = claimThread(c.cpu)
	for j := range c.work {
		if c.err == nil {
			if j.pause > 0 {
				time.Sleep(c.stagger)
			}
			c.err = c.exchange(j.requests, j.pause, j.elapsed)
			c.describeWrong()
		}
		j.done.Done()
	}
	unix.Close(c.fd)
}

// exchange sends the requests, one at a time. Nothing that it calls before it
// returns can yield the thread or allocates: a yield of a locked thread costs
// two context switches. So the answers are parsed by hand here, and there is
// no time limit: the program that the client belongs to shuts the socket down.
func (c *client) exchange(requests []request, pause time.Duration, elapsed []int64) error {
	nap := unix.NsecToTimespec(int64(pause))
	for i := range requests {
		r := &requests[i]
		if pause > 0 {
			unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&nap)), 0, 0)
		}
		start := nanotime()
		if i == 0 {
			c.began = start
		}
		n, _, e := unix.RawSyscall(unix.SYS_WRITE, uintptr(c.fd), uintptr(unsafe.Pointer(&r.frame[0])), uintptr(len(r.frame)))
		if e != 0 || int(n) != len(r.frame) {
			return fmt.Errorf("sending %v: %w", r.typ, e)
		}
		size, errno, received := 0, unix.Errno(0), -1
		if r.typ == codec.Open || r.typ == codec.Create {
			if e = c.receiveFD(); e == 0 {
				c.ended = nanotime()
				if v := int32(binary.NativeEndian.Uint32(c.buf[:])); v != codec.FDFollows {
					errno = unix.Errno(-v)
				}
				if c.msg.Controllen >= uint64(unix.SizeofCmsghdr)+4 {
					received = int(int32(binary.NativeEndian.Uint32(c.oob[unix.SizeofCmsghdr:])))
				} else if errno == 0 {
					errno = unix.EBADF // success without a descriptor
				}
			}
		} else if e = c.receive(0, codec.HeaderSize); e == 0 {
			size = int(binary.NativeEndian.Uint32(c.buf[4:]))
			if size > codec.MaxPayload {
				e = unix.EMSGSIZE
			} else {
				e = c.receive(codec.HeaderSize, size)
			}
			c.ended = nanotime()
			if codec.Type(binary.NativeEndian.Uint32(c.buf[:])) != codec.Success {
				errno = unix.Errno(-int32(binary.NativeEndian.Uint32(c.buf[codec.HeaderSize:])))
			}
		}
		if e != 0 {
			return fmt.Errorf("waiting for the answer to %v: %w", r.typ, e)
		}
		if elapsed != nil {
			elapsed[i] = c.ended - start
		}
		if received >= 0 {
			unix.RawSyscall(unix.SYS_CLOSE, uintptr(received), 0, 0)
		}
		if errno != r.errno || errno == 0 && r.size != anySize && size != r.size {
			if c.wrong == 0 {
				c.seen.req, c.seen.errno, c.seen.size = r, errno, size
			}
			c.wrong++
		}
	}
	return nil
}

// receive reads n bytes into buf at off. ECONNRESET also stands for an end of
// file.
//
//go:nosplit
//go:norace
func (c *client) receive(off, n int) unix.Errno {
	for end := off + n; off < end; {
		n, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(c.fd), uintptr(unsafe.Pointer(&c.buf[0]))+uintptr(off), uintptr(end-off))
		switch {
		case e == unix.EINTR:
		case e != 0:
			return e
		case n == 0:
			return unix.ECONNRESET
		default:
			off += int(n)
		}
	}
	return 0
}

// receiveFD reads 4 bytes into buf, and the descriptor that came with them
// into oob.
//
//go:nosplit
//go:norace
func (c *client) receiveFD() unix.Errno {
	for {
		c.msg.Control = &c.oob[0]
		c.msg.Controllen = uint64(len(c.oob))
		n, _, e := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.msg)), unix.MSG_CMSG_CLOEXEC)
		switch {
		case e == unix.EINTR:
		case e != 0:
			return e
		case n != 4:
			return unix.ECONNRESET
		default:
			return 0
		}
	}
}

func (c *client) describeWrong() {
	if r := c.seen.req; r != nil && c.firstWrong == "" {
		var q codec.Request
		q.Decode(r.typ, append([]byte(nil), r.frame[codec.HeaderSize:]...))
		c.firstWrong = fmt.Sprintf("%v %q answered errno %d with %d bytes, expected errno %d with %d",
			r.typ, q.Path, c.seen.errno, c.seen.size, r.errno, r.size)
	}
}

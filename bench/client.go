package main

import (
	"errors"
	"fmt"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/qemu"
	"virtfs-proxy-helper/codec"
)

// request is one frame to send and the answer that is expected to it.
type request struct {
	frame []byte
	op    int // index into the workload's ops, for the latency
	typ   codec.Type
	errno unix.Errno
	size  int // size of a successful answer's payload; anySize if unknown
}

const anySize = -1

// client is one connection and the thread that drives it as QEMU does: see
// package qemu. A request takes three system calls, and two readings of the
// clock around them. Checking the answer, closing a descriptor and the loop
// come after the second reading. Percentiles are computed from the samples at
// the end of the chunk.
type client struct {
	qemu    *qemu.Client
	cpu     int           // the CPU to run on, or anyCPU
	stagger time.Duration // delay before sparse requests, so that clients don't send in bursts
	work    chan job

	began, ended int64 // start and end of the last job, by nanotime
	err          error // the error that ended the connection
	wrong        int   // answers of another kind than expected
	firstWrong   string

	seen struct { // the first wrong answer; describeWrong formats it after the job
		req   *request
		errno unix.Errno
		size  int
	}
}

type job struct {
	requests []request
	pause    time.Duration // before each request
	elapsed  []int64       // nanoseconds of each request; nil if not needed
	done     *sync.WaitGroup
}

// nanotime reads the monotonic clock. Unlike time.Since, it is no point at which
// the goroutine can be preempted, between the answer and the second reading.
//
//go:linkname nanotime runtime.nanotime
func nanotime() int64

func newClient(fd, cpu int, stagger time.Duration) *client {
	c := &client{qemu: qemu.NewBlocking(fd), cpu: cpu, stagger: stagger, work: make(chan job)}
	go c.loop()
	return c
}

// loop does jobs until work is closed. claimThread changes attributes of the
// thread, so loop locks it, and it ends with loop.
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
	c.qemu.Close()
}

// exchange sends the requests, one at a time. Nothing that it calls before it
// returns yields the thread or allocates, and there is no time limit: the
// program that the client belongs to shuts the connection down.
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
		if err := c.qemu.Send(r.frame); err != nil {
			return fmt.Errorf("sending %v: %w", r.typ, err)
		}
		err := c.qemu.Read(r.typ)
		c.ended = nanotime()
		if err != nil {
			return fmt.Errorf("waiting for the answer to %v: %w", r.typ, err)
		}
		if elapsed != nil {
			elapsed[i] = c.ended - start
		}
		a, err := c.qemu.Answer(r.typ)
		if err != nil {
			if !errors.Is(err, qemu.ErrDescriptor) {
				return fmt.Errorf("the answer to %v: %w", r.typ, err)
			}
			a.Errno = unix.EBADF
		}
		if a.FD >= 0 {
			unix.RawSyscall(unix.SYS_CLOSE, uintptr(a.FD), 0, 0)
		}
		size := len(a.Payload)
		if a.Errno != r.errno || a.Errno == 0 && r.size != anySize && size != r.size {
			if c.wrong == 0 {
				c.seen.req, c.seen.errno, c.seen.size = r, a.Errno, size
			}
			c.wrong++
		}
	}
	return nil
}

func (c *client) describeWrong() {
	if r := c.seen.req; r != nil && c.firstWrong == "" {
		var q codec.Request
		q.Decode(r.typ, append([]byte(nil), r.frame[codec.HeaderSize:]...))
		c.firstWrong = fmt.Sprintf("%v %q answered errno %d with %d bytes, "+
			"expected errno %d with %d",
			r.typ, q.Path, c.seen.errno, c.seen.size, r.errno, r.size)
	}
}

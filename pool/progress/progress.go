// Package progress is memory in which servers say how far they are, so that the
// supervisor can tell a server that serves from one that does not, and which
// request hangs.
//
// The supervisor makes it once, and every server maps it: it outlives servers.
// There is a record for each connection, and for each epoll loop of the last few
// servers. A record takes a cache line; most of it is free for statistics.
//
// # Trust
//
// Servers write, the supervisor reads, and each server may write anything
// anywhere in it. So it holds numbers only: nothing that a system call follows,
// no length, no offset. A server takes nothing from it, the supervisor no more
// than what to log and whether a server's own loops move.
package progress

import (
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// MaxLoops is how many loops of a server have a record.
const MaxLoops = 64

// servers is how many servers have records of loops at the same time: those that
// hand over, and the current one.
const servers = 8

const (
	recordSize = 64
	connsAt    = servers * MaxLoops * recordSize // offset of the first connection's record
)

// Create returns the memory for n connections. It can't change its size.
func Create(n int) (*os.File, error) {
	fd, err := unix.MemfdCreate("progress", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("progress: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "progress")
	err = unix.Ftruncate(fd, connsAt+int64(n)*recordSize)
	if err == nil {
		const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("progress: %w", err)
	}
	return f, nil
}

// Memory is the memory, mapped.
type Memory struct{ mem []byte }

// Map maps what Create has made, for the life of the process.
func Map(f *os.File) (*Memory, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("progress: %w", err)
	}
	const access = unix.PROT_READ | unix.PROT_WRITE
	mem, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), access, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("progress: mmap: %w", err)
	}
	if len(mem) < connsAt {
		return nil, fmt.Errorf("progress: %d bytes are too few", len(mem))
	}
	return &Memory{mem}, nil
}

// Conn returns the record of connection n, nil if there is none.
func (m *Memory) Conn(n uint32) *Conn {
	if uint64(n) >= uint64((len(m.mem)-connsAt)/recordSize) {
		return nil
	}
	return (*Conn)(unsafe.Pointer(&m.mem[connsAt+int(n)*recordSize]))
}

// Loops returns the records of the loops of server number n.
func (m *Memory) Loops(n uint32) *[MaxLoops]Loop {
	return (*[MaxLoops]Loop)(unsafe.Pointer(&m.mem[int(n%servers)*MaxLoops*recordSize]))
}

// Conn is a connection's record. The thread that serves the connection writes
// it, with plain stores.
type Conn struct {
	// work is 0 while nothing is in work. Else it is the time since when, in ns
	// of CLOCK_MONOTONIC, but for its low byte, which is the request's type, and
	// answering once the answer is being sent.
	work atomic.Uint64

	_ [recordSize - 8]byte
}

const (
	answering = 0x80
	typeMask  = 0x7f
	lowByte   = 0xff
)

// Begin notes that a request has come.
func (c *Conn) Begin(t codec.Type) { c.work.Store(uint64(Now())&^lowByte | uint64(t)&typeMask) }

// Answering notes that the answer is being sent.
func (c *Conn) Answering() { c.work.Store(c.work.Load() | answering) }

// End notes that nothing is in work.
func (c *Conn) End() { c.work.Store(0) }

// Work is what a connection has in work, if anything. Two are equal if nothing
// has happened between them.
type Work struct{ word uint64 }

// Work returns what the record says.
func (c *Conn) Work() Work { return Work{c.work.Load()} }

// Type is the request's type; any number.
func (w Work) Type() codec.Type { return codec.Type(w.word & typeMask) }

// Answering tells that the request is done, and the client has not read the
// answer.
func (w Work) Answering() bool { return w.word&answering != 0 }

// Same tells that v is the same request.
func (w Work) Same(v Work) bool { return (w.word^v.word)&^answering == 0 }

// Age returns how long the request has been in work at a time of Now, 0 if
// there is none or the record makes no sense.
func (w Work) Age(now int64) time.Duration {
	since := int64(w.word &^ lowByte)
	if w.word == 0 || since < 0 || since > now {
		return 0
	}
	return time.Duration(now - since)
}

// Loop is the record of an epoll loop.
type Loop struct {
	moved atomic.Uint64
	_     [recordSize - 8]byte
}

// Moved counts that the loop has come round, or that it is there.
func (l *Loop) Moved() { l.moved.Add(1) }

// Count returns how often it has; 0 is no loop.
func (l *Loop) Count() uint64 { return l.moved.Load() }

// Reset makes it no loop.
func (l *Loop) Reset() { l.moved.Store(0) }

var (
	epoch   = time.Now()
	epochNs = monotonic()
)

func monotonic() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // every Linux has it
	}
	return ts.Nano()
}

// Now returns CLOCK_MONOTONIC in ns, which does not go on while the machine is
// suspended. It costs no system call.
func Now() int64 { return epochNs + int64(time.Since(epoch)) }

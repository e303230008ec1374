// Package inflight keeps what a connection has in work in memory that outlives
// the server: when a server dies, by kill -9 at any instruction, the next one
// finds every byte that the client has sent and knows whether it was answered.
//
// Each server has a memory of its own, a memfd that the supervisor makes and that
// server alone maps. It has a head, and a slot for each connection: records, the
// inbox, where the socket's bytes are received to, and the outbox, for an answer
// that the client does not read. When a connection goes from one server to the
// next, the supervisor copies its slot.
//
// # How nothing is lost and nothing answered twice
//
// Between a system call's return and the next instruction a server may die, or
// be preempted for long and then die. So what recv and send have done is noted
// by the kernel itself: [Slot.Receive] is recvmmsg and [Slot.Send] is sendmmsg,
// of one message, and the kernel stores the number of bytes in msg_len of the
// struct mmsghdr, which lies in the slot, before the call can be left. Beside
// msg_len, in the structure's padding, stands the sum of all calls before; both
// are written as one word. The bytes of the inbox are never changed, so that a
// request can be decoded once more.
//
// # Trust
//
// The supervisor makes, clears and copies slots, and interprets nothing of them.
// It copies a slot once, when the last server is dead or has given the connection
// back, and before the next one has it: what the last one writes afterwards
// reaches no other. So what a server's own system calls follow, which are the
// structures in a slot, nothing but that server writes; and what it finds there
// when it gets a connection it uses after [Slot.Recover] has checked it.
package inflight

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/pool/ipc"
)

const (
	pageSize = 4096

	// inboxSize holds the largest frame behind any other: what is left of a
	// frame always fits in front of where it lies.
	inboxSize = 2 * codec.MaxFrame

	// outboxSize holds any answer.
	outboxSize = codec.MaxFrame

	slotSize = (headSize + inboxSize + outboxSize + pageSize - 1) &^ (pageSize - 1)

	// slotsAt is the offset of slot 0: the memory's head takes a page.
	slotsAt = pageSize

	// chunk is what is received at once, in bytes, unless a frame is known to
	// be longer; small is what then fits in two pages.
	chunk = 4096
	small = 2*pageSize - headSize
)

// magic begins a memory, followed by ipc.Version as a u32.
const magic = "virtfs proxy in flight\x00\x00"

// Create returns the memory of n slots, all of them empty, for one server. It
// takes pages where slots are used, and can't change its size any more.
func Create(n int) (*os.File, error) {
	fd, err := unix.MemfdCreate("inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("in-flight memory: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inflight")
	err = unix.Ftruncate(fd, offset(uint32(n)))
	if err == nil {
		_, err = f.WriteAt(binary.NativeEndian.AppendUint32([]byte(magic), ipc.Version), 0)
	}
	if err == nil {
		const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("in-flight memory: %w", err)
	}
	return f, nil
}

func offset(slot uint32) int64 { return slotsAt + int64(slot)*slotSize }

// Clear empties a slot that no server uses, and gives its memory back.
func Clear(f *os.File, slot uint32) error {
	const hole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	return unix.Fallocate(int(f.Fd()), hole, offset(slot), slotSize)
}

// Copy makes a slot that no server uses what it is in another memory, whose
// server may be writing to it.
func Copy(to, from *os.File, slot uint32) error {
	if err := Clear(to, slot); err != nil {
		return err
	}
	var buf [4 * pageSize]byte
	for at, end := offset(slot), offset(slot)+slotSize; at < end; {
		data, err := from.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
			return nil
		}
		if err != nil {
			return err
		}
		b := buf[:min(int64(len(buf)), end-data)]
		if _, err := from.ReadAt(b, data); err != nil {
			return err
		}
		if _, err := to.WriteAt(b, data); err != nil {
			return err
		}
		at = data + int64(len(b))
	}
	return nil
}

// Memory is the memory as a server sees it.
type Memory struct{ mem []byte }

// Map maps the memory that Create has made, for the life of the process. A
// memory of another version is an ipc.VersionError.
func Map(f *os.File) (*Memory, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("in-flight memory: %w", err)
	}
	head := make([]byte, len(magic)+4)
	if _, err := f.ReadAt(head, 0); err != nil || string(head[:len(magic)]) != magic {
		return nil, fmt.Errorf("in-flight memory: %w", &ipc.VersionError{})
	}
	if v := binary.NativeEndian.Uint32(head[len(magic):]); v != ipc.Version {
		return nil, fmt.Errorf("in-flight memory: %w", &ipc.VersionError{Other: byte(v)})
	}
	const access = unix.PROT_READ | unix.PROT_WRITE
	mem, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), access, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("in-flight memory: mmap: %w", err)
	}
	return &Memory{mem}, nil
}

// Slot returns a slot; nil if there is none of that number.
func (j *Memory) Slot(n uint32) *Slot {
	if uint64(n) >= uint64((len(j.mem)-slotsAt)/slotSize) {
		return nil
	}
	b := j.mem[offset(n):][:slotSize:slotSize]
	s := &Slot{
		mem:    b,
		head:   (*head)(unsafe.Pointer(unsafe.SliceData(b))),
		inbox:  b[headSize : headSize+inboxSize],
		outbox: b[headSize+inboxSize:][:outboxSize],
	}
	s.prepare()
	return s
}

// head is a slot's records in shared memory. Its pointers are good in the
// process that has set them (prepare) alone.
type head struct {
	rx  [2]message // the one in use is rx[cur]
	cur uint32

	frame uint32 // offset in the inbox of the request in work
	phase uint32 // idle, begun, or the length of the answer that is being sent
	tries uint32 // how often a server has died over the request
	kept  uint32 // notKept, or what the outbox holds
	_     uint32
	tx    message

	control struct { // of tx
		hdr unix.Cmsghdr
		fd  int32
		_   int32
	}
}

const headSize = 512

var _ [headSize - unsafe.Sizeof(head{})]byte // it fits

const (
	idle  = 0
	begun = 1 // answers are longer
)

// Values of kept.
const (
	notKept    = 0
	answerKept = 1
	keptOfFD   = 2 // a descriptor goes with the answer
)

// message is a struct mmsghdr with one iovec.
type message struct {
	hdr   msghdr
	count counter
	iov   struct{ base, len uintptr }
	start uint32 // rx: offset of the first byte that has not been served
}

// msghdr is the kernel's struct msghdr, without Go pointers: it lies outside
// of Go's memory.
type msghdr struct {
	name       uintptr
	namelen    uint32
	iov        uintptr
	iovlen     uint64
	control    uintptr
	controllen uint64
	flags      int32
	_          int32
}

// counter counts bytes: len, which the kernel sets, since base was. It is a
// single word so that both change at once.
type counter struct{ len, base uint32 }

func (c *counter) total() uint32 { return c.base + c.len }

// set makes n the total.
func (c *counter) set(n uint32) {
	v := counter{base: n}
	atomic.StoreUint64((*uint64)(unsafe.Pointer(c)), *(*uint64)(unsafe.Pointer(&v)))
}

// Slot is one connection's part of the in-flight memory. It is used by one thread at a
// time, in this order: Receive, Frame, Begin, Send, Done.
type Slot struct {
	mem    []byte
	head   *head
	inbox  []byte
	outbox []byte
	grown  bool // beyond small, since Rest
}

func (s *Slot) prepare() {
	h := s.head
	for _, m := range []*message{&h.rx[0], &h.rx[1], &h.tx} {
		m.hdr = msghdr{iov: address(&m.iov), iovlen: 1}
	}
}

func address[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }

// Receive is recv(2): it returns how many bytes have come, 0 at the end of the
// stream. There is no room for descriptors: the kernel drops what is passed, on
// this thread and before it returns.
//
// With raw the call does not announce itself to the scheduler, so the thread
// keeps its processor while it waits. The rules for a raw call that waits: it
// ends on a signal, and what follows is a point where the goroutine can be
// stopped. The last close of a dropped descriptor may wait and keeps neither: raw
// is for sockets that take no descriptors (SO_PASSRIGHTS).
func (s *Slot) Receive(fd int, flags int, raw bool) (int, unix.Errno) {
	m := s.room()
	call := unix.Syscall6
	if raw {
		call = unix.RawSyscall6
	}
	n, _, errno := call(unix.SYS_RECVMMSG, uintptr(fd), address(m), 1, uintptr(flags), 0, 0)
	if errno != 0 || n == 0 {
		return -1, errno
	}
	return int(m.count.len), 0
}

// room makes the message receive behind what is there already.
func (s *Slot) room() *message {
	m := &s.head.rx[s.head.cur&1]
	end := m.count.total()
	switch {
	case end != 0 && end == m.start:
		// The end falls below the start first: that is empty, too.
		m.count.set(0)
		m.start, end = 0, 0
	case m.count.len != 0:
		m.count.set(end)
	}
	have, want := end-m.start, uint32(chunk)
	if have >= codec.HeaderSize {
		if _, size, err := codec.ParseHeader(s.inbox[m.start:end]); err == nil {
			want = codec.HeaderSize + uint32(size) - have
		}
	}
	if end+want > chunk {
		// What is left lies behind more than itself, or so near to the front
		// that a frame fits behind it.
		if have <= m.start {
			m, end = s.moveToFront(m, have), have
		}
		s.grown = s.grown || end+want > small
	}
	m.iov.base, m.iov.len = address(&s.inbox[end]), uintptr(min(want, inboxSize-end))
	return m
}

// moveToFront copies what has not been served to the front of the inbox, which
// is free, and then switches to the other message, at once.
func (s *Slot) moveToFront(m *message, have uint32) *message {
	copy(s.inbox, s.inbox[m.start:m.start+have])
	next := 1 - s.head.cur&1
	to := &s.head.rx[next]
	to.count.set(have)
	to.start = 0
	atomic.StoreUint32(&s.head.cur, next)
	return to
}

// Frame returns the next request if all of it has come. An error ends the
// connection. The payload lies in the inbox and must not be changed.
func (s *Slot) Frame() (t codec.Type, payload []byte, ok bool, err error) {
	m := &s.head.rx[s.head.cur&1]
	b := s.inbox[m.start:m.count.total()]
	if len(b) < codec.HeaderSize {
		return 0, nil, false, nil
	}
	t, size, err := codec.ParseHeader(b)
	if err != nil || len(b) < codec.HeaderSize+size {
		return t, nil, false, err
	}
	return t, b[codec.HeaderSize : codec.HeaderSize+size], true, nil
}

// Pending returns how many bytes have come that have not been served.
func (s *Slot) Pending() int {
	m := &s.head.rx[s.head.cur&1]
	return int(m.count.total() - m.start)
}

// Begin notes that the request that Frame has returned is in work.
func (s *Slot) Begin() {
	h := s.head
	h.frame = h.rx[h.cur&1].start
	h.tx.count.set(0)
	h.kept = notKept
	atomic.StoreUint32(&h.phase, begun)
}

// Undo notes that the request that was begun is not, and nothing came of it:
// Frame returns it again.
func (s *Slot) Undo() { atomic.StoreUint32(&s.head.phase, idle) }

// Send sends the answer from where the last Send has ended, with the descriptor
// passed in the same message unless it is -1 or has gone: it goes with the first
// byte. It does not wait, and returns false while the client does not read.
func (s *Slot) Send(fd int, b []byte, passed int) (done bool, errno unix.Errno) {
	h := s.head
	m := &h.tx
	sent := m.count.total()
	m.hdr.control, m.hdr.controllen = 0, 0
	if passed >= 0 && sent == 0 {
		h.control.hdr = unix.Cmsghdr{Level: unix.SOL_SOCKET, Type: unix.SCM_RIGHTS}
		h.control.hdr.SetLen(unix.CmsgLen(4))
		h.control.fd = int32(passed)
		m.hdr.control, m.hdr.controllen = address(&h.control), uint64(unix.CmsgSpace(4))
	}
	atomic.StoreUint32(&h.phase, uint32(len(b)))
	for int(sent) < len(b) {
		if m.count.len != 0 {
			m.count.set(sent)
			m.hdr.control, m.hdr.controllen = 0, 0
		}
		m.iov.base, m.iov.len = address(&b[sent]), uintptr(len(b))-uintptr(sent)
		_, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG,
			uintptr(fd), address(m), 1, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0, unix.EINTR:
		case unix.EAGAIN:
			return false, 0
		default:
			return false, errno
		}
		sent = m.count.total()
	}
	return true, 0
}

// Sent returns how much of the answer the client has.
func (s *Slot) Sent() int { return int(s.head.tx.count.total()) }

// Keep puts an answer that Send could not send wholly where the next server finds
// it, and returns it there.
func (s *Slot) Keep(b []byte, withFD bool) []byte {
	kept := s.outbox[:copy(s.outbox, b):len(b)]
	how := uint32(answerKept)
	if withFD {
		how = keptOfFD
	}
	s.grown = true
	s.head.tries = 0 // this server has survived the request
	atomic.StoreUint32(&s.head.kept, how)
	return kept
}

// Done notes that the request in work, of size bytes of payload, is answered.
func (s *Slot) Done(size int) {
	h := s.head
	h.rx[h.cur&1].start = h.frame + codec.HeaderSize + uint32(size)
	h.tries = 0
	atomic.StoreUint32(&h.phase, idle)
}

// Rest gives memory back that a long frame has taken.
func (s *Slot) Rest() {
	if m := &s.head.rx[s.head.cur&1]; s.grown && m.count.total() <= small {
		s.grown = false
		unix.Madvise(s.mem[headSize+small:], unix.MADV_REMOVE)
	}
}

// Work is the request that a server has died over.
type Work struct {
	Type    codec.Type
	Payload []byte
	Tries   int // servers that have died over it before that one
	Total   int // length of the answer, if it had got so far
	Sent    int // of the answer
	// Answer is that answer, if its rest can be sent as it is.
	Answer []byte
}

var errDamaged = errors.New("the in-flight memory of the connection is damaged")

// Recover returns what the last server had in work when it died, if anything:
// begun, and not wholly answered. It is to be answered, and Done.
//
// Any word may hold anything. The words that matter are read once, checked, and
// set so that all that follows finds a state that Receive, Frame, Begin, Send
// and Done leave themselves. Each store keeps what the words mean: this server
// may die here, too. What is in the outbox goes to the connection's own client.
func (s *Slot) Recover() (Work, bool, error) {
	h := s.head
	was := *h
	if was.cur > 1 {
		return Work{}, false, errDamaged
	}
	rx := &was.rx[was.cur]
	start, end := rx.start, uint64(rx.count.base)+uint64(rx.count.len)
	if was.phase != idle {
		start = was.frame
	}
	switch {
	case end > inboxSize || start > inboxSize:
		return Work{}, false, errDamaged
	case uint64(start) > end: // died in room
		start, end = 0, 0
	}
	m := &h.rx[was.cur]
	m.count.set(uint32(end)) // first: an end below the start is empty
	m.start = start
	s.grown = true
	if was.phase == idle {
		return Work{}, false, nil
	}
	t, payload, ok, err := s.Frame()
	if !ok || err != nil || was.phase > codec.MaxFrame {
		return Work{}, false, errDamaged
	}
	w := Work{Type: t, Payload: payload, Tries: int(was.tries)}
	if was.phase != begun {
		sent := uint64(was.tx.count.base) + uint64(was.tx.count.len)
		if sent > uint64(was.phase) {
			return Work{}, false, errDamaged
		}
		w.Total, w.Sent = int(was.phase), int(sent)
		if was.kept == answerKept || was.kept == keptOfFD && sent > 0 {
			w.Answer = s.outbox[:w.Total:w.Total]
		}
	}
	h.tx.count.set(uint32(w.Sent))
	switch {
	case was.phase != begun && w.Sent == w.Total:
		s.Done(len(payload))
		return Work{}, false, nil
	case w.Answer == nil:
		h.kept = notKept
	}
	h.tries++
	return w, true, nil
}

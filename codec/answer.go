package codec

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

func putHeader(b []byte, t Type, size int) {
	binary.NativeEndian.PutUint32(b, uint32(t))
	binary.NativeEndian.PutUint32(b[4:], uint32(size))
}

// appendFrame adds a header for size bytes that the caller appends next.
func appendFrame(b []byte, t Type, size int) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(t))
	return binary.NativeEndian.AppendUint32(b, uint32(size))
}

// AppendErrno adds the answer that a request of type t failed with errno, in
// the shape that its sender waits for.
func AppendErrno(b []byte, t Type, errno unix.Errno) []byte {
	if !t.AnswersFD() {
		b = appendFrame(b, Error, 4)
	}
	return binary.NativeEndian.AppendUint32(b, uint32(-int32(errno)))
}

// AppendFD adds the 4 bytes that go with a descriptor.
func AppendFD(b []byte) []byte { return binary.NativeEndian.AppendUint32(b, FDFollows) }

// AppendStatus adds a status: 0, or a length that was asked for.
func AppendStatus(b []byte, status int32) []byte {
	return binary.NativeEndian.AppendUint32(appendFrame(b, Success, 4), uint32(status))
}

// AppendVersion adds a GETVERSION answer, the inode's generation.
func AppendVersion(b []byte, version uint64) []byte {
	return binary.NativeEndian.AppendUint64(appendFrame(b, Success, 8), version)
}

// AppendStat adds an LSTAT answer: q dev, q ino, q nlink, d mode, d uid, d gid,
// q rdev, q size, q blksize, q blocks, then seconds and nanoseconds (q each)
// of atime, mtime and ctime.
func AppendStat(b []byte, st *unix.Stat_t) []byte {
	w := writer{appendFrame(b, Success, StatSize)}
	w.u64(uint64(st.Dev)).u64(st.Ino).u64(uint64(st.Nlink))
	w.u32(st.Mode).u32(st.Uid).u32(st.Gid)
	w.u64(uint64(st.Rdev)).u64(uint64(st.Size)).u64(uint64(st.Blksize)).u64(uint64(st.Blocks))
	for _, t := range [...]*unix.Timespec{&st.Atim, &st.Mtim, &st.Ctim} {
		w.u64(uint64(t.Sec)).u64(uint64(t.Nsec))
	}
	return w.b
}

// AppendStatfs adds a STATFS answer, eleven q: type, bsize, blocks, bfree,
// bavail, files, ffree, both halves of fsid (sign-extended), namelen, frsize.
func AppendStatfs(b []byte, st *unix.Statfs_t) []byte {
	w := writer{appendFrame(b, Success, StatfsSize)}
	w.u64(uint64(st.Type)).u64(uint64(st.Bsize))
	w.u64(st.Blocks).u64(st.Bfree).u64(st.Bavail).u64(st.Files).u64(st.Ffree)
	w.u64(uint64(int64(st.Fsid.Val[0]))).u64(uint64(int64(st.Fsid.Val[1])))
	w.u64(uint64(st.Namelen)).u64(uint64(st.Frsize))
	return w.b
}

// stringHead is what stands before the bytes of a string answer: the frame's
// header and the string's length.
const stringHead = HeaderSize + 2

// MaxString is the longest string that an answer can hold.
const MaxString = MaxPayload - 2

// StringRoom returns b[:len(b)] grown so that size bytes of a string answer
// fit behind it, and the room for them, for a system call to write to.
// FinishString makes the answer of it.
func StringRoom(b []byte, size int) (grown, room []byte) {
	n := len(b) + stringHead
	if cap(b) < n+size {
		b = append(make([]byte, 0, n+size), b...)
	}
	return b, b[n : n+size]
}

// FinishString adds the answer whose n bytes, at most MaxString, have been put
// into StringRoom's room.
func FinishString(b []byte, n int) []byte {
	b = appendFrame(b, Success, 2+n)
	b = binary.NativeEndian.AppendUint16(b, uint16(n))
	return b[:len(b)+n]
}

// Answer is one answer as a client reads it.
type Answer struct {
	Errno   unix.Errno // 0 on success
	Payload []byte     // of a frame; nil in answers of OPEN and CREATE
}

// ParseAnswer reads the answer to a request of type t from the front of b and
// returns how many bytes it takes: 0 means that b does not hold all of it yet,
// negative that no helper answers so. It does not yield the thread: bench calls
// it between two measurements.
//
//go:nosplit
func ParseAnswer(t Type, b []byte) (a Answer, n int) {
	if t.AnswersFD() {
		if len(b) < 4 {
			return a, 0
		}
		if v := int32(binary.NativeEndian.Uint32(b)); v != FDFollows {
			a.Errno = unix.Errno(-v)
		}
		return a, 4
	}
	if len(b) < HeaderSize {
		return a, 0
	}
	kind, size := Type(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
	if kind > Error || size > MaxPayload || (kind == Error && size != 4) {
		return a, -1
	}
	n = HeaderSize + int(size)
	if len(b) < n {
		return a, 0
	}
	a.Payload = b[HeaderSize:n]
	if kind == Error {
		a.Errno = unix.Errno(-int32(binary.NativeEndian.Uint32(a.Payload)))
	}
	return a, n
}

package codec

import (
	"bytes"
	"encoding/binary"
)

// CString is a string as system calls take it: its last byte is its only NUL.
type CString []byte

// Pointer returns the address of the first byte, for a system call. It is
// good for as long as the buffer that the string was decoded from.
func (s CString) Pointer() *byte { return &s[0] }

// Text returns the string without its NUL.
func (s CString) Text() []byte { return s[:len(s)-1] }

// Request holds the fields of any request; each type uses its own few. One is
// used again for every request of a connection, so that decoding takes no
// memory: its strings lie in the buffer of the frame.
type Request struct {
	Path    CString // what the request is about; old name of LINK and RENAME
	NewPath CString // new name of LINK and RENAME
	Target  CString // target of SYMLINK, not checked to be a path
	Name    CString // of the extended attribute
	Value   []byte  // of the extended attribute, binary

	UID, GID uint32 // 0xffffffff is -1
	Mode     uint32
	Flags    int32 // of OPEN, CREATE, LSETXATTR
	Size     int64 // bufsize, size of the value, or length to truncate to, in bytes
	Rdev     uint64
	Atime    Time
	Mtime    Time
}

// Time is a struct timespec on the wire; Nsec may hold UTIME_NOW or UTIME_OMIT.
type Time struct{ Sec, Nsec int64 }

// Decode reads the fields of a request of type t, in wire order; s, d and q in
// protocol tables are str, i32/u32 and i64/u64 here. Bytes behind the last
// field are ignored. It reports false when the payload ends before its fields
// do: the request is to be answered with ENOBUFS.
//
// The strings are NUL-terminated in place, which changes the payload; Decode
// touches no byte outside of it.
func (q *Request) Decode(t Type, payload []byte) bool {
	r := reader{b: payload}
	switch t {
	case Open:
		q.Path, q.Flags = r.str(), r.i32()
	case Create:
		q.Path, q.Flags, q.Mode, q.UID, q.GID = r.str(), r.i32(), r.u32(), r.u32(), r.u32()
	case Mknod:
		q.UID, q.GID, q.Path, q.Mode, q.Rdev = r.u32(), r.u32(), r.str(), r.u32(), r.u64()
	case Mkdir:
		q.UID, q.GID, q.Path, q.Mode = r.u32(), r.u32(), r.str(), r.u32()
	case Symlink:
		q.UID, q.GID, q.Target, q.Path = r.u32(), r.u32(), r.str(), r.str()
	case Link, Rename:
		q.Path, q.NewPath = r.str(), r.str()
	case Lstat, Statfs, Remove, GetVersion:
		q.Path = r.str()
	case Readlink:
		q.Path, q.Size = r.str(), int64(r.i32())
	case Chmod:
		q.Path, q.Mode = r.str(), r.u32()
	case Chown:
		q.Path, q.UID, q.GID = r.str(), r.u32(), r.u32()
	case Truncate:
		q.Path, q.Size = r.str(), r.i64()
	case Utime:
		q.Path = r.str()
		q.Atime.Sec, q.Atime.Nsec, q.Mtime.Sec, q.Mtime.Nsec = r.i64(), r.i64(), r.i64(), r.i64()
	case Lgetxattr:
		q.Size, q.Path, q.Name = int64(r.i32()), r.str(), r.str()
	case Llistxattr:
		q.Size, q.Path = int64(r.i32()), r.str()
	case Lsetxattr:
		q.Path, q.Name, q.Value = r.str(), r.str(), r.bytes()
		q.Size, q.Flags = int64(r.i32()), r.i32()
	case Lremovexattr:
		q.Path, q.Name = r.str(), r.str()
	}
	return !r.short
}

// Append adds the frame of a request of type t to b: what a client sends. It
// is Decode's mirror, field by field; a string goes out as it is, with its NUL
// if it has one, and is at most 65535 bytes long.
func (q *Request) Append(b []byte, t Type) []byte {
	start := len(b)
	w := writer{append(b, make([]byte, HeaderSize)...)}
	switch t {
	case Open:
		w.str(q.Path).u32(uint32(q.Flags))
	case Create:
		w.str(q.Path).u32(uint32(q.Flags)).u32(q.Mode).u32(q.UID).u32(q.GID)
	case Mknod:
		w.u32(q.UID).u32(q.GID).str(q.Path).u32(q.Mode).u64(q.Rdev)
	case Mkdir:
		w.u32(q.UID).u32(q.GID).str(q.Path).u32(q.Mode)
	case Symlink:
		w.u32(q.UID).u32(q.GID).str(q.Target).str(q.Path)
	case Link, Rename:
		w.str(q.Path).str(q.NewPath)
	case Lstat, Statfs, Remove, GetVersion:
		w.str(q.Path)
	case Readlink:
		w.str(q.Path).u32(uint32(q.Size))
	case Chmod:
		w.str(q.Path).u32(q.Mode)
	case Chown:
		w.str(q.Path).u32(q.UID).u32(q.GID)
	case Truncate:
		w.str(q.Path).u64(uint64(q.Size))
	case Utime:
		w.str(q.Path)
		w.u64(uint64(q.Atime.Sec)).u64(uint64(q.Atime.Nsec))
		w.u64(uint64(q.Mtime.Sec)).u64(uint64(q.Mtime.Nsec))
	case Lgetxattr:
		w.u32(uint32(q.Size)).str(q.Path).str(q.Name)
	case Llistxattr:
		w.u32(uint32(q.Size)).str(q.Path)
	case Lsetxattr:
		w.str(q.Path).str(q.Name).str(q.Value).u32(uint32(q.Size)).u32(uint32(q.Flags))
	case Lremovexattr:
		w.str(q.Path).str(q.Name)
	}
	putHeader(w.b[start:], t, len(w.b)-start-HeaderSize)
	return w.b
}

// reader takes fields from the front of b. Once b is too short for a field,
// short stays set, and this and all further fields are zero.
type reader struct {
	b     []byte
	off   int
	short bool
}

func (r *reader) take(n int) []byte {
	if r.short || n > len(r.b)-r.off {
		r.short = true
		return nil
	}
	r.off += n
	return r.b[r.off-n : r.off]
}

func (r *reader) u32() uint32 {
	if f := r.take(4); f != nil {
		return binary.NativeEndian.Uint32(f)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if f := r.take(8); f != nil {
		return binary.NativeEndian.Uint64(f)
	}
	return 0
}

func (r *reader) i32() int32 { return int32(r.u32()) }
func (r *reader) i64() int64 { return int64(r.u64()) }

// bytes reads a string as it stands, NULs and all.
func (r *reader) bytes() []byte {
	f := r.take(2)
	if f == nil {
		return nil
	}
	return r.take(int(binary.NativeEndian.Uint16(f)))
}

// str reads a string up to its first NUL. One that came without a NUL moves a
// byte to the left, over its own length, which has been read, and gets one.
func (r *reader) str() CString {
	s := r.bytes()
	if r.short {
		return nil
	}
	if n := bytes.IndexByte(s, 0); n >= 0 {
		return CString(s[:n+1])
	}
	s = r.b[r.off-len(s)-1 : r.off]
	copy(s, s[1:])
	s[len(s)-1] = 0
	return s
}

type writer struct{ b []byte }

func (w *writer) u32(v uint32) *writer {
	w.b = binary.NativeEndian.AppendUint32(w.b, v)
	return w
}

func (w *writer) u64(v uint64) *writer {
	w.b = binary.NativeEndian.AppendUint64(w.b, v)
	return w
}

func (w *writer) str(s []byte) *writer {
	w.b = append(binary.NativeEndian.AppendUint16(w.b, uint16(len(s))), s...)
	return w
}

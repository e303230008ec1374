// Package codec is the wire between QEMU's "-fsdev proxy" and its helper:
// frames, requests and answers. It is pure bytes: no system call, no
// descriptor, no goroutine.
//
// # The protocol on one page
//
// AF_UNIX, SOCK_STREAM; all integers in host byte order, unpadded. QEMU asks,
// the helper answers, in the order of the requests. A request is
//
//	type u32, size u32, then size bytes of payload (at most 65536)
//
// and its payload is the fields that [Request.Decode] lists. A string is
// "length u16" and that many bytes; it is a C string in a box: it ends at its
// first NUL, which may lie inside the length or be missing.
//
// An answer is one of two shapes. OPEN and CREATE answer with 4 bytes and
// nothing else: 0x7fffffff and a descriptor (SCM_RIGHTS) in the same message,
// or the negative errno. Everything else answers with a frame:
//
//	0 (success), size, payload: an i32 status, or what was asked for
//	1 (error),   4,    i32 -errno
//
// The payloads: stat 116 bytes ([AppendStat]), statfs 88 ([AppendStatfs]),
// string u16 and bytes without NUL, version u64.
//
// # Trust
//
// Whoever writes the frames may be hostile. Nothing is believed before it is
// checked: a header before its payload is waited for or memory is taken
// ([ParseHeader]), a length before its bytes are touched ([Request.Decode]).
package codec

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Sizes that both sides agree upon, in bytes.
const (
	HeaderSize = 8
	MaxPayload = 65536                   // of a request or an answer
	MaxFrame   = HeaderSize + MaxPayload // the most that one frame takes
	StatSize   = 116
	StatfsSize = 88
)

// FDFollows is what OPEN and CREATE answer beside a descriptor.
const FDFollows = 0x7fffffff

// Type says what a frame asks for, or whether it answers with success.
type Type uint32

// The types, numbered as on the wire. Requests are Open to GetVersion.
const (
	Success Type = iota
	Error
	Open
	Create
	Mknod
	Mkdir
	Symlink
	Link
	Lstat
	Readlink
	Statfs
	Chmod
	Chown
	Truncate
	Utime
	Rename
	Remove
	Lgetxattr
	Llistxattr
	Lsetxattr
	Lremovexattr
	GetVersion

	NumTypes // one past the last type
)

var names = [NumTypes]string{
	"SUCCESS", "ERROR", "OPEN", "CREATE", "MKNOD", "MKDIR", "SYMLINK", "LINK", "LSTAT",
	"READLINK", "STATFS",
	"CHMOD", "CHOWN", "TRUNCATE", "UTIME", "RENAME", "REMOVE",
	"LGETXATTR", "LLISTXATTR", "LSETXATTR", "LREMOVEXATTR",
	"GETVERSION",
}

// String returns the protocol's own name of the type: "LSTAT".
func (t Type) String() string {
	if t < NumTypes {
		return names[t]
	}
	return fmt.Sprintf("type %d", uint32(t))
}

// AnswersFD tells that the type is answered by 4 bare bytes and perhaps a
// descriptor, not by a frame.
func (t Type) AnswersFD() bool { return t == Open || t == Create }

// What ParseHeader says of a header that ends the connection: the stream can't
// be trusted to hold another frame.
var (
	ErrType = errors.New("no such request")
	ErrSize = fmt.Errorf("payload exceeds %d bytes", MaxPayload)
)

// ParseHeader reads a request's header from the first HeaderSize bytes of b,
// which the caller has. The size it returns is within MaxPayload.
func ParseHeader(b []byte) (t Type, size int, err error) {
	t = Type(binary.NativeEndian.Uint32(b))
	n := binary.NativeEndian.Uint32(b[4:HeaderSize])
	switch {
	case t < Open || t >= NumTypes:
		return t, 0, ErrType
	case n > MaxPayload:
		return t, 0, ErrSize
	}
	return t, int(n), nil
}

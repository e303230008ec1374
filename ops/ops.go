// Package ops does what requests ask for. Start reading at the table below:
// one line a request.
//
//	ops.go       the table, the way of one call, errno to wire at one door
//	open.go      OPEN and CREATE: which files may be opened, without a race
//	protected.go and which not, in directories that many write to
//	names.go     requests that make, move and remove names
//	inode.go     requests that read or change an inode, and GETVERSION
//	xattr.go     extended attributes
//	readonly.go  what a read-only export answers instead
//	idmap.go     ids of the guest and of the host
//	resolve.go   paths, those beyond PATH_MAX, too
//	credentials.go creates as the caller's uid and gid, on one thread alone
//	syscalls.go  the system calls, as they are: no allocation, no string
//	sandbox/     what keeps the process inside the export
//
// # Trust
//
// A request comes from a guest that may be hostile. The process' root is the
// export (package sandbox), so a path may say what it likes; a length that a
// request names never takes memory beyond 64 KiB. Nothing here waits for
// another process except a file system itself: devices and sockets are never
// opened, a FIFO never waited for (open.go).
//
// # Threads
//
// A call stays on one goroutine; only while its thread differs from the others
// (in withCredentials and in byName) is it locked to that. An FS is used by any
// number of calls at once, a Call by one.
package ops

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strconv"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// table holds what each request does: it returns an errno, or appends its
// answer to c.Out, or neither, which is the status 0.
var table = [codec.NumTypes]func(*FS, *Call) unix.Errno{
	codec.Open:         (*FS).open,
	codec.Create:       (*FS).create,
	codec.Mknod:        (*FS).mknod,
	codec.Mkdir:        (*FS).mkdir,
	codec.Symlink:      (*FS).symlink,
	codec.Link:         (*FS).link,
	codec.Lstat:        (*FS).lstat,
	codec.Readlink:     (*FS).readlink,
	codec.Statfs:       (*FS).statfs,
	codec.Chmod:        (*FS).chmod,
	codec.Chown:        (*FS).chown,
	codec.Truncate:     (*FS).truncate,
	codec.Utime:        (*FS).utime,
	codec.Rename:       (*FS).rename,
	codec.Remove:       (*FS).remove,
	codec.Lgetxattr:    (*FS).lgetxattr,
	codec.Llistxattr:   (*FS).llistxattr,
	codec.Lsetxattr:    (*FS).lsetxattr,
	codec.Lremovexattr: (*FS).lremovexattr,
	codec.GetVersion:   (*FS).getversion,
}

// FS is the exported file system: the root directory of the process.
type FS struct {
	table    *[codec.NumTypes]func(*FS, *Call) unix.Errno
	fds      int  // a directory whose entries are this process' descriptors: /proc/self/fd
	versions bool // GETVERSION has an answer here
	handles  bool // and a file handle holds it,
	mount    int32
	openable inodeSet // regular files and directories
	log      *slog.Logger
	trace    bool // log each request
	readOnly bool
	// noDevices says that no mount lets a device be opened.
	noDevices bool
	self      codec.CString // the name of fds in itself: some file on another mount

	translates bool   // uids or gids
	uids, gids *IDMap // as they are inside, see IDMap
	sysctls    Sysctls
}

// Options are what the file system is asked for beside what there is.
type Options struct {
	ReadOnly bool // what would change anything is answered by EROFS
	// NoDevices promises that every mount refuses to open a device.
	NoDevices bool
	UIDs      IDMap
	GIDs      IDMap
	Sysctls   Sysctls
}

// New returns the file system below the process' root. fds is a descriptor
// of /proc/self/fd, which the FS keeps.
func New(fds int, opts Options, log *slog.Logger) (*FS, error) {
	fs := &FS{
		table:    &table,
		fds:      fds,
		log:      log,
		trace:    log.Enabled(context.Background(), slog.LevelDebug),
		readOnly: opts.ReadOnly, noDevices: opts.NoDevices,
		self: codec.CString(strconv.Itoa(fds) + "\x00"),

		translates: opts.UIDs.given != nil || opts.GIDs.given != nil,
		sysctls:    opts.Sysctls,
	}
	var err error
	if fs.uids, err = opts.UIDs.inside(); err != nil {
		return nil, fmt.Errorf("users: %w", err)
	}
	if fs.gids, err = opts.GIDs.inside(); err != nil {
		return nil, fmt.Errorf("groups: %w", err)
	}
	if opts.ReadOnly {
		fs.table = &readOnlyTable
	}
	if err := fs.probeVersions(); err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	return fs, nil
}

// Call is one request on its way: decoded fields, answer and the room that
// system calls write to. A connection uses one Call again and again.
type Call struct {
	Out []byte // the answer's bytes, whole
	FD  int    // the descriptor that goes with them, or -1; the caller of Do owns it

	// Tainted says that the thread under this goroutine has an identity or a
	// working directory that could not be taken back. The goroutine is locked
	// to it, must not call Do again, and has to end.
	Tainted bool

	// Again says that the request can't be done without waiting, and that nothing
	// has come of it yet: it is to be done once more, some time later. It is never
	// set if the caller of Do has set MayWait.
	Again, MayWait bool

	// Connection is the number in the log of what the request came on.
	Connection uint64

	req      codec.Request
	decoded  bool   // req is this request's; kept for the log alone
	switched bool   // the thread is not as others: between assume and restore, or in byName
	uid      uint32 // that files are made as
	stat     unix.Stat_t
	statbuf  unix.Statfs_t
	times    [2]unix.Timespec
	handle   fileHandle
	mount    int32
	inode    inode
	version  uint32
	digits   [12]byte
}

// Do serves one request of a type that codec.ParseHeader let through. The
// payload is overwritten. It leaves an answer in c.Out, which it reuses, and
// in c.FD, whatever happens.
func (fs *FS) Do(t codec.Type, payload []byte, c *Call) {
	c.Out, c.FD, c.Again, c.uid = c.Out[:0], -1, false, own.uid
	errno := fs.do(t, payload, c)
	switch {
	case errno != 0:
		c.Out = codec.AppendErrno(c.Out[:0], t, errno)
	case c.FD >= 0:
		c.Out = codec.AppendFD(c.Out)
	case len(c.Out) == 0:
		c.Out = codec.AppendStatus(c.Out, 0)
	}
	if fs.trace {
		fs.traceCall(t, c, errno)
	}
}

// do is the part of Do that may panic: a bug answers EIO and is logged, and
// the connections go on.
func (fs *FS) do(t codec.Type, payload []byte, c *Call) (errno unix.Errno) {
	defer func() {
		if p := recover(); p != nil {
			fs.log.Error("panic in a request", "connection", c.Connection,
				"request", t.String(), "panic", p, "stack", string(debug.Stack()))
			c.Tainted = c.Tainted || c.switched
			if c.FD >= 0 {
				closefd(c.FD)
				c.FD = -1
			}
			errno = unix.EIO
		}
	}()
	if t == codec.GetVersion && !fs.versions {
		c.Out = codec.AppendVersion(c.Out, 0) // as the C helper: without a look at the payload
		c.decoded = fs.trace && c.req.Decode(t, payload)
		return 0
	}
	if c.decoded = c.req.Decode(t, payload); !c.decoded {
		return unix.ENOBUFS
	}
	if fs.translates {
		if errno := fs.toHost(t, &c.req); errno != 0 {
			return errno
		}
	}
	return fs.table[t](fs, c)
}

// Repeatable tells that doing a request twice is as good as doing it once: it
// reads, or opens a file that exists and leaves it as it is. The payload is
// overwritten.
func Repeatable(t codec.Type, payload []byte) bool {
	switch t {
	case codec.Lstat, codec.Readlink, codec.Statfs, codec.GetVersion,
		codec.Lgetxattr, codec.Llistxattr:
		return true
	case codec.Open:
		var q codec.Request
		return !q.Decode(t, payload) || q.Flags&(unix.O_CREAT|unix.O_TRUNC) == 0
	}
	return false
}

// traceCall logs a request: its fields only if it had them all.
func (fs *FS) traceCall(t codec.Type, c *Call, errno unix.Errno) {
	attrs := []any{"connection", c.Connection}
	if errno != 0 {
		attrs = append(attrs, "errno", unix.ErrnoName(errno))
	}
	text := func(key string, s codec.CString) {
		before, _, _ := bytes.Cut(s, []byte{0}) // the call may have cut off slashes
		attrs = append(attrs, key, string(before))
	}
	if c.decoded {
		text("path", c.req.Path)
		switch t {
		case codec.Link, codec.Rename:
			text("newpath", c.req.NewPath)
		case codec.Symlink:
			text("target", c.req.Target)
		case codec.Lgetxattr, codec.Lsetxattr, codec.Lremovexattr:
			text("name", c.req.Name)
		}
	}
	fs.log.Debug(t.String(), attrs...)
}

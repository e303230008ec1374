// Package slowfs is a FUSE file system that answers late or not at all, as a
// network file system with a slow or absent server does. It shows the files of
// another directory.
package slowfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Op is a FUSE request, by its number in <linux/fuse.h>.
type Op uint32

// The requests that Options and Hold can select. One system call often takes
// several: nothing is cached, so each component of a path is a Lookup.
const (
	Lookup      Op = 1
	Getattr     Op = 3
	Setattr     Op = 4
	Readlink    Op = 5
	Symlink     Op = 6
	Mknod       Op = 8
	Mkdir       Op = 9
	Unlink      Op = 10
	Rmdir       Op = 11
	Rename      Op = 12
	Link        Op = 13
	Open        Op = 14
	Read        Op = 15
	Write       Op = 16
	Statfs      Op = 17
	Release     Op = 18 // after the last close, which does not wait for it
	Fsync       Op = 20
	Setxattr    Op = 21
	Getxattr    Op = 22
	Listxattr   Op = 23
	Removexattr Op = 24
	Flush       Op = 25 // each close; close waits for it
	Opendir     Op = 27
	Readdir     Op = 28
	Create      Op = 35
	Rename2     Op = 45
)

// These requests are answered at once, or have no answer.
const (
	forget      Op = 2
	initialize  Op = 26
	interrupt   Op = 36
	batchForget Op = 42
)

// Match selects requests. The name is the last component of the path: that of
// the new or removed entry, else that under which the file was last looked up;
// it is empty for the root. Match is called under a lock and must not block.
type Match func(op Op, name string) bool

// Lookups selects the lookup of every name.
func Lookups(op Op, _ string) bool { return op == Lookup }

// Options select the delay of answers.
type Options struct {
	// Delay is the time between the arrival and the processing of a request.
	Delay time.Duration
	// Late selects the requests that Delay applies to. If nil, it applies to all.
	Late Match
}

// FS is a mounted file system.
//
// A system call that waits for an answer cannot be interrupted. The process
// that has mounted an FS must therefore not use it while requests hang: it
// could not be killed.
type FS struct {
	dir     string
	options Options
	dev     *os.File             // /dev/fuse
	files   *fuse.ProtocolServer // the files of the other directory
	up      chan struct{}        // closed when the kernel has negotiated the protocol
	end     chan struct{}        // closed when serve has returned
	pending sync.WaitGroup       // requests that are not answered yet

	mu       sync.Mutex
	hang     Match             // nil unless Hold is in effect
	released chan struct{}     // closed by Release
	waiting  int               // requests that wait for released
	names    map[uint64]string // of nodes that have been looked up
}

// Mount mounts an FS with the files of the directory backing on the directory
// dir. backing must not be dir, nor below it. The caller closes the FS.
func Mount(dir, backing string, options Options) (*FS, error) {
	root, err := fs.NewLoopbackRoot(backing)
	if err != nil {
		return nil, fmt.Errorf("serve the files of %s: %w", backing, err)
	}
	var uncached time.Duration
	fuseOptions := &fs.Options{
		EntryTimeout: &uncached, AttrTimeout: &uncached, NullPermissions: true,
		MountOptions: fuse.MountOptions{
			DisableReadDirPlus:   true, // its answer would look names up without a Lookup
			DisabledCapabilities: fuse.CAP_PASSTHROUGH,
			Logger:               log.New(io.Discard, "", 0),
		},
	}
	// Own mount(2): go-fuse's takes fusermount, or leaves /dev/fuse open to child
	// processes, and then the file system outlives this process.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/fuse: %w", err)
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,"+
		"default_permissions", fd)
	err = unix.Mount("slowfs", dir, "fuse.slowfs", unix.MS_NOSUID|unix.MS_NODEV, data)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mount a FUSE file system on %s: %w", dir, err)
	}
	f := &FS{
		dir:     dir,
		options: options,
		dev:     os.NewFile(uintptr(fd), "/dev/fuse"),
		files:   fuse.NewProtocolServer(fs.NewNodeFS(root, fuseOptions), &fuseOptions.MountOptions),
		up:      make(chan struct{}),
		end:     make(chan struct{}),
		names:   map[uint64]string{fuse.FUSE_ROOT_ID: ""},
	}
	go f.serve()
	select {
	case <-f.up:
		return f, nil
	case <-f.end:
		err := fmt.Errorf("the kernel ended the FUSE file system on %s", dir)
		return nil, errors.Join(err, f.Close())
	}
}

// Hold makes the requests that match selects hang from now on, until Release.
func (f *FS) Hold(match Match) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hang = match
	if f.released == nil {
		f.released = make(chan struct{})
	}
}

// Waiting returns how many requests hang.
func (f *FS) Waiting() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.waiting
}

// Release ends Hold: requests that hang are processed now.
func (f *FS) Release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.released != nil {
		close(f.released)
	}
	f.hang, f.released, f.waiting = nil, nil, 0
}

// Close releases requests that hang, and unmounts the file system. Processes
// that still use it, from other mount namespaces too, get ECONNABORTED or ENOTCONN.
func (f *FS) Close() error {
	f.Release()
	err := unix.Unmount(f.dir, unix.MNT_DETACH)
	f.dev.SetReadDeadline(time.Unix(1, 0)) // ends serve when it has answered what it has read
	<-f.end
	return errors.Join(err, f.dev.Close()) // the last close aborts the connection
}

// buffer has room for the largest request or answer: 128 KiB of data, and headers.
type buffer [1 << 18]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

func (f *FS) serve() {
	defer close(f.end)
	defer f.pending.Wait()
	for {
		in := buffers.Get().(*buffer)
		n, err := f.dev.Read(in[:])
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			continue // the request was withdrawn
		}
		if err != nil || n < inHeaderSize {
			return // unmounted or closed
		}
		request := in[:n]
		switch op := opOf(request); op {
		case interrupt:
			// An interrupted request hangs on, as with a server that is absent.
		case initialize:
			f.answer(op, "", request)
			close(f.up)
		case forget, batchForget:
			f.answer(op, "", request)
		default:
			f.pending.Go(func() {
				name := f.nameOf(op, request)
				f.wait(op, name)
				f.answer(op, name, request)
				buffers.Put(in)
			})
		}
	}
}

// wait returns when the request may be processed.
func (f *FS) wait(op Op, name string) {
	f.mu.Lock()
	late := f.options.Delay > 0 && (f.options.Late == nil || f.options.Late(op, name))
	var released chan struct{}
	if f.hang != nil && f.hang(op, name) {
		released = f.released
		f.waiting++
	}
	f.mu.Unlock()
	if released != nil {
		<-released
	}
	if late {
		time.Sleep(f.options.Delay)
	}
}

// answer processes a request. Its write fails if the request was withdrawn.
func (f *FS) answer(op Op, name string, request []byte) {
	out := buffers.Get().(*buffer)
	defer buffers.Put(out)
	n, _ := f.files.HandleRequest([][]byte{request}, [][]byte{out[:]})
	f.note(op, name, request, out[:n])
	if n > 0 {
		f.dev.Write(out[:n])
	}
}

// Layout of <linux/fuse.h>: struct fuse_in_header, then the request's own
// struct, then names; struct fuse_out_header, then, where a request answers
// with a node, struct fuse_entry_out, which begins with the node.
const (
	inHeaderSize  = 40
	outHeaderSize = 16
)

func opOf(request []byte) Op       { return Op(binary.NativeEndian.Uint32(request[4:])) }
func nodeOf(request []byte) uint64 { return binary.NativeEndian.Uint64(request[16:]) }

// nameAt is the size of the struct before the name, of requests that have one.
var nameAt = map[Op]int{
	Lookup: 0, Symlink: 0, Unlink: 0, Rmdir: 0,
	Mkdir: 8, Rename: 8, Link: 8, Mknod: 16, Create: 16, Rename2: 16,
}

func (f *FS) nameOf(op Op, request []byte) string {
	if at, ok := nameAt[op]; ok {
		name, _, _ := bytes.Cut(request[inHeaderSize+at:], []byte{0})
		return string(name)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.names[nodeOf(request)]
}

// note records the name of the node in an answer.
func (f *FS) note(op Op, name string, request, answer []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch op {
	case forget:
		delete(f.names, nodeOf(request))
	case Lookup, Symlink, Mkdir, Link, Mknod, Create:
		// An error's answer is the header alone.
		if len(answer) >= outHeaderSize+8 {
			f.names[binary.NativeEndian.Uint64(answer[outHeaderSize:])] = name
		}
	}
}

// Package hang is a file system that does not answer, as NFS or FUSE without
// their servers: what a request that must hang alone is sent to.
package slowfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// FS is a mounted FUSE file system with an empty root directory. While it is
// held, whoever looks a name up in it hangs until Release. Otherwise there is
// no such file.
//
// Who hangs can't be killed. So the process that has mounted it must not look:
// it would hold its own end of the file system open for ever.
type FS struct {
	dir string
	dev *os.File
	up  chan struct{} // closed when the kernel has been told what this file system can do
	end chan struct{} // closed when serve has returned

	mu      sync.Mutex
	held    bool
	waiting []uint64 // requests not answered
}

// Mount mounts an FS, held, on the directory dir.
func Mount(dir string) (*FS, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/fuse: %w", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)
	if err := unix.Mount("hang", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mount a FUSE file system on %s: %w", dir, err)
	}
	fs := &FS{dir: dir, dev: os.NewFile(uintptr(fd), "/dev/fuse"), up: make(chan struct{}), end: make(chan struct{}), held: true}
	go fs.serve()
	select {
	case <-fs.up:
		return fs, nil
	case <-fs.end:
		return nil, errors.Join(fmt.Errorf("the kernel ended the FUSE file system on %s", dir), fs.Close())
	}
}

// Hold makes lookups hang from now on.
func (fs *FS) Hold() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.held = true
}

// Waiting returns how many lookups hang.
func (fs *FS) Waiting() int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return len(fs.waiting)
}

// Release answers all lookups that hang, with ENOENT.
func (fs *FS) Release() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.held = false
	for _, unique := range fs.waiting {
		fs.answer(unique, unix.ENOENT, nil)
	}
	fs.waiting = nil
}

// Close releases who hangs and unmounts the file system.
func (fs *FS) Close() error {
	fs.Release()
	// Closing answers whoever is still in it with ENOTCONN.
	err := errors.Join(unix.Unmount(fs.dir, unix.MNT_DETACH), fs.dev.Close())
	<-fs.end
	return err
}

// What of <linux/fuse.h> is needed here.
const (
	opLookup      = 1
	opForget      = 2
	opInit        = 26
	opInterrupt   = 36
	opBatchForget = 42

	parallelDirops = 1 << 18 // lookups in one directory do not wait for each other
	inHeaderSize   = 40
)

func (fs *FS) serve() {
	defer close(fs.end)
	buf := make([]byte, 1<<18)
	for {
		n, err := fs.dev.Read(buf)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			continue // a request that was taken back
		}
		if err != nil || n < inHeaderSize {
			return // unmounted or closed
		}
		op, unique := binary.NativeEndian.Uint32(buf[4:]), binary.NativeEndian.Uint64(buf[8:])
		switch op {
		case opForget, opBatchForget, opInterrupt: // have no answer; who is interrupted hangs on, as with a server that is gone
		case opInit:
			var out bytes.Buffer
			// major, minor, max_readahead, flags, max_background and
			// congestion_threshold, max_write, time_gran; the rest is 0.
			binary.Write(&out, binary.NativeEndian, [16]uint32{7, 31, 4096, parallelDirops, 16 | 16<<16, 4096, 1})
			fs.mu.Lock()
			fs.answer(unique, 0, out.Bytes())
			fs.mu.Unlock()
			close(fs.up)
		case opLookup:
			fs.mu.Lock()
			if fs.held {
				fs.waiting = append(fs.waiting, unique)
			} else {
				fs.answer(unique, unix.ENOENT, nil)
			}
			fs.mu.Unlock()
		default:
			fs.mu.Lock()
			fs.answer(unique, unix.ENOSYS, nil)
			fs.mu.Unlock()
		}
	}
}

// answer may find that nobody waits any more.
func (fs *FS) answer(unique uint64, errno unix.Errno, payload []byte) {
	b := binary.NativeEndian.AppendUint32(nil, uint32(16+len(payload)))
	b = binary.NativeEndian.AppendUint32(b, uint32(-int32(errno)))
	b = binary.NativeEndian.AppendUint64(b, unique)
	fs.dev.Write(append(b, payload...))
}

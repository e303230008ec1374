package model

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/qemu"
	"virtfs-proxy-helper/codec"
)

// VM is a synthetic VM: a connection, a directory of its own in the export, and
// the model of that directory.
type VM struct {
	Client *qemu.Client // to be set before Run
	Dir    string       // in the export
	// Thorough compares the tree after each batch, not only after an answer that
	// leaves open whether the request has been done.
	Thorough bool
	// IDs are the users and groups of a rootless helper's guest on the host.
	IDs IDs

	Answers [codec.NumTypes]int
	Errnos  map[unix.Errno]int
	Doubts  int // batches whose outcome only the tree shows

	events *Events
	export string // on the host
	kind   fsKind // of the file system of Dir
	around fsKind // of the export's own
	gen    *generator
	worlds []*world // the possible ones: one, except within a batch during which a server died
}

// IDs maps the host's user and group numbers to the guest's. A rootless helper
// shifts them, and makes no device nodes; any other keeps them.
type IDs struct {
	Rootless bool
	Root     uint32 // the host's number of the guest's 0
	First    uint32 // the host's number of the guest's 1; the others follow
}

func (ids IDs) guest(host uint32) uint32 {
	switch {
	case !ids.Rootless:
		return host
	case host == ids.Root:
		return 0
	}
	return host - ids.First + 1
}

// Events are shared by all VMs: the times at which an answer may be EIO or
// EMFILE, and the number of answers to all VMs.
type Events struct {
	Deaths   Spans // of servers
	Poverty  Spans // of descriptors
	Answered atomic.Int64
}

// NewVM returns a VM of a directory of the export. The directory must exist and
// be empty, and MakeShared must have been called for the export.
func NewVM(events *Events, export, dir string, seed uint64, index int) (*VM, error) {
	v := &VM{
		Dir:    dir,
		Errnos: map[unix.Errno]int{},
		events: events,
		export: export,
		gen:    newGenerator(seed, index, dir),
	}
	var err error
	if v.kind, err = kindOf(filepath.Join(export, dir)); err != nil {
		return nil, err
	}
	if v.around, err = kindOf(export); err != nil {
		return nil, err
	}
	// The attributes of the root are not compared: it is not this VM's.
	root := newNode(unix.S_IFDIR, 0, 0)
	root.entries[dir] = newNode(unix.S_IFDIR|0o755, 0, 0)
	root.entries["shared"] = sharedTree()
	v.worlds = []*world{{root: root}}
	return v, nil
}

func kindOf(dir string) (fsKind, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return fsKind(st.Type), nil
}

func (v *VM) kindOf(path string) fsKind {
	if split(path)[0] == v.Dir {
		return v.kind
	}
	return v.around
}

// tree is the expected content of the VM's directory.
func (w *world) tree(v *VM) *node { return w.root.entries[v.Dir] }

// compare compares the VM's directory on the host with that of w.
func (v *VM) compare(w *world) error {
	return w.tree(v).compare(filepath.Join(v.export, v.Dir), v.kind, v.IDs, map[uint64]*node{})
}

// Compare compares the VM's directory on the host with the model, and the shared
// directory with the one that MakeShared made.
func (v *VM) Compare() error {
	shared := v.worlds[0].root.entries["shared"]
	return errors.Join(v.compare(v.worlds[0]),
		shared.compare(filepath.Join(v.export, "shared"), v.around, v.IDs, map[uint64]*node{}))
}

// Run sends requests until over is set. An error names the request.
func (v *VM) Run(over *atomic.Bool) error {
	for !over.Load() {
		batch := make([]*request, 1)
		if v.gen.oneIn(4) { // several at once: answers come in their order
			batch = make([]*request, 1+v.gen.IntN(12))
		}
		var frames []byte
		for i := range batch {
			batch[i] = v.gen.next()
			frames = append(frames, batch[i].frame...)
		}
		at := len(frames) // some come in two pieces
		if v.gen.oneIn(8) {
			at = v.gen.IntN(len(frames))
		}
		sent := time.Now()
		if err := errors.Join(v.Client.Send(frames[:at]), v.Client.Send(frames[at:])); err != nil {
			return fmt.Errorf("%v: send: %w", batch[0], err)
		}
		eio := 0
		for _, r := range batch {
			a, err := v.Client.Receive(r.t)
			if err != nil {
				return fmt.Errorf("%v: no answer: %w", r, err)
			}
			if err := v.judge(r, a, sent); err != nil {
				return fmt.Errorf("%v: %w", r, err)
			}
			if a.Errno == unix.EIO {
				eio++
			}
		}
		if n := v.events.Deaths.Count(sent, time.Now()); eio > n {
			return fmt.Errorf("%v and those sent with it: %d times EIO, with %d deaths",
				batch[0], eio, n)
		}
		if err := v.settle(); err != nil {
			return fmt.Errorf("after %v: %w", batch[len(batch)-1], err)
		}
		if v.gen.oneIn(10) {
			time.Sleep(time.Duration(v.gen.IntN(30)) * time.Millisecond)
		}
	}
	return v.silent()
}

// silent returns an error if there is an answer too many.
func (v *VM) silent() error {
	if err := v.Client.Silent(10 * time.Millisecond); err != nil {
		return fmt.Errorf("all is answered: %w", err)
	}
	return nil
}

// judge drops the worlds in which the answer is wrong. It returns an error if
// the answer is wrong in all of them.
func (v *VM) judge(r *request, a qemu.Answer, sent time.Time) error {
	v.events.Answered.Add(1)
	v.Answers[r.t]++
	v.Errnos[a.Errno]++
	file := a.File()
	var left []*world
	var wrong error
	for _, w := range v.worlds {
		undone, done := v.excused(w, r, a.Errno, sent)
		if undone {
			left = append(left, w.clone())
		}
		want := w.apply(r, v)
		switch err := want.judge(a); {
		case err == nil:
			if want.node != nil {
				w.opened = append(w.opened, opened{file, want.node, r})
			}
			left = append(left, w)
		case done && want.errno == 0:
			left = append(left, w)
		default:
			wrong = err
		}
	}
	if len(left) == 0 {
		return wrong
	}
	v.worlds = left
	return nil
}

func (w *want) judge(a qemu.Answer) error {
	switch {
	case a.Errno != w.errno:
		return fmt.Errorf("%v (%d), want %v (%d)", a.Errno, a.Errno, w.errno, w.errno)
	case a.Errno == 0 && w.check != nil:
		return w.check(a.Payload)
	case a.Errno == 0 && w.node == nil && string(a.Payload) != "\x00\x00\x00\x00":
		return fmt.Errorf("%x, want the status 0", a.Payload)
	}
	return nil
}

// excused reports whether a disturbance may explain this answer in world w, with the
// request not done (undone), or done nevertheless (done).
func (v *VM) excused(w *world, r *request, errno unix.Errno, sent time.Time) (undone, done bool) {
	now := time.Now()
	switch errno {
	case unix.EIO:
		deaths := v.events.Deaths.Count(sent, now)
		if repeatable(r) { // the second server that dies over it is the last
			return deaths >= 2, false
		}
		return deaths >= 1, deaths >= 1
	case unix.EMFILE, unix.ETOOMANYREFS: // the latter counts descriptors under way
		opens := r.t == codec.Open || r.t == codec.Create || r.t == codec.GetVersion
		poor := opens && v.events.Poverty.Count(sent, now) > 0
		return poor, poor
	case unix.ENOSPC:
		// tmpfs counts each attribute as a part of an inode.
		t := w.tree(v)
		return v.kind == tmpfs && t.names()+len(t.xattrs)+len(w.opened)+4 > TmpfsInodes, false
	case unix.EDQUOT:
		return v.kind == btrfs && v.kind != v.around, false
	}
	return false, false
}

// repeatable reports whether the helper sends the request to a second server if the
// first dies. It repeats the protocol's documentation, not the helper's code.
func repeatable(r *request) bool {
	switch r.t {
	case codec.Lstat, codec.Readlink, codec.Statfs,
		codec.Lgetxattr, codec.Llistxattr, codec.GetVersion:
		return true
	}
	return r.t == codec.Open && (r.short || r.q.Flags&(unix.O_CREAT|unix.O_TRUNC) == 0)
}

// settle finds the right world when all requests of a batch are answered, and
// checks the descriptors that came with the answers.
func (v *VM) settle() error {
	if len(v.worlds) > 1 {
		v.Doubts++
		var all []error
		for _, w := range v.worlds {
			err := v.compare(w)
			if err == nil {
				all, v.worlds = nil, []*world{w}
				break
			}
			all = append(all, err)
		}
		if all != nil {
			return fmt.Errorf("neither done nor not done: %w", errors.Join(all...))
		}
	}
	w := v.worlds[0]
	if v.Thorough {
		if err := v.compare(w); err != nil {
			return err
		}
	}
	for _, o := range w.opened {
		if err := v.look(o); err != nil {
			return fmt.Errorf("the descriptor of %v: %w", o.r, err)
		}
		o.fd.Close()
	}
	w.opened = nil
	return nil
}

// look compares a descriptor with the expected inode, writes through it if it is
// writable, and compares the content.
func (v *VM) look(o opened) error {
	n, fd := o.node, int(o.fd.Fd())
	kind := v.kindOf(text(o.r.q.Path))
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	st.Uid, st.Gid = v.IDs.guest(st.Uid), v.IDs.guest(st.Gid)
	if err := n.matches(&st, kind); err != nil {
		return err
	}
	flags, err := unix.FcntlInt(o.fd.Fd(), unix.F_GETFL, 0)
	const compared = unix.O_ACCMODE | unix.O_APPEND | unix.O_PATH
	switch {
	case err != nil:
		return err
	case flags&compared != int(o.r.q.Flags)&compared:
		return fmt.Errorf("flags %#x", flags)
	case flags&unix.O_PATH != 0:
		return nil
	case n.is(unix.S_IFDIR) && n.nlink == 0: // removed meanwhile: cannot be listed
		return nil
	case n.is(unix.S_IFDIR):
		entries, err := o.fd.ReadDir(-1)
		return errors.Join(err, n.listed(entries))
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		at, line := 0, strings.Repeat(fmt.Sprintf("%s, request %d\n", v.Dir, o.r.n), 1+o.r.n%3)
		if flags&unix.O_APPEND != 0 {
			at = len(n.data)
		}
		written, err := unix.Write(fd, []byte(line))
		switch {
		case err == unix.ENOSPC && v.kind == tmpfs, err == unix.EDQUOT && v.kind == btrfs:
			written = 0
		case err != nil:
			return err
		}
		if written > 0 {
			n.write([]byte(line[:written]), at)
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil || string(b) != n.data {
		return fmt.Errorf("%.80q (%v), want %.80q", b, err, n.data)
	}
	return nil
}

package main

import (
	"bufio"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// A trace holds one line a frame, in order: "> HEX" from QEMU, "< HEX" from
// the helper, "<fd HEX" where a descriptor came with it.

// exchange is a request and its answer, as recorded.
type exchange struct {
	frame  []byte
	typ    codec.Type
	answer codec.Answer
}

// parseTrace reads a trace. Requests at its end that were never answered are
// left out.
func parseTrace(r io.Reader) (list []exchange, err error) {
	answered := 0
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 2*codec.MaxFrame+8)
	for n := 1; lines.Scan(); n++ {
		kind, digits, _ := strings.Cut(lines.Text(), " ")
		frame, err := hex.DecodeString(digits)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		switch kind {
		case ">":
			if len(frame) < codec.HeaderSize {
				return nil, fmt.Errorf("line %d: a request of %d bytes", n, len(frame))
			}
			t, size, err := codec.ParseHeader(frame)
			if err == nil && len(frame) != codec.HeaderSize+size {
				err = fmt.Errorf("%d bytes where the header says %d",
					len(frame), codec.HeaderSize+size)
			}
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", n, err)
			}
			list = append(list, exchange{frame: frame, typ: t})
		case "<", "<fd":
			if answered == len(list) {
				return nil, fmt.Errorf("line %d: an answer without a request", n)
			}
			x := &list[answered]
			answered++
			size := 0
			if x.answer, size = codec.ParseAnswer(x.typ, frame); size != len(frame) {
				return nil, fmt.Errorf("line %d: no answer to %v", n, x.typ)
			}
		default:
			return nil, fmt.Errorf("line %d: neither >, < nor <fd", n)
		}
	}
	return list[:answered], lines.Err()
}

// openTrace reads the trace in a file, which is compressed if its name ends in .gz.
func openTrace(name string) ([]exchange, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var r io.Reader = file
	if strings.HasSuffix(name, ".gz") {
		if r, err = gzip.NewReader(file); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	list, err := parseTrace(r)
	if err == nil && len(list) == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return list, nil
}

// replayWorkload sends the recorded requests, in chunks of size requests, passes
// times. An answer that differs in kind (success, or errno) from the recorded one
// counts as wrong.
func replayWorkload(name string, size, passes int) (w workload, err error) {
	list, err := openTrace(name)
	if err != nil {
		return w, err
	}
	w = workload{name: "replay", pass: (len(list) + size - 1) / size}
	w.rounds = passes * w.pass
	var requests []request
	for _, x := range list {
		op := slices.Index(w.ops, strings.ToLower(x.typ.String()))
		if op < 0 {
			op = len(w.ops)
			w.ops = append(w.ops, strings.ToLower(x.typ.String()))
		}
		requests = append(requests, request{
			frame: x.frame,
			op:    op,
			typ:   x.typ,
			errno: x.answer.Errno,
			size:  anySize,
		})
	}
	tree := treeBefore(list)
	w.before = func(p *program) error { return tree.build(p.export) }
	round := 0
	w.next = func(int) batch {
		at := round % w.pass * size
		round++
		return batch{timed: requests[at:min(at+size, len(requests))]}
	}
	return w, nil
}

// node holds the attributes of a file that LSTAT returns.
type node struct {
	mode, uid, gid uint32
	rdev, size     uint64
}

// tree is a directory tree, by paths relative to its root.
type tree map[string]node

// treeBefore infers the tree before the trace: all files that successful requests
// name and that the trace has not created earlier.
func treeBefore(list []exchange) tree {
	before := tree{}
	// Paths that are in before, or that the trace has created, moved or removed.
	known := map[string]bool{}
	type move struct{ from, to string }
	var moves []move
	below := func(path, dir string) bool {
		return path == dir || strings.HasPrefix(path, dir+"/")
	}
	creating := []codec.Type{codec.Create, codec.Mknod, codec.Mkdir, codec.Symlink}
	for _, x := range list {
		if x.answer.Errno != 0 {
			continue
		}
		var q codec.Request
		if !q.Decode(x.typ, slices.Clone(x.frame[codec.HeaderSize:])) {
			continue
		}
		path, newPath := filepath.Clean("/"+string(q.Path.Text())), ""
		if x.typ == codec.Link || x.typ == codec.Rename {
			newPath = filepath.Clean("/" + string(q.NewPath.Text()))
		}
		if !known[path] && !slices.Contains(creating, x.typ) && path != "/" {
			origin := path
			for _, m := range slices.Backward(moves) {
				if below(origin, m.to) {
					origin = m.from + origin[len(m.to):]
				}
			}
			n := node{mode: unix.S_IFREG | 0o644}
			if s := x.answer.Payload; x.typ == codec.Lstat && len(s) == codec.StatSize {
				u32, u64 := binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
				n = node{
					mode: u32(s[24:]),
					uid:  u32(s[28:]),
					gid:  u32(s[32:]),
					rdev: u64(s[36:]),
					size: u64(s[44:]),
				}
			}
			before[origin] = n
		}
		known[path] = true
		switch x.typ {
		case codec.Link:
			known[newPath] = true
		case codec.Rename:
			known[newPath] = true
			for p := range known {
				if below(p, path) {
					known[newPath+p[len(path):]] = true
				}
			}
			moves = append(moves, move{path, newPath})
		}
	}
	return before
}

// build empties dir and makes the tree in it. Contents of files are holes: reads
// and writes through a descriptor do not reach a helper.
func (t tree) build(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	paths := make([]string, 0, len(t))
	for path := range t {
		paths = append(paths, path)
	}
	slices.Sort(paths) // a directory comes before what is in it
	for _, path := range paths {
		n, at := t[path], filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return err
		}
		switch n.mode & unix.S_IFMT {
		case unix.S_IFDIR:
			err = os.MkdirAll(at, 0o755)
		case unix.S_IFLNK:
			err = os.Symlink("target", at)
		case unix.S_IFREG:
			err = os.WriteFile(at, nil, 0o600)
			if err == nil {
				err = os.Truncate(at, int64(n.size))
			}
		default:
			err = unix.Mknod(at, n.mode, int(n.rdev))
		}
		if err == nil && n.mode&unix.S_IFMT != unix.S_IFLNK {
			err = unix.Chmod(at, n.mode&0o7777)
		}
		if err == nil {
			err = os.Lchown(at, int(n.uid), int(n.gid))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// traceWriter writes a trace.
type traceWriter struct {
	file *os.File
	zip  *gzip.Writer // nil if not compressed
	out  *bufio.Writer
}

func createTrace(name string) (*traceWriter, error) {
	file, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	t := &traceWriter{file: file, out: bufio.NewWriter(file)}
	if strings.HasSuffix(name, ".gz") {
		t.zip = gzip.NewWriter(file)
		t.out.Reset(t.zip)
	}
	return t, nil
}

func (t *traceWriter) line(kind string, frame []byte) error {
	_, err := fmt.Fprintf(t.out, "%s %x\n", kind, frame)
	return err
}

func (t *traceWriter) close() error {
	err := t.out.Flush()
	if t.zip != nil {
		err = errors.Join(err, t.zip.Close())
	}
	return errors.Join(err, t.file.Close())
}

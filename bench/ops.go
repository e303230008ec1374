package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// operation is something to measure: a request type with the arguments that
// are typical of it.
//
// Each connection works in a directory of its own, which holds "file" (with
// the attribute user.bench), "link" (to file), and "from" or "to" (what RENAME
// moves to and fro). The i-th request of an operation may use a name that no
// other i uses. The operations in before make the files that it needs, and those
// in after remove the files that it leaves, with the same i. Neither is measured.
type operation struct {
	name          string
	typ           codec.Type
	size          int // size of the answer's payload
	fill          func(q *codec.Request, dir string, i int)
	before, after []string
	auxiliary     bool // only serves others: not measured unless asked for
}

const attribute = "user.bench"

var attributeValue = []byte(strings.Repeat("v", 64))

// onFile fills a request that has no other argument than the file.
func onFile(q *codec.Request, dir string, _ int) { q.Path = fid(dir, "file") }

// fid returns a path as QEMU sends that of a 9p fid: with its NUL.
func fid(dir, name string) codec.CString { return codec.CString(dir + "/" + name + "\x00") }

// fresh returns a path as QEMU builds it for a new name: without a NUL.
func fresh(dir string, i int) codec.CString {
	return codec.CString(dir + "/" + strconv.Itoa(100_000_000+i))
}

// index returns the i of the count-th request of an operation. It is unique among
// all operations, and alternate derives count from it.
func index(op, count int) int { return count*numOperations + op }

func alternate[T any](i int, even, odd T) T {
	if i/numOperations%2 == 0 {
		return even
	}
	return odd
}

func create(uid uint32) func(*codec.Request, string, int) {
	return func(q *codec.Request, dir string, i int) {
		q.Path, q.Flags, q.Mode = fresh(dir, i), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644
		q.UID, q.GID = uid, uid
	}
}

// setAttribute returns an LSETXATTR of the attribute of files.
func setAttribute(path codec.CString) codec.Request {
	return codec.Request{
		Path:  path,
		Name:  codec.CString(attribute),
		Value: attributeValue,
		Size:  int64(len(attributeValue)),
	}
}

var remove = []string{"remove"}

const numOperations = 22

var operations = [numOperations]operation{
	{name: "lstat", typ: codec.Lstat, size: codec.StatSize, fill: onFile},
	{name: "getversion", typ: codec.GetVersion, size: 8, fill: onFile},
	{
		name: "readlink", typ: codec.Readlink, size: 2 + len("file"),
		fill: func(q *codec.Request, dir string, _ int) {
			q.Path, q.Size = fid(dir, "link"), 4096
		},
	},
	{name: "statfs", typ: codec.Statfs, size: codec.StatfsSize, fill: onFile},
	{
		name: "lgetxattr", typ: codec.Lgetxattr, size: 2 + len(attributeValue),
		fill: func(q *codec.Request, dir string, _ int) {
			q.Path, q.Name, q.Size = fid(dir, "file"), codec.CString(attribute), 256
		},
	},
	{
		name: "llistxattr", typ: codec.Llistxattr, size: anySize,
		fill: func(q *codec.Request, dir string, _ int) {
			q.Path, q.Size = fid(dir, "file"), 256
		},
	},
	{name: "open", typ: codec.Open, fill: onFile},
	{
		name: "chmod", typ: codec.Chmod, size: 4,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path, q.Mode = fid(dir, "file"), alternate[uint32](i, 0o600, 0o644)
		},
	},
	{
		name: "chown", typ: codec.Chown, size: 4,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path = fid(dir, "file")
			q.UID, q.GID = alternate[uint32](i, 1000, 0), alternate[uint32](i, 1000, 0)
		},
	},
	{
		name: "utime", typ: codec.Utime, size: 4,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path = fid(dir, "file")
			q.Atime.Sec, q.Mtime.Sec = 1_000_000_000+int64(i), 1_000_000_000+int64(i)
		},
	},
	{
		name: "truncate", typ: codec.Truncate, size: 4,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path, q.Size = fid(dir, "file"), alternate[int64](i, 4096, 0)
		},
	},
	{
		name: "rename", typ: codec.Rename, size: 4,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path = codec.CString(dir + "/" + alternate(i, "from", "to"))
			q.NewPath = codec.CString(dir + "/" + alternate(i, "to", "from"))
		},
	},
	{
		name: "lsetxattr", typ: codec.Lsetxattr, size: 4,
		fill: func(q *codec.Request, dir string, _ int) { *q = setAttribute(fid(dir, "file")) },
	},
	{
		name: "lsetxattr-new", typ: codec.Lsetxattr, size: 4,
		auxiliary: true, before: []string{"mknod"}, after: remove,
		fill: func(q *codec.Request, dir string, i int) { *q = setAttribute(fresh(dir, i)) },
	},
	{
		name: "lremovexattr", typ: codec.Lremovexattr, size: 4,
		before: []string{"mknod", "lsetxattr-new"}, after: remove,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path, q.Name = fresh(dir, i), codec.CString(attribute)
		},
	},
	{name: "create", typ: codec.Create, fill: create(0), after: remove},
	{name: "create1000", typ: codec.Create, fill: create(1000), after: remove},
	{
		name: "mkdir", typ: codec.Mkdir, size: 4, after: remove,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path, q.Mode = fresh(dir, i), 0o755
		},
	},
	{
		name: "mknod", typ: codec.Mknod, size: 4, after: remove,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path, q.Mode = fresh(dir, i), unix.S_IFREG|0o644
		},
	},
	{
		name: "symlink", typ: codec.Symlink, size: 4, after: remove,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path, q.Target = fresh(dir, i), codec.CString("file")
		},
	},
	{
		name: "link", typ: codec.Link, size: 4, after: remove,
		fill: func(q *codec.Request, dir string, i int) {
			q.Path, q.NewPath = fid(dir, "file"), fresh(dir, i)
		},
	},
	{
		name: "remove", typ: codec.Remove, size: 4, before: []string{"mknod"},
		fill: func(q *codec.Request, dir string, i int) { q.Path = fresh(dir, i) },
	},
}

// guestMix counts the requests of a Linux guest that untarred, listed, searched,
// copied and deleted a small source tree.
const guestMix = "lstat=21328,getversion=7307,chmod=309,open=307,statfs=306,remove=198," +
	"utime=196,chown=193,lgetxattr=152,create=151,mkdir=43,readlink=2,mknod=2," +
	"rename=1,symlink=1,link=1,truncate=1"

func operationNamed(name string) (int, error) {
	lower := strings.ToLower(name)
	i := slices.IndexFunc(operations[:], func(o operation) bool { return o.name == lower })
	if i < 0 {
		return 0, fmt.Errorf("no operation %q: there are %s", name, operationNames())
	}
	return i, nil
}

func operationNames() string {
	var names []string
	for _, o := range operations {
		if !o.auxiliary {
			names = append(names, o.name)
		}
	}
	return strings.Join(names, ",")
}

func (o *operation) request(op int, dir string, i int) request {
	var q codec.Request
	o.fill(&q, dir, i)
	return request{frame: q.Append(nil, o.typ), op: op, typ: o.typ, size: o.size}
}

// workload describes a run of chunks.
type workload struct {
	name     string
	ops      []string               // names of operations; request.op is an index of it
	pause    time.Duration          // before each request
	connects int                    // if not 0: new clients in a chunk, instead of next
	rounds   int                    // 0: the number in the options
	next     func(conn int) batch   // returns a connection's next chunk, which every program gets
	before   func(p *program) error // called before each pass, if not nil
	pass     int                    // rounds in a pass over a trace; 0: there are no passes
}

// batch is one connection's part of a chunk: only timed is measured.
type batch struct{ before, timed, after []request }

// weighted is an operation and its relative frequency.
type weighted struct{ op, weight int }

func parseMix(text string) (mix []weighted, err error) {
	if text == "guest" {
		text = guestMix
	}
	for field := range strings.SplitSeq(text, ",") {
		name, number, _ := strings.Cut(field, "=")
		op, err := operationNamed(name)
		if err != nil {
			return nil, err
		}
		weight, err := strconv.Atoi(number)
		if err != nil || weight < 1 {
			return nil, fmt.Errorf("mix %q: want operation=weight, a positive number", field)
		}
		mix = append(mix, weighted{op, weight})
	}
	return mix, nil
}

// mixture returns a workload of chunks of size requests, drawn at random from mix.
func mixture(name string, mix []weighted, size int, dirs []string, seed uint64) workload {
	var ops []string
	total := 0
	for _, m := range mix {
		ops = append(ops, operations[m.op].name)
		total += m.weight
	}
	random := rand.New(rand.NewPCG(seed, 0))
	counts := make([][numOperations]int, len(dirs)) // requests of each connection so far
	return workload{name: name, ops: ops, next: func(conn int) (b batch) {
		dir := dirs[conn]
		for range size {
			k, at := random.IntN(total), 0
			for ; k >= mix[at].weight; at++ {
				k -= mix[at].weight
			}
			op := mix[at].op
			o, i := &operations[op], index(op, counts[conn][op])
			counts[conn][op]++
			for _, aux := range o.before {
				n, _ := operationNamed(aux)
				b.before = append(b.before, operations[n].request(0, dir, i))
			}
			b.timed = append(b.timed, o.request(at, dir, i))
			for _, aux := range o.after {
				n, _ := operationNamed(aux)
				b.after = append(b.after, operations[n].request(0, dir, i))
			}
		}
		return b
	}}
}

// fixtures returns the requests that make the directory of a connection, and
// those that remove it.
func fixtures(dir string) (setup, teardown []request) {
	add := func(list *[]request, t codec.Type, q codec.Request) {
		r := request{frame: q.Append(nil, t), typ: t, size: anySize}
		*list = append(*list, r)
	}
	add(&setup, codec.Mkdir, codec.Request{Path: codec.CString(dir), Mode: 0o755})
	for _, name := range []string{"file", "from"} {
		add(&setup, codec.Mknod, codec.Request{
			Path: codec.CString(dir + "/" + name),
			Mode: unix.S_IFREG | 0o644,
		})
	}
	add(&setup, codec.Symlink, codec.Request{
		Path:   codec.CString(dir + "/link"),
		Target: codec.CString("file"),
	})
	add(&setup, codec.Lsetxattr, setAttribute(fid(dir, "file")))
	for _, name := range []string{"/file", "/from", "/to", "/link", ""} {
		add(&teardown, codec.Remove, codec.Request{Path: codec.CString(dir + name)})
	}
	return setup, teardown
}

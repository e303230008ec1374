package main

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// fakeServer returns the client's end of a connection. It calls answer for each
// request, to write the answer, until it returns false.
func fakeServer(t *testing.T, answer func(to *net.UnixConn) bool) (fd int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[1]), "fake server")
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer conn.Close()
		header := make([]byte, codec.HeaderSize)
		for {
			if _, err := io.ReadFull(conn, header); err != nil {
				return
			}
			io.CopyN(io.Discard, conn, int64(binary.NativeEndian.Uint32(header[4:])))
			if !answer(conn.(*net.UnixConn)) {
				return
			}
		}
	}()
	return fds[0]
}

func TestExchange(t *testing.T) {
	stat := codec.AppendStat(nil, &unix.Stat_t{})
	write := func(b []byte) func(*net.UnixConn) bool {
		return func(to *net.UnixConn) bool { to.Write(b); return true }
	}
	enoent := codec.AppendErrno(nil, codec.Lstat, unix.ENOENT)
	noSize := []byte("\x00\x00\x00\x00\xff\xff\xff\xff")
	lstat := request{typ: codec.Lstat, size: codec.StatSize}
	noEntry := request{typ: codec.Lstat, errno: unix.ENOENT}
	open := request{typ: codec.Open}
	for _, test := range []struct {
		name   string
		req    request
		answer func(*net.UnixConn) bool
		wrong  int
		fails  bool
	}{
		{name: "a stat", req: lstat, answer: write(stat)},
		{name: "in pieces", req: lstat, answer: func(to *net.UnixConn) bool {
			for i := range stat {
				to.Write(stat[i : i+1])
			}
			return true
		}},
		{name: "an error", req: lstat, answer: write(enoent), wrong: 2},
		{name: "an expected error", req: noEntry, answer: write(enoent)},
		{name: "another size", req: lstat, answer: write(codec.AppendVersion(nil, 1)), wrong: 2},
		{name: "any size", req: request{typ: codec.Lstat, size: anySize}, answer: write(codec.AppendVersion(nil, 1))},
		{name: "a descriptor", req: open, answer: func(to *net.UnixConn) bool {
			to.WriteMsgUnix(codec.AppendFD(nil), unix.UnixRights(0), nil)
			return true
		}},
		{name: "a descriptor that isn't there", req: open, answer: write(codec.AppendFD(nil)), wrong: 2},
		{name: "no descriptor", req: open, answer: write(codec.AppendErrno(nil, codec.Open, unix.EACCES)), wrong: 2},
		{name: "an end", req: lstat, answer: func(*net.UnixConn) bool { return false }, fails: true},
		{name: "a size that is none", req: lstat, answer: write(noSize), fails: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := &program{name: "fake", clients: []*client{newClient(fakeServer(t, test.answer), anyCPU, 0)}}
			t.Cleanup(p.stop)
			test.req.frame = touchRoot[0].frame
			_, elapsed, err := p.exchange(func(int) []request { return []request{test.req, test.req} }, 0, true)
			if (err != nil) != test.fails {
				t.Fatalf("error %v", err)
			}
			if n, first := p.wrong(); n != test.wrong {
				t.Errorf("%d wrong answers: %s", n, first)
			}
			if err == nil && (elapsed[0][0] <= 0 || elapsed[0][1] <= 0) {
				t.Errorf("elapsed: %v", elapsed)
			}
		})
	}
}

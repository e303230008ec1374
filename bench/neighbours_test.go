package main

import (
	"context"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

func TestNeighbours(t *testing.T) {
	helpertest.C(t)
	helpertest.NeedFUSE(t)
	o, err := parseOptions([]string{
		"--hang", "5", "--peer", "--rounds", "2", "--chunk", "10",
		"--connections", "2", "--pin", "shared", "--dir", t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := run(context.Background(), o, io.Discard)
	if err != nil || len(r.Notes) > 0 {
		t.Fatal(err, r.Notes)
	}
	// The number of programs. The C helper accepts no new connections.
	want := map[string]int{"lstat": 5, "open": 5, "connect": 3}
	comparedTo := map[string]string{"hung": "calm", "flooded": "calm", "peer flooded": "peer"}
	for _, row := range r.Rows {
		if len(row.Programs) != want[row.Operation] {
			t.Errorf("%s: %d programs", row.Operation, len(row.Programs))
		}
		requests := int64(40)
		if row.Operation == "connect" {
			requests = 20
		}
		for _, f := range row.Programs {
			against := comparedTo[f.Program]
			if f.Requests != requests || f.Wrong > 0 ||
				f.Against != against || (f.Ratios == nil) != (against == "") {
				t.Errorf("%s, %s: %+v", row.Operation, f.Program, f)
			}
		}
		delete(want, row.Operation)
	}
	if len(want) > 0 || len(r.Floods) != 2 || !(r.Floods[0].Throughput > 0) || !(r.Floods[1].Throughput > 0) {
		t.Errorf("missing: %v; floods: %+v", want, r.Floods)
	}
}

// A flood counts the answers.
func TestFloodCounts(t *testing.T) {
	stat := codec.AppendStat(nil, &unix.Stat_t{})
	for name, answer := range map[string]func(*net.UnixConn) bool{
		"twice":  func(to *net.UnixConn) bool { to.Write(stat); to.Write(stat); return true },
		"no end": func(to *net.UnixConn) bool { return false },
	} {
		f := &flood{fd: fakeServer(t, answer), cpu: anyCPU}
		defer unix.Close(f.fd)
		f.start()
		if err := f.stop(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	f := &flood{fd: fakeServer(t, func(to *net.UnixConn) bool { to.Write(stat); return true }), cpu: anyCPU}
	defer unix.Close(f.fd)
	f.start()
	if err := f.stop(); err != nil || f.answered < floodBatch {
		t.Errorf("%v, %v answered", err, f.answered)
	}
}

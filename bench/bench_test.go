package main

import (
	"context"
	"encoding/json"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"virtfs-proxy-helper/bench/helpertest"
)

// TestMain serves as the floor if a test has started this binary as one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == floorArg {
		if err := serveFloor(3); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	// As run does, for the tests of a single client: a client in a raw system call
	// occupies a processor, on a machine that may have one, and a collection would
	// wait for it.
	runtime.GOMAXPROCS(8)
	debug.SetGCPercent(-1)
	os.Exit(m.Run())
}

// smoke runs bench with the C helper as helper and as peer, and checks that every
// answer is right.
func smoke(t *testing.T, args ...string) *report {
	t.Helper()
	helpertest.C(t)
	o, err := parseOptions(append(args, "--dir", t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	r, err := run(context.Background(), o, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range r.Rows {
		for _, f := range row.Programs {
			if f.Wrong > 0 || f.Requests == 0 || f.P50 <= 0 {
				t.Errorf("%s, %s: %+v", row.Operation, f.Program, f)
			}
		}
	}
	if len(r.Rows) == 0 || len(r.Notes) > 0 {
		t.Errorf("%d rows; %q", len(r.Rows), r.Notes)
	}
	return r
}

func TestEveryOperation(t *testing.T) {
	dir := t.TempDir()
	page, results := filepath.Join(dir, "page.html"), filepath.Join(dir, "results.json")
	r := smoke(t, "-helper", cHelper, "-peer", "--floor", "--connections", "1,2", "--pin", "shared,unpinned",
		"--rounds", "2", "--chunk", "10", "--sparse", "1ms", "--idle", "10ms", "--html", page, "--json", results)
	if want := 2 * 2 * (numOperations - 1 + 1); len(r.Rows) != want { // without the auxiliary, with the sparse
		t.Errorf("%d rows, want %d", len(r.Rows), want)
	}
	if len(r.Rows[0].Programs) != 3 || r.Rows[0].Programs[0].Ratios == nil || r.Rows[0].Programs[0].Requests != 20 {
		t.Errorf("first row: %+v", r.Rows[0])
	}
	if len(r.Idle) != 2*2*2 || r.Idle[0].PSS <= 0 || r.Idle[0].RSS < r.Idle[0].PSS || !(r.Idle[0].CPU >= 0) {
		t.Errorf("idle: %+v", r.Idle)
	}
	text, err := os.ReadFile(results)
	if err != nil || !json.Valid(text) {
		t.Errorf("JSON: %v, %.100s", err, text)
	}
	html, err := os.ReadFile(page)
	lines := 0
	eachRatio(r.Rows, func(string, *ratios) { lines++ })
	if err != nil || lines < len(r.Rows) || strings.Count(string(html), "<svg") != 1 ||
		strings.Count(string(html), "<circle") != lines || !strings.Contains(string(html), "create1000") {
		t.Errorf("HTML: %v, %d lines of %d rows, %.100s", err, lines, len(r.Rows), html)
	}
	for _, remote := range []string{"<script", "<link", "src=", "@import"} {
		if strings.Contains(string(html), remote) {
			t.Errorf("the page is not self-contained: %s", remote)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "bench-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestGuestMix(t *testing.T) {
	r := smoke(t, "--helper", cHelper, "--mix", "guest", "--connections", "3", "--count", "500", "--chunk", "200")
	if all := r.Rows[len(r.Rows)-1]; all.Operation != "mix" || all.Programs[0].Requests != 3*3*200 {
		t.Errorf("last row: %+v", all)
	}
}

// A trace of requests that bench has sent can be replayed.
func TestRecordAndReplay(t *testing.T) {
	helpertest.C(t)
	dir := t.TempDir()
	p := &program{name: "recorded", export: filepath.Join(dir, "export")}
	if err := os.Mkdir(p.export, 0o755); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "helper")
	listen := filepath.Join(dir, "listen")
	trace := filepath.Join(dir, "trace.gz")
	args := []string{"-n", "-p", p.export, "-s", name, "-u", "0", "-g", "0"}
	if err := p.exec(cHelper, args, nil, anyCPU); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, err := os.Stat(name); err != nil && ctx.Err() == nil; _, err = os.Stat(name) {
		time.Sleep(time.Millisecond)
	}
	recorded := make(chan error)
	go func() { recorded <- record(ctx, trace, listen, name) }()
	smoke(t, "--socket", listen, "--rounds", "1", "--chunk", "4")
	if err := <-recorded; err != nil {
		t.Fatal(err)
	}
	list, err := openTrace(trace)
	if err != nil {
		t.Fatal(err)
	}
	r := smoke(t, "--helper", cHelper, "--peer", "--replay", trace, "--rounds", "2")
	if all := r.Rows[len(r.Rows)-1]; all.Operation != "replay" || all.Programs[1].Requests != int64(2*len(list)) {
		t.Errorf("last row: %+v, recorded %d", all, len(list))
	}
}

func TestOptions(t *testing.T) {
	for args, want := range map[string]string{
		"--connections 0":            "want 1 to 1000",
		"--replay x --connections 2": "one connection",
		"--count 1 --duration 1s":    "exclude each other",
		"--record x":                 "go together",
		"--socket x --helper y":      "excludes --helper",
		"lstat":                      "only options",
		"--mix guest --replay x":     "exclude each other",
		"--rounds 0":                 "positive",
	} {
		if _, err := parseOptions(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", args, err, want)
		}
	}
	o, err := parseOptions([]string{"-matrix", "-peer", "--connections=1"})
	if err != nil || o.peer != cHelper || len(o.pin) != 3 || !slices.Equal(o.connections, []int{1}) {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestMixture(t *testing.T) {
	for _, text := range []string{"nonsense=1", "lstat", "lstat=0", "lstat=x"} {
		if _, err := parseMix(text); err == nil {
			t.Errorf("%q is taken for a mix", text)
		}
	}
	mix, err := parseMix("guest")
	if err != nil {
		t.Fatal(err)
	}
	draw := func(seed uint64) batch {
		w := mixture("mix", mix, 100, []string{"//dir"}, seed)
		w.next(0)
		return w.next(0)
	}
	if !reflect.DeepEqual(draw(1), draw(1)) {
		t.Error("the same seed gives other requests")
	}
	if reflect.DeepEqual(draw(1), draw(2)) {
		t.Error("another seed gives the same requests")
	}
	for _, o := range operations {
		for _, name := range slices.Concat(o.before, o.after) {
			if _, err := operationNamed(name); err != nil {
				t.Errorf("%s: %v", o.name, err)
			}
		}
	}
}

// The table has a figure in each cell, and all operations are measured.
func TestTable(t *testing.T) {
	helpertest.C(t)
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs, for the placement split")
	}
	o, err := parseOptions([]string{
		"--table", "--helper", cHelper, "--rounds", "1", "--chunk", "4", "--dir", t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	r, err := run(context.Background(), o, &out)
	if err != nil || len(r.Notes) > 0 {
		t.Fatal(err, r.Notes)
	}
	measured := map[string]bool{}
	for _, g := range tableGroups {
		for _, op := range g.ops {
			measured[op] = true
		}
	}
	for _, o := range operations {
		if !o.auxiliary && !measured[o.name] {
			t.Errorf("%s is in no row", o.name)
		}
	}
	var rows []string
	for line := range strings.Lines(out.String()) {
		if strings.HasPrefix(line, "| ") {
			rows = append(rows, line)
			if n := strings.Count(line, "|"); n != 6 {
				t.Errorf("%d bars: %s", n, line)
			}
		}
	}
	if want := 2 + len(tableGroups) + 3 + 2 + 2*len(tableSparse); len(rows) != want {
		t.Errorf("%d rows, want %d:\n%s", len(rows), want, out.String())
	}
}

func TestWorst(t *testing.T) {
	r := &report{}
	for op, v := range map[string]number{"lstat": 0.9, "open": 1.1, "chmod": number(math.NaN())} {
		r.Rows = append(r.Rows, row{
			Placement:   "split",
			Connections: 1,
			Operation:   op,
			Programs:    []figures{{Ratios: &ratios{P50: v, Throughput: 1 / v}}},
		})
	}
	ops := []string{"chmod", "lstat", "open"}
	if got := r.worst("split", 1, ops, 1, func(q *ratios) number { return q.P50 }); got != "1.10 open" {
		t.Error(got)
	}
	if got := r.worst("split", 1, ops, -1, func(q *ratios) number { return q.Throughput }); got != "0.91 open" {
		t.Error(got)
	}
	if got := r.worst("split", 64, ops, 1, func(q *ratios) number { return q.P50 }); got != "-" {
		t.Error(got)
	}
}

// Bench is a synthetic QEMU: it sends a helper the same requests in the same way
// as QEMU, checks every answer, and measures latencies. It starts the helper, and
// the C helper beside it, by itself:
//
//	go run ./bench                  ours, each operation, one connection
//	go run ./bench --peer           beside the C helper, with ratios
//	go run ./bench --peer --matrix  all placements and numbers of connections
//
// The files:
//
//	ops.go         the requests of each operation
//	client.go      sends requests and takes the time
//	server.go      starts the programs that are compared
//	floor.go       one of them: a server that answers without any work
//	run.go         lets the programs take turns
//	stats.go       percentiles and ratios
//	report.go      the tables and the JSON output
//	table.go       all operations in groups, pinned (--table)
//	plot.go        the HTML page
//	machine.go     placement on CPUs
//	neighbours.go  other connections to the same helper
//	scratch.go     the file system to measure on
//	trace.go       traces of a guest's requests, and their replay
//	record.go      recording of such a trace
//	proc/          CPU time and memory of processes
//	slowfs/        a file system that answers late or not at all
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
)

type options struct {
	helper, peer, socket string
	floor, matrix, table bool

	connections []int
	pin         []string

	ops         []string
	mix, replay string
	sparse      []time.Duration
	idle        time.Duration
	hang        int

	rounds, chunk, count int
	duration             time.Duration
	seed                 uint64
	dir, scratch         string

	json, html     string
	record, listen string
}

const usage = `Bench measures helpers for QEMU's "-fsdev proxy": it plays QEMU, one request in
flight on each connection, and prints latency, throughput and CPU time.

  bench --peer                        every operation, ours beside the C helper
  bench --table                       all operations in groups, pinned, in some minutes
  bench --peer --ops lstat,create     two of them
  bench --peer --mix guest            what a Linux guest sends, at random
  bench --peer --replay g.trace.gz    what a guest has sent, in order; the ratio of
                                      the times is the inverse of that of req/s
  bench --peer --matrix --html p.html the whole truth, in a quarter of an hour
  bench --hang 24 --pin split,shared  what others who hang, or flood, do to a VM
  bench --peer --ops lstat --connections 1,64,256 --idle 5s
                                      memory and CPU time of idle connections
  bench --record guest.trace.gz --listen NEW --socket NAME
                                      record a guest: QEMU connects to NEW, the
                                      helper listens on NAME

Programs take turns in small chunks of the same requests. A ratio is the median
of the ratios of neighbouring chunks: machines drift, neighbours drift alike.
Before each chunk come 32 unmeasured requests, after it whatever clears up.

Options:
`

func parseOptions(args []string) (*options, error) {
	o := &options{}
	f := pflag.NewFlagSet("bench", pflag.ContinueOnError)
	f.SortFlags = false
	f.StringVar(&o.helper, "helper", "",
		"the helper to measure; default: build the one of this module")
	f.StringVar(&o.socket, "socket", "",
		"measure the running helper that listens on this `name`, instead")
	f.StringVar(&o.peer, "peer", "",
		"run this `helper`, one process for each connection, beside it (no value: the C helper)")
	f.Lookup("peer").NoOptDefVal = cHelper
	f.BoolVar(&o.floor, "floor", false,
		"beside LSTAT, run a server that answers without looking: what the wire alone costs")
	f.IntSliceVar(&o.connections, "connections", []int{1},
		"how many connections; each `number` is measured by itself")
	f.StringSliceVar(&o.pin, "pin", []string{"unpinned"},
		"where clients and servers run: split (a CPU each), shared (one CPU), unpinned")
	f.StringSliceVar(&o.ops, "ops", strings.Split(operationNames(), ","), "which operations")
	f.StringVar(&o.mix, "mix", "",
		"instead of one operation after the other a random mixture, such as "+
			"lstat=70,open=30; or guest")
	f.StringVar(&o.replay, "replay", "",
		"instead, the requests of a recorded trace, on one connection (`file`, perhaps .gz)")
	f.IntVar(&o.rounds, "rounds", 21,
		"how many chunks of each operation every program gets; of a replay: how often")
	f.IntVar(&o.chunk, "chunk", 0,
		"requests in a chunk on each connection (default 1024 by connections, at least 64)")
	f.IntVar(&o.count, "count", 0,
		"requests on each connection, instead of --rounds (rounded up to chunks)")
	f.DurationVar(&o.duration, "duration", 0,
		"go on with each operation for that long, instead of --rounds")
	f.DurationSliceVar(&o.sparse, "sparse", nil,
		"also LSTAT with such a pause before each request, for example 2ms,20ms")
	f.DurationVar(&o.idle, "idle", 0,
		"at the end, measure CPU time and memory of idle helpers for that long")
	f.IntVar(&o.hang, "hang", 0,
		"compare the helper to itself: while this `number` of other connections hang in a "+
			"file system that does not answer, while one sends requests without waiting for "+
			"answers, and while nobody does; by default --ops lstat,open, and also how long "+
			"a new client waits for its first answer")
	f.BoolVar(&o.matrix, "matrix", false,
		"--connections 1,8,64 --pin split,shared,unpinned --floor --sparse 2ms,20ms --idle 5s, "+
			"where not given")
	f.BoolVar(&o.table, "table", false,
		"beside the C helper, measure all operations in groups, pinned, and print them as Markdown")
	f.Uint64Var(&o.seed, "seed", 1, "of the random mixture")
	f.StringVar(&o.dir, "dir", "",
		"where to make the directories to export (default: a fresh ext4 in memory)")
	f.StringVar(&o.json, "json", "", "write the results to this `file`")
	f.StringVar(&o.html, "html", "",
		"write a page with the tables and a plot of the ratios to this `file`")
	f.StringVar(&o.record, "record", "",
		"don't measure: record a trace to this `file`, between QEMU and a helper")
	f.StringVar(&o.listen, "listen", "", "with --record: the `name` that QEMU connects to")
	f.StringVar(&o.scratch, "scratch", "", "")
	f.MarkHidden("scratch")
	f.Usage = func() { fmt.Print(usage, f.FlagUsagesWrapped(100)) }
	args = append([]string(nil), args...)
	for i, a := range args { // there are no short options: -peer is --peer
		if len(a) > 2 && a[0] == '-' && a[1] != '-' {
			args[i] = "-" + a
		}
	}
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("%q: there are only options", f.Arg(0))
	}
	if o.matrix {
		for name, value := range map[string]string{
			"connections": "1,8,64",
			"pin":         "split,shared,unpinned",
			"floor":       "true",
			"sparse":      "2ms,20ms",
			"idle":        "5s",
		} {
			if !f.Changed(name) {
				f.Set(name, value)
			}
		}
	}
	if o.table {
		if !f.Changed("peer") {
			o.peer = cHelper
		}
		if !f.Changed("rounds") {
			o.rounds = tableRounds
		}
	}
	if o.hang > 0 && !f.Changed("ops") {
		o.ops = []string{"lstat", "open"}
	}
	if o.count > 0 && o.duration > 0 {
		return nil, errors.New("--count and --duration exclude each other")
	}
	for _, n := range o.connections {
		if n < 1 || n > 1000 {
			return nil, fmt.Errorf("--connections %d: want 1 to 1000", n)
		}
		if o.replay != "" && n != 1 {
			return nil, errors.New("--replay takes one connection: a trace has paths of its own")
		}
	}
	for _, name := range o.ops {
		if _, err := operationNamed(name); err != nil {
			return nil, err
		}
	}
	if o.mix != "" {
		if _, err := parseMix(o.mix); err != nil {
			return nil, err
		}
	}
	given := func(names ...string) bool { return slices.ContainsFunc(names, f.Changed) }
	switch {
	case o.rounds < 1 || o.chunk < 0 || o.count < 0 || o.duration < 0 || o.idle < 0 || o.hang < 0:
		return nil, errors.New("--rounds, --chunk, --count, --duration, --idle, --hang: " +
			"want positive numbers")
	case o.table && (given("connections", "pin", "ops", "sparse") ||
		o.mix != "" || o.socket != "" || o.floor || o.matrix || o.hang > 0):
		return nil, errors.New("--table goes with --helper, --peer, --replay, --rounds, --chunk, " +
			"--idle, --json, --html alone")
	case o.hang > 0 && (o.socket != "" || o.replay != "" || o.mix != "" || o.floor || o.matrix):
		return nil, errors.New("--hang goes with --peer, --ops, --sparse, --idle; " +
			"not with --socket, --replay, --mix, --floor, --matrix")
	case (o.record != "") != (o.listen != "") || o.record != "" && o.socket == "":
		return nil, errors.New("--record, --listen and --socket go together")
	case o.socket != "" && (o.helper != "" || o.replay != ""):
		return nil, errors.New("--socket excludes --helper, and --replay, which has to make files")
	case o.replay != "" && o.mix != "":
		return nil, errors.New("--replay and --mix exclude each other")
	}
	return o, nil
}

func main() {
	if err := bench(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is main with an error result, so that deferred calls run before exit.
func bench() error {
	if len(os.Args) > 1 && os.Args[1] == floorArg {
		return serveFloor(3) // bench has started this process in a helper's place
	}
	o, err := parseOptions(os.Args[1:])
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return nil
	case err != nil:
		return fmt.Errorf("%w; see --help", err)
	case o.dir == "" && o.scratch == "" && o.socket == "":
		err := enterScratch() // returns only if it fails
		fmt.Fprintln(os.Stderr,
			"bench: measuring in", os.TempDir(), "because there is no ext4 of our own:", err)
	case o.scratch != "":
		o.dir = filepath.Join(o.scratch, "fs")
		defer leaveScratch(o.scratch)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if o.record != "" {
		return record(ctx, o.record, o.listen, o.socket)
	}
	_, err = run(ctx, o, os.Stdout)
	return err
}

// run measures as the options say, in a temporary directory that it removes.
func run(ctx context.Context, o *options, out io.Writer) (*report, error) {
	at, err := placements(o.pin)
	if err != nil {
		return nil, err
	}
	if o.peer != "" {
		if err := needHelper(o.peer); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(o.dir, "bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if o.helper == "" && o.socket == "" {
		o.helper = filepath.Join(dir, "virtfs-proxy-helper")
		build := exec.CommandContext(ctx, "go", "build", "-o", o.helper, "virtfs-proxy-helper")
		if text, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("go build: %w\n%s", err, text)
		}
	}
	r, tell := newReport(), newProgress()
	if o.table {
		err = table(ctx, o, dir, r, tell, out)
	} else {
		for _, placement := range at {
			for _, n := range o.connections {
				err = errors.Join(err, runCell(ctx, o, placement, n, dir, r, tell))
			}
		}
		tell.end() // print the results even after an error
		r.print(out)
	}
	if o.json != "" {
		err = errors.Join(err, r.writeJSON(o.json))
	}
	if o.html != "" {
		err = errors.Join(err, r.writeHTML(o.html))
	}
	return r, err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// The table of all operations in groups (--table): ratios to the C helper, of the
// worst operation of each group.

// tableGroups are the rows of the table: all operations, in groups of similar ones.
var tableGroups = []struct {
	title string
	ops   []string
}{
	{
		"LSTAT, READLINK, STATFS, xattr reads",
		[]string{"lstat", "readlink", "statfs", "lgetxattr", "llistxattr"},
	},
	{
		"GETVERSION",
		[]string{"getversion"},
	},
	{
		"OPEN, CHMOD, CHOWN, UTIME, RENAME, REMOVE, TRUNCATE, LINK, xattr writes",
		[]string{
			"open", "chmod", "chown", "utime", "rename", "remove", "truncate", "link",
			"lsetxattr", "lremovexattr",
		},
	},
	{
		"CREATE, MKDIR, MKNOD, SYMLINK as 0:0",
		[]string{"create", "mkdir", "mknod", "symlink"},
	},
	{
		"CREATE as 1000:1000",
		[]string{"create1000"},
	},
}

var (
	tablePlacements  = []string{"split", "shared"}
	tableConnections = []int{1, 64}
	tableSparse      = []time.Duration{2 * time.Millisecond, 20 * time.Millisecond}
)

// tableRounds is the default of --rounds with --table. tableReplays bounds the
// passes over the whole trace, each of some thirty chunks.
const (
	tableRounds  = 15
	tableReplays = 2
)

// table measures the operations of the table and prints nothing else.
func table(
	ctx context.Context, o *options, dir string, r *report, tell *progress, out io.Writer,
) (err error) {
	at, err := placements(tablePlacements)
	if err != nil {
		return err
	}
	if o.replay == "" {
		if o.replay, err = guestTrace(); err != nil {
			return err
		}
	}
	for _, at := range at {
		for _, n := range tableConnections {
			every := *o
			every.replay = ""
			if every.chunk == 0 {
				every.chunk = max(512/n, 32)
			}
			if n == 1 {
				every.sparse = tableSparse
			}
			err = errors.Join(err, runCell(ctx, &every, at, n, dir, r, tell))
		}
		again := *o
		again.rounds = min(o.rounds, tableReplays)
		err = errors.Join(err, runCell(ctx, &again, at, 1, filepath.Join(dir, "replay"), r, tell))
	}
	tell.end()
	r.printTable(out)
	return err
}

// guestTrace returns the name of this module's trace of a guest.
func guestTrace() (string, error) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "virtfs-proxy-helper/codec").Output()
	if err != nil {
		return "", fmt.Errorf("go list: %w: give --replay", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "testdata", "guest-untar.trace.gz"), nil
}

// ratiosOf returns the measured ratios of an operation, nil if it was not
// measured.
func (r *report) ratiosOf(placement string, connections int, operation string) *ratios {
	cell := &row{Placement: placement, Connections: connections}
	for _, row := range r.Rows {
		if row.sameCell(cell) && row.Operation == operation {
			return row.Programs[0].Ratios
		}
	}
	return nil
}

// worst returns the text of a cell, the worst of some operations: "0.97 readlink".
// sign is 1 if less is better, else -1.
func (r *report) worst(
	placement string, connections int, ops []string, sign float64, of func(*ratios) number,
) string {
	cell, most := "-", math.Inf(-1)
	for _, op := range ops {
		q := r.ratiosOf(placement, connections, op)
		if q == nil {
			continue
		}
		if v := sign * float64(of(q)); v > most {
			most = v
			cell = of(q).text("%.2f")
			if len(ops) > 1 {
				cell += " " + op
			}
		}
	}
	return cell
}

func (r *report) printTable(out io.Writer) {
	p50 := func(q *ratios) number { return q.P50 }
	p99 := func(q *ratios) number { return q.P99 }
	p99All := func(q *ratios) number { return q.P99All }
	throughput := func(q *ratios) number { return q.Throughput }
	cpu := func(q *ratios) number { return q.CPU }

	var all []string
	fewest := 0 // pairs
	for _, g := range tableGroups {
		all = append(all, g.ops...)
	}
	for _, row := range r.Rows {
		q := row.Programs[0].Ratios
		if q == nil || row.Operation != row.Workload {
			continue
		}
		if fewest == 0 || q.Pairs < fewest {
			fewest = q.Pairs
		}
	}
	fmt.Fprintf(out, "Ratios to QEMU's helper in C, one process a connection: the worst operation "+
		"of each row, by name. Each is the median of at least %d ratios of\n"+
		"neighbouring chunks. split: clients and helper have a CPU each; "+
		"shared: one CPU for both. %d CPUs, Linux %s.\n\n",
		fewest, r.CPUs, strings.TrimSpace(r.Kernel))
	fmt.Fprintln(out, "| | 1 connection, split | 1 connection, shared | "+
		"64 connections, split | 64 connections, shared |")
	fmt.Fprintln(out, "| --- | --- | --- | --- | --- |")
	line := func(title string, cell func(placement string, connections int) string) {
		fmt.Fprintf(out, "| %s |", title)
		for _, n := range tableConnections {
			for _, at := range tablePlacements {
				fmt.Fprintf(out, " %s |", cell(at, n))
			}
		}
		fmt.Fprintln(out)
	}
	for _, g := range tableGroups {
		line(g.title+": median; requests a second", func(at string, n int) string {
			if n == 1 {
				return r.worst(at, n, g.ops, 1, p50)
			}
			return r.worst(at, n, g.ops, -1, throughput)
		})
	}
	ofAll := func(of func(*ratios) number) func(string, int) string {
		return func(at string, n int) string { return r.worst(at, n, all, 1, of) }
	}
	line("99th percentile, all of the above", ofAll(p99))
	line("99th percentile of all chunks together", ofAll(p99All))
	line("CPU time, all of the above", ofAll(cpu))
	only1 := func(cell func(at string) string) func(string, int) string {
		return func(at string, n int) string {
			if n > 1 {
				return ""
			}
			return cell(at)
		}
	}
	ofOne := func(operation string, of func(*ratios) number) func(string, int) string {
		return only1(func(at string) string {
			return r.worst(at, 1, []string{operation}, 1, of)
		})
	}
	line("a recorded guest, replayed: time", only1(func(at string) string {
		q := r.ratiosOf(at, 1, "replay")
		if q == nil {
			return "-"
		}
		return (1 / q.Throughput).text("%.2f")
	}))
	line("a recorded guest, replayed: CPU time", ofOne("replay", cpu))
	for _, pause := range tableSparse {
		name := sparseName(pause)
		line(fmt.Sprintf("an LSTAT every %v: median", pause), ofOne(name, p50))
		line(fmt.Sprintf("an LSTAT every %v: CPU time", pause), ofOne(name, cpu))
	}
	for _, note := range r.Notes {
		fmt.Fprintf(out, "\n%s\n", note)
	}
}

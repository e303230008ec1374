package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"text/tabwriter"
	"time"
)

// number is a figure. NaN becomes null in JSON.
type number float64

func (n number) MarshalJSON() ([]byte, error) {
	if f := float64(n); math.IsNaN(f) || math.IsInf(f, 0) {
		return []byte("null"), nil
	}
	return fmt.Appendf(nil, "%.4g", float64(n)), nil
}

// text formats n, or a dash if there is none.
func (n number) text(format string) string {
	if math.IsNaN(float64(n)) || math.IsInf(float64(n), 0) {
		return "-"
	}
	return fmt.Sprintf(format, float64(n))
}

// report holds the results of a run, as --json writes them.
type report struct {
	Command []string    `json:"command"`
	Kernel  string      `json:"kernel"`
	CPUs    int         `json:"cpus"`
	Rows    []row       `json:"rows"`
	Idle    []idle      `json:"idle,omitempty"`
	Floods  []floodRate `json:"floods,omitempty"`
	Notes   []string    `json:"notes,omitempty"`
}

// row holds the results of one operation in one cell.
type row struct {
	Placement   string    `json:"placement"`
	Connections int       `json:"connections"`
	Workload    string    `json:"workload"`
	Operation   string    `json:"operation"`
	Programs    []figures `json:"programs"`
}

// sameCell reports whether both rows have the same placement and number of
// connections.
func (r *row) sameCell(other *row) bool {
	return r.Placement == other.Placement && r.Connections == other.Connections
}

// figures holds the results of one program in a row. Times are in microseconds.
type figures struct {
	Program  string `json:"program"`
	Requests int64  `json:"requests"`
	// Wrong counts answers of another kind than expected, in the whole workload.
	Wrong        int          `json:"wrong"`
	P50          number       `json:"p50_us"`
	P99          number       `json:"p99_us"`
	P999         number       `json:"p99.9_us"`
	Throughput   number       `json:"requests_per_second"`
	CPU          number       `json:"cpu_us_per_request"`
	Against      string       `json:"against,omitempty"` // the program that Ratios compare to
	Ratios       *ratios      `json:"ratios,omitempty"`
	Distribution [][2]float64 `json:"distribution"` // percent, microseconds
}

// idle holds the cost of a program while no request comes.
type idle struct {
	Placement     string `json:"placement"`
	Connections   int    `json:"connections"`
	Program       string `json:"program"`
	Processes     int    `json:"processes"`
	Threads       int    `json:"threads"`
	CPU           number `json:"cpu_ms_per_second"`
	RSS           number `json:"rss_kib"`
	PSS           number `json:"pss_kib"`         // see proc.Memory
	PageTables    number `json:"page_tables_kib"` // in neither
	PerConnection number `json:"pss_kib_per_further_connection"`
}

// floodRate is the throughput of a connection that sends requests without waiting
// for answers.
type floodRate struct {
	Placement   string `json:"placement"`
	Connections int    `json:"connections"`
	Program     string `json:"program"`
	Throughput  number `json:"requests_per_second"`
}

func newReport() *report {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return &report{Command: os.Args, Kernel: string(kernel), CPUs: runtime.NumCPU()}
}

func newFigures(program string, s *series, wrong int) figures {
	at := func(p float64) number { return number(float64(s.latency.ValueAtQuantile(p)) / 1e3) }
	n := float64(s.latency.TotalCount())
	f := figures{
		Program: program, Requests: s.latency.TotalCount(), Wrong: wrong,
		P50: at(50), P99: at(99), P999: at(99.9),
		Throughput: number(n / s.wall * 1e9), CPU: number(s.cpu / n / 1e3),
	}
	for _, b := range s.latency.CumulativeDistributionWithTicks(5) {
		f.Distribution = append(f.Distribution, [2]float64{b.Quantile, float64(b.ValueAt) / 1e3})
	}
	return f
}

// note adds a note about n wrong answers, if there are any.
func (r *report) note(n int, program, workload, first string) {
	if n > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf(
			"%s: %s: %d answers of another kind than expected; the first ever: %s",
			program, workload, n, first))
	}
}

// print writes the tables.
func (r *report) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	for i, row := range r.Rows {
		if i == 0 || !row.sameCell(&r.Rows[i-1]) {
			w.Flush()
			fmt.Fprintf(out, "\nplacement %s, connections %d; µs, and the median of the ratios "+
				"to a neighbouring chunk (all: ratio of p99 of all chunks)\n",
				row.Placement, row.Connections)
			fmt.Fprint(w, "operation\tprogram\trequests\twrong\t"+
				"p50\tp99\tp99.9\treq/s\tcpu/req\t|\tto\tp50\tp99\tall\treq/s\tcpu\tpairs\t\n")
		}
		for _, f := range row.Programs {
			fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%s\t%s\t%s\t|\t",
				row.Operation,
				f.Program,
				f.Requests,
				f.Wrong,
				f.P50.text("%.1f"),
				f.P99.text("%.1f"),
				f.P999.text("%.1f"),
				f.Throughput.text("%.0f"),
				f.CPU.text("%.2f"))
			if q := f.Ratios; q != nil {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t\n",
					f.Against,
					q.P50.text("%.2f"),
					q.P99.text("%.2f"),
					q.P99All.text("%.2f"),
					q.Throughput.text("%.2f"),
					q.CPU.text("%.2f"),
					q.Pairs)
			} else {
				fmt.Fprint(w, "\t\t\t\t\t\t\t\n")
			}
		}
	}
	w.Flush()
	if len(r.Idle) > 0 {
		fmt.Fprint(out, "\nidle, from a second after the last request; "+
			"KiB: PSS counts what processes share once, and memory files whole\n")
		fmt.Fprint(w, "placement\tconnections\tprogram\tprocesses\tthreads\t"+
			"cpu ms/s\tRSS\tpage tables\tPSS\tper further connection\t\n")
		for _, i := range r.Idle {
			fmt.Fprintf(w, "%s\t%d\t%s\t%d\t%d\t%s\t%s\t%s\t%s\t%s\t\n",
				i.Placement,
				i.Connections,
				i.Program,
				i.Processes,
				i.Threads,
				i.CPU.text("%.3f"),
				i.RSS.text("%.0f"),
				i.PageTables.text("%.0f"),
				i.PSS.text("%.0f"),
				i.PerConnection.text("%.1f"))
		}
		w.Flush()
	}
	for _, f := range r.Floods {
		fmt.Fprintf(out, "placement %s, connections %d, %s: "+
			"meanwhile the connection that floods was answered %s requests a second\n",
			f.Placement, f.Connections, f.Program, f.Throughput.text("%.0f"))
	}
	for _, note := range r.Notes {
		fmt.Fprintln(out, note)
	}
}

func (r *report) writeJSON(name string) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(text, '\n'), 0o644)
}

// progress prints the current step on stderr, from two seconds after the start.
type progress struct {
	start, last time.Time
	terminal    bool
}

func newProgress() *progress {
	info, err := os.Stderr.Stat()
	return &progress{start: time.Now(), terminal: err == nil && info.Mode()&os.ModeCharDevice != 0}
}

// say is called between chunks, so that nothing is written while one runs.
func (p *progress) say(format string, args ...any) {
	every := 10 * time.Second
	if p.terminal {
		every = 200 * time.Millisecond
	}
	now := time.Now()
	if now.Sub(p.start) < 2*time.Second || now.Sub(p.last) < every {
		return
	}
	p.last = now
	line := fmt.Sprintf("%4.0f s  ", now.Sub(p.start).Seconds()) + fmt.Sprintf(format, args...)
	if p.terminal {
		line = "\r\x1b[K" + line
	} else {
		line += "\n"
	}
	fmt.Fprint(os.Stderr, line)
}

func (p *progress) end() {
	if p.terminal && !p.last.IsZero() {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}

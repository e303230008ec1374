package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"virtfs-proxy-helper/bench/proc"
	"virtfs-proxy-helper/codec"
)

// warmUp is the number of unmeasured requests on each connection before a chunk:
// the caches hold the data of the previous program.
const warmUp = 32

// cell is one placement and number of connections, measured on fresh
// processes.
type cell struct {
	opts    *options
	at      placement
	conns   int
	dir     string // for exports and sockets
	report  *report
	tell    *progress
	running []*program // ours, then the peer and the floor, if any
}

// runCell measures n connections at a placement, unless ctx is done.
func runCell(
	ctx context.Context, o *options, at placement, n int,
	dir string, r *report, tell *progress,
) error {
	c := cell{
		opts:   o,
		at:     at,
		conns:  n,
		dir:    filepath.Join(dir, fmt.Sprintf("%s-%d", at.name, n)),
		report: r,
		tell:   tell,
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return err
	}
	return c.run(ctx)
}

// run measures one cell and adds the results to the report.
func (c *cell) run(ctx context.Context) (err error) {
	runtime.GOMAXPROCS(c.conns + 6) // a client occupies a processor even while it blocks
	debug.SetGCPercent(-1)          // measure collects garbage between chunks
	dirs := make([]string, c.conns)
	for i := range dirs {
		dirs[i] = fmt.Sprintf("//bench-%d-%02d", os.Getpid(), i)
	}
	setup := func(i int) []request { up, _ := fixtures(dirs[i]); return up }
	teardown := func(i int) []request { _, down := fixtures(dirs[i]); return down }
	defer func() {
		for _, p := range c.running {
			if !p.isFloor && err == nil && c.opts.replay == "" {
				_, _, err = p.exchange(teardown, 0, false)
			}
			if f := p.others.flood; f != nil && f.seconds > 0 {
				c.report.Floods = append(c.report.Floods, floodRate{
					Placement:   c.at.name,
					Connections: c.conns,
					Program:     p.name,
					Throughput:  number(f.answered / f.seconds),
				})
			}
			err = errors.Join(err, p.others.leave())
			p.stop()
		}
	}()
	for _, l := range c.launches() {
		c.tell.say("starting %s", l.name)
		p, err := start(l)
		p.isFloor = l.name == "floor"
		c.running = append(c.running, p)
		if err != nil {
			return err
		}
		p.pids = proc.Descendants(p.roots)
		if p.isFloor || c.opts.replay != "" {
			continue
		}
		if _, _, err := p.exchange(setup, 0, false); err != nil {
			return err
		}
		if n, first := p.wrong(); n > 0 {
			return fmt.Errorf("%s: making the files to work on: %s%s", p.name, first, p.said())
		}
	}
	workloads, err := c.workloads(dirs)
	if err != nil {
		return err
	}
	for i := range workloads {
		if err := c.measure(ctx, &workloads[i]); err != nil {
			return err
		}
	}
	if c.opts.idle > 0 {
		return c.rest(ctx)
	}
	return nil
}

// launches lists the programs to start, ours first.
func (c *cell) launches() (list []launch) {
	o := c.opts
	add := func(name, path string, perClient bool, args ...string) *launch {
		export := filepath.Join(c.dir, strings.ReplaceAll(name, " ", "-"))
		list = append(list, launch{
			name:        name,
			path:        path,
			args:        args,
			perClient:   perClient,
			export:      export,
			connections: c.conns,
			at:          c.at,
		})
		return &list[len(list)-1]
	}
	if o.hang > 0 {
		add("calm", o.helper, false).neighbours = o.hang
		hung := add("hung", o.helper, false)
		hung.neighbours, hung.hang, hung.against = o.hang, true, "calm"
		flooded := add("flooded", o.helper, false)
		flooded.neighbours, flooded.flood, flooded.against = o.hang, true, "calm"
		if o.peer != "" {
			add("peer", o.peer, true)
			flooded := add("peer flooded", o.peer, true)
			flooded.flood, flooded.against = true, "peer"
		}
		return list
	}
	against := ""
	if o.peer != "" {
		against = "peer"
	}
	if o.socket != "" {
		list = append(list, launch{
			name:        "ours",
			socket:      o.socket,
			connections: c.conns,
			at:          c.at,
			against:     against,
		})
	} else {
		add("ours", o.helper, o.helper == o.peer || o.helper == cHelper).against = against
	}
	if o.peer != "" {
		add("peer", o.peer, true)
	}
	if o.floor {
		self, _ := os.Executable()
		add("floor", self, true, floorArg).against = against
	}
	return list
}

// workloads lists the workloads to measure.
func (c *cell) workloads(dirs []string) (list []workload, err error) {
	o := c.opts
	size, rounds := o.chunk, 0
	if size == 0 {
		size = max(1024/c.conns, 64)
	}
	if o.count > 0 {
		size = min(size, o.count)
		rounds = (o.count + size - 1) / size
	}
	switch {
	case o.replay != "":
		w, err := replayWorkload(o.replay, 1024, o.rounds)
		return []workload{w}, err
	case o.mix != "":
		mix, err := parseMix(o.mix)
		w := mixture("mix", mix, size, dirs, o.seed)
		w.rounds = rounds
		return []workload{w}, err
	}
	for _, name := range o.ops {
		op, err := operationNamed(name)
		if err != nil {
			return nil, err
		}
		w := mixture(operations[op].name, []weighted{{op, 1}}, size, dirs, o.seed)
		w.rounds = rounds
		list = append(list, w)
	}
	if o.hang > 0 {
		list = append(list, workload{
			name:     "connect",
			ops:      []string{"connect"},
			connects: min(size, 64),
			rounds:   rounds,
		})
	}
	for _, pause := range o.sparse {
		w := mixture(sparseName(pause), []weighted{{0, 1}}, 24, dirs, o.seed)
		w.pause = pause
		list = append(list, w)
	}
	return list, nil
}

func sparseName(pause time.Duration) string { return fmt.Sprintf("lstat every %v", pause) }

// more reports whether a workload needs another round.
func (c *cell) more(w *workload, round int, since time.Time) bool {
	switch o := c.opts; {
	case w.rounds > 0:
		return round < w.rounds
	case o.duration > 0:
		return round < 1 || time.Since(since) < o.duration
	default:
		return round < o.rounds
	}
}

// measure lets the programs take turns in the same chunks of the workload, and
// reports the results. The order of the programs alternates from round to round.
func (c *cell) measure(ctx context.Context, w *workload) error {
	var running []*program
	for _, p := range c.running {
		if (!p.isFloor || w.name == "lstat") && (w.connects == 0 || p.socket != "") {
			running = append(running, p)
		}
	}
	// One series for each name of the workload, and one for all of them.
	all := len(w.ops)
	results := map[*program][]*series{}
	wrong := map[*program]int{}
	for _, p := range running {
		for range all + 1 {
			results[p] = append(results[p], newSeries())
		}
		wrong[p], _ = p.wrong()
		p.pids = proc.Descendants(p.roots)
	}
	// The first round warms up, except in a replay, which can't be repeated.
	round := -1
	if w.pass > 0 {
		round = 0
	}
	for since := time.Now(); round < 0 || c.more(w, round, since); round++ {
		if round%32 == 0 {
			runtime.GC() // no client is busy now
		}
		batches := make([]batch, c.conns)
		for i := range batches {
			if w.connects == 0 {
				batches[i] = w.next(i)
			}
		}
		order := slices.Clone(running)
		if round%2 != 0 {
			slices.Reverse(order)
		}
		for _, p := range order {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			c.tell.say("%s, %d connections, %s: round %d, %s",
				c.at.name, c.conns, w.name, round+1, p.name)
			if w.pass > 0 && round%w.pass == 0 {
				if err := w.before(p); err != nil {
					return err
				}
			}
			wall, cpu, elapsed, err := c.turn(p, w, batches)
			if err != nil {
				return err
			}
			if round < 0 {
				continue
			}
			latencies := make([][]int64, all+1)
			for i, b := range batches {
				for j, r := range b.timed {
					latencies[r.op] = append(latencies[r.op], elapsed[i][j])
				}
				latencies[all] = append(latencies[all], elapsed[i]...)
			}
			for op, l := range latencies[:all] {
				results[p][op].add(l, math.NaN(), math.NaN())
			}
			results[p][all].add(latencies[all], wall, cpu)
		}
	}
	for _, p := range running {
		n, first := p.wrong()
		wrong[p] = n - wrong[p]
		c.report.note(wrong[p], p.name, w.name, first)
		if now := proc.Descendants(p.roots); !slices.Equal(now, p.pids) {
			c.report.Notes = append(c.report.Notes, fmt.Sprintf(
				"%s: %s: the CPU time is not all: there were processes %v, now there are %v",
				p.name, w.name, p.pids, now))
		}
	}
	c.conclude(w, running, results, wrong)
	return nil
}

// conclude adds a row to the report for each operation of the workload and, if
// there are several, one for all of them.
func (c *cell) conclude(
	w *workload, running []*program, results map[*program][]*series, wrong map[*program]int,
) {
	names := append(slices.Clone(w.ops), w.name)
	for op, name := range names {
		if len(w.ops) == 1 && op == 0 || results[running[0]][op].latency.TotalCount() == 0 {
			continue
		}
		row := row{Placement: c.at.name, Connections: c.conns, Workload: w.name, Operation: name}
		for _, p := range running {
			f := newFigures(p.name, results[p][op], wrong[p])
			isPeer := func(q *program) bool { return q.name == p.against }
			if i := slices.IndexFunc(running, isPeer); i >= 0 {
				f.Against = p.against
				f.Ratios = compare(results[p][op], results[running[i]][op])
			}
			row.Programs = append(row.Programs, f)
		}
		c.report.Rows = append(c.report.Rows, row)
	}
}

// turn runs a chunk on one program: the requests before, those that are measured,
// and those after. It returns the duration, the CPU time of the processes and each
// client's latencies, all in nanoseconds.
func (c *cell) turn(
	p *program, w *workload, batches []batch,
) (wall, cpu float64, elapsed [][]int64, err error) {
	if f := p.others.flood; f != nil {
		f.start()
		defer func() {
			if e := f.stop(); e != nil {
				e = fmt.Errorf("%s, the connection that floods: %w%s", p.name, e, p.said())
				err = errors.Join(err, e)
			}
			cpu = math.NaN() // it includes that of the flood
		}()
	}
	if w.connects > 0 {
		elapsed = make([][]int64, len(batches))
		wall, cpu, elapsed[0], err = c.connects(p, w.connects)
		return
	}
	pause := w.pause
	before := func(i int) []request {
		if pause > 0 {
			return nil
		}
		return append(slices.Repeat(touchRoot, warmUp), batches[i].before...)
	}
	after := func(i int) []request { return batches[i].after }
	if p.isFloor { // it answers every request as an LSTAT
		before = func(int) []request { return slices.Repeat(touchRoot, warmUp) }
		after = func(int) []request { return nil }
	}
	if _, _, err = p.exchange(before, 0, false); err != nil {
		return
	}
	settle()
	start := proc.CPUTime(p.pids)
	wall, elapsed, err = p.exchange(func(i int) []request { return batches[i].timed }, pause, true)
	if err != nil {
		return
	}
	settle()
	cpu = proc.CPUTime(p.pids) - start
	_, _, err = p.exchange(after, 0, false)
	return
}

// settle waits until servers have stopped polling for the next request and sleep,
// so that proc.CPUTime includes all the time that they have used.
func settle() { time.Sleep(500 * time.Microsecond) }

var touchRoot = []request{{
	frame: (&codec.Request{Path: codec.CString("/\x00")}).Append(nil, codec.Lstat),
	typ:   codec.Lstat, size: codec.StatSize,
}}

// rest measures the cost of the programs while no request comes. It begins a
// second after the last request.
func (c *cell) rest(ctx context.Context) error {
	c.tell.say("%s, %d connections: idle for %v", c.at.name, c.conns, c.opts.idle)
	sleep := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	sleep(time.Second)
	before := map[*program]float64{}
	for _, p := range c.running {
		p.pids = proc.Descendants(p.roots)
		before[p] = proc.CPUTime(p.pids)
	}
	sleep(c.opts.idle)
	for _, p := range c.running {
		if p.isFloor {
			continue
		}
		cpu := proc.CPUTime(p.pids) - before[p]
		m := proc.MemoryOf(p.pids)
		c.report.Idle = append(c.report.Idle, idle{
			Placement:   c.at.name,
			Connections: c.conns,
			Program:     p.name,
			Processes:   len(p.pids),
			Threads:     m.Threads,
			CPU:         number(cpu / 1e6 / c.opts.idle.Seconds()),
			RSS:         number(m.RSS / 1024),
			PSS:         number(m.PSS / 1024),
			PageTables:  number(m.PageTables / 1024),
			// Not a finite number for one connection.
			PerConnection: number((m.PSS - p.first) / 1024 / float64(c.conns-1)),
		})
	}
	return ctx.Err()
}

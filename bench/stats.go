package main

import (
	"math"
	"slices"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// chunk holds the measurements of one chunk of an operation's requests on one
// program. Times are in nanoseconds.
type chunk struct {
	p50, p99   float64
	throughput float64 // requests a second, of all connections
	cpu        float64 // CPU time of the serving processes per request; NaN if unknown
}

// series holds all measurements of an operation on one program.
type series struct {
	chunks    []chunk
	latency   *hdrhistogram.Histogram
	wall, cpu float64 // sums, in nanoseconds; cpu is NaN if unknown
}

func newSeries() *series {
	// 100 ns to 100 s, three significant digits.
	return &series{latency: hdrhistogram.New(100, 100_000_000_000, 3)}
}

// add adds a chunk: its latencies, in any order, its duration and its CPU time.
// It sorts latencies.
func (s *series) add(latencies []int64, wall, cpu float64) {
	slices.Sort(latencies)
	for _, v := range latencies {
		s.latency.RecordValue(min(v, s.latency.HighestTrackableValue()))
	}
	n := float64(len(latencies))
	s.wall += wall
	s.cpu += cpu
	s.chunks = append(s.chunks, chunk{
		p50: percentileOf(latencies, 50, 10), p99: percentileOf(latencies, 99, 100),
		throughput: n / wall * 1e9, cpu: cpu / n,
	})
}

// percentileOf is percentile, or NaN if there are fewer than atLeast values.
func percentileOf(sorted []int64, p float64, atLeast int) float64 {
	if len(sorted) < atLeast {
		return math.NaN()
	}
	return percentile(sorted, p)
}

// percentile returns the nearest-rank percentile of sorted values: the
// smallest one that at least p percent of them do not exceed.
func percentile(sorted []int64, p float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return float64(sorted[max(rank, 1)-1])
}

// median returns the middle of values, which it sorts; NaN if there are none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// medianInterval returns the 95 % confidence interval of the median of sorted
// values, whatever their distribution: the values whose ranks are 0.98 sqrt(n)
// from the middle. Fewer than 6 values are too few; the interval is then all of
// them.
func medianInterval(sorted []float64) (low, high float64) {
	n := len(sorted)
	if n == 0 {
		return math.NaN(), math.NaN()
	}
	rank := int(math.Round(float64(n)/2 - 0.98*math.Sqrt(float64(n))))
	rank = max(rank, 1) // the smallest
	return sorted[rank-1], sorted[n-rank]
}

// ratios compares a program to another. Each ratio is the median of the ratios
// of chunks that ran in the same round, one right after the other, so that a
// machine whose speed drifts slows down both sides of each.
//
// That median does not show events in fewer than half of the chunks, such as a
// pause once a second, which matter for the 99th percentile. So P99All is the
// ratio of the percentiles of all chunks together. It shows such events, but also
// the load of other processes on the machine.
type ratios struct {
	P50        number `json:"p50"`
	P50Low     number `json:"p50_low"` // 95 % confidence interval of P50
	P50High    number `json:"p50_high"`
	P99        number `json:"p99"`
	P99All     number `json:"p99_all"`
	Throughput number `json:"throughput"`
	CPU        number `json:"cpu"`
	Pairs      int    `json:"pairs"` // the smallest number of chunk pairs of a median
}

func compare(s, peer *series) *ratios {
	q := &ratios{}
	of := func(field func(chunk) float64) (middle, low, high number) {
		var r []float64
		for i := range min(len(s.chunks), len(peer.chunks)) {
			v := field(s.chunks[i]) / field(peer.chunks[i])
			if !math.IsNaN(v) && !math.IsInf(v, 0) {
				r = append(r, v)
			}
		}
		if len(r) > 0 && (q.Pairs == 0 || len(r) < q.Pairs) {
			q.Pairs = len(r)
		}
		middle = number(median(r))
		l, h := medianInterval(r)
		return middle, number(l), number(h)
	}
	q.P50, q.P50Low, q.P50High = of(func(c chunk) float64 { return c.p50 })
	q.P99, _, _ = of(func(c chunk) float64 { return c.p99 })
	q.Throughput, _, _ = of(func(c chunk) float64 { return c.throughput })
	q.CPU, _, _ = of(func(c chunk) float64 { return c.cpu })
	q.P99All = number(math.NaN())
	if min(s.latency.TotalCount(), peer.latency.TotalCount()) >= 100 {
		ours, theirs := s.latency.ValueAtQuantile(99), peer.latency.ValueAtQuantile(99)
		q.P99All = number(float64(ours) / float64(theirs))
	}
	return q
}

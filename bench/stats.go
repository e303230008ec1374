package main

import (
	"math"
	"slices"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// chunk is what one program made of one chunk of an operation's requests.
// Times are in nanoseconds.
type chunk struct {
	p50, p99   float64
	throughput float64 // requests a second, of all connections
	cpu        float64 // of the serving processes, per request; NaN if it can't be told
}

// series is all that was measured of an operation on one program.
type series struct {
	chunks    []chunk
	latency   *hdrhistogram.Histogram
	wall, cpu float64 // sums, in nanoseconds; cpu is NaN if it can't be told
}

func newSeries() *series {
	// 100 ns to 100 s, three significant digits.
	return &series{latency: hdrhistogram.New(100, 100_000_000_000, 3)}
}

// add takes the latencies of a chunk, in any order, its duration and the CPU
// time that it cost.
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

// percentileOf is percentile, or NaN if there are too few values to say so.
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
// from the middle. Fewer than 6 values do not give so much; then it is all of them.
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
// That median does not see what happens in fewer than half of the chunks,
// which the 99th percentile is about, too: a pause once a second, for example.
// So there is another ratio, of the percentiles of all chunks together. It
// sees such things, and others who had the machine for a moment as well.
type ratios struct {
	P50        number `json:"p50"`
	P50Low     number `json:"p50_low"` // 95 % confidence interval of P50
	P50High    number `json:"p50_high"`
	P99        number `json:"p99"`
	P99All     number `json:"p99_all"`
	Throughput number `json:"throughput"`
	CPU        number `json:"cpu"`
	Pairs      int    `json:"pairs"` // the fewest that one of the medians is of
}

func compare(s, peer *series) *ratios {
	q := &ratios{}
	of := func(field func(chunk) float64) (middle, low, high number) {
		var r []float64
		for i := range min(len(s.chunks), len(peer.chunks)) {
			if v := field(s.chunks[i]) / field(peer.chunks[i]); !math.IsNaN(v) && !math.IsInf(v, 0) {
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
		q.P99All = number(float64(s.latency.ValueAtQuantile(99)) / float64(peer.latency.ValueAtQuantile(99)))
	}
	return q
}

package main

import (
	"math"
	"testing"
)

func TestPercentile(t *testing.T) {
	hundred := make([]int64, 100)
	for i := range hundred {
		hundred[i] = int64(i + 1)
	}
	for _, test := range []struct {
		sorted []int64
		p      float64
		want   float64
	}{
		{hundred, 50, 50},
		{hundred, 99, 99},
		{hundred, 99.9, 100},
		{hundred, 0, 1},
		{[]int64{7}, 50, 7},
		{[]int64{1, 2, 3}, 50, 2},
		{nil, 50, math.NaN()},
	} {
		if got := percentile(test.sorted, test.p); got != test.want && !(math.IsNaN(got) && math.IsNaN(test.want)) {
			t.Errorf("percentile %v of %d values: %v, want %v", test.p, len(test.sorted), got, test.want)
		}
	}
}

func TestMedian(t *testing.T) {
	if got := median([]float64{9, 1, 5}); got != 5 {
		t.Errorf("of three: %v", got)
	}
	if got := median([]float64{4, 1, 2, 3}); got != 2.5 {
		t.Errorf("of four: %v", got)
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("of none: %v", got)
	}
}

func TestMedianInterval(t *testing.T) {
	values := make([]float64, 100)
	for i := range values {
		values[i] = float64(i + 1)
	}
	for _, test := range []struct {
		n         int
		low, high float64
	}{
		// By the binomial distribution they hold the median in 96.5, 97.3, 96.5 and
		// 96.9 of 100 cases; so few as 2 do it in 50.
		{100, 40, 61}, {21, 6, 16}, {15, 4, 12}, {6, 1, 6}, {2, 1, 2}, {1, 1, 1},
	} {
		if low, high := medianInterval(values[:test.n]); low != test.low || high != test.high {
			t.Errorf("of %d: %v to %v, want %v to %v", test.n, low, high, test.low, test.high)
		}
	}
	if low, high := medianInterval(nil); !math.IsNaN(low) || !math.IsNaN(high) {
		t.Errorf("of none: %v to %v", low, high)
	}
}

// A machine that gets twice as slow in between, and one freak chunk, leave the
// ratio alone.
func TestCompare(t *testing.T) {
	ours, peer := newSeries(), newSeries()
	for _, speed := range []float64{1, 1, 2, 2, 1} {
		add := func(s *series, ns float64) {
			latencies := make([]int64, 200)
			for i := range latencies {
				latencies[i] = int64(ns * speed)
			}
			s.add(latencies, 200*ns*speed, 100*ns*speed)
		}
		add(ours, 6000)
		add(peer, 10000)
	}
	ours.chunks[4].p50 = 1e9
	q := compare(ours, peer)
	near := func(n number, want float64) bool { return math.Abs(float64(n)-want) <= 1e-9 }
	if q.P50 != 0.6 || q.P99 != 0.6 || !near(q.Throughput, 1/0.6) || !near(q.CPU, 0.6) || q.Pairs != 5 {
		t.Errorf("%+v", q)
	}
}

func TestCompareTooFew(t *testing.T) {
	few := newSeries()
	few.add([]int64{1000, 2000}, 3000, math.NaN())
	q := compare(few, few)
	if !math.IsNaN(float64(q.P50)) || !math.IsNaN(float64(q.P99)) || !math.IsNaN(float64(q.CPU)) || q.Throughput != 1 {
		t.Errorf("of two values: %+v", q)
	}
}

// A pause that comes in every third chunk is in no chunk's ratio that the
// median takes, but in that of all of them.
func TestCompareRarePauses(t *testing.T) {
	ours, peer := newSeries(), newSeries()
	for i := range 21 {
		add := func(s *series, pauses bool) {
			latencies := make([]int64, 1000)
			for j := range latencies {
				latencies[j] = 10_000
				if pauses && j < 40 {
					latencies[j] = 50_000
				}
			}
			s.add(latencies, 1e7, 1e7)
		}
		add(ours, i%3 == 0)
		add(peer, false)
	}
	q := compare(ours, peer)
	if q.P99 != 1 || q.P99All < 4.9 || q.P99All > 5.1 || q.Pairs != 21 {
		t.Errorf("%+v", q)
	}
}

// Pairs counts those of the ratio that has the fewest.
func TestComparePairs(t *testing.T) {
	ours, peer := newSeries(), newSeries()
	for i := range 9 {
		latencies := make([]int64, 50)
		if i < 4 {
			latencies = make([]int64, 200)
		}
		for j := range latencies {
			latencies[j] = 1000
		}
		ours.add(latencies, 1e6, 1e6)
		peer.add(latencies, 1e6, 1e6)
	}
	if q := compare(ours, peer); q.Pairs != 4 {
		t.Errorf("%+v", q)
	}
}

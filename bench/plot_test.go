package main

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The plot has one line for each ratio, inside of the axis, and marks 1.
func TestPlot(t *testing.T) {
	of := func(op string, q *ratios) row {
		return row{Placement: "split", Connections: 1, Operation: op, Programs: []figures{
			{Program: "ours", Against: "peer", Ratios: q}, {Program: "peer"},
		}}
	}
	nan := number(math.NaN())
	r := &report{Command: []string{"bench", "<&>"}}
	for _, w := range []struct {
		op             string
		low, high, p50 number
	}{{"lstat", 0.1, 0.3, 0.2}, {"open", 1.1, 5, 1.5}, {"chmod", 0.9, 1.1, 1}, {"untold", nan, nan, nan}} {
		r.Rows = append(r.Rows, of(w.op, &ratios{P50: w.p50, P50Low: w.low, P50High: w.high}))
	}
	p := newRatioPlot(r.Rows)
	if p == nil || len(p.Lines) != 3 {
		t.Fatalf("%+v", p)
	}
	for i, class := range []string{"better", "worse", ""} {
		l := p.Lines[i]
		if l.Class != class || !(plotLeft <= l.Low && l.Low < l.X && l.X < l.High && l.High <= plotRight) {
			t.Errorf("%+v", l)
		}
	}
	if l := p.Lines[2]; l.X != p.One || !strings.Contains(l.Label, "chmod") || l.Value != "1.00 (0.90 to 1.10)" {
		t.Errorf("1 is at %v: %+v", p.One, l)
	}
	name := filepath.Join(t.TempDir(), "page.html")
	if err := r.writeHTML(name); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for part, n := range map[string]int{
		"<svg": 1, "<circle": 3, `class="one"`: 1, `class="better"`: 1, `class="worse"`: 1,
		"prefers-color-scheme: dark": 1, "&lt;&amp;&gt;": 1, "NaN": 0,
	} {
		if got := strings.Count(string(text), part); got != n {
			t.Errorf("%d of %s, want %d", got, part, n)
		}
	}
	if p := newRatioPlot(r.Rows[3:]); p != nil {
		t.Errorf("without ratios: %+v", p)
	}
}

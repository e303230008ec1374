package main

import (
	"bytes"
	"fmt"
	"html/template"
	"math"
	"os"
	"strings"
)

// page needs no other file, and follows the reader's light or dark colours.
var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>virtfs-proxy-helper bench</title>
<style>
:root {
  color-scheme: light dark;
  --back: #fff; --text: #222; --faint: #ccc; --better: #08703a; --worse: #b3261e
}
@media (prefers-color-scheme: dark) {
  :root { --back: #161616; --text: #ddd; --faint: #444; --better: #5fd08f; --worse: #ff8a80 }
}
body { font-family: sans-serif; margin: 2em; background: var(--back); color: var(--text) }
pre { overflow-x: auto }
svg { max-width: 100%; height: auto; font-size: 13px }
svg { fill: currentColor; stroke: currentColor; stroke-width: 2 }
text { stroke: none }
.tick { stroke: var(--faint); stroke-width: 1 }
.better { color: var(--better) } .worse { color: var(--worse) }
</style>
<h1>virtfs-proxy-helper bench</h1>
<p><code>{{range .Command}}{{.}} {{end}}</code> on {{.CPUs}} CPUs, Linux {{.Kernel}}</p>
{{with .Plot}}<h2>Ratios of the median latency</h2>
<p>A dot is the median of the ratios of neighbouring chunks, its line the 95 % confidence interval.
Below 1 is faster.</p>
<svg viewBox="0 0 {{.Width}} {{.Height}}" width="{{.Width}}" role="img" aria-label="ratios">
{{- $bottom := .Bottom}}
{{range .Ticks}}<line class="tick" x1="{{.X}}" x2="{{.X}}" y1="24" y2="{{$bottom}}"/>
<text x="{{.X}}" y="16" text-anchor="middle">{{.Label}}</text>
{{end}}<line class="one" x1="{{.One}}" x2="{{.One}}" y1="24" y2="{{.Bottom}}"/>
{{range .Lines}}<g class="{{.Class}}"><title>{{.Label}}: {{.Value}}</title>
<text x="0" y="{{.Y}}" dy="4">{{.Label}}</text>
<line x1="{{.Low}}" x2="{{.High}}" y1="{{.Y}}" y2="{{.Y}}"/><circle cx="{{.X}}" cy="{{.Y}}" r="4"/>
<text x="{{$.Plot.ValueX}}" y="{{.Y}}" dy="4">{{.Value}}</text></g>
{{end}}</svg>
{{else}}<p>No program was compared to another: see --peer.</p>
{{end}}<h2>Tables</h2><pre>{{.Tables}}</pre></html>
`))

// writeHTML writes a page with a plot of the ratios, and the tables.
func (r *report) writeHTML(name string) error {
	var tables strings.Builder
	r.print(&tables)
	var out bytes.Buffer
	if err := page.Execute(&out, struct {
		*report
		Plot   *ratioPlot
		Tables string
	}{r, newRatioPlot(r.Rows), tables.String()}); err != nil {
		return err
	}
	return os.WriteFile(name, out.Bytes(), 0o644)
}

// ratioPlot has a line for each operation of each program that is compared to
// another, on a logarithmic axis. Positions are in pixels.
type ratioPlot struct {
	Width, Height, Bottom, ValueX int
	One                           float64 // the position of ratio 1
	Ticks                         []plotTick
	Lines                         []plotLine
}

type plotTick struct {
	X     float64
	Label string
}

type plotLine struct {
	Label, Value, Class string
	X, Low, High, Y     float64
}

const (
	plotLeft, plotRight = 380, 860 // of the axis
	plotTop, lineHeight = 42, 22
)

// newRatioPlot returns nil if there are no ratios.
func newRatioPlot(rows []row) *ratioPlot {
	p := &ratioPlot{Width: plotRight + 180, ValueX: plotRight + 20}
	low, high := 0.5, 2.0
	eachRatio(rows, func(_ string, q *ratios) {
		low, high = min(low, float64(q.P50Low)), max(high, float64(q.P50High))
	})
	at := func(ratio float64) float64 {
		x := plotLeft + (plotRight-plotLeft)*math.Log(ratio/low)/math.Log(high/low)
		return math.Round(x*10) / 10
	}
	eachRatio(rows, func(label string, q *ratios) {
		line := plotLine{
			Label: label, Value: fmt.Sprintf("%.2f (%.2f to %.2f)", q.P50, q.P50Low, q.P50High),
			X: at(float64(q.P50)), Low: at(float64(q.P50Low)), High: at(float64(q.P50High)),
			Y: float64(plotTop + lineHeight*len(p.Lines)),
		}
		switch {
		case q.P50High < 1:
			line.Class = "better"
		case q.P50Low > 1:
			line.Class = "worse"
		}
		p.Lines = append(p.Lines, line)
	})
	if len(p.Lines) == 0 {
		return nil
	}
	p.One = at(1)
	for tick := math.Exp2(math.Ceil(math.Log2(low))); tick <= high; tick *= 2 {
		p.Ticks = append(p.Ticks, plotTick{at(tick), fmt.Sprint(tick)})
	}
	p.Bottom = plotTop + lineHeight*len(p.Lines)
	p.Height = p.Bottom + 8
	return p
}

// eachRatio calls f for each ratio that has a finite value.
func eachRatio(rows []row, f func(label string, q *ratios)) {
	for _, w := range rows {
		for _, g := range w.Programs {
			q := g.Ratios
			if q == nil || !(q.P50Low > 0) || math.IsInf(float64(q.P50High), 0) {
				continue
			}
			label := fmt.Sprintf("%s, %s to %s", w.Operation, g.Program, g.Against)
			f(fmt.Sprintf("%s, %d %s", label, w.Connections, w.Placement), q)
		}
	}
}

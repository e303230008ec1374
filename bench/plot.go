package main

import (
	"bytes"
	"fmt"
	"html/template"
	"math"
	"os"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>virtfs-proxy-helper bench</title>
<style>
body { font-family: sans-serif; margin: 2em }
pre { overflow-x: auto; background: #f4f4f4; padding: 1em }
.plots { display: flex; flex-wrap: wrap; gap: 1em }
</style>
<h1>virtfs-proxy-helper bench</h1>
<p><code>{{range .Command}}{{.}} {{end}}</code> on {{.CPUs}} CPUs, Linux {{.Kernel}}</p>
<p>Latencies are of all chunks together, with {{.Fewest}} connections. Machines drift: trust the
ratios of the tables (medians over neighbouring chunks) where they disagree with a plot.</p>
{{range .Sections}}<h2>{{.Name}}</h2><div class="plots">{{range .Plots}}<div>{{.}}</div>{{end}}</div>
{{end}}<h2>Tables</h2><pre>{{.Tables}}</pre></html>
`))

type section struct {
	Name  string
	Plots []template.HTML
}

// writeHTML writes a page that needs nothing but itself: for each operation
// its latency distributions, and throughput and CPU time by connections.
func (r *report) writeHTML(name string) error {
	data := struct {
		*report
		Fewest   int
		Sections []section
		Tables   string
	}{report: r, Fewest: math.MaxInt}
	var tables strings.Builder
	r.print(&tables)
	data.Tables = tables.String()
	rows := map[string][]row{}
	var names []string
	for _, w := range r.Rows {
		if !slices.Contains(names, w.Operation) {
			names = append(names, w.Operation)
		}
		rows[w.Operation] = append(rows[w.Operation], w)
		data.Fewest = min(data.Fewest, w.Connections)
	}
	for _, name := range names {
		s := section{Name: name}
		for _, w := range rows[name] {
			if w.Connections == data.Fewest {
				svg, err := latencyPlot(w)
				if err != nil {
					return err
				}
				s.Plots = append(s.Plots, svg)
			}
		}
		for _, y := range []struct {
			title string
			of    func(f figures) number
		}{
			{"requests per second", func(f figures) number { return f.Throughput }},
			{"CPU µs per request", func(f figures) number { return f.CPU }},
		} {
			svg, err := scalingPlot(rows[name], y.title, y.of)
			if err != nil {
				return err
			}
			s.Plots = append(s.Plots, svg)
		}
		data.Sections = append(data.Sections, s)
	}
	var out bytes.Buffer
	if err := page.Execute(&out, data); err != nil {
		return err
	}
	return os.WriteFile(name, out.Bytes(), 0o644)
}

// latencyPlot has a line for each program: latency by percentile, each step to
// the right halves what is left above.
func latencyPlot(w row) (template.HTML, error) {
	p := plot.New()
	p.Title.Text = "latency, " + w.Placement
	p.X.Label.Text, p.Y.Label.Text = "percentile", "µs"
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker = plot.ConstantTicks{{Value: 1, Label: "0"}, {Value: 2, Label: "50"}, {Value: 10, Label: "90"},
		{Value: 100, Label: "99"}, {Value: 1e3, Label: "99.9"}, {Value: 1e4, Label: "99.99"}, {Value: 1e5, Label: "99.999"}}
	p.Y.Tick.Marker = decades
	var lines []any
	for _, f := range w.Programs {
		var points plotter.XYs
		for _, d := range f.Distribution {
			if d[0] < 100 && d[1] > 0 {
				points = append(points, plotter.XY{X: 100 / (100 - d[0]), Y: d[1]})
			}
		}
		if len(points) > 0 {
			lines = append(lines, f.Program, points)
		}
	}
	if err := plotutil.AddLines(p, lines...); err != nil {
		return "", err
	}
	return render(p)
}

// scalingPlot has a line for each program and placement: y by connections.
func scalingPlot(rows []row, title string, y func(figures) number) (template.HTML, error) {
	p := plot.New()
	p.Title.Text = title
	p.X.Label.Text = "connections"
	p.X.Scale = plot.LogScale{}
	p.Y.Min = 0
	p.Legend.Top = true
	points := map[string]plotter.XYs{}
	var names []string
	var ticks plot.ConstantTicks
	for _, w := range rows {
		tick := plot.Tick{Value: float64(w.Connections), Label: fmt.Sprint(w.Connections)}
		if !slices.Contains(ticks, tick) {
			ticks = append(ticks, tick)
		}
		for _, f := range w.Programs {
			name := f.Program + ", " + w.Placement
			if points[name] == nil {
				names = append(names, name)
			}
			if v := float64(y(f)); !math.IsNaN(v) {
				points[name] = append(points[name], plotter.XY{X: float64(w.Connections), Y: v})
			}
		}
	}
	p.X.Tick.Marker = ticks
	var lines []any
	for _, name := range names {
		if len(points[name]) > 0 {
			lines = append(lines, name, points[name])
		}
	}
	if err := plotutil.AddLinePoints(p, lines...); err != nil {
		return "", err
	}
	p.X.Min, p.X.Max = 0.8*p.X.Min, 1.25*p.X.Max // room for a single number of connections
	p.Y.Max *= 1.6                               // and for the legend
	return render(p)
}

// decades ticks a logarithmic axis at 1, 2 and 5.
var decades = plot.TickerFunc(func(low, high float64) (ticks []plot.Tick) {
	for unit := math.Pow(10, math.Floor(math.Log10(low))); unit <= high; unit *= 10 {
		for _, k := range []float64{1, 2, 5} {
			ticks = append(ticks, plot.Tick{Value: k * unit, Label: fmt.Sprint(k * unit)})
		}
	}
	return ticks
})

func render(p *plot.Plot) (template.HTML, error) {
	canvas := vgsvg.New(4*vg.Inch, 3*vg.Inch)
	p.Draw(draw.New(canvas))
	var out bytes.Buffer
	if _, err := canvas.WriteTo(&out); err != nil {
		return "", err
	}
	// Inside of a page, an SVG has no prologue of its own.
	svg := out.String()
	return template.HTML(svg[max(strings.Index(svg, "<svg"), 0):]), nil
}

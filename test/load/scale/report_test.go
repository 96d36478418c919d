//go:build load

package scale

import (
	"fmt"
	"math"
	"runtime"
	"strings"
	"time"
)

// measures are the rows of the table and the lines of the plot, each in milliseconds.
var measures = []struct {
	name  string
	color string
	of    func(costs) time.Duration
}{
	{"tick, nothing changed", "#1b9e77", func(c costs) time.Duration { return c.emptyTick }},
	{"tick, 1,000 changes", "#d95f02", func(c costs) time.Duration { return c.changesTick }},
	{"lookup of 1 key", "#7570b3", func(c costs) time.Duration { return c.lookup }},
	{"lookup of 256 keys", "#e7298a", func(c costs) time.Duration { return c.lookup256 }},
	{"counting a key's first use", "#66a61e", func(c costs) time.Duration { return c.firstUse }},
	{"building the filter", "#e6ab02", func(c costs) time.Duration { return c.filter }},
	{"warming the cache, at most 1,000,000 keys", "#666666", func(c costs) time.Duration { return c.warm }},
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func table(all []costs) string {
	var b strings.Builder
	row := func(name string, cell func(costs) string) {
		fmt.Fprintf(&b, "| %s |", name)
		for _, c := range all {
			fmt.Fprintf(&b, " %s |", cell(c))
		}
		b.WriteString("\n")
	}
	row("keys in Postgres", func(c costs) string { return grouped(c.keys) })
	row("---", func(costs) string { return "---:" })
	for _, m := range measures {
		row(m.name+", ms", func(c costs) string { return fmt.Sprintf("%.3g", milliseconds(m.of(c))) })
	}
	row("pages of a tick, nothing changed", func(c costs) string { return fmt.Sprintf("%.1f", c.emptyPages) })
	row("filter, MiB", func(c costs) string { return fmt.Sprintf("%.1f", float64(c.filterBytes)/(1<<20)) })
	row("cached keys", func(c costs) string { return grouped(c.warmed) })
	row("memory of each, ristretto's included, bytes", func(c costs) string { return fmt.Sprint(c.cachedBytes) })
	fmt.Fprintf(&b, "\nMedians, on %d CPUs (%s/%s), Postgres on the same machine.\n", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH)
	return b.String()
}

// grouped writes a number with commas.
func grouped(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plot draws the measures over the number of keys, both logarithmic, as SVG.
func plot(all []costs) string {
	const width, height, left, top, legend = 560.0, 360.0, 70.0, 20.0, 300.0
	lowX, highX := math.Log10(float64(all[0].keys)), math.Log10(float64(all[len(all)-1].keys))
	highX = max(highX, lowX+1)
	const lowY, highY = -1.5, 5.0 // 0.03 ms to 100 s
	x := func(keys int) float64 { return left + width*(math.Log10(float64(keys))-lowX)/(highX-lowX) }
	y := func(ms float64) float64 { return top + height*(highY-math.Log10(ms))/(highY-lowY) }

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" font-family="sans-serif" font-size="12">`+"\n",
		left+width+legend, top+height+50)
	b.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	for ms := 0.1; ms <= 1e5; ms *= 10 {
		fmt.Fprintf(&b, `<path d="M%.1f %.1fH%.1f" stroke="#ddd"/><text x="%.1f" y="%.1f" text-anchor="end">%g ms</text>`+"\n",
			left, y(ms), left+width, left-6, y(ms)+4, ms)
	}
	for _, c := range all {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`+"\n", x(c.keys), top+height+18, grouped(c.keys))
	}
	fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="middle">keys in Postgres</text>`+"\n", left+width/2, top+height+38)
	for i, m := range measures {
		var points []string
		for _, c := range all {
			px, py := x(c.keys), y(milliseconds(m.of(c)))
			points = append(points, fmt.Sprintf("%.1f,%.1f", px, py))
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", px, py, m.color)
		}
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), m.color)
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" fill="%s">%s</text>`+"\n", left+width+16, top+16+20*float64(i), m.color, m.name)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

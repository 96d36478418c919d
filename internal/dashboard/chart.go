package dashboard

import (
	"fmt"
	"time"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// chart is bars of equal width, drawn by a template: numbers only, so nothing in it needs escaping.
type chart struct {
	size
	Bars     []bar
	Max      int64 // the highest bar
	Label    string
	From, To string // what the axis begins and ends with
}

// size is in the units of the drawing.
type size struct{ Width, Height float64 }

var (
	sparkline = size{112, 28}
	wide      = size{960, 180}
)

// bar is one hour or day: what was denied stands upon what was allowed.
type bar struct {
	X, Width           float64
	AllowedY, AllowedH float64
	DeniedY, DeniedH   float64
	Allowed, Denied    int64
	Spike              bool
	Threshold          *int64
	When               string
}

// point is what a bar is drawn from.
type point struct {
	when string
	keyadmin.UsageCounts
	spike     bool
	threshold *int64
}

// hourly draws a bar for each hour, also those without requests.
func hourly(usage keyadmin.Usage, s size) chart {
	counted := make(map[time.Time]keyadmin.UsageHour, len(usage.Hourly))
	for _, hour := range usage.Hourly {
		counted[hour.Hour] = hour
	}
	var points []point
	for hour := usage.From; hour.Before(usage.To); hour = hour.Add(time.Hour) {
		u := counted[hour]
		points = append(points, point{hour.Format("2 Jan 15:04"), u.UsageCounts, u.Spike, u.SpikeThreshold})
	}
	return draw(points, s, "hour")
}

// daily draws a bar for each day, in UTC.
func daily(usage keyadmin.Usage, s size) chart {
	counted := make(map[string]keyadmin.UsageDay, len(usage.Daily))
	for _, day := range usage.Daily {
		counted[day.Date] = day
	}
	var points []point
	for day := usage.From.Truncate(24 * time.Hour); day.Before(usage.To); day = day.Add(24 * time.Hour) {
		u := counted[day.Format(time.DateOnly)]
		points = append(points, point{when: day.Format("2 Jan"), UsageCounts: u.UsageCounts, spike: u.Spike})
	}
	return draw(points, s, "day")
}

func draw(points []point, s size, unit string) chart {
	c := chart{size: s}
	var sum, spikes int64
	for _, p := range points {
		c.Max, sum = max(c.Max, p.Allowed+p.Denied), sum+p.Allowed+p.Denied
		if p.spike {
			spikes++
		}
	}
	c.Label = fmt.Sprintf("%d requests, by %s; most in one %s: %d; spikes: %d", sum, unit, unit, c.Max, spikes)
	c.From, c.To = points[0].when, points[len(points)-1].when
	const top = 0.12 // of the height stays free
	step := s.Width / float64(len(points))
	scale := s.Height * (1 - top) / float64(max(c.Max, 1))
	for i, p := range points {
		b := bar{
			X: float64(i)*step + step*0.1, Width: step * 0.8, Allowed: p.Allowed, Denied: p.Denied, Spike: p.spike, Threshold: p.threshold, When: p.when,
			AllowedH: float64(p.Allowed) * scale, DeniedH: float64(p.Denied) * scale,
		}
		b.AllowedY = s.Height - b.AllowedH
		b.DeniedY = b.AllowedY - b.DeniedH
		c.Bars = append(c.Bars, b)
	}
	return c
}

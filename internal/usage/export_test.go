package usage

import (
	"strconv"
	"time"
)

// What the tests call at a moment of their own, in place of Run.
var (
	Flush      = (*Counter).flush
	FlushLast  = (*Counter).flushLast
	FindSpikes = (*Counter).findSpikes
	Forget     = (*Counter).forget
)

// Threshold is what an hour is judged by.
var Threshold = spikeThreshold

// EndThresholds has a threshold be learned anew for each key.
func EndThresholds(c *Counter) {
	for id, t := range c.thresholds {
		c.thresholds[id] = threshold{requests: t.requests}
	}
}

// FillThresholds leaves no room for the threshold of another key.
func FillThresholds(c *Counter) {
	for n := 0; len(c.thresholds) < maxThresholds; n++ {
		c.thresholds[strconv.Itoa(n)] = threshold{1, time.Now()}
	}
}

// ReportDrops returns what Run calls after each flush.
func ReportDrops(c *Counter) func(error) {
	d := new(drops)
	return func(err error) { d.report(c, err) }
}

// SetFlushTimeout sets the time of the next try of a batch.
func SetFlushTimeout(c *Counter, d time.Duration) { c.timeout = d }

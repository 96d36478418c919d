package usage

import (
	"context"
	"math"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/keystore"
)

// A spike is an hour in which a key gets far more requests than in its own past. The past are the hours of the last 14
// days since the key's first request in them; an hour without requests counts as 0. Of them are taken the median, the median
// absolute deviation (MAD) and the 97th percentile, none of which a few odd hours can move. An hour is a spike if
//
//   - its modified z-score, 0.6745 (requests - median) / MAD, exceeds 6 (Iglewicz and Hoaglin call 3.5 an outlier; hourly
//     counts have longer tails than a normal distribution, which 0.6745 refers to), and
//   - it has more than twice the requests of the 97th percentile: what a key does every day for an hour, or for ten
//     hours in two weeks, is not unexpected, and
//   - it has at least 100 requests: below, twice as many is chance.
//
// A key with less than 24 hours of past has no spikes. MAD is taken as 1 at least, for keys that always do the same.
const (
	spikeWindow   = 14 * 24 * time.Hour
	spikeMinHours = 24
	spikeMinCount = 100
	spikeScore    = 6
	spikeRatio    = 2
)

// spikeThreshold returns the requests from which on an hour is a spike, given the requests in each hour before. ok is false if
// the past is too short to tell.
func spikeThreshold(past []int64) (requests int64, ok bool) {
	if len(past) < spikeMinHours {
		return 0, false
	}
	sorted := slices.Sorted(slices.Values(past))
	usual := median(sorted)
	deviations := make([]float64, len(sorted))
	for i, n := range sorted {
		deviations[i] = math.Abs(float64(n) - usual)
	}
	slices.Sort(deviations)
	byScore := usual + spikeScore*max(1, median(deviations))/0.6745
	high := sorted[(len(sorted)*97+99)/100-1]
	return max(int64(math.Floor(byScore))+1, spikeRatio*high+1, spikeMinCount), true
}

// median of what is sorted and not empty.
func median[T int64 | float64](sorted []T) float64 {
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return float64(sorted[middle])
	}
	return (float64(sorted[middle-1]) + float64(sorted[middle])) / 2
}

const (
	// thresholdsFor is how long a threshold is used: reading two weeks of a key for each look would cost more than the flush.
	thresholdsFor = 6 * time.Hour

	// maxHistories is how many keys' past is read in one look; the others' turn comes with the next looks.
	maxHistories = 2000

	historyBatch = 100 // keys in one statement

	// maxThresholds bounds the memory for them to some 10 MB.
	maxThresholds = 100_000
)

// threshold of a key. Hours from until on need a new one.
type threshold struct {
	requests int64 // 0: none, its past is too short
	until    time.Time
}

// spike is an hour that is one, and the threshold by which it was judged: learn may forget that before the spike is told.
type spike struct {
	keystore.HourTotal
	threshold int64
}

// findSpikes looks at the keys that are busy now. Each spike is told by one edge, once.
func (c *Counter) findSpikes(ctx context.Context) error {
	var unknown []keystore.HourTotal
	var spikes []spike
	judge := func(total keystore.HourTotal) {
		if t := c.thresholds[total.KeyID]; t.requests > 0 && total.Count >= t.requests {
			spikes = append(spikes, spike{total, t.requests})
		}
	}
	err := c.store.BusyKeys(ctx, spikeMinCount, func(total keystore.HourTotal) {
		if total.Hour.Before(c.thresholds[total.KeyID].until) {
			judge(total)
		} else if len(unknown) < maxHistories {
			unknown = append(unknown, total)
		}
	})
	if err != nil {
		return err
	}
	for batch := range slices.Chunk(unknown, historyBatch) {
		if err := c.learn(ctx, batch); err != nil {
			return err
		}
		for _, total := range batch {
			judge(total)
		}
	}
	for _, s := range spikes {
		if err := c.reportSpike(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// learn sets the thresholds of keys from their past.
func (c *Counter) learn(ctx context.Context, totals []keystore.HourTotal) error {
	ids := make([]string, 0, len(totals))
	earliest := totals[0].Hour // one hour may end while another begins, and must not be its own past
	for _, total := range totals {
		ids = append(ids, total.KeyID)
		if total.Hour.Before(earliest) {
			earliest = total.Hour
		}
	}
	past := make(map[string][]keystore.HourTotal, len(ids))
	err := c.store.UsageHistory(ctx, ids, earliest, spikeWindow, func(total keystore.HourTotal) {
		past[total.KeyID] = append(past[total.KeyID], total)
	})
	if err != nil {
		return err
	}
	if len(c.thresholds)+len(ids) > maxThresholds || c.thresholds == nil {
		c.thresholds = make(map[string]threshold)
	}
	for _, id := range ids {
		requests, _ := spikeThreshold(everyHour(past[id], earliest))
		c.thresholds[id] = threshold{requests, earliest.Add(thresholdsFor)}
	}
	return nil
}

// everyHour returns the requests in each hour before the given one, the last first, as far back as there are any. The given one may begin at
// any moment: an edge that was taken over may have written it.
func everyHour(used []keystore.HourTotal, before time.Time) []int64 {
	var hours []int64
	for _, total := range used {
		ago := int((before.Sub(total.Hour) - 1) / time.Hour)
		for ago >= len(hours) {
			hours = append(hours, 0)
		}
		hours[ago] = total.Count
	}
	return hours
}

func (c *Counter) reportSpike(ctx context.Context, s spike) error {
	news, err := c.store.AddSpike(ctx, keystore.Spike{KeyID: s.KeyID, Hour: s.Hour, Threshold: s.threshold})
	if err != nil || !news {
		return err
	}
	c.spikes.Add(1)
	c.cfg.Logger().Warn("usage spike: the key is used far more than in the last two weeks", zap.String("key_id", s.KeyID),
		zap.Time("hour", s.Hour.UTC()), zap.Int64("requests", s.Count), zap.Int64("threshold", s.threshold))
	return nil
}

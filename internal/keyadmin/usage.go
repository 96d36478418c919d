package keyadmin

import (
	"context"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Usage is what a key was used for. Times are Postgres's, in UTC. Edges add their counts every few seconds, and after an
// outage what they kept meanwhile: the last hours may still grow.
type Usage struct {
	ID          string      `json:"id"`
	From        time.Time   `json:"from"`          // beginning of the first hour
	To          time.Time   `json:"to"`            // before which the last hour begins
	FirstUsedAt *time.Time  `json:"first_used_at"` // whenever it was; null: never
	LastUsedAt  *time.Time  `json:"last_used_at"`  // the last request that was allowed, whenever it was; null: never
	Total       UsageCounts `json:"total"`
	Hourly      []UsageHour `json:"hourly"` // oldest first; never null; hours without requests are left out
	Daily       []UsageDay  `json:"daily"`  // oldest first; never null; days without requests are left out
}

// UsageCounts counts the requests that were decided on a key.
type UsageCounts struct {
	Allowed        int64            `json:"allowed"`
	Denied         int64            `json:"denied"`
	DeniedByReason map[string]int64 `json:"denied_by_reason"` // as apikey.Outcome writes them; never null
}

// UsageHour is one hour of a key.
type UsageHour struct {
	Hour time.Time `json:"hour"` // its beginning
	UsageCounts

	// Spike: the key had far more requests than in its own past; internal/usage says what that means.
	Spike bool `json:"spike"`

	// SpikeThreshold is the number of requests from which on this hour is a spike; null where it is none.
	SpikeThreshold *int64 `json:"spike_threshold"`
}

// UsageDay is one day of a key, in UTC.
type UsageDay struct {
	Date string `json:"date"` // 2006-01-02
	UsageCounts
	Spike bool `json:"spike"` // whether one of its hours is
}

const (
	defaultUsageRange = 30 * day
	maxUsageRange     = 366 * day
)

// Usage returns what a key was used for from the hour that contains from to the last that begins before to, both as RFC 3339 has
// them. An empty to is now, an empty from 30 days before to. A range that is not acceptable is an *InvalidError; the error wraps
// ErrNotFound if there is no key with that id.
func (a *Admin) Usage(ctx context.Context, actor Actor, id, from, to string) (Usage, error) {
	begin, err := parseTime("from", from)
	if err != nil {
		return Usage{}, err
	}
	end, err := parseTime("to", to)
	if err != nil {
		return Usage{}, err
	}
	return a.usage(ctx, actor, id, func(now time.Time) (time.Time, time.Time) {
		if end == nil {
			end = &now
		}
		if begin == nil {
			return end.Add(-defaultUsageRange), *end
		}
		return *begin, *end
	})
}

// RecentUsage is Usage for the last hours or days, which end now.
func (a *Admin) RecentUsage(ctx context.Context, actor Actor, id string, last time.Duration) (Usage, error) {
	return a.usage(ctx, actor, id, func(now time.Time) (time.Time, time.Time) { return now.Add(-last), now })
}

// usage reads what a key was used for in a range that is told at Postgres's clock.
func (a *Admin) usage(ctx context.Context, actor Actor, id string, between func(now time.Time) (from, to time.Time)) (Usage, error) {
	if err := checkID(id); err != nil {
		return Usage{}, err
	}
	end, err := a.turnToRead(ctx, actor)
	if err != nil {
		return Usage{}, err
	}
	defer end()
	key, err := a.store.Get(ctx, actor.reach(), id)
	if err != nil {
		return Usage{}, notFound(err, id)
	}
	from, to := between(key.Now)
	for _, bound := range []struct {
		field string
		t     time.Time
	}{{"from", from}, {"to", to}} {
		if err := checkYear(bound.field, bound.t); err != nil {
			return Usage{}, err
		}
	}
	from, to = from.UTC().Truncate(time.Hour), to.UTC()
	if err := checkRange("from", &from, "to", &to); err != nil {
		return Usage{}, err
	}
	if to.Sub(from) >= maxUsageRange+time.Hour { // the first hour may have begun before
		return Usage{}, &InvalidError{"from", "must be at most 366 days before to"}
	}
	counted, err := a.store.Usage(ctx, id, from, to)
	if err != nil {
		return Usage{}, err
	}
	return newUsage(id, from, to, counted), nil
}

// UsageSince is Usage of many keys, by id, which ends now and begins in the hour of since, at Postgres's clock. It asks Postgres
// as often for many keys as for one. Keys that do not exist are left out.
func (a *Admin) UsageSince(ctx context.Context, actor Actor, ids []string, since func(now time.Time) time.Time) (map[string]Usage, error) {
	usage := make(map[string]Usage, len(ids))
	if len(ids) == 0 {
		return usage, nil
	}
	end, err := a.turnToRead(ctx, actor)
	if err != nil {
		return nil, err
	}
	defer end()
	keys, err := a.store.List(ctx, actor.reach(), keystore.Filter{IDs: ids, WithoutUse: true}, keystore.Position{}, len(ids))
	if err != nil || len(keys) == 0 {
		return usage, err
	}
	to := keys[0].Now.UTC()
	from := since(to).Truncate(time.Hour)
	found := make([]string, 0, len(keys))
	for _, key := range keys {
		found = append(found, key.ID)
	}
	counted, err := a.store.Usages(ctx, found, from, to)
	if err != nil {
		return nil, err
	}
	for _, id := range found {
		usage[id] = newUsage(id, from, to, counted[id])
	}
	return usage, nil
}

func newUsage(id string, from, to time.Time, counted keystore.KeyUsage) Usage {
	u := Usage{ID: id, From: from, To: to, Total: newCounts(), Hourly: []UsageHour{}, Daily: []UsageDay{}}
	if !counted.FirstUsedAt.IsZero() {
		u.FirstUsedAt, u.LastUsedAt = utc(&counted.FirstUsedAt), utc(&counted.LastUsedAt)
	}
	thresholds := make(map[int64]int64, len(counted.Spikes))
	for _, spike := range counted.Spikes {
		thresholds[spike.Hour.Unix()] = spike.Threshold
	}
	for _, h := range counted.Hours {
		hour := h.Hour.UTC()
		date := hour.Format(time.DateOnly)
		if n := len(u.Daily); n == 0 || u.Daily[n-1].Date != date {
			u.Daily = append(u.Daily, UsageDay{Date: date, UsageCounts: newCounts()})
		}
		day := &u.Daily[len(u.Daily)-1]
		if n := len(u.Hourly); n == 0 || !u.Hourly[n-1].Hour.Equal(hour) {
			one := UsageHour{Hour: hour, UsageCounts: newCounts()}
			if threshold, ok := thresholds[hour.Unix()]; ok {
				one.Spike, one.SpikeThreshold, day.Spike = true, &threshold, true
			}
			u.Hourly = append(u.Hourly, one)
		}
		for _, counts := range []*UsageCounts{&u.Total, &day.UsageCounts, &u.Hourly[len(u.Hourly)-1].UsageCounts} {
			counts.add(h)
		}
	}
	return u
}

func newCounts() UsageCounts { return UsageCounts{DeniedByReason: map[string]int64{}} }

// maxCount is more than any key is used in an hour: only an edge that was taken over makes up more. Capped, the counts of a year
// can be added up, and a share of them in percent computed, without an overflow.
const maxCount = 100_000_000_000

func (c *UsageCounts) add(h keystore.HourUsage) {
	count := min(h.Count, maxCount)
	if h.Outcome == apikey.Allowed.String() {
		c.Allowed += count
		return
	}
	c.Denied += count
	c.DeniedByReason[h.Outcome] += count
}

package keystore

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// KeyCounts is what an edge counted of one key in one hour.
type KeyCounts struct {
	KeyID  string
	UsedAt int64                       // the last request that was allowed, by Postgres's clock, in microseconds since 1970; 0: none was
	Counts [apikey.OutcomeCount]uint32 // requests by outcome; of an hour at one edge, so 32 bits are enough
}

// UsageFlush is what an edge adds to the counts at a time.
type UsageFlush struct {
	Instance string // of the edge
	Sequence int64  // counts its flushes, from 1
	Hour     int64  // since 1970, in UTC, by Postgres's clock
	Keys     []*KeyCounts
}

// maxCount is the greatest bigint. An edge that was taken over may have written it: no flush of another may fail for it.
const maxCount = `9223372036854775807`

// flushSQL is one statement, so that an edge that is stopped in the middle of a flush holds no lock. A flush that was
// applied already yields no mark, and without a mark nothing is added. If its first copy is still running, the second waits
// for it at the mark.
const flushSQL = `
with mark as (
	insert into rekall.usage_flushes as f (instance, sequence) values ($1, $2)
	on conflict (instance) do update set sequence = excluded.sequence, flushed_at = excluded.flushed_at
	where f.sequence < excluded.sequence
	returning sequence
), counted as (
	insert into rekall.usage as u (key_id, hour, outcome, count, used_at)
	select n.key_id, $3::timestamptz, 'allowed', n.count, n.used_at from mark, unnest($4::text[], $5::bigint[], $6::timestamptz[]) as n (key_id, count, used_at)
	union all
	select n.key_id, $3, n.outcome, n.count, null from mark, unnest($7::text[], $8::text[], $9::bigint[]) as n (key_id, outcome, count)
	on conflict (key_id, hour, outcome) do update set count = u.count + least(excluded.count, ` + maxCount + ` - u.count), used_at = greatest(u.used_at, excluded.used_at)
	returning u.key_id, u.used_at, u.xmax = 0 as new
)
insert into rekall.last_used as l (key_id, first_used_at, last_used_at)
select key_id, used_at, used_at from counted where new and used_at is not null
on conflict (key_id) do update set first_used_at = least(l.first_used_at, excluded.first_used_at),
	last_used_at = greatest(l.last_used_at, excluded.last_used_at)`

// lastUse is when a key l of last_used was used last: in the hour that its row tells of.
const lastUse = `greatest(l.last_used_at, (select u.used_at from rekall.usage u
	where u.key_id = l.key_id and u.hour = date_trunc('hour', l.last_used_at, 'UTC') and u.outcome = 'allowed'))`

// FlushUsage adds counts to Postgres, in one transaction. Each key stands in them once, and all edges sort them in the same
// order: then they do not deadlock. A flush whose outcome is not known is to be repeated, unchanged; it is never counted
// twice.
func (s *Store) FlushUsage(ctx context.Context, f UsageFlush) error {
	var (
		keys, deniedKeys, outcomes []string
		counts, deniedCounts       []int64
		usedAt                     []time.Time
	)
	for _, k := range f.Keys {
		for outcome, n := range k.Counts {
			switch {
			case n == 0:
			case apikey.Outcome(outcome) == apikey.Allowed:
				keys, counts, usedAt = append(keys, k.KeyID), append(counts, int64(n)), append(usedAt, time.UnixMicro(k.UsedAt))
			default:
				deniedKeys, outcomes = append(deniedKeys, k.KeyID), append(outcomes, apikey.Outcome(outcome).String())
				deniedCounts = append(deniedCounts, int64(n))
			}
		}
	}
	// First uses lock key rows, for which the undoing of a rotation may wait in the other order.
	err := repeatDeadlocked(func() error {
		_, err := s.execAlone(ctx, flushSQL, f.Instance, f.Sequence, time.Unix(f.Hour*3600, 0), keys, counts, usedAt, deniedKeys, outcomes, deniedCounts)
		return err
	})
	if err != nil {
		return failedAtEdge("flush usage", err)
	}
	return nil
}

// HourUsage is how often a key had one outcome in one hour.
type HourUsage struct {
	Hour    time.Time // its beginning
	Outcome string    // as apikey.Outcome writes it
	Count   int64
}

// keyHour is HourUsage of one key among several.
type keyHour struct {
	KeyID string
	HourUsage
}

// Spike is an hour in which a key was used far more than ever before.
type Spike struct {
	KeyID     string
	Hour      time.Time // its beginning
	Threshold int64     // requests from which on it is one
}

// KeyUsage is what the edges have counted of a key.
type KeyUsage struct {
	Hours  []HourUsage // by hour and outcome; hours without use are left out
	Spikes []Spike     // by hour
	LastUsed
}

// LastUsed says when a key was used. A use is a request that was allowed. The zero value: never.
type LastUsed struct {
	FirstUsedAt, LastUsedAt time.Time // by Postgres's clock; the first is that of the flush that told of it
}

// Usage returns what a key was used for in the hours that begin at from or later and before to.
func (s *Store) Usage(ctx context.Context, keyID string, from, to time.Time) (KeyUsage, error) {
	usage, err := s.Usages(ctx, []string{keyID}, from, to)
	return usage[keyID], err
}

// Usages is Usage of many keys, in as many statements as that of one. Those that were never used are left out.
func (s *Store) Usages(ctx context.Context, keyIDs []string, from, to time.Time) (map[string]KeyUsage, error) {
	used, err := s.LastUsed(ctx, keyIDs)
	if err != nil {
		return nil, err
	}
	usage := make(map[string]KeyUsage, len(keyIDs))
	for id, at := range used {
		usage[id] = KeyUsage{LastUsed: at}
	}
	rows, _ := s.pool.Query(ctx, `
select key_id, hour, outcome, count from rekall.usage where key_id = any($1) and hour >= $2 and hour < $3 order by hour, outcome`,
		keyIDs, from, to) // CollectRows returns its error
	hours, err := pgx.CollectRows(rows, pgx.RowToStructByPos[keyHour])
	if err != nil {
		return nil, failed("read usage", err)
	}
	for _, hour := range hours {
		u := usage[hour.KeyID]
		u.Hours = append(u.Hours, hour.HourUsage)
		usage[hour.KeyID] = u
	}
	rows, _ = s.pool.Query(ctx, `
select key_id, hour, threshold from rekall.spikes where key_id = any($1) and hour >= $2 and hour < $3 order by hour`,
		keyIDs, from, to) // CollectRows returns its error
	spikes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Spike])
	if err != nil {
		return nil, failed("read usage", err)
	}
	for _, spike := range spikes {
		u := usage[spike.KeyID]
		u.Spikes = append(u.Spikes, spike)
		usage[spike.KeyID] = u
	}
	return usage, nil
}

// LastUsed returns when keys were used. Those that never were are left out.
func (s *Store) LastUsed(ctx context.Context, keyIDs []string) (map[string]LastUsed, error) {
	used := make(map[string]LastUsed, len(keyIDs))
	rows, _ := s.pool.Query(ctx, `
select l.key_id, l.first_used_at, `+lastUse+` from rekall.last_used l where l.key_id = any($1)`, keyIDs) // ForEachRow returns its error
	var (
		id string
		at LastUsed
	)
	if _, err := pgx.ForEachRow(rows, []any{&id, &at.FirstUsedAt, &at.LastUsedAt}, func() error {
		used[id] = at
		return nil
	}); err != nil {
		return nil, failed("read last use", err)
	}
	return used, nil
}

// ClaimChore takes the turn at what one edge of all is to do, and reports whether it is the caller's: it is nobody's until
// period has passed since the last claim. One further ahead than that is none: it would keep everybody
// from the chore.
func (s *Store) ClaimChore(ctx context.Context, name string, period time.Duration) (bool, error) {
	tag, err := s.execAlone(ctx, `
insert into rekall.usage_chores as c (name) values ($1)
on conflict (name) do update set claimed_at = excluded.claimed_at
where c.claimed_at not between excluded.claimed_at - $2::interval and excluded.claimed_at + $2::interval`, name, period)
	if err != nil {
		return false, failedAtEdge("claim "+name, err)
	}
	return tag.RowsAffected() == 1, nil
}

// HourTotal is how often a key was used in an hour, whatever the outcome.
type HourTotal struct {
	KeyID string
	Hour  time.Time // its beginning
	Count int64
}

// BusyKeys calls each for the keys that were used at least floor times in the current hour (in its first five minutes also in
// the one before) and have no spike in it yet.
func (s *Store) BusyKeys(ctx context.Context, floor int64, each func(HourTotal)) error {
	rows, _ := s.pool.Query(ctx, `
select u.key_id, u.hour, least(sum(u.count), `+maxCount+`)::bigint from rekall.usage u
where u.hour >= date_trunc('hour', now() - interval '5 minutes', 'UTC') and u.hour <= now() -- later ones, an edge made up
	and not exists (select from rekall.spikes s where s.key_id = u.key_id and s.hour = u.hour)
group by u.key_id, u.hour having sum(u.count) >= $1`, floor) // ForEachRow returns its error
	var total HourTotal
	if _, err := pgx.ForEachRow(rows, []any{&total.KeyID, &total.Hour, &total.Count}, func() error {
		each(total)
		return nil
	}); err != nil {
		return failedAtEdge("read busy keys", err)
	}
	return nil
}

// UsageHistory calls each for every hour before the given one, up to window back, in which one of the keys was used: once, however many
// counts of no full hour an edge that was taken over has written.
func (s *Store) UsageHistory(ctx context.Context, keyIDs []string, before time.Time, window time.Duration, each func(HourTotal)) error {
	rows, _ := s.pool.Query(ctx, `
select key_id, date_bin('1 hour', hour, timestamptz 'epoch'), least(sum(count), `+maxCount+`)::bigint from rekall.usage
where key_id = any($1) and hour < $2 and hour >= $2::timestamptz - $3::interval
group by 1, 2`, keyIDs, before, window) // ForEachRow returns its error
	var total HourTotal
	if _, err := pgx.ForEachRow(rows, []any{&total.KeyID, &total.Hour, &total.Count}, func() error {
		each(total)
		return nil
	}); err != nil {
		return failedAtEdge("read usage history", err)
	}
	return nil
}

// AddSpike keeps a spike, and reports whether it was not known yet.
func (s *Store) AddSpike(ctx context.Context, spike Spike) (bool, error) {
	tag, err := s.execAlone(ctx, `
insert into rekall.spikes (key_id, hour, threshold) values ($1, $2, $3) on conflict do nothing`, spike.KeyID, spike.Hour, spike.Threshold)
	if err != nil {
		return false, failedAtEdge("add spike", err)
	}
	return tag.RowsAffected() == 1, nil
}

// silentEdge is how long an edge that has not flushed may yet repeat its last flush.
const silentEdge = 7 * 24 * time.Hour

// ForgetUsage removes up to limit rows of counts older than retention, up to as many of each kind that belongs to them, but not when the
// keys were used last. It returns how many rows it removed of the kind of which there were most: with fewer than limit, nothing is left
// to do.
func (s *Store) ForgetUsage(ctx context.Context, retention time.Duration, limit int) (removed int64, err error) {
	err = s.scanAlone(ctx, []any{&removed}, `
with spikes as (
		delete from rekall.spikes where ctid = any(array(
			select ctid from rekall.spikes where hour < now() - $1::interval limit $2))
		returning 1),
	flushes as (
		delete from rekall.usage_flushes where ctid = any(array(
			select ctid from rekall.usage_flushes where flushed_at < now() - $3::interval limit $2))
		returning 1),
	gone as (
		delete from rekall.usage where ctid = any(array(
			select ctid from rekall.usage where hour < now() - $1::interval limit $2))
		returning key_id, used_at),
	kept as (
		update rekall.last_used l set last_used_at = g.used_at
		from (select key_id, max(used_at) as used_at from gone group by key_id) g
		where l.key_id = g.key_id and l.last_used_at < g.used_at
			and l.key_id ~ '^key_[0-9A-Za-z]{22}$') -- else a check refuses it, if an edge made it up while that was added
select greatest((select count(*) from gone), (select count(*) from spikes), (select count(*) from flushes))`, retention, limit, silentEdge)
	if err != nil {
		return 0, failedAtEdge("forget usage", err)
	}
	return removed, nil
}

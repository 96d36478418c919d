package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

var anHour = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// counts of a key: allowed ones, used last in the given minute of the hour, and revoked ones.
func counts(id string, allowed, revoked uint32, minute int) *keystore.KeyCounts {
	k := &keystore.KeyCounts{KeyID: id}
	k.Counts[apikey.Allowed], k.Counts[apikey.Revoked] = allowed, revoked
	if allowed > 0 {
		k.UsedAt = anHour.Add(time.Duration(minute) * time.Minute).UnixMicro()
	}
	return k
}

func flushOf(instance string, sequence int64, hour time.Time, keys ...*keystore.KeyCounts) keystore.UsageFlush {
	return keystore.UsageFlush{Instance: instance, Sequence: sequence, Hour: hour.Unix() / 3600, Keys: keys}
}

func mustFlush(t testing.TB, store *keystore.Store, f keystore.UsageFlush) {
	t.Helper()
	if err := store.FlushUsage(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func usageOf(t testing.TB, store *keystore.Store, id string) keystore.KeyUsage {
	t.Helper()
	usage, err := store.Usage(t.Context(), id, anHour.Add(-30*24*time.Hour), anHour.Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for i := range usage.Hours {
		usage.Hours[i].Hour = usage.Hours[i].Hour.UTC()
	}
	usage.FirstUsedAt, usage.LastUsedAt = usage.FirstUsedAt.UTC(), usage.LastUsedAt.UTC()
	return usage
}

func instance() string { return apikey.RandomText(22) }

// TestEveryOutcomeCanBeCounted: rekall.usage has a list of them of its own.
func TestEveryOutcomeCanBeCounted(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := counts(newKey().ID, 1, 1, 0)
	for outcome := range key.Counts {
		key.Counts[outcome] = 1
	}
	mustFlush(t, store, flushOf(instance(), 1, anHour, key))
	if got := usageOf(t, store, key.KeyID); len(got.Hours) != int(apikey.OutcomeCount) {
		t.Errorf("%+v", got.Hours)
	}
}

func TestFlushesOfAllEdgesAddUpByHourAndOutcome(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	id, other := newKey().ID, newKey().ID
	north, south := instance(), instance()
	mustFlush(t, store, flushOf(north, 1, anHour, counts(id, 3, 2, 4)))
	mustFlush(t, store, flushOf(south, 1, anHour, counts(id, 4, 0, 5)))
	mustFlush(t, store, flushOf(north, 2, anHour.Add(time.Hour), counts(id, 1, 0, 65)))
	mustFlush(t, store, flushOf(south, 2, anHour, counts(id, 0, 7, 0), counts(other, 0, 1, 0)))
	want := []keystore.HourUsage{{anHour, "allowed", 7}, {anHour, "revoked", 9}, {anHour.Add(time.Hour), "allowed", 1}}
	got := usageOf(t, store, id)
	if diff := cmp.Diff(want, got.Hours); diff != "" {
		t.Error(diff)
	}
	first, last := anHour.Add(4*time.Minute), anHour.Add(65*time.Minute)
	if got.FirstUsedAt != first || got.LastUsedAt != last {
		t.Errorf("used from %v to %v, want from %v to %v", got.FirstUsedAt, got.LastUsedAt, first, last)
	}
	if refused := usageOf(t, store, other); !refused.LastUsedAt.IsZero() || len(refused.Hours) != 1 {
		t.Errorf("a key that was only ever refused: %+v", refused)
	}
}

func TestFlushIntoAnOlderSchemaSaysWhatToRun(t *testing.T) {
	store := open(t, pgtest.URL(t), keystore.Options{})
	if err := store.FlushUsage(t.Context(), flushOf(instance(), 1, anHour, counts(newKey().ID, 1, 0, 0))); !errors.Is(err, keystore.ErrNotMigrated) {
		t.Errorf("got %v", err)
	}
}

func TestFlushThatIsRepeatedIsCountedOnce(t *testing.T) {
	store := open(t, database(t), keystore.Options{MaxConns: 10})
	id, edge := newKey().ID, instance()
	mustFlush(t, store, flushOf(edge, 1, anHour, counts(id, 1, 0, 1)))
	var wg sync.WaitGroup
	for range 10 { // the first may still be running when it is repeated
		wg.Go(func() {
			if err := store.FlushUsage(context.WithoutCancel(t.Context()), flushOf(edge, 2, anHour, counts(id, 10, 5, 2))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	mustFlush(t, store, flushOf(edge, 1, anHour, counts(id, 1, 0, 1)))
	want := []keystore.HourUsage{{anHour, "allowed", 11}, {anHour, "revoked", 5}}
	if diff := cmp.Diff(want, usageOf(t, store, id).Hours); diff != "" {
		t.Error(diff)
	}
}

func TestUseOfAKeyIsNoChangeOfIt(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := insert(t, store)
	before, err := store.Get(t.Context(), keystore.Everything(), key.ID)
	if err != nil {
		t.Fatal(err)
	}
	start := snapshot(t, store, "")
	mustFlush(t, store, flushOf(instance(), 1, anHour, counts(key.ID, 10, 5, 2)))
	after, err := store.Get(t.Context(), keystore.Everything(), key.ID)
	if err != nil {
		t.Fatal(err)
	}
	if after.ChangeXid != before.ChangeXid {
		t.Errorf("change_xid went from %d to %d", before.ChangeXid, after.ChangeXid)
	}
	if changes := snapshot(t, store, start.Text).Changes; len(changes) != 0 {
		t.Errorf("the feed has %d changes", len(changes))
	}
}

func TestFlushesOfManyEdgesAtOnceNeitherDeadlockNorLoseACount(t *testing.T) {
	const edges, flushes, keys = 8, 20, 50
	store := open(t, database(t), keystore.Options{MaxConns: edges})
	ids := make([]string, keys)
	for i := range ids {
		ids[i] = newKey().ID
	}
	slices.Sort(ids)
	var wg sync.WaitGroup
	for range edges {
		wg.Go(func() {
			edge := instance()
			for n := range flushes {
				f := flushOf(edge, int64(n+1), anHour)
				for _, id := range ids {
					f.Keys = append(f.Keys, counts(id, 2, 1, n))
				}
				if err := store.FlushUsage(context.WithoutCancel(t.Context()), f); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	want := []keystore.HourUsage{{anHour, "allowed", 2 * edges * flushes}, {anHour, "revoked", edges * flushes}}
	for _, id := range ids {
		if diff := cmp.Diff(want, usageOf(t, store, id).Hours); diff != "" {
			t.Fatal(diff)
		}
	}
}

func TestFirstAllowedUseOfAKeyStartsAGracePeriodOnce(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	old, next, _ := rotated(t, databaseURL, 1, 9)
	edge := instance()
	grace := func() (at *time.Time, lines int) {
		t.Helper()
		row, err := store.Get(t.Context(), keystore.Everything(), old)
		if err != nil {
			t.Fatal(err)
		}
		entries, err := store.ListAudit(t.Context(), keystore.Everything(), keystore.AuditFilter{Action: "key.grace_started"}, 10)
		if err != nil {
			t.Fatal(err)
		}
		return row.GraceStartedAt, len(entries)
	}
	mustFlush(t, store, flushOf(edge, 1, anHour, counts(next, 0, 1, 0), counts(newKey().ID, 1, 0, 1)))
	if at, _ := grace(); at != nil {
		t.Error("a use that was refused started it")
	}
	mustFlush(t, store, flushOf(edge, 2, anHour, counts(next, 1, 0, 1), counts(newKey().ID, 1, 0, 1)))
	began, _ := grace()
	if began == nil {
		t.Fatal("the first use did not start it")
	}
	mustFlush(t, store, flushOf(edge, 3, anHour, counts(next, 1, 1, 2)))
	mustFlush(t, store, flushOf(instance(), 1, anHour, counts(next, 1, 0, 3)))
	if at, lines := grace(); !at.Equal(*began) || lines != 1 {
		t.Errorf("began at %v and at %v, with %d lines in the audit", began, at, lines)
	}
}

func TestForgetRemovesWhatIsPastItsRetentionAndKeepsTheLastUse(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	id, edge := newKey().ID, instance()
	now := time.Now().UTC().Truncate(time.Hour)
	for age := range 10 {
		f := flushOf(edge, int64(age+1), now.Add(-time.Duration(age)*24*time.Hour), counts(id, 1, 1, 0))
		mustFlush(t, store, f)
		if _, err := store.AddSpike(t.Context(), keystore.Spike{KeyID: id, Hour: time.Unix(f.Hour*3600, 0), Threshold: 1}); err != nil {
			t.Fatal(err)
		}
	}
	exec(t, connect(t, databaseURL), `insert into rekall.usage_flushes values ($1, 1, now() - interval '8 days')`, instance())
	const keep = 4*24*time.Hour + time.Minute + time.Hour // the hour that it is now counts as begun
	var removed []int64
	for {
		n, err := store.ForgetUsage(t.Context(), keep, 4)
		if err != nil {
			t.Fatal(err)
		}
		if removed = append(removed, n); n < 4 {
			break
		}
	}
	if !slices.Equal(removed, []int64{4, 4, 2}) {
		t.Errorf("removed %v", removed)
	}
	usage, err := store.Usage(t.Context(), id, now.Add(-30*24*time.Hour), now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if len(usage.Hours) != 10 || len(usage.Spikes) != 5 || usage.LastUsedAt.IsZero() {
		t.Errorf("left are %d counts, %d spikes, last use %v", len(usage.Hours), len(usage.Spikes), usage.LastUsedAt)
	}
	var flushes int
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select count(*) from rekall.usage_flushes`).Scan(&flushes); err != nil || flushes != 1 {
		t.Errorf("%d edges' flushes left, %v", flushes, err)
	}
}

// TestForgetRemovesNoMoreOfAnyKindAtATimeThanItIsTold: an edge may have made up millions, and no turn would ever come to its end.
func TestForgetRemovesNoMoreOfAnyKindAtATimeThanItIsTold(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	conn := connect(t, databaseURL)
	for _, sql := range []string{
		`insert into rekall.usage (key_id, hour, outcome, count) select 'key_0123456789abcdefABCDEF', '2000-01-01 00:00Z'::timestamptz + n * interval '1 hour', 'revoked', 1
			from generate_series(1, 5) n`,
		`insert into rekall.spikes (key_id, hour, threshold) select 'key_0123456789abcdefABCDEF', '2000-01-01 00:00Z'::timestamptz + n * interval '1 hour', 1
			from generate_series(1, 5) n`,
		`insert into rekall.usage_flushes (instance, sequence, flushed_at) select lpad(n::text, 22, '0'), 1, '2000-01-01 00:00Z' from generate_series(1, 5) n`,
	} {
		table := strings.Fields(sql)[2]
		exec(t, conn, sql)
		for _, want := range []struct{ removed, left int }{{2, 3}, {2, 1}, {1, 0}} {
			removed, err := store.ForgetUsage(t.Context(), time.Hour, 2)
			var left int
			if err := errors.Join(err, conn.QueryRow(t.Context(), `select count(*) from `+table).Scan(&left)); err != nil {
				t.Fatal(err)
			}
			if int(removed) != want.removed || left != want.left {
				t.Errorf("%s: %d removed, %d left, want %+v", table, removed, left, want)
			}
		}
	}
}

// Of the uses in an hour only the first changes the row that outlives the counts.
func TestLastUseIsExactAndOutlivesItsCounts(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key, edge := insert(t, store), instance()
	for i, use := range []struct {
		hour   time.Time
		minute int
	}{{anHour, 1}, {anHour, 30}, {anHour.Add(time.Hour), 61}, {anHour, 59}, {anHour.Add(time.Hour), 75}, {anHour.Add(time.Hour), 70}} {
		mustFlush(t, store, flushOf(edge, int64(i+1), use.hour, counts(key.ID, 1, 1, use.minute)))
	}
	first, last := anHour.Add(time.Minute), anHour.Add(75*time.Minute)
	check := func(when string) {
		t.Helper()
		if got := usageOf(t, store, key.ID); got.FirstUsedAt != first || got.LastUsedAt != last {
			t.Errorf("%s: used from %v to %v, want from %v to %v", when, got.FirstUsedAt, got.LastUsedAt, first, last)
		}
		if row, err := store.GetUsed(t.Context(), keystore.Everything(), key.ID); err != nil || row.LastUsedAt == nil || !row.LastUsedAt.Equal(last) {
			t.Errorf("%s: %+v, %v", when, row, err)
		}
	}
	check("with its counts")
	if n, err := store.ForgetUsage(t.Context(), time.Hour, 100); err != nil || n != 4 {
		t.Fatalf("%d rows removed, %v", n, err)
	}
	check("without them")
}

func TestChoreHasOneTakerInItsPeriod(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{MaxConns: 8})
	claim := func() (winners int) {
		mine := make(chan bool, 8)
		var wg sync.WaitGroup
		for range cap(mine) {
			wg.Go(func() {
				won, err := store.ClaimChore(context.WithoutCancel(t.Context()), "sweep", time.Hour)
				if err != nil {
					t.Error(err)
				}
				mine <- won
			})
		}
		wg.Wait()
		close(mine)
		for won := range mine {
			if won {
				winners++
			}
		}
		return winners
	}
	if n := claim(); n != 1 {
		t.Errorf("%d edges took the first turn", n)
	}
	if n := claim(); n != 0 {
		t.Errorf("%d edges took a turn that had been taken", n)
	}
	exec(t, connect(t, databaseURL), `update rekall.usage_chores set claimed_at = now() - interval '61 minutes'`)
	if n := claim(); n != 1 {
		t.Errorf("%d edges took the next turn", n)
	}
	exec(t, connect(t, databaseURL), `update rekall.usage_chores set claimed_at = 'infinity'`)
	if n := claim(); n != 1 {
		t.Errorf("%d edges took a turn that somebody had taken for ever", n)
	}
}

// TestNoCountThatAnotherEdgeWroteMakesAFlushFail: all that the others count in that hour would be lost.
func TestNoCountThatAnotherEdgeWroteMakesAFlushFail(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	id, other, now := newKey().ID, newKey().ID, time.Now().UTC().Truncate(time.Hour)
	edge := instance()
	mustFlush(t, store, flushOf(edge, 1, now, counts(id, 1, 1, 1)))
	exec(t, connect(t, databaseURL), `update rekall.usage set count = 9223372036854775807`)
	mustFlush(t, store, flushOf(edge, 2, now, counts(id, 1, 1, 1), counts(other, 2, 0, 1)))
	if used, err := store.Usage(t.Context(), other, now, now.Add(time.Hour)); err != nil || len(used.Hours) != 1 || used.Hours[0].Count != 2 {
		t.Errorf("of another key %+v, %v", used, err)
	}
	var busiest keystore.HourTotal
	if err := store.BusyKeys(t.Context(), 1, func(total keystore.HourTotal) {
		if total.Count > busiest.Count {
			busiest = total
		}
	}); err != nil || busiest.KeyID != id {
		t.Errorf("busy keys: %+v, %v", busiest, err)
	}
	if err := store.UsageHistory(t.Context(), []string{id}, now.Add(time.Hour), 24*time.Hour, func(keystore.HourTotal) {}); err != nil {
		t.Errorf("history: %v", err)
	}
}

// TestHistoryHasAnHourOnceHoweverManyCountsAnEdgeMadeUpInIt: whoever looks for spikes keeps it in memory.
func TestHistoryHasAnHourOnceHoweverManyCountsAnEdgeMadeUpInIt(t *testing.T) {
	databaseURL := database(t)
	id, now := newKey().ID, time.Now().UTC().Truncate(time.Hour)
	// What was written before there was the check is there yet.
	exec(t, connect(t, databaseURL), `alter table rekall.usage drop constraint usage_full_hour_check`)
	exec(t, connect(t, databaseURL), `insert into rekall.usage
		select $1, $2::timestamptz - n * interval '1 second', 'allowed', 2 from generate_series(1, 3600) n`, id, now)
	var got []keystore.HourTotal
	err := open(t, databaseURL, keystore.Options{}).UsageHistory(t.Context(), []string{id}, now, 24*time.Hour, func(total keystore.HourTotal) {
		got = append(got, total)
	})
	if err != nil || len(got) != 1 || !got[0].Hour.Equal(now.Add(-time.Hour)) || got[0].Count != 7200 {
		t.Errorf("%d hours, %+v, %v", len(got), got[:min(len(got), 2)], err)
	}
}

// TestBusyKeysAreThoseOfTheHourInUTC: in a time zone half an hour off, an hour begins elsewhere.
func TestBusyKeysAreThoseOfTheHourInUTC(t *testing.T) {
	databaseURL := database(t)
	zones := []string{"Asia/Kolkata", "UTC", "Asia/Kathmandu"}
	busy, quiet, known, old := newKey().ID, newKey().ID, newKey().ID, newKey().ID
	for _, zone := range zones {
		u, err := url.Parse(databaseURL)
		if err != nil {
			t.Fatal(err)
		}
		query := u.Query()
		query.Set("timezone", zone)
		u.RawQuery = query.Encode()
		store := open(t, u.String(), keystore.Options{})
		now := time.Now().UTC().Truncate(time.Hour)
		keys := []*keystore.KeyCounts{counts(busy, 60, 40, 0), counts(quiet, 50, 49, 0), counts(known, 500, 0, 0)}
		slices.SortFunc(keys, func(a, b *keystore.KeyCounts) int { return strings.Compare(a.KeyID, b.KeyID) })
		exec(t, connect(t, databaseURL), `delete from rekall.usage`)
		edge := instance()
		mustFlush(t, store, flushOf(edge, 1, now, keys...))
		mustFlush(t, store, flushOf(edge, 2, now.Add(-2*time.Hour), counts(old, 500, 0, 0)))
		mustFlush(t, store, flushOf(edge, 3, time.Date(9998, 1, 1, 0, 0, 0, 0, time.UTC), counts(old, 500, 0, 0))) // an edge made it up
		if _, err := store.AddSpike(t.Context(), keystore.Spike{KeyID: known, Hour: now, Threshold: 1}); err != nil {
			t.Fatal(err)
		}
		var got []string
		err = store.BusyKeys(t.Context(), 100, func(total keystore.HourTotal) {
			got = append(got, fmt.Sprint(total.KeyID, total.Hour.Unix(), total.Count))
		})
		if want := []string{fmt.Sprint(busy, now.Unix(), 100)}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v, %v", zone, got, want, err)
		}
	}
}

// TestFirstUseReadsAKeyByItsIndexHoweverManyThereAre: at ten million, a key that is used for the first time would hold up the flush of all.
func TestFirstUseReadsAKeyByItsIndexHoweverManyThereAre(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	for range 300 {
		insert(t, store)
	}
	conn := connect(t, databaseURL)
	exec(t, conn, "analyze rekall.api_keys")
	exec(t, conn, "begin")
	exec(t, conn, "insert into rekall.last_used (key_id, first_used_at, last_used_at) select id, now(), now() from rekall.api_keys limit 2")
	var sequential, byIndex int
	if err := conn.QueryRow(t.Context(), `
select seq_scan, idx_tup_fetch from pg_stat_xact_user_tables where relid = 'rekall.api_keys'::regclass`).Scan(&sequential, &byIndex); err != nil {
		t.Fatal(err)
	}
	if sequential != 1 || byIndex != 2 { // the insert's own
		t.Errorf("%d reads of the whole table besides, and %d keys by index, want 2", sequential-1, byIndex)
	}
}

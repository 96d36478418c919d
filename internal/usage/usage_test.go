package usage_test

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/usage"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func newRecords(n int) []*apikey.Record {
	records := make([]*apikey.Record, n)
	for i := range records {
		records[i] = &apikey.Record{ID: "key_" + apikey.RandomText(22)}
		rand.Read(records[i].Digest[:])
	}
	return records
}

// newCounter returns a counter that flushes when it is told to, and what it logs.
func newCounter(store usage.Store, maxBuffered int) (*usage.Counter, *observer.ObservedLogs) {
	core, logs := observer.New(zapcore.InfoLevel)
	logger := zap.New(core)
	return usage.New(store, usage.Config{
		Instance: apikey.RandomText(22), Flush: 5 * time.Minute, Retention: 90 * 24 * time.Hour, MaxBuffered: maxBuffered,
		Logger: func() *zap.Logger { return logger },
	}), logs
}

// run starts the counter's loops, and returns what stops them and waits for their end.
func run(t *testing.T, c *usage.Counter) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	running.Go(func() { c.DoChores(ctx) })
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return stop
}

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// total returns a key's requests by outcome in the hours around noon.
func total(t testing.TB, store *keystore.Store, record *apikey.Record) map[string]int64 {
	t.Helper()
	used, err := store.Usage(t.Context(), record.ID, noon.Add(-24*time.Hour), noon.Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	sum := map[string]int64{}
	for _, h := range used.Hours {
		sum[h.Outcome] += h.Count
	}
	return sum
}

func flush(t testing.TB, c *usage.Counter) {
	t.Helper()
	if err := usage.Flush(c, t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestCountOfAKeyThatIsBufferedDoesNotAllocate(t *testing.T) {
	c, _ := newCounter(nil, 0)
	records := newRecords(100)
	for _, r := range records {
		c.Count(r, apikey.Allowed, noon)
	}
	i := 0
	if n := testing.AllocsPerRun(1000, func() {
		c.Count(records[i%len(records)], apikey.Allowed, noon)
		c.Count(records[i%len(records)], apikey.Insufficient, noon)
		i++
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestCountsLandInTheHourOfTheRequest(t *testing.T) {
	store := pgtest.Store(t, pgtest.Migrated(t))
	c, _ := newCounter(store, 0)
	record := newRecords(1)[0]
	c.Count(record, apikey.Allowed, noon.Add(-time.Nanosecond))
	c.Count(record, apikey.Allowed, noon)
	c.Count(record, apikey.Allowed, noon.Add(time.Hour-time.Nanosecond))
	flush(t, c)
	used, err := store.Usage(t.Context(), record.ID, noon.Add(-24*time.Hour), noon.Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if h := used.Hours; len(h) != 2 || !h[0].Hour.Equal(noon.Add(-time.Hour)) || h[0].Count != 1 || !h[1].Hour.Equal(noon) || h[1].Count != 2 {
		t.Errorf("got %+v", h)
	}
	if last := noon.Add(time.Hour - time.Nanosecond).Truncate(time.Microsecond); !used.LastUsedAt.Equal(last) {
		t.Errorf("last used %v, want %v", used.LastUsedAt, last)
	}
}

// TestAllUsagePastItsRetentionIsForgottenAtOnce, however many batches that takes, and no other.
func TestAllUsagePastItsRetentionIsForgottenAtOnce(t *testing.T) {
	database := pgtest.Migrated(t)
	store := pgtest.Store(t, database)
	c, _ := newCounter(store, 0)
	pgtest.Exec(t, database, `insert into rekall.usage (key_id, hour, outcome, count)
		select 'key_aaaaaaaaaaaaaaaaaaaold', date_trunc('hour', now() - interval '91 days') - n * interval '1 hour', 'allowed', 1 from generate_series(0, 10000) n`)
	pgtest.Exec(t, database, `insert into rekall.usage (key_id, hour, outcome, count)
		values ('key_aaaaaaaaaaaaaaaaaalate', date_trunc('hour', now() - interval '89 days'), 'allowed', 1)`)
	if err := usage.Forget(c, t.Context()); err != nil {
		t.Fatal(err)
	}
	for id, hours := range map[string]int{"key_aaaaaaaaaaaaaaaaaaaold": 0, "key_aaaaaaaaaaaaaaaaaalate": 1} {
		used, err := store.Usage(t.Context(), id, time.Now().Add(-100*365*24*time.Hour), time.Now())
		if err != nil || len(used.Hours) != hours {
			t.Errorf("%s has %d hours left, %v", id, len(used.Hours), err)
		}
	}
}

func TestEachOutageInWhichCountsAreDroppedIsLoggedOnce(t *testing.T) {
	c, logs := newCounter(nil, 1)
	c.Count(newRecords(1)[0], apikey.Allowed, noon)
	report, failed := usage.ReportDrops(c), errors.New("Postgres is away")
	for i, step := range []struct {
		drop bool
		err  error
		told int // since the beginning
	}{{false, failed, 0}, {true, failed, 1}, {true, failed, 1}, {false, failed, 1}, {true, failed, 1}, {false, nil, 1}, {true, failed, 2}} {
		if step.drop {
			c.Count(newRecords(1)[0], apikey.Allowed, noon)
		}
		if report(step.err); logs.FilterMessageSnippet("usage buffer is full").Len() != step.told {
			t.Errorf("after step %d the log tells %v", i, logs.All())
		}
	}
}

// TestRefusedRequestIsNotTheLastUseOfItsKey: it would seem in use, and its predecessor would end before anything has changed over.
func TestRefusedRequestIsNotTheLastUseOfItsKey(t *testing.T) {
	store := pgtest.Store(t, pgtest.Migrated(t))
	c, _ := newCounter(store, 0)
	record := newRecords(1)[0]
	c.Count(record, apikey.Allowed, noon)
	c.Count(record, apikey.Insufficient, noon.Add(time.Second))
	flush(t, c)
	used, err := store.Usage(t.Context(), record.ID, noon.Add(-time.Hour), noon.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if !used.LastUsedAt.Equal(noon) {
		t.Errorf("last used %v, want %v", used.LastUsedAt, noon)
	}
}

// TestKeysWhoseDigestsShareAPlaceAreCountedApart: hashes can be imported, so a user can choose such digests.
func TestKeysWhoseDigestsShareAPlaceAreCountedApart(t *testing.T) {
	store := pgtest.Store(t, pgtest.Migrated(t))
	c, _ := newCounter(store, 0)
	records := newRecords(3)
	for _, r := range records {
		r.Digest = records[0].Digest
	}
	for hour := range 3 { // neighbouring hours are neighbouring places
		for i, r := range records {
			for range i + 1 {
				c.Count(r, apikey.Allowed, noon.Add(time.Duration(hour)*time.Hour))
			}
		}
	}
	flush(t, c)
	for i, r := range records {
		used, err := store.Usage(t.Context(), r.ID, noon, noon.Add(3*time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		if len(used.Hours) != 3 {
			t.Fatalf("key %d has %d hours", i, len(used.Hours))
		}
		for _, h := range used.Hours {
			if h.Count != int64(i+1) {
				t.Errorf("key %d was counted %d times at %v", i, h.Count, h.Hour)
			}
		}
	}
}

func TestCountsDuringFlushesAddUp(t *testing.T) {
	const keys, clients, requests = 300, 4, 5000
	store := pgtest.Store(t, pgtest.Migrated(t))
	c, _ := newCounter(store, 0)
	records := newRecords(keys)
	var clientsDone atomic.Bool
	var wg, flusher sync.WaitGroup
	for n := range clients {
		wg.Go(func() {
			for i := range requests {
				outcome := apikey.Allowed
				if i%5 == 0 {
					outcome = apikey.Expired
				}
				c.Count(records[(i+n)%keys], outcome, noon.Add(time.Duration(i)*time.Second))
			}
		})
	}
	flusher.Go(func() {
		for !clientsDone.Load() {
			if err := usage.Flush(c, context.WithoutCancel(t.Context())); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	clientsDone.Store(true)
	flusher.Wait()
	flush(t, c)
	sum := map[string]int64{}
	for _, r := range records {
		for outcome, n := range total(t, store, r) {
			sum[outcome] += n
		}
	}
	if sum["allowed"] != clients*requests*4/5 || sum["expired"] != clients*requests/5 {
		t.Errorf("got %v", sum)
	}
	if s := c.Status(); s.Buffered != 0 || s.Flushed != clients*requests || s.Dropped != 0 {
		t.Errorf("status %+v", s)
	}
}

// choreless refuses chores while it is told to, and else whoever asks has his turn at the one named.
type choreless struct {
	usage.Store
	refuses    atomic.Bool
	turn       string
	looks      int // for spikes
	forgetting atomic.Int64
	ended      bool
}

func (s *choreless) ClaimChore(_ context.Context, name string, _ time.Duration) (bool, error) {
	if s.refuses.Load() {
		return false, errLost
	}
	return name == s.turn, nil
}

func (s *choreless) BusyKeys(context.Context, int64, func(keystore.HourTotal)) error {
	s.looks++
	return nil
}

// ForgetUsage takes until it is told to end, and then a moment.
func (s *choreless) ForgetUsage(ctx context.Context, _ time.Duration, _ int) (int64, error) {
	s.forgetting.Add(1)
	<-ctx.Done()
	<-time.After(time.Second)
	s.ended = true
	return 0, ctx.Err()
}

func TestEdgeDoesTheChoreWhoseTurnItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &choreless{turn: "find spikes"}
		c, _ := newCounter(store, 0)
		stop := run(t, c)
		<-time.After(time.Minute + time.Second)
		stop()
		if store.looks != 4 || store.forgetting.Load() != 0 {
			t.Errorf("it looked for spikes %d times and forgot %d times", store.looks, store.forgetting.Load())
		}
	})
}

// TestStopWaitsForTheChoreInHandAndTellsOfNoFailure: what it works with is closed after that.
func TestStopWaitsForTheChoreInHandAndTellsOfNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &choreless{turn: "forget usage"}
		c, logs := newCounter(store, 0)
		stop := run(t, c)
		<-time.After(20 * time.Second)
		if store.forgetting.Load() != 1 {
			t.Fatal("no chore is in hand: the test shows nothing")
		}
		if stop(); !store.ended || logs.Len() != 0 {
			t.Errorf("the chore has ended: %v; logged %v", store.ended, logs.All())
		}
	})
}

// choreful has its turn at each chore once in its period, and fails to do it while it is told to.
type choreful struct {
	usage.Store
	fails   atomic.Bool
	claimed map[string]time.Time
	old     int // batches of counts that are past their retention; each takes a second to remove
	asked   int // for a turn
	loses   int // the connection each so many times that it is asked for a turn; 0: never
}

func (s *choreful) ClaimChore(_ context.Context, name string, period time.Duration) (bool, error) {
	if s.asked++; s.loses > 0 && s.asked%s.loses == 0 {
		return false, errLost
	}
	if time.Since(s.claimed[name]) < period {
		return false, nil
	}
	s.claimed[name] = time.Now()
	return true, nil
}

func (s *choreful) done() error {
	if s.fails.Load() {
		return errLost
	}
	return nil
}

func (s *choreful) BusyKeys(context.Context, int64, func(keystore.HourTotal)) error { return s.done() }

func (s *choreful) ForgetUsage(ctx context.Context, _ time.Duration, limit int) (int64, error) {
	if s.old == 0 {
		return 0, s.done()
	}
	select {
	case <-time.After(time.Second):
		s.old--
		return int64(limit), s.done()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// TestManyCountsPastTheirRetentionAreForgottenWithinHours: else more might come than go.
func TestManyCountsPastTheirRetentionAreForgottenWithinHours(t *testing.T) {
	for name, loses := range map[string]int{"without a failure": 0, "though connections are lost between turns": 5} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &choreful{claimed: map[string]time.Time{}, old: 3000, loses: loses}
				c, logs := newCounter(store, 0)
				stop := run(t, c)
				<-time.After(3 * time.Hour)
				stop()
				if store.old > 0 || loses == 0 && logs.Len() > 0 {
					t.Errorf("%d batches are left; log: %v", store.old, logs.All())
				}
			})
		})
	}
}

func TestFailureOfAChoreIsLoggedOnceWhenItBeginsAndOnceWhenItEnds(t *testing.T) {
	idle, busy := new(choreless), &choreful{claimed: map[string]time.Time{}}
	for name, tc := range map[string]struct {
		store usage.Store
		fails *atomic.Bool
	}{"its turn cannot be asked for": {idle, &idle.refuses}, "it cannot be done": {busy, &busy.fails}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tc.fails.Store(true)
				c, logs := newCounter(tc.store, 0)
				stop := run(t, c)
				<-time.After(2 * time.Hour)
				tc.fails.Store(false)
				<-time.After(2 * time.Hour)
				stop()
				const chores = 2
				for _, line := range []string{"usage chore failed; it is tried again", "usage chore works again"} {
					if n := logs.FilterMessage(line).Len(); n != chores {
						t.Errorf("%q is logged %d times, want once for each of %d chores", line, n, chores)
					}
				}
			})
		})
	}
}

// TestChoreIsAsOldAsItsLastTurnThatWasNotInVain: an edge whose turn never comes is told from the others, and so is one that has it in vain.
func TestChoreIsAsOldAsItsLastTurnThatWasNotInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &choreful{claimed: map[string]time.Time{}}
		c, _ := newCounter(store, 0)
		run(t, c)
		aged := func(want map[string]time.Duration) {
			t.Helper()
			synctest.Wait()
			if got := c.ChoreAges(); !maps.Equal(got, want) {
				t.Errorf("%v, want %v", got, want)
			}
		}
		aged(map[string]time.Duration{"find spikes": 0, "forget usage": 0})
		<-time.After(31 * time.Minute) // each was done after a quarter of a minute
		aged(map[string]time.Duration{"find spikes": 45 * time.Second, "forget usage": 31*time.Minute - 15*time.Second})
		store.fails.Store(true)
		<-time.After(2 * time.Hour)
		aged(map[string]time.Duration{"find spikes": 2*time.Hour + 45*time.Second, "forget usage": 151*time.Minute - 15*time.Second})
		store.old = 10_000 // more than an hour is long enough for
		store.fails.Store(false)
		<-time.After(time.Hour)
		synctest.Wait()
		if ages := c.ChoreAges(); ages["find spikes"] > 2*time.Minute || ages["forget usage"] > time.Minute {
			t.Errorf("though they are done again: %v", ages)
		}
	})
}

// lossy applies flushes and loses some of the answers.
type lossy struct {
	*keystore.Store
	lose func() bool
}

var errLost = errors.New("connection lost")

func (l lossy) FlushUsage(ctx context.Context, f keystore.UsageFlush) error {
	err := l.Store.FlushUsage(ctx, f)
	if err == nil && l.lose() {
		return errLost
	}
	return err
}

// ordering is a store that notes the order of the keys that are flushed.
type ordering struct {
	*keystore.Store
	keys *[]string
}

func (o ordering) FlushUsage(ctx context.Context, f keystore.UsageFlush) error {
	for _, k := range f.Keys {
		*o.keys = append(*o.keys, k.KeyID)
	}
	return o.Store.FlushUsage(ctx, f)
}

// TestFlushLocksKeysInTheOrderOfTheirIDs: edges that lock the rows of the same keys in different orders wait for each other.
func TestFlushLocksKeysInTheOrderOfTheirIDs(t *testing.T) {
	var keys []string
	c, _ := newCounter(ordering{pgtest.Store(t, pgtest.Migrated(t)), &keys}, 0)
	for _, record := range newRecords(1000) {
		c.Count(record, apikey.Allowed, noon)
	}
	run(t, c)()
	if len(keys) != 1000 || !slices.IsSorted(keys) {
		t.Errorf("%d keys, in order: %v", len(keys), slices.IsSorted(keys))
	}
}

func TestFlushWhoseAnswerIsLostIsCountedOnce(t *testing.T) {
	store := pgtest.Store(t, pgtest.Migrated(t))
	answers := 0
	c, _ := newCounter(lossy{store, func() bool { answers++; return answers%3 != 0 }}, 0)
	records := newRecords(12_000) // three batches
	const rounds, extra = 3, 10
	revoked := 0
	for range rounds {
		for _, r := range records {
			c.Count(r, apikey.Allowed, noon)
		}
		for usage.Flush(c, t.Context()) != nil {
			if revoked < extra { // what is counted between two attempts must not change the batch
				revoked++
				c.Count(records[0], apikey.Revoked, noon)
			}
		}
	}
	for i, r := range records[:200] {
		sum := total(t, store, r)
		if sum["allowed"] != rounds || sum["revoked"] != int64(extra) && i == 0 || len(sum) != 1 && i > 0 {
			t.Fatalf("key %d: %v", i, sum)
		}
	}
	if s := c.Status(); s.Buffered != 0 || s.Flushed != uint64(rounds*len(records)+extra) {
		t.Errorf("status %+v", s)
	}
}

func TestBatchThatTakesLongerThanItsTimeIsFlushed(t *testing.T) {
	database := pgtest.Migrated(t)
	store := pgtest.Store(t, database)
	pgtest.Exec(t, database, `create function slowly() returns trigger language plpgsql as $$ begin perform pg_sleep(0.2); return null; end $$;
create trigger slowly before insert on rekall.usage for each statement execute function slowly()`)
	c, _ := newCounter(store, 0)
	usage.SetFlushTimeout(c, 100*time.Millisecond)
	record := newRecords(1)[0]
	c.Count(record, apikey.Allowed, noon)
	if err := usage.Flush(c, t.Context()); err == nil {
		t.Fatal("the first try was in time")
	}
	eventually.True(t, "the counts are flushed", func() bool { return usage.Flush(c, t.Context()) == nil })
	if n := total(t, store, record)["allowed"]; n != 1 {
		t.Errorf("%d requests", n)
	}
}

func TestOutageLosesNoCountAndIsLoggedOnce(t *testing.T) {
	server := pgtest.Server(t)
	pgtest.Migrate(t, server.URL())
	store := pgtest.Store(t, server.URL())
	core, logs := observer.New(zapcore.InfoLevel)
	logger := zap.New(core)
	c := usage.New(store, usage.Config{
		Instance: apikey.RandomText(22), Flush: 50 * time.Millisecond, Retention: time.Hour, Logger: func() *zap.Logger { return logger },
	})
	stop := run(t, c)
	record := newRecords(1)[0]
	sent := int64(0)
	count := func() { sent++; c.Count(record, apikey.Allowed, noon) }
	for range 100 {
		count()
	}
	eventually.True(t, "the first counts are flushed", func() bool { return c.Status().Flushed == uint64(sent) })
	server.Kill()
	for errors := c.Status().FlushErrors; c.Status().FlushErrors < errors+3; {
		count()
		<-time.After(time.Millisecond)
	}
	if s := c.Status(); s.Buffered > 2 { // what is on its way, and what grows behind it
		t.Errorf("%d entries for one key", s.Buffered)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "all counts are flushed", func() bool { return c.Status().Flushed == uint64(sent) })
	count()
	stop()
	if n := total(t, store, record)["allowed"]; n != sent {
		t.Errorf("%d of %d are counted", n, sent)
	}
	for _, line := range []string{"usage cannot be flushed; counts are kept in memory", "usage is flushed again"} {
		if n := logs.FilterMessage(line).Len(); n != 1 {
			t.Errorf("%q is logged %d times", line, n)
		}
	}
}

func TestFullBufferCountsOnKnownKeysAndDropsOthers(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	pgtest.Exec(t, databaseURL, "alter table rekall.usage rename to away") // an outage of writes
	store := pgtest.Store(t, databaseURL)
	c, _ := newCounter(store, 10)
	records := newRecords(15)
	for range 4 {
		for _, r := range records {
			c.Count(r, apikey.Allowed, noon)
		}
		if err := usage.Flush(c, t.Context()); err == nil {
			t.Fatal("the flush succeeded")
		}
	}
	// The first ten fill the buffer, and again when they are on their way.
	if s := c.Status(); s.Buffered != 20 || s.Dropped != 5*4 {
		t.Fatalf("status %+v", s)
	}
	pgtest.Exec(t, databaseURL, "alter table rekall.away rename to usage")
	flush(t, c)
	if s := c.Status(); s.Buffered != 0 || s.Flushed != 10*4 {
		t.Errorf("status %+v", s)
	}
	for i, r := range records {
		if n := total(t, store, r)["allowed"]; n != 4 && i < 10 || n != 0 && i >= 10 {
			t.Errorf("key %d was counted %d times", i, n)
		}
	}
}

func TestFirstUseOfAKeyIsFlushedLongBeforeItsInterval(t *testing.T) {
	store := pgtest.Store(t, pgtest.Migrated(t))
	c, _ := newCounter(store, 0) // an interval of five minutes
	run(t, c)
	for _, record := range newRecords(3) {
		c.Count(record, apikey.Revoked, noon) // no use
		c.Count(record, apikey.Allowed, noon)
		eventually.True(t, "the first use is known", func() bool { return total(t, store, record)["allowed"] == 1 })
	}
}

func TestFurtherUsesWaitForTheInterval(t *testing.T) {
	store := pgtest.Store(t, pgtest.Migrated(t))
	c, _ := newCounter(store, 0)
	record := newRecords(1)[0]
	c.Count(record, apikey.Allowed, noon)
	flush(t, c)
	flushes := 0
	counted := lossy{store, func() bool { flushes++; return false }}
	c2, _ := newCounter(counted, 0)
	c2.Count(record, apikey.Allowed, noon)
	flush(t, c2)
	stop := run(t, c2)
	for range 1000 {
		c2.Count(record, apikey.Allowed, noon)
	}
	stop()
	if flushes > 3 { // the one above, at most one for the wake-up that was left, and the last
		t.Errorf("%d flushes", flushes)
	}
}

func TestStopFlushesWhatIsLeft(t *testing.T) {
	store := pgtest.Store(t, pgtest.Migrated(t))
	c, logs := newCounter(store, 0)
	stop := run(t, c)
	record := newRecords(1)[0]
	for range 1000 {
		c.Count(record, apikey.Allowed, noon)
	}
	stop()
	if n := total(t, store, record)["allowed"]; n != 1000 || logs.Len() != 0 {
		t.Errorf("%d of 1000 are counted, and the log says %v", n, logs.All())
	}
}

func TestStopDuringAnOutageEndsAndSaysWhatIsLost(t *testing.T) {
	c, logs := newCounter(pgtest.Store(t, "postgres://user:password@127.0.0.1:1/db"), 0)
	stop := run(t, c)
	for _, record := range newRecords(7) {
		c.Count(record, apikey.Allowed, noon)
	}
	stop()
	lines := logs.FilterMessage("usage is lost: Postgres does not take the last counts").All()
	if len(lines) != 1 || lines[0].ContextMap()["requests"] != uint64(7) {
		t.Errorf("got %+v", lines)
	}
}

package keycache

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/clock"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestFreshnessEndsOnTheClockThatShowsMoreTime(t *testing.T) {
	const bound = 30 * time.Second
	synced := time.Now()
	wallOnly := func(d time.Duration) time.Time { return synced.Round(0).Add(d) } // no monotonic reading: only the wall moved
	for _, tc := range []struct {
		name  string
		now   time.Time
		fresh bool
	}{
		{"just before the bound", synced.Add(bound - time.Nanosecond), true},
		{"at the bound", synced.Add(bound), false},
		{"machine suspended: only the wall clock moved", wallOnly(bound), false},
		{"wall clock set back an hour: the monotonic clock counts", synced.Add(bound), false},
	} {
		s := &state{syncedAt: synced}
		if got := s.fresh(tc.now, bound); got != tc.fresh {
			t.Errorf("%s: fresh %v, want %v", tc.name, got, tc.fresh)
		}
	}
	if newState().fresh(time.Now(), bound) {
		t.Error("fresh before the first sync")
	}
}

func TestExpiryFollowsPostgresClock(t *testing.T) {
	synced := time.Now()
	pgNow := synced.Add(-3 * time.Hour).Truncate(time.Microsecond) // this edge's clock is three hours fast
	s := &state{syncedAt: synced, readAt: synced, pgNow: pgNow}
	record := &apikey.Record{ExpiresAt: apikey.TimeOf(pgNow.Add(10 * time.Second))}
	if got := record.Validity(s.pgTime(synced.Add(9 * time.Second))); got != apikey.Allowed {
		t.Errorf("9s on: %v, want allowed", got)
	}
	if got := record.Validity(s.pgTime(synced.Add(10 * time.Second))); got != apikey.Expired {
		t.Errorf("10s on: %v, want expired", got)
	}
}

// TestKeyIsNotExpiredBeforePostgresSaysSoHoweverLongTheSyncTook: Postgres may have read its clock at the sync's end.
func TestKeyIsNotExpiredBeforePostgresSaysSoHoweverLongTheSyncTook(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	key := db.create(t)
	tick(t, c)
	db.exec(t, "update rekall.api_keys set expires_at = now() + interval '1 minute' where id = $1", key.id)
	var got time.Time
	store.change = func(*keystore.Snapshot) { got = time.Now() }
	tick(t, c)
	inFlight := track(t, c, key)
	long := *c.state.Load()
	long.readAt, long.superseded = long.readAt.Add(-2*time.Minute), make(chan struct{})
	c.state.Store(&long)
	if long.gotAt.Before(got) {
		t.Errorf("the reading was there %v later than the state says", got.Sub(long.gotAt))
	}
	want(t, c, key.digest, apikey.Allowed)
	c.cutEnded(long.steadyPgTime(time.Now()), time.Now())
	if inFlight.Err() != nil {
		t.Errorf("its request was cut: %v", context.Cause(inFlight))
	}
}

// TestStalledPostgresStopsTrustAtTheBound stops Postgres so that it hangs and does not refuse. While it does, each answer
// must rest on data younger than MaxStaleness, and then there must be none.
func TestStalledPostgresStopsTrustAtTheBound(t *testing.T) {
	server := pgtest.Server(t)
	db := newDatabase(t, server.URL())
	core, logs := observer.New(zap.InfoLevel)
	const bound = 5 * time.Second
	c := newCache(t, db.store, func(cfg *Config) {
		cfg.Refresh, cfg.MaxStaleness = 20*time.Millisecond, bound
		cfg.Logger = func() *zap.Logger { return zap.New(core) }
	})
	key, cold := db.create(t), db.create(t) // before the feed begins, which would bring their rows
	run(t, c)
	eventually.True(t, "the first sync", func() bool { return c.Status().Fresh })
	want(t, c, key.digest, apikey.Allowed)
	eventually.True(t, "the key is in memory", func() bool {
		before := c.Status().Lookups
		want(t, c, key.digest, apikey.Allowed)
		return c.Status().Lookups == before
	})

	server.Pause()
	want(t, c, key.digest, apikey.Allowed) // a known key does not notice a short stall
	want(t, c, cold.digest, apikey.Unavailable)
	for {
		began := time.Now()
		found, err := c.Find(context.Background(), key.digest)
		if err != nil {
			if !errors.Is(err, errUnavailable) {
				t.Fatal(err)
			}
			break
		}
		if a := clock.Age(found.vouchedAt, began); a >= bound {
			t.Fatalf("an answer rested on data %v old, bound %v", a, bound)
		}
		if clock.Age(c.state.Load().syncedAt, began) > 10*bound {
			t.Fatal("answers do not end")
		}
	}

	server.Resume()
	eventually.True(t, "the key works again", func() bool { return outcome(t, c, key.digest) == apikey.Allowed })
	db.revoke(t, key)
	eventually.True(t, "the revocation holds", func() bool { return outcome(t, c, key.digest) == apikey.Revoked })
	eventually.True(t, "the log says that it is over", func() bool { return logs.FilterMessage("key sync works again").Len() == 1 })
	if n := logs.FilterMessageSnippet("key sync failed").Len(); n != 1 {
		t.Errorf("the log says %d times that the sync failed, want once", n)
	}
}

// silentStore is a Postgres that hangs.
type silentStore struct{ Store }

func (silentStore) Lookup(ctx context.Context, _ []apikey.Digest) (keystore.Found, error) {
	<-ctx.Done()
	return keystore.Found{}, ctx.Err()
}

func (silentStore) Snapshot(ctx context.Context, _ string, _ int) (keystore.Snapshot, error) {
	<-ctx.Done()
	return keystore.Snapshot{}, ctx.Err()
}

func TestFindEndsWithinASecondThoughPostgresHangs(t *testing.T) {
	synced := func(c *Cache, origin uint64) {
		s := newState()
		s.origin, s.syncedAt = origin, time.Now()
		c.state.Store(s)
	}
	filtered := func(c *Cache, budget pace) {
		synced(c, 0)
		c.unknown.filter.Store(newFilter(0, 0))
		c.unknown.asking = budget
	}
	spent := func() pace { return pace{gap: time.Hour, next: time.Now().Add(time.Hour)} }
	for name, begin := range map[string]func(*Cache){
		"before the first sync":                   func(*Cache) {},
		"a key that is not in memory":             func(c *Cache) { synced(c, 0) },
		"an unknown key that is asked for":        func(c *Cache) { filtered(c, pace{}) },
		"an unknown key that waits for its proof": func(c *Cache) { filtered(c, spent()) },
		"an unknown key while the feed starts over": func(c *Cache) {
			filtered(c, spent())
			time.AfterFunc(800*time.Millisecond, func() { synced(c, 1) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCache(t, silentStore{}, nil)
				check := func(when string) {
					t.Helper()
					begin(c)
					began := time.Now()
					_, err := c.Find(t.Context(), unknownKey())
					if took := time.Since(began); !errors.Is(err, errUnavailable) || took >= time.Second {
						t.Errorf("%s: %v after %v", when, err, took)
					}
				}
				check("alone")
				for range maxLookups {
					go func() { _, _ = c.ask(t.Context(), unknownKey()) }()
				}
				synctest.Wait()
				check("while every lookup is stuck")
				<-time.After(time.Minute) // until all lookups have ended
			})
		})
	}
}

// TestStatementThatPostgresDoesNotAnswerIsGivenUp: before those who wait for a lookup have given up, and before the data that a sync may
// still bring is too old to be of use.
func TestStatementThatPostgresDoesNotAnswerIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, silentStore{}, nil)
		defer c.Close()
		began := time.Now()
		if _, err := c.Find(t.Context(), unknownKey()); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) >= answerWithin {
			t.Errorf("lookup: %v after %v", err, time.Since(began))
		}
		began = time.Now()
		if err := c.sync(t.Context()); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 2*time.Second {
			t.Errorf("sync: %v after %v", err, time.Since(began))
		}
	})
}

func TestPostgresThatWasKilledIsTrustedAgainAfterItsRestart(t *testing.T) {
	server := pgtest.Server(t)
	db := newDatabase(t, server.URL())
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = 20 * time.Millisecond; cfg.MaxStaleness = time.Second })
	run(t, c)
	key := db.create(t)
	want(t, c, key.digest, apikey.Allowed)
	server.Kill()
	eventually.True(t, "nobody can tell", func() bool { return outcome(t, c, key.digest) == apikey.Unavailable })
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "the key works again", func() bool {
		got := outcome(t, c, key.digest)
		if got != apikey.Allowed && got != apikey.Unavailable {
			t.Fatalf("outcome %v for a good key", got)
		}
		return got == apikey.Allowed
	})
}

func TestKeysThatAreFoundOftenNeedNoLookupAfterARestartOfPostgres(t *testing.T) {
	server := pgtest.Server(t)
	db := newDatabase(t, server.URL())
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = 20 * time.Millisecond; cfg.MaxStaleness = 30 * time.Second })
	keys := make([]testKey, lookupBatch+10)
	for i := range keys {
		keys[i] = db.create(t)
	}
	run(t, c)
	var often []testKey
	for _, key := range keys {
		slot := c.slot(&key.digest)
		if slot.Load() != nil { // two keys that share a slot take turns
			continue
		}
		often = append(often, key)
		for finds := 0; slot.Load() == nil; finds++ {
			if finds > 1000*hotShare {
				t.Fatal("a key that is found often gets no slot")
			}
			want(t, c, key.digest, apikey.Allowed)
		}
	}
	revoked := often[0]
	db.revoke(t, revoked)
	var asked uint64
	for range 3 { // a busy machine may be late with the keys once
		origin := c.state.Load().origin
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually.True(t, "the feed starts over", func() bool { return c.state.Load().origin > origin })
		misses := c.Status().Misses
		for _, key := range often[1:] {
			want(t, c, key.digest, apikey.Allowed)
		}
		if asked = c.Status().Misses - misses; asked == 0 {
			break
		}
	}
	if asked > 0 {
		t.Errorf("%d of %d keys had to be asked for", asked, len(often)-1)
	}
	want(t, c, revoked.digest, apikey.Revoked)
}

func TestNotificationBringsARevocationBeforeTheTick(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = time.Hour - time.Second; cfg.MaxStaleness = time.Hour })
	run(t, c)
	key := db.create(t)
	eventually.True(t, "the cache listens", func() bool { return c.Status().Syncs >= 2 })
	want(t, c, key.digest, apikey.Allowed)
	db.revoke(t, key)
	eventually.True(t, "the revocation holds", func() bool { return outcome(t, c, key.digest) == apikey.Revoked })
}

func TestLostListenerIsReplaced(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = time.Hour - time.Second; cfg.MaxStaleness = time.Hour })
	run(t, c)
	eventually.True(t, "the cache listens", func() bool { return c.Status().Syncs >= 2 })
	db.exec(t, `select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and query = 'listen rekall_keys'`)
	eventually.True(t, "the loss is noticed", func() bool { return c.Status().ListenErrors == 1 })
	key := db.create(t)
	want(t, c, key.digest, apikey.Allowed)
	syncs := c.Status().Syncs
	eventually.True(t, "it listens again", func() bool { return c.Status().Syncs > syncs })
	db.revoke(t, key)
	eventually.True(t, "the revocation holds", func() bool { return outcome(t, c, key.digest) == apikey.Revoked })
}

// requestFunc is a request in flight that a cancel function ends.
type requestFunc context.CancelCauseFunc

func (f requestFunc) Cut(cut *Cut) { f(cut) }

// deafStore listens as through PgBouncer's transaction pooling: it succeeds, and hears nothing.
type deafStore struct{ Store }

func (deafStore) Listen(ctx context.Context, wake func()) error {
	wake()
	<-ctx.Done()
	return ctx.Err()
}

func TestRevocationArrivesWithTheTickWhenTheListenerHearsNothing(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, deafStore{db.store}, func(cfg *Config) { cfg.Refresh = 20 * time.Millisecond })
	run(t, c)
	key := db.create(t)
	want(t, c, key.digest, apikey.Allowed)
	db.revoke(t, key)
	eventually.True(t, "the revocation holds", func() bool { return outcome(t, c, key.digest) == apikey.Revoked })
}

// unreadStore fails to read all keys a few times.
type unreadStore struct {
	Store
	failures int
}

func (s *unreadStore) ScanHashes(ctx context.Context, begin func(keystore.Server, int) error, each func([]byte)) error {
	if s.failures > 0 {
		s.failures--
		return errors.New("connection refused")
	}
	return s.Store.ScanHashes(ctx, begin, each)
}

func TestFailureToReadAllKeysIsLoggedOnceWhenItBeginsAndOnceWhenItEnds(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	c := newCache(t, &unreadStore{newDatabase(t, pgtest.URL(t)).store, 2}, func(cfg *Config) {
		cfg.Logger = func() *zap.Logger { return zap.New(core) }
	})
	run(t, c)
	eventually.True(t, "all keys are read", func() bool { return logs.FilterMessage("filter of all keys is built").Len() == 1 })
	if n := logs.FilterMessageSnippet("reading all keys failed").Len(); n != 1 {
		t.Errorf("the log says %d times that it failed, want once", n)
	}
}

// TestFilterIsBuiltOnceThoughTheKeysUsedLastCannotBeRead as while an edge that was taken over has locked the table of last uses.
func TestFilterIsBuiltOnceThoughTheKeysUsedLastCannotBeRead(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	db := newDatabase(t, pgtest.URL(t))
	made := db.made(t, 20)
	db.exec(t, `insert into rekall.last_used (key_id, first_used_at, last_used_at) select id, now(), now() from rekall.api_keys`)
	lock := connect(t, db.url)
	if _, err := lock.Exec(t.Context(), `begin; lock table rekall.last_used in access exclusive mode`); err != nil {
		t.Fatal(err)
	}
	c := newCache(t, db.store, func(cfg *Config) {
		cfg.Warm, cfg.Logger = len(made)/2, func() *zap.Logger { return zap.New(core) }
	})
	run(t, c)
	eventually.True(t, "the filter is built", func() bool { return c.unknown.filter.Load() != nil })
	failed := func() int { return logs.FilterMessageSnippet("reading all keys failed").Len() }
	eventually.True(t, "the log says that not all keys could be read", func() bool { return failed() == 1 })
	if _, err := lock.Exec(t.Context(), `rollback`); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "the cache is warm", func() bool { return logs.FilterMessage("cache is warm").Len() == 1 })
	if n := logs.FilterMessage("filter of all keys is built").Len(); n != 1 {
		t.Errorf("the filter was built %d times, want once", n)
	}
	if failed() != 1 {
		t.Errorf("the log says %d times that not all keys could be read, want once", failed())
	}
}

// lostStore loses its listener at once, again and again, and notes when it was asked for another.
type lostStore struct {
	Store
	asked []time.Time
}

// listens is the attempt at which a lostStore listens before it loses its listener.
const listens = 8

func (s *lostStore) Listen(_ context.Context, wake func()) error {
	if s.asked = append(s.asked, time.Now()); len(s.asked) == listens {
		wake()
	}
	return errors.New("connection refused")
}

// TestListenersOfAFleetDoNotComeBackInStep: all of them lost their connections at the same moment.
func TestListenersOfAFleetDoNotComeBackInStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		var fleet [100]*lostStore
		var listening sync.WaitGroup
		for i := range fleet {
			fleet[i] = new(lostStore)
			c := &Cache{store: fleet[i], cfg: Config{Logger: zap.NewNop}, failures: outage.Failures{Logger: zap.NewNop}, wake: make(chan struct{}, 1)}
			listening.Go(func() { c.listen(ctx) })
		}
		<-time.After(time.Minute)
		stop()
		listening.Wait()
		for attempt := 1; attempt < 8; attempt++ {
			within := map[time.Time]int{}
			for _, s := range fleet {
				if gap := s.asked[attempt].Sub(s.asked[attempt-1]); gap > 2*listenRetryMax {
					t.Errorf("attempt %d came after %v", attempt, gap)
				}
				within[s.asked[attempt].Truncate(5*time.Millisecond)]++
			}
			for _, n := range within {
				if n > len(fleet)/4 { // 5 are expected of the first attempts, and fewer of each later one
					t.Errorf("attempt %d: %d of %d within 5 ms", attempt, n, len(fleet))
				}
			}
		}
		for _, s := range fleet {
			if gap := s.asked[listens-1].Sub(s.asked[listens-2]); gap < listenRetryMax/2 {
				t.Errorf("the eighth attempt came %v after the seventh", gap)
			}
			if gap := s.asked[listens].Sub(s.asked[listens-1]); gap > 2*listenRetryMin {
				t.Errorf("an attempt came %v after a listener that was lost", gap)
			}
		}
	})
}

// TestTickWithoutNewsAsksForNoReport: an edge at rest writes only now and then, however short its refresh.
func TestTickWithoutNewsAsksForNoReport(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	reports := 0
	c := newCache(t, db.store, func(cfg *Config) { cfg.Report = func() { reports++ } })
	tick(t, c)
	for range 20 {
		tick(t, c)
	}
	if reports != 1 {
		t.Errorf("%d reports were asked for by the first sync and 20 ticks, want one", reports)
	}
	db.revoke(t, db.create(t))
	tick(t, c)
	if reports != 2 {
		t.Errorf("%d reports were asked for after a change, want two", reports)
	}
}

// slowLink is one to Postgres that carries so many changes a millisecond. Each reading brings all changes until one has ended.
type slowLink struct {
	instant
	rate, changes int
	hangs         bool // the first reading
}

func (s *slowLink) Snapshot(ctx context.Context, since string, limit int) (keystore.Snapshot, error) {
	snap := keystore.Snapshot{Now: time.Now(), Text: "1:1:"}
	if since == "" {
		return snap, nil
	}
	carried := min(s.changes, limit+1)
	took := time.Duration(carried) * time.Millisecond / time.Duration(s.rate)
	if s.hangs {
		took, s.hangs = time.Hour, false
	}
	select {
	case <-time.After(took):
	case <-ctx.Done():
		return keystore.Snapshot{}, ctx.Err()
	}
	if snap.Overrun = carried > limit; !snap.Overrun {
		for n := range carried {
			snap.Changes = append(snap.Changes, &apikey.Record{Digest: numbered(n), RevokedAt: apikey.TimeOf(snap.Now)})
		}
	}
	s.changes = 0
	return snap, nil
}

func TestMoreChangesThanTheLinkBringsInTimeHoldUpTheFeedForAFewSyncs(t *testing.T) {
	for name, tc := range map[string]struct {
		link     slowLink
		late     int
		restarts uint64
	}{
		"all in time":              {slowLink{rate: 10, changes: 15_000}, 0, 0},
		"too many":                 {slowLink{rate: 10, changes: 40_000}, 1, 1},
		"too many by far":          {slowLink{rate: 1, changes: 40_000}, 3, 1},
		"many after Postgres hung": {slowLink{rate: 10, changes: 10_000, hangs: true}, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCache(t, &tc.link, nil)
				defer c.Close()
				tick(t, c)
				before := c.Status()
				for range tc.late {
					if err := c.sync(t.Context()); err == nil {
						t.Error("a sync ended in time")
					}
				}
				tick(t, c)
				if n := c.Status().Restarts - before.Restarts; n != tc.restarts {
					t.Errorf("the feed starts over %d times, want %d", n, tc.restarts)
				}
				if c.late > 0 {
					t.Error("the next reading is a short one too")
				}
			})
		})
	}
}

// TestChangeIsReportedOnceTheKeysInFlightAreVerified: until then it is not confirmed, and afterwards it must not wait for the next regular
// report.
func TestChangeIsReportedOnceTheKeysInFlightAreVerified(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store, reports := &hookedStore{Store: db.store}, 0
	c := newCache(t, store, func(cfg *Config) { cfg.Report = func() { reports++ } })
	tick(t, c)
	key := db.create(t)
	tick(t, c)
	reports = 0
	c.unverified = []apikey.Digest{key.digest} // as when the feed has started over
	store.unreadable = errors.New("connection refused")
	db.revoke(t, db.create(t))
	if err := c.sync(t.Context()); err == nil || reports != 0 {
		t.Fatalf("error %v, %d reports while a key in flight cannot be verified", err, reports)
	}
	store.unreadable = nil
	for range 2 {
		tick(t, c)
	}
	if reports != 1 {
		t.Errorf("%d reports were asked for once it could, want one", reports)
	}
}

// frozenStore is one that the process asks, and then stands still before it has the answer. Later Postgres refuses.
type frozenStore struct {
	Store
	asked int
}

func (s *frozenStore) Snapshot(ctx context.Context, _ string, _ int) (keystore.Snapshot, error) {
	if s.asked++; s.asked == 1 {
		<-time.After(syncTimeout + 2*leapNoticed)
		return keystore.Snapshot{}, ctx.Err()
	}
	return keystore.Snapshot{}, errors.New("connection refused")
}

func TestPostgresIsNotBlamedForASyncDuringWhichTheProcessStoodStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logged, lines := observer.New(zap.ErrorLevel)
		store := new(frozenStore)
		c := newCache(t, store, func(cfg *Config) { cfg.Logger = func() *zap.Logger { return zap.New(logged) } })
		defer c.Close()
		ctx, stop := context.WithCancel(t.Context())
		var syncing sync.WaitGroup
		syncing.Go(func() { c.syncLoop(ctx) })
		<-time.After(syncTimeout + 3*leapNoticed)
		stop()
		syncing.Wait()
		all := lines.All()
		if len(all) != 1 || all[0].ContextMap()["error"] != "read changes: connection refused" {
			t.Errorf("the log says %v, want one line of the sync that Postgres refused", all)
		}
	})
}

// TestLogTellsOfTheShortestDistrust: requests that were refused in it have no other explanation.
func TestLogTellsOfTheShortestDistrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 5*time.Second + 3*time.Millisecond
		logged, lines := observer.New(zap.InfoLevel)
		c := &Cache{wake: make(chan struct{}, 1), cfg: Config{
			Refresh: time.Second, MaxStaleness: bound, Logger: func() *zap.Logger { return zap.New(logged) },
		}}
		synced := func() {
			s := newState()
			s.syncedAt = time.Now()
			c.state.Store(s)
		}
		synced()
		ctx, stop := context.WithCancel(t.Context())
		var watching sync.WaitGroup
		watching.Go(func() { c.watch(ctx) })
		<-time.After(bound + time.Millisecond)
		c.failures.Keep(errors.New("before")) // the sync that succeeds
		<-time.After(time.Millisecond)
		synced()
		<-time.After(time.Second)
		if n := lines.Len(); n != 2 {
			t.Errorf("%d lines, want one when trust ended and one when it came back: %v", n, lines.All())
		}
		<-time.After(bound)
		synced()
		<-time.After(time.Millisecond)
		c.failures.Keep(errors.New("since"))
		<-time.After(bound)
		stop()
		watching.Wait()
		var why []any
		for _, line := range lines.FilterMessageSnippet("not trusted").All() {
			why = append(why, line.ContextMap()["error"])
		}
		if !slices.Equal(why, []any{nil, nil, "since"}) {
			t.Errorf("trust ended for the reasons %v, want only that of a failure since the last good sync", why)
		}
	})
}

// cutAt notes when and why a request is cut.
type cutAt struct {
	at  time.Time
	why apikey.Outcome
}

func (c *cutAt) Cut(cut *Cut) { c.at, c.why = time.Now(), cut.Outcome }

// TestWatchCutsRequestsInTime: what the sync does meanwhile does not matter.
func TestWatchCutsRequestsInTime(t *testing.T) {
	const bound = 30 * time.Second
	for name, tc := range map[string]struct {
		age       time.Duration // of the key data when the watch begins
		younger   time.Duration // than that is what vouches for the request
		expiresIn time.Duration
		why       apikey.Outcome
		from, to  time.Duration
	}{
		"the key expires":               {0, 0, 10*time.Second + time.Millisecond, apikey.Expired, 10*time.Second + time.Millisecond, 10*time.Second + 250*time.Millisecond},
		"the key data becomes too old":  {0, 0, time.Hour, apikey.Unavailable, bound - 500*time.Millisecond, bound},
		"the key was asked for after":   {0, 100 * time.Millisecond, time.Hour, apikey.Unavailable, bound - 400*time.Millisecond, bound + 100*time.Millisecond},
		"it became too old in one leap": {bound, 0, time.Hour, apikey.Unavailable, leapGrace, 1500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := &Cache{wake: make(chan struct{}, 1), cfg: Config{Refresh: time.Second, MaxStaleness: bound, Logger: zap.NewNop}}
				began, s := time.Now(), newState()
				s.syncedAt, s.readAt, s.gotAt, s.pgNow = began, began, began, began
				c.state.Store(s)
				e := newEntry(apikey.Record{ExpiresAt: apikey.TimeOf(began.Add(tc.expiresIn))}, s.epoch)
				var f Flight
				var request cutAt
				if !c.Track(&f, found(e, s, began, s.syncedAt), &request) {
					t.Fatal("not tracked")
				}
				s.syncedAt, f.vouchedAt = began.Add(-tc.age), began.Add(tc.younger-tc.age)
				ctx, stop := context.WithCancel(t.Context())
				var watching sync.WaitGroup
				watching.Go(func() { c.watch(ctx) })
				<-time.After(2 * bound)
				stop()
				watching.Wait()
				if after := request.at.Sub(began); request.why != tc.why || after < tc.from || after > tc.to {
					t.Errorf("cut as %v after %v, want %v after %v to %v", request.why, after, tc.why, tc.from, tc.to)
				}
			})
		})
	}
}

// TestEachLeapLeavesTimeForOneSync: the second as much as the first.
func TestEachLeapLeavesTimeForOneSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 30 * time.Second
		logged, lines := observer.New(zap.WarnLevel)
		c := &Cache{wake: make(chan struct{}, 1), cfg: Config{
			Refresh: time.Second, MaxStaleness: bound, Logger: func() *zap.Logger { return zap.New(logged) },
		}}
		var request cutAt
		f := Flight{request: &request}
		c.flight.add(&f)
		vouched := func(age time.Duration) {
			s := newState()
			s.syncedAt = time.Now().Add(-age)
			s.readAt, s.gotAt, s.pgNow = s.syncedAt, s.syncedAt, s.syncedAt
			c.flight.each(shardOf(&f.digest), func(f *Flight) { f.vouchedAt = s.syncedAt })
			c.state.Store(s)
		}
		vouched(0)
		ctx, stop := context.WithCancel(t.Context())
		var watching sync.WaitGroup
		watching.Go(func() { c.watch(ctx) })
		for leap := range 2 {
			vouched(bound)
			<-time.After(leapGrace - time.Millisecond)
			if len(c.wake) == 0 {
				t.Errorf("leap %d: no sync is asked for", leap)
			}
			vouched(0)
			<-time.After(leapGrace)
		}
		stop()
		watching.Wait()
		if !request.at.IsZero() {
			t.Errorf("it was cut as %v", request.why)
		}
		last := time.Now()
		if c.logLeap(last, last.Add(time.Second+leapNoticed), time.Second); lines.FilterMessage("process stood still").Len() != 0 {
			t.Error("a look that is a little late is told of")
		}
		if c.logLeap(last, last.Add(time.Second+leapNoticed+1), time.Second); lines.FilterMessage("process stood still").Len() != 1 {
			t.Error("the log does not say that the process stood still")
		}
	})
}

// track puts a request with the key in flight and returns the context that the cache cancels.
func track(t *testing.T, c *Cache, key testKey) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancelCause(context.Background())
	t.Cleanup(func() { cancel(nil) })
	var f Flight
	for {
		found, err := c.Find(t.Context(), key.digest)
		if err != nil {
			t.Fatal(err)
		}
		if c.Track(&f, found, requestFunc(cancel)) {
			t.Cleanup(func() { c.Untrack(&f) })
			return ctx
		}
	}
}

func wantCut(t *testing.T, ctx context.Context, why apikey.Outcome) {
	t.Helper()
	select {
	case <-ctx.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the request was not cut")
	}
	var cut *Cut
	if cause := context.Cause(ctx); !errors.As(cause, &cut) || cut.Outcome != why {
		t.Errorf("cut because %v, want %v", cause, why)
	}
	if !errors.Is(context.Cause(ctx), context.Canceled) {
		t.Error("the cut would be booked as a failure of the upstream")
	}
}

func TestRequestInFlightIsCutWhenItsKeyIsRevoked(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	key, other := db.create(t), db.create(t)
	cutMe, spareMe := track(t, c, key), track(t, c, other)
	db.revoke(t, key)
	tick(t, c)
	if cutMe.Err() == nil {
		t.Error("the revocation counts as applied before the request is cut")
	}
	wantCut(t, cutMe, apikey.Revoked)
	if spareMe.Err() != nil {
		t.Error("the request of another key was cut")
	}
}

func TestRequestInFlightIsCutWhenItsKeyExpires(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = 20 * time.Millisecond })
	run(t, c)
	key := db.create(t)
	ctx := track(t, c, key)
	db.exec(t, "update rekall.api_keys set expires_at = now() + interval '200 ms' where id = $1", key.id)
	wantCut(t, ctx, apikey.Expired)
}

func TestRequestInFlightIsCutWhenNobodyCanTell(t *testing.T) {
	server := pgtest.Server(t)
	db := newDatabase(t, server.URL())
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = 20 * time.Millisecond; cfg.MaxStaleness = 300 * time.Millisecond })
	run(t, c)
	ctx := track(t, c, db.create(t))
	server.Pause()
	wantCut(t, ctx, apikey.Unavailable)
}

func TestRequestInFlightOfAKeyRevokedWhileTheFeedStartsOverIsCut(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	key, other := db.create(t), db.create(t)
	cutMe, spareMe := track(t, c, key), track(t, c, other)
	db.revoke(t, key)
	// The feed stands on a server that has nothing to tell about the past.
	old := *c.state.Load()
	old.server.SystemID++
	old.superseded = make(chan struct{})
	c.state.Store(&old)
	tick(t, c)
	wantCut(t, cutMe, apikey.Revoked)
	if spareMe.Err() != nil {
		t.Error("the request of a good key was cut")
	}
}

// TestRequestThatBeginsWhileTheFeedStartsOverIsVerifiedToo: the state of before, which lets it go, has not heard of the revocation, and the
// new one brings no changes.
func TestRequestThatBeginsWhileTheFeedStartsOverIsVerifiedToo(t *testing.T) {
	db := new(twoStandbys)
	store := &hookedStore{Store: db}
	c := newCache(t, store, nil)
	good := apikey.Record{ID: "key_a", Digest: unknownKey(), Environment: apikey.Production}
	revoked := good
	revoked.RevokedAt = apikey.TimeOf(time.Now())
	db.snap = keystore.Snapshot{Server: keystore.Server{StartedAt: 1}, Now: time.Now(), Text: "5:5:", Xmin: 5, Xmax: 5}
	tick(t, c)
	c.slot(&good.Digest).Store(newEntry(good, c.state.Load().epoch)) // so that it is carried over
	ctx, cancel := context.WithCancelCause(t.Context())
	store.afterLookup = func() {
		store.afterLookup = nil
		found, err := c.Find(t.Context(), good.Digest)
		if err != nil || !c.Track(new(Flight), found, requestFunc(cancel)) {
			t.Error("the request has not begun", err)
		}
	}
	db.snap.Server.StartedAt = 2
	db.found = keystore.Found{Server: db.snap.Server, Now: db.snap.Now, Records: []*apikey.Record{&revoked}}
	tick(t, c)
	if ctx.Err() == nil {
		t.Fatal("it goes on with a key that is revoked")
	}
	wantCut(t, ctx, apikey.Revoked)
}

// TestNothingIsConfirmedBeforeTheRequestsInFlightAreVerified: who revokes a key is told that its requests have ended, too.
func TestNothingIsConfirmedBeforeTheRequestsInFlightAreVerified(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	key := db.create(t)
	ctx := track(t, c, key)
	before := c.Applied()
	db.revoke(t, key)
	store.change = func(snap *keystore.Snapshot) { snap.Xmax = 1 } // transaction ids have gone back
	store.unreadable = errors.New("connection refused")
	if err := c.sync(t.Context()); !errors.Is(err, store.unreadable) {
		t.Fatalf("sync: %v, want %v", err, store.unreadable)
	}
	if after := c.Applied(); after != before {
		t.Errorf("%+v is confirmed while the request goes on", after)
	}
	store.unreadable = nil
	tick(t, c)
	wantCut(t, ctx, apikey.Revoked)
	if after := c.Applied(); after == before {
		t.Error("nothing is confirmed though the request has ended")
	}
}

// TestRequestInFlightThatCannotBeVerifiedIsCutAtTheBoundHoweverOftenTheFeedStartsOver: the state is fresh then, and says nothing of
// requests that were in flight before.
func TestRequestInFlightThatCannotBeVerifiedIsCutAtTheBoundHoweverOftenTheFeedStartsOver(t *testing.T) {
	for _, times := range []int{1, 3} {
		db := newDatabase(t, pgtest.URL(t))
		store := &hookedStore{Store: db.store}
		c := newCache(t, store, nil)
		tick(t, c)
		ctx := track(t, c, db.create(t))
		old := *c.state.Load()
		old.syncedAt = old.syncedAt.Add(2*time.Second - c.cfg.MaxStaleness) // time for the syncs below
		old.superseded = make(chan struct{})
		c.state.Store(&old)
		for shard := range c.flight {
			c.flight.each(shard, func(f *Flight) { f.vouchedAt = old.syncedAt })
		}
		restarted := int64(0)
		store.change = func(snap *keystore.Snapshot) { restarted++; snap.Server.StartedAt += restarted }
		for range times { // rows come from another server than the feed
			if err := c.sync(t.Context()); !errors.Is(err, errOtherServer) {
				t.Fatalf("sync: %v, want errOtherServer", err)
			}
		}
		store.failing = errors.New("down") // and no sync comes as far as the rows any more
		if err := c.sync(t.Context()); !errors.Is(err, store.failing) {
			t.Fatal(err)
		}
		watching, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { c.watch(watching) })
		wantCut(t, ctx, apikey.Unavailable) // long before the state is too old
		stop()
		wg.Wait()
	}
}

// TestRequestInFlightIsVouchedForByTheLastStateThatFollowedItsKey: else a stream of an hour would be cut when Postgres restarts, before its
// row was read again.
func TestRequestInFlightIsVouchedForByTheLastStateThatFollowedItsKey(t *testing.T) {
	var c Cache
	began := time.Now()
	last := began.Add(time.Hour)
	long, late := Flight{vouchedAt: began}, Flight{vouchedAt: last.Add(time.Second)}
	c.flight.add(&long)
	c.flight.add(&late)
	c.flight.doubt(last)
	c.flight.doubt(last.Add(time.Minute)) // of a state that started over, and did not follow it
	if !long.vouchedAt.Equal(last) || !late.vouchedAt.Equal(last.Add(time.Second)) {
		t.Errorf("vouched for at %v and %v, want %v and a second later", long.vouchedAt, late.vouchedAt, last)
	}
}

func TestRequestInFlightThatWasVerifiedAfterTheFeedStartedOverGoesOn(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	ctx := track(t, c, db.create(t))
	store.change = func(snap *keystore.Snapshot) { snap.Xmax = 1 } // transaction ids have gone back
	tick(t, c)
	c.cutEnded(c.state.Load().pgNow, time.Now().Add(c.cfg.MaxStaleness)) // as if watch looked for the first time after the bound
	if ctx.Err() != nil {
		t.Errorf("the request of a good key was cut: %v", context.Cause(ctx))
	}
}

// TestRevocationAfterACrashThatThePostmasterOutlivedIsNotMissed: when a backend is killed, Postgres recovers, and gives transaction ids
// again whose end had not reached the disk. The feed has seen them, and would take the revocation for seen.
func TestRevocationAfterACrashThatThePostmasterOutlivedIsNotMissed(t *testing.T) {
	server := pgtest.Server(t)
	db := newDatabase(t, server.URL())
	db.exec(t, "alter system set wal_writer_delay = '10s'") // else it may bring the end to the disk
	db.exec(t, "select pg_reload_conf()")
	c := newCache(t, db.store, nil)
	for attempt := 1; ; attempt++ {
		key := db.create(t)
		tick(t, c)
		want(t, c, key.digest, apikey.Allowed)
		c.known.Wait()
		ctx := track(t, c, key)
		lost := crashWithLostID(t, server.URL(), func() { tick(t, c) })
		var given uint64
		eventually.True(t, "Postgres has recovered and the key is revoked", func() bool {
			return db.pool.QueryRow(t.Context(),
				"update rekall.api_keys set revoked_at = now() where id = $1 returning change_xid::text::bigint", key.id).Scan(&given) == nil
		})
		eventually.True(t, "a sync", func() bool { return c.sync(t.Context()) == nil })
		want(t, c, key.digest, apikey.Revoked)
		wantCut(t, ctx, apikey.Revoked)
		if given <= lost {
			return
		}
		if attempt == 5 {
			t.Fatalf("transaction id %d was not given again: the test shows nothing", lost)
		}
	}
}

// crashWithLostID kills a backend when seen has returned, right after a transaction ended without a trace on the disk, and
// returns its id.
func crashWithLostID(t *testing.T, url string, seen func()) (id uint64) {
	t.Helper()
	victim, witness := connect(t, url), connect(t, url)
	err := pgx.BeginFunc(t.Context(), victim, func(tx pgx.Tx) error {
		if err := tx.QueryRow(t.Context(), "select pg_current_xact_id()::text::bigint").Scan(&id); err != nil {
			return err
		}
		return errors.New("roll back")
	})
	if id == 0 {
		t.Fatal(err)
	}
	seen()
	if err := syscall.Kill(int(victim.PgConn().PID()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "the postmaster ends all connections", func() bool { return witness.Ping(t.Context()) != nil })
	return id
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func TestKeyThatChangedBetweenFindAndTrackIsFoundAgain(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	key := db.create(t)
	found, err := c.Find(t.Context(), key.digest)
	if err != nil {
		t.Fatal(err)
	}
	db.revoke(t, key)
	tick(t, c)
	var f Flight
	if c.Track(&f, found, requestFunc(func(error) {})) {
		t.Error("a request was let go with a key revoked since it was found")
	}
	if n := c.InFlight(); n != 0 {
		t.Errorf("%d requests in flight, want none", n)
	}
}

// TestKeyThatChangesWhileItsRequestIsPutInFlightIsFoundAgain: the sync that brings the change has looked at the requests in flight just
// before. Whether Track gets as far in time is up to the scheduler, and so it has many tries.
func TestKeyThatChangesWhileItsRequestIsPutInFlightIsFoundAgain(t *testing.T) {
	c := newCache(t, nil, nil)
	for range 1000 {
		s, now := c.state.Load(), time.Now()
		key := found(newEntry(apikey.Record{Digest: unknownKey()}, s.epoch), s, now, now)
		shard := &c.flight[shardOf(&key.Record.Digest)]
		begins, tracked := make(chan struct{}), make(chan bool)
		shard.mu.Lock()
		go func() {
			close(begins)
			tracked <- c.Track(new(Flight), key, requestFunc(func(error) {}))
		}()
		<-begins
		for range 10 {
			runtime.Gosched() // it comes to wait for the shard
		}
		c.state.Store(s.restart(reading{}))
		shard.mu.Unlock()
		if <-tracked {
			t.Fatal("a request is in flight on a state that was past when it was put there")
		}
	}
}

// TestNothingIsInFlightWhenTheCacheHasStopped: nobody would cut it.
func TestNothingIsInFlightWhenTheCacheHasStopped(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	key := db.create(t)
	inFlight := track(t, c, key)
	stop()
	running.Wait()
	wantCut(t, inFlight, apikey.Unavailable)
	found, err := c.Find(t.Context(), key.digest)
	if err != nil {
		t.Fatal(err)
	}
	var f Flight
	if c.Track(&f, found, requestFunc(func(error) {})) {
		t.Error("a request was let go that nobody would cut")
	}
}

// TestRequestIsNotLetGoOnDataThatHasBecomeTooOldSinceItWasFound: the process was stopped in between, or the machine suspended.
func TestRequestIsNotLetGoOnDataThatHasBecomeTooOldSinceItWasFound(t *testing.T) {
	c, found := newTracked(t)
	for name, tc := range map[string]struct {
		vouchedAt time.Time
		want      bool
	}{
		"just found":                {found.vouchedAt, true},
		"the process stood still":   {found.vouchedAt.Add(-c.cfg.MaxStaleness), false},
		"the machine was suspended": {found.vouchedAt.Round(0).Add(-c.cfg.MaxStaleness), false}, // only the wall clock moved
	} {
		found.vouchedAt = tc.vouchedAt
		var f Flight
		if got := c.Track(&f, found, requestFunc(func(error) {})); got != tc.want {
			t.Errorf("%s: let go %v, want %v", name, got, tc.want)
		} else if got {
			c.Untrack(&f)
		}
	}
	if n := c.InFlight(); n != 0 {
		t.Errorf("%d requests in flight, want none", n)
	}
}

func TestFlightsAreCountedAndFoundInEveryOrderOfEnding(t *testing.T) {
	var c Cache
	var fs [5]Flight
	for _, order := range [][]int{{0, 1, 2, 3, 4}, {4, 3, 2, 1, 0}, {2, 0, 4, 1, 3}} {
		for i := range fs {
			fs[i] = Flight{}
			c.flight.add(&fs[i])
		}
		for ended, i := range order {
			c.Untrack(&fs[i])
			if n := c.InFlight(); n != len(fs)-ended-1 {
				t.Fatalf("order %v: %d in flight after %d ended", order, n, ended+1)
			}
			var met []*Flight
			c.flight.each(shardOf(&fs[0].digest), func(f *Flight) { met = append(met, f) })
			for _, left := range order[ended+1:] {
				if !slices.Contains(met, &fs[left]) {
					t.Fatalf("order %v: request %d cannot be cut after %d ended", order, left, ended+1)
				}
			}
		}
	}
}

// BenchmarkFind finds keys that are in memory: one of them only, as a busy client makes it, and many in turn.
func BenchmarkFind(b *testing.B) {
	db := newDatabase(b, pgtest.URL(b))
	const keys = 20_000
	db.makeKeys(b, keys)
	c := newCache(b, db.store, func(cfg *Config) { cfg.Size, cfg.Warm, cfg.MaxStaleness = keys, keys, time.Hour })
	tick(b, c)
	fill(b, c)
	digests := make([]apikey.Digest, 0, keys)
	for n := range keys {
		digests = append(digests, apikey.Hash(strconv.Itoa(n+1)))
	}
	find := func(b *testing.B, d apikey.Digest) {
		if found, err := c.Find(context.Background(), d); err != nil || found.Record == nil {
			b.Fatal(err)
		}
	}
	for _, n := range []int{1, 1000, keys} {
		b.Run(strconv.Itoa(n)+"keys", func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				find(b, digests[i%n])
			}
		})
	}
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for i := rand.IntN(keys); pb.Next(); i++ {
				find(b, digests[i%1000])
			}
		})
	})
}

// newTracked returns a cache and a key that was found in it.
func newTracked(t testing.TB) (*Cache, Found) {
	t.Helper()
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.MaxStaleness = time.Hour })
	found, err := c.Find(context.Background(), db.create(t).digest)
	if err != nil {
		t.Fatal(err)
	}
	return c, found
}

func TestFollowingARequestAllocatesAtMostFourTimes(t *testing.T) {
	c, found := newTracked(t)
	allocations := testing.AllocsPerRun(100, func() {
		_, cancel := context.WithCancelCause(context.Background())
		var f Flight
		c.Track(&f, found, requestFunc(cancel))
		c.Untrack(&f)
		cancel(nil)
	})
	if allocations > 4 {
		t.Errorf("%.0f allocations, want at most 4", allocations)
	}
}

// BenchmarkTrack shows what following a request of HTTP/2 costs it, as the difference between the two: the proxy derives a context of
// its own in any case, and has a context that can be cut keep a list of those derived from it.
func BenchmarkTrack(b *testing.B) {
	c, found := newTracked(b)
	for name, follow := range map[string]bool{"proxy's context": false, "proxy's context and tracking": true} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				server, end := context.WithCancel(context.Background())
				ctx := server
				var f Flight
				if follow {
					cuttable, cancel := context.WithCancelCause(server)
					c.Track(&f, found, requestFunc(cancel))
					ctx = cuttable
				}
				proxy, endProxy := context.WithCancel(ctx)
				_ = proxy.Done()
				endProxy()
				if follow {
					c.Untrack(&f)
				}
				end()
			}
		})
	}
}

// failing is a store whose feed cannot be read on from a moment.
type failing struct {
	Store
	from     func(ctx context.Context, since string) error
	readings int
}

func (s *failing) Snapshot(ctx context.Context, since string, _ int) (keystore.Snapshot, error) {
	s.readings++
	return keystore.Snapshot{Now: time.Now(), Text: "5:6:5", Xmin: 5, Xmax: 6}, s.from(ctx, since)
}

// TestRequestsThatWaitForASyncMakeNoStormOfThoseThatFail: each of them wakes it.
func TestRequestsThatWaitForASyncMakeNoStormOfThoseThatFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &failing{from: func(context.Context, string) error { return errBlind }}
		c := newCache(t, db, nil)
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		go func() {
			for pause(ctx, time.Millisecond, nil) {
				c.Wake()
			}
		}()
		c.syncLoop(ctx)
		if most := int(3*time.Second/lookupRetryMax) + 1; db.readings > most {
			t.Errorf("%d readings in 3 s, want %d at most", db.readings, most)
		}
	})
}

// TestFeedThatCannotBeReadOnInTimeStartsOverOnceNothingIsTrusted, and not while Postgres does not answer at all: what is in memory is good
// then, as soon as it does.
func TestFeedThatCannotBeReadOnInTimeStartsOverOnceNothingIsTrusted(t *testing.T) {
	for name, tc := range map[string]struct{ hangs, over bool }{"reading on": {false, true}, "Postgres": {true, false}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var hung atomic.Bool
				db := &failing{from: func(ctx context.Context, since string) error {
					if hung.Load() && (since != "" || tc.hangs) {
						<-ctx.Done()
						return ctx.Err()
					}
					return nil
				}}
				c := newCache(t, db, nil)
				defer c.Close()
				ctx, cancel := context.WithCancel(t.Context())
				var loop sync.WaitGroup
				loop.Go(func() { c.syncLoop(ctx) })
				synctest.Wait()
				hung.Store(true)
				<-time.After(2 * c.cfg.MaxStaleness)
				if fresh := c.Status().Fresh; fresh != tc.over {
					t.Errorf("keys are trusted: %v, want %v", fresh, tc.over)
				}
				hung.Store(false)
				<-time.After(2 * syncTimeout)
				if restarts := c.Status().Restarts; !c.Status().Fresh || restarts > 1 != tc.over {
					t.Errorf("the feed started over %d times, the first included", restarts)
				}
				cancel()
				loop.Wait()
			})
		})
	}
}

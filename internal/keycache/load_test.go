package keycache

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// made makes n keys and returns their digests, in the order of their numbers.
func (db *database) made(t *testing.T, n int) []apikey.Digest {
	t.Helper()
	db.makeKeys(t, n)
	digests := make([]apikey.Digest, n)
	for i := range digests {
		digests[i] = apikey.Hash(strconv.Itoa(i + 1))
	}
	return digests
}

func TestColdStartReadsEveryKeyInBatchesOverFewConnections(t *testing.T) {
	const (
		keys    = 20_000
		workers = 1000
	)
	db := newDatabase(t, pgtest.URL(t))
	digests := db.made(t, keys)
	c := newCache(t, db.store, func(cfg *Config) { cfg.Size, cfg.NoListen = keys, true })
	run(t, c)
	var wg sync.WaitGroup
	var late atomic.Int64
	for w := range workers {
		wg.Go(func() {
			for n := w; n < keys; n += workers {
				got := outcome(t, c, digests[n])
				for ; got == apikey.Unavailable; got = outcome(t, c, digests[n]) { // on a machine that is busy with other things
					late.Add(1)
				}
				if got != apikey.Allowed {
					t.Errorf("key %d is %v", n, got)
				}
			}
		})
	}
	wg.Wait()
	st := c.Status()
	t.Logf("%d lookups, %d requests came too late", st.Lookups, late.Load())
	if st.Lookups > keys/20 {
		t.Errorf("%d lookups for %d keys", st.Lookups, keys)
	}
	var connections int // the pool keeps those that it has opened
	if err := db.pool.QueryRow(t.Context(), `select count(*) from pg_stat_activity
		where datname = current_database() and application_name = 'rekall-gateway'`).Scan(&connections); err != nil {
		t.Fatal(err)
	}
	if connections == 0 || connections > 4 {
		t.Errorf("%d connections, want at most 4", connections)
	}
}

func TestWarmCacheKnowsEveryKeyWithoutALookup(t *testing.T) {
	const keys = 20_000
	db := newDatabase(t, pgtest.URL(t))
	digests := db.made(t, keys)
	c := newCache(t, db.store, func(cfg *Config) { cfg.Size, cfg.Warm = keys, 2*keys })
	tick(t, c)
	fill(t, c)
	for _, d := range digests {
		want(t, c, d, apikey.Allowed)
	}
	if n := c.Status().Lookups; n != 0 {
		t.Errorf("%d lookups, want none", n)
	}
}

// instant is a store that has every key and answers in 2 ms.
type instant struct{ Store }

func (instant) Lookup(_ context.Context, digests []apikey.Digest) (keystore.Found, error) {
	<-time.After(2 * time.Millisecond)
	found := keystore.Found{Now: time.Now()}
	for _, d := range digests {
		found.Records = append(found.Records, &apikey.Record{Digest: d})
	}
	return found, nil
}

func TestFiftyThousandKeysInTheFirstSecondsTakeUnderFiveHundredStatements(t *testing.T) {
	for _, seconds := range []int{1, 5} {
		synctest.Test(t, func(t *testing.T) {
			const keys = 50_000
			c := newCache(t, instant{}, func(cfg *Config) { cfg.Size = keys })
			defer c.Close()
			var longest atomic.Int64
			var wg sync.WaitGroup
			for n := range keys {
				if n%100 == 0 {
					<-time.After(time.Duration(seconds) * time.Second * 100 / keys)
				}
				wg.Go(func() {
					began := time.Now()
					want(t, c, numbered(n), apikey.Allowed)
					for d := int64(time.Since(began)); d > longest.Load(); {
						longest.Store(d)
					}
				})
			}
			wg.Wait()
			t.Logf("in %d s: %d lookups, the longest wait was %v", seconds, c.Status().Lookups, time.Duration(longest.Load()))
			if n := c.Status().Lookups; n >= 500 {
				t.Errorf("%d lookups for %d keys in %d s", n, keys, seconds)
			}
			if d := time.Duration(longest.Load()); d > 100*time.Millisecond { // on the bubble's clock
				t.Errorf("a request waited %v", d)
			}
		})
	}
}

// One key now and then is read at once: the pace is for many.
func TestLookupsNowAndThenDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, instant{}, nil)
		defer c.Close()
		for n := range 500 {
			<-time.After(10 * time.Millisecond)
			began := time.Now()
			want(t, c, numbered(n), apikey.Allowed)
			if d := time.Since(began); d != 2*time.Millisecond {
				t.Fatalf("key %d waited %v", n, d)
			}
		}
	})
}

// burst is a store from which rows come faster than from any Postgres.
type burst struct {
	Store
	rows int
}

func (b burst) ScanRecent(_ context.Context, _ int, _ func(keystore.Server) error, each func(apikey.Record)) error {
	for n := range b.rows {
		each(apikey.Record{Digest: numbered(n)})
	}
	return nil
}

func TestWarmCacheLosesNoKeyWhenRowsComeFasterThanRistrettoTakesThem(t *testing.T) {
	const keys = 200_000
	c := newCache(t, burst{rows: keys}, func(cfg *Config) { cfg.Size, cfg.Warm = keys, keys })
	if err := c.warm(t.Context(), newState()); err != nil {
		t.Fatal(err)
	}
	c.known.Wait()
	for n := range keys {
		d := numbered(n)
		if _, ok := c.known.Get(place(&d)); !ok {
			t.Fatalf("key %d was lost", n)
		}
	}
}

func TestWarmCacheHoldsTheKeysThatAreTheLikeliestToBeUsed(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	digests := db.made(t, 50)
	db.exec(t, `insert into rekall.last_used (key_id, first_used_at, last_used_at)
		select id, now() - interval '9 days', now() - make_interval(hours => right(id, 2)::int) from rekall.api_keys where right(id, 2)::int > 20`)
	c := newCache(t, db.store, func(cfg *Config) { cfg.Warm = 10 })
	tick(t, c)
	fill(t, c)
	for i, d := range digests {
		n := i + 1
		if _, ok := c.known.Get(place(&d)); ok != (20 < n && n <= 30) {
			t.Errorf("key %d: in memory %v", n, ok)
		}
	}
}

// TestCacheIsWarmedOnceEachTimeThatTheFeedStartsOver: the filter alone may have to be read again.
func TestCacheIsWarmedOnceEachTimeThatTheFeedStartsOver(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	db.made(t, 10)
	logged, lines := observer.New(zap.InfoLevel)
	c := newCache(t, db.store, func(cfg *Config) {
		cfg.Warm, cfg.Logger = 10, func() *zap.Logger { return zap.New(logged) }
	})
	warmed := uint64(0)
	for _, want := range []int{1, 1, 2} {
		if want == 2 {
			old := *c.state.Load()
			old.xmax, old.superseded = old.xmax+1000, make(chan struct{}) // transaction ids have gone back
			c.state.Store(&old)
		}
		tick(t, c)
		if err := c.fill(t.Context(), &warmed); err != nil {
			t.Fatal(err)
		}
		if got := lines.FilterMessage("cache is warm").Len(); got != want {
			t.Errorf("warmed %d times, want %d", got, want)
		}
	}
}

func TestKeyRevokedWhileTheCacheIsWarmedIsRefused(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, func(cfg *Config) { cfg.Warm = 10 })
	key := db.create(t)
	tick(t, c)
	revoked := false
	store.afterRecent = func() { // the good row is on its way
		revoked = true
		db.revoke(t, key)
		tick(t, c)
	}
	fill(t, c)
	if !revoked {
		t.Fatal("the key was not among those used last: the test shows nothing")
	}
	want(t, c, key.digest, apikey.Revoked)
}

func TestLookupThatNobodyWaitsForIsNotMade(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	release := make(chan struct{})
	store.afterLookup = func() { <-release }
	var held, gone sync.WaitGroup
	for range maxLookups {
		running := store.lookups.Load()
		held.Go(func() { load(t, c, unknownKey(), apikey.Unknown) })
		eventually.True(t, "the lookup runs", func() bool { return store.lookups.Load() == running+1 })
	}
	ctx, leave := context.WithCancel(t.Context())
	for range 100 {
		gone.Go(func() {
			if _, err := c.loader.load(ctx, unknownKey(), 0); err == nil {
				t.Error("an answer, though no lookup was made")
			}
		})
	}
	eventually.True(t, "all wait", func() bool {
		c.loader.mu.Lock()
		defer c.loader.mu.Unlock()
		return len(c.loader.waiting) == 100
	})
	leave()
	gone.Wait()
	close(release)
	held.Wait()
	eventually.True(t, "nothing waits", func() bool {
		c.loader.mu.Lock()
		defer c.loader.mu.Unlock()
		return len(c.loader.waiting) == 0 && len(c.loader.calls) == 0 && c.loader.running == 0
	})
	if n := store.lookups.Load(); n != maxLookups {
		t.Errorf("%d lookups, want %d", n, maxLookups)
	}
}

// TestScanAndLookupsTogetherLeaveTheSyncItsConnection: the pool has one more than maxLookups.
func TestScanAndLookupsTogetherLeaveTheSyncItsConnection(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	release := make(chan struct{})
	store := &hookedStore{Store: db.store, afterLookup: func() { <-release }}
	c := newCache(t, store, nil)
	db.create(t) // for the scan
	tick(t, c)
	var held sync.WaitGroup
	store.afterScan = func() {
		for n := range maxLookups {
			held.Go(func() { load(t, c, unknownKey(), apikey.Unknown) })
			eventually.True(t, "the key is asked for, and not together with another", func() bool {
				c.loader.mu.Lock()
				defer c.loader.mu.Unlock()
				return len(c.loader.calls) == n+1 && !c.loader.gathering
			})
		}
		c.loader.mu.Lock()
		defer c.loader.mu.Unlock()
		if c.loader.running != maxLookups-1 {
			t.Errorf("%d lookups run beside a scan, want %d", c.loader.running, maxLookups-1)
		}
	}
	fill(t, c)
	close(release)
	held.Wait()
	if n := store.lookups.Load(); n != maxLookups {
		t.Errorf("%d lookups, want %d: the scan has given its connection back", n, maxLookups)
	}
}

func TestLookupsBeyondTheBoundOfThoseThatWaitAreRefused(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	c.loader.reserve(maxLookups) // a Postgres that hangs
	for n := range maxWaiting {
		if _, err := c.loader.join(numbered(n), 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Find(t.Context(), unknownKey()); !errors.Is(err, errWaiting) {
		t.Errorf("%v, want errWaiting", err)
	}
}

// refusing is a Postgres that refuses connections.
type refusing struct {
	Store
	attempts atomic.Int64
}

func (s *refusing) Lookup(context.Context, []apikey.Digest) (keystore.Found, error) {
	s.attempts.Add(1)
	return keystore.Found{}, errors.New("connection refused")
}

func (s *refusing) Snapshot(context.Context, string, int) (keystore.Snapshot, error) {
	s.attempts.Add(1)
	return keystore.Snapshot{}, errors.New("connection refused")
}

func TestPostgresThatRefusesConnectionsIsAskedRarelyHoweverManyKeysWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(refusing)
		c := newCache(t, store, func(cfg *Config) { cfg.NoListen = true })
		defer c.Close()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { c.syncLoop(ctx) })
		const seconds = 10
		for n := range 1000 * seconds {
			wg.Go(func() {
				c.unknown.want()
				began := time.Now()
				if _, err := c.Find(ctx, numbered(n)); !errors.Is(err, errUnavailable) || time.Since(began) >= time.Second {
					t.Errorf("error %v after %v", err, time.Since(began))
				}
			})
			<-time.After(time.Millisecond)
		}
		cancel()
		wg.Wait()
		<-time.After(lookupRetryMax) // in which the last lookup finds that nobody waits
		if n := store.attempts.Load(); n > seconds*15 || n < seconds*4 {
			t.Errorf("%d attempts to connect in %d s, want at most 15 a second", n, seconds)
		}
	})
}

// slowlyRefusing is one that takes its time to refuse them, as beyond a network.
type slowlyRefusing struct {
	refusing
	running, abreast atomic.Int64 // lookups, and those that were made while another was failing
}

func (s *slowlyRefusing) Lookup(ctx context.Context, digests []apikey.Digest) (keystore.Found, error) {
	alone := s.running.Add(1) == 1
	defer s.running.Add(-1)
	if s.attempts.Load() >= maxLookups && !alone { // the first ones come before any has failed
		s.abreast.Add(1)
	}
	<-time.After(50 * time.Millisecond)
	return s.refusing.Lookup(ctx, digests)
}

func TestWhileLookupsFailThereIsOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(slowlyRefusing)
		c := newCache(t, store, func(cfg *Config) { cfg.NoListen = true })
		defer c.Close()
		var wg sync.WaitGroup
		for n := range 2000 {
			wg.Go(func() { _, _ = c.Find(t.Context(), numbered(n)) })
			<-time.After(time.Millisecond)
		}
		wg.Wait()
		<-time.After(time.Second)
		if n, abreast := store.attempts.Load(), store.abreast.Load(); n < 2*maxLookups || abreast != 0 {
			t.Errorf("%d of %d lookups were made while another was failing", abreast, n)
		}
	})
}

// recovering refuses the first lookups only.
type recovering struct{ slowlyRefusing }

const refusals = 20

func (s *recovering) Lookup(ctx context.Context, digests []apikey.Digest) (keystore.Found, error) {
	if found, err := s.slowlyRefusing.Lookup(ctx, digests); s.attempts.Load() <= refusals {
		return found, err
	}
	return keystore.Found{}, nil
}

func TestOnceLookupsSucceedNoRequestFailsAndThereAreSeveralAtATimeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(recovering)
		c := newCache(t, store, func(cfg *Config) { cfg.NoListen = true })
		defer c.Close()
		for store.attempts.Load() < refusals {
			_, _ = c.Find(t.Context(), unknownKey())
		}
		var wg sync.WaitGroup
		for n := range 2000 {
			wg.Go(func() {
				if _, err := c.Find(t.Context(), numbered(n)); err != nil {
					t.Error(err)
				}
			})
			<-time.After(time.Millisecond)
		}
		wg.Wait()
		<-time.After(time.Second)
		if store.abreast.Load() == 0 {
			t.Error("lookups still wait for one another")
		}
	})
}

func TestLookupThatNobodyWaitsForDoesNotEndTheDelayAfterOneThatFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, new(refusing), func(cfg *Config) { cfg.NoListen = true })
		defer c.Close()
		_, _ = c.Find(t.Context(), numbered(1))
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _, _ = c.Find(ctx, numbered(2)) }()
		synctest.Wait()
		cancel()
		<-time.After(time.Second)
		c.loader.mu.Lock()
		defer c.loader.mu.Unlock()
		if c.loader.running != 0 || c.loader.retry == 0 {
			t.Error("the next keys are read as if Postgres had answered")
		}
	})
}

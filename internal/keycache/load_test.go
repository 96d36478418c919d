package keycache

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// made makes n keys and returns their digests, newest first.
func (db *database) made(t *testing.T, n int) []apikey.Digest {
	t.Helper()
	db.makeKeys(t, n)
	digests := make([]apikey.Digest, 0, n)
	err := db.store.ScanRecent(t.Context(), n, func(keystore.Server) error { return nil }, func(r apikey.Record) { digests = append(digests, r.Digest) })
	if err != nil {
		t.Fatal(err)
	}
	return digests
}

func TestColdStartReadsEveryKeyInFewStatementsOverFewConnections(t *testing.T) {
	const (
		keys    = 20_000
		workers = 1000
	)
	db := newDatabase(t, pgtest.URL(t))
	digests := db.made(t, keys)
	c := newCache(t, db.store, func(cfg *Config) { cfg.Size, cfg.NoListen = keys, true })
	run(t, c)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for n := w; n < keys; n += workers {
				want(t, c, digests[n], apikey.Allowed)
			}
		})
	}
	wg.Wait()
	st := c.Status()
	t.Logf("%d lookups", st.Lookups)
	if st.Lookups > keys/100 {
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
	c, s := newCache(t, db.store, func(cfg *Config) { cfg.Size, cfg.Warm = keys, 2*keys }), new(syncer)
	tick(t, s, c)
	fill(t, c)
	for _, d := range digests {
		want(t, c, d, apikey.Allowed)
	}
	if n := c.Status().Lookups; n != 0 {
		t.Errorf("%d lookups, want none", n)
	}
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
	c, s := newCache(t, db.store, func(cfg *Config) { cfg.Warm = 10 }), new(syncer)
	tick(t, s, c)
	fill(t, c)
	for n, d := range digests {
		if _, ok := c.known.Get(place(&d)); ok != (n < 10) {
			t.Errorf("key %d by age: in memory %v", n, ok)
		}
	}
}

func TestKeyRevokedWhileTheCacheIsWarmedIsRefused(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	key := db.create(t)
	c, s := newCache(t, db.store, func(cfg *Config) { cfg.Warm = 10 }), new(syncer)
	tick(t, s, c)
	stale := c.state.Load() // from before the revocation, as is the row that is kept
	read := make(map[apikey.Digest]apikey.Record)
	if err := db.store.ScanRecent(t.Context(), 1, stale.isOn, func(r apikey.Record) { read[r.Digest] = r }); err != nil {
		t.Fatal(err)
	}
	db.revoke(t, key)
	tick(t, s, c)
	c.keep(newEntry(read[key.digest], stale.epoch))
	c.known.Wait()
	want(t, c, key.digest, apikey.Revoked)
}

func TestLookupThatNobodyWaitsForIsNotMade(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c, s := newCache(t, store, nil), new(syncer)
	tick(t, s, c)
	release := make(chan struct{})
	store.afterLookup = func() { <-release }
	var held, gone sync.WaitGroup
	for range maxLookups {
		running := store.lookups.Load()
		held.Go(func() { want(t, c, unknownKey(), apikey.Unknown) })
		eventually(t, "the lookup runs", func() bool { return store.lookups.Load() == running+1 })
	}
	ctx, leave := context.WithCancel(t.Context())
	for range 100 {
		gone.Go(func() {
			if _, err := c.Find(ctx, unknownKey()); err == nil {
				t.Error("an answer, though no lookup was made")
			}
		})
	}
	eventually(t, "all wait", func() bool {
		c.loader.mu.Lock()
		defer c.loader.mu.Unlock()
		return len(c.loader.waiting) == 100
	})
	leave()
	gone.Wait()
	close(release)
	held.Wait()
	eventually(t, "nothing waits", func() bool {
		c.loader.mu.Lock()
		defer c.loader.mu.Unlock()
		return len(c.loader.waiting) == 0 && len(c.loader.calls) == 0 && c.loader.running == 0
	})
	if n := store.lookups.Load(); n != maxLookups {
		t.Errorf("%d lookups, want %d", n, maxLookups)
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

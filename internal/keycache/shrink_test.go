package keycache

import (
	"context"
	"sync"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
)

// startFilling reads ahead until the function that it returns has waited for the end of that.
func startFilling(t *testing.T, c *Cache) (ended func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.fillLoop(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return running.Wait
}

// TestCacheThatShrinksHoldsNothingAheadOfNeedAndFindsAndCutsAsEver, also while keys are found.
func TestCacheThatShrinksHoldsNothingAheadOfNeedAndFindsAndCutsAsEver(t *testing.T) {
	const keys = 1000
	db := newDatabase(t, pgtest.URL(t))
	held, used := db.create(t), db.create(t)
	all := db.made(t, keys)
	c := newCache(t, db.store, func(cfg *Config) { cfg.Size, cfg.Warm = 2*keys, 2*keys })
	tick(t, c)
	ended := startFilling(t, c)
	eventually.True(t, "all keys are read", func() bool { s := c.Status(); return s.FilterKeys == keys+2 && s.Keys > keys/2 })
	stream := track(t, c, held)
	c.slot(&held.digest).Store(newEntry(apikey.Record{Digest: held.digest}, c.state.Load().epoch)) // as if it was found often

	finding, stop := context.WithCancel(t.Context())
	var finders sync.WaitGroup
	for range 4 {
		finders.Go(func() {
			for finding.Err() == nil {
				want(t, c, used.digest, apikey.Allowed)
			}
		})
	}
	c.Shrink()
	c.Shrink() // as at each poll
	ended()
	stop()
	finders.Wait()
	if s := c.Status(); s.Keys > 1 || s.FilterKeys != 0 {
		t.Errorf("%d keys and a filter of %d are held, want those that are used", s.Keys, s.FilterKeys)
	}
	for i := range c.hot {
		if e := c.hot[i].Load(); e != nil && e.record.Digest != used.digest {
			t.Error("a key is held that was found often")
		}
	}

	created := db.create(t)
	want(t, c, created.digest, apikey.Allowed)
	want(t, c, all[0], apikey.Allowed)
	want(t, c, unknownKey(), apikey.Unknown)
	db.revoke(t, held)
	tick(t, c)
	wantCut(t, stream, apikey.Revoked)
	want(t, c, held.digest, apikey.Revoked)
	want(t, c, created.digest, apikey.Allowed)
}

// TestCacheThatShrinksWhileItReadsAheadKeepsNothingOfThat: a reload may come while all keys are read, or the feed start over later.
func TestCacheThatShrinksWhileItReadsAheadKeepsNothingOfThat(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	db.made(t, 100)
	for what, hook := range map[string]func(*hookedStore, func()){
		"the keys used last": func(s *hookedStore, shrink func()) { s.afterRecent = shrink },
		"all hashes":         func(s *hookedStore, shrink func()) { s.afterScan = shrink },
	} {
		store := &hookedStore{Store: db.store}
		c := newCache(t, store, func(cfg *Config) { cfg.Warm = 100 })
		hook(store, c.Shrink)
		tick(t, c)
		startFilling(t, c)()
		c.known.Wait()
		if s := c.Status(); s.Keys != 0 || s.FilterKeys != 0 {
			t.Errorf("%s: %d keys and a filter of %d are held", what, s.Keys, s.FilterKeys)
		}
	}
}

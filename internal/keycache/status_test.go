package keycache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestDelayOfARevocationIsToldOnceAndOnlyOfKeysInMemory(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	var delays []time.Duration
	c := newCache(t, db.store, func(cfg *Config) {
		cfg.Revoked = func(delay time.Duration) { delays = append(delays, delay) }
	})
	held, other, renamed := db.create(t), db.create(t), db.create(t)
	neighbour := testKey{"key_0000000000000000000000", renamed.digest} // in the same place of memory
	neighbour.digest[31]++
	db.exec(t, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes) values ($1, 'a', 'n', 'production', $2, '{}')`,
		neighbour.id, neighbour.digest[:])
	tick(t, c)
	want(t, c, held.digest, apikey.Allowed)
	want(t, c, renamed.digest, apikey.Allowed)
	c.known.Wait()
	for _, key := range []testKey{held, other} {
		db.revoke(t, key)
	}
	db.exec(t, "update rekall.api_keys set name = 'other' where id = $1", renamed.id)
	tick(t, c)
	if len(delays) != 1 || delays[0] <= 0 {
		t.Fatalf("delays %v, want that of the key in memory", delays)
	}
	for range 2 {
		for _, key := range []testKey{held, other} {
			db.exec(t, "update rekall.api_keys set name = name || '.' where id = $1", key.id)
		}
		tick(t, c)
	}
	if len(delays) != 1 {
		t.Errorf("delays %v after other changes of the revoked keys", delays)
	}
	brought := db.create(t)
	tick(t, c)
	db.revoke(t, brought)
	tick(t, c)
	if len(delays) != 2 {
		t.Errorf("delays %v, want that of the key that the feed brought too", delays)
	}
	db.revoke(t, neighbour)
	tick(t, c)
	if len(delays) != 2 {
		t.Errorf("delays %v, though another key was in the place of the one revoked", delays)
	}
}

// TestDelayOfARevocationEndsWhenTheEdgeTrustedNothing takes Postgres away for ten minutes: keys that were revoked meanwhile did not stay
// allowed until the feed brought their revocation.
func TestDelayOfARevocationEndsWhenTheEdgeTrustedNothing(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	var delays []time.Duration
	c := newCache(t, db.store, func(cfg *Config) {
		cfg.Revoked = func(delay time.Duration) { delays = append(delays, delay.Round(time.Second)) }
	})
	tick(t, c)
	soon, late := db.create(t), db.create(t)
	canary, err := db.store.CreateCanary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tick(t, c) // brings them all
	const outage = 10 * time.Minute
	before := *c.state.Load()
	before.syncedAt, before.readAt, before.pgNow = before.syncedAt.Add(-outage), before.readAt.Add(-outage), before.pgNow.Add(-outage)
	c.state.Store(&before)
	c.canaryAt.Store(0)
	for id, ago := range map[string]string{soon.id: "590s", late.id: "60s", canary: "580s"} { // 10, 540 and 20 s after the last sync
		db.exec(t, "update rekall.api_keys set revoked_at = now() - $2::interval where id = $1", id, ago)
	}
	tick(t, c)
	slices.Sort(delays)
	if !slices.Equal(delays, []time.Duration{0, 10 * time.Second, 20 * time.Second}) {
		t.Errorf("delays %v", delays)
	}
	if got := c.Status(); got.Canary.Round(time.Second) != 10*time.Second || time.Since(got.CanaryAt) > time.Minute {
		t.Errorf("the canary stayed allowed for %s, told at %s", got.Canary, got.CanaryAt)
	}
}

func TestFirstSyncThatHasNotFailedYetIsWaitedForNoLongerThanTheCallerDoes(t *testing.T) {
	c := newCache(t, nil, nil)
	ctx, leave := context.WithCancel(t.Context())
	leave()
	if err := c.AwaitFirstSync(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

// TestCanaryIsMeasuredOnceHoweverOftenTheFeedBringsIt: its row may change once more, long after its revocation.
func TestCanaryIsMeasuredOnceHoweverOftenTheFeedBringsIt(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	other := db.create(t)
	tick(t, c)
	db.revoke(t, other)
	tick(t, c)
	if delay := c.Status().Canary; delay != 0 {
		t.Errorf("a key that is no canary is measured as one: %s", delay)
	}
	canary, err := db.store.CreateCanary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tick(t, c)
	db.exec(t, "update rekall.api_keys set revoked_at = now() where id = $1", canary)
	tick(t, c)
	first := c.Status()
	db.exec(t, "update rekall.api_keys set name = 'other' where id = $1", canary)
	tick(t, c)
	if again := c.Status(); first.Canary == 0 || again.Canary != first.Canary || again.CanaryAt != first.CanaryAt {
		t.Errorf("the canary stayed allowed for %s, and then for %s", first.Canary, again.Canary)
	}
}

// TestEdgeThatNeverSyncedAgesFromItsStartAndSaysThatNoKeyIsTrusted: at age 0, a restart in an outage of Postgres would end the alert.
func TestEdgeThatNeverSyncedAgesFromItsStartAndSaysThatNoKeyIsTrusted(t *testing.T) {
	store, err := keystore.Open("postgres://rekall@127.0.0.1:1/none?connect_timeout=1", keystore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	core, logs := observer.New(zap.InfoLevel)
	c := newCache(t, store, func(cfg *Config) { cfg.Logger = func() *zap.Logger { return zap.New(core) } })
	c.madeAt = c.madeAt.Add(-time.Minute)
	run(t, c)
	eventually.True(t, "the first sync has failed", func() bool { return logs.FilterMessageSnippet("key sync failed").Len() > 0 })
	if line := logs.FilterMessageSnippet("key sync failed").All()[0].Message; !strings.Contains(line, "no key is trusted yet") {
		t.Errorf("the log says %q", line)
	}
	if s := c.Status(); s.Fresh || !s.SyncedAt.IsZero() || s.Age < time.Minute {
		t.Errorf("status %+v", s)
	}
}

func TestStatusCountsWhatMemoryHoldsAndWhatItDoesNotTake(t *testing.T) {
	const size, created = 64, 1024
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Size = size })
	for i := range created {
		c.keep(newEntry(apikey.Record{Digest: apikey.Digest{byte(i), byte(i >> 8), 1}}, 0))
		c.known.Wait()
	}
	s := c.Status()
	if s.Keys != size || s.Size != size {
		t.Errorf("%d keys of %d, want %d", s.Keys, s.Size, size)
	}
	if got := s.Evictions + s.Drops; got != created-size {
		t.Errorf("%d evictions and %d drops, want %d together", s.Evictions, s.Drops, created-size)
	}
	c.Close()
	c.keep(newEntry(apikey.Record{Digest: apikey.Digest{2}}, 0))
	if c.Status().Drops != s.Drops {
		t.Error("a key that came after the end counts as dropped")
	}
}

func TestStatusCountsALookupThatFailsWhileTheFeedStartsOver(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	key := db.create(t)
	tick(t, c)
	found, err := c.Find(t.Context(), key.digest)
	if err != nil {
		t.Fatal(err)
	}
	c.slot(&key.digest).Store(found.entry)
	store.change = func(snap *keystore.Snapshot) { snap.Server.StartedAt++ }
	store.unreadable = errors.New("connection reset by peer")
	tick(t, c)
	if st := c.Status(); st.Lookups != 2 || st.LookupErrors != 1 {
		t.Errorf("%d lookups and %d errors, want 2 and 1", st.Lookups, st.LookupErrors)
	}
	if failure := c.LastFailure(); failure == nil || !errors.Is(failure.Err, store.unreadable) {
		t.Errorf("the last failure is %v", failure)
	}
}

func TestStatusCountsEachConnectionOfTheFeedAndEachStartOver(t *testing.T) {
	server := pgtest.Server(t)
	db := newDatabase(t, server.URL())
	c := newCache(t, db.store, nil)
	run(t, c)
	eventually.True(t, "the feed is followed", func() bool { s := c.Status(); return s.Restarts == 1 && s.Listens == 1 })
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "it is followed again", func() bool { s := c.Status(); return s.Restarts == 2 && s.Listens == 2 && s.ListenErrors > 0 })
}

func TestKeysThatAreFoundOftenTakeNoMoreMemoryThanTheCacheMay(t *testing.T) {
	for size, most := range map[int]int{1: 1, 5: 8, 1000: 1024, 1_000_000: maxHotSlots} {
		c := newCache(t, nil, func(cfg *Config) { cfg.Size = size })
		for n := range 4 * most {
			e := newEntry(apikey.Record{Digest: numbered(n)}, 0)
			c.slot(&e.record.Digest).Store(e)
		}
		held := 0
		for i := range c.hot {
			if c.hot[i].Load() != nil {
				held++
			}
		}
		if held > most || held < most/2 {
			t.Errorf("room for %d keys: %d are kept for being found often, want at most %d", size, held, most)
		}
	}
}

func TestTierThatANewerVersionHasAddedKeepsNoRevocationFromAnEdge(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	core, logs := observer.New(zap.WarnLevel)
	c := newCache(t, db.store, func(cfg *Config) {
		cfg.Warm, cfg.Logger = 10, func() *zap.Logger { return zap.New(core) }
	})
	looked, changed, revoked := db.create(t), db.create(t), db.create(t)
	tick(t, c)
	for _, key := range []testKey{changed, revoked} {
		want(t, c, key.digest, apikey.Allowed)
	}
	db.exec(t, `alter table rekall.tiers drop constraint tiers_name_check;
		insert into rekall.tiers (name) values ('platinum'), ('gold');
		insert into rekall.account_limits (account, tier) values ('test', 'gold')`)
	db.revoke(t, revoked)
	for range 2 {
		tick(t, c)
	}
	want(t, c, revoked.digest, apikey.Revoked)
	for _, key := range []testKey{looked, changed} {
		want(t, c, key.digest, apikey.Allowed)
		f, err := c.Find(t.Context(), key.digest)
		if err != nil || f.Limits() != c.state.Load().tiers[apikey.Free] {
			t.Errorf("it may use %+v, %v, want what the tier free may", f.Limits(), err)
		}
	}
	fill(t, c)
	if lines := logs.All(); len(lines) != 1 || fmt.Sprint(lines[0].ContextMap()["unknown"]) != "[gold platinum]" {
		t.Errorf("the log says %v, want once which tiers are unknown", lines)
	}
	if _, err := db.store.Tiers(t.Context()); err != nil {
		t.Error(err)
	}
}

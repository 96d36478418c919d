package keycache

import (
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

func TestDelayOfARevocationIsToldOnceAndOnlyOfKeysInMemory(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	var delays []time.Duration
	c, s := newCache(t, db.store, func(cfg *Config) {
		cfg.Revoked = func(delay time.Duration) { delays = append(delays, delay) }
	}), new(syncer)
	tick(t, s, c)
	held, other, renamed := db.create(t), db.create(t), db.create(t)
	want(t, c, held.digest, apikey.Allowed)
	want(t, c, renamed.digest, apikey.Allowed)
	c.known.Wait()
	for _, key := range []testKey{held, other} {
		db.revoke(t, key)
	}
	db.exec(t, "update rekall.api_keys set name = 'other' where id = $1", renamed.id)
	tick(t, s, c)
	if len(delays) != 1 || delays[0] <= 0 {
		t.Fatalf("delays %v, want that of the key in memory", delays)
	}
	for range 2 {
		for _, key := range []testKey{held, other} {
			db.exec(t, "update rekall.api_keys set name = name || '.' where id = $1", key.id)
		}
		tick(t, s, c)
	}
	if len(delays) != 1 {
		t.Errorf("delays %v after other changes of the revoked keys", delays)
	}
	brought := db.create(t)
	tick(t, s, c)
	db.revoke(t, brought)
	tick(t, s, c)
	if len(delays) != 2 {
		t.Errorf("delays %v, want that of the key that the feed brought too", delays)
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

func TestStatusCountsEachConnectionOfTheFeedAndEachStartOver(t *testing.T) {
	server := pgtest.Server(t)
	db := newDatabase(t, server.URL())
	c := newCache(t, db.store, nil)
	run(t, c)
	eventually(t, "the feed is followed", func() bool { s := c.Status(); return s.Restarts == 1 && s.Listens == 1 })
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is followed again", func() bool { s := c.Status(); return s.Restarts == 2 && s.Listens == 2 && s.ListenErrors > 0 })
}

package keycache

import (
	"runtime"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// makeKeys makes keys numbered from 1, as a load of keys with random ids and accounts of 10 characters would look.
func (db *database) makeKeys(t testing.TB, n int) {
	t.Helper()
	db.exec(t, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(n::text, 22, '0'), 'acct_' || lpad((n % 1000)::text, 5, '0'), 'n', 'production', sha256(n::text::bytea),
			'{memories:read,memories:write}'
		from generate_series(1, $1::int) n`, n)
}

// heap returns the bytes in use on the heap.
func heap() int64 {
	runtime.GC()
	runtime.GC() // sync.Pool gives up what it holds at the second
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestCachedKeyTakesLittleMemory(t *testing.T) {
	const (
		keys     = 50_000
		entryMax = 150
		totalMax = 217 + entryMax // ristretto takes 217 for a pointer in a cache of a million
		leftMax  = 5              // of each key that a cache held before it shrank
	)
	db := newDatabase(t, pgtest.URL(t))
	db.makeKeys(t, keys)

	before := heap()
	entries := make([]*entry, 0, keys)
	err := db.store.ScanRecent(t.Context(), keys, func(keystore.Server) error { return nil }, func(r apikey.Record) { entries = append(entries, newEntry(r, 1)) })
	if err != nil {
		t.Fatal(err)
	}
	own := (heap()-before)/keys - 8 // which are the slice's
	runtime.KeepAlive(entries)
	t.Logf("%d bytes for an entry", own)
	if own > entryMax {
		t.Errorf("%d bytes for an entry, want at most %d", own, entryMax)
	}
	entries = nil

	before = heap()
	c := newCache(t, db.store, func(cfg *Config) { cfg.Size, cfg.Warm = keys, keys })
	empty := heap()
	tick(t, c)
	fill(t, c)
	total := (heap() - before - int64(c.Status().FilterBytes)) / keys
	t.Logf("%d bytes for a key in the cache, ristretto's own included", total)
	if total > totalMax {
		t.Errorf("%d bytes for a key in the cache, want at most %d", total, totalMax)
	}
	c.empty()
	left := (heap() - empty) / keys
	t.Logf("%d bytes for each key of the cache's size, and %d more once it has shrunk", (empty-before)/keys, left)
	if left > leftMax {
		t.Errorf("%d bytes are left for a key that was in the cache, want at most %d", left, leftMax)
	}
	runtime.KeepAlive(c)
}

//go:build load

package scale

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/garbage"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// maxWarm is how many keys are read into the cache.
const maxWarm = 1_000_000

// costs of everything at one number of keys.
type costs struct {
	keys                             int
	emptyTick, changesTick           time.Duration
	emptyPages                       float64
	lookup, lookup256                time.Duration
	firstUse                         time.Duration
	filter, warm                     time.Duration
	filterBytes, warmed, cachedBytes int
}

func TestScale(t *testing.T) {
	sizes := []int{10_000, 100_000}
	chosen := os.Getenv("REKALL_SCALE")
	if chosen != "" {
		sizes = nil
		for _, text := range strings.Split(chosen, ",") {
			n, err := strconv.Atoi(text)
			if err != nil || n < 2000 {
				t.Fatalf("REKALL_SCALE: %q is not a number of keys, at least 2000", text)
			}
			sizes = append(sizes, n)
		}
		slices.Sort(sizes)
	}
	garbage.Tune() // as in a gateway
	var all []costs
	for _, keys := range sizes {
		t.Run(strconv.Itoa(keys), func(t *testing.T) { all = append(all, measure(t, keys)) }) // and stops its Postgres
	}
	if t.Failed() {
		return
	}
	t.Log("\n" + table(all))
	if chosen == "" {
		return
	}
	if err := os.WriteFile("../scale.md", []byte(table(all)), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("../scale.svg", []byte(plot(all)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// database is a server with so many keys, and the store that an edge would use.
type database struct {
	keys  int
	pool  *pgxpool.Pool
	store *keystore.Store
}

func measure(t *testing.T, keys int) costs {
	t.Helper()
	db := newDatabase(t, keys)
	c := costs{keys: keys}
	c.emptyTick, c.emptyPages = db.emptyTicks(t)
	c.changesTick = db.changesTicks(t)
	c.lookup, c.lookup256 = db.lookups(t, 1), db.lookups(t, 256)
	c.firstUse = db.firstUses(t)
	db.fill(t, &c)
	return c
}

func newDatabase(t *testing.T, keys int) *database {
	t.Helper()
	server := pgtest.ServerWith(t, devenv.PostgresOptions{Settings: map[string]string{
		"shared_buffers": "1GB", "maintenance_work_mem": "1GB", "max_wal_size": "16GB",
	}})
	pgtest.Migrate(t, server.URL())
	pool, err := pgxpool.New(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	db := &database{keys: keys, pool: pool}
	began := time.Now()
	db.makeKeys(t)
	t.Logf("%d keys made in %v", keys, time.Since(began).Round(time.Millisecond))
	if db.store, err = keystore.Open(server.URL(), keystore.Options{PlanOnce: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.store.Close)
	return db
}

// makeKeys does what psql would do with keys.sql.
func (db *database) makeKeys(t *testing.T) {
	t.Helper()
	script, err := os.ReadFile("../keys.sql")
	if err != nil {
		t.Fatal(err)
	}
	sql := strings.ReplaceAll(string(script), ":n)", strconv.Itoa(db.keys)+")")
	conn, err := db.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	// One by one: vacuum refuses to share a transaction, and so a message, with others.
	for statement := range strings.SplitSeq(sql, ";\n") {
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

func digest(n int) apikey.Digest { return apikey.Hash(fmt.Sprintf("rk_%045d", n)) }

func keyID(n int) string { return fmt.Sprintf("key_%022d", n) }

// median runs do several times and returns the time that the middle one took.
func median(t *testing.T, times int, do func() error) time.Duration {
	t.Helper()
	var took []time.Duration
	for range times {
		began := time.Now()
		if err := do(); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[len(took)/2]
}

func (db *database) snapshot(t *testing.T, since string) keystore.Snapshot {
	t.Helper()
	snap, err := db.store.Snapshot(t.Context(), since, keystore.MaxChanges)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func (db *database) emptyTicks(t *testing.T) (took time.Duration, pages float64) {
	const ticks = 500
	watermark := db.snapshot(t, "").Text
	before := db.settledPages(t)
	took = median(t, ticks, func() error {
		_, err := db.store.Snapshot(t.Context(), watermark, keystore.MaxChanges)
		return err
	})
	return took, float64(db.settledPages(t)-before) / ticks
}

// settledPages returns how many pages of the keys' table and its indexes have been read, in Postgres's own count, which lags.
func (db *database) settledPages(t *testing.T) int64 {
	t.Helper()
	const settled = 11 * time.Second // an idle backend tells of its last statements within 10 s
	var pages int64
	since := time.Now()
	for time.Since(since) < settled {
		var now int64
		err := db.pool.QueryRow(t.Context(), `select heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit
			from pg_statio_user_tables where relid = 'rekall.api_keys'::regclass`).Scan(&now)
		if err != nil {
			t.Fatal(err)
		}
		if now != pages {
			pages, since = now, time.Now()
		}
		<-time.After(200 * time.Millisecond)
	}
	return pages
}

func (db *database) changesTicks(t *testing.T) time.Duration {
	const changes = 1000
	var took []time.Duration
	for range 11 {
		watermark := db.snapshot(t, "").Text
		first := 1 + rand.IntN(db.keys-changes)
		if _, err := db.pool.Exec(t.Context(), `update rekall.api_keys set name = name || '.'
			where id in (select 'key_' || lpad(n::text, 22, '0') from generate_series($1::int, $2::int) n)`, first, first+changes-1); err != nil {
			t.Fatal(err)
		}
		took = append(took, median(t, 1, func() error {
			snap, err := db.store.Snapshot(t.Context(), watermark, keystore.MaxChanges)
			if err == nil && len(snap.Changes) != changes {
				err = fmt.Errorf("%d changes, want %d", len(snap.Changes), changes)
			}
			return err
		}))
	}
	slices.Sort(took)
	return took[len(took)/2]
}

func (db *database) lookups(t *testing.T, batch int) time.Duration {
	digests := make([]apikey.Digest, batch)
	return median(t, max(20, 500/batch), func() error {
		for i := range digests {
			digests[i] = digest(1 + rand.IntN(db.keys))
		}
		_, err := db.store.Lookup(t.Context(), digests)
		return err
	})
}

// firstUses flushes one use each of keys that were not used before.
func (db *database) firstUses(t *testing.T) time.Duration {
	const uses = 100
	if _, err := db.pool.Exec(t.Context(), "delete from rekall.last_used where key_id between $1 and $2", keyID(1), keyID(uses)); err != nil {
		t.Fatal(err)
	}
	store, err := keystore.Open(db.pool.Config().ConnString(), keystore.Options{}) // as the edge's own for its counts
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	instance, now, n := apikey.RandomText(22), time.Now(), 0
	return median(t, uses, func() error {
		n++
		used := &keystore.KeyCounts{KeyID: keyID(n), UsedAt: now.UnixMicro()}
		used.Counts[apikey.Allowed] = 1
		return store.FlushUsage(t.Context(), keystore.UsageFlush{
			Instance: instance, Sequence: int64(n), Hour: now.Unix() / 3600, Keys: []*keystore.KeyCounts{used},
		})
	})
}

// fill runs a cache until it is warm and its filter is built.
func (db *database) fill(t *testing.T, c *costs) {
	before := heap()
	c.warmed = min(db.keys, maxWarm)
	logger := &durations{LevelEnabler: zap.InfoLevel, took: make(chan time.Duration, 2)}
	cache, err := keycache.New(db.store, keycache.Config{
		Size: c.warmed, Warm: c.warmed, Refresh: time.Second, MaxStaleness: 30 * time.Second,
		Logger: func() *zap.Logger { return zap.New(logger) },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		cache.Run(ctx)
	}()
	c.warm, c.filter = <-logger.took, <-logger.took
	c.filterBytes = cache.Status().FilterBytes
	c.cachedBytes = int(heap()-before-int64(c.filterBytes)) / c.warmed
	certain := c.warmed
	if c.keys > c.warmed { // last use is known to the hour: of the keys of the last one that is read, any may be left out
		certain -= c.keys/(90*24) + 1
	}
	for n := range certain {
		found, err := cache.Find(ctx, digest(n+1))
		if err != nil || found.Record == nil {
			t.Fatalf("key %d: %v", n+1, err)
		}
	}
	if missing := cache.Status().Misses; missing > 0 {
		t.Errorf("%d of %d keys had to be asked for", missing, certain)
	}
	cancel()
	<-done
	cache.Close()
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// durations is a log that keeps the fields "took".
type durations struct {
	zapcore.LevelEnabler
	took chan time.Duration
}

func (d *durations) With([]zapcore.Field) zapcore.Core { return d }

func (d *durations) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	return checked.AddCore(entry, d)
}

func (d *durations) Write(_ zapcore.Entry, fields []zapcore.Field) error {
	for _, f := range fields {
		if f.Key == "took" {
			d.took <- time.Duration(f.Integer)
		}
	}
	return nil
}

func (d *durations) Sync() error { return nil }

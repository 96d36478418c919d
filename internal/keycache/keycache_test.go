package keycache

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dgraph-io/ristretto/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// database is a migrated database with the means to change keys in it.
type database struct {
	url   string
	store *keystore.Store
	admin *keyadmin.Admin
	pool  *pgxpool.Pool
}

func newDatabase(t testing.TB, url string) *database {
	t.Helper()
	pgtest.Migrate(t, url)
	store, err := keystore.Open(url, keystore.Options{PlanOnce: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	pool, err := pgxpool.New(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return &database{url, store, keyadmin.New(store), pool}
}

type testKey struct {
	id     string
	digest apikey.Digest
}

func (db *database) create(t testing.TB) testKey {
	t.Helper()
	key, _, err := db.admin.Create(context.Background(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "test", Account: "test", Environment: "production", Scopes: []string{"memories:read"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return testKey{key.ID, apikey.Hash(key.Key.Reveal())}
}

func (db *database) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	if _, err := db.pool.Exec(context.Background(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

func (db *database) revoke(t testing.TB, key testKey) {
	t.Helper()
	db.exec(t, "update rekall.api_keys set revoked_at = now() where id = $1", key.id)
}

func newCache(t testing.TB, store Store, change func(*Config)) *Cache {
	t.Helper()
	cfg := Config{Size: 1000, Refresh: time.Second, MaxStaleness: 30 * time.Second, Logger: zap.NewNop}
	if change != nil {
		change(&cfg)
	}
	c, err := New(store, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// run runs the cache's loops until the test ends.
func run(t testing.TB, c *Cache) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

func tick(t testing.TB, c *Cache) {
	t.Helper()
	if err := c.sync(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// fill reads all keys, as the cache does when the feed starts over.
func fill(t testing.TB, c *Cache) {
	t.Helper()
	if err := c.fill(context.Background(), new(uint64)); err != nil {
		t.Fatal(err)
	}
	c.known.Wait()
}

// outcome is what a request with that key would get. It may be called in any goroutine.
func outcome(t testing.TB, c *Cache, d apikey.Digest) apikey.Outcome {
	t.Helper()
	found, err := c.Find(context.Background(), d)
	if err != nil {
		if !errors.Is(err, errUnavailable) {
			t.Errorf("Find: %v, want an error that wraps errUnavailable", err)
			return apikey.OutcomeCount
		}
		return apikey.Unavailable
	}
	return found.Record.Validity(found.Now)
}

// want may be called in any goroutine.
func want(t testing.TB, c *Cache, d apikey.Digest, wanted apikey.Outcome) {
	t.Helper()
	if got := outcome(t, c, d); got != wanted {
		t.Errorf("outcome %v, want %v", got, wanted)
	}
}

func TestKnownKeyIsAskedOfPostgresOnce(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	key := db.create(t)
	want(t, c, key.digest, apikey.Allowed)
	c.known.Wait()
	for range 10 {
		want(t, c, key.digest, apikey.Allowed)
		tick(t, c)
	}
	if n := c.Status().Lookups; n != 1 {
		t.Errorf("%d lookups, want 1", n)
	}
}

func TestRevokedAndExpiredKeysAreRefusedAfterTheTick(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	revoked, expired, renamed := db.create(t), db.create(t), db.create(t)
	for _, key := range []testKey{revoked, expired, renamed} {
		want(t, c, key.digest, apikey.Allowed)
	}
	c.known.Wait()
	db.revoke(t, revoked)
	db.exec(t, "update rekall.api_keys set expires_at = now() where id = $1", expired.id)
	db.exec(t, "update rekall.api_keys set name = 'other' where id = $1", renamed.id)
	tick(t, c)
	want(t, c, revoked.digest, apikey.Revoked)
	want(t, c, expired.digest, apikey.Expired)
	want(t, c, renamed.digest, apikey.Allowed)
}

func TestUnknownKeyIsRememberedForOneTickAndNotLonger(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = time.Hour })
	tick(t, c)
	unknown := apikey.Hash(apikey.Generate(apikey.Production))
	want(t, c, unknown, apikey.Unknown)
	want(t, c, unknown, apikey.Unknown)
	if n := c.Status().Lookups; n != 1 {
		t.Errorf("%d lookups within a tick, want 1", n)
	}
	c.cfg.Refresh = 0 // a tick has passed
	want(t, c, unknown, apikey.Unknown)
	if n := c.Status().Lookups; n != 2 {
		t.Errorf("%d lookups after a tick, want 2", n)
	}
}

func TestKeyCreatedAfterItWasUnknownWorksAfterTheTick(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = time.Hour })
	tick(t, c)
	secret := apikey.Generate(apikey.Production)
	want(t, c, apikey.Hash(secret), apikey.Unknown)
	if err := db.store.Change(t.Context(), func(tx *keystore.Tx) error {
		_, err := tx.Insert(t.Context(), keystore.NewKey{
			ID: "key_" + apikey.RandomText(22), Account: "a", Name: "n", Environment: apikey.Production,
			Digest: apikey.Hash(secret), Hint: apikey.Hint(secret), Scopes: apikey.MemoriesRead,
		})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	tick(t, c)
	want(t, c, apikey.Hash(secret), apikey.Allowed)
}

// load reads a key as a request does for which memory has no answer, but waits however long it takes. It may be called in any goroutine.
func load(t testing.TB, c *Cache, d apikey.Digest, wanted apikey.Outcome) {
	t.Helper()
	a, err := c.loader.load(context.Background(), d, c.state.Load().epoch)
	if err != nil {
		t.Error(err)
	} else if got := a.record().Validity(a.pgNow); got != wanted {
		t.Errorf("outcome %v, want %v", got, wanted)
	}
}

// waiters is how many requests wait for lookups.
func waiters(c *Cache) int {
	c.loader.mu.Lock()
	defer c.loader.mu.Unlock()
	n := 0
	for _, call := range c.loader.calls {
		n += call.waiters
	}
	return n
}

func TestConcurrentMissesOfOneKeyAreOneLookup(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	key := db.create(t)
	release := make(chan struct{})
	store.afterLookup = func() { <-release }
	var wg sync.WaitGroup
	const requests = 50
	for range requests {
		wg.Go(func() { load(t, c, key.digest, apikey.Allowed) })
	}
	eventually.True(t, "all requests wait", func() bool { return waiters(c) == requests })
	close(release)
	wg.Wait()
	if n := store.lookups.Load(); n != 1 {
		t.Errorf("%d lookups for %d requests", n, requests)
	}
}

func TestMissesAreReadInBatches(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	release := make(chan struct{})
	store.afterLookup = func() { <-release }
	var wg sync.WaitGroup
	const requests = 400
	for range requests {
		wg.Go(func() { load(t, c, unknownKey(), apikey.Unknown) })
	}
	eventually.True(t, "all requests wait", func() bool { return waiters(c) == requests })
	close(release)
	wg.Wait()
	if n := store.lookups.Load(); n > requests/20 {
		t.Errorf("%d lookups for %d keys", n, requests)
	}
	if most := store.most.Load(); most != lookupBatch {
		t.Errorf("%d keys in one lookup, want %d at most", most, lookupBatch)
	}
}

// hookedStore is the real store with a place to stand between an answer and its arrival.
type hookedStore struct {
	Store
	lookups     atomic.Int64
	most        atomic.Int64 // keys in one lookup
	afterLookup func()
	change      func(*keystore.Snapshot)
	afterScan   func() // after the first hash of a scan has been read
	afterRecent func() // after the first row of the keys used last has been read
	failing     error  // of each sync
	unreadable  error  // of each lookup
}

func (s *hookedStore) Lookup(ctx context.Context, digests []apikey.Digest) (keystore.Found, error) {
	s.lookups.Add(1)
	for most := s.most.Load(); int64(len(digests)) > most && !s.most.CompareAndSwap(most, int64(len(digests))); {
		most = s.most.Load()
	}
	found, err := s.Store.Lookup(ctx, digests)
	if s.afterLookup != nil {
		s.afterLookup()
	}
	if s.unreadable != nil {
		err = s.unreadable
	}
	return found, err
}

func (s *hookedStore) Snapshot(ctx context.Context, since string, limit int) (keystore.Snapshot, error) {
	snap, err := s.Store.Snapshot(ctx, since, limit)
	if s.change != nil {
		s.change(&snap)
	}
	if s.failing != nil {
		err = s.failing
	}
	return snap, err
}

func (s *hookedStore) ScanHashes(ctx context.Context, begin func(keystore.Server, int) error, each func([]byte)) error {
	return s.Store.ScanHashes(ctx, begin, func(prefix []byte) {
		each(prefix)
		if s.afterScan != nil {
			s.afterScan()
			s.afterScan = nil
		}
	})
}

func (s *hookedStore) ScanRecent(ctx context.Context, n int, begin func(keystore.Server) error, each func(apikey.Record)) error {
	return s.Store.ScanRecent(ctx, n, begin, func(r apikey.Record) {
		if s.afterRecent != nil {
			s.afterRecent()
			s.afterRecent = nil
		}
		each(r)
	})
}

// TestRequestsWhileTheCacheIsClosedAreUnavailable: ristretto, which still has the key, panics when it is asked while it closes.
func TestRequestsWhileTheCacheIsClosedAreUnavailable(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	c.known.Close()
	closing, release := make(chan struct{}), make(chan struct{})
	begun := sync.OnceFunc(func() { close(closing) })
	var err error
	if c.known, err = ristretto.NewCache(&ristretto.Config[uint64, *entry]{
		NumCounters: 1000, MaxCost: 100, BufferItems: 64, IgnoreInternalCost: true,
		OnEvict: func(*ristretto.Item[*entry]) { // Close clears first of all
			begun()
			<-release
		},
	}); err != nil {
		t.Fatal(err)
	}
	tick(t, c)
	first, key := apikey.Digest{}, apikey.Digest{1} // which are cleared in this order
	for _, d := range []apikey.Digest{first, key} {
		c.keep(newEntry(apikey.Record{Digest: d}, c.state.Load().epoch))
	}
	c.known.Wait()
	want(t, c, key, apikey.Allowed)
	var ending, requests sync.WaitGroup
	ending.Go(c.Close)
	<-closing
	db.store.Close()
	for range 8 {
		requests.Go(func() {
			for range 20 {
				if got := outcome(t, c, key); got != apikey.Unavailable || c.Cached(key) {
					t.Errorf("outcome %v, want unavailable", got)
				}
			}
		})
	}
	requests.Wait()
	close(release)
	ending.Wait()
	want(t, c, key, apikey.Unavailable)
}

func TestFillThatRacesARevocationIsNotBelieved(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	key := db.create(t) // before the feed begins, which would bring the row itself
	tick(t, c)
	store.afterLookup = func() { // the good row is on its way when the revocation commits and the feed applies it
		store.afterLookup = nil
		db.revoke(t, key)
		tick(t, c)
	}
	want(t, c, key.digest, apikey.Revoked)
	c.known.Wait()
	want(t, c, key.digest, apikey.Revoked)
}

func TestFeedThatStartsOverTrustsNoEarlierEntry(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*keystore.Snapshot)
		want   apikey.Outcome
	}{
		// Rows come from the server before: they are not carried over, nor found.
		"another cluster":                {func(s *keystore.Snapshot) { s.Server.SystemID++ }, apikey.Unavailable},
		"another database":               {func(s *keystore.Snapshot) { s.Server.Database++ }, apikey.Unavailable},
		"another table":                  {func(s *keystore.Snapshot) { s.Server.Table++ }, apikey.Unavailable},
		"a restarted server":             {func(s *keystore.Snapshot) { s.Server.StartedAt++ }, apikey.Unavailable},
		"a server that has recovered":    {func(s *keystore.Snapshot) { s.Server.RecoveredAt++ }, apikey.Unavailable},
		"transaction ids that went back": {func(s *keystore.Snapshot) { s.Xmax = 1 }, apikey.Revoked},
	} {
		t.Run(name, func(t *testing.T) {
			db := newDatabase(t, pgtest.URL(t))
			store := &hookedStore{Store: db.store}
			c := newCache(t, store, nil)
			key := db.create(t)
			tick(t, c)
			want(t, c, key.digest, apikey.Allowed)
			c.known.Wait()
			before := mustCached(t, c, key.digest)
			c.slot(&key.digest).Store(before)
			db.revoke(t, key)
			store.change = func(snap *keystore.Snapshot) {
				snap.Changes = nil // the new server's feed does not tell of the change
				tc.change(snap)
			}
			tick(t, c)
			if c.state.Load().usable(before) {
				t.Error("an entry from before is still usable")
			}
			want(t, c, key.digest, tc.want)
		})
	}
}

// TestKeysThatWereRestoredInTheSameDatabaseAreReadAnew: pg_restore makes tables and brings rows before the triggers, with old stamps.
func TestKeysThatWereRestoredInTheSameDatabaseAreReadAnew(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	key, later := db.create(t), db.create(t)
	tick(t, c)
	want(t, c, key.digest, apikey.Allowed)
	want(t, c, later.digest, apikey.Allowed)
	c.known.Wait()
	ctx := track(t, c, later)
	db.exec(t, "create table public.dump as select * from rekall.api_keys where id = $1", key.id) // before the later key was made
	db.exec(t, "drop schema rekall cascade")
	pgtest.Migrate(t, db.url)
	db.exec(t, "alter table rekall.api_keys disable trigger user")
	db.exec(t, "insert into rekall.api_keys select * from public.dump")
	eventually.True(t, "a sync", func() bool { return c.sync(t.Context()) == nil }) // plans of the former tables may fail once
	want(t, c, key.digest, apikey.Allowed)
	want(t, c, later.digest, apikey.Unknown)
	wantCut(t, ctx, apikey.Unknown)
}

func mustCached(t *testing.T, c *Cache, d apikey.Digest) *entry {
	t.Helper()
	e, ok := c.known.Get(place(&d))
	if !ok {
		t.Fatal("the key is not cached")
	}
	return e
}

// TestRowFromAnotherServerThanTheFeedsIsNotBelieved: a standby whose backend has crashed shows what was minutes ago, though its
// postmaster is the same, and a pooler may lead to another database.
func TestRowFromAnotherServerThanTheFeedsIsNotBelieved(t *testing.T) {
	for name, change := range map[string]func(*keystore.Server){
		"before a restart": func(s *keystore.Server) { s.StartedAt-- },
		"before a crash":   func(s *keystore.Server) { s.RecoveredAt-- },
		"another database": func(s *keystore.Server) { s.Database++ },
		"another table":    func(s *keystore.Server) { s.Table++ },
		"another cluster":  func(s *keystore.Server) { s.SystemID++ },
	} {
		t.Run(name, func(t *testing.T) {
			db := newDatabase(t, pgtest.URL(t))
			store := &hookedStore{Store: db.store}
			c := newCache(t, store, nil)
			store.change = func(snap *keystore.Snapshot) { change(&snap.Server) }
			tick(t, c)
			key := db.create(t)
			want(t, c, key.digest, apikey.Unavailable)
			store.change = nil
			tick(t, c)
			want(t, c, key.digest, apikey.Allowed)
		})
	}
}

// TestRowFromAnotherServerThanTheFeedsIsNotCarriedOver: keys that are found often are read anew when the feed starts over, and a pooler may
// lead elsewhere.
func TestRowFromAnotherServerThanTheFeedsIsNotCarriedOver(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	key := db.create(t)
	for _, carried := range []bool{true, false} {
		c.slot(&key.digest).Store(newEntry(apikey.Record{Digest: key.digest}, c.state.Load().epoch))
		older := *c.state.Load()
		older.server.StartedAt--
		older.superseded = make(chan struct{})
		c.state.Store(&older)
		if !carried {
			store.change = func(snap *keystore.Snapshot) { snap.Server.SystemID++ }
		}
		tick(t, c)
		if c.Cached(key.digest) != carried {
			t.Errorf("in memory after the feed has started over: %v, want %v", !carried, carried)
		}
	}
}

func TestStandbyIsRefused(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store, change: func(s *keystore.Snapshot) { s.Server.InRecovery = true }}
	c := newCache(t, store, nil)
	if err := c.sync(t.Context()); !errors.Is(err, errStandby) {
		t.Errorf("sync with a standby: %v, want errStandby", err)
	}
	if c.Status().Fresh {
		t.Error("fresh after a sync with a standby")
	}
}

// othersToo adds changes of n other keys to each reading of the feed.
func othersToo(n int) func(*keystore.Snapshot) {
	changed := 0
	return func(snap *keystore.Snapshot) {
		for range n {
			changed++
			snap.Changes = append(snap.Changes, &apikey.Record{Digest: numbered(changed)})
		}
	}
}

func TestManyChangesAtOnceAreAllHeededAndCostNoOtherKeyALookup(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	key, quiet := db.create(t), db.create(t)
	want(t, c, key.digest, apikey.Allowed)
	want(t, c, quiet.digest, apikey.Allowed)
	c.known.Wait()
	db.revoke(t, key)
	db.exec(t, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(n::text, 22, '0'), 'a', 'n', 'production', sha256(n::text::bytea), '{}'
		from generate_series(1, $1::int) n`, maxChanges+1)
	tick(t, c)
	lookups := c.Status().Lookups
	for range 2 {
		want(t, c, key.digest, apikey.Revoked)
		want(t, c, quiet.digest, apikey.Allowed)
		db.create(t)
		tick(t, c)
	}
	if n := c.Status().Lookups - lookups; n != 0 {
		t.Errorf("%d lookups of keys that were in memory", n)
	}
}

// TestRevokedKeyStaysRevokedWhenALargeEpochThatRevokedItIsForgotten: its creation, in a small one, is remembered for longer.
func TestRevokedKeyStaysRevokedWhenALargeEpochThatRevokedItIsForgotten(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	key := db.create(t)
	tick(t, c)
	want(t, c, key.digest, apikey.Allowed)
	store.change = othersToo(maxChanges + 1)
	db.revoke(t, key)
	tick(t, c)
	want(t, c, key.digest, apikey.Revoked)
	c.known.Clear() // it drops what it likes
	for range 3 {
		tick(t, c)
		want(t, c, key.digest, apikey.Revoked)
	}
}

// TestStateRemembersEachChangeAfterItsHorizon makes large and small epochs by chance, and compares with a plain record of all changes.
func TestStateRemembersEachChangeAfterItsHorizon(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	last := make(map[apikey.Digest]uint64) // epoch of the latest change
	s := newState().restart(reading{})
	forgotten, large := 0, 0
	for range 60 {
		n := random.IntN(maxChanges / 2)
		if random.IntN(6) == 0 {
			n += maxChanges
			large++
		}
		before := s
		changes := make([]*apikey.Record, 0, n)
		for _, i := range random.Perm(3 * maxChanges)[:n] {
			changes = append(changes, &apikey.Record{Digest: numbered(i)})
			last[numbered(i)] = s.epoch + 1
		}
		s, _ = s.next(reading{Snapshot: keystore.Snapshot{Changes: changes}})
		if s.horizon < before.horizon {
			t.Fatalf("the horizon fell from %d to %d", before.horizon, s.horizon)
		}
		for d, epoch := range last {
			ch, ok := s.changed(&d)
			switch {
			case epoch > s.horizon && (!ok || ch.epoch != epoch || ch.entry.record.Digest != d):
				t.Fatalf("epoch %d, horizon %d: a change of epoch %d is remembered as %v %v", s.epoch, s.horizon, epoch, ok, ch.epoch)
			case epoch <= s.horizon && ok:
				t.Fatalf("epoch %d, horizon %d: the latest change is of epoch %d, and that of %d is remembered", s.epoch, s.horizon, epoch, ch.epoch)
			case epoch <= s.horizon:
				forgotten++
			}
			for _, asOf := range []uint64{s.horizon, epoch - 1, epoch, s.epoch} {
				if got, want := s.unchanged(&d, asOf), asOf >= s.horizon && asOf >= epoch; got != want {
					t.Fatalf("epoch %d, horizon %d: read as of %d, changed in %d: unchanged %v", s.epoch, s.horizon, asOf, epoch, got)
				}
			}
		}
		if kept := len(s.changes) + len(s.large.rows); len(s.changes) > maxChanges || kept > maxChanges+3*maxChanges/2 {
			t.Fatalf("%d and %d changes are kept", len(s.changes), len(s.large.rows))
		}
	}
	if forgotten == 0 || large < 3 {
		t.Fatalf("%d forgotten, %d large epochs: the test shows nothing", forgotten, large)
	}
}

func TestEntryInUseNeverFallsBehindTheHorizon(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	tick(t, c)
	key := db.create(t)
	want(t, c, key.digest, apikey.Allowed)
	c.known.Wait()
	read := c.state.Load().epoch
	store.change = othersToo(maxChanges / 2)
	for range 4 {
		tick(t, c)
		want(t, c, key.digest, apikey.Allowed)
	}
	if horizon := c.state.Load().horizon; horizon <= read {
		t.Fatalf("the horizon is %d, and the key was read in epoch %d: the test shows nothing", horizon, read)
	}
	if n := c.Status().Lookups; n != 1 {
		t.Errorf("%d lookups of a key that is in use, want 1", n)
	}
}

func TestRowFromBeforeARevocationIsNotBelievedOnceTheRevocationIsForgotten(t *testing.T) {
	record := &apikey.Record{Digest: unknownKey()}
	revoked := *record
	revoked.RevokedAt = apikey.TimeOf(time.Now())
	s := newState().restart(reading{})
	read := newEntry(*record, s.epoch)
	s, _ = s.next(reading{Snapshot: keystore.Snapshot{Changes: []*apikey.Record{&revoked}}})
	others := make([]*apikey.Record, maxChanges)
	for n := range others {
		others[n] = &apikey.Record{Digest: numbered(n)}
	}
	s, _ = s.next(reading{Snapshot: keystore.Snapshot{Changes: others}})
	if _, ok := s.changes[record.Digest]; ok || len(s.changes) != maxChanges {
		t.Fatalf("the revocation is among %d changes: the test shows nothing", len(s.changes))
	}
	if s.usable(read) {
		t.Error("the row from before the revocation is believed")
	}
}

func TestRowsThatALongTransactionMakesTheFeedRepeatAreAppliedOnce(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	tx, err := db.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "select pg_current_xact_id()"); err != nil {
		t.Fatal(err)
	}
	db.create(t)
	tick(t, c)
	first := len(c.state.Load().log)
	tick(t, c)
	tick(t, c)
	if again := len(c.state.Load().log); again != first || first != 1 {
		t.Errorf("epochs with changes: %d, then %d; want 1", first, again)
	}
}

// slot holds a key that is replaced when it has ended.
type slot struct {
	mu  sync.Mutex
	key testKey
}

func (s *slot) get() apikey.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.key.digest
}

// TestInterleavingIsNeverWrong creates, revokes, expires, finds, evicts and syncs at random, and builds filters: once the
// feed has applied a revocation, no Find that begins afterwards may allow the key, and none that begins after a key was
// created may call it unknown.
func TestInterleavingIsNeverWrong(t *testing.T) {
	duration := 5 * time.Second
	if s := os.Getenv("REKALL_STRESS"); s != "" {
		var err error
		if duration, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Size = 40; cfg.Refresh = 20 * time.Millisecond })
	c.loader.turns.gap = 0                // more fills, more races
	c.unknown.asking = pace{gap: 1 << 62} // and proofs in place of them
	tick(t, c)

	const universe = 80
	var recent [32]atomic.Pointer[apikey.Digest] // keys that ended a moment ago
	var slots [universe]slot
	var applied sync.Map // digest of keys whose end the feed has applied
	for i := range slots {
		slots[i].key = db.create(t)
	}
	ctx, cancel := context.WithTimeout(t.Context(), duration)
	defer cancel()
	var finds, ends, filters, wrong, unknown atomic.Int64
	var wg sync.WaitGroup
	var pendingMu sync.Mutex
	var pending []apikey.Digest

	for range 2 { // ends keys and makes others
		wg.Go(func() {
			for ctx.Err() == nil {
				sl := &slots[rand.IntN(universe)]
				sl.mu.Lock()
				key := sl.key
				sl.mu.Unlock()
				// A fill that races the end of its key is the case that naive caches get wrong for good.
				racing, raced := context.WithCancel(ctx)
				wg.Go(func() {
					for racing.Err() == nil {
						c.known.Del(place(&key.digest))
						outcome(t, c, key.digest)
					}
				})
				if rand.IntN(2) == 0 {
					db.exec(t, "update rekall.api_keys set revoked_at = now() where id = $1 and revoked_at is null", key.id)
				} else {
					db.exec(t, "update rekall.api_keys set expires_at = now() where id = $1", key.id)
				}
				ends.Add(1)
				pendingMu.Lock()
				pending = append(pending, key.digest)
				pendingMu.Unlock()
				recent[rand.IntN(len(recent))].Store(&key.digest)
				raced()
				<-time.After(time.Duration(rand.IntN(3)) * time.Millisecond)
				fresh := db.create(t)
				if outcome(t, c, fresh.digest) == apikey.Unknown {
					unknown.Add(1)
				}
				sl.mu.Lock()
				sl.key = fresh
				sl.mu.Unlock()
			}
		})
	}
	wg.Go(func() { // syncs
		for ctx.Err() == nil {
			pendingMu.Lock()
			committed := pending
			pending = nil
			pendingMu.Unlock()
			switch err := c.sync(context.Background()); {
			case errors.Is(err, context.DeadlineExceeded): // the machine is busy, and the next one applies them
				pendingMu.Lock()
				pending = append(committed, pending...)
				pendingMu.Unlock()
				continue
			case err != nil:
				t.Error(err)
				return
			}
			for _, d := range committed {
				applied.Store(d, true)
			}
		}
	})
	wg.Go(func() { // builds filters
		for ctx.Err() == nil {
			if err := c.buildFilter(context.Background(), c.state.Load()); err != nil {
				t.Error(err)
				return
			}
			filters.Add(1)
			if rand.IntN(2) == 0 {
				c.unknown.filter.Store(nil)
			}
			<-time.After(5 * time.Millisecond)
		}
	})
	wg.Go(func() { // presents unknown keys
		for ctx.Err() == nil {
			got := outcome(t, c, apikey.Hash(apikey.Generate(apikey.Production)))
			if got != apikey.Unknown && got != apikey.Unavailable { // the latter of a busy machine, or when the syncs have ended
				t.Errorf("an unknown key is %v", got)
			}
		}
	})
	wg.Go(func() { // evicts
		for ctx.Err() == nil {
			d := slots[rand.IntN(universe)].get()
			c.known.Del(place(&d))
			<-time.After(100 * time.Microsecond)
		}
	})
	for range 6 { // finds
		wg.Go(func() {
			for ctx.Err() == nil {
				d := slots[rand.IntN(universe)].get()
				if p := recent[rand.IntN(len(recent))].Load(); p != nil && rand.IntN(2) == 0 {
					d = *p
				}
				_, over := applied.Load(d)
				switch got := outcome(t, c, d); {
				case over && got == apikey.Allowed:
					wrong.Add(1)
				case got == apikey.Unknown:
					unknown.Add(1)
				}
				finds.Add(1)
			}
		})
	}
	wg.Wait()
	st := c.Status()
	t.Logf("%d finds, %d ends, %d syncs, %d lookups, %d filters, %d proofs", finds.Load(), ends.Load(), st.Syncs, st.Lookups, filters.Load(), st.Proofs)
	if unknown.Load() > 0 {
		t.Errorf("%d finds called a key unknown that was created before", unknown.Load())
	}
	if wrong.Load() > 0 {
		t.Errorf("%d finds allowed a key whose end the feed had applied", wrong.Load())
	}
	if st.Proofs == 0 {
		t.Error("no key was proved absent: the test showed little")
	}
	if ends.Load() < 10 {
		t.Errorf("only %d keys ended: the test showed little", ends.Load())
	}
}

func TestHotEntryIsBelievedNoMoreThanAnyOther(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	key, other := db.create(t), db.create(t)
	tick(t, c)
	found, err := c.Find(t.Context(), key.digest)
	if err != nil {
		t.Fatal(err)
	}
	stale := found.entry
	c.known.Wait()
	hot := func(d apikey.Digest) { c.slot(&d).Store(stale) }
	hot(key.digest)
	want(t, c, key.digest, apikey.Allowed)
	if n := c.Status().Lookups; n != 1 {
		t.Errorf("%d lookups, want 1", n)
	}
	twin := key.digest // of no key, and at the same place here and in ristretto
	twin[len(twin)-1] ^= 1
	if place(&twin) != place(&key.digest) {
		t.Fatal("the twin has another place")
	}
	want(t, c, twin, apikey.Unknown)
	db.revoke(t, key)
	db.revoke(t, other)
	tick(t, c)
	hot(key.digest)
	hot(other.digest)
	for range 10 * hotShare {
		want(t, c, key.digest, apikey.Revoked)
		want(t, c, other.digest, apikey.Revoked)
	}
}

// TestKeyThatIsFoundOftenNeedsNoLookupWhenRistrettoGivesItUp: few of its finds are seen by ristretto, which keeps what it sees.
func TestKeyThatIsFoundOftenNeedsNoLookupWhenRistrettoGivesItUp(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	key := db.create(t)
	tick(t, c)
	found, err := c.Find(t.Context(), key.digest)
	if err != nil {
		t.Fatal(err)
	}
	c.known.Wait()
	c.slot(&key.digest).Store(found.entry)
	c.known.Del(place(&key.digest))
	for range 10 * hotShare {
		want(t, c, key.digest, apikey.Allowed)
	}
	if n := c.Status().Lookups; n != 1 {
		t.Errorf("%d lookups, want 1", n)
	}
	c.known.Wait()
	if e, ok := c.known.Get(place(&key.digest)); !ok || e != found.entry {
		t.Error("ristretto has not got it back")
	}
}

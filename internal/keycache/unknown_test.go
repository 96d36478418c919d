package keycache

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

func unknownKey() apikey.Digest { return apikey.Hash(apikey.Generate(apikey.Production)) }

// newFiltered returns a cache with a filter, whose budget of lookups for unknown keys is used up.
func newFiltered(t *testing.T, store Store) *Cache {
	t.Helper()
	c := newCache(t, store, nil)
	tick(t, c)
	fill(t, c)
	c.unknown.asking = pace{gap: time.Hour, next: time.Now().Add(time.Hour)}
	return c
}

// find begins to find a key that has to wait, and returns where its outcome will arrive.
func find(t *testing.T, c *Cache, d apikey.Digest) <-chan apikey.Outcome {
	t.Helper()
	before := c.unknown.proving.Load()
	result := make(chan apikey.Outcome, 1)
	go func() { result <- outcome(t, c, d) }()
	eventually.True(t, "the request waits for proof", func() bool { return c.unknown.proving.Load() == before+1 })
	return result
}

// floodStatements is the most statements that unknown keys may cause in that time: 50 a second.
func floodStatements(elapsed time.Duration) uint64 { return 50 + uint64(50*elapsed.Seconds()) }

func TestFloodOfUnknownKeysCausesFewStatementsAndHarmsNoKnownKey(t *testing.T) {
	const (
		workers = 200
		each    = 40
		cold    = 500
	)
	db := newDatabase(t, pgtest.URL(t))
	db.makeKeys(t, cold)
	warm := db.create(t)
	var coldKeys []apikey.Digest
	if err := db.store.ScanRecent(t.Context(), cold+1, func(keystore.Server) error { return nil }, func(r apikey.Record) {
		if r.ID != warm.id {
			coldKeys = append(coldKeys, r.Digest)
		}
	}); err != nil {
		t.Fatal(err)
	}
	c := newCache(t, db.store, func(cfg *Config) { cfg.NoListen = true })
	run(t, c)
	eventually.True(t, "the filter is built", func() bool { return c.Status().FilterKeys == cold+1 })
	want(t, c, warm.digest, apikey.Allowed)
	goroutines := runtime.NumGoroutine()
	before, began := c.Status(), time.Now()

	ctx, stop := context.WithCancel(context.Background())
	var flood, known sync.WaitGroup
	var unavailable atomic.Int64
	for range workers {
		flood.Go(func() {
			for n := 0; n < each || ctx.Err() == nil; n++ { // at least so many, and until the known keys are done
				switch got := outcome(t, c, unknownKey()); got {
				case apikey.Unknown:
				case apikey.Unavailable:
					unavailable.Add(1)
				default:
					t.Errorf("an unknown key is %v", got)
				}
			}
		})
	}
	known.Go(func() {
		for range 10_000 {
			want(t, c, warm.digest, apikey.Allowed)
		}
	})
	works := func(what string, d apikey.Digest) {
		got := outcome(t, c, d)
		for ; got == apikey.Unavailable; got = outcome(t, c, d) { // on a machine that is busy with other things
		}
		if got != apikey.Allowed {
			t.Errorf("a %s key is %v", what, got)
		}
	}
	known.Go(func() {
		for _, d := range coldKeys {
			works("cold", d)
		}
	})
	known.Go(func() {
		for range 20 {
			works("new", db.create(t).digest)
		}
	})
	known.Wait()
	stop()
	flood.Wait()

	after, elapsed := c.Status(), time.Since(began)
	t.Logf("%v, statements %d + %d, proofs %d, unavailable %d, refused %d", elapsed, after.Lookups-before.Lookups, after.Syncs-before.Syncs,
		after.Proofs-before.Proofs, unavailable.Load(), after.Refused)
	// The lookups of cold keys, one after the other, are their own.
	if n := after.Lookups - before.Lookups + after.Syncs - before.Syncs - cold; n > floodStatements(elapsed) {
		t.Errorf("%d statements for unknown keys in %v", n, elapsed)
	}
	if proofs := after.Proofs - before.Proofs; proofs < workers*each*9/10 {
		t.Errorf("only %d keys were proved absent by the feed", proofs)
	}
	eventually.True(t, "no goroutine is left over", func() bool { return runtime.NumGoroutine() <= goroutines+2 })
}

func TestKeyThatTheFilterLacksIsUnknownOnlyAfterASyncThatBeganLater(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newFiltered(t, store)
	var created testKey
	var absent, present <-chan apikey.Outcome
	store.change = func(*keystore.Snapshot) { // the sync has read the feed, and nothing is published yet
		store.change = nil
		created = db.create(t)
		present, absent = find(t, c, created.digest), find(t, c, unknownKey())
	}
	tick(t, c)
	runtime.Gosched()
	if len(present)+len(absent) > 0 {
		t.Error("a sync that began before the request proved something to it")
	}
	tick(t, c)
	if got := <-present; got != apikey.Allowed {
		t.Errorf("the key just created is %v", got)
	}
	if got := <-absent; got != apikey.Unknown {
		t.Errorf("the key that does not exist is %v", got)
	}
	if n := store.lookups.Load(); n != 0 {
		t.Errorf("%d lookups, want none", n)
	}
}

func TestKeyThatTheFilterLacksIsNotUnknownWhileNobodyCanTell(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newFiltered(t, store)
	store.failing = errors.New("down")
	got := find(t, c, unknownKey())
	for range 3 {
		if err := c.sync(t.Context()); err == nil {
			t.Fatal("the sync did not fail")
		}
	}
	if got := <-got; got != apikey.Unavailable {
		t.Errorf("outcome %v, want unavailable", got)
	}
}

func TestRequestsForWhichThereIsNoRoomToWaitAreRefusedAtOnce(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newFiltered(t, db.store)
	c.unknown.proving.Store(maxProving)
	want(t, c, unknownKey(), apikey.Unavailable)
	if st := c.Status(); st.Refused != 1 || c.unknown.proving.Load() != maxProving {
		t.Errorf("%d refused, %d wait", st.Refused, c.unknown.proving.Load())
	}
	c.unknown.proving.Store(0)
	got := find(t, c, unknownKey())
	tick(t, c)
	if got := <-got; got != apikey.Unknown {
		t.Errorf("outcome %v, want unknown", got)
	}
}

func TestUnknownKeyIsAskedForAtOnceWhileThereAreFew(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, nil)
	tick(t, c)
	fill(t, c)
	// A row that the feed does not tell of, as a restore with triggers switched off leaves.
	secret := apikey.Generate(apikey.Production)
	digest := apikey.Hash(secret)
	db.exec(t, "alter table rekall.api_keys disable trigger stamp")
	db.exec(t, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, change_xid)
		values ('key_0000000000000000000000', 'a', 'n', 'production', $1, '{}', '3')`, digest[:])
	want(t, c, digest, apikey.Allowed)
	want(t, c, unknownKey(), apikey.Unknown)
	if st := c.Status(); st.Lookups != 2 || st.Proofs != 0 {
		t.Errorf("%d lookups, %d proofs", st.Lookups, st.Proofs)
	}
	if !c.unknown.filter.Load().has(&digest) {
		t.Error("the filter did not learn of a row that was found")
	}
}

func TestKeyCreatedWhileTheFilterIsBuiltIsInIt(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newCache(t, store, nil)
	db.create(t)
	tick(t, c)
	var created testKey
	store.afterScan = func() { // the scan does not see it
		created = db.create(t)
		tick(t, c)
	}
	fill(t, c)
	if f := c.unknown.filter.Load(); !f.has(&created.digest) || f.keys.Load() != 2 {
		t.Errorf("has %v, %d keys", f.has(&created.digest), f.keys.Load())
	}
}

func TestKeyCreatedWhileTheFilterIsBuiltAnewIsInTheOneInUseToo(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store}
	c := newFiltered(t, store)
	db.create(t) // for the scan
	tick(t, c)
	inUse, created := c.unknown.filter.Load(), testKey{}
	store.afterScan = func() {
		created = db.create(t)
		tick(t, c)
	}
	if err := c.buildFilter(t.Context(), c.state.Load()); err != nil {
		t.Fatal(err)
	}
	if c.unknown.filter.Load() == inUse {
		t.Fatal("there is no other: the test shows nothing")
	}
	if !inUse.has(&created.digest) {
		t.Error("until the other was built, a key that exists passed for one that does not")
	}
}

// TestNoStateBringsAKeyThatTheFilterHasNotLearned: else the key would pass for one that does not exist, if the state brings too many to
// tell of them.
func TestNoStateBringsAKeyThatTheFilterHasNotLearned(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newFiltered(t, db.store)
	db.create(t)
	before := c.state.Load()
	c.unknown.filter.Store(new(filter)) // which has no room, and panics
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the filter learned of the key: the test shows nothing")
			}
		}()
		tick(t, c)
	}()
	if c.state.Load() != before {
		t.Error("the state that brings the key is published")
	}
}

func TestFilterOfAnEarlierServerIsNotBelieved(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newFiltered(t, db.store)
	key := db.create(t)
	old := *c.state.Load()
	old.server.SystemID++
	old.superseded = make(chan struct{})
	c.state.Store(&old)
	tick(t, c) // starts over: the feed does not tell of the key
	want(t, c, key.digest, apikey.Allowed)
	want(t, c, unknownKey(), apikey.Unknown)
	if n := c.Status().Lookups; n != 2 {
		t.Errorf("%d lookups, want 2", n)
	}
}

func TestMoreChangesThanATickCanReadAreInForceAfterIt(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newFiltered(t, db.store)
	kept, revoked := db.create(t), db.create(t)
	tick(t, c)
	for _, key := range []testKey{kept, revoked} {
		want(t, c, key.digest, apikey.Allowed)
	}
	db.exec(t, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(n::text, 22, '0'), 'many', 'n', 'production', sha256(n::text::bytea), '{}' from generate_series(1, $1::int) n`, keystore.MaxChanges)
	db.revoke(t, revoked)
	tick(t, c)
	want(t, c, revoked.digest, apikey.Revoked)
	want(t, c, kept.digest, apikey.Allowed)
	want(t, c, apikey.Hash("1"), apikey.Allowed) // the filter of before has not heard of it
	want(t, c, unknownKey(), apikey.Unknown)
	tick(t, c)
	if c.state.Load().epoch == c.state.Load().origin {
		t.Error("the feed starts over again")
	}
}

func TestFilterReadFromAnotherServerThanTheFeedsIsNotUsed(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	store := &hookedStore{Store: db.store, change: func(snap *keystore.Snapshot) { snap.Server.StartedAt-- }}
	c := newCache(t, store, func(cfg *Config) { cfg.Warm = 10 })
	db.create(t)
	tick(t, c)
	for _, warm := range []int{0, 10} {
		c.cfg.Warm = warm
		if err := c.fill(t.Context(), new(uint64)); !errors.Is(err, errOtherServer) {
			t.Errorf("warm %d: %v, want errOtherServer", warm, err)
		}
	}
	if c.unknown.filter.Load() != nil || c.unknown.building.Load() != nil {
		t.Error("there is a filter")
	}
}

func TestFilterThatIsFullIsBuiltAgain(t *testing.T) {
	db := newDatabase(t, pgtest.URL(t))
	c := newCache(t, db.store, func(cfg *Config) { cfg.Refresh = 20 * time.Millisecond })
	run(t, c)
	eventually.True(t, "the filter is built", func() bool { return c.unknown.filter.Load() != nil })
	first := c.unknown.filter.Load()
	for n := range minFilterKeys + minFilterKeys/50 {
		d := numbered(n)
		c.learn(&d)
	}
	eventually.True(t, "there is another", func() bool { return c.unknown.filter.Load() != first })
}

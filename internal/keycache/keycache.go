// Package keycache answers "what does Postgres know of this key?" from memory, and never from data older than a bound.
//
// Three rules make a cached answer safe, whatever the cache drops, delays or resurrects:
//
//   - Validate on read. The change feed publishes an immutable state: an epoch (one per sync), a horizon, and every key
//     changed in an epoch after the horizon. An entry carries the epoch loaded before its row was read. It is usable only
//     if that epoch is not before the horizon and no later epoch changed its key: then no change up to the state's epoch
//     touched the row. Ristretto merely proposes entries.
//   - Freshness. A state vouches for entries for MaxStaleness from the start of the sync that made it, on the larger of
//     monotonic and wall time: a stalled Postgres, network or process stops the trust by itself. Past it only a row read
//     now will do.
//   - One server. Fills and feed must read the same Postgres: after a failover rows may be older than the feed's state. A
//     row from another server than the state's waits for the next sync, which starts over with a new horizon. The keys that
//     are found often are read anew before that horizon is published.
//
// Keys that Postgres does not have are a fourth matter, since anyone can present any number of them. A filter holds every hash in
// Postgres: it is streamed once the feed has begun, and the feed adds to it before each state is published. So a key that is not in
// the filter was absent as of the state, and can only have been created since. A few each second are asked for at once. The others
// wait for a sync that began after they came, of which there are at most 30 a second: it brings the key or proves that it is
// absent, for all of them in one statement. Neither waits in line with keys that may exist. Like the feed, this relies on the
// trigger to stamp every row; and no key is called unknown on the word of a filter alone.
package keycache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/ristretto/v2"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/clock"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

// errUnavailable says that nobody can tell now: the data is too old and Postgres does not answer. It is never a verdict
// on a key.
var errUnavailable = errors.New("key data is unavailable")

// Store is what the cache asks of Postgres. *keystore.Store is one.
type Store interface {
	Snapshot(ctx context.Context, since string, limit int) (keystore.Snapshot, error)
	Lookup(ctx context.Context, digests []apikey.Digest) (keystore.Found, error)
	Listen(ctx context.Context, wake func()) error
	ScanHashes(ctx context.Context, begin func(server keystore.Server, keys int) error, each func(prefix []byte)) error
	ScanRecent(ctx context.Context, n int, begin func(keystore.Server) error, each func(apikey.Record)) error
}

// Config of a Cache. Warm, NoListen, Sent and Primary, Report and Revoked may be left out.
type Config struct {
	Size         int           // keys held, at most
	Warm         int           // keys read into memory when the feed starts over, at most Size; 0: none
	Refresh      time.Duration // between two syncs
	MaxStaleness time.Duration // after which a sync vouches for nothing
	NoListen     bool          // do not LISTEN for early wake-ups, e.g. behind PgBouncer
	// Sent makes the store a standby's, which may lag: a sync then vouches for no more than the last report of this edge
	// that the standby has replayed. Sent returns that report. Nil: the store is the primary's.
	Sent func(beat uint64) (keystore.Report, bool)
	// Primary reads from the primary of a standby: it is asked about keys that the standby does not have, which may have been created a
	// moment ago. Nil: the store is the primary's.
	Primary func(ctx context.Context, digests []apikey.Digest) (keystore.Found, error)
	// Report asks for a report of this edge: when changes were applied, and when a standby is to prove that a key does not
	// exist. It must not block; it may be nil.
	Report func()
	// Revoked is called when a key that was in memory is found to be revoked, with the time for which it stayed allowed after
	// its revocation, by Postgres's clock, MaxStaleness at most where nobody could tell. It must not block; it may be nil.
	Revoked func(delay time.Duration)
	Logger  func() *zap.Logger // asked at each line: a config reload closes the old logger's writers
}

// answerWithin bounds Find, so that a request is answered within 1 s even when Postgres hangs.
const answerWithin = 900 * time.Millisecond

const (
	// maxHotSlots is how many keys at most are also found without ristretto, whose locks all CPUs share, and which records each
	// find in megabytes of filters, in a goroutine of its own: that costs more than the rest of the decision. A power of two.
	maxHotSlots = 1 << 15

	// hotShare is the part of the finds, one in so many, that ristretto sees all the same: it evicts what it does not see.
	hotShare = 64
)

// Cache of key records, kept true by its own sync loop (Run) and asked by Find.
type Cache struct {
	cfg      Config
	store    Store
	madeAt   time.Time // both clocks
	state    atomic.Pointer[state]
	known    *ristretto.Cache[uint64, *entry]
	hot      []atomic.Pointer[entry] // by place; their number is a power of two
	unknown  unknowns
	loader   *loader
	primary  *loader // of keys that a standby does not have; nil: the store is the primary's
	flight   flights
	wake     chan struct{}
	refill   chan struct{} // to read all keys again
	counts   counts
	applied  atomic.Pointer[Applied]
	failures outage.Failures
	canary   atomic.Int64 // nanoseconds that the last canary stayed allowed after its revocation; 0: none yet

	canaryAt atomic.Int64 // when that was measured, in nanoseconds since 1970

	// Of sync only.
	late         int      // readings of the feed in a row that timed out; maxLate at most
	unreported   bool     // changes are published that no report was asked for, since what follows failed
	unknownTiers []string // as the log has it

	// unverified are the keys that were in flight when the feed started over: changes to them may have been missed, so their rows must
	// be read again. Of sync only.
	unverified []apikey.Digest

	// revokedAhead are the revocations, by digest, that lookups brought where a standby is read: its feed may lag behind them, and
	// ristretto may drop them.
	revokedAhead sync.Map // of revokedRow

	shrunk context.Context // done once nothing is to be read ahead any longer
	shrink context.CancelFunc

	stopped atomic.Bool  // Run has returned: nobody cuts requests any longer
	closing sync.RWMutex // ristretto panics when Set races Close; for Get, see Close
	closed  bool
}

// entry is a row as of an epoch. There may be millions: it has no field that it can do without.
type entry struct {
	record apikey.Record
	asOf   atomic.Uint64 // epoch loaded before the row was read, raised on each successful use
}

func newEntry(record apikey.Record, asOf uint64) *entry {
	e := &entry{record: record}
	e.asOf.Store(asOf)
	return e
}

// Source is where an answer of Find comes from.
type Source uint8

// The sources. Only Memory answers at once.
const (
	Memory   Source = iota
	Feed            // a sync that was waited for, which brought the key or proved its absence
	Postgres        // a lookup that was waited for
)

// String returns the source as traces write it.
func (s Source) String() string {
	switch s {
	case Memory:
		return "memory"
	case Feed:
		return "feed"
	case Postgres:
		return "postgres"
	}
	return "invalid"
}

// Found is an answer of Find.
type Found struct {
	Record *apikey.Record // nil: Postgres has no such key
	Now    time.Time      // Postgres's clock, which expiry follows
	Source Source         // the last that was asked; with an error too, when nothing else is set

	entry     *entry // of Record
	state     *state
	vouchedAt time.Time // start of the read or sync that vouches for Record
}

// Limits returns how much the key that was found may be used. Before the first sync nothing is known of its tier, and not limited.
func (f *Found) Limits() apikey.Limits { return f.state.tiers.Of(f.Record.Limits) }

// New returns a cache that is empty and vouches for nothing until Run has synced once.
func New(store Store, cfg Config) (*Cache, error) {
	c := &Cache{
		cfg: cfg, store: store, madeAt: time.Now(), hot: make([]atomic.Pointer[entry], min(maxHotSlots, 1<<bits.Len(uint(cfg.Size-1)))),
		unknown: newUnknowns(), failures: outage.Failures{Logger: cfg.Logger}, wake: make(chan struct{}, 1), refill: make(chan struct{}, 1),
	}
	c.shrunk, c.shrink = context.WithCancel(context.Background())
	known, err := ristretto.NewCache(&ristretto.Config[uint64, *entry]{
		NumCounters: 10 * int64(cfg.Size), // ristretto's advice: ten per entry
		MaxCost:     int64(cfg.Size),
		BufferItems: 64,
		// Cost counts keys. With the internal cost included, room for 10,000 keys would hold 175.
		IgnoreInternalCost: true,
		// Ristretto's own metrics would count each Get too, which is the hot path.
		OnEvict:  func(*ristretto.Item[*entry]) { c.counts.evictions.Add(1) },
		OnReject: func(*ristretto.Item[*entry]) { c.counts.drops.Add(1) },
	})
	if err != nil {
		return nil, fmt.Errorf("create cache: %w", err)
	}
	c.known = known
	c.loader = newLoader(c, c.read)
	if cfg.Primary != nil {
		c.primary = newLoader(c, c.readPrimary)
	}
	c.state.Store(newState())
	c.applied.Store(new(Applied))
	c.canaryAt.Store(c.madeAt.UnixNano())
	return c, nil
}

// Find returns what Postgres knows of the key with that digest, from data no older than MaxStaleness. An error, which comes within a
// second, says that nobody can tell now, whatever it wraps.
func (c *Cache) Find(ctx context.Context, d apikey.Digest) (Found, error) {
	now, s := time.Now(), c.state.Load()
	if e, absent := c.recall(s, &d, now); e != nil || absent {
		c.counts.hits.add(&d)
		return found(e, s, s.pgTime(now), s.syncedAt), nil
	}
	c.counts.misses.Add(1)
	if c.unknown.rulesOut(s, &d) && !c.unknown.mayAsk(now) {
		return c.prove(ctx, d, now)
	}
	return c.ask(ctx, d)
}

// Cached reports whether Find would answer with a record from memory.
func (c *Cache) Cached(d apikey.Digest) bool {
	e, _ := c.recall(c.state.Load(), &d, time.Now())
	return e != nil
}

// recall returns what memory tells of a key: an entry, or that it is absent, or neither.
func (c *Cache) recall(s *state, d *apikey.Digest, now time.Time) (e *entry, absent bool) {
	if !s.fresh(now, c.cfg.MaxStaleness) {
		return nil, false
	}
	if e = c.hotEntry(s, d, now); e == nil {
		if c.knownAbsent(s, d, now) { // before ristretto, which unknown keys need not trouble
			return nil, true
		}
		e = c.cachedEntry(s, d, now)
	}
	if e != nil && s.disputed(e, now) {
		return nil, false
	}
	return e, false
}

// found makes an answer of an entry, or of the absence of one.
func found(e *entry, s *state, pgNow, vouchedAt time.Time) Found {
	f := Found{Now: pgNow, entry: e, state: s, vouchedAt: vouchedAt}
	if e != nil {
		f.Record = &e.record
	}
	return f
}

// sampled reports whether this find is one that ristretto sees, however often its key is found.
func sampled(now time.Time) bool { return now.Nanosecond()%hotShare == 0 }

// slot is where a key is kept that is found often.
func (c *Cache) slot(d *apikey.Digest) *atomic.Pointer[entry] {
	return &c.hot[place(d)&uint64(len(c.hot)-1)]
}

// hotEntry returns an entry that the fresh state s vouches for if its key is found often, or nil.
func (c *Cache) hotEntry(s *state, d *apikey.Digest, now time.Time) *entry {
	e := c.slot(d).Load()
	if e == nil || e.record.Digest != *d || !s.usable(e) {
		return nil
	}
	if sampled(now) {
		if _, ok := c.known.Get(place(d)); !ok { // given up, since so few of its finds are seen
			c.keep(e)
		}
	}
	return e
}

// cachedEntry returns an entry that the fresh state s vouches for, or nil.
func (c *Cache) cachedEntry(s *state, d *apikey.Digest, now time.Time) *entry {
	if e, ok := c.known.Get(place(d)); ok && e.record.Digest == *d && s.usable(e) {
		// A key that is found often comes by here soon.
		if slot := c.slot(d); sampled(now) && slot.Load() != e {
			slot.Store(e)
		}
		return e
	}
	if ch, ok := s.changed(d); ok { // the feed itself brought the row
		return ch.entry
	}
	return nil
}

// ask reads the row from Postgres and keeps it.
func (c *Cache) ask(ctx context.Context, d apikey.Digest) (f Found, err error) {
	defer func() { f.Source = Postgres }()
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	for {
		s := c.state.Load()
		a, err := c.loader.load(ctx, d, s.epoch)
		if err == nil && a.entry == nil && !a.proved {
			a, err = c.primary.load(ctx, d, s.epoch)
		}
		if err == nil {
			// The row was asked for moments ago; what can be wrong with it is a change that the feed has applied since,
			// and a process that was stopped between the answer and now.
			s = c.state.Load()
			now, vouchedAt := time.Now(), a.readAt
			if c.cfg.Sent != nil { // a standby's row is as old as the standby
				vouchedAt = s.syncedAt
				if !s.fresh(now, c.cfg.MaxStaleness) {
					return Found{}, fmt.Errorf("%w: %w", errUnavailable, errBlind)
				}
			}
			if s.unchanged(&d, a.asOf) && clock.Age(vouchedAt, now) < c.cfg.MaxStaleness {
				return found(a.entry, s, a.pgNow, vouchedAt), nil
			}
			if err := ctx.Err(); err != nil {
				return Found{}, fmt.Errorf("%w: %w", errUnavailable, err)
			}
			continue
		}
		if !errors.Is(err, errOtherServer) {
			return Found{}, fmt.Errorf("%w: %w", errUnavailable, err)
		}
		c.Wake()
		select {
		case <-s.superseded:
		case <-ctx.Done():
			return Found{}, fmt.Errorf("%w: %w", errUnavailable, err)
		}
	}
}

// place is a digest's key in the cache: its first 64 bits, which are uniform already. Two digests that share them would only
// evict each other, since the whole digest is compared on use. A slice of the digest would allocate on each request.
func place(d *apikey.Digest) uint64 { return binary.LittleEndian.Uint64(d[:]) }

// keep offers an entry to the cache. What the cache makes of it does not matter for safety.
func (c *Cache) keep(e *entry) {
	c.closing.RLock()
	defer c.closing.RUnlock()
	if !c.closed && !c.known.Set(place(&e.record.Digest), e, 1) {
		c.counts.drops.Add(1)
	}
}

// Wake makes the sync loop read the feed now instead of at its next refresh.
func (c *Cache) Wake() {
	select {
	case c.wake <- struct{}{}:
	default: // a wake-up is already waiting; the read that follows it sees everything committed by now
	}
}

// Close releases the cache. Run must have returned. Find goes on to ask the store, and fails when that is closed.
//
// Ristretto panics when Get races Close, too, in the few instructions that end it. Under a state that vouches for nothing no Find
// gets as far as Get; one that loaded the state before would have to stand still until ristretto is cleared, and go on right there.
// To rule that out, each Find would have to register.
func (c *Cache) Close() {
	c.closing.Lock()
	defer c.closing.Unlock()
	if !c.closed {
		c.closed = true
		c.state.Store(c.state.Load().restart(reading{}))
		c.known.Close()
	}
}

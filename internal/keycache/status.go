package keycache

import (
	"sync/atomic"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/clock"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

type counts struct {
	hits striped

	misses, proofs, refused, evictions, drops, lookups, lookupErrors atomic.Uint64
	syncs, syncErrors, restarts, listens, listenErrors, cuts         atomic.Uint64
}

// striped is a counter for what happens on every request: CPUs that count for different keys do not wait for each other.
type striped [16]struct {
	atomic.Uint64
	_ [56]byte // to the end of the cache line
}

func (s *striped) add(d *apikey.Digest) { s[d[20]%uint8(len(s))].Add(1) }

func (s *striped) load() uint64 {
	var sum uint64
	for i := range s {
		sum += s[i].Load()
	}
	return sum
}

// Status is what an operator may want to know of a cache at one moment.
type Status struct {
	Epoch        uint64        // syncs that were published
	SyncedAt     time.Time     // start of the last good sync; zero: never
	Age          time.Duration // since then; since the cache was made, if never
	Lag          time.Duration // by which the data may have been behind when it was read, as far as is proved, which only a standby's is
	Fresh        bool          // whether that sync still vouches for cached keys
	MaxStaleness time.Duration // after which it does not
	InFlight     int           // requests being tracked
	Canary       time.Duration // from the last canary's revocation to its refusal here; 0: none yet
	CanaryAt     time.Time     // when that was; until the first, when the cache was made

	Keys, Size       int    // in memory, and at most
	Evictions, Drops uint64 // keys evicted, and keys not admitted

	FilterKeys  int // digests in the filter of all keys; 0: it is not built
	FilterBytes int

	Hits, Misses          uint64 // keys that memory had an answer for, and those that it had none for
	Proofs                uint64 // of the misses, those that the feed proved to be unknown keys
	Refused               uint64 // of the misses, those for which there was no room to wait
	Lookups, LookupErrors uint64 // statements
	Syncs, SyncErrors     uint64
	Restarts              uint64 // times the feed started over, the first included: Postgres was restarted, or is another
	Listens, ListenErrors uint64 // connections that were made, and those that were lost or refused
	Cut                   uint64
	Watermark             uint64 // every change stamped below it is applied
}

// LastFailure returns the last failure of a sync, a lookup, a read of all keys or of listening; nil: there was none.
func (c *Cache) LastFailure() *outage.Failure { return c.failures.Last() }

// Applied is what the cache has read of the feed.
type Applied struct {
	At       time.Time       // up to when it knows every change, by Postgres's clock
	Snapshot string          // that it read, as pg_snapshot; empty: none yet
	Server   keystore.Server // that it read from
	Beat     uint64          // the last report of this edge that this server knew of
}

// Applied returns the last sync that was applied, to the requests in flight too.
func (c *Cache) Applied() Applied { return *c.applied.Load() }

// Status returns the cache's state and counters.
func (c *Cache) Status() Status {
	s := c.state.Load()
	st := Status{
		Epoch: s.epoch, SyncedAt: s.syncedAt, Watermark: s.watermark, InFlight: c.InFlight(),
		Canary: time.Duration(c.canary.Load()), CanaryAt: time.Unix(0, c.canaryAt.Load()),
		Hits: c.counts.hits.load(), Misses: c.counts.misses.Load(), Proofs: c.counts.proofs.Load(), Refused: c.counts.refused.Load(),
		Lookups: c.counts.lookups.Load(), LookupErrors: c.counts.lookupErrors.Load(),
		Keys: int(c.known.MaxCost() - c.known.RemainingCost()), Size: c.cfg.Size, MaxStaleness: c.cfg.MaxStaleness,
		Evictions: c.counts.evictions.Load(), Drops: c.counts.drops.Load(),
		Restarts: c.counts.restarts.Load(), Listens: c.counts.listens.Load(),
		Syncs: c.counts.syncs.Load(), SyncErrors: c.counts.syncErrors.Load(),
		ListenErrors: c.counts.listenErrors.Load(), Cut: c.counts.cuts.Load(),
	}
	if f := c.unknown.filter.Load(); f != nil && f.origin == s.origin {
		st.FilterKeys, st.FilterBytes = int(f.keys.Load()), f.bytes()
	}
	now := time.Now()
	if s.syncedAt.IsZero() {
		st.Age = clock.Age(c.madeAt, now) // an edge that never synced is no younger than one that did
	} else {
		st.Age, st.Fresh = clock.Age(s.syncedAt, now), s.fresh(now, c.cfg.MaxStaleness)
		if c.cfg.Sent != nil { // the report that was read may have been sent while the sync was under way
			st.Lag = clock.Age(s.syncedAt, s.gotAt)
		}
	}
	return st
}

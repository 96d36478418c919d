package keycache

import (
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/clock"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// maxChanges is how many changed keys a state remembers, besides those of the last large epoch, which has brought more by itself. When
// there are more, the horizon moves up and entries that were not used since then are read again.
const maxChanges = 10_000

// state is what the feed knows after a sync. It is immutable and replaced as a whole.
type state struct {
	epoch   uint64
	origin  uint64 // epoch in which the feed started over
	horizon uint64
	changes map[apikey.Digest]change // every key changed in an epoch after horizon, except those in large
	large   largeEpoch               // kept apart, since each further change copies the map of the others
	log     []epochChanges           // the keys of changes, oldest epoch first

	server    keystore.Server
	seen      string // the snapshot as of which every change has been read
	watermark uint64 // every transaction below it had ended then
	xmax      uint64 // of the snapshot; it never falls on one server

	tiers *apikey.Tiers // as of the same snapshot

	syncedAt   time.Time // what the sync vouches from, both clocks: its start, unless a standby lags; zero: never
	readAt     time.Time // start of the sync, both clocks
	gotAt      time.Time // when the sync's reading was there, both clocks
	pgNow      time.Time // Postgres's clock between readAt and gotAt
	superseded chan struct{}
}

// change is the latest change of a key: the epoch that brought it, and the row.
type change struct {
	epoch uint64
	entry *entry
}

type epochChanges struct {
	epoch   uint64
	digests []apikey.Digest
}

// largeEpoch is one with more than maxChanges: an import, or all keys of an account. The zero value is none.
type largeEpoch struct {
	epoch uint64
	rows  map[apikey.Digest]*entry
}

func newState() *state { return &state{tiers: new(apikey.Tiers), superseded: make(chan struct{})} }

// fresh reports whether the sync that made s may still be trusted.
func (s *state) fresh(now time.Time, maxStaleness time.Duration) bool {
	return !s.syncedAt.IsZero() && clock.Age(s.syncedAt, now) < maxStaleness
}

// unchanged reports whether what was read of a key as of an epoch is so as of the epoch of s: it was read not before the
// horizon and the key has not changed since.
func (s *state) unchanged(d *apikey.Digest, asOf uint64) bool {
	if asOf < s.horizon {
		return false
	}
	if asOf >= s.epoch {
		return true
	}
	ch, ok := s.changed(d)
	return !ok || ch.epoch <= asOf
}

// changed returns the latest change of a key after the horizon. One that is kept from before may not be the latest: a large epoch that was
// forgotten may have brought the key's revocation.
func (s *state) changed(d *apikey.Digest) (change, bool) {
	ch := s.changes[*d]
	if e, brought := s.large.rows[*d]; brought && ch.epoch < s.large.epoch {
		ch = change{s.large.epoch, e}
	}
	return ch, ch.epoch > s.horizon
}

// usable reports whether e is the row as of the epoch of s. Success is remembered in e, so that an entry in use never
// falls behind the horizon.
func (s *state) usable(e *entry) bool {
	asOf := e.asOf.Load()
	if !s.unchanged(&e.record.Digest, asOf) {
		return false
	}
	for asOf < s.epoch && !e.asOf.CompareAndSwap(asOf, s.epoch) {
		asOf = e.asOf.Load()
	}
	return true
}

// pgTime is Postgres's clock at now, at the latest: its reading at the sync plus the time since, on the clock that shows more
// of it.
func (s *state) pgTime(now time.Time) time.Time { return s.pgNow.Add(clock.Age(s.readAt, now)) }

// steadyPgTime is Postgres's clock at now, at the earliest, by the monotonic clock, which nobody sets. It stands still while the
// machine is suspended.
func (s *state) steadyPgTime(now time.Time) time.Time { return s.pgNow.Add(now.Sub(s.gotAt)) }

// disputed reports whether e has expired at the latest of Postgres's clock and not at the earliest: the sync took long, or the
// wall clock was set forward or the machine suspended since. Then only Postgres knows.
func (s *state) disputed(e *entry, now time.Time) bool {
	at := e.record.ExpiresAt
	return !at.IsZero() && at.Reached(s.pgTime(now)) && !at.Reached(s.steadyPgTime(now))
}

// same returns the tiers of s if they are these, so that states share them.
func (s *state) same(tiers apikey.Tiers) *apikey.Tiers {
	if *s.tiers == tiers {
		return s.tiers
	}
	return &tiers
}

// sameServer reports whether snap continues s: the same server process, database and table of keys, whose transaction ids have not gone
// back. A failover, a promotion, a restored dump and a crash that the postmaster outlived all show in one of these.
func (s *state) sameServer(snap keystore.Snapshot) bool {
	return s.server == snap.Server && snap.Xmax >= s.xmax
}

// isOn returns an error unless server is the one that the feed of s is read from.
func (s *state) isOn(server keystore.Server) error {
	if server != s.server {
		return errOtherServer
	}
	return nil
}

// restart returns the state after a sync that has nothing in common with s: no entry read before it is usable.
func (s *state) restart(r reading) *state {
	return &state{
		epoch: s.epoch + 1, origin: s.epoch + 1, horizon: s.epoch + 1,
		server: r.Server, seen: r.Text, watermark: r.Xmin, xmax: r.Xmax, tiers: s.same(r.Tiers),
		syncedAt: r.vouchedAt, readAt: r.startedAt, gotAt: time.Now(), pgNow: r.Now, superseded: make(chan struct{}),
	}
}

// next returns the state after a sync that continues s, and the keys changed in it.
func (s *state) next(r reading) (n *state, changed []*entry) {
	n = s.restart(r)
	n.origin, n.horizon, n.changes, n.large, n.log = s.origin, s.horizon, s.changes, s.large, s.log
	n.seen = keystore.LaterSnapshot(r.Text, s.seen)
	var digests []apikey.Digest
	for _, record := range r.Changes {
		changed = append(changed, newEntry(*record, n.epoch))
		digests = append(digests, record.Digest)
	}
	if len(changed) > 0 {
		n.remember(changed, digests)
	}
	return n, changed
}

// knewRevoked reports whether the feed has brought the key as a revoked one before.
func (s *state) knewRevoked(d *apikey.Digest) bool {
	ch, ok := s.changed(d)
	return ok && !ch.entry.record.RevokedAt.IsZero()
}

// remember adds the changes of epoch s and forgets the oldest epochs while there are too many, and the first of two large ones.
// Keys in use, which were validated after it, need no lookup for that.
func (s *state) remember(changed []*entry, digests []apikey.Digest) {
	if len(digests) > maxChanges {
		s.horizon = max(s.horizon, s.large.epoch)
		s.large = largeEpoch{s.epoch, make(map[apikey.Digest]*entry, len(changed))}
		for _, e := range changed {
			s.large.rows[e.record.Digest] = e
		}
		return
	}
	total := len(digests)
	for _, ec := range s.log {
		total += len(ec.digests)
	}
	log := s.log
	for len(log) > 0 && (total > maxChanges || log[0].epoch <= s.horizon) {
		total -= len(log[0].digests)
		s.horizon = max(s.horizon, log[0].epoch)
		log = log[1:]
	}
	if s.large.epoch <= s.horizon {
		s.large = largeEpoch{}
	}
	s.log = append(log[:len(log):len(log)], epochChanges{s.epoch, digests})
	old := s.changes
	s.changes = make(map[apikey.Digest]change, total)
	for _, ec := range log {
		for _, d := range ec.digests {
			s.changes[d] = old[d]
		}
	}
	for _, e := range changed {
		s.changes[e.record.Digest] = change{s.epoch, e}
	}
}

package keycache

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/clock"
)

// Cut is the cause with which the context of a request in flight is cancelled when its key ends.
type Cut struct {
	// Outcome is why: Revoked, Expired, or Unavailable when nobody can tell any more.
	Outcome apikey.Outcome
}

func (c *Cut) Error() string { return "request cut: key " + c.Outcome.String() }

// Is makes the cut look like a client that went away. With any other cause Caddy's reverse_proxy books an upstream
// failure, and with passive health checks revoking one key would take the upstream away from all others.
func (c *Cut) Is(target error) bool { return target == context.Canceled }

// Flight is a request in flight, kept in a list of its shard. The zero value is ready for Track.
type Flight struct {
	prev, next *Flight
	digest     apikey.Digest
	expiresAt  apikey.Time
	vouchedAt  time.Time
	request    Request // nil once cut
	unverified bool    // the feed has started over since vouchedAt, and the key's row was not read again
}

// Request is one in flight.
type Request interface {
	// Cut ends the request because its key has ended. It is called once at most, and must not block.
	Cut(*Cut)
}

const flightShards = 64

// flights are the requests in flight, sharded by digest. The lists are independent of the cache, which may drop an entry
// at any time; a revocation walks one of them.
type flights [flightShards]struct {
	mu   sync.Mutex
	head Flight
	n    int
}

// Track registers a request whose key was found to be good, so that it is cut when the key is revoked, expires, or cannot be
// vouched for any longer. It reports false if the key has changed since it was found, or what was found has become too old, while the
// process stood still: find it again; and if Run has ended, when nobody would cut it. After true, Untrack must follow.
func (c *Cache) Track(f *Flight, found Found, request Request) bool {
	f.digest, f.expiresAt = found.Record.Digest, found.Record.ExpiresAt
	f.vouchedAt, f.request, f.unverified = found.vouchedAt, request, false
	c.flight.add(f)
	// The sync publishes a state and then walks the flights, and Run does so at its end. Either that walk meets this flight, or
	// the state is here already. The age is by the monotonic clock alone, which costs half: of a machine that was suspended in
	// between, watch knows within two seconds.
	if s := c.state.Load(); s != found.state && !s.usable(found.entry) || c.stopped.Load() ||
		time.Since(found.vouchedAt) >= c.cfg.MaxStaleness {
		c.Untrack(f)
		return false
	}
	return true
}

// Untrack ends the tracking of a request.
func (c *Cache) Untrack(f *Flight) { c.flight.remove(f) }

// InFlight returns the number of tracked requests.
func (c *Cache) InFlight() int {
	n := 0
	for i := range c.flight {
		shard := &c.flight[i]
		shard.mu.Lock()
		n += shard.n
		shard.mu.Unlock()
	}
	return n
}

func shardOf(d *apikey.Digest) int { return int(d[24] % flightShards) }

func (fs *flights) add(f *Flight) {
	shard := &fs[shardOf(&f.digest)]
	shard.mu.Lock()
	f.next = shard.head.next
	f.prev = &shard.head
	if f.next != nil {
		f.next.prev = f
	}
	shard.head.next = f
	shard.n++
	shard.mu.Unlock()
}

func (fs *flights) remove(f *Flight) {
	shard := &fs[shardOf(&f.digest)]
	shard.mu.Lock()
	f.prev.next = f.next
	if f.next != nil {
		f.next.prev = f.prev
	}
	shard.n--
	shard.mu.Unlock()
}

// each calls do for every flight of a shard, under its lock.
func (fs *flights) each(shard int, do func(*Flight)) {
	s := &fs[shard]
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := s.head.next; f != nil; f = f.next {
		do(f)
	}
}

// doubt makes all flights unverified, for which a state vouched last that was synced at syncedAt, and returns their keys, each
// once. What was unverified before, that state never vouched for.
func (fs *flights) doubt(syncedAt time.Time) []apikey.Digest {
	seen := make(map[apikey.Digest]struct{})
	for shard := range fs {
		fs.each(shard, func(f *Flight) {
			if !f.unverified && syncedAt.After(f.vouchedAt) {
				f.vouchedAt = syncedAt
			}
			f.unverified = true
			seen[f.digest] = struct{}{}
		})
	}
	return slices.Collect(maps.Keys(seen))
}

// apply tells the flights of a key that its row is now record; nil if there is none.
func (c *Cache) apply(d *apikey.Digest, record *apikey.Record, pgNow time.Time) {
	outcome := record.Validity(pgNow)
	c.flight.each(shardOf(d), func(f *Flight) {
		switch {
		case f.digest != *d:
		case outcome != apikey.Allowed:
			c.cut(f, outcome)
		default:
			f.expiresAt, f.unverified = record.ExpiresAt, false
		}
	})
}

// cut cancels a flight, once. The caller holds the lock of its shard.
func (c *Cache) cut(f *Flight, outcome apikey.Outcome) {
	if f.request == nil {
		return
	}
	c.counts.cuts.Add(1)
	f.request.Cut(&Cut{Outcome: outcome})
	f.request = nil
}

// cutEnded cuts the flights whose key has reached its expiry by pgNow, and the unverified ones for which nobody vouches any longer
// at now. The others are vouched for by the state.
func (c *Cache) cutEnded(pgNow, now time.Time) {
	for shard := range c.flight {
		c.flight.each(shard, func(f *Flight) {
			switch {
			case f.expiresAt.Reached(pgNow):
				c.cut(f, apikey.Expired)
			case f.unverified && clock.Age(f.vouchedAt, now) >= c.cfg.MaxStaleness:
				c.cut(f, apikey.Unavailable)
			}
		})
	}
}

// cutUnvouched cuts the flights that nothing younger than MaxStaleness vouches for.
func (c *Cache) cutUnvouched(now time.Time) {
	for shard := range c.flight {
		c.flight.each(shard, func(f *Flight) {
			if clock.Age(f.vouchedAt, now) >= c.cfg.MaxStaleness {
				c.cut(f, apikey.Unavailable)
			}
		})
	}
}

package keycache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/clock"
)

const (
	// absentSlots bounds the memory that unknown keys can take. They never enter the cache of known keys, so a flood
	// of them evicts nothing.
	absentSlots = 1 << 13

	// askGap and askBurst are the budget of lookups for keys that the filter does not know: ten a second.
	askGap   = 100 * time.Millisecond
	askBurst = 900 * time.Millisecond

	// proofGap is the least time between two syncs that are made to prove absence: 30 a second at most.
	proofGap = time.Second / 30

	// proofShare is the part of the time, one in so many, that such syncs may take of Postgres.
	proofShare = 4

	// maxProving is how many requests may wait for such a proof. A request that waits holds some 10 KiB.
	maxProving = 1 << 11

	// proofTook is how long such a sync usually takes at most.
	proofTook = 5 * time.Millisecond

	// maxAtOnce is how many such requests may be answered at one moment. The answers to more are spread.
	maxAtOnce = 32
)

var errProving = errors.New("too many unknown keys wait for proof of their absence")

// absence is the proof that Postgres had no key with that digest.
type absence struct {
	digest apikey.Digest
	asOf   uint64    // an epoch, as in entry
	at     time.Time // when it was so
}

// unknowns is what the cache does about keys that are not in Postgres.
type unknowns struct {
	absent [absentSlots]atomic.Pointer[absence]

	// filter has every digest of the feed's Postgres, as of the published state; nil until it is built. building is its
	// successor: the feed adds to both.
	filter, building atomic.Pointer[filter]

	mu      sync.Mutex
	asking  pace
	proving atomic.Int64
	wanted  chan struct{} // a sync, as proof of absence
}

func newUnknowns() unknowns {
	return unknowns{asking: pace{gap: askGap, burst: askBurst}, wanted: make(chan struct{}, 1)}
}

// learn adds a digest to the filter. It must come before the state that brings the key is published.
func (c *Cache) learn(d *apikey.Digest) {
	// In this order: the successor becomes the filter before it ceases to be the successor.
	building := c.unknown.building.Load()
	current := c.unknown.filter.Load()
	if building != nil {
		building.add(d[:])
	}
	if current != nil {
		current.add(d[:])
		if building == nil && current.full() {
			c.wantFill()
		}
	}
}

// rulesOut reports whether it is certain that d was not in Postgres as of the state.
func (u *unknowns) rulesOut(s *state, d *apikey.Digest) bool {
	f := u.filter.Load()
	return f != nil && f.origin == s.origin && !f.has(d)
}

// want asks for a sync.
func (u *unknowns) want() {
	select {
	case u.wanted <- struct{}{}:
	default: // somebody has
	}
}

// unwant says that one is about to begin.
func (u *unknowns) unwant() {
	select {
	case <-u.wanted:
	default:
	}
}

// mayAsk spends from the budget of lookups for keys that the filter does not know.
func (u *unknowns) mayAsk(now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.asking.take(now)
}

func (u *unknowns) slot(d *apikey.Digest) *atomic.Pointer[absence] {
	return &u.absent[binary.LittleEndian.Uint16(d[16:])%absentSlots]
}

// knownAbsent reports whether d was absent less than Refresh ago, and no change has brought it since. Not longer: a key
// created meanwhile must work.
func (c *Cache) knownAbsent(s *state, d *apikey.Digest, now time.Time) bool {
	a := c.unknown.slot(d).Load()
	return a != nil && a.digest == *d && clock.Age(a.at, now) < c.cfg.Refresh && s.unchanged(d, a.asOf)
}

// prove finds out from the feed about a key that is not in the filter. A sync that begins now brings the key if it was
// created by now; if not, it was absent. One sync proves that for all that wait, however many: so a flood of unknown keys
// costs Postgres a fixed number of statements, and a key created during it works.
func (c *Cache) prove(ctx context.Context, d apikey.Digest, since time.Time) (f Found, err error) {
	defer func() { f.Source = max(f.Source, Feed) }() // it may end by asking Postgres
	defer c.unknown.proving.Add(-1)
	if c.unknown.proving.Add(1) > maxProving {
		c.counts.refused.Add(1)
		return Found{}, fmt.Errorf("%w: %w", errUnavailable, errProving)
	}
	s, err := c.stateAfter(ctx, since)
	if err != nil {
		return Found{}, fmt.Errorf("%w: %w", errUnavailable, err)
	}
	ch, created := s.changed(&d)
	now := time.Now()
	// The process was stopped; or the feed has started over; or the key is about to expire.
	if !s.fresh(now, c.cfg.MaxStaleness) || !created && !c.unknown.rulesOut(s, &d) || created && s.disputed(ch.entry, now) {
		ctx, cancel := context.WithDeadline(ctx, since.Add(answerWithin))
		defer cancel()
		return c.ask(ctx, d)
	}
	if created {
		return found(ch.entry, s, s.pgTime(now), s.syncedAt), nil
	}
	c.counts.proofs.Add(1)
	c.unknown.slot(&d).Store(&absence{digest: d, asOf: s.epoch, at: s.syncedAt})
	return found(nil, s, s.pgTime(now), s.syncedAt), nil
}

// stateAfter waits for the state of a sync that began after since. Where many wait, each looks again at a time of its own, less
// often the longer it takes: woken together, they would be in line before requests with known keys.
func (c *Cache) stateAfter(ctx context.Context, since time.Time) (*state, error) {
	for deadline := since.Add(answerWithin); ; {
		s, now := c.state.Load(), time.Now()
		if s.syncedAt.After(since) {
			return s, nil
		}
		if !now.Before(deadline) {
			return nil, context.DeadlineExceeded
		}
		c.unknown.want()
		wait, woken := deadline.Sub(now), s.superseded
		if c.unknown.proving.Load() > maxAtOnce {
			expected := s.syncedAt.Add(proofGap + proofTook)
			wait, woken = min(wait, max(0, expected.Sub(now))+rand.N(proofGap+now.Sub(since))), nil
		}
		if !pause(ctx, wait, woken) {
			return nil, ctx.Err()
		}
	}
}

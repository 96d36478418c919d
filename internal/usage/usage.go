// Package usage counts what keys are used for: in memory on the way of a request, and from there into Postgres, in batches.
//
// A count is kept until Postgres has confirmed it, and added exactly once: a flush has a number, is repeated unchanged while its
// outcome is not known, and Postgres adds each number once. What a process that is killed had not flushed is lost: the requests of
// one interval at most. What memory can hold during an outage is bounded. Beyond it, keys that already have counts in this hour are
// still counted, since that takes no more memory; others are dropped, as a metric and the log say. What a flush has taken does not
// count: else keys counted before would find no room.
//
// Hours are those of Postgres's clock. A use, as in "last used", is a request that was allowed.
package usage

import (
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

// Store is what the counter asks of Postgres. *keystore.Store is one.
type Store interface {
	FlushUsage(ctx context.Context, flush keystore.UsageFlush) error
	ClaimChore(ctx context.Context, name string, period time.Duration) (bool, error)
	BusyKeys(ctx context.Context, floor int64, each func(keystore.HourTotal)) error
	UsageHistory(ctx context.Context, keyIDs []string, before time.Time, window time.Duration, each func(keystore.HourTotal)) error
	AddSpike(ctx context.Context, spike keystore.Spike) (bool, error)
	ForgetUsage(ctx context.Context, retention time.Duration, limit int) (int64, error)
}

// defaultMaxBuffered takes about 100 MB, and during an outage as much again: a busy hour of half a million keys.
const defaultMaxBuffered = 500_000

// Config of a Counter.
type Config struct {
	Instance    string             // edge.NewInstance's; a second counter must not have it
	Flush       time.Duration      // between two flushes
	Retention   time.Duration      // after which counts are removed from Postgres; the shortest of all edges wins
	MaxBuffered int                // keys and hours counted in memory, at most, besides those that a flush has taken; 0: 500,000
	Logger      func() *zap.Logger // asked at each line: a config reload closes the old logger's writers
}

// Counter counts. Run flushes what it counts.
type Counter struct {
	cfg    Config
	store  Store
	wake   chan struct{}
	shards [shardCount]shard

	buffered, sending                     atomic.Int64 // keys and hours: in the shards, and taken
	flushed, flushErrors, dropped, spikes atomic.Uint64

	// Of the flush loop.
	taken    []taken       // to be flushed, sorted; the first batch may have been applied already
	sequence int64         // of the next flush
	timeout  time.Duration // of the next try of a batch

	chores     []*chore
	thresholds map[string]threshold // of the spike check

	failures outage.Failures // to flush, or to do a chore
}

const (
	shardCount = 64
	seenWords  = 1 << 16 / 64
)

// shard holds the counts of the keys whose digest leads to it, since they were last taken.
type shard struct {
	mu     sync.Mutex
	index  map[uint64]int32 // place to entry
	counts []entry
	seen   [seenWords]uint64 // a Bloom filter of the keys that were allowed before
	_      [64]byte          // another processor's cache line
}

// entry is what was counted of one key in one hour.
type entry struct {
	hour int64 // since 1970
	keystore.KeyCounts
}

// LastFailure returns the last failure to flush or to do a chore; nil: there was none.
func (c *Counter) LastFailure() *outage.Failure { return c.failures.Last() }

// New returns a counter.
func New(store Store, cfg Config) *Counter {
	if cfg.MaxBuffered == 0 {
		cfg.MaxBuffered = defaultMaxBuffered
	}
	c := &Counter{cfg: cfg, store: store, wake: make(chan struct{}, 1), sequence: 1, timeout: flushTimeout, failures: outage.Failures{Logger: cfg.Logger}}
	c.chores = c.newChores()
	for i := range c.shards {
		c.shards[i].index = make(map[uint64]int32)
	}
	return c
}

// Count counts a request that was decided on a key. now is Postgres's clock.
func (c *Counter) Count(record *apikey.Record, outcome apikey.Outcome, now time.Time) {
	s := &c.shards[record.Digest[16]%shardCount]
	s.mu.Lock()
	e := c.entry(s, record, now.Unix()/3600)
	if e == nil {
		s.mu.Unlock()
		c.dropped.Add(1)
		return
	}
	e.Counts[outcome]++
	first := false
	if outcome == apikey.Allowed {
		first = e.UsedAt == 0 && s.see(record.Digest)
		e.UsedAt = max(e.UsedAt, now.UnixMicro())
	}
	s.mu.Unlock()
	if first {
		c.Wake()
	}
}

// entry returns the entry of a key and an hour, or nil if it would be one too many. A digest is uniform, so a part of it is as good
// a place as any hash; digests that share it, even on purpose, only take the next place.
func (c *Counter) entry(s *shard, record *apikey.Record, hour int64) *entry {
	place := binary.LittleEndian.Uint64(record.Digest[8:]) + uint64(hour)
	for ; ; place++ {
		i, ok := s.index[place]
		if !ok {
			break
		}
		if e := &s.counts[i]; e.KeyID == record.ID && e.hour == hour {
			return e
		}
	}
	if c.buffered.Add(1) > int64(c.cfg.MaxBuffered) {
		c.buffered.Add(-1)
		return nil
	}
	s.index[place] = int32(len(s.counts))
	s.counts = append(s.counts, entry{hour: hour, KeyCounts: keystore.KeyCounts{KeyID: record.ID}})
	return &s.counts[len(s.counts)-1]
}

// see reports whether the key is seen for the first time. It may take a new key for an old one, never the reverse: a new
// key then waits for the next flush.
func (s *shard) see(d apikey.Digest) bool {
	first := false
	for i := 0; i < 8; i += 2 { // the digest is uniform: four of its parts are as good as four hashes
		bit := binary.LittleEndian.Uint16(d[i:])
		word, mask := &s.seen[bit/64], uint64(1)<<(bit%64)
		first = first || *word&mask == 0
		*word |= mask
	}
	return first
}

// Wake asks for a flush now, or a second after the last one. It does not block.
func (c *Counter) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Status is what an operator may want to know of a counter at one moment.
type Status struct {
	Buffered    int64  // keys and hours that wait for a flush
	MaxBuffered int    // of them, besides those that a flush has taken
	Flushed     uint64 // requests added to Postgres
	FlushErrors uint64 // flushes that failed, or whose outcome was not known; each is repeated
	Dropped     uint64 // requests that are not counted, since the buffer was full
	Spikes      uint64 // that this edge was the first to see
}

// Status returns the counter's state.
func (c *Counter) Status() Status {
	return Status{
		Buffered: c.buffered.Load() + c.sending.Load(), MaxBuffered: c.cfg.MaxBuffered, Flushed: c.flushed.Load(),
		FlushErrors: c.flushErrors.Load(), Dropped: c.dropped.Load(), Spikes: c.spikes.Load(),
	}
}

package usage

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

const (
	// flushBatch is how many keys and hours go into one transaction: locks are held for a tenth of a second or so.
	flushBatch = 5000

	// flushGap is the least time between two flushes, so that a storm of new keys does not become a storm of flushes.
	flushGap = time.Second

	// flushTimeout is for the first try of a batch, so that connections on which nothing answers are soon given up.
	flushTimeout, maxFlushTimeout = 5 * time.Second, time.Minute

	// stopTimeout bounds the last flush, so that a gateway stops though Postgres does not answer.
	stopTimeout = 5 * time.Second
)

// Run flushes until ctx is done, and then once more. It must run once.
func (c *Counter) Run(ctx context.Context) {
	flushing := outage.Kind{Begins: "usage cannot be flushed; counts are kept in memory", Over: "usage is flushed again", Level: zap.WarnLevel}
	var drops drops
	for c.waitForFlush(ctx) {
		if err := c.flush(ctx); ctx.Err() == nil {
			c.failures.Note(&flushing, err)
			drops.report(c, err)
		}
	}
	c.flushLast(context.WithoutCancel(ctx))
}

// waitForFlush reports false when ctx is done. Jitter keeps the edges of a fleet apart.
func (c *Counter) waitForFlush(ctx context.Context) bool {
	gap, next := time.After(min(flushGap, c.cfg.Flush)), time.NewTimer(c.cfg.Flush-c.cfg.Flush/10+rand.N(c.cfg.Flush/5+1))
	defer next.Stop()
	select {
	case <-gap:
	case <-ctx.Done():
		return false
	}
	select {
	case <-next.C:
	case <-c.wake:
	case <-ctx.Done():
		return false
	}
	return true
}

// flush sends what an earlier flush could not, and then what was counted since. While the first does not succeed, counts
// stay where they are and grow, instead of taking memory a third time.
func (c *Counter) flush(ctx context.Context) error {
	if err := c.send(ctx); err != nil {
		return err
	}
	c.take()
	return c.send(ctx)
}

// taken is an entry that is on its way to Postgres. What it is sorted by lies beside it: following a pointer at each
// comparison costs more than the rest of the flush.
type taken struct {
	*entry
	hour   int64
	prefix uint64 // of the key's id, as a number
}

// take moves all counts out of the shards, sorted: by hour, since a flush has one, and then by key, so that all edges lock rows
// in the same order.
func (c *Counter) take() {
	all := make([]taken, 0, c.buffered.Load())
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		counts := s.counts
		if len(counts) > 0 { // as large as before: growing step by step costs more
			s.index, s.counts = make(map[uint64]int32, len(counts)), make([]entry, 0, len(counts))
		}
		c.sending.Add(int64(len(counts)))
		c.buffered.Add(-int64(len(counts)))
		s.mu.Unlock()
		for j := range counts {
			all = append(all, taken{&counts[j], counts[j].hour, prefix(counts[j].KeyID)})
		}
	}
	slices.SortFunc(all, func(a, b taken) int {
		if a.hour != b.hour {
			return cmp.Compare(a.hour, b.hour)
		}
		if a.prefix != b.prefix {
			return cmp.Compare(a.prefix, b.prefix)
		}
		return strings.Compare(a.KeyID, b.KeyID)
	})
	c.taken = all
}

// prefix is the first characters in which ids differ.
func prefix(id string) uint64 {
	var first [8]byte
	copy(first[:], strings.TrimPrefix(id, "key_"))
	return binary.BigEndian.Uint64(first[:])
}

// send flushes what is taken, batch by batch. A batch that fails stays as it is and keeps its number.
func (c *Counter) send(ctx context.Context) error {
	for len(c.taken) > 0 {
		batch := c.nextBatch()
		if err := c.sendBatch(ctx, batch); err != nil {
			c.flushErrors.Add(1)
			return err
		}
		c.sequence++
		c.taken = c.taken[len(batch.Keys):]
		c.sending.Add(-int64(len(batch.Keys)))
		for _, k := range batch.Keys {
			c.flushed.Add(requests(k))
		}
	}
	c.taken = nil
	return nil
}

// nextBatch is the same until it is sent.
func (c *Counter) nextBatch() keystore.UsageFlush {
	flush := keystore.UsageFlush{Instance: c.cfg.Instance, Sequence: c.sequence, Hour: c.taken[0].hour}
	for _, t := range c.taken[:min(len(c.taken), flushBatch)] {
		if t.hour != flush.Hour {
			break
		}
		flush.Keys = append(flush.Keys, &t.KeyCounts)
	}
	return flush
}

// sendBatch gives a batch that timed out twice as long the next time: one that takes longer each time would never be flushed, nor
// anything after it. Rows of which Postgres must keep every version, for a transaction that lasts for hours, take that long.
func (c *Counter) sendBatch(ctx context.Context, batch keystore.UsageFlush) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	startedAt := time.Now()
	err := c.store.FlushUsage(ctx, batch)
	switch {
	case err == nil:
		c.timeout = min(max(flushTimeout, 2*time.Since(startedAt)), maxFlushTimeout)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		c.timeout = min(2*c.timeout, maxFlushTimeout)
	}
	return err
}

func requests(k *keystore.KeyCounts) uint64 {
	var sum uint64
	for _, n := range k.Counts {
		sum += uint64(n)
	}
	return sum
}

// flushLast flushes when the gateway stops, and tries again for a few seconds if that fails.
func (c *Counter) flushLast(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	for {
		err := c.flush(ctx)
		if err == nil {
			return
		}
		select {
		case <-time.After(stopTimeout / 20):
		case <-ctx.Done():
			left := c.taken
			c.take()
			var lost uint64
			for _, t := range slices.Concat(left, c.taken) {
				lost += requests(&t.KeyCounts)
			}
			c.cfg.Logger().Error("usage is lost: Postgres does not take the last counts", zap.Uint64("requests", lost), zap.Error(err))
			return
		}
	}
}

// drops says once that counts are dropped, until a flush comes through.
type drops struct {
	dropping bool
	dropped  uint64
}

func (d *drops) report(c *Counter, err error) {
	dropped := c.dropped.Load()
	if dropped > d.dropped && !d.dropping {
		c.cfg.Logger().Error("usage buffer is full; requests of further keys are not counted", zap.Int("keys_and_hours", c.cfg.MaxBuffered))
	}
	d.dropping = dropped > d.dropped || d.dropping && err != nil
	d.dropped = dropped
}

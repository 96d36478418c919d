package keycache

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

const (
	fillRetryMin = time.Second
	fillRetryMax = time.Minute

	// fillSpread is how many ticks a fleet takes to read all keys after a failover, when every edge starts over at once.
	fillSpread = 10

	// warmChunk is how many entries are offered to ristretto while it takes in as many that were offered before: it drops those
	// for which its buffer of 32,768 has no room.
	warmChunk = 1 << 13
)

// wantFill asks for the filter to be built again.
func (c *Cache) wantFill() {
	select {
	case c.refill <- struct{}{}:
	default:
	}
}

// keepFilled reads what is worth having in memory each time that the feed starts over: the keys used last, then the filter of
// all keys. Until that is done, or while it fails, keys are asked for one by one.
func (c *Cache) keepFilled(ctx context.Context) {
	warmed := uint64(0)
	reading := outage.Kind{ // it is over with "filter of all keys is built", or "cache is warm" if only that has failed
		Begins: "reading all keys failed; keys that are not in memory are asked for one by one", Level: zap.WarnLevel,
	}
	for first := true; ; first = false {
		select {
		case <-c.refill:
		case <-ctx.Done():
			return
		}
		if !first && !pause(ctx, rand.N(fillSpread*c.cfg.Refresh), nil) {
			return
		}
		for delay := fillRetryMin; ; delay = min(2*delay, fillRetryMax) {
			err := c.fill(ctx, &warmed)
			if ctx.Err() != nil {
				return
			}
			if c.failures.Note(&reading, err); err == nil {
				break
			}
			if !pause(ctx, delay/2+rand.N(delay), c.refill) {
				return
			}
		}
	}
}

func (c *Cache) fill(ctx context.Context, warmed *uint64) error {
	c.loader.reserve(1)
	defer c.loader.reserve(-1)
	s := c.state.Load() // before anything is read: the feed brings what changes from here on
	var warming error
	if c.cfg.Warm > 0 && *warmed != s.origin {
		if warming = c.warm(ctx, s); warming == nil {
			*warmed = s.origin
		}
	}
	// Whether or not that failed, as it does while somebody has locked the table of last uses: a flood is not to wait for it.
	if f := c.unknown.filter.Load(); f == nil || f.origin != s.origin || f.full() {
		if err := c.buildFilter(ctx, s); err != nil {
			return fmt.Errorf("build filter: %w", err)
		}
	}
	if warming != nil {
		return fmt.Errorf("warm cache: %w", warming)
	}
	return nil
}

// warm reads the rows of the keys that are the likeliest to be used.
func (c *Cache) warm(ctx context.Context, s *state) error {
	startedAt, keys := time.Now(), 0
	var chunk sync.WaitGroup // being taken in
	err := c.store.ScanRecent(ctx, min(c.cfg.Warm, c.cfg.Size), s.isOn, func(r apikey.Record) {
		c.keep(newEntry(*c.latest(&r), s.epoch))
		if keys++; keys%warmChunk == 0 {
			chunk.Wait()
			chunk.Go(c.settle)
		}
	})
	chunk.Wait()
	if err == nil {
		c.cfg.Logger().Info("cache is warm", zap.Int("keys", keys), zap.Duration("took", time.Since(startedAt)))
	}
	return err
}

// settle waits until ristretto has taken in what it was offered.
func (c *Cache) settle() {
	c.closing.RLock()
	defer c.closing.RUnlock()
	if !c.closed {
		c.known.Wait()
	}
}

// buildFilter reads every hash. The feed adds to the new filter from before the first is read.
func (c *Cache) buildFilter(ctx context.Context, s *state) error {
	defer c.unknown.building.Store(nil)
	startedAt := time.Now()
	var f *filter
	err := c.store.ScanHashes(ctx, func(server keystore.Server, keys int) error {
		f = newFilter(s.origin, keys)
		c.unknown.building.Store(f)
		return s.isOn(server)
	}, func(prefix []byte) { f.add(prefix) })
	if err != nil {
		return err
	}
	c.unknown.filter.Store(f)
	c.cfg.Logger().Info("filter of all keys is built",
		zap.Int64("keys", f.keys.Load()), zap.Int("bytes", f.bytes()), zap.Duration("took", time.Since(startedAt)))
	return nil
}

package keycache

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

const (
	// maxLookups is how many lookups run at a time. With the sync they stay within four connections.
	maxLookups = 3

	// lookupBatch is the most digests in one lookup.
	lookupBatch = 256

	// lookupTimeout leaves the rest of answerWithin for waiting in line and for the answer.
	lookupTimeout = 700 * time.Millisecond
)

// errOtherServer says that a row came from another server than the one whose changes the feed follows.
var errOtherServer = errors.New("lookup was answered by another server than the feed's")

// loader reads rows: one lookup per key at a time, and as many waiting keys in one statement as there are.
type loader struct {
	cache *Cache

	mu      sync.Mutex
	calls   map[apikey.Digest]*call // waiting and running
	waiting []*call
	running int
}

type call struct {
	digest apikey.Digest
	epoch  uint64 // loaded before the query; set when it starts
	begun  bool
	done   chan struct{}
	entry  *entry
	err    error
}

func newLoader(c *Cache) *loader {
	return &loader{cache: c, calls: make(map[apikey.Digest]*call)}
}

// load returns the row of d, read in a statement that began after the given epoch was published.
func (l *loader) load(ctx context.Context, d apikey.Digest, epoch uint64) (*entry, error) {
	c := l.join(d, epoch)
	select {
	case <-c.done:
		return c.entry, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *loader) join(d apikey.Digest, epoch uint64) *call {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A lookup that began before the epoch may hold a row from before a change that the caller must see.
	if c, ok := l.calls[d]; ok && (!c.begun || c.epoch >= epoch) {
		return c
	}
	c := &call{digest: d, done: make(chan struct{})}
	l.calls[d] = c
	l.waiting = append(l.waiting, c)
	if l.running < maxLookups {
		l.running++
		go l.run()
	}
	return c
}

// run serves the waiting calls until there are none.
func (l *loader) run() {
	for batch := l.next(); batch != nil; batch = l.next() {
		l.lookup(batch)
		l.finish(batch)
	}
}

func (l *loader) next() []*call {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(len(l.waiting), lookupBatch)
	if n == 0 {
		l.running--
		l.waiting = nil
		return nil
	}
	batch := l.waiting[:n:n]
	l.waiting = l.waiting[n:]
	epoch := l.cache.state.Load().epoch
	for _, c := range batch {
		c.epoch, c.begun = epoch, true
	}
	return batch
}

func (l *loader) finish(batch []*call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range batch {
		if l.calls[c.digest] == c {
			delete(l.calls, c.digest)
		}
		close(c.done)
	}
}

func (l *loader) lookup(batch []*call) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	digests := make([]apikey.Digest, len(batch))
	for i, c := range batch {
		digests[i] = c.digest
	}
	entries, err := l.cache.read(ctx, digests, batch[0].epoch)
	for i, c := range batch {
		if err != nil {
			c.err = err
			continue
		}
		c.entry = entries[i]
		l.cache.keep(c.entry)
	}
}

// read returns an entry for each digest, as of an epoch that the caller loaded before.
func (c *Cache) read(ctx context.Context, digests []apikey.Digest, epoch uint64) ([]*entry, error) {
	readAt := time.Now()
	c.counts.lookups.Add(1)
	found, err := c.store.Lookup(ctx, digests)
	if err != nil {
		c.counts.lookupErrors.Add(1)
		return nil, err
	}
	if found.InRecovery && c.cfg.SentAt == nil {
		return nil, errStandby
	}
	s := c.state.Load()
	if !s.syncedAt.IsZero() && (found.StartedAt != s.server.StartedAt || found.InRecovery != s.server.InRecovery) {
		return nil, errOtherServer
	}
	records := make(map[apikey.Digest]*apikey.Record, len(found.Records))
	for _, r := range found.Records {
		records[r.Digest] = r
	}
	entries := make([]*entry, len(digests))
	for i, d := range digests {
		e := &entry{readAt: readAt, pgNow: found.Now}
		if r, ok := records[d]; ok {
			e.record, e.exists = *r, true
		}
		e.record.Digest = d
		e.asOf.Store(epoch)
		entries[i] = e
	}
	return entries, nil
}

package keycache

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

const (
	// maxLookups is how many lookups run at a time. With the sync they stay within four connections.
	maxLookups = 3

	// lookupBatch is the most digests in one lookup: some 5 ms of work. A lookup that a slow Postgres does not finish in time
	// fails all of them.
	lookupBatch = 256

	// lookupTimeout leaves the rest of answerWithin for waiting in line, lookupRetryMax included, and for the answer.
	lookupTimeout = 700 * time.Millisecond

	// lookupGap is how long a lookup of one key delays the next, once lookupBurst is used up: at first each key is read at once,
	// then those that come together are read together. Every lookupShare keys more delay it as much again, up to maxLookupGap: the
	// more keys there are to read, the more share a statement.
	lookupGap    = 4 * time.Millisecond
	lookupBurst  = 32 * lookupGap
	lookupShare  = 8
	maxLookupGap = 40 * time.Millisecond

	// While lookups fail, each is delayed twice as long as the last, from lookupRetryMin to lookupRetryMax: each is an attempt to
	// connect, and a Postgres that recovers or is out of connections gets them from all edges.
	lookupRetryMin = 10 * time.Millisecond
	lookupRetryMax = 150 * time.Millisecond

	// maxWaiting bounds the memory of lookups that a Postgres which hangs leaves waiting.
	maxWaiting = 1 << 16
)

var (
	// errOtherServer says that rows came from another server than the one whose changes the feed follows.
	errOtherServer = errors.New("rows came from another server than the feed's")

	errWaiting = errors.New("too many keys wait to be looked up")
)

// loader reads rows: one lookup per key at a time, and as many waiting keys in one statement as there are.
type loader struct {
	cache *Cache
	read  func(ctx context.Context, digests []apikey.Digest, epoch uint64) ([]answer, error)

	mu        sync.Mutex
	calls     map[apikey.Digest]*call // waiting and running
	waiting   []*call                 // in the order in which they came; abandoned ones too
	running   int                     // lookups, the gathering one included
	gathering bool                    // a lookup waits for its turn
	reserved  int                     // connections that others use
	turns     pace
	retry     time.Duration // by which the last lookup's failure delays the next; 0: it did not fail
	retryAt   time.Time
}

type call struct {
	digest  apikey.Digest
	waiters int
	epoch   uint64 // loaded before the query; set when it starts
	begun   bool
	done    chan struct{}
	answer  answer
	err     error
}

// answer is what Postgres said of a key.
type answer struct {
	digest apikey.Digest
	entry  *entry    // nil: there is no such key, if proved
	proved bool      // a standby's answer proves no absence
	asOf   uint64    // epoch loaded before the row was read
	readAt time.Time // when the row was asked for
	pgNow  time.Time // Postgres's clock when it answered
}

func (a *answer) record() *apikey.Record {
	if a.entry == nil {
		return nil
	}
	return &a.entry.record
}

func newLoader(c *Cache, read func(context.Context, []apikey.Digest, uint64) ([]answer, error)) *loader {
	return &loader{cache: c, read: read, calls: make(map[apikey.Digest]*call), turns: pace{gap: lookupGap, burst: lookupBurst}}
}

// load returns the row of d, read in a statement that began after the given epoch was published.
func (l *loader) load(ctx context.Context, d apikey.Digest, epoch uint64) (answer, error) {
	c, err := l.join(d, epoch)
	if err != nil {
		return answer{}, err
	}
	select {
	case <-c.done:
		return c.answer, c.err
	case <-ctx.Done():
		l.leave(c)
		return answer{}, ctx.Err()
	}
}

func (l *loader) join(d apikey.Digest, epoch uint64) (*call, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A lookup that began before the epoch may hold a row from before a change that the caller must see.
	if c, ok := l.calls[d]; ok && (!c.begun || c.epoch >= epoch) {
		c.waiters++
		return c, nil
	}
	if len(l.waiting) >= maxWaiting {
		return nil, errWaiting
	}
	c := &call{digest: d, waiters: 1, done: make(chan struct{})}
	l.calls[d] = c
	l.waiting = append(l.waiting, c)
	l.start()
	return c, nil
}

// leave takes a waiter away. A call without any is not made.
func (l *loader) leave(c *call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.waiters--
}

// reserve sets n of the lookups' connections aside for another use, or gives them back if n is negative.
func (l *loader) reserve(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reserved += n
	l.start()
}

// start begins a lookup if one is needed and there is room for it. While lookups fail there is room for one, which the last failure
// delays. The caller holds the lock.
func (l *loader) start() {
	room := maxLookups - l.reserved
	if l.retry > 0 {
		room = 1
	}
	if l.gathering || len(l.waiting) == 0 || l.running >= room {
		return
	}
	l.running++
	l.gathering = true
	now := time.Now()
	wait := l.retryAt.Sub(now)
	if len(l.waiting) < lookupBatch {
		wait = max(wait, l.turns.wait(now))
	}
	go l.run(wait)
}

func (l *loader) run(wait time.Duration) {
	if wait > 0 {
		<-time.After(wait)
	}
	batch := l.next()
	var err error
	if len(batch) > 0 {
		err = l.lookup(batch)
	}
	l.finish(batch, err)
}

// next takes the calls for one lookup off the line.
func (l *loader) next() []*call {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gathering = false
	epoch := l.cache.state.Load().epoch
	batch := make([]*call, 0, min(len(l.waiting), lookupBatch))
	taken := 0
	for _, c := range l.waiting {
		if len(batch) == lookupBatch {
			break
		}
		taken++
		if c.waiters == 0 {
			l.forget(c)
			continue
		}
		c.epoch, c.begun = epoch, true
		batch = append(batch, c)
	}
	if l.waiting = l.waiting[taken:]; len(l.waiting) == 0 {
		l.waiting = nil // and its memory
	}
	if n := len(batch); n < lookupBatch { // nothing is gained by waiting with a full batch
		l.turns.spend(time.Now(), min(l.turns.gap*time.Duration(1+n/lookupShare), maxLookupGap))
	}
	l.start()
	return batch
}

func (l *loader) finish(batch []*call, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil && !errors.Is(err, errOtherServer): // which the next sync clears up
		l.retry = min(max(2*l.retry, lookupRetryMin), lookupRetryMax)
		l.retryAt = time.Now().Add(l.retry)
	case len(batch) > 0:
		l.retry, l.retryAt = 0, time.Time{}
	}
	for _, c := range batch {
		l.forget(c)
		close(c.done)
	}
	l.running--
	l.start()
}

func (l *loader) forget(c *call) {
	if l.calls[c.digest] == c {
		delete(l.calls, c.digest)
	}
}

func (l *loader) lookup(batch []*call) error {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	digests := make([]apikey.Digest, len(batch))
	for i, c := range batch {
		digests[i] = c.digest
	}
	answers, err := l.read(ctx, digests, batch[0].epoch)
	for i, c := range batch {
		if err != nil {
			c.err = err
			continue
		}
		c.answer = answers[i]
		l.cache.accept(&c.answer)
	}
	return err
}

// query reads rows, and counts that.
func (c *Cache) query(ctx context.Context, digests []apikey.Digest) (keystore.Found, error) {
	return c.count(c.store.Lookup(ctx, digests))
}

func (c *Cache) count(found keystore.Found, err error) (keystore.Found, error) {
	c.counts.lookups.Add(1)
	if err != nil {
		c.counts.lookupErrors.Add(1)
		c.failures.Keep(err)
	}
	return found, err
}

// read returns an answer for each digest, as of an epoch that the caller loaded before.
func (c *Cache) read(ctx context.Context, digests []apikey.Digest, epoch uint64) ([]answer, error) {
	readAt := time.Now()
	found, err := c.query(ctx, digests)
	if err != nil {
		return nil, err
	}
	if found.Server.InRecovery && c.cfg.Sent == nil {
		return nil, errStandby
	}
	if s := c.state.Load(); !s.syncedAt.IsZero() {
		if err := s.isOn(found.Server); err != nil {
			return nil, err
		}
	}
	return c.answers(found, digests, epoch, readAt, c.primary == nil), nil
}

// readPrimary is read from the primary of a standby. A server that stands where the primary stood may lag: absence there proves nothing.
func (c *Cache) readPrimary(ctx context.Context, digests []apikey.Digest, epoch uint64) ([]answer, error) {
	readAt := time.Now()
	found, err := c.cfg.Primary(ctx, digests)
	if err == nil && found.Server.InRecovery {
		err = errStandby
	}
	if found, err = c.count(found, err); err != nil {
		return nil, err
	}
	return c.answers(found, digests, epoch, readAt, true), nil
}

// readProof is read, and of keys that a standby does not have readPrimary.
func (c *Cache) readProof(ctx context.Context, digests []apikey.Digest, epoch uint64) ([]answer, error) {
	answers, err := c.read(ctx, digests, epoch)
	if err != nil {
		return nil, err
	}
	var absent []apikey.Digest
	known := answers[:0]
	for _, a := range answers {
		if a.entry == nil && !a.proved {
			absent = append(absent, a.digest)
		} else {
			known = append(known, a)
		}
	}
	if absent == nil {
		return known, nil
	}
	proved, err := c.readPrimary(ctx, absent, epoch)
	return append(known, proved...), err
}

func (c *Cache) answers(found keystore.Found, digests []apikey.Digest, epoch uint64, readAt time.Time, proved bool) []answer {
	records := make(map[apikey.Digest]*apikey.Record, len(found.Records))
	for _, r := range found.Records {
		records[r.Digest] = c.latest(r)
	}
	answers := make([]answer, len(digests))
	for i, d := range digests {
		answers[i] = answer{digest: d, proved: proved, asOf: epoch, readAt: readAt, pgNow: found.Now}
		if r, ok := records[d]; ok {
			answers[i].entry = newEntry(*r, epoch)
		}
	}
	return answers
}

// accept keeps what Postgres said of a key.
func (c *Cache) accept(a *answer) {
	switch {
	case a.entry != nil:
		c.learn(&a.digest)
		c.keepFound(a.entry)
	case a.proved:
		c.unknown.slot(&a.digest).Store(&absence{digest: a.digest, asOf: a.asOf, at: a.readAt})
	}
}

// keepFound keeps a row that a lookup brought.
func (c *Cache) keepFound(e *entry) {
	if c.cfg.Sent != nil && !e.record.RevokedAt.IsZero() {
		c.revokedAhead.LoadOrStore(e.record.Digest, revokedRow{e, time.Now()})
	}
	c.keep(e)
}

// Package ratelimit holds each key to its rate, its burst and its number of concurrent requests.
//
// The algorithm is GCRA, the generic cell rate algorithm (ITU-T I.371), a leaky bucket written as one moment: the time at
// which the bucket would be empty again. A request moves it on by the interval between two requests at the sustained rate, and is
// refused if it then lay further ahead than the burst allows. It was chosen over a sliding window because its whole
// state is one number that one atomic operation changes, it needs no timer and no memory of past requests, it lets
// nobody double a limit at the edge of a window, and it knows to the nanosecond when the next request will pass.
package ratelimit

import (
	"context"
	"encoding/binary"
	"maps"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/outage"
)

// burstWindow is the time in which a key may make its burst (REKALL.md, "Rate limits").
const burstWindow = 15 * time.Second

// Limit is what a key may do. The zero value limits nothing. A Burst of less than a quarter of PerMinute counts as that.
type Limit apikey.Limits

// interval is the time between two requests at the sustained rate.
func (l Limit) interval() int64 { return int64(time.Minute) / int64(l.PerMinute) }

// depth is how many requests may come at once: as many as make Burst in a burstWindow together with those that the sustained
// rate lets through meanwhile.
func (l Limit) depth() int64 {
	return max(1, int64(l.Burst)-int64(l.PerMinute)*int64(burstWindow)/int64(time.Minute))
}

// Verdict is the answer to one request.
type Verdict struct {
	Allowed    bool
	Concurrent bool          // of a refusal: for too many requests at a time, and not for their rate
	Remaining  int           // requests that would pass now
	ResetAfter time.Duration // until the whole burst is available again
	RetryAfter time.Duration // of a refusal: when a request will pass, if no other comes before it
}

// concurrencyRetry is what a key with too many requests at a time is told: nobody knows when one will end.
const concurrencyRetry = time.Second

// Bucket is what is known of one key's requests.
type Bucket struct {
	emptyAt    atomic.Int64 // nanoseconds since the limiter's start, or givenBack
	concurrent atomic.Int64
	lease      *lease // of a limiter with a store: what it holds of the key's bucket there
}

// givenBack marks a bucket that was idle and is no longer in the table: what is taken from it would be forgotten.
const givenBack = math.MaxInt64

// take asks for one request at now. It reports false if the bucket was given back.
func (b *Bucket) take(l Limit, now int64) (Verdict, bool) {
	if l.PerMinute <= 0 {
		return Verdict{Allowed: true}, b.emptyAt.Load() != givenBack
	}
	return b.takeAt(l.interval(), l.depth(), now)
}

func (b *Bucket) takeAt(interval, depth, now int64) (Verdict, bool) {
	for {
		old := b.emptyAt.Load()
		if old == givenBack {
			return Verdict{}, false
		}
		if full := now + depth*interval; old > full { // what another limit left behind
			b.emptyAt.CompareAndSwap(old, full)
			continue
		}
		next := max(old, now) + interval
		if early := next - now - depth*interval; early > 0 {
			return Verdict{ResetAfter: time.Duration(old - now), RetryAfter: time.Duration(early)}, true
		}
		if b.emptyAt.CompareAndSwap(old, next) {
			return Verdict{
				Allowed: true, Remaining: int(depth - (next-now+interval-1)/interval), ResetAfter: time.Duration(next - now),
			}, true
		}
	}
}

// peekAt tells what is left, and takes nothing.
func (b *Bucket) peekAt(interval, depth, now int64) Verdict {
	owed := int64(0)
	if emptyAt := b.emptyAt.Load(); emptyAt != givenBack { // only an idle bucket is, or was about to be
		owed = min(max(emptyAt-now, 0), depth*interval)
	}
	return Verdict{
		Remaining:  int(max(0, depth-(owed+interval-1)/interval)),
		ResetAfter: time.Duration(owed), RetryAfter: time.Duration(max(0, owed-(depth-1)*interval)),
	}
}

// giveBack gives the bucket back if it knows nothing that a new one would not. The mark comes before the look at the requests:
// one that counts itself in afterwards sees the mark.
func (b *Bucket) giveBack(now int64) bool {
	emptyAt := b.emptyAt.Load()
	if emptyAt > now || b.concurrent.Load() != 0 || !b.lease.idle() || !b.emptyAt.CompareAndSwap(emptyAt, givenBack) {
		return false
	}
	if b.concurrent.Load() != 0 {
		b.emptyAt.Store(emptyAt) // those who saw the mark look again, once the shard is unlocked
		return false
	}
	return true
}

const shards = 64

// Limiter has the buckets of the keys that were in use lately.
type Limiter struct {
	start  time.Time // of the monotonic clock that buckets count in: nobody can set it
	store  *store    // nil: limits hold at this edge alone
	shards [shards]shard
}

type shard struct {
	mu      sync.RWMutex
	buckets map[apikey.Digest]*Bucket
	most    int // buckets that there were since the map was made: it does not shrink by itself
}

// New returns a limiter of this edge alone.
func New() *Limiter {
	l := &Limiter{start: time.Now()}
	for i := range l.shards {
		l.shards[i].buckets = make(map[apikey.Digest]*Bucket)
	}
	return l
}

// Acquire asks for one request of a key. If it is allowed, Release of the bucket must follow when the request has ended. Until ctx
// is done, it may wait for the store, a tenth of a second at most, rather than refuse what is within the limit.
func (l *Limiter) Acquire(ctx context.Context, d apikey.Digest, limit Limit) (*Bucket, Verdict) {
	for {
		b := l.bucket(d)
		if verdict, ok := l.acquire(ctx, b, limit); ok {
			return b, verdict
		}
	}
}

// acquire asks a bucket for one request. It reports false if the bucket was given back. No place may be held there then: giveBack
// keeps a bucket in which it sees one.
func (l *Limiter) acquire(ctx context.Context, b *Bucket, limit Limit) (Verdict, bool) {
	if running := b.concurrent.Add(1); limit.Concurrent > 0 && running > int64(limit.Concurrent) {
		b.Release()
		return l.tooMany(b, limit, int64(time.Since(l.start))), true
	}
	verdict, ok := l.take(ctx, b, limit)
	if !verdict.Allowed || !ok {
		b.Release()
	}
	return verdict, ok
}

func (l *Limiter) take(ctx context.Context, b *Bucket, limit Limit) (Verdict, bool) {
	if l.store != nil {
		return l.store.acquire(ctx, b, limit)
	}
	return b.take(limit, int64(time.Since(l.start)))
}

// tooMany refuses a request for the number of those at a time. When it will pass nobody knows, but not before its rate allows
// it.
func (l *Limiter) tooMany(b *Bucket, limit Limit, now int64) Verdict {
	v := Verdict{RetryAfter: concurrencyRetry, Concurrent: true}
	if limit.PerMinute <= 0 {
		return v
	}
	rate := l.peek(b, limit, now)
	v.Remaining, v.ResetAfter, v.RetryAfter = rate.Remaining, rate.ResetAfter, max(v.RetryAfter, rate.RetryAfter)
	return v
}

func (l *Limiter) peek(b *Bucket, limit Limit, now int64) Verdict {
	if l.store != nil {
		return l.store.peek(b, limit, now)
	}
	return b.peekAt(limit.interval(), limit.depth(), now)
}

// Release says that a request that was allowed has ended.
func (b *Bucket) Release() { b.concurrent.Add(-1) }

// bucket returns the bucket of a key. None in the table was given back: it is marked and removed under one lock.
func (l *Limiter) bucket(d apikey.Digest) *Bucket {
	s := &l.shards[binary.LittleEndian.Uint16(d[:])%shards]
	s.mu.RLock()
	b := s.buckets[d]
	s.mu.RUnlock()
	if b != nil {
		return b
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.buckets[d]; b != nil {
		return b
	}
	b = new(Bucket)
	if l.store != nil {
		b.lease = newLease(l.store, d, b)
	}
	s.buckets[d] = b
	s.most = max(s.most, len(s.buckets))
	return b
}

// Run gives back the state of idle keys now and then, and keeps up with the store if there is one, until ctx is done.
func (l *Limiter) Run(ctx context.Context) {
	var running sync.WaitGroup
	if l.store != nil {
		running.Go(func() { l.store.run(ctx) })
	}
	ticker := time.NewTicker(burstWindow)
	defer ticker.Stop()
	for ctx.Err() == nil {
		select {
		case <-ticker.C:
			l.giveBackIdle()
		case <-ctx.Done():
		}
	}
	running.Wait()
}

// giveBackIdle forgets the buckets that are full and not in use.
func (l *Limiter) giveBackIdle() {
	now := int64(time.Since(l.start))
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		for d, b := range s.buckets {
			if b.giveBack(now) {
				delete(s.buckets, d)
			}
		}
		if left := len(s.buckets); left < s.most/4 {
			smaller := make(map[apikey.Digest]*Bucket, left)
			maps.Copy(smaller, s.buckets)
			s.buckets, s.most = smaller, left
		}
		s.mu.Unlock()
	}
}

// leases calls each with the lease of every bucket.
func (l *Limiter) leases(each func(*lease)) {
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.RLock()
		for _, b := range s.buckets {
			each(b.lease)
		}
		s.mu.RUnlock()
	}
}

// Status is the state of a limiter. All but Keys is zero if it shares no limits.
type Status struct {
	Keys      int    // that were in use lately
	Fallback  bool   // whether this edge holds keys to its part of their limits, because Redis does not answer
	Outages   uint64 // times that Redis did not answer
	Exchanges uint64 // round trips
}

// Status returns the state of the limiter.
func (l *Limiter) Status() Status {
	status := Status{Keys: l.size()}
	if s := l.store; s != nil {
		status.Fallback, status.Outages, status.Exchanges = s.fallback.Load(), s.outages.Load(), s.exchanges.Load()
	}
	return status
}

// LastFailure returns the last time that Redis could not be shared through; nil: never, or nothing is shared.
func (l *Limiter) LastFailure() *outage.Failure {
	if l.store == nil {
		return nil
	}
	return l.store.failures.Last()
}

// size returns the number of buckets.
func (l *Limiter) size() int {
	n := 0
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.RLock()
		n += len(s.buckets)
		s.mu.RUnlock()
	}
	return n
}

package ratelimit

import (
	"context"
	"encoding/hex"
	"math"
	"sync/atomic"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// A key's limit holds across edges because Redis has the key's bucket, from which each edge leases requests ahead of need. A
// request spends what is leased, and does not call Redis: one goroutine leases, gives back and settles for all keys.
//
// An edge that has run out may run ahead of Redis by a few requests (lease.ahead), which Redis is told of and which are paid
// back before anything more is leased. So all edges together let through at most what the limit allows and what they may run
// ahead by, and what they hold for the next burst, which is paid for while Redis's bucket drains behind it: together less than a
// twentieth of what a minute may hold, or two requests for each edge if that is more.
//
// A request beyond that waits for the exchange under way where Redis has something left as far as this edge knows: to refuse it
// would be wrong. It waits no longer than patience, and then goes by this edge's part of the limit.

// lease is what this edge holds of a key's bucket in Redis.
type lease struct {
	key    string // in Redis
	bucket *Bucket
	store  *store

	held   atomic.Int64 // requests that may be spent; below zero: spent ahead of Redis
	asks   atomic.Int64 // requests since the last exchange, allowed or not
	low    atomic.Int64 // a request that finds less held than this asks for an exchange
	next   atomic.Int64 // when Redis has a request for this edge again, on the limiter's clock; 0: never asked
	left   atomic.Int64 // that Redis had at the last exchange
	minute atomic.Int64 // Limit.PerMinute of the last request
	depth  atomic.Int64 // Limit.depth of the last request

	changed atomic.Bool // minute or depth, since the last exchange

	exchanged atomic.Pointer[chan struct{}] // closed by the next exchange; nil: no request waits for it

	asked atomic.Bool // in store.asking
	after *lease      // the next one there

	// Of the goroutine that exchanges:
	followed bool   // in store.followed
	at       int64  // of the last exchange
	looked   bool   // again, after the last one for a request
	due      int64  // of the next one, unless the lease asks for it earlier
	told     uint64 // the epoch in which Redis was told what this edge had let through before
}

func newLease(s *store, d apikey.Digest, b *Bucket) *lease {
	l := &lease{key: "rekall:rl:{" + hex.EncodeToString(d[:16]) + "}", bucket: b, store: s, told: s.epoch.Load()}
	l.low.Store(math.MaxInt64)
	return l
}

// Which part of what a minute may hold all edges together may let through beyond the limit, by running ahead, and by what they hold
// for the next burst. The rest is for what leases hold for leaseFor.
const (
	overPerMinute  = 20
	aheadPerMinute = 40
	sparePerMinute = 60
)

// ahead returns how many requests may be spent that are not leased.
func (l *lease) ahead(limit Limit, edges, now int64) int64 {
	most := max(1, limit.inAMinute()/(aheadPerMinute*edges))
	next := l.next.Load()
	switch {
	case next == 0 || l.left.Load() > most*edges:
		return most
	case next > now:
		return 0
	}
	// The bucket has filled since. What this edge may take of it without asking is its share.
	return min(most, 1+(now-next)/(limit.interval()*edges))
}

// acquire asks for one request. It reports false if the bucket was given back.
func (s *store) acquire(ctx context.Context, b *Bucket, limit Limit) (Verdict, bool) {
	verdict, ok := s.take(b, limit, s.now())
	if verdict.Allowed || !ok || verdict.Remaining == 0 {
		return verdict, ok
	}
	timeout := time.NewTimer(s.patience)
	defer timeout.Stop()
	for {
		exchanged := b.lease.nextExchange() // before the look at what there is: an exchange may come in between
		verdict, ok = s.take(b, limit, s.now())
		if verdict.Allowed || !ok || verdict.Remaining == 0 {
			return verdict, ok
		}
		select {
		case <-exchanged:
		case <-timeout.C:
			return s.takeShare(b, limit, s.edges.Load(), s.now())
		case <-ctx.Done():
			return verdict, true
		}
	}
}

func (s *store) now() int64 { return int64(time.Since(s.start)) }

// inAMinute is what a minute may hold.
func (l Limit) inAMinute() int64 { return int64(l.PerMinute) + l.depth() }

// take asks for one request at now, and does not wait. It reports false if the bucket was given back. A refusal with something
// remaining is only this edge's, for what it has not leased yet.
func (s *store) take(b *Bucket, limit Limit, now int64) (Verdict, bool) {
	if limit.PerMinute <= 0 {
		return b.take(limit, now)
	}
	l, edges := b.lease, s.edges.Load()
	l.asks.Add(1)
	l.know(limit)
	if s.fallback.Load() {
		return s.takeShare(b, limit, edges, now)
	}
	for {
		held := l.held.Load()
		if ahead := l.ahead(limit, edges, now); held <= 0 && held <= -ahead {
			verdict := l.refusal(limit, edges, ahead, held, now)
			if verdict.Remaining > 0 {
				l.push()
			} else {
				l.ask(held)
			}
			return verdict, b.emptyAt.Load() != givenBack
		}
		if l.held.CompareAndSwap(held, held-1) {
			l.ask(held - 1)
			return allowance(limit, l.remaining(limit, held, now)-1), b.noteShare(limit, edges, now)
		}
	}
}

func (l *lease) know(limit Limit) {
	minute, depth := int64(limit.PerMinute), limit.depth()
	if known := l.minute.Load(); known != minute || l.depth.Load() != depth {
		l.depth.Store(depth)
		l.minute.Store(minute)
		l.changed.Store(known != 0)
	}
}

// ask puts the lease on the list for the next exchange, if it is low.
func (l *lease) ask(held int64) {
	if held < l.low.Load() {
		l.push()
	}
}

// push puts the lease on the list for the next exchange.
func (l *lease) push() {
	if !l.asked.Load() && l.asked.CompareAndSwap(false, true) {
		l.store.push(l)
	}
}

// nextExchange returns a channel that is closed when the next exchange is over.
func (l *lease) nextExchange() <-chan struct{} {
	for {
		if exchanged := l.exchanged.Load(); exchanged != nil {
			return *exchanged
		}
		exchanged := make(chan struct{})
		if l.exchanged.CompareAndSwap(nil, &exchanged) {
			return exchanged
		}
	}
}

// wake has the requests look again that wait for an exchange.
func (l *lease) wake() {
	if exchanged := l.exchanged.Swap(nil); exchanged != nil {
		close(*exchanged)
	}
}

// peek tells what is left, and takes nothing.
func (s *store) peek(b *Bucket, limit Limit, now int64) Verdict {
	l, edges := b.lease, s.edges.Load()
	if s.fallback.Load() {
		interval, depth := limit.share(edges)
		v := b.peekAt(interval, depth, now)
		if v.Remaining == 0 {
			v.RetryAfter = time.Duration(interval)
		}
		return v
	}
	held := l.held.Load()
	v := allowance(limit, l.remaining(limit, held, now))
	if ahead := l.ahead(limit, edges, now); held <= -ahead {
		v.RetryAfter = l.refusal(limit, edges, ahead, held, now).RetryAfter
	}
	return v
}

// remaining is how many requests would pass, as far as this edge knows: what it holds, what Redis had left and what has come
// since. A key that Redis was never asked about is as one that nobody has used.
func (l *lease) remaining(limit Limit, held, now int64) int64 {
	next := l.next.Load() // before what is left: of an answer that is being booked, that is written first
	left := l.left.Load()
	switch {
	case next == 0:
		left = limit.depth()
	case next <= now:
		left = max(left, 1) + (now-next)/limit.interval()
	}
	return min(limit.depth(), held+left)
}

func allowance(limit Limit, remaining int64) Verdict {
	return Verdict{
		Allowed: true, Remaining: int(max(0, remaining)), ResetAfter: time.Duration((limit.depth() - remaining) * limit.interval()),
	}
}

// refusal tells when a request will pass: what is owed is paid back first, and each other edge may have run ahead as far as
// this one may, and by one at least, of which Redis did not know yet. What remains in Redis is leased by then.
func (l *lease) refusal(limit Limit, edges, ahead, held, now int64) Verdict {
	if remaining := l.remaining(limit, held, now); remaining > 0 {
		v := allowance(limit, remaining)
		v.Allowed, v.RetryAfter = false, patience
		return v
	}
	interval := limit.interval()
	wait := max(l.next.Load()-now, 0)
	return Verdict{
		RetryAfter: time.Duration(wait + (1+(edges-1)*max(1, ahead)-min(held, 0))*interval),
		ResetAfter: time.Duration(wait + (limit.depth()-min(held, 0))*interval),
	}
}

// debt is how many requests beyond its depth the key's bucket may still owe at the next exchange. After a change of limits that is
// none, and for an edge that does not know of one what others may have run ahead by: else the old limits would count for longer
// than the new ones take to refill. Otherwise it is what edges may have reported after an outage.
func (l *lease) debt() int64 {
	minute, depth := l.minute.Load(), l.depth.Load()
	switch {
	case l.changed.Swap(false):
		return 0
	case l.next.Load() == 0:
		return (minute + depth) / overPerMinute
	}
	return minute + 2*depth
}

// share is this edge's part of the limit.
func (l Limit) share(edges int64) (interval, depth int64) {
	return l.interval() * edges, max(1, l.depth()/edges)
}

// takeShare asks this edge's part of the limit for one request: what holds while Redis does not answer. Whoever is refused may come to
// another edge next, whose part was used up later.
func (s *store) takeShare(b *Bucket, limit Limit, edges, now int64) (Verdict, bool) {
	interval, depth := limit.share(edges)
	verdict, ok := b.takeAt(interval, depth, now)
	if verdict.Allowed {
		b.lease.held.Add(-1)
	} else {
		verdict.RetryAfter = time.Duration(interval)
	}
	b.lease.ask(b.lease.held.Load())
	return verdict, ok
}

// noteShare counts a request in this edge's part of the limit, so that nobody begins an outage with a full one. It reports
// false if the bucket was given back.
func (b *Bucket) noteShare(limit Limit, edges, now int64) bool {
	interval, depth := limit.share(edges)
	full := now + depth*interval
	for {
		old := b.emptyAt.Load()
		if old == givenBack {
			return false
		}
		if next := min(max(old, now)+interval, full); next == old || b.emptyAt.CompareAndSwap(old, next) {
			return true
		}
	}
}

// outstanding is what this edge let through lately and its part of the limit still remembers.
func (l *lease) outstanding(edges, now int64) int64 {
	emptyAt := l.bucket.emptyAt.Load()
	if emptyAt == givenBack || emptyAt <= now {
		return 0
	}
	interval := l.interval() * edges
	return min((emptyAt-now+interval-1)/interval, max(1, l.depth.Load()/edges))
}

func (l *lease) interval() int64 { return int64(time.Minute) / l.minute.Load() }

// idle reports whether nothing is held or owed, and no exchange is to change that. A bucket without a store has no lease.
func (l *lease) idle() bool {
	return l == nil || l.held.Load() == 0 && l.low.Load() == math.MaxInt64 && !l.asked.Load()
}

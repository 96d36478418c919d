package ratelimit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/outage"
)

const (
	// tick is how often the leases are looked at that have not asked.
	tick = 20 * time.Millisecond

	// settleEvery is how often a lease in use is settled: an edge that a key no longer comes to gives back within twice this.
	settleEvery = 100 * time.Millisecond

	// leaseFor is how long a lease lasts at the rate of the requests before it.
	leaseFor = 2 * settleEvery

	// lookAgainAfter is how long a key that must wait has to stay away before Redis is asked again how long: by then other edges
	// have given back what they leased.
	lookAgainAfter = 3 * settleEvery

	// patience is how long Redis may take before this edge goes on without it.
	patience = 100 * time.Millisecond

	// probeEvery is how often Redis is asked whether it is there, while it is not or while no key needs it.
	probeEvery = 500 * time.Millisecond
)

// store is the Redis in which edges share the limits of keys, for one limiter. While it does not answer, each edge holds keys to its
// part of their limits.
type store struct {
	client    *redis.Client
	connected atomic.Bool
	count     func() int
	logger    func() *zap.Logger
	start     time.Time
	patience  time.Duration // what the constant says, but in tests

	edges    atomic.Int64
	fallback atomic.Bool
	outages  atomic.Uint64
	epoch    atomic.Uint64         // rises with each outage, and each time that Redis was emptied
	asking   atomic.Pointer[lease] // a list, to which requests add without a lock
	wake     chan struct{}

	all       func(each func(*lease))
	followed  []*lease // that hold or owe something
	failures  outage.Failures
	data      string // names what Redis has: a new name tells that it was emptied, or has older data
	probes    int64  // that the data had seen at this edge's last
	emptied   uint64 // the epoch that began with that, the last time
	explained int    // telling() of the outage's cause, as far as it was logged

	exchanges atomic.Uint64
}

// NewShared returns a limiter that shares the limits of keys with those of other edges, in a Redis to which it does not connect before
// Run. Concurrent requests are limited at this edge alone. url is redis://user:password@host:6379/0, or rediss:// for TLS. edges
// returns how many edges share the limits now, this one included; it must not block. logger is asked at each line.
func NewShared(url string, edges func() int, logger func() *zap.Logger) (*Limiter, error) {
	l := New()
	s := &store{count: edges, logger: logger, start: l.start, patience: patience, wake: make(chan struct{}, 1), all: l.leases}
	s.edges.Store(int64(max(1, edges())))
	var err error
	if s.client, err = newClient(url, s.connect); err != nil {
		return nil, err
	}
	l.store = s
	return l, nil
}

var (
	errConnectionLost = errors.New("the connection was lost")
	errEmptied        = errors.New("redis was emptied")
	errSlow           = fmt.Errorf("no answer within %s", patience)
)

// connect refuses a connection that replaces another, unless the outage is known: Redis may have been restarted empty, and
// is to be told first what was let through.
func (s *store) connect() error {
	if s.connected.Swap(true) && !s.fallback.Load() {
		return errConnectionLost
	}
	return nil
}

// run exchanges leases until ctx is done, gives all of them back and closes the connections.
func (s *store) run(ctx context.Context) {
	defer func() { _ = s.client.Close() }()
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	var probeAt time.Time
	for {
		if now := time.Now(); now.After(probeAt) {
			s.edges.Store(int64(max(1, s.count())))
			s.probe(ctx)
			probeAt = now.Add(probeEvery)
		}
		ticked := false
		select {
		case <-ctx.Done():
			s.giveAllBack(context.WithoutCancel(ctx))
			return
		case <-s.wake:
		case <-ticker.C:
			ticked = true
		}
		asking := s.follow()
		if s.fallback.Load() {
			continue
		}
		if !ticked {
			s.settle(ctx, asking)
			continue
		}
		s.settle(ctx, s.followed)
		s.unfollow()
	}
}

// push adds a lease to the list of those that ask for an exchange.
func (s *store) push(l *lease) {
	for {
		l.after = s.asking.Load()
		if s.asking.CompareAndSwap(l.after, l) {
			break
		}
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// follow takes the leases that ask and follows them until they are idle again.
func (s *store) follow() []*lease {
	var asking []*lease
	for l := s.asking.Swap(nil); l != nil; {
		after := l.after
		l.low.Store(math.MinInt64) // until it is settled
		l.asked.Store(false)
		l.due = 0
		asking = append(asking, l)
		if !l.followed {
			l.followed = true
			s.followed = append(s.followed, l)
		}
		l = after
	}
	return asking
}

// settle exchanges what is due. It reports whether all answers were usable and in time.
func (s *store) settle(ctx context.Context, leases []*lease) bool {
	now := s.now()
	ok := true
	var batch []settlement
	for _, l := range leases {
		if l.due > now {
			continue
		}
		if b, needed := s.plan(l, now); needed {
			b.debt = l.debt()
			batch = append(batch, b)
		}
		if len(batch) == maxBatch {
			ok = s.exchange(ctx, batch) && ok
			batch = batch[:0]
		}
	}
	return s.exchange(ctx, batch) && ok
}

// plan says what a lease needs; nothing if it may stay as it is.
func (s *store) plan(l *lease, now int64) (settlement, bool) {
	edges := s.edges.Load()
	asks, held := l.asks.Swap(0), l.held.Load()
	b := settlement{lease: l, epoch: l.told, want: s.wanted(l, asks, edges, now)}
	if asks == 0 && held == 0 && l.told >= s.emptied {
		again := l.at + int64(lookAgainAfter)
		switch {
		case l.looked || l.next.Load() < again:
			return b, false // and it stays due, so that unfollow leaves it alone
		case now < again:
			l.due = again
			return b, false
		}
		l.looked, l.due = true, now+int64(settleEvery)
		return b, true
	}
	l.looked, l.due = false, now+int64(settleEvery)
	switch epoch := s.epoch.Load(); {
	case l.told != epoch:
		// What was let through in the outage beyond this edge's part was nobody's to give: only what that still remembers counts.
		b.owed = max(0, -held)
		b.spent = l.outstanding(edges, now)
		if l.told >= s.emptied { // Redis knows what was let through before
			b.spent = min(b.spent, b.owed)
		}
		b.epoch = epoch
	case held < 0:
		b.owed, b.spent = -held, -held
	case held > b.want+b.want/2:
		// Taken before it is given: no request may spend it meanwhile.
		if !l.held.CompareAndSwap(held, b.want) {
			l.due = 0
			l.asks.Add(asks)
			return b, false
		}
		b.spent, b.want = b.want-held, 0
	default:
		b.want = max(0, b.want-held)
	}
	if s.fallback.Load() {
		b.want = 0
	}
	if b.spent == 0 && b.want == 0 && b.owed == 0 {
		l.told = b.epoch
		l.low.Store((held + 1) / 2)
		return b, false
	}
	return b, true
}

// wanted is what the lease should hold: enough for a while at the rate of the requests since the last exchange, and, while
// the bucket has plenty, something for the next burst. Never more than half of what is there, which others may need more.
func (s *store) wanted(l *lease, asks, edges, now int64) int64 {
	if asks == 0 {
		return 0
	}
	minute, left := l.minute.Load(), l.depth.Load()
	spare := (minute + left) / (sparePerMinute * edges)
	demand := 2 * asks
	if l.at != 0 {
		elapsed := now - l.at
		left = min(left, l.left.Load()+elapsed/l.interval())
		demand = asks*int64(leaseFor)/max(elapsed, int64(tick)) + 1
	}
	return max(1, min(demand+min(left/(4*edges), spare), left/2))
}

// exchange sends a batch and books the answers. It reports whether all were usable and in time.
func (s *store) exchange(ctx context.Context, batch []settlement) bool {
	if len(batch) == 0 {
		return true
	}
	// Not cut short when the gateway ends: what is sent counts.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), exchangeTimeout)
	defer cancel()
	slow := time.AfterFunc(s.patience, func() { s.fall(errSlow) })
	err := s.trade(ctx, batch)
	inTime := slow.Stop()
	if err != nil {
		s.explain(err)
	}
	for _, b := range batch {
		b.lease.wake()
	}
	return inTime && err == nil
}

func (s *store) trade(ctx context.Context, batch []settlement) error {
	s.send(ctx, batch)
	undone, err := s.bookAll(batch)
	if err != nil || len(undone) == 0 {
		return err
	}
	if err := exchangeScript.Load(ctx, s.client).Err(); err != nil {
		return fmt.Errorf("load the script: %w", err)
	}
	s.send(ctx, undone)
	if undone, err = s.bookAll(undone); len(undone) > 0 {
		err = undone[0].answer.Err()
	}
	return err
}

// bookAll applies the answers. It returns what was not done because Redis does not have the script: it is new.
func (s *store) bookAll(batch []settlement) (undone []settlement, err error) {
	for _, b := range batch {
		if scriptMissing(b.answer.Err()) {
			undone = append(undone, b)
		} else if bookErr := s.book(b); bookErr != nil {
			err = bookErr
		}
	}
	return undone, err
}

// book applies an answer to its lease.
func (s *store) book(b settlement) error {
	l := b.lease
	leased, left, wait, err := b.answered()
	if err != nil {
		return err
	}
	now := s.now()
	l.at, l.told = now, b.epoch
	l.left.Store(left)
	l.next.Store(now + int64(wait))
	l.held.Add(b.owed + leased)
	if wait > 0 {
		// Nothing is to be had before: a flood of refused requests costs Redis no more than this.
		l.low.Store(math.MinInt64)
		l.due = now + min(max(int64(wait), int64(tick)), int64(settleEvery))
	} else {
		l.low.Store(max(1, (l.held.Load()+1)/2))
		l.due = now + int64(settleEvery)
	}
	return nil
}

// unfollow leaves the leases alone that hold and owe nothing and that nobody asks.
func (s *store) unfollow() {
	now := s.now()
	kept := s.followed[:0]
	for _, l := range s.followed {
		if l.due > now || l.asks.Load() != 0 || l.held.Load() != 0 || l.asked.Load() {
			kept = append(kept, l)
			continue
		}
		l.low.Store(math.MaxInt64)
		// A request that came in between has seen the old mark and not asked.
		if l.asks.Load() != 0 || l.held.Load() != 0 {
			kept = append(kept, l)
			continue
		}
		l.followed, l.at = false, 0
	}
	clear(s.followed[len(kept):])
	s.followed = kept
}

// fall goes on without Redis, and reports whether it did not before. It is called by the timer of a slow exchange as well.
func (s *store) fall(err error) bool {
	s.failures.Keep(err)
	if !s.fallback.CompareAndSwap(false, true) {
		return false
	}
	s.outages.Add(1)
	s.epoch.Add(1)
	s.logger().Warn("rate limit store does not answer; this edge holds keys to its part of their limits until it does",
		zap.Int64("edges", s.edges.Load()), zap.Error(err))
	return true
}

// probe asks Redis whether it is there. After an outage it first settles all leases, while requests still go by this edge's
// part: else those of before would be refused for what was let through meanwhile. A Redis that was emptied is told of all keys,
// and leased from when the other edges have told it as well.
func (s *store) probe(ctx context.Context) {
	probe, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	slow := time.AfterFunc(s.patience, func() { s.fall(errSlow) })
	data, err := s.nameOfData(probe)
	inTime := slow.Stop()
	switch {
	case ctx.Err() != nil:
		return
	case err == nil && !inTime:
		err = errSlow
	}
	if err != nil {
		s.explain(err)
		s.forget()
		return
	}
	emptied := s.data != data
	if emptied {
		if s.data != "" {
			s.fall(errEmptied)
			s.epoch.Add(1) // in an outage too: it may have been emptied twice
		}
		s.data, s.emptied = data, s.epoch.Load()
	}
	if !s.fallback.Load() {
		return
	}
	if emptied {
		s.all(func(l *lease) {
			if l.asked.CompareAndSwap(false, true) {
				s.push(l)
			}
		})
		s.follow()
	}
	for _, l := range s.followed {
		l.due = 0
	}
	// It may answer probes alone, such as to a user who may not write buckets, and there may be nothing to settle.
	if !s.exchange(ctx, []settlement{trial()}) || !s.settle(ctx, s.followed) {
		s.forget()
		return
	}
	if !emptied {
		s.explained = 0
		s.fallback.Store(false)
		s.logger().Info("rate limit store answers again")
	}
}

// explain goes on without Redis, and has the log say why, unless it has said as much of this outage.
func (s *store) explain(err error) {
	telling := telling(err)
	if s.fall(err) {
		s.explained = telling
	} else if telling > max(1, s.explained) { // such as a missing password, seen only after the old connection's end
		s.explained = telling
		s.logger().Warn("rate limit store fails", zap.Error(err))
	}
}

// telling says how much an error tells of an outage's cause, from 1 to 3: an outage has that many lines in the log at most.
func telling(err error) int {
	var network *net.OpError
	switch {
	case errors.Is(err, errSlow), errors.Is(err, errConnectionLost), errors.Is(err, context.DeadlineExceeded):
		return 1
	case errors.As(err, &network), errors.Is(err, io.EOF):
		return 2
	}
	return 3 // such as Redis's own word
}

// forget drops what an outage has made useless to settle: leases of keys that no longer come.
func (s *store) forget() {
	now, edges := s.now(), s.edges.Load()
	for _, l := range s.followed {
		if l.asks.Swap(0) == 0 && l.outstanding(edges, now) == 0 {
			l.held.Store(0)
			l.due = 0
		}
	}
	s.unfollow()
}

// giveAllBack settles for the last time, so that the other edges have at once what this one held.
func (s *store) giveAllBack(ctx context.Context) {
	s.follow()
	if s.fallback.Load() {
		return
	}
	for _, l := range s.followed {
		l.asks.Store(0)
		l.due = 0
	}
	s.settle(ctx, s.followed)
}

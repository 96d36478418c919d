package keycache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/clock"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

const (
	// syncTimeout bounds one sync. A sync that takes longer would tell little that is fresh.
	syncTimeout = 2 * time.Second

	// maxLate is how many readings in a row that time out make the next ones smaller.
	maxLate = 3

	// fewChanges are read in time over the slowest link to Postgres.
	fewChanges = 1000

	// firstReportWithin is how long the first report of this edge may take to come to a standby without a word about it.
	firstReportWithin = 5 * time.Second

	// wakeGap is the least time between two syncs, so that a storm of changes does not become a storm of statements.
	wakeGap = 5 * time.Millisecond

	listenRetryMin = 100 * time.Millisecond
	listenRetryMax = 5 * time.Second
)

var (
	errStandby = errors.New("database is a standby, which may be blind to changes: name the primary, and the standby as read_database")
	errBlind   = errors.New("the standby has not replayed a recent report of this edge")
)

// Run keeps the cache true until ctx is done: it syncs every Refresh, at once when Postgres notifies of a change, and
// watches the requests in flight, which it cuts at its end. It must run once.
func (c *Cache) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { c.watch(ctx) })
	wg.Go(func() { c.fillLoop(ctx) })
	if !c.cfg.NoListen {
		wg.Go(func() { c.listen(ctx) })
	}
	c.syncLoop(ctx)
	wg.Wait()
	c.stopped.Store(true)
	for shard := range c.flight {
		c.flight.each(shard, func(f *Flight) { c.cut(f, apikey.Unavailable) })
	}
}

func (c *Cache) syncLoop(ctx context.Context) {
	syncing := outage.Kind{Over: "key sync works again", Level: zap.ErrorLevel}
	for ctx.Err() == nil {
		c.unknown.unwant()
		startedAt := time.Now()
		err := c.sync(ctx)
		took := clock.Age(startedAt, time.Now())
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && took > syncTimeout+leapNoticed:
			continue // it is not Postgres that took so long: the process stood still
		case errors.Is(err, errBlind) && clock.Age(c.madeAt, time.Now()) < firstReportWithin:
			c.failures.Keep(err) // no fault yet; but a reload that is refused says why
		default:
			c.note(&syncing, err, took)
		}
		least, gap := wakeGap, max(proofGap, proofShare*time.Since(startedAt))
		if err != nil { // each is an attempt to connect, and requests that wait for a sync wake it
			least, gap = min(lookupRetryMax, c.cfg.Refresh), max(gap, lookupRetryMax)
		}
		if !pause(ctx, least, nil) || !c.awaitSync(ctx, startedAt, min(gap, c.cfg.Refresh)) {
			return
		}
	}
}

// note logs the beginning and the end of an outage of the sync.
func (c *Cache) note(syncing *outage.Kind, err error, took time.Duration) {
	syncing.Begins = "key sync failed; cached keys are trusted until the data is too old"
	if c.state.Load().syncedAt.IsZero() {
		syncing.Begins = "key sync failed; no key is trusted yet, each request asks Postgres"
	}
	c.failures.Note(syncing, err, zap.Duration("max_staleness", c.cfg.MaxStaleness), zap.Duration("took", took))
}

// AwaitFirstSync waits until the cache has synced. It returns why it has not when ctx is done.
func (c *Cache) AwaitFirstSync(ctx context.Context) error {
	s := c.state.Load()
	if !s.syncedAt.IsZero() {
		return nil
	}
	select {
	case <-s.superseded:
		return nil
	case <-ctx.Done():
	}
	if failure := c.failures.Last(); failure != nil {
		return failure.Err
	}
	return ctx.Err()
}

// awaitSync waits for the time of the next sync after one that began at startedAt: Refresh later, or the gap if a proof waits for it. It
// reports false when ctx is done.
func (c *Cache) awaitSync(ctx context.Context, startedAt time.Time, gap time.Duration) bool {
	timer := time.NewTimer(c.cfg.Refresh - time.Since(startedAt))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-c.wake:
		return true
	case <-c.unknown.wanted:
		if c.cfg.Sent != nil {
			c.report() // a standby proves nothing without one that came later
		}
		return pause(ctx, gap-time.Since(startedAt), c.wake)
	case <-ctx.Done():
		return false
	}
}

// pause waits for d, or less if woken. It reports false when ctx is done.
func pause(ctx context.Context, d time.Duration, wake <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-wake:
	case <-ctx.Done():
		return false
	}
	return true
}

const (
	// carryOverTimeout bounds how long changes can wait for keys to be carried over.
	carryOverTimeout = 500 * time.Millisecond

	// carryOverBatch is the most keys that are read in one statement for it: some 40 ms of work. Nobody else waits for one.
	carryOverBatch = 1 << 12
)

// reading is what a sync has read.
type reading struct {
	keystore.Snapshot
	startedAt time.Time
	vouchedAt time.Time // up to which it shows all changes
	anew      bool      // it does not read on from what was read before
}

// sync reads the feed once and publishes what it says. Nobody else may at the same time.
func (c *Cache) sync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	c.counts.syncs.Add(1)
	err := c.follow(ctx)
	if err != nil {
		c.counts.syncErrors.Add(1)
	}
	return err
}

func (c *Cache) follow(ctx context.Context) error {
	old := c.state.Load()
	c.forgetRevokedAhead(func(at time.Time) bool { return clock.Age(at, time.Now()) >= c.cfg.MaxStaleness })
	r, err := c.readFeed(ctx, old)
	if err != nil {
		return err
	}
	c.logUnknownTiers(r.Unknown)
	over := r.anew || old.syncedAt.IsZero() || !old.sameServer(r.Snapshot) || r.Overrun
	var changed []*entry
	if over {
		c.forgetRevokedAhead(r.vouchedAt.After) // this server shows them, unless it was restored to before them
		c.startOver(ctx, old, r)
	} else {
		changed = c.advance(old, r)
		c.measureCanary(old, changed)
	}
	c.unreported = c.unreported || over || len(changed) > 0
	if err := c.verify(ctx); err != nil {
		return fmt.Errorf("verify keys in flight: %w", err)
	}
	// Only now: a confirmed change has also reached the requests in flight.
	c.applied.Store(&Applied{At: r.Now.Add(r.vouchedAt.Sub(r.startedAt)), Snapshot: c.state.Load().seen, Server: r.Server, Beat: r.Beat})
	if c.unreported {
		c.unreported = false
		c.report()
	}
	return nil
}

// logUnknownTiers logs once that limits cannot be told, as while edges are upgraded.
func (c *Cache) logUnknownTiers(names []string) {
	if len(names) > 0 && !slices.Equal(names, c.unknownTiers) {
		c.cfg.Logger().Warn("this version does not know all tiers; until it is upgraded, it holds keys of accounts with the others to the limits of free",
			zap.Strings("unknown", names))
	}
	c.unknownTiers = names
}

func (c *Cache) report() {
	if c.cfg.Report != nil {
		c.cfg.Report()
	}
}

// readFeed reads what has changed since old. After each reading that timed out, the next takes a quarter as many changes: over a
// slow link as many would time out for ever. If there are more, the feed starts over. So it does where even that times out, though
// Postgres answers, once nothing is trusted any longer: there is nothing to lose then.
func (c *Cache) readFeed(ctx context.Context, old *state) (r reading, err error) {
	r.startedAt = time.Now()
	limit := max(fewChanges, keystore.MaxChanges>>(2*c.late))
	within, lost := ctx, c.late == maxLate && !old.fresh(r.startedAt, c.cfg.MaxStaleness)
	var anew keystore.Snapshot
	if lost {
		if anew, err = c.store.Snapshot(ctx, "", limit); err != nil {
			return r, fmt.Errorf("read where the changes stand: %w", err)
		}
		var cancel context.CancelFunc
		within, cancel = context.WithTimeout(ctx, syncTimeout/2)
		defer cancel()
	}
	r.Snapshot, err = c.store.Snapshot(within, old.seen, limit)
	switch {
	case err == nil || within.Err() == nil:
		c.late = 0
	case lost:
		r.Snapshot, r.anew, err = anew, true, nil
	default:
		c.late = min(c.late+1, maxLate)
	}
	if err != nil {
		return r, fmt.Errorf("read changes: %w", err)
	}
	if err := c.vouch(&r); err != nil {
		return r, err
	}
	// Another standby, or this one restarted, may have replayed less than what was known here: a revocation that is in force and
	// confirmed must not be undone. It has as much if it has a report that was made afterwards.
	if !old.sameServer(r.Snapshot) && r.vouchedAt.Before(old.gotAt) {
		c.report()
		return r, errBlind
	}
	return r, nil
}

// vouch sets vouchedAt. A primary shows all changes when the reading starts. A standby may lag, or have its replay paused and look
// healthy: it shows those before the last report of ours that it has. Its own snapshot does not name the primary's transactions in
// progress; that under which the primary took the report does, and the standby shows all it saw.
func (c *Cache) vouch(r *reading) error {
	if c.cfg.Sent == nil {
		if r.Server.InRecovery {
			return errStandby
		}
		r.vouchedAt = r.startedAt
		return nil
	}
	report, ok := c.cfg.Sent(r.Beat)
	if !ok || clock.Age(report.SentAt, r.startedAt) >= c.cfg.MaxStaleness {
		return errBlind
	}
	r.vouchedAt = report.SentAt
	if r.Server.InRecovery && report.TakenBy.SystemID == r.Server.SystemID {
		r.Text = keystore.LaterSnapshot(r.Text, report.Snapshot)
	}
	return nil
}

// startOver publishes a state in which nothing that was read before is usable.
func (c *Cache) startOver(ctx context.Context, old *state, r reading) {
	c.counts.restarts.Add(1)
	n := old.restart(r)
	c.carryOver(ctx, old, n)
	c.publish(old, n)
	c.cfg.Logger().Info("key sync starts over", zap.Bool("first", old.syncedAt.IsZero()), zap.Bool("too_many_changes", r.Overrun))
	if r.Server.InRecovery && !r.Feedback {
		c.cfg.Logger().Warn("read_database has hot_standby_feedback off: set it to on, or a long read by an edge stops the replay for all")
	}
	// Flights that begin from here on are checked against the new state by Track.
	c.unverified = c.flight.doubt(old.syncedAt)
	c.wantFill()
}

// advance publishes the changes that were read, tells the requests in flight of them, and returns them.
func (c *Cache) advance(old *state, r reading) []*entry {
	for i, record := range r.Changes {
		r.Changes[i] = c.latest(record)
	}
	n, changed := old.next(r)
	for _, e := range changed {
		c.learn(&e.record.Digest)
	}
	c.publish(old, n)
	for _, e := range changed {
		was, ok := c.known.Get(place(&e.record.Digest))
		if ok {
			c.keep(e) // thrift: a key in use needs no lookup after its change
		}
		if ch, ok := old.changed(&e.record.Digest); ok { // which is found without the cache
			was = ch.entry
		}
		c.reportRevocation(old, was, e)
		c.apply(&e.record.Digest, &e.record, r.Now)
	}
	return changed
}

// latest returns a record that was read, or the revocation of its key if that is known from the primary and a standby lags behind it: the
// primary was asked about a key that the standby did not have yet, and the standby replays the key's creation before its revocation.
// Nothing takes a revocation back.
func (c *Cache) latest(record *apikey.Record) *apikey.Record {
	if c.cfg.Sent == nil || !record.RevokedAt.IsZero() {
		return record
	}
	if was, ok := c.revokedAhead.Load(record.Digest); ok {
		return &was.(revokedRow).entry.record
	}
	return record
}

// revokedRow is a row that a lookup brought, and when first.
type revokedRow struct {
	entry *entry
	at    time.Time
}

// forgetRevokedAhead forgets revocations that the standby must show by now, by when a lookup first brought them.
func (c *Cache) forgetRevokedAhead(shown func(at time.Time) bool) {
	c.revokedAhead.Range(func(digest, was any) bool {
		if shown(was.(revokedRow).at) {
			c.revokedAhead.Delete(digest)
		}
		return true
	})
}

// carryOver reads the keys that are found often anew before n, in which nothing read earlier is usable, takes the place of old:
// else all their requests would wait for lookups at the same moment, at each restart of Postgres. Meanwhile old vouches for them, no
// longer than it would if Postgres did not answer. The rows are read after n's snapshot, so they are as of its epoch.
func (c *Cache) carryOver(ctx context.Context, old, n *state) {
	if !old.fresh(time.Now(), c.cfg.MaxStaleness) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, carryOverTimeout)
	defer cancel()
	var digests []apikey.Digest
	for i := range c.hot {
		if e := c.hot[i].Load(); e != nil && old.usable(e) {
			digests = append(digests, e.record.Digest)
		}
	}
	for batch := range slices.Chunk(digests, carryOverBatch) {
		found, err := c.query(ctx, batch)
		if err != nil || n.isOn(found.Server) != nil {
			return // they are looked up when they are asked for
		}
		for _, record := range found.Records {
			e := newEntry(*c.latest(record), n.epoch)
			c.keepFound(e)
			c.slot(&record.Digest).Store(e)
		}
	}
}

// reportRevocation reports how long a key stayed allowed after its revocation. was is what memory held, or nil: only a key that
// could have been allowed here counts, and it counts once.
func (c *Cache) reportRevocation(old *state, was, e *entry) {
	if c.cfg.Revoked == nil || e.record.RevokedAt.IsZero() || was == nil || was.record.Digest != e.record.Digest || !was.record.RevokedAt.IsZero() {
		return
	}
	c.cfg.Revoked(c.stayedAllowed(old, e))
}

// stayedAllowed is how long e could still be allowed after its revocation, by Postgres's clock: until now, or until old, the state before
// the one that brought the revocation, vouched for nothing.
func (c *Cache) stayedAllowed(old *state, e *entry) time.Duration {
	revokedAt := e.record.RevokedAt.Time()
	trusted := old.pgNow.Add(old.syncedAt.Sub(old.readAt) + c.cfg.MaxStaleness).Sub(revokedAt)
	return max(0, min(c.state.Load().pgTime(time.Now()).Sub(revokedAt), trusted))
}

// measureCanary notes how long a canary stayed allowed. A revocation that the feed brought before, or that may be older than the
// feed, does not count.
func (c *Cache) measureCanary(old *state, changed []*entry) {
	if old.epoch == old.origin {
		return
	}
	for _, e := range changed {
		if e.record.Account == keystore.CanaryAccount && !e.record.RevokedAt.IsZero() && !old.knewRevoked(&e.record.Digest) {
			c.canary.Store(int64(c.stayedAllowed(old, e)))
			c.canaryAt.Store(time.Now().UnixNano())
		}
	}
}

func (c *Cache) publish(old, n *state) {
	c.state.Store(n)
	close(old.superseded)
}

// verify reads the rows of the unverified keys and cuts the requests of those that ended. While that fails, watch cuts those for
// which nobody vouches any longer.
func (c *Cache) verify(ctx context.Context) error {
	for len(c.unverified) > 0 {
		n := min(len(c.unverified), lookupBatch)
		state := c.state.Load()
		answers, err := c.readProof(ctx, c.unverified[:n], state.epoch)
		if err != nil {
			return err
		}
		for i := range answers {
			c.accept(&answers[i])
			c.apply(&answers[i].digest, answers[i].record(), answers[i].pgNow)
		}
		c.unverified = c.unverified[n:]
	}
	return nil
}

const (
	// watchInterval is the longest time between two looks at the requests in flight.
	watchInterval = 250 * time.Millisecond

	// leapGrace is how long streams wait for a sync when the data has become too old in one leap: the wall clock was set
	// forward, or the process or the machine was stopped. One sync clears it up, on connections that must be made anew.
	leapGrace = time.Second

	// CutWithin is how long after MaxStaleness Run cuts the last request that nobody vouches for, if the process was stopped.
	CutWithin = leapGrace + watchInterval
)

// watch cuts the requests in flight whose key expires, and all that nobody vouches for any longer. It is not part of the
// sync, which may be waiting for a Postgres that hangs.
func (c *Cache) watch(ctx context.Context) {
	interval := min(c.cfg.Refresh, watchInterval)
	var staleAt time.Time // when this was seen first; zero: it is not
	var grace time.Duration
	distrusted := false
	for last := time.Now(); pause(ctx, c.untilLook(interval), nil); {
		now := time.Now()
		c.logLeap(last, now, interval)
		last = now
		s := c.state.Load()
		fresh := s.fresh(now, c.cfg.MaxStaleness)
		if fresh {
			c.cutEnded(s.steadyPgTime(now), now.Add(interval)) // the next sync tells of a suspended machine
		}
		distrusted = c.logTrust(s, now, distrusted)
		// Looking two intervals ahead, the next look still comes within the bound.
		if s.fresh(now.Add(2*interval), c.cfg.MaxStaleness) {
			staleAt = time.Time{}
			continue
		}
		switch {
		case !staleAt.IsZero() && now.Sub(staleAt) >= grace:
			c.cutUnvouched(now.Add(interval))
		case staleAt.IsZero() && fresh:
			staleAt, grace = now, 0
		case staleAt.IsZero():
			staleAt, grace = now, leapGrace
		}
		c.Wake()
	}
}

// untilLook is the interval, or less if the data becomes too old within it: the log says so, however soon it is fresh again.
func (c *Cache) untilLook(interval time.Duration) time.Duration {
	if left := c.cfg.MaxStaleness - clock.Age(c.state.Load().syncedAt, time.Now()); left > 0 {
		return min(interval, left)
	}
	return interval
}

// leapNoticed is how far the clocks may be off between two looks without a word about it.
const leapNoticed = time.Second

// logLeap logs that the process stood still or a clock leapt between two looks: it explains refusals that Postgres did not cause.
func (c *Cache) logLeap(last, now time.Time, interval time.Duration) {
	elapsed := now.Sub(last)
	if elapsed > interval+leapNoticed {
		c.cfg.Logger().Warn("process stood still", zap.Duration("for", elapsed))
	}
	if by := now.Round(0).Sub(last.Round(0)) - elapsed; by.Abs() > leapNoticed {
		c.cfg.Logger().Warn("wall clock was set, or the machine was suspended", zap.Duration("by", by))
	}
}

// logTrust logs when the data becomes too old and when it is fresh again, each once.
func (c *Cache) logTrust(s *state, now time.Time, distrusted bool) bool {
	fresh := s.fresh(now, c.cfg.MaxStaleness)
	switch {
	case fresh && distrusted:
		c.cfg.Logger().Info("cached keys are trusted again")
	case !fresh && !distrusted && !s.syncedAt.IsZero():
		why := zap.Skip() // the process may have stood still
		if failure := c.failures.Last(); failure != nil && failure.At.After(s.syncedAt) {
			why = zap.Error(failure.Err)
		}
		c.cfg.Logger().Error("cached keys are not trusted any longer: the last good sync is too old",
			zap.Duration("age", clock.Age(s.syncedAt, now)), zap.Duration("max_staleness", c.cfg.MaxStaleness), why)
	case s.syncedAt.IsZero(): // it never was
		return false
	}
	return !fresh
}

// listen wakes the sync loop on notifications. It is never the only signal: the loop syncs every Refresh all the same.
func (c *Cache) listen(ctx context.Context) {
	delay := listenRetryMin
	listening := outage.Kind{
		Begins: "listening for changes failed; changes arrive with the next refresh", Over: "listening for changes again", Level: zap.WarnLevel,
	}
	for {
		connected := false
		err := c.store.Listen(ctx, func() {
			if !connected {
				connected = true
				c.counts.listens.Add(1)
			}
			c.failures.Note(&listening, nil)
			delay = listenRetryMin
			c.Wake()
		})
		if ctx.Err() != nil {
			return
		}
		c.counts.listenErrors.Add(1)
		c.failures.Note(&listening, err)
		// Jitter keeps a fleet from coming back in step after an outage.
		if !pause(ctx, delay/2+rand.N(delay), nil) {
			return
		}
		delay = min(2*delay, listenRetryMax)
	}
}

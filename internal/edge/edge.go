// Package edge makes a running gateway visible to the others: who it is, and the last change that it has applied. With it a
// revocation can be proved, edge by edge.
package edge

import (
	"context"
	cryptorand "crypto/rand"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

const (
	// reportEvery is how often an edge reports when nothing changes, unless its max_staleness is short: a write every five
	// seconds.
	reportEvery = 5 * time.Second

	// reportGap is the least time between two reports, so that a storm of changes costs twenty writes a second at most.
	reportGap = 50 * time.Millisecond

	// wakeSpread is the longest time that a report waits after a change. One revocation wakes every edge at once, which
	// would all write at the same moment.
	wakeSpread = 50 * time.Millisecond

	// forgetEvery is the least time between two looks of an edge for such others. Each look reads the whole table: with
	// every report of every edge, its cost would grow with the square of the fleet.
	forgetEvery = time.Minute

	reportTimeout = 2 * time.Second

	// countHolds is how long a count of the edges is valid. They are counted at least every 41 seconds: with the first report after
	// the longest interval of countEdges, at the longest max_staleness.
	countHolds = time.Minute

	// All reports of the last minute are remembered, which is longer than any max_staleness by which a standby may lag and be trusted, and
	// never fewer than rememberBeats. A storm of changes makes twenty a second.
	rememberBeats = 64
	rememberFor   = time.Minute
)

// Identity of an edge.
type Identity struct {
	Instance              string // NewInstance's
	Name, Region, Version string
	MaxStaleness          time.Duration
}

// NewInstance returns a random name for one running edge.
func NewInstance() string { return apikey.RandomText(22) }

// Reporter writes this edge's row.
type Reporter struct {
	store   *keystore.Store
	edge    keystore.Edge
	changed chan struct{}

	reportTimeout time.Duration

	forgetEvery time.Duration
	forgetAt    time.Time // when to look for edges that went away
	forgetting  outage.Kind
	forgotAt    atomic.Pointer[time.Time] // at first when this edge began

	countAt   time.Time // when to count the edges
	reporting outage.Kind
	counting  outage.Kind
	count     atomic.Pointer[edgeCount] // nil: not counted yet

	failures outage.Failures // to report, to forget edges, or to count them

	mu       sync.Mutex
	draining bool
	sent     map[uint64]keystore.Report // the last reports, by beat
	last     []uint64                   // their beats, the oldest first
}

// edgeCount is a count of the edges, and when it was made.
type edgeCount struct {
	keystore.EdgeCount
	at time.Time
}

// NewReporter returns a reporter for a new instance of an edge. logger is asked at each line.
func NewReporter(store *keystore.Store, id Identity, logger func() *zap.Logger) *Reporter {
	r := &Reporter{
		store: store, failures: outage.Failures{Logger: logger}, changed: make(chan struct{}, 1), sent: make(map[uint64]keystore.Report),
		reportTimeout: reportTimeout, forgetEvery: forgetEvery,
		reporting: outage.Kind{
			Begins: "edge cannot report; others call it fail-closed or do not know of it, and keys revoke --wait has no word from it",
			Over:   "edge reports again", Level: zap.WarnLevel,
		},
		counting: outage.Kind{
			Begins: "edges cannot be counted; their last count is used, if there is one", Over: "edges are counted again", Level: zap.WarnLevel,
		},
		forgetting: outage.Kind{
			Begins: "edges that went away cannot be taken off the list", Over: "edges that went away are taken off the list again", Level: zap.WarnLevel,
		},
		edge: keystore.Edge{
			Instance: id.Instance, Name: id.Name, Region: id.Region, Version: id.Version,
			MaxStaleness: id.MaxStaleness, StartedAt: time.Now(),
		},
	}
	r.forgotAt.Store(&r.edge.StartedAt)
	return r
}

// Changed asks for a report now. It does not block.
func (r *Reporter) Changed() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Drain says from now on that this edge takes no more requests.
func (r *Reporter) Drain() {
	r.mu.Lock()
	r.draining = true
	r.mu.Unlock()
	r.Changed()
}

// Run reports what applied returns until ctx is done, and then removes the edge's row.
func (r *Reporter) Run(ctx context.Context, applied func() keycache.Applied) {
	ticker := time.NewTicker(min(reportEvery, r.edge.MaxStaleness/4))
	defer ticker.Stop()
	for {
		// A report that began is finished: Postgres may carry out one that was given up after the row was removed.
		reported, counted := r.report(context.WithoutCancel(ctx), applied())
		if ctx.Err() == nil {
			r.failures.Note(&r.reporting, reported)
		}
		if ctx.Err() == nil && reported == nil {
			r.failures.Note(&r.counting, counted)
		}
		if !r.wait(ctx, ticker.C) {
			r.remove(context.WithoutCancel(ctx))
			return
		}
	}
}

// wait returns when it is time for the next report, or false when ctx is done.
func (r *Reporter) wait(ctx context.Context, tick <-chan time.Time) bool {
	if !pause(ctx, reportGap) {
		return false
	}
	select {
	case <-r.changed:
		return pause(ctx, rand.N(wakeSpread))
	case <-tick:
		return true
	case <-ctx.Done():
		return false
	}
}

// pause waits for d. It reports false when ctx is done.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// Sent returns a report, if it was a recent one of this edge. A database in which it can be read shows all that was committed
// before it was sent.
func (r *Reporter) Sent(beat uint64) (keystore.Report, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	report, ok := r.sent[beat]
	return report, ok
}

// appliedOn names the server whose transactions a snapshot names, or is empty if that is unknown. A standby's are those of the
// primary that took the last report which the standby has.
func (r *Reporter) appliedOn(applied keycache.Applied) string {
	server := applied.Server
	if server.InRecovery {
		r.mu.Lock()
		defer r.mu.Unlock()
		server = r.sent[applied.Beat].TakenBy
	}
	if server == (keystore.Server{}) {
		return ""
	}
	return server.String()
}

// nextBeat returns the beat of a report that is about to be sent. Nobody can guess it: who wrote it into this edge's row
// beforehand, with the same database user, would make a lagging standby pass for one that has the report.
func (r *Reporter) nextBeat() uint64 {
	var random [8]byte
	_, _ = cryptorand.Read(random[:])                                           // which never fails
	beat := binary.LittleEndian.Uint64(random[:])%(keystore.DrainingBeat-1) + 1 // a bigint above 0
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining {
		beat += keystore.DrainingBeat
	}
	r.sent[beat] = keystore.Report{SentAt: time.Now()}
	r.last = append(r.last, beat)
	for len(r.last) > rememberBeats && time.Since(r.sent[r.last[0]].SentAt) > rememberFor {
		delete(r.sent, r.last[0])
		r.last = r.last[1:]
	}
	return beat
}

func (r *Reporter) taken(beat uint64, report keystore.Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent[beat] = report
}

// report writes the edge's row, and then, if that worked and it is time, counts the edges.
func (r *Reporter) report(ctx context.Context, applied keycache.Applied) (reported, counted error) {
	ctx, cancel := context.WithTimeout(ctx, r.reportTimeout)
	defer cancel()
	edge := r.edge
	edge.Beat, edge.SyncedAt, edge.Applied, edge.AppliedOn = r.nextBeat(), applied.At, applied.Snapshot, r.appliedOn(applied)
	taken, err := r.store.ReportEdge(ctx, edge)
	if err != nil {
		return err, nil
	}
	r.taken(edge.Beat, taken)
	r.forget(ctx)
	return nil, r.countEdges(ctx)
}

// forget takes edges that went away without a word off the list, now and then.
func (r *Reporter) forget(ctx context.Context) {
	if time.Now().Before(r.forgetAt) {
		return
	}
	r.forgetAt = time.Now().Add(r.forgetEvery + rand.N(r.forgetEvery))
	err := r.store.ForgetEdges(ctx)
	if r.failures.Note(&r.forgetting, err); err == nil {
		r.forgotAt.Store(new(time.Now()))
	}
}

// ForgetAge is how long ago this edge took edges that went away off the list, if there were any, or began.
func (r *Reporter) ForgetAge() time.Duration { return time.Since(*r.forgotAt.Load()) }

// countEdges counts the edges twice in the time after which one counts as fail-closed, and not at every report: the cost of
// that would grow with the square of the fleet. What this edge was before it was killed counts no longer.
func (r *Reporter) countEdges(ctx context.Context) error {
	if time.Now().Before(r.countAt) {
		return nil
	}
	_ = r.store.ForgetReplacedEdges(ctx, r.edge.Instance) // else forget does, later
	n, err := r.store.CountEdges(ctx)
	if err != nil {
		return err
	}
	// When Postgres was away, the first to report sees nobody else, and must not take the others' part of the limits. By its next report
	// they are there again.
	if known := r.count.Load(); (r.reporting.Failing || r.counting.Failing) && known != nil && known.Live >= n.Live {
		return nil
	}
	r.count.Store(&edgeCount{n, time.Now()})
	every := r.edge.MaxStaleness / 2
	r.countAt = time.Now().Add(every - every/4 + rand.N(every/2))
	return nil
}

// Edges returns how many edges there were when this one counted them last, and whether that says anything of now: it has counted them
// within the last minute.
func (r *Reporter) Edges() (n keystore.EdgeCount, holds bool) {
	last := r.count.Load()
	if last == nil {
		return keystore.EdgeCount{}, false
	}
	return last.EdgeCount, time.Since(last.at) < countHolds
}

// LastFailure returns the last failure to report, to forget edges, or to count them; nil: there was none.
func (r *Reporter) LastFailure() *outage.Failure { return r.failures.Last() }

// remove takes the edge off the list when it stops in good order. If that fails, the others forget it.
func (r *Reporter) remove(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, r.reportTimeout)
	defer cancel()
	_ = r.store.RemoveEdge(ctx, r.edge.Instance)
}

package edge

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// rig is a database and a reporter that writes into it.
type rig struct {
	t        *testing.T
	conn     *pgx.Conn
	reporter *Reporter
}

func newRig(t *testing.T) *rig {
	t.Helper()
	url := pgtest.Migrated(t)
	store := pgtest.Store(t, url)
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return &rig{t, conn, newReporter(store)}
}

func newReporter(store *keystore.Store) *Reporter {
	return NewReporter(store, Identity{Instance: NewInstance(), Name: "north", MaxStaleness: 30 * time.Second}, zap.NewNop)
}

// gone adds the row of an edge that went away without a word.
func (r *rig) gone() {
	r.t.Helper()
	r.silent("gone", 11*time.Minute)
}

// silent adds the row of an edge that has not reported for so long.
func (r *rig) silent(name string, length time.Duration) {
	r.t.Helper()
	if _, err := r.conn.Exec(r.t.Context(), `
insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat, seen_at)
values ($1, $2, '', '', '30s', now() - $3::interval, 1, now() - $3::interval)`, NewInstance(), name, length); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) report() { r.reportOf(keycache.Applied{}) }

func (r *rig) reportOf(applied keycache.Applied) {
	r.t.Helper()
	reported, counted := r.reporter.report(r.t.Context(), applied)
	if err := errors.Join(reported, counted); err != nil {
		r.t.Fatal(err)
	}
}

// names are those of the edges on the list.
func (r *rig) names() []string {
	r.t.Helper()
	rows, _ := r.conn.Query(r.t.Context(), `select name from rekall.edges order by name`)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		r.t.Fatal(err)
	}
	return names
}

func (r *rig) wantNames(when string, want ...string) {
	r.t.Helper()
	if got := r.names(); !slices.Equal(got, want) {
		r.t.Errorf("%s: edges %q, want %q", when, got, want)
	}
}

func TestEdgesThatWentAwayAreLookedForAtTheFirstReportAndNotAtEveryOne(t *testing.T) {
	r := newRig(t)
	r.gone()
	r.report()
	r.wantNames("first report", "north")
	r.gone()
	for range 20 {
		r.report()
	}
	r.wantNames("reports soon after", "gone", "north")
	r.reporter.forgetAt = time.Now()
	r.report()
	r.wantNames("a report when it is time again", "north")
	if next := time.Until(r.reporter.forgetAt); next > 2*forgetEvery {
		t.Errorf("the next look is %v away", next)
	}
}

func TestEdgesAreCountedTwiceInTheTimeAfterWhichOneIsFailClosed(t *testing.T) {
	r := newRig(t)
	if n, counted := r.reporter.Edges(); counted {
		t.Errorf("%+v before the first report", n)
	}
	want := func(when string, live, failClosed int) {
		t.Helper()
		if n, counted := r.reporter.Edges(); !counted || n.Live != live || n.FailClosed != failClosed {
			t.Errorf("%s: %+v %v, want %d live and %d fail-closed", when, n, counted, live, failClosed)
		}
	}
	r.report()
	want("alone", 1, 0)
	r.gone()
	r.report()
	want("a report soon after", 1, 0)
	if next := time.Until(r.reporter.countAt); next > r.reporter.edge.MaxStaleness {
		t.Errorf("the next count is %v away", next)
	}
	r.reporter.countAt = time.Now()
	r.report()
	want("a report when it is time again", 1, 1)
}

// TestCountOfEdgesSaysNothingOfNowOnceTheyCannotBeCountedAnyLonger: an edge that cannot report would seem to be well for ever.
func TestCountOfEdgesSaysNothingOfNowOnceTheyCannotBeCountedAnyLonger(t *testing.T) {
	r := newRig(t)
	r.report()
	if _, err := r.conn.Exec(t.Context(), `alter table rekall.edges add constraint unwelcome check (name <> 'north') not valid`); err != nil {
		t.Fatal(err)
	}
	r.reporter.count.Load().at = time.Now().Add(-countHolds)
	if reported, _ := r.reporter.report(t.Context(), keycache.Applied{}); reported == nil {
		t.Fatal("it reports")
	}
	if n, holds := r.reporter.Edges(); holds || n != (keystore.EdgeCount{Live: 1}) {
		t.Errorf("%+v, which holds: %v; want the last count, for the limits, which does not", n, holds)
	}
	if _, err := r.conn.Exec(t.Context(), `alter table rekall.edges drop constraint unwelcome`); err != nil {
		t.Fatal(err)
	}
	r.reporter.countAt = time.Time{}
	r.report()
	if _, holds := r.reporter.Edges(); !holds {
		t.Error("a new count does not hold")
	}
}

// TestFirstEdgeToReportAfterAnOutageOfPostgresStillCountsTheOthers: it would let through as much as all of them.
func TestFirstEdgeToReportAfterAnOutageOfPostgresStillCountsTheOthers(t *testing.T) {
	r := newRig(t)
	r.silent("south", 0)
	r.report()
	count := func(when string, want keystore.EdgeCount) {
		t.Helper()
		r.reporter.countAt = time.Time{}
		r.report()
		if n, _ := r.reporter.Edges(); n != want {
			t.Errorf("%s: %+v, want %+v", when, n, want)
		}
	}
	count("before", keystore.EdgeCount{Live: 2})
	if _, err := r.conn.Exec(t.Context(), `update rekall.edges set seen_at = now() - interval '1 minute'`); err != nil {
		t.Fatal(err)
	}
	r.reporter.reporting.Failing = true
	count("the first report after it", keystore.EdgeCount{Live: 2})
	r.reporter.reporting.Failing, r.reporter.counting.Failing = false, true
	count("the first count that works", keystore.EdgeCount{Live: 2})
	r.reporter.counting.Failing = false
	count("the next count", keystore.EdgeCount{Live: 1, FailClosed: 1})
	r.reporter.counting.Failing = true
	r.silent("east", 0)
	count("one that is new after an outage", keystore.EdgeCount{Live: 2, FailClosed: 1})
}

// TestEdgesThatCannotBeCountedAreNotToldAsAnEdgeThatCannotReport: the others have its report.
func TestEdgesThatCannotBeCountedAreNotToldAsAnEdgeThatCannotReport(t *testing.T) {
	r := newRig(t)
	core, lines := observer.New(zap.InfoLevel)
	r.reporter.failures.Logger = func() *zap.Logger { return zap.New(core) }
	// Which a report can be without, and a count cannot.
	if _, err := r.conn.Exec(t.Context(), `alter table rekall.edges drop synced_at, add synced_at text`); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	reports := 0
	r.reporter.Run(ctx, func() keycache.Applied {
		if reports++; reports == 3 {
			r.wantNames("two reports", "north")
			if !r.reporter.counting.Failing || r.reporter.reporting.Failing || r.reporter.LastFailure() == nil {
				t.Errorf("uncounted %v, failing %v, last failure %v", r.reporter.counting.Failing, r.reporter.reporting.Failing, r.reporter.LastFailure())
			}
			if _, err := r.conn.Exec(t.Context(), `alter table rekall.edges rename to gone`); err != nil { // then neither works
				t.Error(err)
			}
		}
		if reports == 5 {
			stop()
		}
		r.reporter.Changed()
		return keycache.Applied{}
	})
	var messages []string
	for _, line := range lines.All() {
		message, _, _ := strings.Cut(line.Message, ";")
		messages = append(messages, message)
	}
	if want := []string{"edges cannot be counted", "edge cannot report"}; !slices.Equal(messages, want) {
		t.Errorf("the log says %q, want %q", messages, want)
	}
}

// TestEdgesThatCannotBeForgottenAreToldOnceAndCountedNonetheless: else an alert of a dead edge stays for ever, and nothing says why.
func TestEdgesThatCannotBeForgottenAreToldOnceAndCountedNonetheless(t *testing.T) {
	r := newRig(t)
	core, lines := observer.New(zap.InfoLevel)
	r.reporter.failures.Logger = func() *zap.Logger { return zap.New(core) }
	r.gone()
	exec := func(sql string) {
		t.Helper()
		if _, err := r.conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	look := func() (age time.Duration) {
		t.Helper()
		r.reporter.forgotAt.Store(new(time.Now().Add(-time.Hour)))
		r.reporter.forgetAt = time.Time{}
		r.report()
		return r.reporter.ForgetAge()
	}
	exec(`create table holds (instance text references rekall.edges (instance)); insert into holds select instance from rekall.edges`)
	if first, second := look(), look(); first < time.Hour || second < time.Hour || r.reporter.LastFailure() == nil {
		t.Errorf("they were forgotten %v and %v ago; last failure %v", first, second, r.reporter.LastFailure())
	}
	if n, counted := r.reporter.Edges(); !counted || n != (keystore.EdgeCount{Live: 1, FailClosed: 1}) {
		t.Errorf("%+v, counted: %v", n, counted)
	}
	exec(`drop table holds`)
	if age := look(); age > time.Hour/2 {
		t.Errorf("they were forgotten %v ago", age)
	}
	var messages []string
	for _, line := range lines.All() {
		messages = append(messages, line.Message)
	}
	if want := []string{"edges that went away cannot be taken off the list", "edges that went away are taken off the list again"}; !slices.Equal(messages, want) {
		t.Errorf("the log says %q, want %q", messages, want)
	}
}

// TestAnEdgeThatDrainsIsWaitedForAndSharesNoLimits: its streams may go on for hours, beside those of what replaced it.
func TestAnEdgeThatDrainsIsWaitedForAndSharesNoLimits(t *testing.T) {
	r := newRig(t)
	r.report()
	former := r.reporter
	former.Drain()
	r.report()
	xid := r.commit()
	if !r.confirmed(xid, r.applied()) {
		t.Error("what it has applied is not confirmed")
	}
	beat := former.last[len(former.last)-1]
	if _, known := former.Sent(beat); !known || beat < keystore.DrainingBeat {
		t.Error("a standby that shows its report vouches for nothing")
	}
	r.reporter = newReporter(former.store)
	r.report()
	r.wantNames("both report", "north", "north")
	if n, _ := r.reporter.Edges(); n != (keystore.EdgeCount{Live: 1}) {
		t.Errorf("%+v, want the one that takes requests", n)
	}
}

func TestAnEdgeThatDrainsSaysSoAtOnce(t *testing.T) {
	r := newReporter(nil)
	r.Drain()
	select {
	case <-r.changed:
	default:
		t.Error("the others learn of it with the next tick")
	}
}

// TestAnEdgeReportsSeveralTimesWithinItsMaxStalenessHoweverShort: between two reports the others would call it fail-closed.
func TestAnEdgeReportsSeveralTimesWithinItsMaxStalenessHoweverShort(t *testing.T) {
	r := newRig(t)
	r.reporter.edge.MaxStaleness = 200 * time.Millisecond
	go r.reporter.Run(t.Context(), func() keycache.Applied { return keycache.Applied{} })
	beats := map[uint64]bool{}
	eventually.True(t, "more reports than one every 5 s", func() bool {
		var beat uint64
		err := r.conn.QueryRow(t.Context(), `select beat from rekall.edges`).Scan(&beat)
		beats[beat] = err == nil
		return len(beats) > 8
	})
}

// TestEdgeWhoseSyncIsTooOldIsFailClosedThoughItReports: it may be able to write and not to read, or read a standby that stands still.
func TestEdgeWhoseSyncIsTooOldIsFailClosedThoughItReports(t *testing.T) {
	r := newRig(t)
	for age, want := range map[time.Duration]keystore.EdgeCount{
		29 * time.Second: {Live: 1}, 31 * time.Second: {FailClosed: 1},
	} {
		r.reporter.countAt = time.Now()
		r.reportOf(keycache.Applied{At: time.Now().Add(-age)})
		if n, _ := r.reporter.Edges(); n != want {
			t.Errorf("last sync %v ago: %+v, want %+v", age, n, want)
		}
	}
}

func TestAnEdgeThatWasKilledAndStartedAgainIsCountedOnceAsSoonAsItsRowIsFailClosed(t *testing.T) {
	r := newRig(t)
	r.silent("north", 29*time.Second)
	r.silent("north", 31*time.Second)
	r.silent("south", 31*time.Second)
	r.report()
	r.wantNames("the edge north reports", "north", "north", "south")
	if n, _ := r.reporter.Edges(); n != (keystore.EdgeCount{Live: 2, FailClosed: 1}) {
		t.Errorf("%+v", n)
	}
}

// TestEdgeThatWasStoppedForLongDoesNotForgetItself: its own row is the oldest of all when it goes on.
func TestEdgeThatWasStoppedForLongDoesNotForgetItself(t *testing.T) {
	r := newRig(t)
	r.report()
	if _, err := r.conn.Exec(t.Context(), `update rekall.edges set seen_at = now() - interval '1 day'`); err != nil {
		t.Fatal(err)
	}
	r.reporter.forgetAt = time.Time{}
	r.report()
	r.wantNames("after a day", "north")
}

// TestAnEdgeThatStopsFinishesItsReportBeforeItRemovesItsRow: given up, the report could come after the removal, and the others would
// miss an edge that stopped in good order.
func TestAnEdgeThatStopsFinishesItsReportBeforeItRemovesItsRow(t *testing.T) {
	r := newRig(t)
	lock, err := r.conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock.Exec(t.Context(), `lock table rekall.edges in exclusive mode`); err != nil {
		t.Fatal(err)
	}
	r.reporter.reportTimeout = time.Minute // it is to wait for all of this
	ctx, stop := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		r.reporter.Run(ctx, func() keycache.Applied { return keycache.Applied{} })
	}()
	waiting := func() (reports bool) {
		const query = `select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and
	query like '%insert into rekall.edges%')`
		if _, err := lock.Exec(t.Context(), `select pg_stat_clear_snapshot()`); err != nil { // else a transaction sees the same each time
			t.Fatal(err)
		}
		if err := lock.QueryRow(t.Context(), query).Scan(&reports); err != nil {
			t.Fatal(err)
		}
		return reports
	}
	eventually.True(t, "the report waits for the lock", waiting)
	stop()
	for deadline := time.Now().Add(500 * time.Millisecond); time.Now().Before(deadline); <-time.After(2 * time.Millisecond) {
		if !waiting() {
			t.Fatal("the report was given up")
		}
	}
	if err := lock.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-stopped
	r.wantNames("stopped")
}

func TestAnEdgeStopsThoughPostgresHangs(t *testing.T) {
	r := newRig(t)
	lock, err := r.conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock.Exec(t.Context(), `lock table rekall.edges`); err != nil {
		t.Fatal(err)
	}
	r.reporter.reportTimeout = 100 * time.Millisecond
	ctx, stop := context.WithCancel(t.Context())
	stop() // which ends neither the report nor the removal
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		r.reporter.Run(ctx, func() keycache.Applied { return keycache.Applied{} })
	}()
	select {
	case <-stopped:
	case <-time.After(20 * time.Second):
		t.Error("it waits for as long as Postgres hangs")
	}
	if err := lock.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-stopped
}

// commit makes a transaction, and returns its id.
func (r *rig) commit() (xid uint64) {
	r.t.Helper()
	if err := r.conn.QueryRow(r.t.Context(), `select pg_current_xact_id()::text::bigint`).Scan(&xid); err != nil {
		r.t.Fatal(err)
	}
	return xid
}

// confirmed reports what was applied, and returns whether that confirms the transaction.
func (r *rig) confirmed(xid uint64, applied keycache.Applied) bool {
	r.t.Helper()
	r.reportOf(applied)
	edges, _, err := r.reporter.store.Edges(r.t.Context(), xid)
	if err != nil || len(edges) != 1 {
		r.t.Fatalf("edges %+v, %v", edges, err)
	}
	return edges[0].Applied
}

// applied is what a cache has applied that has just read this database.
func (r *rig) applied() keycache.Applied {
	r.t.Helper()
	snap, err := r.reporter.store.Snapshot(r.t.Context(), "", keystore.MaxChanges)
	if err != nil {
		r.t.Fatal(err)
	}
	return keycache.Applied{At: snap.Now, Snapshot: snap.Text, Server: snap.Server}
}

// TestReportToANewDatabaseBeforeTheFirstSyncWithItConfirmsNothing: the former one's snapshot may be far ahead.
func TestReportToANewDatabaseBeforeTheFirstSyncWithItConfirmsNothing(t *testing.T) {
	former, next := newRig(t), newRig(t)
	xid := next.commit()
	if next.confirmed(xid, former.applied()) {
		t.Error("a sync with the former database confirms what only the next one knows")
	}
	if !next.confirmed(xid, next.applied()) {
		t.Error("a sync with the database confirms nothing")
	}
}

// TestWhatAStandbyShowsIsConfirmedOnThePrimaryThatTookTheReportWhichItHas: the standby's own start says nothing of the transactions.
func TestWhatAStandbyShowsIsConfirmedOnThePrimaryThatTookTheReportWhichItHas(t *testing.T) {
	r := newRig(t)
	r.report()
	xid := r.commit()
	applied := r.applied()
	applied.Server.InRecovery, applied.Server.StartedAt, applied.Beat = true, 1, r.reporter.last[0]
	if !r.confirmed(xid, applied) {
		t.Error("not confirmed")
	}
	applied.Beat = 100 // nobody knows who took that
	if r.confirmed(xid, applied) {
		t.Error("confirmed, though the report that the standby has may have been another server's")
	}
}

// TestBeatOfAReportCannotBeWrittenBeforeItIsSent: another edge with the same database user could make this one trust a standby that lags.
func TestBeatOfAReportCannotBeWrittenBeforeItIsSent(t *testing.T) {
	r := newRig(t)
	r.report()
	first := r.reporter.last[0]
	r.report()
	for beat := first + 1; beat < first+1000; beat++ {
		if _, ok := r.reporter.Sent(beat); ok {
			t.Errorf("the beat after %d is %d", first, beat)
		}
	}
	if report, ok := r.reporter.Sent(first); !ok || report.SentAt.IsZero() || report.TakenBy == (keystore.Server{}) || report.Snapshot == "" {
		t.Errorf("the report is remembered as %+v", report)
	}
}

// TestOneChangeDoesNotMakeAFleetReportInOneBurst: the trigger of one revocation wakes every edge at the same moment.
func TestOneChangeDoesNotMakeAFleetReportInOneBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const fleet = 200
		var changedAt time.Time
		delays := make(chan time.Duration, fleet)
		var reporters []*Reporter
		for range fleet {
			r := newReporter(nil)
			reporters = append(reporters, r)
			go func() {
				if r.wait(t.Context(), nil) {
					delays <- time.Since(changedAt)
				}
			}()
		}
		<-time.After(time.Minute) // all wait for something to happen
		changedAt = time.Now()
		for _, r := range reporters {
			r.Changed()
		}
		perMillisecond := map[time.Duration]int{}
		for range fleet {
			delay := <-delays
			if delay > wakeSpread {
				t.Errorf("a report waits for %v", delay)
			}
			perMillisecond[delay.Truncate(time.Millisecond)]++
		}
		for at, n := range perMillisecond {
			if n > fleet/8 { // 4 are expected
				t.Errorf("%d of %d report within the same millisecond, %v after the change", n, fleet, at)
			}
		}
	})
}

// TestStormOfChangesIsOneReport: changes that arrive while a report waits are part of it.
func TestStormOfChangesIsOneReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReporter(nil)
		reports := 0
		ctx, stop := context.WithCancel(t.Context())
		go func() {
			for r.wait(ctx, nil) {
				reports++
			}
		}()
		<-time.After(time.Minute)
		const storm = time.Second
		for end := time.Now().Add(storm); time.Now().Before(end); {
			r.Changed()
			<-time.After(time.Millisecond)
		}
		<-time.After(time.Minute)
		stop()
		synctest.Wait()
		if most := int(storm/reportGap) + 2; reports < 1 || reports > most {
			t.Errorf("%d reports of 1000 changes within a second, want at most %d", reports, most)
		}
	})
}

// TestReportThatAStandbyMayShowIsKeptInAStormOfChanges: else an edge that reads a standby would trust no key, though that lags by less
// than max_staleness.
func TestReportThatAStandbyMayShowIsKeptInAStormOfChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReporter(nil)
		first := r.nextBeat()
		for range rememberFor / reportGap {
			<-time.After(reportGap)
			r.nextBeat()
		}
		if _, known := r.Sent(first); !known {
			t.Error("a report of this minute is forgotten")
		}
		for range rememberFor / reportGap {
			<-time.After(reportGap)
			r.nextBeat()
		}
		if n := len(r.sent); n != len(r.last) || n > 2+int(rememberFor/reportGap) {
			t.Errorf("%d reports are kept", n)
		}
	})
}

package keystore

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// Edge is a running gateway, as it reports itself.
type Edge struct {
	Instance     string // random, one for each process
	Name         string
	Region       string
	Version      string
	MaxStaleness time.Duration
	StartedAt    time.Time // by the edge's clock
	Beat         uint64    // a random number of the report
	SyncedAt     time.Time // up to when it knew every change, by Postgres's clock; zero: it has not synced yet
	Applied      string    // the snapshot that it read, as pg_snapshot; empty: none yet
	AppliedOn    string    // whose transactions that names, as Server.String; empty: unknown
}

// DrainingBeat is the least beat of an edge that takes no more requests: CountEdges leaves it out, but a revocation waits for it as
// for any other, since it may have streams. A column of its own would need a right that gateways lack until their roles are granted
// anew.
const DrainingBeat uint64 = 1 << 62

// Report is one that an edge has made of itself.
type Report struct {
	SentAt   time.Time // both clocks
	TakenBy  Server    // zero: it has not answered yet
	Snapshot string    // under which it took the report, as pg_snapshot: a standby that has the report has all that this saw
}

// ReportEdge writes an edge's row.
func (s *Store) ReportEdge(ctx context.Context, e Edge) (Report, error) {
	var syncedAt *time.Time
	if !e.SyncedAt.IsZero() {
		syncedAt = &e.SyncedAt
	}
	var server serverRow
	report := Report{SentAt: time.Now()}
	err := s.scanAlone(ctx, []any{&server, &report.Snapshot}, `
insert into rekall.edges (instance, name, region, version, max_staleness, started_at, synced_at, applied, applied_on, beat, seen_at)
values ($1, $2, $3, $4, $5, $6, $7, nullif($8, '')::pg_snapshot, nullif($9, ''), $10, clock_timestamp())
on conflict (instance) do update set synced_at = excluded.synced_at, applied = excluded.applied, applied_on = excluded.applied_on,
	beat = excluded.beat, seen_at = excluded.seen_at
returning `+serverSQL+`, pg_current_snapshot()::text`,
		e.Instance, e.Name, e.Region, e.Version, e.MaxStaleness, e.StartedAt, syncedAt, e.Applied, e.AppliedOn, e.Beat)
	if err != nil {
		return Report{}, failedAtEdge("report edge", err)
	}
	report.TakenBy = server.server()
	return report, nil
}

// ForgetEdges removes the rows of edges that have not reported for ten minutes, except what somebody has locked.
func (s *Store) ForgetEdges(ctx context.Context) error {
	return s.execAtEdge(ctx, "forget edges", `select rekall.forget_edges()`)
}

// ForgetReplacedEdges removes the rows of edges with the name and the database user of this one, which has reported, that are
// silent for longer than their max_staleness. What any edge has reported while Postgres's clock was ahead of what it is now counts as
// reported now.
func (s *Store) ForgetReplacedEdges(ctx context.Context, instance string) error {
	return s.execAtEdge(ctx, "forget replaced edges", `select rekall.forget_replaced_edges($1)`, instance)
}

// RemoveEdge removes the row of an edge that stops.
func (s *Store) RemoveEdge(ctx context.Context, instance string) error {
	return s.execAtEdge(ctx, "remove edge", `delete from rekall.edges where instance = $1`, instance)
}

// EdgeCount is how many edges there are.
type EdgeCount struct {
	Live       int // whose last reported sync is within their max_staleness
	FailClosed int // all others
}

const (
	// agedEdges has how old an edge's data is as far as it has reported. Until its first sync it trusts none, and counts as live while
	// it reports.
	agedEdges = `rekall.edges cross join lateral (select clock_timestamp() - coalesce(synced_at, seen_at) as age) aged`

	// liveEdge is whether an edge of agedEdges may still trust what it knows.
	liveEdge = `age <= max_staleness`
)

// CountEdges counts the edges that take requests. An edge's own role may.
func (s *Store) CountEdges(ctx context.Context) (EdgeCount, error) {
	var n EdgeCount
	err := s.pool.QueryRow(ctx, `
select count(*) filter (where `+liveEdge+`), count(*) filter (where not `+liveEdge+`) from `+agedEdges+` where beat < $1`, DrainingBeat).Scan(&n.Live, &n.FailClosed)
	if err != nil {
		return EdgeCount{}, failedAtEdge("count edges", err)
	}
	return n, nil
}

// SeenEdge is an edge as the others see it. Durations are by Postgres's clock.
type SeenEdge struct {
	Instance, Name, Region, Version string
	MaxStaleness                    time.Duration
	SyncedAt                        *time.Time // nil: never
	SeenAt                          time.Time
	Age                             time.Duration // since SyncedAt; since its last report, if it has not synced
	Live                            bool          // as EdgeCount has it
	Applied                         bool          // whether it has applied the transaction that was asked about
}

// maxEdges bounds what is read of rows that an edge which was taken over has made up. Many more than these would exhaust the memory of
// whoever manages keys.
const maxEdges = 10_000

// ErrTooManyEdges says that there are more rows of edges than are read.
var ErrTooManyEdges = errors.New("table rekall.edges has more than 10000 rows, which can hardly be edges: lock the database user out that " +
	"has written them, and remove them (see \"After a break-in at an edge\" in SECURITY.md)")

// Edges returns all edges, which of them have applied this server's transaction xid (0: none is asked about), and the server.
func (s *Store) Edges(ctx context.Context, xid uint64) (edges []SeenEdge, server Server, err error) {
	// One transaction is on one server, even behind a pooler.
	err = pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) (err error) {
		if server, err = serverOf(ctx, tx); err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, `
select * from (
	select instance, name, region, version, max_staleness, synced_at, seen_at, age, `+liveEdge+`,
		coalesce(pg_visible_in_snapshot($1::xid8, applied) and applied_on = $2, false)
	from `+agedEdges+` limit $3
) first order by name, instance`, xid, server.String(), maxEdges+1) // CollectRows returns its error
		edges, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (e SeenEdge, err error) {
			err = row.Scan(&e.Instance, &e.Name, &e.Region, &e.Version, &e.MaxStaleness, &e.SyncedAt, &e.SeenAt, &e.Age, &e.Live, &e.Applied)
			return e, err
		})
		if len(edges) > maxEdges {
			return ErrTooManyEdges
		}
		return err
	})
	if err != nil {
		return nil, Server{}, failed("list edges", err)
	}
	return edges, server, nil
}

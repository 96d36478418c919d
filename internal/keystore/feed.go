package keystore

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// Server identifies what the feed is read from. A change of any field means that the past is not to be relied on.
type Server struct {
	SystemID    int64  // of the cluster
	StartedAt   int64  // of the postmaster, in microseconds since 1970: catches a rewind that left all else as it was
	RecoveredAt int64  // from a crash that the postmaster outlived, after which transaction ids are given again; as StartedAt
	InRecovery  bool   // a standby, whose replay may be paused while it looks healthy
	Database    uint32 // oid
	Table       uint32 // oid of the keys': another when they were restored in the same database, which brings rows with old stamps
}

// String names the server whose transaction ids are one sequence, which edges report beside a snapshot of them.
func (s Server) String() string {
	return fmt.Sprintf("%d/%d/%d/%d", s.SystemID, s.StartedAt, s.RecoveredAt, s.Database)
}

// serverColumns is a Server. Postgres counts anew after it has recovered from a crash, and tells everybody since when. Whoever
// resets the counters makes the feed start over once.
const serverColumns = `
	(select system_identifier from pg_control_system()) as system_id, pg_postmaster_start_time() as started_at,
	coalesce(pg_stat_get_bgwriter_stat_reset_time(), 'epoch') as recovered_at, pg_is_in_recovery() as in_recovery,
	(select oid::bigint from pg_database where datname = current_database()) as database, 'rekall.api_keys'::regclass::oid::bigint as table_id`

// serverRow is a row of serverColumns, as JSON.
type serverRow struct {
	SystemID    int64     `json:"system_id"`
	StartedAt   time.Time `json:"started_at"`
	RecoveredAt time.Time `json:"recovered_at"`
	InRecovery  bool      `json:"in_recovery"`
	Database    uint32
	Table       uint32 `json:"table_id"`
}

// serverSQL is the serverRow of the server that runs the statement.
const serverSQL = `(select row_to_json(server) from (select ` + serverColumns + `) server)`

func (r serverRow) server() Server {
	return Server{
		SystemID: r.SystemID, StartedAt: r.StartedAt.UnixMicro(), RecoveredAt: r.RecoveredAt.UnixMicro(), InRecovery: r.InRecovery,
		Database: r.Database, Table: r.Table,
	}
}

// serverOf returns the server that a transaction is on, and Postgres's own error: who asks wraps it, with the role that they need.
func serverOf(ctx context.Context, db querier) (Server, error) {
	var row serverRow
	err := db.QueryRow(ctx, `select `+serverSQL).Scan(&row)
	return row.server(), err
}

// Snapshot is one reading of the change feed: all of it as of one moment of the server.
type Snapshot struct {
	Server  Server
	Xmin    uint64           // every transaction below it had ended
	Xmax    uint64           // no transaction at or above it had ended; never falls while Server stays the same
	Now     time.Time        // the server's clock
	Beat    uint64           // of the last report that Options.Instance has made, as far as this server knows
	Text    string           // a snapshot, as pg_snapshot, that saw no more than this: where to read on from
	Changes []*apikey.Record // of the keys whose rows have changed, in no order
	Tiers   apikey.Tiers
	Unknown []string // names of tiers that a newer version has added, sorted: to this one their accounts have the tier free
	Overrun bool     // there were more than the limit: Changes is of no use, and all that was read before may be out of date

	// Feedback is hot_standby_feedback: without it, a primary removes row versions that a long read needs here, and a standby's replay
	// waits for the read, max_standby_streaming_delay long.
	Feedback bool
}

// MaxChanges is the most changes that are read at a time, in some 0.3 s. All edges read all changes: one import of millions, or
// one account's keys revoked, would take each of them longer than it may be without news.
const MaxChanges = 50_000

// keyColumns are what a record has of a key named k.
const keyColumns = `k.id, k.account, k.key_hash, k.environment, k.scopes, k.manage_keys, k.expires_at, k.revoked_at`

// recordColumns are what a recordRow receives, of a key named k and its limits, which one of the joins below adds.
const recordColumns = keyColumns + `,
	a.tier, coalesce(o.requests_per_minute, a.requests_per_minute), coalesce(o.burst, a.burst),
	coalesce(o.concurrent_requests, a.concurrent_requests)`

const (
	// limitsOfSome joins the limits of a few keys. The inner limits keep Postgres from reading all there are for them.
	limitsOfSome = `
	left join lateral (select * from rekall.account_limits a where a.account = k.account and k.environment = 'production' limit 1) a on true
	left join lateral (select * from rekall.key_limits o where o.key_id = k.id limit 1) o on true`

	// limitsOfMany joins the limits of as many keys as a scan reads.
	limitsOfMany = `
	left join rekall.account_limits a on a.account = k.account and k.environment = 'production'
	left join rekall.key_limits o on o.key_id = k.id`
)

// LaterSnapshot returns the one that saw more of two pg_snapshots, the first if they are of the same time.
func LaterSnapshot(a, b string) string {
	if xmaxOf(b) > xmaxOf(a) {
		return b
	}
	return a
}

// xmaxOf is 0 if the snapshot is empty.
func xmaxOf(snapshot string) uint64 {
	_, rest, _ := strings.Cut(snapshot, ":")
	xmax, _, _ := strings.Cut(rest, ":")
	n, _ := strconv.ParseUint(xmax, 10, 64)
	return n
}

// snapshotSQL is one statement, so that snapshot and rows belong together. It reads the rows that were stamped by transactions
// that the snapshot before could not see, however late they committed. A snapshot sees all but those at or above its xmax and
// those below that it names as in progress; a stamp is never a subtransaction's, which it does not name. So what it could not see
// is a few ranges of the index on stamps, and no row is read twice. To read on from its xmin instead would be to read all that was
// stamped since the oldest transaction in the cluster began, in each reading for as long as that lasts.
//
// The ranges leave out what this reading cannot see either: nobody sees the millions of rows of an import before it commits, or of one
// that was rolled back, and each edge would look at all of them in each reading. Of transactions that were named as in progress
// their status tells, also on a standby, whose snapshot names none. It is asked for after this reading's snapshot was taken: what had
// ended for that is never in progress again.
//
// A standby's snapshot does not name the transactions in progress, and they would pass for seen: the one to read on from sees none
// at or above the oldest of them. While that lasts, the snapshot of a Report sees more.
//
// Rows at or above xmax were stamped by another cluster, from which they were restored: this one's ids are not that far.
// Without the upper bound every reading would return them all until they are, and the status of what another server has named would be
// an error.
//
// A key is read anew too when the limits of its account or its own have changed. Each part has the limit: where one of them has
// more, so have all together. The order and the lateral joins keep Postgres, which cannot know that there is
// next to nothing to read, from reading all there is. What belongs to the whole reading stands in one row: repeated in each, it
// would be most of what is sent.
//
// Only a feed from a standby asks for the beat, from the table in which edges report: the role of one that was taken over can lock it,
// and all others would be without news.
func snapshotSQL(beat string) string {
	return `
with s as materialized (
	select pg_snapshot_xmin(pg_current_snapshot()) as xmin, pg_snapshot_xmax(pg_current_snapshot()) as xmax,
		case when pg_is_in_recovery() then format('%s:%s:', pg_snapshot_xmin(pg_current_snapshot()), pg_snapshot_xmin(pg_current_snapshot()))
			else pg_current_snapshot()::text end as snapshot,
		` + beat + ` as beat, clock_timestamp() as now,
		current_setting('hot_standby_feedback')::boolean as feedback,` + serverColumns + `,
		(select json_agg(t) from rekall.tiers t) as tiers
), unread as materialized (
	select lower(r)::text::xid8 as first, (upper(r) - 1)::text::xid8 as last
	from (
		select pg_snapshot_xmax(pg_current_snapshot()) as xmax, nullif($1::text, '')::pg_snapshot as seen
	) n cross join lateral unnest((
		select coalesce(range_agg(int8range(x::text::int8, x::text::int8, '[]'))
			filter (where case when x < n.xmax then pg_xact_status(x) in ('in progress', 'aborted') end is not true), '{}')
		from pg_snapshot_xip(n.seen) x
	) + int8multirange(int8range(least(pg_snapshot_xmax(n.seen)::text::int8, n.xmax::text::int8), n.xmax::text::int8)) - (
		select coalesce(range_agg(int8range(x::text::int8, x::text::int8, '[]')), '{}') from pg_snapshot_xip(pg_current_snapshot()) x
	)) r
)
select row_to_json(s)::text` + strings.Repeat(", null", len(new(recordRow).targets())) + ` from s
union all
(select null, ` + recordColumns + `
from unread u
cross join lateral (select ` + keyColumns + ` from rekall.api_keys k where ` + stampedUnread("k") + `) k` + limitsOfSome + ` limit $2)
union all
(select null, ` + recordColumns + `
from unread u
cross join lateral (select c.account from rekall.account_limits c where ` + stampedUnread("c") + `) c
cross join lateral (select ` + keyColumns + ` from rekall.api_keys k where k.account = c.account and k.environment = 'production' limit $2) k` + limitsOfSome + ` limit $2)
union all
(select null, ` + recordColumns + `
from unread u
cross join lateral (select c.key_id from rekall.key_limits c where ` + stampedUnread("c") + `) c
cross join lateral (select ` + keyColumns + ` from rekall.api_keys k where k.id = c.key_id limit 1) k` + limitsOfSome + ` limit $2)`
}

// The statement without and with the beat of the edge $3.
var (
	feedSQL    = snapshotSQL(`0`)
	standbySQL = snapshotSQL(`coalesce((select beat from rekall.edges where instance = $3), 0)`)
)

// stampedUnread is the condition that a row of a table was stamped by one of the unread transactions u, in this cluster.
func stampedUnread(table string) string {
	return strings.ReplaceAll(`t.change_xid between u.first and u.last order by t.change_xid limit $2`, "t.", table+".")
}

// snapshotHeader is what a Snapshot has once, besides its changes.
type snapshotHeader struct {
	serverRow
	Xmin     uint64 `json:",string"`
	Xmax     uint64 `json:",string"`
	Snapshot string
	Beat     uint64
	Now      time.Time
	Feedback bool
	Tiers    []tierRow
}

// Snapshot reads the feed: every row that has changed since a snapshot, which is the Text of an earlier one of the same
// server, if they are no more than limit, MaxChanges at most. With an empty one it reads no rows, only where the feed stands.
func (s *Store) Snapshot(ctx context.Context, since string, limit int) (Snapshot, error) {
	var (
		snap   Snapshot
		header pgtype.DriverBytes // of one row
		key    recordRow          // of the others
	)
	sql, args := feedSQL, []any{since, limit + 1}
	if s.instance != "" {
		sql, args = standbySQL, append(args, s.instance)
	}
	rows, _ := s.pool.Query(ctx, sql, args...) // ForEachRow returns its error
	_, err := pgx.ForEachRow(rows, append([]any{&header}, key.targets()...), func() error {
		if header != nil {
			return snap.begin(header)
		}
		record, err := key.record()
		if err != nil {
			return err
		}
		snap.Changes = append(snap.Changes, &record)
		return nil
	})
	if err != nil {
		return Snapshot{}, failedAtEdge("read change feed", err)
	}
	if snap.Overrun = len(snap.Changes) > limit; snap.Overrun {
		snap.Changes = nil
	}
	return snap, nil
}

// begin sets all but the changes.
func (snap *Snapshot) begin(header []byte) error {
	var r snapshotHeader
	if err := json.Unmarshal(header, &r); err != nil {
		return fmt.Errorf("decode snapshot: %w", err)
	}
	snap.Server, snap.Xmin, snap.Xmax, snap.Text, snap.Now, snap.Beat = r.server(), r.Xmin, r.Xmax, r.Snapshot, r.Now, r.Beat
	snap.Feedback = r.Feedback
	snap.Tiers, snap.Unknown = tiersOf(r.Tiers)
	return nil
}

// Found is the answer to a lookup, and the server that gave it.
type Found struct {
	Server  Server
	Now     time.Time        // the server's clock
	Records []*apikey.Record // of the keys that exist, in no order
}

const lookupSQL = `
with s as materialized (select ` + serverColumns + `, clock_timestamp() as now)
select s.system_id, s.started_at, s.recovered_at, s.in_recovery, s.database, s.table_id, s.now, ` + recordColumns + `
from s left join rekall.api_keys k on k.key_hash = any($1::bytea[])` + limitsOfSome

// Lookup reads the rows of the keys with these digests, in one statement.
func (s *Store) Lookup(ctx context.Context, digests []apikey.Digest) (Found, error) {
	hashes := make([][]byte, len(digests))
	for i := range digests {
		hashes[i] = digests[i][:]
	}
	var (
		found  Found
		server serverRow
		key    recordRow
	)
	targets := append([]any{&server.SystemID, &server.StartedAt, &server.RecoveredAt, &server.InRecovery, &server.Database, &server.Table,
		&found.Now}, key.targets()...)
	rows, _ := s.pool.Query(ctx, lookupSQL, hashes) // ForEachRow returns its error
	_, err := pgx.ForEachRow(rows, targets, func() error {
		if key.id == nil {
			return nil // no key matched
		}
		record, err := key.record()
		if err != nil {
			return err
		}
		found.Records = append(found.Records, &record)
		return nil
	})
	if err != nil {
		return Found{}, failedAtEdge("look up keys", err)
	}
	found.Server = server.server()
	return found, nil
}

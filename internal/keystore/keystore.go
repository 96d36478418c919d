// Package keystore reads and writes keys in Postgres: single rows for the cache, the change feed for the sync, and the
// statements of key administration. It knows nothing of caches.
package keystore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rekall-ai/gateway/internal/apikey"
)

var errBadURL = errors.New("database URL is not valid: write it as postgres://user:password@host:5432/database")

// Options of Open. The zero value is ready for an edge.
type Options struct {
	MaxConns        int32  // default 4, besides one for Listen
	ApplicationName string // as Postgres shows it; default "rekall-gateway"
}

// Store is a pool of connections to the Postgres that holds the keys.
type Store struct {
	pool *pgxpool.Pool
}

// connectTimeout leaves time for the query in the second that a request has.
const connectTimeout = 600 * time.Millisecond

// Open returns a store that connects when it is first used. url is a Postgres URL or connection string; behind PgBouncer's
// transaction pooling it needs default_query_exec_mode=exec. Errors never show it: it may hold a password.
func Open(url string, options Options) (*Store, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errBadURL
	}
	config.MaxConns, config.MinConns, config.MinIdleConns = 4, 0, 0
	if options.MaxConns > 0 {
		config.MaxConns = options.MaxConns
	}
	name := "rekall-gateway"
	if options.ApplicationName != "" {
		name = options.ApplicationName
	}
	config.ConnConfig.RuntimeParams["application_name"] = name
	if config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = connectTimeout
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	return &Store{pool: pool}, nil
}

// Close closes all connections. Calls in flight end with an error.
func (s *Store) Close() { s.pool.Close() }

// Server identifies what the feed is read from. A change of any field means that the past is not to be relied on.
type Server struct {
	SystemID   int64  // of the cluster
	StartedAt  int64  // of the postmaster, in microseconds since 1970: catches a rewind that left all else as it was
	InRecovery bool   // a standby
	Database   uint32 // oid
}

// Change is a key whose row changed, and the transaction that stamped it.
type Change struct {
	Record *apikey.Record
	Xid    uint64
}

// Snapshot is one reading of the change feed: all of it as of one moment of the server.
type Snapshot struct {
	Server  Server
	Xmin    uint64    // every transaction below it had ended: the watermark to read from next
	Xmax    uint64    // no transaction at or above it had begun
	Now     time.Time // the server's clock
	Changes []Change
}

// recordColumns are read by scanRecord.
const recordColumns = `k.id, k.account, k.key_hash, k.environment, k.scopes, k.expires_at, k.revoked_at`

// snapshotSQL is one statement, so that watermark and rows belong to the same snapshot. What commits later has a
// transaction id at or above the watermark and comes with a later reading, however late it commits.
const snapshotSQL = `
with s as materialized (
	select pg_snapshot_xmin(pg_current_snapshot()) as xmin, pg_snapshot_xmax(pg_current_snapshot()) as xmax,
		clock_timestamp() as now, (select system_identifier from pg_control_system()) as system_id,
		pg_postmaster_start_time() as started_at, pg_is_in_recovery() as in_recovery,
		(select oid from pg_database where datname = current_database()) as database
)
select s.xmin::text::bigint, s.xmax::text::bigint, s.now, s.system_id, s.started_at, s.in_recovery, s.database,
	k.change_xid::text::bigint, ` + recordColumns + `
from s left join rekall.api_keys k on k.change_xid >= $1::text::xid8`

// Snapshot reads the feed: every row stamped at or after since. With since 0 it reads no rows, only where the feed stands.
func (s *Store) Snapshot(ctx context.Context, since uint64) (Snapshot, error) {
	from := fmt.Sprint(since)
	if since == 0 {
		from = "18446744073709551615" // above every transaction
	}
	rows, err := s.pool.Query(ctx, snapshotSQL, from)
	if err != nil {
		return Snapshot{}, fmt.Errorf("read change feed: %w", err)
	}
	var snap Snapshot
	var xmin, xmax int64
	var started time.Time
	var xid *int64
	var row recordRow
	targets := append([]any{&xmin, &xmax, &snap.Now, &snap.Server.SystemID, &started, &snap.Server.InRecovery,
		&snap.Server.Database, &xid}, row.targets()...)
	_, err = pgx.ForEachRow(rows, targets, func() error {
		if xid == nil {
			return nil // no row changed
		}
		record, err := row.record()
		if err != nil {
			return err
		}
		snap.Changes = append(snap.Changes, Change{Record: record, Xid: uint64(*xid)})
		return nil
	})
	if err != nil {
		return Snapshot{}, fmt.Errorf("read change feed: %w", err)
	}
	snap.Xmin, snap.Xmax, snap.Server.StartedAt = uint64(xmin), uint64(xmax), started.UnixMicro()
	return snap, nil
}

// Found is the answer to a lookup, and the server that gave it.
type Found struct {
	StartedAt  int64 // as in Server
	InRecovery bool
	Now        time.Time        // the server's clock
	Records    []*apikey.Record // of the keys that exist, in no order
}

const lookupSQL = `
with s as materialized (
	select pg_postmaster_start_time() as started_at, pg_is_in_recovery() as in_recovery, clock_timestamp() as now
)
select s.started_at, s.in_recovery, s.now, ` + recordColumns + `
from s left join rekall.api_keys k on k.key_hash = any($1)`

// Lookup reads the rows of the keys with these digests.
func (s *Store) Lookup(ctx context.Context, digests []apikey.Digest) (Found, error) {
	hashes := make([][]byte, len(digests))
	for i := range digests {
		hashes[i] = digests[i][:]
	}
	rows, err := s.pool.Query(ctx, lookupSQL, hashes)
	if err != nil {
		return Found{}, fmt.Errorf("look up keys: %w", err)
	}
	var found Found
	var started time.Time
	var row recordRow
	targets := append([]any{&started, &found.InRecovery, &found.Now}, row.targets()...)
	_, err = pgx.ForEachRow(rows, targets, func() error {
		if !row.id.Valid {
			return nil // no key matched
		}
		record, err := row.record()
		if err != nil {
			return err
		}
		found.Records = append(found.Records, record)
		return nil
	})
	if err != nil {
		return Found{}, fmt.Errorf("look up keys: %w", err)
	}
	found.StartedAt = started.UnixMicro()
	return found, nil
}

// recordRow receives recordColumns, all null where the join found no key.
type recordRow struct {
	id, account, environment pgtype.Text
	hash                     []byte
	scopes                   []string
	expiresAt, revokedAt     *time.Time
}

func (r *recordRow) targets() []any {
	return []any{&r.id, &r.account, &r.hash, &r.environment, &r.scopes, &r.expiresAt, &r.revokedAt}
}

func (r *recordRow) record() (*apikey.Record, error) {
	environment, err := apikey.ParseEnvironment(r.environment.String)
	if err != nil {
		return nil, err
	}
	record := &apikey.Record{
		ID: r.id.String, Account: r.account.String, Environment: environment, Scopes: apikey.KnownScopes(r.scopes),
	}
	if copy(record.Digest[:], r.hash) != len(record.Digest) {
		return nil, errors.New("stored hash is not a SHA-256")
	}
	if r.expiresAt != nil {
		record.ExpiresAt = *r.expiresAt
	}
	if r.revokedAt != nil {
		record.RevokedAt = *r.revokedAt
	}
	return record, nil
}

const (
	// pingEvery bounds how long a dead listener goes unnoticed, with pingTimeout under 5 s.
	pingEvery   = 4 * time.Second
	pingTimeout = 900 * time.Millisecond
)

// Listen calls wake once it listens and at each notification of a change, on a connection of its own. It returns when the
// connection is lost or ctx is done; nothing is lost as long as the caller reads the feed after each wake.
func (s *Store) Listen(ctx context.Context, wake func()) error {
	dialCtx, cancel := context.WithTimeout(ctx, pingEvery)
	defer cancel()
	conn, err := pgx.ConnectConfig(dialCtx, s.pool.Config().ConnConfig)
	if err != nil {
		return fmt.Errorf("connect to listen: %w", err)
	}
	defer func() {
		closeCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pingTimeout)
		defer cancel()
		_ = conn.Close(closeCtx)
	}()
	if _, err := conn.Exec(dialCtx, "listen rekall_keys"); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	for {
		wake()
		if err := waitForNotification(ctx, conn); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
	}
}

// waitForNotification returns nil when there is one, and pings a connection that has been silent.
func waitForNotification(ctx context.Context, conn *pgx.Conn) error {
	for {
		waitCtx, cancel := context.WithTimeout(ctx, pingEvery)
		_, err := conn.WaitForNotification(waitCtx)
		cancel()
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case conn.IsClosed() || !errors.Is(err, context.DeadlineExceeded):
			return err
		}
		pingCtx, cancel := context.WithTimeout(ctx, pingTimeout)
		err = conn.Ping(pingCtx)
		cancel()
		if err != nil {
			return err
		}
	}
}

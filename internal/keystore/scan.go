package keystore

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// scanTimeout bounds a scan, whatever statement_timeout a role has for its short statements: 10 million hashes take some 15 s.
const scanTimeout = 5 * time.Minute

// scanLockTimeout is how long a scan waits for a table that somebody has locked, as an edge that was taken over may, before it lets go
// of its connection. It is tried again.
const scanLockTimeout = 5 * time.Second

// scanMemory is what a scan may take for each of its hash tables. One of a million keys used last takes twice that, which
// Postgres 15 allows.
const scanMemory = "'32MB'"

// HashPrefix is how many bytes of each key's hash ScanHashes reads: enough that no two keys ever share them by chance.
const HashPrefix = 16

// Which keys are worth having in memory is a question only if there are too many of them. Then last use decides, which is known to
// the hour. To count hours takes no memory and no sort, which would take longer than to read the keys. Of the first hour that is read
// only some keys have room; a LIMIT would leave out keys of any hour instead, as the join happens to bring them.
const (
	atMostSQL = `select count(*) <= $1::bigint from (select from rekall.api_keys limit $1::bigint + 1) k`

	everySQL = `select ` + recordColumns + `
from rekall.api_keys k` + limitsOfMany + ` limit $1`

	recentHourSQL = `
select min(hour), max(later) from (
	select hour, sum(count(*)) over (order by hour desc) - count(*) as later
	from (select date_bin('1 hour', last_used_at, timestamptz 'epoch') as hour from rekall.last_used) u group by hour
) h where later < $1::bigint`

	recentSQL = `select ` + recordColumns + `, u.last_used_at < $1::timestamptz + interval '1 hour'
from rekall.last_used u join rekall.api_keys k on k.id = u.key_id` + limitsOfMany + `
where u.last_used_at >= $1`

	neverUsedSQL = `select ` + recordColumns + `
from rekall.api_keys k` + limitsOfMany + `
where not exists (select from rekall.last_used u where u.key_id = k.id) limit $1`
)

// ScanHashes reads the hash of every key that is committed when begin returns. First it calls begin with the server and the
// number of keys, and ends with begin's error if there is one; then it calls each with the first HashPrefix bytes of each
// hash, in no order. They are valid during the call only. It holds one connection and the memory of a few rows.
func (s *Store) ScanHashes(ctx context.Context, begin func(server Server, keys int) error, each func(prefix []byte)) error {
	return s.scan(ctx, "scan key hashes", func(tx pgx.Tx, server Server) error {
		var keys int
		if err := tx.QueryRow(ctx, `select count(*) from rekall.api_keys`).Scan(&keys); err != nil {
			return err
		}
		if err := begin(server, keys); err != nil {
			return err
		}
		var prefix pgtype.DriverBytes
		rows, _ := tx.Query(ctx, fmt.Sprintf(`select substring(key_hash for %d) from rekall.api_keys`, HashPrefix)) // ForEachRow returns its error
		_, err := pgx.ForEachRow(rows, []any{&prefix}, func() error {
			each(prefix)
			return nil
		})
		return err
	})
}

// ScanRecent reads the rows of the n keys that are the likeliest to be used next: those used last, to the hour, then those never used.
// First it calls begin with the server, and ends with begin's error if there is one; then it calls each with each row, in no order.
func (s *Store) ScanRecent(ctx context.Context, n int, begin func(Server) error, each func(apikey.Record)) error {
	return s.scan(ctx, "scan recent keys", func(tx pgx.Tx, server Server) error {
		if err := begin(server); err != nil {
			return err
		}
		var (
			key       recordRow
			firstHour bool // whether the key is of the first hour that is read
			room      = n  // for those that are
		)
		read := func(targets []any, sql string, args ...any) error {
			rows, _ := tx.Query(ctx, sql, args...) // ForEachRow returns its error
			_, err := pgx.ForEachRow(rows, targets, func() error {
				switch {
				case n == 0 || firstHour && room == 0:
					return nil
				case firstHour:
					room--
				}
				n--
				record, err := key.record()
				if err == nil {
					each(record)
				}
				return err
			})
			return err
		}
		var all bool
		if err := tx.QueryRow(ctx, atMostSQL, n).Scan(&all); err != nil {
			return err
		}
		if all {
			return read(key.targets(), everySQL, n)
		}
		var (
			since pgtype.Timestamptz
			later pgtype.Int8 // keys of later hours
		)
		if err := tx.QueryRow(ctx, recentHourSQL, n).Scan(&since, &later); err != nil {
			return err
		}
		if since.Valid {
			room -= int(later.Int64)
			if err := read(append(key.targets(), &firstHour), recentSQL, since); err != nil {
				return err
			}
			firstHour = false
		}
		if n == 0 {
			return nil
		}
		return read(key.targets(), neverUsedSQL, n)
	})
}

// scan runs do in a transaction, which keeps all its statements on one server even behind a pooler. Each has a snapshot of its own,
// whatever the default of the database or the role is.
func (s *Store) scan(ctx context.Context, doing string, do func(pgx.Tx, Server) error) error {
	ctx, cancel := context.WithTimeout(ctx, scanTimeout)
	defer cancel()
	err := pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		settings := fmt.Sprintf("set local statement_timeout = %d; set local lock_timeout = %d; set local work_mem = %s; "+
			"set local plan_cache_mode = force_custom_plan; set local enable_seqscan = on",
			scanTimeout.Milliseconds(), scanLockTimeout.Milliseconds(), scanMemory)
		if _, err := tx.Exec(ctx, settings); err != nil {
			return err
		}
		server, err := serverOf(ctx, tx)
		if err != nil {
			return err
		}
		return do(tx, server)
	})
	if err != nil {
		return failedAtEdge(doing, err)
	}
	return nil
}

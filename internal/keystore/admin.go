package keystore

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// ErrNoRow says that there is no key with that id.
var ErrNoRow = errors.New("no key with that id")

// Row is a key as its owner sees it. Times are Postgres's.
type Row struct {
	ID          string
	Account     string
	Name        string
	Environment string
	Hint        string // the key's last four characters; empty: unknown
	Scopes      []string
	CreatedAt   time.Time
	ExpiresAt   *time.Time // nil: never
	RevokedAt   *time.Time // nil: not revoked
	ChangeXid   uint64     // transaction that last changed the row
	Now         time.Time  // the moment of the answer, by which the key is expired or not
}

const rowColumns = `id, account, name, environment, coalesce(hint, ''), scopes, created_at, expires_at, revoked_at, change_xid, now()`

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// readRow runs a statement that returns rowColumns of at most one key.
func readRow(ctx context.Context, db querier, sql string, args ...any) (Row, error) {
	rows, _ := db.Query(ctx, sql, args...) // CollectExactlyOneRow returns its error
	row, err := pgx.CollectExactlyOneRow(rows, scanRow)
	if errors.Is(err, pgx.ErrNoRows) {
		return Row{}, ErrNoRow
	}
	return row, err
}

func scanRow(row pgx.CollectableRow) (Row, error) {
	var r Row
	err := row.Scan(&r.ID, &r.Account, &r.Name, &r.Environment, &r.Hint, &r.Scopes, &r.CreatedAt, &r.ExpiresAt, &r.RevokedAt, &r.ChangeXid, &r.Now)
	return r, err
}

// NewKey is a row to be inserted.
type NewKey struct {
	ID, Account, Name string
	Environment       apikey.Environment
	Digest            apikey.Digest
	Hint              string // empty: unknown
	Scopes            apikey.Scopes
	Lifetime          time.Duration // from now by Postgres's clock, in microseconds; 0: for ever
}

// Insert adds a key.
func (s *Store) Insert(ctx context.Context, key NewKey) (Row, error) {
	var lifetime *time.Duration
	if key.Lifetime != 0 {
		lifetime = &key.Lifetime
	}
	row, err := readRow(ctx, s.pool, `
insert into rekall.api_keys (id, account, name, environment, key_hash, hint, scopes, expires_at)
values ($1, $2, $3, $4, $5, nullif($6, ''), $7, now() + $8::interval)
returning `+rowColumns, key.ID, key.Account, key.Name, key.Environment.String(), key.Digest[:], key.Hint, key.Scopes.Names(), lifetime)
	if err != nil {
		return Row{}, failed("create key", err)
	}
	return row, nil
}

// Get returns a key, or an error that wraps ErrNoRow.
func (s *Store) Get(ctx context.Context, id string) (Row, error) {
	row, err := readRow(ctx, s.pool, `select `+rowColumns+` from rekall.api_keys where id = $1`, id)
	if err != nil {
		return Row{}, failed("get key", err)
	}
	return row, nil
}

// Position is a key's place in a list. The zero value is the beginning.
type Position struct {
	CreatedAt time.Time
	ID        string
}

// List returns up to limit keys that follow a position, newest first. An empty account means all accounts.
func (s *Store) List(ctx context.Context, account string, after Position, limit int) ([]Row, error) {
	var createdAt *time.Time
	if after.ID != "" {
		createdAt = &after.CreatedAt
	}
	rows, _ := s.pool.Query(ctx, `
select `+rowColumns+` from rekall.api_keys
where (account = $1 or $1 = '' and account <> 'rekall:canary') and ($2::timestamptz is null or (created_at, id) < ($2, $3))
order by created_at desc, id desc limit $4`, account, createdAt, after.ID, limit) // CollectRows returns its error
	list, err := pgx.CollectRows(rows, scanRow)
	if err != nil {
		return nil, failed("list keys", err)
	}
	return list, nil
}

// Revoke revokes a key for good. It returns the row as it is now, and whether this call is what revoked it; the error wraps
// ErrNoRow if there is no such key.
func (s *Store) Revoke(ctx context.Context, id string) (row Row, revoked bool, err error) {
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		// The lock makes one of two callers at the same time the one that revoked.
		row, err = readRow(ctx, tx, `select `+rowColumns+` from rekall.api_keys where id = $1 for update`, id)
		if err != nil || row.RevokedAt != nil {
			return err
		}
		revoked = true
		row, err = readRow(ctx, tx, `update rekall.api_keys set revoked_at = now() where id = $1 returning `+rowColumns, id)
		return err
	})
	if err != nil {
		return Row{}, false, failed("revoke key", err)
	}
	return row, revoked, nil
}

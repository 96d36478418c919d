package keystore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// Row is a key as its owner sees it. Times are Postgres's.
type Row struct {
	ID          string
	Account     string
	Name        string
	Environment string
	Hint        *string // nil: unknown
	Scopes      []string
	CreatedAt   time.Time
	ExpiresAt   *time.Time // nil: never
	RevokedAt   *time.Time // nil: not revoked
	Now         time.Time  // the moment of the answer, by which the key is expired or not
}

// NewKey is a row to be inserted.
type NewKey struct {
	ID, Account, Name string
	Environment       apikey.Environment
	Digest            apikey.Digest
	Hint              string
	Scopes            apikey.Scopes
	Lifetime          time.Duration // by Postgres's clock; 0: for ever
}

const rowColumns = `id, account, name, environment, hint, scopes, created_at, expires_at, revoked_at, now()`

func scanRow(row pgx.CollectableRow) (Row, error) {
	var r Row
	err := row.Scan(&r.ID, &r.Account, &r.Name, &r.Environment, &r.Hint, &r.Scopes, &r.CreatedAt, &r.ExpiresAt, &r.RevokedAt, &r.Now)
	return r, err
}

// Insert adds a key.
func (s *Store) Insert(ctx context.Context, key NewKey) (Row, error) {
	var lifetime *time.Duration
	if key.Lifetime > 0 {
		lifetime = &key.Lifetime
	}
	rows, err := s.pool.Query(ctx, `
insert into rekall.api_keys (id, account, name, environment, key_hash, hint, scopes, expires_at)
values ($1, $2, $3, $4, $5, $6, $7, now() + $8::interval)
returning `+rowColumns, key.ID, key.Account, key.Name, key.Environment.String(), key.Digest[:], key.Hint, key.Scopes.Names(), lifetime)
	if err != nil {
		return Row{}, fmt.Errorf("insert key: %w", err)
	}
	row, err := pgx.CollectExactlyOneRow(rows, scanRow)
	if err != nil {
		return Row{}, fmt.Errorf("insert key: %w", err)
	}
	return row, nil
}

// Page says where a list goes on. The zero value is the beginning.
type Page struct {
	CreatedAt time.Time
	ID        string
}

// List returns up to limit keys, newest first, after a page's end. An empty account means all accounts.
func (s *Store) List(ctx context.Context, account string, after Page, limit int) ([]Row, error) {
	var createdAt *time.Time
	if after.ID != "" {
		createdAt = &after.CreatedAt
	}
	rows, err := s.pool.Query(ctx, `
select `+rowColumns+` from rekall.api_keys
where ($1 = '' or account = $1) and ($2::timestamptz is null or (created_at, id) < ($2, $3))
order by created_at desc, id desc limit $4`, account, createdAt, after.ID, limit)
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	list, err := pgx.CollectRows(rows, scanRow)
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	return list, nil
}

// ErrNoRow says that there is no key with that id.
var ErrNoRow = errors.New("no such row")

// Revoke revokes a key. It returns the row as it is now, and whether this call is what revoked it.
func (s *Store) Revoke(ctx context.Context, id string) (row Row, revoked bool, err error) {
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `select `+rowColumns+` from rekall.api_keys where id = $1 for update`, id)
		if err != nil {
			return err
		}
		row, err = pgx.CollectExactlyOneRow(rows, scanRow)
		if errors.Is(err, pgx.ErrNoRows) {
			return ErrNoRow
		}
		if err != nil || row.RevokedAt != nil {
			return err
		}
		rows, err = tx.Query(ctx, `update rekall.api_keys set revoked_at = now() where id = $1 returning `+rowColumns, id)
		if err != nil {
			return err
		}
		row, err = pgx.CollectExactlyOneRow(rows, scanRow)
		revoked = err == nil
		return err
	})
	if err != nil {
		return Row{}, false, fmt.Errorf("revoke key: %w", err)
	}
	return row, revoked, nil
}

package keystore

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// Keys are the statements on single keys. A Store runs each in a transaction of its own, a Tx in the one that it is.
type Keys struct{ db querier }

// Tx is a transaction that changes keys.
type Tx struct {
	Keys
	tx pgx.Tx
}

// attempts at a transaction that Postgres ended because another waited for it in turn.
const attempts = 5

// Change runs do in a transaction, which is committed if do returns nil. It runs do again if Postgres broke a deadlock at
// its expense: two keys that revoke each other wait for each other.
func (s *Store) Change(ctx context.Context, do func(*Tx) error) error {
	for attempt := 1; ; attempt++ {
		err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return do(&Tx{Keys{tx}, tx}) })
		if !deadlocked(err) || attempt == attempts {
			return failedToCommit(err)
		}
	}
}

func deadlocked(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "40P01"
}

// failedToCommit gives BEGIN's and COMMIT's bare errors a subject. What do returned has one.
func failedToCommit(err error) error {
	switch err.(type) { //nolint:errorlint // only what pgx returned as it is
	case *pgconn.PgError, *pgconn.ConnectError:
		return failed("change keys", err)
	}
	return err
}

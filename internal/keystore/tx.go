package keystore

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Reader has the statements that read one key, limits, the clock or the server. A Store runs each in a transaction of its own, a
// Tx in the one that it is.
type Reader struct{ db querier }

// Tx is a transaction that changes keys.
type Tx struct {
	Reader
	tx pgx.Tx
}

func (t *Tx) exec(ctx context.Context, doing, sql string, args ...any) error {
	if _, err := t.tx.Exec(ctx, sql, args...); err != nil {
		return failed(doing, err)
	}
	return nil
}

// execAtEdge is exec for what gateways do, in a transaction of its own.
func (s *Store) execAtEdge(ctx context.Context, doing, sql string, args ...any) error {
	if _, err := s.execAlone(ctx, sql, args...); err != nil {
		return failedAtEdge(doing, err)
	}
	return nil
}

// execAlone runs a statement that writes, and nothing else, in a transaction.
func (s *Store) execAlone(ctx context.Context, sql string, args ...any) (tag pgconn.CommandTag, err error) {
	err = s.alone(ctx, func(query *pgx.QueuedQuery) {
		query.Exec(func(t pgconn.CommandTag) error {
			tag = t
			return nil
		})
	}, sql, args...)
	return tag, err
}

// scanAlone is execAlone for a statement that returns a row.
func (s *Store) scanAlone(ctx context.Context, targets []any, sql string, args ...any) error {
	return s.alone(ctx, func(query *pgx.QueuedQuery) {
		query.QueryRow(func(row pgx.Row) error { return row.Scan(targets...) })
	}, sql, args...)
}

// alone runs a statement in read committed, whatever the default of the database or the role is: at other levels it would fail where it
// had to wait for another edge, and reads might fail beside it. Both are sent at once, and are one transaction without BEGIN and
// COMMIT: an edge that is stopped meanwhile holds no lock.
func (s *Store) alone(ctx context.Context, receive func(*pgx.QueuedQuery), sql string, args ...any) error {
	var batch pgx.Batch
	batch.Queue(`set transaction_isolation = 'read committed'`)
	receive(batch.Queue(sql, args...))
	return s.pool.SendBatch(ctx, &batch).Close()
}

// Change runs do in a transaction, which is committed if do returns nil. It runs do again if Postgres broke a deadlock at
// its expense: two keys that revoke each other wait for each other.
func (s *Store) Change(ctx context.Context, do func(*Tx) error) error {
	return repeatDeadlocked(func() error { return s.changeOnce(ctx, pgx.TxOptions{BeginQuery: beginBriefly}, do) })
}

// beginBriefly has Postgres roll back where do waits for something else, such as somebody to read the key that it prints: others
// may wait for what it has locked. A revocation among them is then still answered within the time that the API gives it.
const beginBriefly = `begin isolation level read committed; set local idle_in_transaction_session_timeout = '3s'`

// repeatDeadlocked runs a transaction again, a few times, if Postgres ended it because another waited for it in turn.
func repeatDeadlocked(transaction func() error) error {
	const attempts = 5
	for attempt := 1; ; attempt++ {
		err := transaction()
		if attempt == attempts || !hasState(err, deadlockDetected) {
			return err
		}
	}
}

// ChangeOnce is Change without a second attempt, since what do reads may not be there twice, and for as long as that takes. What was
// locked is read as it is then, whatever the default of the database or the role is.
func (s *Store) ChangeOnce(ctx context.Context, do func(*Tx) error) error {
	return s.changeOnce(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, do)
}

func (s *Store) changeOnce(ctx context.Context, options pgx.TxOptions, do func(*Tx) error) error {
	var failure error
	err := pgx.BeginTxFunc(ctx, s.pool, options, func(tx pgx.Tx) error {
		failure = do(&Tx{Reader{tx}, tx})
		return failure
	})
	if err != nil && failure == nil { // BEGIN or COMMIT: what do returns has a subject
		return failed("change keys", err)
	}
	return err
}

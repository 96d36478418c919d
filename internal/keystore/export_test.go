package keystore

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"
)

// What the tests look at besides the package's API.
const (
	LookupSQL = lookupSQL

	PingEvery   = pingEvery
	PingTimeout = pingTimeout
)

var (
	FeedSQL = feedSQL

	MigrateTo      = migrateTo
	TakeTurn       = takeTurn
	Migrating      = migrating
	InUse          = inUse
	MigrationFiles = migrationFiles
)

// Insert is Tx.Insert in a transaction of its own.
func (s *Store) Insert(ctx context.Context, key NewKey) (row Row, err error) {
	err = s.Change(ctx, func(tx *Tx) error {
		row, err = tx.Insert(ctx, key)
		return err
	})
	return row, err
}

// Revoke is Tx.Revoke in a transaction of its own.
func (s *Store) Revoke(ctx context.Context, reach Reach, id string) (row Row, revoked bool, err error) {
	err = s.Change(ctx, func(tx *Tx) error {
		row, revoked, err = tx.Revoke(ctx, reach, id)
		return err
	})
	return row, revoked, err
}

func (s *Store) Pool() *pgxpool.Pool { return s.pool }

// Grants maps each object of the table of grants to whether a role has rights on it.
func Grants() map[string]bool {
	objects := map[string]bool{}
	for _, g := range grants {
		objects[g.on] = g.edge != "" || g.admin != ""
	}
	return objects
}

package keystore

import "github.com/jackc/pgx/v5/pgxpool"

// What the tests look at besides the package's API.
const (
	SnapshotSQL = snapshotSQL
	LookupSQL   = lookupSQL
)

var (
	MigrateTo  = migrateTo
	Migrations = migrations
)

func (s *Store) Pool() *pgxpool.Pool { return s.pool }

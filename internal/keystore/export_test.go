package keystore

import "github.com/jackc/pgx/v5/pgxpool"

// What the tests look at besides the package's API.
const (
	LookupSQL = lookupSQL

	PingEvery   = pingEvery
	PingTimeout = pingTimeout
)

var (
	SnapshotSQL = snapshotSQL

	MigrateTo  = migrateTo
	Migrations = migrations
)

func Unread(snapshot string) (first, last string) { return unread(snapshot) }

func (s *Store) Pool() *pgxpool.Pool { return s.pool }

// Grants maps each object of the table of grants to whether a role has rights on it.
func Grants() map[string]bool {
	objects := map[string]bool{}
	for _, g := range grants {
		objects[g.on] = g.edge != "" || g.admin != ""
	}
	return objects
}

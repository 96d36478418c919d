package keystore

import (
	"context"
	"io/fs"
)

// SchemaVersion returns the version of the database's schema.
func (s *Store) SchemaVersion(ctx context.Context) (int32, error) {
	var version int32
	if err := s.pool.QueryRow(ctx, "select version from "+versionTable).Scan(&version); err != nil {
		return 0, failedAtEdge("read the schema's version", err)
	}
	return version, nil
}

// KnownSchemaVersion is the newest version of the schema that this binary knows: the number of its migrations.
func KnownSchemaVersion() int32 {
	files, _ := fs.Glob(migrationFiles, "*.sql") // the pattern is a good one
	return int32(len(files))
}

package keystore

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/tern/v2/migrate"
)

//go:embed migrations/*.sql
var migrations embed.FS

// ErrNewerSchema says that the database was migrated by a newer version of the gateway.
var ErrNewerSchema = errors.New("database schema is newer than this binary: upgrade the binary")

// Migrate creates the schema rekall or brings it up to this version, and returns the versions before and after. Several
// may run at once: the first does the work under an advisory lock.
func Migrate(ctx context.Context, url string) (from, to int32, err error) {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return 0, 0, errBadURL
	}
	if config.ConnectTimeout == 0 {
		config.ConnectTimeout = 10 * time.Second
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return 0, 0, fmt.Errorf("migrate: %w", err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	// The version table lives in the schema, so the schema comes first. Two sessions may both find it missing.
	if _, err = conn.Exec(ctx, "select pg_advisory_lock(hashtext('rekall schema'))"); err != nil {
		return 0, 0, fmt.Errorf("migrate: %w", err)
	}
	if _, err = conn.Exec(ctx, "create schema if not exists rekall"); err != nil {
		return 0, 0, fmt.Errorf("create schema: %w", err)
	}
	migrator, err := migrate.NewMigrator(ctx, conn, "rekall.schema_version")
	if err != nil {
		return 0, 0, fmt.Errorf("migrate: %w", err)
	}
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return 0, 0, fmt.Errorf("read migrations: %w", err)
	}
	if err = migrator.LoadMigrations(files); err != nil {
		return 0, 0, fmt.Errorf("read migrations: %w", err)
	}
	if from, err = migrator.GetCurrentVersion(ctx); err != nil {
		return 0, 0, fmt.Errorf("read schema version: %w", err)
	}
	to = int32(len(migrator.Migrations))
	if from > to {
		return from, to, fmt.Errorf("%w (schema version %d, binary %d)", ErrNewerSchema, from, to)
	}
	if err = migrator.Migrate(ctx); err != nil {
		return from, from, fmt.Errorf("migrate: %w", err)
	}
	return from, to, nil
}

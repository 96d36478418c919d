package keystore

import (
	"context"
	"embed"
	"fmt"
	"io/fs"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/tern/v2/migrate"
)

//go:embed migrations/*.sql
var migrations embed.FS

// migrationFiles are this binary's migrations.
var migrationFiles, _ = fs.Sub(migrations, "migrations") // the name is a good one

const (
	versionTable = "rekall.schema_version"

	// migrateLock is the advisory lock of migrations: an arbitrary number. The migrator has a lock of its own, but the
	// schema that holds its version table must exist before.
	migrateLock = 7315026644159093

	migrateConnectTimeout = 10 * time.Second

	// lockWait is how long a migration may wait for a table that others use, such as pg_dump, before it lets go and tries again:
	// all statements of gateways for that table wait behind it, and a request waits no longer than a second.
	lockWait = 500 * time.Millisecond

	// lockPause is the time between two tries, in which gateways catch up; lockPatience is that of all tries.
	lockPause    = 2 * time.Second
	lockPatience = time.Minute

	// turnPatience is how long a migration may wait for another's end: one that waits for a table, and then works as long.
	turnPatience = 2 * lockPatience
)

// errNewerSchema says that the database was migrated by a newer version of the gateway.
func errNewerSchema(schema, binary int32) error {
	return fmt.Errorf("database schema is version %d, newer than this binary's %d: upgrade the binary", schema, binary)
}

// Migrate creates the schema rekall or brings it up to this binary's version, and returns the versions before and after. Any
// number of processes may call it at once: one works, the others wait for two minutes at most. It must not go through PgBouncer's
// transaction pooling, which does not hold locks.
func Migrate(ctx context.Context, url string) (from, to int32, err error) {
	return MigrateAndGrant(ctx, url, Roles{})
}

// MigrateAndGrant is Migrate, and then gives the roles exactly the rights that they need in the schema: it creates a role
// that does not exist, as a group that cannot log in, and takes away what is too much. Where it returns an error, the
// rights are what they were. It fails if a role has rights that no revocation reaches, such as a superuser's.
func MigrateAndGrant(ctx context.Context, url string, roles Roles) (from, to int32, err error) {
	if err := roles.Check(); err != nil {
		return 0, 0, err
	}
	conn, end, err := connectToMigrate(ctx, url, "migrate")
	if err != nil {
		return 0, 0, err
	}
	defer end()
	if from, to, err = migrateTo(ctx, conn, migrationFiles, lockPatience); err != nil {
		return from, from, fmt.Errorf("migrate: %w", byOwner(err))
	}
	if err = grantTo(ctx, conn, roles); err != nil {
		return from, to, fmt.Errorf("the schema is version %d, but the roles have the rights that they had: grant rights: %w", to, byOwner(err))
	}
	return from, to, nil
}

// Migration is a step of the schema from one version to the next.
type Migration struct {
	Version int32  // of the schema after it
	Name    string // of its file, such as 003_key_life.sql
	SQL     string // all of it; it runs in one transaction
}

// Plan returns the schema's version and the migrations that Migrate would run, first to last, without changing anything: its
// connection is read-only. Version 0: there is no schema yet.
func Plan(ctx context.Context, url string) (from int32, pending []Migration, err error) {
	conn, end, err := connectToMigrate(ctx, url, "plan migrations")
	if err != nil {
		return 0, nil, err
	}
	defer end()
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) (err error) {
		from, err = schemaVersion(ctx, tx)
		return err
	})
	if err != nil {
		return 0, nil, failedAs(errNotOwner, "plan migrations", err)
	}
	all, err := known(ctx)
	if err != nil {
		return 0, nil, fmt.Errorf("plan migrations: %w", err)
	}
	if newest := int32(len(all)); from > newest {
		return from, nil, fmt.Errorf("plan migrations: %w", errNewerSchema(from, newest))
	}
	return from, all[from:], nil
}

// connectToMigrate returns a connection and what closes it, which releases the lock of migrations.
func connectToMigrate(ctx context.Context, url, doing string) (conn *pgx.Conn, end func(), err error) {
	config, err := parse(url, migrateConnectTimeout)
	if err != nil {
		return nil, nil, err
	}
	if conn, err = pgx.ConnectConfig(ctx, config.ConnConfig); err != nil {
		return nil, nil, failedAs(errNotOwner, doing, err)
	}
	end = func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		_ = conn.Close(ctx)
	}
	if err = checkServer(ctx, conn); err != nil {
		end()
		return nil, nil, fmt.Errorf("%s: %w", doing, err)
	}
	return conn, end, nil
}

// oldestServer is the least server_version_num that has all that the feed needs.
const oldestServer = 140000

// checkServer demands a version that takes all migrations, or it would keep the first of them, and UTF8: in any other encoding Postgres
// counts the characters of names wrongly, or cannot take all of them.
func checkServer(ctx context.Context, conn *pgx.Conn) error {
	var (
		version  int
		encoding string
	)
	err := conn.QueryRow(ctx, "select current_setting('server_version_num')::int, current_setting('server_encoding')").Scan(&version, &encoding)
	if err != nil {
		return err
	}
	if version < oldestServer {
		return fmt.Errorf("the server is PostgreSQL %d, which is too old: use %d or newer", version/10000, oldestServer/10000)
	}
	if encoding != "UTF8" {
		return fmt.Errorf("the database's encoding is %s, which cannot hold every name of a key: "+
			"create the database with encoding 'UTF8' (and template template0)", encoding)
	}
	return nil
}

func schemaVersion(ctx context.Context, tx pgx.Tx) (version int32, err error) {
	var exists bool
	if err = tx.QueryRow(ctx, "select to_regclass($1) is not null", versionTable).Scan(&exists); err != nil || !exists {
		return 0, err
	}
	err = tx.QueryRow(ctx, "select version from "+versionTable).Scan(&version)
	return version, err
}

// known returns this binary's migrations, read by the migrator that would run them. It needs no connection for that.
func known(ctx context.Context) ([]Migration, error) {
	migrator, err := migrate.NewMigrator(ctx, nil, versionTable)
	if err != nil {
		return nil, err
	}
	if err := migrator.LoadMigrations(migrationFiles); err != nil {
		return nil, err
	}
	all := make([]Migration, 0, len(migrator.Migrations))
	for _, m := range migrator.Migrations {
		all = append(all, Migration{Version: m.Sequence, Name: m.Name, SQL: m.UpSQL})
	}
	return all, nil
}

func migrateTo(ctx context.Context, conn *pgx.Conn, files fs.FS, patience time.Duration) (from, to int32, err error) {
	if err = takeTurn(ctx, conn, turnPatience); err != nil {
		return 0, 0, err
	}
	if err = createSchema(ctx, conn); err != nil {
		return 0, 0, err
	}
	migrator, err := migrate.NewMigrator(ctx, conn, versionTable)
	if err != nil {
		return 0, 0, err
	}
	if err = migrator.LoadMigrations(files); err != nil {
		return 0, 0, err
	}
	if from, err = migrator.GetCurrentVersion(ctx); err != nil {
		return 0, 0, err
	}
	to = int32(len(migrator.Migrations))
	if from > to {
		return from, to, errNewerSchema(from, to)
	}
	var prepareErr error
	migrator.OnStart = func(int32, string, string, string) { prepareErr = prepareMigration(ctx, conn) } // in the migration's transaction
	for deadline := time.Now().Add(patience); ; {
		err = migrator.Migrate(ctx)
		if prepareErr != nil { // what the migrator says is that its transaction is aborted
			return from, to, prepareErr
		}
		if !hasState(err, lockNotAvailable) {
			return from, to, err
		}
		if time.Now().After(deadline) {
			return from, to, inUse(ctx, conn, err)
		}
		select {
		case <-ctx.Done():
			return from, to, ctx.Err()
		case <-time.After(lockPause):
		}
	}
}

// prepareMigration bounds the waits for locks of a migration's transaction. First it has autovacuum let go of our tables: Postgres cancels
// one that is waited for, but only after deadlock_timeout, which is longer than a migration may hold up the gateways' statements.
// The lock that it waits for is in nobody else's way. Who else has it, such as a VACUUM by hand, matters only to a migration of that
// table.
func prepareMigration(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, fmt.Sprintf(`
do $$
declare
	ours regclass;
begin
	perform set_config('lock_timeout', (extract(epoch from current_setting('deadlock_timeout')::interval) * 1000 + %[1]d)::int::text, true);
	for ours in select oid from pg_class where relnamespace = 'rekall'::regnamespace and relkind = 'r'
		and has_table_privilege(oid, 'update, delete, truncate') -- of which LOCK needs one
	loop
		begin
			execute format('lock table %%s in share update exclusive mode', ours);
		exception when lock_not_available then
		end;
	end loop;
end $$;
set local lock_timeout = %[1]d`, lockWait.Milliseconds()))
	return err
}

// takeTurn takes the lock of migrations, which the connection then keeps.
func takeTurn(ctx context.Context, conn *pgx.Conn, patience time.Duration) error {
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf("set local lock_timeout = %d", patience.Milliseconds())); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "select pg_advisory_lock($1)", migrateLock)
		return err
	})
	if hasState(err, lockNotAvailable) {
		return migrating(ctx, conn, err)
	}
	return err
}

// migrating says who has the lock of migrations, or if nobody can tell, what came of waiting for it.
func migrating(ctx context.Context, conn *pgx.Conn, waited error) error {
	var application string
	var pid int
	err := conn.QueryRow(ctx, `select l.pid, coalesce(a.application_name, '')
		from pg_locks l left join pg_stat_activity a on a.pid = l.pid
		where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and (l.classid::bigint << 32) | l.objid::bigint = $1
			and l.database = (select oid from pg_database where datname = current_database())`, migrateLock).Scan(&pid, &application)
	if err != nil {
		return fmt.Errorf("another migration took too long: run migrate again: %w", waited)
	}
	return fmt.Errorf("the lock of migrations is held by Postgres process %d (%q): "+
		"run migrate again when that has ended, or end it with pg_terminate_backend(%[1]d)", pid, application)
}

// inUse says who has used a table of ours longest, or if nobody can tell, what came of waiting for one.
func inUse(ctx context.Context, conn *pgx.Conn, waited error) error {
	var table, application string
	var pid int
	err := conn.QueryRow(ctx, `select l.relation::regclass::text, l.pid, coalesce(a.application_name, '')
		from pg_locks l join pg_class c on c.oid = l.relation left join pg_stat_activity a on a.pid = l.pid
		where c.relnamespace = 'rekall'::regnamespace and c.relkind = 'r' and l.granted and l.pid <> pg_backend_pid()
			and l.database = (select oid from pg_database where datname = current_database())
		order by a.xact_start limit 1`).Scan(&table, &pid, &application)
	if err != nil {
		return fmt.Errorf("a table was in use for too long: run migrate again when no long transaction, such as pg_dump's, uses it: %w", waited)
	}
	return fmt.Errorf("table %s is in use by Postgres process %d (%q): run migrate again when its transaction has ended, or end it with pg_terminate_backend(%[2]d)",
		table, pid, application)
}

// createSchema looks before it creates: IF NOT EXISTS demands the right to create schemas even where there is nothing to
// do, and an administrator may have made the schema for a user without that right.
func createSchema(ctx context.Context, conn *pgx.Conn) error {
	var exists bool
	if err := conn.QueryRow(ctx, "select exists (select from pg_namespace where nspname = 'rekall')").Scan(&exists); err != nil {
		return err
	}
	if exists {
		return nil
	}
	_, err := conn.Exec(ctx, "create schema rekall")
	return err
}

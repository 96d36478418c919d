package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestMigrateTwiceDoesNothingTheSecondTime(t *testing.T) {
	databaseURL := pgtest.URL(t)
	from, to, err := keystore.Migrate(t.Context(), databaseURL)
	if err != nil || from != 0 || to < 1 {
		t.Fatalf("first: from %d to %d, %v", from, to, err)
	}
	key := insert(t, open(t, databaseURL, keystore.Options{}))
	again, same, err := keystore.Migrate(t.Context(), databaseURL)
	if err != nil || again != to || same != to {
		t.Fatalf("second: from %d to %d, %v", again, same, err)
	}
	if _, err := open(t, databaseURL, keystore.Options{}).Get(t.Context(), keystore.Everything(), key.ID); err != nil {
		t.Error(err)
	}
}

// relations is the number of tables, indexes and sequences in the schema rekall.
func relations(t *testing.T, databaseURL string) (n int) {
	t.Helper()
	query := `select count(*) from pg_class where relnamespace = to_regnamespace('rekall')`
	if err := connect(t, databaseURL).QueryRow(t.Context(), query).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestPlanShowsWhatMigrateRunsAndChangesNothing(t *testing.T) {
	databaseURL := pgtest.URL(t)
	from, pending, err := keystore.Plan(t.Context(), databaseURL)
	if err != nil || from != 0 || len(pending) < 2 {
		t.Fatalf("from %d, %d migrations, %v", from, len(pending), err)
	}
	for i, m := range pending {
		file, err := fs.ReadFile(keystore.MigrationFiles, m.Name)
		if err != nil || m.Version != int32(i+1) || strings.TrimSpace(m.SQL) != strings.TrimSpace(string(file)) {
			t.Errorf("migration %d: version %d, %s is not its file: %v", i+1, m.Version, m.Name, err)
		}
	}
	if n := relations(t, databaseURL); n != 0 {
		t.Errorf("the plan made %d objects", n)
	}

	// From every version on, the plan is what is left.
	some, conn := fstest.MapFS{}, connect(t, databaseURL) // one, which holds the lock of migrations until it is closed
	for i, m := range pending {
		text, err := fs.ReadFile(keystore.MigrationFiles, m.Name)
		if err != nil {
			t.Fatal(err)
		}
		some[m.Name] = &fstest.MapFile{Data: text}
		if _, _, err := keystore.MigrateTo(t.Context(), conn, some, 0); err != nil {
			t.Fatal(err)
		}
		before := relations(t, databaseURL)
		version, left, err := keystore.Plan(t.Context(), databaseURL)
		if err != nil || version != int32(i+1) || len(left) != len(pending)-i-1 || len(left) > 0 && left[0].Version != version+1 {
			t.Errorf("at version %d: from %d, %d migrations, %v", i+1, version, len(left), err)
		}
		if n := relations(t, databaseURL); n != before {
			t.Errorf("the plan made %d objects of %d", n, before)
		}
	}
	pgtest.Exec(t, databaseURL, `update rekall.schema_version set version = 77`)
	if _, _, err := keystore.Plan(t.Context(), databaseURL); err == nil || !strings.HasSuffix(err.Error(), newerSchema) {
		t.Errorf("a newer schema: %v, want %q", err, newerSchema)
	}
}

// TestDatabaseThatIsNotInUTF8IsRefusedUntouched: key management would fail in it later, at the first name that is not ASCII.
func TestDatabaseThatIsNotInUTF8IsRefusedUntouched(t *testing.T) {
	for _, encoding := range []string{"SQL_ASCII", "LATIN1"} {
		server, name := pgtest.URL(t), "test_"+strings.ToLower(apikey.RandomText(20))
		pgtest.Exec(t, server, fmt.Sprintf(`create database %q encoding %s locale 'C' template template0`, name, encoding))
		t.Cleanup(func() { pgtest.Exec(t, server, fmt.Sprintf(`drop database %q with (force)`, name)) })
		u, err := url.Parse(server)
		if err != nil {
			t.Fatal(err)
		}
		u.Path = "/" + name
		_, _, migrateErr := keystore.Migrate(t.Context(), u.String())
		_, _, planErr := keystore.Plan(t.Context(), u.String())
		for doing, err := range map[string]error{"migrate": migrateErr, "plan": planErr} {
			if err == nil || !strings.Contains(err.Error(), encoding) || !strings.Contains(err.Error(), "create the database with encoding 'UTF8'") {
				t.Errorf("%s, %s: the error is %v", encoding, doing, err)
			}
		}
		if n := relations(t, u.String()); n != 0 {
			t.Errorf("%s: %d objects were made", encoding, n)
		}
	}
}

func TestMigrationsAtOnceRunOnce(t *testing.T) {
	databaseURL := pgtest.URL(t)
	const processes = 8
	var wg sync.WaitGroup
	start := make(chan struct{})
	fresh := make(chan int32, processes)
	for range processes {
		conn, err := pgx.Connect(t.Context(), databaseURL)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
			<-start // connecting takes longer than migrating, and would put them in a row
			from, _, err := keystore.MigrateTo(t.Context(), conn, keystore.MigrationFiles, 0)
			if err != nil {
				t.Error(err)
			}
			fresh <- from
		})
	}
	close(start)
	wg.Wait()
	close(fresh)
	worked := 0
	for from := range fresh {
		if from == 0 {
			worked++
		}
	}
	if worked != 1 {
		t.Errorf("%d of %d migrated", worked, processes)
	}
}

func TestMigrationThatCannotHaveItsTurnSaysWhoHasItAndTakesItLater(t *testing.T) {
	databaseURL := pgtest.URL(t)
	first, second := connect(t, databaseURL), connect(t, databaseURL)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := keystore.TakeTurn(ctx, first, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	holder := fmt.Sprintf("process %d ", first.PgConn().PID())
	if err := keystore.TakeTurn(ctx, second, time.Millisecond); err == nil || !strings.Contains(err.Error(), holder) {
		t.Errorf("the error is %v, want one with %q", err, holder)
	}
	if err := first.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := keystore.TakeTurn(ctx, second, time.Minute); err != nil {
		t.Errorf("when the other has ended: %v", err)
	}
	var limit string
	if err := second.QueryRow(ctx, "show lock_timeout").Scan(&limit); err != nil || limit != "0" {
		t.Errorf("what follows may wait for %s, %v", limit, err)
	}
}

var newerSchema = fmt.Sprintf("database schema is version 77, newer than this binary's %d: upgrade the binary", keystore.KnownSchemaVersion())

func TestNewerSchemaIsRefusedUntouched(t *testing.T) {
	databaseURL := database(t)
	pgtest.Exec(t, databaseURL, `update rekall.schema_version set version = 77`)
	if _, _, err := keystore.Migrate(t.Context(), databaseURL); err == nil || !strings.HasSuffix(err.Error(), newerSchema) {
		t.Errorf("got %v, want %q", err, newerSchema)
	}
	var version int
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select version from rekall.schema_version`).Scan(&version); err != nil || version != 77 {
		t.Errorf("version %d, %v", version, err)
	}
}

func TestFailedMigrationLeavesNothingHalfDone(t *testing.T) {
	databaseURL := database(t)
	first, err := fs.ReadFile(keystore.MigrationFiles, "001_api_keys.sql")
	if err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{
		"001_api_keys.sql": {Data: first},
		"002_broken.sql":   {Data: []byte(`create table rekall.half (id int); select 1/0;`)},
	}
	pgtest.Exec(t, databaseURL, "drop table rekall.edges")
	pgtest.Exec(t, databaseURL, "update rekall.schema_version set version = 1")
	if _, _, err := keystore.MigrateTo(t.Context(), connect(t, databaseURL), files, 0); err == nil {
		t.Fatal("a broken migration succeeded")
	}
	var version, tables int
	conn := connect(t, databaseURL)
	if err := conn.QueryRow(t.Context(), `select (select version from rekall.schema_version),
		(select count(*) from pg_tables where tablename = 'half')`).Scan(&version, &tables); err != nil {
		t.Fatal(err)
	}
	if version != 1 || tables != 0 {
		t.Errorf("version %d, %d tables", version, tables)
	}
}

// inUse begins a transaction that has read api_keys, as pg_dump's has, and returns what ends it. The schema is a version behind.
func inUse(t *testing.T, databaseURL string) (files fs.FS, end func()) {
	t.Helper()
	files = fstest.MapFS{"001_column.sql": {Data: []byte(`alter table rekall.api_keys add column new_column int`)}}
	pgtest.Exec(t, databaseURL, "update rekall.schema_version set version = 0")
	tx, err := connect(t, databaseURL).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "select from rekall.api_keys"); err != nil {
		t.Fatal(err)
	}
	return files, func() {
		if err := tx.Rollback(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestMigrationThatWaitsForATableLetsGatewaysReadIt(t *testing.T) {
	databaseURL := database(t)
	files, end := inUse(t, databaseURL)
	migrating, gateway := connect(t, databaseURL), connect(t, databaseURL)
	migrated := make(chan error, 1)
	go func() {
		_, _, err := keystore.MigrateTo(t.Context(), migrating, files, time.Hour)
		migrated <- err
	}()
	waits := `select exists (select from pg_locks where not granted and relation = 'rekall.api_keys'::regclass)`
	for waiting := false; !waiting; {
		if err := gateway.QueryRow(t.Context(), waits).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := gateway.Exec(ctx, "select from rekall.api_keys"); err != nil {
		t.Errorf("behind the migration: %v", err)
	}
	end()
	if err := <-migrated; err != nil {
		t.Errorf("when the table is free: %v", err)
	}
}

func TestMigrationThatCannotHaveATableSaysWhoUsesItAndChangesNothing(t *testing.T) {
	databaseURL := database(t)
	files, end := inUse(t, databaseURL)
	defer end()
	_, _, err := keystore.MigrateTo(t.Context(), connect(t, databaseURL), files, 0)
	if err == nil || !strings.Contains(err.Error(), "table rekall.api_keys is in use by Postgres process ") {
		t.Errorf("the error is %v", err)
	}
	var version int
	if err := connect(t, databaseURL).QueryRow(t.Context(), "select version from rekall.schema_version").Scan(&version); err != nil || version != 0 {
		t.Errorf("version %d, %v", version, err)
	}
}

func TestMigrationThatCannotSayWhoIsInItsWaySaysWhatItMet(t *testing.T) {
	databaseURL := pgtest.URL(t)
	waited := errors.New("canceling statement due to lock timeout")
	for name, say := range map[string]func(context.Context, *pgx.Conn, error) error{"turn": keystore.Migrating, "table": keystore.InUse} {
		if err := say(t.Context(), connect(t, databaseURL), waited); !errors.Is(err, waited) { // nobody is, any longer
			t.Errorf("%s: the error is %v", name, err)
		}
	}
}

func TestMigrateNeedsNoRightToCreateSchemasWhereOneIsGiven(t *testing.T) {
	databaseURL := pgtest.URL(t)
	role := "gateway_" + strings.ToLower(apikey.RandomText(8))
	password := apikey.RandomText(20)
	pgtest.Exec(t, databaseURL, fmt.Sprintf(`create role %s login password '%s'; create schema rekall authorization %s`, role, password, role))
	t.Cleanup(func() {
		pgtest.Exec(t, databaseURL, fmt.Sprintf(`drop owned by %s cascade; drop role %s`, role, role))
	})
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, password)
	if _, _, err := keystore.Migrate(t.Context(), u.String()); err != nil {
		t.Fatal(err)
	}
	// The role that owns the schema, and is no superuser, can do all that the gateway does.
	store := open(t, u.String(), keystore.Options{})
	start := snapshot(t, store, "")
	key := insert(t, store)
	if _, revoked, err := store.Revoke(t.Context(), keystore.Everything(), key.ID); err != nil || !revoked {
		t.Errorf("revoked %v, %v", revoked, err)
	}
	if !revokedIn(snapshot(t, store, start.Text), key) {
		t.Error("the change is not in the feed")
	}
}

// TestMigrationThatIsDeniedSaysWhoMayRunIt lacks a right in the middle of a migration.
func TestMigrationThatIsDeniedSaysWhoMayRunIt(t *testing.T) {
	databaseURL := database(t)
	role := pgtest.Role(t, databaseURL)
	pgtest.Exec(t, databaseURL, "create role "+role)
	login := pgtest.Login(t, databaseURL, role)
	pgtest.Exec(t, databaseURL, fmt.Sprintf("grant usage on schema rekall to %[1]s; grant select, update on rekall.schema_version to %[1]s", role))
	pgtest.Exec(t, databaseURL, "update rekall.schema_version set version = version - 1")
	if _, _, err := keystore.Migrate(t.Context(), login); err == nil || !strings.Contains(err.Error(), "migrate as the owner of the schema") {
		t.Errorf("the error is %v", err)
	}
}

func TestDatabaseWithoutSchemaSaysWhatToRun(t *testing.T) {
	store := open(t, pgtest.URL(t), keystore.Options{})
	calls := map[string]func(context.Context) error{
		"Snapshot": func(ctx context.Context) error { _, err := store.Snapshot(ctx, "", keystore.MaxChanges); return err },
		"Lookup":   func(ctx context.Context) error { _, err := store.Lookup(ctx, nil); return err },
		"Insert":   func(ctx context.Context) error { _, err := store.Insert(ctx, newKey()); return err },
		"Get": func(ctx context.Context) error {
			_, err := store.Get(ctx, keystore.Everything(), newKey().ID)
			return err
		},
		"List": func(ctx context.Context) error {
			_, err := store.List(ctx, keystore.Everything(), keystore.Filter{}, keystore.Position{}, 1)
			return err
		},
		"Revoke": func(ctx context.Context) error {
			_, _, err := store.Revoke(ctx, keystore.Everything(), newKey().ID)
			return err
		},
	}
	for name, call := range calls {
		if err := call(t.Context()); !errors.Is(err, keystore.ErrNotMigrated) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMigrationEndsAnAutovacuumThatIsInItsWay: a large table's takes hours, and nobody may end it but Postgres itself or a superuser.
func TestMigrationEndsAnAutovacuumThatIsInItsWay(t *testing.T) {
	url := pgtest.Server(t).URL()
	pgtest.Exec(t, url, `alter system set autovacuum_naptime = '1s'`)
	pgtest.Exec(t, url, `select pg_reload_conf()`)
	pgtest.Exec(t, url, `create schema rekall`)
	pgtest.Exec(t, url, `create table rekall.usage (a int, b text) with (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1,
		autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0)`) // as slow as it can be
	pgtest.Exec(t, url, `insert into rekall.usage select g, repeat('x', 200) from generate_series(1, 200000) g`)
	pgtest.Exec(t, url, `delete from rekall.usage where a % 2 = 0`)
	eventually.True(t, "autovacuum works", func() bool {
		return pgtest.TryExec(url, `do $$ begin
			if not exists (select from pg_locks l join pg_stat_activity a using (pid)
				where a.backend_type = 'autovacuum worker' and l.relation = 'rekall.usage'::regclass and l.granted) then
				raise 'it does not';
			end if;
		end $$`) == nil
	})
	files := fstest.MapFS{"001_a.sql": {Data: []byte(`alter table rekall.usage add c int`)}}
	if _, to, err := keystore.MigrateTo(t.Context(), connect(t, url), files, 0); err != nil || to != 1 {
		t.Errorf("to version %d, %v", to, err)
	}
}

// TestMigrationNeedsNoTableButItsOwn: somebody's VACUUM of another one may take hours.
func TestMigrationNeedsNoTableButItsOwn(t *testing.T) {
	url := pgtest.URL(t)
	conn := connect(t, url)
	for _, sql := range []string{
		`create schema rekall`, `create table rekall.busy ()`, `create table rekall.free ()`, `begin`,
		`lock table rekall.busy in share update exclusive mode`,
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	files := fstest.MapFS{"001_a.sql": {Data: []byte(`alter table rekall.free add c int`)}}
	if _, to, err := keystore.MigrateTo(t.Context(), connect(t, url), files, 0); err != nil || to != 1 {
		t.Errorf("to version %d, %v", to, err)
	}
}

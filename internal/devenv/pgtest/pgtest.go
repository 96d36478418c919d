// Package pgtest gives tests a real Postgres: one server for a test process, a database for each test, nothing left behind.
// Where there is no Postgres, tests fail; they never skip.
package pgtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// serverVariable names a server to use instead of a private one. Its user must be allowed to create databases.
const serverVariable = "REKALL_TEST_DATABASE_URL"

const timeout = 60 * time.Second

// ConnectTimeout is for stores of which a test is not about how long an edge waits: a busy machine may take longer.
const ConnectTimeout = timeout

var shared struct {
	main   bool // Main runs the tests
	once   sync.Once
	server *devenv.Postgres
	url    string
	err    error
}

// Main runs a package's tests and stops the server that they used:
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
func Main(m interface{ Run() int }) {
	shared.main = true
	code := m.Run()
	if shared.server != nil {
		if err := shared.server.Stop(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func serverURL(t testing.TB) string {
	t.Helper()
	if !shared.main {
		t.Fatal("nobody would stop the server: the package needs func TestMain(m *testing.M) { pgtest.Main(m) }")
	}
	shared.once.Do(func() {
		if shared.url = os.Getenv(serverVariable); shared.url != "" {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		if shared.server, shared.err = devenv.StartPostgres(ctx, devenv.PostgresOptions{
			Settings: map[string]string{"max_connections": "300"},
		}); shared.err == nil {
			shared.url = shared.server.URL()
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.url
}

// URL returns the URL of a new, empty database, which is dropped when the test ends.
func URL(t testing.TB) string {
	t.Helper()
	server := serverURL(t)
	name := "test_" + strings.ToLower(rand.Text())
	Exec(t, server, fmt.Sprintf(`create database %q template template0`, name))
	t.Cleanup(func() { Exec(t, server, fmt.Sprintf(`drop database %q with (force)`, name)) })
	return withDatabase(t, server, name)
}

// Migrated returns the URL of a new database with the schema in it.
func Migrated(t testing.TB) string {
	t.Helper()
	databaseURL := URL(t)
	Migrate(t, databaseURL)
	return databaseURL
}

// Migrate gives a database the schema.
func Migrate(t testing.TB, databaseURL string) {
	t.Helper()
	if _, _, err := keystore.Migrate(t.Context(), databaseURL); err != nil {
		t.Fatal(err)
	}
}

// Store opens a database's keys for a test that is not about how they are opened, and closes them when it ends.
func Store(t testing.TB, databaseURL string) *keystore.Store {
	t.Helper()
	store, err := keystore.Open(databaseURL, keystore.Options{ApplicationName: "rekall-test", ConnectTimeout: ConnectTimeout})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	return store
}

func withDatabase(t testing.TB, server, name string) string {
	t.Helper()
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		t.Fatalf("%s is not a URL: write it as postgres://user:password@host:5432/postgres", serverVariable)
	}
	u.Path = "/" + name
	parameters := u.Query()
	parameters.Del("dbname") // it would win over the path, and every test share one database
	parameters.Del("database")
	u.RawQuery = parameters.Encode()
	return u.String()
}

// Server starts a server of the test's own, to be paused or killed, and stops it when the test ends.
func Server(t testing.TB) *devenv.Postgres {
	t.Helper()
	return ServerWith(t, devenv.PostgresOptions{})
}

// ServerWith is Server with options.
func ServerWith(t testing.TB, options devenv.PostgresOptions) *devenv.Postgres {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	server, err := devenv.StartPostgres(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return server
}

// Exec runs a statement as psql would.
func Exec(t testing.TB, databaseURL, sql string, args ...any) {
	t.Helper()
	if err := TryExec(databaseURL, sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// TryExec is Exec for statements that may fail.
func TryExec(databaseURL, sql string, args ...any) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	_, err = conn.Exec(ctx, sql, args...)
	return err
}

// AwaitBlocked waits until that many statements wait for locks in a database.
func AwaitBlocked(t testing.TB, databaseURL string, statements int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	eventually.True(t, fmt.Sprintf("%d statements wait for locks", statements), func() (blocked bool) {
		if err := conn.QueryRow(t.Context(), `
select count(*) = $1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`, statements).Scan(&blocked); err != nil {
			t.Fatal(err)
		}
		return blocked
	})
}

// LockAsEdge has the edge's role lock all tables that it can, in a transaction that stays idle until the test ends.
func LockAsEdge(t testing.TB, databaseURL string) {
	t.Helper()
	role := Role(t, databaseURL)
	if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, keystore.Roles{Edge: role}); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), Login(t, databaseURL, role))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	if _, err := conn.Exec(t.Context(), `begin; lock table rekall.usage, rekall.usage_flushes, rekall.spikes,
		rekall.signing_keys, rekall.edges in access exclusive mode`); err != nil {
		t.Fatal(err)
	}
}

// Role returns a name for a role. If it exists when the test ends, it is removed, with its rights in the database.
func Role(t testing.TB, databaseURL string) string {
	t.Helper()
	role := "test_" + strings.ToLower(rand.Text())
	t.Cleanup(func() {
		Exec(t, databaseURL, fmt.Sprintf(`do $$ begin
			if exists (select from pg_roles where rolname = '%[1]s') then
				drop owned by %[1]s;
				drop role %[1]s;
			end if;
		end $$`, role))
	})
	return role
}

// Login returns the database's URL for a new user, who is a member of a role and is removed when the test ends.
func Login(t testing.TB, databaseURL, memberOf string) string {
	t.Helper()
	user, password := Role(t, databaseURL), rand.Text()
	Exec(t, databaseURL, fmt.Sprintf(`create role %s login password '%s' in role %s`, user, password, memberOf))
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(user, password)
	return u.String()
}

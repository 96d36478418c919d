package keystore_test

import (
	"context"
	"crypto/rand"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// database returns the URL of a new database with the schema in it.
func database(t testing.TB) string {
	t.Helper()
	return pgtest.Migrated(t)
}

func open(t testing.TB, databaseURL string, options keystore.Options) *keystore.Store {
	t.Helper()
	store, err := keystore.Open(databaseURL, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	return store
}

// connect returns a connection of a database superuser, who must not be able to harm the feed by accident either.
func connect(t testing.TB, databaseURL string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}

func exec(t testing.TB, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func newKey() keystore.NewKey {
	key := keystore.NewKey{
		ID: "key_" + apikey.RandomText(22), Account: "acme", Name: "Backend", Environment: apikey.Sandbox, Hint: "a1B2",
		Scopes: apikey.MemoriesRead | apikey.HivesWrite,
	}
	rand.Read(key.Digest[:])
	return key
}

func insert(t testing.TB, store *keystore.Store, with ...func(*keystore.NewKey)) keystore.NewKey {
	t.Helper()
	key := newKey()
	for _, change := range with {
		change(&key)
	}
	if _, err := store.Insert(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	return key
}

func snapshot(t testing.TB, store *keystore.Store, since string) keystore.Snapshot {
	t.Helper()
	snap, err := store.Snapshot(t.Context(), since, keystore.MaxChanges)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func TestOpenDoesNotConnect(t *testing.T) {
	store := open(t, "postgres://user:password@127.0.0.1:1/db", keystore.Options{})
	if n := store.Pool().Stat().NewConnsCount(); n != 0 {
		t.Errorf("%d connections were begun", n)
	}
	if n := store.Pool().Stat().MaxConns(); n != 4 {
		t.Errorf("at most %d connections, want 4", n)
	}
}

// TestConnectionsThatWereMadeAtOnceDoNotExpireAtOnce: a fleet makes all of its connections when Postgres has restarted.
func TestConnectionsThatWereMadeAtOnceDoNotExpireAtOnce(t *testing.T) {
	for parameter, want := range map[string]time.Duration{"": 20 * time.Minute, "?pool_max_conn_lifetime_jitter=1m": time.Minute} {
		store := open(t, "postgres://user@127.0.0.1:1/db"+parameter, keystore.Options{})
		if got := store.Pool().Config().MaxConnLifetimeJitter; got != want {
			t.Errorf("%q: they expire within %v, want %v", parameter, got, want)
		}
	}
}

func TestErrorsShowNeitherURLNorPassword(t *testing.T) {
	const password = "hunter2hunter2"
	for _, databaseURL := range []string{
		"",
		"postgres://user:" + password + "@host:port/db",
		"postgres://user:" + password + "@127.0.0.1:1/db?sslmode=nonsense",
		"postgres://user:" + password + "@127.0.0.1:1/db?sslrootcert=/does/not/exist&sslmode=verify-full",
		"postgres://user:" + password + "@127.0.0.1:1/db?pool_max_conns=many",
		"postgres://user:p@" + password + "@127.0.0.1:1/db",
		"postgres://user:p/" + password + "@127.0.0.1:1/db",
		"postgres://user:1/" + password + "@127.0.0.1:1/db",
		"postgres://user:p?" + password + "@127.0.0.1:1/db",
		"postgres://user:%zz" + password + "@127.0.0.1:1/db",
		"host=127.0.0.1 port=1 password=p " + password,
		"password=" + password + " port=x",
		password,
		// These are well-formed, and fail when something connects.
		"postgres://user:" + password + "@127.0.0.1:1/db",
		"host=127.0.0.1 port=1 user=user password=" + password,
	} {
		if _, _, err := keystore.Migrate(t.Context(), databaseURL); err == nil {
			t.Errorf("Migrate(%q) succeeded", databaseURL)
		} else if showsSecret(err, password) {
			t.Errorf("Migrate(%q): %v", databaseURL, err)
		}
		store, err := keystore.Open(databaseURL, keystore.Options{})
		if err == nil {
			_, err = store.Snapshot(t.Context(), "", keystore.MaxChanges)
			store.Close()
		}
		if err == nil {
			t.Errorf("Open(%q) and a read succeeded", databaseURL)
		} else if showsSecret(err, password) {
			t.Errorf("Open(%q): %v", databaseURL, err)
		}
	}
}

func showsSecret(err error, password string) bool {
	return strings.Contains(err.Error(), password) || strings.Contains(err.Error(), "postgres://user:"+password)
}

func TestConnectErrorIsOneLine(t *testing.T) {
	store := open(t, "postgres://user:password@127.0.0.1:1,127.0.0.1:2/db", keystore.Options{})
	_, err := store.Lookup(t.Context(), nil)
	if err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}

func TestApplicationNameOfURLWins(t *testing.T) {
	databaseURL := pgtest.URL(t)
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("application_name", "edge-7")
	u.RawQuery = query.Encode()
	for _, test := range []struct{ url, option, want string }{
		{databaseURL, "", "rekall-gateway"},
		{databaseURL, "rekall-gateway keys", "rekall-gateway keys"},
		{u.String(), "rekall-gateway keys", "edge-7"},
	} {
		store := open(t, test.url, keystore.Options{ApplicationName: test.option})
		var name string
		if err := store.Pool().QueryRow(t.Context(), "show application_name").Scan(&name); err != nil {
			t.Fatal(err)
		}
		if name != test.want {
			t.Errorf("application name %q, want %q", name, test.want)
		}
	}
}

func TestKeysAreReadWhateverStyleIsTheDefault(t *testing.T) {
	for _, setting := range []string{"datestyle = 'German'", "client_encoding = 'LATIN1'", "standard_conforming_strings = off"} {
		for _, mode := range []string{"cache_statement", "exec"} {
			databaseURL := database(t)
			pgtest.Exec(t, databaseURL, `do $do$ begin execute format('alter database %I set ', current_database()) || $set$`+setting+`$set$; end $do$`)
			store := open(t, databaseURL+"&default_query_exec_mode="+mode, keystore.Options{})
			key := newKey()
			key.Name, key.Lifetime = "Äpfel", time.Hour
			if _, err := store.Insert(t.Context(), key); err != nil {
				t.Errorf("%s, %s: %v", setting, mode, err)
			}
			list, err := store.List(t.Context(), keystore.Everything(), keystore.Filter{Name: "Ä"}, keystore.Position{}, 10)
			if err != nil || len(list) != 1 || list[0].Name != key.Name {
				t.Errorf("%s, %s: %+v, %v", setting, mode, list, err)
			}
			var name string // as the server has it
			if err := connect(t, databaseURL+"&client_encoding=UTF8").QueryRow(t.Context(), `select name from rekall.api_keys`).Scan(&name); err != nil || name != key.Name {
				t.Errorf("%s, %s: %q is stored as %q, %v", setting, mode, key.Name, name, err)
			}
		}
	}
}

// TestParametersAreSentAsPostgresReportsThem: PgBouncer compares both, and would set one that differs before each transaction.
func TestParametersAreSentAsPostgresReportsThem(t *testing.T) {
	conn, err := open(t, database(t), keystore.Options{}).Pool().Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	for name, sent := range conn.Conn().Config().RuntimeParams {
		if reported := conn.Conn().PgConn().ParameterStatus(strings.ReplaceAll(name, "datestyle", "DateStyle")); reported != sent {
			t.Errorf("%s is sent as %q and reported as %q", name, sent, reported)
		}
	}
}

// PgBouncer's transaction pooling gives every transaction another session: nothing may rest on a prepared statement.
func TestExecModePreparesNothing(t *testing.T) {
	store := open(t, database(t)+"&default_query_exec_mode=exec", keystore.Options{MaxConns: 1})
	ctx := t.Context()
	start := snapshot(t, store, "")
	key := newKey()
	key.Lifetime = time.Hour
	if _, err := store.Insert(ctx, key); err != nil {
		t.Fatal(err)
	}
	if found, err := store.Lookup(ctx, []apikey.Digest{key.Digest, newKey().Digest}); err != nil || len(found.Records) != 1 {
		t.Fatalf("Lookup = %+v, %v", found, err)
	}
	if list, err := store.List(ctx, keystore.Within("acme", ""), keystore.Filter{}, keystore.Position{}, 10); err != nil || len(list) != 1 {
		t.Fatalf("List = %+v, %v", list, err)
	}
	row, err := store.Get(ctx, keystore.Everything(), key.ID)
	if err != nil {
		t.Fatal(err)
	}
	position := keystore.Position{CreatedAt: row.CreatedAt, ID: row.ID}
	if list, err := store.List(ctx, keystore.Everything(), keystore.Filter{}, position, 10); err != nil || len(list) != 0 {
		t.Fatalf("List = %+v, %v", list, err)
	}
	if _, revoked, err := store.Revoke(ctx, keystore.Everything(), key.ID); err != nil || !revoked {
		t.Fatalf("Revoke = %v, %v", revoked, err)
	}
	if changes := snapshot(t, store, start.Text).Changes; len(changes) != 1 || changes[0].RevokedAt.IsZero() {
		t.Fatalf("changes %+v", changes)
	}
	var prepared int
	if err := store.Pool().QueryRow(ctx, "select count(*) from pg_prepared_statements").Scan(&prepared); err != nil {
		t.Fatal(err)
	}
	if prepared != 0 {
		t.Errorf("%d prepared statements", prepared)
	}
}

func TestCallsEndWithTheirContextThoughTheServerHangs(t *testing.T) {
	server := pgtest.Server(t)
	pgtest.Migrate(t, server.URL())
	store := open(t, server.URL(), keystore.Options{})
	key := insert(t, store)
	server.Pause()
	defer server.Resume()
	for range 6 { // more than there are connections
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, lookupErr := store.Lookup(ctx, []apikey.Digest{key.Digest})
		_, snapshotErr := store.Snapshot(ctx, "1:1:", keystore.MaxChanges)
		cancel()
		if !errors.Is(lookupErr, context.DeadlineExceeded) || !errors.Is(snapshotErr, context.DeadlineExceeded) {
			t.Errorf("Lookup: %v, Snapshot: %v", lookupErr, snapshotErr)
		}
	}
	server.Resume()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if found, err := store.Lookup(ctx, []apikey.Digest{key.Digest}); err != nil || len(found.Records) != 1 {
		t.Errorf("after the pause: %+v, %v", found, err)
	}
}

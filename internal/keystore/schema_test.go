package keystore_test

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// refused are the statements that nobody may get through on a revoked key.
var refused = []string{
	`update rekall.api_keys set revoked_at = null`,
	`update rekall.api_keys set revoked_at = revoked_at + interval '1 second'`,
	`update rekall.api_keys set key_hash = sha256('other')`,
	`update rekall.api_keys set id = 'key_0000000000000000000000'`,
	`update rekall.api_keys set account = 'other'`,
	`update rekall.api_keys set environment = 'production'`,
	`update rekall.api_keys set created_at = created_at - interval '1 day'`,
	`delete from rekall.api_keys`,
	`truncate rekall.api_keys`,
	`truncate rekall.api_keys cascade`,
	`insert into rekall.api_keys select * from rekall.api_keys on conflict (id) do update set revoked_at = null`,
}

// sqlState returns the code that Postgres gave an error, or "".
func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

func TestSuperuserCannotReviveMoveOrRemoveAKey(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	if _, _, err := store.Revoke(t.Context(), keystore.Everything(), key.ID); err != nil {
		t.Fatal(err)
	}
	before, err := store.Get(t.Context(), keystore.Everything(), key.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range refused {
		if err := pgtest.TryExec(databaseURL, sql); !strings.HasPrefix(sqlState(err), "RK") {
			t.Errorf("%s: %v", sql, err)
		}
	}
	after, err := store.Get(t.Context(), keystore.Everything(), key.ID)
	if err != nil {
		t.Fatal(err)
	}
	if !after.RevokedAt.Equal(*before.RevokedAt) || after.Account != before.Account {
		t.Errorf("before %+v, after %+v", before, after)
	}
	pgtest.Exec(t, databaseURL, `update rekall.api_keys set name = 'Renamed', expires_at = now(), scopes = '{}'`)
}

const (
	checkViolation       = "23514"
	notNullViolation     = "23502"
	programLimitExceeded = "54000"
)

func TestChecksHoldWhatTheGatewayAssumes(t *testing.T) {
	databaseURL := database(t)
	conn := connect(t, databaseURL)
	good := map[string]string{
		"id": `'key_0123456789abcdefABCDEF'`, "account": `'acme'`, "name": `'Backend'`, "environment": `'sandbox'`,
		"key_hash": `sha256('x')`, "hint": `'a1B2'`, "scopes": `array['memories:read']`,
		"created_at": `now()`, "expires_at": `null`, "revoked_at": `null`,
	}
	try := func(column, value string) error {
		columns, values := []string{}, []string{}
		for c, v := range good {
			if c == column {
				v = value
			}
			columns, values = append(columns, c), append(values, v)
		}
		_, err := conn.Exec(t.Context(), `begin; insert into rekall.api_keys (`+strings.Join(columns, ", ")+
			`) values (`+strings.Join(values, ", ")+`); rollback`)
		if err != nil {
			exec(t, conn, "rollback")
		}
		return err
	}
	for column, values := range map[string][]string{
		"id": {`'key_0123456789'`, `'key_0123456789abcdefABCDE_'`, `'id__0123456789abcdefABCDEF'`, `E'key_0123456789abcdefABCDEF\n'`,
			`E'key_0123456789abcdefABCDE\n'`, `'key_0123456789abcdefABCDEÄ'`, `'KEY_0123456789abcdefABCDEF'`, `''`, `null`},
		"account":     {`''`, `repeat('a', 201)`, `E'a\nb'`, `E'a\u0085b'`, `' acme'`, `'acme '`, `null`},
		"name":        {`''`, `repeat('a', 201)`, `E'a\tb'`, `E'a\x7fb'`, `null`},
		"environment": {`'staging'`, `''`, `'Sandbox'`, `null`},
		"key_hash":    {`'\x00'`, `sha512('x')`, `''`, `null`},
		"hint":        {`'abc'`, `'abcde'`, `'ab_d'`, `E'abc\n'`, `''`},
		"scopes": {`array['memories:publish']`, `array['memories:read', null]`, `array[array['memories:read'], array['memories:write']]`,
			`array['']`, `array['Memories:read']`, `null`},
		"created_at": {`'infinity'`, `'-infinity'`, `'0001-01-01 00:00Z'`, `'10000-01-01'`, `null`},
		"expires_at": {`'infinity'`, `'-infinity'`, `'0001-01-01 00:00Z'`, `'10000-01-01'`},
		"revoked_at": {`'infinity'`, `'-infinity'`, `'0001-01-01 00:00Z'`, `'10000-01-01'`},
	} {
		for _, value := range values {
			err := try(column, value)
			if code := sqlState(err); code != checkViolation && code != notNullViolation {
				t.Errorf("%s accepts %s, or refuses it for another reason: %v", column, value, err)
			}
		}
	}
	for column, values := range map[string][]string{
		"account":    {`repeat('ä', 200)`, `'a b'`},
		"name":       {`'Prüfung 👩‍💻'`, `repeat('ä', 200)`},
		"hint":       {`null`},
		"scopes":     {`'{}'`, `array['memories:read', 'hives:write']`},
		"expires_at": {`now()`, `'1970-01-01 00:00Z'`},
		"revoked_at": {`now()`},
	} {
		for _, value := range values {
			if err := try(column, value); err != nil {
				t.Errorf("%s refuses %s: %v", column, value, err)
			}
		}
	}
}

func TestHashAndIDAreUnique(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := insert(t, store)
	sameHash, sameID := newKey(), newKey()
	sameHash.Digest, sameID.ID = key.Digest, key.ID
	for name, key := range map[string]keystore.NewKey{"hash": sameHash, "id": sameID} {
		if _, err := store.Insert(t.Context(), key); err == nil {
			t.Errorf("a second key with the same %s was stored", name)
		}
	}
}

// Whoever may create functions could otherwise put one in the place of those that the triggers call.
func TestTriggersIgnoreTheCallersSearchPath(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	start := snapshot(t, store, "")
	conn := connect(t, databaseURL)
	exec(t, conn, `create schema evil; create function evil.pg_current_xact_id() returns xid8 language sql as $$ select '3'::xid8 $$`)
	exec(t, conn, `set search_path = evil, pg_catalog`)
	exec(t, conn, revokeSQL, key.ID)
	if !revokedIn(snapshot(t, store, start.Text), key) {
		t.Error("the stamp came from another schema")
	}
}

// TestWhatAnEdgeWritesCanBeReadWhereverKeysAreManaged: an edge that was taken over could otherwise make a key one that nobody can
// revoke by its id, or write on an administrator's terminal.
func TestWhatAnEdgeWritesCanBeReadWhereverKeysAreManaged(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	exec(t, connect(t, databaseURL), `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat)
		values ('0123456789abcdefABCDEF', 'north', 'eu', 'v1', '30s', now(), 1)`)
	mustFlush(t, store, flushOf(instance(), 1, anHour, counts(key.ID, 1, 0, 0)))
	for _, column := range []string{
		"last_used.first_used_at", "last_used.last_used_at", "usage.hour", "usage.used_at", "edges.seen_at", "edges.synced_at",
	} {
		table, column, _ := strings.Cut(column, ".")
		for _, value := range []string{"infinity", "-infinity", "10000-01-01", "0001-01-01 00:00Z"} {
			sql := "update rekall." + table + " set " + column + " = '" + value + "'"
			if err := pgtest.TryExec(databaseURL, sql); sqlState(err) != checkViolation {
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
	for _, sql := range []string{
		"insert into rekall.spikes (key_id, hour, threshold) values ('key_0123456789abcdefABCDEF', 'infinity', 1)",
		`update rekall.usage set outcome = E'allowed\n'`,
		"update rekall.usage set outcome = 'Allowed'",
		"update rekall.usage set outcome = 'made_up'",
		"update rekall.usage set hour = hour + interval '1 microsecond'",
		"insert into rekall.spikes (key_id, hour, threshold) values ('key_0123456789abcdefABCDEF', '2026-03-01 12:30Z', 1)",
		"insert into rekall.spikes (key_id, hour, threshold) values ('key_0123456789abcdefABCDE_', '2026-03-01 12:00Z', 1)",
		"update rekall.usage set key_id = repeat('k', 200000)",
		"update rekall.usage set key_id = 'id__0123456789abcdefABCDEF'",
		"update rekall.last_used set key_id = repeat('k', 200000)",
		`update rekall.last_used set key_id = E'key_0123456789abcdefABCDE\n'`,
		`update rekall.edges set name = E'a\x1b[2J'`,
		`update rekall.edges set region = E'a\u0085'`,
		`update rekall.edges set version = E'\n'`,
		`update rekall.edges set applied_on = E'\n'`,
		"update rekall.edges set max_staleness = '2 days'",
		"update rekall.edges set max_staleness = '12 months -8640 hours 30 seconds'",
		"update rekall.edges set max_staleness = '1 month -720 hours 30 seconds'",
		"update rekall.edges set max_staleness = '1 day -24 hours 30 seconds'",
		"update rekall.edges set applied = " + snapshotOf(9000),
	} {
		if err := pgtest.TryExec(databaseURL, sql); sqlState(err) != checkViolation {
			t.Errorf("%s: %v", sql, err)
		}
	}
	pgtest.Exec(t, databaseURL, "update rekall.edges set applied = "+snapshotOf(8000)) // as a busy server's
}

// migratedBefore brings an empty database to the schema before a migration, whose number has three digits.
func migratedBefore(t *testing.T, databaseURL, number string) {
	t.Helper()
	earlier := fstest.MapFS{}
	files, err := fs.Glob(keystore.MigrationFiles, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if name < number {
			text, err := fs.ReadFile(keystore.MigrationFiles, name)
			if err != nil {
				t.Fatal(err)
			}
			earlier[name] = &fstest.MapFile{Data: text}
		}
	}
	migrating := connect(t, databaseURL)
	if _, _, err := keystore.MigrateTo(t.Context(), migrating, earlier, 0); err != nil {
		t.Fatal(err)
	}
	if err := migrating.Close(t.Context()); err != nil { // which releases the lock
		t.Fatal(err)
	}
}

// snapshotOf is SQL for a snapshot that so many transactions were in progress in.
func snapshotOf(transactions int) string {
	return fmt.Sprintf(`(select ('1:1000000:' || string_agg(n::text, ',' order by n))::pg_snapshot from generate_series(1, %d) n)`, transactions)
}

func TestMigrationClearsWhatNoFlushWouldComeThroughWith(t *testing.T) {
	databaseURL := pgtest.URL(t)
	migratedBefore(t, databaseURL, "013")
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	conn := connect(t, databaseURL)
	exec(t, conn, `insert into rekall.usage (key_id, hour, outcome, count, used_at) values
		($1, $2, 'allowed', 1, 'infinity'), ($1, 'infinity', 'allowed', 1, now()), ($1, $2, E'\n', 1, null)`, key.ID, anHour)
	exec(t, conn, `insert into rekall.last_used (key_id, first_used_at, last_used_at) values ($1, '-infinity', 'infinity')`, key.ID)
	exec(t, conn, `insert into rekall.spikes (key_id, hour, threshold) values ($1, 'infinity', 1)`, key.ID)
	exec(t, conn, `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat)
		values ('0123456789abcdefABCDEF', E'\x1b[2J', 'eu', 'v1', '30s', now(), 1)`)
	pgtest.Migrate(t, databaseURL)
	mustFlush(t, store, flushOf(instance(), 1, anHour, counts(key.ID, 1, 0, 5)))
	usage := usageOf(t, store, key.ID)
	if want := anHour.Add(5 * time.Minute); len(usage.Hours) != 1 || usage.LastUsedAt.Before(want) || usage.LastUsedAt.Year() > 9999 {
		t.Errorf("%+v", usage)
	}
	if _, err := store.Get(t.Context(), keystore.Everything(), key.ID); err != nil {
		t.Error(err)
	}
	if edges, _, err := store.Edges(t.Context(), 0); err != nil || len(edges) != 0 {
		t.Errorf("%+v, %v", edges, err)
	}
}

// TestRowsOfEdgesAreReadUpToABound: an edge that was taken over may make up as many as it likes.
func TestRowsOfEdgesAreReadUpToABound(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	store, conn := open(t, databaseURL, keystore.Options{}), connect(t, databaseURL)
	const most = 10_000
	exec(t, conn, `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat)
		select lpad(n::text, 22, '0'), 'edge', '', '', '30s', now(), 1 from generate_series(1, $1::int) n`, most)
	if edges, _, err := store.Edges(t.Context(), 0); err != nil || len(edges) != most || edges[0].Instance > edges[1].Instance {
		t.Errorf("%d edges, %v", len(edges), err)
	}
	exec(t, conn, `insert into rekall.edges select lpad('0', 22, 'x'), name, region, version, max_staleness, started_at, seen_at, beat
		from rekall.edges limit 1`)
	if edges, _, err := store.Edges(t.Context(), 0); !errors.Is(err, keystore.ErrTooManyEdges) || len(edges) != 0 {
		t.Errorf("%d edges, %v, want %v", len(edges), err, keystore.ErrTooManyEdges)
	}
}

// TestSigningKeysAreReadUpToABound: all edges encode them for anybody who asks.
func TestSigningKeysAreReadUpToABound(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	store, conn := open(t, databaseURL, keystore.Options{}), connect(t, databaseURL)
	const most, made = 10_000, `
		insert into rekall.signing_keys (id, public_key, instance, expires_at)
		select lpad(n::text, 43, '0'), sha256(n::text::bytea), lpad('x', 22, 'x'), now() + interval '1 year' from generate_series($1::int, $2::int) n`
	exec(t, conn, made, 1, most)
	if keys, err := store.SigningKeys(t.Context()); err != nil || len(keys) != most || keys[0].ID > keys[1].ID {
		t.Errorf("%d keys, %v", len(keys), err)
	}
	exec(t, conn, made, most+1, most+1)
	if keys, err := store.SigningKeys(t.Context()); !errors.Is(err, keystore.ErrTooManySigningKeys) || len(keys) != 0 {
		t.Errorf("%d keys, %v, want %v", len(keys), err, keystore.ErrTooManySigningKeys)
	}
}

// TestMigrationLeavesNothingThatKeepsEdgesFromForgetting: last uses are changed then, and a check would refuse that of one that was made up.
func TestMigrationLeavesNothingThatKeepsEdgesFromForgetting(t *testing.T) {
	databaseURL := pgtest.URL(t)
	migratedBefore(t, databaseURL, "016")
	store, conn := open(t, databaseURL, keystore.Options{}), connect(t, databaseURL)
	madeUp := func() {
		t.Helper()
		exec(t, conn, `insert into rekall.usage (key_id, hour, outcome, count, used_at) values ('k', '2026-03-01 12:00:01Z', 'allowed', 1, now())`)
		exec(t, conn, `insert into rekall.last_used (key_id, first_used_at, last_used_at) values ('k', '2026-03-01 12:00Z', '2026-03-01 12:00Z')`)
	}
	forget := func(when string) {
		t.Helper()
		if n, err := store.ForgetUsage(t.Context(), time.Hour, 10); err != nil || n != 1 {
			t.Errorf("%s: %d removed, %v", when, n, err)
		}
	}
	madeUp()
	pgtest.Migrate(t, databaseURL)
	var left int
	if err := conn.QueryRow(t.Context(), `select count(*) from rekall.last_used`).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d last uses that were made up are left, %v", left, err) // which earlier gateways would change
	}
	forget("written before")

	exec(t, conn, `alter table rekall.usage drop constraint usage_key_id_check, drop constraint usage_full_hour_check`)
	exec(t, conn, `alter table rekall.last_used drop constraint last_used_key_id_check`)
	madeUp()
	exec(t, conn, `alter table rekall.last_used add constraint last_used_key_id_check check (key_id ~ '^key_[0-9A-Za-z]{22}$') not valid`)
	forget("written meanwhile")
}

// TestMigrationLeavesNoEdgeOfWhichAReportThatLiesAheadCannotBeCorrected: it could be of none then.
func TestMigrationLeavesNoEdgeOfWhichAReportThatLiesAheadCannotBeCorrected(t *testing.T) {
	databaseURL := pgtest.URL(t)
	migratedBefore(t, databaseURL, "016")
	store := open(t, databaseURL, keystore.Options{})
	pgtest.Exec(t, databaseURL, `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat, seen_at, applied) values
		(repeat('a', 22), 'huge', 'eu', 'v1', '30s', now(), 1, now() + interval '1 day', `+snapshotOf(100000)+`),
		(repeat('b', 22), 'endless', 'eu', 'v1', '3600000 months -108000000 days 30 seconds', now(), 1, now() + interval '1 day', null),
		(repeat('c', 22), 'good', 'eu', 'v1', '30s', now(), 1, now() + interval '1 day', null)`)
	pgtest.Migrate(t, databaseURL)
	if err := store.ForgetReplacedEdges(t.Context(), strings.Repeat("c", 22)); err != nil {
		t.Error(err)
	}
	if edges, _, err := store.Edges(t.Context(), 0); err != nil || len(edges) != 1 || edges[0].Name != "good" || edges[0].Age < 0 {
		t.Errorf("%+v, %v", edges, err)
	}
}

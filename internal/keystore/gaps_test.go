package keystore_test

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// rowsAsText is all that the table holds, stamps included.
func rowsAsText(t *testing.T, conn *pgx.Conn) []string {
	t.Helper()
	rows, _ := conn.Query(t.Context(), `select k::text from rekall.api_keys k order by id`)
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// A NULL that becomes a time is a revocation; everything else that the gateway decides by is fixed, revoked or not.
func TestRefusedStatementsLeaveEveryColumnAsItWas(t *testing.T) {
	for _, role := range []string{"origin", "replica"} {
		t.Run(role, func(t *testing.T) {
			databaseURL := database(t)
			store := open(t, databaseURL, keystore.Options{})
			insert(t, store)
			revoked := insert(t, store)
			if _, _, err := store.Revoke(t.Context(), keystore.Everything(), revoked.ID); err != nil {
				t.Fatal(err)
			}
			conn := connect(t, databaseURL)
			exec(t, conn, "set session_replication_role = "+role)
			before := rowsAsText(t, conn)
			for _, sql := range refused {
				if _, err := conn.Exec(t.Context(), sql); err == nil {
					t.Errorf("%s: not refused", sql)
				}
				if after := rowsAsText(t, conn); !slices.Equal(before, after) {
					t.Fatalf("%s:\nbefore %q\nafter  %q", sql, before, after)
				}
			}
		})
	}
}

func TestInsertUnderReplicaRoleIsStampedToo(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	start := snapshot(t, store, "")
	conn := connect(t, databaseURL)
	exec(t, conn, "set session_replication_role = replica")
	exec(t, conn, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, change_xid)
		values ('key_0123456789abcdefABCDEF', 'acme', 'x', 'sandbox', sha256('x'), '{}', '3')`)
	if snap := snapshot(t, store, start.Text); len(snap.Changes) != 1 {
		t.Errorf("changes %+v", snap.Changes)
	}
}

// A rolled-back savepoint takes its stamp with it: the row keeps the stamp of the transaction that did commit.
func TestRolledBackChangeIsNotInTheFeed(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	kept, undone := insert(t, store), insert(t, store)
	start := snapshot(t, store, "")
	conn := connect(t, databaseURL)
	exec(t, conn, "begin")
	exec(t, conn, revokeSQL, kept.ID)
	exec(t, conn, "savepoint a")
	exec(t, conn, revokeSQL, undone.ID)
	exec(t, conn, "rollback to a")
	exec(t, conn, "commit")
	snap := snapshot(t, store, start.Text)
	if !revokedIn(snap, kept) || change(snap, undone) != nil {
		t.Errorf("changes %+v", snap.Changes)
	}
}

// Postgres delivers notifications in the order of commits, so the wake for the last change proves that the changes before
// it had none.
func TestListenWakesForSecurityChangesOnly(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key, other := insert(t, store), insert(t, store)
	l := listen(t, store)
	receive(t, "wake after LISTEN", l.wakes)
	quiet := []string{
		`update rekall.api_keys set name = 'Renamed'`,
		`update rekall.api_keys set hint = 'zzzz'`,
		`insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
			values ('key_` + apikey.RandomText(22) + `', 'acme', 'x', 'sandbox', sha256(gen_random_uuid()::text::bytea), '{}')`,
	}
	for _, sql := range []string{
		`update rekall.api_keys set scopes = '{agents:read}' where id = '` + key.ID + `'`,
		`update rekall.api_keys set expires_at = now() where id = '` + key.ID + `'`,
		`update rekall.api_keys set revoked_at = now() where id = '` + key.ID + `'`,
	} {
		for _, q := range quiet {
			pgtest.Exec(t, databaseURL, q)
		}
		quiet = quiet[:2] // its id is taken
		pgtest.Exec(t, databaseURL, sql)
		receive(t, "wake after "+sql, l.wakes)
	}
	// One more, whose wake must be the only one.
	pgtest.Exec(t, databaseURL, revokeSQL, other.ID)
	receive(t, "last wake", l.wakes)
	if n := len(l.wakes); n != 0 {
		t.Errorf("%d wakes too many", n)
	}
}

// TestFirstIndexOfScopesDoesNotMatter: a row that cannot be read would stop the feed of every edge.
func TestFirstIndexOfScopesDoesNotMatter(t *testing.T) {
	for _, mode := range []string{"cache_statement", "exec", "simple_protocol"} {
		databaseURL := database(t) + "&default_query_exec_mode=" + mode
		store := open(t, databaseURL, keystore.Options{})
		start, key := snapshot(t, store, ""), insert(t, store)
		pgtest.Exec(t, databaseURL, `update rekall.api_keys set scopes = '[0:1]={hives:read,agents:read}'`)
		snap, err := store.Snapshot(t.Context(), start.Text, keystore.MaxChanges)
		if err != nil {
			t.Errorf("%s: %v", mode, err)
		} else if record := change(snap, key); record == nil || record.Scopes != apikey.HivesRead|apikey.AgentsRead {
			t.Errorf("%s: change %+v", mode, record)
		}
	}
}

func TestLookupWorksWithExecModeInTheURL(t *testing.T) {
	u, err := url.Parse(database(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"exec", "simple_protocol", "cache_describe", "describe_exec"} {
		query := u.Query()
		query.Set("default_query_exec_mode", mode)
		u.RawQuery = query.Encode()
		store := open(t, u.String(), keystore.Options{})
		start := snapshot(t, store, "")
		key := insert(t, store)
		found, err := store.Lookup(t.Context(), []apikey.Digest{newKey().Digest, key.Digest})
		if err != nil || len(found.Records) != 1 || found.Records[0].ID != key.ID || found.Server != start.Server {
			t.Errorf("%s: Lookup = %+v, %v", mode, found, err)
		}
		if record := change(snapshot(t, store, start.Text), key); record == nil || record.Digest != key.Digest {
			t.Errorf("%s: change %+v", mode, record)
		}
	}
}

// TestLookupPlannedWhileThereWereFewKeysIsByIndexWhenThereAreMany: a connection keeps the plan for an hour.
func TestLookupPlannedWhileThereWereFewKeysIsByIndexWhenThereAreMany(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{MaxConns: 1, PlanOnce: true})
	if _, err := store.Lookup(t.Context(), []apikey.Digest{newKey().Digest}); err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, databaseURL, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(i::text, 22, '0'), 'acme', 'Key', 'sandbox', sha256(i::text::bytea), '{}'
		from generate_series(1, 20000) i`)
	var name string
	err := store.Pool().QueryRow(t.Context(), "select name from pg_prepared_statements where statement = $1", keystore.LookupSQL).Scan(&name)
	if err != nil {
		t.Fatal(err)
	}
	rows, _ := store.Pool().Query(t.Context(), fmt.Sprintf("explain execute %q (array[sha256('1')])", name))
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	if plan := strings.Join(lines, "\n"); strings.Contains(plan, "Seq Scan on api_keys") {
		t.Error(plan)
	}
}

// A sequential scan for each unknown key would let anyone load Postgres with nonsense.
func TestLookupIsByIndex(t *testing.T) {
	databaseURL := database(t)
	conn := connect(t, databaseURL)
	exec(t, conn, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(i::text, 22, '0'), 'acme', 'Key', 'sandbox', sha256(i::text::bytea), '{}'
		from generate_series(1, 20000) i`)
	exec(t, conn, "analyze rekall.api_keys")
	exec(t, conn, "prepare lookup (bytea[]) as "+keystore.LookupSQL)
	for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
		exec(t, conn, "set plan_cache_mode = "+mode)
		rows, _ := conn.Query(t.Context(), `explain execute lookup (array[sha256('1'), sha256('none')])`)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		if plan := strings.Join(lines, "\n"); strings.Contains(plan, "Seq Scan on api_keys") || !strings.Contains(plan, "api_keys_key_hash_key") {
			t.Errorf("%s:\n%s", mode, plan)
		}
	}
}

package keystore_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestAuditIsAppendOnlyForOwnerAndSuperuser(t *testing.T) {
	databaseURL := database(t)
	pgtest.Exec(t, databaseURL, `insert into rekall.audit (actor, action) values ('cli:test', 'key.created')`)
	role := "owner_" + strings.ToLower(apikey.RandomText(8))
	pgtest.Exec(t, databaseURL, fmt.Sprintf(`create role %[1]s; grant usage, create on schema rekall to %[1]s; grant select, insert on rekall.audit to %[1]s`, role))
	t.Cleanup(func() { pgtest.Exec(t, databaseURL, fmt.Sprintf(`drop owned by %[1]s cascade; drop role %[1]s`, role)) })
	const insufficientPrivilege, triggered = "42501", "RK004"
	for _, sql := range []string{
		`update rekall.audit set actor = 'cli:other'`, `delete from rekall.audit`, `truncate rekall.audit`, `truncate rekall.audit cascade`,
	} {
		conn := connect(t, databaseURL)
		if _, err := conn.Exec(t.Context(), sql); sqlState(err) != triggered {
			t.Errorf("%s by a superuser: %v", sql, err)
		}
		exec(t, conn, `set session_replication_role = replica`)
		if _, err := conn.Exec(t.Context(), sql); sqlState(err) != triggered {
			t.Errorf("%s by a replica's worker: %v", sql, err)
		}
		exec(t, conn, `set role `+role)
		if _, err := conn.Exec(t.Context(), sql); sqlState(err) != insufficientPrivilege {
			t.Errorf("%s by a role that may write: %v", sql, err)
		}
	}
	var owner bool
	err := connect(t, databaseURL).QueryRow(t.Context(), `
		select bool_or(privilege_type in ('UPDATE', 'DELETE', 'TRUNCATE')) from pg_class, aclexplode(relacl)
		where oid = 'rekall.audit'::regclass`).Scan(&owner)
	if err != nil || owner {
		t.Errorf("somebody may change the audit: %v, %v", owner, err)
	}
	pgtest.Exec(t, databaseURL, `insert into rekall.audit (actor, action) values ('cli:test', 'key.created')`)
}

func TestCreatorAndPredecessorNeverChange(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	old := insert(t, store)
	next := newKey()
	next.Predecessor, next.CreatedBy = old.ID, "cli:test"
	if _, err := store.Insert(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`update rekall.api_keys set created_by = 'cli:other' where id = '` + next.ID + `'`,
		`update rekall.api_keys set predecessor = '` + next.ID + `' where id = '` + old.ID + `'`,
	} {
		if err := pgtest.TryExec(databaseURL, sql); sqlState(err) != "RK002" {
			t.Errorf("%s: %v", sql, err)
		}
	}
	second := newKey()
	second.Predecessor = old.ID
	if _, err := store.Insert(t.Context(), second); err == nil {
		t.Error("a key has two successors")
	}
}

func TestManageKeysReachesTheFeed(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	start := snapshot(t, store, "")
	key := newKey()
	key.ManageKeys = true
	if _, err := store.Insert(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	insert(t, store)
	for _, change := range snapshot(t, store, start.Text).Changes {
		if change.ManageKeys != (change.ID == key.ID) {
			t.Errorf("record %+v", change)
		}
	}
	found, err := store.Lookup(t.Context(), []apikey.Digest{key.Digest})
	if err != nil || !found.Records[0].ManageKeys {
		t.Errorf("found %+v, %v", found.Records, err)
	}
}

// Whatever an operator asks of ten million keys must be answered from an index. A table of this size already makes
// Postgres prefer one.
func TestNoListReadsTheWholeTable(t *testing.T) {
	databaseURL := database(t)
	pgtest.Exec(t, databaseURL, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_by, created_at, expires_at, revoked_at)
		select 'key_' || lpad(i::text, 22, '0'), 'account-' || i % 500, 'Name ' || i, case i % 7 when 0 then 'sandbox' else 'production' end,
			sha256(i::text::bytea), '{}', 'cli:' || i % 100, now() - i * interval '1 minute',
			case i % 3 when 0 then now() + (i - 2000) * interval '1 hour' end, case when i % 1000 = 0 then now() end
		from generate_series(1, 50000) i;
		insert into rekall.audit (actor, action, key_id, account, environment)
		select 'cli:' || i % 100, 'key.created', 'key_' || lpad(i::text, 22, '0'), 'account-' || i % 500, 'sandbox' from generate_series(1, 50000) i;
		analyze rekall.api_keys; analyze rekall.audit`)
	store := open(t, databaseURL, keystore.Options{MaxConns: 1})
	flush := `select pg_stat_force_next_flush()`
	if pgVersion(t, databaseURL) < 150000 {
		flush = `select pg_sleep(0.5)` // it reports twice a second at most
	}
	// Of this one connection's statements, so that nobody else's count.
	scans := func(what string) {
		t.Helper()
		if _, err := store.Pool().Exec(t.Context(), flush); err != nil {
			t.Fatal(err)
		}
		var tables []string
		err := store.Pool().QueryRow(t.Context(), `
			select coalesce(array_agg(relname::text), '{}') from pg_stat_user_tables where relname in ('api_keys', 'audit') and seq_scan > 0`).Scan(&tables)
		if err != nil {
			t.Fatal(err)
		}
		if len(tables) > 0 {
			t.Errorf("%s reads all of %v", what, tables)
			pgtest.Exec(t, databaseURL, `select pg_stat_reset()`)
		}
	}
	pgtest.Exec(t, databaseURL, `select pg_stat_reset()`)
	middle := keystore.Position{CreatedAt: time.Now().Add(-25000 * time.Minute), ID: "key_0000000000000000025000"}
	account := keystore.Within("account-7", "")
	filters := map[string]keystore.Filter{
		"none": {}, "environment": {Environment: "sandbox"}, "creator": {CreatedBy: "cli:7"}, "name": {Name: "Name 49"},
		"active": {State: keystore.Active}, "expiring": {State: keystore.Expiring, ExpiringWithin: 14 * 24 * time.Hour},
		"expired": {State: keystore.Expired}, "revoked": {State: keystore.Revoked},
	}
	for name, filter := range filters {
		for where, reach := range map[string]keystore.Reach{"all": keystore.Everything(), "account": account} {
			for from, after := range map[string]keystore.Position{"first page": {}, "middle": middle} {
				rows, err := store.List(t.Context(), reach, filter, after, 101)
				if err != nil || len(rows) == 0 && where == "all" && from == "first page" {
					t.Errorf("%s of %s, %s: %d keys, %v", name, where, from, len(rows), err)
				}
				scans("list by " + name + " of " + where + ", " + from)
			}
		}
		if _, err := store.Count(t.Context(), account, filter); err != nil {
			t.Error(err)
		}
		scans("count by " + name)
	}
	if _, err := store.ListDue(t.Context(), keystore.Everything(), time.Now().Add(-49000*time.Minute), keystore.Position{}, 100, true); err != nil {
		t.Error(err)
	}
	scans("keys that are due")
	for name, filter := range map[string]keystore.AuditFilter{"none": {}, "key": {KeyID: "key_0000000000000000000007"}, "actor": {Actor: "cli:7"}} {
		for where, reach := range map[string]keystore.Reach{"all": keystore.Everything(), "account": account, "sandbox": keystore.Within("account-7", "sandbox")} {
			if _, err := store.ListAudit(t.Context(), reach, filter, 101); err != nil {
				t.Error(err)
			}
			scans("audit by " + name + " of " + where)
		}
	}
}

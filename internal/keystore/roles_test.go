package keystore_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// granted returns a new database with a role for edges and one for administrators.
func granted(t *testing.T) (databaseURL string, roles keystore.Roles) {
	t.Helper()
	databaseURL = pgtest.URL(t)
	roles = keystore.Roles{Edge: pgtest.Role(t, databaseURL), Admin: pgtest.Role(t, databaseURL)}
	if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, roles); err != nil {
		t.Fatal(err)
	}
	return databaseURL, roles
}

const insufficientPrivilege = "42501"

// nobodyMay are statements for the schema's owner only.
var nobodyMay = []string{
	`delete from rekall.api_keys`,
	`truncate rekall.api_keys`,
	`update rekall.api_keys set key_hash = sha256('mine')`,
	`update rekall.api_keys set account = 'mine'`,
	`update rekall.api_keys set environment = 'production'`,
	`update rekall.api_keys set created_at = now()`,
	`update rekall.api_keys set change_xid = '3'`,
	`insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, change_xid)
		values ('key_0123456789abcdefABCDEF', 'a', 'n', 'production', sha256('mine'), '{}', '3')`,
	`update rekall.api_keys set scopes = array['memories:delete']`,
	`update rekall.api_keys set manage_keys = true`,
	`update rekall.api_keys set created_by = 'user:other'`,
	`update rekall.audit set actor = 'user:other'`,
	`delete from rekall.audit`,
	`truncate rekall.audit`,
	`insert into rekall.audit (at, actor, action) values (now(), 'user:other', 'key.created')`,
	`alter table rekall.audit disable trigger all`,
	`select nextval('rekall.audit_id_seq')`,
	`begin; lock table rekall.api_keys in access exclusive mode`,
	`alter table rekall.api_keys disable trigger stamp`,
	`alter table rekall.api_keys disable trigger all`,
	`alter table rekall.api_keys add column mine int`,
	`alter table rekall.edges disable row level security`,
	`create policy mine on rekall.edges using (true)`,
	`set session_replication_role = replica`,
	`create trigger mine before insert on rekall.api_keys execute function rekall.notify_key_change()`,
	`create or replace function rekall.stamp_api_key() returns trigger language plpgsql as 'begin return new; end'`,
	`alter function rekall.create_canary() reset search_path`,
	`create function rekall.mine() returns int language sql as 'select 1'`,
	`create table rekall.mine (i int)`,
	`drop table rekall.edges`,
	`drop schema rekall cascade`,
	`update rekall.schema_version set version = 1`,
	`alter table rekall.api_keys owner to current_user`,
	`truncate rekall.edges`,
	`update rekall.edges set instance = 'mine'`,
	`update rekall.edges set writer = session_user`,
	`insert into rekall.edges (instance, writer) values ('mine', 'other')`,
	`insert into rekall.tiers (name) values ('free')`,
	`delete from rekall.account_limits`,
	`truncate rekall.key_limits`,
	`create role mine`,
	`copy rekall.api_keys to program 'cat'`,
}

var edgeMayNot = []string{
	`update rekall.tiers set requests_per_minute = 1000000`,
	`insert into rekall.account_limits (account, tier) values ('mine', 'team')`,
	`update rekall.account_limits set tier = 'team'`,
	`insert into rekall.key_limits (key_id) values ('key_0123456789abcdefABCDEF')`,
	`insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		values ('key_0123456789abcdefABCDEF', 'a', 'n', 'production', sha256('mine'), '{}')`,
	`insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		values ('key_0123456789abcdefABCDEF', 'rekall:canary', 'Canary', 'sandbox', sha256('mine'), '{}')`,
	`update rekall.api_keys set revoked_at = now()`,
	`update rekall.api_keys set expires_at = null`,
	`update rekall.api_keys set name = 'mine'`,
	`insert into rekall.audit (actor, action) values ('user:other', 'key.created')`,
	`select * from rekall.audit`,
	`select * from rekall.idempotency_keys`,
	`copy rekall.api_keys to stdout`,
	`select id from rekall.api_keys for update`,
	`select * from rekall.api_keys`,
	`select name from rekall.api_keys`,
	`select hint from rekall.api_keys`,
	`select created_at from rekall.api_keys`,
	`select count(*) from rekall.api_keys where name like 'B%'`,
	`update rekall.edges set name = 'mine'`,
	`update rekall.edges set started_at = now()`,
	`select name from rekall.edges`,
	`select region from rekall.edges`,
	`insert into rekall.signing_keys (id, public_key, instance, expires_at, writer)
		values (repeat('a', 43), sha256(''), repeat('a', 22), now(), 'other')`,
	`update rekall.signing_keys set writer = 'other'`,
	`begin; lock table rekall.last_used in share mode`,
	`begin; lock table rekall.usage_chores in share mode`,
}

var adminMayNot = []string{
	`insert into rekall.last_used (key_id, first_used_at, last_used_at) values ('key_0123456789abcdefABCDEF', now(), now())`,
	`select version from rekall.schema_version`,
	`select * from rekall.signing_keys`,
	`delete from rekall.signing_keys`,
	`insert into rekall.edges (instance) values ('mine')`,
	`update rekall.edges set seen_at = now()`,
	`delete from rekall.edges`,
	`select rekall.create_canary()`,
	`select rekall.revoke_canary('key_0123456789abcdefABCDEF')`,
}

func TestRoleOfEdgesCountsThemAll(t *testing.T) {
	databaseURL, roles := granted(t)
	report(t, open(t, databaseURL, keystore.Options{}), keystore.Edge{Name: "owner's"})
	silent := report(t, open(t, databaseURL, keystore.Options{}), keystore.Edge{Name: "silent"})
	pgtest.Exec(t, databaseURL, `update rekall.edges set seen_at = now() + interval '1 hour'; -- live
		update rekall.edges set seen_at = now() - interval '2 seconds' where instance = '`+silent.Instance+`'`)
	n, err := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{}).CountEdges(t.Context())
	if want := (keystore.EdgeCount{Live: 1, FailClosed: 1}); err != nil || n != want {
		t.Errorf("%+v %v, want %+v", n, err, want)
	}
}

func TestRolesAreDeniedWhatTheyDoNotNeed(t *testing.T) {
	databaseURL, roles := granted(t)
	store := open(t, databaseURL, keystore.Options{})
	insert(t, store)
	report(t, store, keystore.Edge{Name: "owner's"})
	for role, statements := range map[string][]string{
		roles.Edge:  append(edgeMayNot, nobodyMay...),
		roles.Admin: append(adminMayNot, nobodyMay...),
	} {
		user := pgtest.Login(t, databaseURL, role)
		for _, sql := range statements {
			if err := pgtest.TryExec(user, sql); sqlState(err) != insufficientPrivilege {
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
}

func report(t *testing.T, store *keystore.Store, e keystore.Edge) keystore.Edge {
	t.Helper()
	e.Instance, e.Version, e.MaxStaleness, e.StartedAt, e.Beat = apikey.RandomText(22), "v1", time.Second, time.Now(), 1
	if _, err := store.ReportEdge(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	return e
}

func TestEdgeRoleSufficesForAnEdge(t *testing.T) {
	databaseURL, roles := granted(t)
	owner, ctx := open(t, databaseURL, keystore.Options{}), t.Context()
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{Instance: apikey.RandomText(22)})
	start, key := snapshot(t, edge, ""), insert(t, owner)
	if found, err := edge.Lookup(ctx, []apikey.Digest{key.Digest}); err != nil || len(found.Records) != 1 {
		t.Errorf("Lookup = %+v, %v", found, err)
	}
	if changes := snapshot(t, edge, start.Text).Changes; len(changes) != 1 {
		t.Errorf("changes %+v", changes)
	}
	e := report(t, edge, keystore.Edge{Name: "north"})
	e.Beat, e.SyncedAt, e.Applied, e.AppliedOn = 2, start.Now, start.Text, start.Server.String()
	if _, err := edge.ReportEdge(ctx, e); err != nil {
		t.Error(err)
	}
	if err := edge.ForgetReplacedEdges(ctx, e.Instance); err != nil {
		t.Error(err)
	}
	if err := edge.RemoveEdge(ctx, e.Instance); err != nil {
		t.Error(err)
	}
	if left, _, err := owner.Edges(ctx, 0); err != nil || len(left) != 0 {
		t.Errorf("edges %+v, %v", left, err)
	}
}

func TestEdgeForgetsItsFormerSelvesAndNobodyElse(t *testing.T) {
	databaseURL, roles := granted(t)
	owner, ctx := open(t, databaseURL, keystore.Options{}), t.Context()
	login := pgtest.Login(t, databaseURL, roles.Edge)
	edge := open(t, login, keystore.Options{})
	other := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	former, namesake := report(t, edge, keystore.Edge{Name: "north"}), report(t, edge, keystore.Edge{Name: "south"})
	foreign := report(t, other, keystore.Edge{Name: "north"})
	pgtest.Exec(t, databaseURL, `update rekall.edges set seen_at = seen_at - max_staleness - interval '1 second'`)
	beside, e := report(t, edge, keystore.Edge{Name: "north"}), report(t, edge, keystore.Edge{Name: "north"})
	stays := []string{namesake.Instance, foreign.Instance, beside.Instance, e.Instance}

	if err := other.ForgetReplacedEdges(ctx, former.Instance); err != nil { // in the name of an edge that another user reports
		t.Fatal(err)
	}
	if left := instances(t, owner); len(left) != len(stays)+1 {
		t.Errorf("another user's edge removed rows: %v are left", left)
	}
	if err := edge.ForgetReplacedEdges(ctx, e.Instance); err != nil {
		t.Fatal(err)
	}
	left := instances(t, owner)
	if slices.Contains(left, former.Instance) || len(left) != len(stays) {
		t.Errorf("left %v, want %v", left, stays)
	}
}

func instances(t *testing.T, store *keystore.Store) []string {
	t.Helper()
	edges, _, err := store.Edges(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	all := make([]string, 0, len(edges))
	for _, e := range edges {
		all = append(all, e.Instance)
	}
	return all
}

// TestEdgeThatLocksWhatItMayKeepsOthersFromNeitherSigningNorCounting: it was taken over, and leaves its transaction open.
func TestEdgeThatLocksWhatItMayKeepsOthersFromNeitherSigningNorCounting(t *testing.T) {
	databaseURL, roles := granted(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	owner, taken := open(t, databaseURL, keystore.Options{}), connect(t, pgtest.Login(t, databaseURL, roles.Edge))
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	own := report(t, edge, keystore.Edge{Name: "north"})
	former, gone, ahead := report(t, edge, keystore.Edge{Name: "north"}), report(t, owner, keystore.Edge{Name: "gone"}), report(t, owner, keystore.Edge{Name: "ahead"})
	published, over := newSigningKey(), newSigningKey()
	publish(t, edge, time.Hour, published)
	publish(t, owner, time.Hour, over)
	pgtest.Exec(t, databaseURL, `
		update rekall.edges set seen_at = now() - interval '5 minutes' where instance = '`+former.Instance+`';
		update rekall.edges set seen_at = now() - interval '11 minutes' where instance = '`+gone.Instance+`';
		update rekall.edges set seen_at = now() + interval '11 minutes' where instance = '`+ahead.Instance+`';
		update rekall.signing_keys set expires_at = now() where id = '`+over.ID+`'`)

	exec(t, taken, `insert into rekall.signing_keys (id, public_key, instance, expires_at) values (repeat('a', 43), sha256(''), repeat('a', 22), now())`)
	exec(t, taken, `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat, seen_at)
		select repeat(name, 22), name, '', '', '1 s', now(), 1, now() + seen::interval
		from unnest(array['a', 'b'], array['1 day', '-1 day']) n (name, seen)`)
	exec(t, taken, `begin`)
	exec(t, taken, `select instance from rekall.edges for update`)
	exec(t, taken, `select id from rekall.signing_keys for update`)

	for what, do := range map[string]func() error{
		"forget edges":          func() error { return edge.ForgetEdges(ctx) },
		"forget replaced edges": func() error { return edge.ForgetReplacedEdges(ctx, own.Instance) },
		"publish signing keys": func() error {
			return edge.PublishSigningKeys(ctx, own.Instance, []keystore.SigningKey{published, newSigningKey()}, time.Hour)
		},
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n, err := edge.CountEdges(ctx); err != nil || n.Live+n.FailClosed != 4 {
		t.Errorf("edges %+v, %v", n, err)
	}
	left := instances(t, owner)
	slices.Sort(left)
	want := []string{strings.Repeat("a", 22), strings.Repeat("b", 22), own.Instance, ahead.Instance}
	slices.Sort(want)
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("edges (-want +got)\n%s", diff)
	}
	var keys int
	if err := connect(t, databaseURL).QueryRow(ctx, `select count(*) from rekall.signing_keys`).Scan(&keys); err != nil || keys != 3 {
		t.Errorf("%d keys are left, %v, want the two of the edge and the one that is locked", keys, err)
	}

	exec(t, taken, `rollback`)
	exec(t, taken, `update rekall.signing_keys set expires_at = now()`)
	exec(t, taken, `delete from rekall.signing_keys`)
	if left, err := edge.SigningKeys(ctx); err != nil || len(left) != 2 {
		t.Errorf("%d keys are left, %v, want those of the other edge", len(left), err)
	}
}

// TestKeyThatWasPublishedBeforeItHadAWriterIsRenewed while its edge runs on through an upgrade.
func TestKeyThatWasPublishedBeforeItHadAWriterIsRenewed(t *testing.T) {
	databaseURL, roles := granted(t)
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	key := newSigningKey()
	publish(t, edge, time.Hour, key)
	pgtest.Exec(t, databaseURL, `update rekall.signing_keys set writer = null`)
	publish(t, edge, time.Hour, key)
	// As earlier versions publish.
	pgtest.Exec(t, pgtest.Login(t, databaseURL, roles.Edge), `
		with gone as (delete from rekall.signing_keys where expires_at <= now() and id <> all('{}'))
		insert into rekall.signing_keys (id, public_key, instance, expires_at)
		values (repeat('a', 43), sha256(''), repeat('a', 22), now() + interval '1 hour')
		on conflict (id) do update set expires_at = excluded.expires_at`)
	if keys, err := edge.SigningKeys(t.Context()); err != nil || len(keys) != 2 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
}

func TestEdgeRevokesCanariesAndNoOtherKey(t *testing.T) {
	databaseURL, roles := granted(t)
	owner, ctx := open(t, databaseURL, keystore.Options{}), t.Context()
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	key := insert(t, owner)
	if err := edge.RevokeCanary(ctx, key.ID); err != nil {
		t.Error(err)
	}
	if row, err := owner.Get(ctx, keystore.Everything(), key.ID); err != nil || row.RevokedAt != nil {
		t.Errorf("an edge revoked a key: %+v, %v", row, err)
	}
	id, err := edge.CreateCanary(ctx)
	if err != nil || id == "" {
		t.Fatalf("canary %q, %v", id, err)
	}
	if again, err := edge.CreateCanary(ctx); err != nil || again != "" {
		t.Errorf("a second canary %q within 50 s, %v", again, err)
	}
	if err := edge.RevokeCanary(ctx, id); err != nil {
		t.Error(err)
	}
	row, err := owner.Get(ctx, keystore.Everything(), id)
	if err != nil || row.RevokedAt == nil || row.Account != keystore.CanaryAccount || row.Environment != "sandbox" || len(row.Scopes) != 0 {
		t.Errorf("canary %+v, %v", row, err)
	}
}

// TestCanaryThatAKilledEdgeLeftAliveIsRevoked: it can be removed only once it is.
func TestCanaryThatAKilledEdgeLeftAliveIsRevoked(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	exec(t, connect(t, databaseURL), `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_at)
		values ('key_left000000000000000000', 'rekall:canary', 'Canary', 'sandbox', sha256('left'), '{}', now() - interval '11 minutes'),
			('key_lives00000000000000000', 'rekall:canary', 'Canary', 'sandbox', sha256('lives'), '{}', now() - interval '2 minutes')`)
	if id, err := store.CreateCanary(t.Context()); err != nil || id == "" {
		t.Fatalf("canary %q, %v", id, err)
	}
	for id, revoked := range map[string]bool{"key_left000000000000000000": true, "key_lives00000000000000000": false} {
		if row, err := store.Get(t.Context(), keystore.Everything(), id); err != nil || (row.RevokedAt != nil) != revoked {
			t.Errorf("%s: %+v, %v", id, row, err)
		}
	}
}

func TestCanaryOfAClockThatWasSetBackKeepsNoEdgeFromMakingOne(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	exec(t, connect(t, databaseURL), `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_at, revoked_at)
		values ('key_left000000000000000000', 'rekall:canary', 'Canary', 'sandbox', sha256('left'), '{}', now() + interval '1 day', null),
			('key_over000000000000000000', 'rekall:canary', 'Canary', 'sandbox', sha256('over'), '{}', now() + interval '1 day', now() + interval '1 day')`)
	if id, err := store.CreateCanary(t.Context()); err != nil || id == "" {
		t.Fatalf("canary %q, %v", id, err)
	}
	if row, err := store.Get(t.Context(), keystore.Everything(), "key_left000000000000000000"); err != nil || row.RevokedAt == nil {
		t.Errorf("the one that was left alive: %+v, %v", row, err)
	}
	exec(t, connect(t, databaseURL), `update rekall.api_keys set revoked_at = now() where revoked_at is null`)
	if id, err := store.CreateCanary(t.Context()); err != nil || id != "" {
		t.Errorf("another canary %q, %v", id, err)
	}
}

// TestEdgeOfAClockThatWasSetBackIsLiveNoLongerThanOthers, nor is it gone before: a revocation waits for it.
func TestEdgeOfAClockThatWasSetBackIsLiveNoLongerThanOthers(t *testing.T) {
	databaseURL, roles := granted(t)
	owner, ctx := open(t, databaseURL, keystore.Options{}), t.Context()
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	own := report(t, edge, keystore.Edge{Name: "own"})
	report(t, owner, keystore.Edge{Name: "synced", SyncedAt: time.Now()})
	report(t, owner, keystore.Edge{Name: "never synced"})
	pgtest.Exec(t, databaseURL, `update rekall.edges set seen_at = seen_at + interval '45 seconds', synced_at = synced_at + interval '45 seconds'`)
	// An edge made one up that is compared as 30 s and too long to be added. A check refuses it, on which the others do not rely.
	pgtest.Exec(t, databaseURL, `alter table rekall.edges drop constraint edges_max_staleness_time`)
	pgtest.Exec(t, databaseURL, `update rekall.edges set max_staleness = '3600000 months -108000000 days 30 seconds' where name = 'never synced'`)
	if err := edge.ForgetReplacedEdges(ctx, own.Instance); err != nil {
		t.Fatal(err)
	}
	seen, _, err := owner.Edges(ctx, 0)
	if err != nil || len(seen) != 3 {
		t.Fatalf("edges %+v, %v", seen, err)
	}
	for _, e := range seen {
		if e.Age < 0 || e.SeenAt.After(time.Now()) || (e.SyncedAt == nil) != (e.Name != "synced") {
			t.Errorf("%+v", e)
		}
	}
}

// New functions are everybody's by default, and there may be no roles.
func TestFunctionsThatRunAsTheSchemasOwnerAreNotForEverybody(t *testing.T) {
	databaseURL := database(t)
	everybody := pgtest.Role(t, databaseURL)
	pgtest.Exec(t, databaseURL, `create role `+everybody)
	rows, err := connect(t, databaseURL).Query(t.Context(), `
select proname::text, has_function_privilege($1, oid, 'execute') from pg_proc where pronamespace = 'rekall'::regnamespace and prosecdef`, everybody)
	if err != nil {
		t.Fatal(err)
	}
	may := map[string]bool{}
	var name string
	var granted bool
	if _, err := pgx.ForEachRow(rows, []any{&name, &granted}, func() error { may[name] = granted; return nil }); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"create_canary": false, "revoke_canary": false, "forget_replaced_edges": false, "key_first_used": false,
		"forget_edges": false, "forget_signing_keys": false}
	if diff := cmp.Diff(want, may); diff != "" {
		t.Errorf("who may call them (-want +got)\n%s", diff)
	}
}

// The functions run as the schema's owner: what they call must not be the caller's to choose.
func TestCanaryFunctionsIgnoreTheCallersSearchPath(t *testing.T) {
	databaseURL, roles := granted(t)
	pgtest.Exec(t, databaseURL, `create schema evil; grant usage, create on schema evil to `+roles.Edge)
	user := pgtest.Login(t, databaseURL, roles.Edge)
	pgtest.Exec(t, user, `create function evil.gen_random_uuid() returns uuid language sql as
		$$ select '00000000-0000-0000-0000-000000000000'::uuid $$;
		create function pg_temp.gen_random_uuid() returns uuid language sql as $$ select '00000000-0000-0000-0000-000000000000'::uuid $$;
		set search_path = pg_temp, evil, pg_catalog;
		select rekall.create_canary()`)
	var id string
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select id from rekall.api_keys`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	if id == "key_"+strings.Repeat("0", 22) {
		t.Error("the caller chose the canary")
	}
}

func TestEdgesThatLogInAsDifferentUsersCannotTouchEachOthersRow(t *testing.T) {
	databaseURL, roles := granted(t)
	owner, ctx := open(t, databaseURL, keystore.Options{}), t.Context()
	north := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	southURL := pgtest.Login(t, databaseURL, roles.Edge)
	south := open(t, southURL, keystore.Options{})
	e := report(t, north, keystore.Edge{Name: "north"})
	if err := south.RemoveEdge(ctx, e.Instance); err != nil {
		t.Error(err)
	}
	e.Beat = 99
	if err := south.ForgetEdges(ctx); err != nil {
		t.Error(err)
	}
	pgtest.Exec(t, southURL, `delete from rekall.edges where seen_at <= now()`)
	if _, err := south.ReportEdge(ctx, e); sqlState(err) != insufficientPrivilege {
		t.Errorf("a forged report: %v", err)
	}
	pgtest.Exec(t, southURL, `update rekall.edges set beat = 99`)
	if err := pgtest.TryExec(southURL, `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat)
		values ('0123456789abcdefABCDEF', 'north', '', '', interval '1 hour', now(), 1)`); sqlState(err) != checkViolation {
		t.Errorf("an edge for which others would wait an hour: %v", err)
	}
	pgtest.Exec(t, southURL, `set role `+roles.Edge+`; update rekall.edges set beat = 99`)
	if seen, _, err := owner.Edges(ctx, 0); err != nil || len(seen) != 1 {
		t.Fatalf("edges %+v, %v", seen, err)
	}
	if beat := beatOf(t, databaseURL, e.Instance); beat != 1 {
		t.Errorf("beat %d of the other's row", beat)
	}

	// Gone without a word for more than ten minutes: any edge may forget it.
	pgtest.Exec(t, databaseURL, `update rekall.edges set seen_at = now() - interval '11 minutes'`)
	report(t, south, keystore.Edge{Name: "south"})
	if err := south.ForgetEdges(ctx); err != nil {
		t.Error(err)
	}
	if seen, _, err := owner.Edges(ctx, 0); err != nil || len(seen) != 1 || seen[0].Name != "south" {
		t.Errorf("edges %+v, %v", seen, err)
	}
}

func beatOf(t *testing.T, databaseURL, instance string) (beat int) {
	t.Helper()
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select beat from rekall.edges where instance = $1`, instance).Scan(&beat); err != nil {
		t.Fatal(err)
	}
	return beat
}

// rights lists all rights that anybody was given in the schema.
func rights(t *testing.T, databaseURL string) []string {
	t.Helper()
	rows, err := connect(t, databaseURL).Query(t.Context(), `
with acls (object, acl) as (
	select 'schema', nspacl from pg_namespace where nspname = 'rekall'
	union all select oid::regclass::text, relacl from pg_class where relnamespace = 'rekall'::regnamespace
	union all select attrelid::regclass || '.' || attname, attacl from pg_attribute join pg_class c on c.oid = attrelid where relnamespace = 'rekall'::regnamespace
	union all select oid::regprocedure::text, coalesce(proacl, acldefault('f', proowner)) from pg_proc where pronamespace = 'rekall'::regnamespace)
select concat_ws(' ', object, grantee::regrole, privilege_type, is_grantable) from acls, aclexplode(acl) order by 1`)
	if err != nil {
		t.Fatal(err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestGrantingAgainHealsWhatWasAddedAndWhatWasTakenAway(t *testing.T) {
	databaseURL, roles := granted(t)
	want := rights(t, databaseURL)
	for _, drift := range []string{
		`grant all on rekall.api_keys, rekall.edges, rekall.schema_version to EDGE with grant option`,
		`grant select (name), update (revoked_at) on rekall.api_keys to EDGE`,
		`grant select on rekall.api_keys to public`,
		`grant execute on all functions in schema rekall to public, ADMIN`,
		`grant create on schema rekall to EDGE; grant usage on schema rekall to public`,
		`revoke all on all tables in schema rekall from EDGE, ADMIN`,
		`revoke all on schema rekall from EDGE, ADMIN`,
	} {
		pgtest.Exec(t, databaseURL, strings.NewReplacer("EDGE", roles.Edge, "ADMIN", roles.Admin).Replace(drift))
		if cmp.Equal(want, rights(t, databaseURL)) {
			t.Fatalf("%s changes nothing", drift)
		}
		if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, roles); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, rights(t, databaseURL)); diff != "" {
			t.Errorf("after %s:\n%s", drift, diff)
		}
	}
	if _, _, err := keystore.Migrate(t.Context(), databaseURL); err != nil || !cmp.Equal(want, rights(t, databaseURL)) {
		t.Errorf("migrating without roles changed rights, or %v", err)
	}
}

func TestRoleWithRightsThatCannotBeRevokedIsRefusedAndLosesNone(t *testing.T) {
	databaseURL, roles := granted(t)
	role := func(sql string) string {
		name := pgtest.Role(t, databaseURL)
		pgtest.Exec(t, databaseURL, strings.ReplaceAll(sql, "ROLE", name))
		return name
	}
	var owner string
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select current_user`).Scan(&owner); err != nil {
		t.Fatal(err)
	}
	before := rights(t, databaseURL)
	for name, refused := range map[string]string{
		"the owner":                           owner,
		"a superuser":                         role(`create role ROLE superuser`),
		"the owner's member":                  role(`create role ROLE noinherit in role "` + owner + `"`),
		"another role's member":               role(`create role ROLE in role ` + roles.Admin),
		"another role's member by set role":   role(`create role ROLE noinherit in role ` + roles.Admin),
		"a member's member by set role":       role(`create role ROLE noinherit in role ` + role(`create role ROLE in role `+roles.Admin)),
		"a member's member by set role twice": role(`create role ROLE noinherit in role ` + role(`create role ROLE noinherit in role `+roles.Admin)),
		"a reader of all":                     role(`create role ROLE in role pg_read_all_data`),
		"a reader of all by set role":         role(`create role ROLE noinherit in role pg_read_all_data`),
	} {
		_, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, keystore.Roles{Edge: refused})
		if err == nil || !strings.Contains(err.Error(), "name another role") {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(before, rights(t, databaseURL)); diff != "" {
			t.Errorf("%s: rights changed\n%s", name, diff)
		}
	}
}

func TestRolesOfWhichOneIsAMemberOfTheOtherAreRefusedAndLoseNoRight(t *testing.T) {
	for name, sql := range map[string]string{
		"the edge's inherits":     `grant ADMIN to EDGE`,
		"the admin's inherits":    `grant EDGE to ADMIN`,
		"the edge's can set role": `alter role EDGE noinherit; grant ADMIN to EDGE`,
	} {
		t.Run(name, func(t *testing.T) {
			databaseURL, roles := granted(t)
			before := rights(t, databaseURL)
			pgtest.Exec(t, databaseURL, strings.NewReplacer("EDGE", roles.Edge, "ADMIN", roles.Admin).Replace(sql))
			_, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, roles)
			if err == nil || !strings.Contains(err.Error(), "is a member of") {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff(before, rights(t, databaseURL)); diff != "" {
				t.Errorf("rights changed\n%s", diff)
			}
		})
	}
}

func TestUnusableRoleNamesAreRefusedBeforeAnythingIsDone(t *testing.T) {
	databaseURL := pgtest.URL(t)
	for name, roles := range map[string]keystore.Roles{
		"the same":  {Edge: "one", Admin: "one"},
		"too long":  {Edge: strings.Repeat("r", 64)},
		"with zero": {Admin: "a\x00b"},
	} {
		if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, roles); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if err := pgtest.TryExec(databaseURL, `create schema rekall`); err != nil {
		t.Errorf("there is a schema already: %v", err)
	}
	for _, reserved := range []string{"public", "none", "pg_mine"} {
		if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, keystore.Roles{Edge: reserved}); err == nil {
			t.Errorf("%s is accepted", reserved)
		}
	}
}

func TestRoleNameIsQuoted(t *testing.T) {
	databaseURL := pgtest.URL(t)
	role := pgtest.Role(t, databaseURL) + `"; drop schema rekall --`
	t.Cleanup(func() {
		pgtest.Exec(t, databaseURL, fmt.Sprintf(`drop owned by %[1]s; drop role %[1]s`, pgx.Identifier{role}.Sanitize()))
	})
	if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, keystore.Roles{Edge: role}); err != nil {
		t.Fatal(err)
	}
}

func TestMissingRightSaysWhatToDo(t *testing.T) {
	databaseURL, roles := granted(t)
	pgtest.Exec(t, databaseURL, `revoke select on rekall.api_keys from `+roles.Edge)
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	_, err := edge.Snapshot(t.Context(), "", keystore.MaxChanges)
	if sqlState(err) != insufficientPrivilege || !strings.Contains(err.Error(), "--edge-role") || !strings.Contains(err.Error(), "api_keys") {
		t.Errorf("got %v", err)
	}
}

func TestMissingRightNamesOnceTheRoleThatHasIt(t *testing.T) {
	databaseURL, roles := granted(t)
	pgtest.Exec(t, databaseURL, `revoke usage on schema rekall from `+roles.Edge)
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{ConnectTimeout: pgtest.ConnectTimeout})
	scan := edge.ScanHashes(t.Context(), func(keystore.Server, int) error { return nil }, func([]byte) {})
	_, _, edges := edge.Edges(t.Context(), 0)
	for role, err := range map[string]error{"--edge-role": scan, "--admin-role": edges} {
		if sqlState(err) != insufficientPrivilege || strings.Count(err.Error(), role) != 1 || strings.Count(err.Error(), "-role") != 1 {
			t.Errorf("want %s once: %v", role, err)
		}
	}
}

// A migration that adds something must say who may use it, or that nobody may.
func TestEveryObjectAndColumnOfTheSchemaHasItsGrants(t *testing.T) {
	databaseURL, roles := granted(t)
	rows, err := connect(t, databaseURL).Query(t.Context(), `
select 'table rekall.' || relname from pg_class where relnamespace = 'rekall'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f')
union all
select 'sequence rekall.' || relname from pg_class c where relnamespace = 'rekall'::regnamespace and relkind = 'S'
	and not exists (select from pg_depend where classid = 'pg_class'::regclass and objid = c.oid and deptype = 'i') -- of an identity column
union all
select 'function ' || oid::regprocedure from pg_proc where pronamespace = 'rekall'::regnamespace`)
	if err != nil {
		t.Fatal(err)
	}
	objects, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	if len(objects) < 8 {
		t.Fatalf("only %v", objects)
	}
	used := keystore.Grants()
	for _, object := range objects {
		someoneUses, ok := used[object]
		if !ok {
			t.Errorf("%s has no line in the table of grants", object)
			continue
		}
		if table, ok := strings.CutPrefix(object, "table "); ok && someoneUses {
			for _, column := range unused(t, databaseURL, table, roles) {
				t.Errorf("no role has a right on column %s of %s: forgotten?", column, table)
			}
		}
	}
}

// neverGranted are columns that only defaults and policies touch.
var neverGranted = map[string]bool{"writer": true}

func unused(t *testing.T, databaseURL, table string, roles keystore.Roles) (columns []string) {
	t.Helper()
	rows, err := connect(t, databaseURL).Query(t.Context(), `
select attname from pg_attribute where attrelid = $1::text::regclass and attnum > 0 and not attisdropped
	and not has_column_privilege($2::name, attrelid, attnum, 'select, insert, update')
	and not has_column_privilege($3::name, attrelid, attnum, 'select, insert, update')`, table, roles.Edge, roles.Admin)
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, column := range all {
		if !neverGranted[column] {
			columns = append(columns, column)
		}
	}
	return columns
}

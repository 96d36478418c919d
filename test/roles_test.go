package test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

// TestTwoRolesSufficeForAllThatTheGatewayAndItsCommandsDo runs each with a user who is a member of its role and of nothing else.
func TestTwoRolesSufficeForAllThatTheGatewayAndItsCommandsDo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	edgeRole, adminRole := pgtest.Role(t, r.database), pgtest.Role(t, r.database)
	if stdout, stderr, code := cli(t, r.database, "migrate", "--edge-role", edgeRole, "--admin-role", adminRole); code != 0 ||
		!strings.Contains(stdout, edgeRole) || !strings.Contains(stdout, adminRole) {
		t.Fatalf("migrate: %d %s%s", code, stdout, stderr)
	}
	edge, admin := pgtest.Login(t, r.database, edgeRole), pgtest.Login(t, r.database, adminRole)
	slow := r.prepare(standardSite, "edge south eu", "refresh 20s")
	slow.run(edge)
	slow.waitReady()
	slow.wantWoken(r.database)
	slow.process.Stop(t)
	g := r.prepare(standardSite, "edge north eu", "refresh 100ms", "canary")
	g.run(edge)
	g.waitReady()

	stdout, stderr, code := cli(t, admin, "keys", "create", "--name", "n", "--scopes", "memories:read", "--environment", "production", "--json")
	if code != 0 {
		t.Fatal(stderr)
	}
	var key keyadmin.Key
	if err := json.Unmarshal([]byte(stdout), &key); err != nil {
		t.Fatal(err)
	}
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	if stdout, stderr, code := cli(t, admin, "keys", "list"); code != 0 || !strings.Contains(stdout, key.ID) {
		t.Errorf("list: %d %s%s", code, stdout, stderr)
	}
	eventually.True(t, "the edge is listed", func() bool {
		stdout, stderr, code := cli(t, admin, "edges", "list")
		if code != 0 {
			t.Fatal(stderr)
		}
		return strings.Contains(stdout, "north")
	})
	stdout, stderr, code = cli(t, admin, "keys", "revoke", key.ID, "--wait")
	if code != 0 || !strings.Contains(stdout, "north eu: confirmed") {
		t.Errorf("revoke: %d %s%s", code, stdout, stderr)
	}
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 401, "API_KEY_REVOKED")
	eventually.Within(t, canaryPatience, "the canary is measured", func() bool { return g.status().Canary > 0 })
	if strings.Contains(slow.log.String()+g.log.String(), "permission denied") {
		t.Error("something was denied")
	}
	g.process.Stop(g.t)
	if stdout, stderr, code := cli(t, admin, "edges", "list", "--json"); code != 0 || strings.TrimSpace(stdout) != "[]" {
		t.Errorf("the edge left its row: %d %s%s", code, stdout, stderr)
	}
	if _, stderr, code := cli(t, edge, "keys", "revoke", key.ID); code == 0 || !strings.Contains(stderr, "permission denied") {
		t.Errorf("an edge's user manages keys: %d %s", code, stderr)
	}
}

func TestWhoLacksARightIsToldWhichRoleHasIt(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	edgeRole, adminRole := pgtest.Role(t, r.database), pgtest.Role(t, r.database)
	if _, stderr, code := cli(t, r.database, "migrate", "--edge-role", edgeRole, "--admin-role", adminRole); code != 0 {
		t.Fatal(stderr)
	}
	rightless := pgtest.Role(t, r.database)
	pgtest.Exec(t, r.database, "create role "+rightless)
	edge, nobody := pgtest.Login(t, r.database, edgeRole), pgtest.Login(t, r.database, rightless)
	owner, one := "as the owner of the schema, or as a user that may create schemas and roles", r.key("production", "memories:read").ID
	want := func(user, args, remedy string) {
		t.Helper()
		_, stderr, code := cli(t, user, strings.Fields(args)...)
		if code != 1 || strings.Count(stderr, remedy) != 1 || !strings.Contains(stderr, "permission denied") || strings.Contains(stderr, "--edge-role") {
			t.Errorf("%s: %d %s", args, code, stderr)
		}
	}
	for _, args := range []string{
		"keys list", "keys show " + one, "keys revoke " + one, "keys usage " + one, "keys audit", "edges list", "limits account acme --tier pro",
	} {
		want(edge, args, "--admin-role")
		want(nobody, args, "--admin-role")
	}
	for _, args := range []string{"migrate", "migrate --plan", "migrate --edge-role " + edgeRole} {
		want(nobody, args, owner)
	}
	want(edge, "migrate --edge-role "+edgeRole, owner)
	g := r.prepare(standardSite)
	g.run(nobody)
	eventually.True(t, "the log names the edges' role", func() bool {
		log := g.log.String()
		return strings.Contains(log, "read change feed") && strings.Contains(log, "report edge") && strings.Contains(log, "--edge-role")
	})
	if strings.Contains(g.log.String(), "--admin-role") {
		t.Error("the gateway asks for the administrators' role")
	}
}

// wantWoken requires that changes wake the gateway, whose refresh is 20s: ticks alone make fewer syncs before the deadline.
func (g *gateway) wantWoken(database string) {
	g.t.Helper()
	before := g.status().Epoch
	eventually.True(g.t, "the gateway syncs at each notification", func() bool {
		pgtest.Exec(g.t, database, "notify rekall_keys")
		return g.status().Epoch > before+3
	})
}

func TestMigrateRefusesRolesThatItCannotMakeWithOneLine(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	for name, args := range map[string][]string{
		"empty":     {"--edge-role", ""},
		"the same":  {"--edge-role", "r", "--admin-role", "r"},
		"everybody": {"--admin-role", "public"},
	} {
		stdout, stderr, code := cli(t, database, append([]string{"migrate"}, args...)...)
		if code == 0 || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: %d %q %q", name, code, stdout, stderr)
		}
	}
	const superuser = "postgres" // whose rights no revocation reaches
	if _, stderr, code := cli(t, database, "migrate", "--edge-role", superuser); code == 0 || !strings.Contains(stderr, "the schema is version ") {
		t.Errorf("a superuser: %d %q, want what was done all the same", code, stderr)
	}
}

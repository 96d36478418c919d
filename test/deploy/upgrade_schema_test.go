package deploy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// pinned is an earlier commit whose gateways must go on working with the newest schema, since a fleet is upgraded after its
// schema and edge by edge. It is replaced by a later one when a migration may contract what it needs.
type pinned struct {
	commit string
	schema int32 // the newest that it knows
	roles  bool  // its migrate makes Postgres roles with the least rights
	usage  bool  // it counts what keys are used for
	build  func() (string, error)
}

var earlier = map[string]pinned{
	"BeforeTheLifeOfKeys": pin(pinned{commit: "e16672ed132585633edbe68ef102521061a75ffb", schema: 2}),
	"BeforeBulkRows":      pin(pinned{commit: "802753de63974de46cd6c49cce516bd7bf796cb7", schema: 6, roles: true, usage: true}),
}

// pin adds the build of the commit's gateway, which is made once and lies beside that of this tree.
func pin(p pinned) pinned {
	p.build = sync.OnceValues(func() (string, error) {
		old := program + "-" + p.commit
		return old, buildCommit("../..", p.commit, old)
	})
	return p
}

func (p pinned) program(t *testing.T) string {
	t.Helper()
	old, err := p.build()
	if err != nil {
		t.Fatal(err)
	}
	return old
}

// buildCommit makes the gateway of a commit of a repository.
func buildCommit(repository, commit, program string) error {
	tree := program + ".src"
	unpack := fmt.Sprintf("set -o pipefail; mkdir %[1]q && git -C %[2]q archive --format=tar %[3]s | tar -x -C %[1]q", tree, repository, commit)
	var problem bytes.Buffer
	cmd := exec.Command("bash", "-c", unpack)
	cmd.Stderr = &problem
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("this clone has not got commit %s, an earlier gateway: fetch the whole history with git fetch --unshallow: %w: %s",
			commit, err, bytes.TrimSpace(problem.Bytes()))
	}
	return build(tree, program)
}

func TestShallowCloneIsToldHowToGetTheEarlierCommits(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	clone := filepath.Join(t.TempDir(), "clone")
	if output, err := exec.Command("git", "clone", "--quiet", "--no-checkout", "--depth", "1", "file://"+root, clone).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	for name, p := range earlier {
		err := buildCommit(clone, p.commit, filepath.Join(t.TempDir(), "rekall-gateway"))
		if err == nil || !strings.Contains(err.Error(), "git fetch --unshallow") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The order of an upgrade is: migrate, while earlier gateways serve; then one gateway after the other.
func TestEarlierGatewaysServeWhileTheSchemaIsMigratedAndAfterwards(t *testing.T) {
	for name, p := range earlier {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testUpgradeFrom(t, p)
		})
	}
}

func testUpgradeFrom(t *testing.T, p pinned) {
	old, r := p.program(t), newRig(t)
	asEdge, migrate := r.database, []string{"migrate"}
	if p.roles {
		role := pgtest.Role(t, r.database)
		migrate = append(migrate, "--edge-role", role)
		command(t, old, r.database, migrate...)
		asEdge = pgtest.Login(t, r.database, role)
	} else {
		command(t, old, r.database, migrate...)
	}
	from, pending, err := keystore.Plan(t.Context(), r.database)
	if err != nil || from != p.schema || len(pending) == 0 {
		t.Fatalf("the earlier gateway made version %d, want %d; %d are pending: %v", from, p.schema, len(pending), err)
	}
	known := createWith(t, old, r.database)
	g := r.gateway(old, process.FreeAddress(t), asEdge)
	g.startReady()

	requests := startLoad(t, 2, g.http+"/v1/memories", known)
	requests.waitMore(50)
	command(t, program, r.database, migrate...)
	requests.waitMore(50)
	requests.mustHaveLostNone()
	if _, pending, err := keystore.Plan(t.Context(), r.database); err != nil || len(pending) != 0 {
		t.Fatalf("%d migrations are left: %v", len(pending), err)
	}

	// Keys of the newest schema, at the earlier gateway, and at the newest beside it.
	reader, tester := r.key("production", "memories:read"), r.key("sandbox", "memories:read")
	next := r.gateway(program, process.FreeAddress(t), asEdge)
	next.startReady()
	serve := func(g *gateway) {
		t.Helper()
		before, beforeSandbox := r.production.Requests(), r.sandbox.Requests()
		g.want(http.StatusOK, "", "GET", known)
		g.want(http.StatusOK, "", "GET", reader.Key.Reveal())
		g.want(http.StatusOK, "", "GET", tester.Key.Reveal())
		g.want(http.StatusForbidden, "SCOPE_INSUFFICIENT", "POST", reader.Key.Reveal())
		g.want(http.StatusUnauthorized, "API_KEY_MISSING", "GET", "")
		if got, sandbox := r.production.Requests()-before, r.sandbox.Requests()-beforeSandbox; got != 2 || sandbox != 1 {
			t.Errorf("%d requests went to production, %d to the sandbox", got, sandbox)
		}
	}
	serve(g)
	serve(next)
	revoked := r.key("production", "memories:read")
	holds := func(g *gateway) {
		t.Helper()
		eventually.True(t, "a revocation holds", func() bool {
			got, err := ask("GET", g.http+"/v1/memories", revoked.Key.Reveal())
			return err == nil && got.code == "API_KEY_REVOKED"
		})
	}
	g.want(http.StatusOK, "", "GET", revoked.Key.Reveal())
	r.revoke(revoked.ID)
	holds(g)
	holds(next)

	// An earlier gateway comes back, as the guide says of going back: without its migrate.
	g.process.Stop(t)
	back := exec.Command(old, "migrate", "--database", r.database)
	if output, err := back.CombinedOutput(); err == nil || !strings.Contains(string(output), "newer than this binary's") {
		t.Errorf("the earlier migrate says %v, %s", err, output)
	}
	again := r.gateway(old, process.FreeAddress(t), asEdge)
	again.startReady()
	serve(again)
	holds(again)
	again.process.Stop(t)
	next.process.Stop(t)

	used, err := r.admin.Usage(t.Context(), keyadmin.Operator("test"), reader.ID, "", "")
	want := int64(1) // of the newest gateway
	if p.usage {
		want = 3
	}
	if err != nil || used.Total.Allowed != want || used.Total.DeniedByReason["scope_insufficient"] != want {
		t.Errorf("counted %+v, want %d of each; %v", used.Total, want, err)
	}
}

// createWith makes a key with a gateway's command and returns it.
func createWith(t *testing.T, program, database string) string {
	t.Helper()
	var created struct {
		Key string `json:"key"`
	}
	text := command(t, program, database, "keys", "create", "--name", "test", "--scopes", "memories:read", "--environment", "production", "--json")
	if err := json.Unmarshal([]byte(text), &created); err != nil || created.Key == "" {
		t.Fatalf("no key was created: %v", err)
	}
	return created.Key
}

// Upgraded in the wrong order, a gateway must neither serve nor guess.
func TestGatewayAheadOfItsSchemaSaysWhatToRunAndAllowsNothingUntilThen(t *testing.T) {
	t.Parallel()
	r, old := newRig(t), earlier["BeforeTheLifeOfKeys"].program(t)
	command(t, old, r.database, "migrate")
	key := createWith(t, old, r.database)
	g := r.gateway(program, process.FreeAddress(t), r.database)
	g.start()
	eventually.True(t, "the log says what to run", func() bool {
		g.process.MustRun(t)
		return strings.Contains(g.process.Log.String(), `database has no schema rekall, or an older one: run \"rekall-gateway migrate\"`)
	})
	g.want(http.StatusServiceUnavailable, "AUTH_UNAVAILABLE", "GET", key)
	if n := r.production.Requests(); n != 0 {
		t.Errorf("%d requests passed", n)
	}
	command(t, program, r.database, "migrate")
	g.waitReady() // without a restart
	g.want(http.StatusOK, "", "GET", key)
}

func TestPlanShowsWhatMigrateWouldRunAndChangesNothing(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	role := pgtest.Role(t, database)
	for range 2 { // were the first to change anything, the second would show less
		plan := command(t, program, database, "migrate", "--plan", "--edge-role", role)
		for _, part := range []string{"from version 0 to", "Nothing was changed.", "create table rekall.api_keys", "Role " + role + " would"} {
			if !strings.Contains(plan, part) {
				t.Errorf("no %q in %s", part, plan)
			}
		}
	}
	command(t, program, database, "migrate")
	if plan := command(t, program, database, "migrate", "--plan"); !strings.Contains(plan, "nothing to run") {
		t.Errorf("got %s", plan)
	}
	var plan struct {
		From, To   int32
		Migrations []any
	}
	text := command(t, program, database, "migrate", "--plan", "--json")
	if err := json.Unmarshal([]byte(text), &plan); err != nil || plan.From != plan.To || plan.Migrations == nil || len(plan.Migrations) != 0 {
		t.Errorf("got %s, %v", text, err)
	}
}

package test

import (
	"encoding/json"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

func (r *rig) edges() []keyadmin.Edge {
	r.t.Helper()
	edges, err := r.admin.Edges(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return edges
}

func TestAgeOfAnEdgeIsToldToTheMillisecond(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.start(standardSite)
	eventually.True(t, "the edge is listed", func() bool { return len(r.edges()) == 1 })
	for range 5 { // one may happen to have three decimals
		stdout, stderr, code := cli(t, r.database, "edges", "list", "--json")
		if code != 0 || !regexp.MustCompile(`"age_seconds": \d+(\.\d{1,3})?\n`).MatchString(stdout) {
			t.Fatalf("%d %s%s", code, stdout, stderr)
		}
	}
}

func TestRevocationIsConfirmedByEveryEdgeAndTheSilentOneIsNamed(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	north := r.start(standardSite, "edge north eu")
	r.start(standardSite, "edge south")
	silent := r.start(standardSite, "edge silent us", "max_staleness 3s")
	eventually.True(t, "all edges are listed", func() bool { return len(r.edges()) == 3 })

	key := r.key("production", "memories:read")
	north.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	silent.process.Signal(t, syscall.SIGSTOP)
	stdout, stderr, code := cli(t, r.database, "keys", "revoke", key.ID, "--wait", "--json")
	if code != 0 {
		t.Fatal(stderr)
	}
	var result struct {
		Edges []keyadmin.Confirmation `json:"edges"`
	}
	if err := json.Unmarshal([]byte(stdout), &result); err != nil {
		t.Fatal(err)
	}
	got := map[string]keyadmin.Confirmation{}
	for _, c := range result.Edges {
		got[c.Name] = c
	}
	if len(got) != 3 || !got["north"].Confirmed || !got["south"].Confirmed || got["silent"].Confirmed || got["silent"].Status != keyadmin.FailClosed {
		t.Errorf("confirmations %+v", got)
	}
	if got["north"].DelaySeconds <= 0 || got["silent"].DelaySeconds != 0 {
		t.Errorf("delays: north %v, silent %v", got["north"].DelaySeconds, got["silent"].DelaySeconds)
	}
	north.do("GET", "/v1/memories", bearer(key)).wantCode(t, 401, "API_KEY_REVOKED")
	stdout, stderr, code = cli(t, r.database, "keys", "revoke", r.key("production", "memories:read").ID, "--wait")
	for _, line := range []string{`(?m)^north eu: confirmed after \d`, `(?m)^south: confirmed after \d`, `(?m)^silent us: did not confirm: fail-closed`} {
		if code != 0 || !regexp.MustCompile(line).MatchString(stdout) {
			t.Errorf("%d %s%s: no line %s", code, stdout, stderr, line)
		}
	}

	// A wait that was interrupted is taken up again.
	stdout, stderr, code = cli(t, r.database, "keys", "revoke", key.ID, "--wait")
	for _, line := range []string{`(?m)^north eu: confirmed$`, `(?m)^south: confirmed$`, `(?m)^silent us: did not confirm`, key.ID + ` was revoked already\. No edge that reports allows it \(3 edges\)\.`} {
		if code != 0 || !regexp.MustCompile(line).MatchString(stdout) {
			t.Errorf("again: %d %s%s: no line %s", code, stdout, stderr, line)
		}
	}

	stdout, stderr, code = cli(t, r.database, "edges", "list")
	if code != 0 || !strings.Contains(stdout, "fail-closed") || strings.Count(stdout, " live ") != 2 {
		t.Errorf("edges list: %d %s %s", code, stdout, stderr)
	}
	if !regexp.MustCompile(`(?m)^NAME +REGION +VERSION +STATUS +LAST SYNC +AGE\n(.*\n)*north +eu +\S+ +live +\d{4}-\S+ +\d+\.\ds$`).MatchString(stdout) {
		t.Errorf("edges list: %s", stdout)
	}
	silent.process.Signal(t, syscall.SIGCONT)
	eventually.True(t, "the silent edge is live again", func() bool {
		for _, e := range r.edges() {
			if e.Status != keyadmin.Live {
				return false
			}
		}
		return true
	})
	silent.process.Signal(t, syscall.SIGTERM)
	eventually.True(t, "an edge that stops drops out", func() bool { return len(r.edges()) == 2 })
}

func TestWaitPromisesNothingWhereNoEdgeReports(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pgtest.Exec(t, r.database, `alter table rekall.edges add check (name <> 'mute')`)
	mute := r.start(standardSite, "edge mute", "max_staleness 3s")
	eventually.True(t, "the status says that the edge cannot report", func() bool {
		return strings.Contains(mute.status().LastError, "report edge")
	})
	for _, args := range [][]string{{r.key("production", "memories:read").ID}, {"--account", "acme", "--yes"}} {
		r.key("production", "memories:read")
		stdout, stderr, code := cli(t, r.database, append([]string{"keys", "revoke", "--wait"}, args...)...)
		if code != 1 || stdout != "" || !strings.Contains(stderr, "revoked, but") || !strings.Contains(stderr, "no edge reports to this database: check --database") {
			t.Errorf("%v: %d %q %q", args, code, stdout, stderr)
		}
	}
}

func TestStatusSaysWhyUsageIsNotFlushedNoCanaryIsSentAndNoLimitIsShared(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pgtest.Exec(t, r.database, `alter function rekall.create_canary rename to hidden`)
	g := r.start(standardSite, "canary", "usage_flush 100ms")
	says := func(what string) {
		t.Helper()
		eventually.True(t, "the status says what failed: "+what, func() bool { return strings.Contains(g.status().LastError, what) })
	}
	says("create canary")
	key := r.key("production", "memories:read")
	pgtest.Exec(t, r.database, `alter table rekall.usage rename to hidden`)
	g.ask(key)
	says("flush usage")
	limited := r.start(strings.Replace(standardSite, "rekall_gateway {", "rekall_gateway {\nrate_limits", 1), "rate_limit_store redis://127.0.0.1:1")
	eventually.True(t, "the status says why no limit is shared", func() bool { return strings.Contains(limited.status().LastError, "ask redis") })
}

func TestEveryEdgeMeasuresTheCanaryThatOneOfThemRevokes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	other := r.start(standardSite, "refresh 100ms") // first: the next canary is a minute away
	sender := r.start(standardSite, "refresh 100ms", "canary")
	for _, g := range []*gateway{sender, other} {
		eventually.Within(t, canaryPatience, "the canary is measured", func() bool {
			seconds := g.status().Canary
			return seconds > 0 && seconds < 60
		})
	}
	if seconds := other.series(t, "rekall_canary_revocation_seconds"); seconds <= 0 {
		t.Errorf("the metric says %v", seconds)
	}
	if stdout, _, _ := cli(t, r.database, "keys", "list", "--json"); strings.TrimSpace(stdout) != "[]" {
		t.Errorf("canaries are listed among the keys: %s", stdout)
	}
	if _, _, code := cli(t, r.database, "keys", "create", "--name", "n", "--scopes", "memories:read", "--environment", "sandbox",
		"--account", "rekall:canary"); code == 0 {
		t.Error("a user's key was made in the canaries' account")
	}
}

package monitoring

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/devenv/redistest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

const shipped = "../../cmd/rekall-gateway/deploy/monitoring/"

// hastened is the shipped rules for a test: they look at seconds where the shipped ones look at minutes, and two thresholds are
// such that a fault of seconds passes them.
func hastened(t *testing.T) string {
	t.Helper()
	rules := process.Read(t, shipped+"rules.yml")
	for _, change := range [][2]string{
		{`interval: 15s`, "interval: 500ms"},
		{`for: \S+`, "for: 2s"},
		{`\[[45]m\]`, "[5s]"},
		{`offset 4m`, "offset 5s"},
		{`\[5m:15s\]`, "[5s:500ms]"},
		{`le=~"30`, `le=~"1`},
		{`0\.5 \* (rekall_usage_buffer_size)`, "0.000003 * $1"}, // 1.5 keys
	} {
		pattern := regexp.MustCompile(change[0])
		if !pattern.MatchString(rules) {
			t.Fatalf("no rule has %s", pattern)
		}
		rules = pattern.ReplaceAllString(rules, change[1])
	}
	return rules
}

func alerts(t *testing.T) []string {
	t.Helper()
	var names []string
	for _, match := range regexp.MustCompile(`(?m)- alert: (\w+)$`).FindAllStringSubmatch(process.Read(t, shipped+"rules.yml"), -1) {
		names = append(names, match[1])
	}
	return names
}

// panels is the queries of the dashboard by the title of their panel, with its variables filled in.
func panels(t *testing.T) map[string][]string {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(process.Read(t, shipped+"dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	variables := strings.NewReplacer("$job", "rekall-gateway", "$instance", ".*", "$__rate_interval", "1m")
	queries := make(map[string][]string)
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			queries[panel.Title] = append(queries[panel.Title], variables.Replace(target.Expr))
		}
	}
	return queries
}

// TestDashboardNamesWhatItShows: the least of all edges is no figure of each, and a status has one name, that of edges list.
func TestDashboardNamesWhatItShows(t *testing.T) {
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal([]byte(process.Read(t, shipped+"dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	least := 0
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			if strings.HasPrefix(target.Expr, "min(") {
				least++
				if !strings.HasPrefix(panel.Title, "All edges ") && !strings.HasPrefix(target.LegendFormat, "least ") {
					t.Errorf("%s shows %s as %q", panel.Title, target.Expr, target.LegendFormat)
				}
			}
			if strings.Contains(target.Expr, `status="fail-closed"`) && panel.Title != "Fail-closed edges" {
				t.Errorf("%s shows %s", panel.Title, target.Expr)
			}
		}
	}
	if least == 0 {
		t.Error("no panel shows the least of all edges")
	}
}

func TestEveryQueryReturnsDataAndEachAlertFiresWhenItsFaultIsMade(t *testing.T) {
	server := pgtest.Server(t)
	redis := redistest.Server(t, devenv.RedisOptions{})
	r := newRig(t, server.URL())
	r.gateway = "rate_limits"
	g, other := r.start("canary\n\t\trate_limit_store "+redis.URL()), r.start("edge other")
	p := startPrometheus(t, hastened(t), g, other)

	good, revoked := r.key(), r.key()
	g.allowed(revoked)
	g.allowed(good)
	g.ask(apikey.Generate(apikey.Production))
	defer load(1, func() { g.ask(good.Key.Reveal()) })()
	// As one transaction: the revocation is two seconds old when it is committed.
	pgtest.Exec(t, r.database, `update rekall.api_keys set revoked_at = now() where id = '`+revoked.ID+`'; select pg_sleep(2)`)
	p.waitFiring("RekallRevocationSlow")

	for title, queries := range panels(t) {
		for _, query := range queries {
			eventually.True(t, title+" has data: "+query, func() bool { return hasNumber(p.query(query)) })
		}
	}
	eventually.True(t, "no alert fires while all is well", func() bool { return len(p.firing()) == 0 })
	fired := []string{"RekallRevocationSlow"}
	fault := func(alerts ...string) {
		t.Helper()
		for _, alert := range alerts {
			if p.firing()[alert] {
				t.Errorf("%s fired before its fault was made", alert)
			}
		}
		fired = append(fired, alerts...)
	}

	fault("RekallFileDescriptors") // which are few, for what it has open
	limit := func(soft string) {
		t.Helper()
		if output, err := exec.Command("prlimit", "--pid", strconv.Itoa(g.process.Pid()), "--nofile="+soft+":").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, output)
		}
	}
	limit(fmt.Sprint(p.query(`round(1.2 * process_open_fds{instance="` + g.metrics + `"})`)[0].Value[1]))
	p.waitFiring("RekallFileDescriptors")
	limit("4096")

	fault("RekallReloadRefused")
	text := process.Read(t, g.file)
	process.Write(t, g.file, strings.Replace(text, "max_staleness 5s", "max_staleness 1h", 1))
	if code := give(t, g); code != http.StatusBadRequest {
		t.Errorf("a configuration that contradicts a promise: %d", code)
	}
	p.waitFiring("RekallReloadRefused")
	process.Write(t, g.file, text)
	reload(t, g)

	fault("RekallUnknownKeys", "RekallEdgeDown", "RekallEdgeSilent")
	other.process.Kill(t)
	end := load(8, func() { g.ask(apikey.Generate(apikey.Production)) })
	p.waitFiring("RekallUnknownKeys", "RekallEdgeDown", "RekallEdgeSilent")
	end()

	fault("RekallEdgeRestarts")
	for starts := range 3 {
		other.run()
		eventually.True(t, "Prometheus has seen the start", func() bool {
			return len(p.query(fmt.Sprintf("changes(process_start_time_seconds[15m]) > %d", starts))) == 1
		})
		other.process.Kill(t)
	}
	p.waitFiring("RekallEdgeRestarts")

	fault("RekallCannotSign") // Postgres takes no signing key; the edge has no traffic, and nothing else tells of it
	other.run()
	pgtest.Exec(t, r.database, "alter table rekall.signing_keys rename to taken_away")
	process.Write(t, other.file, strings.Replace(process.Read(t, other.file), "rate_limits\n", "identity_token\n", 1))
	reload(t, other)
	p.waitFiring("RekallCannotSign")
	pgtest.Exec(t, r.database, "alter table rekall.taken_away rename to signing_keys")
	other.process.Kill(t)

	fault("RekallFilterMissing") // as in a database without keys
	other.database = pgtest.Migrated(t)
	other.run()
	p.waitFiring("RekallFilterMissing")
	other.process.Kill(t)
	other.database = r.database

	fault("RekallCannotReport") // of an edge that could before: a minute later it counts as one that cannot
	other.run()
	eventually.True(t, "the edge has counted the edges", func() bool { return strings.Contains(other.text(), "\nrekall_edges{") })
	pgtest.Exec(t, r.database, "alter table rekall.edges add constraint unwelcome check (name <> 'other') not valid")

	fault("RekallCannotManageKeys") // of nothing else is the audit a part
	pgtest.Exec(t, r.database, "alter table rekall.audit rename to taken_away")
	end = load(1, func() { g.get("/v1/api-keys/audit", good.Key.Reveal()) })
	p.waitFiring("RekallCannotManageKeys")
	end()
	pgtest.Exec(t, r.database, "alter table rekall.taken_away rename to audit")

	fault("RekallUpstreamUnavailable")
	if err := r.backend.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.waitFiring("RekallUpstreamUnavailable")
	r.startBackend(r.backend.Address())

	fault("RekallLimitsApart")
	redis.Kill()
	p.waitFiring("RekallLimitsApart")

	eventually.Within(t, 2*time.Minute, "its count says nothing any longer", func() bool { return !strings.Contains(other.text(), "\nrekall_edges{") })
	p.waitFiring("RekallCannotReport")
	pgtest.Exec(t, r.database, "alter table rekall.edges drop constraint unwelcome")
	other.process.Kill(t)

	fault("RekallSyncOld", "RekallFailClosed", "RekallUnavailable", "RekallUsageNotFlushed", "RekallUsageBuffer")
	second := r.key()
	g.allowed(second)
	server.Kill()
	g.allowed(second) // counted, and cannot be flushed
	p.waitFiring("RekallSyncOld", "RekallFailClosed", "RekallUnavailable", "RekallUsageNotFlushed", "RekallUsageBuffer")

	fault("RekallCanarySilent", "RekallChoreUndone") // as it is since Postgres is away; the shipped rules wait for longer
	p.rules(strings.NewReplacer("rekall_canary_timestamp_seconds > 300", "rekall_canary_timestamp_seconds > 1", "> 10800", "> 1").Replace(hastened(t)))
	p.process.Signal(t, syscall.SIGHUP)
	p.waitFiring("RekallCanarySilent", "RekallChoreUndone")

	fault("RekallNoEdges")
	p.configure()
	p.process.Signal(t, syscall.SIGHUP)
	p.waitFiring("RekallNoEdges")

	if got, want := slices.Sorted(slices.Values(fired)), slices.Sorted(slices.Values(alerts(t))); !slices.Equal(got, want) {
		t.Errorf("faults were made for %q, and there are alerts %q", got, want)
	}
}

// hasNumber reports whether there is a series with a number in the answer.
func hasNumber(samples []sample) bool {
	return slices.ContainsFunc(samples, func(s sample) bool { return s.Value[1] != "NaN" })
}

// TestAlertsFireInTime feeds the shipped rules, whose minutes no other test waits for, with series that a fault makes.
func TestAlertsFireInTime(t *testing.T) {
	promtool(t, "", "test", "rules", "testdata/rules_test.yml")
	tested := process.Read(t, "testdata/rules_test.yml")
	for _, alert := range alerts(t) {
		if !strings.Contains(tested, `{alertname="`+alert+`"}`) {
			t.Errorf("no test of %s", alert)
		}
	}
}

func TestEachAlertLinksToItsPageInTheRunbook(t *testing.T) {
	runbook, rules := process.Read(t, shipped+"RUNBOOK.md"), process.Read(t, shipped+"rules.yml")
	for _, alert := range alerts(t) {
		if !strings.Contains(runbook, "\n## "+alert+"\n\n**It means:** ") {
			t.Errorf("the runbook does not say what %s means", alert)
		}
		link := "runbook_url: https://github.com/rekall-ai/gateway/blob/main/cmd/rekall-gateway/deploy/monitoring/RUNBOOK.md#" + strings.ToLower(alert) + "\n"
		if strings.Count(rules, link) != 1 {
			t.Errorf("%s does not link to its page", alert)
		}
	}
}

func TestEachMetricIsNamedInADocument(t *testing.T) {
	documents := ""
	for _, page := range []string{shipped + "RUNBOOK.md", shipped + "rules.yml", shipped + "dashboard.json", "../../caddymodule/README.md", "../../CHANGELOG.md"} {
		documents += process.Read(t, page)
	}
	for _, name := range regexp.MustCompile(`"rekall_\w+"`).FindAllString(process.Read(t, "../../caddymodule/metrics.go"), -1) {
		if !regexp.MustCompile(strings.Trim(name, `"`) + `(_bucket)?\b`).MatchString(documents) {
			t.Errorf("no document names %s", name)
		}
	}
}

func TestRunbookSetsTheVariablesThatItsCommandsUse(t *testing.T) {
	runbook := process.Read(t, shipped+"RUNBOOK.md")
	for _, used := range regexp.MustCompile(`\$([A-Z_]+)`).FindAllStringSubmatch(runbook, -1) {
		if !regexp.MustCompile(`(?m)^(export )?` + used[1] + `=`).MatchString(runbook) {
			t.Errorf("%s is set nowhere", used[0])
		}
	}
}

func TestScrapeConfigurationsOfTheRunbookAreValid(t *testing.T) {
	configurations := regexp.MustCompile("(?s)\n```yaml\n(.*?)```\n").FindAllStringSubmatch(process.Read(t, shipped+"RUNBOOK.md"), -1)
	if len(configurations) != 2 {
		t.Fatalf("%d configurations of Prometheus", len(configurations))
	}
	kubernetes := regexp.MustCompile(`kubernetes_sd_configs:(\n {6,}.*)+`) // which Debian's Prometheus is built without
	for _, configuration := range configurations {
		dir, text := t.TempDir(), kubernetes.ReplaceAllString(configuration[1], "static_configs: [{targets: [pod]}]")
		process.Write(t, filepath.Join(dir, "rules.yml"), process.Read(t, shipped+"rules.yml"))
		process.Write(t, filepath.Join(dir, "prometheus.yml"), text)
		promtool(t, "", "check", "config", filepath.Join(dir, "prometheus.yml"))
	}
}

func TestMetricsFollowConventionsAndSurviveReloads(t *testing.T) {
	r := newRig(t, pgtest.URL(t))
	g := r.start("canary")
	key := r.key()
	for range 200 { // of which about one in 16 is timed
		g.allowed(key)
	}
	eventually.True(t, "usage is flushed", func() bool { return g.metric("rekall_usage_flushed_total") == 200 })
	before := g.counters()
	promtool(t, g.text(), "check", "metrics")

	reload(t, g)
	for name, value := range g.counters() {
		if value < before[name] {
			t.Errorf("%s fell from %v to %v", name, before[name], value)
		}
		delete(before, name)
	}
	if len(before) > 0 {
		t.Errorf("the reload lost %v", before)
	}
	allowed := `rekall_decisions_total{environment="production",outcome="allowed"}`
	g.allowed(key)
	if got := g.metric(allowed); got != 201 {
		t.Errorf("%v decisions after the reload, want 201", got)
	}
	if got := g.metric("rekall_decision_duration_seconds_count"); got == 0 || got > 100 {
		t.Errorf("%v of 201 decisions were timed", got)
	}
}

// TestCommandsOfTheRunbookWorkForAnAdministrator runs them as they stand there, but for the port and how old a transaction must be to be
// shown, as a user with the rights that the guide gives an administrator.
func TestCommandsOfTheRunbookWorkForAnAdministrator(t *testing.T) {
	r := newRig(t, pgtest.URL(t))
	g := r.start("")
	role := pgtest.Role(t, r.database)
	migrate := exec.Command(program, "migrate", "--database", r.database, "--admin-role", role)
	if output, err := migrate.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	administrator := pgtest.Login(t, r.database, role)
	for _, grant := range regexp.MustCompile(`grant \w+ to alice\b`).FindAllString(process.Read(t, shipped+"../README.md"), -1) {
		pgtest.Exec(t, r.database, strings.Replace(grant, "alice", userOf(t, administrator), 1))
	}
	held := regexp.MustCompile(fmt.Sprintf(`(?m)^ *%d \|.*idle in transaction`, holdTransaction(t, r.database)))
	blocks := regexp.MustCompile("(?s)\n```sh\n(.*?)```\n").FindAllStringSubmatch(process.Read(t, shipped+"RUNBOOK.md"), -1)
	if len(blocks) < len(alerts(t)) {
		t.Fatalf("%d blocks of commands", len(blocks))
	}
	names, shown := strings.NewReplacer("localhost:2019", g.admin, "10 seconds", "1 microsecond"), 0
	for _, block := range blocks {
		shell := exec.Command("bash", "-euo", "pipefail", "-c", names.Replace(block[1]))
		shell.Env = append(os.Environ(), "REKALL_DATABASE_URL="+administrator, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
		output, err := shell.CombinedOutput()
		if err != nil || len(output) == 0 {
			t.Errorf("%s: %v\n%s", block[1], err, output)
		}
		if strings.Contains(block[1], "xact_start") {
			shown++
			if !held.Match(output) {
				t.Errorf("%s: does not show the transaction that another user holds\n%s", block[1], output)
			}
		}
	}
	if shown < 3 {
		t.Errorf("%d blocks show transactions", shown)
	}
}

func userOf(t *testing.T, databaseURL string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	return u.User.Username()
}

// holdTransaction leaves a transaction open until the test ends, and returns the process in Postgres that holds it.
func holdTransaction(t *testing.T, databaseURL string) (pid int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	if _, err := conn.Exec(t.Context(), "begin"); err != nil {
		t.Fatal(err)
	}
	if err := conn.QueryRow(t.Context(), "select pg_backend_pid()").Scan(&pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// TestRunbookMigratesAsTheOwner: the URL that it has an administrator export may not.
func TestRunbookMigratesAsTheOwner(t *testing.T) {
	text := process.Read(t, shipped+"RUNBOOK.md")
	if n := strings.Count(text, "rekall-gateway migrate"); n != 1 || !strings.Contains(text, "\nrekall-gateway migrate --database \"$OWNER\" ") {
		t.Errorf("%d commands to migrate, want one, which all else links to", n)
	}
}

// TestRunbookTellsWhoSendsUnknownKeys: the journal has lines of systemd too, and the connection is the load balancer's. Keys that were
// revoked are no unknown ones, and requests without a key are not what the alert counts.
func TestRunbookTellsWhoSendsUnknownKeys(t *testing.T) {
	command := regexp.MustCompile(`(?s)\njournalctl [^|]*-o cat \|(.*?)\n` + "```").FindStringSubmatch(process.Read(t, shipped+"RUNBOOK.md"))
	if command == nil {
		t.Fatal("the runbook reads no access log")
	}
	shell := exec.Command("bash", "-euo", "pipefail", "-c", command[1])
	shell.Stdin = strings.NewReader(`Started rekall-gateway.service - Rekall API gateway.
7
{"level":"info","msg":"serving initial configuration"}
{"status":200,"request":{"remote_ip":"10.0.0.10","client_ip":"203.0.113.1"},"rekall":{"decision":"allowed"}}
{"status":401,"request":{"remote_ip":"10.0.0.10","client_ip":"203.0.113.2"},"rekall":{"decision":"revoked","reason":"API_KEY_REVOKED"}}
{"status":401,"request":{"remote_ip":"10.0.0.10","client_ip":"203.0.113.3"},"rekall":{"decision":"missing","reason":"API_KEY_MISSING"}}
{"status":401,"request":{"remote_ip":"10.0.0.10","client_ip":"203.0.113.7"},"rekall":{"decision":"unknown","reason":"API_KEY_INVALID"}}
{"status":401,"request":{"remote_ip":"10.0.0.10","client_ip":"203.0.113.7"},"rekall":{"decision":"malformed","reason":"API_KEY_INVALID"}}
{"status":401,"request":{"remote_ip":"10.0.0.10","client_ip":"203.0.113.7"},"rekall":{"reason":"API_KEY_INVALID"}}
`)
	if output, err := shell.CombinedOutput(); err != nil || strings.TrimSpace(string(output)) != "3 203.0.113.7" {
		t.Errorf("%v\n%s", err, output)
	}
}

func promtool(t *testing.T, input string, args ...string) {
	t.Helper()
	command := exec.Command("promtool", args...)
	command.Stdin = strings.NewReader(input)
	if output, err := command.CombinedOutput(); err != nil {
		t.Errorf("promtool %v: %v\n%s", args, err, output)
	}
}

func reload(t *testing.T, g *gateway) {
	t.Helper()
	if code := give(t, g); code != http.StatusOK {
		t.Fatalf("reload: %d", code)
	}
}

// give has the gateway reload its file, and returns the status of the answer.
func give(t *testing.T, g *gateway) int {
	t.Helper()
	req, err := http.NewRequest("POST", "http://"+g.admin+"/load", strings.NewReader(process.Read(t, g.file)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "text/caddyfile")
	req.Header.Set("Cache-Control", "must-revalidate") // though nothing has changed
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// text is the gateway's own metrics.
func (g *gateway) text() string {
	g.t.Helper()
	resp, err := client.Get("http://" + g.metrics + "/")
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	var own strings.Builder
	for line := range strings.Lines(string(all)) {
		if strings.HasPrefix(line, "rekall_") || strings.HasPrefix(line, "# HELP rekall_") || strings.HasPrefix(line, "# TYPE rekall_") {
			own.WriteString(line)
		}
	}
	return own.String()
}

// counters is all series that may not fall.
func (g *gateway) counters() map[string]float64 {
	g.t.Helper()
	counters := make(map[string]float64)
	for line := range strings.Lines(g.text()) {
		name, text, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || !regexp.MustCompile(`^rekall_\w+_(total|count|sum|bucket)(\{|$)`).MatchString(name) {
			continue
		}
		value, err := strconv.ParseFloat(text, 64)
		if err != nil {
			g.t.Fatal(err)
		}
		counters[name] = value
	}
	return counters
}

func (g *gateway) metric(name string) float64 {
	g.t.Helper()
	return g.counters()[name]
}

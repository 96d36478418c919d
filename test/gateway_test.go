package test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// scopeTable is REKALL.md's, written out again: request, and the scope that it needs.
var scopeTable = []struct{ method, path, scope string }{
	{"GET", "/v1/memories", "memories:read"},
	{"GET", "/v1/memories/mem_1", "memories:read"},
	{"POST", "/v1/memories/search", "memories:read"},
	{"POST", "/v1/memories", "memories:write"},
	{"PUT", "/v1/memories/mem_1", "memories:write"},
	{"DELETE", "/v1/memories/mem_1", "memories:delete"},
	{"GET", "/v1/entities", "entities:read"},
	{"GET", "/v1/entities/e1", "entities:read"},
	{"POST", "/v1/entities/search", "entities:read"},
	{"POST", "/v1/entities", "entities:write"},
	{"PUT", "/v1/entities/e1", "entities:write"},
	{"DELETE", "/v1/entities/e1", "entities:delete"},
	{"GET", "/v1/relationships", "relationships:read"},
	{"POST", "/v1/relationships", "relationships:write"},
	{"DELETE", "/v1/relationships/r1", "relationships:write"},
	{"GET", "/v1/workflows", "workflows:read"},
	{"GET", "/v1/workflows/w1", "workflows:read"},
	{"POST", "/v1/workflows", "workflows:write"},
	{"PUT", "/v1/workflows/w1", "workflows:write"},
	{"DELETE", "/v1/workflows/w1", "workflows:write"},
	{"POST", "/v1/workflows/w1/trigger", "workflows:write"},
	{"GET", "/v1/agents", "agents:read"},
	{"GET", "/v1/agents/a1", "agents:read"},
	{"POST", "/v1/agents/spawn", "agents:write"},
	{"PUT", "/v1/agents/a1", "agents:write"},
	{"DELETE", "/v1/agents/a1", "agents:write"},
	{"POST", "/v1/agents/a1/message", "agents:write"},
	{"GET", "/v1/hives", "hives:read"},
	{"GET", "/v1/hives/h1", "hives:read"},
	{"POST", "/v1/hives", "hives:write"},
	{"PUT", "/v1/hives/h1", "hives:write"},
	{"DELETE", "/v1/hives/h1", "hives:write"},
	{"POST", "/v1/hives/h1/members", "hives:write"},
	{"DELETE", "/v1/hives/h1/members/u1", "hives:write"},
}

func TestEveryEndpointTakesTheKeyWithItsScopeAndNoOther(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	with, without := map[string]http.Header{}, map[string]http.Header{}
	for _, scope := range apikey.ScopeNames() {
		with[scope] = bearer(r.key("production", scope))
		var others []string
		for _, other := range apikey.ScopeNames() {
			if other != scope {
				others = append(others, other)
			}
		}
		without[scope] = bearer(r.key("production", others...))
	}
	for _, row := range scopeTable {
		t.Run(row.method+" "+row.path, func(t *testing.T) {
			allowed := g.do(row.method, row.path, with[row.scope])
			if allowed.StatusCode != http.StatusOK {
				t.Errorf("with exactly %s: %d %s", row.scope, allowed.StatusCode, allowed.body)
			} else if e := allowed.echo(t); e.Method != row.method || e.Path != row.path || e.Backend != "production" {
				t.Errorf("the backend received %s %s at %s", e.Method, e.Path, e.Backend)
			}
			refused := g.do(row.method, row.path, without[row.scope])
			refused.wantCode(t, http.StatusForbidden, "SCOPE_INSUFFICIENT")
			if !strings.Contains(refused.body, `"required_scope":"`+row.scope+`"`) ||
				!strings.Contains(refused.Header.Get("Www-Authenticate"), `error="insufficient_scope", scope="`+row.scope+`"`) {
				t.Errorf("the answer does not name %s: %s %s", row.scope, refused.body, refused.Header.Get("Www-Authenticate"))
			}
			if row.method == http.MethodGet {
				if head := g.do(http.MethodHead, row.path, with[row.scope]); head.StatusCode != http.StatusOK {
					t.Errorf("HEAD: %d", head.StatusCode)
				}
				if head := g.do(http.MethodHead, row.path, without[row.scope]); head.StatusCode != http.StatusForbidden || head.body != "" {
					t.Errorf("HEAD without the scope: %d", head.StatusCode)
				}
			}
		})
	}
}

func TestPrefixDecidesTheEnvironmentInEachWayOfPassingAKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	for _, environment := range []string{"production", "sandbox"} {
		key := r.key(environment, "memories:read")
		secret := key.Key.Reveal()
		for way, do := range map[string]func() reply{
			"bearer":    func() reply { return g.do("GET", "/v1/memories?a=1&b=%20x", bearer(key)) },
			"x-api-key": func() reply { return g.do("GET", "/v1/memories?a=1&b=%20x", http.Header{"X-Api-Key": {secret}}) },
			"query":     func() reply { return g.do("GET", "/v1/memories?a=1&api_key="+secret+"&b=%20x", nil) },
			"all three": func() reply {
				return g.do("GET", "/v1/memories?api_key="+secret+"&a=1&b=%20x",
					http.Header{"X-Api-Key": {secret}, "Authorization": {"bearer  " + secret}})
			},
		} {
			t.Run(environment+" "+way, func(t *testing.T) {
				answer := do()
				e := answer.echo(t)
				if e.Backend != environment {
					t.Errorf("went to %s", e.Backend)
				}
				if e.Query != "a=1&b=%20x" {
					t.Errorf("query %q, want the other parameters byte for byte", e.Query)
				}
				for name, wanted := range map[string]string{
					"X-Rekall-Key-Id": key.ID, "X-Rekall-Account": "acme", "X-Rekall-Environment": environment,
					"X-Rekall-Scopes": "memories:read", "X-Request-Id": answer.Header.Get("X-Request-Id"),
				} {
					if got := e.Headers.Values(name); len(got) != 1 || got[0] != wanted {
						t.Errorf("the backend received %s %q, want %q", name, got, wanted)
					}
				}
				if strings.Contains(answer.body, secret) {
					t.Error("the backend received the key")
				}
			})
		}
	}
	if apikey.ContainsKey(g.log.String()) {
		t.Error("the log holds a key")
	}
}

func TestEveryRefusalHasItsCode(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	good, revoked, expired := r.key("production", "memories:read"), r.key("production", "memories:read"), r.key("production", "memories:read")
	sandbox := r.key("sandbox", "memories:read")
	r.revoke(revoked.ID)
	pgtest.Exec(t, r.database, "update rekall.api_keys set expires_at = now() where id = $1", expired.ID)
	g := r.start(standardSite) // which so knows of both
	unknown := apikey.Generate(apikey.Production)
	header := func(pairs ...string) http.Header {
		h := http.Header{}
		for i := 0; i < len(pairs); i += 2 {
			h[pairs[i]] = append(h[pairs[i]], pairs[i+1])
		}
		return h
	}
	for _, tc := range []struct {
		name, method, path string
		header             http.Header
		status             int
		code               string
	}{
		{"no key", "GET", "/v1/memories", nil, 401, "API_KEY_MISSING"},
		{"another scheme", "GET", "/v1/memories", header("Authorization", "Basic dTpw"), 401, "API_KEY_MISSING"},
		{"malformed", "GET", "/v1/memories", header("X-Api-Key", "rk_short"), 401, "API_KEY_INVALID"},
		{"not a key at all", "GET", "/v1/memories", header("Authorization", "Bearer hello"), 401, "API_KEY_INVALID"},
		{"unknown", "GET", "/v1/memories", header("X-Api-Key", unknown), 401, "API_KEY_INVALID"},
		{"revoked", "GET", "/v1/memories", bearer(revoked), 401, "API_KEY_REVOKED"},
		{"expired", "GET", "/v1/memories", bearer(expired), 401, "API_KEY_EXPIRED"},
		{"access token", "GET", "/v1/memories", header("Authorization", "Bearer rat_abc"), 401, "TOKEN_TYPE_UNSUPPORTED"},
		{"two keys", "GET", "/v1/memories", header("Authorization", "Bearer "+good.Key.Reveal(), "X-Api-Key", sandbox.Key.Reveal()), 400, "API_KEY_AMBIGUOUS"},
		{"two keys in one place", "GET", "/v1/memories", header("X-Api-Key", good.Key.Reveal(), "X-Api-Key", unknown), 400, "API_KEY_AMBIGUOUS"},
		{"key and token", "GET", "/v1/memories", header("Authorization", "Bearer rat_abc", "X-Api-Key", good.Key.Reveal()), 400, "API_KEY_AMBIGUOUS"},
		{"dots", "GET", "/v1/memories/../entities", bearer(good), 400, "PATH_INVALID"},
		{"encoded dots", "GET", "/v1/memories/%2e%2e/entities", bearer(good), 400, "PATH_INVALID"},
		{"double slash", "GET", "//v1/memories", bearer(good), 400, "PATH_INVALID"},
		{"encoded slash", "GET", "/v1/memories%2fx", bearer(good), 400, "PATH_INVALID"},
		{"needless escape", "GET", "/v1/%6demories", bearer(good), 400, "PATH_INVALID"},
		{"key in the path", "GET", "/v1/memories/" + unknown, bearer(good), 400, "PATH_INVALID"},
		{"path before key", "GET", "/v1/memories/../entities", nil, 400, "PATH_INVALID"},
		{"trailing slash", "GET", "/v1/memories/", bearer(good), 403, "ROUTE_NOT_COVERED"},
		{"other case", "GET", "/V1/Memories", bearer(good), 403, "ROUTE_NOT_COVERED"},
		{"not covered", "GET", "/v1/unheard-of", bearer(good), 403, "ROUTE_NOT_COVERED"},
		{"not covered method", "PATCH", "/v1/memories", bearer(good), 403, "ROUTE_NOT_COVERED"},
		{"lacks the scope", "POST", "/v1/memories", bearer(good), 403, "SCOPE_INSUFFICIENT"},
		{"lower-case method", "get", "/v1/memories", bearer(good), 405, "METHOD_NOT_ALLOWED"},
		{"trace", "TRACE", "/v1/memories", bearer(good), 405, "METHOD_NOT_ALLOWED"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := r.production.Requests() + r.sandbox.Requests()
			g.do(tc.method, tc.path, tc.header).wantCode(t, tc.status, tc.code)
			if r.production.Requests()+r.sandbox.Requests() != before {
				t.Error("a backend was contacted")
			}
		})
	}
	if apikey.ContainsKey(g.log.String()) {
		t.Error("the log holds a key")
	}
}

func TestSiteOfOneEnvironmentRefusesTheOther(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(strings.Replace(standardSite, `
		sandbox {
			reverse_proxy SANDBOX
		}`, "", 1))
	g.do("GET", "/v1/memories", bearer(r.key("sandbox", "memories:read"))).wantCode(t, 403, "SANDBOX_PRODUCTION_MISMATCH")
	g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))).wantCode(t, 200, "")
}

// TestRowOfTheOtherEnvironmentIsNotBelieved: the prefix of a key decides, whatever was written into its row.
func TestRowOfTheOtherEnvironmentIsNotBelieved(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(managedSite)
	for n, environment := range []apikey.Environment{apikey.Production, apikey.Sandbox} {
		secret, other := apikey.Generate(environment), map[apikey.Environment]string{apikey.Production: "sandbox", apikey.Sandbox: "production"}[environment]
		digest := apikey.Hash(secret)
		pgtest.Exec(t, r.database, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, manage_keys)
			values ($1, 'acme', 'n', $2, $3, array['memories:read'], true)`, fmt.Sprintf("key_%022d", n), other, digest[:])
		for _, path := range []string{"/v1/memories", keysPath} {
			g.do("GET", path, http.Header{"X-Api-Key": {secret}}).wantCode(t, 403, "SANDBOX_PRODUCTION_MISMATCH")
		}
	}
	if n := r.production.Requests() + r.sandbox.Requests(); n > 0 {
		t.Errorf("%d requests reached a backend", n)
	}
}

func TestUnreachableBackendIsSaidInTheEnvelopeAndCounted(t *testing.T) {
	t.Parallel()
	r, unreachable := newRig(t), process.FreeAddress(t)
	g := r.start(strings.NewReplacer("reverse_proxy PRODUCTION", "reverse_proxy "+unreachable,
		"reverse_proxy SANDBOX", "reverse_proxy SANDBOX {\n transport http {\n response_header_timeout 100ms\n }\n }").Replace(standardSite))
	g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))).wantCode(t, 502, "UPSTREAM_UNAVAILABLE")
	hang := bearer(r.key("sandbox", "memories:read"))
	hang.Set("X-Demo", "hang")
	g.do("GET", "/v1/memories", hang).wantCode(t, 504, "UPSTREAM_UNAVAILABLE")
	for labels, want := range map[string]float64{
		`environment="production",reason="unavailable"`: 1, `environment="production",reason="timeout"`: 0,
		`environment="sandbox",reason="unavailable"`: 0, `environment="sandbox",reason="timeout"`: 1,
	} {
		if got := g.series(t, "rekall_upstream_errors_total{"+labels+"}"); got != want {
			t.Errorf("%s: %v, want %v", labels, got, want)
		}
	}
	for environment, address := range map[string]string{"production": unreachable, "sandbox": r.sandbox.Address()} {
		line := regexp.MustCompile(`"upstream unavailable".*"environment":"` + environment + `","upstream":"` + address + `"`)
		eventually.True(t, "the log names the backend of "+environment, func() bool { return line.MatchString(g.log.String()) })
	}
}

// TestAnswerOfTheBackendComesUnchangedButForItsRequestID, also one that looks like a refusal of the gateway.
func TestAnswerOfTheBackendComesUnchangedButForItsRequestID(t *testing.T) {
	t.Parallel()
	const body, challenge = `{"error": {"code": "NOT_YOURS"}}` + "\n", `Basic realm="backend"`
	received := make(chan string, 1)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		received <- r.Header.Get("X-Request-Id")
		w.Header().Set("Content-Type", "application/problem+json")
		w.Header().Set("WWW-Authenticate", challenge)
		w.Header().Set("X-Request-Id", "the backend's")
		status, _ := strconv.Atoi(r.URL.Query().Get("status"))
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(backend.Close)
	r := newRig(t)
	g := r.start(strings.Replace(standardSite, "PRODUCTION", backend.Listener.Addr().String(), 1))
	key := bearer(r.key("production", "memories:read"))
	for _, status := range []int{200, 401, 403, 404, 429, 500, 502, 503} {
		answer := g.do("GET", "/v1/memories?status="+strconv.Itoa(status), key)
		h := answer.Header
		if answer.StatusCode != status || answer.body != body || h.Get("Www-Authenticate") != challenge || h.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%d: answer %d %v %s", status, answer.StatusCode, h, answer.body)
		}
		if id := <-received; !slices.Equal(h["X-Request-Id"], []string{id}) || !strings.HasPrefix(id, "req_") {
			t.Errorf("%d: the backend received X-Request-Id %q, the client %q", status, id, h["X-Request-Id"])
		}
	}
}

func TestClientsIdentityHeadersDoNotReachTheBackend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	h := bearer(r.key("production", "memories:read"))
	spoofed := []string{"X-Rekall-Key-Id", "X-Rekall-Account", "x-rekall-scopes", "X-Rekall-Anything", "X-Request-Id"}
	for _, name := range spoofed {
		h[name] = []string{"spoofed", "spoofed twice"}
	}
	h["X-Rekall-Version"] = []string{"2026-01-01"}
	h["X-Http-Method-Override"] = []string{"DELETE"}
	h["Connection"] = []string{"X-Rekall-Key-Id"}
	answer := g.do("GET", "/v1/memories", h)
	e := answer.echo(t)
	if strings.Contains(answer.body, "spoofed") || e.Headers.Get("X-Rekall-Key-Id") == "" || e.Headers.Get("X-Http-Method-Override") != "" {
		t.Errorf("the backend received %v", e.Headers)
	}
	if e.Headers.Get("X-Rekall-Version") != "2026-01-01" {
		t.Error("X-Rekall-Version did not reach the backend")
	}
}

func TestScopeLinesAddAndOverrideAndReportOnlyLetsPass(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	rules := "scope memories:read GET /v1/exports/*\n scope entities:read GET /v1/memories/:any"
	g := r.start(strings.Replace(standardSite, "rekall_gateway {", "rekall_gateway {\n"+rules, 1))
	key := bearer(r.key("production", "memories:read"))
	g.do("GET", "/v1/exports/2026/01", key).wantCode(t, 200, "")
	g.do("GET", "/v1/exports", key).wantCode(t, 403, "ROUTE_NOT_COVERED")
	g.do("GET", "/v1/memories/m1", key).wantCode(t, 403, "SCOPE_INSUFFICIENT")

	reporting := r.start(strings.Replace(standardSite, "rekall_gateway {", "rekall_gateway {\nscopes report_only", 1))
	reporting.do("DELETE", "/v1/memories/m1", key).wantCode(t, 200, "")
	reporting.do("GET", "/v1/unheard-of", key).wantCode(t, 200, "")
	reporting.do("GET", "/v1/memories", nil).wantCode(t, 401, "API_KEY_MISSING")
	if n := strings.Count(reporting.log.String(), "scope rules would refuse this request"); n != 2 {
		t.Errorf("reported %d times, want 2", n)
	}
	metrics := do(t, "GET", reporting.admin+"/metrics", nil, nil).body
	for _, line := range []string{
		`rekall_scope_report_only_total{outcome="scope_insufficient"} 1`, `rekall_scope_report_only_total{outcome="not_covered"} 1`,
		`rekall_decisions_total{environment="production",outcome="allowed"} 2`, `rekall_decisions_total{environment="none",outcome="missing"} 1`,
	} {
		if !strings.Contains(metrics, line) {
			t.Errorf("metrics lack %s", line)
		}
	}
}

func TestForwardCredentialPassesTheKeyOnAndLogsNone(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(strings.Replace(standardSite, "rekall_gateway {", "rekall_gateway {\nforward_credential", 1))
	key := r.key("production", "memories:read")
	e := g.do("GET", "/v1/memories?api_key="+key.Key.Reveal(), nil).echo(t)
	if got := e.Headers.Get("Authorization"); got != "Bearer "+key.Key.Reveal() || e.Query != "" {
		t.Error("the backend did not receive the key as a Bearer token, and only so")
	}
	if apikey.ContainsKey(g.log.String()) {
		t.Error("the log holds a key")
	}
}

func TestPlainHTTPIsRefusedAndNeverRedirected(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start("http://:PORT {\nbind 127.0.0.1\nlog\nrekall_tls_only\nredir https://example.com{uri}\n}\n")
	key := r.key("production", "memories:read").Key.Reveal()
	answer := g.do("GET", "/v1/memories?api_key="+key, http.Header{"X-Api-Key": {key}})
	answer.wantCode(t, http.StatusForbidden, "TLS_REQUIRED")
	if answer.Header.Get("Location") != "" {
		t.Error("redirected")
	}
	if kept := g.openOver(new(http.Transport), "GET", "/v1/memories", nil, nil); !kept.Close {
		t.Error("the connection is kept, and what comes next on it is in the clear as well")
	}
	if apikey.ContainsKey(g.log.String()) {
		t.Error("the log holds the key")
	}
}

func TestHTTP2OverTLSGetsTheSameAnswers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.startTLS(standardSite)
	answer := g.do("GET", "/v1/memories", bearer(r.key("sandbox", "memories:read")))
	if answer.ProtoMajor != 2 || answer.echo(t).Backend != "sandbox" {
		t.Errorf("HTTP/%d, %s", answer.ProtoMajor, answer.body)
	}
	g.do("GET", "/v1/memories", nil).wantCode(t, 401, "API_KEY_MISSING")
	if alt := answer.Header.Get("Alt-Svc"); alt != "" {
		t.Errorf("HTTP/3 is offered: %s", alt)
	}
}

func TestGarbageCollectorIsTunedUnlessTheOperatorTunedIt(t *testing.T) {
	r := newRig(t)
	for gogc, want := range map[string]func(percent int) bool{
		"":    func(percent int) bool { return percent > 200 && percent <= 800 },
		"77":  func(percent int) bool { return percent == 77 },
		"100": func(percent int) bool { return percent == 100 },
	} {
		t.Setenv("GOGC", gogc)
		g := r.start(standardSite)
		_, rest, _ := strings.Cut(do(t, "GET", g.admin+"/metrics", nil, nil).body, "\ngo_gc_gogc_percent ")
		value, _, _ := strings.Cut(rest, "\n")
		if percent, err := strconv.Atoi(value); err != nil || !want(percent) {
			t.Errorf("with GOGC=%q the collector runs at %q percent", gogc, value)
		}
	}
}

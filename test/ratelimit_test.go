package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

// heldSite holds keys to their limits.
var heldSite = strings.Replace(standardSite, "rekall_gateway {", "rekall_gateway {\n\t\trate_limits", 1)

// rateLimits are the headers of REKALL.md, "Rate limits".
var rateLimits = []string{"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-RateLimit-Policy"}

// limitAccount gives the rig's account a tier and limits of its own; 0 is what the tier says.
func (r *rig) limitAccount(tier string, perMinute, burst, concurrent int) {
	r.t.Helper()
	change := keyadmin.LimitsChange{PerMinute: &perMinute, Burst: &burst, Concurrent: &concurrent}
	if _, err := r.admin.SetAccountLimits(r.t.Context(), keyadmin.Operator("test"), "acme", tier, change); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) limitKey(key keyadmin.Key, change keyadmin.LimitsChange) {
	r.t.Helper()
	if _, err := r.admin.SetKeyLimits(r.t.Context(), keyadmin.Operator("test"), key.ID, change); err != nil {
		r.t.Fatal(err)
	}
}

func (g *gateway) get(key keyadmin.Key) reply {
	g.t.Helper()
	return g.do("GET", "/v1/memories", bearer(key))
}

// wantLimits demands that an answer tells the limit, each header once.
func wantLimits(t *testing.T, what string, h http.Header, perMinute int) {
	t.Helper()
	want := strconv.Itoa(perMinute)
	for _, name := range rateLimits {
		values := h.Values(name)
		if len(values) != 1 {
			t.Errorf("%s: %d times %s", what, len(values), name)
			return
		}
		switch value := values[0]; name {
		case "X-RateLimit-Limit":
			if value != want {
				t.Errorf("%s: limit %s, want %s", what, value, want)
			}
		case "X-RateLimit-Policy":
			if value != want+";w=60" {
				t.Errorf("%s: policy %s", what, value)
			}
		case "X-RateLimit-Remaining":
			if n, err := strconv.Atoi(value); err != nil || n < 0 || n > perMinute {
				t.Errorf("%s: remaining %s of %d", what, value, perMinute)
			}
		case "X-RateLimit-Reset":
			at, err := strconv.ParseInt(value, 10, 64)
			if in := time.Until(time.Unix(at, 0)); err != nil || in < -2*time.Minute || in > 5*time.Minute {
				t.Errorf("%s: reset %s, in %s", what, value, in)
			}
		}
	}
}

func TestLimitsFollowTierAccountAndKeyWhileTheGatewayRuns(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g, off := r.start(heldSite), r.start(standardSite)
	production, sandbox := r.key("production", "memories:read"), r.key("sandbox", "memories:read")
	shows := func(key keyadmin.Key, perMinute int) {
		t.Helper()
		eventually.True(t, "the key has its limit", func() bool { return g.get(key).Header.Get("X-RateLimit-Limit") == strconv.Itoa(perMinute) })
		wantLimits(t, key.Environment, g.get(key).Header, perMinute)
	}
	shows(production, 100)
	shows(sandbox, 50)
	lookups := g.status().Lookups

	r.limitAccount("team", 0, 0, 0)
	shows(production, 5000)
	r.limitAccount("team", 7000, 9000, 0)
	shows(production, 7000)
	seven := 777
	r.limitKey(production, keyadmin.LimitsChange{PerMinute: &seven})
	r.limitKey(sandbox, keyadmin.LimitsChange{PerMinute: &seven})
	shows(production, 777)
	shows(sandbox, 777)
	none, sixty := 0, 60
	r.limitKey(sandbox, keyadmin.LimitsChange{PerMinute: &none})
	if _, err := r.admin.SetTier(t.Context(), keyadmin.Operator("test"), "sandbox", keyadmin.LimitsChange{PerMinute: &sixty}); err != nil {
		t.Fatal(err)
	}
	shows(sandbox, 60)
	if n := g.status().Lookups; n != lookups {
		t.Errorf("%d lookups, want none: changes come with the feed", n-lookups)
	}
	r.limitAccount("enterprise", 0, 0, 0)
	r.limitKey(production, keyadmin.LimitsChange{PerMinute: &none})
	eventually.True(t, "an enterprise has no limit", func() bool { return g.get(production).Header.Get("X-RateLimit-Limit") == "" })

	for range 200 { // more than the tier sandbox lets through
		answer := off.get(sandbox)
		answer.wantCode(t, 200, "")
		for _, name := range rateLimits {
			if answer.Header.Get(name) != "" {
				t.Fatalf("%s without rate_limits", name)
			}
		}
	}
	if n := off.series(t, "rekall_rate_limit_keys"); n != 0 {
		t.Errorf("%v keys are counted without rate_limits", n)
	}
}

func TestEveryAnswerThatAKeyGotTellsItsLimits(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.limitAccount("pro", 1200, 1800, 100)
	// A backend that speaks of limits too, in each spelling.
	chatty := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["X-RateLimit-Limit"] = []string{"1", "2"}
		w.Header()["x-ratelimit-remaining"] = []string{"-5"}
		w.Header().Set("X-Ratelimit-Reset", "never")
		w.Header()["X-RATELIMIT-POLICY"] = []string{"mine"}
		w.WriteHeader(http.StatusNotFound)
	}))
	t.Cleanup(chatty.Close)
	socket := webSocketBackend(t, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) })
	site := strings.Replace(heldSite, "reverse_proxy PRODUCTION",
		"@failing path /v1/memories/failing\nerror @failing 410\n@chatty path /v1/memories/chatty\n@down path /v1/memories/down\n@socket header Upgrade *\nreverse_proxy @chatty "+
			strings.TrimPrefix(chatty.URL, "http://")+"\nreverse_proxy @down 127.0.0.1:1\nreverse_proxy @socket "+socket+"\nreverse_proxy PRODUCTION", 1)
	g := r.start(site)
	key, doomed := r.key("production", "memories:read"), r.key("production", "memories:read")
	for what, tc := range map[string]struct {
		method, path string
		status       int
	}{
		"allowed":                     {"GET", "/v1/memories", 200},
		"without the scope":           {"DELETE", "/v1/memories/1", 403},
		"that no scope covers":        {"GET", "/v1/nothing", 403},
		"of a backend that is down":   {"GET", "/v1/memories/down", 502},
		"of a backend with its own":   {"GET", "/v1/memories/chatty", 404},
		"of a handler that fails":     {"GET", "/v1/memories/failing", 410},
		"allowed, without its body":   {"HEAD", "/v1/memories", 200},
		"without the scope, and HEAD": {"HEAD", "/v1/hives", 403},
	} {
		answer := g.do(tc.method, tc.path, bearer(key))
		if answer.StatusCode != tc.status {
			t.Errorf("%s: %d, want %d", what, answer.StatusCode, tc.status)
		}
		wantLimits(t, what, answer.Header, 1200)
		if ids := answer.Header.Values("X-Request-Id"); len(ids) != 1 {
			t.Errorf("%s: request ids %q", what, ids)
		}
	}
	events := g.open("GET", "/v1/memories", demo(key, "sse"), nil)
	wantLimits(t, "stream", events.Header, 1200)
	_, _, upgraded := g.openWebSocket(bearer(key))
	if upgraded.StatusCode != http.StatusSwitchingProtocols {
		t.Errorf("WebSocket: %d", upgraded.StatusCode)
	}
	wantLimits(t, "WebSocket", upgraded.Header, 1200)

	waiting := async(t, "GET", g.http+"/v1/memories", demo(doomed, "hang"), nil)
	eventually.True(t, "it waits for its answer", func() bool { return r.production.Open() == 2 })
	r.revoke(doomed.ID)
	cut := waiting()
	cut.wantCode(t, 401, "API_KEY_REVOKED")
	wantLimits(t, "cut", cut.Header, 1200)

	unknown := g.do("GET", "/v1/memories", http.Header{"X-Api-Key": {apikey.Generate(apikey.Production)}})
	unknown.wantCode(t, 401, "API_KEY_INVALID")
	for _, name := range rateLimits {
		if unknown.Header.Get(name) != "" {
			t.Errorf("an unknown key gets %s", name)
		}
	}
}

func TestClientThatObeysRetryAfterNeverGetsTwo429InARow(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.limitAccount("free", 40, 11, 5) // one at once, and one more each 1.5 s: to wait for a second is not enough
	g := r.start(heldSite)
	key := r.key("production", "memories:read")
	limited, last := 0, 0
	for range 30 {
		answer := g.get(key)
		wantLimits(t, "answer", answer.Header, 40)
		if answer.StatusCode != http.StatusTooManyRequests {
			last = answer.StatusCode
			continue
		}
		answer.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
		if last == http.StatusTooManyRequests {
			t.Fatal("refused again after Retry-After")
		}
		last = http.StatusTooManyRequests
		var body struct {
			Error struct {
				Details struct {
					Limit     int   `json:"limit"`
					Remaining *int  `json:"remaining"`
					ResetAt   int64 `json:"reset_at"`
				} `json:"details"`
			} `json:"error"`
		}
		if err := json.Unmarshal([]byte(answer.body), &body); err != nil {
			t.Fatal(err)
		}
		d := body.Error.Details
		if d.Limit != 40 || d.Remaining == nil || *d.Remaining != 0 || strconv.FormatInt(d.ResetAt, 10) != answer.Header.Get("X-RateLimit-Reset") {
			t.Errorf("details %+v beside %v", d, answer.Header)
		}
		seconds, err := strconv.Atoi(answer.Header.Get("Retry-After"))
		if err != nil || seconds < 1 || seconds > 3 {
			t.Fatalf("Retry-After %q", answer.Header.Get("Retry-After"))
		}
		if limited++; limited == 3 {
			return
		}
		<-time.After(time.Duration(seconds) * time.Second)
	}
	t.Errorf("only %d of 30 requests were limited", limited)
}

func TestRemainingFallsByOneWithEachRequest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.limitAccount("free", 4, 301, 5) // 300 at once, and hardly more while the test runs
	g := r.start(heldSite)
	var err error
	for range 3 { // one more request is let through each 15 s, and it may come between the last ones
		if err = g.useUp(r.key("production", "memories:read")); err == nil {
			return
		}
	}
	t.Error(err)
}

// useUp asks with a key until it is limited, which the last answers must tell: Remaining is at most the limit, 4.
func (g *gateway) useUp(key keyadmin.Key) error {
	g.t.Helper()
	eventually.True(g.t, "the limit is known", func() bool { return g.get(key).Header.Get("X-RateLimit-Limit") == "4" })
	told := 4
	for range 400 {
		answer := g.get(key)
		remaining := answer.Header.Get("X-RateLimit-Remaining")
		switch left, err := strconv.Atoi(remaining); {
		case answer.StatusCode == http.StatusTooManyRequests && told > 0:
			return fmt.Errorf("limited when %d were said to remain", told)
		case answer.StatusCode == http.StatusTooManyRequests:
			answer.wantCode(g.t, 429, "RATE_LIMIT_EXCEEDED")
			return nil
		case err != nil || left != told-1 && (told < 4 || left != 4):
			return fmt.Errorf("remaining %q after %d", remaining, told)
		default:
			told = left
		}
	}
	return errors.New("400 requests were not limited")
}

func TestRequestsAtATimeAreCountedAndGivenBackOnEveryWayOut(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const most = 3
	r.limitAccount("pro", 100_000, 100_000, most)
	socket := webSocketBackend(t, func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)) }) // whichever side is tired of it
	breaking := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, 1000))
		_ = http.NewResponseController(w).Flush() // so that the proxy has begun its answer, which it can only break off too
		panic(http.ErrAbortHandler)
	}))
	t.Cleanup(breaking.Close)
	g := r.start(strings.Replace(heldSite, "reverse_proxy PRODUCTION", "@socket header Upgrade *\n@breaking path /v1/memories/breaking\nreverse_proxy @socket "+
		socket+"\nreverse_proxy @breaking "+strings.TrimPrefix(breaking.URL, "http://")+"\nreverse_proxy PRODUCTION", 1))
	// What is refused is tried again: the last place may not have been given back yet.
	stream := func(t *testing.T, key keyadmin.Key) (resp *http.Response) {
		eventually.True(t, "a place for a stream is free", func() bool {
			resp = g.open("GET", "/v1/memories", demo(key, "sse"), nil)
			return resp.StatusCode == http.StatusOK
		})
		return resp
	}
	webSocket := func(t *testing.T, key keyadmin.Key) (conn net.Conn) {
		eventually.True(t, "a place for a WebSocket is free", func() bool {
			var resp *http.Response
			conn, _, resp = g.openWebSocket(bearer(key))
			return resp.StatusCode == http.StatusSwitchingProtocols
		})
		return conn
	}
	var open []*http.Response // until their key ends
	for what, use := range map[string]func(t *testing.T, key keyadmin.Key) (end func()){
		"the client goes": func(t *testing.T, key keyadmin.Key) func() {
			resp := stream(t, key)
			return func() { _ = resp.Body.Close() }
		},
		"the client goes before the answer": func(t *testing.T, key keyadmin.Key) func() {
			ctx, cancel := context.WithCancel(t.Context())
			req, _ := http.NewRequestWithContext(ctx, "GET", g.http+"/v1/memories", nil)
			req.Header = demo(key, "hang")
			before := r.production.Requests()
			go func() {
				for ctx.Err() == nil {
					if resp, err := client.Transport.RoundTrip(req); err == nil {
						_ = resp.Body.Close()
					}
				}
			}()
			eventually.True(t, "it waits", func() bool { return r.production.Requests() > before })
			return cancel
		},
		"the key ends": func(t *testing.T, key keyadmin.Key) func() {
			open = append(open, stream(t, key))
			return func() { // and lives again, which a revoked key does not
				if open == nil {
					return // another change could reach the gateway when the next streams are open
				}
				pgtest.Exec(t, r.database, "update rekall.api_keys set expires_at = now() where id = $1", key.ID)
				for _, resp := range open {
					ends(t, resp)
				}
				open = nil
				pgtest.Exec(t, r.database, "update rekall.api_keys set expires_at = null where id = $1", key.ID)
			}
		},
		"the client closes the WebSocket": func(t *testing.T, key keyadmin.Key) func() {
			conn := webSocket(t, key)
			return func() { _ = conn.Close() }
		},
		"the backend closes the WebSocket": func(t *testing.T, key keyadmin.Key) func() {
			conn := webSocket(t, key)
			return func() { _, _ = conn.Write([]byte{0}) }
		},
	} {
		t.Run(what, func(t *testing.T) {
			key := r.key("production", "memories:read")
			for range 3 {
				var ends []func()
				for range most {
					ends = append(ends, use(t, key))
				}
				refused := g.get(key)
				refused.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
				if !strings.Contains(refused.body, "at the same time") || refused.Header.Get("Retry-After") == "" {
					t.Errorf("%s", refused.body)
				}
				for _, end := range ends {
					end()
				}
				eventually.True(t, "all are given back", func() bool { return g.get(key).StatusCode == http.StatusOK })
			}
		})
	}
	t.Run("the backend breaks off", func(t *testing.T) {
		key := r.key("production", "memories:read")
		for range 3 * most {
			if answer, err := send("GET", g.http+"/v1/memories/breaking", bearer(key), nil); err == nil {
				t.Errorf("the answer was not broken off: %d", answer.StatusCode)
			}
		}
		g.get(key).wantCode(t, 200, "")
	})
	t.Run("answered, or refused for its scope", func(t *testing.T) {
		key := r.key("production", "memories:read")
		for range 3 * most {
			g.get(key).wantCode(t, 200, "")
		}
		for range 3 * most {
			g.do("DELETE", "/v1/memories/1", bearer(key)).wantCode(t, 403, "SCOPE_INSUFFICIENT")
		}
		g.get(key).wantCode(t, 200, "")
	})
}

func TestRequestsBeyondALimitAreToldByReason(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.limitAccount("free", 4, 3, 1) // 2 at once
	file := filepath.Join(t.TempDir(), "access.log")
	site := strings.Replace(heldSite, "\tlog\n", "\tlog {\n\t\toutput file "+file+"\n\t}\n\tlog_append told {rekall.decision}\n", 1)
	site = strings.Replace(site, "rate_limits", "rate_limits\n\t\taddress_limit 1 1", 1)
	g := r.start(site, "usage_flush 200ms")
	key, busy := r.key("production", "memories:read"), r.key("production", "memories:read")
	g.get(key).wantCode(t, 200, "")
	g.get(key).wantCode(t, 200, "")
	limited := g.get(key)
	limited.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	g.do("DELETE", "/v1/memories/1", bearer(key)).wantCode(t, 429, "RATE_LIMIT_EXCEEDED") // whatever else it lacks
	g.open("GET", "/v1/memories", demo(busy, "sse"), nil)
	crowded := g.get(busy)
	crowded.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	guess := func() reply { return g.do("GET", "/v1/memories", http.Header{"X-Api-Key": {"rk_guess"}}) }
	guess().wantCode(t, 401, "API_KEY_INVALID")
	guessed := guess()
	guessed.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")

	for series, want := range map[string]float64{
		`rekall_decisions_total{environment="production",outcome="rate_limited"}`: 3,
		`rekall_decisions_total{environment="production",outcome="allowed"}`:      3,
		`rekall_rate_limited_total{limit="rate"}`:                                 2,
		`rekall_rate_limited_total{limit="concurrency"}`:                          1,
		`rekall_rate_limited_total{limit="address"}`:                              1,
		`rekall_rate_limit_keys`:                                                  2,
	} {
		if n := g.series(t, series); n != want {
			t.Errorf("%s is %v, want %v", series, n, want)
		}
	}
	eventually.True(t, "usage tells it", func() bool {
		used := r.usage(key)
		return used["allowed"] == 2 && used["rate_limited"] == 2 && len(used) == 2
	})
	for limit, answer := range map[string]reply{"rate": limited, "concurrency": crowded, "address": guessed} {
		id := answer.Header.Get("X-Request-Id")
		logged, user := logOf(t, file, id)
		want := map[string]string{
			"request_id": id, "environment": "production", "decision": "rate_limited", "limit": limit, "reason": "RATE_LIMIT_EXCEEDED",
			"key_id": user, "account": "acme",
		}
		if limit == "address" {
			want["environment"] = "none"
			delete(want, "key_id")
			delete(want, "account")
		}
		if diff := cmp.Diff(want, logged); diff != "" {
			t.Error(limit, diff)
		}
	}
	lines, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(lines), `"told":"rate_limited"`) {
		t.Error("other handlers are not told")
	}
}

// TestPasswordOfTheRateLimitStoreIsShownNowhere: the URL comes by a placeholder, as the database's does.
func TestPasswordOfTheRateLimitStoreIsShownNowhere(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	password := apikey.RandomText(24)
	for name, tc := range map[string]struct {
		url  string
		runs bool
	}{
		"no such port":   {"redis://gateway:" + password + "@127.0.0.1:port/0", false},
		"not Redis":      {"http://gateway:" + password + "@127.0.0.1/", false},
		"an @ too many":  {"redis://gateway:@" + password + "@127.0.0.1:1/0", true},
		"nobody answers": {"redis://gateway:" + password + "@127.0.0.1:1/0", true},
	} {
		t.Run(name, func(t *testing.T) {
			r := r.of(t)
			var hidden canaries
			hidden.add("password", password)
			g := r.prepare(heldSite, "rate_limit_store {env.REDIS_URL}")
			g.env = []string{"REDIS_URL=" + tc.url}
			g.run(r.database)
			if !tc.runs {
				<-g.process.Ended()
				if !strings.Contains(g.log.String(), "rate limit store's URL is not usable") {
					t.Errorf("the log does not say what is wrong:\n%s", g.log)
				}
				hidden.want(t, "log", g.log.String())
				return
			}
			g.waitReady()
			g.get(r.key("production", "memories:read")).wantCode(t, 200, "")
			eventually.True(t, "the log says so", func() bool { return strings.Contains(g.log.String(), "rate limit store does not answer") })
			for _, path := range []string{"/config/", "/rekall/status", "/metrics"} {
				hidden.want(t, path, do(t, "GET", g.admin+path, nil, nil).body)
			}
			g.process.Stop(g.t)
			hidden.want(t, "log", g.log.String())
		})
	}
}

func TestRateLimitStoreThatNothingUsesIsWarnedOf(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const warning = "rate_limit_store is not used: no rekall_gateway has rate_limits"
	for site, warned := range map[string]bool{standardSite: true, heldSite: false} {
		g := r.start(site, "rate_limit_store redis://127.0.0.1:1/0")
		eventually.True(t, "the gateway has started", func() bool { return strings.Contains(g.log.String(), "serving initial configuration") })
		if strings.Contains(g.log.String(), warning) != warned {
			t.Errorf("warned: %v, want %v, with\n%s", !warned, warned, site)
		}
	}
}

func TestKeysAreLimitedWhereTheyAreManagedToo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.limitAccount("free", 4, 13, 2) // 12 at once
	g := r.start(strings.Replace(managedSite, "rekall_gateway {", "rekall_gateway {\n\t\trate_limits", 1))
	busy := r.manager("acme")
	var limited, elsewhere reply
	for range 3 { // one more request is let through each 15 s, and it may be the next one
		key := r.manager("acme")
		eventually.True(t, "the key is limited", func() bool {
			limited = g.do("GET", keysPath, bearer(key))
			wantLimits(t, "managing", limited.Header, 4)
			return limited.StatusCode != http.StatusOK
		})
		if elsewhere = g.get(key); elsewhere.StatusCode != http.StatusOK {
			break
		}
	}
	elsewhere.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	limited.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	if limited.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	var said struct {
		Error struct {
			Details struct {
				Limit, Remaining int
				ResetAt          int64 `json:"reset_at"`
			}
		}
	}
	if err := json.Unmarshal([]byte(limited.body), &said); err != nil {
		t.Fatal(err)
	}
	if d := said.Error.Details; d.Limit != 4 || d.Remaining != 0 || strconv.FormatInt(d.ResetAt, 10) != limited.Header.Get("X-Ratelimit-Reset") {
		t.Errorf("details %+v beside %v", d, limited.Header)
	}

	for range 2 {
		g.open("GET", "/v1/memories", demo(busy, "sse"), nil)
	}
	crowded := g.do("GET", keysPath, bearer(busy))
	crowded.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	if !strings.Contains(crowded.body, "at the same time") {
		t.Errorf("%s", crowded.body)
	}
}

// TestOnlyAnswersGivenBeforeAKeyIsLookedAtTellAGoodKeyNoLimits, as the guide says.
func TestOnlyAnswersGivenBeforeAKeyIsLookedAtTellAGoodKeyNoLimits(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(strings.Replace(managedSite, "rekall_gateway {", "rekall_gateway {\n\t\trate_limits", 1))
	key := bearer(r.manager("acme"))
	for _, test := range []struct {
		request string
		status  int
		told    bool
	}{
		{"GET /v1/memories", 200, true},
		{"GET /v1/nothing", 403, true},
		{"GET " + keysPath, 200, true},
		{"GET " + keysPath + "/key_0000000000000000000000", 404, true},
		{"BREW /v1/memories", 405, false},
		{"GET /v1/memories//1", 400, false},
		{"PATCH " + keysPath, 405, false},
		{"GET " + keysPath + "/a/b/c", 404, false},
	} {
		method, path, _ := strings.Cut(test.request, " ")
		answer := g.do(method, path, key)
		for _, name := range rateLimits {
			if told := answer.Header.Get(name) != ""; answer.StatusCode != test.status || told != test.told {
				t.Errorf("%s: %d with %s: %t, want %d and %t", test.request, answer.StatusCode, name, told, test.status, test.told)
			}
		}
	}
}

package test

import (
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/test/eventually"
)

// series is the value of a series of the gateway's metrics: a name, with labels if it has any.
func (g *gateway) series(t *testing.T, name string) float64 {
	t.Helper()
	answer := do(t, "GET", g.admin+"/metrics", nil, nil)
	for line := range strings.Lines(answer.body) {
		if text, ok := strings.CutPrefix(line, name+" "); ok {
			value, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				t.Fatal(err)
			}
			return value
		}
	}
	t.Fatalf("the metrics (%d, %d bytes) have no %s", answer.StatusCode, len(answer.body), name)
	return 0
}

// TestRefusalTellsNothingOfAKey compares answers byte for byte: to keys that nobody has, of either environment, with and
// without a right checksum, with much and little of a good or a revoked key in them, and to what only looks like a key.
func TestRefusalTellsNothingOfAKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	good, revoked := r.key("production", "memories:read"), r.key("production", "memories:read")
	r.revoke(revoked.ID)
	lastChanged := func(key string) string {
		last := byte('0')
		if key[len(key)-1] == last {
			last = '1'
		}
		return key[:len(key)-1] + string(last)
	}
	changing := regexp.MustCompile(`req_[0-9A-Za-z]{20}|Date: [^\r]*`)
	wanted := ""
	for name, key := range map[string]string{
		"unknown":                   apikey.Generate(apikey.Production),
		"unknown, sandbox":          apikey.Generate(apikey.Sandbox),
		"a wrong checksum":          lastChanged(apikey.Generate(apikey.Production)),
		"47 of 48 of a good one":    lastChanged(good.Key.Reveal()),
		"47 of 48 of a revoked one": lastChanged(revoked.Key.Reveal()),
		"half of a good one":        good.Key.Reveal()[:24] + apikey.RandomText(24),
		"a dash":                    apikey.Generate(apikey.Production)[:47] + "-",
		"an underscore":             "rk_live_" + apikey.RandomText(40),
		"too short":                 good.Key.Reveal()[:47],
		"too long":                  good.Key.Reveal() + "0",
		"another case":              "RK_" + good.Key.Reveal()[3:],
	} {
		for way, request := range map[string]string{
			"bearer":    lines("GET /v1/memories HTTP/1.1", "Authorization: Bearer "+key),
			"x-api-key": lines("GET /v1/memories HTTP/1.1", "X-Api-Key: "+key),
			"query":     lines("GET /v1/memories?api_key=" + key + " HTTP/1.1"),
		} {
			answer, received := g.raw(request)
			answer.wantCode(t, http.StatusUnauthorized, "API_KEY_INVALID")
			received = changing.ReplaceAllString(received, "")
			if wanted == "" {
				wanted = received
			}
			if received != wanted {
				t.Errorf("%s, %s: the answer is\n%s\nand not\n%s", name, way, received, wanted)
			}
		}
	}
	if n := r.production.Requests() + r.sandbox.Requests(); n != 0 {
		t.Errorf("backends were contacted %d times", n)
	}
}

// TestEveryWrongKeyOfAFloodIsCountedAndFewAskPostgres guesses from one address, with keys that are all different.
func TestEveryWrongKeyOfAFloodIsCountedAndFewAskPostgres(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	good := r.key("production", "memories:read")
	eventually.True(t, "the filter is built", func() bool { return g.series(t, "rekall_filter_keys") > 0 })
	const guesses, guessers = 3000, 64
	outcomes := map[int]string{http.StatusUnauthorized: "unknown", http.StatusServiceUnavailable: "unavailable"}
	count := func(outcome string) int {
		return int(g.series(t, `rekall_decisions_total{environment="production",outcome="`+outcome+`"}`))
	}
	before := map[string]int{}
	for _, outcome := range outcomes {
		before[outcome] = count(outcome)
	}
	lookups, syncs, began := g.series(t, "rekall_lookups_total"), g.series(t, "rekall_syncs_total"), time.Now()
	var mu sync.Mutex
	answered := map[int]int{}
	flood := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: guessers}}
	defer flood.CloseIdleConnections()
	var guessing sync.WaitGroup
	for range guessers {
		guessing.Go(func() {
			for range guesses / guessers {
				req, err := http.NewRequest("GET", g.http+"/v1/memories", nil)
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Authorization", "Bearer "+apikey.Generate(apikey.Production))
				resp, err := flood.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				mu.Lock()
				answered[resp.StatusCode]++
				mu.Unlock()
			}
		})
	}
	guessing.Wait()
	total := 0
	for status, n := range answered {
		outcome, ok := outcomes[status]
		if !ok {
			t.Errorf("%d answers %d", n, status)
			continue
		}
		total += n
		if counted := count(outcome) - before[outcome]; counted != n {
			t.Errorf("%d answers %d, and the metrics count %d as %s", n, status, counted, outcome)
		}
	}
	if sent := guesses / guessers * guessers; total != sent {
		t.Errorf("%d guesses were refused of %d", total, sent)
	}
	lookups, syncs = g.series(t, "rekall_lookups_total")-lookups, g.series(t, "rekall_syncs_total")-syncs
	// Ten lookups a second. One sync proves the absence of all other keys that wait for it.
	if took := time.Since(began); lookups > 20+10*took.Seconds() || lookups+syncs > 50+50*took.Seconds() {
		t.Errorf("%d guesses took %g lookups and %g syncs in %s", total, lookups, syncs, took)
	}
	if n := r.production.Requests() + r.sandbox.Requests(); n != 0 {
		t.Errorf("backends were contacted %d times", n)
	}
	g.do("GET", "/v1/memories", bearer(good)).wantCode(t, http.StatusOK, "")
}

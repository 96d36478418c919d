package deploy

import (
	"bufio"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/test/process"
)

// TestEveryShippedProxyWaitsOnlySoLongForAnAnswerToBegin: a backend that takes connections and answers nothing is neither logged nor
// counted without.
func TestEveryShippedProxyWaitsOnlySoLongForAnAnswerToBegin(t *testing.T) {
	t.Parallel()
	for _, block := range slices.Concat(blocksOf(t, guide, "caddyfile"), []string{readManifest(t).caddyfile, process.Read(t, "../../Caddyfile.example")}) {
		file := filepath.Join(t.TempDir(), "Caddyfile")
		process.Write(t, file, block)
		config := adapted(t, file)
		proxies, timeouts := strings.Count(config, `"handler":"reverse_proxy"`), strings.Count(config, `"response_header_timeout":30000000000`)
		if proxies == 0 || proxies != timeouts {
			t.Errorf("%d proxies, %d of which have response_header_timeout:\n%s", proxies, timeouts, block)
		}
	}
}

// TestBackendThatHangsIsCountedAndTakenAwayAsTheExampleIsConfigured, and streams last longer than the time in which they must begin.
func TestBackendThatHangsIsCountedAndTakenAwayAsTheExampleIsConfigured(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	g := r.example(r.database, r.database)
	process.Write(t, g.file, substitute(t, process.Read(t, g.file), "response_header_timeout 30s", "response_header_timeout 200ms",
		"fail_duration 10s", "fail_duration 1h"))
	g.startReady()
	demo := func(behaviour, environment string) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), "GET", g.http+"/v1/memories", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+r.key(environment, "memories:read").Key.Reveal())
		req.Header.Set("X-Demo", behaviour)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp
	}
	events := bufio.NewScanner(demo("sse", "sandbox").Body)
	if resp := demo("hang", "production"); resp.StatusCode != http.StatusGatewayTimeout {
		t.Errorf("a backend that hangs is answered %d", resp.StatusCode)
	}
	const counted = `rekall_upstream_errors_total{environment="production",reason="timeout"} 1`
	if metrics, err := ask("GET", g.admin+"/metrics", ""); err != nil || !strings.Contains(metrics.body, counted) {
		t.Errorf("no %s: %v", counted, err)
	}
	g.want(http.StatusBadGateway, "UPSTREAM_UNAVAILABLE", "GET", r.key("production", "memories:read").Key.Reveal())
	if asked := r.production.Requests(); asked != 1 {
		t.Errorf("the backend that hangs was asked %d times", asked)
	}
	for range 20 { // lines: two for each 50 ms
		if !events.Scan() {
			t.Fatalf("the stream ended: %v", events.Err())
		}
	}
}

package test

import (
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/network"
)

// usage returns all that is counted of a key, by outcome.
func (r *rig) usage(key keyadmin.Key) map[string]int64 {
	r.t.Helper()
	used, err := r.admin.Usage(r.t.Context(), keyadmin.Operator("test"), key.ID, "", "")
	if err != nil {
		r.t.Fatal(err)
	}
	return outcomes(used)
}

func outcomes(used keyadmin.Usage) map[string]int64 {
	sum := map[string]int64{}
	if used.Total.Allowed > 0 {
		sum["allowed"] = used.Total.Allowed
	}
	maps.Copy(sum, used.Total.DeniedByReason)
	return sum
}

// outcomeOf says which count a request ends up in, by its answer.
var outcomeOf = map[string]string{
	"": "allowed", "SCOPE_INSUFFICIENT": "scope_insufficient", "ROUTE_NOT_COVERED": "not_covered", "API_KEY_REVOKED": "revoked",
}

// clients count the answers they get.
type clients struct {
	t       *testing.T
	key     map[keyadmin.Secret]*sync.Map // outcome to *atomic.Int64, by key
	stopped atomic.Bool
	wg      sync.WaitGroup
	broken  atomic.Int64
}

func newClients(t *testing.T, keys ...keyadmin.Key) *clients {
	l := &clients{t: t, key: map[keyadmin.Secret]*sync.Map{}}
	for _, key := range keys {
		l.key[key.Key] = new(sync.Map)
	}
	return l
}

// client sends requests to an edge until the load ends. paused holds it back between two requests.
func (l *clients) client(g *gateway, paused *sync.RWMutex, keys ...keyadmin.Key) {
	requests := []struct{ method, path string }{{"GET", "/v1/memories"}, {"DELETE", "/v1/memories/1"}, {"GET", "/v1/nothing"}}
	l.wg.Go(func() {
		for i := 0; !l.stopped.Load(); i++ {
			key, request := keys[i%len(keys)], requests[i%len(requests)]
			paused.RLock()
			answer, err := send(request.method, g.http+request.path, bearer(key), nil)
			paused.RUnlock()
			if err != nil { // it was in the queue of a listener that a reload closed: nobody has seen it
				l.broken.Add(1)
				continue
			}
			code := answer.code(l.t)
			outcome, ok := outcomeOf[code]
			switch {
			case ok:
				n, _ := l.key[key.Key].LoadOrStore(outcome, new(atomic.Int64))
				n.(*atomic.Int64).Add(1)
			case code != "AUTH_UNAVAILABLE": // nobody could tell whose request it was
				l.t.Errorf("answer %d %s", answer.StatusCode, code)
			}
		}
	})
}

func (l *clients) count(key keyadmin.Key) map[string]int64 {
	sum := map[string]int64{}
	l.key[key.Key].Range(func(outcome, n any) bool {
		sum[outcome.(string)] = n.(*atomic.Int64).Load()
		return true
	})
	return sum
}

// total returns how many requests are counted, as a measure of progress.
func (l *clients) total() (n int64) {
	for _, counts := range l.key {
		counts.Range(func(_, count any) bool {
			n += count.(*atomic.Int64).Load()
			return true
		})
	}
	return n
}

func (l *clients) goOn(requests int64) {
	l.t.Helper()
	until := l.total() + requests
	eventually.True(l.t, "more requests are answered", func() bool { return l.total() >= until })
}

// TestUsageAddsUpExactly: two edges and one Postgres, with reloads, a restart, lost connections and outages under load. One edge
// flushes all the time, the other only when it must.
func TestUsageAddsUpExactlyOverReloadsARestartAndAnOutage(t *testing.T) {
	t.Parallel()
	server := pgtest.Server(t)
	r := newRigOn(t, server.URL())
	keys := []keyadmin.Key{r.key("production", "memories:read"), r.key("sandbox", "memories:read"), r.key("production", "memories:read")}
	throughNetwork := *r
	var wire *network.Link
	wire, throughNetwork.database = network.To(t, r.database)
	north := throughNetwork.start(standardSite, "edge north", "usage_flush 200ms")
	south := r.start(standardSite, "edge south", "usage_flush 1m")

	l := newClients(t, keys...)
	var northPause, southPause sync.RWMutex
	l.client(north, &northPause, keys...)
	l.client(north, &northPause, keys...)
	l.client(south, &southPause, keys...)
	l.client(south, &southPause, keys...)
	l.goOn(50)

	for range 10 { // also after Postgres has committed and before it has said so
		wire.Drop()
		l.goOn(5)
	}
	north.reload()
	south.reload()
	l.goOn(50)
	south.rewrite(t, "usage_flush 1m", "usage_flush 2m") // whatever ran until now is drained
	south.reload()
	r.revoke(keys[2].ID)
	l.goOn(50)

	server.Pause()
	l.goOn(20)
	server.Resume()
	l.goOn(20)
	server.Kill()
	l.goOn(20)
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.goOn(50)

	southPause.Lock() // its clients would only find nobody there
	south.process.Stop(t)
	south.run(r.database)
	south.waitReady()
	southPause.Unlock()
	l.goOn(50)

	l.stopped.Store(true)
	l.wg.Wait()
	north.process.Stop(t)
	south.process.Stop(t)
	t.Logf("%d requests, %d connections broke", l.total(), l.broken.Load())
	eventually.True(t, "the connection that the restart broke is replaced", func() bool {
		_, err := r.admin.Get(t.Context(), keyadmin.Operator("test"), keys[0].ID)
		return err == nil
	})
	for _, key := range keys {
		got := r.usage(key)
		delete(got, "unavailable")
		if diff := cmp.Diff(l.count(key), got); diff != "" {
			t.Errorf("clients counted -, Postgres +:\n%s", diff)
		}
	}
}

// rewrite changes the gateway's Caddyfile.
func (g *gateway) rewrite(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(g.file)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.ReplaceAll(string(text), from, to)
	if changed == string(text) {
		t.Fatalf("%q is not in the Caddyfile", from)
	}
	if err := os.WriteFile(g.file, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestStopWhileAnOldConfigurationIsDrainingLosesNoUse(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite, "usage_flush 1m")
	key := r.key("production", "memories:read")
	const requests = 20
	ask := func() {
		for range requests {
			var answer reply
			eventually.True(t, "a request is answered", func() bool { // a reload closes connections in its queue
				var err error
				answer, err = send("GET", g.http+"/v1/memories", bearer(key), nil)
				return err == nil
			})
			answer.wantCode(t, 200, "")
		}
	}
	ask()
	// A first use is flushed at once. What follows is not, for a minute.
	eventually.True(t, "the first use is flushed", func() bool { return r.usage(key)["allowed"] > 0 })
	ask()
	stream := g.open("GET", "/v1/memories", demo(key, "sse"), nil) // keeps the old configuration
	g.rewrite(t, "usage_flush 1m", "usage_flush 2m")
	g.reload()
	ask()
	g.process.Stop(g.t)
	_ = stream.Body.Close()
	if got := r.usage(key)["allowed"]; got != 3*requests+1 {
		t.Errorf("%d of %d uses are counted", got, 3*requests+1)
	}
}

func TestReloadFlushesWhatIsCounted(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite, "usage_flush 5m")
	key := r.key("production", "memories:read")
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	eventually.True(t, "the first use is flushed", func() bool { return r.usage(key)["allowed"] == 1 })
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	g.reload()
	eventually.True(t, "the second is flushed by the reload", func() bool { return r.usage(key)["allowed"] == 2 })
}

func TestKilledGatewayLosesNoMoreThanItHadNotFlushed(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite, "usage_flush 100ms")
	key := r.key("production", "memories:read")
	ask := func(requests int) {
		for range requests {
			g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
		}
	}
	ask(20)
	eventually.True(t, "they are flushed", func() bool { return r.usage(key)["allowed"] == 20 })
	ask(10)
	g.process.Kill(t)
	if got := r.usage(key)["allowed"]; got < 20 || got > 30 {
		t.Errorf("%d uses are counted, want 20 to 30", got)
	}
}

func TestUsageIsShownFromTheCommandLineAndInMetrics(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite, "usage_flush 100ms")
	key := r.key("production", "memories:read")
	for range 3 {
		g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	}
	g.do("DELETE", "/v1/memories/1", bearer(key)).wantCode(t, 403, "SCOPE_INSUFFICIENT")
	var used keyadmin.Usage
	eventually.True(t, "all requests are counted", func() bool {
		stdout, stderr, code := cli(t, r.database, "keys", "usage", key.ID, "--json")
		if code != 0 {
			t.Fatal(stderr)
		}
		used = keyadmin.Usage{}
		if err := json.Unmarshal([]byte(stdout), &used); err != nil {
			t.Fatal(err)
		}
		return used.Total.Allowed == 3 && used.Total.DeniedByReason["scope_insufficient"] == 1
	})
	if len(used.Hourly) == 0 || len(used.Daily) == 0 || used.LastUsedAt == nil || used.Total.Denied != 1 {
		t.Errorf("usage %+v", used)
	}
	for _, args := range [][]string{{"keys", "usage", key.ID}, {"keys", "usage", key.ID, "--hourly", "--last", "2h"}} {
		stdout, stderr, code := cli(t, r.database, args...)
		if code != 0 || !strings.Contains(stdout, "scope_insufficient=1") || !strings.Contains(stdout, "total") {
			t.Errorf("%v: %d %s %s", args, code, stdout, stderr)
		}
	}
	if _, _, code := cli(t, r.database, "keys", "usage", "key_0000000000000000000000"); code != 3 {
		t.Errorf("an unknown key: exit code %d", code)
	}
	if _, stderr, code := cli(t, r.database, "keys", "usage", key.ID, "--last", "5y"); code != 1 || !strings.Contains(stderr, "--last") {
		t.Errorf("a bad range: %d %s", code, stderr)
	}
	resp := do(t, "GET", g.admin+"/metrics", nil, nil)
	if resp.StatusCode != http.StatusOK {
		t.Fatal(resp.StatusCode)
	}
	for _, line := range []string{"rekall_usage_buffered 0", "rekall_usage_flushed_total 4", "rekall_usage_flush_errors_total 0",
		"rekall_usage_dropped_total 0", "rekall_usage_spikes_total 0"} {
		if !strings.Contains(resp.body, line+"\n") {
			t.Errorf("the metrics lack %q", line)
		}
	}
}

func TestLastHoursOfUsageAreThoseOfPostgresClock(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := r.key("production", "memories:read")
	pgtest.Exec(t, r.database, "create schema slow") // that is searched before Postgres's own
	pgtest.Exec(t, r.database, "create function slow.now() returns timestamptz language sql as $$ select pg_catalog.now() - interval '2 days' $$")
	slow, err := url.Parse(r.database)
	if err != nil {
		t.Fatal(err)
	}
	query := slow.Query()
	query.Set("search_path", "slow,pg_catalog,public")
	slow.RawQuery = query.Encode()
	stdout, stderr, code := cli(t, slow.String(), "keys", "usage", key.ID, "--last", "3h", "--json")
	if code != 0 {
		t.Fatal(stderr)
	}
	var used keyadmin.Usage
	if err := json.Unmarshal([]byte(stdout), &used); err != nil {
		t.Fatal(err)
	}
	if length := used.To.Sub(used.From); length < 3*time.Hour || length >= 4*time.Hour {
		t.Errorf("from %s to %s, want 3 hours, from the beginning of the first on", used.From, used.To)
	}
}

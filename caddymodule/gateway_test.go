package caddymodule

import (
	"context"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/garbage"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/internal/scoperule"
	"github.com/rekall-ai/gateway/internal/usage"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// newGateway returns a gateway on a real database, with a handler that answers 204 in place of a proxy, and a key that is
// in its cache.
func newGateway(t testing.TB) (*Gateway, string) {
	t.Helper()
	url := pgtest.Migrated(t)
	// Limits that no benchmark reaches, for those with limits.
	pgtest.Exec(t, url, `
		insert into rekall.account_limits (account, requests_per_minute, burst, concurrent_requests) values ('a', 1000000, 10000000, 1000000)`)
	store := pgtest.Store(t, url)
	key, _, err := keyadmin.New(store).Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "n", Account: "a", Environment: "production", Scopes: []string{"memories:read"},
	})
	if err != nil {
		t.Fatal(err)
	}
	cache, err := keycache.New(store, keycache.Config{
		Size: 1000, Refresh: time.Second, MaxStaleness: 30 * time.Second, NoListen: true, Logger: zap.NewNop,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		cache.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		cache.Close()
	})
	rules, err := scoperule.New(scoperule.Builtin()...)
	if err != nil {
		t.Fatal(err)
	}
	counter := usage.New(store, usage.Config{})
	g := &Gateway{draining: new(atomic.Bool), rules: rules, cache: cache, metrics: newMetrics(), upstreams: new(upstreams), usage: counter,
		logger: zap.NewNop(), production: block{chain: passing{}}}
	secret := key.Key.Reveal()
	deadline := time.Now().Add(10 * time.Second)
	for before := uint64(0); ; { // until it is answered from memory
		if w := g.serve(t, bearerRequest(secret)); w.Code != http.StatusNoContent {
			t.Fatal(w.Code, w.Body)
		}
		now := cache.Status().Lookups
		if now == before {
			return g, secret
		}
		if before = now; time.Now().After(deadline) {
			t.Fatal("the key does not stay in the cache")
		}
	}
}

// passing stands for the proxy.
type passing struct{}

func (passing) ServeHTTP(w http.ResponseWriter, _ *http.Request) error {
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// request is one as Caddy hands it to a handler: past the door, with a replacer.
func request(secret string, place func(*http.Request)) *http.Request {
	r := httptest.NewRequest("GET", "/v1/memories", nil)
	place(r)
	r = r.WithContext(context.WithValue(r.Context(), caddy.ReplacerCtxKey, caddy.NewReplacer()))
	return credential.AtDoor(r)
}

func bearerRequest(secret string) *http.Request {
	return request(secret, func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+secret) })
}

func (g *Gateway) serve(t testing.TB, r *http.Request) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	if err := g.ServeHTTP(w, r, nil); err != nil {
		t.Fatal(err)
	}
	return w
}

// decideOn is the way from a credential to the decision. The door parses and hashes; in between stands Caddy.
func (g *Gateway) decideOn(x *exchange, r *http.Request, secret string) apikey.Outcome {
	if _, err := apikey.Parse(secret); err != nil {
		return apikey.Malformed
	}
	cred, path := credential.Take(r), r.URL.EscapedPath()
	cred.Digest = apikey.Hash(secret)
	if outcome := parse(r, path, &cred); outcome != apikey.Allowed {
		return outcome
	}
	found, err := g.cache.Find(r.Context(), cred.Digest)
	if err != nil {
		return apikey.Unavailable
	}
	x.record = found.Record
	return g.decide(x, r.Method, path, found)
}

func TestDecisionOnAKnownKeyAllocatesNothing(t *testing.T) {
	g, secret := newGateway(t)
	r := bearerRequest(secret)
	x := &exchange{gateway: g, environment: apikey.Production}
	allocations := testing.AllocsPerRun(200, func() {
		if outcome := g.decideOn(x, r, secret); outcome != apikey.Allowed {
			t.Fatal(outcome)
		}
	})
	if allocations > 0 {
		t.Errorf("%.0f allocations, want none", allocations)
	}
}

func TestHandlerAllocatesNoMoreThanItsBudget(t *testing.T) {
	g, secret := newGateway(t)
	for name, budget := range map[string]float64{
		// The context that carries the key past the door, exchange, request id, placeholders, forwarded request, and the channel that
		// the server's context has for whoever waits for it, the proxy if not us.
		"bearer": 6, "x-api-key": 6,
		// And the key, and the query without it, twice: in the URL and in the request's target.
		"query": 9,
		// All but the last two; then the answer's.
		"refused": 4 + allocationsOfAnAnswer(),
	} {
		if allocations := g.allocations(t, kindsOfTraffic(secret)[name]); allocations > budget {
			t.Errorf("%s: %.0f allocations, want at most %.0f", name, allocations, budget)
		}
	}
	if n := allocationsOfAnAnswer(); n > 3 { // body, its length and the header values
		t.Errorf("%.0f allocations of an answer, want at most 3", n)
	}
}

func TestExchangeFitsIntoASmallAllocation(t *testing.T) {
	if size := unsafe.Sizeof(exchange{}); size > 512 { // runtime/malloc.go, minSizeForMallocHeader
		t.Errorf("%d bytes, want at most 512", size)
	}
}

// allocationsOfAnAnswer is what writing a refusal allocates.
func allocationsOfAnAnswer() float64 {
	w := nullWriter{make(http.Header)}
	return testing.AllocsPerRun(200, func() {
		clear(w.header)
		apierror.Of(apikey.Unknown).Write(w, "req_0123456789ABCDEFGHIJ")
	})
}

// TestLimitsCostTheirHeadersAndNothingElse: one piece of memory for all four.
func TestLimitsCostTheirHeadersAndNothingElse(t *testing.T) {
	g, secret := newGateway(t)
	traffic := kindsOfTraffic(secret)["bearer"]
	without := g.allocations(t, traffic)
	g.limiter = ratelimit.New()
	if with := g.allocations(t, traffic); with > without+1 {
		t.Errorf("%.0f allocations with limits and %.0f without", with, without)
	}
}

// TestAccessLogCostsOnlyThoseWhoKeepOne: what stands in a line is put together when the line is written.
func TestAccessLogCostsOnlyThoseWhoKeepOne(t *testing.T) {
	g, secret := newGateway(t)
	traffic := kindsOfTraffic(secret)["bearer"]
	without := g.allocations(t, traffic)
	g.accessLog = true
	// The field's place in Caddy's list, and two for the list's own cache of loggers, which Caddy clears with each field.
	if with := g.allocations(t, traffic); with <= without || with > without+3 {
		t.Errorf("%.0f allocations with an access log and %.0f without", with, without)
	}
}

// allocations is what the door and the handler allocate for one request.
func (g *Gateway) allocations(t testing.TB, traffic *traffic) float64 {
	t.Helper()
	traffic.refill()
	entrance := g.entrance(t)
	return testing.AllocsPerRun(len(traffic.requests)-1, func() {
		clear(traffic.writer.header)
		entrance.ServeHTTP(traffic.writer, traffic.next())
	})
}

// entrance is the door with the gateway right behind it.
func (g *Gateway) entrance(t testing.TB) door {
	return door{next: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := g.ServeHTTP(w, r, nil); err != nil {
			t.Error(err)
		}
	})}
}

func TestClientsKeepNoConnectionWhileTheServerDrains(t *testing.T) {
	g, secret := newGateway(t)
	upgrade := bearerRequest(secret)
	upgrade.Header.Set("Connection", "Upgrade")
	upgrade.Header.Set("Upgrade", "websocket")
	for _, draining := range []bool{false, true} {
		g.draining.Store(draining)
		want := map[bool]string{true: "close"}[draining]
		for _, secret := range []string{secret, apikey.Generate(apikey.Production)} {
			if got := g.serve(t, bearerRequest(secret)).Header().Get("Connection"); got != want {
				t.Errorf("draining %v: Connection %q, want %q", draining, got, want)
			}
		}
		if got := g.serve(t, upgrade.Clone(upgrade.Context())).Header().Get("Connection"); got != "" { // the proxy's to say
			t.Errorf("draining %v: Connection %q to an upgrade", draining, got)
		}
	}
}

// BenchmarkDecision is the way from a credential to the decision. One refusal a second waits for the proof that there is no such key.
func BenchmarkDecision(b *testing.B) {
	g, secret := newGateway(b)
	for _, kind := range []struct {
		name, secret string
		outcome      apikey.Outcome
	}{{"allowed", secret, apikey.Allowed}, {"refused", apikey.Generate(apikey.Production), apikey.Unknown}} {
		b.Run(kind.name, func(b *testing.B) {
			r := bearerRequest(kind.secret)
			x := &exchange{gateway: g, environment: apikey.Production}
			b.ReportAllocs()
			for b.Loop() {
				if outcome := g.decideOn(x, r, kind.secret); outcome != kind.outcome {
					b.Fatal(outcome)
				}
			}
		})
	}
}

// traffic is requests as net/http and Caddy hand them on, prepared ahead so that only the gateway is measured.
type traffic struct {
	prepare  func(*http.Request)
	target   string
	requests [256]*http.Request
	used     int
	writer   nullWriter
}

func newTraffic(target string, prepare func(*http.Request)) *traffic {
	return &traffic{prepare: prepare, target: target, used: len(traffic{}.requests), writer: nullWriter{make(http.Header)}}
}

func (t *traffic) refill() {
	for i := range t.requests {
		t.requests[i] = t.request()
	}
	t.used = 0
}

// request is one with a client's usual headers, a context as the server makes it for a connection of HTTP/1, and Caddy's replacer.
func (t *traffic) request() *http.Request {
	r := &http.Request{
		Method: "GET", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Host: "api.rekall.ai", RequestURI: t.target, Body: http.NoBody,
		Header: http.Header{"User-Agent": {"rekall-sdk/1.0"}, "Accept": {"*/*"}, "Accept-Encoding": {"gzip"}},
	}
	var query string
	r.URL = new(url.URL)
	r.URL.Path, query, _ = strings.Cut(t.target, "?")
	r.URL.RawQuery = query
	t.prepare(r)
	ctx, cancel := context.WithCancel(newConnection(context.Background()))
	_ = cancel // as the server does when the connection ends; here the context is garbage by then
	ctx, cancel = context.WithCancel(ctx)
	_ = cancel
	replacer := caddy.NewReplacer()
	replacer.Map(func(string) (any, bool) { return nil, false }) // as Caddy does for its HTTP placeholders
	ctx = context.WithValue(ctx, caddyhttp.ExtraLogFieldsCtxKey, new(caddyhttp.ExtraLogFields))
	return r.WithContext(context.WithValue(ctx, caddy.ReplacerCtxKey, replacer))
}

func (t *traffic) next() *http.Request {
	t.used++
	return t.requests[t.used-1]
}

func (t *traffic) spent() bool { return t.used == len(t.requests) }

// nullWriter costs nothing.
type nullWriter struct{ header http.Header }

func (w nullWriter) Header() http.Header         { return w.header }
func (w nullWriter) WriteHeader(int)             {}
func (w nullWriter) Write(p []byte) (int, error) { return len(p), nil }

// markingWriter notes when the gateway begins to write its answer.
type markingWriter struct {
	nullWriter
	answeredAt time.Time
}

func (w *markingWriter) Header() http.Header {
	if w.answeredAt.IsZero() {
		w.answeredAt = time.Now()
	}
	return w.nullWriter.Header()
}

// kindsOfTraffic are what the cost of the gateway is stated for.
func kindsOfTraffic(secret string) map[string]*traffic {
	unknown := apikey.Generate(apikey.Production)
	bearer := func(key string) func(*http.Request) {
		return func(r *http.Request) { r.Header["Authorization"] = []string{"Bearer " + key} }
	}
	return map[string]*traffic{
		"bearer":    newTraffic("/v1/memories", bearer(secret)),
		"x-api-key": newTraffic("/v1/memories", func(r *http.Request) { r.Header["X-Api-Key"] = []string{secret} }),
		"query":     newTraffic("/v1/memories?limit=10&api_key="+secret, func(*http.Request) {}),
		"refused":   newTraffic("/v1/memories", bearer(unknown)),
	}
}

// BenchmarkHandler is the whole gateway without the proxy: the door, where the credential is taken out and hashed, and the
// handler, with tracking for the cut. A refusal counts up to its answer.
func BenchmarkHandler(b *testing.B) {
	garbage.Tune() // as in a gateway
	g, secret := newGateway(b)
	limiter := ratelimit.New()
	kinds := kindsOfTraffic(secret)
	kinds["limited"] = kindsOfTraffic(secret)["bearer"]
	g.warmUp(b, kinds["bearer"])
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		t := kinds[name]
		b.Run(name, func(b *testing.B) {
			g.limiter = nil
			if name == "limited" {
				g.limiter = limiter
			}
			entrance := g.entrance(b)
			clock := readingTheClock()
			var took time.Duration
			for b.Loop() {
				r := t.request()
				clear(t.writer.header)
				if name == "refused" {
					writer := &markingWriter{nullWriter: t.writer}
					begun := time.Now()
					entrance.ServeHTTP(writer, r)
					took += writer.answeredAt.Sub(begun) - clock
					continue
				}
				begun := time.Now()
				entrance.ServeHTTP(t.writer, r)
				took += time.Since(begun) - clock
			}
			b.ReportMetric(0, "ns/op") // the making of the requests is in it
			b.ReportMetric(float64(took)/float64(b.N), "ns/request")
			allocations := g.allocations(b, t)
			if name == "refused" {
				allocations -= allocationsOfAnAnswer()
			}
			b.ReportMetric(allocations, "allocations/request")
		})
	}
}

// warmUp serves requests until the heap has grown to its size, which costs the first of them a tenth more.
func (g *Gateway) warmUp(t testing.TB, traffic *traffic) {
	entrance := g.entrance(t)
	for range 500_000 {
		clear(traffic.writer.header)
		entrance.ServeHTTP(traffic.writer, traffic.request())
	}
}

// readingTheClock is what a time that was taken has of it.
func readingTheClock() time.Duration {
	const times = 100_000
	begun := time.Now()
	for range times {
		_ = time.Now()
	}
	return time.Since(begun) / times
}

// saying stands for a backend whose answers have these Cache-Control headers.
type saying []string

func (s saying) ServeHTTP(w http.ResponseWriter, _ *http.Request) error {
	for _, value := range s {
		w.Header().Add("Cache-Control", value)
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func TestNoSharedCacheMayStoreAnAnswer(t *testing.T) {
	g, secret := newGateway(t)
	for _, tc := range []struct {
		backend saying
		want    string
	}{
		{nil, "private"},
		{saying{"max-age=60"}, "max-age=60, private"},
		{saying{"public, max-age=60, s-maxage=600"}, "max-age=60, private"},
		{saying{"Public", "S-MaxAge=600 , immutable"}, "immutable, private"},
		{saying{`private="Set-Cookie, X-A", max-age=60`}, `private="Set-Cookie, X-A", max-age=60, private`},
		{saying{"no-cache"}, "no-cache, private"},
		{saying{""}, "private"},
		{saying{"no-store"}, "no-store"},
		{saying{"Private, max-age=60"}, "Private, max-age=60"},
	} {
		g.production.chain = tc.backend
		if got := g.serve(t, bearerRequest(secret)).Header()["Cache-Control"]; !slices.Equal(got, []string{tc.want}) {
			t.Errorf("of %q the client gets %q, want %q", tc.backend, got, tc.want)
		}
	}
}

// TestReportOnlyLetsNoKeyIntoTheOtherEnvironment: it is about scopes.
func TestReportOnlyLetsNoKeyIntoTheOtherEnvironment(t *testing.T) {
	row := apikey.Record{Environment: apikey.Sandbox, Scopes: apikey.AllScopes} // whatever the key's prefix says
	g := gatewayOn(t, &followed{cutWhileTracking: cutWhileTracking{record: row}}, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		t.Error("sent to production")
		return nil
	}))
	g.ScopesReportOnly = true
	if w := g.serve(t, bearerRequest(apikey.Generate(apikey.Production))); w.Code != http.StatusForbidden {
		t.Errorf("answer %d %s, want 403", w.Code, w.Body)
	}
}

// changedOnce has a key change between being found and being tracked, once.
type changedOnce struct {
	keySource
	tracked int
}

func (c *changedOnce) Track(f *keycache.Flight, found keycache.Found, request keycache.Request) bool {
	c.tracked++
	return c.tracked > 1 && c.keySource.Track(f, found, request)
}

func TestRequestWhoseKeyIsFoundAgainHoldsOnePlaceAndGivesItBack(t *testing.T) {
	g, secret := newGateway(t)
	cache := &changedOnce{keySource: g.cache}
	g.cache, g.limiter = cache, ratelimit.New()
	if w := g.serve(t, bearerRequest(secret)); w.Code != http.StatusNoContent || cache.tracked != 2 {
		t.Fatalf("answer %d %s after %d times", w.Code, w.Body, cache.tracked)
	}
	if _, verdict := g.limiter.Acquire(t.Context(), apikey.Hash(secret), ratelimit.Limit{PerMinute: 60, Burst: 90, Concurrent: 1}); !verdict.Allowed {
		t.Error("a place is held after the request has ended")
	}
}

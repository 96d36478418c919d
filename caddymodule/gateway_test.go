package caddymodule

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/scoperule"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// newGateway returns a gateway on a real database, with a handler that answers 204 in place of a proxy, and a key that is
// in its cache.
func newGateway(t testing.TB) (*Gateway, string) {
	t.Helper()
	url := pgtest.URL(t)
	if _, _, err := keystore.Migrate(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	store, err := keystore.Open(url, keystore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	key, err := keyadmin.New(store).Create(t.Context(), keyadmin.CreateRequest{
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
	g := &Gateway{rules: rules, cache: cache, metrics: newMetrics(cache), logger: zap.NewNop(), production: passing{}}
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

func (passing) ServeHTTP(w http.ResponseWriter, _ *http.Request, _ caddyhttp.Handler) error {
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

func TestDecisionOnAKnownKeyAllocatesNothing(t *testing.T) {
	g, secret := newGateway(t)
	r := bearerRequest(secret)
	x := &exchange{gateway: g, environment: apikey.Production}
	allocations := testing.AllocsPerRun(200, func() {
		cred := credential.Take(r)
		if parse(r, &cred) != apikey.Allowed {
			t.Fatal("not a good request")
		}
		found, err := g.cache.Find(r.Context(), cred.Digest)
		if err != nil || g.decide(x, r, found) != apikey.Allowed {
			t.Fatal("not allowed", err)
		}
	})
	if allocations > 0 {
		t.Errorf("%.0f allocations, want none", allocations)
	}
}

// nullWriter costs nothing, so that a benchmark shows the gateway's own cost.
type nullWriter struct{ header http.Header }

func (w nullWriter) Header() http.Header         { return w.header }
func (w nullWriter) WriteHeader(int)             {}
func (w nullWriter) Write(p []byte) (int, error) { return len(p), nil }

func BenchmarkDecision(b *testing.B) {
	g, secret := newGateway(b)
	r := bearerRequest(secret)
	x := &exchange{gateway: g, environment: apikey.Production}
	b.ReportAllocs()
	for b.Loop() {
		cred := credential.Take(r)
		found, err := g.cache.Find(r.Context(), cred.Digest)
		if parse(r, &cred) != apikey.Allowed || err != nil || g.decide(x, r, found) != apikey.Allowed {
			b.Fatal("not allowed")
		}
	}
}

// BenchmarkHandler is the whole handler without the proxy, and without the door.
func BenchmarkHandler(b *testing.B) {
	g, secret := newGateway(b)
	for name, r := range map[string]*http.Request{
		"allowed": bearerRequest(secret),
		"unknown": bearerRequest(apikey.Generate(apikey.Production)),
		"missing": request("", func(*http.Request) {}),
	} {
		b.Run(name, func(b *testing.B) {
			w := nullWriter{http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				r.Header = http.Header{}
				clear(w.header)
				if err := g.ServeHTTP(w, r, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

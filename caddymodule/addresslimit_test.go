package caddymodule

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/ratelimit"
)

// comesFrom is a request that Caddy believes to come from an address.
func comesFrom(address string, r *http.Request) *http.Request {
	vars := map[string]any{caddyhttp.ClientIPVarKey: address}
	return r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, vars))
}

func TestEachRequestWithoutAGoodKeyCountsAgainstItsAddressAndNoOther(t *testing.T) {
	g, secret := newGateway(t)
	unknown := apikey.Generate(apikey.Production)
	bearing := func(value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+value) }
	}
	for name, c := range map[string]struct {
		place  func(*http.Request)
		status int
		counts bool
	}{
		"missing":     {func(*http.Request) {}, 401, true},
		"malformed":   {bearing("rk_guess"), 401, true},
		"token":       {bearing("rat_guess"), 401, true},
		"unknown":     {bearing(unknown), 401, true},
		"several":     {func(r *http.Request) { bearing(unknown)(r); r.Header.Set("X-Api-Key", secret) }, 400, true},
		"good":        {bearing(secret), 204, false},
		"bad path":    {func(r *http.Request) { bearing(secret)(r); r.URL.Path = "//" }, 400, false},
		"bad method":  {func(r *http.Request) { bearing(secret)(r); r.Method = "TRACE" }, 405, false},
		"lacks scope": {func(r *http.Request) { bearing(secret)(r); r.Method = "POST" }, 403, false},
		"not covered": {func(r *http.Request) { bearing(secret)(r); r.URL.Path = "/v1/other" }, 403, false},
	} {
		g.addresses = ratelimit.NewAddresses(1, 1)
		send := func() int { return g.serve(t, comesFrom("192.0.2.1", request(secret, c.place))).Code }
		if first := send(); first != c.status {
			t.Errorf("%s: the first answer is %d, want %d", name, first, c.status)
		}
		want := c.status
		if c.counts {
			want = http.StatusTooManyRequests
		}
		if second := send(); second != want {
			t.Errorf("%s: the second answer is %d, want %d", name, second, want)
		}
	}
}

func TestAddressOverItsLimitAsksTheCacheForNothingAndKnownKeysPass(t *testing.T) {
	g, secret := newGateway(t)
	g.addresses = ratelimit.NewAddresses(1, 1)
	const address = "192.0.2.1"
	began := time.Now()
	g.serve(t, comesFrom(address, bearerRequest("rk_guess")))
	cache := g.cache.(*keycache.Cache)
	before := cache.Status()
	w := g.serve(t, comesFrom(address, bearerRequest(apikey.Generate(apikey.Production))))
	after := cache.Status()
	retryAfter, _ := strconv.Atoi(w.Header().Get("Retry-After"))
	isMinute := retryAfter <= 60 && float64(retryAfter) >= 60-time.Since(began).Seconds()
	if w.Code != http.StatusTooManyRequests || !strings.Contains(w.Body.String(), `"RATE_LIMIT_EXCEEDED"`) || !isMinute {
		t.Errorf("answered %d, Retry-After %q: %s", w.Code, w.Header().Get("Retry-After"), w.Body)
	}
	if after.Hits != before.Hits || after.Misses != before.Misses || after.Lookups != before.Lookups {
		t.Errorf("a key was looked up: %+v, before %+v", after, before)
	}
	if w := g.serve(t, comesFrom(address, bearerRequest(secret))); w.Code != http.StatusNoContent {
		t.Errorf("a good key in memory is answered %d", w.Code)
	}
}

// TestAtOnceAnAddressHasNoMoreKeysLookedUpThanItsLimit: that a key is unknown is proven tens of milliseconds after it came.
func TestAtOnceAnAddressHasNoMoreKeysLookedUpThanItsLimit(t *testing.T) {
	g, _ := newGateway(t)
	g.addresses = ratelimit.NewAddresses(1, 5)
	const address = "192.0.2.1"
	g.serve(t, comesFrom(address, bearerRequest("rk_guess")))
	cache := g.cache.(*keycache.Cache)
	before := cache.Status()
	var refused atomic.Int64
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if g.serve(t, comesFrom(address, bearerRequest(apikey.Generate(apikey.Production)))).Code == http.StatusTooManyRequests {
				refused.Add(1)
			}
		})
	}
	all.Wait()
	if n := cache.Status().Misses - before.Misses; n != 4 || refused.Load() != 96 {
		t.Errorf("%d keys were looked up and %d requests refused, want 4 and 96", n, refused.Load())
	}
}

// lookups has what Find does decided by a test, on the way to the cache.
type lookups struct {
	keySource
	find func()
}

func (l lookups) Find(ctx context.Context, d apikey.Digest) (keycache.Found, error) {
	l.find()
	return l.keySource.Find(ctx, d)
}

func (lookups) Cached(apikey.Digest) bool { return false }

func TestALookupOfASuspectAddressCountsUntilItIsOverOnEveryWayOut(t *testing.T) {
	g, secret := newGateway(t)
	const address = "192.0.2.1"
	cache := g.cache
	mayLookUp := func() bool {
		begun := g.addresses.Begin(netip.MustParseAddr(address)).Allowed
		if begun {
			g.addresses.End(netip.MustParseAddr(address))
		}
		return begun
	}
	for name, c := range map[string]struct {
		secret string
		find   func(leave func())
	}{
		"found":          {secret, func(func()) {}},
		"client gone":    {apikey.Generate(apikey.Production), func(leave func()) { leave() }},
		"handlers panic": {secret, func(func()) { panic(http.ErrAbortHandler) }},
	} {
		g.addresses = ratelimit.NewAddresses(1, 2)
		g.addresses.Take(netip.MustParseAddr(address))
		r := comesFrom(address, bearerRequest(c.secret))
		ctx, leave := context.WithCancel(r.Context())
		g.cache = lookups{cache, func() {
			if mayLookUp() {
				t.Errorf("%s: a second key may be looked up meanwhile", name)
			}
			c.find(leave)
		}}
		handled := false
		g.production.chain = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			if handled = true; !mayLookUp() {
				t.Errorf("%s: a request counts though its key was found", name)
			}
			return nil
		})
		func() {
			defer func() { _ = recover() }()
			_ = g.ServeHTTP(httptest.NewRecorder(), r.WithContext(ctx), nil)
		}()
		leave()
		if handled != (name == "found") {
			t.Errorf("%s: handled %t", name, handled)
		}
		if !mayLookUp() {
			t.Errorf("%s: the lookup still counts", name)
		}
	}
}

// TestEndOfARequestEndsTheLookupOfNoOther: its own was over when its key was found.
func TestEndOfARequestEndsTheLookupOfNoOther(t *testing.T) {
	g, secret := newGateway(t)
	address := netip.MustParseAddr("192.0.2.1")
	g.addresses = ratelimit.NewAddresses(1, 2)
	g.addresses.Take(address)
	g.cache = lookups{g.cache, func() {}}
	g.production.chain = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		if !g.addresses.Begin(address).Allowed { // the other's, which goes on
			t.Error("the request's own lookup still counts")
		}
		return nil
	})
	g.serve(t, comesFrom(address.String(), bearerRequest(secret)))
	if g.addresses.Begin(address).Allowed {
		t.Error("a third key may be looked up, since the other's lookup counts no longer")
	}
}

func TestRequestWithoutAnAddressIsNotLimited(t *testing.T) {
	g, _ := newGateway(t)
	g.addresses = ratelimit.NewAddresses(1, 1)
	for range 3 { // by a Unix socket, Caddy has none
		if w := g.serve(t, comesFrom("", bearerRequest("rk_guess"))); w.Code != http.StatusUnauthorized {
			t.Error(w.Code)
		}
	}
}

func TestAddressLimitAllocatesNothingForAKnownKey(t *testing.T) {
	g, secret := newGateway(t)
	r := comesFrom("2001:db8::1", bearerRequest(secret))
	g.addresses = ratelimit.NewAddresses(1, 1)
	g.addresses.Take(clientAddress(r)) // the longer way, for an address over its limit
	digest := apikey.Hash(secret)
	if n := testing.AllocsPerRun(200, func() {
		if verdict, _ := mayLookUp(g.addresses, r, g.cache, digest); !verdict.Allowed {
			t.Fatal("refused")
		}
	}); n > 0 {
		t.Errorf("%.0f allocations, want none", n)
	}
}

func TestOfTwoAddressLimitsThatIsTheStricterWhichLetsLessThrough(t *testing.T) {
	for _, c := range []struct{ stricter, laxer AddressLimit }{
		{AddressLimit{PerMinute: 10, Burst: 100}, AddressLimit{PerMinute: 60, Burst: 20}},
		{AddressLimit{PerMinute: 60, Burst: 20}, AddressLimit{PerMinute: 60}},
		{AddressLimit{PerMinute: 60}, AddressLimit{PerMinute: 60, Burst: 100}},
		{AddressLimit{PerMinute: 60, Burst: 20}, AddressLimit{PerMinute: 60, Burst: 100}},
	} {
		if !c.stricter.stricter(c.laxer) || c.laxer.stricter(c.stricter) {
			t.Errorf("%+v is not stricter than %+v", c.stricter, c.laxer)
		}
	}
	if same := (AddressLimit{PerMinute: 60, Burst: 60}); same.stricter(AddressLimit{PerMinute: 60}) {
		t.Error("a limit is stricter than the same limit")
	}
}

// TestStrictestAddressLimitHoldsWhereKeysAreManaged, whichever gateway has it: an attacker guesses keys where that costs least.
func TestStrictestAddressLimitHoldsWhereKeysAreManaged(t *testing.T) {
	database := migrated(t)
	strict, lax := AddressLimit{PerMinute: 1, Burst: 3}, AddressLimit{PerMinute: 60}
	for _, limits := range [][]AddressLimit{{strict, lax}, {lax, strict}} {
		var routes []any
		for _, limit := range limits {
			routes = append(routes, map[string]any{"handle": []any{map[string]any{
				"handler": "rekall_gateway", "address_limit": limit, "production": map[string]any{"handler": "static_response"},
			}}})
		}
		apps := map[string]any{"http": map[string]any{"servers": map[string]any{"srv": map[string]any{
			"listen": []string{"127.0.0.1:0"}, "routes": routes,
		}}}}
		if err := caddy.Load(configure(t, database, filepath.Join(t.TempDir(), "log"), map[string]any{}, apps), true); err != nil {
			t.Fatal(err)
		}
		app, err := caddy.ActiveContext().App("rekall")
		if err != nil {
			t.Fatal(err)
		}
		if got := app.(*App).addressLimit; got != strict {
			t.Errorf("with %+v it is %+v", limits, got)
		}
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAddressLimitOutOfRangeIsRefused(t *testing.T) {
	for _, l := range []AddressLimit{{}, {PerMinute: -1}, {PerMinute: maxAddressRate + 1}, {PerMinute: 1, Burst: -1}, {PerMinute: 1, Burst: maxAddressRate + 1}} {
		if limiter, err := l.limiter(); err == nil || limiter != nil {
			t.Errorf("%+v is taken", l)
		}
	}
	for _, l := range []AddressLimit{{PerMinute: 1}, {PerMinute: maxAddressRate, Burst: maxAddressRate}, {PerMinute: 1, Burst: maxAddressRate}} {
		if limiter, err := l.limiter(); err != nil || limiter == nil {
			t.Errorf("%+v is refused: %v", l, err)
		}
	}
}

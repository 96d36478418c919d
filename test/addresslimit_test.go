package test

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/test/eventually"
)

// limitedSite has an address_limit.
func limitedSite(limit string) string {
	return strings.Replace(standardSite, "rekall_gateway {", "rekall_gateway {\n\t\taddress_limit "+limit, 1)
}

// from is a request's header as a trusted proxy sends it on for an address.
func from(address string, header http.Header) http.Header {
	header = header.Clone()
	header.Set("X-Forwarded-For", address)
	return header
}

func TestAddressThatGuessesIsRefusedBeforeAnyLookupAndNobodyElseIs(t *testing.T) {
	r := newRig(t)
	good, other := r.key("production", "memories:read"), r.key("production", "memories:read")
	g := r.write(limitedSite("1 5"), // the test is over before the next request of the guesser would pass
		"rekall {\n\t\tdatabase {env.REKALL_DATABASE_URL}\n\t}\n\tservers {\n\t\ttrusted_proxies static 127.0.0.1/32\n\t}")
	g.run(r.database)
	g.waitReady()
	const guesser = "2001:db8:1:2::1"
	eventually.True(t, "the good key is in memory", func() bool {
		before := g.status().Lookups
		g.do("GET", "/v1/memories", from(guesser, bearer(good))).wantCode(t, 200, "")
		return g.status().Lookups == before
	})
	guess := func(address string) reply {
		return g.do("GET", "/v1/memories", from(address, http.Header{"X-Api-Key": {"rk_guess"}}))
	}
	for range 5 {
		guess(guesser).wantCode(t, 401, "API_KEY_INVALID")
	}
	refused := guess("2001:db8:1:2:ffff::2") // of the same /64
	refused.wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	if seconds, err := strconv.Atoi(refused.Header.Get("Retry-After")); err != nil || seconds < 1 || seconds > 60 {
		t.Errorf("Retry-After %q", refused.Header.Get("Retry-After"))
	}
	before := g.status().Lookups
	g.doOnce("GET", "/v1/memories", from(guesser, http.Header{"X-Api-Key": {apikey.Generate(apikey.Production)}})).wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	if g.status().Lookups != before {
		t.Error("a key was looked up for an address over its limit")
	}
	for range 20 {
		g.do("GET", "/v1/memories", from(guesser, bearer(good))).wantCode(t, 200, "")
	}
	guess("2001:db8:1:3::1").wantCode(t, 401, "API_KEY_INVALID")
	g.do("GET", "/v1/memories", from("192.0.2.1", bearer(other))).wantCode(t, 200, "")
	for environment, want := range map[string]float64{"none": 1, "production": 1} {
		if n := g.series(t, `rekall_decisions_total{environment="`+environment+`",outcome="rate_limited"}`); n != want {
			t.Errorf("%v requests of environment %s are counted as limited, want %v", n, environment, want)
		}
	}
}

// TestClientBehindATrustedProxyCannotWriteItsOwnAddress: the proxy adds to X-Forwarded-For what it sees, behind what the client sent.
func TestClientBehindATrustedProxyCannotWriteItsOwnAddress(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	secret := r.key("production", "memories:read")
	g := r.write(limitedSite("1 1"),
		"rekall {\n\t\tdatabase {env.REKALL_DATABASE_URL}\n\t}\n\tservers {\n\t\ttrusted_proxies static 127.0.0.1/32\n\t}")
	g.run(r.database)
	g.waitReady()
	const guesser, victim = "203.0.113.9", "198.51.100.1"
	g.do("GET", "/v1/memories", from(victim+", "+guesser, http.Header{})).wantCode(t, 401, "API_KEY_MISSING")
	g.do("GET", "/v1/memories", from("198.51.100.2, "+guesser, http.Header{})).wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	g.do("GET", "/v1/memories", from(victim+", "+guesser, http.Header{})).wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	g.do("GET", "/v1/memories", from(victim, bearer(secret))).wantCode(t, 200, "") // which no memory knows yet
}

// TestAddressOverItsLimitIsRefusedWhereKeysAreManagedToo: the API and the dashboard are doors to the same keys.
func TestAddressOverItsLimitIsRefusedWhereKeysAreManagedToo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	manager := r.manager("acme")
	g := r.start(strings.Replace(managedSite, "rekall_gateway {", "rekall_gateway {\n\t\taddress_limit 1 3", 1))
	eventually.True(t, "the good key is in memory", func() bool {
		before := g.status().Lookups
		g.manage("GET", keysPath, bearer(manager), "", 200)
		return g.status().Lookups == before
	})
	doors := map[string]func(secret string) reply{
		"gateway": func(secret string) reply { return g.do("GET", "/v1/memories", http.Header{"X-Api-Key": {secret}}) },
		"API":     func(secret string) reply { return g.do("GET", keysPath, http.Header{"X-Api-Key": {secret}}) },
		"dashboard": func(secret string) reply {
			form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
			return do(t, "POST", g.http+"/settings/api-keys/sign-in", form, strings.NewReader(url.Values{"key": {secret}}.Encode()))
		},
	}
	for name, guess := range doors { // each counts
		if answer := guess("rk_guess"); answer.StatusCode != 401 {
			t.Errorf("%s: %d %s", name, answer.StatusCode, answer.body)
		}
	}
	before := g.status().Lookups
	for name, guess := range doors {
		for _, secret := range []string{"rk_guess", apikey.Generate(apikey.Production)} {
			answer := guess(secret)
			wait := answer.Header.Get("Retry-After")
			say := "Too many requests without a good API key came from your address. Check the key, and try again after the time in Retry-After."
			if name == "dashboard" { // no browser shows that header
				say = "Too many attempts from your address. Try again in " + wait + " second"
			}
			if answer.StatusCode != 429 || wait == "" || !strings.Contains(answer.body, say) {
				t.Errorf("%s: %d, Retry-After %q, %s", name, answer.StatusCode, wait, answer.body)
			}
		}
	}
	if g.status().Lookups != before {
		t.Error("a key was looked up for an address over its limit")
	}
	g.manage("GET", keysPath, bearer(manager), "", 200)
	for series, want := range map[string]float64{
		`rekall_rate_limited_total{limit="address"}`:                              6,
		`rekall_decisions_total{environment="production",outcome="rate_limited"}`: 3,
	} {
		if n := g.series(t, series); n != want {
			t.Errorf("%s is %v, want %v", series, n, want)
		}
	}
}

func TestClientThatObeysTheRetryAfterOfAnAddressLimitIsAnswered(t *testing.T) {
	r := newRig(t)
	g := r.start(limitedSite("60 5"))
	guess := func() reply { return g.do("GET", "/v1/memories", nil) }
	var refused reply
	eventually.True(t, "it is over the limit", func() bool {
		refused = guess()
		return refused.StatusCode == 429
	})
	seconds, err := strconv.Atoi(refused.Header.Get("Retry-After"))
	if err != nil {
		t.Fatal(err)
	}
	<-time.After(time.Duration(seconds) * time.Second)
	guess().wantCode(t, 401, "API_KEY_MISSING")
}

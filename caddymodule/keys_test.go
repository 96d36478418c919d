package caddymodule

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/internal/usage"
)

func TestKeysSettingsByWhichEverybodyWouldBeSomebodyAreRefused(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "postgres://h/d")
	for options, reason := range map[string]string{
		"":                            "",
		"account {http.auth.user.id}": "",
		"account acme":                "", // of everybody who is authenticated
		"account {http.auth.user.org}\nuser {http.request.tls.client.subject}": "",
		"account {header.X-Org}\nuser {header.X-User}":                         "", // behind forward_auth
		"account acme\nuser ann":                                               "user must have a placeholder",
		"account acme\nuser {http.auth.user.id":                                "user is {http.auth.user.id, whose braces are no placeholder",
		"account acme\nuser \\{http.auth.user.id}":                             "whose braces are no placeholder",
		"account {http.auth.user.id":                                           "account is {http.auth.user.id, whose braces are no placeholder",
		"account acme\nuser {system.hostname}":                                 "user must have a placeholder of the request",
		"account acme\nuser {env.HOME}":                                        "user must have a placeholder of the request",
		"account acme\nuser staff-{time.now.year}":                             "user must have a placeholder of the request",
		"account acme\nuser staff-{http.auth.user.id}":                         "",
		"account acme-{env.REGION}":                                            "",
		"user {http.auth.user.id}":                                             "user needs an account",
		"account {query.account}":                                              "{http.request.uri.query.account} has a value for everybody",
		"account {http.auth.user.id}\nuser {cookie.user}":                      "{http.request.cookie.user} has a value for everybody",
		"account {host}":                                                       "{http.request.host} has a value for everybody",
		"account {path.0}":                                                     "{http.request.uri.path.0} has a value for everybody",
		"account {re.org.1}":                                                   "{http.regexp.org.1} has a value for everybody",
		"account acme\nuser {http.request.tls.server_name}":                    "{http.request.tls.server_name} has a value for everybody",
		"account acme\nuser {client_ip}":                                       "{http.vars.client_ip} has a value for everybody",
		"account {client_ip}":                                                  "{http.vars.client_ip} has a value for everybody",
		"account acme\nuser staff-{vars.client_ip}":                            "{http.vars.client_ip} has a value for everybody",
		"account acme\nuser {vars.trusted_proxy}":                              "{http.vars.trusted_proxy} has a value for everybody",
		"account {vars.trusted_proxy}":                                         "{http.vars.trusted_proxy} has a value for everybody",
		"account acme\nuser {vars.start_time}":                                 "{http.vars.start_time} has a value for everybody",
		"account acme\nuser {vars.uuid}":                                       "{http.vars.uuid} has a value for everybody", // where it is logged
		"account acme\nuser {vars.trace_id}":                                   "{http.vars.trace_id} has a value for everybody",
		"account acme\nuser {vars.span_id}":                                    "{http.vars.span_id} has a value for everybody",
		"account acme\nuser {http.shutting_down}":                              "{http.shutting_down} has a value for everybody",
		"account {http.shutting_down}":                                         "{http.shutting_down} has a value for everybody",
		"account acme\nuser {http.time_until_shutdown}":                        "{http.time_until_shutdown} has a value for everybody",
		"account acme\nuser {http.response.header.Server}":                     "{http.response.header.Server} has a value for everybody",
		"account acme\nuser {http.url_pattern.pathname.org}":                   "{http.url_pattern.pathname.org} has a value for everybody",
		"account acme\nuser {file_match.relative}":                             "{http.matchers.file.relative} has a value for everybody",
		"account acme\nuser {err.message}":                                     "{http.error.message} has a value for everybody",
		"account {vars.client_org}\nuser {vars.client_ip_owner}":               "", // of a handler in front
		"account {vars.org}\nuser {rp.header.X-User}":                          "",
		"database {env.REKALL_NO_SUCH_VARIABLE}":                               "REKALL_NO_SUCH_VARIABLE",
		"database postgres://user:hunter2@host:notaport/db":                    "database URL is not usable",
		"database postgres://user:{hunter2}@host/db":                           "", // a password may have braces
		"github_secret_scanning http://api.github.com/keys":                    "github_secret_scanning: must be an https URL",
		"github_secret_scanning\naccount {http.auth.user.id}":                  "",
	} {
		err := validate(t, "{\nadmin off\n}\nhttp://127.0.0.1:1 {\nrekall_keys {\n"+options+"\n}\n}\n")
		if (err == nil) != (reason == "") || err != nil && !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: error %v, want one with %q", options, err, reason)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Error("the error shows the password")
		}
	}
}

// TestClientCertificateNamesAPersonOnlyIfItWasVerified: Caddy has a serial and a fingerprint of none at all too, and what a certificate
// that nobody verified says is its owner's choice.
func TestClientCertificateNamesAPersonOnlyIfItWasVerified(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "ann"}, DNSNames: []string{"acme"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(certificate)
	own := []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	for _, user := range []string{"fingerprint", "serial", "subject", "san.dns_names"} {
		k := &Keys{Account: "acme", User: "{http.request.tls.client." + user + "}"}
		for _, tc := range []struct {
			name   string
			auth   tls.ClientAuthType
			sent   []tls.Certificate
			person bool
		}{
			{"none", tls.VerifyClientCertIfGiven, nil, false},
			{"not verified", tls.RequireAnyClientCert, own, false},
			{"verified", tls.VerifyClientCertIfGiven, own, true},
		} {
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				name, authenticated := k.person(caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{}))
				if authenticated != tc.person || authenticated != (name != "") {
					t.Errorf("%s, certificate %s: person %q, %v", user, tc.name, name, authenticated)
				}
			}))
			server.TLS = &tls.Config{ClientAuth: tc.auth, ClientCAs: pool}
			server.StartTLS()
			client := server.Client()
			client.Transport.(*http.Transport).TLSClientConfig.Certificates = tc.sent
			answer, err := client.Get(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			_ = answer.Body.Close()
			server.Close()
		}
	}
}

// TestKeysPerDayBeyondItsBoundsAreRefused in JSON too; the golden files have the Caddyfile's.
func TestKeysPerDayBeyondItsBoundsAreRefused(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "postgres://h/d")
	for _, n := range []int{-1, maxKeysPerDay + 1} {
		config := &caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}, AppsRaw: caddy.ModuleMap{
			"http": json.RawMessage(fmt.Sprintf(`{"servers": {"s": {"listen": ["127.0.0.1:1"], "routes": [{"handle": [{"handler": "rekall_keys", "keys_per_day": %d}]}]}}}`, n)),
		}}
		if err := caddy.Validate(config); err == nil || !strings.Contains(err.Error(), "keys_per_day must be from 1 to 1000000") {
			t.Errorf("%d: %v", n, err)
		}
	}
}

func TestKeysAreManagedInAPostgresThatIsFarAway(t *testing.T) {
	database := pgtest.Migrated(t)
	far := pgtest.Proxy{Delay: time.Second}
	k := &Keys{Database: far.URL(t, database)}
	m, err := k.management(&App{Database: database})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Cleanup(); err != nil {
			t.Error(err)
		}
	})
	if _, err := m.admin.List(t.Context(), keyadmin.Operator("test"), keyadmin.ListRequest{}); err != nil {
		t.Error(err)
	}
}

// TestLookupOfAKeyThatManagesKeysCountsNoLongerThanItTakes: of an address that is suspect, no more are under way than its limit.
func TestLookupOfAKeyThatManagesKeysCountsNoLongerThanItTakes(t *testing.T) {
	address := netip.MustParseAddr("192.0.2.1")
	addresses := ratelimit.NewAddresses(1, 2)
	addresses.Take(address)
	looked := false
	k := &Keys{
		app: &App{addresses: addresses}, metrics: newMetrics(), usage: usage.New(nil, usage.Config{}), logger: zap.NewNop(),
		cache: lookups{new(oneFlight), func() {
			if looked = true; addresses.Begin(address).Allowed {
				t.Error("a second key may be looked up meanwhile")
			}
		}},
	}
	secret := apikey.Generate(apikey.Production)
	if _, err := k.actor(comesFrom(address.String(), bearerRequest(secret))); err == nil || !looked {
		t.Errorf("error %v of a key that may not manage keys; looked up: %v", err, looked)
	}
	if !addresses.Begin(address).Allowed {
		t.Error("the lookup still counts")
	}
}

package test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/network"
	"github.com/rekall-ai/gateway/test/process"
)

// block is a rekall_gateway directive with whatever stands in its two blocks.
func block(production, sandbox string) string {
	return "rekall_gateway {\n production {\n" + production + "\n }\n sandbox {\n" + sandbox + "\n }\n}\n"
}

var standardBlock = block("reverse_proxy PRODUCTION", "reverse_proxy SANDBOX")

// guarded is a reverse_proxy whose transport asks for a pass.
func guarded(environment string) string {
	return "reverse_proxy " + strings.ToUpper(environment) + " {\n transport rekall " + environment + "\n}\n"
}

func TestNoOrderOfDirectivesLeadsPastTheGateway(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	inner, socket := fmt.Sprint(process.FreePort(t)), "unix/"+filepath.Join(t.TempDir(), "inner")
	for _, tc := range []struct {
		name, site string
		before     string // the site: snippets and named routes
		serves     bool   // whether requests with a good key reach their backend
	}{
		{name: "plain", site: standardBlock, serves: true},
		{name: "guarded within", site: block(guarded("production"), guarded("sandbox")), serves: true},
		{name: "guarded proxy above", site: guarded("production") + standardBlock, serves: true}, // directives are sorted
		{name: "guarded proxy first in route", site: "route {\n" + guarded("production") + standardBlock + "}"},
		{name: "guarded proxy first in handle", site: "handle {\n" + guarded("sandbox") + standardBlock + "}", serves: true},
		{name: "guarded proxy after", site: "route {\n" + standardBlock + guarded("production") + "}", serves: true},
		{name: "guarded proxy alone", site: guarded("production")},
		{name: "handle", site: "handle /v1/* {\n" + standardBlock + "}\nhandle {\n" + guarded("production") + "}", serves: true},
		{name: "handle that does not match", site: "handle /v2/* {\n" + standardBlock + "}\nhandle {\n" + guarded("production") + "}"},
		{name: "dynamic upstreams of several sources", site: block("reverse_proxy {\n dynamic multi {\n a localhost "+port(r.production.Address())+" {\n versions ipv4\n }\n }\n}",
			"reverse_proxy SANDBOX"), serves: true},
		{name: "dynamic upstreams of several sources in a named route", before: "&(api) {\n" + block("reverse_proxy {\n dynamic multi {\n a localhost "+
			port(r.production.Address())+" {\n versions ipv4\n }\n }\n}", "reverse_proxy SANDBOX") + "}\n", site: "invoke api", serves: true},
		{name: "two gateways", site: standardBlock + standardBlock, serves: true},
		{name: "gateway in a gateway", site: block(standardBlock, standardBlock), serves: true},
		{name: "two gateways in route", site: "route {\n" + block("respond 418", "respond 418") + standardBlock + "}"},
		{name: "gateways by path", site: "handle /v1/memories* {\n" + standardBlock + "}\nhandle {\n" + standardBlock + "}", serves: true},
		{name: "blocks that do nothing", site: block("vars a b", "vars a b") + guarded("production")},
		{name: "blocks of which nothing matches", site: block("respond /nowhere 418", "respond /nowhere 418") + guarded("production")},
		{name: "error routes", site: block("error 500", "error 500") + "handle_errors {\n" + guarded("production") + "}"},
		{name: "error routes of a gateway", site: "route {\nerror 500\n}\nhandle_errors {\n" + standardBlock + "}", serves: true},
		{name: "error routes after a gateway", site: block("error 500", "error 500") + "handle_errors {\n" + standardBlock + "}", serves: true},
		{name: "named routes", before: "&(production) {\n reverse_proxy PRODUCTION\n}\n&(sandbox) {\n reverse_proxy SANDBOX\n}\n",
			site: block("invoke production", "invoke sandbox"), serves: true},
		{name: "named gateway", before: "&(gateway) {\n" + standardBlock + "}\n", site: "invoke gateway\n", serves: true},
		{name: "snippets", before: "(proxy) {\n reverse_proxy {args[0]}\n}\n",
			site: block("import proxy PRODUCTION", "import proxy SANDBOX"), serves: true},
		{name: "rewrite before", site: "rewrite * /v1/memories\n" + standardBlock, serves: true},
		{name: "rewrite to what nobody may ask", site: "rewrite * /v1/memories/../entities\n" + standardBlock},
		{name: "rewrite within", site: block("rewrite * /internal{uri}\nreverse_proxy PRODUCTION", "uri strip_prefix /v1\nreverse_proxy SANDBOX"), serves: true},
		{name: "rewritten by the proxy", site: block("reverse_proxy PRODUCTION {\n rewrite /internal{uri}\n}", "reverse_proxy SANDBOX {\n method PUT\n}"), serves: true},
		{name: "answers of its own", site: "intercept {\n @any status 5xx\n handle_response @any {\n rewrite * /error.html\n templates\n file_server\n}\n}\n" + standardBlock, serves: true},
		{name: "intercepted", site: "intercept {\n @any status 4xx\n handle_response @any {\n" + guarded("production") + "}\n}\n" + standardBlock, serves: true},
		{name: "responses handled", site: block("reverse_proxy PRODUCTION {\n handle_response {\n copy_response\n }\n}", "reverse_proxy SANDBOX"), serves: true},
		{name: "response handled by a backend of ours", site: "reverse_proxy 127.0.0.1:1 {\n transport rekall production\n handle_response {\n" + guarded("production") + "}\n}\n"},
		{name: "authenticated elsewhere", site: "forward_auth PRODUCTION {\n uri /v1/memories\n transport rekall production\n}\nrespond 418"},
		{name: "templates elsewhere", before: "http://a.example:PORT {\ntemplates\nrespond {args}\n}\n",
			site: "handle /docs/* {\ntemplates\nrespond docs\n}\nhandle {\n" + standardBlock + "}", serves: true},
		{name: "bodies in the access log elsewhere", before: "http://a.example:PORT {\nlog_append asked {http.request.body}\nrespond a\n}\n",
			site: "handle /settings/* {\nrekall_keys\n}\nhandle {\nlog_append asked {http.request.body}\n" + standardBlock + "}", serves: true},
		{name: "dynamic upstreams", site: block("reverse_proxy {\n dynamic a localhost "+port(r.production.Address())+" {\n versions ipv4\n }\n}", "reverse_proxy SANDBOX"), serves: true},
		{name: "a server of this machine behind the gateway", before: "http://:" + inner + " {\nbind 127.0.0.1 ::1\nreverse_proxy PRODUCTION\n}\n",
			site: block("reverse_proxy localhost:"+inner, "reverse_proxy SANDBOX"), serves: true},
		{name: "a server on a socket behind the gateway", before: "http:// {\nbind " + socket + "|0200\nreverse_proxy SANDBOX\n}\n",
			site: block("reverse_proxy PRODUCTION", "reverse_proxy "+socket), serves: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := r.of(t)
			g := r.start(tc.before + "http://:PORT {\nbind 127.0.0.1\nlog\n" + tc.site + "\n}\n")
			wantIsolation(t, r, g, tc.serves)
		})
	}
}

// TestOpaqueTargetTakesNoRequestPastTheScopeRules: it is sent in the place of the path, whatever a handler before the gateway has made of that.
func TestOpaqueTargetTakesNoRequestPastTheScopeRules(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start("http://:PORT {\nbind 127.0.0.1\nrewrite * /v1/memories\n" + standardBlock + "\n}\n")
	key := r.key("production", "memories:read")
	g.do("GET", "/v1/anything", bearer(key)).wantCode(t, 200, "")
	served := r.production.Requests()
	for _, target := range []string{"x:http://b/v1/entities/secret?a=1", "x:entities", "http:v1/entities"} {
		answer, _ := g.raw(lines("GET "+target+" HTTP/1.1", "Authorization: "+bearer(key).Get("Authorization")))
		answer.wantCode(t, 400, "PATH_INVALID")
	}
	if n := r.production.Requests() - served; n != 0 {
		t.Errorf("%d requests with an opaque target reached the backend", n)
	}
}

// TestFastCGIBackendIsToldTheTargetThatWasDecidedOn: frameworks route by REQUEST_URI, for which Caddy takes what came before any rewrite.
func TestFastCGIBackendIsToldTheTargetThatWasDecidedOn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	proxy := fastCGI(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.URL.RequestURI()) // which package fcgi takes from REQUEST_URI
	})
	key := r.key("production", "memories:read")
	for _, tc := range []struct{ name, before, block, requested, told string }{
		{"as it came", "", proxy, "/v1/memories?a=1", "/v1/memories?a=1"},
		{"rewritten before the gateway", "rewrite * /v1/memories\n", proxy, "/v1/entities/secret?a=1", "/v1/memories?a=1"},
		{"a prefix stripped before the gateway", "uri strip_prefix /api\n", proxy, "/api/v1/memories?a=1", "/v1/memories?a=1"},
		{"rewritten behind the gateway, as for index.php", "", "rewrite * /index.php\n" + proxy, "/v1/memories?a=1", "/v1/memories?a=1"},
		{"both", "rewrite * /v1/memories\n", "rewrite * /index.php\n" + proxy, "/v1/entities/secret", "/v1/memories"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := r.of(t).start("http://:PORT {\nbind 127.0.0.1\n" + tc.before + block(tc.block, "reverse_proxy SANDBOX") + "\n}\n")
			answer := g.do("GET", tc.requested, bearer(key))
			if answer.StatusCode != http.StatusOK || answer.body != tc.told {
				t.Errorf("answer %d, the backend was told %s, want %s", answer.StatusCode, answer.body, tc.told)
			}
		})
	}
}

func port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// of is the same rig for a subtest.
func (r *rig) of(t *testing.T) *rig {
	sub := *r
	sub.t = t
	return &sub
}

// wantIsolation sends requests with all sorts of keys and none. No backend may see any but those with a good key of its own
// environment, and those it must see if the site serves.
func wantIsolation(t *testing.T, r *rig, g *gateway, serves bool) {
	t.Helper()
	revoked := r.key("production", "memories:read")
	r.revoke(revoked.ID)
	if err := r.admin.WaitRevoked(t.Context(), revoked.ID, func(keyadmin.Confirmation) {}); err != nil {
		t.Fatal(err)
	}
	forged := http.Header{"X-Rekall-Key-Id": {"1"}, "X-Rekall-Environment": {"production"}, "X-Rekall-Scopes": {"memories:read"}}
	for name, tc := range map[string]struct {
		header      http.Header
		environment string
	}{
		"no key":         {nil, ""},
		"forged headers": {forged, ""},
		"not a key":      {http.Header{"Authorization": {"Bearer hello"}}, ""},
		"unknown":        {http.Header{"X-Api-Key": {apikey.Generate(apikey.Production)}}, ""},
		"revoked":        {bearer(revoked), ""},
		"production":     {bearer(r.key("production", "memories:read")), "production"},
		"sandbox":        {bearer(r.key("sandbox", "memories:read")), "sandbox"},
	} {
		for _, path := range []string{"/v1/memories", "/v1/memories?x=1", "/", "/v1/memories/../x", "//v1/memories", "/v1/%6demories"} {
			production, sandbox := r.production.Requests(), r.sandbox.Requests()
			var answer reply
			var err error // Caddy's intercept may answer with two lengths
			eventually.True(t, "the gateway can tell whose key it is", func() bool {
				answer, err = send("GET", g.http+path, tc.header, nil)
				return !answer.cannotTell()
			})
			production, sandbox = r.production.Requests()-production, r.sandbox.Requests()-sandbox
			if production > 0 && tc.environment != "production" || sandbox > 0 && tc.environment != "sandbox" {
				t.Errorf("%s, %s: production was reached %d times and sandbox %d", name, path, production, sandbox)
			}
			if path != "/v1/memories" || tc.environment == "" {
				continue
			}
			if reached := production+sandbox == 1; reached != serves {
				t.Errorf("%s, %s: its backend was reached: %t, want %t; answer %s %v", name, path, reached, serves, answer.body, err)
			}
		}
	}
}

func TestConfigurationWithAWayPastTheGatewayIsRefused(t *testing.T) {
	r := newRig(t)
	production, sandbox := port(r.production.Address()), port(r.sandbox.Address())
	inner := fmt.Sprint(process.FreePort(t))
	behind := "http://:" + inner + " {\nbind 127.0.0.1\nreverse_proxy PRODUCTION\n}\n"
	several := "reverse_proxy {\n dynamic multi {\n srv _none._tcp.invalid\n a localhost " + production + "\n }\n}"
	both, without, templates := "in both environments", "also reachable without one", "templates would run what clients have written"
	bodies, entry := "in which keys are", "clients reach without a rekall_gateway"
	for _, tc := range []struct{ name, before, site, after, reason string }{
		{name: "bare proxy above", site: "reverse_proxy PRODUCTION\n" + standardBlock, reason: without},
		{name: "bare proxy in route", site: "route {\nreverse_proxy PRODUCTION\n" + standardBlock + "}", reason: without},
		{name: "bare proxy for another path", site: "handle /health {\nreverse_proxy SANDBOX\n}\nhandle {\n" + standardBlock + "}", reason: without},
		{name: "bare proxy after", site: "route {\n" + standardBlock + "reverse_proxy SANDBOX\n}", reason: without},
		{name: "bare and guarded proxy", site: "handle /a {\n" + guarded("production") + "}\nreverse_proxy PRODUCTION", reason: without},
		{name: "production pasted into sandbox", site: block("reverse_proxy PRODUCTION", "reverse_proxy PRODUCTION"), reason: both},
		{name: "among others", site: block("reverse_proxy PRODUCTION 127.0.0.1:1", "reverse_proxy SANDBOX 127.0.0.1:1"), reason: both},
		{name: "crossed over in two gateways", site: "handle /a {\n" + standardBlock + "}\nhandle {\n" + block("reverse_proxy SANDBOX", "reverse_proxy PRODUCTION") + "}", reason: both},
		{name: "crossed over in a gateway in a gateway", site: block(block("reverse_proxy PRODUCTION", "reverse_proxy PRODUCTION"), "respond 418"), reason: both},
		{name: "guarded for the other environment", site: block("reverse_proxy PRODUCTION", guarded("production")), reason: "the other environment"},
		{name: "error routes", site: standardBlock + "handle_errors {\nreverse_proxy PRODUCTION\n}", reason: without},
		{name: "another site", site: standardBlock, after: "http://other.example:PORT {\nreverse_proxy PRODUCTION\n}", reason: without},
		{name: "another server", site: standardBlock, after: fmt.Sprintf("http://:%d {\nreverse_proxy SANDBOX\n}", process.FreePort(t)), reason: without},
		{name: "named route in both", before: "&(proxy) {\n reverse_proxy PRODUCTION\n}\n", site: block("invoke proxy", "invoke proxy"), reason: both},
		{name: "named route also without", before: "&(proxy) {\n reverse_proxy PRODUCTION\n}\n",
			site: "handle /a {\ninvoke proxy\n}\nhandle {\n" + block("invoke proxy", "reverse_proxy SANDBOX") + "}", reason: without},
		{name: "snippet in both", before: "(proxy) {\n reverse_proxy PRODUCTION\n}\n", site: block("import proxy", "import proxy"), reason: both},
		{name: "handled response", site: block("reverse_proxy PRODUCTION {\n handle_response {\n reverse_proxy SANDBOX\n }\n}", "reverse_proxy SANDBOX"), reason: both},
		{name: "handled response of a bare proxy", site: standardBlock,
			after: "http://other.example:PORT {\nreverse_proxy 127.0.0.1:1 {\n handle_response {\n reverse_proxy PRODUCTION\n }\n}\n}", reason: without},
		{name: "intercepted", site: "intercept {\n handle_response {\n reverse_proxy PRODUCTION\n }\n}\n" + standardBlock, reason: without},
		{name: "forward_auth", site: "forward_auth SANDBOX {\n uri /v1/memories\n}\n" + standardBlock, reason: without},
		{name: "php_fastcgi", site: "handle /php/* {\nphp_fastcgi PRODUCTION\n}\nhandle {\n" + standardBlock + "}", reason: without},
		{name: "localhost", site: "handle /a {\nreverse_proxy localhost:" + production + "\n}\nhandle {\n" + standardBlock + "}", reason: without},
		{name: "IPv6", site: block("reverse_proxy PRODUCTION", "reverse_proxy [::1]:"+production), reason: both},
		{name: "no host", site: "handle /a {\nreverse_proxy :" + production + "\n}\nhandle {\n" + standardBlock + "}", reason: without},
		{name: "scheme", site: block("reverse_proxy PRODUCTION", "reverse_proxy http://LocalHost:"+production), reason: both},
		{name: "port range", site: block("reverse_proxy 127.0.0.1:"+sandbox+"-"+next(sandbox), "reverse_proxy SANDBOX"), reason: both},
		{name: "environment variable", site: block("reverse_proxy PRODUCTION", "reverse_proxy {env.REKALL_TEST_UPSTREAM}"), reason: both},
		{name: "to", site: block("reverse_proxy PRODUCTION", "reverse_proxy {\n to SANDBOX PRODUCTION\n}"), reason: both},
		{name: "dynamic upstreams", site: block("reverse_proxy {\n dynamic a localhost "+production+"\n}", "reverse_proxy PRODUCTION"), reason: both},
		{name: "services of both", site: block("reverse_proxy {\n dynamic srv _api._tcp.example.com\n}", "reverse_proxy {\n dynamic srv _api._tcp.example.com\n}"), reason: both},
		{name: "a service of both, named in two ways", site: block("reverse_proxy {\n dynamic srv _api._tcp.example.com\n}",
			"reverse_proxy {\n dynamic srv example.com {\n service api\n proto tcp\n }\n}"), reason: both},
		{name: "several sources in both", site: block(several, several), reason: both},
		{name: "several sources and a bare proxy", site: "handle /a {\nreverse_proxy PRODUCTION\n}\nhandle {\n" + block(several, "reverse_proxy SANDBOX") + "}",
			reason: without},
		{name: "several sources of a handled response", site: block("reverse_proxy 127.0.0.1:1 {\n handle_response {\n "+several+"\n }\n}", "reverse_proxy PRODUCTION"),
			reason: both},
		{name: "several sources in a gateway in a gateway", site: block(block(several, several), "respond 418"), reason: both},
		{name: "services among several sources", site: block("reverse_proxy {\n dynamic multi {\n srv example.com {\n service api\n proto tcp\n }\n }\n}",
			"reverse_proxy {\n dynamic srv _api._tcp.example.com\n}"), reason: both},
		{name: "several sources of a guarded proxy outside", site: "handle /a {\n reverse_proxy {\n transport rekall production\n dynamic multi {\n a localhost " +
			production + "\n }\n }\n}\nhandle {\n" + standardBlock + "}", reason: "takes its upstreams from"},
		{name: "several sources of a named route", before: "&(proxy) {\n " + several + "\n}\n", site: block("invoke proxy", "respond 418"), reason: "takes its upstreams from"},
		{name: "upstream that the client chooses", site: standardBlock, after: "http://other.example:PORT {\nreverse_proxy {header.X-Backend}\n}", reason: "depends on the request"},
		{name: "upstream that a file names, which may change", site: block("reverse_proxy {file./etc/hostname}:80", "respond 418"), reason: "or on a file"},
		{name: "another server in front, whose logs show keys", site: standardBlock, after: "http://:" + inner + " {\nbind 127.0.0.1\nreverse_proxy 127.0.0.1:PORT\n}\n", reason: "in the logs of the server in front"},
		{name: "upstream that the client chooses by a name with a slash", site: block("reverse_proxy {query.a/b}:80", "respond 418"), reason: "depends on the request"},
		{name: "upstream that the client chooses within", site: block("reverse_proxy PRODUCTION", "reverse_proxy {header.X-Backend}"), reason: "depends on the request"},
		{name: "upstreams that cannot be known", site: standardBlock,
			after: "http://other.example:PORT {\nreverse_proxy {\n dynamic multi {\n a localhost " + production + "\n }\n}\n}", reason: "takes its upstreams from"},
		{name: "a server that clients reach behind the gateway", site: block("reverse_proxy localhost:"+inner, "reverse_proxy SANDBOX"),
			after: "http://:" + inner + " {\nreverse_proxy PRODUCTION\n}", reason: entry},
		{name: "a site of the gateway's own server behind it", site: block("reverse_proxy 127.0.0.1:PORT {\n header_up Host inner.example\n}", "reverse_proxy SANDBOX"),
			after: "http://inner.example:PORT {\nbind 127.0.0.1\nreverse_proxy PRODUCTION\n}", reason: entry},
		{name: "the backend of a server behind the gateway", site: block("reverse_proxy localhost:"+inner, "reverse_proxy SANDBOX"),
			after: behind + "http://other.example:PORT {\nbind 127.0.0.1\nreverse_proxy PRODUCTION\n}", reason: without},
		{name: "the backend of a server behind the gateway in the other block", site: block("reverse_proxy localhost:"+inner, "reverse_proxy PRODUCTION"),
			after: behind, reason: both},
		{name: "templates", site: "templates\n" + standardBlock, reason: templates},
		{name: "templates before the management of keys", site: "templates\nrekall_keys", reason: templates},
		{name: "templates in a route before", site: "route {\ntemplates\n" + standardBlock + "}", reason: templates},
		{name: "templates in the same handle", site: "handle /v1/* {\ntemplates\n" + standardBlock + "}", reason: templates},
		{name: "templates in a handle before", site: "handle /a {\ntemplates\n}\n" + standardBlock, reason: templates},
		{name: "templates in one of the handles of a route before",
			site: "route {\nroute {\nhandle /a {\ntemplates\n}\nhandle {\nrespond /b b\n}\n}\n" + standardBlock + "}", reason: templates},
		{name: "templates in a named route before", before: "&(t) {\n templates\n}\n", site: "route {\ninvoke t\n" + standardBlock + "}", reason: templates},
		{name: "templates in a named route that stands before twice", before: "&(t) {\n templates\n}\n",
			site: "handle /a {\ninvoke t\n}\nhandle {\nroute {\ninvoke t\n" + standardBlock + "}\n}", reason: templates},
		{name: "templates before a named route", before: "&(g) {\n" + standardBlock + "}\n",
			site: "handle /a {\ninvoke g\n}\nhandle {\ntemplates\ninvoke g\n}", reason: templates},
		{name: "bodies in the access log around the management of keys", site: "log_append made {http.response.body}\nrekall_keys", reason: bodies},
		{name: "bodies in Base64 in a named route before", before: "&(l) {\n log_append asked {http.request.body_base64}\n}\n",
			site: "route {\ninvoke l\nrekall_keys\n}", reason: bodies},
		{name: "bodies in spans", site: "tracing {\nspan_attributes {\nasked {http.request.body}\n}\n}\nrekall_keys", reason: bodies},
		{name: "bodies in headers, which are logged", site: "header X-Asked a{http.request.body}\nrekall_keys", reason: bodies},
		{name: "bodies in variables", site: "vars asked {http.request.body}\nrekall_keys", reason: bodies},
		{name: "bodies by way of a map", site: "map {http.request.body} {asked} {\ndefault {http.request.body}\n}\nrekall_keys", reason: bodies},
		{name: "bodies behind the gateway", site: block("header X-Asked {http.request.body}\nreverse_proxy PRODUCTION", "reverse_proxy SANDBOX"), reason: "leave nothing of it to the backend"},
		{name: "bodies in a matcher behind the gateway", reason: "leave nothing of it to the backend", site: block(
			"@mutation expression {http.request.body}.contains(\"mutation\")\nreverse_proxy @mutation PRODUCTION\nrespond 418", "reverse_proxy SANDBOX")},
		{name: "bodies in a matcher of what does not match", reason: "leave nothing of it to the backend", site: block(
			"@other not vars {http.request.body} a\nreverse_proxy @other PRODUCTION\nrespond 418", "reverse_proxy SANDBOX")},
		{name: "bodies by way of a matcher", site: "@asked vars_regexp b {http.request.body} (.*)\nlog_append @asked asked {http.regexp.b.1}\nrekall_keys", reason: bodies},
		{name: "templates within", site: block("templates\nreverse_proxy PRODUCTION", "reverse_proxy SANDBOX"), reason: templates},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("REKALL_TEST_UPSTREAM", r.production.Address())
			g := r.of(t).prepare(tc.before + "http://:PORT {\nbind 127.0.0.1\n" + tc.site + "\n}\n" + tc.after + "\n")
			g.run(r.database)
			select {
			case <-g.process.Ended():
			case <-time.After(60 * time.Second):
				t.Fatal("the gateway runs")
			}
			if code := g.process.ExitCode(); code == 0 || !strings.Contains(g.log.String(), tc.reason) {
				t.Errorf("exit code %d without %q", code, tc.reason)
			}
		})
	}
}

// next is the port after this one.
func next(port string) string {
	var n int
	_, _ = fmt.Sscan(port, &n)
	return fmt.Sprint(n + 1)
}

func TestRefusedReloadLeavesTheGatewayAsItWas(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	good, err := os.ReadFile(g.file)
	if err != nil {
		t.Fatal(err)
	}
	bad := strings.Replace(string(good), "rekall_gateway {", "reverse_proxy "+r.production.Address()+"\nrekall_gateway {", 1)
	answer := do(t, "POST", g.admin+"/load", http.Header{"Content-Type": {"text/caddyfile"}}, strings.NewReader(bad))
	if answer.StatusCode == http.StatusOK || !strings.Contains(answer.body, "also reachable without one") {
		t.Errorf("answer %d %s", answer.StatusCode, answer.body)
	}
	wantIsolation(t, r, g, true)
}

// TestRefusalsDoNotCountAgainstTheBackend plays a client without a key that hammers a proxy outside the gateway: passive
// health checks must not take the backend away from those who have one.
func TestRefusalsDoNotCountAgainstTheBackend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const passive = " {\n fail_duration 1h\n max_fails 1\n unhealthy_status 5xx\n transport rekall production\n}\n"
	g := r.start("http://:PORT {\nbind 127.0.0.1\nhandle /outside* {\nreverse_proxy PRODUCTION" + passive + "}\nhandle {\n" +
		block("reverse_proxy PRODUCTION"+passive, "respond 418") + "}\n}\n")
	for range 5 {
		g.do("GET", "/outside", nil).wantCode(t, http.StatusForbidden, "GATEWAY_REQUIRED")
	}
	if r.production.Requests() != 0 {
		t.Error("the backend was reached")
	}
	g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))).wantCode(t, http.StatusOK, "")
}

// TestClientsBrokenBodyDoesNotCountAgainstTheBackend plays a customer with a good key: passive health checks must not take the
// backend away from the others.
func TestClientsBrokenBodyDoesNotCountAgainstTheBackend(t *testing.T) {
	t.Parallel()
	for _, versions := range []string{"1.1", "h2c"} {
		t.Run(versions, func(t *testing.T) {
			r := newRig(t)
			g := r.start("http://:PORT {\nbind 127.0.0.1\nrequest_body {\nmax_size 1MB\n}\n" +
				block("reverse_proxy PRODUCTION {\n fail_duration 1h\n max_fails 1\n transport http {\n versions "+versions+"\n }\n}\n", "respond 418") + "}\n")
			key := bearer(r.key("production", "memories:read", "memories:write"))
			broken := func(body string) string {
				return lines("POST /v1/memories HTTP/1.1", "Authorization: "+key.Get("Authorization"), "Transfer-Encoding: chunked") + body
			}
			for name, tc := range map[string]struct {
				body   string
				status int
				code   string
			}{
				"chunk":         {"xyz\r\n", http.StatusBadRequest, "BODY_INVALID"},
				"later chunk":   {"1\r\na\r\nxyz\r\n", http.StatusBadRequest, "BODY_INVALID"},
				"length":        {"fffffffffffffffff\r\n", http.StatusBadRequest, "BODY_INVALID"},
				"trailer":       {"1\r\na\r\n0\r\nX-A b\r\n\r\n", http.StatusBadRequest, "BODY_INVALID"},
				"beyond limits": {"100001\r\n" + strings.Repeat("a", 1<<20+1) + "\r\n0\r\n\r\n", http.StatusRequestEntityTooLarge, "BODY_TOO_LARGE"},
			} {
				t.Run(name, func(t *testing.T) {
					answer, received := g.raw(broken(tc.body))
					if answer.Response == nil {
						t.Fatalf("no answer: %q", received)
					}
					answer.wantCode(t, tc.status, tc.code)
					g.do("GET", "/v1/memories", key).wantCode(t, http.StatusOK, "")
				})
			}
			wantCalm(t, g)
		})
	}
}

// TestClientsUploadDoesNotCountAgainstTheBackend plays a customer whose upload breaks the connection to the backend: by a body for
// which the backend closes it, and by one that is slower than the connection's timeouts.
func TestClientsUploadDoesNotCountAgainstTheBackend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := "Authorization: " + bearer(r.key("production", "memories:read", "memories:write")).Get("Authorization")
	for name, tc := range map[string]struct {
		transport, method string
		slow              bool
	}{
		"closed":           {"rekall production", "POST", false},
		"closed, http":     {"http", "POST", false},
		"closed, of a GET": {"http", "GET", false},
		"slow":             {"http {\nread_timeout 100ms\n}", "POST", true},
	} {
		t.Run(name, func(t *testing.T) {
			backend := newUploadBackend(t, tc.slow)
			g := r.of(t).start("http://:PORT {\nbind 127.0.0.1\n" + block("reverse_proxy "+backend.listener.Addr().String()+
				" {\nfail_duration 1h\nmax_fails 1\nlb_try_duration 1s\ntransport "+tc.transport+"\n}\n", "respond 418") + "}\n")
			conn, err := net.Dial("tcp", strings.TrimPrefix(g.http, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if _, err := io.WriteString(conn, lines(tc.method+" /v1/memories HTTP/1.1", key, "Content-Length: 2")+"a"); err != nil {
				t.Fatal(err)
			}
			<-backend.broken
			if _, err := io.WriteString(conn, "b"); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			content, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if code := (reply{resp, string(content)}).code(t); code != "UPSTREAM_UNAVAILABLE" { // 502 or 504: whichever error is seen first
				t.Errorf("answer %d %s", resp.StatusCode, content)
			}
			counted := 0.0 // an outage in which every upload breaks must be seen
			for _, reason := range []string{"unavailable", "timeout"} {
				counted += g.series(t, `rekall_upstream_errors_total{environment="production",reason="`+reason+`"}`)
			}
			if counted != 1 {
				t.Errorf("%v errors of the backend are counted, want 1", counted)
			}
			g.do("GET", "/v1/memories", http.Header{"Authorization": {strings.TrimPrefix(key, "Authorization: ")}}).wantCode(t, http.StatusOK, "")
			if got := backend.uploads.Load(); got != 1 {
				t.Errorf("the upload was sent %d times", got)
			}
		})
	}
}

// resetConnection ends a request as a server that breaks off does.
func resetConnection(t *testing.T, w http.ResponseWriter) {
	t.Helper()
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	_ = conn.(*net.TCPConn).SetLinger(0)
	_ = conn.Close()
}

// uploadBackend answers requests without a body. With one it resets the connection, or reads until the gateway gives it up.
type uploadBackend struct {
	listener net.Listener
	uploads  atomic.Int64
	broken   chan struct{} // is closed once the first upload's connection is
}

func newUploadBackend(t *testing.T, patient bool) *uploadBackend {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &uploadBackend{listener: listener, broken: make(chan struct{})}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength == 0 {
			_, _ = io.WriteString(w, "{}")
			return
		}
		if b.uploads.Add(1) == 1 {
			defer close(b.broken)
		}
		if patient {
			_, _ = io.Copy(io.Discard, r.Body)
			return
		}
		resetConnection(t, w)
	})
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return b
}

func TestBackendThatFailsByItselfIsTakenAwayWhateverItWasSent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := bearer(r.key("production", "memories:read", "memories:write"))
	hang := key.Clone()
	hang.Set("X-Demo", "hang")
	resetting := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	t.Cleanup(resetting.Close)
	for name, tc := range map[string]struct {
		address, method, body string
		header                http.Header
	}{
		"no connection":    {fmt.Sprint("127.0.0.1:", process.FreePort(t)), "POST", "body", key},
		"no answer":        {r.production.Address(), "POST", "body", hang},
		"connection ended": {resetting.Listener.Addr().String(), "GET", "", key},
	} {
		t.Run(name, func(t *testing.T) {
			g := r.of(t).start("http://:PORT {\nbind 127.0.0.1\n" + block("reverse_proxy "+tc.address+
				" {\nfail_duration 1h\nmax_fails 1\ntransport http {\nresponse_header_timeout 100ms\n}\n}\n", "respond 418") + "}\n")
			g.do("GET", "/v1/nothing", key).wantCode(t, http.StatusForbidden, "ROUTE_NOT_COVERED") // after which the key is known
			if answer := do(t, tc.method, g.http+"/v1/memories", tc.header, strings.NewReader(tc.body)); answer.StatusCode < 502 {
				t.Errorf("the answer of a backend that fails is %d", answer.StatusCode)
			}
			g.do("GET", "/v1/memories", key).wantCode(t, http.StatusBadGateway, "UPSTREAM_UNAVAILABLE")
			eventually.True(t, "the backend is not asked again", func() bool { return strings.Contains(g.log.String(), "no upstreams available") })
		})
	}
}

func TestProxyWithoutOurTransportThatCountsErrorsOfClientsIsWarnedOf(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const warning = "counts errors of clients as failures of its backends"
	for transport, warned := range map[string]bool{"http": true, "rekall production": false, "fastcgi": true} {
		g := r.start("&(proxy) {\n reverse_proxy PRODUCTION {\n fail_duration 1h\n transport " + transport + "\n}\n}\n" +
			"http://:PORT {\nbind 127.0.0.1\n" + block("invoke proxy", "reverse_proxy SANDBOX {\n fail_duration 1h\n}") + "}\n")
		if warned {
			eventually.True(t, "a warning", func() bool { return strings.Contains(g.log.String(), warning) })
		} else if strings.Contains(g.log.String(), warning) {
			t.Errorf("transport %s is warned of", transport)
		}
	}
}

func TestBodiesOfClientsWithoutAKeyThatAreReadIntoMemoryAreWarnedOf(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const taker = "log_append asked {http.request.body}\n"
	for site, warned := range map[string]bool{taker + standardBlock: true, standardBlock: false} {
		g := r.start("http://:PORT {\nbind 127.0.0.1\n" + site + "}\n")
		if got := strings.Contains(g.log.String(), "takes whole bodies into memory"); got != warned {
			t.Errorf("%s: warned of is %v", site, got)
		}
	}
}

func TestProxyThatTakesSlowClientsForFailuresOfItsBackendsIsWarnedOf(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for option, warned := range map[string]bool{"unhealthy_latency 1s": true, "unhealthy_request_count 9": true, "fail_duration 9s": false} {
		g := r.start("http://:PORT {\nbind 127.0.0.1\n" + block("reverse_proxy PRODUCTION {\n "+option+"\n}", "reverse_proxy SANDBOX") + "}\n")
		if got := strings.Contains(g.log.String(), "count slow uploads and streams"); got != warned {
			t.Errorf("%s: warned of is %v", option, got)
		}
	}
}

// TestNoHeadersOfOneClientBreakAnothersStreamOnAnHTTP2Backend has HAProxy as the backend. It tells no limit, and ends the connection
// or the request that is beyond one.
func TestNoHeadersOfOneClientBreakAnothersStreamOnAnHTTP2Backend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	certificate, key := newAuthority(t).issue("127.0.0.1")
	pem := filepath.Join(t.TempDir(), "backend.pem")
	process.Write(t, pem, string(certificate)+string(key))
	for name, tc := range map[string]struct{ bind, proxy string }{
		"h2c": {"proto h2", "h2c://%s {\n"},
		"TLS": {"ssl crt " + pem + " alpn h2", "https://%s {\n transport http {\n tls_insecure_skip_verify\n }\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := r.of(t)
			address := r.haproxy(tc.bind)
			g := r.start("http://:PORT {\nbind 127.0.0.1\n" +
				block("reverse_proxy "+fmt.Sprintf(tc.proxy, address)+" fail_duration 1h\n max_fails 1\n}", "respond 418") + "}\n")
			wantHeadersOfOneClientBreakNoStream(t, r, g)
		})
	}
}

// TestSwitchOfProtocolsOverHTTP2IsNoAnswer: to net/http's client it is information, and to its server an answer.
func TestSwitchOfProtocolsOverHTTP2IsNoAnswer(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	backend := network.Serve(t, func(conn net.Conn) {
		if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		framer := http2.NewFramer(conn, conn)
		_ = framer.WriteSettings()
		for {
			frame, err := framer.ReadFrame()
			if err != nil {
				return
			}
			if request, ok := frame.(*http2.HeadersFrame); ok {
				for _, status := range []string{"101", "204"} {
					var block bytes.Buffer
					_ = hpack.NewEncoder(&block).WriteField(hpack.HeaderField{Name: ":status", Value: status})
					_ = framer.WriteHeaders(http2.HeadersFrameParam{
						StreamID: request.StreamID, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: status == "204",
					})
				}
			}
		}
	})
	g := r.start("http://:PORT {\nbind 127.0.0.1\n" + block("reverse_proxy h2c://"+backend, "respond 418") + "}\n")
	if answer := g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))); answer.StatusCode != http.StatusNoContent {
		t.Errorf("the answer of the backend is %d", answer.StatusCode)
	}
}

// haproxy runs one in front of the production backend, and returns its address.
func (r *rig) haproxy(bind string) (address string) {
	r.t.Helper()
	address, config := process.FreeAddress(r.t), filepath.Join(r.t.TempDir(), "haproxy.cfg")
	process.Write(r.t, config, `defaults
	mode http
	timeout connect 20s
	timeout client 1h
	timeout server 1h
frontend front
	bind `+address+" "+bind+`
	default_backend back
backend back
	server one `+r.production.Address()+`
`)
	process.Start(r.t, process.Options{}, "haproxy", "-db", "-f", config)
	eventually.True(r.t, "HAProxy serves", func() bool {
		connection, err := net.Dial("tcp", address)
		if err == nil {
			_ = connection.Close()
		}
		return err == nil
	})
	return address
}

func wantHeadersOfOneClientBreakNoStream(t *testing.T, r *rig, g *gateway) {
	t.Helper()
	mine, other := r.key("production", "memories:read"), r.key("production", "memories:read")
	stream := follow(g.open("GET", "/v1/memories", demo(other, "sse"), nil))
	many := bearer(mine)
	for i := range 160 {
		many.Set(fmt.Sprintf("X-Field-%d", i), "a")
	}
	long, several, query := bearer(mine), bearer(mine), "?a="+strings.Repeat("~", 15_500)
	long.Set("X-Field", strings.Repeat("~", 9_000))
	for i := range 3 {
		several.Set(fmt.Sprintf("X-Field-%d", i), strings.Repeat("~", 5_000))
	}
	for name, request := range map[string]struct {
		target string
		header http.Header
	}{
		"one long header": {"/v1/memories", long}, "many headers": {"/v1/memories", many}, "a long query": {"/v1/memories" + query, bearer(mine)},
		"several headers that are long together": {"/v1/memories", several},
	} {
		answer := g.do("GET", request.target, request.header)
		if answer.wantCode(t, http.StatusRequestHeaderFieldsTooLarge, "HEADERS_TOO_LARGE"); t.Failed() {
			t.Fatal(name)
		}
		stream.goesOn(t)
		g.do("GET", "/v1/memories", bearer(other)).wantCode(t, http.StatusOK, "")
	}
	// What is within the limits passes.
	within := bearer(mine)
	within.Set("X-Field", strings.Repeat("~", 7_900))
	for i := range 60 {
		within.Set(fmt.Sprintf("X-Field-%d", i), strings.Repeat("~", 50))
	}
	g.do("GET", "/v1/memories", within).wantCode(t, http.StatusOK, "")
}

// TestHeadersForWhichABackendHangsUpDoNotCountAgainstIt: servers take 8 or 16 KiB of them, and Caddy a MiB. What a server answers before it
// hangs up is lost if the rest is still being written.
func TestHeadersForWhichABackendHangsUpDoNotCountAgainstIt(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	backend := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-A") == "" {
			_, _ = io.WriteString(w, "{}")
			return
		}
		resetConnection(t, w)
	})}
	go func() { _ = backend.Serve(listener) }()
	t.Cleanup(func() { _ = backend.Close() })
	g := r.start("http://:PORT {\nbind 127.0.0.1\n" + block("reverse_proxy "+listener.Addr().String()+" {\n fail_duration 1h\n max_fails 1\n}", "respond 418") + "}\n")
	key := bearer(r.key("production", "memories:read"))
	long := key.Clone()
	long.Set("X-A", strings.Repeat("a", 20_000))
	g.do("GET", "/v1/memories", long).wantCode(t, http.StatusRequestHeaderFieldsTooLarge, "HEADERS_TOO_LARGE")
	g.do("GET", "/v1/memories", key).wantCode(t, http.StatusOK, "")
	short := key.Clone()
	short.Set("X-A", "a")
	g.do("GET", "/v1/memories", short).wantCode(t, http.StatusBadGateway, "UPSTREAM_UNAVAILABLE")
	g.do("GET", "/v1/memories", key).wantCode(t, http.StatusBadGateway, "UPSTREAM_UNAVAILABLE") // it was the backend's doing
}

func TestBodyBeyondALimitInABlockIsTheClients(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start("http://:PORT {\nbind 127.0.0.1\n" +
		block("request_body {\n max_size 10B\n}\nreverse_proxy PRODUCTION {\n fail_duration 1h\n max_fails 1\n}", "respond 418") + "}\n")
	key := r.key("production", "memories:read", "memories:write")
	authorization, body := "Authorization: "+bearer(key).Get("Authorization"), strings.Repeat("a", 20)
	for name, request := range map[string]string{
		"chunked":     lines("POST /v1/memories HTTP/1.1", authorization, "Transfer-Encoding: chunked") + "14\r\n" + body + "\r\n0\r\n\r\n",
		"with length": lines("POST /v1/memories HTTP/1.1", authorization, "Content-Length: 20") + body,
	} {
		answer, _ := g.raw(request)
		if answer.wantCode(t, http.StatusRequestEntityTooLarge, "BODY_TOO_LARGE"); t.Failed() {
			t.Fatal(name)
		}
	}
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, http.StatusOK, "")
	if n := g.series(t, `rekall_upstream_errors_total{environment="production",reason="unavailable"}`); n != 0 {
		t.Errorf("%v errors of the backend are counted", n)
	}
}

// TestRequestThatCannotBeSentDoesNotCountAgainstTheBackend: by placeholders, header_up makes headers of what clients write.
func TestRequestThatCannotBeSentDoesNotCountAgainstTheBackend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := bearer(r.key("production", "memories:read"))
	for _, versions := range []string{"1.1", "h2c"} {
		g := r.start("http://:PORT {\nbind 127.0.0.1\n" + block("reverse_proxy PRODUCTION {\n header_up X-Tenant {query.tenant}\n header_up Host {query.host}\n"+
			" fail_duration 1h\n max_fails 1\n transport http {\n versions "+versions+"\n}\n}", "respond 418") + "}\n")
		for _, query := range []string{"?host=x&tenant=a%0Ab", "?host=xn--%C3%BC"} {
			g.do("GET", "/v1/memories"+query, key).wantCode(t, http.StatusBadRequest, "HEADERS_INVALID")
			g.do("GET", "/v1/memories?host=x", key).wantCode(t, http.StatusOK, "")
		}
		if n := g.series(t, `rekall_upstream_errors_total{environment="production",reason="unavailable"}`); n != 0 {
			t.Errorf("%v errors of the backend are counted", n)
		}
	}
}

// TestNothingAroundTheGatewaySeesTheKeyOrTheTokenThatBackendsGet: pages for errors may come from anywhere.
func TestNothingAroundTheGatewaySeesTheKeyOrTheTokenThatBackendsGet(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	outside := make(chan http.Header, 1)
	pages := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { outside <- r.Header.Clone() }))
	t.Cleanup(pages.Close)
	around := strings.TrimPrefix(pages.URL, "http://")
	for name, site := range map[string]string{
		"intercept": "intercept {\n @any status 2xx\n handle_response @any {\n reverse_proxy " + around + "\n}\n}\n" +
			"rekall_gateway {\n forward_credential\n identity_token\n production {\n reverse_proxy PRODUCTION\n}\n}\n",
		"handle_errors": "rekall_gateway {\n forward_credential\n identity_token\n production {\n reverse_proxy PRODUCTION {\n" +
			" @any status 2xx\n handle_response @any {\n error 404\n}\n}\n}\n}\nhandle_errors {\n reverse_proxy " + around + "\n}\n",
	} {
		g := r.start("http://:PORT {\nbind 127.0.0.1\n" + site + "}\n")
		_, _ = send("GET", g.http+"/v1/memories", bearer(r.key("production", "memories:read")), nil) // two answers in one
		seen := <-outside
		for _, header := range []string{"Authorization", "X-Rekall-Identity-Token"} {
			if value := seen.Get(header); value != "" {
				t.Errorf("%s: %s is %.20q…", name, header, value)
			}
		}
	}
}

// TestPlaceholdersInABlockTellTheIdentityThatTheGatewayFound, whichever headers the client has sent, which Caddy would tell.
func TestPlaceholdersInABlockTellTheIdentityThatTheGatewayFound(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, option := range []string{"", "identity_token\n", "forward_credential\n"} {
		g := r.start("http://:PORT {\nbind 127.0.0.1\nrekall_gateway {\n" + option +
			"production {\nmethod {header.X-HTTP-Method-Override}\nrewrite * /of/{header.X-Rekall-Account}{uri}\nreverse_proxy PRODUCTION\n}\n}\n}\n")
		spoofed := bearer(r.key("production", "memories:read"))
		spoofed.Set("X-Rekall-Account", "globex")
		spoofed.Set("X-HTTP-Method-Override", "DELETE")
		if e := g.do("GET", "/v1/memories", spoofed).echo(t); e.Method != "GET" || e.Path != "/of/acme/v1/memories" {
			t.Errorf("with %q the backend gets %s %s", option, e.Method, e.Path)
		}
	}
}

func TestHealthChecksReachAGuardedBackend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start("http://:PORT {\nbind 127.0.0.1\n" + block("reverse_proxy PRODUCTION {\n health_uri /health\n health_interval 100ms\n transport rekall production\n}", "respond 418") + "}\n")
	eventually.True(t, "the backend sees health checks", func() bool { return r.production.Requests() > 1 })
	g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))).wantCode(t, http.StatusOK, "")
}

// TestClientsUpgradeOrLongHeadersDoNotCountAgainstAnHTTP2Backend plays a customer who sends what net/http itself refuses to send
// over HTTP/2: passive health checks must not take the backend away from the others.
func TestClientsUpgradeOrLongHeadersDoNotCountAgainstAnHTTP2Backend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	cleartext, secure := http2Backend(t, (*httptest.Server).Start), http2Backend(t, (*httptest.Server).StartTLS)
	key := "Authorization: " + bearer(r.key("production", "memories:read")).Get("Authorization")
	upgrade := lines("GET /v1/memories HTTP/1.1", key, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
	for name, tc := range map[string]struct {
		proxy, before string
		upgraded      int // the answer to an upgrade, which is dropped where it cannot be
	}{
		"no transport":     {"h2c://" + cleartext + " {\n", "", http.StatusOK},
		"transport http":   {cleartext + " {\n transport http {\n versions 1.1 h2c\n }\n", "", http.StatusOK},
		"transport rekall": {cleartext + " {\n transport rekall production {\n versions h2c\n }\n", "", http.StatusOK},
		"TLS":              {secure + " {\n transport http {\n tls_insecure_skip_verify\n }\n", "", http.StatusBadGateway},
		"TLS, versions 2":  {secure + " {\n transport http {\n versions 2\n tls_insecure_skip_verify\n }\n", "", http.StatusBadGateway},
	} {
		t.Run(name, func(t *testing.T) {
			g := r.of(t).start("http://:PORT {\nbind 127.0.0.1\n" +
				block("reverse_proxy "+tc.proxy+" fail_duration 1h\n max_fails 1\n lb_try_duration 1s\n}\n", "respond 418") + "}\n")
			plain := lines("GET /v1/memories HTTP/1.1", key)
			for _, request := range []struct {
				head   string
				status int
			}{
				{plain, http.StatusOK},
				{upgrade, tc.upgraded},
				{lines("GET /v1/memories HTTP/1.1", key, "X-A: "+strings.Repeat("a", 12_000)), http.StatusRequestHeaderFieldsTooLarge},
				{plain, http.StatusOK},
			} {
				if answer, received := g.raw(request.head); answer.Response == nil || answer.StatusCode != request.status {
					t.Errorf("the answer to %.120q is %q, want %d", request.head, received, request.status)
				}
			}
			wantCalm(t, g)
		})
	}
}

// http2Backend is one that speaks nothing but HTTP/2, with headers of up to 4 KiB. It returns its address.
func http2Backend(t *testing.T, start func(*httptest.Server)) string {
	t.Helper()
	backend := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") }))
	backend.Config.MaxHeaderBytes = 4 << 10
	backend.Config.Protocols = new(http.Protocols)
	backend.Config.Protocols.SetHTTP2(true)
	backend.Config.Protocols.SetUnencryptedHTTP2(true)
	backend.EnableHTTP2 = true
	start(backend)
	t.Cleanup(backend.Close)
	return backend.Listener.Addr().String()
}

// TestHandlerThatNoRequestComesToIsWarnedOf: a gateway answers all that it is given, and what stands behind it looks as if it were in force.
func TestHandlerThatNoRequestComesToIsWarnedOf(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	some := strings.Replace(standardBlock, "rekall_gateway {", "rekall_gateway /v1/* {", 1)
	sites, text := map[string]string{
		"dead-keys":       "route {\n" + standardBlock + "rekall_keys\n}",
		"dead-gateway":    standardBlock + standardBlock,
		"dead-in-handle":  "handle /v1/* {\n" + standardBlock + standardBlock + "}",
		"dead-in-path":    "route /v1/* {\n" + standardBlock + "rekall_jwks\n}\nrekall_keys",
		"dead-invoked":    "route {\ninvoke g\ninvoke g\n}",
		"dead-in-circle":  "invoke a",
		"dead-in-groups":  "route {\nhandle {\n" + standardBlock + "}\nrekall_keys\n}",
		"alive":           "rekall_health\nrekall_jwks\nrekall_keys\n" + standardBlock,
		"alive-matcher":   "route {\n" + some + "rekall_keys\n" + standardBlock + "}",
		"alive-handles":   "handle /v1/a* {\n" + standardBlock + "}\nhandle {\n" + standardBlock + "}",
		"alive-group":     "route {\nhandle /a {\nheader A a\n}\nhandle {\n" + standardBlock + "}\nrekall_keys\n}",
		"alive-invoked":   "handle /v1/a* {\ninvoke g\n}\nhandle {\ninvoke g\n}",
		"alive-responses": "route {\nintercept {\n@no status 404\nhandle_response @no {\n" + standardBlock + "}\n}\nrekall_keys\n}",
		"alive-errors":    standardBlock + "handle_errors {\n" + standardBlock + "}",
		"alive-in-block":  block(standardBlock, standardBlock),
	}, "&(g) {\n"+standardBlock+"}\n&(a) {\nroute {\n"+standardBlock+"invoke b\n}\n}\n&(b) {\ninvoke a\n}\n"
	for name, site := range sites {
		text += "http://" + name + ".example:PORT {\nbind 127.0.0.1\n" + site + "\n}\n"
	}
	g := r.start(text)
	for name := range sites {
		warning := regexp.MustCompile(`"no request comes to a handler.*"where":"server srv0 ` + name + `\.example`)
		if n, want := len(warning.FindAllString(g.log.String(), -1)), strings.Count(name, "dead"); n != want {
			t.Errorf("%s: %d warnings, want %d\n%s", name, n, want, sites[name])
		}
	}
}

package test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/test/process"
)

// startPublic runs a Caddyfile for api.rekall.ai, whose base URL is that of the HTTP port. No certificate can be had.
func (r *rig) startPublic(text string) *gateway {
	r.t.Helper()
	g := r.write("", "")
	_, port, _ := strings.Cut(strings.TrimPrefix(g.http, "http://"), ":")
	global := fmt.Sprintf("{\n\tadmin %s\n\tpersist_config off\n\tdefault_bind 127.0.0.1\n\thttp_port %s\n\thttps_port %d\n\tstorage file_system %s\n"+
		"\tacme_ca https://127.0.0.1:1/directory\n", strings.TrimPrefix(g.admin, "http://"), port, process.FreePort(r.t), filepath.Dir(g.file))
	process.Write(r.t, g.file, strings.Replace("\n"+text, "\n{\n", "\n"+global, 1))
	g.env = []string{"REKALL_ADMIN_DATABASE_URL=" + r.database}
	g.run(r.database)
	g.waitReady()
	return g
}

func toHost(host, path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n"
}

func TestPlainHTTPIsRefusedWhateverHostItNamesAsTheExampleIsConfigured(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t).startPublic(string(example))
	for _, request := range []string{
		toHost("api.rekall.ai", "/v1/memories"), toHost("api.rekall.ai.", "/v1/memories"), toHost("API.rekall.ai:80", "/v1/memories"),
		toHost("other.example", "/v1/memories"), "GET /v1/memories HTTP/1.0\r\n\r\n",
	} {
		answer, received := g.raw(request)
		answer.wantCode(t, http.StatusForbidden, "TLS_REQUIRED")
		if strings.Contains(received, "Location:") {
			t.Errorf("redirected: %s", received)
		}
	}
	dir := filepath.Join(filepath.Dir(g.file), "acme", "127.0.0.1-1-directory", "challenge_tokens")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	process.Write(t, filepath.Join(dir, "api.rekall.ai.json"), `{"type": "http-01", "identifier": {"type": "dns", "value": "api.rekall.ai"}, "token": "token", "keyAuthorization": "token.of-the-account"}`)
	challenge, _ := g.raw(toHost("api.rekall.ai", "/.well-known/acme-challenge/token"))
	if challenge.StatusCode != http.StatusOK || challenge.body != "token.of-the-account" {
		t.Errorf("a challenge of the certificate authority is answered %d %s", challenge.StatusCode, challenge.body)
	}
}

func TestGatewayWhosePlainHTTPCaddyRedirectsIsWarnedOf(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const gateway = "api.rekall.ai, *.rekall.ai:443 {\nroute {\nrekall_gateway {\nproduction {\nreverse_proxy prod-1:8080\n}\n}\n}\n}\n" +
		"www.example {\nrespond ok\n}\n"
	for name, tc := range map[string]struct {
		global, site string
		redirected   bool
	}{
		"as Caddy comes":                        {"", "", true},
		"refused, but for Caddy's redirects":    {"", "http:// {\nrekall_tls_only\n}\n", true},
		"refused for another host":              {"", "http://www.example {\nrekall_tls_only\n}\n", true},
		"refused, and nothing is redirected":    {"auto_https disable_redirects", "http:// {\nrekall_tls_only\n}\n", false},
		"refused for the gateway's hosts":       {"", "http://api.rekall.ai, http://*.rekall.ai {\nrekall_tls_only\n}\n", false},
		"nobody listens at the plain HTTP port": {"auto_https disable_redirects", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			g := r.of(t).startPublic("{\n" + tc.global + "\n}\n" + tc.site + gateway)
			warnings := strings.Count(g.log.String(), "set auto_https disable_redirects in the global options, and add a site http:// with rekall_tls_only")
			if warnings != map[bool]int{true: 1}[tc.redirected] {
				t.Errorf("%d warnings", warnings)
			}
			if tc.global == "" {
				answer, _ := g.raw(toHost("api.rekall.ai", "/v1/memories"))
				if redirected := answer.StatusCode == http.StatusPermanentRedirect; redirected != tc.redirected {
					t.Errorf("answer %d", answer.StatusCode)
				}
			}
		})
	}
}

// TestGatewayThatIsServedWithoutTLSIsNotSaidToBeRedirected: it stands behind what ends TLS, and Caddy redirects the hosts of others only.
func TestGatewayThatIsServedWithoutTLSIsNotSaidToBeRedirected(t *testing.T) {
	t.Parallel()
	g := newRig(t).startPublic("{\n}\nhttp://api.rekall.ai {\nrekall_gateway {\nproduction {\nrespond ok\n}\n}\n}\nhttps:// {\nrespond ok\n}\n")
	if answer, _ := g.raw(toHost("other.example", "/")); answer.StatusCode != http.StatusPermanentRedirect {
		t.Errorf("another host is answered %d: the test shows nothing", answer.StatusCode)
	}
	if answer, _ := g.raw(toHost("api.rekall.ai", "/v1/memories")); answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("answer %d", answer.StatusCode)
	}
	if strings.Contains(g.log.String(), "go on sending keys in the clear") {
		t.Error("the log says that it is redirected")
	}
}

// TestConfigurationsInTheDocumentsRefusePlainHTTP where they stand by themselves; those for backends show one site.
func TestConfigurationsInTheDocumentsRefusePlainHTTP(t *testing.T) {
	t.Parallel()
	const deploy = "../cmd/rekall-gateway/deploy/"
	configs := []string{strings.ReplaceAll(process.Read(t, deploy+"kubernetes.yaml"), "\n    ", "\n")}
	for _, page := range []string{"../README.md", guides[0], deploy + "README.md"} {
		configs = append(configs, blocksOf(t, page, "caddyfile")...)
	}
	for _, config := range configs {
		if !strings.Contains(config, "rekall_gateway {") {
			continue
		}
		site := regexp.MustCompile(`(?m)^http:// \{\n(\tbind \S+\n)?\trekall_tls_only\b`)
		if !site.MatchString(config) || !strings.Contains(config, "\n\tauto_https disable_redirects\n") {
			t.Errorf("plain HTTP is redirected:\n%s", config)
		}
	}
}

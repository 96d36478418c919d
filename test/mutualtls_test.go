package test

import (
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/rekall-ai/gateway/test/eventually"
)

// exampleTLS returns the lines about mutual TLS in Caddyfile.example, with the test's files in them.
func exampleTLS(t *testing.T, files *strings.Replacer) string {
	t.Helper()
	example, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^\s*# (tls.*)$`).FindAllStringSubmatch(string(example), -1)
	if len(found) != 3 {
		t.Fatalf("Caddyfile.example has %d lines about TLS to backends, want 3", len(found))
	}
	var b strings.Builder
	for _, line := range found {
		b.WriteString(files.Replace(line[1]) + "\n")
	}
	return b.String()
}

func TestBackendTakesRequestsFromTheGatewayOnlyWithTheExampleFilesMutualTLS(t *testing.T) {
	t.Parallel()
	r, ca, stranger := newRig(t), newAuthority(t), newAuthority(t)
	var checks atomic.Int64
	backend := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/health" {
			checks.Add(1)
		}
		for _, certificate := range req.TLS.PeerCertificates {
			w.Header().Add("Caller", certificate.DNSNames[0])
		}
	}))
	backend.TLS = &tls.Config{
		Certificates: []tls.Certificate{ca.pair("127.0.0.1")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.pool(),
	}
	backend.StartTLS()
	t.Cleanup(backend.Close)
	address := backend.Listener.Addr().String()

	site := func(t *testing.T, transport string, edgeCA *authority) *gateway {
		t.Helper()
		certificate, key := edgeCA.issue("edge.internal")
		options := exampleTLS(t, strings.NewReplacer("/etc/rekall/edge.crt", edgeCA.save("edge.crt", certificate),
			"/etc/rekall/edge.key", edgeCA.save("edge.key", key), "/etc/rekall/backends-ca.crt", ca.file))
		return r.of(t).start(`
http://:PORT {
	bind 127.0.0.1
	rekall_gateway {
		production {
			reverse_proxy ` + address + ` {
				health_uri /health
				health_interval 100ms
				transport ` + transport + ` {
					` + options + `
				}
			}
		}
	}
}
`)
	}
	for _, transport := range []string{"http", "rekall production"} {
		t.Run(transport, func(t *testing.T) {
			g, before := site(t, transport, ca), checks.Load()
			answer := g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read")))
			if answer.StatusCode != 200 || answer.Header.Get("Caller") != "edge.internal" {
				t.Errorf("answer %d to %q", answer.StatusCode, answer.Header.Get("Caller"))
			}
			eventually.True(t, "health checks pass as well", func() bool { return checks.Load() > before+1 })
		})
	}
	t.Run("another's certificate", func(t *testing.T) {
		g := site(t, "rekall production", stranger)
		g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))).wantCode(t, 502, "UPSTREAM_UNAVAILABLE")
	})
	for name, certificates := range map[string][]tls.Certificate{"without one": nil, "with another's": {stranger.pair("edge.internal")}} {
		direct := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.pool(), Certificates: certificates}}}
		if resp, err := direct.Get(backend.URL); err == nil {
			_ = resp.Body.Close()
			t.Errorf("a caller %s got in", name)
		}
		direct.CloseIdleConnections()
	}
}

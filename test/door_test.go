package test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/network"
)

// raw sends bytes over a connection of their own. It returns the first answer, or a zero reply if there is none, and
// everything that was received.
func (g *gateway) raw(request string) (reply, string) {
	g.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(g.http, "http://"))
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		g.t.Fatal(err)
	}
	go func() { _, _ = io.WriteString(conn, request) }() // the answer may come before the server has read it all
	var received bytes.Buffer
	method, _, _ := strings.Cut(request, " ") // an answer to HEAD has no body
	resp, err := http.ReadResponse(bufio.NewReader(io.TeeReader(conn, &received)), &http.Request{Method: method})
	if err != nil {
		return reply{}, received.String()
	}
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatalf("read the answer: %v", err)
	}
	return reply{resp, string(content)}, received.String()
}

// lines joins a request line and headers to a request without a body.
func lines(line string, headers ...string) string {
	return strings.Join(append([]string{line, "Host: api.example"}, headers...), "\r\n") + "\r\n\r\n"
}

// oddPaths are those with more than one reading: "" as their code is an answer of the server, before there is a request.
var oddPaths = map[string]string{
	"/v1/memories/..":                              "PATH_INVALID",
	"/v1/memories/../entities":                     "PATH_INVALID",
	"/v1/./memories":                               "PATH_INVALID",
	"/v1/memories/.":                               "PATH_INVALID",
	"//v1/memories":                                "PATH_INVALID",
	"/v1//memories":                                "PATH_INVALID",
	"/v1/memories//":                               "PATH_INVALID",
	"/v1/memories/%2e%2e":                          "PATH_INVALID",
	"/v1/memories/%2E./entities":                   "PATH_INVALID",
	"/v1/memories%2fx":                             "PATH_INVALID",
	"/v1/memories%2Fx":                             "PATH_INVALID",
	"/v1/memories%5c..":                            "PATH_INVALID",
	`/v1/memories\..\entities`:                     "PATH_INVALID",
	"/v1/memories%00":                              "PATH_INVALID",
	"/v1/memories%0d%0aX-A:b":                      "PATH_INVALID",
	"/v1/memories%252e":                            "PATH_INVALID",
	"/v1/memories.":                                "PATH_INVALID",
	"/v1/memories...":                              "PATH_INVALID",
	"/v1/memories;a=b":                             "PATH_INVALID",
	"/v1;x/memories":                               "PATH_INVALID",
	"/v1/memories%3ba=b":                           "PATH_INVALID",
	"/v1/memories%3Fx=1":                           "PATH_INVALID",
	"/v1/memories%23":                              "PATH_INVALID",
	"/v1/memories#x":                               "PATH_INVALID",
	"/v1/%6demories":                               "PATH_INVALID",
	"/v1/memories/%ff":                             "PATH_INVALID",
	"/v1/memories/%c0%ae%c0%ae":                    "PATH_INVALID",
	"/v1/memories/\xff":                            "PATH_INVALID",
	"*":                                            "PATH_INVALID",
	"/v1/memories/" + strings.Repeat("a", 4000):    "PATH_INVALID",
	"/v1/memories/rk_" + strings.Repeat("a", 45):   "PATH_INVALID",
	"/v1/memories/%72k_" + strings.Repeat("a", 45): "PATH_INVALID",
	"/v1/memories/rk_test_" + strings.Repeat("a", 40): "PATH_INVALID",
	"/v1/memories%zz": "",
	"v1/memories":     "",
	"":                "",
	"?x=1":            "",
	"http://":         "PATH_INVALID",
	"http://user:pass@api.example/v1/memories/../x": "PATH_INVALID",
	"http://api.example//v1/memories":               "PATH_INVALID",
	"http:v1/memories":                              "PATH_INVALID",
	"file:///v1/memories/..":                        "PATH_INVALID",
}

func TestOddPathsAreRefusedWithoutContactingABackend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	authorization := "Authorization: " + bearer(r.key("production", "memories:read", "entities:read")).Get("Authorization")
	for path, code := range oddPaths {
		for _, version := range []string{"HTTP/1.1", "HTTP/1.0"} {
			answer, received := g.raw(lines("GET "+path+" "+version, authorization))
			switch {
			case answer.Response == nil:
				t.Errorf("GET %q %s: no answer, %q", path, version, received)
			case code == "" && answer.StatusCode != http.StatusBadRequest:
				t.Errorf("GET %q %s: %d %s", path, version, answer.StatusCode, answer.body)
			case code != "":
				if got := answer.code(t); got != code {
					t.Errorf("GET %q %s: %d %s, want %s", path, version, answer.StatusCode, got, code)
				}
			}
		}
	}
	if n := r.production.Requests() + r.sandbox.Requests(); n != 0 {
		t.Errorf("backends were contacted %d times", n)
	}
	wantCalm(t, g)
}

// wantCalm wants no panic in the log.
func wantCalm(t *testing.T, g *gateway) {
	t.Helper()
	if log := g.log.String(); strings.Contains(log, "panic") || strings.Contains(log, "goroutine ") {
		t.Errorf("a panic:\n%s", tail(log, 4000))
	}
}

// TestClientsThatHangUpDoNotLookLikeAnOutage: anybody can hang up, and nobody is to be paged for it.
func TestClientsThatHangUpDoNotLookLikeAnOutage(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	const clients = 50
	for range clients {
		conn, err := net.Dial("tcp", strings.TrimPrefix(g.http, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, lines("GET /v1/memories HTTP/1.1", "X-Api-Key: "+apikey.Generate(apikey.Production)))
		_ = conn.Close()
	}
	count := func(outcome string) float64 {
		return g.series(t, `rekall_decisions_total{environment="production",outcome="`+outcome+`"}`)
	}
	eventually.True(t, "all are decided", func() bool { return count("unknown")+count("abandoned")+count("unavailable") == clients })
	if n := count("unavailable"); n > 0 {
		t.Errorf("%v requests of clients that have left could not be told", n)
	}
}

// TestBackendSeesWhatWasDecidedOn compares what was sent with what the backend received, byte for byte.
func TestBackendSeesWhatWasDecidedOn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	authorization := "Authorization: " + bearer(r.key("production", "memories:read")).Get("Authorization")
	many := strings.Repeat("a=1&", 2000) + "b"
	for _, tc := range []struct{ target, path, query string }{
		{"/v1/memories", "/v1/memories", ""},
		{"/v1/memories?", "/v1/memories", ""},
		{"/v1/memories/%3A", "/v1/memories/%3A", ""},
		{"/v1/memories/%C3%A9", "/v1/memories/%C3%A9", ""},
		{"/v1/memories/%c3%a9", "/v1/memories/%c3%a9", ""},
		{"/v1/memories/%40x", "/v1/memories/%40x", ""},
		{"/v1/memories/a+b", "/v1/memories/a+b", ""},
		{"/v1/memories/a:b@c!$&'()*,=", "/v1/memories/a:b@c!$&'()*,=", ""},
		{"/v1/memories/..a", "/v1/memories/..a", ""},
		{"/v1/memories/a.b", "/v1/memories/a.b", ""},
		{"/v1/memories/~a_b-c", "/v1/memories/~a_b-c", ""},
		{"/v1/memories?a=1;b=2;;c&&d=%zz&e=%00&=x&é=1", "/v1/memories", "a=1;b=2;;c&&d=%zz&e=%00&=x&é=1"},
		{"/v1/memories?_method=DELETE&x=../..//%2e%2e", "/v1/memories", "_method=DELETE&x=../..//%2e%2e"},
		{"/v1/memories?" + many, "/v1/memories", many},
		{"/v1/memories/é\"", "/v1/memories/%C3%A9%22", ""}, // escaped before the decision
		{"http://api.example/v1/memories?a", "/v1/memories", "a"},
		{"http:/v1/memories", "/v1/memories", ""},
		{"http://user:pass@other.example:1/v1/memories", "/v1/memories", ""},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			for _, version := range []string{"HTTP/1.1", "HTTP/1.0"} {
				before := r.production.Requests()
				answer, received := g.raw(lines(method+" "+tc.target+" "+version, authorization, "Connection: close"))
				if answer.Response == nil || answer.StatusCode != http.StatusOK || r.production.Requests()-before != 1 {
					t.Errorf("%s %.60q %s: %q", method, tc.target, version, tail(received, 600))
					continue
				}
				if method == "HEAD" {
					continue
				}
				if e := answer.echo(t); e.Method != method || e.Path != tc.path || e.Query != tc.query {
					t.Errorf("%s %.60q %s: the backend received %s %q ?%.60q", method, tc.target, version, e.Method, e.Path, e.Query)
				}
			}
		}
	}
}

func TestTricksAtTheDoorHaveADefinedAnswer(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	secret, other := r.key("production", "memories:read", "memories:write"), r.key("production", "memories:read")
	key, second := secret.Key.Reveal(), other.Key.Reveal()
	auth := "Authorization: Bearer " + key
	const get = "GET /v1/memories HTTP/1.1"
	for _, tc := range []struct {
		name, request string
		status        int
		code          string // "" is an answer of the backend, or of the server
	}{
		{"TRACE", lines("TRACE /v1/memories HTTP/1.1", auth), 405, "METHOD_NOT_ALLOWED"},
		{"CONNECT", "CONNECT api.example:443 HTTP/1.1\r\nHost: api.example:443\r\n" + auth + "\r\n\r\n", 405, "METHOD_NOT_ALLOWED"},
		{"CONNECT to a path", lines("CONNECT /v1/memories HTTP/1.1", auth), 405, "METHOD_NOT_ALLOWED"},
		{"OPTIONS *", lines("OPTIONS * HTTP/1.1", auth), 200, ""},
		{"unknown method", lines("FETCH /v1/memories HTTP/1.1", auth), 405, "METHOD_NOT_ALLOWED"},
		{"lower case", lines("get /v1/memories HTTP/1.1", auth), 405, "METHOD_NOT_ALLOWED"},
		{"bad method", lines("G(T /v1/memories HTTP/1.1", auth), 400, ""},
		{"no version", "GET /v1/memories\r\n\r\n", 400, ""},
		{"HTTP/0.9", lines("GET /v1/memories HTTP/0.9", auth), 505, ""},
		{"HTTP/1.2", lines("GET /v1/memories HTTP/1.2", auth), 200, ""},
		{"HTTP/2.0", lines("GET /v1/memories HTTP/2.0", auth), 505, ""},
		{"no host", get + "\r\n" + auth + "\r\n\r\n", 400, ""},
		{"HTTP/1.0 without a host", "GET /v1/memories HTTP/1.0\r\n" + auth + "\r\n\r\n", 200, ""},
		{"two hosts", lines(get, auth, "Host: b"), 400, ""},
		{"no key", lines(get), 401, "API_KEY_MISSING"},
		{"key twice", lines(get, auth, auth), 200, ""},
		{"two keys", lines(get, auth, "Authorization: Bearer "+second), 400, "API_KEY_AMBIGUOUS"},
		{"key and garbage", lines(get, auth, "Authorization: Bearer x"), 400, "API_KEY_AMBIGUOUS"},
		{"key and Basic", lines(get, auth, "Authorization: Basic dTpw"), 200, ""},
		{"list", lines(get, auth+", Bearer "+second), 401, "API_KEY_INVALID"},
		{"list of schemes", lines(get, "Authorization: Basic dTpw, Bearer "+key), 401, "API_KEY_INVALID"},
		{"tab", lines(get, "Authorization: Bearer\t"+key), 200, ""},
		{"spaces", lines(get, "Authorization:    bEaReR    "+key+"   "), 200, ""},
		{"no-break space", lines(get, "Authorization: Bearer \u00a0"+key), 401, "API_KEY_INVALID"},
		{"quotes", lines(get, `Authorization: Bearer "`+key+`"`), 401, "API_KEY_INVALID"},
		{"folded", lines(get, "Authorization: Bearer\r\n "+key), 200, ""},
		{"folded key", lines(get, "X-Api-Key: "+key[:20]+"\r\n "+key[20:]), 401, "API_KEY_INVALID"},
		{"NUL", lines(get, "X-Api-Key: "+key+"\x00"), 400, ""},
		{"NUL elsewhere", lines(get, auth, "X-A: \x00"), 400, ""},
		{"non-ASCII name", lines(get, auth, "X-Ä: 1"), 400, ""},
		{"non-ASCII value", lines(get, auth, "X-A: \xff\xfe"), 200, ""},
		{"space before the colon", lines(get, "X-Api-Key : "+key), 400, ""},
		{"no colon", lines(get, auth, "X-A"), 400, ""},
		{"bare LF", strings.ReplaceAll(lines(get, auth), "\r\n", "\n"), 200, ""},
		{"underscores in the name", lines(get, "X_Api_Key: "+key), 401, "API_KEY_MISSING"},
		{"1 MiB header", lines(get, auth, "X-A: "+strings.Repeat("a", 1<<20)), 431, ""},
		{"100,000 headers", lines(get, strings.Repeat("X-A: 1\r\n", 100_000)+auth), 431, ""},
		{"10,000 parameters", lines("GET /v1/memories?"+strings.Repeat("a=1&", 10_000)+"b HTTP/1.1", auth), 431, ""},
		{"10,000 empty parameters", lines("GET /v1/memories?"+strings.Repeat("&", 10_000)+" HTTP/1.1", auth), 200, ""},
		{"1,500 empty keys", lines("GET /v1/memories?" + strings.Repeat("api_key=&", 1_500) + "api_key=" + key + " HTTP/1.1"), 200, ""},
		{"two lengths", lines("POST /v1/memories HTTP/1.1", auth, "Content-Length: 1", "Content-Length: 2") + "ab", 400, ""},
		{"negative length", lines("POST /v1/memories HTTP/1.1", auth, "Content-Length: -1"), 400, ""},
		{"chunked twice", lines("POST /v1/memories HTTP/1.1", auth, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + "0\r\n\r\n", 501, ""},
		{"unknown encoding", lines("POST /v1/memories HTTP/1.1", auth, "Transfer-Encoding: xchunked") + "0\r\n\r\n", 501, ""},
		{"key in trailers only", lines("POST /v1/memories HTTP/1.1", "Transfer-Encoding: chunked", "Trailer: Authorization, X-Api-Key") +
			"0\r\n" + auth + "\r\nX-Api-Key: " + key + "\r\n\r\n", 401, "API_KEY_MISSING"},
		{"h2c", lines(get, auth, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"), 200, ""},
		{"expectation", lines(get, auth, "Expect: 200-maybe"), 417, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := r.production.Requests() + r.sandbox.Requests()
			answer, received := g.raw(tc.request)
			if answer.Response == nil {
				t.Fatalf("no answer: %q", received)
			}
			if answer.StatusCode != tc.status {
				t.Errorf("answer %d %s, want %d %s", answer.StatusCode, tail(answer.body, 500), tc.status, tc.code)
			}
			if tc.code != "" {
				answer.wantCode(t, tc.status, tc.code)
			}
			reached := r.production.Requests() + r.sandbox.Requests() - before
			if wanted := tc.status == 200 && tc.name != "OPTIONS *"; (reached == 1) != wanted || reached > 1 {
				t.Errorf("a backend was contacted %d times", reached)
			}
			if strings.Contains(received, key) {
				t.Error("the answer holds the key")
			}
		})
	}
	wantCalm(t, g)
}

// TestLongRequestsAreDecidedOnInTimeWhereTheyAreLetIn raises the limit that refuses them first.
func TestLongRequestsAreDecidedOnInTimeWhereTheyAreLetIn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.prepare(standardSite)
	text, err := os.ReadFile(g.file)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("persist_config off"), []byte("persist_config off\nservers {\nmax_header_size 4MiB\n}"), 1)
	if err := os.WriteFile(g.file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	g.run(r.database)
	g.waitReady()
	key := r.key("production", "memories:read").Key.Reveal()
	auth := "Authorization: Bearer " + key
	const get = "GET /v1/memories HTTP/1.1"
	var different strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&different, "api_key=rk_%045d&", i)
	}
	for _, tc := range []struct {
		name, request string
		status        int
		code          string
	}{
		{"10,000 parameters", lines("GET /v1/memories?"+strings.Repeat("a=1&", 10_000)+"b HTTP/1.1", auth), 200, ""},
		{"10,000 parameters, semicolons", lines("GET /v1/memories?" + strings.Repeat("a=1;", 10_000) + "api_key=" + key + " HTTP/1.1"), 200, ""},
		{"10,000 keys, the same", lines("GET /v1/memories?" + strings.Repeat("api_key="+key+"&", 10_000) + " HTTP/1.1"), 200, ""},
		{"10,000 keys, different", lines("GET /v1/memories?" + different.String() + " HTTP/1.1"), 400, "API_KEY_AMBIGUOUS"},
		{"a key, escaped 10,000 times over", lines("GET /v1/memories?"+strings.Repeat("%72%6b_"+key[3:], 10_000)+" HTTP/1.1", auth), 200, ""},
		{"beginnings of keys", lines("GET /v1/memories?"+strings.Repeat("rk_", 200_000)+"%61 HTTP/1.1", auth), 200, ""},
		{"half a MiB of a header", lines(get, auth, "X-A: "+strings.Repeat("rk_test_", 1<<16)), 200, ""},
		{"a MiB of a credential", lines(get, "Authorization: Bearer "+strings.Repeat(key, 1<<14)), 401, "API_KEY_INVALID"},
		{"a MiB of a path", lines("GET /v1/memories/"+strings.Repeat("rk_/", 1<<18)+" HTTP/1.1", auth), 400, "PATH_INVALID"},
		{"a MiB of a method", lines(strings.Repeat("GET", 1<<18)+" /v1/memories HTTP/1.1", auth), 405, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answer, received := g.raw(tc.request)
			if answer.Response == nil {
				t.Fatalf("no answer: %q", tail(received, 500))
			}
			if tc.code == "" && answer.StatusCode != tc.status {
				t.Errorf("answer %d %s, want %d", answer.StatusCode, tail(answer.body, 500), tc.status)
			}
			if tc.code != "" {
				answer.wantCode(t, tc.status, tc.code)
			}
			if strings.Contains(received, key) {
				t.Error("the answer holds the key")
			}
		})
	}
	wantCalm(t, g)
}

func TestHTTP3IsNeitherOfferedNorServed(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.startTLS(standardSite)
	answer := g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read")))
	answer.wantCode(t, http.StatusOK, "")
	if offer := answer.Header.Values("Alt-Svc"); offer != nil {
		t.Errorf("Alt-Svc %q", offer)
	}
	address := "127.0.0.1:" + g.http[strings.LastIndexByte(g.http, ':')+1:]
	conn, err := net.ListenPacket("udp", address) // would fail if the gateway had it
	if err != nil {
		t.Fatalf("is there a QUIC listener? %v", err)
	}
	_ = conn.Close()
}

func TestNoSpellingOfAnIdentityHeaderReachesTheBackend(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	key := r.key("production", "memories:read", "memories:write")
	auth := "Authorization: " + bearer(key).Get("Authorization")
	var spoofed []string
	for _, name := range []string{
		"X-Rekall-Key-Id", "x-rekall-key-id", "X-REKALL-ACCOUNT", "X-Rekall-Environment", "X-Rekall-Scopes", "X-Rekall-New", "X-Request-Id",
		"X_Rekall_Key_Id", "X-Rekall_Key.Id", "x.rekall.account", "X_REQUEST_ID", "X-Rekall-Version-", "X-Rekall_Version",
		"X!Rekall!Key!Id", "x~rekall^account", "X-Rekall|Scopes", "X'Request`Id", "X-Rekall*New",
		"X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X_Http_Method_Override", "X!HTTP!Method", "X-Original-Method",
		"X-Forwarded-Method", "Grpc-Metadata-X-Rekall-Account", "grpc_metadata.x_rekall_scopes", "Grpc-Metadata-X-Request-Id",
	} {
		spoofed = append(spoofed, name+": spoofed", name+": spoofed, again")
	}
	for name, request := range map[string]string{
		"headers":               lines("GET /v1/memories HTTP/1.1", append(spoofed, auth)...),
		"Connection names ours": lines("GET /v1/memories HTTP/1.1", auth, "Connection: X-Rekall-Key-Id, X-Rekall-Account, X-Request-Id", "Connection: X-Rekall-Scopes, X-Rekall-Environment"),
		"with an upgrade":       lines("GET /v1/memories HTTP/1.1", auth, "Connection: Upgrade, X-Rekall-Key-Id, X-Rekall-Account, X-Request-Id", "Upgrade: websocket", "Connection: X-Rekall-Scopes", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"),
		"trailers": lines("POST /v1/memories HTTP/1.1", auth, "Transfer-Encoding: chunked", "Trailer: X-Rekall-Key-Id, X-Other") +
			"2\r\nab\r\n0\r\nX-Rekall-Key-Id: spoofed\r\nX-Other: spoofed\r\nx-rekall-scopes: spoofed\r\n\r\n",
		"TE trailers": lines("POST /v1/memories HTTP/1.1", auth, "TE: trailers", "Transfer-Encoding: chunked", "Trailer: X-Other") +
			"0\r\nX-Other: spoofed\r\nX-Rekall-Account: spoofed\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			answer, received := g.raw(request)
			if answer.Response == nil || answer.StatusCode != http.StatusOK {
				t.Fatalf("answer %q", received)
			}
			wantIdentity(t, answer, key.ID)
		})
	}
}

// wantIdentity wants the backend to have received the gateway's word and no other.
func wantIdentity(t *testing.T, answer reply, id string) {
	t.Helper()
	e := answer.echo(t)
	if strings.Contains(answer.body, "spoofed") || len(e.Trailers) != 0 {
		t.Errorf("the backend received %v, trailers %v", e.Headers, e.Trailers)
	}
	for name, wanted := range map[string]string{
		"X-Rekall-Key-Id": id, "X-Rekall-Account": "acme", "X-Rekall-Environment": e.Backend, "X-Request-Id": answer.Header.Get("X-Request-Id"),
	} {
		if got := e.Headers[name]; len(got) != 1 || got[0] != wanted {
			t.Errorf("the backend received %s %q, want %q", name, got, wanted)
		}
	}
	for _, name := range []string{"Http2-Settings", "Trailer"} {
		if v, ok := e.Headers[name]; ok {
			t.Errorf("the backend received %s %q", name, v)
		}
	}
	if upgrade := e.Headers.Get("Upgrade"); upgrade != "" && upgrade != "websocket" {
		t.Errorf("the backend received Upgrade %q", upgrade)
	}
}

// TestHeadersThatRedirectABackendDoNotReachIt is about those that some frameworks take for the request's path.
func TestHeadersThatRedirectABackendDoNotReachIt(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	h := bearer(r.key("production", "memories:read"))
	names := []string{"X-Original-Url", "X-Original-Uri", "X-Rewrite-Url", "X-Rewrite-Uri", "X-Override-Url", "X-Forwarded-Uri", "X-Forwarded-Path",
		"X-Envoy-Original-Path", "X-Script-Name", "X.original.url", "X!rewrite!url"}
	for _, name := range names {
		h[name] = []string{"/v1/entities"}
	}
	e := g.do("GET", "/v1/memories", h).echo(t)
	for _, name := range names {
		if v := e.Headers[name]; v != nil {
			t.Errorf("the backend received %s %s", name, v)
		}
	}
}

func TestEachRequestOfAConnectionIsDecidedOnItsOwn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	auth := "Authorization: " + bearer(r.key("production", "memories:read", "memories:write")).Get("Authorization")
	hidden := lines("GET /v1/memories/hidden HTTP/1.1", "Connection: close")
	for name, request := range map[string]string{
		"pipelined":          lines("GET /v1/memories HTTP/1.1", auth) + hidden,
		"after a length":     lines("POST /v1/memories HTTP/1.1", auth, "Content-Length: 2") + "ab" + hidden,
		"after chunks":       lines("POST /v1/memories HTTP/1.1", auth, "Transfer-Encoding: chunked") + "0\r\n\r\n" + hidden,
		"length and chunks":  lines("POST /v1/memories HTTP/1.1", auth, "Content-Length: 100", "Transfer-Encoding: chunked") + "0\r\n\r\n" + hidden,
		"body of a GET":      lines("GET /v1/memories HTTP/1.1", auth, fmt.Sprintf("Content-Length: %d", len(hidden))) + hidden,
		"h2c upgrade":        lines("GET /v1/memories HTTP/1.1", auth, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA") + hidden,
		"unfinished upgrade": lines("GET /v1/memories HTTP/1.1", auth, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13") + hidden,
	} {
		t.Run(name, func(t *testing.T) {
			before := r.production.Requests()
			answer, received := g.raw(request)
			if answer.Response == nil || answer.StatusCode != http.StatusOK {
				t.Fatalf("answer %q", received)
			}
			if e := answer.echo(t); strings.Contains(e.Path, "hidden") {
				t.Error("the hidden request was answered")
			}
			// What follows on the connection is answered by the gateway, or not at all.
			if n := r.production.Requests() - before; n != 1 {
				t.Errorf("the backend was contacted %d times", n)
			}
			if got := r.sandbox.Requests(); got != 0 {
				t.Errorf("the sandbox was contacted %d times", got)
			}
		})
	}
}

// TestRestOfABodyThatNobodyReadIsNotARequest: the server knows a body that was not read to its end only by the very body that it
// made. It would take the rest for requests.
func TestRestOfABodyThatNobodyReadIsNotARequest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(strings.Replace(standardSite, "PRODUCTION", resettingBackend(t), 1))
	key := bearer(r.key("production", "memories:read", "memories:write")).Get("Authorization")
	hidden := lines("GET /v1/memories/hidden HTTP/1.1")
	const parts = 1 << 10
	part := strings.Repeat(hidden, 1<<16/len(hidden)) // times parts it is more than the sockets on the way hold: a rest is always left
	for name, headers := range map[string][]string{"with a key": {"Authorization: " + key}, "without": nil} {
		t.Run(name, func(t *testing.T) {
			conn, reader := g.dial()
			head := lines("POST /v1/memories HTTP/1.1", append(headers, fmt.Sprintf("Content-Length: %d", parts*len(part)))...)
			go func() {
				_, err := io.WriteString(conn, head)
				for n := 0; n < parts && err == nil; n++ {
					_, err = io.WriteString(conn, part)
				}
			}()
			resp, err := http.ReadResponse(reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode < 400 || !resp.Close {
				t.Errorf("answer %d, the connection is to be closed: %v", resp.StatusCode, resp.Close)
			}
			if rest, _ := io.ReadAll(reader); len(rest) > 0 { // an error, or the end
				t.Errorf("a second answer: %.200q", rest)
			}
		})
	}
}

// resettingBackend reads a part of a request, and resets its connection.
func resettingBackend(t *testing.T) string {
	t.Helper()
	return network.Serve(t, func(conn net.Conn) {
		_, _ = io.ReadFull(conn, make([]byte, 1<<16))
		_ = conn.(*net.TCPConn).SetLinger(0)
	})
}

// TestRefusalDoesNotWaitForABodyThatTheClientHoldsBack: a client that expects 100 sends it only when it is asked to.
func TestRefusalDoesNotWaitForABodyThatTheClientHoldsBack(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	key := r.key("production", "memories:read")
	conn, reader := g.dial()
	if _, err := io.WriteString(conn, lines("POST /v1/memories HTTP/1.1", "Authorization: "+bearer(key).Get("Authorization"),
		"Content-Length: 1000", "Expect: 100-continue")); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden || !resp.Close {
		t.Errorf("answer %d, the connection is to be closed: %v", resp.StatusCode, resp.Close)
	}
}

// dial opens a connection that ends with the test, or after the 20 s in which everything is answered.
func (g *gateway) dial() (net.Conn, *bufio.Reader) {
	g.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(g.http, "http://"))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		g.t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

// h2Answer is what came back on an HTTP/2 stream.
type h2Answer struct {
	status string // "" if the stream or the connection was reset
	body   string
}

// maxFrame is the largest frame that a server takes unless it says more (RFC 9113, section 6.5.2).
const maxFrame = 1 << 14

// h2 sends one HTTP/2 request, frame by frame, as no proper client would.
func (g *gateway) h2(t *testing.T, fields [][2]string, body string, trailers [][2]string) h2Answer {
	t.Helper()
	scheme, address, _ := strings.Cut(g.http, "://")
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	if scheme == "https" {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", NextProtos: []string{"h2"}})
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	headers := func(fields [][2]string, end bool) error {
		block.Reset()
		for _, f := range fields {
			_ = encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a buffer never fails
		}
		first := block.Next(maxFrame)
		err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first, EndHeaders: block.Len() == 0, EndStream: end})
		for err == nil && block.Len() > 0 {
			rest := block.Next(maxFrame)
			err = framer.WriteContinuation(1, block.Len() == 0, rest)
		}
		return err
	}
	steps := []func() error{
		func() error { return framer.WriteSettings() },
		func() error { return headers(fields, body == "" && trailers == nil) },
	}
	if body != "" {
		steps = append(steps, func() error { return framer.WriteData(1, trailers == nil, []byte(body)) })
	}
	if trailers != nil {
		steps = append(steps, func() error { return headers(trailers, true) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			break // the server may have reset the connection; what it said comes below
		}
	}
	var answer h2Answer
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return answer
		}
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			answer.status = f.PseudoValue("status")
		case *http2.DataFrame:
			answer.body += string(f.Data())
		case *http2.RSTStreamFrame:
			return answer
		}
		if frame.Header().StreamID == 1 && frame.Header().Flags.Has(http2.FlagDataEndStream) {
			return answer
		}
	}
}

func TestTricksOverHTTP2HaveADefinedAnswer(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	t.Run("cleartext", func(t *testing.T) { wantH2Answers(t, r, r.of(t).start(standardSite)) })
	t.Run("TLS", func(t *testing.T) { wantH2Answers(t, r, r.of(t).startTLS(standardSite)) })
}

// startTLS is start with a certificate.
func (r *rig) startTLS(site string, options ...string) *gateway {
	r.t.Helper()
	withTLS := "https://localhost:PORT {\n" + newAuthority(r.t).tls("localhost")
	g := r.start(strings.Replace(site, "http://:PORT {", withTLS, 1), options...)
	g.http = strings.Replace(g.http, "http://127.0.0.1", "https://localhost", 1)
	return g
}

func wantH2Answers(t *testing.T, r *rig, g *gateway) {
	t.Helper()
	scheme, address, _ := strings.Cut(g.http, "://")
	key := r.key("production", "memories:read", "memories:write")
	auth := [2]string{"authorization", "Bearer " + key.Key.Reveal()}
	request := func(method, path string, more ...[2]string) [][2]string {
		return append([][2]string{{":method", method}, {":scheme", scheme}, {":authority", address}, {":path", path}}, more...)
	}
	for _, tc := range []struct {
		name     string
		fields   [][2]string
		body     string
		trailers [][2]string
		status   string // "" for a reset
		code     string
	}{
		{"plain", request("GET", "/v1/memories", auth), "", nil, "200", ""},
		{"no key", request("GET", "/v1/memories"), "", nil, "401", "API_KEY_MISSING"},
		{"key in two fields", request("GET", "/v1/memories", auth, auth), "", nil, "200", ""},
		{"TRACE", request("TRACE", "/v1/memories", auth), "", nil, "405", "METHOD_NOT_ALLOWED"},
		{"CONNECT", [][2]string{{":method", "CONNECT"}, {":authority", address}, auth}, "", nil, "405", "METHOD_NOT_ALLOWED"},
		{"extended CONNECT", request("CONNECT", "/v1/memories", auth)[:4:4], "", nil, "", ""},
		{"WebSocket by CONNECT", append([][2]string{{":protocol", "websocket"}}, request("CONNECT", "/v1/memories", auth)...), "", nil, "", ""},
		{"OPTIONS *", request("OPTIONS", "*", auth), "", nil, "200", ""},
		{"GET *", request("GET", "*", auth), "", nil, "400", "PATH_INVALID"},
		{"absolute path", request("GET", "https://localhost/v1/memories", auth), "", nil, "", ""},
		{"relative path", request("GET", "v1/memories", auth), "", nil, "", ""},
		{"empty path", request("GET", "", auth), "", nil, "", ""},
		{"space in the path", request("GET", "/v1/memories HTTP/1.1\r\nX-A: b", auth), "", nil, "", ""},
		{"dots", request("GET", "/v1/memories/../entities", auth), "", nil, "400", "PATH_INVALID"},
		{"double slash", request("GET", "//v1/memories", auth), "", nil, "400", "PATH_INVALID"},
		{"encoded slash", request("GET", "/v1/memories%2fx", auth), "", nil, "400", "PATH_INVALID"},
		{"backslash", request("GET", `/v1\memories`, auth), "", nil, "400", "PATH_INVALID"},
		{"space in the query", request("GET", "/v1/memories?a HTTP/1.0", auth), "", nil, "400", "PATH_INVALID"},
		{"tab in the query", request("GET", "/v1/memories?a\tHTTP/1.0", auth), "", nil, "", ""},
		{"line break in the query", request("GET", "/v1/memories?a\r\nX-A: b", auth), "", nil, "", ""},
		{"what clients write in queries", request("GET", "/v1/memories?q=é\xff&b=\"<>|#", auth), "", nil, "200", ""},
		{"NUL", request("GET", "/v1/memories\x00", auth), "", nil, "", ""},
		{"two paths", request("GET", "/v1/memories", [2]string{":path", "/v1/entities"}, auth), "", nil, "", ""},
		{"upper case", request("GET", "/v1/memories", [2]string{"Authorization", auth[1]}), "", nil, "", ""},
		{"line break", request("GET", "/v1/memories", auth, [2]string{"x-a", "b\r\nX-Rekall-Key-Id: spoofed"}), "", nil, "", ""},
		{"connection", request("GET", "/v1/memories", auth, [2]string{"connection", "x-rekall-key-id"}), "", nil, "400", ""},
		{"transfer-encoding", request("POST", "/v1/memories", auth, [2]string{"transfer-encoding", "chunked"}), "0\r\n\r\n", nil, "400", ""},
		{"identity in trailers", request("POST", "/v1/memories", auth, [2]string{"trailer", "x-rekall-key-id"}), "ab",
			[][2]string{{"x-rekall-key-id", "spoofed"}, {"x-other", "spoofed"}}, "200", ""},
		{"10,000 parameters", request("GET", "/v1/memories?"+strings.Repeat("&", 10_000), auth), "", nil, "200", ""},
		{"1 MiB header", request("GET", "/v1/memories", auth, [2]string{"x-a", strings.Repeat("~", 1<<20)}), "", nil, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := r.production.Requests() + r.sandbox.Requests()
			got := g.h2(t, tc.fields, tc.body, tc.trailers)
			reached := r.production.Requests() + r.sandbox.Requests() - before
			if got.status != tc.status || !strings.Contains(got.body, tc.code) {
				t.Errorf("answer %q %s, want %q %s", got.status, got.body, tc.status, tc.code)
			}
			if wanted := tc.status == "200" && tc.name != "OPTIONS *"; reached > 1 || (reached == 1) != wanted {
				t.Errorf("a backend was contacted %d times", reached)
			}
			if strings.Contains(got.body, "spoofed") || strings.Contains(got.body, key.Key.Reveal()) {
				t.Errorf("the answer is %s", got.body)
			}
		})
	}
	wantCalm(t, g)
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

package test

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/scoperule"
	"github.com/rekall-ai/gateway/test/network"
)

// wire is a backend that keeps the bytes of each request's head as they came, read by no HTTP library.
type wire struct {
	address string
	mu      sync.Mutex
	heads   []string
}

func newWire(t *testing.T) *wire {
	t.Helper()
	w := new(wire)
	w.address = network.Serve(t, w.serve)
	return w
}

func (w *wire) serve(conn net.Conn) {
	reader := bufio.NewReader(conn)
	var head strings.Builder
	for !strings.HasSuffix(head.String(), "\r\n\r\n") {
		line, err := reader.ReadString('\n')
		if err != nil {
			return
		}
		head.WriteString(line)
	}
	w.mu.Lock()
	w.heads = append(w.heads, head.String())
	w.mu.Unlock()
	body := io.Reader(strings.NewReader(""))
	for line := range strings.Lines(head.String()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if length, err := strconv.ParseInt(value, 10, 64); err == nil && name == "Content-Length" {
			body = io.LimitReader(reader, length)
		} else if name == "Transfer-Encoding" {
			body = httputil.NewChunkedReader(reader)
		}
	}
	_, _ = io.Copy(io.Discard, body)
	_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

func (w *wire) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	heads := w.heads
	w.heads = nil
	return heads
}

// crossing is a request that the gateway passed on.
type crossing struct {
	sent        string
	target      string // as sent
	environment string // of the backend that received it
	head        string // what it received
}

// field returns the only value of a header, spelled so, in a head; all spellings of it count.
func (c crossing) field(t *testing.T, name string) string {
	t.Helper()
	var found []string
	for line := range strings.Lines(c.head) {
		sent, value, _ := strings.Cut(strings.TrimRight(line, "\r\n"), ": ")
		if strings.EqualFold(strings.NewReplacer("_", "-", ".", "-").Replace(sent), name) {
			found = append(found, value)
		}
	}
	if len(found) != 1 {
		t.Errorf("%s: the backend received %s %q", c.sent, name, found)
		return ""
	}
	return found[0]
}

// accessLine is a line of the access log.
type accessLine struct {
	Message string `json:"msg"`
	Request struct {
		Method string `json:"method"`
		URI    string `json:"uri"`
	} `json:"request"`
	Answer struct {
		RequestID []string `json:"X-Request-Id"`
	} `json:"resp_headers"`
	Decision    string `json:"decision"`
	KeyID       string `json:"key_id"`
	Environment string `json:"environment"`
	Account     string `json:"account"`
	Scopes      string `json:"scopes"`
}

// TestBackendReceivesWhatTheKeyInUseMayDo sends odd requests with keys of few scopes, and decides each that crossed the
// gateway again, on the bytes that the backend received: a request that needs another scope than its key has, or an
// environment that is not its key's, was decided on as something that it is not.
func TestBackendReceivesWhatTheKeyInUseMayDo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	wires := map[string]*wire{"production": newWire(t), "sandbox": newWire(t)}
	site := strings.NewReplacer("PRODUCTION", wires["production"].address, "SANDBOX", wires["sandbox"].address,
		"log\n", "log\nlog_append decision {rekall.decision}\nlog_append key_id {rekall.key_id}\nlog_append environment {rekall.environment}\n"+
			"log_append account {rekall.account}\nlog_append scopes {rekall.scopes}\n").Replace(standardSite)
	g := r.start(site)
	keys := []keyadmin.Key{
		r.key("production", "memories:read"), r.key("production", "memories:write", "memories:delete"),
		r.key("sandbox", "memories:read", "entities:read"), r.key("sandbox", "entities:write"),
	}
	byID := map[string]keyadmin.Key{}
	for _, key := range keys {
		byID[key.ID] = key
	}
	var crossed []crossing
	collect := func(sent, target string, status int) {
		n := 0
		for environment, w := range wires {
			for _, head := range w.take() {
				crossed = append(crossed, crossing{sent, target, environment, head})
				n++
			}
		}
		if n > 1 || status == http.StatusOK && n == 0 && !strings.Contains(sent, " * ") || status != http.StatusOK && n != 0 {
			t.Errorf("%s: %d requests reached a backend, answer %d", sent, n, status)
		}
	}
	for _, target := range differentialTargets() {
		for i, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "TRACE", "GETS"} {
			for j, key := range keys {
				trick := tricks[(i+j+len(target))%len(tricks)]
				auth := "Authorization: Bearer " + key.Key.Reveal()
				request := method + " " + target + " HTTP/1.1\r\nHost: api.example\r\n" + auth + "\r\n" + neutral + trick.headers + "\r\n" + trick.body
				answer, _ := g.raw(request)
				status := 0
				if answer.Response != nil {
					status = answer.StatusCode
				}
				collect(method+" "+target+" with "+trick.headers, target, status)
			}
		}
		for _, key := range keys[:3] {
			got := g.h2(t, [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "api.example"}, {":path", target},
				{"authorization", "Bearer " + key.Key.Reveal()}, {"x-odd", oddValue}, {"x-rekall-version", "2"}, {"cookie", "a=1; b"}}, "", nil)
			status, _ := strconv.Atoi(got.status)
			collect("HTTP/2 "+target+" ", target, status)
		}
	}
	g.process.Stop(g.t)
	lines := map[string]accessLine{}
	for text := range strings.Lines(g.log.String()) {
		var line accessLine
		if json.Unmarshal([]byte(text), &line) == nil && line.Message == "handled request" && len(line.Answer.RequestID) == 1 {
			lines[line.Answer.RequestID[0]] = line
		}
	}
	rules, err := scoperule.New(scoperule.Builtin()...)
	if err != nil {
		t.Fatal(err)
	}
	if len(crossed) < 100 {
		t.Errorf("only %d requests crossed", len(crossed))
	}
	for _, c := range crossed {
		requestLine, _, _ := strings.Cut(c.head, "\r\n")
		parts := strings.Split(requestLine, " ")
		if len(parts) != 3 || parts[2] != "HTTP/1.1" {
			t.Errorf("%s: the backend received %q", c.sent, requestLine)
			continue
		}
		method, target := parts[0], parts[1]
		path, query, _ := strings.Cut(target, "?")
		decided, key := lines[c.field(t, "X-Request-Id")], byID[c.field(t, "X-Rekall-Key-Id")]
		if decided.Decision != "allowed" || decided.KeyID != key.ID || decided.Environment != c.environment || key.Environment != c.environment {
			t.Errorf("%s: %s received it for %+v, decided %+v", c.sent, c.environment, key, decided)
		}
		scopes := strings.Join(key.Scopes, " ")
		if decided.Account != key.Account || decided.Scopes != scopes {
			t.Errorf("%s: placeholders for %+v say account %q, scopes %q", c.sent, key, decided.Account, decided.Scopes)
		}
		required, covered := rules.Required(method, path)
		if !covered || !scoperule.Canonical(path) || !slices.Contains(key.Scopes, required.String()) {
			t.Errorf("%s: the backend received %q, which needs %s; its key has %v", c.sent, requestLine, required, key.Scopes)
		}
		if on, err := url.ParseRequestURI(decided.Request.URI); err != nil || decided.Request.Method != method || on.EscapedPath() != path || on.RawQuery != query {
			t.Errorf("%s: the backend received %q, decided on %s %s", c.sent, requestLine, decided.Request.Method, decided.Request.URI)
		}
		if _, sent, _ := strings.Cut(c.target, "?"); sent != query {
			t.Errorf("%s: the backend received ?%s", c.sent, query)
		}
		for name, value := range map[string]string{"X-Rekall-Account": key.Account, "X-Rekall-Environment": key.Environment, "X-Rekall-Scopes": scopes} {
			if got := c.field(t, name); got != value {
				t.Errorf("%s: the backend received %s %q, want %q", c.sent, name, got, value)
			}
		}
		for _, line := range []string{"X-Odd: " + oddValue, "X-Rekall-Version: 2", "Cookie: a=1; b"} {
			if !strings.Contains(c.head, "\r\n"+line+"\r\n") {
				t.Errorf("%s: the backend did not receive %q", c.sent, line)
			}
		}
		if strings.Contains(c.head, "spoofed") {
			t.Errorf("%s: the backend received %q", c.sent, c.head)
		}
	}
	wantCalm(t, g)
}

const (
	oddValue = `a  b;c="d,e" %00%2e \ é`
	neutral  = "X-Odd: " + oddValue + "\r\nX-Rekall-Version: 2\r\nCookie: a=1; b\r\n"
)

// tricks are headers, and what follows them, that some software takes for another request than was sent. Bodies are chunked:
// the race detector sees Caddy write down how much it has read of a body of known length while the proxy still asks for more.
var tricks = []struct{ headers, body string }{
	{"", ""},
	{"X-HTTP-Method-Override: spoofed\r\nX-HTTP-Method: spoofed\r\nX-Method-Override: spoofed\r\n", ""},
	{"X-Original-URL: /spoofed\r\nX-Rewrite-URL: /spoofed\r\n", ""},
	{"X-Rekall-Key-Id: spoofed\r\nX_Rekall_Scopes: spoofed\r\nx-rekall.account: spoofed\r\nX-Request-ID: spoofed\r\n", ""},
	{"Connection: X-Rekall-Key-Id, X-Rekall-Scopes, X-Request-Id\r\n", ""},
	{"Connection: Upgrade, X-Rekall-Key-Id\r\nUpgrade: h2c\r\nHTTP2-Settings: spoofed\r\n", ""},
	{"Transfer-Encoding: chunked\r\nTrailer: X-Rekall-Key-Id\r\n", "0\r\nX-Rekall-Key-Id: spoofed\r\n\r\n"},
	{"Transfer-Encoding: chunked\r\nContent-Length: 30\r\n", "0\r\n\r\nGET /spoofed HTTP/1.1\r\n\r\n"},
	{"Expect: 100-continue\r\n", ""},
}

// differentialTargets are the targets of the other tests at this door, and good ones, some with a query.
func differentialTargets() []string {
	targets := []string{
		"/v1/memories", "/v1/memories/m1", "/v1/memories/search", "/v1/entities", "/v1/entities/e1", "/v1/entities/search",
		"/v1/memories/", "/V1/memories", "/v1/Memories", "/v1/memories/search/", "/v1/memories/SEARCH", "/v1/memories/m1/m2", "/v2", "/",
		"/v1/memories/%C3%A9", "/v1/memories/%c3%a9", "/v1/memories/a:b@c!$&'()*,=", "/v1/memories/..a", "/v1/memories/~a_b-c", "/v1/memories/é",
		"/v1/memories?", "/v1/memories?a=1;b=2;;c&&d=%zz&e=%00&=x", "/v1/memories?_method=DELETE&x=../..//%2e%2e#", "/v1/memories/search?/v1/entities",
		"http://api.example/v1/memories?a", "http:/v1/memories", "http://user:pass@other.example:1/v1/memories", "https://api.example/v1/entities/e1",
	}
	for path := range oddPaths {
		targets = append(targets, path)
		if strings.HasPrefix(path, "/") && len(path) < 100 {
			targets = append(targets, path+"?a=/v1/entities")
		}
	}
	slices.Sort(targets)
	return targets
}

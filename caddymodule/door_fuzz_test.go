package caddymodule

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/scoperule"
)

// The bytes that stand for keys in the input of FuzzDoor. A key itself would not survive a mutation; these occur in no text.
const (
	productionKey = '\xf8' + iota // has memories:read and memories:write
	sandboxKey                    // has entities:read
	unknownKey
	revokedKey
	encodedKey // the production key, percent-encoded
	spoofedID  // of the production key
)

// hall is a whole gateway in this process, between a listener and two backends.
type hall struct {
	address  string
	log      *memory
	visits   *visits
	keys     map[string]keyadmin.Key // by id
	expand   *strings.Replacer
	canaries []string // a part of each key, in lower case

	// allowed are the logged decisions for which no backend has received anything yet, by request id. A backend may see a
	// request only after the client has gone and the gateway has logged it.
	allowed map[string]logged
}

// visit is a request as a backend received it.
type visit struct {
	environment     string
	method, target  string
	header, trailer http.Header
	host            string
}

type visits struct {
	mu  sync.Mutex
	all []visit
}

func (v *visits) backend(t testing.TB, environment string) string {
	backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		v.mu.Lock()
		defer v.mu.Unlock()
		v.all = append(v.all, visit{environment, r.Method, r.RequestURI, r.Header, r.Trailer, r.Host})
	}))
	t.Cleanup(backend.Close)
	return backend.Listener.Addr().String()
}

func (v *visits) take() []visit {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := v.all
	v.all = nil
	return all
}

// memory is a log that is kept, as a module for Caddy's logging.
type memory struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// logMemory is where the configuration finds it.
var logMemory = new(memory)

func init() { caddy.RegisterModule(logMemory) }

func (*memory) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.writers.test_memory", New: func() caddy.Module { return logMemory }}
}

func (*memory) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }
func (*memory) String() string                                { return "memory" }
func (*memory) WriterKey() string                             { return "memory" }
func (m *memory) OpenWriter() (io.WriteCloser, error)         { return m, nil }
func (*memory) Close() error                                  { return nil }

func (m *memory) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.buf.Write(p)
}

func (m *memory) take() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	text := m.buf.String()
	m.buf.Reset()
	return text
}

// openStore returns a database with the schema, and a store of it.
func openStore(t testing.TB) (database string, store *keystore.Store) {
	t.Helper()
	database = pgtest.Migrated(t)
	return database, pgtest.Store(t, database)
}

func newHall(t testing.TB) *hall {
	t.Helper()
	database, store := openStore(t)
	h := &hall{log: logMemory, visits: new(visits), keys: map[string]keyadmin.Key{}, allowed: map[string]logged{}}
	admin := keyadmin.New(store)
	create := func(environment string, scopes ...string) keyadmin.Key {
		key, _, err := admin.Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
			Name: "n", Account: "a", Environment: environment, Scopes: scopes,
		})
		if err != nil {
			t.Fatal(err)
		}
		h.keys[key.ID] = key
		return key
	}
	production := create("production", "memories:read", "memories:write")
	sandbox := create("sandbox", "entities:read")
	revoked := create("production", "memories:read", "entities:read")
	if _, err := admin.Revoke(t.Context(), keyadmin.Operator("test"), revoked.ID); err != nil {
		t.Fatal(err)
	}
	delete(h.keys, revoked.ID)
	unknown := apikey.Generate(apikey.Production)
	var encoded strings.Builder
	for _, c := range []byte(production.Key.Reveal()) {
		fmt.Fprintf(&encoded, "%%%02x", c)
	}
	h.expand = strings.NewReplacer(
		string([]byte{productionKey}), production.Key.Reveal(), string([]byte{sandboxKey}), sandbox.Key.Reveal(),
		string([]byte{unknownKey}), unknown, string([]byte{revokedKey}), revoked.Key.Reveal(),
		string([]byte{encodedKey}), encoded.String(), string([]byte{spoofedID}), production.ID)
	for _, key := range []string{production.Key.Reveal(), sandbox.Key.Reveal(), revoked.Key.Reveal(), unknown} {
		h.canaries = append(h.canaries, strings.ToLower(key[apikey.Length/4:apikey.Length*3/4]))
	}
	h.load(t, database)
	return h
}

// load starts Caddy with a gateway, a site that refuses plain HTTP and one that has nothing to do with Rekall.
func (h *hall) load(t testing.TB, database string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.address = listener.Addr().String()
	_ = listener.Close()
	_, port, _ := net.SplitHostPort(h.address)
	text := strings.NewReplacer("PORT", port, "PRODUCTION", h.visits.backend(t, "production"),
		"SANDBOX", h.visits.backend(t, "sandbox"), "DATABASE", database).Replace(`{
	admin off
	persist_config off
	auto_https off
	grace_period 1s
	log {
		output test_memory
		level DEBUG
	}
	rekall {
		database DATABASE
	}
}
(site) {
	bind 127.0.0.1
	log
	log_append uri {uri}
	log_append key {header.X-Api-Key}
}
http://plain.example:PORT {
	import site
	rekall_tls_only
}
http://other.example:PORT {
	import site
	respond "{method} {host} {uri} {header.Authorization} {header.X-Api-Key} {header.Cookie}"
}
http://:PORT {
	import site
	log_append decision {rekall.decision}
	log_append key_id {rekall.key_id}
	log_append environment {rekall.environment}
	rekall_gateway {
		production {
			log_append request_id {header.X-Request-Id}
			reverse_proxy PRODUCTION
		}
		sandbox {
			log_append request_id {header.X-Request-Id}
			reverse_proxy SANDBOX
		}
	}
}
`)
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	h.waitReady(t)
}

func (h *hall) waitReady(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		received, _, err := h.send(h.expand.Replace("GET /v1/memories HTTP/1.1\r\nHost: a\r\nX-Api-Key: \xf8\r\n\r\n"))
		if err == nil && strings.HasPrefix(received, "HTTP/1.1 200 ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the gateway does not serve: %v %q\n%s", err, received, h.log.take())
		}
	}
	h.log.take()
	h.visits.take()
}

// patience is how long the server may take over anything, on a slow machine too. The fuzzer gives up after 10 s.
const patience = 8 * time.Second

// send writes to a connection of its own and returns all that came back. It says that it has nothing to add once there is
// an answer, or when none comes because the server waits for more.
func (h *hall) send(request string) (received string, reset bool, err error) {
	conn, err := net.Dial("tcp", h.address)
	if err != nil {
		return "", false, err
	}
	defer func() { _ = conn.Close() }()
	written := make(chan struct{})
	go func() {
		defer close(written)
		_, _ = io.WriteString(conn, request) // the answer may come before the server has read it all
	}()
	var all bytes.Buffer
	if complete(request) {
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		method, _, _ := strings.Cut(request, " ") // an answer to HEAD has no body
		answer, err := http.ReadResponse(bufio.NewReader(io.TeeReader(conn, &all)), &http.Request{Method: method})
		if err == nil {
			_, _ = io.Copy(io.Discard, answer.Body)
		}
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	<-written
	_ = conn.(*net.TCPConn).CloseWrite()
	_, err = io.Copy(&all, conn)
	if errors.Is(err, syscall.ECONNRESET) {
		return all.String(), true, nil
	}
	return all.String(), false, err
}

// canary returns what of a key is in the text, written plainly or percent-encoded.
func (h *hall) canary(text string) string {
	for range 3 {
		lower := strings.ToLower(text)
		for _, canary := range h.canaries {
			if i := strings.Index(lower, canary); i >= 0 {
				return text[max(0, i-100):min(len(text), i+100)]
			}
		}
		text = unescapeAll(text)
	}
	return ""
}

// unescapeAll decodes every valid escape and leaves the rest.
func unescapeAll(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	var b strings.Builder
	for s != "" {
		if s[0] == '%' && len(s) > 2 {
			if decoded, err := url.PathUnescape(s[:3]); err == nil {
				b.WriteString(decoded)
				s = s[3:]
				continue
			}
		}
		b.WriteByte(s[0])
		s = s[1:]
	}
	return b.String()
}

// logged is a line of the access log.
type logged struct {
	Message     string `json:"msg"`
	Decision    string `json:"decision"`
	KeyID       string `json:"key_id"`
	Environment string `json:"environment"`
	RequestID   string `json:"request_id"` // of a request that was passed on
}

// FuzzDoor sends bytes to a listener of the gateway. Whatever they are, no backend is contacted without a decision that
// allowed the request as it arrives there, no key is in a log, an answer, or what a backend received, nothing panics, and
// every complete request has an answer.
func FuzzDoor(f *testing.F) {
	h := newHall(f)
	for _, seed := range doorSeeds() {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		request := h.expand.Replace(string(input))
		received, reset, err := h.send(request)
		if err != nil {
			t.Fatalf("the connection does not end: %v after %q", err, received)
		}
		if leaked := h.canary(received); leaked != "" {
			t.Errorf("a key is in the answer: %q", leaked)
		}
		if complete(request) && !reset && !defined(received) {
			t.Errorf("a complete request has the answer %q", received)
		}
		h.check(t)
	})
}

// complete reports whether there is a whole request header, and nothing that turns the connection into HTTP/2.
func complete(request string) bool {
	return !strings.HasPrefix(request, "PRI ") && (strings.Contains(request, "\r\n\r\n") || strings.Contains(request, "\n\n"))
}

func defined(answer string) bool {
	if len(answer) < len("HTTP/1.1 200") || !strings.HasPrefix(answer, "HTTP/1.") || answer[8] != ' ' {
		return false
	}
	return slices.Contains([]string{"200", "308", "400", "401", "403", "405", "408", "413", "414", "417", "431", "499", "501", "502", "505"}, answer[9:12])
}

// check holds what the backends received against what was logged.
func (h *hall) check(t *testing.T) {
	t.Helper()
	log, visits := "", []visit(nil)
	decided := func(v visit) bool { _, ok := h.allowed[v.header.Get("X-Request-Id")]; return ok }
	for deadline := time.Now().Add(patience); ; <-time.After(time.Millisecond) {
		visits = append(visits, h.visits.take()...)
		lines := h.log.take()
		h.readDecisions(lines)
		log += lines
		if !slices.ContainsFunc(visits, func(v visit) bool { return !decided(v) }) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a backend received %+v without a decision that allowed it:\n%s", visits, log)
		}
	}
	if leaked := h.canary(log); leaked != "" {
		t.Errorf("a key is in the log: %q", leaked)
	}
	if strings.Contains(log, "panic") {
		t.Errorf("a panic:\n%s", log)
	}
	for _, v := range visits {
		id := v.header.Get("X-Request-Id")
		h.checkVisit(t, v, h.allowed[id])
		delete(h.allowed, id) // a decision is for one request
	}
}

// readDecisions reads the access log's lines of requests that were allowed.
func (h *hall) readDecisions(log string) {
	for line := range strings.Lines(log) {
		var l logged
		if json.Unmarshal([]byte(line), &l) == nil && l.Message == "handled request" && l.Decision == "allowed" {
			h.allowed[l.RequestID] = l
		}
	}
}

// checkVisit decides again, on the request as the backend received it.
func (h *hall) checkVisit(t *testing.T, v visit, decided logged) {
	t.Helper()
	path, _, _ := strings.Cut(v.target, "?")
	required, covered := builtinRules.Required(v.method, path)
	key, known := h.keys[decided.KeyID]
	switch {
	case decided.KeyID == "":
		t.Errorf("a second request came of one decision: %+v", v)
	case !known || decided.Environment != key.Environment || v.environment != key.Environment:
		t.Errorf("a key of %q reached %s: %+v, %+v", key.Environment, v.environment, decided, v)
	case !covered || !scoperule.Canonical(path):
		t.Errorf("the backend received %s %q, which no rule covers", v.method, v.target)
	case !slices.Contains(key.Scopes, required.String()):
		t.Errorf("the backend received %s %q, for which a key needs %s and has %v", v.method, v.target, required, key.Scopes)
	}
	for name, values := range v.header {
		folded := strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
		if !strings.HasPrefix(folded, "x-rekall-") || name == "X-Rekall-Version" {
			continue
		}
		want := map[string]string{
			"X-Rekall-Key-Id": key.ID, "X-Rekall-Account": "a", "X-Rekall-Environment": v.environment, "X-Rekall-Scopes": strings.Join(key.Scopes, " "),
		}[name]
		if want == "" || len(values) != 1 || values[0] != want {
			t.Errorf("the backend received %s %q", name, values)
		}
	}
	if len(v.header["X-Rekall-Key-Id"]) != 1 || len(v.trailer) > 0 {
		t.Errorf("the backend received %+v", v)
	}
	if leaked := h.canary(fmt.Sprint(v)); leaked != "" {
		t.Errorf("the backend received a key: %q", leaked)
	}
}

var builtinRules, _ = scoperule.New(scoperule.Builtin()...)

// doorSeeds are requests in which something is odd.
func doorSeeds() []string {
	const get, post = "GET /v1/memories HTTP/1.1", "POST /v1/memories HTTP/1.1"
	request := func(line string, headers ...string) string {
		return line + "\r\nHost: a\r\n" + strings.Join(append(headers, ""), "\r\n") + "\r\n"
	}
	bearer := "Authorization: Bearer \xf8"
	chunked := "Transfer-Encoding: chunked"
	seeds := []string{
		"", "\r\n", "GET\r\n\r\n", "\xf8\r\n\r\n", "\x16\x03\x01\x00\x01",
		request(get), request(get, bearer), request(get, bearer, bearer), request(get, "authorization:bEARER \xf8 "), request(get, "Authorization: Bearer\r\n \xf8"),
		request(get, "Authorization: Bearer \xf9"), request("GET /v1/entities/1 HTTP/1.1", "Authorization: Bearer \xf9"),
		request(get, "Authorization: Bearer \xfa"), request(get, "Authorization: Bearer \xfb"), request(get, "Authorization: Bearer \xfc"),
		request(get, "Authorization: \xf8"), request(get, "Authorization: Basic \xf8"), request(get, "Authorization: Basic dTpw, Bearer \xf8"),
		request(get, bearer+", Bearer \xf9"), request(get, bearer, "X-Api-Key: \xf9"), request(get, "X-Api-Key: \xf8\xf8"), request(get, "X-Api-Key: \"\xf8\""),
		request(get, "X-Api-Key: \xf8"), request(get, "x_api_key: \xf8"), request(get, "X-Api-Key : \xf8"), request(get, "X-Api-Key: \xf8\x00"),
		request(get, "Proxy-Authorization: Bearer \xf8"), request(get, "Cookie: a=\xf8; b=\xfc"), request(get, "Referer: https://a/?api_key=\xfc#\xf8"),
		request(get, "User-Agent: \xf8/1", "X-Forwarded-For: \xf8"), request(get, "\xf8: 1"), request(get, "X-\xf8: \xf8"),
		request("GET /v1/memories?api_key=\xf8 HTTP/1.1"), request("GET /v1/memories?a=1&API_KEY=\xfc;b HTTP/1.0"),
		request("GET /v1/memories?%61pi%5fkey=\xfc&api_key=\xf8 HTTP/1.1"), request("GET /v1/memories?u=%3fapi_key%3d\xfc&%zz=\xf8 HTTP/1.1"),
		request("GET /v1/memories/\xf8 HTTP/1.1"), request("GET /v1/memories/\xfc HTTP/1.1", bearer), request("GET /v1/memories;api_key=\xf8 HTTP/1.1"),
		request("GET /v1/memories/../entities HTTP/1.1", bearer), request("GET //v1/memories HTTP/1.1", bearer), request("GET /v1/memories/%2e%2e/%2f%5c%00 HTTP/1.1", bearer),
		request("GET /v1/memories. HTTP/1.1", bearer), request("GET * HTTP/1.1", bearer), request("OPTIONS * HTTP/1.1", bearer), request("GET /v1/memories#\xf8 HTTP/1.1", bearer),
		request("GET http://a/v1/memories?b HTTP/1.1", bearer), request("GET http://\xf8:\xf8@a/v1/memories HTTP/1.1"), request("GET http:/v1/memories HTTP/1.1", bearer),
		request("GET /v1/memories/a:b@c!$&'()*,=%C3%A9 HTTP/1.1", bearer), request("GET /v1/memories/\xc3\xa9 HTTP/1.1", bearer),
		request("HEAD /v1/memories HTTP/1.1", bearer), request("DELETE /v1/memories/1 HTTP/1.1", bearer), request("get /v1/memories HTTP/1.1", bearer),
		request("TRACE /v1/memories HTTP/1.1", bearer), "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n" + bearer + "\r\n\r\n", request("\xf8 / HTTP/1.1"),
		"GET /v1/memories HTTP/1.0\r\n" + bearer + "\r\n\r\n", request("GET /v1/memories HTTP/2.0", bearer), request("GET /v1/memories HTTP/\xf8"),
		"GET /v1/memories HTTP/1.1\r\nHost: \xf8\r\n" + bearer + "\r\n\r\n", request(get, bearer, "Host: b"), strings.ReplaceAll(request(get, bearer), "\r", ""),
		request(get, bearer, "X-Rekall-Key-Id: \xfd", "x_rekall_key.id: \xfd", "X-Rekall-Scopes: a", "X-Request-Id: \xfd", "X-Rekall-Version: 1"),
		request(get, bearer, "Connection: X-Rekall-Key-Id, X-Rekall-Account, close", "X-HTTP-Method-Override: DELETE", "X-Original-Url: /v1/entities"),
		request(get, bearer, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"),
		request(get, bearer, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA") + request("GET /v1/entities HTTP/1.1"),
		request(get, bearer, "Expect: 100-continue"), request(get, bearer, "Expect: \xf8"), request(get, bearer, "X-A: "+strings.Repeat("a", 20_000)),
		request(post, bearer, "Content-Length: 2") + "ab" + request("GET /v1/memories/hidden HTTP/1.1"),
		request(post, bearer, chunked, "Trailer: X-Rekall-Key-Id, X-A") + "1\r\na\r\n0\r\nX-Rekall-Key-Id: \xfd\r\nX-A: \xf8\r\n\r\n",
		request(post, chunked, "Trailer: Authorization, X-Api-Key") + "0\r\n" + bearer + "\r\nX-Api-Key: \xf8\r\n\r\n",
		request(post, bearer, chunked, "Content-Length: 100") + "0\r\n\r\n" + request("GET /v1/memories/hidden HTTP/1.1"),
		request(post, bearer, "Content-Length: 1", "Content-Length: 2") + "ab", request(post, bearer, chunked) + "\xf8\r\n", request(post, bearer, "Transfer-Encoding: \xf8"),
		request(get, bearer) + request(get) + request("GET /v1/entities HTTP/1.1", "Authorization: Bearer \xf9", "Connection: close"),
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
	}
	for _, host := range []string{"plain.example", "other.example"} {
		for _, line := range []string{get, "GET /\xf8?api_key=\xfc&b=\xf8 HTTP/1.1"} {
			seeds = append(seeds, line+"\r\nHost: "+host+"\r\nX-Api-Key: \xf8\r\nCookie: a=\xfc\r\n\r\n")
		}
	}
	return seeds
}

package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/devenv/backendtest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// canaries are secrets that must not be found anywhere, in any disguise.
type canaries struct {
	needles map[string]string // what to look for: whose it is
}

// add registers a secret. A part of it is enough to be found, whatever stands around it and in any case of its letters.
func (c *canaries) add(name, secret string) {
	if c.needles == nil {
		c.needles = map[string]string{}
	}
	part := secret[len(secret)/4 : len(secret)*3/4]
	c.needles[strings.ToLower(part)] = name
	c.needles[hex.EncodeToString([]byte(part))] = name + " in hexadecimal"
	for shift := range 3 { // how the part may stand to the groups of three bytes
		encoded := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + part))
		c.needles[strings.ToLower(encoded[4:len(encoded)-4])] = name + " in base64"
	}
}

// addKey registers a key and its digest.
func (c *canaries) addKey(name, key string) {
	c.add(name, key)
	name += digestOf
	digest := sha256.Sum256([]byte(key))
	middle := [len(digest) / 2]byte(digest[len(digest)/4:])
	part, decimals := middle[:], strings.Trim(fmt.Sprint(middle), "[]")
	c.needles[string(part)] = name
	c.needles[hex.EncodeToString(part)] = name + " in hexadecimal"
	c.needles[decimals] = name + " in decimals"
	c.needles[strings.ReplaceAll(decimals, " ", ",")] = name + " in decimals of JSON"
	for shift := range 3 {
		for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
			encoded := encoding.EncodeToString(append(make([]byte, shift), part...))
			c.needles[strings.ToLower(encoded[4:len(encoded)-4])] = name + " in base64"
		}
	}
}

// digestOf follows a key's name in that of its digest.
const digestOf = "'s digest"

// keys returns those of the canaries that may not even be where digests are kept.
func (c *canaries) keys() *canaries {
	kept := &canaries{maps.Clone(c.needles)}
	maps.DeleteFunc(kept.needles, func(_, name string) bool { return strings.Contains(name, digestOf) })
	return kept
}

// find returns whose canaries are in the text, written plainly or percent-encoded.
func (c *canaries) find(text string) []string {
	var found []string
	for range 3 {
		layer := strings.ToLower(text)
		for needle, name := range c.needles {
			if (strings.Contains(layer, needle) || strings.Contains(text, needle)) && !slices.Contains(found, name) { // bytes have no case
				found = append(found, name)
			}
		}
		decoded := unescape(text)
		if decoded == text {
			break
		}
		text = decoded
	}
	return found
}

// unescape decodes every valid percent-escape and leaves the rest.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if c, err := hex.DecodeString(s[i+1 : i+3]); err == nil {
				b.WriteByte(c[0])
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func percentEncode(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, "%%%02X", s[i])
	}
	return b.String()
}

// want wants none of the canaries in a sink.
func (c *canaries) want(t *testing.T, sink, text string) {
	t.Helper()
	found := c.find(text)
	if len(found) == 0 {
		return
	}
	t.Errorf("%s: found %s", sink, strings.Join(found, ", "))
	shown := 0
	for line := range strings.Lines(text) {
		if len(c.find(line)) > 0 && shown < 5 {
			t.Logf("in: %.1500s", line)
			shown++
		}
	}
}

func TestSearchFindsADisguisedCanary(t *testing.T) {
	t.Parallel()
	var c canaries
	key := apikey.Generate(apikey.Sandbox)
	c.addKey("key", key)
	digest := sha256.Sum256([]byte(key))
	inJSON, err := json.Marshal(digest) // as zap.Any writes it
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		key, "x" + key + "y", strings.ToUpper(key), http.CanonicalHeaderKey(key), percentEncode(key), percentEncode(percentEncode(key)),
		key[:40], key[8:], hex.EncodeToString([]byte(key)),
		base64.StdEncoding.EncodeToString([]byte(key)), base64.URLEncoding.EncodeToString([]byte("u:" + key)), base64.StdEncoding.EncodeToString([]byte("user:" + key)),
		string(digest[:]), hex.EncodeToString(digest[:]), fmt.Sprintf("%X", digest), fmt.Sprint(digest), string(inJSON),
		base64.StdEncoding.EncodeToString(digest[:]), base64.RawURLEncoding.EncodeToString(append([]byte("a:"), digest[:]...)),
	} {
		if c.find(text) == nil {
			t.Errorf("not found in %s", text)
		}
	}
	if found := c.find(apikey.Generate(apikey.Sandbox) + key[:12] + key[44:]); found != nil {
		t.Errorf("found %s where it is not", found)
	}
}

// placements are requests to a site with a key in some place, right or wrong.
func placements(site, key string) map[string]string {
	encoded := percentEncode(key)
	get := func(target string, headers ...string) string {
		return strings.Join(append([]string{"GET " + target + " HTTP/1.1", "Host: " + site, "Connection: close"}, headers...), "\r\n") + "\r\n\r\n"
	}
	const path = "/v1/memories"
	bearer := "Authorization: Bearer " + key
	requests := map[string]string{
		"bearer":                get(path, bearer),
		"bearer, odd case":      get(path, "AUTHORIZATION: bEARER   "+key+" "),
		"bearer, tab":           get(path, "Authorization: Bearer\t"+key),
		"bearer, lower case":    get(path, "Authorization: Bearer "+strings.ToLower(key)),
		"bearer, twice":         get(path, bearer, bearer),
		"bearer, list":          get(path, bearer+", "+bearer[15:]),
		"bearer, quoted":        get(path, `Authorization: Bearer "`+key+`"`),
		"bearer, folded":        get(path, "Authorization: Bearer\r\n\t"+key),
		"no scheme":             get(path, "Authorization: "+key),
		"no space":              get(path, "Authorization: Bearer"+key),
		"other scheme":          get(path, "Authorization: Token "+key),
		"basic":                 get(path, "Authorization: Basic "+key),
		"basic, encoded":        get(path, "Authorization: Basic "+base64.StdEncoding.EncodeToString([]byte(key+":"))),
		"proxy authorization":   get(path, "Proxy-Authorization: Bearer "+key),
		"x-api-key":             get(path, "x-api-key: "+key),
		"x-api-key, odd case":   get(path, "X-aPi-KEY: "+key),
		"x-api-key, upper case": get(path, "X-Api-Key: "+strings.ToUpper(key)),
		"x-api-key, twice":      get(path, "X-Api-Key: "+key, "X-Api-Key: "+key),
		"x-api-key, bearer":     get(path, "X-Api-Key: Bearer "+key),
		"x-api-key, encoded":    get(path, "X-Api-Key: "+encoded),
		"x-api-key, folded":     get(path, "X-Api-Key: "+key+"\r\n "+key),
		"query":                 get(path + "?a=1&api_key=" + key + "&b=2"),
		"query, odd case":       get(path + "?API_KEY=" + key),
		"query, encoded":        get(path + "?api_key=" + encoded),
		"query, name encoded":   get(path + "?%61pi%5Fkey=" + key),
		"query, both encoded":   get(path + "?%61pi%5Fkey=" + encoded),
		"query, twice":          get(path + "?api_key=" + key + "&api_key=" + key),
		"query, semicolon":      get(path + "?a=1;api_key=" + key + ";b=2"),
		"query, spaces":         get(path + "?api_key=+" + key + "%20"),
		"query, other name":     get(path + "?token=" + key + "&x=" + encoded),
		"query, as a name":      get(path + "?" + key),
		"query, bad escape":     get(path + "?%zz&api_key=" + key),
		"query, nested":         get(path + "?url=https%3A%2F%2Fapi.example%2F%3Fapi_key%3D" + encoded),
		"path":                  get(path + "/" + key),
		"path, encoded":         get(path + "/" + encoded),
		"path, with dots":       get("/" + key + "/../v1/memories"),
		"path, other":           get("/" + key),
		"path, parameter":       get(path + ";api_key=" + key),
		"fragment":              get(path + "#" + key),
		"referer":               get(path, "Referer: https://api.example/v1/x?api_key="+key),
		"referer, encoded":      get(path, "Referer: https://api.example/v1/x?api_key="+encoded),
		"cookie":                get(path, "Cookie: session="+key+"; b="+encoded),
		"user agent":            get(path, "User-Agent: curl/"+key),
		"header":                get(path, "X-Whatever: "+key, "X-Request-Id: "+key, "X-Forwarded-For: "+key),
		"header name":           get(path, key+": 1", "X-"+key+": 1"),
		"header name, encoded":  get(path, encoded+": 1", "X-"+encoded+": 1"),
		"origin":                get(path, "Origin: https://"+key+".example"),
		"userinfo":              get("http://"+key+":x@"+site+path, bearer),
		"password":              get("http://x:" + key + "@" + site + path),
		"host":                  "GET " + path + " HTTP/1.1\r\nHost: " + key + "\r\nConnection: close\r\n" + bearer + "\r\n\r\n",
		"absolute host":         get("http://" + key + path),
		"absolute query":        get("http://" + site + path + "?api_key=" + key),
		"HTTP/1.0":              "GET " + path + "?api_key=" + key + " HTTP/1.0\r\nHost: " + site + "\r\n\r\n",
		"method":                key + " " + path + " HTTP/1.1\r\nHost: " + site + "\r\n\r\n",
		"bad method":            "(" + key + " " + path + " HTTP/1.1\r\nHost: " + site + "\r\n\r\n",
		"TRACE":                 strings.Replace(get(path, bearer), "GET", "TRACE", 1),
		"CONNECT":               "CONNECT " + key + ":443 HTTP/1.1\r\nHost: " + key + ":443\r\n\r\n",
		"bad version":           "GET " + path + "?api_key=" + key + " HTTP/" + key + "\r\nHost: " + site + "\r\n\r\n",
		"request line only":     key + "\r\n\r\n",
		"NUL":                   get(path, "X-Api-Key: "+key+"\x00"),
		"NUL in the path":       get(path + "\x00?api_key=" + key),
		"bad header":            get(path, "X-Api-Key "+key),
		"no host":               "GET " + path + "?api_key=" + key + " HTTP/1.1\r\n" + bearer + "\r\n\r\n",
		"bad length":            get(path, bearer, "Content-Length: "+key),
		"bad encoding":          get(path, bearer, "Transfer-Encoding: "+key),
		"bad expectation":       get(path, bearer, "Expect: "+key),
		"too long":              get(path+"?api_key="+key, "X-A: "+strings.Repeat("a", 1<<20)),
		"upgrade":               get(path, "Upgrade: "+key, "X-Api-Key: "+key),
		"refused":               strings.Replace(get("/v1/entities", bearer), "GET", "DELETE", 1),
		"not covered":           get("/v2?api_key="+key, bearer),
		"refused on the way":    get(path+"/../x?api_key="+key, bearer),
		"ambiguous":             get(path+"?api_key="+key, "X-Api-Key: "+key[:47]+"!"),
	}
	webSocket := get("/v1/memories?api_key="+key, bearer, "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: "+key)
	requests["WebSocket"] = strings.Replace(webSocket, "Connection: close", "Connection: Upgrade", 1)
	requests["WebSocket, bad"] = strings.Replace(requests["WebSocket"], "Version: 13", "Version: "+key, 1)
	chunked := "POST " + path + " HTTP/1.1\r\nHost: " + site + "\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
	requests["trailers"] = chunked + "Trailer: Authorization, X-Api-Key, X-Rekall-Key-Id\r\n\r\n0\r\n" + bearer + "\r\nX-Api-Key: " + key + "\r\nX-Rekall-Key-Id: " + key + "\r\n\r\n"
	requests["trailer announced"] = chunked + bearer + "\r\nTrailer: " + key + "\r\n\r\n0\r\n" + key + ": 1\r\n\r\n"
	requests["trailers of a good one"] = chunked + bearer + "\r\nTrailer: X-A\r\n\r\n0\r\nX-A: " + key + "\r\n\r\n"
	requests["trailer without a colon"] = chunked + bearer + "\r\n\r\n1\r\na\r\n0\r\nX-Api-Key " + key + "\r\n\r\n"
	requests["bad chunk"] = chunked + bearer + "\r\n\r\n" + key + "\r\n"
	return requests
}

// leakSites are all that one listener may serve, and how they answer. There is no log filter in them; what operators may add
// to logs and spans is there instead.
const leakSites = `
(site) {
	bind 127.0.0.1
	log
	log_append uri {uri}
	log_append query {query}
	log_append key {header.X-Api-Key}
	log_append authorization {header.Authorization}
	tracing {
		span "span of {args[0]}"
		span_attributes {
			uri {uri}
			query {query}
			headers "{header.Authorization} {header.X-Api-Key} {header.Referer} {header.Cookie}"
		}
	}
}
http://api.example:PORT {
	import site api.example
	rekall_gateway {
		production {
			reverse_proxy PRODUCTION
		}
		sandbox {
			reverse_proxy SANDBOX
		}
	}
}
http://down.example:PORT {
	import site down.example
	rekall_gateway {
		production {
			reverse_proxy 127.0.0.1:1
		}
		sandbox {
			error "broken" 500
		}
	}
	handle_errors {
		respond "{err.status_code} {err.message} {uri} {header.Authorization} {header.X-Api-Key} {header.Referer}"
	}
}
http://plain.example:PORT {
	import site plain.example
	rekall_tls_only
}
http://jwks.example:PORT {
	import site jwks.example
	rekall_jwks
}
http://keys.example:PORT {
	import site keys.example
	rekall_keys
}
http://panic.example:PORT {
	import site panic.example
	rekall_gateway {
		production {
			panic
		}
		sandbox {
			panic
		}
	}
}
http://panic-outside.example:PORT {
	import site panic-outside.example
	panic
}
http://other.example:PORT {
	import site other.example
	log console {
		output stderr
		format console
	}
	reverse_proxy OTHER
}
http://:PORT {
	import site any
	respond "{method} {uri} {host} {query} {header.Authorization} {header.X-Api-Key} {header.Cookie} {header.User-Agent}"
}
`

func TestNoKeyIsInAnySink(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var hidden canaries
	production, sandbox := r.key("production", "memories:read", "memories:write"), r.key("sandbox", "memories:read")
	keys := map[string]string{
		"production": production.Key.Reveal(),
		"sandbox":    sandbox.Key.Reveal(),
		"unknown":    apikey.Generate(apikey.Production),
	}
	for name, key := range keys {
		hidden.addKey(name+" key", key)
	}
	database, err := url.Parse(r.database)
	if err != nil {
		t.Fatal(err)
	}
	if password, ok := database.User.Password(); ok {
		hidden.add("database password", password)
	}
	other, traces := backendtest.Start(t, "other"), newCollector(t)
	g := r.prepare(strings.ReplaceAll(leakSites, "OTHER", other.Address()))
	g.program = filepath.Join(t.TempDir(), "panicking")
	if err := process.Build(g.program, "./panicking", raceFlag...); err != nil {
		t.Fatal(err)
	}
	g.env = traces.env()
	g.run(r.database)
	g.waitReady()
	sites := []string{"api.example", "down.example", "plain.example", "jwks.example", "keys.example", "panic.example", "panic-outside.example", "other.example"}
	statuses := map[int]bool{}
	for _, site := range append(sites, "unheard-of.example") {
		for name, key := range keys {
			for place, request := range placements(site, key) {
				answer, received := g.raw(request)
				if answer.Response != nil {
					statuses[answer.StatusCode] = true
				}
				if site == "other.example" && strings.HasPrefix(place, "trailer") {
					continue // its backend is none of ours, and no log shows trailers
				}
				hidden.want(t, site+", "+name+" key, "+place+": the answer, and what the backend received", received)
			}
		}
	}
	for name, key := range keys {
		for place, request := range placements("keys.example", key) {
			for _, path := range []string{keysPath, dashboard.Root} {
				_, received := g.raw(strings.ReplaceAll(request, "/v1/memories", path))
				hidden.want(t, path+", "+name+" key, "+place, received)
			}
		}
		_, received := g.raw(strings.Join([]string{"POST " + dashboard.Root + "/sign-in HTTP/1.1", "Host: keys.example",
			"Content-Type: application/x-www-form-urlencoded", fmt.Sprint("Content-Length: ", len("key="+key)), "", "key=" + key}, "\r\n"))
		if !strings.Contains(received, "may not manage keys") && !strings.Contains(received, "not valid") {
			t.Errorf("signing in with the %s key: %s", name, received)
		}
		hidden.want(t, "signing in with the "+name+" key", received)
	}
	plantHTTP2(t, g, &hidden, keys["production"])
	plantNearMisses(t, g, &hidden)

	for _, status := range []int{200, 400, 401, 403, 405, 431, 500, 501, 502} { // 503: TestNoKeyIsLoggedWhileNobodyCanTell
		if !statuses[status] {
			t.Errorf("nothing was answered %d", status)
		}
	}

	for _, path := range []string{"/metrics", "/rekall/status", "/rekall/ready", "/rekall/live", "/config/", "/reverse_proxy/upstreams", "/debug/vars", "/debug/pprof/goroutine?debug=2"} {
		answer := do(t, "GET", g.admin+path, nil, nil)
		if answer.StatusCode != http.StatusOK || answer.body == "" {
			t.Errorf("%s: %d", path, answer.StatusCode)
		}
		hidden.want(t, "admin endpoint, "+path, answer.body)
		for _, label := range []string{production.ID, sandbox.ID, production.Account} { // whose number has no bound
			if path == "/metrics" && strings.Contains(answer.body, label) {
				t.Errorf("the metrics name %s", label)
			}
		}
	}
	hidden.keys().want(t, "database", dump(t, r.database))
	if inFlight := g.series(t, "rekall_requests_in_flight"); inFlight != 0 {
		t.Errorf("%g requests are in flight: a panic left one behind", inFlight)
	}
	g.process.Stop(g.t) // which also exports the last spans
	hidden.want(t, "traces", traces.wantSpans(t, append(sites, "any")...))
	log := g.log.String()
	hidden.want(t, "log", log)
	if all, ours := strings.Count(log, "panic serving"), strings.Count(log, "on purpose: "); ours == 0 || all != ours {
		t.Errorf("%d panics, of which %d were on purpose", all, ours)
	}
	for _, part := range append(sites, `"level":"debug"`, "upstream roundtrip", "handled request") { // or the search proves nothing
		if !strings.Contains(log, part) {
			t.Errorf("the log has no %s", part)
		}
	}
	if r.production.Requests() == 0 || r.sandbox.Requests() == 0 || other.Requests() == 0 {
		t.Error("some backend received nothing")
	}
}

// plantHTTP2 sends a key in the places of an HTTP/2 request, in cleartext.
func plantHTTP2(t *testing.T, g *gateway, hidden *canaries, key string) {
	t.Helper()
	for _, host := range []string{"api.example", "plain.example", "panic.example", "other.example"} {
		request := func(path string, more ...[2]string) [][2]string {
			return append([][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", host}, {":path", path}}, more...)
		}
		for place, fields := range map[string][][2]string{
			"bearer":    request("/v1/memories", [2]string{"authorization", "Bearer " + key}),
			"x-api-key": request("/v1/memories", [2]string{"x-api-key", key}),
			"query":     request("/v1/memories?api_key=" + key),
			"path":      request("/v1/memories/" + key),
			"header":    request("/v1/memories", [2]string{"x-a", key}, [2]string{strings.ToLower(key), "1"}),
			"cookies":   request("/v1/memories", [2]string{"cookie", key}, [2]string{"cookie", "a=" + key}),
			"refused":   request("/v1/memories", [2]string{"connection", key}, [2]string{"x-api-key", key}),
		} {
			answer := g.h2(t, fields, "", nil)
			if answer.status == "" && host != "panic.example" {
				t.Errorf("HTTP/2, %s, %s: no answer", host, place)
			}
			hidden.want(t, "HTTP/2, "+host+", "+place, answer.body)
		}
		if host != "other.example" { // whose backend is none of ours
			trailers := [][2]string{{"authorization", "Bearer " + key}, {"x-a", key}, {"x-rekall-key-id", key}}
			answer := g.h2(t, request("/v1/memories", [2]string{"authorization", "Bearer " + key}, [2]string{"trailer", "x-a"}), "ab", trailers)
			hidden.want(t, "HTTP/2, "+host+", trailers", answer.body)
		}
	}
}

// plantNearMisses sends mistyped keys where one belongs: an almost whole key is as good as a whole one.
func plantNearMisses(t *testing.T, g *gateway, hidden *canaries) {
	t.Helper()
	for name, key := range map[string]string{
		"too short":    apikey.Generate(apikey.Production)[:47],
		"too long":     apikey.Generate(apikey.Production) + "x",
		"another case": "RK_" + apikey.Generate(apikey.Production)[3:],
		"a dash":       strings.Replace(apikey.Generate(apikey.Sandbox), "rk_test_", "rk_test-", 1),
		"rk_live_":     "rk_live_" + apikey.Generate(apikey.Sandbox)[8:],
		"cut in front": apikey.Generate(apikey.Production)[1:],
		"cut further":  apikey.Generate(apikey.Sandbox)[4:],
		"pk_":          "pk_" + apikey.Generate(apikey.Production)[3:],
		"a space":      apikey.Generate(apikey.Production)[:30] + " " + apikey.Generate(apikey.Production)[30:],
	} {
		hidden.add(name, key)
		for _, request := range []string{
			lines("GET /v1/memories HTTP/1.1", "Authorization: Bearer "+key),
			lines("GET /v1/memories HTTP/1.1", "X-Api-Key: "+key),
			lines("GET /v1/memories?x=1&api_key=" + url.QueryEscape(key) + " HTTP/1.1"),
			lines("GET /v1/memories?Api_Key=" + percentEncode(key) + " HTTP/1.1"),
		} {
			answer, received := g.raw(request)
			if answer.Response == nil || answer.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s: %q", name, received)
			}
			hidden.want(t, name+": the answer", received)
		}
	}
}

// dump returns every row of every table as text, and what Postgres tells of the statements it runs.
func dump(t *testing.T, database string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	tables, err := conn.Query(t.Context(), `select table_schema || '.' || table_name from information_schema.tables
		where table_schema not in ('pg_catalog', 'information_schema') or table_name in ('pg_stat_activity', 'pg_prepared_statements')`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(tables, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, name := range names {
		rows, err := conn.Query(t.Context(), "select row::text from "+name+" row")
		if err != nil {
			t.Fatal(err)
		}
		content, err := pgx.CollectRows(rows, pgx.RowTo[*string]) // null: a row of nothing but nulls
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, row := range content {
			if row != nil {
				text.WriteString(*row + "\n")
			}
		}
	}
	for _, part := range []string{"acme", "from rekall."} {
		if !strings.Contains(text.String(), part) {
			t.Errorf("the dump of %d tables has no %s", len(names), part)
		}
	}
	return text.String()
}

// TestNoKeyIsLoggedWhileNobodyCanTell keeps the gateway without its database: every answer is 503.
func TestNoKeyIsLoggedWhileNobodyCanTell(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var hidden canaries
	password := apikey.RandomText(24)
	hidden.add("database password", password)
	g := r.prepare(standardSite + "http://plain.example:PORT {\nbind 127.0.0.1\nlog\nrekall_tls_only\n}\n")
	g.run(fmt.Sprintf("postgres://gateway:%s@127.0.0.1:1/rekall?connect_timeout=1", password))
	eventually.True(t, "the gateway serves", func() bool {
		_, err := http.Get(g.http)
		return err == nil
	})
	key := apikey.Generate(apikey.Production)
	hidden.addKey("key", key)
	for _, request := range []string{
		lines("GET /v1/memories HTTP/1.1", "Authorization: Bearer "+key),
		lines("GET /v1/memories HTTP/1.1", "X-Api-Key: "+key),
		lines("GET /v1/memories?api_key=" + key + " HTTP/1.1"),
	} {
		answer, received := g.raw(request)
		answer.wantCode(t, http.StatusServiceUnavailable, "AUTH_UNAVAILABLE")
		hidden.want(t, "answer", received)
	}
	for _, site := range []string{"api.example", "plain.example"} {
		for place, request := range placements(site, key) {
			_, received := g.raw(request)
			hidden.want(t, site+", "+place+": the answer", received)
		}
	}
	for _, path := range []string{"/config/", "/rekall/status", "/metrics"} {
		hidden.want(t, path, do(t, "GET", g.admin+path, nil, nil).body)
	}
	g.process.Stop(g.t)
	hidden.want(t, "log", g.log.String())
	if r.production.Requests() != 0 {
		t.Error("the backend was contacted")
	}
}

// TestNoKeyIsLoggedWhereCaddyRedirects is about the server that Caddy adds for plain HTTP to a site that has TLS, unless the
// operator says otherwise. It has the site's log, and none of our handlers.
func TestNoKeyIsLoggedWhereCaddyRedirects(t *testing.T) {
	t.Parallel()
	site := "https://localhost:PORT {\nbind 127.0.0.1\n" + newAuthority(t).tls("localhost") + "\nlog\n" + "rekall_gateway {\nproduction {\nrespond 200\n}\n}\n}\n"
	r := newRig(t)
	key := apikey.Generate(apikey.Production)
	for name, tc := range map[string]struct{ sites, host string }{
		"a server of its own":       {site, "localhost"},
		"the server of other sites": {site + "http://other.example:PLAIN {\nbind 127.0.0.1\nlog\nrespond 200\n}\n", "other.example"},
	} {
		t.Run(name, func(t *testing.T) {
			var hidden canaries
			hidden.addKey("key", key)
			plain := fmt.Sprint(process.FreePort(t))
			g := r.of(t).prepare(strings.ReplaceAll(tc.sites, "PLAIN", plain))
			text, err := os.ReadFile(g.file)
			if err != nil {
				t.Fatal(err)
			}
			text = bytes.Replace(text, []byte("auto_https disable_redirects"), []byte("http_port "+plain), 1)
			if err := os.WriteFile(g.file, text, 0o600); err != nil {
				t.Fatal(err)
			}
			g.run(r.database)
			g.waitReady()
			g.http = "http://127.0.0.1:" + plain
			for _, host := range []string{"localhost", "other.example"} {
				for place, request := range placements(host, key) {
					answer, _ := g.raw(request) // the redirect repeats what it was asked for
					if place == "bearer" && host == tc.host && answer.Response == nil {
						t.Error("no answer")
					}
				}
			}
			g.process.Stop(g.t)
			if !strings.Contains(g.log.String(), "http.log.access") {
				t.Error("nothing was logged")
			}
			hidden.want(t, "log", g.log.String())
		})
	}
}

// TestNoKeyIsLoggedAsTheServerNameOfTLS is about what Caddy logs of a request. At level DEBUG it logs handshakes as well, which are
// none of ours.
func TestNoKeyIsLoggedAsTheServerNameOfTLS(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	site := "https://*.api.example:PORT {\n" + newAuthority(t).tls("*.api.example")
	g := r.start(strings.Replace(standardSite, "http://:PORT {", site, 1))
	address := strings.TrimPrefix(g.http, "http://")
	key := r.key("production", "memories:read")
	var hidden canaries
	hidden.add("key", key.Key.Reveal())
	for host, status := range map[string]int{"a": http.StatusOK, key.Key.Reveal(): http.StatusBadRequest} {
		conn, err := tls.Dial("tcp", address, &tls.Config{
			InsecureSkipVerify: true, ServerName: key.Key.Reveal() + ".api.example", NextProtos: []string{"http/1.1"},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if _, err := fmt.Fprintf(conn, "GET /v1/memories HTTP/1.1\r\nHost: %s.api.example\r\nX-Api-Key: %s\r\n\r\n", host, key.Key.Reveal()); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != status {
			t.Errorf("answer %s, want %d", resp.Status, status)
		}
	}
	g.process.Stop(g.t)
	logged := 0
	for line := range strings.Lines(g.log.String()) {
		if strings.Contains(line, `"server_name":"`) && !strings.Contains(line, `"logger":"tls.`) && !strings.Contains(line, `"logger":"events"`) {
			logged++
			hidden.want(t, "log", line)
		}
	}
	if logged == 0 {
		t.Error("no server name was logged")
	}
}

// TestWhatIsNotOursComesThroughByteForByte is about the other parameters and the other schemes of a request with a key.
func TestWhatIsNotOursComesThroughByteForByte(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	key := r.key("production", "memories:read").Key.Reveal()
	for sent, wanted := range map[string]string{
		"z=1&a=2&api_key=" + key + "&m=%20+%2B&a=1":        "z=1&a=2&m=%20+%2B&a=1",
		"api_key=" + key + "&b":                            "b",
		"b=&api_key=" + key:                                "b=",
		"%zz=%&&=&api_key=" + key + "&x=%E9&é":             "%zz=%&&=&x=%E9&é",
		"a;b=1;api_key=" + key + ";c":                      "a;b=1;c",
		"my_api_key=1&api_keys=2&api-key=3&api_key=" + key: "my_api_key=1&api_keys=2&api-key=3",
		"q=a%26api_key%3Db&api_key=" + key:                 "q=a%26api_key%3Db",
	} {
		answer, received := g.raw(lines("GET /v1/memories?" + sent + " HTTP/1.1"))
		if answer.Response == nil || answer.StatusCode != http.StatusOK {
			t.Errorf("?%s: %q", strings.ReplaceAll(sent, key, "KEY"), received)
			continue
		}
		if e := answer.echo(t); e.Query != wanted {
			t.Errorf("?%s: the backend received ?%s, want ?%s", strings.ReplaceAll(sent, key, "KEY"), e.Query, wanted)
		}
	}
	other := []string{"Basic dTpw", "Digest username=\"a\", realm=\"b\"", "AWS4-HMAC-SHA256 Credential=a/b, Signature=c", "bearers  x", "Negotiate abc==", "Basic dTpw"}
	headers := []string{"X-Api-Key: " + key, "X-Request-Id-Of-Caller: abc"} // the latter only begins like one of ours
	for _, value := range other {
		headers = append(headers, "Authorization: "+value)
	}
	answer, received := g.raw(lines("GET /v1/memories HTTP/1.1", headers...))
	if answer.Response == nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("answer %q", received)
	}
	if got := answer.echo(t).Headers["Authorization"]; !slices.Equal(got, other) {
		t.Errorf("the backend received Authorization %q, want %q", got, other)
	}
	if got := answer.echo(t).Headers["X-Request-Id-Of-Caller"]; !slices.Equal(got, []string{"abc"}) {
		t.Errorf("the backend received X-Request-Id-Of-Caller %q", got)
	}
}

package credential_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
)

// dump writes out everything of a request that a log or a backend may see.
func dump(r *http.Request) string {
	var b strings.Builder
	for _, s := range []string{r.Method, r.RequestURI, r.URL.String(), r.URL.RawPath, r.URL.Opaque, r.URL.RawQuery, r.Host} {
		b.WriteString(s + "\n" + decoded(s) + "\n")
	}
	b.WriteString(r.URL.Path + "\n")
	for _, headers := range []http.Header{r.Header, r.Trailer} {
		for _, name := range slices.Sorted(maps.Keys(headers)) {
			b.WriteString(name + "\n")
			for _, v := range headers[name] {
				b.WriteString(v + "\n" + decoded(v) + "\n")
			}
		}
	}
	return b.String()
}

var escape = regexp.MustCompile(`%[0-9A-Fa-f]{2}`)

// decoded decodes the escapes in s that can be decoded.
func decoded(s string) string {
	return escape.ReplaceAllStringFunc(s, func(e string) string {
		b, _ := hex.DecodeString(e[1:])
		return string(b)
	})
}

func checkNoKey(t testing.TB, r *http.Request, keys ...string) {
	t.Helper()
	d := dump(r)
	for _, k := range keys {
		if strings.Contains(d, k) {
			t.Errorf("a key is left in the request:\n%s", d)
		}
	}
	if apikey.ContainsKey(d) {
		t.Errorf("something like a key is left in the request:\n%s", d)
	}
}

// snapshot copies what AtDoor and Take may change, to compare later.
func snapshot(r *http.Request) *http.Request { return r.Clone(r.Context()) }

func same(a, b *http.Request) bool {
	return a.Method == b.Method && a.RequestURI == b.RequestURI && a.Host == b.Host && reflect.DeepEqual(a.URL, b.URL) &&
		reflect.DeepEqual(a.Header, b.Header) && reflect.DeepEqual(a.Trailer, b.Trailer)
}

func request(target string, headers http.Header) *http.Request {
	r := httptest.NewRequest("GET", target, nil)
	if headers != nil {
		r.Header = headers.Clone()
	}
	return r
}

// read makes a request the way a server does.
func read(t testing.TB, lines ...string) *http.Request {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(strings.Join(lines, "\r\n") + "\r\n\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

var kindNames = map[credential.Kind]string{
	credential.None: "None", credential.Key: "Key", credential.Malformed: "Malformed", credential.Token: "Token", credential.Ambiguous: "Ambiguous",
}

// ways are the two ways of a request through the package: they must come to the same result.
var ways = []struct {
	name string
	take func(*http.Request) (*http.Request, credential.Credential)
}{
	{"door and handler", func(r *http.Request) (*http.Request, credential.Credential) {
		r = credential.AtDoor(r)
		return r, credential.Take(r)
	}},
	{"handler alone", func(r *http.Request) (*http.Request, credential.Credential) { return r, credential.Take(r) }},
}

func checkKey(t testing.TB, c credential.Credential, key string) {
	t.Helper()
	env, _ := apikey.Parse(key)
	if c.Kind != credential.Key || c.Environment != env || c.Digest != apikey.Hash(key) || c.Reveal() != key || c.PathHeldKey {
		t.Errorf("%s of %v, revealed %d characters; want a key of %v", kindNames[c.Kind], c.Environment, len(c.Reveal()), env)
	}
}

func checkKind(t testing.TB, c credential.Credential, want credential.Kind) {
	t.Helper()
	if c.Kind != want {
		t.Errorf("kind %s, want %s", kindNames[c.Kind], kindNames[want])
	}
	if want != credential.Key && (c.Environment != 0 || c.Digest != apikey.Digest{} || c.Reveal() != "") {
		t.Errorf("%s has an environment, a digest or a key", kindNames[c.Kind])
	}
}

func TestEveryWayOfPassingACredentialHasItsKind(t *testing.T) {
	key, sandbox := apikey.Generate(apikey.Production), apikey.Generate(apikey.Sandbox)
	authorization := func(v ...string) http.Header { return http.Header{"Authorization": v} }
	xAPIKey := func(v ...string) http.Header { return http.Header{"X-Api-Key": v} }
	for _, tt := range []struct {
		name    string
		headers http.Header
		query   string
		want    credential.Kind
		key     string // if want is Key
	}{
		{name: "nothing", want: credential.None},

		{name: "Bearer", headers: authorization("Bearer " + key), want: credential.Key, key: key},
		{name: "Bearer, sandbox", headers: authorization("Bearer " + sandbox), want: credential.Key, key: sandbox},
		{name: "BEARER", headers: authorization("BEARER " + key), want: credential.Key, key: key},
		{name: "bearer", headers: authorization("bearer " + key), want: credential.Key, key: key},
		{name: "Bearer and a tab", headers: authorization("Bearer\t" + key), want: credential.Key, key: key},
		{name: "Bearer and several spaces", headers: authorization("Bearer    " + key), want: credential.Key, key: key},
		{name: "spaces around Bearer", headers: authorization(" \tBearer \t" + key + " \t"), want: credential.Key, key: key},
		{name: "Bearer twice, equal", headers: authorization("Bearer "+key, "bearer "+key), want: credential.Key, key: key},
		{name: "Bearer twice, different", headers: authorization("Bearer "+key, "Bearer "+sandbox), want: credential.Ambiguous},
		{name: "Bearer three times, the last equal to the first", headers: authorization("Bearer "+key, "Bearer "+sandbox, "Bearer "+key), want: credential.Ambiguous},
		{name: "Bearer with a key too short", headers: authorization("Bearer " + key[:47]), want: credential.Malformed},
		{name: "Bearer with a key too long", headers: authorization("Bearer " + key + "0"), want: credential.Malformed},
		{name: "Bearer with rk_live_", headers: authorization("Bearer rk_live_" + key[8:]), want: credential.Malformed},
		{name: "Bearer with a prefix in capitals", headers: authorization("Bearer RK_" + key[3:]), want: credential.Malformed},
		{name: "Bearer with another secret", headers: authorization("Bearer sk_live_abc"), want: credential.Malformed},
		{name: "Bearer with nothing", headers: authorization("Bearer"), want: credential.Malformed},
		{name: "Bearer with a space", headers: authorization("Bearer "), want: credential.Malformed},
		{name: "Bearer with NUL", headers: authorization("Bearer " + key[:47] + "\x00"), want: credential.Malformed},
		{name: "Bearer with NUL after a key", headers: authorization("Bearer " + key + "\x00"), want: credential.Malformed},
		{name: "Bearer, not ASCII", headers: authorization("Bearer " + key[:46] + "é"), want: credential.Malformed},
		{name: "Bearer, a space that is not ASCII", headers: authorization("Bearer\u00a0" + key), want: credential.Malformed},
		{name: "Bearer, list of equal keys", headers: authorization("Bearer " + key + ", Bearer " + key), want: credential.Malformed},
		{name: "Bearer, list of keys", headers: authorization("Bearer " + key + "," + sandbox), want: credential.Malformed},
		{name: "Bearer with a key in quotes", headers: authorization(`Bearer "` + key + `"`), want: credential.Malformed},
		{name: "Bearer Bearer", headers: authorization("Bearer Bearer " + key), want: credential.Malformed},
		{name: "Bearer without a space", headers: authorization("Bearer" + key), want: credential.Malformed},
		{name: "raw key", headers: authorization(key), want: credential.Malformed},
		{name: "Token scheme with a key", headers: authorization("Token " + key), want: credential.Malformed},
		{name: "Basic with a raw key", headers: authorization("Basic " + key), want: credential.Malformed},
		{name: "Basic with a key as user", headers: authorization("Basic " + basic(key+":")), want: credential.Malformed},
		{name: "Basic with a key as password", headers: authorization("bAsic  " + basic("api:"+sandbox)), want: credential.Malformed},
		{name: "Basic with a key, not padded", headers: authorization("Basic " + strings.TrimRight(basic(key+":x"), "=")), want: credential.Malformed},
		{name: "key and Basic with a key", headers: authorization("Bearer "+key, "Basic "+basic(key+":")), want: credential.Ambiguous},
		{name: "Basic with a long password", headers: authorization("Basic " + basic("user:"+strings.Repeat("a", 80))), want: credential.None},
		{name: "Bearer and a raw key", headers: authorization("Bearer "+key, key), want: credential.Ambiguous},
		{name: "token", headers: authorization("Bearer rat_abc"), want: credential.Token},
		{name: "token as long as a key", headers: authorization("Bearer rat_" + key[4:]), want: credential.Token},
		{name: "list of tokens", headers: authorization("Bearer rat_abc, Bearer rat_abc"), want: credential.Malformed},
		{name: "list of a token and a key", headers: authorization("Bearer rat_abc," + key), want: credential.Malformed},
		{name: "token with a control character", headers: authorization("Bearer rat_a\x01bc"), want: credential.Malformed},
		{name: "key and token", headers: authorization("Bearer "+key, "Bearer rat_abc"), want: credential.Ambiguous},
		{name: "token and key", headers: authorization("Bearer rat_abc", "Bearer "+key), want: credential.Ambiguous},
		{name: "key and token in x-api-key", headers: http.Header{"Authorization": {"Bearer " + key}, "X-Api-Key": {"rat_abc"}}, want: credential.Ambiguous},
		{name: "token and key in the query", headers: authorization("Bearer rat_abc"), query: "api_key=" + key, want: credential.Ambiguous},
		{name: "key and malformed", headers: authorization("Bearer "+key, "Bearer abc"), want: credential.Ambiguous},
		{name: "token and malformed", headers: authorization("Bearer rat_abc", "Bearer abc"), want: credential.Ambiguous},
		{name: "key and Basic", headers: authorization("Bearer "+key, "Basic dXNlcjpwYXNz"), want: credential.Key, key: key},
		{name: "Basic", headers: authorization("Basic dXNlcjpwYXNz"), want: credential.None},
		{name: "Bearerx", headers: authorization("Bearerx abc"), want: credential.None},
		{name: "empty Authorization", headers: authorization(""), want: credential.None},

		{name: "x-api-key", headers: xAPIKey(key), want: credential.Key, key: key},
		{name: "x-api-key, sandbox", headers: xAPIKey(sandbox), want: credential.Key, key: sandbox},
		{name: "x-api-key in spaces", headers: xAPIKey("  " + key + "\t"), want: credential.Key, key: key},
		{name: "x-api-key twice, equal", headers: xAPIKey(key, key), want: credential.Key, key: key},
		{name: "x-api-key twice, different", headers: xAPIKey(key, sandbox), want: credential.Ambiguous},
		{name: "x-api-key, empty", headers: xAPIKey(""), want: credential.None},
		{name: "x-api-key, a space", headers: xAPIKey(" "), want: credential.None},
		{name: "x-api-key, empty and a key", headers: xAPIKey("", key), want: credential.Key, key: key},
		{name: "x-api-key, list", headers: xAPIKey(key + ", " + sandbox), want: credential.Malformed},
		{name: "x-api-key with a scheme", headers: xAPIKey("Bearer " + key), want: credential.Malformed},
		{name: "x-api-key of another product", headers: xAPIKey("abc"), want: credential.Malformed},
		{name: "x-api-key with a token", headers: xAPIKey("rat_abc"), want: credential.Token},
		{name: "x-api-key with NUL", headers: xAPIKey(key + "\x00"), want: credential.Malformed},
		{name: "x-api-key, not ASCII", headers: xAPIKey(key + "é"), want: credential.Malformed},

		{name: "query", query: "api_key=" + key, want: credential.Key, key: key},
		{name: "query, sandbox", query: "api_key=" + sandbox, want: credential.Key, key: sandbox},
		{name: "query, encoded name", query: "%61pi_key=" + key, want: credential.Key, key: key},
		{name: "query, encoded underscore", query: "api%5fkey=" + key, want: credential.Key, key: key},
		{name: "query, name in capitals", query: "API_KEY=" + key, want: credential.Key, key: key},
		{name: "query, name in mixed case", query: "Api_Key=" + key, want: credential.Key, key: key},
		{name: "query, after a semicolon", query: "a=1;api_key=" + key, want: credential.Key, key: key},
		{name: "query, first thing is a semicolon", query: ";api_key=" + key, want: credential.Key, key: key},
		{name: "query, encoded value", query: "api_key=%72%6b%5f" + key[3:], want: credential.Key, key: key},
		{name: "query, repeated, equal", query: "api_key=" + key + "&api_key=" + key, want: credential.Key, key: key},
		{name: "query, repeated, equal but spelt otherwise", query: "api_key=" + key + "&API%5FKEY=%72k_" + key[3:], want: credential.Key, key: key},
		{name: "query, repeated, different", query: "api_key=" + key + "&api_key=" + sandbox, want: credential.Ambiguous},
		{name: "query, different with a semicolon", query: "api_key=" + key + ";api_key=" + sandbox, want: credential.Ambiguous},
		{name: "query, empty", query: "api_key=", want: credential.None},
		{name: "query, no value", query: "api_key", want: credential.None},
		{name: "query, empty and a key", query: "api_key=&api_key=" + key, want: credential.Key, key: key},
		{name: "query, list", query: "api_key=" + key + "," + sandbox, want: credential.Malformed},
		{name: "query, spaces", query: "api_key=+" + key, want: credential.Malformed},
		{name: "query, another secret", query: "api_key=abc", want: credential.Malformed},
		{name: "query, token", query: "api_key=rat_abc", want: credential.Token},
		{name: "query, NUL", query: "api_key=" + key + "%00", want: credential.Malformed},
		{name: "query, not ASCII", query: "api_key=" + key + "%C3%A9", want: credential.Malformed},
		{name: "query, bad escape", query: "api_key=" + key + "%zz", want: credential.Malformed},
		{name: "query, second equals sign", query: "api_key=" + key + "=", want: credential.Malformed},
		{name: "query, double-encoded name", query: "%2561pi_key=abc", want: credential.None},
		{name: "query, key under another name", query: "key=" + key, want: credential.None},
		{name: "query, key as a name", query: key + "=api_key", want: credential.None},
		{name: "query, name with brackets", query: "api_key[]=" + key, want: credential.None},
		{name: "query, longer name", query: "xapi_key=" + key, want: credential.None},
	} {
		for _, way := range ways {
			t.Run(tt.name+"/"+way.name, func(t *testing.T) {
				target := "/v1/memories"
				if tt.query != "" {
					target += "?" + tt.query
				}
				r, c := way.take(request(target, tt.headers))
				if tt.want == credential.Key {
					checkKey(t, c, tt.key)
				} else {
					checkKind(t, c, tt.want)
				}
				if c.PathHeldKey {
					t.Error("a key in the path")
				}
				checkNoKey(t, r, key, sandbox)
				if r.RequestURI != r.URL.RequestURI() {
					t.Errorf("RequestURI %q, URL %q", r.RequestURI, r.URL.RequestURI())
				}
			})
		}
	}
}

func TestAllPairsOfPlacesAgreeOrAreAmbiguous(t *testing.T) {
	key, other := apikey.Generate(apikey.Production), apikey.Generate(apikey.Production)
	places := map[string]func(r *http.Request, value string){
		"authorization": func(r *http.Request, value string) { r.Header.Add("Authorization", "Bearer "+value) },
		"x-api-key":     func(r *http.Request, value string) { r.Header.Add("X-Api-Key", value) },
		"query": func(r *http.Request, value string) {
			r.URL.RawQuery += "&api_key=" + value
			r.RequestURI = r.URL.RequestURI()
		},
	}
	for name1, place1 := range places {
		for name2, place2 := range places {
			for _, tt := range []struct {
				name, first, second string
				want                credential.Kind
			}{
				{"equal", key, key, credential.Key},
				{"different", key, other, credential.Ambiguous},
				{"key and token", key, "rat_abc", credential.Ambiguous},
				{"key and malformed", key, key[:47], credential.Ambiguous},
				{"key and another secret", key, "abc", credential.Ambiguous},
				{"two malformed", key[:47], "abc", credential.Malformed},
				{"two tokens", "rat_a", "rat_b", credential.Token},
			} {
				for _, way := range ways {
					t.Run(name1+"/"+name2+"/"+tt.name+"/"+way.name, func(t *testing.T) {
						r := request("/v1/memories?a=1", nil)
						place1(r, tt.first)
						place2(r, tt.second)
						r, c := way.take(r)
						if tt.want == credential.Key {
							checkKey(t, c, tt.first)
						} else {
							checkKind(t, c, tt.want)
						}
						checkNoKey(t, r, key, other)
						if len(r.Header) != 0 || r.URL.RawQuery != "a=1" {
							t.Errorf("left: %q %q", r.Header, r.URL.RawQuery)
						}
					})
				}
			}
		}
	}
}

func TestAFoldedHeaderLineIsOneValue(t *testing.T) { // obs-fold, RFC 9112, section 5.2
	key := apikey.Generate(apikey.Production)
	for _, way := range ways {
		r, c := way.take(read(t, "GET /v1/memories HTTP/1.1", "Host: h", "Authorization: Bearer\r\n\t "+key))
		checkKey(t, c, key)
		checkNoKey(t, r, key)
		r, c = way.take(read(t, "GET /v1/memories HTTP/1.1", "Host: h", "Authorization: Bearer "+key[:20]+"\r\n "+key[20:]))
		checkKind(t, c, credential.Malformed)
		if len(r.Header) != 0 {
			t.Errorf("left: %q", r.Header)
		}
	}
}

func TestHeaderNamesAreFoundInWhateverCaseTheyAreSent(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	for _, line := range []string{
		"Authorization: Bearer " + key, "AUTHORIZATION: Bearer " + key, "authorization:bearer " + key, "aUTHORIZATION:   BEARER   " + key + "  ",
		"X-Api-Key: " + key, "x-api-key: " + key, "X-API-KEY:" + key, "x-API-key: \t" + key,
	} {
		for _, way := range ways {
			r, c := way.take(read(t, "GET /v1/memories HTTP/1.1", "Host: h", line))
			checkKey(t, c, key)
			checkNoKey(t, r, key)
			if len(r.Header) != 0 {
				t.Errorf("left: %q", r.Header)
			}
		}
	}
}

func TestTheDoorTakesOnlyWhatIsOursAndTheHandlerTheRest(t *testing.T) {
	for _, tt := range []struct {
		headers http.Header
		query   string
		want    credential.Kind
	}{
		{http.Header{"Authorization": {"Bearer rat_abc"}}, "", credential.Token},
		{http.Header{"Authorization": {"Bearer eyJhbGciOi.J9.x"}}, "", credential.Malformed},
		{http.Header{"Authorization": {"Bearer"}}, "", credential.Malformed},
		{http.Header{"X-Api-Key": {"abc"}}, "", credential.Malformed},
		{http.Header{"X-Api-Key": {""}}, "", credential.None},
		{nil, "api_key=abc&b=2", credential.Malformed},
		{nil, "api_key=&b=2", credential.None},
	} {
		r := request("/?"+tt.query, tt.headers)
		before := snapshot(r)
		if got := credential.AtDoor(r); got != r || !same(r, before) {
			t.Errorf("%q %q: the door changed the request", tt.headers, tt.query)
		}
		checkKind(t, credential.Take(r), tt.want)
		if len(r.Header) != 0 || strings.Contains(r.RequestURI, "api_key") {
			t.Errorf("%q %q: left %q %q", tt.headers, tt.query, r.Header, r.RequestURI)
		}
	}
}

func TestTheDoorLeavesSecretsOfOthersThatOnlyLookLikeOurs(t *testing.T) {
	for _, secret := range []string{
		"network_1", "sk_work_abc", "eyJhbGciOiJIUzI1NiJ9.eyJSk_oRk_IjoxfQ.c2lnbmF0dXJl", "eyJhbGciOiJIUzI1NiJ9.e30.Rk_c2lnbmF0dXJl", "a-rk_b", "_rk_",
	} {
		for _, r := range []*http.Request{
			request("/", http.Header{"Authorization": {"Bearer " + secret}}),
			request("/", http.Header{"X-Api-Key": {secret}}),
			request("/?a=1&api_key="+secret, nil),
		} {
			before := snapshot(r)
			if got := credential.AtDoor(r); got != r || !same(r, before) {
				t.Errorf("%q was taken from %s %q", secret, before.RequestURI, before.Header)
			}
			checkKind(t, credential.Take(r), credential.Malformed)
		}
	}
}

func TestTheDoorTakesMistypedKeys(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	production, sandbox := key[len(apikey.ProductionPrefix):], apikey.Generate(apikey.Sandbox)[len(apikey.SandboxPrefix):]
	for _, secret := range []string{
		key[:47], "RK_" + key[3:], "Rk_", `"` + key[:40], "'rk_x'", "x,rk_y", "Bearer rk_x", "é" + key[:20], "\x00rk_x", "x" + key, "key=rk_x", "a/rk_x",
		production, "_" + production, "k_" + production, "pk_" + production, "rk-" + production, "sk_live_" + production, "x" + production,
		sandbox, "_" + sandbox, "est_" + sandbox, "test_" + sandbox, "k_test_" + sandbox, "rk-test-" + sandbox, "sk_test_" + sandbox,
	} {
		for _, r := range []*http.Request{
			request("/", http.Header{"Authorization": {"Bearer " + secret}}),
			request("/", http.Header{"X-Api-Key": {secret}}),
			request("/?api_key="+url.QueryEscape(secret), nil),
			request("/?api_key="+strings.ReplaceAll(url.QueryEscape(url.QueryEscape(secret)), "_", "%255F"), nil),
		} {
			r = credential.AtDoor(r)
			if len(r.Header) != 0 || r.RequestURI != "/" {
				t.Errorf("%q is left", apikey.Redact(secret))
			}
			checkKind(t, credential.Take(r), credential.Malformed)
		}
	}
}

func TestAuthorizationOfOtherSchemesIsLeftByteForByte(t *testing.T) {
	values := []string{
		"Basic dXNlcjpwYXNz", "  basic  dXNlcjpwYXNz ", `Digest username="Mufasa", realm="a,b", uri="/dir/index.html", response="6629fae49393a05397450978507c4ef1"`,
		"AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20251123/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=fe5f80", "Negotiate YII=", "", "x%20y%zz",
	}
	for _, way := range ways {
		for _, v := range values {
			r := request("/", http.Header{"Authorization": {v}})
			before := snapshot(r)
			r, c := way.take(r)
			checkKind(t, c, credential.None)
			if !same(r, before) {
				t.Errorf("%s: %q became %q", way.name, v, r.Header)
			}
		}
		key := apikey.Generate(apikey.Production)
		r, c := way.take(request("/", http.Header{"Authorization": slices.Insert(slices.Clone(values), 3, "Bearer "+key)}))
		checkKey(t, c, key)
		if !slices.Equal(r.Header["Authorization"], values) {
			t.Errorf("%s: left %q", way.name, r.Header)
		}
	}
}

func TestARequestWithoutAnythingOfOursIsReturnedAsItIs(t *testing.T) {
	for _, r := range []*http.Request{
		request("/", nil),
		request("/v1/memories?limit=10&q=%61pi+key&&=&x=%zz;y", http.Header{"User-Agent": {"curl/8"}, "Cookie": {"a=b"}}),
		request("/work_test/rk_/?rk_=1&RK_=2", http.Header{"Referer": {"https://h/%zz?work_x=" + strings.Repeat("%41", 60)}}),
		request("http://user:pass@h.example/p?q", http.Header{"Authorization": {"Basic dXNlcjpwYXNz", "Bearer abc"}, "X-Api-Key": {"abc"}}),
		request("/?", nil),
		read(t, "OPTIONS * HTTP/1.1", "Host: h"),
		read(t, "CONNECT h:443 HTTP/1.1", "Host: h"),
		read(t, "POST / HTTP/1.1", "Host: h", "Content-Length: 1", "", "a"),
		read(t, "POST / HTTP/1.1", "Host: h", "Transfer-Encoding: chunked", "Trailer: X-Checksum", "", "0"),
	} {
		before := snapshot(r)
		got := credential.AtDoor(r)
		hasBody := r.ContentLength != 0 // then the server keeps its own request
		if (got != r) != hasBody || !same(r, before) || !same(got, before) {
			t.Errorf("%s %s: changed", before.Method, before.RequestURI)
		}
	}
}

func TestTheKeyOutlivesTheDoorInTheContextOnly(t *testing.T) {
	type contextKey struct{}
	key := apikey.Generate(apikey.Sandbox)
	r := request("/", http.Header{"X-Api-Key": {key}})
	r = credential.AtDoor(r)
	outer := r.Context()
	if outer.Value(contextKey{}) != nil || outer.Err() != nil || outer.Done() != httptest.NewRequest("GET", "/", nil).Context().Done() {
		t.Error("the context is not like the one before")
	}
	for range 2 { // every handler that asks gets the same answer
		c := credential.Take(r)
		checkKey(t, c, key)
	}
	if c := credential.Take(r.WithContext(t.Context())); c.Kind != credential.None {
		t.Error("a request with another context has the credential")
	}
}

func TestACredentialShowsNoKeyUnlessAskedToRevealIt(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	for _, way := range ways {
		_, c := way.take(request("/", http.Header{"X-Api-Key": {key}}))
		checkKey(t, c, key)
		for _, v := range []any{c, &c, []credential.Credential{c}, map[string]any{"c": c}, struct{ C credential.Credential }{c}} {
			for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
				if s := fmt.Sprintf(format, v); strings.Contains(s, key[3:]) || strings.Contains(s, fmt.Sprintf("%x", key)) {
					t.Errorf("%s of a %T shows the key: %s", format, v, s)
				}
			}
			j, err := json.Marshal(v)
			if err != nil || !strings.Contains(string(j), `"[credential]"`) || strings.Contains(string(j), key[3:]) {
				t.Errorf("the JSON of a %T shows more than a placeholder: %s, %v", v, j, err)
			}
			var log bytes.Buffer
			slog.New(slog.NewTextHandler(&log, nil)).Info("m", "v", v)
			slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "v", v)
			if strings.Contains(log.String(), key[3:]) || strings.Contains(log.String(), hex.EncodeToString(c.Digest[:4])) {
				t.Errorf("the log of a %T shows more than a placeholder: %s", v, log.String())
			}
		}
	}
}

func TestOnlyAWellFormedKeyIsRevealed(t *testing.T) {
	key, other := apikey.Generate(apikey.Production), apikey.Generate(apikey.Production)
	for kind, values := range map[credential.Kind][]string{
		credential.None: nil, credential.Malformed: {key + "0"}, credential.Token: {"rat_abc"}, credential.Ambiguous: {key, other},
	} {
		for _, way := range ways {
			_, c := way.take(request("/", http.Header{"X-Api-Key": values}))
			checkKind(t, c, kind)
		}
	}
	_, c := ways[0].take(request("/", http.Header{"X-Api-Key": {key}}))
	for _, kind := range []credential.Kind{credential.None, credential.Malformed, credential.Token, credential.Ambiguous} {
		c.Kind = kind
		if c.Reveal() != "" {
			t.Errorf("%s reveals", kindNames[kind])
		}
	}
}

// TestKeyInTheServerNameIsTakenOutOfOneRequestOnly: the state is the connection's, and other requests on it read it at the same time.
func TestKeyInTheServerNameIsTakenOutOfOneRequestOnly(t *testing.T) {
	name := apikey.Generate(apikey.Production) + ".api.example"
	connection := &tls.ConnectionState{ServerName: name}
	r := request("/", nil)
	r.TLS = connection
	credential.AtDoor(r)
	if apikey.ContainsKey(r.TLS.ServerName) || connection.ServerName != name {
		t.Errorf("the request has %s, its connection %s", apikey.Redact(r.TLS.ServerName), apikey.Redact(connection.ServerName))
	}
}

func basic(userAndPassword string) string {
	return base64.StdEncoding.EncodeToString([]byte(userAndPassword))
}

func TestTheDoorAllocatesNothingForRequestsWithNothingOfOurs(t *testing.T) {
	for _, r := range ordinaryRequests() {
		r.TLS = &tls.ConnectionState{ServerName: "a-name-of-a-host-as-long-as-a-key.and-longer.api.example"}
		if n := testing.AllocsPerRun(1000, func() { credential.AtDoor(r) }); n != 0 {
			t.Errorf("%s: %v allocations", r.RequestURI, n)
		}
	}
}

func ordinaryRequests() []*http.Request {
	return []*http.Request{
		request("/", nil),
		request("/v1/memories/mem_01H8XGJWBWBAQ4?limit=10&cursor=abcdef", http.Header{
			"User-Agent": {"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0.0.0 Safari/537.36"},
			"Accept":     {"application/json"}, "Accept-Encoding": {"gzip, br"}, "Content-Type": {"application/json"},
			"Referer": {"https://app.example.com/dashboard/settings/overview?tab=general"},
		}),
		request("/", http.Header{"Authorization": {"Basic dXNlcjpwYXNz"}}),
		request("/", http.Header{ // of other sites
			"Authorization": {"Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ." + strings.Repeat("S1g", 20)}, "X-Api-Key": {strings.Repeat("x", 60)},
		}),
		request("/caf%C3%A9?q=a%20b%2Fc&url=https%3A%2F%2Fh.example%2Fx%3Fy%3D1&next_page=%7B%7D&zz=%zz", http.Header{
			"Cookie":  {"session=" + strings.Repeat("%7B%22a%22%3A1%7D", 10)},
			"Referer": {"https://app.example.com/search?query=one%20and%20two%20and%20three%20and%20four&network_id=1"},
		}),
	}
}

func TestTheDoorAllocatesLittleForABearerKey(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	r := request("/v1/memories", http.Header{"User-Agent": {"curl/8"}})
	values := []string{"Bearer " + key}
	n := testing.AllocsPerRun(1000, func() {
		r.Header["Authorization"] = values
		credential.AtDoor(r)
	})
	if n > 3 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAtDoor(b *testing.B) {
	key := apikey.Generate(apikey.Production)
	bearer, raw := []string{"Bearer " + key}, []string{key}
	for _, bm := range []struct {
		name string
		put  func(*http.Request)
	}{
		{"none", func(*http.Request) {}},
		{"bearer", func(r *http.Request) { r.Header["Authorization"] = bearer }},
		{"x-api-key", func(r *http.Request) { r.Header["X-Api-Key"] = raw }},
		{"query", func(r *http.Request) { r.URL.RawQuery = "limit=10&api_key=" + key }}, // the concatenation is one allocation
	} {
		b.Run(bm.name, func(b *testing.B) {
			r := ordinaryRequests()[1]
			b.ReportAllocs()
			for b.Loop() {
				bm.put(r)
				credential.AtDoor(r)
			}
		})
	}
}

func BenchmarkTakeAfterDoor(b *testing.B) {
	r := ordinaryRequests()[1]
	r.Header["Authorization"] = []string{"Bearer " + apikey.Generate(apikey.Production)}
	r = credential.AtDoor(r)
	b.ReportAllocs()
	for b.Loop() {
		if c := credential.Take(r); c.Kind != credential.Key {
			b.Fatal("no key")
		}
	}
}

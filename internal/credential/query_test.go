package credential_test

import (
	"bufio"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
)

func TestOtherQueryParametersStayByteForByteAndInOrder(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	for _, tt := range []struct{ query, want string }{ // K is the key
		{"api_key=K", ""},
		{"api_key=K&", ""},
		{"&api_key=K", ""},
		{"a=1&api_key=K", "a=1"},
		{"api_key=K&a=1", "a=1"},
		{"b=2&api_key=K&a=1", "b=2&a=1"},
		{"b=2&api_key=K&a=1&api_key=K&c=3", "b=2&a=1&c=3"},
		{"z=1&a=2&z=3&api_key=K&a=4", "z=1&a=2&z=3&a=4"},
		{"a=1&&b=2&api_key=K", "a=1&&b=2"},
		{"&&a=1&api_key=K&&", "&&a=1&&"},
		{"=&a=&=b&c&api_key=K", "=&a=&=b&c"},
		{"a=x+y&b=x%20y&c=x%2By&api_key=K", "a=x+y&b=x%20y&c=x%2By"},
		{"a=%e9%E9&b=%zz&c=%&d=%4&api_key=K", "a=%e9%E9&b=%zz&c=%&d=%4"},
		{"a=é&b=\xff&api_key=K", "a=é&b=\xff"},
		{"a=1;b=2&api_key=K", "a=1;b=2"},
		{"a=1;api_key=K&b=2", "a=1&b=2"}, // to those who split on '&' only, b is a parameter before and after
		{"a=1;api_key=K;api_key=K&b=2;c=3", "a=1&b=2;c=3"},
		{"api_key=K;a=1&b=2", "a=1&b=2"},
		{"a=1&api_key=K;b=2", "a=1&b=2"},
		{"a=1;api_key=K;b=2", "a=1;b=2"},
		{";api_key=K", ""},
		{"a=b=c==&api_key=K", "a=b=c=="},
		{"a=?/:@!$'()*,[]&api_key=K", "a=?/:@!$'()*,[]"},
		{"redirect=https%3A%2F%2Fh%2F%3Fa%3D1%26b&api_key=K", "redirect=https%3A%2F%2Fh%2F%3Fa%3D1%26b"},
		{"%2561pi_key=x&api_key=K", "%2561pi_key=x"},
		{"apikey=x&api-key=y&xapi_key=z&api_key[]=w&api_key=K", "apikey=x&api-key=y&xapi_key=z&api_key[]=w"},
		{"a=1&%61PI%5fkey=%72K2&b=2", "a=1&b=2"},
	} {
		query := strings.NewReplacer("K2", key[1:], "K", key).Replace(tt.query)
		for _, way := range ways {
			r, c := way.take(request("/v1/memories?"+query, nil))
			checkKey(t, c, key)
			if r.URL.RawQuery != tt.want {
				t.Errorf("%s: %q leaves %q, want %q", way.name, tt.query, r.URL.RawQuery, tt.want)
			}
			target := "/v1/memories"
			if tt.want != "" {
				target += "?" + tt.want
			}
			if r.RequestURI != target || r.URL.RequestURI() != target {
				t.Errorf("%s: %q leaves the target %q and %q, want %q", way.name, tt.query, r.RequestURI, r.URL.RequestURI(), target)
			}
		}
	}
}

func TestAQueryWithoutCredentialIsNotTouched(t *testing.T) {
	for _, query := range []string{
		"", "a=1", "&", "&&;", "a=%zz&b=%", "a=x+y&b=x%20y", "%2561pi_key=x", "apikey=1", "rk_=work_", "%72k_=1;", "=", "a=é", "xapi_key=1", "API-KEY=1",
	} {
		for _, way := range ways {
			r := request("/v1/memories?"+query, nil)
			before := snapshot(r)
			r, c := way.take(r)
			checkKind(t, c, credential.None)
			if !same(r, before) {
				t.Errorf("%s: %q became %q", way.name, query, r.RequestURI)
			}
		}
	}
}

func TestAKeyInAnotherParameterIsMaskedAndItsNeighboursAreNot(t *testing.T) {
	key := apikey.Generate(apikey.Sandbox)
	masked := url.QueryEscape("rk_…")
	for _, tt := range []struct{ query, want string }{ // K is the key, M its mask
		{"token=K", "token=M"},
		{"a=%zz&token=K&b=x+y", "a=%zz&token=M&b=x+y"},
		{"a=1;token=K;b=2", "a=1;token=M;b=2"},
		{"%2561pi_key=K&a=+", "%2561pi_key=M&a=+"},
		{"url=https%3A%2F%2Fh%2F%3Fapi_key%3DK&a=1", "url=https%3A%2F%2Fh%2F%3Fapi_key%3DM&a=1"},
		{"K=1&a=%41", "M=1&a=%41"},
		{"token=%72k_test_S", "token=M"},
	} {
		query := strings.NewReplacer("K", key, "S", key[8:]).Replace(tt.query)
		r := credential.AtDoor(request("/?"+query, nil))
		checkNoKey(t, r, key)
		if want := strings.ReplaceAll(tt.want, "M", masked); r.URL.RawQuery != want {
			t.Errorf("%q became %q, want %q", tt.query, r.URL.RawQuery, want)
		}
		if r.RequestURI != r.URL.RequestURI() {
			t.Errorf("RequestURI %q, URL %q", r.RequestURI, r.URL.RequestURI())
		}
		checkKind(t, credential.Take(r), credential.None)
	}
}

func TestTenThousandParametersAreCutCorrectly(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	var query, want []string
	for i := range 10_000 {
		p := fmt.Sprintf("p%d=%%41+%d", i, i)
		query, want = append(query, p), append(want, p)
		switch i % 1000 {
		case 1:
			query = append(query, "api_key="+key)
		case 2:
			query, want = append(query, "x="+key), append(want, "x="+url.QueryEscape("rk_…"))
		}
	}
	for _, way := range ways {
		r, c := way.take(request("/?"+strings.Join(query, "&"), nil))
		checkKey(t, c, key)
		if r.URL.RawQuery != strings.Join(want, "&") {
			t.Errorf("%s: the other parameters changed", way.name)
		}
	}
	r, c := ways[0].take(request("/?"+strings.Repeat("api_key="+key+"&", 10_000), nil))
	checkKey(t, c, key)
	if r.RequestURI != "/" {
		t.Errorf("left %d characters", len(r.RequestURI))
	}
}

func TestAKeyInThePathIsMaskedAndReported(t *testing.T) {
	production, sandbox := apikey.Generate(apikey.Production), apikey.Generate(apikey.Sandbox)
	for _, target := range []string{
		"/" + production, "/v1/memories/" + sandbox, "/v1/" + production + "/x?a=1", "/v1/x-" + sandbox + "-y", "/" + production + "/" + sandbox,
		"/v1/%72%6b_" + production[3:], "/v1/a%2F" + sandbox, "/v1/a%20b/" + production + "?q=%zz", "/v1/" + production + "0", "http://h.example/" + sandbox,
	} {
		r := credential.AtDoor(request(target, nil))
		checkNoKey(t, r, production, sandbox)
		if r.RequestURI != r.URL.RequestURI() {
			t.Errorf("RequestURI %q, URL %q", r.RequestURI, r.URL.RequestURI())
		}
		c := credential.Take(r)
		if !c.PathHeldKey {
			t.Errorf("not reported: %s", apikey.Redact(target))
		}
		checkKind(t, c, credential.None)

		// What else the request presents is found too.
		r = credential.AtDoor(request(target, http.Header{"Authorization": {"Bearer " + production}}))
		checkNoKey(t, r, production, sandbox)
		if c := credential.Take(r); !c.PathHeldKey || c.Kind != credential.Key || c.Digest != apikey.Hash(production) {
			t.Errorf("%s and a key: %s, %v", apikey.Redact(target), kindNames[c.Kind], c.PathHeldKey)
		}
		r = credential.AtDoor(request(target, http.Header{"X-Api-Key": {production, sandbox}}))
		if c := credential.Take(r); !c.PathHeldKey || c.Kind != credential.Ambiguous {
			t.Errorf("%s and two keys: %s, %v", apikey.Redact(target), kindNames[c.Kind], c.PathHeldKey)
		}
	}
}

func TestAKeyInAnOpaqueTargetIsMaskedAndReported(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	r := credential.AtDoor(read(t, "GET x:"+key+"?a=1 HTTP/1.1", "Host: h"))
	checkNoKey(t, r, key)
	if c := credential.Take(r); !c.PathHeldKey {
		t.Error("not reported")
	}
}

func TestAKeyWhereNoCredentialBelongsIsMaskedAndPresentsNothing(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	encoded := "%72%6b%5f" + key[3:]
	get := "GET /v1/memories HTTP/1.1"
	for _, lines := range [][]string{
		{get, "Host: h", "Referer: https://h/p?api_key=" + key},
		{get, "Host: h", "Referer: https://h/p?api_key=" + encoded + "&a=%20"},
		{get, "Host: h", "Referer: https://h/?u=https%3A%2F%2Fg%2F%3Fk%3D" + key},
		{get, "Host: h", "Cookie: a=b; key=" + key + "; c=d"},
		{get, "Host: h", "Cookie: key=" + encoded},
		{get, "Host: h", "User-Agent: sdk/1 (" + key + ")"},
		{get, "Host: h", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Protocol: rekall, " + key},
		{get, "Host: h", "X-Rekall-Key: " + key},
		{get, "Host: h", "X_Api_Key: " + key},
		{get, "Host: h", "Proxy-Authorization: Bearer " + key},
		{get, "Host: h", "Trailer: " + key},
		{get, "Host: h", "X-A: " + key, "X-A: b", "X-A: " + key + "," + key},
		{get, "Host: " + key},
		{get, "Host: " + key + ".example:8443"},
		{"GET http://" + key + ".example/v1/memories HTTP/1.1", "Host: h"},
		{"GET http://" + key + "@h.example/v1/memories HTTP/1.1", "Host: h"},
		{"GET http://user:" + key + "@h.example/v1/memories?a=1 HTTP/1.1", "Host: h"},
		{"GET http://user:" + encoded + "@h.example/v1/memories HTTP/1.1", "Host: h"},
		{"CONNECT " + key + ":443 HTTP/1.1", "Host: h"},
	} {
		r := read(t, lines...)
		r.Header.Set("X-Other", "left alone")
		r = credential.AtDoor(r)
		checkNoKey(t, r, key)
		if r.Header.Get("X-Other") != "left alone" {
			t.Errorf("%s: another header changed", apikey.Redact(strings.Join(lines, " ")))
		}
		c := credential.Take(r)
		checkKind(t, c, credential.None)
		if c.PathHeldKey {
			t.Errorf("%s: a key in the path", apikey.Redact(strings.Join(lines, " ")))
		}
	}
}

func TestMaskingAHeaderLeavesTheRestOfItsValue(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	r := credential.AtDoor(request("/", http.Header{
		"Cookie": {"a=b; key=" + key + "; c=d", "e=f"}, "X-Encoded": {"%0d%0aa=%zz+%72k_" + key[3:] + "%0D%0AX-Evil:+1"}, "X-Long": {strings.Repeat("%41 ", 30)},
	}))
	for name, want := range map[string]string{
		"Cookie": "a=b; key=rk_…; c=d", "X-Encoded": "%0d%0aa=%zz+rk_…%0D%0AX-Evil:+1", "X-Long": strings.Repeat("%41 ", 30),
	} {
		if got := r.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if got := r.Header["Cookie"]; len(got) != 2 || got[1] != "e=f" {
		t.Errorf("Cookie: %q", got)
	}
}

func TestTheRefererLosesItsKeyEvenAMistypedOne(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	for _, tt := range []struct{ referer, want string }{ // K is the key
		{"https://h/p?api_key=K", "https://h/p"},
		{"https://h/p?api_key=K&a=%41", "https://h/p?a=%41"},
		{"https://h/p?a=1&API%5fKEY=%72K2&b=2", "https://h/p?a=1&b=2"},
		{"https://h/p?a=1&api_key=rk_tooshort", "https://h/p?a=1"},
		{"https://h/p?a=1&api_key=RK_ABC#x", "https://h/p?a=1"},
		{"https://h/p?token=K", "https://h/p?token=rk_…"},
		{"https://h/K?api_key=K", "https://h/rk_…"},
		{"https://h/p?api_key=abc", "https://h/p?api_key=abc"},
		{"https://h/p?", "https://h/p?"},
		{"api_key=rk_no-query", "api_key=rk_no-query"},
	} {
		referer := strings.NewReplacer("K2", key[1:], "?token=K", "?token="+key, "=K", "="+key, "/K", "/"+key).Replace(tt.referer)
		r := credential.AtDoor(request("/", http.Header{"Referer": {referer}}))
		got, _ := url.PathUnescape(r.Header.Get("Referer"))
		if want, _ := url.PathUnescape(tt.want); got != want {
			t.Errorf("%q became %q, want %q", tt.referer, got, want)
		}
		checkKind(t, credential.Take(r), credential.None)
	}
}

func TestAHeaderWithALongNameIsKeptUnlessItIsLikeAKey(t *testing.T) {
	for _, name := range []string{"X-Network_configuration-Of-The-Deployment-In-Region-One", "X-Work_test_" + strings.Repeat("a", 39), "Rk_style-" + strings.Repeat("a", 60)} {
		r := credential.AtDoor(request("/", http.Header{name: {"a"}}))
		if len(r.Header) != 1 {
			t.Errorf("%s was dropped", name)
		}
	}
}

func TestARequestWithoutTargetTextGetsNone(t *testing.T) { // RequestURI is what a server received; elsewhere it is empty
	key := apikey.Generate(apikey.Production)
	r := request("/?a=1&api_key="+key, nil)
	r.RequestURI = ""
	c := credential.Take(r)
	checkKey(t, c, key)
	if r.RequestURI != "" || r.URL.RawQuery != "a=1" {
		t.Errorf("left %q, %q", r.RequestURI, r.URL.RawQuery)
	}
}

func TestAHeaderOrTrailerNamedLikeAKeyIsDropped(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	r := request("/", http.Header{key: {"a"}, "X-" + key: {"b"}, "X-Other": {"c"}})
	r.Trailer = http.Header{key: nil, "X-Checksum": nil}
	r = credential.AtDoor(r)
	checkNoKey(t, r, key)
	if len(r.Header) != 1 || r.Header.Get("X-Other") != "c" || len(r.Trailer) != 1 {
		t.Errorf("left: %q %q", r.Header, r.Trailer)
	}
}

func TestCredentialHeadersAreNoTrailers(t *testing.T) {
	r := read(t, "POST / HTTP/1.1", "Host: h", "Transfer-Encoding: chunked", "Trailer: authorization, x-api-key, X-Checksum", "", "0")
	if len(r.Trailer) != 3 {
		t.Fatalf("%d trailers", len(r.Trailer))
	}
	r = credential.AtDoor(r)
	if _, ok := r.Trailer["X-Checksum"]; !ok || len(r.Trailer) != 1 {
		t.Errorf("left: %q", r.Trailer)
	}
}

// places are where FuzzAtDoor plants a key: lines of a request, with %s for the planted text.
var places = []string{
	"GET /v1/memories HTTP/1.1\nAuthorization: Bearer %s",
	"GET /v1/memories HTTP/1.1\nauthorization: BEARER\t %s",
	"GET /v1/memories HTTP/1.1\nAuthorization: %s",
	"GET /v1/memories HTTP/1.1\nAuthorization: Basic %s",
	"GET /v1/memories HTTP/1.1\nX-Api-Key: %s",
	"GET /v1/memories HTTP/1.1\nX-API-KEY: a\nX-Api-Key: %s",
	"GET /v1/memories?api_key=%s HTTP/1.1",
	"GET /v1/memories?%%61pi_key=%s HTTP/1.1",
	"GET /v1/memories?a=1;API_KEY=%s&b=2 HTTP/1.1",
	"GET /v1/memories?a=%s&b=%%zz HTTP/1.1",
	"GET /v1/memories?%s HTTP/1.1",
	"GET /v1/memories/%s HTTP/1.1",
	"GET /%s?a=1 HTTP/1.1",
	"GET http://h.example/%s HTTP/1.1",
	"GET http://%s@h.example/v1 HTTP/1.1",
	"GET http://%s.example/v1 HTTP/1.1",
	"GET x:%s HTTP/1.1",
	"GET /v1/memories HTTP/1.1\nReferer: https://h/?%s",
	"GET /v1/memories HTTP/1.1\nCookie: %s",
	"GET /v1/memories HTTP/1.1\nUser-Agent: %s",
	"GET /v1/memories HTTP/1.1\nSec-WebSocket-Protocol: rekall, %s",
	"GET /v1/memories HTTP/1.1\nX%s: a",
	"POST /v1/memories HTTP/1.1\nTransfer-Encoding: chunked\nTrailer: X%s",
	"GET /v1/memories HTTP/1.1\nAuthorization: Bearer %s\nX-Api-Key: %[1]s\nReferer: %[1]s",
	"GET /%s?api_key=%[1]s HTTP/1.1\nAuthorization: %[1]s",
}

func FuzzAtDoor(f *testing.F) {
	key := apikey.Generate(apikey.Production)
	sandbox := apikey.Generate(apikey.Sandbox)
	for i := range places {
		f.Add(uint8(i), false, "", "")
		f.Add(uint8(i), true, "", "")
		f.Add(uint8(i), false, "a", "b")
	}
	f.Add(uint8(6), true, "%", "%41")
	f.Add(uint8(9), true, "x=%zz", "&api_key=rat_1")
	f.Add(uint8(11), false, "%20", "%zz")
	f.Add(uint8(17), true, "a=%41&b=", "%20")
	f.Add(uint8(18), true, "rk_", "%0d%0a%zz")
	f.Add(uint8(9), false, "mark_%72", "%5f")
	f.Add(uint8(20), false, "%2572k_", "_rk_test_")
	f.Fuzz(func(t *testing.T, place uint8, test bool, before, after string) {
		planted := key
		if test {
			planted = sandbox
		}
		line := places[int(place)%len(places)]
		const other = "left%20+al%6fne"
		plant := func(s string) *http.Request {
			raw := strings.ReplaceAll(fmt.Sprintf(line, s), "\n", "\r\n") + "\r\nHost: h.example\r\nX-Other: " + other + "\r\n\r\n"
			r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
			if err != nil {
				return nil // a server would not get further with it
			}
			return r
		}
		if strings.ContainsAny(before+after, "\r\n") {
			return
		}
		if r := plant(before + planted + after); r != nil {
			r = credential.AtDoor(r)
			secret := planted[8:] // the prefix is no secret
			if d := dump(r); strings.Contains(d, secret) || apikey.ContainsKey(d) {
				t.Fatalf("a key is left in the request:\n%s", d)
			}
			if got := r.Header["X-Other"]; len(got) == 0 || got[len(got)-1] != other {
				t.Fatalf("another header became %q", got)
			}
			credential.Take(r)
			if d := dump(r); strings.Contains(d, secret) {
				t.Fatalf("a key is in the request again:\n%s", d)
			}
		}
		r := plant(before + after)
		if r == nil || len(r.Trailer) != 0 {
			return
		}
		if text := strings.ToLower(dump(r)); strings.Contains(text, "rk_") {
			return // what looks like the beginning of a key is ours
		}
		was := snapshot(r)
		if got := credential.AtDoor(r); got != r || !same(r, was) {
			t.Fatalf("a request without a key was changed:\n%s\n%s", dump(was), dump(got))
		}
	})
}

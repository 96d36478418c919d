package credential_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
)

func TestKeyIsMaskedWhereOtherTextHidesIt(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	encoded := strings.NewReplacer("r", "%72", "k", "%6B", "_", "%5f").Replace(key[:3]) + key[3:]
	for name, plant := range map[string]func(*http.Request){
		"method":                  func(r *http.Request) { r.Method = key },
		"path after rk_":          func(r *http.Request) { r.URL.Path, r.RequestURI = "/v1/mark_"+key, "/v1/mark_"+key },
		"two in a cookie":         func(r *http.Request) { r.Header.Set("Cookie", "a="+key+key) },
		"query with a bad escape": func(r *http.Request) { r.URL.RawQuery = "a=" + encoded + "%zz"; r.RequestURI = "/?" + r.URL.RawQuery },
		"api_key with a bad escape": func(r *http.Request) {
			r.URL.RawQuery = "api_key=" + encoded + "%zz"
			r.RequestURI = "/?" + r.URL.RawQuery
		},
		"referer with a bad escape": func(r *http.Request) { r.Header.Set("Referer", "https://h/%zz?api_key="+encoded) },
		"encoded host":              func(r *http.Request) { r.Host = encoded },
		"encoded opaque target":     func(r *http.Request) { r.URL.Opaque = encoded; r.RequestURI = "x:" + encoded },
		"encoded header name":       func(r *http.Request) { r.Header["X"+encoded] = []string{"a"} },
		"canonicalised header name": func(r *http.Request) { r.Header[http.CanonicalHeaderKey(key)] = []string{"a"} },
	} {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			plant(r)
			r = credential.AtDoor(r)
			dump := fmt.Sprint(r.Method, r.RequestURI, r.URL.String(), r.URL.Path, r.URL.RawPath, r.URL.Opaque, r.URL.RawQuery, r.Host, r.Header)
			decoded, _ := url.QueryUnescape(strings.ReplaceAll(dump, "%zz", ""))
			if strings.Contains(strings.ToLower(dump+decoded), strings.ToLower(key[3:])) {
				t.Error("the key is still in the request")
			}
		})
	}
}

func TestMalformedTrailerIsNotQuoted(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	for _, line := range []string{"X-Api-Key " + key, " " + key, ": " + key, "Authorization Bearer " + key, key} {
		raw := "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + line + "\r\n\r\n"
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(credential.AtDoor(r).Body)
		if string(content) != "a" || err == nil || strings.Contains(err.Error(), key) {
			t.Errorf("%q, error %v", content, err)
		}
	}
}

func TestFormattingWhatHoldsACredentialShowsNoKey(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("X-Api-Key", key)
	r = credential.AtDoor(r)
	c := credential.Take(r)
	wrapped := struct{ c credential.Credential }{c}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d", "%x", "%q"} {
		for _, value := range []any{c, &c, wrapped, r.Context(), r} {
			if out := fmt.Sprintf(verb, value); strings.Contains(out, key[3:]) || strings.Contains(out, fmt.Sprintf("%x", key)) {
				t.Errorf("%s of a %T shows the key", verb, value)
			}
		}
	}
	if c.Reveal() != key {
		t.Error("Reveal does not return the key")
	}
}

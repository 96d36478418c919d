package credential

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// parameter is the name of the query parameter that carries a key. Its case does not count here: a mistyped one would
// otherwise be logged.
const parameter = "api_key"

// takeQuery takes the api_key parameters whose value ours accepts, and masks keys in all others. It reports whether it took
// any. Whatever it leaves stays byte for byte and in order.
func (c *Credential) takeQuery(r *http.Request, ours func(string) bool) bool {
	query, took := c.cutQuery(r.URL.RawQuery, ours)
	if query == r.URL.RawQuery && !took {
		return false
	}
	r.URL.RawQuery, r.URL.ForceQuery = query, false
	target, _, _ := strings.Cut(r.RequestURI, "?")
	if query != "" {
		target += "?" + query
	}
	r.RequestURI = target
	return took
}

func (c *Credential) cutQuery(query string, ours func(string) bool) (left string, took bool) {
	if !worthCutting(query) {
		return query, false
	}
	var b strings.Builder
	b.Grow(len(query))
	separator := ""
	// Backends differ on whether ';' separates parameters: split on both.
	for more := true; more; {
		pair, next := query, ""
		i := strings.IndexAny(query, "&;")
		if more = i >= 0; more {
			pair, next, query = query[:i], query[i:i+1], query[i+1:]
		}
		rawName, rawValue, _ := strings.Cut(pair, "=")
		name, value := unescape(rawName), unescape(rawValue)
		switch {
		case strings.EqualFold(name, parameter) && ours(value):
			took = true
			if value != "" { // an empty parameter presents nothing
				c.add(value)
			}
		case apikey.ContainsKey(name) || apikey.ContainsKey(value):
			b.WriteString(separator + url.QueryEscape(apikey.Redact(name)) + "=" + url.QueryEscape(apikey.Redact(value)))
			separator = next
		default:
			b.WriteString(separator)
			b.WriteString(pair)
			separator = next
		}
	}
	return b.String(), took
}

// worthCutting is the quick look that spares ordinary queries the rest: no key and no api_key can be in a query without one
// of these.
func worthCutting(query string) bool {
	if query == "" {
		return false
	}
	if strings.IndexByte(query, '%') >= 0 || mayBeKey(query) {
		return true
	}
	for i := 0; i+len(parameter) <= len(query); i++ {
		if query[i]|0x20 == 'a' && strings.EqualFold(query[i:i+len(parameter)], parameter) {
			return true
		}
	}
	return false
}

// unescape decodes what is validly percent-encoded and leaves the rest: one bad escape must not hide a key beside it.
func unescape(s string) string {
	if !strings.ContainsAny(s, "%+") {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '%' && i+2 < len(s) && hex(s[i+1]) >= 0 && hex(s[i+2]) >= 0:
			b = append(b, byte(hex(s[i+1])<<4|hex(s[i+2])))
			i += 2
		case s[i] == '+':
			b = append(b, ' ')
		default:
			b = append(b, s[i])
		}
	}
	return string(b)
}

func hex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return int(c|0x20-'a') + 10
	}
	return -1
}

// maskPath masks a key in the path, which must not be logged and not be forwarded either. It reports whether there was one.
func (c *Credential) maskPath(r *http.Request) bool {
	if !holdsKey(r.URL.Path) && !holdsKey(r.URL.RawPath) && !holdsKey(r.URL.Opaque) {
		return false
	}
	c.PathHeldKey = true
	r.URL.Path, r.URL.RawPath, r.URL.Opaque = apikey.Redact(r.URL.Path), "", ""
	r.RequestURI = r.URL.RequestURI()
	return true
}

// maskRest masks keys in all places that may reach a log and hold no credential.
func maskRest(r *http.Request) {
	r.Method = mask(r.Method) // any token is a method to the server
	for name, values := range r.Header {
		if likeKey(name) {
			delete(r.Header, name)
			continue
		}
		for i, v := range values {
			values[i] = mask(v)
		}
	}
	for name := range r.Trailer {
		if name == "Authorization" || name == "X-Api-Key" || likeKey(name) {
			delete(r.Trailer, name)
		}
	}
	r.Host = mask(r.Host)
	if (r.URL.User != nil && holdsKey(r.URL.User.String())) || holdsKey(r.URL.Host) {
		r.URL.User, r.URL.Host = nil, mask(r.URL.Host)
		r.RequestURI = r.URL.RequestURI()
	}
}

// likeKey reports whether a header's name may be a key. The server has changed the case of its letters.
func likeKey(name string) bool { return len(name) >= apikey.Length && mayBeKey(name) }

// holdsKey reports whether there is a key in s, percent-encoded or not: a Referer repeats the URL of another request.
func holdsKey(s string) bool {
	return len(s) >= apikey.Length && (apikey.ContainsKey(s) || strings.IndexByte(s, '%') >= 0 && apikey.ContainsKey(unescape(s)))
}

func mask(s string) string {
	if !holdsKey(s) {
		return s
	}
	return apikey.Redact(unescape(s))
}

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

func unescape(s string) string {
	if u, err := url.QueryUnescape(s); err == nil {
		return u
	}
	return s
}

// maskPath masks a key in the path, which must not be logged and not be forwarded either. It reports whether there was one.
func (c *Credential) maskPath(r *http.Request) bool {
	if !apikey.ContainsKey(r.URL.Path) && !apikey.ContainsKey(r.URL.RawPath) && !apikey.ContainsKey(r.URL.Opaque) {
		return false
	}
	c.PathHeldKey = true
	r.URL.Path, r.URL.RawPath, r.URL.Opaque = apikey.Redact(r.URL.Path), "", ""
	r.RequestURI = r.URL.RequestURI()
	return true
}

// maskHeaders masks keys in all places that may reach a log and hold no credential.
func maskHeaders(r *http.Request) {
	for name, values := range r.Header {
		if apikey.ContainsKey(name) {
			delete(r.Header, name)
			continue
		}
		for i, v := range values {
			if len(v) >= apikey.Length {
				values[i] = maskValue(v)
			}
		}
	}
	for name := range r.Trailer {
		if name == "Authorization" || name == "X-Api-Key" || apikey.ContainsKey(name) {
			delete(r.Trailer, name)
		}
	}
	if len(r.Host) >= apikey.Length {
		r.Host = apikey.Redact(r.Host)
	}
	if r.URL.User != nil && apikey.ContainsKey(r.URL.User.String()) {
		r.URL.User = nil
		r.RequestURI = r.URL.RequestURI()
	}
	if len(r.URL.Host) >= apikey.Length && apikey.ContainsKey(r.URL.Host) {
		r.URL.Host = apikey.Redact(r.URL.Host)
		r.RequestURI = r.URL.RequestURI()
	}
}

// maskValue masks keys in a header's value, percent-encoded ones too: a Referer repeats the URL of another request.
func maskValue(v string) string {
	if apikey.ContainsKey(v) {
		v = apikey.Redact(v)
	}
	if strings.IndexByte(v, '%') >= 0 {
		if u := unescape(v); apikey.ContainsKey(u) {
			return apikey.Redact(u)
		}
	}
	return v
}

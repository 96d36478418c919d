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
	if r.URL.RawQuery == "" {
		return false
	}
	query, took := c.cutQuery(r.URL.RawQuery, ours)
	if query == r.URL.RawQuery {
		return false
	}
	r.URL.RawQuery = query
	if target, _, ok := strings.Cut(r.RequestURI, "?"); ok {
		if query != "" {
			target += "?" + query
		}
		r.RequestURI = target
	}
	return took
}

func (c *Credential) cutQuery(query string, ours func(string) bool) (left string, took bool) {
	if !worthCutting(query) {
		return query, false
	}
	var b strings.Builder
	b.Grow(len(query))
	separator := "" // between what is written and what comes next
	// Backends differ on whether ';' separates parameters: split on both.
	for more := true; more; {
		pair, next := query, ""
		i := strings.IndexAny(query, "&;")
		if more = i >= 0; more {
			pair, next, query = query[:i], query[i:i+1], query[i+1:]
		}
		name, value, _ := strings.Cut(pair, "=")
		if strings.EqualFold(unescape(name), parameter) {
			if value = unescape(value); ours(value) || ours(unescape(value)) { // some client escapes twice
				took = true
				if value != "" { // an empty parameter presents nothing
					c.add(value, nil)
				}
				if separator != "" && next == "&" { // its neighbours stay apart for those who split on '&' only
					separator = next
				}
				continue
			}
		}
		b.WriteString(separator)
		b.WriteString(pair)
		separator = next
	}
	return mask(b.String(), url.QueryEscape), took
}

// worthCutting is the quick look that spares ordinary queries the rest: no key and no api_key can be in a query without one
// of these.
func worthCutting(query string) bool {
	return escapesWord(query) || apikey.ContainsKey(query) || namesParameter(query)
}

// namesParameter reports whether the parameter's name stands anywhere in the query. Underscores are rare in queries, so this
// costs little more than looking for them.
func namesParameter(query string) bool {
	before := strings.IndexByte(parameter, '_')
	for i := 0; ; i++ {
		next := strings.IndexByte(query[i:], '_')
		if next < 0 {
			return false
		}
		i += next
		start := i - before
		if start >= 0 && start+len(parameter) <= len(query) && strings.EqualFold(query[start:start+len(parameter)], parameter) {
			return true
		}
	}
}

// unescape decodes what is validly percent-encoded and leaves the rest: one bad escape must not hide a key beside it.
func unescape(s string) string {
	if !strings.ContainsAny(s, "%+") {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c, size := decode(s[i:])
		if size == 1 && c == '+' {
			c = ' '
		}
		b = append(b, c)
		i += size - 1
	}
	return string(b)
}

// decode returns the first byte of s, which must not be empty, and how many bytes it is written with: three if it is
// percent-encoded.
func decode(s string) (c byte, size int) {
	if s[0] == '%' && len(s) > 2 && hex(s[1]) >= 0 && hex(s[2]) >= 0 {
		return byte(hex(s[1])<<4 | hex(s[2])), 3
	}
	return s[0], 1
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

// escapesWord reports whether s has an escape of a letter, a digit or an underscore. They need none, so that ordinary
// clients do not escape them; but without one, what s decodes to has no word that s has not.
func escapesWord(s string) bool {
	for {
		i := strings.IndexByte(s, '%')
		if i < 0 {
			return false
		}
		c, size := decode(s[i:])
		if word(c) {
			return true
		}
		s = s[i+size:]
	}
}

// word reports whether c is one of the characters that keys consist of.
func word(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z'
}

// maskPath masks a key in the path, which must not be logged and not be forwarded either. It reports whether there was one.
func (c *Credential) maskPath(r *http.Request) bool {
	if !holdsKey(r.URL.Path) && !holdsKey(r.URL.RawPath) && !holdsKey(r.URL.Opaque) {
		return false
	}
	c.PathHeldKey = true
	r.URL.Path, r.URL.RawPath, r.URL.Opaque = maskText(r.URL.Path), "", ""
	r.RequestURI = r.URL.RequestURI()
	return true
}

// maskRest masks keys in all places that may reach a log and hold no credential.
func maskRest(r *http.Request) {
	r.Method = maskText(r.Method) // any token is a method to the server
	for name, values := range r.Header {
		if likeKey(name) {
			delete(r.Header, name)
			continue
		}
		for i, v := range values {
			masked := v
			if name == "Referer" {
				masked = cutReferer(v)
			}
			if masked = maskText(masked); masked != v { // a write for each header would cost more than the search
				values[i] = masked
			}
		}
	}
	for name := range r.Trailer {
		if name == "Authorization" || name == "X-Api-Key" || likeKey(name) {
			delete(r.Trailer, name)
		}
	}
	r.Host = maskText(r.Host)
	if r.TLS != nil && holdsKey(r.TLS.ServerName) {
		state := *r.TLS // the connection's: other requests on it read it
		state.ServerName = maskText(state.ServerName)
		r.TLS = &state
	}
	if (r.URL.User != nil && holdsKey(r.URL.User.String())) || holdsKey(r.URL.Host) {
		r.URL.User, r.URL.Host = nil, maskText(r.URL.Host)
		r.RequestURI = r.URL.RequestURI()
	}
}

// cutReferer takes the api_key parameters out of a Referer, mistyped keys included: it repeats the URL of another request.
func cutReferer(referer string) string {
	page, query, _ := strings.Cut(referer, "?")
	var discarded Credential
	left, took := discarded.cutQuery(query, mayBeKey)
	switch {
	case !took:
		return referer
	case left == "":
		return page
	}
	return page + "?" + left
}

// likeKey reports whether a header's name may be a key, percent-encoded or not. The server has changed the case of its
// letters.
func likeKey(name string) bool {
	return len(name) >= apikey.Length && holdsKey(strings.ToLower(name))
}

// holdsKey reports whether there is a key in s, percent-encoded or not.
func holdsKey(s string) bool {
	return len(s) >= apikey.Length && (apikey.ContainsKey(s) || escapesWord(s) && apikey.ContainsKey(unescape(s)))
}

func maskText(s string) string { return mask(s, func(masked string) string { return masked }) }

// mask replaces keys in s, percent-encoded or not, by what write makes of their mask, and leaves everything else byte for
// byte: decoded, it could end a header's line. A key stands in one run of letters, digits, underscores and their escapes.
func mask(s string, write func(masked string) string) string {
	if !holdsKey(s) {
		return s
	}
	var b strings.Builder
	for s != "" {
		n := runLength(s)
		if run := unescape(s[:n]); apikey.ContainsKey(run) {
			b.WriteString(write(apikey.Redact(run)))
		} else {
			b.WriteString(s[:n])
		}
		if n < len(s) { // what ended the run
			b.WriteByte(s[n])
			n++
		}
		s = s[n:]
	}
	return b.String()
}

func runLength(s string) int {
	n := 0
	for n < len(s) {
		c, size := decode(s[n:])
		if !word(c) {
			break
		}
		n += size
	}
	return n
}

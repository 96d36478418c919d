// Package credential finds the one credential in a request and takes it out, so that nothing after it (a log, a backend, a
// trace) can see the key.
//
// It does so at two moments. AtDoor runs before the server copies a request for its logs, for every request of a listener,
// also those of sites that have nothing to do with Rekall: it takes only what is unmistakably ours. Take runs in the
// handler and takes whatever else stands where a credential belongs.
package credential

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/textproto"
	"strings"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// Kind says what kind of credential a request presented.
type Kind uint8

// The kinds.
const (
	None      Kind = iota // no credential
	Key                   // exactly one well-formed key, in one place or several
	Malformed             // something that cannot be a key
	Token                 // an OAuth access token (rat_…)
	Ambiguous             // different credentials in several places
)

const (
	// tokenPrefix begins every OAuth access token of the same API (REKALL.md, "Passing a key").
	tokenPrefix = "rat_"

	// tokenCharacters are all that a Bearer token may consist of (RFC 6750, section 2.1).
	tokenCharacters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-._~+/="

	// placeholder is all that formatting, JSON and logs show of a credential.
	placeholder = "[credential]"
)

// Credential is what is left of the credentials in a request.
type Credential struct {
	Kind        Kind
	Environment apikey.Environment // of a Key
	Digest      apikey.Digest      // of a Key
	PathHeldKey bool               // the path had a key in it: the request must not go on
	raw         *string            // ends with the Key; behind a pointer, which formatting does not follow
}

// Reveal returns the key itself, for backends that still check it, or "" if the Kind is not Key. It must go nowhere else.
func (c *Credential) Reveal() string {
	if c.Kind != Key {
		return ""
	}
	return (*c.raw)[len(*c.raw)-apikey.Length:]
}

// Format writes a placeholder for every verb.
func (Credential) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, placeholder) }

// MarshalJSON writes a placeholder.
func (Credential) MarshalJSON() ([]byte, error) { return []byte(`"` + placeholder + `"`), nil }

// LogValue logs a placeholder.
func (Credential) LogValue() slog.Value { return slog.StringValue(placeholder) }

// add combines a presented credential with those before it. in is a string that ends with it and stays as it is; nil: none.
func (c *Credential) add(presented string, in *string) {
	kind := Malformed
	environment, err := apikey.Parse(presented)
	var digest apikey.Digest
	switch {
	case err == nil:
		kind, digest = Key, apikey.Hash(presented)
	case strings.HasPrefix(presented, tokenPrefix) && strings.Trim(presented, tokenCharacters) == "":
		kind = Token // and not a list that begins with one
	}
	switch {
	case c.Kind == None:
		c.Kind, c.Environment, c.Digest = kind, environment, digest
		if kind == Key {
			c.keep(presented, in)
		}
	case c.Kind != kind || c.Digest != digest:
		*c = Credential{Kind: Ambiguous, PathHeldKey: c.PathHeldKey}
	}
}

// keep keeps the key itself. Whatever formats what holds a Credential must not meet it, so it is not in there.
func (c *Credential) keep(key string, in *string) {
	if in == nil {
		in = new(string)
		*in = key
	}
	c.raw = in
}

// addMalformed combines something that cannot be a credential, whatever it looks like.
func (c *Credential) addMalformed() { c.add("", nil) }

// carrier brings a credential from the door to the handler. Being the context itself saves an allocation. Each request has its own, though
// its connection's context could be one: a handler may run on after its answer, as behind http.TimeoutHandler, and would find
// the next request's.
type carrier struct {
	context.Context
	credential Credential
}

type carrierKey struct{}

func (c *carrier) Value(key any) any {
	if key == (carrierKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// AtDoor takes keys out of a request before anything can log it, and masks those in places where no credential belongs.
// It changes r, whose context then carries the credential, and returns it, or a copy if it has a body.
func AtDoor(r *http.Request) *http.Request {
	var c Credential
	found := c.takeHeaders(r.Header, mayBeKey)
	found = c.takeQuery(r, mayBeKey) || found
	found = c.maskPath(r) || found
	maskRest(r)
	r = guardBody(r)
	if !found {
		return r
	}
	*r = *r.WithContext(&carrier{r.Context(), c}) // in place, which saves the copy
	return r
}

// Take takes every credential that is left in the places where one belongs, and returns it combined with what the door
// took: the request's Authorization headers of scheme Bearer, its X-Api-Key headers and its api_key parameters.
func Take(r *http.Request) Credential {
	var c Credential
	if carried, ok := r.Context().Value(carrierKey{}).(*carrier); ok {
		c = carried.credential
	}
	everything := func(string) bool { return true }
	c.takeHeaders(r.Header, everything)
	c.takeQuery(r, everything)
	return c
}

// mayBeKey reports whether a value in a credential's place is Rekall's: it has a key in it, or the beginning of one, in any
// case, with nothing of a token before it, or it ends in one whose prefix was lost or mistyped. "rk_" alone would be too little: one in
// a hundred JWTs has it by chance, and the door would take it from sites that have nothing to do with Rekall.
func mayBeKey(value string) bool {
	const prefix = apikey.ProductionPrefix
	for i := 0; i+len(prefix) <= len(value); i++ {
		if strings.EqualFold(value[i:i+len(prefix)], prefix) && (i == 0 || !base64URL(value[i-1])) {
			return true
		}
	}
	return apikey.ContainsKey(value) || apikey.EndsInSecret(value)
}

// base64URL reports whether c is one of the characters of a JWT.
func base64URL(c byte) bool { return word(c) || c == '-' || c == '.' }

// takeHeaders takes the credentials that ours accepts out of the headers. It reports whether it took any.
func (c *Credential) takeHeaders(h http.Header, ours func(string) bool) bool {
	took := false
	if values, ok := h["Authorization"]; ok {
		left := values[:0]
		for _, v := range values {
			token, bearer := bearerToken(v)
			switch {
			case bearer && ours(token):
				c.add(token, ending(values, token))
			case apikey.ContainsKey(v), apikey.ContainsKey(decodedBasic(v)): // no scheme, or one that takes no key
				c.addMalformed()
			default:
				left = append(left, v)
			}
		}
		took = len(left) != len(values)
		setOrDelete(h, "Authorization", left)
	}
	if values, ok := h["X-Api-Key"]; ok {
		left := values[:0]
		for _, v := range values {
			presented := textproto.TrimString(v)
			switch {
			case !ours(presented):
				left = append(left, v)
			case presented != "": // an empty header presents nothing
				c.add(presented, ending(values, presented))
			}
		}
		took = took || len(left) != len(values)
		setOrDelete(h, "X-Api-Key", left)
	}
	return took
}

// ending returns a header's only value if it ends with the credential, or nil: to point there saves an allocation. The value leaves
// the header, and is nobody else's. Of several, one that stays takes the place of one that goes.
func ending(values []string, credential string) *string {
	if len(values) > 1 || !strings.HasSuffix(values[0], credential) {
		return nil
	}
	return &values[0]
}

func setOrDelete(h http.Header, name string, values []string) {
	if len(values) == 0 {
		delete(h, name)
		return
	}
	h[name] = values
}

// decodedBasic is user and password of an Authorization value of scheme Basic, where some APIs take a key as the user (curl -u rk_…:);
// empty: it is of another, or too short for a key.
func decodedBasic(value string) string {
	value = textproto.TrimString(value)
	end := strings.IndexAny(value, " \t")
	if end < 0 || !strings.EqualFold(value[:end], "basic") {
		return ""
	}
	encoded := textproto.TrimString(value[end:])
	if base64.StdEncoding.DecodedLen(len(encoded)) < apikey.Length {
		return ""
	}
	decoded, _ := base64.StdEncoding.DecodeString(encoded) // all up to an error
	return string(decoded)
}

// bearerToken splits an Authorization value of scheme Bearer (RFC 6750, section 2.1; a scheme's case does not count).
func bearerToken(value string) (token string, ok bool) {
	value = textproto.TrimString(value)
	const scheme = "bearer"
	if len(value) < len(scheme) || !strings.EqualFold(value[:len(scheme)], scheme) {
		return "", false
	}
	rest := value[len(scheme):]
	if rest != "" && rest[0] != ' ' && rest[0] != '\t' {
		return "", false
	}
	return textproto.TrimString(rest), true
}

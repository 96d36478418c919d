package caddymodule

import (
	"net/http"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/dashboard"
)

// identify replaces what the client says of itself with what the gateway knows.
func (x *exchange) identify(r *http.Request) {
	h := r.Header
	for name := range h {
		switch {
		case hasFolded(name, "x-") && (isIdentity(name) || overrides(name)), name == "Trailer",
			hasFolded(name, grpcMetadata) && isIdentity(name[len(grpcMetadata):]):
			delete(h, name)
		case name == "Connection", name == "Upgrade":
			restrictConnection(h)
		case name == "Cookie":
			takeSession(h)
		}
	}
	// A trailer can carry an identity header past everything that looked at the headers.
	r.Trailer = nil
	x.set(h, "X-Rekall-Key-Id", keyIDValue, x.record.ID)
	x.set(h, "X-Rekall-Account", accountValue, x.record.Account)
	x.set(h, "X-Rekall-Environment", environmentValue, x.environment.String())
	x.set(h, "X-Rekall-Scopes", scopesValue, x.record.Scopes.String())
	x.set(h, "X-Request-Id", requestIDValue, x.requestID)
}

const identityTokenHeader = "X-Rekall-Identity-Token"

// addCredentials adds what only the backend is to have.
func (x *exchange) addCredentials(h http.Header, cred *credential.Credential) {
	if token := x.values[tokenValue]; token != "" {
		x.set(h, identityTokenHeader, tokenValue, token)
	}
	if x.gateway.ForwardCredential {
		h["Authorization"] = []string{"Bearer " + cred.Reveal()}
	}
}

// overriding are headers that make some backends take another method or path: they would serve another request than the one that was
// decided on. Symfony, Laminas and IIS read the methods and URLs so, services made for nginx's auth_request or Traefik's ForwardAuth
// the originals and what was forwarded, those behind Envoy its path, and WSGI applications a prefix that they take off it.
var overriding = [...]string{
	"x-http-method", "x-method-override", "x-http-method-override", "x-original-method", "x-forwarded-method",
	"x-original-url", "x-original-uri", "x-rewrite-url", "x-rewrite-uri", "x-override-url", "x-forwarded-uri", "x-forwarded-path",
	"x-envoy-original-path", "x-script-name",
}

// grpcMetadata begins headers of which grpc-gateway passes the rest of the name to a gRPC backend.
const grpcMetadata = "grpc-metadata-"

func overrides(name string) bool {
	for _, header := range overriding {
		if len(name) == len(header) && hasFolded(name, header) {
			return true
		}
	}
	return false
}

// isIdentity reports whether a backend might read a header of this name as one of ours.
func isIdentity(name string) bool {
	if name == "X-Rekall-Version" {
		return false
	}
	return hasFolded(name, "x-rekall-") || len(name) == len("x-request-id") && hasFolded(name, "x-request-id")
}

// hasFolded reports whether name begins with a lower-case prefix, in any case and with any separators: some frameworks fold '_' and
// '.' into '-', and servers that speak CGI fold all that is no letter or digit into '_'.
func hasFolded(name, prefix string) bool {
	if len(name) < len(prefix) {
		return false
	}
	for i := range len(prefix) {
		c := name[i]
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		default:
			c = '-'
		}
		if c != prefix[i] {
			return false
		}
	}
	return true
}

// takeSession takes the dashboard's session away from backends.
func takeSession(h http.Header) {
	var left []string
	for _, cookies := range h["Cookie"] {
		if cookies = dashboard.WithoutSession(cookies); cookies != "" {
			left = append(left, cookies)
		}
	}
	delete(h, "Cookie")
	if left != nil {
		h["Cookie"] = left
	}
}

// keepPrivate forbids shared caches to store an answer: one between client and gateway would serve it to those with no key, or a
// revoked one. They spare requests with an Authorization header (RFC 9111, section 3.5) but not others, and the backend sees
// neither kind. What the backend says for the client's own cache stays.
func (x *exchange) keepPrivate(h http.Header) {
	said := h["Cache-Control"]
	if len(said) == 0 {
		x.set(h, "Cache-Control", cacheControlValue, "private")
		return
	}
	var kept []string
	for directive := range strings.SplitSeq(strings.Join(said, ","), ",") {
		directive = strings.TrimSpace(directive)
		name, _, _ := strings.Cut(strings.ToLower(directive), "=")
		switch {
		case strings.EqualFold(directive, "private"), name == "no-store":
			return
		case name != "" && name != "public" && name != "s-maxage":
			kept = append(kept, directive)
		}
	}
	x.set(h, "Cache-Control", cacheControlValue, strings.Join(append(kept, "private"), ", "))
}

// restrictConnection leaves only the upgrade to WebSocket. "Connection: X-Rekall-Key-Id" would have the proxy strip our
// header, and "Upgrade: h2c" would open a tunnel whose requests nobody checks.
func restrictConnection(h http.Header) {
	connection, ok := h["Connection"]
	if !ok {
		delete(h, "Upgrade")
		return
	}
	upgrade := h["Upgrade"]
	if len(upgrade) == 1 && strings.EqualFold(upgrade[0], "websocket") && httpguts.HeaderValuesContainsToken(connection, "upgrade") {
		h["Connection"] = []string{"Upgrade"}
		return
	}
	delete(h, "Connection")
	delete(h, "Upgrade")
	delete(h, "Http2-Settings")
}

package caddymodule

import (
	"cmp"
	"fmt"
	"net/http"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/ratelimit"
)

// AddressLimit holds clients that have no good key to a rate, by their address as Caddy's trusted_proxies determine it: IPv4
// whole, IPv6 by /64. A key that is in this edge's memory passes whatever its address. Behind a load balancer that
// hides the clients' addresses all of them are one: leave it off there, or name the balancer in trusted_proxies. Requests
// that come by a Unix socket have no address, unless a trusted proxy tells one, and are not limited.
type AddressLimit struct {
	// Requests per minute that are let through with no key, one that is malformed or unknown, a token in place of a key, or
	// several keys at once. From 1 to 1000000.
	PerMinute int `json:"per_minute"`

	// How many of them may come at once. From 1 to 1000000. Default: per_minute.
	Burst int `json:"burst,omitempty"`
}

// maxAddressRate keeps the moments that a limit counts in far from an overflow.
const maxAddressRate = 1_000_000

// limiter returns nil for no limit.
func (l *AddressLimit) limiter() (*ratelimit.Addresses, error) {
	if l == nil {
		return nil, nil
	}
	burst := l.burst()
	if l.PerMinute < 1 || l.PerMinute > maxAddressRate || burst < 1 || burst > maxAddressRate {
		return nil, fmt.Errorf("per_minute and burst must be from 1 to %d", maxAddressRate)
	}
	return ratelimit.NewAddresses(l.PerMinute, burst), nil
}

// burst is Burst, or its default.
func (l *AddressLimit) burst() int { return cmp.Or(l.Burst, l.PerMinute) }

// stricter compares limits in the order of their fields: it must not depend on the order of servers, of which Caddy has none.
func (l *AddressLimit) stricter(than AddressLimit) bool {
	if l.PerMinute != than.PerMinute {
		return l.PerMinute < than.PerMinute
	}
	return l.burst() < than.burst()
}

// mayLookUp tells whether a key may be looked up for a request. pending: the addresses' End must follow. A key in memory needs no
// lookup and always passes, or whoever shares an address with a guesser could be shut out. Nothing is counted of an address that is
// not suspect: after a restart the good keys of a whole office may be unknown to memory, and must not use up the limit of their
// address.
func mayLookUp(addresses *ratelimit.Addresses, r *http.Request, cache keySource, d apikey.Digest) (verdict ratelimit.Verdict, pending bool) {
	if addresses != nil {
		if address := clientAddress(r); address.IsValid() && addresses.Suspect(address) && !cache.Cached(d) {
			verdict = addresses.Begin(address)
			return verdict, verdict.Allowed
		}
	}
	return ratelimit.Verdict{Allowed: true}, false
}

// lookedUp ends what mayLookUp began, whether or not the key was looked up.
func (x *exchange) lookedUp(r *http.Request) {
	if x.pending {
		x.pending = false
		x.gateway.addresses.End(clientAddress(r))
	}
}

// countRefusal counts a refusal against the address that it goes to, if anybody could have sent the request.
func countRefusal(addresses *ratelimit.Addresses, r *http.Request, o apikey.Outcome) ratelimit.Verdict {
	if addresses != nil && lacksKey(o) {
		if address := clientAddress(r); address.IsValid() {
			return addresses.Take(address)
		}
	}
	return ratelimit.Verdict{Allowed: true}
}

// lacksKey reports whether anybody could cause a refusal, without a key that is or was good.
func lacksKey(o apikey.Outcome) bool {
	switch o {
	case apikey.Missing, apikey.Malformed, apikey.TokenType, apikey.Ambiguous, apikey.Unknown:
		return true
	case apikey.Unavailable, apikey.Allowed, apikey.Revoked, apikey.Expired, apikey.Mismatch, apikey.NotCovered, apikey.Insufficient,
		apikey.PathInvalid, apikey.MethodInvalid, apikey.RateLimited, apikey.Abandoned:
	}
	return false
}

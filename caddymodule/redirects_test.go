package caddymodule

import (
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// TestHostIsRedirectedWhereCaddysOwnRedirectIsTheFirstToTakeIt: a warning that is not true would not be read when one is.
func TestHostIsRedirectedWhereCaddysOwnRedirectIsTheFirstToTakeIt(t *testing.T) {
	route := func(handler caddyhttp.MiddlewareHandler, matchers ...any) caddyhttp.Route {
		r := caddyhttp.Route{Handlers: []caddyhttp.MiddlewareHandler{handler}}
		for _, matcher := range matchers {
			r.MatcherSets = append(r.MatcherSets, caddyhttp.MatcherSet{matcher})
		}
		return r
	}
	own, configured, refusing := caddyhttp.StaticResponse{}, new(caddyhttp.StaticResponse), new(TLSOnly)
	a, b, site := caddyhttp.MatchHost{"a"}, caddyhttp.MatchHost{"b"}, &caddyhttp.MatchHost{"a"}
	for name, tc := range map[string]struct {
		routes caddyhttp.RouteList
		want   bool
	}{
		"its own redirect":              {caddyhttp.RouteList{route(own, a)}, true},
		"one for all hosts":             {caddyhttp.RouteList{route(own)}, true},
		"one that matches no host":      {caddyhttp.RouteList{route(own, caddyhttp.MatchPath{"/"})}, true},
		"one of two":                    {caddyhttp.RouteList{route(own, b, a)}, true},
		"another host's":                {caddyhttp.RouteList{route(own, b)}, false},
		"after another host's refusal":  {caddyhttp.RouteList{route(refusing, &caddyhttp.MatchHost{"b"}), route(own, a)}, true},
		"after its refusal":             {caddyhttp.RouteList{route(refusing, site), route(own, a)}, false},
		"after a refusal of all":        {caddyhttp.RouteList{route(refusing), route(own, a)}, false},
		"a response that is configured": {caddyhttp.RouteList{route(configured, site)}, false},
		"none":                          {nil, false},
	} {
		if got := redirects(tc.routes, "a"); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	if got := hosts(route(own, site, b, caddyhttp.MatchPath{"/"})); !slices.Equal(got, []string{"a", "b", anyHost}) {
		t.Errorf("hosts %q", got)
	}
}

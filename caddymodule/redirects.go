package caddymodule

import (
	"cmp"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// warnOfRedirects warns of gateways whose clients Caddy redirects, on its own account, when they come without TLS: they would go on
// sending their keys in the clear, and never notice. It runs at start: Caddy has added its redirects by then.
func warnOfRedirects(app *caddyhttp.App, logger *zap.Logger) {
	var redirected []string
	for _, server := range app.Servers {
		if len(server.TLSConnPolicies) == 0 {
			continue
		}
		for _, route := range server.Routes {
			if !holds[*Gateway](route.Handlers) {
				continue
			}
			for _, host := range hosts(route) {
				if slices.ContainsFunc(onHTTPPort(app), func(s *caddyhttp.Server) bool { return redirects(s.Routes, host) }) {
					redirected = append(redirected, cmp.Or(host, "any"))
				}
			}
		}
	}
	if len(redirected) > 0 {
		logger.Warn("requests without TLS to a rekall_gateway are redirected, and clients go on sending keys in the clear: "+
			"set auto_https disable_redirects in the global options, and add a site http:// with rekall_tls_only", zap.Strings("hosts", redirected))
	}
}

const anyHost = ""

// hosts are those that a route takes requests for.
func hosts(route caddyhttp.Route) (all []string) {
	for _, set := range route.MatcherSets {
		named := false
		for _, matcher := range set {
			switch m := matcher.(type) {
			case *caddyhttp.MatchHost:
				all, named = append(all, *m...), true
			case caddyhttp.MatchHost: // of Caddy's own redirects
				all, named = append(all, m...), true
			}
		}
		if !named {
			all = append(all, anyHost)
		}
	}
	if len(route.MatcherSets) == 0 {
		all = append(all, anyHost)
	}
	return all
}

// redirects reports whether the first route that takes a host's requests, and redirects or refuses them, is one of Caddy's redirects.
// Caddy puts them before a site for all hosts.
func redirects(routes caddyhttp.RouteList, host string) bool {
	for _, route := range routes {
		if of := hosts(route); !slices.Contains(of, host) && !slices.Contains(of, anyHost) {
			continue
		}
		switch {
		case holds[*TLSOnly](route.Handlers):
			return false
		case holds[caddyhttp.StaticResponse](route.Handlers): // one that was configured is a pointer
			return true
		}
	}
	return false
}

// holds reports whether a handler is among handlers, or in a subroute there.
func holds[T any](handlers []caddyhttp.MiddlewareHandler) bool {
	return slices.ContainsFunc(handlers, func(handler caddyhttp.MiddlewareHandler) bool {
		if _, ok := handler.(T); ok {
			return true
		}
		block, ok := handler.(*caddyhttp.Subroute)
		return ok && slices.ContainsFunc(block.Routes, func(route caddyhttp.Route) bool { return holds[T](route.Handlers) })
	})
}

package caddymodule

import (
	"fmt"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// checkRoutes refuses a configuration in which a backend behind a gateway can be reached in another way: without a key, or
// with a key of the other environment. It runs at start: routes of all servers are provisioned by then.
func checkRoutes(app *caddyhttp.App) error {
	c := routeCheck{dialled: map[string]dial{}}
	for name, server := range app.Servers {
		c.routes("server "+name, 0, server.Routes)
		if server.Errors != nil {
			c.routes("server "+name+", error routes", 0, server.Errors.Routes)
		}
		for route, named := range server.NamedRoutes {
			c.routes("server "+name+", named route "+route, 0, caddyhttp.RouteList{*named})
		}
	}
	return c.err
}

// dial is how a backend is reached: behind a gateway in an environment, or bare (0).
type dial struct {
	environment apikey.Environment
	where       string
}

type routeCheck struct {
	dialled map[string]dial
	err     error
}

func (c *routeCheck) routes(where string, env apikey.Environment, routes caddyhttp.RouteList) {
	for _, route := range routes {
		for _, handler := range route.Handlers {
			c.handler(where, env, handler)
		}
	}
}

func (c *routeCheck) handler(where string, env apikey.Environment, handler any) {
	switch h := handler.(type) {
	case *caddyhttp.Subroute:
		c.routes(where, env, h.Routes)
		if h.Errors != nil {
			c.routes(where+", error routes", env, h.Errors.Routes)
		}
	case *Gateway:
		c.handler(where+", rekall_gateway production", apikey.Production, h.production)
		c.handler(where+", rekall_gateway sandbox", apikey.Sandbox, h.sandbox)
	case *reverseproxy.Handler:
		for _, upstream := range h.Upstreams {
			c.add(upstream.Dial, dial{env, where})
		}
	}
}

func (c *routeCheck) add(address string, d dial) {
	first, ok := c.dialled[address]
	switch {
	case !ok || first.environment == d.environment:
		if !ok {
			c.dialled[address] = d
		}
	case c.err != nil:
	case first.environment != 0 && d.environment != 0:
		c.err = fmt.Errorf("upstream %s is in both environments (%s; %s): give production and sandbox backends of their own", address, first.where, d.where)
	default:
		c.err = fmt.Errorf("upstream %s is behind a rekall_gateway and also reachable without one (%s; %s): remove the other way", address, first.where, d.where)
	}
}

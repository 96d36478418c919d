package caddymodule

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/intercept"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// checkRoutes refuses a configuration in which a backend behind a gateway can be reached in another way: without a key, or
// with a key of the other environment. It also refuses one that would run a client's text as a template, or write keys that are made or
// sent to sign in, and warns of handlers of ours that no request comes to. It runs at start: routes of all servers are provisioned by then.
//
// It compares addresses as they are written, with the spellings of one address folded. Two names of one machine, and
// handlers of third parties that hold routes of their own, are beyond it; the transport "rekall" is for those.
func checkRoutes(app *caddyhttp.App, logger *zap.Logger) error {
	c := routeCheck{servers: app.Servers, entries: map[string]bool{}, logger: logger}
	for name, server := range app.Servers {
		c.server, c.named, c.invoked, c.passed = name, server.NamedRoutes, map[invocation]passed{}, passed{}
		c.routes("server "+name, 0, server.Routes)
		if server.Errors != nil {
			c.passed = passed{}
			c.routes("server "+name+", error routes", 0, server.Errors.Routes)
		}
	}
	return c.verdict()
}

// dial is how a backend is reached: by requests of one environment that a gateway allowed, or by any (0).
type dial struct {
	upstream    string
	environment apikey.Environment
	where       string
	server      string // whose proxy dials
}

// invocation is a named route's use in an environment.
type invocation struct {
	route       string
	environment apikey.Environment
	passed      passed
}

// passed is what a request has passed on its way to a handler.
type passed struct {
	around around
	taken  string // where a gateway answers all requests, so that none comes further
}

// around is what a request has passed and its answer passes on the way back.
type around uint8

const (
	// templates may read the environment and all files. The dashboard's pages repeat what clients have chosen, names of keys and
	// addresses, and a backend's answers may too.
	templates around = 1 << iota

	// bodies are whole bodies as a placeholder, for a log, a trace or a header. A new key stands in an answer's, and one that signs
	// in or is reported in a request's.
	bodies
)

type routeCheck struct {
	servers map[string]*caddyhttp.Server
	entries map[string]bool // servers with a gateway, to which clients come

	server  string                      // being walked
	named   map[string]*caddyhttp.Route // its
	invoked map[invocation]passed       // with what was passed after it: so routes which invoke each other end
	passed                              // by who comes to the handler that is walked to

	lookupsKnown bool // whether what the proxies of the block being walked look up is known
	dials        []dial
	gateway      bool // there is one, or its transport
	open         string
	err          error
	logger       *zap.Logger
}

// verdict returns the first error. An open proxy is one only where there is something to protect from it.
func (c *routeCheck) verdict() error {
	c.follow()
	c.front()
	c.compare()
	if c.err == nil && c.gateway && c.open != "" {
		return fmt.Errorf("%s: it could lead to a backend of a rekall_gateway; name the addresses", c.open)
	}
	return c.err
}

func (c *routeCheck) routes(where string, env apikey.Environment, routes caddyhttp.RouteList) {
	before, groups := c.around, map[string]around{} // of a group only one route is taken
	for _, route := range routes {
		c.around = before
		for group, added := range groups {
			if group != route.Group {
				c.around |= added
			}
		}
		taken := c.taken
		c.matchers(where, env, route.MatcherSets)
		for _, handler := range route.Handlers {
			c.handler(where+matched(route), env, handler)
		}
		if _, others := groups[route.Group]; others || len(route.MatcherSets) > 0 {
			c.taken = taken // some requests do not come to this route
		}
		switch {
		case route.Terminal:
		case route.Group != "":
			groups[route.Group] |= c.around
		default:
			before = c.around
		}
	}
	c.around = before
	for _, added := range groups {
		c.around |= added
	}
}

func (c *routeCheck) matchers(where string, env apikey.Environment, sets caddyhttp.MatcherSets) {
	for _, set := range sets {
		for _, matcher := range set {
			if not, ok := matcher.(*caddyhttp.MatchNot); ok {
				c.matchers(where, env, not.MatcherSets)
				continue
			}
			c.bodies(where+", matcher", env, matcher)
		}
	}
}

// bodies notes what a handler or a matcher takes of bodies.
func (c *routeCheck) bodies(where string, env apikey.Environment, module any) {
	ofRequest, ofAnswer := takesBodies(module)
	if ofRequest || ofAnswer {
		c.around |= bodies
	}
	if ofRequest && env != 0 && c.err == nil { // Caddy reads it from the request that came, of which the gateway passes a copy on
		c.err = fmt.Errorf("what stands behind a rekall_gateway takes {http.request.body}, and would leave nothing of it to the backend (%s): "+
			"take the placeholder out", where)
	}
}

// matched names the hosts and paths that a route is for, as far as it is easy to tell.
func matched(route caddyhttp.Route) string {
	var names string
	for _, set := range route.MatcherSets {
		for _, matcher := range set {
			switch m := matcher.(type) {
			case *caddyhttp.MatchHost:
				names += " " + strings.Join(*m, " ")
			case *caddyhttp.MatchPath:
				names += " " + strings.Join(*m, " ")
			}
		}
	}
	return names
}

func (c *routeCheck) handler(where string, env apikey.Environment, handler any) {
	if module, ok := handler.(caddy.Module); ok {
		id := module.CaddyModule().ID
		if id == "http.handlers.templates" {
			c.around |= templates
		}
		if c.taken != "" && strings.HasPrefix(id.Name(), "rekall_") {
			c.logger.Warn("no request comes to a handler, since a rekall_gateway before it answers them all: take one of them out, or put each into a handle",
				zap.String("handler", id.Name()), zap.String("where", where), zap.String("answered", c.taken))
		}
	}
	c.bodies(where, env, handler)
	switch h := handler.(type) {
	case *Keys:
		c.answers(where + ", rekall_keys")
		if c.around&bodies != 0 && c.err == nil {
			c.err = fmt.Errorf("a handler around rekall_keys takes {http.request.body} or {http.response.body}, in which keys are (%s): "+
				"put it into a handle that rekall_keys is not in", where)
		}
	case *caddyhttp.Subroute:
		before := c.taken
		c.routes(where, env, h.Routes)
		if h.Errors != nil {
			taken := c.taken
			c.taken = before
			c.routes(where+", error routes", env, h.Errors.Routes)
			c.taken = taken
		}
	case *caddyhttp.Invoke:
		c.invoke(where, env, h.Name)
	case *intercept.Intercept:
		around := c.around
		c.responses(where, env, h.HandleResponse)
		c.around = around | c.around&bodies // what they answer with templates is their own, not what comes from behind
	case *Gateway:
		c.answers(where + ", rekall_gateway")
		c.gateway, c.entries[c.server] = true, true
		if c.around&bodies != 0 && env == 0 {
			c.logger.Warn("a handler in front of a rekall_gateway takes whole bodies into memory, of clients without a key too: take it out",
				zap.String("where", where))
		}
		c.block(where+", rekall_gateway production", apikey.Production, &h.production)
		c.block(where+", rekall_gateway sandbox", apikey.Sandbox, &h.sandbox)
		c.taken = cmp.Or(c.taken, where) // the first stays: by ever new ones, routes that invoke each other would not end
	case *reverseproxy.Handler:
		c.proxy(where, env, h)
		c.responses(where, env, h.HandleResponse)
	}
}

func (c *routeCheck) block(where string, env apikey.Environment, b *block) {
	for _, name := range b.lookedUp {
		c.add(name, env, where)
	}
	known, passed := c.lookupsKnown, c.passed
	c.lookupsKnown = true
	c.handler(where, env, b.configured)
	c.lookupsKnown, c.passed = known, passed // nothing follows a block
}

func (c *routeCheck) responses(where string, env apikey.Environment, handlers []caddyhttp.ResponseHandler) {
	taken := c.taken
	for _, h := range handlers {
		c.routes(where+", handle_response", env, h.Routes)
		c.taken = taken // not every answer comes to them
	}
}

func (c *routeCheck) invoke(where string, env apikey.Environment, name string) {
	route, use := c.named[name], invocation{name, env, c.passed}
	if route == nil {
		return
	}
	if passed, ok := c.invoked[use]; ok {
		c.passed = passed
		return
	}
	c.invoked[use] = c.passed
	known := c.lookupsKnown
	c.lookupsKnown = false
	c.routes(where+", named route "+name, env, caddyhttp.RouteList{*route})
	c.lookupsKnown = known
	c.invoked[use] = c.passed
}

// takesBodies reports whether a handler's own options, without the routes that it holds, name a placeholder of a whole body.
func takesBodies(handler any) (ofRequest, ofAnswer bool) {
	options, err := json.Marshal(handler)
	if err != nil {
		return false, false
	}
	return bytes.Contains(options, []byte("http.request.body")), bytes.Contains(options, []byte("http.response.body"))
}

// answers notes that what a client has written may be in the answers that are made here.
func (c *routeCheck) answers(where string) {
	if c.around&templates != 0 && c.err == nil {
		c.err = fmt.Errorf("templates would run what clients have written, with the environment and the files of this server (%s): "+
			"put templates into a handle that the gateway is not in", where)
	}
}

func (c *routeCheck) proxy(where string, env apikey.Environment, h *reverseproxy.Handler) {
	if t, ok := h.Transport.(*Transport); ok {
		c.gateway = true
		if env != 0 && env != t.environment && c.err == nil {
			c.err = fmt.Errorf("a reverse_proxy for %s stands where only requests of the other environment come (%s): move it", t.environment, where)
		}
		env = t.environment
	} else if env != 0 && countsFailures(h) {
		if _, ok := h.Transport.(*reverseproxy.HTTPTransport); ok {
			c.logger.Warn("a reverse_proxy of a named route counts errors of clients as failures of its backends; give it the transport rekall",
				zap.String("transport", "rekall "+env.String()), zap.String("where", where))
		} else { // such as fastcgi, which fails at an upload without a length
			c.logger.Warn("a reverse_proxy with a transport of its own counts errors of clients as failures of its backends; leave fail_duration out",
				zap.String("where", where))
		}
	}
	if env != 0 {
		c.answers(where)
	}
	if env != 0 && countsSlowness(h) {
		c.logger.Warn("unhealthy_latency and unhealthy_request_count count slow uploads and streams of clients as failures of the backends; leave them out",
			zap.String("where", where))
	}
	for _, upstream := range h.Upstreams {
		c.add(upstream.Dial, env, where)
	}
	switch source := h.DynamicUpstreams.(type) {
	case nil:
	case *reverseproxy.AUpstreams:
		c.add(net.JoinHostPort(source.Name, source.Port), env, where)
	case *reverseproxy.SRVUpstreams:
		c.add(service(source.Service, source.Proto, source.Name), env, where)
	default: // behind a gateway it is the operator's list of that environment's backends; the lookups of a multi are known from its block
		if _, multi := source.(*reverseproxy.MultiUpstreams); env == 0 || multi && !c.lookupsKnown {
			c.open = fmt.Sprintf("a reverse_proxy takes its upstreams from %T (%s)", source, where)
		}
	}
}

// service is what is looked up for a service, in whichever of the two ways it is named.
func service(service, proto, name string) string {
	if service != "" || proto != "" {
		name = "_" + service + "._" + proto + "." + name
	}
	return "srv " + name
}

// lookedUp are the names that the proxies of a block look their upstreams up by. Caddy does not export those of
// "multi" once it has loaded them.
func lookedUp(config any) (names []string) {
	for object := range objectsIn(config) {
		text := func(field string) string {
			value, _ := object[field].(string)
			return value
		}
		switch object["source"] {
		case "a":
			names = append(names, net.JoinHostPort(text("name"), cmp.Or(text("port"), "80")))
		case "srv":
			names = append(names, service(text("service"), text("proto"), text("name")))
		}
	}
	return names
}

// countsFailures reports whether a proxy has passive health checks.
func countsFailures(h *reverseproxy.Handler) bool {
	return h.HealthChecks != nil && h.HealthChecks.Passive != nil && h.HealthChecks.Passive.FailDuration > 0
}

// countsSlowness reports whether a proxy takes a backend for unhealthy when its requests take long. That is decided outside of the
// transport, which could tell whose doing it is.
func countsSlowness(h *reverseproxy.Handler) bool {
	return h.HealthChecks != nil && h.HealthChecks.Passive != nil &&
		(h.HealthChecks.Passive.UnhealthyLatency > 0 || h.HealthChecks.Passive.UnhealthyRequestCount > 0)
}

func (c *routeCheck) add(upstream string, env apikey.Environment, where string) {
	if strings.Contains(known(upstream), "{") {
		c.open = fmt.Sprintf("upstream %s depends on the request or on a file (%s)", upstream, where)
		return
	}
	c.dials = append(c.dials, dial{upstream, env, where, c.server})
}

// follow finds the servers of this configuration that stand behind a gateway, since one of its blocks dials them: what they dial is
// their environment's. Clients must not come to them: they need no key there.
func (c *routeCheck) follow() {
	behind := map[string]apikey.Environment{}
	for found := true; found; {
		found = false
		for i := range c.dials {
			d := &c.dials[i]
			if env := behind[d.server]; d.environment == 0 && env != 0 {
				d.environment = env
				d.where += ", behind a rekall_gateway"
			}
			if d.environment == 0 {
				continue
			}
			for _, name := range c.dialled(d.upstream) {
				if c.err == nil && (c.entries[name] || slices.ContainsFunc(c.servers[name].Listen, isPublic)) {
					c.err = fmt.Errorf("upstream %s is a server of this configuration that clients reach without a rekall_gateway (%s; server %s): "+
						"give what is behind the gateway a server of its own, bound to a loopback address or a Unix socket", d.upstream, d.where, name)
				}
				if behind[name] == 0 {
					behind[name], found = d.environment, true
				}
			}
		}
	}
}

// front refuses a server in front of a gateway's: keys come through it, and its logs and the errors of its proxy would show them.
func (c *routeCheck) front() {
	for _, d := range c.dials {
		for _, name := range c.dialled(d.upstream) {
			if c.err == nil && d.environment == 0 && c.entries[name] {
				c.err = fmt.Errorf("upstream %s is a server of this configuration with a rekall_gateway (%s; server %s): keys would stand in the logs "+
					"of the server in front; put the rekall_gateway into that one", d.upstream, d.where, name)
			}
		}
	}
}

// dialled are the servers of this configuration that listen on an upstream's address.
func (c *routeCheck) dialled(upstream string) []string {
	var names []string
	for name, server := range c.servers {
		if slices.ContainsFunc(server.Listen, func(listen string) bool { return leadsTo(upstream, listen) }) {
			names = append(names, name)
		}
	}
	return names
}

// compare refuses a backend that is dialled in two ways.
func (c *routeCheck) compare() {
	firsts := map[string]dial{}
	for _, d := range c.dials {
		targets := []string{normalize(d.upstream)}
		for _, name := range c.dialled(d.upstream) { // it may listen on several addresses
			targets = append(targets, "server "+name)
		}
		for _, target := range targets {
			first, ok := firsts[target]
			switch {
			case !ok:
				firsts[target] = d
			case first.environment == d.environment, c.err != nil:
			case first.environment != 0 && d.environment != 0:
				c.err = fmt.Errorf("upstream %s is in both environments (%s; %s): give production and sandbox backends of their own",
					d.upstream, first.where, d.where)
			default:
				c.err = fmt.Errorf("upstream %s is behind a rekall_gateway and also reachable without one (%s; %s): remove the other way",
					d.upstream, first.where, d.where)
			}
		}
	}
}

// known is an upstream with what does not change later in it: what the environment says, and not what a file does.
func known(upstream string) string {
	return caddy.NewReplacer().WithoutFile().ReplaceKnown(upstream, "")
}

// normalize folds the spellings of one address: case, a dot at the end, the ways to write an IP address, and those to name
// this machine.
func normalize(upstream string) string {
	upstream = known(upstream)
	address, err := caddy.ParseNetworkAddress(upstream)
	if err != nil {
		return strings.ToLower(upstream)
	}
	if address.IsUnixNetwork() {
		return socket(address)
	}
	return net.JoinHostPort(machine(address.Host), strconv.FormatUint(uint64(address.StartPort), 10))
}

// socket folds the spellings of a Unix socket. A listener's may end with the permissions that it is made with.
func socket(address caddy.NetworkAddress) string {
	file, _, _ := strings.Cut(address.Host, "|")
	return "unix/" + path.Clean(file)
}

func machine(host string) string {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if ip, err := netip.ParseAddr(host); err == nil {
		host = ip.Unmap().String()
	}
	switch host {
	case "", "127.0.0.1", "0.0.0.0", "::", "::1":
		host = "localhost"
	}
	return host
}

// leadsTo reports whether a server that listens on an address, or on a range of ports, is dialled as an upstream.
func leadsTo(upstream, listen string) bool {
	at, err := caddy.ParseNetworkAddress(listen)
	if err != nil {
		return false
	}
	upstream = normalize(upstream)
	if at.IsUnixNetwork() {
		return upstream == socket(at)
	}
	host, port, err := net.SplitHostPort(upstream)
	if err != nil {
		return false
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || uint(number) < at.StartPort || uint(number) > at.EndPort {
		return false
	}
	return host == machine(at.Host) || isAny(at.Host) && isLoopback(host)
}

// isPublic reports whether other machines may reach a listener.
func isPublic(listen string) bool {
	at, err := caddy.ParseNetworkAddress(listen)
	return err != nil || !at.IsUnixNetwork() && !isLoopback(at.Host)
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.Unmap().IsLoopback()
}

func isAny(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.Unmap().IsUnspecified()
}

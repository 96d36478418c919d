package caddymodule

import (
	"context"
	"errors"
	"net"
	"net/http"
	"reflect"
	"slices"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/rekall-ai/gateway/internal/credential"
)

// door stands before Caddy's own handler and takes credentials out of each request.
type door struct {
	next http.Handler

	// persons are headers that say to rekall_keys who asks. Handlers in front of it set them, for some paths perhaps and not for the
	// API's: what stands there on arrival is the client's word. To find out at the start whether one is set on every way to the API,
	// we would have to know what matchers let through and what handlers of third parties do.
	persons []string
}

func (d door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c := connectionOf(r); c != nil && r.ProtoMajor == 1 {
		r = c.begin(w, r)
	}
	r = credential.AtDoor(r)
	for _, header := range d.persons {
		delete(r.Header, header)
	}
	d.next.ServeHTTP(w, r)
}

// connection is the context of a client's connection, from which the server derives those of its requests. HTTP/1 sends one request
// at a time, so a cut can cancel the connection's: a context for each request would cost it a fifth of what the gateway does.
type connection struct {
	context.Context
	cancel  context.CancelCauseFunc
	request context.Context // as the server made it for the request that is being served, of HTTP/1
}

func newConnection(ctx context.Context) *connection {
	c := new(connection)
	c.Context, c.cancel = context.WithCancelCause(ctx)
	return c
}

type connectionKey struct{}

func (c *connection) Value(key any) any {
	if key == (connectionKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// connectionOf returns nil if the server's door is not ours.
func connectionOf(r *http.Request) *connection {
	c, _ := r.Context().Value(connectionKey{}).(*connection)
	return c
}

// begin notes which request is being served. A cut that came just as an answer was complete has cancelled the connection's context.
// The next request has nothing to do with that cut: it gets a context of its own and is the connection's last. With it, the request
// learns only when it writes that its client has left.
func (c *connection) begin(w http.ResponseWriter, r *http.Request) *http.Request {
	if c.Err() != nil {
		if r.Header["Upgrade"] == nil { // the proxy's to say, and the end of the connection as well
			w.Header()["Connection"] = []string{"close"}
		}
		r = r.WithContext(context.WithoutCancel(r.Context()))
	}
	c.request = r.Context()
	return r
}

// ends reports whether the end of the connection's context is the end of the request: unless it is of HTTP/2, or a handler before
// the gateway has given it a context that ends otherwise.
func (c *connection) ends(r *http.Request) bool {
	return c != nil && r.ProtoMajor == 1 && c.Err() == nil && c.request != nil && r.Context().Done() == c.request.Done()
}

// guardDoor makes the server in which a handler is being provisioned take credentials out of each request before it
// copies the request for its logs. A handler is too late: by then "X-Api-Key" and "?api_key=" stand in the copy.
//
// The servers on Caddy's HTTP port are guarded with it: there Caddy redirects to this server what came without TLS, on its
// own account and with this server's log.
//
// Headers that say who a person is are taken out as well.
func guardDoor(ctx caddy.Context, persons ...string) error {
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		return errors.New("not part of an http server: API keys could reach its logs")
	}
	if !onlyTCP(server) {
		return errors.New("the server serves HTTP/3 only, where API keys could reach its logs: add h1 or h2 to its protocols")
	}
	if redirectsPlainHTTP(server) {
		return errors.New("the server has the listener wrapper http_redirect, which repeats keys of requests without TLS: remove it")
	}
	guard(server, persons...)
	for _, module := range ctx.Modules() {
		if app, ok := module.(*caddyhttp.App); ok {
			guardHTTPPort(app)
		}
	}
	return nil
}

// redirectsPlainHTTP reports whether a server's listener answers plain HTTP on the port for TLS. Caddy has forgotten how its wrappers were
// configured by now, and does not show them.
func redirectsPlainHTTP(server *caddyhttp.Server) bool {
	wrappers := reflect.ValueOf(server).Elem().FieldByName("listenerWrappers")
	if wrappers.Kind() != reflect.Slice {
		return false
	}
	for i := range wrappers.Len() {
		if wrappers.Index(i).Elem().Type() == reflect.TypeFor[*caddyhttp.HTTPRedirectListenerWrapper]() {
			return true
		}
	}
	return false
}

// guard wraps the handler of a server, and gives each connection a context of ours. Caddy calls RegisterConnContext's function in
// the accept loop, before the first request of the first connection, with a context that holds the *http.Server (documented by
// net/http). There the server's handler is wrapped, once.
//
// It also has Caddy take the client's address from the right of X-Forwarded-For, where a trusted proxy has added it: by default
// it is the left-most, which clients write as they like.
func guard(server *caddyhttp.Server, persons ...string) {
	server.TrustedProxiesStrict = 1
	var once sync.Once
	server.RegisterConnContext(func(ctx context.Context, _ net.Conn) context.Context {
		once.Do(func() {
			inner := ctx.Value(http.ServerContextKey).(*http.Server)
			// Each handler of ours in this server registers, and every accept loop waits here for all of them before it
			// serves a request.
			d, guarded := inner.Handler.(door)
			if !guarded {
				d.next = inner.Handler
			}
			d.persons = append(d.persons, persons...)
			inner.Handler = d
		})
		if ctx.Value(connectionKey{}) != nil { // another handler of ours has
			return ctx
		}
		return newConnection(ctx)
	})
}

func guardHTTPPort(app *caddyhttp.App) {
	for _, server := range onHTTPPort(app) {
		guard(server)
	}
}

// onHTTPPort returns the servers that listen on Caddy's HTTP port, among them the one that Caddy makes for its redirects.
func onHTTPPort(app *caddyhttp.App) (servers []*caddyhttp.Server) {
	port := uint(app.HTTPPort)
	if port == 0 {
		port = caddyhttp.DefaultHTTPPort
	}
	for _, server := range app.Servers {
		for _, listen := range server.Listen {
			address, err := caddy.ParseNetworkAddress(listen)
			if err == nil && address.StartPort <= port && port <= address.EndPort {
				servers = append(servers, server)
				break
			}
		}
	}
	return servers
}

// onlyTCP takes HTTP/3 out of the server's protocols, whose own server has no such hook, and reports whether anything is
// left.
func onlyTCP(server *caddyhttp.Server) bool {
	isH3 := func(protocol string) bool { return protocol == "h3" }
	server.Protocols = slices.DeleteFunc(slices.Clone(server.Protocols), isH3)
	for i, protocols := range server.ListenProtocols {
		if protocols == nil {
			continue
		}
		left := slices.DeleteFunc(slices.Clone(protocols), isH3)
		if len(left) == 0 {
			return false
		}
		server.ListenProtocols[i] = left
	}
	return len(server.Protocols) > 0
}

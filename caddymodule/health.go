package caddymodule

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() { caddy.RegisterModule(Health{}) }

// Health answers /rekall/live and /rekall/ready on a site, for load balancers that cannot reach the admin endpoint. It tells
// no more than yes or no, so that anybody may ask. Every other request passes. During Caddy's shutdown_delay it is not ready.
type Health struct{ app *App }

// CaddyModule returns the Caddy module information.
func (Health) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.rekall_health", New: func() caddy.Module { return new(Health) }}
}

// Provision finds what is asked for, and guards the server's door.
func (h *Health) Provision(ctx caddy.Context) error {
	app, err := app(ctx)
	if err != nil {
		return err
	}
	h.app = app
	return guardDoor(ctx)
}

// ServeHTTP answers for this configuration alone: one that is being loaded beside it says nothing about this site yet.
func (h *Health) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	switch r.URL.Path {
	case livePath:
		return serveLive(w, r)
	case readyPath:
		return answerReady(w, r, h.app.ready() && !shuttingDown(r))
	}
	return next.ServeHTTP(w, r)
}

// shuttingDown reports whether the server is within Caddy's shutdown_delay: it still serves, and load balancers that ask now
// send their next requests elsewhere.
func shuttingDown(r *http.Request) bool {
	replacer, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return false
	}
	down, _ := replacer.Get("http.shutting_down")
	return down == true
}

var (
	_ caddy.Provisioner           = (*Health)(nil)
	_ caddyhttp.MiddlewareHandler = (*Health)(nil)
)

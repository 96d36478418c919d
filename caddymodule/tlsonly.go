package caddymodule

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/rekall-ai/gateway/internal/apierror"
)

func init() {
	caddy.RegisterModule(TLSOnly{})
}

// TLSOnly refuses requests that came without TLS with 403 TLS_REQUIRED, and keeps the key they carried out of the logs.
// It never redirects.
type TLSOnly struct{}

// CaddyModule returns the Caddy module information.
func (TLSOnly) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.rekall_tls_only", New: func() caddy.Module { return new(TLSOnly) }}
}

// Provision guards the server's door.
func (*TLSOnly) Provision(ctx caddy.Context) error { return guardDoor(ctx) }

var tlsRequired = apierror.New(http.StatusForbidden, "TLS_REQUIRED",
	"This API is served over HTTPS only. Replace any API key that was sent over plain HTTP.")

func (*TLSOnly) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if r.TLS != nil {
		return next.ServeHTTP(w, r)
	}
	// The client's connection is not worth keeping: whatever it sends next is in the clear as well.
	w.Header().Set("Connection", "close")
	refuse(w, r, tlsRequired)
	return nil
}

var (
	_ caddy.Provisioner           = (*TLSOnly)(nil)
	_ caddyhttp.MiddlewareHandler = (*TLSOnly)(nil)
)

// Command panicking is the gateway with one more handler, "panic", which fails as loudly as a handler can: the value of its
// panic, which the server logs, is all that it can see of the request. Only a test builds it.
package main

import (
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/rekall-ai/gateway/caddymodule"
)

func main() {
	caddy.RegisterModule(handler{})
	httpcaddyfile.RegisterHandlerDirective("panic", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return handler{}, nil
	})
	httpcaddyfile.RegisterDirectiveOrder("panic", httpcaddyfile.Before, "respond")
	caddycmd.Main()
}

type handler struct{}

// CaddyModule returns the Caddy module information.
func (handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.panic", New: func() caddy.Module { return new(handler) }}
}

func (handler) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	original := r.Context().Value(caddyhttp.OriginalRequestCtxKey)
	panic(fmt.Sprintf("on purpose: %+v %#v %+v %v %+v %+v %+v", r, r, r.URL, r.URL, r.Context(), original, w))
}

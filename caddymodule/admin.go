package caddymodule

import (
	"encoding/json"
	"net/http"

	"github.com/caddyserver/caddy/v2"
)

func init() { caddy.RegisterModule(Admin{}) }

// The paths of the probes, on the admin endpoint and on a site with rekall_health.
const (
	livePath  = "/rekall/live"
	readyPath = "/rekall/ready"
)

// Admin serves what an operator may ask of a running edge, read-only: /rekall/live, /rekall/ready and /rekall/status on
// Caddy's admin endpoint.
type Admin struct{}

// CaddyModule returns the Caddy module information.
func (Admin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "admin.api.rekall", New: func() caddy.Module { return new(Admin) }}
}

// Routes returns the routes.
func (Admin) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: livePath, Handler: caddy.AdminHandlerFunc(serveLive)},
		{Pattern: readyPath, Handler: caddy.AdminHandlerFunc(serveReady)},
		{Pattern: "/rekall/status", Handler: caddy.AdminHandlerFunc(serveStatus)},
	}
}

func serveLive(w http.ResponseWriter, r *http.Request) error {
	return answerJSON(w, r, http.StatusOK, map[string]bool{"live": true})
}

// serveReady answers 200 while the configuration in use is ready. An outage shorter than max_staleness does not make it unready. A
// configuration that is only being loaded does not count: it may be given up, and its sites do not listen yet.
func serveReady(w http.ResponseWriter, r *http.Request) error {
	used, err := caddy.ActiveContext().AppIfConfigured("rekall")
	return answerReady(w, r, err == nil && used.(*App).ready())
}

func answerReady(w http.ResponseWriter, r *http.Request, ready bool) error {
	code := http.StatusOK
	if !ready {
		code = http.StatusServiceUnavailable
	}
	return answerJSON(w, r, code, map[string]bool{"ready": ready})
}

func answerJSON(w http.ResponseWriter, r *http.Request, code int, body any) error {
	if !onlyReads(w, r) {
		return nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	return json.NewEncoder(w).Encode(body)
}

var _ caddy.AdminRouter = Admin{}

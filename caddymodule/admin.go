package caddymodule

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
)

func init() { caddy.RegisterModule(Admin{}) }

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
		{Pattern: "/rekall/live", Handler: caddy.AdminHandlerFunc(serveLive)},
		{Pattern: "/rekall/ready", Handler: caddy.AdminHandlerFunc(serveReady)},
		{Pattern: "/rekall/status", Handler: caddy.AdminHandlerFunc(serveStatus)},
	}
}

// status is one runtime's state. There are several only while a reload with other settings is draining.
type status struct {
	Ready          bool       `json:"ready"`
	Epoch          uint64     `json:"epoch"`
	LastSyncAt     *time.Time `json:"last_sync_at"`
	SyncAgeSeconds float64    `json:"sync_age_seconds"`
	InFlight       int        `json:"in_flight"`
	Lookups        uint64     `json:"lookups"`
	LookupErrors   uint64     `json:"lookup_errors"`
	Syncs          uint64     `json:"syncs"`
	SyncErrors     uint64     `json:"sync_errors"`
	StreamsCut     uint64     `json:"streams_cut"`
	Canary         float64    `json:"canary_revocation_seconds"` // 0: none yet
}

func statuses() []status {
	all := []status{}
	runtimes.Range(func(_, value any) bool {
		s := value.(*runtime).cache.Status()
		one := status{
			Ready: s.Fresh, Epoch: s.Epoch, SyncAgeSeconds: s.Age.Seconds(), InFlight: s.InFlight,
			Lookups: s.Lookups, LookupErrors: s.LookupErrors, Syncs: s.Syncs, SyncErrors: s.SyncErrors, StreamsCut: s.StreamsCut, Canary: s.Canary.Seconds(),
		}
		if !s.SyncedAt.IsZero() {
			at := s.SyncedAt.UTC()
			one.LastSyncAt = &at
		}
		all = append(all, one)
		return true
	})
	return all
}

func serveLive(w http.ResponseWriter, r *http.Request) error {
	return reply(w, r, http.StatusOK, map[string]bool{"live": true})
}

// serveReady answers 200 while the key data of every runtime is fresh: an outage shorter than max_staleness drains nobody.
func serveReady(w http.ResponseWriter, r *http.Request) error {
	all := statuses()
	ready := len(all) > 0
	for _, s := range all {
		ready = ready && s.Ready
	}
	code := http.StatusOK
	if !ready {
		code = http.StatusServiceUnavailable
	}
	return reply(w, r, code, map[string]bool{"ready": ready})
}

func serveStatus(w http.ResponseWriter, r *http.Request) error {
	return reply(w, r, http.StatusOK, map[string]any{"runtimes": statuses()})
}

func reply(w http.ResponseWriter, r *http.Request, code int, body any) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		w.WriteHeader(http.StatusMethodNotAllowed)
		return nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	return json.NewEncoder(w).Encode(body)
}

var _ caddy.AdminRouter = Admin{}

package caddymodule

import (
	"context"
	"net/http"
	goruntime "runtime"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

// status is what /rekall/status says. README.md explains each field.
type status struct {
	Versions versions        `json:"versions"`
	Runtimes []runtimeStatus `json:"runtimes"`
}

type versions struct {
	Gateway string `json:"gateway"`
	Caddy   string `json:"caddy"`
	Go      string `json:"go"`
	Schema  int32  `json:"schema"` // that this binary knows
}

// runtimeStatus is one runtime's state. There are several only while configurations with different settings change over.
type runtimeStatus struct {
	Ready     bool          `json:"ready"`
	Edge      edgeIdentity  `json:"edge"`
	Schema    *int32        `json:"schema"` // of the database
	Sync      syncStatus    `json:"sync"`
	Cache     cacheStatus   `json:"cache"`
	Lookups   lookupStatus  `json:"lookups"`
	Requests  requestStatus `json:"requests"`
	Canary    float64       `json:"canary_revocation_seconds"`
	Edges     *edgeCount    `json:"edges"`
	LastError *lastError    `json:"last_error"`
}

type edgeIdentity struct {
	Name     string `json:"name"`
	Region   string `json:"region"`
	Instance string `json:"instance"`
}

type edgeCount struct {
	Live       int `json:"live"`
	FailClosed int `json:"fail_closed"`
}

type syncStatus struct {
	Epoch        uint64     `json:"epoch"`
	LastGoodAt   *time.Time `json:"last_good_at"`
	AgeSeconds   *float64   `json:"age_seconds"`
	MaxStaleness float64    `json:"max_staleness_seconds"`
	LagSeconds   float64    `json:"lag_seconds"`
	Position     uint64     `json:"position"`
	Total        uint64     `json:"total"`
	Errors       uint64     `json:"errors"`
	Restarts     uint64     `json:"restarts"`
	Listens      uint64     `json:"listens"`
	ListenErrors uint64     `json:"listen_errors"`
}

type cacheStatus struct {
	Keys       int    `json:"keys"`
	Size       int    `json:"size"`
	Hits       uint64 `json:"hits"`
	Misses     uint64 `json:"misses"`
	Evictions  uint64 `json:"evictions"`
	Drops      uint64 `json:"drops"`
	FilterKeys int    `json:"filter_keys"`
}

type lookupStatus struct {
	Total  uint64 `json:"total"`
	Errors uint64 `json:"errors"`
}

type requestStatus struct {
	InFlight int    `json:"in_flight"`
	Cut      uint64 `json:"cut"`
}

type lastError struct {
	At      time.Time `json:"at"`
	Message string    `json:"message"`
}

// runtimesInUse are those of configurations, without the ones that only see their last requests out.
func runtimesInUse() []*runtime {
	var all []*runtime
	runtimes.Range(func(_, value any) bool {
		all = append(all, value.(*runtime))
		return true
	})
	return all
}

func serveStatus(w http.ResponseWriter, r *http.Request) error {
	caddyVersion, _ := caddy.Version()
	s := status{
		Versions: versions{Gateway: version(), Caddy: caddyVersion, Go: goruntime.Version(), Schema: keystore.KnownSchemaVersion()},
		Runtimes: []runtimeStatus{},
	}
	for _, rt := range runtimesInUse() {
		s.Runtimes = append(s.Runtimes, rt.status(r.Context()))
	}
	return answerJSON(w, r, http.StatusOK, s)
}

func (rt *runtime) status(ctx context.Context) runtimeStatus {
	c := rt.cache.Status()
	s := runtimeStatus{
		Ready: rt.ready(*rt.issuers.Load()),
		Edge:  edgeIdentity{Name: rt.identity.Name, Region: rt.identity.Region, Instance: rt.identity.Instance},
		Sync: syncStatus{
			Epoch: c.Epoch, MaxStaleness: c.MaxStaleness.Seconds(), LagSeconds: c.Lag.Seconds(),
			Position: c.Watermark, Total: c.Syncs, Errors: c.SyncErrors,
			Restarts: c.Restarts, Listens: c.Listens, ListenErrors: c.ListenErrors,
		},
		Cache: cacheStatus{
			Keys: c.Keys, Size: c.Size, Hits: c.Hits, Misses: c.Misses, Evictions: c.Evictions, Drops: c.Drops, FilterKeys: c.FilterKeys,
		},
		Lookups:  lookupStatus{Total: c.Lookups, Errors: c.LookupErrors},
		Requests: requestStatus{InFlight: c.InFlight, Cut: c.Cut},
		Canary:   c.Canary.Seconds(),
	}
	if !c.SyncedAt.IsZero() {
		at, age := c.SyncedAt.UTC(), c.Age.Seconds()
		s.Sync.LastGoodAt, s.Sync.AgeSeconds = &at, &age
	}
	for _, f := range rt.lastFailures() {
		if f != nil && (s.LastError == nil || f.At.After(s.LastError.At)) {
			s.LastError = &lastError{At: f.At.UTC(), Message: apikey.Redact(f.Err.Error())}
		}
	}
	if n, holds := rt.reporter.Edges(); holds {
		s.Edges = &edgeCount{n.Live, n.FailClosed}
	}
	s.Schema = schemaVersion(ctx, rt.counts)
	return s
}

// lastFailures are those of each part, and of key management; nil where there was none.
func (rt *runtime) lastFailures() []*outage.Failure {
	all := []*outage.Failure{
		rt.cache.LastFailure(), rt.reporter.LastFailure(), rt.signer.LastFailure(), rt.usage.LastFailure(), rt.limiter.LastFailure(),
	}
	if rt.canary != nil {
		all = append(all, rt.canary.LastFailure())
	}
	managements.Range(func(_, value any) bool {
		all = append(all, value.(*management).failures.Last())
		return true
	})
	return all
}

// statusWithin bounds what status asks of Postgres: it must say what is wrong while Postgres is what is wrong.
const statusWithin = time.Second

// schemaVersion returns nil if Postgres does not tell, also for want of a right.
func schemaVersion(ctx context.Context, store *keystore.Store) *int32 {
	ctx, cancel := context.WithTimeout(ctx, statusWithin)
	defer cancel()
	version, err := store.SchemaVersion(ctx)
	if err != nil {
		return nil
	}
	return &version
}

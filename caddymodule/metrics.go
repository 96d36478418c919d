package caddymodule

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/usage"
)

// metrics live as long as the runtime and are registered again with each configuration's registry, so that counters
// survive reloads. Labels are closed sets: never a key, a key id or an account.
type metrics struct {
	decisions  [apikey.OutcomeCount][apikey.Sandbox + 1]prometheus.Counter // resolved once; a lookup by label costs more than a decision
	collectors []prometheus.Collector
	reportOnly *prometheus.CounterVec
}

func newMetrics(cache *keycache.Cache, used *usage.Counter) *metrics {
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rekall_decisions_total",
		Help: "Requests decided by the gateway, by outcome and by the environment of the presented key.",
	}, []string{"outcome", "environment"})
	m := &metrics{
		reportOnly: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rekall_scope_report_only_total",
			Help: "Requests let pass in report-only mode that scope rules would have refused.",
		}, []string{"outcome"}),
	}
	for outcome := range m.decisions {
		for environment := range m.decisions[outcome] {
			m.decisions[outcome][environment] = decisions.WithLabelValues(
				apikey.Outcome(outcome).String(), apikey.Environment(environment).String())
		}
	}
	m.collectors = append(m.collectors, decisions, m.reportOnly)
	gauge := func(name, help string, value func(keycache.Status) float64) {
		m.collectors = append(m.collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 { return value(cache.Status()) }))
	}
	counter := func(name, help string, value func(keycache.Status) uint64) {
		m.collectors = append(m.collectors, prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help},
			func() float64 { return float64(value(cache.Status())) }))
	}
	gauge("rekall_sync_age_seconds", "Time since the start of the last good sync; key data is refused beyond max_staleness.",
		func(s keycache.Status) float64 { return s.Age.Seconds() })
	gauge("rekall_requests_in_flight", "Requests and streams that would be cut if their key ended.",
		func(s keycache.Status) float64 { return float64(s.InFlight) })
	gauge("rekall_canary_revocation_seconds", "How long the last canary stayed allowed here after its revocation; 0: none yet.",
		func(s keycache.Status) float64 { return s.Canary.Seconds() })
	counter("rekall_cache_hits_total", "Keys answered from memory.", func(s keycache.Status) uint64 { return s.Hits })
	counter("rekall_cache_misses_total", "Keys that Postgres was asked for.", func(s keycache.Status) uint64 { return s.Misses })
	counter("rekall_unknown_keys_proved_total", "Unknown keys that the change feed proved to be unknown, without a lookup.", func(s keycache.Status) uint64 { return s.Proofs })
	counter("rekall_unknown_keys_refused_total", "Requests answered 503 because too many unknown keys waited for proof.", func(s keycache.Status) uint64 { return s.Refused })
	gauge("rekall_filter_keys", "Keys in the filter of all keys; 0 until it is built.", func(s keycache.Status) float64 { return float64(s.FilterKeys) })
	counter("rekall_lookups_total", "Lookup statements sent to Postgres.", func(s keycache.Status) uint64 { return s.Lookups })
	counter("rekall_lookup_errors_total", "Lookup statements that failed.", func(s keycache.Status) uint64 { return s.LookupErrors })
	counter("rekall_syncs_total", "Reads of the change feed.", func(s keycache.Status) uint64 { return s.Syncs })
	counter("rekall_sync_errors_total", "Reads of the change feed that failed.", func(s keycache.Status) uint64 { return s.SyncErrors })
	counter("rekall_listen_errors_total", "Lost or refused LISTEN connections.", func(s keycache.Status) uint64 { return s.ListenErrors })
	counter("rekall_streams_cut_total", "Requests in flight cut because their key ended.", func(s keycache.Status) uint64 { return s.StreamsCut })
	m.collectors = append(m.collectors, usageCollectors(used)...)
	return m
}

func (m *metrics) register(registry *prometheus.Registry) error {
	for _, c := range m.collectors {
		var already prometheus.AlreadyRegisteredError
		if err := registry.Register(c); err != nil && !errors.As(err, &already) {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

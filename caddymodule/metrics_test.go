package caddymodule

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/internal/usage"
)

// TestEachMetricIsTheNumberOfItsName: an alert on one that shows another's number never fires, or always does.
func TestEachMetricIsTheNumberOfItsName(t *testing.T) {
	o := &observation{
		Status: keycache.Status{
			Age: 1 * time.Second, Lag: 2 * time.Second, MaxStaleness: 3 * time.Second, InFlight: 4, Canary: 5 * time.Second, Keys: 6, Size: 7,
			Evictions: 8, Drops: 9, FilterKeys: 10, FilterBytes: 11, Hits: 12, Misses: 13, Proofs: 14, Refused: 15, Lookups: 16, LookupErrors: 17,
			Syncs: 18, SyncErrors: 19, Restarts: 20, Listens: 21, ListenErrors: 22, Cut: 23,
		},
		usage:  usage.Status{Buffered: 24, MaxBuffered: 25, Flushed: 26, FlushErrors: 27, Dropped: 28, Spikes: 29},
		limits: ratelimit.Status{Keys: 30, Outages: 31, Exchanges: 32},
	}
	for which, set := range []func(){func() {}, func() { o.Fresh = true }, func() { o.canSign = true }, func() { o.limits.Fallback = true }} {
		o.Fresh, o.canSign, o.limits.Fallback = false, false, false
		set()
		registry := prometheus.NewPedanticRegistry()
		registry.MustRegister(prometheus.CollectorFunc(func(collected chan<- prometheus.Metric) {
			for _, s := range observed {
				collected <- prometheus.MustNewConstMetric(s.desc, s.kind, s.value(o))
			}
		}))
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, family := range families {
			metric := family.GetMetric()[0]
			got[family.GetName()] = metric.GetGauge().GetValue() + metric.GetCounter().GetValue()
		}
		if diff := cmp.Diff(map[string]float64{
			"rekall_keys_trusted": truth(which == 1), "rekall_identity_token_ready": truth(which == 2), "rekall_rate_limit_fallback": truth(which == 3),
			"rekall_sync_age_seconds": 1, "rekall_sync_lag_seconds": 2, "rekall_max_staleness_seconds": 3,
			"rekall_syncs_total": 18, "rekall_sync_errors_total": 19, "rekall_sync_restarts_total": 20,
			"rekall_listen_connections_total": 21, "rekall_listen_errors_total": 22, "rekall_canary_revocation_seconds": 5,
			"rekall_cache_keys": 6, "rekall_cache_size_keys": 7, "rekall_cache_hits_total": 12, "rekall_cache_misses_total": 13,
			"rekall_cache_evictions_total": 8, "rekall_cache_drops_total": 9, "rekall_lookups_total": 16, "rekall_lookup_errors_total": 17,
			"rekall_filter_keys": 10, "rekall_unknown_keys_proved_total": 14, "rekall_unknown_keys_refused_total": 15,
			"rekall_requests_in_flight": 4, "rekall_requests_cut_total": 23,
			"rekall_usage_buffered": 24, "rekall_usage_buffer_size": 25, "rekall_usage_flushed_total": 26, "rekall_usage_flush_errors_total": 27,
			"rekall_usage_dropped_total": 28, "rekall_usage_spikes_total": 29,
			"rekall_rate_limit_keys": 30, "rekall_rate_limit_store_outages_total": 31, "rekall_rate_limit_store_exchanges_total": 32,
		}, got); diff != "" {
			t.Errorf("metrics (-want +got)\n%s", diff)
		}
	}
}

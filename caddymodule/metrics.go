package caddymodule

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/internal/usage"
)

// metrics live as long as the runtime and are registered again with each configuration's registry, so that counters
// survive reloads. Labels are closed sets: never a key, a key id or an account.
type metrics struct {
	decisions       [apikey.OutcomeCount][apikey.Sandbox + 1]prometheus.Counter // resolved once; a lookup by label costs more than a decision
	latencies       prometheus.Histogram
	revocationDelay prometheus.Histogram
	reportOnly      *prometheus.CounterVec
	upstreamErrors  *prometheus.CounterVec
	limited         [len(limitNames)]prometheus.Counter // by limitKind
	keysErrors      prometheus.Counter
	collectors      []prometheus.Collector
}

// latencyShare is the part of the decisions, one in so many, whose latency is measured: reading the clock twice and adding to
// a histogram that CPUs share would cost a tenth of a decision from memory.
const latencyShare = 16

// latencyBuckets are in seconds: from a decision from memory (1 us) past a lookup (1 ms) to the most that a request waits (1 s).
var latencyBuckets = []float64{
	250e-9, 500e-9, 1e-6, 2e-6, 4e-6, 8e-6, 16e-6, 32e-6, 64e-6, 250e-6, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3, 0.125, 0.25, 0.5, 1,
}

// revocationBuckets are in seconds, up to what is promised.
var revocationBuckets = []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60}

func newMetrics() *metrics {
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rekall_decisions_total",
		Help: "Requests decided by the gateway, by outcome and by the environment of the presented key.",
	}, []string{"outcome", "environment"})
	m := &metrics{
		latencies: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "rekall_decision_duration_seconds",
			Help:    "Time from a request's arrival at the gateway's handler to its decision, of one request in 16.",
			Buckets: latencyBuckets,
		}),
		revocationDelay: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "rekall_revocation_delay_seconds",
			Help:    "How long keys in memory stayed allowed here after their revocation, by Postgres's clock.",
			Buckets: revocationBuckets,
		}),
		reportOnly: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rekall_scope_report_only_total",
			Help: "Requests let pass in report-only mode that scope rules would have refused.",
		}, []string{"outcome"}),
		upstreamErrors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rekall_upstream_errors_total",
			Help: "Allowed requests that no backend answered: it could not be reached, or not in time, or the connection to it broke.",
		}, []string{"environment", "reason"}),
		keysErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rekall_keys_errors_total",
			Help: "Requests to manage keys, by API or dashboard, that failed because the database of rekall_keys did: they were answered 503.",
		}),
	}
	for outcome := range m.decisions {
		for environment := range m.decisions[outcome] {
			m.decisions[outcome][environment] = decisions.WithLabelValues(
				apikey.Outcome(outcome).String(), apikey.Environment(environment).String())
		}
	}
	for _, outcome := range []apikey.Outcome{apikey.NotCovered, apikey.Insufficient} { // from 0, or the first ones are no increase
		m.reportOnly.WithLabelValues(outcome.String())
	}
	for _, environment := range []apikey.Environment{apikey.Production, apikey.Sandbox} {
		for _, reason := range []string{upstreamUnavailableReason, upstreamTimeoutReason} {
			m.upstreamErrors.WithLabelValues(environment.String(), reason)
		}
	}
	limited := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rekall_rate_limited_total",
		Help: "Requests beyond a limit: the rate of their key, its number of requests at a time, or what an address may send without a good key.",
	}, []string{"limit"})
	for kind, name := range limitNames {
		m.limited[kind] = limited.WithLabelValues(name)
	}
	m.collectors = []prometheus.Collector{decisions, m.latencies, m.revocationDelay, m.reportOnly, m.upstreamErrors, limited, m.keysErrors}
	return m
}

// watch adds what is read from the runtime's parts at each scrape.
func (m *metrics) watch(rt *runtime) {
	m.collectors = append(m.collectors, &observer{rt})
}

func (m *metrics) register(registry *prometheus.Registry) error {
	for _, c := range m.collectors {
		if err := registry.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

// instant is a moment by the monotonic clock alone, which takes half the time and a third of the memory of time.Now.
type instant time.Duration

var processStart = time.Now()

func now() instant { return instant(time.Since(processStart)) }

func (i instant) since() time.Duration { return time.Since(processStart) - time.Duration(i) }

// sampleStart returns the instant of one request in latencyShare, and 0 for the others.
func sampleStart() instant {
	if rand.Uint32()%latencyShare != 0 {
		return 0
	}
	return now()
}

// latency measures a decision that is made now. startedAt is sampleStart's.
func (m *metrics) latency(startedAt instant) {
	if startedAt != 0 {
		m.latencies.Observe(startedAt.since().Seconds())
	}
}

func (m *metrics) revoked(delay time.Duration) { m.revocationDelay.Observe(delay.Seconds()) }

// observer collects what the runtime's parts say of themselves, all of it read at one moment.
type observer struct{ rt *runtime }

// observation is that moment.
type observation struct {
	keycache.Status
	usage   usage.Status
	limits  ratelimit.Status
	canSign bool
}

// series is a metric that is one number of an observation.
type series struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*observation) float64
}

func gauge(name, help string, value func(*observation) float64) series {
	return series{prometheus.NewDesc(name, help, nil, nil), prometheus.GaugeValue, value}
}

func counter(name, help string, value func(*observation) uint64) series {
	return series{prometheus.NewDesc(name, help, nil, nil), prometheus.CounterValue,
		func(o *observation) float64 { return float64(value(o)) }}
}

func truth(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

var observed = []series{
	gauge("rekall_keys_trusted", "1 while cached keys are trusted; 0 once the last good sync is older than max_staleness: fail-closed.",
		func(o *observation) float64 { return truth(o.Fresh) }),
	gauge("rekall_identity_token_ready", "1 while identity tokens can be signed, or none are asked for; 0: good keys are answered 503.",
		func(o *observation) float64 { return truth(o.canSign) }),
	gauge("rekall_sync_age_seconds", "Time since the start of the last good sync, or of the process until the first; key data is refused beyond max_staleness.",
		func(o *observation) float64 { return o.Age.Seconds() }),
	gauge("rekall_sync_lag_seconds", "How old the newest report of this edge was in the standby when it was last read: the data is proved no fresher. "+
		"Reports are up to 5 s apart, which is no lag. 0 unless a standby is read.",
		func(o *observation) float64 { return o.Lag.Seconds() }),
	gauge("rekall_max_staleness_seconds", "The sync age beyond which no cached key is trusted, as configured.",
		func(o *observation) float64 { return o.MaxStaleness.Seconds() }),
	counter("rekall_syncs_total", "Reads of the change feed.", func(o *observation) uint64 { return o.Syncs }),
	counter("rekall_sync_errors_total", "Reads of the change feed that failed.", func(o *observation) uint64 { return o.SyncErrors }),
	counter("rekall_sync_restarts_total", "Times the change feed started over, the first included: after a restart, a crash or a failover of Postgres.",
		func(o *observation) uint64 { return o.Restarts }),
	counter("rekall_listen_connections_total", "LISTEN connections made to Postgres; each after the first is a reconnect.",
		func(o *observation) uint64 { return o.Listens }),
	counter("rekall_listen_errors_total", "Lost or refused LISTEN connections.", func(o *observation) uint64 { return o.ListenErrors }),
	gauge("rekall_canary_revocation_seconds", "How long the last canary stayed allowed here after its revocation; 0: none yet, or it was never allowed.",
		func(o *observation) float64 { return o.Canary.Seconds() }),

	gauge("rekall_cache_keys", "Keys in memory.", func(o *observation) float64 { return float64(o.Keys) }),
	gauge("rekall_cache_size_keys", "Keys that memory holds at most, as configured.", func(o *observation) float64 { return float64(o.Size) }),
	counter("rekall_cache_hits_total", "Keys answered from memory.", func(o *observation) uint64 { return o.Hits }),
	counter("rekall_cache_misses_total", "Keys that memory had no answer for: Postgres was asked, or the change feed proved that there is no such key.",
		func(o *observation) uint64 { return o.Misses }),
	counter("rekall_cache_evictions_total", "Keys that left memory in favour of others.", func(o *observation) uint64 { return o.Evictions }),
	counter("rekall_cache_drops_total", "Keys that were not taken into memory: it was busy, or others are used more.",
		func(o *observation) uint64 { return o.Drops }),
	counter("rekall_lookups_total", "Lookup statements sent to Postgres.", func(o *observation) uint64 { return o.Lookups }),
	counter("rekall_lookup_errors_total", "Lookup statements that failed.", func(o *observation) uint64 { return o.LookupErrors }),
	gauge("rekall_filter_keys", "Keys in the filter of all keys; 0 until it is built.", func(o *observation) float64 { return float64(o.FilterKeys) }),
	counter("rekall_unknown_keys_proved_total", "Unknown keys that the change feed proved to be unknown, without a lookup.",
		func(o *observation) uint64 { return o.Proofs }),
	counter("rekall_unknown_keys_refused_total", "Requests answered 503 because too many unknown keys waited for proof.",
		func(o *observation) uint64 { return o.Refused }),

	gauge("rekall_requests_in_flight", "Requests and streams that would be cut if their key ended.",
		func(o *observation) float64 { return float64(o.InFlight) }),
	counter("rekall_requests_cut_total", "Requests in flight cut because their key ended.", func(o *observation) uint64 { return o.Cut }),

	gauge("rekall_usage_buffered", "Keys and hours whose counts wait to be added up in Postgres.",
		func(o *observation) float64 { return float64(o.usage.Buffered) }),
	gauge("rekall_usage_buffer_size", "Keys and hours whose counts can wait; beyond it further ones are dropped.",
		func(o *observation) float64 { return float64(o.usage.MaxBuffered) }),
	counter("rekall_usage_flushed_total", "Requests whose count was added up in Postgres.", func(o *observation) uint64 { return o.usage.Flushed }),
	counter("rekall_usage_flush_errors_total", "Flushes of usage that failed; each is repeated.",
		func(o *observation) uint64 { return o.usage.FlushErrors }),
	counter("rekall_usage_dropped_total", "Requests that are missing in the usage of their key, since the buffer was full.",
		func(o *observation) uint64 { return o.usage.Dropped }),
	counter("rekall_usage_spikes_total", "Hours in which a key was used far more than before, as far as this edge told of them.",
		func(o *observation) uint64 { return o.usage.Spikes }),

	gauge("rekall_rate_limit_keys", "Keys whose requests are remembered for their limits.", func(o *observation) float64 { return float64(o.limits.Keys) }),
	gauge("rekall_rate_limit_fallback", "1 while this edge holds keys to its part of their limits, because rate_limit_store does not answer.",
		func(o *observation) float64 { return truth(o.limits.Fallback) }),
	counter("rekall_rate_limit_store_outages_total", "Times that rate_limit_store did not answer.", func(o *observation) uint64 { return o.limits.Outages }),
	counter("rekall_rate_limit_store_exchanges_total", "Round trips to rate_limit_store, each for many keys at once.",
		func(o *observation) uint64 { return o.limits.Exchanges }),
}

// edgesDesc is of all edges, not only of this one: it tells of an edge that nobody scrapes any longer.
var edgesDesc = prometheus.NewDesc("rekall_edges",
	"Edges in Postgres's list when this edge last counted them, live or fail-closed: their last reported sync is older than their max_staleness. "+
		"Absent if it could not report and count them within the last minute.",
	[]string{"status"}, nil)

// canaryDesc is of edges that send canaries: at others nobody expects any.
var canaryDesc = prometheus.NewDesc("rekall_canary_timestamp_seconds",
	"When the last canary was refused here, or the process started; only with canary.", nil, nil)

var choreDesc = prometheus.NewDesc("rekall_chore_age_seconds",
	"How long ago this edge did what one edge of all does now and then, or began; the least of all edges is how long nobody has.",
	[]string{"chore"}, nil)

// Describe implements prometheus.Collector.
func (*observer) Describe(descs chan<- *prometheus.Desc) {
	for _, s := range observed {
		descs <- s.desc
	}
	descs <- edgesDesc
	descs <- canaryDesc
	descs <- choreDesc
}

// Collect implements prometheus.Collector.
func (w *observer) Collect(collected chan<- prometheus.Metric) {
	o := &observation{
		Status: w.rt.cache.Status(), usage: w.rt.usage.Status(), limits: w.rt.limiter.Status(), canSign: canSign(*w.rt.issuers.Load()),
	}
	o.InFlight, o.Cut = allRequests()
	for _, s := range observed {
		collected <- prometheus.MustNewConstMetric(s.desc, s.kind, s.value(o))
	}
	if w.rt.canary != nil {
		collected <- prometheus.MustNewConstMetric(canaryDesc, prometheus.GaugeValue, float64(o.CanaryAt.UnixMilli())/1000)
	}
	ages := w.rt.usage.ChoreAges()
	ages["forget edges"] = w.rt.reporter.ForgetAge()
	for chore, age := range ages {
		collected <- prometheus.MustNewConstMetric(choreDesc, prometheus.GaugeValue, age.Seconds(), chore)
	}
	edges, holds := w.rt.reporter.Edges()
	if !holds {
		return
	}
	collected <- prometheus.MustNewConstMetric(edgesDesc, prometheus.GaugeValue, float64(edges.Live), "live")
	collected <- prometheus.MustNewConstMetric(edgesDesc, prometheus.GaugeValue, float64(edges.FailClosed), "fail-closed")
}

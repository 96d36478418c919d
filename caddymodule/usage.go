package caddymodule

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rekall-ai/gateway/internal/usage"
)

// usageCollectors are the metrics of counting what keys are used for.
func usageCollectors(counter *usage.Counter) []prometheus.Collector {
	total := func(name, help string, value func(usage.Status) uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help},
			func() float64 { return float64(value(counter.Status())) })
	}
	return []prometheus.Collector{
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "rekall_usage_buffered", Help: "Keys and hours whose counts wait to be added up in Postgres.",
		}, func() float64 { return float64(counter.Status().Buffered) }),
		total("rekall_usage_flushed_total", "Requests whose count was added up in Postgres.",
			func(s usage.Status) uint64 { return s.Flushed }),
		total("rekall_usage_flush_errors_total", "Flushes of usage that failed; each is repeated.",
			func(s usage.Status) uint64 { return s.FlushErrors }),
		total("rekall_usage_dropped_total", "Requests that are missing in the usage of their key, since the buffer was full.",
			func(s usage.Status) uint64 { return s.Dropped }),
		total("rekall_usage_spikes_total", "Hours in which a key was used far more than before, as far as this edge told of them.",
			func(s usage.Status) uint64 { return s.Spikes }),
	}
}

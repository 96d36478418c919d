// Package monitoring tests what the gateway ships for Prometheus and Grafana: the metrics, the alert rules, the dashboard and the
// runbook beside them, with Debian's Prometheus and real faults.
package monitoring

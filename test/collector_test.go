package test

import (
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/test/process"
)

// collector receives traces as an OpenTelemetry collector does: OTLP in protocol buffers over HTTP.
type collector struct {
	server *httptest.Server
	// spans are the bytes of all that was received. Text stands in a protocol buffer as it is.
	spans process.Log
}

func newCollector(t *testing.T) *collector {
	t.Helper()
	c := new(collector)
	c.server = httptest.NewServer(c)
	t.Cleanup(c.server.Close)
	return c
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		unpacked, err := gzip.NewReader(body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		body = unpacked
	}
	content, err := io.ReadAll(body)
	if err != nil || r.URL.Path != "/v1/traces" {
		http.Error(w, "not a trace", http.StatusBadRequest)
		return
	}
	_, _ = c.spans.Write(content)                            // never fails
	w.Header().Set("Content-Type", "application/x-protobuf") // an empty answer says that all was taken
}

// env makes a process export its traces here.
func (c *collector) env() []string {
	return []string{
		"OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT=" + c.server.URL,
		"OTEL_EXPORTER_OTLP_COMPRESSION=gzip", "OTEL_PROPAGATORS=tracecontext,baggage", "OTEL_BSP_MAX_QUEUE_SIZE=65536",
	}
}

// wantSpans wants spans of each of these names.
func (c *collector) wantSpans(t *testing.T, names ...string) string {
	t.Helper()
	spans := c.spans.String()
	for _, name := range names {
		if n := strings.Count(spans, "span of "+name); n == 0 {
			t.Errorf("no span of %s was exported", name)
		}
	}
	return spans
}

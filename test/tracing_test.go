package test

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

const tracedSite = `
http://:PORT {
	bind 127.0.0.1
	tracing {
		span request
	}
	rekall_gateway {
		production {
			reverse_proxy PRODUCTION
		}
	}
}
`

// traced are the spans of one request.
type traced struct {
	request *tracepb.Span
	lookups []*tracepb.Span
}

// requests returns what a collector received, by the id of the request.
func (c *collector) requests(t *testing.T) map[string]*traced {
	t.Helper()
	// Exports that follow each other are one message: repeated fields add up. Its field is that of a request to export.
	var data tracepb.TracesData
	if err := proto.Unmarshal([]byte(c.spans.String()), &data); err != nil {
		t.Fatal(err)
	}
	found := map[string]*traced{}
	var lookups []*tracepb.Span
	for _, resource := range data.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			for _, span := range scope.Spans {
				if span.Name == "rekall lookup" {
					lookups = append(lookups, span)
				} else if id := attributes(span)["rekall.request_id"]; id != "" {
					found[id] = &traced{request: span}
				}
			}
		}
	}
	for _, lookup := range lookups {
		parents := 0
		for _, one := range found {
			if bytes.Equal(one.request.SpanId, lookup.ParentSpanId) && bytes.Equal(one.request.TraceId, lookup.TraceId) {
				one.lookups = append(one.lookups, lookup)
				parents++
			}
		}
		if parents != 1 {
			t.Errorf("a lookup's span belongs to %d requests", parents)
		}
	}
	return found
}

// attributes are those of ours.
func attributes(span *tracepb.Span) map[string]string {
	ours := map[string]string{}
	for _, attribute := range span.Attributes {
		if name, ok := bytes.CutPrefix([]byte(attribute.Key), []byte("rekall.")); ok {
			ours["rekall."+string(name)] = attribute.Value.GetStringValue()
		}
	}
	return ours
}

// ownLookups are what the lookups of one request say of themselves.
func (one *traced) ownLookups() (told []map[string]string) {
	for _, span := range one.lookups {
		told = append(told, attributes(span))
	}
	return told
}

func TestTraceTellsTheDecisionAndTheWaitForPostgresAndNoKey(t *testing.T) {
	t.Parallel()
	r, traces := newRig(t), newCollector(t)
	good, revoked := r.key("production", "memories:read"), r.key("production", "memories:read")
	r.revoke(revoked.ID)
	g := r.prepare(tracedSite)
	g.env = traces.env()
	g.run(r.database)
	g.waitReady()
	unknown := apikey.Generate(apikey.Production)
	requestID := func(method, path string, header http.Header) string {
		return g.do(method, path, header).Header.Get("X-Request-Id")
	}
	cold := requestID("GET", "/v1/memories", bearer(good))
	warm := ""
	eventually.True(t, "the key is answered from memory", func() bool {
		before := g.status().Lookups
		warm = requestID("GET", "/v1/memories", bearer(good))
		return g.status().Lookups == before
	})
	insufficient := requestID("DELETE", "/v1/memories/1", bearer(good))
	refused := requestID("GET", "/v1/memories", bearer(revoked))
	absent := requestID("GET", "/v1/memories", http.Header{"X-Api-Key": {unknown}})
	missing := requestID("GET", "/v1/memories", nil)
	g.process.Stop(g.t) // which exports the last spans

	type told = map[string]string
	of := func(key keyadmin.Key, decision, reason string) told {
		return told{"rekall.key_id": key.ID, "rekall.account": "acme", "rekall.environment": "production", "rekall.decision": decision, "rekall.reason": reason}
	}
	allowed := of(good, "allowed", "")
	delete(allowed, "rekall.reason")
	found := traces.requests(t)
	lookup := []map[string]string{{"rekall.lookup.source": "postgres", "rekall.lookup.outcome": "found"}}
	for name, tc := range map[string]struct {
		id      string
		request told
		lookups []map[string]string
	}{
		"cold":         {cold, allowed, lookup},
		"warm":         {warm, allowed, nil},
		"insufficient": {insufficient, of(good, "scope_insufficient", "SCOPE_INSUFFICIENT"), nil},
		"revoked":      {refused, of(revoked, "revoked", "API_KEY_REVOKED"), lookup},
		"unknown": {absent, told{"rekall.environment": "production", "rekall.decision": "unknown", "rekall.reason": "API_KEY_INVALID"},
			[]map[string]string{{"rekall.lookup.source": "postgres", "rekall.lookup.outcome": "unknown"}}},
		"missing": {missing, told{"rekall.environment": "none", "rekall.decision": "missing", "rekall.reason": "API_KEY_MISSING"}, nil},
	} {
		one := found[tc.id]
		if one == nil {
			t.Errorf("%s: no span of request %q was exported", name, tc.id)
			continue
		}
		tc.request["rekall.request_id"] = tc.id
		if diff := cmp.Diff(tc.request, attributes(one.request)); diff != "" {
			t.Errorf("%s: request (-want +got)\n%s", name, diff)
		}
		if diff := cmp.Diff(tc.lookups, one.ownLookups()); diff != "" {
			t.Errorf("%s: lookups (-want +got)\n%s", name, diff)
		}
		for _, span := range one.lookups {
			if span.StartTimeUnixNano < one.request.StartTimeUnixNano || span.EndTimeUnixNano > one.request.EndTimeUnixNano {
				t.Errorf("%s: the lookup is not within its request", name)
			}
		}
	}
	var hidden canaries
	for _, key := range []string{good.Key.Reveal(), revoked.Key.Reveal(), unknown} {
		hidden.addKey("key", key)
	}
	hidden.want(t, "traces", traces.spans.String())
}

func TestTraceOfALookupThatFailedSaysSo(t *testing.T) {
	t.Parallel()
	r, traces := newRig(t), newCollector(t)
	g := r.prepare(tracedSite)
	g.env = traces.env()
	g.run("postgres://nobody@127.0.0.1:1/none?connect_timeout=1")
	var answer reply
	eventually.True(t, "the gateway serves", func() bool {
		var err error
		answer, err = send("GET", g.http+"/v1/memories", bearer(r.key("production", "memories:read")), nil)
		return err == nil
	})
	answer.wantCode(t, 503, "AUTH_UNAVAILABLE")
	g.process.Stop(g.t)
	one := traces.requests(t)[answer.Header.Get("X-Request-Id")]
	if one == nil || len(one.lookups) != 1 {
		t.Fatalf("spans of the request: %+v", one)
	}
	want := []map[string]string{{"rekall.lookup.source": "postgres", "rekall.lookup.outcome": "unavailable"}}
	if diff := cmp.Diff(want, one.ownLookups()); diff != "" {
		t.Errorf("lookups (-want +got)\n%s", diff)
	}
	if status := one.lookups[0].Status.GetCode(); status != tracepb.Status_STATUS_CODE_ERROR {
		t.Errorf("the lookup's status is %s", status)
	}
}

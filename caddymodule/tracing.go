package caddymodule

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keycache"
)

// tracerName is the instrumentation scope of our spans.
const tracerName = "github.com/rekall-ai/gateway/caddymodule"

// find asks the cache. In a request that is traced, the wait for Postgres is a span of its own; an answer from memory is
// none. Without tracing the span is one that does nothing.
func find(ctx context.Context, request trace.Span, cache keySource, d apikey.Digest) (keycache.Found, error) {
	if !request.IsRecording() {
		return cache.Find(ctx, d)
	}
	startedAt := time.Now()
	found, err := cache.Find(ctx, d)
	if found.Source != keycache.Memory { // which only the answer tells, an error's too
		traceLookup(ctx, request, startedAt, found, err)
	}
	return found, err
}

func traceLookup(ctx context.Context, request trace.Span, startedAt time.Time, found keycache.Found, err error) {
	_, span := request.TracerProvider().Tracer(tracerName).Start(ctx, "rekall lookup", trace.WithTimestamp(startedAt))
	defer span.End()
	outcome := "found"
	switch {
	case err != nil:
		outcome = "unavailable"
		span.SetStatus(codes.Error, err.Error())
	case found.Record == nil:
		outcome = "unknown"
	}
	span.SetAttributes(
		attribute.Stringer("rekall.lookup.source", found.Source), attribute.String("rekall.lookup.outcome", outcome))
}

// traceDecision says on the request's span what was decided, and why.
func (x *exchange) traceDecision(request trace.Span) {
	if !request.IsRecording() {
		return
	}
	request.SetAttributes(
		attribute.String("rekall.request_id", x.requestID),
		attribute.Stringer("rekall.environment", x.environment),
		attribute.Stringer("rekall.decision", x.outcome))
	if x.record != nil {
		request.SetAttributes(
			attribute.String("rekall.key_id", x.record.ID), attribute.String("rekall.account", x.record.Account))
	}
	if x.reason != nil {
		request.SetAttributes(attribute.String("rekall.reason", x.reason.Code))
	}
}

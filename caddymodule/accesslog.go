package caddymodule

import (
	"context"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// logField is the object in each line of the access log that says what we made of the request.
const logField = "rekall"

// hasAccessLog reports whether the server in which a handler is being provisioned keeps one. Where it does not, requests
// are spared the field.
func hasAccessLog(ctx caddy.Context) bool {
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	return ok && server.Logs != nil
}

// logsCredentials reports whether the server has log_credentials.
func logsCredentials(ctx caddy.Context) bool {
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	return ok && server.Logs != nil && server.Logs.ShouldLogCredentials
}

// logLater puts an object into the request's line of the access log. It is encoded when the line is written, after the
// answer: what is found out until then stands in it.
func logLater(ctx context.Context, object zapcore.ObjectMarshaler) {
	if extra, ok := ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Set(zap.Object(logField, object))
	}
}

// MarshalLogObject says what was decided, and why.
func (x *exchange) MarshalLogObject(to zapcore.ObjectEncoder) error {
	to.AddString("request_id", x.requestID)
	if x.record != nil {
		to.AddString("key_id", x.record.ID)
		to.AddString("account", x.record.Account)
	}
	to.AddString("environment", x.environment.String())
	to.AddString("decision", x.outcome.String())
	if x.outcome == apikey.RateLimited {
		kind := addressLimit // before any key is found
		if x.record != nil {
			kind = x.allowance.kind()
		}
		to.AddString("limit", limitNames[kind])
	}
	if x.reason != nil {
		to.AddString("reason", x.reason.Code)
	}
	return nil
}

// refused is what is logged of a refusal that no decision on a key led to.
type refused struct{ requestID, reason string }

// MarshalLogObject says which request was refused, and why.
func (r refused) MarshalLogObject(to zapcore.ObjectEncoder) error {
	to.AddString("request_id", r.requestID)
	to.AddString("reason", r.reason)
	return nil
}

var (
	_ zapcore.ObjectMarshaler = (*exchange)(nil)
	_ zapcore.ObjectMarshaler = refused{}
)

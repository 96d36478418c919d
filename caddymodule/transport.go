package caddymodule

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
)

func init() { caddy.RegisterModule(Transport{}) }

// Transport is reverse_proxy's HTTP transport for backends that only requests allowed by a gateway may reach. It refuses
// every other request with 403, wherever the proxy stands, and does not contact the backend for it. Active health checks
// pass.
//
// It keeps a proxy safe that is one day copied out of its rekall_gateway. It takes all options of the transport "http",
// except that keepalive_idle_conns_per_host defaults to 512, and is configured like it:
//
//	reverse_proxy prod-1:8080 prod-2:8080 {
//		transport rekall production {
//			response_header_timeout 30s
//		}
//	}
type Transport struct {
	reverseproxy.HTTPTransport

	// The environment of the backends: production or sandbox. Required.
	Environment string `json:"environment"`

	environment apikey.Environment
	logger      *zap.Logger
	debug       bool // whether the log shows requests in full
}

// CaddyModule returns the Caddy module information.
func (Transport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.reverse_proxy.transport.rekall", New: func() caddy.Module { return new(Transport) }}
}

// Provision sets up the HTTP transport.
func (t *Transport) Provision(ctx caddy.Context) error {
	t.logger = ctx.Logger()
	t.debug = t.logger.Core().Enabled(zap.DebugLevel)
	var err error
	if t.environment, err = apikey.ParseEnvironment(t.Environment); err != nil {
		return fmt.Errorf("transport rekall: %w", err)
	}
	if t.KeepAlive == nil {
		t.KeepAlive = new(reverseproxy.KeepAlive)
	}
	if t.KeepAlive.MaxIdleConnsPerHost == 0 {
		t.KeepAlive.MaxIdleConnsPerHost = idleConnsPerHost
	}
	return t.HTTPTransport.Provision(ctx)
}

// idleConnsPerHost is how many idle connections are kept to each backend unless the configuration says otherwise. With the
// 32 of the transport "http" a busy edge dials again and again, a tenth of its time.
const idleConnsPerHost = 512

// UnmarshalCaddyfile reads the transport:
//
//	transport rekall production|sandbox {
//		<options of the transport "http"...>
//	}
func (t *Transport) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&t.Environment) {
		return d.Err("transport rekall takes one argument: production or sandbox")
	}
	if _, err := apikey.ParseEnvironment(t.Environment); err != nil {
		return d.WrapErr(err)
	}
	// The environment stands where the HTTP transport expects its own name.
	return t.HTTPTransport.UnmarshalCaddyfile(d.NewFromNextSegment())
}

// RoundTrip sends a request that the gateway allowed for this environment, or a health check, and answers all others
// itself.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	d, decided := r.Context().Value(decisionKey{}).(*decision)
	switch {
	case decided && d.environment == t.environment:
		return t.roundTrip(r)
	case isHealthCheck(r):
		return t.HTTPTransport.RoundTrip(r)
	case decided:
		return t.refuse(r, answers[apikey.Mismatch], r.Header.Get("X-Request-Id")), nil // which the gateway set
	}
	return t.refuse(r, gatewayRequired, newRequestID()), nil
}

// roundTrip sends a request, and leaves a bare one for the proxy's debug log: the proxy encodes the request for each answer,
// whether or not that log is on, which takes more time than the whole decision. Net/http may still be writing the request
// when it returns, so it gets one of its own. What the proxy reads in the headers of a request that was answered stays: those
// of an upgrade or a stream of HTTP/2, and those of an answer that may be tried again.
func (t *Transport) roundTrip(r *http.Request) (*http.Response, error) {
	if t.debug {
		return t.HTTPTransport.RoundTrip(r)
	}
	res, err := t.HTTPTransport.RoundTrip(r.WithContext(r.Context()))
	if err == nil && res.StatusCode/100 == 2 && res.ProtoMajor == 1 {
		r.Header, r.TLS = nil, nil
	}
	return res, err
}

var gatewayRequired = newAnswer(http.StatusForbidden, "GATEWAY_REQUIRED", "This resource is not served here.", "")

// isHealthCheck recognises the proxy's active health checks: every request of a client has variables.
func isHealthCheck(r *http.Request) bool { return r.Context().Value(caddyhttp.VarsCtxKey) == nil }

// refuse answers in the backend's place. It is no error: the proxy would count that against the backend, and with passive
// health checks anybody could take it away from those who may use it.
func (t *Transport) refuse(r *http.Request, a answer, requestID string) *http.Response {
	if r.Body != nil {
		_ = r.Body.Close() // a RoundTripper's duty
	}
	logLater(r.Context(), refused{requestID, a.code})
	t.logger.Error("refused a request that no rekall_gateway allowed for this environment; move its reverse_proxy into one",
		zap.String("request_id", requestID), zap.Stringer("environment", t.environment))
	answer := refusal{header: http.Header{}}
	a.write(&answer, requestID, nil)
	return &http.Response{
		Status:     strconv.Itoa(a.status) + " " + http.StatusText(a.status),
		StatusCode: a.status,
		Proto:      "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header:        answer.header,
		Body:          io.NopCloser(&answer.body),
		ContentLength: int64(answer.body.Len()),
		Request:       r,
	}
}

// refusal keeps an answer that is written to it.
type refusal struct {
	header http.Header
	body   bytes.Buffer
}

func (r *refusal) Header() http.Header         { return r.header }
func (r *refusal) WriteHeader(int)             {}
func (r *refusal) Write(p []byte) (int, error) { return r.body.Write(p) }

// decision is the context of a request that the gateway allowed.
type decision struct {
	context.Context
	environment apikey.Environment
}

type decisionKey struct{}

func (d *decision) Value(key any) any {
	if key == (decisionKey{}) {
		return d
	}
	return d.Context.Value(key)
}

var (
	_ caddy.Provisioner                                = (*Transport)(nil)
	_ caddy.CleanerUpper                               = (*Transport)(nil)
	_ caddyfile.Unmarshaler                            = (*Transport)(nil)
	_ http.RoundTripper                                = (*Transport)(nil)
	_ reverseproxy.TLSTransport                        = (*Transport)(nil)
	_ reverseproxy.H2CTransport                        = (*Transport)(nil)
	_ reverseproxy.HealthCheckSchemeOverriderTransport = (*Transport)(nil)
	_ reverseproxy.ProxyProtocolTransport              = (*Transport)(nil)
	_ reverseproxy.RequestHeaderOpsTransport           = (*Transport)(nil)
)

package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
)

func init() { caddy.RegisterModule(Transport{}) }

// Transport is reverse_proxy's HTTP transport for backends that only requests allowed by a gateway may reach. It refuses
// every other request with 403, wherever the proxy stands, and does not contact the backend for it. Active health checks
// pass.
//
// It keeps a proxy safe that is one day copied out of its rekall_gateway. Proxies in a rekall_gateway's blocks have it in place
// of "http".
//
// What a client can bring about does not count against the backend in passive health checks, and is not tried again: how an
// upgrade fails, a header that cannot be sent or is longer than most servers take, or a request whose body is being passed on.
// That a backend cannot be dialled, or does not answer in time once it has the whole request (response_header_timeout), counts
// always. The proxy's unhealthy_latency and unhealthy_request_count do count slow uploads and streams of clients: leave them out.
//
// To backends that speak HTTP/2, requests with more than 8,000 bytes in one header or in the target, 14,000 in all, or 92 headers beside
// Host are not sent: they are answered 431, since common servers break off all other requests of the connection for them.
//
// It takes all options of the transport "http", except that keepalive_idle_conns_per_host defaults to 512, and is configured
// like it:
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
	debug       bool     // whether the log shows requests in full
	strangers   *trouble // requests that no gateway allowed

	cannotUpgrade bool // with h2c or HTTP/3 net/http refuses an upgrade: an error, which would count against the backend
	http2         bool // to backends with TLS that speak it
}

// CaddyModule returns the Caddy module information.
func (Transport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.reverse_proxy.transport.rekall", New: func() caddy.Module { return new(Transport) }}
}

// Provision sets up the HTTP transport.
func (t *Transport) Provision(ctx caddy.Context) error {
	t.logger, t.strangers = ctx.Logger(), new(trouble)
	t.debug = t.logger.Core().Enabled(zap.DebugLevel)
	var err error
	if t.environment, err = apikey.ParseEnvironment(t.Environment); err != nil {
		return err
	}
	if t.KeepAlive == nil {
		t.KeepAlive = new(reverseproxy.KeepAlive)
	}
	if t.KeepAlive.MaxIdleConnsPerHost == 0 {
		t.KeepAlive.MaxIdleConnsPerHost = idleConnsPerHost
	}
	t.cannotUpgrade = slices.Contains(t.Versions, "h2c") || slices.Contains(t.Versions, "3")
	t.http2 = len(t.Versions) == 0 || slices.Contains(t.Versions, "2")
	if err := t.HTTPTransport.Provision(ctx); err != nil {
		return err
	}
	t.Transport.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: maxUnread}
	return nil
}

// maxUnread is how much of an answer over HTTP/2 waits in memory for a client that does not read it. With net/http's 4 MiB a customer with
// 100 of them held 400 MB. It is also what a backend may send before it hears that more may come: with less, a large answer from a backend
// that is 80 ms away would take longer than at 12 MB/s. Over HTTP/1 it is what the buffers of the connection take.
const maxUnread = 1 << 20

// idleConnsPerHost is how many idle connections are kept to each backend unless the configuration says otherwise. With the
// 32 of the transport "http" a busy edge dials again and again, a tenth of its time.
const idleConnsPerHost = 512

// untilTheKeyEnds is how long a WebSocket may outlive the configuration that it was opened with: a hundred years.
const untilTheKeyEnds = "876000h"

// setTransport replaces the transport "http" of each proxy in a block, which is also the default, by "rekall". And it lets
// WebSockets outlive a reload, as event streams do: Caddy closes those of a proxy without a stream_close_delay with its
// configuration. It edits the JSON, since the health checks and the requests of a loaded proxy read its fields.
func setTransport(config any, environment apikey.Environment) {
	for object := range objectsIn(config) {
		if object["handler"] != "reverse_proxy" {
			continue
		}
		if object["stream_close_delay"] == nil {
			object["stream_close_delay"] = untilTheKeyEnds
		}
		if object["transport"] == nil {
			object["transport"] = map[string]any{"protocol": "http"}
		}
		if transport, ok := object["transport"].(map[string]any); ok && transport["protocol"] == "http" {
			transport["protocol"], transport["environment"] = "rekall", environment.String()
		}
	}
}

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
	p, allowed := r.Context().Value(passKey{}).(*pass)
	switch {
	case allowed && p.environment == t.environment:
		return t.roundTrip(r, p)
	case isHealthCheck(r):
		return t.HTTPTransport.RoundTrip(r)
	case allowed:
		return t.refuse(r, apierror.Of(apikey.Mismatch), r.Header.Get("X-Request-Id")), nil // which the gateway set
	}
	return t.refuse(r, gatewayRequired, apierror.NewRequestID()), nil
}

// roundTrip sends a request and then strips it: the proxy encodes it for its debug log at each answer, whether or not that log is
// on, which takes longer than the whole decision. Net/http may still be writing the request when it returns, so it gets a copy.
// Headers that the proxy reads after the answer stay: those of an upgrade or an HTTP/2 stream, and of an answer that may be tried
// again.
func (t *Transport) roundTrip(r *http.Request, p *pass) (*http.Response, error) {
	if t.cannotUpgrade && r.Header["Upgrade"] != nil {
		delete(r.Header, "Connection")
		delete(r.Header, "Upgrade")
	}
	t.SetScheme(r) // which is empty until the request is sent
	if (t.cannotUpgrade || t.http2 && r.URL.Scheme == "https") && beyondMost(r) {
		if r.Body != nil {
			_ = r.Body.Close()
		}
		return nil, p.fail(&clientError{headersTooLarge, errBeyondHTTP2})
	}
	sent := r
	if !t.debug {
		sent = r.WithContext(r.Context())
	}
	p.asked = true
	res, err := t.HTTPTransport.RoundTrip(sent)
	if err == nil && !final(r, res) {
		_ = res.Body.Close()
		err = errNotFinal
	}
	if err != nil {
		return nil, p.excuse(r, err)
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		p.switched = true
	}
	switch {
	case t.debug || res.StatusCode/100 != 2:
	case res.ProtoMajor == 1:
		r.Header, r.TLS = nil, nil
	case r.Header[identityTokenHeader] != nil: // the proxy logs the request if the answer breaks off
		r.Header = maps.Clone(r.Header)
		delete(r.Header, identityTokenHeader)
	}
	return res, nil
}

var errNotFinal = errors.New("the backend gave no final answer: a status below 200, or a switch to a protocol that nobody asked for")

// final reports whether an answer can be passed on. Of a status below 100 or a switch of protocols, the proxy and net/http make a panic, or an
// empty 200: the client would take what failed for done.
func final(r *http.Request, res *http.Response) bool {
	if res.StatusCode == http.StatusSwitchingProtocols {
		_, switched := res.Body.(io.ReadWriteCloser)
		return switched && strings.EqualFold(r.Header.Get("Upgrade"), res.Header.Get("Upgrade"))
	}
	return res.StatusCode >= http.StatusOK
}

// excuse returns the error as the client's if it may be: then it does not count against the backend. A client can send a body so
// slowly that the connection's read_timeout or write_timeout passes, or one that makes the backend answer early and hang up:
// whether the answer or the broken pipe is seen first is chance.
func (p *pass) excuse(r *http.Request, err error) error {
	if _, dial := errors.AsType[reverseproxy.DialError](err); dial || errors.Is(err, context.Canceled) {
		return err
	}
	timeout, ok := errors.AsType[net.Error](err)
	late := ok && timeout.Timeout()
	failed := &clientError{upstreamUnavailable, err}
	if late {
		failed.answer = upstreamTimeout
	}
	switch {
	case strings.Contains(err.Error(), "larger than peer's advertised limit"): // net/http exports no error to compare with
		failed.answer = headersTooLarge
	case unsendable(r):
		failed.answer = headersInvalid
	case tooLarge(err): // a limit in the block, between the client's body and the proxy
		failed.answer = bodyTooLarge
	case late && !errors.Is(err, os.ErrDeadlineExceeded): // no deadline of a connection: the backend had all that it waits for
		return err
	case beyondMost(r): // the backend may have hung up in the midst of them
		failed.answer = headersTooLarge
	case r.Header["Upgrade"] == nil && !p.begun.Load(): // a backend that speaks only HTTP/2 fails at an upgrade
		return err
	}
	return p.fail(failed)
}

// unsendable reports whether net/http refuses to send a request, whichever the backend. What a client writes comes into headers by
// placeholders, such as a line break with {query.tenant} in header_up.
func unsendable(r *http.Request) bool {
	for name, values := range r.Header {
		if !httpguts.ValidHeaderFieldName(name) || slices.ContainsFunc(values, func(v string) bool { return !httpguts.ValidHeaderFieldValue(v) }) {
			return true
		}
	}
	host, err := httpguts.PunycodeHostPort(r.Host)
	return err != nil || !httpguts.ValidHostHeader(host)
}

// fail keeps the first error that the client's request made, for the answer.
func (p *pass) fail(failed *clientError) error {
	p.failed.CompareAndSwap(nil, failed)
	return failed
}

// Limits of a request's headers beyond which most servers break off. Over HTTP/2, where many requests share a connection, backends
// announce none, but beyond theirs nginx and HAProxy end the connection with all requests on it, and Node resets the stream. These
// are the least of the defaults of nginx's large_client_header_buffers, HAProxy's tune.bufsize less tune.maxrewrite and its
// tune.http.maxhdr, and Node's maxHeaderListPairs, with some room.
const (
	maxFieldBytes  = 8_000
	maxHeaderBytes = 14_000
	maxFields      = 96
)

var errBeyondHTTP2 = errors.New("headers are beyond what backends take over HTTP/2")

// beyondMost reports whether a request has more in its headers, of which its method, scheme, host and target are part.
func beyondMost(r *http.Request) bool {
	target := len(r.URL.EscapedPath()) + len("?") + len(r.URL.RawQuery)
	fields, total, longest := 4, target+max(len(r.Host), len(r.URL.Host)), target
	for name, values := range r.Header {
		for _, value := range values {
			fields++
			total += len(name) + len(value)
			longest = max(longest, len(name)+len(value))
		}
	}
	return fields > maxFields || total > maxHeaderBytes || longest > maxFieldBytes
}

var gatewayRequired = apierror.New(http.StatusForbidden, "GATEWAY_REQUIRED", "This resource is not served here.")

// isHealthCheck recognises the proxy's active health checks: every request of a client has variables.
func isHealthCheck(r *http.Request) bool { return r.Context().Value(caddyhttp.VarsCtxKey) == nil }

// refuse answers in the backend's place. It is no error: the proxy would count that against the backend, and with passive
// health checks anybody could take it away from those who may use it.
func (t *Transport) refuse(r *http.Request, e *apierror.Error, requestID string) *http.Response {
	if r.Body != nil {
		_ = r.Body.Close() // a RoundTripper's duty
	}
	logLater(r.Context(), refused{requestID, e.Code})
	level := zap.DebugLevel // anybody may send them, as many as they like
	t.strangers.over()
	if t.strangers.met() {
		level = zap.ErrorLevel
	}
	t.logger.Log(level, "refused a request that no rekall_gateway allowed for this environment; move its reverse_proxy into one",
		zap.String("request_id", requestID), zap.Stringer("environment", t.environment))
	answer := recorder{header: http.Header{}}
	e.Write(&answer, requestID)
	return &http.Response{
		Status:     strconv.Itoa(e.Status) + " " + http.StatusText(e.Status),
		StatusCode: e.Status,
		Proto:      "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header:        answer.header,
		Body:          io.NopCloser(&answer.body),
		ContentLength: int64(answer.body.Len()),
		Request:       r,
	}
}

// recorder keeps an answer that is written to it.
type recorder struct {
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(int)             {}
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

// pass is the context of a request that the gateway allowed, and its body.
type pass struct {
	context.Context
	body        io.ReadCloser               // of the client
	failed      atomic.Pointer[clientError] // the first error that the client caused, of whatever part of the request
	begun       atomic.Bool                 // to read the body, which is when there is a connection to the backend
	environment apikey.Environment
	asked       bool // a backend; neither this nor the next is ever taken back, which the goroutine that reads its answer could meet
	switched    bool // by its final answer
	withheld    bool // a part of the answer, after a cut
}

type passKey struct{}

func (p *pass) Value(key any) any {
	if key == (passKey{}) {
		return p
	}
	return p.Context.Value(key)
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

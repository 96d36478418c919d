package caddymodule

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keycache"
)

// exchange is one request and its answer. It is the response writer of the environment's handlers, so that it has the
// last word on the answer when the key ends half-way. Each request makes one: it fits into 512 bytes, which Go allocates faster
// than more.
type exchange struct {
	caddyhttp.ResponseWriterWrapper
	gateway   *Gateway
	requestID string
	record    *apikey.Record  // nil until found
	now       apikey.Time     // Postgres's clock when it was found
	startedAt instant         // 0: its latency is not sampled
	reason    *apierror.Error // that the gateway answered with; nil: none
	flight    keycache.Flight
	pass      pass                                                // once allowed
	cancel    context.CancelCauseFunc                             // of the pass's context, or of the connection's
	cutBy     atomic.Pointer[keycache.Cut]                        // once cut, nothing more is to be written
	values    [len(rateLimitHeaders) + firstRateLimitValue]string // of the headers that are set: one allocation with the exchange
	allowance allowance
	required  apikey.Scopes // what an Insufficient key lacks

	environment apikey.Environment // by the prefix of the key
	outcome     apikey.Outcome
	pending     bool // whether its address waits for its key to be looked up
	closing     bool // whether a cut is the end of the connection
	wroteHeader bool

	done bool
	mu   sync.Mutex // guards done
}

// Places in exchange.values. A header's value is never shared: handlers may change it where it stands.
const (
	keyIDValue = iota
	accountValue
	environmentValue
	scopesValue
	requestIDValue
	answeredIDValue
	cacheControlValue
	tokenValue // empty: none is asked for
	firstRateLimitValue
)

// Format keeps the digest of the key out of what a handler prints of its response writer, as in the value of a panic.
func (x *exchange) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, x.requestID) }

func (x *exchange) count() {
	x.gateway.metrics.decisions[x.outcome][x.environment].Inc()
	x.gateway.metrics.latency(x.startedAt)
	if x.record != nil {
		x.gateway.usage.Count(x.record, x.outcome, x.now.Time())
	}
}

// refuse answers what was decided, or that the address has caused too many such answers.
func (x *exchange) refuse(r *http.Request) error {
	if x.outcome == apikey.RateLimited {
		return x.refuseLimited()
	}
	if verdict := countRefusal(x.gateway.addresses, r, x.outcome); !verdict.Allowed {
		return x.refuseBeyond(addressLimit, addressLimited.Later(verdict.RetryAfter))
	}
	x.count()
	e := apierror.Of(x.outcome)
	if x.outcome == apikey.Insufficient {
		e = apierror.InsufficientScope(x.required)
	}
	x.answer(e)
	return nil
}

// answer answers in place of a backend: to the client's writer, since x's own sets the headers of a backend's answer.
func (x *exchange) answer(e *apierror.Error) {
	x.reason = e
	x.setLimitHeaders(x.Header())
	e.Write(x.ResponseWriter, x.requestID)
}

func (x *exchange) unavailable(r *http.Request, err error) error {
	x.outcome = unchecked(r)
	x.gateway.logger.Debug("key cannot be checked", zap.String("request_id", x.requestID), zap.Error(err))
	return x.refuse(r)
}

// unchecked is the outcome where a key could not be checked: Abandoned if the client hung up first. Clients can do that at will, so it must
// not count as the gateway's failure.
func unchecked(r *http.Request) apikey.Outcome {
	if r.Context().Err() != nil {
		return apikey.Abandoned
	}
	return apikey.Unavailable
}

// placeholder resolves what logs and other handlers may know of the decision.
func (x *exchange) placeholder(name string) (any, bool) {
	switch name {
	case "rekall.decision":
		return x.outcome.String(), true
	case "rekall.environment":
		return x.environment.String(), true
	case "http.auth.user.id", "rekall.key_id", "rekall.account", "rekall.scopes":
	default:
		return nil, false
	}
	if x.record == nil {
		return "", name != "http.auth.user.id"
	}
	switch name {
	case "rekall.account":
		return x.record.Account, true
	case "rekall.scopes":
		return x.record.Scopes.String(), true
	}
	return x.record.ID, true
}

// set sets a header that has one value, which is kept in the exchange.
func (x *exchange) set(h http.Header, name string, i int, value string) {
	x.values[i] = value
	h[name] = x.values[i : i+1 : i+1]
}

// cutGrace is how long a client that does not read may hold up the end of a request that was cut.
const cutGrace = time.Second

// Cut ends the request: it cancels the proxy's round trip, and later unblocks a write to a client that does not read.
func (x *exchange) Cut(cause *keycache.Cut) {
	x.cutBy.Store(cause)
	x.cancel(cause)
	time.AfterFunc(cutGrace, x.unblock)
}

// unblock ends a read or a write that began before the cut and that the client holds up: it sends no more of its upload, or does
// not read. The write deadline is set on the server's own writer: one of Caddy's wrappers keeps deadlines that no other goroutine
// may touch.
func (x *exchange) unblock() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.done { // the writer belongs to another request by now
		return
	}
	_ = http.NewResponseController(x.ResponseWriter).SetReadDeadline(time.Now())
	writer := x.ResponseWriter
	for {
		wrapper, ok := writer.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		writer = wrapper.Unwrap()
	}
	_ = http.NewResponseController(writer).SetWriteDeadline(time.Now()) // a hijacked connection is closed by its own
}

// end runs on every way out, panics included: a proxy panics when its answer is cut. A cut may hit even a request that is then
// found again and refused, and its timer must not touch the writer afterwards.
func (x *exchange) end(r *http.Request, request trace.Span) {
	x.allowance.release()
	x.lookedUp(r)
	if cut := x.cutBy.Load(); cut != nil { // else none can come: it is not tracked any longer
		x.mu.Lock()
		x.done = true
		x.mu.Unlock()
		// The server reads on until then. If it closed the connection at once, a client still writing would see a reset before its
		// answer.
		_ = http.NewResponseController(x.ResponseWriter).SetReadDeadline(time.Now().Add(cutGrace))
		x.outcome, x.reason = cut.Outcome, apierror.Of(cut.Outcome)
	}
	x.traceDecision(request)
}

// statusClientClosed is what Caddy's reverse proxy answers when the request's context is cancelled.
const statusClientClosed = 499

// WriteHeader passes the answer's header on, unless the request was cut, or failed through its client's fault, before there was an
// answer. Then the client gets the refusal, and nothing from a handler that ignores the request's context.
func (x *exchange) WriteHeader(status int) {
	if status == http.StatusSwitchingProtocols && x.pass.asked && !x.pass.switched { // over HTTP/2 it switches nothing, and the server would end the answer
		return
	}
	if status >= 200 && !x.wroteHeader {
		if cut := x.cutBy.Load(); cut != nil {
			clear(x.Header())
			x.refuseCut(cut, true)
			return
		}
		if failed := x.pass.failed.Load(); failed != nil && status == statusClientClosed {
			x.refuseFailed(failed)
			return
		}
	}
	if status >= 200 || status == http.StatusSwitchingProtocols {
		x.wroteHeader = true
		x.setAnswerHeaders()
		if x.gateway.upstreams[x.environment].over() {
			x.gateway.logger.Info("upstream answers again", zap.Stringer("environment", x.environment))
		}
	}
	x.ResponseWriter.WriteHeader(status)
}

// setAnswerHeaders sets the headers that every answer of a backend gets.
func (x *exchange) setAnswerHeaders() {
	x.set(x.Header(), "X-Request-Id", answeredIDValue, x.requestID)
	x.keepPrivate(x.Header())
	x.setLimitHeaders(x.Header())
}

// maxPiece is how much of an answer is written between two checks for a cut: io.Copy's buffer.
const maxPiece = 32 << 10

// Write writes in pieces: Caddy's writer gives each part of a long write a new deadline, and so would forget that of a cut.
func (x *exchange) Write(p []byte) (int, error) {
	for written := 0; ; {
		if err := x.mayWrite(); err != nil {
			return written, err
		}
		n, err := x.ResponseWriter.Write(p[written:min(written+maxPiece, len(p))])
		if written += n; err != nil || written == len(p) {
			return written, err
		}
	}
}

// mayWrite comes before each part of an answer's body. A request that was cut gets no more of it.
func (x *exchange) mayWrite() error {
	if cut := x.cutBy.Load(); cut != nil {
		x.pass.withheld = x.reason == nil // else the gateway's own answer, which is whole, stands in its place
		return cut
	}
	if !x.wroteHeader {
		x.WriteHeader(http.StatusOK)
	}
	return nil
}

// ReadFrom bypasses that of the server's writer, which would copy to the end despite a cut.
func (x *exchange) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{x}, r)
}

// FlushError sends what is buffered, the header included.
func (x *exchange) FlushError() error {
	if !x.wroteHeader {
		x.WriteHeader(http.StatusOK)
	}
	return http.NewResponseController(x.ResponseWriter).Flush()
}

// refuseUnsent answers a request that was cut before it was sent.
func (x *exchange) refuseUnsent(cut *keycache.Cut) {
	x.outcome = cut.Outcome
	x.count()
	x.refuseCut(cut, false)
}

// refuseCut answers a request that was cut. If it was sent, nobody knows what the backend made of it.
func (x *exchange) refuseCut(cut *keycache.Cut, sent bool) {
	x.wroteHeader = true
	if x.closing {
		x.Header()["Connection"] = []string{"close"}
	}
	e := apierror.Of(cut.Outcome)
	if sent {
		e = e.With(map[string]any{"may_have_been_carried_out": true})
		e.Message += " The request may have been carried out."
	}
	x.answer(e)
}

// finish turns what the environment's handlers returned into the gateway's own answer, where there is none yet.
func (x *exchange) finish(err error) error {
	if cut := x.cutBy.Load(); cut != nil {
		switch {
		case !x.wroteHeader:
			x.refuseCut(cut, true)
		case x.pass.withheld:
			panic(http.ErrAbortHandler) // or the server ends the answer as if it were complete; a proxy panics by itself
		}
		return nil
	}
	if x.wroteHeader {
		return err
	}
	x.setAnswerHeaders() // also if it is Caddy that writes the answer, to an error
	if err == nil {
		return nil
	}
	if failed := x.pass.failed.Load(); failed != nil {
		x.refuseFailed(failed)
		return nil
	}
	failed, ok := errors.AsType[caddyhttp.HandlerError](err)
	if !ok {
		return err
	}
	e, upstream := upstreamUnavailable, x.chosen()
	switch failed.StatusCode {
	case http.StatusRequestEntityTooLarge: // of request_body, by the length that the request tells
		x.refuseFailed(&clientError{bodyTooLarge, err})
		return nil
	case http.StatusGatewayTimeout:
		e = upstreamTimeout
	case http.StatusServiceUnavailable: // the proxy has found no backend to choose
		upstream = zap.Skip()
	case http.StatusBadGateway:
	default:
		return err
	}
	x.refuseUpstream(e, failed.Err, upstream)
	return nil
}

// chosen names the backend that a proxy has chosen last, which few errors do.
func (x *exchange) chosen() zap.Field {
	const placeholder = "http.reverse_proxy.upstream.hostport"
	if replacer, ok := x.pass.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		if address, ok := replacer.GetString(placeholder); ok {
			return zap.String("upstream", address)
		}
	}
	return zap.Skip()
}

// refuseUpstream answers a request that its backend did not. It counts even where the client may be at fault: a backend that breaks
// off every upload looks the same.
func (x *exchange) refuseUpstream(e *apierror.Error, err error, upstream zap.Field) {
	reason := upstreamUnavailableReason
	if e.Status == http.StatusGatewayTimeout {
		reason = upstreamTimeoutReason
	}
	x.gateway.metrics.upstreamErrors.WithLabelValues(x.environment.String(), reason).Inc()
	level := zap.DebugLevel // the access log has each of them; with no backend, an error for each request would push all else out of the log
	if x.gateway.upstreams[x.environment].met() {
		level = zap.ErrorLevel
	}
	x.gateway.logger.Log(level, "upstream unavailable", zap.String("request_id", x.requestID),
		zap.Stringer("environment", x.environment), upstream, zap.Error(err))
	x.answer(e)
}

const upstreamMessage = "The API could not be reached. Try again shortly."

// Reasons in rekall_upstream_errors_total.
const (
	upstreamUnavailableReason = "unavailable"
	upstreamTimeoutReason     = "timeout"
)

var (
	upstreamUnavailable = apierror.New(http.StatusBadGateway, "UPSTREAM_UNAVAILABLE", upstreamMessage)
	upstreamTimeout     = apierror.New(http.StatusGatewayTimeout, "UPSTREAM_UNAVAILABLE", upstreamMessage)
)

// Hijack gives a WebSocket's connection to the proxy, wrapped so that a cut ends it with a close frame.
func (x *exchange) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(x.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	return &webSocketConn{Conn: conn, exchange: x}, rw, nil
}

var (
	_ http.Hijacker = (*exchange)(nil)
	_ io.ReaderFrom = (*exchange)(nil)
)

package caddymodule

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/ratelimit"
)

// allowance is what a request knows of the limits of its key.
type allowance struct {
	bucket  *ratelimit.Bucket // to be released; nil: nothing is held
	verdict ratelimit.Verdict
	limits  apikey.Limits
}

// hold counts the request against the limits of its key: once, and whether or not the key has the scope, so that a client
// that is refused for its scopes can hammer no more than others. Beyond the limits, the outcome is that.
func (x *exchange) hold(ctx context.Context, found *keycache.Found) {
	if x.gateway.limiter == nil {
		return
	}
	goodKey := x.outcome == apikey.Allowed || x.outcome == apikey.NotCovered || x.outcome == apikey.Insufficient || x.outcome == apikey.Mismatch
	if !goodKey || x.allowance.bucket != nil { // held already: the key has changed, and was found again
		return
	}
	if !x.allowance.acquire(ctx, x.gateway.limiter, found) {
		x.outcome = apikey.RateLimited
	}
}

// acquire asks the limits of a key for one request, and reports whether it is within them: then release must follow.
func (a *allowance) acquire(ctx context.Context, limiter *ratelimit.Limiter, found *keycache.Found) bool {
	limits := found.Limits()
	bucket, verdict := limiter.Acquire(ctx, found.Record.Digest, ratelimit.Limit(limits))
	*a = allowance{verdict: verdict, limits: limits}
	if verdict.Allowed {
		a.bucket = bucket
	}
	return verdict.Allowed
}

// kind is which of the limits a request is beyond.
func (a *allowance) kind() limitKind {
	if a.verdict.Concurrent {
		return concurrencyLimit
	}
	return rateLimit
}

// refusal is what is answered beyond the limits. now is by Postgres's clock.
func (a *allowance) refusal(now time.Time) *apierror.Error {
	e, limit, remaining, resetAfter := apierror.Of(apikey.RateLimited), a.limits.PerMinute, a.remaining(), a.verdict.ResetAfter
	if a.verdict.Concurrent {
		e, limit, remaining, resetAfter = tooManyAtOnce, a.limits.Concurrent, 0, a.verdict.RetryAfter
	}
	return e.With(map[string]any{
		"limit": limit, "remaining": remaining, "reset_at": unixAfter(now, resetAfter),
	}).Later(a.verdict.RetryAfter)
}

// release says that the request has ended.
func (a *allowance) release() {
	if a.bucket != nil {
		a.bucket.Release()
	}
}

// remaining is what the headers say is left. A burst may be more than a minute's requests: the first would contradict the
// limit beside it.
func (a *allowance) remaining() int { return min(a.verdict.Remaining, a.limits.PerMinute) }

// unixAfter returns now+d in Unix seconds, rounded up.
func unixAfter(now time.Time, d time.Duration) int64 {
	return now.Add(d + time.Second - 1).Unix()
}

// rateLimitHeaders are the names of REKALL.md, "Rate limits", as Go writes them.
var rateLimitHeaders = [...]string{"X-Ratelimit-Limit", "X-Ratelimit-Remaining", "X-Ratelimit-Reset", "X-Ratelimit-Policy"}

// setLimitHeaders sets rateLimitHeaders for the limits of the key, in place of a backend's own.
func (x *exchange) setLimitHeaders(h http.Header) {
	if x.gateway.limiter == nil || x.record == nil {
		return
	}
	a := &x.allowance
	if a.limits.PerMinute == 0 {
		for _, name := range rateLimitHeaders {
			delete(h, name)
		}
		return
	}
	for i, value := range a.headerValues(x.now.Time()) {
		x.set(h, rateLimitHeaders[i], firstRateLimitValue+i, value)
	}
}

// headerValues are the values of rateLimitHeaders.
func (a *allowance) headerValues(now time.Time) [len(rateLimitHeaders)]string {
	var buffer [80]byte
	text := strconv.AppendInt(buffer[:0], int64(a.limits.PerMinute), 10)
	limit := len(text)
	text = append(text, ";w=60"...)
	policy := len(text)
	text = strconv.AppendInt(text, int64(a.remaining()), 10)
	remaining := len(text)
	text = strconv.AppendInt(text, unixAfter(now, a.verdict.ResetAfter), 10)
	all := string(text) // one piece of memory for the four
	return [...]string{all[:limit], all[policy:remaining], all[remaining:], all[:policy]}
}

// limitKind is which limit a request was beyond.
type limitKind uint8

const (
	rateLimit limitKind = iota
	concurrencyLimit
	addressLimit
)

var limitNames = [...]string{rateLimit: "rate", concurrencyLimit: "concurrency", addressLimit: "address"}

// refuseLimited answers a request beyond the limits of its key.
func (x *exchange) refuseLimited() error {
	return x.refuseBeyond(x.allowance.kind(), x.allowance.refusal(x.now.Time()))
}

// tooManyAtOnce is RateLimited where it is not the rate.
var tooManyAtOnce = apierror.New(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
	"This API key has too many requests in flight at the same time. Try again when one of them has ended.")

// refuseBeyond refuses a request that is beyond a limit.
func (x *exchange) refuseBeyond(kind limitKind, e *apierror.Error) error {
	x.outcome = apikey.RateLimited
	x.count()
	x.gateway.metrics.limited[kind].Inc()
	x.answer(e)
	return nil
}

// addressLimited is RateLimited where no key is to blame.
var addressLimited = apierror.New(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
	"Too many requests without a good API key came from your address. Check the key, and try again after the time in Retry-After.")

// apiRequest is what a request to the API of keys holds while it runs. It travels in the request's context, since keysapi finds out who
// asks.
type apiRequest struct {
	allowance
	header http.Header // of the answer
}

type apiRequestKey struct{}

// hold counts a request to the API against the limits of its key, as the gateway does, and tells them. It returns what is answered
// beyond them.
func (k *Keys) hold(r *http.Request, found *keycache.Found) error {
	m, ok := r.Context().Value(apiRequestKey{}).(*apiRequest)
	if !ok || !k.app.limits { // somebody signs in to the dashboard, or no gateway limits keys
		return nil
	}
	allowed := m.acquire(r.Context(), k.app.runtime.limiter, found)
	if m.limits.PerMinute > 0 {
		for i, value := range m.headerValues(found.Now) {
			m.header.Set(rateLimitHeaders[i], value)
		}
	}
	if allowed {
		return nil
	}
	return k.refuseBeyond(m.kind(), m.refusal(found.Now))
}

// refuseAddress is what is answered to an address that is over its limit.
func (k *Keys) refuseAddress(verdict ratelimit.Verdict, cred *credential.Credential) error {
	k.metrics.decisions[apikey.RateLimited][cred.Environment].Inc()
	return k.refuseBeyond(addressLimit, addressLimited.Later(verdict.RetryAfter))
}

// refuseBeyond is what is answered beyond a limit.
func (k *Keys) refuseBeyond(kind limitKind, e *apierror.Error) error {
	k.metrics.limited[kind].Inc()
	return e
}

package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/identitytoken"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/internal/scoperule"
	"github.com/rekall-ai/gateway/internal/usage"
)

func init() { caddy.RegisterModule(Gateway{}) }

// Gateway checks the API key of each request and sends those it allows to the handlers of the key's environment. Nothing
// else leads to them, and nothing behind the gateway runs for a request that it refused: it is the last handler of its
// route, whatever follows it in the configuration.
type Gateway struct {
	// Handlers for requests with a production key (rk_…), usually a reverse proxy. Without it, production keys are
	// answered 403 SANDBOX_PRODUCTION_MISMATCH.
	ProductionRaw json.RawMessage `json:"production,omitempty" caddy:"namespace=http.handlers inline_key=handler"`

	// Handlers for requests with a sandbox key (rk_test_…). Without it, sandbox keys are answered 403
	// SANDBOX_PRODUCTION_MISMATCH. At least one of the two is required.
	SandboxRaw json.RawMessage `json:"sandbox,omitempty" caddy:"namespace=http.handlers inline_key=handler"`

	// Scope rules that add to the built-in table of Rekall's API. A rule with the method and path of a built-in one
	// replaces it; two of the same method and path are refused. A request that no rule covers is answered 403 ROUTE_NOT_COVERED.
	ScopeRules []ScopeRule `json:"scope_rules,omitempty"`

	// Whether requests that the scope rules would refuse are logged, counted and let pass, to meet live traffic with new
	// rules. The key itself is checked all the same. Default: false.
	ScopesReportOnly bool `json:"scopes_report_only,omitempty"`

	// Whether the key is passed on to the backends, as "Authorization: Bearer", for those that still check it. Default:
	// false.
	ForwardCredential bool `json:"forward_credential,omitempty"`

	// Adds a signed token (JWT) to each request for the backends, in X-Rekall-Identity-Token, by which they can tell that
	// it came through a gateway and whose key allowed it. The handler rekall_jwks serves the keys to verify it with. A
	// request for which no token can be signed is answered 503. Default: none.
	IdentityToken *IdentityToken `json:"identity_token,omitempty"`

	// Whether each key is held to the limits of its tier, its account or its own: requests per minute, a burst in 15 seconds, and
	// requests at a time. What is beyond them is answered 429 RATE_LIMIT_EXCEEDED. The limits stand in Postgres
	// ("rekall-gateway limits"); each edge holds to them by itself, unless the rekall option rate_limit_store names a Redis in
	// which they share them. Default: false.
	RateLimits bool `json:"rate_limits,omitempty"`

	// Limits requests without a good key by the client's address, before a key is looked up. What is over the limit is
	// answered 429 RATE_LIMIT_EXCEEDED. A reload begins anew. Default: none.
	AddressLimit *AddressLimit `json:"address_limit,omitempty"`

	production, sandbox block
	rules               *scoperule.Table
	cache               keySource
	issuer              *identitytoken.Issuer // nil: no identity tokens
	limiter             *ratelimit.Limiter    // nil: keys are not limited
	addresses           *ratelimit.Addresses  // nil: addresses are not limited
	accessLog           bool                  // whether what is decided goes into one
	draining            *atomic.Bool          // the app's
	metrics             *metrics
	upstreams           *upstreams
	usage               *usage.Counter
	logger              *zap.Logger
}

// keySource is what the handler asks of the cache.
type keySource interface {
	Find(ctx context.Context, d apikey.Digest) (keycache.Found, error)
	Cached(d apikey.Digest) bool
	Track(f *keycache.Flight, found keycache.Found, request keycache.Request) bool
	Untrack(f *keycache.Flight)
}

// ScopeRule says which scope a request needs.
type ScopeRule struct {
	// One of the 14 scopes, e.g. "memories:read".
	Scope string `json:"scope"`

	// The request method, in capitals. GET covers HEAD as well.
	Method string `json:"method"`

	// The request path. A segment ":name" matches any one segment; "*" as the last one matches all that remain.
	Path string `json:"path"`
}

// CaddyModule returns the Caddy module information.
func (Gateway) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.rekall_gateway", New: func() caddy.Module { return new(Gateway) }}
}

// Provision loads the handlers of both environments and the scope rules.
func (g *Gateway) Provision(ctx caddy.Context) error {
	g.logger = ctx.Logger()
	if g.ProductionRaw == nil && g.SandboxRaw == nil {
		return errors.New("give it a production block, a sandbox block, or both")
	}
	app, err := app(ctx)
	if err != nil {
		return err
	}
	g.cache, g.metrics, g.usage, g.draining = app.runtime.cache, app.runtime.metrics, app.runtime.usage, app.draining
	g.upstreams = &app.runtime.upstreams
	if g.production, err = loadBlock(ctx, g, "ProductionRaw", &g.ProductionRaw, apikey.Production); err != nil {
		return err
	}
	if g.sandbox, err = loadBlock(ctx, g, "SandboxRaw", &g.SandboxRaw, apikey.Sandbox); err != nil {
		return err
	}
	if g.rules, err = g.scopeTable(); err != nil {
		return err
	}
	if g.RateLimits {
		g.limiter, app.limits = app.runtime.limiter, true
	}
	if err := g.provisionIdentityToken(app); err != nil {
		return fmt.Errorf("identity_token: %w", err)
	}
	if g.addresses, err = g.AddressLimit.limiter(); err != nil {
		return fmt.Errorf("address_limit: %w", err)
	}
	if g.addresses != nil && (app.addresses == nil || g.AddressLimit.stricter(app.addressLimit)) {
		app.addresses, app.addressLimit = g.addresses, *g.AddressLimit
	}
	if g.ForwardCredential && logsCredentials(ctx) {
		return errors.New("forward_credential: the server has log_credentials, which writes keys into its logs; remove one of the two")
	}
	if err := guardDoor(ctx); err != nil {
		return err
	}
	g.accessLog = hasAccessLog(ctx)
	return nil
}

// block is an environment's handlers: as they are configured, which checkRoutes walks, and as a chain for requests. The zero
// value is a block that is missing.
type block struct {
	configured caddyhttp.MiddlewareHandler
	chain      caddyhttp.Handler
	lookedUp   []string // names that upstreams are looked up by
	askOrigin  bool     // whether they may ask Caddy for the request as it came, before it was rewritten
}

func loadBlock(ctx caddy.Context, g *Gateway, field string, raw *json.RawMessage, environment apikey.Environment) (block, error) {
	if *raw == nil {
		return block{}, nil
	}
	var config any
	decoder := json.NewDecoder(bytes.NewReader(*raw))
	decoder.UseNumber()
	if err := decoder.Decode(&config); err != nil {
		return block{}, fmt.Errorf("read handlers: %w", err)
	}
	setTransport(config, environment)
	var err error
	if *raw, err = json.Marshal(config); err != nil {
		return block{}, fmt.Errorf("write handlers: %w", err)
	}
	module, err := ctx.LoadModule(g, field)
	if err != nil {
		return block{}, fmt.Errorf("load handlers: %w", err)
	}
	handler := module.(caddyhttp.MiddlewareHandler)
	return block{handler, chain(handler), lookedUp(config), mayAskOrigin(config)}, nil
}

// objectsIn yields the objects in the JSON of a block, a nested rekall_gateway too but nothing in it: that has environments of its own.
func objectsIn(config any) iter.Seq[map[string]any] {
	return func(yield func(map[string]any) bool) { eachObject(config, yield) }
}

// eachObject reports whether yield wants more.
func eachObject(config any, yield func(map[string]any) bool) bool {
	var within []any
	switch config := config.(type) {
	case []any:
		within = config
	case map[string]any:
		if !yield(config) {
			return false
		}
		if config["handler"] != "rekall_gateway" {
			within = slices.Collect(maps.Values(config))
		}
	}
	return !slices.ContainsFunc(within, func(value any) bool { return !eachObject(value, yield) })
}

// chain is an environment's handlers with nothing behind them. A block is compiled here, once: as a handler it would compile
// its routes for each request. Most have one handler and no matcher, and need no route.
func chain(handler caddyhttp.MiddlewareHandler) caddyhttp.Handler {
	if block, ok := handler.(*caddyhttp.Subroute); ok && block.Errors == nil {
		if len(block.Routes) != 1 || len(block.Routes[0].Handlers) != 1 || len(block.Routes[0].MatcherSets) > 0 {
			return block.Routes.Compile(deadEnd)
		}
		handler = block.Routes[0].Handlers[0]
	}
	return caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		return handler.ServeHTTP(w, r, deadEnd)
	})
}

func (g *Gateway) scopeTable() (*scoperule.Table, error) {
	own, err := g.ownRules()
	if err != nil {
		return nil, fmt.Errorf("scope rule: %w", err)
	}
	return scoperule.New(append(scoperule.Builtin(), own...)...)
}

// ownRules reads the configured rules. They may replace built-in ones, but not each other: of two the operator means one, and a table
// cannot know which.
func (g *Gateway) ownRules() ([]scoperule.Rule, error) {
	rules, seen := make([]scoperule.Rule, 0, len(g.ScopeRules)), map[string]bool{}
	for _, sr := range g.ScopeRules {
		rule, err := scoperule.ParseRule(sr.Scope, sr.Method, sr.Path)
		if err != nil {
			return nil, err
		}
		requests := rule.Requests()
		if seen[requests] {
			return nil, fmt.Errorf("%s %s has two scope rules (names of parameters do not count): leave one out", rule.Method, apikey.Redact(rule.Pattern))
		}
		seen[requests] = true
		rules = append(rules, rule)
	}
	return rules, nil
}

// maxFinds is how often a key is found again when it changes between being found and being tracked.
const maxFinds = 3

// ServeHTTP is the whole way of a request: credential, parse, find, decide, hold to the limits, route.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	startedAt := sampleStart()
	cred := credential.Take(r)
	x := g.begin(w, r, cred.Environment, startedAt)
	span := trace.SpanFromContext(r.Context())
	defer x.end(r, span)
	path := r.URL.EscapedPath()
	if x.outcome = parse(r, path, &cred); x.outcome != apikey.Allowed {
		return x.refuse(r)
	}
	var verdict ratelimit.Verdict
	if verdict, x.pending = mayLookUp(g.addresses, r, g.cache, cred.Digest); !verdict.Allowed {
		return x.refuseBeyond(addressLimit, addressLimited.Later(verdict.RetryAfter))
	}
	for range maxFinds {
		found, err := find(r.Context(), span, g.cache, cred.Digest)
		if err != nil {
			return x.unavailable(r, err)
		}
		x.record, x.now = found.Record, apikey.TimeOf(found.Now)
		if x.record != nil {
			x.lookedUp(r) // the request may take hours
		}
		x.outcome = g.decide(x, r.Method, path, found)
		x.hold(r.Context(), &found)
		if x.outcome != apikey.Allowed {
			return x.refuse(r)
		}
		if done, err := x.route(r, found, &cred); done {
			return err
		}
	}
	return x.unavailable(r, errKeyChanging)
}

// begin makes the exchange of a request, and has logs and other handlers know it.
func (g *Gateway) begin(w http.ResponseWriter, r *http.Request, environment apikey.Environment, startedAt instant) *exchange {
	x := &exchange{gateway: g, requestID: apierror.NewRequestID(), environment: environment, startedAt: startedAt}
	x.ResponseWriter = w
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(x.placeholder)
	}
	if g.accessLog {
		logLater(r.Context(), x)
	}
	if g.draining.Load() && r.Header["Upgrade"] == nil {
		w.Header()["Connection"] = []string{"close"}
	}
	return x
}

var errKeyChanging = errors.New("the key changed each time it was found, or this configuration has ended")

// parse decides what can be decided on the request alone, with its escaped path. A space in the query, which the server lets
// through over HTTP/2, would end the target of a request sent in HTTP/1. An opaque target ("x:name") is sent in place of the path,
// even of one that a handler before the gateway set, and over HTTP/2 counts as the backend's failure.
func parse(r *http.Request, path string, cred *credential.Credential) apikey.Outcome {
	switch {
	case !scoperule.KnownMethod(r.Method):
		return apikey.MethodInvalid
	case cred.PathHeldKey || !scoperule.Canonical(path), strings.IndexByte(r.URL.RawQuery, ' ') >= 0, r.URL.Opaque != "":
		return apikey.PathInvalid
	}
	switch cred.Kind {
	case credential.Key:
		return apikey.Allowed
	case credential.None:
		return apikey.Missing
	case credential.Malformed:
		return apikey.Malformed
	case credential.Token:
		return apikey.TokenType
	case credential.Ambiguous:
		return apikey.Ambiguous
	}
	return apikey.Unavailable
}

// decide decides on the key and on what the request wants with it.
func (g *Gateway) decide(x *exchange, method, path string, found keycache.Found) apikey.Outcome {
	required, covered := g.rules.Required(method, path)
	request := apikey.Request{Environment: x.environment, Required: required, Covered: covered}
	if g.block(x.environment).chain == nil {
		request.Environment = 0 // the site serves the other one only
	}
	outcome := found.Record.Decide(found.Now, request)
	if outcome == apikey.Insufficient {
		x.required = required
	}
	if g.ScopesReportOnly && (outcome == apikey.Insufficient || outcome == apikey.NotCovered) {
		g.metrics.reportOnly.WithLabelValues(outcome.String()).Inc()
		g.logger.Warn("scope rules would refuse this request",
			zap.Stringer("outcome", outcome), zap.String("method", method), zap.String("path", path),
			zap.Stringer("required", x.required), zap.String("key_id", x.record.ID), zap.String("request_id", x.requestID))
		return apikey.Allowed
	}
	return outcome
}

var missingBlock block

func (g *Gateway) block(environment apikey.Environment) *block {
	switch environment {
	case apikey.Production:
		return &g.production
	case apikey.Sandbox:
		return &g.sandbox
	}
	return &missingBlock
}

// route sends the request to the handlers of the key's environment, and follows it so that it ends with its key. It
// reports false, having sent nothing, if the key has changed since it was found and the request was not cut for it.
func (x *exchange) route(r *http.Request, found keycache.Found, cred *credential.Credential) (bool, error) {
	to := x.gateway.block(x.environment)
	x.pass = pass{Context: r.Context(), environment: x.environment}
	if c := connectionOf(r); c.ends(r) {
		x.cancel, x.closing = c.cancel, true
	} else {
		x.pass.Context, x.cancel = context.WithCancelCause(r.Context())
		defer x.cancel(nil)
	}
	if !x.gateway.cache.Track(&x.flight, found, x) {
		cut := x.cutBy.Load()
		if cut == nil {
			return false, nil
		}
		x.refuseUnsent(cut) // its context is cancelled: nothing can be found with it
		return true, nil
	}
	defer x.gateway.cache.Untrack(&x.flight)
	if err := x.signIdentity(found); err != nil {
		if cut := x.cutBy.Load(); cut != nil {
			x.refuseUnsent(cut)
			return true, nil
		}
		return true, x.unavailable(r, err)
	}
	x.count()
	if to.askOrigin {
		x.pass.Context = context.WithValue(x.pass.Context, caddyhttp.OriginalRequestCtxKey, decidedOn(r))
	}
	forwarded := r.WithContext(&x.pass)
	x.identify(forwarded) // in r too, whose headers placeholders tell
	if x.gateway.ForwardCredential || x.gateway.issuer != nil {
		forwarded.Header = maps.Clone(r.Header) // what handlers around the gateway see, and may send elsewhere, is r's
		x.addCredentials(forwarded.Header, cred)
	}
	if r.Body != nil && r.Body != http.NoBody {
		x.pass.body = r.Body
		forwarded.Body = &x.pass
	}
	return true, x.finish(to.chain.ServeHTTP(x, forwarded))
}

// deadEnd ends the chain of an environment's handlers: there is nothing behind the gateway.
var deadEnd = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
	return caddyhttp.Error(http.StatusBadGateway, errors.New("no handler of the environment answered the request"))
})

var (
	_ caddy.Provisioner           = (*Gateway)(nil)
	_ caddyhttp.MiddlewareHandler = (*Gateway)(nil)
)

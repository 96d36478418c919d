// Package caddymodule puts the gateway into Caddy: the rekall app, its handlers and what goes with them in a server, their
// Caddyfile directives, admin routes, metrics and commands. It is a thin adapter; what it adapts lives in internal/.
package caddymodule

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/garbage"
	"github.com/rekall-ai/gateway/internal/identitytoken"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/ratelimit"
)

// promise is the bound that users are told: a revocation holds within 60 seconds at every edge (REKALL.md, "Keys").
const promise = 60 * time.Second

// maxStalenessLimit leaves time to end streams within the promise: a process that stood still takes keycache.CutWithin until it cuts
// them, and a client that does not read holds up the end for cutGrace.
const maxStalenessLimit = (promise - keycache.CutWithin - cutGrace) / time.Second * time.Second

// maxCacheSize keeps a typing mistake in a reload from taking all memory, and the running gateway with it: the cache takes 50 bytes for
// each key at once. 370 bytes for as many, when it is full, are 3.7 GB.
const maxCacheSize = 10_000_000

// maxEdgeText is the most that Postgres takes of an edge's name and of its region, in characters.
const maxEdgeText = 200

func init() { caddy.RegisterModule(App{}) }

// App keeps this edge's copy of the key data true. Its handlers share it; it needs no configuration when
// REKALL_DATABASE_URL is set.
type App struct {
	// Postgres connection URL. May contain placeholders, which keep its password out of the configuration. Default:
	// {env.REKALL_DATABASE_URL}. Behind PgBouncer in transaction mode, add default_query_exec_mode=exec and switch
	// listening off.
	Database string `json:"database,omitempty"`

	// Connection URL of a hot standby that the change feed and the keys are read from, to spare the primary. Its replay lag
	// counts as age of the data. Keys that it does not know, and this edge's reports, still need the primary. Default:
	// database.
	ReadDatabase string `json:"read_database,omitempty"`

	// How often the change feed is read. A change reaches this edge within this time, or at once where Postgres can
	// notify it. Default: 1s.
	Refresh caddy.Duration `json:"refresh,omitempty"`

	// The age at which key data is no longer trusted. Beyond it each request asks Postgres, and is answered 503 if
	// Postgres does not answer. Must be longer than refresh, and 57s at most. Default: 30s.
	MaxStaleness caddy.Duration `json:"max_staleness,omitempty"`

	// How many keys are kept in memory, 10000000 at most: some 370 bytes each when it is full, 50 at once. Default: 100000.
	CacheSize int `json:"cache_size,omitempty"`

	// How many keys are read into memory at the start, those first that are the likeliest to be used; cache_size at most.
	// Default: none, each is read when it is first used.
	Warm int `json:"warm,omitempty"`

	// Whether to do without LISTEN, which needs a session of its own: changes then arrive with the next refresh.
	// Default: false.
	ListenOff bool `json:"listen_off,omitempty"`

	// The name of this edge, in "rekall-gateway edges list" and in confirmations of a revocation. May contain placeholders.
	// Default: the host name.
	EdgeName string `json:"edge_name,omitempty"`

	// Where this edge is, for people. May contain placeholders. Default: none.
	EdgeRegion string `json:"edge_region,omitempty"`

	// Whether this edge takes part in sending canaries: every minute one edge revokes a throw-away key of its own, and all
	// edges measure how long it stayed allowed (canary_revocation_seconds in /rekall/status,
	// rekall_canary_revocation_seconds in the metrics). Default: false.
	Canary bool `json:"canary,omitempty"`

	// How often the counts of what keys are used for are added up in Postgres. A gateway that is killed loses what it
	// counted since. From 100ms to 5m. Default: 10s.
	UsageFlush caddy.Duration `json:"usage_flush,omitempty"`

	// How long those counts are kept in Postgres, by hour. At least 1d; spikes are told from the last 14 days. The shortest
	// of all edges applies. Default: 90d.
	UsageRetention caddy.Duration `json:"usage_retention,omitempty"`

	// Redis in which the edges share the limits of keys, as redis://user:password@host:6379/0, or rediss:// for TLS. Edges
	// lease requests from it ahead of need; while it does not answer, each edge holds keys to its part of their limits. May contain
	// placeholders.
	// Default: none, each edge holds keys to their limits by itself: N edges together let through up to N times as much.
	RateLimitStore string `json:"rate_limit_store,omitempty"`

	ctx     caddy.Context
	inUse   settings                // under which runtime is in the pool
	runtime *runtime                // nil: none was taken
	issuers []*identitytoken.Issuer // of the gateways of this configuration that send identity tokens
	limits  bool                    // a gateway of this configuration holds keys to their limits

	addresses    *ratelimit.Addresses // of the gateway of this configuration with the strictest address_limit; nil: none has one
	addressLimit AddressLimit         // its settings

	managements map[*management]*zap.Logger // that the handlers of this configuration manage keys with

	draining *atomic.Bool // Caddy is about to stop this configuration
}

// CaddyModule returns the Caddy module information.
func (App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "rekall", New: func() caddy.Module { return new(App) }}
}

// Provision checks the configuration and takes the runtime over from the configuration before this one, if its settings
// are the same. It does not connect: validating a configuration must not need its database.
func (a *App) Provision(ctx caddy.Context) error {
	a.ctx, a.draining = ctx, new(atomic.Bool)
	s, err := a.settings()
	if err != nil {
		return err
	}
	value, _, err := runtimes.LoadOrNew(s, func() (caddy.Destructor, error) { return newRuntime(s) })
	if err != nil {
		return err
	}
	a.inUse, a.runtime = s, value.(*runtime)
	return a.runtime.metrics.register(ctx.GetMetricsRegistry())
}

// settings are those of the configuration, with defaults and without placeholders.
func (a *App) settings() (settings, error) {
	s := settings{
		refresh:      cmp.Or(time.Duration(a.Refresh), time.Second),
		maxStaleness: cmp.Or(time.Duration(a.MaxStaleness), 30*time.Second),
		cacheSize:    cmp.Or(a.CacheSize, 100_000),
		warm:         a.Warm,
		listen:       !a.ListenOff,
		canary:       a.Canary,

		usageFlush:     cmp.Or(time.Duration(a.UsageFlush), 10*time.Second),
		usageRetention: cmp.Or(time.Duration(a.UsageRetention), 90*24*time.Hour),
	}
	if err := s.check(); err != nil {
		return s, err
	}
	if err := a.resolve(&s); err != nil {
		return s, err
	}
	return s, s.checkEdge()
}

// check refuses numbers that contradict each other or a promise.
func (s *settings) check() error {
	switch {
	case s.refresh < 10*time.Millisecond:
		return errors.New("refresh must be at least 10ms")
	case s.maxStaleness > maxStalenessLimit:
		return fmt.Errorf("max_staleness must be at most %v: revocations are promised within 60 seconds, and to end open streams can take 3", maxStalenessLimit)
	case s.maxStaleness <= s.refresh:
		return errors.New("max_staleness must be longer than refresh, or no cached key is ever trusted")
	case s.cacheSize < 0 || s.cacheSize > maxCacheSize:
		return fmt.Errorf("cache_size must be a number of keys from 1 to %d", maxCacheSize)
	case s.warm < 0 || s.warm > s.cacheSize:
		return errors.New("warm must be a number of keys, at most cache_size")
	case s.usageFlush < 100*time.Millisecond || s.usageFlush > 5*time.Minute:
		return errors.New("usage_flush must be from 100ms to 5m")
	case s.usageRetention < 24*time.Hour:
		return errors.New("usage_retention must be at least 1d")
	}
	return nil
}

// resolve replaces placeholders.
func (a *App) resolve(s *settings) error {
	for _, option := range []struct {
		name, value string
		to          *string
	}{
		{"database", cmp.Or(a.Database, os.Getenv(keystore.DatabaseVariable)), &s.database},
		{"read_database", a.ReadDatabase, &s.readDatabase},
		{"rate_limit_store", a.RateLimitStore, &s.rateLimitStore},
		{"edge", a.EdgeName, &s.edgeName},
		{"edge", a.EdgeRegion, &s.edgeRegion},
	} {
		isName := option.name == "edge" // a password may have braces
		var err error
		*option.to, err = withoutPlaceholders(option.value, isName)
		if isName && err != nil {
			return fmt.Errorf("edge: %w: write a name or a placeholder that Caddy knows; {system.hostname} is this machine's name", err)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", option.name, err)
		}
	}
	if s.edgeName == "" {
		var err error
		if s.edgeName, err = os.Hostname(); err != nil {
			return fmt.Errorf("find the host name: %w; set edge", err)
		}
	}
	if s.database == "" {
		return errors.New("no database: set database in the rekall global option, or " + keystore.DatabaseVariable)
	}
	return nil
}

// withoutPlaceholders replaces placeholders, all of which must have a value, and refuses unknown ones if it is told to.
func withoutPlaceholders(text string, refuseUnknown bool) (string, error) {
	value, err := caddy.NewReplacer().ReplaceOrErr(text, true, refuseUnknown)
	return strings.TrimSpace(value), err // one from a file ends with a line feed
}

// checkEdge refuses a name that Postgres would not take into its list: a revocation would not wait for the edge.
func (s *settings) checkEdge() error {
	if n := utf8.RuneCountInString(s.edgeName); n < 1 || n > maxEdgeText || utf8.RuneCountInString(s.edgeRegion) > maxEdgeText {
		return errors.New("edge must have a name of 1 to 200 characters, and a region of at most 200")
	}
	if text := s.edgeName + s.edgeRegion; !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
		return errors.New("edge must have a name and a region in UTF-8 without control characters")
	}
	return nil
}

// Start begins to follow the change feed. HTTP may be serving already: until the first sync each request asks Postgres. At a reload to
// a database that cannot be read it fails, so that Caddy keeps the configuration before.
func (a *App) Start() error {
	if app, err := a.ctx.AppIfConfigured("http"); err == nil { // App would make one, in the midst of Caddy's walk through them
		if err := checkRoutes(app.(*caddyhttp.App), a.ctx.Logger(a)); err != nil {
			return err
		}
		warnOfRedirects(app.(*caddyhttp.App), a.ctx.Logger(a))
	}
	garbage.Tune()
	a.runtime.start(a.ctx.Logger(a))
	if err := a.runtime.awaitFirstSync(a.ctx); err != nil {
		// What it has logged until here reads as if the edge trusted no key.
		a.ctx.Logger(a).Warn("the new configuration is refused, and the one before goes on serving from the keys that it has", zap.Error(err))
		return err
	}
	a.runtime.follow(a)
	for m, logger := range a.managements {
		m.check(logger)
	}
	if len(a.issuers) > 0 {
		a.runtime.startSigner()
	}
	switch {
	case a.limits:
		a.runtime.startLimiter()
	case a.RateLimitStore != "":
		a.ctx.Logger(a).Warn("rate_limit_store is not used: no rekall_gateway has rate_limits")
	}
	return nil
}

// Stop does nothing: requests may still be in flight, and the next configuration may share the runtime.
func (a *App) Stop() error { return nil }

// Cleanup gives the runtime back. Unlike Stop it also runs when provisioning failed, and whatever it is that kept the configuration from
// starting.
func (a *App) Cleanup() error {
	if a.runtime == nil {
		return nil
	}
	a.runtime.unfollow(a)
	_, err := runtimes.Delete(a.inUse)
	return err
}

// ready reports whether requests can be answered: cached keys are trusted, and tokens can be signed. An edge that cannot sign would
// answer every good key 503, and a rolling update would go on to the next.
func (a *App) ready() bool { return a.runtime.ready(a.issuers) }

// checkAtStart has m checked, and logger told of failures, when the configuration starts.
func (a *App) checkAtStart(m *management, logger *zap.Logger) {
	if a.managements == nil {
		a.managements = make(map[*management]*zap.Logger)
	}
	a.managements[m] = logger
}

// app returns the rekall app of the configuration being provisioned.
func app(ctx caddy.Context) (*App, error) {
	module, err := ctx.App("rekall")
	if err != nil {
		return nil, err
	}
	return module.(*App), nil
}

var (
	_ caddy.App          = (*App)(nil)
	_ caddy.Provisioner  = (*App)(nil)
	_ caddy.CleanerUpper = (*App)(nil)
)

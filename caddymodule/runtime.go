package caddymodule

import (
	"context"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/edge"
	"github.com/rekall-ai/gateway/internal/identitytoken"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/internal/usage"
)

// runtimes are shared by the configurations before and after a reload, so that a reload neither empties the cache nor
// loses the streams that it must be able to cut.
var runtimes = caddy.NewUsagePool()

type settings struct {
	database              string
	readDatabase          string // a standby's; empty: database
	refresh, maxStaleness time.Duration
	cacheSize, warm       int
	listen                bool
	edgeName, edgeRegion  string
	canary                bool

	usageFlush, usageRetention time.Duration
	rateLimitStore             string // empty: none
}

// runtime outlives configurations: the store, the cache and the loops that keep it true.
type runtime struct {
	store    *keystore.Store
	standby  *keystore.Store // nil: reads go to store
	cache    *keycache.Cache
	identity edge.Identity
	reporter *edge.Reporter
	canary   *edge.Canary // nil: this edge sends none
	usage    *usage.Counter
	counts   *keystore.Store // what usage is flushed to: its connections are its own, so that no lookup waits for a flush
	refresh  time.Duration
	metrics  *metrics
	logger   atomic.Pointer[zap.Logger] // of the newest app: Caddy may close the writers of the others

	startOnce sync.Once
	started   atomic.Bool
	closeOnce sync.Once
	cancel    context.CancelFunc
	ctx       context.Context
	running   sync.WaitGroup

	inUse  context.Context // until no configuration uses it any longer
	endUse context.CancelFunc

	signer   *identitytoken.Signer // runs once a configuration asks for identity tokens
	signOnce sync.Once
	issuers  atomic.Pointer[[]*identitytoken.Issuer] // of the newest app
	tokens   int                                     // kept at most: one for each key in the cache

	limiter   *ratelimit.Limiter // runs once a configuration limits keys
	limitOnce sync.Once

	upstreams upstreams

	mu   sync.Mutex
	apps []*App // that were started and are not over, the newest last: a reload that fails gives back to the one before
}

func newRuntime(s settings) (_ *runtime, err error) {
	instance := edge.NewInstance()
	store, err := keystore.Open(s.database, keystore.Options{PlanOnce: true})
	if err != nil {
		return nil, err
	}
	rt := &runtime{store: store, refresh: s.refresh, metrics: newMetrics()}
	defer func() {
		if err != nil {
			rt.release()
		}
	}()
	if s.canary {
		rt.canary = edge.NewCanary(store, rt.logger.Load)
	}
	rt.logger.Store(zap.NewNop())
	rt.issuers.Store(new([]*identitytoken.Issuer))
	rt.signer, rt.tokens = identitytoken.NewSigner(store, instance, rt.logger.Load), s.cacheSize
	rt.identity = edge.Identity{
		Instance: instance, Name: s.edgeName, Region: s.edgeRegion, Version: version(), MaxStaleness: s.maxStaleness,
	}
	rt.reporter = edge.NewReporter(store, rt.identity, rt.logger.Load)
	config := keycache.Config{
		Size: s.cacheSize, Warm: s.warm, Refresh: s.refresh, MaxStaleness: s.maxStaleness, NoListen: !s.listen,
		Report: rt.reporter.Changed, Revoked: rt.metrics.revoked, Logger: rt.logger.Load,
	}
	reads := store
	if s.readDatabase != "" {
		if rt.standby, err = keystore.Open(s.readDatabase, keystore.Options{Instance: instance, PlanOnce: true}); err != nil {
			return nil, fmt.Errorf("read_database: %w", err)
		}
		reads = rt.standby
		config.NoListen, config.Sent, config.Primary = true, rt.reporter.Sent, store.Lookup // a standby has no LISTEN
	}
	if rt.cache, err = keycache.New(reads, config); err != nil {
		return nil, err
	}
	if rt.counts, err = keystore.Open(s.database, keystore.Options{MaxConns: 2, ApplicationName: "rekall-gateway usage"}); err != nil {
		return nil, err
	}
	rt.usage = usage.New(rt.counts, usage.Config{
		Instance: instance, Flush: s.usageFlush, Retention: s.usageRetention, Logger: rt.logger.Load,
	})
	if err := rt.openLimiter(s.rateLimitStore); err != nil {
		return nil, fmt.Errorf("rate_limit_store: %w", err)
	}
	rt.metrics.watch(rt)
	rt.ctx, rt.cancel = context.WithCancel(context.Background())
	rt.inUse, rt.endUse = context.WithCancel(rt.ctx)
	return rt, nil
}

// version is that of our module in this binary, whoever built it.
func version() string {
	const module = "github.com/rekall-ai/gateway"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range append(info.Deps, &info.Main) {
		if dep.Path == module {
			return dep.Version
		}
	}
	return "unknown"
}

func (rt *runtime) start(logger *zap.Logger) {
	rt.startOnce.Do(func() {
		rt.logger.Store(logger)
		rt.started.Store(true)
		alive.mu.Lock()
		alive.runtimes[rt] = struct{}{}
		alive.mu.Unlock()
		rt.running.Go(func() { rt.cache.Run(rt.ctx) })
		rt.running.Go(func() { rt.reporter.Run(rt.ctx, rt.cache.Applied) })
		if rt.canary != nil {
			rt.running.Go(func() { rt.canary.Run(rt.inUse, 2*rt.refresh) })
		}
		rt.running.Go(func() { rt.usage.Run(rt.ctx) })
		rt.running.Go(func() { rt.usage.DoChores(rt.inUse) })
	})
	rt.usage.Wake() // a reload shows what was counted until then
}

// follow takes logger and issuers over from an app that was started.
func (rt *runtime) follow(a *App) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	rt.apps = append(rt.apps, a)
	rt.takeOver(a)
}

// unfollow forgets an app that is over. If it is the newest, since something else of its configuration failed to start, the one before
// goes on.
func (rt *runtime) unfollow(a *App) {
	rt.mu.Lock()
	defer rt.mu.Unlock()
	rt.apps = slices.DeleteFunc(rt.apps, func(other *App) bool { return other == a })
	if n := len(rt.apps); n > 0 {
		rt.takeOver(rt.apps[n-1])
	}
}

func (rt *runtime) takeOver(a *App) {
	rt.logger.Store(a.ctx.Logger(a))
	rt.issuers.Store(&a.issuers)
}

// firstSyncWithin is how long a reload waits for the first sync of another database, which takes milliseconds.
const firstSyncWithin = 5 * time.Second

// awaitFirstSync returns an error if the runtime cannot read its database while another can read its own: then that one's
// configuration is better kept. If none can, the new one is taken.
func (rt *runtime) awaitFirstSync(ctx context.Context) error {
	if !slices.ContainsFunc(runtimesInUse(), func(other *runtime) bool { return other != rt && other.cache.Status().Fresh }) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, firstSyncWithin)
	defer cancel()
	if err := rt.cache.AwaitFirstSync(ctx); err != nil {
		return fmt.Errorf("no keys can be read from the database of the new configuration: %w", err)
	}
	return nil
}

// alive are the runtimes that have started and not ended: the one in use, those before it until their last request is done, and in a
// reload the one to come. A scrape counts the requests of all, and must see none twice and none left out: a counter would fall.
var alive = struct {
	mu       sync.Mutex
	runtimes map[*runtime]struct{}
	cut      uint64 // requests that were cut in runtimes that have ended
}{runtimes: make(map[*runtime]struct{})}

// allRequests are those of all runtimes: how many are in flight, and how many were cut.
func allRequests() (inFlight int, cut uint64) {
	alive.mu.Lock()
	defer alive.mu.Unlock()
	cut = alive.cut
	for rt := range alive.runtimes {
		status := rt.cache.Status()
		inFlight, cut = inFlight+status.InFlight, cut+status.Cut
	}
	return inFlight, cut
}

// A process that ends does not wait for runtimes that are no longer in use, and would lose what they have counted.
func init() { caddy.OnExit(func(context.Context) { closeAll() }) }

// closeAll ends all runtimes at once.
func closeAll() {
	alive.mu.Lock()
	all := slices.Collect(maps.Keys(alive.runtimes))
	alive.mu.Unlock()
	var closing sync.WaitGroup
	for _, rt := range all {
		closing.Go(rt.close)
	}
	closing.Wait()
}

// startSigner begins to make keys for identity tokens and to publish them. start comes first.
func (rt *runtime) startSigner() {
	rt.signOnce.Do(func() {
		rt.running.Go(func() { rt.signer.Run(rt.ctx) })
	})
}

// ready reports whether cached keys are trusted and each of the issuers can sign.
func (rt *runtime) ready(issuers []*identitytoken.Issuer) bool {
	return rt.cache.Status().Fresh && canSign(issuers)
}

func canSign(issuers []*identitytoken.Issuer) bool {
	return !slices.ContainsFunc(issuers, func(i *identitytoken.Issuer) bool { return !i.Ready() })
}

func (rt *runtime) openLimiter(url string) (err error) {
	if url == "" {
		rt.limiter = ratelimit.New()
		return nil
	}
	rt.limiter, err = ratelimit.NewShared(url, rt.liveEdges, rt.logger.Load)
	return err
}

// liveEdges is how many edges share the limits, as far as this one knows.
func (rt *runtime) liveEdges() int {
	n, _ := rt.reporter.Edges()
	return max(1, n.Live)
}

// startLimiter begins to keep the limits' books. start comes first.
func (rt *runtime) startLimiter() {
	rt.limitOnce.Do(func() {
		rt.running.Go(func() { rt.limiter.Run(rt.ctx) })
	})
}

// drainPoll is longer than a request takes to be decided. One that comes later, since handlers before the gateway held it up, is
// refused by the cache that has stopped: 503.
const drainPoll = time.Second

// lateCounts is how long a runtime that nothing else keeps tries to write what it has counted, where Postgres does not take it.
const lateCounts = time.Hour

// Destruct ends the runtime when no configuration uses it any longer. Requests of the last one may still be decided or in
// flight: they are counted, followed, and cut when their key ends, until the last is done and all are counted in Postgres. That may take
// days, and until then it holds and does no more than they need: it must not forget usage by a retention that was since prolonged.
func (rt *runtime) Destruct() error {
	if caddy.Exiting() {
		closeAll() // here already, so that it takes as long as one
	}
	if caddy.Exiting() || !rt.started.Load() {
		rt.close()
		return nil
	}
	rt.reporter.Drain()
	rt.endUse()
	go func() {
		poll := time.NewTicker(drainPoll)
		defer poll.Stop()
		for <-poll.C; rt.cache.InFlight() > 0; <-poll.C {
			rt.cache.Shrink()
		}
		for giveUp := time.Now().Add(lateCounts); rt.usage.Status().Buffered > 0 && time.Now().Before(giveUp); <-poll.C {
			rt.cache.Shrink()
			rt.usage.Wake()
		}
		rt.close()
	}()
	return nil
}

// partingPoll is how often to check whether requests cut at the end of the process have told their clients.
const partingPoll = 5 * time.Millisecond

// close stops the loops before what they use. As they stop, the usage loop flushes the last counts, and the cache's cuts the
// requests that are still in flight.
func (rt *runtime) close() {
	rt.closeOnce.Do(func() {
		rt.cancel()
		rt.running.Wait()
		poll := time.NewTicker(partingPoll)
		defer poll.Stop()
		for deadline := time.Now().Add(cutGrace); rt.cache.InFlight() > 0 && time.Now().Before(deadline); <-poll.C {
		}
		rt.release()
		alive.mu.Lock()
		defer alive.mu.Unlock()
		delete(alive.runtimes, rt)
		alive.cut += rt.cache.Status().Cut
	})
}

// release releases what has been opened.
func (rt *runtime) release() {
	if rt.cache != nil {
		rt.cache.Close()
	}
	if rt.standby != nil {
		rt.standby.Close()
	}
	if rt.counts != nil {
		rt.counts.Close()
	}
	rt.store.Close()
}

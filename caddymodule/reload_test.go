package caddymodule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/identitytoken"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

func init() { caddy.RegisterModule(failing{}) }

// failing is an app that cannot start. Caddy starts apps in any order.
type failing struct{ ctx caddy.Context }

var (
	failedAfterOurs bool // ours had been started by then
	readyByThen     bool // what the admin endpoint said, once ours had read its keys
)

func (failing) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "rekall_test_failing", New: func() caddy.Module { return new(failing) }}
}

func (f *failing) Provision(ctx caddy.Context) error {
	f.ctx = ctx
	return nil
}

func (f *failing) Start() error {
	a, err := app(f.ctx)
	if err != nil {
		return err
	}
	a.runtime.mu.Lock()
	apps := a.runtime.apps
	failedAfterOurs = len(apps) > 0 && apps[len(apps)-1] == a
	a.runtime.mu.Unlock()
	if failedAfterOurs {
		if err := a.runtime.cache.AwaitFirstSync(f.ctx); err != nil {
			return err
		}
		readyByThen = isReady()
	}
	return errors.New("cannot start")
}

func (*failing) Stop() error { return nil }

// configure returns a configuration that logs to a file, with further apps.
func configure(t *testing.T, database, log string, admin map[string]any, apps map[string]any) []byte {
	t.Helper()
	admin["disabled"], admin["config"] = true, map[string]any{"persist": false}
	apps["rekall"] = map[string]any{"database": database, "edge_name": "eu-1"}
	config, err := json.Marshal(map[string]any{
		"admin": admin,
		"logging": map[string]any{"logs": map[string]any{"default": map[string]any{
			"writer": map[string]any{"output": "file", "filename": log},
		}}},
		"apps": apps,
	})
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// run has Caddy run a configuration with the app alone, and returns its runtime.
func run(t *testing.T, database, log string) *runtime {
	t.Helper()
	if err := caddy.Load(configure(t, database, log, map[string]any{}, map[string]any{}), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	all := runtimesInUse()
	if len(all) != 1 {
		t.Fatalf("%d runtimes", len(all))
	}
	eventually.Within(t, 30*time.Second, "the edge is ready", isReady)
	return all[0]
}

// isReady is what the admin endpoint says.
func isReady() bool {
	w := httptest.NewRecorder()
	return serveReady(w, httptest.NewRequest(http.MethodGet, readyPath, nil)) == nil && w.Code == http.StatusOK
}

func migrated(t *testing.T) string {
	t.Helper()
	database, _ := openStore(t)
	return database
}

func TestConfigurationThatIsGivenUpChangesNothingOfTheOneThatGoesOn(t *testing.T) {
	log, other := filepath.Join(t.TempDir(), "log"), filepath.Join(t.TempDir(), "log")
	database := migrated(t)
	rt := run(t, database, log)
	issuers := rt.issuers.Load()
	gateway := map[string]any{"servers": map[string]any{"srv": map[string]any{
		"listen": []string{"127.0.0.1:0"},
		"routes": []any{map[string]any{"handle": []any{map[string]any{
			"handler": "rekall_gateway", "production": map[string]any{"handler": "static_response"}, "identity_token": map[string]any{},
		}}}},
	}}}
	loggedWhereItWas := func(when string) {
		t.Helper()
		rt.logger.Load().Info(when)
		if !strings.Contains(process.Read(t, log), when) {
			t.Errorf("%s: what the edge logs is not in its log", when)
		}
		if rt.issuers.Load() != issuers {
			t.Errorf("%s: the edge must sign for a configuration that does not run", when)
		}
	}

	failAfterOurs(t, configure(t, database, other, map[string]any{}, map[string]any{"http": gateway, "rekall_test_failing": map[string]any{}}))
	if !readyByThen {
		t.Error("not ready while another configuration is loaded")
	}
	loggedWhereItWas("another app did not start")

	remote := map[string]any{"remote": map[string]any{"listen": "127.0.0.1:0"}} // which needs an identity
	if err := caddy.Load(configure(t, database, other, remote, map[string]any{"http": gateway}), true); err == nil || !strings.Contains(err.Error(), "remote") {
		t.Fatal(err)
	}
	loggedWhereItWas("remote administration did not start")

	if err := caddy.Load(configure(t, database, other, map[string]any{}, map[string]any{}), true); err != nil {
		t.Fatal(err)
	}
	rt.logger.Load().Info("after a reload")
	if !strings.Contains(process.Read(t, other), "after a reload") {
		t.Error("after a reload the edge does not log where the new configuration says")
	}
}

// TestConfigurationThatIsBeingLoadedLeavesTheEdgeReady: it waits for its first sync, and may be given up.
func TestConfigurationThatIsBeingLoadedLeavesTheEdgeReady(t *testing.T) {
	run(t, migrated(t), filepath.Join(t.TempDir(), "log"))
	const key = "being loaded"
	value, _, err := runtimes.LoadOrNew(key, func() (caddy.Destructor, error) {
		return newRuntime(settings{
			database: "postgres://rekall@127.0.0.1:1/none", refresh: time.Second, maxStaleness: 30 * time.Second, cacheSize: 100, edgeName: "eu-1",
			usageFlush: time.Second, usageRetention: 24 * time.Hour,
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := runtimes.Delete(key); err != nil {
			t.Error(err)
		}
	}()
	loading := value.(*runtime)
	loading.start(zap.NewNop())
	if !isReady() {
		t.Error("not ready while another configuration waits for its first sync")
	}
	used, err := app(caddy.ActiveContext())
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := identitytoken.NewIssuer(used.runtime.signer, 1, identitytoken.Options{Issuer: "i", Audience: []string{"a"}, Lifetime: 5 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	used.issuers = append(used.issuers, issuer) // whose signer does not run
	if isReady() {
		t.Error("ready though the configuration in use is not")
	}
}

// TestEdgeIsNotReadyUntilItsFirstConfigurationIsInUse: its keys may be there before its sites listen.
func TestEdgeIsNotReadyUntilItsFirstConfigurationIsInUse(t *testing.T) {
	database := migrated(t)
	failAfterOurs(t, configure(t, database, filepath.Join(t.TempDir(), "log"), map[string]any{}, map[string]any{"rekall_test_failing": map[string]any{}}))
	if readyByThen {
		t.Error("ready while an app has not started")
	}
}

// failAfterOurs loads a configuration with the app that cannot start, until that app comes after ours.
func failAfterOurs(t *testing.T, config []byte) {
	t.Helper()
	failedAfterOurs = false
	for tries := 0; !failedAfterOurs; tries++ {
		if tries == 50 {
			t.Fatal("the other app never starts after ours")
		}
		if err := caddy.Load(config, true); err == nil || !strings.Contains(err.Error(), "cannot start") {
			t.Fatal(err)
		}
	}
}

// requestOn is a request in flight with a new key, which is cut when that is revoked.
type requestOn struct {
	flight keycache.Flight
	cut    chan struct{}
	revoke func()
}

func (r *requestOn) Cut(*keycache.Cut) { close(r.cut) }

func newRequestOn(t *testing.T, rt *runtime, store *keystore.Store) *requestOn {
	t.Helper()
	admin := keyadmin.New(store)
	key, _, err := admin.Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "n", Account: "a", Environment: "production", Scopes: []string{"memories:read"},
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &requestOn{cut: make(chan struct{}), revoke: func() {
		t.Helper()
		if _, err := admin.Revoke(t.Context(), keyadmin.Operator("test"), key.ID); err != nil {
			t.Fatal(err)
		}
	}}
	eventually.Within(t, 30*time.Second, "the request is tracked", func() bool {
		found, err := rt.cache.Find(t.Context(), apikey.Hash(key.Key.Reveal()))
		return err == nil && found.Record != nil && rt.cache.Track(&r.flight, found, r)
	})
	return r
}

// TestRequestsFromBeforeAReloadAreCountedAtEachMomentOfIt: a counter that falls and rises again seems to have risen by all of it.
func TestRequestsFromBeforeAReloadAreCountedAtEachMomentOfIt(t *testing.T) {
	database, store := openStore(t)
	before := newRuntimeOn(t, database)
	_, cutBefore := allRequests()
	cut, held := newRequestOn(t, before, store), newRequestOn(t, before, store)
	cut.revoke()
	<-cut.cut
	before.cache.Untrack(&cut.flight)

	after := newRuntimeOn(t, database)
	want := func(when string, inFlight float64) {
		t.Helper()
		registry := prometheus.NewPedanticRegistry()
		if err := after.metrics.register(registry); err != nil {
			t.Fatal(err)
		}
		if got := gathered(t, registry, "rekall_requests_in_flight"); got != inFlight {
			t.Errorf("%s: %v requests in flight, want %v", when, got, inFlight)
		}
		if got := gathered(t, registry, "rekall_requests_cut_total"); got != float64(cutBefore)+1 {
			t.Errorf("%s: %v requests cut, want %d", when, got, cutBefore+1)
		}
	}
	want("both run", 1)
	if err := before.Destruct(); err != nil {
		t.Fatal(err)
	}
	want("the former one drains", 1)
	before.cache.Untrack(&held.flight)
	before.close()
	want("it has ended", 0)
}

// gathered returns the metric of that name, and of those labels.
func gathered(t *testing.T, registry *prometheus.Registry, name string, labels ...string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		for _, metric := range family.GetMetric() {
			var values []string
			for _, label := range metric.GetLabel() {
				values = append(values, label.GetValue())
			}
			if family.GetName() == name && slices.Equal(values, labels) {
				return metric.GetGauge().GetValue() + metric.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("no %s", name)
	return 0
}

// TestStreamFromBeforeAReloadOfCacheSizeHoldsNeitherKeysNorFilterInMemory: it may last for days, as may those from before further reloads.
func TestStreamFromBeforeAReloadOfCacheSizeHoldsNeitherKeysNorFilterInMemory(t *testing.T) {
	database, store := openStore(t)
	log := filepath.Join(t.TempDir(), "log")
	before := run(t, database, log)
	stream := newRequestOn(t, before, store)
	eventually.Within(t, 30*time.Second, "keys and the filter are in memory", func() bool {
		s := before.cache.Status()
		return s.Keys > 0 && s.FilterKeys > 0
	})

	config := configure(t, database, log, map[string]any{}, map[string]any{})
	if err := caddy.Load(bytes.Replace(config, []byte(`"edge_name"`), []byte(`"cache_size": 200, "edge_name"`), 1), true); err != nil {
		t.Fatal(err)
	}
	if all := runtimesInUse(); len(all) != 1 || all[0] == before {
		t.Fatalf("the reload has started no other runtime: %v", all)
	}
	eventually.Within(t, 30*time.Second, "neither keys nor the filter are in memory", func() bool {
		s := before.cache.Status()
		return s.Keys == 0 && s.FilterKeys == 0
	})
	if before.inUse.Err() == nil || before.ctx.Err() != nil {
		t.Error("it sends canaries, or has ended")
	}
	eventually.True(t, "it does no chores by its old settings", func() bool {
		stacks := make([]byte, 16<<20)
		return bytes.Count(stacks[:goruntime.Stack(stacks, true)], []byte(").DoChores(")) == len(runtimesInUse())
	})
	late := newRequestOn(t, before, store) // that other handlers held up until now
	for _, request := range []*requestOn{stream, late} {
		request.revoke()
		<-request.cut
		before.cache.Untrack(&request.flight)
	}
	before.close()
}

// TestUseFromBeforeAReloadIsCountedOncePostgresTakesIt: what keeps it from being written may be what the reload is to mend.
func TestUseFromBeforeAReloadIsCountedOncePostgresTakesIt(t *testing.T) {
	database, store := openStore(t)
	log := filepath.Join(t.TempDir(), "log")
	before := run(t, database, log)
	request := newRequestOn(t, before, store) // whose key is in memory
	before.cache.Untrack(&request.flight)
	pgtest.Exec(t, database, `alter table rekall.usage rename to locked_away`)
	before.usage.Count(&apikey.Record{ID: "key_0000000000000000000001"}, apikey.Allowed, time.Now())
	config := configure(t, database, log, map[string]any{}, map[string]any{})
	if err := caddy.Load(bytes.Replace(config, []byte(`"edge_name"`), []byte(`"cache_size": 200, "edge_name"`), 1), true); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "it is tried again and again", func() bool { return before.usage.Status().FlushErrors >= 4 })
	if before.ctx.Err() != nil {
		t.Error("the runtime has ended, and what it counted is lost")
	}
	eventually.True(t, "it holds no keys meanwhile", func() bool { return before.cache.Status().Keys == 0 })
	pgtest.Exec(t, database, `alter table rekall.locked_away rename to usage`)
	<-before.ctx.Done()
	before.close() // returns when it has
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	var counted int
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	if err := conn.QueryRow(t.Context(), `select coalesce(sum(count), 0) from rekall.usage`).Scan(&counted); err != nil || counted != 1 {
		t.Errorf("%d requests are counted, %v", counted, err)
	}
}

// TestRuntimeThatEndsWaitsForTheGoodbyesOfRequestsThatItCuts: their clients would take a stream that is cut for one that is complete. It does
// not wait for one that never ends.
func TestRuntimeThatEndsWaitsForTheGoodbyesOfRequestsThatItCuts(t *testing.T) {
	database, store := openStore(t)
	for _, ends := range []bool{true, false} {
		rt := newRuntimeOn(t, database)
		request := newRequestOn(t, rt, store)
		said := make(chan struct{})
		if ends {
			go func() {
				defer close(said)
				<-request.cut
				rt.running.Wait() // as close does
				for range 3 {     // close would have ended by then
					if _, err := rt.store.CountEdges(t.Context()); err != nil {
						t.Errorf("the runtime has released what it had opened before its request has ended: %v", err)
					}
				}
				rt.cache.Untrack(&request.flight)
			}()
		}
		rt.close()
		select {
		case <-request.cut:
		default:
			t.Error("the runtime has ended, and its request goes on")
		}
		if left := rt.cache.InFlight(); ends && left != 0 {
			t.Error("the runtime has ended before its request")
		}
		if ends {
			<-said
		}
	}
}

// TestRuntimesEndAtTheSameTimeWhenTheProcessDoes: one after the other they would take longer than whoever stops it waits.
func TestRuntimesEndAtTheSameTimeWhenTheProcessDoes(t *testing.T) {
	database := migrated(t)
	each := []*runtime{newRuntimeOn(t, database), newRuntimeOn(t, database)}
	ends, end := context.WithCancel(t.Context())
	defer end()
	for _, rt := range each {
		rt.running.Go(func() { <-ends.Done() })
	}
	closed := make(chan struct{})
	go func() {
		closeAll()
		close(closed)
	}()
	eventually.True(t, "both are ending", func() bool {
		return !slices.ContainsFunc(each, func(rt *runtime) bool { return rt.ctx.Err() == nil })
	})
	end()
	<-closed
}

// TestEdgesWhoseNamesAndRegionsReadAlikeAreNotTakenForOne: a reload would keep the name and the region from before it.
func TestEdgesWhoseNamesAndRegionsReadAlikeAreNotTakenForOne(t *testing.T) {
	provision := func(name, region string) *runtime {
		t.Helper()
		ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
		t.Cleanup(cancel)
		a := &App{Database: "postgres://rekall@127.0.0.1:1/none", EdgeName: name, EdgeRegion: region}
		if err := a.Provision(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := a.Cleanup(); err != nil {
				t.Error(err)
			}
		})
		return a.runtime
	}
	one := provision("a edgeRegion:b", "c")
	if provision("a edgeRegion:b", "c") != one {
		t.Error("the same settings have another runtime")
	}
	if provision("a", "b edgeRegion:c") == one {
		t.Error("another edge's settings have the same runtime")
	}
}

// TestAppStartsWithoutAnHTTPAppAndAddsNone: Caddy would range over a map that changes.
func TestAppStartsWithoutAnHTTPAppAndAddsNone(t *testing.T) {
	run(t, migrated(t), filepath.Join(t.TempDir(), "log"))
	if _, err := caddy.ActiveContext().AppIfConfigured("http"); !errors.Is(err, caddy.ErrNotConfigured) {
		t.Errorf("error %v, want %v", err, caddy.ErrNotConfigured)
	}
}

var (
	_ caddy.App         = (*failing)(nil)
	_ caddy.Provisioner = (*failing)(nil)
)

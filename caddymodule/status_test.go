package caddymodule

import (
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/scoperule"
	"github.com/rekall-ai/gateway/test/eventually"
)

// fields returns the names of the fields in a JSON value, with "[]" for the elements of a list.
func fields(prefix string, value any) map[string]bool {
	names := map[string]bool{}
	switch value := value.(type) {
	case map[string]any:
		for name, field := range value {
			name = strings.TrimPrefix(prefix+"."+name, ".")
			names[name] = true
			maps.Copy(names, fields(name, field))
		}
	case []any:
		for _, element := range value {
			maps.Copy(names, fields(prefix+"[]", element))
		}
	}
	return names
}

// documentedFields are those in the page's table of the status.
func documentedFields(t *testing.T) []string {
	t.Helper()
	page, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(page), "\n## Status\n")
	if !found {
		t.Fatal("the page has no section about the status")
	}
	var names []string
	for line := range strings.Lines(section) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 {
			continue
		}
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
			names = append(names, name[1])
		}
	}
	slices.Sort(names)
	return names
}

// newRuntimeOn returns a running runtime that has synced and reported itself.
func newRuntimeOn(t *testing.T, database string) *runtime {
	t.Helper()
	return newRuntimeWith(t, settings{database: database})
}

// newRuntimeWith returns a runtime of the settings given; the others are a test's.
func newRuntimeWith(t *testing.T, s settings) *runtime {
	t.Helper()
	s.refresh, s.listen, s.maxStaleness, s.cacheSize = 50*time.Millisecond, true, 30*time.Second, 100
	s.edgeName, s.edgeRegion, s.usageFlush, s.usageRetention = "eu-1", "eu", time.Second, 24*time.Hour
	rt, err := newRuntime(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(rt.close)
	rt.start(zap.NewNop())
	return rt
}

// TestStatusHasTheFieldsOfItsPage: what monitors read must not be renamed unseen, nor stay unexplained.
func TestStatusHasTheFieldsOfItsPage(t *testing.T) {
	database := pgtest.Migrated(t)
	rt := newRuntimeOn(t, database)
	var s runtimeStatus
	eventually.Within(t, 30*time.Second, "the edge is ready and counts edges", func() bool {
		s = rt.status(t.Context())
		return s.Ready && s.Edges != nil
	})
	if s.Schema == nil || *s.Schema != keystore.KnownSchemaVersion() || s.Sync.LastGoodAt == nil || s.Sync.Position == 0 || s.Cache.Size != 100 ||
		s.Edge.Name != "eu-1" || *s.Edges != (edgeCount{Live: 1}) || s.LastError != nil {
		t.Errorf("status %+v", s)
	}
	unknown := apikey.Hash(apikey.Generate(apikey.Production))
	for range 2 {
		if _, err := rt.cache.Find(t.Context(), unknown); err != nil {
			t.Fatal(err)
		}
	}
	if l := rt.status(t.Context()).Lookups; l.Total == 0 || l.Errors != 0 {
		t.Errorf("lookups %+v", l)
	}
	registry := prometheus.NewPedanticRegistry()
	if err := rt.metrics.register(registry); err != nil {
		t.Fatal(err)
	}
	if live, closed := gathered(t, registry, "rekall_edges", "live"), gathered(t, registry, "rekall_edges", "fail-closed"); live != 1 || closed != 0 {
		t.Errorf("the metrics tell of %v live edges and %v that are fail-closed", live, closed)
	}
	s.LastError = new(lastError) // for its fields: nothing has failed
	text, err := json.Marshal(status{Runtimes: []runtimeStatus{s}})
	if err != nil {
		t.Fatal(err)
	}
	var value map[string]any
	if err := json.Unmarshal(text, &value); err != nil {
		t.Fatal(err)
	}
	names := fields("", value)
	for name := range names { // an object has no line of its own, unless it may be missing
		if strings.HasSuffix(name, "versions") || slices.Contains([]string{"runtimes", "runtimes[].edge", "runtimes[].sync", "runtimes[].cache", "runtimes[].lookups", "runtimes[].requests"}, name) {
			delete(names, name)
		}
	}
	if diff := cmp.Diff(documentedFields(t), slices.Sorted(maps.Keys(names))); diff != "" {
		t.Errorf("fields (-page +status)\n%s", diff)
	}
}

// TestStatusIsToldWhilePostgresIsAway, with what went wrong, and without the password.
func TestStatusIsToldWhilePostgresIsAway(t *testing.T) {
	rt := newRuntimeOn(t, "postgres://rekall:hunter2@127.0.0.1:1/none?connect_timeout=1")
	var s runtimeStatus
	eventually.Within(t, 30*time.Second, "a failure is told", func() bool {
		s = rt.status(t.Context())
		return s.LastError != nil && s.Sync.ListenErrors > 0
	})
	if s.Sync.Listens != 0 {
		t.Errorf("sync %+v", s.Sync)
	}
	if s.Ready || s.Schema != nil || s.Edges != nil || s.Sync.LastGoodAt != nil || s.Sync.AgeSeconds != nil || time.Since(s.LastError.At) > time.Minute || s.LastError.Message == "" {
		t.Errorf("status %+v, last error %+v", s, s.LastError)
	}
	if strings.Contains(s.LastError.Message, "hunter2") {
		t.Error("the last error shows the password")
	}
}

// TestProbesAreReadOnly: neither the admin endpoint's nor a site's may be taken for something that acts.
func TestProbesAreReadOnly(t *testing.T) {
	for _, route := range (Admin{}).Routes() {
		w := httptest.NewRecorder()
		if err := route.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodPost, route.Pattern, nil)); err != nil {
			t.Fatal(err)
		}
		if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "GET, HEAD" || !strings.Contains(w.Body.String(), "METHOD_NOT_ALLOWED") {
			t.Errorf("POST %s: %d, Allow %q, %q", route.Pattern, w.Code, w.Header().Get("Allow"), w.Body)
		}
	}
}

// TestRequestThatReachesTheGatewayAfterItsRuntimeHasEndedIsRefused: a reload has changed an option while another handler held it up.
func TestRequestThatReachesTheGatewayAfterItsRuntimeHasEndedIsRefused(t *testing.T) {
	database, store := openStore(t)
	rt := newRuntimeOn(t, database)
	eventually.Within(t, 30*time.Second, "the first sync", func() bool { return rt.cache.Status().Fresh })
	key, _, err := keyadmin.New(store).Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "n", Account: "a", Environment: "production", Scopes: []string{"memories:read"},
	})
	if err != nil {
		t.Fatal(err)
	}
	eventually.Within(t, 30*time.Second, "the feed brings the key", func() bool { return rt.cache.Cached(apikey.Hash(key.Key.Reveal())) })
	rules, err := scoperule.New(scoperule.Builtin()...)
	if err != nil {
		t.Fatal(err)
	}
	g := &Gateway{
		draining: new(atomic.Bool), rules: rules, cache: rt.cache, metrics: newMetrics(), upstreams: new(upstreams), usage: rt.usage,
		logger: zap.NewNop(), production: block{chain: passing{}},
	}
	if answer := g.serve(t, bearerRequest(key.Key.Reveal())); answer.Code != http.StatusNoContent {
		t.Errorf("while it runs: %d", answer.Code)
	}
	rt.close()
	if answer := g.serve(t, bearerRequest(key.Key.Reveal())); answer.Code != http.StatusServiceUnavailable {
		t.Errorf("when it has ended: %d", answer.Code)
	}
}

// TestStatusShowsNoKeyOfAnError: Postgres quotes in its errors what they are about.
func TestStatusShowsNoKeyOfAnError(t *testing.T) {
	database := pgtest.Migrated(t)
	rt := newRuntimeOn(t, database)
	m, err := newManagement(database)
	if err != nil {
		t.Fatal(err)
	}
	m.failures.Keep(errors.New("invalid input: " + apikey.Generate(apikey.Production)))
	managements.LoadOrStore(t.Name(), m)
	t.Cleanup(func() { _, _ = managements.Delete(t.Name()) })
	last := rt.status(t.Context()).LastError
	if last == nil || !strings.HasPrefix(last.Message, "invalid input: ") || apikey.ContainsKey(last.Message) {
		t.Errorf("last error %+v", last)
	}
}

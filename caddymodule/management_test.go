package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	zaplog "go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// keysRig is rekall_keys for the person ann@acme, before a database that the edge does not share.
type keysRig struct {
	*Keys
	t    *testing.T
	logs *zaplog.ObservedLogs
}

func newKeysRig(t *testing.T, database string) *keysRig {
	t.Helper()
	core, logs := zaplog.New(zap.DebugLevel)
	k := &Keys{
		Account: "acme", User: "{http.auth.user.id}", Database: database, app: new(App), metrics: newMetrics(), logger: zap.New(core),
		crossOrigin: http.NewCrossOriginProtection(),
	}
	m, err := k.management(k.app)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Cleanup(); err != nil {
			t.Error(err)
		}
		m.close() // now, and not when its last requests must have their answers
	})
	k.manageWith(m, nil)
	return &keysRig{k, t, logs}
}

func (r *keysRig) ask(ctx context.Context, method, path string, body io.Reader, status int) {
	r.t.Helper()
	replacer := caddy.NewReplacer()
	replacer.Set("http.auth.user.id", "ann")
	ctx = context.WithValue(context.WithValue(ctx, caddy.ReplacerCtxKey, replacer), caddyhttp.VarsCtxKey, map[string]any{})
	req, w := httptest.NewRequestWithContext(ctx, method, path, body), httptest.NewRecorder()
	req.Header.Set("Content-Type", "application/json")
	if err := r.ServeHTTP(w, req, nil); err != nil {
		r.t.Fatal(err)
	}
	if w.Code != status {
		r.t.Errorf("%s %s: %d, want %d\n%s", method, path, w.Code, status, w.Body)
	}
}

func (r *keysRig) errors() float64 {
	r.t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(r.metrics.keysErrors)
	families, err := registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	return families[0].GetMetric()[0].GetCounter().GetValue()
}

// told is what the log says to those who do not debug, but for reports.
func (r *keysRig) told() string {
	var lines []string
	for _, line := range r.logs.Filter(func(l zaplog.LoggedEntry) bool {
		return l.Level > zap.DebugLevel && l.Message != "keys were reported as leaked"
	}).All() {
		lines = append(lines, line.Level.String()+" "+line.Message)
	}
	return strings.Join(lines, "\n")
}

const (
	apiPath     = "/v1/api-keys"
	leakedPath  = apiPath + "/leaked"
	pagePath    = "/settings/api-keys"
	unknownPath = apiPath + "/key_0000000000000000000000"
	beginning   = "error API keys cannot be managed"
	ending      = "info API keys can be managed again"
)

// report is of a key that looks like one, and must be looked for.
func report() io.Reader {
	return strings.NewReader(`{"keys": ["` + apikey.Generate(apikey.Production) + `"]}`)
}

func TestErrorOfTheManagingDatabaseIsToldWithoutTheKeyInIt(t *testing.T) {
	r := newKeysRig(t, pgtest.URL(t))
	ctx, key := asking(t.Context()), apikey.Generate(apikey.Production)
	asks(ctx)
	r.answered(httptest.NewRequestWithContext(ctx, "GET", apiPath, nil), errors.New("statement failed: "+key))
	if last := r.managed.failures.Last(); r.told() != beginning || apikey.ContainsKey(last.Err.Error()) ||
		apikey.ContainsKey(fmt.Sprint(r.logs.All()[0].ContextMap())) {
		t.Errorf("the log tells %v, the status %v", r.logs.All(), last)
	}
}

// TestEndOfAConfigurationIsNoOutageOfTheManagingDatabase: it may end before its database has answered for the first time.
func TestEndOfAConfigurationIsNoOutageOfTheManagingDatabase(t *testing.T) {
	r := newKeysRig(t, pgtest.URL(t))
	r.managed.cancel()
	r.managed.check(r.logger)
	r.managed.running.Wait()
	if told := r.told(); told != "" || r.managed.failures.Last() != nil {
		t.Errorf("told %q", told)
	}
}

func TestOutageOfTheManagingDatabaseIsLoggedOnceAndCountedWithEachRequestByApiAndDashboard(t *testing.T) {
	database := migrated(t)
	r := newKeysRig(t, database)
	r.ask(t.Context(), "GET", apiPath, nil, http.StatusOK)
	r.ask(t.Context(), "GET", pagePath, nil, http.StatusOK)
	if told := r.told(); told != "" || r.errors() != 0 {
		t.Errorf("while all is well: %v errors, %s", r.errors(), told)
	}
	pgtest.Exec(t, database, "alter schema rekall rename to away")
	for range 3 {
		r.ask(t.Context(), "GET", apiPath, nil, http.StatusServiceUnavailable)
		r.ask(t.Context(), "GET", pagePath, nil, http.StatusServiceUnavailable)
		r.ask(t.Context(), "POST", leakedPath, report(), http.StatusServiceUnavailable)
	}
	if told := r.told(); told != beginning || r.errors() != 9 {
		t.Errorf("%v errors, want 9; told %s", r.errors(), told)
	}
	if n := r.logs.FilterLevelExact(zap.DebugLevel).Len(); n != 9 {
		t.Errorf("%d lines for those who debug, want 9", n)
	}
	if last := r.managed.failures.Last(); last == nil || !strings.Contains(last.Err.Error(), "rekall-gateway migrate") {
		t.Errorf("last failure %v", last)
	}
}

func TestOutageOfTheManagingDatabaseEndsWithASuccessOfARequestThatAskedItAndWithNothingElse(t *testing.T) {
	r := newKeysRig(t, migrated(t))
	r.managed.trouble.metAt.Store(int64(now()) - int64(troubleOver))
	r.ask(t.Context(), "GET", apiPath+"/openapi.json", nil, http.StatusOK)
	r.ask(t.Context(), "POST", leakedPath, strings.NewReader(`{"keys": ["none"]}`), http.StatusAccepted)
	r.ask(t.Context(), "GET", pagePath+"/new", nil, http.StatusOK)
	r.ask(t.Context(), "GET", pagePath+"/sign-in", nil, http.StatusSeeOther)
	r.ask(t.Context(), "GET", unknownPath, nil, http.StatusNotFound) // which has asked
	r.ask(t.Context(), "POST", apiPath, strings.NewReader(`{`), http.StatusBadRequest)
	r.ask(t.Context(), "POST", apiPath, strings.NewReader(`{}`), http.StatusUnprocessableEntity)
	gone, leave := context.WithCancel(t.Context())
	leave()
	r.ask(gone, "GET", apiPath, nil, http.StatusServiceUnavailable)
	if told := r.told(); told != "" {
		t.Errorf("ended by what says nothing of the database: %s", told)
	}
	r.ask(t.Context(), "POST", leakedPath, report(), http.StatusAccepted)
	if told := r.told(); told != ending {
		t.Errorf("told %s", told)
	}
	r.managed.trouble.metAt.Store(int64(now()) - int64(troubleOver))
	r.ask(t.Context(), "GET", pagePath, nil, http.StatusOK)
	if told := r.told(); told != ending+"\n"+ending {
		t.Errorf("told %s", told)
	}
}

// slowBody comes as its client's time is over.
type slowBody struct {
	ctx context.Context
	io.Reader
}

func (b slowBody) Read(p []byte) (int, error) {
	<-b.ctx.Done()
	return b.Reader.Read(p)
}

func TestClientsBeginNoOutageOfTheManagingDatabase(t *testing.T) {
	database := migrated(t)
	r := newKeysRig(t, database)
	gone, leave := context.WithCancel(t.Context())
	leave()
	late, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	for range 3 {
		r.ask(t.Context(), "GET", unknownPath, nil, http.StatusNotFound)
		r.ask(t.Context(), "POST", apiPath, strings.NewReader(`{}`), http.StatusUnprocessableEntity)
		r.ask(gone, "GET", apiPath, nil, http.StatusServiceUnavailable)
		r.ask(gone, "GET", pagePath, nil, http.StatusServiceUnavailable)
		r.ask(late, "POST", leakedPath, slowBody{late, report()}, http.StatusServiceUnavailable)
	}
	if told := r.told(); told != "" || r.errors() != 0 || r.managed.failures.Last() != nil {
		t.Errorf("%v errors, last %v, told %s", r.errors(), r.managed.failures.Last(), told)
	}
	holdTable(t, database)
	r.ask(t.Context(), "GET", apiPath, nil, http.StatusServiceUnavailable) // for which the database has had its time
	if told := r.told(); told != beginning || r.errors() != 1 {
		t.Errorf("of a database that does not answer: %v errors, told %s", r.errors(), told)
	}
}

// holdTable has whoever reads keys wait until the test ends.
func holdTable(t *testing.T, database string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	if _, err := conn.Exec(t.Context(), "begin; lock table rekall.api_keys"); err != nil {
		t.Fatal(err)
	}
}

// TestDatabaseThatReadsAndDoesNotWriteIsLoggedOnce: each list would end the outage, and each new key begin it.
func TestDatabaseThatReadsAndDoesNotWriteIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newKeysRig(t, "postgres://h/d")
		for range 100 {
			r.managed.note(r.logger, errors.New("read-only"))
			r.managed.note(r.logger, nil)
		}
		if told := r.told(); told != beginning {
			t.Errorf("told %s", told)
		}
		<-time.After(troubleOver)
		r.managed.note(r.logger, nil)
		if told := r.told(); told != beginning+"\n"+ending {
			t.Errorf("when it writes again: told %s", told)
		}
	})
}

func TestDatabaseThatKeysCannotBeManagedInIsToldAtTheStartWithWhatToDo(t *testing.T) {
	database := migrated(t)
	roles := keystore.Roles{Edge: pgtest.Role(t, database), Admin: pgtest.Role(t, database)}
	if _, _, err := keystore.MigrateAndGrant(t.Context(), database, roles); err != nil {
		t.Fatal(err)
	}
	readOnly := pgtest.Login(t, database, roles.Admin)
	reader, err := url.Parse(readOnly)
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, database, "alter role "+reader.User.Username()+" set default_transaction_read_only = on")
	for name, test := range map[string]struct{ database, because string }{
		"a managing user":       {pgtest.Login(t, database, roles.Admin), ""},
		"the owner":             {database, ""},
		"an edge's user":        {pgtest.Login(t, database, roles.Edge), "--admin-role"},
		"no schema":             {pgtest.URL(t), `run "rekall-gateway migrate"`},
		"a database to read":    {readOnly, "read-only transaction"},
		"nobody at the address": {"postgres://rekall:hunter2@127.0.0.1:1/none", "connection refused"},
	} {
		r := newKeysRig(t, test.database)
		r.managed.check(r.logger)
		r.managed.running.Wait()
		if test.because == "" {
			if told := r.told(); told != "" || r.managed.failures.Last() != nil {
				t.Errorf("%s: told %s", name, told)
			}
			continue
		}
		const warning = "warn API keys cannot be managed: look at the database of rekall_keys, at the role of its user and at its schema"
		if told := r.told(); told != warning {
			t.Errorf("%s: told %s", name, told)
			continue
		}
		because := r.logs.All()[0].ContextMap()["error"].(string)
		if !strings.Contains(because, test.because) || strings.Contains(because, "hunter2") {
			t.Errorf("%s: %s", name, because)
		}
	}
}

func TestStartDoesNotWaitForTheManagingDatabase(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // which takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	r := newKeysRig(t, "postgres://rekall@"+silent.Addr().String()+"/none")
	r.managed.check(r.logger)
	if told := r.told(); told != "" {
		t.Errorf("it has waited until: %s", told)
	}
}

// TestReloadTellsAgainOfADatabaseThatKeysCannotBeManagedIn, and the status does, though the edge's own database is as it should be.
func TestReloadTellsAgainOfADatabaseThatKeysCannotBeManagedIn(t *testing.T) {
	log, database := filepath.Join(t.TempDir(), "log"), migrated(t)
	run(t, database, log)
	config := configure(t, database, log, map[string]any{}, map[string]any{"http": map[string]any{"servers": map[string]any{"srv": map[string]any{
		"listen": []string{"127.0.0.1:0"},
		"routes": []any{map[string]any{"handle": []any{
			map[string]any{"handler": "rekall_keys", "database": pgtest.URL(t)},
		}}},
	}}}})
	for n := range 2 {
		if err := caddy.Load(config, true); err != nil {
			t.Fatal(err)
		}
		eventually.True(t, "the log tells", func() bool {
			return strings.Count(process.Read(t, log), "API keys cannot be managed: look at the database of rekall_keys") == n+1
		})
	}
	if s := runtimesInUse()[0].status(t.Context()); s.LastError == nil || !strings.Contains(s.LastError.Message, "rekall-gateway migrate") {
		t.Errorf("last error %+v", s.LastError)
	}
}

func TestRequestsInFlightAtAReloadStillHaveTheirDatabase(t *testing.T) {
	t.Parallel()
	database := pgtest.Migrated(t)
	m, err := newManagement(database)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Destruct(); err != nil {
		t.Fatal(err)
	}
	if err := m.admin.Ready(t.Context()); err != nil {
		t.Errorf("a request of the former configuration: %v", err)
	}
	eventually.True(t, "the connections are closed", func() bool { return m.admin.Ready(t.Context()) != nil })
}

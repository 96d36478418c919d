package caddymodule

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	zaplog "go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// TestTroubleOfTheBackendsIsLoggedOnceWhenItBeginsAndOnceWhenItEnds: at a thousand requests a second, a line for each would push out of
// the log what tells why.
func TestTroubleOfTheBackendsIsLoggedOnceWhenItBeginsAndOnceWhenItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := true
		record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
		backend := caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
			if away {
				return caddyhttp.Error(http.StatusBadGateway, errors.New("connection refused"))
			}
			w.WriteHeader(http.StatusOK)
			return nil
		})
		g := gatewayOn(t, &followed{cutWhileTracking: cutWhileTracking{record: record}}, backend)
		core, logs := zaplog.New(zap.DebugLevel)
		g.logger = zap.New(core)
		ask := func(isAway bool, want int) {
			t.Helper()
			away = isAway
			for range 100 {
				if w := g.serve(t, bearerRequest(apikey.Generate(apikey.Production))); w.Code != want {
					t.Fatalf("answer %d, want %d", w.Code, want)
				}
			}
		}
		ask(true, http.StatusBadGateway)
		ask(false, http.StatusOK) // of another backend, perhaps
		ask(true, http.StatusBadGateway)
		<-time.After(troubleOver)
		ask(false, http.StatusOK)

		if !g.upstreams[apikey.Sandbox].met() {
			t.Error("trouble of one environment hides that of the other")
		}

		var told []string
		for _, line := range logs.FilterLevelExact(zap.DebugLevel).All() {
			if line.Message != "upstream unavailable" {
				t.Errorf("logged %q", line.Message)
			}
		}
		for _, line := range logs.Filter(func(l zaplog.LoggedEntry) bool { return l.Level > zap.DebugLevel }).All() {
			told = append(told, line.Level.String()+" "+line.Message+" "+line.ContextMap()["environment"].(string))
		}
		if want := []string{"error upstream unavailable production", "info upstream answers again production"}; !slices.Equal(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
		if n := logs.FilterLevelExact(zap.DebugLevel).Len(); n != 199 {
			t.Errorf("%d lines for those who debug, want 199", n)
		}
	})
}

// TestLogNamesTheBackendThatWasAskedAndNoOther: a proxy in front, such as forward_auth, chooses one as well.
func TestLogNamesTheBackendThatWasAskedAndNoOther(t *testing.T) {
	record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
	for status, want := range map[int]any{http.StatusBadGateway: "prod-1:8080", http.StatusGatewayTimeout: "prod-1:8080", http.StatusServiceUnavailable: nil} {
		g := gatewayOn(t, &followed{cutWhileTracking: cutWhileTracking{record: record}}, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			return caddyhttp.Error(status, errors.New("no answer"))
		}))
		core, logs := zaplog.New(zap.DebugLevel)
		g.logger = zap.New(core)
		chosen := caddy.NewReplacer()
		chosen.Set("http.reverse_proxy.upstream.hostport", "prod-1:8080")
		r := bearerRequest(apikey.Generate(apikey.Production))
		g.serve(t, r.WithContext(context.WithValue(r.Context(), caddy.ReplacerCtxKey, chosen)))
		if got := logs.All()[0].ContextMap()["upstream"]; got != want {
			t.Errorf("%d: the log names %v, want %v", status, got, want)
		}
	}
}

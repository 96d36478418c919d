package test

import (
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

// newRigWithStandby is a rig on a primary that has a hot standby.
func newRigWithStandby(t *testing.T) (*rig, *devenv.Postgres) {
	t.Helper()
	primary := pgtest.Server(t)
	r := newRigOn(t, primary.URL())
	standby, err := primary.StartStandby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = standby.Stop(t.Context()) })
	return r, standby
}

// TestStandbyWhoseReplayIsPausedIsNotTrusted: it answers every question, and looks healthy.
func TestStandbyWhoseReplayIsPausedIsNotTrusted(t *testing.T) {
	t.Parallel()
	r, standby := newRigWithStandby(t)
	g := r.start(standardSite, "read_database "+standby.URL(), "refresh 100ms", "max_staleness "+faultBound.String())

	good, bad := r.key("production", "memories:read"), r.key("production", "memories:read")
	g.do("GET", "/v1/memories", bearer(good)).wantCode(t, 200, "") // its first request, replayed or not
	g.do("GET", "/v1/memories", bearer(bad)).wantCode(t, 200, "")
	gone := r.key("production", "memories:read")
	g.do("GET", "/v1/memories", bearer(gone)).wantCode(t, 200, "")
	r.revoke(gone.ID)
	eventually.True(t, "a revocation arrives by replication", func() bool {
		return g.ask(gone) == "API_KEY_REVOKED"
	})

	pgtest.Exec(t, standby.URL(), "select pg_wal_replay_pause()")
	r.revoke(bad.ID)
	revoked := time.Now()
	eventually.True(t, "nobody can tell", func() bool {
		began := time.Now()
		code := g.ask(bad)
		if code == "" && began.Sub(revoked) > faultBound {
			t.Fatal("a revoked key was let in past the bound")
		}
		return code == "AUTH_UNAVAILABLE" && g.ask(good) == "AUTH_UNAVAILABLE"
	})

	eventually.True(t, "it says that it is fail-closed, though it reports to the primary", func() bool {
		edges, err := r.admin.Edges(t.Context())
		return err == nil && len(edges) == 1 && edges[0].Status == keyadmin.FailClosed && edges[0].AgeSeconds > faultBound.Seconds()
	})

	pgtest.Exec(t, standby.URL(), "select pg_wal_replay_resume()")
	eventually.True(t, "the good key works again", func() bool {
		code := g.ask(good)
		if code != "" && code != "AUTH_UNAVAILABLE" && code != "cut" {
			t.Fatalf("a good key got %s", code)
		}
		return code == ""
	})
	eventually.True(t, "the revocation arrives", func() bool {
		return g.ask(bad) == "API_KEY_REVOKED"
	})
}

// TestUnknownKeysAreRefusedAsSuchWhereAStandbyIsRead: in a flood the feed proves that they do not exist, which a standby can only with a
// report made since. "Cannot tell" would page somebody.
func TestUnknownKeysAreRefusedAsSuchWhereAStandbyIsRead(t *testing.T) {
	t.Parallel()
	r, standby := newRigWithStandby(t)
	g := r.start(standardSite, "read_database "+standby.URL())
	r.key("production", "memories:read")
	eventually.True(t, "the filter is built", func() bool { return g.series(t, "rekall_filter_keys") > 0 })
	var clients sync.WaitGroup
	for range 10 {
		clients.Go(func() {
			for range 10 {
				header := http.Header{"X-Api-Key": {apikey.Generate(apikey.Production)}}
				eventually.True(t, "it is refused", func() bool {
					answer := g.doOnce("GET", "/v1/memories", header)
					if answer.StatusCode == http.StatusServiceUnavailable { // nobody can tell while a report that proves it is on its way
						answer.wantCode(t, http.StatusServiceUnavailable, "AUTH_UNAVAILABLE")
						return false
					}
					answer.wantCode(t, http.StatusUnauthorized, "API_KEY_INVALID")
					return true
				})
			}
		})
	}
	clients.Wait()
	if lag := g.series(t, "rekall_sync_lag_seconds"); lag <= 0 { // the report that it has was made before it was read
		t.Errorf("the standby is %v s behind", lag)
	}
	if n := g.series(t, "rekall_listen_errors_total"); n != 0 {
		t.Errorf("the standby was asked to notify, and refused %v times", n)
	}
}

func TestStandbyAsTheOnlyDatabaseIsRefused(t *testing.T) {
	t.Parallel()
	primary := pgtest.Server(t)
	r := newRigOn(t, primary.URL())
	key := r.key("production", "memories:read")
	standby, err := primary.StartStandby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = standby.Stop(t.Context()) })
	g := r.prepare(standardSite)
	g.run(standby.URL())
	eventually.True(t, "the gateway serves", func() bool {
		_, err := client.Get(g.admin + "/rekall/live")
		return err == nil
	})
	eventually.True(t, "it says why", func() bool { return strings.Contains(g.log.String(), "database is a standby") })
	g.doOnce("GET", "/v1/memories", bearer(key)).wantCode(t, 503, "AUTH_UNAVAILABLE")
}

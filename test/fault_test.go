package test

import (
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// edgeStatus is what /rekall/status says of one runtime.
type edgeStatus struct {
	Ready          bool    `json:"ready"`
	Epoch          uint64  `json:"epoch"`
	SyncAgeSeconds float64 `json:"sync_age_seconds"`
	InFlight       int     `json:"in_flight"`
	Lookups        uint64  `json:"lookups"`
}

func (g *gateway) status() edgeStatus {
	g.t.Helper()
	var s struct {
		Runtimes []edgeStatus `json:"runtimes"`
	}
	if err := json.Unmarshal([]byte(do(g.t, "GET", g.admin+"/rekall/status", nil, nil).body), &s); err != nil || len(s.Runtimes) != 1 {
		g.t.Fatalf("status %+v, %v", s, err)
	}
	return s.Runtimes[0]
}

// reload loads the same Caddyfile again.
func (g *gateway) reload() {
	g.t.Helper()
	file, err := os.Open(g.file)
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	answer := do(g.t, "POST", g.admin+"/load", http.Header{"Content-Type": {"text/caddyfile"}, "Cache-Control": {"must-revalidate"}}, file)
	if answer.StatusCode != http.StatusOK {
		g.t.Fatalf("reload: %d %s", answer.StatusCode, answer.body)
	}
}

func TestGatewayThatWasStoppedPastTheBoundAnswersNothingFromOldData(t *testing.T) {
	r := newRig(t)
	g := r.start(standardSite, "refresh 100ms", "max_staleness 1s")
	key := r.key("production", "memories:read")
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	if err := g.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	r.revoke(key.ID)
	var answers [20]func() reply
	for i := range answers { // they wait in the listener's queue
		answers[i] = async(t, "GET", g.http+"/v1/memories", bearer(key), nil)
	}
	eventually(t, "the bound has passed", func() bool { return time.Since(stopped) > 1500*time.Millisecond })
	if err := g.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for _, answer := range answers {
		if a := answer(); a.StatusCode == http.StatusOK {
			t.Fatal("a key revoked past the bound was let in")
		}
	}
	eventually(t, "the refusal is certain", func() bool {
		return g.do("GET", "/v1/memories", bearer(key)).code(t) == "API_KEY_REVOKED"
	})
}

// TestOutage walks through Postgres stalling, being killed and coming back, with a stream open and good and revoked keys.
func TestOutageNeverTurnsAGoodKeyAwayAsBadNorLetsARevokedOneIn(t *testing.T) {
	for name, fault := range map[string]struct{ begin, end func(*testing.T, *faultRig) }{
		"stalled": {func(_ *testing.T, f *faultRig) { f.server.Pause() }, func(_ *testing.T, f *faultRig) { f.server.Resume() }},
		"killed": {func(_ *testing.T, f *faultRig) { f.server.Kill() }, func(t *testing.T, f *faultRig) {
			if err := f.server.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFaultRig(t)
			fault.begin(t, f)
			f.g.do("GET", "/v1/memories", bearer(f.key)).wantCode(t, 200, "") // a short outage passes unnoticed
			cold := f.g.do("GET", "/v1/memories", bearer(f.cold))
			cold.wantCode(t, 503, "AUTH_UNAVAILABLE")
			if cold.Header.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
			}
			f.g.do("GET", "/v1/memories", bearer(f.revoked)).wantCode(t, 401, "API_KEY_REVOKED")
			eventually(t, "the bound has passed", func() bool {
				code := f.g.do("GET", "/v1/memories", bearer(f.key)).code(t)
				if code != "" && code != "AUTH_UNAVAILABLE" {
					t.Fatalf("a good key got %s", code)
				}
				return code == "AUTH_UNAVAILABLE"
			})
			ends(t, f.stream)
			if ready := do(t, "GET", f.g.admin+"/rekall/ready", nil, nil); ready.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("ready answers %d past the bound", ready.StatusCode)
			}
			fault.end(t, f)
			eventually(t, "the good key works again", func() bool {
				code := f.g.do("GET", "/v1/memories", bearer(f.key)).code(t)
				if code != "" && code != "AUTH_UNAVAILABLE" {
					t.Fatalf("a good key got %s", code)
				}
				return code == ""
			})
			f.g.do("GET", "/v1/memories", bearer(f.revoked)).wantCode(t, 401, "API_KEY_REVOKED")
			eventually(t, "the log says that it is over", func() bool { return strings.Contains(f.g.log.String(), "key sync works again") })
			if n := strings.Count(f.g.log.String(), "key sync failed"); n != 1 {
				t.Errorf("the log says %d times that the sync failed, want once", n)
			}
		})
	}
}

// faultRig has a Postgres of its own, to be hurt, and a gateway that knows some of its keys.
type faultRig struct {
	*rig
	server             *devenv.Postgres
	g                  *gateway
	key, revoked, cold keyadmin.Key // cold has never been used
	stream             *http.Response
}

func newFaultRig(t *testing.T) *faultRig {
	t.Helper()
	f := &faultRig{server: pgtest.Server(t)}
	f.rig = newRigOn(t, f.server.URL())
	f.key, f.revoked, f.cold = f.rig.key("production", "memories:read"), f.rig.key("production", "memories:read"), f.rig.key("production", "memories:read")
	f.g = f.start(standardSite, "refresh 100ms", "max_staleness 3s")
	f.g.do("GET", "/v1/memories", bearer(f.key)).wantCode(t, 200, "")
	f.g.do("GET", "/v1/memories", bearer(f.revoked)).wantCode(t, 200, "")
	f.stream = f.g.open("GET", "/v1/memories", demo(f.key, "sse"), nil)
	f.revoke(f.revoked.ID)
	eventually(t, "the revocation holds", func() bool {
		return f.g.do("GET", "/v1/memories", bearer(f.revoked)).code(t) == "API_KEY_REVOKED"
	})
	return f
}

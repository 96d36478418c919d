package test

import (
	"net/http"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/network"
)

const healthSite = `
http://:PORT {
	bind 127.0.0.1
	log
	handle {
		rekall_gateway {
			production {
				reverse_proxy PRODUCTION
			}
		}
	}
	rekall_health
}
`

func TestSiteAnswersTheProbesAndGivesNothingElseAway(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := r.key("production", "memories:read")
	g := r.start(healthSite)
	unknown := http.Header{"Authorization": {"Bearer " + apikey.Generate(apikey.Production)}}
	for _, header := range []http.Header{nil, bearer(key), unknown} { // some load balancers cannot leave theirs out
		for path, body := range map[string]string{"/rekall/live": `{"live":true}`, "/rekall/ready": `{"ready":true}`, "/rekall/ready?verbose=1": `{"ready":true}`} {
			if answer := g.do("GET", path, header); answer.StatusCode != http.StatusOK || answer.body != body+"\n" || answer.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s: %d %q", path, answer.StatusCode, answer.body)
			}
		}
	}
	if answer := g.do("HEAD", "/rekall/ready", nil); answer.StatusCode != http.StatusOK || answer.body != "" {
		t.Errorf("HEAD: %d %q", answer.StatusCode, answer.body)
	}
	if answer := g.do("POST", "/rekall/ready", nil); answer.StatusCode != http.StatusMethodNotAllowed || answer.code(t) != "METHOD_NOT_ALLOWED" {
		t.Errorf("POST: %d %q", answer.StatusCode, answer.body)
	}
	for _, path := range []string{"/rekall/status", "/rekall", "/rekall/", "/rekall/ready/", "/rekall/READY", "/rekall/ready/x", "/v1/rekall/ready"} {
		g.do("GET", path, nil).wantCode(t, 401, "API_KEY_MISSING")
		g.do("GET", path, bearer(key)).wantCode(t, 403, "ROUTE_NOT_COVERED")
	}
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
}

// TestOutageShorterThanTheBoundDrainsNobody: only data that is really too old takes an edge out of service.
func TestOutageShorterThanTheBoundDrainsNobody(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	behind := *r
	var between *network.Link
	between, behind.database = network.To(t, r.database)
	g := behind.start(healthSite, "refresh 100ms", "max_staleness "+faultBound.String())
	probes := []string{g.admin + "/rekall/ready", g.http + "/rekall/ready"}
	between.Stall()
	inService, drained := 0, 0
	eventually.True(t, "the edge takes itself out of service", func() bool {
		drained = 0
		for _, probe := range probes {
			ready := do(t, "GET", probe, nil, nil).StatusCode == http.StatusOK
			// The age was less when the probe was answered: nothing synced in between.
			if age := g.status().SyncAgeSeconds; !ready && age < faultBound.Seconds() {
				t.Errorf("%s: not ready though the data was younger than %g s", probe, age)
			}
			if ready {
				inService++
			} else {
				drained++
			}
		}
		return drained == len(probes)
	})
	if inService == 0 {
		t.Error("the edge was out of service at once")
	}
	for _, probe := range probes {
		if answer := do(t, "GET", probe, nil, nil); answer.StatusCode != http.StatusServiceUnavailable || answer.body != `{"ready":false}`+"\n" {
			t.Errorf("%s: %d %q", probe, answer.StatusCode, answer.body)
		}
	}
	if answer := do(t, "GET", g.http+"/rekall/live", nil, nil); answer.StatusCode != http.StatusOK {
		t.Errorf("a live edge would be restarted: %d", answer.StatusCode)
	}
	between.Heal()
	eventually.True(t, "the edge is back in service", func() bool {
		for _, probe := range probes {
			if do(t, "GET", probe, nil, nil).StatusCode != http.StatusOK {
				return false
			}
		}
		return true
	})
}

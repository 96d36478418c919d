package caddymodule

import (
	"net/http"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/test/eventually"
)

// TestResetIsNeverToldTooEarly: who comes back at that second would be refused again.
func TestResetIsNeverToldTooEarly(t *testing.T) {
	for _, tc := range []struct {
		now, in time.Duration
		want    int64
	}{{0, time.Second, 101}, {1, time.Second, 102}, {0, 1, 101}, {time.Second - 1, 1, 101}, {0, 0, 100}} {
		if got := unixAfter(time.Unix(100, int64(tc.now)), tc.in); got != tc.want {
			t.Errorf("%v after 100 s and %v: %d, want %d", tc.in, tc.now, got, tc.want)
		}
	}
}

// TestBackendTellsNoLimitsOfAKeyThatHasNone: they would stand where the gateway tells those of other keys.
func TestBackendTellsNoLimitsOfAKeyThatHasNone(t *testing.T) {
	x := &exchange{gateway: &Gateway{limiter: new(ratelimit.Limiter)}, record: new(apikey.Record)}
	h := http.Header{}
	for _, name := range rateLimitHeaders {
		h.Set(name, "1")
	}
	if x.setLimitHeaders(h); len(h) > 0 {
		t.Errorf("headers %v", h)
	}
}

func TestEdgeHoldsKeysToItsPartOfTheirLimitsWhileTheStoreDoesNotAnswer(t *testing.T) {
	database := migrated(t)
	newRuntimeOn(t, database)
	rt := newRuntimeWith(t, settings{database: database, rateLimitStore: "redis://127.0.0.1:1"})
	rt.startLimiter()
	limit := ratelimit.Limit{PerMinute: 4, Burst: 101} // 100 at once
	eventually.Within(t, 30*time.Second, "the edge knows of the other and lets half through", func() bool {
		allowed := 0
		for key := apikey.Hash(apikey.RandomText(22)); allowed <= limit.Burst; allowed++ {
			if _, verdict := rt.limiter.Acquire(t.Context(), key, limit); !verdict.Allowed {
				break
			}
		}
		return allowed == 50
	})
}

package caddymodule

import (
	"net/http"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/ratelimit"
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

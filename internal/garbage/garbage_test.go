package garbage

import (
	"math"
	"runtime"
	"runtime/metrics"
	"testing"
	"time"
)

// collectUntil collects until Go's percentage is as wanted: it changes a moment after a collection.
func collectUntil(t *testing.T, what string, wanted func(percent uint64) bool) {
	t.Helper()
	samples := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		runtime.GC()
		if metrics.Read(samples); wanted(samples[0].Value.Uint64()) {
			return
		}
	}
	t.Errorf("%s: %d %%", what, samples[0].Value.Uint64())
}

func TestGarbageIsAnAmountAndNotAMultipleOfWhatIsInUse(t *testing.T) {
	t.Setenv("GOGC", "")
	Tune()
	collectUntil(t, "little in use", func(p uint64) bool { return p == maxPercent })
	ballast := make([]byte, maxHeadroom/3)
	collectUntil(t, "a third of the headroom in use", func(p uint64) bool { return p > 200 && p <= 300 })
	more := make([]byte, 2*maxHeadroom)
	collectUntil(t, "more than the headroom in use", func(p uint64) bool { return p == minPercent })
	runtime.KeepAlive(ballast)
	runtime.KeepAlive(more)
	collectUntil(t, "little in use again", func(p uint64) bool { return p == maxPercent })
}

func TestGarbageFollowsTheMemoryLimit(t *testing.T) {
	const mebi = 1 << 20
	for _, tc := range []struct {
		limit int64
		want  int // of 20 MiB in use
	}{{math.MaxInt64, 480}, {4096 * mebi, 480}, {2048 * mebi, 320}, {1024 * mebi, 240}, {256 * mebi, 240}} {
		if got := percent(20*mebi, tc.limit); got != tc.want {
			t.Errorf("limit %d: %d %%, want %d", tc.limit, got, tc.want)
		}
	}
}

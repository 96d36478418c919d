// Package eventually waits in tests for what comes by itself.
package eventually

import (
	"testing"
	"time"
)

// True waits until a condition holds, for a minute at most.
func True(t testing.TB, what string, condition func() bool) {
	t.Helper()
	Within(t, time.Minute, what, condition)
}

// Within waits until a condition holds. After limit the test has failed, unless the condition holds by then: the test may have stood still.
func Within(t testing.TB, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		last := time.Now().After(deadline)
		if condition() {
			return
		}
		if last {
			t.Fatalf("not within %s: %s", limit, what)
		}
		<-time.After(2 * time.Millisecond)
	}
}

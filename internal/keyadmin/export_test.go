package keyadmin

import (
	"testing"
	"time"
)

// WaitFor bounds waits by less than a minute until the test ends.
func WaitFor(t *testing.T, bound time.Duration) {
	before := waitFor
	waitFor = bound
	t.Cleanup(func() { waitFor = before })
}

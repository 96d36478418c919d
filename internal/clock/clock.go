// Package clock measures time that no clock may hide. Its test sets the clock of a gateway: test/clock_linux_test.go.
package clock

import "time"

// Age is the time from since to now, both of time.Now, on the clock that shows more of it: the monotonic clock stops while a machine
// is suspended, and the wall clock can be set back.
func Age(since, now time.Time) time.Duration {
	return max(now.Sub(since), time.Duration(now.UnixNano()-since.UnixNano()))
}

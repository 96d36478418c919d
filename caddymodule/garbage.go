package caddymodule

import (
	"os"
	"runtime/debug"
	"sync"
)

// gcPercent lets garbage grow to four times what is in use before it is collected. A gateway keeps little and discards
// much: with Go's default of 100 it spends 6 to 10 % of its time collecting. Caddy sets the memory limit to nine tenths of the
// container's, or the machine's, and near the limit Go collects as often as it must.
const gcPercent = 400

var tuneOnce sync.Once

// tuneGarbageCollector does so unless the operator has set GOGC. It belongs to the app, not to our main: a binary made by
// xcaddy has its own.
func tuneGarbageCollector() {
	tuneOnce.Do(func() {
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(gcPercent)
		}
	})
}

// Package garbage sets how much garbage lies between two collections.
//
// A gateway keeps little and discards much: with Go's default, as much garbage as is in use, it spends 6 to 10 % of its time
// collecting. A larger multiple would be too much for a gateway that keeps a million keys, or the connections of an attacker: so
// it is an amount, and follows the memory limit. Caddy sets that to nine tenths of the container's memory, or the machine's; near
// it Go collects as often as it must.
package garbage

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
)

// Bounds of the garbage between two collections, in bytes; between them it is a part, one in limitShare, of the memory limit. Where
// more is in use, it is as much as is in use.
const (
	minHeadroom = 48 << 20
	maxHeadroom = 96 << 20
	limitShare  = 32
)

const (
	minPercent = 100 // Go's default
	maxPercent = 800 // at the start, when nothing is known to be in use
)

var once sync.Once

// Tune has the process collect its garbage so, unless the operator has set GOGC.
func Tune() {
	once.Do(func() {
		if os.Getenv("GOGC") == "" {
			tune(0)
		}
	})
}

// tune adjusts the collector, whose percentage is current. It runs again after each collection, as the cleanup of an object to which
// nothing refers.
func tune(current int) {
	if p := percent(scanned(), debug.SetMemoryLimit(-1)); p < current*9/10 || p > current*11/10 { // each change stops the world for a moment
		current = p
		debug.SetGCPercent(p)
	}
	mark := new([16]byte) // a smaller one could share its memory with what lives on
	runtime.AddCleanup(mark, tune, current)
}

// scanned is what the last collection found in use, as Go's percentage counts it: https://go.dev/doc/gc-guide#GOGC.
func scanned() (sum int64) {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
	metrics.Read(samples)
	for _, s := range samples {
		sum += int64(s.Value.Uint64())
	}
	return sum
}

func percent(inUse, limit int64) int {
	headroom := min(max(limit/limitShare, minHeadroom), maxHeadroom)
	return int(min(max(100*headroom/max(inUse, 1), minPercent), maxPercent))
}

//go:build fleet && race

package fleet

// raceFlag builds the gateways with the race detector too.
var raceFlag = []string{"-race"}

//go:build fleet && !race

package fleet

var raceFlag []string

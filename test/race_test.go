//go:build race

package test

// raceFlag builds the gateway under test with the race detector too.
var raceFlag = []string{"-race"}

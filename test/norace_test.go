//go:build !race

package test

var raceFlag []string

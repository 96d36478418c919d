// Package test drives the built binary over TCP, as users, operators and attackers do: what no single package owns.
package test

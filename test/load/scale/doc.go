// Package scale measures what each thing that an edge does costs, from ten thousand keys in Postgres to ten million. It writes
// a table and a plot, scale.md and scale.svg, into test/load. It has a build tag, since it takes minutes and the machine:
//
//	REKALL_SCALE=10000,100000,1000000,10000000 go test -tags load -v -count 1 -timeout 60m ./test/load/scale
//
// REKALL_SCALE lists the numbers of keys; without it they are 10,000 and 100,000, and nothing is written.
package scale

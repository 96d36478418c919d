// Package fleet measures the promise that matters most: how long a revoked key is still allowed, at every edge of a fleet, while
// edges are killed, stopped and cut off from Postgres. It also counts what the fleet asks of Postgres.
//
// Edges are of two kinds: gateways, which are processes of the built binary that are asked over HTTP, and loops, which are the
// gateway's cache, sync loop and reporter in the test's own process, so that hundreds fit on one machine. Edges that are to
// be cut off reach Postgres through a link of their own.
//
// "Last allowed after commit" of a key at an edge is when the last request was sent that the edge allowed, counted from
// the moment at which the revoking statement was sent. It falls short of the truth by at most the time between two requests:
// the answer's, and 5 ms or a fiftieth of the time since the commit (250 ms once the edge has refused the key). A request
// that was sent to a stopped process counts from the moment at which the process went on, since it cannot have been decided
// before.
//
// The tests take long and most of a machine, so they have a build tag; test/long runs a small fleet, and one of the full
// size, whose tables stand in README.md, and for the limits of keys in limits.md:
//
//	REKALL_FLEET=full go test -tags fleet -v -count 1 -timeout 30m ./test/fleet
package fleet

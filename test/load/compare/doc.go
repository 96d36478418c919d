// Package compare measures what checking a key costs from end to end, beside what people would use instead: Caddy's
// forward_auth, nginx with auth_request and with Lua, HAProxy with a map. It also soaks the gateway, floods it with unknown keys, and
// tells what a decision costs by itself and whether a profile-guided build gains.
//
// The systems stand side by side on one machine, in front of the same backend, and are measured in short rounds that take
// turns in random order, since the speed of a machine drifts by more than what is to be measured. All are started anew after a few
// rounds: two processes of one program can differ by 8 %, for as long as they run. What counts is CPU time per
// request: user and system time of all processes of a system, divided by requests. Ratios are taken within a round; the median
// over the rounds stands for the pair.
//
// It runs on Linux and takes most of a machine, so it has a build tag. test/load/run installs what it needs and runs it; the
// results stand in README.md.
package compare

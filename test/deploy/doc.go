// Package deploy drives what an operator deploys, as real processes: gateways of earlier commits beside the newest schema, upgrades
// under load, the static binary in a container's surroundings, and several edges behind a load balancer.
package deploy

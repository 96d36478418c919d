// Command rekall-gateway is Caddy with Rekall's API-key gateway built in.
package main

import (
	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/rekall-ai/gateway/caddymodule"
)

func main() {
	// What help and errors tell to run must run.
	caddy.CustomBinaryName = "rekall-gateway"
	caddy.CustomLongDescription = `Rekall's API-key gateway is Caddy with the modules and commands of the gateway built in.

	- 'rekall-gateway dev' runs it with everything it needs, to try it.
	- 'rekall-gateway run' runs it with the configuration in the file Caddyfile.
	- 'rekall-gateway migrate' makes or updates its schema in Postgres.
	- 'rekall-gateway keys', 'limits' and 'edges' manage what is in there.

The other commands are Caddy's.
`
	caddycmd.Main()
}

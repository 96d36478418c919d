// Command rekall-gateway is Caddy with Rekall's API-key gateway built in.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/rekall-ai/gateway/caddymodule"
)

func main() { caddycmd.Main() }

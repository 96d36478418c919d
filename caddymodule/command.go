package caddymodule

import (
	"os"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/command"
)

func init() {
	// What is no command cobra quotes: a key that was pasted alone, or behind one of cobra's own commands.
	for i := range os.Args[min(1, len(os.Args)):] {
		os.Args[1+i] = apikey.Redact(os.Args[1+i])
		if os.Args[1] != "help" && os.Args[1] != "completion" {
			break
		}
	}
	if caddy.CustomVersion == "" { // else whoever built this has set it
		caddy.CustomVersion = "rekall-gateway " + version() + ", Caddy" // stands before Caddy's own
	}
	for _, c := range command.All() {
		register(c)
	}
}

// register makes c a command of every binary that this package is built into.
func register(c command.Command) {
	caddycmd.RegisterCommand(caddycmd.Command{Name: c.Name, Usage: c.Usage, Short: c.Short, Long: c.Long, CobraFunc: func(cmd *cobra.Command) {
		c.SetUp(cmd)
		useExitCodes(cmd)
	}})
}

// useExitCodes has Caddy end the process as the errors of cmd and its subcommands say: by itself it would with 1.
func useExitCodes(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		useExitCodes(sub)
	}
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		err := run(cmd, args)
		code := command.ExitCode(err)
		if code <= 1 {
			return err
		}
		return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) { return code, nil })(cmd, args)
	}
}

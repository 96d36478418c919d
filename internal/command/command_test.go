package command_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/command"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	for _, c := range command.All() {
		if c.Name != name {
			continue
		}
		cmd := &cobra.Command{Use: c.Name, SilenceUsage: true}
		c.SetUp(cmd)
		var output bytes.Buffer
		cmd.SetArgs(args)
		cmd.SetOut(&output)
		cmd.SetErr(&output)
		if err := cmd.Execute(); err != nil {
			t.Errorf("%s %s: %v", name, args[0], err)
		}
		return
	}
	t.Fatalf("no command %s", name)
}

func TestCommandsReachAPostgresThatIsFarAway(t *testing.T) {
	far := pgtest.Proxy{Delay: time.Second}
	database := far.URL(t, pgtest.URL(t))
	run(t, "migrate", "--database", database)
	run(t, "keys", "list", "--database", database)
	run(t, "limits", "show", "--database", database)
	run(t, "edges", "list", "--database", database)
}

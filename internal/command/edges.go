package command

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func edgesCommand() Command {
	return Command{
		Name:  "edges",
		Usage: "list",
		Short: "Shows the gateways that are running",
		Add:   func(cmd *cobra.Command) { cmd.AddCommand(edgesListCommand()) },
		Do: func(context.Context, *cobra.Command, []string) error {
			return errors.New("say what to do with edges: list (see --help)")
		},
	}
}

func edgesListCommand() *cobra.Command {
	return subcommand(&cobra.Command{Use: "list", Short: "Lists edges", Args: noArgs}, listEdges)
}

func listEdges(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
	edges, err := admin.Edges(ctx)
	if err != nil {
		return err
	}
	return show(cmd, edges, func(w io.Writer) {
		if len(edges) == 0 {
			fmt.Fprintln(w, "No edge reports to this database.")
			return
		}
		var t table
		t.line("NAME", "REGION", "VERSION", "STATUS", "LAST SYNC", "AGE")
		for _, e := range edges {
			t.line(e.Name, e.Region, e.Version, e.Status, moment(e.LastSyncAt, "never"), fmt.Sprintf("%.1fs", e.AgeSeconds))
		}
		t.print(w)
	})
}

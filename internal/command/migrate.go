package command

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/keystore"
)

func migrateCommand() Command {
	return Command{
		Name:  "migrate",
		Usage: "[--database <url>] [--edge-role <name>] [--admin-role <name>] [--plan] [--json]",
		Short: "Creates or updates Rekall's schema in Postgres",
		Long: `Creates the schema 'rekall' or brings it up to this version. Safe to repeat, and to run from several machines at once.

With --plan it changes nothing, and shows the versions and the SQL that it would run. Gateways that run go on working while the
schema goes forward, and with the new one: migrate first, then upgrade them one after another.

With --edge-role and --admin-role it also gives two Postgres roles the least rights that work: the edge's reads keys, and
writes what it counts and its own row in 'edges'; the admin's manages keys and their limits. A role that does not exist is created as a group
that cannot log in; grant it to the users that do:

  rekall-gateway migrate --edge-role rekall_edge --admin-role rekall_admin
  psql -c 'create user edge_eu1 in role rekall_edge' -c '\password edge_eu1'

The rights become exactly these: what the roles, or everybody, could do besides in the schema is revoked. Give the same
flags at every upgrade, or a new version may lack a right. Run it as the owner of the schema; creating roles needs
CREATEROLE.`,
		Add: func(cmd *cobra.Command) {
			databaseFlags(cmd)
			cmd.Flags().String("edge-role", "", "Postgres role of the gateways")
			cmd.Flags().String("admin-role", "", "Postgres role of those who manage keys")
			cmd.Flags().Bool("plan", false, "Show what would be run, and change nothing")
		},
		Do: migrate,
	}
}

func migrate(ctx context.Context, cmd *cobra.Command, _ []string) error {
	url, err := databaseURL(cmd)
	if err != nil {
		return err
	}
	// An empty name would pass for having no such role.
	if err := NotEmpty(cmd, "edge-role", "admin-role"); err != nil {
		return err
	}
	roles := keystore.Roles{Edge: text(cmd, "edge-role"), Admin: text(cmd, "admin-role")}
	if is(cmd, "plan") {
		return plan(ctx, cmd, url, roles)
	}
	from, to, err := keystore.MigrateAndGrant(ctx, url, roles)
	if err != nil {
		return err
	}
	return show(cmd, map[string]int32{"from": from, "to": to}, func(w io.Writer) {
		if from == to {
			fmt.Fprintf(w, "Schema rekall is up to date (version %d).\n", to)
		} else {
			fmt.Fprintf(w, "Schema rekall migrated from version %d to %d.\n", from, to)
		}
		if roles.Edge != "" {
			fmt.Fprintf(w, "Role %s has the rights of an edge, and no more.\n", roles.Edge)
		}
		if roles.Admin != "" {
			fmt.Fprintf(w, "Role %s has the rights to manage keys, and no more.\n", roles.Admin)
		}
	})
}

// migration is a step of the schema as JSON.
type migration struct {
	Version int32  `json:"version"`
	Name    string `json:"name"`
	SQL     string `json:"sql"`
}

func plan(ctx context.Context, cmd *cobra.Command, url string, roles keystore.Roles) error {
	if err := roles.Check(); err != nil {
		return err
	}
	from, pending, err := keystore.Plan(ctx, url)
	if err != nil {
		return err
	}
	to, migrations := from, make([]migration, 0, len(pending))
	for _, m := range pending {
		to, migrations = m.Version, append(migrations, migration(m))
	}
	return show(cmd, map[string]any{"from": from, "to": to, "migrations": migrations}, func(w io.Writer) {
		if from == to {
			fmt.Fprintf(w, "Schema rekall is up to date (version %d): nothing to run.\n", to)
		} else {
			fmt.Fprintf(w, "Schema rekall would be migrated from version %d to %d. Nothing was changed.\n", from, to)
		}
		for _, m := range migrations {
			fmt.Fprintf(w, "\n-- %s: to version %d\n%s\n", m.Name, m.Version, strings.TrimSpace(m.SQL))
		}
		if roles.Edge != "" {
			fmt.Fprintf(w, "\nRole %s would have the rights of an edge, and no more.\n", roles.Edge)
		}
		if roles.Admin != "" {
			fmt.Fprintf(w, "\nRole %s would have the rights to manage keys, and no more.\n", roles.Admin)
		}
	})
}

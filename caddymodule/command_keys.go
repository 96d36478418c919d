package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/user"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// operator is whoever runs the command, as the audit names them.
func operator() keyadmin.Actor {
	account, err := user.Current()
	if err != nil {
		return keyadmin.Operator("")
	}
	return keyadmin.Operator(account.Username)
}

func keysCreateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "create --name <name> --scopes <scope,...> --environment production|sandbox",
		Short:   "Creates a key and shows it once",
		Example: "  rekall-gateway keys create --name 'Production Backend' --scopes memories:read,memories:write --environment production --expires-in 90d",
		Args:    cobra.NoArgs,
	}
	databaseFlags(cmd)
	cmd.Flags().String("name", "", "Name of the key, for people")
	cmd.Flags().StringSlice("scopes", nil, "Scopes, separated by commas: "+strings.Join(apikey.ScopeNames(), ", "))
	cmd.Flags().String("environment", "", "production or sandbox")
	cmd.Flags().String("account", "default", "Account that owns the key")
	cmd.Flags().String("expires-in", "", "How long the key lives, e.g. 90d, 2w or 12h (default: for ever)")
	cmd.RunE = admin(func(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
		flags := cmd.Flags()
		var request keyadmin.CreateRequest
		request.Name, _ = flags.GetString("name")
		request.Scopes, _ = flags.GetStringSlice("scopes")
		request.Environment, _ = flags.GetString("environment")
		request.Account, _ = flags.GetString("account")
		request.ExpiresIn, _ = flags.GetString("expires-in")
		key, _, err := admin.Create(ctx, operator(), request)
		if err != nil {
			return flagNames(err)
		}
		return show(cmd, key, func(w io.Writer) {
			fmt.Fprintf(w, "Created %s (%s, %s).\n\n  %s\n\nThis is the only time the key is shown. Store it now.\n",
				key.ID, key.Environment, strings.Join(key.Scopes, " "), key.Key.Reveal())
		})
	})
	return cmd
}

// flagNames makes an error about a field of the API speak of the flag instead.
func flagNames(err error) error {
	var invalid *keyadmin.InvalidError
	if errors.As(err, &invalid) {
		return fmt.Errorf("--%s %s", strings.ReplaceAll(invalid.Field, "_", "-"), invalid.Reason)
	}
	return err
}

func keysListCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "Lists keys", Args: cobra.NoArgs}
	databaseFlags(cmd)
	cmd.Flags().String("account", "", "Only keys of this account")
	cmd.RunE = admin(func(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
		account, _ := cmd.Flags().GetString("account")
		keys := []keyadmin.Key{}
		for request := (keyadmin.ListRequest{Account: account}); ; {
			page, err := admin.List(ctx, operator(), request)
			if err != nil {
				return err
			}
			keys = append(keys, page.Keys...)
			if page.NextCursor == "" {
				break
			}
			request.Cursor = page.NextCursor
		}
		return show(cmd, keys, func(w io.Writer) {
			if len(keys) == 0 {
				fmt.Fprintln(w, "No keys. Make one with 'rekall-gateway keys create'.")
				return
			}
			table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
			fmt.Fprintln(table, "ID\tNAME\tACCOUNT\tKEY\tSTATUS\tEXPIRES\tSCOPES")
			for _, k := range keys {
				expires := "never"
				if k.ExpiresAt != nil {
					expires = k.ExpiresAt.Format(time.RFC3339)
				}
				fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", k.ID, k.Name, k.Account, k.Masked, k.Status, expires, strings.Join(k.Scopes, " "))
			}
			_ = table.Flush()
		})
	})
	return cmd
}

func keysRevokeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "revoke <id>", Short: "Revokes a key for good", Args: cobra.ExactArgs(1)}
	databaseFlags(cmd)
	cmd.Flags().Bool("wait", false, "Wait until no edge allows the key any longer, and show each with its delay")
	cmd.RunE = admin(func(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
		key, err := admin.Revoke(ctx, operator(), args[0])
		if err != nil {
			return err
		}
		if wait, _ := cmd.Flags().GetBool("wait"); !wait {
			return show(cmd, key, func(w io.Writer) {
				fmt.Fprintf(w, "Revoked %s. Every edge refuses it within 60 seconds.\n", key.ID)
			})
		}
		return waitRevoked(ctx, cmd, admin, key)
	})
	return cmd
}

func waitRevoked(ctx context.Context, cmd *cobra.Command, admin *keyadmin.Admin, key keyadmin.Key) error {
	asJSON, _ := cmd.Flags().GetBool("json")
	confirmations := []keyadmin.Confirmation{}
	err := admin.WaitRevoked(ctx, key.ID, func(c keyadmin.Confirmation) {
		confirmations = append(confirmations, c)
		if asJSON {
			return
		}
		how := fmt.Sprintf("confirmed after %.3fs", c.DelaySeconds)
		if !c.Confirmed {
			how = "did not confirm: fail-closed, it trusts no key that it has not asked about"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s %s: %s\n", c.Name, c.Region, how)
	})
	if err != nil {
		return fmt.Errorf("key %s is revoked, but the edges could not be watched: %w", key.ID, err)
	}
	return show(cmd, struct {
		keyadmin.Key
		Edges []keyadmin.Confirmation `json:"edges"`
	}{key, confirmations}, func(w io.Writer) {
		fmt.Fprintf(w, "Revoked %s. No edge allows it (%d edges).\n", key.ID, len(confirmations))
	})
}

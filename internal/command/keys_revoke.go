package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func keysRevokeCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use:   "revoke <id> | revoke [--account <account>] [--created-by <actor>] [--created-after <time>] [--created-before <time>] [--hashes <file>]",
		Short: "Revokes a key, or in an incident many at once, for good",
		Long: `Revokes a key for good, or in one transaction all keys to which everything applies that is given: an account, the actor
who made them (a key's own keys and what those made, too), a time of creation, or a list of SHA-256 hashes.

Many are revoked only with --yes; without, it counts them.

With --wait and the id of a key that is revoked already it waits all the same, and exits with 0: so a wait that was
interrupted is taken up again. Without --wait it exits with 4.`,
		Example: `  rekall-gateway keys revoke key_0123456789abcdefABCDEF --wait
  rekall-gateway keys revoke --created-by key:key_0123456789abcdefABCDEF --created-after 2030-01-01T00:00:00Z
  rekall-gateway keys revoke --hashes leaked.txt --yes --wait`,
		Args: oneKeyAtMost,
	}, revokeKeys)
	cmd.Flags().Bool("wait", false, "Wait until no edge that reports allows the keys any longer, and show each with its delay; fail if none reports")
	cmd.Flags().String("account", "", "Keys of this account")
	cmd.Flags().String("created-by", "", "Keys that this actor made, e.g. cli:root or key:<id>")
	cmd.Flags().String("created-after", "", "Keys created at or after this time, e.g. 2030-12-31T23:59:59Z")
	cmd.Flags().String("created-before", "", "Keys created before this time")
	cmd.Flags().String("hashes", "", "Keys whose SHA-256 is in this file, one a line in hexadecimal; -: standard input")
	cmd.Flags().Bool("yes", false, "Act: revoke the keys that were selected")
	cmd.Flags().Bool("dry-run", false, "Only count the keys that were selected")
	exclusive(cmd, "yes", "dry-run")
	return cmd
}

var selectionFlags = []string{"account", "created-by", "created-after", "created-before", "hashes"}

func revokeKeys(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
	many := false
	for _, flag := range selectionFlags {
		many = many || cmd.Flags().Changed(flag)
	}
	switch {
	case many == (len(args) == 1):
		return errors.New("give either the id of a key, or what selects many of them (see --help)")
	case many:
		return revokeMany(ctx, cmd, admin)
	}
	if err := onlyForMany(cmd, "dry-run"); err != nil {
		return err
	}
	key, err := admin.Revoke(ctx, operator(), args[0])
	already := is(cmd, "wait") && errors.Is(err, keyadmin.ErrAlreadyRevoked)
	if err != nil && !already {
		return err
	}
	if !is(cmd, "wait") {
		return show(cmd, key, func(w io.Writer) {
			fmt.Fprintf(w, "Revoked %s. Every edge refuses it within 60 seconds.\n%s", key.ID, successorThatLives(ctx, key, admin))
		})
	}
	if !already { // whoever interrupts the wait must know
		fmt.Fprintf(cmd.ErrOrStderr(), "Revoked %s. Waiting for the edges.\n", key.ID)
	}
	confirmations, err := watch(cmd, func(progress func(keyadmin.Confirmation)) error {
		return admin.WaitRevoked(ctx, key.ID, func(c keyadmin.Confirmation) {
			if already { // the edge may have reported it long before its last report
				c.DelaySeconds = 0
			}
			progress(c)
		})
	})
	if err != nil {
		return fmt.Errorf("key %s is revoked, but the edges could not be watched: %w", key.ID, err)
	}
	return show(cmd, struct {
		keyadmin.Key
		Edges []keyadmin.Confirmation `json:"edges"`
	}{key, confirmations}, func(w io.Writer) {
		how := "Revoked %s."
		if already {
			how = "%s was revoked already."
		}
		fmt.Fprintf(w, how+" No edge that reports allows it (%s).\n%s", key.ID, english.Plural(len(confirmations), "edge", ""), successorThatLives(ctx, key, admin))
	})
}

// successorThatLives says so if a key that was revoked has one: whoever has a leaked key may have rotated it.
func successorThatLives(ctx context.Context, key keyadmin.Key, admin *keyadmin.Admin) string {
	if key.Successor == nil {
		return ""
	}
	successor, err := admin.Look(ctx, operator(), *key.Successor)
	switch {
	case err != nil:
		return fmt.Sprintf("Whether %s, the successor of %s, lives on could not be seen: %v\n", *key.Successor, key.ID, err)
	case successor.Status == keyadmin.Active:
		return fmt.Sprintf("%s, the successor of %s, lives on. To revoke that one too: rekall-gateway keys revoke %[1]s\n", successor.ID, key.ID)
	}
	return ""
}

// watch shows edges as they confirm, and returns them.
func watch(cmd *cobra.Command, wait func(func(keyadmin.Confirmation)) error) ([]keyadmin.Confirmation, error) {
	confirmations := []keyadmin.Confirmation{}
	err := wait(func(c keyadmin.Confirmation) {
		confirmations = append(confirmations, c)
		if is(cmd, "json") {
			return
		}
		how := fmt.Sprintf("confirmed after %.3fs", c.DelaySeconds)
		switch {
		case !c.Confirmed:
			how = "did not confirm: fail-closed, it trusts no key that it has not asked about"
		case c.DelaySeconds == 0:
			how = "confirmed"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", strings.TrimSpace(c.Name+" "+c.Region), how)
	})
	if err == nil && len(confirmations) == 0 {
		err = errNoEdge
	}
	return confirmations, err
}

// errNoEdge: nobody has confirmed anything. Perhaps this is not the database of the edges, or none of them can write to it.
var errNoEdge = errors.New("no edge reports to this database: check --database. Every edge refuses what is revoked within 60 seconds")

// revokedMany is what JSON shows of the incident switch.
type revokedMany struct {
	DryRun    bool                    `json:"dry_run"`
	Count     int64                   `json:"count"`
	RevokedAt *time.Time              `json:"revoked_at"` // null: a dry run
	Edges     []keyadmin.Confirmation `json:"edges,omitempty"`
}

func revokeMany(ctx context.Context, cmd *cobra.Command, admin *keyadmin.Admin) error {
	selection, err := selectionOf(ctx, cmd)
	if err != nil {
		return err
	}
	dryRun := !is(cmd, "yes")
	revocation, err := admin.RevokeMany(ctx, operator(), selection, dryRun)
	if err != nil {
		return err
	}
	if revocation.Count == 0 {
		return errNoneSelected
	}
	result, keys := revokedMany{DryRun: dryRun, Count: revocation.Count}, english.Plural(int(revocation.Count), "key", "")
	if dryRun {
		return show(cmd, result, func(w io.Writer) {
			fmt.Fprintf(w, "%s would be revoked for good. Do it with --yes.\n", keys)
		})
	}
	result.RevokedAt = &revocation.At
	if !is(cmd, "wait") {
		return show(cmd, result, func(w io.Writer) {
			fmt.Fprintf(w, "Revoked %s. Every edge refuses what is revoked within 60 seconds.\n", keys)
		})
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Revoked %s. Waiting for the edges.\n", keys)
	result.Edges, err = watch(cmd, func(progress func(keyadmin.Confirmation)) error { return admin.Wait(ctx, revocation, progress) })
	if err != nil {
		return fmt.Errorf("%s revoked, but the edges could not be watched: %w", keys, err)
	}
	return show(cmd, result, func(w io.Writer) {
		fmt.Fprintf(w, "Revoked %s. No edge that reports allows what is revoked (%s).\n", keys, english.Plural(len(result.Edges), "edge", ""))
	})
}

// errNoneSelected: in an incident a mistyped selection must not look like success.
var errNoneSelected = fmt.Errorf("%w: nothing was revoked, since no key matches that is not revoked already", keyadmin.ErrNotFound)

func selectionOf(ctx context.Context, cmd *cobra.Command) (keyadmin.Selection, error) {
	if err := NotEmpty(cmd, selectionFlags...); err != nil {
		return keyadmin.Selection{}, err
	}
	selection := keyadmin.Selection{
		Account: text(cmd, "account"), CreatedBy: text(cmd, "created-by"),
		CreatedAfter: text(cmd, "created-after"), CreatedBefore: text(cmd, "created-before"),
	}
	if !cmd.Flags().Changed("hashes") {
		return selection, nil
	}
	file, err := openInput(ctx, cmd, text(cmd, "hashes"))
	if err != nil {
		return selection, err
	}
	defer func() { _ = file.Close() }()
	selection.Hashes, err = keyadmin.ParseHashes(file)
	return selection, err
}

// openInput opens a file, or standard input for "-".
func openInput(ctx context.Context, cmd *cobra.Command, name string) (io.ReadCloser, error) {
	if name == "-" {
		return io.NopCloser(interruptible(ctx, cmd.InOrStdin())), nil
	}
	return os.Open(name)
}

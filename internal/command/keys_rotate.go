package command

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func keysRotateCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use:   "rotate <id> | rotate --older-than <age>",
		Short: "Replaces a key, or all that are old, by a new one with the same rights",
		Long: `Makes a successor with the same name, account, environment, scopes, manage_keys, limits and time to live, and shows it once.
The old key works on for the overlap, so that both do while the new one is deployed. Until the old key has ended, --undo
restores it and revokes its successor.

With --older-than it rotates every key of that age, each in a transaction of its own, and prints each successor as it is
made: with --json, one object a line. A successor that nobody reads within three seconds ends the run and is not in force.
It can be run again after it was interrupted: keys that have a successor are passed over. It acts only with --yes; without,
it shows what it would rotate.`,
		Example: `  rekall-gateway keys rotate key_0123456789abcdefABCDEF --overlap 48h
  rekall-gateway keys rotate key_0123456789abcdefABCDEF --overlap on-first-use
  rekall-gateway keys rotate --older-than 90d --yes --json >> successors.jsonl`,
		Args: oneKeyAtMost,
	}, rotateKeys)
	cmd.Flags().String("overlap", "", "How long the old key works on: e.g. 48h, 0, or on-first-use[:48h] from the first use of the new one (default 24h)")
	cmd.Flags().Bool("undo", false, "Restore the key and revoke its successor")
	cmd.Flags().String("older-than", "", "Rotate all keys that were created so long ago, e.g. 90d")
	cmd.Flags().String("account", "", "With --older-than, only keys of this account")
	cmd.Flags().Bool("yes", false, "With --older-than, act")
	cmd.Flags().Bool("dry-run", false, "With --older-than, only show what would be rotated")
	choices(cmd, "overlap", "0", "24h", "48h", "on-first-use")
	exclusive(cmd, "yes", "dry-run")
	exclusive(cmd, "undo", "older-than")
	exclusive(cmd, "undo", "overlap")
	return cmd
}

func rotateKeys(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
	if err := NotEmpty(cmd, "overlap", "older-than", "account"); err != nil {
		return err
	}
	overlap, err := keyadmin.ParseOverlap(text(cmd, "overlap"))
	if err != nil {
		return err
	}
	many := cmd.Flags().Changed("older-than")
	if many == (len(args) == 1) {
		return errors.New("give either the id of a key or --older-than")
	}
	if many {
		return rotateDue(ctx, cmd, admin, overlap)
	}
	if err := onlyForMany(cmd, "account", "dry-run"); err != nil {
		return err
	}
	if is(cmd, "undo") {
		return undoRotation(ctx, cmd, args[0], admin)
	}
	if err := checkRead(cmd); err != nil {
		return err
	}
	_, _, err = admin.Rotate(ctx, operator(), args[0], keyadmin.RotateRequest{Overlap: overlap, HandOut: func(key keyadmin.Key) error {
		return show(cmd, key, func(w io.Writer) {
			fmt.Fprintf(w, "Rotated %s. Its successor is %s (%s).\n\n  %s\n\nThis is the only time the key is shown. Store it now.\n%s\n",
				args[0], key.ID, key.Environment, key.Key.Reveal(), whenItEnds(args[0], overlap))
		})
	}})
	return err
}

func whenItEnds(id string, overlap keyadmin.Overlap) string {
	if overlap == (keyadmin.Overlap{}) {
		return "The old key has ended."
	}
	from := "from now"
	if overlap.OnFirstUse {
		from = "from the first use of the new one"
	}
	return fmt.Sprintf("The old key ends %s %s, if not before. To undo until then: rekall-gateway keys rotate %s --undo", keyadmin.FormatDuration(overlap.For), from, id)
}

func undoRotation(ctx context.Context, cmd *cobra.Command, id string, admin *keyadmin.Admin) error {
	key, withdrawn, err := admin.UndoRotation(ctx, operator(), id)
	if err != nil {
		return err
	}
	return show(cmd, key, func(w io.Writer) {
		fmt.Fprintf(w, "Restored %s, which expires: %s. Its successor %s is revoked.\n%s", key.ID, moment(key.ExpiresAt, "never"), withdrawn.ID,
			successorThatLives(ctx, withdrawn, admin))
	})
}

// rotateDue prints each successor as it is made: all at the end would be none after an interruption.
func rotateDue(ctx context.Context, cmd *cobra.Command, admin *keyadmin.Admin, overlap keyadmin.Overlap) error {
	request := keyadmin.RotateDueRequest{Account: text(cmd, "account"), OlderThan: text(cmd, "older-than"), Overlap: overlap}
	asJSON, dryRun := is(cmd, "json"), !is(cmd, "yes")
	if err := checkRead(cmd); err != nil && !dryRun {
		return err
	}
	out := cmd.OutOrStdout()
	rotated, err := admin.RotateDue(ctx, operator(), request, dryRun, func(key keyadmin.Key) error {
		var err error
		switch {
		case asJSON:
			err = jsonEncoder(out).Encode(key)
		case dryRun:
			_, err = fmt.Fprintf(out, "%s  %s  %s  created %s\n", key.ID, key.Account, key.Name, moment(&key.CreatedAt, ""))
		default:
			_, err = fmt.Fprintf(out, "%s -> %s  %s  %s  %s\n", *key.Predecessor, key.ID, key.Account, key.Name, key.Key.Reveal())
		}
		if err != nil {
			return fmt.Errorf("print the new key: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if dryRun {
		fmt.Fprintf(cmd.ErrOrStderr(), "%s would be rotated. Do it with --yes.\n", english.Plural(rotated, "key", ""))
		return nil
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Rotated %s.\n", english.Plural(rotated, "key", ""))
	return nil
}

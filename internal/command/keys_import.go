package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func keysImportCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use:   "import <file>",
		Short: "Imports existing keys, all of a file or none",
		Long: `Imports existing keys as the SHA-256 of each, from CSV, whose first line names the columns, or from JSON lines. The columns:

  hash         SHA-256 of the whole key, in hexadecimal; or, with --plain-keys,
  key          the key itself, which is hashed at once and kept nowhere
  account      that owns it
  name         for people
  environment  production or sandbox; not needed with key
  scopes       with spaces or commas in between; in JSON lines also a list
  manage_keys  true or false (default false)
  created_at   e.g. 2030-12-31T23:59:59Z (default: now)
  expires_at   (default: never)
  hint         last four characters of the key, for lists (default: none)

Everything is validated before anything is written. Keys that are there already and may do the same are passed over, so
an import can be repeated. Those among them that are revoked or expired stay so, and are counted.`,
		Example: `  rekall-gateway keys import keys.csv --dry-run
  pg_dump-to-jsonl | rekall-gateway keys import - --format jsonl`,
		Args: arguments("a file, or - for standard input"),
	}, importKeys)
	cmd.Flags().String("format", "", "csv or jsonl (default: as the file's name ends)")
	cmd.Flags().Bool("plain-keys", false, "Accept keys themselves in a column key")
	cmd.Flags().Bool("dry-run", false, "Only validate")
	choices(cmd, "format", "csv", "jsonl")
	return cmd
}

func importKeys(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
	format := text(cmd, "format")
	if format == "" {
		format = args[0][strings.LastIndexByte(args[0], '.')+1:]
	}
	file, err := openInput(ctx, cmd, args[0])
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	done, err := admin.Import(ctx, operator(), file, keyadmin.ImportOptions{
		Format: format, PlainKeys: is(cmd, "plain-keys"), DryRun: is(cmd, "dry-run"), Progress: progressOn(cmd.ErrOrStderr()),
	})
	if bad, ok := errors.AsType[*keyadmin.ImportError](err); ok && bad.Total > 1 {
		for _, line := range bad.Lines {
			fmt.Fprintln(cmd.ErrOrStderr(), line)
		}
	}
	if err != nil {
		return err
	}
	return show(cmd, done, func(w io.Writer) {
		ended := ""
		if done.Ended > 0 {
			ended = fmt.Sprintf(", %d of them revoked or expired: an import revives none", done.Ended)
		}
		if is(cmd, "dry-run") {
			fmt.Fprintf(w, "%s can be imported; already there: %d%s.\n", english.Plural(int(done.Imported), "key", ""), done.AlreadyThere, ended)
			return
		}
		fmt.Fprintf(w, "Imported %s; already there: %d%s.\n", english.Plural(int(done.Imported), "key", ""), done.AlreadyThere, ended)
	})
}

// longFile is how many keys take so long to read that one wonders.
const longFile = 100_000

// progressOn prints a line for every 100,000 keys that were read, and what is done with them.
func progressOn(w io.Writer) func(keyadmin.ImportProgress) {
	return func(p keyadmin.ImportProgress) {
		switch {
		case p.Lines < longFile:
		case p.Step != keyadmin.ImportReading:
			fmt.Fprintf(w, "%s %d keys\n", p.Step, p.Lines)
		case p.Lines%longFile == 0:
			fmt.Fprintf(w, "read %d keys\n", p.Lines)
		}
	}
}

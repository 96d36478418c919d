package caddymodule

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Exit codes of the commands besides 0 and 1 (anything else that failed).
const (
	exitNotFound = 3
	exitEnded    = 4 // the key is revoked or expired already
)

func init() {
	// Caddy's root command quotes what is no command of its: a key that was pasted alone.
	if len(os.Args) > 1 {
		os.Args[1] = apikey.Redact(os.Args[1])
	}
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "edges",
		Usage: "list",
		Short: "Shows the gateways that are running",
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Args = noArgs
			quoteNoKey(cmd)
			cmd.RunE = run(func(context.Context, *cobra.Command, []string) error {
				return errors.New("say what to do with edges: list (see --help)")
			})
			cmd.AddCommand(edgesListCommand())
		},
	})
}

func databaseFlags(cmd *cobra.Command) {
	cmd.Flags().String("database", "", "Postgres connection URL (default: $"+keystore.DatabaseVariable+")")
	cmd.Flags().Bool("json", false, "Print JSON")
}

// quoteNoKey keeps keys out of what cobra says of the flags of a command and its subcommands.
func quoteNoKey(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return errors.New(apikey.Redact(err.Error())) })
}

// run adapts a command: its context ends with an interrupt, its error is one line on stderr, and its exit code says what
// kind of error it was.
func run(do func(context.Context, *cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err := do(ctx, cmd, args)
		if err == nil {
			return nil
		}
		cmd.SilenceErrors = true
		fmt.Fprintln(cmd.ErrOrStderr(), "Error:", apikey.Redact(err.Error()))
		code := 1
		switch {
		case errors.Is(err, keyadmin.ErrNotFound):
			code = exitNotFound
		case errors.Is(err, keyadmin.ErrAlreadyRevoked), errors.Is(err, keyadmin.ErrEnded):
			code = exitEnded
		default:
			return err
		}
		return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) { return code, nil })(cmd, args)
	}
}

func databaseURL(cmd *cobra.Command) (string, error) {
	// Passed over, it would be the other database that keys are revoked in.
	if err := notEmpty(cmd, "database"); err != nil {
		return "", err
	}
	url := text(cmd, "database")
	if url == "" {
		url = os.Getenv(keystore.DatabaseVariable)
	}
	if url = strings.TrimSpace(url); url == "" { // one from a file ends with a line feed
		return "", errors.New("no database: give --database or set " + keystore.DatabaseVariable)
	}
	return url, nil
}

// admin runs do with the key administration of the command's database.
func admin(do func(context.Context, *cobra.Command, []string, *keyadmin.Admin) error) func(*cobra.Command, []string) error {
	return run(func(ctx context.Context, cmd *cobra.Command, args []string) error {
		url, err := databaseURL(cmd)
		if err != nil {
			return err
		}
		store, err := keystore.Open(url, keystore.Options{ApplicationName: "rekall-gateway keys"})
		if err != nil {
			return err
		}
		defer store.Close()
		return do(ctx, cmd, args, keyadmin.New(store))
	})
}

func edgesListCommand() *cobra.Command {
	return keysCommand(&cobra.Command{Use: "list", Short: "Lists edges", Args: noArgs}, func(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
		edges, err := admin.Edges(ctx)
		if err != nil {
			return err
		}
		return show(cmd, edges, func(w io.Writer) {
			table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
			fmt.Fprintln(table, "NAME\tREGION\tVERSION\tSTATUS\tLAST SYNC\tLAG")
			for _, e := range edges {
				lastSync := "never"
				if e.LastSyncAt != nil {
					lastSync = e.LastSyncAt.Format(time.RFC3339)
				}
				fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%.1fs\n", e.Name, e.Region, e.Version, e.Status, lastSync, e.LagSeconds)
			}
			_ = table.Flush()
		})
	})
}

// interruptible is an input that ends with the context: from a terminal, or a pipe that nobody writes to, nothing else would come. What
// is read ahead is lost.
func interruptible(ctx context.Context, input io.Reader) io.Reader {
	from, to := io.Pipe()
	context.AfterFunc(ctx, func() { to.CloseWithError(context.Cause(ctx)) })
	go func() {
		_, err := io.Copy(to, input)
		to.CloseWithError(err)
	}()
	return from
}

// show prints a result: JSON for programs, text for people. A key that could not be printed is lost, so it says if it failed.
func show(cmd *cobra.Command, result any, text func(io.Writer)) error {
	out := bufio.NewWriter(cmd.OutOrStdout())
	if asJSON, _ := cmd.Flags().GetBool("json"); asJSON {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(result); err != nil {
			return fmt.Errorf("print the result: %w", err)
		}
	} else {
		text(out)
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("print the result: %w", err)
	}
	return nil
}

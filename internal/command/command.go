// Package command is the commands that manage keys: the keys, their limits, the schema that both stand in, and the edges
// that go by it. It knows nothing of the server whose binary they are commands of.
package command

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Exit codes of the commands besides 0 and 1 (anything else that failed).
const (
	exitNotFound = 3
	exitEnded    = 4 // the key is revoked or expired already
)

// Command is one of the commands, for a registry that makes the cobra command itself and has it set up, as Caddy's does.
type Command struct {
	Name, Usage, Short, Long string

	// Add gives the command its flags and subcommands.
	Add func(*cobra.Command)

	// Do is what the command does. Its context ends with an interrupt or a hangup, and its error is shown without the keys in it.
	Do func(context.Context, *cobra.Command, []string) error
}

// All returns the commands that manage keys.
func All() []Command {
	return []Command{edgesCommand(), keysCommand(), limitsCommand(), migrateCommand()}
}

// SetUp completes cmd, which has c's name and texts: its arguments, errors, flags and what it does.
func (c Command) SetUp(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs // checked below: of an error of cobra's Args the process would not end with its exit code
	cmd.SetFlagErrorFunc(flagError)
	cmd.SetHelpTemplate(new(cobra.Command).HelpTemplate()) // the server's may lead to its own manual, which has none of these
	cmd.RunE = run(func(ctx context.Context, cmd *cobra.Command, args []string) error {
		if err := noArgs(cmd, args); err != nil {
			return err
		}
		return c.Do(ctx, cmd, args)
	})
	c.Add(cmd)
}

// ExitCode returns what a process exits with whose command returned err.
func ExitCode(err error) int {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, keyadmin.ErrNotFound):
		return exitNotFound
	case errors.Is(err, keyadmin.ErrAlreadyRevoked), errors.Is(err, keyadmin.ErrEnded):
		return exitEnded
	}
	return 1
}

// endings are the signals that end a command in order, so that it leaves nothing behind. Where a hangup is ignored, as under nohup, it
// stays so: to listen for it would undo that.
func endings() []os.Signal {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		signals = append(signals, syscall.SIGHUP)
	}
	return signals
}

// run adapts a command: its context ends with one of the endings, and its error is one line on stderr.
func run(do func(context.Context, *cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(context.Background(), endings()...)
		defer stop()
		context.AfterFunc(ctx, stop) // a second signal ends what waits for somebody to read its output
		err := do(ctx, cmd, args)
		if err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("interrupted: %w", err)
			}
			cmd.SilenceErrors = true
			fmt.Fprintln(cmd.ErrOrStderr(), "Error:", apikey.Redact(err.Error()))
		}
		return err
	}
}

// connectTimeout is that of migrate: an operator can wait, and may be far from the database.
const connectTimeout = 10 * time.Second

// subcommand has cmd work with the key administration of its database. What it is called with is searched for keys first: they
// have no place in a shell's history or a list of processes, and in no error either.
func subcommand(cmd *cobra.Command, do func(context.Context, *cobra.Command, []string, *keyadmin.Admin) error) *cobra.Command {
	databaseFlags(cmd)
	check := cmd.Args
	cmd.Args = cobra.ArbitraryArgs // as in SetUp
	cmd.RunE = run(func(ctx context.Context, cmd *cobra.Command, args []string) error {
		given := slices.Clone(args)
		cmd.Flags().Visit(func(f *pflag.Flag) { given = append(given, f.Value.String()) })
		if apikey.ContainsKey(strings.Join(given, "\n")) {
			return errKeyAsArgument
		}
		if err := check(cmd, args); err != nil {
			return err
		}
		url, err := databaseURL(cmd)
		if err != nil {
			return err
		}
		store, err := keystore.Open(url, keystore.Options{ApplicationName: "rekall-gateway keys", ConnectTimeout: connectTimeout})
		if err != nil {
			return err
		}
		defer store.Close()
		return flagNames(cmd, do(ctx, cmd, args, keyadmin.New(store)))
	})
	return cmd
}

// errKeyAsArgument wraps ErrNotFound: the key usually stands where an id should.
var errKeyAsArgument = fmt.Errorf("%w: an argument is a key itself, which is now in your shell's history: revoke or rotate it by its id; "+
	`"rekall-gateway keys check" reads a key from its input and tells the id`, keyadmin.ErrNotFound)

// operator is whoever runs the command, as the audit names them: with sudo, the user before.
func operator() keyadmin.Actor {
	if name := os.Getenv("SUDO_USER"); name != "" && os.Geteuid() == 0 {
		return keyadmin.Operator(name)
	}
	account, err := user.Current()
	if err != nil { // a container has users without a name
		return keyadmin.Operator("uid-" + strconv.Itoa(os.Getuid()))
	}
	return keyadmin.Operator(account.Username)
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

// checkRead demands that somebody can read a new key. In place of an output that is closed Go opens the null device, which takes all.
func checkRead(cmd *cobra.Command) error {
	out, ok := cmd.OutOrStdout().(*os.File)
	if !ok {
		return nil
	}
	to, err := out.Stat()
	if err != nil {
		return fmt.Errorf("look at the output: %w", err)
	}
	if null, err := os.Stat(os.DevNull); err == nil && os.SameFile(to, null) {
		return errors.New("no key was made: it is shown once only, and the output is closed or " + os.DevNull)
	}
	return nil
}

// show prints a result: JSON for programs, text for people. A key that could not be printed is lost, so it says if it failed.
func show(cmd *cobra.Command, result any, text func(io.Writer)) error {
	out := bufio.NewWriter(cmd.OutOrStdout())
	if is(cmd, "json") {
		encoder := jsonEncoder(out)
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

// jsonEncoder prints texts as they are, "<" too: no browser reads them.
func jsonEncoder(w io.Writer) *json.Encoder {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder
}

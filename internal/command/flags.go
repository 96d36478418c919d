package command

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func databaseFlags(cmd *cobra.Command) {
	cmd.Flags().String("database", "", "Postgres connection URL (default: $"+keystore.DatabaseVariable+")")
	cmd.Flags().Bool("json", false, "Print JSON")
}

func databaseURL(cmd *cobra.Command) (string, error) {
	// Passed over, it would be the other database that keys are revoked in.
	if err := NotEmpty(cmd, "database"); err != nil {
		return "", err
	}
	url := strings.TrimSpace(cmp.Or(text(cmd, "database"), os.Getenv(keystore.DatabaseVariable))) // one from a file ends with a line feed
	if url == "" {
		return "", errors.New("no database: give --database or set " + keystore.DatabaseVariable)
	}
	return url, nil
}

// flagError says what a flag takes of a command or its subcommands, and keeps keys out of what cobra says of them otherwise.
func flagError(_ *cobra.Command, err error) error {
	if invalid, ok := errors.AsType[*pflag.InvalidValueError](err); ok { // whose text is strconv's
		switch flag := invalid.GetFlag(); flag.Value.Type() {
		case "int":
			return fmt.Errorf("--%s must be a whole number", flag.Name)
		case "bool":
			return fmt.Errorf("--%s must be true or false: leave the value out for true", flag.Name)
		}
	}
	return errors.New(apikey.Redact(err.Error()))
}

// noArgs is cobra.NoArgs, which quotes what it refuses, for what may be a key, and says what there is instead. Without subcommands it
// may belong to a flag.
func noArgs(cmd *cobra.Command, args []string) error {
	if apikey.ContainsKey(strings.Join(args, "\n")) {
		return errKeyAsArgument
	}
	switch {
	case len(args) == 0:
		return nil
	case cmd.HasSubCommands():
		var names []string
		for _, sub := range cmd.Commands() {
			names = append(names, sub.Name())
		}
		return fmt.Errorf("unknown command %q for %q: use one of %s (see --help)", args[0], cmd.CommandPath(), strings.Join(names, ", "))
	}
	return fmt.Errorf("unexpected %q: give everything with flags, and quote a value that has spaces (see --help)", args[0])
}

// flagNames makes an error about a field of the API speak of the flag instead, and of the other flags that it names. What has no
// flag is an argument.
func flagNames(cmd *cobra.Command, err error) error {
	invalid, ok := errors.AsType[*keyadmin.InvalidError](err)
	if !ok {
		return err
	}
	name := func(field string) string {
		if flag := strings.ReplaceAll(field, "_", "-"); cmd.Flags().Lookup(flag) != nil {
			return "--" + flag
		}
		return field
	}
	return fmt.Errorf("%s %s", name(invalid.Field), fieldPattern.ReplaceAllStringFunc(invalid.Reason, name))
}

var fieldPattern = regexp.MustCompile(`[a-z]+(_[a-z]+)+|\buntil\b`)

// arguments is cobra.ExactArgs with an error that says what each argument is.
func arguments(each ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != len(each) {
			return fmt.Errorf("give %s, and nothing besides (see --help)", strings.Join(each, " and "))
		}
		return nil
	}
}

// oneKeyAtMost is the same for what takes flags in place of an id.
func oneKeyAtMost(_ *cobra.Command, args []string) error {
	if len(args) > 1 {
		return errors.New("give the id of one key, and nothing besides (see --help)")
	}
	return nil
}

// exclusive declares two flags that exclude each other: to the shell's completion, and in words.
func exclusive(cmd *cobra.Command, one, other string) {
	cmd.MarkFlagsMutuallyExclusive(one, other)
	before := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if cmd.Flags().Changed(one) && cmd.Flags().Changed(other) {
			return fmt.Errorf("--%s and --%s exclude each other: leave out one of them", one, other)
		}
		if before == nil {
			return nil
		}
		return before(cmd, args)
	}
}

func text(cmd *cobra.Command, flag string) string {
	value, _ := cmd.Flags().GetString(flag)
	return value
}

func is(cmd *cobra.Command, flag string) bool {
	value, _ := cmd.Flags().GetBool(flag)
	return value
}

// choices declares what a flag can be, for the shell's completion.
func choices(cmd *cobra.Command, flag string, values ...string) {
	// It fails only if there is no such flag, which the test of the completion would show.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// NotEmpty refuses flags that are given and empty, most likely by an unset variable of a script: left out, they would mean
// their default, such as a key that never ends or the keys of all accounts.
func NotEmpty(cmd *cobra.Command, flags ...string) error {
	for _, flag := range flags {
		if cmd.Flags().Changed(flag) && text(cmd, flag) == "" {
			return fmt.Errorf("--%s must not be empty", flag)
		}
	}
	return nil
}

// onlyForMany refuses flags that change nothing about a single key: whoever gives --dry-run expects that nothing happens.
func onlyForMany(cmd *cobra.Command, flags ...string) error {
	for _, flag := range flags {
		if cmd.Flags().Changed(flag) {
			return fmt.Errorf("--%s is not for a key that is given by its id: leave out one of them", flag)
		}
	}
	return nil
}

// limitFlag reads --limit: 0, the default, is no limit.
func limitFlag(cmd *cobra.Command) (int, error) {
	limit, _ := cmd.Flags().GetInt("limit")
	if limit < 0 {
		return 0, errors.New("--limit must not be negative")
	}
	if limit == 0 {
		return math.MaxInt, nil
	}
	return limit, nil
}

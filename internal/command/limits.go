package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func limitsCommand() Command {
	return Command{
		Name:  "limits",
		Usage: "show|tier|account|key",
		Short: "Shows and sets how much keys may be used",
		Long: `Shows and sets the rate limits of tiers, accounts and keys in Postgres. Gateways that have rate_limits follow within their refresh.

A production key has the limits of its account's tier, free unless you say otherwise; a sandbox key has those of the tier
sandbox. What an account has of its own is for its production keys and comes before its tier; what a key has of its own comes
before all.

Exit codes: 3 where there is no such key, 1 for whatever else failed.`,
		Add: func(cmd *cobra.Command) {
			cmd.AddCommand(limitsShowCommand(), limitsTierCommand(), limitsAccountCommand(), limitsKeyCommand())
		},
		Do: func(context.Context, *cobra.Command, []string) error {
			return errors.New("say what to do with limits: show, tier, account or key (see --help)")
		},
	}
}

func limitsShowCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use: "show [--account <account> | --key-id <id>]", Short: "Shows the limits of all tiers, of an account's production keys or of a key",
		Args: noArgs,
	}, showLimits)
	cmd.Flags().String("account", "", "The account, of whose production keys the limits are")
	cmd.Flags().String("key-id", "", "The id of the key")
	cmd.Flags().SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "key" { // which scripts may have: the flag had that name
			name = "key-id"
		}
		return pflag.NormalizedName(name)
	})
	exclusive(cmd, "account", "key-id")
	return cmd
}

func showLimits(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
	if err := NotEmpty(cmd, "account", "key-id"); err != nil {
		return err
	}
	switch {
	case cmd.Flags().Changed("account"):
		limits, err := admin.AccountLimits(ctx, text(cmd, "account"))
		if err != nil {
			return err
		}
		return showAccountLimits(cmd, limits)
	case cmd.Flags().Changed("key-id"):
		limits, err := admin.KeyLimits(ctx, operator(), text(cmd, "key-id"))
		if err != nil {
			return err
		}
		return showKeyLimits(cmd, limits)
	}
	tiers, err := admin.Tiers(ctx)
	if err != nil {
		return err
	}
	return show(cmd, tiers, func(w io.Writer) {
		var t table
		t.line("TIER", "REQUESTS PER MINUTE", "BURST IN 15s", "CONCURRENT REQUESTS")
		for _, tier := range tiers {
			t.line(tier.Tier, limitText(tier.PerMinute), limitText(tier.Burst), limitText(tier.Concurrent))
		}
		t.print(w)
	})
}

// limitFlags are those of the commands that set limits.
func limitFlags(cmd *cobra.Command, none string) {
	cmd.Flags().Int("requests-per-minute", 0, "Requests per minute; 0: "+none)
	cmd.Flags().Int("burst", 0, "Requests in any 15 seconds (default: one and a half times the requests per minute)")
	cmd.Flags().Int("concurrent-requests", 0, "Requests and streams at a time; 0: "+none)
}

func limitsChange(cmd *cobra.Command) (change keyadmin.LimitsChange) {
	for flag, field := range map[string]**int{
		"requests-per-minute": &change.PerMinute, "burst": &change.Burst, "concurrent-requests": &change.Concurrent,
	} {
		if cmd.Flags().Changed(flag) {
			value, _ := cmd.Flags().GetInt(flag)
			*field = &value
		}
	}
	return change
}

var errNoLimit = errors.New("say what to change: --requests-per-minute, --burst, --concurrent-requests, or --tier of an account " +
	`("rekall-gateway limits show" tells what they are)`)

func limitsTierCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use: "tier <tier> [flags]", Short: "Sets the limits of a tier", Args: arguments("a tier"),
		Example:           "  rekall-gateway limits tier free --requests-per-minute 200 --burst 300",
		ValidArgsFunction: cobra.FixedCompletions(apikey.TierNames(), cobra.ShellCompDirectiveNoFileComp),
	}, func(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
		change := limitsChange(cmd)
		if change == (keyadmin.LimitsChange{}) {
			return errNoLimit
		}
		tier, err := admin.SetTier(ctx, operator(), args[0], change)
		if err != nil {
			return err
		}
		return show(cmd, tier, func(w io.Writer) { fmt.Fprintf(w, "Tier %s: %s.\n", tier.Tier, limitsText(tier.Limits)) })
	})
	limitFlags(cmd, "not limited")
	return cmd
}

func limitsAccountCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use: "account <account> [--tier <tier>] [flags]", Short: "Sets the tier and the limits of an account's production keys",
		Args: arguments("an account"),
		Example: `  rekall-gateway limits account acme --tier pro
  rekall-gateway limits account globex --tier enterprise --requests-per-minute 20000 --concurrent-requests 400`,
	}, func(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
		change := limitsChange(cmd)
		if err := NotEmpty(cmd, "tier"); err != nil {
			return err
		}
		if change == (keyadmin.LimitsChange{}) && text(cmd, "tier") == "" {
			return errNoLimit
		}
		limits, err := admin.SetAccountLimits(ctx, operator(), args[0], text(cmd, "tier"), change)
		if err != nil {
			return err
		}
		return showAccountLimits(cmd, limits)
	})
	cmd.Flags().String("tier", "", "free, pro, team or enterprise")
	choices(cmd, "tier", apikey.TierNames()[:apikey.SandboxTier]...) // which no account has
	limitFlags(cmd, "as the tier says")
	return cmd
}

func limitsKeyCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use: "key <id> [flags]", Short: "Sets the limits of a key", Args: arguments("the id of a key"),
		Example: "  rekall-gateway limits key key_0123456789abcdefABCDEF --concurrent-requests 1",
	}, func(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
		change := limitsChange(cmd)
		if change == (keyadmin.LimitsChange{}) {
			return errNoLimit
		}
		limits, err := admin.SetKeyLimits(ctx, operator(), args[0], change)
		if err != nil {
			return err
		}
		return showKeyLimits(cmd, limits)
	})
	limitFlags(cmd, "as keys without limits of their own")
	return cmd
}

func showAccountLimits(cmd *cobra.Command, limits keyadmin.AccountLimits) error {
	return show(cmd, limits, func(w io.Writer) {
		fmt.Fprintf(w, "Production keys of account %s, tier %s: %s.\n", limits.Account, limits.Tier, limitsText(limits.Effective))
	})
}

func showKeyLimits(cmd *cobra.Command, limits keyadmin.KeyLimits) error {
	return show(cmd, limits, func(w io.Writer) {
		fmt.Fprintf(w, "Key %s of %s (%s), tier %s: %s.\n", limits.KeyID, limits.Account, limits.Environment, limits.Tier, limitsText(limits.Effective))
	})
}

func limitsText(l keyadmin.Limits) string {
	return fmt.Sprintf("%s requests per minute, %s in 15 seconds, %s at a time", limitText(l.PerMinute), limitText(l.Burst), limitText(l.Concurrent))
}

func limitText(n int) string {
	if n == 0 {
		return "unlimited"
	}
	return strconv.Itoa(n)
}

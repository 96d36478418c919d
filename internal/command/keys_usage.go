package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func keysUsageCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use:     "usage <id>",
		Short:   "Shows what a key was used for",
		Long:    "Shows how many requests with a key were allowed, and denied for which reasons, by day or by hour (UTC).",
		Example: "  rekall-gateway keys usage key_4fK2mQ9xT1bV7nR3sY8wZ0 --last 7d --hourly",
		Args:    arguments("the id of a key"),
	}, showUsage)
	cmd.Flags().String("last", "30d", "How far to look back, e.g. 90d, 2w or 12h")
	cmd.Flags().Bool("hourly", false, "Show hours instead of days (--json has both)")
	return cmd
}

func showUsage(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
	back, err := keyadmin.ParseDuration(text(cmd, "last"))
	if err != nil {
		return fmt.Errorf("--last %w", err)
	}
	usage, err := admin.RecentUsage(ctx, operator(), args[0], back)
	if err != nil {
		return usageFlagNames(err)
	}
	return show(cmd, usage, func(w io.Writer) { printUsage(w, usage, is(cmd, "hourly")) })
}

// usageFlagNames makes an error about the range speak of the flag that sets it.
func usageFlagNames(err error) error {
	if invalid, ok := errors.AsType[*keyadmin.InvalidError](err); ok && invalid.Field == "from" {
		return errors.New("--last must be at most 366d")
	}
	return err
}

func printUsage(w io.Writer, u keyadmin.Usage, hourly bool) {
	fmt.Fprintf(w, "Last used: %s\n\n", moment(u.LastUsedAt, "never"))
	var t table
	if hourly {
		t.line("HOUR", "ALLOWED", "DENIED", "REASONS", "SPIKE")
		for _, h := range u.Hourly {
			t.counts(h.Hour.Format(time.RFC3339), h.UsageCounts, h.Spike)
		}
	} else {
		t.line("DAY", "ALLOWED", "DENIED", "REASONS", "SPIKE")
		for _, d := range u.Daily {
			t.counts(d.Date, d.UsageCounts, d.Spike)
		}
	}
	t.counts("total", u.Total, false)
	t.print(w)
}

func (t *table) counts(when string, c keyadmin.UsageCounts, spike bool) {
	reasons := make([]string, 0, len(c.DeniedByReason))
	for reason, n := range c.DeniedByReason {
		reasons = append(reasons, fmt.Sprintf("%s=%d", reason, n))
	}
	slices.Sort(reasons)
	mark := ""
	if spike {
		mark = "spike"
	}
	t.line(when, c.Allowed, c.Denied, strings.Join(reasons, " "), mark)
}

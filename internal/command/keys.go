package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func keysCommand() Command {
	return Command{
		Name:  "keys",
		Usage: "create|list|show|rename|rotate|revoke|usage|audit|import|check",
		Short: "Manages API keys",
		Long: `Manages API keys in Postgres, those of all accounts. Edges follow on their own.

Exit codes: 3 where there is no such key or none to revoke, 4 where it is revoked or expired already, 1 for whatever else failed.`,
		Add: func(cmd *cobra.Command) {
			cmd.AddCommand(keysCreateCommand(), keysListCommand(), keysShowCommand(), keysRenameCommand(), keysRotateCommand(),
				keysRevokeCommand(), keysUsageCommand(), keysAuditCommand(), keysImportCommand(), keysCheckCommand())
		},
		Do: func(context.Context, *cobra.Command, []string) error {
			return errors.New("say what to do with keys: create, list, show, rename, rotate, revoke, usage, audit, import or check (see --help)")
		},
	}
}

func keysCreateCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{
		Use:     "create --name <name> --scopes <scope,...> --environment production|sandbox",
		Short:   "Creates a key and shows it once",
		Example: "  rekall-gateway keys create --name 'Production Backend' --scopes memories:read,memories:write --environment production --expires-in 90d",
		Args:    noArgs,
	}, createKey)
	cmd.Flags().String("name", "", "Name of the key, for people")
	cmd.Flags().StringArray("scopes", nil, "The key's `scopes`, separated by commas: "+strings.Join(apikey.ScopeNames(), ", "))
	cmd.Flags().String("environment", "", "production or sandbox")
	cmd.Flags().String("account", "default", "Account that owns the key")
	cmd.Flags().String("expires-in", "", "How long the key lives, e.g. 90d, 2w, 12h or P90D (default: for ever)")
	cmd.Flags().String("expires-at", "", "When the key ends, e.g. 2030-12-31T23:59:59Z")
	cmd.Flags().Bool("manage-keys", false, "Let the key manage the keys of its account")
	choices(cmd, "scopes", apikey.ScopeNames()...)
	choices(cmd, "environment", "production", "sandbox")
	exclusive(cmd, "expires-in", "expires-at")
	return cmd
}

func createKey(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
	if err := NotEmpty(cmd, "expires-in", "expires-at"); err != nil {
		return err
	}
	var scopes []string
	lists, _ := cmd.Flags().GetStringArray("scopes") // a StringSlice would take the first line of each, and pass over the others
	for _, list := range lists {
		for scope := range strings.SplitSeq(list, ",") {
			scopes = append(scopes, strings.TrimSpace(scope)) // of spaces after a comma, as in a file to import
		}
	}
	if err := checkRead(cmd); err != nil {
		return err
	}
	shown := false // else there is none, whatever became of the transaction
	_, _, err := admin.Create(ctx, operator(), keyadmin.CreateRequest{
		Name: text(cmd, "name"), Account: text(cmd, "account"), Environment: text(cmd, "environment"), Scopes: scopes,
		ManageKeys: is(cmd, "manage-keys"), ExpiresIn: text(cmd, "expires-in"), ExpiresAt: text(cmd, "expires-at"),
		HandOut: func(key keyadmin.Key) error {
			shown = true
			return show(cmd, key, func(w io.Writer) {
				fmt.Fprintf(w, "Created %s of %s (%s, %s), which expires: %s.\n\n  %s\n\nThis is the only time the key is shown. Store it now.\n",
					key.ID, key.Account, key.Environment, permissions(key), moment(key.ExpiresAt, "never"), key.Key.Reveal())
			})
		},
	})
	if err != nil && ctx.Err() != nil && !shown {
		return fmt.Errorf("no key was made: %w", err)
	}
	return err
}

func keysListCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{Use: "list", Short: "Lists keys, the newest first", Args: noArgs}, listKeys)
	cmd.Flags().String("account", "", "Only keys of this account")
	cmd.Flags().String("environment", "", "Only keys of production or sandbox")
	cmd.Flags().String("status", "", "Only keys that are active, expiring (within 14 days), expired or revoked")
	cmd.Flags().String("name", "", "Only keys with this in their name; without --account, at its beginning")
	cmd.Flags().String("created-by", "", "Only keys that this actor made, e.g. cli:root or key:<id>")
	cmd.Flags().Int("limit", 0, "At most this many (default: all)")
	choices(cmd, "environment", "production", "sandbox")
	choices(cmd, "status", keyadmin.StatusNames()...)
	return cmd
}

func listKeys(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
	if err := NotEmpty(cmd, "account", "environment", "status", "name", "created-by"); err != nil {
		return err
	}
	request := keyadmin.ListRequest{
		Account: text(cmd, "account"), Environment: text(cmd, "environment"), Status: text(cmd, "status"), Name: text(cmd, "name"),
		CreatedBy: text(cmd, "created-by"),
	}
	filtered := request != keyadmin.ListRequest{}
	limit, err := limitFlag(cmd)
	if err != nil {
		return err
	}
	keys, cut, err := pages(limit, func(cursor string) ([]keyadmin.Key, string, error) {
		request.Cursor = cursor
		page, err := admin.List(ctx, operator(), request)
		return page.Keys, page.NextCursor, err
	})
	if err != nil {
		return err
	}
	err = show(cmd, keys, func(w io.Writer) {
		if len(keys) == 0 {
			if filtered {
				fmt.Fprintln(w, "No key matches.")
			} else {
				fmt.Fprintln(w, "No keys. Make one with 'rekall-gateway keys create'.")
			}
			return
		}
		keyTable(w, keys)
	})
	tellCut(cmd, len(keys), cut && err == nil)
	return err
}

// pages returns up to limit of what next returns, page by page, and whether there is more; never null.
func pages[T any](limit int, next func(cursor string) (page []T, nextCursor string, err error)) (all []T, cut bool, err error) {
	all = []T{}
	for cursor := ""; ; {
		page, nextCursor, err := next(cursor)
		if err != nil {
			return nil, false, err
		}
		all = append(all, page...)
		if cursor = nextCursor; cursor == "" || len(all) >= limit {
			return all[:min(len(all), limit)], cursor != "" || len(all) > limit, nil
		}
	}
}

// tellCut says that a list is not the whole: in an incident, it would be taken for all that happened.
func tellCut(cmd *cobra.Command, shown int, cut bool) {
	if cut {
		fmt.Fprintf(cmd.ErrOrStderr(), "The newest %d; --limit 0 shows all.\n", shown)
	}
}

func keyTable(w io.Writer, keys []keyadmin.Key) {
	var t table
	t.line("ID", "NAME", "ACCOUNT", "KEY", "STATUS", "EXPIRES", "LAST USED", "REPLACED BY", "SCOPES")
	for _, k := range keys {
		t.line(k.ID, k.Name, k.Account, k.Masked, k.Status,
			moment(k.ExpiresAt, "never"), moment(k.LastUsedAt, "-"), orDash(k.Successor), permissions(k))
	}
	t.print(w)
}

func moment(t *time.Time, none string) string {
	if t == nil {
		return none
	}
	return t.Format(time.RFC3339)
}

func orDash(s *string) string {
	if s == nil {
		return "-"
	}
	return *s
}

func permissions(key keyadmin.Key) string {
	if key.ManageKeys {
		return strings.Join(append(key.Scopes, "(manages keys)"), " ")
	}
	return strings.Join(key.Scopes, " ")
}

func keysShowCommand() *cobra.Command {
	return subcommand(&cobra.Command{Use: "show <id>", Short: "Shows a key, but for the key itself", Args: arguments("the id of a key")}, showKey)
}

func showKey(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
	key, err := admin.Get(ctx, operator(), args[0])
	if err != nil {
		return err
	}
	return show(cmd, key, func(w io.Writer) { describe(w, key) })
}

func describe(w io.Writer, key keyadmin.Key) {
	var t table
	t.line("ID", key.ID)
	t.line("Name", key.Name)
	t.line("Account", key.Account)
	t.line("Environment", key.Environment)
	t.line("Key", key.Masked)
	t.line("Status", key.Status)
	t.line("Scopes", permissions(key))
	t.line("Created", key.CreatedAt.Format(time.RFC3339)+" by "+orDash(key.CreatedBy))
	t.line("Expires", moment(key.ExpiresAt, "never"))
	t.line("Revoked", moment(key.RevokedAt, "-"))
	t.line("Last used", moment(key.LastUsedAt, "-"))
	t.line("Replaces", orDash(key.Predecessor))
	t.line("Replaced by", orDash(key.Successor))
	if key.OverlapOnFirstUse != nil {
		t.line("First use", "is awaited; the key that it replaces, if it has not ended, lives "+*key.OverlapOnFirstUse+" from then")
	}
	t.print(w)
}

func keysRenameCommand() *cobra.Command {
	return subcommand(&cobra.Command{Use: "rename <id> <name>", Short: "Gives a key another name", Args: arguments("the id of a key", "its new name")}, renameKey)
}

func renameKey(ctx context.Context, cmd *cobra.Command, args []string, admin *keyadmin.Admin) error {
	key, err := admin.Rename(ctx, operator(), args[0], args[1])
	if err != nil {
		return err
	}
	return show(cmd, key, func(w io.Writer) { fmt.Fprintf(w, "Renamed %s to %s.\n", key.ID, key.Name) })
}

func keysAuditCommand() *cobra.Command {
	cmd := subcommand(&cobra.Command{Use: "audit", Short: "Shows who did what to which key, the newest first", Args: noArgs}, showAudit)
	cmd.Flags().String("account", "", "Only keys of this account")
	cmd.Flags().String("key-id", "", "Only this key")
	cmd.Flags().String("actor", "", "Only what this actor did, e.g. cli:root or key:<id>")
	cmd.Flags().String("action", "", "Only this action, e.g. key.revoked")
	cmd.Flags().String("since", "", "Only at or after this time, e.g. 2030-12-31T23:59:59Z")
	cmd.Flags().String("until", "", "Only before this time")
	cmd.Flags().Int("limit", 100, "At most this many; 0: all")
	choices(cmd, "action", keyadmin.ActionNames()...)
	return cmd
}

func showAudit(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
	if err := NotEmpty(cmd, "account", "key-id", "actor", "action", "since", "until"); err != nil {
		return err
	}
	request := keyadmin.AuditRequest{
		Account: text(cmd, "account"), KeyID: text(cmd, "key-id"), Actor: text(cmd, "actor"), Action: text(cmd, "action"),
		Since: text(cmd, "since"), Until: text(cmd, "until"),
	}
	filtered := request != keyadmin.AuditRequest{}
	limit, err := limitFlag(cmd)
	if err != nil {
		return err
	}
	if request.KeyID != "" {
		if _, err := admin.Get(ctx, operator(), request.KeyID); err != nil {
			return err
		}
	}
	entries, cut, err := pages(limit, func(cursor string) ([]keyadmin.AuditEntry, string, error) {
		request.Cursor = cursor
		page, err := admin.Audit(ctx, operator(), request)
		return page.Entries, page.NextCursor, err
	})
	if err != nil {
		return err
	}
	err = show(cmd, entries, func(w io.Writer) {
		if len(entries) == 0 {
			if filtered {
				fmt.Fprintln(w, "No entry matches.")
			} else {
				fmt.Fprintln(w, "No entries.")
			}
			return
		}
		var t table
		t.line("AT", "ACTOR", "ACTION", "ACCOUNT", "KEY", "DETAILS")
		for _, e := range entries {
			t.line(e.At.Format(time.RFC3339), e.Actor, e.Action, orDash(e.Account), orDash(e.KeyID), oneLine(e.Details))
		}
		t.print(w)
	})
	tellCut(cmd, len(entries), cut && err == nil)
	return err
}

func keysCheckCommand() *cobra.Command {
	return subcommand(&cobra.Command{
		Use:     "check",
		Short:   "Says what the key on standard input is",
		Long:    "Reads a key from standard input and says whether it is well-formed, known and in force. The key is neither shown nor stored.",
		Example: "  rekall-gateway keys check < key.txt",
		Args:    noArgs,
	}, checkKey)
}

func checkKey(ctx context.Context, cmd *cobra.Command, _ []string, admin *keyadmin.Admin) error {
	input, err := readSecret(ctx, cmd)
	if err != nil {
		return err
	}
	checked, err := admin.Check(ctx, operator(), input)
	if err != nil {
		return err
	}
	if err := show(cmd, checked, func(w io.Writer) { explain(w, checked) }); err != nil {
		return err
	}
	switch {
	case !checked.WellFormed:
		return errors.New("not a key: rk_ or rk_test_ and letters and digits, 48 characters in all")
	case checked.Key == nil:
		return fmt.Errorf("%w, though it is well-formed", keyadmin.ErrNotFound)
	case checked.Key.Status != keyadmin.Active:
		return fmt.Errorf("%w: %s is %s", keyadmin.ErrEnded, checked.Key.ID, checked.Key.Status)
	}
	return nil
}

func explain(w io.Writer, checked keyadmin.Checked) {
	if !checked.WellFormed {
		return // the error says it
	}
	fmt.Fprintf(w, "A well-formed %s key.\n", checked.Environment)
	if !checked.ChecksumValid {
		fmt.Fprintln(w, "Its checksum does not fit: it is mistyped, or was not made by this gateway.")
	}
	if checked.Key != nil {
		fmt.Fprintln(w)
		describe(w, *checked.Key)
	}
}

// maxSecret is more than a key with what may stand around it.
const maxSecret = 1024

// readSecret reads what a terminal must not show, and nothing besides: of two keys, the second would look checked too.
func readSecret(ctx context.Context, cmd *cobra.Command) (string, error) {
	input, err := readHidden(ctx, cmd)
	if err != nil {
		return "", fmt.Errorf("read the key: %w", err)
	}
	secret := strings.TrimSpace(keyadmin.WithoutByteOrderMark(string(input)))
	if len(input) > maxSecret || strings.ContainsAny(secret, "\r\n") {
		return "", errors.New("give one key, and nothing besides")
	}
	return secret, nil
}

func readHidden(ctx context.Context, cmd *cobra.Command) ([]byte, error) {
	file, ok := cmd.InOrStdin().(*os.File)
	if !ok || !term.IsTerminal(int(file.Fd())) {
		return io.ReadAll(io.LimitReader(interruptible(ctx, cmd.InOrStdin()), maxSecret+1))
	}
	terminal := int(file.Fd())
	before, err := term.GetState(terminal)
	if err != nil {
		return nil, err
	}
	defer fmt.Fprintln(cmd.ErrOrStderr())
	fmt.Fprint(cmd.ErrOrStderr(), "Key: ")
	type input struct {
		line []byte
		err  error
	}
	read := make(chan input, 1)
	go func() {
		line, err := term.ReadPassword(terminal)
		read <- input{line, err}
	}()
	select {
	case <-ctx.Done():
		_ = term.Restore(terminal, before) // or the shell would not show what is typed
		return nil, context.Cause(ctx)
	case i := <-read:
		return i.line, i.err
	}
}

// oneLine writes the details of an entry of the audit.
func oneLine(details map[string]any) string {
	var text strings.Builder
	if err := jsonEncoder(&text).Encode(details); err != nil || text.String() == "{}\n" {
		return "-"
	}
	return strings.TrimSuffix(text.String(), "\n")
}

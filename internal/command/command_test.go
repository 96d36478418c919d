package command_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/command"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// try runs a command and returns what it printed.
func try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	for _, c := range command.All() {
		if c.Name != name {
			continue
		}
		cmd := &cobra.Command{Use: c.Name, SilenceUsage: true}
		c.SetUp(cmd)
		var output bytes.Buffer
		cmd.SetArgs(args)
		cmd.SetOut(&output)
		cmd.SetErr(&output)
		err := cmd.Execute()
		return output.String(), err
	}
	t.Fatalf("no command %s", name)
	return "", nil
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if _, err := try(t, name, args...); err != nil {
		t.Errorf("%s %s: %v", name, args[0], err)
	}
}

// TestWhoGivesAKeyAsAnArgumentIsToldSoThoughNoDatabaseIsFound: it is in the shell's history also where no database was named.
func TestWhoGivesAKeyAsAnArgumentIsToldSoThoughNoDatabaseIsFound(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	for _, database := range []string{"", "postgres://%", "postgres://127.0.0.1:1/none"} {
		t.Setenv(keystore.DatabaseVariable, database)
		for _, args := range [][]string{
			{"keys", "show", key}, {"keys", "revoke", key}, {"keys", "list", "--name", key}, {"limits", "key", key}, {"keys", "check", key}, {"keys", key},
		} {
			output, err := try(t, args[0], args[1:]...)
			if !errors.Is(err, keyadmin.ErrNotFound) || !strings.Contains(output, "now in your shell's history") || apikey.ContainsKey(output) {
				t.Errorf("%s with database %q: %s", args[1], database, apikey.Redact(output))
			}
		}
	}
}

func TestCommandsReachAPostgresThatIsFarAway(t *testing.T) {
	far := pgtest.Proxy{Delay: time.Second}
	database := far.URL(t, pgtest.URL(t))
	run(t, "migrate", "--database", database)
	run(t, "keys", "list", "--database", database)
	run(t, "limits", "show", "--database", database)
	run(t, "edges", "list", "--database", database)
}

// TestATimeThatEndsBeforeItBeginsIsRefused: nothing lies in it, which would look as if nothing had happened.
func TestATimeThatEndsBeforeItBeginsIsRefused(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, pgtest.Migrated(t))
	const early, late = "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z"
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"audit", "--since", late, "--until", early}, "Error: --since must be before --until\n"},
		{[]string{"revoke", "--created-after", late, "--created-before", early}, "Error: --created-after must be before --created-before\n"},
	} {
		if output, err := try(t, "keys", test.args...); command.ExitCode(err) != 1 || output != test.want {
			t.Errorf("%s: %v %s", test.args, err, output)
		}
	}
}

// TestTextsArePrintedAsTheyAre, in JSON too: it is read in a terminal, and by no browser.
func TestTextsArePrintedAsTheyAre(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, pgtest.Migrated(t))
	const name = "A <b> & c"
	run(t, "keys", "create", "--name", name, "--scopes", "hives:read", "--environment", "sandbox")
	for _, args := range [][]string{
		{"list"}, {"list", "--json"}, {"audit"}, {"audit", "--json"}, {"rotate", "--older-than", "0s", "--json"}, {"rotate", "--older-than", "0s"},
	} {
		if output, err := try(t, "keys", args...); err != nil || !strings.Contains(output, name) {
			t.Errorf("%s: %v %s", args, err, output)
		}
	}
}

// TestColumnsStandUnderEachOtherWhateverNamesAreWrittenIn: some characters take two places of a terminal's line, and others none.
func TestColumnsStandUnderEachOtherWhateverNamesAreWrittenIn(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, pgtest.Migrated(t))
	places := map[string]int{
		"Production Backend": 18, "本番環境": 8, "バックエンド　二": 16, "ﾃｽﾄ": 3, "ＡＢ": 4, "한국어": 6, "\u1112\u1161\u11ab": 2, "🚀 Launch": 9, "Cafe\u0301": 4,
		"नमस्ते": 4, "سلام": 4, "Überraschung": 12,
	}
	for name := range places {
		run(t, "keys", "create", "--name", name, "--account", "acme", "--scopes", "hives:read", "--environment", "sandbox")
	}
	output, err := try(t, "keys", "list")
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range places {
		if want := "  " + name + strings.Repeat(" ", 18-n) + "  acme  "; !strings.Contains(output, want) {
			t.Errorf("no %q in\n%s", want, output)
		}
	}
}

// TestNothingIsSaidInWords: a table that is empty looks like an answer that was cut off.
func TestNothingIsSaidInWords(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, pgtest.Migrated(t))
	for _, test := range []struct{ args, want string }{
		{"keys list", "No keys. Make one with 'rekall-gateway keys create'.\n"}, {"keys list --account acme", "No key matches.\n"},
		{"keys audit", "No entries.\n"}, {"keys audit --account acme", "No entry matches.\n"}, {"keys audit --json", "[]\n"},
		{"edges list", "No edge reports to this database.\n"}, {"edges list --json", "[]\n"},
	} {
		args := strings.Fields(test.args)
		if output, err := try(t, args[0], args[1:]...); err != nil || output != test.want {
			t.Errorf("%s: %v %s", test.args, err, output)
		}
	}
}

// TestHelpLeadsToNoManualThatDoesNotHaveTheCommand: the server's says where its own is.
func TestHelpLeadsToNoManualThatDoesNotHaveTheCommand(t *testing.T) {
	server := &cobra.Command{Use: "server"}
	server.SetHelpTemplate(server.HelpTemplate() + "the server's manual")
	for _, c := range command.All() {
		cmd := &cobra.Command{Use: c.Name, Short: c.Short}
		c.SetUp(cmd)
		server.AddCommand(cmd)
	}
	for _, args := range [][]string{{"keys", "--help"}, {"keys", "audit", "--help"}, {"migrate", "--help"}} {
		var output bytes.Buffer
		server.SetArgs(args)
		server.SetOut(&output)
		if err := server.Execute(); err != nil || !strings.Contains(output.String(), "Usage:") || strings.Contains(output.String(), "the server's manual") {
			t.Errorf("%s: %v %s", args, err, output.String())
		}
	}
}

// TestShowDoesNotSayOfAKeyThatHasEndedThatItLives: a successor that was not used yet may outlive the key that it replaces.
func TestShowDoesNotSayOfAKeyThatHasEndedThatItLives(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	t.Setenv(keystore.DatabaseVariable, databaseURL)
	admin, operator := keyadmin.New(pgtest.Store(t, databaseURL)), keyadmin.Operator("test")
	old, _, err := admin.Create(t.Context(), operator, keyadmin.CreateRequest{
		Name: "Backend", Account: "acme", Environment: "sandbox", Scopes: []string{"memories:read"},
	})
	if err != nil {
		t.Fatal(err)
	}
	next, _, err := admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: 2 * time.Hour, OnFirstUse: true}})
	if err != nil {
		t.Fatal(err)
	}
	run(t, "keys", "revoke", old.ID)
	if output, err := try(t, "keys", "show", next.ID); err != nil || !strings.Contains(output, "the key that it replaces, if it has not ended, lives 2h from then") {
		t.Errorf("%v %s", err, output)
	}
}

// TestEachScopeThatIsGivenIsGrantedOrRefused: a list with lines must not make a key of the first of them.
func TestEachScopeThatIsGivenIsGrantedOrRefused(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, pgtest.Migrated(t))
	create := []string{"create", "--name", "Backend", "--environment", "sandbox"}
	for _, scopes := range []string{"hives:read\nhives:write", "hives:read\r\nhives:write", "hives:read,", `"hives:read"`, `"hives:read`, "hives:read hives:write", "\n", ""} {
		if output, err := try(t, "keys", append(create, "--scopes", scopes)...); err == nil || !strings.Contains(output, "Error: --scopes ") ||
			strings.Count(output, "\n") != 1 {
			t.Errorf("%q: %v %s", scopes, err, output)
		}
	}
	for _, flags := range [][]string{{"--scopes", "hives:read, hives:write\n"}, {"--scopes", "hives:read", "--scopes=hives:write"}} {
		if output, err := try(t, "keys", append(create, flags...)...); err != nil || !strings.Contains(output, "(sandbox, hives:read hives:write)") {
			t.Errorf("%q: %v %s", flags, err, apikey.Redact(output))
		}
	}
}

func TestManualNamesEachExitCode(t *testing.T) {
	manual, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{nil, errors.New("anything else"), keyadmin.ErrNotFound, keyadmin.ErrAlreadyRevoked, keyadmin.ErrEnded} {
		if code := command.ExitCode(err); !strings.Contains(string(manual), fmt.Sprintf("\n| %d | ", code)) {
			t.Errorf("no exit code %d, of %v", code, err)
		}
	}
}

// TestRevokeSaysThatTheKeyIsRevokedThoughAnEdgeThatWasTakenOverLocksItsTables, whether or not it was to wait for the edges.
func TestRevokeSaysThatTheKeyIsRevokedThoughAnEdgeThatWasTakenOverLocksItsTables(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	t.Setenv(keystore.DatabaseVariable, databaseURL)
	admin := keyadmin.New(pgtest.Store(t, databaseURL))
	var ids []string
	for range 2 {
		key, _, err := admin.Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
			Name: "Backend", Account: "acme", Environment: "sandbox", Scopes: []string{"memories:read"},
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := admin.Rotate(t.Context(), keyadmin.Operator("test"), key.ID, keyadmin.RotateRequest{}); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, key.ID)
	}
	pgtest.LockAsEdge(t, databaseURL)
	if output, err := try(t, "keys", "revoke", ids[0]); err != nil || !strings.Contains(output, "Revoked "+ids[0]) || !strings.Contains(output, "lives on. To revoke") {
		t.Errorf("%s%v", output, err)
	}
	if output, err := try(t, "keys", "revoke", ids[1], "--wait"); err == nil || !strings.HasPrefix(output, "Revoked "+ids[1]) ||
		!strings.Contains(output, "is revoked, but the edges could not be watched: database did not list the edges") {
		t.Errorf("%s%v", output, err)
	}
}

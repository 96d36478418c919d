package test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// keysCLI is the binary's "keys" command on a database of the test's own.
type keysCLI struct {
	t        *testing.T
	database string
}

func newKeysCLI(t *testing.T) *keysCLI {
	t.Helper()
	database := pgtest.Migrated(t)
	return &keysCLI{t, database}
}

// try runs a command and returns what it printed and its exit code. No key may be in what it says went wrong.
func (k *keysCLI) try(stdin string, args ...string) (stdout, stderr string, code int) {
	k.t.Helper()
	cmd := exec.Command(program, append([]string{"keys"}, args...)...)
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+k.database)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		k.t.Fatal(err)
	}
	if apikey.ContainsKey(errOut.String()) {
		k.t.Errorf("%s shows a key on stderr", args[0])
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

func (k *keysCLI) run(args ...string) string {
	k.t.Helper()
	stdout, stderr, code := k.try("", args...)
	if code != 0 {
		k.t.Fatalf("%v: exit %d, %s", args, code, stderr)
	}
	return stdout
}

// read runs a command with --json.
func read[T any](k *keysCLI, args ...string) (result T) {
	k.t.Helper()
	return decoded[T](k, k.run(append(args, "--json")...))
}

func decoded[T any](k *keysCLI, text string) (result T) {
	k.t.Helper()
	if err := json.Unmarshal([]byte(text), &result); err != nil {
		k.t.Fatalf("%v in %s", err, apikey.Redact(text))
	}
	return result
}

func (k *keysCLI) create(name string, more ...string) keyadmin.Key {
	k.t.Helper()
	return read[keyadmin.Key](k, append([]string{"create", "--name", name, "--scopes", "memories:read", "--environment", "production"}, more...)...)
}

func (k *keysCLI) show(id string) keyadmin.Key {
	k.t.Helper()
	return read[keyadmin.Key](k, "show", id)
}

func TestKeyIsRenamedRotatedAndRestoredFromTheCommandLine(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("Backend", "--expires-at", time.Now().Add(time.Hour*1000).Format(time.RFC3339), "--manage-keys")
	if !key.ManageKeys || !strings.HasPrefix(*key.CreatedBy, "cli:") {
		t.Errorf("created %+v", key)
	}
	k.run("rename", key.ID, "New Backend")
	if text := k.run("show", key.ID); !strings.Contains(text, "New Backend") || !strings.Contains(text, "manages keys") {
		t.Errorf("show: %s", text)
	}
	next := read[keyadmin.Key](k, "rotate", key.ID, "--overlap", "48h")
	if next.Name != "New Backend" || !next.ManageKeys || *next.Predecessor != key.ID || !apikey.ChecksumValid(next.Key.Reveal()) {
		t.Errorf("successor %+v", next)
	}
	if old := k.show(key.ID); *old.Successor != next.ID || old.ExpiresAt.Sub(next.CreatedAt) != 48*time.Hour {
		t.Errorf("old key %+v", old)
	}
	k.run("rotate", key.ID, "--undo")
	if old := k.show(key.ID); old.Successor != nil || !old.ExpiresAt.Equal(*key.ExpiresAt) || k.show(next.ID).Status != keyadmin.Revoked {
		t.Errorf("restored %+v", old)
	}
	text := k.run("rotate", key.ID, "--overlap", "on-first-use")
	if !apikey.ContainsKey(text) || !strings.Contains(text, "first use") {
		t.Errorf("rotate: %s", apikey.Redact(text))
	}
	var actions []string
	for _, e := range read[[]keyadmin.AuditEntry](k, "audit", "--key-id", key.ID) {
		actions = append(actions, string(e.Action))
	}
	if got := strings.Join(actions, " "); got != "key.rotated key.rotation_undone key.rotated key.renamed key.created" {
		t.Errorf("audit: %s", got)
	}
	if text := k.run("audit", "--limit", "1"); strings.Count(text, "\n") != 2 || !strings.Contains(text, "key.rotated") {
		t.Errorf("audit: %s", text)
	}
}

// TestListThatIsCutSaysSoBesideIt: in an incident, the newest entries would be taken for all that there are.
func TestListThatIsCutSaysSoBesideIt(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	const keys = 101 // one more than the audit shows, and than a page has
	var file strings.Builder
	file.WriteString("hash,account,name,environment,scopes\n")
	for i := range keys {
		fmt.Fprintf(&file, "%064x,acme,Backend,sandbox,memories:read\n", i)
	}
	if _, stderr, code := k.try(file.String(), "import", "-", "--format", "csv"); code != 0 {
		t.Fatalf("import: exit %d, %s", code, stderr)
	}
	k.run("revoke", "--account", "acme", "--yes") // which the audit has for each key
	for _, list := range []struct {
		args string
		want int // shown; all of them are no cut
	}{
		{"audit --action key.revoked", 100}, {"audit --action key.revoked --limit 0", keys}, {"audit --action key.revoked --limit 7", 7},
		{"audit --action key.revoked --limit 100", 100}, {"audit --action key.revoked --limit 101", keys},
		{"list", keys}, {"list --limit 0", keys}, {"list --limit 7", 7}, {"list --limit 100", 100}, {"list --limit 101", keys},
	} {
		want := ""
		if list.want < keys {
			want = fmt.Sprintf("The newest %d; --limit 0 shows all.\n", list.want)
		}
		for _, more := range []string{"", " --json"} {
			stdout, stderr, code := k.try("", strings.Fields(list.args+more)...)
			shown := strings.Count(stdout, "\n") - 1 // of its head
			if more != "" {
				shown = len(decoded[[]any](k, stdout))
			}
			if code != 0 || shown != list.want || stderr != want {
				t.Errorf("%s: exit %d, %d shown, %q; want %d and %q", list.args+more, code, shown, stderr, list.want, want)
			}
		}
	}
}

func TestRevokeNamesTheSuccessorThatLivesOn(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("Backend")
	successor := read[keyadmin.Key](k, "rotate", key.ID)
	if text := k.run("revoke", key.ID); !strings.Contains(text, successor.ID+", the successor of "+key.ID+", lives on") ||
		!strings.Contains(text, "rekall-gateway keys revoke "+successor.ID) {
		t.Error(text)
	}
	key = k.create("Backend")
	k.run("revoke", read[keyadmin.Key](k, "rotate", key.ID).ID)
	if text := k.run("revoke", key.ID); strings.Contains(text, "successor") {
		t.Errorf("of one that is revoked: %s", text)
	}
}

// TestUndoingARotationNamesTheSuccessorsSuccessorThatLivesOn: it has the rights of both, and nothing else leads to it any longer.
func TestUndoingARotationNamesTheSuccessorsSuccessorThatLivesOn(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("Backend")
	successor := read[keyadmin.Key](k, "rotate", key.ID)
	next := read[keyadmin.Key](k, "rotate", successor.ID)
	if text := k.run("rotate", key.ID, "--undo"); !strings.Contains(text, next.ID+", the successor of "+successor.ID+", lives on") ||
		!strings.Contains(text, "rekall-gateway keys revoke "+next.ID) {
		t.Error(text)
	}
	read[keyadmin.Key](k, "rotate", key.ID)
	if text := k.run("rotate", key.ID, "--undo"); strings.Contains(text, "lives on") {
		t.Errorf("of one that has no successor: %s", text)
	}
}

func TestListThatFindsNothingSaysWhetherThereIsAKeyAtAll(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	if text := k.run("list"); !strings.Contains(text, "rekall-gateway keys create") {
		t.Error(text)
	}
	k.create("Backend")
	if text := k.run("list", "--account", "nobody"); text != "No key matches.\n" {
		t.Error(text)
	}
}

func TestExitCodesTellWhatWasFound(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("Backend")
	active := k.create("Pasted")
	pasted := active.Key.Reveal()
	k.run("revoke", key.ID)
	const missing = "key_0000000000000000000000"
	for _, test := range []struct {
		code int
		args []string
	}{
		{3, []string{"show", missing}}, {3, []string{"rename", missing, "n"}}, {3, []string{"rotate", missing}},
		{3, []string{"rotate", missing, "--undo"}}, {3, []string{"revoke", missing}}, {3, []string{"show", pasted}},
		{3, []string{"revoke", pasted}}, {3, []string{"list", "--name", pasted}}, {3, []string{"usage", pasted}},
		{4, []string{"revoke", key.ID}}, {4, []string{"rotate", key.ID}},
		{3, []string{"check", pasted}}, {3, []string{pasted}}, {1, []string{"list", "--" + pasted}},
		{1, []string{"rotate"}}, {1, []string{"rotate", key.ID, "--older-than", "90d"}}, {1, []string{"rotate", key.ID, "--overlap", "soon"}},
		{1, []string{"revoke"}}, {1, []string{"revoke", key.ID, "--account", "default"}}, {1, []string{"revoke", "--account", ""}},
		{1, []string{"revoke", "--created-by", "", "--account", "default", "--yes"}}, {1, []string{"revoke", "--account", "default", "--yes", "--dry-run"}},
		{1, []string{"revoke", "--hashes", "/nonexistent"}}, {1, []string{"import", "/nonexistent.csv"}}, {1, []string{"list", "--status", "gone"}},
		{1, []string{"list", "--limit", "-1"}}, {1, []string{"audit", "--since", "yesterday"}}, {1, []string{"rename", key.ID, "a\nb"}},
		// What selects nothing, as if there were nothing.
		{3, []string{"revoke", "--account", "globex", "--yes"}}, {3, []string{"revoke", "--account", "globex"}},
		{3, []string{"revoke", "--created-by", "key:" + missing, "--yes", "--json"}}, {1, []string{"revoke", "--created-by", missing, "--yes"}},
		{1, []string{"revoke", "--created-by", "key:key_0123", "--yes"}}, {1, []string{"list", "--created-by", "root"}},
		{3, []string{"audit", "--key-id", "nope"}}, {3, []string{"audit", "--key-id", missing}},
		{1, []string{"audit", "--action", "key.foo"}}, {1, []string{"audit", "--actor", "root"}},
		// What would do more than was meant.
		{1, []string{"revoke", active.ID, "--dry-run"}}, {1, []string{"rotate", active.ID, "--dry-run"}},
		{1, []string{"rotate", active.ID, "--account", "other"}}, {1, []string{"rotate", active.ID, "--overlap", ""}},
		{1, []string{"rotate", "--older-than", "0s", "--account", "", "--yes"}}, {1, []string{"rotate", "--older-than", "", "--yes"}},
		{1, []string{"create", "--name", "a", "--scopes", "hives:read", "--environment", "sandbox", "--expires-in", ""}},
		{1, []string{"create", "--name", "a", "--scopes", "hives:read", "--environment", "sandbox", "--expires-at", ""}},
		{1, []string{"list", "--account", ""}}, {1, []string{"audit", "--key-id", ""}}, {1, []string{"usage", active.ID, "--" + pasted}},
	} {
		stdout, stderr, code := k.try("", test.args...)
		if code != test.code || stdout != "" || strings.Count(strings.TrimSpace(stderr), "\n") != 0 || strings.TrimSpace(stderr) == "" {
			t.Errorf("%s: exit %d, want %d and one line: %q %q", apikey.Redact(fmt.Sprint(test.args)), code, test.code, stdout, stderr)
		}
	}
	if list := read[[]keyadmin.Key](k, "list", "--status", "active"); len(list) != 1 || list[0].ID != active.ID || list[0].Successor != nil {
		t.Errorf("active keys: %+v", list)
	}
}

func TestNoCommandShowsAKeyThatItIsGivenAsAnArgument(t *testing.T) {
	t.Parallel()
	key := apikey.Generate(apikey.Production)
	for _, command := range []string{"", "keys", "keys create", "keys list", "limits", "limits show", "edges", "edges list", "migrate", "dev --listen nowhere"} {
		for _, argument := range []string{key, "--" + key, "--json=" + key} {
			stdout, stderr, code := cli(t, "", append(strings.Fields(command), argument)...)
			if code == 0 || apikey.ContainsKey(stdout+stderr) || strings.Count(strings.TrimSpace(stderr), "\n") > 1 {
				t.Errorf("%q: exit %d: %s", command, code, apikey.Redact(stdout+stderr))
			}
		}
	}
	for _, command := range []string{"help", "help keys", "completion"} { // which shows all commands
		stdout, stderr, _ := cli(t, "", append(strings.Fields(command), key)...)
		if apikey.ContainsKey(stdout + stderr) {
			t.Errorf("%q: %s", command, apikey.Redact(stdout+stderr))
		}
	}
}

func TestWrongUseOfACommandIsToldInItsOwnWords(t *testing.T) {
	t.Parallel()
	const id = "key_0000000000000000000000"
	create := "keys create --name n --scopes memories:read --environment sandbox "
	for args, want := range map[string]string{
		"keys show":                             "give the id of a key, and nothing besides",
		"keys rename " + id:                     "give the id of a key and its new name",
		"keys usage a b":                        "give the id of a key",
		"keys import":                           "give a file, or - for standard input",
		"keys revoke a b":                       "give the id of one key",
		"keys rotate a b":                       "give the id of one key",
		"limits account":                        "give an account",
		"limits tier":                           "give a tier",
		"keys rotate a --undo --overlap 1h":     "--undo and --overlap exclude each other",
		"keys revoke a --yes --dry-run":         "--yes and --dry-run exclude each other",
		"limits show --account a --key-id b":    "--account and --key-id exclude each other",
		create + "--expires-in 1d --expires-at": "flag needs an argument: --expires-at",
		create + "--expires-in 1d --expires-at 2030-12-31T23:59:59Z": "--expires-in and --expires-at exclude each other",
		"keys list acme":   `unexpected "acme": give everything with flags`,
		"limits show acme": `unexpected "acme"`,
		create + "Backend": `unexpected "Backend": give everything with flags, and quote a value that has spaces`,
		"migrate --plan --edge-role a --admin-role a": "edges and administrators need different roles",
		"bogus":      `unknown command "bogus" for "rekall-gateway"`,
		"keys bogus": `unknown command "bogus" for "rekall-gateway keys": use one of audit, check, create, import, list, rename, revoke, rotate, show, usage (see --help)`,
	} {
		stdout, stderr, code := cli(t, "postgres://nobody@127.0.0.1:1/none", strings.Fields(args)...)
		if code != 1 || stdout != "" || !strings.Contains(stderr, "Error: "+want) {
			t.Errorf("%s: %d %s%s", args, code, stdout, stderr)
		}
	}
	if stdout, _, _ := cli(t, "", "keys", "create", "--help"); !strings.Contains(stdout, "  rekall-gateway keys create --name <name>") ||
		strings.Contains(stdout, " caddy ") || strings.Contains(stdout, "caddyserver.com") {
		t.Errorf("help: %s", stdout)
	}
	if stdout, _, _ := cli(t, "", "--help"); !strings.Contains(stdout, "Rekall's API-key gateway") {
		t.Errorf("help: %s", stdout)
	}
}

func TestErrorNamesTheFlagOnlyWhereThereIsOne(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	const id = "key_0000000000000000000000"
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"rename", id, ""}, "Error: name must have"},
		{[]string{"create", "--name", "", "--scopes", "memories:read", "--environment", "sandbox"}, "Error: --name must have"},
		{[]string{"create", "--name", "n", "--scopes", "memories:read", "--environment", "sandbox", "--expires-in", "x"}, "Error: --expires-in must be"},
		{[]string{"rotate", "--older-than", "1d", "--account", "acme "}, "Error: --account must not begin or end with a space"},
	} {
		if stdout, stderr, code := k.try("", test.args...); code != 1 || stdout != "" || !strings.HasPrefix(stderr, test.want) {
			t.Errorf("%q: %d %s%s, want %s", test.args, code, stdout, stderr, test.want)
		}
	}
	if stdout, stderr, code := cli(t, k.database, "limits", "tier", "gold", "--burst", "1"); code != 1 || !strings.HasPrefix(stderr, "Error: tier must be") {
		t.Errorf("limits tier: %d %s%s", code, stdout, stderr)
	}
	if stdout, stderr, code := k.try("", "import", "-", "--format", "jsonl"); code != 1 || !strings.Contains(stderr, "nothing was imported") {
		t.Errorf("an import of nothing: %d %s%s", code, stdout, stderr)
	}
}

func TestIncidentSwitchCountsBeforeItActs(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	for _, account := range []string{"acme", "acme", "globex"} {
		k.create("Backend", "--account", account)
	}
	type result struct {
		DryRun bool  `json:"dry_run"`
		Count  int64 `json:"count"`
		Edges  []any `json:"edges"`
	}
	if got := read[result](k, "revoke", "--account", "acme"); !got.DryRun || got.Count != 2 {
		t.Errorf("without --yes: %+v", got)
	}
	if list := read[[]keyadmin.Key](k, "list", "--status", "active"); len(list) != 3 {
		t.Errorf("%d keys are active after a dry run", len(list))
	}
	if got := read[result](k, "revoke", "--account", "acme", "--yes"); got.DryRun || got.Count != 2 {
		t.Errorf("with --yes: %+v", got)
	}
	leaked := k.create("Leaked")
	hash := fmt.Sprintf("%x\n\n%x\n", sha256.Sum256([]byte(leaked.Key.Reveal())), sha256.Sum256([]byte("unknown")))
	if stdout, stderr, code := k.try("\ufeff"+hash, "revoke", "--hashes", "-", "--yes"); code != 0 || !strings.Contains(stdout, "Revoked 1 key. ") {
		t.Errorf("hashes: %d %s %s", code, stdout, stderr)
	}
	if stdout, stderr, code := k.try(leaked.Key.Reveal()+"\n", "revoke", "--hashes", "-", "--yes"); code != 1 || stdout != "" || !strings.Contains(stderr, "--hashes line 1") {
		t.Errorf("a key in place of its hash: %d %s %s", code, stdout, stderr)
	}
	if list := read[[]keyadmin.Key](k, "list", "--status", "active"); len(list) != 1 || list[0].Account != "globex" {
		t.Errorf("left: %+v", list)
	}
}

func TestOldKeysAreRotatedWithoutAnybodyWatching(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	old := []keyadmin.Key{k.create("One"), k.create("Two")}
	pgtest.Exec(t, k.database, `alter table rekall.api_keys disable trigger stamp; update rekall.api_keys set created_at = created_at - interval '91 days'`)
	fresh := k.create("Fresh")
	rotate := func(args ...string) (lines []keyadmin.Key) {
		t.Helper()
		for line := range strings.Lines(k.run(append([]string{"rotate", "--older-than", "90d", "--json"}, args...)...)) {
			lines = append(lines, decoded[keyadmin.Key](k, line))
		}
		return lines
	}
	if dry := rotate(); len(dry) != 2 || dry[0].ID != old[0].ID || dry[0].Key != "" || k.show(old[0].ID).Successor != nil {
		t.Errorf("without --yes: %+v", dry)
	}
	done := rotate("--yes")
	if len(done) != 2 || *done[0].Predecessor != old[0].ID || !apikey.ChecksumValid(done[1].Key.Reveal()) {
		t.Errorf("with --yes: %+v", done)
	}
	if again := rotate("--yes"); len(again) != 0 {
		t.Errorf("again: %+v", again)
	}
	if k.show(fresh.ID).Successor != nil {
		t.Error("a key that is not old was rotated")
	}
}

// A successor that nobody saw would end its predecessor with nothing in its place.
func TestSuccessorThatCouldNotBePrintedIsNoSuccessor(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("One")
	for _, args := range []string{
		"--older-than 0s --yes >/dev/full", key.ID + " --overlap 0 >/dev/full", key.ID + " --json >/dev/full",
		"--older-than 0s --yes --json >&-", key.ID + " >&-",
	} {
		cmd := exec.Command("sh", "-c", `"$0" keys rotate `+args, program)
		cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+k.database)
		if err := cmd.Run(); err == nil {
			t.Errorf("%v: all was well", args)
		}
		if got := k.show(key.ID); got.Successor != nil || got.ExpiresAt != nil || got.Status != keyadmin.Active {
			t.Errorf("%v: key %+v", args, got)
		}
	}
}

func TestFileOfKeysIsImportedOnceAndWhole(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	secret := apikey.Generate(apikey.Sandbox)
	file := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	csv := file("keys.csv", fmt.Sprintf("hash,account,name,environment,scopes\n%x,acme,Old,sandbox,memories:read\n", sha256.Sum256([]byte(secret))))
	for _, test := range []struct {
		args []string
		want keyadmin.Imported
	}{
		{[]string{"import", csv, "--dry-run"}, keyadmin.Imported{Imported: 1}},
		{[]string{"import", csv}, keyadmin.Imported{Imported: 1}},
		{[]string{"import", csv}, keyadmin.Imported{AlreadyThere: 1}},
	} {
		if got := read[keyadmin.Imported](k, test.args...); got != test.want {
			t.Errorf("%v: %+v, want %+v", test.args, got, test.want)
		}
	}
	bad := strings.Repeat(`{"hash":"none","account":"acme","name":"n","environment":"sandbox","scopes":["memories:read"]}`+"\n", 3)
	if _, stderr, code := k.try(bad, "import", "-", "--format", "jsonl"); code != 1 || strings.Count(stderr, "\n") != 4 || !strings.Contains(stderr, "line 3: hash ") {
		t.Errorf("bad lines: %d %s", code, stderr)
	}
	plain := fmt.Sprintf(`{"key":%q,"account":"acme","name":"n","scopes":["memories:read"]}`, apikey.Generate(apikey.Production))
	if _, stderr, code := k.try(plain, "import", "-", "--format", "jsonl"); code != 1 || !strings.Contains(stderr, "--plain-keys") {
		t.Errorf("plain keys: %d %s", code, stderr)
	}
	if stdout, stderr, code := k.try(plain, "import", "-", "--format", "jsonl", "--plain-keys"); code != 0 {
		t.Errorf("plain keys with the flag: %d %s %s", code, stdout, stderr)
	}
	if stdout, _, code := k.try(secret, "check"); code != 0 || !strings.Contains(stdout, "Old") {
		t.Errorf("the imported key: %d %s", code, stdout)
	}
}

func TestImportOfARevokedKeySaysThatItIsNotRevived(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("Leaked", "--account", "acme")
	k.run("revoke", key.ID)
	line := fmt.Sprintf(`{"hash":"%x","account":"acme","name":"n","environment":"production","scopes":["memories:read"]}`, sha256.Sum256([]byte(key.Key.Reveal())))
	for _, more := range [][]string{{"--dry-run"}, {}} {
		stdout, stderr, code := k.try(line, append([]string{"import", "-", "--format", "jsonl"}, more...)...)
		if code != 0 || !strings.Contains(stdout, "1 of them revoked or expired: an import revives none.") {
			t.Errorf("%v: %d %s %s", more, code, stdout, stderr)
		}
	}
}

func TestWhoMakesAKeyIsToldWhoseItIsAndWhenItEnds(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	create := []string{"create", "--name", "n", "--scopes", "memories:read", "--environment", "sandbox"}
	for want, more := range map[string][]string{
		"of default (sandbox, memories:read), which expires: never.":                              nil,
		"of acme (sandbox, memories:read (manages keys)), which expires: 2030-12-31T22:59:59Z.\n": {"--account", "acme", "--manage-keys", "--expires-at", "2030-12-31T23:59:59+01:00"},
	} {
		if out := k.run(append(create[:len(create):len(create)], more...)...); !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, apikey.Redact(out))
		}
	}
}

func TestScopesMayHaveBlanksAroundTheirCommas(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	key := k.create("n", "--scopes", " memories:read , memories:write")
	if got := strings.Join(key.Scopes, " "); got != "memories:read memories:write" {
		t.Errorf("scopes %s", got)
	}
}

func TestFlagOfAWrongKindIsAnsweredWithWhatItTakes(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"keys list --limit abc":                                "Error: --limit must be a whole number\n",
		"keys list --limit 9223372036854775808":                "Error: --limit must be a whole number\n",
		"keys list --json=foo":                                 "Error: --json must be true or false: leave the value out for true\n",
		"limits tier free --requests-per-minute 1e6":           "Error: --requests-per-minute must be a whole number\n",
		"migrate --plan=maybe":                                 "Error: --plan must be true or false: leave the value out for true\n",
		"keys list --limit " + "rk_" + strings.Repeat("a", 45): "Error: --limit must be a whole number\n",
	} {
		stdout, stderr, code := cli(t, "", strings.Fields(args)...)
		if code != 1 || stdout != "" || stderr != want {
			t.Errorf("%s: %d %q %q, want %q", args, code, stdout, stderr, want)
		}
	}
}

// TestExitCodesStandInTheHelpOfTheCommandsThatUseThem: scripts go by them.
func TestExitCodesStandInTheHelpOfTheCommandsThatUseThem(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	unknown, ended := "key_0000000000000000000000", k.create("n").ID
	k.run("revoke", ended)
	for _, test := range []struct {
		args string
		code int
	}{{"keys show " + unknown, 3}, {"keys revoke " + ended, 4}, {"limits show --key-id " + unknown, 3}, {"limits key " + unknown + " --burst 1", 3}} {
		group, _, _ := strings.Cut(test.args, " ")
		_, stderr, code := cli(t, k.database, strings.Fields(test.args)...)
		help, _, _ := cli(t, "", group, "--help")
		if code != test.code || !regexp.MustCompile(fmt.Sprintf(`Exit codes:.*\b%d where`, code)).MatchString(help) {
			t.Errorf("%s: exit %d %s, want %d, and in the help:\n%s", test.args, code, stderr, test.code, help)
		}
	}
}

func TestImportOfALongFileShowsItsProgress(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	const keys = 100_000
	var file strings.Builder
	file.WriteString("hash,account,name,environment,scopes\n")
	for i := range keys {
		fmt.Fprintf(&file, "%064x,acme,Backend,sandbox,memories:read\n", i)
	}
	stdout, stderr, code := k.try(file.String(), "import", "-", "--format", "csv", "--dry-run", "--json")
	if code != 0 || stderr != "read 100000 keys\nchecking 100000 keys\n" {
		t.Errorf("exit %d, progress %q", code, stderr)
	}
	if got := decoded[keyadmin.Imported](k, stdout); got != (keyadmin.Imported{Imported: keys}) {
		t.Errorf("got %+v", got)
	}
}

func TestCheckReadsTheKeyFromItsInputAndNeverShowsIt(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	active, revoked := k.create("Active"), k.create("Revoked")
	k.run("revoke", revoked.ID)
	for name, test := range map[string]struct {
		input string
		code  int
		say   string
	}{
		"active":       {active.Key.Reveal() + "\n", 0, active.ID},
		"revoked":      {"  " + revoked.Key.Reveal() + " ", 4, revoked.ID},
		"unknown":      {apikey.Generate(apikey.Sandbox), 3, "well-formed sandbox key"},
		"malformed":    {"rk_short", 1, ""},
		"nothing":      {"", 1, ""},
		"PowerShell's": {"\ufeff" + active.Key.Reveal() + "\r\n", 0, active.ID},
		"blanks":       {"\n" + active.Key.Reveal() + "\r\n \n", 0, active.ID},
		"two keys":     {active.Key.Reveal() + "\n" + revoked.Key.Reveal() + "\n", 1, ""},
		"a file":       {active.Key.Reveal() + "\n" + strings.Repeat("\n", 2000), 1, ""},
	} {
		stdout, stderr, code := k.try(test.input, "check")
		if code != test.code || !strings.Contains(stdout, test.say) || (stderr == "") != (code == 0) || apikey.ContainsKey(stdout) {
			t.Errorf("%s: exit %d, want %d: %s %s", name, code, test.code, apikey.Redact(stdout), stderr)
		}
	}
	stdout, _, _ := k.try(active.Key.Reveal(), "check", "--json")
	if checked := decoded[keyadmin.Checked](k, stdout); checked.Key == nil || checked.Key.ID != active.ID || !checked.ChecksumValid {
		t.Errorf("checked %+v", checked)
	}
}

func TestShellCompletesCommandsFlagsAndTheirValues(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	complete := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := cli(t, k.database, append([]string{"__complete", "keys"}, args...)...)
		if code != 0 {
			t.Fatalf("%v: %d %s", args, code, stderr)
		}
		return stdout
	}
	for _, test := range []struct {
		args []string
		want []string
	}{
		{[]string{""}, []string{"create", "list", "show", "rename", "rotate", "revoke", "usage", "audit", "import", "check"}},
		{[]string{"create", "--"}, []string{"--name", "--scopes", "--expires-in", "--expires-at", "--manage-keys"}},
		{[]string{"create", "--environment", ""}, []string{"production", "sandbox"}},
		{[]string{"create", "--scopes", "memories"}, []string{"memories:read", "memories:delete"}},
		{[]string{"list", "--status", ""}, []string{"active", "expiring", "expired", "revoked"}},
		{[]string{"rotate", "--overlap", "o"}, []string{"on-first-use"}},
		{[]string{"import", "--format", ""}, []string{"csv", "jsonl"}},
		{[]string{"audit", "--action", ""}, keyadmin.ActionNames()},
	} {
		got := complete(test.args...)
		for _, want := range test.want {
			if !strings.Contains(got, want) {
				t.Errorf("%v completes to no %q: %s", test.args, want, got)
			}
		}
	}
	if stdout, stderr, code := cli(t, k.database, "completion", "bash"); code != 0 || !strings.Contains(stdout, "__complete") {
		t.Errorf("completion bash: %d %s", code, stderr)
	}
}

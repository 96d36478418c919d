package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// cli runs the binary with a database and returns what it printed and its exit code.
func cli(t *testing.T, database string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+database)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

func TestKeysAreCreatedListedAndRevokedFromTheCommandLine(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	for range 2 { // the second time there is nothing to do
		if _, stderr, code := cli(t, database, "migrate", "--json"); code != 0 {
			t.Fatal(stderr)
		}
	}
	stdout, stderr, code := cli(t, database, "keys", "create", "--name", "Production Backend", "--scopes", "memories:read,memories:write",
		"--environment", "production", "--expires-in", "90d", "--json")
	if code != 0 {
		t.Fatal(stderr)
	}
	var created keyadmin.Key
	if err := json.Unmarshal([]byte(stdout), &created); err != nil {
		t.Fatal(err)
	}
	if !apikey.ChecksumValid(created.Key.Reveal()) || created.ExpiresAt.Sub(created.CreatedAt) != 90*24*time.Hour {
		t.Errorf("created %+v", created)
	}
	for _, args := range [][]string{{"keys", "list"}, {"keys", "list", "--json"}} {
		stdout, stderr, code := cli(t, database, args...)
		if code != 0 || !strings.Contains(stdout, created.ID) || !strings.Contains(stdout, "Production Backend") {
			t.Errorf("%v: %d %s %s", args, code, stdout, stderr)
		}
		if apikey.ContainsKey(stdout) {
			t.Errorf("%v shows the key", args)
		}
	}
	if stdout, stderr, code := cli(t, database, "keys", "revoke", created.ID); code != 0 || !strings.Contains(stdout, created.ID) {
		t.Errorf("revoke: %d %s", code, stderr)
	}
	for _, args := range [][]string{{"keys", "check"}, {"keys", "list"}, {"keys"}, {"migrate"}} {
		_, stderr, code := cli(t, database, append(args, created.Key.Reveal())...)
		if code != 3 || !strings.Contains(stderr, "now in your shell's history") || strings.Count(stderr, "\n") != 1 || apikey.ContainsKey(stderr) {
			t.Errorf("%v with a key as an argument: exit %d, %s", args, code, apikey.Redact(stderr))
		}
	}
	for _, tc := range []struct {
		id   string
		code int
		say  string
	}{
		{created.ID, 4, "already revoked"},
		{"key_0000000000000000000000", 3, "no such key"},
		{created.Key.Reveal(), 3, "no such key"}, // a key pasted in place of its id
	} {
		stdout, stderr, code := cli(t, database, "keys", "revoke", tc.id)
		if code != tc.code || !strings.Contains(stderr, tc.say) || strings.Count(stderr, "\n") != 1 || stdout != "" {
			t.Errorf("revoke again: %d %q, want %d and one line with %q", code, stderr, tc.code, tc.say)
		}
		if apikey.ContainsKey(stderr) {
			t.Error("the error repeats the key")
		}
	}
}

// An unset variable of a script must not stand for another database.
func TestEmptyDatabaseFlagStandsForNoDatabase(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := r.key("production", "memories:read")
	for _, args := range [][]string{
		{"keys", "revoke", key.ID}, {"keys", "revoke", "--account", "acme", "--yes"}, {"keys", "list"}, {"limits", "show"},
		{"edges", "list"}, {"migrate"}, {"migrate", "--plan"}, {"dev", "--listen", "nowhere"},
	} {
		stdout, stderr, code := cli(t, r.database, append(args, "--database", "")...)
		if code != 1 || stdout != "" || stderr != "Error: --database must not be empty\n" {
			t.Errorf("%v: %d %q %q", args, code, stdout, stderr)
		}
	}
	if got, err := r.admin.Get(t.Context(), keyadmin.Operator("test"), key.ID); err != nil || got.Status != keyadmin.Active {
		t.Errorf("key %+v, %v", got, err)
	}
}

func TestWrongInputIsOneLineAndChangesNothing(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	if _, stderr, code := cli(t, database, "migrate"); code != 0 {
		t.Fatal(stderr)
	}
	good := []string{"keys", "create", "--name", "n", "--scopes", "memories:read", "--environment", "production"}
	for name, args := range map[string][]string{
		"no name":             {"keys", "create", "--scopes", "memories:read", "--environment", "production"},
		"no scopes":           {"keys", "create", "--name", "n", "--environment", "production"},
		"unknown scope":       append(good[:4:4], "--scopes", "memories:raed", "--environment", "production"),
		"unknown environment": append(good[:6:6], "--environment", "live"),
		"bad expiry":          append(good[:len(good):len(good)], "--expires-in", "soon"),
		"past expiry":         append(good[:len(good):len(good)], "--expires-in", "-1h"),
		"unknown flag":        append(good[:len(good):len(good)], "--bogus"),
		"an argument":         append(good[:len(good):len(good)], "extra"),
		"no subcommand":       {"keys"},
		"bad database":        append(good[:len(good):len(good)], "--database", "postgres://u:secret@127.0.0.1:notaport/db"),
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, code := cli(t, database, args...)
			if code == 0 || stdout != "" || strings.Count(strings.TrimSpace(stderr), "\n") != 0 || strings.TrimSpace(stderr) == "" {
				t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
			}
			if strings.Contains(stderr, "secret") {
				t.Error("the error shows the database's password")
			}
		})
	}
	if stdout, _, _ := cli(t, database, "keys", "list", "--json"); strings.TrimSpace(stdout) != "[]" {
		t.Errorf("keys were created: %s", stdout)
	}
	if _, stderr, code := cli(t, "", "keys", "list"); code == 0 || !strings.Contains(stderr, "--database") {
		t.Errorf("without a database: %d %q", code, stderr)
	}
	if _, stderr, code := cli(t, pgtest.URL(t), "keys", "list"); code == 0 || !strings.Contains(stderr, "migrate") {
		t.Errorf("before migrate: %d %q", code, stderr)
	}
}

func TestKeyThatCouldNotBePrintedIsAnErrorAndNoKey(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	if _, stderr, code := cli(t, database, "migrate"); code != 0 {
		t.Fatal(stderr)
	}
	for name, to := range map[string]string{"full": ">/dev/full", "closed": ">&-", "thrown away": ">/dev/null"} {
		cmd := exec.Command("sh", "-c", `"$0" keys create --name n --scopes memories:read --environment production `+to, program)
		cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+database)
		if err := cmd.Run(); err == nil {
			t.Errorf("%s: the only copy of a key was lost, and the command said that all was well", name)
		}
	}
	if stdout, stderr, _ := cli(t, database, "keys", "list", "--json"); strings.TrimSpace(stdout) != "[]" {
		t.Errorf("a key that nobody saw is in force: %s%s", stdout, stderr)
	}
}

// devRun is a running dev command, whose files are all below home. It chooses its port.
type devRun struct {
	*process.Log
	home, database string
	end            func(os.Signal) error // returns how it ended
}

func startDev(t *testing.T) devRun {
	t.Helper()
	d := devRun{Log: new(process.Log), home: t.TempDir()}
	cmd := exec.Command(program, "dev", "--listen", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), "HOME="+d.home, "TMPDIR="+d.home, "XDG_CONFIG_HOME=", "XDG_DATA_HOME=")
	cmd.Stdout, cmd.Stderr = d, d
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	ended := false
	d.end = func(signal os.Signal) error {
		ended = true
		_ = cmd.Process.Signal(signal)
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			_ = cmd.Process.Kill()
			return fmt.Errorf("dev did not end: %w", <-done)
		}
	}
	t.Cleanup(func() {
		if !ended {
			_ = d.end(os.Interrupt)
		}
	})
	eventually.True(t, "dev is ready", func() bool {
		select {
		case err := <-done:
			t.Fatalf("dev ended: %v\n%s", err, d)
		default:
		}
		return strings.Contains(d.String(), "Ready.")
	})
	d.database = regexp.MustCompile(`postgres://\S+`).FindString(d.String())
	return d
}

// leavesNothing ends it with a signal.
func (d devRun) leavesNothing(t *testing.T, signal os.Signal) {
	t.Helper()
	if err := d.end(signal); err != nil {
		t.Errorf("dev ended with %v\n%s", err, d)
	}
	if err := pgtest.TryExec(d.database, "select 1"); err == nil {
		t.Error("the database outlived dev")
	}
	if left, _ := filepath.Glob(filepath.Join(d.home, "*")); len(left) > 0 {
		t.Errorf("dev left %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(d.home, ".*", "*")); len(left) > 0 {
		t.Errorf("dev left %v", left)
	}
}

func TestDevLeavesNothingWhenItsTerminalIsClosed(t *testing.T) {
	t.Parallel()
	startDev(t).leavesNothing(t, syscall.SIGHUP)
}

// TestDevPrintsLinesThatWorkWithThePortThatItChoseAndLeavesNothing pastes what dev prints, as its user does.
func TestDevPrintsLinesThatWorkWithThePortThatItChoseAndLeavesNothing(t *testing.T) {
	t.Parallel()
	out := startDev(t)
	lines := regexp.MustCompile(`(?m)^  (curl .*|'.*' keys revoke .*)$`).FindAllStringSubmatch(out.String(), -1)
	if len(lines) != 5 {
		t.Fatalf("dev printed %d lines to paste, want 5:\n%s", len(lines), out)
	}
	paste := func(line string) string {
		output, err := exec.Command("sh", "-c", line).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", apikey.Redact(line), err, output)
		}
		return string(output)
	}
	for i, wanted := range [][]string{{" 200 ", `"backend": "production"`}, {" 200 ", `"backend": "sandbox"`}, {" 401 ", "API_KEY_MISSING"},
		{" 403 ", "memories:delete"}, {"Revoked key_"}} {
		output := paste(lines[i][1])
		for _, w := range wanted {
			if !strings.Contains(output, w) {
				t.Errorf("line %d printed no %q:\n%s", i+1, w, output)
			}
		}
	}
	eventually.True(t, "the revocation holds", func() bool { return strings.Contains(paste(lines[0][1]), "API_KEY_REVOKED") })

	out.leavesNothing(t, os.Interrupt)
}

func TestDevRefusesWrongFlagsBeforeItStartsAnything(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"not an address":      {"--listen", "nowhere"},
		"not a URL":           {"--production", "localhost:3000"},
		"a URL with a path":   {"--sandbox", "http://127.0.0.1:3000/v1"},
		"two databases":       {"--data", "x", "--database", "postgres://127.0.0.1/x"},
		"an unreachable one":  {"--database", "postgres://127.0.0.1:1/x?sslmode=disable"},
		"an unknown argument": {"now"},
	} {
		t.Run(name, func(t *testing.T) {
			_, stderr, code := cli(t, "", append([]string{"dev"}, args...)...)
			if code == 0 || strings.Count(strings.TrimSpace(stderr), "\n") != 0 {
				t.Errorf("exit %d, %q", code, stderr)
			}
		})
	}
}

func TestDevRefusesBackendsThatCaddyRefusesBeforeItChangesTheDatabase(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	for _, backend := range []string{
		"http://127.0.0.1:3000?a=b", "http://127.0.0.1:3000/#a", "http://127.0.0.1:443", "https://127.0.0.1:80/", "http://127.0.0.1:65536",
	} {
		_, stderr, code := cli(t, "", "dev", "--database", database, "--sandbox", backend)
		if code == 0 || strings.Count(strings.TrimSpace(stderr), "\n") != 0 || !strings.Contains(stderr, fmt.Sprintf("--sandbox %q", backend)) {
			t.Errorf("exit %d, %q", code, stderr)
		}
	}
	if err := pgtest.TryExec(database, "select from rekall.api_keys"); err == nil {
		t.Error("dev changed a database for a gateway that it could not start")
	}
}

func TestDevSaysWhyItCannotListen(t *testing.T) {
	t.Parallel()
	for address, why := range map[string]string{
		newRig(t).production.Address(): "address already in use",
		"192.0.2.1:8080":               "cannot assign requested address", // of no machine: RFC 5737
	} {
		_, stderr, code := cli(t, "", "dev", "--listen", address)
		if code == 0 || !strings.Contains(stderr, why) || !strings.Contains(stderr, "choose another with --listen") {
			t.Errorf("exit %d, %q, want %q", code, stderr, why)
		}
	}
}

// TestDevKeepsItsDataAndWhatItCountedAndFrontsYourBackends starts dev twice on one folder.
func TestDevKeepsItsDataAndWhatItCountedAndFrontsYourBackends(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	data := filepath.Join(t.TempDir(), "data")
	if err := os.Chmod(filepath.Dir(filepath.Dir(data)), 0o755); err != nil {
		t.Fatal(err)
	}
	var keys int
	var used string // the first run's key
	for run := range 2 {
		out := new(process.Log)
		port := process.FreePort(t)
		cmd := exec.Command(program, "dev", "--data", data, "--listen", fmt.Sprintf("127.0.0.1:%d", port), "--production", r.production.URL()+"/")
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually.True(t, "dev is ready", func() bool { return strings.Contains(out.String(), "Ready.") })
		key := regexp.MustCompile(`production key +(\S+)`).FindStringSubmatch(out.String())[1]
		before := r.production.Requests()
		ask := func() {
			do(t, "GET", fmt.Sprintf("http://127.0.0.1:%d/v1/memories", port), http.Header{"X-Api-Key": {key}}, nil).wantCode(t, 200, "")
		}
		ask()
		if r.production.Requests() != before+1 {
			t.Error("the request did not reach the given backend")
		}
		database := regexp.MustCompile(`postgres://\S+`).FindString(out.String())
		stdout, _, _ := cli(t, database, "keys", "list", "--json")
		var list []keyadmin.Key
		if err := json.Unmarshal([]byte(stdout), &list); err != nil {
			t.Fatal(err)
		}
		if run == 1 && len(list) <= keys {
			t.Errorf("%d keys after the second start, %d after the first", len(list), keys)
		}
		keys = len(list)
		if run == 1 {
			var usage keyadmin.Usage
			stdout, stderr, _ := cli(t, database, "keys", "usage", used, "--json")
			if err := json.Unmarshal([]byte(stdout), &usage); err != nil || usage.Total.Allowed != 3 {
				t.Errorf("the first run's use: %+v, %v %s", usage, err, stderr)
			}
		}
		used = regexp.MustCompile(`keys revoke (\S+)`).FindStringSubmatch(out.String())[1]
		ask()
		ask()
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("dev ended with %v\n%s", err, out)
		}
		stops := linesOf(out.String(), stoodStill, clockSet)
		for _, line := range logLines(out.String()) {
			if explained := line.isOutage() && line.beside(stops); !explained && !slices.Contains(stops, line) {
				t.Errorf("dev complained of %q:\n%s", line.Msg, out)
			}
		}
	}
}

func TestExampleFileIsFormattedAdaptsAndValidates(t *testing.T) {
	t.Parallel()
	database := "postgres://nobody@127.0.0.1:1/none" // validating needs no database
	if stdout, stderr, code := cli(t, database, "fmt", "--diff", "../Caddyfile.example"); code != 0 || strings.Contains(stdout, "\n-") {
		t.Errorf("fmt: %d %s %s", code, stdout, stderr)
	}
	home := t.TempDir()
	for _, command := range []string{"adapt", "validate"} {
		cmd := exec.Command(program, command, "--config", "../Caddyfile.example", "--adapter", "caddyfile")
		cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+database, "REKALL_ADMIN_DATABASE_URL="+database, "HOME="+home)
		if output, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", command, err, output)
		}
	}
}

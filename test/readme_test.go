package test

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
)

// blocks returns the fenced blocks of a language in the README.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	return blocksOf(t, "../README.md", language)
}

func blocksOf(t *testing.T, page, language string) []string {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		found = append(found, m[1])
	}
	if len(found) == 0 {
		t.Fatalf("%s has no %s block", page, language)
	}
	return found
}

// TestCommandsInTheReadmeWork runs the lines of its rekall-gateway block beside a gateway, with the id of a real key where one stands.
func TestCommandsInTheReadmeWork(t *testing.T) {
	t.Parallel()
	runCommandsOfReadme(t, "")
}

func TestCommandsInTheReadmeWorkWithTheParameterForPgBouncer(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../caddymodule/CONFIGURATION.md")
	if err != nil {
		t.Fatal(err)
	}
	parameter := regexp.MustCompile("PgBouncer in transaction mode: add `([a-z_]+=[a-z]+)`").FindSubmatch(text)
	if parameter == nil {
		t.Fatal("nothing says what PgBouncer needs")
	}
	runCommandsOfReadme(t, "&"+string(parameter[1]))
}

func runCommandsOfReadme(t *testing.T, parameter string) {
	t.Helper()
	var lines []string
	for _, block := range blocks(t, "sh") {
		for line := range strings.Lines(block) {
			if strings.HasPrefix(line, "rekall-gateway ") {
				lines = append(lines, strings.TrimSpace(line))
			}
		}
	}
	if len(lines) < 5 {
		t.Fatalf("only %d commands found", len(lines))
	}
	r := newRig(t)
	r.start(standardSite)
	eventually.True(t, "the edge is listed", func() bool { return len(r.edges()) == 1 })
	id := ""
	for _, line := range lines {
		line = strings.ReplaceAll(line, "key_…", id)
		cmd := exec.Command("sh", "-c", line)
		cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+r.database+parameter, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
		output, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", line, err, output)
		}
		if found := regexp.MustCompile(`key_[0-9A-Za-z]{22}`).FindString(string(output)); found != "" {
			id = found
		}
	}
}

// TestGuideNamesEveryFieldThatCommandsPrintAsJSON and no other: the fields of each row of its table are compared with those of real output.
func TestGuideNamesEveryFieldThatCommandsPrintAsJSON(t *testing.T) {
	t.Parallel()
	empty := pgtest.URL(t)
	r := newRig(t)
	g := r.start(standardSite, "usage_flush 100ms")
	key, revoked := r.key("production", "memories:read"), r.key("production", "memories:read")
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	eventually.True(t, "its use is counted", func() bool { return len(r.usage(key)) == 1 })
	eventually.True(t, "the edge is listed", func() bool { return len(r.edges()) == 1 })
	k := &keysCLI{t, r.database}
	k.create("Old", "--account", "globex")
	print := func(stdin, command string) map[string]bool {
		t.Helper()
		cmd := exec.Command(program, append(strings.Fields(command), "--json")...)
		cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+k.database)
		cmd.Stdin = strings.NewReader(stdin)
		output, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		return fieldsOf(decoded[any](k, string(output)))
	}
	printed := map[string]map[string]bool{
		"keys show":                print("", "keys show "+key.ID),
		"keys usage":               print("", "keys usage "+key.ID),
		"keys audit":               print("", "keys audit"),
		"keys import":              print("hash,account,name,environment,scopes\n", "keys import - --format csv"),
		"keys rotate --older-than": print("", "keys rotate --older-than 0s --account globex --yes"),
		"keys check":               print(key.Key.Reveal(), "keys check"),
		"edges list":               print("", "edges list"),
		"limits show":              print("", "limits show"),
		"limits show --account":    print("", "limits show --account acme"),
		"limits show --key-id":     print("", "limits show --key-id "+key.ID),
		"limits tier":              print("", "limits tier free --burst 150"),
		"limits account":           print("", "limits account acme --tier pro"),
		"limits key":               print("", "limits key "+key.ID+" --concurrent-requests 1"),
		"keys revoke --wait":       print("", "keys revoke "+revoked.ID+" --wait"),
		"migrate":                  print("", "migrate"),
		"keys revoke --account":    print("", "keys revoke --account acme --yes --wait"),
	}
	k.database = empty
	printed["migrate --plan"] = print("", "migrate --plan")

	text, err := os.ReadFile("../internal/command/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n| command | prints |\n| --- | --- |\n")
	table, _, _ = strings.Cut(table, "\n\n")
	span, documented := regexp.MustCompile("`([^`]+)`"), map[string][]string{}
	for line := range strings.Lines(table) {
		spans := span.FindAllStringSubmatch(line, -1)
		for _, s := range spans[1:] {
			documented[spans[0][1]] = append(documented[spans[0][1]], s[1])
		}
	}
	for command, want := range printed {
		got := map[string]bool{}
		for _, field := range documented[command] {
			switch {
			case printed[field] != nil: // another command, which prints the same
				maps.Copy(got, printed[field])
			case !strings.HasPrefix(field, "-"):
				got[field] = true
			}
		}
		if diff := cmp.Diff(want, got); command != "keys show" && diff != "" {
			t.Errorf("%s prints (-) and the table has (+):\n%s", command, diff)
		}
	}
	if len(documented) != len(printed)-1 {
		t.Errorf("%d commands in the table, want %d", len(documented), len(printed)-1)
	}
}

// fieldsOf returns the names of all fields, those of objects in objects and lists too, but not the keys of what is a map by its nature.
func fieldsOf(value any) map[string]bool {
	fields := map[string]bool{}
	switch v := value.(type) {
	case []any:
		for _, element := range v {
			maps.Copy(fields, fieldsOf(element))
		}
	case map[string]any:
		for name, inner := range v {
			fields[name] = true
			if name != "details" && name != "denied_by_reason" {
				maps.Copy(fields, fieldsOf(inner))
			}
		}
	}
	return fields
}

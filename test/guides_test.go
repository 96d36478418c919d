package test

import (
	"encoding/json"
	"html"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/process"
)

// guides are the pages for operators, users of the API and backend developers.
var guides = []string{"../caddymodule/README.md", "../caddymodule/ERRORS.md", "../caddymodule/BACKENDS.md"}

func TestConfigurationsInTheDocumentsAreValid(t *testing.T) {
	t.Parallel()
	for _, doc := range []struct{ page, language, adapter string }{
		{"../README.md", "caddyfile", "caddyfile"}, {"../caddymodule/CONFIGURATION.md", "json", ""},
		{"../caddymodule/CONFIGURATION.md", "caddyfile", "caddyfile"}, {guides[0], "caddyfile", "caddyfile"},
		{guides[2], "caddyfile", "caddyfile"}, {identityTokenManual, "caddyfile", "caddyfile"},
	} {
		for _, config := range blocksOf(t, doc.page, doc.language) {
			if output, err := validate(t, doc.adapter, config); err != nil {
				t.Errorf("%s: %v\n%s", doc.page, err, output)
			}
		}
	}
}

// validate runs the command of that name. The database that it names does not answer.
func validate(t *testing.T, adapter, config string) (output string, err error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	process.Write(t, file, config)
	cmd := exec.Command(program, "validate", "--config", file, "--adapter", adapter)
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL=postgres://nobody@127.0.0.1:1/none", "HOME="+t.TempDir())
	text, err := cmd.CombinedOutput()
	return string(text), err
}

// TestPagesOfTheSiteThatTheGuideNamesCanUseTheAPIAndNothingWithoutAKeyReachesABackend: the guide answers what browsers ask without a key.
func TestPagesOfTheSiteThatTheGuideNamesCanUseTheAPIAndNothingWithoutAKeyReachesABackend(t *testing.T) {
	t.Parallel()
	const site = "https://app.example.com"
	r := newRig(t)
	g := r.start(strings.NewReplacer("api.rekall.ai {", "http://:PORT {\nbind 127.0.0.1", "prod-1:8080", "PRODUCTION", "sandbox:8080", "SANDBOX").
		Replace(blocksOf(t, "../caddymodule/CONFIGURATION.md", "caddyfile")[0]))
	key := r.key("production", "memories:read")
	preflight := http.Header{"Origin": {site}, "Access-Control-Request-Method": {"PUT"}, "Access-Control-Request-Headers": {"authorization"}}
	without := func(name string) http.Header { h := preflight.Clone(); h.Del(name); return h }
	other := preflight.Clone()
	other.Set("Origin", "https://example.com")
	for _, path := range []string{"/v1/memories/1", "/", "/v1/../x", "/v1/memories?api_key=" + key.Key.Reveal()} {
		answer := g.do("OPTIONS", path, preflight)
		if h := answer.Header; answer.StatusCode != http.StatusNoContent || answer.body != "" || h.Get("Access-Control-Allow-Origin") != site ||
			!strings.Contains(h.Get("Access-Control-Allow-Methods"), "PUT") || !strings.Contains(h.Get("Access-Control-Allow-Headers"), "Authorization") {
			t.Errorf("%s: %d %v %q", apikey.Redact(path), answer.StatusCode, h, answer.body)
		}
	}
	for _, header := range []http.Header{without("Origin"), without("Access-Control-Request-Method"), other} {
		g.do("OPTIONS", "/v1/memories", header).wantCode(t, http.StatusUnauthorized, "API_KEY_MISSING")
	}
	for _, method := range []string{"GET", "POST", "HEAD"} {
		if answer := g.do(method, "/v1/memories", preflight); answer.StatusCode != http.StatusUnauthorized || answer.Header.Get("Access-Control-Allow-Origin") != site {
			t.Errorf("%s without a key: %d %v", method, answer.StatusCode, answer.Header)
		}
	}
	answer := g.do("GET", "/v1/memories", http.Header{"Origin": {site}, "Authorization": {"Bearer " + key.Key.Reveal()}})
	answer.wantCode(t, http.StatusOK, "")
	if got := answer.Header["Access-Control-Allow-Origin"]; len(got) != 1 || got[0] != site {
		t.Errorf("a good answer may be read by %q", got)
	}
	if production, sandbox := r.production.Requests(), r.sandbox.Requests(); production != 1 || sandbox != 0 {
		t.Errorf("%d and %d requests reached backends, want the one with a key", production, sandbox)
	}
}

func TestForwardedKeyCannotBeWrittenIntoTheLogs(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		option, directive string
		refused           bool
	}{{"log_credentials", "forward_credential", true}, {"log_credentials", "", false}, {"strict_sni_host", "forward_credential", false}} {
		output, err := validate(t, "caddyfile", "{\nservers {\n"+tc.option+"\n}\n}\nhttp://127.0.0.1:8099 {\nrekall_gateway {\n"+tc.directive+
			"\nproduction {\nrespond ok\n}\n}\n}\n")
		if refused := err != nil && strings.Contains(output, "writes keys into its logs"); refused != tc.refused || !refused && err != nil {
			t.Errorf("%s and %s: %v\n%s", tc.option, tc.directive, err, output)
		}
	}
}

// TestCommandsInTheGuidesWork runs each line of each shell block, as it is written but for addresses and ids. Those that use the API show
// the code of an error as well.
func TestCommandsInTheGuidesWork(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := r.key("production", "memories:read")
	manager, _, err := r.admin.Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "Key Manager", Account: "acme", Environment: "production", Scopes: []string{"memories:read"}, ManageKeys: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	g := r.start(strings.Replace(managedSite, "\tlog\n", "\tlog {\n\t\toutput file "+filepath.Join(dir, "access.log")+"\n\t}\n", 1))
	real := strings.NewReplacer("https://api.rekall.ai", g.http, "http://localhost:2019", g.admin, "key_…", key.ID)
	commands, outputs := 0, ""
	for _, page := range guides[:2] {
		for _, block := range blocksOf(t, page, "sh") {
			for line := range strings.Lines(strings.TrimSpace(block)) { // a block in a list ends with its indentation
				commands++
				cmd := exec.Command("bash", "-e", "-o", "pipefail", "-c", real.Replace(line))
				cmd.Dir = dir
				cmd.Env = append(os.Environ(), "REKALL_API_KEY="+key.Key.Reveal(), "REKALL_MANAGING_KEY="+manager.Key.Reveal(),
					"REKALL_DATABASE_URL="+r.database, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
				output, err := cmd.CombinedOutput()
				if err != nil {
					t.Errorf("%s: %s: %v\n%s", page, line, err, output)
				}
				outputs += string(output)
			}
		}
	}
	if commands < 6 {
		t.Errorf("only %d commands found", commands)
	}
	for line := range strings.Lines(strings.Join(blocksOf(t, guides[1], "sh"), "")) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		cmd := exec.Command("bash", "-c", real.Replace(line))
		cmd.Env = append(os.Environ(), "REKALL_API_KEY=rk_none", "REKALL_MANAGING_KEY=rk_none")
		if output, err := cmd.Output(); err == nil || !strings.Contains(string(output), `"API_KEY_INVALID"`) {
			t.Errorf("%s: %v, and no code to decide by: %s", line, err, output)
		}
	}
	for _, part := range []string{`"backend": "production"`, `"ready": true`, `"predecessor":"` + key.ID, `"status":"revoked"`} {
		if !strings.Contains(outputs, part) {
			t.Errorf("no command printed %s", part)
		}
	}
}

func TestCommandOnTheSignInPageMakesAKeyThatManagesKeys(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(managedSite)
	page := g.do("GET", "/settings/api-keys/sign-in", nil).body
	found := regexp.MustCompile(`<code>(rekall-gateway [^<]*)</code>`).FindStringSubmatch(page)
	if found == nil {
		t.Fatalf("no command in %s", page)
	}
	cmd := exec.Command("bash", "-c", html.UnescapeString(found[1])+" --json")
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+r.database, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
	output, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", found[1], err)
	}
	var key keyadmin.Key
	if err := json.Unmarshal(output, &key); err != nil || !key.ManageKeys {
		t.Errorf("%v, %s", err, apikey.Redact(string(output)))
	}
	g.manage("GET", keysPath, bearer(key), "", http.StatusOK)
}

func TestLinksOfTheDocumentsLeadSomewhere(t *testing.T) {
	t.Parallel()
	link, heading, mark := regexp.MustCompile(`\]\(([^)\s#]*)(?:#([^)\s]*))?\)`), regexp.MustCompile(`(?m)^#+ (.*)$`), regexp.MustCompile(`[^\w\- ]`)
	links := 0
	err := filepath.WalkDir("..", func(page string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(page) != ".md" {
			return err
		}
		for _, m := range link.FindAllStringSubmatch(process.Read(t, page), -1) {
			target, anchor := page, m[2]
			if strings.HasPrefix(m[1], "http") {
				continue
			}
			if links++; m[1] != "" {
				target = filepath.Join(filepath.Dir(page), m[1])
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", page, err)
				continue
			}
			if anchor == "" {
				continue
			}
			found := false
			for _, h := range heading.FindAllStringSubmatch(process.Read(t, target), -1) {
				found = found || strings.ReplaceAll(mark.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-") == anchor // as GitHub does
			}
			if !found {
				t.Errorf("%s: %s has no heading %q", page, target, anchor)
			}
		}
		return nil
	})
	if err != nil || links < 50 {
		t.Errorf("%d links, %v", links, err)
	}
}

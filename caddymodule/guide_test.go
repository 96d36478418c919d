package caddymodule

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/identitytoken"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/scoperule"
)

// codesInCode are the errors that are answered, as "403 TLS_REQUIRED": all, and of these the gateway's own, which are not of the
// management of keys.
func codesInCode(t *testing.T) (all, own map[string]bool) {
	t.Helper()
	statuses := map[string]int{} // by the name of its constant in net/http
	for status := 400; status < 600; status++ {
		statuses["Status"+strings.ReplaceAll(http.StatusText(status), " ", "")] = status
	}
	all, own = map[string]bool{}, map[string]bool{}
	add := func(found map[string]bool, status, code ast.Expr) {
		name, isName := status.(*ast.SelectorExpr)
		text, isText := code.(*ast.BasicLit)
		if !isName || !isText || statuses[name.Sel.Name] == 0 {
			t.Fatal("an error whose status or code is no constant: this test must learn to read it")
		}
		unquoted, err := strconv.Unquote(text.Value)
		if err != nil {
			t.Fatal(err)
		}
		found[fmt.Sprintf("%d %s", statuses[name.Sel.Name], unquoted)] = true
	}
	for _, folder := range []string{".", "../internal/apierror", "../internal/keysapi"} {
		files, err := filepath.Glob(folder + "/*.go")
		if err != nil || len(files) == 0 {
			t.Fatal("no source in", folder, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if literal, ok := n.(*ast.CompositeLit); ok && literal.Type != nil && types.ExprString(literal.Type) == "apierror.Error" {
					t.Fatalf("%s: an error that apierror.New has not made: this test must learn to read it", name)
				}
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				function := types.ExprString(call.Fun)
				if function == "apierror.New" || file.Name.Name == "apierror" && (function == "New" || function == "challenge") {
					add(all, call.Args[0], call.Args[1])
					if file.Name.Name != "keysapi" && name != "keys.go" {
						add(own, call.Args[0], call.Args[1])
					}
				}
				return true
			})
		}
	}
	return all, own
}

func TestREADMENamesEachAnswerOfTheGatewaysOwn(t *testing.T) {
	page, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, own := codesInCode(t)
	named := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| (\\d{3}(?:, \\d{3})*) \\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \\|").FindAllStringSubmatch(string(page), -1) {
		for status := range strings.SplitSeq(row[1], ", ") {
			for code := range strings.SplitSeq(row[2], ", ") {
				named[status+" "+strings.Trim(code, "`")] = true
			}
		}
	}
	if diff := cmp.Diff(own, named); diff != "" {
		t.Errorf("answers (-code +page)\n%s", diff)
	}
}

// TestGuideSaysOfEachErrorWhatToDo: a code that is added must be explained to those who will meet it.
func TestGuideSaysOfEachErrorWhatToDo(t *testing.T) {
	page, err := os.ReadFile("ERRORS.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| (\\d{3}) \\| `([A-Z_]+)` \\| \\S").FindAllStringSubmatch(string(page), -1) {
		documented = append(documented, row[1]+" "+row[2])
	}
	all, _ := codesInCode(t)
	if diff := cmp.Diff(slices.Sorted(maps.Keys(all)), documented); diff != "" {
		t.Errorf("errors, sorted (-code +page)\n%s", diff)
	}
}

// documentedDefaults are those of the options in a table of a page that begins with this heading.
func documentedDefaults(t *testing.T, page, heading string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n| "+heading+" |")
	table, _, _ = strings.Cut(table, "\n\n")
	documented := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*?) \\| .* \\| (.*?) \\|$").FindAllStringSubmatch(table, -1) {
		options, defaults := strings.Split(row[1], ", "), strings.Split(row[2], ", ")
		for i, option := range options {
			documented[strings.Trim(option, "`")] = strings.Trim(defaults[i], "`")
		}
	}
	return documented
}

// TestDefaultsAreThoseOfTheGuide, which is where operators look for them, and those of the README.
func TestDefaultsAreThoseOfTheGuide(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "postgres://example")
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	s, err := new(App).settings()
	if err != nil {
		t.Fatal(err)
	}
	inWords := func(value, instead any, words string) string {
		if value == instead {
			return words
		}
		return fmt.Sprint(value)
	}
	defaults := map[string]string{
		"database":         inWords(s.database, "postgres://example", "{env."+keystore.DatabaseVariable+"}"),
		"refresh":          s.refresh.String(),
		"max_staleness":    s.maxStaleness.String(),
		"cache_size":       strconv.Itoa(s.cacheSize),
		"warm":             inWords(s.warm, 0, "none"),
		"usage_flush":      s.usageFlush.String(),
		"usage_retention":  fmt.Sprintf("%gd", s.usageRetention.Hours()/24),
		"read_database":    inWords(s.readDatabase, "", "database"),
		"edge":             inWords(s.edgeName, host, "the host name"),
		"rate_limit_store": inWords(s.rateLimitStore, "", "none"),
		"canary":           inWords(s.canary, false, "off"),
		"listen":           inWords(s.listen, true, "on"),
	}
	if diff := cmp.Diff(documentedDefaults(t, "CONFIGURATION.md", "in `rekall`"), defaults); diff != "" {
		t.Errorf("defaults (-guide +settings)\n%s", diff)
	}
	readme := documentedDefaults(t, "../README.md", "most used, of `rekall` and `rekall_gateway`")
	for _, option := range []string{"max_staleness", "cache_size", "warm"} {
		if readme[option] != defaults[option] {
			t.Errorf("the README says that %s is %q, and it is %q", option, readme[option], defaults[option])
		}
	}
}

// TestGuideTellsWhichValuesAreRefused: each bound that it names is taken, and what is just beyond is not.
func TestGuideTellsWhichValuesAreRefused(t *testing.T) {
	page, err := os.ReadFile("CONFIGURATION.md")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(keystore.DatabaseVariable, "postgres://example")
	app := func(a App) error {
		_, err := a.settings()
		return err
	}
	address := func(perMinute, burst int) error {
		_, err := (&AddressLimit{PerMinute: perMinute, Burst: burst}).limiter()
		return err
	}
	token := func(lifetime time.Duration) error {
		_, err := identitytoken.NewIssuer(nil, 1, identitytoken.Options{Lifetime: lifetime})
		return err
	}
	for _, bound := range []struct {
		option, words  string
		within, beyond error
	}{
		{"refresh", "`10ms` at least", app(App{Refresh: caddy.Duration(10 * time.Millisecond)}), app(App{Refresh: caddy.Duration(10*time.Millisecond - 1)})},
		{"refresh", "less than `max_staleness`", app(App{Refresh: caddy.Duration(30*time.Second - 1)}), app(App{Refresh: caddy.Duration(30 * time.Second)})},
		{"max_staleness", "`57s` at most", app(App{MaxStaleness: caddy.Duration(57 * time.Second)}), app(App{MaxStaleness: caddy.Duration(57*time.Second + 1)})},
		{"cache_size", "`10000000` at most", app(App{CacheSize: 10_000_000}), app(App{CacheSize: 10_000_001})},
		{"warm", "`cache_size` at most", app(App{Warm: 100_000}), app(App{Warm: 100_001})},
		{"usage_flush", "`100ms` to", app(App{UsageFlush: caddy.Duration(100 * time.Millisecond)}), app(App{UsageFlush: caddy.Duration(100*time.Millisecond - 1)})},
		{"usage_flush", "to `5m`", app(App{UsageFlush: caddy.Duration(5 * time.Minute)}), app(App{UsageFlush: caddy.Duration(5*time.Minute + 1)})},
		{"usage_flush`, `usage_retention", "`1d` at least", app(App{UsageRetention: caddy.Duration(24 * time.Hour)}), app(App{UsageRetention: caddy.Duration(24*time.Hour - 1)})},
		{"address_limit", "both numbers `1000000` at most", address(1_000_000, 1_000_000), address(1, 1_000_001)},
		{"address_limit", "both numbers `1000000` at most", address(1_000_000, 1), address(1_000_001, 1)},
		{"identity_token", "`2m` to", token(2 * time.Minute), token(2*time.Minute - 1)},
		{"identity_token", "to `1h`", token(time.Hour), token(time.Hour + 1)},
	} {
		row := regexp.MustCompile("(?m)^\\| `" + regexp.QuoteMeta(bound.option) + "\\b.*$").FindString(string(page))
		if !strings.Contains(row, bound.words) || bound.within != nil || bound.beyond == nil {
			t.Errorf("%s %s: %v at the bound, %v beyond, and the row is %q", bound.option, bound.words, bound.within, bound.beyond, row)
		}
	}
}

// TestGuideHasTheScopeTable: with it an operator knows which rules are missing before requests are refused.
func TestGuideHasTheScopeTable(t *testing.T) {
	page, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "\n## Scopes\n")
	section, _, _ = strings.Cut(section, "\n## ")
	_, table, _ := strings.Cut(section, "| --- | --- | --- |\n")
	var rows strings.Builder
	for _, rule := range scoperule.Builtin() {
		fmt.Fprintf(&rows, "| %s | `%s` | `%s` |\n", rule.Method, rule.Pattern, rule.Scope)
	}
	if diff := cmp.Diff(rows.String(), table); diff != "" {
		t.Errorf("scope table (-code +page)\n%s", diff)
	}
}

// TestGuideNamesEachDecision: they are what a log is searched for.
func TestGuideNamesEachDecision(t *testing.T) {
	page, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, list, found := strings.Cut(string(page), "\nThe decisions are ")
	list, _, ends := strings.Cut(list, ". Handlers ")
	var named []string
	for _, name := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(list, -1) {
		named = append(named, name[1])
	}
	var outcomes []string
	for o := range apikey.OutcomeCount {
		outcomes = append(outcomes, o.String())
	}
	slices.Sort(named)
	slices.Sort(outcomes)
	if diff := cmp.Diff(outcomes, named); !found || !ends || diff != "" {
		t.Errorf("decisions (-code +page)\n%s", diff)
	}
}

package test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// scanners returns the expressions for secret scanners in SECURITY.md.
func scanners(t *testing.T) []*regexp.Regexp {
	t.Helper()
	text, err := os.ReadFile("../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "## Recognising keys")
	block := regexp.MustCompile("(?s)```\n(.*?)```").FindStringSubmatch(section)
	if !found || block == nil {
		t.Fatal("SECURITY.md gives no expressions")
	}
	var expressions []*regexp.Regexp
	for line := range strings.Lines(block[1]) {
		expressions = append(expressions, regexp.MustCompile(strings.TrimSpace(line)))
	}
	if len(expressions) != 2 {
		t.Fatalf("%d expressions, want one for each environment", len(expressions))
	}
	return expressions
}

func TestScannerExpressionsFindKeysAndNothingElse(t *testing.T) {
	t.Parallel()
	expressions := scanners(t)
	matches := func(text string) (found []string) {
		for _, e := range expressions {
			found = append(found, e.FindAllString(text, -1)...)
		}
		return found
	}
	for _, environment := range []apikey.Environment{apikey.Production, apikey.Sandbox} {
		for range 1000 {
			key := apikey.Generate(environment)
			for _, around := range []string{"KEY", `"KEY"`, "Bearer KEY\n", "?api_key=KEY&a=b", "key=KEY;", "(KEY)", "KEY."} {
				if found := matches(strings.ReplaceAll(around, "KEY", key)); len(found) != 1 || found[0] != key {
					t.Fatalf("%d matches in %q", len(found), around)
				}
			}
			if !apikey.ChecksumValid(key) {
				t.Fatal("a generated key has no checksum")
			}
		}
		key := apikey.Generate(environment)
		for name, nearMiss := range map[string]string{
			"a character less": key[:len(key)-1],
			"one more":         key + "a",
			"one before":       "a" + key,
			"a dash within":    key[:20] + "-" + key[21:],
			"_ within":         key[:20] + "_" + key[21:],
			"another case":     strings.ToUpper(key[:3]) + key[3:],
			"another vendor's": strings.Replace(key, "rk_", "rk_live_", 1),
		} {
			if found := matches(nearMiss); len(found) != 0 {
				t.Errorf("%s: %s is taken for a key", environment, name)
			}
		}
		last := byte('0')
		if key[len(key)-1] == last {
			last = '1'
		}
		if mistyped := key[:len(key)-1] + string(last); len(matches(mistyped)) != 1 || apikey.ChecksumValid(mistyped) {
			t.Error("the checksum does not tell a mistyped key")
		}
	}
}

package keystore

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityTellsTheRightsOfTheRoles compares SECURITY.md's table with what migrate grants.
func TestSecurityTellsTheRightsOfTheRoles(t *testing.T) {
	text, err := os.ReadFile("../../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, g := range grants {
		if table, ok := strings.CutPrefix(g.on, "table rekall."); ok {
			fmt.Fprintf(&want, "| `%s` | %s | %s |\n", table, inWords(g.edge), inWords(g.admin))
		}
	}
	if !strings.Contains(string(text), want.String()) {
		t.Errorf("SECURITY.md does not have these rows:\n%s", want.String())
	}
}

var right = regexp.MustCompile(`(select|insert|update|delete)( \()?`)

func inWords(rights string) string {
	words := map[string]string{"select": "read", "insert": "add", "update": "change", "delete": "remove"}
	var list []string
	for _, found := range right.FindAllStringSubmatch(rights, -1) {
		word := words[found[1]]
		if found[2] != "" {
			word += "*"
		}
		list = append(list, word)
	}
	return strings.Join(list, ", ")
}

package apikey_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// documented is REKALL.md, "Scopes", written out by hand.
var documented = []struct {
	name  string
	scope apikey.Scopes
}{
	{"memories:read", apikey.MemoriesRead},
	{"memories:write", apikey.MemoriesWrite},
	{"memories:delete", apikey.MemoriesDelete},
	{"entities:read", apikey.EntitiesRead},
	{"entities:write", apikey.EntitiesWrite},
	{"entities:delete", apikey.EntitiesDelete},
	{"relationships:read", apikey.RelationshipsRead},
	{"relationships:write", apikey.RelationshipsWrite},
	{"workflows:read", apikey.WorkflowsRead},
	{"workflows:write", apikey.WorkflowsWrite},
	{"agents:read", apikey.AgentsRead},
	{"agents:write", apikey.AgentsWrite},
	{"hives:read", apikey.HivesRead},
	{"hives:write", apikey.HivesWrite},
}

func documentedNames() []string {
	var names []string
	for _, d := range documented {
		names = append(names, d.name)
	}
	return names
}

func TestScopeNamesAreExactlyTheDocumentedOnesInOrder(t *testing.T) {
	if got := apikey.ScopeNames(); !slices.Equal(got, documentedNames()) || len(got) != 14 {
		t.Errorf("%d names: %q", len(got), got)
	}
	if got := apikey.AllScopes.String(); got != strings.Join(documentedNames(), " ") {
		t.Errorf("AllScopes = %q", got)
	}
}

func TestEveryScopeRoundTripsAndIsOneOfItsOwn(t *testing.T) {
	var all apikey.Scopes
	for _, d := range documented {
		got, err := apikey.ParseScope(d.name)
		if err != nil || got != d.scope {
			t.Errorf("ParseScope(%q) = %v, %v", d.name, got, err)
		}
		if names := d.scope.Names(); !slices.Equal(names, []string{d.name}) || d.scope.String() != d.name {
			t.Errorf("%q has the names %q", d.name, names)
		}
		if all&d.scope != 0 {
			t.Errorf("%q shares its bit", d.name)
		}
		all |= d.scope
	}
	if all != apikey.AllScopes {
		t.Errorf("AllScopes is %b, the union %b", apikey.AllScopes, all)
	}
}

func TestEverySetOfScopesRoundTrips(t *testing.T) {
	for set := range apikey.AllScopes + 1 {
		names := set.Names()
		if names == nil {
			t.Fatalf("the names of %b are nil", set)
		}
		if got, err := apikey.ParseScopes(names); got != set || err != nil {
			t.Fatalf("%b -> %q -> %b, %v", set, names, got, err)
		}
	}
}

func TestParseScopesIgnoresOrderAndRepetition(t *testing.T) {
	got, err := apikey.ParseScopes([]string{"hives:write", "memories:read", "hives:write"})
	if want := apikey.MemoriesRead | apikey.HivesWrite; got != want || err != nil {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	if got.String() != "memories:read hives:write" {
		t.Errorf("%q: not in the documented order", got)
	}
}

func TestUnknownScopesAreRefusedWithTheListOfKnownOnes(t *testing.T) {
	for _, name := range []string{
		"", "memories", "memories:", ":read", "memories:Read", "MEMORIES:READ", " memories:read", "memories:read ", "memories:*", "*", "admin",
		"relationships:delete", "workflows:delete", "agents:delete", "hives:delete", "memories:read memories:write",
	} {
		got, err := apikey.ParseScope(name)
		if err == nil || got != 0 {
			t.Errorf("ParseScope(%q) = %v, %v", name, got, err)
			continue
		}
		for _, known := range documentedNames() {
			if !strings.Contains(err.Error(), known) {
				t.Errorf("the error for %q does not offer %q: %v", name, known, err)
			}
		}
		if got, err := apikey.ParseScopes([]string{"memories:read", name}); err == nil || got != 0 {
			t.Errorf("ParseScopes with %q = %v, %v", name, got, err)
		}
	}
}

func TestTheErrorOfAnUnknownScopeShowsNoKey(t *testing.T) {
	key := apikey.Generate(apikey.Production)
	if _, err := apikey.ParseScope(key); err == nil || apikey.ContainsKey(err.Error()) {
		t.Error("no error, or one that shows the key")
	}
}

func TestKnownScopesIgnoresUnknownNames(t *testing.T) {
	for _, tt := range []struct {
		names []string
		want  apikey.Scopes
	}{
		{nil, 0},
		{[]string{"hives:delete"}, 0},
		{[]string{"hives:delete", "hives:read", "", "memories:READ", "agents:write"}, apikey.HivesRead | apikey.AgentsWrite},
		{documentedNames(), apikey.AllScopes},
	} {
		if got := apikey.KnownScopes(tt.names); got != tt.want {
			t.Errorf("KnownScopes(%q) = %v, want %v", tt.names, got, tt.want)
		}
	}
}

func TestHasNeedsEveryRequiredScope(t *testing.T) {
	const read, write = apikey.MemoriesRead, apikey.MemoriesWrite
	for _, tt := range []struct {
		set, required apikey.Scopes
		want          bool
	}{
		{read, read, true},
		{read | write, read, true},
		{read | write, read | write, true},
		{read, write, false},
		{write, read, false}, // write does not include read
		{read, read | write, false},
		{0, read, false},
		{apikey.AllScopes, apikey.AllScopes, true},
		{apikey.AllScopes &^ read, read, false},
	} {
		if got := tt.set.Has(tt.required); got != tt.want {
			t.Errorf("%q has %q: %v", tt.set, tt.required, got)
		}
	}
}

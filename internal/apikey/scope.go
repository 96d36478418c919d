package apikey

import (
	"fmt"
	"math/bits"
	"strings"
	"sync/atomic"
)

// Scopes is a set of scopes, one bit each.
type Scopes uint16

// The 14 scopes (REKALL.md, "Scopes"). The bits are internal: Postgres and the API know scopes by name only.
const (
	MemoriesRead Scopes = 1 << iota
	MemoriesWrite
	MemoriesDelete
	EntitiesRead
	EntitiesWrite
	EntitiesDelete
	RelationshipsRead
	RelationshipsWrite
	WorkflowsRead
	WorkflowsWrite
	AgentsRead
	AgentsWrite
	HivesRead
	HivesWrite

	// AllScopes has every scope.
	AllScopes = HivesWrite<<1 - 1
)

var scopeNames = [...]string{
	"memories:read", "memories:write", "memories:delete",
	"entities:read", "entities:write", "entities:delete",
	"relationships:read", "relationships:write",
	"workflows:read", "workflows:write",
	"agents:read", "agents:write",
	"hives:read", "hives:write",
}

// ScopeNames returns the names of all scopes in their documented order.
func ScopeNames() []string { return AllScopes.Names() }

// ParseScope returns the scope of that name.
func ParseScope(name string) (Scopes, error) {
	for i, n := range scopeNames {
		if n == name {
			return 1 << i, nil
		}
	}
	return 0, fmt.Errorf("unknown scope %q: use one of %s", Redact(name), strings.Join(scopeNames[:], ", "))
}

// ParseScopes returns the union of the named scopes.
func ParseScopes(names []string) (Scopes, error) {
	var set Scopes
	for _, n := range names {
		s, err := ParseScope(n)
		if err != nil {
			return 0, err
		}
		set |= s
	}
	return set, nil
}

// KnownScopes returns the union of those of the named scopes that this version knows. A scope that a newer version added
// grants nothing at an older edge.
func KnownScopes(names []string) Scopes {
	var set Scopes
	for _, n := range names {
		if s, err := ParseScope(n); err == nil {
			set |= s
		}
	}
	return set
}

// Has reports whether s holds every scope of required.
func (s Scopes) Has(required Scopes) bool { return s&required == required }

// Names returns the names of the scopes in s in their documented order; never nil.
func (s Scopes) Names() []string {
	names := make([]string, 0, bits.OnesCount16(uint16(s)))
	for i, n := range scopeNames {
		if s&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return names
}

// String returns the names separated by spaces, as OAuth writes scopes (RFC 6749, section 3.3).
func (s Scopes) String() string {
	if s&^AllScopes != 0 {
		return strings.Join(s.Names(), " ")
	}
	if text := scopeTexts[s].Load(); text != nil {
		return *text
	}
	text := strings.Join(s.Names(), " ")
	scopeTexts[s].Store(&text)
	return text
}

// scopeTexts remembers each set that was ever written, since every request has one to tell its backend.
var scopeTexts [AllScopes + 1]atomic.Pointer[string]

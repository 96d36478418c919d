// Package scoperule says which scope a request needs. A request that no rule covers needs one that nobody has: it is
// refused, so that an API that grows is closed until somebody opens it.
package scoperule

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// Rule says that requests with a method and a path need a scope.
type Rule struct {
	Scope  apikey.Scopes
	Method string
	// Pattern of the path: a segment ":name" matches any one segment, "*" as the last segment one or more. All else is
	// matched as it stands: the case of letters counts, and a slash at the end makes another path.
	Pattern string
}

// Builtin returns Rekall's own rules (REKALL.md, "Endpoints and the scope each needs"). HEAD needs what GET needs.
func Builtin() []Rule {
	return []Rule{
		{apikey.MemoriesRead, "GET", "/v1/memories"},
		{apikey.MemoriesRead, "GET", "/v1/memories/:id"},
		{apikey.MemoriesRead, "POST", "/v1/memories/search"},
		{apikey.MemoriesWrite, "POST", "/v1/memories"},
		{apikey.MemoriesWrite, "PUT", "/v1/memories/:id"},
		{apikey.MemoriesDelete, "DELETE", "/v1/memories/:id"},

		{apikey.EntitiesRead, "GET", "/v1/entities"},
		{apikey.EntitiesRead, "GET", "/v1/entities/:id"},
		{apikey.EntitiesRead, "POST", "/v1/entities/search"},
		{apikey.EntitiesWrite, "POST", "/v1/entities"},
		{apikey.EntitiesWrite, "PUT", "/v1/entities/:id"},
		{apikey.EntitiesDelete, "DELETE", "/v1/entities/:id"},

		{apikey.RelationshipsRead, "GET", "/v1/relationships"},
		{apikey.RelationshipsWrite, "POST", "/v1/relationships"},
		{apikey.RelationshipsWrite, "DELETE", "/v1/relationships/:id"},

		{apikey.WorkflowsRead, "GET", "/v1/workflows"},
		{apikey.WorkflowsRead, "GET", "/v1/workflows/:id"},
		{apikey.WorkflowsWrite, "POST", "/v1/workflows"},
		{apikey.WorkflowsWrite, "PUT", "/v1/workflows/:id"},
		{apikey.WorkflowsWrite, "DELETE", "/v1/workflows/:id"},
		{apikey.WorkflowsWrite, "POST", "/v1/workflows/:id/trigger"},

		{apikey.AgentsRead, "GET", "/v1/agents"},
		{apikey.AgentsRead, "GET", "/v1/agents/:id"},
		{apikey.AgentsWrite, "POST", "/v1/agents/spawn"},
		{apikey.AgentsWrite, "PUT", "/v1/agents/:id"},
		{apikey.AgentsWrite, "DELETE", "/v1/agents/:id"},
		{apikey.AgentsWrite, "POST", "/v1/agents/:id/message"},

		{apikey.HivesRead, "GET", "/v1/hives"},
		{apikey.HivesRead, "GET", "/v1/hives/:id"},
		{apikey.HivesWrite, "POST", "/v1/hives"},
		{apikey.HivesWrite, "PUT", "/v1/hives/:id"},
		{apikey.HivesWrite, "DELETE", "/v1/hives/:id"},
		{apikey.HivesWrite, "POST", "/v1/hives/:id/members"},
		{apikey.HivesWrite, "DELETE", "/v1/hives/:id/members/:userId"},
	}
}

// KnownMethod reports whether a rule can cover the method. TRACE, CONNECT, and methods that only look like one of these
// ("get" is another method than "GET") cannot be covered.
func KnownMethod(method string) bool {
	switch method {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS":
		return true
	}
	return false
}

// ParseRule reads a rule as an operator writes it.
func ParseRule(scope, method, pattern string) (Rule, error) {
	set, err := apikey.ParseScope(scope)
	if err != nil {
		return Rule{}, err
	}
	if !KnownMethod(method) {
		return Rule{}, fmt.Errorf("unknown method %q: use GET, HEAD, POST, PUT, PATCH, DELETE or OPTIONS, in capitals", apikey.Redact(method))
	}
	if err := checkPattern(pattern); err != nil {
		return Rule{}, fmt.Errorf("path %q %w", apikey.Redact(pattern), err)
	}
	return Rule{set, method, pattern}, nil
}

// Requests is the same for rules that stand for the same requests: names of parameters do not count.
func (r Rule) Requests() string {
	return r.Method + " " + parameterName.ReplaceAllString(r.Pattern, "/:")
}

var parameterName = regexp.MustCompile(`/:[^/]+`)

func checkPattern(pattern string) error {
	if !strings.HasPrefix(pattern, "/") {
		return errors.New("must begin with a slash")
	}
	if len(pattern) > maxPath {
		return fmt.Errorf("must not be longer than %d bytes: no request could match it", maxPath)
	}
	segments := strings.Split(pattern[1:], "/")
	for i, segment := range segments {
		last := i == len(segments)-1
		switch {
		case segment == "*" && !last:
			return errors.New("must have * as its last segment only; use :name for one segment")
		case segment == "*", segment == "" && last:
		case segment == "":
			return errors.New("must not have an empty segment")
		case segment[0] == ':':
			if segment == ":" || strings.Trim(segment[1:], unreserved) != "" {
				return errors.New("must give each parameter a name of letters and digits, as in /v1/memories/:id")
			}
		case strings.ContainsAny(segment, "*:"):
			return errors.New("must have * and :name as whole segments only")
		case strings.Trim(segment, unreserved) != "":
			// A request could write any other character in a second way, "@" as "%40", and so escape this rule for a
			// less specific one.
			return errors.New("must have only letters, digits and -._~ in its fixed segments; use :name for others")
		case !Canonical("/" + segment):
			return errors.New("must be written as a canonical request path: no request could match it")
		}
	}
	return nil
}

// unreserved are the characters of a path that can be written in one way only, because Canonical refuses their escapes.
const unreserved = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-._~"

// Table finds the rule of a request. It is immutable and safe for concurrent use.
type Table struct {
	methods map[string]*node
}

// node is a place in a tree of path segments. Its children are tried from the most specific to the least.
type node struct {
	literal   map[string]*node
	parameter *node
	scope     apikey.Scopes // of the path that ends here; 0: no rule
	rest      apikey.Scopes // of all paths that go on from here; 0: no rule
}

// New returns a table of rules. A rule with the method and pattern of an earlier one replaces it; names of parameters do
// not count.
func New(rules ...Rule) (*Table, error) {
	t := &Table{methods: make(map[string]*node)}
	for _, rule := range rules {
		if rule.Scope == 0 || !apikey.AllScopes.Has(rule.Scope) || !KnownMethod(rule.Method) {
			return nil, fmt.Errorf("rule for %q has no known scope or an unknown method", apikey.Redact(rule.Pattern))
		}
		if err := checkPattern(rule.Pattern); err != nil {
			return nil, fmt.Errorf("path %q %w", apikey.Redact(rule.Pattern), err)
		}
		root, ok := t.methods[rule.Method]
		if !ok {
			root = &node{}
			t.methods[rule.Method] = root
		}
		root.add(rule.Pattern[1:], rule.Scope)
	}
	return t, nil
}

func (n *node) add(pattern string, scope apikey.Scopes) {
	segment, rest, more := strings.Cut(pattern, "/")
	if segment == "*" {
		n.rest = scope
		return
	}
	child := n.parameter
	if !strings.HasPrefix(segment, ":") {
		child = n.literal[segment]
	}
	if child == nil {
		child = &node{}
		if strings.HasPrefix(segment, ":") {
			n.parameter = child
		} else {
			if n.literal == nil {
				n.literal = make(map[string]*node)
			}
			n.literal[segment] = child
		}
	}
	if more {
		child.add(rest, scope)
	} else {
		child.scope = scope
	}
}

// Required returns the scope that a request needs, and whether any rule covers it. The path must be canonical.
func (t *Table) Required(method, path string) (apikey.Scopes, bool) {
	if len(path) == 0 || path[0] != '/' {
		return 0, false
	}
	if root, ok := t.methods[method]; ok {
		scope, loose := root.find(path[1:])
		// Many backends serve /V1/Memories/ as /v1/memories, and some /v1/memories.json (Rails): no spelling may escape to a looser rule
		// with another scope.
		if loose && root.findFolded(strings.TrimSuffix(unescape(path[1:]), "/")) != scope {
			return 0, false
		}
		if scope != 0 {
			return scope, true
		}
	}
	if method == "HEAD" {
		return t.Required("GET", path)
	}
	return 0, false
}

// find returns the scope of the most specific pattern that matches, or 0. It matches loosely by a star, or by a name beside fixed
// segments.
func (n *node) find(path string) (scope apikey.Scopes, loose bool) {
	segment, rest, more := strings.Cut(path, "/")
	for _, child := range [...]*node{n.literal[segment], n.parameter} {
		named := child == n.parameter && n.literal != nil
		switch {
		case child == nil || child == n.parameter && segment == "":
		case !more && child.scope != 0:
			return child.scope, named
		case more:
			if scope, loose = child.find(rest); scope != 0 {
				return scope, loose || named
			}
		}
	}
	if path != "" {
		return n.rest, n.rest != 0
	}
	return 0, false
}

// dotlessI maps what some, such as Java, take for other cases of the letter i.
var dotlessI = strings.NewReplacer("İ", "i", "ı", "i")

// unescape undoes the escapes of a canonical path, none of which is of a slash or a dot: letters that are another case of ASCII's
// (ſ of s) need them.
func unescape(path string) string {
	if strings.IndexByte(path, '%') < 0 {
		return path
	}
	unescaped, err := url.PathUnescape(path)
	if err != nil { // it is not canonical
		return path
	}
	return dotlessI.Replace(unescaped)
}

// findFolded is find for a path without its final slash, where neither case nor that slash counts, nor what follows a dot in the
// last segment. If several fixed segments then match, it returns all their scopes.
func (n *node) findFolded(path string) apikey.Scopes {
	segment, rest, more := strings.Cut(path, "/")
	after := func(child *node) apikey.Scopes {
		if more {
			return child.findFolded(rest)
		}
		scope := child.scope
		if slash := child.literal[""]; slash != nil {
			scope |= slash.scope
		}
		return scope
	}
	var scope apikey.Scopes
	stem := segment
	if !more {
		stem, _, _ = strings.Cut(segment, ".")
	}
	for literal, child := range n.literal {
		if strings.EqualFold(literal, segment) || stem != "" && strings.EqualFold(literal, stem) {
			scope |= after(child)
		}
	}
	if scope == 0 && n.parameter != nil && segment != "" {
		scope = after(n.parameter)
	}
	if scope == 0 && path != "" {
		scope = n.rest
	}
	return scope
}

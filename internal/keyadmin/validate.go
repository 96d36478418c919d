package keyadmin

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// InvalidError says which field of a request is not acceptable, and what would be. It never quotes a key.
type InvalidError struct {
	Field  string // as the API names it
	Reason string
}

func (e *InvalidError) Error() string { return e.Field + ": " + e.Reason }

const (
	maxText = 200 // characters; the database checks the same

	// minLifetime is the least that Postgres can tell from none.
	minLifetime = time.Microsecond

	// maxLifetime is ten years: longer is a typing mistake, and "never" can be said.
	maxLifetime = 3650 * 24 * time.Hour
)

// validate returns the key that the request asks for, without what is random.
func (r CreateRequest) validate() (keystore.NewKey, error) {
	key := keystore.NewKey{Name: r.Name, Account: r.Account}
	if err := checkText("name", r.Name); err != nil {
		return key, err
	}
	if err := checkText("account", r.Account); err != nil {
		return key, err
	}
	if r.Account == keystore.CanaryAccount {
		return key, &InvalidError{"account", "must not be the one that canaries have"}
	}
	var err error
	if key.Environment, err = apikey.ParseEnvironment(r.Environment); err != nil {
		return key, &InvalidError{"environment", "must be production or sandbox"}
	}
	if len(r.Scopes) == 0 {
		return key, &InvalidError{"scopes", "must name at least one of " + strings.Join(apikey.ScopeNames(), ", ")}
	}
	if key.Scopes, err = apikey.ParseScopes(r.Scopes); err != nil {
		return key, &InvalidError{"scopes", err.Error()}
	}
	if r.ExpiresIn == "" {
		return key, nil
	}
	if key.Lifetime, err = ParseDuration(r.ExpiresIn); err != nil {
		return key, &InvalidError{"expires_in", err.Error()}
	}
	if key.Lifetime < minLifetime || key.Lifetime > maxLifetime {
		return key, &InvalidError{"expires_in", "must be more than 0 and at most 3650d (ten years)"}
	}
	return key, nil
}

// checkText accepts what can stand in a header and in a line of a list. An account with spaces at its ends would reach a
// backend as another account, since headers lose them.
func checkText(field, s string) error {
	switch {
	case s == "" || utf8.RuneCountInString(s) > maxText:
		return &InvalidError{field, "must have 1 to 200 characters"}
	case !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl):
		return &InvalidError{field, "must be UTF-8 text without control characters"}
	case strings.TrimSpace(s) != s:
		return &InvalidError{field, "must not begin or end with a space"}
	case apikey.ContainsKey(s):
		return &InvalidError{field, "must not contain an API key"}
	}
	return nil
}

// validate returns where the page begins and how long it is.
func (r ListRequest) validate() (after keystore.Position, limit int, err error) {
	if r.Account != "" {
		if err := checkText("account", r.Account); err != nil {
			return after, 0, err
		}
	}
	limit = r.Limit
	if limit == 0 {
		limit = maxPage
	}
	if limit < 1 || limit > maxPage {
		return after, 0, &InvalidError{"limit", "must be from 1 to 100"}
	}
	after, err = parseCursor(r.Cursor)
	return after, limit, err
}

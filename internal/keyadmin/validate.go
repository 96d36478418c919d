package keyadmin

import (
	"cmp"
	"context"
	"slices"
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
	maxLifetime = 3650 * day
)

// validate returns the key that the request asks for, without what is random.
func (r CreateRequest) validate() (keystore.NewKey, error) {
	key := keystore.NewKey{Name: r.Name, Account: r.Account, ManageKeys: r.ManageKeys}
	var badScopes, badExpiry error
	key.Environment, _ = apikey.ParseEnvironment(r.Environment) // checked below
	key.Scopes, badScopes = parseScopes(r.Scopes)
	switch {
	case r.ExpiresIn != "" && r.ExpiresAt != "":
		badExpiry = &InvalidError{"expires_at", "must be left out where expires_in is given"}
	case r.ExpiresIn != "":
		key.Lifetime, badExpiry = parseLifetime(r.ExpiresIn)
	default:
		key.ExpiresAt, badExpiry = parseTime("expires_at", r.ExpiresAt)
	}
	return key, cmp.Or(
		checkName("name", r.Name),
		checkNewAccount(r.Account),
		checkEnvironment(r.Environment),
		badScopes,
		checkIdempotencyKey(r.IdempotencyKey),
		badExpiry)
}

// given is the error of a field that may be left out.
func given(field string, err error) error {
	if field == "" {
		return nil
	}
	return err
}

var errEnvironment = &InvalidError{"environment", "must be production or sandbox"}

func checkEnvironment(s string) error {
	if _, err := apikey.ParseEnvironment(s); err != nil {
		return errEnvironment
	}
	return nil
}

func parseScopes(names []string) (apikey.Scopes, error) {
	if len(names) == 0 {
		return 0, &InvalidError{"scopes", "must name at least one of " + strings.Join(apikey.ScopeNames(), ", ")}
	}
	shown := slices.Clone(names)
	for i, name := range names {
		if name != "" {
			shown[i] = Shown(name) // of a scope, it is the name itself
		}
	}
	scopes, err := apikey.ParseScopes(shown)
	if err != nil {
		return 0, &InvalidError{"scopes", "has an " + err.Error()}
	}
	return scopes, nil
}

// Shown is a name of the client's own, fit to be repeated to it.
func Shown(name string) string {
	const longest = 40
	name = apikey.Redact(name)
	if name == "" {
		return `""`
	}
	if runes := []rune(name); len(runes) > longest {
		name = string(runes[:longest]) + "…"
	}
	return name
}

func parseLifetime(s string) (time.Duration, error) {
	lifetime, err := ParseDuration(s)
	if err != nil {
		return 0, &InvalidError{"expires_in", err.Error()}
	}
	if lifetime < minLifetime || lifetime > maxLifetime {
		return 0, &InvalidError{"expires_in", "must be more than 0 and at most 3650d (ten years)"}
	}
	return lifetime, nil
}

// parseTime returns nil for no text.
func parseTime(field, s string) (*time.Time, error) {
	if s == "" {
		return nil, nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return nil, &InvalidError{field, "must be a time as RFC 3339 has it, such as 2030-12-31T23:59:59Z"}
	}
	return &t, nil
}

// checkRange refuses a time in which nothing lies: that would look as if nothing had happened.
func checkRange(fromField string, from *time.Time, toField string, to *time.Time) error {
	if from != nil && to != nil && !from.Before(*to) {
		return &InvalidError{fromField, "must be before " + toField}
	}
	return nil
}

// checkYear refuses a time that JSON or the database cannot tell: an offset may lie between it and another year.
func checkYear(field string, t time.Time) error {
	if t.Before(time.Unix(0, 0)) || t.Year() > 9998 {
		return &InvalidError{field, "must be from 1970 to 9998"}
	}
	return nil
}

// checkFuture compares an expiry with Postgres's clock, which is what ends the key.
func checkFuture(ctx context.Context, tx *keystore.Tx, expiresAt *time.Time) error {
	if expiresAt == nil {
		return nil
	}
	now, err := tx.Now(ctx)
	if err != nil {
		return err
	}
	if lifetime := expiresAt.Sub(now); lifetime < minLifetime || lifetime > maxLifetime {
		return &InvalidError{"expires_at", "must be in the future, at most 3650 days (ten years) ahead"}
	}
	return nil
}

func checkAccount(account string) error {
	if account == keystore.CanaryAccount {
		return &InvalidError{"account", "must not be the one that canaries have"}
	}
	return checkText("account", account)
}

// checkNewAccount is checkAccount for an account that is to own a key. Of one that has keys already, they can be revoked whatever it
// is called.
func checkNewAccount(account string) error {
	if err := checkAccount(account); err != nil {
		return err
	}
	return checkName("account", account)
}

func checkIdempotencyKey(s string) error {
	const field, maxLength = "Idempotency-Key", 255
	switch {
	case len(s) > maxLength || strings.ContainsFunc(s, func(r rune) bool { return r < 0x21 || r > 0x7e }):
		return &InvalidError{field, "must have at most 255 printable ASCII characters, without spaces"}
	case apikey.ContainsKey(s):
		return &InvalidError{field, "must not contain an API key"}
	}
	return nil
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

// checkName is checkText for what is to be stored and read by people: it refuses what they would read as something else, such as text
// that runs backwards, or not see at all.
func checkName(field, s string) error {
	if err := checkText(field, s); err != nil {
		return err
	}
	if strings.ContainsFunc(s, deceives) || !strings.ContainsFunc(s, visible) {
		return &InvalidError{field, "must have a visible character, and none that is invisible or changes the direction of the text"}
	}
	return nil
}

// deceives is about characters without a shape of their own, but for the two that some scripts and emoji are written with.
func deceives(r rune) bool {
	const zeroWidthNonJoiner, zeroWidthJoiner = '\u200c', '\u200d'
	return unicode.Is(unicode.Cf, r) && r != zeroWidthNonJoiner && r != zeroWidthJoiner
}

func visible(r rune) bool {
	return unicode.In(r, unicode.L, unicode.N, unicode.P, unicode.S) && !unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r)
}

// actorKinds are what an actor begins with, as the database checks it.
var actorKinds = []string{"key", "user", "cli", "leak", "system"}

// checkActor accepts what can have done something. Anything else would select nothing, which looks as if nothing had been done.
func checkActor(field, s string) error {
	kind, name, _ := strings.Cut(s, ":")
	switch {
	case apikey.ContainsKey(s):
		return &InvalidError{field, "must not contain an API key"}
	case !slices.Contains(actorKinds, kind) || name == "":
		return &InvalidError{field, "must be key:<id>, user:<name>, cli:<user>, leak:<source> or system:<what>"}
	case kind == "key" && !idPattern.MatchString(name):
		return &InvalidError{field, "must be key: and the id of a key, which is key_ and 22 letters or digits"}
	}
	return checkText(field, name)
}

// checkSearch accepts a part of a text that checkText accepts.
func checkSearch(field, s string) error {
	switch {
	case utf8.RuneCountInString(s) > maxText:
		return &InvalidError{field, "must have at most 200 characters"}
	case !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl):
		return &InvalidError{field, "must be UTF-8 text without control characters"}
	}
	return nil
}

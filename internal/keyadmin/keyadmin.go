// Package keyadmin is the life of a key: created and shown once, listed, revoked. Each step is one transaction. The command
// line uses it, and whatever else manages keys.
package keyadmin

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// What Revoke may find instead of a key that it can revoke.
var (
	ErrNotFound       = errors.New("no such key")
	ErrAlreadyRevoked = errors.New("key is already revoked")
)

// InvalidError says which field of a request is not acceptable, and what would be.
type InvalidError struct {
	Field  string // as the API names it
	Reason string
}

func (e *InvalidError) Error() string { return e.Field + " " + e.Reason }

// Status of a key.
type Status string

// The statuses. A revoked key that has also expired is revoked.
const (
	Active  Status = "active"
	Expired Status = "expired"
	Revoked Status = "revoked"
)

// Key is a key as the API shows it.
type Key struct {
	ID          string     `json:"id"`
	Key         Secret     `json:"key,omitempty"` // the key itself: only in the answer to Create
	Name        string     `json:"name"`
	Account     string     `json:"account"`
	Environment string     `json:"environment"`
	Scopes      []string   `json:"scopes"`
	Masked      string     `json:"masked"`
	Status      Status     `json:"status"`
	CreatedAt   time.Time  `json:"created_at"`
	ExpiresAt   *time.Time `json:"expires_at"`
	RevokedAt   *time.Time `json:"revoked_at"`
}

// Secret is a key that formatting does not show: only JSON and Reveal do.
type Secret string

// String hides the key from logs and errors.
func (Secret) String() string { return "[api key]" }

// GoString hides the key from logs and errors.
func (Secret) GoString() string { return "[api key]" }

// Reveal returns the key, to be shown to its owner once.
func (s Secret) Reveal() string { return string(s) }

// Admin manages keys in a store.
type Admin struct{ store *keystore.Store }

// New returns an Admin.
func New(store *keystore.Store) *Admin { return &Admin{store} }

// CreateRequest says what key to create.
type CreateRequest struct {
	Name        string
	Account     string
	Environment string   // production or sandbox
	Scopes      []string // at least one
	ExpiresIn   string   // as ParseDuration reads it; empty: never
}

const (
	maxName = 200 // characters; the database checks the same

	// maxLifetime is ten years: longer is a typing mistake, and "never" can be said.
	maxLifetime = 3650 * 24 * time.Hour
)

// Create makes a key. The result alone holds the key itself; Postgres gets its SHA-256. An unacceptable request is an
// *InvalidError, and nothing is created.
func (a *Admin) Create(ctx context.Context, request CreateRequest) (Key, error) {
	row, err := validate(request)
	if err != nil {
		return Key{}, err
	}
	secret := apikey.Generate(row.Environment)
	row.ID, row.Digest, row.Hint = "key_"+apikey.RandomText(22), apikey.Hash(secret), apikey.Hint(secret)
	created, err := a.store.Insert(ctx, row)
	if err != nil {
		return Key{}, err
	}
	key := fromRow(created)
	key.Key = Secret(secret)
	return key, nil
}

func validate(request CreateRequest) (keystore.NewKey, error) {
	row := keystore.NewKey{Name: request.Name, Account: request.Account}
	if err := validText("name", request.Name); err != nil {
		return row, err
	}
	if err := validText("account", request.Account); err != nil {
		return row, err
	}
	var err error
	if row.Environment, err = apikey.ParseEnvironment(request.Environment); err != nil {
		return row, &InvalidError{"environment", "must be production or sandbox"}
	}
	if len(request.Scopes) == 0 {
		return row, &InvalidError{"scopes", "must name at least one scope: " + strings.Join(apikey.ScopeNames(), ", ")}
	}
	if row.Scopes, err = apikey.ParseScopes(request.Scopes); err != nil {
		return row, &InvalidError{"scopes", "must be known: " + err.Error()}
	}
	if request.ExpiresIn != "" {
		if row.Lifetime, err = ParseDuration(request.ExpiresIn); err != nil {
			return row, &InvalidError{"expires_in", err.Error()}
		}
		if row.Lifetime > maxLifetime {
			return row, &InvalidError{"expires_in", "must be at most 3650d"}
		}
	}
	return row, nil
}

func validText(field, s string) error {
	switch {
	case s == "" || utf8.RuneCountInString(s) > maxName:
		return &InvalidError{field, "must have 1 to 200 characters"}
	case !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl):
		return &InvalidError{field, "must be text without control characters"}
	case apikey.ContainsKey(s):
		return &InvalidError{field, "must not contain an API key"}
	}
	return nil
}

func fromRow(row keystore.Row) Key {
	key := Key{
		ID: row.ID, Name: row.Name, Account: row.Account, Environment: row.Environment, Scopes: row.Scopes,
		Status: Active, CreatedAt: row.CreatedAt.UTC(), ExpiresAt: utc(row.ExpiresAt), RevokedAt: utc(row.RevokedAt),
	}
	if environment, err := apikey.ParseEnvironment(row.Environment); err == nil {
		hint := ""
		if row.Hint != nil {
			hint = *row.Hint
		}
		key.Masked = apikey.Mask(environment, hint)
	}
	switch {
	case row.RevokedAt != nil:
		key.Status = Revoked
	case row.ExpiresAt != nil && !row.Now.Before(*row.ExpiresAt):
		key.Status = Expired
	}
	return key
}

func utc(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	u := t.UTC()
	return &u
}

// ListRequest selects keys.
type ListRequest struct {
	Account string // empty: all accounts
	Cursor  string // NextCursor of the page before; empty: the first page
	Limit   int    // 1 to 100; 0: 100
}

// Page is one page of a list, newest keys first.
type Page struct {
	Keys       []Key
	NextCursor string // empty: the last page
}

const maxPage = 100

// List returns a page of keys.
func (a *Admin) List(ctx context.Context, request ListRequest) (Page, error) {
	limit := request.Limit
	if limit == 0 {
		limit = maxPage
	}
	if limit < 1 || limit > maxPage {
		return Page{}, &InvalidError{"limit", "must be from 1 to 100"}
	}
	after, err := parseCursor(request.Cursor)
	if err != nil {
		return Page{}, err
	}
	// One more than asked for tells whether there is a next page.
	rows, err := a.store.List(ctx, request.Account, after, limit+1)
	if err != nil {
		return Page{}, err
	}
	page := Page{Keys: []Key{}}
	for i, row := range rows {
		if i == limit {
			last := rows[i-1]
			page.NextCursor = base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%d %s", last.CreatedAt.UnixMicro(), last.ID))
			break
		}
		page.Keys = append(page.Keys, fromRow(row))
	}
	return page, nil
}

func parseCursor(s string) (keystore.Page, error) {
	if s == "" {
		return keystore.Page{}, nil
	}
	invalid := &InvalidError{"cursor", "must be the next_cursor of an earlier page"}
	text, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return keystore.Page{}, invalid
	}
	micros, id, ok := strings.Cut(string(text), " ")
	at, err := strconv.ParseInt(micros, 10, 64)
	if !ok || err != nil || !idPattern.MatchString(id) {
		return keystore.Page{}, invalid
	}
	return keystore.Page{CreatedAt: time.UnixMicro(at), ID: id}, nil
}

var idPattern = regexp.MustCompile(`^key_[0-9A-Za-z]{22}$`)

// Revoke revokes a key for good. The error wraps ErrNotFound or ErrAlreadyRevoked where nothing was changed.
func (a *Admin) Revoke(ctx context.Context, id string) (Key, error) {
	if !idPattern.MatchString(id) {
		return Key{}, fmt.Errorf("%w: an id looks like key_ and 22 letters or digits", ErrNotFound)
	}
	row, revoked, err := a.store.Revoke(ctx, id)
	switch {
	case errors.Is(err, keystore.ErrNoRow):
		return Key{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	case err != nil:
		return Key{}, err
	case !revoked:
		return fromRow(row), fmt.Errorf("%w: %s, at %s", ErrAlreadyRevoked, id, row.RevokedAt.UTC().Format(time.RFC3339))
	}
	return fromRow(row), nil
}

var errDuration = errors.New("must be a positive duration, such as 90d, 2w, 12h or 1h30m")

// ParseDuration reads a duration as people write it: Go's form (12h, 1h30m), or whole days (90d) or weeks (2w).
func ParseDuration(s string) (time.Duration, error) {
	unit := time.Duration(0)
	switch {
	case strings.HasSuffix(s, "d"):
		unit = 24 * time.Hour
	case strings.HasSuffix(s, "w"):
		unit = 7 * 24 * time.Hour
	}
	if unit == 0 {
		d, err := time.ParseDuration(s)
		if err != nil || d < time.Second {
			return 0, errDuration
		}
		return d, nil
	}
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if err != nil || n == 0 || n > uint64(math.MaxInt64/unit) {
		return 0, errDuration
	}
	return time.Duration(n) * unit, nil
}

// Package keyadmin is the life of a key: created and shown once, listed, revoked. Each step is one transaction. Whatever
// manages keys uses it, so that all of it follows the same rules.
package keyadmin

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// What may be found instead of a key to work on.
var (
	ErrNotFound       = errors.New("no such key")
	ErrAlreadyRevoked = errors.New("key is already revoked")
)

// Admin manages the keys in a store.
type Admin struct{ store *keystore.Store }

// New returns an Admin. The store remains the caller's, to be closed.
func New(store *keystore.Store) *Admin { return &Admin{store} }

// CreateRequest says what key to create.
type CreateRequest struct {
	Name        string   // for people: 1 to 200 characters
	Account     string   // that owns the key: 1 to 200 characters
	Environment string   // production or sandbox
	Scopes      []string // at least one
	ExpiresIn   string   // as ParseDuration reads it, at most 3650d; empty: never
}

// Create makes a key. Only the answer holds the key itself; Postgres gets its SHA-256. A request that is not acceptable is
// an *InvalidError, and nothing is written.
func (a *Admin) Create(ctx context.Context, request CreateRequest) (Key, error) {
	key, err := request.validate()
	if err != nil {
		return Key{}, err
	}
	secret := apikey.Generate(key.Environment)
	key.ID, key.Digest, key.Hint = newID(), apikey.Hash(secret), apikey.Hint(secret)
	row, err := a.store.Insert(ctx, key)
	if err != nil {
		return Key{}, err
	}
	created := fromRow(row)
	created.Key = Secret(secret)
	return created, nil
}

func newID() string { return "key_" + apikey.RandomText(22) }

var idPattern = regexp.MustCompile(`^key_[0-9A-Za-z]{22}$`)

// checkID keeps whatever is not an id out of statements and errors: it may be a key that was pasted by mistake.
func checkID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%w: an id is key_ and 22 letters or digits", ErrNotFound)
	}
	return nil
}

// Get returns a key. The error wraps ErrNotFound if there is none with that id.
func (a *Admin) Get(ctx context.Context, id string) (Key, error) {
	if err := checkID(id); err != nil {
		return Key{}, err
	}
	row, err := a.store.Get(ctx, id)
	if errors.Is(err, keystore.ErrNoRow) {
		return Key{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return Key{}, err
	}
	return fromRow(row), nil
}

// Revoke revokes a key for good. The error wraps ErrNotFound or ErrAlreadyRevoked where nothing was changed; with the
// latter comes the key as it is.
func (a *Admin) Revoke(ctx context.Context, id string) (Key, error) {
	if err := checkID(id); err != nil {
		return Key{}, err
	}
	row, revoked, err := a.store.Revoke(ctx, id)
	switch {
	case errors.Is(err, keystore.ErrNoRow):
		return Key{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	case err != nil:
		return Key{}, err
	case !revoked:
		return fromRow(row), fmt.Errorf("%w: %s, since %s", ErrAlreadyRevoked, id, row.RevokedAt.UTC().Format(time.RFC3339))
	}
	return fromRow(row), nil
}

// ListRequest selects keys. The zero value is the first page of all keys.
type ListRequest struct {
	Account string // empty: all accounts
	Limit   int    // 1 to 100; 0: 100
	Cursor  string // NextCursor of the page before; empty: the first page
}

// Page is one page of a list, newest keys first.
type Page struct {
	Keys       []Key  // never nil
	NextCursor string // empty: the last page
}

const maxPage = 100

// List returns a page of keys. A request that is not acceptable is an *InvalidError.
func (a *Admin) List(ctx context.Context, request ListRequest) (Page, error) {
	after, limit, err := request.validate()
	if err != nil {
		return Page{}, err
	}
	// One more than asked for tells whether there is a next page.
	rows, err := a.store.List(ctx, request.Account, after, limit+1)
	if err != nil {
		return Page{}, err
	}
	page := Page{Keys: make([]Key, 0, min(limit, len(rows)))}
	if len(rows) > limit {
		rows = rows[:limit]
		page.NextCursor = formatCursor(rows[limit-1])
	}
	for _, row := range rows {
		page.Keys = append(page.Keys, fromRow(row))
	}
	return page, nil
}

func formatCursor(last keystore.Row) string {
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%d %s", last.CreatedAt.UnixMicro(), last.ID))
}

func parseCursor(s string) (keystore.Position, error) {
	if s == "" {
		return keystore.Position{}, nil
	}
	invalid := &InvalidError{"cursor", "must be the cursor that came with the page before"}
	text, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return keystore.Position{}, invalid
	}
	micros, id, _ := strings.Cut(string(text), " ")
	at, err := strconv.ParseInt(micros, 10, 64)
	if err != nil || at < 0 || at > maxCursor || !idPattern.MatchString(id) {
		return keystore.Position{}, invalid
	}
	return keystore.Position{CreatedAt: time.UnixMicro(at), ID: id}, nil
}

// maxCursor is the last moment that a key can have been created, in microseconds since 1970: the database checks the same.
var maxCursor = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC).UnixMicro()

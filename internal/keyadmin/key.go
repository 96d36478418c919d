package keyadmin

import (
	"fmt"
	"io"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Status of a key.
type Status string

// The statuses. A revoked key that has also expired is revoked.
const (
	Active  Status = "active"
	Expired Status = "expired"
	Revoked Status = "revoked"
)

// Key is a key as the API shows it. Times are Postgres's, in UTC.
type Key struct {
	ID          string     `json:"id"`
	Key         Secret     `json:"key,omitempty"` // the key itself: only in the answers to Create and Rotate
	Name        string     `json:"name"`
	Account     string     `json:"account"`
	Environment string     `json:"environment"`
	Scopes      []string   `json:"scopes"`
	ManageKeys  bool       `json:"manage_keys"`
	Masked      string     `json:"masked"`     // prefix and last four characters, "rk_test_…a1B2"
	Status      Status     `json:"status"`     // when it was read
	CreatedBy   *string    `json:"created_by"` // an actor; null: unknown
	CreatedAt   time.Time  `json:"created_at"`
	ExpiresAt   *time.Time `json:"expires_at"`   // null: never
	RevokedAt   *time.Time `json:"revoked_at"`   // null: not revoked
	LastUsedAt  *time.Time `json:"last_used_at"` // null: not known to have been used

	// LastUseUnknown: LastUsedAt is nil since it could not be read in time. JSON does not tell.
	LastUseUnknown bool `json:"-"`

	Predecessor *string `json:"predecessor"` // id of the key that this one replaces; null: none
	Successor   *string `json:"successor"`   // id of the newest key that replaces this one; null: none

	// OverlapOnFirstUse is not null while the predecessor waits for this key's first use: so long it lives on from then,
	// as ParseDuration reads it.
	OverlapOnFirstUse *string `json:"overlap_on_first_use"`

	// Expiring: the key is active and in its last 14 days, as ListRequest's status has it.
	Expiring bool `json:"-"`

	// GraceStarted says that ExpiresAt was set by the key's rotation. Undoing that restores the expiry that it had before.
	GraceStarted bool `json:"-"`
}

// Secret is a key. Only Reveal and JSON show it: a log line or an error made from it, or from what contains it, does not.
type Secret string

// Reveal returns the key, to be shown to its owner once.
func (s Secret) Reveal() string { return string(s) }

// Format writes a placeholder for every verb. With String alone, %d would show the key.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[api key]") }

func fromRow(row keystore.Row) Key {
	key := Key{
		ID: row.ID, Name: row.Name, Account: row.Account, Environment: row.Environment, Scopes: row.Scopes, ManageKeys: row.ManageKeys,
		Status: status(row), CreatedBy: optional(row.CreatedBy),
		CreatedAt: row.CreatedAt.UTC(), ExpiresAt: utc(row.ExpiresAt), RevokedAt: utc(row.RevokedAt), LastUsedAt: utc(row.LastUsedAt),
		Predecessor: optional(row.Predecessor), Successor: optional(row.Successor),
		GraceStarted: row.GraceStartedAt != nil,
	}
	key.Expiring = key.Status == Active && row.ExpiresAt != nil && row.ExpiresAt.Sub(row.Now) < expiringWithin
	if environment, err := apikey.ParseEnvironment(row.Environment); err == nil {
		key.Masked = apikey.Mask(environment, row.Hint)
	}
	if row.OverlapOnFirstUse != nil {
		key.OverlapOnFirstUse = optional(FormatDuration(*row.OverlapOnFirstUse))
	}
	return key
}

func fromRows(rows []keystore.Row) []Key {
	keys := make([]Key, 0, len(rows))
	for _, row := range rows {
		keys = append(keys, fromRow(row))
	}
	return keys
}

// optional is nil for the empty text, which JSON shows as null.
func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func status(row keystore.Row) Status {
	switch {
	case row.RevokedAt != nil:
		return Revoked
	case row.ExpiresAt != nil && !row.Now.Before(*row.ExpiresAt):
		return Expired
	}
	return Active
}

func utc(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	return new(t.UTC())
}

package keyadmin

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rekall-ai/gateway/internal/keystore"
)

// Action is what was done: a closed set.
type Action string

// The actions.
const (
	KeyCreated        Action = "key.created"
	KeyRenamed        Action = "key.renamed"
	KeyRevoked        Action = "key.revoked"
	KeyRotated        Action = "key.rotated"         // it got a successor
	KeyRotationUndone Action = "key.rotation_undone" // and its successor was revoked
	KeyGraceStarted   Action = "key.grace_started"   // its successor was used for the first time
	KeysRevoked       Action = "keys.revoked"        // many at once; each has its key.revoked too
	KeysImported      Action = "keys.imported"       // a line for each account
	LeakReported      Action = "leak.reported"       // a line for each report; keys that exist have their key.revoked too

	TierLimitsChanged    Action = "limits.tier_changed"
	AccountLimitsChanged Action = "limits.account_changed"
	KeyLimitsChanged     Action = "limits.key_changed"
)

var actions = []Action{
	KeyCreated, KeyRenamed, KeyRevoked, KeyRotated, KeyRotationUndone, KeyGraceStarted, KeysRevoked, KeysImported, LeakReported,
	TierLimitsChanged, AccountLimitsChanged, KeyLimitsChanged,
}

// ActionNames returns all actions.
func ActionNames() []string {
	names := make([]string, len(actions))
	for i, action := range actions {
		names[i] = string(action)
	}
	return names
}

// AuditEntry says who did what to which key and when. Times are Postgres's, in UTC.
type AuditEntry struct {
	ID          int64          `json:"id"`
	At          time.Time      `json:"at"`
	Actor       string         `json:"actor"` // "key:<id>", "user:<name>", "cli:<user>", "leak:<source>" or "system:<what>"
	Action      Action         `json:"action"`
	KeyID       *string        `json:"key_id"`      // null, like the next two: it was not about one
	Account     *string        `json:"account"`     //
	Environment *string        `json:"environment"` //
	Details     map[string]any `json:"details"`     // names, scopes, counts; never key material
}

// AuditRequest selects entries: those to which all that is set applies. The zero value is the first page of all.
type AuditRequest struct {
	Account string // empty: all that the actor manages
	KeyID   string // empty: any
	Actor   string // as AuditEntry has it; empty: any
	Action  string // empty: any
	Since   string // RFC 3339; empty: no bound
	Until   string // RFC 3339, itself outside; empty: no bound
	Limit   int    // 1 to 100; 0: 100
	Cursor  string // NextCursor of the page before; empty: the first page
}

// AuditPage is one page of the audit, newest first.
type AuditPage struct {
	Entries    []AuditEntry // never nil
	NextCursor string       // empty: the last page
}

// Audit returns a page of the audit. A request that is not acceptable is an *InvalidError.
func (a *Admin) Audit(ctx context.Context, actor Actor, request AuditRequest) (AuditPage, error) {
	filter, limit, err := request.validate()
	if err != nil {
		return AuditPage{}, err
	}
	end, err := a.turn(ctx, actor)
	if err != nil {
		return AuditPage{}, err
	}
	defer end()
	entries, err := a.store.ListAudit(ctx, actor.within(request.Account), filter, limit+1)
	if err != nil {
		return AuditPage{}, err
	}
	page := AuditPage{Entries: make([]AuditEntry, 0, min(limit, len(entries)))}
	if len(entries) > limit {
		entries = entries[:limit]
		page.NextCursor = strconv.FormatInt(entries[limit-1].ID, 10)
	}
	for _, e := range entries {
		page.Entries = append(page.Entries, AuditEntry{
			ID: e.ID, At: e.At.UTC(), Actor: e.Actor, Action: Action(e.Action),
			KeyID: optional(e.KeyID), Account: optional(e.Account), Environment: optional(e.Environment), Details: e.Details,
		})
	}
	return page, nil
}

func (r AuditRequest) validate() (filter keystore.AuditFilter, limit int, err error) {
	filter = keystore.AuditFilter{KeyID: r.KeyID, Actor: r.Actor, Action: r.Action}
	var badSince, badUntil, badCursor, badLimit error
	filter.Since, badSince = parseTime("since", r.Since)
	filter.Until, badUntil = parseTime("until", r.Until)
	if filter.Before, err = strconv.ParseInt(r.Cursor, 10, 64); err != nil || filter.Before < 1 {
		badCursor = errCursor
	}
	limit, badLimit = checkLimit(r.Limit)
	return filter, limit, cmp.Or(
		given(r.Account, checkText("account", r.Account)),
		given(r.KeyID, checkText("key_id", r.KeyID)),
		given(r.Actor, checkActor("actor", r.Actor)),
		given(r.Action, checkAction(r.Action)),
		badSince, badUntil, checkRange("since", filter.Since, "until", filter.Until), given(r.Cursor, badCursor), badLimit)
}

func checkAction(action string) error {
	if !slices.Contains(actions, Action(action)) {
		return &InvalidError{"action", "must be one of " + strings.Join(ActionNames(), ", ")}
	}
	return nil
}

// entry is the line that says what an actor did to a key.
func entry(actor Actor, action Action, row keystore.Row, details map[string]any) keystore.AuditEntry {
	return keystore.AuditEntry{
		Actor: actor.String(), Action: string(action), KeyID: row.ID, Account: row.Account, Environment: row.Environment, Details: details,
	}
}

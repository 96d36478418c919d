package keyadmin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Actor is who asks. The zero value may do nothing.
type Actor struct {
	rank        rank
	name        string // as the audit writes it
	account     string // empty for an operator, who has no account of their own
	keyID       string // of a managing key
	environment apikey.Environment
	scopes      apikey.Scopes
}

type rank uint8

const (
	nobody   rank = iota
	key           // manages the keys of its account, up to its own rights
	person        // manages the keys of an account
	operator      // manages all keys
)

// Operator returns the actor "cli:<name>", who manages the keys of all accounts: whoever can open the database. What cannot
// stand in a line of the audit is left out of the name.
func Operator(name string) Actor {
	name = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || deceives(r) || r == utf8.RuneError {
			return -1
		}
		return r
	}, apikey.Redact(name))
	if !strings.ContainsFunc(name, visible) {
		name = "unknown"
	}
	if runes := []rune(name); len(runes) > maxText {
		name = string(runes[:maxText])
	}
	return Actor{rank: operator, name: "cli:" + name}
}

// Person returns the actor "user:<name>", whom somebody else has authenticated, and who manages all keys of one account.
// Names that cannot be a user or an account are an *InvalidError.
func Person(name, account string) (Actor, error) {
	if err := checkName("user", name); err != nil {
		return Actor{}, err
	}
	if err := checkAccount(account); err != nil {
		return Actor{}, err
	}
	return Actor{rank: person, name: "user:" + name, account: account, scopes: apikey.AllScopes}, nil
}

// ManagingKey returns the actor "key:<id>" for a key that was found valid. It is a *ForbiddenError if the key may not manage
// keys. The record may be as old as the gateway's max_staleness: before anything is written, the rights are read again.
func ManagingKey(record *apikey.Record) (Actor, error) {
	if !record.ManageKeys {
		return Actor{}, errNoManager
	}
	return Actor{
		rank: key, name: "key:" + record.ID, account: record.Account, keyID: record.ID, environment: record.Environment, scopes: record.Scopes,
	}, nil
}

var errNoManager = &ForbiddenError{"", "this API key may not manage keys: use one made with manage_keys"}

// The key that asks has ended, though it was taken for good a moment ago. Both are a *ForbiddenError too.
var (
	ErrActorRevoked = fmt.Errorf("the key that asks is revoked: %w", errNoManager)
	ErrActorExpired = fmt.Errorf("the key that asks has expired: %w", errNoManager)
)

// ForbiddenError says what the actor may not do, which to somebody else might be allowed.
type ForbiddenError struct {
	Field  string // of the request, as the API names it; empty: whatever the request says
	Reason string
}

func (e *ForbiddenError) Error() string {
	if e.Field == "" {
		return e.Reason
	}
	return e.Field + ": " + e.Reason
}

// String returns the actor as the audit and Key.CreatedBy write it.
func (a Actor) String() string { return a.name }

// KeyID returns the id of the key that asks; empty if it is not a key.
func (a Actor) KeyID() string { return a.keyID }

// Account returns the account whose keys the actor manages; empty for an operator.
func (a Actor) Account() string { return a.account }

// Manages reports whether keys of an environment are among those that the actor manages.
func (a Actor) Manages(environment string) bool { return a.only() == "" || a.only() == environment }

// Grants returns the scopes that keys may have which the actor makes.
func (a Actor) Grants() []string {
	if a.rank == operator {
		return apikey.ScopeNames()
	}
	return a.scopes.Names()
}

// reach is all that the actor may see and change.
func (a Actor) reach() keystore.Reach {
	switch a.rank {
	case nobody:
		return keystore.Reach{}
	case operator:
		return keystore.Everything()
	case key, person:
	}
	return keystore.Within(a.account, a.only())
}

// only is the one environment whose keys the actor manages; empty: both.
func (a Actor) only() string {
	if a.environment == apikey.Sandbox {
		return apikey.Sandbox.String()
	}
	return ""
}

// within is reach, narrowed to an account if one is named. Of another's account nothing is in reach, as if it had no keys.
func (a Actor) within(account string) keystore.Reach {
	switch {
	case account == "" || account == a.account:
		return a.reach()
	case a.rank == operator:
		return keystore.Within(account, "")
	}
	return keystore.Reach{}
}

// mayHold decides whether the actor may be handed a key with these rights: one that it makes or the successor of another.
// Whoever holds a key can do what it can, so no key goes to a holder of less.
//
// manage_keys needs no word here: every actor has it, since the others cannot ask.
func (a Actor) mayHold(account string, environment apikey.Environment, scopes apikey.Scopes) error {
	switch {
	case a.rank == nobody:
		return errNoManager
	case a.rank == operator:
		return nil
	case account != a.account:
		return &ForbiddenError{"account", "must be your own"}
	case a.environment == apikey.Sandbox && environment != apikey.Sandbox:
		return &ForbiddenError{"environment", "must be sandbox: a sandbox key manages sandbox keys only"}
	case !a.scopes.Has(scopes):
		return &ForbiddenError{"scopes", "must be among those of the key that asks: it does not have " + (scopes &^ a.scopes).String()}
	}
	return nil
}

// change runs do in one transaction, with the actor's rights as they are in it. A managing key that was revoked a moment ago
// must not make itself a successor at an edge that has not heard of it; its row stays locked, so that it is not revoked
// meanwhile either.
func (a *Admin) change(ctx context.Context, actor Actor, do func(*keystore.Tx, Actor) error) error {
	return a.changeIn(ctx, actor, a.turn, do)
}

// makeKey is change for a new key: those of an account are counted one after another.
func (a *Admin) makeKey(ctx context.Context, actor Actor, do func(*keystore.Tx, Actor) error) error {
	return a.changeIn(ctx, actor, a.turnToMake, do)
}

func (a *Admin) changeIn(
	ctx context.Context, actor Actor, turn func(context.Context, Actor) (end func(), err error), do func(*keystore.Tx, Actor) error,
) error {
	if actor.rank == nobody {
		return errNoManager
	}
	end, err := turn(ctx, actor)
	if err != nil {
		return err
	}
	defer end()
	return a.store.Change(ctx, func(tx *keystore.Tx) error {
		actor := actor
		if actor.rank == key {
			row, err := tx.Lock(ctx, actor.reach(), actor.keyID)
			if errors.Is(err, keystore.ErrNoRow) {
				return errNoManager
			}
			if err != nil {
				return err
			}
			switch status(row) {
			case Revoked:
				return ErrActorRevoked
			case Expired:
				return ErrActorExpired
			case Active:
			}
			if !row.ManageKeys {
				return errNoManager
			}
			actor.scopes = apikey.KnownScopes(row.Scopes)
		}
		return do(tx, actor)
	})
}

package keyadmin

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Selection is a set of keys to be revoked in an incident: those to which all that is set applies. An empty one is refused.
type Selection struct {
	Account       string // that owns them
	CreatedBy     string // an actor, such as "key:key_…": the keys that it made, that a key among these made, and so on
	CreatedAfter  string // RFC 3339: at or after it
	CreatedBefore string // RFC 3339: before it

	// Hashes are the SHA-256 of the keys. Not nil and empty: no key at all.
	Hashes []apikey.Digest
}

// RevokeMany revokes the keys of a selection for good, in one transaction, and returns how many there were; those that are
// revoked already do not count. With dryRun it only counts them. The keys of an account that the actor does not manage are
// none. A selection that is not acceptable is an *InvalidError.
func (a *Admin) RevokeMany(ctx context.Context, actor Actor, selection Selection, dryRun bool) (Revocation, error) {
	selected, err := selection.validate()
	if err != nil {
		return Revocation{}, err
	}
	if actor.rank == nobody {
		return Revocation{}, errNoManager
	}
	if dryRun {
		count, err := a.store.CountSelected(ctx, actor.within(selection.Account), selected)
		return Revocation{Count: count}, err
	}
	var revocation Revocation
	err = a.change(ctx, actor, func(tx *keystore.Tx, actor Actor) (err error) {
		revocation, err = revokeMany(ctx, tx, actor.String(), actor.within(selection.Account), selected, selection.details())
		if err != nil {
			return err
		}
		details := selection.details()
		details["count"] = revocation.Count
		account := selection.Account
		if actor.rank != operator {
			account = actor.account
		}
		return tx.Audit(ctx, keystore.AuditEntry{
			Actor: actor.String(), Action: string(KeysRevoked), Account: account, Environment: actor.only(), Details: details,
		})
	})
	if err != nil {
		return Revocation{}, err
	}
	return revocation, nil
}

func revokeMany(ctx context.Context, tx *keystore.Tx, actor string, reach keystore.Reach, selected keystore.Selection, details map[string]any) (r Revocation, err error) {
	if r.Count, err = tx.RevokeSelected(ctx, reach, selected, actor, details); err != nil {
		return Revocation{}, err
	}
	if r.At, err = tx.Now(ctx); err != nil {
		return Revocation{}, err
	}
	r.At = r.At.UTC()
	if r.xid, err = tx.Xid(ctx); err != nil {
		return Revocation{}, err
	}
	r.server, err = tx.Server(ctx)
	return r, err
}

func (s Selection) validate() (keystore.Selection, error) {
	if s.Account == "" && s.CreatedBy == "" && s.CreatedAfter == "" && s.CreatedBefore == "" && s.Hashes == nil {
		return keystore.Selection{}, &InvalidError{"selection", "must name an account, a creator, a time of creation or hashes"}
	}
	var badAfter, badBefore error
	selected := keystore.Selection{CreatedBy: s.CreatedBy, Digests: s.Hashes}
	selected.CreatedAfter, badAfter = parseTime("created_after", s.CreatedAfter)
	selected.CreatedBefore, badBefore = parseTime("created_before", s.CreatedBefore)
	return selected, cmp.Or(
		given(s.Account, checkAccount(s.Account)),
		given(s.CreatedBy, checkActor("created_by", s.CreatedBy)),
		badAfter, badBefore, checkRange("created_after", selected.CreatedAfter, "created_before", selected.CreatedBefore))
}

// details are what the audit says of a selection.
func (s Selection) details() map[string]any {
	details := map[string]any{}
	for name, value := range map[string]string{
		"account": s.Account, "created_by": s.CreatedBy, "created_after": s.CreatedAfter, "created_before": s.CreatedBefore,
	} {
		if value != "" {
			details[name] = value
		}
	}
	if s.Hashes != nil {
		details["hashes"] = len(s.Hashes)
	}
	return map[string]any{"selection": details}
}

// MaxLeaked is how many keys a report of a leak may have.
const MaxLeaked = 1000

// Leaked revokes the keys that somebody has found: possession is the proof. source says who reported them, in the audit as
// "leak:<source>", an address in that of operators only. What is no key of ours is passed over, and without anything like a key there
// is no line in the audit. The count is for the log alone: told to the reporter, it would tell which keys exist. A report that is not
// acceptable is an *InvalidError, which does not quote it.
func (a *Admin) Leaked(ctx context.Context, source string, keys []string) (Revocation, error) {
	if err := checkText("source", source); err != nil {
		return Revocation{}, err
	}
	if len(keys) == 0 || len(keys) > MaxLeaked {
		return Revocation{}, &InvalidError{"keys", fmt.Sprintf("must have 1 to %d keys", MaxLeaked)}
	}
	selected := keystore.Selection{Digests: []apikey.Digest{}}
	for _, text := range keys {
		for _, key := range apikey.FindKeys(text) {
			selected.Digests = append(selected.Digests, apikey.Hash(key))
		}
	}
	if len(selected.Digests) == 0 { // or anybody could fill the audit, which only grows, with anything
		return Revocation{}, nil
	}
	reporter := "leak:" + source
	told := reporter
	if _, err := netip.ParseAddr(source); err == nil {
		told = "leak:report" // who found the key may have reason to fear its owner, who reads this
	}
	end, err := a.turns.take(ctx, line{kind: leaks})
	if err != nil {
		return Revocation{}, err
	}
	defer end()
	var revocation Revocation
	err = a.store.Change(ctx, func(tx *keystore.Tx) (err error) {
		revocation, err = revokeMany(ctx, tx, told, keystore.Everything(), selected, map[string]any{"reason": "leaked"})
		if err != nil {
			return err
		}
		return tx.Audit(ctx, keystore.AuditEntry{
			Actor: reporter, Action: string(LeakReported), Details: map[string]any{"keys": len(keys), "revoked": revocation.Count},
		})
	})
	if err != nil {
		return Revocation{}, err
	}
	return revocation, nil
}

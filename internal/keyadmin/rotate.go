package keyadmin

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

const (
	defaultOverlap = day

	// maxOverlap is a year: two keys for longer are two keys, not a rotation.
	maxOverlap = 365 * day
)

// Overlap says when the old key of a rotation ends. The zero value is at once. No key lives longer for being rotated.
type Overlap struct {
	For        time.Duration // so long the old key lives on
	OnFirstUse bool          // from the first use of its successor; otherwise from now
}

// ParseOverlap reads an overlap: a duration as ParseDuration reads it, "on-first-use" for a day from the first use,
// "on-first-use:12h", "0" for at once, or nothing for a day from now. It is an *InvalidError if it is none, or more than
// 365 days.
func ParseOverlap(s string) (Overlap, error) {
	const onFirstUse = "on-first-use"
	overlap := Overlap{For: defaultOverlap}
	switch s {
	case "":
		return overlap, nil
	case onFirstUse:
		overlap.OnFirstUse = true
		return overlap, nil
	}
	var err error
	s, overlap.OnFirstUse = strings.CutPrefix(s, onFirstUse+":")
	if overlap.For, err = ParseDuration(s); err != nil {
		return Overlap{}, &InvalidError{"overlap", err.Error() + ", or on-first-use"}
	}
	return overlap, overlap.check()
}

func (o Overlap) check() error {
	if o.For < 0 || o.For > maxOverlap {
		return &InvalidError{"overlap", "must be from 0 to 365d"}
	}
	return nil
}

// String returns the overlap as ParseOverlap reads it.
func (o Overlap) String() string {
	if o.OnFirstUse {
		return "on-first-use:" + FormatDuration(o.For)
	}
	return FormatDuration(o.For)
}

// RotateRequest says how to rotate a key.
type RotateRequest struct {
	Overlap Overlap // how long the old key lives on

	// IdempotencyKey makes a retry harmless, as CreateRequest has it: the actor's same request answers the successor that it made.
	IdempotencyKey string

	// HandOut gets a successor that is made, just before it is in force: where it could not be handed out there is none, and the old
	// key is as it was. Nil: nobody.
	HandOut func(Key) error
}

// Rotate makes the successor of a key: a new key with the same name, account, environment, scopes, manage_keys and limits, and
// with the same time to live as the old one had when it was made, at most ten years. The answer is the successor, with the key
// itself; its Predecessor is the old key, which ends after the overlap. replayed says that the answer is the successor that an
// earlier request with the same idempotency key made, without the key itself. The error wraps ErrNotFound, ErrEnded,
// ErrAlreadyRotated, ErrAwaited or ErrIdempotencyMismatch, is an *InvalidError, or a *ForbiddenError: whoever rotates a key holds
// its successor.
func (a *Admin) Rotate(ctx context.Context, actor Actor, id string, request RotateRequest) (successor Key, replayed bool, err error) {
	if err := checkID(id); err != nil {
		return Key{}, false, err
	}
	if err := request.Overlap.check(); err != nil {
		return Key{}, false, err
	}
	if err := checkIdempotencyKey(request.IdempotencyKey); err != nil {
		return Key{}, false, err
	}
	var handed handedOut
	err = a.makeKey(ctx, actor, func(tx *keystore.Tx, actor Actor) error {
		old, err := tx.Lock(ctx, actor.reach(), id)
		if err != nil {
			return err
		}
		// Before anything is said of the old key: the request that came before has ended it.
		nextID := newID()
		before, err := claim(ctx, tx, actor, old.Account, request.IdempotencyKey, hashRotation(id, request.Overlap), nextID)
		if err != nil {
			return err
		}
		if replayed = before != nil; replayed {
			successor = *before
			return nil
		}
		if successor, err = a.succeed(ctx, tx, actor, old, nextID, request.Overlap); err != nil {
			return err
		}
		return handed.over(successor, request.HandOut)
	})
	if err != nil {
		return Key{}, false, handed.unless(notFound(err, id))
	}
	if replayed {
		a.addLastUse(ctx, actor, &successor)
	}
	return successor, replayed, nil
}

// hashRotation tells requests apart that came with the same idempotency key, also from those to create a key.
func hashRotation(id string, overlap Overlap) [sha256.Size]byte {
	return sha256.Sum256([]byte("rotate " + id + " " + overlap.String()))
}

// succeed makes the successor of a key, and sets the key's end.
func (a *Admin) succeed(ctx context.Context, tx *keystore.Tx, actor Actor, old keystore.Row, id string, overlap Overlap) (Key, error) {
	next, err := successorOf(old, actor, overlap)
	if err != nil {
		return Key{}, err
	}
	// First: one that seems to have expired may be given its expiry back by the transaction that this waits for.
	if err := tx.DetachExpired(ctx, old.ID); err != nil {
		return Key{}, err
	}
	if err := mayBeRotated(ctx, tx, old); err != nil {
		return Key{}, err
	}
	if err := setEnd(ctx, tx, old.ID, overlap); err != nil {
		return Key{}, err
	}
	next.ID = id
	secret := generate(&next)
	row, err := a.insert(ctx, tx, actor, next)
	if err != nil {
		return Key{}, err
	}
	if err := tx.Audit(ctx, entry(actor, KeyRotated, old, map[string]any{"successor": row.ID, "overlap": overlap.String()})); err != nil {
		return Key{}, err
	}
	if err := handDownLimits(ctx, tx, actor, old.ID, row); err != nil {
		return Key{}, err
	}
	successor := fromRow(row)
	successor.Key = Secret(secret)
	return successor, nil
}

// handDownLimits gives a successor the limits of the old key's own: whoever may rotate a key does not say how much it may be used.
func handDownLimits(ctx context.Context, tx *keystore.Tx, actor Actor, oldID string, successor keystore.Row) error {
	limits, err := tx.KeyLimits(ctx, oldID)
	if err != nil || limits.Own == (apikey.Limits{}) {
		return err
	}
	if _, err := tx.LockKeyLimits(ctx, successor.ID); err != nil {
		return err
	}
	return setKeyLimits(ctx, tx, actor, successor, limits.Own)
}

// mayBeRotated refuses a second successor. It also refuses one to a key whose predecessor waits for its first use: that
// might end unused, and its predecessor would live for ever.
func mayBeRotated(ctx context.Context, tx *keystore.Tx, old keystore.Row) error {
	if has, err := tx.HasSuccessor(ctx, old.ID); err != nil {
		return err
	} else if has {
		return fmt.Errorf("%w: %s has the successor %s", ErrAlreadyRotated, old.ID, old.Successor)
	}
	if awaited, err := tx.IsAwaited(ctx, old.ID); err != nil {
		return err
	} else if awaited {
		return fmt.Errorf("%w: use %s first, or undo the rotation of %s", ErrAwaited, old.ID, old.Predecessor)
	}
	return nil
}

// successorOf returns the key that is to replace another, without what is random.
func successorOf(old keystore.Row, actor Actor, overlap Overlap) (keystore.NewKey, error) {
	if s := status(old); s != Active {
		return keystore.NewKey{}, fmt.Errorf("%w: %s is %s", ErrEnded, old.ID, s)
	}
	environment, err := apikey.ParseEnvironment(old.Environment)
	if err != nil {
		return keystore.NewKey{}, err
	}
	next := keystore.NewKey{
		Account: old.Account, Name: old.Name, Environment: environment, Scopes: apikey.KnownScopes(old.Scopes), ManageKeys: old.ManageKeys,
		CreatedBy: actor.String(), Predecessor: old.ID,
	}
	if expiry := ownExpiry(old); expiry != nil {
		next.Lifetime = min(max(expiry.Sub(old.CreatedAt), minLifetime), maxLifetime) // an import may go beyond
	}
	if overlap.OnFirstUse {
		next.OverlapOnFirstUse = &overlap.For
	}
	err = actor.mayHold(next.Account, next.Environment, next.Scopes)
	if forbidden, ok := errors.AsType[*ForbiddenError](err); ok && forbidden.Field == "scopes" { // which who rotates has not written
		err = &ForbiddenError{"", "the key has scopes that yours does not have (" + (next.Scopes &^ actor.scopes).String() + "), " +
			"so you cannot be handed its successor"}
	}
	return next, err
}

// ownExpiry is when a key would end if it were not being rotated; nil: never.
func ownExpiry(row keystore.Row) *time.Time {
	if row.GraceStartedAt != nil {
		return row.PriorExpiresAt
	}
	return row.ExpiresAt
}

// setEnd sets the end of a key that is rotated. An earlier rotation, whose successor was revoked, no longer counts.
func setEnd(ctx context.Context, tx *keystore.Tx, id string, overlap Overlap) error {
	if err := tx.EndGrace(ctx, id); err != nil {
		return err
	}
	if overlap.OnFirstUse {
		return nil
	}
	return tx.StartGrace(ctx, id, overlap.For)
}

// UndoRotation gives a key back the expiry that it had before it was rotated, and revokes its successor, which is then
// nobody's successor. The answers are the old key and that successor, whose own successor, if it has one, lives on. The error
// wraps ErrNotFound, ErrNotRotated, or ErrEnded: a key that has ended is not revived.
func (a *Admin) UndoRotation(ctx context.Context, actor Actor, id string) (old, withdrawn Key, err error) {
	old, err = a.changeOne(ctx, actor, id, func(tx *keystore.Tx, actor Actor) (keystore.Row, error) {
		old, err := tx.Lock(ctx, actor.reach(), id)
		if err != nil {
			return old, err
		}
		// A revoked successor stays one, and where it never set the key's end there is nothing to take back.
		has, err := tx.HasSuccessor(ctx, id)
		if err != nil {
			return old, err
		}
		if !has && old.GraceStartedAt == nil {
			return old, fmt.Errorf("%w: %s", ErrNotRotated, id)
		}
		if s := status(old); s != Active {
			return old, fmt.Errorf("%w: %s is %s, and a key that has ended is not revived", ErrEnded, id, s)
		}
		if err := tx.EndGrace(ctx, id); err != nil {
			return old, err
		}
		row, err := withdraw(ctx, tx, actor, old)
		if err != nil {
			return old, err
		}
		withdrawn = fromRow(row)
		if err := tx.Audit(ctx, entry(actor, KeyRotationUndone, old, map[string]any{"successor": old.Successor})); err != nil {
			return old, err
		}
		return tx.Get(ctx, actor.reach(), id)
	})
	if err != nil {
		return Key{}, Key{}, err
	}
	return old, withdrawn, nil
}

// withdraw revokes the successor of a key and makes it nobody's.
func withdraw(ctx context.Context, tx *keystore.Tx, actor Actor, old keystore.Row) (keystore.Row, error) {
	row, revoked, err := tx.Revoke(ctx, actor.reach(), old.Successor)
	if err != nil {
		return row, err
	}
	if revoked {
		if err := tx.Audit(ctx, entry(actor, KeyRevoked, row, map[string]any{"rotation_undone": old.ID})); err != nil {
			return row, err
		}
	}
	if err := tx.Detach(ctx, row.ID); err != nil {
		return row, err
	}
	return tx.Get(ctx, actor.reach(), row.ID)
}

// RotateDueRequest selects the keys that RotateDue rotates.
type RotateDueRequest struct {
	Account   string  // empty: all that the actor manages
	OlderThan string  // as ParseDuration reads it: since the key was created
	Overlap   Overlap // for each
}

// RotateDue rotates every key that is older than a given age, oldest first, each in a transaction of its own, and returns how
// many. Keys that have ended, have a successor that has not, or whose first use is awaited, are passed over, so it can be run
// again after it was interrupted. handOut gets each successor with the key itself, just before it is in force; its error ends the run and
// leaves that key as it was. With dryRun nothing is written and handOut gets the old keys.
func (a *Admin) RotateDue(ctx context.Context, actor Actor, request RotateDueRequest, dryRun bool, handOut func(Key) error) (count int, err error) {
	age, err := ParseDuration(request.OlderThan)
	if err != nil {
		return 0, &InvalidError{"older_than", err.Error()}
	}
	if request.Account != "" {
		if err := checkAccount(request.Account); err != nil {
			return 0, err
		}
	}
	now, err := a.store.Now(ctx)
	if err != nil {
		return 0, err
	}
	if age > now.Sub(time.Unix(0, 0)) {
		return 0, &InvalidError{"older_than", "must not be before 1970"}
	}
	// The moment is fixed: successors that this run makes must not become due in it.
	for after := (keystore.Position{}); ; {
		due, err := a.store.ListDue(ctx, actor.within(request.Account), now.Add(-age), after, maxPage, dryRun)
		if err != nil || len(due) == 0 {
			return count, err
		}
		for _, row := range due {
			if dryRun {
				err = handOut(fromRow(row))
			} else {
				_, _, err = a.Rotate(ctx, actor, row.ID, RotateRequest{Overlap: request.Overlap, HandOut: handOut})
			}
			if errors.Is(err, ErrEnded) || errors.Is(err, ErrAlreadyRotated) || errors.Is(err, ErrAwaited) {
				continue // meanwhile
			}
			if err != nil {
				return count, fmt.Errorf("rotate %s: %w", row.ID, err)
			}
			count++
		}
		last := due[len(due)-1]
		after = keystore.Position{CreatedAt: last.CreatedAt, ID: last.ID}
	}
}

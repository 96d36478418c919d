// Package keyadmin is the life of a key: created and shown once, listed, renamed, rotated, revoked. Whatever manages keys
// uses it, so that all of it follows the same rules:
//
//   - Every change is one transaction, and its line in the audit is part of it.
//   - An operator manages all keys; a person those of one account; a managing key those of its account, and a managing
//     sandbox key only the sandbox keys among them.
//   - Nobody is handed a key with an account, an environment or a scope beyond their own, neither by making one nor by
//     rotating another's. A managing key may make managing keys: they can do no more than it can.
//   - What is out of an actor's reach does not exist for them: the same statement looks for both.
//   - A key is shown once, to whoever made it, and is stored as its SHA-256 only.
//   - Revoking is for good. Rotating can be undone until the old key has ended.
package keyadmin

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// How long a request to manage keys may take, of whatever serves them.
const (
	// AnswerWithin bounds a request, so that it is answered though Postgres hangs. Management is patient: it may wait for a lock.
	AnswerWithin = 5 * time.Second

	// ReadWithin bounds how long a body may take to come, and so a request as a whole. It is longer, since reading on is what tells
	// that a client has gone away: an answer that Postgres keeps waiting would look unwanted.
	ReadWithin = AnswerWithin + time.Second
)

// What may be found instead of a key to work on.
var (
	// ErrNotFound: there is no such key, or it is not the actor's to see.
	ErrNotFound = errors.New("no such key")

	// ErrAlreadyRevoked: there is nothing left to revoke.
	ErrAlreadyRevoked = errors.New("key is already revoked")

	// ErrEnded: the key is revoked or expired, and can neither be rotated nor have its rotation undone.
	ErrEnded = errors.New("key has ended")

	// ErrAlreadyRotated: the key has a successor that has not ended.
	ErrAlreadyRotated = errors.New("key is being rotated already")

	// ErrAwaited: the key was not used yet, and the one that it replaces lives on until then.
	ErrAwaited = errors.New("key was not used yet, and its predecessor waits for that")

	// ErrNotRotated: there is no rotation to undo.
	ErrNotRotated = errors.New("key is not being rotated")

	// ErrIdempotencyMismatch: the idempotency key came with another request before.
	ErrIdempotencyMismatch = errors.New("idempotency key was used with another request: use a new one for each key")

	// ErrCrowded: other requests of the actor, or of its account, left this one no time.
	ErrCrowded = errors.New("actor or its account has too many requests in flight")
)

// TooManyError says that the account has made as many keys as it may in 24 hours, or renamed keys as often.
type TooManyError struct {
	Done       Action        // KeyCreated or KeyRenamed
	RetryAfter time.Duration // when it may do so again
}

func (e *TooManyError) Error() string {
	if e.Done == KeyRenamed {
		return "account has renamed keys as often as it may in 24 hours"
	}
	return "account has made as many keys as it may in 24 hours"
}

// Admin manages the keys in a store.
type Admin struct {
	store      *keystore.Store
	turns      *turns
	keysPerDay int // of an account, by others than operators; 0: any number
}

// New returns an Admin. The store remains the caller's, to be closed.
func New(store *keystore.Store) *Admin {
	return &Admin{store: store, turns: &turns{of: map[line]*queue{}}}
}

// Limited returns an Admin with which an account makes no more than so many keys in 24 hours, successors included, and renames keys no
// more often, unless an operator does. A key is never deleted, every edge has it in its filter, and each that may manage keys can make
// more of them; nor is the line in the audit that each new name adds. Without a bound, one customer could fill the database of all.
func (a *Admin) Limited(keysPerDay int) *Admin { return &Admin{a.store, a.turns, keysPerDay} }

// CreateRequest says what key to create.
type CreateRequest struct {
	Name        string   // for people: 1 to 200 characters
	Account     string   // that owns the key: 1 to 200 characters; empty: the actor's
	Environment string   // production or sandbox; empty: that of the key that asks
	Scopes      []string // at least one
	ManageKeys  bool     // whether the key may manage the keys of its account
	ExpiresIn   string   // as ParseDuration reads it, at most 3650d; empty: never
	ExpiresAt   string   // RFC 3339, in the future and within 3650 days; excludes ExpiresIn

	// IdempotencyKey makes a retry harmless: for 24 hours the actor's same request answers the key that it made, without
	// the key itself. 1 to 255 printable ASCII characters; empty: every request makes a key.
	IdempotencyKey string

	// HandOut gets a key that is made, just before it is in force: a key that could not be handed out is none. Nil: nobody.
	HandOut func(Key) error `json:"-"`
}

// Create makes a key. Only the answer holds the key itself; Postgres gets its SHA-256. replayed says that the answer is the
// key that an earlier request with the same idempotency key made, without the key itself. A request that is not acceptable
// is an *InvalidError, one that asks for too much a *ForbiddenError; the error may also wrap ErrIdempotencyMismatch. With an
// error nothing is written.
func (a *Admin) Create(ctx context.Context, actor Actor, request CreateRequest) (created Key, replayed bool, err error) {
	request = actor.complete(request)
	key, err := request.validate()
	if err != nil {
		return Key{}, false, err
	}
	secret := generate(&key)
	key.ID, key.CreatedBy = newID(), actor.String()
	var handed handedOut
	err = a.makeKey(ctx, actor, func(tx *keystore.Tx, actor Actor) error {
		if err := actor.mayHold(key.Account, key.Environment, key.Scopes); err != nil {
			return err
		}
		before, err := claim(ctx, tx, actor, key.Account, request.IdempotencyKey, request.hash(), key.ID)
		if err != nil {
			return err
		}
		if replayed = before != nil; replayed {
			created = *before
			return nil
		}
		if err := checkFuture(ctx, tx, key.ExpiresAt); err != nil {
			return err
		}
		row, err := a.insert(ctx, tx, actor, key)
		if err != nil {
			return err
		}
		created = fromRow(row)
		created.Key = Secret(secret)
		return handed.over(created, request.HandOut)
	})
	if err != nil {
		return Key{}, false, handed.unless(err)
	}
	if replayed {
		a.addLastUse(ctx, actor, &created)
	}
	return created, replayed, nil
}

// handedOut is the id of a key that somebody was given in a transaction; empty: of none.
type handedOut string

// over hands a new key out, as the last step before it is in force.
func (h *handedOut) over(key Key, handOut func(Key) error) error {
	if handOut == nil {
		return nil
	}
	if err := handOut(key); err != nil {
		return err
	}
	*h = handedOut(key.ID)
	return nil
}

// unless adds to the error of a transaction what a key that it has handed out is worth.
func (h handedOut) unless(err error) error {
	if h == "" {
		return err
	}
	return fmt.Errorf(`%s was shown, but it is not in force unless "keys show" finds it: %w`, h, err)
}

// generate gives a key its digest and hint, and returns the key itself.
func generate(key *keystore.NewKey) string {
	secret := apikey.Generate(key.Environment)
	key.Digest, key.Hint = apikey.Hash(secret), apikey.Hint(secret)
	return secret
}

// insert writes a new key and its line in the audit.
func (a *Admin) insert(ctx context.Context, tx *keystore.Tx, actor Actor, key keystore.NewKey) (keystore.Row, error) {
	if err := a.checkQuota(ctx, actor, KeyCreated, key.Account, tx.FullFor); err != nil {
		return keystore.Row{}, err
	}
	row, err := tx.Insert(ctx, key)
	if err != nil {
		return row, err
	}
	details := map[string]any{"name": row.Name, "scopes": row.Scopes, "manage_keys": row.ManageKeys, "expires_at": utc(row.ExpiresAt)}
	if row.Predecessor != "" {
		details["predecessor"] = row.Predecessor
	}
	return row, tx.Audit(ctx, entry(actor, KeyCreated, row, details))
}

// checkQuota refuses an action of which the account has had as many in 24 hours as it may; wait counts them.
func (a *Admin) checkQuota(
	ctx context.Context, actor Actor, done Action, account string, wait func(context.Context, string, int) (time.Duration, error),
) error {
	if a.keysPerDay <= 0 || actor.rank == operator {
		return nil
	}
	retryAfter, err := wait(ctx, account, a.keysPerDay)
	if err != nil {
		return err
	}
	if retryAfter > 0 {
		return &TooManyError{done, retryAfter}
	}
	return nil
}

// claim notes which key a request makes, if it has an idempotency key. If the same request came before, claim returns the key
// that it made then, without the key itself.
func claim(ctx context.Context, tx *keystore.Tx, actor Actor, account, idempotencyKey string, request [sha256.Size]byte, id string) (*Key, error) {
	if idempotencyKey == "" {
		return nil, nil
	}
	first, err := tx.ClaimIdempotencyKey(ctx, account, actor.String(), idempotencyKey, request, id)
	if err != nil || first == nil {
		return nil, err
	}
	if string(first.Hash) != string(request[:]) {
		return nil, ErrIdempotencyMismatch
	}
	row, err := tx.Get(ctx, actor.reach(), first.KeyID)
	if err != nil {
		return nil, err
	}
	made := fromRow(row)
	return &made, nil
}

// complete fills in what the actor need not say.
func (a Actor) complete(request CreateRequest) CreateRequest {
	if request.Account == "" {
		request.Account = a.account
	}
	if request.Environment == "" && a.rank == key {
		request.Environment = a.environment.String()
	}
	return request
}

// hash tells requests apart that came with the same idempotency key.
func (r CreateRequest) hash() [sha256.Size]byte {
	r.IdempotencyKey = ""
	scopes, _ := apikey.ParseScopes(r.Scopes) // which validate has checked
	r.Scopes = scopes.Names()
	text, _ := json.Marshal(r) // which texts and a truth value cannot fail
	return sha256.Sum256(text)
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

// notFound is what the caller is told where a statement found no row.
func notFound(err error, id string) error {
	if errors.Is(err, keystore.ErrNoRow) {
		return fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	return err
}

// Get returns a key. The error wraps ErrNotFound if there is none with that id.
func (a *Admin) Get(ctx context.Context, actor Actor, id string) (Key, error) {
	return a.get(ctx, actor, id, a.turnToRead, a.store.GetUsed)
}

// Look is Get for whoever may want to revoke the key: where the last use cannot be read soon, it returns the key without.
func (a *Admin) Look(ctx context.Context, actor Actor, id string) (Key, error) {
	key, err := a.get(ctx, actor, id, a.turn, a.store.Get)
	if err == nil {
		a.addLastUse(ctx, actor, &key)
	}
	return key, err
}

func (a *Admin) get(
	ctx context.Context, actor Actor, id string, turn func(context.Context, Actor) (func(), error),
	read func(context.Context, keystore.Reach, string) (keystore.Row, error),
) (Key, error) {
	if err := checkID(id); err != nil {
		return Key{}, err
	}
	end, err := turn(ctx, actor)
	if err != nil {
		return Key{}, err
	}
	defer end()
	row, err := read(ctx, actor.reach(), id)
	if err != nil {
		return Key{}, notFound(err, id)
	}
	return fromRow(row), nil
}

// lastUseWithin bounds how long the last use is waited for where it may be left out.
const lastUseWithin = time.Second

// addLastUse adds to a key that was read without it when it was used last. Whoever has taken an edge over can lock the tables that this
// is in, so it is never part of a transaction that changes a key.
func (a *Admin) addLastUse(ctx context.Context, actor Actor, key *Key) {
	ctx, cancel := context.WithTimeout(ctx, lastUseWithin)
	defer cancel()
	key.LastUseUnknown = true
	end, err := a.turnToRead(ctx, actor)
	if err != nil {
		return
	}
	defer end()
	used, err := a.store.LastUsed(ctx, []string{key.ID})
	if err != nil {
		return
	}
	key.LastUseUnknown = false
	if at, ok := used[key.ID]; ok {
		key.LastUsedAt = utc(&at.LastUsedAt)
	}
}

// Rename gives a key another name. The error wraps ErrNotFound, or is an *InvalidError or a *TooManyError.
func (a *Admin) Rename(ctx context.Context, actor Actor, id, name string) (Key, error) {
	if err := checkName("name", name); err != nil {
		return Key{}, err
	}
	return a.changeOne(ctx, actor, id, func(tx *keystore.Tx, actor Actor) (keystore.Row, error) {
		row, before, err := tx.Rename(ctx, actor.reach(), id, name)
		if err != nil || before == name {
			return row, err
		}
		if err := a.checkQuota(ctx, actor, KeyRenamed, row.Account, tx.RenamedFor); err != nil {
			return row, err
		}
		return row, tx.Audit(ctx, entry(actor, KeyRenamed, row, map[string]any{"from": before, "to": name}))
	})
}

// Revoke revokes a key for good; the key that asks is no exception. The error wraps ErrNotFound or ErrAlreadyRevoked where
// nothing was changed; with the latter comes the key as it is.
func (a *Admin) Revoke(ctx context.Context, actor Actor, id string) (Key, error) {
	revoked := false
	key, err := a.changeOne(ctx, actor, id, func(tx *keystore.Tx, actor Actor) (row keystore.Row, err error) {
		row, revoked, err = tx.Revoke(ctx, actor.reach(), id)
		if err != nil || !revoked {
			return row, err
		}
		return row, tx.Audit(ctx, entry(actor, KeyRevoked, row, nil))
	})
	if err == nil && !revoked {
		err = fmt.Errorf("%w: %s, since %s", ErrAlreadyRevoked, id, key.RevokedAt.Format(time.RFC3339))
	}
	return key, err
}

// changeOne is change for one key, which it returns as it is afterwards, as Look does.
func (a *Admin) changeOne(ctx context.Context, actor Actor, id string, do func(*keystore.Tx, Actor) (keystore.Row, error)) (Key, error) {
	if err := checkID(id); err != nil {
		return Key{}, err
	}
	var row keystore.Row
	err := a.change(ctx, actor, func(tx *keystore.Tx, actor Actor) (err error) {
		row, err = do(tx, actor)
		return err
	})
	if err != nil {
		return Key{}, notFound(err, id)
	}
	key := fromRow(row)
	a.addLastUse(ctx, actor, &key)
	return key, nil
}

package keyadmin

import (
	"context"
	"errors"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Ready returns why keys cannot be managed in the store, as far as it shows without managing any: the statement that revokes keys
// takes most of the rights, and finds none here.
func (a *Admin) Ready(ctx context.Context) error {
	return a.store.Change(ctx, func(tx *keystore.Tx) error {
		_, err := tx.RevokeSelected(ctx, keystore.Everything(), keystore.Selection{Digests: []apikey.Digest{}}, "", nil)
		return err
	})
}

// Manager returns the actor "key:<id>" with the rights that the account's key has in Postgres now: whoever signed in with a key asks
// as long as it is active only. It is a *ForbiddenError if the key has ended or may not manage keys.
func (a *Admin) Manager(ctx context.Context, id, account string) (Actor, error) {
	end, err := a.turn(ctx, Actor{name: "key:" + id, account: account, rank: key})
	if err != nil {
		return Actor{}, err
	}
	defer end()
	row, err := a.store.Get(ctx, keystore.Everything(), id)
	if errors.Is(err, keystore.ErrNoRow) {
		return Actor{}, errNoManager
	}
	if err != nil {
		return Actor{}, err
	}
	environment, err := apikey.ParseEnvironment(row.Environment)
	if err != nil || status(row) != Active {
		return Actor{}, errNoManager
	}
	return ManagingKey(&apikey.Record{
		ID: row.ID, Account: row.Account, Environment: environment, Scopes: apikey.KnownScopes(row.Scopes), ManageKeys: row.ManageKeys,
	})
}

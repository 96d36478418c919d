package keyadmin

import (
	"context"
	"errors"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Manager returns the actor "key:<id>" with the rights that the key has in Postgres now: whoever signed in with a key asks
// as long as it is active only. It is a *ForbiddenError if the key has ended or may not manage keys.
func (a *Admin) Manager(ctx context.Context, id string) (Actor, error) {
	row, err := a.store.Get(ctx, keystore.Everything(), id)
	if errors.Is(err, keystore.ErrNoRow) {
		return Actor{}, errNoManager
	}
	if err != nil {
		return Actor{}, err
	}
	environment, err := apikey.ParseEnvironment(row.Environment)
	if err != nil || !row.ManageKeys || status(row) != Active {
		return Actor{}, errNoManager
	}
	return Actor{
		rank: key, name: "key:" + row.ID, account: row.Account, keyID: row.ID, environment: environment, scopes: apikey.KnownScopes(row.Scopes),
	}, nil
}

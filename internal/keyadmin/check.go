package keyadmin

import (
	"context"
	"errors"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Checked is what can be said of a key that somebody holds. It does not contain it.
type Checked struct {
	WellFormed    bool   `json:"well_formed"`    // it has the shape of a key
	Environment   string `json:"environment"`    // that its prefix names; empty: not well-formed
	ChecksumValid bool   `json:"checksum_valid"` // false: mistyped, or made before keys had a checksum
	Key           *Key   `json:"found"`          // the key as it is stored; null: there is none, or it is not the actor's to see
}

// Check says what a key is. It is never stored, logged or part of an error.
func (a *Admin) Check(ctx context.Context, actor Actor, key string) (Checked, error) {
	environment, err := apikey.Parse(key)
	if err != nil {
		return Checked{}, nil // it cannot be a key, which is an answer
	}
	checked := Checked{WellFormed: true, Environment: environment.String(), ChecksumValid: apikey.ChecksumValid(key)}
	row, err := a.store.Find(ctx, actor.reach(), apikey.Hash(key))
	if errors.Is(err, keystore.ErrNoRow) {
		return checked, nil
	}
	if err != nil {
		return Checked{}, err
	}
	checked.Key = new(fromRow(row))
	return checked, nil
}

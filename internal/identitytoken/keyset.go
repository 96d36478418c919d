package identitytoken

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// JWKSMaxAge is how long a key set may be kept before it is asked for again: the max-age of its Cache-Control.
const JWKSMaxAge = time.Minute

// errNoKeySet says that the key set has never been read. It is no empty set: a backend would believe that one.
var errNoKeySet = errors.New("the key set has not been read yet")

const (
	// readGap is the least time between two reads, which bounds what a flood of requests costs Postgres.
	readGap = 100 * time.Millisecond

	// readTimeout bounds a read, after which the last key set is good enough.
	readTimeout = 500 * time.Millisecond
)

// keySet is what Postgres says about the public keys of all edges.
//
// Each answer rests on a read that began after it was asked for. A backend asks because it met a token of a key that it does
// not know; that key was published before, so the answer has it, at whichever edge the backend asks. A set that is read
// only now and then would lack the key of an edge that has just started, and libraries do not ask again at once.
type keySet struct {
	store    Store
	turn     chan struct{} // held by the one who reads, and guards the rest; a mutex would not follow a context
	readAt   time.Time     // start of the last read, or of the attempt
	document []byte        // nil: never read
	err      error         // of the last attempt
}

// JWKS returns the public keys of all edges as a JSON Web Key Set (RFC 7517). When Postgres does not answer, it is the last
// one that was read, or an error if none was.
func (s *Signer) JWKS(ctx context.Context) ([]byte, error) {
	ks, asked := &s.keySet, time.Now()
	select {
	case ks.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("read key set: %w", ctx.Err())
	}
	defer func() { <-ks.turn }()
	if !ks.readAt.After(asked) { // else somebody read while this request waited
		ks.err = ks.read(ctx)
	}
	if ks.document == nil {
		return nil, fmt.Errorf("%w: %w", errNoKeySet, ks.err)
	}
	return ks.document, nil
}

// refresh reads the key set, so that there is one when Postgres is away.
func (ks *keySet) refresh(ctx context.Context) error {
	select {
	case ks.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-ks.turn }()
	ks.err = ks.read(ctx)
	return ks.err
}

// read is not cut short when the client goes: others wait for what it brings.
func (ks *keySet) read(ctx context.Context) error {
	if wait := readGap - time.Since(ks.readAt); wait > 0 {
		<-time.After(wait)
	}
	ks.readAt = time.Now()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readTimeout)
	defer cancel()
	keys, err := ks.store.SigningKeys(ctx)
	if err != nil {
		return err
	}
	set := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, len(keys))}
	for i := range keys {
		set.Keys[i] = jose.JSONWebKey{
			Key: ed25519.PublicKey(keys[i].PublicKey[:]), KeyID: keys[i].ID, Algorithm: string(jose.EdDSA), Use: "sig",
		}
	}
	document, err := json.Marshal(set)
	if err != nil {
		return fmt.Errorf("encode key set: %w", err)
	}
	ks.document = document
	return nil
}

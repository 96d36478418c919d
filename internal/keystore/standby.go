package keystore

import (
	"context"
	"errors"
	"fmt"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// errPrimaryInRecovery keeps a key from being called unknown because a server lags that stands where the primary stood.
var errPrimaryInRecovery = errors.New("database is a standby, which may be blind to new keys: name the primary")

// Standby reads from a hot standby, and asks the primary only about keys that the standby does not know: they may have been
// created a moment ago, and absence must be proved.
type Standby struct {
	*Store
	primary *Store
}

// NewStandby returns a Standby. Both stores remain the caller's, to be closed.
func NewStandby(standby, primary *Store) *Standby { return &Standby{standby, primary} }

// Lookup reads the rows of the keys with these digests. The server of the answer is the standby.
func (s *Standby) Lookup(ctx context.Context, digests []apikey.Digest) (Found, error) {
	found, err := s.Store.Lookup(ctx, digests)
	if err != nil || len(found.Records) == len(digests) {
		return found, err
	}
	known := make(map[apikey.Digest]bool, len(found.Records))
	for _, r := range found.Records {
		known[r.Digest] = true
	}
	var unknown []apikey.Digest
	for _, d := range digests {
		if !known[d] {
			unknown = append(unknown, d)
		}
	}
	newer, err := s.primary.Lookup(ctx, unknown)
	if err != nil {
		return Found{}, err
	}
	if newer.Server.InRecovery {
		return Found{}, fmt.Errorf("look up keys: %w", errPrimaryInRecovery)
	}
	found.Records = append(found.Records, newer.Records...)
	return found, nil
}

package keystore

import "context"

// CanaryAccount owns the keys that are made to be revoked. No user may have it.
const CanaryAccount = "rekall:canary"

// CreateCanary makes a key that nobody holds, unless another edge made one within the last 50 seconds. It removes canaries that
// were revoked more than an hour ago, and revokes those that an edge has left alive for ten minutes. One of the future, from before
// Postgres's clock was set back, counts as an old one. It returns "" if it made none. It needs no right to write keys.
func (s *Store) CreateCanary(ctx context.Context) (id string, err error) {
	if err := s.scanAlone(ctx, []any{&id}, `select coalesce(rekall.create_canary(), '')`); err != nil {
		return "", failedAtEdge("create canary", err)
	}
	return id, nil
}

// RevokeCanary revokes a canary, and leaves every other key alone.
func (s *Store) RevokeCanary(ctx context.Context, id string) error {
	return s.execAtEdge(ctx, "revoke canary", `select rekall.revoke_canary($1)`, id)
}

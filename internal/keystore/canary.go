package keystore

import (
	"context"
	"crypto/rand"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// CanaryAccount owns the keys that are made to be revoked. No user may have it.
const CanaryAccount = "rekall:canary"

// CreateCanary makes a key that nobody holds, unless another edge made one within the last 50 seconds, and removes canaries
// that were revoked more than an hour ago. It returns "" if it made none.
func (s *Store) CreateCanary(ctx context.Context) (id string, err error) {
	var digest apikey.Digest
	rand.Read(digest[:])
	rows, err := s.pool.Query(ctx, `
with old as (delete from rekall.api_keys where account = $2 and revoked_at < now() - interval '1 hour')
insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
select $1, $2, 'Canary', 'sandbox', $3, '{}'
where not exists (select from rekall.api_keys where account = $2 and created_at > now() - interval '50 seconds')
returning id`, "key_"+apikey.RandomText(22), CanaryAccount, digest[:])
	if err != nil {
		return "", failed("create canary", err)
	}
	defer rows.Close()
	if rows.Next() {
		if err := rows.Scan(&id); err != nil {
			return "", failed("create canary", err)
		}
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return "", failed("create canary", err)
	}
	return id, nil
}

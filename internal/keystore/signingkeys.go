package keystore

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// SigningKey is the public half of an edge's key for identity tokens.
type SigningKey struct {
	ID        string // RFC 7638 thumbprint
	PublicKey [32]byte
}

// maxSigningKeys bounds what is read, encoded and sent to anybody who asks for the key set. An edge has two.
const maxSigningKeys = 10_000

// ErrTooManySigningKeys says that there are more of them than are read.
var ErrTooManySigningKeys = errors.New("table rekall.signing_keys has more than 10000 rows, which can hardly be of edges: lock the database " +
	"user out that has written them, and remove them (see \"After a break-in at an edge\" in SECURITY.md)")

var errBadSigningKey = errors.New("stored public key does not have 32 bytes")

// PublishSigningKeys writes the public keys of an edge, or renews them, so that SigningKeys returns them for the time of
// lease from now. It removes keys that nobody renewed.
func (s *Store) PublishSigningKeys(ctx context.Context, instance string, keys []SigningKey, lease time.Duration) error {
	ids, publicKeys := make([]string, len(keys)), make([][]byte, len(keys))
	for i := range keys {
		ids[i], publicKeys[i] = keys[i].ID, keys[i].PublicKey[:]
	}
	err := s.execAtEdge(ctx, "publish signing keys", `
insert into rekall.signing_keys (id, public_key, instance, expires_at)
select id, public_key, $1, now() + $4::interval from unnest($2::text[], $3::bytea[]) as k (id, public_key)
on conflict (id) do update set expires_at = excluded.expires_at`, instance, ids, publicKeys, lease)
	if err != nil {
		return err
	}
	_ = s.execAtEdge(ctx, "forget signing keys", `select rekall.forget_signing_keys()`) // else another edge does
	return nil
}

// SigningKeys returns the published keys of all edges, oldest first.
func (s *Store) SigningKeys(ctx context.Context) ([]SigningKey, error) {
	rows, _ := s.pool.Query(ctx, `
select id, public_key from (
	select id, public_key, created_at from rekall.signing_keys where expires_at > now() limit $1
) first order by created_at, id`, maxSigningKeys+1) // CollectRows returns its error
	keys, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (SigningKey, error) {
		var key SigningKey
		var public []byte
		if err := row.Scan(&key.ID, &public); err != nil {
			return key, err
		}
		if copy(key.PublicKey[:], public) != len(public) || len(public) != len(key.PublicKey) {
			return key, errBadSigningKey
		}
		return key, nil
	})
	if err == nil && len(keys) > maxSigningKeys {
		err = ErrTooManySigningKeys
	}
	if err != nil {
		return nil, failedAtEdge("read signing keys", err)
	}
	return keys, nil
}

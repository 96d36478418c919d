package keystore

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// ClaimIdempotencyKey notes that a request makes the key keyID, or returns the hash and the key of the request that made one
// with the same idempotency key within the last 24 hours. Of two requests at once, the second waits for the first to commit.
func (t *Tx) ClaimIdempotencyKey(ctx context.Context, account, actor, idempotencyKey string, hash [32]byte, keyID string) (first *FirstRequest, err error) {
	tag, err := t.tx.Exec(ctx, `
insert into rekall.idempotency_keys as i (account, actor, idempotency_key, request_hash, key_id) values ($1, $2, $3, $4, $5)
on conflict (account, actor, idempotency_key) do update
	set request_hash = excluded.request_hash, key_id = excluded.key_id, created_at = now()
	where i.created_at < now() - interval '24 hours'`, account, actor, idempotencyKey, hash[:], keyID)
	if err != nil {
		return nil, failed("claim idempotency key", err)
	}
	if tag.RowsAffected() == 1 {
		return nil, t.forgetIdempotencyKeys(ctx)
	}
	rows, _ := t.tx.Query(ctx, `
select request_hash, key_id from rekall.idempotency_keys where account = $1 and actor = $2 and idempotency_key = $3`,
		account, actor, idempotencyKey) // CollectExactlyOneRow returns its error
	first, err = pgx.CollectExactlyOneRow(rows, pgx.RowToAddrOfStructByPos[FirstRequest])
	if err != nil {
		return nil, failed("claim idempotency key", err)
	}
	return first, nil
}

// FirstRequest is what came before with the same idempotency key.
type FirstRequest struct {
	Hash  []byte
	KeyID string
}

// forgetIdempotencyKeys removes some that are old. It skips those that another transaction is removing.
func (t *Tx) forgetIdempotencyKeys(ctx context.Context) error {
	return t.exec(ctx, "forget idempotency keys", `
delete from rekall.idempotency_keys where (account, actor, idempotency_key) in (
	select account, actor, idempotency_key from rekall.idempotency_keys
	where created_at < now() - interval '24 hours' order by created_at limit 100 for update skip locked)`)
}

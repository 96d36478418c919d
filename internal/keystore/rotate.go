package keystore

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// StartGrace sets a key to end after overlap, or when it would have ended anyway, and keeps the expiry that it had.
func (t *Tx) StartGrace(ctx context.Context, id string, overlap time.Duration) error {
	return t.exec(ctx, "start grace period", `
update rekall.api_keys k set prior_expires_at = k.expires_at, expires_at = least(k.expires_at, now() + $2::interval), grace_started_at = now()
where k.id = $1`, id, overlap)
}

// EndGrace gives a key back the expiry that it had before StartGrace. Without a grace period it changes nothing.
func (t *Tx) EndGrace(ctx context.Context, id string) error {
	return t.exec(ctx, "undo grace period", `
update rekall.api_keys k set expires_at = k.prior_expires_at, prior_expires_at = null, grace_started_at = null
where k.id = $1 and k.grace_started_at is not null`, id)
}

// Detach makes a key nobody's successor.
func (t *Tx) Detach(ctx context.Context, id string) error {
	return t.exec(ctx, "detach successor", `
update rekall.api_keys k set predecessor = null, overlap_on_first_use = null where k.id = $1`, id)
}

// DetachExpired makes the successors of a key that have expired nobody's.
func (t *Tx) DetachExpired(ctx context.Context, predecessor string) error {
	return t.exec(ctx, "detach expired successor", `
update rekall.api_keys k set predecessor = null, overlap_on_first_use = null
where k.predecessor = $1 and k.revoked_at is null and k.expires_at <= now()`, predecessor)
}

// What may keep a key k from being rotated.
const (
	hasSuccessor = `exists (select from rekall.api_keys s
	where s.predecessor = k.id and s.revoked_at is null and (s.expires_at is null or s.expires_at > now()))`

	isAwaited = `k.overlap_on_first_use is not null and exists (select from rekall.api_keys p
	where p.id = k.predecessor and p.revoked_at is null and (p.expires_at is null or p.expires_at > now()))`
)

// HasSuccessor reports whether a key has a successor that has not ended.
func (t *Tx) HasSuccessor(ctx context.Context, id string) (bool, error) {
	return t.holds(ctx, "find successor", hasSuccessor, id)
}

// IsAwaited reports whether a key has a predecessor that has not ended and waits for the key's first use.
func (t *Tx) IsAwaited(ctx context.Context, id string) (bool, error) {
	return t.holds(ctx, "find predecessor", isAwaited, id)
}

func (t *Tx) holds(ctx context.Context, doing, condition, id string) (holds bool, err error) {
	if err := t.tx.QueryRow(ctx, `select `+condition+` from rekall.api_keys k where k.id = $1`, id).Scan(&holds); err != nil {
		return false, failed(doing, err)
	}
	return holds, nil
}

// ListDue returns up to limit keys that follow a position, oldest first: those that were created before a moment, have not
// ended, have no successor that has not ended, and whose first use no predecessor awaits. They come with their last use if that is
// wanted.
func (s *Store) ListDue(ctx context.Context, reach Reach, createdBefore time.Time, after Position, limit int, withUse bool) ([]Row, error) {
	q := new(conditions)
	q.reach(reach)
	q.add("k.created_at < ?", createdBefore)
	q.add("(k.created_at, k.id) > (?, ?)", after.CreatedAt, after.ID)
	q.add("k.revoked_at is null and (k.expires_at is null or k.expires_at > now())")
	q.add("not (" + hasSuccessor + ") and not (" + isAwaited + ")")
	q.args = append(q.args, limit)
	rows, _ := s.pool.Query(ctx, `select `+rowColumnsWith(withUse)+` from rekall.api_keys k where `+q.where()+`
order by k.created_at, k.id limit `+placeholder(len(q.args)), q.args...) // CollectRows returns its error
	due, err := pgx.CollectRows(rows, scanRow)
	if err != nil {
		return nil, failed("list keys that are due", err)
	}
	return due, nil
}

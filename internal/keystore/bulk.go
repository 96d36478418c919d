package keystore

import (
	"context"
	"encoding/json"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// Selection is a set of keys within a reach: those to which all that is set applies.
type Selection struct {
	CreatedBy     string          // an actor who made them, or a key that made them, and so on; empty: any
	CreatedAfter  *time.Time      // at or after it; nil: no bound
	CreatedBefore *time.Time      // before it; nil: no bound
	Digests       []apikey.Digest // nil: any
}

func (s Selection) conditions(reach Reach) *conditions {
	q := new(conditions)
	q.reach(reach)
	q.add("k.revoked_at is null")
	if s.CreatedBy != "" {
		q.add(`k.created_by in (
			with recursive maker (actor) as (
				select ? union select 'key:' || m.id from maker join rekall.api_keys m on m.created_by = maker.actor and m.manage_keys)
			select actor from maker)`, s.CreatedBy)
	}
	if s.CreatedAfter != nil {
		q.add("k.created_at >= ?", *s.CreatedAfter)
	}
	if s.CreatedBefore != nil {
		q.add("k.created_at < ?", *s.CreatedBefore)
	}
	if s.Digests != nil {
		hashes := make([][]byte, len(s.Digests))
		for i := range s.Digests {
			hashes[i] = s.Digests[i][:]
		}
		q.add("k.key_hash in (select unnest(?::bytea[]))", hashes)
	}
	return q
}

// CountSelected returns how many keys of a selection are not revoked.
func (s *Store) CountSelected(ctx context.Context, reach Reach, selection Selection) (count int64, err error) {
	q := selection.conditions(reach)
	if err := s.pool.QueryRow(ctx, `select count(*) from rekall.api_keys k where `+q.where(), q.args...).Scan(&count); err != nil {
		return 0, failed("count selected keys", err)
	}
	return count, nil
}

// RevokeSelected revokes the keys of a selection, with a line in the audit for each, and returns how many there were. It locks
// them in the order in which first uses do.
//
// A key that another transaction was just making is not in the statement's snapshot, but its maker may have been waiting
// for a row that this one has now changed. So it looks again until it finds none.
func (t *Tx) RevokeSelected(ctx context.Context, reach Reach, selection Selection, actor string, details map[string]any) (count int64, err error) {
	text, err := json.Marshal(details)
	if err != nil {
		return 0, failed("revoke selected keys", err)
	}
	q := selection.conditions(reach)
	n := len(q.args)
	sql := `
with selected as materialized (
	select k.id from rekall.api_keys k where ` + q.where() + ` order by k.id collate "C" for no key update
),
gone as (
	update rekall.api_keys k set revoked_at = now() from selected s where k.id = s.id returning k.id, k.account, k.environment
)
insert into rekall.audit (actor, action, key_id, account, environment, details)
select ` + placeholder(n+1) + `, 'key.revoked', id, account, environment, ` + placeholder(n+2) + `::jsonb from gone`
	args := append(q.args, actor, string(text))
	for {
		tag, err := t.tx.Exec(ctx, sql, args...)
		if err != nil {
			return 0, failed("revoke selected keys", err)
		}
		if tag.RowsAffected() == 0 {
			return count, nil
		}
		count += tag.RowsAffected()
	}
}

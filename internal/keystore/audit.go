package keystore

import (
	"context"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
)

// AuditEntry is a line of the audit.
type AuditEntry struct {
	ID          int64
	At          time.Time
	Actor       string
	Action      string
	KeyID       string // empty, like the next two: it was not about one
	Account     string
	Environment string
	Details     map[string]any // never key material
}

// Audit appends to the audit. ID and At are the database's.
func (t *Tx) Audit(ctx context.Context, entry AuditEntry) error {
	details := entry.Details
	if details == nil {
		details = map[string]any{}
	}
	text, err := json.Marshal(details)
	if err != nil {
		return failed("write audit", err)
	}
	return t.exec(ctx, "write audit", `
insert into rekall.audit (actor, action, key_id, account, environment, details)
values ($1, $2, nullif($3, ''), nullif($4, ''), nullif($5, ''), $6::jsonb)`,
		entry.Actor, entry.Action, entry.KeyID, entry.Account, entry.Environment, string(text))
}

// RenamedFor is FullFor for renaming keys, whose lines in the audit are never deleted. It looks at the account's newest lines only, ten times
// limit. Nobody waits for others: those who rename at the same moment may go beyond limit together, once in 24 hours.
func (t *Tx) RenamedFor(ctx context.Context, account string, limit int) (time.Duration, error) {
	return t.waitOf(ctx, "count new names", `
select at + interval '24 hours' - statement_timestamp() from (
	select id, at, actor, action from rekall.audit where account = $1 order by id desc limit 10 * $2::bigint
) newest where action = 'key.renamed' and split_part(actor, ':', 1) in ('key', 'user')
	and at > statement_timestamp() - interval '24 hours' and at <= statement_timestamp()
order by id desc offset $2::bigint - 1 limit 1`, account, limit)
}

// AuditFilter selects entries of the audit. The zero value selects all.
type AuditFilter struct {
	KeyID, Actor, Action string     // empty: any
	Since, Until         *time.Time // nil: no bound; Until is outside
	Before               int64      // entries with a smaller ID only; 0: from the newest
}

// ListAudit returns up to limit entries, newest first.
func (s *Store) ListAudit(ctx context.Context, reach Reach, filter AuditFilter, limit int) ([]AuditEntry, error) {
	q := new(conditions)
	q.add("true")
	if !reach.all {
		q.add("a.account = ?", reach.account)
	}
	if reach.environment != "" {
		q.add("a.environment = ?", reach.environment)
	}
	if filter.KeyID != "" {
		q.add("a.key_id = ?", filter.KeyID)
	}
	if filter.Actor != "" {
		q.add("a.actor = ?", filter.Actor)
	}
	if filter.Action != "" {
		q.add("a.action = ?", filter.Action)
	}
	if filter.Since != nil {
		q.add("a.at >= ?", *filter.Since)
	}
	if filter.Until != nil {
		q.add("a.at < ?", *filter.Until)
	}
	if filter.Before > 0 {
		q.add("a.id < ?", filter.Before)
	}
	q.args = append(q.args, limit)
	rows, _ := s.pool.Query(ctx, `
select a.id, a.at, a.actor, a.action, coalesce(a.key_id, ''), coalesce(a.account, ''), coalesce(a.environment, ''), a.details
from rekall.audit a where `+q.where()+` order by a.id desc limit `+placeholder(len(q.args)), q.args...) // CollectRows returns its error
	entries, err := pgx.CollectRows(rows, pgx.RowToStructByPos[AuditEntry])
	if err != nil {
		return nil, failed("list audit", err)
	}
	return entries, nil
}

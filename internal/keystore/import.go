package keystore

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// Staged is a key that is to be imported.
type Staged struct {
	Line        int64 // of the file
	ID          string
	Account     string
	Name        string
	Environment apikey.Environment
	Digest      apikey.Digest
	Hint        string // empty: unknown
	Scopes      apikey.Scopes
	ManageKeys  bool
	CreatedAt   *time.Time // nil: now
	ExpiresAt   *time.Time // nil: never
}

// Stage copies keys into a table of the transaction's own, until next returns nil.
func (t *Tx) Stage(ctx context.Context, next func() (*Staged, error)) error {
	// For sorting a million keys in memory. Compiling the statements takes longer than it saves.
	if err := t.exec(ctx, "stage import", `select set_config('work_mem', '256MB', true), set_config('jit', 'off', true)`); err != nil {
		return err
	}
	if err := t.exec(ctx, "stage import", `
create temporary table rekall_import (
	line bigint not null, id text not null, account text not null, name text not null, environment text not null, key_hash bytea not null,
	hint text, scopes text[] not null, manage_keys boolean not null, created_at timestamptz, expires_at timestamptz
) on commit drop`); err != nil {
		return err
	}
	columns := []string{"line", "id", "account", "name", "environment", "key_hash", "hint", "scopes", "manage_keys", "created_at", "expires_at"}
	_, err := t.tx.CopyFrom(ctx, pgx.Identifier{"rekall_import"}, columns, pgx.CopyFromFunc(func() ([]any, error) {
		s, err := next()
		if s == nil || err != nil {
			return nil, err
		}
		var hint *string
		if s.Hint != "" {
			hint = &s.Hint
		}
		return []any{s.Line, s.ID, s.Account, s.Name, s.Environment.String(), s.Digest[:], hint, s.Scopes.Names(), s.ManageKeys, s.CreatedAt, s.ExpiresAt}, nil
	}))
	if err != nil {
		return failed("stage import", err)
	}
	return t.exec(ctx, "stage import", `analyze rekall_import`)
}

// StagedFault is a line that contradicts another, or a key that is there already.
type StagedFault struct {
	Line      int64
	FirstLine *int64 // the line with the same hash; nil: it contradicts a stored key
}

// StagedFaults returns the first limit lines that cannot be imported, and how many there are.
func (t *Tx) StagedFaults(ctx context.Context, limit int) (faults []StagedFault, total int64, err error) {
	rows, _ := t.tx.Query(ctx, `
with faults as (
	select s.line, s.first_line from (
		select line, min(line) over (partition by key_hash) as first_line from rekall_import
		where key_hash in (select key_hash from rekall_import group by key_hash having count(*) > 1)) s
	where s.line <> s.first_line
	union all
	select s.line, null from rekall_import s join rekall.api_keys k on k.key_hash = s.key_hash
	where not (`+sameKey+`)
)
select line, first_line, count(*) over () from faults order by line limit $1`, limit) // ForEachRow returns its error
	var fault StagedFault
	_, err = pgx.ForEachRow(rows, []any{&fault.Line, &fault.FirstLine, &total}, func() error {
		faults = append(faults, fault)
		fault.FirstLine = nil
		return nil
	})
	if err != nil {
		return nil, 0, failed("check import", err)
	}
	return faults, total, nil
}

// sameKey compares what a key k may do with what a line s says. Its name may have been changed since it was imported, and
// its rotation may have begun.
const sameKey = `k.account = s.account and k.environment = s.environment and k.manage_keys = s.manage_keys
	and k.scopes @> s.scopes and k.scopes <@ s.scopes
	and case when k.grace_started_at is null then k.expires_at else k.prior_expires_at end is not distinct from s.expires_at`

// CountStagedThere returns how many of the staged keys are stored already, and how many of those are revoked or expired.
func (t *Tx) CountStagedThere(ctx context.Context) (there, ended int64, err error) {
	err = t.tx.QueryRow(ctx, `
select count(*), count(*) filter (where k.revoked_at is not null or k.expires_at <= now())
from rekall_import s join rekall.api_keys k on k.key_hash = s.key_hash`).Scan(&there, &ended)
	if err != nil {
		return 0, 0, failed("check import", err)
	}
	return there, ended, nil
}

// InsertStaged adds the staged keys that are not there yet, with a line in the audit for each account, and returns how many
// there were.
func (t *Tx) InsertStaged(ctx context.Context, actor string) (inserted int64, err error) {
	const doing = "import keys"
	// Accounts, hashes and ids are in no order of each other. In the order of the accounts, and with the ids dealt out anew in
	// that order, three of the indexes grow at one end; otherwise each row would touch a page of its own in each.
	tag, err := t.tx.Exec(ctx, `
with fresh as materialized (
	select * from rekall_import s where not exists (select from rekall.api_keys k where k.key_hash = s.key_hash)
),
by_account as (select *, row_number() over (order by account) as place from fresh),
by_id as (select id as next_id, row_number() over (order by id) as place from fresh)
insert into rekall.api_keys (id, account, name, environment, key_hash, hint, scopes, manage_keys, created_by, created_at, expires_at)
select next_id, account, name, environment, key_hash, hint, scopes, manage_keys, $1, coalesce(created_at, now()), expires_at
from by_account join by_id using (place) order by place`, actor)
	if err != nil {
		return 0, failed(doing, err)
	}
	if err := t.exec(ctx, doing, `
insert into rekall.audit (actor, action, account, details)
select $1, 'keys.imported', s.account, jsonb_build_object('count', count(*))
from rekall_import s join rekall.api_keys k on k.id = s.id group by s.account`, actor); err != nil {
		return 0, err
	}
	return tag.RowsAffected(), nil
}

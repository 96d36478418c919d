package keystore

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// ErrNoRow says that there is no key with that id within reach.
var ErrNoRow = errors.New("no key with that id")

// Reach is the keys that a statement may see. The zero value is none. What is out of reach and what does not exist are the
// same to the same statement, so neither its answer nor its time tells them apart.
type Reach struct {
	all                  bool
	account, environment string // environment empty: both
}

// Everything reaches the keys of all accounts.
func Everything() Reach { return Reach{all: true} }

// Within reaches the keys of one account, in one environment if it is not empty.
func Within(account, environment string) Reach {
	return Reach{account: account, environment: environment}
}

// oneKey finds the key $1 within the reach $2, $3, $4.
const oneKey = `k.id = $1 and ($2::boolean or k.account = $3) and ($4 = '' or k.environment = $4)`

func (r Reach) args(id string, more ...any) []any {
	return append([]any{id, r.all, r.account, r.environment}, more...)
}

// Row is a key as its owner sees it. Times are Postgres's.
type Row struct {
	ID          string
	Account     string
	Name        string
	Environment string
	Hint        string // the key's last four characters; empty: unknown
	Scopes      []string
	ManageKeys  bool
	CreatedBy   string // an actor; empty: unknown
	CreatedAt   time.Time
	ExpiresAt   *time.Time // nil: never
	RevokedAt   *time.Time // nil: not revoked
	LastUsedAt  *time.Time // nil: not known to have been used, or not read

	Predecessor       string         // the key that this one replaces; empty: none
	Successor         string         // the key that replaces this one, or was the newest to do so; empty: none
	OverlapOnFirstUse *time.Duration // not nil: the first use is awaited, and the predecessor lives so long from then
	GraceStartedAt    *time.Time     // not nil: the key's expiry was set by its rotation
	PriorExpiresAt    *time.Time     // expiry before that; nil: never

	ChangeXid uint64    // transaction that last changed the row
	Now       time.Time // the moment of the statement, by which the key is expired or not
}

// keyRowColumns are what scanRow receives, of a table named k, before the last use. In a transaction, now() is from before it waited for
// the key: one that has ended meanwhile would pass for one that lives. Likewise a successor's created_at may be before that of an earlier one.
const keyRowColumns = `k.id, k.account, k.name, k.environment, coalesce(k.hint, ''), k.scopes, k.manage_keys, coalesce(k.created_by, ''),
	k.created_at, k.expires_at, k.revoked_at, coalesce(k.predecessor, ''),
	coalesce((select s.id from rekall.api_keys s where s.predecessor = k.id
		order by s.revoked_at is null desc, s.created_at desc limit 1), ''),
	k.overlap_on_first_use, k.grace_started_at, k.prior_expires_at, k.change_xid, statement_timestamp()`

const (
	// rowColumns leave the last use out. An edge's role can lock the tables that it is in: no change to a key may wait for them, or
	// whoever has taken an edge over could keep its keys from being revoked.
	rowColumns = keyRowColumns + `, null::timestamptz`

	// usedRowColumns have all that scanRow receives.
	usedRowColumns = keyRowColumns + `, (select ` + lastUse + ` from rekall.last_used l where l.key_id = k.id)`
)

// rowColumnsWith are rowColumns, or usedRowColumns where the last use is wanted.
func rowColumnsWith(use bool) string {
	if use {
		return usedRowColumns
	}
	return rowColumns
}

func scanRow(row pgx.CollectableRow) (Row, error) {
	var r Row
	err := row.Scan(&r.ID, &r.Account, &r.Name, &r.Environment, &r.Hint, &r.Scopes, &r.ManageKeys, &r.CreatedBy,
		&r.CreatedAt, &r.ExpiresAt, &r.RevokedAt, &r.Predecessor, &r.Successor,
		&r.OverlapOnFirstUse, &r.GraceStartedAt, &r.PriorExpiresAt, &r.ChangeXid, &r.Now, &r.LastUsedAt)
	return r, err
}

// readRow runs a statement that returns rowColumns or usedRowColumns of at most one key.
func readRow(ctx context.Context, db querier, doing, sql string, args ...any) (Row, error) {
	rows, _ := db.Query(ctx, sql, args...) // CollectExactlyOneRow returns its error
	row, err := pgx.CollectExactlyOneRow(rows, scanRow)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNoRow
	}
	if err != nil {
		return Row{}, failed(doing, err)
	}
	return row, nil
}

// NewKey is a row to be inserted.
type NewKey struct {
	ID, Account, Name string
	Environment       apikey.Environment
	Digest            apikey.Digest
	Hint              string // empty: unknown
	Scopes            apikey.Scopes
	ManageKeys        bool
	CreatedBy         string         // an actor; empty: unknown
	Lifetime          time.Duration  // from now by Postgres's clock, in microseconds; 0: for ever
	ExpiresAt         *time.Time     // in place of Lifetime
	Predecessor       string         // the key that this one replaces; empty: none
	OverlapOnFirstUse *time.Duration // as in Row
}

// Insert adds a key. Like Revoke, it needs a transaction, which the line in the audit is written in too.
func (t *Tx) Insert(ctx context.Context, key NewKey) (Row, error) {
	var lifetime *time.Duration
	if key.Lifetime != 0 {
		lifetime = &key.Lifetime
	}
	return readRow(ctx, t.tx, "create key", `
insert into rekall.api_keys as k (id, account, name, environment, key_hash, hint, scopes, manage_keys, created_by, expires_at,
	predecessor, overlap_on_first_use)
values ($1, $2, $3, $4, $5, nullif($6, ''), $7, $8, nullif($9, ''), coalesce($10, now() + $11::interval), nullif($12, ''), $13)
returning `+rowColumns, key.ID, key.Account, key.Name, key.Environment.String(), key.Digest[:], key.Hint, key.Scopes.Names(),
		key.ManageKeys, key.CreatedBy, key.ExpiresAt, lifetime, key.Predecessor, key.OverlapOnFirstUse)
}

// FullFor returns how long an account must wait to make a key, if it may make limit in 24 hours, not counting operators'; 0: not at
// all. It looks at the account's newest only, ten times as many: a large import takes no longer to count. Others who ask for the
// same account wait until the transaction ends, and then count what it has made. Keys made while Postgres's clock was ahead do not count
// until it is there: an account would be locked out for as long as it was ahead. No account can set that clock back.
func (t *Tx) FullFor(ctx context.Context, account string, limit int) (time.Duration, error) {
	const doing = "count new keys"
	if err := t.exec(ctx, doing, `select pg_advisory_xact_lock(hashtextextended('rekall: keys made by ' || $1, 0))`, account); err != nil {
		return 0, err
	}
	return t.waitOf(ctx, doing, `
select created_at + interval '24 hours' - statement_timestamp() from (
	select id, created_by, created_at from rekall.api_keys
	where account = $1 and created_at > statement_timestamp() - interval '24 hours' and created_at <= statement_timestamp()
	order by created_at desc, id desc limit 10 * $2::bigint
) newest where split_part(created_by, ':', 1) in ('key', 'user')
order by created_at desc, id desc offset $2::bigint - 1 limit 1`, account, limit)
}

// waitOf runs a statement that returns how long to wait, or no row: not at all.
func (t *Tx) waitOf(ctx context.Context, doing, sql string, args ...any) (wait time.Duration, err error) {
	err = t.tx.QueryRow(ctx, sql, args...).Scan(&wait)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil
	}
	if err != nil {
		return 0, failed(doing, err)
	}
	return wait, nil
}

// Get returns a key without its last use, or an error that wraps ErrNoRow.
func (r Reader) Get(ctx context.Context, reach Reach, id string) (Row, error) {
	return readRow(ctx, r.db, "get key", `select `+rowColumns+` from rekall.api_keys k where `+oneKey, reach.args(id)...)
}

// GetUsed is Get with the last use.
func (s *Store) GetUsed(ctx context.Context, reach Reach, id string) (Row, error) {
	return readRow(ctx, s.pool, "get key", `select `+usedRowColumns+` from rekall.api_keys k where `+oneKey, reach.args(id)...)
}

// Lock is Get, and keeps others from changing the key until the transaction ends. It reads the key once it has it: a statement
// that waits for a row sees the row as it is then, but all beside it, such as its successor, as it was before.
func (t *Tx) Lock(ctx context.Context, reach Reach, id string) (Row, error) {
	if err := t.exec(ctx, "lock key", `select from rekall.api_keys k where `+oneKey+` for no key update`, reach.args(id)...); err != nil {
		return Row{}, err
	}
	return t.Get(ctx, reach, id)
}

// Find returns the key with this digest and its last use, or an error that wraps ErrNoRow.
func (s *Store) Find(ctx context.Context, reach Reach, digest apikey.Digest) (Row, error) {
	return readRow(ctx, s.pool, "find key", `select `+usedRowColumns+` from rekall.api_keys k
where k.key_hash = $1 and ($2::boolean or k.account = $3) and ($4 = '' or k.environment = $4)`, digest[:], reach.all, reach.account, reach.environment)
}

// Rename gives a key another name, and returns the row as it is now and the name that it had.
func (t *Tx) Rename(ctx context.Context, reach Reach, id, name string) (row Row, before string, err error) {
	if row, err = t.Lock(ctx, reach, id); err != nil || row.Name == name {
		return row, row.Name, err
	}
	before = row.Name
	row, err = readRow(ctx, t.tx, "rename key", `update rekall.api_keys k set name = $2 where k.id = $1 returning `+rowColumns, id, name)
	return row, before, err
}

// Revoke revokes a key for good. It returns the row as it is now, and whether this call is what revoked it; the error wraps
// ErrNoRow if there is no such key. Of many calls at once, one revokes: the others wait for its row and find it revoked. As Lock
// does, it reads the key once it has it.
func (t *Tx) Revoke(ctx context.Context, reach Reach, id string) (row Row, revoked bool, err error) {
	tag, err := t.tx.Exec(ctx, `update rekall.api_keys k set revoked_at = now() where `+oneKey+` and k.revoked_at is null`, reach.args(id)...)
	if err != nil {
		return Row{}, false, failed("revoke key", err)
	}
	row, err = t.Get(ctx, reach, id)
	return row, err == nil && tag.RowsAffected() == 1, err
}

// Now returns Postgres's clock: in a Tx, when it began, which is "now" in all its statements.
func (r Reader) Now(ctx context.Context) (now time.Time, err error) {
	if err := r.db.QueryRow(ctx, `select now()`).Scan(&now); err != nil {
		return now, failed("read the clock", err)
	}
	return now, nil
}

// Server returns the server: in a Tx, whose Xid is that server's.
func (r Reader) Server(ctx context.Context) (Server, error) {
	server, err := serverOf(ctx, r.db)
	if err != nil {
		return Server{}, failed("read the server", err)
	}
	return server, nil
}

// Xid returns the id of the transaction.
func (t *Tx) Xid(ctx context.Context) (xid uint64, err error) {
	if err := t.tx.QueryRow(ctx, `select pg_current_xact_id()`).Scan(&xid); err != nil {
		return 0, failed("read the transaction's id", err)
	}
	return xid, nil
}

package keystore

import (
	"context"
	"errors"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// tierRow is a row of rekall.tiers as the feed has it.
type tierRow struct {
	Name       string
	PerMinute  int `json:"requests_per_minute"`
	Burst      int
	Concurrent int `json:"concurrent_requests"`
}

// tiersOf also returns the names of tiers that a newer version has added.
func tiersOf(rows []tierRow) (tiers apikey.Tiers, unknown []string) {
	for _, row := range rows {
		tier, err := apikey.ParseTier(row.Name)
		if err != nil {
			unknown = append(unknown, row.Name)
			continue
		}
		tiers[tier] = apikey.Limits{PerMinute: row.PerMinute, Burst: row.Burst, Concurrent: row.Concurrent}
	}
	slices.Sort(unknown)
	return tiers, unknown
}

// AccountLimits are the tier of an account, and what its production keys may do in place of that.
type AccountLimits struct {
	Account string
	Tier    apikey.Tier
	Own     apikey.Limits // 0: the tier's
}

// KeyLimits are what a key may do in place of what its account's keys may.
type KeyLimits struct {
	KeyID string
	Own   apikey.Limits // 0: the account's
}

const limitColumns = `coalesce(requests_per_minute, 0), coalesce(burst, 0), coalesce(concurrent_requests, 0)`

// Tiers returns the limits of all tiers.
func (r Reader) Tiers(ctx context.Context) (tiers apikey.Tiers, err error) {
	rows, _ := r.db.Query(ctx, `select name, `+limitColumns+` from rekall.tiers`) // CollectRows returns its error
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tierRow])
	if err != nil {
		return tiers, failed("read tiers", err)
	}
	tiers, _ = tiersOf(all)
	return tiers, nil
}

// AccountLimits returns the tier and the limits of an account; of one that nobody gave any, the tier free.
func (r Reader) AccountLimits(ctx context.Context, account string) (AccountLimits, error) {
	return accountLimits(r.db.QueryRow(ctx, accountLimitsSQL, account), account)
}

const accountLimitsSQL = `select tier, ` + limitColumns + ` from rekall.account_limits where account = $1`

func accountLimits(row pgx.Row, account string) (AccountLimits, error) {
	limits := AccountLimits{Account: account}
	var tier string
	err := row.Scan(&tier, &limits.Own.PerMinute, &limits.Own.Burst, &limits.Own.Concurrent)
	if errors.Is(err, pgx.ErrNoRows) {
		return limits, nil
	}
	if err == nil {
		limits.Tier, err = apikey.ParseTier(tier)
	}
	if err != nil {
		return AccountLimits{}, failed("read limits of account", err)
	}
	return limits, nil
}

// KeyLimits returns the limits of a key's own; of one that has none, zeros.
func (r Reader) KeyLimits(ctx context.Context, keyID string) (KeyLimits, error) {
	return keyLimits(r.db.QueryRow(ctx, keyLimitsSQL, keyID), keyID)
}

const keyLimitsSQL = `select ` + limitColumns + ` from rekall.key_limits where key_id = $1`

func keyLimits(row pgx.Row, keyID string) (KeyLimits, error) {
	limits := KeyLimits{KeyID: keyID}
	err := row.Scan(&limits.Own.PerMinute, &limits.Own.Burst, &limits.Own.Concurrent)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return KeyLimits{}, failed("read limits of key", err)
	}
	return limits, nil
}

// LockTiers returns the limits of all tiers, and keeps others from changing them until the transaction ends.
func (t *Tx) LockTiers(ctx context.Context) (apikey.Tiers, error) {
	if err := t.exec(ctx, "lock tiers", `select from rekall.tiers order by name for no key update`); err != nil {
		return apikey.Tiers{}, err
	}
	return t.Tiers(ctx)
}

// SetTier changes the limits of a tier.
func (t *Tx) SetTier(ctx context.Context, tier apikey.Tier, limits apikey.Limits) error {
	return t.exec(ctx, "change tier", `
update rekall.tiers set requests_per_minute = nullif($2, 0), burst = nullif($3, 0), concurrent_requests = nullif($4, 0) where name = $1`,
		tier.String(), limits.PerMinute, limits.Burst, limits.Concurrent)
}

// LockAccountLimits returns the limits of an account, and keeps others from changing them until the transaction ends.
func (t *Tx) LockAccountLimits(ctx context.Context, account string) (AccountLimits, error) {
	// Two that meet the account for the first time wait for each other here.
	if err := t.exec(ctx, "lock limits of account", `insert into rekall.account_limits (account) values ($1) on conflict do nothing`, account); err != nil {
		return AccountLimits{}, err
	}
	return accountLimits(t.tx.QueryRow(ctx, accountLimitsSQL+` for no key update`, account), account)
}

// SetAccountLimits changes the limits of an account that LockAccountLimits has returned.
func (t *Tx) SetAccountLimits(ctx context.Context, limits AccountLimits) error {
	return t.exec(ctx, "change limits of account", `
update rekall.account_limits set requests_per_minute = nullif($2, 0), burst = nullif($3, 0), concurrent_requests = nullif($4, 0), tier = $5
where account = $1`, limits.Account, limits.Own.PerMinute, limits.Own.Burst, limits.Own.Concurrent, limits.Tier.String())
}

// LockKeyLimits returns the limits of a key that exists, and keeps others from changing them until the transaction ends.
func (t *Tx) LockKeyLimits(ctx context.Context, keyID string) (KeyLimits, error) {
	if err := t.exec(ctx, "lock limits of key", `insert into rekall.key_limits (key_id) values ($1) on conflict do nothing`, keyID); err != nil {
		return KeyLimits{}, err
	}
	return keyLimits(t.tx.QueryRow(ctx, keyLimitsSQL+` for no key update`, keyID), keyID)
}

// SetKeyLimits changes the limits of a key that LockKeyLimits has returned.
func (t *Tx) SetKeyLimits(ctx context.Context, limits KeyLimits) error {
	return t.exec(ctx, "change limits of key", `
update rekall.key_limits set requests_per_minute = nullif($2, 0), burst = nullif($3, 0), concurrent_requests = nullif($4, 0) where key_id = $1`,
		limits.KeyID, limits.Own.PerMinute, limits.Own.Burst, limits.Own.Concurrent)
}

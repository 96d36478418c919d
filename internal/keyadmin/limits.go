package keyadmin

import (
	"context"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// Limits is how much a key may be used.
type Limits struct {
	PerMinute  int `json:"requests_per_minute"` // 0: not limited, or, of an account or a key, as its tier says
	Burst      int `json:"burst"`               // in any 15 seconds
	Concurrent int `json:"concurrent_requests"` // 0: as of PerMinute
}

// LimitsChange is what is to change in limits. What is nil stays as it is. Of a tier, 0 takes a limit away; of an account or a
// key, it leaves it to the tier again.
type LimitsChange struct {
	PerMinute  *int // to 1000000
	Burst      *int // at least a quarter of PerMinute, to 10000000; nil where PerMinute changes: one and a half times that
	Concurrent *int // to 1000000
}

const (
	maxPerMinute  = 1_000_000 // the database checks the same
	maxBurst      = 10_000_000
	maxConcurrent = 1_000_000
)

// apply returns the limits as they are after the change.
func (c LimitsChange) apply(l apikey.Limits) (apikey.Limits, error) {
	if c.PerMinute != nil {
		l.PerMinute, l.Burst = *c.PerMinute, (3**c.PerMinute+1)/2
	}
	if c.Burst != nil {
		l.Burst = *c.Burst
	}
	if c.Concurrent != nil {
		l.Concurrent = *c.Concurrent
	}
	switch {
	case l.PerMinute < 0 || l.PerMinute > maxPerMinute:
		return l, &InvalidError{"requests_per_minute", "must be from 0 to 1000000"}
	case l.PerMinute == 0 && l.Burst != 0:
		return l, &InvalidError{"burst", "needs requests_per_minute beside it"}
	case 4*l.Burst < l.PerMinute || l.Burst > maxBurst:
		return l, &InvalidError{"burst", "must be at least a quarter of the requests per minute, and at most 10000000"}
	case l.Concurrent < 0 || l.Concurrent > maxConcurrent:
		return l, &InvalidError{"concurrent_requests", "must be from 0 to 1000000"}
	}
	return l, nil
}

// limitsDetails is what the audit says of limits.
func limitsDetails(l apikey.Limits) map[string]any {
	return map[string]any{"requests_per_minute": l.PerMinute, "burst": l.Burst, "concurrent_requests": l.Concurrent}
}

// TierLimits is what the keys of a tier may do.
type TierLimits struct {
	Tier string `json:"tier"`
	Limits
}

// Tiers returns all tiers.
func (a *Admin) Tiers(ctx context.Context) ([]TierLimits, error) {
	tiers, err := a.store.Tiers(ctx)
	if err != nil {
		return nil, err
	}
	return describe(tiers), nil
}

func describe(tiers apikey.Tiers) []TierLimits {
	all := make([]TierLimits, 0, len(tiers))
	for tier, limits := range tiers {
		all = append(all, TierLimits{apikey.Tier(tier).String(), Limits(limits)})
	}
	return all
}

// SetTier changes the limits of a tier. Only an operator may. A change that is not acceptable is an *InvalidError.
func (a *Admin) SetTier(ctx context.Context, actor Actor, name string, change LimitsChange) (TierLimits, error) {
	tier, err := apikey.ParseTier(name)
	if err != nil {
		return TierLimits{}, errTier
	}
	var limits apikey.Limits
	err = a.changeLimits(ctx, actor, func(tx *keystore.Tx, actor Actor) error {
		tiers, err := tx.LockTiers(ctx)
		if err != nil {
			return err
		}
		if limits, err = change.apply(tiers[tier]); err != nil || limits == tiers[tier] {
			return err
		}
		if err := tx.SetTier(ctx, tier, limits); err != nil {
			return err
		}
		details := limitsDetails(limits)
		details["tier"] = tier.String()
		return tx.Audit(ctx, keystore.AuditEntry{Actor: actor.String(), Action: string(TierLimitsChanged), Details: details})
	})
	if err != nil {
		return TierLimits{}, err
	}
	return TierLimits{tier.String(), Limits(limits)}, nil
}

var errTier = &InvalidError{"tier", "must be free, pro, team, enterprise or sandbox"}

// AccountLimits is what the production keys of an account may do.
type AccountLimits struct {
	Account   string `json:"account"`
	Tier      string `json:"tier"`
	Own       Limits `json:"own"`       // in place of the tier's; 0: the tier's
	Effective Limits `json:"effective"` // of a key that has none of its own
}

// AccountLimits returns the limits of an account, whether or not it has keys.
func (a *Admin) AccountLimits(ctx context.Context, account string) (AccountLimits, error) {
	if err := checkAccount(account); err != nil {
		return AccountLimits{}, err
	}
	limits, err := a.store.AccountLimits(ctx, account)
	if err != nil {
		return AccountLimits{}, err
	}
	return effective(ctx, a.store.Reader, limits)
}

func effective(ctx context.Context, reader keystore.Reader, limits keystore.AccountLimits) (AccountLimits, error) {
	tiers, err := reader.Tiers(ctx)
	if err != nil {
		return AccountLimits{}, err
	}
	return AccountLimits{limits.Account, limits.Tier.String(), Limits(limits.Own), Limits(limits.Own.Over(tiers[limits.Tier]))}, nil
}

// SetAccountLimits changes the tier of an account, if tier is not empty, and its limits. Only an operator may. A change that
// is not acceptable is an *InvalidError.
func (a *Admin) SetAccountLimits(ctx context.Context, actor Actor, account, tier string, change LimitsChange) (result AccountLimits, err error) {
	if err := checkAccount(account); err != nil {
		return AccountLimits{}, err
	}
	err = a.changeLimits(ctx, actor, func(tx *keystore.Tx, actor Actor) error {
		before, err := tx.LockAccountLimits(ctx, account)
		if err != nil {
			return err
		}
		after := before
		if tier != "" {
			if after.Tier, err = apikey.ParseTier(tier); err != nil || after.Tier == apikey.SandboxTier {
				return &InvalidError{"tier", "must be free, pro, team or enterprise: sandbox is that of sandbox keys, whatever their account's"}
			}
		}
		if after.Own, err = change.apply(before.Own); err != nil {
			return err
		}
		if after != before {
			if err := tx.SetAccountLimits(ctx, after); err != nil {
				return err
			}
			details := limitsDetails(after.Own)
			details["tier"] = after.Tier.String()
			err := tx.Audit(ctx, keystore.AuditEntry{Actor: actor.String(), Action: string(AccountLimitsChanged), Account: account, Details: details})
			if err != nil {
				return err
			}
		}
		result, err = effective(ctx, tx.Reader, after)
		return err
	})
	if err != nil {
		return AccountLimits{}, err
	}
	return result, nil
}

// KeyLimits is what a key may do.
type KeyLimits struct {
	KeyID       string `json:"key_id"`
	Account     string `json:"account"`
	Environment string `json:"environment"`
	Tier        string `json:"tier"`
	Own         Limits `json:"own"` // 0: as keys without limits of their own
	Effective   Limits `json:"effective"`
}

// KeyLimits returns the limits of a key. The error wraps ErrNotFound if there is none with that id.
func (a *Admin) KeyLimits(ctx context.Context, actor Actor, id string) (KeyLimits, error) {
	if err := checkID(id); err != nil {
		return KeyLimits{}, err
	}
	end, err := a.turn(ctx, actor)
	if err != nil {
		return KeyLimits{}, err
	}
	defer end()
	row, err := a.store.Get(ctx, actor.reach(), id)
	if err != nil {
		return KeyLimits{}, notFound(err, id)
	}
	own, err := a.store.KeyLimits(ctx, id)
	if err != nil {
		return KeyLimits{}, err
	}
	return ofKey(ctx, a.store.Reader, row, own.Own)
}

func ofKey(ctx context.Context, reader keystore.Reader, row keystore.Row, own apikey.Limits) (KeyLimits, error) {
	tiers, err := reader.Tiers(ctx)
	if err != nil {
		return KeyLimits{}, err
	}
	account := keystore.AccountLimits{Tier: apikey.SandboxTier}
	if row.Environment != apikey.Sandbox.String() {
		if account, err = reader.AccountLimits(ctx, row.Account); err != nil {
			return KeyLimits{}, err
		}
	}
	return KeyLimits{
		row.ID, row.Account, row.Environment, account.Tier.String(), Limits(own), Limits(own.Over(account.Own).Over(tiers[account.Tier])),
	}, nil
}

// SetKeyLimits changes the limits of a key. Only an operator may. A change that is not acceptable is an *InvalidError; the error
// wraps ErrNotFound if there is no key with that id.
func (a *Admin) SetKeyLimits(ctx context.Context, actor Actor, id string, change LimitsChange) (result KeyLimits, err error) {
	if err := checkID(id); err != nil {
		return KeyLimits{}, err
	}
	err = a.changeLimits(ctx, actor, func(tx *keystore.Tx, actor Actor) error {
		row, err := tx.Lock(ctx, actor.reach(), id) // a rotation at the same time hands down these limits, or comes before them
		if err != nil {
			return err
		}
		before, err := tx.LockKeyLimits(ctx, id)
		if err != nil {
			return err
		}
		own, err := change.apply(before.Own)
		if err != nil {
			return err
		}
		if own != before.Own {
			err = setKeyLimits(ctx, tx, actor, row, own)
		}
		if err == nil {
			result, err = ofKey(ctx, tx.Reader, row, own)
		}
		return err
	})
	if err != nil {
		return KeyLimits{}, notFound(err, id)
	}
	return result, nil
}

// setKeyLimits changes the limits of a key that are locked.
func setKeyLimits(ctx context.Context, tx *keystore.Tx, actor Actor, row keystore.Row, own apikey.Limits) error {
	if err := tx.SetKeyLimits(ctx, keystore.KeyLimits{KeyID: row.ID, Own: own}); err != nil {
		return err
	}
	return tx.Audit(ctx, entry(actor, KeyLimitsChanged, row, limitsDetails(own)))
}

// changeLimits is change for operators only: whoever manages the keys of an account does not say what the account may use.
func (a *Admin) changeLimits(ctx context.Context, actor Actor, do func(*keystore.Tx, Actor) error) error {
	if actor.rank != operator {
		return &ForbiddenError{"", "limits are set by the operator of the gateway"}
	}
	return a.change(ctx, actor, do)
}

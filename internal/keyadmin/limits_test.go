package keyadmin_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestLimitsOfAKeyAreItsOwnThenItsAccountsThenItsTiers(t *testing.T) {
	admin, _, _ := newAdmin(t)
	ctx := t.Context()
	r := request()
	r.Environment = "production"
	production, sandbox := create(t, admin, r), create(t, admin, request())
	account, err := admin.SetAccountLimits(ctx, operator, "acme", "pro", keyadmin.LimitsChange{PerMinute: new(2001)})
	want := keyadmin.AccountLimits{
		Account: "acme", Tier: "pro", Own: keyadmin.Limits{PerMinute: 2001, Burst: 3002}, Effective: keyadmin.Limits{PerMinute: 2001, Burst: 3002, Concurrent: 25},
	}
	if diff := cmp.Diff(want, account); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if again, err := admin.AccountLimits(ctx, "acme"); again != account || err != nil {
		t.Errorf("%+v, %v", again, err)
	}
	if other, err := admin.AccountLimits(ctx, "globex"); other.Tier != "free" || other.Effective.PerMinute != 100 || err != nil {
		t.Errorf("an account that nobody gave a tier: %+v, %v", other, err)
	}
	for _, tc := range []struct {
		key  keyadmin.Key
		want keyadmin.Limits
	}{
		{production, keyadmin.Limits{PerMinute: 2001, Burst: 3002, Concurrent: 1}},
		{sandbox, keyadmin.Limits{PerMinute: 50, Burst: 75, Concurrent: 1}},
	} {
		set, err := admin.SetKeyLimits(ctx, operator, tc.key.ID, keyadmin.LimitsChange{Concurrent: new(1)})
		if set.Effective != tc.want || err != nil {
			t.Errorf("%+v, %v", set, err)
		}
		if got, err := admin.KeyLimits(ctx, operator, tc.key.ID); got != set || err != nil {
			t.Errorf("%+v, %v, want %+v", got, err, set)
		}
	}
	if tier, err := admin.SetTier(ctx, operator, "sandbox", keyadmin.LimitsChange{PerMinute: new(60), Burst: new(15)}); tier.Concurrent != 2 || err != nil {
		t.Errorf("what was not named has changed: %+v, %v", tier, err)
	}
	if got, err := admin.KeyLimits(ctx, operator, sandbox.ID); got.Effective != (keyadmin.Limits{PerMinute: 60, Burst: 15, Concurrent: 1}) || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
	back, err := admin.SetAccountLimits(ctx, operator, "acme", "", keyadmin.LimitsChange{PerMinute: new(0)})
	if back.Tier != "pro" || back.Effective != (keyadmin.Limits{PerMinute: 1000, Burst: 1500, Concurrent: 25}) || err != nil {
		t.Errorf("left to its tier again: %+v, %v", back, err)
	}
}

// TestChangeOfLimitsThatFailsSaysWhyAndNotWhatElseFailedForThat: in a transaction that is aborted, everything does.
func TestChangeOfLimitsThatFailsSaysWhyAndNotWhatElseFailedForThat(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	key := create(t, admin, request())
	for _, table := range []string{"tiers", "account_limits", "key_limits"} {
		pgtest.Exec(t, databaseURL, `alter table rekall.`+table+` add constraint refused check (requests_per_minute <> 7)`)
	}
	change := keyadmin.LimitsChange{PerMinute: new(7)}
	for what, set := range map[string]func() error{
		"tier":    func() error { _, err := admin.SetTier(t.Context(), operator, "free", change); return err },
		"account": func() error { _, err := admin.SetAccountLimits(t.Context(), operator, "acme", "", change); return err },
		"key":     func() error { _, err := admin.SetKeyLimits(t.Context(), operator, key.ID, change); return err },
	} {
		if err := set(); err == nil || !strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "aborted") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestChangesOfLimitsAreInTheAuditOnce(t *testing.T) {
	admin, _, _ := newAdmin(t)
	ctx := t.Context()
	key := create(t, admin, request())
	for range 2 { // the second time nothing changes
		_, tierErr := admin.SetTier(ctx, operator, "free", keyadmin.LimitsChange{Concurrent: new(6)})
		_, accountErr := admin.SetAccountLimits(ctx, operator, "acme", "team", keyadmin.LimitsChange{})
		_, keyErr := admin.SetKeyLimits(ctx, operator, key.ID, keyadmin.LimitsChange{PerMinute: new(8)})
		if err := errors.Join(tierErr, accountErr, keyErr); err != nil {
			t.Fatal(err)
		}
	}
	for action, want := range map[keyadmin.Action]map[string]any{
		keyadmin.TierLimitsChanged:    {"tier": "free", "requests_per_minute": 100.0, "burst": 150.0, "concurrent_requests": 6.0},
		keyadmin.AccountLimitsChanged: {"tier": "team", "requests_per_minute": 0.0, "burst": 0.0, "concurrent_requests": 0.0},
		keyadmin.KeyLimitsChanged:     {"requests_per_minute": 8.0, "burst": 12.0, "concurrent_requests": 0.0},
	} {
		page, err := admin.Audit(ctx, operator, keyadmin.AuditRequest{Action: string(action)})
		if err != nil || len(page.Entries) != 1 {
			t.Errorf("%s: %+v, %v", action, page.Entries, err)
			continue
		}
		if diff := cmp.Diff(want, page.Entries[0].Details); diff != "" {
			t.Error(action, diff)
		}
	}
}

func TestTwoChangesOfTheSameLimitsAtOnceAreBothInForce(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	ctx := t.Context()
	key := create(t, admin, request())
	for name, c := range map[string]struct {
		first  func(*keystore.Tx) (set func() error, err error) // to three requests at a time
		second func(keyadmin.LimitsChange) (keyadmin.Limits, error)
	}{
		"a tier's": {
			func(tx *keystore.Tx) (func() error, error) {
				tiers, err := tx.LockTiers(ctx)
				tiers[apikey.Pro].Concurrent = 3
				return func() error { return tx.SetTier(ctx, apikey.Pro, tiers[apikey.Pro]) }, err
			},
			func(change keyadmin.LimitsChange) (keyadmin.Limits, error) {
				tier, err := admin.SetTier(ctx, operator, "pro", change)
				return tier.Limits, err
			},
		},
		"an account's": {
			func(tx *keystore.Tx) (func() error, error) {
				limits, err := tx.LockAccountLimits(ctx, "acme")
				limits.Own.Concurrent = 3
				return func() error { return tx.SetAccountLimits(ctx, limits) }, err
			},
			func(change keyadmin.LimitsChange) (keyadmin.Limits, error) {
				account, err := admin.SetAccountLimits(ctx, operator, "acme", "", change)
				return account.Own, err
			},
		},
		"a key's": {
			func(tx *keystore.Tx) (func() error, error) {
				limits, err := tx.LockKeyLimits(ctx, key.ID)
				limits.Own.Concurrent = 3
				return func() error { return tx.SetKeyLimits(ctx, limits) }, err
			},
			func(change keyadmin.LimitsChange) (keyadmin.Limits, error) {
				key, err := admin.SetKeyLimits(ctx, operator, key.ID, change)
				return key.Own, err
			},
		},
	} {
		if _, err := c.second(keyadmin.LimitsChange{PerMinute: new(50), Concurrent: new(2)}); err != nil {
			t.Fatal(err)
		}
		var after keyadmin.Limits
		waited := make(chan error, 1)
		err := store.ChangeOnce(ctx, func(tx *keystore.Tx) error {
			set, err := c.first(tx)
			if err != nil {
				return err
			}
			go func() {
				var err error
				after, err = c.second(keyadmin.LimitsChange{PerMinute: new(60)})
				waited <- err
			}()
			pgtest.AwaitBlocked(t, databaseURL, 1)
			return set()
		})
		if err := errors.Join(err, <-waited); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if want := (keyadmin.Limits{PerMinute: 60, Burst: 90, Concurrent: 3}); after != want {
			t.Errorf("%s: %+v, want %+v", name, after, want)
		}
	}
}

func TestBadLimitsAreRefusedAndChangeNothing(t *testing.T) {
	admin, _, _ := newAdmin(t)
	ctx := t.Context()
	key := create(t, admin, request())
	for field, changes := range map[string][]keyadmin.LimitsChange{
		"requests_per_minute": {{PerMinute: new(-1)}, {PerMinute: new(1_000_001)}},
		"burst":               {{Burst: new(5)}, {PerMinute: new(41), Burst: new(10)}, {PerMinute: new(1), Burst: new(10_000_001)}, {PerMinute: new(1), Burst: new(-1)}},
		"concurrent_requests": {{Concurrent: new(-1)}, {Concurrent: new(1_000_001)}},
	} {
		for _, change := range changes {
			_, err := admin.SetKeyLimits(ctx, operator, key.ID, change)
			_, accountErr := admin.SetAccountLimits(ctx, operator, "acme", "", change)
			for _, err := range []error{err, accountErr} {
				var invalid *keyadmin.InvalidError
				if !errors.As(err, &invalid) || invalid.Field != field {
					t.Errorf("%s: %v", field, err)
				}
			}
		}
	}
	for _, tier := range []string{"sandbox", "gold"} {
		var invalid *keyadmin.InvalidError
		if _, err := admin.SetAccountLimits(ctx, operator, "acme", tier, keyadmin.LimitsChange{}); !errors.As(err, &invalid) || invalid.Field != "tier" {
			t.Errorf("%s: %v", tier, err)
		}
	}
	if _, err := admin.SetKeyLimits(ctx, operator, "key_0000000000000000000000", keyadmin.LimitsChange{Concurrent: new(1)}); !errors.Is(err, keyadmin.ErrNotFound) {
		t.Errorf("limits of a key that is not there: %v", err)
	}
	if got, err := admin.KeyLimits(ctx, operator, key.ID); got.Own != (keyadmin.Limits{}) || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
	if page, err := admin.Audit(ctx, operator, keyadmin.AuditRequest{Action: string(keyadmin.KeyLimitsChanged)}); err != nil || len(page.Entries) > 0 {
		t.Errorf("%+v, %v", page, err)
	}
}

func TestOnlyAnOperatorSetsLimits(t *testing.T) {
	admin, _, _ := newAdmin(t)
	ctx := t.Context()
	key := create(t, admin, request())
	owner, err := keyadmin.Person("owner", "acme")
	if err != nil {
		t.Fatal(err)
	}
	change := keyadmin.LimitsChange{Concurrent: new(1)}
	_, tierErr := admin.SetTier(ctx, owner, "free", change)
	_, accountErr := admin.SetAccountLimits(ctx, owner, "acme", "team", change)
	_, keyErr := admin.SetKeyLimits(ctx, owner, key.ID, change)
	for _, err := range []error{tierErr, accountErr, keyErr} {
		var forbidden *keyadmin.ForbiddenError
		if !errors.As(err, &forbidden) {
			t.Error(err)
		}
	}
}

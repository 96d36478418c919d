package keystore_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func setAccountLimits(t *testing.T, store *keystore.Store, limits keystore.AccountLimits) {
	t.Helper()
	err := store.Change(t.Context(), func(tx *keystore.Tx) error {
		if _, err := tx.LockAccountLimits(t.Context(), limits.Account); err != nil {
			return err
		}
		return tx.SetAccountLimits(t.Context(), limits)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func setKeyLimits(t *testing.T, store *keystore.Store, limits keystore.KeyLimits) {
	t.Helper()
	err := store.Change(t.Context(), func(tx *keystore.Tx) error {
		if _, err := tx.LockKeyLimits(t.Context(), limits.KeyID); err != nil {
			return err
		}
		return tx.SetKeyLimits(t.Context(), limits)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func inProduction(key *keystore.NewKey) { key.Environment = apikey.Production }

// looked returns what a lookup says that a key may do, under the tiers as they are at first.
func looked(t *testing.T, store *keystore.Store, key keystore.NewKey) apikey.Limits {
	t.Helper()
	found, err := store.Lookup(t.Context(), []apikey.Digest{key.Digest})
	if err != nil || len(found.Records) != 1 {
		t.Fatalf("%d records, %v", len(found.Records), err)
	}
	return documented.Of(found.Records[0].Limits)
}

// documented are the limits in REKALL.md.
var documented = apikey.Tiers{
	apikey.Free:        {PerMinute: 100, Burst: 150, Concurrent: 5},
	apikey.Pro:         {PerMinute: 1000, Burst: 1500, Concurrent: 25},
	apikey.Team:        {PerMinute: 5000, Burst: 7500, Concurrent: 100},
	apikey.SandboxTier: {PerMinute: 50, Burst: 75, Concurrent: 2},
}

func TestTiersBeginAsTheDocumentationHasThem(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	tiers, err := store.Tiers(t.Context())
	if diff := cmp.Diff(documented, tiers); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if snap := snapshot(t, store, ""); snap.Tiers != documented {
		t.Errorf("the feed has %+v", snap.Tiers)
	}
}

func TestKeyHasTheLimitsOfItsTierUnlessItsAccountOrItselfHasOthers(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	production, sandbox := insert(t, store, inProduction), insert(t, store)
	want := func(when string, key keystore.NewKey, want apikey.Limits) {
		t.Helper()
		if got := looked(t, store, key); got != want {
			t.Errorf("%s: %+v, want %+v", when, got, want)
		}
	}
	want("nobody said anything", production, documented[apikey.Free])
	want("nobody said anything", sandbox, documented[apikey.SandboxTier])

	setAccountLimits(t, store, keystore.AccountLimits{Account: production.Account, Tier: apikey.Pro})
	want("pro", production, documented[apikey.Pro])
	want("pro", sandbox, documented[apikey.SandboxTier])

	setAccountLimits(t, store, keystore.AccountLimits{Account: production.Account, Tier: apikey.Pro, Own: apikey.Limits{PerMinute: 9, Burst: 12}})
	want("account", production, apikey.Limits{PerMinute: 9, Burst: 12, Concurrent: 25})
	want("account", sandbox, documented[apikey.SandboxTier])

	for _, key := range []keystore.NewKey{production, sandbox} {
		setKeyLimits(t, store, keystore.KeyLimits{KeyID: key.ID, Own: apikey.Limits{Concurrent: 1}})
	}
	want("key", production, apikey.Limits{PerMinute: 9, Burst: 12, Concurrent: 1})
	want("key", sandbox, apikey.Limits{PerMinute: 50, Burst: 75, Concurrent: 1})
}

func TestFeedBringsEachKeyWhoseLimitsChanged(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key, sibling, sandbox := insert(t, store, inProduction), insert(t, store, inProduction), insert(t, store)
	start := snapshot(t, store, "")

	setAccountLimits(t, store, keystore.AccountLimits{Account: key.Account, Tier: apikey.Team})
	first := snapshot(t, store, start.Text)
	if change(first, key) == nil || change(first, sibling) == nil || change(first, sandbox) != nil {
		t.Errorf("%d changes", len(first.Changes))
	}
	if limits := documented.Of(change(first, key).Limits); limits != documented[apikey.Team] {
		t.Errorf("the feed brings %+v", limits)
	}
	setKeyLimits(t, store, keystore.KeyLimits{KeyID: sandbox.ID, Own: apikey.Limits{Concurrent: 1}})
	second := snapshot(t, store, first.Text)
	if len(second.Changes) != 1 || change(second, sandbox) == nil || documented.Of(second.Changes[0].Limits).Concurrent != 1 {
		t.Errorf("%d changes", len(second.Changes))
	}
	if again := snapshot(t, store, second.Text); len(again.Changes) != 0 {
		t.Errorf("%d changes come again", len(again.Changes))
	}
	err := store.Change(t.Context(), func(tx *keystore.Tx) error {
		_, err := tx.LockTiers(t.Context())
		return errors.Join(err, tx.SetTier(t.Context(), apikey.Free, apikey.Limits{PerMinute: 4, Burst: 4, Concurrent: 4}))
	})
	if err != nil {
		t.Fatal(err)
	}
	third := snapshot(t, store, second.Text)
	if len(third.Changes) != 0 || third.Tiers[apikey.Free] != (apikey.Limits{PerMinute: 4, Burst: 4, Concurrent: 4}) {
		t.Errorf("%d changes, tiers %+v", len(third.Changes), third.Tiers)
	}
}

func TestKeyThatIsMadeWhileItsAccountGetsAnotherTierIsNotMissed(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	start := snapshot(t, store, "")
	slow := connect(t, databaseURL)
	exec(t, slow, "begin")
	exec(t, slow, `insert into rekall.account_limits (account, tier) values ('acme', 'pro')`)
	key := insert(t, store, inProduction)
	between := snapshot(t, store, start.Text)
	if r := change(between, key); r == nil || r.Limits != apikey.LimitsRef(apikey.Free) {
		t.Fatalf("before the commit %+v", r)
	}
	exec(t, slow, "commit")
	if r := change(snapshot(t, store, between.Text), key); r == nil || r.Limits != apikey.LimitsRef(apikey.Pro) {
		t.Errorf("after the commit %+v", r)
	}
}

func TestChangedLimitsAreReadByIndex(t *testing.T) {
	databaseURL := database(t)
	conn := connect(t, databaseURL)
	exec(t, conn, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(i::text, 22, '0'), 'account ' || i, 'Key', 'production', sha256(i::text::bytea), '{}'
		from generate_series(1, 20000) i`)
	exec(t, conn, `insert into rekall.account_limits (account, tier) select account, 'pro' from rekall.api_keys`)
	exec(t, conn, `insert into rekall.key_limits (key_id, concurrent_requests) select id, 5 from rekall.api_keys`)
	store := open(t, databaseURL, keystore.Options{})
	since := snapshot(t, store, "").Text
	for _, analyzed := range []bool{false, true} {
		if analyzed {
			exec(t, conn, "analyze rekall.api_keys, rekall.account_limits, rekall.key_limits")
		}
		for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
			exec(t, conn, "set plan_cache_mode = "+mode)
			plan := explain(t, conn, "", since)
			for _, index := range []string{"api_keys_change_xid", "account_limits_change_xid", "key_limits_change_xid"} {
				if !strings.Contains(plan, index) {
					t.Errorf("analyzed %v, %s: no %s in\n%s", analyzed, mode, index, plan)
				}
			}
			for _, table := range []string{"api_keys", "account_limits", "key_limits"} {
				if strings.Contains(plan, "Seq Scan on "+table) {
					t.Errorf("analyzed %v, %s: all of %s in\n%s", analyzed, mode, table, plan)
				}
			}
		}
	}
}

func TestLimitsCannotBeRemovedRenamedOrMadeSenseless(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	setAccountLimits(t, store, keystore.AccountLimits{Account: "acme", Tier: apikey.Pro})
	setKeyLimits(t, store, keystore.KeyLimits{KeyID: key.ID, Own: apikey.Limits{Concurrent: 1}})
	const foreignKeyViolation, notNullViolation = "23503", "23502"
	for sql, want := range map[string]string{
		`delete from rekall.tiers where name = 'enterprise'`:                                                        "RK005",
		`delete from rekall.account_limits`:                                                                         "RK005",
		`delete from rekall.key_limits`:                                                                             "RK005",
		`truncate rekall.key_limits`:                                                                                "RK005",
		`truncate rekall.account_limits`:                                                                            "RK005",
		`truncate rekall.tiers cascade`:                                                                             "RK005",
		`update rekall.tiers set name = 'free' where name = 'enterprise'`:                                           "RK005",
		`update rekall.account_limits set account = 'other'`:                                                        "RK005",
		`update rekall.key_limits set key_id = 'key_0000000000000000000000'`:                                        "RK005",
		`set session_replication_role = replica; delete from rekall.account_limits`:                                 "RK005",
		`insert into rekall.tiers (name, requests_per_minute, burst, concurrent_requests) values ('gold', 1, 1, 1)`: checkViolation,
		`update rekall.tiers set requests_per_minute = 0`:                                                           checkViolation,
		`update rekall.tiers set concurrent_requests = 0`:                                                           checkViolation,
		`update rekall.tiers set burst = 24 where name = 'free'`:                                                    checkViolation,
		`update rekall.tiers set requests_per_minute = null`:                                                        checkViolation,
		`update rekall.account_limits set tier = 'sandbox'`:                                                         checkViolation,
		`update rekall.account_limits set tier = 'gold'`:                                                            foreignKeyViolation,
		`update rekall.account_limits set tier = null`:                                                              notNullViolation,
		`update rekall.account_limits set requests_per_minute = 5`:                                                  checkViolation,
		`update rekall.account_limits set burst = 5`:                                                                checkViolation,
		`update rekall.account_limits set requests_per_minute = -5, burst = 5`:                                      checkViolation,
		`insert into rekall.account_limits (account) values (' acme')`:                                              checkViolation,
		`update rekall.key_limits set requests_per_minute = 400, burst = 99`:                                        checkViolation,
		`update rekall.key_limits set concurrent_requests = 1000001`:                                                checkViolation,
		`insert into rekall.key_limits (key_id) values ('key_short')`:                                               checkViolation,
	} {
		if err := pgtest.TryExec(databaseURL, sql); sqlState(err) != want {
			t.Errorf("%s: %v, want %s", sql, err, want)
		}
	}
}

func TestRolesSufficeForLimits(t *testing.T) {
	databaseURL, roles := granted(t)
	edge := open(t, pgtest.Login(t, databaseURL, roles.Edge), keystore.Options{})
	admin := open(t, pgtest.Login(t, databaseURL, roles.Admin), keystore.Options{})
	key := insert(t, admin, inProduction)
	start := snapshot(t, edge, "")
	setAccountLimits(t, admin, keystore.AccountLimits{Account: key.Account, Tier: apikey.Pro})
	setKeyLimits(t, admin, keystore.KeyLimits{KeyID: key.ID, Own: apikey.Limits{Concurrent: 1}})
	err := admin.Change(t.Context(), func(tx *keystore.Tx) error {
		tiers, err := tx.LockTiers(t.Context())
		return errors.Join(err, tx.SetTier(t.Context(), apikey.Pro, tiers[apikey.Pro]))
	})
	if err != nil {
		t.Error(err)
	}
	if r := change(snapshot(t, edge, start.Text), key); r == nil || documented.Of(r.Limits) != (apikey.Limits{PerMinute: 1000, Burst: 1500, Concurrent: 1}) {
		t.Errorf("an edge reads %+v", r)
	}
}

package keyadmin_test

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func TestUsageHasTotalsHoursDaysAndSpikes(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	key := create(t, admin, request())
	pgtest.Exec(t, databaseURL, `insert into rekall.usage (key_id, hour, outcome, count) values
		($1, '2026-03-01 09:00Z', 'allowed', 1000), -- before the range
		($1, '2026-03-01 22:00Z', 'allowed', 10),
		($1, '2026-03-01 22:00Z', 'expired', 1),
		($1, '2026-03-01 23:00Z', 'revoked', 5),
		($1, '2026-03-02 00:00Z', 'allowed', 500),
		($1, '2026-03-02 00:00Z', 'expired', 2),
		($1, '2026-03-02 05:00Z', 'allowed', 1000), -- after it
		('key_0000000000000000000000', '2026-03-02 00:00Z', 'allowed', 7)`, key.ID)
	pgtest.Exec(t, databaseURL, `insert into rekall.spikes (key_id, hour, threshold) values ($1, '2026-03-02 00:00Z', 100)`, key.ID)
	pgtest.Exec(t, databaseURL, `insert into rekall.last_used values ($1, '2026-02-01 00:00Z', '2026-03-02 05:30Z')`, key.ID)

	got, err := admin.Usage(t.Context(), operator, key.ID, "2026-03-01T22:45:00Z", "2026-03-02T05:00:00Z")
	if err != nil {
		t.Fatal(err)
	}
	want := `{
	"id": "` + key.ID + `",
	"from": "2026-03-01T22:00:00Z",
	"to": "2026-03-02T05:00:00Z",
	"first_used_at": "2026-02-01T00:00:00Z",
	"last_used_at": "2026-03-02T05:30:00Z",
	"total": {"allowed": 510, "denied": 8, "denied_by_reason": {"expired": 3, "revoked": 5}},
	"hourly": [
		{"hour": "2026-03-01T22:00:00Z", "allowed": 10, "denied": 1, "denied_by_reason": {"expired": 1}, "spike": false, "spike_threshold": null},
		{"hour": "2026-03-01T23:00:00Z", "allowed": 0, "denied": 5, "denied_by_reason": {"revoked": 5}, "spike": false, "spike_threshold": null},
		{"hour": "2026-03-02T00:00:00Z", "allowed": 500, "denied": 2, "denied_by_reason": {"expired": 2}, "spike": true, "spike_threshold": 100}
	],
	"daily": [
		{"date": "2026-03-01", "allowed": 10, "denied": 6, "denied_by_reason": {"expired": 1, "revoked": 5}, "spike": false},
		{"date": "2026-03-02", "allowed": 500, "denied": 2, "denied_by_reason": {"expired": 2}, "spike": true}
	]}`
	if diff := cmp.Diff(decoded(t, want), decoded(t, encoded(t, got))); diff != "" {
		t.Error(diff)
	}
}

func encoded(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func decoded(t *testing.T, text string) (value any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		t.Fatal(err)
	}
	return value
}

func TestUsageOfAnUnusedKeyIsEmpty(t *testing.T) {
	admin, _, _ := newAdmin(t)
	got, err := admin.Usage(t.Context(), operator, create(t, admin, request()).ID, "", "")
	if err != nil {
		t.Fatal(err)
	}
	if got.Hourly == nil || got.Daily == nil || got.Total.DeniedByReason == nil || len(got.Hourly) != 0 || got.LastUsedAt != nil {
		t.Errorf("got %+v", got)
	}
	if days := got.To.Sub(got.From).Hours() / 24; days < 30 || days > 30.1 {
		t.Errorf("the range has %v days", days)
	}
}

func text(t time.Time) string { return t.Format(time.RFC3339Nano) }

func TestUsageReachesBack366Days(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	key := create(t, admin, request())
	to := time.Date(2026, 3, 2, 5, 30, 0, 0, time.UTC)
	from := to.Add(-366 * 24 * time.Hour)
	pgtest.Exec(t, databaseURL, `insert into rekall.usage (key_id, hour, outcome, count) values ($1, date_trunc('hour', $2::timestamptz), 'allowed', 7)`, key.ID, from)
	got, err := admin.Usage(t.Context(), operator, key.ID, text(from), text(to))
	if err != nil || got.Total.Allowed != 7 {
		t.Errorf("%d requests, want 7: %v", got.Total.Allowed, err)
	}
	if _, err := admin.Usage(t.Context(), operator, key.ID, text(from.Add(-time.Hour)), text(to)); err == nil {
		t.Error("an hour more was not refused")
	}
}

func TestUsageRefusesUnknownKeysAndBadRanges(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key := create(t, admin, request())
	now := time.Now()
	for _, id := range []string{"key_0000000000000000000000", key.Key.Reveal(), ""} {
		if _, err := admin.Usage(t.Context(), operator, id, "", text(now)); !errors.Is(err, keyadmin.ErrNotFound) {
			t.Errorf("got %v", err)
		}
	}
	for name, from := range map[string]time.Time{"empty": now.Add(time.Hour), "too long": now.Add(-367 * 24 * time.Hour)} {
		var invalid *keyadmin.InvalidError
		if _, err := admin.Usage(t.Context(), operator, key.ID, text(from), text(now)); !errors.As(err, &invalid) || invalid.Field != "from" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUsageRefusesTimesThatJSONCannotTell(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key := create(t, admin, request())
	for _, test := range []struct{ field, from, to string }{
		{"to", "9998-12-31T20:00:00Z", "9999-12-31T23:59:59-23:59"},
		{"from", "0000-01-01T00:00:00+23:59", "0000-01-02T00:00:00Z"},
	} {
		_, err := admin.Usage(t.Context(), operator, key.ID, test.from, test.to)
		var invalid *keyadmin.InvalidError
		if !errors.As(err, &invalid) || invalid.Field != test.field {
			t.Errorf("from %s to %s: %v", test.from, test.to, err)
		}
	}
}

// TestCountsThatAnEdgeMadeUpAddUpToNoNegativeNumber, were they of every hour of a year and of every outcome.
func TestCountsThatAnEdgeMadeUpAddUpToNoNegativeNumber(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	key := create(t, admin, request())
	pgtest.Exec(t, databaseURL, `insert into rekall.usage (key_id, hour, outcome, count)
		select $1, hour, outcome, 9223372036854775807 from generate_series('2026-01-01 00:00Z', '2026-12-31 23:00Z', interval '1 hour') hour,
			unnest(array['allowed', 'revoked', 'expired', 'scope_insufficient', 'environment_mismatch', 'rate_limited']) outcome`, key.ID)
	got, err := admin.Usage(t.Context(), operator, key.ID, "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z")
	if err != nil || len(got.Hourly) != 365*24 {
		t.Fatalf("%d hours, %v", len(got.Hourly), err)
	}
	counts := []keyadmin.UsageCounts{got.Total}
	for _, day := range got.Daily {
		counts = append(counts, day.UsageCounts)
	}
	for _, hour := range got.Hourly {
		counts = append(counts, hour.UsageCounts)
	}
	for _, c := range counts {
		if sum := c.Allowed + c.Denied; c.Allowed <= 0 || c.Denied <= c.Allowed || 100*sum/100 != sum {
			t.Fatalf("%+v", c)
		}
	}
}

func TestUsageOfManyKeysIsEachOnesOwnAndWithinReach(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	ours, idle := create(t, admin, request()), create(t, admin, request())
	other := request()
	other.Account = "other"
	theirs := create(t, admin, other)
	pgtest.Exec(t, databaseURL, `insert into rekall.usage (key_id, hour, outcome, count) values
		($1, date_trunc('hour', now()) - interval '3 hours', 'allowed', 7),
		($1, date_trunc('hour', now()), 'allowed', 10),
		($2, date_trunc('hour', now()), 'allowed', 5)`, ours.ID, theirs.ID)
	pgtest.Exec(t, databaseURL, `insert into rekall.spikes (key_id, hour, threshold) values ($1, date_trunc('hour', now()), 9)`, ours.ID)
	person, err := keyadmin.Person("ann", ours.Account)
	if err != nil {
		t.Fatal(err)
	}
	anHourAgo := func(now time.Time) time.Time { return now.Add(-time.Hour) }
	got, err := admin.UsageSince(t.Context(), person, []string{ours.ID, idle.ID, theirs.ID, "nonsense"}, anHourAgo)
	if err != nil || len(got) != 2 {
		t.Fatalf("usage of %d keys, error %v", len(got), err)
	}
	if used, unused := got[ours.ID], got[idle.ID]; used.Total.Allowed != 10 || !used.Daily[0].Spike || unused.Total.Allowed != 0 || unused.From != used.From {
		t.Errorf("%+v", got)
	}
}

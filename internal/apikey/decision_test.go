package apikey_test

import (
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

func TestDecideTable(t *testing.T) {
	now := time.Date(2025, 11, 23, 12, 0, 0, 0, time.UTC)
	const read, write = apikey.MemoriesRead, apikey.MemoriesWrite
	record := func(scopes apikey.Scopes, expires, revoked time.Time) *apikey.Record {
		return &apikey.Record{ID: "1", Environment: apikey.Production, Scopes: scopes, ExpiresAt: apikey.TimeOf(expires), RevokedAt: apikey.TimeOf(revoked)}
	}
	var never time.Time
	for _, tt := range []struct {
		name     string
		record   *apikey.Record
		validity apikey.Outcome
		decision apikey.Outcome // with memories:read required
	}{
		{"unknown to Postgres", nil, apikey.Unknown, apikey.Unknown},
		{"good", record(read, never, never), apikey.Allowed, apikey.Allowed},
		{"good, more scopes than needed", record(read|write, never, never), apikey.Allowed, apikey.Allowed},
		{"other scope", record(write, never, never), apikey.Allowed, apikey.Insufficient},
		{"no scopes", record(0, never, never), apikey.Allowed, apikey.Insufficient},
		{"every other scope", record(apikey.AllScopes&^read, never, never), apikey.Allowed, apikey.Insufficient},
		{"one microsecond before expiry", record(read, now.Add(time.Microsecond), never), apikey.Allowed, apikey.Allowed},
		{"the instant of expiry", record(read, now, never), apikey.Expired, apikey.Expired},
		{"the instant of expiry, in another zone", record(read, now.In(time.FixedZone("", 3600)), never), apikey.Expired, apikey.Expired},
		{"one microsecond after expiry", record(read, now.Add(-time.Microsecond), never), apikey.Expired, apikey.Expired},
		{"expired, without the scope", record(write, now.Add(-time.Microsecond), never), apikey.Expired, apikey.Expired},
		{"revoked", record(read, never, now.Add(-time.Hour)), apikey.Revoked, apikey.Revoked},
		{"revoked now", record(read, never, now), apikey.Revoked, apikey.Revoked},
		{"revoked by a clock that is ahead", record(read, never, now.Add(time.Hour)), apikey.Revoked, apikey.Revoked},
		{"revoked, without the scope", record(write, never, now), apikey.Revoked, apikey.Revoked},
		{"revoked before it expires", record(read, now.Add(time.Hour), now.Add(-time.Hour)), apikey.Revoked, apikey.Revoked},
		{"expired, then revoked", record(read, now.Add(-2*time.Hour), now.Add(-time.Hour)), apikey.Revoked, apikey.Revoked},
		{"revoked, then expired", record(read, now.Add(-time.Hour), now.Add(-2*time.Hour)), apikey.Revoked, apikey.Revoked},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.record.Validity(now); got != tt.validity {
				t.Errorf("Validity = %v, want %v", got, tt.validity)
			}
			if got := tt.record.Decide(now, read); got != tt.decision {
				t.Errorf("Decide = %v, want %v", got, tt.decision)
			}
		})
	}
}

func TestDecideAllowsOnlySetsThatHoldTheRequiredScope(t *testing.T) {
	now := time.Date(2025, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, has := range documented {
		for _, needs := range documented {
			want := apikey.Insufficient
			if has.name == needs.name {
				want = apikey.Allowed
			}
			if got := (&apikey.Record{Scopes: has.scope}).Decide(now, needs.scope); got != want {
				t.Errorf("a key with %s for %s: %v", has.name, needs.name, got)
			}
		}
	}
}

func TestTheZeroOutcomeIsNotAllowed(t *testing.T) {
	var zero apikey.Outcome
	if zero == apikey.Allowed || zero != apikey.Unavailable {
		t.Errorf("the zero outcome is %v", zero)
	}
}

func TestOutcomeNamesAreUniqueAndNotEmpty(t *testing.T) {
	seen := make(map[string]apikey.Outcome)
	for o := range apikey.OutcomeCount {
		name := o.String()
		if name == "" || name == "invalid" {
			t.Errorf("outcome %d is named %q", o, name)
		}
		if other, ok := seen[name]; ok {
			t.Errorf("outcomes %d and %d are both named %q", other, o, name)
		}
		seen[name] = o
	}
	for _, o := range []apikey.Outcome{apikey.OutcomeCount, 255} {
		if o.String() != "invalid" {
			t.Errorf("outcome %d is named %q", o, o)
		}
	}
}

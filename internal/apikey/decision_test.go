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
			request := apikey.Request{Environment: apikey.Production, Required: read, Covered: true}
			if got := tt.record.Decide(now, request); got != tt.decision {
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
			record := &apikey.Record{Environment: apikey.Sandbox, Scopes: has.scope}
			if got := record.Decide(now, apikey.Request{Environment: apikey.Sandbox, Required: needs.scope, Covered: true}); got != want {
				t.Errorf("a key with %s for %s: %v", has.name, needs.name, got)
			}
		}
	}
}

// TestDecideNamesTheFirstOfWhatIsWrong: a key that has ended is told nothing of the route, and one of the other environment nothing of
// its scopes.
func TestDecideNamesTheFirstOfWhatIsWrong(t *testing.T) {
	now := time.Date(2025, 11, 23, 12, 0, 0, 0, time.UTC)
	good := &apikey.Record{Environment: apikey.Sandbox, Scopes: apikey.AllScopes}
	ended := &apikey.Record{Environment: apikey.Sandbox, Scopes: apikey.AllScopes, RevokedAt: apikey.TimeOf(now)}
	bare := &apikey.Record{Environment: apikey.Sandbox}
	const needs = apikey.MemoriesRead
	for name, tt := range map[string]struct {
		record  *apikey.Record
		request apikey.Request
		want    apikey.Outcome
	}{
		"good":                              {good, apikey.Request{Environment: apikey.Sandbox, Required: needs, Covered: true}, apikey.Allowed},
		"revoked, and all else is wrong":    {ended, apikey.Request{Environment: apikey.Production}, apikey.Revoked},
		"of the other environment":          {good, apikey.Request{Environment: apikey.Production, Required: needs, Covered: true}, apikey.Mismatch},
		"of an environment not served":      {good, apikey.Request{Required: needs, Covered: true}, apikey.Mismatch},
		"of the other one, and not covered": {good, apikey.Request{Environment: apikey.Production}, apikey.Mismatch},
		"not covered":                       {good, apikey.Request{Environment: apikey.Sandbox}, apikey.NotCovered},
		"not covered, without scopes":       {bare, apikey.Request{Environment: apikey.Sandbox, Required: needs}, apikey.NotCovered},
		"without the scope":                 {bare, apikey.Request{Environment: apikey.Sandbox, Required: needs, Covered: true}, apikey.Insufficient},
	} {
		if got := tt.record.Decide(now, tt.request); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
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

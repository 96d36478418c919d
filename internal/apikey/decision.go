package apikey

import "time"

// Record is what an edge knows of a key. It is immutable: a change makes a new one. It has no name and no key. An edge holds
// up to millions of them, so its fields are ordered and sized for memory.
type Record struct {
	ID          string
	Account     string
	Digest      Digest
	ExpiresAt   Time // zero: never
	RevokedAt   Time // zero: not revoked
	Scopes      Scopes
	ManageKeys  bool // may manage the keys of its account
	Environment Environment
	Limits      LimitsRef
}

// Outcome is the result of a decision: a closed set, which is also the label of rekall_decisions_total. A check of rekall.usage lists them:
// one that is added needs a migration that adds it there.
type Outcome uint8

// The outcomes. Only Allowed lets a request pass; the zero value does not.
const (
	Unavailable   Outcome = iota // nobody can tell: 503, never 401
	Allowed                      // the key is good and has the scope
	Missing                      // no credential in the request
	Malformed                    // a credential that cannot be a key
	TokenType                    // an OAuth access token, which the gateway does not check
	Ambiguous                    // different credentials in several places
	Unknown                      // Postgres has no such key
	Revoked                      // revoked for good
	Expired                      // past its expiry by Postgres's clock
	Mismatch                     // no backend for the key's environment at this site
	NotCovered                   // no scope rule covers the request
	Insufficient                 // the key lacks the scope
	PathInvalid                  // the path has more than one reading
	MethodInvalid                // a method that no rule can cover: TRACE, CONNECT, unknown ones
	RateLimited                  // more requests than the key, or an address without a good key, may send
	Abandoned                    // the client left before anybody could tell

	OutcomeCount // the number of outcomes, for tables indexed by one
)

var outcomeNames = [OutcomeCount]string{
	Unavailable: "unavailable", Allowed: "allowed", Missing: "missing", Malformed: "malformed", TokenType: "token_type",
	Ambiguous: "ambiguous", Unknown: "unknown", Revoked: "revoked", Expired: "expired", Mismatch: "environment_mismatch",
	NotCovered: "not_covered", Insufficient: "scope_insufficient", PathInvalid: "path_invalid", MethodInvalid: "method_invalid",
	RateLimited: "rate_limited", Abandoned: "abandoned",
}

// String returns the outcome as metrics and logs write it.
func (o Outcome) String() string {
	if o >= OutcomeCount {
		return "invalid"
	}
	return outcomeNames[o]
}

// Validity decides whether the key may be used at all at now, which must be a reading of Postgres's clock: an edge's own
// clock must neither revive an expired key nor refuse a good one. A nil record is a key that Postgres does not know.
func (r *Record) Validity(now time.Time) Outcome {
	switch {
	case r == nil:
		return Unknown
	case !r.RevokedAt.IsZero():
		return Revoked
	case r.ExpiresAt.Reached(now):
		return Expired
	}
	return Allowed
}

// Request is what is decided on besides the key.
type Request struct {
	Environment Environment // where it leads, by the prefix of the key; zero: nowhere
	Required    Scopes      // that it takes
	Covered     bool        // whether a rule covers it
}

// Decide decides on a request with the key at now, as Validity has it.
func (r *Record) Decide(now time.Time, request Request) Outcome {
	outcome := r.Validity(now)
	switch {
	case outcome != Allowed:
		return outcome
	// The prefix decides. A row that says otherwise was imported wrongly, and is not to be believed.
	case r.Environment != request.Environment:
		return Mismatch
	case !request.Covered:
		return NotCovered
	case !r.Scopes.Has(request.Required):
		return Insufficient
	}
	return Allowed
}

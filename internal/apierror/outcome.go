package apierror

import (
	"net/http"

	"github.com/rekall-ai/gateway/internal/apikey"
)

const realm = `Bearer realm="rekall"`

func invalidToken(description string) string {
	return realm + `, error="invalid_token", error_description="` + description + `"`
}

// Of returns how an outcome is answered that is not Allowed.
func Of(o apikey.Outcome) *Error { return outcomes[o] }

// outcomes has an entry for every outcome but Allowed. Malformed and Unknown say the same: the difference would tell a guesser
// something and an honest client nothing.
var outcomes = [apikey.OutcomeCount]*Error{
	apikey.Unavailable: unavailable,
	apikey.Abandoned:   unavailable, // to a client that has left
	apikey.Missing: challenge(http.StatusUnauthorized, "API_KEY_MISSING",
		"No API key given. Send it as 'Authorization: Bearer rk_…' or 'x-api-key: rk_…'.", realm),
	apikey.Malformed: invalidKey,
	apikey.Unknown:   invalidKey,
	apikey.TokenType: challenge(http.StatusUnauthorized, "TOKEN_TYPE_UNSUPPORTED",
		"OAuth access tokens (rat_…) are not accepted here. Use an API key (rk_…).", invalidToken("an API key is required")),
	apikey.Revoked: challenge(http.StatusUnauthorized, "API_KEY_REVOKED",
		"This API key has been revoked. Create a new one.", invalidToken("the API key has been revoked")),
	apikey.Expired: challenge(http.StatusUnauthorized, "API_KEY_EXPIRED",
		"This API key has expired. Create a new one.", invalidToken("the API key has expired")),
	apikey.Ambiguous: New(http.StatusBadRequest, "API_KEY_AMBIGUOUS",
		"The request carries different credentials in several places. Send one API key in one place."),
	apikey.PathInvalid: New(http.StatusBadRequest, "PATH_INVALID",
		"The request path is not in canonical form. "+
			"Send it without '.', '..', empty segments, needless percent-encoding or an API key, and the query without spaces."),
	apikey.MethodInvalid: New(http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED", "This request method is not supported."),
	apikey.Mismatch: New(http.StatusForbidden, "SANDBOX_PRODUCTION_MISMATCH",
		"This API key belongs to the other environment. Use a key of the environment that this address serves."),
	apikey.NotCovered: New(http.StatusForbidden, "ROUTE_NOT_COVERED", "No scope covers this request, so no API key may send it."),
	apikey.Insufficient: challenge(http.StatusForbidden, "SCOPE_INSUFFICIENT",
		"This API key lacks the scope that the request needs.", realm+`, error="insufficient_scope"`),
	apikey.RateLimited: New(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
		"This API key has sent too many requests. Try again after the time in Retry-After."),
}

var unavailable = New(http.StatusServiceUnavailable, "AUTH_UNAVAILABLE", "The API key cannot be checked right now. Try again shortly.")

var invalidKey = challenge(http.StatusUnauthorized, "API_KEY_INVALID",
	"This API key is not valid. Check that it was copied completely. "+
		"Programs send it as 'Authorization: Bearer rk_…' or 'x-api-key: rk_…'.", invalidToken("the API key is not valid"))

// InsufficientScope is the answer to an Insufficient request, with the scope that it needs.
func InsufficientScope(required apikey.Scopes) *Error {
	e := outcomes[apikey.Insufficient].With(map[string]any{"required_scope": required.String()})
	e.Authenticate += `, scope="` + required.String() + `"`
	return e
}

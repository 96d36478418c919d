package caddymodule

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"strconv"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// An answer is how the gateway says an outcome to the client, in Rekall's error envelope.
type answer struct {
	status       int
	code         string
	message      string
	authenticate string // WWW-Authenticate challenge (RFC 6750, section 3)
	body         []byte // without details, up to where the request id goes: a flood of refusals is not encoded one by one
}

func newAnswer(status int, code, message, authenticate string) answer {
	a := answer{status: status, code: code, message: message, authenticate: authenticate}
	a.body = bytes.TrimSuffix(a.encode("", nil), []byte(afterRequestID))
	return a
}

// afterRequestID ends every body: the request id is the last field of both objects.
const afterRequestID = `"}}` + "\n"

func (a answer) encode(requestID string, details map[string]any) []byte {
	if details == nil {
		details = map[string]any{}
	}
	body, err := json.Marshal(envelope{envelopeError{a.code, a.message, a.status, details, requestID}})
	if err != nil {
		panic(err) // strings and a number always encode
	}
	return append(body, '\n')
}

const realm = `Bearer realm="rekall"`

func invalidToken(description string) string {
	return realm + `, error="invalid_token", error_description="` + description + `"`
}

// unavailable is also what is written to a client that has left.
var unavailable = newAnswer(http.StatusServiceUnavailable, "AUTH_UNAVAILABLE", "The API key cannot be checked right now. Try again shortly.", "")

// answers has an entry for every outcome but Allowed. Malformed and Unknown say the same: the difference would tell a
// guesser something and an honest client nothing.
var answers = [apikey.OutcomeCount]answer{
	apikey.Unavailable: unavailable,
	apikey.Abandoned:   unavailable,
	apikey.Missing: newAnswer(http.StatusUnauthorized, "API_KEY_MISSING",
		"No API key given. Send it as 'Authorization: Bearer rk_…' or 'x-api-key: rk_…'.", realm),
	apikey.Malformed: invalidKey,
	apikey.Unknown:   invalidKey,
	apikey.TokenType: newAnswer(http.StatusUnauthorized, "TOKEN_TYPE_UNSUPPORTED",
		"OAuth access tokens (rat_…) are not accepted here. Use an API key (rk_…).", invalidToken("an API key is required")),
	apikey.Revoked: newAnswer(http.StatusUnauthorized, "API_KEY_REVOKED",
		"This API key has been revoked. Create a new one.", invalidToken("the API key has been revoked")),
	apikey.Expired: newAnswer(http.StatusUnauthorized, "API_KEY_EXPIRED",
		"This API key has expired. Create a new one.", invalidToken("the API key has expired")),
	apikey.Ambiguous: newAnswer(http.StatusBadRequest, "API_KEY_AMBIGUOUS",
		"The request carries different credentials in several places. Send one API key in one place.", ""),
	apikey.PathInvalid: newAnswer(http.StatusBadRequest, "PATH_INVALID",
		"The request path is not in canonical form. Send it without '.', '..', empty segments, needless percent-encoding or an API key, and the query without spaces.", ""),
	apikey.MethodInvalid: newAnswer(http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED", "This request method is not supported.", ""),
	apikey.Mismatch: newAnswer(http.StatusForbidden, "SANDBOX_PRODUCTION_MISMATCH",
		"This API key belongs to the other environment. Use a key of the environment that this address serves.", ""),
	apikey.NotCovered: newAnswer(http.StatusForbidden, "ROUTE_NOT_COVERED", "No scope covers this request, so no API key may send it.", ""),
	apikey.Insufficient: newAnswer(http.StatusForbidden, "SCOPE_INSUFFICIENT",
		"This API key lacks the scope that the request needs.", realm+`, error="insufficient_scope"`),
	apikey.RateLimited: newAnswer(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
		"This API key has sent too many requests. Try again after the time in Retry-After.", ""),
}

// addressLimited is RateLimited where no key is to blame.
var addressLimited = newAnswer(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
	"Too many requests without a valid API key came from your address. Check the key, and try again after the time in Retry-After.", "")

var invalidKey = newAnswer(http.StatusUnauthorized, "API_KEY_INVALID",
	"This API key is not valid. Check that it was copied completely. Programs send it as 'Authorization: Bearer rk_…' or 'x-api-key: rk_…'.", invalidToken("the API key is not valid"))

// envelope is the body of every error (REKALL.md, "Answers").
type envelope struct {
	Error envelopeError `json:"error"`
}

type envelopeError struct {
	Code      string         `json:"code"`
	Message   string         `json:"message"`
	Status    int            `json:"status"`
	Details   map[string]any `json:"details"`
	RequestID string         `json:"request_id"`
}

// write sends the answer. Nothing of the request is repeated in it but the request id.
func (a answer) write(w http.ResponseWriter, requestID string, details map[string]any) {
	var body []byte
	if len(details) > 0 {
		body = a.encode(requestID, details)
	} else {
		body = append(make([]byte, 0, len(a.body)+len(requestID)+len(afterRequestID)), a.body...)
		body = append(append(body, requestID...), afterRequestID...)
	}
	h := w.Header()
	values := []string{"application/json", strconv.Itoa(len(body)), "no-store", "nosniff", requestID, a.authenticate}
	h["Content-Type"] = values[0:1:1]
	h["Content-Length"] = values[1:2:2]
	h["Cache-Control"] = values[2:3:3]
	h["X-Content-Type-Options"] = values[3:4:4]
	h["X-Request-Id"] = values[4:5:5]
	if a.authenticate != "" {
		h["Www-Authenticate"] = values[5:6:6]
	}
	switch a.status {
	case http.StatusServiceUnavailable:
		h["Retry-After"] = []string{"1"}
	case http.StatusMethodNotAllowed:
		if h["Allow"] == nil {
			h["Allow"] = []string{"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"}
		}
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(body) // the client may be gone
}

// refuse sends the answer to a request on whose key nothing was decided.
func (a answer) refuse(w http.ResponseWriter, r *http.Request) {
	requestID := newRequestID()
	logLater(r.Context(), refused{requestID, a.code})
	a.write(w, requestID, nil)
}

// onlyReads refuses a request that does not read, and reports whether it was one that does.
func onlyReads(w http.ResponseWriter, r *http.Request) bool {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return true
	}
	w.Header()["Allow"] = []string{"GET, HEAD"}
	answers[apikey.MethodInvalid].refuse(w, r)
	return false
}

// newRequestID returns "req_" and 20 characters, some 119 random bits. It identifies and does not authorise, so the runtime's
// generator is enough, and so are characters of which two are likelier than others.
func newRequestID() string {
	const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" + "01" // for six bits
	id := [24]byte{'r', 'e', 'q', '_'}
	for half := range 2 {
		random := rand.Uint64()
		for i := range 10 {
			id[4+10*half+i] = alphabet[random%64]
			random /= 64
		}
	}
	return string(id[:])
}

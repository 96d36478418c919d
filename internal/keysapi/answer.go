package keysapi

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// requestID is the header that names a request; ServeHTTP sets it.
const requestID = "X-Request-Id"

// answer is what an endpoint says.
type answer struct {
	status   int
	body     any
	raw      []byte // in place of body
	location string // of what was made; empty: none
	replayed bool
	sent     func() // to be called when it is; nil: nobody waits for that
}

// resourceBody is the envelope of one object, and collectionBody that of many (REKALL.md, "Answers").
type resourceBody struct {
	Data any `json:"data"`
}

type collectionBody struct {
	Data       any        `json:"data"`
	Pagination pagination `json:"pagination"`
}

type pagination struct {
	NextCursor *string `json:"next_cursor"`
	HasMore    bool    `json:"has_more"`
	TotalCount *int64  `json:"total_count"` // null: not counted
}

// page answers with one page of a collection.
func page(items any, nextCursor string, total *int64) answer {
	p := pagination{HasMore: nextCursor != "", TotalCount: total}
	if p.HasMore {
		p.NextCursor = &nextCursor
	}
	return answer{status: http.StatusOK, body: collectionBody{items, p}}
}

func (a answer) write(w http.ResponseWriter) {
	body := a.raw
	if body == nil {
		body = apierror.Encode(a.body) // texts, numbers, times and what was JSON in the database
	}
	if a.location != "" {
		w.Header().Set("Location", a.location)
	}
	if a.replayed {
		w.Header().Set("Idempotent-Replayed", "true")
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(a.status)
	_, _ = w.Write(body) // the client may be gone
}

var (
	errNoPath   = apierror.New(http.StatusNotFound, "NOT_FOUND", "There is nothing at this path.")
	errNotFound = apierror.New(http.StatusNotFound, "NOT_FOUND", "There is no such API key.")
	errMethod   = apierror.New(http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED",
		"This request method is not supported at this path.")

	errMismatch = apierror.New(http.StatusConflict, "IDEMPOTENCY_MISMATCH",
		"This Idempotency-Key came with another request before. Use a new one for each key.")
	errEnded = apierror.New(http.StatusConflict, "KEY_ENDED",
		"This API key is revoked or expired, which is for good. Create a new one.")
	errAlreadyRotated = apierror.New(http.StatusConflict, "KEY_ALREADY_ROTATED",
		"This API key has a successor already. Undo its rotation or revoke the successor first.")
	errAwaited = apierror.New(http.StatusConflict, "KEY_AWAITED",
		"This API key was not used yet, and the one that it replaces lives on until then. Use it first, or undo that rotation.")
	errNotRotated = apierror.New(http.StatusConflict, "KEY_NOT_ROTATED",
		"This API key is not being rotated: there is nothing to undo.")
	errTooMany = apierror.New(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
		"This account has made as many API keys as it may in 24 hours. Use those that it has, or ask the operator for more.")
	errRenamedTooOften = apierror.New(http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED",
		"This account has renamed API keys as often as it may in 24 hours. Leave their names, or ask the operator for more.")
	errCrowded = apierror.New(http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE",
		"Requests of yours or of your account that came before this one took too long. Try again shortly, with fewer at a time.")
	errUnavailable = apierror.New(http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE",
		"API keys cannot be managed right now. Try again shortly.")
)

// invalid refuses what cannot be read, and names the field it is about, if it is about one.
func invalid(field, message string) *apierror.Error {
	e := apierror.New(http.StatusBadRequest, "INVALID_REQUEST", message)
	if field != "" {
		return e.With(map[string]any{"field": field})
	}
	return e
}

// refuse answers with an error. Only what nobody foresaw is reported: the rest is the caller's, such as going away. It is logged
// for those who debug, since strangers too may ask as often as they like.
func (a *API) refuse(w http.ResponseWriter, r *http.Request, err error) {
	refusal := explain(err)
	if a.Refused != nil {
		a.Refused(r, w.Header().Get(requestID), refusal)
	}
	if refusal == errUnavailable && !errors.Is(err, context.Canceled) {
		a.Logger.Debug("API keys cannot be managed", zap.String("request_id", w.Header().Get(requestID)),
			zap.String("method", r.Method), zap.String("error", apikey.Redact(err.Error())))
		a.answered(r, err)
	}
	refusal.Write(w, w.Header().Get(requestID))
}

func (a *API) answered(r *http.Request, err error) {
	if a.Answered != nil {
		a.Answered(r, err)
	}
}

// explain finds the refusal that says an error.
func explain(err error) *apierror.Error {
	var (
		refusal   *apierror.Error
		malformed *keyadmin.InvalidError
		forbidden *keyadmin.ForbiddenError
		tooMany   *keyadmin.TooManyError
	)
	switch {
	case errors.As(err, &refusal):
		return refusal
	case errors.As(err, &malformed):
		return apierror.New(http.StatusUnprocessableEntity, "VALIDATION_FAILED", malformed.Field+" "+malformed.Reason+".").
			With(map[string]any{"field": malformed.Field})
	case errors.Is(err, keyadmin.ErrActorRevoked): // before the next, which it is too
		return apierror.Of(apikey.Revoked)
	case errors.Is(err, keyadmin.ErrActorExpired):
		return apierror.Of(apikey.Expired)
	case errors.As(err, &forbidden):
		return forbiddenError(forbidden)
	case errors.Is(err, keyadmin.ErrNotFound):
		return errNotFound
	case errors.Is(err, keyadmin.ErrIdempotencyMismatch):
		return errMismatch
	case errors.Is(err, keyadmin.ErrEnded):
		return errEnded
	case errors.Is(err, keyadmin.ErrAlreadyRotated):
		return errAlreadyRotated
	case errors.Is(err, keyadmin.ErrAwaited):
		return errAwaited
	case errors.Is(err, keyadmin.ErrNotRotated):
		return errNotRotated
	case errors.Is(err, keyadmin.ErrCrowded):
		return errCrowded
	case errors.As(err, &tooMany) && tooMany.Done == keyadmin.KeyRenamed:
		return errRenamedTooOften.Later(tooMany.RetryAfter)
	case errors.As(err, &tooMany):
		return errTooMany.Later(tooMany.RetryAfter)
	}
	return errUnavailable
}

func forbiddenError(forbidden *keyadmin.ForbiddenError) *apierror.Error {
	if forbidden.Field == "" {
		return apierror.New(http.StatusForbidden, "PERMISSION_DENIED", strings.ToUpper(forbidden.Reason[:1])+forbidden.Reason[1:]+".")
	}
	return apierror.New(http.StatusForbidden, "PERMISSION_DENIED", forbidden.Field+" "+forbidden.Reason+".").
		With(map[string]any{"field": forbidden.Field})
}

package keysapi

import (
	"cmp"
	"errors"
	"net/http"
	"strconv"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// keyBody is a key, and what there is to say of this answer.
type keyBody struct {
	keyadmin.Key
	Replayed    bool `json:"idempotent_replayed,omitempty"` // made by an earlier request; the key itself was shown then
	RevokedSelf bool `json:"revoked_self,omitempty"`        // it is the key that asked
}

func one(status int, key keyBody) answer { return answer{status: status, body: resourceBody{key}} }

// made answers with a new key, which is shown this once, or with one that an earlier request made.
func made(key keyadmin.Key, replayed bool) answer {
	if replayed {
		a := one(http.StatusOK, keyBody{Key: key, Replayed: true})
		a.replayed = true
		return a
	}
	a := one(http.StatusCreated, keyBody{Key: key})
	a.location = Root + "/" + key.ID
	return a
}

func (a *API) create(r *http.Request, actor keyadmin.Actor) (answer, error) {
	f, err := readFields(r, maxBody, "name", "environment", "scopes", "manage_keys", "expires_in", "expires_at")
	if err != nil {
		return answer{}, err
	}
	var request keyadmin.CreateRequest
	if err := cmp.Or(
		f.text("name", &request.Name),
		f.option("environment", &request.Environment),
		f.texts("scopes", &request.Scopes),
		f.flag("manage_keys", &request.ManageKeys),
		f.option("expires_in", &request.ExpiresIn),
		f.option("expires_at", &request.ExpiresAt),
	); err != nil {
		return answer{}, err
	}
	if request.IdempotencyKey, err = idempotencyKey(r.Header); err != nil {
		return answer{}, err
	}
	key, replayed, err := a.Admin.Create(r.Context(), actor, request)
	if err != nil {
		return answer{}, err
	}
	return made(key, replayed), nil
}

// idempotencyKey reads the header. An empty one is a mistake in a client that believes its retries to be harmless.
func idempotencyKey(h http.Header) (string, error) {
	const name = "Idempotency-Key"
	values := h[name]
	if len(values) == 0 {
		return "", nil
	}
	if len(values) > 1 || values[0] == "" {
		return "", invalid(name, name+" must be given once and not be empty.")
	}
	return values[0], nil
}

func (a *API) list(r *http.Request, actor keyadmin.Actor) (answer, error) {
	query, err := readQuery(r, "environment", "status", "name", "limit", "cursor")
	if err != nil {
		return answer{}, err
	}
	found, err := a.Admin.List(r.Context(), actor, keyadmin.ListRequest{
		Environment: query.Get("environment"), Status: query.Get("status"), Name: query.Get("name"),
		Limit: parseLimit(query.Get("limit")), Cursor: query.Get("cursor"), WithTotal: true,
	})
	if err != nil {
		return answer{}, err
	}
	return page(found.Keys, found.NextCursor, found.Total), nil
}

// parseLimit returns 0 for the longest page if no limit is given, and a limit that keyadmin refuses for what is none.
func parseLimit(s string) int {
	if s == "" {
		return 0
	}
	limit, err := strconv.Atoi(s)
	if err != nil || limit == 0 {
		return -1
	}
	return limit
}

func (a *API) get(r *http.Request, actor keyadmin.Actor) (answer, error) {
	if _, err := readQuery(r); err != nil {
		return answer{}, err
	}
	key, err := a.Admin.Get(r.Context(), actor, r.PathValue("id"))
	if err != nil {
		return answer{}, err
	}
	return one(http.StatusOK, keyBody{Key: key}), nil
}

func (a *API) rename(r *http.Request, actor keyadmin.Actor) (answer, error) {
	f, err := readFields(r, maxBody, "name")
	if err != nil {
		return answer{}, err
	}
	var name string
	if err := f.text("name", &name); err != nil {
		return answer{}, err
	}
	key, err := a.Admin.Rename(r.Context(), actor, r.PathValue("id"), name)
	if err != nil {
		return answer{}, err
	}
	return one(http.StatusOK, keyBody{Key: key}), nil
}

// revoke answers the same however often it is asked: a retry must not look like a failure.
func (a *API) revoke(r *http.Request, actor keyadmin.Actor) (answer, error) {
	if _, err := readFields(r, maxBody); err != nil {
		return answer{}, err
	}
	key, err := a.Admin.Revoke(r.Context(), actor, r.PathValue("id"))
	if err != nil && !errors.Is(err, keyadmin.ErrAlreadyRevoked) {
		return answer{}, err
	}
	return one(http.StatusOK, keyBody{Key: key, RevokedSelf: key.ID == actor.KeyID()}), nil
}

func (a *API) rotate(r *http.Request, actor keyadmin.Actor) (answer, error) {
	f, err := readFields(r, maxBody, "overlap")
	if err != nil {
		return answer{}, err
	}
	var text string
	if err := f.option("overlap", &text); err != nil {
		return answer{}, err
	}
	var request keyadmin.RotateRequest
	if request.Overlap, err = keyadmin.ParseOverlap(text); err != nil {
		return answer{}, err
	}
	if request.IdempotencyKey, err = idempotencyKey(r.Header); err != nil {
		return answer{}, err
	}
	successor, replayed, err := a.Admin.Rotate(r.Context(), actor, r.PathValue("id"), request)
	if err != nil {
		return answer{}, err
	}
	return made(successor, replayed), nil
}

func (a *API) undoRotation(r *http.Request, actor keyadmin.Actor) (answer, error) {
	if _, err := readFields(r, maxBody); err != nil {
		return answer{}, err
	}
	key, _, err := a.Admin.UndoRotation(r.Context(), actor, r.PathValue("id"))
	if err != nil {
		return answer{}, err
	}
	return one(http.StatusOK, keyBody{Key: key}), nil
}

func (a *API) usage(r *http.Request, actor keyadmin.Actor) (answer, error) {
	query, err := readQuery(r, "from", "to")
	if err != nil {
		return answer{}, err
	}
	used, err := a.Admin.Usage(r.Context(), actor, r.PathValue("id"), query.Get("from"), query.Get("to"))
	if err != nil {
		return answer{}, err
	}
	return answer{status: http.StatusOK, body: resourceBody{used}}, nil
}

func (a *API) audit(r *http.Request, actor keyadmin.Actor) (answer, error) {
	return a.auditOf(r, actor, "")
}

// auditOfKey looks for the key first: of one that is not the caller's there is no empty audit.
func (a *API) auditOfKey(r *http.Request, actor keyadmin.Actor) (answer, error) {
	id := r.PathValue("id")
	if _, err := a.Admin.Get(r.Context(), actor, id); err != nil {
		return answer{}, err
	}
	return a.auditOf(r, actor, id)
}

func (a *API) auditOf(r *http.Request, actor keyadmin.Actor, id string) (answer, error) {
	query, err := readQuery(r, "actor", "action", "since", "until", "limit", "cursor")
	if err != nil {
		return answer{}, err
	}
	found, err := a.Admin.Audit(r.Context(), actor, keyadmin.AuditRequest{
		KeyID: id, Actor: query.Get("actor"), Action: query.Get("action"), Since: query.Get("since"), Until: query.Get("until"),
		Limit: parseLimit(query.Get("limit")), Cursor: query.Get("cursor"),
	})
	if err != nil {
		return answer{}, err
	}
	return page(found.Entries, found.NextCursor, nil), nil
}

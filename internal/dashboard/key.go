package dashboard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// keyData is the page of a key.
type keyData struct {
	Key      keyadmin.Key
	Limits   keyadmin.Limits
	Marks    []mark
	Known    bool // whether the usage could be read
	Usage    keyadmin.Usage
	Range    string
	Chart    chart
	Reasons  []reason
	History  []keyadmin.AuditEntry
	Earlier  bool // there is more history than is shown
	Rotation *rotation
	Heir     *keyadmin.Key // what lives on of a rotation that was just undone; nil: nothing
	Edges    *edges
	Problem  string // with the new name
	NewName  string
	Self     bool // the key that signed in
}

// reason is why requests were denied, and how often.
type reason struct {
	Name  string
	Count int64
}

func reasons(counts map[string]int64) []reason {
	var list []reason
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		list = append(list, reason{strings.ReplaceAll(name, "_", " "), counts[name]})
	}
	slices.SortStableFunc(list, func(a, b reason) int { return int(min(max(b.Count-a.Count, -1), 1)) })
	return list
}

// movingWithin is how old a request may be to say where traffic goes now.
const movingWithin = 2 * time.Hour

// rotation is how the traffic moves from a key to its successor.
type rotation struct {
	Old, New           keyadmin.Key
	Known              bool      // whether the counts could be read
	Since              time.Time // of the counts
	OldCount, NewCount int64
	Share              int64 // of the successor, in percent
	Quiet              bool  // nobody used either
	Moved              bool  // nobody used the old key
}

// edges is how a revocation arrives.
type edges struct {
	Confirmed []keyadmin.Confirmation
	Waiting   []keyadmin.Edge
	Watched   bool // somebody looks on; otherwise only the bound of 60 seconds is known
	Done      bool // no edge that reports allows the key
	All       bool // every one of them has confirmed it
}

// News is what those hear who do not see the page, as it changes.
func (e *edges) News() string {
	switch {
	case !e.Watched || e.Done && len(e.Confirmed) == 0:
		return "Every edge refuses the key within 60 seconds."
	case e.Done:
		return "No edge that reports allows this key."
	}
	return fmt.Sprintf("%d of %d edges refuse the key.", len(e.Confirmed), len(e.Confirmed)+len(e.Waiting))
}

func (d *Dashboard) key(v *visit) error { return d.showKeyPage(v, http.StatusOK, "", "") }

func (d *Dashboard) showKeyPage(v *visit, status int, newName, problem string) error {
	ctx := v.r.Context()
	key, err := d.Admin.Look(ctx, v.actor, v.r.PathValue("id"))
	if err != nil {
		return err
	}
	data := keyData{Key: key, Problem: problem, NewName: cmp.Or(newName, key.Name), Self: key.ID == v.actor.KeyID()}
	limits, err := d.Admin.KeyLimits(ctx, v.actor, key.ID)
	if err != nil {
		return err
	}
	data.Limits = limits.Effective
	d.addUsage(v, &data)
	history, err := d.Admin.Audit(ctx, v.actor, keyadmin.AuditRequest{KeyID: key.ID, Limit: pageSize})
	if err != nil {
		return err
	}
	data.History, data.Earlier = history.Entries, history.NextCursor != ""
	if data.Rotation, err = d.rotationOf(v, key, data.Known); err != nil {
		return err
	}
	data.Edges = d.edgesOf(ctx, key)
	done := v.r.URL.Query().Get("done")
	page := layout{Title: titled(key.Name, problem), Notice: data.notice(done)}
	if done == "undone" && page.Notice.Text != "" {
		if data.Heir, err = d.heir(ctx, v.actor, data.History); err != nil {
			return err
		}
	}
	page.Data = data
	if data.Rotation != nil || data.Edges != nil && !data.Edges.Done {
		page.Live = Root + "/" + key.ID + "?range=" + data.Range
	}
	return v.show(status, "key", page)
}

// notice is what a key's page says after a form was sent, by the word in its address. Anybody can make a link with any word, so
// it is said only of a key that is so.
func (k keyData) notice(done string) notice {
	active := k.Key.Status == keyadmin.Active
	undone := slices.ContainsFunc(k.History, func(e keyadmin.AuditEntry) bool { return e.Action == keyadmin.KeyRotationUndone })
	said := map[string]struct {
		holds, warns bool
		text         string
	}{
		"renamed": {true, false, "The key has its new name."},
		"undone":  {undone && k.Rotation == nil, false, "The rotation is undone. The successor is revoked, and this key has its old expiry again."},
		"revoked": {k.Key.Status == keyadmin.Revoked, false, "The key is revoked, for good."},
		"existing": {
			k.Key.LastUsedAt == nil && !k.Key.LastUseUnknown, true,
			"That form was sent before: the key exists already, and was shown then. If you did not copy it, " + k.insteadOf(),
		},
		"rotated": {k.Rotation != nil, true, "This key is being rotated already. Its successor was shown when it was made."},
		"awaited": {
			active && k.Key.OverlapOnFirstUse != nil, true,
			"This key was not used yet, and the older key that it replaces lives on until then. " +
				"Use it first, or undo the rotation of the older key.",
		},
		"ended":      {!active, true, "This key has ended. Create a new one."},
		"norotation": {k.Rotation == nil && !k.Key.GraceStarted, true, "This key is not being rotated: there is nothing to undo."},
	}[done]
	if !said.holds {
		return notice{}
	}
	return notice{said.text, said.warns}
}

// insteadOf is what to do about a key that nobody has copied. A successor that is revoked would leave the older key without an end, if
// that ends by its first use.
func (k keyData) insteadOf() string {
	if k.Key.Predecessor == nil {
		return "revoke it and create another."
	}
	return "undo the rotation of the older key that it replaces, and rotate that again. " +
		"If the older key has ended, revoke this one and create another."
}

// addUsage adds what the key was used for in the range that was asked for, and its marks.
func (d *Dashboard) addUsage(v *visit, data *keyData) {
	since, draw := func(now time.Time) time.Time { return now.AddDate(0, 0, -7) }, hourly
	data.Range = v.r.URL.Query().Get("range")
	switch data.Range {
	case "24h":
		since = func(now time.Time) time.Time { return now.Add(-24 * time.Hour) }
	case "30d":
		since, draw = lastDays(30), daily
	default:
		data.Range = "7d"
	}
	if data.Key.LastUseUnknown { // nor can the rest be read, in what is left of the time
		data.Marks = marks(data.Key, keyadmin.Usage{})
		return
	}
	usage, known := v.usage(since, data.Key.ID)[data.Key.ID]
	if known {
		data.Known, data.Usage, data.Chart, data.Reasons = true, usage, draw(usage, wide), reasons(usage.Total.DeniedByReason)
	}
	if known && data.Range == "24h" {
		usage = v.usage(weekStart, data.Key.ID)[data.Key.ID]
	}
	data.Marks = marks(data.Key, usage)
}

// rotationOf is the rotation that a key is the old key of; nil: none, or one of its keys has ended. known is whether usage can be read.
func (d *Dashboard) rotationOf(v *visit, old keyadmin.Key, known bool) (*rotation, error) {
	if old.Successor == nil || old.Status != keyadmin.Active {
		return nil, nil
	}
	successor, err := d.Admin.Look(v.r.Context(), v.actor, *old.Successor)
	if err != nil || successor.Status != keyadmin.Active {
		return nil, err
	}
	var usage map[string]keyadmin.Usage
	if known {
		usage = v.usage(func(now time.Time) time.Time {
			if recent := now.Add(-movingWithin); recent.After(successor.CreatedAt) {
				return recent
			}
			return successor.CreatedAt
		}, old.ID, successor.ID)
	}
	r := &rotation{
		Old: old, New: successor, Known: len(usage) == 2, Since: usage[old.ID].From, OldCount: usage[old.ID].Total.Allowed, NewCount: usage[successor.ID].Total.Allowed,
	}
	if sum := r.OldCount + r.NewCount; sum > 0 {
		r.Share = r.NewCount * 100 / sum
	}
	r.Quiet, r.Moved = r.OldCount+r.NewCount == 0, r.OldCount == 0 && r.NewCount > 0
	return r, nil
}

// heir is the successor of the successor that undoing a rotation has revoked, if it lives on: whoever has a leaked key may have
// rotated it.
func (d *Dashboard) heir(ctx context.Context, actor keyadmin.Actor, history []keyadmin.AuditEntry) (*keyadmin.Key, error) {
	undone := slices.IndexFunc(history, func(e keyadmin.AuditEntry) bool { return e.Action == keyadmin.KeyRotationUndone })
	id, _ := history[undone].Details["successor"].(string)
	withdrawn, err := d.Admin.Look(ctx, actor, id)
	if err != nil || withdrawn.Successor == nil {
		return nil, err
	}
	key, err := d.Admin.Look(ctx, actor, *withdrawn.Successor)
	if err != nil || key.Status != keyadmin.Active {
		return nil, err
	}
	return &key, nil
}

// edgesOf is how far a revocation has come; nil: the key is not revoked, or was so long ago that every edge refuses it. Where the edges
// cannot be asked it says what holds all the same.
func (d *Dashboard) edgesOf(ctx context.Context, key keyadmin.Key) *edges {
	if key.RevokedAt == nil {
		return nil
	}
	if time.Since(*key.RevokedAt) < watchFor {
		d.State.watchRevocation(key.ID, false)
	}
	confirmed, done, watched := d.State.seen(key.ID)
	if !watched && time.Since(*key.RevokedAt) >= watchFor {
		return nil
	}
	e := &edges{Confirmed: confirmed, Watched: watched, Done: done}
	e.All = !slices.ContainsFunc(confirmed, func(c keyadmin.Confirmation) bool { return !c.Confirmed })
	if done || !watched {
		return e
	}
	ctx, cancel := context.WithTimeout(ctx, keyadmin.AnswerWithin/4)
	defer cancel()
	all, err := d.Admin.Edges(ctx)
	d.State.note(&d.State.listingEdges, d.Logger, err)
	if err != nil {
		return &edges{Confirmed: confirmed}
	}
	has := make(map[string]bool, len(confirmed))
	for _, c := range confirmed {
		has[c.Instance] = true
	}
	e.Waiting = slices.DeleteFunc(all, func(edge keyadmin.Edge) bool { return has[edge.Instance] })
	return e
}

func (d *Dashboard) rename(v *visit) error {
	form, err := v.form()
	if err != nil {
		return err
	}
	id, name := v.r.PathValue("id"), strings.TrimSpace(form.Get("name"))
	_, err = d.Admin.Rename(v.r.Context(), v.actor, id, name)
	if malformed, ok := errors.AsType[*keyadmin.InvalidError](err); ok {
		return d.showKeyPage(v, http.StatusUnprocessableEntity, name, sentence(malformed.Field, malformed.Reason))
	}
	if err != nil {
		return err
	}
	return v.redirect(Root+"/"+id, "renamed")
}

// changeData is the form that rotates or revokes a key, or takes a rotation back.
type changeData struct {
	Key       keyadmin.Key
	Successor keyadmin.Key // where a rotation is taken back
	Problem   string
	Typed     string
	Once      string // makes a form that is sent again harmless
	Self      bool   // the key that is to end is the one that signed in
}

func (d *Dashboard) changeForm(v *visit) (changeData, error) {
	key, err := d.Admin.Look(v.r.Context(), v.actor, v.r.PathValue("id"))
	return changeData{Key: key, Self: key.ID != "" && key.ID == v.actor.KeyID()}, err
}

func (d *Dashboard) rotateForm(v *visit) error {
	data, err := d.changeForm(v)
	if err != nil {
		return err
	}
	if data.Key.Status != keyadmin.Active {
		return v.redirect(Root+"/"+data.Key.ID, "ended")
	}
	data.Once = apikey.RandomText(32)
	return v.show(http.StatusOK, "rotate", layout{Title: "Rotate key", Data: data})
}

func (d *Dashboard) rotate(v *visit) error {
	form, err := v.form()
	if err != nil {
		return err
	}
	id := v.r.PathValue("id")
	overlap, err := keyadmin.ParseOverlap(form.Get("overlap"))
	if err != nil {
		return err
	}
	successor, replayed, err := d.Admin.Rotate(v.r.Context(), v.actor, id, keyadmin.RotateRequest{
		Overlap: overlap, IdempotencyKey: form.Get("once"),
	})
	switch {
	case replayed:
		return v.redirect(Root+"/"+successor.ID, "existing")
	case errors.Is(err, keyadmin.ErrAlreadyRotated), errors.Is(err, keyadmin.ErrIdempotencyMismatch): // the latter: sent again with another choice
		return v.redirect(Root+"/"+id, "rotated")
	case errors.Is(err, keyadmin.ErrAwaited):
		return v.redirect(Root+"/"+id, "awaited")
	case errors.Is(err, keyadmin.ErrEnded):
		return v.redirect(Root+"/"+id, "ended")
	case err != nil:
		return err
	}
	return v.showKey(successor)
}

// undoing is the form that takes back a rotation, and whether it would take the successor away from whoever uses it.
func (d *Dashboard) undoing(v *visit) (data changeData, inUse bool, err error) {
	if data, err = d.changeForm(v); err != nil || data.Key.Successor == nil {
		return data, false, err
	}
	if data.Successor, err = d.Admin.Get(v.r.Context(), v.actor, *data.Key.Successor); err != nil {
		return data, false, err
	}
	data.Self = data.Successor.ID == v.actor.KeyID()
	return data, data.Successor.Status == keyadmin.Active && data.Successor.LastUsedAt != nil, nil
}

func (d *Dashboard) undoForm(v *visit) error {
	data, inUse, err := d.undoing(v)
	if err != nil {
		return err
	}
	if !inUse {
		return v.redirect(Root+"/"+data.Key.ID, "")
	}
	return v.show(http.StatusOK, "undo", layout{Title: "Undo rotation", Data: data})
}

// undoRotation wants the name of a successor typed that is in use: it is revoked, as by revoke.
func (d *Dashboard) undoRotation(v *visit) error {
	form, err := v.form()
	if err != nil {
		return err
	}
	data, inUse, err := d.undoing(v)
	if err != nil {
		return err
	}
	data.Typed = strings.TrimSpace(form.Get("name"))
	if inUse && data.Typed != data.Successor.Name && data.Typed != data.Successor.ID {
		data.Problem = "That is not the successor's name. Nothing was undone."
		if data.Typed == "" {
			data.Problem = "The successor is in use. Nothing was undone."
		}
		return v.show(http.StatusUnprocessableEntity, "undo", layout{Title: titled("Undo rotation", data.Problem), Data: data})
	}
	id := data.Key.ID
	_, _, err = d.Admin.UndoRotation(v.r.Context(), v.actor, id)
	switch {
	case errors.Is(err, keyadmin.ErrNotRotated):
		return v.redirect(Root+"/"+id, "norotation")
	case errors.Is(err, keyadmin.ErrEnded):
		return v.redirect(Root+"/"+id, "ended")
	case err != nil:
		return err
	}
	return v.redirect(Root+"/"+id, "undone")
}

func (d *Dashboard) revokeForm(v *visit) error {
	data, err := d.changeForm(v)
	if err != nil {
		return err
	}
	if data.Key.Status == keyadmin.Revoked {
		return v.redirect(Root+"/"+data.Key.ID, "")
	}
	return v.show(http.StatusOK, "revoke", layout{Title: "Revoke key", Data: data})
}

// revoke wants the name typed: it cannot be undone. Where a key is revoked already, that is what was asked for.
func (d *Dashboard) revoke(v *visit) error {
	form, err := v.form()
	if err != nil {
		return err
	}
	data, err := d.changeForm(v)
	if err != nil {
		return err
	}
	data.Typed = strings.TrimSpace(form.Get("name"))
	if data.Typed != data.Key.Name && data.Typed != data.Key.ID {
		data.Problem = "That is not the key's name. Nothing was revoked."
		return v.show(http.StatusUnprocessableEntity, "revoke", layout{Title: titled("Revoke key", data.Problem), Data: data})
	}
	_, err = d.Admin.Revoke(v.r.Context(), v.actor, data.Key.ID)
	if err != nil && !errors.Is(err, keyadmin.ErrAlreadyRevoked) {
		return err
	}
	d.State.watchRevocation(data.Key.ID, err == nil)
	return v.redirect(Root+"/"+data.Key.ID, "revoked")
}

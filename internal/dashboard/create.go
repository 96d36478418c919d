package dashboard

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// createData is the form of a new key, as it was filled in.
type createData struct {
	Account           string // that the form was opened for
	Name, Environment string
	Production        bool // whether the visitor may have production keys
	Groups            []scopeGroup
	Narrow            bool // there are scopes that the visitor cannot give
	ManageKeys        bool
	Expiry, Date      string // one of expiries, and a date where it is "date"
	Once              string // makes a form that is sent again harmless
	Problem           string
	Field             string // that Problem is about; empty: none
}

// Focus is the id of the input that is to be changed; empty: none.
func (c createData) Focus() string {
	switch {
	case c.Field == "expiry" && c.Expiry == "date":
		return "date"
	case slices.Contains([]string{"name", "environment", "scopes", "expiry"}, c.Field):
		return c.Field
	}
	return ""
}

// scopeGroup is the scopes of a resource.
type scopeGroup struct {
	Resource string
	Scopes   []scopeChoice
}

type scopeChoice struct {
	Name, Action, Description string
	Offered, First, Chosen    bool // whether the visitor may give it, and is it the first such
}

// descriptions say what each scope lets a key do.
var descriptions = map[string]string{
	"memories:read":       "List, filter and search memories",
	"memories:write":      "Create and change memories",
	"memories:delete":     "Delete memories",
	"entities:read":       "List, filter and search entities",
	"entities:write":      "Create and change entities",
	"entities:delete":     "Delete entities",
	"relationships:read":  "List relationships",
	"relationships:write": "Create and delete relationships",
	"workflows:read":      "List workflows",
	"workflows:write":     "Create, change, trigger and delete workflows",
	"agents:read":         "List agents",
	"agents:write":        "Spawn, change, message and delete agents",
	"hives:read":          "List hives",
	"hives:write":         "Create, change and delete hives and their members",
}

// groups are all scopes by resource, with those marked that are offered and chosen.
func groups(offered, chosen []string) []scopeGroup {
	var groups []scopeGroup
	first := true
	for _, name := range apikey.ScopeNames() {
		resource, action, _ := strings.Cut(name, ":")
		if n := len(groups); n == 0 || groups[n-1].Resource != resource {
			groups = append(groups, scopeGroup{Resource: resource})
		}
		group := &groups[len(groups)-1]
		choice := scopeChoice{Name: name, Action: action, Description: descriptions[name]}
		if choice.Offered = slices.Contains(offered, name); choice.Offered {
			choice.First, first = first, false
			choice.Chosen = slices.Contains(chosen, name)
		}
		group.Scopes = append(group.Scopes, choice)
	}
	return groups
}

// quickChoices are the buttons that choose scopes.
var quickChoices = map[string]func(name string) bool{
	"read": func(name string) bool { return strings.HasSuffix(name, ":read") },
	"all":  func(string) bool { return true },
	"none": func(string) bool { return false },
}

func (d *Dashboard) newKey(v *visit) error {
	if v.r.URL.RawQuery == draftQuery {
		if form := d.State.sessions.draft(d.sessionID(v.r)); form != nil {
			return v.newKeyAgain(form)
		}
	}
	return v.showForm(http.StatusOK, createData{Environment: v.selection().Environment, Expiry: "90d", Once: apikey.RandomText(32)}, nil)
}

// draftQuery asks for the form that was filled in when a session ended. What it had stands in the next session: a link could have been
// filled in by somebody else.
const draftQuery = "draft=1"

// maxDraft is far more than anybody fills in, in bytes: each session may keep as much.
const maxDraft = 4 << 10

// draftOf is what a form of a new key has in it, to be filled in again; nil: it is none. A key that was typed into it is forgotten.
func draftOf(form url.Values) url.Values {
	if !form.Has("account") || !form.Has("once") {
		return nil
	}
	draft, size := url.Values{}, 0
	for _, field := range []string{"account", "once", "name", "environment", "scope", "manage_keys", "expiry", "date"} {
		for _, value := range form[field] {
			draft.Add(field, apikey.Redact(value))
			size += len(field) + len(value)
		}
	}
	if size > maxDraft {
		return nil
	}
	return draft
}

// newKeyAgain shows a form that was sent when its visitor's session had ended. It makes no key until they send it themselves.
func (v *visit) newKeyAgain(form url.Values) error {
	data := filledIn(form)
	if !v.actor.Manages(data.Environment) {
		data.Environment = apikey.Sandbox.String()
	}
	if form.Get("account") != v.actor.Account() {
		data.Problem = anotherAccount
	}
	return v.showForm(http.StatusOK, data, form["scope"])
}

const anotherAccount = "You are signed in for another account than when you opened this form, so no key was made. " +
	"Look at the account above, and send it again."

// filledIn is a form as it was sent, but for its scopes.
func filledIn(form url.Values) createData {
	return createData{
		Name: strings.TrimSpace(form.Get("name")), Environment: form.Get("environment"), ManageKeys: form.Get("manage_keys") != "",
		Expiry: form.Get("expiry"), Date: form.Get("date"), Once: form.Get("once"),
	}
}

func (v *visit) showForm(status int, data createData, scopes []string) error {
	data.Account = v.actor.Account()
	grants := v.actor.Grants()
	data.Groups, data.Narrow = groups(grants, scopes), len(grants) < len(apikey.ScopeNames())
	data.Production = v.actor.Manages(apikey.Production.String())
	return v.show(status, "new", layout{Title: titled("Create New Key", data.Problem), Data: data})
}

// form reads what was sent. A body that cannot be read is the client's mistake.
func (v *visit) form() (url.Values, error) {
	if err := v.r.ParseForm(); err != nil {
		return nil, errForm
	}
	return v.r.PostForm, nil
}

// created is a new key, shown this once.
type created struct {
	Key         keyadmin.Key
	Secret      string
	Predecessor string // id of the key that it replaces; empty: none
}

func (d *Dashboard) create(v *visit) error {
	form, err := v.form()
	if err != nil {
		return err
	}
	data := filledIn(form)
	if !form.Has("account") { // as in one that an earlier version made
		return errForm
	}
	// Somebody signed in for another account since, in another tab.
	if form.Get("account") != v.actor.Account() {
		data.Problem = anotherAccount
		return v.showForm(http.StatusUnprocessableEntity, data, form["scope"])
	}
	// Without JavaScript, the quick choices are buttons that send the form to have it filled in.
	if choose, ok := quickChoices[form.Get("choose")]; ok {
		names := slices.DeleteFunc(apikey.ScopeNames(), func(name string) bool { return !choose(name) })
		return v.showForm(http.StatusOK, data, names)
	}
	request, err := data.request(form["scope"])
	if err != nil {
		return v.refuseForm(data, form["scope"], err)
	}
	key, replayed, err := d.Admin.Create(v.r.Context(), v.actor, request)
	switch {
	case err != nil:
		return v.refuseForm(data, form["scope"], err)
	case replayed:
		return v.redirect(Root+"/"+key.ID, "existing")
	}
	return v.showKey(key)
}

// request is what the form asks for.
func (c createData) request(scopes []string) (keyadmin.CreateRequest, error) {
	request := keyadmin.CreateRequest{Name: c.Name, Environment: c.Environment, Scopes: scopes, ManageKeys: c.ManageKeys, IdempotencyKey: c.Once}
	switch c.Expiry {
	case "30d", "90d", "365d":
		request.ExpiresIn = c.Expiry
	case "date":
		if c.Date == "" {
			return request, &keyadmin.InvalidError{Field: "expiry", Reason: "needs a date"}
		}
		request.ExpiresAt = c.Date + "T23:59:59Z"
	case "never":
	default:
		return request, &keyadmin.InvalidError{Field: "expiry", Reason: "must be one of the choices"}
	}
	return request, nil
}

// refuseForm shows a form again with what is wrong in it. What the visitor typed is kept.
func (v *visit) refuseForm(data createData, scopes []string, err error) error {
	var (
		malformed *keyadmin.InvalidError
		forbidden *keyadmin.ForbiddenError
	)
	switch {
	case errors.As(err, &malformed):
		data.Field, data.Problem = malformed.Field, sentence(malformed.Field, malformed.Reason)
	case errors.As(err, &forbidden) && forbidden.Field != "":
		data.Field, data.Problem = forbidden.Field, sentence(forbidden.Field, forbidden.Reason)
	case errors.Is(err, keyadmin.ErrIdempotencyMismatch):
		data.Once = apikey.RandomText(32)
		data.Problem = "This form made a key before, and was changed since. Send it again to make another key."
	default:
		return err
	}
	if data.Field == "scopes" && malformed != nil {
		data.Problem = "Choose at least one scope."
	}
	if strings.HasPrefix(data.Field, "expires") {
		data.Field, data.Problem = "expiry", "The date must be in the future, at most ten years ahead."
	}
	return v.showForm(http.StatusUnprocessableEntity, data, scopes)
}

// showKey is the only answer that has a key in it. It is one to a form, so its address has nothing, and a reload sends the
// form again, which makes no second key.
func (v *visit) showKey(key keyadmin.Key) error {
	data := created{Key: key, Secret: key.Key.Reveal()}
	if key.Predecessor != nil {
		data.Predecessor = *key.Predecessor
	}
	return v.show(http.StatusCreated, "created", layout{Title: "Copy your key", Data: data})
}

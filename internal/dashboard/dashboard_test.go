package dashboard_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"html"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

var operator = keyadmin.Operator("test")

// rig is a dashboard before a real Postgres. A person is whom the header X-Person names, as "name@account".
type rig struct {
	t        *testing.T
	database string
	admin    *keyadmin.Admin
	state    *dashboard.State
	server   *httptest.Server
	log      *bytes.Buffer
}

// keysPerDay is what an account may make in a rig.
const keysPerDay = 1000

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigVia(t, func(_ testing.TB, database string) string { return database })
}

// newRigVia is newRig with another way to the database.
func newRigVia(t *testing.T, via func(testing.TB, string) string) *rig {
	t.Helper()
	r := &rig{t: t, database: pgtest.URL(t), log: new(bytes.Buffer)}
	pgtest.Migrate(t, r.database)
	store, err := keystore.Open(via(t, r.database), keystore.Options{ConnectTimeout: pgtest.ConnectTimeout})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	r.admin = keyadmin.New(store).Limited(keysPerDay)
	r.state = dashboard.NewState(r.admin)
	t.Cleanup(r.state.Close)
	logger := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.Lock(zapcore.AddSync(r.log)), zap.DebugLevel))
	r.server = httptest.NewServer(dashboard.New(dashboard.Config{
		Admin: r.admin, State: r.state, Logger: logger, Answered: func(*http.Request, error) {}, Secure: func(req *http.Request) bool { return req.TLS != nil },
		Person: func(req *http.Request) (keyadmin.Actor, error) {
			name, account, ok := strings.Cut(req.Header.Get("X-Person"), "@")
			if !ok {
				return keyadmin.Actor{}, dashboard.ErrNobody
			}
			return keyadmin.Person(name, account)
		},
		SignIn: func(req *http.Request, key string) (keyadmin.Actor, error) {
			found, err := store.Lookup(req.Context(), []apikey.Digest{apikey.Hash(key)})
			if err != nil {
				return keyadmin.Actor{}, err
			}
			if len(found.Records) != 1 || found.Records[0].Validity(found.Now) != apikey.Allowed {
				return keyadmin.Actor{}, apierror.New(http.StatusUnauthorized, "API_KEY_INVALID", "This API key is not valid.")
			}
			return keyadmin.ManagingKey(found.Records[0])
		},
	}))
	t.Cleanup(r.server.Close)
	return r
}

func (r *rig) key(account, name string, manage bool) keyadmin.Key {
	r.t.Helper()
	key, _, err := r.admin.Create(r.t.Context(), operator, keyadmin.CreateRequest{
		Name: name, Account: account, Environment: "production", Scopes: apikey.ScopeNames(), ManageKeys: manage,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

// browser keeps cookies and does not follow redirects.
type browser struct {
	*http.Client
	r      *rig
	header http.Header
}

func (r *rig) browser(person string) *browser {
	jar, _ := cookiejar.New(nil) // which cannot fail without options
	b := &browser{&http.Client{Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, r, http.Header{}}
	if person != "" {
		b.header.Set("X-Person", person)
	}
	return b
}

type reply struct {
	*http.Response
	body string
}

// do gets a path below the root, or sends a form to it.
func (b *browser) do(path string, form url.Values) reply {
	b.r.t.Helper()
	method, body := "GET", ""
	if form != nil {
		method, body = "POST", form.Encode()
	}
	req, err := http.NewRequest(method, b.r.server.URL+dashboard.Root+path, strings.NewReader(body))
	if err != nil {
		b.r.t.Fatal(err)
	}
	req.Header = b.header.Clone()
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	resp, err := b.Do(req)
	if err != nil {
		b.r.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		b.r.t.Fatal(err)
	}
	return reply{resp, string(text)}
}

func (r reply) want(t *testing.T, status int, texts ...string) {
	t.Helper()
	if r.StatusCode != status {
		t.Fatalf("%s: %d, want %d\n%s", r.Request.URL, r.StatusCode, status, apikey.Redact(r.body))
	}
	for _, text := range texts {
		if !strings.Contains(r.body, text) {
			t.Errorf("%s: no %q in\n%s", r.Request.URL, text, apikey.Redact(r.body))
		}
	}
}

// createForm is one that was opened for acme.
func createForm(name string) url.Values {
	return url.Values{
		"account": {"acme"}, "name": {name}, "environment": {"production"}, "scope": {"memories:read", "hives:write"}, "expiry": {"90d"}, "once": {apikey.RandomText(32)},
	}
}

var (
	inputValue = regexp.MustCompile(`id="secret"[^>]* value="([^"]+)"`)
	keyPath    = regexp.MustCompile(`key_[0-9A-Za-z]{22}`)
)

func TestKeyIsShownOnceThoughItsFormIsSentAgain(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	form := createForm("Production Backend")
	shown := b.do("/new", form)
	shown.want(t, http.StatusCreated, "only time the key is shown")
	secret := inputValue.FindStringSubmatch(shown.body)
	if secret == nil {
		t.Fatal("the key is not shown")
	}
	id := keyPath.FindString(shown.body)
	again := b.do("/new", form)
	again.want(t, http.StatusSeeOther)
	if want := dashboard.Root + "/" + id + "?done=existing"; again.Header.Get("Location") != want {
		t.Errorf("sent again, it leads to %s, want %s", again.Header.Get("Location"), want)
	}
	for _, path := range []string{"", "/" + id, "/" + id + "/revoke", "/" + id + "/rotate"} {
		if page := b.do(path, nil); page.StatusCode != http.StatusOK || apikey.ContainsKey(page.body) {
			t.Errorf("%q: %d, or it has the key", path, page.StatusCode)
		}
	}
	if r.log.Len() > 0 {
		t.Errorf("log: %s", r.log)
	}
	page, err := r.admin.List(t.Context(), operator, keyadmin.ListRequest{Account: "acme"})
	if err != nil || len(page.Keys) != 1 || strings.Join(page.Keys[0].Scopes, " ") != "memories:read hives:write" {
		t.Errorf("keys %+v, error %v", page.Keys, err)
	}
}

// TestScopesAndMarksAreReadAsWordsOfTheirOwn: only the style sets apart what has no space in between, not a screen reader or a copy.
func TestScopesAndMarksAreReadAsWordsOfTheirOwn(t *testing.T) {
	b := newRig(t).browser("ann@acme")
	form := createForm("Backend")
	form.Set("expiry", "date")
	form.Set("date", time.Now().AddDate(0, 0, 3).Format(time.DateOnly)) // active, expires soon, never used
	created := b.do("/new", form)
	id := keyPath.FindString(created.body)
	for name, page := range map[string]reply{"created": created, "key": b.do("/"+id, nil), "list": b.do("", nil)} {
		page.want(t, page.StatusCode, "memories:read")
		if together := regexp.MustCompile(`</span><span class="(tag|badge)[^<]*`).FindString(page.body); together != "" {
			t.Errorf("%s: %q follows without a space", name, together)
		}
	}
}

func TestEveryAnswerForbidsFramesScriptsAndCaches(t *testing.T) {
	r := newRig(t)
	id := r.key("acme", "A", false).ID
	for _, person := range []string{"", "ann@acme"} {
		b := r.browser(person)
		for _, path := range []string{"", "/new", "/" + id, "/" + id + "/revoke", "/nothing", "/a//b", "/sign-out"} {
			h := b.do(path, nil).Header
			for name, value := range map[string]string{
				"Cache-Control": "no-store", "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff",
				"Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; " +
					"base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
			} {
				if h.Get(name) != value {
					t.Errorf("%q %q: %s is %q", person, path, name, h.Get(name))
				}
			}
		}
	}
}

func TestFormsOfOtherSitesChangeNothing(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Victim", true)
	for name, value := range map[string]string{"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"} {
		b := r.browser("ann@acme")
		b.header.Set(name, value)
		for path, form := range map[string]url.Values{
			"/new": createForm("x"), "/" + key.ID + "/revoke": {"name": {"Victim"}}, "/" + key.ID + "/rotate": {"overlap": {"0"}},
			"/" + key.ID + "/rename": {"name": {"y"}}, "/" + key.ID + "/rotate/undo": {}, "/sign-in": {"key": {key.Key.Reveal()}}, "/sign-out": {},
		} {
			reply := b.do(path, form)
			reply.want(t, http.StatusForbidden, "A page of another site")
			if reply.Header.Get("Set-Cookie") != "" {
				t.Errorf("%s: %s", path, reply.Header.Get("Set-Cookie"))
			}
		}
	}
	page, err := r.admin.List(t.Context(), operator, keyadmin.ListRequest{Account: "acme", Status: "active"})
	if err != nil || len(page.Keys) != 1 || page.Keys[0].Name != "Victim" || page.Keys[0].Successor != nil {
		t.Errorf("keys %+v, error %v", page.Keys, err)
	}
}

func TestAnotherAccountSeesAndChangesNothing(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Theirs", false)
	b := r.browser("eve@other")
	if list := b.do("", nil); strings.Contains(list.body, "Theirs") || strings.Contains(list.body, key.ID) {
		t.Error("the list shows another account's key")
	}
	none := b.do("/key_"+strings.Repeat("0", 22), nil)
	for _, path := range []string{"", "/rotate", "/revoke"} {
		reply := b.do("/"+key.ID+path, nil)
		reply.want(t, http.StatusNotFound)
		if reply.body != none.body {
			t.Errorf("%q: the answer differs from that of a key that does not exist", path)
		}
	}
	for path, form := range map[string]url.Values{"/revoke": {"name": {"Theirs"}}, "/rotate": {"overlap": {"0"}}, "/rename": {"name": {"Mine"}}, "/rotate/undo": {}} {
		b.do("/"+key.ID+path, form).want(t, http.StatusNotFound)
	}
	if found, err := r.admin.Get(t.Context(), operator, key.ID); err != nil || found.Status != keyadmin.Active || found.Name != "Theirs" || found.Successor != nil {
		t.Errorf("%+v, %v", found, err)
	}
}

func TestNamesAreText(t *testing.T) {
	r := newRig(t)
	const account = `"><script>alert(1)</script>`
	b := r.browser(`<i>ann</i>@` + account)
	for _, name := range []string{`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, "אבג", strings.Repeat("ü", 200), `{{.Key}} ' & <b>`} {
		form := createForm(name)
		form.Set("account", account)
		shown := b.do("/new", form)
		shown.want(t, http.StatusCreated)
		id := keyPath.FindString(shown.body)
		for _, page := range []reply{shown, b.do("/new", nil), b.do("", nil), b.do("/"+id, nil), b.do("/"+id+"/revoke", nil), b.do("?q="+url.QueryEscape(name), nil)} {
			page.want(t, page.StatusCode, "<bdi>")
			for _, markup := range []string{"<script>alert", "<img", "<i>ann", "<b>'"} {
				if strings.Contains(page.body, markup) {
					t.Errorf("%s of %q has %s", page.Request.URL, name, markup)
				}
			}
		}
		b.do("/"+id+"/revoke", url.Values{"name": {name}}).want(t, http.StatusSeeOther)
	}
}

func TestFormsSayWhatIsWrongAndKeepWhatWasTyped(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	for problem, change := range map[string]url.Values{
		"Name must have 1 to 200 characters.":                             {"name": {strings.Repeat("n", 300)}},
		"Name must not contain an API key.":                               {"name": {apikey.Generate(apikey.Sandbox)}},
		"Choose at least one scope.":                                      {"scope": nil},
		"Expiry needs a date.":                                            {"expiry": {"date"}},
		"The date must be in the future, at most ten years ahead.":        {"expiry": {"date"}, "date": {"2001-01-01"}},
		"Expiry must be one of the choices.":                              {"expiry": {"forever"}},
		"Environment must be production or sandbox.":                      {"environment": {"staging"}},
		"Idempotency-Key must have at most 255 printable ASCII character": {"once": {"ü"}},
	} {
		form := createForm("Typed")
		maps.Copy(form, change)
		reply := b.do("/new", form)
		reply.want(t, http.StatusUnprocessableEntity, problem)
		if change["scope"] == nil && len(form["scope"]) > 0 && !strings.Contains(reply.body, `value="hives:write" checked`) {
			t.Errorf("%s: the chosen scopes are lost", problem)
		}
	}
	key := r.key("acme", "Mine", false)
	b.do("/"+key.ID+"/revoke", url.Values{"name": {"mine"}}).want(t, http.StatusUnprocessableEntity, "Nothing was revoked", `value="mine"`)
	b.do("/"+key.ID+"/rename", url.Values{"name": {""}}).want(t, http.StatusUnprocessableEntity, "Name must have 1 to 200 characters.",
		"<title>Error: ", `aria-describedby="problem" autofocus`) // it stands at the end of a long page
	b.do("/"+key.ID+"/rotate", url.Values{"overlap": {"-1h"}}).want(t, http.StatusBadRequest, "Overlap must be")
	if page, err := r.admin.List(t.Context(), operator, keyadmin.ListRequest{Account: "acme"}); err != nil || len(page.Keys) != 1 || page.Keys[0].Status != keyadmin.Active {
		t.Errorf("%+v, %v", page.Keys, err)
	}
}

// TestFormThatWasOpenedForAnotherAccountMakesNoKey: who signed in for one in another tab since would find it in the wrong place.
func TestFormThatWasOpenedForAnotherAccountMakesNoKey(t *testing.T) {
	r := newRig(t)
	b := r.browser("")
	opened := func(page reply) string {
		account := regexp.MustCompile(`name="account" value="([^"]*)"`).FindStringSubmatch(page.body)
		if account == nil {
			t.Fatal("the form does not say for which account it is")
		}
		return account[1]
	}
	signIn := func(account string) {
		key := r.key(account, "Manager", true)
		b.do("/sign-in", url.Values{"key": {key.Key.Reveal()}}).want(t, http.StatusSeeOther)
	}
	signIn("acme")
	form := createForm("Typed")
	form.Set("account", opened(b.do("/new", nil)))
	signIn("globex")
	choosing := maps.Clone(form)
	choosing.Set("choose", "read")
	b.do("/new", choosing).want(t, http.StatusUnprocessableEntity, "for another account")
	again := b.do("/new", form)
	again.want(t, http.StatusUnprocessableEntity, "for another account", `value="Typed"`, `value="hives:write" checked`)
	for _, account := range []string{"acme", "globex"} {
		if page, err := r.admin.List(t.Context(), operator, keyadmin.ListRequest{Account: account}); err != nil || len(page.Keys) != 1 {
			t.Errorf("%s: %+v, %v", account, page.Keys, err)
		}
	}
	form.Set("account", opened(again))
	b.do("/new", form).want(t, http.StatusCreated)
	if page, err := r.admin.List(t.Context(), operator, keyadmin.ListRequest{Account: "globex"}); err != nil || len(page.Keys) != 2 {
		t.Errorf("%+v, %v", page.Keys, err)
	}
}

func TestSessionEndsWithItsKeyWithTimeAndBySigningOut(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	r.state.SetClock(func() time.Time { return now })
	signIn := func(key keyadmin.Key) *browser {
		b := r.browser("")
		reply := b.do("/sign-in", url.Values{"key": {key.Key.Reveal()}})
		reply.want(t, http.StatusSeeOther)
		cookie := reply.Header.Get("Set-Cookie")
		for _, attribute := range []string{"HttpOnly", "SameSite=Strict", "Path=" + dashboard.Root} {
			if !strings.Contains(cookie, attribute) {
				t.Errorf("the cookie has no %s: %s", attribute, cookie)
			}
		}
		if apikey.ContainsKey(fmt.Sprint(reply.Header)) || strings.Contains(cookie, key.ID) {
			t.Error("the cookie tells the key")
		}
		b.do("", nil).want(t, http.StatusOK, "<bdi>acme</bdi>")
		return b
	}
	out := func(b *browser) {
		t.Helper()
		b.do("", nil).want(t, http.StatusUnauthorized, "<h1>Sign in</h1>", "ends with the key, after 30 idle minutes, after 8 hours, or when you sign out.")
	}

	key := r.key("acme", "Manager", true)
	idle, left := signIn(key), signIn(key)
	left.do("/sign-out", url.Values{}).want(t, http.StatusSeeOther)
	out(left)
	now = now.Add(31 * time.Minute)
	out(idle)
	old := signIn(key)
	for range 19 { // never idle, but too long
		now = now.Add(25 * time.Minute)
		old.do("", nil).want(t, http.StatusOK)
	}
	now = now.Add(6 * time.Minute) // 8 hours and a minute
	out(old)
	revoked := signIn(key)
	if _, err := r.admin.Revoke(t.Context(), operator, key.ID); err != nil {
		t.Fatal(err)
	}
	out(revoked)
	if n := r.state.Sessions(); n != 0 {
		t.Errorf("%d sessions are kept after they ended", n)
	}
}

func TestFormSentAfterTheSessionEndedSaysThatNothingWasChanged(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	r.state.SetClock(func() time.Time { return now })
	manager, leaked := r.key("acme", "Manager", true), r.key("acme", "Leaked", false)
	b := r.browser("")
	signIn := func(next string) string {
		reply := b.do("/sign-in", url.Values{"key": {manager.Key.Reveal()}, "next": {next}})
		reply.want(t, http.StatusSeeOther)
		return reply.Header.Get("Location")
	}
	signIn("")
	for path, form := range map[string]url.Values{
		"/" + leaked.ID + "/revoke": {"name": {"Leaked"}}, "/" + leaked.ID + "/rename": {"name": {"Other"}}, "/" + leaked.ID + "/rotate": {"overlap": {"0"}},
		"/new": {"name": {"Other"}, "environment": {"sandbox"}},
	} {
		now = now.Add(31 * time.Minute)
		page := b.do(path, form)
		page.want(t, http.StatusUnauthorized, "Your session has ended, so nothing was changed.")
		next := regexp.MustCompile(`name="next" value="([^"]+)"`).FindStringSubmatch(page.body)
		if next == nil {
			t.Fatal("the page does not know where to go on")
		}
		want := dashboard.Root + strings.TrimSuffix(path, "/rename")
		if path == "/new" {
			want += "?environment=sandbox"
		}
		if at := signIn(html.UnescapeString(next[1])); at != want {
			t.Errorf("after %s, signing in leads to %s", path, at)
		}
		b.do(strings.TrimPrefix(want, dashboard.Root), nil).want(t, http.StatusOK)
	}
	key, err := r.admin.Get(t.Context(), operator, leaked.ID)
	if err != nil || key.Status != keyadmin.Active || key.Name != "Leaked" || key.Successor != nil {
		t.Errorf("%+v, %v", key, err)
	}
}

// field finds the value of a form's input by its name; empty: there is none.
func (r reply) field(name string) string {
	if found := regexp.MustCompile(`<input[^>]* name="` + name + `" value="([^"]*)"`).FindStringSubmatch(r.body); found != nil {
		return html.UnescapeString(found[1])
	}
	return ""
}

// hidden are the hidden inputs of a page's form.
func (r reply) hidden() url.Values {
	form := url.Values{}
	for _, found := range regexp.MustCompile(`<input type="hidden" name="([^"]+)" value="([^"]*)">`).FindAllStringSubmatch(r.body, -1) {
		form.Add(found[1], html.UnescapeString(found[2]))
	}
	return form
}

func TestFormOfANewKeyThatIsSentAfterTheSessionEndedComesBackFilledInAndMakesNoKeyByItself(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	r.state.SetClock(func() time.Time { return now })
	manager := r.key("acme", "Manager", true)
	b := r.browser("")
	b.do("/sign-in", url.Values{"key": {manager.Key.Reveal()}}).want(t, http.StatusSeeOther)
	now = now.Add(31 * time.Minute)

	form := createForm(`A "new" <b>key</b> & 鍵`)
	form["environment"], form["manage_keys"], form["expiry"], form["date"] = []string{"sandbox"}, []string{"yes"}, []string{"date"}, []string{"2031-02-03"}
	page := b.do("/new", form)
	page.want(t, http.StatusUnauthorized, "Your session has ended, so nothing was changed.", "it is filled in as you left it")
	again := page.hidden()
	again.Set("key", apikey.Generate(apikey.Production))
	page = b.do("/sign-in", again)
	page.want(t, http.StatusUnauthorized, "This API key is not valid.") // and once more
	again = page.hidden()
	again.Set("key", manager.Key.Reveal())
	answer := b.do("/sign-in", again)
	answer.want(t, http.StatusSeeOther)
	at := strings.TrimPrefix(answer.Header.Get("Location"), dashboard.Root)
	if at != "/new?draft=1" {
		t.Fatalf("signing in leads to %s", at)
	}
	for range 2 { // it may be loaded again
		page = b.do(at, nil)
		page.want(t, http.StatusOK, `value="sandbox" checked`, `value="memories:read" checked`, `value="hives:write" checked`, `name="manage_keys" value="yes" checked`,
			`name="expiry" value="date" checked`, `name="date" value="2031-02-03"`)
		if page.field("name") != form.Get("name") || page.field("once") != form.Get("once") || strings.Contains(page.body, `value="memories:write" checked`) {
			t.Errorf("the form came back as %s", page.body)
		}
	}
	keys := func() int {
		list, err := r.admin.List(t.Context(), operator, keyadmin.ListRequest{Account: "acme"})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Keys)
	}
	if n := keys(); n != 1 {
		t.Errorf("there are %d keys before the form was sent again", n)
	}
	b.do("/new", form).want(t, http.StatusCreated)
	if n := keys(); n != 2 {
		t.Errorf("there are %d keys then", n)
	}
	// Nobody else has it, nor is it in the way of the next new key.
	if page := b.do("/new", nil); page.field("name") != "" {
		t.Errorf("an empty form has the name %q", page.field("name"))
	}
	other := r.browser("")
	other.do("/sign-in", url.Values{"key": {manager.Key.Reveal()}}).want(t, http.StatusSeeOther)
	if page := other.do(at, nil); page.field("name") != "" {
		t.Errorf("another session has the name %q", page.field("name"))
	}
}

func TestFormOfANewKeyThatComesBackHasNoKeyInItAndNoMoreThanAnybodyFillsIn(t *testing.T) {
	r := newRig(t)
	b, manager := r.browser(""), r.key("acme", "Manager", true)
	form := createForm(manager.Key.Reveal())
	page := b.do("/new", form)
	page.want(t, http.StatusUnauthorized, "it is filled in as you left it")
	if apikey.ContainsKey(page.body) {
		t.Error("the key that was typed into the form stands in the page")
	}
	again := page.hidden()
	again.Set("key", manager.Key.Reveal())
	again.Set("name", manager.Key.Reveal())
	b.do("/sign-in", again).want(t, http.StatusSeeOther)
	if page := b.do("/new?draft=1", nil); apikey.ContainsKey(page.body) || page.field("name") != "rk_…" {
		t.Errorf("name %q", apikey.Redact(page.field("name")))
	}
	b = r.browser("")
	form.Set("name", strings.Repeat("a", 4<<10))
	page = b.do("/new", form)
	page.want(t, http.StatusUnauthorized, "Your session has ended, so nothing was changed. Sign in, and do it again.")
	if page.hidden().Has("once") {
		t.Errorf("the page has a form of %d bytes", len(page.body))
	}
}

// TestFormOfANewKeyThatComesBackForAnotherAccountSaysSo, and offers no more than the key that signed in may give.
func TestFormOfANewKeyThatComesBackForAnotherAccountSaysSo(t *testing.T) {
	r := newRig(t)
	b := r.browser("")
	other, _, err := r.admin.Create(t.Context(), operator, keyadmin.CreateRequest{
		Name: "Manager", Account: "globex", Environment: "sandbox", Scopes: []string{"memories:read"}, ManageKeys: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	again := b.do("/new", createForm("New")).hidden()
	again.Set("key", other.Key.Reveal())
	b.do("/sign-in", again).want(t, http.StatusSeeOther)
	page := b.do("/new?draft=1", nil)
	page.want(t, http.StatusOK, "You are signed in for another account", `value="sandbox" checked`, `value="memories:read" checked`)
	if strings.Contains(page.body, `value="hives:write" checked`) || page.hidden().Get("account") != "globex" {
		t.Errorf("it is a form of %s", page.hidden().Get("account"))
	}
}

func TestSigningInLeadsToNoOtherSite(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Manager", true)
	for _, next := range []string{
		"", "/", "/settings/api-keysevil", "javascript:alert(1)", `\\evil.example`, "https://evil.example", "https://evil.example" + dashboard.Root,
		"//evil.example" + dashboard.Root, "//a@evil.example" + dashboard.Root, dashboard.Root + "@evil.example",
		dashboard.Root + "/../../x", dashboard.Root + "/%2e%2e/x", dashboard.Root + "//evil.example", dashboard.Root + "/\r\nX: y",
	} {
		reply := r.browser("").do("/sign-in", url.Values{"key": {key.Key.Reveal()}, "next": {next}})
		reply.want(t, http.StatusSeeOther)
		if at := reply.Header.Get("Location"); at != dashboard.Root {
			t.Errorf("%q leads to %q", next, at)
		}
	}
	next := dashboard.Root + "?environment=sandbox&q=a%20b"
	b := r.browser("")
	b.do("?environment=sandbox&q=a%20b", nil).want(t, http.StatusUnauthorized, html.EscapeString(next))
	if at := b.do("/sign-in", url.Values{"key": {key.Key.Reveal()}, "next": {next}}).Header.Get("Location"); at != next {
		t.Errorf("a page of ours leads to %q", at)
	}
}

func TestPageThatPollsKeepsNoIdleSession(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	r.state.SetClock(func() time.Time { return now })
	b := r.browser("")
	b.do("/sign-in", url.Values{"key": {r.key("acme", "Manager", true).Key.Reveal()}}).want(t, http.StatusSeeOther)
	now = now.Add(29 * time.Minute)
	b.do("", nil).want(t, http.StatusOK) // by a person: half an hour from here
	b.header.Set("X-Rekall-Poll", "1")
	for range 29 {
		now = now.Add(time.Minute)
		b.do("", nil).want(t, http.StatusOK)
	}
	now = now.Add(2 * time.Minute)
	b.do("", nil).want(t, http.StatusUnauthorized, "<h1>Sign in</h1>")
	b.header.Del("X-Rekall-Poll")
	b.do("", nil).want(t, http.StatusUnauthorized)
}

func TestSigningInEndsTheFormerSession(t *testing.T) {
	r := newRig(t)
	b, former := r.browser(""), r.browser("")
	form := url.Values{"key": {r.key("acme", "Manager", true).Key.Reveal()}}
	cookie, _, _ := strings.Cut(b.do("/sign-in", form).Header.Get("Set-Cookie"), ";")
	former.header.Set("Cookie", cookie)
	former.do("", nil).want(t, http.StatusOK)
	b.do("/sign-in", form).want(t, http.StatusSeeOther)
	b.do("", nil).want(t, http.StatusOK)
	former.do("", nil).want(t, http.StatusUnauthorized, "<h1>Sign in</h1>")
}

// TestNoKeySignsOthersOutBySigningInWithoutEnd plays holders of one key and of many: there are places for 10,000 sessions.
func TestNoKeySignsOthersOutBySigningInWithoutEnd(t *testing.T) {
	r := newRig(t)
	state := r.state
	victim, first, second := state.SignIn("victim"), state.SignIn("attacker"), state.SignIn("attacker")
	for range 19 {
		state.SignIn("attacker")
	}
	if state.SignedIn(first) || !state.SignedIn(second) {
		t.Error("it is not the key's own oldest session that makes room")
	}
	for i := range 10_100 {
		state.SignIn(fmt.Sprint("attacker", i/20))
	}
	if n := state.Sessions(); n != 10_000 {
		t.Errorf("%d sessions", n)
	}
	if !state.SignedIn(victim) || !state.SignedIn(state.SignIn("newcomer")) {
		t.Error("a key with one session was signed out")
	}
}

func TestFormThatDoesNotComeIsNotWaitedFor(t *testing.T) {
	r := newRig(t)
	conn, err := net.Dial("tcp", r.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "POST "+dashboard.Root+"/sign-in HTTP/1.1\r\nHost: a\r\n"+
		"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\nkey="); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") {
		t.Errorf("%q, %v", answer, err)
	}
}

func TestFormLongerThanAnybodyFillsInIsRefused(t *testing.T) {
	r := newRig(t)
	form := url.Values{"key": {r.key("acme", "Manager", true).Key.Reveal()}, "more": {strings.Repeat("x", 32<<10)}}
	r.browser("").do("/sign-in", form).want(t, http.StatusBadRequest, "could not be read")
}

func TestNobodyButAManagingKeySignsIn(t *testing.T) {
	r := newRig(t)
	b := r.browser("")
	plain := r.key("acme", "Plain", false)
	b.do("/sign-in", url.Values{"key": {plain.Key.Reveal()}}).want(t, http.StatusForbidden, "may not manage keys")
	b.do("/sign-in", url.Values{"key": {apikey.Generate(apikey.Production)}}).want(t, http.StatusUnauthorized, "not valid")
	b.do("/sign-in", url.Values{}).want(t, http.StatusUnauthorized)
	for _, path := range []string{"", "/new", "/" + plain.ID, "/nothing"} {
		b.do(path, nil).want(t, http.StatusUnauthorized, "<h1>Sign in</h1>")
	}
	b.do("/"+plain.ID+"/revoke", url.Values{"name": {"Plain"}}).want(t, http.StatusUnauthorized)
	if strings.Contains(r.log.String(), plain.Key.Reveal()) {
		t.Error("the log has the key")
	}
}

// narrow signs in with a key that manages keys of one environment and has two scopes.
func (r *rig) narrow(environment string) *browser {
	r.t.Helper()
	key, _, err := r.admin.Create(r.t.Context(), operator, keyadmin.CreateRequest{
		Name: "Narrow", Account: "acme", Environment: environment, Scopes: []string{"entities:read", "entities:write"}, ManageKeys: true,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	b := r.browser("")
	b.do("/sign-in", url.Values{"key": {key.Key.Reveal()}}).want(r.t, http.StatusSeeOther)
	return b
}

func TestPageNamesTheScopesForWhichAKeyCannotBeRotated(t *testing.T) {
	r := newRig(t)
	wide := r.key("acme", "Wide", false)
	b := r.narrow("production")
	page := b.do("/"+wide.ID+"/rotate", url.Values{"overlap": {"0"}})
	page.want(t, http.StatusForbidden, "The key has scopes that yours does not have (memories:read ", "so you cannot be handed its successor.")
}

func TestQuickChoicesOfANarrowManagerMakeAKey(t *testing.T) {
	r := newRig(t)
	for _, environment := range []string{"production", "sandbox"} {
		b := r.narrow(environment)
		form := b.do("/new", nil)
		form.want(t, http.StatusOK, `value="`+environment+`" checked`, "You can give the scopes of the key", `value="memories:read" disabled`)
		if environment == "sandbox" {
			form.want(t, http.StatusOK, "sandbox keys only")
		}
		for choose, want := range map[string]string{"read": "entities:read", "all": "entities:read entities:write"} {
			values := createForm(choose)
			values.Del("scope")
			values.Set("environment", environment)
			values.Set("choose", choose)
			filled := b.do("/new", values)
			values.Del("choose")
			for _, scope := range regexp.MustCompile(`name="scope" value="([^"]+)" checked`).FindAllStringSubmatch(filled.body, -1) {
				values.Add("scope", scope[1])
			}
			b.do("/new", values).want(t, http.StatusCreated)
			if got := strings.Join(values["scope"], " "); got != want {
				t.Errorf("%s chooses %s, want %s", choose, got, want)
			}
		}
	}
}

func TestSandboxManagerIsToldNothingOfProduction(t *testing.T) {
	r := newRig(t)
	r.key("acme", "Production one", false)
	b := r.narrow("sandbox")
	for _, path := range []string{"", "?environment=production"} {
		page := b.do(path, nil)
		page.want(t, http.StatusOK, "Narrow", `environment=sandbox" aria-current="page"`)
		if strings.Contains(page.body, "No production key") || strings.Contains(page.body, "environment=production") {
			t.Errorf("%q speaks of production keys", path)
		}
	}
}

func TestListFiltersSortsAndPages(t *testing.T) {
	r := newRig(t)
	for i := range 30 {
		r.key("acme", fmt.Sprintf("Key %02d", 29-i), false)
	}
	b := r.browser("ann@acme")
	first := b.do("?sort=name", nil)
	first.want(t, http.StatusOK, "Key 00", "Key 24", "30 keys", "Next page")
	if strings.Contains(first.body, "Key 25") || strings.Index(first.body, "Key 00") > strings.Index(first.body, "Key 01") {
		t.Error("the first page is not the first 25 by name")
	}
	second := b.do(first.next(t), nil)
	second.want(t, http.StatusOK, "Key 25", "Key 29")
	if strings.Contains(second.body, "Key 24") {
		t.Error("the second page repeats the first")
	}
	b.do("?q=key+07", nil).want(t, http.StatusOK, "Key 07", "1 key</caption>", "1 key</span>")
	b.do("?q=absent", nil).want(t, http.StatusOK, "No key matches")
	b.do("?status=revoked", nil).want(t, http.StatusOK, "No key matches")
	b.do("?environment=sandbox", nil).want(t, http.StatusOK, "No sandbox keys yet")
	ended := r.key("acme", "Ended early", false)
	pgtest.Exec(t, r.database, `update rekall.api_keys set expires_at = now() + interval '90 days', revoked_at = now() where id = $1`, ended.ID)
	if page := b.do("?status=revoked", nil); !strings.Contains(page.body, "Ended early") || strings.Contains(page.body, "in 3 months") {
		t.Errorf("a revoked key is said to expire one day:\n%s", page.body)
	}
	for _, sort := range []string{"", "name", "last-used", "expires"} {
		for _, cursor := range []string{"nonsense", "%21", base64.RawURLEncoding.EncodeToString([]byte("x key_ y"))} {
			b.do("?sort="+sort+"&cursor="+cursor, nil).want(t, http.StatusBadRequest, "Cursor must be")
		}
	}
}

// next is the path to the next page of a list.
func (r reply) next(t *testing.T) string {
	t.Helper()
	next := regexp.MustCompile(`href="` + dashboard.Root + `(\?[^"]*cursor[^"]*)"`).FindStringSubmatch(r.body)
	if next == nil {
		t.Fatal("there is no next page")
	}
	return html.UnescapeString(next[1])
}

func TestNextPageGoesOnThoughThePagesLastKeyHasLeftTheList(t *testing.T) {
	r := newRig(t)
	for i := range 30 {
		key := r.key("acme", fmt.Sprintf("Key %02d", i%10), false)
		if i%2 == 0 {
			pgtest.Exec(t, r.database, `update rekall.api_keys set expires_at = now() + make_interval(hours => 1000 - $2) where id = $1`, key.ID, i)
			pgtest.Exec(t, r.database, `insert into rekall.last_used (key_id, first_used_at, last_used_at) values ($1, now(), now() - make_interval(mins => $2))`, key.ID, i)
		}
	}
	b := r.browser("ann@acme")
	rows := func(page reply) (ids []string) {
		for _, row := range regexp.MustCompile(`<td[^>]* class="name"><a href="`+dashboard.Root+`/(key_[0-9A-Za-z]{22})"`).FindAllStringSubmatch(page.body, -1) {
			ids = append(ids, row[1])
		}
		return ids
	}
	for i, sort := range []string{"", "name", "last-used", "expires"} {
		first := b.do("?status=active&sort="+sort, nil)
		shown := rows(first)
		if len(shown) != 25 {
			t.Fatalf("%q: %d keys on the first page", sort, len(shown))
		}
		if _, err := r.admin.Revoke(t.Context(), operator, shown[24]); err != nil {
			t.Fatal(err)
		}
		all := append(shown, rows(b.do(first.next(t), nil))...)
		listed := len(all)
		slices.Sort(all)
		if different, want := len(slices.Compact(all)), 30-i; listed != want || different != want {
			t.Errorf("%q: the pages have %d keys, %d different ones, want %d", sort, listed, different, want)
		}
	}
}

func TestMarksAndChartSayWhatNeedsALook(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Busy", false)
	pgtest.Exec(t, r.database, `insert into rekall.usage (key_id, hour, outcome, count) select $1, date_trunc('hour', now()) - interval '1 hour' * n, 'allowed', 12 from generate_series(1, 40) n`, key.ID)
	pgtest.Exec(t, r.database, `insert into rekall.usage (key_id, hour, outcome, count) values ($1, date_trunc('hour', now()) - interval '1 hour', 'scope_insufficient', 34567)`, key.ID)
	pgtest.Exec(t, r.database, `insert into rekall.spikes (key_id, hour, threshold) values ($1, date_trunc('hour', now()) - interval '1 hour', 321)`, key.ID)
	b := r.browser("ann@acme")
	b.do("", nil).want(t, http.StatusOK, "Spike", "Never used")
	for _, span := range []string{"24h", "7d", "30d"} {
		b.do("/"+key.ID+"?range="+span, nil).want(t, http.StatusOK, "scope insufficient", "34,567", "spikes: 1", "Spike")
	}
}

func TestKeyTypedIntoTheWrongFieldDoesNotComeBack(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Key", false)
	b := r.browser("ann@acme")
	mistaken := apikey.Generate(apikey.Production)
	for what, page := range map[string]reply{
		"search": b.do("?q="+mistaken, nil),
		"create": b.do("/new", createForm(mistaken)),
		"rename": b.do("/"+key.ID+"/rename", url.Values{"name": {mistaken}}),
		"revoke": b.do("/"+key.ID+"/revoke", url.Values{"name": {mistaken}}),
	} {
		if apikey.ContainsKey(page.body) {
			t.Errorf("%s: %d, and the page has the key", what, page.StatusCode)
		}
	}
}

func TestPageOfAKeyTellsItsIDItsLimitsAndWhenExactlyItEnds(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Key", false)
	pgtest.Exec(t, r.database, `update rekall.api_keys set expires_at = '2036-05-04 12:34:56Z' where id = $1`, key.ID)
	perMinute := 1234
	if _, err := r.admin.SetKeyLimits(t.Context(), operator, key.ID, keyadmin.LimitsChange{PerMinute: &perMinute}); err != nil {
		t.Fatal(err)
	}
	r.browser("ann@acme").do("/"+key.ID, nil).want(t, http.StatusOK,
		"<code>"+key.ID+"</code>", ">4 May 2036, 12:34:56 UTC<", "1234 a minute, 1851 in 15 seconds")
}

func TestKeyThatEndsInThousandsOfYearsIsSaidToEndThen(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Key", false)
	pgtest.Exec(t, r.database, `update rekall.api_keys set expires_at = '9998-12-31 00:00Z' where id = $1`, key.ID)
	page := r.browser("ann@acme").do("/"+key.ID, nil)
	if !regexp.MustCompile(`>in \d,\d{3} years</time><span class="by">31 December 9998`).MatchString(page.body) {
		t.Error("the page does not say so")
	}
}

func TestSparklineAndMarksAreOfSevenDays(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Old spike", false)
	pgtest.Exec(t, r.database, `insert into rekall.usage (key_id, hour, outcome, count)
		select $1, date_trunc('hour', now()) - interval '1 day' * n, 'allowed', 1 from generate_series(0, 20) n`, key.ID)
	spike := func(daysAgo int) {
		pgtest.Exec(t, r.database, `insert into rekall.spikes (key_id, hour, threshold)
			values ($1, date_trunc('hour', now()) - interval '1 day' * $2, 321)`, key.ID, daysAgo)
	}
	spike(20)
	b := r.browser("ann@acme")
	if n := strings.Count(b.do("", nil).body, "<g>"); n != 7 {
		t.Errorf("the sparkline has %d days", n)
	}
	for _, path := range []string{"", "/" + key.ID + "?range=24h", "/" + key.ID, "/" + key.ID + "?range=30d"} {
		if strings.Contains(b.do(path, nil).body, "than usual in the last 7 days") {
			t.Errorf("%q marks a spike of 20 days ago", path)
		}
	}
	spike(3)
	for _, path := range []string{"", "/" + key.ID + "?range=24h", "/" + key.ID, "/" + key.ID + "?range=30d"} {
		b.do(path, nil).want(t, http.StatusOK, "than usual in the last 7 days")
	}
}

func TestPageOfAKeyWhoseSuccessorIsRevokedOffersToRotateItAgain(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	for overlap, texts := range map[string][]string{"1d": {"Nothing takes over", "Undo rotation"}, "on-first-use": {"Was to be replaced by"}} {
		old := r.key("acme", "Old", false)
		shown := b.do("/"+old.ID+"/rotate", url.Values{"overlap": {overlap}})
		shown.want(t, http.StatusCreated)
		rotateLink := dashboard.Root + "/" + old.ID + `/rotate"`
		if page := b.do("/"+old.ID, nil); strings.Contains(page.body, rotateLink) || !strings.Contains(page.body, "Being rotated") {
			t.Errorf("%s: rotation is offered twice", overlap)
		}
		rotated, err := r.admin.Get(t.Context(), operator, old.ID)
		if err != nil {
			t.Fatal(err)
		}
		successor := *rotated.Successor
		if _, err := r.admin.Revoke(t.Context(), operator, successor); err != nil {
			t.Fatal(err)
		}
		page := b.do("/"+old.ID, nil)
		page.want(t, http.StatusOK, append(texts, rotateLink, successor)...)
		for _, text := range []string{"Being rotated", "takes over.", "Was replaced by", "data-live"} {
			if strings.Contains(page.body, text) {
				t.Errorf("%s: the page says %q", overlap, text)
			}
		}
		b.do("/"+old.ID+"/rotate", url.Values{"overlap": {overlap}}).want(t, http.StatusCreated)
	}
}

// age has a rotation begin days ago, which the database refuses otherwise.
func (r *rig) age(key keyadmin.Key, days int) {
	r.t.Helper()
	pgtest.Exec(r.t, r.database, fmt.Sprintf(`do $$ begin
	alter table rekall.api_keys disable trigger stamp;
	update rekall.api_keys set created_at = now() - interval '%d days' where '%s' in (id, predecessor);
	alter table rekall.api_keys enable always trigger stamp;
end $$`, days, key.ID))
}

func TestPageOfARotationThatIsYearsOldOpens(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	old := r.key("acme", "Old", false)
	b.do("/"+old.ID+"/rotate", url.Values{"overlap": {"on-first-use"}}).want(t, http.StatusCreated)
	r.age(old, 800)
	b.do("/"+old.ID, nil).want(t, http.StatusOK, "Being rotated")
}

func TestTrafficHasMovedOnceTheOldKeyIsNoLongerUsedHoweverBusyItWas(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	old := r.key("acme", "Old", false)
	b.do("/"+old.ID+"/rotate", url.Values{"overlap": {"7d"}}).want(t, http.StatusCreated)
	r.age(old, 3)
	rotated, err := r.admin.Get(t.Context(), operator, old.ID)
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, r.database, `insert into rekall.usage (key_id, hour, outcome, count) values
		($1, date_trunc('hour', now()) - interval '5 hours', 'allowed', 1000000),
		($2, date_trunc('hour', now()), 'allowed', 3)`, old.ID, *rotated.Successor)
	pgtest.Exec(t, r.database, `insert into rekall.last_used (key_id, first_used_at, last_used_at)
		values ($1, now() - interval '2 days', now() - interval '5 hours')`, old.ID)
	b.do("/"+old.ID, nil).want(t, http.StatusOK, "All traffic has moved.", "Old key last used:", "5 hours ago", "<b>3</b> (100 %)")
}

func TestPageShowsNoNegativeNumberOfCountsThatAnEdgeMadeUp(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	old := r.key("acme", "Old", false)
	next, _, err := r.admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, r.database, `insert into rekall.usage (key_id, hour, outcome, count)
		select key_id, date_trunc('hour', now()) - hours * interval '1 hour', outcome, 9223372036854775807
		from unnest(array[$1, $2]) key_id, unnest(array['allowed', 'expired']) outcome, generate_series(0, 100) hours`, old.ID, next.ID)
	for _, path := range []string{"", "/" + old.ID, "/" + old.ID + "?range=30d", "/" + next.ID} {
		page := b.do(path, nil)
		page.want(t, http.StatusOK)
		if negative := regexp.MustCompile(`[ >]-[0-9]|(height|y)="-`).FindString(page.body); negative != "" {
			t.Errorf("%q shows %s", path, negative)
		}
	}
	b.do("/"+old.ID, nil).want(t, http.StatusOK, "(50 %)", `class="new" width="50"`)
}

func TestUndoingARotationWhoseSuccessorIsInUseAsksForItsName(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	old := r.key("acme", "Old", false)
	b.do("/"+old.ID+"/rotate", url.Values{"overlap": {"7d"}}).want(t, http.StatusCreated)
	successor := func() keyadmin.Key {
		rotated, err := r.admin.Get(t.Context(), operator, old.ID)
		if err != nil {
			t.Fatal(err)
		}
		key, err := r.admin.Get(t.Context(), operator, *rotated.Successor)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	id := successor().ID
	stale := b.do("/"+old.ID, nil)
	stale.want(t, http.StatusOK, `<form method="post" action="`+dashboard.Root+"/"+old.ID+`/rotate/undo"`)
	b.do("/"+old.ID+"/rotate/undo", nil).want(t, http.StatusSeeOther)
	pgtest.Exec(t, r.database, `insert into rekall.last_used (key_id, first_used_at, last_used_at) values ($1, now(), now())`, id)
	if page := b.do("/"+old.ID, nil); strings.Contains(page.body, `<form method="post" action="`+dashboard.Root+"/"+old.ID+`/rotate/undo"`) ||
		!strings.Contains(page.body, `href="`+dashboard.Root+"/"+old.ID+`/rotate/undo"`) {
		t.Error("the page revokes a key that is in use with one click")
	}
	b.do("/"+old.ID+"/rotate/undo", nil).want(t, http.StatusOK, "Type the successor", id)
	for problem, form := range map[string]url.Values{"The successor is in use.": {}, "not the successor": {"name": {"old"}}} {
		b.do("/"+old.ID+"/rotate/undo", form).want(t, http.StatusUnprocessableEntity, problem)
	}
	if key := successor(); key.Status != keyadmin.Active {
		t.Fatal("the successor is revoked")
	}
	b.do("/"+old.ID+"/rotate/undo", url.Values{"name": {"Old"}}).want(t, http.StatusSeeOther)
	if key, err := r.admin.Get(t.Context(), operator, id); err != nil || key.Status != keyadmin.Revoked {
		t.Errorf("the successor is %s, %v", key.Status, err)
	}
}

func TestAccountThatMayMakeOrRenameNoMoreKeysIsToldByThePageWhenItMay(t *testing.T) {
	r := newRig(t)
	pgtest.Exec(t, r.database, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_by, created_at)
		select 'key_' || lpad(n::text, 22, '0'), 'acme', 'n', 'sandbox', sha256(n::text::bytea), '{}', 'user:ann', now() - interval '20 hours'
		from generate_series(1, $1::int) n`, keysPerDay)
	pgtest.Exec(t, r.database, `insert into rekall.audit (at, actor, action, account)
		select now() - interval '20 hours', 'user:ann', 'key.renamed', 'acme' from generate_series(1, $1::int)`, keysPerDay)
	for path, test := range map[string]struct {
		form url.Values
		said string
	}{
		"/new":                               {createForm("One more"), "has made as many keys as it may"},
		"/key_0000000000000000000001/rename": {url.Values{"name": {"Other"}}, "has renamed keys as often as it may"},
	} {
		page := r.browser("ann@acme").do(path, test.form)
		page.want(t, http.StatusTooManyRequests, test.said)
		if seconds, err := strconv.Atoi(page.Header.Get("Retry-After")); err != nil || seconds < 1 || seconds > 4*3600 {
			t.Errorf("%s: Retry-After %q", path, page.Header.Get("Retry-After"))
		}
	}
}

func TestUndoingARotationShowsTheSuccessorsSuccessorThatLivesOn(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	old := r.key("acme", "Old", false)
	rotate := func(id string) keyadmin.Key {
		key, _, err := r.admin.Rotate(t.Context(), operator, id, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour}})
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	next := rotate(rotate(old.ID).ID)
	undo := func() reply {
		done := b.do("/"+old.ID+"/rotate/undo", url.Values{})
		done.want(t, http.StatusSeeOther)
		return b.do(strings.TrimPrefix(done.Header.Get("Location"), dashboard.Root), nil)
	}
	undo().want(t, http.StatusOK, "The rotation is undone.", "lives on", `href="`+dashboard.Root+"/"+next.ID+`"`)
	if _, err := r.admin.Revoke(t.Context(), operator, next.ID); err != nil {
		t.Fatal(err)
	}
	again := b.do("/"+old.ID+"?done=undone", nil)
	again.want(t, http.StatusOK, "The rotation is undone.")
	rotate(old.ID)
	for name, page := range map[string]reply{"revoked meanwhile": again, "without one": undo()} {
		if strings.Contains(page.body, "lives on") {
			t.Errorf("%s: the page shows a successor's successor", name)
		}
	}
}

func TestRotationIsMadeOnceThoughItsFormIsSentAgain(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	for _, overlap := range []string{"0", "1d"} {
		old := r.key("acme", "Old", false)
		once := regexp.MustCompile(`name="once" value="([^"]+)"`).FindStringSubmatch(b.do("/"+old.ID+"/rotate", nil).body)
		if once == nil {
			t.Fatal("the form is not made for one rotation")
		}
		form := url.Values{"overlap": {overlap}, "once": {once[1]}}
		b.do("/"+old.ID+"/rotate", form).want(t, http.StatusCreated)
		rotated, err := r.admin.Get(t.Context(), operator, old.ID)
		if err != nil {
			t.Fatal(err)
		}
		again := b.do("/"+old.ID+"/rotate", form)
		again.want(t, http.StatusSeeOther)
		if want := dashboard.Root + "/" + *rotated.Successor + "?done=existing"; again.Header.Get("Location") != want {
			t.Errorf("%s: sent again, it leads to %s, want %s", overlap, again.Header.Get("Location"), want)
		}
		b.do("/"+*rotated.Successor+"?done=existing", nil).want(t, http.StatusOK, "That form was sent before")
	}
}

// TestSuccessorThatNobodyCopiedIsNotSaidToBeReplacedByAnother: revoked, it would leave the old key without the end that its first use sets.
func TestSuccessorThatNobodyCopiedIsNotSaidToBeReplacedByAnother(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	key := r.key("acme", "Created", false)
	old := r.key("acme", "Old", false)
	next, _, err := r.admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour, OnFirstUse: true}})
	if err != nil {
		t.Fatal(err)
	}
	const another, undo = "If you did not copy it, revoke it and create another.", "If you did not copy it, undo the rotation of the older key"
	b.do("/"+key.ID+"?done=existing", nil).want(t, http.StatusOK, another)
	page := b.do("/"+next.ID+"?done=existing", nil)
	page.want(t, http.StatusOK, undo, "If the older key has ended, revoke this one and create another.", `href="`+dashboard.Root+"/"+old.ID+`"`)
	if strings.Contains(page.body, another) {
		t.Error("the page has a successor revoked that the old key waits for")
	}
}

func TestLinkMakesThePageClaimNothingThatIsNotSo(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Leaked", false)
	b := r.browser("ann@acme")
	for _, word := range []string{"revoked", "undone", "rotated", "awaited", "ended"} {
		for _, page := range []reply{b.do("/"+key.ID+"?done="+word, nil), b.do("?done="+word, nil), r.browser("").do("?done="+word, nil)} {
			if strings.Contains(page.body, `class="notice"`) || strings.Contains(page.body, `class="warning"`) {
				t.Errorf("%s has a notice", page.Request.URL)
			}
		}
	}
	if _, err := r.admin.Revoke(t.Context(), operator, key.ID); err != nil {
		t.Fatal(err)
	}
	b.do("/"+key.ID+"?done=revoked", nil).want(t, http.StatusOK, "The key is revoked, for good.")
	b.do("/"+key.ID+"?done=ended", nil).want(t, http.StatusOK, "This key has ended.")
}

// TestFormThatChangedNothingIsAnsweredWithAWarning: in the colors of what was done, a refusal looks like success.
func TestFormThatChangedNothingIsAnsweredWithAWarning(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	once := apikey.RandomText(32)
	rotate, at := url.Values{"overlap": {"on-first-use"}, "once": {once}}, url.Values{"overlap": {"0"}}
	old, free, ended := r.key("acme", "Old", false), r.key("acme", "Free", false), r.key("acme", "Ended", false)
	b.do("/"+old.ID+"/rotate", rotate).want(t, http.StatusCreated)
	rotated, err := r.admin.Get(t.Context(), operator, old.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.admin.Revoke(t.Context(), operator, ended.ID); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		path string
		form url.Values
		said string
	}{
		{"/" + old.ID + "/rotate", rotate, `<p class="warning" role="alert">That form was sent before`},
		{"/" + old.ID + "/rotate", at, `<p class="warning" role="alert">This key is being rotated already.`},
		{"/" + *rotated.Successor + "/rotate", at, `<p class="warning" role="alert">This key was not used yet`},
		{"/" + ended.ID + "/rotate", at, `<p class="warning" role="alert">This key has ended.`},
		{"/" + free.ID + "/rotate/undo", url.Values{}, `<p class="warning" role="alert">This key is not being rotated`},
		{"/" + free.ID + "/rename", url.Values{"name": {"Free, still"}}, `<p class="notice" role="status">The key has its new name.`},
		{"/" + old.ID + "/rotate/undo", url.Values{}, `<p class="notice" role="status">The rotation is undone.`},
		{"/" + free.ID + "/revoke", url.Values{"name": {free.ID}}, `<p class="notice" role="status">The key is revoked`},
	} {
		done := b.do(test.path, test.form)
		done.want(t, http.StatusSeeOther)
		b.do(strings.TrimPrefix(done.Header.Get("Location"), dashboard.Root), nil).want(t, http.StatusOK, test.said)
	}
}

// TestEachFormThatChangesAKeyIsSentOnce: a second click loses what the answer to the first says.
func TestEachFormThatChangesAKeyIsSentOnce(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	rotate := func(key keyadmin.Key) keyadmin.Key {
		next, _, err := r.admin.Rotate(t.Context(), operator, key.ID, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour}})
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	rotated, alone := r.key("acme", "Rotated", false), r.key("acme", "Alone", false)
	rotate(rotated)
	if _, err := r.admin.Revoke(t.Context(), operator, rotate(alone).ID); err != nil {
		t.Fatal(err)
	}
	undo := func(key keyadmin.Key) string { return `action="` + dashboard.Root + "/" + key.ID + `/rotate/undo"` }
	for path, form := range map[string]string{
		"/new": `action="` + dashboard.Root + `/new"`, "/" + rotated.ID: undo(rotated), "/" + alone.ID: undo(alone),
		"/" + rotated.ID + "/revoke": "/revoke", "/" + rotated.ID + "/rotate": "/rotate",
	} {
		forms := regexp.MustCompile(`<form method="post"[^>]*>`).FindAllString(b.do(path, nil).body, -1)
		if !strings.Contains(strings.Join(forms, ""), form) {
			t.Errorf("%s has no form with %s", path, form)
		}
		for _, form := range forms {
			if !strings.Contains(form, " data-once") {
				t.Errorf("%s can be sent twice: %s", path, form)
			}
		}
	}
}

// TestTitleOfAFormThatComesBackSaysThatItHasAProblem: who hears the page hears its title first.
func TestTitleOfAFormThatComesBackSaysThatItHasAProblem(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	key, old := r.key("acme", "Mine", false), r.key("acme", "Old", false)
	next, _, err := r.admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, r.database, `insert into rekall.last_used (key_id, first_used_at, last_used_at) values ($1, now(), now())`, next.ID)
	for _, test := range []struct {
		b           *browser
		path, title string
		form        url.Values
		status      int
	}{
		{b, "/" + key.ID + "/revoke", "Revoke key", url.Values{"name": {"other"}}, http.StatusUnprocessableEntity},
		{b, "/" + old.ID + "/rotate/undo", "Undo rotation", url.Values{"name": {"other"}}, http.StatusUnprocessableEntity},
		{b, "/" + key.ID + "/rename", "Mine", url.Values{"name": {""}}, http.StatusUnprocessableEntity},
		{b, "/new", "Create New Key", createForm(""), http.StatusUnprocessableEntity},
		{r.browser(""), "/sign-in", "Sign in", url.Values{"key": {"rk_none"}}, http.StatusUnauthorized},
	} {
		test.b.do(test.path, test.form).want(t, test.status, "<title>Error: "+test.title+" ")
	}
	r.browser("").do("", nil).want(t, http.StatusUnauthorized, "<title>Sign in ")
	for path, title := range map[string]string{"/" + key.ID + "/revoke": "Revoke key", "/" + old.ID + "/rotate/undo": "Undo rotation", "/new": "Create New Key"} {
		b.do(path, nil).want(t, http.StatusOK, "<title>"+title+" ")
	}
}

func TestPageClaimsNothingOfEdgesThatDoNotReport(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Key", false)
	b := r.browser("ann@acme")
	b.do("/"+key.ID+"/revoke", url.Values{"name": {"Key"}}).want(t, http.StatusSeeOther)
	var page reply
	eventually.Within(t, 30*time.Second, "the page says that no edge reports", func() bool {
		page = b.do("/"+key.ID, nil)
		return strings.Contains(page.body, "No edge reports")
	})
	for _, claim := range []string{"allows this key", "have confirmed"} {
		if strings.Contains(page.body, claim) {
			t.Errorf("the page says %q", claim)
		}
	}
}

func TestPageWeighsLessThan100KiBWithAllThatItLoads(t *testing.T) {
	r := newRig(t)
	for i := range 25 {
		key := r.key("acme", fmt.Sprintf("%s %d", strings.Repeat("n", 190), i), false)
		pgtest.Exec(t, r.database, `insert into rekall.usage (key_id, hour, outcome, count) select $1, date_trunc('hour', now()) - interval '1 hour' * n, 'allowed', 1234567 from generate_series(0, 168) n`, key.ID)
	}
	b := r.browser("ann@acme")
	list := b.do("", nil)
	for name, page := range map[string]reply{"list": list, "key": b.do("/"+keyPath.FindString(list.body), nil), "form": b.do("/new", nil)} {
		sum := len(page.body)
		for _, file := range regexp.MustCompile(dashboard.Root+`(/[a-z.]+[?][0-9a-f]{12})"`).FindAllStringSubmatch(page.body, -1) {
			asset := b.do(file[1], nil)
			asset.want(t, http.StatusOK)
			if !strings.Contains(asset.Header.Get("Cache-Control"), "immutable") {
				t.Errorf("%s is not kept by browsers", file[1])
			}
			sum += len(asset.body)
		}
		if t.Logf("%s: %d bytes", name, sum); sum > 100<<10 {
			t.Errorf("%s: %d bytes with all that it loads", name, sum)
		}
	}
}

func TestPostgresThatIsGoneIsSaidAndNothingElse(t *testing.T) {
	r := newRig(t)
	pgtest.Exec(t, r.database, "alter table rekall.api_keys rename to gone")
	reply := r.browser("ann@acme").do("", nil)
	reply.want(t, http.StatusServiceUnavailable, "Keys cannot be managed right now. Try again shortly.")
	if reply.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if strings.Contains(reply.body, "api_keys ") || !strings.Contains(r.log.String(), "the dashboard cannot manage keys") {
		t.Errorf("body %s\nlog %s", reply.body, r.log)
	}
}

// Package dashboard is the pages of key management, /settings/api-keys: HTML forms over keyadmin, from the binary, for a
// person whom the server around it has authenticated, or for one who signs in with a managing key. Everything but the live
// views works without JavaScript, and nothing is loaded from elsewhere.
package dashboard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/scoperule"
)

// Root is the path of the list; all others begin with it.
const Root = "/settings/api-keys"

// maxForm is far more than the longest form that anybody fills in, in bytes.
const maxForm = 32 << 10

// ErrNobody says that the server has authenticated no person: whoever asks may sign in with a key.
var ErrNobody = errors.New("nobody is signed in")

// Config of a Dashboard. Nothing may be left out.
type Config struct {
	Admin *keyadmin.Admin

	// Person returns the person whom the server has authenticated. Its error is ErrNobody, an *apierror.Error, or one of keyadmin's.
	Person func(*http.Request) (keyadmin.Actor, error)

	// SignIn returns the holder of a key that was typed into the form. Its error is an *apierror.Error, or one of keyadmin's.
	SignIn func(r *http.Request, key string) (keyadmin.Actor, error)

	// Secure reports whether the visitor's browser sent a request with TLS, perhaps to a proxy in front.
	Secure func(*http.Request) bool

	// Answered is told of each page that was shown, with nil, and of each request that could not be carried out though nobody refused
	// it, with why.
	Answered func(r *http.Request, err error)

	// State outlives the Dashboard, so that a new configuration of the server signs nobody out.
	State *State

	Logger *zap.Logger
}

// Dashboard serves Root and all below it.
type Dashboard struct {
	Config
	handler http.Handler
}

// New returns a Dashboard.
func New(config Config) *Dashboard {
	d := &Dashboard{Config: config}
	mux := http.NewServeMux()
	const key = Root + "/{id}"
	for pattern, page := range map[string]page{
		"GET " + Root:                    long(d.list),
		"GET " + Root + "/new":           d.newKey,
		"POST " + Root + "/new":          d.create,
		"GET " + key:                     long(d.key),
		"POST " + key + "/rename":        long(d.rename),
		"GET " + key + "/rotate":         d.rotateForm,
		"POST " + key + "/rotate":        d.rotate,
		"GET " + key + "/rotate/undo":    d.undoForm,
		"POST " + key + "/rotate/undo":   d.undoRotation,
		"GET " + key + "/revoke":         d.revokeForm,
		"POST " + key + "/revoke":        d.revoke,
		"GET " + Root + "/{$}":           d.toList,
		"GET " + Root + "/" + signInPath: d.toList,
	} {
		mux.Handle(pattern, signedIn{d, page})
	}
	mux.HandleFunc("POST "+Root+"/"+signInPath, d.signIn)
	mux.HandleFunc("POST "+Root+"/sign-out", d.signOut)
	for _, file := range assetNames {
		mux.HandleFunc("GET "+Root+"/"+file, asset)
	}
	mux.Handle("/", signedIn{d, func(*visit) error { return errNoPage }})

	crossOrigin := http.NewCrossOriginProtection()
	crossOrigin.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		(&visit{Dashboard: d, w: w, r: r}).fail(errCrossOrigin)
	}))
	d.handler = crossOrigin.Handler(mux)
	return d
}

// contentSecurityPolicy lets a page load the files below, talk to and send forms to its own site, and nothing else. A name
// that got through the templates' escaping could still run nothing: not inline, and not through the DOM (Trusted Types).
const contentSecurityPolicy = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; " +
	"base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// ServeHTTP answers any request, also for paths that do not exist.
func (d *Dashboard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", contentSecurityPolicy)
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Referrer-Policy", "same-origin") // with no-referrer, browsers send forms with the Origin "null"
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(keyadmin.ReadWithin)) // where that cannot be set, the server's holds
	ctx, cancel := context.WithTimeout(r.Context(), keyadmin.AnswerWithin)
	defer cancel()
	r = r.WithContext(ctx)
	// The mux would redirect what is not canonical, with whatever the path has in it.
	if !scoperule.Canonical(r.URL.EscapedPath()) {
		(&visit{Dashboard: d, w: w, r: r}).fail(errNoPage)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	d.handler.ServeHTTP(w, r)
}

// visit is one request of somebody who may manage keys.
type visit struct {
	*Dashboard
	w     http.ResponseWriter
	r     *http.Request
	actor keyadmin.Actor

	usageUntil time.Time // when reading usage is given up: a page has time for that once
}

// page answers a visit, or returns why it cannot, with nothing written.
type page func(*visit) error

// long has a page that may be long wait for its turn, which ends when the browser has it.
func long(do page) page {
	return func(v *visit) error {
		end, err := v.Admin.TurnToShow(v.r.Context(), v.actor)
		if err != nil {
			return err
		}
		defer end()
		return do(v)
	}
}

// signedIn is a page for those who may manage keys. All others get the sign-in form, whatever the page.
type signedIn struct {
	d    *Dashboard
	page page
}

func (s signedIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v := &visit{Dashboard: s.d, w: w, r: r}
	var err error
	if v.actor, err = s.d.actor(r); err == nil {
		err = s.page(v)
	}
	if err != nil {
		v.fail(err)
		return
	}
	s.d.Answered(r, nil)
}

// actor finds out who asks: a person, else the holder of a key who signed in.
func (d *Dashboard) actor(r *http.Request) (keyadmin.Actor, error) {
	actor, err := d.Person(r)
	if !errors.Is(err, ErrNobody) {
		return actor, err
	}
	return d.State.sessions.actor(r, d.sessionID(r), d.Admin)
}

// layout is what every page has.
type layout struct {
	Title    string
	Account  string // empty: nobody is signed in
	CanLeave bool   // whether there is a session to end
	Notice   notice
	Live     string // address of a page that shows what changes by itself; empty: it does not
	Data     any
}

// notice is what is said above a page; empty: nothing.
type notice struct {
	Text  string
	Warns bool // it says what was not done
}

// titled is the title of a page with this problem, which who does not see the page hears first.
func titled(title, problem string) string {
	if problem != "" {
		return "Error: " + title
	}
	return title
}

// show writes a page as a whole or, if its template fails, not at all.
func (v *visit) show(status int, template string, page layout) error {
	page.Account, page.CanLeave = v.actor.Account(), v.actor.KeyID() != ""
	var body bytes.Buffer
	if err := templates[template].Execute(&body, page); err != nil {
		return err
	}
	v.w.Header().Set("Content-Type", "text/html; charset=utf-8")
	v.w.WriteHeader(status)
	_, _ = v.w.Write(body.Bytes()) // the browser may be gone
	return nil
}

// redirect ends a visit that sent a form, so that a reload does not send it again.
func (v *visit) redirect(path, done string) error {
	if done != "" {
		path += "?" + url.Values{"done": {done}}.Encode()
	}
	http.Redirect(v.w, v.r, path, http.StatusSeeOther)
	return nil
}

var (
	errNoPage      = refusal(http.StatusNotFound, "There is no such page, or no such key among those that you may manage.")
	errCrossOrigin = refusal(http.StatusForbidden, "A page of another site sent this form, so nothing was changed. Open the key here and do it again.")
	errForm        = refusal(http.StatusBadRequest, "The form could not be read, so nothing was changed. Go back and send it again.")
	errTooMany     = refusal(http.StatusTooManyRequests, "This account has made as many keys as it may in 24 hours. Use those that it has, or ask the operator for more.")
	errRenamed     = refusal(http.StatusTooManyRequests, "This account has renamed keys as often as it may in 24 hours. Leave their names, or ask the operator for more.")
	errCrowded     = refusal(http.StatusServiceUnavailable, "Requests of yours or of your account that came before this one took too long. Try again shortly, with fewer at a time.")
	errUnavailable = refusal(http.StatusServiceUnavailable, "Keys cannot be managed right now. Try again shortly.")
)

// fail shows what went wrong. Only what nobody foresaw is reported: the rest is the visitor's, such as going away.
func (v *visit) fail(err error) {
	if errors.Is(err, errSignedOut) {
		data := signInData{Next: v.comeBack()}
		if v.r.Method == http.MethodPost {
			data.Problem = "Your session has ended, so nothing was changed. Sign in, and do it again."
			if data.Draft = v.draft(); data.Draft != nil {
				data.Problem = "Your session has ended, so nothing was changed. Sign in, and send the form again: it is filled in as you left it."
			}
		}
		v.showSignIn(http.StatusUnauthorized, data)
		return
	}
	answer := explain(err)
	if answer == errUnavailable && !errors.Is(err, context.Canceled) {
		v.Logger.Debug("the dashboard cannot manage keys", zap.String("method", v.r.Method), zap.String("error", apikey.Redact(err.Error())))
		v.Answered(v.r, err)
	}
	answer.SetRetryAfter(v.w.Header())
	if err := v.show(answer.Status, "error", layout{Title: http.StatusText(answer.Status), Data: answer}); err != nil {
		http.Error(v.w, answer.Message, answer.Status)
	}
}

// refusal is an answer of the API for people, who are shown no code.
func refusal(status int, message string) *apierror.Error {
	return &apierror.Error{Status: status, Message: message}
}

func explain(err error) *apierror.Error {
	var (
		answer    *apierror.Error
		malformed *keyadmin.InvalidError
		forbidden *keyadmin.ForbiddenError
		tooMany   *keyadmin.TooManyError
	)
	switch {
	case errors.As(err, &answer):
		return answer
	case errors.As(err, &malformed):
		return refusal(http.StatusBadRequest, sentence(malformed.Field, malformed.Reason))
	case errors.As(err, &forbidden):
		return refusal(http.StatusForbidden, sentence(forbidden.Field, forbidden.Reason))
	case errors.Is(err, keyadmin.ErrNotFound):
		return errNoPage
	case errors.Is(err, keyadmin.ErrCrowded):
		return errCrowded
	case errors.As(err, &tooMany) && tooMany.Done == keyadmin.KeyRenamed:
		return errRenamed.Later(tooMany.RetryAfter)
	case errors.As(err, &tooMany):
		return errTooMany.Later(tooMany.RetryAfter)
	}
	return errUnavailable
}

// sentence says what a field must be, or without one what is so.
func sentence(field, reason string) string {
	text := strings.TrimSpace(strings.ReplaceAll(field, "_", " ") + " " + reason)
	return strings.ToUpper(text[:1]) + text[1:] + "."
}

//go:embed assets
var assets embed.FS

// assetNames are the files that the pages load.
var assetNames = []string{"dashboard.css", "dashboard.js", "icon.svg"}

// assetVersion changes with any of the files, so that browsers may keep them.
var assetVersion = func() string {
	hash := sha256.New()
	for _, file := range assetNames {
		text, err := assets.ReadFile("assets/" + file)
		if err != nil {
			panic(err) // it is embedded
		}
		hash.Write(text)
	}
	return hex.EncodeToString(hash.Sum(nil)[:6])
}()

// asset serves the files that are the same for all.
func asset(w http.ResponseWriter, r *http.Request) {
	if r.URL.RawQuery == assetVersion {
		w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	}
	http.ServeFileFS(w, r, assets, "assets"+strings.TrimPrefix(r.URL.Path, Root))
}

package dashboard

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize/english"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/scoperule"
)

const (
	signInPath = "sign-in"

	// maxSession is a working day, and maxIdle a meeting: who comes back later has the key at hand or should not be here.
	maxSession = 8 * time.Hour
	maxIdle    = 30 * time.Minute

	// maxSessions bounds memory, and maxOfKey what the holder of a key who signs in without end takes of it.
	maxSessions = 10000
	maxOfKey    = 20
)

// pollHeader is on what a page asks by itself, which is no use by a person. Whoever sends it can only shorten a session.
const pollHeader = "X-Rekall-Poll"

var errSignedOut = errors.New("signed out")

// sessions are those who signed in with a key. The cookie is random and says nothing; here stand only its hash, the id of the key and
// perhaps a form that was sent before, so neither a cookie nor this memory can be turned into a key. They live in this process: who is
// sent to another, or comes back after a restart, signs in again. An encrypted cookie would serve several processes, but needs a secret
// that they share and that rotates, and could be neither ended by signing out nor be counted.
type sessions struct {
	now func() time.Time

	mu    sync.Mutex
	byID  map[[sha256.Size]byte]*session
	ofKey map[string]map[[sha256.Size]byte]*session // the same by the keys that they were begun with
}

type session struct {
	keyID, account string
	began, lastUse time.Time
	draft          url.Values // of a new key, sent when the session before had ended; nil: none
}

func (s *session) ended(now time.Time) bool {
	return now.Sub(s.began) > maxSession || now.Sub(s.lastUse) > maxIdle
}

// begin signs the holder of a key in and returns the session's id.
func (s *sessions) begin(keyID, account string, draft url.Values) string {
	id, now := rand.Text(), s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ofKey[keyID]) >= maxOfKey {
		s.removeIdlest(keyID, now)
	} else if len(s.byID) >= maxSessions {
		s.makeRoom(now)
	}
	hash, began := sha256.Sum256([]byte(id)), &session{keyID, account, now, now, draft}
	if s.ofKey[keyID] == nil {
		s.ofKey[keyID] = map[[sha256.Size]byte]*session{}
	}
	s.byID[hash], s.ofKey[keyID][hash] = began, began
	return id
}

// makeRoom removes the sessions that ended, else one of the key that has most.
func (s *sessions) makeRoom(now time.Time) {
	for id, session := range s.byID {
		if session.ended(now) {
			s.remove(id)
		}
	}
	if len(s.byID) < maxSessions {
		return
	}
	var most string
	for keyID := range s.ofKey {
		if len(s.ofKey[keyID]) > len(s.ofKey[most]) {
			most = keyID
		}
	}
	s.removeIdlest(most, now)
}

// removeIdlest removes the session of a key that was idle longest.
func (s *sessions) removeIdlest(keyID string, now time.Time) {
	var idlest [sha256.Size]byte
	oldest := now
	for id, session := range s.ofKey[keyID] {
		if !session.lastUse.After(oldest) {
			idlest, oldest = id, session.lastUse
		}
	}
	s.remove(idlest)
}

func (s *sessions) remove(id [sha256.Size]byte) {
	session, ok := s.byID[id]
	if !ok {
		return
	}
	delete(s.byID, id)
	delete(s.ofKey[session.keyID], id)
	if len(s.ofKey[session.keyID]) == 0 {
		delete(s.ofKey, session.keyID)
	}
}

// end signs out; of a session that does not exist, nobody.
func (s *sessions) end(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(sha256.Sum256([]byte(id)))
}

// draft returns the form that a session was begun with; nil: none.
func (s *sessions) draft(id string) url.Values {
	s.mu.Lock()
	defer s.mu.Unlock()
	if session := s.byID[sha256.Sum256([]byte(id))]; session != nil {
		return session.draft
	}
	return nil
}

// key returns the key that a session was begun with, and its account. The session is used, unless it is polled.
func (s *sessions) key(id string, polled bool) (keyID, account string, ok bool) {
	hash, now := sha256.Sum256([]byte(id)), s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	session, ok := s.byID[hash]
	if !ok {
		return "", "", false
	}
	if session.ended(now) {
		s.remove(hash)
		return "", "", false
	}
	if !polled {
		session.lastUse = now
	}
	return session.keyID, session.account, true
}

// actor is whose session a request belongs to. Postgres is asked each time: a key that was revoked or has expired is signed
// out at once, also where the edge has not heard of it.
func (s *sessions) actor(r *http.Request, id string, admin *keyadmin.Admin) (keyadmin.Actor, error) {
	keyID, account, ok := s.key(id, r.Header.Get(pollHeader) != "")
	if !ok {
		return keyadmin.Actor{}, errSignedOut
	}
	actor, err := admin.Manager(r.Context(), keyID, account)
	if _, forbidden := errors.AsType[*keyadmin.ForbiddenError](err); forbidden {
		s.end(id)
		return keyadmin.Actor{}, errSignedOut
	}
	return actor, err
}

// Names of the cookie that has a session. Where there is TLS it is one that browsers take from this host alone: else a sibling site
// could put a visitor into a session of its choosing, and pass a key of that account off as theirs.
const (
	hostCookie  = "__Host-rekall-session"
	plainCookie = "rekall-session"
)

func (d *Dashboard) cookieName(r *http.Request) string {
	if d.Secure(r) {
		return hostCookie
	}
	return plainCookie
}

// WithoutSession takes the session out of a Cookie header, which browsers send with all requests to the host: it is no backend's.
func WithoutSession(cookies string) string {
	if !strings.Contains(cookies, plainCookie) {
		return cookies
	}
	var kept []string
	for cookie := range strings.SplitSeq(cookies, ";") {
		cookie = strings.TrimSpace(cookie)
		if name, _, _ := strings.Cut(cookie, "="); name != hostCookie && name != plainCookie {
			kept = append(kept, cookie)
		}
	}
	return strings.Join(kept, "; ")
}

func (d *Dashboard) sessionID(r *http.Request) string {
	cookie, err := r.Cookie(d.cookieName(r))
	if err != nil {
		return ""
	}
	return cookie.Value
}

func (d *Dashboard) setCookie(w http.ResponseWriter, r *http.Request, value string, maxAge int) {
	path := Root
	if d.Secure(r) {
		path = "/" // what the name demands
	}
	http.SetCookie(w, &http.Cookie{
		Name: d.cookieName(r), Value: value, Path: path, MaxAge: maxAge, HttpOnly: true, Secure: d.Secure(r), SameSite: http.SameSiteStrictMode,
	})
}

func (d *Dashboard) toList(v *visit) error { return v.redirect(Root, "") }

// signInData is the form for those whom nobody knows.
type signInData struct {
	Problem string
	Next    string // where to go then, from here
	Draft   url.Values
}

func (v *visit) showSignIn(status int, data signInData) {
	if err := v.show(status, "sign-in", layout{Title: titled("Sign in", data.Problem), Data: data}); err != nil {
		http.Error(v.w, "Sign in.", status)
	}
}

// draft is the form of a new key that a visitor has sent; nil: they sent another.
func (v *visit) draft() url.Values {
	if v.r.URL.Path != Root+"/new" || v.r.ParseForm() != nil {
		return nil
	}
	return draftOf(v.r.PostForm)
}

// comeBack is the page that a visitor asked for, or that has the form which they sent: that of a new key with the environment chosen in it.
func (v *visit) comeBack() string {
	path, query := v.r.URL.EscapedPath(), v.r.URL.RawQuery
	if v.r.Method == http.MethodPost {
		path, query = strings.TrimSuffix(path, "/rename"), ""
		if environment := v.r.PostFormValue("environment"); environment != "" {
			query = url.Values{"environment": {environment}}.Encode()
		}
	}
	if query != "" {
		path += "?" + query
	}
	return apikey.Redact(path)
}

// local is a page of ours; in place of any other, which a link of somebody else may name, it is the list.
func local(next string) string {
	page, err := url.Parse(next)
	if err != nil || page.Scheme != "" || page.Host != "" || page.User != nil ||
		page.Path != Root && !strings.HasPrefix(page.Path, Root+"/") || !scoperule.Canonical(page.EscapedPath()) {
		return Root
	}
	return (&url.URL{Path: page.Path, RawPath: page.RawPath, RawQuery: page.RawQuery}).String()
}

// signIn takes a key from a form's body, which no log has, and forgets it.
func (d *Dashboard) signIn(w http.ResponseWriter, r *http.Request) {
	v := &visit{Dashboard: d, w: w, r: r}
	if err := r.ParseForm(); err != nil {
		v.fail(errForm)
		return
	}
	next, draft := local(r.PostForm.Get("next")), draftOf(r.PostForm)
	if draft != nil {
		next = Root + "/new?" + draftQuery
	}
	actor, err := d.SignIn(r, r.PostForm.Get("key"))
	var (
		answer    *apierror.Error
		forbidden *keyadmin.ForbiddenError
	)
	switch {
	case errors.As(err, &answer):
		answer.SetRetryAfter(w.Header())
		problem := answer.Message
		if answer.Status == http.StatusTooManyRequests { // whose message names a header, which no browser shows
			seconds := english.Plural(int((answer.RetryAfter+time.Second-1)/time.Second), "second", "")
			problem = "Too many attempts from your address. Try again in " + seconds + "."
		}
		v.showSignIn(answer.Status, signInData{problem, next, draft})
	case errors.As(err, &forbidden):
		const problem = "This key is good, but may not manage keys. Use one that was created with “manage keys”."
		v.showSignIn(http.StatusForbidden, signInData{problem, next, draft})
	case err != nil:
		v.fail(err)
	default:
		d.State.sessions.end(d.sessionID(r))
		d.setCookie(w, r, d.State.sessions.begin(actor.KeyID(), actor.Account(), draft), int(maxSession.Seconds()))
		_ = v.redirect(next, "")
	}
}

func (d *Dashboard) signOut(w http.ResponseWriter, r *http.Request) {
	d.State.sessions.end(d.sessionID(r))
	d.setCookie(w, r, "", -1)
	_ = (&visit{Dashboard: d, w: w, r: r}).redirect(Root, "")
}

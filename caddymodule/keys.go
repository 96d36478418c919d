package caddymodule

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/textproto"
	"regexp"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keysapi"
	"github.com/rekall-ai/gateway/internal/usage"
)

func init() { caddy.RegisterModule(Keys{}) }

// Keys serves the management of API keys: the API at /v1/api-keys, and the dashboard at /settings/api-keys. Both are for keys
// that were made with manage_keys and, if account is set, for people whom Caddy has authenticated in front. What
// /v1/api-keys/openapi.json and /v1/api-keys/leaked say and take needs no authentication. Requests for other paths go on to
// the next handler, and cost less than with a matcher in front.
type Keys struct {
	// The account whose keys a person may manage: a text with placeholders, such as {http.auth.user.id} where each person
	// is an account of their own. All of them must have a value. A header, {http.request.header.*}, has the one that a
	// handler in front has set, such as forward_auth: the whole server takes it out of what clients send. Default: none, people
	// may manage nothing.
	Account string `json:"account,omitempty"`

	// Who the person is, as the audit names them: a placeholder that has a value for nobody but those whom a handler in
	// front has authenticated. The same holds for headers. Default: {http.auth.user.id}, which Caddy's authentication sets.
	User string `json:"user,omitempty"`

	// Connection URL of Postgres for a user that may manage keys, where that of the rekall app may not. May contain
	// placeholders. Default: the database of the rekall app.
	Database string `json:"database,omitempty"`

	// Where the public keys of GitHub's secret scanning are, for taking part in its partner programme: an https URL, usually
	// https://api.github.com/meta/public_keys/secret_scanning, or a file. Reports are taken at
	// /v1/api-keys/leaked/github. Default: none, there is nothing at that path.
	GitHubSecretScanning string `json:"github_secret_scanning,omitempty"`

	// How many keys an account can make in 24 hours here, successors included, and how often it can rename keys: 1 to 1,000,000. Beyond
	// that it is answered 429. No key and no line of the audit is ever deleted, so this is what keeps one customer from filling the
	// database of all. Commands are not bound. Default: 1000.
	KeysPerDay int `json:"keys_per_day,omitempty"`

	api         *keysapi.API
	dashboard   *dashboard.Dashboard
	managed     *management
	app         *App
	cache       keySource
	metrics     *metrics
	usage       *usage.Counter
	logger      *zap.Logger
	poolKey     string
	crossOrigin *http.CrossOriginProtection
	noAccount   *sync.Once // to log that a person has none
}

// CaddyModule returns the Caddy module information.
func (Keys) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.rekall_keys", New: func() caddy.Module { return new(Keys) }}
}

// Provision opens the database, which connects when it is first asked, and guards the server's door.
func (k *Keys) Provision(ctx caddy.Context) error {
	k.logger, k.crossOrigin = ctx.Logger(), http.NewCrossOriginProtection()
	app, err := app(ctx)
	if err != nil {
		return err
	}
	k.app, k.cache, k.metrics, k.usage = app, app.runtime.cache, app.runtime.metrics, app.runtime.usage
	if err := k.checkPerson(); err != nil {
		return err
	}
	if k.KeysPerDay < 0 || k.KeysPerDay > maxKeysPerDay {
		return fmt.Errorf("keys_per_day must be from 1 to %d", maxKeysPerDay)
	}
	if err := guardDoor(ctx, k.personHeaders()...); err != nil {
		return err
	}
	github, err := k.gitHub()
	if err != nil {
		return err
	}
	m, err := k.management(app)
	if err != nil {
		return err
	}
	app.checkAtStart(m, k.logger)
	k.manageWith(m, github)
	return nil
}

func (k *Keys) manageWith(m *management, github *keysapi.GitHub) {
	k.managed, k.noAccount = m, new(sync.Once)
	admin := m.admin.Limited(cmp.Or(k.KeysPerDay, defaultKeysPerDay))
	k.api = keysapi.New(keysapi.Config{
		Admin: admin, Actor: k.actor, Client: clientAddress, GitHub: github, Refused: logRefusal, Answered: k.answered, Logger: k.logger,
	})
	k.dashboard = dashboard.New(dashboard.Config{
		Admin: admin, Person: k.visitor, SignIn: k.signIn, Secure: secure, Answered: k.answered, State: m.state, Logger: k.logger,
	})
}

const (
	defaultKeysPerDay = 1000
	maxKeysPerDay     = 1_000_000
)

// placeholders finds all of them; ofAnyRequest those to which the client or Caddy gives a value whoever sent the request. To Caddy
// an unmatched brace is text.
var (
	placeholders  = regexp.MustCompile(`\{[^{}]*\}`)
	requestHeader = regexp.MustCompile(`\{http\.request\.header\.([^{}]*)\}`)
	ofAnyRequest  = regexp.MustCompile(`\{http\.((request|response|regexp|url_pattern|matchers\.file|error)(\.[^}]*)?` +
		`|vars\.(client_ip|trusted_proxy|start_time|uuid|trace_id|span_id)|shutting_down|time_until_shutdown)\}`)
)

// clientCertificate begins the placeholders of a client's certificate.
const clientCertificate = "{http.request.tls.client."

// ofEverybody returns a placeholder that has a value for everybody; empty: there is none. Headers are of a handler in front, such as
// forward_auth: those that clients send are taken out at the door. What certificates tell counts if they were verified.
func ofEverybody(text string) string {
	for _, placeholder := range ofAnyRequest.FindAllString(text, -1) {
		if !strings.HasPrefix(placeholder, "{http.request.header.") && !strings.HasPrefix(placeholder, clientCertificate) {
			return placeholder
		}
	}
	return ""
}

// checkPerson refuses settings by which everybody would be somebody.
func (k *Keys) checkPerson() error {
	if k.Account == "" {
		if k.User != "" {
			return errors.New("user needs an account: whose keys is the person to manage?")
		}
		return nil
	}
	if k.User == "" {
		k.User = "{http.auth.user.id}"
	}
	for _, setting := range []struct{ name, text string }{{"account", k.Account}, {"user", k.User}} {
		if strings.ContainsAny(placeholders.ReplaceAllString(setting.text, ""), `{}\`) {
			return fmt.Errorf("%s is %s, whose braces are no placeholder: write it as {http.auth.user.id}", setting.name, setting.text)
		}
	}
	if _, err := caddy.NewReplacer().ReplaceOrErr(k.User, true, true); err == nil { // such as {system.hostname}
		return errors.New("user must have a placeholder of the request: with a fixed name, everybody is that person")
	}
	if placeholder := ofEverybody(k.User + k.Account); placeholder != "" {
		return fmt.Errorf("%s has a value for everybody: it proves neither who a person is nor which account is theirs", placeholder)
	}
	return nil
}

// personHeaders are the headers that account and user are read from.
func (k *Keys) personHeaders() []string {
	var names []string
	for _, placeholder := range requestHeader.FindAllStringSubmatch(k.User+k.Account, -1) {
		names = append(names, textproto.CanonicalMIMEHeaderKey(placeholder[1]))
	}
	return names
}

func (k *Keys) gitHub() (*keysapi.GitHub, error) {
	if k.GitHubSecretScanning == "" {
		return nil, nil
	}
	github, err := keysapi.NewGitHub(k.GitHubSecretScanning)
	if err != nil {
		return nil, fmt.Errorf("github_secret_scanning: %w", err)
	}
	return github, nil
}

func (k *Keys) management(app *App) (*management, error) {
	database := app.inUse.database
	if k.Database != "" {
		var err error
		if database, err = withoutPlaceholders(k.Database, false); err != nil { // a password may have braces
			return nil, fmt.Errorf("database: %w", err)
		}
	}
	value, _, err := managements.LoadOrNew(database, func() (caddy.Destructor, error) {
		return newManagement(database)
	})
	if err != nil {
		return nil, err
	}
	k.poolKey = database
	return value.(*management), nil
}

// Cleanup gives the connections back.
func (k *Keys) Cleanup() error {
	if k.poolKey == "" {
		return nil
	}
	_, err := managements.Delete(k.poolKey)
	return err
}

func (k *Keys) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	switch {
	case isBelow(r.URL.Path, keysapi.Root):
		m := &apiRequest{header: w.Header()}
		defer m.release()
		k.api.ServeHTTP(w, r.WithContext(context.WithValue(asking(r.Context()), apiRequestKey{}, m)))
	case isBelow(r.URL.Path, dashboard.Root):
		k.dashboard.ServeHTTP(w, r.WithContext(asking(r.Context())))
	default:
		return next.ServeHTTP(w, r)
	}
	return nil
}

func isBelow(path, root string) bool {
	return strings.HasPrefix(path, root) && (len(path) == len(root) || path[len(root)] == '/')
}

// actor finds out who asks: the holder of an API key, or a person whom Caddy has authenticated in front. Its error is a
// *apierror.Error, or one of keyadmin's. It takes the credential out of the request, so it can be asked once only.
func (k *Keys) actor(r *http.Request) (keyadmin.Actor, error) {
	cred := credential.Take(r)
	outcome := parse(r, r.URL.EscapedPath(), &cred)
	person, authenticated := k.person(r)
	switch {
	case !authenticated && outcome == apikey.Allowed:
		return k.holder(r, &cred)
	case !authenticated:
		return keyadmin.Actor{}, k.refusal(r, outcome, &cred)
	// Two who ask with different rights: neither a forgotten cookie nor a forgotten key may decide for the other.
	case outcome == apikey.Allowed:
		return keyadmin.Actor{}, k.refusal(r, apikey.Ambiguous, &cred)
	// What is no key may be what the person was authenticated by, such as an OpenID Connect token.
	case outcome == apikey.Missing || outcome == apikey.Malformed || outcome == apikey.TokenType:
		return k.personally(r, person)
	}
	return keyadmin.Actor{}, k.refusal(r, outcome, &cred)
}

// refusal is what the gateway answers to the same outcome.
func (k *Keys) refusal(r *http.Request, outcome apikey.Outcome, cred *credential.Credential) error {
	if verdict := countRefusal(k.app.addresses, r, outcome); !verdict.Allowed {
		return k.refuseAddress(verdict, cred)
	}
	k.metrics.decisions[outcome][cred.Environment].Inc()
	return apierror.Of(outcome)
}

// holder is who holds a key that is good.
func (k *Keys) holder(r *http.Request, cred *credential.Credential) (keyadmin.Actor, error) {
	verdict, pending := mayLookUp(k.app.addresses, r, k.cache, cred.Digest)
	if !verdict.Allowed {
		return keyadmin.Actor{}, k.refuseAddress(verdict, cred)
	}
	if pending {
		defer k.app.addresses.End(clientAddress(r))
	}
	found, err := find(r.Context(), trace.SpanFromContext(r.Context()), k.cache, cred.Digest)
	if err != nil {
		k.logger.Debug("key cannot be checked", zap.Error(err))
		return keyadmin.Actor{}, k.refusal(r, unchecked(r), cred)
	}
	if found.Record != nil {
		replacer(r).Set("http.auth.user.id", found.Record.ID) // for the logs
	}
	outcome := found.Record.Decide(found.Now, apikey.Request{Environment: cred.Environment, Covered: true}) // any scopes
	if outcome == apikey.Allowed || outcome == apikey.Mismatch {
		if err := k.hold(r, &found); err != nil {
			k.count(found, apikey.RateLimited)
			k.metrics.decisions[apikey.RateLimited][cred.Environment].Inc()
			return keyadmin.Actor{}, err
		}
	}
	if outcome != apikey.Allowed {
		k.count(found, outcome)
		return keyadmin.Actor{}, k.refusal(r, outcome, cred)
	}
	actor, err := keyadmin.ManagingKey(found.Record)
	if err != nil {
		outcome = apikey.Insufficient
	}
	k.metrics.decisions[outcome][cred.Environment].Inc()
	k.count(found, outcome)
	return actor, err
}

// count counts the request among the uses of the key: it may be the first of a successor.
func (k *Keys) count(found keycache.Found, outcome apikey.Outcome) {
	if found.Record != nil {
		k.usage.Count(found.Record, outcome, found.Now)
	}
}

// person names whom a handler in front has authenticated. A placeholder without a value is nobody.
func (k *Keys) person(r *http.Request) (name string, authenticated bool) {
	if k.Account == "" {
		return "", false
	}
	if strings.Contains(k.User+k.Account, clientCertificate) && (r.TLS == nil || len(r.TLS.VerifiedChains) == 0) {
		return "", false // of none at all Caddy has a serial and a fingerprint too, and of one that nobody verified its owner wrote all
	}
	name, err := replacer(r).ReplaceOrErr(k.User, true, true)
	return name, err == nil && name != ""
}

func replacer(r *http.Request) *caddy.Replacer {
	return r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
}

var (
	errCrossOrigin = apierror.New(http.StatusForbidden, "CROSS_ORIGIN_REQUEST",
		"A page of another site sent this request. Send it from the site that serves the API.")
	errNoAccount = apierror.New(http.StatusForbidden, "PERMISSION_DENIED",
		"You are signed in, but it is not known whose keys you may manage. Ask the operator of this API to give you an account.")
)

// personally is a person who asks with intent: their browser authenticates them also to requests of other sites.
func (k *Keys) personally(r *http.Request, name string) (keyadmin.Actor, error) {
	if k.crossOrigin.Check(r) != nil {
		return keyadmin.Actor{}, errCrossOrigin
	}
	account, err := replacer(r).ReplaceOrErr(k.Account, true, true)
	if err != nil {
		k.noAccount.Do(func() {
			k.logger.Warn("an authenticated person has no account, and may manage no keys: see that what authenticates people sets the "+
				"placeholders in account of rekall_keys", zap.String("account", k.Account), zap.Error(err))
		})
		return keyadmin.Actor{}, errNoAccount
	}
	actor, err := keyadmin.Person(name, account)
	if err != nil {
		k.logger.Warn("the authenticated person cannot be one who manages keys", zap.String("error", apikey.Redact(err.Error())))
		return keyadmin.Actor{}, errNoAccount
	}
	return actor, nil
}

// logRefusal has the access log say why the API refused.
func logRefusal(r *http.Request, requestID string, e *apierror.Error) {
	logLater(r.Context(), refused{requestID, e.Code})
}

// clientAddress is where a request comes from, as Caddy sees it through its trusted proxies.
func clientAddress(r *http.Request) netip.Addr {
	text, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	address, _ := netip.ParseAddr(text)
	return address
}

var (
	_ caddy.Provisioner           = (*Keys)(nil)
	_ caddy.CleanerUpper          = (*Keys)(nil)
	_ caddyhttp.MiddlewareHandler = (*Keys)(nil)
)

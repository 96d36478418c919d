package keysapi_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keysapi"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

var operator = keyadmin.Operator("test")

// rig is an API before a real Postgres, behind a server that finds out who asks as plainly as can be: a key is looked up, and
// a person is whom the header X-Person names, as "name@account".
type rig struct {
	t        *testing.T
	database string
	admin    *keyadmin.Admin
	store    *keystore.Store
	server   *httptest.Server
	document routers.Router
	log      *bytes.Buffer
	failed   atomic.Int64    // requests that could not be carried out
	actorIs  *keyadmin.Actor // whoever asks; nil: whom the request names
	actorErr error           // why nobody may ask
}

// keysPerDay is what an account may make in a rig.
const keysPerDay = 1000

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigOn(t, pgtest.URL(t), nil)
}

func newRigOn(t *testing.T, database string, gitHub *keysapi.GitHub) *rig {
	t.Helper()
	pgtest.Migrate(t, database)
	store := pgtest.Store(t, database)
	r := &rig{t: t, database: database, store: store, admin: keyadmin.New(store), document: document(t), log: new(bytes.Buffer)}
	logger := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.Lock(zapcore.AddSync(r.log)), zap.DebugLevel))
	r.server = httptest.NewServer(keysapi.New(keysapi.Config{
		Admin: r.admin.Limited(keysPerDay), Actor: r.actor, GitHub: gitHub, Logger: logger,
		Answered: func(_ *http.Request, err error) {
			if err != nil {
				r.failed.Add(1)
			}
		},
		Client: func(r *http.Request) netip.Addr {
			address, _ := netip.ParseAddr(r.Header.Get("X-Client"))
			return address
		},
	}))
	t.Cleanup(r.server.Close)
	return r
}

var errNobody = &apierror.Error{Status: http.StatusUnauthorized, Code: "API_KEY_INVALID", Message: "Nobody asks."}

func (r *rig) actor(req *http.Request) (keyadmin.Actor, error) {
	if r.actorIs != nil || r.actorErr != nil {
		return *cmp.Or(r.actorIs, new(keyadmin.Actor)), r.actorErr
	}
	if person := req.Header.Get("X-Person"); person != "" {
		name, account, _ := strings.Cut(person, "@")
		return keyadmin.Person(name, account)
	}
	key := strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer ")
	found, err := r.store.Lookup(req.Context(), []apikey.Digest{apikey.Hash(key)})
	if err != nil {
		return keyadmin.Actor{}, err
	}
	if len(found.Records) != 1 || found.Records[0].Validity(found.Now) != apikey.Allowed {
		return keyadmin.Actor{}, errNobody
	}
	return keyadmin.ManagingKey(found.Records[0])
}

// openAPI is the API's document.
func openAPI(t *testing.T) *openapi3.T {
	t.Helper()
	text, err := os.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	document, err := openapi3.NewLoader().LoadFromData(text)
	if err != nil {
		t.Fatal(err)
	}
	return document
}

// document is openapi.json, valid by itself, as a router that knows what each request and answer must look like.
func document(t *testing.T) routers.Router {
	t.Helper()
	router, err := legacy.NewRouter(openAPI(t)) // which validates it
	if err != nil {
		t.Fatal(err)
	}
	return router
}

// manager makes a managing key of an account.
func (r *rig) manager(account, environment string, scopes ...string) keyadmin.Key {
	r.t.Helper()
	if len(scopes) == 0 {
		scopes = apikey.ScopeNames()
	}
	key, _, err := r.admin.Create(r.t.Context(), operator, keyadmin.CreateRequest{
		Name: "Manager", Account: account, Environment: environment, Scopes: scopes, ManageKeys: true,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

func by(key keyadmin.Key) http.Header {
	return http.Header{"Authorization": {"Bearer " + key.Key.Reveal()}}
}

func person(name string) http.Header { return http.Header{"X-Person": {name}} }

// with is a header with more in it.
func with(h http.Header, name string, values ...string) http.Header {
	h = h.Clone()
	h[name] = values
	return h
}

// reply is an answer of the API.
type reply struct {
	*http.Response
	body string
}

// call sends a request that must be as the document has it.
func (r *rig) call(method, path string, header http.Header, body string) reply {
	r.t.Helper()
	input, answer := r.send(method, path, header, body)
	if input != nil {
		input.Request.Body = io.NopCloser(strings.NewReader(body))
		if err := openapi3filter.ValidateRequest(r.t.Context(), input); err != nil {
			r.t.Errorf("the document does not allow the request %s %s %s: %v", method, path, body, err)
		}
	}
	return answer
}

// bad sends a request that no document allows.
func (r *rig) bad(method, path string, header http.Header, body string) reply {
	r.t.Helper()
	_, answer := r.send(method, path, header, body)
	return answer
}

// send sends a request and compares the answer with the document. Of a path that it does not have it knows nothing.
func (r *rig) send(method, path string, header http.Header, body string) (*openapi3filter.RequestValidationInput, reply) {
	r.t.Helper()
	answer := r.ask(method, path, header, body)
	req, content := answer.Request, answer.body
	route, parameters, err := r.document.FindRoute(req)
	var unknown *routers.RouteError
	if errors.As(err, &unknown) || strings.HasSuffix(path, "/") { // which its router does not mind
		return nil, answer
	}
	input := &openapi3filter.RequestValidationInput{
		Request: req, PathParams: parameters, Route: route,
		Options: &openapi3filter.Options{
			AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true, MultiError: true,
		},
	}
	if err := openapi3filter.ValidateResponse(r.t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: answer.StatusCode, Header: answer.Header,
		Body: io.NopCloser(strings.NewReader(content)), Options: input.Options,
	}); err != nil {
		r.t.Errorf("the document does not have the answer %d %s to %s %s: %v", answer.StatusCode, content, method, path, err)
	}
	return input, answer
}

// ask sends a request.
func (r *rig) ask(method, path string, header http.Header, body string) reply {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.server.URL+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	maps.Copy(req.Header, header)
	resp, err := r.server.Client().Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return reply{resp, string(content)}
}

// refused wants an error with this status, code and field.
func (r reply) refused(t *testing.T, status int, code, field string) {
	t.Helper()
	var e struct {
		Error struct {
			Code      string         `json:"code"`
			Status    int            `json:"status"`
			Message   string         `json:"message"`
			Details   map[string]any `json:"details"`
			RequestID string         `json:"request_id"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(r.body), &e); err != nil {
		t.Fatalf("not an error's envelope: %d %q", r.StatusCode, r.body)
	}
	about, _ := e.Error.Details["field"].(string)
	if r.StatusCode != status || e.Error.Code != code || about != field {
		t.Errorf("got %d %s, want %d %s about %q", r.StatusCode, r.body, status, code, field)
	}
	if e.Error.Status != status || e.Error.Message == "" || e.Error.RequestID == "" || e.Error.RequestID != r.Header.Get("X-Request-Id") {
		t.Errorf("envelope %s does not fit status %d and X-Request-Id %q", r.body, r.StatusCode, r.Header.Get("X-Request-Id"))
	}
	if r.Header.Get("Cache-Control") != "no-store" || r.Header.Get("X-Content-Type-Options") != "nosniff" || apikey.ContainsKey(r.body) {
		t.Errorf("may be stored, or taken for a page, or shows a key: %v %s", r.Header, r.body)
	}
}

// object is the data of an answer.
type object struct {
	keyadmin.Key
	RevokedSelf bool `json:"revoked_self"`
	Replayed    bool `json:"idempotent_replayed"`
}

func (r reply) object(t *testing.T, status int) object {
	t.Helper()
	var one struct {
		Data object `json:"data"`
	}
	r.decode(t, status, &one)
	return one.Data
}

type list[T any] struct {
	Data       []T `json:"data"`
	Pagination struct {
		NextCursor *string `json:"next_cursor"`
		HasMore    bool    `json:"has_more"`
		TotalCount *int    `json:"total_count"`
	} `json:"pagination"`
}

func (r reply) keys(t *testing.T) list[keyadmin.Key] {
	t.Helper()
	var l list[keyadmin.Key]
	r.decode(t, http.StatusOK, &l)
	return l
}

func (r reply) audit(t *testing.T) list[keyadmin.AuditEntry] {
	t.Helper()
	var l list[keyadmin.AuditEntry]
	r.decode(t, http.StatusOK, &l)
	return l
}

func (r reply) decode(t *testing.T, status int, to any) {
	t.Helper()
	if r.StatusCode != status {
		t.Fatalf("got %d %s, want %d", r.StatusCode, r.body, status)
	}
	if err := json.Unmarshal([]byte(r.body), to); err != nil {
		t.Fatalf("%q: %v", r.body, err)
	}
	if r.Header.Get("Cache-Control") != "no-store" || r.Header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("may be stored, or taken for a page: %v", r.Header)
	}
}

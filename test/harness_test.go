package test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/backendtest"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// program is the gateway under test, built once.
var program string

func TestMain(m *testing.M) {
	pgtest.Main(process.Built(m, func(dir string) error {
		program = filepath.Join(dir, "rekall-gateway")
		return process.Build(program, "../cmd/rekall-gateway", raceFlag...)
	}))
}

// rig is a database and two backends, for one or several gateways in front of them.
type rig struct {
	t                   *testing.T
	database            string
	admin               *keyadmin.Admin
	production, sandbox *devenv.Backend
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigOn(t, pgtest.URL(t))
}

func newRigOn(t *testing.T, database string) *rig {
	t.Helper()
	pgtest.Migrate(t, database)
	r := &rig{t: t, database: database, admin: keyadmin.New(pgtest.Store(t, database))}
	r.production, r.sandbox = backendtest.Start(t, "production"), backendtest.Start(t, "sandbox")
	return r
}

// key creates a key; environment is "production" or "sandbox".
func (r *rig) key(environment string, scopes ...string) keyadmin.Key {
	r.t.Helper()
	key, _, err := r.admin.Create(context.Background(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "test", Account: "acme", Environment: environment, Scopes: scopes,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

func (r *rig) revoke(id string) {
	r.t.Helper()
	if _, err := r.admin.Revoke(context.Background(), keyadmin.Operator("test"), id); err != nil {
		r.t.Fatal(err)
	}
}

// gateway is a running gateway process.
type gateway struct {
	t     *testing.T
	admin string       // address of its admin endpoint
	http  string       // base URL
	log   *process.Log // of all its processes, one after another
	file  string

	process *process.Process
	program string   // the gateway under test, unless a test brings its own
	env     []string // in addition to the test's
}

const standardSite = `
http://:PORT {
	bind 127.0.0.1
	log
	rekall_gateway {
		production {
			reverse_proxy PRODUCTION
		}
		sandbox {
			reverse_proxy SANDBOX
		}
	}
}
`

// start runs a gateway whose Caddyfile has the sites given. In it PORT, ADMIN, PRODUCTION and SANDBOX stand for addresses;
// options go into the rekall block.
func (r *rig) start(sites string, options ...string) *gateway {
	r.t.Helper()
	g := r.prepare(sites, options...)
	g.run(r.database)
	g.waitReady()
	return g
}

func (r *rig) prepare(sites string, options ...string) *gateway {
	r.t.Helper()
	return r.write(sites, "rekall {\n\t\tdatabase {env.REKALL_DATABASE_URL}\n\t\t"+strings.Join(options, "\n\t\t")+"\n\t}")
}

// write makes a Caddyfile with the sites and global options given.
func (r *rig) write(sites, global string) *gateway {
	r.t.Helper()
	dir := r.t.TempDir()
	port, admin := process.FreePort(r.t), process.FreePort(r.t)
	text := fmt.Sprintf(`{
	admin 127.0.0.1:%d
	persist_config off
	auto_https disable_redirects
	skip_install_trust
	storage file_system %q
	log {
		level DEBUG
	}
	grace_period 2s
	%s
}
%s`, admin, dir, global, sites)
	text = strings.NewReplacer("PORT", fmt.Sprint(port), "ADMIN", fmt.Sprintf("127.0.0.1:%d", admin),
		"PRODUCTION", r.production.Address(), "SANDBOX", r.sandbox.Address()).Replace(text)
	g := &gateway{
		t: r.t, admin: fmt.Sprintf("http://127.0.0.1:%d", admin), http: fmt.Sprintf("http://127.0.0.1:%d", port),
		log: new(process.Log), file: filepath.Join(dir, "Caddyfile"), program: program,
	}
	process.Write(r.t, g.file, text)
	return g
}

func (g *gateway) run(database string) {
	g.t.Helper()
	g.process = process.Start(g.t, process.Options{
		Env: append([]string{"REKALL_DATABASE_URL=" + database, "HOME=" + filepath.Dir(g.file)}, g.env...), Log: g.log,
	}, g.program, "run", "--config", g.file, "--adapter", "caddyfile")
}

func (g *gateway) waitReady() {
	g.t.Helper()
	eventually.True(g.t, "the gateway is ready", func() bool {
		g.process.MustRun(g.t)
		resp, err := http.Get(g.admin + "/rekall/ready")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// waitSynced is for a gateway that does not become ready: it has read the feed, and its sites answer. The admin endpoint does
// before there is a runtime.
func (g *gateway) waitSynced() {
	g.t.Helper()
	eventually.True(g.t, "the gateway has synced", func() bool {
		g.process.MustRun(g.t)
		for _, address := range []string{g.admin + "/rekall/live", g.http + "/"} {
			if _, err := send("GET", address, nil, nil); err != nil {
				return false
			}
		}
		runtimes := g.statuses()
		return len(runtimes) == 1 && runtimes[0].Epoch > 0
	})
}

// canaryPatience is for two canaries: the first, sent at the start, may be over before the first sync of a slow machine.
const canaryPatience = 2 * time.Minute

// client makes a connection for each request, so that one test's connection is not another's.
var client = &http.Client{
	Timeout:       30 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // certificates of the test's own Caddy
		ForceAttemptHTTP2: true,
	},
}

// reply is an answer of the gateway or of a backend behind it.
type reply struct {
	*http.Response
	body string
}

func bearer(key keyadmin.Key) http.Header {
	return http.Header{"Authorization": {"Bearer " + key.Key.Reveal()}}
}

// do sends a request to the gateway, again while that cannot tell whose key it is: a busy machine may be late with the first lookup.
func (g *gateway) do(method, path string, header http.Header) (answer reply) {
	g.t.Helper()
	eventually.True(g.t, "the gateway can tell whose key it is", func() bool {
		answer = g.doOnce(method, path, header)
		return !answer.cannotTell()
	})
	return answer
}

// doOnce is for tests about that answer, and about an outage in which a key that is known must not get it.
func (g *gateway) doOnce(method, path string, header http.Header) reply {
	g.t.Helper()
	return do(g.t, method, g.http+path, header, nil)
}

func do(t testing.TB, method, url string, header http.Header, body io.Reader) reply {
	t.Helper()
	answer, err := send(method, url, header, body)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func send(method, url string, header http.Header, body io.Reader) (reply, error) {
	return sendBy(client, method, url, header, body)
}

func sendBy(client *http.Client, method, url string, header http.Header, body io.Reader) (reply, error) {
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		return reply{}, err
	}
	maps.Copy(req.Header, header)
	resp, err := client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	content, err := io.ReadAll(resp.Body)
	return reply{resp, string(content)}, err
}

// cannotTell reports whether the gateway could not look the key up, and has not passed the request on.
func (r reply) cannotTell() bool {
	return r.Response != nil && r.StatusCode == http.StatusServiceUnavailable && strings.Contains(r.body, `"AUTH_UNAVAILABLE"`) &&
		!strings.Contains(r.body, mayHaveBeenCarriedOut)
}

// mayHaveBeenCarriedOut stands in the answer to a request that was passed on and then cut.
const mayHaveBeenCarriedOut = `"may_have_been_carried_out":true`

// code is the error code in the answer, or "" if a backend answered.
func (r reply) code(t testing.TB) string {
	t.Helper()
	var e struct {
		Error struct {
			Code      string         `json:"code"`
			Message   string         `json:"message"`
			Status    int            `json:"status"`
			Details   map[string]any `json:"details"`
			RequestID string         `json:"request_id"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(r.body), &e); err != nil {
		t.Fatalf("the answer is not JSON: %d %q", r.StatusCode, r.body)
	}
	if e.Error.Code == "" {
		return ""
	}
	if e.Error.Status != r.StatusCode || e.Error.Message == "" || e.Error.Details == nil ||
		!strings.HasPrefix(e.Error.RequestID, "req_") || e.Error.RequestID != r.Header.Get("X-Request-Id") {
		t.Errorf("envelope %s does not fit status %d, X-Request-Id %q", r.body, r.StatusCode, r.Header.Get("X-Request-Id"))
	}
	if r.Header.Get("Cache-Control") != "no-store" || r.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%s: Cache-Control %q, Content-Type %q", e.Error.Code, r.Header.Get("Cache-Control"), r.Header.Get("Content-Type"))
	}
	challenge, wanted := r.Header.Get("Www-Authenticate"), challenges[e.Error.Code]
	if !strings.HasPrefix(challenge, wanted) || wanted == "" && challenge != "" || wanted == realm && challenge != realm {
		t.Errorf("%s: WWW-Authenticate %q, want %q", e.Error.Code, challenge, wanted)
	}
	if allow, ok := r.Header["Allow"]; ok != (r.StatusCode == 405) || ok && slices.Contains(strings.Split(allow[0], ", "), r.Request.Method) {
		t.Errorf("%s: %s is refused, with Allow %q", e.Error.Code, r.Request.Method, allow)
	}
	return e.Error.Code
}

const realm = `Bearer realm="rekall"`

// challenges are how the WWW-Authenticate of an error begins: a request without a key gets no error code (RFC 6750, section 3.1).
var challenges = map[string]string{
	"API_KEY_MISSING": realm, "API_KEY_INVALID": realm + `, error="invalid_token"`, "API_KEY_REVOKED": realm + `, error="invalid_token"`,
	"API_KEY_EXPIRED": realm + `, error="invalid_token"`, "TOKEN_TYPE_UNSUPPORTED": realm + `, error="invalid_token"`,
	"SCOPE_INSUFFICIENT": realm + `, error="insufficient_scope"`,
}

// wantCode checks status and error code; code "" wants an answer of a backend.
func (r reply) wantCode(t testing.TB, status int, code string) {
	t.Helper()
	if got := r.code(t); r.StatusCode != status || got != code {
		t.Errorf("answer %d %s, want %d %s", r.StatusCode, got, status, code)
	}
}

// echo is what the backend says that it received.
func (r reply) echo(t testing.TB) devenv.EchoData {
	t.Helper()
	var e devenv.Echo
	if err := json.Unmarshal([]byte(r.body), &e); err != nil || e.Data.Backend == "" {
		t.Fatalf("not a backend's answer: %d %q", r.StatusCode, r.body)
	}
	return e.Data
}

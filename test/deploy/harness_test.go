package deploy

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/backendtest"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

const shipped = "../../cmd/rekall-gateway/deploy/"

// program is the gateway of this tree, as it is deployed.
var program string

func TestMain(m *testing.M) {
	pgtest.Main(process.Built(m, func(dir string) error {
		program = filepath.Join(dir, "rekall-gateway")
		return build("../..", program)
	}))
}

// build makes the gateway of a checkout of the repository, as the Containerfile of this one does.
func build(checkout, program string) error {
	step, err := buildStep()
	if err != nil {
		return err
	}
	cmd := exec.Command("bash", "-c", step)
	cmd.Dir = checkout
	cmd.Env = append(os.Environ(), "PROGRAM="+program)
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the gateway: %w\n%s", err, output)
	}
	return nil
}

// rig is a database and two backends.
type rig struct {
	t                   *testing.T
	database            string // URL of its owner
	admin               *keyadmin.Admin
	production, sandbox *devenv.Backend
}

// newRig has a database without a schema.
func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, database: pgtest.URL(t)}
	r.production, r.sandbox = backendtest.Start(t, "production"), backendtest.Start(t, "sandbox")
	r.admin = keyadmin.New(pgtest.Store(t, r.database))
	return r
}

func (r *rig) migrate() {
	r.t.Helper()
	pgtest.Migrate(r.t, r.database)
}

func (r *rig) key(environment string, scopes ...string) keyadmin.Key {
	r.t.Helper()
	key, _, err := r.admin.Create(r.t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "test", Account: "acme", Environment: environment, Scopes: scopes,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

func (r *rig) revoke(id string) {
	r.t.Helper()
	if _, err := r.admin.Revoke(r.t.Context(), keyadmin.Operator("test"), id); err != nil {
		r.t.Fatal(err)
	}
}

const site = `{
	admin ADMIN
	persist_config off
	storage file_system STORAGE
	grace_period 5s
	rekall {
		database {env.REKALL_DATABASE_URL}
	}
}

http://HTTP {
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

// gateway is a process of some version of the gateway.
type gateway struct {
	t           *testing.T
	program     string
	file        string // Caddyfile
	admin, http string // base URLs
	env         []string
	sockets     []*os.File // that it is handed, from fd 3 on
	process     *process.Process
}

// gateway writes a Caddyfile for a gateway that listens on an address, and logs in to Postgres with a URL.
func (r *rig) gateway(program, address, database string) *gateway {
	r.t.Helper()
	dir := r.t.TempDir()
	admin := process.FreeAddress(r.t)
	text := strings.NewReplacer("ADMIN", admin, "STORAGE", dir, "HTTP", address,
		"PRODUCTION", r.production.Address(), "SANDBOX", r.sandbox.Address()).Replace(site)
	g := &gateway{
		t: r.t, program: program, file: filepath.Join(dir, "Caddyfile"), admin: "http://" + admin, http: "http://" + address,
		env: []string{"REKALL_DATABASE_URL=" + database, "HOME=" + dir},
	}
	process.Write(r.t, g.file, text)
	return g
}

func (g *gateway) start() {
	g.t.Helper()
	g.process = process.Start(g.t, process.Options{Env: g.env, Files: g.sockets, Killed: true, EndsWithin: time.Minute},
		g.program, "run", "--config", g.file, "--adapter", "caddyfile")
}

func (g *gateway) startReady() {
	g.t.Helper()
	g.start()
	g.waitReady()
}

func (g *gateway) waitReady() {
	g.t.Helper()
	eventually.True(g.t, "the gateway is ready", func() bool {
		g.process.MustRun(g.t)
		answer, err := ask("GET", g.admin+"/rekall/ready", "")
		return err == nil && answer.status == http.StatusOK
	})
}

// want sends a request with a key and checks status and error code; code "" wants an answer of a backend.
func (g *gateway) want(status int, code, method, key string) {
	g.t.Helper()
	got, err := ask(method, g.http+"/v1/memories", key)
	if err != nil {
		g.t.Fatal(err)
	}
	if got.status != status || got.code != code {
		g.t.Errorf("%s: answer %d %s, want %d %s", method, got.status, got.code, status, code)
	}
}

type answer struct {
	status int
	code   string // of the gateway's error
	body   string
}

// client makes a connection for each request, so that each may reach another process.
var client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// ask sends a request, with a key unless it is "".
func ask(method, url, key string) (answer, error) { return askBy(client, method, url, key) }

func askBy(client *http.Client, method, url, key string, document ...string) (answer, error) {
	req, err := http.NewRequest(method, url, strings.NewReader(strings.Join(document, "")))
	if err != nil {
		return answer{}, err
	}
	if len(document) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	var e struct {
		Error struct {
			Code string `json:"code"`
		} `json:"error"`
	}
	_ = json.Unmarshal(body, &e)
	return answer{resp.StatusCode, e.Error.Code, string(body)}, err
}

// load is requests that go on until it is stopped. Each must be answered 200.
type load struct {
	t       *testing.T
	good    atomic.Int64
	mu      sync.Mutex
	bad     []string
	stopped chan struct{}
	running sync.WaitGroup
}

// startLoad asks a URL in a loop, as several clients that keep their connections and several that make a new one for each request.
func startLoad(t *testing.T, clients int, url, key string) *load {
	eventually.True(t, "the gateway can tell whose key it is", func() bool { // a busy machine may be late with the first lookup
		got, err := ask("GET", url, key)
		return err != nil || got.code != "AUTH_UNAVAILABLE"
	})
	l := &load{t: t, stopped: make(chan struct{})}
	for i := range 2 * clients {
		client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: i%2 == 0}}
		l.running.Go(func() {
			defer client.CloseIdleConnections()
			for {
				select {
				case <-l.stopped:
					return
				case <-time.After(2 * time.Millisecond):
					l.note(askBy(client, "GET", url, key))
				}
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *load) note(got answer, err error) {
	if err == nil && got.status == http.StatusOK {
		l.good.Add(1)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bad = append(l.bad, fmt.Sprint(got, err))
}

// waitMore returns when so many more requests were answered.
func (l *load) waitMore(n int64) {
	l.t.Helper()
	from := l.good.Load()
	eventually.True(l.t, "requests are answered", func() bool { return l.good.Load() >= from+n || l.failed() > 0 })
}

func (l *load) failed() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.bad)
}

func (l *load) stop() {
	select {
	case <-l.stopped:
	default:
		close(l.stopped)
	}
	l.running.Wait()
}

// mustHaveLostNone stops the load.
func (l *load) mustHaveLostNone() {
	l.t.Helper()
	l.stop()
	if len(l.bad) > 0 {
		l.t.Errorf("%d of %d requests failed, first with %s", len(l.bad), int64(len(l.bad))+l.good.Load(), l.bad[0])
	}
}

// command runs a command of a gateway, which must succeed.
func command(t *testing.T, program, database string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+database, "HOME="+t.TempDir())
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, output)
	}
	return string(output)
}

// run starts a program, which is killed when the test ends: to stop in order takes as long as shutdown_delay.
func run(t *testing.T, env []string, name string, args ...string) *process.Process {
	t.Helper()
	return process.Start(t, process.Options{Env: env, Killed: true, EndsWithin: time.Minute}, name, args...)
}

func port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// substitute replaces each old text with the new one after it. A text that is not there is an error: the shipped file has changed.
func substitute(t *testing.T, text string, oldNew ...string) string {
	t.Helper()
	for i := 0; i < len(oldNew); i += 2 {
		if !strings.Contains(text, oldNew[i]) {
			t.Fatalf("no %q in:\n%s", oldNew[i], text)
		}
		text = strings.ReplaceAll(text, oldNew[i], oldNew[i+1])
	}
	return text
}

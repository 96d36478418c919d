package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

const shipped = "../../cmd/rekall-gateway/deploy/"

// program is the gateway of this tree, as it is deployed.
var program string

func TestMain(m *testing.M) { pgtest.Main(built{m}) }

// built builds the gateway for the tests, and removes it afterwards.
type built struct{ m *testing.M }

func (b built) Run() int {
	dir, err := os.MkdirTemp("", "rekall-deploy-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program = filepath.Join(dir, "rekall-gateway")
	if err := build("../..", program); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return b.m.Run()
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
	r := &rig{t: t, database: pgtest.URL(t), production: backend(t, "production"), sandbox: backend(t, "sandbox")}
	store, err := keystore.Open(r.database, keystore.Options{ApplicationName: "rekall-test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	r.admin = keyadmin.New(store)
	return r
}

func (r *rig) migrate() {
	r.t.Helper()
	if _, _, err := keystore.Migrate(r.t.Context(), r.database); err != nil {
		r.t.Fatal(err)
	}
}

func backend(t *testing.T, name string) *devenv.Backend {
	t.Helper()
	b, err := devenv.StartBackend(context.Background(), name, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Stop(context.Background()) })
	return b
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
	process     *process
}

// gateway writes a Caddyfile for a gateway that listens on an address, and logs in to Postgres with a URL.
func (r *rig) gateway(program, address, database string) *gateway {
	r.t.Helper()
	dir := r.t.TempDir()
	admin := freeAddress(r.t)
	text := strings.NewReplacer("ADMIN", admin, "STORAGE", dir, "HTTP", address,
		"PRODUCTION", r.production.Address(), "SANDBOX", r.sandbox.Address()).Replace(site)
	g := &gateway{
		t: r.t, program: program, file: filepath.Join(dir, "Caddyfile"), admin: "http://" + admin, http: "http://" + address,
		env: []string{"REKALL_DATABASE_URL=" + database, "HOME=" + dir},
	}
	write(r.t, g.file, text)
	return g
}

func (g *gateway) start() {
	g.t.Helper()
	g.process = runWith(g.t, g.sockets, g.env, g.program, "run", "--config", g.file, "--adapter", "caddyfile")
}

func (g *gateway) startReady() {
	g.t.Helper()
	g.start()
	g.waitReady()
}

func (g *gateway) waitReady() {
	g.t.Helper()
	eventually(g.t, "the gateway is ready", func() bool {
		g.process.mustRun(g.t)
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

func askBy(client *http.Client, method, url, key string) (answer, error) {
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		return answer{}, err
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
	eventually(l.t, "requests are answered", func() bool { return l.good.Load() >= from+n || l.failed() > 0 })
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

// process is a program that runs until the test ends.
type process struct {
	name string
	cmd  *exec.Cmd
	log  output
	done chan struct{}
}

func run(t *testing.T, env []string, name string, args ...string) *process {
	t.Helper()
	return runWith(t, nil, env, name, args...)
}

// runWith hands the program files, from fd 3 on.
func runWith(t *testing.T, files []*os.File, env []string, name string, args ...string) *process {
	t.Helper()
	p := &process{name: filepath.Base(name), cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.ExtraFiles = files
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // stopping in order takes as long as shutdown_delay
		<-p.done
		if log := p.log.String(); t.Failed() {
			t.Logf("log of %s:\n%s", p.name, log[max(0, len(log)-4000):])
		}
	})
	return p
}

// stop asks the process to end, as systemd does, and waits until it has.
func (p *process) stop(t *testing.T) {
	t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		_ = p.cmd.Process.Kill()
		<-p.done
		t.Errorf("%s did not end", p.name)
	}
}

func (p *process) mustRun(t *testing.T) {
	t.Helper()
	select {
	case <-p.done:
		t.Fatalf("%s ended:\n%s", p.name, p.log.String())
	default:
	}
}

// output collects what a process prints.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// freeAddress picks a port below those that the kernel gives to outgoing connections, one of which could take it first.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 100 {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(10_000)))
		if err == nil {
			_ = listener.Close()
			return listener.Addr().String()
		}
	}
	t.Fatal("no free port")
	return ""
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
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

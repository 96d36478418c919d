package monitoring

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// program is the gateway under test, built once.
var program string

func TestMain(m *testing.M) { pgtest.Main(built{m}) }

// built builds the gateway for the tests, and removes it afterwards.
type built struct{ m *testing.M }

func (b built) Run() int {
	dir, err := os.MkdirTemp("", "rekall-monitoring-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program = filepath.Join(dir, "rekall-gateway")
	build := exec.Command("go", "build", "-o", program, "../../cmd/rekall-gateway")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the gateway:", err)
		return 1
	}
	return b.m.Run()
}

// rig is a database, and a backend for the gateways in front of it.
type rig struct {
	t        *testing.T
	database string
	admin    *keyadmin.Admin
	backend  *devenv.Backend
	gateway  string // a line of the rekall_gateway blocks
}

func newRig(t *testing.T, database string) *rig {
	t.Helper()
	if _, _, err := keystore.Migrate(t.Context(), database); err != nil {
		t.Fatal(err)
	}
	store, err := keystore.Open(database, keystore.Options{ApplicationName: "rekall-test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	backend, err := devenv.StartBackend(t.Context(), "production", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = backend.Stop(context.Background()) })
	return &rig{t: t, database: database, admin: keyadmin.New(store), backend: backend}
}

func (r *rig) key() keyadmin.Key {
	r.t.Helper()
	key, _, err := r.admin.Create(r.t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "test", Account: "acme", Environment: "production", Scopes: []string{"memories:read"},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

// gateway is a running edge. Its metrics are served as the runbook says, on an address of their own.
type gateway struct {
	t                    *testing.T
	database, file       string
	http, admin, metrics string // addresses
	process              *process
}

const caddyfile = `{
	admin ADMIN
	persist_config off
	grace_period 1s
	rekall {
		database {env.REKALL_DATABASE_URL}
		refresh 100ms
		max_staleness 5s
		usage_flush 100ms
		OPTION
	}
}

http://HTTP {
	rekall_gateway {
		GATEWAY
		production {
			reverse_proxy BACKEND
		}
	}
}

http://METRICS {
	rekall_health
	metrics
}
`

func (r *rig) start(option string) *gateway {
	r.t.Helper()
	dir := r.t.TempDir()
	g := &gateway{
		t: r.t, file: filepath.Join(dir, "Caddyfile"), http: freeAddress(r.t), admin: freeAddress(r.t), metrics: freeAddress(r.t),
	}
	text := strings.NewReplacer("ADMIN", g.admin, "OPTION", option, "GATEWAY", r.gateway, "HTTP", g.http, "BACKEND", r.backend.Address(), "METRICS", g.metrics).
		Replace(caddyfile)
	write(r.t, g.file, text)
	g.database = r.database
	g.run()
	return g
}

// run starts the process, for the first time or again.
func (g *gateway) run() {
	g.t.Helper()
	g.process = run(g.t, []string{"REKALL_DATABASE_URL=" + g.database, "HOME=" + filepath.Dir(g.file)}, program, "run", "--config", g.file, "--adapter", "caddyfile")
	eventually(g.t, "the gateway is ready", func() bool { return status("http://"+g.admin+"/rekall/ready") == http.StatusOK })
}

// ask sends a request with a key and returns the status.
func (g *gateway) ask(key string) int {
	req, err := http.NewRequest("GET", "http://"+g.http+"/v1/memories", nil)
	if err != nil {
		g.t.Error(err)
		return 0
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := client.Do(req)
	if err != nil {
		return 0
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	return resp.StatusCode
}

func (g *gateway) allowed(key keyadmin.Key) {
	g.t.Helper()
	if got := g.ask(key.Key.Reveal()); got != http.StatusOK {
		g.t.Fatalf("answer %d, want 200", got)
	}
}

// load asks in a loop, as several clients do, until the function that it returns is called.
func load(clients int, ask func()) (stop func()) {
	done := make(chan struct{})
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(50 * time.Millisecond):
					ask()
				}
			}
		})
	}
	return sync.OnceFunc(func() {
		close(done)
		running.Wait()
	})
}

// prometheus is a running Prometheus.
type prometheus struct {
	t       *testing.T
	address string
}

// startPrometheus scrapes the gateways as the job of the runbook, each second.
func startPrometheus(t *testing.T, rules string, gateways ...*gateway) *prometheus {
	t.Helper()
	dir := t.TempDir()
	var targets []string
	for _, g := range gateways {
		targets = append(targets, fmt.Sprintf("%q", g.metrics))
	}
	write(t, filepath.Join(dir, "rules.yml"), rules)
	write(t, filepath.Join(dir, "prometheus.yml"), `
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 500ms}
rule_files: [rules.yml]
scrape_configs:
  - job_name: rekall-gateway
    static_configs: [{targets: [`+strings.Join(targets, ", ")+`]}]
`)
	p := &prometheus{t, freeAddress(t)}
	run(t, nil, "prometheus", "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+p.address, "--log.level=warn")
	eventually(t, "Prometheus is ready", func() bool { return status("http://"+p.address+"/-/ready") == http.StatusOK })
	// Seconds later. What a counter shows at first is no increase of it.
	eventually(t, "Prometheus has scraped", func() bool { return len(p.query("rekall_ready")) == len(gateways) })
	return p
}

// sample is one series of a query's answer.
type sample struct {
	Metric map[string]string `json:"metric"`
	Value  [2]any            `json:"value"` // time, and the number as text
}

func (p *prometheus) query(expr string) []sample {
	p.t.Helper()
	resp, err := client.Get("http://" + p.address + "/api/v1/query?query=" + url.QueryEscape(expr))
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var answer struct {
		Error string `json:"error"`
		Data  struct {
			Result []sample `json:"result"`
		} `json:"data"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Error != "" {
		p.t.Fatalf("query %s: %v %s", expr, err, answer.Error)
	}
	return answer.Data.Result
}

// firing is the alerts that fire now.
func (p *prometheus) firing() map[string]bool {
	p.t.Helper()
	firing := make(map[string]bool)
	for _, s := range p.query(`ALERTS{alertstate="firing"}`) {
		firing[s.Metric["alertname"]] = true
	}
	return firing
}

func (p *prometheus) waitFiring(alerts ...string) {
	p.t.Helper()
	seen := make(map[string]bool)
	eventually(p.t, fmt.Sprintf("%v have fired", alerts), func() bool {
		for alert := range p.firing() {
			seen[alert] = true
		}
		for _, alert := range alerts {
			if !seen[alert] {
				return false
			}
		}
		return true
	})
}

// process is a program that runs until the test ends.
type process struct {
	cmd  *exec.Cmd
	log  output
	done chan struct{}
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

func run(t *testing.T, env []string, name string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(name, args...), done: make(chan struct{})}
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
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(20 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.done
			t.Errorf("%s did not end", filepath.Base(name))
		}
		if log := p.log.String(); t.Failed() {
			t.Logf("log of %s:\n%s", filepath.Base(name), log[max(0, len(log)-4000):])
		}
	})
	return p
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

var client = &http.Client{Timeout: 10 * time.Second}

// status is that of an answer; 0: there is none.
func status(url string) int {
	resp, err := client.Get(url)
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
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

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		<-time.After(50 * time.Millisecond)
	}
}

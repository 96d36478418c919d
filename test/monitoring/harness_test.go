package monitoring

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
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
		return process.Build(program, "../../cmd/rekall-gateway")
	}))
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
	pgtest.Migrate(t, database)
	r := &rig{t: t, database: database, admin: keyadmin.New(pgtest.Store(t, database))}
	r.startBackend(process.FreeAddress(r.t)) // which it has again when it is back
	return r
}

// startBackend starts the backend, for the first time or again.
func (r *rig) startBackend(address string) {
	r.t.Helper()
	r.backend = backendtest.StartAt(r.t, "production", address)
}

func (r *rig) key() keyadmin.Key {
	r.t.Helper()
	key, _, err := r.admin.Create(r.t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "test", Account: "acme", Environment: "production", Scopes: []string{"memories:read"}, ManageKeys: true,
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
	process              *process.Process
}

const caddyfile = `{
	admin ADMIN
	persist_config off
	grace_period 1s
	servers {
		listener_wrappers {
			rekall_drain
		}
	}
	rekall {
		database {env.REKALL_DATABASE_URL}
		refresh 100ms
		max_staleness 5s
		usage_flush 100ms
		OPTION
	}
}

http://HTTP {
	rekall_keys
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
		t: r.t, file: filepath.Join(dir, "Caddyfile"), http: process.FreeAddress(r.t), admin: process.FreeAddress(r.t), metrics: process.FreeAddress(r.t),
	}
	text := strings.NewReplacer("ADMIN", g.admin, "OPTION", option, "GATEWAY", r.gateway, "HTTP", g.http, "BACKEND", r.backend.Address(), "METRICS", g.metrics).
		Replace(caddyfile)
	process.Write(r.t, g.file, text)
	g.database = r.database
	g.run()
	return g
}

// run starts the process, for the first time or again.
func (g *gateway) run() {
	g.t.Helper()
	g.process = process.Start(g.t, process.Options{Env: []string{"REKALL_DATABASE_URL=" + g.database, "HOME=" + filepath.Dir(g.file)}},
		program, "run", "--config", g.file, "--adapter", "caddyfile")
	eventually.True(g.t, "the gateway is ready", func() bool { return status("http://"+g.admin+"/rekall/ready") == http.StatusOK })
}

// ask sends a request with a key and returns the status.
func (g *gateway) ask(key string) int { return g.get("/v1/memories", key) }

func (g *gateway) get(path, key string) int {
	req, err := http.NewRequest("GET", "http://"+g.http+path, nil)
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

// allowed asks again while the gateway cannot tell: a busy machine may be late with the first lookup of a key.
func (g *gateway) allowed(key keyadmin.Key) {
	g.t.Helper()
	var got int
	eventually.True(g.t, "the gateway can tell whose key it is", func() bool {
		got = g.ask(key.Key.Reveal())
		return got != http.StatusServiceUnavailable
	})
	if got != http.StatusOK {
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
	dir     string
	address string
	process *process.Process
}

// startPrometheus scrapes the gateways as the job of the runbook, each second.
func startPrometheus(t *testing.T, rules string, gateways ...*gateway) *prometheus {
	t.Helper()
	p := &prometheus{t: t, dir: t.TempDir(), address: process.FreeAddress(t)}
	p.rules(rules)
	p.configure(gateways...)
	p.process = process.Start(t, process.Options{}, "prometheus", "--config.file="+filepath.Join(p.dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(p.dir, "data"), "--web.listen-address="+p.address, "--log.level=warn")
	eventually.True(t, "Prometheus is ready", func() bool { return status("http://"+p.address+"/-/ready") == http.StatusOK })
	// Seconds later. What a counter shows at first is no increase of it.
	eventually.True(t, "Prometheus has scraped", func() bool { return len(p.query("rekall_keys_trusted")) == len(gateways) })
	return p
}

// rules has it follow these rules, from its start or its next SIGHUP on.
func (p *prometheus) rules(rules string) {
	process.Write(p.t, filepath.Join(p.dir, "rules.yml"), rules)
}

// configure has it scrape these gateways, from its start or its next SIGHUP on.
func (p *prometheus) configure(gateways ...*gateway) {
	p.t.Helper()
	var targets []string
	for _, g := range gateways {
		targets = append(targets, fmt.Sprintf("%q", g.metrics))
	}
	process.Write(p.t, filepath.Join(p.dir, "prometheus.yml"), `
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 500ms}
rule_files: [rules.yml]
scrape_configs:
  - job_name: rekall-gateway
    static_configs: [{targets: [`+strings.Join(targets, ", ")+`]}]
`)
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
	eventually.True(p.t, fmt.Sprintf("%v have fired", alerts), func() bool {
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

var client = &http.Client{Timeout: time.Minute}

// status is that of an answer; 0: there is none.
func status(url string) int {
	resp, err := client.Get(url)
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

//go:build fleet

package fleet

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// program is the gateway's binary, built once.
var program string

func TestMain(m *testing.M) {
	os.Exit(process.Built(m, func(dir string) error {
		program = filepath.Join(dir, "rekall-gateway")
		return process.Build(program, "../../cmd/rekall-gateway", raceFlag...)
	}).Run())
}

// gateway is an edge that is a process.
type gateway struct {
	t          *testing.T
	database   string
	file       string // its Caddyfile
	url, admin string
	client     *http.Client
	log        process.Log // of all its processes, one after another
	process    *process.Process

	mu                   sync.Mutex // for the two times
	stoppedAt, resumedAt time.Time
}

// startGateway runs a gateway in front of a backend. options are lines of its rekall block.
func startGateway(t *testing.T, database, backend string, options ...string) *gateway {
	t.Helper()
	return startGatewayWith(t, database, backend, "", options...)
}

// startGatewayWith is startGateway with a line more in the rekall_gateway block.
func startGatewayWith(t *testing.T, database, backend, line string, options ...string) *gateway {
	t.Helper()
	dir := t.TempDir()
	address, admin := process.FreeAddress(t), process.FreeAddress(t)
	g := &gateway{
		t: t, database: database, file: filepath.Join(dir, "Caddyfile"), url: "http://" + address, admin: "http://" + admin,
		// Longer than any fault: a request that is given up tells nothing.
		client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 64}},
	}
	text := fmt.Sprintf(`{
	admin %s
	persist_config off
	storage file_system %q
	rekall {
		database {env.REKALL_DATABASE_URL}
		%s
	}
}
http://%s {
	rekall_gateway {
		%s
		production {
			reverse_proxy %s
		}
	}
}
`, admin, dir, strings.Join(options, "\n\t\t"), address, line, backend)
	process.Write(t, g.file, text)
	g.start()
	t.Cleanup(g.end)
	eventually.True(t, "the gateway is ready", g.ready)
	return g
}

func (g *gateway) start() {
	started, err := process.Run(process.Options{
		Env: []string{"REKALL_DATABASE_URL=" + g.database, "HOME=" + filepath.Dir(g.file)}, Log: &g.log, EndsWithin: 30 * time.Second,
	}, program, "run", "--config", g.file, "--adapter", "caddyfile")
	if err != nil {
		g.t.Error(err)
		return
	}
	g.process = started
}

func (g *gateway) ready() bool {
	resp, err := g.client.Get(g.admin + "/rekall/ready")
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func (g *gateway) kill() { g.process.Kill(g.t) }

func (g *gateway) pause() {
	g.process.Signal(g.t, syscall.SIGSTOP)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stoppedAt = time.Now()
}

func (g *gateway) resume() {
	g.mu.Lock()
	g.resumedAt = time.Now()
	g.mu.Unlock()
	g.process.Signal(g.t, syscall.SIGCONT)
}

// end stops the process and fails the test if one had a data race.
func (g *gateway) end() {
	g.client.CloseIdleConnections()
	g.process.Stop(g.t)
	if g.t.Failed() {
		g.t.Logf("end of the log of %s:\n%s", g.url, g.log.Tail())
	}
}

func (g *gateway) ask(key keyadmin.Key) answer {
	req, err := http.NewRequest(http.MethodGet, g.url+"/v1/memories", nil)
	if err != nil {
		return answer{verdict: wrong, detail: err.Error()}
	}
	req.Header.Set("Authorization", "Bearer "+key.Key.Reveal())
	sent := time.Now()
	resp, err := g.client.Do(req)
	if err != nil { // it was killed
		return answer{verdict: unavailable}
	}
	defer func() { _ = resp.Body.Close() }()
	body, _ := io.ReadAll(resp.Body) // it may have been killed; it has decided
	a := answer{decided: g.decidedAfter(sent), arrived: time.Now()}
	switch code := string(body); {
	case resp.StatusCode == http.StatusOK:
		a.verdict = allowed
	case resp.StatusCode == http.StatusUnauthorized && strings.Contains(code, "API_KEY_REVOKED"):
		a.verdict = revoked
	case resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(code, "AUTH_UNAVAILABLE"):
		a.verdict = unavailable
	default:
		a.verdict, a.detail = wrong, fmt.Sprintf("%d %s", resp.StatusCode, code)
	}
	return a
}

// decidedAfter is the moment before which a request cannot have been decided.
func (g *gateway) decidedAfter(sent time.Time) time.Time {
	const grace = 100 * time.Millisecond // until the last thread has stopped
	g.mu.Lock()
	defer g.mu.Unlock()
	if sent.After(g.stoppedAt.Add(grace)) && sent.Before(g.resumedAt) {
		return g.resumedAt
	}
	return sent
}

//go:build fleet

package fleet

import (
	"bytes"
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
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// program is the gateway's binary, built once.
var program string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "rekall-fleet-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program = filepath.Join(dir, "rekall-gateway")
	build := exec.Command("go", append(append([]string{"build"}, raceFlag...), "-o", program, "../../cmd/rekall-gateway")...)
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the gateway:", err)
		return 1
	}
	return m.Run()
}

// gateway is an edge that is a process.
type gateway struct {
	t          *testing.T
	database   string
	file       string // its Caddyfile
	url, admin string
	client     *http.Client
	log        output
	cmd        *exec.Cmd
	done       chan struct{}

	mu                   sync.Mutex // for the two times
	stoppedAt, resumedAt time.Time
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

// startGateway runs a gateway in front of a backend. options are lines of its rekall block.
func startGateway(t *testing.T, database, backend string, options ...string) *gateway {
	t.Helper()
	return startGatewayWith(t, database, backend, "", options...)
}

// startGatewayWith is startGateway with a line more in the rekall_gateway block.
func startGatewayWith(t *testing.T, database, backend, line string, options ...string) *gateway {
	t.Helper()
	dir := t.TempDir()
	address, admin := freeAddress(t), freeAddress(t)
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
	if err := os.WriteFile(g.file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	g.start()
	t.Cleanup(g.end)
	eventually(t, "the gateway is ready", g.ready)
	return g
}

// freeAddress picks a port below those that the kernel gives to outgoing connections, one of which could take it while
// the gateway is dead.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 100 {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20_000+rand.IntN(10_000)))
		if err == nil {
			_ = listener.Close()
			return listener.Addr().String()
		}
	}
	t.Fatal("no free port")
	return ""
}

func (g *gateway) start() {
	cmd, done := exec.Command(program, "run", "--config", g.file, "--adapter", "caddyfile"), make(chan struct{})
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+g.database, "HOME="+filepath.Dir(g.file), "GORACE=halt_on_error=1")
	cmd.Stdout, cmd.Stderr = &g.log, &g.log
	if err := cmd.Start(); err != nil {
		g.t.Errorf("start a gateway: %v", err)
		return
	}
	g.cmd, g.done = cmd, done
	go func() {
		defer close(done)
		_ = cmd.Wait()
	}()
}

func (g *gateway) ready() bool {
	resp, err := g.client.Get(g.admin + "/rekall/ready")
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func (g *gateway) kill() {
	g.signal(syscall.SIGKILL)
	<-g.done
}

func (g *gateway) signal(signal syscall.Signal) { _ = g.cmd.Process.Signal(signal) }

func (g *gateway) pause() {
	g.signal(syscall.SIGSTOP)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stoppedAt = time.Now()
}

func (g *gateway) resume() {
	g.mu.Lock()
	g.resumedAt = time.Now()
	g.mu.Unlock()
	g.signal(syscall.SIGCONT)
}

// end stops the process and fails the test if it had a data race.
func (g *gateway) end() {
	g.client.CloseIdleConnections()
	g.signal(syscall.SIGCONT)
	g.signal(syscall.SIGTERM)
	select {
	case <-g.done:
	case <-time.After(30 * time.Second):
		g.kill()
		g.t.Error("the gateway did not end")
	}
	text := g.log.String()
	if strings.Contains(text, "DATA RACE") {
		g.t.Errorf("the gateway has a data race:\n%s", text)
	} else if g.t.Failed() {
		g.t.Logf("end of the log of %s:\n%s", g.url, text[max(0, len(text)-4000):])
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

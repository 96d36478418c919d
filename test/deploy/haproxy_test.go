package deploy

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// balanced is two edges behind HAProxy, configured as the guide says but for addresses. The shipped addresses in 10.0.0.0/8 are
// those in 127.0.0.0/8 here, so that both edges have the same ports.
type balanced struct {
	*rig
	haproxy      *process.Process
	socket       string
	front, plain string // addresses of HAProxy
	edges        []*gateway
}

// startBalanced starts edges that log in to Postgres with the URLs.
func startBalanced(t *testing.T, r *rig, databases ...string) *balanced {
	t.Helper()
	dir, err := os.MkdirTemp("", "rekall-haproxy-") // short: the path of a Unix socket has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	b := &balanced{rig: r, socket: filepath.Join(dir, "admin.sock"), front: process.FreeAddress(t), plain: process.FreeAddress(t)}
	tls, plain, health := port(process.FreeAddress(t)), port(process.FreeAddress(t)), port(process.FreeAddress(t))
	for i, database := range databases {
		b.edges = append(b.edges, b.edge(i+1, database, tls, plain, health))
	}
	config := filepath.Join(dir, "haproxy.cfg")
	process.Write(t, config, substitute(t, process.Read(t, shipped+"haproxy.cfg"),
		"/run/haproxy/admin.sock", b.socket, "bind :443", "bind "+b.front, "bind :80", "bind "+b.plain, "check port 8081", "check port "+health,
		"10.0.0.11:443", "127.0.0.11:"+tls, "10.0.0.12:443", "127.0.0.12:"+tls, "10.0.0.11:80", "127.0.0.11:"+plain, "10.0.0.12:80", "127.0.0.12:"+plain))
	if output, err := exec.Command("haproxy", "-c", "-f", config).CombinedOutput(); err != nil || strings.Contains(string(output), "WARNING") {
		t.Fatalf("check: %v\n%s", err, output)
	}
	for _, g := range b.edges {
		g.startReady()
	}
	b.haproxy = run(t, nil, "haproxy", "-db", "-f", config)
	for i := range b.edges {
		b.waitFor(i, "UP")
	}
	return b
}

// edge is a gateway with the guide's Caddyfile for edges behind HAProxy.
func (b *balanced) edge(number int, database, tls, plain, health string) *gateway {
	b.t.Helper()
	dir, host, admin := b.t.TempDir(), fmt.Sprintf("127.0.0.1%d", number), process.FreeAddress(b.t)
	options := strings.NewReplacer("ADMIN", admin, "STORAGE", dir, "HOST", host).
		Replace("{\n\tadmin ADMIN\n\tpersist_config off\n\tstorage file_system STORAGE\n\tdefault_bind HOST\n")
	text := substitute(b.t, caddyfileOfGuide(b.t, "proxy_protocol"),
		"{\n\tauto_https", options+"\tauto_https", "edge edge-1", fmt.Sprintf("edge edge-%d\n\t\trefresh 200ms\n\t\tmax_staleness 3s", number),
		"10.0.0.10/32", "127.0.0.1/32", "servers :443", "servers "+host+":"+tls, "servers :80", "servers "+host+":"+plain,
		"http://:8081", "http://:"+health, "\nhttp:// {", "\nhttp://:"+plain+" {", "\napi.rekall.ai", "\nhttp://:"+tls,
		"prod-1:8080", b.production.Address(), "sandbox:8080", b.sandbox.Address())
	g := &gateway{
		t: b.t, program: program, file: filepath.Join(dir, "Caddyfile"), admin: "http://" + admin,
		env: []string{"REKALL_DATABASE_URL=" + database, "HOME=" + dir},
	}
	process.Write(b.t, g.file, text)
	return g
}

// server is HAProxy's view of an edge, by the names of its statistics.
func (b *balanced) server(i int) map[string]string {
	b.t.Helper()
	conn, err := net.Dial("unix", b.socket)
	if err != nil {
		return nil
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "show stat\n"); err != nil {
		return nil
	}
	rows, err := csv.NewReader(conn).ReadAll()
	if err != nil || len(rows) == 0 {
		return nil
	}
	for _, row := range rows {
		if row[0] == "edges" && row[1] == fmt.Sprintf("edge-%d", i+1) {
			server := make(map[string]string)
			for column, name := range rows[0] {
				server[name] = row[column]
			}
			return server
		}
	}
	return nil
}

// timesDown is how often HAProxy has taken an edge out.
func (b *balanced) timesDown(i int) int {
	b.t.Helper()
	n, err := strconv.Atoi(b.server(i)["chkdown"])
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

func (b *balanced) waitFor(i int, status string) {
	b.t.Helper()
	eventually.True(b.t, fmt.Sprintf("HAProxy sees edge %d %s", i+1, status), func() bool {
		b.haproxy.MustRun(b.t)
		return b.server(i)["status"] == status
	})
}

func TestUpgradeOfEdgesOneByOneBehindHAProxyLosesNoRequest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	b := startBalanced(t, r, r.database, r.database)
	requests := startLoad(t, 2, "http://"+b.front+"/v1/memories", r.key("production", "memories:read").Key.Reveal())
	requests.waitMore(50)
	for i, g := range b.edges {
		before := b.timesDown(i)
		g.process.Stop(t) // returns when the process has ended
		if n := b.timesDown(i) - before; n != 1 {
			t.Errorf("edge %d ended, and HAProxy had taken it out %d times", i+1, n)
		}
		requests.waitMore(50)
		g.startReady() // as the new version
		b.waitFor(i, "UP")
		requests.waitMore(50)
	}
	requests.mustHaveLostNone()
}

// login returns the URL of an edge's user of its own, and what cuts it off from Postgres and lets it in again.
func (r *rig) login() (database string, cutOff, letIn func()) {
	r.t.Helper()
	role := pgtest.Role(r.t, r.database)
	command(r.t, program, r.database, "migrate", "--edge-role", role)
	database = pgtest.Login(r.t, r.database, role)
	u, err := url.Parse(database)
	if err != nil {
		r.t.Fatal(err)
	}
	user := u.User.Username()
	return database, func() {
			r.t.Helper()
			pgtest.Exec(r.t, r.database, "alter role "+user+" nologin; select pg_terminate_backend(pid) from pg_stat_activity where usename = '"+user+"'")
		}, func() {
			r.t.Helper()
			pgtest.Exec(r.t, r.database, "alter role "+user+" login")
		}
}

func TestEdgeThatIsNotReadyGetsNoRequestsBehindHAProxyUntilItIs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	database, cutOff, letIn := r.login()
	b := startBalanced(t, r, database, r.database)
	key := r.key("production", "memories:read").Key.Reveal()

	cutOff()
	b.waitFor(0, "DOWN")
	for range 20 {
		if got, err := ask("GET", "http://"+b.front+"/v1/memories", key); err != nil || got.status != http.StatusOK {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	letIn()
	b.waitFor(0, "UP")
}

func TestWhileNoEdgeIsReadyClientsBehindHAProxyGetTheEdgesAnswerAndNoReset(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	database, cutOff, letIn := r.login()
	b := startBalanced(t, r, database, database)
	key := r.key("production", "memories:read").Key.Reveal()

	cutOff()
	b.waitFor(0, "DOWN")
	b.waitFor(1, "DOWN")
	if got, err := ask("GET", "http://"+b.front+"/v1/memories", key); err != nil || got.code != "AUTH_UNAVAILABLE" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := ask("GET", "http://"+b.plain+"/v1/memories", ""); err != nil || got.code != "TLS_REQUIRED" {
		t.Errorf("over plain HTTP: %+v, %v", got, err)
	}

	letIn()
	b.waitFor(0, "UP")
	b.waitFor(1, "UP")
	if got, err := ask("GET", "http://"+b.front+"/v1/memories", key); err != nil || got.status != http.StatusOK {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestEdgesBehindHAProxySeeTheClientsAddressAndRefusePlainHTTP(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	b := startBalanced(t, r, r.database, r.database)
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 77)}}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return from.DialContext(ctx, "tcp", address)
		},
	}}
	key := r.key("production", "memories:read").Key.Reveal()
	got, err := askBy(client, "GET", "http://"+b.front+"/v1/memories", key)
	var echo devenv.Echo
	if err != nil || json.Unmarshal([]byte(got.body), &echo) != nil || echo.Data.Headers.Get("X-Forwarded-For") != "127.0.0.77" {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = askBy(client, "GET", "http://"+b.plain+"/v1/memories", key)
	if err != nil || got.code != "TLS_REQUIRED" {
		t.Errorf("%+v, %v", got, err)
	}
}

// caddyfileOfGuide is the guide's configuration that has a word.
func caddyfileOfGuide(t *testing.T, word string) string {
	t.Helper()
	blocks := blocksOf(t, shipped+"README.md", "caddyfile")
	i := slices.IndexFunc(blocks, func(block string) bool { return strings.Contains(block, word) })
	if i < 0 {
		t.Fatalf("the guide has no configuration with %s", word)
	}
	return blocks[i]
}

// blocksOf returns the fenced blocks of a language in a page.
func blocksOf(t *testing.T, page, language string) []string {
	t.Helper()
	var blocks []string
	for _, match := range regexp.MustCompile("(?s)\n```"+language+"\n(.*?)```\n").FindAllStringSubmatch(process.Read(t, page), -1) {
		blocks = append(blocks, match[1])
	}
	return blocks
}

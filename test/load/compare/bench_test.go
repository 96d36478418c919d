//go:build load

package compare

import (
	"context"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

var (
	rounds      = flag.Int("rounds", 30, "rounds in which each system is measured once")
	starts      = flag.Int("starts", 10, "how often all systems of the comparison are started; the rounds are shared out")
	seconds     = flag.Int("seconds", 1, "length of one measurement")
	keyCount    = flag.Int("keys", 1000, "keys that requests take turns with")
	connections = flag.Int("connections", 64, "connections of the load generator")
	upstreams   = flag.Int("upstreams", 1, "addresses of the backend")
	write       = flag.Bool("write", false, "write the tables into README.md")
	smoke       = flag.Bool("smoke", false, "measure each thing once and briefly, to see that it works")
)

// Programs that were built once for all tests.
var gatewayProgram, caddyProgram, authProgram string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	if *smoke {
		*rounds, *starts = 1, 1
	}
	dir, err := os.MkdirTemp("", "rekall-load-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if *starts < 1 || *rounds%*starts != 0 {
		fmt.Fprintln(os.Stderr, "-rounds must be a multiple of -starts")
		return 2
	}
	for _, b := range []struct {
		program          *string
		name, importPath string
	}{
		{&gatewayProgram, "rekall-gateway", "github.com/rekall-ai/gateway/cmd/rekall-gateway"},
		{&caddyProgram, "caddy", "github.com/caddyserver/caddy/v2/cmd/caddy"}, // of the version in go.mod
		{&authProgram, "authservice", "github.com/rekall-ai/gateway/test/load/compare/authservice"},
	} {
		*b.program = filepath.Join(dir, b.name)
		if err := build(*b.program, b.importPath); err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n", b.name, err)
			return 1
		}
	}
	return m.Run()
}

func build(output, importPath string, flags ...string) error {
	cmd := exec.Command("go", append(append([]string{"build"}, flags...), "-o", output, importPath)...)
	cmd.Env = append(os.Environ(), "GOFLAGS=") // those of this test are not for what it measures
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	return cmd.Run()
}

// answer of the backend, 207 bytes.
var answer = fmt.Sprintf(`{"data":[{"id":"mem_0000000000000000000001","content":"%s","created_at":"2025-01-01T00:00:00Z"}],`+
	`"pagination":{"next_cursor":null,"has_more":false,"total_count":1}}`, strings.Repeat("x", 45))

// bench is what the systems share: backend, keys, the service that checks keys for some, and Postgres.
type bench struct {
	t        *testing.T
	dir      string
	database string
	postgres *devenv.Postgres
	keys     []string
	backends []string // addresses
	h2c      string   // address at which the backend speaks HTTP/2
	auth     *program // nil until a system needs it
	address  string   // of auth
	client   *http.Client
}

func newBench(t *testing.T) *bench {
	t.Helper()
	// Not t.TempDir, which nginx's workers could not enter when root started them.
	dir, err := os.MkdirTemp("", "rekall-load-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	b := &bench{t: t, dir: dir, client: &http.Client{
		Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64},
	}}
	t.Cleanup(b.client.CloseIdleConnections)
	b.postgres = pgtest.Server(t)
	b.database = b.postgres.URL()
	b.makeKeys()
	b.startBackend()
	return b
}

// of is the same bench for a part of its test, with which what is started ends.
func (b *bench) of(t *testing.T) *bench {
	part := *b
	part.t, part.auth = t, nil
	return &part
}

// makeKeys puts the keys into Postgres and, for the other systems, into files.
func (b *bench) makeKeys() {
	b.t.Helper()
	pgtest.Migrate(b.t, b.database)
	conn, err := pgx.Connect(b.t.Context(), b.database)
	if err != nil {
		b.t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	var rows [][]any
	var list, named, digests strings.Builder
	for range *keyCount {
		key, id := apikey.Generate(apikey.Production), "key_"+apikey.RandomText(22)
		digest := apikey.Hash(key)
		b.keys = append(b.keys, key)
		rows = append(rows, []any{id, "acme", "load", "production", digest[:], []string{"memories:read"}})
		fmt.Fprintln(&list, key)
		fmt.Fprintln(&named, key, id)
		fmt.Fprintln(&digests, hex.EncodeToString(digest[:]), id)
	}
	_, err = conn.CopyFrom(b.t.Context(), pgx.Identifier{"rekall", "api_keys"},
		[]string{"id", "account", "name", "environment", "key_hash", "scopes"}, pgx.CopyFromRows(rows))
	if err != nil {
		b.t.Fatal(err)
	}
	// Limits as in production, which no load reaches.
	if _, err := conn.Exec(b.t.Context(), `
		insert into rekall.account_limits (account, requests_per_minute, burst, concurrent_requests) values ('acme', 1000000, 10000000, 1000000)`); err != nil {
		b.t.Fatal(err)
	}
	b.writeFile("keys", list.String())
	b.writeFile("named-keys", named.String())
	b.writeFile("digests", digests.String())
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) writeFile(name, text string) {
	b.t.Helper()
	if err := os.WriteFile(b.path(name), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// fill returns a file of testdata with its @NAMES@ filled in.
func (b *bench) fill(name, address, admin string) string {
	b.t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		b.t.Fatal(err)
	}
	var listen, servers strings.Builder
	for i, backend := range b.backends {
		fmt.Fprintf(&listen, "\t\tlisten %s;\n", backend)
		if strings.HasPrefix(name, "haproxy") {
			fmt.Fprintf(&servers, "\tserver s%d %s\n", i, backend)
		} else {
			fmt.Fprintf(&servers, "\t\tserver %s;\n", backend)
		}
	}
	filled := strings.NewReplacer("@DIR@", b.dir, "@ADDRESS@", address, "@ADMIN@", admin, "@AUTH@", b.address,
		"@BACKENDS@", strings.Join(b.backends, " "), "@LISTEN@\n", listen.String(), "@H2C@", b.h2c, "@SERVERS@\n", servers.String(),
		"@ANSWER@", answer, "@KEYS@", b.path("named-keys"), "@DIGESTS@", b.path("digests")).Replace(string(text))
	if name != "nginx-common.conf" {
		return filled
	}
	b.writeFile(name, filled)
	return filled
}

// startBackend runs nginx.
func (b *bench) startBackend() {
	b.t.Helper()
	for range *upstreams {
		b.backends = append(b.backends, process.FreeAddress(b.t))
	}
	b.h2c = process.FreeAddress(b.t)
	need(b.t, "nginx")
	b.fill("nginx-common.conf", "", "")
	p := b.startNginx("backend", b.fill("backend.conf", "", ""))
	for _, address := range b.backends {
		eventually.True(b.t, "the backend answers", func() bool {
			p.running()
			status, body, err := b.ask("http://"+address, "")
			return err == nil && status == http.StatusOK && body == answer
		})
	}
}

// startNginx runs nginx with a configuration. As root, its workers are root too: the files are for nobody else.
func (b *bench) startNginx(name, configuration string) *program {
	b.t.Helper()
	b.writeFile(name+".conf", configuration)
	global := fmt.Sprintf("daemon off; pid %s; error_log stderr error;", b.path(name+".pid"))
	if os.Geteuid() == 0 {
		global += " user root;"
	}
	return startProgram(b.t, b.path(name+".log"), nil, "nginx", "-e", "stderr", "-c", b.path(name+".conf"), "-g", global)
}

// startAuth runs the service that forward_auth and auth_request ask.
func (b *bench) startAuth() *program {
	b.t.Helper()
	if b.auth == nil {
		b.address = process.FreeAddress(b.t)
		b.auth = startProgram(b.t, b.path("auth.log"), nil, authProgram, b.address, b.path("digests"))
		eventually.True(b.t, "the auth service answers", func() bool {
			b.auth.running()
			status, _, err := b.ask("http://"+b.address+"/auth", b.keys[0])
			return err == nil && status == http.StatusOK
		})
	}
	return b.auth
}

// need fails the test where there is no such program.
func need(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Fatalf("there is no %s: test/load/run installs what is needed", program)
	}
}

// ask sends one request, with a key unless that is empty.
func (b *bench) ask(url, key string) (status int, body string, err error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := b.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// prove checks that a system does what it is measured for, and asks it for every key, so that none is new to it.
func (b *bench) prove(s *system) {
	b.t.Helper()
	url := s.url + "/v1/memories"
	eventually.True(b.t, s.name+" answers", func() bool {
		s.own.running()
		status, _, err := b.ask(url, b.keys[0])
		return err == nil && status == http.StatusOK
	})
	anonymous := http.StatusOK
	if s.authenticates {
		anonymous = http.StatusUnauthorized
	}
	for _, key := range []string{"", apikey.Generate(apikey.Production)} {
		if status, body, err := b.ask(url, key); err != nil || status != anonymous {
			b.t.Fatalf("%s answered %d %.200s (%v) to a request with no good key, not %d", s.name, status, body, err, anonymous)
		}
	}
	var next atomic.Int64
	var asking sync.WaitGroup
	for range 16 {
		asking.Go(func() {
			for i := next.Add(1) - 1; int(i) < len(b.keys); i = next.Add(1) - 1 {
				if status, body, err := b.ask(url, b.keys[i]); err != nil || status != http.StatusOK || body != answer {
					b.t.Errorf("%s answered %d %.200s (%v) to a good key", s.name, status, body, err)
					return
				}
			}
		})
	}
	asking.Wait()
	if b.t.Failed() {
		b.t.FailNow()
	}
}

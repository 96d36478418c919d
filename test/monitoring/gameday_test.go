//go:build gameday

package monitoring

import (
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/devenv/redistest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

var writeTable = flag.Bool("write", false, "write the table to GAMEDAY.md")

const (
	bound     = 5 * time.Second // max_staleness of the edges
	atEdges   = 3
	byClients = 16
)

// disaster is one thing that is broken, and mended after a while.
type disaster struct {
	what   string
	length time.Duration
	begin  func(f *fleet)
	end    func(f *fleet)
	alerts []string // that must fire
}

const nothing = "nothing"

var disasters = []disaster{
	{nothing, 16 * time.Second, func(*fleet) {}, func(*fleet) {}, nil},
	{"an edge is killed", 16 * time.Second, func(f *fleet) { f.edges[0].process.Kill(f.t) }, func(f *fleet) { f.edges[0].run() },
		[]string{"RekallEdgeDown"}},
	{"an edge stands still, longer than the bound", 16 * time.Second, func(f *fleet) { f.signal(1, syscall.SIGSTOP) }, func(f *fleet) { f.signal(1, syscall.SIGCONT) },
		[]string{"RekallEdgeDown"}},
	{"Postgres is away, shorter than the bound", 3 * time.Second, func(f *fleet) { f.primary.Kill() }, (*fleet).restartPostgres, nil},
	{"Postgres is away, longer than the bound", 15 * time.Second, func(f *fleet) { f.primary.Kill() }, (*fleet).restartPostgres,
		[]string{"RekallSyncOld", "RekallFailClosed", "RekallUnavailable"}},
	{"Postgres stands still", 15 * time.Second, func(f *fleet) { f.primary.Pause() }, func(f *fleet) { f.primary.Resume() },
		[]string{"RekallSyncOld", "RekallFailClosed", "RekallUnavailable"}},
	{"Redis stands still", 16 * time.Second, func(f *fleet) { f.redis.Pause() }, func(f *fleet) { f.redis.Resume() },
		[]string{"RekallLimitsApart"}},
	{"Redis is killed, and comes back empty", 16 * time.Second, func(f *fleet) { f.redis.Kill() }, func(f *fleet) { f.must(f.redis.Restart(context.Background())) },
		[]string{"RekallLimitsApart"}},
	{"the backend is away", 12 * time.Second, (*fleet).stopBackend, func(f *fleet) { f.startBackend(f.backend.Address()) }, []string{"RekallUpstreamUnavailable"}},
	{"a flood of keys that nobody has", 16 * time.Second, (*fleet).beginFlood, func(f *fleet) { f.endFlood() }, []string{"RekallUnknownKeys"}},
	{"each edge is reloaded", 12 * time.Second, func(f *fleet) {
		for _, g := range f.edges {
			reload(f.t, g)
		}
	}, func(*fleet) {}, nil},
	{"each edge is restarted, one after another", 12 * time.Second, (*fleet).restartEdges, func(*fleet) {}, nil},
	{"Postgres is lost, the standby promoted", 16 * time.Second, (*fleet).failOver, func(*fleet) {}, nil},
}

// fleet is edges behind HAProxy, and all that they need.
type fleet struct {
	*rig
	primary, standby *devenv.Postgres
	redis            *devenv.Redis
	edges            []*gateway
	front            string // address of HAProxy
	haproxy          string // socket of its statistics
	prometheus       *prometheus
	good, revoked    keyadmin.Key
	clients          *http.Client
	endFlood         func()

	mu      sync.Mutex
	answers map[int]int // by status, of the good key; 0: none
	gap     time.Duration
	wrong   []string
}

// TestGameDay breaks one thing after another under load, and tells for each what users saw and which alert fired when.
func TestGameDay(t *testing.T) {
	f := newGame(t)
	stop := load(byClients, f.ask)
	defer stop()
	defer load(1, f.askRevoked)()
	var rows strings.Builder
	for _, d := range disasters {
		rows.WriteString(f.play(d))
	}
	stop()
	for _, wrong := range f.wrong {
		t.Error(wrong)
	}
	table := fmt.Sprintf(gamePage, atEdges, bound, byClients, rows.String(), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, time.Now().UTC().Format(time.DateOnly))
	t.Log("\n" + table)
	if *writeTable && !t.Failed() {
		process.Write(t, "GAMEDAY.md", table)
		if err := os.Chmod("GAMEDAY.md", 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const gamePage = `# Game day

%d edges (` + "`max_staleness %s`" + `) behind HAProxy, Postgres with a standby, Redis, Prometheus with the shipped rules, hastened from minutes to
seconds; %d clients with a connection for each request. One thing after another is broken and mended. Written by

` + "```sh" + `
go test -tags gameday -v -count 1 -run GameDay -timeout 20m ./test/monitoring -args -write
` + "```" + `

| broken | for | what users saw: answers by status | longest without a good answer | open stream | revocation refused after | alerts, after |
| --- | ---: | --- | ---: | --- | ---: | --- |
%s
Answers are those to a good key, from when a thing is broken until it has recovered; 0 is none, of a connection that broke. "Revocation
refused after" counts from its commit to the last request that any edge allowed the key; nothing is allowed later than the bound. The
key that was revoked before the day was never allowed. On %d CPUs (%s/%s), all on one machine, %s.
`

func newGame(t *testing.T) *fleet {
	t.Helper()
	primary := pgtest.Server(t)
	f := &fleet{rig: newRig(t, primary.URL()), primary: primary, redis: redistest.Server(t, devenv.RedisOptions{}), answers: map[int]int{}}
	var err error
	if f.standby, err = primary.StartStandby(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.standby.Stop(context.Background()) })
	unlimited := 1_000_000
	if _, err := f.admin.SetAccountLimits(t.Context(), keyadmin.Operator("test"), "acme", "team", keyadmin.LimitsChange{PerMinute: &unlimited, Concurrent: &unlimited}); err != nil {
		t.Fatal(err)
	}
	f.good, f.revoked = f.key(), f.key()
	f.gateway = "rate_limits"
	f.database = f.anyPrimary()
	for i := range atEdges {
		f.edges = append(f.edges, f.start(fmt.Sprintf("edge edge-%d\n\t\trate_limit_store %s", i, f.redis.URL())))
	}
	f.startHAProxy()
	f.prometheus = startPrometheus(t, strings.Replace(hastened(t), "0.000003 *", "0.5 *", 1), f.edges...) // the day has many keys
	f.clients = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	f.revoke(f.revoked)
	eventually.True(t, "no alert fires any longer that no edge was scraped", func() bool { return len(f.prometheus.firing()) == 0 })
	return f
}

// anyPrimary is the URL of whichever of the two servers takes writes.
func (f *fleet) anyPrimary() string {
	f.t.Helper()
	first, err := pgx.ParseConfig(f.primary.URL())
	f.must(err)
	second, err := pgx.ParseConfig(f.standby.URL())
	f.must(err)
	return fmt.Sprintf("postgres://%s:%s@127.0.0.1:%d,127.0.0.1:%d/%s?sslmode=disable&target_session_attrs=read-write&connect_timeout=1",
		first.User, first.Password, first.Port, second.Port, first.Database)
}

func (f *fleet) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleet) startHAProxy() {
	f.t.Helper()
	f.front = process.FreeAddress(f.t)
	var servers strings.Builder
	for i, g := range f.edges {
		_, port, _ := strings.Cut(g.metrics, ":")
		fmt.Fprintf(&servers, "\tserver edge-%d %s check port %s inter 500ms fall 2 rise 2\n", i, g.http, port)
	}
	file := filepath.Join(f.t.TempDir(), "haproxy.cfg")
	f.haproxy = filepath.Join(f.t.TempDir(), "haproxy.sock")
	process.Write(f.t, file, `global
	stats socket `+f.haproxy+`
defaults
	mode tcp
	timeout connect 1s
	timeout client 1h
	timeout server 1h
	timeout check 1s
	retries 3
	option redispatch 1
frontend http
	bind `+f.front+`
	default_backend edges
backend edges
	balance leastconn
	option httpchk GET /rekall/ready
	http-check expect status 200
`+servers.String())
	if output, err := exec.Command("haproxy", "-c", "-f", file).CombinedOutput(); err != nil {
		f.t.Fatalf("%v\n%s", err, output)
	}
	process.Start(f.t, process.Options{}, "haproxy", "-db", "-f", file)
	eventually.True(f.t, "HAProxy serves", func() bool { return status("http://"+f.front+"/v1/memories") == http.StatusUnauthorized })
}

func (f *fleet) signal(edge int, signal syscall.Signal) {
	f.edges[edge].process.Signal(f.t, signal)
}

func (f *fleet) restartPostgres() { f.must(f.primary.Restart(context.Background())) }

func (f *fleet) stopBackend() { f.must(f.backend.Stop(context.Background())) }

func (f *fleet) beginFlood() {
	f.endFlood = load(byClients, func() { f.edges[0].ask(apikey.Generate(apikey.Production)) })
}

// restartEdges does as the operator's guide says: the next only when the one before is ready and the load balancer knows.
func (f *fleet) restartEdges() {
	for i, g := range f.edges {
		g.process.Stop(f.t)
		f.waitForHAProxy(i, "DOWN")
		g.run()
		f.waitForHAProxy(i, "UP")
	}
}

// waitForHAProxy waits until it has an edge's status.
func (f *fleet) waitForHAProxy(edge int, status string) {
	f.t.Helper()
	eventually.True(f.t, fmt.Sprintf("HAProxy sees edge %d %s", edge, status), func() bool {
		conn, err := net.Dial("unix", f.haproxy)
		if err != nil {
			return false
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, "show stat\n")
		statistics, err := io.ReadAll(conn)
		for line := range strings.Lines(string(statistics)) {
			if strings.HasPrefix(line, fmt.Sprintf("edges,edge-%d,", edge)) {
				return err == nil && strings.Contains(line, ","+status+",")
			}
		}
		return false
	})
}

func (f *fleet) failOver() {
	f.primary.Kill()
	f.must(f.standby.Promote(context.Background()))
}

// ask is what each client does all day.
func (f *fleet) ask() {
	begun := time.Now()
	code := f.send(f.front, f.good)
	for code != http.StatusOK && time.Since(begun) < time.Minute {
		f.count(code)
		<-time.After(20 * time.Millisecond)
		code = f.send(f.front, f.good)
	}
	f.count(code)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gap = max(f.gap, time.Since(begun))
}

func (f *fleet) count(code int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers[code]++
	if code == http.StatusUnauthorized || code == http.StatusForbidden {
		f.wrong = append(f.wrong, fmt.Sprintf("a good key got %d", code))
	}
}

func (f *fleet) askRevoked() {
	if code := f.send(f.front, f.revoked); code == http.StatusOK {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.wrong = append(f.wrong, "the revoked key was allowed")
	}
}

func (f *fleet) send(address string, key keyadmin.Key) int {
	req, _ := http.NewRequest(http.MethodGet, "http://"+address+"/v1/memories", nil)
	req.Header.Set("Authorization", "Bearer "+key.Key.Reveal())
	resp, err := f.clients.Do(req)
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// revoke tries until it is committed, and returns when that was.
func (f *fleet) revoke(key keyadmin.Key) time.Time {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		conn, err := pgx.Connect(ctx, f.database)
		if err == nil {
			_, err = conn.Exec(ctx, `update rekall.api_keys set revoked_at = now() where id = $1`, key.ID)
			_ = conn.Close(ctx)
		}
		cancel()
		if err == nil {
			return time.Now()
		}
		<-time.After(50 * time.Millisecond)
	}
}

// play breaks one thing and mends it, and returns its row.
func (f *fleet) play(d disaster) string {
	key := f.keyAtPrimary()
	for _, g := range f.edges {
		eventually.True(f.t, "the edge has the key", func() bool { return f.send(g.http, key) == http.StatusOK })
	}
	stream := f.openStream()
	f.mu.Lock()
	clear(f.answers)
	f.gap = 0
	f.mu.Unlock()

	begun := time.Now()
	fired := map[string]time.Duration{}
	watch := func() {
		for alert := range f.prometheus.firing() {
			if _, seen := fired[alert]; !seen {
				fired[alert] = time.Since(begun).Round(100 * time.Millisecond)
			}
		}
	}
	d.begin(f)
	revoked := make(chan time.Duration, 1)
	go func() { revoked <- f.revokeAndWatch(key) }()
	for time.Since(begun) < d.length {
		watch()
		<-time.After(200 * time.Millisecond)
	}
	d.end(f)
	broken := time.Since(begun)
	recovered := func() bool {
		watch()
		for _, g := range f.edges {
			if f.send(g.http, f.good) != http.StatusOK || status("http://"+g.admin+"/rekall/ready") != http.StatusOK {
				return false
			}
		}
		return f.send(f.front, f.good) == http.StatusOK
	}
	eventually.True(f.t, d.what+": all edges serve again, without anybody's doing", recovered)
	refusedAfter := <-revoked
	if d.what == nothing && len(fired) > 0 {
		f.wrong = append(f.wrong, fmt.Sprintf("%v fired though nothing was broken", slices.Sorted(maps.Keys(fired))))
	}
	for _, alert := range d.alerts {
		if _, ok := fired[alert]; !ok {
			f.wrong = append(f.wrong, fmt.Sprintf("%s: %s did not fire", d.what, alert))
		}
	}
	f.mu.Lock()
	var answers []string
	for _, code := range slices.Sorted(maps.Keys(f.answers)) {
		answers = append(answers, fmt.Sprintf("%d× %d", f.answers[code], code))
	}
	gap := f.gap.Round(10 * time.Millisecond)
	f.mu.Unlock()
	var alerts []string
	for _, alert := range slices.Sorted(maps.Keys(fired)) {
		alerts = append(alerts, fmt.Sprintf("%s %s", alert, fired[alert]))
	}
	eventually.True(f.t, "all alerts are over", func() bool { return len(f.prometheus.firing()) == 0 })
	return fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s |\n", d.what, broken.Round(time.Second), strings.Join(answers, ", "), gap,
		stream(), refusedAfter.Round(time.Millisecond), strings.Join(alerts, ", "))
}

// keyAtPrimary makes a key wherever the primary is now.
func (f *fleet) keyAtPrimary() keyadmin.Key {
	f.t.Helper()
	secret := apikey.Generate(apikey.Production)
	digest := apikey.Hash(secret)
	key := keyadmin.Key{ID: "key_" + apikey.RandomText(22), Key: keyadmin.Secret(secret)}
	conn, err := pgx.Connect(f.t.Context(), f.database)
	f.must(err)
	defer func() { _ = conn.Close(context.Background()) }()
	_, err = conn.Exec(f.t.Context(), `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes) values ($1, 'acme', 'game', 'production', $2, '{memories:read}')`,
		key.ID, digest[:])
	f.must(err)
	return key
}

// openStream opens an event stream with the good key and returns a function that says what became of it.
func (f *fleet) openStream() (fate func() string) {
	f.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+f.front+"/v1/memories", nil)
	req.Header.Set("Authorization", "Bearer "+f.good.Key.Reveal())
	req.Header.Set("X-Demo", "sse")
	resp, err := f.clients.Transport.RoundTrip(req)
	f.must(err)
	var ended atomic.Bool
	go func() {
		buffer := make([]byte, 1024)
		for {
			if _, err := resp.Body.Read(buffer); err != nil {
				ended.Store(true)
				return
			}
		}
	}()
	return func() string {
		defer cancel()
		defer func() { _ = resp.Body.Close() }()
		if ended.Load() {
			return "ended"
		}
		return "goes on"
	}
}

// revokeAndWatch revokes a key and returns how long after the commit an edge last allowed it.
func (f *fleet) revokeAndWatch(key keyadmin.Key) time.Duration {
	<-time.After(time.Second)
	committed := f.revoke(key)
	var last atomic.Int64
	var watchers sync.WaitGroup
	for _, g := range f.edges {
		watchers.Go(func() {
			for until := committed.Add(bound + 3*time.Second); time.Now().Before(until); {
				sent := time.Now()
				if f.send(g.http, key) == http.StatusOK {
					last.Store(max(last.Load(), int64(sent.Sub(committed))))
				}
				<-time.After(20 * time.Millisecond)
			}
		})
	}
	watchers.Wait()
	after := time.Duration(last.Load())
	if after > bound+time.Second {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.wrong = append(f.wrong, fmt.Sprintf("a revoked key was allowed %s after its revocation", after))
	}
	return after
}

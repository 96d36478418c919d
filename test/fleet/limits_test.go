//go:build fleet

package fleet

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/backendtest"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/devenv/redistest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

// limited is a key and what it may do.
type limited struct {
	name             string
	perMinute, burst int // of its account's own; 0: its tier's, which is free
}

var limitedKeys = []limited{{"free", 100, 150}, {"pro", 1000, 1500}, {"custom", 6000, 9000}}

// may is how many requests GCRA lets through in a time that begins with everything available.
func (l limited) may(length time.Duration) float64 {
	return float64(l.burst) - float64(l.perMinute)/4 + float64(l.perMinute)*length.Minutes()
}

const (
	limitedEdges   = 3
	limitedClients = 50
	clientGap      = 25 * time.Millisecond // 2,000 requests a second together: the limit of each key many times over
	mostOver       = 1.05                  // with Redis healthy
)

// phase is a state of the fleet and its Redis.
type phase struct {
	name   string
	edges  int
	store  bool
	during func(r *devenv.Redis) // after a fifth of it
	end    func(r *devenv.Redis) // nil: Redis is there again, or always was
	most   float64               // of what may be admitted
}

var phases = []phase{
	{name: "one edge, no store", edges: 1, most: 1},
	{name: "three edges, no store", edges: limitedEdges, most: limitedEdges},
	{name: "three edges, Redis", edges: limitedEdges, store: true, most: mostOver},
	{name: "three edges, Redis paused", edges: limitedEdges, store: true, during: (*devenv.Redis).Pause, end: (*devenv.Redis).Resume, most: 2},
	{name: "three edges, Redis killed", edges: limitedEdges, store: true, during: (*devenv.Redis).Kill, end: restart, most: 2},
	{name: "three edges, Redis restarted empty", edges: limitedEdges, store: true,
		during: func(r *devenv.Redis) { r.Kill(); restart(r) }, most: 2},
}

func restart(r *devenv.Redis) {
	if err := r.Restart(context.Background()); err != nil {
		panic(err)
	}
}

// TestEdgesHoldKeysToTheirLimits is a measurement as well: REKALL_FLEET=full takes a minute for each phase and writes the
// table beside it, limits.md.
func TestEdgesHoldKeysToTheirLimits(t *testing.T) {
	length := 10 * time.Second
	if full() {
		length = time.Minute
	}
	database := startPostgres(t, size{gateways: limitedEdges * len(phases)})
	pgtest.Migrate(t, database)
	store := pgtest.Store(t, database)
	backend := backendtest.Start(t, "production")
	redis := redistest.Server(t, devenv.RedisOptions{})
	var rows strings.Builder
	for _, p := range phases {
		t.Run(p.name, func(t *testing.T) {
			l := newLimitLoad(t, p, keyadmin.New(store), database, backend.Address(), redis)
			l.run(redis, length)
			rows.WriteString(l.rows(length))
			l.judge(length)
		})
	}
	table := fmt.Sprintf(limitsPage, limitedClients, limitedEdges, length, rows.String(), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH,
		time.Now().UTC().Format(time.DateOnly))
	t.Log("\n" + table)
	if full() && !t.Failed() {
		if err := os.WriteFile("limits.md", []byte(table), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const limitsPage = `# Limits of keys at one edge, at several, and without Redis

Written by

` + "```sh" + `
REKALL_FLEET=full go test -tags fleet -v -count 1 -run HoldKeysToTheirLimits -timeout 30m ./test/fleet
` + "```" + `

%d clients send 2,000 requests a second to %d gateway processes, or to one, in turns with three keys, for %s in each phase. What
is done to Redis is done after a fifth of it. "May" is what GCRA lets through in that time from a full burst on.

| phase | key | limit | may | admitted | of it | refused | failed | p50 | p99 | fallback |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
%s
"Fallback" is how many edges said in rekall_rate_limit_fallback, at the end of the phase, that they hold keys to their part of the
limits. Times are of all answers of the phase. Refused requests cost a key nothing. On %d CPUs (%s/%s), with Postgres, Redis, the
backend and the clients on the same machine, %s.
`

// limitLoad is the clients of a phase and what they saw.
type limitLoad struct {
	t     *testing.T
	phase phase
	edges []*gateway
	keys  []keyadmin.Key

	mu                        sync.Mutex
	admitted, refused, failed []int // by key
	took                      []time.Duration
	detail                    map[string]int // of what failed

	fallbacks int
}

func newLimitLoad(t *testing.T, p phase, admin *keyadmin.Admin, database, backend string, redis *devenv.Redis) *limitLoad {
	t.Helper()
	l := &limitLoad{t: t, phase: p, detail: map[string]int{}}
	concurrent := 10 * limitedClients // the rate is what is measured
	for _, k := range limitedKeys {
		account := k.name + " " + p.name // whose burst is whole
		operator := keyadmin.Operator("test")
		if _, err := admin.SetAccountLimits(t.Context(), operator, account, "", keyadmin.LimitsChange{
			PerMinute: &k.perMinute, Burst: &k.burst, Concurrent: &concurrent,
		}); err != nil {
			t.Fatal(err)
		}
		key, _, err := admin.Create(t.Context(), operator, keyadmin.CreateRequest{
			Name: k.name, Account: account, Environment: "production", Scopes: []string{"memories:read"},
		})
		if err != nil {
			t.Fatal(err)
		}
		l.keys = append(l.keys, key)
	}
	l.admitted, l.refused, l.failed = make([]int, len(l.keys)), make([]int, len(l.keys)), make([]int, len(l.keys))
	options := []string{"max_staleness 4s", "refresh 1s"}
	if p.store {
		options = append(options, "rate_limit_store "+redis.URL())
	}
	for i := range p.edges {
		l.edges = append(l.edges, startGatewayWith(t, database, backend, "rate_limits", append(options, fmt.Sprintf("edge edge-%d", i))...))
	}
	eventually.True(t, "each edge knows of the others", func() bool {
		return !slices.ContainsFunc(l.edges, func(g *gateway) bool { return g.live() != p.edges })
	})
	return l
}

// live is how many edges a gateway knows of.
func (g *gateway) live() int {
	resp, err := g.client.Get(g.admin + "/rekall/status")
	if err != nil {
		return 0
	}
	defer func() { _ = resp.Body.Close() }()
	var status struct {
		Runtimes []struct {
			Edges *struct {
				Live int `json:"live"`
			} `json:"edges"`
		} `json:"runtimes"`
	}
	if json.NewDecoder(resp.Body).Decode(&status) != nil || len(status.Runtimes) != 1 || status.Runtimes[0].Edges == nil {
		return 0
	}
	return status.Runtimes[0].Edges.Live
}

func (g *gateway) fallsBack() bool {
	resp, err := g.client.Get(g.admin + "/metrics")
	if err != nil {
		return false
	}
	defer func() { _ = resp.Body.Close() }()
	text, _ := io.ReadAll(resp.Body)
	return strings.Contains(string(text), "\nrekall_rate_limit_fallback 1\n")
}

func (l *limitLoad) run(redis *devenv.Redis, length time.Duration) {
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range limitedClients {
		clients.Go(func() { l.client(stop) })
	}
	<-time.After(length / 5)
	if l.phase.during != nil {
		l.phase.during(redis)
	}
	<-time.After(length - length/5)
	close(stop)
	for _, g := range l.edges {
		if g.fallsBack() {
			l.fallbacks++
		}
	}
	clients.Wait()
	if l.phase.end != nil {
		l.phase.end(redis)
	}
	eventually.True(l.t, "all edges share the limits again, and have said so", func() bool {
		return !slices.ContainsFunc(l.edges, func(g *gateway) bool {
			begun, ended := g.outages()
			return begun != ended || g.fallsBack()
		})
	})
}

// outages is how many the log of a gateway says have begun, and ended.
func (g *gateway) outages() (begun, ended int) {
	log := g.log.String()
	return strings.Count(log, "rate limit store does not answer"), strings.Count(log, "rate limit store answers again")
}

func (l *limitLoad) client(stop <-chan struct{}) {
	ticker := time.NewTicker(clientGap)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		k := rand.N(len(l.keys))
		g := l.edges[rand.N(len(l.edges))]
		req, err := http.NewRequest(http.MethodGet, g.url+"/v1/memories", nil)
		if err != nil {
			l.t.Error(err)
			return
		}
		req.Header.Set("Authorization", "Bearer "+l.keys[k].Key.Reveal())
		sent := time.Now()
		resp, err := g.client.Do(req)
		status := 0
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			status = resp.StatusCode
		}
		took := time.Since(sent)
		l.mu.Lock()
		l.took = append(l.took, took)
		switch status {
		case http.StatusOK:
			l.admitted[k]++
		case http.StatusTooManyRequests:
			l.refused[k]++
		default:
			l.failed[k]++
			l.detail[fmt.Sprint(status, " ", err)]++
		}
		l.mu.Unlock()
	}
}

func (l *limitLoad) rows(length time.Duration) string {
	slices.Sort(l.took)
	at := func(share float64) time.Duration {
		return l.took[min(len(l.took)-1, int(share*float64(len(l.took))))].Round(10 * time.Microsecond)
	}
	var b strings.Builder
	for k, key := range limitedKeys {
		fmt.Fprintf(&b, "| %s | %s | %d | %.0f | %d | %.0f %% | %d | %d | %s | %s | %d of %d |\n", l.phase.name, key.name, key.perMinute, key.may(length),
			l.admitted[k], 100*float64(l.admitted[k])/key.may(length), l.refused[k], l.failed[k], at(0.5), at(0.99), l.fallbacks, len(l.edges))
	}
	return b.String()
}

// judge demands what does not depend on the machine's speed.
func (l *limitLoad) judge(length time.Duration) {
	l.t.Helper()
	for k, key := range limitedKeys {
		// Clients began before the length and ended after it, by as much as one request takes.
		if over := float64(l.admitted[k]) / key.may(length+time.Second); over > l.phase.most {
			l.t.Errorf("%s: %.1f %% of what may be admitted", key.name, 100*over)
		}
		if l.failed[k] > 0 {
			l.t.Errorf("%s: %d requests failed: %v", key.name, l.failed[k], slices.SortedFunc(maps.Keys(l.detail), cmp.Compare))
		}
	}
	if l.phase.end != nil && l.fallbacks != len(l.edges) {
		l.t.Errorf("%d of %d edges did without a Redis that was away", l.fallbacks, len(l.edges))
	}
	for i, g := range l.edges {
		// While nothing is done to Redis, a deadline of 100 ms may be missed on a busy machine: an edge then does without it for a while.
		switch begun, _ := g.outages(); {
		case !l.phase.store && begun > 0:
			l.t.Errorf("edge %d has no store, and says %d times that it does not answer", i, begun)
		case l.phase.during != nil && begun == 0:
			l.t.Errorf("edge %d does not say that the store was away", i)
		case l.phase.during == nil && begun > 0:
			l.t.Logf("edge %d missed an answer %d times", i, begun)
		}
	}
}

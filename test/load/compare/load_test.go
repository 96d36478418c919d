//go:build load

package compare

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// generator sends requests with good keys to a system. At a rate, a request is due whether or not those before it were
// answered, and its time counts from when it was due: a stall shows in all the requests that it held up.
type generator struct {
	t      *testing.T
	url    string
	keys   []string
	client *http.Client
	sent   atomic.Int64

	mu       sync.Mutex
	times    []time.Duration
	failures []failure
}

// failure of a request that should have been answered with 200.
type failure struct {
	at   time.Time
	what string
}

func newGenerator(t *testing.T, s *system, keys []string) *generator {
	g := &generator{t: t, url: s.url, keys: keys, client: &http.Client{
		Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: *connections},
	}}
	t.Cleanup(g.client.CloseIdleConnections)
	return g
}

// capacity is how many requests per second the system answers when each connection sends one after another.
func (g *generator) capacity(span time.Duration) float64 {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), span)
	defer cancel()
	var sending sync.WaitGroup
	begin := time.Now()
	for range *connections {
		sending.Go(func() {
			for ctx.Err() == nil {
				g.send(time.Now())
			}
		})
	}
	sending.Wait()
	rate := float64(g.sent.Swap(0)) / time.Since(begin).Seconds()
	if len(g.failures) > 0 {
		g.t.Fatalf("before anything was disturbed, requests failed: %d, the first with %s", len(g.failures), g.failures[0].what)
	}
	g.times = nil
	return rate
}

// run sends at a rate until ctx is done.
func (g *generator) run(ctx context.Context, rate float64) {
	interval := time.Duration(float64(*connections) / rate * float64(time.Second))
	var sending sync.WaitGroup
	for range *connections {
		sending.Go(func() {
			due := time.Now().Add(rand.N(interval))
			for wait(ctx, time.Until(due)) {
				g.send(due)
				due = due.Add(interval)
			}
		})
	}
	sending.Wait()
}

// send sends a GET or a POST. Go's client sends a GET again when the connection turns out to be closed; a POST is lost, as it
// would be with any client.
func (g *generator) send(due time.Time) {
	n := g.sent.Add(1)
	method, path, body := http.MethodGet, "/v1/memories", io.Reader(http.NoBody)
	if n%2 == 0 {
		method, path, body = http.MethodPost, "/v1/memories/search", strings.NewReader(`{"query":"soak"}`)
	}
	req, err := http.NewRequest(method, g.url+path, body)
	if err != nil {
		g.t.Error(err)
		return
	}
	req.Header.Set("Authorization", "Bearer "+g.keys[int(n)%len(g.keys)])
	resp, err := g.client.Do(req)
	what := ""
	if err != nil {
		what = fmt.Sprintf("%s: %v", method, err)
	} else {
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			what = fmt.Sprintf("%s: %d %.200s (%v)", method, resp.StatusCode, text, err)
		}
	}
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.times = append(g.times, now.Sub(due))
	if what != "" {
		g.failures = append(g.failures, failure{now, what})
	}
}

// quantiles of the times that requests took, as cells of a table.
func (g *generator) quantiles() string {
	var cells []string
	for _, q := range []float64{0.5, 0.99, 0.999} {
		cells = append(cells, g.quantile(q).Round(10*time.Microsecond).String())
	}
	return strings.Join(cells, " | ")
}

func (g *generator) quantile(q float64) time.Duration {
	slices.Sort(g.times)
	return g.times[int(q*float64(len(g.times)-1))]
}

// wait reports false if ctx ended it.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

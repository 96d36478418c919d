//go:build load

package compare

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

var soakSpan = flag.Duration("soak", 10*time.Minute, "length of the soak")

// judgedFrom is how long a soak must last for its memory to be judged. After a reload the old configuration's idle connections
// stay open for two minutes, so that at first memory grows with every reload, plain Caddy's too.
const judgedFrom = 8 * time.Minute

// TestSoak loads the gateway, and plain Caddy with the same proxies beside it, with 80 % of what both can take, while keys come and go, both are
// reloaded and Postgres is restarted. It wants flat memory and goroutines, and no request lost but as plain Caddy loses some
// at a reload.
func TestSoak(t *testing.T) {
	span, ramp := *soakSpan, 10*time.Second
	if *smoke {
		span, ramp = min(span, 6*time.Second), time.Second
	}
	b := newBench(t)
	about := b.about(func(t *testing.T) string { return "Caddy " + caddyVersion(t) })
	k := &soak{bench: b, reloadEvery: min(10*time.Second, span/3), restartEvery: min(time.Minute, span/2)}
	k.watch(b.startGateway(checked, gatewayProgram, without(t, exampleFile(t), "\tlog\n")))
	k.watch(b.startPlain(without(t, exampleFile(t), "\tlog\n")))
	rate := 0.8 * k.capacity(ramp)

	ctx, cancel := context.WithTimeout(t.Context(), span)
	defer cancel()
	var running sync.WaitGroup
	for _, s := range k.subjects {
		running.Go(func() { s.load.run(ctx, rate) })
		running.Go(func() { s.sample(ctx) })
	}
	running.Go(func() { k.churn(ctx) })
	running.Go(func() { k.reload(ctx) })
	running.Go(func() { k.restart(ctx) })
	running.Wait()

	b.publish("soak", about+
		fmt.Sprintf("%v at %.0f requests/s to each of the two, 80 %% of what both could take at once.\n\n", span, rate)+k.table())
	k.judge(span)
}

// soak is the gateway and plain Caddy under the same load. What a goroutine counts is read when it has ended.
type soak struct {
	*bench
	subjects                  []*subject // the gateway, then Caddy
	reloadEvery, restartEvery time.Duration

	reloads           []time.Time // their moments
	restarts, churned int
}

// subject of a soak.
type subject struct {
	*system
	load    *generator
	samples []vitals // one for each second
}

// vitals of a process at a moment.
type vitals struct{ rss, heap, goroutines float64 }

func (k *soak) watch(s *system) {
	k.t.Helper()
	k.prove(s)
	k.subjects = append(k.subjects, &subject{system: s, load: newGenerator(k.t, s, k.keys)})
}

// capacity is the rate that each of the two reaches when both are asked for all that they can give.
func (k *soak) capacity(span time.Duration) float64 {
	k.t.Helper()
	rates := make([]float64, len(k.subjects))
	var measuring sync.WaitGroup
	for i, s := range k.subjects {
		measuring.Go(func() { rates[i] = s.load.capacity(span) })
	}
	measuring.Wait()
	if k.t.Failed() {
		k.t.FailNow()
	}
	return slices.Min(rates)
}

// sample reads the vitals every second. One that fails is left out: a reload replaces the admin endpoint.
func (s *subject) sample(ctx context.Context) {
	const tooMany = 10
	for failed := 0; wait(ctx, time.Second); {
		v, err := s.vitals()
		if err == nil {
			failed = 0
			s.samples = append(s.samples, v)
		} else if failed++; failed == tooMany {
			s.load.t.Errorf("read the metrics of %s: %v", s.name, err)
			return
		}
	}
}

func (s *subject) vitals() (vitals, error) {
	m, err := s.metrics("go_memstats_heap_alloc_bytes", "go_goroutines")
	return vitals{rss: s.own.rss(), heap: m["go_memstats_heap_alloc_bytes"], goroutines: m["go_goroutines"]}, err
}

// metrics reads those of these names, each of which must be there and have no labels.
func (s *system) metrics(names ...string) (map[string]float64, error) {
	text, err := get(s.admin + "/metrics")
	if err != nil {
		return nil, err
	}
	found := map[string]float64{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !slices.Contains(names, name) {
			continue
		}
		if found[name], err = strconv.ParseFloat(value, 64); err != nil {
			return nil, fmt.Errorf("metric %s: %w", name, err)
		}
	}
	if len(found) < len(names) {
		return nil, fmt.Errorf("of %v the metrics have only %v", names, found)
	}
	return found, nil
}

// adminClient makes a connection for each request: a reload closes those of the admin endpoint.
var adminClient = &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}

func get(url string) (string, error) {
	resp, err := adminClient.Get(url)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// churn makes keys, uses and revokes them, one after another.
func (k *soak) churn(ctx context.Context) {
	store, err := keystore.Open(k.database, keystore.Options{})
	if err != nil {
		k.t.Error(err)
		return
	}
	defer store.Close()
	admin, url := keyadmin.New(store), k.subjects[0].url+"/v1/memories"
	for wait(ctx, 50*time.Millisecond) {
		key, _, err := admin.Create(ctx, keyadmin.Operator("soak"), keyadmin.CreateRequest{
			Name: "soak", Account: "acme", Environment: "production", Scopes: []string{"memories:read"},
		})
		if err != nil {
			continue // Postgres is away
		}
		if !k.answers(ctx, url, key, http.StatusOK) {
			return
		}
		for revoked := false; !revoked; {
			_, err := admin.Revoke(ctx, keyadmin.Operator("soak"), key.ID)
			revoked = err == nil || errors.Is(err, keyadmin.ErrAlreadyRevoked) // the answer to the first was lost
			if !revoked && !wait(ctx, 50*time.Millisecond) {
				return
			}
		}
		if !k.answers(ctx, url, key, http.StatusUnauthorized) {
			return
		}
		k.churned++
	}
}

// answers waits for a key's status. Until then "nobody can tell" is acceptable, and the old status for as long as the promise
// allows; a good key is never refused. It reports false when the soak is over, or has failed.
func (k *soak) answers(ctx context.Context, url string, key keyadmin.Key, want int) bool {
	for deadline := time.Now().Add(time.Minute); ; {
		status, body, err := k.ask(url, key.Key.Reveal())
		switch {
		case err == nil && status == want:
			return true
		case err == nil && status == http.StatusUnauthorized:
			k.t.Errorf("a good key was refused: %.200s", body)
			return false
		case time.Now().After(deadline):
			k.t.Errorf("a key of which %d was due got %d (%v) for a minute", want, status, err)
			return false
		}
		if !wait(ctx, 5*time.Millisecond) {
			return false
		}
	}
}

// reload loads the configuration anew, of both at the same time.
func (k *soak) reload(ctx context.Context) {
	for wait(ctx, k.reloadEvery) {
		k.reloads = append(k.reloads, time.Now())
		var reloading sync.WaitGroup
		for _, s := range k.subjects {
			reloading.Go(func() {
				if err := s.reload(); err != nil {
					k.t.Errorf("reload %s: %v", s.name, err)
				}
			})
		}
		reloading.Wait()
	}
}

func (s *system) reload() error {
	req, err := http.NewRequest(http.MethodPost, s.admin+"/load", strings.NewReader(s.configuration))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "text/caddyfile")
	req.Header.Set("Cache-Control", "must-revalidate") // although nothing has changed
	resp, err := adminClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, text)
	}
	return err
}

func (k *soak) restart(ctx context.Context) {
	for wait(ctx, k.restartEvery) {
		if err := k.postgres.Restart(k.t.Context()); err != nil {
			k.t.Errorf("restart Postgres: %v", err)
			return
		}
		k.restarts++
	}
}

// lost counts the requests that failed shortly after each reload, and the others.
func (k *soak) lost(s *subject) (atReloads []int, otherwise int) {
	const shortly = 3 * time.Second
	atReloads = make([]int, len(k.reloads))
	for _, f := range s.load.failures {
		// Index of the first reload after the failure: the one before it may be to blame.
		next, _ := slices.BinarySearchFunc(k.reloads, f.at, time.Time.Compare)
		if next > 0 && f.at.Sub(k.reloads[next-1]) < shortly {
			atReloads[next-1]++
		} else {
			otherwise++
		}
	}
	return atReloads, otherwise
}

func sum(counts []int) (total int) {
	for _, n := range counts {
		total += n
	}
	return total
}

// losesMore tells whether the first loses more at a reload than the second, by more than chance. What one reload costs is no
// independent event for each request, so the differences themselves show how much chance does.
func losesMore(first, second []int) bool {
	var difference, squares float64
	for i := range first {
		d := float64(first[i] - second[i])
		difference += d
		squares += d * d
	}
	return difference > 3*math.Sqrt(squares)
}

// stretches is into how many parts of the same length the report divides a soak.
const stretches = 10

// during is a vital sign in some of the stretches: the median, or the least.
func (s *subject) during(first, last int, sign sign) float64 {
	n := len(s.samples)
	var values []float64
	from := first * n / stretches
	for _, v := range s.samples[from:max(last*n/stretches, from+1)] { // a short one has fewer samples than stretches
		values = append(values, sign.of(v))
	}
	if sign.least {
		return slices.Min(values)
	}
	return median(values)
}

// sign is a vital that must stay flat, with the growth that is taken for noise.
type sign struct {
	name  string
	of    func(vitals) float64
	slack float64
	least bool // of a stretch, not the median
}

var signs = []sign{
	{"resident memory", func(v vitals) float64 { return v.rss }, 8 << 20, false},
	{"heap", func(v vitals) float64 { return v.heap }, 8 << 20, true}, // soon after a collection; later most of it is garbage
	{"goroutines", func(v vitals) float64 { return v.goroutines }, 100, false},
}

func (k *soak) table() string {
	var table strings.Builder
	fmt.Fprintf(&table, "%d keys made, used and revoked; %d reloads of both; %d restarts of Postgres.\n\n", k.churned, len(k.reloads), k.restarts)
	table.WriteString("| system | requests | lost at a reload | lost otherwise | p50 | p99 | p99.9 |\n| --- | --- | --- | --- | --- | --- | --- |\n")
	for _, s := range k.subjects {
		atReload, otherwise := k.lost(s)
		fmt.Fprintf(&table, "| %s | %d | %d | %d | %s |\n", s.name, s.load.sent.Load(), sum(atReload), otherwise, s.load.quantiles())
	}
	table.WriteString("\n| part of the soak | gateway: resident, MiB | heap at least, MiB | goroutines | plain Caddy: resident, MiB | heap at least, MiB | goroutines |\n" +
		"| --- | --- | --- | --- | --- | --- | --- |\n")
	for i := range stretches {
		fmt.Fprintf(&table, "| %d/%d |", i+1, stretches)
		for _, s := range k.subjects {
			fmt.Fprintf(&table, " %.0f | %.0f | %.0f |", s.during(i, i+1, signs[0])/(1<<20), s.during(i, i+1, signs[1])/(1<<20), s.during(i, i+1, signs[2]))
		}
		table.WriteString("\n")
	}
	return table.String()
}

func (k *soak) judge(span time.Duration) {
	k.t.Helper()
	gateway, caddy := k.subjects[0], k.subjects[1]
	ours, oursElse := k.lost(gateway)
	theirs, theirsElse := k.lost(caddy)
	if losesMore(ours, theirs) || oursElse > theirsElse {
		k.t.Errorf("the gateway lost %d requests at reloads and %d otherwise, plain Caddy %d and %d", ours, oursElse, theirs, theirsElse)
		for _, f := range gateway.load.failures[:min(5, len(gateway.load.failures))] {
			k.t.Logf("%s", f.what)
		}
	}
	if k.churned == 0 || len(k.reloads) == 0 || k.restarts == 0 {
		k.t.Errorf("nothing was disturbed: %d keys, %d reloads, %d restarts", k.churned, len(k.reloads), k.restarts)
	}
	if span < judgedFrom {
		k.t.Logf("a soak of %v is too short to judge memory by", span)
		return
	}
	for _, sign := range signs {
		before, after := gateway.during(3, 6, sign), gateway.during(7, 10, sign)
		if after > 1.1*before+sign.slack {
			k.t.Errorf("%s of the gateway grew from %.0f to %.0f", sign.name, before, after)
		}
	}
}

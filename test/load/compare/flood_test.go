//go:build load

package compare

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

var (
	floodSpan = flag.Duration("flood", 30*time.Second, "length of the flood")
	floodRate = flag.Float64("flood-rate", 10_000, "unknown keys per second in it")
)

// Requests per second with good keys, besides the flood.
const (
	warmRate = 400
	coldRate = 100
)

// floodTurns is how often quiet and flood take turns. More of them would show nothing but the attacker's connections being made.
const floodTurns = 3

// floodConnections is how many the flood has. Each waits for its answer, some floodWait milliseconds: a sync has to prove that there is no
// such key.
const (
	floodConnections = 512
	floodWait        = 40.0
)

// TestFlood loads the gateway with keys that it has in memory, with keys that it has not, and with keys just made: in quiet, and by
// turns while as many distinct unknown keys come as the flags say.
func TestFlood(t *testing.T) {
	span := *floodSpan
	if *smoke {
		span = min(span, 2*time.Second)
	}
	cold := int(4*coldRate*span.Seconds()) + 4
	*keyCount = max(*keyCount, 100) + cold
	b := newBench(t)
	about := b.about(func(t *testing.T) string { return "Caddy " + caddyVersion(t) })
	s := b.startGateway(limited, gatewayProgram, without(t, exampleFile(t), "\tlog\n"))
	all := b.keys
	b.keys = all[cold:] // those that prove asks for
	b.prove(s)
	part := cold / 4
	endure := func(i int) *endurance { return newEndurance(t, s, b.keys, all[i*part:(i+1)*part]) }
	before, quiet, beside, flooded := endure(0), endure(1), endure(2), endure(3)
	before.endure(b, s, span, nil) // for the memory: what a flood has taken is not all given back before the next turn
	neighbour := b.startGateway(neighbouring, gatewayProgram, without(t, exampleFile(t), "\tlog\n"))
	b.prove(neighbour)
	elsewhere, attack := &flood{b: b, s: neighbour}, &flood{b: b, s: s}
	for range floodTurns {
		quiet.endure(b, s, span/floodTurns, nil)
		beside.endure(b, s, span/floodTurns, elsewhere)
		flooded.endure(b, s, span/floodTurns, attack)
	}
	quiet.memory = before.memory
	b.publish("flood", about+fmt.Sprintf("%v each; %d requests/s with %d keys that are in memory, %d with keys that are not yet, keys made and used at once.\n\n",
		span, warmRate, len(b.keys), coldRate)+floodTable(quiet, beside, flooded, attack, span))
	for _, e := range []*endurance{before, quiet, beside, flooded} {
		if n := len(e.warm.failures) + len(e.cold.failures); n > 0 {
			t.Errorf("%d requests with known keys failed", n)
		}
	}
	if flooded.refusedNew > 0 {
		t.Errorf("%d keys just made were refused", flooded.refusedNew)
	}
}

// endurance is what the good keys saw.
type endurance struct {
	warm, cold       *generator
	made, refusedNew int
	slowestNew       time.Duration // from the commit to the answer
	statements       float64       // of the gateway to Postgres
	memory           float64       // of the gateway, resident at most
}

func newEndurance(t *testing.T, s *system, warm, cold []string) *endurance {
	return &endurance{warm: newGenerator(t, s, warm), cold: newGenerator(t, s, cold)}
}

// endure adds a turn.
func (e *endurance) endure(b *bench, s *system, span time.Duration, attack *flood) {
	b.t.Helper()
	if attack != nil {
		attack.prepare(span)
	}
	ctx, cancel := context.WithTimeout(b.t.Context(), span)
	defer cancel()
	before := b.statements(s)
	var running sync.WaitGroup
	running.Go(func() { e.warm.run(ctx, warmRate) })
	running.Go(func() { e.cold.run(ctx, coldRate) })
	running.Go(func() { e.make(ctx, b, s) })
	running.Go(func() {
		for wait(ctx, 100*time.Millisecond) {
			e.memory = max(e.memory, s.own.rss())
		}
	})
	if attack != nil {
		running.Go(attack.run)
	}
	running.Wait()
	e.statements += b.statements(s) - before
}

// make makes keys and uses each at once. A key that nobody could tell of yet is asked for again; a good key is never refused.
func (e *endurance) make(ctx context.Context, b *bench, s *system) {
	store, err := keystore.Open(b.database, keystore.Options{})
	if err != nil {
		b.t.Error(err)
		return
	}
	defer store.Close()
	for wait(ctx, 200*time.Millisecond) {
		key, _, err := keyadmin.New(store).Create(ctx, keyadmin.Operator("load"), keyadmin.CreateRequest{
			Name: "new", Account: "acme", Environment: "production", Scopes: []string{"memories:read"},
		})
		if err != nil {
			return // the time is over
		}
		committed := time.Now()
		status := http.StatusServiceUnavailable
		for status == http.StatusServiceUnavailable {
			if status, _, err = b.ask(s.url+"/v1/memories", key.Key.Reveal()); err != nil {
				b.t.Error(err)
				return
			}
		}
		e.made++
		if status != http.StatusOK {
			e.refusedNew++
		}
		e.slowestNew = max(e.slowestNew, time.Since(committed))
	}
}

// statements is how many the gateway has sent for keys: lookups and reads of the feed.
func (b *bench) statements(s *system) float64 {
	b.t.Helper()
	m, err := s.metrics("rekall_lookups_total", "rekall_syncs_total")
	if err != nil {
		b.t.Fatal(err)
	}
	return m["rekall_lookups_total"] + m["rekall_syncs_total"]
}

// flood is an attacker with many connections and a new key for each request.
type flood struct {
	b                           *bench
	s                           *system
	cmd                         *exec.Cmd
	refused, unavailable, other int
}

// prepare makes the keys of a turn. wrk asks for them, which costs less than to do so in Go. It runs when nobody else wants a CPU: a real
// attacker has CPUs of its own, and what this one takes from the gateway and from the good keys' client says nothing of the gateway.
func (f *flood) prepare(span time.Duration) {
	f.b.t.Helper()
	need(f.b.t, "wrk")
	const threads = 2
	for thread := range threads {
		var keys strings.Builder
		for range int(*floodRate * span.Seconds()) { // twice what each thread is to send
			fmt.Fprintln(&keys, apikey.Generate(apikey.Production))
		}
		f.b.writeFile(fmt.Sprintf("unknown-keys%d", thread), keys.String())
	}
	milliseconds := max(0, floodConnections / *floodRate * 1000 - floodWait)
	f.cmd = exec.Command("chrt", "--idle", "0", "wrk", "--threads", strconv.Itoa(threads), "--connections", strconv.Itoa(floodConnections),
		"--duration", fmt.Sprintf("%.0fs", span.Seconds()), "--timeout", "20s", "--script", "testdata/flood.lua", f.s.url,
		f.b.path("unknown-keys"), fmt.Sprintf("%.0f", milliseconds))
}

func (f *flood) run() {
	output, err := f.cmd.CombinedOutput()
	_, line, _ := strings.Cut(string(output), "RESULT ")
	var refused, unavailable, other int
	if _, scanErr := fmt.Sscan(line, &refused, &unavailable, &other); err != nil || scanErr != nil {
		f.b.t.Errorf("wrk: %v\n%s", err, output)
	}
	f.refused, f.unavailable, f.other = f.refused+refused, f.unavailable+unavailable, f.other+other
}

func floodTable(quiet, beside, flooded *endurance, attack *flood, span time.Duration) string {
	var table strings.Builder
	fmt.Fprintf(&table, "The flood: %.0f unknown keys per second, %d answered 401, %d 503, %d otherwise.\n\n",
		float64(attack.refused+attack.unavailable+attack.other)/span.Seconds(), attack.refused, attack.unavailable, attack.other)
	table.WriteString("| | quiet | the same flood at a second gateway beside it | in the flood | |\n| --- | --- | --- | --- | --- |\n")
	row := func(what, quiet, beside, flooded, verdict string) {
		fmt.Fprintf(&table, "| %s | %s | %s | %s | %s |\n", what, quiet, beside, flooded, verdict)
	}
	for _, g := range []struct {
		what                   string
		quiet, beside, flooded *generator
	}{{"keys in memory", quiet.warm, beside.warm, flooded.warm}, {"keys not in memory", quiet.cold, beside.cold, flooded.cold}} {
		times := func(g *generator) string { return strings.ReplaceAll(g.quantiles(), " |", " /") }
		p99 := func(than *generator) float64 { return float64(g.flooded.quantile(0.99)) / float64(than.quantile(0.99)) }
		row(g.what+": answered with 200", share(g.quiet), share(g.beside), share(g.flooded), "")
		row(g.what+": p50 / p99 / p99.9", times(g.quiet), times(g.beside), times(g.flooded),
			fmt.Sprintf("p99 × %.2f of quiet, × %.2f of the flood beside it", p99(g.quiet), p99(g.beside)))
	}
	refused := func(e *endurance) string { return fmt.Sprintf("%d of %d", e.refusedNew, e.made) }
	slowest := func(e *endurance) string { return e.slowestNew.Round(time.Millisecond).String() }
	row("keys just made, refused of them", refused(quiet), refused(beside), refused(flooded), "")
	row("slowest of them, from its commit to its answer", slowest(quiet), slowest(beside), slowest(flooded), "")
	perSecond := func(e *endurance) float64 { return e.statements / span.Seconds() }
	row("statements to Postgres per second", fmt.Sprintf("%.1f", perSecond(quiet)), fmt.Sprintf("%.1f", perSecond(beside)),
		fmt.Sprintf("%.1f", perSecond(flooded)), fmt.Sprintf("%+.1f", perSecond(flooded)-perSecond(quiet)))
	row("memory of the gateway at most, MiB", fmt.Sprintf("%.0f", quiet.memory/(1<<20)), "",
		fmt.Sprintf("%.0f", flooded.memory/(1<<20)), fmt.Sprintf("%+.0f", (flooded.memory-quiet.memory)/(1<<20)))
	return table.String()
}

func share(g *generator) string {
	return fmt.Sprintf("%d of %d", len(g.times)-len(g.failures), len(g.times))
}

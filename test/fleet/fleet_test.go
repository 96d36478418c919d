//go:build fleet

package fleet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/backendtest"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/network"
)

// size of a fleet, and of what happens to it.
type size struct {
	gateways, loops, revocations int
	span                         time.Duration // in which the revocations and the faults happen
	refresh, maxStaleness        time.Duration
}

// full reports whether the fleet is to have its full size.
func full() bool { return os.Getenv("REKALL_FLEET") == "full" }

func TestNoEdgeOfAFleetAllowsARevokedKeyPastTheBoundNorRefusesAGoodOne(t *testing.T) {
	s := size{gateways: 3, loops: 20, revocations: 20, span: 12 * time.Second, refresh: time.Second, maxStaleness: 3 * time.Second}
	if full() {
		s.gateways, s.loops, s.revocations, s.span = 5, 200, 200, 3*time.Minute
	}
	f := newFleet(t, s, disturbed)
	good := f.key()
	revocations := make([]*revocation, s.revocations)
	for i := range revocations {
		revocations[i] = &revocation{key: f.key(), at: rand.N(s.span), done: make(chan struct{})}
	}
	for _, e := range f.edges {
		eventually.True(t, e.name+" allows the keys", func() bool { return e.answersAll(allowed, append(keys(revocations), good)) })
	}

	// Disturb and revoke, and ask all the while.
	load := f.load()
	ctx, cancel := context.WithCancel(t.Context())
	var disturbing, asking, revoking sync.WaitGroup
	for _, e := range f.edges {
		if e.fault != nil {
			disturbing.Go(func() { f.disturb(ctx, e) })
		}
		asking.Go(func() { f.watchGood(ctx, e, good) })
	}
	for _, r := range revocations {
		revoking.Go(func() { f.revokeAndWatch(r) })
	}
	revoking.Wait()
	cancel()
	disturbing.Wait()
	asking.Wait()
	load = f.load().since(load)

	// All faults are over: every edge knows all that happened, and says so.
	for _, e := range f.edges {
		eventually.True(t, e.name+" refuses the revoked keys", func() bool { return e.answersAll(revoked, keys(revocations)) })
		eventually.True(t, e.name+" allows the good key", func() bool { return e.answersAll(allowed, []keyadmin.Key{good}) })
	}
	for _, r := range revocations {
		eventually.True(t, "every live edge has confirmed the revocation", func() bool { return f.confirmed(r.xid) })
	}
	f.printDelays()
	f.printLoad(fmt.Sprintf("%d revocations and the faults within %v, `max_staleness` %v", s.revocations, s.span, s.maxStaleness), load)
	f.printConfirmations(f.waitRevoked())
}

func TestFleetAsksLittleOfPostgres(t *testing.T) {
	const reportEvery, pingEvery = 5 * time.Second, 4 * time.Second // of packages edge and keystore
	s := size{gateways: 1, loops: 10, span: 10 * time.Second, refresh: time.Second, maxStaleness: 30 * time.Second}
	if full() {
		s.gateways, s.loops, s.span = 5, 200, 20*time.Second
	}
	f := newFleet(t, s, undisturbed)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()

	wait(t.Context(), 12*time.Second) // a connection that is idle since the start reports its statements after 10 s
	before := f.load()
	wait(t.Context(), s.span)
	rest := f.load().since(before)
	f.printLoad("at rest, default settings", rest)
	// A few more of each, since the intervals and the window do not begin together.
	edges, seconds := float64(len(f.edges)), rest.took.Seconds()
	if most := edges * (3 + seconds/reportEvery.Seconds()); float64(rest.writes) > most {
		t.Errorf("%d edges at rest made %d writes in %v, more than %.0f", len(f.edges), rest.writes, rest.took, most)
	}
	most := edges * (6 + seconds/s.refresh.Seconds() + seconds/reportEvery.Seconds() + seconds/pingEvery.Seconds())
	if float64(rest.statements) > most {
		t.Errorf("%d edges at rest made %d statements in %v, more than %.0f", len(f.edges), rest.statements, rest.took, most)
	}

	before = f.load()
	for range int(s.span / time.Second) {
		f.revoke(f.key().ID)
		<-tick.C
	}
	f.printLoad("one key made and revoked per second, default settings", f.load().since(before))
}

func TestRevocationReachesARequestWithAndWithoutListen(t *testing.T) {
	const refresh = time.Second
	atRest, inUse, without := 10, 30, 5
	if full() {
		atRest, inUse, without = 100, 1000, 100
	}
	f := newFleet(t, size{refresh: refresh, maxStaleness: 30 * time.Second}, undisturbed)
	conn, err := f.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	t.Log("| `listen` | pause before each | revocations | from | p50 | p99 | max |")
	t.Log("| --- | --- | --- | --- | --- | --- | --- |")
	for _, tc := range []struct {
		listen string
		pause  time.Duration // at most; chosen at random, or each would come right after a tick
		n      int
	}{{"on", refresh / 20, inUse}, {"on", refresh, atRest}, {"off", refresh, without}} {
		g := startGateway(t, f.database, f.backend.Address(), "listen "+tc.listen)
		var sinceSent, sinceCommit, statements []time.Duration
		for range tc.n {
			key := f.key()
			eventually.True(t, "the key works", func() bool { return g.ask(key).verdict == allowed })
			wait(t.Context(), rand.N(tc.pause))
			before := time.Now()
			if _, err := conn.Exec(t.Context(), "select 1"); err != nil {
				t.Fatal(err)
			}
			statements = append(statements, time.Since(before))
			wait(t.Context(), rand.N(tc.pause))
			refusal := make(chan time.Time, 1)
			go func() { refusal <- firstRefusal(t, g, key) }()
			sent, committed, _ := f.revoke(key.ID)
			refused := <-refusal
			sinceSent, sinceCommit = append(sinceSent, refused.Sub(sent)), append(sinceCommit, refused.Sub(committed))
		}
		row := func(from string, delays []time.Duration) {
			t.Logf("| %s | up to %v | %d | %s | %s |", tc.listen, tc.pause, tc.n, from, quantiles(delays))
		}
		row("the answer that it is committed", sinceCommit)
		row("the revoking statement", sinceSent)
		row("(`select 1` by itself)", statements)
	}
}

// firstRefusal asks each millisecond, and returns when the first refusal came. The CPUs of a virtual machine that is idle take
// milliseconds to wake up, each time that one process waits for another: that is not measured.
func firstRefusal(t *testing.T, g *gateway, key keyadmin.Key) time.Time {
	for deadline := time.Now().Add(time.Minute); ; {
		switch a := g.ask(key); {
		case a.verdict == revoked:
			return a.arrived
		case a.verdict != allowed:
			t.Errorf("a good key got %s", a.detail)
			return a.arrived
		case a.arrived.After(deadline):
			t.Error("a revoked key is not refused")
			return a.arrived
		}
		wait(t.Context(), time.Millisecond)
	}
}

// fleet is a Postgres and the edges on it.
type fleet struct {
	size
	t        *testing.T
	database string
	pool     *pgxpool.Pool
	store    *keystore.Store
	admin    *keyadmin.Admin
	backend  *devenv.Backend
	edges    []*edgeUnderTest

	mu     sync.Mutex
	delays map[group][]time.Duration // last allowed after commit, one for each edge and key
}

// group of edges that are counted together.
type group struct{ kind, fault string }

// edgeUnderTest is a gateway or a loop.
type edgeUnderTest struct {
	name, kind string
	fault      *fault // that it suffers from time to time; nil: none
	ask        func(keyadmin.Key) answer
}

// fault of an edge, which end undoes.
type fault struct {
	name       string
	begin, end func()
}

// Whether some of a fleet's edges suffer faults.
const (
	undisturbed = false
	disturbed   = true
)

func newFleet(t *testing.T, s size, disturbed bool) *fleet {
	t.Helper()
	f := &fleet{size: s, t: t, delays: make(map[group][]time.Duration)}
	f.database = startPostgres(t, s)
	pgtest.Migrate(t, f.database)
	var err error
	if f.pool, err = pgxpool.New(t.Context(), f.database); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.pool.Close)
	f.store = pgtest.Store(t, f.database)
	f.admin = keyadmin.New(f.store)
	f.backend = backendtest.Start(t, "production")
	var starts []func()
	for i := range s.gateways {
		starts = append(starts, func() { f.addGateway(i, disturbed) })
	}
	for i := range s.loops {
		starts = append(starts, func() { f.addLoop(i, disturbed) })
	}
	// Postgres notifies listeners in the order in which they came: no kind of edge may always be the first.
	rand.Shuffle(len(starts), func(i, j int) { starts[i], starts[j] = starts[j], starts[i] })
	for _, start := range starts {
		start()
	}
	return f
}

// startPostgres starts a server that has enough connections for a fleet.
func startPostgres(t *testing.T, s size) string {
	t.Helper()
	const (
		perGateway = 7 // the store's four, the listener and two for usage
		perLoop    = 3
		others     = 50 // among them those of killed edges, which Postgres has not noticed yet
	)
	connections := s.gateways*perGateway + s.loops*perLoop + others
	return pgtest.ServerWith(t, devenv.PostgresOptions{
		Settings: map[string]string{"max_connections": strconv.Itoa(connections)},
	}).URL()
}

// addGateway adds a gateway. Where there are to be faults, the first three get one each.
func (f *fleet) addGateway(i int, disturbed bool) {
	f.t.Helper()
	name, database := fmt.Sprintf("gateway-%d", i), f.database
	var cut *network.Link
	if disturbed && i == 2 {
		cut, database = network.To(f.t, database)
	}
	g := startGateway(f.t, database, f.backend.Address(), "edge "+name,
		"refresh "+f.refresh.String(), "max_staleness "+f.maxStaleness.String())
	e := &edgeUnderTest{name: name, kind: "gateway", ask: g.ask}
	switch {
	case !disturbed:
	case i == 0:
		e.fault = &fault{"killed", g.kill, g.start}
	case i == 1:
		e.fault = &fault{"paused", g.pause, g.resume}
	case i == 2:
		e.fault = cutOff(cut)
	}
	f.edges = append(f.edges, e)
}

// addLoop adds a loop. Where there are to be faults, every fourth is cut off from time to time.
func (f *fleet) addLoop(i int, disturbed bool) {
	f.t.Helper()
	e := &edgeUnderTest{name: fmt.Sprintf("loop-%d", i), kind: "loop"}
	database := f.database
	if disturbed && i%4 == 0 {
		var cut *network.Link
		cut, database = network.To(f.t, database)
		e.fault = cutOff(cut)
	}
	e.ask = startLoop(f.t, database, e.name, f.refresh, f.maxStaleness).ask
	f.edges = append(f.edges, e)
}

func cutOff(l *network.Link) *fault {
	return &fault{"cut off", func() {
		if rand.IntN(2) == 0 {
			l.Stall()
		} else {
			l.Refuse()
		}
	}, l.Resume}
}

func (f *fleet) key() keyadmin.Key {
	f.t.Helper()
	key, _, err := f.admin.Create(f.t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "fleet", Account: "acme", Environment: "production", Scopes: []string{"memories:read"},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return key
}

// disturb lets an edge suffer its fault at random, half of the time past the bound, until ctx is done.
func (f *fleet) disturb(ctx context.Context, e *edgeUnderTest) {
	for wait(ctx, rand.N(f.maxStaleness)) {
		e.fault.begin()
		wait(ctx, rand.N(2*f.maxStaleness))
		e.fault.end()
	}
}

// wait reports false if ctx ended it.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

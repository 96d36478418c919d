package ratelimit

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/redistest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/network"
)

// edgeUnderTest is a limiter, and what its store logs.
type edgeUnderTest struct {
	*Limiter
	log  *logBuffer
	stop func()
}

// awaitFailures waits until several more attempts have failed.
func (e *edgeUnderTest) awaitFailures(t *testing.T) {
	t.Helper()
	for attempt := range 3 {
		before := e.LastFailure()
		eventually.True(t, fmt.Sprintf("attempt %d fails", attempt+1), func() bool { return e.LastFailure() != before })
	}
}

type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) Sync() error { return nil }

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logBuffer) lines(containing string) int { return strings.Count(l.String(), containing) }

const (
	begins = "rate limit store does not answer"
	ends   = "rate limit store answers again"
)

// newShared returns a limiter that nobody runs, and what its store logs. A Redis that is slow because the machine is busy is no outage to it.
func newShared(t testing.TB, url string, edges int) (*Limiter, *logBuffer) {
	t.Helper()
	log := new(logBuffer)
	logger := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), log, zap.DebugLevel))
	l, err := NewShared(url, func() int { return edges }, func() *zap.Logger { return logger })
	if err != nil {
		t.Fatal(err)
	}
	l.store.patience = time.Minute
	return l, log
}

// startEdges returns so many edges on one Redis.
func startEdges(t testing.TB, url string, n int) []*edgeUnderTest {
	t.Helper()
	return startEdgesThatWait(t, time.Minute, url, n)
}

// startEdgesThatWait is for tests about a Redis that is slow.
func startEdgesThatWait(t testing.TB, patience time.Duration, url string, n int) []*edgeUnderTest {
	t.Helper()
	var edges []*edgeUnderTest
	for range n {
		l, log := newShared(t, url, n)
		l.store.patience = patience
		edges = append(edges, startEdge(t, l, log))
	}
	return edges
}

func startEdge(t testing.TB, l *Limiter, log *logBuffer) *edgeUnderTest {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { l.store.run(ctx) })
	stop := sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	t.Cleanup(stop)
	return &edgeUnderTest{l, log, stop}
}

func (e *edgeUnderTest) ask(d apikey.Digest, limit Limit) Verdict {
	b, v := e.Acquire(context.Background(), d, limit)
	if v.Allowed {
		b.Release()
	}
	return v
}

// hammer asks for more than the limit at all the edges for a while, and until enough was allowed however slow the machine is. It
// returns what was allowed and how long it took.
func hammer(t *testing.T, edges []*edgeUnderTest, d apikey.Digest, limit Limit, length time.Duration, enough int64) (allowed int64, took time.Duration) {
	t.Helper()
	var count atomic.Int64
	var clients sync.WaitGroup
	began := time.Now()
	for _, e := range edges {
		clients.Go(func() {
			for time.Since(began) < length || count.Load() < enough && time.Since(began) < 30*time.Second {
				if e.ask(d, limit).Allowed {
					count.Add(1)
				} else {
					<-time.After(time.Millisecond)
				}
			}
		})
	}
	clients.Wait()
	if allowed, took = count.Load(), time.Since(began); allowed < enough {
		t.Errorf("%d edges let only %d through in %s, want %d", len(edges), allowed, took, enough)
	}
	return allowed, took
}

// within is what a limit allows in a time, from a full bucket.
func within(limit Limit, length time.Duration) int64 {
	return limit.depth() + int64(length)/limit.interval() + 1
}

// tolerance is a twentieth of what a minute may hold.
func tolerance(limit Limit) int64 { return (int64(limit.PerMinute) + limit.depth()) / 20 }

var fast = Limit{PerMinute: 12_000, Burst: 4000} // 200 a second and 1,000 at once

func TestAKeysLimitHoldsAcrossEdgesAndIsReached(t *testing.T) {
	redis := redistest.Server(t, devenv.RedisOptions{})
	for _, n := range []int{1, 3, 5} {
		edges := startEdges(t, redis.URL(), n)
		allowed, took := hammer(t, edges, digest(n), fast, 3*time.Second, within(fast, 2*time.Second))
		if most := within(fast, took) + tolerance(fast); allowed > most {
			t.Errorf("%d edges let %d through in %s, want at most %d", n, allowed, took, most)
		}
		t.Logf("%d edges: %d allowed in %s, limit %d", n, allowed, took.Round(time.Millisecond), within(fast, took))
	}
}

func TestWhatAnEdgeDoesNotUseGoesToTheOthers(t *testing.T) {
	redis := redistest.Server(t, devenv.RedisOptions{})
	edges := startEdges(t, redis.URL(), 3)
	d, slow := digest(1), Limit{PerMinute: 60, Burst: 1015} // 1,000 at once, and hardly more
	for _, e := range edges {
		e.ask(d, slow)
	}
	allowed := int64(3)
	eventually.True(t, "one edge gets all that is left", func() bool {
		if edges[0].ask(d, slow).Allowed {
			allowed++
		}
		return allowed >= 950
	})
	eventually.True(t, "the others hold nothing", func() bool {
		return edges[1].bucket(d).lease.held.Load() == 0 && edges[2].bucket(d).lease.held.Load() == 0
	})
}

// TestALeaseIsNoBurstBesideTheBurst: what is leased has been paid for, and the bucket in Redis drains behind it.
func TestALeaseIsNoBurstBesideTheBurst(t *testing.T) {
	redis := redistest.Server(t, devenv.RedisOptions{})
	client := connect(t, redis.URL())
	limit := Limit{PerMinute: 1, Burst: 1000} // 1,000 at once, and hardly more
	for _, n := range []int{1, 3, 5} {
		var stores []*store
		var buckets []*Bucket
		for range n {
			l, _ := newShared(t, redis.URL(), n)
			stores, buckets = append(stores, l.store), append(buckets, l.bucket(digest(n)))
			l.store.probe(t.Context())
		}
		take := func(edge int) Verdict {
			v, _ := stores[edge].take(buckets[edge], limit, stores[edge].now())
			settle(t, stores[edge])
			return v
		}
		for range 3 { // of light use
			for edge := range n {
				take(edge)
				buckets[edge].lease.at -= int64(time.Minute) // that long ago,
			}
			client.Del(t.Context(), buckets[0].lease.key) // so that the bucket has drained
		}
		allowed := int64(0)
		for edge := range n {
			for v := take(edge); v.Allowed || v.Remaining > 0; v = take(edge) {
				if v.Allowed {
					allowed++
				}
			}
		}
		if most := limit.depth() + tolerance(limit); allowed < limit.depth() || allowed > most {
			t.Errorf("%d edges let a burst of %d through, want from %d to %d", n, allowed, limit.depth(), most)
		}
	}
}

func TestAnEdgeThatEndsGivesBackWhatItHolds(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	edges := startEdges(t, server.URL(), 2)
	d, slow := digest(1), Limit{PerMinute: 1, Burst: 1000}
	edges[0].ask(d, slow)
	eventually.True(t, "it holds a lease", func() bool { return edges[0].bucket(d).lease.held.Load() > 5 })
	edges[0].stop()
	client := connect(t, server.URL())
	spent := func() int64 {
		return int64(stored(t, client, edges[0].bucket(d)) / time.Duration(slow.interval()))
	}
	if n := spent(); n > 2 {
		t.Errorf("%d are spent, want 1", n)
	}
	if err := edges[0].store.client.Ping(t.Context()).Err(); !errors.Is(err, redis.ErrClosed) {
		t.Errorf("its connections are open: %v", err)
	}
}

// TestAnEdgeThatEndsTellsWhatItLetThroughAheadOfRedis: the next one would have the bucket whole.
func TestAnEdgeThatEndsTellsWhatItLetThroughAheadOfRedis(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	l, _ := newShared(t, server.URL(), 1)
	eventually.True(t, "Redis answers in time", func() bool {
		l.store.probe(t.Context())
		return !l.Status().Fallback
	})
	limit := Limit{PerMinute: 1, Burst: 4000}
	const ahead = 50
	b := l.bucket(digest(1))
	for range ahead {
		l.Acquire(t.Context(), digest(1), limit)
	}
	if held := b.lease.held.Load(); held != -ahead {
		t.Fatalf("it holds %d: the test shows nothing", held)
	}
	l.store.giveAllBack(t.Context())
	if n := int64(stored(t, connect(t, server.URL()), b) / time.Duration(limit.interval())); n < ahead-1 {
		t.Errorf("%d are spent, want %d", n, ahead)
	}
}

// TestAnOutageBeginsWithWhatThisEdgesPartOfTheLimitRemembers: an edge that loses Redis has let requests through already.
func TestAnOutageBeginsWithWhatThisEdgesPartOfTheLimitRemembers(t *testing.T) {
	l, _ := newShared(t, "redis://127.0.0.1:1", 1)
	limit := Limit{PerMinute: 1, Burst: 4000}
	const before = 50
	for range before {
		l.Acquire(t.Context(), digest(1), limit)
	}
	l.store.fall(errSlow)
	allowed := int64(0)
	for ; allowed < limit.depth(); allowed++ {
		if _, v := l.Acquire(t.Context(), digest(1), limit); !v.Allowed {
			break
		}
	}
	if want := limit.depth() - before; allowed > want+1 {
		t.Errorf("%d pass in the outage, want %d", allowed, want)
	}
}

// TestBucketWhoseLeaseIsNotOverIsNotGivenBack: what it holds or owes would be nobody's.
func TestBucketWhoseLeaseIsNotOverIsNotGivenBack(t *testing.T) {
	l, _ := newShared(t, "redis://127.0.0.1:1", 1)
	for what, change := range map[string]func(*lease){
		"it holds requests": func(l *lease) { l.held.Store(1) },
		"it owes requests":  func(l *lease) { l.held.Store(-1) },
		"it is followed":    func(l *lease) { l.low.Store(0) },
		"it asks":           func(l *lease) { l.asked.Store(true) },
	} {
		b := l.bucket(apikey.Hash(what))
		change(b.lease)
		if b.giveBack(1) {
			t.Errorf("%s, and is given back", what)
		}
	}
	if !l.bucket(digest(1)).giveBack(1) {
		t.Error("one that is over is not given back")
	}
}

// stored is how long a bucket in Redis takes to drain; below 0: it has drained.
func stored(t *testing.T, client *redis.Client, b *Bucket) time.Duration {
	t.Helper()
	number, _, _ := strings.Cut(client.Get(t.Context(), b.lease.key).Val(), " ")
	empty, _ := strconv.ParseFloat(cmp.Or(number, "0"), 64)
	return time.Until(time.UnixMicro(int64(empty)))
}

func connect(t testing.TB, url string) *redis.Client {
	t.Helper()
	options, err := redis.ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	client := redis.NewClient(options)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// settle exchanges all leases in use. Nobody else runs the store.
func settle(t *testing.T, s *store) {
	t.Helper()
	s.follow()
	for _, l := range s.followed {
		l.due = 0
	}
	if !s.settle(t.Context(), s.followed) {
		t.Fatal("no answer of Redis")
	}
}

func TestEdgesThatShareTellWhatIsLeftAsOneAloneDoes(t *testing.T) {
	redis := redistest.Server(t, devenv.RedisOptions{})
	for _, edges := range []int{1, 3} {
		l, _ := newShared(t, redis.URL(), edges)
		store, limit := l.store, Limit{PerMinute: 1, Burst: 100, Concurrent: 1} // nothing refills within a minute
		b := l.bucket(digest(edges))
		store.probe(t.Context())
		depth, now := int(limit.depth()), func() int64 { return int64(time.Since(store.start)) }
		want := func(what string, v Verdict, remaining int) {
			t.Helper()
			if v.Remaining != remaining || v.ResetAfter != time.Duration(depth-remaining)*time.Minute {
				t.Errorf("%d edges, %s: %d remain and all in %s, want %d", edges, what, v.Remaining, v.ResetAfter, remaining)
			}
		}
		for i := range depth {
			v, _ := store.take(b, limit, now())
			want(fmt.Sprintf("request %d", i+1), v, depth-1-i)
			want(fmt.Sprintf("one too many at a time after %d", i+1), l.tooMany(b, limit, now()), depth-1-i)
			settle(t, store)
		}
		if v, _ := store.take(b, limit, now()); v.Allowed || v.Remaining != 0 {
			t.Errorf("%d edges: beyond the limit %+v", edges, v)
		}
		settle(t, store)
		later := b.lease.next.Load() + 20*limit.interval() // with the one that came then
		want("one too many at a time, 20 minutes later", l.tooMany(b, limit, later), 21)
		v, _ := store.take(b, limit, later)
		want("20 minutes later", v, 20)
		want("one too many at a time, a day later", l.tooMany(b, limit, later+int64(24*time.Hour)), depth)
	}
}

func TestNobodyWaitsLongerAfterAChangeOfSharedLimitsThanTheNewOnesTakeToRefill(t *testing.T) {
	redis := redistest.Server(t, devenv.RedisOptions{})
	before, after := Limit{PerMinute: 1, Burst: 100}, Limit{PerMinute: 60, Burst: 90}
	for _, edges := range []int64{1, 3} {
		l, _ := newShared(t, redis.URL(), int(edges))
		store, b := l.store, l.bucket(digest(int(edges)))
		store.probe(t.Context())
		now := func() int64 { return int64(time.Since(store.start)) }
		for allowed := true; allowed; settle(t, store) {
			v, _ := store.take(b, before, now())
			allowed = v.Allowed
		}
		// An edge that has not seen the key may be the first to come with the new limits. It keeps what others may have run ahead by.
		second, _ := newShared(t, redis.URL(), int(edges))
		other, otherBucket := second.store, second.bucket(digest(int(edges)))
		other.probe(t.Context())
		other.take(otherBucket, after, other.now())
		settle(t, other)
		if wait := otherBucket.lease.next.Load() - other.now(); wait > (2+tolerance(after))*after.interval() {
			t.Errorf("%d edges: an edge that is new to the key waits for %s", edges, time.Duration(wait))
		}
		store.take(b, after, now())
		settle(t, store)
		if wait := b.lease.next.Load() - now(); wait > after.interval() {
			t.Errorf("%d edges: Redis has a request in %s, want %d at most", edges, time.Duration(wait), after.interval())
		}
		interval, depth := after.share(edges)
		if n := b.lease.outstanding(edges, now()); n > depth {
			t.Errorf("%d edges: Redis would be told of %d after an outage, want %d at most", edges, n, depth)
		}
		store.fallback.Store(true)
		if v, _ := store.take(b, after, now()); int64(v.RetryAfter) > interval || int64(v.ResetAfter) > depth*interval {
			t.Errorf("%d edges: without Redis %+v", edges, v)
		}
	}
}

// TestAKeyWithAWholeBucketIsNotRefusedForWhatThisEdgeHasNotLeasedYet: Redis has the whole burst, and has only to be asked.
func TestAKeyWithAWholeBucketIsNotRefusedForWhatThisEdgeHasNotLeasedYet(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	for name, tc := range map[string]struct {
		limit  Limit
		atOnce int
	}{
		"sandbox": {Limit{PerMinute: 50, Burst: 75, Concurrent: 2}, 2},
		"free":    {Limit{PerMinute: 100, Burst: 150, Concurrent: 5}, 5},
		"custom":  {Limit{PerMinute: 600, Burst: 900}, 200},
	} {
		t.Run(name, func(t *testing.T) {
			edges := startEdges(t, server.URL(), 3)
			for key := range 10 {
				d := apikey.Hash(fmt.Sprint(name, key))
				var clients sync.WaitGroup
				for range tc.atOnce {
					clients.Go(func() {
						b, v := edges[0].Acquire(t.Context(), d, tc.limit)
						if !v.Allowed {
							t.Errorf("key %d: %+v", key, v)
							return
						}
						b.Release()
					})
				}
				clients.Wait()
			}
		})
	}
}

// TestWhatRemainsIsNotTakenForNothingWhileTheFirstAnswerIsBooked: a key that has its whole burst would be refused.
func TestWhatRemainsIsNotTakenForNothingWhileTheFirstAnswerIsBooked(t *testing.T) {
	l, _ := newShared(t, "redis://127.0.0.1:1", 3)
	limit := Limit{PerMinute: 100, Burst: 150}
	for range 20_000 {
		b := newLease(l.store, digest(1), nil)
		b.minute.Store(int64(limit.PerMinute))
		b.depth.Store(limit.depth())
		looking := make(chan struct{})
		var booking sync.WaitGroup
		booking.Go(func() {
			<-looking
			_ = l.store.book(settlement{lease: b, want: 1, answer: redis.NewCmdResult([]any{int64(1), limit.depth() - 1, int64(0)}, nil)})
		})
		close(looking)
		for range 50 {
			if left := b.remaining(limit, -1, l.store.now()); left <= 0 {
				t.Fatalf("%d requests remain", left)
			}
		}
		booking.Wait()
	}
}

// TestARequestWaitsForAnExchangeNoLongerThanItsClientDoes: and no longer than patience, if nobody answers.
func TestARequestWaitsForAnExchangeNoLongerThanItsClientDoes(t *testing.T) {
	l, _ := newShared(t, "redis://127.0.0.1:1", 3)
	l.store.patience = patience
	limit := Limit{PerMinute: 50, Burst: 75}
	gone, leave := context.WithCancel(t.Context())
	leave()
	eventually.True(t, "an exchange would have to be waited for", func() bool {
		_, v := l.Acquire(gone, digest(1), limit)
		return !v.Allowed
	})
	_, share := limit.share(3)
	for i := range share {
		if _, v := l.Acquire(t.Context(), digest(2), limit); !v.Allowed {
			t.Errorf("request %d of this edge's part of %d: %+v", i, share, v)
		}
	}
}

func TestARequestThatWaitsForAnExchangeLooksAgainWhenThatIsOver(t *testing.T) {
	l, _ := newShared(t, redistest.Server(t, devenv.RedisOptions{}).URL(), 1)
	l.store.probe(t.Context())
	b, _ := l.Acquire(t.Context(), digest(1), tiers[0])
	exchanged := b.lease.nextExchange()
	l.store.settle(t.Context(), l.store.follow())
	select {
	case <-exchanged:
	default:
		t.Error("it waits on")
	}
}

func TestNoRequestCallsRedis(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	l, _ := newShared(t, server.URL(), 3)
	for i := range 10_000 {
		if b, v := l.Acquire(t.Context(), digest(i%100), fast); v.Allowed {
			b.Release()
		}
	}
	info, err := connect(t, server.URL()).Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(info, "eval") || strings.Contains(info, "cmdstat_get") {
		t.Errorf("Redis was asked:\n%s", info)
	}
	if n := l.store.client.PoolStats().TotalConns; n != 0 {
		t.Errorf("%d connections, want none", n)
	}
}

// TestEachKeyIsSettledOnceHoweverManyThereAre: what is settled twice is paid for twice.
func TestEachKeyIsSettledOnceHoweverManyThereAre(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	l, _ := newShared(t, server.URL(), 1)
	client := connect(t, server.URL())
	calls := regexp.MustCompile(`cmdstat_evalsha:calls=(\d+)`)
	settlements := func() int {
		info, err := client.Info(t.Context(), "commandstats").Result()
		if err != nil {
			t.Fatal(err)
		}
		match := calls.FindStringSubmatch(info)
		if match == nil {
			return 0
		}
		n, _ := strconv.Atoi(match[1]) // digits
		return n
	}
	l.store.probe(t.Context())
	asked := 0
	for _, keys := range []int{1, 2*maxBatch + 1} { // after the first, Redis has the script
		before := settlements()
		for range keys {
			l.Acquire(t.Context(), digest(asked), tiers[0])
			asked++
		}
		l.store.settle(t.Context(), l.store.follow())
		if n := settlements() - before; keys > 1 && n != keys {
			t.Errorf("%d settlements of %d keys", n, keys)
		}
	}
}

func TestRedisIsAskedFarLessOftenThanAKeyThatIsOverItsLimit(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	e := startEdges(t, server.URL(), 1)[0]
	d, limit := digest(1), Limit{PerMinute: 1}
	eventually.True(t, "it is over its limit", func() bool { return !e.ask(d, limit).Allowed })
	for range 100_000 {
		e.ask(d, limit)
	}
	if n := e.Status().Exchanges; n > 1000 {
		t.Errorf("Redis was asked %d times in 100,000 requests", n)
	}
}

func TestWithoutRedisEachEdgeAllowsItsPartAndSaysSoOnce(t *testing.T) {
	for name, fault := range map[string]struct{ begin, end func(*devenv.Redis) error }{
		"paused": {
			func(r *devenv.Redis) error { r.Pause(); return nil },
			func(r *devenv.Redis) error { r.Resume(); return nil },
		},
		"killed and restarted empty": {
			func(r *devenv.Redis) error { r.Kill(); return nil },
			func(r *devenv.Redis) error { return r.Restart(context.Background()) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := redistest.Server(t, devenv.RedisOptions{})
			edges := startEdgesThatWait(t, patience, server.URL(), 3)
			d := digest(1)
			began := time.Now()
			before, _ := hammer(t, edges, d, fast, time.Second, 0)
			if err := fault.begin(server); err != nil {
				t.Fatal(err)
			}
			each := func(what string, condition func(*edgeUnderTest) bool) {
				t.Helper()
				for _, e := range edges {
					eventually.True(t, what, func() bool { return condition(e) })
				}
			}
			each("the fallback begins", func(e *edgeUnderTest) bool { return e.Status().Fallback })
			fallback := time.Now()
			during, took := hammer(t, edges[:1], d, fast, 2*time.Second, int64(time.Second)/fast.interval()/3)
			// What that edge's part has gathered since, and at the rate of its part from then on.
			if most := within(fast, time.Since(fallback)+time.Second)/3 + tolerance(fast); during > most {
				t.Errorf("one of three edges let %d through in %s, want its part, at most %d", during, took, most)
			}
			others, _ := hammer(t, edges[1:], d, fast, time.Second, 0)
			if err := fault.end(server); err != nil {
				t.Fatal(err)
			}
			each("the fallback ends", func(e *edgeUnderTest) bool { return !e.Status().Fallback })
			after, _ := hammer(t, edges, d, fast, time.Second, 0)
			if most := within(fast, time.Since(began)) + 2*tolerance(fast); before+during+others+after > most {
				t.Errorf("%d + %d + %d + %d were let through in %s, want at most %d",
					before, during, others, after, time.Since(began), most)
			}
			t.Logf("%d + %d + %d + %d in %s, limit %d", before, during, others, after, time.Since(began).Round(time.Millisecond), within(fast, time.Since(began)))
		})
	}
}

func TestAnEdgeGoesOnWithoutARedisThatHangsBeforeItsProbeIsOver(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	server.Pause()
	t.Cleanup(server.Resume)
	e := startEdgesThatWait(t, patience, server.URL(), 1)[0] // with nothing to exchange
	eventually.True(t, "the fallback begins", func() bool { return e.log.lines(begins) == 1 })
	if e.log.lines(errSlow.Error()) != 1 {
		t.Errorf("it began for another reason:\n%s", e.log)
	}
}

// TestWhatAnEdgesPartOfTheLimitHasForgottenOfAnOutageIsNotCharged: it was nobody else's, and the key would be refused for it by all edges.
func TestWhatAnEdgesPartOfTheLimitHasForgottenOfAnOutageIsNotCharged(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	l, log := newShared(t, server.URL(), 3)
	e, d, limit := &edgeUnderTest{Limiter: l, log: log}, digest(1), Limit{PerMinute: 6, Burst: 76}
	l.store.probe(t.Context())
	e.ask(d, limit)
	settle(t, l.store)
	b, client := l.bucket(d), connect(t, server.URL())
	before := client.Get(t.Context(), b.lease.key).Val()
	l.store.fall(errSlow)
	for range limit.depth()/3 - 1 {
		if !e.ask(d, limit).Allowed {
			t.Fatal("refused within this edge's part")
		}
	}
	b.emptyAt.Store(0) // after a long outage
	l.store.probe(t.Context())
	if held := b.lease.held.Load(); l.Status().Fallback || held != 0 {
		t.Fatalf("%d requests are held, want that none is owed after the outage:\n%s", held, log)
	}
	if after := client.Get(t.Context(), b.lease.key).Val(); before == "" || after != before {
		t.Errorf("the bucket in Redis is empty at %s, want %q", after, before)
	}
}

func TestARedisThatIsEmptiedGivesNoKeyItsBurstAgain(t *testing.T) {
	limit := Limit{PerMinute: 6, Burst: 76} // 75 at once, and hardly more
	const olderData = "restarted with what it had saved before"
	restart := func(server *devenv.Redis, _ func() bool) error { return server.Restart(t.Context()) }
	for name, fault := range map[string]func(server *devenv.Redis, told func() bool) error{
		"restarted": restart, olderData: restart,
		"restarted again before the edges trust it": func(server *devenv.Redis, told func() bool) error {
			if err := server.Restart(t.Context()); err != nil {
				return err
			}
			eventually.True(t, "it is told what was let through", told)
			return server.Restart(t.Context())
		},
		"flushed while it is in use": func(server *devenv.Redis, _ func() bool) error {
			return connect(t, server.URL()).FlushAll(t.Context()).Err()
		},
	} {
		t.Run(name, func(t *testing.T) {
			var options devenv.RedisOptions
			if name == olderData {
				options.Dir = t.TempDir()
			}
			server := redistest.Server(t, options)
			edges := startEdges(t, server.URL(), 3)
			d := digest(1)
			use := func() (allowed int64) { // in turns: an edge remembers no more than its part of the burst
				for refused, i := 0, 0; refused < 30; i++ {
					if refused++; edges[i%3].ask(d, limit).Allowed {
						allowed++
						refused = 0
						continue
					}
					<-time.After(10 * time.Millisecond)
				}
				return allowed
			}
			client := connect(t, server.URL())
			told := func() bool { // by all edges
				return float64(stored(t, client, edges[0].bucket(d))) > 0.7*float64(limit.depth()*limit.interval())
			}
			probes := func() int64 {
				n, _ := client.HGet(t.Context(), dataKey, "probes").Int64()
				return n
			}
			eventually.True(t, "the edges probe", func() bool { return probes() > 0 })
			saved := probes()
			if name == olderData {
				if err := client.Save(t.Context()).Err(); err != nil {
					t.Fatal(err)
				}
			}
			before := use()
			eventually.True(t, "each edge has probed since", func() bool { return probes() > saved+3 })
			if err := fault(server, told); err != nil {
				t.Fatal(err)
			}
			after := use()
			eventually.True(t, "it is told what was let through", told)
			for _, e := range edges {
				eventually.True(t, "the fallback ends", func() bool { return e.Status().Outages > 0 && !e.Status().Fallback })
			}
			after += use()
			// How evenly the edges shared the burst is chance, and each remembers its part of it at most. A burst again would be all of it.
			if most := limit.depth() / 2; before < limit.depth() || after > most {
				t.Errorf("%d were let through before and %d after, want at least %d and at most %d", before, after, limit.depth(), most)
			}
		})
	}
}

// TestWhatRedisHadSavedIsNotCountedTwice: it is told of it as well.
func TestWhatRedisHadSavedIsNotCountedTwice(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{Dir: t.TempDir()})
	client, limit, d := connect(t, server.URL()), Limit{PerMinute: 6, Burst: 76}, digest(1)
	l, log := newShared(t, server.URL(), 1)
	e := &edgeUnderTest{Limiter: l, log: log}
	l.store.probe(t.Context())
	for e.ask(d, limit).Allowed {
		settle(t, l.store)
	}
	if err := client.Save(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	l.store.probe(t.Context())
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "the fallback ends", func() bool {
		l.store.probe(t.Context())
		return l.Status().Outages > 0 && !l.Status().Fallback
	})
	full := time.Duration(limit.depth() * limit.interval())
	if debt := stored(t, client, l.bucket(d)); debt < full*9/10 || debt > full {
		t.Errorf("the bucket drains in %s, want %s at most, and hardly less", debt, full)
	}
}

// TestAnEdgeThatIsNewDoesNotHideFromTheOthersThatRedisHasOlderData, though it has nothing to tell and may be the first to come.
func TestAnEdgeThatIsNewDoesNotHideFromTheOthersThatRedisHasOlderData(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{Dir: t.TempDir()})
	edge, _ := newShared(t, server.URL(), 2)
	edge.store.probe(t.Context())
	if err := connect(t, server.URL()).Save(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	edge.store.probe(t.Context())
	before := edge.store.data
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	other, _ := newShared(t, server.URL(), 2)
	other.store.probe(t.Context())
	eventually.True(t, "the fallback ends", func() bool {
		edge.store.probe(t.Context())
		return edge.Status().Outages > 0 && !edge.Status().Fallback
	})
	if other.store.data != before || edge.store.data == before {
		t.Errorf("the data is %q to the edge that knew it as %q, and %q to the new one", edge.store.data, before, other.store.data)
	}
}

// TestNameThatNoEdgeGaveTheDataIsReplacedAndLiftsNoLimit plays somebody who has, or had, Redis's password.
func TestNameThatNoEdgeGaveTheDataIsReplacedAndLiftsNoLimit(t *testing.T) {
	const edges = 2
	limit, d := Limit{PerMinute: 6, Burst: 76}, digest(1)
	for what, name := range map[string]string{
		"a space":                        "x y",
		"a space, and as long as a name": strings.Repeat("x ", 13),
		"megabytes":                      strings.Repeat("A", 8<<20),
		"empty":                          "",
	} {
		t.Run(what, func(t *testing.T) {
			server := redistest.Server(t, devenv.RedisOptions{})
			client := connect(t, server.URL())
			var all [edges]*edgeUnderTest
			for i := range all {
				l, log := newShared(t, server.URL(), edges)
				all[i] = &edgeUnderTest{Limiter: l, log: log}
				l.store.probe(t.Context())
			}
			use := func() (allowed int64) { // in turns: an edge remembers no more than its part of the burst
				for range limit.depth() {
					for _, e := range all {
						if e.ask(d, limit).Allowed {
							allowed++
						}
						settle(t, e.store)
					}
				}
				return allowed
			}
			use()
			sent := func() int64 {
				_, text, _ := strings.Cut(client.Info(t.Context(), "stats").Val(), "total_net_output_bytes:")
				text, _, _ = strings.Cut(text, "\r")
				n, err := strconv.ParseInt(text, 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
			before := sent()
			if err := client.HSet(t.Context(), dataKey, "name", name).Err(); err != nil {
				t.Fatal(err)
			}
			probe := func() {
				var probing sync.WaitGroup
				for _, e := range all {
					probing.Go(func() { e.store.probe(t.Context()) })
				}
				probing.Wait()
			}
			probe()
			misnamed := 0
			for i, e := range all {
				if !e.Status().Fallback || e.log.lines(begins) != 1 {
					t.Errorf("edge %d does not go on by its part of the limits, or does not say so once:\n%s", i, e.log)
				}
				misnamed += e.log.lines("FOREIGN the data of redis is not what edges write")
			}
			if name != "" && misnamed != 1 {
				t.Errorf("%d edges say that the name is nobody's, want the one that replaces it", misnamed)
			}
			eventually.True(t, "the fallback ends", func() bool {
				probe()
				return !all[0].Status().Fallback && !all[1].Status().Fallback
			})
			if n := sent() - before; n > 1<<20 {
				t.Errorf("Redis has sent %d bytes, want that the name is not read", n)
			}
			if one, other := all[0].store.data, all[1].store.data; one == name || one != other || one != client.HGet(t.Context(), dataKey, "name").Val() {
				t.Errorf("the data is %.40q to one edge, and %.40q to the other", one, other)
			}
			if n := use(); n > limit.depth()/2 {
				t.Errorf("%d more requests were let through, of a key that has had its burst of %d", n, limit.depth())
			}
		})
	}
}

// TestWhatSomebodyHasWrittenIntoRedisIsReplaced plays one who has, or had, Redis's password: nobody need remove it by hand.
func TestWhatSomebodyHasWrittenIntoRedisIsReplaced(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	client := connect(t, server.URL())
	var edges [2]*edgeUnderTest
	for i := range edges {
		l, log := newShared(t, server.URL(), len(edges))
		edges[i] = &edgeUnderTest{Limiter: l, log: log}
		l.store.probe(t.Context())
	}
	limit, d := Limit{PerMinute: 6, Burst: 76}, digest(1)
	for range 4 {
		edges[0].ask(d, limit)
		settle(t, edges[0].store)
	}
	for _, e := range edges { // what they ask for waits in vain: nobody exchanges meanwhile
		e.store.patience = patience
	}
	bucket, _ := edges[0].Acquire(t.Context(), d, limit)
	for _, write := range [][]any{
		{"hset", dataKey, "probes", "x"},
		{"hset", dataKey, "probes", ""},
		{"hset", dataKey, "probes", "007"},
		{"hset", dataKey, "probes", "-1"},
		{"hset", dataKey, "probes", "nan"},
		{"hset", dataKey, "probes", "9223372036854775807"},
		{"hset", dataKey, "probes", strings.Repeat("1", 8<<20)},
		{"set", dataKey, "x"},
		{"rpush", dataKey, "x"},
		{"hset", bucket.lease.key, "x", "y"},
		{"rpush", bucket.lease.key, "x"},
		{"set", bucket.lease.key, "nan " + edges[0].store.data},
		{"set", bucket.lease.key, "1e308 " + edges[0].store.data},
	} {
		if write[0] != "hset" || write[1] != dataKey {
			client.Del(t.Context(), write[1].(string))
		}
		if err := client.Do(t.Context(), write...).Err(); err != nil {
			t.Fatal(err)
		}
		eventually.True(t, fmt.Sprintf("Redis is shared through after %.60q", write), func() bool {
			for _, e := range edges {
				e.ask(d, limit)
				e.store.probe(t.Context())
				e.store.follow()
				for _, l := range e.store.followed {
					l.due = 0
				}
				if e.store.settle(t.Context(), e.store.followed); e.Status().Fallback {
					return false
				}
			}
			return edges[0].store.data == edges[1].store.data
		})
	}
}

// answers is a Redis that somebody else runs: it says to each script what it likes.
func answers(t *testing.T, probe, exchange string) (url string) {
	t.Helper()
	return "redis://" + network.Serve(t, func(conn net.Conn) {
		commands := bufio.NewReader(conn)
		for {
			command, err := readCommand(commands)
			if err != nil {
				return
			}
			answer := "-ERR unknown command\r\n"
			switch {
			case len(command) > 1 && command[1] == probeScript.Hash():
				answer = probe
			case len(command) > 1 && command[1] == exchangeScript.Hash():
				answer = exchange
			}
			if _, err := conn.Write([]byte(answer)); err != nil {
				return
			}
		}
	})
}

func readCommand(r *bufio.Reader) (command []string, err error) {
	var n int
	if _, err := fmt.Fscanf(r, "*%d\r\n", &n); err != nil {
		return nil, err
	}
	for range n {
		var size int
		if _, err := fmt.Fscanf(r, "$%d\r\n", &size); err != nil {
			return nil, err
		}
		text := make([]byte, size+2)
		if _, err := io.ReadFull(r, text); err != nil {
			return nil, err
		}
		command = append(command, string(text[:size]))
	}
	return command, nil
}

func TestAnswersThatNoScriptGivesAreAnOutage(t *testing.T) {
	const (
		name  = "$26\r\nABCDEFGHIJKLMNOPQRSTUVWXYZ\r\n"
		probe = "*2\r\n" + name + ":1\r\n"
		good  = "*3\r\n:1\r\n:2\r\n:0\r\n"
	)
	limit := Limit{PerMinute: 6, Burst: 76}
	part := limit.depth() / 2
	for what, of := range map[string]struct{ probe, exchange string }{
		"an empty probe":                   {"*0\r\n", good},
		"a probe of one":                   {"*1\r\n" + name, good},
		"a probe of three":                 {"*3\r\n" + name + ":1\r\n:1\r\n", good},
		"no name":                          {"*2\r\n$-1\r\n:1\r\n", good},
		"an empty name":                    {"*2\r\n$0\r\n\r\n:1\r\n", good},
		"a number as name":                 {"*2\r\n:1\r\n:1\r\n", good},
		"no number of probes":              {"*2\r\n" + name + name, good},
		"a number as probe":                {":1\r\n", good},
		"a text without end":               {"$99999999999\r\n", good},
		"a text of all numbers":            {"$9223372036854775807\r\n", good},
		"a list without end":               {"*99999999999\r\n", good},
		"a map without end":                {"%99999999999\r\n", good},
		"a set without end":                {"~99999999999\r\n", good},
		"lists in lists without end":       {strings.Repeat("*1\r\n", 1<<20), good},
		"lists after texts without end":    {strings.Repeat("*2\r\n:1\r\n", 1<<20), good},
		"an error without end":             {"-" + strings.Repeat("E", 64<<20), good},
		"a text without end in a list":     {"*2\r\n" + name + "$99999999999\r\n", good},
		"what hides behind minus nothing":  {"*2\r\n$-0\r\n+a*9223372036854775807\r\n", good},
		"what hides behind plus nothing":   {"*2\r\n$+0\r\n+a*9223372036854775807\r\n", good},
		"what hides behind a lone newline": {"*2\n$0\n+a*9223372036854775807\r\n", good},
		"attributes without end":           {strings.Repeat("|1\r\n", 1<<20), good},
		"attributes in lists without end":  {"*1\r\n" + strings.Repeat("|1\r\n:1\r\n:1\r\n", 1<<20), good},
		"an error of any length":           {"!9223372036854775806\r\n", good},
		"news without end":                 {">99999999999\r\n+x\r\n", good},
		"an exchange without end":          {probe, "*99999999999\r\n"},
		"a cluster's word on the probe":    {"-MOVED 1 127.0.0.1:1\r\n", good},
		"an exchange of nothing":           {probe, "*0\r\n"},
		"an exchange of two":               {probe, "*2\r\n:1\r\n:2\r\n"},
		"an exchange of texts":             {probe, "*3\r\n$3\r\nnan\r\n$3\r\ninf\r\n$1\r\n0\r\n"},
		"more leased than was asked for":   {probe, "*3\r\n:1000000\r\n:2\r\n:0\r\n"},
		"less than nothing leased":         {probe, "*3\r\n:-9000000000000000000\r\n:2\r\n:0\r\n"},
		"less than nothing left":           {probe, "*3\r\n:0\r\n:-9000000000000000000\r\n:0\r\n"},
		"more left than there is":          {probe, "*3\r\n:0\r\n:9000000000000000000\r\n:0\r\n"},
		"a wait that is over":              {probe, "*3\r\n:0\r\n:0\r\n:-1\r\n"},
		"a wait for ever":                  {probe, "*3\r\n:0\r\n:0\r\n:9000000000000000000\r\n"},
		"a cluster's word on the exchange": {probe, "-MOVED 1 127.0.0.1:1\r\n"},
	} {
		t.Run(what, func(t *testing.T) {
			l, log := newShared(t, answers(t, of.probe, of.exchange), 2)
			e, d := &edgeUnderTest{Limiter: l, log: log}, digest(1)
			l.store.probe(t.Context())
			e.ask(d, limit)
			l.store.follow()
			l.store.settle(t.Context(), l.store.followed)
			if !l.Status().Fallback || log.lines(begins) != 1 {
				t.Fatalf("this edge does not go on by its part of the limits, or does not say so once:\n%s", log)
			}
			l.store.probe(t.Context())
			if l.store.epoch.Load() > 2 {
				t.Errorf("%d outages", l.store.epoch.Load())
			}
			allowed := int64(1)
			for range 2 * limit.depth() {
				if e.ask(d, limit).Allowed {
					allowed++
				}
			}
			if allowed > part+1 || allowed < part {
				t.Errorf("%d requests were let through, want its part, %d", allowed, part)
			}
		})
	}
}

func TestAnOutageOfHoursDoesNotPassForARedisThatWasEmptied(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	l, _ := newShared(t, server.URL(), 1)
	const outage = 12 * time.Hour
	client := connect(t, server.URL())
	for range 2 { // the first names the data, each prolongs it
		l.store.probe(t.Context())
		if left := client.PTTL(t.Context(), dataKey).Val(); left < outage {
			t.Errorf("the name of the data is forgotten after %s without an edge", left)
		}
		client.PExpire(t.Context(), dataKey, time.Minute)
	}
}

// TestAnEdgeGoesOnWithoutARedisThatHangsBeforeAnExchangeIsOver: a request must not wait for all of exchangeTimeout.
func TestAnEdgeGoesOnWithoutARedisThatHangsBeforeAnExchangeIsOver(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	l, log := newShared(t, server.URL(), 1)
	l.store.probe(t.Context())
	l.store.patience = patience
	server.Pause()
	t.Cleanup(server.Resume)
	l.Acquire(t.Context(), digest(1), tiers[0])
	if l.store.settle(t.Context(), l.store.follow()) || log.lines(errSlow.Error()) != 1 {
		t.Errorf("it began for another reason, or did not:\n%s", log)
	}
}

func TestAnOutageIsLoggedOnceWhenItBeginsAndOnceWhenItEnds(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	e := startEdges(t, server.URL(), 1)[0]
	eventually.True(t, "it is connected", func() bool { return e.store.connected.Load() })
	server.Kill()
	e.awaitFailures(t)
	if n := e.log.lines(begins); n != 1 {
		t.Errorf("%d lines when it begins, want 1:\n%s", n, e.log)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "the fallback ends", func() bool { return !e.Status().Fallback })
	eventually.True(t, "the line is written", func() bool { return e.log.lines(ends) == 1 })
}

// TestCauseOfAnOutageIsLoggedThoughALessTellingErrorCameBefore plays administrators who give Redis a password that the edge has not.
func TestCauseOfAnOutageIsLoggedThoughALessTellingErrorCameBefore(t *testing.T) {
	wantCause := func(t *testing.T, e *edgeUnderTest, cause string) {
		t.Helper()
		eventually.True(t, "the cause is logged", func() bool { return e.log.lines(cause) > 0 })
		e.awaitFailures(t)
		if n := e.log.lines("\n"); e.log.lines(begins) != 1 || e.log.lines(cause) != 1 || n > 3 {
			t.Errorf("%d lines:\n%s", n, e.log)
		}
	}
	t.Run("connection lost", func(t *testing.T) {
		server := redistest.Server(t, devenv.RedisOptions{})
		e, client := startEdges(t, server.URL(), 1)[0], connect(t, server.URL())
		eventually.True(t, "it is connected", func() bool { return e.store.connected.Load() })
		if err := client.ConfigSet(t.Context(), "requirepass", "secret").Err(); err != nil {
			t.Fatal(err)
		}
		if err := client.ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes").Err(); err != nil {
			t.Fatal(err)
		}
		wantCause(t, e, "NOAUTH")
	})
	t.Run("connection lost to a Redis that answers probes and no exchange", func(t *testing.T) {
		server := redistest.Server(t, devenv.RedisOptions{})
		e, client := startEdges(t, server.URL(), 1)[0], connect(t, server.URL())
		eventually.True(t, "it is connected", func() bool { return e.store.connected.Load() })
		forbidBuckets(t, client)
		if err := client.ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes").Err(); err != nil {
			t.Fatal(err)
		}
		eventually.True(t, "the fallback begins", func() bool { return e.log.lines(begins) == 1 })
		defer load(e)()
		wantCause(t, e, "NOPERM")
	})
	t.Run("connection refused", func(t *testing.T) {
		server := redistest.Server(t, devenv.RedisOptions{Password: "secret"})
		server.Kill()
		e := startEdges(t, strings.Replace(server.URL(), "default:secret@", "", 1), 1)[0]
		eventually.True(t, "the connection is refused", func() bool { return e.log.lines("connection refused") == 1 })
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantCause(t, e, "NOAUTH")
	})
}

// forbidBuckets leaves the edge what a probe needs.
func forbidBuckets(t *testing.T, client *redis.Client) {
	t.Helper()
	if err := client.Do(t.Context(), "acl", "setuser", "default", "resetkeys", "~"+dataKey).Err(); err != nil {
		t.Fatal(err)
	}
}

func allowBuckets(t *testing.T, client *redis.Client) {
	t.Helper()
	if err := client.Do(t.Context(), "acl", "setuser", "default", "allkeys").Err(); err != nil {
		t.Fatal(err)
	}
}

// load has a key come until the function that it returns is called.
func load(e *edgeUnderTest) (stop func()) {
	done := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
				e.ask(digest(1), fast)
			}
		}
	})
	return func() {
		close(done)
		running.Wait()
	}
}

func TestLeasesOfKeysThatNoLongerComeAreDroppedInAnOutage(t *testing.T) {
	l, _ := newShared(t, "redis://127.0.0.1:1", 1)
	for n := range 50 {
		l.Acquire(t.Context(), digest(n), Limit{PerMinute: 6000, Burst: 6000})
	}
	l.store.follow()
	eventually.True(t, "no lease is followed", func() bool { // when what the key has used is forgotten
		l.store.probe(t.Context())
		return len(l.store.followed) == 0
	})
}

// TestCauseOfEachOutageIsLoggedThoughTheOneBeforeWasExplained: it begins with a timer that knows nothing.
func TestCauseOfEachOutageIsLoggedThoughTheOneBeforeWasExplained(t *testing.T) {
	l, log := newShared(t, redistest.Server(t, devenv.RedisOptions{}).URL(), 1)
	l.store.probe(t.Context())
	for outage := 1; outage <= 2; outage++ {
		l.store.fall(errSlow)
		l.store.explain(errors.New("NOAUTH Authentication required"))
		if n := log.lines("rate limit store fails"); n != outage {
			t.Errorf("the causes of %d outages are in %d lines:\n%s", outage, n, log)
		}
		eventually.True(t, "the outage is over", func() bool {
			l.store.probe(t.Context())
			return !l.Status().Fallback
		})
	}
}

// TestLeasesOfKeysThatNoLongerComeAreDroppedThoughRedisAnswersProbes: they would be settled in vain at each probe, and be ever more.
func TestLeasesOfKeysThatNoLongerComeAreDroppedThoughRedisAnswersProbes(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	l, log := newShared(t, server.URL(), 1)
	e, client := &edgeUnderTest{Limiter: l, log: log}, connect(t, server.URL())
	l.store.probe(t.Context())
	forbidBuckets(t, client)
	limit := Limit{PerMinute: 6000, Burst: 6000}
	for i := range 50 {
		e.ask(digest(i), limit)
	}
	l.store.follow()
	if l.store.settle(t.Context(), l.store.followed) || len(l.store.followed) != 50 {
		t.Fatalf("%d leases are followed, and their settlement is to fail", len(l.store.followed))
	}
	eventually.True(t, "no lease is followed", func() bool { // when what the key has used is forgotten
		l.store.probe(t.Context())
		return len(l.store.followed) == 0
	})
	l.store.probe(t.Context())
	if !l.Status().Fallback || log.lines("\n") != 1 {
		t.Errorf("with nothing to settle, the fallback is said to end and to begin:\n%s", log)
	}
	allowBuckets(t, client)
	eventually.True(t, "the fallback ends", func() bool {
		l.store.probe(t.Context())
		return !l.Status().Fallback
	})
}

func TestBucketsInRedisExpireAndNameNoKey(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	e := startEdges(t, server.URL(), 1)[0]
	limit := Limit{PerMinute: 6000, Burst: 6000}
	const keys = 50
	client, seen := connect(t, server.URL()), map[string]bool{}
	eventually.True(t, "all have been there", func() bool { // each for as long as its requests count: less than a second
		for i := range keys {
			e.ask(digest(i), limit)
		}
		names, err := client.Keys(t.Context(), "*").Result()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if name == dataKey {
				continue
			}
			seen[name] = true
			if ttl := client.PTTL(t.Context(), name).Val(); ttl == -1 || ttl > time.Minute {
				t.Errorf("%s expires in %s", name, ttl)
			}
		}
		return len(seen) >= keys
	})
	for name := range seen {
		if !strings.HasPrefix(name, "rekall:rl:{") {
			t.Errorf("%s is not ours by name", name)
		}
	}
	eventually.True(t, "they are gone but for the name of the data, which goes as well", func() bool {
		return client.DBSize(t.Context()).Val() == 1 && client.PTTL(t.Context(), dataKey).Val() > 0
	})
	eventually.True(t, "idle buckets are given back", func() bool {
		e.giveBackIdle()
		return e.size() == 0
	})
}

func TestPasswordIsInNoLogAndNoError(t *testing.T) {
	const password = "correct-horse-battery"
	server := redistest.Server(t, devenv.RedisOptions{Password: password})
	right := startEdges(t, server.URL(), 1)[0]
	eventually.True(t, "it leases", func() bool {
		right.ask(digest(1), fast)
		return right.Status().Exchanges > 0 && right.bucket(digest(1)).lease.held.Load() > 0
	})
	wrong := startEdges(t, strings.Replace(server.URL(), password, "wrong-"+password, 1), 1)[0]
	eventually.True(t, "the fallback begins", func() bool { return wrong.log.lines(begins) == 1 })
	if log := right.log.String() + wrong.log.String(); strings.Contains(log, password) {
		t.Error(log)
	}
	for _, url := range []string{"redis://:" + password + "@host:port", "http://" + password, password, "redis://:" + password + "@host/x"} {
		if _, err := NewShared(url, func() int { return 1 }, zap.NewNop); err == nil || strings.Contains(err.Error(), password) {
			t.Errorf("error %v", err)
		}
	}
}

func TestAClientThatObeysRetryAfterIsServedAtEveryEdge(t *testing.T) {
	server := redistest.Server(t, devenv.RedisOptions{})
	edges := startEdges(t, server.URL(), 3)
	d, limit := digest(1), Limit{PerMinute: 600, Burst: 170}
	refused := 0
	for i := range 400 {
		if v := edges[i%3].ask(d, limit); !v.Allowed {
			refused++
			<-time.After((v.RetryAfter + time.Second - 1).Truncate(time.Second)) // whole seconds, as the header has them
			if v := edges[(i+1)%3].ask(d, limit); !v.Allowed {
				t.Errorf("request %d: refused again, for %s", i, v.RetryAfter)
			}
			if refused == 5 {
				return
			}
		}
	}
	t.Errorf("%d refusals, want 5", refused)
}

func TestAClientThatObeysRetryAfterIsServedAtEveryEdgeWithoutRedis(t *testing.T) {
	limit := Limit{PerMinute: 100, Burst: 150}
	var edges []*Limiter
	for range 3 {
		l, _ := newShared(t, "redis://127.0.0.1:1", 3)
		l.store.fallback.Store(true)
		edges = append(edges, l)
	}
	d, now := digest(1), int64(0)
	ask := func(edge int) Verdict {
		v, _ := edges[edge].store.take(edges[edge].bucket(d), limit, now)
		return v
	}
	for edge := range edges { // each is used up a little later
		now += int64(500 * time.Millisecond)
		for ask(edge).Allowed {
		}
	}
	for first := range edges {
		for next := range edges {
			refused := ask(first)
			if crowded := edges[first].tooMany(edges[first].bucket(d), limit, now); crowded.RetryAfter != refused.RetryAfter {
				t.Errorf("one too many at a time may try again after %s, and one beyond the rate after %s", crowded.RetryAfter, refused.RetryAfter)
			}
			if now += int64(refused.RetryAfter); refused.Allowed || !ask(next).Allowed {
				t.Errorf("from edge %d to %d: %+v, and refused again", first, next, refused)
			}
			for edge := range edges {
				for ask(edge).Allowed {
				}
			}
		}
	}
}

func TestSharedAcquireAllocatesNothingForAKeyInUse(t *testing.T) {
	for _, fallback := range []bool{false, true} {
		l, _ := newShared(t, "redis://127.0.0.1:1", 3)
		l.store.fallback.Store(fallback)
		d := digest(1)
		l.Acquire(t.Context(), d, tiers[2])
		l.bucket(d).lease.held.Store(2000)
		if n := testing.AllocsPerRun(1000, func() {
			if b, v := l.Acquire(t.Context(), d, tiers[2]); v.Allowed {
				b.Release()
			}
		}); n > 0 {
			t.Errorf("%.0f allocations, want none", n)
		}
	}
}

func BenchmarkSharedAcquire(b *testing.B) {
	server := redistest.Server(b, devenv.RedisOptions{})
	allowed, refused := Limit{PerMinute: int(time.Minute / time.Microsecond), Burst: 1 << 40, Concurrent: 100}, Limit{PerMinute: 1}
	for _, c := range []struct {
		name  string
		limit Limit
		keys  int
	}{{"allowed", allowed, 1000}, {"refused", refused, 1000}, {"one key everywhere", allowed, 1}} {
		b.Run(c.name, func(b *testing.B) {
			e := startEdgesThatWait(b, patience, server.URL(), 1)[0]
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				d := apikey.Hash(fmt.Sprint(b.Name(), b.N, rand.IntN(c.keys)))
				for pb.Next() {
					if bucket, v := e.Acquire(b.Context(), d, c.limit); v.Allowed {
						bucket.Release()
					}
				}
			})
			b.ReportMetric(float64(e.Status().Exchanges)/float64(b.N), "exchanges/op")
		})
	}
}

// TestStoreOverTLSIsUsedOnlyIfItsCertificateIsGood: whoever answers in its place would learn the password and decide on limits.
func TestStoreOverTLSIsUsedOnlyIfItsCertificateIsGood(t *testing.T) {
	page := httptest.NewTLSServer(nil) // for its certificate
	defer page.Close()
	key, err := x509.MarshalPKCS8PrivateKey(page.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := devenv.RedisTLS{CertificateFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	for file, block := range map[string]*pem.Block{
		files.CertificateFile: {Type: "CERTIFICATE", Bytes: page.Certificate().Raw}, files.KeyFile: {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	server := redistest.Server(t, devenv.RedisOptions{Password: "secret", TLS: &files})
	l, log := newShared(t, server.URL(), 2)
	l.store.client.Options().TLSConfig.RootCAs = x509.NewCertPool()
	l.store.client.Options().TLSConfig.RootCAs.AddCert(page.Certificate())
	trusting, doubting := startEdge(t, l, log), startEdges(t, server.URL(), 1)[0]
	eventually.True(t, "it holds a lease", func() bool {
		trusting.ask(digest(1), fast) // the first may come before the connection is made
		return trusting.bucket(digest(1)).lease.held.Load() > 0
	})
	doubting.ask(digest(1), fast)
	eventually.True(t, "nobody vouches for the certificate, and the log says so", func() bool { return doubting.log.lines("x509: certificate signed by unknown authority") > 0 })
	if doubting.store.connected.Load() {
		t.Error("the store was used")
	}
}

package ratelimit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

func digest(n int) apikey.Digest { return apikey.Hash(fmt.Sprint(n)) }

// reference is a slow token bucket with exact fractions: tokens are counted in units of 1/perMinute minute.
type reference struct {
	limit  Limit
	tokens int64 // in nanoseconds x perMinute, so that no fraction is lost
	at     int64
}

func (r *reference) allow(now int64) bool {
	const minute = int64(time.Minute)
	full := r.limit.depth() * minute
	r.tokens = min(full, r.tokens+(now-r.at)*int64(r.limit.PerMinute))
	r.at = now
	if r.tokens < minute {
		return false
	}
	r.tokens -= minute
	return true
}

// tiers are those of REKALL.md whose rate divides a minute evenly in nanoseconds, so that both models are exact.
var tiers = []Limit{{PerMinute: 100, Burst: 150}, {PerMinute: 1000, Burst: 1500}, {PerMinute: 5000, Burst: 7500}, {PerMinute: 50, Burst: 75}, {PerMinute: 60, Burst: 0}}

func TestRateAndBurstHoldExactlyForArbitraryArrivals(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		limit := tiers[random.IntN(len(tiers))]
		slow := &reference{limit: limit, tokens: limit.depth() * int64(time.Minute)}
		var bucket Bucket
		var now int64
		for range 2000 {
			// Bursts at one moment, gaps shorter and longer than the interval, and long silences.
			switch random.IntN(4) {
			case 0:
			case 1:
				now += random.Int64N(limit.interval())
			case 2:
				now += random.Int64N(3 * limit.interval())
			case 3:
				if random.IntN(100) == 0 {
					now += random.Int64N(int64(2 * time.Minute))
				}
			}
			verdict, _ := bucket.take(limit, now)
			if want := slow.allow(now); verdict.Allowed != want {
				t.Fatalf("seed %d, %+v at %d: allowed %t, want %t", seed, limit, now, verdict.Allowed, want)
			}
			if remaining := slow.tokens / int64(time.Minute); verdict.Allowed && int64(verdict.Remaining) != remaining {
				t.Fatalf("seed %d, %+v at %d: %d remain, want %d", seed, limit, now, verdict.Remaining, remaining)
			}
		}
	}
}

func TestNoWindowOf15SecondsHasMoreThanTheBurstAndNoMinuteMoreThanRateAndDepth(t *testing.T) {
	for _, limit := range tiers[:4] {
		var bucket Bucket
		var allowed []int64
		for now := int64(0); now < int64(5*time.Minute); now += limit.interval() / 7 {
			if v, _ := bucket.take(limit, now); v.Allowed {
				allowed = append(allowed, now)
			}
		}
		for window, most := range map[time.Duration]int64{
			burstWindow: int64(limit.Burst), time.Minute: int64(limit.PerMinute) + limit.depth(),
		} {
			for i, from := range allowed {
				end, _ := slices.BinarySearch(allowed, from+int64(window))
				if n := int64(end - i); n > most {
					t.Fatalf("%+v: %d requests in %s, want at most %d", limit, n, window, most)
				}
			}
		}
		// The one that is due at the end of the five minutes is not in them.
		if want := int64(5*limit.PerMinute) + limit.depth() - 1; int64(len(allowed)) != want {
			t.Errorf("%+v: %d requests in five minutes of constant demand, want %d", limit, len(allowed), want)
		}
	}
}

func TestWhoObeysRetryAfterIsServed(t *testing.T) {
	for _, limit := range tiers {
		var bucket Bucket
		now := int64(0)
		for range 10 * (limit.depth() + 1) {
			v, _ := bucket.take(limit, now)
			if v.Allowed {
				continue
			}
			if early, _ := bucket.take(limit, now+int64(v.RetryAfter)-1); early.Allowed {
				t.Fatalf("%+v: it would have passed before RetryAfter", limit)
			}
			now += int64(v.RetryAfter)
			if v, _ := bucket.take(limit, now); !v.Allowed {
				t.Fatalf("%+v: refused after RetryAfter", limit)
			}
		}
	}
}

func TestNobodyWaitsLongerAfterAChangeOfLimitsThanTheNewOnesTakeToRefill(t *testing.T) {
	for _, before := range tiers {
		for _, after := range tiers {
			var bucket Bucket
			for range before.depth() {
				bucket.take(before, 0)
			}
			full := after.depth() * after.interval()
			if v := bucket.peekAt(after.interval(), after.depth(), 0); int64(v.RetryAfter) > after.interval() || int64(v.ResetAfter) > full {
				t.Errorf("from %+v to %+v: %+v", before, after, v)
			}
			v, _ := bucket.take(after, 0)
			if int64(v.RetryAfter) > after.interval() || int64(v.ResetAfter) > full {
				t.Errorf("from %+v to %+v: %+v", before, after, v)
			}
			for range after.depth() {
				if v, _ := bucket.take(after, int64(v.ResetAfter)); !v.Allowed {
					t.Fatalf("from %+v to %+v: the burst is not back: %+v", before, after, v)
				}
			}
		}
	}
}

func TestResetAfterIsWhenTheWholeBurstIsBack(t *testing.T) {
	limit := tiers[0]
	var bucket Bucket
	var v Verdict
	for range 40 {
		v, _ = bucket.take(limit, 0)
	}
	now := int64(v.ResetAfter)
	for range limit.depth() {
		if v, _ := bucket.take(limit, now); !v.Allowed {
			t.Fatal("the burst is not back")
		}
	}
	if v, _ := bucket.take(limit, now); v.Allowed {
		t.Fatal("more than the burst is back")
	}
}

func TestConcurrentRequestsAreLimitedAndReleased(t *testing.T) {
	l, d := New(), digest(1)
	limit := Limit{Concurrent: 2}
	first, v1 := l.Acquire(t.Context(), d, limit)
	_, v2 := l.Acquire(t.Context(), d, limit)
	_, v3 := l.Acquire(t.Context(), d, limit)
	if !v1.Allowed || !v2.Allowed || v3.Allowed {
		t.Fatalf("allowed %t %t %t, want two", v1.Allowed, v2.Allowed, v3.Allowed)
	}
	if v3.RetryAfter <= 0 {
		t.Error("the refusal does not say when to try again")
	}
	first.Release()
	if _, v := l.Acquire(t.Context(), d, limit); !v.Allowed {
		t.Error("a place that was given back is not to be had")
	}
	if _, v := l.Acquire(t.Context(), digest(2), limit); !v.Allowed {
		t.Error("a key is limited by another one's requests")
	}
}

func TestRefusedRequestsHoldNoPlace(t *testing.T) {
	l, d := New(), digest(1)
	limit := Limit{PerMinute: 1, Concurrent: 5}
	for range 20 {
		if b, v := l.Acquire(t.Context(), d, limit); v.Allowed {
			b.Release()
		}
	}
	if n := l.bucket(d).concurrent.Load(); n != 0 {
		t.Errorf("%d places are held by nobody", n)
	}
}

func TestIdleBucketsAreGivenBackAndBusyOnesAreNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New()
		limit := Limit{PerMinute: 60, Concurrent: 5}
		for i := range 1000 {
			b, _ := l.Acquire(t.Context(), digest(i), limit)
			if i > 0 {
				b.Release()
			}
		}
		if l.giveBackIdle(); l.size() != 1000 {
			t.Errorf("%d buckets, want all while they remember something", l.size())
		}
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { l.Run(ctx) })
		<-time.After(burstWindow + time.Second) // of the clock that synctest fakes
		stop()
		running.Wait()
		if l.size() != 1 {
			t.Errorf("%d buckets, want only that of the stream", l.size())
		}
		for i := range l.shards {
			if s := &l.shards[i]; s.most != len(s.buckets) {
				t.Errorf("a map that had %d buckets is held for %d", s.most, len(s.buckets))
			}
		}
	})
}

func TestNothingIsForgottenWhenABucketIsGivenBackInTheMiddleOfARequest(t *testing.T) {
	l, d := New(), digest(1)
	limit := Limit{Concurrent: 3}
	stop := make(chan struct{})
	var running atomic.Int64
	var sweeping, requests sync.WaitGroup
	sweeping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				l.giveBackIdle()
			}
		}
	})
	for range 8 {
		requests.Go(func() {
			for range 5000 {
				if b, v := l.Acquire(t.Context(), d, limit); v.Allowed {
					if running.Add(1) > int64(limit.Concurrent) {
						t.Error("more requests at a time than the limit")
					}
					running.Add(-1)
					b.Release()
				}
			}
		})
	}
	requests.Wait()
	close(stop)
	sweeping.Wait()
}

// TestBucketIsNotGivenBackUnderARequestThatHasJustBegun: another bucket of the key would let as many requests run once more. The request
// of a key without a rate changes nothing but the number of those that run.
func TestBucketIsNotGivenBackUnderARequestThatHasJustBegun(t *testing.T) {
	l, limit := New(), Limit{Concurrent: 1}
	var buckets [200_000]Bucket
	var at [2]atomic.Int64 // the bucket that either side has come to
	abreast := func(side, i int) {
		for at[side].Store(int64(i)); at[1-side].Load() < int64(i); {
			runtime.Gosched()
		}
	}
	var gone [len(buckets)]bool
	var sweeping sync.WaitGroup
	sweeping.Go(func() {
		for i := range buckets {
			abreast(0, i)
			gone[i] = buckets[i].giveBack(1)
		}
	})
	var held [len(buckets)]bool
	for i := range buckets {
		abreast(1, i)
		_, held[i] = l.acquire(t.Context(), &buckets[i], limit)
	}
	sweeping.Wait()
	for i := range buckets {
		if gone[i] && held[i] {
			t.Fatalf("bucket %d was given back under its request", i)
		}
	}
}

func TestNoPlaceIsHeldByARequestThatHasEnded(t *testing.T) {
	shared, _ := newShared(t, "redis://127.0.0.1:1", 1)
	for name, l := range map[string]*Limiter{"alone": New(), "shared": shared} {
		for kind, limit := range map[string]Limit{
			"unlimited": {}, "at a time": {Concurrent: 1}, "rate": {PerMinute: int(time.Minute / time.Nanosecond), Burst: 1 << 40, Concurrent: 1},
		} {
			t.Run(name+", "+kind, func(t *testing.T) {
				d := digest(1)
				b := l.bucket(d)
				// It is given back once it is looked up, and then kept: giveBack has seen the request.
				b.emptyAt.Store(givenBack)
				if _, ok := l.acquire(t.Context(), b, limit); ok {
					t.Error("a bucket that was given back has answered")
				}
				b.emptyAt.Store(0)
				if n := b.concurrent.Load(); n != 0 {
					t.Errorf("%d places are held by nobody", n)
				}
			})
		}
	}
}

func TestAcquireAllocatesNothingForAKeyInUse(t *testing.T) {
	l, d := New(), digest(1)
	limit := tiers[2]
	l.Acquire(t.Context(), d, limit)
	if n := testing.AllocsPerRun(1000, func() {
		if b, v := l.Acquire(t.Context(), d, limit); v.Allowed {
			b.Release()
		}
	}); n > 0 {
		t.Errorf("%.0f allocations, want none", n)
	}
}

func BenchmarkAcquire(b *testing.B) {
	for name, limit := range map[string]Limit{
		"allowed": {PerMinute: int(time.Minute / time.Nanosecond), Burst: 1 << 40, Concurrent: 100},
		"refused": {PerMinute: 1},
	} {
		b.Run(name, func(b *testing.B) {
			l := New()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				d := digest(rand.IntN(1000))
				for pb.Next() {
					if bucket, v := l.Acquire(b.Context(), d, limit); v.Allowed {
						bucket.Release()
					}
				}
			})
		})
	}
}

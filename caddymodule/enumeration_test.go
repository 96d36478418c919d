package caddymodule

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/keycache"
)

// sharing returns a well-formed key that has its first n characters in common with another, and not the next.
func sharing(key string, n int) string {
	other := apikey.Generate(apikey.Production)
	for other[n] == key[n] {
		other = apikey.Generate(apikey.Production)
	}
	return key[:n] + other[n:]
}

// TestRefusalCostsTheSameHoweverMuchOfAKeyIsRight counts what a refusal costs. It can be no different: a key is found by its
// SHA-256, which shares nothing with that of a similar key, and keys are compared nowhere.
func TestRefusalCostsTheSameHoweverMuchOfAKeyIsRight(t *testing.T) {
	g, secret := newGateway(t)
	cache := g.cache.(*keycache.Cache)
	used := map[string]bool{}
	wanted := ""
	for _, shared := range []int{47, 46, 30, 8, 3} {
		for range 10 {
			key := sharing(secret, shared)
			for used[key] { // there are only 61 that share 47
				key = sharing(secret, shared)
			}
			used[key] = true
			before := cache.Status()
			got := g.serve(t, bearerRequest(key))
			after := cache.Status()
			if asked := after.Hits + after.Misses - before.Hits - before.Misses; asked != 1 {
				t.Errorf("for a key that shares %d characters the cache was asked %d times", shared, asked)
			}
			if statements := after.Lookups - before.Lookups; statements > 1 { // or the change feed proved that there is none
				t.Errorf("a key that shares %d characters took %d statements", shared, statements)
			}
			if wanted == "" {
				wanted = anonymous(got)
			}
			if got.Code != http.StatusUnauthorized || anonymous(got) != wanted {
				t.Errorf("a key that shares %d characters has the answer %d\n%s\nand not\n%s", shared, got.Code, anonymous(got), wanted)
			}
		}
	}
}

// anonymous is an answer without its request id.
func anonymous(w *httptest.ResponseRecorder) string {
	var all strings.Builder
	_ = w.Header().Write(&all) // to memory
	all.WriteString(w.Body.String())
	return strings.ReplaceAll(all.String(), w.Header().Get("X-Request-Id"), "")
}

// BenchmarkRefusalOfANearlyRightKey measures whether a refusal tells how much of a key is right: ratio is what a key that
// shares 47 of 48 characters with a good one takes, over what one takes that shares none of its secret.
func BenchmarkRefusalOfANearlyRightKey(b *testing.B) {
	g, secret := newGateway(b)
	keys := [2]string{sharing(secret, apikey.Length-1), sharing(secret, len(apikey.ProductionPrefix))}
	var traffics [2]*traffic
	for i, key := range keys {
		traffics[i] = newTraffic("/v1/memories", func(r *http.Request) { r.Header["Authorization"] = []string{"Bearer " + key} })
	}
	var took [2][]time.Duration
	for n := 0; b.Loop(); n++ {
		i := n % 2 // in turns, so that what else the machine does meets both
		t := traffics[i]
		if t.spent() {
			t.refill()
		}
		r := t.next()
		clear(t.writer.header)
		begun := time.Now()
		if err := g.ServeHTTP(t.writer, credential.AtDoor(r), nil); err != nil {
			b.Fatal(err)
		}
		took[i] = append(took[i], time.Since(begun))
	}
	near, far := median(took[0]), median(took[1])
	b.ReportMetric(0, "ns/op") // the making of the requests is in it
	b.ReportMetric(float64(near), "ns/near")
	b.ReportMetric(float64(far), "ns/far")
	b.ReportMetric(float64(near)/float64(far), "ratio")
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	if len(d) == 0 { // the benchmark's first round is of one
		return 0
	}
	return d[len(d)/2]
}

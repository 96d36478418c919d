package keycache

import (
	"encoding/binary"
	"sync"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
)

func numbered(n int) apikey.Digest {
	return apikey.Hash(string(binary.LittleEndian.AppendUint64(nil, uint64(n))))
}

func TestFilterHasAllThatWasAddedAtOnceFromSeveralSides(t *testing.T) {
	const keys = 100_000
	f := newFilter(1, keys)
	var wg sync.WaitGroup
	for side := range 4 {
		wg.Go(func() {
			for n := side * keys / 4; n < (side+1)*keys/4; n++ {
				d := numbered(n)
				f.add(d[:])
				if !f.has(&d) {
					t.Errorf("key %d is missing as soon as it was added", n)
				}
			}
		})
	}
	wg.Wait()
	for n := range keys {
		if d := numbered(n); !f.has(&d) {
			t.Fatalf("key %d is missing", n)
		}
	}
	wrong := 0
	for n := range keys {
		if d := numbered(keys + n); f.has(&d) {
			wrong++
		}
	}
	if wrong > keys/500 { // expected: one in a thousand
		t.Errorf("%d of %d unknown keys look known", wrong, keys)
	}
	if counted := f.keys.Load(); counted > keys || counted < keys*99/100 {
		t.Errorf("%d keys counted of %d", counted, keys)
	}
}

// TestUnknownKeyThatLooksKnownAtOneEdgeIsRuledOutAtOthers: whoever has collected such keys would have all edges look them up.
func TestUnknownKeyThatLooksKnownAtOneEdgeIsRuledOutAtOthers(t *testing.T) {
	here, there := newFilter(1, 0), newFilter(1, 0)
	for n := range minFilterKeys {
		d := numbered(n)
		here.add(d[:])
		there.add(d[:])
	}
	const strangers = 500_000
	looks, both := 0, 0
	for n := range strangers {
		if d := numbered(minFilterKeys + n); here.has(&d) {
			looks++
			if there.has(&d) {
				both++
			}
		}
	}
	if looks < strangers/5000 || looks > strangers/500 {
		t.Errorf("%d of %d unknown keys look known, want about one in 1000", looks, strangers)
	}
	if both > looks/20 {
		t.Errorf("%d of them look known at the other edge too", both)
	}
}

func BenchmarkFilterHas(b *testing.B) {
	f := newFilter(1, 10_000_000)
	var digests [1 << 12]apikey.Digest
	for i := range digests {
		digests[i] = numbered(i)
	}
	for i := 0; b.Loop(); i++ {
		f.has(&digests[i%len(digests)])
	}
}

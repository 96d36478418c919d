package identitytoken

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
)

func TestAnIndependentLibraryVerifiesATokenAndReadsItsClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := run(t, newShelf(), standard)
		i := issuer(t, signer, Options{Issuer: "edge.example", Audience: []string{"memories", "hives"}, Lifetime: 3 * time.Minute})
		r, now := record(), time.Now()
		text := mustToken(t, i, r, now)
		got := verify(t, text, mustJWKS(t, signer), jwt.WithIssuer("edge.example"), jwt.WithAudience("hives"))
		want := jwt.MapClaims{
			"iss": "edge.example", "sub": r.ID, "aud": []any{"memories", "hives"},
			"iat": float64(now.Unix()), "exp": float64(now.Unix() + 180),
			"account": "acme & söhne", "environment": "sandbox", "scope": "memories:read hives:write",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		parsed, _, err := jwt.NewParser().ParseUnverified(text, jwt.MapClaims{})
		if err != nil || len(parsed.Header) != 3 || parsed.Header["typ"] != "JWT" || parsed.Header["alg"] != "EdDSA" {
			t.Errorf("header %v, %v", parsed.Header, err)
		}
		forged := []byte(text)
		forged[len(forged)/2] ^= 1
		if _, err := tryVerify(string(forged), mustJWKS(t, signer)); err == nil {
			t.Error("a forged token verifies")
		}
	})
}

func TestTokenHasDefaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := run(t, newShelf(), standard)
		got := verify(t, mustToken(t, issuer(t, signer, Options{}), record(), time.Now()), mustJWKS(t, signer))
		if _, hasAudience := got["aud"]; got["iss"] != defaultIssuer || hasAudience || got["exp"].(float64)-got["iat"].(float64) != 300 {
			t.Errorf("claims %v", got)
		}
	})
}

func TestBadOptionsAreRefused(t *testing.T) {
	for name, options := range map[string]Options{
		"too short":         {Lifetime: minLifetime - 1},
		"too long":          {Lifetime: maxLifetime + 1},
		"negative":          {Lifetime: -time.Minute},
		"an empty audience": {Audience: []string{"a", ""}},
	} {
		if _, err := NewIssuer(nil, 1, options); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

// countingSigner counts signatures, which do not differ where nothing that is signed does, and lets other requests in.
type countingSigner struct {
	jose.Signer
	signatures atomic.Int32
}

func (c *countingSigner) Sign(payload []byte) (*jose.JSONWebSignature, error) {
	c.signatures.Add(1)
	for range 1000 {
		runtime.Gosched()
	}
	return c.Signer.Sign(payload)
}

func TestTokenIsSignedOncePerKeyAndMinute(t *testing.T) {
	i := issuer(t, run(t, newShelf(), standard), Options{})
	mustToken(t, i, record(), time.Now()) // from now on there is a key
	key := i.signer.active.Load().key
	counter := &countingSigner{Signer: key.sign}
	key.sign = counter

	r, begun := record(), time.Now()
	for n, step := range []struct {
		after time.Duration
		want  int32
	}{
		{0, 1},
		{resignAfter - 1, 1},
		{resignAfter, 2},
		{2*resignAfter - 1, 2},
		{-resignAfter, 3}, // Postgres's clock was set back: a token of the future is no good
	} {
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { mustToken(t, i, r, begun.Add(step.after)) })
		}
		wg.Wait()
		if got := counter.signatures.Load(); got != step.want {
			t.Errorf("step %d: %d signatures, want %d", n, got, step.want)
		}
	}
}

// TestTokenSaysWhatIsKnownNow changes one thing after another, within the minute.
func TestTokenSaysWhatIsKnownNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := run(t, newShelf(), standard)
		i, r, now := issuer(t, signer, Options{}), *record(), time.Now()
		last := mustToken(t, i, &r, now)
		for name, change := range map[string]func(*apikey.Record){
			"scopes":      func(r *apikey.Record) { r.Scopes = apikey.AgentsRead },
			"expiry":      func(r *apikey.Record) { r.ExpiresAt = apikey.TimeOf(now.Add(time.Minute)) },
			"account":     func(r *apikey.Record) { r.Account = "other" },
			"environment": func(r *apikey.Record) { r.Environment = apikey.Production },
			"id":          func(r *apikey.Record) { r.ID = "key_other" },
		} {
			changed := r
			change(&changed)
			text := mustToken(t, i, &changed, now)
			if text == last {
				t.Errorf("after a change of the %s the token is the same", name)
			}
			last, r = text, changed
		}
		got := verify(t, last, mustJWKS(t, signer))
		if got["scope"] != "agents:read" || got["account"] != "other" || got["environment"] != "production" || got["sub"] != "key_other" {
			t.Errorf("claims %v", got)
		}
	})
}

func TestTokenDoesNotOutliveItsKeyNorIsHandedOutExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := run(t, newShelf(), standard)
		r := record()
		i := issuer(t, signer, Options{Lifetime: minLifetime})
		end := time.Now().Add(10*time.Minute + 500*time.Millisecond)
		r.ExpiresAt = apikey.TimeOf(end)
		var moments []time.Time
		for now := time.Now(); now.Before(end); now = now.Add(7 * time.Second) {
			moments = append(moments, now)
		}
		for _, now := range append(moments, end.Add(-time.Millisecond)) {
			sleep(time.Until(now))
			claims := verify(t, mustToken(t, i, r, now), mustJWKS(t, signer))
			expiry := time.Unix(int64(claims["exp"].(float64)), 0)
			if !expiry.After(now) || expiry.Sub(end) > time.Second {
				t.Fatalf("at %s a token that expires at %s, of a key that expires at %s", now, expiry, end)
			}
		}
	})
}

func TestTokensOfIdleKeysAreGivenBackAndTheirNumberIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := run(t, newShelf(), standard)
		const size = 640
		i, err := NewIssuer(signer, size, Options{})
		if err != nil {
			t.Fatal(err)
		}
		kept := func() (n int) {
			for s := range i.shards {
				n += len(i.shards[s].slots)
			}
			return n
		}
		now := time.Now()
		for range 4 * size {
			mustToken(t, i, record(), now)
		}
		if n := kept(); n > size+size/8+shards || n < size {
			t.Errorf("%d tokens are kept, want about %d", n, size)
		}
		busy := record()
		for range 10 {
			now = now.Add(resignAfter)
			for n := range shards { // one key of each shard is in use
				r := *busy
				r.Digest[30] = byte(n)
				mustToken(t, i, &r, now)
			}
		}
		if n := kept(); n != shards {
			t.Errorf("%d tokens are kept for %d keys in use", n, shards)
		}
	})
}

func TestTokenThatIsKeptCostsNoAllocation(t *testing.T) {
	i, r, now := issuer(t, run(t, newShelf(), standard), Options{}), record(), time.Now()
	mustToken(t, i, r, now)
	if n := testing.AllocsPerRun(200, func() {
		if _, err := i.Token(t.Context(), r, now); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%.0f allocations, want none", n)
	}
}

func BenchmarkToken(b *testing.B) {
	i, r := issuer(b, run(b, newShelf(), standard), Options{}), record()
	ctx, now := context.Background(), time.Now()
	mustToken(b, i, r, now)
	b.Run("kept", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = i.Token(ctx, r, now)
		}
	})
	b.Run("kept, parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				_, _ = i.Token(ctx, r, now)
			}
		})
	})
	b.Run("signed", func(b *testing.B) {
		b.ReportAllocs()
		for at := now; b.Loop(); at = at.Add(resignAfter) {
			_, _ = i.Token(ctx, r, at)
		}
	})
}

package identitytoken

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/MicahParks/keyfunc/v3"
	"golang.org/x/time/rate"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

// TestTokensOfAFleetThatRotatesAllTheTimeVerifyAtEachOfItsKeySets has two edges on one Postgres, and for each a backend whose
// library fetches its edge's key set over HTTP, and again when it meets a key that it does not know.
func TestTokensOfAFleetThatRotatesAllTheTimeVerifyAtEachOfItsKeySets(t *testing.T) {
	url := pgtest.Migrated(t)
	hectic := schedule{rotate: time.Second, lead: 500 * time.Millisecond, renew: 50 * time.Millisecond, lease: maxLifetime}
	const edges = 2
	var issuers [edges]*Issuer
	var backends [edges]keyfunc.Keyfunc
	for e := range edges {
		signer := run(t, pgtest.Store(t, url), hectic)
		issuers[e] = issuer(t, signer, Options{})
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			document, err := signer.JWKS(r.Context())
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			_, _ = w.Write(document)
		}))
		t.Cleanup(server.Close)
		keys, err := keyfunc.NewDefaultOverrideCtx(t.Context(), []string{server.URL}, keyfunc.Override{
			RefreshInterval: time.Hour, RefreshUnknownKID: rate.NewLimiter(rate.Inf, 1),
		})
		if err != nil {
			t.Fatal(err)
		}
		backends[e] = keys
	}
	used := map[string]bool{}
	deadline := time.Now().Add(60 * time.Second)
	for len(used) < 3*edges {
		if time.Now().After(deadline) {
			t.Fatalf("only %d keys have signed", len(used))
		}
		for e, i := range issuers {
			text := mustToken(t, i, record(), time.Now()) // a kept one would hide the rotations
			used[fmt.Sprint(e, keyID(t, text))] = true
			for b, backend := range backends {
				if _, err := verifyWith(backend.Keyfunc, text); err != nil {
					t.Fatalf("a token of edge %d with the key set of edge %d: %v", e, b, err)
				}
			}
		}
	}
}

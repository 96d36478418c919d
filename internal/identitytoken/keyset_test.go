package identitytoken

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

// TestKeySetHasAKeyThatWasPublishedAMomentAgo: the backend asks because of a token of an edge that has just started.
func TestKeySetHasAKeyThatWasPublishedAMomentAgo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		asked := run(t, store, standard)
		mustJWKS(t, asked)
		for range 3 {
			started := run(t, store, standard)
			verify(t, mustToken(t, issuer(t, started, Options{}), record(), time.Now()), mustJWKS(t, asked))
		}
	})
}

func TestFloodOfRequestsForTheKeySetCausesTenReadsASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		signer := run(t, store, standard)
		sleep(time.Second)
		_, before := store.counts()
		var wg sync.WaitGroup
		for range 20 {
			for range 100 {
				wg.Go(func() { mustJWKS(t, signer) })
			}
			sleep(50 * time.Millisecond)
		}
		wg.Wait()
		if _, after := store.counts(); after-before > 12 || after-before < 2 {
			t.Errorf("%d reads in a second", after-before)
		}
	})
}

func TestKeySetStaysServedWhenPostgresIsAway(t *testing.T) {
	for name, hurt := range map[string]func(*shelf){
		"down":    func(s *shelf) { s.set(true) },
		"hanging": (*shelf).hang,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newShelf()
				signer := run(t, store, standard)
				want := mustJWKS(t, signer)
				hurt(store)
				for range 3 {
					sleep(time.Minute)
					asked := time.Now()
					var wg sync.WaitGroup
					for range 50 {
						wg.Go(func() {
							if !bytes.Equal(mustJWKS(t, signer), want) {
								t.Error("another key set")
							}
						})
					}
					wg.Wait()
					if waited := time.Since(asked); waited > 2*(readTimeout+readGap) {
						t.Errorf("the answers took %s", waited)
					}
				}
			})
		})
	}
}

func TestKeySetThatWasNeverReadIsAnErrorAndNotEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		store.set(true)
		signer := newSigner(store, "", zap.NewNop, standard)
		if document, err := signer.JWKS(t.Context()); !errors.Is(err, errNoKeySet) || !errors.Is(err, errDown) || document != nil {
			t.Errorf("%s, %v", document, err)
		}
		store.set(false)
		if got := string(mustJWKS(t, signer)); got != `{"keys":[]}` {
			t.Errorf("a fleet that signs nothing has the key set %s", got)
		}
	})
}

// TestReadOfTheKeySetOutlivesTheClientThatCausedIt: others wait for it.
func TestReadOfTheKeySetOutlivesTheClientThatCausedIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		store.hang()
		signer := newSigner(store, "", zap.NewNop, standard)
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error, 2)
		go func() { _, err := signer.JWKS(ctx); got <- err }()
		synctest.Wait()
		go func() { _, err := signer.JWKS(t.Context()); got <- err }()
		synctest.Wait()
		cancel()
		close(store.hanging)
		for range 2 {
			if err := <-got; err != nil {
				t.Error(err)
			}
		}
	})
}

package identitytoken

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/MicahParks/keyfunc/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// sleep lets fake time pass.
func sleep(d time.Duration) { <-time.After(d) }

// TestRotationHasNoMomentInWhichATokenCannotBeVerified follows two rotations, with a backend that is as lazy as the
// key set's max-age allows: it does not ask again when it meets a key that it does not know.
func TestRotationHasNoMomentInWhichATokenCannotBeVerified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		signer := run(t, store, standard)
		i, r := issuer(t, signer, Options{Lifetime: maxLifetime}), record()
		var keys keyfunc.Keyfunc
		var fetched time.Time
		used := map[string]bool{}
		var texts []string
		const step = 50 * time.Second
		for begun := time.Now(); time.Since(begun) < 50*time.Hour; sleep(step) {
			texts = append(texts, mustToken(t, i, r, time.Now()))
			newest := len(texts) - 1
			used[keyID(t, texts[newest])] = true
			if time.Since(fetched) >= JWKSMaxAge {
				var err error
				if keys, err = keyfunc.NewJWKSetJSON(mustJWKS(t, signer)); err != nil {
					t.Fatal(err)
				}
				fetched = time.Now()
			}
			// And one that lay in a queue until it had a minute left.
			oldest := max(0, newest-int((maxLifetime-resignAfter)/step)+1)
			for _, n := range []int{newest, oldest} {
				if _, err := verifyWith(keys.Keyfunc, texts[n]); err != nil {
					t.Fatalf("after %s: %v", time.Since(begun), err)
				}
			}
		}
		if len(used) != 3 {
			t.Errorf("%d keys have signed in 50 hours, want 3", len(used))
		}
		if published := strings.Count(string(mustJWKS(t, signer)), `"kid"`); published > 2 {
			t.Errorf("%d keys are published at the end", published)
		}
	})
}

func TestKeySignsOnlyOnceItIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		store.set(true)
		i := issuer(t, run(t, store, standard), Options{})
		asked := time.Now()
		if text, err := i.Token(t.Context(), record(), asked); !errors.Is(err, errUnpublished) || text != "" {
			t.Fatalf("%q, %v", text, err)
		}
		if waited := time.Since(asked); waited > time.Second {
			t.Errorf("the answer took %s", waited)
		}
		store.set(false)
		sleep(retryEvery)
		mustToken(t, i, record(), time.Now())
	})
}

func TestRequestOfTheFirstMomentWaitsForThePublication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signer := newSigner(newShelf(), "", zap.NewNop, standard)
		i := issuer(t, signer, Options{})
		got := make(chan error, 1)
		go func() {
			_, err := i.Token(t.Context(), record(), time.Now())
			got <- err
		}()
		sleep(publishedWithin / 2)
		start(t, signer)
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
}

// TestKeyThatIsNotRenewedSignsNothingThatOutlivesIt takes Postgres away for longer than the lease.
func TestKeyThatIsNotRenewedSignsNothingThatOutlivesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		signer := run(t, store, standard)
		i, r := issuer(t, signer, Options{}), record()
		first := mustToken(t, i, r, time.Now())
		sleep(time.Millisecond) // past the renewal that the start asked for
		store.set(true)
		refused := false
		for start := time.Now(); time.Since(start) < 3*time.Hour; sleep(resignAfter) {
			text, err := i.Token(t.Context(), r, time.Now())
			if refused = err != nil; refused {
				continue
			}
			expires := verify(t, text, mustJWKS(t, signer))["exp"].(float64)
			if published := store.published(keyID(t, text)); time.Unix(int64(expires), 0).After(published) {
				t.Fatalf("a token outlives its key, which is published until %s", published)
			}
		}
		if !refused {
			t.Error("tokens were signed beyond the lease")
		}
		store.set(false)
		sleep(retryEvery)
		if text := mustToken(t, i, r, time.Now()); keyID(t, text) != keyID(t, first) {
			t.Error("the key changed without need")
		}
	})
}

// TestSuspendedEdgePublishesItsKeyAgainBeforeItSigns: nobody renewed it meanwhile.
func TestSuspendedEdgePublishesItsKeyAgainBeforeItSigns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		signer := run(t, store, standard)
		i, r := issuer(t, signer, Options{}), record()
		mustToken(t, i, r, time.Now())
		a := *signer.active.Load()
		a.renewedAt = a.renewedAt.Add(-standard.lease)
		signer.active.Store(&a)
		store.mu.Lock()
		clear(store.rows)
		store.mu.Unlock()
		text := mustToken(t, i, r, time.Now().Add(resignAfter))
		if store.published(keyID(t, text)).IsZero() {
			t.Error("signed with a key that is not published")
		}
	})
}

// TestKeyThatWasDeletedIsPublishedAgainWithin30Seconds, as SECURITY.md says of the edges that were not broken into.
func TestKeyThatWasDeletedIsPublishedAgainWithin30Seconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		signer := run(t, store, standard)
		text := mustToken(t, issuer(t, signer, Options{}), record(), time.Now())
		sleep(time.Millisecond) // past the renewal that the start asked for
		store.mu.Lock()
		clear(store.rows)
		store.mu.Unlock()
		sleep(30*time.Second + readGap) // before which the key set is not read again
		synctest.Wait()
		verify(t, text, mustJWKS(t, signer))
	})
}

func TestOutageCausesOneAttemptASecondHoweverManyRequestsCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		store.set(true)
		i := issuer(t, run(t, store, standard), Options{})
		synctest.Wait()
		before, _ := store.counts()
		for range 100 { // each waits its half second
			_, _ = i.Token(t.Context(), record(), time.Now())
		}
		if after, _ := store.counts(); after-before > 52 {
			t.Errorf("%d attempts in 50 s", after-before)
		}
	})
}

// TestKeySetThatCannotBeReadIsNotToldAsAKeyThatCannotBePublished: whoever reads that waits for the tokens to end, and they do not.
func TestKeySetThatCannotBeReadIsNotToldAsAKeyThatCannotBePublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newShelf()
		store.unread = true
		core, lines := observer.New(zap.WarnLevel)
		signer := newSigner(store, "", func() *zap.Logger { return zap.New(core) }, standard)
		start(t, signer)
		const renewals = 10
		sleep(renewals * standard.renew)
		if publishes, _ := store.counts(); publishes > renewals+1 {
			t.Errorf("published %d times in the time of %d renewals", publishes, renewals)
		}
		if all := lines.All(); len(all) != 1 || !strings.HasPrefix(all[0].Message, "key set cannot be read") {
			t.Errorf("the log says %v, want one line of the key set", all)
		}
		if failure := signer.LastFailure(); failure == nil || !errors.Is(failure.Err, errDown) {
			t.Errorf("the last failure is %v", failure)
		}
		mustToken(t, issuer(t, signer, Options{}), record(), time.Now())
	})
}

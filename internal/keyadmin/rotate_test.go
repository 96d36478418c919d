package keyadmin_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func get(t testing.TB, admin *keyadmin.Admin, id string) keyadmin.Key {
	t.Helper()
	key, err := admin.Get(t.Context(), operator, id)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func rotate(t testing.TB, admin *keyadmin.Admin, id string, overlap keyadmin.Overlap) keyadmin.Key {
	t.Helper()
	key, _, err := admin.Rotate(t.Context(), operator, id, keyadmin.RotateRequest{Overlap: overlap})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func day(t testing.TB) keyadmin.Overlap {
	t.Helper()
	overlap, err := keyadmin.ParseOverlap("")
	if err != nil || overlap != (keyadmin.Overlap{For: 24 * time.Hour}) {
		t.Fatalf("default overlap %v, %v", overlap, err)
	}
	return overlap
}

func TestSuccessorIsTheSameKeyWithAnotherSecret(t *testing.T) {
	admin, _, _ := newAdmin(t)
	r := request()
	r.ManageKeys = true
	old := create(t, admin, r)
	next := rotate(t, admin, old.ID, day(t))
	if next.ID == old.ID || next.Key == old.Key || !apikey.ChecksumValid(next.Key.Reveal()) {
		t.Error("the successor is no new key")
	}
	if next.Name != old.Name || next.Account != old.Account || next.Environment != old.Environment || !next.ManageKeys ||
		strings.Join(next.Scopes, " ") != strings.Join(old.Scopes, " ") || *next.Predecessor != old.ID || next.Successor != nil {
		t.Errorf("old %+v, next %+v", old, next)
	}
	if lives, lived := next.ExpiresAt.Sub(next.CreatedAt), old.ExpiresAt.Sub(old.CreatedAt); lives != lived {
		t.Errorf("the successor lives %v, the old key was made for %v", lives, lived)
	}
	ending := get(t, admin, old.ID)
	if ending.Status != keyadmin.Active || *ending.Successor != next.ID || ending.ExpiresAt.Sub(next.CreatedAt) != 24*time.Hour {
		t.Errorf("old key %+v", ending)
	}
	if again := rotate(t, admin, next.ID, day(t)); again.ExpiresAt.Sub(again.CreatedAt) != 90*24*time.Hour {
		t.Errorf("the successor's successor %+v", again)
	}
}

// A key that an operator throttled must not shed that by being rotated, nor one that was allowed more lose it.
func TestSuccessorHasTheLimitsOfTheOldKeysOwn(t *testing.T) {
	databaseURL := pgtest.URL(t)
	role := pgtest.Role(t, databaseURL)
	if _, _, err := keystore.MigrateAndGrant(t.Context(), databaseURL, keystore.Roles{Admin: role}); err != nil {
		t.Fatal(err)
	}
	store := pgtest.Store(t, pgtest.Login(t, databaseURL, role)) // with no more rights than key management has
	admin := keyadmin.New(store)
	owner, err := keyadmin.Person("owner", "acme")
	if err != nil {
		t.Fatal(err)
	}
	throttled, plain := create(t, admin, request()), create(t, admin, request())
	limits, err := admin.SetKeyLimits(t.Context(), operator, throttled.ID, keyadmin.LimitsChange{PerMinute: new(2), Concurrent: new(1)})
	if err != nil {
		t.Fatal(err)
	}
	for old, want := range map[string]keyadmin.Limits{throttled.ID: limits.Own, plain.ID: {}} {
		next, _, err := admin.Rotate(t.Context(), owner, old, keyadmin.RotateRequest{Overlap: day(t)})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := admin.KeyLimits(t.Context(), operator, next.ID); got.Own != want || err != nil {
			t.Errorf("limits of the successor %+v, %v, want %+v", got, err, want)
		}
		page, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{KeyID: next.ID, Action: string(keyadmin.KeyLimitsChanged)})
		if told := len(page.Entries) == 1 && page.Entries[0].Actor == "user:owner"; told != (want != keyadmin.Limits{}) || err != nil {
			t.Errorf("audit %+v, %v", page.Entries, err)
		}
	}
}

func TestLimitsThatAreSetDuringARotationReachTheSuccessor(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	limited, rotated := make(chan error, 1), make(chan keyadmin.Key, 1)
	err := store.ChangeOnce(t.Context(), func(tx *keystore.Tx) error {
		if _, err := tx.LockKeyLimits(t.Context(), old.ID); err != nil {
			return err
		}
		go func() {
			_, err := admin.SetKeyLimits(t.Context(), operator, old.ID, keyadmin.LimitsChange{Concurrent: new(1)})
			limited <- err
		}()
		pgtest.AwaitBlocked(t, databaseURL, 1)
		go func() {
			next, _, err := admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: day(t)})
			if err != nil {
				t.Error(err)
			}
			rotated <- next
		}()
		pgtest.AwaitBlocked(t, databaseURL, 2)
		return nil
	})
	if err := errors.Join(err, <-limited); err != nil {
		t.Fatal(err)
	}
	if got, err := admin.KeyLimits(t.Context(), operator, (<-rotated).ID); got.Own.Concurrent != 1 || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRotationNeverMakesAKeyLiveLonger(t *testing.T) {
	admin, _, _ := newAdmin(t)
	r := request()
	r.ExpiresIn = "1h"
	old := create(t, admin, r)
	rotate(t, admin, old.ID, day(t))
	if got := get(t, admin, old.ID); !got.ExpiresAt.Equal(*old.ExpiresAt) {
		t.Errorf("expiry %v became %v", old.ExpiresAt, got.ExpiresAt)
	}
}

func TestSuccessorOfAnImportedKeyLivesTenYearsAtMost(t *testing.T) {
	admin, store, _ := newAdmin(t)
	secret := apikey.Generate(apikey.Sandbox)
	line := fmt.Sprintf(`{"hash":"%x","account":"acme","name":"n","environment":"sandbox","scopes":["memories:read"],`+
		`"created_at":"1990-01-01T00:00:00Z","expires_at":"9000-01-01T00:00:00Z"}`, sha256.Sum256([]byte(secret)))
	if _, err := importText(t, admin, line, keyadmin.ImportOptions{Format: "jsonl"}); err != nil {
		t.Fatal(err)
	}
	old, err := store.Find(t.Context(), keystore.Everything(), apikey.Hash(secret))
	if err != nil {
		t.Fatal(err)
	}
	if next := rotate(t, admin, old.ID, day(t)); next.ExpiresAt.Sub(next.CreatedAt) != 3650*24*time.Hour {
		t.Errorf("the successor lives from %v to %v", next.CreatedAt, next.ExpiresAt)
	}
}

func TestRotationOfTheKeysOfAnAccountThatCannotBeIsRefused(t *testing.T) {
	admin, _, _ := newAdmin(t)
	var invalid *keyadmin.InvalidError
	for _, account := range []string{"acme ", "\n", keystore.CanaryAccount} {
		r := keyadmin.RotateDueRequest{OlderThan: "0s", Account: account}
		if _, err := admin.RotateDue(t.Context(), operator, r, true, nil); !errors.As(err, &invalid) || invalid.Field != "account" {
			t.Errorf("%q: %v", account, err)
		}
	}
}

func TestOverlapOfNothingEndsTheOldKeyAtOnce(t *testing.T) {
	admin, _, _ := newAdmin(t)
	old := create(t, admin, request())
	rotate(t, admin, old.ID, keyadmin.Overlap{})
	if got := get(t, admin, old.ID); got.Status != keyadmin.Expired {
		t.Errorf("old key %+v", got)
	}
	if _, _, err := admin.UndoRotation(t.Context(), operator, old.ID); !errors.Is(err, keyadmin.ErrEnded) {
		t.Errorf("undo: %v", err)
	}
}

func TestUndoRestoresTheExpiryExactlyAndRevokesTheSuccessor(t *testing.T) {
	for name, expiresIn := range map[string]string{"with an expiry": "90d", "without": ""} {
		for _, overlap := range []keyadmin.Overlap{{For: time.Hour}, {For: time.Hour, OnFirstUse: true}} {
			t.Run(name+" "+overlap.String(), func(t *testing.T) {
				admin, _, _ := newAdmin(t)
				r := request()
				r.ExpiresIn = expiresIn
				old := create(t, admin, r)
				next := rotate(t, admin, old.ID, overlap)
				restored, _, err := admin.UndoRotation(t.Context(), operator, old.ID)
				if err != nil || restored.Status != keyadmin.Active || restored.Successor != nil {
					t.Fatalf("%+v, %v", restored, err)
				}
				if (restored.ExpiresAt == nil) != (old.ExpiresAt == nil) || old.ExpiresAt != nil && !old.ExpiresAt.Equal(*restored.ExpiresAt) {
					t.Errorf("expiry %v became %v", old.ExpiresAt, restored.ExpiresAt)
				}
				if withdrawn := get(t, admin, next.ID); withdrawn.Status != keyadmin.Revoked || withdrawn.Predecessor != nil || withdrawn.OverlapOnFirstUse != nil {
					t.Errorf("successor %+v", withdrawn)
				}
				if _, _, err := admin.UndoRotation(t.Context(), operator, old.ID); !errors.Is(err, keyadmin.ErrNotRotated) {
					t.Errorf("undo again: %v", err)
				}
				rotate(t, admin, old.ID, overlap) // which was undone, so it can be done
			})
		}
	}
}

// Whoever revokes a key in an incident must learn of the key that lives on in its place.
func TestRevocationDuringARotationNamesTheSuccessor(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	next := keystore.NewKey{
		ID: "key_" + apikey.RandomText(22), Account: "acme", Name: "next", Environment: apikey.Sandbox, Digest: apikey.Hash("next"), Predecessor: old.ID,
	}
	type result struct {
		key keyadmin.Key
		err error
	}
	revoked := make(chan result, 1)
	err := store.ChangeOnce(t.Context(), func(tx *keystore.Tx) error {
		if _, err := tx.Lock(t.Context(), keystore.Everything(), old.ID); err != nil {
			return err
		}
		go func() {
			key, err := admin.Revoke(t.Context(), operator, old.ID)
			revoked <- result{key, err}
		}()
		pgtest.AwaitBlocked(t, databaseURL, 1)
		if _, err := tx.Insert(t.Context(), next); err != nil {
			return err
		}
		return tx.StartGrace(t.Context(), old.ID, time.Hour)
	})
	got := <-revoked
	if err := errors.Join(err, got.err); err != nil {
		t.Fatal(err)
	}
	if got.key.Status != keyadmin.Revoked || got.key.Successor == nil || *got.key.Successor != next.ID {
		t.Errorf("revoked %+v", got.key)
	}
}

func TestKeyHasOneSuccessorAtATime(t *testing.T) {
	admin, _, _ := newAdmin(t)
	old := create(t, admin, request())
	var wg sync.WaitGroup
	results := make(chan error, 8)
	for range cap(results) {
		wg.Go(func() {
			_, _, err := admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour}})
			results <- err
		})
	}
	wg.Wait()
	close(results)
	made := 0
	for err := range results {
		if err == nil {
			made++
		} else if !errors.Is(err, keyadmin.ErrAlreadyRotated) {
			t.Error(err)
		}
	}
	if made != 1 {
		t.Errorf("%d successors were made", made)
	}
}

// A successor that was lost or leaked is revoked, and the old key needs another: what the first rotation had set is gone.
func TestRotationAfterTheSuccessorWasRevokedStartsAfresh(t *testing.T) {
	admin, _, _ := newAdmin(t)
	old := create(t, admin, request())
	lost := rotate(t, admin, old.ID, keyadmin.Overlap{For: time.Hour})
	if _, err := admin.Revoke(t.Context(), operator, lost.ID); err != nil {
		t.Fatal(err)
	}
	next := rotate(t, admin, old.ID, day(t))
	if got := get(t, admin, old.ID); *got.Successor != next.ID || got.ExpiresAt.Sub(next.CreatedAt) != 24*time.Hour {
		t.Errorf("old key %+v", got)
	}
	if restored, _, err := admin.UndoRotation(t.Context(), operator, old.ID); err != nil || !restored.ExpiresAt.Equal(*old.ExpiresAt) {
		t.Errorf("undone %+v, %v", restored, err)
	}
}

// An undone rotation leaves the successors of earlier ones, which were revoked: they are not undone in their turn.
func TestRevokedSuccessorIsNoRotationToUndo(t *testing.T) {
	for _, overlap := range []keyadmin.Overlap{{For: time.Hour}, {For: time.Hour, OnFirstUse: true}} {
		t.Run(overlap.String(), func(t *testing.T) {
			admin, _, _ := newAdmin(t)
			old := create(t, admin, request())
			lost := rotate(t, admin, old.ID, overlap)
			if _, err := admin.Revoke(t.Context(), operator, lost.ID); err != nil {
				t.Fatal(err)
			}
			_, _, err := admin.UndoRotation(t.Context(), operator, old.ID)
			if set := !overlap.OnFirstUse; set != (err == nil) || !set && !errors.Is(err, keyadmin.ErrNotRotated) {
				t.Errorf("the end of the key was set: %v; undone: %v", set, err)
			}
			lost = rotate(t, admin, old.ID, overlap)
			if _, err := admin.Revoke(t.Context(), operator, lost.ID); err != nil {
				t.Fatal(err)
			}
			rotate(t, admin, old.ID, overlap)
			if restored, _, err := admin.UndoRotation(t.Context(), operator, old.ID); err != nil || !restored.ExpiresAt.Equal(*old.ExpiresAt) {
				t.Errorf("undone %+v, %v", restored, err)
			}
			if _, _, err := admin.UndoRotation(t.Context(), operator, old.ID); !errors.Is(err, keyadmin.ErrNotRotated) {
				t.Errorf("undone again: %v", err)
			}
		})
	}
}

// Of two that wait for the same key, the second must not act on what was before the first.
func TestRotationIsUndoneOnce(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	rotate(t, admin, old.ID, day(t))
	const undos = 2
	done := make(chan error, undos)
	err := store.ChangeOnce(t.Context(), func(tx *keystore.Tx) error {
		if _, err := tx.Lock(t.Context(), keystore.Everything(), old.ID); err != nil {
			return err
		}
		for range undos {
			go func() {
				_, _, err := admin.UndoRotation(t.Context(), operator, old.ID)
				done <- err
			}()
		}
		pgtest.AwaitBlocked(t, databaseURL, undos)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	undone, refused := <-done, <-done
	if undone != nil { // the refusal may be told before the commit that it waited for
		undone, refused = refused, undone
	}
	if undone != nil || !errors.Is(refused, keyadmin.ErrNotRotated) {
		t.Errorf("undone: %v and %v", undone, refused)
	}
}

func TestSameIdempotencyKeyMakesOneSuccessor(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	once := func() (keyadmin.Key, bool, error) {
		return admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: day(t), IdempotencyKey: "deploy-42"})
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	ids, secrets := map[string]int{}, 0
	for range 8 {
		wg.Go(func() {
			key, replayed, err := once()
			mu.Lock()
			defer mu.Unlock()
			if err != nil || replayed != (key.Key == "") || *key.Predecessor != old.ID {
				t.Errorf("replayed %v, %+v, %v", replayed, key, err)
			}
			ids[key.ID]++
			if key.Key != "" {
				secrets++
			}
		})
	}
	wg.Wait()
	if len(ids) != 1 || secrets != 1 {
		t.Errorf("%d successors, shown %d times", len(ids), secrets)
	}
	same := keyadmin.RotateRequest{Overlap: day(t), IdempotencyKey: "deploy-42"}
	if _, _, err := admin.Rotate(t.Context(), keyadmin.Operator("other"), old.ID, same); !errors.Is(err, keyadmin.ErrAlreadyRotated) {
		t.Errorf("another actor: %v", err)
	}
	pgtest.Exec(t, databaseURL, `update rekall.idempotency_keys set created_at = created_at - interval '25 hours'`)
	if _, _, err := once(); !errors.Is(err, keyadmin.ErrAlreadyRotated) {
		t.Errorf("a day later: %v", err)
	}
}

func TestRefusedRotationDoesNotUseUpItsIdempotencyKey(t *testing.T) {
	admin, _, _ := newAdmin(t)
	old := create(t, admin, request())
	first := rotate(t, admin, old.ID, day(t))
	once := func() (keyadmin.Key, bool, error) {
		return admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{Overlap: day(t), IdempotencyKey: "deploy-43"})
	}
	if _, _, err := once(); !errors.Is(err, keyadmin.ErrAlreadyRotated) {
		t.Fatalf("a key with a successor: %v", err)
	}
	if _, err := admin.Revoke(t.Context(), operator, first.ID); err != nil {
		t.Fatal(err)
	}
	if key, replayed, err := once(); err != nil || replayed || key.Key == "" {
		t.Errorf("%v, %+v, %v", replayed, key, err)
	}
}

func TestEndedKeyIsNotRotated(t *testing.T) {
	admin, _, _ := newAdmin(t)
	revoked := create(t, admin, request())
	if _, err := admin.Revoke(t.Context(), operator, revoked.ID); err != nil {
		t.Fatal(err)
	}
	r := request()
	r.ExpiresIn = "1us"
	for _, key := range []keyadmin.Key{revoked, create(t, admin, r)} {
		if _, _, err := admin.Rotate(t.Context(), operator, key.ID, keyadmin.RotateRequest{Overlap: day(t)}); !errors.Is(err, keyadmin.ErrEnded) {
			t.Errorf("%s: %v", key.ID, err)
		}
	}
}

// firstUse is what the flush of a key's first use does, even if it is not the first.
func firstUse(t *testing.T, databaseURL, id string) {
	t.Helper()
	pgtest.Exec(t, databaseURL, `delete from rekall.last_used where key_id = $1`, id)
	pgtest.Exec(t, databaseURL, `insert into rekall.last_used (key_id, first_used_at, last_used_at) values ($1, now(), now())`, id)
}

func TestFirstUseOfTheSuccessorStartsTheGracePeriodOnce(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	next := rotate(t, admin, old.ID, keyadmin.Overlap{For: time.Hour, OnFirstUse: true})
	if *next.OverlapOnFirstUse != "1h" || !get(t, admin, old.ID).ExpiresAt.Equal(*old.ExpiresAt) {
		t.Errorf("before: old %+v, next %+v", get(t, admin, old.ID), next)
	}
	firstUse(t, databaseURL, old.ID)
	firstUse(t, databaseURL, "key_0000000000000000000000")
	if got := get(t, admin, old.ID); !got.ExpiresAt.Equal(*old.ExpiresAt) {
		t.Errorf("the use of another key started it: %+v", got)
	}
	firstUse(t, databaseURL, next.ID)
	ending := get(t, admin, old.ID)
	if left := time.Until(*ending.ExpiresAt); left > time.Hour || left < 50*time.Minute {
		t.Errorf("the old key has %v left", left)
	}
	firstUse(t, databaseURL, next.ID)
	if got := get(t, admin, old.ID); !got.ExpiresAt.Equal(*ending.ExpiresAt) || get(t, admin, next.ID).OverlapOnFirstUse != nil {
		t.Errorf("the second use changed the expiry from %v to %v", ending.ExpiresAt, got.ExpiresAt)
	}
	page, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{KeyID: old.ID, Action: string(keyadmin.KeyGraceStarted)})
	if err != nil || len(page.Entries) != 1 || page.Entries[0].Actor != "system:first-use" {
		t.Errorf("audit %+v, %v", page, err)
	}
	if restored, _, err := admin.UndoRotation(t.Context(), operator, old.ID); err != nil || !restored.ExpiresAt.Equal(*old.ExpiresAt) {
		t.Errorf("undone %+v, %v", restored, err)
	}
}

func TestFirstUseRevivesNoKeyThatHasEnded(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	next := rotate(t, admin, old.ID, keyadmin.Overlap{For: time.Hour, OnFirstUse: true})
	pgtest.Exec(t, databaseURL, `update rekall.api_keys set expires_at = now() - interval '1 second' where id = $1`, old.ID)
	firstUse(t, databaseURL, next.ID)
	if got := get(t, admin, old.ID); got.Status != keyadmin.Expired {
		t.Errorf("old key %+v", got)
	}
}

// Its successor might be used in its place, and its predecessor would wait for ever.
func TestKeyWhoseFirstUseIsAwaitedIsNotRotated(t *testing.T) {
	for name, resolve := range map[string]func(t *testing.T, admin *keyadmin.Admin, databaseURL string, old, next keyadmin.Key){
		"until it is used": func(t *testing.T, admin *keyadmin.Admin, databaseURL string, old, next keyadmin.Key) {
			firstUse(t, databaseURL, next.ID)
			if got := get(t, admin, old.ID); time.Until(*got.ExpiresAt) > time.Hour {
				t.Errorf("old key %+v", got)
			}
		},
		"until nobody waits": func(t *testing.T, admin *keyadmin.Admin, _ string, old, _ keyadmin.Key) {
			if _, err := admin.Revoke(t.Context(), operator, old.ID); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			admin, _, databaseURL := newAdmin(t)
			old := create(t, admin, request())
			next := rotate(t, admin, old.ID, keyadmin.Overlap{For: time.Hour, OnFirstUse: true})
			_, _, err := admin.Rotate(t.Context(), operator, next.ID, keyadmin.RotateRequest{})
			if !errors.Is(err, keyadmin.ErrAwaited) || !strings.Contains(err.Error(), old.ID) {
				t.Errorf("rotated: %v", err)
			}
			if due, err := rotateDue(t, admin, true); err != nil || len(due) != 0 {
				t.Errorf("due: %+v, %v", due, err)
			}
			resolve(t, admin, databaseURL, old, next)
			rotate(t, admin, next.ID, keyadmin.Overlap{})
		})
	}
}

func TestExpiredSuccessorDoesNotKeepTheOldKeyFromBeingRotated(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	expired := rotate(t, admin, old.ID, keyadmin.Overlap{For: time.Hour, OnFirstUse: true})
	pgtest.Exec(t, databaseURL, `update rekall.api_keys set expires_at = now() - interval '1 second' where id = $1`, expired.ID)
	if due, err := rotateDue(t, admin, true); err != nil || len(due) != 1 || due[0].ID != old.ID {
		t.Errorf("due: %+v, %v", due, err)
	}
	due, err := rotateDue(t, admin, false)
	if err != nil || len(due) != 1 || *due[0].Predecessor != old.ID {
		t.Fatalf("rotated: %+v, %v", due, err)
	}
	if got := get(t, admin, old.ID); *got.Successor != due[0].ID || got.ExpiresAt.Sub(due[0].CreatedAt) != 24*time.Hour {
		t.Errorf("old key %+v", got)
	}
	if got := get(t, admin, expired.ID); got.Predecessor != nil || got.OverlapOnFirstUse != nil {
		t.Errorf("expired successor %+v", got)
	}
}

// rotateDue rotates all keys, or only returns them.
func rotateDue(t *testing.T, admin *keyadmin.Admin, dryRun bool) (handed []keyadmin.Key, err error) {
	t.Helper()
	_, err = admin.RotateDue(t.Context(), operator, keyadmin.RotateDueRequest{OlderThan: "0s", Overlap: day(t)}, dryRun, func(key keyadmin.Key) error {
		handed = append(handed, key)
		return nil
	})
	return handed, err
}

func TestOverlapIsReadAsItIsWritten(t *testing.T) {
	for text, want := range map[string]keyadmin.Overlap{
		"": {For: 24 * time.Hour}, "0": {}, "0s": {}, "36h": {For: 36 * time.Hour}, "P2D": {For: 48 * time.Hour},
		"on-first-use": {24 * time.Hour, true}, "on-first-use:2d": {48 * time.Hour, true}, "on-first-use:0": {0, true},
	} {
		got, err := keyadmin.ParseOverlap(text)
		if err != nil || got != want {
			t.Errorf("%q is %+v, %v", text, got, err)
		}
		if again, err := keyadmin.ParseOverlap(got.String()); err != nil || again != want {
			t.Errorf("%q is written %q, which is %+v, %v", text, got, again, err)
		}
	}
	for _, text := range []string{"soon", "-1h", "366d", "on-first-use:", "on-first-use:366d", "on-first-use 1d"} {
		var invalid *keyadmin.InvalidError
		if _, err := keyadmin.ParseOverlap(text); !errors.As(err, &invalid) || invalid.Field != "overlap" {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// due makes keys of which the first are old, and returns them oldest first.
func due(t *testing.T, admin *keyadmin.Admin, databaseURL string, old int) []keyadmin.Key {
	t.Helper()
	var keys []keyadmin.Key
	for i := range old {
		r := request()
		r.Name = strings.Repeat("x", i+1)
		keys = append(keys, create(t, admin, r))
	}
	pgtest.Exec(t, databaseURL, `
		alter table rekall.api_keys disable trigger stamp;
		update rekall.api_keys set created_at = created_at - interval '91 days';
		alter table rekall.api_keys enable always trigger stamp`)
	create(t, admin, request())
	return keys
}

func TestDueKeysAreRotatedOldestFirstAndTheRestIsLeft(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	keys := due(t, admin, databaseURL, 5)
	r := keyadmin.RotateDueRequest{OlderThan: "90d", Overlap: day(t)}
	if _, err := admin.Revoke(t.Context(), operator, keys[1].ID); err != nil {
		t.Fatal(err)
	}
	rotate(t, admin, keys[3].ID, day(t))
	run := func(dryRun bool, fail int) (handed []keyadmin.Key, count int, err error) {
		count, err = admin.RotateDue(t.Context(), operator, r, dryRun, func(key keyadmin.Key) error {
			if len(handed) == fail {
				return errors.New("the terminal is gone")
			}
			handed = append(handed, key)
			return nil
		})
		return handed, count, err
	}
	handed, count, err := run(true, -1)
	if err != nil || count != 3 || handed[0].ID != keys[0].ID || handed[1].ID != keys[2].ID || handed[2].ID != keys[4].ID || handed[0].Key != "" {
		t.Fatalf("dry run: %+v, %d, %v", handed, count, err)
	}
	// The second key cannot be handed out: it stays as it was, and the next run takes it.
	handed, count, err = run(false, 1)
	if err == nil || count != 1 || len(handed) != 1 || *handed[0].Predecessor != keys[0].ID || handed[0].Key == "" {
		t.Fatalf("interrupted: %+v, %d, %v", handed, count, err)
	}
	if got := get(t, admin, keys[2].ID); got.Successor != nil || !got.ExpiresAt.Equal(*keys[2].ExpiresAt) {
		t.Errorf("the key whose successor was lost: %+v", got)
	}
	handed, count, err = run(false, -1)
	if err != nil || count != 2 || *handed[0].Predecessor != keys[2].ID || *handed[1].Predecessor != keys[4].ID {
		t.Errorf("again: %+v, %d, %v", handed, count, err)
	}
	if handed, count, err = run(false, -1); err != nil || count != 0 || len(handed) != 0 {
		t.Errorf("the third time: %+v, %d, %v", handed, count, err)
	}
}

// An age of nothing means all keys that there were, not their successors and those' successors for ever.
func TestRotationOfAllKeysEnds(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	due(t, admin, databaseURL, 3)
	count, err := admin.RotateDue(t.Context(), operator, keyadmin.RotateDueRequest{OlderThan: "0s", Overlap: day(t)}, false,
		func(keyadmin.Key) error { return nil })
	if err != nil || count != 4 {
		t.Errorf("rotated %d keys, %v", count, err)
	}
}

// A terminal that was stopped, or the reader of a pipe, may keep a rotation waiting for ever, and with it all who wait for the key.
func TestReaderWhoStopsReadingDoesNotHoldUpARevocation(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	for what, rotate := range map[string]func(id string, handOut func(keyadmin.Key) error) error{
		"one": func(id string, handOut func(keyadmin.Key) error) error {
			_, _, err := admin.Rotate(t.Context(), operator, id, keyadmin.RotateRequest{Overlap: day(t), HandOut: handOut})
			return err
		},
		"all": func(_ string, handOut func(keyadmin.Key) error) error {
			_, err := admin.RotateDue(t.Context(), operator, keyadmin.RotateDueRequest{OlderThan: "90d"}, false, handOut)
			return err
		},
	} {
		old := due(t, admin, databaseURL, 1)[0]
		shown, read, ended := make(chan keyadmin.Key, 9), make(chan struct{}), make(chan error, 1)
		go func() {
			ended <- rotate(old.ID, func(key keyadmin.Key) error {
				shown <- key
				<-read
				return nil
			})
		}()
		key := <-shown
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		_, err := admin.RevokeMany(ctx, operator, keyadmin.Selection{Account: old.Account}, false)
		cancel()
		if err != nil || get(t, admin, old.ID).Status != keyadmin.Revoked {
			t.Errorf("%s: the revocation waits: %v", what, err)
		}
		close(read)
		if err := <-ended; err == nil || !strings.Contains(err.Error(), key.ID+" was shown") {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := admin.Get(t.Context(), operator, key.ID); !errors.Is(err, keyadmin.ErrNotFound) {
			t.Errorf("%s: a key that was not read in time is in force: %v", what, err)
		}
	}
}

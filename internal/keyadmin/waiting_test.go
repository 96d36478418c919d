package keyadmin_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// held is a key that another transaction holds, as a slow reader of a rotation's output does.
type held struct {
	t  *testing.T
	tx pgx.Tx
}

func hold(t *testing.T, databaseURL, id string) *held {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h := &held{t, tx}
	h.exec(`select from rekall.api_keys where id = $1 for no key update`, id)
	return h
}

func (h *held) exec(sql string, args ...any) {
	h.t.Helper()
	if _, err := h.tx.Exec(h.t.Context(), sql, args...); err != nil {
		h.t.Fatal(err)
	}
}

func (h *held) release() {
	h.t.Helper()
	if err := h.tx.Commit(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
}

// TestKeyThatEndsWhileAChangeWaitsForItHasEnded: the clock of a transaction stands still at its beginning.
func TestKeyThatEndsWhileAChangeWaitsForItHasEnded(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	lasting := request()
	lasting.ExpiresIn, lasting.ManageKeys = "", true
	for name, change := range map[string]struct {
		prepare func(key keyadmin.Key)
		do      func(key keyadmin.Key, as keyadmin.Actor) error
	}{
		"undo a rotation": {
			func(key keyadmin.Key) { rotate(t, admin, key.ID, day(t)) },
			func(key keyadmin.Key, _ keyadmin.Actor) error {
				_, _, err := admin.UndoRotation(context.Background(), operator, key.ID)
				return err
			},
		},
		"rotate again": {
			func(key keyadmin.Key) {
				if _, err := admin.Revoke(t.Context(), operator, rotate(t, admin, key.ID, day(t)).ID); err != nil {
					t.Fatal(err)
				}
			},
			func(key keyadmin.Key, _ keyadmin.Actor) error {
				_, _, err := admin.Rotate(context.Background(), operator, key.ID, keyadmin.RotateRequest{Overlap: keyadmin.Overlap{For: time.Hour, OnFirstUse: true}})
				return err
			},
		},
		"have it make a key": {
			func(keyadmin.Key) {},
			func(_ keyadmin.Key, as keyadmin.Actor) error {
				_, _, err := admin.Create(context.Background(), as, lasting)
				return err
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			key := create(t, admin, lasting)
			change.prepare(key)
			as := managing(t, store, key)
			other := hold(t, databaseURL, key.ID)
			done := make(chan error, 1)
			go func() { done <- change.do(key, as) }()
			pgtest.AwaitBlocked(t, databaseURL, 1)
			other.exec(`update rekall.api_keys set expires_at = clock_timestamp() where id = $1`, key.ID)
			other.release()
			if err := <-done; err == nil {
				t.Error("a key that had ended was taken for one that lives")
			}
			if now := get(t, admin, key.ID); now.Status != keyadmin.Expired {
				t.Errorf("it lives again: %+v", now)
			}
		})
	}
}

// TestUndoRevokesTheSuccessorThatLives: one whose transaction began before that of a revoked one is not the newest by its time.
func TestUndoRevokesTheSuccessorThatLives(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	r := request()
	r.ManageKeys = true
	manager, old := create(t, admin, r), create(t, admin, r)
	as := managing(t, store, manager)
	other := hold(t, databaseURL, manager.ID)
	var second keyadmin.Key
	done := make(chan error, 1)
	go func() {
		var err error
		second, _, err = admin.Rotate(context.Background(), as, old.ID, keyadmin.RotateRequest{Overlap: day(t)})
		done <- err
	}()
	pgtest.AwaitBlocked(t, databaseURL, 1)
	first := rotate(t, admin, old.ID, day(t))
	if _, err := admin.Revoke(t.Context(), operator, first.ID); err != nil {
		t.Fatal(err)
	}
	other.release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if now := get(t, admin, old.ID); *now.Successor != second.ID {
		t.Errorf("successor %s, want %s", *now.Successor, second.ID)
	}
	if _, _, err := admin.UndoRotation(t.Context(), operator, old.ID); err != nil {
		t.Fatal(err)
	}
	if now := get(t, admin, second.ID); now.Status != keyadmin.Revoked {
		t.Errorf("the rotation is undone, and its successor %+v", now)
	}
	if _, _, err := admin.UndoRotation(t.Context(), operator, old.ID); !errors.Is(err, keyadmin.ErrNotRotated) {
		t.Errorf("undone twice: %v", err)
	}
}

// TestSuccessorThatIsGivenItsExpiryBackIsStillTheSuccessor: it may seem to have ended while its own rotation is being undone.
func TestSuccessorThatIsGivenItsExpiryBackIsStillTheSuccessor(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	old := create(t, admin, request())
	successor := rotate(t, admin, old.ID, day(t))
	rotate(t, admin, successor.ID, keyadmin.Overlap{})
	undoing := hold(t, databaseURL, successor.ID)
	undoing.exec(`update rekall.api_keys set expires_at = prior_expires_at, prior_expires_at = null, grace_started_at = null where id = $1`, successor.ID)
	done := make(chan error, 1)
	go func() {
		_, _, err := admin.Rotate(context.Background(), operator, old.ID, keyadmin.RotateRequest{Overlap: day(t)})
		done <- err
	}()
	pgtest.AwaitBlocked(t, databaseURL, 1)
	undoing.release()
	if err := <-done; !errors.Is(err, keyadmin.ErrAlreadyRotated) {
		t.Errorf("the old key is rotated again: %v", err)
	}
}

// TestRequestsAtOnceMakeNoMoreKeysADayThanTheAccountMay: none of them sees what the others have not committed yet.
func TestRequestsAtOnceMakeNoMoreKeysADayThanTheAccountMay(t *testing.T) {
	unlimited, _, databaseURL := newAdmin(t)
	admin := unlimited.Limited(1)
	other := hold(t, databaseURL, create(t, unlimited, request()).ID)
	other.exec(`lock table rekall.audit in share mode`) // which comes after the key
	const requests = 3
	done := make(chan error, requests)
	for n := range requests {
		go func() { // each of another person: one's own take turns
			_, _, err := admin.Create(context.Background(), must(keyadmin.Person(fmt.Sprint("ann", n), "acme")), request())
			done <- err
		}()
	}
	pgtest.AwaitBlocked(t, databaseURL, requests)
	other.release()
	made := 0
	for range requests {
		var tooMany *keyadmin.TooManyError
		switch err := <-done; {
		case err == nil:
			made++
		case !errors.As(err, &tooMany):
			t.Error(err)
		}
	}
	if made != 1 {
		t.Errorf("%d keys were made, not 1", made)
	}
}

// TestManagingKeyGrantsOnlyWhatItHasInPostgresNow: an edge may not have heard yet that it has less than when it was found there.
func TestManagingKeyGrantsOnlyWhatItHasInPostgresNow(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	r := request()
	r.ManageKeys = true
	manager := create(t, admin, r)
	actor := managing(t, store, manager)
	granted := request()
	for name, set := range map[string]string{
		"fewer scopes":          `scopes = '{memories:read}'`,
		"no key is managed":     `manage_keys = false`,
		"all that it had again": `scopes = '{memories:read,memories:write}', manage_keys = true`,
	} {
		pgtest.Exec(t, databaseURL, `update rekall.api_keys set scopes = '{memories:read,memories:write}', manage_keys = true where id = '`+manager.ID+`'`)
		pgtest.Exec(t, databaseURL, `update rekall.api_keys set `+set+` where id = '`+manager.ID+`'`)
		_, _, err := admin.Create(t.Context(), actor, granted)
		var forbidden *keyadmin.ForbiddenError
		if may := name == "all that it had again"; may != (err == nil) || !may && !errors.As(err, &forbidden) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestKeysAreRevokedAndRotatedThoughAnEdgeThatWasTakenOverLocksItsTables, by whoever may.
func TestKeysAreRevokedAndRotatedThoughAnEdgeThatWasTakenOverLocksItsTables(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	r := request()
	r.ManageKeys = true
	manager, used, other := create(t, admin, r), create(t, admin, request()), create(t, admin, request())
	create(t, admin, request()) // to be rotated
	as := managing(t, store, manager)
	pgtest.LockAsEdge(t, databaseURL)
	for _, revocation := range []struct {
		by keyadmin.Actor
		id string
	}{{operator, other.ID}, {as, used.ID}, {as, manager.ID}} {
		ctx, cancel := context.WithTimeout(t.Context(), keyadmin.AnswerWithin)
		key, err := admin.Revoke(ctx, revocation.by, revocation.id)
		cancel()
		if err != nil || key.Status != keyadmin.Revoked || !key.LastUseUnknown {
			t.Errorf("by %s: %+v, %v", revocation.by, key, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), keyadmin.AnswerWithin)
	defer cancel()
	due := keyadmin.RotateDueRequest{OlderThan: "1us", Overlap: keyadmin.Overlap{For: time.Hour}}
	if n, err := admin.RotateDue(ctx, operator, due, false, func(keyadmin.Key) error { return nil }); n != 1 || err != nil {
		t.Errorf("%d keys rotated, %v", n, err)
	}
}

// TestWhoeverReadsWhatAnEdgeThatWasTakenOverHasLockedLeavesAConnection to those who revoke: all accounts wait for one lock.
func TestWhoeverReadsWhatAnEdgeThatWasTakenOverHasLockedLeavesAConnection(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	revoked, key := create(t, admin, request()), create(t, admin, request())
	if _, err := admin.Revoke(t.Context(), operator, revoked.ID); err != nil {
		t.Fatal(err)
	}
	pgtest.LockAsEdge(t, databaseURL)
	flood, stop := context.WithCancel(t.Context())
	var requests sync.WaitGroup
	defer requests.Wait()
	defer stop()
	for n := range 4 {
		customer := must(keyadmin.Person("ann", fmt.Sprint("account", n)))
		requests.Go(func() { _, _ = admin.List(flood, customer, keyadmin.ListRequest{}) })
		requests.Go(func() { _ = admin.WaitRevoked(flood, revoked.ID, func(keyadmin.Confirmation) {}) })
	}
	pgtest.AwaitBlocked(t, databaseURL, 3)
	ctx, cancel := context.WithTimeout(t.Context(), keyadmin.AnswerWithin)
	defer cancel()
	if _, err := admin.Revoke(ctx, must(keyadmin.Person("bob", "acme")), key.ID); err != nil {
		t.Error(err)
	}
}

// TestReadsNewKeysAndReportsThatWaitForLocksLeaveAConnection to those who revoke, and each a place to the others: any user of the database can
// take the lock under which the new keys of an account are counted, and an edge's role that of a rotation and those of its tables.
func TestReadsNewKeysAndReportsThatWaitForLocksLeaveAConnection(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	store, err := keystore.Open(databaseURL, keystore.Options{MaxConns: keyadmin.Connections, ConnectTimeout: pgtest.ConnectTimeout})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	limited := keyadmin.New(store).Limited(10)
	locked, key := create(t, admin, request()), create(t, admin, request())
	pgtest.LockAsEdge(t, databaseURL)
	lock := hold(t, databaseURL, locked.ID)
	lock.exec(`select pg_advisory_xact_lock(hashtextextended('rekall: keys made by account' || n, 0)) from generate_series(0, 3) n`)
	flood, stop := context.WithCancel(t.Context())
	var requests sync.WaitGroup
	defer requests.Wait()
	defer stop()
	blocked := 0
	for _, kind := range []struct {
		places int
		ask    func(customer keyadmin.Actor, account string)
	}{
		{3, func(customer keyadmin.Actor, _ string) { _, _ = limited.List(flood, customer, keyadmin.ListRequest{}) }},
		{3, func(customer keyadmin.Actor, account string) {
			r := request()
			r.Account = account
			_, _, _ = limited.Create(flood, customer, r)
		}},
		{1, func(keyadmin.Actor, string) { _, _ = limited.Leaked(flood, "192.0.2.1", []string{locked.Key.Reveal()}) }},
	} {
		for n := range 4 {
			account := fmt.Sprint("account", n)
			requests.Go(func() { kind.ask(must(keyadmin.Person("ann", account)), account) })
		}
		blocked += kind.places
		pgtest.AwaitBlocked(t, databaseURL, blocked)
	}
	ctx, cancel := context.WithTimeout(t.Context(), keyadmin.AnswerWithin)
	defer cancel()
	if _, err := limited.Revoke(ctx, must(keyadmin.Person("bob", "acme")), key.ID); err != nil {
		t.Error(err)
	}
	stop()
	requests.Wait()
	lock.release()
}

// TestReadsThatWaitForALockLeaveTheirActorAndItsAccountATurnToRevoke, and another account one to read.
func TestReadsThatWaitForALockLeaveTheirActorAndItsAccountATurnToRevoke(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	ann, bob, other := must(keyadmin.Person("ann", "acme")), must(keyadmin.Person("bob", "acme")), must(keyadmin.Person("ann", "other"))
	keys := []keyadmin.Key{create(t, admin, request()), create(t, admin, request())}
	pgtest.LockAsEdge(t, databaseURL)
	flood, stop := context.WithCancel(t.Context())
	var requests sync.WaitGroup
	defer requests.Wait()
	defer stop()
	read := func(actor keyadmin.Actor) {
		requests.Go(func() { _, _ = admin.List(flood, actor, keyadmin.ListRequest{}) })
	}
	for range 3 {
		read(ann)
		read(bob)
	}
	pgtest.AwaitBlocked(t, databaseURL, 2)
	for i, actor := range []keyadmin.Actor{ann, bob} {
		ctx, cancel := context.WithTimeout(t.Context(), keyadmin.AnswerWithin)
		if _, err := admin.Revoke(ctx, actor, keys[i].ID); err != nil {
			t.Errorf("%s: %v", actor, err)
		}
		cancel()
	}
	read(other)
	pgtest.AwaitBlocked(t, databaseURL, 3)
}

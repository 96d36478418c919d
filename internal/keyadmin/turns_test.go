package keyadmin_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// TestRequestsOfOneActorLeaveOthersTheirTurn: whoever has stolen a key must not keep its owner from revoking it, nor, with others that were
// made with it, those of other accounts from revoking theirs.
func TestRequestsOfOneActorLeaveOthersTheirTurn(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	r := request()
	r.ManageKeys = true
	stolen, made, good := create(t, admin, r), create(t, admin, r), create(t, admin, r)
	thief, owner := managing(t, store, stolen), managing(t, store, good)
	ann, bob, stranger := must(keyadmin.Person("ann", "acme")), must(keyadmin.Person("bob", "acme")), must(keyadmin.Person("ann", "other"))
	for name, tc := range map[string]struct {
		flooding, others []keyadmin.Actor
		asking           int // at once
	}{
		"a key":                 {[]keyadmin.Actor{thief}, []keyadmin.Actor{owner, bob, stranger}, 2},
		"a person":              {[]keyadmin.Actor{ann}, []keyadmin.Actor{owner, bob, stranger}, 2},
		"a key and one it made": {[]keyadmin.Actor{thief, managing(t, store, made)}, []keyadmin.Actor{stranger}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			other := hold(t, databaseURL, stolen.ID)
			flood, stop := context.WithCancel(context.Background())
			defer stop()
			var requests sync.WaitGroup
			for n := range 10 {
				for _, actor := range tc.flooding {
					requests.Go(func() { _, _ = admin.Rename(flood, actor, stolen.ID, fmt.Sprint(name, n)) })
				}
			}
			pgtest.AwaitBlocked(t, databaseURL, tc.asking)
			for _, actor := range tc.others {
				ctx, cancel := context.WithTimeout(t.Context(), keyadmin.AnswerWithin)
				if _, err := admin.List(ctx, actor, keyadmin.ListRequest{WithTotal: true}); err != nil {
					t.Errorf("%s: %v", actor, err)
				}
				cancel()
			}
			late, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := admin.Get(late, tc.flooding[0], stolen.ID); !errors.Is(err, keyadmin.ErrCrowded) {
				t.Errorf("one that has no more time to wait for its turn: %v", err)
			}
			if _, err := admin.Get(late, stranger, stolen.ID); err == nil || errors.Is(err, keyadmin.ErrCrowded) {
				t.Errorf("one that has no more time, and nobody of its own before it: %v", err)
			}
			if _, err := admin.Manager(late, good.ID, "acme"); errors.Is(err, keyadmin.ErrCrowded) != (tc.asking == 3) {
				t.Errorf("a session of its account, of which %d ask, is let through with %v", tc.asking, err)
			}
			if _, err := admin.Manager(late, good.ID, "other"); err == nil || errors.Is(err, keyadmin.ErrCrowded) {
				t.Errorf("a session of another account: %v", err)
			}
			stop()
			requests.Wait()
			other.release()
			if _, err := admin.Rename(t.Context(), tc.flooding[0], stolen.ID, "Renamed by "+name); err != nil {
				t.Errorf("after the flood: %v", err)
			}
		})
	}
}

// TestAnswersThatNobodyReadsLeaveOthersTheirTurn, and their own actor one to revoke.
func TestAnswersThatNobodyReadsLeaveOthersTheirTurn(t *testing.T) {
	admin, _, _ := newAdmin(t)
	ann, bob, carl := must(keyadmin.Person("ann", "acme")), must(keyadmin.Person("bob", "acme")), must(keyadmin.Person("carl", "acme"))
	stranger := must(keyadmin.Person("ann", "other"))
	late, cancel := context.WithCancel(t.Context())
	cancel()
	for name, turn := range map[string]func(context.Context, keyadmin.Actor) (func(), error){"answers": admin.TurnToAnswer, "pages": admin.TurnToShow} {
		var ends []func()
		take := func(actor keyadmin.Actor, free bool) {
			t.Helper()
			end, err := turn(late, actor)
			switch {
			case err == nil:
				ends = append(ends, end)
			case !errors.Is(err, keyadmin.ErrCrowded):
				t.Error(err)
			}
			if free != (err == nil) {
				t.Errorf("%s of %s: %v", name, actor, err)
			}
		}
		for _, actor := range []keyadmin.Actor{ann, bob} {
			for range 4 {
				take(actor, true)
			}
			take(actor, false)
		}
		take(carl, false)
		take(stranger, true)
		if _, err := admin.Revoke(t.Context(), ann, create(t, admin, request()).ID); err != nil {
			t.Error(err)
		}
		for _, end := range ends {
			end()
		}
		take(carl, true)
	}
}

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

// TestRequestsOfOneActorLeaveOthersTheirTurn: whoever has stolen a key must not keep its owner from revoking it, nor anybody else.
func TestRequestsOfOneActorLeaveOthersTheirTurn(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	r := request()
	r.ManageKeys = true
	stolen, good := create(t, admin, r), create(t, admin, r)
	owners := []keyadmin.Actor{managing(t, store, good), must(keyadmin.Person("ann", "other")), must(keyadmin.Person("bob", "acme"))}
	for name, actor := range map[string]keyadmin.Actor{"key": managing(t, store, stolen), "person": must(keyadmin.Person("ann", "acme"))} {
		t.Run(name, func(t *testing.T) {
			other := hold(t, databaseURL, stolen.ID)
			flood, stop := context.WithCancel(context.Background())
			defer stop()
			var requests sync.WaitGroup
			for n := range 10 {
				requests.Go(func() { _, _ = admin.Rename(flood, actor, stolen.ID, fmt.Sprint(name, n)) })
			}
			pgtest.AwaitBlocked(t, databaseURL, 2)
			for _, owner := range owners {
				ctx, cancel := context.WithTimeout(t.Context(), keyadmin.AnswerWithin)
				if _, err := admin.List(ctx, owner, keyadmin.ListRequest{WithTotal: true}); err != nil {
					t.Errorf("%s: %v", owner, err)
				}
				cancel()
			}
			late, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := admin.Get(late, actor, stolen.ID); !errors.Is(err, keyadmin.ErrCrowded) {
				t.Errorf("one that has no more time to wait for its turn: %v", err)
			}
			stop()
			requests.Wait()
			other.release()
			if _, err := admin.Rename(t.Context(), actor, stolen.ID, "Renamed by "+name); err != nil {
				t.Errorf("after the flood: %v", err)
			}
		})
	}
}

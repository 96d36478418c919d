package keyadmin

import (
	"context"
	"fmt"
	"sync"
)

// atATime is how many requests of one actor ask the database at once: half of a store's connections.
const atATime = 2

// turns has the requests of each actor wait for each other, and not those of others for them: there are few connections, which are given
// in the order in which they are asked for. Whoever holds one key could keep the owners of all others from revoking theirs, by requests
// that queue for its row, say.
type turns struct {
	mu sync.Mutex
	of map[string]*queue // by actor; of those who wait or ask now
}

type queue struct {
	places chan struct{}
	in     int // who hold a place or wait for one
}

// take waits for a turn of an actor, whose end must be told.
func (t *turns) take(ctx context.Context, actor string) (end func(), err error) {
	q := t.join(actor)
	select {
	case q.places <- struct{}{}:
		return func() { <-q.places; t.leave(actor, q) }, nil
	case <-ctx.Done():
		t.leave(actor, q)
		return nil, fmt.Errorf("%w: %w", ErrCrowded, ctx.Err())
	}
}

func (t *turns) join(actor string) *queue {
	t.mu.Lock()
	defer t.mu.Unlock()
	q := t.of[actor]
	if q == nil {
		q = &queue{places: make(chan struct{}, atATime)}
		t.of[actor] = q
	}
	q.in++
	return q
}

func (t *turns) leave(actor string, q *queue) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if q.in--; q.in == 0 {
		delete(t.of, actor)
	}
}

// turn is take for those who come by the network. Operators have connections of their own.
func (a *Admin) turn(ctx context.Context, actor Actor) (end func(), err error) {
	switch actor.rank {
	case key:
		return a.turns.take(ctx, actor.name)
	case person: // whose name may be another's in another account
		return a.turns.take(ctx, actor.account+"\n"+actor.name)
	case nobody, operator:
	}
	return func() {}, nil
}

package keyadmin

import (
	"context"
	"fmt"
	"sync"
)

// How many requests of one actor, and of all in one account, ask the database at once. A store has four connections. Whoever has stolen a key
// may make others with it, each with turns of its own: so each account leaves a connection to the others.
const (
	ofActor   = 2
	ofAccount = 3
)

// ofReaders is how many requests of all read at once what edges write: an edge's role can lock it, and they all wait. One connection is left
// to whoever revokes a key.
const ofReaders = 3

// turns has the requests of each actor wait for each other, and not those of others for them: there are few connections, which are given
// in the order in which they are asked for. Whoever holds one key could keep the owners of all others from revoking theirs, by requests
// that queue for its row, say.
type turns struct {
	mu sync.Mutex
	of map[string]*queue // by actor and by account; of those who wait or ask now
}

type queue struct {
	places chan struct{}
	in     int // who hold a place or wait for one
}

// take waits for one of so many places of an actor or an account. The end must be told.
func (t *turns) take(ctx context.Context, whose string, places int) (end func(), err error) {
	q := t.join(whose, places)
	end = func() { <-q.places; t.leave(whose, q) }
	select {
	case q.places <- struct{}{}: // even if ctx is done: nobody was in the way
		return end, nil
	default:
	}
	select {
	case q.places <- struct{}{}:
		return end, nil
	case <-ctx.Done():
		t.leave(whose, q)
		return nil, fmt.Errorf("%w: %w", ErrCrowded, ctx.Err())
	}
}

func (t *turns) join(whose string, places int) *queue {
	t.mu.Lock()
	defer t.mu.Unlock()
	q := t.of[whose]
	if q == nil {
		q = &queue{places: make(chan struct{}, places)}
		t.of[whose] = q
	}
	q.in++
	return q
}

func (t *turns) leave(whose string, q *queue) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if q.in--; q.in == 0 {
		delete(t.of, whose)
	}
}

// turn waits for a turn of those who come by the network. Operators have connections of their own.
func (a *Admin) turn(ctx context.Context, actor Actor) (end func(), err error) {
	own := actor.name
	switch actor.rank {
	case key:
	case person: // whose name may be another's in another account
		own = actor.account + "\n" + actor.name
	case nobody, operator:
		return func() {}, nil
	}
	endOwn, err := a.turns.take(ctx, own, ofActor)
	if err != nil {
		return nil, err
	}
	endAll, err := a.turns.take(ctx, "\n"+actor.account, ofAccount) // as no actor's begins
	if err != nil {
		endOwn()
		return nil, err
	}
	return func() { endAll(); endOwn() }, nil
}

// turnToRead is turn for what edges write.
func (a *Admin) turnToRead(ctx context.Context, actor Actor) (end func(), err error) {
	endTurn, err := a.turn(ctx, actor)
	if err != nil {
		return nil, err
	}
	endReading, err := a.turns.take(ctx, "readers", ofReaders)
	if err != nil {
		endTurn()
		return nil, fmt.Errorf("wait to read what edges write: %w", ctx.Err()) // which is not the actor's doing
	}
	return func() { endReading(); endTurn() }, nil
}

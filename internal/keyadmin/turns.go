package keyadmin

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// line is what requests wait in: of each kind one for each actor, or each account, or one for all.
type line struct {
	kind  lineKind
	whose string
}

type lineKind uint8

const (
	ofActor lineKind = iota
	ofAccount
	readsOfActor
	readsOfAccount
	reads   // of all
	newKeys // of all
	leaks   // of all
	answersOfActor
	answersOfAccount
	pagesOfActor
	pagesOfAccount
)

// Connections are what the store of those who come by the network needs: as many as the lines of all have places, and one to revoke by.
const Connections = 3 + 3 + 1 + 1

// places are how many requests of a line ask the database at once. Its connections are given in the order in which they are asked for. Whoever holds a key could keep the owners of all others from revoking theirs, by requests that queue for its row,
// say, and with others that it made those of other accounts.
//
// Reads are those of what edges write: an edge's role can lock it, and they all wait. They leave a place to change keys with to each actor
// and each account.
//
// In a line of all wait those whom locks of others may hold up: reads; new keys, by the lock under which those of an account are counted,
// which any user of the database can take; and reports of leaked keys, which may be of a rotation that an edge has locked. None of the
// three waits for another, and they leave a connection to those who revoke.
//
// Answers are the long ones of the API, and pages those of the dashboard: a client that does not read has them held in memory. Changes of
// keys make none, and whoever crowds the API out keeps nobody from seeing on the dashboard what to revoke.
var places = [...]int{
	ofActor: 2, ofAccount: 3, readsOfActor: 1, readsOfAccount: 2, reads: 3, newKeys: 3, leaks: 1,
	answersOfActor: 4, answersOfAccount: 8, pagesOfActor: 4, pagesOfAccount: 8,
}

// turns has the requests of each actor, and of each account, wait for each other, and not those of others for them.
type turns struct {
	mu sync.Mutex
	of map[line]*queue // of those who wait or ask now
}

type queue struct {
	places chan struct{}
	in     int // who hold a place or wait for one
}

// take waits for a place in each of the lines, whose end must be told. All take them in the same order.
func (t *turns) take(ctx context.Context, lines ...line) (end func(), err error) {
	var ends []func()
	end = func() {
		for _, end := range slices.Backward(ends) {
			end()
		}
	}
	for _, l := range lines {
		endOne, err := t.takeOne(ctx, l)
		if err != nil {
			end()
			return nil, err
		}
		ends = append(ends, endOne)
	}
	return end, nil
}

func (t *turns) takeOne(ctx context.Context, l line) (end func(), err error) {
	q := t.join(l)
	end = func() { <-q.places; t.leave(l, q) }
	select {
	case q.places <- struct{}{}: // even if ctx is done: nobody was in the way
		return end, nil
	default:
	}
	select {
	case q.places <- struct{}{}:
		return end, nil
	case <-ctx.Done():
	}
	t.leave(l, q)
	if l.whose == "" { // a line of all, which is not the actor's doing
		return nil, fmt.Errorf("wait for those whom locks hold up: %w", ctx.Err())
	}
	return nil, fmt.Errorf("%w: %w", ErrCrowded, ctx.Err())
}

func (t *turns) join(l line) *queue {
	t.mu.Lock()
	defer t.mu.Unlock()
	q := t.of[l]
	if q == nil {
		q = &queue{places: make(chan struct{}, places[l.kind])}
		t.of[l] = q
	}
	q.in++
	return q
}

func (t *turns) leave(l line, q *queue) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if q.in--; q.in == 0 {
		delete(t.of, l)
	}
}

// turn waits for a turn of those who come by the network. Operators have connections of their own.
func (a *Admin) turn(ctx context.Context, actor Actor) (end func(), err error) {
	return a.turns.take(ctx, actor.lines(ofActor, ofAccount)...)
}

// turnToRead is turn for what edges write.
func (a *Admin) turnToRead(ctx context.Context, actor Actor) (end func(), err error) {
	lines := append(actor.lines(readsOfActor, readsOfAccount), actor.lines(ofActor, ofAccount)...)
	return a.turns.take(ctx, append(lines, line{kind: reads})...)
}

// turnToMake is turn for a new key.
func (a *Admin) turnToMake(ctx context.Context, actor Actor) (end func(), err error) {
	return a.turns.take(ctx, append(actor.lines(ofActor, ofAccount), line{kind: newKeys})...)
}

// TurnToAnswer waits for a turn to make a long answer, whose end must be told once its client has read it. It comes before turns at the
// database.
func (a *Admin) TurnToAnswer(ctx context.Context, actor Actor) (end func(), err error) {
	return a.turns.take(ctx, actor.lines(answersOfActor, answersOfAccount)...)
}

// TurnToShow is TurnToAnswer for a page.
func (a *Admin) TurnToShow(ctx context.Context, actor Actor) (end func(), err error) {
	return a.turns.take(ctx, actor.lines(pagesOfActor, pagesOfAccount)...)
}

// lines are those that the actor's requests wait in, and all of its account; an operator's wait for nobody.
func (a Actor) lines(own, all lineKind) []line {
	switch a.rank {
	case key:
		return []line{{own, a.name}, {all, a.account}}
	case person: // whose name may be another's in another account
		return []line{{own, a.account + "\n" + a.name}, {all, a.account}}
	case nobody, operator:
	}
	return nil
}

package dashboard

import (
	"context"
	"crypto/sha256"
	"sync"
	"time"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

const (
	// watchFor is how long a revocation may take to hold everywhere, and a little.
	watchFor = 65 * time.Second

	// maxWatches bounds what a flood of revocations costs: each asks Postgres 50 times a second. Those beyond it are in force
	// all the same, but nobody looks on.
	maxWatches = 20
)

// State is what lives between requests: who signed in with a key, and the revocations whose edges are being watched.
type State struct {
	admin    *keyadmin.Admin
	sessions sessions
	ctx      context.Context
	cancel   context.CancelFunc
	running  sync.WaitGroup

	mu      sync.Mutex
	watches map[string]*watch
}

// NewState returns a State, to be closed.
func NewState(admin *keyadmin.Admin) *State {
	s := &State{admin: admin, watches: map[string]*watch{}}
	s.sessions = sessions{now: time.Now, byID: map[[sha256.Size]byte]*session{}, ofKey: map[string]map[[sha256.Size]byte]*session{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Close ends the watches and forgets the sessions. No request may come after it.
func (s *State) Close() {
	s.cancel()
	s.running.Wait()
}

// watch is what the edges have said of one revocation so far.
type watch struct {
	mu        sync.Mutex
	confirmed []keyadmin.Confirmation
	ended     bool
	err       error
}

// watchRevocation begins to watch the edges, unless somebody does or too many are watched. The delay of an edge is known to
// who is looking when it reports only.
func (s *State) watchRevocation(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watches[id] != nil || len(s.watches) >= maxWatches || s.ctx.Err() != nil {
		return
	}
	w := new(watch)
	s.watches[id] = w
	s.running.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, watchFor)
		defer cancel()
		err := s.admin.WaitRevoked(ctx, id, func(c keyadmin.Confirmation) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.confirmed = append(w.confirmed, c)
		})
		w.mu.Lock()
		w.ended, w.err = true, err
		w.mu.Unlock()
		s.forgetLater(id)
	})
}

// forgetLater keeps what was seen until everybody who looked on has seen it.
func (s *State) forgetLater(id string) {
	select {
	case <-time.After(watchFor):
	case <-s.ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.watches, id)
}

// seen returns what the edges have said of a revocation so far. watched is false if nobody looks on.
func (s *State) seen(id string) (confirmed []keyadmin.Confirmation, ended, watched bool) {
	s.mu.Lock()
	w := s.watches[id]
	s.mu.Unlock()
	if w == nil {
		return nil, false, false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]keyadmin.Confirmation(nil), w.confirmed...), w.ended && w.err == nil, w.err == nil
}

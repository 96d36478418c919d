package dashboard

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/outage"
)

const (
	// watchFor is how long a revocation may take to hold everywhere, and a little.
	watchFor = 65 * time.Second

	// maxWatches bounds what a flood of revocations costs: each that goes on asks Postgres 50 times in its first second, and 4
	// times a second later. Those beyond it are in force all the same, but nobody looks on.
	maxWatches = 20
)

// State is what lives between requests: who signed in with a key, and the revocations whose edges are being watched.
type State struct {
	admin    *keyadmin.Admin
	sessions sessions
	ctx      context.Context
	cancel   context.CancelFunc
	running  sync.WaitGroup

	mu           sync.Mutex
	watches      map[string]*watch
	readingUsage outage.Kind
	listingEdges outage.Kind
}

// NewState returns a State, to be closed.
func NewState(admin *keyadmin.Admin) *State {
	s := &State{admin: admin, watches: map[string]*watch{}}
	s.readingUsage = outage.Kind{Begins: "the dashboard cannot read usage", Over: "the dashboard can read usage again", Level: zap.WarnLevel}
	s.listingEdges = outage.Kind{Begins: "the dashboard cannot list edges", Over: "the dashboard can list edges again", Level: zap.WarnLevel}
	s.sessions = sessions{now: time.Now, byID: map[[sha256.Size]byte]*session{}, ofKey: map[string]map[[sha256.Size]byte]*session{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Close ends the watches and forgets the sessions. No request may come after it.
func (s *State) Close() {
	s.cancel()
	s.running.Wait()
}

// note takes how something has ended that a page does not fail with, and that a live one does every second. What ended through its visitor
// tells nothing.
func (s *State) note(what *outage.Kind, logger *zap.Logger, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, keyadmin.ErrCrowded) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	failures := outage.Failures{Logger: func() *zap.Logger { return logger }}
	if err != nil {
		err = errors.New(apikey.Redact(err.Error()))
	}
	failures.Note(what, err)
}

// watch is what the edges have said of one revocation so far.
type watch struct {
	confirmed []keyadmin.Confirmation
	ended     time.Time // zero: it goes on
}

// watchRevocation begins to watch the edges, unless somebody does or too many are watched. atOnce says that the revocation was
// committed just now: who begins to watch later cannot know when an edge first had it.
func (s *State) watchRevocation(id string, atOnce bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	running := 0
	for other, w := range s.watches {
		if w.ended.IsZero() {
			running++
		} else if time.Since(w.ended) > watchFor { // whoever looked on has seen it
			delete(s.watches, other)
		}
	}
	if s.watches[id] != nil || running >= maxWatches || s.ctx.Err() != nil {
		return
	}
	w := new(watch)
	s.watches[id] = w
	s.running.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, watchFor)
		defer cancel()
		err := s.admin.WaitRevoked(ctx, id, func(c keyadmin.Confirmation) {
			if !atOnce {
				c.DelaySeconds = 0
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			w.confirmed = append(w.confirmed, c)
		})
		s.mu.Lock()
		defer s.mu.Unlock()
		w.ended = time.Now()
		if err != nil {
			delete(s.watches, id) // the next look begins anew
		}
	})
}

// seen returns what the edges have said of a revocation so far. watched is false if nobody looks on.
func (s *State) seen(id string) (confirmed []keyadmin.Confirmation, ended, watched bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.watches[id]
	if w == nil {
		return nil, false, false
	}
	return slices.Clone(w.confirmed), !w.ended.IsZero(), true
}

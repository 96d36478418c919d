package dashboard

import "time"

// SetClock replaces the clock of the sessions.
func (s *State) SetClock(now func() time.Time) { s.sessions.now = now }

// SignIn begins a session.
func (s *State) SignIn(keyID string) (id string) { return s.sessions.begin(keyID, "acme", nil) }

// SignedIn reports whether a session goes on.
func (s *State) SignedIn(id string) bool {
	_, _, ok := s.sessions.key(id, true)
	return ok
}

// Sessions counts the sessions.
func (s *State) Sessions() int {
	s.sessions.mu.Lock()
	defer s.sessions.mu.Unlock()
	return len(s.sessions.byID)
}

// Watched reports whether somebody looks on as the edges hear of a revocation.
func (s *State) Watched(id string) bool {
	_, _, watched := s.seen(id)
	return watched
}

package dashboard

import "time"

// SetClock replaces the clock of the sessions.
func (s *State) SetClock(now func() time.Time) { s.sessions.now = now }

// Sessions counts the sessions.
func (s *State) Sessions() int {
	s.sessions.mu.Lock()
	defer s.sessions.mu.Unlock()
	return len(s.sessions.byID)
}

package keysapi

import "time"

// SetClock sets the clock by which GitHub's keys grow old.
func (g *GitHub) SetClock(now func() time.Time) { g.now = now }

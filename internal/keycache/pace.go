package keycache

import "time"

// pace spaces out statements: gap apart on average, with those of the time burst saved up at most (GCRA, a leaky bucket
// that needs no timer). It has no lock.
type pace struct {
	gap, burst time.Duration
	next       time.Time // when the next is due
}

// wait returns how long the next has to wait.
func (p *pace) wait(now time.Time) time.Duration { return max(0, p.next.Sub(now)) }

// spend puts off the next by d.
func (p *pace) spend(now time.Time, d time.Duration) {
	if earliest := now.Add(-p.burst); p.next.Before(earliest) {
		p.next = earliest
	}
	p.next = p.next.Add(d)
}

// take spends a gap if nothing has to wait, and reports whether it did.
func (p *pace) take(now time.Time) bool {
	if p.wait(now) > 0 {
		return false
	}
	p.spend(now, p.gap)
	return true
}

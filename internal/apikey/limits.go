package apikey

import "fmt"

// Limits is how much a key may be used. What is 0 is not limited; in a record's own limits it is left to its tier.
type Limits struct {
	PerMinute  int // requests per minute, sustained
	Burst      int // requests in any 15 seconds; with PerMinute only
	Concurrent int // requests and streams at a time
}

// Over returns the limits, and where they say nothing those that they override.
func (l Limits) Over(under Limits) Limits {
	if l.PerMinute == 0 {
		l.PerMinute, l.Burst = under.PerMinute, under.Burst
	}
	if l.Concurrent == 0 {
		l.Concurrent = under.Concurrent
	}
	return l
}

// Tier is what the keys of an account may do (REKALL.md, "Rate limits").
type Tier uint8

// The tiers. An account that nobody gave another is free. A sandbox key has the tier sandbox, whatever its account's.
const (
	Free Tier = iota
	Pro
	Team
	Enterprise
	SandboxTier

	TierCount // the number of tiers, for tables indexed by one
)

var tierNames = [TierCount]string{"free", "pro", "team", "enterprise", "sandbox"}

// String returns the tier as Postgres and the command line write it.
func (t Tier) String() string {
	if t >= TierCount {
		return "invalid"
	}
	return tierNames[t]
}

// ParseTier is the inverse of String.
func ParseTier(name string) (Tier, error) {
	for t, known := range tierNames {
		if known == name {
			return Tier(t), nil
		}
	}
	return 0, fmt.Errorf("unknown tier %q: use free, pro, team, enterprise or sandbox", name)
}

// Tiers are the limits of each tier.
type Tiers [TierCount]Limits

// LimitsOf returns what a key may do.
func (t *Tiers) LimitsOf(r *Record) Limits {
	if r.OwnLimits == nil {
		return t[r.Tier]
	}
	return r.OwnLimits.Over(t[r.Tier])
}

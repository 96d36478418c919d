package apikey

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// Limits is how much a key may be used. 0 is no limit; in limits that override a tier's, it is the tier's.
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

	tierCount // the number of tiers, for tables indexed by one
)

var tierNames = [tierCount]string{"free", "pro", "team", "enterprise", "sandbox"}

// TierNames returns all tiers.
func TierNames() []string { return slices.Clone(tierNames[:]) }

// String returns the tier as Postgres and the command line write it.
func (t Tier) String() string {
	if t >= tierCount {
		return "invalid"
	}
	return tierNames[t]
}

// ParseTier is the inverse of String. With an error it returns Free.
func ParseTier(name string) (Tier, error) {
	if t := slices.Index(tierNames[:], name); t >= 0 {
		return Tier(t), nil
	}
	return Free, fmt.Errorf("unknown tier %q: use free, pro, team, enterprise or sandbox", name)
}

// Tiers are the limits of each tier.
type Tiers [tierCount]Limits

// Of returns what a key may do.
func (t *Tiers) Of(ref LimitsRef) Limits {
	if ref < LimitsRef(tierCount) {
		return t[ref]
	}
	set := (*ownSets.Load())[ref-LimitsRef(tierCount)]
	return set.own.Over(t[set.tier])
}

// LimitsRef stands for a tier and the limits that override it. A few of them serve all keys, and a record has room for a number
// where the limits themselves would make it a sixth larger. The zero value is the tier free.
type LimitsRef uint32

// limitSet is what a LimitsRef above those of the tiers stands for.
type limitSet struct {
	own  Limits
	tier Tier
}

// ownSets only grow: by what operators have set since the process began.
var (
	ownSets  atomic.Pointer[[]limitSet]
	ownRefs  = map[limitSet]LimitsRef{}
	ownMutex sync.Mutex // of ownRefs, and of whoever replaces ownSets
)

// RefLimits returns what stands for a tier and the limits in place of its own, which may be none.
func RefLimits(tier Tier, own Limits) LimitsRef {
	if own == (Limits{}) {
		return LimitsRef(tier)
	}
	set := limitSet{own, tier}
	ownMutex.Lock()
	defer ownMutex.Unlock()
	ref, ok := ownRefs[set]
	if !ok {
		var sets []limitSet
		if old := ownSets.Load(); old != nil {
			sets = *old
		}
		ref = LimitsRef(tierCount) + LimitsRef(len(sets))
		sets = append(sets, set) // readers see the length that they loaded
		ownRefs[set] = ref
		ownSets.Store(&sets)
	}
	return ref
}

package ratelimit

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"sync"
	"time"
)

const (
	// addressWays is how many addresses share a set.
	addressWays = 8

	// addressSets is how many sets there are: room for 65,536 addresses in some 2 MB, whatever comes.
	addressSets = 8192
)

// Addresses holds client addresses to a number of requests without a good key. An IPv6 client is its /64, of which it has
// all addresses.
//
// The table has a fixed size. A new address takes the place of the one that owes least in its set, which begins anew when
// it comes again: a flood from many addresses has some requests pass that should not, and none refused that should pass.
type Addresses struct {
	start           time.Time // of the monotonic clock that the table counts in
	interval, depth int64
	seed            maphash.Seed // nobody else can tell which addresses share a set
	sets            [addressSets]addressSet
}

type addressSet struct {
	mu      sync.Mutex
	entries [addressWays]addressEntry
}

type addressEntry struct {
	address [2]uint64
	emptyAt int64 // nanoseconds since the start; a bucket as those of keys
	pending int64 // requests whose key is being looked up
}

// NewAddresses returns a limiter of so many requests per minute and address, and burst of them at once. Both are at least 1.
func NewAddresses(perMinute, burst int) *Addresses {
	return &Addresses{start: time.Now(), interval: int64(time.Minute) / int64(perMinute), depth: int64(burst), seed: maphash.MakeSeed()}
}

// suspectFor is how long an address is suspect after what it had sent without a good key is paid for. An office whose key was mistyped
// once must not be refused for it when an edge starts and all its good keys have to be looked up.
const suspectFor = 10 * time.Minute

// Suspect reports whether an address has sent requests without a good key lately, as far as the table remembers.
func (a *Addresses) Suspect(address netip.Addr) bool {
	id, set := a.at(address)
	now := int64(time.Since(a.start))
	set.mu.Lock()
	defer set.mu.Unlock()
	entry := set.find(id)
	return entry != nil && now-entry.emptyAt < int64(suspectFor)
}

// Begin tells whether a request of a suspect address may have a key looked up. If so, End must follow when that is over. Until then it
// counts as one without a good key, or whoever sends all at once would have all looked up.
func (a *Addresses) Begin(address netip.Addr) Verdict {
	id, set := a.at(address)
	now := int64(time.Since(a.start))
	set.mu.Lock()
	defer set.mu.Unlock()
	entry := set.find(id)
	if entry == nil {
		return Verdict{Allowed: true}
	}
	verdict := a.judge(max(entry.emptyAt, now)+entry.pending*a.interval, now)
	if verdict.Allowed {
		entry.pending++
	}
	return verdict
}

// End must follow every Begin that was allowed, whether or not a key was looked up. If the key was not good, Take comes first.
func (a *Addresses) End(address netip.Addr) {
	id, set := a.at(address)
	set.mu.Lock()
	defer set.mu.Unlock()
	if entry := set.find(id); entry != nil && entry.pending > 0 { // another may have its place, or it may be new
		entry.pending--
	}
}

// Take counts a request of an address that had no good key, and tells whether it is within the limit.
func (a *Addresses) Take(address netip.Addr) Verdict {
	id, set := a.at(address)
	now := int64(time.Since(a.start))
	set.mu.Lock()
	defer set.mu.Unlock()
	entry := set.find(id)
	if entry == nil {
		entry = set.leastOwing()
		*entry = addressEntry{address: id}
	}
	emptyAt := max(entry.emptyAt, now)
	verdict := a.judge(emptyAt, now)
	if verdict.Allowed {
		entry.emptyAt = emptyAt + a.interval
	}
	return verdict
}

func (a *Addresses) at(address netip.Addr) (id [2]uint64, set *addressSet) {
	id = addressID(address)
	return id, &a.sets[maphash.Comparable(a.seed, id)%addressSets]
}

// judge tells whether a bucket has room for one more request.
func (a *Addresses) judge(emptyAt, now int64) Verdict {
	early := emptyAt + a.interval - now - a.depth*a.interval
	return Verdict{Allowed: early <= 0, RetryAfter: time.Duration(max(0, early))}
}

func (s *addressSet) find(id [2]uint64) *addressEntry {
	for i := range s.entries {
		if s.entries[i].address == id {
			return &s.entries[i]
		}
	}
	return nil
}

func (s *addressSet) leastOwing() *addressEntry {
	least := &s.entries[0]
	for i := range s.entries {
		if s.entries[i].emptyAt < least.emptyAt {
			least = &s.entries[i]
		}
	}
	return least
}

// addressID is what is counted together: an IPv4 address, also if it is written as an IPv6 one, or the /64 of an IPv6
// address. No two that differ have the same, since IPv4 addresses have 0xffff before them (RFC 4291, section 2.5.5.2), and none is
// zero, which is no entry: ::1 is in the /64 of zeros.
func addressID(address netip.Addr) [2]uint64 {
	bytes := address.As16()
	id := [2]uint64{binary.BigEndian.Uint64(bytes[:8]), binary.BigEndian.Uint64(bytes[8:])}
	if !address.Unmap().Is4() {
		id[1] = 1
	}
	return id
}

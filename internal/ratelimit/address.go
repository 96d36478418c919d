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
}

// NewAddresses returns a limiter of so many requests per minute and address, and burst of them at once. Both are at least 1.
func NewAddresses(perMinute, burst int) *Addresses {
	return &Addresses{start: time.Now(), interval: int64(time.Minute) / int64(perMinute), depth: int64(burst), seed: maphash.MakeSeed()}
}

// Check tells whether a request of an address may have a key looked up. It counts nothing.
func (a *Addresses) Check(address netip.Addr) Verdict { return a.ask(address, 0) }

// Take counts a request of an address that had no good key, and tells whether it is within the limit.
func (a *Addresses) Take(address netip.Addr) Verdict { return a.ask(address, a.interval) }

func (a *Addresses) ask(address netip.Addr, cost int64) Verdict {
	id := addressID(address)
	set := &a.sets[maphash.Comparable(a.seed, id)%addressSets]
	now := int64(time.Since(a.start))
	set.mu.Lock()
	defer set.mu.Unlock()
	entry := set.find(id)
	if entry == nil && cost == 0 {
		return Verdict{Allowed: true, Remaining: int(a.depth)}
	}
	if entry == nil {
		entry = set.leastOwing()
		*entry = addressEntry{address: id}
	}
	emptyAt := max(entry.emptyAt, now)
	if early := emptyAt + a.interval - now - a.depth*a.interval; early > 0 {
		return Verdict{RetryAfter: time.Duration(early), ResetAfter: time.Duration(emptyAt - now)}
	}
	entry.emptyAt = emptyAt + cost
	owed := entry.emptyAt - now
	return Verdict{Allowed: true, Remaining: int(a.depth - (owed+a.interval-1)/a.interval), ResetAfter: time.Duration(owed)}
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
// address. No two that differ have the same, since an IPv4 address is in a /64 that no client has (RFC 4291, section 2.5.5.2).
func addressID(address netip.Addr) [2]uint64 {
	bytes := address.As16()
	id := [2]uint64{binary.BigEndian.Uint64(bytes[:8]), binary.BigEndian.Uint64(bytes[8:])}
	if !address.Unmap().Is4() {
		id[1] = 0
	}
	return id
}

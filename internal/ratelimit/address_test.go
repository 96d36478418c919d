package ratelimit

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// mayLookUp reports whether an address may have a key looked up now.
func mayLookUp(a *Addresses, address netip.Addr) bool {
	allowed := a.Begin(address).Allowed
	if allowed {
		a.End(address)
	}
	return allowed
}

func TestAnAddressIsHeldToItsRateAndBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, address := NewAddresses(60, 5), netip.MustParseAddr("192.0.2.1")
		for range 5 {
			if !a.Take(address).Allowed {
				t.Fatal("refused within the burst")
			}
		}
		v := a.Take(address)
		if v.Allowed || v.RetryAfter != time.Second {
			t.Errorf("%+v, want a refusal for a second", v)
		}
		if mayLookUp(a, address) {
			t.Error("a key of an address over its limit may be looked up")
		}
		<-time.After(v.RetryAfter) // of the clock that synctest fakes
		for range 2 {
			if !mayLookUp(a, address) {
				t.Error("a look counts")
			}
		}
		if !a.Take(address).Allowed || a.Take(address).Allowed {
			t.Error("one request a second is not what passes")
		}
	})
}

func TestAddressesThatOneClientHasAreOne(t *testing.T) {
	for _, c := range []struct {
		first, second string
		same          bool
	}{
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"::ffff:192.0.2.1", "::ffff:192.0.2.2", false},
		{"2001:db8::1", "2001:db8::ffff:1", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"fe80::1%eth0", "fe80::2%eth1", true},
		{"::1", "::2", true},
		{"::1", "0.0.0.0", false},
		{"::1", "0.0.0.1", false},
	} {
		a := NewAddresses(1, 1)
		a.Take(netip.MustParseAddr(c.first))
		if same := !a.Take(netip.MustParseAddr(c.second)).Allowed; same != c.same {
			t.Errorf("%s and %s: counted together %t, want %t", c.first, c.second, same, c.same)
		}
	}
}

func TestNoAddressIsSuspectBeforeItsFirstRequestWithoutAGoodKey(t *testing.T) {
	for _, text := range []string{"192.0.2.1", "0.0.0.0", "2001:db8::1", "::1", "::"} {
		a, address := NewAddresses(1, 1), netip.MustParseAddr(text)
		if a.Suspect(address) {
			t.Errorf("%s is suspect from the start", text)
		}
		if a.Take(address); !a.Suspect(address) {
			t.Errorf("%s is not suspect", text)
		}
	}
}

func TestAnAddressIsSuspectNoLongerThanItsRequestsAreLately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, address := NewAddresses(60, 1), netip.MustParseAddr("192.0.2.1")
		a.Take(address)
		<-time.After(suspectFor)
		if !a.Suspect(address) {
			t.Error("not suspect any longer, a second before its time")
		}
		<-time.After(time.Second)
		if a.Suspect(address) {
			t.Error("suspect for ever")
		}
	})
}

func TestAFloodOfAddressesNeitherRefusesOthersNorForgetsWhoOwesMost(t *testing.T) {
	a := NewAddresses(1, 100)
	worst := netip.MustParseAddr("192.0.2.1")
	for range 100 {
		a.Take(worst)
	}
	for i := range uint32(4 * addressSets * addressWays) {
		var bytes [4]byte
		binary.BigEndian.PutUint32(bytes[:], 10<<24+i)
		if address := netip.AddrFrom4(bytes); !mayLookUp(a, address) || !a.Take(address).Allowed {
			t.Fatalf("%s was refused for the requests of others", address)
		}
	}
	if mayLookUp(a, worst) {
		t.Error("the address that owes most was forgotten")
	}
}

func TestConcurrentRequestsOfAnAddressShareItsBurst(t *testing.T) {
	const burst = 50
	a, address := NewAddresses(1, burst), netip.MustParseAddr("192.0.2.1")
	var allowed atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range burst {
				begun := a.Begin(address).Allowed
				if a.Take(address).Allowed {
					allowed.Add(1)
				}
				if begun {
					a.End(address)
				}
			}
		})
	}
	all.Wait()
	if n := allowed.Load(); n != burst {
		t.Errorf("%d passed, want %d", n, burst)
	}
}

func TestNoMoreLookupsOfASuspectAddressAreUnderWayThanItsLimit(t *testing.T) {
	a, address := NewAddresses(1, 5), netip.MustParseAddr("192.0.2.1")
	a.Take(address)
	for range 4 {
		if !a.Begin(address).Allowed {
			t.Fatal("refused within the limit")
		}
	}
	if v := a.Begin(address); v.Allowed || v.RetryAfter <= 0 {
		t.Errorf("%+v, want a refusal: one request was bad and four are being looked up", v)
	}
	a.End(address)
	if !a.Begin(address).Allowed {
		t.Error("a lookup that is over still counts")
	}
}

// TestALookupThatOutlivesWhatWasKnownOfItsAddressEarnsNothing: another address had its place, and then it came anew.
func TestALookupThatOutlivesWhatWasKnownOfItsAddressEarnsNothing(t *testing.T) {
	a, address := NewAddresses(1, 2), netip.MustParseAddr("192.0.2.1")
	a.Take(address)
	if !a.Begin(address).Allowed {
		t.Fatal("refused within the limit")
	}
	id, set := a.at(address)
	*set.find(id) = addressEntry{}
	a.Take(address)
	a.End(address)
	if !a.Begin(address).Allowed {
		t.Error("refused within the limit")
	}
	if a.Begin(address).Allowed {
		t.Error("one request was bad and one key is being looked up: a second passes beyond the limit")
	}
}

func TestAddressesAllocateNothing(t *testing.T) {
	a, address := NewAddresses(1, 1), netip.MustParseAddr("2001:db8::1")
	if n := testing.AllocsPerRun(1000, func() { a.Take(address) }); n > 0 {
		t.Errorf("%.0f allocations, want none", n)
	}
}

func BenchmarkAddresses(b *testing.B) {
	a, address := NewAddresses(60, 60), netip.MustParseAddr("192.0.2.1")
	b.ReportAllocs()
	for b.Loop() {
		a.Take(address)
	}
}

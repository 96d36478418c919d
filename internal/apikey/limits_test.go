package apikey

import (
	"sync"
	"testing"
)

var tiers = Tiers{Free: {PerMinute: 100, Burst: 150, Concurrent: 5}, Pro: {PerMinute: 1000, Burst: 1500, Concurrent: 25}}

func TestLimitsThatComeBeforeATierLeaveTheRestToIt(t *testing.T) {
	for _, tc := range []struct {
		tier Tier
		own  Limits
		want Limits
	}{
		{Free, Limits{}, tiers[Free]},
		{Pro, Limits{}, tiers[Pro]},
		{Pro, Limits{Concurrent: 1}, Limits{PerMinute: 1000, Burst: 1500, Concurrent: 1}},
		{Free, Limits{Concurrent: 1}, Limits{PerMinute: 100, Burst: 150, Concurrent: 1}},
		{Enterprise, Limits{PerMinute: 7, Burst: 8}, Limits{PerMinute: 7, Burst: 8}},
	} {
		for range 2 {
			if got := tiers.Of(RefLimits(tc.tier, tc.own)); got != tc.want {
				t.Errorf("%s with %+v: %+v, want %+v", tc.tier, tc.own, got, tc.want)
			}
		}
	}
	first := RefLimits(Pro, Limits{Concurrent: 1})
	if again := RefLimits(Pro, Limits{Concurrent: 1}); again != first {
		t.Error("the same limits have two references")
	}
	if (&Record{}).Limits != RefLimits(Free, Limits{}) {
		t.Error("the zero value is not the tier free")
	}
}

func TestReferencesHoldWhileOthersAreMade(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for n := range 500 {
				own := Limits{PerMinute: 1000 + n, Burst: 2000 + n}
				if got := tiers.Of(RefLimits(Enterprise, own)); got != own {
					t.Errorf("%+v, want %+v", got, own)
				}
			}
		})
	}
	wg.Wait()
}

package usage_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/usage"
)

// hours repeats a pattern until there are n hours.
func hours(n int, pattern ...int64) []int64 {
	past := make([]int64, 0, n)
	for len(past) < n {
		past = append(past, pattern...)
	}
	return past[:n]
}

func daily(quiet int64, peaks ...int64) []int64 { return append(hours(24-len(peaks), quiet), peaks...) }

func TestThreshold(t *testing.T) {
	for name, test := range map[string]struct {
		past      []int64
		spikeFrom int64 // 0: cannot tell
	}{
		"no past":                         {nil, 0},
		"one hour too little":             {hours(23, 50), 0},
		"a quiet key needs a hundred":     {hours(336, 2), 100},
		"an idle key needs a hundred":     {hours(336, 0), 100},
		"a steady key may double":         {hours(336, 1000), 2001},
		"a day is enough":                 {hours(24, 1000), 2001},
		"office hours are no spike":       {hours(336, daily(0, 900, 1000, 1100, 1000, 900, 1000, 1100, 1000)...), 2201},
		"a daily job is no spike":         {hours(336, daily(10, 50_000)...), 100_001},
		"a weekly job is one":             {hours(336, append(hours(167, 10), 50_000)...), 100},
		"noise widens what is usual":      {hours(336, 0, 1000, 2000, 3000), 10396}, // median 1500, MAD 1000
		"one bad night does not teach it": {append(hours(330, 1000), hours(6, 1_000_000)...), 2001},
	} {
		got, ok := usage.Threshold(test.past)
		if got != test.spikeFrom || ok != (test.spikeFrom > 0) {
			t.Errorf("%s: a spike from %d on, %v; want %d", name, got, ok, test.spikeFrom)
		}
	}
}

func TestThresholdProperties(t *testing.T) {
	for seed := range uint64(500) {
		random := rand.New(rand.NewPCG(seed, 1))
		past := make([]int64, 24+random.IntN(313))
		for i := range past {
			past[i] = random.Int64N(1 + random.Int64N(100_000))
		}
		threshold, ok := usage.Threshold(past)
		if !ok || threshold < 100 {
			t.Fatalf("seed %d: %d, %v", seed, threshold, ok)
		}
		shuffled := slices.Clone(past)
		random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again, _ := usage.Threshold(shuffled); again != threshold {
			t.Fatalf("seed %d: %d in another order %d", seed, threshold, again)
		}
		// An attacker who makes two hours in a hundred look as he likes raises the threshold no further than other hours do.
		odd := slices.Clone(past)
		for i := range len(odd) * 2 / 100 {
			odd[i] = 1 << 40
		}
		bound := 20*slices.Max(past) + 100
		if raised, _ := usage.Threshold(odd); raised > bound {
			t.Fatalf("seed %d: %d odd hours raise %d to %d", seed, len(odd)*2/100, threshold, raised)
		}
		doubled := make([]int64, len(past))
		for i := range past {
			doubled[i] = 2 * past[i]
		}
		if twice, _ := usage.Threshold(doubled); twice < threshold {
			t.Fatalf("seed %d: twice the past has a lower threshold", seed)
		}
	}
}

// past writes a steady past of requests per hour for a key, up to the hour before now.
func past(t *testing.T, databaseURL string, record *apikey.Record, now time.Time, requests, hours int) {
	t.Helper()
	pgtest.Exec(t, databaseURL, `
insert into rekall.usage select $1, $4::timestamptz - n * interval '1 hour', 'allowed', $2 from generate_series(1, $3) n`,
		record.ID, requests, hours, now.Truncate(time.Hour))
}

func TestSpikeIsToldOnceByOneOfAllEdges(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	store := pgtest.Store(t, databaseURL)
	records := newRecords(4)
	steady, spiking, young, quiet := records[0], records[1], records[2], records[3]
	now := time.Now() // the hour may end meanwhile, but not twice
	past(t, databaseURL, steady, now, 1000, 400)
	past(t, databaseURL, spiking, now, 1000, 400)
	past(t, databaseURL, young, now, 1000, 20)
	past(t, databaseURL, quiet, now, 2, 400)
	const edges = 4
	var counters [edges]*usage.Counter
	var logs [edges]func(string) int
	for i := range counters {
		c, observed := newCounter(store, 0)
		counters[i], logs[i] = c, func(line string) int { return observed.FilterMessage(line).Len() }
	}
	find := func() {
		var wg sync.WaitGroup
		for _, c := range counters {
			wg.Go(func() {
				if err := usage.FindSpikes(c, context.WithoutCancel(t.Context())); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	use := func(record *apikey.Record, requests int, outcome apikey.Outcome) {
		for i := range requests {
			counters[i%edges].Count(record, outcome, now)
		}
		for _, c := range counters {
			flush(t, c)
		}
	}
	told := func() (lines, counted int) {
		for i, c := range counters {
			lines += logs[i]("usage spike: the key is used far more than in the last two weeks")
			counted += int(c.Status().Spikes)
		}
		return lines, counted
	}
	use(steady, 2000, apikey.Allowed)
	use(spiking, 2000, apikey.Allowed)
	use(young, 50_000, apikey.Allowed)
	use(quiet, 99, apikey.Allowed)
	find()
	if lines, counted := told(); lines != 0 || counted != 0 {
		t.Fatalf("%d lines and %d counted before there is a spike", lines, counted)
	}
	use(spiking, 1, apikey.Expired) // refused requests count as well, and all edges' together
	find()
	find()
	if lines, counted := told(); lines != 1 || counted != 1 {
		t.Errorf("%d lines and %d counted, want one each", lines, counted)
	}
	used, err := store.Usage(t.Context(), spiking.ID, now.Add(-2*time.Hour), now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if len(used.Spikes) != 1 || used.Spikes[0].Threshold != 2001 {
		t.Errorf("spikes %+v", used.Spikes)
	}
}

func TestSpikeIsToldWithItsThresholdThoughThatIsForgottenToLearnOthers(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	store := pgtest.Store(t, databaseURL)
	records := newRecords(2)
	spiking, other := records[0], records[1]
	now := time.Now() // the hour may end meanwhile, but not twice
	past(t, databaseURL, spiking, now, 1000, 400)
	c, _ := newCounter(store, 0)
	find := func(record *apikey.Record, requests int) {
		t.Helper()
		for range requests {
			c.Count(record, apikey.Allowed, now)
		}
		flush(t, c)
		if err := usage.FindSpikes(c, t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	find(spiking, 2000)
	usage.FillThresholds(c)
	c.Count(spiking, apikey.Allowed, now)
	find(other, 100)
	used, err := store.Usage(t.Context(), spiking.ID, now.Add(-2*time.Hour), now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if len(used.Spikes) != 1 || used.Spikes[0].Threshold != 2001 {
		t.Errorf("spikes %+v", used.Spikes)
	}
}

func TestCountsOfNoFullHourThatAnEdgeMadeUpEndNoOtherEdge(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	record := newRecords(1)[0]
	// What was written before there was the check is there yet.
	pgtest.Exec(t, databaseURL, `alter table rekall.usage drop constraint usage_full_hour_check`)
	pgtest.Exec(t, databaseURL, `insert into rekall.usage
		select $1, date_trunc('hour', now()) - ago, 'allowed', 100 from unnest('{0 minutes, 15 minutes, 90 minutes}'::interval[]) ago`, record.ID)
	c, _ := newCounter(pgtest.Store(t, databaseURL), 0)
	if err := usage.FindSpikes(c, t.Context()); err != nil {
		t.Error(err)
	}
}

// overtaken is a store in which another edge is the first to tell of each spike.
type overtaken struct{ *keystore.Store }

func (s overtaken) AddSpike(ctx context.Context, spike keystore.Spike) (bool, error) {
	if _, err := s.Store.AddSpike(ctx, spike); err != nil {
		return false, err
	}
	return s.Store.AddSpike(ctx, spike)
}

func TestSpikeIsToldAtTheFirstLookUnlessAnotherEdgeIsFaster(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	store := pgtest.Store(t, databaseURL)
	now := time.Now() // the hour may end meanwhile, but not twice
	for told, store := range []usage.Store{overtaken{store}, store} {
		record := newRecords(1)[0]
		past(t, databaseURL, record, now, 1000, 400)
		c, logs := newCounter(store, 0)
		for range 2001 {
			c.Count(record, apikey.Allowed, now)
		}
		flush(t, c)
		if err := usage.FindSpikes(c, t.Context()); err != nil {
			t.Fatal(err)
		}
		if lines, counted := logs.FilterMessageSnippet("usage spike").Len(), c.Status().Spikes; lines != told || counted != uint64(told) {
			t.Errorf("%T: %d lines and %d counted, want %d", store, lines, counted, told)
		}
	}
}

// TestThresholdThatHasEndedIsLearnedAnew: what was much two weeks ago may be little now, and the reverse.
func TestThresholdThatHasEndedIsLearnedAnew(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	record := newRecords(1)[0]
	now := time.Now() // the hour may end meanwhile, but not twice
	past(t, databaseURL, record, now, 1000, 400)
	c, _ := newCounter(pgtest.Store(t, databaseURL), 0)
	for range 500 {
		c.Count(record, apikey.Allowed, now)
	}
	flush(t, c)
	for _, step := range []struct {
		before func()
		spikes uint64
	}{
		{func() {}, 0},
		{func() { pgtest.Exec(t, databaseURL, "update rekall.usage set count = 100 where count = 1000") }, 0},
		{func() { usage.EndThresholds(c) }, 1},
	} {
		step.before()
		if err := usage.FindSpikes(c, t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := c.Status().Spikes; got != step.spikes {
			t.Errorf("%d spikes, want %d", got, step.spikes)
		}
	}
}

// failing is a store of which one statement fails.
type failing struct {
	*keystore.Store
	what string
}

var errDown = errors.New("database is away")

func (s failing) fails(what string, err error) error {
	if what == s.what {
		return errDown
	}
	return err
}

func (s failing) BusyKeys(ctx context.Context, floor int64, each func(keystore.HourTotal)) error {
	return s.fails("BusyKeys", s.Store.BusyKeys(ctx, floor, each))
}

func (s failing) UsageHistory(ctx context.Context, ids []string, before time.Time, window time.Duration, each func(keystore.HourTotal)) error {
	return s.fails("UsageHistory", s.Store.UsageHistory(ctx, ids, before, window, each))
}

func (s failing) AddSpike(ctx context.Context, spike keystore.Spike) (bool, error) {
	news, err := s.Store.AddSpike(ctx, spike)
	return news, s.fails("AddSpike", err)
}

func TestLookForSpikesThatFailsSaysSo(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	store := pgtest.Store(t, databaseURL)
	now := time.Now()
	for _, what := range []string{"BusyKeys", "UsageHistory", "AddSpike"} {
		record := newRecords(1)[0]
		past(t, databaseURL, record, now, 1000, 400)
		c, _ := newCounter(failing{store, what}, 0)
		for range 2001 {
			c.Count(record, apikey.Allowed, now)
		}
		flush(t, c)
		if err := usage.FindSpikes(c, t.Context()); !errors.Is(err, errDown) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

//go:build fleet

package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

// quantiles are the cells p50, p99 and max of a table.
func quantiles(d []time.Duration) string {
	if len(d) == 0 {
		return "- | - | -"
	}
	d = slices.Sorted(slices.Values(d))
	at := func(q float64) time.Duration { return d[int(q*float64(len(d)-1))].Round(100 * time.Microsecond) }
	return fmt.Sprintf("%v | %v | %v", at(0.5), at(0.99), at(1))
}

func (f *fleet) printDelays() {
	f.t.Helper()
	f.t.Log("| edge | disturbed by being | edges and keys | p50 | p99 | max |")
	f.t.Log("| --- | --- | --- | --- | --- | --- |")
	groups := slices.SortedFunc(maps.Keys(f.delays), func(a, b group) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.fault, b.fault))
	})
	for _, g := range groups {
		fault := cmp.Or(g.fault, "(undisturbed)")
		f.t.Logf("| %s | %s | %d | %s |", g.kind, fault, len(f.delays[g]), quantiles(f.delays[g]))
	}
}

func (f *fleet) printConfirmations(delays []time.Duration) {
	f.t.Helper()
	f.t.Log("| `keys revoke --wait`: edges that confirmed | p50 | p99 | max |")
	f.t.Log("| --- | --- | --- | --- |")
	f.t.Logf("| %d | %s |", len(delays), quantiles(delays))
}

// load on Postgres, in its own counts, which lag by up to a second.
type load struct {
	at         time.Time
	took       time.Duration
	statements int64 // outside of transactions, each of which counts once
	writes     int64 // rows
}

func (f *fleet) load() load {
	f.t.Helper()
	l := load{at: time.Now()}
	err := f.pool.QueryRow(f.t.Context(), `
select xact_commit + xact_rollback, tup_inserted + tup_updated + tup_deleted
from pg_stat_database where datname = current_database()`).Scan(&l.statements, &l.writes)
	if err != nil {
		f.t.Fatal(err)
	}
	return l
}

func (l load) since(before load) load {
	return load{l.at, l.at.Sub(before.at), l.statements - before.statements, l.writes - before.writes}
}

// perEdge is a rate per second and edge.
func (f *fleet) perEdge(n int64, took time.Duration) float64 {
	return float64(n) / took.Seconds() / float64(len(f.edges))
}

func (f *fleet) printLoad(what string, l load) {
	f.t.Helper()
	f.t.Log("| edges | what happens | statements/s per edge | writes/s per edge | statements/s in all |")
	f.t.Log("| --- | --- | --- | --- | --- |")
	f.t.Logf("| %d | %s | %.2f | %.2f | %.0f |", len(f.edges), what, f.perEdge(l.statements, l.took),
		f.perEdge(l.writes, l.took), float64(l.statements)/l.took.Seconds())
}

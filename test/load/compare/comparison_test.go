//go:build load

package compare

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// sample is what one round says of a system.
type sample struct {
	start int     // of the systems' processes
	cpu   float64 // us per request
	rate  float64 // requests per second
}

// measurements of each system by its name, one for each round.
type measurements map[string][]sample

func TestComparison(t *testing.T) {
	b := newBench(t)
	about := b.about(installedVersions)
	results := make(measurements)
	for start := range *starts {
		t.Run(fmt.Sprintf("start %d", start+1), func(t *testing.T) {
			anew := b.of(t)
			anew.measure(anew.startSystems(), start, *rounds / *starts, results)
		})
	}
	if t.Failed() {
		return
	}
	b.publish("comparison", about+method(*starts)+results.systemsTable()+"\n"+results.ratiosTable()+"\n"+results.targetsTable())
}

// measure adds the rounds of a start to the results. In each of them the groups and the systems of each take turns in another order. A
// round before them warms everything.
func (b *bench) measure(groups [][]*system, start, rounds int, results measurements) {
	b.t.Helper()
	need(b.t, "wrk")
	for round := range rounds + 1 {
		for _, s := range shuffled(groups) {
			measured := b.load(s, *seconds)
			measured.start = start
			if round > 0 {
				results[s.name] = append(results[s.name], measured)
			}
		}
	}
}

func shuffled(groups [][]*system) (order []*system) {
	for _, i := range rand.Perm(len(groups)) {
		for _, j := range rand.Perm(len(groups[i])) {
			order = append(order, groups[i][j])
		}
	}
	return order
}

// load measures a system once.
func (b *bench) load(s *system, seconds int) sample {
	b.t.Helper()
	before := s.cpu()
	cmd := exec.Command("wrk", "--threads", "2", "--connections", strconv.Itoa(*connections), "--duration", fmt.Sprintf("%ds", seconds),
		"--timeout", "20s", "--script", "testdata/keys.lua", s.url, b.path("keys"))
	output, err := cmd.CombinedOutput()
	took := s.cpu() - before
	if err != nil {
		b.t.Fatalf("wrk: %v\n%s", err, output)
	}
	_, line, _ := strings.Cut(string(output), "RESULT ")
	var requests, us, refused, failed int
	if _, err := fmt.Sscan(line, &requests, &us, &refused, &failed); err != nil || requests == 0 {
		b.t.Fatalf("wrk: %v\n%s", err, output)
	}
	if refused+failed > 0 {
		b.t.Fatalf("%s: of %d requests with good keys %d were refused and %d failed", s.name, requests, refused, failed)
	}
	_ = os.Truncate(s.own.log, 0) // the access log of a run would fill a disk
	return sample{
		cpu:  float64(took.Microseconds()) / float64(requests),
		rate: float64(requests) / (time.Duration(us) * time.Microsecond).Seconds(),
	}
}

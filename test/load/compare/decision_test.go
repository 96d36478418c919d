//go:build load

package compare

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// What is asked of BenchmarkDecision and BenchmarkHandler of caddymodule.
var decisionTargets = []struct {
	benchmark, what string
	ns, allocations float64
}{
	{"BenchmarkDecision/allowed", "from a credential to the decision, a key in memory", 350, 0},
	{"BenchmarkDecision/refused", "the same, an unknown key", 300, 3},
	{"BenchmarkHandler/bearer", "the whole gateway without the proxy, Bearer", 1200, 6},
	{"BenchmarkHandler/x-api-key", "the same, `x-api-key`", 1200, 6},
	{"BenchmarkHandler/query", "the same, `?api_key=`", 2000, 0},
	{"BenchmarkHandler/limited", "the same, Bearer, with `rate_limits`", 0, 0},
	{"BenchmarkHandler/refused", "the same up to the answer, an unknown key", 300, 3},
}

// TestDecision runs the benchmarks of the gateway without a server around it, in several processes: two of one build differ by more than
// two runs of one.
func TestDecision(t *testing.T) {
	b := &bench{t: t}
	about := b.about(func(t *testing.T) string { return runtime.Version() + ", Caddy " + caddyVersion(t) })
	processes, span := 10, "1s"
	if *smoke {
		processes, span = 1, "100x"
	}
	const folder = "../../../caddymodule"
	program := filepath.Join(t.TempDir(), "caddymodule.test")
	compile := exec.Command("go", "test", "-c", "-o", program, folder)
	compile.Env = append(os.Environ(), "GOFLAGS=") // as in build
	if text, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("go test -c: %v\n%s", err, text)
	}
	var output strings.Builder
	for range processes {
		run := exec.Command(program, "-test.run", "^$", "-test.bench", "^Benchmark(Decision|Handler)$", "-test.benchmem", "-test.benchtime", span)
		run.Dir = folder
		text, err := run.CombinedOutput()
		if err != nil {
			t.Fatalf("run the benchmarks: %v\n%s", err, text)
		}
		output.Write(text)
	}
	var table strings.Builder
	table.WriteString("| | ns | least – most | wanted | allocations | wanted |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, target := range decisionTargets {
		times, allocations := readBenchmark(output.String(), target.benchmark)
		if len(times) != processes {
			t.Fatalf("%s ran %d times, not %d:\n%s", target.benchmark, len(times), processes, output.String())
		}
		wanted := func(limit float64, none string) string {
			if limit == 0 {
				return none
			}
			return fmt.Sprintf("≤ %.0f", limit)
		}
		allocationsWanted := wanted(target.allocations, "-")
		if target.benchmark == "BenchmarkDecision/allowed" {
			allocationsWanted = "none"
		}
		fmt.Fprintf(&table, "| %s | %.0f | %.0f – %.0f | %s | %.0f | %s |\n", target.what,
			quantile(times, 0.5), times[0], times[len(times)-1], wanted(target.ns, "-"), allocations, allocationsWanted)
	}
	b.publish("decision", about+fmt.Sprintf("Medians of %d processes, %s each.\n\n", processes, span)+table.String())
}

// readBenchmark returns the times of all runs of a benchmark, sorted, and the allocations of the last.
func readBenchmark(output, name string) (times []float64, allocations float64) {
	for line := range strings.Lines(output) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != name && !strings.HasPrefix(fields[0], name+"-") { // with more than one CPU their number follows
			continue
		}
		units := make(map[string]float64) // of our own metrics, where there are any
		for i := 2; i+1 < len(fields); i += 2 {
			units[fields[i+1]], _ = strconv.ParseFloat(fields[i], 64)
		}
		ns, own := units["ns/request"]
		if allocations = units["allocations/request"]; !own {
			ns, allocations = units["ns/op"], units["allocs/op"]
		}
		times = append(times, ns)
	}
	slices.Sort(times)
	return times, allocations
}

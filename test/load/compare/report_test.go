//go:build load

package compare

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// all reports whether all of the systems were measured.
func (m measurements) all(names ...string) bool {
	for _, name := range names {
		if m[name] == nil {
			return false
		}
	}
	return true
}

// each is the spread of a figure that is made of the samples that the same round has of some systems.
func (m measurements) each(figure func(s []sample) float64, names ...string) spread {
	var values []float64
	for round := range m[names[0]] {
		var samples []sample
		for _, name := range names {
			samples = append(samples, m[name][round])
		}
		values = append(values, figure(samples))
	}
	s := spreadOf(values)
	s.low, s.high = m.interval(names[0], func(rounds []int) float64 {
		var drawn []float64
		for _, r := range rounds {
			drawn = append(drawn, values[r])
		}
		return median(drawn)
	})
	return s
}

// interval is where a figure of the rounds lies in 95 % of the cases, if as many are drawn anew (bootstrap): whole starts, since rounds
// of the same processes are alike, or, of one start alone, rounds. Two tables say the same of the same rounds.
func (m measurements) interval(name string, figure func(rounds []int) float64) (low, high float64) {
	alike := make(map[int][]int)
	single := m[name][0].start == m[name][len(m[name])-1].start
	for round, s := range m[name] {
		if single {
			s.start = round
		}
		alike[s.start] = append(alike[s.start], round)
	}
	draws := rand.New(rand.NewPCG(1, 1))
	var figures []float64
	for range 2000 {
		var drawn []int
		for range alike {
			drawn = append(drawn, alike[draws.IntN(len(alike))]...)
		}
		figures = append(figures, figure(drawn))
	}
	slices.Sort(figures)
	return quantile(figures, 0.025), quantile(figures, 0.975)
}

func cpu(s []sample) float64       { return s[0].cpu }
func rate(s []sample) float64      { return s[0].rate }
func cpuRatio(s []sample) float64  { return s[0].cpu / s[1].cpu }
func rateRatio(s []sample) float64 { return s[0].rate / s[1].rate }
func addedCPU(s []sample) float64  { return s[0].cpu - s[1].cpu }

// baselines are the systems that differ from one by its authentication alone.
var baselines = []struct{ name, baseline string }{
	{checked, bare}, {limited, bare}, {forward, stock}, {tunedAuth, bare}, {authNginx, plainNginx}, {luaNginx, plainNginx},
	{mapHAProxy, haproxy}, {shaHAProxy, haproxy},
}

// baselineOf returns what a system is without its authentication; empty: none was measured.
func baselineOf(name string) string {
	for _, b := range baselines {
		if b.name == name {
			return b.baseline
		}
	}
	return ""
}

func (m measurements) systemsTable() string {
	var table strings.Builder
	table.WriteString("| system | CPU, us/request | p10 – p90 | added by its authentication, us | p10 – p90 | requests/s |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, name := range []string{
		checked, overH2C, limited, bare, shipped, stock, stockLog, forward, tunedAuth, plainNginx, authNginx, luaNginx, haproxy, mapHAProxy, shaHAProxy,
	} {
		if !m.all(name) {
			continue
		}
		added := "- | -"
		if baseline := baselineOf(name); m.all(baseline) {
			s := m.each(addedCPU, name, baseline)
			added = fmt.Sprintf("%.1f | %.1f – %.1f", s.median, s.p10, s.p90)
		}
		c := m.each(cpu, name)
		fmt.Fprintf(&table, "| %s | %.1f | %.1f – %.1f | %s | %.0f |\n", name, c.median, c.p10, c.p90, added, m.each(rate, name).median)
	}
	return table.String()
}

func (m measurements) ratiosTable() string {
	var table strings.Builder
	table.WriteString("| system | against | CPU per request, ratio | 95 % of the median | p10 – p90 | requests/s, ratio |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, pair := range []struct{ name, against string }{
		{checked, bare}, {limited, bare}, {limited, checked}, {overH2C, checked}, {checked, stock}, {limited, stock}, {shipped, stockLog}, {shipped, stock},
		{checked, forward}, {checked, tunedAuth}, {shipped, forward}, {checked, authNginx}, {checked, luaNginx}, {checked, shaHAProxy},
	} {
		if m.all(pair.name, pair.against) {
			fmt.Fprintf(&table, "| %s | %s | %s | %.2f |\n", pair.name, pair.against,
				m.each(cpuRatio, pair.name, pair.against).cells("%.3f"), m.each(rateRatio, pair.name, pair.against).median)
		}
	}
	return table.String()
}

// target of a figure, with a stretch beyond it. 0: no stretch.
type target struct {
	what           string
	limit, stretch float64
	atLeast        bool // otherwise at most
	measured       spread
}

func (m measurements) targets() []target {
	var list []target
	add := func(what string, limit, stretch float64, atLeast bool, measured spread) {
		list = append(list, target{what, limit, stretch, atLeast, measured})
	}
	const atLeast, atMost = true, false
	add("CPU: keys checked, against the same without the gateway", 1.05, 1.03, atMost, m.each(cpuRatio, checked, bare))
	add("CPU: keys checked and limited, against the same without the gateway", 1.05, 1.03, atMost, m.each(cpuRatio, limited, bare))
	add("CPU: as shipped, against stock Caddy, both with access log", 0.90, 0.78, atMost, m.each(cpuRatio, shipped, stockLog))
	add("CPU: as shipped but without access log, against stock Caddy without", 0.90, 0.78, atMost, m.each(cpuRatio, limited, stock))
	share := func(what string, limit float64, other string) {
		add(what, limit, 0, atMost, m.share(checked, other))
	}
	share("added CPU, against what forward_auth adds", 0.05, forward)
	share("added CPU, against what forward_auth with our settings adds", 0.05, tunedAuth)
	if m.all(luaNginx) {
		share("added CPU, against what Lua adds to nginx", 1, luaNginx)
	}
	add("requests/s: as shipped, against forward_auth without access log", 2, 2.8, atLeast, m.each(rateRatio, shipped, forward))
	add("requests/s: as shipped but without access log, against forward_auth", 2, 2.8, atLeast, m.each(rateRatio, limited, forward))
	return list
}

// share is what the authentication of one system adds to CPU per request, divided by what that of another adds. It is made of
// medians, since the difference of one round may be 0.
func (m measurements) share(name, other string) (s spread) {
	shareOf := func(rounds []int) float64 {
		var ours, theirs []float64
		for _, r := range rounds {
			ours = append(ours, m[name][r].cpu-m[baselineOf(name)][r].cpu)
			theirs = append(theirs, m[other][r].cpu-m[baselineOf(other)][r].cpu)
		}
		return median(ours) / median(theirs)
	}
	var all []int
	for round := range m[name] {
		all = append(all, round)
	}
	s.median = shareOf(all)
	s.low, s.high = m.interval(name, shareOf)
	return s
}

// meets tells whether a figure is on the right side.
func (t target) meets(figure, limit float64) bool {
	if t.atLeast {
		return figure >= limit
	}
	return figure <= limit
}

// verdict goes by the median, and says so where the rounds do not suffice to be sure.
func (t target) verdict() string {
	reached := func(limit float64) bool { return t.meets(t.measured.median, limit) }
	sure := func(limit float64) bool { return t.meets(t.measured.low, limit) && t.meets(t.measured.high, limit) }
	switch {
	case t.stretch != 0 && sure(t.stretch):
		return "reached, stretch too"
	case t.stretch != 0 && reached(t.stretch) && sure(t.limit):
		return "reached; stretch by the median only"
	case sure(t.limit):
		return "reached"
	case reached(t.limit):
		return "reached by the median only"
	}
	return "**not reached**"
}

func (m measurements) targetsTable() string {
	var table strings.Builder
	table.WriteString("| target | limit | stretch | measured | 95 % | |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, t := range m.targets() {
		sign, stretch := "≤", "-"
		if t.atLeast {
			sign = "≥"
		}
		if t.stretch != 0 {
			stretch = fmt.Sprintf("%s %.2f", sign, t.stretch)
		}
		fmt.Fprintf(&table, "| %s | %s %.2f | %s | %.3f | %.3f – %.3f | %s |\n",
			t.what, sign, t.limit, stretch, t.measured.median, t.measured.low, t.measured.high, t.verdict())
	}
	return table.String()
}

// method says how the rounds were run.
func method(starts int) string {
	return fmt.Sprintf("%d rounds of %d s in %d starts, %d connections, %d keys, addresses of the backend: %d.\n\n",
		*rounds, *seconds, starts, *connections, *keyCount, *upstreams)
}

// about says what was run where.
func (b *bench) about(versions func(*testing.T) string) string {
	b.t.Helper()
	cpus, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(cpus), "model name\t: ")
	model, _, _ = strings.Cut(model, "\n")
	loadavg, _ := os.ReadFile("/proc/loadavg")
	loads := strings.Fields(string(loadavg))
	return fmt.Sprintf("%s, %d CPUs (%s), load average before the run %s.\n%s.\n",
		time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), model, loads[0], versions(b.t))
}

// installedVersions names what is compared.
func installedVersions(t *testing.T) string {
	t.Helper()
	list := []string{runtime.Version(), "Caddy " + caddyVersion(t)}
	for _, c := range [][]string{{"nginx", "-v"}, {"haproxy", "-v"}, {"wrk", "-v"}} {
		if _, err := exec.LookPath(c[0]); err == nil {
			list = append(list, version(c[0], c[1]))
		}
	}
	return strings.Join(list, ", ")
}

// caddyVersion is that of the module; a program built from a dependency does not know it.
func caddyVersion(t *testing.T) string {
	t.Helper()
	output, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", "github.com/caddyserver/caddy/v2").Output()
	if err != nil {
		t.Fatalf("find the version of Caddy: %v", err)
	}
	return strings.TrimSpace(string(output))
}

// version is the beginning of a program's first line.
func version(program, argument string) string {
	output, _ := exec.Command(program, argument).CombinedOutput() // wrk -v ends with 1
	line, _, _ := strings.Cut(string(output), "\n")
	line = strings.TrimPrefix(line, "nginx version: ")
	words := strings.Fields(line)
	if words[0] == "HAProxy" {
		words = []string{"HAProxy", words[2]}
	}
	return strings.Join(words[:min(2, len(words))], " ")
}

// publish shows a report, and writes it into README.md where that is asked for.
func (b *bench) publish(name, report string) {
	b.t.Helper()
	b.t.Logf("%s\n%s", name, report)
	if !*write {
		return
	}
	text, err := os.ReadFile("README.md")
	if err != nil {
		b.t.Fatal(err)
	}
	begin, end := fmt.Sprintf("<!-- %s: begin -->\n", name), fmt.Sprintf("<!-- %s: end -->\n", name)
	before, rest, found := strings.Cut(string(text), begin)
	_, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		b.t.Fatalf("README.md has no place for the report %q", name)
	}
	if err := os.WriteFile("README.md", []byte(before+begin+report+end+after), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

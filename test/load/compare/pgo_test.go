//go:build load

package compare

import (
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
)

var (
	profileSeconds = flag.Int("profile-seconds", 30, "length of the CPU profile for a profile-guided build")
	profileFile    = flag.String("profile", "", "file, from the repository's root, to keep that profile in")
)

const (
	guided = "gateway, profile-guided"
	again  = "gateway, the same build again" // what this way of measuring makes of no difference
)

// TestProfileGuidedBuild tells whether a build that is guided by a profile of this load gains. go build takes the profile from
// cmd/rekall-gateway/default.pgo, if that is where it is kept.
func TestProfileGuidedBuild(t *testing.T) {
	b := newBench(t)
	about := b.about(func(t *testing.T) string { return "Caddy " + caddyVersion(t) })
	quiet := without(t, exampleFile(t), "\tlog\n")
	unguidedProgram, guidedProgram := b.path("unguided"), b.path("guided")
	if err := build(unguidedProgram, "github.com/rekall-ai/gateway/cmd/rekall-gateway", "-pgo=off"); err != nil {
		t.Fatal(err)
	}
	unguided := b.startGateway(checked, unguidedProgram, quiet)
	b.prove(unguided)
	profile := b.path("default.pgo")
	if *profileFile != "" {
		profile = filepath.Join("../../..", *profileFile)
	}
	b.profile(unguided, profile)
	if profile, err := filepath.Abs(profile); err != nil {
		t.Fatal(err)
	} else if err := build(guidedProgram, "github.com/rekall-ai/gateway/cmd/rekall-gateway", "-pgo="+profile); err != nil {
		t.Fatal(err)
	}
	b.compareBuilds(unguided, b.startGateway(again, unguidedProgram, quiet), b.startGateway(guided, guidedProgram, quiet), about)
}

// profile writes a CPU profile of a system under load into a file.
func (b *bench) profile(s *system, file string) {
	b.t.Helper()
	b.load(s, 1)
	type result struct {
		profile []byte
		err     error
	}
	profiled := make(chan result, 1)
	go func() {
		// With no limit of time: the answer takes as long as the profile.
		resp, err := http.Get(fmt.Sprintf("%s/debug/pprof/profile?seconds=%d", s.admin, *profileSeconds))
		if err != nil {
			profiled <- result{err: err}
			return
		}
		defer func() { _ = resp.Body.Close() }()
		profile, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, profile)
		}
		profiled <- result{profile, err}
	}()
	b.load(s, *profileSeconds+1)
	r := <-profiled
	if r.err != nil {
		b.t.Fatalf("profile the gateway: %v", r.err)
	}
	if err := os.WriteFile(file, r.profile, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) compareBuilds(unguided, same, withProfile *system, about string) {
	b.t.Helper()
	b.prove(same)
	b.prove(withProfile)
	results := make(measurements)
	b.measure([][]*system{{unguided, same, withProfile}}, 0, *rounds, results)
	ratio, none := results.each(cpuRatio, guided, checked), results.each(cpuRatio, again, checked)
	verdict := "No gain is seen: it is within what two processes of one build differ by."
	switch {
	case ratio.high < min(1, none.low):
		verdict = "It gains."
	case ratio.low > max(1, none.high):
		verdict = "It loses."
	}
	b.publish("pgo", about+method(1)+"| build | CPU per request, ratio to a build without a profile | 95 % of the median | p10 – p90 |\n| --- | --- | --- | --- |\n"+
		fmt.Sprintf("| the same build again | %s |\n| profile-guided | %s |\n\n%s\n",
			none.cells("%.3f"), ratio.cells("%.3f"), verdict))
}

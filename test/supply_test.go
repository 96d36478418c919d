package test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// output runs a command and returns what it printed.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		t.Fatalf("%s %v: %v", name, args, err)
	}
	return string(out)
}

// TestBinaryNamesEveryModuleInIt compares the bill of materials in the binary with what the compiler was given.
func TestBinaryNamesEveryModuleInIt(t *testing.T) {
	t.Parallel()
	want := strings.Fields(output(t, "go", "list", "-deps",
		"-f", "{{with .Module}}{{if not .Main}}{{.Path}}@{{.Version}}{{end}}{{end}}", "../cmd/rekall-gateway"))
	slices.Sort(want)
	want = slices.Compact(want)
	var got []string
	for line := range strings.Lines(output(t, "go", "version", "-m", program)) {
		fields := strings.Fields(line)
		if fields[0] != "dep" {
			continue
		}
		if len(fields) != 4 || !strings.HasPrefix(fields[3], "h1:") {
			t.Errorf("no version and hash in %q", line)
			continue
		}
		got = append(got, fields[1]+"@"+fields[2])
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" || len(got) < 10 {
		t.Errorf("modules compiled (-) and named in the binary (+):\n%s", diff)
	}
}

func TestVersionIsTheGatewaysAndCaddys(t *testing.T) {
	t.Parallel()
	versions := map[string]string{}
	for line := range strings.Lines(output(t, "go", "version", "-m", program)) {
		if fields := strings.Fields(line); fields[0] == "mod" || fields[0] == "dep" {
			versions[fields[1]] = fields[2]
		}
	}
	want := "rekall-gateway " + versions["github.com/rekall-ai/gateway"] + ", Caddy " + versions["github.com/caddyserver/caddy/v2"] + " "
	for _, flag := range []string{"version", "--version"} {
		if got := output(t, program, flag); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q in it", flag, got, want)
		}
	}
}

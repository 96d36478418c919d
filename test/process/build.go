package process

import (
	"fmt"
	"os"
	"os/exec"
)

// Runner is a *testing.M, or what surrounds one.
type Runner interface{ Run() int }

// Built returns m with a directory for the programs that its tests run. build makes them in it; it goes with the tests.
func Built(m Runner, build func(dir string) error) Runner { return built{m, build} }

type built struct {
	m     Runner
	build func(dir string) error
}

// Run implements Runner.
func (b built) Run() int {
	dir, err := os.MkdirTemp("", "rekall-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := b.build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return b.m.Run()
}

// Build builds the command in a folder.
func Build(program, folder string, flags ...string) error {
	cmd := exec.Command("go", append(append([]string{"build"}, flags...), "-o", program, folder)...)
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", folder, err, output)
	}
	return nil
}

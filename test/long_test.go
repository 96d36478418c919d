package test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLongRunHasEveryTestThatABuildTagKeepsFromTheDailyOne, at full size: what nobody runs before a release is not tested.
func TestLongRunHasEveryTestThatABuildTagKeepsFromTheDailyOne(t *testing.T) {
	t.Parallel()
	var scripts strings.Builder
	for _, name := range []string{"long", "load/run"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		scripts.WriteString(string(text))
	}
	wanted := map[string]bool{"REKALL_FLEET=full go test": true, "REKALL_SCALE:-10000,100000,1000000,10000000": true}
	err := filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		tag, _, _ := strings.Cut(string(text), "\n")
		switch tag {
		case "//go:build fleet", "//go:build gameday", "//go:build load":
			wanted[" ./test/"+filepath.Dir(path)] = true
		}
		return err
	})
	if err != nil || len(wanted) < 6 {
		t.Fatalf("found %v, %v", wanted, err)
	}
	for part := range wanted {
		if !strings.Contains(scripts.String(), part) {
			t.Errorf("test/long does not run %s", strings.TrimSpace(part))
		}
	}
}

func TestLongRunSaysAtOnceThatTheDiskIsTooSmall(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "go"), []byte("#!/bin/sh\nexit 1\n"), 0o700); err != nil { // which it must not come to
		t.Fatal(err)
	}
	cmd := exec.Command("./long")
	cmd.Env = append(os.Environ(), "REKALL_SCALE=10000,9000000000000", "PATH="+dir+":"+os.Getenv("PATH"))
	output, err := cmd.CombinedOutput()
	if err == nil || !strings.HasPrefix(string(output), "test/long: 9000000000000 keys need 27000000000 MB in /tmp") {
		t.Errorf("%v: %s", err, output)
	}
}

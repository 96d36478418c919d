package devenv_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv"
)

// folder makes one with files of that mode.
func folder(t *testing.T, mode os.FileMode, files ...string) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\nexit 1\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func binaries(t *testing.T) string {
	t.Helper()
	found, err := devenv.Binaries()
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestVariableNamesTheBinariesBeforePath(t *testing.T) {
	named, onPath := folder(t, 0o755, "initdb", "postgres"), folder(t, 0o755, "initdb", "postgres")
	t.Setenv("PATH", onPath)
	t.Setenv("REKALL_PG_BIN", named)
	if got := binaries(t); got != named {
		t.Errorf("found %s, want %s", got, named)
	}
	t.Setenv("REKALL_PG_BIN", "")
	if got := binaries(t); got != onPath {
		t.Errorf("found %s, want %s", got, onPath)
	}
}

// A distribution links postgres to where the rest of it is.
func TestLinkOnPathLeadsToTheFolderOfAllBinaries(t *testing.T) {
	real, link := folder(t, 0o755, "initdb", "postgres"), folder(t, 0)
	if err := os.Symlink(filepath.Join(real, "postgres"), filepath.Join(link, "postgres")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("REKALL_PG_BIN", "")
	t.Setenv("PATH", link)
	if got := binaries(t); got != real {
		t.Errorf("found %s, want %s", got, real)
	}
}

func TestFolderWithoutBothBinariesIsPassedOver(t *testing.T) {
	whole := folder(t, 0o755, "initdb", "postgres")
	for name, partial := range map[string]string{
		"no initdb": folder(t, 0o755, "postgres"), "no postgres": folder(t, 0o755, "initdb"),
		"not executable": folder(t, 0o644, "initdb", "postgres"), "empty": folder(t, 0), "missing": "/does/not/exist",
	} {
		t.Setenv("REKALL_PG_BIN", "")
		t.Setenv("PATH", partial+":"+whole)
		if got := binaries(t); got != whole {
			t.Errorf("%s on PATH: found %s, want %s", name, got, whole)
		}
		// What the user named is not passed over in silence.
		t.Setenv("REKALL_PG_BIN", partial)
		if _, err := devenv.Binaries(); err == nil || !strings.Contains(err.Error(), "REKALL_PG_BIN="+partial) {
			t.Errorf("%s as the variable: %v", name, err)
		}
	}
}

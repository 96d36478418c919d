package devenv

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestMissingProgramsAreOneClearLine(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := searchBinaries([]string{filepath.Join(t.TempDir(), "*", "bin")})
	if !errors.Is(err, ErrNoPostgres) {
		t.Fatalf("error %v", err)
	}
	wantSentence(t, err, "apt-get install postgresql", "REKALL_PG_BIN")

	t.Setenv("REKALL_PG_BIN", "/nowhere")
	_, err = StartPostgres(t.Context(), PostgresOptions{})
	wantSentence(t, err, "REKALL_PG_BIN=/nowhere")
}

func TestNewestInstalledVersionComesFirst(t *testing.T) {
	t.Setenv("PATH", "")
	root := t.TempDir()
	for _, version := range []string{"9", "18", "17", "10"} {
		for _, program := range []string{"initdb", "postgres"} {
			path := filepath.Join(root, version, "bin", program)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Remove(filepath.Join(root, "18", "bin", "initdb")); err != nil {
		t.Fatal(err)
	}
	folders, err := searchBinaries([]string{filepath.Join(root, "*", "bin")})
	if want := []string{filepath.Join(root, "17", "bin"), filepath.Join(root, "10", "bin"), filepath.Join(root, "9", "bin")}; err != nil || !slices.Equal(folders, want) {
		t.Errorf("%v, %v", folders, err)
	}
	t.Chdir(root)
	t.Setenv("REKALL_PG_BIN", filepath.Join("9", "bin"))
	if folders, err := binaries(); err != nil || !slices.Equal(folders, []string{filepath.Join(root, "9", "bin")}) {
		t.Errorf("%v, %v", folders, err)
	}
}

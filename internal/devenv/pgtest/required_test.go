package pgtest_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

// again runs a test of this package in another process.
func again(t *testing.T, test string, environment ...string) (output string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^"+test+"$", "-test.v")
	cmd.Env = append(os.Environ(), environment...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestGivenServerIsUsed(t *testing.T) {
	server := pgtest.Server(t)
	output, err := again(t, "TestEachDatabaseIsNewAndEmpty",
		"REKALL_TEST_DATABASE_URL="+server.URL()+"&dbname=postgres", "REKALL_PG_BIN=/nowhere")
	if err != nil {
		t.Errorf("%v\n%s", err, output)
	}
	conn, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	var left int
	if err := conn.QueryRow(t.Context(), "select count(*) from pg_database where datname like 'test%'").Scan(&left); err != nil || left != 0 {
		t.Errorf("%d databases left, %v", left, err)
	}
}

func TestWithoutPostgresTestsFail(t *testing.T) {
	for name, environment := range map[string][]string{
		"no programs": {"REKALL_TEST_DATABASE_URL=", "REKALL_PG_BIN=/nowhere"},
		"not a URL":   {"REKALL_TEST_DATABASE_URL=host=127.0.0.1"},
	} {
		output, err := again(t, "TestEachDatabaseIsNewAndEmpty", environment...)
		if err == nil || !strings.Contains(output, "--- FAIL") || strings.Contains(output, "--- SKIP") {
			t.Errorf("%s: %v\n%s", name, err, output)
		}
	}
}

package pgtest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

// innerVariable makes TestInner say which server it used, and pass or fail.
const innerVariable = "REKALL_TEST_PGTEST_INNER"

func TestMain(m *testing.M) { pgtest.Main(m) }

// TestInner is what the re-executed binary runs; in the outer one it is a test like any other.
func TestInner(t *testing.T) {
	var dir string
	databaseURL := pgtest.URL(t)
	if err := connect(t, databaseURL).QueryRow(t.Context(), "show data_directory").Scan(&dir); err != nil {
		t.Fatal(err)
	}
	if mode := os.Getenv(innerVariable); mode != "" {
		_, _ = fmt.Fprintf(os.Stderr, "inner %s %s\n", databaseURL, dir)
		if mode == "fail" {
			t.Fail()
		}
	}
}

func connect(t *testing.T, databaseURL string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}

func databaseName(t *testing.T, databaseURL string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(u.Path, "/")
}

func TestMainStopsTheServerAndKeepsTheCode(t *testing.T) {
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[string]int{"pass": 0, "fail": 1} {
		cmd := exec.Command(executable, "-test.run=^TestInner$")
		// Not the server of somebody else, which would go on.
		cmd.Env = append(os.Environ(), innerVariable+"="+mode, "REKALL_TEST_DATABASE_URL=")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		err := cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Errorf("%s: code %d, %v\n%s", mode, code, err, &stderr)
		}
		var databaseURL, dir string
		if _, err := fmt.Sscanf(stderr.String(), "inner %s %s", &databaseURL, &dir); err != nil {
			t.Fatalf("%s: %q, %v", mode, &stderr, err)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %s is left: %v", mode, dir, err)
		}
		if err := pgtest.TryExec(databaseURL, "select 1"); err == nil {
			t.Errorf("%s: the server still answers", mode)
		}
	}
}

func TestEachDatabaseIsNewAndEmpty(t *testing.T) {
	first, second := pgtest.URL(t), pgtest.URL(t)
	if first == second {
		t.Fatal("the same database twice")
	}
	pgtest.Exec(t, first, "create table mine (i int)")
	var tables int
	if err := connect(t, second).QueryRow(t.Context(),
		`select count(*) from pg_tables where schemaname not in ('pg_catalog', 'information_schema')`).Scan(&tables); err != nil {
		t.Fatal(err)
	}
	if tables != 0 {
		t.Errorf("%d tables", tables)
	}
}

func TestDatabaseGoesWithItsTestThoughAConnectionIsOpen(t *testing.T) {
	outer := connect(t, pgtest.URL(t))
	var name string
	t.Run("inner", func(t *testing.T) {
		databaseURL := pgtest.URL(t)
		name = databaseName(t, databaseURL)
		if _, err := pgx.Connect(t.Context(), databaseURL); err != nil { // and never closed
			t.Fatal(err)
		}
	})
	var left bool
	if err := outer.QueryRow(t.Context(), "select exists (select from pg_database where datname = $1)", name).Scan(&left); err != nil {
		t.Fatal(err)
	}
	if left {
		t.Errorf("%s is left", name)
	}
}

func TestServerIsTheTestsOwnAndGoesWithIt(t *testing.T) {
	shared := pgtest.URL(t)
	var own, dir string
	t.Run("inner", func(t *testing.T) {
		server := pgtest.Server(t)
		own = server.URL()
		if err := connect(t, own).QueryRow(t.Context(), "show data_directory").Scan(&dir); err != nil {
			t.Fatal(err)
		}
		server.Kill()
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		server.Pause() // and never resumed
	})
	pgtest.Exec(t, shared, "select 1")
	if err := pgtest.TryExec(own, "select 1"); err == nil {
		t.Error("the server still answers")
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
}

func TestTryExecReturnsTheErrorAndExecTakesArguments(t *testing.T) {
	databaseURL := pgtest.URL(t)
	if err := pgtest.TryExec(databaseURL, "select 1/0"); err == nil {
		t.Error("no error")
	}
	pgtest.Exec(t, databaseURL, "select $1::int", 1)
}

func TestLoginIsAMemberAndGoesWithItsTest(t *testing.T) {
	databaseURL := pgtest.URL(t)
	var role, member string
	t.Run("inner", func(t *testing.T) {
		role = pgtest.Role(t, databaseURL)
		pgtest.Exec(t, databaseURL, "create role "+role+"; create table given (i int); grant select on given to "+role)
		member = pgtest.Login(t, databaseURL, role)
		pgtest.Exec(t, member, "select from given")
		pgtest.Role(t, databaseURL) // and never created
	})
	if err := pgtest.TryExec(member, "select 1"); err == nil {
		t.Error("the user is left")
	}
	pgtest.Exec(t, databaseURL, "create role "+role+"; drop role "+role)
}

package devenv_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
)

// patience is how long a test waits for what should come soon.
const patience = 30 * time.Second

// brief is how long a test lets a call hang that must hang.
const brief = 200 * time.Millisecond

func start(t *testing.T, options devenv.PostgresOptions) *devenv.Postgres {
	t.Helper()
	server, err := devenv.StartPostgres(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, server) })
	return server
}

func stop(t *testing.T, server *devenv.Postgres) {
	t.Helper()
	if err := server.Stop(context.WithoutCancel(t.Context())); err != nil {
		t.Error(err)
	}
}

// keptDir returns a directory that the server's user may enter: t.TempDir is for our own user only.
func keptDir(t *testing.T) string {
	t.Helper()
	parent, err := os.MkdirTemp("/tmp", "rekall-kept-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(parent) })
	if err := os.Chmod(parent, 0o711); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(parent, "db")
}

func connect(t *testing.T, server *devenv.Postgres) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, server.URL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		_ = conn.Close(ctx)
	})
	return conn
}

func query[T any](t *testing.T, server *devenv.Postgres, sql string) (value T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := connect(t, server).QueryRow(ctx, sql).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

// directory of a server's data, sockets and password.
func directory(t *testing.T, server *devenv.Postgres) string {
	t.Helper()
	return filepath.Dir(query[string](t, server, "show data_directory"))
}

func TestStopLeavesNoDirectoryAndNoServer(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	dir := directory(t, server)
	if _, err := os.Stat(dir); err != nil {
		t.Fatal(err)
	}
	stop(t, server)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
	if err := pgtest.TryExec(server.URL(), "select 1"); err == nil {
		t.Error("the server still answers")
	}
	stop(t, server) // may be called again
}

func TestKeptDirectorySurvivesAStopWithDataAndPassword(t *testing.T) {
	dir := keptDir(t)
	first := start(t, devenv.PostgresOptions{Dir: dir})
	firstURL := first.URL()
	pgtest.Exec(t, firstURL, "create table kept as select 42 as answer")
	stop(t, first)
	second := start(t, devenv.PostgresOptions{Dir: dir})
	if got := query[int](t, second, "select answer from kept"); got != 42 {
		t.Errorf("answer %d", got)
	}
	// Only the port may differ.
	if got, want := second.URL(), strings.Replace(firstURL, fmt.Sprintf(":%d/", first.Port), fmt.Sprintf(":%d/", second.Port), 1); got != want {
		t.Errorf("URL %s, want %s", got, want)
	}
	if got := query[string](t, second, "show fsync"); got != "on" {
		t.Errorf("fsync is %s for data that is kept", got)
	}
}

func TestDirectoryWithOtherFilesIsRefusedUntouched(t *testing.T) {
	dir := keptDir(t)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "thesis.txt")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	server, err := devenv.StartPostgres(t.Context(), devenv.PostgresOptions{Dir: dir})
	if err == nil {
		stop(t, server)
		t.Fatal("not refused")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("files %v, %v", entries, err)
	}
	if content, err := os.ReadFile(file); err != nil || string(content) != "mine" {
		t.Errorf("content %q, %v", content, err)
	}
}

func TestInterruptedFirstStartDoesNotSpoilAKeptDirectory(t *testing.T) {
	dir := keptDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		server, err := devenv.StartPostgres(ctx, devenv.PostgresOptions{Dir: dir})
		if err == nil {
			err = errors.Join(errors.New("was not interrupted"), server.Stop(context.WithoutCancel(ctx)))
		}
		ended <- err
	}()
	// initdb writes its first files long before its last.
	eventually.True(t, "initdb at work", func() bool {
		entries, _ := filepath.Glob(filepath.Join(dir, "*", "base"))
		return len(entries) > 0
	})
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) && !strings.Contains(err.Error(), "killed") {
		t.Fatalf("ended with %v", err)
	}
	if got := query[int](t, start(t, devenv.PostgresOptions{Dir: dir}), "select 42"); got != 42 {
		t.Errorf("got %d", got)
	}
}

func TestTwoServersAtOnceAreApart(t *testing.T) {
	first, second := start(t, devenv.PostgresOptions{}), start(t, devenv.PostgresOptions{})
	if first.Port == second.Port || directory(t, first) == directory(t, second) {
		t.Fatalf("ports %d and %d", first.Port, second.Port)
	}
	pgtest.Exec(t, first.URL(), "create table mine (i int)")
	if query[bool](t, second, "select to_regclass('mine') is not null") {
		t.Error("the servers share data")
	}
	mixed := strings.Replace(first.URL(), fmt.Sprintf(":%d/", first.Port), fmt.Sprintf(":%d/", second.Port), 1)
	if err := pgtest.TryExec(mixed, "select 1"); err == nil {
		t.Error("one server's password opens the other")
	}
}

func TestServerListensOnLoopbackOnly(t *testing.T) {
	server := start(t, devenv.PostgresOptions{Settings: map[string]string{"max_connections": "17"}})
	if got := query[string](t, server, "show listen_addresses"); got != "127.0.0.1" {
		t.Errorf("listens on %s", got)
	}
	if got := query[string](t, server, "show max_connections"); got != "17" {
		t.Errorf("max_connections %s, want what Settings says", got)
	}
	withoutPassword := fmt.Sprintf("postgres://postgres@127.0.0.1:%d/postgres?sslmode=disable", server.Port)
	if err := pgtest.TryExec(withoutPassword, "select 1"); err == nil {
		t.Error("lets us in without a password")
	}
}

func TestPauseHangsAndResumeUndoesIt(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	hung, kept := connect(t, server), connect(t, server)
	server.Pause()
	ctx, cancel := context.WithTimeout(t.Context(), brief)
	defer cancel()
	if _, err := hung.Exec(ctx, "select 1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("on a connection: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), brief)
	defer cancel()
	if conn, err := pgx.Connect(ctx, server.URL()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("connecting, which must hang and not be refused: %v", err)
		if err == nil {
			_ = conn.Close(t.Context())
		}
	}
	server.Resume()
	ctx, cancel = context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := kept.Exec(ctx, "select 1"); err != nil {
		t.Errorf("a connection from before the pause: %v", err)
	}
	if got := query[int](t, server, "select 42"); got != 42 {
		t.Errorf("a new connection: %d", got)
	}
}

func TestStopOfAPausedServerEnds(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	dir := directory(t, server)
	server.Pause()
	stop(t, server)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
}

// A crash of the server, unlike one of the machine, loses nothing that was committed: tests kill a server to see what the
// gateway makes of it, and must not see a revocation undone.
func TestKilledServerRestartsOnItsPortWithAllThatWasCommitted(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	port, before := server.Port, server.URL()
	pgtest.Exec(t, before, "create table kept (i int)")
	for i := range 5 {
		conn := connect(t, server)
		for range 10 {
			if _, err := conn.Exec(t.Context(), "insert into kept values (1)"); err != nil {
				t.Fatal(err)
			}
		}
		server.Kill()
		if err := pgtest.TryExec(before, "select 1"); err == nil {
			t.Fatal("the killed server answers")
		}
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if server.Port != port || server.URL() != before {
			t.Fatalf("port %d, then %d", port, server.Port)
		}
		if got, want := query[int](t, server, "select count(*)::int from kept"), 10*(i+1); got != want {
			t.Fatalf("%d rows, committed were %d", got, want)
		}
	}
}

func TestRestartOfARunningServerKeepsPortAndData(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	before := server.URL()
	pgtest.Exec(t, before, "create table kept as select 42 as answer")
	started := query[time.Time](t, server, "select pg_postmaster_start_time()")
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if server.URL() != before || query[int](t, server, "select answer from kept") != 42 {
		t.Errorf("URL %s, was %s", server.URL(), before)
	}
	if again := query[time.Time](t, server, "select pg_postmaster_start_time()"); !again.After(started) {
		t.Error("was not restarted")
	}
}

func TestStartEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if server, err := devenv.StartPostgres(ctx, devenv.PostgresOptions{}); err == nil {
		stop(t, server)
		t.Fatal("started")
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestServerThatCannotStartSaysWhy(t *testing.T) {
	server, err := devenv.StartPostgres(t.Context(), devenv.PostgresOptions{Settings: map[string]string{"no_such_setting": "1"}})
	if err == nil {
		stop(t, server)
		t.Fatal("started")
	}
	if !strings.Contains(err.Error(), "no_such_setting") {
		t.Errorf("got %v", err)
	}
}

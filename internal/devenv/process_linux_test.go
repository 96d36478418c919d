package devenv_test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/test/eventually"
)

// processes returns the ids of those that work in a directory, as a server and all its children do, even when it is gone.
func processes(t *testing.T, dir string) (pids []int) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, dir+"/") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

func noProcesses(t *testing.T, dir string) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() { // leave nothing behind all the same
			for _, pid := range processes(t, dir) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	eventually.True(t, "no process left in "+dir, func() bool { return len(processes(t, dir)) == 0 })
}

func TestStopLeavesNoProcess(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	dir := directory(t, server)
	if n := len(processes(t, dir)); n < 3 {
		t.Fatalf("%d processes: looked in the wrong place", n)
	}
	stop(t, server)
	noProcesses(t, dir)
}

// busy starts a statement that does not look up until it has ended, and returns once it runs.
func busy(t *testing.T, server *devenv.Postgres) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer close(ended)
		_, _ = conn.Exec(ctx, "do $$ begin loop end loop; end $$")
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		_ = conn.Close(ctx)
	})
	eventually.True(t, "busy", func() bool {
		return query[bool](t, server, "select count(*) > 0 from pg_stat_activity where state = 'active' and query like 'do %'")
	})
}

// A backend that computes does not notice that the postmaster is gone, and would keep the next one from starting.
func TestKillLeavesNoProcessThoughOneIsBusy(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	dir := directory(t, server)
	busy(t, server)
	server.Kill()
	noProcesses(t, dir)
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestKillOfAPausedServerLeavesNoProcess(t *testing.T) {
	server := start(t, devenv.PostgresOptions{})
	dir := directory(t, server)
	server.Pause()
	server.Kill()
	noProcesses(t, dir)
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}

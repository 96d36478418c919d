package devenv_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

// ownerVariable makes the test binary the owner of a server in the directory that it names, until it is killed.
const ownerVariable = "REKALL_TEST_DEVENV_OWNER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(ownerVariable); dir != "" {
		os.Exit(own(dir))
	}
	os.Exit(m.Run())
}

func own(dir string) int {
	server, err := devenv.StartPostgres(context.Background(), devenv.PostgresOptions{Dir: dir})
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		return 1
	}
	_, _ = fmt.Fprintln(os.Stdout, server.URL())
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends, should it not kill us
	_ = server.Stop(context.Background())
	return 0
}

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
	eventually(t, "no process left in "+dir, func() bool { return len(processes(t, dir)) == 0 })
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
	eventually(t, "busy", func() bool {
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

func TestServerDiesWithAProcessThatIsKilled(t *testing.T) {
	dir := keptDir(t)
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.Command(executable)
	owner.Env = append(os.Environ(), ownerVariable+"="+dir)
	owner.Stderr = os.Stderr
	stdin, err := owner.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close() }()
	stdout, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	url, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, strings.TrimSpace(url), "select 1")
	if n := len(processes(t, dir)); n < 3 {
		t.Errorf("%d processes: looked in the wrong place", n)
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait()
	noProcesses(t, dir)
	// What was kept is good for the next.
	if got := query[int](t, start(t, devenv.PostgresOptions{Dir: dir}), "select 42"); got != 42 {
		t.Errorf("got %d", got)
	}
}

package devenv

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func start(t *testing.T, options PostgresOptions) *Postgres {
	t.Helper()
	p, err := StartPostgres(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, p) })
	return p
}

func stop(t *testing.T, p *Postgres) {
	t.Helper()
	if err := p.Stop(context.Background()); err != nil {
		t.Error(err)
	}
}

func connect(t *testing.T, databaseURL string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx)
	})
	return conn
}

// query returns the one value of a statement, or "" for a statement without.
func query(t *testing.T, databaseURL, sql string) string {
	t.Helper()
	conn := connect(t, databaseURL)
	defer func() { _ = conn.Close(t.Context()) }()
	var value string
	err := conn.QueryRow(t.Context(), sql).Scan(&value)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

// alive returns those of the processes that have not ended.
func alive(members []processEntry) []int {
	var pids []int
	for _, e := range processTable() {
		if !e.dead() && slices.ContainsFunc(members, func(m processEntry) bool { return m.pid == e.pid }) {
			pids = append(pids, e.pid)
		}
	}
	return pids
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// segmentExists looks for a System V segment, where the kernel lists them in a file.
func segmentExists(id string) bool {
	table, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[1] == id {
			return true
		}
	}
	return false
}

// publicDir is a temporary directory that the server's user may enter, as it may not enter those of the testing package.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "rekall-devenv-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func wantSentence(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q lacks %q", err, w)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q is more than a sentence", err)
	}
}

func TestServerThatIsKilledLeavesNothingToTheMachine(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, kill := range map[string]func(*Postgres){
		"by Kill": (*Postgres).Kill, "by an impatient Stop": func(p *Postgres) { _ = p.Stop(canceled) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, PostgresOptions{})
			_ = connect(t, p.URL()) // an open session does not hold it up
			members, segment := tree(p.server.pid()), readPIDFile(p.data).sharedMemory
			if len(members) < 5 {
				t.Fatalf("a server of %d processes", len(members))
			}
			kill(p)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() { stop(t, p) })
			}
			wg.Wait()
			if left := alive(members); len(left) > 0 {
				t.Errorf("left processes %v", left)
			}
			if exists(p.run.path) {
				t.Errorf("left %s", p.run.path)
			}
			if segmentExists(segment) {
				t.Errorf("left shared memory %s", segment)
			}
			if err := p.Restart(t.Context()); !errors.Is(err, errNotRunning) {
				t.Errorf("restart after stop: %v", err)
			}
		})
	}
}

func TestKeptDirectoryOutlivesAnUnfinishedStartAndACrash(t *testing.T) {
	dir := publicDir(t)
	if err := os.MkdirAll(filepath.Join(dir, newDataName, "base"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Dir(dir))
	p := start(t, PostgresOptions{Dir: filepath.Base(dir)})
	query(t, p.URL(), "create table t as select 42 as n")
	p.Kill()
	stop(t, p)
	if exists(p.run.path) {
		t.Errorf("left %s", p.run.path)
	}
	if got := query(t, start(t, PostgresOptions{Dir: dir}).URL(), "select n::text from t"); got != "42" {
		t.Errorf("answer %q", got)
	}
}

func TestStartThatCannotBeIsRefusedInOneSentence(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(publicDir(t), "kept")
	p := start(t, PostgresOptions{Dir: dir})
	_, err := StartPostgres(t.Context(), PostgresOptions{Dir: dir})
	wantSentence(t, err, dir, "in use by another running server", strconv.Itoa(p.server.pid()))

	// Another program's server on the same data holds no lock of ours.
	p.kept.unlock()
	_, err = StartPostgres(t.Context(), PostgresOptions{Dir: linkTo(t, dir)})
	wantSentence(t, err, "in use by another running server", strconv.Itoa(p.server.pid()))
	if query(t, p.URL(), "select 1::text") != "1" {
		t.Error("the running server was disturbed")
	}
	stop(t, p)

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	port := listener.Addr().(*net.TCPAddr).Port
	_, err = StartPostgres(t.Context(), PostgresOptions{Dir: dir, Port: port})
	wantSentence(t, err, "port "+strconv.Itoa(port), "in use by another program")

	_, err = StartPostgres(t.Context(), PostgresOptions{Dir: dir, Settings: map[string]string{"no_such_setting": "1"}})
	wantSentence(t, err, "no_such_setting")

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := StartPostgres(canceled, PostgresOptions{Dir: dir}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}

	version := filepath.Join(dir, dataName, "PG_VERSION")
	if err := os.WriteFile(version, []byte("9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = StartPostgres(t.Context(), PostgresOptions{Dir: dir})
	wantSentence(t, err, dir, "made by PostgreSQL 9", "install PostgreSQL 9")

	for name, file := range map[string]string{"somebody's files": "thesis.txt", "a foreign data directory": "PG_VERSION", "an unrelated data folder": "data/x"} {
		t.Run(name, func(t *testing.T) {
			dir := publicDir(t)
			path := filepath.Join(dir, file)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := StartPostgres(t.Context(), PostgresOptions{Dir: dir})
			wantSentence(t, err, dir, "not a data directory", "new or an empty one")
			if content, err := os.ReadFile(path); err != nil || string(content) != "precious" {
				t.Errorf("the file was touched: %q, %v", content, err)
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
				t.Errorf("left %v, %v", entries, err)
			}
		})
	}
	_, err = StartPostgres(t.Context(), PostgresOptions{Dir: version})
	wantSentence(t, err, version, "is a file")
}

// linkTo names a directory by another path.
func linkTo(t *testing.T, dir string) string {
	t.Helper()
	link := filepath.Join(filepath.Dir(dir), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	return link
}

func TestDirectoryThatTheServerMayNotEnterIsNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		return // the server runs as us, and enters what we enter
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := StartPostgres(t.Context(), PostgresOptions{Dir: filepath.Join(dir, "kept")})
	wantSentence(t, err, "may not enter "+dir)
}

func TestSweepSparesTheLivingAndTheForeign(t *testing.T) {
	living, err := newRunDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = living.remove() })
	target := publicDir(t)
	link := filepath.Join(runParent, runPrefix+"link-"+strconv.Itoa(os.Getpid()))
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(link) })
	foreign := filepath.Join(runParent, runPrefix+"foreign-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(foreign, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(foreign) })
	if credential := nobody(t); credential != nil {
		if err := os.Chown(foreign, int(credential.Uid), int(credential.Gid)); err != nil {
			t.Fatal(err)
		}
	} else {
		foreign = link // an ordinary user cannot make another's
	}
	sweep()
	for _, path := range []string{living.path, link, target, foreign} {
		if !exists(path) {
			t.Errorf("%s was removed", path)
		}
	}
}

// TestFreeLockProvesADeadOwner takes the steps of a sweep that comes between the making of a directory and its locking.
func TestFreeLockProvesADeadOwner(t *testing.T) {
	d, err := newRunDir()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockDir(d.path); !errors.Is(err, errLocked) {
		t.Errorf("locked twice: %v", err)
	}
	sweep()
	if !d.exists() {
		t.Error("a locked directory was swept")
	}
	if err := os.RemoveAll(d.path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		t.Fatal(err)
	}
	if d.exists() {
		t.Error("another directory at the same path was taken for the locked one")
	}
	if err := d.remove(); err != nil {
		t.Error(err)
	}
}

// Package devenv runs the parts around the gateway on one machine: a private Postgres and demo backends. The dev command
// and the tests use it.
package devenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// ErrNoPostgres says what to do when there are no server binaries.
var ErrNoPostgres = errors.New("no PostgreSQL server found: install it (Debian: apt-get install postgresql; macOS: brew install postgresql) " +
	"or set REKALL_PG_BIN to the folder of initdb and postgres")

// PostgresOptions of StartPostgres. The zero value is a throw-away server.
type PostgresOptions struct {
	Dir      string            // where the data is kept; empty: a temporary directory, removed by Stop
	Settings map[string]string // of postgresql.conf
}

// Postgres is a private server, reached over loopback with a password of its own. It dies with this process.
type Postgres struct {
	Port int

	bin, dir, data, password string
	temporary                bool
	settings                 map[string]string
	credential               *syscall.Credential // of the user that the server runs as; nil: our own

	mu   sync.Mutex
	proc *process
}

// readyPoll is how often the server's pid file is looked at while it starts.
const readyPoll = 10 * time.Millisecond

// initdbPatience is how long an interrupted initdb may take to clean up.
const initdbPatience = 10 * time.Second

// StartPostgres makes a database cluster, or opens the one that Dir keeps, and starts it. As root it runs the server as
// user postgres, or nobody, since Postgres refuses root.
func StartPostgres(ctx context.Context, options PostgresOptions) (_ *Postgres, err error) {
	p := &Postgres{settings: options.Settings, temporary: options.Dir == ""}
	if p.bin, err = binaries(); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		if p.credential, err = unprivileged(); err != nil {
			return nil, err
		}
	}
	if err = p.makeDir(options.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if err = p.initialise(ctx); err != nil {
		return nil, err
	}
	return p, p.start(ctx)
}

// makeDir makes the directory of the cluster, its password and its socket.
func (p *Postgres) makeDir(kept string) (err error) {
	if p.temporary {
		// A socket's path is limited to about 100 bytes, and macOS's temporary directory is longer.
		if p.dir, err = os.MkdirTemp("/tmp", "rekall-pg-"); err != nil {
			return fmt.Errorf("make a database directory: %w", err)
		}
	} else {
		if p.dir, err = filepath.Abs(kept); err != nil {
			return fmt.Errorf("find the database directory: %w", err)
		}
		if err = os.MkdirAll(p.dir, 0o700); err != nil {
			return fmt.Errorf("make the database directory: %w", err)
		}
	}
	p.data = filepath.Join(p.dir, "data")
	if _, err = os.Stat(p.data); errors.Is(err, os.ErrNotExist) && !p.temporary {
		if entries, _ := os.ReadDir(p.dir); len(entries) > 0 {
			return fmt.Errorf("%s holds other files: name an empty or a new directory", p.dir)
		}
	}
	if p.credential != nil {
		if err = os.Chown(p.dir, int(p.credential.Uid), int(p.credential.Gid)); err != nil {
			return fmt.Errorf("hand the database directory to the server's user: %w", err)
		}
	}
	return nil
}

// initialise runs initdb, unless it has been run.
func (p *Postgres) initialise(ctx context.Context) error {
	passwordFile := filepath.Join(p.dir, "password")
	if _, err := os.Stat(filepath.Join(p.data, "PG_VERSION")); err == nil {
		password, err := os.ReadFile(passwordFile)
		if err != nil {
			return fmt.Errorf("read the kept database's password: %w", err)
		}
		p.password = string(password)
		return nil
	}
	// Loopback is open to every user of the machine: the password keeps them out.
	p.password = apikey.RandomText(24)
	if err := os.WriteFile(passwordFile, []byte(p.password), 0o600); err != nil {
		return fmt.Errorf("write the database's password: %w", err)
	}
	if p.credential != nil {
		if err := os.Chown(passwordFile, int(p.credential.Uid), int(p.credential.Gid)); err != nil {
			return fmt.Errorf("hand the password to the server's user: %w", err)
		}
	}
	cmd := p.command(ctx, "initdb", "-D", p.data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile="+passwordFile,
		"-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions")
	// Interrupted, it waits for its children and removes what it made. Killed, it would leave half a cluster.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = initdbPatience
	output, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if _, statErr := os.Stat(p.data); errors.Is(statErr, os.ErrNotExist) {
		_ = os.Remove(passwordFile) // or the directory would seem to hold other files
	}
	if ctx.Err() != nil {
		return fmt.Errorf("initdb: %w", ctx.Err())
	}
	return fmt.Errorf("initdb: %w: %s", err, bytes.TrimSpace(output))
}

func (p *Postgres) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(p.bin, name), args...)
	cmd.Dir = p.dir // readable by the server's user, which ours may not be
	cmd.Env = append(os.Environ(), "LC_ALL=C", "HOME="+p.dir)
	cmd.SysProcAttr = attributes(p.credential)
	return cmd
}

// start runs the server and waits until it takes connections.
func (p *Postgres) start(ctx context.Context) error {
	const attempts = 3 // another program may take the free port first
	var err error
	for range attempts {
		if p.Port == 0 {
			if p.Port, err = freePort(); err != nil {
				return err
			}
		}
		if err = p.startOnce(ctx); err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "Address already in use") {
			return err
		}
		p.Port = 0
	}
	return err
}

func freePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

func (p *Postgres) startOnce(ctx context.Context) error {
	args := []string{"-D", p.data, "-k", p.dir, "-p", strconv.Itoa(p.Port), "-c", "listen_addresses=127.0.0.1"}
	settings := map[string]string{"shared_buffers": "32MB"}
	if p.temporary {
		// Not synchronous_commit: without it Kill would undo what was committed just before.
		settings["fsync"], settings["full_page_writes"] = "off", "off"
	}
	for name, value := range p.settings {
		settings[name] = value
	}
	for name, value := range settings {
		args = append(args, "-c", name+"="+value)
	}
	cmd := p.command(context.Background(), "postgres", args...)
	log := &tail{}
	cmd.Stdout, cmd.Stderr = log, log
	// A descriptor of the log that outlives the server must not keep Wait from returning.
	cmd.WaitDelay = time.Second
	proc, err := startProcess(cmd)
	if err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	p.mu.Lock()
	p.proc = proc
	p.mu.Unlock()
	for !p.ready(cmd.Process.Pid) {
		select {
		case <-proc.done:
			return fmt.Errorf("postgres ended while starting: %s", log)
		case <-ctx.Done():
			return fmt.Errorf("start postgres: %w", ctx.Err())
		case <-time.After(readyPoll):
		}
	}
	return nil
}

// ready reads the status that the postmaster writes to the eighth line of its pid file.
func (p *Postgres) ready(pid int) bool {
	content, err := os.ReadFile(filepath.Join(p.data, "postmaster.pid"))
	if err != nil {
		return false
	}
	lines := strings.Split(string(content), "\n")
	if len(lines) < 8 || lines[0] != strconv.Itoa(pid) {
		return false
	}
	status := strings.TrimSpace(lines[7])
	return status == "ready" || status == "standby"
}

// URL of the database "postgres" as its superuser.
func (p *Postgres) URL() string {
	u := url.URL{Scheme: "postgres", User: url.UserPassword("postgres", p.password),
		Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(p.Port)), Path: "/postgres", RawQuery: "sslmode=disable"}
	return u.String()
}

// SetPassword says that the superuser's password has been changed.
func (p *Postgres) SetPassword(password string) { p.password = password }

// Stop shuts the server down, gently at first, and removes a temporary directory. It may be called again.
func (p *Postgres) Stop(ctx context.Context) error {
	p.Resume()
	p.stopServer(ctx, syscall.SIGINT, syscall.SIGQUIT)
	if p.temporary {
		if err := os.RemoveAll(p.dir); err != nil {
			return fmt.Errorf("remove the database directory: %w", err)
		}
	}
	return nil
}

// Kill ends the server as a crash does.
func (p *Postgres) Kill() {
	p.signalAll(syscall.SIGKILL)
	p.stopServer(context.Background())
}

// Restart starts a server that was stopped by Kill, or stops and starts a running one, on the same port.
func (p *Postgres) Restart(ctx context.Context) error {
	p.stopServer(ctx, syscall.SIGINT, syscall.SIGQUIT)
	return p.start(ctx)
}

// stopServer sends the signals in turn, and at last kills.
func (p *Postgres) stopServer(ctx context.Context, signals ...syscall.Signal) {
	const patience = 5 * time.Second
	p.mu.Lock()
	proc := p.proc
	p.mu.Unlock()
	if proc == nil {
		return
	}
	for _, signal := range signals {
		_ = proc.cmd.Process.Signal(signal)
		select {
		case <-proc.done:
			return
		case <-ctx.Done():
		case <-time.After(patience):
		}
	}
	p.signalAll(syscall.SIGKILL)
	<-proc.done
}

// Pause stops the server and all its backends, so that it hangs and does not refuse.
func (p *Postgres) Pause() {
	p.signalAll(syscall.SIGSTOP)
	poll := time.NewTicker(readyPoll)
	defer poll.Stop()
	for p.anyRunning() { // a process stops when it next leaves the kernel
		<-poll.C
	}
}

// Resume undoes Pause.
func (p *Postgres) Resume() { p.signalAll(syscall.SIGCONT) }

// signalAll signals the postmaster and its children, each of which leads a process group of its own.
func (p *Postgres) signalAll(signal syscall.Signal) {
	p.mu.Lock()
	proc := p.proc
	p.mu.Unlock()
	if proc == nil {
		return
	}
	select {
	case <-proc.done:
		return // its pid may belong to another process by now
	default:
	}
	// The postmaster must not fork another child meanwhile, and must live for its children to be known as its own.
	first, last := signal, syscall.Signal(0)
	if signal == syscall.SIGKILL {
		first, last = syscall.SIGSTOP, signal
	}
	pid := proc.cmd.Process.Pid
	_ = proc.cmd.Process.Signal(first)
	for _, child := range children(pid) {
		_ = syscall.Kill(child, signal)
	}
	_ = proc.cmd.Process.Signal(last)
}

// anyRunning reports whether the server or a child of it is neither stopped nor gone.
func (p *Postgres) anyRunning() bool {
	p.mu.Lock()
	proc := p.proc
	p.mu.Unlock()
	if proc == nil {
		return false
	}
	server := proc.cmd.Process.Pid
	return slices.ContainsFunc(processes(), func(q processStatus) bool {
		return (q.pid == server || q.parent == server) && !strings.HasPrefix(q.state, "T") && !strings.HasPrefix(q.state, "Z")
	})
}

func children(parent int) (pids []int) {
	for _, p := range processes() {
		if p.parent == parent {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

type processStatus struct {
	pid, parent int
	state       string
}

func processes() (all []processStatus) {
	output, err := exec.Command("ps", "-A", "-o", "pid=,ppid=,stat=").Output()
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(output)) {
		var p processStatus
		if n, _ := fmt.Sscan(line, &p.pid, &p.parent, &p.state); n == 3 {
			all = append(all, p)
		}
	}
	return all
}

// process is a child that a thread of ours guards: where the kernel can, it is signalled when that thread dies, and the
// thread lives as long as the child.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // a parent-death signal follows the thread that forked
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(p.done)
		}
	}()
	return p, <-started
}

// tail keeps the end of the server's log for error messages.
type tail struct {
	mu    sync.Mutex
	lines []byte
}

func (t *tail) Write(p []byte) (int, error) {
	const keep = 2048
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, p...)
	t.lines = t.lines[max(0, len(t.lines)-keep):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.lines))
}

var _ io.Writer = (*tail)(nil)

// unprivileged picks the user that runs the server when we are root.
func unprivileged() (*syscall.Credential, error) {
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.ParseUint(u.Uid, 10, 32)
		gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
		if uidErr == nil && gidErr == nil {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, errors.New("postgres does not run as root, and there is no user postgres or nobody to run it as: use another user")
}

// binaries finds the folder of initdb and postgres: the newest in the usual places, unless PATH or the environment say
// otherwise.
func binaries() (string, error) {
	var folders []string
	if folder := os.Getenv("REKALL_PG_BIN"); folder != "" {
		folders = append(folders, folder)
	}
	if path, err := exec.LookPath("postgres"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			folders = append(folders, filepath.Dir(path))
		}
	}
	if path, err := exec.LookPath("pg_config"); err == nil {
		if output, err := exec.Command(path, "--bindir").Output(); err == nil {
			folders = append(folders, strings.TrimSpace(string(output)))
		}
	}
	var usual []string
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin",
		"/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin",
		"/Applications/Postgres.app/Contents/Versions/*/bin",
	} {
		found, _ := filepath.Glob(pattern)
		usual = append(usual, found...)
	}
	slices.SortFunc(usual, func(a, b string) int { return version(b) - version(a) })
	for _, folder := range append(folders, usual...) {
		if executable(filepath.Join(folder, "initdb")) && executable(filepath.Join(folder, "postgres")) {
			return folder, nil
		}
	}
	return "", ErrNoPostgres
}

// version is the first number in a path; newer servers have a higher one.
func version(path string) int {
	digits := strings.FieldsFunc(path, func(r rune) bool { return r < '0' || r > '9' })
	if len(digits) == 0 {
		return 0
	}
	n, _ := strconv.Atoi(digits[0])
	return n
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir() && info.Mode()&0o111 != 0
}

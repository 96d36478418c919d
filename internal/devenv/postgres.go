package devenv

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// PostgresOptions of StartPostgres. The zero value is a throw-away server on a free port.
type PostgresOptions struct {
	// Dir keeps the data for the next start; it is made if need be. Empty: a temporary directory, removed by Stop.
	Dir string
	// Port on 127.0.0.1; 0: a free one.
	Port int
	// Settings of postgresql.conf, which win over the defaults of this package.
	Settings map[string]string
	// Files to put into a throw-away server's data directory, by the relative names under which Settings know them.
	Files map[string][]byte
}

// Postgres is a private server, reached over loopback with a password of its own. On Linux it dies with this process;
// elsewhere the next StartPostgres ends what a killed process left running. Either way that start removes its files.
type Postgres struct {
	// Port on 127.0.0.1.
	Port int

	options  PostgresOptions
	bin      string     // folder of initdb and postgres
	user     *account   // that the server runs as
	run      *lockedDir // socket and logs, and the data of a throw-away server
	kept     *lockedDir // nil for a throw-away server
	data     string     // Postgres's data directory
	password string

	mu      sync.Mutex // held while the server changes its state
	server  *process   // nil after Kill and Stop
	stopped bool
}

var (
	errNotRunning = errors.New("the server is not running")
	errPortTaken  = errors.New("it is in use by another program: choose another")
)

// StartPostgres makes a database cluster, or opens the one that Dir keeps, and starts it. As root it runs the server as
// user postgres, or nobody, since Postgres refuses root. The context bounds the start only.
func StartPostgres(ctx context.Context, options PostgresOptions) (*Postgres, error) {
	p := &Postgres{options: options}
	err := p.prepare(ctx)
	if err == nil {
		err = p.start(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("start postgres: %w", errors.Join(err, p.release()))
	}
	return p, nil
}

// URL of the database "postgres" as its superuser.
func (p *Postgres) URL() string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(superuser, p.password),
		Host: loopback(p.Port), Path: "/postgres", RawQuery: "sslmode=disable",
	}
	return u.String()
}

// SetPassword says that the superuser's password has been changed.
func (p *Postgres) SetPassword(password string) { p.password = password }

// Stop shuts the server down and removes what is temporary. It first lets transactions roll back; where that takes longer
// than some seconds or than the context, it kills. It may be called again, and by several goroutines.
func (p *Postgres) Stop(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	p.stopped = true
	p.shutdown(ctx)
	if err := p.release(); err != nil {
		return fmt.Errorf("stop postgres: %w", err)
	}
	return nil
}

// Kill ends the server and its backends at once, as a crash does. Restart brings it back.
func (p *Postgres) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		p.server.kill()
		p.server = nil
	}
}

// Restart starts the server again on the same port, after Kill or, if it runs, a shutdown.
func (p *Postgres) Restart(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return fmt.Errorf("restart postgres: %w", errNotRunning)
	}
	p.shutdown(ctx)
	if err := p.startOnPort(ctx); err != nil {
		return fmt.Errorf("restart postgres: %w", err)
	}
	return nil
}

// Pause freezes the server and all its backends: connections stay open and nothing answers. It returns once all stand
// still.
func (p *Postgres) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		freeze(p.server.running())
	}
}

// Resume undoes Pause.
func (p *Postgres) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		thaw(p.server.running())
	}
}

// prepare finds the programs and makes the directories and, unless it is kept from an earlier start, the cluster.
func (p *Postgres) prepare(ctx context.Context) error {
	folders, err := binaries()
	if err != nil {
		return err
	}
	p.bin = folders[0]
	if p.user, err = serverAccount(); err != nil {
		return err
	}
	sweep()
	if err := p.makeRunDir(); err != nil {
		return err
	}
	if p.options.Dir != "" {
		return p.openKept(ctx, folders)
	}
	if err := p.initialise(ctx, p.data); err != nil {
		return err
	}
	return p.addFiles()
}

// addFiles writes files that only the server may read, as it demands of a private key.
func (p *Postgres) addFiles() error {
	for name, content := range p.options.Files {
		path := filepath.Join(p.data, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return fmt.Errorf("add a file: %w", err)
		}
		if err := p.user.own(path); err != nil {
			return err
		}
	}
	return nil
}

// makeRunDir makes what is temporary. A throw-away server's data is, too.
func (p *Postgres) makeRunDir() (err error) {
	if p.run, err = newRunDir(); err != nil {
		return err
	}
	p.data = filepath.Join(p.run.path, dataName)
	// The server, another user when we are root, writes its socket here; nobody else may reach it.
	return p.makeDir(p.socketDir())
}

// release removes what is temporary and unlocks what is kept.
func (p *Postgres) release() error {
	if p.kept != nil {
		p.kept.unlock()
	}
	if p.run == nil {
		return nil
	}
	if p.kept == nil {
		removeSharedMemory(p.data) // Postgres would, at the next start
	}
	return p.run.remove()
}

func (p *Postgres) socketDir() string           { return filepath.Join(p.run.path, "socket") }
func (p *Postgres) logOf(program string) string { return filepath.Join(p.run.path, program+".log") }

// makeDir makes a directory that only the server's user and root enter.
func (p *Postgres) makeDir(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	return p.user.own(path)
}

// start starts the server on the port asked for, or on a free one, which another program may take first.
func (p *Postgres) start(ctx context.Context) error {
	const attempts = 5
	if p.Port = p.options.Port; p.Port != 0 {
		return p.startOnPort(ctx)
	}
	var err error
	for range attempts {
		if p.Port, err = freePort(); err != nil {
			return err
		}
		if err = p.startOnPort(ctx); !errors.Is(err, errPortTaken) {
			return err
		}
	}
	return err
}

// startOnPort starts the server on its port and waits until it takes connections.
func (p *Postgres) startOnPort(ctx context.Context) error {
	server, err := p.launch("postgres", p.arguments()...)
	if err != nil {
		return err
	}
	if err := p.awaitReady(ctx, server); err != nil {
		server.kill()
		return err
	}
	p.server = server
	return nil
}

func (p *Postgres) arguments() []string {
	settings := map[string]string{
		"listen_addresses": "127.0.0.1",
		"shared_buffers":   "32MB",
		// In the data directory rather than /dev/shm, where a killed server's segments would outlive it.
		"dynamic_shared_memory_type": "mmap",
	}
	if p.kept == nil {
		// Not synchronous_commit: with it off, Kill would lose what was committed.
		settings["fsync"], settings["full_page_writes"] = "off", "off"
	}
	maps.Copy(settings, p.options.Settings)
	// killOrphan knows our servers by the first two.
	args := []string{"-D", p.data, "-k", p.socketDir(), "-p", strconv.Itoa(p.Port)}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	return args
}

// awaitReady watches the pid file, of which a killed server may have left an older one.
func (p *Postgres) awaitReady(ctx context.Context, server *process) error {
	const interval = 5 * time.Millisecond
	poll := time.NewTicker(interval)
	defer poll.Stop()
	for {
		if f := readPIDFile(p.data); f.pid == server.pid() && f.ready {
			return nil
		}
		select {
		case <-server.exited:
			return p.explainExit("postgres")
		case <-ctx.Done():
			return fmt.Errorf("wait until it is ready: %w", ctx.Err())
		case <-poll.C:
		}
	}
}

// launch starts a program of Postgres as the server's user. Its output goes to a log.
func (p *Postgres) launch(name string, args ...string) (*process, error) {
	log, err := os.OpenFile(p.logOf(name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make the log: %w", err)
	}
	defer func() { _ = log.Close() }() // the child has its own descriptor
	cmd := exec.Command(filepath.Join(p.bin, name), args...)
	cmd.Dir = p.socketDir() // ours may be closed to the server's user
	cmd.Stdout, cmd.Stderr = log, log
	// Not our whole environment: it may hold PG… variables, and secrets that are not the server user's to read.
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC", "PATH=" + os.Getenv("PATH")}
	if path, ok := os.LookupEnv("LD_LIBRARY_PATH"); ok {
		cmd.Env = append(cmd.Env, "LD_LIBRARY_PATH="+path)
	}
	cmd.SysProcAttr = childAttributes(p.user)
	child, err := startProcess(cmd)
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("user %s, which runs the server, may not run %s: install Postgres where it may", p.user, cmd.Path)
	}
	return child, err
}

// runProgram runs a program of Postgres to its end.
func (p *Postgres) runProgram(ctx context.Context, name string, args ...string) error {
	program, err := p.launch(name, args...)
	if err != nil {
		return err
	}
	select {
	case <-program.exited:
	case <-ctx.Done():
		program.kill()
		return fmt.Errorf("%s: %w", name, ctx.Err())
	}
	if program.err != nil {
		return fmt.Errorf("%s: %w", name, p.explainExit(name))
	}
	return nil
}

// shutdown ends the server, with ever less patience. Its exit code is of no interest: it is gone.
func (p *Postgres) shutdown(ctx context.Context) {
	if p.server == nil {
		return
	}
	server := p.server
	p.server = nil
	thaw(server.running())
	for _, step := range []struct {
		signal   syscall.Signal
		patience time.Duration
	}{
		{syscall.SIGINT, 5 * time.Second},  // "fast": ends sessions, writes a checkpoint
		{syscall.SIGQUIT, 2 * time.Second}, // "immediate": the next start recovers
	} {
		_ = server.cmd.Process.Signal(step.signal)
		select {
		case <-server.exited:
			return
		case <-ctx.Done():
		case <-time.After(step.patience):
		}
	}
	server.kill()
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

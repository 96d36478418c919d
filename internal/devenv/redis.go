package devenv

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"
)

// RedisOptions of StartRedis. The zero value is a server without a password.
type RedisOptions struct {
	// Password of the default user; empty: none.
	Password string
	// TLS has the server speak only TLS, with a certificate and its key in these files.
	TLS *RedisTLS
	// Dir is where the server saves what it knows, as redis-server does by default; empty: nowhere.
	Dir string
}

// RedisTLS names the files of a server's certificate.
type RedisTLS struct{ CertificateFile, KeyFile string }

// Redis is a private server on loopback, which keeps nothing on disk unless it has a directory. On Linux it dies with this process.
type Redis struct {
	// Port on 127.0.0.1.
	Port int

	options RedisOptions
	program string

	mu     sync.Mutex // held while the server changes its state
	server *process   // nil after Kill
}

// ErrNoRedis says that there is no redis-server in PATH.
var ErrNoRedis = errors.New("there is no redis-server: install Debian's package redis-server")

// StartRedis starts a server on a free port. The context bounds the start only.
func StartRedis(ctx context.Context, options RedisOptions) (*Redis, error) {
	program, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, ErrNoRedis
	}
	r := &Redis{options: options, program: program}
	const attempts = 5 // another program may take the port first
	for range attempts {
		if r.Port, err = freePort(); err != nil {
			break
		}
		if err = r.Restart(ctx); err == nil {
			return r, nil
		}
	}
	return nil, fmt.Errorf("start redis: %w", err)
}

// URL of the server, with its password.
func (r *Redis) URL() string {
	u := url.URL{Scheme: "redis", Host: loopback(r.Port)}
	if r.options.TLS != nil {
		u.Scheme = "rediss"
	}
	if r.options.Password != "" {
		u.User = url.UserPassword("default", r.options.Password)
	}
	return u.String()
}

// Restart starts the server on its port, with what it had saved, after Kill or, if it runs, killing it.
func (r *Redis) Restart(ctx context.Context) error {
	r.Kill()
	r.mu.Lock()
	defer r.mu.Unlock()
	log := new(redisLog)
	cmd := exec.Command(r.program, "-")
	cmd.Stdin = strings.NewReader(r.config())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = os.TempDir()
	cmd.SysProcAttr = childAttributes(new(account))
	server, err := startProcess(cmd)
	if err != nil {
		return err
	}
	if err := log.awaitReady(ctx, server); err != nil {
		server.kill()
		return err
	}
	r.server = server
	return nil
}

// config goes through standard input: arguments, and the password in them, are for everybody to read.
func (r *Redis) config() string {
	lines := []string{"bind 127.0.0.1", "appendonly no"}
	if r.options.Dir == "" {
		lines = append(lines, `save ""`)
	} else {
		lines = append(lines, "dir "+r.options.Dir)
	}
	if tls := r.options.TLS; tls != nil {
		lines = append(lines, "port 0", "tls-port "+strconv.Itoa(r.Port), "tls-cert-file "+tls.CertificateFile,
			"tls-key-file "+tls.KeyFile, "tls-auth-clients no")
	} else {
		lines = append(lines, "port "+strconv.Itoa(r.Port))
	}
	if r.options.Password != "" {
		lines = append(lines, "requirepass "+r.options.Password)
	}
	return strings.Join(lines, "\n") + "\n"
}

// Kill ends the server at once, as a crash does. What it knew and has not saved is gone.
func (r *Redis) Kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server != nil {
		r.server.kill()
		r.server = nil
	}
}

// Pause freezes the server: connections stay open and nothing answers.
func (r *Redis) Pause() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server != nil {
		freeze(r.server.running())
	}
}

// Resume undoes Pause.
func (r *Redis) Resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server != nil {
		thaw(r.server.running())
	}
}

// redisLog is what a server says.
type redisLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *redisLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *redisLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// awaitReady waits for the server's own word: another program may answer at its port.
func (l *redisLog) awaitReady(ctx context.Context, server *process) error {
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for !strings.Contains(l.String(), "Ready to accept connections") {
		select {
		case <-server.exited:
			return fmt.Errorf("redis-server ended: %s", l)
		case <-ctx.Done():
			return fmt.Errorf("wait until redis-server is ready: %w", ctx.Err())
		case <-poll.C:
		}
	}
	return nil
}

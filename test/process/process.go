// Package process runs what tests are about, the gateway before all, as processes of their own.
package process

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// endsWithin is how long a process may take to end, unless its Options say otherwise.
const endsWithin = time.Minute

// Log collects what a process prints. It can be read meanwhile, and serve a process that is started again.
type Log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// String returns all of it.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// Tail returns its last 6,000 bytes.
func (l *Log) Tail() string {
	text := l.String()
	return text[max(0, len(text)-6000):]
}

// Options of a process. All may be left out.
type Options struct {
	Env    []string   // in addition to the test's own
	Files  []*os.File // that it is handed, from fd 3 on
	Log    *Log       // nil: one of its own
	Killed bool       // at the end of the test, in place of being asked to end

	EndsWithin time.Duration // when it is asked to; 0: a minute
}

// Process is a program that was started.
type Process struct {
	Log        *Log
	name       string
	cmd        *exec.Cmd
	endsWithin time.Duration
	done       chan struct{}
}

// Run starts a program, which runs until something ends it.
func Run(o Options, program string, args ...string) (*Process, error) {
	p := &Process{
		Log: o.Log, name: filepath.Base(program), cmd: exec.Command(program, args...),
		endsWithin: cmp.Or(o.EndsWithin, endsWithin), done: make(chan struct{}),
	}
	if p.Log == nil {
		p.Log = new(Log)
	}
	// A race that ends the process is seen though nobody reads the log.
	p.cmd.Env = append(append(os.Environ(), "GORACE=halt_on_error=1 "+os.Getenv("GORACE")), o.Env...)
	p.cmd.ExtraFiles = o.Files
	p.cmd.Stdout, p.cmd.Stderr = p.Log, p.Log
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
	return p, nil
}

// Start runs a program until the test ends. If the test has failed, its log is shown.
func Start(t testing.TB, o Options, program string, args ...string) *Process {
	t.Helper()
	p, err := Run(o, program, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if o.Killed {
			p.kill()
		}
		p.end(t)
		if t.Failed() {
			t.Logf("end of the log of %s:\n%s", p.name, p.Log.Tail())
		}
	})
	return p
}

// Stop asks the process to end, as systemd does, and waits until it has. That it had ended before, or a data race that it had, fails
// the test.
func (p *Process) Stop(t testing.TB) {
	t.Helper()
	p.Signal(t, syscall.SIGCONT)
	p.end(t)
}

func (p *Process) end(t testing.TB) {
	t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGCONT)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(p.endsWithin):
		p.kill()
		t.Errorf("%s did not end", p.name)
	}
	if strings.Contains(p.Log.String(), "DATA RACE") {
		t.Errorf("%s has a data race", p.name)
	}
}

// Kill ends the process at once. That it had ended before fails the test.
func (p *Process) Kill(t testing.TB) {
	t.Helper()
	p.Signal(t, syscall.SIGKILL)
	<-p.done
}

func (p *Process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Signal sends a signal. That the process has ended fails the test.
func (p *Process) Signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Errorf("send %s to %s: %v", s, p.name, err)
	}
}

// Ended is closed when the process has ended.
func (p *Process) Ended() <-chan struct{} { return p.done }

// MustRun fails the test if the process has ended.
func (p *Process) MustRun(t testing.TB) {
	t.Helper()
	select {
	case <-p.done:
		t.Fatalf("%s ended:\n%s", p.name, p.Log.Tail())
	default:
	}
}

// Pid returns the number of the process.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// ExitCode returns that of a process that has ended.
func (p *Process) ExitCode() int { return p.cmd.ProcessState.ExitCode() }

const (
	// The blocks of ports lie below those that the kernel gives to outgoing connections, one of which could take a port first, and
	// below those of devenv.
	firstBlock, blocks, blockSize = 11_000, 18, 500
)

// block listens on the first port of the block that no other test program has: who listens there has it. Others could take what a test
// here has stopped for a while.
var block = sync.OnceValue(func() net.Listener {
	for _, i := range rand.Perm(blocks) {
		if listener, err := net.Listen("tcp", loopback(firstBlock+i*blockSize)); err == nil {
			return listener
		}
	}
	return nil
})

var lastPort atomic.Int32 // in the block

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// FreePort returns a port that no other test of this program was given lately.
func FreePort(t testing.TB) int {
	t.Helper()
	held := block()
	if held == nil {
		t.Fatal("no block of ports is free")
	}
	for range blockSize {
		port := held.Addr().(*net.TCPAddr).Port + 1 + int(lastPort.Add(1))%(blockSize-1)
		if l, err := net.Listen("tcp", loopback(port)); err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// FreeAddress returns a free port with its host.
func FreeAddress(t testing.TB) string {
	t.Helper()
	return loopback(FreePort(t))
}

// Write writes a file that only the test's user may read.
func Write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Read returns what is in a file.
func Read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

package devenv

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/rekall-ai/gateway/test/eventually"
)

// The test binary, started again with this variable, is a program that owns a server: its value is the kept directory, or
// "temporary".
const ownerVariable = "DEVENV_TEST_OWNER"

func TestMain(m *testing.M) {
	if dir, ok := os.LookupEnv(ownerVariable); ok {
		if err := own(dir, os.Stdout); err != nil {
			_, _ = fmt.Fprintln(os.Stdout, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// own starts a server, prints its URL and what a test must know to see it end, and stops it upon SIGINT. It pauses
// it upon a line of input.
func own(dir string, output io.Writer) error {
	if dir == "temporary" {
		dir = ""
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	p, err := StartPostgres(ctx, PostgresOptions{Dir: dir})
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(output, p.URL(), p.server.pid(), p.run.path, p.data); err != nil {
		return errors.Join(err, p.Stop(ctx))
	}
	go func() {
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err == nil {
			p.Pause()
			_, _ = fmt.Fprintln(output, "paused")
		}
	}()
	<-ctx.Done()
	return p.Stop(context.Background())
}

// owner is a running program that owns a server.
type owner struct {
	cmd            *exec.Cmd
	input          io.Writer
	output         *bufio.Reader
	url, run, data string
	members        []processEntry // of its server
	stderr         bytes.Buffer
	pid            int // of its server
}

// launchOwner starts the program; ready waits for its server.
func launchOwner(t *testing.T, dir string, credential *syscall.Credential) *owner {
	t.Helper()
	o := &owner{cmd: exec.Command(program(t))}
	o.cmd.Env = append(os.Environ(), ownerVariable+"="+dir)
	o.cmd.Dir = "/"
	o.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	o.cmd.Stderr = &o.stderr
	input, err := o.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := o.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	o.input, o.output = input, bufio.NewReader(output)
	if err := o.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = o.cmd.Process.Kill()
		_ = o.cmd.Wait()
	})
	return o
}

func (o *owner) ready(t *testing.T) *owner {
	t.Helper()
	line, err := o.output.ReadString('\n')
	if _, scanErr := fmt.Sscan(line, &o.url, &o.pid, &o.run, &o.data); err != nil || scanErr != nil {
		t.Fatalf("the owner said %q: %v\n%s", line, err, o.stderr.String())
	}
	o.members = tree(o.pid)
	return o
}

// interrupt ends the owner as Ctrl-C does.
func (o *owner) interrupt(t *testing.T) {
	t.Helper()
	if err := o.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := o.cmd.Wait(); err != nil {
		t.Errorf("the owner ended with %v\n%s", err, o.stderr.String())
	}
}

// program is a copy of the test binary that every user may run.
func program(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(publicDir(t), "owner")
	// A program that another test starts meanwhile would hold the file open for writing until it is executed itself, and a file
	// that is open for writing cannot be executed ("text file busy", https://go.dev/issue/22315).
	syscall.ForkLock.RLock()
	err = os.WriteFile(path, content, 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// nobody is the credential of an ordinary user; nil if we are one.
func nobody(t *testing.T) *syscall.Credential {
	t.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	a, err := newAccount(u)
	if err != nil {
		t.Fatal(err)
	}
	return a.credential()
}

// TestOwnerNeedsNotBeRoot is for a test run as root; the other tests show the same to anybody else.
func TestOwnerNeedsNotBeRoot(t *testing.T) {
	t.Parallel()
	o := launchOwner(t, "temporary", nobody(t)).ready(t)
	if got := query(t, o.url, "select 1::text"); got != "1" {
		t.Errorf("answer %q", got)
	}
	info, err := os.Stat(o.data)
	if err != nil {
		t.Fatal(err)
	}
	if info.Sys().(*syscall.Stat_t).Uid == 0 {
		t.Error("the data belongs to root")
	}
	o.interrupt(t)
	if left := alive(o.members); len(left) > 0 {
		t.Errorf("left processes %v", left)
	}
	if exists(o.run) {
		t.Errorf("left %s", o.run)
	}
}

func TestRootOpensAnotherUsersKeptDirectoryAsThatUser(t *testing.T) {
	t.Parallel()
	credential := nobody(t)
	dir := publicDir(t)
	if credential != nil {
		if err := os.Chown(dir, int(credential.Uid), int(credential.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	dir = filepath.Join(dir, "kept")
	for range 2 { // by turns: root leaves nothing that the user could not open
		o := launchOwner(t, dir, credential).ready(t)
		query(t, o.url, "create table if not exists t as select 42 as n")
		o.interrupt(t)
		p := start(t, PostgresOptions{Dir: dir})
		if got := query(t, p.URL(), "select n::text from t"); got != "42" {
			t.Errorf("answer %q", got)
		}
		stop(t, p)
	}
}

// TestKilledOwnerLeavesNothingToTheNextStart kills an owner so that it can do nothing more.
func TestKilledOwnerLeavesNothingToTheNextStart(t *testing.T) {
	t.Parallel()
	kept := filepath.Join(publicDir(t), "kept")
	for _, dir := range []string{"temporary", kept} {
		for _, paused := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, paused %v", filepath.Base(dir), paused), func(t *testing.T) {
				o := launchOwner(t, dir, nil).ready(t)
				if paused {
					// Stopped processes obey no signal but SIGKILL, so they outlive their owner by seconds, or for good.
					if _, err := fmt.Fprintln(o.input, "pause"); err != nil {
						t.Fatal(err)
					}
					if _, err := o.output.ReadString('\n'); err != nil {
						t.Fatal(err)
					}
				}
				if err := o.cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				_ = o.cmd.Wait()
				if !paused && runtime.GOOS == "linux" {
					eventually.True(t, "the server ends", func() bool { return len(alive(o.members)) == 0 })
				}
				options := PostgresOptions{}
				if dir == kept {
					options.Dir = dir
				}
				next := start(t, options)
				eventually.True(t, "the old server ends", func() bool { return len(alive(o.members)) == 0 })
				if exists(o.run) {
					t.Errorf("left %s", o.run)
				}
				if got := query(t, next.URL(), "select 1::text"); got != "1" {
					t.Errorf("answer %q", got)
				}
				stop(t, next)
			})
		}
	}
}

func TestInterruptedStartLeavesNothing(t *testing.T) {
	for _, program := range []string{"initdb", "postgres"} {
		t.Run(program, func(t *testing.T) {
			o := launchOwner(t, "temporary", nil)
			var run string
			var members []processEntry
			eventually.True(t, program+" runs", func() bool {
				for _, e := range tree(o.cmd.Process.Pid) {
					line := commandLine(e.pid)
					if e.parent != o.cmd.Process.Pid || !strings.Contains(line, "/"+program+" -D ") {
						continue
					}
					_, data, _ := strings.Cut(line, " -D ")
					run = filepath.Dir(strings.Fields(data)[0])
					members = tree(e.pid)
					return true
				}
				return false
			})
			if err := o.cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			output, err := io.ReadAll(o.output)
			if err != nil && !errors.Is(err, os.ErrClosed) {
				t.Fatal(err)
			}
			// A server may be ready just before the signal comes; then the owner stops it.
			if err := o.cmd.Wait(); err != nil && !strings.Contains(string(output), context.Canceled.Error()) {
				t.Errorf("the owner ended with %v, saying %q\n%s", err, output, o.stderr.String())
			}
			eventually.True(t, "all have ended", func() bool { return len(alive(members)) == 0 })
			if exists(run) {
				t.Errorf("left %s", run)
			}
		})
	}
}

package test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// terminal makes a terminal, and returns the end of who sits before it and that of programs.
func terminal(t *testing.T) (person, programs *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	programs, err = os.OpenFile("/dev/pts/"+strconv.Itoa(number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = programs.Close() })
	return person, programs
}

func echoes(t *testing.T, terminal *os.File) bool {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

// start starts a command of keys that reads from a file.
func (k *keysCLI) start(input *os.File, stderr io.Writer, args ...string) (*exec.Cmd, <-chan struct{}) {
	k.t.Helper()
	cmd := exec.Command(program, append([]string{"keys"}, args...)...)
	cmd.Env = append(os.Environ(), "REKALL_DATABASE_URL="+k.database)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = input, io.MultiWriter(), stderr // no null device, on which no key is made
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if _, err := unix.IoctlGetTermios(int(input.Fd()), unix.TCGETS); err == nil {
		cmd.SysProcAttr.Setctty = true
	}
	if err := cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = cmd.Process.Kill() })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	return cmd, ended
}

// interrupted wants a command to have ended by itself, with an error.
func interrupted(t *testing.T, cmd *exec.Cmd, ended <-chan struct{}) {
	t.Helper()
	eventually.True(t, "the command ends", func() bool {
		select {
		case <-ended:
			return true
		default:
			return false
		}
	})
	if code := cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("%v: exit %d, %v", cmd.Args[1:], code, cmd.ProcessState)
	}
}

// The key that is typed is not shown, and the shell afterwards must show what is typed again.
func TestInterruptAtTheQuestionForAKeyEndsTheCommandAndRestoresTheTerminal(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	for _, by := range []string{"the terminal", "a signal"} {
		person, programs := terminal(t)
		cmd, ended := k.start(programs, programs, "check")
		if prompt, err := bufio.NewReader(person).ReadString(' '); err != nil || prompt != "Key: " {
			t.Fatalf("%q, %v", prompt, err)
		}
		eventually.True(t, "nothing is echoed", func() bool { return !echoes(t, programs) })
		if by == "a signal" {
			_ = cmd.Process.Signal(syscall.SIGTERM)
		} else if _, err := person.WriteString("\x03"); err != nil {
			t.Fatal(err)
		}
		interrupted(t, cmd, ended)
		if !echoes(t, programs) {
			t.Errorf("by %s: the terminal is left without echo", by)
		}
	}
}

func TestInterruptEndsACommandThatReadsItsInput(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	for args, input := range map[string]string{
		"check":                   "rk_",
		"revoke --hashes -":       strings.Repeat("0", 64) + "\n",
		"import - --format csv":   "hash,account,name,environment,scopes\n",
		"import - --format jsonl": "\n",
	} {
		from, to, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr strings.Builder
		cmd, ended := k.start(from, &stderr, strings.Fields(args)...)
		if _, err := to.WriteString(input); err != nil {
			t.Fatal(err)
		}
		eventually.True(t, "the input is read", func() bool {
			left, err := unix.IoctlGetInt(int(from.Fd()), unix.TIOCINQ)
			return err == nil && left == 0
		})
		_ = cmd.Process.Signal(syscall.SIGTERM)
		interrupted(t, cmd, ended)
		if text := stderr.String(); !strings.HasPrefix(text, "Error: interrupted: ") || apikey.ContainsKey(text) {
			t.Errorf("%s: %q", args, text)
		}
		_, _ = from.Close(), to.Close()
	}
}

// TestCommandUnderNohupOutlivesItsTerminal: a revocation that waits for edges is not given up with it.
func TestCommandUnderNohupOutlivesItsTerminal(t *testing.T) {
	t.Parallel()
	k := newKeysCLI(t)
	from, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `trap "" HUP; exec "$0" keys check`, program)
	cmd.Env, cmd.Stdin = append(os.Environ(), "REKALL_DATABASE_URL="+k.database), from
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := to.WriteString("rk_"); err != nil {
		t.Fatal(err)
	}
	eventually.True(t, "the input is read", func() bool {
		left, err := unix.IoctlGetInt(int(from.Fd()), unix.TIOCINQ)
		return err == nil && left == 0
	})
	status := process.Read(t, fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if ignored := regexp.MustCompile(`\nSigIgn:\t[0-9a-f]+[13579bdf]\n`); !ignored.MatchString(status) { // SIGHUP is the lowest bit
		t.Errorf("a hangup is not ignored:\n%s", status)
	}
	_ = to.Close()
	_ = cmd.Wait()
	_ = from.Close()
}

func TestInterruptOfACommandThatWaitsForPostgresSaysThatNoKeyWasMade(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	k := &keysCLI{t, "postgres://rekall@" + silent.Addr().String() + "/none?sslmode=disable"}
	nothing, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = nothing.Close() }()
	var stderr strings.Builder
	cmd, ended := k.start(nothing, &stderr, "create", "--name", "n", "--scopes", "memories:read", "--environment", "production")
	if _, err := silent.Accept(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Signal(os.Interrupt)
	interrupted(t, cmd, ended)
	if text := stderr.String(); !strings.HasPrefix(text, "Error: interrupted: no key was made: ") {
		t.Errorf("%q", text)
	}
}

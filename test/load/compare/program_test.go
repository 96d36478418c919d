//go:build load

package compare

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// program of a system, with the processes that it starts itself.
type program struct {
	t    *testing.T
	log  string // file that its output is appended to
	cmd  *exec.Cmd
	done chan struct{}
}

// tuned are the variables that would change how every Go program collects its garbage.
var tuned = []string{"GOGC=", "GOMEMLIMIT=", "GODEBUG=", "GOMAXPROCS="}

// environment of a process: ours without what would tune it, and what is added.
func environment(added []string) []string {
	var list []string
variables:
	for _, variable := range os.Environ() {
		for _, prefix := range tuned {
			if strings.HasPrefix(variable, prefix) {
				continue variables
			}
		}
		list = append(list, variable)
	}
	return append(list, added...)
}

// startProgram starts a program, which ends with the test. Its output goes straight to a file: copying it would cost CPU time
// that is not its own.
func startProgram(t *testing.T, log string, variables []string, path string, args ...string) *program {
	t.Helper()
	file, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	p := &program{t: t, log: log, cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Env = environment(variables)
	p.cmd.Stdout, p.cmd.Stderr = file, file
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", filepath.Base(path), err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(p.end)
	return p
}

func (p *program) end() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
		p.t.Errorf("%s did not end", filepath.Base(p.cmd.Path))
	}
	if p.t.Failed() {
		text, _ := os.ReadFile(p.log)
		p.t.Logf("end of %s:\n%s", filepath.Base(p.log), text[max(0, len(text)-500):])
	}
}

// running fails the test if the process has ended.
func (p *program) running() {
	p.t.Helper()
	select {
	case <-p.done:
		p.t.Fatalf("%s ended: %v", filepath.Base(p.cmd.Path), p.cmd.ProcessState)
	default:
	}
}

// cpu is the user and system time of the process and of those below it.
func (p *program) cpu() time.Duration {
	p.t.Helper()
	p.running()
	var sum time.Duration
	for _, pid := range descendants(p.t, p.cmd.Process.Pid) {
		// Bits of a clock's id: the complement of the process, then 2 for the CPU time that the scheduler counts in ns.
		// /proc/PID/stat shows the same in steps of 10 ms, 1 % of a round.
		var ts unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
			p.t.Fatalf("read the CPU time of process %d: %v", pid, err)
		}
		sum += time.Duration(ts.Nano())
	}
	return sum
}

// descendants lists a process and all below it.
func descendants(t *testing.T, pid int) []int {
	t.Helper()
	list := []int{pid}
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if len(files) == 0 {
		t.Fatalf("process %d has ended, or this kernel does not tell a process's children", pid)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file) // a thread may have ended; it had no children
		for _, field := range strings.Fields(string(text)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, descendants(t, child)...)
		}
	}
	return list
}

// rss is the resident memory of the process itself, in bytes.
func (p *program) rss() float64 {
	p.t.Helper()
	p.running()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	if err != nil {
		p.t.Fatal(err)
	}
	return float64(pages * os.Getpagesize())
}

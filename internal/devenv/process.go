package devenv

import (
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// process is a child and, for Postgres, the root of a tree: each backend is a child of the server, in a session of its own,
// so that signals to a process group do not reach it.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{} // closed when it has
	err    error         // with which it has
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		// A parent-death signal is sent when the thread ends that forked, not the process: keep this one until the child
		// has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// running returns the process's id, or 0 once it has exited, when the id may be another's.
func (p *process) running() int {
	select {
	case <-p.exited:
		return 0
	default:
		return p.pid()
	}
}

// kill ends the process and its descendants, and returns once they have.
func (p *process) kill() {
	killTree(p.running())
	<-p.exited
}

// processEntry is a line of the process table.
type processEntry struct {
	pid, parent int
	state       string // one letter
}

func (e processEntry) dead() bool    { return e.state == "Z" }
func (e processEntry) stopped() bool { return e.state == "T" }

// tree lists the living processes from root down, parents first; none for root 0.
func tree(root int) []processEntry {
	if root == 0 {
		return nil
	}
	table := slices.DeleteFunc(processTable(), processEntry.dead)
	var members []processEntry
	for _, e := range table {
		if e.pid == root {
			members = append(members, e)
		}
	}
	for i := 0; i < len(members); i++ {
		for _, e := range table {
			if e.parent == members[i].pid {
				members = append(members, e)
			}
		}
	}
	return members
}

func signalAll(members []processEntry, signal syscall.Signal) {
	for _, e := range members {
		_ = syscall.Kill(e.pid, signal)
	}
}

// freeze stops a tree. A process can fork until it has stopped, and a stop takes a moment: look again until all have.
func freeze(root int) {
	poll(func() bool {
		members := slices.DeleteFunc(tree(root), processEntry.stopped)
		signalAll(members, syscall.SIGSTOP)
		return len(members) == 0
	})
}

func thaw(root int) { signalAll(tree(root), syscall.SIGCONT) }

// killTree ends a tree, frozen first so that no child escapes. Once the root is gone its children could not be found.
func killTree(root int) {
	freeze(root)
	members := tree(root)
	signalAll(members, syscall.SIGKILL)
	poll(func() bool {
		table := processTable()
		return !slices.ContainsFunc(members, func(m processEntry) bool {
			return slices.ContainsFunc(table, func(e processEntry) bool { return e.pid == m.pid && !e.dead() })
		})
	})
}

// poll waits for signals to take effect. They do within milliseconds, unless a process waits for a broken disk.
func poll(done func() bool) {
	const interval, patience = 2 * time.Millisecond, 5 * time.Second
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for deadline := time.Now().Add(patience); !done() && time.Now().Before(deadline); {
		<-ticker.C
	}
}

package devenv

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// childAttributes put a child in a group of its own, so that Ctrl-C reaches only us and we stop it in order, and have the
// kernel tell it to quit should we be killed.
func childAttributes(user *account) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: user.credential(), Setpgid: true, Pdeathsig: syscall.SIGQUIT}
}

// processTable reads /proc: ps is missing from small container images.
func processTable() []processEntry {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var table []processEntry
	for _, dir := range dirs {
		pid, err := strconv.Atoi(dir.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended meanwhile
		}
		// "pid (name) state ppid …", where the name may hold anything, parentheses too.
		e := processEntry{pid: pid}
		rest := string(stat[strings.LastIndexByte(string(stat), ')')+1:])
		if n, _ := fmt.Sscanf(rest, " %1s %d", &e.state, &e.parent); n == 2 {
			table = append(table, e)
		}
	}
	return table
}

// commandLine of a process, joined by spaces; empty if there is none.
func commandLine(pid int) string {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(string(line), "\x00", " ")
}

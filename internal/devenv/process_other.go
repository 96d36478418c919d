//go:build unix && !linux

package devenv

import (
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// childAttributes put a child in a group of its own, so that Ctrl-C reaches only us and we stop it in order.
func childAttributes(user *account) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: user.credential(), Setpgid: true}
}

func processTable() []processEntry {
	output, err := exec.Command("ps", "-A", "-o", "pid=,ppid=,state=").Output()
	if err != nil {
		return nil
	}
	var table []processEntry
	for line := range strings.Lines(string(output)) {
		var e processEntry
		if n, _ := fmt.Sscanf(line, "%d %d %1s", &e.pid, &e.parent, &e.state); n == 3 {
			table = append(table, e)
		}
	}
	return table
}

// commandLine of a process, joined by spaces; empty if there is none.
func commandLine(pid int) string {
	line, err := exec.Command("ps", "-o", "command=", "-p", strconv.Itoa(pid)).Output()
	if err != nil {
		return ""
	}
	return string(line)
}

package devenv

import "syscall"

// attributes puts a child in a group of its own, so that Ctrl-C reaches only us and we stop it in order, and has the kernel
// stop it should we be killed.
func attributes(credential *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: credential, Setpgid: true, Pdeathsig: syscall.SIGQUIT}
}

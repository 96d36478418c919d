//go:build !linux

package devenv

import "syscall"

// attributes puts a child in a group of its own, so that Ctrl-C reaches only us and we stop it in order.
func attributes(credential *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: credential, Setpgid: true}
}

package devenv

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	// A socket's path is limited to about 100 bytes, and macOS's temporary directory is longer than this.
	runParent = "/tmp"
	runPrefix = "rekall-pg-"
)

var errLocked = errors.New("directory is locked")

// lockedDir is a directory under a lock that the kernel drops when our process ends, however it ends. So a free lock proves
// that its owner is gone, which a pid file cannot. Children do not inherit it.
type lockedDir struct {
	path string
	file *os.File
}

func lockDir(path string) (*lockedDir, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = errLocked
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &lockedDir{path: path, file: file}, nil
}

func (d *lockedDir) unlock() { _ = d.file.Close() }

// remove removes the directory while it is locked.
func (d *lockedDir) remove() error {
	defer d.unlock()
	return os.RemoveAll(d.path)
}

// exists tells whether the locked directory is still the one at its path.
func (d *lockedDir) exists() bool {
	locked, err := d.file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(d.path)
	return err == nil && os.SameFile(locked, there)
}

// newRunDir makes a temporary directory for a server. Until it is locked a sweep may take it for a leftover; then it takes
// another.
func newRunDir() (*lockedDir, error) {
	const attempts = 10
	for range attempts {
		path, err := os.MkdirTemp(runParent, runPrefix)
		if err != nil {
			return nil, fmt.Errorf("make a temporary directory: %w", err)
		}
		d, err := lockDir(path)
		if errors.Is(err, errLocked) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("make a temporary directory: %w", err)
		}
		if !d.exists() {
			d.unlock()
			continue
		}
		// The server's user, not ours when we are root, passes through to its own directories.
		if err := os.Chmod(path, 0o711); err != nil {
			return nil, fmt.Errorf("make a temporary directory: %w", errors.Join(err, d.remove()))
		}
		return d, nil
	}
	return nil, errors.New("make a temporary directory: each was removed at once")
}

// sweep removes the directories, and ends the servers, that killed processes of our user left behind. It does what it can:
// a leftover must not keep a new server from starting.
func sweep() {
	paths, _ := filepath.Glob(filepath.Join(runParent, runPrefix+"*"))
	for _, path := range paths {
		// Everybody can make files in /tmp: follow no link, and trust only what is ours.
		info, err := os.Lstat(path)
		if err != nil || !info.IsDir() || int(info.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
			continue
		}
		d, err := lockDir(path)
		if err != nil {
			continue // its owner lives
		}
		killOrphan(filepath.Join(path, dataName))
		_ = d.remove()
	}
}

// killOrphan ends a server of ours whose owner is gone, which the caller knows by holding the owner's lock. Another
// process may have the server's id by now, and another program may have started a server on the data: the command line
// tells.
func killOrphan(data string) {
	pid := readPIDFile(data).pid
	if strings.Contains(commandLine(pid), " -D "+data+" -k "+filepath.Join(runParent, runPrefix)) {
		killTree(pid)
		removeSharedMemory(data)
		// Until init has reaped the server its id exists, and Postgres takes that for a running one.
		if len(tree(pid)) == 0 {
			_ = os.Remove(filepath.Join(data, pidFileName))
		}
	}
}

package devenv

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Names in a kept directory. The cluster is made under a name of its own, so that a start cut short leaves no half one.
const (
	dataName     = "data"
	newDataName  = "data.new"
	passwordName = "password"
)

const superuser = "postgres"

const pidFileName = "postmaster.pid"

// initialise makes a cluster, and a password for it: loopback is open to every user of the machine.
func (p *Postgres) initialise(ctx context.Context, data string) error {
	p.password = rand.Text()
	if err := p.makeDir(data); err != nil {
		return err
	}
	// initdb reads the password as the server's user.
	passwordFile := filepath.Join(p.socketDir(), passwordName)
	if err := os.WriteFile(passwordFile, []byte(p.password), 0o600); err != nil {
		return fmt.Errorf("write the password: %w", err)
	}
	defer func() { _ = os.Remove(passwordFile) }()
	if err := p.user.own(passwordFile); err != nil {
		return err
	}
	args := []string{"-D", data, "-U", superuser, "-A", "scram-sha-256", "--pwfile", passwordFile, "-E", "UTF8", "--locale=C"}
	if p.kept == nil {
		args = append(args, "--no-sync")
	}
	return p.runProgram(ctx, "initdb", args...)
}

// openKept opens the directory that the user named, or makes it.
func (p *Postgres) openKept(ctx context.Context, folders []string) error {
	dir, err := filepath.Abs(p.options.Dir)
	if err != nil {
		return fmt.Errorf("find the data directory: %w", err)
	}
	if err := p.makeKept(dir); err != nil {
		return err
	}
	p.data = filepath.Join(dir, dataName)
	p.kept, err = lockDir(dir)
	if errors.Is(err, errLocked) {
		return p.inUse()
	}
	if err != nil {
		return fmt.Errorf("open the data directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("open the data directory: %w", err)
	}
	if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == dataName }) {
		return p.adopt(dir, folders)
	}
	for _, e := range entries {
		if e.Name() != newDataName && e.Name() != passwordName {
			return fmt.Errorf("%s is not a data directory of ours, but holds other files: name a new or an empty one", dir)
		}
	}
	return p.fill(ctx, dir)
}

// makeKept makes the directory, and hands it to the server's user. One that is there already keeps its owner.
func (p *Postgres) makeKept(dir string) error {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		return fmt.Errorf("%s is a file: name a directory", dir)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil // what else may be wrong shows when it is opened
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	return p.makeDir(dir)
}

// fill makes the cluster of a new directory.
func (p *Postgres) fill(ctx context.Context, dir string) error {
	unfinished := filepath.Join(dir, newDataName)
	if err := os.RemoveAll(unfinished); err != nil {
		return fmt.Errorf("remove an unfinished cluster: %w", err)
	}
	if err := p.initialise(ctx, unfinished); err != nil {
		return errors.Join(err, os.RemoveAll(unfinished))
	}
	if err := os.WriteFile(filepath.Join(dir, passwordName), []byte(p.password), 0o600); err != nil {
		return fmt.Errorf("write the password: %w", err)
	}
	if err := os.Rename(unfinished, p.data); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	return nil
}

// adopt takes up the cluster of an earlier start, with the programs that fit it and as its owner.
func (p *Postgres) adopt(dir string, folders []string) error {
	major, err := os.ReadFile(filepath.Join(p.data, "PG_VERSION"))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is not a data directory of ours, but holds other files: name a new or an empty one", dir)
	}
	if err != nil {
		return fmt.Errorf("open the data directory: %w", err)
	}
	password, err := os.ReadFile(filepath.Join(dir, passwordName))
	if err != nil {
		return fmt.Errorf("open the data directory: %w", err)
	}
	p.password = string(password)
	want := string(bytes.TrimSpace(major))
	fits := func(folder string) bool { return majorVersion(folder) == want }
	i := slices.IndexFunc(folders, fits)
	if i < 0 {
		return fmt.Errorf("%s was made by PostgreSQL %s, and this machine has another version: install PostgreSQL %s or name another directory", dir, want, want)
	}
	p.bin = folders[i]
	if p.user, err = ownerOf(p.data); err != nil {
		return fmt.Errorf("open the data directory: %w", err)
	}
	if err := p.user.own(p.socketDir()); err != nil {
		return err
	}
	killOrphan(p.data)
	return nil
}

func (p *Postgres) inUse() error {
	dir := filepath.Dir(p.data)
	if pid := readPIDFile(p.data).pid; pid != 0 {
		return fmt.Errorf("%s is in use by another running server, process %d: stop it or name another directory", dir, pid)
	}
	return fmt.Errorf("%s is in use by another running server: stop it or name another directory", dir)
}

// explainExit says why a program ended, which its log tells.
func (p *Postgres) explainExit(program string) error {
	const lines = 10
	log, err := os.ReadFile(p.logOf(program))
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	text := strings.TrimSpace(string(log))
	switch {
	case strings.Contains(text, "Address already in use"):
		return fmt.Errorf("port %d: %w", p.Port, errPortTaken)
	case p.kept != nil && (strings.Contains(text, `lock file "postmaster.pid" already exists`) || strings.Contains(text, "is still in use")):
		return p.inUse()
	case p.kept != nil && p.user.other && strings.Contains(text, "Permission denied"):
		return fmt.Errorf("user %s, which runs the server, may not enter %s: name a directory that is not below a private one", p.user, p.kept.path)
	}
	all := strings.Split(text, "\n")
	return fmt.Errorf("ended with: %s", strings.Join(all[max(0, len(all)-lines):], "\n"))
}

// pidFile is what a server tells about itself in its data directory.
type pidFile struct {
	pid          int
	sharedMemory string // id of a System V segment
	ready        bool
}

// readPIDFile returns the zero value if there is none, or only a part yet.
func readPIDFile(data string) pidFile {
	content, err := os.ReadFile(filepath.Join(data, pidFileName))
	if err != nil {
		return pidFile{}
	}
	// Lines: pid, directory, start time, port, socket directory, listen address, "key id" of the shared memory, status.
	lines := strings.Split(string(content), "\n")
	var f pidFile
	f.pid, _ = strconv.Atoi(lines[0])
	if len(lines) > 6 {
		if keyAndID := strings.Fields(lines[6]); len(keyAndID) == 2 {
			f.sharedMemory = keyAndID[1]
		}
	}
	if len(lines) > 7 {
		status := strings.TrimSpace(lines[7])
		f.ready = status == "ready" || status == "standby"
	}
	return f
}

// removeSharedMemory removes the small segment that a killed server leaves in the kernel; one that shut down has removed it,
// and its pid file too. The server must have run just now: after a reboot the id may be another's.
func removeSharedMemory(data string) {
	if id := readPIDFile(data).sharedMemory; id != "" {
		_ = exec.Command("ipcrm", "-m", id).Run()
	}
}

package devenv

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// ErrNoPostgres says what to do when there are no server programs.
var ErrNoPostgres = errors.New("no PostgreSQL server found: install it (Debian: apt-get install postgresql; macOS: brew install postgresql) " +
	"or set REKALL_PG_BIN to the folder of initdb and postgres")

// usualFolders are where packages put the server's programs, which Debian and others keep out of PATH.
var usualFolders = []string{
	"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin",
	"/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
}

// binaries lists the folders of initdb and postgres, the best first: REKALL_PG_BIN alone, or PATH, pg_config, then the newest
// of the usual ones.
func binaries() ([]string, error) {
	if folder := os.Getenv("REKALL_PG_BIN"); folder != "" {
		if !holdsServer(folder) {
			return nil, fmt.Errorf("REKALL_PG_BIN=%s is not a folder of initdb and postgres: correct or unset it", folder)
		}
		folder, err := filepath.Abs(folder)
		return []string{folder}, err
	}
	return searchBinaries(usualFolders)
}

func searchBinaries(usual []string) ([]string, error) {
	var folders []string
	for _, folder := range filepath.SplitList(os.Getenv("PATH")) {
		// It may hold links to some of the programs: first where they lead, since the others are there.
		if target, err := filepath.EvalSymlinks(filepath.Join(folder, "postgres")); err == nil {
			folders = append(folders, filepath.Dir(target))
		}
		folders = append(folders, folder)
	}
	if path, err := exec.LookPath("pg_config"); err == nil {
		if output, err := exec.Command(path, "--bindir").Output(); err == nil {
			folders = append(folders, strings.TrimSpace(string(output)))
		}
	}
	var packaged []string
	for _, pattern := range usual {
		found, _ := filepath.Glob(pattern)
		packaged = append(packaged, found...)
	}
	slices.SortStableFunc(packaged, func(a, b string) int { return versionInPath(b) - versionInPath(a) })
	folders = slices.DeleteFunc(append(folders, packaged...), func(f string) bool {
		// A relative folder, as PATH may have, would be looked for where the server runs.
		return !filepath.IsAbs(f) || !holdsServer(f)
	})
	if len(folders) == 0 {
		return nil, ErrNoPostgres
	}
	return folders, nil
}

// versionInPath is the number in the name above bin; 0 if there is none.
func versionInPath(folder string) int {
	n, _ := strconv.Atoi(regexp.MustCompile(`\d+`).FindString(filepath.Base(filepath.Dir(folder))))
	return n
}

func holdsServer(folder string) bool {
	return executable(filepath.Join(folder, "initdb")) && executable(filepath.Join(folder, "postgres"))
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir() && info.Mode()&0o111 != 0
}

// majorVersion of a folder's server, as its clusters note it; empty if it does not run.
func majorVersion(folder string) string {
	output, err := exec.Command(filepath.Join(folder, "postgres"), "--version").Output()
	if err != nil {
		return ""
	}
	match := regexp.MustCompile(`\(PostgreSQL\) (\d+)`).FindSubmatch(output)
	if match == nil {
		return ""
	}
	return string(match[1])
}

// freePort picks a port below those that the kernel gives to outgoing connections. Among those, a client that dials a server
// which is down may be given the very port that it dials, and connect to itself.
func freePort() (int, error) {
	const lowest, ports, attempts = 20000, 10000, 100
	for range attempts {
		port := lowest + rand.IntN(ports)
		if listener, err := net.Listen("tcp", loopback(port)); err == nil {
			return port, listener.Close()
		}
	}
	return 0, fmt.Errorf("no free port from %d to %d", lowest, lowest+ports-1)
}

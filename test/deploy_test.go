package test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

const unit = "../cmd/rekall-gateway/deploy/rekall-gateway.service"

// exposureLimit is the most that "systemd-analyze security" may find, in tenths: 0 is nothing, 100 a service without any
// protection. A server cannot do without the network, which is most of what remains.
const exposureLimit = "20"

func TestSystemdUnitIsValidAndHardened(t *testing.T) {
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), filepath.Base(unit))
	installed := strings.ReplaceAll(string(text), "/usr/local/bin/rekall-gateway", program) // which must exist
	if err := os.WriteFile(path, []byte(installed), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := strings.TrimSuffix(path, "service") + "socket"
	if text, err = os.ReadFile(strings.TrimSuffix(unit, "service") + "socket"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(socket, text, 0o600); err != nil {
		t.Fatal(err)
	}
	// With what the guide adds where edges share a directory of certificates, or Caddy could not write into it.
	guide := filepath.Join(filepath.Dir(unit), "README.md")
	if text, err = os.ReadFile(guide); err != nil {
		t.Fatal(err)
	}
	shared := blocksOf(t, guide, "ini")[0]
	storage := regexp.MustCompile("`storage file_system (/[^`]*)`").FindSubmatch(text)
	if storage == nil || !strings.Contains(shared, "\nReadWritePaths="+string(storage[1])+"\n") {
		t.Errorf("the unit may not write into the directory of %q", storage)
	}
	if err := os.Mkdir(path+".d", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path+".d", "override.conf"), []byte(shared), 0o600); err != nil {
		t.Fatal(err)
	}
	verify := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path, socket)
	if output, err := verify.CombinedOutput(); err != nil || strings.Contains(string(output), "rekall-gateway") {
		t.Errorf("verify: %v\n%s", err, output)
	}
	security := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold="+exposureLimit, path)
	if output, err := security.CombinedOutput(); err != nil || !strings.Contains(string(output), "Overall exposure level") {
		t.Errorf("security: %v\n%s", err, output)
	}
	for line, without := range map[string]string{ // which neither of them looks at
		"LimitCORE=0":               "a core dump would hold keys",
		"StartLimitIntervalSec=0":   "systemd would give up on an address that comes up late",
		"LogRateLimitIntervalSec=0": "the journal would drop lines when there are many",
	} {
		if !strings.Contains(installed, "\n"+line+"\n") {
			t.Errorf("no %s: %s", line, without)
		}
	}
}

// The unit is of Type=notify: systemd waits for this message.
func TestGatewayTellsSystemdThatItIsReady(t *testing.T) {
	r := newRig(t)
	dir, err := os.MkdirTemp("", "rekall-notify-") // short: the path of a Unix socket has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "notify")
	listener, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	t.Setenv("NOTIFY_SOCKET", socket)
	r.start(standardSite)
	var received strings.Builder
	if err := listener.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for message := make([]byte, 4096); !strings.Contains(received.String(), "READY=1"); {
		n, err := listener.Read(message)
		if err != nil {
			t.Fatalf("%v after %q", err, received.String())
		}
		received.Write(message[:n])
	}
}

// TestURLsOfTheDatabaseMayEndWithALineFeed, as those do that come from a file: Kubernetes hands it over in a secret's variable too.
func TestURLsOfTheDatabaseMayEndWithALineFeed(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	written := r.database + "\n"
	if _, stderr, code := cli(t, written, "keys", "list"); code != 0 {
		t.Errorf("$REKALL_DATABASE_URL: %s", stderr)
	}
	if _, stderr, code := cli(t, "", "keys", "list", "--database", written); code != 0 {
		t.Errorf("--database: %s", stderr)
	}
	g := r.prepare(strings.Replace(managedSite, "rekall_keys", "rekall_keys {\n\t\tdatabase {env.REKALL_DATABASE_URL}\n\t}", 1))
	g.run(written)
	g.waitReady()
	g.manage("GET", keysPath, bearer(r.manager("acme")), "", 200)
}

// The unit hands the URL over as a file, which may end with a line feed.
func TestDatabaseURLIsReadFromAFile(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(t.TempDir(), "database-url")
	if err := os.WriteFile(file, []byte(r.database+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	g := r.prepare(standardSite)
	config, err := os.ReadFile(g.file)
	if err != nil {
		t.Fatal(err)
	}
	fromFile := strings.ReplaceAll(string(config), "{env.REKALL_DATABASE_URL}", "{file."+file+"}")
	if err := os.WriteFile(g.file, []byte(fromFile), 0o600); err != nil {
		t.Fatal(err)
	}
	g.run("")
	g.waitReady()
	g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))).wantCode(t, 200, "")
}

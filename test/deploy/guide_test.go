package deploy

import (
	"context"
	"crypto/rand"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/process"
)

const (
	guide   = shipped + "README.md"
	runbook = shipped + "monitoring/RUNBOOK.md"
)

func TestConfigurationsOfTheGuideAreValid(t *testing.T) {
	t.Parallel()
	for _, block := range blocksOf(t, guide, "caddyfile") {
		file := filepath.Join(t.TempDir(), "Caddyfile")
		process.Write(t, file, block)
		command(t, program, "postgres://nobody@127.0.0.1:1/none", "validate", "--config", file, "--adapter", "caddyfile")
	}
}

// TestMetricsOfTheGuidesAreServedOnOneAddress: a site's address names the request's host, which the client writes, and not where Caddy
// listens.
func TestMetricsOfTheGuidesAreServedOnOneAddress(t *testing.T) {
	t.Parallel()
	found := 0
	for _, page := range []string{guide, runbook, "../../README.md", "../../caddymodule/README.md"} {
		for _, block := range blocksOf(t, page, "caddyfile") {
			if !strings.Contains(block, "\tmetrics") {
				continue
			}
			found++
			file := filepath.Join(t.TempDir(), "Caddyfile")
			process.Write(t, file, block)
			var config struct {
				Apps struct {
					HTTP struct {
						Servers map[string]struct{ Listen []string }
					}
				}
			}
			unmarshal(t, adapted(t, file), &config)
			for _, server := range config.Apps.HTTP.Servers {
				for _, address := range server.Listen {
					if strings.HasPrefix(address, ":") {
						t.Errorf("%s: listens on %s:\n%s", page, address, block)
					}
				}
			}
		}
	}
	if found == 0 {
		t.Error("no guide serves metrics")
	}
}

// adapted is a Caddyfile as JSON.
func adapted(t *testing.T, file string) string {
	t.Helper()
	output, err := exec.Command(program, "adapt", "--config", file, "--adapter", "caddyfile").Output()
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return string(output)
}

// TestCommandsOfTheGuideWork runs the blocks from the first to the last, as they stand there but for addresses, and for the names
// of roles and databases, which belong to the whole server. What is restored goes to another server, which has none of the roles.
func TestCommandsOfTheGuideWork(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	edge, next, password := pgtest.Role(t, r.database), pgtest.Role(t, r.database), rand.Text()
	keyManager, keyManagerPassword := pgtest.Role(t, r.database), rand.Text()
	g := r.gateway(program, process.FreeAddress(t), withUser(t, r.database, edge, password))
	another := pgtest.Server(t).URL()
	names := strings.NewReplacer(
		"http://localhost:2019", g.admin, "validate --config /etc/rekall/Caddyfile", "validate --config "+g.file,
		"reload --config /etc/rekall/Caddyfile", "reload --config "+g.file+" --address "+strings.TrimPrefix(g.admin, "http://"),
		"postgres://owner:password@127.0.0.1:5432/rekall_restored", withDatabase(t, another, "rekall_restored"),
		"postgres://owner:password@127.0.0.1:5432/postgres", another,
		"edge_1_next", next, "edge_1", edge, "alice", pgtest.Role(t, r.database), "key_manager", keyManager,
		"rekall_edge", pgtest.Role(t, r.database), "rekall_admin", pgtest.Role(t, r.database))
	dir := t.TempDir()
	env := append(os.Environ(), "REKALL_DATABASE_URL="+r.database, "EDGE_PASSWORD="+password, "KEY_MANAGER_PASSWORD="+keyManagerPassword,
		"ADMIN_PASSWORD="+rand.Text(), "RESTORED_DATABASE_URL="+withDatabase(t, another, "rekall_restored"), "HOME="+dir, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))

	var outputs strings.Builder
	revokedSince := "" // the dump
	var stayed *pgx.Conn
	commands := 0
	for _, block := range blocksOf(t, guide, "sh") {
		if strings.Contains(block, "/rekall/ready") && g.process == nil {
			g.startReady()
		}
		if strings.Contains(block, "pg_dump") {
			revokedSince = r.key("production", "memories:read").ID
		}
		if strings.Contains(block, "pg_restore") {
			r.revoke(revokedSince)
			r.revoke(r.key("production", "memories:read").ID) // which the dump has not
		}
		if strings.Contains(block, "nologin") {
			g.process.Stop(t) // it was pointed to the next user; whoever has the first one's password is still there
			stayed = login(t, withUser(t, r.database, edge, password))
		}
		commands += strings.Count(block, "\n")
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", names.Replace(block))
		cmd.Dir, cmd.Env = dir, env
		output, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", block, err, output)
		}
		outputs.Write(output)
	}
	if commands < 18 {
		t.Errorf("only %d commands found", commands)
	}
	for _, part := range []string{"Nothing was changed.", "has the rights of an edge", `{"ready":true}`, "First key", "nothing to run"} {
		if !strings.Contains(outputs.String(), part) {
			t.Errorf("no command printed %s", part)
		}
	}

	// The dump has the key and no edge, and after the rotation only the second user logs in.
	if list := command(t, program, withDatabase(t, another, "rekall_restored"), "keys", "list"); !strings.Contains(list, "First key") {
		t.Errorf("the restored database has %s", list)
	}
	if list := command(t, program, withDatabase(t, another, "rekall_restored"), "edges", "list", "--json"); list != "[]\n" {
		t.Errorf("the restored database lists edges that have not come to it: %s", list)
	}
	if key := command(t, program, withDatabase(t, another, "rekall_restored"), "keys", "show", revokedSince); !strings.Contains(key, "revoked") {
		t.Errorf("what was revoked since the dump is good again: %s", key)
	}
	nextPassword := regexp.MustCompile(`(?m)^` + next + `:(\S+)$`).FindStringSubmatch(outputs.String())
	if nextPassword == nil {
		t.Fatal("nobody learns the next user's password")
	}
	for _, old := range []string{edge, next} {
		if err := pgtest.TryExec(withUser(t, r.database, old, password), "select 1"); err == nil {
			t.Errorf("%s still logs in with the first password", old)
		}
	}
	if err := stayed.Ping(t.Context()); err == nil {
		t.Error("whoever was logged in as the first user still is")
	}
	rotated := r.example(withUser(t, r.database, next, nextPassword[1]), withUser(t, r.database, keyManager, keyManagerPassword))
	rotated.startReady()
	rotated.want(http.StatusOK, "", "GET", r.key("production", "memories:read").Key.Reveal())
	r.wantKeyMade(client, rotated.http)
}

// TestSizesOfTheGuideFollowFromItsFigures: usage can be a row for each request, and no more than one for each key and edge in an interval.
func TestSizesOfTheGuideFollowFromItsFigures(t *testing.T) {
	t.Parallel()
	text := process.Read(t, guide)
	number := func(digits string) float64 {
		n, err := strconv.ParseFloat(strings.ReplaceAll(digits, ",", ""), 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	figure := func(pattern string) float64 {
		found := regexp.MustCompile(pattern).FindStringSubmatch(text)
		if found == nil {
			t.Fatalf("the guide has no %s", pattern)
		}
		return number(found[1])
	}
	request, statements := figure(`requests/s × (\d+) us / 0\.7 /`)/1e6, figure(`made and revoked each second \| ([\d.]+) statements/s`)
	rows := regexp.MustCompile(`(?m)^\| (?:up to )?([\d,]+) \| ([\d,]+) \| (\d+) \| (\d+) \| [^|]+ \| \w+ (\d+) \| ([\d,]+) \| (\d+)`).FindAllStringSubmatch(text, -1)
	if len(rows) != 3 {
		t.Fatalf("%d rows of sizes", len(rows))
	}
	for _, row := range rows {
		keys, requests, edges := number(row[1]), number(row[2]), number(row[3])
		if cores := requests * request / 0.7 / (edges - 1); cores > number(row[4]) {
			t.Errorf("%s: %.2f cores", row[0], cores)
		}
		if all := edges * statements; all > 1.05*number(row[5]) {
			t.Errorf("%s: %.0f statements/s", row[0], all)
		}
		if usage := min(requests, keys*edges/10); usage != number(row[6]) {
			t.Errorf("%s: %.0f rows/s of usage", row[0], usage)
		}
		if number(row[7]) < keys {
			t.Errorf("%s: not all keys have room", row[0])
		}
	}
}

// example is a gateway with Caddyfile.example as it stands there, but for addresses and TLS.
func (r *rig) example(database, adminDatabase string) *gateway {
	r.t.Helper()
	dir, address, admin := r.t.TempDir(), process.FreeAddress(r.t), process.FreeAddress(r.t)
	g := &gateway{
		t: r.t, program: program, file: filepath.Join(dir, "Caddyfile"), admin: "http://" + admin, http: "http://" + address,
		env: []string{"REKALL_DATABASE_URL=" + database, "REKALL_ADMIN_DATABASE_URL=" + adminDatabase, "HOME=" + dir},
	}
	process.Write(r.t, g.file, substitute(r.t, process.Read(r.t, "../../Caddyfile.example"),
		"\n{\n", "\n{\n\tadmin "+admin+"\n\tdefault_bind 127.0.0.1\n\tpersist_config off\n\tstorage file_system "+dir+"\n",
		"\nhttp:// {", "\nhttp://:"+port(process.FreeAddress(r.t))+" {", "\napi.rekall.ai {", "\n"+g.http+" {",
		"prod-1:8080 prod-2:8080", r.production.Address(), " sandbox:8080", " "+r.sandbox.Address()))
	return g
}

// wantKeyMade has key management make a key for the holder of one that manages keys.
func (r *rig) wantKeyMade(client *http.Client, base string) {
	r.t.Helper()
	manager, _, err := r.admin.Create(r.t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "manager", Account: "acme", Environment: "production", Scopes: []string{"memories:read"}, ManageKeys: true,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	got, err := askBy(client, "POST", base+"/v1/api-keys", manager.Key.Reveal(), `{"name": "made", "scopes": ["memories:read"]}`)
	if err != nil || got.status != http.StatusCreated {
		r.t.Errorf("key management answers %d %s, %v", got.status, got.code, err)
	}
}

// login is a connection that nobody closes before the end of the test.
func login(t *testing.T, databaseURL string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func withUser(t *testing.T, databaseURL, user, password string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(user, password)
	return u.String()
}

func withDatabase(t *testing.T, databaseURL, name string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}

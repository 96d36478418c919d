//go:build load

package compare

import (
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/test/process"
)

// system that is measured: a proxy in front of the backend, and what it needs for its decisions.
type system struct {
	name          string
	authenticates bool
	url, admin    string // admin: of those that are Caddy
	configuration string
	own           *program
	processes     []*program // own, and the auth service of those that ask it
}

func (s *system) cpu() time.Duration {
	var sum time.Duration
	for _, p := range s.processes {
		sum += p.cpu()
	}
	return sum
}

// The systems, by the names that they have in the tables.
const (
	checked   = "gateway"
	limited   = "gateway, with rate limits"
	overH2C   = "gateway, HTTP/2 to the backend"
	bare      = "the same without the gateway"
	shipped   = "gateway as shipped, with access log"
	stock     = "stock Caddy"
	stockLog  = "stock Caddy, with access log"
	forward   = "stock Caddy, forward_auth"
	tunedAuth = "Caddy with our settings, forward_auth"
	plain     = "plain Caddy, the same proxy"

	neighbouring = "gateway, beside the other"

	plainNginx = "nginx"
	authNginx  = "nginx, auth_request"
	luaNginx   = "nginx, Lua"
	haproxy    = "HAProxy"
	mapHAProxy = "HAProxy, map of keys"
	shaHAProxy = "HAProxy, map of SHA-256"
)

// startSystems starts all of them, and proves each. Those of a group are measured one right after another. Each time they start in another
// order: of one program started five times, the first was 2 to 5 % dearer than the others, in ten starts one after another.
func (b *bench) startSystems() (groups [][]*system) {
	b.t.Helper()
	example := exampleFile(b.t)
	quiet := without(b.t, example, "\tlog\n")
	unlimited := without(b.t, quiet, "\t\trate_limits\n")
	h2c := replaced(b.t, replaced(b.t, unlimited, "# versions h2c\n", "versions h2c\n"), "@BACKENDS@", b.h2c)
	var starts []func()
	for _, group := range [][]func() *system{{
		func() *system { return b.startGateway(checked, gatewayProgram, unlimited) },
		func() *system { return b.startGateway(overH2C, gatewayProgram, h2c) },
		func() *system { return b.startGateway(limited, gatewayProgram, quiet) },
		func() *system { return b.startGateway(bare, gatewayProgram, ungated(b.t, quiet)) },
		func() *system { return b.startGateway(shipped, gatewayProgram, example) },
		func() *system { return b.startCaddy(stock, "stock.Caddyfile") },
		func() *system { return b.startCaddy(stockLog, "stock-log.Caddyfile") },
	}, {
		func() *system { return b.startCaddy(forward, "forward-auth.Caddyfile") },
		func() *system { return b.startCaddy(tunedAuth, "forward-auth-tuned.Caddyfile", "GOGC=400") },
	}, {
		func() *system { return b.startNginxSystem(plainNginx, "nginx-plain.conf") },
		func() *system { return b.startNginxSystem(authNginx, "nginx-auth_request.conf") },
		func() *system { return b.startNginxSystem(luaNginx, "nginx-lua.conf") },
	}, {
		func() *system { return b.startHAProxy(haproxy, "haproxy-plain.cfg") },
		func() *system { return b.startHAProxy(mapHAProxy, "haproxy-map.cfg") },
		func() *system { return b.startHAProxy(shaHAProxy, "haproxy-sha256.cfg") },
	}} {
		systems := make([]*system, len(group))
		groups = append(groups, systems)
		for i, start := range group {
			starts = append(starts, func() {
				systems[i] = start()
				b.prove(systems[i])
			})
		}
	}
	for _, i := range rand.Perm(len(starts)) {
		starts[i]()
	}
	return groups
}

// exampleFile is Caddyfile.example, to be filled in: addresses of this machine, and no TLS, which no system has here.
func exampleFile(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	example := string(text)
	for _, r := range []struct{ old, new string }{
		{"\n{\n", "\n{\n\tadmin @ADMIN@\n\tdefault_bind 127.0.0.1\n\tpersist_config off\n\tstorage file_system @DIR@\n\n"},
		{"\nhttp:// {", "\nhttp://api.rekall.ai:@PORT@ {"},
		{"\napi.rekall.ai {", "\nhttp://@ADDRESS@ {"},
		{"prod-1:8080 prod-2:8080", "@BACKENDS@"},
		{" sandbox:8080", " 127.0.0.1:1"},
	} {
		example = replaced(t, example, r.old, r.new)
	}
	return example
}

// replaced fails the test unless there is exactly one to replace: a changed example must not be measured as something else.
func replaced(t *testing.T, text, old, new string) string {
	t.Helper()
	if n := strings.Count(text, old); n != 1 {
		t.Fatalf("Caddyfile.example has %q %d times instead of once", old, n)
	}
	return strings.Replace(text, old, new, 1)
}

func without(t *testing.T, text, line string) string {
	t.Helper()
	return replaced(t, text, line, "")
}

// ungated puts the production proxy in the gateway's place, with the idle pool that the gateway's transport has, and leaves
// key management out.
func ungated(t *testing.T, example string) string {
	t.Helper()
	whole, inside := blockOf(t, example, "rekall_gateway {\n")
	_, proxy := blockOf(t, inside, "production {\n")
	proxy = replaced(t, proxy, "transport rekall production {\n", "transport http {\nkeepalive_idle_conns_per_host 512\n")
	management, _ := blockOf(t, example, "rekall_keys {\n")
	return without(t, replaced(t, example, whole, proxy), "\t"+management)
}

// startPlain starts stock Caddy with what Caddyfile.example says beside the gateway.
func (b *bench) startPlain(example string) *system {
	b.t.Helper()
	text := ungated(b.t, example)
	for _, ours := range []string{"rekall {\n", "listener_wrappers {\n"} {
		block, _ := blockOf(b.t, text, ours)
		text = without(b.t, text, block)
	}
	text = replaced(b.t, text, "\trekall_tls_only\n", "\trespond 403\n")
	return b.startGateway(plain, caddyProgram, text)
}

// blockOf finds a block of a Caddyfile by its first line.
func blockOf(t *testing.T, text, opening string) (whole, inside string) {
	t.Helper()
	_, rest, found := strings.Cut(text, opening)
	if !found {
		t.Fatalf("Caddyfile.example has no %q", opening)
	}
	depth, length := 1, 0
	for line := range strings.Lines(rest) {
		code := strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(code, "#"):
		case strings.HasSuffix(code, "{"):
			depth++
		case code == "}":
			depth--
		}
		if depth == 0 {
			return opening + rest[:length+len(line)], rest[:length]
		}
		length += len(line)
	}
	t.Fatalf("Caddyfile.example does not end the block %q", opening)
	return "", ""
}

// startGateway starts a build of the gateway with a Caddyfile, whose first lines name everything by @NAMES@.
func (b *bench) startGateway(name, path, caddyfile string) *system {
	b.t.Helper()
	address, admin, refusing := process.FreeAddress(b.t), process.FreeAddress(b.t), process.FreeAddress(b.t)
	_, port, _ := strings.Cut(refusing, ":")
	text := strings.NewReplacer("@ADMIN@", admin, "@DIR@", b.dir, "@PORT@", port, "@ADDRESS@", address,
		"@BACKENDS@", strings.Join(b.backends, " ")).Replace(caddyfile)
	s := b.startCaddyProgram(name, path, text, address, admin, "REKALL_DATABASE_URL="+b.database, "REKALL_ADMIN_DATABASE_URL="+b.database)
	s.authenticates = strings.Contains(caddyfile, "rekall_gateway {")
	return s
}

func (b *bench) startCaddy(name, file string, variables ...string) *system {
	b.t.Helper()
	var auth []*program
	asks := strings.HasPrefix(file, "forward-auth")
	if asks {
		auth = append(auth, b.startAuth())
	}
	address, admin := process.FreeAddress(b.t), process.FreeAddress(b.t)
	s := b.startCaddyProgram(name, caddyProgram, b.fill(file, address, admin), address, admin, variables...)
	s.authenticates = asks
	s.processes = append(s.processes, auth...)
	return s
}

func (b *bench) startCaddyProgram(name, path, caddyfile, address, admin string, variables ...string) *system {
	b.t.Helper()
	file := strings.NewReplacer(" ", "-", ",", "", "/", "").Replace(name)
	b.writeFile(file+".Caddyfile", caddyfile)
	p := startProgram(b.t, b.path(file+".log"), append(variables, "HOME="+b.dir), path,
		"run", "--config", b.path(file+".Caddyfile"), "--adapter", "caddyfile")
	return &system{
		name: name, url: "http://" + address, admin: "http://" + admin, configuration: caddyfile,
		own: p, processes: []*program{p},
	}
}

func (b *bench) startNginxSystem(name, file string) *system {
	b.t.Helper()
	asks := strings.Contains(file, "auth_request")
	var auth []*program
	if asks {
		auth = append(auth, b.startAuth())
	}
	address := process.FreeAddress(b.t)
	p := b.startNginx(strings.TrimSuffix(file, ".conf"), b.fill(file, address, ""))
	return &system{
		name: name, authenticates: asks || strings.Contains(file, "lua"), url: "http://" + address,
		own: p, processes: append([]*program{p}, auth...),
	}
}

func (b *bench) startHAProxy(name, file string) *system {
	b.t.Helper()
	address := process.FreeAddress(b.t)
	b.writeFile(file, b.fill(file, address, ""))
	p := startProgram(b.t, b.path(file+".log"), nil, "haproxy", "-db", "-f", b.path(file))
	return &system{
		name: name, authenticates: file != "haproxy-plain.cfg", url: "http://" + address, own: p, processes: []*program{p},
	}
}

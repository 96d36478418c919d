package deploy

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// hand has the gateway serve on so many sockets that outlive it, as systemd's do. It returns their addresses.
func (g *gateway) hand(n int) (addresses []string) {
	g.t.Helper()
	for range n {
		socket, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			g.t.Fatal(err)
		}
		held, err := socket.(*net.TCPListener).File()
		if err != nil {
			g.t.Fatal(err)
		}
		g.t.Cleanup(func() { _ = held.Close() })
		_ = socket.Close() // and held goes on listening
		g.sockets = append(g.sockets, held)
		addresses = append(addresses, socket.Addr().String())
	}
	return addresses
}

// TestRestartOfAnEdgeWhoseSocketSystemdHoldsLosesNoRequest: what connects between two programs waits in the socket's queue.
func TestRestartOfAnEdgeWhoseSocketSystemdHoldsLosesNoRequest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	site := process.FreeAddress(t)
	g := r.gateway(program, site, r.database)
	g.http = "http://" + g.hand(1)[0]
	process.Write(t, g.file, substitute(t, process.Read(t, g.file), "\tgrace_period", "\tservers {\n\t\tlistener_wrappers {\n\t\t\trekall_drain 2s\n\t\t}\n\t}\n\tgrace_period",
		"http://"+site+" {\n", "http:// {\n\tbind fd/3\n"))
	g.startReady()
	requests := startLoad(t, 4, g.http+"/v1/memories", r.key("production", "memories:read").Key.Reveal())
	requests.waitMore(50)
	for range 3 {
		g.process.Stop(t)
		g.startReady()
		requests.waitMore(50)
	}
	requests.mustHaveLostNone()
}

func TestConfigurationOfTheGuideServesOnSystemdsSockets(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	dir, admin := t.TempDir(), process.FreeAddress(t)
	g := &gateway{
		t: t, program: program, file: filepath.Join(dir, "Caddyfile"), admin: "http://" + admin,
		env: []string{"REKALL_DATABASE_URL=" + r.database, "HOME=" + dir},
	}
	addresses := g.hand(2)
	process.Write(t, g.file, substitute(t, caddyfileOfGuide(t, "rekall_drain"),
		"\tauto_https disable_redirects", "\tadmin "+admin+"\n\tpersist_config off\n\tskip_install_trust\n\tstorage file_system "+dir+"\n\tauto_https disable_redirects",
		"\tbind fd/3\n", "\tbind fd/3\n\ttls internal\n"))
	g.startReady()
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "api.rekall.ai"}, // of a certificate authority that nobody knows
	}}
	defer client.CloseIdleConnections()
	for base, code := range map[string]string{"https://" + addresses[0]: "API_KEY_MISSING", "http://" + addresses[1]: "TLS_REQUIRED"} {
		req, err := http.NewRequest("GET", base+"/v1/memories", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "api.rekall.ai"
		eventually.True(t, "the site has its certificate", func() bool {
			resp, err := client.Do(req)
			if err != nil {
				return false
			}
			defer func() { _ = resp.Body.Close() }()
			body, _ := io.ReadAll(resp.Body)
			if !strings.Contains(string(body), code) {
				t.Fatalf("%s: %d %s", base, resp.StatusCode, body)
			}
			return true
		})
	}
	// Loggers are told apart by their names.
	if want := `"logger":"rekall","msg":"key sync starts over"`; !strings.Contains(g.process.Log.String(), want) {
		t.Errorf("the log has no %s:\n%s", want, g.process.Log.String())
	}
}

func TestDrainRefusesWhatContradictsIt(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ options, wrapper, want string }{
		"shutdown_delay":       {"shutdown_delay 5s", "rekall_drain", "remove shutdown_delay or rekall_drain"},
		"no duration":          {"", "rekall_drain soon", "must be a duration"},
		"a negative one":       {"", "rekall_drain -1s", "must be more than 0"},
		"a second argument":    {"", "rekall_drain 1s 2s", "one argument at most"},
		"a block of its own":   {"", "rekall_drain {\n1s\n}", "no block"},
		"nothing wrong at all": {"", "rekall_drain 1s", "Valid configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			file := t.TempDir() + "/Caddyfile"
			process.Write(t, file, "{\n"+tc.options+"\nservers {\nlistener_wrappers {\n"+tc.wrapper+"\n}\n}\n}\nhttp://127.0.0.1:1 {\nrespond ok\n}\n")
			output, _ := exec.Command(program, "validate", "--config", file, "--adapter", "caddyfile").CombinedOutput()
			if !strings.Contains(string(output), tc.want) {
				t.Errorf("no %q in\n%s", tc.want, output)
			}
		})
	}
}

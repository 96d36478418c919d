package deploy

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestRestartOfAnEdgeWhoseSocketSystemdHoldsLosesNoRequest: what connects between two programs waits in the socket's queue.
func TestRestartOfAnEdgeWhoseSocketSystemdHoldsLosesNoRequest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.migrate()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	held, err := socket.(*net.TCPListener).File() // as systemd hands it over
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = held.Close() })
	g := r.gateway(program, socket.Addr().String(), r.database)
	_ = socket.Close() // and held goes on listening
	write(t, g.file, substitute(t, read(t, g.file), "\tgrace_period", "\tservers {\n\t\tlistener_wrappers {\n\t\t\trekall_drain 100ms\n\t\t}\n\t}\n\tgrace_period",
		"http://"+socket.Addr().String()+" {\n", "http:// {\n\tbind fd/3\n"))
	g.sockets = []*os.File{held}
	g.startReady()
	requests := startLoad(t, 4, g.http+"/v1/memories", r.key("production", "memories:read").Key.Reveal())
	requests.waitMore(50)
	for range 5 {
		g.process.stop(t)
		g.startReady()
		requests.waitMore(50)
	}
	requests.mustHaveLostNone()
}

func TestDrainRefusesWhatContradictsIt(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ options, wrapper, want string }{
		"shutdown_delay":       {"shutdown_delay 5s", "rekall_drain", "remove shutdown_delay or rekall_drain"},
		"no duration":          {"", "rekall_drain soon", "takes a duration"},
		"a negative one":       {"", "rekall_drain -1s", "takes a duration"},
		"a second argument":    {"", "rekall_drain 1s 2s", "one argument at most"},
		"a block of its own":   {"", "rekall_drain {\n1s\n}", "no block"},
		"nothing wrong at all": {"", "rekall_drain 1s", "Valid configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			file := t.TempDir() + "/Caddyfile"
			write(t, file, "{\n"+tc.options+"\nservers {\nlistener_wrappers {\n"+tc.wrapper+"\n}\n}\n}\nhttp://127.0.0.1:1 {\nrespond ok\n}\n")
			output, _ := exec.Command(program, "validate", "--config", file, "--adapter", "caddyfile").CombinedOutput()
			if !strings.Contains(string(output), tc.want) {
				t.Errorf("no %q in\n%s", tc.want, output)
			}
		})
	}
}

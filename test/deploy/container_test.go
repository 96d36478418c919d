package deploy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// buildStep is the Containerfile's, which the tests' program is built by.
func buildStep() (string, error) {
	text, err := os.ReadFile(shipped + "Containerfile")
	if err != nil {
		return "", err
	}
	step := regexp.MustCompile(`(?m)^RUN (CGO_ENABLED=0 go build .*) -o /rekall-gateway (\S+)$`).FindSubmatch(text)
	if step == nil {
		return "", fmt.Errorf("the Containerfile builds no static program")
	}
	return fmt.Sprintf(`%s -buildvcs=false -o "$PROGRAM" %s`, step[1], step[2]), nil
}

func TestProgramNeedsNothingOfTheImage(t *testing.T) {
	file, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	for _, part := range file.Progs {
		if part.Type == elf.PT_INTERP || part.Type == elf.PT_DYNAMIC {
			t.Errorf("not static: it has %s", part.Type)
		}
	}
	if libraries, err := file.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("it needs %v, %v", libraries, err)
	}
}

// image is what the Containerfile says of the image's process.
type image struct {
	env        map[string]string
	user       string
	entrypoint []string
	cmd        []string
	files      []string // that the image has
}

func readImage(t *testing.T) image {
	t.Helper()
	im := image{env: make(map[string]string)}
	_, final, ok := strings.Cut(process.Read(t, shipped+"Containerfile"), "\nFROM scratch\n")
	if !ok {
		t.Fatal("the image is not made from scratch")
	}
	for line := range strings.Lines(final) {
		instruction, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch instruction {
		case "ENV":
			for pair := range strings.FieldsSeq(rest) {
				name, value, _ := strings.Cut(pair, "=")
				im.env[name] = value
			}
		case "USER":
			im.user = rest
		case "ENTRYPOINT":
			unmarshal(t, rest, &im.entrypoint)
		case "CMD":
			unmarshal(t, rest, &im.cmd)
		case "COPY":
			fields := strings.Fields(rest)
			im.files = append(im.files, fields[len(fields)-1])
		default:
			t.Fatalf("this test does not know %s", instruction)
		}
	}
	return im
}

func unmarshal(t *testing.T, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

// The kubelet's part is played by unshare, mount and chroot: a root file system with the image's files and the pod's mounts, read-only
// but for /data, and the user of the image, who has no capability.
func TestContainerServesFromAReadOnlyRootAsNobody(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root for unshare, mount and chroot")
	}
	t.Parallel()
	r := newRig(t)
	edgeRole, adminRole := pgtest.Role(t, r.database), pgtest.Role(t, r.database)
	command(t, program, r.database, "migrate", "--edge-role", edgeRole, "--admin-role", adminRole)
	im, m := readImage(t), readManifest(t)
	container := m.deployment.Spec.Template.Spec.Containers[0]
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"data", "etc/rekall", "etc/ssl/certs", "usr/local/bin", "run/secrets/rekall", "run/secrets/tls"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil { // others may look in, as in an image
			t.Fatal(err)
		}
	}
	if !slices.Equal(im.files, []string{"/etc/ssl/certs/ca-certificates.crt", "/usr/local/bin/rekall-gateway"}) {
		t.Fatalf("the image has %v", im.files)
	}
	publish(t, program, filepath.Join(root, "usr/local/bin/rekall-gateway"), 0o755)
	urls := map[string]string{"url": pgtest.Login(t, r.database, edgeRole), "admin-url": pgtest.Login(t, r.database, adminRole)}
	for _, v := range m.deployment.Spec.Template.Spec.Volumes {
		if v.Name != "database" {
			continue
		}
		for _, item := range v.Secret.Items {
			publish(t, "", filepath.Join(root, "run/secrets/rekall", item.Path), 0o644, urls[item.Key])
		}
	}
	certificate, key := selfSigned(t, "api.rekall.ai")
	publish(t, "", filepath.Join(root, "run/secrets/tls/tls.crt"), 0o644, certificate)
	publish(t, "", filepath.Join(root, "run/secrets/tls/tls.key"), 0o644, key)
	httpPort, httpsPort, healthPort, admin := port(process.FreeAddress(t)), port(process.FreeAddress(t)), port(process.FreeAddress(t)), process.FreeAddress(t)
	publish(t, "", filepath.Join(root, "etc/rekall/Caddyfile"), 0o644, substitute(t, m.caddyfile,
		"persist_config off", "persist_config off\n\tdefault_bind 127.0.0.1\n\tadmin "+admin, "shutdown_delay 10s", "shutdown_delay 1s",
		"http_port 8080", "http_port "+httpPort, "https_port 8443", "https_port "+httpsPort, "http://:8081", "http://:"+healthPort,
		"production.backends.svc:8080", r.production.Address(), "sandbox.backends.svc:8080", r.sandbox.Address()))

	var env []string
	for name, value := range im.env {
		env = append(env, name+"="+value)
	}
	script := `set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
mount -t tmpfs -o mode=0700,uid=` + strings.Split(im.user, ":")[0] + ` tmpfs "$1/data"
root=$1; shift
exec setpriv --no-new-privs chroot --userspec=` + im.user + ` "$root" /usr/local/bin/rekall-gateway "$@"`
	args := append([]string{"--mount", "--propagation", "private", "env", "-i", "PATH=" + os.Getenv("PATH")}, env...)
	args = append(args, "bash", "-c", script, "container", root)
	if im.entrypoint[0] != "/usr/local/bin/rekall-gateway" || !slices.Equal(im.cmd, container.Args) {
		t.Errorf("the image runs %v %v, and the pod %v", im.entrypoint, im.cmd, container.Args)
	}
	p := run(t, nil, "unshare", append(args, container.Args...)...)
	health := "http://127.0.0.1:" + healthPort
	eventually.True(t, "the readiness probe passes", func() bool {
		p.MustRun(t)
		got, err := ask("GET", health+container.ReadinessProbe.HTTPGet.Path, "")
		return err == nil && got.status == http.StatusOK
	})
	if got, err := ask("GET", health+container.LivenessProbe.HTTPGet.Path, ""); err != nil || got.status != http.StatusOK {
		t.Errorf("the liveness probe: %+v, %v", got, err)
	}

	status := process.Read(t, fmt.Sprintf("/proc/%d/status", p.Pid()))
	for _, want := range []string{"\nUid:\t65532\t65532\t65532\t65532\n", "\nCapEff:\t0000000000000000\n", "\nCapPrm:\t0000000000000000\n", "\nNoNewPrivs:\t1\n"} {
		if !strings.Contains(status, want) {
			t.Errorf("no %q in %s", want, status)
		}
	}
	name := fmt.Sprintf("/proc/%d/root/etc/rekall/written", p.Pid())
	if err := os.WriteFile(name, nil, 0o600); err == nil || !strings.Contains(err.Error(), "read-only file system") {
		t.Errorf("even root can write below the root: %v", err)
	}

	secure := &http.Client{Transport: &http.Transport{
		DialContext: dialLoopback, DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool(t, certificate), MinVersion: tls.VersionTLS12},
	}}
	site := "https://api.rekall.ai:" + httpsPort + "/v1/memories"
	allowed := r.key("production", "memories:read").Key.Reveal()
	if got, err := askBy(secure, "GET", site, allowed); err != nil || got.status != http.StatusOK {
		t.Errorf("%+v, %v", got, err)
	}
	r.wantKeyMade(secure, "https://api.rekall.ai:"+httpsPort)
	renewed, key := selfSigned(t, "api.rekall.ai")
	publish(t, "", filepath.Join(root, "run/secrets/tls/tls.crt"), 0o644, renewed)
	publish(t, "", filepath.Join(root, "run/secrets/tls/tls.key"), 0o644, key)
	reload := regexp.MustCompile(`(?m)^#   kubectl exec POD -- /usr/local/bin/rekall-gateway (reload .*)$`).FindStringSubmatch(process.Read(t, shipped+"kubernetes.yaml"))
	if reload == nil {
		t.Fatal("the manifest does not say how an edge reads a renewed certificate")
	}
	caddyfile := strings.ReplaceAll(reload[1], "/etc/rekall", filepath.Join(root, "etc/rekall"))
	command(t, program, r.database, append(strings.Fields(caddyfile), "--address", admin)...)
	secure.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: pool(t, renewed), MinVersion: tls.VersionTLS12}
	eventually.True(t, "the renewed certificate is served", func() bool {
		got, err := askBy(secure, "GET", site, allowed)
		return err == nil && got.status == http.StatusOK
	})
	plain := &http.Client{Transport: &http.Transport{DialContext: dialLoopback, DisableKeepAlives: true}}
	if got, err := askBy(plain, "GET", "http://api.rekall.ai:"+httpPort+"/v1/memories", allowed); err != nil || got.code != "TLS_REQUIRED" {
		t.Errorf("%+v, %v", got, err)
	}
	p.Stop(t)
}

// publish writes a file for everybody to read: a copy of another, or text.
func publish(t *testing.T, from, to string, mode os.FileMode, text ...string) {
	t.Helper()
	content := strings.Join(text, "")
	if from != "" {
		content = process.Read(t, from)
	}
	if err := os.WriteFile(to, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(to, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

// dialLoopback goes to this machine whatever the host's name is.
func dialLoopback(ctx context.Context, network, address string) (net.Conn, error) {
	var dialer net.Dialer
	return dialer.DialContext(ctx, network, "127.0.0.1:"+port(address))
}

// selfSigned makes a certificate and its key, in PEM.
func selfSigned(t *testing.T, host string) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{host}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
}

func pool(t *testing.T, certificate string) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(certificate)) {
		t.Fatal("no certificate")
	}
	return pool
}

package test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/test/eventually"
)

const loggedSites = `
http://:PORT {
	bind 127.0.0.1
	log {
		output file LOG
	}
	handle /plain {
		rekall_tls_only
	}
	handle /v1/api-keys {
		rekall_keys
	}
	handle /v1/memories/ungated {
		reverse_proxy PRODUCTION {
			transport rekall production
		}
	}
	handle {
		rekall_gateway {
			production {
				@down path /v1/memories/down
				reverse_proxy @down 127.0.0.1:1
				reverse_proxy PRODUCTION
			}
		}
	}
}
`

// logOf returns what the page's command finds of a request in an access log, and who the line says sent it.
func logOf(t *testing.T, file, requestID string) (found map[string]string, userID string) {
	t.Helper()
	command := strings.TrimSpace(blocksOf(t, "../caddymodule/README.md", "sh")[0])
	command = strings.ReplaceAll(command, "req_…", requestID)
	run := func(command string) []byte {
		cmd := exec.Command("sh", "-c", command)
		cmd.Dir, cmd.Stderr = filepath.Dir(file), os.Stderr
		output, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		return bytes.TrimSpace(output)
	}
	eventually.True(t, "the line of "+requestID+" is written", func() bool { return len(run(command)) > 0 })
	if err := json.Unmarshal(run(command), &found); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return found, string(run(`jq -r 'select(.rekall.request_id == "` + requestID + `") | .user_id' access.log`))
}

func TestOneLineOfTheAccessLogSaysWhyARequestWasRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	good, revoked := r.key("production", "memories:read"), r.key("production", "memories:read")
	sandbox := r.key("sandbox", "memories:read")
	r.revoke(revoked.ID)
	file := filepath.Join(t.TempDir(), "access.log")
	g := r.start(strings.ReplaceAll(loggedSites, "LOG", file))
	type line = map[string]string
	of := func(id, decision, reason string) line {
		return line{"key_id": id, "account": "acme", "environment": "production", "decision": decision, "reason": reason}
	}
	unknown := apikey.Generate(apikey.Production)
	for name, tc := range map[string]struct {
		method, path, key string
		want              line
	}{
		"allowed":          {"GET", "/v1/memories", good.Key.Reveal(), line{"key_id": good.ID, "account": "acme", "environment": "production", "decision": "allowed"}},
		"backend down":     {"GET", "/v1/memories/down", good.Key.Reveal(), of(good.ID, "allowed", "UPSTREAM_UNAVAILABLE")},
		"no key":           {"GET", "/v1/memories", "", line{"environment": "none", "decision": "missing", "reason": "API_KEY_MISSING"}},
		"no such key":      {"GET", "/v1/memories", unknown, line{"environment": "production", "decision": "unknown", "reason": "API_KEY_INVALID"}},
		"half a key":       {"GET", "/v1/memories", unknown[:40], line{"environment": "none", "decision": "malformed", "reason": "API_KEY_INVALID"}},
		"revoked":          {"GET", "/v1/memories", revoked.Key.Reveal(), of(revoked.ID, "revoked", "API_KEY_REVOKED")},
		"no scope":         {"DELETE", "/v1/memories/1", good.Key.Reveal(), of(good.ID, "scope_insufficient", "SCOPE_INSUFFICIENT")},
		"no rule":          {"GET", "/v2", good.Key.Reveal(), of(good.ID, "not_covered", "ROUTE_NOT_COVERED")},
		"bad path":         {"GET", "/v1//memories", good.Key.Reveal(), line{"environment": "production", "decision": "path_invalid", "reason": "PATH_INVALID"}},
		"bad method":       {"TRACE", "/v1/memories", good.Key.Reveal(), line{"environment": "production", "decision": "method_invalid", "reason": "METHOD_NOT_ALLOWED"}},
		"cleartext":        {"GET", "/plain", good.Key.Reveal(), line{"reason": "TLS_REQUIRED"}},
		"ungated proxy":    {"GET", "/v1/memories/ungated", good.Key.Reveal(), line{"reason": "GATEWAY_REQUIRED"}},
		"not managing":     {"GET", "/v1/api-keys", good.Key.Reveal(), line{"reason": "PERMISSION_DENIED"}},
		"managing revoked": {"GET", "/v1/api-keys", revoked.Key.Reveal(), line{"reason": "API_KEY_REVOKED"}},
		"other environment": {"GET", "/v1/memories", sandbox.Key.Reveal(), line{
			"key_id": sandbox.ID, "account": "acme", "environment": "sandbox", "decision": "environment_mismatch", "reason": "SANDBOX_PRODUCTION_MISMATCH"}},
	} {
		header := map[string][]string{}
		if tc.key != "" {
			header["Authorization"] = []string{"Bearer " + tc.key}
		}
		answer := g.do(tc.method, tc.path, header)
		tc.want["request_id"] = answer.Header.Get("X-Request-Id")
		if code := answer.code(t); code != tc.want["reason"] {
			t.Errorf("%s: answered %s, want %s", name, code, tc.want["reason"])
		}
		got, userID := logOf(t, file, tc.want["request_id"])
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
		if id := tc.want["key_id"]; id != userID && id != "" {
			t.Errorf("%s: user_id %q, want %q", name, userID, id)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{good.Key.Reveal(), revoked.Key.Reveal(), sandbox.Key.Reveal(), unknown} {
		var hidden canaries
		hidden.addKey("key", key)
		hidden.want(t, "access log", string(text))
	}
}

func TestLineOfAStreamSaysThatItsKeyWasRevoked(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := r.key("production", "memories:read")
	file := filepath.Join(t.TempDir(), "access.log")
	g := r.start(strings.ReplaceAll(loggedSites, "LOG", file))
	stream := g.open("GET", "/v1/memories", demo(key, "sse"), nil)
	r.revoke(key.ID)
	ends(t, stream)
	got, _ := logOf(t, file, stream.Header.Get("X-Request-Id"))
	if got["decision"] != "revoked" || got["reason"] != "API_KEY_REVOKED" || got["key_id"] != key.ID {
		t.Errorf("the line says %v", got)
	}
}

func TestLineOfARequestSaysThatNobodyCouldTell(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(t.TempDir(), "access.log")
	g := r.prepare(strings.ReplaceAll(loggedSites, "LOG", file))
	g.run("postgres://nobody@127.0.0.1:1/none?connect_timeout=1")
	var answer reply
	eventually.True(t, "the gateway serves", func() bool {
		var err error
		answer, err = send("GET", g.http+"/v1/memories", bearer(r.key("production", "memories:read")), nil)
		return err == nil
	})
	answer.wantCode(t, 503, "AUTH_UNAVAILABLE")
	got, _ := logOf(t, file, answer.Header.Get("X-Request-Id"))
	if got["decision"] != "unavailable" || got["reason"] != "AUTH_UNAVAILABLE" {
		t.Errorf("the line says %v", got)
	}
}

// TestFullDiskOfTheAccessLogRefusesNobodyAndIsTold: a log that is lost is no reason to be away.
func TestFullDiskOfTheAccessLogRefusesNobodyAndIsTold(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start("http://:PORT {\nbind 127.0.0.1\nlog {\noutput file /dev/full\n}\n" + standardBlock + "}\n")
	for range 3 {
		g.do("GET", "/v1/memories", bearer(r.key("production", "memories:read"))).wantCode(t, 200, "")
	}
	eventually.True(t, "the journal tells of it", func() bool { return strings.Contains(g.log.String(), "write error: ") })
}

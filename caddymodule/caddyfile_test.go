package caddymodule

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	"github.com/rekall-ai/gateway/internal/keystore"
)

var update = flag.Bool("update", false, "write the golden files")

const separator = "----------\n"

// TestCaddyfileAdapts compares each Caddyfile below testdata with the JSON, or the error, that stands under it.
func TestCaddyfileAdapts(t *testing.T) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatal("no golden files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			input, golden, _ := strings.Cut(string(content), separator)
			got := adapted(t, input)
			if bad := strings.HasPrefix(filepath.Base(file), "bad_"); bad == strings.HasPrefix(got, "{") {
				t.Errorf("the file's name says otherwise:\n%s", got)
			}
			if *update {
				if err := os.WriteFile(file, []byte(input+separator+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != golden {
				t.Errorf("got\n%s\nwant\n%s", got, golden)
			}
		})
	}
}

func adapted(t *testing.T, caddyfile string) string {
	t.Helper()
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return err.Error() + "\n"
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, config, "", "\t"); err != nil {
		t.Fatal(err)
	}
	return indented.String() + "\n"
}

// validate provisions a configuration as "rekall-gateway validate" does.
func validate(t *testing.T, caddyfile string) error {
	t.Helper()
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatal(err)
	}
	var c caddy.Config
	if err := json.Unmarshal(config, &c); err != nil {
		t.Fatal(err)
	}
	return caddy.Validate(&c)
}

// TestTwoScopeRulesForTheSameRequestsAreRefused in JSON too; the golden files have the Caddyfile's.
func TestTwoScopeRulesForTheSameRequestsAreRefused(t *testing.T) {
	builtin := `{"scope": "memories:write", "method": "GET", "path": "/v1/memories/:id"}`
	for name, tc := range map[string]struct {
		rules   string
		refused bool
	}{
		"one that replaces a built-in rule": {builtin, false},
		"names of parameters do not count":  {builtin + `, {"scope": "memories:read", "method": "GET", "path": "/v1/memories/:memory"}`, true},
		"another method":                    {builtin + `, {"scope": "memories:read", "method": "HEAD", "path": "/v1/memories/:id"}`, false},
		"a fixed segment beside a name":     {builtin + `, {"scope": "memories:read", "method": "GET", "path": "/v1/memories/id"}`, false},
		"a slash at the end":                {builtin + `, {"scope": "memories:read", "method": "GET", "path": "/v1/memories/:id/"}`, false},
		"the rest beside a name":            {builtin + `, {"scope": "memories:read", "method": "GET", "path": "/v1/memories/*"}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := new(Gateway)
			if err := json.Unmarshal([]byte(`{"scope_rules": [`+tc.rules+`]}`), g); err != nil {
				t.Fatal(err)
			}
			_, err := g.scopeTable()
			if refused := err != nil && strings.Contains(err.Error(), "has two scope rules"); refused != tc.refused || err != nil && !tc.refused {
				t.Errorf("error %v, want it refused: %t", err, tc.refused)
			}
		})
	}
}

func TestContradictorySettingsAreRefusedWithTheReason(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "")
	site := "\nhttp://127.0.0.1:1 {\nrekall_gateway {\nproduction {\nrespond 200\n}\n}\n}\n"
	for name, tc := range map[string]struct{ options, reason string }{
		"no database":                   {"refresh 1s", "set database"},
		"a placeholder that is not set": {"database {env.REKALL_NO_SUCH_VARIABLE}", "REKALL_NO_SUCH_VARIABLE"},
		"a bad URL":                     {"database postgres://user:hunter2@host:notaport/db", "database URL"},
		"more than 57 s":                {"database postgres://h/d\nmax_staleness 57001ms", "60 seconds"},
		"not longer than refresh":       {"database postgres://h/d\nrefresh 10s\nmax_staleness 10s", "longer than refresh"},
		"a long edge name":              {"database postgres://h/d\nedge " + strings.Repeat("é", 201), "1 to 200 characters"},
		"a long region":                 {"database postgres://h/d\nedge north " + strings.Repeat("é", 201), "region of at most 200"},
		"a control character":           {"database postgres://h/d\nedge \"nor\x1bth\"", "control characters"},
		"a refresh that is too short":   {"database postgres://h/d\nrefresh 1ms", "at least 10ms"},
		"a cache beyond all memory":     {"database postgres://h/d\ncache_size 99999999999", "from 1 to 10000000"},
		"an edge that has no name":      {"database postgres://h/d\nedge {env.REKALL_NO_SUCH_VARIABLE}", "edge: "},
		"an edge of an unknown name":    {"database postgres://h/d\nedge {hostname}", "{system.hostname}"}, // or all edges were named {hostname}
		"an edge of an unknown region":  {"database postgres://h/d\nedge north {region}", "{region}"},
	} {
		t.Run(name, func(t *testing.T) {
			err := validate(t, "{\nadmin off\nrekall {\n"+tc.options+"\n}\n}\n"+site)
			if err == nil || !strings.Contains(err.Error(), tc.reason) {
				t.Errorf("error %v, want one with %q", err, tc.reason)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Error("the error shows the password")
			}
		})
	}
}

// TestErrorOfAConfigurationNamesItsModuleOnce: Caddy writes the name.
func TestErrorOfAConfigurationNamesItsModuleOnce(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "postgres://h/d")
	server := func(rest string) string {
		return `{"http": {"servers": {"s": {"listen": ["127.0.0.1:1"], ` + rest + `}}}}`
	}
	handler := func(config string) string { return server(`"routes": [{"handle": [{"handler": ` + config + `}]}]`) }
	const answers = `"production": {"handler": "static_response"}`
	for _, tc := range []struct{ apps, want string }{
		{handler(`"rekall_gateway"`), "handlers.rekall_gateway: give it a production block"},
		{handler(`"rekall_gateway", "production": {"handler": "rekall_gateway"}`), "handlers.rekall_gateway: load handlers: "},
		{handler(`"rekall_gateway", "scope_rules": [{}], ` + answers), "handlers.rekall_gateway: scope rule: "},
		{handler(`"rekall_gateway", "identity_token": {"lifetime": 1}, ` + answers), "handlers.rekall_gateway: identity_token: "},
		{handler(`"rekall_gateway", "address_limit": {}, ` + answers), "handlers.rekall_gateway: address_limit: "},
		{server(`"protocols": ["h3"], "routes": [{"handle": [{"handler": "rekall_gateway", ` + answers + `}]}]`), "handlers.rekall_gateway: the server serves HTTP/3 only"},
		{server(`"protocols": ["h3"], "routes": [{"handle": [{"handler": "rekall_jwks"}]}]`), "handlers.rekall_jwks: the server serves HTTP/3 only"},
		{server(`"protocols": ["h3"], "routes": [{"handle": [{"handler": "rekall_health"}]}]`), "handlers.rekall_health: the server serves HTTP/3 only"},
		{handler(`"rekall_keys", "keys_per_day": -1`), "handlers.rekall_keys: keys_per_day must be"},
		{handler(`"reverse_proxy", "transport": {"protocol": "rekall"}`), "transport.rekall: unknown environment"},
		{server(`"listener_wrappers": [{"wrapper": "rekall_drain", "delay": -1}]`), "listeners.rekall_drain: delay is negative"},
		{`{"rekall": {"refresh": 1}}`, "provision rekall: refresh must be"},
		{server(`"logs": {"should_log_credentials": true}, "routes": [{"handle": [{"handler": "rekall_gateway", "forward_credential": true, ` + answers + `}]}]`), "handlers.rekall_gateway: forward_credential: "},
	} {
		c := &caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}}
		if err := json.Unmarshal([]byte(tc.apps), &c.AppsRaw); err != nil {
			t.Fatal(err)
		}
		if err := caddy.Validate(c); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want one with %q", tc.apps, err, tc.want)
		}
	}
}

// TestDurationIsWrittenAsEverywhereElse, in weeks too, which Caddy's do not have.
func TestDurationIsWrittenAsEverywhereElse(t *testing.T) {
	for retention, good := range map[string]bool{"90d": true, "2w": true, "1d12h": true, "720h": true, "P30D": true, "0s": false, "-1d": false, "soon": false} {
		_, err := parseDuration(retention)
		if (err == nil) != good {
			t.Errorf("%s: error %v", retention, err)
		}
	}
}

func TestServerThatOnlySpeaksHTTP3IsRefused(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "postgres://h/d")
	for name, tc := range map[string]struct{ servers, bind string }{
		"server":   {"servers {\nprotocols h3\n}\n", ""},
		"listener": {"", "bind 127.0.0.1 {\nprotocols h3\n}\n"},
	} {
		for _, directive := range []string{"rekall_gateway {\nproduction {\nrespond 200\n}\n}", "rekall_tls_only", "rekall_jwks", "rekall_keys", "rekall_health"} {
			err := validate(t, "{\nadmin off\nauto_https off\n"+tc.servers+"}\nhttps://127.0.0.1:1 {\n"+tc.bind+directive+"\n}\n")
			if err == nil || !strings.Contains(err.Error(), "HTTP/3") {
				t.Errorf("%s, %s: error %v, want one about HTTP/3", name, directive, err)
			}
		}
	}
}

// TestServerThatRedirectsBeforeTheDoorIsRefused: the redirect would have the key of "?api_key=" in its Location.
func TestServerThatRedirectsBeforeTheDoorIsRefused(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "postgres://h/d")
	for wrappers, refused := range map[string]bool{"rekall_drain\nhttp_redirect\ntls": true, "rekall_drain\ntls": false} {
		err := validate(t, "{\nadmin off\nauto_https off\nservers {\nlistener_wrappers {\n"+wrappers+"\n}\n}\n}\nhttps://127.0.0.1:1 {\nrekall_health\n}\n")
		if got := err != nil && strings.Contains(err.Error(), "listener wrapper http_redirect"); got != refused || err != nil && !refused {
			t.Errorf("%q: error %v, want it refused: %t", wrappers, err, refused)
		}
	}
}

func TestIdentityTokenThatLivesTooShortOrTooLongIsRefused(t *testing.T) {
	t.Setenv(keystore.DatabaseVariable, "postgres://h/d")
	for _, lifetime := range []string{"1m59s", "61m"} {
		err := validate(t, "{\nadmin off\n}\nhttp://127.0.0.1:1 {\nrekall_gateway {\nidentity_token {\nlifetime "+lifetime+
			"\n}\nproduction {\nrespond 200\n}\n}\n}\n")
		if err == nil || !strings.Contains(err.Error(), "identity_token: lifetime must be between 2m and 1h") {
			t.Errorf("%s: error %v", lifetime, err)
		}
	}
}

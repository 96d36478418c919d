package test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

const signingSite = `
http://:PORT {
	bind 127.0.0.1
	log
	handle /.well-known/jwks.json {
		rekall_jwks
	}
	rekall_health
	handle {
		rekall_gateway {
			identity_token {
				audience backends
			}
			production {
				reverse_proxy PRODUCTION
			}
			sandbox {
				reverse_proxy SANDBOX
			}
		}
	}
}
`

const tokenHeader = "X-Rekall-Identity-Token"

// token sends a request and returns the one identity token that the backend received.
func (g *gateway) token(key keyadmin.Key, header http.Header) string {
	g.t.Helper()
	all := bearer(key)
	maps.Copy(all, header)
	answer := g.do("GET", "/v1/memories", all)
	answer.wantCode(g.t, 200, "")
	found := ""
	for name, values := range answer.echo(g.t).Headers {
		if strings.EqualFold(strings.ReplaceAll(name, "_", "-"), tokenHeader) {
			if found != "" || len(values) != 1 {
				g.t.Fatalf("the backend received several tokens: %s %q", name, values)
			}
			found = values[0]
		}
	}
	return found
}

func (g *gateway) jwks() []byte {
	g.t.Helper()
	answer := g.do("GET", "/.well-known/jwks.json", nil)
	if answer.StatusCode != http.StatusOK || answer.Header.Get("Content-Type") != "application/jwk-set+json" ||
		answer.Header.Get("Cache-Control") != "public, max-age=60" {
		g.t.Fatalf("%d %v %s", answer.StatusCode, answer.Header, answer.body)
	}
	return []byte(answer.body)
}

// verified checks a token with another library than the one that signed it.
func verified(t *testing.T, token string, jwks []byte) jwt.MapClaims {
	t.Helper()
	keys, err := keyfunc.NewJWKSetJSON(jwks)
	if err != nil {
		t.Fatal(err)
	}
	claims := jwt.MapClaims{}
	if _, err := jwt.ParseWithClaims(token, claims, keys.Keyfunc, jwt.WithValidMethods([]string{"EdDSA"}),
		jwt.WithIssuer("rekall-gateway"), jwt.WithAudience("backends"), jwt.WithExpirationRequired()); err != nil {
		t.Fatalf("%q: %v", token, err)
	}
	return claims
}

func (r *rig) signingKeys() (n int) {
	r.t.Helper()
	conn, err := pgx.Connect(context.Background(), r.database)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if err := conn.QueryRow(context.Background(), "select count(*) from rekall.signing_keys").Scan(&n); err != nil {
		r.t.Fatal(err)
	}
	return n
}

func TestTokensOfTwoEdgesVerifyWithTheKeySetOfEither(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	edges := []*gateway{r.start(signingSite), r.start(signingSite)}
	keys := map[string]keyadmin.Key{
		"production": r.key("production", "memories:read", "hives:write"), "sandbox": r.key("sandbox", "memories:read"),
	}
	for environment, key := range keys {
		for _, signing := range edges {
			token := signing.token(key, nil)
			for _, asked := range edges {
				claims := verified(t, token, asked.jwks())
				if claims["sub"] != key.ID || claims["account"] != "acme" || claims["environment"] != environment ||
					claims["scope"] != strings.Join(key.Scopes, " ") {
					t.Errorf("claims %v for key %s of the %s", claims, key.ID, environment)
				}
			}
		}
	}
	if n := r.signingKeys(); n != len(edges) {
		t.Errorf("%d keys are published for %d edges", n, len(edges))
	}
	if answer := edges[0].do("POST", "/.well-known/jwks.json", nil); answer.code(t) != "METHOD_NOT_ALLOWED" {
		t.Errorf("POST: %d", answer.StatusCode)
	}
	if answer := edges[0].do("HEAD", "/.well-known/jwks.json", nil); answer.StatusCode != http.StatusOK || answer.body != "" {
		t.Errorf("HEAD: %d %q", answer.StatusCode, answer.body)
	}
}

// TestStepsAfterABreakInLockTheEdgesUserOutBeforeTheyRemoveItsKeys, of which one may be in another's name.
func TestStepsAfterABreakInLockTheEdgesUserOutBeforeTheyRemoveItsKeys(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	role := pgtest.Role(t, r.database)
	if _, _, err := keystore.MigrateAndGrant(t.Context(), r.database, keystore.Roles{Edge: role}); err != nil {
		t.Fatal(err)
	}
	taken := pgtest.Login(t, r.database, role)
	u, err := url.Parse(taken)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), taken)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	if _, err := conn.Exec(t.Context(), `insert into rekall.signing_keys (id, public_key, instance, expires_at)
		values (repeat('x', 43), decode(repeat('00', 32), 'hex'), repeat('y', 22), 'infinity')`); err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, r.database, strings.ReplaceAll(blocksOf(t, "../SECURITY.md", "sql")[0], "edge_1", u.User.Username()))
	if n := r.signingKeys(); n != 0 {
		t.Errorf("%d forged keys are left", n)
	}
	if err := conn.Ping(t.Context()); err == nil {
		t.Error("whoever was logged in still is")
	}
	if err := pgtest.TryExec(taken, "select 1"); err == nil {
		t.Error("the user still logs in")
	}
}

func TestTokenThatAClientSendsIsReplaced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(signingSite)
	mine, other := r.key("production", "memories:read"), r.key("production", "memories:read", "memories:delete")
	stolen := g.token(other, nil)
	for _, name := range []string{tokenHeader, "x-rekall-identity-token", "X_Rekall_Identity_Token", "X-Rekall_Identity-Token"} {
		got := g.token(mine, http.Header{name: {stolen, "forged"}, "Connection": {tokenHeader}})
		if claims := verified(t, got, g.jwks()); claims["sub"] != mine.ID {
			t.Errorf("%s: the backend received the token of %v", name, claims["sub"])
		}
	}
}

func TestTokenFollowsItsKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(signingSite)
	key := r.key("production", "memories:read", "memories:delete")
	if claims := verified(t, g.token(key, nil), g.jwks()); claims["scope"] != "memories:read memories:delete" {
		t.Errorf("scope %q", claims["scope"])
	}
	pgtest.Exec(t, r.database, "update rekall.api_keys set scopes = array['memories:read'] where id = $1", key.ID)
	eventually.True(t, "the token has the scopes that are left", func() bool {
		return verified(t, g.token(key, nil), g.jwks())["scope"] == "memories:read"
	})
	r.revoke(key.ID)
	eventually.True(t, "the revocation holds", func() bool { return g.ask(key) == "API_KEY_REVOKED" })
	before := r.production.Requests()
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 401, "API_KEY_REVOKED")
	if r.production.Requests() != before {
		t.Error("the backend was contacted for a revoked key")
	}
}

func TestWithoutIdentityTokenNothingIsSignedWrittenOrRunning(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	if token := g.token(r.key("production", "memories:read"), http.Header{tokenHeader: {"forged"}}); token != "" {
		t.Errorf("the backend received %q", token)
	}
	if n := r.signingKeys(); n != 0 {
		t.Errorf("%d keys are published", n)
	}
	stacks := do(t, "GET", g.admin+"/debug/pprof/goroutine?debug=2", nil, nil)
	if stacks.StatusCode != http.StatusOK || !strings.Contains(stacks.body, "keycache") || strings.Contains(stacks.body, "identitytoken") {
		t.Errorf("goroutines: %d %s", stacks.StatusCode, stacks.body)
	}
}

func TestReloadKeepsTheSigningKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(signingSite)
	key := r.key("production", "memories:read")
	before, jwks := g.token(key, nil), g.jwks()
	g.reload()
	verified(t, g.token(key, nil), jwks)
	verified(t, before, g.jwks())
	if n := r.signingKeys(); n != 1 {
		t.Errorf("%d keys are published after a reload", n)
	}
}

func TestKeySetAndTokensSurviveAnOutageOfPostgres(t *testing.T) {
	t.Parallel()
	server := pgtest.Server(t)
	r := newRigOn(t, server.URL())
	g := r.start(signingSite, "max_staleness 50s")
	key := r.key("production", "memories:read")
	before := g.token(key, nil)
	server.Kill()
	jwks := g.jwks()
	verified(t, before, jwks)
	g.doOnce("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	verified(t, g.token(key, nil), jwks)
}

// TestRequestForWhichNoTokenCanBeSignedIsNotPassedOn takes the table away: no backend may see a request without its token, nor
// one with a token whose key is not published.
func TestRequestForWhichNoTokenCanBeSignedIsNotPassedOn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pgtest.Exec(t, r.database, "alter table rekall.signing_keys rename to hidden")
	g := r.prepare(signingSite)
	g.run(r.database)
	g.waitSynced()
	key := r.key("production", "memories:read")
	answer := g.doOnce("GET", "/v1/memories", bearer(key))
	answer.wantCode(t, 503, "AUTH_UNAVAILABLE")
	if answer.Header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
	if n := r.production.Requests(); n != 0 {
		t.Error("the backend was contacted")
	}
	g.do("GET", "/.well-known/jwks.json", nil).wantCode(t, 503, "JWKS_UNAVAILABLE")
	if !strings.Contains(g.log.String(), "signing key cannot be published") {
		t.Error("the log does not say why")
	}
	pgtest.Exec(t, r.database, "alter table rekall.hidden rename to signing_keys")
	eventually.True(t, "tokens are signed", func() bool { return g.ask(key) == "" })
	verified(t, g.token(key, nil), g.jwks())
}

// TestEdgeThatCannotSignIsNotReady: else a rolling update would end with a fleet that answers every good key 503.
func TestEdgeThatCannotSignIsNotReady(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	pgtest.Exec(t, r.database, "alter table rekall.signing_keys rename to hidden")
	g := r.prepare(signingSite)
	g.run(r.database)
	g.waitSynced()
	probes := []string{g.admin + "/rekall/ready", g.http + "/rekall/ready"}
	for _, probe := range probes {
		if answer := do(t, "GET", probe, nil, nil); answer.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%s: %d", probe, answer.StatusCode)
		}
	}
	eventually.True(t, "the status says why", func() bool {
		status := do(t, "GET", g.admin+"/rekall/status", nil, nil).body
		return strings.Contains(status, `"ready":false`) && strings.Contains(status, "publish signing key")
	})
	if ready, signs := g.series(t, "rekall_keys_trusted"), g.series(t, "rekall_identity_token_ready"); ready != 1 || signs != 0 {
		t.Errorf("rekall_keys_trusted %v, rekall_identity_token_ready %v", ready, signs)
	}
	pgtest.Exec(t, r.database, "alter table rekall.hidden rename to signing_keys")
	for _, probe := range probes {
		eventually.True(t, "the edge is ready", func() bool { return do(t, "GET", probe, nil, nil).StatusCode == http.StatusOK })
	}
	if signs := g.series(t, "rekall_identity_token_ready"); signs != 1 {
		t.Errorf("rekall_identity_token_ready %v", signs)
	}
}

// identityTokenManual is the page for backend developers.
const identityTokenManual = "../internal/identitytoken/README.md"

// TestGoBackendInTheManualServesOnlyWhatCameThroughTheGateway builds the program in the manual and puts it behind a gateway.
func TestGoBackendInTheManualServesOnlyWhatCameThroughTheGateway(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, binary := filepath.Join(dir, "main.go"), filepath.Join(dir, "backend")
	process.Write(t, file, blocksOf(t, identityTokenManual, "go")[0])
	if output, err := exec.Command("go", "build", "-o", binary, file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}

	r := newRig(t)
	address := fmt.Sprintf("127.0.0.1:%d", process.FreePort(t))
	g := r.start(strings.ReplaceAll(signingSite, "PRODUCTION", address))
	backend := exec.Command(binary)
	backend.Env = append(os.Environ(), "JWKS_URL="+g.http+"/.well-known/jwks.json", "LISTEN="+address)
	backend.Stderr = os.Stderr
	if err := backend.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = backend.Process.Kill()
		_ = backend.Wait()
	})
	eventually.True(t, "the backend listens", func() bool {
		_, err := send("GET", "http://"+address, nil, nil)
		return err == nil
	})

	key := r.key("production", "memories:read")
	for _, edge := range []*gateway{g, r.start(strings.ReplaceAll(signingSite, "PRODUCTION", address))} { // one that it does not know yet
		answer := edge.do("GET", "/v1/memories", bearer(key))
		if want := key.ID + " of acme may memories:read\n"; answer.StatusCode != http.StatusOK || answer.body != want {
			t.Errorf("%d %q, want %q", answer.StatusCode, answer.body, want)
		}
	}
	sandboxToken := g.token(r.key("sandbox", "memories:read"), nil)
	token := r.start(signingSite).token(key, nil) // by an edge whose backend tells what it gets
	if answer := do(t, "GET", "http://"+address+"/v1/memories", http.Header{tokenHeader: {token}}, nil); answer.StatusCode != http.StatusOK {
		t.Errorf("a good token: %d %s", answer.StatusCode, answer.body)
	}
	for name, header := range map[string]http.Header{
		"no token":                     {"X-Rekall-Key-Id": {key.ID}, "X-Rekall-Account": {"acme"}},
		"a token for the sandbox":      {tokenHeader: {sandboxToken}},
		"a token that nobody signed":   {tokenHeader: {unsigned(t, key.ID)}},
		"a token with a signature cut": {tokenHeader: {token[:len(token)-4]}},
	} {
		if answer := do(t, "GET", "http://"+address+"/v1/memories", header, nil); answer.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %d %s", name, answer.StatusCode, answer.body)
		}
	}
}

// unsigned returns a token with the algorithm "none".
func unsigned(t *testing.T, subject string) string {
	t.Helper()
	claims := jwt.MapClaims{}
	content := fmt.Sprintf(`{"iss":"rekall-gateway","aud":"backends","sub":%q,"exp":9999999999,"environment":"production"}`, subject)
	if err := json.Unmarshal([]byte(content), &claims); err != nil {
		t.Fatal(err)
	}
	token, err := jwt.NewWithClaims(jwt.SigningMethodNone, claims).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

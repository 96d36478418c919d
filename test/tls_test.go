package test

import (
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/devenv/redistest"
	"github.com/rekall-ai/gateway/test/eventually"
	"github.com/rekall-ai/gateway/test/process"
)

// tlsPostgres is a server that speaks TLS as localhost, and takes connections without TLS as well: one that fell back to
// plaintext would work.
func tlsPostgres(t *testing.T, ca *authority) *devenv.Postgres {
	t.Helper()
	certificate, key := ca.issue("localhost")
	return pgtest.ServerWith(t, devenv.PostgresOptions{
		Settings: map[string]string{"ssl": "on", "ssl_cert_file": "server.crt", "ssl_key_file": "server.key"},
		Files:    map[string][]byte{"server.crt": certificate, "server.key": key},
	})
}

// verifiedURL is the server's URL with TLS that checks the server's name and authority.
func verifiedURL(t *testing.T, server *devenv.Postgres, host string, ca *authority) string {
	t.Helper()
	u, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	u.Host = net.JoinHostPort(host, strconv.Itoa(server.Port))
	u.RawQuery = url.Values{"sslmode": {"verify-full"}, "sslrootcert": {ca.file}}.Encode()
	return u.String()
}

func TestEveryConnectionToPostgresIsEncryptedAndVerified(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	server := tlsPostgres(t, ca)
	database := verifiedURL(t, server, "localhost", ca)
	r := newRigOn(t, database)
	g := r.start(standardSite, "refresh 20s")
	g.wantWoken(server.URL())
	key := r.key("production", "memories:read")
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	conn, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	var encrypted, plain int
	if err := conn.QueryRow(t.Context(), `select count(*) filter (where ssl), count(*) filter (where not ssl)
		from pg_stat_ssl join pg_stat_activity using (pid) where application_name = 'rekall-gateway'`).Scan(&encrypted, &plain); err != nil {
		t.Fatal(err)
	}
	if encrypted < 2 || plain != 0 {
		t.Errorf("%d connections with TLS, %d without", encrypted, plain)
	}
	r.revoke(key.ID)
	eventually.True(t, "the revocation holds", func() bool { return g.ask(key) == "API_KEY_REVOKED" })
}

// TestPostgresAndRedisOfAPrivateAuthorityAreUsedWhereSSLCertDirNamesIt, as SECURITY.md says and the pods do.
func TestPostgresAndRedisOfAPrivateAuthorityAreUsedWhereSSLCertDirNamesIt(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	postgres := tlsPostgres(t, ca)
	r := newRigOn(t, postgres.URL())
	certificate, key := ca.issue("127.0.0.1")
	server := redistest.Server(t, devenv.RedisOptions{TLS: &devenv.RedisTLS{
		CertificateFile: ca.save("redis.crt", certificate), KeyFile: ca.save("redis.key", key),
	}})
	g := r.prepare(heldSite, "rate_limit_store "+server.URL())
	g.env = []string{"SSL_CERT_DIR=" + filepath.Dir(ca.file)}
	database, _, _ := strings.Cut(verifiedURL(t, postgres, "localhost", ca), "?")
	g.run(database + "?sslmode=verify-full")
	g.waitReady()
	used := regexp.MustCompile(`(?m)^rekall_rate_limit_store_exchanges_total [1-9]`)
	held := r.key("production", "memories:read")
	eventually.True(t, "the edge shares the limits", func() bool {
		g.get(held).wantCode(t, 200, "")
		return used.MatchString(do(t, "GET", g.admin+"/metrics", nil, nil).body)
	})
}

func TestPostgresThatCannotBeVerifiedIsNotAskedAndTheLogSaysWhy(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	server := tlsPostgres(t, ca)
	r := newRigOn(t, server.URL())
	key := r.key("production", "memories:read")
	for name, tc := range map[string]struct{ url, why string }{
		"another authority": {verifiedURL(t, server, "localhost", newAuthority(t)), "certificate signed by unknown authority"},
		"another name":      {verifiedURL(t, server, "127.0.0.1", ca), "cannot validate certificate for 127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			g := r.of(t).prepare(standardSite, "refresh 100ms")
			g.run(tc.url)
			eventually.True(t, "the gateway serves", func() bool {
				_, err := client.Get(g.http)
				return err == nil
			})
			g.doOnce("GET", "/v1/memories", bearer(key)).wantCode(t, 503, "AUTH_UNAVAILABLE")
			eventually.True(t, "the log says why", func() bool { return strings.Contains(g.log.String(), tc.why) })
			if password, _ := mustParse(t, tc.url).User.Password(); strings.Contains(g.log.String(), password) {
				t.Error("the log shows the password")
			}
			if _, stderr, code := cli(t, tc.url, "keys", "list"); code == 0 || !strings.Contains(stderr, tc.why) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("keys list: %d %s", code, stderr)
			}
		})
	}
}

// TestFilesThatDatabaseURLsNameAreReadForEachConnection: an authority or a password is replaced while gateways run.
func TestFilesThatDatabaseURLsNameAreReadForEachConnection(t *testing.T) {
	t.Parallel()
	ca, next := newAuthority(t), newAuthority(t)
	server := tlsPostgres(t, ca)
	r := newRigOn(t, server.URL())
	pgtest.Exec(t, server.URL(), `create user edge superuser password 'former'`)
	passwords := ca.save("passwords", []byte("*:*:*:edge:former"))
	database := mustParse(t, verifiedURL(t, server, "localhost", ca)+"&passfile="+url.QueryEscape(passwords))
	database.User = url.User("edge")
	g := r.prepare(standardSite, "refresh 20s")
	g.run(database.String())
	g.waitReady()

	data := dataDirectory(t, server)
	certificate, key := next.issue("localhost")
	process.Write(t, filepath.Join(data, "server.crt"), string(certificate))
	process.Write(t, filepath.Join(data, "server.key"), string(key))
	process.Write(t, ca.file, process.Read(t, next.file))
	process.Write(t, passwords, "*:*:*:edge:next")
	pgtest.Exec(t, server.URL(), `alter user edge password 'next'`)
	pgtest.Exec(t, server.URL(), `select pg_reload_conf()`)
	eventually.True(t, "the server has the other authority's certificate", func() bool {
		return pgtest.TryExec(verifiedURL(t, server, "localhost", next), `select`) == nil
	})
	pgtest.Exec(t, server.URL(), `select pg_terminate_backend(pid) from pg_stat_activity where usename = 'edge'`)

	created := r.key("production", "memories:read")
	eventually.True(t, "the gateway asks Postgres again", func() bool { return g.ask(created) == "" })
	g.wantWoken(server.URL())
}

func dataDirectory(t *testing.T, server *devenv.Postgres) (path string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	if err := conn.QueryRow(t.Context(), `show data_directory`).Scan(&path); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustParse(t *testing.T, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

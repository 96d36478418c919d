package keysapi_test

import (
	"context"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// Every bad input is refused with the field named, and leaves nothing behind.
func TestBadInputIsRefusedWithTheFieldNamedAndNothingChanged(t *testing.T) {
	r := newRig(t)
	manager := r.manager("acme", "production")
	key := r.call("POST", path, by(manager), `{"name": "a", "scopes": ["hives:read"]}`).object(t, http.StatusCreated)
	one := path + "/" + key.ID
	before, audited := r.call("GET", one, by(manager), "").body, len(r.call("GET", path+"/audit", by(manager), "").audit(t).Data)
	pasted := apikey.Generate(apikey.Production)
	const invalid, unacceptable, denied, large, media, missing = "400 INVALID_REQUEST", "422 VALIDATION_FAILED", "403 PERMISSION_DENIED",
		"413 BODY_TOO_LARGE", "415 UNSUPPORTED_MEDIA_TYPE", "404 NOT_FOUND"
	plain := http.Header{}
	for _, test := range []struct {
		method, path, body string
		header             http.Header
		want, field        string
	}{
		// What is no JSON object of ours.
		{"POST", path, `{`, plain, invalid, ""},
		{"POST", path, `{"name"`, plain, invalid, ""},
		{"POST", path, `{"name": "a",}`, plain, invalid, ""},
		{"POST", path, `{name: "a"}`, plain, invalid, ""},
		{"POST", path, `[]`, plain, invalid, ""},
		{"POST", path, `null`, plain, invalid, ""},
		{"POST", path, `"a"`, plain, invalid, ""},
		{"POST", path, ` `, plain, invalid, ""},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]} {}`, plain, invalid, ""},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}x`, plain, invalid, ""},
		{"POST", path, "{\"name\": \"\xff\", \"scopes\": [\"hives:read\"]}", plain, invalid, ""},
		{"POST", path, "\xef\xbb\xbf{}", plain, invalid, ""},
		{"POST", path, strings.Repeat(`{"a":`, 20_000), plain, large, ""},
		{"POST", path, strings.Repeat(`[`, 60_000), plain, invalid, ""},
		{"POST", path, `{"name": ` + strings.Repeat(`[`, 60_000), plain, invalid, ""},
		{"POST", path, `{"name": "` + strings.Repeat("a", 64<<10) + `"}`, plain, large, ""},
		// Fields.
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "account": "other"}`, plain, invalid, "account"},
		{"POST", path, `{"name": "a", "Name": "a", "scopes": ["hives:read"]}`, plain, invalid, "Name"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "` + pasted + `": 1}`, plain, invalid, "rk_…"},
		{"POST", path, `{"` + strings.Repeat("n", 500) + `": 1}`, plain, invalid, strings.Repeat("n", 40) + "…"},
		{"POST", path, `{"": 1}`, plain, invalid, `""`},
		{"POST", path, `{"name": "a", "name": "a", "scopes": ["hives:read"]}`, plain, invalid, "name"},
		{"POST", path, `{"name": "a", "n\u0061me": "b", "scopes": ["hives:read"]}`, plain, invalid, "name"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": "1d", "expiresIn": "2d"}`, plain, invalid, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "manageKeys": false, "manage_keys": true}`, plain, invalid, "manage_keys"},
		{"POST", path, `{"name": 1, "scopes": ["hives:read"]}`, plain, invalid, "name"},
		{"POST", path, `{"name": {"name": "a"}, "scopes": ["hives:read"]}`, plain, invalid, "name"},
		{"POST", path, `{"name": "\ud800", "scopes": ["hives:read"]}`, plain, invalid, "name"},
		{"POST", path, `{"name": "a", "scopes": "hives:read"}`, plain, invalid, "scopes"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read", null]}`, plain, invalid, "scopes"},
		{"POST", path, `{"name": "a", "scopes": [1]}`, plain, invalid, "scopes"},
		{"POST", path, `{"name": "a", "scopes": {"0": "hives:read"}}`, plain, invalid, "scopes"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "manage_keys": "true"}`, plain, invalid, "manage_keys"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "manage_keys": 1}`, plain, invalid, "manage_keys"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": 90}`, plain, invalid, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_at": 1900000000}`, plain, invalid, "expires_at"},
		// Values.
		{"POST", path, ``, plain, unacceptable, "name"},
		{"POST", path, `{}`, plain, unacceptable, "name"},
		{"POST", path, `{"name": null, "scopes": ["hives:read"]}`, plain, unacceptable, "name"},
		{"POST", path, `{"name": "", "scopes": ["hives:read"]}`, plain, unacceptable, "name"},
		{"POST", path, `{"name": "` + strings.Repeat("ä", 201) + `", "scopes": ["hives:read"]}`, plain, unacceptable, "name"},
		{"POST", path, `{"name": "a\nb", "scopes": ["hives:read"]}`, plain, unacceptable, "name"},
		{"POST", path, `{"name": "` + pasted + `", "scopes": ["hives:read"]}`, plain, unacceptable, "name"},
		{"POST", path, `{"name": "a"}`, plain, unacceptable, "scopes"},
		{"POST", path, `{"name": "a", "scopes": null}`, plain, unacceptable, "scopes"},
		{"POST", path, `{"name": "a", "scopes": []}`, plain, unacceptable, "scopes"},
		{"POST", path, `{"name": "a", "scopes": ["hives:admin"]}`, plain, unacceptable, "scopes"},
		{"POST", path, `{"name": "a", "scopes": [""]}`, plain, unacceptable, "scopes"},
		{"POST", path, `{"name": "a", "scopes": ["` + strings.Repeat("hives:read", 6000) + `"]}`, plain, unacceptable, "scopes"},
		{"POST", path, `{"name": "a", "scopes": ["` + pasted + `"]}`, plain, unacceptable, "scopes"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "environment": "live"}`, plain, unacceptable, "environment"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": "soon"}`, plain, unacceptable, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": "-1d"}`, plain, unacceptable, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": "0"}`, plain, unacceptable, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": "3651d"}`, plain, unacceptable, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": "99999999999999999999d"}`, plain, unacceptable, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_at": "2000-01-01T00:00:00Z"}`, plain, unacceptable, "expires_at"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_at": "9000-01-01T00:00:00Z"}`, plain, unacceptable, "expires_at"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_at": "tomorrow"}`, plain, unacceptable, "expires_at"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": "1d", "expires_at": "2030-01-01T00:00:00Z"}`, plain, unacceptable, "expires_at"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_in": ""}`, plain, unacceptable, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expiresIn": ""}`, plain, unacceptable, "expires_in"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "expires_at": ""}`, plain, unacceptable, "expires_at"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "environment": ""}`, plain, unacceptable, "environment"},
		{"POST", one + "/rotate", `{"overlap": ""}`, plain, unacceptable, "overlap"},
		{"PATCH", one, `{}`, plain, unacceptable, "name"},
		{"PATCH", one, `{"name": "b", "scopes": ["memories:read"]}`, plain, invalid, "scopes"},
		{"PATCH", one, `{"name": " b"}`, plain, unacceptable, "name"},
		{"POST", one + "/rotate", `{"overlap": "soon"}`, plain, unacceptable, "overlap"},
		{"POST", one + "/rotate", `{"overlap": "-1h"}`, plain, unacceptable, "overlap"},
		{"POST", one + "/rotate", `{"overlap": "366d"}`, plain, unacceptable, "overlap"},
		{"POST", one + "/rotate", `{"overlap": 0}`, plain, invalid, "overlap"},
		{"POST", one + "/rotate", `{"scopes": ["hives:write"]}`, plain, invalid, "scopes"},
		{"POST", one + "/revoke", `{"id": "x"}`, plain, invalid, "id"},
		{"DELETE", one, `{"force": true}`, plain, invalid, "force"},
		{"POST", one + "/rotate/undo", `[]`, plain, invalid, ""},
		// Headers.
		{"POST", path, `{}`, http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, media, ""},
		{"POST", path, `{}`, http.Header{"Content-Type": {"text/plain"}}, media, ""},
		{"POST", path, `{}`, http.Header{"Content-Type": {"application/json; charset=utf-16"}}, media, ""},
		{"POST", path, `{}`, http.Header{"Content-Type": {"application/json", "text/plain"}}, media, ""},
		{"POST", path, `{}`, http.Header{"Content-Type": nil}, media, ""},
		{"POST", path, `{}`, http.Header{"Content-Encoding": {"gzip"}}, media, ""},
		{"DELETE", one, `{}`, http.Header{"Content-Type": {"text/plain"}}, media, ""},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}`, http.Header{"Idempotency-Key": {""}}, invalid, "Idempotency-Key"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}`, http.Header{"Idempotency-Key": {"a", "b"}}, invalid, "Idempotency-Key"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}`, http.Header{"Idempotency-Key": {"a b"}}, unacceptable, "Idempotency-Key"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}`, http.Header{"Idempotency-Key": {strings.Repeat("a", 256)}}, unacceptable, "Idempotency-Key"},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}`, http.Header{"Idempotency-Key": {pasted}}, unacceptable, "Idempotency-Key"},
		{"POST", one + "/rotate", ``, http.Header{"Idempotency-Key": {""}}, invalid, "Idempotency-Key"},
		{"POST", one + "/rotate", ``, http.Header{"Idempotency-Key": {"a", "a"}}, invalid, "Idempotency-Key"},
		{"POST", one + "/rotate", ``, http.Header{"Idempotency-Key": {"ü"}}, unacceptable, "Idempotency-Key"},
		{"POST", one + "/rotate", ``, http.Header{"Idempotency-Key": {pasted}}, unacceptable, "Idempotency-Key"},
		// Queries.
		{"GET", path + "?limit=0", "", plain, unacceptable, "limit"},
		{"GET", path + "?limit=101", "", plain, unacceptable, "limit"},
		{"GET", path + "?limit=ten", "", plain, unacceptable, "limit"},
		{"GET", path + "?limit=99999999999999999999", "", plain, unacceptable, "limit"},
		{"GET", path + "?cursor=x", "", plain, unacceptable, "cursor"},
		{"GET", path + "?status=gone", "", plain, unacceptable, "status"},
		{"GET", path + "?environment=live", "", plain, unacceptable, "environment"},
		{"GET", path + "?name=%ff", "", plain, unacceptable, "name"},
		{"GET", path + "?environment=", "", plain, unacceptable, "environment"},
		{"GET", path + "?status=", "", plain, unacceptable, "status"},
		{"GET", path + "?name", "", plain, unacceptable, "name"},
		{"GET", path + "?limit=", "", plain, unacceptable, "limit"},
		{"GET", path + "?cursor=", "", plain, unacceptable, "cursor"},
		{"GET", path + "?limit=1&limit=2", "", plain, invalid, "limit"},
		{"GET", path + "?account=other", "", plain, invalid, "account"},
		{"GET", path + "?a%zz", "", plain, invalid, ""},
		{"GET", path + "?a;b", "", plain, invalid, ""},
		{"GET", path + "?=1", "", plain, invalid, `""`},
		{"GET", one + "?show=key", "", plain, invalid, "show"},
		{"POST", path + "?dry_run=true", `{"name": "a", "scopes": ["hives:read"]}`, plain, invalid, "dry_run"},
		{"PATCH", one + "?dry_run=true", `{"name": "b"}`, plain, invalid, "dry_run"},
		{"POST", one + "/rotate?dry_run=true", "", plain, invalid, "dry_run"},
		{"POST", one + "/rotate/undo?dry_run=true", "", plain, invalid, "dry_run"},
		{"POST", one + "/revoke?dry_run=true", "", plain, invalid, "dry_run"},
		{"DELETE", one + "?dry_run=true", "", plain, invalid, "dry_run"},
		{"POST", path + "/leaked?dry_run=true", `{"keys": ["` + key.Key.Key.Reveal() + `"]}`, plain, invalid, "dry_run"},
		{"GET", path + "/audit?actor=", "", plain, unacceptable, "actor"},
		{"GET", path + "/audit?action=", "", plain, unacceptable, "action"},
		{"GET", path + "/audit?since=", "", plain, unacceptable, "since"},
		{"GET", one + "/audit?until=", "", plain, unacceptable, "until"},
		{"GET", path + "/audit?since=yesterday", "", plain, unacceptable, "since"},
		{"GET", path + "/audit?until=tomorrow", "", plain, unacceptable, "until"},
		{"GET", path + "/audit?since=2020-01-02T00:00:00Z&until=2020-01-01T00:00:00Z", "", plain, unacceptable, "since"},
		{"GET", one + "/audit?since=2020-01-01T00:00:00Z&until=2020-01-01T00:00:00Z", "", plain, unacceptable, "since"},
		{"GET", path + "/audit?cursor=-1", "", plain, unacceptable, "cursor"},
		{"GET", path + "/audit?limit=0", "", plain, unacceptable, "limit"},
		{"GET", one + "/audit?key_id=x", "", plain, invalid, "key_id"},
		{"GET", one + "/usage?from=yesterday", "", plain, unacceptable, "from"},
		{"GET", one + "/usage?from=", "", plain, unacceptable, "from"},
		{"GET", one + "/usage?to=", "", plain, unacceptable, "to"},
		{"GET", one + "/usage?to=now", "", plain, unacceptable, "to"},
		{"GET", one + "/usage?from=2020-01-02T00:00:00Z&to=2020-01-01T00:00:00Z", "", plain, unacceptable, "from"},
		{"GET", one + "/usage?from=2000-01-01T00:00:00Z", "", plain, unacceptable, "from"},
		{"GET", one + "/usage?hour=1", "", plain, invalid, "hour"},
		// Paths and methods.
		{"GET", path + "/", "", plain, missing, ""},
		{"GET", path + "/x", "", plain, missing, ""},
		{"GET", path + "/key_", "", plain, missing, ""},
		{"GET", path + "/leaked/github", "", plain, missing, ""},
		{"POST", one + "/unrevoke", "", plain, missing, ""},
		{"GET", "/v1/memories", "", plain, missing, ""},
		{"GET", "/", "", plain, missing, ""},
		{"GET", path + "/../api-keys", "", plain, "400 PATH_INVALID", ""},
		{"GET", "/v1//api-keys", "", plain, "400 PATH_INVALID", ""},
		{"GET", path + "/" + pasted, "", plain, "400 PATH_INVALID", ""},
		{"GET", path + "/key_%2f", "", plain, "400 PATH_INVALID", ""},
		{"PUT", one, "", plain, "405 METHOD_NOT_ALLOWED", ""},
		{"POST", one, "", plain, "405 METHOD_NOT_ALLOWED", ""},
		{"OPTIONS", path, "", plain, "405 METHOD_NOT_ALLOWED", ""},
		{"TRACE", path, "", plain, "405 METHOD_NOT_ALLOWED", ""},
		{"get", path, "", plain, "405 METHOD_NOT_ALLOWED", ""},
		{"GET", one + "/revoke", "", plain, "405 METHOD_NOT_ALLOWED", ""},
		// Rights: what a key of less could do with more.
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}`, by(key.Key), denied, ""},
		{"GET", path, "", by(key.Key), denied, ""},
		{"POST", path, `{"name": "a", "scopes": ["hives:read"]}`, http.Header{"Authorization": {"Bearer " + pasted}}, "401 API_KEY_INVALID", ""},
	} {
		header := by(manager)
		maps.Copy(header, test.header)
		status, code, _ := strings.Cut(test.want, " ")
		answer := r.bad(test.method, test.path, header, test.body)
		if got := answer.Status[:3]; got != status {
			t.Errorf("%s %s %.80q: status %s %s", test.method, test.path, test.body, got, answer.body)
			continue
		}
		answer.refused(t, answer.StatusCode, code, test.field)
		if len(answer.body) > 1000 {
			t.Errorf("%s %s %.80q: a long answer, %.200s", test.method, test.path, test.body, answer.body)
		}
	}
	if page := r.call("GET", path, by(manager), "").keys(t); len(page.Data) != 2 {
		t.Errorf("%d keys", len(page.Data))
	}
	if after := r.call("GET", one, by(manager), "").body; after != before {
		t.Errorf("changed from %s to %s", before, after)
	}
	if entries := r.call("GET", path+"/audit", by(manager), "").audit(t).Data; len(entries) != audited {
		t.Errorf("audit %+v", entries)
	}
}

func TestLongestNameAndOddSpacingAreAcceptable(t *testing.T) {
	r := newRig(t)
	ann := person("ann@acme")
	name := strings.Repeat("ä", 200)
	answer := r.call("POST", path, with(ann, "Content-Type", "application/json; charset=UTF-8"),
		"\r\n\t{ \"scopes\" : [ \"hives:read\" , \"hives:read\" ] , \"environment\":\"sandbox\", \"name\":\""+name+"\" }\n\n")
	if got := answer.object(t, http.StatusCreated); got.Name != name || len(got.Scopes) != 1 {
		t.Errorf("created %s", answer.body)
	}
}

func TestBodyThatEndsEarlyIsRefused(t *testing.T) {
	r := newRig(t)
	request := "POST " + path + " HTTP/1.1\r\nHost: a\r\nX-Person: ann@acme\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"name\": \"a\""
	if answer := raw(t, r.server.Listener.Addr().String(), request); !strings.HasPrefix(answer, "HTTP/1.1 400 ") || !strings.Contains(answer, "BODY_INVALID") {
		t.Errorf("answer %q", answer)
	}
}

// "Cannot tell" is neither "not found" nor a refusal, and is known to the operator.
func TestWithoutPostgresTheAnswerIs503AndTheLogSaysWhy(t *testing.T) {
	server := pgtest.Server(t)
	r := newRigOn(t, server.URL(), nil)
	manager := r.manager("acme", "production")
	r.call("GET", path, person("ann@acme"), "").keys(t)
	server.Kill()
	for _, request := range [][3]string{
		{"GET", path, ""}, {"POST", path, `{"name": "a", "scopes": ["hives:read"], "environment": "sandbox"}`}, {"DELETE", path + "/" + manager.ID, ""},
		{"POST", path + "/leaked", `{"keys": ["` + manager.Key.Reveal() + `"]}`},
	} {
		answer := r.call(request[0], request[1], person("ann@acme"), request[2])
		answer.refused(t, http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE", "")
		if answer.Header.Get("Retry-After") == "" || !strings.Contains(r.log.String(), answer.Header.Get("X-Request-Id")) {
			t.Errorf("Retry-After %q, log %s", answer.Header.Get("Retry-After"), r.log)
		}
	}
	if apikey.ContainsKey(r.log.String()) {
		t.Error("the log has a key")
	}
}

func TestPostgresThatHangsIsAnswered503(t *testing.T) {
	server := pgtest.Server(t)
	r := newRigOn(t, server.URL(), nil)
	r.call("GET", path, person("ann@acme"), "").keys(t)
	server.Pause()
	defer server.Resume()
	r.call("GET", path, person("ann@acme"), "").refused(t, http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE", "")
	if r.failed.Load() != 1 {
		t.Error("nobody is told that keys cannot be managed")
	}
}

// TestRequestThatWaitsForOthersOfItsActorIsToldSo, and says nothing of Postgres.
func TestRequestThatWaitsForOthersOfItsActorIsToldSo(t *testing.T) {
	r := newRig(t)
	key := r.manager("acme", "production")
	conn, err := pgx.Connect(t.Context(), r.database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(t.Context(), "begin; select from rekall.api_keys where id = '"+key.ID+"' for no key update"); err != nil {
		t.Fatal(err)
	}
	ann, err := keyadmin.Person("ann", "acme")
	if err != nil {
		t.Fatal(err)
	}
	flood, stop := context.WithCancel(t.Context())
	var requests sync.WaitGroup
	defer requests.Wait()
	defer stop()
	for _, name := range []string{"One", "Two"} {
		requests.Go(func() { _, _ = r.admin.Rename(flood, ann, key.ID, name) })
	}
	pgtest.AwaitBlocked(t, r.database, 2)
	answer := r.call("PATCH", path+"/"+key.ID, person("ann@acme"), `{"name": "Three"}`)
	answer.refused(t, http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE", "")
	if answer.Header.Get("Retry-After") == "" || !strings.Contains(answer.body, "Requests of yours") || r.failed.Load() != 0 {
		t.Errorf("Retry-After %q, %s, %d failures", answer.Header.Get("Retry-After"), answer.body, r.failed.Load())
	}
}

func TestAccountThatMayMakeOrRenameNoMoreKeysIsTold(t *testing.T) {
	r := newRig(t)
	pgtest.Exec(t, r.database, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_by)
		select 'key_' || lpad(n::text, 22, '0'), 'acme', 'n', 'sandbox', sha256(n::text::bytea), '{}', 'user:ann' from generate_series(1, $1::int) n`, keysPerDay)
	pgtest.Exec(t, r.database, `insert into rekall.audit (actor, action, account)
		select 'user:ann', 'key.renamed', 'acme' from generate_series(1, $1::int)`, keysPerDay)
	for _, test := range [][4]string{
		{"POST", path, `{"name": "a", "scopes": ["hives:read"], "environment": "sandbox"}`, "has made as many API keys"},
		{"PATCH", path + "/key_0000000000000000000001", `{"name": "Other"}`, "has renamed API keys as often"},
	} {
		answer := r.call(test[0], test[1], person("ann@acme"), test[2])
		answer.refused(t, http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED", "")
		if answer.Header.Get("Retry-After") == "" || !strings.Contains(answer.body, test[3]) {
			t.Errorf("%s: Retry-After %q, %s", test[0], answer.Header.Get("Retry-After"), answer.body)
		}
	}
}

// A key that ended a moment ago may still be found at an edge that has not heard of it. It changes nothing, and is told what it is:
// that it may not do this would be said of a good key.
func TestRightsAreReadAgainBeforeAnythingIsWritten(t *testing.T) {
	r := newRig(t)
	for code, end := range map[string]func(keyadmin.Key){
		"API_KEY_REVOKED": func(key keyadmin.Key) { r.call("DELETE", path+"/"+key.ID, nil, "").object(t, http.StatusOK) },
		"API_KEY_EXPIRED": func(key keyadmin.Key) {
			pgtest.Exec(t, r.database, `update rekall.api_keys set expires_at = now() where id = $1`, key.ID)
		},
	} {
		manager := r.manager("acme", "production")
		found, err := r.store.Lookup(t.Context(), []apikey.Digest{apikey.Hash(manager.Key.Reveal())})
		if err != nil {
			t.Fatal(err)
		}
		stale, err := keyadmin.ManagingKey(found.Records[0])
		if err != nil {
			t.Fatal(err)
		}
		r.actorIs = &stale
		end(manager)
		answer := r.call("POST", path, nil, `{"name": "a", "scopes": ["hives:read"]}`)
		answer.refused(t, http.StatusUnauthorized, code, "")
		if !strings.Contains(answer.Header.Get("WWW-Authenticate"), "invalid_token") {
			t.Errorf("WWW-Authenticate %q", answer.Header.Get("WWW-Authenticate"))
		}
	}
}

// A client tells from numbers how long to wait.
func TestDetailsOfARefusalMayBeNumbers(t *testing.T) {
	r := newRig(t)
	r.actorErr = &apierror.Error{
		Status: http.StatusTooManyRequests, Code: "RATE_LIMIT_EXCEEDED", Message: "Too many.", RetryAfter: time.Second,
		Details: map[string]any{"limit": 100, "remaining": 0, "reset_at": int64(1900000000)},
	}
	if answer := r.call("GET", path, nil, ""); !strings.Contains(answer.body, `"details":{"limit":100,"remaining":0,"reset_at":1900000000}`) {
		t.Errorf("%d %s", answer.StatusCode, answer.body)
	}
}

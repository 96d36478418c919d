package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// managedSite is the site of the documentation: key management and the API under one base URL.
const managedSite = `
http://:PORT {
	bind 127.0.0.1
	log
	rekall_keys
	rekall_gateway {
		production {
			reverse_proxy PRODUCTION
		}
		sandbox {
			reverse_proxy SANDBOX
		}
	}
}
`

const keysPath = "/v1/api-keys"

// manage sends a JSON request and wants an answer with this status.
func (g *gateway) manage(method, path string, header http.Header, body string, status int) reply {
	g.t.Helper()
	header = header.Clone()
	if header == nil {
		header = http.Header{}
	}
	if body != "" && header["Content-Type"] == nil {
		header.Set("Content-Type", "application/json")
	}
	var answer reply
	eventually.True(g.t, "the gateway can tell whose key it is", func() bool {
		answer = do(g.t, method, g.http+path, header, strings.NewReader(body))
		return answer.StatusCode == status || !answer.cannotTell()
	})
	if answer.StatusCode != status {
		g.t.Fatalf("%s %s: %d %s, want %d", method, path, answer.StatusCode, answer.body, status)
	}
	return answer
}

// awaitRefusal waits until a key is refused. The request that it is revoked in the middle of is cut.
func (g *gateway) awaitRefusal(t *testing.T, path string, key keyadmin.Key) {
	t.Helper()
	eventually.True(t, "the revoked key is refused", func() bool {
		answer, err := send("GET", g.http+path, bearer(key), nil)
		return err == nil && answer.StatusCode == http.StatusUnauthorized
	})
}

// key is the key in an answer, with what is said of it.
func (r reply) key(t *testing.T) (key struct {
	keyadmin.Key
	RevokedSelf bool `json:"revoked_self"`
}) {
	t.Helper()
	body := struct{ Data any }{&key}
	if err := json.Unmarshal([]byte(r.body), &body); err != nil || key.ID == "" {
		t.Fatalf("no key in %s: %v", r.body, err)
	}
	return key
}

// manager makes a managing key with all scopes from the command line, which is where the first one comes from.
func (r *rig) manager(account string) keyadmin.Key {
	r.t.Helper()
	stdout, stderr, code := cli(r.t, r.database, "keys", "create", "--name", "Manager", "--scopes", strings.Join(apikey.ScopeNames(), ","),
		"--environment", "production", "--account", account, "--manage-keys", "--json")
	if code != 0 {
		r.t.Fatal(stderr)
	}
	var key keyadmin.Key
	if err := json.Unmarshal([]byte(stdout), &key); err != nil {
		r.t.Fatal(err)
	}
	return key
}

// traffic sends some 200 requests a second with a key that can be replaced while it runs.
type traffic struct {
	g      *gateway
	mu     sync.RWMutex // held by each request for reading, so that a replaced key is used no longer
	key    keyadmin.Key
	good   atomic.Int64
	failed atomic.Pointer[string]
	stop   chan struct{}
	wg     sync.WaitGroup
}

func startTraffic(g *gateway, key keyadmin.Key) *traffic {
	tr := &traffic{g: g, key: key, stop: make(chan struct{})}
	const senders, gap = 4, 20 * time.Millisecond
	for range senders {
		tr.wg.Go(func() {
			ticker := time.NewTicker(gap)
			defer ticker.Stop()
			for {
				select {
				case <-ticker.C:
					tr.send()
				case <-tr.stop:
					return
				}
			}
		})
	}
	return tr
}

func (tr *traffic) send() {
	tr.mu.RLock()
	defer tr.mu.RUnlock()
	answer, err := send("GET", tr.g.http+"/v1/memories", bearer(tr.key), nil)
	if err != nil || answer.StatusCode != http.StatusOK {
		failure := fmt.Sprint(err, answer.Response, answer.body)
		tr.failed.Store(&failure)
		return
	}
	tr.good.Add(1)
}

// deploy replaces the key. When it returns, no request has the old one.
func (tr *traffic) deploy(key keyadmin.Key) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.key = key
}

// more waits for more good requests, and reports the first that failed.
func (tr *traffic) more(t *testing.T, n int64) {
	t.Helper()
	want := tr.good.Load() + n
	eventually.True(t, "requests are answered", func() bool { return tr.good.Load() >= want || tr.failed.Load() != nil })
	if failure := tr.failed.Load(); failure != nil {
		t.Fatalf("a request failed: %s", *failure)
	}
}

func (tr *traffic) end() {
	close(tr.stop)
	tr.wg.Wait()
}

// TestProductPageFromTopToBottom does what Rekall's page tells its users to do, against the running gateway.
func TestProductPageFromTopToBottom(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(managedSite)
	manager := r.manager("acme")

	// Create: name, scopes, optional expiry. The key is shown once.
	created := g.manage("POST", keysPath, bearer(manager),
		`{"name": "Production Backend", "scopes": ["memories:read", "memories:write"], "expiresIn": "90d"}`, http.StatusCreated).key(t)
	if !apikey.ChecksumValid(created.Key.Key.Reveal()) || !strings.HasPrefix(created.Key.Key.Reveal(), "rk_") || created.Environment != "production" ||
		created.ExpiresAt.Sub(created.CreatedAt) != 90*24*time.Hour {
		t.Errorf("created %+v", created)
	}
	if again := g.manage("GET", keysPath+"/"+created.ID, bearer(manager), "", http.StatusOK); apikey.ContainsKey(again.body) {
		t.Errorf("the key is shown again: %s", again.body)
	}

	// Use it, in all three places.
	secret := created.Key.Key.Reveal()
	for _, answer := range []reply{
		g.do("GET", "/v1/memories", bearer(created.Key)), g.do("GET", "/v1/memories", http.Header{"X-Api-Key": {secret}}), g.do("GET", "/v1/memories?api_key="+secret, nil),
		g.do("POST", "/v1/memories", bearer(created.Key)),
	} {
		if echo := answer.echo(t); echo.Backend != "production" || echo.Headers.Get("X-Rekall-Key-Id") != created.ID {
			t.Errorf("echo %+v", echo)
		}
	}

	// A key may do no more than its scopes say.
	reader := g.manage("POST", keysPath, bearer(manager), `{"name": "Reader", "scopes": ["memories:read"]}`, http.StatusCreated).key(t)
	g.do("GET", "/v1/memories", bearer(reader.Key)).wantCode(t, http.StatusOK, "")
	g.do("POST", "/v1/memories", bearer(reader.Key)).wantCode(t, http.StatusForbidden, "SCOPE_INSUFFICIENT")
	g.manage("POST", keysPath, bearer(reader.Key), `{"name": "More", "scopes": ["memories:write"]}`, http.StatusForbidden).wantCode(t, http.StatusForbidden, "PERMISSION_DENIED")

	// A sandbox key goes to the sandbox.
	sandbox := g.manage("POST", keysPath, bearer(manager), `{"name": "Tests", "scopes": ["memories:read"], "environment": "sandbox"}`, http.StatusCreated).key(t)
	if echo := g.do("GET", "/v1/memories", bearer(sandbox.Key)).echo(t); !strings.HasPrefix(sandbox.Key.Key.Reveal(), "rk_test_") || echo.Backend != "sandbox" {
		t.Errorf("echo %+v", echo)
	}

	// List: id, name, last use, scopes.
	var page struct {
		Data       []keyadmin.Key
		Pagination struct {
			TotalCount int `json:"total_count"`
		}
	}
	eventually.True(t, "the list shows the last use", func() bool {
		list := g.manage("GET", keysPath+"?status=active&name=backend", bearer(manager), "", http.StatusOK)
		if err := json.Unmarshal([]byte(list.body), &page); err != nil {
			t.Fatal(err)
		}
		return len(page.Data) == 1 && page.Data[0].LastUsedAt != nil
	})
	if got := page.Data[0]; got.ID != created.ID || got.Name != "Production Backend" || len(got.Scopes) != 2 || page.Pagination.TotalCount != 1 {
		t.Errorf("listed %+v", page)
	}

	// Rotate without downtime: a successor, deploy it, see that traffic has moved, revoke the old key.
	tr := startTraffic(g, created.Key)
	tr.more(t, 100)
	successor := g.manage("POST", keysPath+"/"+created.ID+"/rotate", bearer(manager), `{"overlap": "24h"}`, http.StatusCreated).key(t)
	tr.more(t, 100) // both keys are good
	g.do("GET", "/v1/nothing", bearer(successor.Key)).wantCode(t, http.StatusForbidden, "ROUTE_NOT_COVERED")
	tr.deploy(successor.Key)
	tr.more(t, 100)
	eventually.True(t, "the successor is seen to be used", func() bool {
		return g.manage("GET", keysPath+"/"+successor.ID, bearer(manager), "", http.StatusOK).key(t).LastUsedAt != nil
	})
	g.manage("POST", keysPath+"/"+created.ID+"/revoke", bearer(manager), "", http.StatusOK)
	g.awaitRefusal(t, "/v1/memories", created.Key)
	g.do("GET", "/v1/memories", bearer(created.Key)).wantCode(t, http.StatusUnauthorized, "API_KEY_REVOKED")
	tr.more(t, 100)
	tr.end()
	if failure := tr.failed.Load(); failure != nil {
		t.Errorf("a request failed: %s", *failure)
	}

	// Usage, as the dashboard shows it.
	eventually.True(t, "usage is shown", func() bool {
		var used struct{ Data keyadmin.Usage }
		answer := g.manage("GET", keysPath+"/"+successor.ID+"/usage", bearer(manager), "", http.StatusOK)
		if err := json.Unmarshal([]byte(answer.body), &used); err != nil {
			t.Fatal(err)
		}
		return used.Data.Total.Allowed > 0 && len(used.Data.Hourly) > 0
	})

	// Revoke, however often, and be refused.
	for range 2 {
		if got := g.manage("DELETE", keysPath+"/"+successor.ID, bearer(manager), "", http.StatusOK).key(t); got.Status != keyadmin.Revoked {
			t.Errorf("revoked %+v", got)
		}
	}
	g.awaitRefusal(t, "/v1/memories", successor.Key)

	// At last the key that asks revokes itself, and is refused here with the same words.
	if got := g.manage("DELETE", keysPath+"/"+manager.ID, bearer(manager), "", http.StatusOK).key(t); !got.RevokedSelf {
		t.Errorf("revoked %+v", got)
	}
	g.awaitRefusal(t, keysPath, manager)
	g.do("GET", keysPath, bearer(manager)).wantCode(t, http.StatusUnauthorized, "API_KEY_REVOKED")
	if log := g.log.String(); apikey.ContainsKey(log) || !strings.Contains(log, `"user_id":"`+manager.ID+`"`) {
		t.Error("a key stands in the log, or not the id of the one that asked")
	}
}

// TestRequestToManageKeysCountsAsUseOfTheKey: its holder looks there whether it may be revoked.
func TestRequestToManageKeysCountsAsUseOfTheKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.limitAccount("free", 1, 1, 5)
	g := r.start(strings.Replace(managedSite, "rekall_gateway {", "rekall_gateway {\n\t\trate_limits", 1), "usage_flush 100ms")
	manager, plain, revoked := r.manager("acme"), r.key("production", "memories:read"), r.key("production", "memories:read")
	r.revoke(revoked.ID)
	for outcome, key := range map[string]keyadmin.Key{"allowed": manager, "scope_insufficient": plain, "revoked": revoked} {
		g.do("GET", keysPath, bearer(key))
		eventually.True(t, "the request is counted as "+outcome, func() bool { return r.usage(key)[outcome] == 1 })
	}
	g.do("GET", keysPath, bearer(manager)).wantCode(t, 429, "RATE_LIMIT_EXCEEDED")
	eventually.True(t, "the one beyond the limit is counted", func() bool { return r.usage(manager)["rate_limited"] == 1 })
}

func TestKeyManagementTakesCredentialsAsTheGatewayDoes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(managedSite)
	manager := r.manager("acme")
	secret := manager.Key.Reveal()
	expired, _, err := r.admin.Create(t.Context(), keyadmin.Operator("test"), keyadmin.CreateRequest{
		Name: "expired", Account: "acme", Environment: "production", Scopes: []string{"memories:read"}, ManageKeys: true, ExpiresIn: "1us",
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		what, path string
		header     http.Header
		status     int
		code       string
	}{
		{"bearer", keysPath, bearer(manager), 200, ""},
		{"x-api-key", keysPath, http.Header{"X-Api-Key": {secret}}, 200, ""},
		{"query", keysPath + "?limit=1&api_key=" + secret, nil, 200, ""},
		{"twice the same", keysPath + "?api_key=" + secret, bearer(manager), 200, ""},
		{"none", keysPath, nil, 401, "API_KEY_MISSING"},
		{"unknown", keysPath, http.Header{"X-Api-Key": {apikey.Generate(apikey.Production)}}, 401, "API_KEY_INVALID"},
		{"malformed", keysPath, http.Header{"Authorization": {"Bearer rk_x"}}, 401, "API_KEY_INVALID"},
		{"token", keysPath, http.Header{"Authorization": {"Bearer rat_x"}}, 401, "TOKEN_TYPE_UNSUPPORTED"},
		{"basic", keysPath, http.Header{"Authorization": {"Basic YW5uOnBhc3N3b3Jk"}}, 401, "API_KEY_MISSING"},
		{"expired", keysPath, bearer(expired), 401, "API_KEY_EXPIRED"},
		{"two", keysPath, http.Header{"X-Api-Key": {secret}, "Authorization": {"Bearer " + expired.Key.Reveal()}}, 400, "API_KEY_AMBIGUOUS"},
		{"in the path", keysPath + "/" + secret, bearer(manager), 400, "PATH_INVALID"},
		{"not a manager", keysPath, bearer(r.key("production", "memories:read")), 403, "PERMISSION_DENIED"},
		{"a path of the gateway behind it", keysPath + "s", bearer(manager), 403, "ROUTE_NOT_COVERED"},
	} {
		answer := g.do("GET", tc.path, tc.header)
		if answer.StatusCode != tc.status {
			t.Errorf("%s: %d %s", tc.what, answer.StatusCode, answer.body)
			continue
		}
		answer.wantCode(t, tc.status, tc.code)
	}
	// Of the query nothing is left for the API, which takes none here.
	g.manage("POST", keysPath+"?api_key="+secret, nil, `{"name": "a", "scopes": ["memories:read"]}`, http.StatusCreated)
	g.reload()
	g.do("GET", keysPath, bearer(manager)).wantCode(t, http.StatusOK, "")
	if apikey.ContainsKey(g.log.String()) {
		t.Error("a key stands in the log")
	}
}

// peopleSites are a site with passwords, and one whose operator has forgotten to ask for any.
const peopleSites = `
http://people.example:PORT {
	bind 127.0.0.1
	log
	basic_auth {
		ann HASH
		bob HASH
	}
	rekall_keys {
		account {http.auth.user.id}
	}
}
http://open.example:PORT {
	bind 127.0.0.1
	rekall_keys {
		account {header.X-Account}
	}
}
http://forward.example:PORT {
	bind 127.0.0.1
	forward_auth AUTH {
		uri /check
		copy_headers X-User X-Org
	}
	rekall_keys {
		account {header.X-Org}
		user {header.X-User}
	}
}
http://half.example:PORT {
	bind 127.0.0.1
	forward_auth /settings/* AUTH {
		uri /check
		copy_headers X-User>X-Person X-Org>X-Team
	}
	rekall_keys {
		account {header.x-team}
		user {header.X-Person}
	}
}
http://:PORT {
	bind 127.0.0.1
	rekall_gateway {
		production {
			reverse_proxy PRODUCTION
		}
	}
}
`

func TestBodyBeyondTheLimitOfItsSiteIsTooLargeForKeyManagementToo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(strings.Replace(managedSite, "\trekall_keys\n", "\trequest_body {\n\t\tmax_size 10B\n\t}\n\trekall_keys\n", 1))
	header := bearer(r.manager("acme"))
	header.Set("Content-Type", "application/json")
	chunked := struct{ io.Reader }{strings.NewReader(`{"name": "longer than ten"}`)} // Caddy itself refuses a length that is told
	do(t, "POST", g.http+keysPath, header, chunked).wantCode(t, http.StatusRequestEntityTooLarge, "BODY_TOO_LARGE")
}

func TestKeyThatWasPastedWithBlanksAroundItSignsIn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(managedSite)
	form := url.Values{"key": {" " + r.manager("acme").Key.Reveal() + "\r\n"}}.Encode()
	answer := do(t, "POST", g.http+dashboard.Root+"/sign-in", http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, strings.NewReader(form))
	if answer.StatusCode != http.StatusSeeOther || len(answer.Cookies()) == 0 {
		t.Errorf("answered %d with %d cookies", answer.StatusCode, len(answer.Cookies()))
	}
}

// TestAnswersOfKeyManagementThatNobodyReadsAreFew: each is held in memory until its client reads it, or for a minute.
func TestAnswersOfKeyManagementThatNobodyReadsAreFew(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(managedSite)
	manager, others := r.manager("acme"), r.manager("globex")
	for range 20 { // so that the shortest answer is longer than what a stream has a buffer for
		g.manage("POST", keysPath, bearer(manager), `{"name": "`+strings.Repeat("<", 200)+`", "scopes": ["memories:read"]}`, http.StatusCreated)
	}
	form := url.Values{"key": {manager.Key.Reveal()}}.Encode()
	signedIn := do(t, "POST", g.http+dashboard.Root+"/sign-in", http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, strings.NewReader(form))
	authorization := [2]string{"authorization", "Bearer " + manager.Key.Reveal()}
	session := [2]string{"cookie", signedIn.Cookies()[0].Name + "=" + signedIn.Cookies()[0].Value}
	for _, tc := range []struct {
		paths []string
		as    [2]string
	}{
		{[]string{keysPath, keysPath + "/audit"}, authorization},
		{[]string{dashboard.Root, dashboard.Root + "/" + manager.ID}, session},
	} {
		const requests, held = 20, 4
		answers := g.leaveUnread(t, requests, tc.paths, tc.as)
		for range held {
			if status := <-answers; status != "200" {
				t.Errorf("%s: one of the first is answered %s", tc.paths[0], status)
			}
		}
		// Whose client does not read can still revoke, and nobody else's requests wait.
		revoked := r.key("production", "memories:read")
		g.manage("DELETE", keysPath+"/"+revoked.ID, bearer(manager), "", http.StatusOK)
		g.manage("GET", keysPath, bearer(others), "", http.StatusOK)
		if page := g.do("GET", dashboard.Root+"/"+manager.ID+"/revoke", http.Header{"Cookie": {session[1]}}); page.StatusCode != http.StatusOK {
			t.Errorf("%s: the page to revoke with is %d", tc.paths[0], page.StatusCode)
		}
		for range requests - held {
			if status := <-answers; status != "503" {
				t.Errorf("%s: one of the rest is answered %s", tc.paths[0], status)
			}
		}
	}
	g.manage("GET", keysPath, bearer(manager), "", http.StatusOK) // once their connection is closed
}

// leaveUnread sends requests over one connection of HTTP/2 and reads no body. It returns the statuses as they come, and closes the
// connection after the last.
func (g *gateway) leaveUnread(t *testing.T, requests int, paths []string, as [2]string) <-chan string {
	t.Helper()
	address := strings.TrimPrefix(g.http, "http://")
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}); err != nil {
		t.Fatal(err)
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for n := range requests {
		block.Reset()
		for _, f := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", address}, {":path", paths[n%len(paths)]}, as} {
			_ = encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a buffer never fails
		}
		request := http2.HeadersFrameParam{StreamID: uint32(2*n + 1), BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true}
		if err := framer.WriteHeaders(request); err != nil {
			t.Fatal(err)
		}
	}
	answers := make(chan string, requests)
	go func() {
		defer func() { _ = conn.Close() }()
		defer close(answers)
		for seen := 0; seen < requests; {
			frame, err := framer.ReadFrame()
			if err != nil {
				return
			}
			if headers, ok := frame.(*http2.MetaHeadersFrame); ok {
				answers <- headers.PseudoValue("status")
				seen++
			}
		}
	}()
	return answers
}

func TestPeopleWhomCaddyHasAuthenticatedManageTheKeysOfTheirAccount(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	output, err := exec.Command(program, "hash-password", "--plaintext", "password", "--bcrypt-cost", "4").Output()
	if err != nil {
		t.Fatal(err)
	}
	auth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Cookie") == "" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if req.Header.Get("Cookie") == "eve" {
			w.Header().Set("X-User", "eve") // who has no account
			return
		}
		w.Header().Set("X-User", "carol")
		w.Header().Set("X-Org", "ann")
	}))
	t.Cleanup(auth.Close)
	g := r.start(strings.NewReplacer("HASH", strings.TrimSpace(string(output)), "AUTH", strings.TrimPrefix(auth.URL, "http://")).Replace(peopleSites))
	ask := func(site, method, path, body string, headers ...string) reply {
		t.Helper()
		req, err := http.NewRequest(method, g.http+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Host = site
		req.Header.Set("Content-Type", "application/json")
		for i := 0; i < len(headers); i += 2 {
			if headers[i] == "as" {
				req.SetBasicAuth(headers[i+1], "password")
				continue
			}
			req.Header.Set(headers[i], headers[i+1])
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		content, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return reply{resp, string(content)}
	}
	const people, open, forward, half = "people.example", "open.example", "forward.example", "half.example"
	const body = `{"name": "Ann's", "scopes": ["memories:read"], "environment": "production"}`
	answer := ask(people, "POST", keysPath, body, "as", "ann")
	if answer.StatusCode != http.StatusCreated {
		t.Fatalf("%d %s", answer.StatusCode, answer.body)
	}
	created := answer.key(t)
	if created.Account != "ann" || *created.CreatedBy != "user:ann" {
		t.Errorf("created %+v", created)
	}
	one := keysPath + "/" + created.ID
	g.do("GET", "/v1/memories", bearer(created.Key)).wantCode(t, http.StatusOK, "")

	// Another person's account is another's.
	ask(people, "GET", one, "", "as", "bob").wantCode(t, http.StatusNotFound, "NOT_FOUND")
	ask(people, "DELETE", one, "", "as", "bob").wantCode(t, http.StatusNotFound, "NOT_FOUND")
	ask(people, "POST", one+"/rotate", "", "as", "bob").wantCode(t, http.StatusNotFound, "NOT_FOUND")

	// Nobody is nobody, whatever they say of themselves.
	if answer := ask(people, "GET", one, ""); answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a password: %d %s", answer.StatusCode, answer.body)
	}
	for _, headers := range [][]string{
		{}, {"X-Account", "ann"}, {"as", "ann"}, {"as", "ann", "X-Account", "ann"}, {"X-Account", "ann", "Cookie", "http.auth.user.id=ann"},
	} {
		ask(open, "GET", one, "", headers...).wantCode(t, http.StatusUnauthorized, "API_KEY_MISSING")
	}

	// A page of another site can make the browser send the password, but not this.
	for _, headers := range [][]string{{"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}, {"Origin", "https://evil.example"}, {"Origin", "null"}} {
		headers := append([]string{"as", "ann"}, headers...)
		ask(people, "POST", keysPath, body, headers...).wantCode(t, http.StatusForbidden, "CROSS_ORIGIN_REQUEST")
		ask(people, "DELETE", one, "", headers...).wantCode(t, http.StatusForbidden, "CROSS_ORIGIN_REQUEST")
	}
	ask(people, "POST", keysPath, body, "as", "ann", "Content-Type", "text/plain").wantCode(t, http.StatusUnsupportedMediaType, "UNSUPPORTED_MEDIA_TYPE")
	ask(people, "GET", keysPath, "", "as", "ann", "Sec-Fetch-Site", "none").wantCode(t, http.StatusOK, "")
	ask(people, "PATCH", one, `{"name": "Hers"}`, "as", "ann", "Sec-Fetch-Site", "same-origin", "Origin", "http://people.example").wantCode(t, http.StatusOK, "")

	// A person and a key are two who ask.
	manager := r.manager("acme")
	ask(people, "GET", keysPath, "", "as", "ann", "X-Api-Key", manager.Key.Reveal()).wantCode(t, http.StatusBadRequest, "API_KEY_AMBIGUOUS")
	ask(people, "GET", keysPath+"?api_key="+manager.Key.Reveal(), "", "as", "ann").wantCode(t, http.StatusBadRequest, "API_KEY_AMBIGUOUS")
	ask(open, "GET", keysPath, "", "X-Api-Key", manager.Key.Reveal(), "X-Account", "ann").wantCode(t, http.StatusOK, "")

	// Behind forward_auth, headers are what it says, and not what the client says.
	if answer := ask(forward, "GET", one, "", "X-User", "ann", "X-Org", "ann"); answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a cookie: %d %s", answer.StatusCode, answer.body)
	}
	ask(forward, "GET", one, "", "Cookie", "a", "X-User", "mallory", "X-Org", "acme").wantCode(t, http.StatusOK, "")
	for range 2 {
		nobodys := ask(forward, "GET", one, "", "Cookie", "eve", "X-Org", "ann")
		if nobodys.wantCode(t, http.StatusForbidden, "PERMISSION_DENIED"); !strings.Contains(nobodys.body, "Ask the operator") {
			t.Errorf("whoever has no account is not told whom to ask: %s", nobodys.body)
		}
	}
	said := regexp.MustCompile(`"an authenticated person has no account.*"error":"[^"]*\{http\.request\.header\.X-Org\}`)
	if n := len(said.FindAllString(g.log.String(), -1)); n != 1 {
		t.Errorf("the log names the placeholder without a value %d times, want once", n)
	}
	ask(forward, "GET", one, "", "Cookie", "a", "Authorization", "Bearer eyJhbGciOiJSUzI1NiJ9.e30.c2ln").wantCode(t, http.StatusOK, "")
	if got := ask(forward, "DELETE", one, "", "Cookie", "a").key(t); got.Status != keyadmin.Revoked || got.RevokedSelf {
		t.Errorf("revoked %+v", got)
	}
	// Where forward_auth is for the dashboard only, the API has no people.
	ask(half, "GET", one, "", "X-Person", "ann", "X-Team", "ann").wantCode(t, http.StatusUnauthorized, "API_KEY_MISSING")
	if page := ask(half, "GET", dashboard.Root, "", "Cookie", "a"); page.StatusCode != http.StatusOK || !strings.Contains(page.body, created.ID) {
		t.Errorf("the dashboard behind forward_auth: %d %s", page.StatusCode, page.body)
	}

	// The dashboard is for the same people.
	if page := ask(people, "GET", dashboard.Root, "", "as", "ann"); page.StatusCode != http.StatusOK || !strings.Contains(page.body, created.ID) {
		t.Errorf("the dashboard: %d %s", page.StatusCode, page.body)
	}
	const form = "account=ann&name=Formed&environment=production&scope=memories%3Aread&expiry=90d&once=" + "0123456789abcdef"
	formed := ask(people, "POST", dashboard.Root+"/new", form, "as", "ann", "Content-Type", "application/x-www-form-urlencoded", "Sec-Fetch-Site", "same-origin")
	if formed.StatusCode != http.StatusCreated || !apikey.ContainsKey(formed.body) {
		t.Errorf("created by a form: %d", formed.StatusCode)
	}
	if page := ask(people, "GET", dashboard.Root, "", "as", "bob"); strings.Contains(page.body, "Formed") || strings.Contains(page.body, created.ID) {
		t.Error("the dashboard shows another account's keys")
	}
	if page := ask(people, "GET", dashboard.Root+"/"+created.ID, "", "as", "bob"); page.StatusCode != http.StatusNotFound {
		t.Errorf("another account's key: %d", page.StatusCode)
	}
	if answer := ask(people, "POST", dashboard.Root+"/new", form, "as", "ann", "Content-Type", "application/x-www-form-urlencoded", "Sec-Fetch-Site", "cross-site"); answer.StatusCode != http.StatusForbidden {
		t.Errorf("a form of another site: %d %s", answer.StatusCode, apikey.Redact(answer.body))
	}
	if page := ask(open, "GET", dashboard.Root, "", "X-Account", "ann"); page.StatusCode != http.StatusUnauthorized || strings.Contains(page.body, created.ID) {
		t.Errorf("nobody's dashboard: %d %s", page.StatusCode, page.body)
	}
	if page := ask(open, "GET", dashboard.Root, "", "X-Api-Key", manager.Key.Reveal()); page.StatusCode != http.StatusUnauthorized {
		t.Errorf("a key in a header opens the dashboard: %d", page.StatusCode)
	}

	audit := ask(people, "GET", one+"/audit", "", "as", "ann")
	if !strings.Contains(audit.body, `"actor":"user:carol","action":"key.revoked"`) {
		t.Errorf("audit %s", audit.body)
	}
	if apikey.ContainsKey(g.log.String()) {
		t.Error("a key stands in the log")
	}
}

func TestAnAccountMakesNoMoreKeysADayThanTheConfigurationLetsIt(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(strings.Replace(managedSite, "rekall_keys", "rekall_keys {\nkeys_per_day 2\n}", 1))
	manager := r.manager("acme")
	const body = `{"name": "n", "scopes": ["memories:read"]}`
	for range 2 {
		g.manage("POST", keysPath, bearer(manager), body, http.StatusCreated)
	}
	answer := g.manage("POST", keysPath, bearer(manager), body, http.StatusTooManyRequests)
	answer.wantCode(t, http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED")
	// Both keys are of this test, and the day of the first has just begun.
	if seconds, err := strconv.Atoi(answer.Header.Get("Retry-After")); err != nil || seconds <= 23*3600 || seconds > 24*3600 {
		t.Errorf("Retry-After %q", answer.Header.Get("Retry-After"))
	}
	g.manage("POST", keysPath+"/"+manager.ID+"/rotate", bearer(manager), "", http.StatusTooManyRequests)
	g.manage("POST", keysPath, bearer(r.manager("other")), body, http.StatusCreated)
	g.manage("DELETE", keysPath+"/"+manager.ID, bearer(manager), "", http.StatusOK) // who may make no more can still revoke
}

// A key that was found is reported to one edge and refused by all.
func TestReportedKeyIsRefusedByEveryEdgeAndStandsInNoLog(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	first, second := r.start(managedSite), r.start(managedSite)
	var secrets canaries
	existing, other := r.key("production", "memories:read"), apikey.Generate(apikey.Production)
	secrets.addKey("existing key", existing.Key.Reveal())
	secrets.addKey("other key", other)
	second.do("GET", "/v1/memories", bearer(existing)).wantCode(t, http.StatusOK, "")
	var answers []reply
	for _, key := range []string{existing.Key.Reveal(), other, existing.Key.Reveal()} {
		answers = append(answers, first.manage("POST", keysPath+"/leaked", http.Header{"X-Forwarded-For": {"198.51.100.7"}}, `{"keys": ["`+key+`"]}`, http.StatusAccepted))
	}
	for _, answer := range answers {
		if answer.body != answers[1].body {
			t.Errorf("%s tells a key from %s", answer.body, answers[1].body)
		}
	}
	for _, g := range []*gateway{first, second} {
		g.awaitRefusal(t, "/v1/memories", existing)
		g.do("GET", "/v1/memories", bearer(existing)).wantCode(t, http.StatusUnauthorized, "API_KEY_REVOKED")
	}
	entries, err := r.admin.Audit(t.Context(), keyadmin.Operator("test"), keyadmin.AuditRequest{Action: string(keyadmin.LeakReported)})
	if err != nil || len(entries.Entries) != 3 || entries.Entries[0].Actor != "leak:127.0.0.1" { // and not whom a client names
		t.Errorf("audit %+v, %v", entries, err)
	}
	// As bad as a report may be, and as often as it may come.
	for range 20 {
		_, err := send("POST", first.http+keysPath+"/leaked", http.Header{"Content-Type": {"application/json"}}, strings.NewReader(`{"keys": ["`+other+`"`))
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, g := range []*gateway{first, second} {
		secrets.want(t, "log", g.log.String())
	}
}

// Keys are checked as ever: nothing else tells of it.
func TestOutageOfTheManagingDatabaseIsToldOnceByTheLogAndByMetricsAndStatusAcrossReloads(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	manager := r.manager("acme")
	g := r.start(managedSite)
	const audit = keysPath + "/audit"
	g.manage("GET", audit, bearer(manager), "", http.StatusOK)
	pgtest.Exec(t, r.database, "alter table rekall.audit rename to away")
	for range 2 {
		g.manage("GET", audit, bearer(manager), "", http.StatusServiceUnavailable)
		g.manage("POST", keysPath+"/leaked", nil, `{"keys": ["`+apikey.Generate(apikey.Production)+`"]}`, http.StatusServiceUnavailable)
		g.reload()
	}
	logged := func(level, message string) (n int) {
		for line := range strings.Lines(g.log.String()) {
			if strings.Contains(line, `"level":"`+level+`"`) && strings.Contains(line, `"msg":"`+message+`"`) {
				n++
			}
		}
		return n
	}
	begun := func() int { return logged("error", "API keys cannot be managed") }
	over := func() int { return logged("info", "API keys can be managed again") }
	eventually.True(t, "the log tells", func() bool { return begun() > 0 })
	if n := g.series(t, "rekall_keys_errors_total"); n != 4 {
		t.Errorf("%v errors are counted, want 4", n)
	}
	if got := g.status().LastError; !strings.Contains(got, "rekall-gateway migrate") {
		t.Errorf("last error %q", got)
	}
	pgtest.Exec(t, r.database, "alter table rekall.away rename to audit")
	eventually.True(t, "the log tells that it is over", func() bool {
		g.manage("GET", audit, bearer(manager), "", http.StatusOK)
		return over() > 0
	})
	if begun() != 1 || over() != 1 {
		t.Errorf("its beginning is logged %d times, its end %d times", begun(), over())
	}
}

// Edges whose database user may not manage keys do so with another.
func TestManagementHasADatabaseUserOfItsOwn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	roles := keystore.Roles{Edge: pgtest.Role(t, r.database), Admin: pgtest.Role(t, r.database)}
	if _, stderr, code := cli(t, r.database, "migrate", "--edge-role", roles.Edge, "--admin-role", roles.Admin); code != 0 {
		t.Fatal(stderr)
	}
	manager := r.manager("acme")
	edge := pgtest.Login(t, r.database, roles.Edge)
	const body = `{"name": "a", "scopes": ["memories:read"]}`
	for _, tc := range []struct {
		site   string
		status int
	}{
		{managedSite, http.StatusServiceUnavailable},
		{strings.Replace(managedSite, "rekall_keys", "rekall_keys {\n\t\t\tdatabase {env.REKALL_MANAGEMENT_DATABASE_URL}\n\t\t}", 1), http.StatusCreated},
	} {
		g := r.prepare(tc.site)
		g.env = []string{"REKALL_MANAGEMENT_DATABASE_URL=" + pgtest.Login(t, r.database, roles.Admin)}
		g.run(edge)
		g.waitReady()
		answer := g.manage("POST", keysPath, bearer(manager), body, tc.status)
		if tc.status == http.StatusServiceUnavailable {
			answer.wantCode(t, tc.status, "SERVICE_UNAVAILABLE")
			eventually.True(t, "the log says why", func() bool { return strings.Contains(g.log.String(), "database user lacks a right") })
			continue
		}
		one := keysPath + "/" + answer.key(t).ID
		for _, request := range [][3]string{
			{"PATCH", one, `{"name": "b"}`}, {"GET", one + "/usage", ""}, {"GET", one + "/audit", ""}, {"GET", keysPath, ""}, {"POST", one + "/revoke", ""},
		} {
			g.manage(request[0], request[1], bearer(manager), request[2], http.StatusOK)
		}
		g.manage("POST", keysPath+"/leaked", nil, `{"keys": ["`+manager.Key.Reveal()+`"]}`, http.StatusAccepted)
	}
}

package keysapi_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keysapi"
)

const leaked = path + "/leaked"

func from(address string) http.Header { return http.Header{"X-Client": {address}} }

func keysBody(t *testing.T, keys ...string) string {
	t.Helper()
	text, err := json.Marshal(map[string][]string{"keys": keys})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func (r *rig) status(id string) keyadmin.Status {
	r.t.Helper()
	key, err := r.admin.Get(r.t.Context(), operator, id)
	if err != nil {
		r.t.Fatal(err)
	}
	return key.Status
}

// reports are the audit's lines of reports.
func (r *rig) reports() []keyadmin.AuditEntry {
	r.t.Helper()
	page, err := r.admin.Audit(r.t.Context(), operator, keyadmin.AuditRequest{Action: string(keyadmin.LeakReported)})
	if err != nil {
		r.t.Fatal(err)
	}
	return page.Entries
}

func TestReportedKeyIsRevokedAndTheAnswerDoesNotTellWhetherItExisted(t *testing.T) {
	r := newRig(t)
	first, second, other := r.manager("acme", "production"), r.manager("other", "sandbox"), r.manager("acme", "production")
	third, fourth := r.manager("acme", "production"), r.manager("acme", "sandbox")
	answers := map[string]reply{}
	for what, key := range map[string]string{
		"one that exists": first.Key.Reveal(), "one that does not": apikey.Generate(apikey.Production),
		"one of the sandbox": second.Key.Reveal(), "no key at all": "AKIA0123456789", "an empty text": "",
		"one that exists, with more": first.Key.Reveal() + "x", "an id": other.ID,
		"one and a line feed": third.Key.Reveal() + "\n", "a header": "Bearer " + fourth.Key.Reveal(),
	} {
		answers[what] = r.call("POST", leaked, from("192.0.2.1"), keysBody(t, key))
	}
	answers["one that was reported before"] = r.call("POST", leaked, from("192.0.2.1"), keysBody(t, first.Key.Reveal()))
	for _, answer := range answers {
		answer.Header.Del("Date")
		answer.Header.Del("X-Request-Id")
	}
	want := answers["one that does not"]
	for what, got := range answers {
		if got.StatusCode != http.StatusAccepted || got.body != `{"data":{"received":1}}`+"\n" || fmt.Sprint(got.Header) != fmt.Sprint(want.Header) {
			t.Errorf("%s: %d %q %v", what, got.StatusCode, got.body, got.Header)
		}
	}
	if a, b, c := r.status(first.ID), r.status(second.ID), r.status(other.ID); a != keyadmin.Revoked || b != keyadmin.Revoked || c != keyadmin.Active {
		t.Errorf("statuses %s, %s, %s", a, b, c)
	}
	if a, b := r.status(third.ID), r.status(fourth.ID); a != keyadmin.Revoked || b != keyadmin.Revoked {
		t.Errorf("keys with something around them are %s and %s", a, b)
	}
	owners, err := r.admin.Audit(t.Context(), keyadmin.Operator("test"), keyadmin.AuditRequest{KeyID: first.ID, Action: string(keyadmin.KeyRevoked)})
	if err != nil || len(owners.Entries) != 1 || owners.Entries[0].Actor != "leak:report" {
		t.Errorf("the owner is told of the finder: %+v, %v", owners, err)
	}
	entries := r.reports()
	if len(entries) != len(answers)-3 || entries[0].Actor != "leak:192.0.2.1" {
		t.Errorf("audit %+v", entries)
	}
	if text := fmt.Sprint(r.log, entries); apikey.ContainsKey(text) || !strings.Contains(text, "192.0.2.1") {
		t.Errorf("the log shows a key, or not who reported it: %s", text)
	}
}

func TestReportWithoutAnyKeyLeavesNoLineInTheAudit(t *testing.T) {
	r := newRig(t)
	answer := r.call("POST", leaked, from("192.0.2.1"), keysBody(t, "AKIA0123456789", "", "rk_short", strings.Repeat("a", 48)))
	if answer.StatusCode != http.StatusAccepted || answer.body != `{"data":{"received":4}}`+"\n" {
		t.Errorf("%d %s", answer.StatusCode, answer.body)
	}
	if entries := r.reports(); len(entries) != 0 {
		t.Errorf("audit %+v", entries)
	}
}

func TestReportOfManyKeysIsOneReport(t *testing.T) {
	r := newRig(t)
	key := r.manager("acme", "production")
	keys := make([]string, 999)
	for i := range keys {
		keys[i] = apikey.Generate(apikey.Sandbox)
	}
	answer := r.call("POST", leaked, from("192.0.2.1"), keysBody(t, append(keys, key.Key.Reveal())...))
	if answer.body != `{"data":{"received":1000}}`+"\n" || r.status(key.ID) != keyadmin.Revoked {
		t.Errorf("%d %s", answer.StatusCode, answer.body)
	}
}

func TestUnreadableReportIsRefusedAndNotAudited(t *testing.T) {
	r := newRig(t)
	key := r.manager("acme", "production")
	secret := key.Key.Reveal()
	for i, test := range []struct {
		body, want, field string
	}{
		{``, "422 VALIDATION_FAILED", "keys"},
		{`{}`, "422 VALIDATION_FAILED", "keys"},
		{`{"keys": []}`, "422 VALIDATION_FAILED", "keys"},
		{keysBody(t, make([]string, 1001)...), "422 VALIDATION_FAILED", "keys"},
		{`{"keys": "` + secret + `"}`, "400 INVALID_REQUEST", "keys"},
		{`{"keys": ["` + secret + `", 1]}`, "400 INVALID_REQUEST", "keys"},
		{`["` + secret + `"]`, "400 INVALID_REQUEST", ""},
		{secret, "400 INVALID_REQUEST", ""},
		{`{"keys": ["` + secret + `"]`, "400 INVALID_REQUEST", ""},
		{`{"keys": ["` + secret + `"], "` + secret + `": 1}`, "400 INVALID_REQUEST", "rk_…"},
		{`{"keys": ["` + strings.Repeat("a", 128<<10) + `"]}`, "413 BODY_TOO_LARGE", ""},
	} {
		status, code, _ := strings.Cut(test.want, " ")
		answer := r.bad("POST", leaked, from(fmt.Sprintf("192.0.2.%d", i)), test.body)
		if answer.Status[:3] != status {
			t.Errorf("%.60q: %d %s", test.body, answer.StatusCode, answer.body)
		}
		answer.refused(t, answer.StatusCode, code, test.field)
	}
	if entries := r.reports(); len(entries) != 0 || r.status(key.ID) != keyadmin.Active {
		t.Errorf("audit %+v", entries)
	}
	if apikey.ContainsKey(r.log.String()) {
		t.Errorf("the log shows a key: %s", r.log)
	}
}

// limited reports one that it was told to come back later.
func (r *rig) limited(address string) bool {
	r.t.Helper()
	answer := r.call("POST", leaked, from(address), keysBody(r.t, "x"))
	if answer.StatusCode == http.StatusAccepted {
		return false
	}
	answer.refused(r.t, http.StatusTooManyRequests, "RATE_LIMIT_EXCEEDED", "")
	if seconds, err := strconv.Atoi(answer.Header.Get("Retry-After")); err != nil || seconds < 1 || seconds > 60 {
		r.t.Errorf("Retry-After %q", answer.Header.Get("Retry-After"))
	}
	return true
}

func TestReportsAreLimitedByTheNetworkTheyComeFrom(t *testing.T) {
	r := newRig(t)
	accepted := 0
	for !r.limited("192.0.2.1") {
		if accepted++; accepted > 100 {
			t.Fatal("never limited")
		}
	}
	if accepted < 10 {
		t.Errorf("limited after %d reports", accepted)
	}
	if r.limited("192.0.2.2") || r.limited("2001:db8::1") || r.limited("") {
		t.Error("another address is limited too")
	}
	// The second time at the latest, since one more may be allowed by now.
	const mapped = "::ffff:192.0.2.1"
	if first := r.limited(mapped); !first && !r.limited(mapped) {
		t.Error("an IPv4 address got around its limit in the clothes of IPv6")
	}
	// A customer has 64 bits of addresses.
	for i := 0; !r.limited(fmt.Sprintf("2001:db8:0:1::%x", i)); i++ {
		if i > 100 {
			t.Fatal("never limited, by another address each time")
		}
	}
	if r.limited("2001:db8:0:2::1") {
		t.Error("another network is limited too")
	}
}

// TestAnAddressOverItsLimitTakesNothingOfTheLimitOfAll: else it could keep all others from reporting.
func TestAnAddressOverItsLimitTakesNothingOfTheLimitOfAll(t *testing.T) {
	r := newRig(t)
	refused := 0
	for range 400 { // more than all together may report
		if r.limited("192.0.2.1") {
			refused++
		}
	}
	if refused < 300 {
		t.Fatalf("%d reports were refused: the test shows nothing", refused)
	}
	if r.limited("192.0.2.2") {
		t.Error("another address is limited too")
	}
}

// TestReportsOfOneSiteLeaveRoomForThoseOfOthers: else a line at home would keep finders from reporting.
func TestReportsOfOneSiteLeaveRoomForThoseOfOthers(t *testing.T) {
	r := newRig(t)
	accepted := 0
	for i := range 1000 {
		if !r.limited(fmt.Sprintf("2001:db8:0:%x::1", i)) {
			accepted++
		}
	}
	if accepted < 30 || accepted > 200 {
		t.Errorf("%d reports of one site were accepted", accepted)
	}
	if r.limited("2001:db8:1::1") || r.limited("192.0.2.1") {
		t.Error("another site is limited too")
	}
}

func TestReportsOfAllNetworksTogetherAreLimited(t *testing.T) {
	r := newRig(t)
	var mu sync.Mutex
	refused := 0
	var senders sync.WaitGroup
	for sender := range 4 {
		senders.Go(func() {
			for i := range 1000 {
				answer := r.ask("POST", leaked, from(fmt.Sprintf("10.%d.%d.%d", sender, i/256, i%256)), keysBody(t, "x"))
				if answer.StatusCode == http.StatusTooManyRequests {
					mu.Lock()
					refused++
					mu.Unlock()
					return
				}
			}
		})
	}
	senders.Wait()
	if refused == 0 {
		t.Error("never limited")
	}
}

// gitHub publishes public keys as GitHub does, and signs.
type gitHub struct {
	t      *testing.T
	server *httptest.Server
	mu     sync.Mutex
	keys   map[string]*ecdsa.PrivateKey
	status int
	reads  int
}

func newGitHub(t *testing.T) *gitHub {
	t.Helper()
	g := &gitHub{t: t, keys: map[string]*ecdsa.PrivateKey{}, status: http.StatusOK}
	g.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.reads++
		w.WriteHeader(g.status)
		_, _ = w.Write(g.published())
	}))
	t.Cleanup(g.server.Close)
	return g
}

func (g *gitHub) published() []byte {
	type publicKey struct {
		Identifier string `json:"key_identifier"`
		Key        string `json:"key"`
		IsCurrent  bool   `json:"is_current"`
	}
	keys := []publicKey{{"old", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", false}}
	for identifier, key := range g.keys {
		der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			g.t.Error(err)
		}
		keys = append(keys, publicKey{identifier, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), true})
	}
	text, err := json.Marshal(map[string]any{"public_keys": keys})
	if err != nil {
		g.t.Error(err)
	}
	return text
}

// publish makes a key and publishes it.
func (g *gitHub) publish(identifier string, curve elliptic.Curve) *ecdsa.PrivateKey {
	g.t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		g.t.Fatal(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.keys[identifier] = key
	return key
}

func (g *gitHub) setStatus(status int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.status = status
}

func (g *gitHub) wantReads(want int) {
	g.t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.reads != want {
		g.t.Errorf("the keys were read %d times, want %d", g.reads, want)
	}
}

func signed(t *testing.T, identifier string, key *ecdsa.PrivateKey, body string) http.Header {
	t.Helper()
	digest := sha256.Sum256([]byte(body))
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return http.Header{
		"Github-Public-Key-Identifier": {identifier}, "Github-Public-Key-Signature": {base64.StdEncoding.EncodeToString(signature)},
	}
}

func matchOf(keys ...string) string {
	var matches []map[string]string
	for _, key := range keys {
		matches = append(matches, map[string]string{"token": key, "type": "rekall_api_key", "url": "https://github.com/a/b/blob/main/c", "source": "content"})
	}
	text, _ := json.Marshal(matches)
	return string(text)
}

func checker(t *testing.T, source string) *keysapi.GitHub {
	t.Helper()
	check, err := keysapi.NewGitHub(source)
	if err != nil {
		t.Fatal(err)
	}
	return check
}

func TestKeysThatGitHubReportsAreRevoked(t *testing.T) {
	hub := newGitHub(t)
	signer := hub.publish("current", elliptic.P256())
	file := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(file, hub.published(), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{hub.server.URL, file} {
		r := newRigOn(t, pgtest.URL(t), checker(t, source))
		key := r.manager("acme", "production")
		tokens := make([]string, 1100) // more than one transaction's worth
		for i := range tokens {
			tokens[i] = apikey.Generate(apikey.Production)
		}
		body := matchOf(append(tokens, key.Key.Reveal())...)
		answer := r.call("POST", leaked+"/github", signed(t, "current", signer, body), body)
		if answer.StatusCode != http.StatusAccepted || answer.body != `{"data":{"received":1101}}`+"\n" || r.status(key.ID) != keyadmin.Revoked {
			t.Errorf("%d %s", answer.StatusCode, answer.body)
		}
		if entries := r.reports(); len(entries) != 2 || entries[0].Actor != "leak:github" {
			t.Errorf("audit %+v", entries)
		}
		if apikey.ContainsKey(r.log.String()) {
			t.Error("the log shows a key")
		}
	}
}

func TestReportThatGitHubDidNotSignIsRefused(t *testing.T) {
	hub := newGitHub(t)
	signer, stranger := hub.publish("current", elliptic.P256()), hub.publish("other kind", elliptic.P384())
	r := newRigOn(t, pgtest.URL(t), checker(t, hub.server.URL))
	key := r.manager("acme", "production")
	body := matchOf(key.Key.Reveal())
	good := signed(t, "current", signer, body)
	for what, header := range map[string]http.Header{
		"no signature":          {},
		"another key":           signed(t, "current", stranger, body),
		"another body":          signed(t, "current", signer, body+" "),
		"a key of another kind": signed(t, "other kind", stranger, body),
		"an unreadable key":     signed(t, "old", signer, body),
		"an unknown key":        signed(t, "unknown", signer, body),
		"no identifier":         with(good, "Github-Public-Key-Identifier"),
		"two identifiers":       with(good, "Github-Public-Key-Identifier", "current", "current"),
		"two signatures":        with(good, "Github-Public-Key-Signature", good.Get("Github-Public-Key-Signature"), "x"),
		"no base64":             with(good, "Github-Public-Key-Signature", "%"),
		"no ASN.1":              with(good, "Github-Public-Key-Signature", "AAAA"),
		"an empty signature":    with(good, "Github-Public-Key-Signature", ""),
	} {
		answer := r.bad("POST", leaked+"/github", header, body)
		if answer.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %d %s", what, answer.StatusCode, answer.body)
			continue
		}
		answer.refused(t, http.StatusForbidden, "SIGNATURE_INVALID", "")
	}
	hub.wantReads(1) // though unknown keys were named
	for _, body := range []string{`{}`, `[{}]`, `[{"token": null}]`, `[{"token": 1}]`, `["x"]`, `[`, `null`} {
		answer := r.bad("POST", leaked+"/github", signed(t, "current", signer, body), body)
		if body == `null` {
			continue // no match, which is nothing to do
		}
		answer.refused(t, http.StatusBadRequest, "INVALID_REQUEST", "")
	}
	if r.status(key.ID) != keyadmin.Active || len(r.reports()) != 0 {
		t.Errorf("the key is %s, the audit has %+v", r.status(key.ID), r.reports())
	}
}

// waiting is the head of a report of that many bytes whose sender waits for the word to send them.
func waiting(path string, length int, header string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\nExpect: 100-continue\r\n%s\r\n",
		path, length, header)
}

const looksSigned = "Github-Public-Key-Identifier: current\r\nGithub-Public-Key-Signature: AAAA\r\n"

func TestReportWithoutASignatureIsRefusedUnread(t *testing.T) {
	hub := newGitHub(t)
	hub.publish("current", elliptic.P256())
	r := newRigOn(t, pgtest.URL(t), checker(t, hub.server.URL))
	for what, header := range map[string]string{
		"unknown identifier": "Github-Public-Key-Identifier: other\r\nGithub-Public-Key-Signature: AAAA\r\n",
		"no signature":       "",
		"no identifier":      "Github-Public-Key-Signature: AAAA\r\n",
		"no base64":          "Github-Public-Key-Identifier: current\r\nGithub-Public-Key-Signature: %\r\n",
		"another identifier": looksSigned + "Github-Public-Key-Identifier: other\r\n",
		"another signature":  looksSigned + "Github-Public-Key-Signature: BBBB\r\n",
	} {
		answer := raw(t, r.server.Listener.Addr().String(), waiting(leaked+"/github", 4<<20, header))
		if !strings.HasPrefix(answer, "HTTP/1.1 403 ") || !strings.Contains(answer, "SIGNATURE_INVALID") {
			t.Errorf("%s: %q", what, answer)
		}
	}
}

func TestLongReportsAreReadFewAtATimeAndShortOnesAtOnce(t *testing.T) {
	hub := newGitHub(t)
	signer := hub.publish("current", elliptic.P256())
	r := newRigOn(t, pgtest.URL(t), checker(t, hub.server.URL))
	send := func() (conn net.Conn, word <-chan string) {
		conn = begin(t, r.server.Listener.Addr().String(), waiting(leaked+"/github", 4<<20, looksSigned))
		first := make(chan string, 1)
		go func() {
			line, _ := bufio.NewReader(conn).ReadString('\n')
			first <- line
		}()
		return conn, first
	}
	var reading []net.Conn
	for range 4 {
		conn, word := send()
		if got := <-word; !strings.Contains(got, " 100 ") {
			t.Fatalf("a long report is answered %q", got)
		}
		reading = append(reading, conn)
	}
	_, word := send()
	body := matchOf("x")
	if answer := r.call("POST", leaked+"/github", signed(t, "current", signer, body), body); answer.StatusCode != http.StatusAccepted {
		t.Errorf("a short report: %d %s", answer.StatusCode, answer.body)
	}
	select {
	case got := <-word:
		for _, conn := range reading {
			if err := conn.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if n, _ := conn.Read(make([]byte, 1)); n > 0 {
				return // it took so long that a place is free
			}
		}
		t.Fatalf("one more is answered %q", got)
	default:
	}
	_ = reading[0].Close()
	if got := <-word; !strings.Contains(got, " 100 ") {
		t.Errorf("where there is room again: %q", got)
	}
}

// stalled is a body that does not come.
type stalled struct{ read, end chan struct{} }

func (s stalled) Read([]byte) (int, error) {
	s.read <- struct{}{}
	<-s.end
	return 0, io.ErrUnexpectedEOF
}

func TestLongReportsThatFindNoPlaceWriteNoErrorsIntoTheLog(t *testing.T) {
	hub := newGitHub(t)
	hub.publish("current", elliptic.P256())
	r := newRigOn(t, pgtest.URL(t), checker(t, hub.server.URL))
	send := func(ctx context.Context, body io.Reader) *httptest.ResponseRecorder {
		request := httptest.NewRequestWithContext(ctx, "POST", leaked+"/github", body)
		request.Header = http.Header{"Github-Public-Key-Identifier": {"current"}, "Github-Public-Key-Signature": {"AAAA"}}
		w := httptest.NewRecorder()
		r.server.Config.Handler.ServeHTTP(w, request)
		return w
	}
	reading := stalled{make(chan struct{}), make(chan struct{})}
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() { send(t.Context(), reading) })
		<-reading.read
	}
	late, cancelLate := context.WithDeadline(t.Context(), time.Now())
	defer cancelLate()
	if w := send(late, stalled{}); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "Too many long reports") {
		t.Errorf("one that has waited: %d %s", w.Code, w.Body)
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	send(gone, stalled{})
	close(reading.end)
	readers.Wait()
	if r.log.Len() > 0 {
		t.Errorf("the log says %s", r.log)
	}
}

func TestReportThatDoesNotComeIsNotWaitedFor(t *testing.T) {
	r := newRig(t)
	conn := begin(t, r.server.Listener.Addr().String(), waiting(leaked, 100, "")+`{"keys": [`)
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), " 400 ") || !strings.Contains(string(answer), "BODY_INVALID") {
		t.Errorf("%q, %v", answer, err)
	}
}

func TestGitHubsKeysAreReadAgainWhenTheyAreOldOrAnotherIsNamed(t *testing.T) {
	hub := newGitHub(t)
	first := hub.publish("first", elliptic.P256())
	check := checker(t, hub.server.URL)
	var clock struct {
		sync.Mutex
		now time.Time
	}
	clock.now = time.Now()
	check.SetClock(func() time.Time {
		clock.Lock()
		defer clock.Unlock()
		return clock.now
	})
	pass := func(d time.Duration) {
		clock.Lock()
		defer clock.Unlock()
		clock.now = clock.now.Add(d)
	}
	r := newRigOn(t, pgtest.URL(t), check)
	body := matchOf("x")
	want := func(identifier string, key *ecdsa.PrivateKey, status, reads int) {
		t.Helper()
		if answer := r.call("POST", leaked+"/github", signed(t, identifier, key, body), body); answer.StatusCode != status {
			t.Errorf("%s: %d %s, want %d", identifier, answer.StatusCode, answer.body, status)
		}
		hub.wantReads(reads)
	}
	hub.setStatus(http.StatusTooManyRequests)
	want("first", first, http.StatusServiceUnavailable, 1) // nobody can tell
	hub.setStatus(http.StatusOK)
	want("first", first, http.StatusServiceUnavailable, 1) // and nobody asks again at once
	pass(time.Minute)
	want("first", first, http.StatusAccepted, 2)
	want("first", first, http.StatusAccepted, 2)
	second := hub.publish("second", elliptic.P256())
	want("second", second, http.StatusForbidden, 2)
	pass(time.Minute)
	want("second", second, http.StatusAccepted, 3)
	pass(time.Hour)
	want("first", first, http.StatusAccepted, 4)
	hub.setStatus(http.StatusBadGateway)
	pass(time.Hour)
	want("first", first, http.StatusAccepted, 5) // an outage there is none here
	want("third", second, http.StatusServiceUnavailable, 5)
	pass(time.Minute)
	want("third", second, http.StatusServiceUnavailable, 6)
	if n := strings.Count(r.log.String(), "public keys of GitHub cannot be read"); n != 2 {
		t.Errorf("two outages, whatever is asked meanwhile, are logged %d times", n)
	}
	if n := strings.Count(r.log.String(), "public keys of GitHub are read again"); n != 1 {
		t.Errorf("the end of one is logged %d times", n)
	}
	if strings.Contains(r.log.String(), `"level":"error"`) {
		t.Errorf("strangers can fill the log: %s", r.log)
	}
}

// TestAStrangerWhoGoesAwayDoesNotSpoilTheReadOfGitHubsKeys: there is no other for a minute.
func TestAStrangerWhoGoesAwayDoesNotSpoilTheReadOfGitHubsKeys(t *testing.T) {
	hub := newGitHub(t)
	signer := hub.publish("current", elliptic.P256())
	r := newRigOn(t, pgtest.URL(t), checker(t, hub.server.URL))
	body := matchOf("x")
	gone, leave := context.WithCancel(t.Context())
	leave()
	request := httptest.NewRequestWithContext(gone, "POST", leaked+"/github", strings.NewReader(body))
	request.Header = http.Header{"Github-Public-Key-Identifier": {"current"}, "Github-Public-Key-Signature": {"AAAA"}}
	r.server.Config.Handler.ServeHTTP(httptest.NewRecorder(), request)
	hub.wantReads(1)
	if answer := r.call("POST", leaked+"/github", signed(t, "current", signer, body), body); answer.StatusCode != http.StatusAccepted {
		t.Errorf("GitHub is answered %d %s", answer.StatusCode, answer.body)
	}
	hub.wantReads(1)
}

func TestGitHubsKeysAreReadOnceForAllWhoAskAtOnce(t *testing.T) {
	hub := newGitHub(t)
	signer := hub.publish("current", elliptic.P256())
	r := newRigOn(t, pgtest.URL(t), checker(t, hub.server.URL))
	body := matchOf("x")
	header := signed(t, "current", signer, body)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if answer := r.ask("POST", leaked+"/github", header, body); answer.StatusCode != http.StatusAccepted {
				t.Errorf("%d %s", answer.StatusCode, answer.body)
			}
		})
	}
	all.Wait()
	hub.wantReads(1)
}

func TestGitHubsKeysAreReadFromNowhereElseThanIsConfigured(t *testing.T) {
	hub := newGitHub(t)
	signer := hub.publish("current", elliptic.P256())
	elsewhere := httptest.NewServer(http.RedirectHandler(hub.server.URL, http.StatusFound))
	t.Cleanup(elsewhere.Close)
	r := newRigOn(t, pgtest.URL(t), checker(t, elsewhere.URL))
	body := matchOf("x")
	r.call("POST", leaked+"/github", signed(t, "current", signer, body), body).refused(t, http.StatusServiceUnavailable, "SERVICE_UNAVAILABLE", "")
	hub.wantReads(0)
}

// The key that GitHub publishes for the example in its documentation.
const (
	exampleIdentifier = "bcb53661c06b4728e59d897fb6165d5c9cda0fd9cdf9d09ead458168deb7518c"
	exampleKeys       = `{"public_keys": [{"key_identifier": "` + exampleIdentifier + `", "is_current": true, "key":
		"-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEYAGMWO8XgCamYKMJS6jc/qgvSlAd\nAjPuDPRcXU22YxgBrz+zoN19MzuRyW87qEt9/AmtoNP5GrobzUvQSyJFVw==\n-----END PUBLIC KEY-----\n"}]}`
)

// The example of GitHub's documentation of the partner programme.
func TestExampleOfGitHubsDocumentationIsAccepted(t *testing.T) {
	const (
		body      = `[{"source":"commit","token":"some_token","type":"some_type","url":"https://example.com/base-repo-url/"}]`
		signature = "MEQCIQDaMKqrGnE27S0kgMrEK0eYBmyG0LeZismAEz/BgZyt7AIfXt9fErtRS4XaeSt/AO1RtBY66YcAdjxji410VQV4xg=="
	)
	file := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(file, []byte(exampleKeys), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRigOn(t, pgtest.URL(t), checker(t, file))
	answer := r.call("POST", leaked+"/github", http.Header{"Github-Public-Key-Identifier": {exampleIdentifier}, "Github-Public-Key-Signature": {signature}}, body)
	if answer.StatusCode != http.StatusAccepted {
		t.Errorf("%d %s", answer.StatusCode, answer.body)
	}
}

func TestGitHubsKeysComeFromHTTPSOrAFileWithKeysOnly(t *testing.T) {
	dir := t.TempDir()
	file, empty := filepath.Join(dir, "keys.json"), filepath.Join(dir, "empty.json")
	for path, text := range map[string]string{file: exampleKeys, empty: `{"public_keys": []}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for source, good := range map[string]bool{
		keysapi.GitHubKeys: true, file: true, empty: false, filepath.Join(dir, "typo.json"): false, "http://127.0.0.1:1/k": true, "http://localhost/k": true, "http://[::1]:1/k": true,
		"http://api.github.com/k": false, "http://127.0.0.1.example/k": false, "ftp://a/b": false, "": false, "https://": false, "https:///k": false,
	} {
		if _, err := keysapi.NewGitHub(source); (err == nil) != good {
			t.Errorf("%q: %v", source, err)
		}
	}
}

package keysapi_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

const path = "/v1/api-keys"

func TestKeyIsCreatedShownOnceRenamedRotatedAndRevoked(t *testing.T) {
	r := newRig(t)
	ann := person("ann@acme")
	answer := r.call("POST", path, ann,
		`{"name": "Production Backend", "scopes": ["memories:read", "memories:write"], "environment": "production", "expires_in": "90d"}`)
	created := answer.object(t, http.StatusCreated)
	if !apikey.ChecksumValid(created.Key.Key.Reveal()) || created.Account != "acme" || *created.CreatedBy != "user:ann" ||
		created.ExpiresAt.Sub(created.CreatedAt) != 90*24*time.Hour || answer.Header.Get("Location") != path+"/"+created.ID {
		t.Errorf("created %s at %s", answer.body, answer.Header.Get("Location"))
	}
	one := path + "/" + created.ID
	if got := r.call("GET", one, ann, "").object(t, http.StatusOK); got.Key.Key != "" || got.Name != "Production Backend" || got.Status != keyadmin.Active {
		t.Errorf("got %+v", got)
	}
	if got := r.call("PATCH", one, ann, `{"name": "Backend"}`).object(t, http.StatusOK); got.Name != "Backend" {
		t.Errorf("renamed %+v", got)
	}
	successor := r.call("POST", one+"/rotate", ann, `{"overlap": "24h"}`).object(t, http.StatusCreated)
	if *successor.Predecessor != created.ID || successor.Name != "Backend" || !slices.Equal(successor.Scopes, created.Scopes) ||
		!apikey.ChecksumValid(successor.Key.Key.Reveal()) || successor.Key.Key == created.Key.Key {
		t.Errorf("successor %+v", successor)
	}
	if old := r.call("GET", one, ann, "").object(t, http.StatusOK); *old.Successor != successor.ID || old.ExpiresAt.After(time.Now().Add(25*time.Hour)) {
		t.Errorf("old key %+v", old)
	}
	r.call("POST", one+"/rotate", ann, "").refused(t, http.StatusConflict, "KEY_ALREADY_ROTATED", "")
	if old := r.call("POST", one+"/rotate/undo", ann, "").object(t, http.StatusOK); old.Successor != nil || !old.ExpiresAt.Equal(*created.ExpiresAt) {
		t.Errorf("after the undoing %+v", old)
	}
	r.call("POST", one+"/rotate/undo", ann, "{}").refused(t, http.StatusConflict, "KEY_NOT_ROTATED", "")
	first := r.call("POST", one+"/revoke", ann, "").object(t, http.StatusOK)
	for _, again := range []reply{r.call("POST", one+"/revoke", ann, "{}"), r.call("DELETE", one, ann, "")} {
		if got := again.object(t, http.StatusOK); got.Status != keyadmin.Revoked || !got.RevokedAt.Equal(*first.RevokedAt) || got.RevokedSelf {
			t.Errorf("revoked again: %s", again.body)
		}
	}
	r.call("POST", one+"/rotate", ann, `{"overlap": "0"}`).refused(t, http.StatusConflict, "KEY_ENDED", "")
	for _, answer := range []reply{r.call("GET", path, ann, ""), r.call("GET", one+"/audit", ann, ""), r.call("GET", path+"/audit", ann, "")} {
		if apikey.ContainsKey(answer.body) {
			t.Errorf("a key is shown again: %s", answer.body)
		}
	}
}

// TestTextsAreWrittenAsTheyAre: to a browser no answer is a page, as the rig checks of each.
func TestTextsAreWrittenAsTheyAre(t *testing.T) {
	r := newRig(t)
	ann := person("ann@acme")
	key := r.call("POST", path, ann, `{"name": "A <b> & c", "scopes": ["hives:read"], "environment": "sandbox"}`)
	id := key.object(t, http.StatusCreated).ID
	for _, answer := range []reply{
		key, r.call("GET", path, ann, ""), r.call("GET", path+"/"+id, ann, ""), r.call("GET", path+"/audit", ann, ""),
		r.bad("PATCH", path+"/"+id, ann, `{"A <b> & c": ""}`), r.bad("GET", path+"?"+url.QueryEscape("A <b> & c")+"=1", ann, ""),
	} {
		if !strings.Contains(answer.body, "A <b> & c") || answer.Header.Get("Content-Type") != "application/json" ||
			answer.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%v %s", answer.Header, answer.body)
		}
	}
}

func TestOnFirstUseIsAnOverlap(t *testing.T) {
	r := newRig(t)
	manager := r.manager("acme", "sandbox")
	key := r.call("POST", path, by(manager), `{"name": "a", "scopes": ["memories:read"]}`).object(t, http.StatusCreated)
	successor := r.call("POST", path+"/"+key.ID+"/rotate", by(manager), `{"overlap": "on-first-use"}`).object(t, http.StatusCreated)
	if successor.OverlapOnFirstUse == nil || *successor.OverlapOnFirstUse != "1d" {
		t.Errorf("successor %+v", successor)
	}
	r.call("POST", path+"/"+successor.ID+"/rotate", by(manager), "").refused(t, http.StatusConflict, "KEY_AWAITED", "")
}

func TestWithoutEnvironmentTheKeyIsOfItsCreators(t *testing.T) {
	r := newRig(t)
	for _, environment := range []string{"production", "sandbox"} {
		manager := r.manager("acme", environment)
		if got := r.call("POST", path, by(manager), `{"name": "a", "scopes": ["hives:read"]}`).object(t, http.StatusCreated); got.Environment != environment {
			t.Errorf("got %s, want %s", got.Environment, environment)
		}
	}
	r.call("POST", path, person("ann@acme"), `{"name": "a", "scopes": ["hives:read"]}`).refused(t, 422, "VALIDATION_FAILED", "environment")
}

func TestTheSDKsSpellingsMeanTheSame(t *testing.T) {
	r := newRig(t)
	manager := by(r.manager("acme", "sandbox"))
	day := time.Now().Add(48 * time.Hour).UTC().Truncate(time.Second)
	for body, lifetime := range map[string]time.Duration{
		`{"name": "a", "scopes": ["hives:read"], "expiresIn": "90d"}`:                                     90 * 24 * time.Hour,
		`{"name": "a", "scopes": ["hives:read"], "expires_in": "P2W"}`:                                    14 * 24 * time.Hour,
		`{"name": "a", "scopes": ["hives:read"], "expiresIn": "12h", "expires_in": "12h"}`:                12 * time.Hour,
		`{"name": "a", "scopes": ["hives:read"], "expiresIn": null, "expires_at": null}`:                  0,
		`{"name": "a", "scopes": ["hives:read"], "manageKeys": true, "environment": null}`:                0,
		fmt.Sprintf(`{"name": "a", "scopes": ["hives:read"], "expiresAt": %q}`, day.Format(time.RFC3339)): -1,
	} {
		got := r.call("POST", path, manager, body).object(t, http.StatusCreated)
		switch {
		case lifetime == 0 && got.ExpiresAt == nil, lifetime == -1 && got.ExpiresAt.Equal(day), lifetime > 0 && got.ExpiresAt.Sub(got.CreatedAt) == lifetime:
		default:
			t.Errorf("%s made %+v", body, got)
		}
		if got.ManageKeys != strings.Contains(body, "manageKeys") {
			t.Errorf("%s: manage_keys %v", body, got.ManageKeys)
		}
	}
}

func TestRetryWithAnIdempotencyKeyMakesNoSecondKeyAndSaysSo(t *testing.T) {
	r := newRig(t)
	manager := by(r.manager("acme", "sandbox"))
	once := with(manager, "Idempotency-Key", "retry-1")
	const body = `{"name": "a", "scopes": ["hives:read"]}`
	created := r.call("POST", path, once, body).object(t, http.StatusCreated)
	answer := r.call("POST", path, once, body)
	if got := answer.object(t, http.StatusOK); got.ID != created.ID || got.Key.Key != "" || !got.Replayed || answer.Header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("replayed %s", answer.body)
	}
	r.call("POST", path, once, `{"name": "b", "scopes": ["hives:read"]}`).refused(t, 409, "IDEMPOTENCY_MISMATCH", "")
	if other := r.call("POST", path, with(manager, "Idempotency-Key", "retry-2"), body).object(t, http.StatusCreated); other.ID == created.ID {
		t.Error("another Idempotency-Key made no other key")
	}
	// A key that is made by the same request of somebody else is somebody else's.
	bob := r.call("POST", path, with(by(r.manager("acme", "sandbox")), "Idempotency-Key", "retry-1"), body).object(t, http.StatusCreated)
	if bob.ID == created.ID {
		t.Error("another's Idempotency-Key answered this one's key")
	}
	if total := *r.call("GET", path, manager, "").keys(t).Pagination.TotalCount; total != 5 {
		t.Errorf("%d keys", total)
	}
}

func TestRetryOfARotationWithAnIdempotencyKeyMakesNoSecondSuccessorAndSaysSo(t *testing.T) {
	r := newRig(t)
	manager := by(r.manager("acme", "sandbox"))
	create := func() string {
		return path + "/" + r.call("POST", path, manager, `{"name": "a", "scopes": ["hives:read"]}`).object(t, http.StatusCreated).ID
	}
	one, other := create(), create()
	once := with(manager, "Idempotency-Key", "rotate-1")
	successor := r.call("POST", one+"/rotate", once, `{"overlap": "0"}`).object(t, http.StatusCreated)
	for _, body := range []string{`{"overlap": "0"}`, `{"overlap": "0s"}`} { // the same, though the old key has ended
		answer := r.call("POST", one+"/rotate", once, body)
		if got := answer.object(t, http.StatusOK); got.ID != successor.ID || got.Key.Key != "" || !got.Replayed || answer.Header.Get("Idempotent-Replayed") != "true" ||
			answer.Header.Get("Location") != "" || apikey.ContainsKey(answer.body) {
			t.Errorf("replayed %s", answer.body)
		}
	}
	const mismatch = "IDEMPOTENCY_MISMATCH"
	r.call("POST", one+"/rotate", once, `{"overlap": "1h"}`).refused(t, 409, mismatch, "")
	r.call("POST", other+"/rotate", once, `{"overlap": "0"}`).refused(t, 409, mismatch, "")
	r.call("POST", path, once, `{"name": "a", "scopes": ["hives:read"]}`).refused(t, 409, mismatch, "")
	r.call("POST", one+"/rotate", with(manager, "Idempotency-Key", "rotate-2"), `{"overlap": "0"}`).refused(t, 409, "KEY_ENDED", "")
	r.call("POST", one+"/rotate", manager, `{"overlap": "0"}`).refused(t, 409, "KEY_ENDED", "")
	// What somebody else sends with it is their own request.
	stranger := by(r.manager("other", "sandbox"))
	r.call("POST", one+"/rotate", with(stranger, "Idempotency-Key", "rotate-1"), `{"overlap": "0"}`).refused(t, 404, "NOT_FOUND", "")
	if total := *r.call("GET", path, manager, "").keys(t).Pagination.TotalCount; total != 4 {
		t.Errorf("%d keys", total)
	}
	if audit := r.call("GET", one+"/audit?action=key.rotated", manager, "").audit(t); len(audit.Data) != 1 {
		t.Errorf("audit %+v", audit.Data)
	}
}

func TestListPagesAndFilters(t *testing.T) {
	r := newRig(t)
	ann := person("ann@acme")
	var want []string
	for i := range 5 {
		environment := []string{"production", "sandbox"}[i%2]
		key := r.call("POST", path, ann, fmt.Sprintf(`{"name": "Key %d", "scopes": ["hives:read"], "environment": %q}`, i, environment)).object(t, http.StatusCreated)
		want = append([]string{key.ID}, want...)
	}
	r.call("POST", path, person("bob@other"), `{"name": "Key", "scopes": ["hives:read"], "environment": "sandbox"}`).object(t, http.StatusCreated)
	r.call("DELETE", path+"/"+want[0], ann, "").object(t, http.StatusOK)
	var got []string
	for query := "?limit=2"; ; {
		page := r.call("GET", path+query, ann, "").keys(t)
		for _, key := range page.Data {
			got = append(got, key.ID)
		}
		if *page.Pagination.TotalCount != 5 || page.Pagination.HasMore != (page.Pagination.NextCursor != nil) {
			t.Errorf("pagination %+v", page.Pagination)
		}
		if !page.Pagination.HasMore {
			break
		}
		query = "?limit=2&cursor=" + *page.Pagination.NextCursor
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for query, count := range map[string]int{
		"environment=sandbox": 2, "status=revoked": 1, "status=active": 4, "status=expired": 0, "status=expiring": 0, "name=key": 5, "name=KEY+3": 1,
		"environment=production&status=active": 2,
	} {
		if page := r.call("GET", path+"?"+query, ann, "").keys(t); len(page.Data) != count || *page.Pagination.TotalCount != count {
			t.Errorf("%s: %d keys of %d, want %d", query, len(page.Data), *page.Pagination.TotalCount, count)
		}
	}
	if answer := r.call("HEAD", path, ann, ""); answer.StatusCode != http.StatusOK || answer.body != "" || answer.Header.Get("Content-Length") == "0" {
		t.Errorf("HEAD: %d %q %v", answer.StatusCode, answer.body, answer.Header)
	}
}

func TestRevokingTheKeyThatAsksIsAllowedAndSaid(t *testing.T) {
	r := newRig(t)
	manager := r.manager("acme", "production")
	answer := r.call("POST", path+"/"+manager.ID+"/revoke", by(manager), "")
	if got := answer.object(t, http.StatusOK); !got.RevokedSelf || got.Status != keyadmin.Revoked {
		t.Errorf("revoked %s", answer.body)
	}
	r.call("GET", path, by(manager), "").refused(t, http.StatusUnauthorized, "API_KEY_INVALID", "")
}

func TestAuditSaysWhoDidWhat(t *testing.T) {
	r := newRig(t)
	ann := person("ann@acme")
	key := r.call("POST", path, ann, `{"name": "a", "scopes": ["hives:read"], "environment": "sandbox"}`).object(t, http.StatusCreated)
	one := path + "/" + key.ID
	r.call("PATCH", one, ann, `{"name": "b"}`).object(t, http.StatusOK)
	r.call("DELETE", one, person("bob@acme"), "").object(t, http.StatusOK)
	r.call("POST", path, person("eve@other"), `{"name": "e", "scopes": ["hives:read"], "environment": "sandbox"}`).object(t, http.StatusCreated)
	const want = "user:bob key.revoked, user:ann key.renamed, user:ann key.created"
	for _, at := range []string{one + "/audit", path + "/audit"} {
		var lines []string
		for query := "?limit=2"; ; {
			page := r.call("GET", at+query, ann, "").audit(t)
			for _, entry := range page.Data {
				lines = append(lines, entry.Actor+" "+string(entry.Action))
			}
			if !page.Pagination.HasMore {
				break
			}
			query = "?limit=2&cursor=" + *page.Pagination.NextCursor
		}
		if got := strings.Join(lines, ", "); got != want {
			t.Errorf("%s: %s", at, got)
		}
	}
	for query, count := range map[string]int{"actor=user:ann": 2, "action=key.revoked": 1, "until=2000-01-01T00:00:00Z": 0, "since=2000-01-01T00:00:00Z": 3} {
		if page := r.call("GET", path+"/audit?"+query, ann, "").audit(t); len(page.Data) != count {
			t.Errorf("%s: %d entries, want %d", query, len(page.Data), count)
		}
	}
}

func TestUsageIsShownByHourAndDay(t *testing.T) {
	r := newRig(t)
	ann := person("ann@acme")
	key := r.call("POST", path, ann, `{"name": "a", "scopes": ["hives:read"], "environment": "sandbox"}`).object(t, http.StatusCreated)
	at := path + "/" + key.ID + "/usage"
	var empty, used struct {
		Data keyadmin.Usage `json:"data"`
	}
	r.call("GET", at, ann, "").decode(t, http.StatusOK, &empty)
	if empty.Data.ID != key.ID || empty.Data.Total.Allowed != 0 || empty.Data.Hourly == nil || empty.Data.LastUsedAt != nil {
		t.Errorf("unused: %+v", empty.Data)
	}
	pgtest.Exec(t, r.database, `insert into rekall.usage (key_id, hour, outcome, count) values
		($1, date_trunc('hour', now()), 'allowed', 2), ($1, date_trunc('hour', now()), 'scope_insufficient', 1)`, key.ID)
	pgtest.Exec(t, r.database, `insert into rekall.spikes (key_id, hour, threshold) values ($1, date_trunc('hour', now()), 2)`, key.ID)
	pgtest.Exec(t, r.database, `insert into rekall.last_used values ($1, now(), now())`, key.ID)
	r.call("GET", at+"?from=2020-01-01T00:00:00Z&to=2020-02-01T00:00:00Z", ann, "").decode(t, http.StatusOK, &empty)
	r.call("GET", at, ann, "").decode(t, http.StatusOK, &used)
	r.call("GET", at+"?from=9999-12-31T20:00:00Z&to=9999-12-31T23:59:59-23:59", ann, "").refused(t, 422, "VALIDATION_FAILED", "from") // the year 10000, by their offset
	if u := used.Data; u.Total.Allowed != 2 || u.Total.DeniedByReason["scope_insufficient"] != 1 || len(u.Hourly) != 1 || !u.Hourly[0].Spike || len(u.Daily) != 1 || u.LastUsedAt == nil {
		t.Errorf("used: %+v", u)
	}
	if empty.Data.Total.Allowed != 0 {
		t.Errorf("used before it was made: %+v", empty.Data)
	}
}

func TestDescriptionHasEveryPathAndMethod(t *testing.T) {
	r := newRig(t)
	answer := r.call("GET", path+"/openapi.json", nil, "")
	if answer.StatusCode != http.StatusOK || answer.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%d %s", answer.StatusCode, answer.body)
	}
	var document struct {
		Paths map[string]map[string]any `json:"paths"`
	}
	answer.decode(t, http.StatusOK, &document)
	for at, operations := range document.Paths {
		at = strings.ReplaceAll(at, "{id}", "key_0123456789abcdefABCDEF")
		allow := r.bad("OPTIONS", at, nil, "").Header.Get("Allow")
		if at == path+"/leaked/github" { // not there unless the operator takes part
			continue
		}
		var want []string
		for method := range operations {
			switch method {
			case "get":
				want = append(want, "GET", "HEAD")
			case "parameters":
			default:
				want = append(want, strings.ToUpper(method))
			}
		}
		slices.Sort(want)
		if allow != strings.Join(want, ", ") {
			t.Errorf("%s: allows %q, the document %v", at, allow, want)
		}
	}
	if len(document.Paths) != 11 {
		t.Errorf("%d paths", len(document.Paths))
	}
}

func TestDocumentSaysWhichIdempotencyKeysAreTaken(t *testing.T) {
	r := newRig(t)
	manager := by(r.manager("acme", "sandbox"))
	document := openAPI(t)
	schema := document.Components.Parameters["IdempotencyKey"].Value.Schema.Value
	for key, status := range map[string]int{
		"!": 201, "~": 201, "a-1": 201, strings.Repeat("a", 255): 201, "a b": 422, "a\tb": 422, "ü": 422, strings.Repeat("a", 256): 422,
	} {
		answer := r.bad("POST", path, with(manager, "Idempotency-Key", key), `{"name": "a", "scopes": ["hives:read"]}`)
		if err := schema.VisitJSON(key); answer.StatusCode != status || (err == nil) != (status == 201) {
			t.Errorf("%q: %d, want %d, and by the document %v", key, answer.StatusCode, status, err)
		}
	}
}

// TestKeyWithMoreScopesThanTheOneThatAsksIsNotRotatedAndTheyAreNamed: a request to rotate has no field scopes that could be changed.
func TestKeyWithMoreScopesThanTheOneThatAsksIsNotRotatedAndTheyAreNamed(t *testing.T) {
	r := newRig(t)
	narrow := by(r.manager("acme", "production", "memories:read"))
	wide := r.manager("acme", "production", "memories:read", "memories:write", "hives:read")
	answer := r.call("POST", path+"/"+wide.ID+"/rotate", narrow, "")
	answer.refused(t, 403, "PERMISSION_DENIED", "")
	const want = "The key has scopes that yours does not have (memories:write hives:read), so you cannot be handed its successor."
	if !strings.Contains(answer.body, want) {
		t.Errorf("answer %s", answer.body)
	}
	r.call("POST", path, narrow, `{"name": "a", "scopes": ["hives:read"]}`).refused(t, 403, "PERMISSION_DENIED", "scopes")
	reader := r.call("POST", path, narrow, `{"name": "a", "scopes": ["memories:read"]}`)
	answer = r.call("GET", path, http.Header{"Authorization": {"Bearer " + reader.object(t, http.StatusCreated).Key.Key.Reveal()}}, "")
	answer.refused(t, 403, "PERMISSION_DENIED", "")
	if !strings.Contains(answer.body, "This API key may not manage keys: use one made with manage_keys.") {
		t.Errorf("answer to no manager %s", answer.body)
	}
}

func TestDocumentHasEveryActionAndActorOfTheAudit(t *testing.T) {
	r := newRig(t)
	ann := person("ann@acme")
	document := openAPI(t)
	var documented []string
	for _, action := range document.Components.Schemas["Action"].Value.Enum {
		documented = append(documented, action.(string))
	}
	var invalid *keyadmin.InvalidError
	if _, err := r.admin.Audit(t.Context(), operator, keyadmin.AuditRequest{Action: "unknown"}); !errors.As(err, &invalid) {
		t.Fatal(err)
	}
	if known := strings.Split(strings.TrimPrefix(invalid.Reason, "must be one of "), ", "); !slices.Equal(known, documented) {
		t.Errorf("the document has %v, the audit %v", documented, known)
	}
	perMinute := 100
	if _, err := r.admin.SetAccountLimits(t.Context(), operator, "acme", "", keyadmin.LimitsChange{PerMinute: &perMinute}); err != nil {
		t.Fatal(err)
	}
	if entries := r.call("GET", path+"/audit", ann, "").audit(t).Data; len(entries) != 1 || entries[0].Action != keyadmin.AccountLimitsChanged {
		t.Errorf("audit %+v", entries)
	}
	for _, kind := range []string{"user", "system"} {
		if entries := r.call("GET", path+"/audit?actor="+kind+":"+strings.Repeat("a", 200), ann, "").audit(t).Data; len(entries) != 0 {
			t.Errorf("audit %+v", entries)
		}
	}
}

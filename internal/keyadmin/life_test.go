package keyadmin_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func TestSameIdempotencyKeyMakesOneKey(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	r := request()
	r.IdempotencyKey = "deploy-42"
	var wg sync.WaitGroup
	var mu sync.Mutex
	ids, secrets := map[string]int{}, 0
	for range 8 {
		wg.Go(func() {
			key, replayed, err := admin.Create(t.Context(), operator, r)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || replayed != (key.Key == "") {
				t.Errorf("replayed %v, %+v, %v", replayed, key, err)
			}
			ids[key.ID]++
			if key.Key != "" {
				secrets++
			}
		})
	}
	wg.Wait()
	if len(ids) != 1 || secrets != 1 {
		t.Errorf("%d keys, shown %d times", len(ids), secrets)
	}
	same := r
	same.Scopes = []string{"memories:read", "memories:write"} // another order of the same
	if _, replayed, err := admin.Create(t.Context(), operator, same); err != nil || !replayed {
		t.Errorf("the same scopes: %v, %v", replayed, err)
	}
	other := r
	other.Name = "Other"
	if key, _, err := admin.Create(t.Context(), operator, other); !errors.Is(err, keyadmin.ErrIdempotencyMismatch) || key.ID != "" {
		t.Errorf("another request: %+v, %v", key, err)
	}
	if _, replayed, err := admin.Create(t.Context(), keyadmin.Operator("other"), r); err != nil || replayed {
		t.Errorf("another actor: %v, %v", replayed, err)
	}
	age := func(by string) {
		t.Helper()
		pgtest.Exec(t, databaseURL, "update rekall.idempotency_keys set created_at = now() - interval '"+by+"'")
		another := r
		another.IdempotencyKey += by // which makes room for itself
		if _, _, err := admin.Create(t.Context(), operator, another); err != nil {
			t.Fatal(err)
		}
	}
	age("23:59")
	if key, replayed, err := admin.Create(t.Context(), operator, r); err != nil || !replayed || ids[key.ID] == 0 {
		t.Errorf("almost a day later: %v, %v", replayed, err)
	}
	age("24:01")
	if key, replayed, err := admin.Create(t.Context(), operator, r); err != nil || replayed || ids[key.ID] > 0 {
		t.Errorf("a day later: %v, %v", replayed, err)
	}
}

func TestRefusedRequestDoesNotUseUpItsIdempotencyKey(t *testing.T) {
	admin, _, _ := newAdmin(t)
	r := request()
	r.IdempotencyKey, r.ExpiresIn, r.ExpiresAt = "deploy-43", "", "2001-01-01T00:00:00Z"
	if _, _, err := admin.Create(t.Context(), operator, r); err == nil {
		t.Fatal("an expiry in the past was accepted")
	}
	r.ExpiresAt = ""
	if _, replayed, err := admin.Create(t.Context(), operator, r); err != nil || replayed {
		t.Errorf("%v, %v", replayed, err)
	}
}

func TestIdempotencyKeyThatIsNoneIsRefused(t *testing.T) {
	admin, _, _ := newAdmin(t)
	old := create(t, admin, request())
	for _, key := range []string{strings.Repeat("x", 256), "a b", "a\n", "d\u00e9ploiement", apikey.Generate(apikey.Production)} {
		r := request()
		r.IdempotencyKey = key
		_, _, created := admin.Create(t.Context(), operator, r)
		_, _, rotated := admin.Rotate(t.Context(), operator, old.ID, keyadmin.RotateRequest{IdempotencyKey: key})
		for _, err := range []error{created, rotated} {
			var invalid *keyadmin.InvalidError
			if !errors.As(err, &invalid) || invalid.Field != "Idempotency-Key" {
				t.Errorf("%d characters: %v", len(key), err)
			}
		}
	}
	r := request()
	r.IdempotencyKey = strings.Repeat("~", 255)
	create(t, admin, r)
}

// TestKeyThatIsRevokedIsNotExpiring: nobody has to do anything about it.
func TestKeyThatIsRevokedIsNotExpiring(t *testing.T) {
	admin, _, _ := newAdmin(t)
	r := request()
	r.ExpiresIn, r.ExpiresAt = "1h", ""
	key := create(t, admin, r)
	if !key.Expiring {
		t.Error("a key that ends within the hour is not expiring")
	}
	if _, err := admin.Revoke(t.Context(), operator, key.ID); err != nil {
		t.Fatal(err)
	}
	if get(t, admin, key.ID).Expiring {
		t.Error("it is revoked, and expiring")
	}
}

// TestOperatorWithALongNameIsTold: the audit takes 200 characters.
func TestOperatorWithALongNameIsTold(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key, _, err := admin.Create(t.Context(), keyadmin.Operator(strings.Repeat("\u00f6", 300)), request())
	if err != nil {
		t.Fatal(err)
	}
	if want := "cli:" + strings.Repeat("\u00f6", 200); key.CreatedBy == nil || *key.CreatedBy != want {
		t.Errorf("created by %v, want %s", key.CreatedBy, want)
	}
}

func TestExpiryIsAMomentOrADuration(t *testing.T) {
	admin, _, _ := newAdmin(t)
	r := request()
	r.ExpiresIn, r.ExpiresAt = "", time.Now().Add(time.Hour).Format(time.RFC3339)
	if key := create(t, admin, r); key.ExpiresAt.Format(time.RFC3339) != mustUTC(t, r.ExpiresAt) {
		t.Errorf("expires at %v, want %s", key.ExpiresAt, r.ExpiresAt)
	}
	for _, test := range []struct{ in, at, field string }{
		{"90d", r.ExpiresAt, "expires_at"}, {"", "2001-01-01T00:00:00Z", "expires_at"}, {"", "3001-01-01T00:00:00Z", "expires_at"},
		{"", "tomorrow", "expires_at"}, {"P", "", "expires_in"}, {"P11Y", "", "expires_in"},
	} {
		r.ExpiresIn, r.ExpiresAt = test.in, test.at
		var invalid *keyadmin.InvalidError
		if _, _, err := admin.Create(t.Context(), operator, r); !errors.As(err, &invalid) || invalid.Field != test.field {
			t.Errorf("%q %q: %v", test.in, test.at, err)
		}
	}
}

func mustUTC(t *testing.T, s string) string {
	t.Helper()
	at, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t.Fatal(err)
	}
	return at.UTC().Format(time.RFC3339)
}

func TestListFindsByEveryFilter(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	add := func(name, account, environment, expiresIn string) keyadmin.Key {
		r := request()
		r.Name, r.Account, r.Environment, r.ExpiresIn = name, account, environment, expiresIn
		return create(t, admin, r)
	}
	add("Production Backend", "acme", "production", "")
	add("Staging backend 100%", "acme", "sandbox", "7d")
	add("Über_Key", "acme", "sandbox", "1us")
	revoked := add("Backend", "globex", "production", "1d")
	if _, err := admin.Revoke(t.Context(), operator, revoked.ID); err != nil {
		t.Fatal(err)
	}
	pgtest.Exec(t, databaseURL, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		values ('key_0123456789abcdefABCDEF', 'rekall:canary', 'Canary', 'sandbox', sha256('canary'), '{}')`)
	for _, test := range []struct {
		request keyadmin.ListRequest
		want    string
	}{
		{keyadmin.ListRequest{}, "Backend, Über_Key, Staging backend 100%, Production Backend"},
		{keyadmin.ListRequest{Account: "acme"}, "Über_Key, Staging backend 100%, Production Backend"},
		{keyadmin.ListRequest{Environment: "production"}, "Backend, Production Backend"},
		{keyadmin.ListRequest{Status: "active"}, "Staging backend 100%, Production Backend"},
		{keyadmin.ListRequest{Status: "expiring"}, "Staging backend 100%"},
		{keyadmin.ListRequest{Status: "expired"}, "Über_Key"},
		{keyadmin.ListRequest{Status: "revoked"}, "Backend"},
		{keyadmin.ListRequest{Status: "revoked", Account: "acme"}, ""},
		{keyadmin.ListRequest{Name: "backend"}, "Backend"},                                                   // for all accounts, its beginning
		{keyadmin.ListRequest{Name: "BACKEND", Account: "acme"}, "Staging backend 100%, Production Backend"}, // for one, any part
		{keyadmin.ListRequest{Name: "%", Account: "acme"}, "Staging backend 100%"},
		{keyadmin.ListRequest{Name: "_", Account: "acme"}, "Über_Key"},
		{keyadmin.ListRequest{Name: "Über"}, "Über_Key"},
		{keyadmin.ListRequest{CreatedBy: "cli:test", Account: "globex"}, "Backend"},
		{keyadmin.ListRequest{CreatedBy: "cli:other"}, ""},
	} {
		test.request.WithTotal = true
		page, err := admin.List(t.Context(), operator, test.request)
		var names []string
		for _, key := range page.Keys {
			names = append(names, key.Name)
			if key.Expiring != (key.Name == "Staging backend 100%") {
				t.Errorf("%s: expiring %v, unlike the list of those that are", key.Name, key.Expiring)
			}
		}
		if got := strings.Join(names, ", "); err != nil || got != test.want {
			t.Errorf("%+v: %q, %v, want %q", test.request, got, err, test.want)
		}
		if counted := page.Total != nil; counted != (test.request.Account != "") || counted && *page.Total != int64(len(names)) {
			t.Errorf("%+v: total %v", test.request, page.Total)
		}
	}
	for _, r := range []keyadmin.ListRequest{{Status: "gone"}, {Environment: "live"}, {Name: "a\x00"}, {CreatedBy: "cli:a\xff"}, {CreatedBy: "bob"}, {CreatedBy: "key:bob"}} {
		var invalid *keyadmin.InvalidError
		if _, err := admin.List(t.Context(), operator, r); !errors.As(err, &invalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

func TestRenameChangesTheNameAndSaysSo(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key := create(t, admin, request())
	for range 2 { // the second time it has the name
		if got, err := admin.Rename(t.Context(), operator, key.ID, "New"); err != nil || got.Name != "New" {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	var invalid *keyadmin.InvalidError
	if _, err := admin.Rename(t.Context(), operator, key.ID, "a\nb"); !errors.As(err, &invalid) {
		t.Errorf("%v", err)
	}
	page, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{KeyID: key.ID, Action: string(keyadmin.KeyRenamed)})
	if err != nil || len(page.Entries) != 1 || fmt.Sprint(page.Entries[0].Details) != "map[from:Production Backend to:New]" {
		t.Errorf("audit %+v, %v", page.Entries, err)
	}
}

func TestAuditTellsTheWholeLifeNewestFirst(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key := create(t, admin, request())
	other := request()
	other.Account = "globex"
	create(t, admin, other)
	rotate(t, admin, key.ID, day(t))
	if _, _, err := admin.UndoRotation(t.Context(), operator, key.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.Revoke(t.Context(), keyadmin.Operator("bob"), key.ID); err != nil {
		t.Fatal(err)
	}
	read := func(r keyadmin.AuditRequest) string {
		t.Helper()
		var actions []string
		for r.Limit = 2; ; {
			page, err := admin.Audit(t.Context(), operator, r)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range page.Entries {
				actions = append(actions, string(e.Action))
			}
			if r.Cursor = page.NextCursor; r.Cursor == "" {
				return strings.Join(actions, " ")
			}
		}
	}
	for _, test := range []struct {
		request keyadmin.AuditRequest
		want    string
	}{
		{keyadmin.AuditRequest{KeyID: key.ID}, "key.revoked key.rotation_undone key.rotated key.created"},
		{keyadmin.AuditRequest{Account: "globex"}, "key.created"},
		{keyadmin.AuditRequest{Actor: "cli:bob"}, "key.revoked"},
		{keyadmin.AuditRequest{Action: "key.created"}, "key.created key.created key.created"},
		{keyadmin.AuditRequest{Until: "2001-01-01T00:00:00Z"}, ""},
		{keyadmin.AuditRequest{Since: "2001-01-01T00:00:00Z", Actor: "cli:bob"}, "key.revoked"},
	} {
		if got := read(test.request); got != test.want {
			t.Errorf("%+v: %s, want %s", test.request, got, test.want)
		}
	}
	var unnamed *keyadmin.InvalidError
	if _, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{Actor: "cli"}); !errors.As(err, &unnamed) || !strings.HasPrefix(unnamed.Reason, "must be key:<id>") {
		t.Errorf("an actor without a name: %v", err)
	}
	for _, r := range []keyadmin.AuditRequest{
		{Since: "x"}, {Until: "x"}, {Cursor: "x"}, {Cursor: "0"}, {Limit: 101}, {KeyID: "a\n"}, {Actor: apikey.Generate(apikey.Sandbox)},
		{Actor: "bob"}, {Actor: "key:bob"}, {Actor: "cli:"}, {Action: "key.foo"},
		{Since: "2001-01-01T00:00:00Z", Until: "2001-01-01T00:00:00Z"}, {Since: "2001-01-01T00:00:00Z", Until: "2001-01-01T00:30:00+01:00"},
	} {
		var invalid *keyadmin.InvalidError
		if _, err := admin.Audit(t.Context(), operator, r); !errors.As(err, &invalid) || apikey.ContainsKey(err.Error()) {
			t.Errorf("%v", err)
		}
	}
}

func TestEveryActionAndActorThatTheDatabaseTakesCanBeAskedFor(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	allowed := func(constraint string) []string {
		t.Helper()
		rows, _ := conn.Query(t.Context(), `select name[1] from pg_constraint,
			regexp_matches(substring(pg_get_constraintdef(oid) from 'ARRAY\[(.*?)\]'), '''([a-z._]+)''', 'g') name where conname = $1`, constraint)
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil || len(names) < 5 {
			t.Fatalf("%s: %q %v", constraint, names, err)
		}
		return names
	}
	for _, action := range allowed("audit_action_check") {
		if _, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{Action: action}); err != nil {
			t.Error(err)
		}
	}
	for _, kind := range allowed("api_keys_created_by_check") {
		if _, err := admin.List(t.Context(), operator, keyadmin.ListRequest{CreatedBy: kind + ":key_0123456789abcdefABCDEF"}); err != nil {
			t.Error(err)
		}
	}
}

// A change whose line in the audit cannot be written does not happen.
func TestNoChangeWithoutItsLineInTheAudit(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	key := create(t, admin, request())
	pgtest.Exec(t, databaseURL, `alter table rekall.audit add check (id < 0) not valid`)
	if _, _, err := admin.Create(t.Context(), operator, request()); err == nil {
		t.Error("a key was made")
	}
	if _, err := admin.Revoke(t.Context(), operator, key.ID); err == nil {
		t.Error("a key was revoked")
	}
	if _, _, err := admin.Rotate(t.Context(), operator, key.ID, keyadmin.RotateRequest{Overlap: day(t)}); err == nil {
		t.Error("a key was rotated")
	}
	if _, err := admin.RevokeMany(t.Context(), operator, keyadmin.Selection{Account: "acme"}, false); err == nil {
		t.Error("keys were revoked")
	}
	page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{})
	if err != nil || len(page.Keys) != 1 || page.Keys[0].Status != keyadmin.Active || page.Keys[0].Successor != nil {
		t.Errorf("%+v, %v", page.Keys, err)
	}
}

func TestAuditNamesNoKey(t *testing.T) {
	pasted := apikey.Generate(apikey.Production)
	if actor := keyadmin.Operator("bob " + pasted + "\n"); apikey.ContainsKey(actor.String()) || strings.Contains(actor.String(), "\n") {
		t.Errorf("actor %s", apikey.Redact(actor.String()))
	}
	if _, err := keyadmin.Person(pasted, "acme"); err == nil || apikey.ContainsKey(err.Error()) {
		t.Error("a key is the name of a person")
	}
}

// An operator in an incident must not read another name in the audit, or none, and must be able to revoke what was made before.
func TestNobodyIsKnownByANameThatDeceives(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	for name, want := range map[string]string{"a\u202egnp": "cli:agnp", "\u200b": "cli:unknown", "\u200d": "cli:unknown", "می\u200cخواهم": "cli:می\u200cخواهم"} {
		if got := keyadmin.Operator(name).String(); got != want {
			t.Errorf("%q is %q", name, got)
		}
	}
	key := create(t, admin, request())
	var invalid *keyadmin.InvalidError
	if _, err := admin.Rename(t.Context(), operator, key.ID, "a\u202egnp"); !errors.As(err, &invalid) || invalid.Field != "name" {
		t.Error(err)
	}
	if _, err := keyadmin.Person("a\u202egnp", "acme"); !errors.As(err, &invalid) || invalid.Field != "user" {
		t.Error(err)
	}
	pgtest.Exec(t, databaseURL, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		values ('key_0123456789abcdefABCDEF', $1, 'n', 'sandbox', sha256('n'), '{}')`, "acme\u202e")
	if done, err := admin.RevokeMany(t.Context(), operator, keyadmin.Selection{Account: "acme\u202e"}, false); err != nil || done.Count != 1 {
		t.Errorf("%+v, %v", done, err)
	}
}

func TestCheckSaysWhatAKeyIs(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key := create(t, admin, request())
	secret := key.Key.Reveal()
	checked, err := admin.Check(t.Context(), operator, secret)
	if err != nil || !checked.WellFormed || !checked.ChecksumValid || checked.Environment != "sandbox" || checked.Key == nil || checked.Key.ID != key.ID || checked.Key.Key != "" {
		t.Errorf("%+v, %v", checked, err)
	}
	typo := []byte(secret)
	if typo[20]++; typo[20] == 'z'+1 || typo[20] == 'Z'+1 || typo[20] == '9'+1 {
		typo[20] = '0'
	}
	if checked, err := admin.Check(t.Context(), operator, string(typo)); err != nil || !checked.WellFormed || checked.ChecksumValid || checked.Key != nil {
		t.Errorf("mistyped: %+v, %v", checked, err)
	}
	if checked, err := admin.Check(t.Context(), operator, secret[:47]); err != nil || checked != (keyadmin.Checked{}) {
		t.Errorf("too short: %+v, %v", checked, err)
	}
}

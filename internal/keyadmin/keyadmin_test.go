package keyadmin_test

import (
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

var operator = keyadmin.Operator("test")

func newAdmin(t testing.TB) (admin *keyadmin.Admin, store *keystore.Store, databaseURL string) {
	t.Helper()
	databaseURL = pgtest.Migrated(t)
	store = pgtest.Store(t, databaseURL)
	return keyadmin.New(store), store, databaseURL
}

func request() keyadmin.CreateRequest {
	return keyadmin.CreateRequest{
		Name: "Production Backend", Account: "acme", Environment: "sandbox",
		Scopes: []string{"memories:write", "memories:read", "memories:read"}, ExpiresIn: "90d",
	}
}

func create(t testing.TB, admin *keyadmin.Admin, r keyadmin.CreateRequest) keyadmin.Key {
	t.Helper()
	key, _, err := admin.Create(t.Context(), operator, r)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// contents returns every row of every table of the database as text.
func contents(t *testing.T, databaseURL string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	rows, _ := conn.Query(t.Context(), `
		select quote_ident(schemaname) || '.' || quote_ident(tablename) from pg_tables
		where schemaname not in ('pg_catalog', 'information_schema')`)
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, table := range tables {
		var text *string
		if err := conn.QueryRow(t.Context(), `select string_agg(t::text, E'\n') from `+table+` t`).Scan(&text); err != nil {
			t.Fatal(err)
		}
		if text != nil {
			all.WriteString(*text)
		}
	}
	return all.String()
}

func TestCreateShowsAGoodKeyAndStoresOnlyItsHash(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	created := create(t, admin, request())
	key := created.Key.Reveal()
	if environment, err := apikey.Parse(key); err != nil || environment != apikey.Sandbox || !apikey.ChecksumValid(key) {
		t.Errorf("environment %v, %v, checksum valid %v", environment, err, apikey.ChecksumValid(key))
	}
	stored := contents(t, databaseURL)
	secret := strings.TrimPrefix(key, apikey.SandboxPrefix)
	for _, form := range []string{secret, secret[:20], hex.EncodeToString([]byte(secret)), base64.StdEncoding.EncodeToString([]byte(key))} {
		if strings.Contains(stored, form) {
			t.Error("the database holds the key")
		}
	}
	digest := apikey.Hash(key)
	if !strings.Contains(stored, hex.EncodeToString(digest[:])) {
		t.Error("the database does not hold the key's hash")
	}
	found, err := store.Lookup(t.Context(), []apikey.Digest{digest})
	if err != nil || len(found.Records) != 1 {
		t.Fatalf("found %+v, %v", found, err)
	}
	if record := found.Records[0]; record.ID != created.ID || record.Validity(found.Now) != apikey.Allowed ||
		record.Scopes != apikey.MemoriesRead|apikey.MemoriesWrite || record.Account != "acme" {
		t.Errorf("record %+v", record)
	}
}

func TestCreateAnswersTheAPIsObject(t *testing.T) {
	admin, _, _ := newAdmin(t)
	created := create(t, admin, request())
	text, err := json.Marshal(created)
	if err != nil {
		t.Fatal(err)
	}
	var object map[string]any
	if err := json.Unmarshal(text, &object); err != nil {
		t.Fatal(err)
	}
	key := created.Key.Reveal()
	want := map[string]any{
		"id": created.ID, "key": key, "name": "Production Backend", "account": "acme", "environment": "sandbox",
		"scopes": []any{"memories:read", "memories:write"}, "masked": "rk_test_…" + key[len(key)-4:], "status": "active",
		"created_at": created.CreatedAt.Format(time.RFC3339Nano), "expires_at": created.ExpiresAt.Format(time.RFC3339Nano), "revoked_at": nil,
		"manage_keys": false, "created_by": "cli:test", "last_used_at": nil, "predecessor": nil, "successor": nil, "overlap_on_first_use": nil,
	}
	if fmt.Sprint(object) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", object, want)
	}
	if got := created.ExpiresAt.Sub(created.CreatedAt); got != 90*24*time.Hour {
		t.Errorf("expires %v after its creation", got)
	}
}

func TestKeyIsShownOnce(t *testing.T) {
	admin, _, _ := newAdmin(t)
	created := create(t, admin, request())
	page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := admin.Get(t.Context(), operator, created.ID)
	if err != nil {
		t.Fatal(err)
	}
	revoked, err := admin.Revoke(t.Context(), operator, created.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range append(page.Keys, got, revoked) {
		text, err := json.Marshal(key)
		if err != nil {
			t.Fatal(err)
		}
		if key.Key != "" || strings.Contains(string(text), `"key"`) || apikey.ContainsKey(string(text)) {
			t.Errorf("shown again: %s", text)
		}
	}
}

func TestFormattingNeverShowsTheKey(t *testing.T) {
	key := keyadmin.Key{ID: "key_0123456789abcdefABCDEF", Key: keyadmin.Secret(apikey.Generate(apikey.Production))}
	secret := key.Key.Reveal()[len(apikey.ProductionPrefix):]
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%d", "%t", "%10.3s"} {
		for _, value := range []any{key, &key, key.Key, []keyadmin.Key{key}, map[string]keyadmin.Key{"a": key}, errors.Join(fmt.Errorf("%v", key))} {
			text := fmt.Sprintf(verb, value)
			if strings.Contains(text, secret[:8]) || strings.Contains(strings.ToLower(text), hex.EncodeToString([]byte(secret[:8]))) {
				t.Errorf("%s of %T shows the key", verb, value)
			}
		}
	}
}

func TestKeysAndIDsAreNeverTheSame(t *testing.T) {
	admin, _, _ := newAdmin(t)
	seen := map[string]bool{}
	for range 50 {
		key := create(t, admin, request())
		if seen[key.ID] || seen[key.Key.Reveal()] {
			t.Fatal("the same id or key twice")
		}
		seen[key.ID], seen[key.Key.Reveal()] = true, true
	}
}

func TestUnacceptableRequestSaysWhyAndWritesNothing(t *testing.T) {
	admin, _, _ := newAdmin(t)
	with := func(change func(*keyadmin.CreateRequest)) keyadmin.CreateRequest {
		r := request()
		change(&r)
		return r
	}
	pasted := apikey.Generate(apikey.Production)
	for _, test := range []struct {
		want    string
		request keyadmin.CreateRequest
	}{
		{"name: must have 1 to 200 characters", with(func(r *keyadmin.CreateRequest) { r.Name = "" })},
		{"name: must have 1 to 200 characters", with(func(r *keyadmin.CreateRequest) { r.Name = strings.Repeat("ä", 201) })},
		{"name: must be UTF-8 text without control characters", with(func(r *keyadmin.CreateRequest) { r.Name = "a\nb" })},
		{"name: must be UTF-8 text without control characters", with(func(r *keyadmin.CreateRequest) { r.Name = "a\xff" })},
		{"name: must not begin or end with a space", with(func(r *keyadmin.CreateRequest) { r.Name = " " })},
		{"name: must not contain an API key", with(func(r *keyadmin.CreateRequest) { r.Name = "my " + pasted })},
		{"name: must have a visible character, and none that", with(func(r *keyadmin.CreateRequest) { r.Name = "a\u202egnp" })},
		{"name: must have a visible character, and none that", with(func(r *keyadmin.CreateRequest) { r.Name = "a\u200bb" })},
		{"name: must have a visible character, and none that", with(func(r *keyadmin.CreateRequest) { r.Name = "\u200d" })},
		{"name: must have a visible character, and none that", with(func(r *keyadmin.CreateRequest) { r.Name = "\u3164" })},
		{"account: must have a visible character, and none that", with(func(r *keyadmin.CreateRequest) { r.Account = "acme\u2066" })},
		{"account: must have 1 to 200 characters", with(func(r *keyadmin.CreateRequest) { r.Account = "" })},
		{"account: must not begin or end with a space", with(func(r *keyadmin.CreateRequest) { r.Account = "acme " })},
		{"account: must be UTF-8 text without control characters", with(func(r *keyadmin.CreateRequest) { r.Account = "a\r\nX-Rekall-Scopes: all" })},
		{"environment: must be production or sandbox", with(func(r *keyadmin.CreateRequest) { r.Environment = "live" })},
		{"environment: must be production or sandbox", with(func(r *keyadmin.CreateRequest) { r.Environment = "" })},
		{"scopes: must name at least one of ", with(func(r *keyadmin.CreateRequest) { r.Scopes = nil })},
		{`scopes: has an unknown scope "memories:all"`, with(func(r *keyadmin.CreateRequest) { r.Scopes = []string{"memories:read", "memories:all"} })},
		{`scopes: has an unknown scope "rk_…"`, with(func(r *keyadmin.CreateRequest) { r.Scopes = []string{pasted} })},
		{"expires_in: must be a duration such as 90d", with(func(r *keyadmin.CreateRequest) { r.ExpiresIn = "soon" })},
		{"expires_in: must be a duration such as 90d", with(func(r *keyadmin.CreateRequest) { r.ExpiresIn = "-1h" })},
		{"expires_in: must be more than 0 and at most 3650d", with(func(r *keyadmin.CreateRequest) { r.ExpiresIn = "0d" })},
		{"expires_in: must be more than 0 and at most 3650d", with(func(r *keyadmin.CreateRequest) { r.ExpiresIn = "1ns" })},
		{"expires_in: must be more than 0 and at most 3650d", with(func(r *keyadmin.CreateRequest) { r.ExpiresIn = "3651d" })},
	} {
		_, _, err := admin.Create(t.Context(), operator, test.request)
		var invalid *keyadmin.InvalidError
		if !errors.As(err, &invalid) || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("got %v, want %s", err, test.want)
		}
		if err != nil && apikey.ContainsKey(err.Error()) {
			t.Errorf("the error shows a key: %v", err)
		}
	}
	if page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{}); err != nil || len(page.Keys) != 0 || page.Keys == nil {
		t.Errorf("%+v, %v", page, err)
	}
}

// The database's checks must not refuse what passes here: the user would get an error that says nothing.
func TestWhatIsAcceptableIsAcceptableToTheDatabase(t *testing.T) {
	admin, _, _ := newAdmin(t)
	for _, text := range []string{"a", strings.Repeat("ä", 200), "👩‍💻 “Prüfung”\u2028 x", "می\u200cخواهم", `\u0001 '; --`} {
		r := request()
		r.Name, r.Account, r.Scopes = text, text, apikey.ScopeNames()
		if key := create(t, admin, r); key.Name != text || key.Account != text || len(key.Scopes) != 14 {
			t.Errorf("created %+v", key)
		}
	}
	for _, expiresIn := range []string{"", "1us", "12h", "3650d"} {
		r := request()
		r.ExpiresIn = expiresIn
		if key := create(t, admin, r); (key.ExpiresAt == nil) != (expiresIn == "") {
			t.Errorf("created %+v", key)
		}
	}
}

func TestRevokeIsPermanentAndSaysWhatItFound(t *testing.T) {
	admin, _, _ := newAdmin(t)
	created, other := create(t, admin, request()), create(t, admin, request())
	revoked, err := admin.Revoke(t.Context(), operator, created.ID)
	if err != nil || revoked.Status != keyadmin.Revoked || revoked.RevokedAt == nil {
		t.Fatalf("revoked %+v, %v", revoked, err)
	}
	again, err := admin.Revoke(t.Context(), operator, created.ID)
	if !errors.Is(err, keyadmin.ErrAlreadyRevoked) || again.RevokedAt == nil || !again.RevokedAt.Equal(*revoked.RevokedAt) {
		t.Errorf("again %+v, %v", again, err)
	}
	if got, err := admin.Get(t.Context(), operator, other.ID); err != nil || got.Status != keyadmin.Active {
		t.Errorf("another key: %+v, %v", got, err)
	}
}

func TestUnknownIDIsNotFoundAndAPastedKeyIsNotQuoted(t *testing.T) {
	admin, _, _ := newAdmin(t)
	pasted := create(t, admin, request()).Key.Reveal()
	for _, id := range []string{"key_" + strings.Repeat("0", 22), "", "key_", pasted, "key_" + pasted, "'; drop table rekall.api_keys; --"} {
		_, revokeErr := admin.Revoke(t.Context(), operator, id)
		_, getErr := admin.Get(t.Context(), operator, id)
		for _, err := range []error{revokeErr, getErr} {
			if !errors.Is(err, keyadmin.ErrNotFound) || apikey.ContainsKey(err.Error()) {
				t.Errorf("%q: %v", id, err)
			}
		}
	}
}

func TestStatusFollowsPostgresClock(t *testing.T) {
	admin, _, _ := newAdmin(t)
	r := request()
	r.ExpiresIn = "1us"
	key := create(t, admin, r)
	if got, err := admin.Get(t.Context(), operator, key.ID); err != nil || got.Status != keyadmin.Expired {
		t.Errorf("after its expiry: %+v, %v", got, err)
	}
	if got, err := admin.Revoke(t.Context(), operator, key.ID); err != nil || got.Status != keyadmin.Revoked {
		t.Errorf("after its revocation: %+v, %v", got, err)
	}
}

func TestListPagesFromNewestToOldest(t *testing.T) {
	admin, _, _ := newAdmin(t)
	var want []string
	for i := range 7 {
		r := request()
		if i%2 == 1 {
			r.Account = "other"
		}
		if key := create(t, admin, r); r.Account == "acme" {
			want = append([]string{key.ID}, want...)
		}
	}
	var got []string
	pages := 0
	for r := (keyadmin.ListRequest{Account: "acme", Limit: 2}); ; pages++ {
		page, err := admin.List(t.Context(), operator, r)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range page.Keys {
			got = append(got, key.ID)
		}
		if page.NextCursor == "" {
			break
		}
		r.Cursor = page.NextCursor
	}
	// Four keys in pages of two: the second page is full and the last all the same.
	if fmt.Sprint(got) != fmt.Sprint(want) || pages != 1 {
		t.Errorf("got %v in %d pages, want %v", got, pages+1, want)
	}
}

func TestUnacceptableListRequestSaysWhy(t *testing.T) {
	admin, _, _ := newAdmin(t)
	encode := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	for _, r := range []keyadmin.ListRequest{
		{Limit: -1}, {Limit: 101}, {Account: "a\x00"}, {Account: "a\xff"},
		{Cursor: "x"}, {Cursor: "%"}, {Cursor: encode("1 key_")}, {Cursor: encode("x key_0123456789abcdefABCDEF")},
		{Cursor: encode("1")}, {Cursor: encode("9223372036854775807 key_0123456789abcdefABCDEF")}, {Cursor: encode("-1 key_0123456789abcdefABCDEF")},
	} {
		_, err := admin.List(t.Context(), operator, r)
		var invalid *keyadmin.InvalidError
		if !errors.As(err, &invalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// TestAnAccountMakesNoMoreKeysADayThanItMay: keys are never deleted, and one that may manage keys makes more of them.
func TestAnAccountMakesNoMoreKeysADayThanItMay(t *testing.T) {
	unlimited, _, databaseURL := newAdmin(t)
	admin, ctx := unlimited.Limited(3), t.Context()
	manager := request()
	manager.ManageKeys = true
	parent := create(t, admin, manager)
	pgtest.Exec(t, databaseURL, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_by, created_at)
		select 'key_0000000000000000000' || n, 'acme', 'n', 'sandbox', sha256(n::text::bytea), '{}', 'user:ann', now() - interval '25 hours'
		from generate_series(100, 110) n`)
	ann := must(keyadmin.Person("ann", "acme"))
	holder := must(keyadmin.ManagingKey(&apikey.Record{ID: parent.ID, Account: "acme", Environment: apikey.Sandbox, ManageKeys: true, Scopes: apikey.AllScopes}))
	if _, _, err := admin.Create(ctx, holder, request()); err != nil {
		t.Fatal(err)
	}
	child, _, err := admin.Create(ctx, ann, request())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := admin.Rotate(ctx, ann, child.ID, keyadmin.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	for range 3 { // an operator makes more, which are newer, and hide nothing
		create(t, admin, request())
	}
	for _, actor := range []keyadmin.Actor{ann, holder} {
		var tooMany *keyadmin.TooManyError
		if _, _, err := admin.Create(ctx, actor, request()); !errors.As(err, &tooMany) {
			t.Errorf("%s made a fourth: %v", actor, err)
		}
		if _, _, err := admin.Rotate(ctx, actor, parent.ID, keyadmin.RotateRequest{}); !errors.As(err, &tooMany) {
			t.Errorf("%s made a fourth by rotation: %v", actor, err)
		}
	}
	if key, err := admin.Get(ctx, operator, parent.ID); err != nil || key.Status != keyadmin.Active || key.Successor != nil {
		t.Errorf("the key that could not be rotated: %+v, %v", key, err)
	}
	other := request()
	other.Account = "other"
	if _, _, err := admin.Create(ctx, must(keyadmin.Person("bob", "other")), other); err != nil {
		t.Errorf("another account: %v", err)
	}
	if _, _, err := unlimited.Create(ctx, ann, request()); err != nil {
		t.Errorf("without a limit: %v", err)
	}
}

// TestAnAccountRenamesKeysNoMoreOftenADayThanItMay: the audit, which each new name adds a line to, only grows.
func TestAnAccountRenamesKeysNoMoreOftenADayThanItMay(t *testing.T) {
	unlimited, _, databaseURL := newAdmin(t)
	admin, ctx := unlimited.Limited(2), t.Context()
	manager := request()
	manager.ManageKeys = true
	parent, sibling := create(t, admin, manager), create(t, admin, request())
	ann := must(keyadmin.Person("ann", "acme"))
	holder := must(keyadmin.ManagingKey(&apikey.Record{ID: parent.ID, Account: "acme", Environment: apikey.Sandbox, ManageKeys: true, Scopes: apikey.AllScopes}))
	pgtest.Exec(t, databaseURL, `insert into rekall.audit (at, actor, action, key_id, account) values
		(now() - interval '25 hours', 'user:ann', 'key.renamed', $1, 'acme'), (now() - interval '20 hours', 'user:ann', 'key.renamed', $1, 'acme')`, sibling.ID)
	rename := func(actor keyadmin.Actor, id, name string) error {
		_, err := admin.Rename(ctx, actor, id, name)
		return err
	}
	for _, name := range []string{"A", "A"} { // the second changes nothing
		if err := rename(holder, sibling.ID, name); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 { // an operator's do not count, and hide nothing
		if err := cmp.Or(rename(operator, parent.ID, "B"), rename(operator, parent.ID, "C")); err != nil {
			t.Fatal(err)
		}
	}
	for _, actor := range []keyadmin.Actor{ann, holder} {
		var tooMany *keyadmin.TooManyError
		if err := rename(actor, parent.ID, "D"); !errors.As(err, &tooMany) || tooMany.Done != keyadmin.KeyRenamed || tooMany.RetryAfter.Round(time.Hour) != 4*time.Hour {
			t.Errorf("%s renamed a third time: %v", actor, err)
		}
	}
	if key, err := admin.Get(ctx, operator, parent.ID); err != nil || key.Name != "C" {
		t.Errorf("the key that could not be renamed: %+v, %v", key, err)
	}
}

// TestAccountThatWaitsAsLongAsItIsToldMakesAnotherKey, and one that does not is refused again.
func TestAccountThatWaitsAsLongAsItIsToldMakesAnotherKey(t *testing.T) {
	unlimited, _, databaseURL := newAdmin(t)
	admin, ann := unlimited.Limited(2), must(keyadmin.Person("ann", "acme"))
	pgtest.Exec(t, databaseURL, `alter table rekall.api_keys disable trigger stamp`) // which keeps created_at
	later := func(by time.Duration) {
		t.Helper()
		pgtest.Exec(t, databaseURL, fmt.Sprintf(`update rekall.api_keys set created_at = created_at - interval '%d microseconds'`, by.Microseconds()))
	}
	create := func() error {
		_, _, err := admin.Create(t.Context(), ann, request())
		return err
	}
	for range 3 { // a key that is older than the limit reaches back does not count
		if _, _, err := unlimited.Create(t.Context(), ann, request()); err != nil {
			t.Fatal(err)
		}
		later(5 * time.Hour)
	}
	var tooMany *keyadmin.TooManyError
	if err := create(); !errors.As(err, &tooMany) {
		t.Fatal(err)
	}
	wait := tooMany.RetryAfter
	later(wait - time.Hour)
	if err := create(); !errors.As(err, &tooMany) {
		t.Errorf("an hour early: %v", err)
	}
	later(time.Hour)
	if err := create(); err != nil {
		t.Errorf("after the %s that it was told: %v", wait, err)
	}
	if err := create(); !errors.As(err, &tooMany) || tooMany.RetryAfter > 24*time.Hour {
		t.Errorf("another one at once: %v, for %s", err, tooMany.RetryAfter)
	}
}

func TestKeysMadeWhileTheClockWasAheadLockNoAccountOut(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	admin, ann := admin.Limited(1), must(keyadmin.Person("ann", "acme"))
	create(t, admin, request())
	pgtest.Exec(t, databaseURL, `alter table rekall.api_keys disable trigger stamp`) // which keeps created_at
	pgtest.Exec(t, databaseURL, `update rekall.api_keys set created_by = 'user:ann', created_at = now() + interval '30 days'`)
	if _, _, err := admin.Create(t.Context(), ann, request()); err != nil {
		t.Error(err)
	}
	var tooMany *keyadmin.TooManyError
	if _, _, err := admin.Create(t.Context(), ann, request()); !errors.As(err, &tooMany) || tooMany.RetryAfter > 24*time.Hour {
		t.Errorf("beyond the limit of today: %v", err)
	}
}

// must is for actors that can be.
func must(actor keyadmin.Actor, err error) keyadmin.Actor {
	if err != nil {
		panic(err)
	}
	return actor
}

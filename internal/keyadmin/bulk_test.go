package keyadmin_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// fixture has keys of two accounts; those named by "manager" were made by the manager or by a key that it made.
func fixture(t *testing.T) (admin *keyadmin.Admin, store *keystore.Store, databaseURL string, keys map[string]keyadmin.Key) {
	t.Helper()
	admin, store, databaseURL = newAdmin(t)
	keys = map[string]keyadmin.Key{}
	add := func(name, account string, actor keyadmin.Actor) {
		r := request()
		r.Name, r.Account, r.ManageKeys = name, account, true
		key, _, err := admin.Create(t.Context(), actor, r)
		if err != nil {
			t.Fatal(err)
		}
		keys[name] = key
	}
	by := func(name string) keyadmin.Actor { return managing(t, store, keys[name]) }
	add("manager", "acme", operator)
	add("child", "acme", by("manager"))
	add("grandchild", "acme", by("child"))
	add("bystander", "acme", operator)
	add("stranger", "globex", operator)
	return admin, store, databaseURL, keys
}

// TestRevocationIsNotConfirmedByAnotherServer: an asynchronous failover may have lost it, and its transaction's id is another's there.
func TestRevocationIsNotConfirmedByAnotherServer(t *testing.T) {
	server := pgtest.Server(t)
	pgtest.Migrate(t, server.URL())
	admin := func() *keyadmin.Admin {
		return keyadmin.New(pgtest.Store(t, server.URL()))
	}
	before := admin()
	key := create(t, before, request())
	revocation, err := before.RevokeMany(t.Context(), operator, keyadmin.Selection{Account: key.Account}, false)
	if err != nil || revocation.Count != 1 {
		t.Fatalf("%d keys are revoked, %v", revocation.Count, err)
	}
	none := func(keyadmin.Confirmation) {}
	if err := before.Wait(t.Context(), revocation, none); err != nil {
		t.Error(err)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := admin()
	if err := after.Wait(t.Context(), revocation, none); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("it is confirmed by another server: %v", err)
	}
	if err := after.WaitRevoked(t.Context(), key.ID, none); err != nil {
		t.Errorf("a key that is revoked there: %v", err)
	}
}

// TestWaitThatCannotAskTheEdgesEndsAndSaysThatTheRevocationIsInForce plays an edge that was taken over.
func TestWaitThatCannotAskTheEdgesEndsAndSaysThatTheRevocationIsInForce(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	key := create(t, admin, request())
	revocation, err := admin.RevokeMany(t.Context(), operator, keyadmin.Selection{Account: key.Account}, false)
	if err != nil {
		t.Fatal(err)
	}
	none := func(keyadmin.Confirmation) {}
	waits := map[string]func(context.Context) error{
		"of one":  func(ctx context.Context) error { return admin.WaitRevoked(ctx, key.ID, none) },
		"of many": func(ctx context.Context) error { return admin.Wait(ctx, revocation, none) },
	}
	want := func(why error) {
		t.Helper()
		for of, wait := range waits {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			err := wait(ctx)
			if ctx.Err() != nil || !errors.Is(err, why) || !strings.HasSuffix(err.Error(), ". Every edge refuses what is revoked within 60 seconds") {
				t.Errorf("the wait for a revocation %s ends with %v, and the test with %v", of, err, ctx.Err())
			}
		}
	}
	pgtest.Exec(t, databaseURL, `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat)
		select lpad(n::text, 22, '0'), 'forged', '', '', '59s', now(), 1 from generate_series(1, 10001) n`)
	want(keystore.ErrTooManyEdges)
	keyadmin.WaitFor(t, time.Second)
	pgtest.Exec(t, databaseURL, `delete from rekall.edges where instance like '%1'`)
	want(context.DeadlineExceeded) // of edges that never confirm it
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(t.Context(), `begin; lock table rekall.edges`); err != nil {
		t.Fatal(err)
	}
	want(context.DeadlineExceeded)
}

// TestWaitOutlivesATableOfEdgesThatIsLockedForAWhile once it has looked: the edges confirm all the same.
func TestWaitOutlivesATableOfEdgesThatIsLockedForAWhile(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	key := create(t, admin, request())
	const confirmed, late = "0000000000000000000001", "0000000000000000000002"
	report := func(instance, applied string) {
		var on string
		if err := store.Change(t.Context(), func(tx *keystore.Tx) error {
			server, err := tx.Server(t.Context())
			on = server.String()
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := store.ReportEdge(t.Context(), keystore.Edge{
			Instance: instance, Name: "edge", MaxStaleness: 50 * time.Second, StartedAt: time.Now(), SyncedAt: time.Now(), Beat: 1,
			Applied: applied, AppliedOn: on,
		}); err != nil {
			t.Fatal(err)
		}
	}
	report(late, "3:3:")
	revocation, err := admin.RevokeMany(t.Context(), operator, keyadmin.Selection{Account: key.Account}, false)
	if err != nil {
		t.Fatal(err)
	}
	snap, err := store.Snapshot(t.Context(), "", 1)
	if err != nil {
		t.Fatal(err)
	}
	report(confirmed, snap.Text)
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	looked, locked, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var instances []string
	go func() {
		ended <- admin.Wait(t.Context(), revocation, func(c keyadmin.Confirmation) {
			if instances = append(instances, c.Instance); len(instances) == 1 {
				close(looked)
				<-locked
			}
		})
	}()
	<-looked
	exec(`begin; lock table rekall.edges`)
	close(locked)
	pgtest.AwaitBlocked(t, databaseURL, 1)
	const blocked = `select coalesce(min(pid), 0) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`
	blockedNow := func() (pid int) {
		if err := conn.QueryRow(t.Context(), blocked).Scan(&pid); err != nil {
			t.Fatal(err)
		}
		return pid
	}
	first := blockedNow()
	eventually.True(t, "the look at the edges is given up", func() bool { return blockedNow() != first })
	exec(`update rekall.edges l set applied = c.applied from rekall.edges c where c.instance = $1 and l.instance = $2`, confirmed, late)
	exec(`commit`)
	if err := <-ended; err != nil || !slices.Equal(instances, []string{confirmed, late}) {
		t.Errorf("%v has confirmed, and the wait ends with %v", instances, err)
	}
}

func revokedNames(t *testing.T, admin *keyadmin.Admin, keys map[string]keyadmin.Key) string {
	t.Helper()
	var names []string
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		if get(t, admin, keys[name].ID).Status == keyadmin.Revoked {
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

func TestIncidentSwitchRevokesTheSelectionAndNothingElse(t *testing.T) {
	hash := func(key keyadmin.Key) [32]byte { return apikey.Hash(key.Key.Reveal()) }
	at := func(key keyadmin.Key) string { return key.CreatedAt.Format(time.RFC3339Nano) }
	for name, test := range map[string]struct {
		selection func(map[string]keyadmin.Key) keyadmin.Selection
		want      string
	}{
		"account": {func(map[string]keyadmin.Key) keyadmin.Selection { return keyadmin.Selection{Account: "acme"} }, "bystander child grandchild manager"},
		"creator, and whom it made": {func(k map[string]keyadmin.Key) keyadmin.Selection {
			return keyadmin.Selection{CreatedBy: "key:" + k["manager"].ID}
		}, "child grandchild"},
		"window": {func(k map[string]keyadmin.Key) keyadmin.Selection {
			return keyadmin.Selection{CreatedAfter: at(k["child"]), CreatedBefore: at(k["bystander"])}
		}, "child grandchild"},
		"hashes": {func(k map[string]keyadmin.Key) keyadmin.Selection {
			return keyadmin.Selection{Hashes: []apikey.Digest{hash(k["stranger"]), hash(k["child"]), {1}}}
		}, "child stranger"},
		"both": {func(k map[string]keyadmin.Key) keyadmin.Selection {
			return keyadmin.Selection{Account: "acme", Hashes: []apikey.Digest{hash(k["stranger"]), hash(k["child"])}}
		}, "child"},
		"a list of no hash": {func(map[string]keyadmin.Key) keyadmin.Selection { return keyadmin.Selection{Hashes: []apikey.Digest{}} }, ""},
		"none":              {func(map[string]keyadmin.Key) keyadmin.Selection { return keyadmin.Selection{Account: "nobody"} }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			admin, _, _, keys := fixture(t)
			selection := test.selection(keys)
			count := int64(len(strings.Fields(test.want)))
			if dry, err := admin.RevokeMany(t.Context(), operator, selection, true); err != nil || dry.Count != count || revokedNames(t, admin, keys) != "" {
				t.Errorf("dry run %+v, %v, revoked %s", dry, err, revokedNames(t, admin, keys))
			}
			done, err := admin.RevokeMany(t.Context(), operator, selection, false)
			if got := revokedNames(t, admin, keys); err != nil || done.Count != count || got != test.want || done.At.Location() != time.UTC {
				t.Errorf("%+v, %v, revoked %q, want %q", done, err, got, test.want)
			}
			if again, err := admin.RevokeMany(t.Context(), operator, selection, false); err != nil || again.Count != 0 {
				t.Errorf("again: %+v, %v", again, err)
			}
			lines := 0
			page, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{Action: string(keyadmin.KeyRevoked)})
			for _, e := range page.Entries {
				told, ok := e.Details["selection"].(map[string]any)
				if !ok {
					continue
				}
				lines++
				if n, ok := told["hashes"]; ok != (selection.Hashes != nil) || ok && n != float64(len(selection.Hashes)) {
					t.Errorf("the audit tells of %v hashes, want %d", n, len(selection.Hashes))
				}
			}
			if err != nil || lines != int(count) {
				t.Errorf("%d lines in the audit, %v", lines, err)
			}
		})
	}
}

func TestEmptySelectionIsRefused(t *testing.T) {
	admin, _, _, keys := fixture(t)
	for _, selection := range []keyadmin.Selection{
		{}, {CreatedAfter: "yesterday"}, {CreatedBefore: "1"}, {Account: "a\n"}, {Account: keystore.CanaryAccount},
		{CreatedAfter: "2020-01-01T00:00:00Z", CreatedBefore: "2020-01-01T00:00:00Z"},
	} {
		var invalid *keyadmin.InvalidError
		if _, err := admin.RevokeMany(t.Context(), operator, selection, false); !errors.As(err, &invalid) {
			t.Errorf("%+v: %v", selection, err)
		}
	}
	if got := revokedNames(t, admin, keys); got != "" {
		t.Errorf("revoked %s", got)
	}
}

func TestIncidentSwitchOfAPersonStaysInTheirAccount(t *testing.T) {
	admin, _, _, keys := fixture(t)
	person, err := keyadmin.Person("ann", "globex")
	if err != nil {
		t.Fatal(err)
	}
	if done, err := admin.RevokeMany(t.Context(), person, keyadmin.Selection{Account: "acme"}, false); err != nil || done.Count != 0 {
		t.Errorf("another account: %+v, %v", done, err)
	}
	if done, err := admin.RevokeMany(t.Context(), person, keyadmin.Selection{CreatedAfter: "2020-01-01T00:00:00Z"}, false); err != nil || done.Count != 1 {
		t.Errorf("all that there are: %+v, %v", done, err)
	}
	if got := revokedNames(t, admin, keys); got != "stranger" {
		t.Errorf("revoked %s", got)
	}
}

// TestIncidentSwitchIsInTheAuditOfThoseWhoseKeysItRevokes: managers see the lines of their account, and of their environment.
func TestIncidentSwitchIsInTheAuditOfThoseWhoseKeysItRevokes(t *testing.T) {
	admin, store, _ := newAdmin(t)
	person, err := keyadmin.Person("ann", "globex")
	if err != nil {
		t.Fatal(err)
	}
	r := request()
	r.Environment, r.ManageKeys = "sandbox", true
	key := managing(t, store, create(t, admin, r))
	told := func(field *string) string {
		if field == nil {
			return ""
		}
		return *field
	}
	const before = "2020-01-01T00:00:00Z" // nobody's keys
	for name, c := range map[string]struct {
		actor                keyadmin.Actor
		selection            keyadmin.Selection
		account, environment string
	}{
		"an operator, of one account": {operator, keyadmin.Selection{Account: "acme", CreatedBefore: before}, "acme", ""},
		"an operator, of any":         {operator, keyadmin.Selection{CreatedBefore: before}, "", ""},
		"a person":                    {person, keyadmin.Selection{CreatedBefore: before}, "globex", ""},
		"a key of the sandbox":        {key, keyadmin.Selection{CreatedBefore: before}, "acme", "sandbox"},
	} {
		if _, err := admin.RevokeMany(t.Context(), c.actor, c.selection, false); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		page, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{Action: string(keyadmin.KeysRevoked)})
		if err != nil || len(page.Entries) == 0 {
			t.Fatalf("%s: %+v, %v", name, page, err)
		}
		if account, environment := told(page.Entries[0].Account), told(page.Entries[0].Environment); account != c.account || environment != c.environment {
			t.Errorf("%s: account %q and environment %q, want %q and %q", name, account, environment, c.account, c.environment)
		}
	}
}

// managing returns the actor that a gateway makes of a key.
func managing(t *testing.T, store *keystore.Store, key keyadmin.Key) keyadmin.Actor {
	t.Helper()
	found, err := store.Lookup(t.Context(), []apikey.Digest{apikey.Hash(key.Key.Reveal())})
	if err != nil {
		t.Fatal(err)
	}
	actor, err := keyadmin.ManagingKey(found.Records[0])
	if err != nil {
		t.Fatal(err)
	}
	return actor
}

// The maker's row is locked while it makes a key, so the incident switch waits for it, and must then see what it made.
func TestKeyThatIsBeingMadeDoesNotEscapeTheIncidentSwitch(t *testing.T) {
	admin, store, databaseURL, keys := fixture(t)
	made, revoked := make(chan struct{}), make(chan error, 1)
	err := store.ChangeOnce(t.Context(), func(tx *keystore.Tx) error {
		if _, err := tx.Lock(t.Context(), keystore.Everything(), keys["manager"].ID); err != nil {
			return err
		}
		key := keystore.NewKey{ID: "key_" + apikey.RandomText(22), Account: "acme", Name: "late", Environment: apikey.Sandbox, Digest: apikey.Hash("late")}
		if _, err := tx.Insert(t.Context(), key); err != nil {
			return err
		}
		close(made)
		go func() {
			_, err := admin.RevokeMany(t.Context(), operator, keyadmin.Selection{Account: "acme"}, false)
			revoked <- err
		}()
		pgtest.AwaitBlocked(t, databaseURL, 1)
		return nil
	})
	if err := errors.Join(err, <-revoked); err != nil {
		t.Fatal(err)
	}
	page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{Account: "acme", Status: "active"})
	if err != nil || len(page.Keys) != 0 {
		t.Errorf("left: %+v, %v", page.Keys, err)
	}
}

func TestLeakedKeysAreRevokedAndTheErrorTellsNothing(t *testing.T) {
	admin, _, databaseURL, keys := fixture(t)
	unknown := apikey.Generate(apikey.Production)
	report := []string{keys["child"].Key.Reveal(), unknown, "rk_", "", keys["stranger"].Key.Reveal(), keys["child"].Key.Reveal()}
	done, err := admin.Leaked(t.Context(), "github", report)
	if err != nil || done.Count != 2 || revokedNames(t, admin, keys) != "child stranger" {
		t.Errorf("%+v, %v, revoked %s", done, err, revokedNames(t, admin, keys))
	}
	if done, err := admin.Leaked(t.Context(), "github", report); err != nil || done.Count != 0 {
		t.Errorf("again: %+v, %v", done, err)
	}
	if done, err := admin.Leaked(t.Context(), "finder", []string{unknown}); err != nil || done.Count != 0 {
		t.Errorf("unknown: %+v, %v", done, err)
	}
	page, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{Action: string(keyadmin.LeakReported)})
	if err != nil || len(page.Entries) != 3 || page.Entries[2].Actor != "leak:github" || fmt.Sprint(page.Entries[2].Details) != "map[keys:6 revoked:2]" {
		t.Errorf("audit %+v, %v", page.Entries, err)
	}
	if page, err := admin.Audit(t.Context(), operator, keyadmin.AuditRequest{KeyID: keys["child"].ID}); err != nil || page.Entries[0].Details["reason"] != "leaked" {
		t.Errorf("audit of the key %+v, %v", page.Entries, err)
	}
	for _, keys := range [][]string{nil, make([]string, 1001)} {
		var invalid *keyadmin.InvalidError
		if _, err := admin.Leaked(t.Context(), "finder", keys); !errors.As(err, &invalid) {
			t.Errorf("%d keys: %v", len(keys), err)
		}
	}
	if stored := contents(t, databaseURL); strings.Contains(stored, unknown[len(apikey.ProductionPrefix):]) {
		t.Error("a reported key was stored")
	}
}

func TestLeakedKeyIsFoundInWhatWasCopiedWithIt(t *testing.T) {
	admin, _, _, keys := fixture(t)
	at := func(name string) string { return keys[name].Key.Reveal() }
	report := []string{
		" " + at("manager") + "\r\n", "Authorization: Bearer " + at("child"), at("bystander") + "," + at("stranger"), `{"key": "` + at("grandchild") + `x"}`,
	}
	done, err := admin.Leaked(t.Context(), "finder", report)
	if got := revokedNames(t, admin, keys); err != nil || done.Count != 5 || got != "bystander child grandchild manager stranger" {
		t.Errorf("%+v, %v, revoked %s", done, err, got)
	}
}

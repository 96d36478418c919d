package keyadmin_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// right is what a key may do, and where.
type right struct {
	account, environment string
	scopes               []string
}

func rightOf(k keyadmin.Key) right { return right{k.Account, k.Environment, k.Scopes} }

// beyond reports whether a key may do what its maker might not. A production key may make sandbox keys.
func (r right) beyond(maker right) bool {
	if r.account != maker.account || maker.environment == "sandbox" && r.environment != "sandbox" {
		return true
	}
	return slices.ContainsFunc(r.scopes, func(s string) bool { return !slices.Contains(maker.scopes, s) })
}

// world is a random play: holders of keys do what they can think of, and the test watches what they are handed.
type world struct {
	t       *testing.T
	random  *rand.Rand
	admin   *keyadmin.Admin
	store   *keystore.Store
	holders []keyadmin.Key // with the key itself
	refused int
	granted int
}

// TestNobodyIsEverHandedAKeyBeyondTheirOwn plays random sequences of calls by random keys of two accounts, whose holders know
// every id there is. Whatever is handed out, seen or changed must lie within what the asking key may do.
func TestNobodyIsEverHandedAKeyBeyondTheirOwn(t *testing.T) {
	granted, refused := 0, 0
	for range 6 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			admin, store, _ := newAdmin(t)
			w := &world{t: t, random: rand.New(rand.NewPCG(seed, 0)), admin: admin, store: store}
			for _, account := range []string{"acme", "globex"} {
				for range 4 {
					w.add(w.request(account))
				}
			}
			for range 250 {
				w.step()
			}
			granted, refused = granted+w.granted, refused+w.refused
		})
	}
	if granted < 20 || refused < 20 { // in one play it may be few: keys revoke each other
		t.Errorf("only %d calls were granted and %d refused: the plays prove little", granted, refused)
	}
}

func (w *world) request(account string) keyadmin.CreateRequest {
	names := apikey.ScopeNames()[:5]
	w.random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return keyadmin.CreateRequest{
		Name: "Key", Account: account, Environment: w.pick("production", "sandbox"), Scopes: names[:1+w.random.IntN(4)],
		ManageKeys: w.random.IntN(3) > 0,
	}
}

func (w *world) pick(choices ...string) string { return choices[w.random.IntN(len(choices))] }

// add makes a key as an operator.
func (w *world) add(request keyadmin.CreateRequest) {
	key, _, err := w.admin.Create(w.t.Context(), operator, request)
	if err != nil {
		w.t.Fatal(err)
	}
	w.holders = append(w.holders, key)
}

// actor returns the actor that a gateway makes of a key, and whether it let it in.
func (w *world) actor(asking keyadmin.Key) (keyadmin.Actor, bool) {
	found, err := w.store.Lookup(w.t.Context(), []apikey.Digest{apikey.Hash(asking.Key.Reveal())})
	if err != nil || len(found.Records) != 1 {
		w.t.Fatal(found, err)
	}
	// Whether the key is still valid is left out: an edge may not have heard.
	actor, err := keyadmin.ManagingKey(found.Records[0])
	if (err == nil) != asking.ManageKeys {
		w.t.Fatalf("%+v may manage keys: %v", asking, err)
	}
	return actor, err == nil
}

// keys returns all keys as they are.
func (w *world) keys() map[string]keyadmin.Key {
	all := map[string]keyadmin.Key{}
	for r := (keyadmin.ListRequest{}); ; {
		page, err := w.admin.List(w.t.Context(), operator, r)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, key := range page.Keys {
			all[key.ID] = key
		}
		if r.Cursor = page.NextCursor; r.Cursor == "" {
			return all
		}
	}
}

var (
	reads  = []string{"get", "list", "audit", "check"}
	writes = []string{"create", "create", "create", "rotate", "rotate", "undo", "rename"}
	ends   = []string{"revoke", "incident"} // after too many of which nobody is left to play
)

func (w *world) step() {
	asking := w.holders[w.random.IntN(len(w.holders))]
	target := w.holders[w.random.IntN(len(w.holders))]
	actor, ok := w.actor(asking)
	if !ok {
		return
	}
	before := w.keys()
	calls := slices.Concat(reads, writes)
	if w.random.IntN(8) == 0 {
		calls = ends
	}
	what := w.pick(calls...)
	err := w.call(what, actor, asking, target)

	var forbidden *keyadmin.ForbiddenError
	switch {
	case errors.As(err, &forbidden):
		w.refused++
	case err == nil && !slices.Contains(reads, what):
		w.granted++
		if before[asking.ID].Status != keyadmin.Active {
			w.t.Errorf("%s by a key that is %s", what, before[asking.ID].Status)
		}
	}
	after := w.keys()
	for id, key := range before {
		changed := !cmp.Equal(key, after[id])
		if changed && (err != nil || slices.Contains(reads, what) || !w.inReach(asking, key)) {
			w.t.Errorf("%s by %+v (%v) changed %+v to %+v", what, asking, err, key, after[id])
		}
	}
}

// inReach is the model of who may see a key.
func (w *world) inReach(asking, target keyadmin.Key) bool {
	return asking.Account == target.Account && (asking.Environment == "production" || target.Environment == "sandbox")
}

func (w *world) call(what string, actor keyadmin.Actor, asking, target keyadmin.Key) error {
	ctx, reachable := w.t.Context(), w.inReach(asking, target)
	var err error
	switch what {
	case "create":
		request := w.request(w.pick("acme", "globex", ""))
		if w.random.IntN(2) == 0 {
			request.Environment = ""
		}
		var made keyadmin.Key
		made, _, err = w.admin.Create(ctx, actor, request)
		w.handedOut(made, asking, err)
		return err
	case "rotate":
		var made keyadmin.Key
		made, _, err = w.admin.Rotate(ctx, actor, target.ID, keyadmin.RotateRequest{Overlap: w.overlap()})
		w.handedOut(made, asking, err)
		if err == nil && rightOf(made).beyond(rightOf(target)) {
			w.t.Errorf("the successor %+v may do more than %+v", made, target)
		}
	case "undo":
		_, _, err = w.admin.UndoRotation(ctx, actor, target.ID)
	case "revoke":
		_, err = w.admin.Revoke(ctx, actor, target.ID)
	case "rename":
		_, err = w.admin.Rename(ctx, actor, target.ID, "Other "+apikey.RandomText(4))
	case "get":
		_, err = w.admin.Get(ctx, actor, target.ID)
	case "check":
		return w.check(actor, target, reachable)
	case "list":
		return w.list(actor, asking)
	case "audit":
		return w.audit(actor, asking)
	case "incident":
		_, err = w.admin.RevokeMany(ctx, actor, keyadmin.Selection{Account: target.Account, CreatedBy: "key:" + target.ID}, false)
		return err
	}
	if errors.Is(err, keyadmin.ErrNotFound) == reachable {
		var forbidden *keyadmin.ForbiddenError
		if !errors.As(err, &forbidden) { // the asking key was revoked
			w.t.Errorf("%s of %+v by %+v: %v", what, target, asking, err)
		}
	}
	return err
}

// overlap is nothing that ends while the test runs.
func (w *world) overlap() keyadmin.Overlap {
	return keyadmin.Overlap{For: time.Duration(w.random.IntN(2)) * 24 * time.Hour, OnFirstUse: w.random.IntN(2) == 0}
}

// handedOut checks a key that was handed out against the one that asked for it.
func (w *world) handedOut(made, asking keyadmin.Key, err error) {
	if err != nil {
		if made.Key != "" {
			w.t.Error("a refused call handed out a key")
		}
		return
	}
	if rightOf(made).beyond(rightOf(asking)) {
		w.t.Errorf("%+v was handed %+v", asking, made)
	}
	w.holders = append(w.holders, made)
}

func (w *world) check(actor keyadmin.Actor, target keyadmin.Key, reachable bool) error {
	checked, err := w.admin.Check(w.t.Context(), actor, target.Key.Reveal())
	if (checked.Key != nil) != reachable || !checked.WellFormed {
		w.t.Errorf("check of %+v: %+v", target, checked)
	}
	return err
}

func (w *world) list(actor keyadmin.Actor, asking keyadmin.Key) error {
	page, err := w.admin.List(w.t.Context(), actor, keyadmin.ListRequest{
		Account: w.pick("acme", "globex", ""), Environment: w.pick("production", "sandbox", ""), WithTotal: true,
	})
	if err == nil && page.NextCursor == "" && *page.Total != int64(len(page.Keys)) {
		w.t.Errorf("%d keys and a total of %d", len(page.Keys), *page.Total)
	}
	for _, key := range page.Keys {
		if !w.inReach(asking, key) || key.Key != "" {
			w.t.Errorf("%+v saw %+v", asking, key)
		}
	}
	return err
}

func (w *world) audit(actor keyadmin.Actor, asking keyadmin.Key) error {
	page, err := w.admin.Audit(w.t.Context(), actor, keyadmin.AuditRequest{Account: w.pick("acme", "globex", "")})
	for _, e := range page.Entries {
		environment := ""
		if e.Environment != nil {
			environment = *e.Environment
		}
		if e.Account == nil || *e.Account != asking.Account || asking.Environment == "sandbox" && environment != "sandbox" {
			w.t.Errorf("%+v saw %+v", asking, e)
		}
	}
	return err
}

func TestZeroActorMayDoNothing(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key := create(t, admin, request())
	var nobody keyadmin.Actor
	var forbidden *keyadmin.ForbiddenError
	if _, _, err := admin.Create(t.Context(), nobody, request()); !errors.As(err, &forbidden) {
		t.Errorf("Create: %v", err)
	}
	if _, err := admin.Revoke(t.Context(), nobody, key.ID); !errors.As(err, &forbidden) {
		t.Errorf("Revoke: %v", err)
	}
	if _, err := admin.RevokeMany(t.Context(), nobody, keyadmin.Selection{Account: "acme"}, true); !errors.As(err, &forbidden) {
		t.Errorf("RevokeMany: %v", err)
	}
	if _, err := admin.Get(t.Context(), nobody, key.ID); !errors.Is(err, keyadmin.ErrNotFound) {
		t.Errorf("Get: %v", err)
	}
	if page, err := admin.List(t.Context(), nobody, keyadmin.ListRequest{}); err != nil || len(page.Keys) != 0 {
		t.Errorf("List: %+v, %v", page, err)
	}
	if page, err := admin.Audit(t.Context(), nobody, keyadmin.AuditRequest{}); err != nil || len(page.Entries) != 0 {
		t.Errorf("Audit: %+v, %v", page, err)
	}
}

func TestPersonManagesAllKeysOfOneAccount(t *testing.T) {
	admin, _, _ := newAdmin(t)
	person, err := keyadmin.Person("ann", "acme")
	if err != nil {
		t.Fatal(err)
	}
	r := request()
	r.Account, r.ManageKeys, r.Scopes = "", true, apikey.ScopeNames()
	key, _, err := admin.Create(t.Context(), person, r)
	if err != nil || key.Account != "acme" || *key.CreatedBy != "user:ann" {
		t.Fatalf("%+v, %v", key, err)
	}
	r.Account = "globex"
	var forbidden *keyadmin.ForbiddenError
	if _, _, err := admin.Create(t.Context(), person, r); !errors.As(err, &forbidden) || forbidden.Field != "account" {
		t.Errorf("in another account: %v", err)
	}
	other := create(t, admin, r)
	if _, err := admin.Get(t.Context(), person, other.ID); !errors.Is(err, keyadmin.ErrNotFound) {
		t.Errorf("another account's: %v", err)
	}
	for _, bad := range [][2]string{{"", "acme"}, {"ann", ""}, {"ann", "rekall:canary"}, {"a\nb", "acme"}, {"ann", " acme"}} {
		if _, err := keyadmin.Person(bad[0], bad[1]); err == nil {
			t.Errorf("%q is a person", bad)
		}
	}
}

// What is out of reach and what does not exist must be one statement, or its time tells them apart. The same error is the
// least of it; the rest is that nothing is looked up before.
func TestAnotherAccountsKeyIsTheSameAsNone(t *testing.T) {
	admin, _, _ := newAdmin(t)
	person, err := keyadmin.Person("ann", "globex")
	if err != nil {
		t.Fatal(err)
	}
	there, missing := create(t, admin, request()).ID, "key_0000000000000000000000"
	calls := map[string]func(id string) error{
		"Get":    func(id string) error { _, err := admin.Get(t.Context(), person, id); return err },
		"Rename": func(id string) error { _, err := admin.Rename(t.Context(), person, id, "n"); return err },
		"Revoke": func(id string) error { _, err := admin.Revoke(t.Context(), person, id); return err },
		"Rotate": func(id string) error {
			_, _, err := admin.Rotate(t.Context(), person, id, keyadmin.RotateRequest{})
			return err
		},
		"UndoRotation": func(id string) error { _, _, err := admin.UndoRotation(t.Context(), person, id); return err },
	}
	for name, call := range calls {
		one, other := call(there), call(missing)
		if !errors.Is(one, keyadmin.ErrNotFound) || one.Error() != "no such key: "+there || other.Error() != "no such key: "+missing {
			t.Errorf("%s: %v and %v", name, one, other)
		}
	}
}

// Outside a transaction no line in the audit could stand or fall with the key.
func TestKeysAreMadeAndRevokedInATransactionOnly(t *testing.T) {
	for _, name := range []string{"Insert", "Revoke"} {
		if _, there := reflect.TypeFor[*keystore.Store]().MethodByName(name); there {
			t.Errorf("the store has %s", name)
		}
	}
}

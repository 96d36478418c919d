package keysapi_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// begin sends bytes, after which there may be more.
func begin(t *testing.T, address, request string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	return conn
}

// raw sends bytes, says that there are no more, and returns the answer.
func raw(t *testing.T, address, request string) string {
	t.Helper()
	conn := begin(t, address, request)
	defer func() { _ = conn.Close() }()
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer)
}

// Neither the answer nor what it costs tells a key of another account, or of the environment that a sandbox key has no part
// in, from one that does not exist.
func TestKeysOfOthersAreNotFoundAsIfTheyDidNotExist(t *testing.T) {
	var asked pgtest.Proxy
	r := newRigOn(t, asked.URL(t, pgtest.URL(t)), nil)
	asking := r.manager("acme", "sandbox")
	hidden := map[string]string{
		"another account's":             r.manager("other", "sandbox").ID,
		"a production key of one's own": r.manager("acme", "production").ID,
	}
	const missing = "key_0000000000000000000000"
	for _, request := range [][3]string{
		{"GET", "", ""}, {"PATCH", "", `{"name": "mine"}`}, {"DELETE", "", ""}, {"POST", "/revoke", ""}, {"POST", "/rotate", `{"overlap": "0"}`},
		{"POST", "/rotate/undo", ""}, {"GET", "/audit", ""}, {"GET", "/usage", ""},
	} {
		ask := func(id string) (body string, statements int64) {
			before := asked.Statements.Load()
			answer := r.call(request[0], path+"/"+id+request[1], by(asking), request[2])
			answer.refused(t, http.StatusNotFound, "NOT_FOUND", "")
			return strings.ReplaceAll(answer.body, answer.Header.Get("X-Request-Id"), ""), asked.Statements.Load() - before
		}
		body, statements := ask(missing)
		if statements == 0 {
			t.Fatal("no statement was counted")
		}
		for whose, id := range hidden {
			if gotBody, got := ask(id); gotBody != body || got != statements {
				t.Errorf("%s %s of %s: %d statements and %s; of none: %d and %s", request[0], request[1], whose, got, gotBody, statements, body)
			}
		}
	}
	page := r.call("GET", path, by(asking), "").keys(t)
	if len(page.Data) != 1 || page.Data[0].ID != asking.ID || *page.Pagination.TotalCount != 1 {
		t.Errorf("list %+v", page)
	}
	for _, entry := range r.call("GET", path+"/audit", by(asking), "").audit(t).Data {
		if *entry.KeyID != asking.ID {
			t.Errorf("audit %+v", entry)
		}
	}
	for whose, id := range hidden {
		if key, err := r.admin.Get(t.Context(), operator, id); err != nil || key.Status != keyadmin.Active || key.Name != "Manager" || key.Successor != nil {
			t.Errorf("%s: %+v, %v", whose, key, err)
		}
	}
}

// TestNoSequenceOfRequestsYieldsMoreThanItsCreatorHad lets keys of two accounts do all kinds of things to all keys at random.
func TestNoSequenceOfRequestsYieldsMoreThanItsCreatorHad(t *testing.T) {
	r := newRig(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var askers []keyadmin.Key // with the keys themselves
	ids := []string{"key_0000000000000000000000"}
	add := func(key keyadmin.Key) { askers, ids = append(askers, key), append(ids, key.ID) }
	for _, account := range []string{"acme", "other"} {
		add(r.manager(account, "production", "memories:read", "memories:write", "hives:read"))
		add(r.manager(account, "sandbox", "memories:read", "entities:read"))
	}
	some := func() []string {
		var scopes []string
		for range 1 + random.IntN(3) {
			scopes = append(scopes, []string{"memories:read", "memories:write", "hives:read", "entities:read", "agents:write"}[random.IntN(5)])
		}
		return scopes
	}
	pick := func(texts ...string) string { return texts[random.IntN(len(texts))] }
	statuses := map[int]int{}
	for range 600 {
		asker, id := askers[random.IntN(len(askers))], ids[random.IntN(len(ids))]
		one := path + "/" + id
		var answer reply
		switch pick("create", "create", "create", "rotate", "rotate", "undo", "rename", "revoke", "get", "list") {
		case "create":
			answer = r.ask("POST", path, by(asker), fmt.Sprintf(`{"name": "k", "scopes": ["%s"]%s%s}`, strings.Join(some(), `","`),
				pick("", `, "environment": "production"`, `, "environment": "sandbox"`), pick("", `, "manage_keys": true`, `, "manageKeys": true`)))
		case "rotate":
			answer = r.ask("POST", one+"/rotate", by(asker), fmt.Sprintf(`{"overlap": %q}`, pick("0", "1h", "on-first-use")))
		case "undo":
			answer = r.ask("POST", one+"/rotate/undo", by(asker), "")
		case "rename":
			answer = r.ask("PATCH", one, by(asker), `{"name": "renamed"}`)
		case "revoke":
			if random.IntN(6) > 0 { // or soon nobody is left
				continue
			}
			answer = r.ask("DELETE", one, by(asker), "")
		case "get":
			answer = r.ask("GET", one, by(asker), "")
		case "list":
			answer = r.ask("GET", path, by(asker), "")
			if answer.StatusCode == http.StatusOK {
				for _, key := range answer.keys(t).Data {
					within(t, asker, key)
				}
			}
			continue
		}
		statuses[answer.StatusCode]++
		if answer.StatusCode >= 400 {
			continue
		}
		got := answer.object(t, answer.StatusCode)
		within(t, asker, got.Key)
		if got.Key.Key != "" {
			if have, err := apikey.ParseScopes(asker.Scopes); err != nil || !have.Has(apikey.KnownScopes(got.Scopes)) {
				t.Errorf("a key with %v got one with %v", asker.Scopes, got.Scopes)
			}
			if environment, err := apikey.Parse(got.Key.Key.Reveal()); err != nil || environment.String() != got.Environment {
				t.Errorf("a key of %s that says %s", environment, got.Environment)
			}
			add(got.Key)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%v, %d keys", statuses, len(askers))
	for _, status := range []int{200, 201, 403, 404, 409} {
		if statuses[status] == 0 {
			t.Errorf("nothing was answered %d: %v", status, statuses)
		}
	}
	// The same once more of what is in the database, by who made it.
	for _, key := range askers {
		creator, byKey := strings.CutPrefix(*key.CreatedBy, "key:")
		if !byKey {
			continue
		}
		i := slices.IndexFunc(askers, func(k keyadmin.Key) bool { return k.ID == creator })
		if i < 0 {
			t.Fatalf("%s was made by %s, which nobody has", key.ID, creator)
		}
		stored, err := r.admin.Get(t.Context(), operator, key.ID)
		if err != nil {
			t.Fatal(err)
		}
		within(t, askers[i], stored)
		for _, scope := range stored.Scopes {
			if !slices.Contains(askers[i].Scopes, scope) {
				t.Errorf("%s has %s, its maker %v", key.ID, scope, askers[i].Scopes)
			}
		}
	}
}

// within wants a key to be one that the asker may know of.
func within(t *testing.T, asker, key keyadmin.Key) {
	t.Helper()
	if key.Account != asker.Account || asker.Environment == "sandbox" && key.Environment != "sandbox" {
		t.Errorf("a %s key of %s reached a %s key of %s", asker.Environment, asker.Account, key.Environment, key.Account)
	}
}

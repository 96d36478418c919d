package keyadmin_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

const importHeader = "hash,account,name,environment,scopes,manage_keys,created_at,expires_at,hint\n"

func importText(t *testing.T, admin *keyadmin.Admin, text string, options keyadmin.ImportOptions) (keyadmin.Imported, error) {
	t.Helper()
	return admin.Import(t.Context(), operator, strings.NewReader(text), options)
}

// csvLine is a line for a key, with hash and hint left to the caller.
func csvLine(key string, rest string) string {
	return fmt.Sprintf("%x,%s\n", sha256.Sum256([]byte(key)), rest)
}

const goodRest = `acme,Old Backend,production,memories:read memories:write,false,2020-01-02T03:04:05Z,2039-01-01T00:00:00Z,a1B2`

// TestFileThatCannotBeReadIsNotSaidToBeBad: who is told that its first line is wrong looks for what is not there.
func TestFileThatCannotBeReadIsNotSaidToBeBad(t *testing.T) {
	admin, _, _ := newAdmin(t)
	for _, format := range []string{"csv", "jsonl"} {
		_, err := admin.Import(t.Context(), operator, iotest.ErrReader(errors.New("is a directory")), keyadmin.ImportOptions{Format: format})
		var bad *keyadmin.ImportError
		if err == nil || !strings.Contains(err.Error(), "is a directory") || errors.As(err, &bad) {
			t.Errorf("%s: %v", format, err)
		}
	}
}

func TestImportedKeyWorksAsTheFileSays(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	secret := apikey.Generate(apikey.Production)
	for format, text := range map[string]string{
		"csv": "\ufeff" + importHeader + csvLine(secret, goodRest),
		"jsonl": fmt.Sprintf(`{"hash":"%X","account":"acme","name":"Old Backend","environment":"production","scopes":["memories:read","memories:write"],`+
			`"created_at":"2020-01-02T03:04:05Z","expires_at":"2039-01-01T00:00:00Z","hint":"a1B2"}`, sha256.Sum256([]byte(secret))),
	} {
		done, err := importText(t, admin, text, keyadmin.ImportOptions{Format: format})
		if err != nil || done.Imported+done.AlreadyThere != 1 {
			t.Fatalf("%s: %+v, %v", format, done, err)
		}
	}
	found, err := store.Lookup(t.Context(), []apikey.Digest{apikey.Hash(secret)})
	if err != nil || len(found.Records) != 1 || found.Records[0].Validity(found.Now) != apikey.Allowed ||
		found.Records[0].Scopes != apikey.MemoriesRead|apikey.MemoriesWrite {
		t.Fatalf("found %+v, %v", found.Records, err)
	}
	key, err := admin.Get(t.Context(), operator, found.Records[0].ID)
	if err != nil || key.Name != "Old Backend" || key.CreatedAt.Year() != 2020 || key.Masked != "rk_…a1B2" || *key.CreatedBy != operator.String() {
		t.Errorf("key %+v, %v", key, err)
	}
	if strings.Contains(contents(t, databaseURL), secret[len(apikey.ProductionPrefix):]) {
		t.Error("the database holds the key")
	}
}

func TestPlainKeysAreImportedOnlyOnRequestAndNeverKept(t *testing.T) {
	admin, store, databaseURL := newAdmin(t)
	secret, other := apikey.Generate(apikey.Sandbox), apikey.Generate(apikey.Sandbox)
	csv := "key,account,name,scopes\n" + secret + ",acme,Old,memories:read\n"
	jsonl := fmt.Sprintf(`{"key":%q,"account":"acme","name":"Old","scopes":"memories:read"}`+"\n", other)
	for format, text := range map[string]string{"csv": csv, "jsonl": jsonl} {
		if _, err := importText(t, admin, text, keyadmin.ImportOptions{Format: format}); err == nil || !strings.Contains(err.Error(), "plain keys") || apikey.ContainsKey(err.Error()) {
			t.Errorf("%s without the flag: %v", format, err)
		}
		if _, err := importText(t, admin, text, keyadmin.ImportOptions{Format: format, PlainKeys: true}); err != nil {
			t.Errorf("%s: %v", format, err)
		}
	}
	found, err := store.Lookup(t.Context(), []apikey.Digest{apikey.Hash(secret), apikey.Hash(other)})
	if err != nil || len(found.Records) != 2 || found.Records[0].Environment != apikey.Sandbox || found.Records[1].Environment != apikey.Sandbox {
		t.Errorf("found %+v, %v", found.Records, err)
	}
	stored := contents(t, databaseURL)
	for _, s := range []string{secret, other} {
		if strings.Contains(stored, s[len(apikey.SandboxPrefix):]) {
			t.Error("the database holds a plain key")
		}
	}
}

func TestOneBadLineImportsNothingAndIsNamedWithoutBeingQuoted(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	good, secret := csvLine("good", goodRest), apikey.Generate(apikey.Production)
	with := func(old, new string) string { return csvLine("bad", strings.Replace(goodRest, old, new, 1)) }
	for _, test := range []struct{ line, want string }{
		{with("acme", ""), "account must have 1 to 200 characters"},
		{with("acme", "rekall:canary"), "account must not be the one that canaries have"},
		{with("acme", "ac\u202eme"), "account must have a visible character"},
		{with("Old Backend", "\u200b"), "name must have a visible character"},
		{with("Old Backend", secret), "name must not contain an API key"},
		{with("production", "live"), "environment must be production or sandbox"},
		{with("memories:read memories:write", ""), "scopes must name at least one"},
		{with("memories:write", secret), "scopes has an unknown scope"},
		{with("false", "maybe"), "manage_keys must be true or false"},
		{with("2020-01-02T03:04:05Z", "yesterday"), "created_at must be a time"},
		{with("2020-01-02T03:04:05Z", "2039-01-02T03:04:05Z"), "created_at must not be in the future"},
		{with("2039-01-01T00:00:00Z", "9999-12-31T00:00:00Z"), "expires_at must be from 1970 to 9998"},
		{with("a1B2", "a1B2c"), "hint must be the last four characters"},
		{secret + "," + goodRest + "\n", "hash must be 64 hexadecimal digits"},
		{csvLine("bad", goodRest+",more"), "must have 9 fields"},
		{csvLine("bad", `"`+secret), "is not CSV"},
		{good, "hash is the same as on line 2"},
	} {
		_, err := importText(t, admin, importHeader+good+test.line, keyadmin.ImportOptions{Format: "csv"})
		var bad *keyadmin.ImportError
		if !errors.As(err, &bad) || bad.Total != 1 || bad.Lines[0].Line < 3 || !strings.Contains(bad.Lines[0].String(), test.want) {
			t.Errorf("got %v, want %s", err, test.want)
		}
		if err != nil && apikey.ContainsKey(err.Error()) {
			t.Errorf("the error shows a key: %v", err)
		}
	}
	for _, line := range []string{`{"hash":`, `[]`, `{"key":"` + secret + `"`, `{"` + secret + `":1}`, `{} {}`, `{"scopes":1}`,
		`{"account":"acme","account":"other"}`, `{"Manage_Keys":true}`, `{"scopes":[],"\u0073copes":[]}`, strings.Repeat("x", 70_000)} {
		_, err := importText(t, admin, "\n"+line+"\n", keyadmin.ImportOptions{Format: "jsonl", PlainKeys: true})
		var bad *keyadmin.ImportError
		if !errors.As(err, &bad) || bad.Lines[0].Line != 2 || bad.Lines[0].Field != "" || apikey.ContainsKey(err.Error()) {
			t.Errorf("%.60q: %v", apikey.Redact(line), err)
		}
	}
	for _, broken := range []string{"\xff", `\ud800`} {
		for _, field := range []string{"account", "name"} {
			line := strings.Replace(`{"hash":"`+strings.Repeat("ab", 32)+`","account":"acme","name":"Backend","environment":"production","scopes":["memories:read"]}`,
				`"`+field+`":"`, `"`+field+`":"`+broken, 1)
			_, err := importText(t, admin, line, keyadmin.ImportOptions{Format: "jsonl"})
			var bad *keyadmin.ImportError
			if !errors.As(err, &bad) || bad.Lines[0].Field != field {
				t.Errorf("%q: %v", line, err)
			}
		}
	}
	for _, header := range []string{"", "hash,color\n", "hash,hash\n", "key\n", secret + "\n"} {
		_, err := importText(t, admin, header, keyadmin.ImportOptions{Format: "csv"})
		var bad *keyadmin.ImportError
		if !errors.As(err, &bad) || apikey.ContainsKey(err.Error()) {
			t.Errorf("header %.10q: %v", header, err)
		}
	}
	if strings.Contains(contents(t, databaseURL), "key_") {
		t.Error("something was imported")
	}
}

// An empty stream is what a command before the pipe leaves that has failed.
func TestImportOfNothingIsAnError(t *testing.T) {
	admin, _, _ := newAdmin(t)
	for _, format := range []string{"csv", "jsonl"} {
		for _, text := range []string{"", "\n \n"} {
			var bad *keyadmin.ImportError
			if done, err := importText(t, admin, text, keyadmin.ImportOptions{Format: format}); !errors.As(err, &bad) || bad.Total != 1 {
				t.Errorf("%s %q: %+v, %v", format, text, done, err)
			}
		}
	}
}

func TestLineWithAKeyMustNotContradictIt(t *testing.T) {
	admin, _, _ := newAdmin(t)
	key := apikey.Generate(apikey.Production)
	for _, test := range []struct{ fields, want string }{
		{fmt.Sprintf(`"key":%q,"hash":"%064d"`, key, 0), "hash must be left out"},
		{fmt.Sprintf(`"key":%q,"environment":"sandbox"`, key), "environment contradicts the prefix"},
		{fmt.Sprintf(`"key":%q`, key[:len(key)-1]), "key is not a key"},
	} {
		line := `{"account":"acme","name":"Old","scopes":"memories:read",` + test.fields + "}\n"
		_, err := importText(t, admin, line, keyadmin.ImportOptions{Format: "jsonl", PlainKeys: true})
		if err == nil || !strings.Contains(err.Error(), test.want) || apikey.ContainsKey(err.Error()) {
			t.Errorf("got %v, want %s", err, test.want)
		}
	}
}

func TestImportNamesTheFirstBadLinesAndCountsTheRest(t *testing.T) {
	admin, _, _ := newAdmin(t)
	text := importHeader + strings.Repeat("none,"+goodRest+"\n", 50) + csvLine("good", goodRest)
	_, err := importText(t, admin, text, keyadmin.ImportOptions{Format: "csv"})
	var bad *keyadmin.ImportError
	if !errors.As(err, &bad) || bad.Total != 50 || len(bad.Lines) != 20 || bad.Lines[19].Line != 21 {
		t.Errorf("got %+v", bad)
	}
}

func TestRepeatedImportAddsNothingAndContradictionIsAnError(t *testing.T) {
	admin, _, _ := newAdmin(t)
	first := importHeader + csvLine("one", goodRest) + csvLine("two", goodRest)
	options := keyadmin.ImportOptions{Format: "csv"}
	dry := options
	dry.DryRun = true
	if done, err := importText(t, admin, first, dry); err != nil || done != (keyadmin.Imported{Imported: 2}) {
		t.Fatalf("dry run: %+v, %v", done, err)
	}
	if done, err := importText(t, admin, first, options); err != nil || done != (keyadmin.Imported{Imported: 2}) {
		t.Fatalf("first: %+v, %v", done, err)
	}
	// What happened to a key since must not stand in the way of importing the rest.
	page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{})
	if err != nil || len(page.Keys) != 2 {
		t.Fatalf("%+v, %v", page, err)
	}
	if _, err := admin.Rename(t.Context(), operator, page.Keys[0].ID, "New Backend"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := admin.Rotate(t.Context(), operator, page.Keys[0].ID, keyadmin.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	if done, err := importText(t, admin, first+csvLine("three", goodRest), options); err != nil || done != (keyadmin.Imported{Imported: 1, AlreadyThere: 2, Ended: 1}) {
		t.Errorf("again: %+v, %v", done, err)
	}
	for _, change := range [][2]string{
		{"acme", "other"}, {"production", "sandbox"}, {"memories:write", "memories:delete"}, {"false", "true"}, {"2039", "2038"},
	} {
		contradiction := importHeader + csvLine("four", goodRest) + csvLine("one", strings.Replace(goodRest, change[0], change[1], 1))
		_, err := importText(t, admin, contradiction, options)
		var bad *keyadmin.ImportError
		if !errors.As(err, &bad) || bad.Total != 1 || bad.Lines[0].Line != 3 || bad.Lines[0].Field != "hash" {
			t.Errorf("%v: %v", change, err)
		}
	}
	if page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{}); err != nil || len(page.Keys) != 4 {
		t.Errorf("%d keys, %v", len(page.Keys), err)
	}
}

func TestImportCountsTheKeysThatHaveEndedAndRevivesNone(t *testing.T) {
	admin, _, _ := newAdmin(t)
	expired := strings.Replace(goodRest, "2039", "2009", 1)
	text := importHeader + csvLine("one", goodRest) + csvLine("two", goodRest) + csvLine("three", expired)
	options := keyadmin.ImportOptions{Format: "csv"}
	if done, err := importText(t, admin, text, options); err != nil || done != (keyadmin.Imported{Imported: 3}) {
		t.Fatalf("first: %+v, %v", done, err)
	}
	page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{Status: string(keyadmin.Active)})
	if err != nil || len(page.Keys) != 2 {
		t.Fatalf("%+v, %v", page, err)
	}
	if _, err := admin.Revoke(t.Context(), operator, page.Keys[0].ID); err != nil {
		t.Fatal(err)
	}
	for _, options.DryRun = range []bool{true, false} {
		if done, err := importText(t, admin, text, options); err != nil || done != (keyadmin.Imported{AlreadyThere: 3, Ended: 2}) {
			t.Errorf("again: %+v, %v", done, err)
		}
	}
	if page, err := admin.List(t.Context(), operator, keyadmin.ListRequest{Status: string(keyadmin.Active)}); err != nil || len(page.Keys) != 1 {
		t.Errorf("%d keys live, %v", len(page.Keys), err)
	}
}

func TestOnlyAnOperatorImports(t *testing.T) {
	admin, _, _ := newAdmin(t)
	person, err := keyadmin.Person("ann", "acme")
	if err != nil {
		t.Fatal(err)
	}
	for _, actor := range []keyadmin.Actor{person, {}} {
		_, err := admin.Import(t.Context(), actor, strings.NewReader(importHeader+csvLine("one", goodRest)), keyadmin.ImportOptions{Format: "csv"})
		var forbidden *keyadmin.ForbiddenError
		if !errors.As(err, &forbidden) {
			t.Errorf("%s: %v", actor, err)
		}
	}
}

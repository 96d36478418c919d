package keyadmin_test

import (
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// All keys of one transaction have the same creation time, so the time alone is no place in the list. The default page
// size cuts this one in three.
func TestListNeitherLosesNorRepeatsKeysCreatedAtOnce(t *testing.T) {
	admin, _, databaseURL := newAdmin(t)
	const keys = 250
	pgtest.Exec(t, databaseURL, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(i::text, 22, '0'), case when i % 5 = 0 then 'fifth' else 'other' end, 'Key', 'sandbox',
			sha256(i::text::bytea), '{}'
		from generate_series(1, $1::int) i`, keys)
	for _, test := range []struct {
		account            string
		limit, want, pages int
	}{
		{"", 0, keys, 3}, {"", 100, keys, 3}, {"", 50, keys, 5}, {"", 7, keys, 36}, {"fifth", 0, keys / 5, 1},
		{"fifth", 50, keys / 5, 1}, {"fifth", 49, keys / 5, 2}, {"none", 0, 0, 1}, {"fif", 0, 0, 1},
	} {
		seen := map[string]bool{}
		pages := 0
		for r := (keyadmin.ListRequest{Account: test.account, Limit: test.limit}); ; {
			page, err := admin.List(t.Context(), operator, r)
			if err != nil {
				t.Fatal(err)
			}
			pages++
			for _, key := range page.Keys {
				if seen[key.ID] || test.account != "" && key.Account != test.account {
					t.Errorf("%+v: repeated or of another account: %+v", test, key)
				}
				seen[key.ID] = true
			}
			if page.NextCursor == "" || pages > keys {
				break
			}
			r.Cursor = page.NextCursor
		}
		if len(seen) != test.want || pages != test.pages {
			t.Errorf("%+v: %d keys in %d pages", test, len(seen), pages)
		}
	}
}

// A key that is created while someone reads the list must not push another over the edge of a page.
func TestListKeepsItsPlaceWhileKeysAreCreated(t *testing.T) {
	admin, _, _ := newAdmin(t)
	want := map[string]bool{}
	for range 5 {
		want[create(t, admin, request()).ID] = true
	}
	for r := (keyadmin.ListRequest{Limit: 2}); ; {
		page, err := admin.List(t.Context(), operator, r)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range page.Keys {
			if !want[key.ID] {
				t.Errorf("%s: repeated, or newer than the first page", key.ID)
			}
			delete(want, key.ID)
		}
		if page.NextCursor == "" {
			break
		}
		r.Cursor = page.NextCursor
		create(t, admin, request())
	}
	if len(want) != 0 {
		t.Errorf("lost %v", want)
	}
}

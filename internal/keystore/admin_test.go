package keystore_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestInsertReturnsTheStoredRow(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := newKey()
	row, err := store.Insert(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if row.ID != key.ID || row.Account != key.Account || row.Name != key.Name || row.Environment != "sandbox" ||
		row.Hint != key.Hint || !slices.Equal(row.Scopes, key.Scopes.Names()) || row.ExpiresAt != nil || row.RevokedAt != nil {
		t.Errorf("row %+v of %+v", row, key)
	}
	got, err := store.Get(t.Context(), keystore.Everything(), key.ID)
	if err != nil || got.ID != row.ID || !got.CreatedAt.Equal(row.CreatedAt) {
		t.Errorf("got %+v, %v", got, err)
	}
}

// Creation and expiry are the same reading of one clock: the difference is exact only if that clock is Postgres's.
func TestExpiryIsComputedByPostgres(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	for _, lifetime := range []time.Duration{time.Microsecond, 90 * 24 * time.Hour, 3650 * 24 * time.Hour} {
		key := newKey()
		key.Lifetime = lifetime
		row, err := store.Insert(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if got := row.ExpiresAt.Sub(row.CreatedAt); got != lifetime {
			t.Errorf("lifetime %v, want %v", got, lifetime)
		}
	}
}

func TestErrorsShowNoArguments(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	const private = "Project Nightfall"
	for _, name := range []string{private + "\n", private + "\x00", private + "\xff"} {
		key := newKey()
		key.Name = name
		if _, err := store.Insert(t.Context(), key); err == nil || strings.Contains(fmt.Sprintf("%v %+v", err, err), private) {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

func TestKeyWithoutHintIsStoredAsNull(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := newKey()
	key.Hint = ""
	if row, err := store.Insert(t.Context(), key); err != nil || row.Hint != "" {
		t.Fatalf("row %+v, %v", row, err)
	}
	var null bool
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select hint is null from rekall.api_keys`).Scan(&null); err != nil || !null {
		t.Errorf("null %v, %v", null, err)
	}
}

func TestUnknownIDIsNoRow(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	if _, err := store.Get(t.Context(), keystore.Everything(), newKey().ID); !errors.Is(err, keystore.ErrNoRow) {
		t.Errorf("Get: %v", err)
	}
	if _, revoked, err := store.Revoke(t.Context(), keystore.Everything(), newKey().ID); revoked || !errors.Is(err, keystore.ErrNoRow) {
		t.Errorf("Revoke: %v, %v", revoked, err)
	}
}

func TestOneOfManyRevokesRevokes(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := insert(t, store)
	var wg sync.WaitGroup
	var winners atomic.Int32
	times := make(chan time.Time, 8)
	for range cap(times) {
		wg.Go(func() {
			row, revoked, err := store.Revoke(t.Context(), keystore.Everything(), key.ID)
			if err != nil {
				t.Error(err)
				return
			}
			if revoked {
				winners.Add(1)
			}
			times <- *row.RevokedAt
		})
	}
	wg.Wait()
	close(times)
	if winners.Load() != 1 {
		t.Errorf("%d calls revoked the key", winners.Load())
	}
	first := <-times
	for at := range times {
		if !at.Equal(first) {
			t.Errorf("revoked at %v and at %v", first, at)
		}
	}
}

func TestListPagesAreCompleteThoughCreatedAtOnce(t *testing.T) {
	databaseURL := database(t)
	pgtest.Exec(t, databaseURL, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(i::text, 22, '0'), case when i % 2 = 0 then 'even' else 'odd' end, 'Key', 'sandbox', sha256(i::text::bytea), '{}'
		from generate_series(1, 50) i`)
	store := open(t, databaseURL, keystore.Options{})
	for account, want := range map[string]int{"": 50, "even": 25, "none": 0} {
		seen := map[string]bool{}
		for after := (keystore.Position{}); ; {
			reach := keystore.Within(account, "")
			if account == "" {
				reach = keystore.Everything()
			}
			page, err := store.List(t.Context(), reach, keystore.Filter{}, after, 7)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) == 0 {
				break
			}
			for _, row := range page {
				if seen[row.ID] || account != "" && row.Account != account {
					t.Errorf("account %q: row %+v", account, row)
				}
				seen[row.ID] = true
			}
			last := page[len(page)-1]
			after = keystore.Position{CreatedAt: last.CreatedAt, ID: last.ID}
		}
		if len(seen) != want {
			t.Errorf("account %q: %d keys, want %d", account, len(seen), want)
		}
	}
}

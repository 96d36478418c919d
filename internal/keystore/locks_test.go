package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// rotated makes a key, its successor whose first use is awaited, and a key beside them, and returns their ids. In the table
// and by their times of creation the successor comes first and the old key last, so that nothing but a lock order helps.
func rotated(t *testing.T, databaseURL string, oldNumber, nextNumber int) (old, next, beside string) {
	t.Helper()
	id := func(number int) string { return fmt.Sprintf("key_%022d", number) }
	old, next, beside = id(oldNumber), id(nextNumber), id(5)
	pgtest.Exec(t, databaseURL, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_at, predecessor, overlap_on_first_use)
		values ($1, 'acme', 'Backend', 'sandbox', sha256('next'), '{}', now(), $3, '1 day'),
			($2, 'acme', 'Backend', 'sandbox', sha256('beside'), '{}', now() - interval '1 day', null, null),
			($3, 'acme', 'Backend', 'sandbox', sha256('old'), '{}', now() - interval '2 days', null, null)`, next, beside, old)
	return old, next, beside
}

func TestMassRevocationAndFirstUseLockKeysInOneOrder(t *testing.T) {
	for name, numbers := range map[string][2]int{"old key first": {1, 9}, "successor first": {9, 1}} {
		t.Run(name, func(t *testing.T) {
			databaseURL := database(t)
			store := open(t, databaseURL, keystore.Options{})
			old, next, beside := rotated(t, databaseURL, numbers[0], numbers[1])

			held := connect(t, databaseURL)
			exec(t, held, `begin`)
			exec(t, held, `select from rekall.api_keys where id = $1 for update`, beside)
			done := make(chan error, 2)
			go func() { // holds the first of the keys, and waits for the one beside
				done <- store.ChangeOnce(t.Context(), func(tx *keystore.Tx) error {
					_, err := tx.RevokeSelected(t.Context(), keystore.Within("acme", ""), keystore.Selection{}, "cli:test", map[string]any{})
					return err
				})
			}()
			pgtest.AwaitBlocked(t, databaseURL, 1)
			used := connect(t, databaseURL)
			go func() { // without the second attempt that a flush has
				_, err := used.Exec(t.Context(), `insert into rekall.last_used (key_id, first_used_at, last_used_at) values ($1, now(), now())`, next)
				done <- err
			}()
			pgtest.AwaitBlocked(t, databaseURL, 2)
			exec(t, held, `rollback`)
			if err := errors.Join(<-done, <-done); err != nil {
				t.Fatal(err)
			}
			for _, id := range []string{old, next, beside} {
				row, err := store.Get(t.Context(), keystore.Everything(), id)
				if err != nil || row.RevokedAt == nil || row.GraceStartedAt != nil {
					t.Errorf("%+v, %v", row, err)
				}
			}
		})
	}
}

// Undoing a rotation locks the old key and then its successor: in the other order where the successor's id is the lower.
func TestUndoneRotationAndFirstUseThatDeadlockAreBothDone(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	old, next, _ := rotated(t, databaseURL, 9, 1)
	flushed := make(chan error, 1)
	attempts := 0
	err := store.Change(t.Context(), func(tx *keystore.Tx) error {
		if _, err := tx.Lock(t.Context(), keystore.Everything(), old); err != nil {
			return err
		}
		if attempts++; attempts == 1 {
			go func() {
				flushed <- store.FlushUsage(context.WithoutCancel(t.Context()), flushOf(instance(), 1, anHour, counts(next, 1, 0, 1)))
			}()
			pgtest.AwaitBlocked(t, databaseURL, 1)
		}
		if _, _, err := tx.Revoke(t.Context(), keystore.Everything(), next); err != nil {
			return err
		}
		return tx.Detach(t.Context(), next)
	})
	if err := errors.Join(err, <-flushed); err != nil {
		t.Fatal(err)
	}
	row, err := store.GetUsed(t.Context(), keystore.Everything(), next)
	if err != nil || row.RevokedAt == nil || row.Predecessor != "" || row.LastUsedAt == nil {
		t.Errorf("%+v, %v", row, err)
	}
}

var isolationLevels = []string{"read committed", "repeatable read", "serializable"}

// isolate makes a level the default of all connections to come.
func isolate(t *testing.T, databaseURL, level string) {
	t.Helper()
	pgtest.Exec(t, databaseURL, fmt.Sprintf(`do $$ begin
		execute format('alter database %%I set default_transaction_isolation = %%L', current_database(), '%s');
	end $$`, level))
}

func TestChangesThatWaitForEachOtherAreAllMadeWhateverIsolationIsTheDefault(t *testing.T) {
	for _, level := range isolationLevels {
		databaseURL := database(t)
		isolate(t, databaseURL, level)
		store := open(t, databaseURL, keystore.Options{})
		key := insert(t, store)
		waited := make(chan error, 1)
		err := store.ChangeOnce(t.Context(), func(tx *keystore.Tx) error {
			if _, _, err := tx.Rename(t.Context(), keystore.Everything(), key.ID, "first"); err != nil {
				return err
			}
			go func() {
				waited <- store.Change(context.WithoutCancel(t.Context()), func(tx *keystore.Tx) error {
					row, err := tx.Lock(t.Context(), keystore.Everything(), key.ID)
					if err == nil && row.Name != "first" {
						t.Errorf("%s: what was locked is read as it was before: %q", level, row.Name)
					}
					return err
				})
			}()
			pgtest.AwaitBlocked(t, databaseURL, 1)
			return nil
		})
		if err := errors.Join(err, <-waited); err != nil {
			t.Errorf("%s: %v", level, err)
		}
	}
}

// Edges wait for each other: for a key that several of them count, a chore, or a row that another removes.
func TestWhatEdgesWriteDoesNotFailForWaitingWhateverIsolationIsTheDefault(t *testing.T) {
	const instance, edge = "0123456789abcdefABCDEF", `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, seen_at, beat)
		values ('0123456789abcdefABCDEF', 'north', 'eu', 'v1', '30s', now(), now() - interval '1 day', 1)`
	signingKey := keystore.SigningKey{ID: strings.Repeat("a", 43)}
	for i, level := range slices.Concat(isolationLevels, isolationLevels) {
		databaseURL := database(t)
		isolate(t, databaseURL, level)
		mode := []string{"cache_statement", "exec"}[i/len(isolationLevels)] // the latter behind PgBouncer
		store := open(t, databaseURL+"&default_query_exec_mode="+mode, keystore.Options{})
		other := connect(t, databaseURL)
		for _, write := range []struct {
			name   string
			before string // that is there
			others string // that the other edge does meanwhile
			do     func(context.Context) error
		}{
			{
				"flush usage", ``, `insert into rekall.usage (key_id, hour, outcome, count) values ('key_0123456789abcdefABCDEF', '2026-03-01 12:00Z', 'revoked', 1)`,
				func(ctx context.Context) error {
					return store.FlushUsage(ctx, flushOf(instance, 1, anHour, counts("key_0123456789abcdefABCDEF", 0, 1, 0)))
				},
			},
			{
				"claim a chore", ``, `insert into rekall.usage_chores (name) values ('chore')`,
				func(ctx context.Context) error { return second(store.ClaimChore(ctx, "chore", time.Minute)) },
			},
			{
				"add a spike", ``, `insert into rekall.spikes (key_id, hour, threshold) values ('key_0123456789abcdefABCDEF', '2026-03-01 12:00Z', 1)`,
				func(ctx context.Context) error {
					return second(store.AddSpike(ctx, keystore.Spike{KeyID: "key_0123456789abcdefABCDEF", Hour: anHour, Threshold: 1}))
				},
			},
			{
				"forget usage", `insert into rekall.usage (key_id, hour, outcome, count) values ('key_0123456789abcdefABCDEF', '2000-01-01', 'revoked', 1)`,
				`delete from rekall.usage`,
				func(ctx context.Context) error { return second(store.ForgetUsage(ctx, time.Hour, 1)) },
			},
			{
				"report an edge", ``, edge,
				func(ctx context.Context) error {
					return second(store.ReportEdge(ctx, keystore.Edge{Instance: instance, Name: "north", MaxStaleness: time.Second, Beat: 1}))
				},
			},
			{
				"publish signing keys", ``,
				`insert into rekall.signing_keys (id, public_key, instance, expires_at) values (repeat('a', 43), sha256(''), repeat('a', 22), now())`,
				func(ctx context.Context) error {
					return store.PublishSigningKeys(ctx, instance, []keystore.SigningKey{signingKey}, time.Hour)
				},
			},
		} {
			exec(t, other, write.before)
			exec(t, other, `begin isolation level read committed`)
			exec(t, other, write.others)
			done := make(chan error, 1)
			go func() { done <- write.do(context.WithoutCancel(t.Context())) }()
			pgtest.AwaitBlocked(t, databaseURL, 1)
			exec(t, other, `commit`)
			if err := <-done; err != nil {
				t.Errorf("%s, %s: %s: %v", level, mode, write.name, err)
			}
		}
	}
}

// TestCanaryIsMadeThoughAnotherEdgeLeavesItsOwnOpen: it may have been taken over, and all others' measurements would end.
func TestCanaryIsMadeThoughAnotherEdgeLeavesItsOwnOpen(t *testing.T) {
	databaseURL := pgtest.Migrated(t)
	store, other := open(t, databaseURL, keystore.Options{}), connect(t, databaseURL)
	exec(t, other, `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes, created_at, revoked_at)
		select 'key_' || lpad(n::text, 22, '0'), 'rekall:canary', 'Canary', 'sandbox', sha256(n::text::bytea), '{}', now() - interval '1 day',
			case n when 1 then now() - interval '1 day' end from generate_series(1, 2) n`)
	exec(t, other, `begin`)
	exec(t, other, `select rekall.create_canary()`)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id, err := store.CreateCanary(ctx)
	if err != nil || id == "" {
		t.Fatalf("%q, %v", id, err)
	}
	exec(t, other, `rollback`)
	if err := store.RevokeCanary(ctx, id); err != nil {
		t.Error(err)
	}
	if _, err := store.CreateCanary(ctx); err != nil {
		t.Error(err)
	}
	var left, alive int
	if err := other.QueryRow(t.Context(), `select count(*) filter (where created_at < now() - interval '1 hour'),
		count(*) filter (where created_at < now() - interval '1 hour' and revoked_at is null) from rekall.api_keys`).Scan(&left, &alive); err != nil {
		t.Fatal(err)
	}
	if left != 1 || alive != 0 {
		t.Errorf("%d old canaries are left, of which %d are alive, once nobody locks them", left, alive)
	}
}

func second[T any](_ T, err error) error { return err }

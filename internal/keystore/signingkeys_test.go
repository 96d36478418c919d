package keystore_test

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func newSigningKey() keystore.SigningKey {
	var key keystore.SigningKey
	rand.Read(key.PublicKey[:])
	key.ID = base64.RawURLEncoding.EncodeToString(key.PublicKey[:])
	return key
}

func publish(t *testing.T, store *keystore.Store, lease time.Duration, keys ...keystore.SigningKey) {
	t.Helper()
	if err := store.PublishSigningKeys(t.Context(), apikey.RandomText(22), keys, lease); err != nil {
		t.Fatal(err)
	}
}

func wantSigningKeys(t *testing.T, store *keystore.Store, want ...keystore.SigningKey) {
	t.Helper()
	got, err := store.SigningKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSigningKeysOfAllEdgesAreReadUntilTheirLeaseEnds(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	first, next, others := newSigningKey(), newSigningKey(), newSigningKey()
	publish(t, store, time.Hour, first)
	publish(t, store, time.Hour, others)
	publish(t, store, time.Hour, first, next)
	wantSigningKeys(t, store, first, others, next)

	pgtest.Exec(t, databaseURL, `update rekall.signing_keys set expires_at = now()`)
	wantSigningKeys(t, store, []keystore.SigningKey{}...)
	publish(t, store, time.Hour, first) // renewed by an edge that was cut off; the others' rows go
	wantSigningKeys(t, store, first)
	var rows int
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select count(*) from rekall.signing_keys`).Scan(&rows); err != nil || rows != 1 {
		t.Errorf("%d rows are left, %v", rows, err)
	}
}

func TestSigningKeysWorkBehindPgBouncer(t *testing.T) {
	store := open(t, database(t)+"&default_query_exec_mode=exec", keystore.Options{})
	key := newSigningKey()
	publish(t, store, time.Hour, key)
	wantSigningKeys(t, store, key)
}

func TestSigningKeysOfADatabaseThatIsNotMigratedSayWhatToRun(t *testing.T) {
	store := open(t, pgtest.URL(t), keystore.Options{})
	for name, call := range map[string]func(context.Context) error{
		"publish": func(ctx context.Context) error { return store.PublishSigningKeys(ctx, "", nil, time.Hour) },
		"read":    func(ctx context.Context) error { _, err := store.SigningKeys(ctx); return err },
	} {
		if err := call(t.Context()); !errors.Is(err, keystore.ErrNotMigrated) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyPublicKeysOfEd25519AreStored(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	good := newSigningKey()
	publish(t, store, time.Hour, good)
	for name, sql := range map[string]string{
		"a short key":    `update rekall.signing_keys set public_key = '\x00'`,
		"a long key":     `update rekall.signing_keys set public_key = sha512('x')`,
		"no key":         `update rekall.signing_keys set public_key = null`,
		"another id":     `update rekall.signing_keys set id = 'kid'`,
		"no edge":        `update rekall.signing_keys set instance = ''`,
		"a key for good": `update rekall.signing_keys set expires_at = null`,
	} {
		if _, err := store.Pool().Exec(t.Context(), sql); sqlState(err) != checkViolation && sqlState(err) != notNullViolation {
			t.Errorf("%s was stored: %v", name, err)
		}
	}
	wantSigningKeys(t, store, good)
}

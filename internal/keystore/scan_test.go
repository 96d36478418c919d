package keystore_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestScansReadEveryKeyInEveryModeOfThePooler(t *testing.T) {
	for _, mode := range []string{"cache_statement", "exec", "simple_protocol"} {
		t.Run(mode, func(t *testing.T) {
			databaseURL := database(t) + "&default_query_exec_mode=" + mode
			store := open(t, databaseURL, keystore.Options{})
			var lastUsedFirst []keystore.NewKey
			for range 5 {
				key := insert(t, store)
				lastUsedFirst = slices.Insert(lastUsedFirst, 0, key)
				pgtest.Exec(t, databaseURL, `insert into rekall.last_used values ($1, clock_timestamp(), clock_timestamp())`, key.ID)
			}
			insert(t, store) // and never used
			server := snapshot(t, store, "").Server

			var hashes [][keystore.HashPrefix]byte
			err := store.ScanHashes(t.Context(), func(s keystore.Server, keys int) error {
				if s != server || keys != len(lastUsedFirst)+1 {
					t.Errorf("server %+v, want %+v; %d keys", s, server, keys)
				}
				return nil
			}, func(prefix []byte) { hashes = append(hashes, [keystore.HashPrefix]byte(prefix)) })
			if err != nil {
				t.Fatal(err)
			}
			for _, key := range lastUsedFirst {
				if !slices.Contains(hashes, [keystore.HashPrefix]byte(key.Digest[:])) {
					t.Errorf("a hash is missing in %x", hashes)
				}
			}

			var records []apikey.Record
			err = store.ScanRecent(t.Context(), 3, func(s keystore.Server) error {
				if s != server {
					t.Errorf("server %+v, want %+v", s, server)
				}
				return nil
			}, func(r apikey.Record) { records = append(records, r) })
			if err != nil || len(records) != 3 {
				t.Fatalf("%d records, %v", len(records), err)
			}
			for n, key := range lastUsedFirst[:3] {
				want := apikey.Record{ID: key.ID, Account: key.Account, Digest: key.Digest, Environment: key.Environment, Scopes: key.Scopes, Limits: apikey.LimitsRef(apikey.SandboxTier)}
				if records[n] != want {
					t.Errorf("record %+v of %+v", records[n], key)
				}
			}
		})
	}
}

func TestScanEndsWithTheErrorOfItsBeginning(t *testing.T) {
	store := open(t, database(t), keystore.Options{MaxConns: 1})
	insert(t, store)
	stop := errors.New("stop")
	read := 0
	for range 3 { // and gives its connection back
		if err := store.ScanHashes(t.Context(), func(keystore.Server, int) error { return stop }, func([]byte) { read++ }); !errors.Is(err, stop) {
			t.Errorf("%v, want stop", err)
		}
		if err := store.ScanRecent(t.Context(), 1, func(keystore.Server) error { return stop }, func(apikey.Record) { read++ }); !errors.Is(err, stop) {
			t.Errorf("%v, want stop", err)
		}
	}
	if read > 0 {
		t.Errorf("%d rows were read", read)
	}
}

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
			var all []keystore.NewKey
			for range 7 {
				all = append(all, insert(t, store))
			}
			slices.Reverse(all) // not in the order of the table
			for hoursAgo, key := range all[:5] {
				pgtest.Exec(t, databaseURL, `insert into rekall.last_used values ($1, now(), now() - make_interval(hours => $2))`, key.ID, hoursAgo)
			}
			server := snapshot(t, store, "").Server

			var hashes [][keystore.HashPrefix]byte
			err := store.ScanHashes(t.Context(), func(s keystore.Server, keys int) error {
				if s != server || keys != len(all) {
					t.Errorf("server %+v, want %+v; %d keys", s, server, keys)
				}
				return nil
			}, func(prefix []byte) { hashes = append(hashes, [keystore.HashPrefix]byte(prefix)) })
			if err != nil {
				t.Fatal(err)
			}
			for _, key := range all {
				if !slices.Contains(hashes, [keystore.HashPrefix]byte(key.Digest[:])) {
					t.Errorf("a hash is missing in %x", hashes)
				}
			}

			// Of six, one was never used, and may be either.
			for n, want := range map[int][]keystore.NewKey{1: all[:1], 3: all[:3], 5: all[:5], 6: all[:5], 7: all, 8: all} {
				records := make(map[string]apikey.Record)
				rows := 0
				err = store.ScanRecent(t.Context(), n, func(s keystore.Server) error {
					if s != server {
						t.Errorf("server %+v, want %+v", s, server)
					}
					return nil
				}, func(r apikey.Record) { records[r.ID] = r; rows++ })
				if err != nil || rows != min(n, len(all)) || len(records) != rows {
					t.Fatalf("%d records of %d, %v", rows, n, err)
				}
				for _, key := range want {
					if want := (apikey.Record{
						ID: key.ID, Account: key.Account, Digest: key.Digest, Environment: key.Environment, Scopes: key.Scopes, Limits: apikey.LimitsRef(apikey.SandboxTier),
					}); records[key.ID] != want {
						t.Errorf("of %d, record %+v of %+v", n, records[key.ID], key)
					}
				}
			}
		})
	}
}

func TestScanOfRecentKeysLeavesOutNoneThatWasUsedInALaterHour(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	var earlier, later []string // in the order of the table
	for range 4 {
		earlier = append(earlier, insert(t, store).ID)
	}
	for range 3 {
		later = append(later, insert(t, store).ID)
	}
	for hoursAgo, ids := range map[int][]string{5: earlier, 2: later} {
		pgtest.Exec(t, databaseURL, `insert into rekall.last_used select id, now(), now() - make_interval(hours => $2) from unnest($1::text[]) id`, ids, hoursAgo)
	}
	for n := range 7 {
		var read []string
		err := store.ScanRecent(t.Context(), n, func(keystore.Server) error { return nil }, func(r apikey.Record) { read = append(read, r.ID) })
		if err != nil || len(read) != n {
			t.Fatalf("%d keys of %d, %v", len(read), n, err)
		}
		recent := len(slices.DeleteFunc(read, func(id string) bool { return slices.Contains(earlier, id) }))
		if recent != min(n, len(later)) {
			t.Errorf("of %d keys, %d are of the later hour", n, recent)
		}
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

// A filter is told of the keys that are made from the scan's beginning on, and of no others.
func TestScanReadsEveryKeyMadeBeforeItsBeginningReturnsWhateverIsolationIsTheDefault(t *testing.T) {
	for _, level := range isolationLevels {
		databaseURL := database(t)
		isolate(t, databaseURL, level)
		store := open(t, databaseURL, keystore.Options{})
		var made keystore.NewKey
		var hashes [][keystore.HashPrefix]byte
		err := store.ScanHashes(t.Context(), func(keystore.Server, int) error {
			made = insert(t, store)
			return nil
		}, func(prefix []byte) { hashes = append(hashes, [keystore.HashPrefix]byte(prefix)) })
		if err != nil || !slices.Contains(hashes, [keystore.HashPrefix]byte(made.Digest[:])) {
			t.Errorf("%s: the key is missing; %v", level, err)
		}
	}
}

package keycache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// standbyDatabase is a primary with a hot standby, from which a cache reads.
type standbyDatabase struct {
	*database
	standby  *devenv.Postgres
	reads    *keystore.Store
	instance string

	mu   sync.Mutex
	sent map[uint64]keystore.Report
}

func newStandbyDatabase(t *testing.T) *standbyDatabase {
	t.Helper()
	primary := pgtest.Server(t)
	db := &standbyDatabase{database: newDatabase(t, primary.URL()), instance: apikey.RandomText(22), sent: make(map[uint64]keystore.Report)}
	standby, err := primary.StartStandby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = standby.Stop(context.Background()) })
	db.standby = standby
	if db.reads, err = keystore.Open(standby.URL(), keystore.Options{Instance: db.instance, PlanOnce: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.reads.Close)
	return db
}

// cache reports itself.
func (db *standbyDatabase) cache(t *testing.T, change func(*Config)) *Cache {
	t.Helper()
	return newCache(t, db.reads, func(cfg *Config) {
		cfg.NoListen, cfg.Primary = true, db.store.Lookup
		cfg.Sent = func(beat uint64) (keystore.Report, bool) {
			db.mu.Lock()
			defer db.mu.Unlock()
			report, ok := db.sent[beat]
			return report, ok
		}
		if change != nil {
			change(cfg)
		}
	})
}

// report reports the edge, and returns when the standby has the report and all that was committed before.
func (db *standbyDatabase) report(t *testing.T) {
	t.Helper()
	beat := uint64(len(db.sent) + 1)
	report, err := db.store.ReportEdge(t.Context(), keystore.Edge{
		Instance: db.instance, Name: "north", Version: "v1", MaxStaleness: 30 * time.Second, StartedAt: time.Now(), Beat: beat,
	})
	if err != nil {
		t.Fatal(err)
	}
	db.mu.Lock()
	db.sent[beat] = report
	db.mu.Unlock()
	eventually.True(t, "the standby has the report", func() bool {
		snap, err := db.reads.Snapshot(t.Context(), "", keystore.MaxChanges)
		return err == nil && snap.Beat == beat
	})
}

// TestChangesComeToAStandbyNoLongerThanUntilTheNextReportThoughALongTransactionIsOpen: a standby's snapshot does not name it. If they
// came with every sync, no key in memory would be usable, or the feed would start over each second, and no revocation be confirmed.
func TestChangesComeToAStandbyNoLongerThanUntilTheNextReportThoughALongTransactionIsOpen(t *testing.T) {
	for _, rows := range []int{maxChanges + 2000, keystore.MaxChanges + 1000} {
		t.Run(fmt.Sprint(rows), func(t *testing.T) {
			db := newStandbyDatabase(t)
			key, revoked := db.create(t), db.create(t)
			tx, err := db.pool.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = tx.Rollback(context.Background()) }()
			if _, err := tx.Exec(t.Context(), "select pg_current_xact_id()"); err != nil {
				t.Fatal(err)
			}
			c := db.cache(t, nil)
			db.report(t)
			tick(t, c)
			canary, err := db.store.CreateCanary(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			db.report(t)
			tick(t, c)
			db.exec(t, "update rekall.api_keys set revoked_at = now() where id = any($1)", []string{canary, revoked.id})
			db.report(t)
			tick(t, c)
			db.makeKeys(t, rows)
			for range 2 { // syncs that bring them: once, and again until a report is there that was made after them
				db.report(t)
				eventually.True(t, "a sync", func() bool { return c.sync(t.Context()) == nil })
			}
			want(t, c, key.digest, apikey.Allowed)
			c.known.Wait()
			before, status := c.state.Load(), c.Status()
			if status.Canary == 0 {
				t.Fatal("the canary is not measured: the test shows nothing")
			}
			for range 5 {
				tick(t, c)
				want(t, c, key.digest, apikey.Allowed)
			}
			want(t, c, revoked.digest, apikey.Revoked)
			after, now := c.state.Load(), c.Status()
			if after.horizon != before.horizon || !maps.Equal(after.changes, before.changes) {
				t.Errorf("changes come again: the horizon was %d and is %d", before.horizon, after.horizon)
			}
			if now.Restarts != status.Restarts || now.Canary != status.Canary || now.CanaryAt != status.CanaryAt {
				t.Errorf("%d restarts, canary %v at %v; then %d, %v at %v", status.Restarts, status.Canary, status.CanaryAt, now.Restarts, now.Canary, now.CanaryAt)
			}
			var confirmed bool
			if err := db.pool.QueryRow(t.Context(), "select pg_visible_in_snapshot(change_xid, $2::text::pg_snapshot) from rekall.api_keys where id = $1",
				revoked.id, c.Applied().Snapshot).Scan(&confirmed); err != nil || !confirmed {
				t.Errorf("the revocation is confirmed: %v, %v", confirmed, err)
			}
			slow := db.create(t)
			if _, err := tx.Exec(t.Context(), "update rekall.api_keys set revoked_at = now() where id = $1", slow.id); err != nil {
				t.Fatal(err)
			}
			db.report(t)
			tick(t, c)
			want(t, c, slow.digest, apikey.Allowed)
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			db.report(t)
			tick(t, c)
			want(t, c, slow.digest, apikey.Revoked)
		})
	}
}

func TestStandbyWhoseReplayALongReadCanStopIsWarnedOf(t *testing.T) {
	db := newStandbyDatabase(t)
	core, logs := observer.New(zap.WarnLevel)
	for warnings, feedback := range []string{"on", "off"} {
		pgtest.Exec(t, db.standby.URL(), "alter system set hot_standby_feedback = "+feedback)
		if err := db.standby.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		c := db.cache(t, func(cfg *Config) { cfg.Logger = func() *zap.Logger { return zap.New(core) } })
		db.report(t)
		eventually.True(t, "a sync", func() bool { return c.sync(t.Context()) == nil })
		if n := logs.FilterMessageSnippet("hot_standby_feedback").Len(); n != warnings {
			t.Errorf("%s: %d warnings, want %d", feedback, n, warnings)
		}
	}
}

// TestProofOfAbsenceOnAStandbyAsksForAReport: it proves nothing without one that came later, and the next may be seconds away.
func TestProofOfAbsenceOnAStandbyAsksForAReport(t *testing.T) {
	for _, standby := range []bool{true, false} {
		reports := 0
		c := newCache(t, nil, func(cfg *Config) {
			cfg.Refresh, cfg.Report = time.Hour, func() { reports++ }
			if standby {
				cfg.Sent = func(uint64) (keystore.Report, bool) { return keystore.Report{}, false }
			}
		})
		c.unknown.want()
		if c.awaitSync(t.Context(), time.Now(), 0); (reports == 1) != standby {
			t.Errorf("a standby is read: %v, and %d reports are asked for", standby, reports)
		}
	}
}

func TestFirstReportOnItsWayToAStandbyIsNoFaultInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for within, logged := range map[time.Duration]int{time.Second: 0, 2 * firstReportWithin: 2} { // the beginning and the end
			core, logs := observer.New(zap.DebugLevel)
			began := time.Now()
			db := &twoStandbys{snap: keystore.Snapshot{Server: keystore.Server{InRecovery: true}, Beat: 1, Now: began, Text: "5:5:", Xmin: 5, Xmax: 5}}
			c := newCache(t, db, func(cfg *Config) {
				cfg.Logger = func() *zap.Logger { return zap.New(core) }
				cfg.Sent = func(uint64) (keystore.Report, bool) {
					return keystore.Report{SentAt: time.Now()}, time.Since(began) > within
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), 3*firstReportWithin)
			c.syncLoop(ctx)
			cancel()
			if n := logs.FilterMessageSnippet("key sync ").Len() - logs.FilterMessageSnippet("starts over").Len(); n != logged || c.Status().SyncedAt.IsZero() {
				t.Errorf("it comes within %v: %d lines, want %d", within, n, logged)
			}
			c.Close()
		}
	})
}

// TestReloadToAStandbyThatIsBlindIsRefusedForThatReason, though its log waits as long with a word about it as the reload does.
func TestReloadToAStandbyThatIsBlindIsRefusedForThatReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, new(twoStandbys), func(cfg *Config) {
			cfg.Sent = func(uint64) (keystore.Report, bool) { return keystore.Report{}, false }
		})
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), firstReportWithin-time.Millisecond)
		defer cancel()
		go c.syncLoop(ctx)
		if err := c.AwaitFirstSync(ctx); !errors.Is(err, errBlind) {
			t.Errorf("the first sync: %v, want errBlind", err)
		}
		synctest.Wait()
	})
}

// twoStandbys are two of one primary behind one name.
type twoStandbys struct {
	Store
	snap  keystore.Snapshot
	found keystore.Found
}

func (s *twoStandbys) Snapshot(context.Context, string, int) (keystore.Snapshot, error) {
	return s.snap, nil
}

func (s *twoStandbys) Lookup(context.Context, []apikey.Digest) (keystore.Found, error) {
	return s.found, nil
}

// TestRevocationIsNotUndoneByAStandbyThatHasReplayedLess: the name in read_database leads to another, or the same was restarted at an
// earlier point of its replay.
func TestRevocationIsNotUndoneByAStandbyThatHasReplayedLess(t *testing.T) {
	began := time.Now()
	for name, reported := range map[string]uint64{"it lacks a report that the first had": 1, "it has the same report": 2} {
		t.Run(name, func(t *testing.T) {
			db := new(twoStandbys)
			sent := map[uint64]keystore.Report{1: {SentAt: began.Add(-10 * time.Second)}, 2: {SentAt: began}}
			asked := 0
			c := newCache(t, db, func(cfg *Config) {
				cfg.Sent = func(beat uint64) (keystore.Report, bool) { report, ok := sent[beat]; return report, ok }
				cfg.Report = func() { asked++ }
			})
			good := &apikey.Record{ID: "key_a", Digest: unknownKey(), Environment: apikey.Production}
			revoked := *good
			revoked.RevokedAt = apikey.TimeOf(began)
			show := func(startedAt int64, beat uint64, record *apikey.Record) {
				db.snap = keystore.Snapshot{
					Server: keystore.Server{StartedAt: startedAt, InRecovery: true}, Beat: beat, Now: began, Text: "5:5:", Xmin: 5, Xmax: 5,
				}
				db.found = keystore.Found{Server: db.snap.Server, Now: began, Records: []*apikey.Record{record}}
			}
			show(1, 2, &revoked)
			tick(t, c)
			want(t, c, good.Digest, apikey.Revoked)
			c.known.Wait()
			show(2, reported, good)
			before := asked
			if err := c.sync(t.Context()); !errors.Is(err, errBlind) || asked == before {
				t.Errorf("a sync with it: %v, want errBlind, and %d reports are asked for, which it waits for", err, asked-before)
			}
			want(t, c, good.Digest, apikey.Revoked)
			sent[3] = keystore.Report{SentAt: time.Now()}
			show(2, 3, &revoked) // it has caught up
			tick(t, c)
			want(t, c, good.Digest, apikey.Revoked)
		})
	}
}

// TestRevocationThatThePrimaryToldOfIsNotUndoneByTheKeysCreationOnAStandbyThatLags: of a key that the standby does not have, the primary
// was asked.
func TestRevocationThatThePrimaryToldOfIsNotUndoneByTheKeysCreationOnAStandbyThatLags(t *testing.T) {
	began := time.Now()
	good := &apikey.Record{ID: "key_a", Digest: unknownKey(), Environment: apikey.Production}
	revoked := *good
	revoked.RevokedAt = apikey.TimeOf(began)
	server := keystore.Server{StartedAt: 1, InRecovery: true}
	db := &twoStandbys{found: keystore.Found{Server: server, Now: began}}
	c := newCache(t, db, func(cfg *Config) {
		cfg.Sent = func(uint64) (keystore.Report, bool) {
			return keystore.Report{SentAt: began.Add(-10 * time.Second)}, true
		}
		cfg.Primary = func(context.Context, []apikey.Digest) (keystore.Found, error) {
			return keystore.Found{Now: began, Records: []*apikey.Record{&revoked}}, nil
		}
	})
	db.snap = keystore.Snapshot{Server: server, Beat: 1, Now: began, Text: "5:5:", Xmin: 5, Xmax: 5}
	tick(t, c)
	want(t, c, good.Digest, apikey.Revoked)
	forget := func() { // as ristretto may
		c.settle()
		c.known.Del(place(&good.Digest))
		c.known.Wait()
	}
	forget()
	db.found.Records = []*apikey.Record{good} // all that it has replayed
	want(t, c, good.Digest, apikey.Revoked)
	forget()
	db.snap.Text, db.snap.Xmin, db.snap.Xmax, db.snap.Changes = "6:6:", 6, 6, []*apikey.Record{good}
	tick(t, c)
	want(t, c, good.Digest, apikey.Revoked)
	db.snap.Text, db.snap.Xmin, db.snap.Xmax, db.snap.Changes = "7:7:", 7, 7, []*apikey.Record{&revoked}
	tick(t, c)
	want(t, c, good.Digest, apikey.Revoked)
}

// TestRevocationThatThePrimaryToldOfIsForgottenWhenEveryStandbyThatIsBelievedShowsIt: there is no bound to their number but time.
func TestRevocationThatThePrimaryToldOfIsForgottenWhenEveryStandbyThatIsBelievedShowsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := new(twoStandbys)
		c := newCache(t, db, func(cfg *Config) {
			cfg.Sent = func(uint64) (keystore.Report, bool) { return keystore.Report{SentAt: time.Now()}, true }
		})
		defer c.Close()
		record := apikey.Record{Digest: unknownKey(), RevokedAt: apikey.TimeOf(time.Now())}
		c.keepFound(newEntry(record, 0))
		for _, remembered := range []bool{true, false} {
			tick(t, c)
			if _, ok := c.revokedAhead.Load(record.Digest); ok != remembered {
				t.Errorf("remembered %v, want %v", ok, remembered)
			}
			<-time.After(c.cfg.MaxStaleness)
		}
	})
}

// TestRevocationThatARestoreHasUndoneIsNotKeptByALookupFromBefore: what a lookup brings then stays in memory for as long as it is asked for.
func TestRevocationThatARestoreHasUndoneIsNotKeptByALookupFromBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := keystore.Server{SystemID: 1, InRecovery: true}
		good := apikey.Record{Digest: unknownKey(), Environment: apikey.Production}
		revoked := good
		revoked.RevokedAt = apikey.TimeOf(time.Now())
		db := new(twoStandbys)
		show := func(record *apikey.Record) {
			db.snap = keystore.Snapshot{Server: server, Now: time.Now(), Text: "5:5:", Xmin: 5, Xmax: 5}
			db.found = keystore.Found{Server: server, Now: time.Now(), Records: []*apikey.Record{record}}
		}
		c := newCache(t, db, func(cfg *Config) {
			cfg.Sent = func(uint64) (keystore.Report, bool) { return keystore.Report{SentAt: time.Now()}, true }
		})
		defer c.Close()
		show(&revoked)
		tick(t, c)
		want(t, c, good.Digest, apikey.Revoked)
		<-time.After(time.Second)
		server.SystemID = 2
		show(&good)
		tick(t, c)
		want(t, c, good.Digest, apikey.Allowed)
	})
}

// TestAbsenceIsNotBelievedOfAStandbyInThePrimarysPlace: after a switch-over the name in database may lead to a server whose replay lags.
func TestAbsenceIsNotBelievedOfAStandbyInThePrimarysPlace(t *testing.T) {
	db := newStandbyDatabase(t)
	demoted, err := keystore.Open(db.standby.URL(), keystore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(demoted.Close)
	c := db.cache(t, nil)
	misled := db.cache(t, func(cfg *Config) { cfg.Primary = demoted.Lookup })
	db.report(t)
	tick(t, c)
	tick(t, misled)
	pgtest.Exec(t, db.standby.URL(), "select pg_wal_replay_pause()")
	created := db.create(t)
	want(t, misled, created.digest, apikey.Unavailable)
	if failure := misled.LastFailure(); failure == nil || !errors.Is(failure.Err, errStandby) || misled.Status().LookupErrors == 0 {
		t.Errorf("the last failure is %+v of %d, want errStandby", failure, misled.Status().LookupErrors)
	}
	want(t, c, created.digest, apikey.Allowed)
}

// TestUnknownKeysHarmNoKeyThatAStandbyHasWhileThePrimaryHangs: they wait for the primary, and nothing else does.
func TestUnknownKeysHarmNoKeyThatAStandbyHasWhileThePrimaryHangs(t *testing.T) {
	db := newStandbyDatabase(t)
	digests := db.made(t, 30)
	c := db.cache(t, func(cfg *Config) {
		cfg.Primary = func(ctx context.Context, _ []apikey.Digest) (keystore.Found, error) {
			<-ctx.Done()
			return keystore.Found{}, ctx.Err()
		}
	})
	db.report(t)
	tick(t, c)
	var unknown sync.WaitGroup
	for _, digest := range digests {
		unknown.Go(func() { want(t, c, unknownKey(), apikey.Unavailable) })
		want(t, c, digest, apikey.Allowed)
	}
	unknown.Wait()
}

// TestRequestWhoseKeyAnotherStandbyDoesNotHaveYetIsVerifiedWithThePrimary, and cut if that does not have it either.
func TestRequestWhoseKeyAnotherStandbyDoesNotHaveYetIsVerifiedWithThePrimary(t *testing.T) {
	for name, outcome := range map[string]apikey.Outcome{"it has the key": apikey.Allowed, "it has not": apikey.Unknown} {
		t.Run(name, func(t *testing.T) {
			now := time.Now()
			record := apikey.Record{ID: "key_a", Digest: unknownKey(), Environment: apikey.Production}
			primary, db := []*apikey.Record{&record}, new(twoStandbys)
			c := newCache(t, db, func(cfg *Config) {
				cfg.Sent = func(uint64) (keystore.Report, bool) { return keystore.Report{SentAt: time.Now()}, true }
				cfg.Primary = func(context.Context, []apikey.Digest) (keystore.Found, error) {
					return keystore.Found{Now: now, Records: primary}, nil
				}
			})
			read := func(startedAt int64) {
				db.snap = keystore.Snapshot{Server: keystore.Server{StartedAt: startedAt, InRecovery: true}, Beat: 1, Now: now, Text: "5:5:", Xmin: 5, Xmax: 5}
				db.found = keystore.Found{Server: db.snap.Server, Now: now}
				tick(t, c)
			}
			read(1)
			found, err := c.Find(t.Context(), record.Digest)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if !c.Track(new(Flight), found, requestFunc(cancel)) {
				t.Fatal("not tracked")
			}
			if outcome == apikey.Unknown {
				primary = nil
			}
			read(2)
			var cut *Cut
			if errors.As(context.Cause(ctx), &cut) != (outcome != apikey.Allowed) || cut != nil && cut.Outcome != outcome {
				t.Errorf("the request ended with %v", context.Cause(ctx))
			}
		})
	}
}

// TestSnapshotThatAnotherClustersPrimaryReportedMovesNoStandbyOn: its transactions are not those of the standby, which would pass over all
// changes up to then.
func TestSnapshotThatAnotherClustersPrimaryReportedMovesNoStandbyOn(t *testing.T) {
	for name, tc := range map[string]struct {
		takenBy int64
		want    string
	}{"the standby's": {1, "900:900:"}, "another": {2, "5:5:"}} {
		t.Run(name, func(t *testing.T) {
			db, now := new(twoStandbys), time.Now()
			c := newCache(t, db, func(cfg *Config) {
				cfg.Sent = func(uint64) (keystore.Report, bool) {
					return keystore.Report{SentAt: now, TakenBy: keystore.Server{SystemID: tc.takenBy}, Snapshot: "900:900:"}, true
				}
			})
			db.snap = keystore.Snapshot{Server: keystore.Server{SystemID: 1, InRecovery: true}, Beat: 1, Now: now, Text: "5:5:", Xmin: 5, Xmax: 5}
			tick(t, c)
			if seen := c.Applied().Snapshot; seen != tc.want {
				t.Errorf("the feed goes on from %s, want %s", seen, tc.want)
			}
		})
	}
}

// TestWhatIsReadOfAStandbyIsConfirmedAsOfTheReportThatItHas: what was revoked since then, it may not show.
func TestWhatIsReadOfAStandbyIsConfirmedAsOfTheReportThatItHas(t *testing.T) {
	const lag = 10 * time.Second
	db, now := new(twoStandbys), time.Now()
	c := newCache(t, db, func(cfg *Config) {
		cfg.Sent = func(uint64) (keystore.Report, bool) { return keystore.Report{SentAt: now.Add(-lag)}, true }
	})
	db.snap = keystore.Snapshot{Server: keystore.Server{InRecovery: true}, Beat: 1, Now: now, Text: "5:5:", Xmin: 5, Xmax: 5}
	tick(t, c)
	if behind := now.Sub(c.Applied().At); behind < lag {
		t.Errorf("confirmed as of %v ago, want %v at least", behind, lag)
	}
	if told := c.Status().Lag; told < lag {
		t.Errorf("the standby is said to be %v behind, want %v at least", told, lag)
	}
}

func TestStandbyWithAReportThatWasSentWhileItWasReadIsNotSaidToBeAhead(t *testing.T) {
	for _, standby := range []bool{true, false} {
		db := new(twoStandbys)
		c := newCache(t, db, func(cfg *Config) {
			if standby {
				cfg.Sent = func(uint64) (keystore.Report, bool) { return keystore.Report{SentAt: time.Now()}, true }
			}
		})
		db.snap = keystore.Snapshot{Server: keystore.Server{InRecovery: standby}, Beat: 1, Now: time.Now(), Text: "5:5:", Xmin: 5, Xmax: 5}
		tick(t, c)
		if lag := c.Status().Lag; lag < 0 || lag != 0 && !standby {
			t.Errorf("a standby: %v; %v behind", standby, lag)
		}
	}
}

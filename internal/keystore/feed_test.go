package keystore_test

import (
	"context"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

const revokeSQL = `update rekall.api_keys set revoked_at = now() where id = $1`

// change returns what a snapshot says of a key, or nil.
func change(snap keystore.Snapshot, key keystore.NewKey) *apikey.Record {
	for _, record := range snap.Changes {
		if record.ID == key.ID {
			return record
		}
	}
	return nil
}

func revokedIn(snap keystore.Snapshot, key keystore.NewKey) bool {
	record := change(snap, key)
	return record != nil && !record.RevokedAt.IsZero()
}

// A feed that asked for rows above the greatest stamp it has seen would take second's stamp as its cursor and never see
// first, whose stamp is smaller and whose commit is later.
func TestChangeThatCommitsOutOfOrderIsNotLost(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	first, second := insert(t, store), insert(t, store)
	start := snapshot(t, store, "")

	slow, quick := connect(t, databaseURL), connect(t, databaseURL)
	exec(t, slow, "begin")
	exec(t, slow, revokeSQL, first.ID)
	exec(t, quick, revokeSQL, second.ID)

	between := snapshot(t, store, start.Text)
	if !revokedIn(between, second) || revokedIn(between, first) {
		t.Fatalf("before the slow commit: %+v", between.Changes)
	}
	exec(t, slow, "commit")
	after := snapshot(t, store, between.Text)
	if !revokedIn(after, first) {
		t.Fatalf("the slow transaction's change is lost: %+v", after.Changes)
	}
	end := snapshot(t, store, after.Text)
	if again := snapshot(t, store, end.Text); len(again.Changes) != 0 {
		t.Errorf("changes come again with nothing in flight: %+v", again.Changes)
	}
}

// A savepoint has a transaction id of its own; the watermark is held back by that of the transaction around it.
func TestChangeInSavepointIsNotLost(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	start := snapshot(t, store, "")
	conn := connect(t, databaseURL)
	exec(t, conn, "begin")
	exec(t, conn, "savepoint a")
	exec(t, conn, revokeSQL, key.ID)
	exec(t, conn, "release a")
	insert(t, store) // a later transaction that ends before
	between := snapshot(t, store, start.Text)
	exec(t, conn, "commit")
	if !revokedIn(snapshot(t, store, between.Text), key) {
		t.Error("the change is lost")
	}
}

func TestChangeTypedIntoPsqlIsInTheFeed(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	start := snapshot(t, store, "")
	pgtest.Exec(t, databaseURL, `UPDATE rekall.api_keys SET revoked_at = now() WHERE id = '`+key.ID+`'`)
	snap := snapshot(t, store, start.Text)
	if !revokedIn(snap, key) {
		t.Fatalf("changes %+v", snap.Changes)
	}
}

// What a logical replication worker writes is written under this role.
func TestReplicaRoleIsStampedAndRefusedToo(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	start := snapshot(t, store, "")
	conn := connect(t, databaseURL)
	exec(t, conn, "set session_replication_role = replica")
	exec(t, conn, revokeSQL, key.ID)
	if !revokedIn(snapshot(t, store, start.Text), key) {
		t.Error("the change is not in the feed")
	}
	for _, sql := range refused {
		if _, err := conn.Exec(t.Context(), sql); !strings.HasPrefix(sqlState(err), "RK") {
			t.Errorf("%s: %v", sql, err)
		}
	}
}

func TestStampCannotBeChosen(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	start := snapshot(t, store, "")
	pgtest.Exec(t, databaseURL, `update rekall.api_keys set change_xid = '3', name = 'x' where id = $1`, key.ID)
	if change(snapshot(t, store, start.Text), key) == nil {
		t.Error("a change with a stamp of its own is lost")
	}
}

func TestSnapshotFromZeroReadsNoRows(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	insert(t, store)
	before := time.Now().Add(-time.Hour)
	snap := snapshot(t, store, "")
	if len(snap.Changes) != 0 {
		t.Errorf("changes %+v", snap.Changes)
	}
	if snap.Xmin == 0 || snap.Xmax < snap.Xmin || snap.Now.Before(before) || snap.Server.InRecovery ||
		snap.Server.SystemID == 0 || snap.Server.StartedAt == 0 || snap.Server.Database == 0 || snap.Server.Table == 0 {
		t.Errorf("snapshot %+v", snap)
	}
}

func TestServerTellsDatabasesAndRestartsApart(t *testing.T) {
	server := pgtest.Server(t)
	pgtest.Exec(t, server.URL(), "create database other")
	otherURL := strings.Replace(server.URL(), "/postgres?", "/other?", 1)
	var servers [2]keystore.Server
	for i, databaseURL := range []string{server.URL(), otherURL} {
		pgtest.Migrate(t, databaseURL)
		servers[i] = snapshot(t, open(t, databaseURL, keystore.Options{}), "").Server
	}
	if servers[0] == servers[1] {
		t.Error("two databases of a cluster look the same")
	}
	store := open(t, server.URL(), keystore.Options{})
	if again := snapshot(t, store, "").Server; again != servers[0] {
		t.Errorf("%+v, then %+v", servers[0], again)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	restarted := snapshot(t, open(t, server.URL(), keystore.Options{}), "").Server
	if restarted.StartedAt <= servers[0].StartedAt || restarted.SystemID != servers[0].SystemID {
		t.Errorf("%+v, restarted %+v", servers[0], restarted)
	}
}

// TestSnapshotOfAnotherServersTransactionsConfirmsNothing: restored from a dump, the rows of edges hold snapshots that are far ahead.
func TestSnapshotOfAnotherServersTransactionsConfirmsNothing(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := insert(t, store)
	row, _, err := store.Revoke(t.Context(), keystore.Everything(), key.ID)
	if err != nil {
		t.Fatal(err)
	}
	snap := snapshot(t, store, "")
	for name, tc := range map[string]struct {
		change func(*keystore.Server)
		want   bool
	}{
		"this server":          {func(*keystore.Server) {}, true},
		"another cluster":      {func(s *keystore.Server) { s.SystemID++ }, false},
		"before a restart":     {func(s *keystore.Server) { s.StartedAt-- }, false},
		"before a crash":       {func(s *keystore.Server) { s.RecoveredAt-- }, false},
		"another database":     {func(s *keystore.Server) { s.Database++ }, false},
		"an earlier gateway's": {nil, false},
	} {
		appliedOn := ""
		if tc.change != nil {
			server := snap.Server
			tc.change(&server)
			appliedOn = server.String()
		}
		e := report(t, store, keystore.Edge{Name: name, Applied: snap.Text, AppliedOn: appliedOn})
		edges, _, err := store.Edges(t.Context(), row.ChangeXid)
		if err != nil {
			t.Fatal(err)
		}
		for _, seen := range edges {
			if seen.Instance == e.Instance && seen.Applied != tc.want {
				t.Errorf("%s: applied %v, want %v", name, seen.Applied, tc.want)
			}
		}
	}
}

// Without the upper bound of the statement all restored keys would come with every reading, until the new cluster has made
// as many transactions as the old one had.
func TestRestoredRowsDoNotFloodTheFeed(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	pgtest.Exec(t, databaseURL, `
		alter table rekall.api_keys disable trigger stamp;
		update rekall.api_keys set change_xid = '900000000000';
		alter table rekall.api_keys enable always trigger stamp`)
	start := snapshot(t, store, "")
	if snap := snapshot(t, store, start.Text); len(snap.Changes) != 0 {
		t.Fatalf("changes %+v", snap.Changes)
	}
	if _, _, err := store.Revoke(t.Context(), keystore.Everything(), key.ID); err != nil {
		t.Fatal(err)
	}
	if !revokedIn(snapshot(t, store, start.Text), key) {
		t.Error("a change to a restored key is lost")
	}
}

func TestFeedIsReadByIndex(t *testing.T) {
	databaseURL := database(t)
	conn := connect(t, databaseURL)
	exec(t, conn, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(i::text, 22, '0'), 'acme', 'Key', 'sandbox', sha256(i::text::bytea), '{}'
		from generate_series(1, 20000) i`)
	store := open(t, databaseURL, keystore.Options{})
	since := snapshot(t, store, "").Text
	for _, analyzed := range []bool{false, true} {
		if analyzed {
			exec(t, conn, "analyze rekall.api_keys")
		}
		for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
			exec(t, conn, "set plan_cache_mode = "+mode)
			if plan := explain(t, conn, "", since); !strings.Contains(plan, "api_keys_change_xid") {
				t.Errorf("analyzed %v, %s:\n%s", analyzed, mode, plan)
			}
		}
	}
}

func TestChangesComeOnceThoughALongTransactionHoldsTheirTransactionIDsBack(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	start := snapshot(t, store, "")
	long := connect(t, databaseURL)
	exec(t, long, "begin")
	exec(t, long, "select pg_current_xact_id()")
	key := insert(t, store)
	first := snapshot(t, store, start.Text)
	if change(first, key) == nil || first.Xmin != start.Xmin {
		t.Fatalf("%d changes, from %d on after %d", len(first.Changes), first.Xmin, start.Xmin)
	}
	if again := snapshot(t, store, first.Text); len(again.Changes) != 0 {
		t.Errorf("%d changes come again", len(again.Changes))
	}
}

// TestNoRowIsReadTwiceThoughALongTransactionIsOpen: else each tick of each edge takes half a second for 300,000 keys that were imported
// since it began.
func TestNoRowIsReadTwiceThoughALongTransactionIsOpen(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	long, conn := connect(t, databaseURL), connect(t, databaseURL)
	exec(t, long, "begin")
	exec(t, long, "select pg_current_xact_id()")
	exec(t, conn, `
		insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
		select 'key_' || lpad(i::text, 22, '0'), 'account ' || i, 'Key', 'production', sha256(i::text::bytea), '{}'
		from generate_series(1, 20000) i`)
	exec(t, conn, `insert into rekall.account_limits (account, tier) select account, 'pro' from rekall.api_keys`)
	exec(t, conn, `insert into rekall.key_limits (key_id, concurrent_requests) select id, 5 from rekall.api_keys`)
	since := snapshot(t, store, "").Text
	scan := regexp.MustCompile(`(?:Scan on|Scan using \S+ on) (?:api_keys|account_limits|key_limits) .*actual time=\S+ rows=(\S+)`)
	for _, analyzed := range []bool{false, true} {
		if analyzed {
			exec(t, conn, "analyze rekall.api_keys, rekall.account_limits, rekall.key_limits")
		}
		for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
			exec(t, conn, "set plan_cache_mode = "+mode)
			plan := explain(t, conn, "(analyze)", since)
			if _, parts, _ := strings.Cut(plan, "CTE unread"); strings.Contains(parts, "Rows Removed") {
				t.Errorf("analyzed %v, %s: rows are read that are not new:\n%s", analyzed, mode, plan)
			}
			for _, read := range scan.FindAllStringSubmatch(plan, -1) {
				if rows, err := strconv.ParseFloat(read[1], 64); err != nil || rows > 0 {
					t.Errorf("analyzed %v, %s: rows are read twice: %s", analyzed, mode, read[0])
				}
			}
		}
	}
	exec(t, long, "commit")
}

// TestRowsThatNobodyCanSeeAreNotReadAgainAndAgain: an import of millions is one transaction. Each edge would look at all of it in each
// reading, until a reading takes longer than it may.
func TestRowsThatNobodyCanSeeAreNotReadAgainAndAgain(t *testing.T) {
	for _, end := range []string{"commit", "rollback"} {
		t.Run(end, func(t *testing.T) {
			databaseURL := database(t)
			store := open(t, databaseURL, keystore.Options{})
			slow, conn := connect(t, databaseURL), connect(t, databaseURL)
			begin := snapshot(t, store, "").Text
			exec(t, slow, "begin")
			exec(t, slow, `
				insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
				select 'key_' || lpad(i::text, 22, '0'), 'account ' || i, 'Key', 'production', sha256(i::text::bytea), '{}'
				from generate_series(1, 20000) i`)
			insert(t, store) // by a later transaction that ends before
			during := snapshot(t, store, "").Text
			exec(t, conn, "set plan_cache_mode = force_generic_plan")
			fewBuffers := func(since, when string) {
				t.Helper()
				explain(t, conn, "(analyze, buffers)", since) // reads the catalogue
				plan := explain(t, conn, "(analyze, buffers)", since)
				hit := regexp.MustCompile(`(?m)^\s*Buffers: shared hit=(\d+)`).FindStringSubmatch(plan) // of the whole statement
				if n, err := strconv.Atoi(hit[1]); err != nil || n > 100 {
					t.Errorf("%s: %d buffers are read for nothing", when, n)
				}
			}
			fewBuffers(begin, "in progress, which the last reading was before")
			fewBuffers(during, "in progress, which the last reading named")
			exec(t, slow, end)
			if end == "rollback" {
				fewBuffers(during, "rolled back, which the last reading named as in progress")
				return
			}
			for _, since := range []string{begin, during} {
				if n := len(snapshot(t, store, since).Changes); n < 20000 {
					t.Errorf("since %s: %d changes once it has committed", since, n)
				}
			}
		})
	}
}

func TestMoreChangesThanCanBeReadInTimeAreSaidNotRead(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	start := snapshot(t, store, "")
	for keys, overrun := range map[int]bool{keystore.MaxChanges: false, keystore.MaxChanges + 1: true} {
		since := snapshot(t, store, "").Text
		pgtest.Exec(t, databaseURL, `
			insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
			select 'key_' || lpad($1::text || lpad(i::text, 8, '0'), 22, '0'), 'acme', 'Key', 'sandbox', sha256(($1::text || i)::bytea), '{}'
			from generate_series(1, $1::int) i`, keys)
		snap := snapshot(t, store, since)
		if snap.Overrun != overrun || (len(snap.Changes) == keys) == overrun {
			t.Errorf("of %d changes %d are read, overrun %v", keys, len(snap.Changes), snap.Overrun)
		}
		if few, err := store.Snapshot(t.Context(), since, 100); err != nil || !few.Overrun || few.Changes != nil {
			t.Errorf("of %d changes, 100 at most: %d are read, overrun %v, %v", keys, len(few.Changes), few.Overrun, err)
		}
		if snap.Xmax < start.Xmax || snapshot(t, store, snap.Text).Overrun {
			t.Error("the reading afterwards does not go on from here")
		}
	}
}

// TestFeedBringsARevocationThoughAnEdgeThatWasTakenOverLocksItsTables to all that read no standby.
func TestFeedBringsARevocationThoughAnEdgeThatWasTakenOverLocksItsTables(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{PlanOnce: true})
	key := insert(t, store)
	start := snapshot(t, store, "")
	pgtest.LockAsEdge(t, databaseURL)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, revoked, err := store.Revoke(ctx, keystore.Everything(), key.ID); err != nil || !revoked {
		t.Fatal(revoked, err)
	}
	snap, err := store.Snapshot(ctx, start.Text, keystore.MaxChanges)
	if err != nil || len(snap.Changes) != 1 || snap.Changes[0].Validity(snap.Now) != apikey.Revoked {
		t.Errorf("%+v, %v", snap.Changes, err)
	}
}

// explain returns the plan of a reading of the feed, with what happened when it was run if options are "(analyze)".
func explain(t *testing.T, conn *pgx.Conn, options string, since string) string {
	t.Helper()
	exec(t, conn, "prepare feed (text, bigint) as "+keystore.FeedSQL)
	defer exec(t, conn, "deallocate feed")
	rows, _ := conn.Query(t.Context(), fmt.Sprintf("explain %s execute feed ('%s', %d)", options, since, keystore.MaxChanges+1))
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

// TestLaterOfTwoSnapshotsIsTheOneThatSawMore, whichever comes first; an edge tells what it has read by it.
func TestLaterOfTwoSnapshotsIsTheOneThatSawMore(t *testing.T) {
	for _, tc := range []struct{ a, b, want string }{
		{"9:10:", "8:9:", "9:10:"}, {"8:9:", "9:10:", "9:10:"}, {"7:10:8", "9:10:", "7:10:8"}, {"", "9:10:", "9:10:"}, {"9:10:", "", "9:10:"},
	} {
		if got := keystore.LaterSnapshot(tc.a, tc.b); got != tc.want {
			t.Errorf("of %q and %q: %q, want %q", tc.a, tc.b, got, tc.want)
		}
	}
}

func TestScopeOfNewerVersionGrantsNothing(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	pgtest.Exec(t, databaseURL, `
		alter table rekall.api_keys drop constraint api_keys_scopes_check;
		update rekall.api_keys set scopes = '{memories:read,memories:publish}'`)
	found, err := store.Lookup(t.Context(), []apikey.Digest{key.Digest})
	if err != nil {
		t.Fatal(err)
	}
	if got := found.Records[0].Scopes; got != apikey.MemoriesRead {
		t.Errorf("scopes %s", got)
	}
}

func TestLookupFindsABatchAndOnlyThat(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	want := map[apikey.Digest]keystore.NewKey{}
	digests := []apikey.Digest{newKey().Digest}
	for range 300 {
		key := insert(t, store)
		want[key.Digest] = key
		digests = append(digests, key.Digest)
	}
	insert(t, store)
	server := snapshot(t, store, "").Server
	found, err := store.Lookup(t.Context(), digests)
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Records) != len(want) {
		t.Errorf("%d records, want %d", len(found.Records), len(want))
	}
	for _, record := range found.Records {
		key, ok := want[record.Digest]
		if !ok || *record != (apikey.Record{ID: key.ID, Account: key.Account, Digest: key.Digest, Environment: key.Environment, Scopes: key.Scopes, Limits: apikey.LimitsRef(apikey.SandboxTier)}) {
			t.Errorf("record %+v of %+v", record, key)
		}
	}
	if found.Server != server {
		t.Errorf("server %+v, the feed's %+v", found.Server, server)
	}
}

func TestLookupOfUnknownKeysNamesTheServer(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	server := snapshot(t, store, "")
	for _, digests := range [][]apikey.Digest{nil, {newKey().Digest}} {
		found, err := store.Lookup(t.Context(), digests)
		if err != nil {
			t.Fatal(err)
		}
		if len(found.Records) != 0 || found.Server != server.Server || found.Now.Before(server.Now) {
			t.Errorf("found %+v", found)
		}
	}
}

// TestChangeInProgressWhenAStandbyIsReadIsNotLost: a standby's snapshot does not name the transactions in progress.
func TestChangeInProgressWhenAStandbyIsReadIsNotLost(t *testing.T) {
	primary := pgtest.Server(t)
	pgtest.Migrate(t, primary.URL())
	standby, err := primary.StartStandby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = standby.Stop(context.Background()) })
	writer, reader := open(t, primary.URL(), keystore.Options{}), open(t, standby.URL(), keystore.Options{})
	slow, quick := insert(t, writer), insert(t, writer)
	conn := connect(t, primary.URL())
	exec(t, conn, "begin")
	exec(t, conn, "update rekall.api_keys set revoked_at = now() where id = '"+slow.ID+"'")
	start := snapshot(t, writer, "").Text
	if _, _, err := writer.Revoke(t.Context(), keystore.Everything(), quick.ID); err != nil {
		t.Fatal(err)
	}
	var between keystore.Snapshot
	eventually.True(t, "the standby shows what was committed after it", func() bool {
		between = snapshot(t, reader, start)
		return revokedIn(between, quick)
	})
	exec(t, conn, "commit")
	eventually.True(t, "the standby shows the change that was in progress", func() bool { return revokedIn(snapshot(t, reader, between.Text), slow) })
}

func TestStatementsOfAnEdgeArePlannedOncePerConnection(t *testing.T) {
	ctx := t.Context()
	store := open(t, database(t), keystore.Options{MaxConns: 1, PlanOnce: true})
	since := snapshot(t, store, "").Text
	const reads = 7 // Postgres by itself plans the first five anew
	for range reads {
		snapshot(t, store, since)
	}
	var generic, custom int
	err := store.Pool().QueryRow(ctx, `
select max(generic_plans), sum(custom_plans) from pg_prepared_statements where statement like '%rekall.api_keys%'`).Scan(&generic, &custom)
	if err != nil {
		t.Fatal(err)
	}
	if generic < reads || custom != 0 {
		t.Errorf("planned once: %d, planned anew: %d", generic, custom)
	}
}

func TestNothingIsPlannedAheadBehindATransactionPooler(t *testing.T) {
	u, err := url.Parse(database(t))
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("default_query_exec_mode", "exec")
	u.RawQuery = query.Encode()
	store := open(t, u.String(), keystore.Options{MaxConns: 1, PlanOnce: true})
	snapshot(t, store, "")
	var mode string
	if err := store.Pool().QueryRow(t.Context(), "show plan_cache_mode").Scan(&mode); err != nil || mode != "auto" {
		t.Errorf("plan_cache_mode is %q, %v: the pooler's connection keeps it for others", mode, err)
	}
}

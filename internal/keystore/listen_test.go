package keystore_test

import (
	"context"
	"errors"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// patience is how long a test waits for what should come at once.
const patience = 30 * time.Second

// listener runs Listen until the test ends.
type listener struct {
	wakes chan struct{}
	ended chan error
	stop  context.CancelFunc
}

func listen(t *testing.T, store *keystore.Store) *listener {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	l := &listener{wakes: make(chan struct{}, 100), ended: make(chan error, 1), stop: stop}
	go func() { l.ended <- store.Listen(ctx, func() { l.wakes <- struct{}{} }) }()
	t.Cleanup(stop)
	return l
}

func receive[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

func TestListenWakesOnceItListensAndOnRevocation(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := insert(t, store)
	l := listen(t, store)
	receive(t, "wake after LISTEN", l.wakes)
	if _, _, err := store.Revoke(t.Context(), keystore.Everything(), key.ID); err != nil {
		t.Fatal(err)
	}
	receive(t, "wake after a revocation", l.wakes)
	l.stop()
	if err := receive(t, "end", l.ended); !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
}

// A revocation between LISTEN and the caller's first read must not fall between the two.
func TestListenIsListeningBeforeTheFirstWake(t *testing.T) {
	store := open(t, database(t), keystore.Options{})
	key := insert(t, store)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	wakes := 0
	err := store.Listen(ctx, func() {
		wakes++
		switch wakes {
		case 1:
			if _, _, err := store.Revoke(ctx, keystore.Everything(), key.ID); err != nil {
				t.Error(err)
			}
		case 2:
			stop()
		}
	})
	if wakes != 2 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d wakes, %v", wakes, err)
	}
}

func TestListenTakesNoConnectionFromThePool(t *testing.T) {
	store := open(t, database(t), keystore.Options{MaxConns: 1})
	l := listen(t, store)
	receive(t, "wake", l.wakes)
	snapshot(t, store, "")
	if n := store.Pool().Stat().TotalConns(); n != 1 {
		t.Errorf("%d connections in the pool", n)
	}
}

func TestListenEndsWithItsConnection(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	l := listen(t, store)
	receive(t, "wake", l.wakes)
	pgtest.Exec(t, databaseURL, `
		select pg_terminate_backend(pid) from pg_stat_activity
		where datname = current_database() and query = 'listen rekall_keys'`)
	if err := receive(t, "end", l.ended); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
}

func TestListenEndsWhenTheServerHangs(t *testing.T) {
	t.Parallel() // it takes a ping's time
	server := pgtest.Server(t)
	l := listen(t, open(t, server.URL(), keystore.Options{}))
	receive(t, "wake", l.wakes)
	server.Pause()
	defer server.Resume()
	if err := receive(t, "end", l.ended); err == nil {
		t.Error("ended without an error")
	}
}

// The time that it takes is that of the two constants, and not for a test on a busy machine to measure.
func TestDeadConnectionIsNoticedWithinFiveSeconds(t *testing.T) {
	if within := keystore.PingEvery + keystore.PingTimeout; within >= 5*time.Second {
		t.Errorf("noticed after %v", within)
	}
}

func TestListenOutlastsSilence(t *testing.T) {
	t.Parallel() // it takes a ping's time
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	l := listen(t, store)
	receive(t, "wake", l.wakes)
	conn := connect(t, databaseURL)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for pinged := false; !pinged; {
		if err := conn.QueryRow(ctx, `
			select count(*) > 0 from pg_stat_activity where datname = current_database() and query = '-- ping'`).Scan(&pinged); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := store.Revoke(ctx, keystore.Everything(), key.ID); err != nil {
		t.Fatal(err)
	}
	receive(t, "wake after silence", l.wakes)
}

func TestListenReportsAServerThatIsAway(t *testing.T) {
	store := open(t, "postgres://user:password@127.0.0.1:1/db", keystore.Options{})
	if err := store.Listen(t.Context(), func() { t.Error("woke") }); err == nil {
		t.Error("no error")
	}
}

// TestListenThatAStandbyRefusesLeavesNoConnection: an edge tries again every few seconds.
func TestListenThatAStandbyRefusesLeavesNoConnection(t *testing.T) {
	primary := pgtest.Server(t)
	standby, err := primary.StartStandby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = standby.Stop(context.Background()) })
	store := open(t, standby.URL(), keystore.Options{})
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which would close what nobody has any longer
	if err := store.Listen(t.Context(), func() { t.Error("woke") }); err == nil {
		t.Error("a standby listens: the test shows nothing")
	}
	conn := connect(t, standby.URL())
	eventually.True(t, "the connection is closed", func() (closed bool) {
		if err := conn.QueryRow(t.Context(), `select not exists (select from pg_stat_activity where query = 'listen rekall_keys')`).Scan(&closed); err != nil {
			t.Fatal(err)
		}
		return closed
	})
}

// pgVersion is the server's version, as 150004 for 15.4.
func pgVersion(t *testing.T, databaseURL string) (version int) {
	t.Helper()
	if err := connect(t, databaseURL).QueryRow(t.Context(), `select current_setting('server_version_num')::int`).Scan(&version); err != nil {
		t.Fatal(err)
	}
	return version
}

// TestRevocationIsCommittedThoughAnotherUserHasFilledTheQueueOfNotifications: any user of the database can, and what notifies would fail
// at its commit. Before PostgreSQL 17 the queue has 8 GB, and is not filled here.
func TestRevocationIsCommittedThoughAnotherUserHasFilledTheQueueOfNotifications(t *testing.T) {
	server := pgtest.Server(t)
	small := pgVersion(t, server.URL()) >= 170000
	if small {
		pgtest.Exec(t, server.URL(), `alter system set max_notify_queue_pages = 64`)
		server.Kill()
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	pgtest.Migrate(t, server.URL())
	store, conn := open(t, server.URL(), keystore.Options{}), connect(t, server.URL())
	l := listen(t, store)
	receive(t, "wake after LISTEN", l.wakes)
	revoke := func() {
		t.Helper()
		key, start := insert(t, store), snapshot(t, store, "")
		if _, _, err := store.Revoke(t.Context(), keystore.Everything(), key.ID); err != nil {
			t.Fatal(err)
		}
		if !revokedIn(snapshot(t, store, start.Text), key) {
			t.Error("the feed has no revocation")
		}
	}
	if small {
		idle := connect(t, server.URL())
		exec(t, idle, `listen other`)
		exec(t, idle, `begin`)
		var err error
		for n := 0; n < 1000 && err == nil; n++ {
			_, err = conn.Exec(t.Context(), `select pg_notify('other', repeat('x', 7000))`)
		}
		if sqlState(err) != programLimitExceeded {
			t.Fatalf("the queue is not full: %v", err)
		}
		revoke()
		exec(t, idle, `commit`) // which takes from the queue
		eventually.True(t, "the queue has room", func() (room bool) {
			if err := conn.QueryRow(t.Context(), `select pg_notification_queue_usage() < 0.5`).Scan(&room); err != nil {
				t.Fatal(err)
			}
			return room
		})
	}
	revoke()
	receive(t, "wake after a revocation", l.wakes)
}

func TestOnlySecurityChangesNotify(t *testing.T) {
	databaseURL := database(t)
	store := open(t, databaseURL, keystore.Options{})
	key := insert(t, store)
	conn := connect(t, databaseURL)
	exec(t, conn, "listen rekall_keys")
	for _, test := range []struct {
		name, sql string
		want      int
	}{
		{"insert", `insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
			values ('key_0123456789abcdefABCDEF', 'acme', 'x', 'sandbox', sha256('x'), '{}')`, 0},
		{"rename", `update rekall.api_keys set name = 'Renamed'`, 0},
		{"hint", `update rekall.api_keys set hint = 'zzzz'`, 0},
		{"nothing", `update rekall.api_keys set scopes = scopes`, 0},
		{"scopes", `update rekall.api_keys set scopes = '{agents:read}' where id = '` + key.ID + `'`, 1},
		{"expiry", `update rekall.api_keys set expires_at = now() where id = '` + key.ID + `'`, 1},
		{"revocation of all in one transaction", `update rekall.api_keys set revoked_at = now()`, 1},
	} {
		pgtest.Exec(t, databaseURL, test.sql)
		pgtest.Exec(t, databaseURL, `select pg_notify('rekall_keys', 'end')`)
		if payloads := notificationsUntil(t, conn, "end"); len(payloads) != test.want || slices.ContainsFunc(payloads, func(s string) bool { return s != "" }) {
			t.Errorf("%s: notifications %q, want %d empty ones", test.name, payloads, test.want)
		}
	}
}

func notificationsUntil(t *testing.T, conn *pgx.Conn, end string) (payloads []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n.Payload == end {
			return payloads
		}
		payloads = append(payloads, n.Payload)
	}
}

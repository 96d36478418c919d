package usage_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/usage"
)

// BenchmarkCount is what counting adds to a request.
func BenchmarkCount(b *testing.B) {
	for _, keys := range []int{1, 1000, 100_000} {
		records := newRecords(keys)
		order := rand.Perm(keys)
		now := time.Now()
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			c := counted(records, now)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				c.Count(records[order[i%keys]], apikey.Allowed, now)
			}
		})
		b.Run(fmt.Sprintf("parallel/keys=%d", keys), func(b *testing.B) {
			c := counted(records, now)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for i := rand.IntN(keys); pb.Next(); i++ {
					c.Count(records[order[i%keys]], apikey.Allowed, now)
				}
			})
		})
	}
}

func counted(records []*apikey.Record, now time.Time) *usage.Counter {
	c := usage.New(nil, usage.Config{})
	for _, r := range records {
		c.Count(r, apikey.Allowed, now)
	}
	return c
}

// BenchmarkFlush is what flushes cost at 10,000 requests per second that spread evenly over 100,000 keys, the worst way for
// a batch: each interval of 10 s has 63,000 keys. core-% is the processor time of the gateway's process for the flush, as a
// share of one core over the interval; postgres-% is that of the server's process.
func BenchmarkFlush(b *testing.B) {
	const (
		interval = 10 * time.Second
		requests = 100_000
	)
	databaseURL := pgtest.Migrated(b)
	store := pgtest.Store(b, databaseURL)
	records := newRecords(100_000)
	c := usage.New(store, usage.Config{Instance: apikey.RandomText(22)})
	count := func() {
		now := time.Now()
		for range requests {
			c.Count(records[rand.IntN(len(records))], apikey.Allowed, now)
		}
	}
	for range 3 { // until nearly all keys have a row
		count()
		if err := usage.Flush(c, b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	conn, err := pgx.Connect(b.Context(), databaseURL)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	var own, server time.Duration
	flushes := 0
	for b.Loop() {
		b.StopTimer()
		count()
		b.StartTimer()
		serverBefore := serverTime(b, conn)
		ownBefore := processTime(b)
		if err := usage.Flush(c, b.Context()); err != nil {
			b.Fatal(err)
		}
		own += processTime(b) - ownBefore
		server += serverTime(b, conn) - serverBefore
		flushes++
	}
	b.ReportMetric(100*own.Seconds()/float64(flushes)/interval.Seconds(), "core-%")
	b.ReportMetric(100*server.Seconds()/float64(flushes)/interval.Seconds(), "postgres-%")
	var updates, hot int64
	if err := conn.QueryRow(b.Context(), `select sum(n_tup_upd), sum(n_tup_hot_upd) from pg_stat_user_tables where relname in ('usage', 'last_used')`).Scan(&updates, &hot); err != nil {
		b.Fatal(err)
	}
	b.Logf("%d of %d updates kept their page", hot, updates)
}

// processTime is the processor time that this process has used.
func processTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// serverTime is the processor time that the server processes of this database's connections have used.
func serverTime(b *testing.B, conn *pgx.Conn) time.Duration {
	b.Helper()
	rows, _ := conn.Query(b.Context(), `select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()`)
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		b.Fatal(err)
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on Linux
	var sum time.Duration
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		for _, field := range fields[11:13] {
			ticks, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			sum += time.Duration(ticks) * tick
		}
	}
	return sum
}

var _ usage.Store = (*keystore.Store)(nil)

package keystore

import (
	"context"
	"net"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// cleanupTimeout is how long a connection whose statement timed out may still occupy its place in the pool.
const cleanupTimeout = time.Second

// boundCleanup bounds what pgx does after a statement that timed out: it connects once more to have the statement cancelled,
// then waits for the server to close, for 15 seconds each time the network swallows everything. A few such statements would
// take every place in the pool, and the sync would stand still for that long after the network is back.
func boundCleanup(config *pgxpool.Config) {
	conn := config.ConnConfig
	dial, timeout := conn.DialFunc, conn.ConnectTimeout
	// pgx dials for a connection and for a cancellation alike. Only the former is told that it is connected.
	conn.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		deadline := time.Now().Add(timeout)
		ctx, cancel := context.WithDeadline(ctx, deadline)
		defer cancel()
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		_ = c.SetDeadline(deadline) // of an open connection: cannot fail
		return c, nil
	}
	conn.AfterConnect = func(_ context.Context, c *pgconn.PgConn) error { return c.Conn().SetDeadline(time.Time{}) }
	config.BeforeClose = func(c *pgx.Conn) {
		if !c.IsClosed() { // nothing is being cleaned up
			return
		}
		select {
		case <-c.PgConn().CleanupDone():
		case <-time.After(cleanupTimeout):
			_ = c.PgConn().Conn().Close()
		}
	}
}

package keystore

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// channel is where the database's trigger notifies of changes that matter to security.
const channel = "rekall_keys"

const (
	// pingEvery and pingTimeout together are how long a dead connection can go unnoticed: less than 5 s.
	pingEvery   = 4 * time.Second
	pingTimeout = 900 * time.Millisecond

	listenTimeout = 4 * time.Second // for connecting and LISTEN
	closeTimeout  = 500 * time.Millisecond
)

// Listen calls wake once it listens and after each notification of a change, on a connection of its own. A caller that
// reads the feed after each wake misses nothing: it listens before it first wakes. It returns ctx's error when ctx is done,
// and another when the connection is lost. Through PgBouncer's transaction pooling it succeeds and hears nothing.
func (s *Store) Listen(ctx context.Context, wake func()) error {
	conn, err := s.startListening(ctx)
	if err != nil {
		return listenError(ctx, err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		_ = conn.Close(ctx)
	}()
	for {
		wake()
		if err := waitForNotification(ctx, conn); err != nil {
			return listenError(ctx, err)
		}
	}
}

func listenError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return failedAtEdge("listen for changes", err)
}

func (s *Store) startListening(ctx context.Context) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	pool := s.pool.Config()
	if err := pool.BeforeConnect(ctx, pool.ConnConfig); err != nil {
		return nil, err
	}
	conn, err := pgx.ConnectConfig(ctx, pool.ConnConfig)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, "listen "+channel); err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	return conn, nil
}

// waitForNotification returns nil when there is one, and pings a connection that has been silent.
func waitForNotification(ctx context.Context, conn *pgx.Conn) error {
	for {
		waitCtx, cancel := context.WithTimeout(ctx, pingEvery)
		_, err := conn.WaitForNotification(waitCtx)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || conn.IsClosed() || !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		pingCtx, cancel := context.WithTimeout(ctx, pingTimeout)
		err = conn.Ping(pingCtx)
		cancel()
		if err != nil {
			return err
		}
	}
}

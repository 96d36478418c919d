package edge

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/eventually"
)

func TestAnEdgeThatStopsLeavesNoCanaryAlive(t *testing.T) {
	r := newRig(t)
	ctx, stop := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		NewCanary(r.reporter.store, zap.NewNop).Run(ctx, time.Hour)
	}()
	alive := func() (n int) {
		if err := r.conn.QueryRow(t.Context(), `select count(*) from rekall.api_keys where account = 'rekall:canary' and revoked_at is null`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	eventually.True(t, "a canary lives", func() bool { return alive() == 1 })
	stop()
	<-stopped
	if n := alive(); n != 0 {
		t.Errorf("%d canaries are left alive", n)
	}
}

func TestCanaryLivesUntilEveryEdgeMayHaveHeardOfIt(t *testing.T) {
	r := newRig(t)
	const settle = 300 * time.Millisecond
	if err := NewCanary(r.reporter.store, zap.NewNop).send(t.Context(), settle); err != nil {
		t.Fatal(err)
	}
	var settled bool
	if err := r.conn.QueryRow(t.Context(), `select revoked_at - created_at >= $1::interval from rekall.api_keys where account = 'rekall:canary'`,
		settle).Scan(&settled); err != nil {
		t.Fatal(err)
	}
	if !settled {
		t.Errorf("it was revoked before %v had passed", settle)
	}
}

// TestCanaryIsSentEveryMinuteThoughTheLastCouldNotBe, and the log tells of that once.
func TestCanaryIsSentEveryMinuteThoughTheLastCouldNotBe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logged := observer.New(zap.InfoLevel)
		c := NewCanary(pgtest.Store(t, "postgres://user:password@127.0.0.1:1/db"), func() *zap.Logger { return zap.New(core) })
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { c.Run(ctx, time.Second) })
		for minute := range 3 {
			<-time.After(canaryEvery / 2)
			if failure := c.LastFailure(); failure == nil || time.Since(failure.At) > canaryEvery {
				t.Errorf("minute %d: none was sent: %v", minute, failure)
			}
			<-time.After(canaryEvery / 2)
		}
		stop()
		running.Wait()
		if n := logged.FilterMessage("canary cannot be sent").Len(); n != 1 {
			t.Errorf("the log says %d times that none can be sent", n)
		}
	})
}

package edge

import (
	"context"
	"testing"
	"time"

	"go.uber.org/zap"

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

package edge

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

// canaryEvery is how often a canary is revoked, by one edge of all.
const canaryEvery = time.Minute

// Canary revokes a throw-away key every minute, so that every edge can measure how long a revocation takes to arrive.
type Canary struct {
	store    *keystore.Store
	failures outage.Failures
}

// NewCanary returns a Canary. logger is asked at each line.
func NewCanary(store *keystore.Store, logger func() *zap.Logger) *Canary {
	return &Canary{store: store, failures: outage.Failures{Logger: logger}}
}

// LastFailure returns the last failure to send a canary; nil: there was none.
func (c *Canary) LastFailure() *outage.Failure { return c.failures.Last() }

// Run sends canaries until ctx is done. settle is how long one lives, so that every edge has heard of it.
func (c *Canary) Run(ctx context.Context, settle time.Duration) {
	ticker := time.NewTicker(canaryEvery)
	defer ticker.Stop()
	sending := outage.Kind{Begins: "canary cannot be sent", Over: "canary is sent again", Level: zap.WarnLevel}
	for {
		err := c.send(ctx, settle)
		if ctx.Err() != nil {
			return
		}
		c.failures.Note(&sending, err)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

func (c *Canary) send(ctx context.Context, settle time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, settle+2*reportTimeout)
	defer cancel()
	id, err := c.store.CreateCanary(ctx)
	if err != nil || id == "" {
		return err
	}
	_ = pause(ctx, settle)
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), reportTimeout) // none is left alive by an edge that stops
	defer cancel()
	return c.store.RevokeCanary(ctx, id)
}

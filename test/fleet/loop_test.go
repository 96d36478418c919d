//go:build fleet

package fleet

import (
	"context"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/edge"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// loop is an edge in this process: all of a gateway but HTTP.
type loop struct{ cache *keycache.Cache }

// startLoop runs a loop until the test ends, and returns it when it has synced.
func startLoop(t *testing.T, database, name string, refresh, maxStaleness time.Duration) *loop {
	t.Helper()
	store, err := keystore.Open(database, keystore.Options{MaxConns: 2, PlanOnce: true})
	if err != nil {
		t.Fatal(err)
	}
	reporter := edge.NewReporter(store, edge.Identity{
		Instance: edge.NewInstance(), Name: name, Version: "test", MaxStaleness: maxStaleness,
	}, zap.NewNop)
	cache, err := keycache.New(store, keycache.Config{
		Size: 10_000, Refresh: refresh, MaxStaleness: maxStaleness, Report: reporter.Changed, Logger: zap.NewNop,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { cache.Run(ctx) })
	running.Go(func() { reporter.Run(ctx, cache.Applied) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
		cache.Close()
		store.Close()
	})
	eventually.True(t, "the loop has synced", func() bool { return cache.Status().Fresh })
	return &loop{cache}
}

func (l *loop) ask(key keyadmin.Key) answer {
	a := answer{decided: time.Now()}
	found, err := l.cache.Find(context.Background(), apikey.Hash(key.Key.Reveal()))
	a.arrived = time.Now()
	if err != nil {
		a.verdict = unavailable
		return a
	}
	switch outcome := found.Record.Validity(found.Now); outcome {
	case apikey.Allowed:
		a.verdict = allowed
	case apikey.Revoked:
		a.verdict = revoked
	default:
		a.verdict, a.detail = wrong, outcome.String()
	}
	return a
}

// Package redistest gives tests a real Redis of their own. Where there is none, tests fail; they never skip.
package redistest

import (
	"context"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv"
)

// Server starts a server, to be paused or killed, and ends it with the test.
func Server(t testing.TB, options devenv.RedisOptions) *devenv.Redis {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	server, err := devenv.StartRedis(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Kill)
	return server
}

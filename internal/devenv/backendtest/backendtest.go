// Package backendtest gives tests demo backends of their own.
package backendtest

import (
	"context"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv"
)

// Start starts a backend at a free port, and ends it with the test.
func Start(t testing.TB, name string) *devenv.Backend {
	t.Helper()
	return StartAt(t, name, "127.0.0.1:0")
}

// StartAt is Start for a backend that comes back to its address.
func StartAt(t testing.TB, name, address string) *devenv.Backend {
	t.Helper()
	backend, err := devenv.StartBackend(context.Background(), name, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = backend.Stop(context.Background()) })
	return backend
}

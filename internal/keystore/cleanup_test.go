package keystore_test

import (
	"context"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// TestTimedOutStatementsDoNotKeepTheirPlacesInThePool has a server that takes connections and answers nothing, to statements
// and cancellations alike. pgx by itself gives up after 15 s.
func TestTimedOutStatementsDoNotKeepTheirPlacesInThePool(t *testing.T) {
	t.Parallel() // it waits
	server := pgtest.Server(t)
	pgtest.Migrate(t, server.URL())
	for name, parameter := range map[string]string{"plain": "", "its own connect_timeout": "&connect_timeout=1"} {
		store := open(t, server.URL()+parameter, keystore.Options{MaxConns: 1})
		if _, err := store.Lookup(t.Context(), []apikey.Digest{{}}); err != nil {
			t.Fatal(err)
		}
		server.Pause()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if _, err := store.Lookup(ctx, []apikey.Digest{{}}); err == nil {
			t.Fatal("a server that is stopped answered")
		}
		cancel()
		eventually.Within(t, 10*time.Second, name+": the connection gives up its place", func() bool { return store.Pool().Stat().TotalConns() == 0 })
		server.Resume()
		if _, err := store.Lookup(t.Context(), []apikey.Digest{{}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConnectionOutlivesTheTimeAllowedForConnecting(t *testing.T) {
	t.Parallel() // it waits
	store := open(t, database(t)+"&connect_timeout=1", keystore.Options{MaxConns: 1})
	for _, later := range []time.Duration{0, 1500 * time.Millisecond} {
		<-time.After(later)
		if _, err := store.Lookup(t.Context(), []apikey.Digest{{}}); err != nil {
			t.Fatal(err)
		}
	}
	if n := store.Pool().Stat().NewConnsCount(); n != 1 {
		t.Errorf("%d connections were made, want one", n)
	}
}

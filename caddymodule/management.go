package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

// managements are shared by the configurations before and after a reload: requests of the old one may be in flight.
var managements = caddy.NewUsagePool()

// management is a pool of connections besides the edge's own: long lists must not delay decisions. A reload signs nobody out, and ends
// no outage.
type management struct {
	store *keystore.Store
	admin *keyadmin.Admin
	state *dashboard.State

	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup // checks

	trouble  trouble // with the database, of requests
	failures outage.Failures
}

const (
	// connectTimeout leaves time for the statements.
	connectTimeout = keyadmin.AnswerWithin - time.Second

	// fairShare is how much of a request's time Postgres must have had for its silence to count: a client that sends its body
	// slowly uses the time up.
	fairShare = time.Second
)

func newManagement(database string) (*management, error) {
	store, err := keystore.Open(database, keystore.Options{
		MaxConns: keyadmin.Connections, ApplicationName: "rekall-gateway keys", ConnectTimeout: connectTimeout, Asked: asks,
	})
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	admin := keyadmin.New(store)
	m := &management{store: store, admin: admin, state: dashboard.NewState(admin)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m, nil
}

// Destruct ends the management when no configuration uses it any longer. Requests of the last one may be in flight after a reload: they
// have all their time.
func (m *management) Destruct() error {
	if caddy.Exiting() {
		m.close()
		return nil
	}
	time.AfterFunc(keyadmin.ReadWithin, m.close)
	return nil
}

func (m *management) close() {
	m.cancel()
	m.running.Wait()
	m.state.Close()
	m.store.Close()
}

// check logs at the start what customers would otherwise be the first to notice. Nobody waits for it: Postgres may be away.
func (m *management) check(logger *zap.Logger) {
	m.running.Go(func() {
		ctx, cancel := context.WithTimeout(m.ctx, keyadmin.AnswerWithin)
		defer cancel()
		err := m.admin.Ready(ctx)
		if err == nil || m.ctx.Err() != nil {
			return
		}
		m.failures.Keep(err)
		logger.Warn("API keys cannot be managed: look at the database of rekall_keys, at the role of its user and at its schema",
			zap.String("error", apikey.Redact(err.Error())))
	})
}

// note records how a request that asked the database has ended. If only writes fail, troubleOver keeps each list from ending the
// trouble, and each new key from beginning it again. The logger is the request's configuration's.
func (m *management) note(logger *zap.Logger, err error) {
	if err == nil {
		if m.trouble.over() {
			logger.Info("API keys can be managed again")
		}
		return
	}
	m.failures.Keep(err)
	if m.trouble.met() {
		logger.Error("API keys cannot be managed", zap.Error(err))
	}
}

// askedKey leads to the instant at which a request asked the managing database last; 0: it did not.
type askedKey struct{}

func asking(ctx context.Context) context.Context {
	return context.WithValue(ctx, askedKey{}, new(atomic.Int64))
}

// asks is called by the store.
func asks(ctx context.Context) {
	if at, ok := ctx.Value(askedKey{}).(*atomic.Int64); ok {
		at.Store(int64(now()))
	}
}

// answered is called by the API and the dashboard when a request has ended. One that did not ask Postgres says nothing about it.
func (k *Keys) answered(r *http.Request, err error) {
	at := instant(r.Context().Value(askedKey{}).(*atomic.Int64).Load())
	switch {
	case at == 0 || err != nil && inVain(r.Context(), at):
		return
	case err != nil:
		k.metrics.keysErrors.Inc()
		err = errors.New(apikey.Redact(err.Error()))
	}
	k.managed.note(k.logger, err)
}

// inVain reports whether a request failed because its client left Postgres no time.
func inVain(ctx context.Context, asked instant) bool {
	deadline, limited := ctx.Deadline()
	return limited && ctx.Err() != nil && asked.since()+time.Until(deadline) < fairShare
}

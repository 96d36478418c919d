package caddymodule

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() { caddy.RegisterModule((*Drain)(nil)) }

// defaultDrain is several round trips to far-away clients: a TLS handshake takes two.
const defaultDrain = caddy.Duration(500 * time.Millisecond)

// Drain is a listener wrapper, the first of a server's, that closes the listener a moment before the server shuts down, for a
// reload too. Go's server does not answer a request that it reads after its shutdown has begun. With Drain there are hardly any: it
// takes no more connections, and gateways close kept ones with their next answer. New ones reach the next configuration, or another
// program on the same port, as during an upgrade.
type Drain struct {
	// How long clients have to send the requests that are under way before the shutdown. All servers wait once, for the
	// longest delay of any. Default: 500ms.
	Delay caddy.Duration `json:"delay,omitempty"`

	drains *drains
}

// drains is what the Drains of a configuration share. Caddy calls the handlers of an event one after another: with one each, their
// delays would add up, and servers would go on listening while another waits.
type drains struct {
	ctx       caddy.Context
	mu        sync.Mutex
	delay     time.Duration // the longest
	listeners []net.Listener
}

// drainsOf returns those of the configuration that has these events.
func drainsOf(ctx caddy.Context, events *caddyevents.App) *drains {
	for _, subscription := range events.Subscriptions {
		for _, handler := range subscription.Handlers {
			if shared, ok := handler.(*drains); ok {
				return shared
			}
		}
	}
	shared := &drains{ctx: ctx}
	events.Subscriptions = append(events.Subscriptions, &caddyevents.Subscription{
		Events: []string{"stopping"}, Handlers: []caddyevents.Handler{shared},
	})
	return shared
}

// CaddyModule returns the Caddy module information.
func (*Drain) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.listeners.rekall_drain", New: func() caddy.Module { return new(Drain) }}
}

// Provision has Caddy tell when it stops this configuration.
func (d *Drain) Provision(ctx caddy.Context) error {
	switch {
	case d.Delay < 0:
		return errors.New("delay is negative")
	case d.Delay == 0:
		d.Delay = defaultDrain
	}
	for _, module := range ctx.Modules() {
		if app, ok := module.(*caddyhttp.App); ok && app.ShutdownDelay > 0 {
			return errors.New("rekall_drain stops listening at once, and shutdown_delay goes on listening: " +
				"remove shutdown_delay or rekall_drain")
		}
	}
	events, err := ctx.App("events")
	if err != nil {
		return err
	}
	d.drains = drainsOf(ctx, events.(*caddyevents.App))
	d.drains.mu.Lock()
	defer d.drains.mu.Unlock()
	d.drains.delay = max(d.drains.delay, time.Duration(d.Delay))
	return nil
}

// WrapListener wraps a listener of the server.
func (d *Drain) WrapListener(inner net.Listener) net.Listener {
	l := &drained{Listener: inner, once: sync.OnceValue(inner.Close)}
	d.drains.mu.Lock()
	defer d.drains.mu.Unlock()
	d.drains.listeners = append(d.drains.listeners, l)
	return l
}

// Handle closes the listeners of all servers and waits. Caddy stops the servers when it returns.
func (d *drains) Handle(ctx context.Context, _ caddy.Event) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.listeners) == 0 { // a configuration that never started
		return nil
	}
	for _, l := range d.listeners {
		_ = l.Close()
	}
	if app, err := d.ctx.AppIfConfigured("rekall"); err == nil {
		app.(*App).draining.Store(true)
	}
	select {
	case <-time.After(d.delay):
	case <-ctx.Done():
	}
	return nil
}

// UnmarshalCaddyfile reads the wrapper:
//
//	rekall_drain [<delay>]
func (d *Drain) UnmarshalCaddyfile(in *caddyfile.Dispenser) error {
	in.Next()
	if in.NextArg() {
		var err error
		if d.Delay, err = parseDuration(in.Val()); err != nil {
			return in.Errf("rekall_drain: %q is not usable: %v", in.Val(), err)
		}
	}
	if in.NextArg() || in.NextBlock(0) {
		return in.Err("rekall_drain takes one argument at most, and no block")
	}
	return nil
}

// drained is a listener that may be closed twice, here and by its server: Caddy counts the users of a port, and would subtract two.
type drained struct {
	net.Listener
	once func() error
}

func (l *drained) Close() error { return l.once() }

var (
	_ caddy.Provisioner     = (*Drain)(nil)
	_ caddy.ListenerWrapper = (*Drain)(nil)
	_ caddyevents.Handler   = (*drains)(nil)
	_ caddyfile.Unmarshaler = (*Drain)(nil)
)

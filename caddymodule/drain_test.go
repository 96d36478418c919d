package caddymodule

import (
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

// closeSignal is a listener that tells when it is closed.
type closeSignal struct {
	net.Listener
	closed chan struct{}
}

func (l closeSignal) Close() error {
	close(l.closed)
	return nil
}

// TestServersOfAConfigurationDrainTogether: all stop listening before any waits, and the longest delay is the whole wait.
func TestServersOfAConfigurationDrainTogether(t *testing.T) {
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	var listeners []closeSignal
	for _, delay := range []time.Duration{time.Second, 3 * time.Second, 2 * time.Second} {
		d := &Drain{Delay: caddy.Duration(delay)}
		if err := d.Provision(ctx); err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, closeSignal{closed: make(chan struct{})})
		d.WrapListener(listeners[len(listeners)-1])
	}
	app, err := ctx.App("events")
	if err != nil {
		t.Fatal(err)
	}
	events := app.(*caddyevents.App)
	if err := events.Start(); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		began, stopped := time.Now(), make(chan time.Duration, 1)
		go func() {
			events.Emit(ctx, "stopping", nil)
			stopped <- time.Since(began)
		}()
		synctest.Wait() // until it waits
		for i, l := range listeners {
			select {
			case <-l.closed:
			default:
				t.Errorf("server %d goes on listening while others drain", i)
			}
		}
		if took := <-stopped; took != 3*time.Second {
			t.Errorf("the servers drained for %v, want the longest delay, 3s", took)
		}
	})
}

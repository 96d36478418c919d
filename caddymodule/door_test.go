package caddymodule

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/keycache"
)

// oneFlight is a cache that knows every key to be good, and gives away the request in flight, to be cut.
type oneFlight struct{ inFlight keycache.Request }

func (*oneFlight) Find(context.Context, apikey.Digest) (keycache.Found, error) {
	record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
	return keycache.Found{Record: &record, Now: time.Now()}, nil
}

func (o *oneFlight) Track(_ *keycache.Flight, _ keycache.Found, request keycache.Request) bool {
	o.inFlight = request
	return true
}

func (*oneFlight) Cached(apikey.Digest) bool { return true }

func (*oneFlight) Untrack(*keycache.Flight) {}

func (o *oneFlight) cut() { o.inFlight.Cut(&keycache.Cut{Outcome: apikey.Revoked}) }

// keepAlive is a server with our door, and one connection of HTTP/1 to it.
type keepAlive struct {
	t      *testing.T
	flight oneFlight
	conn   net.Conn
	reader *bufio.Reader
}

// newKeepAlive has the gateway call handler in place of a proxy, and before, for what a middleware does to a request, arrive.
func newKeepAlive(t *testing.T, arrive func(*http.Request) *http.Request, handler caddyhttp.HandlerFunc) *keepAlive {
	t.Helper()
	k := &keepAlive{t: t}
	entrance := gatewayOn(t, &k.flight, handler).entrance(t)
	server := httptest.NewUnstartedServer(door{next: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		entrance.next.ServeHTTP(w, arrive(r))
	})})
	server.Config.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return newConnection(ctx) }
	server.Start()
	t.Cleanup(server.Close)
	var err error
	if k.conn, err = net.Dial("tcp", server.Listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.conn.Close() })
	if err := k.conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	k.reader = bufio.NewReader(k.conn)
	return k
}

// ask sends a request with a good key.
func (k *keepAlive) ask() *http.Response {
	k.t.Helper()
	return k.askWith(http.Header{"Authorization": {"Bearer " + apikey.Generate(apikey.Production)}})
}

func (k *keepAlive) askWith(h http.Header) *http.Response {
	k.t.Helper()
	req := httptest.NewRequest("GET", "http://api.rekall.ai/v1/memories", nil)
	req.Header = h
	if err := req.Write(k.conn); err != nil {
		k.t.Fatal(err)
	}
	resp, err := http.ReadResponse(k.reader, req)
	if err != nil {
		k.t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp
}

func wantDone(t *testing.T, r *http.Request) {
	t.Helper()
	select {
	case <-r.Context().Done():
	case <-time.After(10 * time.Second):
		t.Error("the request was not cut")
	}
}

func asItCame(r *http.Request) *http.Request { return r }

func TestCutEndsTheConnectionOfHTTP1WithARefusal(t *testing.T) {
	var k *keepAlive
	k = newKeepAlive(t, asItCame, func(w http.ResponseWriter, r *http.Request) error {
		k.flight.cut()
		wantDone(t, r)
		var cut *keycache.Cut
		if cause := context.Cause(r.Context()); !errors.As(cause, &cut) || !errors.Is(cause, context.Canceled) {
			t.Errorf("cause %v", cause)
		}
		w.WriteHeader(statusClientClosed) // as Caddy's proxy does
		return nil
	})
	if resp := k.ask(); resp.StatusCode != http.StatusUnauthorized || !resp.Close {
		t.Errorf("answer %d, the connection is to be closed: %v", resp.StatusCode, resp.Close)
	}
}

// TestCutThatCameTooLateIsNotTheNextRequestsEnd: the connection's context, cancelled for a request that was answered already, is
// the parent of the next request's too.
func TestCutThatCameTooLateIsNotTheNextRequestsEnd(t *testing.T) {
	served := 0
	var k *keepAlive
	k = newKeepAlive(t, asItCame, func(w http.ResponseWriter, r *http.Request) error {
		served++
		if err := r.Context().Err(); err != nil {
			t.Errorf("request %d came cancelled: %v", served, err)
		}
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(http.StatusOK)
		k.flight.cut()
		if served > 1 { // cut anew, by its own context
			wantDone(t, r)
		}
		return nil
	})
	if resp := k.ask(); resp.StatusCode != http.StatusOK || resp.Close {
		t.Fatalf("answer %d, closing %v", resp.StatusCode, resp.Close)
	}
	if resp := k.ask(); resp.StatusCode != http.StatusOK || !resp.Close {
		t.Errorf("answer %d, closing %v", resp.StatusCode, resp.Close)
	}
	if served != 2 {
		t.Errorf("%d requests were served", served)
	}
}

// TestCutReachesARequestWhoseContextIsNotTheServers: a handler before the gateway may detach it from the connection.
func TestCutReachesARequestWhoseContextIsNotTheServers(t *testing.T) {
	for name, detach := range map[string]func(context.Context) context.Context{
		"without an end": context.WithoutCancel,
		"with an end of its own": func(ctx context.Context) context.Context {
			ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
			t.Cleanup(cancel)
			return ctx
		},
	} {
		t.Run(name, func(t *testing.T) {
			arrive := func(r *http.Request) *http.Request { return r.WithContext(detach(r.Context())) }
			var k *keepAlive
			k = newKeepAlive(t, arrive, func(w http.ResponseWriter, r *http.Request) error {
				k.flight.cut()
				wantDone(t, r)
				w.WriteHeader(statusClientClosed)
				return nil
			})
			if resp := k.ask(); resp.StatusCode != http.StatusUnauthorized || resp.Close {
				t.Errorf("answer %d, closing %v", resp.StatusCode, resp.Close)
			}
		})
	}
}

// TestRequestHasNotTheCredentialOfTheOneBefore: both come on one connection.
func TestRequestHasNotTheCredentialOfTheOneBefore(t *testing.T) {
	k := newKeepAlive(t, asItCame, passing{}.ServeHTTP)
	for range 2 {
		if resp := k.ask(); resp.StatusCode != http.StatusNoContent {
			t.Errorf("with a good key: answer %d", resp.StatusCode)
		}
		for name, header := range map[string]http.Header{
			"no key": {}, "what the door leaves": {"X-Api-Key": {"abc"}}, "what cannot be a key": {"Authorization": {"Bearer rk_abc"}},
		} {
			if resp := k.askWith(header); resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("with %s: answer %d", name, resp.StatusCode)
			}
		}
	}
}

// TestRequestThatOutlivesItsAnswerKeepsItsOwnCredential: a handler may run on after its answer, while the connection's next request is
// served.
func TestRequestThatOutlivesItsAnswerKeepsItsOwnCredential(t *testing.T) {
	first, second := apikey.Generate(apikey.Production), apikey.Generate(apikey.Production)
	var late *http.Request
	k := newKeepAlive(t, func(r *http.Request) *http.Request {
		if late == nil {
			late = r
		} else if c := credential.Take(late); c.Digest != apikey.Hash(first) {
			t.Errorf("its credential is of kind %d, and the next request's: %v", c.Kind, c.Digest == apikey.Hash(second))
		}
		return r
	}, passing{}.ServeHTTP)
	for _, key := range []string{first, second} {
		if resp := k.askWith(http.Header{"X-Api-Key": {key}}); resp.StatusCode != http.StatusNoContent {
			t.Errorf("answer %d", resp.StatusCode)
		}
	}
}

// TestEachServerOnTheHTTPPortIsGuarded: Caddy redirects there, and logs what it redirects.
func TestEachServerOnTheHTTPPortIsGuarded(t *testing.T) {
	for _, tc := range []struct {
		port    int
		listen  string
		guarded bool
	}{
		{0, ":80", true}, {0, ":8080", false}, {8080, ":8080", true}, {8080, ":80", false},
		{8080, ":8070-8090", true}, {8080, ":8080-8090", true}, {8080, ":8070-8080", true}, {8080, ":8081-8090", false}, {8080, ":8070-8079", false},
	} {
		server := &caddyhttp.Server{Listen: []string{"127.0.0.1:1", tc.listen}}
		guardHTTPPort(&caddyhttp.App{HTTPPort: tc.port, Servers: map[string]*caddyhttp.Server{"s": server}})
		if guarded := server.TrustedProxiesStrict == 1; guarded != tc.guarded {
			t.Errorf("a server on %s with http_port %d: guarded %v", tc.listen, tc.port, guarded)
		}
	}
}

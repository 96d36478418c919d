package caddymodule

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	zaplog "go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/http2"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/test/network"
)

// closeCounter is a body that knows whether it was closed.
type closeCounter struct {
	io.Reader
	closed atomic.Bool
}

func (c *closeCounter) Close() error {
	c.closed.Store(true)
	return nil
}

// provisioned gives a transport its environment, and what Caddy does.
func provisioned(t *testing.T, transport *Transport) *Transport {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	transport.Environment = "production"
	if err := transport.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	return transport
}

func TestTransportContactsItsBackendForNobodyButTheGatewayAndHealthChecks(t *testing.T) {
	var reached atomic.Int64
	backend := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	defer backend.Close()
	transport := provisioned(t, new(Transport))
	ofClient := context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{})
	allowed := func(environment apikey.Environment) context.Context {
		return context.WithValue(&pass{Context: ofClient, environment: environment}, caddyhttp.OriginalRequestCtxKey, http.Request{})
	}
	for name, tc := range map[string]struct {
		ctx    context.Context
		status int
		code   string
	}{
		"allowed":           {allowed(apikey.Production), http.StatusOK, ""},
		"health check":      {context.WithValue(t.Context(), caddyhttp.OriginalRequestCtxKey, http.Request{}), http.StatusOK, ""},
		"no pass":           {ofClient, http.StatusForbidden, "GATEWAY_REQUIRED"},
		"pass for sandbox":  {allowed(apikey.Sandbox), http.StatusForbidden, "SANDBOX_PRODUCTION_MISMATCH"},
		"pass for no place": {allowed(0), http.StatusForbidden, "SANDBOX_PRODUCTION_MISMATCH"},
	} {
		t.Run(name, func(t *testing.T) {
			before := reached.Load()
			body := &closeCounter{Reader: strings.NewReader("body")}
			r, err := http.NewRequestWithContext(tc.ctx, "POST", backend.URL, body)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := transport.RoundTrip(r)
			if err != nil {
				t.Fatalf("an error, which the proxy counts against the backend: %v", err)
			}
			defer func() { _ = resp.Body.Close() }()
			content, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tc.status || !strings.Contains(string(content), tc.code) {
				t.Errorf("answer %d %s, want %d %s", resp.StatusCode, content, tc.status, tc.code)
			}
			if got := reached.Load() - before; (got == 1) != (tc.status == http.StatusOK) {
				t.Errorf("the backend was reached %d times", got)
			}
			if tc.status != http.StatusOK && !body.closed.Load() {
				t.Error("the body was not closed")
			}
		})
	}
}

// TestRequestsThatNoGatewayAllowedAreLoggedOnceForAllWhileTheyCome: anybody could fill the log with them.
func TestRequestsThatNoGatewayAllowedAreLoggedOnceForAllWhileTheyCome(t *testing.T) {
	transport := provisioned(t, new(Transport))
	core, logs := zaplog.New(zap.DebugLevel)
	transport.logger = zap.New(core)
	synctest.Test(t, func(t *testing.T) {
		send := func(n int) {
			for range n {
				r := httptest.NewRequest("GET", "/", nil)
				resp, err := transport.RoundTrip(r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, map[string]any{})))
				if err != nil {
					t.Fatal(err)
				}
				_ = resp.Body.Close()
			}
		}
		send(100)
		if n := logs.FilterLevelExact(zap.ErrorLevel).Len(); n != 1 {
			t.Errorf("%d errors for 100 requests, want 1", n)
		}
		<-time.After(troubleOver)
		send(100)
		if errors, all := logs.FilterLevelExact(zap.ErrorLevel).Len(), logs.Len(); errors != 2 || all != 200 {
			t.Errorf("%d errors of %d lines, want 2 of 200", errors, all)
		}
	})
}

// The proxy reads the headers of what is upgraded, tried again or logged in full.
func TestTransportLeavesTheProxyTheHeadersThatItReads(t *testing.T) {
	received := make(chan string, 1)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		received <- r.Header.Get("X-Of-Client")
		if r.URL.Path == "/503" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer backend.Close()
	for name, tc := range map[string]struct {
		path  string
		debug bool
		left  string
	}{
		"answered":               {"/", false, ""},
		"answered, while logged": {"/", true, "value"},
		"to be tried again":      {"/503", false, "value"},
	} {
		t.Run(name, func(t *testing.T) {
			transport := provisioned(t, new(Transport))
			transport.debug = tc.debug
			ofClient := context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{})
			ctx := context.WithValue(&pass{Context: ofClient, environment: apikey.Production}, caddyhttp.OriginalRequestCtxKey, http.Request{})
			r, err := http.NewRequestWithContext(ctx, "GET", backend.URL+tc.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("X-Of-Client", "value")
			ofProxy := r.Header
			resp, err := transport.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if got := <-received; got != "value" {
				t.Errorf("the backend received %q", got)
			}
			if got := r.Header.Get("X-Of-Client"); got != tc.left {
				t.Errorf("%q is left", got)
			}
			if ofProxy.Get("X-Of-Client") != "value" {
				t.Error("the headers themselves are changed: the proxy sends them again")
			}
		})
	}
}

func TestTransportOfNoEnvironmentIsRefused(t *testing.T) {
	cctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	for _, environment := range []string{"", "live", "none"} {
		if err := (&Transport{Environment: environment}).Provision(cctx); err == nil {
			t.Errorf("environment %q is accepted", environment)
		}
	}
}

func routes(h ...caddyhttp.MiddlewareHandler) caddyhttp.RouteList {
	return caddyhttp.RouteList{{Handlers: h}}
}

func proxy(upstream string) caddyhttp.MiddlewareHandler {
	return &reverseproxy.Handler{Upstreams: reverseproxy.UpstreamPool{{Dial: upstream}}}
}

// TestErrorRouteOfASubrouteIsAWayPastTheGateway: a Caddyfile makes none, JSON may have them.
func TestErrorRouteOfASubrouteIsAWayPastTheGateway(t *testing.T) {
	err := checkRoutes(&caddyhttp.App{Servers: map[string]*caddyhttp.Server{"srv0": {Routes: routes(
		&caddyhttp.Subroute{Errors: &caddyhttp.HTTPErrorConfig{Routes: routes(proxy("prod:80"))}},
		&Gateway{production: block{configured: proxy("prod:80")}},
	)}}}, zap.NewNop())
	if err == nil || !strings.Contains(err.Error(), "also reachable without one") {
		t.Errorf("error %v: a backend of the gateway answers the errors of anybody", err)
	}
}

// TestServerThatClientsReachCannotBeBehindAGateway: they would come to it without a key.
func TestServerThatClientsReachCannotBeBehindAGateway(t *testing.T) {
	for _, tc := range []struct {
		upstream string
		listen   []string
		refused  bool
	}{
		{"localhost:9000", []string{":9000"}, true},
		{"127.0.0.1:9000", []string{"0.0.0.0:9000"}, true},
		{"127.0.0.2:9000", []string{"[::]:9000"}, true},
		{"[::1]:9000", []string{"tcp/:8000-9000"}, true},
		{"10.0.0.5:9000", []string{"10.0.0.5:9000"}, true},
		{"Edge-1:9000", []string{"edge-1.:9000"}, true},
		{"localhost:9000", []string{"127.0.0.1:9000", "10.0.0.5:9001"}, true}, // another way to the same server
		{"localhost:443", []string{"127.0.0.1:443"}, true},                    // the gateway's own, whatever it is bound to
		{"unix//run/gateway.sock", []string{"unix//run/gateway.sock|0666"}, true},
		{"localhost:9000", []string{"127.0.0.1:9000", "[::1]:9000"}, false},
		{"127.0.0.2:9000", []string{"127.0.0.2:9000"}, false},
		{"unix//run/../run/inner.sock", []string{"unix//run/inner.sock|0222"}, false},
		{"localhost:9001", []string{":9000"}, false},
		{"prod-1:9000", []string{":9000"}, false}, // another machine's
		{"10.0.0.6:9000", []string{"10.0.0.5:9000"}, false},
	} {
		inner := &caddyhttp.Server{Listen: tc.listen, Routes: routes(proxy("prod:80"))}
		outer := &caddyhttp.Server{Listen: []string{"127.0.0.1:443", "unix//run/gateway.sock"},
			Routes: routes(&Gateway{production: block{configured: proxy(tc.upstream)}})}
		err := checkRoutes(&caddyhttp.App{Servers: map[string]*caddyhttp.Server{"inner": inner, "outer": outer}}, zap.NewNop())
		if refused := err != nil && strings.Contains(err.Error(), "clients reach without a rekall_gateway"); refused != tc.refused || err != nil && !refused {
			t.Errorf("%s, of a server that listens on %s: %v", tc.upstream, tc.listen, err)
		}
	}
}

// TestServerBehindAGatewayIsDialledByItAlone, on whichever of its addresses.
func TestServerBehindAGatewayIsDialledByItAlone(t *testing.T) {
	err := checkRoutes(&caddyhttp.App{Servers: map[string]*caddyhttp.Server{
		"inner": {Listen: []string{"127.0.0.1:9000-9001"}},
		"outer": {Listen: []string{":443"}, Routes: routes(
			&Gateway{production: block{configured: proxy("localhost:9000")}}, proxy("localhost:9001"),
		)},
	}}, zap.NewNop())
	if err == nil || !strings.Contains(err.Error(), "also reachable without one") {
		t.Errorf("error %v: clients reach the server behind the gateway", err)
	}
}

func TestSpellingsOfOneAddressAreOne(t *testing.T) {
	t.Setenv("REKALL_TEST_UPSTREAM", "127.0.0.1:80")
	for _, same := range [][]string{
		{"localhost:80", "LOCALHOST:80", "127.0.0.1:80", "[::1]:80", ":80", "0.0.0.0:80", "[::ffff:127.0.0.1]:80", "tcp/localhost:80", "tcp4/127.0.0.1:80", "{env.REKALL_TEST_UPSTREAM}"},
		{"prod-1:8080", "Prod-1:8080", "prod-1.:8080", "tcp/prod-1:8080"},
		{"[2001:DB8::1]:1", "[2001:db8:0::1]:1"},
		{"unix//run/a.sock", "unix//run/../run/a.sock"},
	} {
		for _, spelling := range same {
			if got, want := normalize(spelling), normalize(same[0]); got != want {
				t.Errorf("%s is %s, want %s", spelling, got, want)
			}
		}
	}
	for _, other := range []string{"localhost:81", "127.0.0.2:80", "prod-1:80", "unix//run/A.sock"} {
		if normalize(other) == "localhost:80" {
			t.Errorf("%s is taken for this machine's port 80", other)
		}
	}
}

func TestTransportKeepsManyIdleConnectionsUnlessToldOtherwise(t *testing.T) {
	for given, want := range map[int]int{0: idleConnsPerHost, 7: 7} {
		transport := new(Transport)
		transport.KeepAlive = &reverseproxy.KeepAlive{MaxIdleConnsPerHost: given}
		provisioned(t, transport)
		if got := transport.Transport.MaxIdleConnsPerHost; got != want {
			t.Errorf("given %d: %d idle connections per host, want %d", given, got, want)
		}
	}
}

// TestBackendThatCannotBeDialledIsAtFaultForAWebSocketToo: one that serves nothing else would never be taken away.
func TestBackendThatCannotBeDialledIsAtFaultForAWebSocketToo(t *testing.T) {
	transport := provisioned(t, new(Transport))
	p := &pass{Context: context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{}), environment: apikey.Production}
	r := httptest.NewRequestWithContext(p, http.MethodGet, "http://127.0.0.1:1/v1/memories", nil)
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", "websocket")
	_, err := transport.RoundTrip(r)
	if _, dial := errors.AsType[reverseproxy.DialError](err); !dial || p.failed.Load() != nil {
		t.Errorf("error %v, of the client: %v", err, p.failed.Load())
	}
}

// TestAnswerThatIsNotFinalIsAFailureOfItsBackend: net/http gives what it cannot read as one to its caller, of whom the client would get an
// empty 200.
func TestAnswerThatIsNotFinalIsAFailureOfItsBackend(t *testing.T) {
	const webSocket = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
	for _, tc := range []struct {
		answer, upgrade string
		passes          bool
	}{
		{"000 None\r\n", "", false},
		{"099 None\r\n", "", false},
		{"101 Switching Protocols\r\n", "", false},
		{"101 Switching Protocols\r\n" + webSocket, "", false},
		{"101 Switching Protocols\r\n", "websocket", false},
		{"101 Switching Protocols\r\nUpgrade: websocket\r\n", "websocket", false},
		{"101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n", "websocket", false},
		{"101 Switching Protocols\r\n" + webSocket, "WebSocket", true},
		{"103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n", "", true},
	} {
		backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(conn, "HTTP/1.1 "+tc.answer+"\r\n")
			_ = conn.Close()
		}))
		transport := provisioned(t, new(Transport))
		p := &pass{Context: context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{}), environment: apikey.Production}
		r := httptest.NewRequestWithContext(p, http.MethodGet, backend.URL+"/v1/memories", nil)
		if tc.upgrade != "" {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", tc.upgrade)
		}
		answer, err := transport.RoundTrip(r)
		if (err == nil) != tc.passes {
			t.Errorf("%q to a request to upgrade to %q: %v, %v", tc.answer, tc.upgrade, answer, err)
		}
		if err == nil {
			_ = answer.Body.Close()
		}
		backend.Close()
	}
}

// TestProxyIsLeftNoIdentityTokenToLog: it logs the request when its answer breaks off, which a client brings about by leaving.
func TestProxyIsLeftNoIdentityTokenToLog(t *testing.T) {
	received := make(chan string, 1)
	backend := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		received <- r.Header.Get(identityTokenHeader)
	}))
	backend.Config.Protocols = new(http.Protocols)
	backend.Config.Protocols.SetUnencryptedHTTP2(true)
	backend.Config.Protocols.SetHTTP1(true)
	backend.Start()
	defer backend.Close()
	for _, versions := range [][]string{nil, {"h2c"}} {
		transport := provisioned(t, &Transport{HTTPTransport: reverseproxy.HTTPTransport{Versions: versions}})
		transport.debug = false
		p := &pass{Context: context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{}), environment: apikey.Production}
		r := httptest.NewRequestWithContext(p, http.MethodGet, backend.URL+"/v1/memories", nil)
		r.Header.Set(identityTokenHeader, "token")
		answer, err := transport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = answer.Body.Close()
		if token := <-received; token != "token" {
			t.Errorf("versions %v: the backend receives %q", versions, token)
		}
		if token := r.Header.Get(identityTokenHeader); token != "" {
			t.Errorf("versions %v: the proxy may log %q", versions, token)
		}
	}
}

// TestLittleOfAnAnswerWaitsInMemoryForAClientThatDoesNotRead: over HTTP/2 the backend sends as much as it is let, whatever the client reads.
func TestLittleOfAnAnswerWaitsInMemoryForAClientThatDoesNotRead(t *testing.T) {
	settings := make(chan *http2.SettingsFrame, 1)
	backend := network.Serve(t, func(conn net.Conn) {
		if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		frame, err := http2.NewFramer(conn, conn).ReadFrame()
		first, ok := frame.(*http2.SettingsFrame)
		if !ok {
			t.Errorf("the first frame is %v, %v", frame, err)
			return
		}
		settings <- first
		_, _ = io.Copy(io.Discard, conn) // until the test ends
	})
	transport := provisioned(t, &Transport{HTTPTransport: reverseproxy.HTTPTransport{Versions: []string{"h2c"}}})
	p := &pass{Context: context.WithValue(t.Context(), caddyhttp.VarsCtxKey, map[string]any{}), environment: apikey.Production}
	ended := make(chan error, 1)
	go func() {
		_, err := transport.RoundTrip(httptest.NewRequestWithContext(p, http.MethodGet, "http://"+backend+"/v1/memories", nil))
		ended <- err
	}()
	select {
	case first := <-settings:
		if window, _ := first.Value(http2.SettingInitialWindowSize); window == 0 || window > 1<<20 {
			t.Errorf("a backend may send %d bytes that nobody reads", window)
		}
	case err := <-ended:
		t.Errorf("the request ended before there was a connection: %v", err)
	}
}

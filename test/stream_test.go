package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/fcgi"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

// open sends a request whose answer goes on, and returns it once its first bytes are here.
func (g *gateway) open(method, path string, header http.Header, body io.Reader) *http.Response {
	g.t.Helper()
	return g.openOver(client.Transport, method, path, header, body)
}

// openOver sends a request without a body again while the gateway cannot tell whose key it is.
func (g *gateway) openOver(transport http.RoundTripper, method, path string, header http.Header, body io.Reader) (resp *http.Response) {
	g.t.Helper()
	eventually.True(g.t, "the gateway can tell whose key it is", func() bool {
		resp = g.openOnce(transport, method, path, header, body)
		return body != nil || resp.StatusCode != http.StatusServiceUnavailable
	})
	return resp
}

func (g *gateway) openOnce(transport http.RoundTripper, method, path string, header http.Header, body io.Reader) *http.Response {
	g.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	g.t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, method, g.http+path, body)
	if err != nil {
		g.t.Fatal(err)
	}
	req.Header = header
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = resp.Body.Close() })
	if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
		g.t.Fatalf("the stream has not begun: %d %v", resp.StatusCode, err)
	}
	return resp
}

// follower reads a stream all the while, so that nothing old waits in a buffer.
type follower struct {
	read  atomic.Int64 // bytes
	ended chan error
}

func (f *follower) Write(p []byte) (int, error) {
	f.read.Add(int64(len(p)))
	return len(p), nil
}

func follow(resp *http.Response) *follower {
	f := &follower{ended: make(chan error, 1)}
	go func() {
		_, err := io.Copy(f, resp.Body)
		f.ended <- err
	}()
	return f
}

// goesOn waits for what is sent from now on.
func (f *follower) goesOn(t *testing.T) {
	t.Helper()
	if !f.survives(t) {
		t.Fatalf("the stream ended: %v", <-f.ended)
	}
}

// survives waits for what is sent from now on, and reports false if the stream ends.
func (f *follower) survives(t *testing.T) (survives bool) {
	t.Helper()
	before := f.read.Load()
	eventually.True(t, "the stream goes on or ends", func() bool {
		ended := len(f.ended) > 0
		survives = !ended && f.read.Load() > before+64
		return survives || ended
	})
	return survives
}

// ends waits until the stream ends, which must not look like a good end.
func (f *follower) ends(t *testing.T) {
	t.Helper()
	select {
	case err := <-f.ended:
		if err == nil {
			t.Error("the stream ended as if it were complete")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the stream was not cut")
	}
}

// ends reads a stream until it ends, which must not look like a good end.
func ends(t *testing.T, resp *http.Response) {
	t.Helper()
	follow(resp).ends(t)
}

// async sends a request and returns a function that waits for its answer.
func async(t *testing.T, method, url string, header http.Header, body io.Reader) func() reply {
	t.Helper()
	return asyncBy(t, client, method, url, header, body)
}

func asyncBy(t *testing.T, client *http.Client, method, url string, header http.Header, body io.Reader) func() reply {
	t.Helper()
	type result struct {
		reply reply
		err   error
	}
	done := make(chan result, 1)
	go func() {
		answer, err := sendBy(client, method, url, header, body)
		done <- result{answer, err}
	}()
	return func() reply {
		t.Helper()
		r := <-done
		if r.err != nil {
			t.Fatal(r.err)
		}
		return r.reply
	}
}

func demo(key keyadmin.Key, behaviour string) http.Header {
	h := bearer(key)
	h.Set("X-Demo", behaviour)
	return h
}

func TestStreamsEndWithTheirKeyAndOthersGoOn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	key, other := r.key("production", "memories:read", "memories:write"), r.key("production", "memories:read")
	events := g.open("GET", "/v1/memories", demo(key, "sse"), nil)
	download := g.open("GET", "/v1/memories", demo(key, "download"), nil)
	spared := follow(g.open("GET", "/v1/memories", demo(other, "sse"), nil))
	waiting := async(t, "GET", g.http+"/v1/memories", demo(key, "hang"), nil)
	uploading := async(t, "POST", g.http+"/v1/memories", bearer(key), endlessUpload(t))
	eventually.True(t, "all five requests are open", func() bool { return r.production.Open() == 5 })

	r.revoke(key.ID)
	ends(t, events)
	ends(t, download)
	for name, answer := range map[string]reply{"waiting": waiting(), "uploading": uploading()} {
		if answer.wantCode(t, http.StatusUnauthorized, "API_KEY_REVOKED"); !answer.Close {
			t.Errorf("%s: the connection, whose context was cancelled, is kept", name)
		}
	}
	eventually.True(t, "the backend is rid of them", func() bool { return r.production.Open() == 1 })
	spared.goesOn(t)
}

// endlessUpload is a body that goes on until it is not read any more.
func endlessUpload(t *testing.T) io.Reader {
	upload, uploaded := io.Pipe()
	go func() {
		for {
			if _, err := uploaded.Write(make([]byte, 1024)); err != nil {
				return
			}
			<-time.After(10 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { _ = uploaded.CloseWithError(io.ErrUnexpectedEOF) })
	return upload
}

func TestHTTP2StreamsEndWithTheirKeyAndOthersOnTheSameConnectionGoOn(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.startTLS(standardSite, "refresh 50ms")
	for code, end := range map[string]func(keyadmin.Key){
		"API_KEY_REVOKED": func(key keyadmin.Key) { r.revoke(key.ID) },
		"API_KEY_EXPIRED": func(key keyadmin.Key) {
			pgtest.Exec(t, r.database, "update rekall.api_keys set expires_at = now() + interval '300 ms' where id = $1", key.ID)
		},
	} {
		t.Run(code, func(t *testing.T) {
			var connections atomic.Int64
			transport := &http.Transport{
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true,
				DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
					connections.Add(1)
					return new(net.Dialer).DialContext(ctx, network, address)
				},
			}
			t.Cleanup(transport.CloseIdleConnections)
			http2 := &http.Client{Transport: transport, Timeout: client.Timeout}
			key, other := r.key("production", "memories:read", "memories:write"), r.key("production", "memories:read")
			sparedStream := g.openOver(transport, "GET", "/v1/memories", demo(other, "sse"), nil)
			spared := follow(sparedStream)
			events := g.openOver(transport, "GET", "/v1/memories", demo(key, "sse"), nil)
			download := g.openOver(transport, "GET", "/v1/memories", demo(key, "download"), nil)
			waiting := asyncBy(t, http2, "GET", g.http+"/v1/memories", demo(key, "hang"), nil)
			uploading := asyncBy(t, http2, "POST", g.http+"/v1/memories", bearer(key), endlessUpload(t))
			eventually.True(t, "all five requests are open", func() bool { return r.production.Open() == 5 })

			end(key)
			ends(t, events)
			ends(t, download)
			for name, answer := range map[string]reply{"waiting": waiting(), "uploading": uploading()} {
				if answer.wantCode(t, http.StatusUnauthorized, code); answer.ProtoMajor != 2 {
					t.Errorf("%s: answered over %s", name, answer.Proto)
				}
			}
			eventually.True(t, "the backend is rid of them", func() bool { return r.production.Open() == 1 })
			spared.goesOn(t)
			if again, err := sendBy(http2, "GET", g.http+"/v1/memories", bearer(other), nil); err != nil || again.StatusCode != http.StatusOK {
				t.Errorf("another request: %v, %v", again.Response, err)
			}
			if n := connections.Load(); n != 1 {
				t.Errorf("%d connections, want one for all", n)
			}
			_ = sparedStream.Body.Close()
			eventually.True(t, "nothing is open", func() bool { return r.production.Open() == 0 })
		})
	}
}

func TestStreamEndsWhenItsKeyExpires(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite, "refresh 50ms")
	key := r.key("production", "memories:read")
	stream := g.open("GET", "/v1/memories", demo(key, "sse"), nil)
	pgtest.Exec(t, r.database, "update rekall.api_keys set expires_at = now() + interval '300 ms' where id = $1", key.ID)
	ends(t, stream)
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 401, "API_KEY_EXPIRED")
}

// TestCutIsNotBookedAsTheBackendsFailure: with passive health checks, one failure would take the backend from all keys.
func TestCutIsNotBookedAsTheBackendsFailure(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(strings.Replace(standardSite, "reverse_proxy PRODUCTION",
		"reverse_proxy PRODUCTION {\nfail_duration 1m\nmax_fails 1\n}", 1))
	key, other := r.key("production", "memories:read"), r.key("production", "memories:read")
	waiting := async(t, "GET", g.http+"/v1/memories", demo(key, "hang"), nil)
	eventually.True(t, "the request is open", func() bool { return r.production.Open() == 1 })
	r.revoke(key.ID)
	waiting().wantCode(t, http.StatusUnauthorized, "API_KEY_REVOKED")
	g.do("GET", "/v1/memories", bearer(other)).wantCode(t, http.StatusOK, "")
}

// TestDownloadToAClientThatDoesNotReadIsCut: the proxy is blocked in a write then, which a cancelled context does not end.
func TestDownloadToAClientThatDoesNotReadIsCut(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	key := r.key("production", "memories:read")
	g.open("GET", "/v1/memories", demo(key, "download"), nil)
	eventually.True(t, "the download is open", func() bool { return r.production.Open() == 1 })
	r.revoke(key.ID)
	eventually.True(t, "the backend is rid of it", func() bool { return r.production.Open() == 0 })
}

// TestUploadOfAClientThatSendsNoMoreIsCut: the proxy, or what buffers a body for it, is blocked in a read then.
func TestUploadOfAClientThatSendsNoMoreIsCut(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	buffering := r.start(strings.Replace(standardSite, "reverse_proxy PRODUCTION", "reverse_proxy PRODUCTION {\nrequest_buffers 10MiB\n}", 1))
	for _, g := range []*gateway{g, buffering} {
		key := r.key("production", "memories:write")
		conn := g.beginUpload(key, 1<<20)
		if _, err := io.WriteString(conn, "some"); err != nil {
			t.Fatal(err)
		}
		eventually.True(t, "the upload is open", func() bool { return g.status().InFlight == 1 })
		r.revoke(key.ID)
		wantRefused(t, conn)
		eventually.True(t, "it is over", func() bool { return g.status().InFlight == 0 })
	}
}

// beginUpload sends the head of a request with a body of that size, and returns its connection.
func (g *gateway) beginUpload(key keyadmin.Key, size int64) net.Conn {
	g.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(g.http, "http://"))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	if _, err := fmt.Fprintf(conn, "POST /v1/memories HTTP/1.1\r\nHost: x\r\nX-Api-Key: %s\r\nContent-Length: %d\r\n\r\n", key.Key.Reveal(), size); err != nil {
		g.t.Fatal(err)
	}
	return conn
}

// wantRefused requires that the answer on a connection is 401.
func wantRefused(t *testing.T, conn net.Conn) {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("answer %v, %v", resp, err)
	}
}

// TestUploadOverFastCGIEndsWithItsKey: Caddy's transport for it does not heed the request's context.
func TestUploadOverFastCGIEndsWithItsKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var received atomic.Int64
	whole := make(chan bool, 1)
	proxy := fastCGI(t, func(_ http.ResponseWriter, r *http.Request) {
		buffer := make([]byte, 4096)
		for {
			n, err := r.Body.Read(buffer)
			received.Add(int64(n))
			if err != nil {
				whole <- err == io.EOF
				return
			}
		}
	})
	g := r.start(strings.Replace(standardSite, "reverse_proxy PRODUCTION", proxy, 1))
	key := r.key("production", "memories:write")
	const size = 1 << 40
	conn := g.beginUpload(key, size)
	go func() { _, _ = io.CopyN(conn, zeros{}, size) }()
	eventually.True(t, "the upload is open", func() bool { return received.Load() > 0 })
	r.revoke(key.ID)
	wantRefused(t, conn)
	eventually.True(t, "the backend is rid of it", func() bool { return g.status().InFlight == 0 })
	select {
	case whole := <-whole:
		if whole {
			t.Error("the backend takes what it received for all of it")
		}
	case <-time.After(30 * time.Second):
		t.Error("the backend goes on receiving")
	}
}

// fastCGI serves a handler over FastCGI until the test ends, and returns the reverse_proxy that asks it.
func fastCGI(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() { _ = fcgi.Serve(listener, handler) }()
	return "reverse_proxy " + listener.Addr().String() + " {\ntransport fastcgi\n}"
}

// zeros never end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestReloadKeepsTheCacheAndTheStreamsThatItCanStillCut(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	key, streaming := r.key("production", "memories:read"), r.key("production", "memories:read")
	g.do("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	stream := follow(g.open("GET", "/v1/memories", demo(streaming, "sse"), nil))
	lookups := g.status().Lookups
	for range 3 {
		g.reload()
		g.doOnce("GET", "/v1/memories", bearer(key)).wantCode(t, 200, "")
	}
	if now := g.status().Lookups; now != lookups {
		t.Errorf("%d lookups after reloads, %d before: the cache was lost", now, lookups)
	}
	stream.goesOn(t)
	r.revoke(streaming.ID)
	stream.ends(t)
	metrics := do(t, "GET", g.admin+"/metrics", nil, nil).body
	if !strings.Contains(metrics, `rekall_decisions_total{environment="production",outcome="allowed"} 5`) {
		t.Error("the counters did not survive")
	}
}

// webSocketBackend is a server that upgrades, and then sends what the test tells it to.
func webSocketBackend(t *testing.T, send func(net.Conn)) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sum := sha1.Sum([]byte(r.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
			base64.StdEncoding.EncodeToString(sum[:]))
		_ = rw.Flush()
		send(conn)
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// openWebSocket does the handshake over a connection of its own.
func (g *gateway) openWebSocket(header http.Header) (net.Conn, *bufio.Reader, *http.Response) {
	g.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(g.http, "http://"))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	req, _ := http.NewRequest("GET", g.http+"/v1/memories", nil)
	req.Header = header
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "websocket")
	req.Header.Set("Sec-WebSocket-Version", "13")
	req.Header.Set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
	if err := req.Write(conn); err != nil {
		g.t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(2 * time.Minute)) // for all that the test reads
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, req)
	if err != nil {
		g.t.Fatal(err)
	}
	return conn, reader, resp
}

func TestWebSocketGetsACloseFrameBetweenTwoFrames(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for name, tc := range map[string]struct {
		sent  []byte
		close bool
	}{
		"after a whole frame":      {[]byte{0x81, 5, 'h', 'e', 'l', 'l', 'o'}, true},
		"after a long frame":       {append([]byte{0x82, 126, 0x01, 0x00}, make([]byte, 256)...), true},
		"before any frame":         {nil, true},
		"in the middle of a frame": {[]byte{0x81, 5, 'h', 'e'}, false},
		"in a header":              {[]byte{0x82, 126, 0x01}, false},
	} {
		t.Run(name, func(t *testing.T) {
			hold := make(chan struct{})
			t.Cleanup(func() { close(hold) })
			backend := webSocketBackend(t, func(conn net.Conn) {
				_, _ = conn.Write(tc.sent)
				<-hold
			})
			g := r.start(strings.Replace(standardSite, "PRODUCTION", backend, 1))
			key := r.key("production", "memories:read")
			_, reader, resp := g.openWebSocket(bearer(key))
			if resp.StatusCode != http.StatusSwitchingProtocols {
				t.Fatalf("answer %d", resp.StatusCode)
			}
			if _, err := io.ReadFull(reader, make([]byte, len(tc.sent))); err != nil {
				t.Fatal(err)
			}
			r.revoke(key.ID)
			rest, err := io.ReadAll(reader)
			if err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
				t.Fatal(err)
			}
			if !tc.close {
				if len(rest) > 0 {
					t.Errorf("% x was sent into the middle of a frame", rest)
				}
				return
			}
			wantClosed(t, bytes.NewReader(rest), 1008)
		})
	}
}

// TestWebSocketThatItsBackendHasHalfClosedEndsWithItsKey: what the client goes on sending is an upload.
func TestWebSocketThatItsBackendHasHalfClosedEndsWithItsKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	received := make(chan error, 1)
	site := strings.Replace(standardSite, "\tlog\n", "", 1) // with an access log, Caddy passes no half-close on
	g := r.start(strings.Replace(site, "PRODUCTION", webSocketBackend(t, func(conn net.Conn) {
		_ = conn.(*net.TCPConn).CloseWrite()
		for {
			_, err := conn.Read(make([]byte, 1))
			received <- err
			if err != nil {
				return
			}
		}
	}), 1))
	key := r.key("production", "memories:read")
	conn, reader, resp := g.openWebSocket(bearer(key))
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("answer %d", resp.StatusCode)
	}
	if rest, err := io.ReadAll(reader); err != nil || len(rest) > 0 {
		t.Fatalf("% x, %v in place of the half-close", rest, err)
	}
	await := func(what string) error {
		select {
		case err := <-received:
			return err
		case <-time.After(20 * time.Second):
			t.Fatal(what)
			return nil
		}
	}
	if _, err := conn.Write([]byte{0x82}); err != nil {
		t.Fatal(err)
	}
	if err := await("the backend receives nothing after its half-close"); err != nil {
		t.Fatal(err)
	}
	r.revoke(key.ID)
	if await("the WebSocket outlived its key") == nil {
		t.Error("the backend received what was not sent")
	}
}

func TestWebSocketOutlivesReloadsAndStillEndsWithItsKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	backend := webSocketBackend(t, func(conn net.Conn) { _, _ = io.Copy(conn, conn) })
	g := r.start(strings.Replace(standardSite, "PRODUCTION", backend, 1))
	key := r.key("production", "memories:read")
	conn, reader, _ := g.openWebSocket(bearer(key))
	frame := []byte{0x82, 5, 'h', 'e', 'l', 'l', 'o'}
	for range 3 {
		g.reload()
		if _, err := conn.Write(frame); err != nil {
			t.Fatal(err)
		}
		echo := make([]byte, len(frame))
		if _, err := io.ReadFull(reader, echo); err != nil || !bytes.Equal(echo, frame) {
			t.Fatalf("% x comes back, %v", echo, err)
		}
	}
	r.revoke(key.ID)
	wantClosed(t, reader, 1008)
}

// TestWebSocketThatEndsWithTheProcessIsNotToldThatItsKeyIsBad: by Caddy or by the gateway, whichever is the first to close it.
func TestWebSocketThatEndsWithTheProcessIsNotToldThatItsKeyIsBad(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	backend := webSocketBackend(t, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) })
	g := r.start(strings.Replace(standardSite, "PRODUCTION", backend, 1))
	_, reader, _ := g.openWebSocket(bearer(r.key("production", "memories:read")))
	g.process.Signal(t, syscall.SIGTERM)
	wantClosed(t, reader, 1001, 1013)
}

// wantClosed demands a close frame with one of the codes as all that is left.
func wantClosed(t *testing.T, reader io.Reader, codes ...uint16) {
	t.Helper()
	rest, err := io.ReadAll(reader)
	if len(rest) < 4 || rest[0] != 0x88 || int(rest[1]) != len(rest)-2 || !slices.Contains(codes, binary.BigEndian.Uint16(rest[2:])) {
		t.Errorf("% x, %v: not a close frame with code %d", rest, err, codes)
	}
}

func TestRefusedWebSocketIsNotUpgraded(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	g := r.start(standardSite)
	_, _, resp := g.openWebSocket(http.Header{"X-Api-Key": {"rk_wrong"}})
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("answer %d", resp.StatusCode)
	}
}

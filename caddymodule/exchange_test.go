package caddymodule

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/identitytoken"
	"github.com/rekall-ai/gateway/internal/keycache"
	"github.com/rekall-ai/gateway/internal/scoperule"
	"github.com/rekall-ai/gateway/internal/usage"
)

// cutWhileTracking is the schedule, too rare to wait for, in which the sync cuts a request while it is being tracked.
type cutWhileTracking struct {
	record  apikey.Record
	tracked bool // what Track answers: whether the request has become one in flight
}

func (k *cutWhileTracking) Find(context.Context, apikey.Digest) (keycache.Found, error) {
	record := k.record
	return keycache.Found{Record: &record, Now: time.Now()}, nil
}

func (k *cutWhileTracking) Track(_ *keycache.Flight, _ keycache.Found, request keycache.Request) bool {
	k.record.RevokedAt = apikey.TimeOf(time.Now())
	request.Cut(&keycache.Cut{Outcome: apikey.Revoked})
	return k.tracked
}

func (k *cutWhileTracking) Cached(apikey.Digest) bool { return true }

func (k *cutWhileTracking) Untrack(*keycache.Flight) {}

// deadlineWriter counts the write deadlines that are set on it.
type deadlineWriter struct {
	*httptest.ResponseRecorder
	deadlines int
}

func (w *deadlineWriter) SetWriteDeadline(time.Time) error {
	w.deadlines++
	return nil
}

// slow stands for a proxy that is still writing when the time for that is over.
type slow struct{}

func (slow) ServeHTTP(http.ResponseWriter, *http.Request) error {
	<-time.After(2 * cutGrace)
	return nil
}

// gatewayOn returns a gateway without a database, which asks the cache and calls production in place of a proxy.
func gatewayOn(t *testing.T, cache keySource, production caddyhttp.Handler) *Gateway {
	t.Helper()
	rules, err := scoperule.New(scoperule.Builtin()...)
	if err != nil {
		t.Fatal(err)
	}
	return &Gateway{
		draining: new(atomic.Bool), rules: rules, cache: cache, metrics: newMetrics(), upstreams: new(upstreams),
		usage: usage.New(nil, usage.Config{}), logger: zap.NewNop(), production: block{chain: production},
	}
}

// TestLateCutNeverTouchesAFinishedWriter: the server may have given the writer to the connection's next request by then.
func TestLateCutNeverTouchesAFinishedWriter(t *testing.T) {
	for _, tc := range []struct {
		name      string
		tracked   bool
		handler   caddyhttp.Handler
		deadlines int
	}{
		{"refused, since the key has changed", false, passing{}, 0},
		{"answered", true, passing{}, 0},
		{"still being written: the deadline ends it", true, slow{}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
				g := gatewayOn(t, &cutWhileTracking{record: record, tracked: tc.tracked}, tc.handler)
				w := &deadlineWriter{ResponseRecorder: httptest.NewRecorder()}
				if err := g.ServeHTTP(w, bearerRequest(apikey.Generate(apikey.Production)), nil); err != nil {
					t.Fatal(err)
				}
				<-time.After(2 * cutGrace)
				synctest.Wait()
				if w.deadlines != tc.deadlines {
					t.Errorf("%d deadlines were set, want %d", w.deadlines, tc.deadlines)
				}
				if !tc.tracked && w.Code != http.StatusUnauthorized {
					t.Errorf("answer %d", w.Code)
				}
			})
		})
	}
}

// stuckWriter is the server's writer of a connection whose client does not read: writes end with the deadline.
type stuckWriter struct {
	*httptest.ResponseRecorder
	deadline chan struct{}
}

func (w *stuckWriter) SetWriteDeadline(time.Time) error {
	close(w.deadline)
	return nil
}

// TestCutEndsARequestWithinASecond: the round trip at once, and then a write to a client that does not read.
func TestCutEndsARequestWithinASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &stuckWriter{httptest.NewRecorder(), make(chan struct{})}
		var cancelled, unblocked time.Time
		record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
		g := gatewayOn(t, &cutWhileTracking{record: record, tracked: true},
			caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
				<-r.Context().Done()
				cancelled = time.Now()
				<-w.deadline
				unblocked = time.Now()
				return nil
			}))
		began := time.Now()
		if err := g.ServeHTTP(w, bearerRequest(apikey.Generate(apikey.Production)), nil); err != nil {
			t.Fatal(err)
		}
		if a, b := cancelled.Sub(began), unblocked.Sub(began); a > 0 || b > time.Second {
			t.Errorf("cancelled after %v, and free of the write after %v", a, b)
		}
	})
}

// readDeadlineWriter is the server's writer of a connection whose client goes on with its upload: reads end with the deadline.
type readDeadlineWriter struct {
	*httptest.ResponseRecorder
	deadline time.Time // the last
	set      chan struct{}
}

func (w *readDeadlineWriter) SetReadDeadline(at time.Time) error {
	if w.deadline.IsZero() {
		close(w.set)
	}
	w.deadline = at
	return nil
}

func TestClientOfAnUploadThatWasCutHasASecondToReadItsAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &readDeadlineWriter{ResponseRecorder: httptest.NewRecorder(), set: make(chan struct{})}
		record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
		g := gatewayOn(t, &cutWhileTracking{record: record, tracked: true},
			caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
				<-w.set
				return nil
			}))
		if err := g.ServeHTTP(w, bearerRequest(apikey.Generate(apikey.Production)), nil); err != nil {
			t.Fatal(err)
		}
		if left := time.Until(w.deadline); w.Code != http.StatusUnauthorized || left != time.Second {
			t.Errorf("answer %d, and %v in which the server reads on", w.Code, left)
		}
	})
}

// TestCutEndsAWebSocketWhoseClientDoesNotRead: neither a message that is stuck nor the goodbye keeps it open.
func TestCutEndsAWebSocketWhoseClientDoesNotRead(t *testing.T) {
	for name, message := range map[string][]byte{"within a message": {0x81, 1, 'x'}, "between two": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, client := net.Pipe() // which has no buffer
			defer func() { _ = client.Close() }()
			x := new(exchange)
			conn := &webSocketConn{Conn: server, exchange: x}
			var ending sync.WaitGroup
			if message != nil {
				ending.Go(func() { _, _ = conn.Write(message) })
				if _, err := client.Read(make([]byte, 1)); err != nil { // and no more
					t.Fatal(err)
				}
			}
			x.cutBy.Store(&keycache.Cut{Outcome: apikey.Revoked})
			closed := make(chan struct{})
			ending.Go(func() {
				_ = conn.Close()
				close(closed)
			})
			select {
			case <-closed:
			case <-time.After(20 * time.Second):
				t.Error("it is open, and its key has ended")
				_ = server.Close()
			}
			ending.Wait()
		})
	}
}

// cutBeforeTracked finds every key good, and cuts a request before it is one in flight, once.
type cutBeforeTracked struct {
	cutWhileTracking
	cut bool
}

func (c *cutBeforeTracked) Track(_ *keycache.Flight, _ keycache.Found, request keycache.Request) bool {
	if c.cut {
		return true
	}
	c.cut = true
	request.Cut(&keycache.Cut{Outcome: apikey.Unavailable})
	return false
}

// TestRequestThatWasCutIsNotSentThoughItsKeyIsFoundGoodAgain: with its context cancelled it would come to nothing half-way.
func TestRequestThatWasCutIsNotSentThoughItsKeyIsFoundGoodAgain(t *testing.T) {
	sent := false
	record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
	g := gatewayOn(t, &cutBeforeTracked{cutWhileTracking: cutWhileTracking{record: record}},
		caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			sent = true
			return nil
		}))
	w := g.serve(t, bearerRequest(apikey.Generate(apikey.Production)))
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || sent {
		t.Errorf("answer %d with Retry-After %q; sent to the backend: %v", w.Code, w.Header().Get("Retry-After"), sent)
	}
	if strings.Contains(w.Body.String(), "carried") {
		t.Errorf("it was not sent, and may have been carried out: %s", w.Body)
	}
}

// TestRequestIsKnownToBeCutBeforeItsHandlersEnd: what ends without a cause is answered 502 and counts against the backend.
func TestRequestIsKnownToBeCutBeforeItsHandlersEnd(t *testing.T) {
	ended := false
	x := &exchange{done: true}
	x.cancel = func(error) { ended = x.cutBy.Load() != nil }
	x.Cut(&keycache.Cut{Outcome: apikey.Revoked})
	if !ended {
		t.Error("its handlers are ended first")
	}
}

// unpublished has no key of any signer: tokens wait for one to be published.
type unpublished struct{ identitytoken.Store }

// TestRequestWhoseKeyIsRevokedWhileItsTokenIsSignedIsAnsweredForThat: 503 would have its client try again.
func TestRequestWhoseKeyIsRevokedWhileItsTokenIsSignedIsAnsweredForThat(t *testing.T) {
	record := apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}
	g := gatewayOn(t, &cutWhileTracking{record: record, tracked: true}, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		t.Error("sent without a token")
		return nil
	}))
	var err error
	if g.issuer, err = identitytoken.NewIssuer(identitytoken.NewSigner(unpublished{}, "", zap.NewNop), 1, identitytoken.Options{}); err != nil {
		t.Fatal(err)
	}
	w := g.serve(t, bearerRequest(apikey.Generate(apikey.Production)))
	if w.Code != http.StatusUnauthorized || !strings.Contains(w.Body.String(), "REVOKED") || strings.Contains(w.Body.String(), "carried") {
		t.Errorf("answer %d %s", w.Code, w.Body)
	}
}

// followed finds every key good and keeps what the sync would cut.
type followed struct {
	cutWhileTracking
	request keycache.Request
}

func (f *followed) Track(_ *keycache.Flight, _ keycache.Found, request keycache.Request) bool {
	f.request = request
	return true
}

// TestHandlerThatDoesNotHeedTheCutWritesNothingMore: a proxy's round trip is cancelled, other handlers may look only at what they write.
func TestHandlerThatDoesNotHeedTheCutWritesNothingMore(t *testing.T) {
	cache := &followed{cutWhileTracking: cutWhileTracking{record: apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}}}
	cut := &keycache.Cut{Outcome: apikey.Revoked}
	g := gatewayOn(t, cache, caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		if _, err := w.Write([]byte("before")); err != nil {
			t.Error(err)
		}
		cache.request.Cut(cut)
		if n, err := w.Write([]byte("after")); n != 0 || !errors.Is(err, cut) {
			t.Errorf("wrote %d bytes, error %v, want that of the cut", n, err)
		}
		return nil
	}))
	w := httptest.NewRecorder()
	func() {
		defer func() {
			if err, _ := recover().(error); !errors.Is(err, http.ErrAbortHandler) {
				t.Errorf("panic %v, want that of an answer that is not whole", err)
			}
		}()
		_ = g.ServeHTTP(w, bearerRequest(apikey.Generate(apikey.Production)), nil)
	}()
	if w.Body.String() != "before" {
		t.Errorf("the client received %q", w.Body)
	}
}

// cutAt is a source and a writer that goes on, whatever happens to the request while it does.
type cutAt struct {
	http.ResponseWriter
	parts []string
	cut   func()
}

func (c *cutAt) Read(p []byte) (int, error) {
	if len(c.parts) == 0 {
		return 0, io.EOF
	}
	if len(c.parts) == 1 {
		c.cut()
	}
	n := copy(p, c.parts[0])
	c.parts = c.parts[1:]
	return n, nil
}

func (c *cutAt) Write(p []byte) (int, error) {
	defer c.cut()
	return c.ResponseWriter.Write(p)
}

// TestAnswerEndsWithItsCutThoughItsHandlerIsInTheMidstOfIt: a slow client would get the rest of it for hours.
func TestAnswerEndsWithItsCutThoughItsHandlerIsInTheMidstOfIt(t *testing.T) {
	for name, tc := range map[string]struct {
		write func(w http.ResponseWriter, cut func()) (int64, error)
		most  int
	}{
		"of a copy": {func(w http.ResponseWriter, cut func()) (int64, error) {
			return io.Copy(w, &cutAt{parts: []string{"before", "after"}, cut: cut})
		}, len("before")},
		"of a write": {func(w http.ResponseWriter, cut func()) (int64, error) {
			w.(*exchange).ResponseWriter = &cutAt{ResponseWriter: w.(*exchange).ResponseWriter, cut: cut}
			n, err := w.Write(make([]byte, 1<<20))
			return int64(n), err
		}, 64 << 10}, // for which Caddy's writer has one deadline
	} {
		t.Run(name, func(t *testing.T) {
			cache := &followed{cutWhileTracking: cutWhileTracking{record: apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}}}
			cut := &keycache.Cut{Outcome: apikey.Revoked}
			w := httptest.NewRecorder()
			g := gatewayOn(t, cache, caddyhttp.HandlerFunc(func(x http.ResponseWriter, _ *http.Request) error {
				n, err := tc.write(x, func() { cache.request.Cut(cut) })
				if !errors.Is(err, cut) || n != int64(w.Body.Len()) || n == 0 || n > int64(tc.most) {
					t.Errorf("wrote %d of which %d came to the client, error %v", n, w.Body.Len(), err)
				}
				return nil
			}))
			defer func() {
				if err, _ := recover().(error); !errors.Is(err, http.ErrAbortHandler) {
					t.Errorf("panic %v, want that of an answer that is not whole", err)
				}
			}()
			_ = g.ServeHTTP(w, bearerRequest(apikey.Generate(apikey.Production)), nil)
		})
	}
}

// TestAnswerThatWasCutLooksWholeToNoClient, also if its handler takes no notice of what it could not write, as file_server does not.
func TestAnswerThatWasCutLooksWholeToNoClient(t *testing.T) {
	write := func(w http.ResponseWriter) { _, _ = w.Write([]byte("part")) }
	answers := func(w http.ResponseWriter) { // as a transport that does not heed the context, such as Caddy's fastcgi
		w.Header().Set("Location", "https://storage.example/signed")
		w.WriteHeader(http.StatusFound)
	}
	copies := func(w http.ResponseWriter) { _, _ = io.Copy(w, io.LimitReader(strings.NewReader("part"), 4)) }
	for name, c := range map[string]struct {
		before, after func(http.ResponseWriter)
		status        int
		whole         bool
	}{
		"written in part":     {write, write, http.StatusOK, false},
		"copied in part":      {copies, copies, http.StatusOK, false},
		"nothing written yet": {func(http.ResponseWriter) {}, write, http.StatusUnauthorized, true},
		"nothing copied yet":  {func(http.ResponseWriter) {}, copies, http.StatusUnauthorized, true},
		"nothing withheld":    {write, func(http.ResponseWriter) {}, http.StatusOK, true},
		"answered too late":   {func(http.ResponseWriter) {}, answers, http.StatusUnauthorized, true},
		"answered and sent too late": {func(http.ResponseWriter) {}, func(w http.ResponseWriter) {
			answers(w)
			_ = http.NewResponseController(w).Flush()
			write(w)
		}, http.StatusUnauthorized, true},
		"answered by the handler's error": {func(http.ResponseWriter) {}, func(w http.ResponseWriter) { w.WriteHeader(statusClientClosed); write(w) }, http.StatusUnauthorized, true},
	} {
		for _, http2 := range []bool{false, true} {
			cache := &followed{cutWhileTracking: cutWhileTracking{record: apikey.Record{Environment: apikey.Production, Scopes: apikey.MemoriesRead}}}
			g := gatewayOn(t, cache, caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
				if c.before(w); w.Header().Get("X-Request-Id") != "" {
					_ = http.NewResponseController(w).Flush()
				}
				cache.request.Cut(&keycache.Cut{Outcome: apikey.Revoked})
				c.after(w)
				return nil
			}))
			server := httptest.NewUnstartedServer(g.entrance(t))
			server.EnableHTTP2 = http2
			server.StartTLS()
			r, err := http.NewRequestWithContext(t.Context(), "GET", server.URL+"/v1/memories", nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", "Bearer "+apikey.Generate(apikey.Production))
			resp, err := server.Client().Do(r)
			if err != nil {
				t.Fatal(name, err)
			}
			if location := resp.Header.Get("Location"); location != "" {
				t.Errorf("%s, %s: the refused key got %s", name, resp.Proto, location)
			}
			body, err := io.ReadAll(resp.Body)
			if resp.StatusCode != c.status || (err == nil) != c.whole {
				t.Errorf("%s, %s: answer %d %q, error %v", name, resp.Proto, resp.StatusCode, body, err)
			}
			_ = resp.Body.Close()
			server.Close()
		}
	}
}

// TestAClientIsToldTheFirstErrorThatItsRequestMade: net/http may go on reading a body after the request has failed.
func TestAClientIsToldTheFirstErrorThatItsRequestMade(t *testing.T) {
	p := &pass{body: io.NopCloser(iotest.ErrReader(errors.New("the client is gone")))}
	first := &clientError{headersTooLarge, errBeyondHTTP2}
	_ = p.fail(first)
	if _, err := io.ReadAll(p); err == nil {
		t.Error("the body could be read")
	}
	if told := p.failed.Load(); told != first {
		t.Errorf("the client is told %v", told)
	}
}

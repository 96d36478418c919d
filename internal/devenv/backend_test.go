package devenv_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/devenv/backendtest"
	"github.com/rekall-ai/gateway/test/eventually"
)

// client returns one that speaks HTTP/1.1 only, or cleartext HTTP/2 only.
func client(t *testing.T, http2 bool) *http.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	transport := &http.Transport{Protocols: protocols}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func eachProtocol(t *testing.T, test func(t *testing.T, client *http.Client)) {
	t.Helper()
	for name, http2 := range map[string]bool{"HTTP1": false, "HTTP2": true} {
		t.Run(name, func(t *testing.T) { test(t, client(t, http2)) })
	}
}

func send(t *testing.T, client *http.Client, r *http.Request) *http.Response {
	t.Helper()
	response, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = response.Body.Close() })
	return response
}

func newRequest(t *testing.T, ctx context.Context, method, target string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestEchoTellsWhatTheBackendReceived(t *testing.T) {
	eachProtocol(t, func(t *testing.T, client *http.Client) {
		backend := backendtest.Start(t, "demo")
		const body = "0123456789"
		// A body of unknown length is sent in chunks, which trailers need.
		r := newRequest(t, t.Context(), "PATCH", backend.URL()+"/v1/a%2Fb/%41%20c;d?q=1&q=%32&api_key=", io.MultiReader(strings.NewReader(body)))
		r.Host = "api.example.com"
		r.Header["X-Two"] = []string{"a", "b"}
		r.Trailer = http.Header{"X-Sum": {"42"}}
		response := send(t, client, r)
		var echo devenv.Echo
		if err := json.NewDecoder(response.Body).Decode(&echo); err != nil {
			t.Fatal(err)
		}
		got := echo.Data
		if got.Backend != "demo" || got.Method != "PATCH" || got.Path != "/v1/a%2Fb/%41%20c;d" || got.Query != "q=1&q=%32&api_key=" ||
			got.Host != "api.example.com" || got.BodyBytes != int64(len(body)) {
			t.Errorf("echo %+v", got)
		}
		if two := got.Headers["X-Two"]; len(two) != 2 || two[0] != "a" || two[1] != "b" {
			t.Errorf("header %q", two)
		}
		if sum := got.Trailers["X-Sum"]; len(sum) != 1 || sum[0] != "42" {
			t.Errorf("trailers %v", got.Trailers)
		}
		if response.Header.Get("Content-Type") != "application/json" || backend.Requests() != 1 {
			t.Errorf("%s, %d requests", response.Header.Get("Content-Type"), backend.Requests())
		}
		eventually.True(t, "none open", func() bool { return backend.Open() == 0 })
	})
}

func TestStreamsRunUntilTheClientGoes(t *testing.T) {
	eachProtocol(t, func(t *testing.T, client *http.Client) {
		for demo, contentType := range map[string]string{"sse": "text/event-stream", "download": "application/octet-stream"} {
			backend := backendtest.Start(t, "demo")
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			r := newRequest(t, ctx, "GET", backend.URL(), nil)
			r.Header.Set("X-Demo", demo)
			response := send(t, client, r)
			if got := response.Header.Get("Content-Type"); got != contentType {
				t.Errorf("%s: %s", demo, got)
			}
			// More than one write, and more than any buffer holds of a download.
			if demo == "sse" {
				events := bufio.NewReader(response.Body)
				// Sent at once: what waits for a full buffer comes by the thousand.
				if _, err := events.Peek(1); err != nil || events.Buffered() > 1000 {
					t.Fatalf("%d bytes at first, %v", events.Buffered(), err)
				}
				lines := bufio.NewScanner(events)
				for range 3 {
					if !lines.Scan() || lines.Text() != "data: tick" || !lines.Scan() || lines.Text() != "" {
						t.Fatalf("event %q, %v", lines.Text(), lines.Err())
					}
				}
			} else if n, err := io.CopyN(io.Discard, response.Body, 1<<20); err != nil {
				t.Fatalf("%d bytes, %v", n, err)
			}
			if n := backend.Open(); n != 1 {
				t.Errorf("%s: %d open", demo, n)
			}
			leave()
			eventually.True(t, demo+" over", func() bool { return backend.Open() == 0 })
		}
	})
}

func TestHangLastsUntilTheClientGoes(t *testing.T) {
	eachProtocol(t, func(t *testing.T, client *http.Client) {
		backend := backendtest.Start(t, "demo")
		ctx, leave := context.WithCancel(t.Context())
		defer leave()
		r := newRequest(t, ctx, "GET", backend.URL(), nil)
		r.Header.Set("X-Demo", "hang")
		ended := make(chan error, 1)
		go func() {
			response, err := client.Do(r)
			if err == nil {
				err = errors.Join(errors.New("answered"), response.Body.Close())
			}
			ended <- err
		}()
		eventually.True(t, "request", func() bool { return backend.Open() == 1 })
		select {
		case err := <-ended:
			t.Errorf("ended with %v", err)
		default:
		}
		leave()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
		eventually.True(t, "hang over", func() bool { return backend.Open() == 0 })
	})
}

func TestStopEndsStreamsAndFreesTheAddress(t *testing.T) {
	eachProtocol(t, func(t *testing.T, client *http.Client) {
		backend := backendtest.Start(t, "demo")
		r := newRequest(t, t.Context(), "GET", backend.URL(), nil)
		r.Header.Set("X-Demo", "sse")
		response := send(t, client, r)
		if err := backend.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, response.Body); err == nil {
			t.Error("the stream ended as if it were whole")
		}
		eventually.True(t, "none open", func() bool { return backend.Open() == 0 })
		again, err := devenv.StartBackend(t.Context(), "again", backend.Address())
		if err != nil {
			t.Fatal(err)
		}
		_ = again.Stop(t.Context())
	})
}

func TestAddressInUseIsAnError(t *testing.T) {
	backend := backendtest.Start(t, "demo")
	if second, err := devenv.StartBackend(t.Context(), "second", backend.Address()); err == nil {
		_ = second.Stop(t.Context())
		t.Error("two backends at one address")
	}
}

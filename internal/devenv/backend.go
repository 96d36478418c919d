package devenv

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// Backend is a demo backend that answers each request with what it received. It speaks HTTP/1.1 and cleartext HTTP/2.
//
// The header X-Demo asks for other behaviour: "sse" for an endless stream of events, "hang" to wait until the client goes,
// "download" for an endless body.
type Backend struct {
	name     string
	listener net.Listener
	server   *http.Server
	requests atomic.Int64
	open     atomic.Int64
}

// Echo is a backend's answer.
type Echo struct {
	Data EchoData `json:"data"`
}

// EchoData is what a backend received.
type EchoData struct {
	Backend   string      `json:"backend"`
	Method    string      `json:"method"`
	Path      string      `json:"path"` // as sent, escaped
	Query     string      `json:"query"`
	Host      string      `json:"host"`
	Headers   http.Header `json:"headers"`
	Trailers  http.Header `json:"trailers"`
	BodyBytes int64       `json:"body_bytes"`
}

// StartBackend starts a backend at a TCP address; port 0 is any free port.
func StartBackend(ctx context.Context, name, address string) (*Backend, error) {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("start backend: %w", err)
	}
	b := &Backend{name: name, listener: listener}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	b.server = &http.Server{Handler: b, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = b.server.Serve(listener) }()
	return b, nil
}

// URL of the backend.
func (b *Backend) URL() string { return "http://" + b.listener.Addr().String() }

// Address is host and port of the backend.
func (b *Backend) Address() string { return b.listener.Addr().String() }

// Requests is the number of requests that have reached the backend.
func (b *Backend) Requests() int64 { return b.requests.Load() }

// Open is the number of requests that it is serving now.
func (b *Backend) Open() int64 { return b.open.Load() }

// Stop ends the backend and its streams.
func (b *Backend) Stop(context.Context) error { return b.server.Close() }

func (b *Backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.requests.Add(1)
	b.open.Add(1)
	defer b.open.Add(-1)
	// All of it first: until then an HTTP/1.1 server does not notice that the client has gone.
	bodyBytes, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		return
	}
	switch r.Header.Get("X-Demo") {
	case "sse":
		w.Header().Set("Content-Type", "text/event-stream")
		b.stream(w, r, []byte("data: tick\n\n"), 50*time.Millisecond)
	case "download":
		w.Header().Set("Content-Type", "application/octet-stream")
		b.stream(w, r, make([]byte, 32<<10), time.Millisecond)
	case "hang":
		<-r.Context().Done()
	default:
		b.echo(w, r, bodyBytes)
	}
}

// stream writes a chunk at an interval until the client goes.
func (b *Backend) stream(w http.ResponseWriter, r *http.Request, chunk []byte, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if _, err := w.Write(chunk); err != nil {
			return
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			return
		}
		select {
		case <-ticker.C:
		case <-r.Context().Done():
			return
		}
	}
}

func (b *Backend) echo(w http.ResponseWriter, r *http.Request, bodyBytes int64) {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	_ = encoder.Encode(Echo{EchoData{
		Backend: b.name, Method: r.Method, Path: r.URL.EscapedPath(), Query: r.URL.RawQuery, Host: r.Host,
		Headers: r.Header, Trailers: r.Trailer, BodyBytes: bodyBytes,
	}})
}

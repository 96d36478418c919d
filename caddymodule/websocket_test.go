package caddymodule

import (
	"bytes"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keycache"
)

// TestWebSocketStandsBetweenTwoFramesAtTheirEndsOnly, for each form of a frame's length, however its bytes arrive: a goodbye in the
// midst of one would be taken for a part of it, and nothing may follow a goodbye of the backend's.
func TestWebSocketStandsBetweenTwoFramesAtTheirEndsOnly(t *testing.T) {
	const text, longest = 0x81, 70_000
	frame := func(payload int, header ...byte) []byte { return append(header, make([]byte, payload)...) }
	frames := [][]byte{
		frame(5, text, 5),
		frame(0, text, 0),
		frame(300, text, 126, 300>>8, 300&0xff),
		frame(longest, text, 127, 0, 0, 0, 0, 0, longest>>16, longest>>8&0xff, longest&0xff),
		frame(5, text, 0x80|5, 1, 2, 3, 4),
		frame(2, webSocketClose, 2),
		frame(0, text, 0),
	}
	stream, last := slices.Concat(frames...), len(frames)-2 // the goodbye
	ends := map[int]bool{}
	for i, end := 0, 0; i < last; i++ {
		end += len(frames[i])
		ends[end] = true
	}
	for _, piece := range []int{1, 7, 4096} {
		var s frameScanner
		for at := 0; at < len(stream); {
			n := min(piece, len(stream)-at)
			s.scan(stream[at : at+n])
			if at += n; s.between() != ends[at] {
				t.Fatalf("in pieces of %d: after %d bytes it is between two frames: %v", piece, at, s.between())
			}
		}
	}
}

// written is the client's side of a connection that takes all that is written.
type written struct {
	net.Conn
	bytes  bytes.Buffer
	closed int
}

func (w *written) Write(p []byte) (int, error)      { return w.bytes.Write(p) }
func (w *written) SetWriteDeadline(time.Time) error { return nil }

func (w *written) Close() error {
	w.closed++
	return nil
}

func TestWebSocketIsToldWhyItEndsOnceAndOnlyWhereItsKeyHasEnded(t *testing.T) {
	for name, tc := range map[string]struct {
		cut     *keycache.Cut
		blocked bool   // in a write to a client that does not read
		before  []byte // what the backend has sent
		goodbye string
	}{
		"the backend closes it": {nil, false, nil, ""},
		"the key is revoked":    {&keycache.Cut{Outcome: apikey.Revoked}, false, []byte{0x81, 1, 'x'}, "\x88\x11\x03\xf0API_KEY_REVOKED"},
		"the key expires":       {&keycache.Cut{Outcome: apikey.Expired}, false, nil, "\x88\x11\x03\xf0API_KEY_EXPIRED"},
		"nobody can tell":       {&keycache.Cut{Outcome: apikey.Unavailable}, false, nil, "\x88\x12\x03\xf5AUTH_UNAVAILABLE"},
		"in the midst of one":   {&keycache.Cut{Outcome: apikey.Revoked}, false, []byte{0x81, 2, 'x'}, ""},
		"the backend said it":   {&keycache.Cut{Outcome: apikey.Revoked}, false, []byte{0x88, 0}, ""},
		"the client reads not":  {&keycache.Cut{Outcome: apikey.Revoked}, true, nil, ""},
	} {
		client := new(written)
		c := &webSocketConn{Conn: client, exchange: new(exchange)}
		c.exchange.cutBy.Store(tc.cut)
		if n, err := c.Write(tc.before); n != len(tc.before) || err != nil {
			t.Fatal(n, err)
		}
		if tc.blocked {
			c.mu.Lock()
		}
		for range 2 { // the proxy closes both directions
			_ = c.Close()
		}
		if got, want := client.bytes.String(), string(tc.before)+tc.goodbye; got != want || client.closed != 2 {
			t.Errorf("%s: written %q and closed %d times, want %q", name, got, client.closed, want)
		}
		if !tc.blocked && !c.mu.TryLock() {
			t.Errorf("%s: a write would wait for ever", name)
		}
	}
}

package caddymodule

import (
	"encoding/binary"
	"net"
	"sync"
	"time"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
)

const (
	// webSocketClose is the header byte of a final, unmasked close frame (RFC 6455, section 5.5.1).
	webSocketClose = 0x88

	// webSocketPolicyViolation is the close code for "your key has ended" (RFC 6455, section 7.4.1).
	webSocketPolicyViolation = 1008

	// webSocketTryAgainLater is the one for "nobody can tell" (IANA's WebSocket Close Code Number Registry).
	webSocketTryAgainLater = 1013
)

// webSocketConn is the client's side of a WebSocket. It follows the frames that the backend sends, so that a cut can say
// goodbye between two frames and never in the middle of one.
type webSocketConn struct {
	net.Conn
	exchange *exchange

	mu     sync.Mutex // held while writing
	frames frameScanner
}

func (c *webSocketConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.Conn.Write(p)
	c.frames.scan(p[:n])
	return n, err
}

// Close closes the connection, with a close frame before it when the request was cut and the stream stands between two
// frames. A write that is still blocked on a slow client holds the lock: then there is no goodbye.
func (c *webSocketConn) Close() error {
	if cut := c.exchange.cutBy.Load(); cut != nil && c.mu.TryLock() {
		if c.frames.between() {
			_ = c.SetWriteDeadline(time.Now().Add(cutGrace))
			_, _ = c.Conn.Write(closeFrame(cut.Outcome))
			c.frames.closed = true
		}
		c.mu.Unlock()
	}
	return c.Conn.Close()
}

// CloseWrite passes a half-close on, which the proxy uses to end one direction.
func (c *webSocketConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return net.ErrClosed
}

func closeFrame(outcome apikey.Outcome) []byte {
	code, reason := uint16(webSocketPolicyViolation), apierror.Of(outcome).Code
	if outcome == apikey.Unavailable {
		code = webSocketTryAgainLater
	}
	frame := []byte{webSocketClose, byte(2 + len(reason))}
	frame = binary.BigEndian.AppendUint16(frame, code)
	return append(frame, reason...)
}

// frameScanner follows WebSocket frames (RFC 6455, section 5.2) without keeping their payload.
type frameScanner struct {
	header  [14]byte // of the frame that is being read
	have    int      // bytes of it
	payload uint64   // bytes of the frame that have yet to come
	closed  bool     // a close frame has been seen: nothing may follow it
}

// between reports whether the stream stands between two frames and may still carry one.
func (s *frameScanner) between() bool { return s.have == 0 && s.payload == 0 && !s.closed }

func (s *frameScanner) scan(p []byte) {
	for len(p) > 0 {
		if s.payload > 0 {
			n := min(s.payload, uint64(len(p)))
			s.payload -= n
			p = p[n:]
			continue
		}
		s.header[s.have] = p[0]
		s.have++
		p = p[1:]
		if s.have == s.headerLength() {
			s.closed = s.closed || s.header[0]&0x0f == 8
			s.payload = s.payloadLength()
			s.have = 0
		}
	}
}

// headerLength is the length of the header once its first two bytes are there. Before, it is some number above one.
func (s *frameScanner) headerLength() int {
	n := 2
	switch s.header[1] & 0x7f {
	case 126:
		n += 2
	case 127:
		n += 8
	}
	if s.header[1]&0x80 != 0 { // masked, which a server must not do; followed all the same
		n += 4
	}
	return n
}

func (s *frameScanner) payloadLength() uint64 {
	switch n := s.header[1] & 0x7f; n {
	case 126:
		return uint64(binary.BigEndian.Uint16(s.header[2:]))
	case 127:
		return binary.BigEndian.Uint64(s.header[2:])
	default:
		return uint64(n)
	}
}

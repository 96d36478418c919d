package ratelimit

import (
	"context"
	"errors"
	"net"
)

// What our scripts answer is far below these. The client makes room for all that an answer announces, before it has come: a server that
// was taken over, or stands in Redis's place, would end the gateway with ten bytes.
const (
	maxLine     = 1 << 14 // bytes of an error, or of a header
	maxText     = 1 << 16 // bytes
	maxElements = 64      // of a list, or half of a map
	maxDepth    = 4       // of lists in lists
)

var errAnswerTooLarge = errors.New("an answer is larger than any of redis to us")

// bounded is a connection whose answers (RESP, version 2 or 3) are small.
type bounded struct {
	net.Conn
	kind   byte // of the line that is being read; 0: it begins
	length int  // of that line
	number int  // in its header
	absent bool // that number is below zero: null
	skip   int  // bytes of a text, and of its end, that are yet to come
	open   []int
}

// bound has a dialler's connections be bounded.
func bound(dial func(ctx context.Context, network, address string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &bounded{Conn: conn}, nil
	}
}

// Read returns nothing of what came with an announcement of too much.
func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	for i := 0; i < n; i++ {
		if b.skip > 0 {
			skipped := min(b.skip, n-i)
			b.skip -= skipped
			i += skipped - 1
			continue
		}
		if !b.see(p[i]) {
			return 0, errAnswerTooLarge
		}
	}
	return n, err
}

// see follows a line by a byte, and reports false if too much comes.
func (b *bounded) see(c byte) bool {
	b.length++
	switch {
	case b.kind == 0:
		b.kind, b.length, b.number, b.absent = c, 1, 0, false
	case c == '\n':
		kind := b.kind
		b.kind = 0
		return b.end(kind)
	case c == '-':
		b.absent = b.absent || b.length == 2
	case c >= '0' && c <= '9' && b.number <= maxText:
		b.number = 10*b.number + int(c-'0')
	}
	return b.length <= maxLine
}

// end follows the end of a line of that kind.
func (b *bounded) end(kind byte) bool {
	elements := 0
	switch kind {
	case '$', '=', '!':
		if b.number > maxText {
			return false
		}
		if !b.absent {
			b.skip = b.number + len("\r\n")
		}
	case '*', '~', '>', '%':
		if b.number > maxElements {
			return false
		}
		if elements = b.number; kind == '%' {
			elements *= 2
		}
	}
	if elements > 0 && !b.absent {
		b.open = append(b.open, elements)
		return len(b.open) <= maxDepth
	}
	for len(b.open) > 0 {
		last := len(b.open) - 1
		if b.open[last]--; b.open[last] > 0 {
			break
		}
		b.open = b.open[:last]
	}
	return true
}

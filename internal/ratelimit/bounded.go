package ratelimit

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strconv"
)

// What our scripts answer is far below these. The client makes room for all that an answer announces, before it has come: a server that
// was taken over, or stands in Redis's place, would end the gateway with ten bytes.
const (
	maxLine     = 1 << 14 // bytes of an error, or of a header
	maxText     = 1 << 16 // bytes
	maxElements = 64      // of a list, or half of a map
	maxDepth    = 4       // of lists in lists
)

var errForeignAnswer = errors.New("an answer is larger than any of redis to us, or of another kind")

// bounded is a connection whose answers (RESP, version 2 or 3) are small, and of the kinds that our scripts and the client's greeting are
// answered with. Of others nothing is passed on: what this takes for a line and the client for something else would hide what it announces.
type bounded struct {
	net.Conn
	line []byte // that is being read
	skip int    // bytes of a text, and of its end, that are yet to come
	open []int  // elements that are yet to come of each list
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

// Read returns nothing of what came with an answer that is refused.
func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	for i := 0; i < n; i++ {
		if b.skip > 0 {
			skipped := min(b.skip, n-i)
			b.skip -= skipped
			i += skipped - 1
			continue
		}
		if b.line = append(b.line, p[i]); len(b.line) > maxLine {
			return 0, errForeignAnswer
		}
		if p[i] == '\n' {
			if !b.follow(b.line) {
				return 0, errForeignAnswer
			}
			b.line = b.line[:0]
		}
	}
	return n, err
}

// follow follows a line, and reports false if it is to be refused.
func (b *bounded) follow(line []byte) bool {
	kind, header, ended := line[0], line[1:], false
	if header, ended = bytes.CutSuffix(header, []byte("\r\n")); !ended {
		return false
	}
	elements := 0
	switch kind {
	case '+', '-', ':', ',', '#', '_':
	case '$', '*', '%':
		if string(header) == "-1" { // null
			break
		}
		// The client takes a sign, as in -0, and makes room for a negative number too.
		n, err := strconv.ParseUint(string(header), 10, 32)
		switch {
		case err != nil:
			return false
		case kind == '$' && n <= maxText:
			b.skip = int(n) + len("\r\n")
		case kind == '*' && n <= maxElements:
			elements = int(n)
		case kind == '%' && n <= maxElements:
			elements = 2 * int(n)
		default:
			return false
		}
	default:
		return false
	}
	if elements > 0 {
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

package caddymodule

import (
	"slices"
	"testing"
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

package command

import (
	"fmt"
	"io"
	"strings"
	"unicode"

	"golang.org/x/text/width"
)

// table is lines of which each has the same cells, under each other in a terminal.
type table [][]string

func (t *table) line(cells ...any) {
	line := make([]string, len(cells))
	for i, cell := range cells {
		line[i] = fmt.Sprint(cell)
	}
	*t = append(*t, line)
}

func (t *table) print(w io.Writer) {
	var widths []int
	for _, line := range *t {
		for i, cell := range line {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], places(cell))
		}
	}
	for _, line := range *t {
		for i, cell := range line[:len(line)-1] {
			fmt.Fprint(w, cell, strings.Repeat(" ", widths[i]+2-places(cell)))
		}
		fmt.Fprintln(w, line[len(line)-1])
	}
}

// places is how many places of a terminal's line a text takes: East Asian characters and emoji two each, and none what is drawn over the
// character before.
func places(text string) (n int) {
	const firstVowel, lastConsonant = '\u1160', '\u11ff' // of Hangul in parts, which the first consonant has room for
	for _, r := range text {
		switch kind := width.LookupRune(r).Kind(); {
		case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf) || r >= firstVowel && r <= lastConsonant:
		case kind == width.EastAsianWide || kind == width.EastAsianFullwidth:
			n += 2
		default:
			n++
		}
	}
	return n
}

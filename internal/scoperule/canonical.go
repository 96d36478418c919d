package scoperule

import (
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// maxPath is the longest path in bytes that is decided on. Rekall's own are under 100.
const maxPath = 2048

// Canonical reports whether an escaped path has only one reading, whatever reads it. The gateway decides on the path as it
// was sent and backends get it byte for byte; one that resolves "..", folds "//" or decodes "%2f" would serve another
// request than the one that was decided on. Such paths are refused and never repaired. So is a path with a key in it.
func Canonical(escaped string) bool {
	if escaped == "" || escaped[0] != '/' || len(escaped) > maxPath {
		return false
	}
	encoded := false
	last := byte('/')
	for i := 1; i < len(escaped); i++ {
		c := escaped[i]
		switch pathBytes[c] {
		case refused:
			return false
		case separator:
			// "//", ".", ".." and, for file servers that drop trailing dots, "a."
			if last == '/' || last == '.' {
				return false
			}
		case escape:
			if i+2 >= len(escaped) || !allowedEscape(escaped[i+1:i+3]) {
				return false
			}
			encoded = true
			i += 2
		}
		last = c
	}
	if last == '.' {
		return false
	}
	if !encoded {
		return !apikey.ContainsKey(escaped)
	}
	decoded, err := url.PathUnescape(escaped)
	return err == nil && utf8.ValidString(decoded) && !apikey.ContainsKey(decoded)
}

// The kinds of bytes in an escaped path.
const (
	plain = iota
	separator
	escape
	refused // has a meaning, or would be sent on percent-encoded (RFC 3986, section 3.3)
)

var pathBytes = func() (kinds [256]byte) {
	for c := range kinds {
		if c <= ' ' || c >= 0x7f || strings.IndexByte("\\;?#\"<>^`{|}", byte(c)) >= 0 {
			kinds[c] = refused
		}
	}
	kinds['/'], kinds['%'] = separator, escape
	return kinds
}()

// allowedEscape refuses escapes of what has a meaning in a path, and of what needs no escape: both have two readings. So has
// a space: Windows drops it from the end of a name, which makes "..%20" a "..".
func allowedEscape(digits string) bool {
	c, err := strconv.ParseUint(digits, 16, 8)
	switch {
	case err != nil, c <= ' ', c == 0x7f:
		return false
	case '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z':
		return false
	}
	return !strings.ContainsRune(`/\.%;?#-_~`, rune(c))
}

package scoperule_test

import (
	"net/url"
	"path"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/scoperule"
)

func TestCanonicalAcceptsOnlyPathsWithOneReading(t *testing.T) {
	production, sandbox := apikey.Generate(apikey.Production), apikey.Generate(apikey.Sandbox)
	escape := func(s string) string { // every byte percent-encoded
		var b strings.Builder
		for i := range len(s) {
			const hex = "0123456789abcdef"
			b.WriteString("%" + string(hex[s[i]>>4]) + string(hex[s[i]&15]))
		}
		return b.String()
	}
	for _, tt := range []struct {
		name, path string
		want       bool
	}{
		{"root", "/", true},
		{"ordinary", "/v1/memories", true},
		{"id", "/v1/memories/m_1-2~3", true},
		{"trailing slash", "/v1/memories/", true},
		{"dots inside", "/v1/files/a.b.txt", true},
		{"leading dot", "/v1/.well-known", true},
		{"leading dots", "/v1/..a", true},
		{"capitals", "/V1/Memories", true},
		{"punctuation", "/v1/a!$&'()*+,=:@[]b", true},
		{"unicode, upper hex", "/v1/caf%C3%A9", true},
		{"unicode, lower hex", "/v1/caf%c3%a9", true},
		{"unicode, mixed hex", "/v1/caf%C3%a9", true},
		{"three bytes", "/v1/%E2%82%AC", true},
		{"four bytes", "/v1/%F0%9F%98%80", true},
		{"escaped colon", "/v1/a%3Ab", true},
		{"as long as can be", "/" + strings.Repeat("a", 2047), true},
		{"a key too short", "/v1/" + production[:47], true},

		{"empty", "", false},
		{"star", "*", false},
		{"no slash", "v1/memories", false},
		{"absolute form", "https://h/v1/memories", false},
		{"too long", "/" + strings.Repeat("a", 2048), false},
		{"dot", "/v1/./x", false},
		{"dot at the end", "/v1/.", false},
		{"dot-dot", "/v1/memories/../entities", false},
		{"dot-dot at the end", "/v1/memories/..", false},
		{"dot-dot at the beginning", "/../v1", false},
		{"three dots", "/v1/...", false},
		{"trailing dot", "/v1/x.", false},
		{"trailing dot inside", "/v1/x./y", false},
		{"%2e", "/v1/%2e%2e/entities", false},
		{"%2E", "/v1/%2E", false},
		{"half-escaped dot-dot", "/v1/.%2e/x", false},
		{"trailing %2e", "/v1/x%2e", false},
		{"%2e inside", "/v1/a%2eb", false},
		{"double slash", "/v1//x", false},
		{"double slash at the beginning", "//v1/memories", false},
		{"double slash at the end", "/v1/memories//", false},
		{"only slashes", "//", false},
		{"%2f", "/v1/memories%2f..%2fentities", false},
		{"%2F", "/v1/a%2Fb", false},
		{"backslash", `/v1\x`, false},
		{"backslash dot-dot", `/v1/..\x`, false},
		{"%5c", "/v1%5cx", false},
		{"%5C", "/v1%5Cx", false},
		{"semicolon", "/v1/memories;x=1/entities", false},
		{"dot-dot semicolon", "/v1/..;/x", false},
		{"%3b", "/v1/a%3bb", false},
		{"%3B", "/v1/a%3Bb", false},
		{"NUL", "/v1/\x00", false},
		{"%00", "/v1/%00", false},
		{"%0a", "/v1/a%0ab", false},
		{"%0D", "/v1/a%0Db", false},
		{"%1f", "/v1/%1f", false},
		{"%7f", "/v1/%7f", false},
		{"DEL", "/v1/\x7f", false},
		{"escaped space", "/v1/a%20b", false},
		{"dot-dot and a space", "/v1/memories/..%20/entities", false},
		{"escaped tab", "/v1/a%09b", false},
		{"quotation mark", `/v1/a"b`, false},
		{"angle brackets", "/v1/<a>", false},
		{"braces", "/v1/{a}", false},
		{"bar, circumflex and backquote", "/v1/a|b^c`d", false},
		{"tab", "/v1/a\tb", false},
		{"space", "/v1/a b", false},
		{"line feed", "/v1/a\nb", false},
		{"%25", "/v1/%25", false},
		{"double-encoded dot", "/v1/%252e%252e/x", false},
		{"question mark", "/v1/a?b", false},
		{"%3f", "/v1/a%3fb", false},
		{"hash", "/v1/a#b", false},
		{"%23", "/v1/a%23b", false},
		{"escaped letter", "/v1/%6demories", false},
		{"escaped capital", "/v1/%4demories", false},
		{"escaped digit", "/v%31/memories", false},
		{"escaped hyphen", "/v1/a%2db", false},
		{"escaped underscore", "/v1/a%5Fb", false},
		{"escaped tilde", "/v1/a%7Eb", false},
		{"no hex", "/v1/%zz", false},
		{"one hex digit", "/v1/%4", false},
		{"bare percent sign", "/v1/%", false},
		{"percent sign before a slash", "/v1/%c3/%a9", false},
		{"IIS escape", "/v1/%u002e", false},
		{"not ASCII", "/v1/café", false},
		{"invalid UTF-8", "/v1/%ff", false},
		{"cut UTF-8", "/v1/%c3", false},
		{"overlong slash", "/v1/a%c0%afb", false},
		{"overlong dot", "/v1/%c0%ae%c0%ae/x", false},
		{"surrogate", "/v1/%ed%a0%80", false},
		{"production key", "/v1/memories/" + production, false},
		{"sandbox key", "/v1/" + sandbox + "/x", false},
		{"key inside a segment", "/v1/x-" + sandbox + "-y", false},
		{"key next to an escape", "/v1/%C3%A9" + production + "%C3%A9", false},
		{"percent-encoded key", "/v1/" + escape(production), false},
		{"half percent-encoded key", "/v1/" + escape(production[:3]) + production[3:], false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := scoperule.Canonical(tt.path); got != tt.want {
				t.Errorf("Canonical(%q) = %v", tt.path, got)
			}
		})
	}
}

func TestCanonicalRefusesEveryEscapeOfAnASCIIByteWithAMeaning(t *testing.T) {
	const harmless = `!"$&'()*+,:<=>@[]^` + "`{|}" // decoded they mean nothing to a path, and they may need the escape
	for c := range 128 {
		for _, hex := range []string{"0123456789abcdef", "0123456789ABCDEF"} {
			p := "/v1/a%" + string(hex[c>>4]) + string(hex[c&15]) + "b"
			if got, want := scoperule.Canonical(p), strings.IndexByte(harmless, byte(c)) >= 0; got != want {
				t.Errorf("Canonical(%q) = %v", p, got)
			}
		}
	}
}

func TestEveryDocumentedEndpointIsCanonical(t *testing.T) {
	for _, e := range endpoints {
		if !scoperule.Canonical(e.path) {
			t.Errorf("%s is not", e.path)
		}
	}
}

func FuzzCanonical(f *testing.F) {
	key := apikey.Generate(apikey.Production)
	for _, s := range []string{
		"/", "/v1/memories", "/a/%2e%2e/b", "/a/..%2fb", "/é", "/caf%C3%A9", "/a;b", "//", "/a/./b", "/a.", `/a\b`, "/%00", "/%252e", "*", "",
		"/a{b}|\"<>^`", "/[a]", "/" + key, "/%20" + key, "/a%3Ab/", "https://h/a", "/%c0%af",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		if scoperule.Canonical(target) && path.Clean(target) != target && path.Clean(target)+"/" != target {
			t.Fatalf("%q is cleaned to %q", target, path.Clean(target))
		}
		u, err := url.ParseRequestURI(target)
		if err == nil && scoperule.Canonical(target) && u.RequestURI() != target {
			t.Fatalf("%q is sent on as %q", target, u.RequestURI())
		}
		if err != nil {
			if scoperule.Canonical(target) {
				t.Fatalf("%q: %v", target, err)
			}
			return
		}
		p := u.EscapedPath() // what the gateway decides on
		if !scoperule.Canonical(p) {
			return
		}
		if again, err := url.ParseRequestURI(p); err != nil || again.EscapedPath() != p || again.RawQuery != "" {
			t.Fatalf("%q is read as %+v, %v", p, again, err)
		}
		decoded, err := url.PathUnescape(p)
		if err != nil || decoded != u.Path {
			t.Fatalf("%q is decoded to %q and %q, %v", p, decoded, u.Path, err)
		}
		if clean := path.Clean(decoded); clean != decoded && clean+"/" != decoded {
			t.Fatalf("%q: %q is cleaned to %q", p, decoded, clean)
		}
		if strings.Contains(decoded+"/", "/../") || strings.ContainsAny(decoded, "\\;%?#\x00\r\n") || !utf8.ValidString(decoded) || apikey.ContainsKey(decoded) {
			t.Fatalf("%q is decoded to %q", p, decoded)
		}
	})
}

func BenchmarkCanonical(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		scoperule.Canonical("/v1/memories/mem_01H8XGJWBWBAQ4")
	}
}

func BenchmarkRequired(b *testing.B) {
	tab := table(b, scoperule.Builtin()...)
	b.ReportAllocs()
	for b.Loop() {
		tab.Required("DELETE", "/v1/hives/hive_1/members/user_1")
	}
}

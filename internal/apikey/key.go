// Package apikey is the domain: what a Rekall API key looks like, the 14 scopes, what the gateway knows of a key, and the
// pure decision on a request. It holds no key: a key exists only between the request (or the generator) and its digest.
package apikey

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"regexp"
	"strings"
)

const (
	// Length of every key in bytes, prefix included (REKALL.md, "Keys").
	Length = 48

	// ProductionPrefix begins every production key.
	ProductionPrefix = "rk_"

	// SandboxPrefix begins every sandbox key. No production key can begin with it, because '_' is not allowed after
	// "rk_".
	SandboxPrefix = "rk_test_"

	// checksumLength is the number of characters at the end of a generated key that follow from the rest: a CRC-32 in
	// base 62, so 6 characters hold all 32 bits. GitHub's token format uses the same construction.
	checksumLength = 6

	alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

// errMalformed says that a string is not a key of either environment.
var errMalformed = errors.New("malformed api key")

// Environment is the half of Rekall that a key belongs to. The zero value is no environment.
type Environment uint8

// The two environments.
const (
	Production Environment = iota + 1
	Sandbox
)

// String returns "production", "sandbox", or "none" for the zero value.
func (e Environment) String() string {
	switch e {
	case Production:
		return "production"
	case Sandbox:
		return "sandbox"
	default:
		return "none"
	}
}

// ParseEnvironment is the inverse of String for the two environments.
func ParseEnvironment(s string) (Environment, error) {
	switch s {
	case "production":
		return Production, nil
	case "sandbox":
		return Sandbox, nil
	}
	return 0, fmt.Errorf("unknown environment %q: use production or sandbox", s)
}

func (e Environment) prefix() string {
	if e == Sandbox {
		return SandboxPrefix
	}
	return ProductionPrefix
}

// Digest is the SHA-256 of a whole key: all that is ever stored or compared as "the key". A key has over 200
// random bits, so a slow or salted hash would add cost to every request and nothing to an attacker's.
type Digest [sha256.Size]byte

// Hash returns the digest of a key.
func Hash(key string) Digest {
	var buffer [Length]byte // on the stack: a conversion would allocate on every request
	if len(key) == Length {
		copy(buffer[:], key)
		return sha256.Sum256(buffer[:])
	}
	return sha256.Sum256([]byte(key))
}

// Parse checks the shape of a key and returns its environment. It does not check the checksum: keys made before there was one are
// good keys. An error carries nothing of the string.
func Parse(s string) (Environment, error) {
	if len(s) != Length || s[:len(ProductionPrefix)] != ProductionPrefix {
		return 0, errMalformed
	}
	env, secret := Production, s[len(ProductionPrefix):]
	if s[:len(SandboxPrefix)] == SandboxPrefix {
		env, secret = Sandbox, s[len(SandboxPrefix):]
	}
	for i := range len(secret) {
		if !alphanumeric[secret[i]] {
			return 0, errMalformed
		}
	}
	return env, nil
}

// alphanumeric is a table, since every request's key is looked through byte by byte.
var alphanumeric = func() (is [256]bool) {
	for i := range len(alphabet) {
		is[alphabet[i]] = true
	}
	return is
}()

// Generate makes a new key: random characters from crypto/rand, each with the same probability, then the checksum.
func Generate(env Environment) string {
	prefix := env.prefix()
	random := RandomText(Length - checksumLength - len(prefix))
	sum := checksum(prefix, random)
	return prefix + random + string(sum[:])
}

// RandomText returns n letters and digits from crypto/rand, all equally likely: 5.95 bits each.
func RandomText(n int) string {
	text := make([]byte, 0, n)
	var random [64]byte
	for len(text) < n {
		rand.Read(random[:]) // never fails (crypto/rand, Go 1.24)
		for _, b := range random {
			// 248 is the largest multiple of 62 in a byte: a higher value would make the first characters likelier.
			if b < 248 && len(text) < n {
				text = append(text, alphabet[b%62])
			}
		}
	}
	return string(text)
}

// ChecksumValid tells a key that Generate made from a mistyped one. A key without a checksum is still acceptable to the
// gateway; this is for people and secret scanners.
func ChecksumValid(key string) bool {
	env, err := Parse(key)
	return err == nil && endsInChecksum(env.prefix(), key[len(env.prefix()):])
}

// EndsInSecret reports whether s ends in all of a key that Generate made but its prefix, which is no secret. Other strings do by chance
// once in billions of times. It allocates nothing: s may be any site's credential.
func EndsInSecret(s string) bool {
	for _, prefix := range [...]string{ProductionPrefix, SandboxPrefix} {
		if n := Length - len(prefix); len(s) >= n && endsInChecksum(prefix, s[len(s)-n:]) {
			return true
		}
	}
	return false
}

func endsInChecksum(prefix, secret string) bool {
	end := len(secret) - checksumLength
	sum := checksum(prefix, secret[:end])
	return string(sum[:]) == secret[end:]
}

// checksum goes byte by byte, where hash/crc32 would need the two in one slice on the heap.
func checksum(prefix, random string) (digits [checksumLength]byte) {
	sum := ^uint32(0)
	for _, part := range [...]string{prefix, random} {
		for i := range len(part) {
			sum = crc32.IEEETable[byte(sum)^part[i]] ^ sum>>8
		}
	}
	sum = ^sum
	for i := checksumLength - 1; i >= 0; i-- {
		digits[i] = alphabet[sum%62]
		sum /= 62
	}
	return digits
}

// Mask shows what people may see of a key: its prefix and its Hint, "rk_test_…a1B2".
func Mask(env Environment, hint string) string { return env.prefix() + "…" + hint }

// Hint returns the last four characters of a key, which a list shows so that its owner can recognise it.
func Hint(key string) string { return key[len(key)-4:] }

// ContainsKey reports whether s has a substring shaped like a key, at any position.
func ContainsKey(s string) bool {
	start, _ := findKey(s)
	return start >= 0
}

// keyPattern finds a key in what was found with it: a line feed, a header, the line of a file.
var keyPattern = regexp.MustCompile(fmt.Sprintf("%s[0-9A-Za-z]{%d}|%s[0-9A-Za-z]{%d}",
	ProductionPrefix, Length-len(ProductionPrefix), SandboxPrefix, Length-len(SandboxPrefix)))

// FindKeys returns the substrings of s that have the shape of a key, none of which overlap.
func FindKeys(s string) []string { return keyPattern.FindAllString(s, -1) }

// Redact returns s with every substring shaped like a key replaced by its prefix and an ellipsis.
func Redact(s string) string {
	start, end := findKey(s)
	if start < 0 {
		return s
	}
	var b strings.Builder
	for start >= 0 {
		b.WriteString(s[:start])
		b.WriteString(ProductionPrefix + "…")
		s = s[end:]
		start, end = findKey(s)
	}
	b.WriteString(s)
	return b.String()
}

// findKey returns where the first key-shaped run begins and ends, or -1. Once there is one, all that adjoins it is taken
// with it: it may be the rest of a longer secret, or another key.
func findKey(s string) (start, end int) {
	for from := 0; ; {
		i := strings.Index(s[from:], ProductionPrefix)
		if i < 0 {
			return -1, -1
		}
		start = from + i
		from = start + len(ProductionPrefix)
		end = from
		if strings.HasPrefix(s[start:], SandboxPrefix) {
			end = start + len(SandboxPrefix)
		}
		for end < len(s) && alphanumeric[s[end]] {
			end++
		}
		if end-start < Length {
			continue
		}
		for end < len(s) && (alphanumeric[s[end]] || s[end] == '_') {
			end++
		}
		return start, end
	}
}

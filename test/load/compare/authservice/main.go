// Command authservice is the service that forward_auth and auth_request ask in the comparison: it answers whether the
// SHA-256 of a Bearer key stands in a map, as cheaply as a Go server can.
//
//	authservice ADDRESS FILE
//
// FILE has a line for each key: its digest in hexadecimal, a space, its id.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "authservice:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%d arguments instead of an address and a file of digests", len(args))
	}
	keys, err := read(args[1])
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	server := http.Server{Handler: keys, ReadHeaderTimeout: time.Minute}
	return server.Serve(listener)
}

// ids of keys by their digests.
type ids map[[sha256.Size]byte]string

func read(path string) (ids, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	keys := make(ids)
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		text, id, _ := strings.Cut(lines.Text(), " ")
		digest, err := hex.DecodeString(text)
		if err != nil || len(digest) != sha256.Size || id == "" {
			return nil, fmt.Errorf("%s: line %d is not a digest and an id", path, len(keys)+1)
		}
		keys[[sha256.Size]byte(digest)] = id
	}
	return keys, lines.Err()
}

func (keys ids) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	id, known := keys[sha256.Sum256([]byte(key))]
	if !ok || !known {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	w.Header().Set("X-Rekall-Key-Id", id)
}

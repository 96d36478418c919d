package pgtest

import (
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekall-ai/gateway/test/network"
)

// Proxy stands between clients and a Postgres.
type Proxy struct {
	Statements atomic.Int64  // that were run
	Delay      time.Duration // that a connection takes to be made, as from far away
}

// URL returns the database's URL by way of the proxy, which ends with the test.
func (p *Proxy) URL(t testing.TB, databaseURL string) string {
	t.Helper()
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	server, address := pgconn.NetworkAddress(config.Host, config.Port)
	own := network.Serve(t, func(client net.Conn) { p.serve(client, server, address) })
	through := url.URL{
		Scheme: "postgres", User: url.UserPassword(config.User, config.Password), Host: own,
		Path: "/" + config.Database, RawQuery: "sslmode=disable",
	}
	return through.String()
}

func (p *Proxy) serve(client net.Conn, network, address string) {
	<-time.After(p.Delay)
	server, err := net.Dial(network, address)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	go func() {
		_, _ = io.Copy(client, server) // until either end closes
		_ = client.Close()
	}()
	_ = p.pass(server, client) // likewise
}

// pass copies a client's messages. The first has no type; all others have one, and then their length.
func (p *Proxy) pass(server io.Writer, client io.Reader) error {
	for typed := 0; ; typed = 1 {
		head := make([]byte, typed+4)
		if _, err := io.ReadFull(client, head); err != nil {
			return err
		}
		if typed == 1 && (head[0] == 'E' || head[0] == 'Q') { // Execute, Query
			p.Statements.Add(1)
		}
		if _, err := server.Write(head); err != nil {
			return err
		}
		if _, err := io.CopyN(server, client, int64(binary.BigEndian.Uint32(head[typed:]))-4); err != nil {
			return err
		}
	}
}

package dashboard_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

// statements counts what is asked of Postgres.
type statements struct{ atomic.Int64 }

// listen returns the database's URL by way of a proxy that counts.
func (s *statements) listen(t *testing.T, database string) string {
	t.Helper()
	config, err := pgx.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial(network, address)
			if err != nil {
				_ = client.Close()
				continue
			}
			go func() {
				_, _ = io.Copy(client, server) // until either end closes
				_ = client.Close()
			}()
			go func() {
				_ = s.pass(server, client) // likewise
				_ = server.Close()
			}()
		}
	}()
	through := url.URL{
		Scheme: "postgres", User: url.UserPassword(config.User, config.Password), Host: listener.Addr().String(),
		Path: "/" + config.Database, RawQuery: "sslmode=disable",
	}
	return through.String()
}

// pass copies a client's messages. The first has no type; each statement with arguments is bound to them once.
func (s *statements) pass(server io.Writer, client io.Reader) error {
	for typed := 0; ; typed = 1 {
		head := make([]byte, typed+4)
		if _, err := io.ReadFull(client, head); err != nil {
			return err
		}
		if typed == 1 && head[0] == 'B' {
			s.Add(1)
		}
		if _, err := server.Write(head); err != nil {
			return err
		}
		if _, err := io.CopyN(server, client, int64(binary.BigEndian.Uint32(head[typed:]))-4); err != nil {
			return err
		}
	}
}

func TestListAsksPostgresTheSameNumberOfTimesForOneKeyAndForTwentyFive(t *testing.T) {
	var asked statements
	r := newRigVia(t, asked.listen)
	b := r.browser("ann@acme")
	r.key("acme", "Key", false)
	list := func(rows int) int64 {
		before := asked.Load()
		page := b.do("", nil)
		page.want(t, http.StatusOK)
		if n := strings.Count(page.body, `class="spark"><svg`); n != rows {
			t.Fatalf("%d rows with a sparkline, want %d", n, rows)
		}
		return asked.Load() - before
	}
	one := list(1)
	for i := range 24 {
		r.key("acme", fmt.Sprint("Key ", i), false)
	}
	if many := list(25); one == 0 || many != one {
		t.Errorf("%d statements for one key, %d for 25", one, many)
	}
}

func TestListIsShownThoughUsageCannotBeRead(t *testing.T) {
	r := newRig(t)
	r.key("acme", "Backend", false)
	pgtest.Exec(t, r.database, "alter table rekall.spikes rename to gone")
	r.browser("ann@acme").do("", nil).want(t, http.StatusOK, "Backend", "Not known now")
}

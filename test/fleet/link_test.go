//go:build fleet

package fleet

import (
	"net"
	"net/url"
	"sync"
	"testing"
)

// link is the network between one edge and Postgres.
type link struct {
	listener net.Listener
	target   string

	mu      sync.Mutex
	passing chan struct{} // closed while bytes pass
	refused bool          // new connections are closed at once
	held    []net.Conn    // accepted while nothing passed
	conns   map[net.Conn]struct{}
}

// newLink returns a link to the server of a database URL, and the URL that goes through it.
func newLink(t *testing.T, database string) (*link, string) {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal("the database has no URL")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link{listener: listener, target: u.Host, passing: make(chan struct{}), conns: make(map[net.Conn]struct{})}
	close(l.passing)
	go l.serve()
	t.Cleanup(func() {
		_ = listener.Close()
		l.heal()
		l.drop()
	})
	u.Host = listener.Addr().String()
	return l, u.String()
}

func (l *link) serve() {
	for {
		conn, err := l.listener.Accept()
		if err != nil {
			return
		}
		if l.admit(conn) {
			go l.connect(conn)
		}
	}
}

// admit reports whether a new connection may go on to Postgres now.
func (l *link) admit(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refused {
		_ = conn.Close()
		return false
	}
	select {
	case <-l.passing:
		return true
	default:
		l.held = append(l.held, conn)
		return false
	}
}

func (l *link) connect(client net.Conn) {
	server, err := net.Dial("tcp", l.target)
	if err != nil {
		_ = client.Close()
		return
	}
	l.mu.Lock()
	l.conns[client], l.conns[server] = struct{}{}, struct{}{}
	l.mu.Unlock()
	go l.copy(client, server)
	l.copy(server, client)
}

// copy moves bytes until either side ends.
func (l *link) copy(to, from net.Conn) {
	defer func() {
		_, _ = to.Close(), from.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, from)
	}()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		l.mu.Lock()
		passing := l.passing
		l.mu.Unlock()
		<-passing
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// stall makes bytes wait until heal, as a network does that loses packets and sends them again.
func (l *link) stall() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.passing = make(chan struct{})
}

// refuse ends all connections and takes no new ones until heal.
func (l *link) refuse() {
	l.mu.Lock()
	l.refused = true
	l.mu.Unlock()
	l.drop()
}

// heal undoes stall and refuse. What was dialled during a stall is closed: its clients have given up, and together they would
// be more connections than Postgres takes.
func (l *link) heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refused = false
	for _, conn := range l.held {
		_ = conn.Close()
	}
	l.held = nil
	select {
	case <-l.passing:
	default:
		close(l.passing)
	}
}

func (l *link) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for conn := range l.conns {
		_ = conn.Close()
	}
}

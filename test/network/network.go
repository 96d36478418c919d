// Package network stands between clients and a server in tests, and fails as networks do.
package network

import (
	"net"
	"net/url"
	"sync"
	"testing"
)

// Link leads TCP connections to a server.
type Link struct {
	listener net.Listener

	mu      sync.Mutex
	target  string
	passing chan struct{}   // closed while bytes pass
	lost    []chan struct{} // of stalls in which something was lost
	held    []net.Conn      // accepted while nothing passed
	refused bool            // new connections are closed at once
	conns   map[net.Conn]struct{}
}

// To returns a link to the server of a database URL, and the URL that goes through it. It ends with the test.
func To(t testing.TB, databaseURL string) (*Link, string) {
	t.Helper()
	u := parse(t, databaseURL)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &Link{listener: listener, target: u.Host, passing: make(chan struct{}), conns: make(map[net.Conn]struct{})}
	close(l.passing)
	go l.serve()
	t.Cleanup(func() {
		_ = listener.Close()
		l.Resume()
		l.Drop()
	})
	u.Host = listener.Addr().String()
	return l, u.String()
}

func parse(t testing.TB, databaseURL string) *url.URL {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal("the database has no URL")
	}
	return u
}

func (l *Link) serve() {
	for {
		client, err := l.listener.Accept()
		if err != nil {
			return
		}
		if target := l.admit(client); target != "" {
			go l.connect(client, target)
		}
	}
}

// admit returns where a new connection leads now; empty: nowhere.
func (l *Link) admit(client net.Conn) (target string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refused {
		_ = client.Close()
		return ""
	}
	select {
	case <-l.passing:
		l.conns[client] = struct{}{}
		return l.target
	default:
		l.held = append(l.held, client)
		return ""
	}
}

func (l *Link) connect(client net.Conn, target string) {
	server, err := net.Dial("tcp", target)
	if err != nil {
		l.end(client)
		return
	}
	l.mu.Lock()
	l.conns[server] = struct{}{}
	l.mu.Unlock()
	go l.copy(client, server)
	l.copy(server, client)
}

func (l *Link) end(conns ...net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, conn := range conns {
		_ = conn.Close()
		delete(l.conns, conn)
	}
}

// copy moves bytes until either side ends.
func (l *Link) copy(to, from net.Conn) {
	defer l.end(to, from)
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

// Stall makes bytes wait, and new connections too, until Resume, Heal or Reopen.
func (l *Link) Stall() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.passing:
		l.passing = make(chan struct{})
	default: // stalled already: bytes wait for this one
	}
}

// Refuse ends all connections and takes no new ones, until Resume or Heal.
func (l *Link) Refuse() {
	l.mu.Lock()
	l.refused = true
	l.mu.Unlock()
	l.Drop()
}

// Resume undoes Stall and Refuse: what waited is sent, as by a network that lost packets and sends them again. What was dialled meanwhile
// is closed: its clients have given up, and together they would be more connections than Postgres takes.
func (l *Link) Resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refused = false
	for _, client := range l.held {
		_ = client.Close()
	}
	l.held = nil
	select {
	case <-l.passing:
	default:
		close(l.passing)
	}
}

// Heal is Resume that ends the connections from before: both sides learn of it.
func (l *Link) Heal() {
	l.Drop()
	l.Resume()
}

// Reopen undoes Stall for connections that are made from now on. Of those from before, what waited is lost and nobody tells either
// side: the way in which a firewall forgets them.
func (l *Link) Reopen() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost = append(l.lost, l.passing)
	l.passing = make(chan struct{})
	close(l.passing)
}

// Lead sends connections to the server of another URL, and ends those to the one before.
func (l *Link) Lead(t testing.TB, databaseURL string) {
	t.Helper()
	u := parse(t, databaseURL)
	l.mu.Lock()
	l.target = u.Host
	l.mu.Unlock()
	l.Drop()
}

// Drop ends all connections.
func (l *Link) Drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for conn := range l.conns {
		_ = conn.Close()
	}
	for _, passing := range l.lost { // which lets their goroutines end
		close(passing)
	}
	l.lost = nil
}

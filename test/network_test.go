package test

import (
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
)

// network stands between one edge and Postgres, and can be cut or led to another server.
type network struct {
	listener net.Listener

	mu     sync.Mutex
	target string
	cut    bool
	conns  map[net.Conn]struct{}
}

// newNetwork leads to the server of a database URL, and returns the URL that goes through it.
func newNetwork(t *testing.T, database string) (*network, string) {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &network{listener: listener, target: u.Host, conns: map[net.Conn]struct{}{}}
	go n.serve()
	t.Cleanup(func() {
		_ = listener.Close()
		n.drop()
	})
	u.Host = listener.Addr().String()
	return n, u.String()
}

func (n *network) serve() {
	for {
		client, err := n.listener.Accept()
		if err != nil {
			return
		}
		n.mu.Lock()
		n.conns[client] = struct{}{}
		cut, target := n.cut, n.target
		n.mu.Unlock()
		if cut { // accepted and never answered, as by a network that loses packets
			continue
		}
		server, err := net.Dial("tcp", target)
		if err != nil {
			_ = client.Close()
			continue
		}
		n.mu.Lock()
		n.conns[server] = struct{}{}
		n.mu.Unlock()
		go n.copy(client, server)
		go n.copy(server, client)
	}
}

// copy moves bytes until either side ends. While the network is cut it swallows them.
func (n *network) copy(to, from net.Conn) {
	defer func() {
		_ = to.Close()
		_ = from.Close()
	}()
	buffer := make([]byte, 32<<10)
	for {
		count, err := from.Read(buffer)
		if err != nil {
			return
		}
		n.mu.Lock()
		cut := n.cut
		n.mu.Unlock()
		if cut {
			_, _ = io.Copy(io.Discard, from)
			return
		}
		if _, err := to.Write(buffer[:count]); err != nil {
			return
		}
	}
}

// partition makes the network lose everything, until heal.
func (n *network) partition() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = true
}

// heal ends a partition, and with it the connections from before: both sides learn of it.
func (n *network) heal() {
	n.reopen()
	n.drop()
}

// reopen ends a partition for connections that are made from now on. Of those from before, what was swallowed stays so, and
// nobody tells either side: the way in which a firewall forgets them.
func (n *network) reopen() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = false
}

// lead sends connections to another server, and drops those to the one before.
func (n *network) lead(t *testing.T, database string) {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	n.target = u.Host
	n.mu.Unlock()
	n.drop()
}

func (n *network) drop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for conn := range n.conns {
		_ = conn.Close()
		delete(n.conns, conn)
	}
}

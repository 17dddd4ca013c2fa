//go:build controlplane

package e2e

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// gate forwards TCP connections to an address, as a load balancer does, and can
// cut them.
type gate struct {
	// Static after construction.
	addr, target string
	listener     net.Listener
	running      sync.WaitGroup

	// Guarded by mu.
	mu       sync.Mutex
	links    map[net.Conn]bool // to clients
	shut     bool              // new clients are cut at once
	life     time.Duration     // after it a link is ended cleanly; 0 is never
	accepted int
}

// newGate starts a gate that ends with the test.
func newGate(t *testing.T, target string) *gate {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{addr: l.Addr().String(), target: target, listener: l, links: map[net.Conn]bool{}}
	g.running.Go(g.run)
	t.Cleanup(func() {
		g.listener.Close()
		g.cut(true)
		g.running.Wait()
	})
	return g
}

// run accepts until the listener is closed.
func (g *gate) run() {
	for {
		conn, err := g.listener.Accept()
		if err != nil {
			return
		}
		g.mu.Lock()
		g.accepted++
		shut, life := g.shut, g.life
		if !shut {
			g.links[conn] = true
		}
		g.mu.Unlock()
		if shut {
			reset(conn)
			continue
		}
		g.running.Go(func() { g.link(conn, life) })
	}
}

// link carries bytes until one side ends, or life is over.
func (g *gate) link(conn net.Conn, life time.Duration) {
	defer func() {
		g.mu.Lock()
		delete(g.links, conn)
		g.mu.Unlock()
		conn.Close()
	}()
	server, err := net.DialTimeout("tcp", g.target, 5*time.Second)
	if err != nil {
		return
	}
	defer server.Close()
	if life > 0 {
		defer time.AfterFunc(life, func() { server.Close() }).Stop()
	}
	var carrying sync.WaitGroup
	carry := func(to, from net.Conn) {
		io.Copy(to, from)
		to.Close()
		from.Close()
	}
	carrying.Go(func() { carry(server, conn) })
	carry(conn, server)
	carrying.Wait()
}

// cut resets all links, and if shut is set all later ones.
func (g *gate) cut(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = shut
	for conn := range g.links {
		reset(conn)
	}
}

// live sets after which time new links end cleanly, and returns how many there
// were.
func (g *gate) live(life time.Duration) (accepted int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.life = life
	return g.accepted
}

// reset closes a connection with RST.
func reset(conn net.Conn) {
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// lose makes the kernel drop the packets that match, and returns what ends it;
// the end of the test does too.
func (p *plane) lose(match ...string) (heal func()) {
	p.t.Helper()
	rule := append(strings.Fields("INPUT --in-interface lo --protocol tcp --jump DROP"), match...)
	if out, err := exec.Command("iptables", append([]string{"--wait", "--insert"}, rule...)...).CombinedOutput(); err != nil {
		p.t.Fatalf("iptables: %v\n%s", err, out)
	}
	heal = sync.OnceFunc(func() {
		if out, err := exec.Command("iptables", append([]string{"--wait", "--delete"}, rule...)...).CombinedOutput(); err != nil {
			p.t.Errorf("iptables: %v\n%s", err, out)
		}
	})
	p.t.Cleanup(heal)
	return heal
}

// loseAll loses all packets between the API server's own address and this
// machine: only routers of the tests use it from here.
func (p *plane) loseAll() (heal func()) {
	p.t.Helper()
	host, port, _ := net.SplitHostPort(p.address)
	there := p.lose("--destination", host, "--destination-port", port)
	back := p.lose("--source", host, "--source-port", port)
	return func() { there(); back() }
}

// loseConnections loses the packets of the connections that a router has to the
// address, where the API server or a gate is, now.
func (p *plane) loseConnections(s *subject, address string) (heal func()) {
	p.t.Helper()
	var ends []func()
	for _, port := range p.ports(s, address) {
		ends = append(ends, p.lose("--source-port", port), p.lose("--destination-port", port))
	}
	return func() {
		for _, end := range ends {
			end()
		}
	}
}

// ports are those of a router's connections to the address.
func (p *plane) ports(s *subject, address string) (ports []string) {
	p.t.Helper()
	out, err := exec.Command("ss", "-Htnp", "state", "established", "dst", address).Output()
	if err != nil {
		p.t.Fatalf("ss: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); strings.Contains(line, fmt.Sprintf("pid=%d,", s.cmd.Process.Pid)) {
			_, port, _ := net.SplitHostPort(fields[2])
			ports = append(ports, port)
		}
	}
	if len(ports) == 0 {
		p.t.Fatalf("%s has no connection to %s:\n%s", s.pod, address, out)
	}
	return ports
}

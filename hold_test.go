package main

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// freeAddr returns an address where somebody may listen.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// refusingAddr returns an address where nobody listens, or can until the test
// ends: its port is that of a connection.
func refusingAddr(t testing.TB) string {
	t.Helper()
	conn, _ := tcpPair(t)
	return conn.LocalAddr().String()
}

// send writes an upgrade request without waiting for its answer.
func (p *testProxy) send(t testing.TB, namespace string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	mustWrite(t, conn, upgradeRequest("/ws/"+namespace))
	return conn
}

// waitWaiting waits until n upgrades are under way.
func (p *testProxy) waitWaiting(t testing.TB, n int64) {
	t.Helper()
	for end := time.Now().Add(patience); p.waiting.Load() != n; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d upgrades under way, want %d", p.waiting.Load(), n)
		}
	}
}

func mustAnswer(t testing.TB, conn net.Conn, status int) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != status {
		t.Fatalf("answer %+v, %v; want %d", resp, err, status)
	}
}

func TestHoldUntilTheOwnerIsThere(t *testing.T) {
	addr := freeAddr(t)
	p := startProxy(t, []string{addr}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	p.waitWaiting(t, 1)
	startStub(t, addr, echo)
	mustAnswer(t, conn, 101)
}

func TestHoldEnds(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, func(p *proxy) { p.limits.hold = 200 * time.Millisecond })
	_, _, resp := p.ask(t, upgradeRequest("/ws/ns-01"))
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("status %d, Retry-After %q, %q", resp.StatusCode, resp.Header.Get("Retry-After"), body)
	}
	p.mustTell(t, 503, string(body), "backend-0 could not be reached within 200ms: ")
	p.mustTell(t, 503, string(body), "refused")
	p.waitResult(t, resultHoldTimeout)
}

// A client that is held when its namespace gets another owner goes there.
func TestHoldFollowsTheTable(t *testing.T) {
	other := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{refusingAddr(t), other.addr}, map[string]string{"ns-01": "backend-0"}, nil)
	conn := p.send(t, "ns-01")
	p.waitWaiting(t, 1)
	p.router.update(entries{source: "test", version: "42", data: pack(map[string]string{"ns-01": "backend-1"})})
	mustAnswer(t, conn, 101)
	stamp := p.router.table().stamp
	if head := other.heads()[0]; !strings.Contains(head, "X-Router-Table: "+stamp+"\r\n") {
		t.Errorf("the backend got %q, want table %s", head, stamp)
	}
}

func TestHoldEndsWithItsClient(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	p.waitWaiting(t, 1)
	conn.Close()
	p.waitResult(t, resultClientGone)
	p.waitWaiting(t, 0)
}

// A client that leaves while the backend thinks leaves nothing behind.
func TestHandshakeEndsWithItsClient(t *testing.T) {
	gone := make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.Copy(io.Discard, br)
		close(gone)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	for len(backend.heads()) == 0 {
		<-time.After(time.Millisecond)
	}
	conn.Close()
	p.waitResult(t, resultClientGone)
	<-gone
}

func TestLimits(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	addrs := []string{backend.addr, refusingAddr(t)}
	data := map[string]string{"here": "backend-0", "away": "backend-1"}

	t.Run("sessions", func(t *testing.T) {
		p := startProxy(t, addrs, data, func(p *proxy) { p.limits.sessions = 2 })
		first := p.open(t, "here")
		p.open(t, "here")
		_, _, resp := p.ask(t, upgradeRequest("/ws/here"))
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("status %d, want 503 with Retry-After", resp.StatusCode)
		}
		p.waitResult(t, resultMaxSessions)
		first.Close()
		for p.relay.size() == 2 {
			<-time.After(time.Millisecond)
		}
		p.waitWaiting(t, 0) // the refused one counts until after its answer
		p.open(t, "here")
	})
	t.Run("waiting", func(t *testing.T) {
		p := startProxy(t, addrs, data, func(p *proxy) { p.limits.waiting = 2 })
		p.send(t, "away")
		p.send(t, "away")
		p.waitWaiting(t, 2)
		_, _, resp := p.ask(t, upgradeRequest("/ws/here"))
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("status %d, want 503 with Retry-After", resp.StatusCode)
		}
		p.waitResult(t, resultMaxWaiting)
	})
}

//go:build !portable && !386

package main

import (
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

// A plain upgrade stays on the fast path with TLS, also when bytes of the session come with it.
func TestFastPathTLS(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		for name, early := range map[string]string{"alone": "", "early bytes": "early"} {
			t.Run(name, func(t *testing.T) {
				backend := startStub(t, "127.0.0.1:0", echo)
				p := startTLS(t, []string{backend.addr}, tlsSetup{})
				config := p.client(version)
				for range 2 { // the second goes on with the TLS session of the first
					conn := p.dialTLS(t, config)
					mustWrite(t, conn, upgradeRequest("/ws/ns-01")+early)
					mustEcho(t, conn, early)
					conn.Close()
				}
				wantEqual(t, "clients that net/http had", p.http.Load(), 0)
				p.waitNobody(t)
			})
		}
	})
}

// A client that waits for its owner within TLS has no goroutine, and stays on the fast path.
func TestFastPathTLSParked(t *testing.T) {
	addr := freeAddr(t)
	p := startTLS(t, []string{addr}, tlsSetup{})
	conn := p.dialTLS(t, p.client(0))
	mustWrite(t, conn, upgradeRequest("/ws/ns-01")+"early")
	p.waitHeld(t, 1)
	eventually(t, "parked", true, func() bool { return p.pendingConns()[0].parked.Load() })
	startStub(t, addr, echo)
	mustEcho(t, conn, "early")
	wantEqual(t, "clients that net/http had", p.http.Load(), 0)
}

// A client whose handshake is under way when the router stops gets an answer, although its request
// comes only after the handshake.
func TestFastPathTLSStops(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{})
		held := &heldConn{Conn: dial(t, p.addr)}
		done := make(chan error, 1)
		client := tls.Client(held, p.client(version))
		begin, stopped := make(chan struct{}), make(chan struct{})
		held.onHeld = func() { close(begin) }
		go func() { done <- client.Handshake() }()
		<-begin
		go func() { p.stop(); close(stopped) }()
		eventually(t, "the fast path stops", true, p.fastPath.stopping.Load)
		held.release()
		must(t, <-done)
		p.waitHandshakes(t, "1 ok; 0 under way")
		mustWrite(t, client, upgradeRequest("/ws/ns-01"))
		_, resp := readAnswer(t, client)
		wantEqual(t, "status", resp.StatusCode, http.StatusServiceUnavailable)
		wantEqual(t, "upgrades that the stop has refused", p.results[resultDraining].Load(), 1)
		<-stopped
		p.waitNobody(t)
	})
}

// A client for which no descriptor is left reads that within TLS, once its handshake is over.
func TestFastPathTLSRefused(t *testing.T) {
	p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{change: func(p *proxy) {
		p.backends.dialer.Control = func(string, string, syscall.RawConn) error { return errors.New("no descriptor is left") }
	}})
	silent := dial(t, p.addr)
	conn := p.dialTLS(t, p.client(0))
	mustWrite(t, conn, "GET /ws/ns-01 HTTP/1.0\r\n\r\n")
	_, resp := readAnswer(t, conn)
	wantEqual(t, "status", resp.StatusCode, http.StatusServiceUnavailable)
	eventually(t, "silent clients", 1, p.tls.silentNow)
	p.fastPath.stop()
	if answer, err := io.ReadAll(silent); len(answer) > 0 || err != nil {
		t.Errorf("a client without a handshake is sent %q, and %v; want the end", answer, err)
	}
	if !strings.Contains(p.tls.String(), "1 ok") {
		t.Errorf("handshakes: %v", p.tls)
	}
}

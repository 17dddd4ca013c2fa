//go:build !portable && !386

package main

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A simple upgrade stays on the fast path with TLS, also when bytes of the session come with it.
func TestFastPathTLS(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		for name, early := range map[string]string{"alone": "", "early bytes": "early"} {
			t.Run(name, func(t *testing.T) {
				backend := startStub(t, "127.0.0.1:0", echo)
				p := startTLS(t, []string{backend.addr}, tlsSetup{})
				config, begun := p.client(version), time.Now()
				for range 2 { // the second goes on with the TLS session of the first
					conn := p.dialTLS(t, config)
					mustWrite(t, conn, upgradeRequest("/ws/ns-01")+early)
					mustEcho(t, conn, early)
					conn.Close()
				}
				p.wantNoHTTP(t, begun)
				p.waitNobody(t)
			})
		}
	})
}

// As much as a backend can send with its 101 arrives, also with the records of TLS that are longest.
func TestFastPathTLSMuchWithAResponse(t *testing.T) {
	long := strings.Repeat("x", bufferSize-len(switching)-64)
	backend := startStub(t, "127.0.0.1:0", answer(switching+long))
	p := startTLS(t, []string{backend.addr}, tlsSetup{change: func(p *proxy) { p.limits.headerBytes = 2 * bufferSize }})
	config := p.client(tls.VersionTLS12)
	config.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA}
	for range 20 { // mostly it comes in one read
		conn := p.dialTLS(t, config)
		mustWrite(t, conn, upgradeRequest("/ws/ns-01"))
		conn.SetReadDeadline(time.Now().Add(patience))
		br, got := bufio.NewReader(conn), make([]byte, len(long))
		if _, err := http.ReadResponse(br, nil); err != nil {
			t.Fatal(err)
		}
		if n, err := io.ReadFull(br, got); err != nil || string(got) != long {
			t.Fatalf("the client got %d bytes, %v; want %d", n, err, len(long))
		}
		conn.Close()
	}
}

// A client that waits for its owner within TLS has no goroutine, and stays on the fast path.
func TestFastPathTLSParked(t *testing.T) {
	addr := freeAddr(t)
	p := startTLS(t, []string{addr}, tlsSetup{})
	conn := p.dialTLS(t, p.client(0))
	// It is longer than what crypto/tls reads at once.
	cookie := "Cookie: a=" + strings.Repeat("x", 3000) + "\r\n\r\n"
	mustWrite(t, conn, strings.Replace(upgradeRequest("/ws/ns-01"), "\r\n\r\n", "\r\n"+cookie, 1)+"early")
	p.waitHeld(t, 1)
	eventually(t, "parked", true, func() bool { return p.fastConns()[0].parked.Load() })
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

// A client that says nothing more during its handshake does not keep the router from its end,
// however long it might have taken.
func TestFastPathTLSStopsInTime(t *testing.T) {
	p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{change: func(p *proxy) { p.limits.headerTimeout = time.Hour }})
	hello := clientHello(&tls.Config{ServerName: "a.test"})
	conn := dial(t, p.addr)
	mustWrite(t, conn, hello[:len(hello)/2])
	p.waitHandshakes(t, "; 1 under way")
	p.stop()
	mustBreak(t, conn)
	p.waitHandshakes(t, "1 timeout; 0 under way")
	p.waitNobody(t)
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
	eventually(t, "waiting clients", 1, p.tls.waitingNow)
	p.fastPath.stop()
	if answer, err := io.ReadAll(silent); len(answer) > 0 || err != nil {
		t.Errorf("a client without a handshake is sent %q, and %v; want the end", answer, err)
	}
	if !strings.Contains(p.tls.String(), "1 ok") {
		t.Errorf("handshakes: %v", p.tls)
	}
}

// withLongChain is for tlsSetup: the certificate's chain is longer than the buffers of sendLittle
// and dialSmall.
func withLongChain(t testing.TB) func(*testCA, *certificateFlags) {
	return func(ca *testCA, flags *certificateFlags) {
		b, err := os.ReadFile(flags.certs[0])
		must(t, err)
		writeFile(t, flags.certs[0], string(b)+strings.Repeat(ca.pem, (100<<10)/len(ca.certificate.Raw)))
	}
}

// sendLittle makes the buffers small from which clients are sent what they get.
func (p *tlsProxy) sendLittle(t testing.TB) {
	t.Helper()
	raw, err := p.fastPath.listener.(*net.TCPListener).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { // clients inherit it
		err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, 4096)
	}), err)
}

// Clients that do not read what they are sent keep nobody else from a handshake.
func TestFastPathTLSClientsThatDoNotRead(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		t.Run(fmt.Sprint("stopped ", stopped), func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", echo)
			p := startTLS(t, []string{backend.addr}, tlsSetup{
				flags:  withLongChain(t),
				change: func(p *proxy) { p.limits.headerTimeout, p.tls.writeTimeout = time.Hour, time.Hour },
			})
			p.sendLittle(t)
			var stuck []net.Conn
			for range 2 * cap(p.tls.computing) {
				stuck = append(stuck, dialSmall(t, p.addr))
			}
			good := dial(t, p.addr)
			eventually(t, "waiting clients", len(stuck)+1, p.tls.waitingNow)
			if stopped {
				p.fastPath.stop()
				eventually(t, "waiting clients", len(stuck)+1, p.tls.waitingNow)
			}
			for _, conn := range stuck {
				p.sendAndWait(t, conn, clientHello(&tls.Config{ServerName: "a.test"}), len(stuck)+1)
			}
			client := tlsOver(t, good, p.client(0))
			mustWrite(t, client, upgradeRequest("/ws/ns-01"))
			mustEcho(t, client, "")
			p.waitHandshakes(t, fmt.Sprintf("1 ok; %d under way", len(stuck)))
			for _, conn := range stuck {
				conn.Close()
			}
			client.Close()
			p.waitHandshakes(t, fmt.Sprintf("1 ok, %d client_gone; 0 under way", len(stuck)))
			p.waitNobody(t)
		})
	}
}

// A handshake in which the client does not read is over when its time is.
func TestFastPathTLSWriteTimeout(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		t.Run(fmt.Sprint("stopped ", stopped), func(t *testing.T) {
			p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{
				flags: withLongChain(t),
				change: func(p *proxy) {
					p.limits.headerTimeout, p.tls.writeTimeout = 2*time.Second, 2*time.Second // time to see it wait, also on a busy machine
				},
			})
			p.sendLittle(t)
			conn := dialSmall(t, p.addr)
			eventually(t, "waiting clients", 1, p.tls.waitingNow)
			if stopped {
				p.fastPath.stop()
			}
			mustWrite(t, conn, clientHello(&tls.Config{ServerName: "a.test"}))
			p.waitHandshakes(t, "1 timeout; 0 under way")
			p.waitNobody(t)
		})
	}
}

// dialSmall connects to addr with a small buffer for what comes.
func dialSmall(t testing.TB, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 1024)
		}), err)
	}}
	conn, err := d.Dial("tcp", addr)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// A silent client stays on the fast path until its time is over: net/http would give it that once
// more.
func TestFastPathTLSSilent(t *testing.T) {
	p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{change: func(p *proxy) { p.limits.headerTimeout = 100 * time.Millisecond }})
	wantSent(t, dial(t, p.addr), "")
	p.waitHandshakes(t, "1 timeout; 0 under way")
	wantEqual(t, "clients that net/http had", p.http.Load(), 0)
}

// A handshake whose time is over before its turn to compute is over: it does not keep the
// stop, and does not compute.
func TestFastPathTLSLateTurn(t *testing.T) {
	p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{change: func(p *proxy) { p.limits.headerTimeout = 300 * time.Millisecond }})
	for range cap(p.tls.computing) { // all turns are taken
		p.tls.computing <- struct{}{}
	}
	conn := dial(t, p.addr)
	mustWrite(t, conn, clientHello(&tls.Config{ServerName: "a.test"}))
	p.waitHandshakes(t, "1 timeout; 0 under way")
	mustBreak(t, conn)
	p.fastPath.stop()
	for range cap(p.tls.computing) {
		<-p.tls.computing
	}
}

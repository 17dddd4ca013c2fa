package main

import (
	"bufio"
	"bytes"
	"container/list"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// tlsProxy is a proxy whose clients speak TLS.
type tlsProxy struct {
	*testProxy
	ca *testCA // of its certificate, which is for a.test
}

// tlsSetup says how a tlsProxy differs from others. All may be nil.
type tlsSetup struct {
	key    crypto.Signer // of the certificate
	flags  func(*testCA, *certificateFlags)
	change func(*proxy) // before it starts
}

// startTLS serves a proxy with TLS to the backends at addrs.
func startTLS(t testing.TB, addrs []string, setup tlsSetup) *tlsProxy {
	t.Helper()
	p, folder := &tlsProxy{ca: newTestCA(t, "the CA")}, t.TempDir()
	pair := p.ca.sign(t, setup.key, nil, "a.test")
	flags := certificateFlags{
		certs: []string{writeFile(t, filepath.Join(folder, "crt"), pair.cert)},
		keys:  []string{writeFile(t, filepath.Join(folder, "key"), pair.key)},
	}
	if setup.flags != nil {
		setup.flags(p.ca, &flags)
	}
	certificates, err := newCertificates(flags, slog.New(slog.DiscardHandler))
	must(t, err)
	p.testProxy = startProxy(t, addrs, map[string]string{}, func(inner *proxy) {
		inner.tls, inner.relay.clientTLS = newTLSServer(certificates.config), true
		inner.forwardedFrom = &trustedProxies{}
		if setup.change != nil {
			setup.change(inner)
		}
	})
	return p
}

// withClientCA is for tlsSetup: clients need a certificate of the CA.
func withClientCA(t testing.TB) func(*testCA, *certificateFlags) {
	return func(ca *testCA, flags *certificateFlags) {
		flags.clientCA = writeFile(t, filepath.Join(t.TempDir(), "ca"), ca.pem)
	}
}

// client returns what a client of p needs.
func (p *tlsProxy) client(version uint16, certificates ...tls.Certificate) *tls.Config {
	config := newTLSClient(p.ca, version, certificates...).config
	config.NextProtos = []string{"h2", "http/1.1"} // as browsers do
	return config
}

// dialTLS does a handshake over a connection to p.
func (p *tlsProxy) dialTLS(t testing.TB, config *tls.Config) *tls.Conn {
	t.Helper()
	return tlsOver(t, dial(t, p.addr), config)
}

// tlsOver does a handshake as a client over conn.
func tlsOver(t testing.TB, conn net.Conn, config *tls.Config) *tls.Conn {
	t.Helper()
	client := tls.Client(conn, config)
	client.SetDeadline(time.Now().Add(2 * patience))
	must(t, client.Handshake())
	return client
}

// readAnswer returns the answer to a request that was sent, and the reader that has what follows.
func readAnswer(t testing.TB, conn net.Conn) (*bufio.Reader, *http.Response) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(2 * patience))
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	return br, resp
}

// mustEcho waits for the session of a request that was sent over conn, which echoes early,
// and then what comes.
func mustEcho(t testing.TB, conn net.Conn, early string) {
	t.Helper()
	br, resp := readAnswer(t, conn)
	wantEqual(t, "status", resp.StatusCode, http.StatusSwitchingProtocols)
	mustWrite(t, conn, "hello")
	got := make([]byte, len(early)+5)
	if _, err := io.ReadFull(br, got); err != nil || string(got) != early+"hello" {
		t.Fatalf("%.50q comes back, and %v; want %.50q", got, err, early+"hello")
	}
}

// String says how handshakes have ended, and how many have not.
func (s *tlsServer) String() string {
	var all []string
	for r := range numTLSResults {
		if n := s.results[r].Load(); n > 0 {
			all = append(all, fmt.Sprint(n, " ", r))
		}
	}
	return fmt.Sprintf("%s; %d under way", strings.Join(all, ", "), s.running.Load())
}

// waitHandshakes waits until handshakes have ended as want says.
func (p *tlsProxy) waitHandshakes(t testing.TB, want string) {
	t.Helper()
	eventually(t, "handshakes", want, p.tls.String)
}

// waitNobody waits until no client is left, nor what one had.
func (p *tlsProxy) waitNobody(t testing.TB) {
	t.Helper()
	eventually(t, "descriptors", 0, func() int { used, _, _ := p.fastPath.fdLimit.usage(); return used })
	eventually(t, "handshakes that compute or wait", 0, func() int { return p.tls.waitingNow() + len(p.tls.computing) })
	p.waitPending(t, 0)
	p.waitSessions(t, 0)
}

// waitingNow returns how many handshakes wait for their clients.
func (s *tlsServer) waitingNow() int {
	s.waiting.mu.Lock()
	defer s.waiting.mu.Unlock()
	return s.waiting.all.Len()
}

// fieldOf returns the values of a field of a head, with commas in between.
func fieldOf(head, name string) string {
	var values []string
	for _, match := range regexp.MustCompile(`(?im)^`+name+`: (.*)\r$`).FindAllStringSubmatch(head, -1) {
		values = append(values, match[1])
	}
	return strings.Join(values, ",")
}

// withInvented has the request say what only the router may say.
func withInvented(request string) string {
	return strings.Replace(request, "\r\n\r\n", "\r\nX-Client-Subject: CN=invented\r\nX_Client_Subject: CN=invented\r\n"+
		"X-Forwarded-Proto: invented\r\nX-Forwarded-For: 192.0.2.66\r\nX-Forwarded-Host: invented\r\n\r\n", 1)
}

// A session comes to be over TLS in each way, with each version and kind of key, and a client
// that comes again goes on with its TLS session.
func TestTLSSession(t *testing.T) {
	for name, key := range map[string]crypto.Signer{"RSA": rsaKey(t), "ECDSA": nil} {
		t.Run(name, func(t *testing.T) {
			eachVersion(t, func(t *testing.T, version uint16) {
				both(t, func(t *testing.T, request string) { testTLSSession(t, key, version, request) })
			})
		})
	}
}

func testTLSSession(t *testing.T, key crypto.Signer, version uint16, request string) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startTLS(t, []string{backend.addr}, tlsSetup{key: key})
	config := p.client(version)
	for i, resumed := range []bool{false, true, true} {
		conn := p.dialTLS(t, config)
		mustWrite(t, conn, withInvented(request))
		mustEcho(t, conn, "")
		state := conn.ConnectionState()
		wantEqual(t, "resumed", state.DidResume, resumed)
		wantEqual(t, "version", state.Version, version)
		wantEqual(t, "protocol", state.NegotiatedProtocol, "http/1.1")
		head := backend.heads()[i]
		wantEqual(t, "X-Forwarded-Proto", fieldOf(head, "X-Forwarded-Proto"), "https")
		wantEqual(t, "X-Forwarded-For", fieldOf(head, "X-Forwarded-For"), "127.0.0.1")
		wantEqual(t, "X-Forwarded-Host", fieldOf(head, "X-Forwarded-Host"), "www.mydomain.com")
		if strings.Contains(head, "invented") || strings.Contains(strings.ToLower(head), "subject") {
			t.Errorf("the backend gets %q of the client", head)
		}
		conn.Close()
	}
	p.waitHandshakes(t, "3 ok; 0 under way")
	wantEqual(t, "resumed handshakes", p.tls.resumed.Load(), 2)
	p.waitNobody(t)
}

// What the backend learns of the client's certificate is the router's, whatever the client says:
// with TLS, without a certificate, and without TLS. All kinds of requests are the same in that.
func TestTLSClientSubject(t *testing.T) {
	requests := bothWays("/ws/ns-01")
	requests["no upgrade"] = "GET /ws/ns-01 HTTP/1.1\r\nHost: www.mydomain.com\r\n\r\n"
	serve := func(conn net.Conn, br *bufio.Reader) { io.WriteString(conn, fine) }
	for name, request := range requests {
		t.Run(name, func(t *testing.T) {
			for _, subject := range []string{"", "CN=alice,O=tenant"} {
				backend := startStub(t, "127.0.0.1:0", serve)
				setup, certificates := tlsSetup{}, []tls.Certificate(nil)
				if subject != "" {
					setup.flags = withClientCA(t)
				}
				p := startTLS(t, []string{backend.addr}, setup)
				if subject != "" {
					alice := func(c *x509.Certificate) {
						c.Subject = pkix.Name{CommonName: "alice", Organization: []string{"tenant"}}
					}
					certificates = append(certificates, p.ca.sign(t, nil, alice).tls(t))
				}
				config := p.client(0, certificates...)
				for range 2 { // the second goes on with the session of the first
					conn := p.dialTLS(t, config)
					mustWrite(t, conn, withInvented(request))
					_, resp := readAnswer(t, conn)
					wantEqual(t, "status", resp.StatusCode, http.StatusOK)
					conn.Close()
				}
				for _, head := range backend.heads() {
					wantEqual(t, "X-Client-Subject", fieldOf(head, "X-Client-Subject"), subject)
					wantEqual(t, "X_Client_Subject", fieldOf(head, "X_Client_Subject"), "")
					wantEqual(t, "X-Forwarded-Proto", fieldOf(head, "X-Forwarded-Proto"), "https")
				}
				wantEqual(t, "resumed handshakes", p.tls.resumed.Load(), 1)
			}
			backend := startStub(t, "127.0.0.1:0", serve)
			_, _, resp := startProxy(t, []string{backend.addr}, map[string]string{}, nil).ask(t, withInvented(request))
			wantEqual(t, "status", resp.StatusCode, http.StatusOK)
			head := backend.heads()[0]
			wantEqual(t, "X-Client-Subject without TLS", fieldOf(head, "X.Client.Subject"), "")
			wantEqual(t, "X-Forwarded-Proto without TLS", fieldOf(head, "X-Forwarded-Proto"), "invented") // of the proxy before us
			wantEqual(t, "X-Forwarded-For without TLS", fieldOf(head, "X-Forwarded-For"), "192.0.2.66, 127.0.0.1")
		})
	}
}

// A client without the certificate that it needs gets no session, and none is counted as good.
func TestTLSClientWithoutCertificate(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{flags: withClientCA(t)})
		conn := tls.Client(dial(t, p.addr), p.client(version))
		conn.SetDeadline(time.Now().Add(2 * patience))
		_, err := conn.Read(make([]byte, 1)) // with TLS 1.3 the refusal comes after the handshake
		var alert *net.OpError
		if !errors.As(err, &alert) || alert.Op != "remote error" {
			t.Errorf("the client gets %v, want an alert", err)
		}
		p.waitHandshakes(t, "1 failed; 0 under way")
		p.waitNobody(t)
	})
}

// A client goes on with its TLS session at another router with the same ticket secret, and
// begins anew at one with another.
func TestTLSTicketsOfRouters(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		backend := startStub(t, "127.0.0.1:0", echo)
		folder := t.TempDir()
		secrets := []string{writeSecret(t, filepath.Join(folder, "1"), "one"), writeSecret(t, filepath.Join(folder, "2"), "two")}
		config := (*tls.Config)(nil)
		for i, tt := range []struct {
			secret  string
			resumed bool
		}{{secrets[0], false}, {secrets[0], true}, {secrets[1], false}, {secrets[1], true}} {
			p := startTLS(t, []string{backend.addr}, tlsSetup{flags: func(_ *testCA, f *certificateFlags) { f.ticketSecret = tt.secret }})
			if config == nil {
				config = p.client(version)
			}
			config.RootCAs.AddCert(p.ca.certificate)
			conn := p.dialTLS(t, config)
			mustWrite(t, conn, upgradeRequest("/ws/ns-01"))
			mustEcho(t, conn, "")
			if got := conn.ConnectionState().DidResume; got != tt.resumed {
				t.Errorf("router %d: resumed is %v, want %v", i, got, tt.resumed)
			}
		}
	})
}

// A kept connection has requests with bodies of both kinds, and an upgrade at its end.
func TestTLSRequests(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		body, _ := io.ReadAll(io.LimitReader(br, 300<<10))
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	})
	upgraded := startStub(t, "127.0.0.1:0", echo)
	p := startTLS(t, []string{backend.addr}, tlsSetup{})
	transport := &http.Transport{TLSClientConfig: p.client(0), MaxConnsPerHost: 1}
	defer transport.CloseIdleConnections()
	body := strings.Repeat("upload", 50<<10)
	for range 2 {
		r, err := http.NewRequest("PUT", "https://"+p.addr+"/ws/ns-01/file", strings.NewReader(body))
		must(t, err)
		resp, err := transport.RoundTrip(r)
		must(t, err)
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(got) != body {
			t.Errorf("%d bytes come back, and %v; want %d", len(got), err, len(body))
		}
	}
	p.waitHandshakes(t, "1 ok; 0 under way")

	q := startTLS(t, []string{upgraded.addr}, tlsSetup{})
	conn := q.dialTLS(t, q.client(0))
	mustWrite(t, conn, "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"+upgradeRequest("/ws/ns-01")+"early")
	br, resp := readAnswer(t, conn)
	health, err := io.ReadAll(resp.Body)
	if err != nil || string(health) != "ok\n" {
		t.Errorf("the check of health gets %q, %v", health, err)
	}
	resp, err = http.ReadResponse(br, nil)
	must(t, err)
	wantEqual(t, "status", resp.StatusCode, http.StatusSwitchingProtocols)
	mustWrite(t, conn, "late")
	got := make([]byte, len("earlylate"))
	if _, err := io.ReadFull(br, got); err != nil || string(got) != "earlylate" {
		t.Errorf("%q comes back, and %v", got, err)
	}
}

// heldConn keeps what is written to it after the first read, until release.
type heldConn struct {
	net.Conn
	onHeld func() // called when it keeps the first bytes; may be nil

	// Guarded by mu.
	mu       sync.Mutex
	holds    bool
	released bool
	held     []byte
}

func (c *heldConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	c.holds = true
	c.mu.Unlock()
	return c.Conn.Read(b)
}

func (c *heldConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.holds || c.released {
		return c.Conn.Write(b)
	}
	if c.onHeld != nil && c.held == nil {
		c.onHeld()
	}
	c.held = append(c.held, b...)
	return len(b), nil
}

// release sends what was kept. From then on nothing is.
func (c *heldConn) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Conn.Write(c.held) // an error shows when the answer is read
	c.held, c.released = nil, true
}

// What a client sends with the end of its handshake, or in pieces, comes to be its request, and
// what follows that comes to the backend once, and in order.
func TestTLSFlights(t *testing.T) {
	long := strings.Repeat("0123456789", 6<<10)
	for name, pieces := range map[string][]string{
		"request":                    {"", ""},
		"request and bytes":          {"early", ""},
		"bytes in another record":    {"", "early"},
		"many bytes":                 {"early", long},
		"many bytes in the same":     {long, ""},
		"many bytes in both":         {long[:20<<10], long[:20<<10]},
		"more than a poller's reads": {long + long, long + long},
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, request string) {
				backend := startStub(t, "127.0.0.1:0", echo)
				p := startTLS(t, []string{backend.addr}, tlsSetup{})
				held := &heldConn{Conn: dial(t, p.addr)}
				conn := tlsOver(t, held, p.client(tls.VersionTLS13))
				mustWrite(t, conn, request+pieces[0])
				mustWrite(t, conn, pieces[1])
				go held.release() // the echo has to be read meanwhile
				br, resp := readAnswer(t, conn)
				wantEqual(t, "status", resp.StatusCode, http.StatusSwitchingProtocols)
				want := pieces[0] + pieces[1]
				got := make([]byte, len(want))
				if n, err := io.ReadFull(br, got); err != nil || string(got) != want {
					t.Fatalf("%d bytes come back, and %v; want %d", n, err, len(want))
				}
			})
		})
	}
}

// A request that comes in many records, or slowly, or is longer than what is read at once, comes
// to the backend whole.
func TestTLSRequestInPieces(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		for name, size := range map[string]int{"short": 10, "long": 7 << 10, "longer than a read": 11 << 10} {
			t.Run(name, func(t *testing.T) {
				backend := startStub(t, "127.0.0.1:0", echo)
				p := startTLS(t, []string{backend.addr}, tlsSetup{})
				conn := p.dialTLS(t, p.client(version))
				value := strings.Repeat("v", size)
				request := strings.Replace(upgradeRequest("/ws/ns-01"), "\r\n\r\n", "\r\nX-Long: "+value+"\r\n\r\n", 1) + "early"
				for i := 0; i < len(request); i += 500 {
					mustWrite(t, conn, request[i:min(i+500, len(request))])
				}
				mustEcho(t, conn, "early")
				wantEqual(t, "X-Long", fieldOf(backend.heads()[0], "X-Long"), value)
			})
		}
	})
}

// A client waits for its owner within TLS, in each way, and what it has sent meanwhile is not
// lost. One that leaves is not waited for.
func TestTLSParked(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		addr := freeAddr(t)
		p := startTLS(t, []string{addr}, tlsSetup{})
		conn, leaver := p.dialTLS(t, p.client(0)), p.dialTLS(t, p.client(0))
		mustWrite(t, conn, request+"early")
		mustWrite(t, leaver, request)
		p.waitPending(t, 2)
		mustWrite(t, conn, "bytes")
		reset(leaver.NetConn())
		p.waitResult(t, resultClientGone)
		p.waitPending(t, 1)
		startStub(t, addr, echo)
		mustEcho(t, conn, "earlybytes")
		conn.Close()
		p.waitHandshakes(t, "2 ok; 0 under way")
		p.waitNobody(t)
	})
	t.Run("in vain", func(t *testing.T) {
		p := startTLS(t, []string{freeAddr(t)}, tlsSetup{change: func(p *proxy) { p.limits.holdTimeout = 100 * time.Millisecond }})
		conn := p.dialTLS(t, p.client(0))
		mustWrite(t, conn, upgradeRequest("/ws/ns-01"))
		_, resp := readAnswer(t, conn)
		wantEqual(t, "status", resp.StatusCode, http.StatusServiceUnavailable)
	})
}

// A header of the PROXY protocol comes before TLS.
func TestTLSProxyProtocol(t *testing.T) {
	header := "PROXY TCP4 192.0.2.7 192.0.2.1 5000 443\r\n"
	tests := map[string]struct {
		header string
		pause  func(*tlsProxy, net.Conn) // between the header and the handshake
		want   string
	}{
		"version 1":    {header, nil, "192.0.2.7"},
		"version 2":    {proxyBinary(0x21, 0x11, "\xc0\x00\x02\x08\xc0\x00\x02\x01\x13\x88\x01\xbb"), nil, "192.0.2.8"},
		"no address":   {proxyBinary(0x20, 0x00, ""), nil, "127.0.0.1"},
		"with a pause": {header, func(p *tlsProxy, _ net.Conn) { eventually(t, "waiting clients", 1, p.tls.waitingNow) }, "192.0.2.7"},
		"in two halves": {header[:20], func(p *tlsProxy, conn net.Conn) {
			eventually(t, "waiting clients", 1, p.tls.waitingNow)
			mustWrite(t, conn, header[20:])
		}, "192.0.2.7"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, request string) {
				backend := startStub(t, "127.0.0.1:0", echo)
				p := startTLS(t, []string{backend.addr}, tlsSetup{change: trusting(t, "127.0.0.1")})
				conn := &prefixWriter{dial(t, p.addr), tt.header}
				if tt.pause != nil {
					mustWrite(t, conn, "")
					tt.pause(p, conn)
				}
				client := tls.Client(conn, p.client(0))
				client.SetDeadline(time.Now().Add(2 * patience))
				must(t, client.Handshake())
				mustWrite(t, client, request+"early")
				mustEcho(t, client, "early")
				wantEqual(t, "X-Forwarded-For", fieldOf(backend.heads()[0], "X-Forwarded-For"), tt.want)
				client.Close()
				p.waitHandshakes(t, "1 ok; 0 under way")
				p.waitNobody(t)
			})
		})
	}
}

// prefixWriter sends the prefix together with the first write.
type prefixWriter struct {
	net.Conn
	prefix string
}

func (c *prefixWriter) Write(b []byte) (int, error) {
	all := append([]byte(c.prefix), b...)
	c.prefix = ""
	if _, err := c.Conn.Write(all); err != nil {
		return 0, err
	}
	return len(b), nil
}

// A trusted peer without a header of the PROXY protocol is refused, also if it begins with TLS.
func TestTLSProxyProtocolRefused(t *testing.T) {
	hello := clientHello(&tls.Config{ServerName: "a.test"})
	for name, begin := range map[string]string{"TLS": hello, "HTTP": "GET / HTTP/1.1\r\nHost: h\r\n\r\n", "bad header": "PROXY TCP4 x\r\n"} {
		t.Run(name, func(t *testing.T) {
			p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{change: trusting(t, "127.0.0.1")})
			conn := dial(t, p.addr)
			mustWrite(t, conn, begin)
			conn.SetReadDeadline(time.Now().Add(2 * patience))
			if answer, _ := io.ReadAll(conn); len(answer) > 0 {
				t.Errorf("it is sent %q, want nothing", answer)
			}
			p.tail.wait(t, "no PROXY protocol from a trusted proxy", 1)
			p.waitHandshakes(t, "1 failed; 0 under way")
			p.waitNobody(t)
		})
	}
}

// helloConn takes what is written, and has nothing to read.
type helloConn struct {
	net.Conn
	to io.Writer
}

func (c *helloConn) Write(b []byte) (int, error)      { return c.to.Write(b) }
func (c *helloConn) Read([]byte) (int, error)         { return 0, io.EOF }
func (c *helloConn) Close() error                     { return nil }
func (c *helloConn) SetWriteDeadline(time.Time) error { return nil }

// clientHello returns the first flight of a client with this configuration.
func clientHello(config *tls.Config) string {
	var hello bytes.Buffer
	tls.Client(&helloConn{to: &hello}, config).Handshake()
	return hello.String()
}

// helloOf returns a hello whose record, and whose message, have this version.
func helloOf(version string) string {
	message := version + strings.Repeat("r", 32) + "\x00" + "\x00\x02\x00\x2f" + "\x01\x00"
	return "\x16" + version + "\x00" + string(rune(len(message)+4)) + "\x01\x00\x00" + string(rune(len(message))) + message
}

// alertOf is the alert with this description, fatal, in clear.
func alertOf(version string, description byte) string {
	return "\x15" + version + "\x00\x02\x02" + string(rune(description))
}

// hostileClients are clients that get no session, by what they do. leave says that they close
// their connection then, and answer how what they are sent begins.
func hostileClients() map[string]struct {
	send   string
	drip   bool
	leave  func(net.Conn)
	answer string
	result tlsResult
} {
	whole := clientHello(&tls.Config{ServerName: "a.test"})
	whole12 := clientHello(&tls.Config{ServerName: "a.test", MaxVersion: tls.VersionTLS12})
	leave := func(conn net.Conn) { conn.Close() }
	type client = struct {
		send   string
		drip   bool
		leave  func(net.Conn)
		answer string
		result tlsResult
	}
	return map[string]client{
		"silent":                             {result: tlsTimeout},
		"silent within the hello":            {send: whole[:100], result: tlsTimeout},
		"silent after the hello":             {send: whole, answer: "\x16\x03\x03", result: tlsTimeout},
		"slow":                               {send: whole, drip: true, result: tlsTimeout},
		"leaves":                             {leave: leave, result: tlsGone},
		"leaves within a record":             {send: whole[:100], leave: leave, result: tlsGone},
		"leaves within a header":             {send: whole[:3], leave: leave, result: tlsGone},
		"leaves after the hello":             {send: whole, leave: leave, result: tlsGone},
		"half-closes":                        {send: whole[:100], leave: func(conn net.Conn) { conn.(*net.TCPConn).CloseWrite() }, result: tlsGone},
		"resets":                             {leave: reset, result: tlsGone},
		"resets within a record":             {send: whole[:100], leave: reset, result: tlsGone},
		"garbage":                            {send: strings.Repeat("garbage", 100), result: tlsFailed},
		"zeros":                              {send: strings.Repeat("\x00", 1000), result: tlsFailed},
		"HTTP":                               {send: upgradeRequest("/ws/ns-01"), answer: "HTTP/1.1 400 Bad Request\r\n", result: tlsFailed},
		"short HTTP":                         {send: "GET /", answer: "HTTP/1.1 400 Bad Request\r\n", result: tlsFailed},
		"HTTP of another method":             {send: "DELETE /ws/ns-01 HTTP/1.1\r\n\r\n", answer: "HTTP/1.1 400 Bad Request\r\n", result: tlsFailed},
		"SMTP":                               {send: "EHLO mail.test\r\n", result: tlsFailed},
		"SSL 2":                              {send: "\x80\x1a\x01\x00\x02\x00\x03\x00\x00\x00\x10" + strings.Repeat("\x01", 19), answer: alertOf("\x03\x01", 70), result: tlsFailed},
		"SSL 3":                              {send: helloOf("\x03\x00"), answer: alertOf("\x03\x01", 70), result: tlsFailed},
		"TLS 1.0":                            {send: helloOf("\x03\x01"), answer: alertOf("\x03\x01", 70), result: tlsFailed},
		"TLS 1.1":                            {send: helloOf("\x03\x02"), answer: alertOf("\x03\x01", 70), result: tlsFailed},
		"no common cipher":                   {send: helloOf("\x03\x03"), answer: alertOf("\x03\x03", 40), result: tlsFailed},
		"an alert":                           {send: alertOf("\x03\x03", 40), result: tlsFailed},
		"too long a record":                  {send: "\x16\x03\x01\xff\xff" + strings.Repeat("x", 1000), answer: alertOf("\x03\x01", 22), result: tlsFailed},
		"too long a hello":                   {send: "\x16\x03\x01\x40\x00\x01\xff\xff\xff" + strings.Repeat("x", 16<<10-4), answer: "\x15\x03\x01\x00\x02\x02", result: tlsFailed},
		"empty records":                      {send: strings.Repeat("\x16\x03\x01\x00\x00", 100), answer: "\x15\x03\x01\x00\x02\x02", result: tlsFailed},
		"certificates that nobody asked for": {send: whole12 + strings.Repeat("\x16\x03\x03\x40\x00"+strings.Repeat("\x0b\x03\xff\xff", 1<<12), 5), answer: "\x16\x03\x03", result: tlsFailed},
		"many tiny records":                  {send: inTinyRecords(65000)[:maxTLSHandshakeBytes+1000], result: tlsFailed},
	}
}

// inTinyRecords returns a hello of this size, of which each record has one byte.
func inTinyRecords(size int) string {
	message := "\x01" + string([]byte{0, byte(size >> 8), byte(size)}) + strings.Repeat("x", size)
	var records strings.Builder
	for i := range len(message) {
		records.WriteString("\x16\x03\x01\x00\x01" + message[i:i+1])
	}
	return records.String()
}

// A handshake that is over gets no turn, also if one is free.
func TestTLSTurnTooLate(t *testing.T) {
	s, over := newTLSServer(nil), make(chan struct{})
	close(over)
	for range 100 {
		if err := s.takeTurn(&tlsConn{expired: over}); err != errHandshakeOver {
			t.Fatalf("it gets a turn: %v, want %v", err, errHandshakeOver)
		}
	}
}

// TestTLSCloseDoesNotWait closes clients that take nothing, one after the other as net/http's
// Shutdown does.
func TestTLSCloseDoesNotWait(t *testing.T) {
	pair := newTestCA(t, "the CA").sign(t, nil, nil, "a.test")
	certificate, err := tls.X509KeyPair([]byte(pair.cert), []byte(pair.key))
	must(t, err)
	fdLimit := wideDescriptorLimit(t)
	bubble(t, func(t *testing.T) {
		const clients = 3
		began, closed := time.Now(), make(chan error, clients)
		s := newTLSServer(nil)
		for range clients {
			client, transport := net.Pipe()
			server := newTLSConn(transport, &tls.Config{Certificates: []tls.Certificate{certificate}, MaxVersion: tls.VersionTLS12})
			go server.Handshake()
			must(t, tls.Client(client, &tls.Config{InsecureSkipVerify: true}).Handshake())
			synctest.Wait()
			c := &clientConn{Conn: server, fdLimit: fdLimit, badHeads: new(atomic.Int64), tlsServer: s}
			must(t, c.Close())
			go func() {
				_, err := transport.Read(make([]byte, 1))
				closed <- err
			}()
		}
		if waited := time.Since(began); waited != 0 {
			t.Errorf("closing took %s, want no wait", waited)
		}
		s.closing.Wait()
		for range clients {
			if err := <-closed; !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("the connection of a client that takes nothing: %v, want that it is closed", err)
			}
		}
		if waited := time.Since(began); waited != closeNotifyTime {
			t.Errorf("the connections closed after %s, want %s", waited, closeNotifyTime)
		}
	})
}

// A hostile client costs its time and bytes and no more, is counted once, and keeps nobody out.
// The same holds for one whose handshake net/http does: the router had stopped to accept clients.
func TestTLSHostile(t *testing.T) {
	for name, tt := range hostileClients() {
		for _, stopped := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stopped %v", name, stopped), func(t *testing.T) {
				t.Parallel()
				backend := startStub(t, "127.0.0.1:0", echo)
				p := startTLS(t, []string{backend.addr}, tlsSetup{change: func(p *proxy) {
					if p.limits.headerTimeout = patience; tt.result == tlsTimeout {
						p.limits.headerTimeout = 2 * time.Second // also of the good client, on a busy machine
					}
				}})
				conn, good := dial(t, p.addr), dial(t, p.addr)
				eventually(t, "waiting clients", 2, p.tls.waitingNow)
				if stopped {
					p.fastPath.stop()
				}
				client := tlsOver(t, good, p.client(0))
				mustWrite(t, client, upgradeRequest("/ws/ns-01"))
				mustEcho(t, client, "")
				began := time.Now()
				misbehave(conn, tt.send, tt.drip)
				if tt.leave != nil {
					tt.leave(conn)
				}
				if tt.answer != "" || tt.leave == nil {
					wantSent(t, conn, tt.answer)
				}
				p.waitHandshakes(t, fmt.Sprintf("1 ok, 1 %v; 0 under way", tt.result))
				if took := time.Since(began); took > patience {
					t.Errorf("it took %v", took)
				}
				mustWrite(t, client, "still")
				client.Close()
				p.waitNobody(t)
			})
		}
	}
}

// misbehave sends text, all at once or slowly. A client that is cut off notices.
func misbehave(conn net.Conn, text string, slowly bool) {
	if !slowly {
		io.WriteString(conn, text)
		return
	}
	for _, b := range []byte(text) {
		if _, err := conn.Write([]byte{b}); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond) // the pace of the client
	}
}

// wantSent reads until the connection ends, and checks how what came begins.
func wantSent(t testing.TB, conn net.Conn, begin string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(2 * patience))
	got, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection is still open, and has %q", got)
	}
	if !strings.HasPrefix(string(got), begin) {
		t.Errorf("it is sent %q, want %q first", got, begin)
	}
}

// limitSilent changes how many handshakes may wait for their clients.
func (s *tlsServer) limitSilent(limit int) {
	s.waiting.mu.Lock()
	defer s.waiting.mu.Unlock()
	s.waiting.limit = limit
}

// When too many handshakes wait for their clients, the one that has waited for longest makes room:
// a good client gets in, whatever was sent before.
func TestTLSReplaced(t *testing.T) {
	hello := clientHello(&tls.Config{ServerName: "a.test"})
	for name, tt := range map[string]struct {
		change func(*proxy)
		send   string
	}{
		"silent":                {send: ""},
		"within a record":       {send: hello[:100]},
		"after the hello":       {send: hello},
		"after a PROXY header":  {trusting(t, "127.0.0.1"), "PROXY UNKNOWN\r\n"},
		"within a PROXY header": {trusting(t, "127.0.0.1"), "PROXY UNK"},
	} {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", echo)
			p := startTLS(t, []string{backend.addr}, tlsSetup{change: func(p *proxy) {
				p.limits.headerTimeout = 2 * patience
				if tt.change != nil {
					tt.change(p)
				}
			}})
			p.tls.limitSilent(3)
			var silent []net.Conn
			for range 3 {
				silent = append(silent, p.waitingClient(t, tt.send, len(silent)+1))
			}
			good := dial(t, p.addr)
			wantSent(t, silent[0], "")
			if tt.change != nil {
				mustWrite(t, good, "PROXY UNKNOWN\r\n")
			}
			client := tlsOver(t, good, p.client(0))
			mustWrite(t, client, upgradeRequest("/ws/ns-01"))
			mustEcho(t, client, "")
			p.waitHandshakes(t, "1 ok, 1 evicted; 2 under way")
			client.Close()
			silent[1].Close()
			silent[2].Close()
			p.waitHandshakes(t, "1 ok, 1 evicted, 2 client_gone; 0 under way")
			p.waitNobody(t)
		})
	}
}

// waitingClient returns a client that sends text, which begins a handshake or is nothing, and
// then nothing more, when it waits with n in all.
func (p *tlsProxy) waitingClient(t testing.TB, text string, n int) net.Conn {
	t.Helper()
	conn := dial(t, p.addr)
	eventually(t, "waiting clients", n, p.tls.waitingNow)
	if text != "" {
		p.sendAndWait(t, conn, text, n)
	}
	return conn
}

// sendAndWait sends what makes the handshake of the client that began to wait last go on, and
// returns when it waits again, with n in all.
func (p *tlsProxy) sendAndWait(t testing.TB, conn net.Conn, text string, n int) {
	t.Helper()
	before := p.tls.lastSilent()
	mustWrite(t, conn, text)
	eventually(t, "it waits again", true, func() bool { return p.tls.lastSilent() != before && p.tls.waitingNow() == n })
}

// lastSilent returns the place of the handshake that began last to wait for its client.
func (s *tlsServer) lastSilent() *list.Element {
	s.waiting.mu.Lock()
	defer s.waiting.mu.Unlock()
	return s.waiting.all.Back()
}

// A handshake that net/http does makes room too.
func TestTLSReplacedAfterTheStop(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startTLS(t, []string{backend.addr}, tlsSetup{change: func(p *proxy) { p.limits.headerTimeout = 2 * patience }})
	silent, good := dial(t, p.addr), dial(t, p.addr)
	eventually(t, "waiting clients", 2, p.tls.waitingNow)
	p.fastPath.stop()
	eventually(t, "waiting clients", 2, p.tls.waitingNow)
	p.tls.limitSilent(1)
	client := tlsOver(t, &slowStart{Conn: good}, p.client(0))
	wantSent(t, silent, "")
	mustWrite(t, client, upgradeRequest("/ws/ns-01"))
	mustEcho(t, client, "")
	p.waitHandshakes(t, "1 ok, 1 evicted; 0 under way")
	client.Close()
	p.waitNobody(t)
}

// slowStart sends its first bytes in two pieces, so that who reads waits again.
type slowStart struct {
	net.Conn
	started bool
}

func (c *slowStart) Write(b []byte) (int, error) {
	if !c.started {
		c.started = true
		for _, piece := range [][]byte{b[:3], b[3:20], b[20:]} {
			if _, err := c.Conn.Write(piece); err != nil {
				return 0, err
			}
			time.Sleep(10 * time.Millisecond) // the pace of the client
		}
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// The router stops although handshakes are under way, and counts them.
func TestTLSHandshakesAtTheStop(t *testing.T) {
	p := startTLS(t, []string{refusingAddr(t)}, tlsSetup{change: func(p *proxy) { p.limits.headerTimeout = time.Hour }})
	hello := clientHello(&tls.Config{ServerName: "a.test"})
	var clients []net.Conn
	for _, text := range []string{"", hello[:100], hello} {
		clients = append(clients, p.waitingClient(t, text, len(clients)+1))
	}
	began := time.Now()
	p.stop()
	if took := time.Since(began); took > patience {
		t.Errorf("the stop took %v", took)
	}
	for _, conn := range clients {
		conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a connection is still open")
		}
	}
	p.waitHandshakes(t, "3 timeout; 0 under way")
	p.waitNobody(t)
}

// openssl runs openssl s_client against p, with input for its standard input, which is left open
// if it is not to be a request: then it has commands of s_client.
func (p *tlsProxy) openssl(t *testing.T, input string, flags ...string) (output string, err error) {
	t.Helper()
	ca := writeFile(t, filepath.Join(t.TempDir(), "ca"), p.ca.pem)
	args := append([]string{"s_client", "-connect", p.addr, "-servername", "a.test", "-CAfile", ca, "-verify_return_error"}, flags...)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	command := exec.CommandContext(ctx, "openssl", args...)
	command.Stdin = strings.NewReader(input)
	out, err := command.CombinedOutput()
	if strings.Contains(string(out), "Error with command") || strings.Contains(string(out), "Unknown option") || strings.Contains(string(out), "Call to SSL_CONF_cmd") {
		t.Skipf("this openssl does not know %v", flags)
	}
	return string(out), err
}

// needOpenSSL skips the test without openssl.
func needOpenSSL(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed: its handshakes were not tried")
	}
}

const healthRequest = "GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"

// OpenSSL's client gets an answer with each version, cipher and curve that crypto/tls has, and an
// alert with others.
func TestTLSOpenSSL(t *testing.T) {
	needOpenSSL(t)
	old := []string{"-cipher", "DEFAULT:@SECLEVEL=0"}
	tests := map[string]struct {
		flags []string
		want  string // in what openssl says; "alert ..." if it gets no answer
	}{
		"TLS 1.0":             {append(old, "-tls1"), "alert protocol version"},
		"TLS 1.1":             {append(old, "-tls1_1"), "alert protocol version"},
		"TLS 1.2":             {[]string{"-tls1_2"}, "Protocol version: TLSv1.2"},
		"TLS 1.3":             {[]string{"-tls1_3"}, "Protocol version: TLSv1.3"},
		"any version":         {nil, "Protocol version: TLSv1.3"},
		"AES-128":             {[]string{"-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"}, "Ciphersuite: TLS_AES_128_GCM_SHA256"},
		"AES-256":             {[]string{"-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384"}, "Ciphersuite: TLS_AES_256_GCM_SHA384"},
		"ChaCha20":            {[]string{"-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"}, "Ciphersuite: TLS_CHACHA20_POLY1305_SHA256"},
		"CCM":                 {[]string{"-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_SHA256"}, "alert handshake failure"},
		"1.2 KEY AES-128":     {[]string{"-tls1_2", "-cipher", "ECDHE-KEY-AES128-GCM-SHA256"}, "Ciphersuite: ECDHE-KEY-AES128-GCM-SHA256"},
		"1.2 KEY AES-256":     {[]string{"-tls1_2", "-cipher", "ECDHE-KEY-AES256-GCM-SHA384"}, "Ciphersuite: ECDHE-KEY-AES256-GCM-SHA384"},
		"1.2 KEY ChaCha20":    {[]string{"-tls1_2", "-cipher", "ECDHE-KEY-CHACHA20-POLY1305"}, "Ciphersuite: ECDHE-KEY-CHACHA20-POLY1305"},
		"1.2 KEY CBC":         {[]string{"-tls1_2", "-cipher", "ECDHE-KEY-AES128-SHA"}, "Ciphersuite: ECDHE-KEY-AES128-SHA"},
		"1.2 KEY CBC SHA-256": {[]string{"-tls1_2", "-cipher", "ECDHE-KEY-AES128-SHA256"}, "alert handshake failure"},
		"1.2 KEY CCM":         {[]string{"-tls1_2", "-cipher", "AES128-CCM:ECDHE-ECDSA-AES128-CCM"}, "alert handshake failure"},
		"1.2 static RSA":      {[]string{"-tls1_2", "-cipher", "AES128-GCM-SHA256"}, "alert handshake failure"},
		"1.2 DHE":             {[]string{"-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256"}, "alert handshake failure"},
		"1.2 anonymous":       {[]string{"-tls1_2", "-cipher", "aNULL:@SECLEVEL=0"}, "alert handshake failure"},
		"P-256":               {[]string{"-groups", "P-256"}, "Server Temp Key: ECDH, prime256v1"},
		"P-384":               {[]string{"-groups", "P-384"}, "Server Temp Key: ECDH, secp384r1"},
		"P-521":               {[]string{"-groups", "P-521"}, "Server Temp Key: ECDH, secp521r1"},
		"X25519":              {[]string{"-groups", "X25519"}, "Server Temp Key: X25519"},
		"X25519MLKEM768":      {[]string{"-groups", "X25519MLKEM768"}, "X25519MLKEM768"},
		"X448":                {[]string{"-groups", "X448"}, "alert handshake failure"},
		"a retried hello":     {[]string{"-tls1_3", "-groups", "X448:P-384"}, "Server Temp Key: ECDH, secp384r1"},
		"1.2 P-521 with RSA":  {[]string{"-tls1_2", "-groups", "P-521"}, "Server Temp Key: ECDH, secp521r1"},
		"only HTTP/2":         {[]string{"-alpn", "h2"}, "alert no application protocol"},
		"HTTP/1.1":            {[]string{"-alpn", "h2,http/1.1"}, "Protocol version: TLSv1.3"},
	}
	for _, kind := range []string{"RSA", "ECDSA"} {
		setup := tlsSetup{}
		if kind == "RSA" {
			setup.key = rsaKey(t)
		}
		p := startTLS(t, []string{refusingAddr(t)}, setup)
		for name, tt := range tests {
			if kind == "ECDSA" && strings.HasSuffix(name, "with RSA") { // else openssl wants the curve of the certificate too
				continue
			}
			t.Run(kind+" "+name, func(t *testing.T) {
				flags := []string{"-brief", "-ign_eof"}
				for _, flag := range tt.flags {
					flags = append(flags, strings.ReplaceAll(flag, "-KEY-", "-"+kind+"-"))
				}
				want := strings.ReplaceAll(tt.want, "-KEY-", "-"+kind+"-")
				said, err := p.openssl(t, healthRequest, flags...)
				answered, refused := strings.Contains(said, "\r\n\r\nok\n"), strings.HasPrefix(want, "alert ")
				if !strings.Contains(said, want) || answered == refused || refused != (err != nil) {
					t.Errorf("openssl says %q, and %v; want %q", said, err, want)
				}
			})
		}
		eventually(t, "handshakes under way", 0, func() int { return int(p.tls.running.Load()) })
		p.waitNobody(t)
	}
}

// OpenSSL's client goes on with its TLS session, renews keys, and may not renegotiate.
func TestTLSOpenSSLSessions(t *testing.T) {
	needOpenSSL(t)
	start := func(t *testing.T) *tlsProxy { return startTLS(t, []string{refusingAddr(t)}, tlsSetup{key: rsaKey(t)}) }
	t.Run("reconnect", func(t *testing.T) {
		p := start(t)
		said, err := p.openssl(t, healthRequest, "-tls1_2", "-reconnect", "-ign_eof")
		if n := strings.Count(said, "\nReused, TLSv1.2"); n != 5 || err != nil {
			t.Errorf("it went on %d times, and %v; want 5: %s", n, err, said)
		}
		p.waitHandshakes(t, "6 ok; 0 under way")
		wantEqual(t, "resumed handshakes", p.tls.resumed.Load(), 5)
	})
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		t.Run("session file "+version, func(t *testing.T) {
			p, file := start(t), filepath.Join(t.TempDir(), "session")
			_, err := p.openssl(t, healthRequest, version, "-sess_out", file, "-ign_eof")
			must(t, err)
			said, err := p.openssl(t, healthRequest, version, "-sess_in", file, "-ign_eof")
			if err != nil || !strings.Contains(said, "\nReused, ") || !strings.Contains(said, "\r\n\r\nok\n") {
				t.Errorf("it does not go on with its session, and %v: %s", err, said)
			}
			p.waitHandshakes(t, "2 ok; 0 under way")
			wantEqual(t, "resumed handshakes", p.tls.resumed.Load(), 1)
		})
	}
	t.Run("renegotiation", func(t *testing.T) {
		p := start(t)
		said, err := p.openssl(t, "R\n", "-tls1_2")
		if err == nil || !strings.Contains(said, "RENEGOTIATING") || !strings.Contains(said, "alert") {
			t.Errorf("openssl says %q, and %v; want an alert", said, err)
		}
		p.waitHandshakes(t, "1 ok; 0 under way")
		p.waitNobody(t)
	})
	for _, command := range []string{"k", "K"} {
		t.Run("key update "+command, func(t *testing.T) {
			p := start(t)
			said, _ := p.openssl(t, command+"\n"+healthRequest, "-tls1_3")
			if !strings.Contains(said, "KEYUPDATE") {
				t.Errorf("openssl says %q, want KEYUPDATE", said)
			}
			p.waitHandshakes(t, "1 ok; 0 under way")
			p.waitNobody(t)
		})
	}
}

// flippingConn changes one byte of all that is written to it.
type flippingConn struct {
	net.Conn
	at   int
	flip byte
}

func (c *flippingConn) Write(b []byte) (int, error) {
	if c.at >= 0 && c.at < len(b) {
		b = bytes.Clone(b)
		b[c.at] ^= c.flip
	}
	c.at -= len(b)
	return c.Conn.Write(b)
}

// FuzzTLSHandshake: whatever a client sends, in whatever pieces, on each way: its handshake is
// counted once and ends with it, and it is sent nothing but TLS, or the answer to HTTP.
func FuzzTLSHandshake(f *testing.F) {
	hello := clientHello(&tls.Config{ServerName: "a.test"})
	for _, data := range []string{hello, hello + hello, helloOf("\x03\x01"), "GET / HTTP/1.1\r\n\r\n", "\x80\x1a\x01\x00\x02", "DELET", inTinyRecords(40), ""} {
		f.Add([]byte(data), []byte{5, 1, 100}, uint16(0), byte(0), false)
		f.Add([]byte(data), []byte(nil), uint16(0), byte(0), true)
	}
	for at := range uint16(20) {
		f.Add([]byte(nil), []byte(nil), at*37, byte(0x10), at%2 == 0)
	}
	p := startTLS(f, []string{refusingAddr(f)}, tlsSetup{change: func(p *proxy) { p.limits.headerTimeout = time.Hour }})
	l := listenLocal(f)
	server := newClientServer(f.Context(), p.proxy, slog.New(slog.DiscardHandler))
	go server.Serve(clientListener{l, p.fastPath.fdLimit, &p.results[resultBadHead], nil, p.tls})
	f.Cleanup(func() { server.Close() })
	config := p.client(0)
	config.ClientSessionCache = nil
	f.Fuzz(func(t *testing.T, data, cuts []byte, at uint16, flip byte, lazy bool) {
		addr := p.addr
		if lazy {
			addr = l.Addr().String()
		}
		before := p.tls.ended()
		conn, err := net.Dial("tcp", addr)
		must(t, err)
		defer reset(conn) // else the ports run out
		if flip != 0 {
			client := tls.Client(&flippingConn{conn, int(at), flip}, config)
			client.SetDeadline(time.Now().Add(100 * time.Millisecond)) // else both wait if a length was changed
			client.Handshake()
		} else {
			for _, cut := range cuts {
				n := min(int(cut), len(data))
				conn.Write(data[:n])
				data = data[n:]
			}
			conn.Write(data)
		}
		conn.(*net.TCPConn).CloseWrite()
		conn.SetDeadline(time.Now().Add(2 * patience))
		answer, err := io.ReadAll(conn)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			t.Fatalf("the connection is still open, and has %q", answer)
		case len(answer) > 0 && answer[0] != 0x15 && answer[0] != 0x16 && flip == 0 && !bytes.HasPrefix(answer, []byte("HTTP/1.1 400 ")):
			t.Errorf("it is sent %q, want TLS", answer)
		}
		eventually(t, "handshakes that ended", before+1, p.tls.ended)
		eventually(t, "handshakes under way", 0, func() int { return int(p.tls.running.Load()) })
		p.waitNobody(t)
	})
}

// ended returns how many handshakes have ended.
func (s *tlsServer) ended() (n int) {
	for r := range s.results {
		n += int(s.results[r].Load())
	}
	return n
}

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// proxyBinary returns a header of version 2.
func proxyBinary(command, family byte, rest string) string {
	size := string([]byte{byte(len(rest) >> 8), byte(len(rest))})
	return proxySignature + string([]byte{command, family}) + size + rest
}

const (
	proxyTCP4 = "\xc6\x33\x64\x07\xcb\x00\x71\x01\x04\xd2\x01\xbb" // 198.51.100.7:1234 to 203.0.113.1:443
	proxyTLVs = "\x03\x00\x04\xde\xad\xbe\xef\x20\x00\x05\x01\x00\x00\x00\x00"
)

// proxyTCP6 is 2001:db8::7, port 1234, to 2001:db8::1, port 443.
var proxyTCP6 = "\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x07" +
	"\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01" + "\x04\xd2\x01\xbb"

// proxyHeaders has valid headers, each with the client's address, "" for none.
var proxyHeaders = map[string]struct{ header, client string }{
	"version 1":             {"PROXY TCP4 198.51.100.7 203.0.113.1 1234 443\r\n", "198.51.100.7:1234"},
	"version 1, IPv6":       {"PROXY TCP6 2001:db8::7 2001:db8::1 1234 443\r\n", "[2001:db8::7]:1234"},
	"version 1, mapped":     {"PROXY TCP6 ::ffff:198.51.100.7 ::1 0 65535\r\n", "198.51.100.7:0"},
	"unknown":               {"PROXY UNKNOWN\r\n", ""},
	"unknown with the most": {"PROXY UNKNOWN" + strings.Repeat(" f", 46) + "\r\n", ""},
	"version 2":             {proxyBinary(0x21, 0x11, proxyTCP4), "198.51.100.7:1234"},
	"version 2, IPv6":       {proxyBinary(0x21, 0x21, proxyTCP6), "[2001:db8::7]:1234"},
	"version 2, TLVs":       {proxyBinary(0x21, 0x11, proxyTCP4+proxyTLVs), "198.51.100.7:1234"},
	"version 2, the most":   {proxyBinary(0x21, 0x11, proxyTCP4+strings.Repeat("x", maxProxyHeader-28)), "198.51.100.7:1234"},
	"unspecified":           {proxyBinary(0x21, 0x00, ""), ""},
	"a Unix socket":         {proxyBinary(0x21, 0x31, strings.Repeat("a", 216)), ""},
	"local":                 {proxyBinary(0x20, 0x00, ""), ""},
	"local with addresses":  {proxyBinary(0x20, 0x11, proxyTCP4), ""},
	"local, any family":     {proxyBinary(0x20, 0xff, "x"), ""},
}

// badProxyHeaders has what is no header, whatever follows.
var badProxyHeaders = map[string]string{
	"a request":           "GET / HTTP/1.1\r\nHost: h\r\n\r\n",
	"lower case":          "proxy TCP4 198.51.100.7 203.0.113.1 1234 443\r\n",
	"another protocol":    "PROXY UDP4 198.51.100.7 203.0.113.1 1234 443\r\n",
	"no protocol":         "PROXY \r\n",
	"no fields":           "PROXY TCP4\r\n",
	"two spaces":          "PROXY TCP4  198.51.100.7 203.0.113.1 1234 443\r\n",
	"a tab":               "PROXY TCP4\t198.51.100.7 203.0.113.1 1234 443\r\n",
	"a space at the end":  "PROXY TCP4 198.51.100.7 203.0.113.1 1234 443 \r\n",
	"one port":            "PROXY TCP4 198.51.100.7 203.0.113.1 1234\r\n",
	"a large port":        "PROXY TCP4 198.51.100.7 203.0.113.1 65536 443\r\n",
	"a leading zero":      "PROXY TCP4 198.51.100.7 203.0.113.1 01234 443\r\n",
	"a signed port":       "PROXY TCP4 198.51.100.7 203.0.113.1 +1 443\r\n",
	"IPv6 as IPv4":        "PROXY TCP4 2001:db8::7 2001:db8::1 1234 443\r\n",
	"IPv4 as IPv6":        "PROXY TCP6 198.51.100.7 203.0.113.1 1234 443\r\n",
	"a zone":              "PROXY TCP6 fe80::1%eth0 fe80::2 1234 443\r\n",
	"a bad destination":   "PROXY TCP4 198.51.100.7 x 1234 443\r\n",
	"an octet with zeros": "PROXY TCP4 198.051.100.7 203.0.113.1 1234 443\r\n",
	"a field in a field":  "PROXY TCP4 198.51.100.7\nX: 203.0.113.1 1234 443\r\n",
	"a short line":        "P\r\n",
	"a long line":         "PROXY UNKNOWN" + strings.Repeat(" f", 46) + "f\r\n",
	"no end":              "PROXY UNKNOWN " + strings.Repeat("f", maxProxyLine),
	"version 1 in 2":      proxyBinary(0x11, 0x11, proxyTCP4),
	"another command":     proxyBinary(0x22, 0x11, proxyTCP4),
	"UDP":                 proxyBinary(0x21, 0x12, proxyTCP4),
	"another family":      proxyBinary(0x21, 0x41, proxyTCP4),
	"cut addresses":       proxyBinary(0x21, 0x11, proxyTCP4[1:]),
	"cut, of IPv6":        proxyBinary(0x21, 0x21, proxyTCP6[1:]),
	"too long":            proxyBinary(0x21, 0x11, proxyTCP4+strings.Repeat("x", maxProxyHeader-27)),
	"the longest":         proxySignature + "\x21\x11\xff\xff",
	"half a signature":    "\r\n\r\n\x00\r\nQUIX",
}

// TestParseProxyHeader: each beginning of a valid header is not whole, and what follows
// the header changes nothing.
func TestParseProxyHeader(t *testing.T) {
	for name, tt := range proxyHeaders {
		for n := range len(tt.header) {
			if _, size, err := parseProxyHeader([]byte(tt.header[:n])); size != 0 || err != nil {
				t.Errorf("%s: %d, %v after %d bytes, want 0 and no error", name, size, err, n)
			}
		}
		for _, rest := range []string{"", "GET / HTTP/1.1\r\n\r\n", "\r\n", tt.header} {
			client, size, err := parseProxyHeader([]byte(tt.header + rest))
			if err != nil || size != len(tt.header) {
				t.Errorf("%s: size %d, %v, want %d", name, size, err, len(tt.header))
			}
			got := ""
			if client.IsValid() {
				got = client.String()
			}
			wantEqual(t, name, got, tt.client)
		}
	}
	for name, header := range badProxyHeaders {
		if client, size, err := parseProxyHeader([]byte(header)); err == nil || size != 0 {
			t.Errorf("%s: %v, size %d, %v, want an error and no size", name, client, size, err)
		}
	}
}

// FuzzProxyHeader: what is parsed does not depend on what follows, or on how much of the
// header has come.
func FuzzProxyHeader(f *testing.F) {
	for _, tt := range proxyHeaders {
		f.Add([]byte(tt.header))
	}
	for _, header := range badProxyHeaders {
		f.Add([]byte(header))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		client, size, err := parseProxyHeader(data)
		more, sizeOfMore, errOfMore := parseProxyHeader(append(bytes.Clone(data), "\r\nx"...))
		switch {
		case size > len(data) || size > maxProxyHeader || size < 0:
			t.Fatalf("size %d of %d", size, len(data))
		case err != nil && (client.IsValid() || size != 0 || errOfMore == nil):
			t.Fatalf("%v, size %d, then %v", err, size, errOfMore)
		case err == nil && size > 0 && (more != client || sizeOfMore != size || errOfMore != nil):
			t.Fatalf("%v %d, then %v %d %v", client, size, more, sizeOfMore, errOfMore)
		case err == nil && size == 0 && len(data) > maxProxyHeader:
			t.Fatalf("%d bytes are not whole", len(data))
		case client.IsValid() && (client.Addr().Is4In6() || client.Addr().Zone() != ""):
			t.Fatalf("the client is %v", client)
		}
		for n := range size {
			if _, before, err := parseProxyHeader(data[:n]); before != 0 || err != nil {
				t.Fatalf("after %d of %d bytes: %d, %v", n, size, before, err)
			}
		}
	})
}

// TestReadProxyHeader reads headers byte by byte, and what follows with the last one.
func TestReadProxyHeader(t *testing.T) {
	for name, tt := range proxyHeaders {
		rest := tt.header[1 : len(tt.header)-1]
		more := func() ([]byte, error) {
			if rest == "" {
				return []byte(tt.header[len(tt.header)-1:] + "GET"), nil
			}
			next := rest[:1]
			rest = rest[1:]
			return []byte(next), nil
		}
		client, after, err := (&proxyProtocol{}).read([]byte(tt.header[:1]), more)
		if err != nil || string(after) != "GET" || (client == nil) != (tt.client == "") ||
			client != nil && client.String() != tt.client {
			t.Errorf("%s: %v, %q, %v", name, client, after, err)
		}
	}
}

// TestTrustedProxies: prefixes hold for both forms of an IPv4 address, and for no other.
func TestTrustedProxies(t *testing.T) {
	var trusted trustedProxies
	must(t, trusted.Set("10.0.0.0/8,192.0.2.1"), trusted.Set("fd00::/8"))
	for peer, want := range map[string]bool{
		"10.1.2.3:80": true, "[::ffff:10.1.2.3]:80": true, "192.0.2.1:1": true, "[fd00::1]:80": true,
		"[fd00::1%eth0]:80": true, "11.0.0.1:80": false, "192.0.2.2:1": false, "[fe80::1]:80": false, "": false, "@": false,
	} {
		wantEqual(t, peer, trusted.contains(peer), want)
	}
	must(t, trusted.Set("unix"))
	wantEqual(t, "a Unix socket", trusted.contains(""), true)
	wantEqual(t, "nobody", (*trustedProxies)(nil).contains(""), false)
}

// trusting returns a change for startProxy: the proxy believes these addresses.
func trusting(t *testing.T, addresses string) func(*proxy) {
	return func(p *proxy) {
		trusted := &trustedProxies{}
		must(t, trusted.Set(addresses))
		p.proxyProtocol = &proxyProtocol{trusted: trusted, log: p.log}
	}
}

// withForwarded adds what a client claims to be.
func withForwarded(request string) string {
	return strings.Replace(request, "\r\n", "\r\nX-Forwarded-For: 203.0.113.9\r\n", 1)
}

// TestProxyProtocolAddress: the address of the header is the last one that the backend
// gets, in both ways of an upgrade, however the header comes.
func TestProxyProtocolAddress(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		backend := startStub(t, "127.0.0.1:0", echo)
		p := startProxy(t, []string{backend.addr}, map[string]string{}, trusting(t, "127.0.0.0/8"))
		for name, tt := range proxyHeaders {
			t.Run(name, func(t *testing.T) {
				want := "127.0.0.1"
				if tt.client != "" {
					want = netip.MustParseAddrPort(tt.client).Addr().String()
				}
				for _, pieces := range [][]string{
					{tt.header + withForwarded(request)},
					{tt.header, withForwarded(request)},
					{tt.header[:1], tt.header[1:7], tt.header[7:] + withForwarded(request)},
					{tt.header + "\r\n", "\r\n" + withForwarded(request)},
				} {
					before := len(backend.heads())
					p.sendPieces(t, pieces)
					heads := backend.heads()
					if len(heads) != before+1 ||
						!strings.Contains(heads[before], "X-Forwarded-For: 203.0.113.9, "+want+"\r\n") {
						t.Errorf("%q: the backend got %q, want %s", pieces, heads[before:], want)
					}
				}
			})
		}
	})
}

// sendPieces sends a request in pieces, and wants a 101.
func (p *testProxy) sendPieces(t *testing.T, pieces []string) {
	t.Helper()
	conn := dial(t, p.addr)
	for _, piece := range pieces {
		mustWrite(t, conn, piece)
	}
	mustAnswer(t, conn, http.StatusSwitchingProtocols)
}

// TestProxyProtocolLate: a header that comes in two parts, the second when net/http has
// the client, counts as one that comes at once.
func TestProxyProtocolLate(t *testing.T) {
	for name, tt := range proxyHeaders {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			backend := startStub(t, "127.0.0.1:0", echo)
			p := startProxy(t, []string{backend.addr}, map[string]string{}, trusting(t, "127.0.0.0/8"))
			conn := dial(t, p.addr)
			mustWrite(t, conn, tt.header[:len(tt.header)-1])
			eventually(t, "clients of net/http", 1, p.http.Load)
			mustWrite(t, conn, tt.header[len(tt.header)-1:]+"\r\n"+withForwarded(upgradeRequest("/ws/ns-01"))+"early")
			mustAnswer(t, conn, http.StatusSwitchingProtocols)
			want := "127.0.0.1"
			if tt.client != "" {
				want = netip.MustParseAddrPort(tt.client).Addr().String()
			}
			if heads := backend.heads(); len(heads) != 1 ||
				!strings.Contains(heads[0], "X-Forwarded-For: 203.0.113.9, "+want+"\r\n") {
				t.Errorf("the backend got %q, want %s", heads, want)
			}
		})
	}
}

// TestProxyProtocolRefused: without a valid header, a trusted proxy's client gets 400 and
// no backend a request. The log says that.
func TestProxyProtocolRefused(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, trusting(t, "127.0.0.1"))
	count := int64(0)
	for name, header := range badProxyHeaders {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, p.addr)
			mustWrite(t, conn, header+upgradeRequest("/ws/ns-01"))
			mustAnswer(t, conn, http.StatusBadRequest)
			conn.Close()
			count++
			eventually(t, "bad heads", count, p.results[resultBadHead].Load)
		})
	}
	if heads := backend.heads(); len(heads) > 0 {
		t.Errorf("the backend got %q", heads)
	}
	line := p.tail.wait(t, "no PROXY protocol from a trusted proxy", 1)
	if peer := fmt.Sprint(line["peer"]); !strings.HasPrefix(peer, "127.0.0.1:") {
		t.Errorf("the log has peer=%s", peer)
	}
}

// TestProxyProtocolUntrusted: who is not trusted is served without a header, and one that
// it sends is a bad request. So it is for all when the PROXY protocol is off.
func TestProxyProtocolUntrusted(t *testing.T) {
	for name, change := range map[string]func(*proxy){"others": trusting(t, "10.0.0.0/8,unix"), "off": nil} {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", echo)
			p := startProxy(t, []string{backend.addr}, map[string]string{}, change)
			p.sendPieces(t, []string{withForwarded(upgradeRequest("/ws/ns-01"))})
			if heads := backend.heads(); len(heads) != 1 || !strings.Contains(heads[0], "X-Forwarded-For: 203.0.113.9, 127.0.0.1\r\n") {
				t.Errorf("the backend got %q", heads)
			}
			for name, tt := range proxyHeaders {
				conn := dial(t, p.addr)
				mustWrite(t, conn, tt.header+upgradeRequest("/ws/"+strings.ReplaceAll(name, " ", "-")))
				mustAnswer(t, conn, http.StatusBadRequest)
			}
			wantEqual(t, "requests to the backend", len(backend.heads()), 1)
		})
	}
}

// TestProxyProtocolTimeout: a header that does not end has as much time as a request.
func TestProxyProtocolTimeout(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, func(p *proxy) {
		trusting(t, "127.0.0.1")(p)
		p.limits.headerTimeout = time.Second // in which a client on a busy machine sends what it will
	})
	begins, conns := []string{"P", "PROXY TCP4 198.51", "\r\n", proxySignature, proxyBinary(0x21, 0x11, proxyTCP4)[:20]}, []net.Conn{}
	for _, begin := range begins {
		conn := dial(t, p.addr)
		mustWrite(t, conn, begin)
		conns = append(conns, conn)
	}
	for i, conn := range conns {
		conn.SetReadDeadline(time.Now().Add(patience))
		if rest, err := io.ReadAll(conn); err != nil {
			t.Errorf("%q: the connection is not closed: %q, %v", begins[i], rest, err)
		}
	}
	eventually(t, "bad heads", int64(len(begins)), p.results[resultBadHead].Load)
	silent := dial(t, p.addr)
	silent.SetReadDeadline(time.Now().Add(patience))
	if _, err := silent.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a silent client: %v, want EOF", err)
	}
}

// TestProxyProtocolOnUnixSocket: the peers of a Unix socket are trusted by the word unix.
func TestProxyProtocolOnUnixSocket(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	socket := filepath.Join(t.TempDir(), "s")
	r := startRouter(t, "-listen", "unix:"+socket, "-backends", backend.addr, "-overrides", t.TempDir(),
		"-proxy-protocol", "on", "-trusted-proxies", "unix")
	r.log.wait(t, "routing table updated", 1)
	header := proxyHeaders["version 2, IPv6"].header
	for _, request := range bothWays("/ws/ns-01") {
		before := len(backend.heads())
		conn := dial(t, socket)
		mustWrite(t, conn, header+withForwarded(request))
		mustAnswer(t, conn, http.StatusSwitchingProtocols)
		if heads := backend.heads()[before:]; len(heads) != 1 ||
			!strings.Contains(heads[0], "X-Forwarded-For: 203.0.113.9, 2001:db8::7\r\n") {
			t.Errorf("the backend got %q", heads)
		}
		conn = dial(t, socket)
		mustWrite(t, conn, request)
		mustAnswer(t, conn, http.StatusBadRequest)
	}
}

// TestClientHealth: /healthz of the client listener answers load balancers, as /readyz of
// the admin port would.
func TestClientHealth(t *testing.T) {
	check := func(t *testing.T, p *testProxy, head string, status int, body string) {
		t.Helper()
		conn := dial(t, p.addr)
		mustWrite(t, conn, head+"\r\n\r\n")
		conn.SetReadDeadline(time.Now().Add(patience))
		method, _, _ := strings.Cut(head, " ")
		resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
		must(t, err)
		got, err := io.ReadAll(resp.Body)
		must(t, err)
		if resp.StatusCode != status || body != "" && string(got) != body {
			t.Errorf("%q: %d %q, want %d %q", head, resp.StatusCode, got, status, body)
		}
	}
	p := startProxy(t, []string{refusingAddr(t)}, nil, nil)
	check(t, p, "GET /healthz HTTP/1.1\r\nHost: 10.0.0.1", 503, "not ready\n")
	p.tables.update(sourceContent{id: sourceID{name: "test"}, version: "41", overrides: newOverrideSet(nil)})
	check(t, p, "GET /healthz HTTP/1.1\r\nHost: 10.0.0.1", 200, "ok\n")
	check(t, p, "GET /healthz?a=b HTTP/1.1\r\nHost: [::1]:8000", 200, "ok\n")
	check(t, p, "GET /healthz HTTP/1.0", 200, "ok\n")
	check(t, p, "HEAD /healthz HTTP/1.1\r\nHost: h", 200, "")
	check(t, p, "POST /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 0", 404, "")
	check(t, p, "GET /healthz/ HTTP/1.1\r\nHost: h", 404, "")
	check(t, p, "GET /%68ealthz HTTP/1.1\r\nHost: h", 404, "")
	p.draining.Store(true)
	check(t, p, "GET /healthz HTTP/1.1\r\nHost: h", 503, "not ready\n")

	hosts, err := newNamespaceMatcher("host", nil)
	must(t, err)
	p = startProxy(t, []string{refusingAddr(t)}, map[string]string{"ns-01": "backend-9"}, func(p *proxy) {
		p.namespaceOf = hosts.namespace
	})
	check(t, p, "GET /healthz HTTP/1.1\r\nHost: 10.0.0.1", 200, "ok\n")
	conn := dial(t, p.addr)
	mustWrite(t, conn, strings.Replace(upgradeRequest("/healthz"), "www.", "ns-01.", 1))
	mustAnswer(t, conn, http.StatusServiceUnavailable) // of a namespace whose owner is not known
}

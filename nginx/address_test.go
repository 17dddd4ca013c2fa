//go:build unix

package nginx_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBothFamilies: nginx answers over IPv4 and IPv6, and without IPv6 over IPv4.
func TestBothFamilies(t *testing.T) {
	tests := map[string]struct{ ipv6, loopback string }{
		"IPv4":         {"/proc/net/if_inet6", "127.0.0.1"},
		"IPv6":         {"/proc/net/if_inet6", "::1"},
		"without IPv6": {"/none", "127.0.0.1"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if test.loopback == "::1" && !hasIPv6() {
				t.Log("nothing tested: no IPv6")
				return
			}
			s := start(t, func(s *sidecar) { s.ipv6, s.loopback = test.ipv6, test.loopback })
			if s == nil {
				return
			}
			s.wantServes(t)
			other := net.JoinHostPort("::1", port(s.secure))
			conn, err := net.Dial("tcp", other)
			if err == nil {
				conn.Close()
			}
			if served := test.ipv6 != "/none" && hasIPv6(); served != (err == nil) {
				t.Errorf("dial %s: %v", other, err)
			}
		})
	}
}

func hasIPv6() bool {
	addresses, err := os.ReadFile("/proc/net/if_inet6")
	return err == nil && bytes.Contains(addresses, []byte("00000000000000000000000000000001 "))
}

// wantServes wants what the pod needs of nginx, at the addresses of s: the probes, the
// redirect, the page, a WebSocket and the client's address.
func (s *sidecar) wantServes(t *testing.T) {
	t.Helper()
	wantAnswer(t, s.client(t, s.plain), "http://"+host+"/a", 301, "", nil)
	wantAnswer(t, s.client(t, s.probe), "http://"+host+"/healthz", 200, "ok\n", nil)
	wantAnswer(t, s.client(t, s.probe), "http://"+host+"/readyz", 200, "ok\n", nil)
	wantAnswer(t, s.client(t, s.secure), "https://"+host+"/", 200, "", nil)
	echo(t, s.dial(t, "/ws/ns-01", nil), []byte("hello"))
	authority := net.JoinHostPort(s.loopback, "8443")
	s.request(t, "GET /plain?status=200 HTTP/1.1\r\nHost: "+authority+
		"\r\nX-Forwarded-For: 2001:db8::1\r\n\r\n")
	r := s.router.seen()
	for field, want := range map[string]string{
		"X-Forwarded-For": "2001:db8::1, " + s.loopback, "X-Forwarded-Host": authority,
	} {
		if got := r.Header.Get(field); got != want {
			t.Errorf("%s: %q, want %q", field, got, want)
		}
	}
}

// ipv6Only is set in the process that has a network of IPv6 only.
const ipv6Only = "NGINX_TEST_IPV6_ONLY"

// TestIPv6Only runs itself in a network namespace whose only address is ::1.
func TestIPv6Only(t *testing.T) {
	if os.Getenv(ipv6Only) != "" {
		s := start(t, func(s *sidecar) { s.loopback = "::1" })
		if s == nil {
			return
		}
		s.wantServes(t)
		return
	}
	const only = `ip link set lo up && ip -4 addr flush dev lo && exec "$@"`
	if err := exec.Command("unshare", "-n", "sh", "-c", only, "sh", "true").Run(); err != nil || !hasIPv6() {
		t.Logf("nothing tested: no network namespace with IPv6: %v", err)
		return
	}
	cmd := exec.Command("unshare", "-n", "sh", "-c", only, "sh",
		os.Args[0], "-test.run=^TestIPv6Only$", "-test.v")
	cmd.Env = append(os.Environ(), ipv6Only+"=1")
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestIPv6Only")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// proxied sends text over TLS to the address after a header of the PROXY protocol, and
// returns the answer, or why there is none.
func (s *sidecar) proxied(t *testing.T, address, header, text string) (*http.Response, error) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(bound))
	if _, err := io.WriteString(conn, header); err != nil {
		t.Fatal(err)
	}
	secure := tls.Client(conn, s.tlsConfig())
	if _, err := io.WriteString(secure, text); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(secure), nil)
}

// TestProxyProtocol: with PROXY_PROTOCOL the address of the header is the client's, if
// the peer is one of those that it names.
func TestProxyProtocol(t *testing.T) {
	if out, _ := exec.Command(program(), "-V").CombinedOutput(); !bytes.Contains(out, []byte("http_realip_module")) {
		t.Log("nothing tested: this nginx has no realip module")
		return
	}
	s := start(t, func(s *sidecar) { s.env = []string{"PROXY_PROTOCOL=192.0.2.0/24,127.0.0.1"} })
	if s == nil {
		return
	}
	const (
		v1      = "PROXY TCP4 198.51.100.7 203.0.113.1 1234 443\r\n"
		v1of6   = "PROXY TCP6 2001:db8::7 2001:db8::1 1234 443\r\n"
		unknown = "PROXY UNKNOWN\r\n"
		v2      = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc6\x33\x64\x08\xcb\x00\x71\x01\x04\xd2\x01\xbb"
	)
	listed, unlisted := s.secure, net.JoinHostPort("::1", port(s.secure))
	tests := map[string]struct{ address, header, want string }{
		"version 1":              {listed, v1, "192.0.2.9, 198.51.100.7"},
		"IPv6":                   {listed, v1of6, "192.0.2.9, 2001:db8::7"},
		"version 2":              {listed, v2, "192.0.2.9, 198.51.100.8"},
		"of a check":             {listed, unknown, "192.0.2.9, 127.0.0.1"},
		"of who is not believed": {unlisted, v1, "192.0.2.9, ::1"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if test.address == unlisted && !hasIPv6() {
				t.Log("nothing tested: no IPv6")
				return
			}
			res, err := s.proxied(t, test.address, test.header,
				"GET /ws/a HTTP/1.1\r\nX-Forwarded-For: 192.0.2.9\r\n"+fields+"\r\n")
			if err != nil || res.StatusCode != 101 {
				t.Fatalf("%v, %v", res, err)
			}
			if got := s.router.seen().Header.Get("X-Forwarded-For"); got != test.want {
				t.Errorf("X-Forwarded-For: %q, want %q", got, test.want)
			}
		})
	}
	before := s.router.count()
	if res, err := s.proxied(t, listed, "", "GET /ws/a HTTP/1.1\r\n"+fields+"\r\n"); err == nil {
		t.Errorf("without a header: status %d", res.StatusCode)
	}
	if res, err := s.client(t, s.plain).Get("http://" + host + "/a"); err == nil {
		t.Errorf("port 80 without a header: status %d", res.StatusCode)
	}
	if s.router.count() != before {
		t.Error("the router got a request without a header")
	}
	wantAnswer(t, s.client(t, s.probe), "http://"+host+"/readyz", 200, "ok\n", nil)
}

// TestNoProxyProtocol: without PROXY_PROTOCOL a header is no request.
func TestNoProxyProtocol(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	res, err := s.proxied(t, s.secure, "PROXY TCP4 198.51.100.7 203.0.113.1 1234 443\r\n", "GET / HTTP/1.1\r\n"+fields+"\r\n")
	if err == nil {
		t.Errorf("status %d, want none", res.StatusCode)
	}
}

// TestBadProxies: start.sh takes nothing but addresses, and says so.
func TestBadProxies(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	for _, value := range []string{"all", "10.0.0.0/8 ", "10.0.0.0/8;", "$HOME", "unix:", "a b", "*",
		"face", "bad.cafe", "10.0.0.0/8,bad.cafe", ",", "10.0.0.0/8,,fd00::/8"} {
		s.env = []string{"PROXY_PROTOCOL=" + value}
		err := s.command(t, "-t").Run()
		log := readFile(t, filepath.Join(s.dir, "stderr"))
		if err == nil || !strings.Contains(string(log), "(got "+value+")") {
			t.Errorf("%q: %v, %s", value, err, log)
		}
	}
}

//go:build unix

// Package nginx_test runs the real nginx with this folder's nginx.conf in
// front of a stub in the router's place.
package nginx_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// A warning is a failure: an operator would read it at every start.
func TestConfigurationIsValid(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	s.configure(t) // -t binds too, and the first ports are taken
	err := s.command(t, "-t").Run()
	out := readFile(t, filepath.Join(s.dir, "stderr"))
	// Who may not raise the limit of open files reads that in the log, and goes on.
	out = regexp.MustCompile(`(?m)^.*setrlimit\(RLIMIT_NOFILE.*$`).ReplaceAll(out, nil)
	if err != nil || bytes.Contains(out, []byte("[warn]")) || bytes.Contains(out, []byte("[alert]")) {
		t.Errorf("nginx -t: %v\n%s", err, out)
	}
}

func TestTLSVersions(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	tests := map[string]struct {
		version  uint16
		accepted bool
	}{
		"1.1": {tls.VersionTLS11, false},
		"1.2": {tls.VersionTLS12, true},
		"1.3": {tls.VersionTLS13, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			config := s.tlsConfig()
			config.MinVersion, config.MaxVersion = test.version, test.version
			conn, err := tls.Dial("tcp", s.secure, config)
			if (err == nil) != test.accepted {
				t.Fatalf("handshake: %v, accepted should be %v", err, test.accepted)
			}
			if err == nil {
				conn.Close()
			} else if !strings.Contains(err.Error(), "remote error: tls: protocol version") {
				t.Errorf("refused with %v, want an alert about the version", err)
			}
		})
	}
}

func TestAnswers(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	page := string(readFile(t, "page/index.html"))
	tests := map[string]struct {
		url    string
		status int
		body   string
		header map[string]string
	}{
		"probe":               {"http://" + host + "/healthz", 200, "ok\n", nil},
		"http is redirected":  {"http://" + host + "/ws/ns-01?a=b%2Fc", 301, "", map[string]string{"Location": "https://" + host + "/ws/ns-01?a=b%2Fc"}},
		"page":                {"https://" + host + "/", 200, page, map[string]string{"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache", "Server": "nginx"}},
		"page by its name":    {"https://" + host + "/index.html", 426, "not an upgrade\n", nil},
		"any path":            {"https://" + host + "/wsx", 426, "not an upgrade\n", nil},
		"the router's health": {"https://" + host + "/healthz", 426, "not an upgrade\n", nil},
		"probe of TLS":        {"http://" + host + ":8002/readyz", 200, "ok\n", nil},
		"no more on its port": {"http://" + host + ":8002/", 404, "not found\n", nil},
		"not for clients":     {"http://" + host + "/readyz", 301, "", map[string]string{"Location": "https://" + host + "/readyz"}},
		"nor over TLS":        {"https://" + host + "/readyz", 426, "not an upgrade\n", nil},
		"probe of nginx":      {"http://" + host + ":8002/healthz", 200, "ok\n", nil},
		"router's 503":        {"https://" + host + "/ws/busy", 503, "busy\n", map[string]string{"Retry-After": "7"}},
		"router's 426":        {"https://" + host + "/ws/ns-01", 426, "not an upgrade\n", map[string]string{"Upgrade": "websocket"}},
		"path without slash":  {"https://" + host + "/ws", 426, "not an upgrade\n", nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			address := s.plain
			switch {
			case strings.HasPrefix(test.url, "https:"):
				address = s.secure
			case strings.Contains(test.url, ":8002/"):
				address = s.probe
			}
			wantAnswer(t, s.client(t, address), test.url, test.status, test.body, test.header)
		})
	}
}

// TestWithoutPage: the demo's page is not part of the router's installation. Without it the
// router gets GET / as it gets all else.
func TestWithoutPage(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	if err := os.Remove(filepath.Join(s.dir, "html", "index.html")); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, s.client(t, s.secure), "https://"+host+"/", 426, "not an upgrade\n", nil)
}

// wantAnswer compares what GET brings; an empty body is not compared.
func wantAnswer(t *testing.T, client *http.Client, url string, status int, body string, header map[string]string) {
	t.Helper()
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != status {
		t.Errorf("status %d, want %d", res.StatusCode, status)
	}
	if body != "" && string(got) != body {
		t.Errorf("body %.80q, want %.80q", got, body)
	}
	for key, want := range header {
		if got := res.Header.Get(key); got != want {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
}

// The page needs its own script, its style and WebSockets, and nothing else.
func TestPagePolicy(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	res, err := s.client(t, s.secure).Get("https://" + host + "/")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	policy := res.Header.Get("Content-Security-Policy")
	for _, want := range []string{"default-src 'none'", "script-src 'unsafe-inline'", "style-src 'unsafe-inline'", "connect-src ws: wss:"} {
		if !strings.Contains(policy, want) {
			t.Errorf("policy %q lacks %q", policy, want)
		}
	}
}

// A client has to come back, and not on this connection: where it leads there
// will be no router.
func TestRouterIsGone(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	s.router.server.Close()
	client, url := s.client(t, s.secure), "https://"+host+"/ws/ns-01"
	wantAnswer(t, client, url, 502,
		"no answer from the router, or one with a head of more than 16 KiB\n", map[string]string{"Retry-After": "1"})
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if !res.Close {
		t.Error("the connection is kept")
	}
}

// What the router sees of an upgrade, and of a request that is none.
func TestHeadersToTheRouter(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	s.dial(t, "/ws/ns-01/a%2Fb//c?x=%20", http.Header{
		"X-Forwarded-For":   {"192.0.2.1"},
		"X-Forwarded-Proto": {"http"},
		"X-Forwarded-Host":  {"example.org"},
	})
	r := s.router.seen()
	for key, want := range map[string]string{
		"Upgrade":           "websocket",
		"Connection":        "upgrade",
		"Origin":            "https://" + host,
		"X-Forwarded-For":   "192.0.2.1, 127.0.0.1",
		"X-Forwarded-Proto": "https",
		"X-Forwarded-Host":  host + ":8443",
	} {
		if got := strings.Join(r.Header.Values(key), "|"); got != want {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
	if r.Host != host+":8443" || r.RequestURI != "/ws/ns-01/a%2Fb//c?x=%20" || r.Proto != "HTTP/1.1" {
		t.Errorf("host %q, uri %q, %s", r.Host, r.RequestURI, r.Proto)
	}

	res, err := s.client(t, s.secure).Get("https://" + host + "/ws/ns-01")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	r = s.router.seen()
	if r.Header["Upgrade"] != nil || r.Header["Connection"] != nil || r.Host != host {
		t.Errorf("no upgrade: host %q, header %v, close %v", r.Host, r.Header, r.Close)
	}
}

// Larger than every buffer on the way, and one byte.
func TestEcho(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	ws := s.dial(t, "/ws/ns-01", nil)
	for _, size := range []int{1, 4096, 4097, 1 << 20} {
		echo(t, ws, bytes.Repeat([]byte("x"), size))
	}
}

// A Secret that changes: new connections get the new certificate without a
// reload, the old connection lives on.
func TestReplacedCertificate(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	old := s.dial(t, "/ws/ns-01", nil)
	echo(t, old, []byte("before"))
	before := serial(t, s)
	s.makeCertificate(t)
	err := until(func() error { // ssl_certificate_cache has the old one for a second
		if serial(t, s) == before {
			return fmt.Errorf("certificate %s is still served", before)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	echo(t, old, []byte("after"))
}

// A key that does not fit the certificate: nginx goes on, but does not call itself
// ready, and says why. Clients that fail by their own fault leave no line.
func TestWrongPair(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	probe := s.client(t, s.probe)
	config := s.tlsConfig()
	config.MinVersion, config.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
	if conn, err := tls.Dial("tcp", s.secure, config); err == nil {
		conn.Close()
		t.Error("TLS 1.1 is accepted")
	}
	wantAnswer(t, probe, "http://"+host+"/readyz", 200, "ok\n", nil)
	if log := readFile(t, filepath.Join(s.dir, "stderr")); bytes.Contains(log, []byte("SSL")) {
		t.Errorf("before: %s", log)
	}
	ws := s.dial(t, "/ws/ns-01", nil)
	for _, algorithm := range [][]string{{"RSA", "rsa_keygen_bits:2048"}, {"EC", "ec_paramgen_curve:P-256"}} {
		t.Run(algorithm[0], func(t *testing.T) {
			out, err := exec.Command("openssl", "genpkey", "-algorithm", algorithm[0], "-pkeyopt", algorithm[1]).Output()
			if err != nil {
				t.Fatal(err)
			}
			// Another file, as in a Secret: the cache knows one by inode and second.
			path := filepath.Join(s.dir, "tls", "tls.key")
			if err := os.WriteFile(path+".new", out, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".new", path); err != nil {
				t.Fatal(err)
			}
			before := len(readFile(t, filepath.Join(s.dir, "stderr")))
			err = until(func() error { // ssl_certificate_cache has the old pair for a second
				if got, err := probe.Get("http://" + host + "/readyz"); err != nil || got.StatusCode != 502 {
					return fmt.Errorf("readyz: %v %v, want 502", got, err)
				}
				return nil
			})
			if log := readFile(t, filepath.Join(s.dir, "stderr"))[before:]; err != nil || !bytes.Contains(log, []byte("[error]")) || !bytes.Contains(log, []byte("SSL")) {
				t.Errorf("%v; log: %s", err, log)
			}
			wantAnswer(t, s.client(t, s.plain), "http://"+host+"/healthz", 200, "ok\n", nil)
			echo(t, ws, []byte("goes on"))
		})
	}
	s.makeCertificate(t)
	err := until(func() error {
		res, err := probe.Get("http://" + host + "/readyz")
		if err != nil || res.StatusCode != 200 {
			return fmt.Errorf("readyz: %v %v, want 200", res, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// Where nginx has it, a certificate is parsed once, and tickets are on; an older
// one starts without, and gives no ticket to who asks for one.
func TestStart(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	version, err := exec.Command(program(), "-v").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	var minor, patch int
	_, number, _ := strings.Cut(string(version), "nginx/")
	if _, err := fmt.Sscanf(number, "1.%d.%d", &minor, &patch); err != nil {
		t.Fatalf("%s: %v", version, err)
	}
	tickets, want := minor > 27 || minor == 27 && patch >= 4, ""
	if tickets {
		want = "ssl_certificate_cache max=4 valid=1s;\nssl_session_tickets on;\n" +
			"proxy_pass_trailers on;\n"
	}
	if got := readFile(t, filepath.Join(s.dir, "tmp", "nginx-known.conf")); string(got) != want {
		t.Errorf("%s knows %q, want %q", version, got, want)
	}
	if got := s.givesTicket(t); got != tickets {
		t.Errorf("%s gives a ticket: %t, want %t", version, got, tickets)
	}
	// Without these lines there are none.
	if err := os.Truncate(filepath.Join(s.dir, "tmp", "nginx-known.conf"), 0); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(s.master, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	err = until(func() error {
		if s.givesTicket(t) {
			return fmt.Errorf("%s gives a ticket that nobody has asked for", version)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// givesTicket asks for a session ticket as a client with TLS 1.2 does: in 1.3 it
// may be no more than a name in the server's cache.
func (s *sidecar) givesTicket(t *testing.T) bool {
	t.Helper()
	cmd := exec.Command("openssl", "s_client", "-tls1_2", "-connect", s.secure, "-servername", host)
	out, err := cmd.CombinedOutput() // with nothing to send it ends after the handshake
	if err != nil || !bytes.Contains(out, []byte("Cipher")) {
		t.Fatalf("openssl s_client: %v\n%s", err, out)
	}
	return bytes.Contains(out, []byte("TLS session ticket:"))
}

// serial is the number of the certificate that a new connection gets.
func serial(t *testing.T, s *sidecar) string {
	t.Helper()
	conn, err := tls.Dial("tcp", s.secure, s.tlsConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

// One line for each WebSocket that ended and for each refusal, without the
// query; none for the page and the probe.
func TestAccessLog(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	wantAnswer(t, s.client(t, s.plain), "http://"+host+"/healthz", 200, "", nil)
	wantAnswer(t, s.client(t, s.secure), "https://"+host+"/", 200, "", nil)
	wantAnswer(t, s.client(t, s.secure), "https://"+host+"/ws/busy?token=secret", 503, "", nil)
	ws := s.dial(t, "/ws/ns-01?token=secret", nil)
	echo(t, ws, bytes.Repeat([]byte("x"), 50_000))
	ws.Close()
	s.logged(t, regexp.MustCompile(`^time=\S+ client=127\.0\.0\.1 host="www\.mydomain\.com" uri="/ws/busy" status=503 upstream="503" .*
time=\S+ client=127\.0\.0\.1 host="www\.mydomain\.com:8443" uri="/ws/ns-01" status=101 upstream="101" seconds=\d+\.\d+ in=5\d{4} out=5\d{4} agent="[^"]*"
$`))
}

const fields = "Host: " + host + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// Lines as long as the router allows for a whole head arrive there. What is
// longer, and what is malformed, nginx refuses, and says so in the log.
func TestLargeRequests(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	line := func(size int) string { return strings.Repeat("x", size) }
	tests := map[string]struct {
		request string
		status  int
		log     string // a line, or none
	}{
		"a cookie of 9,000":    {"GET /ws/a HTTP/1.1\r\nCookie: " + line(9000) + "\r\n" + fields, 101, ""},
		"a cookie of 16,000":   {"GET /ws/b HTTP/1.1\r\nCookie: " + line(16_000) + "\r\n" + fields, 101, ""},
		"ten of 1,500":         {"GET /ws/c HTTP/1.1\r\n" + strings.Repeat("Cookie: "+line(1500)+"\r\n", 10) + fields, 101, ""},
		"a query of 16,000":    {"GET /ws/d?" + line(16_000) + " HTTP/1.1\r\n" + fields, 101, ""},
		"a cookie of 17,000":   {"GET /ws/e HTTP/1.1\r\nCookie: " + line(17_000) + "\r\n" + fields, 431, `uri="/ws/e" status=431 upstream="-"`},
		"forty of 1,500":       {"GET /ws/f HTTP/1.1\r\n" + strings.Repeat("Cookie: "+line(1500)+"\r\n", 40) + fields, 431, `uri="/ws/f" status=431 upstream="-"`},
		"a query of 17,000":    {"GET /ws/g?" + line(17_000) + " HTTP/1.1\r\n" + fields, 414, `uri="-" status=414 upstream="-"`},
		"two hosts":            {"GET /ws/h HTTP/1.1\r\nHost: a\r\n" + fields, 400, `uri="/ws/h" status=400 upstream="-"`},
		"a control in a field": {"GET /ws/i HTTP/1.1\r\nX: \x00\r\n" + fields, 400, `uri="/ws/i" status=400 upstream="-"`},
		"not HTTP":             {"\x01\r\n", 400, `uri="-" status=400 upstream="-"`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if res := s.request(t, test.request+"\r\n"); res.StatusCode != test.status {
				t.Errorf("status %d, want %d", res.StatusCode, test.status)
			}
			if test.log != "" {
				s.logged(t, regexp.MustCompile(`(?m)^time=.* `+test.log))
			}
		})
	}
}

// The head of an answer may be as large as the router lets it be. One that is
// larger than what a WebSocket has for its life is asked for again.
func TestLargeAnswers(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	tests := map[string]struct {
		method, target string
		status, asked  int
	}{
		"a small redirect":             {"GET", "/ws/%61?has=2000&redirect", 302, 1},
		"a redirect":                   {"GET", "/ws/%61?has=8000&redirect", 302, 2},
		"a large redirect":             {"GET", "/ws/%61?has=15000&redirect", 302, 2},
		"a WebSocket":                  {"GET", "/ws/%61?has=8000", 101, 2},
		"too large":                    {"GET", "/ws/%61?has=17000&redirect", 502, 2},
		"POST is not asked for again":  {"POST", "/ws/%61?has=8000&redirect", 502, 1},
		"neither is what is no answer": {"GET", "/ws/busy?has=2000", 503, 1},
		"nor what is cut":              {"GET", "/ws/%61?says=HTTP/1.1%20101%20Switching%20Protocols%0D%0AUpgrade:%20webs", 502, 1},
		"nor what is no HTTP":          {"GET", "/ws/%61?says=HTTP/1.1%20101%20Switching%20Protocols%0D%0A%00:%20x%0D%0A%0D%0A", 502, 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			before := s.router.count()
			res := s.request(t, test.method+" "+test.target+" HTTP/1.1\r\n"+fields+"\r\n")
			if asked := s.router.count() - before; res.StatusCode != test.status || asked != test.asked {
				t.Errorf("status %d, the router was asked %d times, want %d and %d", res.StatusCode, asked, test.status, test.asked)
			}
			size, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(test.target, "/ws/%61?has="), "&redirect"))
			if got := len(res.Header["Set-Cookie"]); res.StatusCode < 500 && got != (size+999)/1000 {
				t.Errorf("%d cookies of %d bytes", got, size)
			}
			if got := s.router.seen(); got.RequestURI != test.target || got.Host != host {
				t.Errorf("the router was asked for %s of %s", got.RequestURI, got.Host)
			}
		})
	}
}

// Every name that a field may have (RFC 9110 §5.6.2) arrives.
func TestFieldNames(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	res := s.request(t, "GET /ws/ns-01 HTTP/1.1\r\napi_key: 1\r\na.b: 2\r\nX_Forwarded_For: 192.0.2.1\r\n!#$%&'*+-.^_`|~: 3\r\n"+fields+"\r\n")
	if res.StatusCode != 101 {
		t.Errorf("status %d, want 101", res.StatusCode)
	}
	got := s.router.seen().Header
	for name, want := range map[string]string{
		"Api_key": "1", "A.b": "2", "!#$%&'*+-.^_`|~": "3", "X-Forwarded-For": "127.0.0.1", "X_forwarded_for": "192.0.2.1",
	} {
		if got := strings.Join(got[name], "|"); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// The authority of a target comes before Host (RFC 9112 §3.2.2), with its port.
func TestHost(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	rest := strings.TrimPrefix(fields, "Host: "+host+"\r\n")
	tests := map[string]struct{ request, host, target string }{
		"of the field":                  {"GET /ws/a HTTP/1.1\r\nHost: a.example:8443\r\n", "a.example:8443", "/ws/a"},
		"as it was sent":                {"GET /ws/a HTTP/1.1\r\nHost: A.example\r\n", "A.example", "/ws/a"},
		"of the target":                 {"GET http://real.example/ws/a HTTP/1.1\r\nHost: other.example:1\r\n", "real.example", "/ws/a"},
		"with a port":                   {"GET https://real.example:8443/ws/a?b=://c/ HTTP/1.1\r\nHost: other.example\r\n", "real.example:8443", "/ws/a?b=://c/"},
		"of a WebSocket's target":       {"GET wss://Real.example/ws/a HTTP/1.1\r\nHost: other.example\r\n", "Real.example", "/ws/a"},
		"an address":                    {"GET http://[::1]:80/ws/a HTTP/1.1\r\nHost: other.example\r\n", "[::1]:80", "/ws/a"},
		"one in the query is no target": {"GET /ws/a?http://b.example/ HTTP/1.1\r\nHost: a.example\r\n", "a.example", "/ws/a?http://b.example/"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			res := s.request(t, test.request+rest+"\r\n")
			if got := s.router.seen(); res.StatusCode != 101 || got.Host != test.host || got.RequestURI != test.target || got.Header.Get("X-Forwarded-Host") != test.host {
				t.Errorf("status %d, Host %q, X-Forwarded-Host %q, target %q, want %q and %q",
					res.StatusCode, got.Host, got.Header.Get("X-Forwarded-Host"), got.RequestURI, test.host, test.target)
			}
		})
	}
}

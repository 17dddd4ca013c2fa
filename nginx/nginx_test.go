//go:build unix

// Package nginx_test runs the real nginx with this folder's nginx.conf in
// front of a stub in the router's place.
package nginx_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
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
	// Who may not raise the limit of open files is told so, and goes on.
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
	page := string(readFile(t, "index.html"))
	tests := map[string]struct {
		url    string
		status int
		body   string
		header map[string]string
	}{
		"probe":                {"http://" + host + "/healthz", 200, "ok\n", nil},
		"http is redirected":   {"http://" + host + "/ws/ns-01?a=b%2Fc", 301, "", map[string]string{"Location": "https://" + host + "/ws/ns-01?a=b%2Fc"}},
		"page":                 {"https://" + host + "/", 200, page, map[string]string{"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache", "Server": "nginx"}},
		"page by its name":     {"https://" + host + "/index.html", 404, "not found\n", nil},
		"unknown path":         {"https://" + host + "/wsx", 404, "not found\n", nil},
		"healthz is for plain": {"https://" + host + "/healthz", 404, "not found\n", nil},
		"router's 503":         {"https://" + host + "/ws/busy", 503, "busy\n", map[string]string{"Retry-After": "7"}},
		"router's 426":         {"https://" + host + "/ws/ns-01", 426, "not an upgrade\n", map[string]string{"Upgrade": "websocket"}},
		"path without slash":   {"https://" + host + "/ws", 426, "not an upgrade\n", nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			address := s.plain
			if strings.HasPrefix(test.url, "https:") {
				address = s.secure
			}
			wantAnswer(t, s.client(t, address), test.url, test.status, test.body, test.header)
		})
	}
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

// A client is told to come back, and not on this connection: where it leads there
// will be no router.
func TestRouterIsGone(t *testing.T) {
	s := start(t)
	if s == nil {
		return
	}
	s.router.server.Close()
	client, url := s.client(t, s.secure), "https://"+host+"/ws/ns-01"
	wantAnswer(t, client, url, 502,
		"no answer from the router, or one with a head of more than 4 KiB\n", map[string]string{"Retry-After": "1"})
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
	if r.Header.Get("Upgrade") != "" || !r.Close || r.Host != host {
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
	if after := serial(t, s); after == before {
		t.Errorf("certificate %s is still served", after)
	}
	echo(t, old, []byte("after"))
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
	want := regexp.MustCompile(`^time=\S+ client=127\.0\.0\.1 host="www\.mydomain\.com" uri="/ws/busy" status=503 upstream=503 .*
time=\S+ client=127\.0\.0\.1 host="www\.mydomain\.com:8443" uri="/ws/ns-01" status=101 upstream=101 seconds=\d+\.\d+ in=5\d{4} out=5\d{4} agent="[^"]*"
$`)
	var got []byte
	err := until(func() error {
		if got = readFile(t, filepath.Join(s.dir, "stdout")); !want.Match(got) {
			return errors.New("the log has other lines")
		}
		return nil
	})
	if err != nil {
		t.Errorf("%v:\n%s", err, got)
	}
}

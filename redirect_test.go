package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// startRedirect serves a redirect beside the proxy.
func startRedirect(t testing.TB, p *testProxy) (addr string) {
	t.Helper()
	l := listenLocal(t)
	r, err := newRedirect(p.proxy, l, wideDescriptorLimit(t))
	must(t, err)
	var serving sync.WaitGroup
	serving.Go(r.serve)
	t.Cleanup(serving.Wait)
	t.Cleanup(r.close)
	return l.Addr().String()
}

// askPlain sends the bytes and returns the answer, with its body read.
func askPlain(t testing.TB, addr, request string) (resp *http.Response, body string) {
	t.Helper()
	conn := dial(t, addr)
	mustWrite(t, conn, request)
	return readPlain(t, conn, strings.Fields(request + " -")[0])
}

// readPlain reads an answer to a request with the method.
func readPlain(t testing.TB, conn net.Conn, method string) (resp *http.Response, body string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(2 * patience))
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	must(t, err)
	b, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp, string(b)
}

// TestRedirect: each request that has a host goes to https there, with its path and query.
func TestRedirect(t *testing.T) {
	addr := startRedirect(t, startProxy(t, []string{refusingAddr(t)}, nil, nil))
	for request, location := range map[string]string{
		"GET / HTTP/1.1\r\nHost: a.test":                                                       "https://a.test/",
		"GET /ws/ns-01?a=b&c HTTP/1.1\r\nHost: a.test:80":                                      "https://a.test/ws/ns-01?a=b&c",
		"GET /? HTTP/1.1\r\nHost: A.Test.":                                                     "https://A.Test./?",
		"HEAD /a HTTP/1.1\r\nHost: a_b.test:8080":                                              "https://a_b.test/a",
		"POST /a HTTP/1.1\r\nHost: 10.0.0.1\r\nContent-Length: 3\r\n\r\nabc":                   "https://10.0.0.1/a",
		"PUT /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked":                             "https://a/a",
		"GET /a HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade":              "https://a/a",
		"GET /a HTTP/1.0\r\nHost: a":                                                           "https://a/a",
		"GET /a HTTP/1.1\r\nHost: [2001:db8::1]:80":                                            "https://[2001:db8::1]/a",
		"GET /a HTTP/1.1\r\nHost: [::1]":                                                       "https://[::1]/a",
		"GET http://b.test:80/a?b HTTP/1.1\r\nHost: a.test":                                    "https://b.test/a?b",
		"GET //evil.test/a HTTP/1.1\r\nHost: a.test":                                           "https://a.test//evil.test/a",
		"GET /%2e%2E/%0d%0aX: HTTP/1.1\r\nHost: a.test":                                        "https://a.test/%2e%2E/%0d%0aX:",
		"GET /\"<a>\\^`{|}?\"<a>\\^`{|}#b\xc3\xbc HTTP/1.1\r\nHost: a.test":                    "https://a.test/%22%3Ca%3E%5C%5E%60%7B%7C%7D?%22%3Ca%3E%5C%5E%60%7B%7C%7D%23b%C3%BC",
		"GET /Z\xc3\xbcrich HTTP/1.1\r\nHost: a.test":                                          "https://a.test/Z%C3%BCrich",
		"GET /healthz/ HTTP/1.1\r\nHost: a.test":                                               "https://a.test/healthz/",
		"POST /healthz HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0":                          "https://a.test/healthz",
		"GET /" + strings.Repeat("a", 7000) + " HTTP/1.1\r\nHost: a.test":                      "https://a.test/" + strings.Repeat("a", 7000),
		"GET / HTTP/1.1\r\nHost: " + strings.Repeat(strings.Repeat("a", 49)+".", 5) + ":00080": "https://" + strings.Repeat(strings.Repeat("a", 49)+".", 5) + "/",
	} {
		resp, body := askPlain(t, addr, request+"\r\n\r\n")
		if got := resp.Header.Get("Location"); resp.StatusCode != http.StatusPermanentRedirect || got != location || body != "" {
			t.Errorf("%.200q: %d to %q with %q, want 308 to %q", request, resp.StatusCode, got, body, location)
		}
		if _, err := url.Parse(location); err != nil {
			t.Error(err)
		}
	}
}

// TestRedirectRefuses: a request that has no host, or is none, goes nowhere.
func TestRedirectRefuses(t *testing.T) {
	addr := startRedirect(t, startProxy(t, []string{refusingAddr(t)}, nil, nil))
	long := strings.Repeat("a", 64)
	for _, host := range []string{"", "a b", "a/b", "a@b", "a.test:80a", "a.test:65536", "a.test:-1", "a.test:80:80", "::1", "[::1", "[::1]a", "[::1]]",
		"[fe80::1%25eth0]", "[fe80::1%eth0]", "[10.0.0.1]", "[]", ".", "..", "a..b", ".a", "-a", "a.test..", "a%2eb", "a\xc3\xbc", "a,b", "a?b", "a#b", `a\b`,
		long, strings.Repeat(long[:63]+".", 4)} {
		resp, body := askPlain(t, addr, "GET /a HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
		if resp.StatusCode != http.StatusBadRequest || resp.Header.Get("Location") != "" || body == "" {
			t.Errorf("host %q: %d to %q with %q, want 400", host, resp.StatusCode, resp.Header.Get("Location"), body)
		}
	}
	for request, status := range map[string]int{
		"GET /a HTTP/1.0":                                                 400,
		"GET /a HTTP/1.1":                                                 400,
		"GET /a HTTP/1.1\r\nHost: a\r\nHost: b":                           400,
		"OPTIONS * HTTP/1.1\r\nHost: a":                                   400,
		"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test":                     400,
		"GET http:a HTTP/1.1\r\nHost: a":                                  400,
		"\x16\x03\x01\x00\x05hello":                                       400,
		"GET /a HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 13<<10): 431,
		"GET /" + strings.Repeat("a", 13<<10) + " HTTP/1.1\r\nHost: a":    431,
	} {
		resp, _ := askPlain(t, addr, request+"\r\n\r\n")
		if resp.StatusCode != status || resp.Header.Get("Location") != "" || !resp.Close {
			t.Errorf("%.60q: %d to %q, closed %v, want %d", request, resp.StatusCode, resp.Header.Get("Location"), resp.Close, status)
		}
	}
}

// TestRedirectHealth: a load balancer gets the same answers as on the client listener.
func TestRedirectHealth(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, nil, nil)
	addr := startRedirect(t, p)
	check := func(request string, status int, body string, closes bool) {
		t.Helper()
		resp, got := askPlain(t, addr, request+"\r\n\r\n")
		if resp.StatusCode != status || got != body || resp.Close != closes || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%q: %d %q, closed %v, want %d %q, %v", request, resp.StatusCode, got, resp.Close, status, body, closes)
		}
	}
	check("GET /healthz HTTP/1.1\r\nHost: 10.0.0.1", 503, "not ready\n", false)
	p.tables.update(sourceContent{id: sourceID{name: "test"}, version: "41", overrides: newOverrideSet(nil)})
	check("GET /healthz HTTP/1.1\r\nHost: 10.0.0.1", 200, "ok\n", false)
	check("GET /healthz HTTP/1.1\r\nHost: nonsense:a", 200, "ok\n", false)
	check("HEAD /healthz HTTP/1.1\r\nHost: a", 200, "", false)
	p.draining.Store(true)
	check("GET /healthz HTTP/1.1\r\nHost: 10.0.0.1", 503, "not ready\n", true)
	resp, _ := askPlain(t, addr, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
	if resp.StatusCode != http.StatusPermanentRedirect || !resp.Close {
		t.Errorf("%d, closed %v, while the router drains, want 308 and the end", resp.StatusCode, resp.Close)
	}
}

// TestRedirectSlowClients: clients that send nothing, or half a head, keep nobody out, and
// are cut.
func TestRedirectSlowClients(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, nil, func(p *proxy) { p.limits.headerTimeout = 2 * time.Second })
	addr := startRedirect(t, p)
	var slow []net.Conn
	for i := range 2 * maxRedirectConns {
		conn := dial(t, addr)
		mustWrite(t, conn, "GET /a HTTP/1.1\r\nHost: a\r\n"[:i%20])
		slow = append(slow, conn)
	}
	resp, _ := askPlain(t, addr, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
	wantEqual(t, "the status", resp.StatusCode, http.StatusPermanentRedirect)
	for _, conn := range slow {
		conn.SetReadDeadline(time.Now().Add(2 * patience))
		if _, err := io.Copy(io.Discard, conn); os.IsTimeout(err) {
			t.Error("a slow client was not cut")
		}
	}
}

// TestRedirectProxyProtocol: a load balancer may send headers of the PROXY protocol here too.
func TestRedirectProxyProtocol(t *testing.T) {
	trusted := &trustedProxies{}
	must(t, trusted.Set("127.0.0.1"))
	p := startProxy(t, []string{refusingAddr(t)}, nil, func(p *proxy) {
		p.proxyProtocol = &proxyProtocol{trusted: trusted, log: p.log}
	})
	addr := startRedirect(t, p)
	for header, status := range map[string]int{"PROXY TCP4 198.51.100.7 203.0.113.1 1234 80\r\n": 308, "": 400} {
		resp, _ := askPlain(t, addr, header+"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
		wantEqual(t, fmt.Sprintf("the status after %q", header), resp.StatusCode, status)
	}
}

// failingListener fails a number of times before it accepts.
type failingListener struct {
	net.Listener
	failures int
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, io.ErrUnexpectedEOF
	}
	return l.Listener.Accept()
}

// TestRedirectAcceptFails: an error of accept does not end the listener, which close does.
func TestRedirectAcceptFails(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, nil, nil)
	l := listenLocal(t)
	r, err := newRedirect(p.proxy, &failingListener{Listener: l, failures: 3}, wideDescriptorLimit(t))
	must(t, err)
	done := make(chan struct{})
	go func() { defer close(done); r.serve() }()
	resp, _ := askPlain(t, l.Addr().String(), "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
	wantEqual(t, "the status", resp.StatusCode, http.StatusPermanentRedirect)
	wantLine(t, p.tail.all("cannot accept connections"), 1, map[string]any{"listener": "-redirect"})
	r.close()
	<-done
	if conn, err := net.Dial("tcp", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("the listener is open")
	}
}

// TestRedirectDescriptors: its connections come out of the limit of open files.
func TestRedirectDescriptors(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, nil, nil)
	least := internalDescriptors(1) + maxRedirectConns + descriptorsPerClient
	for files, ok := range map[int]bool{least: true, least - 1: false} {
		limit, err := newDescriptorLimit(files, 1, 1<<20, 1)
		must(t, err)
		_, err = newRedirect(p.proxy, listenLocal(t), limit)
		want := fmt.Sprintf("-redirect: the limit of open files must be at least %d (got %d; ulimit -n)", least, files)
		if ok != (err == nil) || err != nil && err.Error() != want {
			t.Errorf("error with %d files: %v, want %q, if any", files, err, want)
		}
	}
}

// TestRedirectOfTheRouter: the whole router has the redirect, and TLS on -listen.
func TestRedirectOfTheRouter(t *testing.T) {
	ca := newTestCA(t, "ca")
	secret := newMountedSecret(t, ca.sign(t, nil, nil, "a.test"))
	r := startRouter(t, "-backends", echoBackends(t, 1), "-kube", "none", "-tls-cert", secret.path, "-redirect", "127.0.0.1:0",
		"-drain-delay", "2s")
	addr := r.log.wait(t, "redirecting clients without TLS", 1)["listen"].(string)
	eventually(t, "the health", 200, func() int {
		resp, _ := askPlain(t, addr, "GET /healthz HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n")
		return resp.StatusCode
	})
	resp, _ := askPlain(t, addr, "GET /ws/ns-01 HTTP/1.1\r\nHost: a.test\r\n\r\n")
	wantEqual(t, "the place", resp.Header.Get("Location"), "https://a.test/ws/ns-01")
	if _, body := r.get(t, "/metrics"); !strings.Contains(body, "router_tls_file_rejected{file=") {
		t.Error("/metrics lacks the certificate")
	}
	var stopped sync.WaitGroup
	stopped.Go(r.stop)
	r.log.wait(t, "draining", 1)
	resp, _ = askPlain(t, addr, "GET /healthz HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n")
	wantEqual(t, "the health while the router drains", resp.StatusCode, 503)
	stopped.Wait()
	if conn, err := net.Dial("tcp", addr); err == nil {
		conn.Close()
		t.Error("the listener is open after the end")
	}
}

// TestCertificatesOfTheRouter: what is wrong with the files ends the router with 1.
func TestCertificatesOfTheRouter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none")
	err := run(t.Context(), []string{"-replicas", "1", "-kube", "none", "-tls-cert", path, "-tls-key", path}, noEnvironment, io.Discard)
	if err == nil || err.Error() != "-tls-cert "+path+": "+path+": no such file or directory" || exitCode(err) != 1 {
		t.Errorf("error %v with exit code %d", err, exitCode(err))
	}
}

// FuzzRedirect: whatever the host and the target are, the client goes to https at this host
// or nowhere.
func FuzzRedirect(f *testing.F) {
	f.Add("a.test:80", "/a?b")
	f.Add("[::1]", "//b.test/")
	f.Fuzz(func(t *testing.T, field, target string) {
		host, ok := redirectHost(field)
		if !ok {
			return
		}
		location := "https://" + host + escapeTarget("/"+target)
		u, err := url.Parse("https://" + host + "/")
		if err != nil || u.Host != host || u.User != nil || u.Port() != "" || u.Path != "/" || !strings.HasPrefix(field, host) {
			t.Errorf("host %q of %q: %v, %v", host, field, u, err)
		}
		if i := bytes.IndexFunc([]byte(location), func(c rune) bool { return c <= ' ' || c > '~' }); i >= 0 || strings.Contains(location, "#") {
			t.Errorf("target %q is %q", target, location)
		}
	})
}

package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"weak"
)

// plainBackend is an HTTP server. It has the heads and lengths of all requests.
type plainBackend struct {
	addr  string
	conns atomic.Int64 // that it has accepted
	asked atomic.Int64 // requests
}

// startPlain starts a backend that answers with handle.
func startPlain(t testing.TB, handle http.HandlerFunc) *plainBackend {
	t.Helper()
	b := &plainBackend{}
	s := httptest.NewUnstartedServer(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			b.asked.Add(1)
			handle(w, r)
		}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			b.conns.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	b.addr = s.Listener.Addr().String()
	return b
}

// plainClient is a client with a transport of its own.
func plainClient(t testing.TB) *http.Client {
	t.Helper()
	transport := &http.Transport{DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 2 * patience}
}

// do sends a request to the proxy and reads the whole answer.
func (p *testProxy) do(
	t testing.TB, client *http.Client, method, path, body string,
) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+p.addr+path,
		strings.NewReader(body))
	must(t, err)
	resp, err := client.Do(r)
	must(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp, string(text)
}

// waitForwarded waits until n plain requests had this result, and none is in progress.
func (p *testProxy) waitForwarded(t testing.TB, want result, n int64) {
	t.Helper()
	eventually(t, fmt.Sprintf("plain requests with result %v", want), n, func() int64 {
		if p.forwarder.running.size() > 0 {
			return -1
		}
		return p.forwarder.results[want].Load()
	})
}

// noFlights waits until no request is in flight, and nothing is counted any more.
func (p *testProxy) noFlights(t testing.TB) {
	t.Helper()
	eventually(t, "flights", false, func() bool {
		return p.mover.flights.any(func(*flight) bool { return true })
	})
	eventually(t, "requests that are counted", 0, func() int {
		return p.underWay() + p.forwarder.size() + p.headBytes()
	})
}

func TestForward(t *testing.T) {
	backend := startPlain(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %d %q", r.Method, r.RequestURI, len(body), r.Header["Te"])
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	client := plainClient(t)
	for _, method := range []string{"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} {
		for _, size := range []int{0, 5, maxShortBody, maxShortBody + 1, 1 << 20} {
			resp, text := p.do(t, client, method, "/ws/ns-01/x?q", strings.Repeat("x", size))
			want := fmt.Sprintf("%s /ws/ns-01/x?q %d []", method, size)
			if resp.StatusCode != 200 || text != want {
				t.Errorf("%s of %d: %s %q, want %q", method, size, resp.Status, text, want)
			}
		}
	}
	if n := backend.conns.Load(); n != 1 {
		t.Errorf("%d connections to the backend, want 1", n)
	}
	p.waitForwarded(t, resultOK, 30)
	p.noFlights(t)
}

// plainRequest is a GET of path as a client sends it.
func plainRequest(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: www.mydomain.com\r\n\r\n"
}

// Answers after which the backend keeps the connection, or closes it.
const (
	kept = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	fine = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
)

// keeping returns a backend that gives the answer to each request on a connection.
func keeping(text string) func(net.Conn, *bufio.Reader) {
	return func(conn net.Conn, br *bufio.Reader) {
		for err := error(nil); err == nil; _, err = readHead(br) {
			io.WriteString(conn, text)
		}
	}
}

// The owner sees the target as it was sent, byte for byte.
func TestForwardTarget(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(fine))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	for i, target := range []string{
		"/ws/ns-01", "/ws/ns-01/", "/ws/ns-01//x", "/ws/ns-01/a%2Fb%2fc", "/ws/ns-01/%7E~%41",
		"/ws/ns-01/a;p=1;q", "/ws/ns-01?", "/ws/ns-01?a=%zz&b;c?d", "/ws/ns-01/|{}\"<>^`?|{}",
		"/ws/ns-01/caf\xc3\xa9?\xff", "/ws/ns-01/a+b%20c", "/ws/ns-01/x?q=../..",
	} {
		_, _, resp := p.ask(t, plainRequest(target))
		want := "GET " + target + " HTTP/1.1\r\nHost: www.mydomain.com\r\n"
		if got := backend.heads(); len(got) != i+1 || !strings.HasPrefix(got[i], want) {
			t.Fatalf("%q: %s, the backend got %q", target, resp.Status, got[i:])
		}
	}
	p.ask(t, "GET http://other.example/ws/ns-01//x?%41 HTTP/1.1\r\nHost: h\r\n\r\n")
	heads := backend.heads()
	want := "GET /ws/ns-01//x?%41 HTTP/1.1\r\nHost: other.example\r\n"
	if got := heads[len(heads)-1]; !strings.HasPrefix(got, want) {
		t.Errorf("absolute form: the backend got %q", got)
	}
}

func TestForwardHeaders(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(fine))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	p.ask(t, "POST /ws/ns-01 HTTP/1.1\r\nhost: h:8443\r\nConnection: close, X-Secret, Content-Length\r\n"+
		"Keep-Alive: 5\r\nProxy-Connection: keep-alive\r\nTE: gzip, trailers\r\nCookie: a=b\r\n"+
		"X-Secret: hop\r\nX-Forwarded-For: 203.0.113.9\r\nX-Forwarded-Proto: https\r\n"+
		"X-Real-IP: 203.0.113.66\r\nForwarded: for=203.0.113.66\r\nExpect: 100-continue\r\n"+
		"Content-Length: 2\r\nContent_Length: 7\r\nTransfer_Encoding: chunked\r\n"+
		"X-Router-Pod: forged\r\nX-Router-Table: forged\r\nX-Router-Step: 7\r\n"+
		"x_router_pod: forged\r\nX-Router-Backend: backend-7\r\n\r\nhi")
	want := "POST /ws/ns-01 HTTP/1.1\r\nHost: h:8443\r\nContent-Length: 2\r\nCookie: a=b\r\n" +
		"Te: trailers\r\nX-Forwarded-For: 203.0.113.9, 127.0.0.1\r\nX-Forwarded-Host: h:8443\r\n" +
		"X-Forwarded-Proto: https\r\nX-Router-Backend: backend-0\r\nX-Router-Pod: router-x\r\n" +
		"X-Router-Table: " + p.tables.table().stamp + "\r\n" +
		fmt.Sprintf("X-Router-Step: %d\r\n\r\n", p.mover.assignmentOf("ns-01").step)
	eventually(t, "requests", 1, func() int { return len(backend.heads()) }) // 100 comes before
	if got := backend.heads()[0]; sortedHead(got) != sortedHead(want) {
		t.Errorf("the backend got\n%s\nwant\n%s", got, want)
	}
}

func TestForwardRefuses(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(fine))
	h2c := "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n"
	for name, tt := range map[string]struct {
		request string
		status  int
		off     bool
	}{
		"no namespace":     {plainRequest("/other"), 404, false},
		"root":             {plainRequest("/"), 404, false},
		"asterisk":         {"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", 404, false},
		"empty":            {plainRequest("/ws/"), 404, false},
		"dot segment":      {plainRequest("/ws/ns-01/..%2fns-02"), 400, false},
		"TRACE":            {strings.Replace(plainRequest("/ws/ns-01"), "GET", "TRACE", 1), 400, false},
		"CONNECT":          {"CONNECT ns-01:80 HTTP/1.1\r\nHost: ns-01:80\r\n\r\n", 404, false},
		"h2c":              {"GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\n" + h2c, 426, false},
		"a key alone":      {"GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\nSec-WebSocket-Key: x\r\n\r\n", 426, false},
		"connection alone": {"GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\n\r\n", 426, false},
		"off":              {plainRequest("/ws/ns-01"), 426, true},
		"off, with a body": {"POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi", 426, true},
		"off, HTTP/1.0":    {"GET /ws/ns-01 HTTP/1.0\r\nHost: h\r\n\r\n", 426, true},
		"unresolved":       {plainRequest("/ws/bad"), 503, false},
		"two lengths": {"POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n" +
			"Content-Length: 2\r\n\r\nhi", 400, false},
	} {
		t.Run(name, func(t *testing.T) {
			data := map[string]string{"bad": "bakend-0"}
			p := startProxy(t, []string{backend.addr}, data, func(p *proxy) {
				if tt.off {
					p.forwarder = nil
				}
			})
			_, _, resp := p.ask(t, tt.request)
			if resp.StatusCode != tt.status || (resp.Header.Get("Retry-After") == "1") != (tt.status == 503) {
				t.Errorf("%s %v, want %d", resp.Status, resp.Header, tt.status)
			}
		})
	}
	if heads := backend.heads(); len(heads) > 0 {
		t.Errorf("the backend was asked: %q", heads)
	}
}

// smugglers are requests that two servers could cut at different places. What follows
// each must not be taken for a request of its own.
func smugglers() map[string]string {
	hidden := "GET /ws/hidden HTTP/1.1\r\nHost: h\r\n\r\n"
	post := "POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\n"
	return map[string]string{
		"both, chunked first":   post + fmt.Sprintf("Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n%s", 5+len(hidden), hidden),
		"both, length first":    post + fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n%s", 5+len(hidden), hidden),
		"HTTP/1.0 chunked":      "POST /ws/ns-01 HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + hidden,
		"unknown coding":        post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + hidden,
		"chunked twice":         post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"obscured coding":       post + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + hidden,
		"space before colon":    post + "Content-Length : 0\r\n\r\n" + hidden,
		"signed length":         post + "Content-Length: +0\r\n\r\n" + hidden,
		"two lengths":           post + fmt.Sprintf("Content-Length: 0\r\nContent-Length: %d\r\n\r\n%s", len(hidden), hidden),
		"a list of lengths":     post + fmt.Sprintf("Content-Length: 0, %d\r\n\r\n%s", len(hidden), hidden),
		"length in hexadecimal": post + "Content-Length: 0x0\r\n\r\n" + hidden,
		"bad chunk":             post + "Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + hidden,
		"chunk without end":     post + "Transfer-Encoding: chunked\r\n\r\n2\r\nhiX\r\n0\r\n\r\n" + hidden,
	}
}

// No backend gets a request that hides behind another one, and each request that it gets
// has one length.
func TestForwardSmuggling(t *testing.T) {
	for name, request := range smugglers() {
		t.Run(name, func(t *testing.T) {
			var hidden, conflict atomic.Bool
			backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
				rest, _ := io.ReadAll(io.MultiReader(br))
				hidden.Store(strings.Contains(string(rest), "/ws/hidden"))
			})
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			conn := dial(t, p.addr)
			mustWrite(t, conn, request)
			conn.(*net.TCPConn).CloseWrite()
			conn.SetReadDeadline(time.Now().Add(patience))
			io.Copy(io.Discard, conn)
			p.noFlights(t)
			for _, head := range backend.heads() {
				lengths := strings.Count(head, "Content-Length:") + strings.Count(head, "Transfer-Encoding:")
				conflict.Store(conflict.Load() || lengths > 1)
				hidden.Store(hidden.Load() || strings.Contains(head, "/ws/hidden"))
			}
			if hidden.Load() || conflict.Load() {
				t.Errorf("hidden: %t, conflict: %t: %q", hidden.Load(), conflict.Load(), backend.heads())
			}
		})
	}
}

// stream reads the answer's body up to the text.
func readUntil(t testing.TB, body io.Reader, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if n, err := io.ReadFull(body, got); err != nil || string(got) != text {
		t.Fatalf("read %q, %v; want %q", got[:n], err, text)
	}
}

// What the owner sends goes on at once: interim answers, events, trailers; and bodies of
// requests go on while their answers come.
func TestForwardStreams(t *testing.T) {
	step := make(chan string)
	backend := startPlain(t, func(w http.ResponseWriter, r *http.Request) {
		flush := http.NewResponseController(w).Flush
		http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Link", "</a>")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Trailer", "X-Sum")
		w.WriteHeader(200)
		flush()
		for text := range step {
			io.WriteString(w, text)
			flush()
		}
		echo := make([]byte, 5)
		io.ReadFull(r.Body, echo)
		w.Write(echo)
		flush()
		io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Sum", fmt.Sprint("sum of ", r.Trailer))
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn, br, resp := p.ask(t, "POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: X-In\r\n\r\n")
	if resp.StatusCode != 103 || resp.Header.Get("Link") != "</a>" {
		t.Fatalf("%s %v, want 103", resp.Status, resp.Header)
	}
	resp, err := http.ReadResponse(br, nil)
	must(t, err)
	for _, text := range []string{"data: 1\n\n", "data: 2\n\n"} {
		step <- text
		readUntil(t, resp.Body, text)
	}
	close(step)
	mustWrite(t, conn, "5\r\nhello\r\n")
	readUntil(t, resp.Body, "hello")
	mustWrite(t, conn, "0\r\nX-In: 7\r\nX-Router-Pod: forged\r\nX-Client-Subject : CN=forged\r\n\r\n")
	rest, err := io.ReadAll(resp.Body)
	must(t, err)
	if len(rest) > 0 || resp.Trailer.Get("X-Sum") != "sum of map[X-In:[7]]" {
		t.Errorf("the end is %q with %v", rest, resp.Trailer)
	}
	p.waitForwarded(t, resultOK, 1)
	p.noFlights(t)
}

// Answers without a body, and those of HTTP/1.0.
func TestForwardWithoutBody(t *testing.T) {
	backend := startPlain(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Query().Get("s") {
		case "204":
			w.WriteHeader(204)
		case "304":
			w.Header().Set("Etag", `"x"`)
			w.WriteHeader(304)
		default:
			w.Header().Set("Content-Length", "1000")
			if r.Method == "GET" {
				io.WriteString(w, strings.Repeat("x", 1000))
			}
		}
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	client := plainClient(t)
	for range 2 {
		resp, _ := p.do(t, client, "HEAD", "/ws/ns-01", "")
		wantEqual(t, "length of a HEAD", resp.ContentLength, 1000)
		resp, _ = p.do(t, client, "GET", "/ws/ns-01?s=204", "")
		wantEqual(t, "status", resp.StatusCode, 204)
		resp, _ = p.do(t, client, "GET", "/ws/ns-01?s=304", "")
		wantEqual(t, "status and tag", fmt.Sprint(resp.StatusCode, resp.Header.Get("Etag")), `304"x"`)
	}
	wantEqual(t, "connections to the backend", backend.conns.Load(), 1)
	_, br, resp := p.ask(t, "GET /ws/ns-01 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	if len(body) != 1000 || !resp.Close {
		t.Errorf("HTTP/1.0: %d bytes, close %t; want 1000, true", len(body), resp.Close)
	}
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("after an answer to HTTP/1.0: %v, want EOF", err)
	}
}

// A client that expects 100-continue gets it before it sends its body, also if the owner
// answers first.
func TestForwardContinues(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	for _, length := range []string{"Content-Length: 100000", "Transfer-Encoding: chunked"} {
		_, br, resp := p.ask(t, "POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n"+length+"\r\n\r\n")
		if resp.StatusCode == 100 {
			var err error
			resp, err = http.ReadResponse(br, nil)
			must(t, err)
		}
		body, err := io.ReadAll(resp.Body)
		must(t, err)
		if resp.StatusCode != 413 || string(body) != "no" || !resp.Close {
			t.Errorf("%s: %s %q, close %t", length, resp.Status, body, resp.Close)
		}
	}
	p.noFlights(t)
}

// An answer that breaks off is no whole answer to the client.
func TestForwardCutAnswer(t *testing.T) {
	for name, text := range map[string]string{
		"length":  "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", answer(text))
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			_, _, resp := p.ask(t, plainRequest("/ws/ns-01"))
			body, err := io.ReadAll(resp.Body)
			if string(body) != "half" || err == nil {
				t.Errorf("the client got %q and %v, want half and an error", body, err)
			}
			p.waitForwarded(t, resultBrokenOff, 1)
			p.noFlights(t)
		})
	}
	for name, text := range map[string]string{
		"nothing": "", "no head": "HTTP/1.1 200 OK\r\nX", "garbage": "hello\r\n\r\n",
		"switching": switching,
		"long":      "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 20<<10) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) { io.WriteString(conn, text) })
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			_, _, resp := p.ask(t, plainRequest("/ws/ns-01"))
			wantEqual(t, "status", resp.StatusCode, 502)
			p.waitForwarded(t, resultBadGateway, 1)
			wantEqual(t, "requests", len(backend.heads()), 1)
			p.noFlights(t)
		})
	}
}

// A body that breaks off is no whole body to the owner.
func TestForwardCutBody(t *testing.T) {
	for name, request := range map[string]string{
		"length":  "Content-Length: 100000\r\n\r\nhalf",
		"chunked": "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			failed := make(chan error, 1)
			backend := startPlain(t, func(w http.ResponseWriter, r *http.Request) {
				_, err := io.Copy(io.Discard, r.Body)
				failed <- err
			})
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			conn := dial(t, p.addr)
			mustWrite(t, conn, "POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\n"+request)
			eventually(t, "requests", 1, backend.asked.Load)
			conn.Close()
			if err := <-failed; err == nil {
				t.Error("the owner has taken half of a body for the whole")
			}
			p.waitForwarded(t, resultClientGone, 1)
			p.noFlights(t)
		})
	}
}

// A request that was sent is not sent again: a kept connection that the backend closes
// when it has read a second request.
func TestForwardSendsOnce(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, kept)
		readHead(br)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	client := plainClient(t)
	resp, _ := p.do(t, client, "GET", "/ws/ns-01/1", "")
	wantEqual(t, "status", resp.StatusCode, 200)
	resp, _ = p.do(t, client, "GET", "/ws/ns-01/2", "")
	wantEqual(t, "status", resp.StatusCode, 502)
	wantEqual(t, "connections that were asked", len(backend.heads()), 1)
	p.noFlights(t)
}

// A kept connection that the backend has closed, or on which it has sent something, is
// not used. Nor is one to a pod that was replaced, or to one that answered 421.
func TestForwardKeeps(t *testing.T) {
	for name, more := range map[string]string{"closed": "", "data": "HTTP/1.1 200 OK\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			sent := make(chan struct{})
			backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
				io.WriteString(conn, kept)
				io.WriteString(conn, more)
				if more == "" {
					conn.(*net.TCPConn).CloseWrite()
				}
				sent <- struct{}{}
				io.Copy(io.Discard, br)
			})
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			for range 3 {
				resp, _ := p.do(t, plainClient(t), "POST", "/ws/ns-01", "x")
				wantEqual(t, "status", resp.StatusCode, 200)
				<-sent
				eventually(t, "what the backend sends after its answer is there", true, func() bool {
					return !p.forwarder.idle.anySilent()
				})
			}
			wantEqual(t, "connections", len(backend.heads()), 3)
		})
	}
	t.Run("replaced", func(t *testing.T) {
		backend := startStub(t, "127.0.0.1:0", keeping(kept))
		uid := atomic.Pointer[string]{}
		p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
			p.backends.podUID = func(int) string { return *uid.Load() }
			first := "a"
			uid.Store(&first)
		})
		for _, pod := range []string{"a", "a", "b", "b", "a"} {
			uid.Store(&pod)
			p.relay.setPods(map[int]string{0: pod})
			resp, _ := p.do(t, plainClient(t), "GET", "/ws/ns-01", "")
			wantEqual(t, "status", resp.StatusCode, 200)
		}
		wantEqual(t, "connections", len(backend.heads()), 2)
	})
	t.Run("expired", func(t *testing.T) {
		backend := startStub(t, "127.0.0.1:0", keeping(kept))
		p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
		p.do(t, plainClient(t), "GET", "/ws/ns-01", "")
		eventually(t, "kept connections", 0, func() int {
			p.forwarder.idle.mu.Lock()
			defer p.forwarder.idle.mu.Unlock()
			return len(p.forwarder.idle.byPod)
		})
	})
}

// anySilent reports whether a connection is kept whose owner has sent nothing since its answer.
func (i *idleConns) anySilent() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, conns := range i.byPod {
		if slices.ContainsFunc(conns, (*ownerConn).isSilent) {
			return true
		}
	}
	return false
}

// A body that is no valid chunks is the client's mistake.
func TestForwardBadChunk(t *testing.T) {
	backend := startPlain(t, func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	for _, body := range []string{"zz\r\n", "1\r\nabc\r\n", "1;\x00\nx"} {
		_, _, resp := p.ask(t, "POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"+body)
		wantEqual(t, fmt.Sprintf("status of %q", body), resp.StatusCode, http.StatusBadRequest)
	}
	p.waitForwarded(t, resultBadRequest, 3)
	p.noFlights(t)
}

// A client whose long body was read to its end can send its next request on the same
// connection, unless the body had no length.
func TestForwardKeepsClients(t *testing.T) {
	backend := startPlain(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprint(w, len(body))
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	body := strings.Repeat("a", 2*maxShortBody)
	keeps := func(body io.Reader) bool {
		r, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+p.addr+"/ws/ns-01", body)
		must(t, err)
		resp, err := plainClient(t).Do(r)
		must(t, err)
		text, err := io.ReadAll(resp.Body)
		must(t, err)
		wantEqual(t, "answer", string(text), strconv.Itoa(2*maxShortBody))
		return !resp.Close
	}
	// An answer may be faster than the note that the body was sent.
	eventually(t, "the connection is kept after a body with a length", true, func() bool {
		return keeps(strings.NewReader(body))
	})
	for range 50 {
		wantEqual(t, "the connection is kept after a body without a length", keeps(io.MultiReader(strings.NewReader(body))), false)
	}
}

// An owner that has not taken the request (421, or 409 with a step) is asked again, or
// another one is; with a body that streams the client gets 503.
func TestForwardRefusedByOwner(t *testing.T) {
	released := "HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\nX-Router-Step: %d\r\n\r\n"
	for name, refusal := range map[string]string{"421": notMeant, "409": released} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			var p *testProxy
			backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
				if asked.Add(1)%2 == 0 {
					io.WriteString(conn, fine)
					return
				}
				if strings.Contains(refusal, "%d") {
					fmt.Fprintf(conn, refusal, p.mover.assignmentOf("ns-01").step+1)
					return
				}
				io.WriteString(conn, refusal)
			})
			p = startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			for _, body := range []string{"", strings.Repeat("x", maxShortBody)} {
				resp, text := p.do(t, plainClient(t), "POST", "/ws/ns-01", body)
				if resp.StatusCode != 200 || text != "ok" {
					t.Errorf("%d bytes: %s %q", len(body), resp.Status, text)
				}
			}
			resp, _ := p.do(t, plainClient(t), "POST", "/ws/ns-01", strings.Repeat("x", maxShortBody+1))
			if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
				t.Errorf("a body that streams: %s", resp.Status)
			}
			p.waitForwarded(t, map[string]result{"421": resultMisdirected, "409": resultBrokenOff}[name], 1)
			wantEqual(t, "requests", asked.Load(), 5)
			p.noFlights(t)
		})
	}
	t.Run("another 409", func(t *testing.T) {
		backend := startStub(t, "127.0.0.1:0", answer("HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\nno"))
		p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
		if resp, text := p.do(t, plainClient(t), "GET", "/ws/ns-01", ""); resp.StatusCode != 409 || text != "no" {
			t.Errorf("%s %q", resp.Status, text)
		}
	})
}

// moveTo gives ns-01 the owner, in a table of its own.
func (p *testProxy) moveTo(t testing.TB, version string, owner int) {
	t.Helper()
	p.override(version, map[string]string{"ns-01": backendName("backend", owner)})
	eventually(t, "the change has begun", true, func() bool {
		return p.mover.current.Load().newestRecord().ownersHash == p.tables.table().ownersHash
	})
}

// stepOver reports whether the newest table is in force.
func (p *testProxy) stepOver() bool {
	v, t := p.mover.current.Load(), p.tables.table()
	return v.done && v.hasOnlyTable(t.ownersHash)
}

// longAnswers starts a proxy with two backends. backend-0, which owns ns-01, answers when
// the test sends on release, and after first at once. httpMoveTimeout is moveTime.
func longAnswers(
	t *testing.T, first string, moveTime time.Duration, change func(*proxy),
) (p *testProxy, release chan string, ended chan struct{}) {
	t.Helper()
	release, ended = make(chan string), make(chan struct{}, 100)
	long := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, first)
		gone := make(chan struct{})
		go func() { io.Copy(io.Discard, br); close(gone) }()
		select {
		case text := <-release:
			io.WriteString(conn, text)
		case <-gone:
			ended <- struct{}{}
			<-release
		}
	})
	t.Cleanup(func() { close(release) })
	other := startStub(t, "127.0.0.1:0", keeping(strings.Replace(kept, "ok", "b1", 1)))
	p = startProxy(t, []string{long.addr, other.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
		p.mover.httpMoveTimeout = moveTime
		if change != nil {
			change(p)
		}
	})
	return p, release, ended
}

// A step waits for a plain request until it is answered, and then other requests go to
// the new owner.
func TestForwardMoveWaits(t *testing.T) {
	p, release, _ := longAnswers(t, "", time.Hour, nil)
	old := dial(t, p.addr)
	mustWrite(t, old, plainRequest("/ws/ns-01"))
	eventually(t, "requests that were sent", 1, p.forwarder.size)
	p.moveTo(t, "2", 1)
	next := dial(t, p.addr)
	mustWrite(t, next, plainRequest("/ws/ns-01"))
	p.waitPending(t, 1)
	waits := p.mover.waitingFor(p.mover.current.Load())
	if len(waits) != 1 || waits[0].Requests != 1 || waits[0].Upgrades != 0 {
		t.Errorf("the step waits for %+v, want a request", waits)
	}
	release <- fine
	readAnswerText(t, old, 200, "ok")
	readAnswerText(t, next, 200, "b1")
	eventually(t, "the step is over", true, p.stepOver)
	wantEqual(t, "requests that were cut", p.forwarder.cuts.Load(), 0)
	p.noFlights(t)
}

// readAnswerText checks an answer.
func readAnswerText(t testing.TB, conn net.Conn, status int, want string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(2 * patience))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	must(t, err)
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != status || string(body) != want && want != "" || err != nil {
		t.Fatalf("%s %q, %v; want %d %q", resp.Status, body, err, status, want)
	}
}

// A plain request that a step has waited for long enough is cut: the client gets 503, or
// an answer that breaks off. The step goes on when the owner has ended its side. With
// -handoff=off it is cut too.
func TestForwardMoveCuts(t *testing.T) {
	for _, off := range []bool{false, true} {
		for name, first := range map[string]string{
			"no answer yet": "",
			"event stream":  "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
			"chunked":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
		} {
			t.Run(fmt.Sprint(name, ", off ", off), func(t *testing.T) {
				p, release, ended := longAnswers(t, first, 50*time.Millisecond, func(p *proxy) { p.mover.handoffOff = off })
				old := dial(t, p.addr)
				mustWrite(t, old, plainRequest("/ws/ns-01"))
				eventually(t, "requests that were sent", 1, p.forwarder.size)
				if first != "" {
					eventually(t, "bytes that came", true, func() bool { return hasBytes(old) })
				}
				p.moveTo(t, "2", 1)
				if first == "" {
					readAnswerText(t, old, 503, "")
				} else {
					resp, err := http.ReadResponse(bufio.NewReader(old), nil)
					must(t, err)
					old.SetReadDeadline(time.Now().Add(2 * patience))
					if _, err := io.ReadAll(resp.Body); err == nil {
						t.Error("the client takes a cut answer for a whole one")
					}
				}
				<-ended // backend-0 has seen the end of its client
				next := dial(t, p.addr)
				mustWrite(t, next, plainRequest("/ws/ns-01"))
				if !off {
					p.waitPending(t, 2) // it waits until backend-0 has ended its side
				}
				release <- ""
				readAnswerText(t, next, 200, "b1")
				eventually(t, "the step is over", true, p.stepOver)
				wantEqual(t, "requests that were cut", p.forwarder.cuts.Load(), 1)
				p.noFlights(t)
			})
		}
	}
}

// hasBytes reports whether there is something to read.
func hasBytes(conn net.Conn) bool {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return false
	}
	var n int
	raw.Control(func(fd uintptr) {
		n, _, err = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	return err == nil && n > 0
}

// A step waits for an owner that works on a request whose client has left.
func TestForwardClientLeaves(t *testing.T) {
	p, release, ended := longAnswers(t, "", time.Hour, nil)
	old := dial(t, p.addr)
	mustWrite(t, old, plainRequest("/ws/ns-01"))
	eventually(t, "requests that were sent", 1, p.forwarder.size)
	old.Close()
	p.waitForwarded(t, resultClientGone, 1)
	<-ended
	p.moveTo(t, "2", 1)
	next := dial(t, p.addr)
	mustWrite(t, next, plainRequest("/ws/ns-01"))
	p.waitPending(t, 2)
	if p.stepOver() || !p.mover.flights.any(func(*flight) bool { return true }) {
		t.Error("nobody waits for an owner that works on a request")
	}
	release <- ""
	readAnswerText(t, next, 200, "b1")
	p.noFlights(t)
}

// A plain request to a pod that was replaced is cut at once.
func TestForwardPodReplaced(t *testing.T) {
	p, release, ended := longAnswers(t, "", time.Hour, func(p *proxy) {
		p.backends.podUID = func(int) string { return "a" }
		p.relay.setPods(map[int]string{0: "a"})
	})
	old := dial(t, p.addr)
	mustWrite(t, old, plainRequest("/ws/ns-01"))
	eventually(t, "requests that were sent", 1, p.forwarder.size)
	if p.relay.setPods(map[int]string{0: "b"}) {
		p.mover.tableOrPodChanged()
	}
	readAnswerText(t, old, 503, "")
	<-ended
	release <- ""
	p.noFlights(t)
}

// A router that stops lets plain requests end within the time of the drain, and then cuts
// them. Those that wait for their owner are answered at once.
func TestForwardDrain(t *testing.T) {
	for name, over := range map[string]time.Duration{"ends": time.Hour, "cut": 0} {
		t.Run(name, func(t *testing.T) {
			p, release, ended := longAnswers(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", time.Hour, nil)
			p.drainDuration = over
			old := dial(t, p.addr)
			mustWrite(t, old, plainRequest("/ws/ns-01"))
			eventually(t, "bytes that came", true, func() bool { return hasBytes(old) })
			stopped := make(chan struct{})
			go func() { p.stop(); close(stopped) }()
			if over > 0 {
				eventually(t, "the server stops", true, func() bool {
					conn, err := net.Dial("tcp", p.addr)
					if err == nil {
						conn.Close()
					}
					return err != nil
				})
				release <- "ok"
				readAnswerText(t, old, 200, "ok")
			} else {
				resp, err := http.ReadResponse(bufio.NewReader(old), nil)
				must(t, err)
				if _, err := io.ReadAll(resp.Body); err == nil {
					t.Error("the client takes a cut answer for a whole one")
				}
				<-ended
			}
			<-stopped
		})
	}
}

// Plain requests count in -max-sessions once they are sent, and leave a slot free for
// others when they are over.
func TestForwardLimits(t *testing.T) {
	p, release, _ := longAnswers(t, "", time.Hour, func(p *proxy) { p.limits.sessions = 1 })
	old := dial(t, p.addr)
	mustWrite(t, old, plainRequest("/ws/ns-01"))
	eventually(t, "requests that were sent", 1, p.forwarder.size)
	for _, request := range []string{plainRequest("/ws/ns-01"), upgradeRequest("/ws/ns-01")} {
		if _, _, resp := p.ask(t, request); resp.StatusCode != 503 {
			t.Errorf("%s above the limit, want 503", resp.Status)
		}
	}
	release <- fine
	readAnswerText(t, old, 200, "ok")
	p.noFlights(t)
	conn := dial(t, p.addr)
	mustWrite(t, conn, plainRequest("/ws/ns-01"))
	release <- fine
	readAnswerText(t, conn, 200, "ok")
}

// A client that has ended its side of the connection still gets an answer that comes soon.
func TestForwardHalfClosed(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(fine))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn := dial(t, p.addr)
	mustWrite(t, conn, plainRequest("/ws/ns-01"))
	conn.(*net.TCPConn).CloseWrite()
	readAnswerText(t, conn, 200, "ok")
	p.noFlights(t)
}

// Behind a Unix socket is nginx, which takes an interim answer for the answer.
func TestForwardNoHintsOnUnix(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"+fine))
	socket := filepath.Join(t.TempDir(), "s")
	r := startRouter(t, "-backends", backend.addr, "-overrides", overridesDir(t, nil), "-listen", "unix:"+socket)
	r.log.wait(t, "routing table updated", 1)
	conn := dial(t, socket)
	mustWrite(t, conn, plainRequest("/ws/ns-01"))
	readAnswerText(t, conn, 200, "ok")
}

// A 100 of the router and an interim answer of the owner do not mix.
func TestForwardHintsAndContinue(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
		io.ReadFull(br, make([]byte, len("2\r\nhi\r\n0\r\n\r\n")))
		io.WriteString(conn, fine)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	for range 10 {
		conn, br, resp := p.ask(t, "POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n"+
			"Transfer-Encoding: chunked\r\n\r\n")
		wantEqual(t, "first status", resp.StatusCode, 100)
		resp, err := http.ReadResponse(br, nil)
		must(t, err)
		wantEqual(t, "second status", resp.StatusCode, 103)
		mustWrite(t, conn, "2\r\nhi\r\n0\r\n\r\n")
		resp, err = http.ReadResponse(br, nil)
		must(t, err)
		wantEqual(t, "last status", resp.StatusCode, 200)
	}
	p.noFlights(t)
}

// A router that stops does not wait for a client that has left.
func TestForwardDrainClientLeaves(t *testing.T) {
	p, release, ended := longAnswers(t, "", time.Hour, nil)
	p.drainDuration = time.Hour
	old := dial(t, p.addr)
	mustWrite(t, old, plainRequest("/ws/ns-01"))
	eventually(t, "requests that were sent", 1, p.forwarder.size)
	stopped := make(chan struct{})
	go func() { p.stop(); close(stopped) }()
	eventually(t, "the server stops", true, func() bool {
		conn, err := net.Dial("tcp", p.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	old.(*net.TCPConn).SetLinger(0)
	old.Close()
	select {
	case <-ended:
		release <- ""
		<-stopped
	case <-time.After(patience):
		t.Error("the owner does not see that the client has left")
		release <- fine
		<-stopped
	}
}

// A connection whose body was stopped is not used again.
func TestForwardStopBody(t *testing.T) {
	for range 100 {
		a, b := net.Pipe()
		c, d := net.Pipe()
		x := &exchange{conn: newOwnerConn(a, backendPod{}), client: &clientConn{Conn: c},
			unwatchClient: func() bool { return true }, body: &bodyState{done: make(chan struct{})}}
		close(x.body.done)
		if x.stopBody(0) {
			go b.Read(make([]byte, 1))
			if _, err := a.Write([]byte("x")); err != nil {
				t.Fatalf("a connection that is to be used again: %v", err)
			}
		}
		b.Close()
		d.Close()
	}
}

// HTTP/1.0 has no end of an answer but that of the connection: one that breaks off is reset.
func TestForwardCutAnswerHTTP10(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	_, _, resp := p.ask(t, "GET /ws/ns-01 HTTP/1.0\r\n\r\n")
	if body, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("the client takes %q for a whole answer", body)
	}
	p.waitForwarded(t, resultBrokenOff, 1)
}

// With TLS there is no close_notify either, which would be the end of a whole answer.
func TestForwardCutAnswerHTTP10TLS(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", answer(
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"))
	p := startTLS(t, []string{backend.addr}, tlsSetup{})
	client := p.dialTLS(t, p.client(tls.VersionTLS13))
	mustWrite(t, client, "GET /ws/ns-01 HTTP/1.0\r\n\r\n")
	if got, err := io.ReadAll(client); err == nil {
		t.Errorf("the client takes %q for a whole answer", got)
	}
	p.waitForwarded(t, resultBrokenOff, 1)
}

// An abandoned request takes little memory.
func TestForwardAbandonedMemory(t *testing.T) {
	var seen atomic.Pointer[weak.Pointer[http.Request]]
	p, release, ended := longAnswers(t, "", time.Hour, func(p *proxy) {
		namespace := p.namespaceOf
		p.namespaceOf = func(r *http.Request) (string, *refusal) {
			w := weak.Make(r)
			seen.Store(&w)
			return namespace(r)
		}
	})
	old := dial(t, p.addr)
	mustWrite(t, old, plainRequest("/ws/ns-01"))
	eventually(t, "requests that were sent", 1, p.forwarder.size)
	old.Close()
	<-ended
	eventually(t, "the request is kept", false, func() bool {
		runtime.GC()
		return seen.Load().Value() != nil
	})
	release <- ""
	p.noFlights(t)
}

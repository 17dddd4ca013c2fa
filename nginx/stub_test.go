//go:build unix

package nginx_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/websocket"
)

// stub stands in the router's place: it remembers the head of the last
// request, echoes on WebSockets, and refuses /ws/busy and what is no upgrade.
// The query has=N gives it so many bytes of cookies to set,
// redirect= lets it answer 302, and says=TEXT that text alone, as it is. See plain for
// what a request below /plain gets.
type stub struct {
	server http.Server // closed by Cleanup, or earlier to be a router that is gone

	mu    sync.Mutex
	last  *http.Request // guarded by mu
	asked int           // requests so far; guarded by mu
	conns int           // connections so far; guarded by mu
}

func startStub(t *testing.T, socket string) *stub {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &stub{}
	s.server.Handler = s
	s.server.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.conns++
		}
	}
	served := make(chan struct{})
	go func() { s.server.Serve(listener); close(served) }()
	t.Cleanup(func() { s.server.Close(); <-served })
	return s
}

func (s *stub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.last = r.Clone(r.Context())
	s.asked++
	s.mu.Unlock()
	for n, _ := strconv.Atoi(r.URL.Query().Get("has")); n > 0; n -= 1000 {
		w.Header().Add("Set-Cookie", strings.Repeat("c", min(n, 1000)-len("Set-Cookie: \r\n")))
	}
	switch {
	case r.URL.Query().Has("says"):
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			io.WriteString(conn, r.URL.Query().Get("says"))
			conn.Close()
		}
	case r.URL.Query().Has("redirect"):
		http.Redirect(w, r, "/login", http.StatusFound)
	case r.URL.Path == "/ws/busy":
		w.Header().Set("Retry-After", "7")
		// Not for nginx: a backend may not send its clients to the page.
		w.Header().Set("X-Accel-Redirect", "/")
		http.Error(w, "busy", http.StatusServiceUnavailable)
	case r.Header.Get("Upgrade") == "" && strings.HasPrefix(r.URL.Path, "/plain"):
		plain(w, r)
	case r.Header.Get("Upgrade") == "":
		w.Header().Set("Upgrade", "websocket")
		http.Error(w, "not an upgrade", http.StatusUpgradeRequired)
	default:
		cookies := w.Header()
		websocket.Server{
			Handshake: func(config *websocket.Config, _ *http.Request) error { config.Header = cookies; return nil },
			Handler:   func(ws *websocket.Conn) { io.Copy(ws, ws) },
		}.ServeHTTP(w, r)
	}
}

// plain answers a plain request, as the first word of its query says.
func plain(w http.ResponseWriter, r *http.Request) {
	conn := http.NewResponseController(w)
	word, number, _ := strings.Cut(r.URL.RawQuery, "=")
	n, _ := strconv.Atoi(number)
	switch word {
	case "status": // an answer as a backend may give it
		w.Header().Set("Content-Type", "text/html")
		w.Header().Set("Server", "backend/1")
		w.Header().Set("Date", "Mon, 02 Jan 2006 15:04:05 GMT")
		w.WriteHeader(n)
		fmt.Fprintf(w, "<p>%d", n)
	case "size": // so many bytes
		w.Header().Set("Content-Length", number)
		io.CopyN(w, zeros{}, int64(n))
	case "count": // how many bytes the body has
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, n, err, r.ContentLength, r.TransferEncoding)
	case "echo": // each part of the body at once
		conn.EnableFullDuplex()
		conn.Flush()
		buf := make([]byte, 4096)
		for n, err := 0, error(nil); err == nil; {
			n, err = r.Body.Read(buf)
			w.Write(buf[:n])
			conn.Flush()
		}
	case "events": // one of SSE, and no more until the client leaves
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, "data: 1\n\n")
		conn.Flush()
		<-r.Context().Done()
	case "early": // an answer before the body
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	case "cut": // half of an answer
		io.WriteString(w, "half")
		conn.Flush()
		panic(http.ErrAbortHandler)
	case "none": // no answer
		panic(http.ErrAbortHandler)
	case "hints": // an interim answer before the final one
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		io.WriteString(w, "final")
	}
}

// zeros has no end.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// connections is how many connections there were.
func (s *stub) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns
}

// seen is the last request as the router gets it.
func (s *stub) seen() *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// count is how many requests there were.
func (s *stub) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	if err := os.WriteFile(to, readFile(t, from), 0o644); err != nil {
		t.Fatal(err)
	}
}

// freeAddresses are n addresses of the host, whose ports are free on all of the machine
// until somebody takes one: nginx listens on no port 0. All are open at the same time, so
// that none is there twice.
func freeAddresses(t *testing.T, host string, n int) (addresses []string) {
	t.Helper()
	for range n {
		listener, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		addresses = append(addresses, net.JoinHostPort(host, port(listener.Addr().String())))
	}
	return addresses
}

// closeIdle closes the connections that have no request now.
func (s *stub) closeIdle() {
	s.server.SetKeepAlivesEnabled(false)
	s.server.SetKeepAlivesEnabled(true)
}

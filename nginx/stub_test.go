//go:build unix

package nginx_test

import (
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
// redirect= lets it answer 302, and says=TEXT that text alone, as it is.
type stub struct {
	server http.Server // closed by Cleanup, or earlier to be a router that is gone

	mu    sync.Mutex
	last  *http.Request // guarded by mu
	asked int           // requests so far; guarded by mu
}

func startStub(t *testing.T, socket string) *stub {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &stub{}
	s.server.Handler = s
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

// freeAddresses are n of them, free until somebody takes one: nginx listens on no
// port 0. All are open at the same time, so that none is there twice.
func freeAddresses(t *testing.T, n int) (addresses []string) {
	t.Helper()
	for range n {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		addresses = append(addresses, listener.Addr().String())
	}
	return addresses
}

//go:build unix

package nginx_test

import (
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"

	"golang.org/x/net/websocket"
)

// stub stands in the router's place: it remembers the head of the last
// request, echoes on WebSockets, and refuses /ws/busy and what is no upgrade.
type stub struct {
	server http.Server // closed by Cleanup, or earlier to be a router that is gone

	mu   sync.Mutex
	last *http.Request // guarded by mu
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
	s.mu.Unlock()
	switch {
	case r.URL.Path == "/ws/busy":
		w.Header().Set("Retry-After", "7")
		// Not for nginx: a backend may not send its clients to the page.
		w.Header().Set("X-Accel-Redirect", "/")
		http.Error(w, "busy", http.StatusServiceUnavailable)
	case r.Header.Get("Upgrade") == "":
		w.Header().Set("Upgrade", "websocket")
		http.Error(w, "not an upgrade", http.StatusUpgradeRequired)
	default:
		websocket.Server{Handler: func(ws *websocket.Conn) { io.Copy(ws, ws) }}.ServeHTTP(w, r)
	}
}

// seen is the last request as the router gets it.
func (s *stub) seen() *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
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

// freeAddress is free until somebody takes it: nginx listens on no port 0.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

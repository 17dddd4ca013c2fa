// Signalr is the SignalR server of TestApps: the library as it comes, with one hub for all
// namespaces. A namespace is the second segment of the path. e2e/apps/server.js starts it:
//
//	/hub/<namespace>/negotiate  POST: the id of a connection, and the transports
//	/hub/<namespace>            WebSocket, or server-sent events with POSTs beside them
//
// It writes a line of JSON to its standard output for each message that it has handled,
// as server.js does, and "listening on port N" to its standard error. At SIGTERM it ends
// all connections. It ends when its standard input does: it never outlives server.js.
//
// BACKEND is its name in answers.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/philippseith/signalr"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, os.Getenv("BACKEND")); err != nil {
		log.Fatal(err)
	}
	io.Copy(io.Discard, os.Stdin)
}

// serve serves the hub in the background, on a port of the loopback interface. The end of
// the context ends all connections.
func serve(ctx context.Context, backend string) error {
	newHub := func() signalr.HubInterface { return &hub{backend: backend} }
	server, err := signalr.NewServer(ctx, signalr.HubFactory(newHub))
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	server.MapHTTP(signalr.WithHTTPServeMux(mux), "/hub/{namespace}")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	port := listener.Addr().(*net.TCPAddr).Port
	fmt.Fprintf(os.Stderr, "listening on port %d\n", port)
	go func() { log.Fatal(http.Serve(listener, withNamespace(mux))) }()
	return nil
}

// namespaceKey is the key of the namespace in the context of a request, and so of the
// connection that the library makes of it.
type namespaceKey struct{}

// withNamespace puts the namespace of each request into its context.
func withNamespace(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		escaped, _, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/hub/"), "/")
		namespace, err := url.PathUnescape(escaped)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		ctx := context.WithValue(r.Context(), namespaceKey{}, namespace)
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// hub has the methods that clients call. The library makes one for each call.
type hub struct {
	signalr.Hub
	backend string
}

// Send handles a numbered message, and returns who has done so.
func (h *hub) Send(n int) string {
	line, err := json.Marshal(map[string]any{
		"app": "signalr", "backend": h.backend, "n": n,
		"namespace": h.Context().Value(namespaceKey{}),
	})
	if err != nil {
		panic(err)
	}
	os.Stdout.Write(append(line, '\n'))
	return h.backend
}

// Ticks is a stream of the numbers from 1, one each 100 ms, until its connection ends.
func (h *hub) Ticks() <-chan int {
	ticks := make(chan int)
	ctx := h.Context()
	go func() {
		defer close(ticks)
		ticker := time.NewTicker(100 * time.Millisecond)
		defer ticker.Stop()
		for n := 1; ; n++ {
			select {
			case ticks <- n:
			case <-ctx.Done():
				return
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ticks
}

package main

import (
	"bufio"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// countingClients is a server of clients of which a test sees when it is done
// with a connection.
type countingClients struct {
	addr     string
	badHeads *atomic.Int64
	closed   chan struct{} // one for each connection that net/http has closed
}

// startCountingClients serves on TCP, or on a Unix socket, a handler that answers
// as the proxy does when a path is unknown. headerTimeout is how long clients may wait.
func startCountingClients(t *testing.T, network string, headerTimeout time.Duration) *countingClients {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	p := &proxy{namespaceOf: defaultMatcher(t).namespace, log: quiet,
		limits: limits{headerTimeout: headerTimeout, headerBytes: 2048, headerFields: 100}}
	l := listenLocal(t)
	if network == "unix" {
		var err error
		l, err = listen("unix:"+filepath.Join(t.TempDir(), "s"), 0)
		must(t, err)
	}
	f := &countingClients{addr: l.Addr().String(), badHeads: &p.results[resultBadHead], closed: make(chan struct{}, 10)}
	server := newClientServer(t.Context(), p, quiet)
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			f.closed <- struct{}{}
		}
	}
	fdLimit := wideDescriptorLimit(t)
	served := make(chan error, 1)
	go func() { served <- server.Serve(clientListener{l, fdLimit, f.badHeads, nil, nil}) }()
	t.Cleanup(func() { server.Close(); <-served })
	return f
}

func TestBadHeads(t *testing.T) {
	request := "GET /other HTTP/1.1\r\nHost: h\r\n\r\n"
	long := "GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\nX-Long: " + strings.Repeat("x", 16<<10) + "\r\n\r\n"
	tests := map[string]struct {
		send    string
		status  int  // of the first answer, 0 if there is none
		leave   bool // the client closes, else it waits for the router to
		counted int64
	}{
		"oversized":             {send: long, status: 431, counted: 1},
		"garbage":               {send: "\x16\x03\x01 this is no HTTP\r\n\r\n", status: 400, counted: 1},
		"no host":               {send: "GET / HTTP/1.1\r\n\r\n", status: 400, counted: 1},
		"two hosts":             {send: "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", status: 400, counted: 1},
		"bad header":            {send: "GET / HTTP/1.1\r\nHost: h\r\nX y: z\r\n\r\n", status: 400, counted: 1},
		"HTTP/2":                {send: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", status: 404, counted: 0},
		"slow":                  {send: "GET /other HTTP/1.1\r\nHost: h\r\n", counted: 1},
		"slow from the start":   {send: "G", counted: 1},
		"left within the head":  {send: "GET /other HTTP", leave: true, counted: 1},
		"left without a byte":   {send: "", leave: true, counted: 0},
		"silent":                {send: "", counted: 0},
		"answered by the proxy": {send: request, status: 404, counted: 0},
		"answered, then left":   {send: request, status: 404, leave: true, counted: 0},
		"answered, then slow":   {send: request + "GET /oth", status: 404, counted: 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, network := range []string{"tcp", "unix"} {
				const timeout = time.Second // the shortest in which a client on a busy machine says all that it will
				f := startCountingClients(t, network, timeout)
				begun := time.Now()
				conn := dial(t, f.addr)
				conn.SetDeadline(time.Now().Add(patience))
				mustWrite(t, conn, tt.send)
				wantAnswer(t, conn, tt.status, tt.leave)
				if tt.leave {
					conn.Close()
				}
				<-f.closed
				wantEqual(t, "bad heads over "+network, f.badHeads.Load(), tt.counted)
				if took := time.Since(begun); !tt.leave && tt.status == 0 && took < timeout*3/4 { // its clock does not begin with ours
					t.Errorf("%s: closed after %s, want -header-timeout %s", network, took, timeout)
				}
			}
		})
	}
}

// wantAnswer reads the first answer's status, 0 for none, and unless the client
// is to leave first, on to the end: a clean one, even if the router has not read
// all that was sent.
func wantAnswer(t *testing.T, conn net.Conn, status int, leave bool) {
	t.Helper()
	br := bufio.NewReader(conn)
	if status != 0 {
		resp, err := http.ReadResponse(br, nil)
		must(t, err)
		wantEqual(t, "the status", resp.StatusCode, status)
	}
	if leave {
		return
	}
	if _, err := io.Copy(io.Discard, br); err != nil {
		t.Errorf("the end is %v, want a clean one", err)
	}
}

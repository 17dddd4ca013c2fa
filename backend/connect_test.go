package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

func TestClientCounts(t *testing.T) {
	cfg := quietConfig()
	cfg.interval = time.Millisecond
	s := startServer(t, cfg, "tcp")
	code, out, errOut := runProgram(t, "", "-connect", "ws://"+s.addr+"/ws/ns-01", "-n", "3")
	want := `{"server":"backend-0","counter":1,"ns":"ns-01"}
{"server":"backend-0","counter":2,"ns":"ns-01"}
{"server":"backend-0","counter":3,"ns":"ns-01"}
`
	if code != 0 || out != want || errOut != "" {
		t.Errorf("exit code %d, stdout:\n%sstderr: %q", code, out, errOut)
	}
	s.mustLog(t, "session end", "client: Close 1000")
}

func TestClientSendsLines(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp") // no interval: only answers
	code, out, errOut := runProgram(t, "one\n\nthree", "-connect", "ws://"+s.addr+"/ws/ns-01", "-n", "4")
	if code != 0 || strings.Count(out, "\n") != 4 || errOut != "" {
		t.Errorf("exit code %d, stdout:\n%sstderr: %q", code, out, errOut)
	}
}

func TestClientDialsAnotherAddress(t *testing.T) {
	for network, prefix := range map[string]string{"tcp": "", "unix": "unix:"} {
		t.Run(network, func(t *testing.T) {
			addr := prefix + startServer(t, quietConfig(), network).addr
			code, _, errOut := runProgram(t, "", "-connect", "ws://nowhere.invalid/ws/ns-01", "-addr", addr, "-n", "1")
			if code != 0 {
				t.Errorf("exit code %d: %s", code, errOut)
			}
		})
	}
}

func TestClientTLS(t *testing.T) {
	b := newServer(quietConfig(), quietLog())
	var gotHost, gotSNI string
	ts := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		gotHost, gotSNI = r.Host, r.TLS.ServerName
		b.ServeHTTP(w, r)
	}))
	ts.Config.ErrorLog = log.New(io.Discard, "", 0)
	ts.StartTLS()
	t.Cleanup(ts.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}
	if err := os.WriteFile(ca, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	addr := ts.Listener.Addr().String()

	code, out, errOut := runProgram(t, "", "-connect", "wss://www.example.com/ws/ns-01", "-addr", addr, "-ca", ca, "-n", "1")
	if code != 0 || !strings.Contains(out, `"ns":"ns-01"`) {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, out, errOut)
	}
	if gotHost != "www.example.com" || gotSNI != "www.example.com" {
		t.Errorf("Host %q, SNI %q, want www.example.com", gotHost, gotSNI)
	}
	for name, args := range map[string][]string{
		"CA not trusted": {"-connect", "wss://www.example.com/ws/ns-01", "-addr", addr},
		"wrong name":     {"-connect", "wss://www.example.org/ws/ns-01", "-addr", addr, "-ca", ca},
	} {
		if code, _, errOut := runProgram(t, "", args...); code != 1 || !strings.Contains(errOut, "x509") {
			t.Errorf("%s: exit code %d, stderr %q", name, code, errOut)
		}
	}
	b.running.Wait()
}

// refuse answers each request with this status and body.
func refuse(status int, body string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		io.WriteString(w, body)
	})
}

// greet accepts any upgrade, sends a message and then a Close with this code, or cuts the
// connection if it is 0.
func greet(code int) http.Handler {
	return websocket.Server{Handshake: acceptAnyone, Handler: func(ws *websocket.Conn) {
		websocket.Message.Send(ws, "hello")
		if code != 0 {
			ws.WriteClose(code)
			io.Copy(io.Discard, ws)
		}
	}}
}

func TestClientExitCodes(t *testing.T) {
	tests := map[string]struct {
		server http.Handler
		exit   int
		out    string
		says   string
	}{
		"normal":       {greet(1000), 0, "hello\n", "closed by the server: Close 1000"},
		"going away":   {greet(1001), 0, "hello\n", "closed by the server: Close 1001"},
		"restart":      {greet(1012), 0, "hello\n", "closed by the server: Close 1012"},
		"policy":       {greet(1008), 1, "hello\n", "closed by the server: Close 1008"},
		"cut":          {greet(0), 1, "hello\n", "without a Close"},
		"refused":      {refuse(503, "no owner\nfor ns-01"), 1, "", `server answered 503 Service Unavailable: "no owner"`},
		"no text":      {refuse(404, ""), 1, "", "server answered 404 Not Found\n"},
		"long refusal": {refuse(500, strings.Repeat("x", 100_000)), 1, "", "500 Internal Server Error: \"xxx"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			ts := httptest.NewServer(tt.server)
			t.Cleanup(ts.Close)
			code, out, errOut := runProgram(t, "", "-connect", strings.Replace(ts.URL, "http", "ws", 1)+"/ws/ns-01")
			if code != tt.exit || out != tt.out || !strings.Contains(errOut, tt.says) || len(errOut) > 500 {
				t.Errorf("exit code %d, stdout %q, stderr %q; want %d, %q and %q", code, out, errOut, tt.exit, tt.out, tt.says)
			}
		})
	}
}

func TestClientWithoutServer(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	s.stop()
	if code, _, errOut := runProgram(t, "", "-connect", "ws://"+s.addr+"/ws/ns-01"); code != 1 || !strings.Contains(errOut, "refused") {
		t.Errorf("exit code %d, stderr %q", code, errOut)
	}
}

// TestClientInterrupted sends SIGINT to the program, while its standard input
// is open and silent.
func TestClientInterrupted(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	cmd := exec.Command(os.Args[0], "-connect", "ws://"+s.addr+"/ws/ns-01")
	cmd.Env = append(os.Environ(), asMain+"=1")
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	s.mustLog(t, "session end", "client: Close 1000")
	if err := cmd.Wait(); err != nil || errOut.Len() > 0 {
		t.Errorf("ended with %v, stderr %q; want exit code 0 and nothing", err, errOut.String())
	}
	stdin.Close()
}

func TestClientInterruptedDuringHandshake(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, []string{"-connect", "ws://" + ln.Addr().String() + "/"},
			stdio{strings.NewReader(""), io.Discard, io.Discard})
	}()
	conn, err := ln.Accept() // and never an answer
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "context canceled") {
		t.Errorf("error %v, want context canceled", err)
	}
}

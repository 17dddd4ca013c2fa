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

// runClient runs the client and returns its exit code and output.
func runClient(t *testing.T, stdin string, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e logBuffer
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err := run(ctx, args, stdio{strings.NewReader(stdin), &o, &e})
	code = exitCode(err, &e)
	return code, o.String(), e.String()
}

func TestClientCounts(t *testing.T) {
	cfg := quietConfig()
	cfg.interval = time.Millisecond
	s := startServer(t, cfg)
	code, out, errOut := runClient(t, "", "-connect", "ws://"+s.addr+"/ws/ns-01", "-n", "3")
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
	s := startServer(t, quietConfig()) // no interval: only answers
	code, out, errOut := runClient(t, "one\n\nthree", "-connect", "ws://"+s.addr+"/ws/ns-01", "-n", "4")
	if code != 0 || strings.Count(out, "\n") != 4 || errOut != "" {
		t.Errorf("exit code %d, stdout:\n%sstderr: %q", code, out, errOut)
	}
}

func TestClientDialsAnotherAddress(t *testing.T) {
	s := startServer(t, quietConfig())
	path := filepath.Join(t.TempDir(), "sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	u := startServerOn(t, quietConfig(), ln)
	for name, addr := range map[string]string{"tcp": s.addr, "unix": "unix:" + u.addr} {
		t.Run(name, func(t *testing.T) {
			code, _, errOut := runClient(t, "", "-connect", "ws://nowhere.invalid/ws/ns-01", "-addr", addr, "-n", "1")
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

	code, out, errOut := runClient(t, "", "-connect", "wss://www.example.com/ws/ns-01", "-addr", addr, "-ca", ca, "-n", "1")
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
		if code, _, errOut := runClient(t, "", args...); code != 1 || !strings.Contains(errOut, "x509") {
			t.Errorf("%s: exit code %d, stderr %q", name, code, errOut)
		}
	}
	b.running.Wait()
}

func TestClientTellsRefusals(t *testing.T) {
	tests := map[string]struct {
		answer http.HandlerFunc
		says   string
	}{
		"text": {func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "no owner\nfor ns-01", http.StatusServiceUnavailable)
		}, `server answered 503 Service Unavailable: "no owner"`},
		"empty": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) },
			"server answered 404 Not Found\n"},
		"long": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(500)
			io.WriteString(w, strings.Repeat("x", 100_000))
		}, "500 Internal Server Error: \"xxx"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			ts := httptest.NewServer(tt.answer)
			t.Cleanup(ts.Close)
			code, out, errOut := runClient(t, "", "-connect", strings.Replace(ts.URL, "http", "ws", 1)+"/ws/ns-01")
			if code != 1 || out != "" || !strings.Contains(errOut, tt.says) || len(errOut) > 500 {
				t.Errorf("exit code %d, stdout %q, stderr %q; want %q", code, out, errOut, tt.says)
			}
		})
	}
}

// serverOf accepts any upgrade and gives the connection to handle.
func serverOf(t *testing.T, handle websocket.Handler) (url string) {
	t.Helper()
	ts := httptest.NewServer(websocket.Server{Handshake: acceptAnyone, Handler: handle})
	t.Cleanup(ts.Close)
	return strings.Replace(ts.URL, "http", "ws", 1)
}

func TestClientExitCodes(t *testing.T) {
	tests := map[string]struct {
		code int // of the Close; 0 cuts the connection
		exit int
		says string
	}{
		"normal":     {1000, 0, "closed by the server: Close 1000"},
		"going away": {1001, 0, "closed by the server: Close 1001"},
		"restart":    {1012, 0, "closed by the server: Close 1012"},
		"policy":     {1008, 1, "closed by the server: Close 1008"},
		"cut":        {0, 1, "without a Close"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			url := serverOf(t, func(ws *websocket.Conn) {
				websocket.Message.Send(ws, "hello")
				if tt.code == 0 {
					return
				}
				ws.WriteClose(tt.code)
				io.Copy(io.Discard, ws)
			})
			exit, out, errOut := runClient(t, "", "-connect", url+"/")
			if exit != tt.exit || out != "hello\n" || !strings.Contains(errOut, tt.says) {
				t.Errorf("exit code %d, stdout %q, stderr %q", exit, out, errOut)
			}
		})
	}
}

func TestClientWithoutServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	code, _, errOut := runClient(t, "", "-connect", "ws://"+ln.Addr().String()+"/ws/ns-01")
	if code != 1 || !strings.Contains(errOut, "refused") {
		t.Errorf("exit code %d, stderr %q", code, errOut)
	}
}

// TestClientInterrupted sends SIGINT to the program, while its standard input
// is open and silent.
func TestClientInterrupted(t *testing.T) {
	s := startServer(t, quietConfig())
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

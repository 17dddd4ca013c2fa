package main

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

func TestHTTP(t *testing.T) {
	page := filepath.Join(t.TempDir(), "index.html")
	if err := os.WriteFile(page, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := quietConfig()
	cfg.page = page
	s := startServer(t, cfg)
	tests := map[string]struct {
		path string
		code int
		body string
	}{
		"health":                {"/healthz", 200, "ok\n"},
		"page":                  {"/", 200, "first"},
		"unknown path":          {"/other", 404, "not found"},
		"no namespace":          {"/ws/", 404, "/ws/<namespace>"},
		"no slash":              {"/ws", 404, "/ws/<namespace>"},
		"empty first segment":   {"/ws//deep", 404, "/ws/<namespace>"},
		"not an upgrade":        {"/ws/ns-01", 426, "upgrade"},
		"not an upgrade, deep":  {"/ws/ns-01/a/b", 426, "upgrade"},
		"dots are not resolved": {"/ws/../healthz", 426, "upgrade"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			resp, body := get(t, s.addr, tt.path)
			if resp.StatusCode != tt.code || !strings.Contains(body, tt.body) {
				t.Errorf("%s %q, want %d %q", resp.Status, body, tt.code, tt.body)
			}
			if got := resp.Header.Get("Upgrade"); tt.code == 426 && got != "websocket" {
				t.Errorf("Upgrade: %q, want websocket", got)
			}
		})
	}
	if err := os.WriteFile(page, []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, body := get(t, s.addr, "/"); body != "second" {
		t.Errorf("page %q after the file changed, want second", body)
	}
}

// get does not resolve dots in the path, and leaves no connection behind.
func get(t *testing.T, addr, path string) (*http.Response, string) {
	t.Helper()
	c := rawDial(t, addr)
	c.write("GET " + path + " HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func TestBadHandshakeIs400AndClosed(t *testing.T) {
	s := startServer(t, quietConfig())
	c := rawDial(t, s.addr)
	c.write("GET /ws/ns-01 HTTP/1.1\r\nHost: backend\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 400 {
		t.Errorf("status %s, want 400", resp.Status)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Errorf("body: %v, want it to end", err)
	}
}

// A router that means another backend has an old address, and is told so.
func TestAnotherBackendIsMisdirected(t *testing.T) {
	for name, tt := range map[string]struct {
		named bool
		meant string
		code  int
	}{
		"it is meant":       {true, "backend-0", 101},
		"another is meant":  {true, "backend-2", 421},
		"no router":         {true, "", 101},
		"no backend's name": {false, "backend-2", 101},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := quietConfig()
			cfg.named = tt.named
			c := rawDial(t, startServer(t, cfg).addr)
			c.write(head("/ws/ns-01", "X-Router-Backend: "+tt.meant))
			resp, err := http.ReadResponse(c.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.code {
				t.Errorf("status %s, want %d", resp.Status, tt.code)
			}
		})
	}
	for host, want := range map[string]bool{"backend-2": true, "a-b-10": true, "laptop": false, "my-laptop": false, "7": false, "": false} {
		if got := hasOrdinal(host); got != want {
			t.Errorf("hasOrdinal(%q) = %v, want %v", host, got, want)
		}
	}
}

func TestFirstSubprotocolIsChosen(t *testing.T) {
	s := startServer(t, quietConfig())
	c := rawDial(t, s.addr)
	c.write(head("/ws/ns-01", "Sec-WebSocket-Protocol: chat, superchat"))
	if got := c.mustUpgrade().Header.Get("Sec-WebSocket-Protocol"); got != "chat" {
		t.Errorf("subprotocol %q, want chat", got)
	}
}

func TestStopRefusesNewWork(t *testing.T) {
	s := startServer(t, quietConfig())
	s.refuse()
	if resp, body := get(t, s.addr, "/healthz"); resp.StatusCode != 503 || body != "stopping\n" {
		t.Errorf("/healthz %s %q, want 503", resp.Status, body)
	}
	c := rawDial(t, s.addr)
	c.write(head("/ws/ns-01"))
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 503 {
		t.Errorf("upgrade: %s, want 503", resp.Status)
	}
}

func TestStopCutsSilentClients(t *testing.T) {
	cfg := quietConfig()
	cfg.closeTime = 50 * time.Millisecond
	s := startServer(t, cfg)
	c := rawOpen(t, s.addr, "/ws/ns-01")
	c.mustCounter(1)
	s.stop()
	c.mustClose(closeGoingAway)
	c.mustEOF()
	s.mustLog(t, "session end", "reason=stop")
	s.mustLog(t, "msg=stopped")
}

// TestSIGTERM runs the program itself.
func TestSIGTERM(t *testing.T) {
	cmd, addr, rest := startProgram(t, "-listen", "127.0.0.1:0", "-name", "backend-3")
	var clients []*rawClient
	for i := range 5 {
		c := rawOpen(t, addr, fmt.Sprintf("/ws/ns-%02d", i))
		c.mustCounter(1)
		clients = append(clients, c)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, c := range clients {
		c.mustClose(closeGoingAway)
		c.write(closeOf(closeGoingAway, ""))
		c.mustEOF()
	}
	log := rest()
	if err := cmd.Wait(); err != nil {
		t.Errorf("program ended with %v, want exit code 0", err)
	}
	if got := strings.Count(log, "reason=stop"); got != len(clients) {
		t.Errorf("%d sessions ended by the stop, want %d; log:\n%s", got, len(clients), log)
	}
	if !strings.Contains(log, "msg=stopped server=backend-3") {
		t.Errorf("no line \"stopped\" in the log:\n%s", log)
	}
}

// startProgram runs the test binary as backend; rest reads its log to the end.
func startProgram(t *testing.T, args ...string) (cmd *exec.Cmd, addr string, rest func() string) {
	t.Helper()
	cmd = exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asMain+"=1")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	log := bufio.NewReader(stderr)
	first, err := log.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`listen=(\S+)`).FindStringSubmatch(first)
	if found == nil {
		t.Fatalf("no address in %q", first)
	}
	return cmd, found[1], func() string {
		b, err := io.ReadAll(log)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
}

// TestOneGoroutinePerSession holds what a connection costs at rest.
func TestOneGoroutinePerSession(t *testing.T) {
	cfg := quietConfig()
	cfg.interval = time.Hour
	s := startServer(t, cfg)
	rawOpen(t, s.addr, "/ws/ns-01").mustCounter(1) // the server is up
	before := runtime.NumGoroutine()
	const sessions = 50
	for range sessions {
		rawOpen(t, s.addr, "/ws/ns-01").mustCounter(1)
	}
	var more int
	for range 100 { // the goroutines of net/http end a moment after the 101
		if more = runtime.NumGoroutine() - before; more <= sessions {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines more for %d sessions", more, sessions)
}

func TestXNetClient(t *testing.T) {
	s := startServer(t, quietConfig())
	ws, err := websocket.Dial("ws://"+s.addr+"/ws/ns-01", "", "http://anywhere.example")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	var got message
	if err := websocket.JSON.Receive(ws, &got); err != nil {
		t.Fatal(err)
	}
	if want := (message{Server: "backend-0", Counter: 1, NS: "ns-01"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

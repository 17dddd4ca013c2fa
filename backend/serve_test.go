package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestHTTP(t *testing.T) {
	page := filepath.Join(t.TempDir(), "index.html")
	if err := os.WriteFile(page, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := quietConfig()
	cfg.page = page
	s := startServer(t, cfg, "tcp")
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
			resp, body := rawDial(t, s.addr).ask(get(tt.path))
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
	if _, body := rawDial(t, s.addr).ask(get("/")); body != "second" {
		t.Errorf("page %q after the file changed, want second", body)
	}
}

// get is a request that leaves no connection behind. Dots in the path stay.
func get(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n"
}

// TestNamespaceIsDecodedOnce: the backend reads a path as the router does.
func TestNamespaceIsDecodedOnce(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	for path, want := range map[string]string{
		"/ws/ns-01/a": "ns-01", "/ws/my%20room": "my room", "/ws/caf%C3%A9": "café", "/ws/doc:42@x+y": "doc:42@x+y", "/ws/a%2541": "a%41",
		"/ws/a%2Fb/c": "a/b",
	} {
		c := rawOpen(t, s.addr, path)
		if got := c.mustCounter(1).NS; got != want {
			t.Errorf("%s is of %q, want %q", path, got, want)
		}
	}
}

func TestUpgrades(t *testing.T) {
	for name, tt := range map[string]struct {
		named    bool
		request  string
		code     int
		protocol string
	}{
		"no version and no key":           {true, "GET /ws/ns-01 HTTP/1.1\r\nHost: backend\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400, ""},
		"no router":                       {true, head("/ws/ns-01"), 101, ""},
		"the first subprotocol is chosen": {true, head("/ws/ns-01", "Sec-WebSocket-Protocol: chat, superchat"), 101, "chat"},
		"a router means it":               {true, head("/ws/ns-01", "X-Router-Backend: backend-0"), 101, ""},
		"a router has an old address":     {true, head("/ws/ns-01", "X-Router-Backend: backend-2"), 421, ""},
		"it has no backend's name":        {false, head("/ws/ns-01", "X-Router-Backend: backend-2"), 101, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := quietConfig()
			cfg.named = tt.named
			resp, _ := rawDial(t, startServer(t, cfg, "tcp").addr).ask(tt.request)
			if got := resp.Header.Get("Sec-WebSocket-Protocol"); resp.StatusCode != tt.code || got != tt.protocol {
				t.Errorf("status %s, subprotocol %q; want %d and %q", resp.Status, got, tt.code, tt.protocol)
			}
		})
	}
}

// The name of a StatefulSet's pod ends with its ordinal.
func TestHasOrdinal(t *testing.T) {
	for host, want := range map[string]bool{"backend-2": true, "a-b-10": true, "laptop": false, "my-laptop": false, "7": false, "": false} {
		if got := hasOrdinal(host); got != want {
			t.Errorf("hasOrdinal(%q) = %v, want %v", host, got, want)
		}
	}
}

func TestStopRefusesNewWork(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	s.refuse()
	for _, request := range []string{get("/healthz"), head("/ws/ns-01")} {
		if resp, body := rawDial(t, s.addr).ask(request); resp.StatusCode != 503 || body != "stopping\n" {
			t.Errorf("%.12s: %s %q, want 503", request, resp.Status, body)
		}
	}
}

// A client that does not answer the Close gets nothing after it, and is cut.
func TestStopCutsSilentClients(t *testing.T) {
	cfg := quietConfig()
	cfg.closeTime, cfg.interval = 50*time.Millisecond, time.Millisecond
	s := startServer(t, cfg, "tcp")
	c := rawOpen(t, s.addr, "/ws/ns-01")
	c.mustCounter(1)
	s.stop()
	c.mustClose(closeGoingAway)
	c.mustEOF() // for 50 ticks there was nothing
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
	s := startServer(t, cfg, "tcp")
	rawOpen(t, s.addr, "/ws/ns-01").mustCounter(1) // the server is up
	before := runtime.NumGoroutine()
	const sessions = 50
	for range sessions {
		rawOpen(t, s.addr, "/ws/ns-01").mustCounter(1)
	}
	more := sessions + 1
	for end := time.Now().Add(patience); more > sessions && time.Now().Before(end); time.Sleep(time.Millisecond) {
		more = runtime.NumGoroutine() - before // those of net/http end a moment after the 101
	}
	if more > sessions {
		t.Errorf("%d goroutines more for %d sessions", more, sessions)
	}
}

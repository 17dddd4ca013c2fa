package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// asMain makes the test binary behave as the program.
const asMain = "BACKEND_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asMain) != "" {
		main()
		return
	}
	code, left := m.Run(), otherStacks()
	for end := time.Now().Add(patience); left != "" && time.Now().Before(end); left = otherStacks() {
		time.Sleep(10 * time.Millisecond)
	}
	if code == 0 && left != "" {
		fmt.Fprintf(os.Stderr, "leaked goroutines:\n\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// patience bounds every wait for what should come soon.
const patience = 20 * time.Second

// otherStacks returns the stacks of all goroutines but this one.
func otherStacks() string {
	buf := make([]byte, 1<<20)
	_, others, _ := strings.Cut(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	return others
}

// logBuffer collects what a server logs.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// testServer is a running server on a port of its own.
type testServer struct {
	*server
	addr string
	log  *logBuffer
	stop func() // idempotent; also called by Cleanup
}

func quietConfig() config {
	return config{name: "backend-0", named: true, writeTime: 5 * time.Second, closeTime: 5 * time.Second}
}

func quietLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

// startServer runs a server until the test ends. network is "tcp" or "unix".
func startServer(t *testing.T, cfg config, network string) *testServer {
	t.Helper()
	addr := map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "sock")}[network]
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	return startServerOn(t, cfg, ln)
}

func startServerOn(t *testing.T, cfg config, ln net.Listener) *testServer {
	t.Helper()
	log := &logBuffer{}
	s := newServer(cfg, slog.New(slog.NewTextHandler(log, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.serve(ctx, ln) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return &testServer{s, ln.Addr().String(), log, stop}
}

// runProgram runs the program with this standard input, and returns its exit code and
// output.
func runProgram(t *testing.T, stdin string, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e logBuffer
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	code = exitCode(run(ctx, args, stdio{strings.NewReader(stdin), &o, &e}), &e)
	return code, o.String(), e.String()
}

func TestHelpIsGolden(t *testing.T) {
	want, err := os.ReadFile(filepath.Join("testdata", "help.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if code, out, errOut := runProgram(t, "", "-h"); code != 0 || out != string(want) || errOut != "" {
		t.Errorf("exit code %d, stderr %q; help differs from testdata/help.txt if this is another:\n%s", code, errOut, out)
	}
}

func TestWrongCommandLine(t *testing.T) {
	tests := map[string]struct {
		args []string
		code int
		says string
	}{
		"unknown flag":      {[]string{"-x"}, 2, "-x"},
		"bad duration":      {[]string{"-interval", "fast"}, 2, `"fast"`},
		"negative interval": {[]string{"-interval", "-1s"}, 2, "-interval -1s"},
		"no write time":     {[]string{"-write-time", "0s"}, 2, "-write-time 0s"},
		"no close time":     {[]string{"-close-time", "0s"}, 2, "-close-time 0s"},
		"bad level":         {[]string{"-log-level", "loud"}, 2, `"loud"`},
		"argument":          {[]string{"serve"}, 2, `"serve"`},
		"client flag":       {[]string{"-n", "1"}, 2, "need -connect"},
		"save delay":        {[]string{"-save-delay", "-1s"}, 2, "-save-delay -1s"},
		"https store":       {[]string{"-store", "https://store"}, 2, "https://store"},
		"store with a path": {[]string{"-store", "http://store/a"}, 2, "http://host:port"},
		"directory alone":   {[]string{"-store-dir", "/tmp"}, 2, "needs -store-listen"},
		"store of a store":  {[]string{"-store-listen", ":0", "-store", "http://a"}, 2, "excludes"},
		"negative count":    {[]string{"-connect", "ws://h/", "-n", "-1"}, 2, "-n -1"},
		"http URL":          {[]string{"-connect", "http://h/ws/a"}, 2, `"http://h/ws/a"`},
		"URL without host":  {[]string{"-connect", "ws:///ws/a"}, 2, "ws://host/path"},
		"no page":           {[]string{"-page", "/nowhere.html"}, 1, `-page "/nowhere.html"`},
		"page is a folder":  {[]string{"-page", "/"}, 1, "not a file"},
		"bad address":       {[]string{"-listen", "127.0.0.1:99999"}, 1, "99999"},
		"no CA file":        {[]string{"-connect", "wss://127.0.0.1:1/", "-ca", "/nowhere.pem"}, 1, "/nowhere.pem"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if code, _, errOut := runProgram(t, "", tt.args...); code != tt.code || !strings.Contains(errOut, tt.says) {
				t.Errorf("exit code %d, stderr %q; want %d and %q in it", code, errOut, tt.code, tt.says)
			}
		})
	}
}

func TestNameIsHostNameByDefault(t *testing.T) {
	want, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if cfg, err := parseFlags(nil, io.Discard); err != nil || cfg.name != want {
		t.Errorf("name %q, %v; want %q", cfg.name, err, want)
	}
}

func TestExitCodeOfWrappedErrors(t *testing.T) {
	wrapped := fmt.Errorf("outer: %w", usageError{errors.New("inner")})
	if got := exitCode(wrapped, io.Discard); got != 2 {
		t.Errorf("exit code %d, want 2", got)
	}
}

// rawClosedAddr is an address at which nobody listens.
func rawClosedAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

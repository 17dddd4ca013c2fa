package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// asRouter in the environment makes the test binary behave as the program.
const asRouter = "TEST_BINARY_IS_ROUTER"

// update writes the golden files anew.
var update = flag.Bool("update", false, "write testdata anew; testdata/owners.txt only if it is missing")

func TestMain(m *testing.M) {
	if os.Getenv(asRouter) != "" {
		go tellMemory()
		main()
		return
	}
	code := m.Run()
	http.DefaultClient.CloseIdleConnections()
	if left := leakedGoroutines(); code == 0 && len(left) > 0 {
		for stack, count := range left {
			fmt.Fprintf(os.Stderr, "%d leaked goroutines:\n%s\n\n", count, stack)
		}
		code = 1
	}
	os.Exit(code)
}

// tellMemory writes for each SIGHUP what is left in use of the heap and the
// stacks after a collection, as a line of the log.
func tellMemory() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGHUP)
	for range asked {
		used := userMemory()
		debug.FreeOSMemory()
		fmt.Printf("{\"msg\":\"memory\",\"used\":%d}\n", used)
	}
}

// leakedGoroutines gives goroutines some time to end and returns the stacks of
// the rest, with how many there are of each.
func leakedGoroutines() (left map[string]int) {
	for range 50 {
		if left = otherGoroutines(); len(left) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return left
}

// otherGoroutines returns the stacks of all goroutines but this one and those
// that nobody can end.
func otherGoroutines() map[string]int {
	buf := make([]byte, 8<<20)
	parent := regexp.MustCompile(` in goroutine \d+`)
	stacks := map[string]int{}
	for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")[1:] {
		_, frames, _ := strings.Cut(stack, "\n") // the first line has the number and the state
		if !strings.Contains(frames, "os/signal.signal_recv") {
			stacks[strings.TrimSpace(parent.ReplaceAllString(frames, ""))]++
		}
	}
	return stacks
}

// logTail takes a router's log in JSON, and says when a line has come.
type logTail struct {
	mu    sync.Mutex
	rest  []byte           // of a line that has not ended
	lines []map[string]any // those that are JSON
	more  chan struct{}    // closed when lines grow
}

func newLogTail() *logTail { return &logTail{more: make(chan struct{})} }

func (l *logTail) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, b...)
	for {
		line, rest, ended := bytes.Cut(l.rest, []byte("\n"))
		if !ended {
			return len(b), nil
		}
		l.rest = rest
		fields := map[string]any{}
		if json.Unmarshal(line, &fields) == nil {
			l.lines = append(l.lines, fields)
			close(l.more)
			l.more = make(chan struct{})
		}
	}
}

// all returns the lines so far with this message.
func (l *logTail) all(msg string) (found []map[string]any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, fields := range l.lines {
		if fields["msg"] == msg {
			found = append(found, fields)
		}
	}
	return found
}

// wait returns the n-th line with this message, counted from 1, once it is
// there.
func (l *logTail) wait(t testing.TB, msg string, n int) map[string]any {
	t.Helper()
	timeout := time.After(patience)
	for {
		l.mu.Lock()
		more := l.more
		l.mu.Unlock()
		if found := l.all(msg); len(found) >= n {
			return found[n-1]
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("no line %d with msg=%q in the log", n, msg)
		}
	}
}

// runningRouter is a router on ports of its own.
type runningRouter struct {
	log         *logTail
	ws, admin   string // the start of URLs
	front, side string // addresses
}

// await reads from the log where the router listens.
func (r *runningRouter) await(t testing.TB) {
	t.Helper()
	line := r.log.wait(t, "serving", 1)
	r.front, r.side = line["listen"].(string), line["admin"].(string)
	r.ws, r.admin = "ws://"+r.front+"/ws/", "http://"+r.side
}

// get asks the admin port.
func (r *runningRouter) get(t testing.TB, path string) (status int, body string) {
	t.Helper()
	resp, err := http.Get(r.admin + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// open makes a session and waits for its first echo.
func (r *runningRouter) open(t testing.TB, namespace string) *websocket.Conn {
	t.Helper()
	config, err := websocket.NewConfig(r.ws+namespace, "http://origin.example/")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ws, err := config.DialContext(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	ws.SetDeadline(time.Now().Add(2 * patience))
	sayAndHear(t, ws, "hello")
	return ws
}

func sayAndHear(t testing.TB, ws *websocket.Conn, text string) {
	t.Helper()
	var got string
	if err := errors.Join(websocket.Message.Send(ws, text), websocket.Message.Receive(ws, &got)); err != nil {
		t.Fatal(err)
	}
	if got != text {
		t.Fatalf("heard %q, want %q", got, text)
	}
}

// onFreePorts are the flags of every router that a test starts.
var onFreePorts = []string{"-listen", "127.0.0.1:0", "-admin", "127.0.0.1:0", "-log-format", "json", "-pod", "router-x"}

// startRouter runs the router in this process until the test ends.
func startRouter(t testing.TB, args ...string) *runningRouter {
	t.Helper()
	r := &runningRouter{log: newLogTail()}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	args = slices.Concat(onFreePorts, []string{"-drain-time", "0"}, args)
	go func() { done <- run(ctx, args, noEnvironment, r.log) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	r.await(t)
	return r
}

func noEnvironment(string) string { return "" }

// echoBackends starts WebSocket servers that send back what they get, and
// returns the list of their addresses for -backends.
func echoBackends(t testing.TB, count int) string {
	t.Helper()
	var addrs []string
	for range count {
		addrs = append(addrs, websocketBackend(t, func(ws *websocket.Conn) { io.Copy(ws, ws) }))
	}
	return strings.Join(addrs, ",")
}

// websocketBackend starts a WebSocket server and returns its address.
func websocketBackend(t testing.TB, serve func(*websocket.Conn)) string {
	t.Helper()
	s := httptest.NewServer(websocket.Server{Handler: serve})
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// overridesDir returns a directory for -overrides.
func overridesDir(t testing.TB, data map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for namespace, value := range data {
		if err := os.WriteFile(filepath.Join(dir, namespace), []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestRunDrainsOnFailure: a listener that fails ends the program with its
// error, after the same orderly stop.
func TestRunDrainsOnFailure(t *testing.T) {
	log := newLogTail()
	args := []string{"-backends", echoBackends(t, 1), "-kube", "none", "-overrides", t.TempDir(), "-drain-time", "0", "-log-format", "json"}
	c, err := parseConfig(args, noEnvironment, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	logger, err := newLogger(log, c.logFormat, c.logLevel)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProgram(c, noEnvironment, logger)
	if err != nil {
		t.Fatal(err)
	}
	front, side := listenLocal(t), listenLocal(t)
	front.Close()
	err = p.serve(t.Context(), front, side)
	if !errors.Is(err, net.ErrClosed) || exitCode(err) != 1 {
		t.Errorf("error %v with exit code %d, want that of the closed listener and 1", err, exitCode(err))
	}
	if len(log.all("stopped")) != 1 {
		t.Error("no line with msg=stopped in the log, want an orderly stop")
	}
}

// With -namespace-from=host, a key that no host name can have is rejected, and /owner
// says of each name what its clients find.
func TestRunNamespaceFromHost(t *testing.T) {
	tenant, dotted := hashedTo(t, "tenant", 0, 2), hashedTo(t, "dotted", 0, 2)
	upper := strings.ToUpper(tenant)
	dir := overridesDir(t, map[string]string{"ns-01": "backend-1", "under_score": "backend-1", upper: "backend-1", dotted + ".name": "backend-1",
		strings.Repeat("a", 64): "backend-1"})
	r := startRouter(t, "-backends", echoBackends(t, 2), "-overrides", dir, "-namespace-from", "host")
	line := r.log.wait(t, "table", 1)
	if line["rejected"] != 3.0 || line["overrides"] != 2.0 {
		t.Errorf("%v, want 3 entries rejected", line)
	}
	bad := r.log.wait(t, "entry rejected", 3)
	if bad["want"] != labelFault("") || bad["kept"] != "nothing" {
		t.Errorf("%v", bad)
	}
	waitMetrics(t, r, map[string]float64{`router_table_rejected_entries{object="directory ` + dir + `"}`: 3})
	for i, one := range []struct{ host, asked, namespace, owner, why string }{
		{"NS-01.mydomain.com", "NS-01", "ns-01", "backend-1", "override"},
		{upper + ".mydomain.com", upper, tenant, "backend-0", "hash"},
		{dotted + ".name.mydomain.com", dotted, dotted, "backend-0", "hash"},
		{"under_score.mydomain.com", "under_score", "under_score", "backend-1", "override"},
	} {
		r.sayToHost(t, one.host)
		if ended := r.log.wait(t, "session ended", i+1); ended["namespace"] != one.namespace || ended["backend"] != one.owner {
			t.Errorf("%s: %v, want it of %s with %s", one.host, ended, one.namespace, one.owner)
		}
		status, body := r.get(t, "/owner?namespace="+one.asked)
		var o ownership
		if err := json.Unmarshal([]byte(body), &o); err != nil || status != 200 || o.Namespace != one.namespace || o.Owner != one.owner || o.Why != one.why {
			t.Errorf("/owner of %s is %d %s, want %s with %s", one.asked, status, body, one.namespace, one.owner)
		}
		if one.asked == upper && (len(o.Rejected) != 1 || o.Rejected[0].Key != upper || o.Rejected[0].Want != labelFault("")) {
			t.Errorf("/owner of %s is %s, want the key that is rejected", one.asked, body)
		}
	}
	for _, namespace := range []string{dotted + ".name", strings.Repeat("a", 64), ".."} {
		status, body := r.get(t, "/owner?namespace="+namespace)
		var no struct{ Error string }
		if err := json.Unmarshal([]byte(body), &no); err != nil || status != 400 || !strings.HasSuffix(no.Error, ", want "+labelFault(namespace)) {
			t.Errorf("/owner of %s is %d %s, want 400 with %s", namespace, status, body, labelFault(namespace))
		}
	}
}

// sayToHost opens a session by the host's name, and ends it.
func (r *runningRouter) sayToHost(t *testing.T, host string) {
	t.Helper()
	config, err := websocket.NewConfig("ws://"+host+"/any/path", "http://origin.example/")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", r.front)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		t.Fatal(err)
	}
	sayAndHear(t, ws, "hello")
	ws.Close()
}

// listenLocal listens on any port until the test ends.
func listenLocal(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

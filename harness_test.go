package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// asRouter in the environment makes the test binary behave as the program.
const asRouter = "TEST_BINARY_IS_ROUTER"

// update writes the golden files anew.
var update = flag.Bool("update", false, "write testdata anew, except for testdata/owners.txt")

func TestMain(m *testing.M) {
	if os.Getenv(asRouter) != "" {
		go tellMemory()
		main()
		return
	}
	code := m.Run()
	http.DefaultClient.CloseIdleConnections()
	left := otherGoroutines()
	for end := time.Now().Add(time.Second); len(left) > 0 && time.Now().Before(end); left = otherGoroutines() {
		time.Sleep(20 * time.Millisecond)
	}
	for stack, count := range left {
		fmt.Fprintf(os.Stderr, "%d leaked goroutines:\n%s\n\n", count, stack)
		code = max(code, 1)
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

// patience bounds every wait of a test that should not wait. A machine that is busy with other
// things can take 10 s to start a program.
const patience = 30 * time.Second

// wholeProof is for "make handoff".
var wholeProof = flag.Bool("whole", false, "run the proofs of the hand-off at their whole size")

// proofSize returns the first for go test, and the second for "make handoff".
func proofSize[T any](short, whole T) T {
	if *wholeProof {
		return whole
	}
	return short
}

// eventually polls until get returns want. It fails the test if that takes too long.
func eventually[T comparable](t testing.TB, what string, want T, get func() T) {
	t.Helper()
	for end, pause := time.Now().Add(2*patience), time.Millisecond; ; time.Sleep(pause) {
		got := get()
		if got == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v, want %v", what, got, want)
		}
		pause = min(2*pause, 10*time.Millisecond)
	}
}

// wantEqual checks that something is as wanted.
func wantEqual[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// seedFlag repeats a random test.
var seedFlag = flag.Uint64("seed", 0, "seed of the random tests of the relay; 0 for another each time")

// randomSeed returns the seed of a test, which is in its log.
func randomSeed(t testing.TB) uint64 {
	t.Helper()
	seed := *seedFlag
	for seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("repeat with -seed %d", seed)
	return seed
}

// logUniform returns 0 to most, as often below 100 as from 100 to 10,000.
func logUniform(rng *rand.Rand, limit int) int {
	return int(math.Exp2(rng.Float64()*math.Log2(float64(limit)+1))) - 1
}

// raced reports whether the race detector is on.
func raced() bool {
	info, _ := debug.ReadBuildInfo() // a test binary has it
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// userMemory is what this process has in use for the heap and stacks, in bytes.
// The far ends' part is in it too; the kernel's buffers are not.
func userMemory() int64 {
	for range 2 { // what was put in a sync.Pool outlives one
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

func noEnvironment(string) string { return "" }

// withoutRace runs the test again, in a process without the race detector, and reports
// whether it did: in one with it, hundreds of goroutines in a synctest bubble, some of which
// timers start, crash the detector itself (Go 1.26: SIGSEGV in its store of stacks).
func withoutRace(t *testing.T) bool {
	t.Helper()
	info, ok := debug.ReadBuildInfo()
	setting := func(key string) string {
		for _, s := range info.Settings {
			if s.Key == key {
				return s.Value
			}
		}
		return ""
	}
	if !ok || setting("-race") != "true" {
		return false
	}
	args := []string{"test", "-count=1", "-tags", setting("-tags"), "-run", "^" + t.Name() + "$", "."}
	out, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput()
	if err != nil {
		t.Errorf("go %v: %v\n%s", args, err, out)
	}
	return true
}

// must is for what does not fail.
func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// logTail takes a router's log in JSON, and says when a line has come.
type logTail struct {
	mu    sync.Mutex
	rest  []byte           // of a line that has not ended
	lines []map[string]any // those that are JSON
	more  chan struct{}    // closed when lines grow
}

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

func newLogTail() *logTail { return &logTail{more: make(chan struct{})} }

// wantLine checks how many lines there are, and fields of the last.
func wantLine(t *testing.T, lines []map[string]any, count int, want map[string]any) {
	t.Helper()
	if len(lines) != count {
		t.Fatalf("%d lines, want %d: %v", len(lines), count, lines)
	}
	for key, value := range want {
		if got := lines[count-1][key]; got != value {
			t.Errorf("%s=%v in the log, want %v", key, got, value)
		}
	}
}

// runningRouter is a router on ports of its own.
type runningRouter struct {
	log                   *logTail
	ws, admin             string // the start of URLs
	clientAddr, adminAddr string // addresses
	stop                  func() // stops it and waits; only the first call does
}

// await reads from the log where the router listens.
func (r *runningRouter) await(t testing.TB) {
	t.Helper()
	line := r.log.wait(t, "serving", 1)
	r.clientAddr, r.adminAddr = line["listen"].(string), line["admin"].(string)
	r.ws, r.admin = "ws://"+r.clientAddr+"/ws/", "http://"+r.adminAddr
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
var onFreePorts = []string{"-listen", "127.0.0.1:0", "-admin", "127.0.0.1:0", "-log-format", "json", "-pod-name", "router-x"}

// startRouter runs the router in this process until the test ends.
func startRouter(t testing.TB, args ...string) *runningRouter {
	t.Helper()
	r := &runningRouter{log: newLogTail()}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	args = slices.Concat(onFreePorts, []string{"-drain-duration", "0"}, args)
	go func() { done <- run(ctx, args, noEnvironment, r.log) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	r.await(t)
	return r
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

// waitBody asks until the answer is the one that is wanted.
func waitBody(t *testing.T, r *runningRouter, path string, wantStatus int, want string) {
	t.Helper()
	eventually(t, path, fmt.Sprintf("%d %q", wantStatus, want), func() string {
		status, body := r.get(t, path)
		return fmt.Sprintf("%d %q", status, body)
	})
}

// scrape reads the metrics of a running router.
func scrape(t *testing.T, r *runningRouter) *exposition {
	t.Helper()
	_, body := r.get(t, "/metrics")
	e, err := parseExposition(body)
	if err != nil {
		t.Fatalf("%v\n%s", err, body)
	}
	return e
}

// waitMetrics scrapes until the series have these values: a client may have its
// answer before it was counted.
func waitMetrics(t *testing.T, r *runningRouter, values map[string]float64) (e *exposition) {
	t.Helper()
	eventually(t, "the metrics lack", "", func() string {
		e = scrape(t, r)
		return e.lacks(values)
	})
	return e
}

// stubBackend is a listener whose connections are served by the function it was
// made with, which gets the request and what follows it.
type stubBackend struct {
	addr string

	// Guarded by mu.
	mu    sync.Mutex
	seen  []string // the heads of the requests, as sent
	conns []net.Conn
}

func (b *stubBackend) heads() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.seen...)
}

// startStub serves on addr, "127.0.0.1:0" for any port. After serve returns the
// connection is closed.
func startStub(t testing.TB, addr string, serve func(conn net.Conn, br *bufio.Reader)) *stubBackend {
	t.Helper()
	return serveStub(t, listenAt(t, addr), serve)
}

// serveStub is startStub with a listener.
func serveStub(t testing.TB, l net.Listener, serve func(conn net.Conn, br *bufio.Reader)) *stubBackend {
	t.Helper()
	b := &stubBackend{addr: l.Addr().String()}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			b.conns = append(b.conns, conn)
			b.mu.Unlock()
			running.Go(func() {
				defer conn.Close()
				br := bufio.NewReader(conn)
				head, err := readHead(br)
				if err != nil {
					return // a probe, or a client that gave up
				}
				b.mu.Lock()
				b.seen = append(b.seen, head)
				b.mu.Unlock()
				serve(conn, br)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		b.mu.Lock()
		for _, conn := range b.conns {
			conn.Close()
		}
		b.mu.Unlock()
		running.Wait()
	})
	return b
}

// readHead reads up to and with the empty line.
func readHead(br *bufio.Reader) (string, error) {
	var head strings.Builder
	for {
		line, err := br.ReadString('\n')
		head.WriteString(line)
		if err != nil || line == "\r\n" {
			return head.String(), err
		}
	}
}

const switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"

// echo switches and sends back what comes.
func echo(conn net.Conn, br *bufio.Reader) {
	io.WriteString(conn, switching)
	io.Copy(conn, br)
}

// answer returns a backend that gives one answer and waits for the other side
// to close.
func answer(text string) func(net.Conn, *bufio.Reader) {
	return func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, text)
		if strings.Contains(text, " 101 ") {
			io.Copy(io.Discard, br)
		}
	}
}

// silent never answers.
func silent(conn net.Conn, br *bufio.Reader) { io.Copy(io.Discard, br) }

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

// dial connects to addr, or to the Unix socket if addr is a path, until the test ends.
func dial(t testing.TB, addr string) net.Conn {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	conn, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// listenLocal listens on any port until the test ends.
func listenLocal(t testing.TB) net.Listener {
	t.Helper()
	return listenAt(t, "127.0.0.1:0")
}

// fullListener listens until the test ends. Its backlog is full, so a dial of it waits
// until the test accepts what is before it.
func fullListener(t *testing.T) net.Listener {
	t.Helper()
	l := listenLocal(t)
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 0) })
	for err == nil {
		var conn net.Conn
		conn, err = net.DialTimeout("tcp", l.Addr().String(), 100*time.Millisecond)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
		}
	}
	return l
}

// listenAt listens until the test ends.
func listenAt(t testing.TB, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// freeAddr returns an address where somebody may listen.
func freeAddr(t testing.TB) string {
	t.Helper()
	return "127.0.0.1:" + freePort(t)
}

// freePort returns a port on which somebody may listen, now and again later. It is below those
// that a system gives to connections and to listeners of port 0.
func freePort(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(10_000 + rand.IntN(20_000))
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("none of 100 ports is free")
	return ""
}

// refusingAddr returns an address where nobody listens, or can until the test
// ends: its port is that of a connection.
func refusingAddr(t testing.TB) string {
	t.Helper()
	conn, _ := tcpPair(t)
	return conn.LocalAddr().String()
}

// testProxy is a proxy that serves on addr.
type testProxy struct {
	*proxy
	addr     string
	fastPath *fastPath
	http     atomic.Int64 // clients that net/http had
	tail     *logTail     // of its log
	stop     func()       // stops it as a router stops its clients; only the first call does

	drainDuration time.Duration // of stop
}

// ask sends the request as it stands, and returns the connection and the answer
// with its body still on it.
func (p *testProxy) ask(t testing.TB, request string) (*net.TCPConn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn := dial(t, p.addr)
	mustWrite(t, conn, request)
	conn.SetReadDeadline(time.Now().Add(patience))
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	return conn.(*net.TCPConn), br, resp
}

// open makes a session and returns the client's end.
func (p *testProxy) open(t testing.TB, namespace string) *net.TCPConn {
	t.Helper()
	conn, br, resp := p.ask(t, upgradeRequest("/ws/"+namespace))
	if resp.StatusCode != http.StatusSwitchingProtocols || br.Buffered() > 0 {
		t.Fatalf("status %s and %d bytes, want 101 and none", resp.Status, br.Buffered())
	}
	return conn
}

// waitResult waits until the result was counted.
func (p *testProxy) waitResult(t testing.TB, want result) {
	t.Helper()
	eventually(t, fmt.Sprintf("an upgrade with result %v", want), true, func() bool { return p.results[want].Load() > 0 })
}

// mustRefuse checks the text of an answer, and that the reason is in it, where that is
// the client's fault, or else in the log.
func (p *testProxy) mustRefuse(t testing.TB, status int, body, reason string) {
	t.Helper()
	text := body
	if sentence, ok := sentences()[status]; ok {
		if body != sentence {
			t.Errorf("the client of a %d reads %q, want %q", status, body, sentence)
		}
		text = fmt.Sprint(p.tail.wait(t, "upgrade failed", 1)["error"])
	}
	if !strings.Contains(text, reason) {
		t.Errorf("the reason of a %d is %q, want %q in it", status, text, reason)
	}
}

// startProxy serves a proxy to the backends at addrs, with the given overrides
// unless they are nil. change, if not nil, sees it before it starts.
func startProxy(t testing.TB, addrs []string, data map[string]string, change func(*proxy)) *testProxy {
	t.Helper()
	tail := newLogTail()
	log := slog.New(slog.NewJSONHandler(tail, nil))
	c := &config{statefulSet: "backend", podName: "router-x", namespaceMatcher: defaultMatcher(t), limits: limits{
		holdTimeout: patience, upgradeTimeout: patience, headerTimeout: patience,
		headerBytes: 8 << 10, headerFields: 100, sessions: 1000, pendingRequests: 1000,
	}}
	fdLimit := wideDescriptorLimit(t)
	p := newProxy(c, newStaticBackends("backend", addrs), fdLimit, log)
	p.relay.clientTLS = true
	if data != nil {
		p.tables.update(sourceContent{id: sourceID{name: "test"}, version: "41", overrides: newOverrideSet(data)})
	}
	if change != nil {
		change(p)
	}
	must(t, p.relay.start())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	tp := &testProxy{proxy: p, addr: l.Addr().String(), fastPath: newFastPath(p, l, fdLimit), tail: tail}
	server := newClientServer(ctx, p, log)
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			tp.http.Add(1)
		}
	}
	var running sync.WaitGroup
	running.Go(tp.fastPath.run)
	running.Go(func() { server.Serve(tp.fastPath) })
	running.Go(func() { p.mover.run(ctx) })
	var once sync.Once
	tp.stop = func() {
		once.Do(func() {
			c := &config{drainDuration: tp.drainDuration}
			(&program{config: c, proxy: p, log: log}).stopClients(tp.fastPath, server, cancel)
		})
	}
	t.Cleanup(func() {
		once.Do(func() { // as stop, without the Close frames
			tp.fastPath.stop()
			cancel(errDraining)
			server.Close()
			p.upgradesInHTTP.wait()
			over, cancelForwarded := context.WithCancel(t.Context())
			cancelForwarded()
			p.forwarder.stop(over)
			p.relay.endAll(causeDrain)
			p.relay.stop()
			p.mover.flights.stop()
		})
		running.Wait()
		p.mover.releases.close()
	})
	return tp
}

// upgradeRequest is an upgrade of path as a browser would send it.
func upgradeRequest(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: www.mydomain.com\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: https://www.mydomain.com\r\n\r\n"
}

// bothWays are the two ways of an upgrade: the fast path takes what is simple, and
// net/http the other, as its target is in absolute form.
func bothWays(path string) map[string]string {
	return map[string]string{"simple": upgradeRequest(path), "net/http": upgradeRequest("http://www.mydomain.com" + path)}
}

// both has a test run with an upgrade of ns-01 in both ways.
func both(t *testing.T, test func(t *testing.T, request string)) {
	for name, request := range bothWays("/ws/ns-01") {
		t.Run(name, func(t *testing.T) { test(t, request) })
	}
}

// send writes an upgrade request without waiting for its answer.
func (p *testProxy) send(t testing.TB, namespace string) net.Conn {
	t.Helper()
	conn := dial(t, p.addr)
	mustWrite(t, conn, upgradeRequest("/ws/"+namespace))
	return conn
}

// underWay is how many upgrades are.
func (p *testProxy) underWay() int { return p.pending.inUse() }

// headBytes returns how many bytes of heads the limit counts.
func (p *testProxy) headBytes() int {
	p.pending.mu.Lock()
	defer p.pending.mu.Unlock()
	return p.pending.headBytes
}

// waitPending waits until n upgrades are under way.
func (p *testProxy) waitPending(t testing.TB, n int) {
	t.Helper()
	eventually(t, "upgrades under way", n, p.underWay)
}

func (p *testProxy) waitSessions(t testing.TB, n int) {
	t.Helper()
	eventually(t, "sessions", n, p.relay.size)
}

func mustAnswer(t testing.TB, conn net.Conn, status int) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != status {
		t.Fatalf("answer %+v, %v; want %d", resp, err, status)
	}
}

// sentences are all that clients read about what is not their fault.
func sentences() map[int]string {
	return map[int]string{
		502: "the backend gave no valid answer\n",
		503: "the service is not available now, try again later\n",
		504: "the backend gave no answer in time\n",
	}
}

// wideDescriptorLimit is a limit that nobody waits for.
func wideDescriptorLimit(t testing.TB) *descriptorLimit {
	t.Helper()
	g, err := newDescriptorLimit(1<<20, 1, 1<<20, 1)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// relayed is a session with the far ends of its sockets.
type relayed struct {
	*session
	relay           *relay
	client, backend halfConn
}

// ends returns both far ends, by side.
func (c relayed) ends() [2]halfConn { return [2]halfConn{c.client, c.backend} }

func (c relayed) wantCause(t testing.TB, want cause) {
	t.Helper()
	waitFor(t, c.relay)
	if got := cause(c.cause.Load()); got != want {
		t.Errorf("cause = %v, want %v", got, want)
	}
	if got := c.relay.ended[want].Load(); got != 1 {
		t.Errorf("ended[%v] = %d, want 1", want, got)
	}
}

// wantAccount checks what is counted and logged of a session that has ended, the
// only one of its relay.
func (c relayed) wantAccount(t *testing.T, tail *logTail, taken [2]int64, least, most time.Duration) {
	t.Helper()
	r, got := c.relay, c.relay.bytes()
	for i := clientSide; i <= backendSide; i++ {
		if got[i] != taken[i] && taken[i] >= 0 {
			t.Errorf("%d bytes came from side %d, want %d", got[i], i, taken[i])
		}
	}
	wantLine(t, tail.all("session ended"), 1, map[string]any{"level": "INFO", "namespace": c.namespace,
		"backend": r.backendName(c.session.backend), "cause": cause(c.cause.Load()).String(), "client": c.clientAddrs,
		"bytes_to_backend": float64(got[clientSide]), "bytes_to_client": float64(got[backendSide])})
	seconds := tail.all("session ended")[0]["seconds"].(float64)
	if seconds < least.Seconds() || seconds > most.Seconds() {
		t.Errorf("seconds=%v in the log, want %v to %v", seconds, least.Seconds(), most.Seconds())
	}
	var ended int64
	for i := range r.ended {
		ended += r.ended[i].Load()
	}
	count := r.counts()[c.session.backend]
	if ended != 1 || count.total != 1 || count.open != 0 || r.size() != 0 {
		t.Errorf("%d ended of %d, %d and %d open; want 1 of 1, 0 and 0", ended, count.total, count.open, r.size())
	}
}

// endAll ends all sessions at once.
func (r *relay) endAll(cause cause) {
	for _, s := range r.filter(func(*session) bool { return true }) {
		s.end(cause)
	}
}

func quietRelay(t testing.TB) *relay {
	t.Helper()
	name := func(i int) string { return backendName("backend", i) }
	r := newRelay(name, slog.New(slog.DiscardHandler))
	r.clientTLS = true
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.endAll(causeDrain)
		r.stop()
	})
	return r
}

// sessionConns are the connections of a session: the relay gets the near ends, the client
// and the backend have the far ones. Arrays are indexed by side.
type sessionConns struct {
	far  [2]halfConn
	near [2]net.Conn
}

// newSessionConns returns connections of these networks: the client dials the router, and the
// router the backend. They are tcp or unix, and for the client one of overTLS too.
func newSessionConns(t testing.TB, client, backend string) (s sessionConns) {
	t.Helper()
	if version := overTLS(client); version != 0 {
		s.far[clientSide], s.near[clientSide] = tlsPair(t, client)
	} else {
		s.far[clientSide], s.near[clientSide] = pair(t, client)
	}
	s.near[backendSide], s.far[backendSide] = pair(t, backend)
	return s
}

// socket returns the socket of a near end, which may be under TLS.
func socket(conn net.Conn) halfConn {
	conn, _ = unwrapTLS(conn)
	return conn.(halfConn)
}

// start starts s in r. early is what the relay gets with the sockets.
func (c sessionConns) start(r *relay, s *session, early [2][]byte) relayed {
	r.startSession(s, c.near, early)
	return relayed{session: s, relay: r, client: c.far[clientSide], backend: c.far[backendSide]}
}

// startedSession starts a session of ns-01 with backend 0 in r, over TCP.
func startedSession(t testing.TB, r *relay) relayed {
	t.Helper()
	return startedOver(t, r, "tcp", "tcp")
}

// startedOver is startedSession over these networks, as newSessionConns has them.
func startedOver(t testing.TB, r *relay, client, backend string) relayed {
	t.Helper()
	return newSessionConns(t, client, backend).start(r, newSession("ns-01", 0, "192.0.2.7"), [2][]byte{})
}

// waitFor fails the test if the relay's sessions do not end by themselves.
func waitFor(t testing.TB, r *relay) {
	t.Helper()
	r.size() // for the race detector: by its lock, all sessions were added before the wait
	done := make(chan struct{})
	go func() { r.wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%d sessions did not end", r.size())
	}
}

// tcpPair returns the two ends of a TCP connection.
func tcpPair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	a, b := pair(t, "tcp")
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// unixPair returns the two ends of a Unix socket, as nginx and the router have.
func unixPair(t testing.TB) (near, far *net.UnixConn) {
	t.Helper()
	a, b := pair(t, "unix")
	return a.(*net.UnixConn), b.(*net.UnixConn)
}

// pair returns the two ends of a connection, until the test ends.
func pair(t testing.TB, network string) (near, far halfConn) {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		addr = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(halfConn), b.(halfConn)
}

// halfConn is what TCP and Unix sockets have in common.
type halfConn interface {
	net.Conn
	CloseWrite() error
	SetReadBuffer(bytes int) error
	SetWriteBuffer(bytes int) error
}

func closeWrite(t testing.TB, conn halfConn) {
	t.Helper()
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

// reset closes conn, a TCP connection with an RST. With TLS it sends no close_notify.
func reset(conn net.Conn) {
	if end, ok := conn.(*tlsEnd); ok {
		conn = end.writeQueue.halfConn
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}

// overTLS returns the version of TLS of a client's network, or 0 if it has none. These networks
// are TCP, or for "tls-unix" a Unix socket, with TLS 1.3, or for "tls12" TLS 1.2.
func overTLS(network string) uint16 {
	return map[string]uint16{"tls": tls.VersionTLS13, "tls-unix": tls.VersionTLS13, "tls12": tls.VersionTLS12}[network]
}

// eachNetwork runs a test with clients over each of these networks.
func eachNetwork(t *testing.T, test func(t *testing.T, network string), networks ...string) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) { test(t, network) })
	}
}

// tlsPair returns the two ends of a client's connection with TLS, after their handshake: the
// client's, and the router's.
func tlsPair(t testing.TB, network string) (*tlsEnd, *tlsConn) {
	t.Helper()
	below := "tcp"
	if strings.HasSuffix(network, "unix") {
		below = "unix"
	}
	a, b := pair(t, below)
	far := &tlsEnd{writeQueue: &writeQueue{halfConn: a}}
	t.Cleanup(func() { a.Close(); far.pumping.Wait() })
	version := overTLS(network)
	far.Conn = tls.Client(far.writeQueue, &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
	return far, nearTLS(t, b, far.Conn)
}

// nearTLS returns the router's end of the client's connection, after their handshake.
func nearTLS(t testing.TB, conn net.Conn, client *tls.Conn) *tlsConn {
	t.Helper()
	near, done := newTLSConn(conn, relayTLS()), make(chan error, 1)
	go func() { done <- near.Handshake() }()
	err := client.Handshake()
	must(t, err, <-done)
	return near
}

// relayTLS returns the configuration of the router's ends, which has a certificate. They send
// no tickets, so that all that a client reads is of its session.
var relayTLS = sync.OnceValue(func() *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().AddDate(1, 0, 0)}
	der, signErr := x509.CreateCertificate(cryptorand.Reader, template, template, key.Public(), key)
	if err := errors.Join(err, signErr); err != nil {
		panic(err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
})

// tlsEnd is a client's end of a connection with TLS. CloseWrite sends close_notify, and no FIN.
// A read returns errTruncated at an end without close_notify. Unlike a tls.Conn, it can go on
// after a write has timed out: then its last records are in a queue.
type tlsEnd struct {
	*tls.Conn
	*writeQueue
}

func (e *tlsEnd) Read(b []byte) (int, error)        { return e.Conn.Read(b) }
func (e *tlsEnd) CloseWrite() error                 { return e.Conn.CloseWrite() }
func (e *tlsEnd) LocalAddr() net.Addr               { return e.Conn.LocalAddr() }
func (e *tlsEnd) RemoteAddr() net.Addr              { return e.Conn.RemoteAddr() }
func (e *tlsEnd) SetDeadline(t time.Time) error     { return e.writeQueue.SetDeadline(t) }
func (e *tlsEnd) SetReadDeadline(t time.Time) error { return e.halfConn.SetReadDeadline(t) }
func (e *tlsEnd) SetWriteDeadline(t time.Time) error {
	return e.writeQueue.SetWriteDeadline(t)
}

// Write takes nothing before the socket has taken what was written before.
func (e *tlsEnd) Write(b []byte) (int, error) {
	if err := e.wait(e.deadline()); err != nil {
		return 0, err
	}
	if n, err := e.Conn.Write(b); err != nil {
		return n, err
	}
	if err := e.wait(e.deadline()); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, err
	}
	return len(b), nil
}

// Close sends close_notify, if the socket takes that soon, and closes the connection.
func (e *tlsEnd) Close() error {
	e.Conn.CloseWrite()
	e.wait(time.Now().Add(time.Second))
	return e.halfConn.Close()
}

// writeQueue is the transport of a tlsEnd. What the socket does not take waits in it.
type writeQueue struct {
	halfConn
	pumping sync.WaitGroup

	mu     sync.Mutex
	queue  []byte
	taken  chan struct{} // closed when the socket has taken all, or has failed; nil if it takes nothing now
	failed error
	until  time.Time // of writes; zero for no bound
}

func (q *writeQueue) Read(b []byte) (int, error) {
	n, err := q.halfConn.Read(b)
	if errors.Is(err, io.EOF) {
		err = errTruncated
	}
	return n, err
}

func (q *writeQueue) Write(b []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.failed != nil {
		return 0, q.failed
	}
	q.queue = append(q.queue, b...)
	if q.taken == nil {
		q.taken = make(chan struct{})
		q.pumping.Go(q.pump)
	}
	return len(b), nil
}

// pump gives the socket all that is in the queue.
func (q *writeQueue) pump() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.queue) > 0 && q.failed == nil {
		b := q.queue
		q.queue = nil
		q.mu.Unlock()
		_, err := q.halfConn.Write(b)
		q.mu.Lock()
		q.failed = err
	}
	close(q.taken)
	q.taken = nil
}

// wait waits until the socket has taken all that was written.
func (q *writeQueue) wait(until time.Time) error {
	q.mu.Lock()
	taken, failed := q.taken, q.failed
	q.mu.Unlock()
	if taken == nil {
		return failed
	}
	var timeout <-chan time.Time
	if !until.IsZero() {
		timeout = time.After(time.Until(until))
	}
	select {
	case <-taken:
		return q.wait(until)
	case <-timeout:
		return os.ErrDeadlineExceeded
	}
}

func (q *writeQueue) deadline() time.Time {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.until
}

func (q *writeQueue) SetDeadline(t time.Time) error {
	return errors.Join(q.halfConn.SetReadDeadline(t), q.SetWriteDeadline(t))
}

// SetWriteDeadline does not bound what is in the queue.
func (q *writeQueue) SetWriteDeadline(t time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.until = t
	return nil
}

// endless is a source without an end.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

func mustWrite(t testing.TB, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatalf("write %q: %v", s, err)
	}
}

func mustRead(t testing.TB, conn net.Conn, want string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got[:n], err, want)
	}
}

// mustReadAll reads until EOF, which is to come after n bytes.
func mustReadAll(t testing.TB, conn net.Conn, n int64) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.Copy(io.Discard, conn); got != n || err != nil {
		t.Fatalf("read %d bytes, %v; want %d and EOF", got, err, n)
	}
}

func mustEOF(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes, %v; want EOF", n, err)
	}
}

// mustBreak reads until an error that is not a timeout.
func mustBreak(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatal("the connection is still open")
	}
}

// manyNamespaces differ in their last characters, as names of tenants do.
func manyNamespaces(count int) []string {
	namespaces := make([]string, count)
	for i := range namespaces {
		namespaces[i] = fmt.Sprintf("ns-%06d", i)
	}
	return namespaces
}

// hashedTo returns a namespace, the prefix and a number, that hashes to the
// backend.
func hashedTo(t *testing.T, prefix string, backend, backends int) string {
	t.Helper()
	for i := range 1000 {
		if namespace := fmt.Sprint(prefix, "-", i); bucket(namespace, backends) == backend {
			return namespace
		}
	}
	t.Fatalf("no namespace hashes to %d", backend)
	return ""
}

// shuffled returns the namespaces in random order, in memory of their own that
// is in this order too: when a request is routed, its own bytes were just read,
// and those of the table's keys were not.
func shuffled(namespaces []string) []string {
	namespaces = slices.Clone(namespaces)
	rng := rand.New(rand.NewPCG(3, 4))
	rng.Shuffle(len(namespaces), func(i, j int) { namespaces[i], namespaces[j] = namespaces[j], namespaces[i] })
	all := strings.Join(namespaces, "")
	for i, namespace := range namespaces {
		namespaces[i], all = all[:len(namespace)], all[len(namespace):]
	}
	return namespaces
}

package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// listenTest listens on a free port.
func listenTest(t *testing.T) (net.Listener, int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l, l.Addr().(*net.TCPAddr).Port
}

// startTestBackends listens on free ports until the test ends. What it returns is a
// target without a proxy.
func startTestBackends(t *testing.T) *target {
	t.Helper()
	var b *backends
	var ports []int
	for attempt := range 5 { // another one may take a port before the backends listen
		ports = nil
		var held []net.Listener
		for range backendCount {
			l, port := listenTest(t)
			held, ports = append(held, l), append(ports, port)
		}
		for _, l := range held {
			l.Close()
		}
		var err error
		if b, err = newBackends(ports); err == nil {
			break
		}
		if attempt == 4 {
			t.Fatal(err)
		}
	}
	t.Cleanup(b.close)
	return &target{ports: ports, backends: b}
}

// startRelays starts one relay for each port of to, and returns the target that is
// these. What comes back from a port may be changed; the n-th connection of relay i
// is to the port i+n*shift of to.
func startRelays(t *testing.T, to *target, shift int, change func([]byte)) *target {
	t.Helper()
	return startRelaysOn(t, to, shift, change, func(l net.Listener) net.Listener { return l })
}

// startRelaysOn is startRelays with connections that wrap accepts.
func startRelaysOn(t *testing.T, to *target, shift int, change func([]byte), wrap func(net.Listener) net.Listener) *target {
	t.Helper()
	relays := &target{backends: to.backends, tls: to.tls}
	for i := range to.ports {
		l, port := listenTest(t)
		l = wrap(l)
		t.Cleanup(func() { l.Close() })
		relays.ports = append(relays.ports, port)
		go func() {
			for n := 0; ; n++ {
				client, err := l.Accept()
				if err != nil {
					return
				}
				backend, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", to.ports[(i+n*shift)%len(to.ports)]))
				if err != nil { // the test has ended
					client.Close()
					return
				}
				go carry(backend, client, func([]byte) {})
				go carry(client, backend, change)
			}
		}()
	}
	return relays
}

func carry(to, from net.Conn, change func([]byte)) {
	defer to.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		change(buf[:n])
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// flip changes one byte of each piece that is so long.
func flip(at int) func([]byte) {
	return func(p []byte) {
		if len(p) > at {
			p[at] ^= 1
		}
	}
}

func TestScenarios(t *testing.T) {
	to := startTestBackends(t)
	to.settle, to.group, to.idle, to.beside = 20*time.Millisecond, group{os.Getpid()}, 300, 300
	groups := scenarioGroups()
	tested, err := pick(scenarios(), func(sc scenario) string { return sc.name }, groups[groupPlain]+","+groups[groupTLS]+","+groups[groupTLS12])
	if err != nil {
		t.Fatal(err)
	}
	for _, sc := range tested {
		t.Run(sc.name, func(t *testing.T) {
			to, length := to, 500*time.Millisecond
			if sc.tls != nil {
				secure := startTLS(t, to, sc.tls, func(*tls.Config) {})
				secure.settle, secure.group, secure.idle, secure.beside = to.settle, to.group, 50, 50
				to, length = secure, 100*time.Millisecond
				if strings.Contains(sc.name, "flood") {
					length = 2 * turn // one without the flood
				}
			}
			c := &contender{run: new(run), target: to}
			sc.measure([]*contender{c}, length)
			v := c.run.Values
			if c.run.Error != "" {
				t.Fatal(c.run.Error)
			}
			for _, q := range append(allRequirements(), tlsRequirements(oursTLS)...) {
				if _, ok := v[q.metric]; q.scenario == sc.name && !ok {
					t.Errorf("no %s in %v", q.metric, v)
				}
			}
			if v["foreign"] > 1.1*float64(runtime.NumCPU()) || v["steal"] > 1 {
				t.Errorf("got %v, want a share of %d CPUs", v, runtime.NumCPU())
			}
			switch sc.name {
			case "check":
				if v["namespaces"] != 500 || v["least"] != 125 || v["most"] != 125 {
					t.Errorf("got %v, want 500 namespaces, 125 of each backend", v)
				}
			case "idle": // this process has both ends
				if v["sessions"] != 300 || v["files"] < 2 || v["files"] > 2.02 {
					t.Errorf("got %v, want 300 sessions of 2 files", v)
				}
			case "tls-idle", "tls12-idle": // and here those of the relay
				if v["sessions"] != 50 || v["files"] < 4 || v["files"] > 4.2 {
					t.Errorf("got %v, want 50 sessions of 4 files", v)
				}
			case "tls-resume", "tls12-resume":
				if v["resumed"] != 1 {
					t.Errorf("got %v, want a ticket in all handshakes", v)
				}
			case "mixed":
				if v["sessions"] != 300 || v["http_per_s"] > 2200 || v["http_p99_ms"] == 0 {
					t.Errorf("got %v, want 300 sessions and up to 2000 requests per second", v)
				}
			case "paced":
				if v["per_s"] < 500 || v["per_s"] > 4500 { // fewer on a busy machine, never more
					t.Errorf("got %v messages per second, want up to 4000", v["per_s"])
				}
			}
		})
	}
}

// startPlainFault starts relays that write new for old, of the same length, in what comes
// back.
func startPlainFault(t *testing.T, to *target, old, new string) *target {
	return startRelays(t, to, 0, func(p []byte) {
		copy(p, bytes.ReplaceAll(p, []byte(old), []byte(new)))
	})
}

// TestFailures: a proxy that does not do its job is found out.
func TestFailures(t *testing.T) {
	direct := startTestBackends(t)
	with := func(change func(*target)) *target {
		to := *direct
		change(&to)
		return &to
	}
	asIs := func([]byte) {}
	for name, test := range map[string]struct {
		target *target
		want   string
	}{
		"a backend without namespaces": {with(func(to *target) { to.ports = to.ports[:3] }), "namespaces of the backends: [167 167 166 0]"},
		"a namespace at two backends":  {startRelays(t, direct, 1, asIs), "before with backend-"},
		"no overrides":                 {with(func(to *target) { to.overrides = true }), "ov-0001 with backend-1, want backend-0"},
		"nobody there":                 {with(func(to *target) { to.ports = []int{1} }), "connection refused"},
		"another status":               {startRelays(t, direct, 0, flip(9)), `answer "HTTP/1.1 001 Switching`},
		"another Accept":               {startRelays(t, direct, 0, flip(100)), "Sec-WebSocket-Accept of another request"},
		"another namespace":            {startRelays(t, direct, 0, flip(170)), "greeting"},
		"a changed echo":               {startRelays(t, direct, 0, flip(1000)), "echo of 1024 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := runCheck(test.target)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	for name, test := range map[string]struct {
		target *target
		want   string
	}{
		"another backend":       {startRelays(t, direct, 1, asIs), "before with backend-"},
		"an answer's status":    {startPlainFault(t, direct, "200 OK", "201 OK"), `GET: plain request 1 of connection`},
		"an answer's length":    {startPlainFault(t, direct, "Content-Length", "Content-Ruler!"), "without the length of its body"},
		"an answer's backend":   {startPlainFault(t, direct, `backend-1","namespace":"ns-0001","query`, `backend-2","namespace":"ns-0001","query`), "answer of backend-2, sessions of ns-0001 with backend-1"},
		"an answer's namespace": {startPlainFault(t, direct, `ns-0001","query`, `ns-0002","query`), "wrong answer to request"},
		"another answer":        {startPlainFault(t, direct, `"n=1.2"`, `"n=1.1"`), "wrong answer to request 2"},
		"a changed body":        {startPlainFault(t, direct, "\x11\x12\x13\x14", "\x11\x12\x13\x15"), "POST of 1024 bytes: plain request"},
		"a proxy for sockets":   {startPlainFault(t, direct, "200 OK", "426 No"), `answer "HTTP/1.1 426 No`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := runCheckHTTP(test.target)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	if err := checkStream(startRelays(t, direct, 0, flip(20000))); err == nil || !strings.Contains(err.Error(), "corrupt stream") {
		t.Errorf("got %v, want a corrupt stream", err)
	}
}

// TestReopen: a connection that the proxy closes after an answer, or meanwhile, is opened
// again.
func TestReopen(t *testing.T) {
	to := startPlainFault(t, startTestBackends(t), "Cache-Control: no-cache", "Connection: close      ")
	l, err := newLoop(to.backends.loop)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	h, err := openPlain(to, l, names("ns-", 8), 4, 64)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.exchange(3); err != nil || h.reopened != 12 {
		t.Errorf("got %v, %d connections opened again, want 12", err, h.reopened)
	}
	h.conns[0].conn.fail("closed by the peer") // while nobody uses it
	if err := h.exchange(3); err != nil || h.reopened != 25 {
		t.Errorf("got %v, %d connections opened again, want 25", err, h.reopened)
	}
}

// TestPace: operations start at their rates, or late if there is no connection.
func TestPace(t *testing.T) {
	l, err := newLoop(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	var even, jittered, refused int
	err = l.pace(200*time.Millisecond,
		pacer{rate: 1000, start: func(time.Duration) error { even++; return nil }},
		pacer{rate: 500, jitter: rand.New(rand.NewPCG(1, 1)), start: func(due time.Duration) error {
			if due > l.now() {
				t.Errorf("started %s before it is due", due-l.now())
			}
			if jittered == 50 && refused < 3 {
				refused++
				return errBusy
			}
			jittered++
			return nil
		}})
	if err != nil || even != 200 || jittered < 99 || jittered > 100 || refused != 3 {
		t.Errorf("got %v, %d and %d operations, %d refused, want 200, 100 and 3", err, even, jittered, refused)
	}
	failed := errors.New("broken")
	err = l.pace(time.Millisecond, pacer{rate: 1000, start: func(time.Duration) error { return failed }})
	if !errors.Is(err, failed) {
		t.Errorf("got %v, want what start has returned", err)
	}
}

func TestBackendRefuses(t *testing.T) {
	to := startTestBackends(t)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				to.backends.step(10 * time.Millisecond)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	const refused = "HTTP/1.1 400 "
	const headers = "Host: x\r\nupgrade: WebSocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	for request, want := range map[string]string{
		"GET /ws/a HTTP/1.1\r\n" + headers + "\x81\x00":                      "HTTP/1.1 101 ", // and closes on a frame that is not masked
		"POST /ws/a HTTP/1.1\r\n" + headers:                                  refused,
		"GET /other HTTP/1.1\r\n" + headers:                                  refused,
		"GET /ws/a HTTP/1.1\r\nUpgrade: x\r\n\r\n":                           refused,
		"PUT /ws/a HTTP/1.1\r\n\r\n":                                         refused,
		"POST /ws/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": refused,
		"POST /ws/a HTTP/1.1\r\nContent-Length: -1\r\n\r\n":                  refused,
		"GET /ws/a?b HTTP/1.1\r\n\r\n" + "POST /ws/a?c HTTP/1.1\r\nContent-Length: 2\r\n\r\nhiPUT\r\n\r\n": string(appendAnswer(
			appendAnswer(nil, 0, []byte("a"), []byte("b"), nil), 0, []byte("a"), []byte("c"), []byte("hi"))),
	} {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", to.ports[0]))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(conn, request)
		if got, err := io.ReadAll(conn); err != nil || !bytes.HasPrefix(got, []byte(want)) {
			t.Errorf("%q: got %q, %v, want %q and the end", request, got, err, want)
		}
	}
}

func TestFrames(t *testing.T) {
	for _, size := range []int{0, 1, 125, 126, 127, 65535, 65536, 100000} {
		for _, mask := range []*[4]byte{nil, {1, 2, 3, 4}} {
			want := pattern(size)
			b := appendFrame(nil, frameBinary, want, mask)
			for cut := range min(len(b), 20) {
				if _, n, err := parseFrame(b[:cut]); n != 0 || err != nil {
					t.Fatalf("size %d: %d bytes are a frame of %d, %v", size, cut, n, err)
				}
			}
			f, n, err := parseFrame(append(b, 7))
			if err != nil || n != len(b) || f.masked != (mask != nil) || f.first != frameBinary {
				t.Fatalf("size %d: got %d bytes, %v, masked %v, want %d", size, n, err, f.masked, len(b))
			}
			if f.masked {
				xor(f.payload, f.mask)
			}
			if !bytes.Equal(f.payload, want) {
				t.Fatalf("size %d: another payload", size)
			}
		}
	}
	if _, _, err := parseFrame([]byte{frameBinary, 127, 0xff, 0, 0, 0, 0, 0, 0, 0}); err != errTooLarge {
		t.Errorf("a frame of 2^63 bytes: got %v", err)
	}
	if got := string(acceptKey(nil, []byte("dGhlIHNhbXBsZSBub25jZQ=="))); got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" { // RFC 6455 §1.3
		t.Errorf("the accept key is %s", got)
	}
}

//go:build !portable && !386

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// waitFastConn returns the only client on the fast path, once its owner is dialled.
func (p *testProxy) waitFastConn(t testing.TB) *fastConn {
	t.Helper()
	p.waitPending(t, 1)
	for end := time.Now().Add(patience); ; <-time.After(time.Millisecond) {
		for _, c := range p.fastConns() {
			c.poller.mu.Lock()
			dialled := c.fd[backendSide] >= 0
			c.poller.mu.Unlock()
			if dialled {
				return c
			}
		}
		if time.Now().After(end) {
			t.Fatal("nobody is on the fast path")
		}
	}
}

// The bound of an answer's head holds on both ways.
func TestFastPathBoundsTheResponse(t *testing.T) {
	long := strings.Replace(switching, "\r\n", "\r\nX-Long: "+strings.Repeat("x", 9<<10)+"\r\n", 1)
	backend := startStub(t, "127.0.0.1:0", answer(long))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	mustAnswer(t, p.send(t, "ns-01"), http.StatusBadGateway)
	p.waitResult(t, resultBadGateway)
}

// What a client sends beyond its head stays with the kernel until somebody takes it.
func TestFastPathReadsAHeadOnly(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", silent)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mustWrite(t, conn, upgradeRequest("/ws/ns-01")+strings.Repeat("much ", 10_000))
	c := p.waitFastConn(t)
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	if n, limit := len(c.received), p.limits.headerBytes; n > limit {
		t.Errorf("%d bytes of a client are kept, want at most the %d of a head", n, limit)
	}
}

// A dial that was given up leaves what others found out about the backend.
func TestFastPathGivesUpADial(t *testing.T) {
	l := fullListener(t)
	var forgotten atomic.Int64
	p := startProxy(t, []string{l.Addr().String()}, map[string]string{}, func(p *proxy) {
		p.backends.invalidate = func(int) { forgotten.Add(1) }
	})
	conn := p.send(t, "ns-01")
	defer conn.Close()
	c, failure := p.waitFastConn(t), errors.New("no route")
	if !p.backends.queues.tryDial(0) {
		t.Fatal("the backend may not be dialled twice at once")
	}
	p.backends.queues.dialDone(0, failure, false)
	c.giveUp()
	p.waitHTTP(t)
	if n := forgotten.Load(); n != 0 {
		t.Errorf("the backend's address was forgotten %d times, want it kept", n)
	}
	p.backends.queues.mu.Lock()
	defer p.backends.queues.mu.Unlock()
	if line := p.backends.queues.queues[0]; line.failures != 1 || line.lastErr != failure {
		t.Errorf("after a dial that was given up the backend has failed %d times, at last by %v; want 1, %v", line.failures, line.lastErr, failure)
	}
}

// A backend that has answered is looked for no more.
func TestFastPathMeant(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	p.backends.queues.setMisdirected(0, errMisdirected)
	begun := time.Now()
	p.open(t, "ns-01")
	wantEqual(t, "backends that are looked for", p.backends.queues.misdirectedQueues.Load(), 0)
	p.wantNoHTTP(t, begun)
}

// Clients that leave while their owner is dialled give their turns to dial on.
func TestFastPathGivesUpItsTurn(t *testing.T) {
	l := fullListener(t)
	p := startProxy(t, []string{l.Addr().String()}, map[string]string{}, nil)
	for range 2 * maxDialsPerBackend {
		conn := p.send(t, "ns-01")
		p.waitPending(t, 1)
		reset(conn.(*net.TCPConn))
		p.waitPending(t, 0)
	}
	dialling := func() int {
		p.backends.queues.mu.Lock()
		defer p.backends.queues.mu.Unlock()
		return p.backends.queues.queue(0).dialing
	}
	for end := time.Now().Add(patience); dialling() != 0; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d turns are taken after all have left, want 0", dialling())
		}
	}
}

// The backend gets the address of a client that has reset its connection, and not only
// what the client says itself.
func TestFastPathForwardsWhoWasReset(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	clients, read := make(chan *net.TCPConn, 1), sync.Once{}
	paths := defaultMatcher(t)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
		p.namespaceOf = func(r *http.Request) (namespace string, refused *refusal) {
			read.Do(func() { // between the read of its head and the hand-over to net/http
				conn := <-clients
				conn.SetLinger(0)
				conn.Close()
				refused = refuse(resultNotFound, "so that it is net/http's")
			})
			if refused != nil {
				return "", refused
			}
			return paths.namespace(r)
		}
	})
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	forged := strings.Replace(upgradeRequest("/ws/ns-01"), "\r\n", "\r\nX-Forwarded-For: 203.0.113.9\r\n", 1)
	mustWrite(t, conn, forged+strings.Repeat("early ", 1000)) // net/http does not see the end behind that
	clients <- conn.(*net.TCPConn)
	p.waitResult(t, resultClientGone)
	if heads := backend.heads(); len(heads) != 1 || !strings.Contains(heads[0], "X-Forwarded-For: 203.0.113.9, 127.0.0.1\r\n") {
		t.Errorf("the backend got %q, want one request with X-Forwarded-For: 203.0.113.9, 127.0.0.1", heads)
	}
}

// While a client and its owner are handed over, they need descriptorsPerClient.
func TestFastPathDescriptors(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", silent)
	var mu sync.Mutex
	var open []int // descriptors of the process, at each duplicate
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
		control := p.backends.dialer.Control
		p.backends.dialer.Control = func(network, address string, c syscall.RawConn) error {
			mu.Lock()
			defer mu.Unlock()
			if files, err := filepath.Glob("/proc/self/fd/*"); err == nil && address == "" {
				open = append(open, len(files))
			}
			return control(network, address, c)
		}
	})
	p.send(t, "ns-01")
	c := p.waitFastConn(t)
	for end := time.Now().Add(patience); len(backend.heads()) == 0 && time.Now().Before(end); {
		<-time.After(time.Millisecond)
	}
	c.giveUp()
	p.waitHTTP(t)
	mu.Lock()
	defer mu.Unlock()
	if len(open) != 2 || open[1] > open[0] {
		t.Errorf("with the client's duplicate %v descriptors are open, and then with its owner's; want as many", open)
	}
}

// closes counts how often a connection is closed.
type closes struct {
	net.Conn
	mu sync.Mutex
	n  int
}

func (c *closes) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	return nil
}

// The server may close a client's connection while its request begins: its upgrade, and
// the connection to the owner with it, is closed once.
func TestClientConnCloses(t *testing.T) {
	for range 20 {
		near, far := net.Pipe()
		defer far.Close()
		var limit pendingLimit
		limit.acquire(0, 1, 10)
		owner := &closes{}
		c := &clientConn{Conn: near, fdLimit: wideDescriptorLimit(t)}
		c.pending.Store(&pendingRequest{limit: &limit, backendConn: owner})
		var both sync.WaitGroup
		both.Go(func() { c.Close() })
		both.Go(func() {
			if u := c.takePendingRequest(); u != nil {
				u.close()
			}
		})
		both.Wait()
		if pending := limit.inUse(); owner.n != 1 || pending != 0 {
			t.Fatalf("the owner's connection was closed %d times, and %d upgrades are pending; want 1, 0", owner.n, pending)
		}
	}
}

// A head that net/http has read is kept by nobody, though the connection stays.
func TestPrefixedConnFreesPrefix(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	defer near.Close()
	c := &prefixedConn{near, []byte("head")}
	for _, want := range []string{"hea", "d"} {
		got := make([]byte, 3)
		if n, err := c.Read(got); err != nil || string(got[:n]) != want {
			t.Fatalf("%q was read, and %v; want %q", got[:n], err, want)
		}
	}
	if c.prefix != nil {
		t.Errorf("%d bytes are kept of a head that was read, want none", cap(c.prefix[:0]))
	}
}

// inTwo writes what it is given in two parts, the second after pause.
func inTwo(w io.Writer, text string, pause func()) {
	io.WriteString(w, text[:len(text)/2])
	pause()
	io.WriteString(w, text[len(text)/2:])
}

// waitHTTP returns when net/http has a client.
func (p *testProxy) waitHTTP(t testing.TB) {
	for end := time.Now().Add(patience); p.http.Load() == 0; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Error("net/http has no client")
			return
		}
	}
}

// wantNoHTTP checks that net/http had no client, unless one that came since begun may have
// fallen back to it because the machine is busy.
func (p *testProxy) wantNoHTTP(t testing.TB, begun time.Time) {
	t.Helper()
	if n := p.http.Load(); n != 0 && time.Since(begun) < fastPathTimeout {
		t.Errorf("net/http had %d clients, want 0", n)
	}
}

// A simple upgrade takes the fast path: net/http does not see it.
func TestFastPath(t *testing.T) {
	begun := time.Now()
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, "HTTP/1.1 103 Early Hints\r\n\r\n"+switching+"hello ")
		io.Copy(conn, br)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	var clients []net.Conn
	for _, early := range []string{"", "early ", strings.Repeat("much ", 30_000)} {
		conn, br, resp := p.ask(t, upgradeRequest("/ws/ns-01/some/path?q=1")+early)
		if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Sec-WebSocket-Accept") == "" {
			t.Errorf("answer %s with %v", resp.Status, resp.Header)
		}
		mustWrite(t, conn, "late")
		got := make([]byte, len("hello ")+len(early)+len("late"))
		if _, err := io.ReadFull(br, got); err != nil || string(got) != "hello "+early+"late" {
			t.Errorf("%d bytes came with the request: %.30q came back, and %v", len(early), got, err)
		}
		clients = append(clients, conn)
	}
	for i, head := range backend.heads() {
		if !strings.HasPrefix(head, "GET /ws/ns-01/some/path?q=1 HTTP/1.1\r\n") || !strings.Contains(head, "X-Forwarded-For: 127.0.0.1\r\n") {
			t.Errorf("request %d is %q", i, head)
		}
	}
	p.wantNoHTTP(t, begun)
	eventually(t, "good upgrades, and those under way", [2]int64{3, 0}, func() [2]int64 {
		return [2]int64{p.results[resultOK].Load(), int64(p.underWay())}
	})
	for _, conn := range clients {
		conn.Close()
	}
	used := func() int { used, _, _ := p.fastPath.fdLimit.usage(); return used }
	for end := time.Now().Add(patience); used() != 0 && time.Now().Before(end); {
		<-time.After(time.Millisecond)
	}
	if used := used(); used != 0 {
		t.Errorf("%d descriptors are counted as used after all, want 0", used)
	}
}

// What is not simple, or has to wait, is net/http's from where it stands: the
// backend is not asked twice.
func TestFastPathFallsBack(t *testing.T) {
	forbidden := "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nforbidden"
	other := "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
	simple := upgradeRequest("/ws/ns-01")
	late := func(conn net.Conn, br *bufio.Reader, pause func()) { pause(); echo(conn, br) }
	in := func(text string) func(net.Conn, *bufio.Reader, func()) {
		return func(conn net.Conn, br *bufio.Reader, pause func()) { inTwo(conn, text, pause); io.Copy(conn, br) }
	}
	once := func(serve func(net.Conn, *bufio.Reader)) func(net.Conn, *bufio.Reader, func()) {
		return func(conn net.Conn, br *bufio.Reader, _ func()) { serve(conn, br) }
	}
	many := strings.Repeat("many bytes", 3000)
	muchLater := func(conn net.Conn, br *bufio.Reader, pause func()) {
		io.WriteString(conn, switching[:9])
		pause()
		io.WriteString(conn, switching[9:]+many)
		io.Copy(conn, br)
	}
	tests := map[string]struct {
		send  string
		pause bool // before the part of send from cut on
		cut   int
		serve func(conn net.Conn, br *bufio.Reader, pause func())
		want  int
		body  string // of the answer; of a session, what comes back
		asked int
	}{
		"request in parts":  {send: simple, pause: true, cut: 50, serve: once(echo), want: 101, asked: 1},
		"silent at first":   {send: simple, pause: true, serve: once(echo), want: 101, asked: 1},
		"early bytes":       {send: simple + many, serve: in(switching), want: 101, body: many, asked: 1},
		"answer in parts":   {send: simple, serve: in(switching), want: 101, asked: 1},
		"much after a part": {send: simple, serve: muchLater, want: 101, body: many, asked: 1},
		"slow answer":       {send: simple, serve: late, want: 101, asked: 1},
		"other answer":      {send: simple, serve: once(answer(forbidden)), want: 403, body: "forbidden", asked: 1},
		"in parts":          {send: simple, serve: in(forbidden), want: 403, body: "forbidden", asked: 1},
		"no answer":         {send: simple, serve: once(func(net.Conn, *bufio.Reader) {}), want: 502, body: sentences()[502], asked: 1},
		"other protocol":    {send: simple, serve: once(answer(other)), want: 502, body: sentences()[502], asked: 1},
		"silent backend":    {send: simple, serve: once(silent), want: 504, body: sentences()[504], asked: 1},
		"no upgrade":        {send: "GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\n\r\n", serve: once(answer(fine)), want: 200, body: "ok", asked: 1},
		"expectation":       {send: strings.Replace(simple, "\r\n", "\r\nExpect: a miracle\r\n", 1), serve: once(echo), want: 417},
		"odd host":          {send: strings.Replace(simple, "www.mydomain.com", "a b", 1), serve: once(echo), want: 400},
		"odd name":          {send: strings.Replace(simple, "Origin", "Ori gin", 1), serve: once(echo), want: 400},
		"long head":         {send: strings.Replace(simple, "Origin: ", "Origin: "+strings.Repeat("x", 8<<10), 1), serve: once(echo), want: 101, asked: 1}, // within what net/http adds to the limit
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p *testProxy
			pause := func() { p.waitHTTP(t) }
			backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) { tt.serve(conn, br, pause) })
			p = startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
				if tt.want == http.StatusGatewayTimeout {
					p.limits.upgradeTimeout = time.Second
				}
			})
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			mustWrite(t, conn, tt.send[:tt.cut])
			if tt.pause {
				pause()
			}
			mustWrite(t, conn, tt.send[tt.cut:])
			conn.SetReadDeadline(time.Now().Add(patience))
			br := bufio.NewReader(conn)
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode != tt.want {
				t.Fatalf("answer %+v, %v; want %d", resp, err, tt.want)
			}
			body, want := io.Reader(resp.Body), tt.body
			if tt.want == http.StatusSwitchingProtocols {
				mustWrite(t, conn, "late")
				body, want = br, tt.body+"late"
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(body, got); err != nil || string(got) != want {
				t.Errorf("%.60q came, and %v; want %.60q", got, err, want)
			}
			if n, asked, waiting := p.http.Load(), len(backend.heads()), p.underWay(); n != 1 || asked != tt.asked || waiting > 0 && tt.want == 101 {
				t.Errorf("net/http had %d clients, the backend was asked %d times, and %d upgrades are under way; want 1, %d, 0", n, asked, waiting, tt.asked)
			}
			if n := p.requestsChecked.Load(); tt.asked == 1 && tt.want != 200 && n != 1 {
				t.Errorf("the upgrade was admitted %d times, want once on both ways", n)
			}
		})
	}
}

// A client that leaves while its owner is asked takes the connection to that with
// it.
func TestFastPathClientLeaves(t *testing.T) {
	asked, left := make(chan struct{}), make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		close(asked)
		io.Copy(io.Discard, br)
		close(left)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	begun := time.Now()
	conn := p.send(t, "ns-01")
	<-asked
	reset(conn.(*net.TCPConn))
	select {
	case <-left:
	case <-time.After(patience):
		t.Error("the backend keeps the connection for a client that has left")
	}
	p.waitResult(t, resultClientGone)
	p.waitPending(t, 0)
	p.wantNoHTTP(t, begun)
}

// What a client sends while its owner is asked is carried, though epoll reports its socket
// once only.
func TestFastPathEarlyBytes(t *testing.T) {
	sent := make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		<-sent
		echo(conn, br)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	p.waitFastConn(t)
	mustWrite(t, conn, "early") // the poller has an event of this before the response
	close(sent)
	conn.SetReadDeadline(time.Now().Add(patience))
	br := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("answer %+v, %v; want 101", resp, err)
	}
	got := make([]byte, len("early"))
	if _, err := io.ReadFull(br, got); err != nil || string(got) != "early" {
		t.Errorf("%q came back, and %v; want what was sent before the answer", got, err)
	}
}

// A backend that ends with its answer ends the session: epoll reports its socket once
// only, before the answer is read.
func TestFastPathBackendEnds(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, _ *bufio.Reader) { io.WriteString(conn, switching+"bye") })
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	for range 50 {
		_, br, resp := p.ask(t, upgradeRequest("/ws/ns-01"))
		if rest, err := io.ReadAll(br); resp.StatusCode != http.StatusSwitchingProtocols || string(rest) != "bye" || err != nil {
			t.Fatalf("answer %s and then %q, %v; want 101, the backend's last words and its end", resp.Status, rest, err)
		}
	}
}

// A backend that resets the connection after it has said that it is another one is looked for
// again: the kernel does not know the address of such a socket any more (getpeername(2)).
func TestFastPathMisdirectedAndReset(t *testing.T) {
	var p *testProxy
	var asked atomic.Int64
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		if asked.Add(1) > 1 {
			echo(conn, br)
			return
		}
		for _, poller := range p.relay.engine.pollers { // the fast path reads after the reset
			poller.mu.Lock()
			defer poller.mu.Unlock()
		}
		io.WriteString(conn, notMeant)
		reset(conn)
	})
	p = startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	p.open(t, "ns-01")
	wantEqual(t, "address", p.tail.wait(t, "another backend answered", 1)["address"], any("an unknown address"))
}

// A socket that is left to net/http is out of the poller's set: epoll would tell of it
// for as long as a duplicate is open (epoll(7)).
func TestFastPathLeavesTheSet(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", silent)
	for name, request := range map[string]string{"silent": "", "asked": upgradeRequest("/ws/ns-01")} {
		t.Run(name, func(t *testing.T) {
			p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			mustWrite(t, conn, request)
			if request != "" {
				p.waitFastConn(t).giveUp()
			}
			p.waitHTTP(t)
			for i, poller := range p.relay.engine.pollers {
				info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", poller.epollFD)) // proc_pid_fdinfo(5)
				if n := bytes.Count(info, []byte("tfd:")); err != nil || n != 1 {
					t.Errorf("poller %d watches %d sockets, %v; want its wake descriptor only:\n%s", i, n, err, info)
				}
			}
		})
	}
}

// An interrupted call is made again: the client of a 101 is not taken for one that has
// left (signal(7)).
func TestProcessFastPathInterrupted(t *testing.T) {
	for _, call := range []string{"sendto", "recvfrom"} {
		t.Run(call, func(t *testing.T) {
			p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-backends", echoBackends(t, 1), "-overrides", t.TempDir()})...)
			p.traced(t, call+":error=EINTR:when=1+2") // of each thread's
			p.start(t)
			p.await(t)
			p.log.wait(t, "routing table updated", 1)
			for range 8 {
				sayAndHear(t, p.open(t, "ns-01"), "hello")
			}
		})
	}
}

// The request of a client that has waited for its owner is read a second time. What a peer
// that is no proxy has invented does not go on then, either.
func TestFastPathForwardedFromAfterWait(t *testing.T) {
	addr := freeAddr(t)
	p := startProxy(t, []string{addr}, map[string]string{}, func(p *proxy) {
		p.forwardedFrom = &trustedProxies{}
		must(t, p.forwardedFrom.Set("10.0.0.0/8"))
	})
	conn := dial(t, p.addr)
	mustWrite(t, conn, strings.Replace(upgradeRequest("/ws/ns-01"), "\r\n\r\n", "\r\nX-Forwarded-For: 203.0.113.9\r\n"+
		"x-forwarded-proto: invented\r\nX-Forwarded-Host: invented\r\n\r\n", 1))
	p.waitHeld(t, 1)
	backend := startStub(t, addr, answer(fine))
	eventually(t, "requests", 1, func() int { return len(backend.heads()) })
	if head := backend.heads()[0]; strings.Contains(head, "invented") || strings.Contains(head, "203.0.113.9") {
		t.Errorf("what the client invented is in\n%s", head)
	}
}

// An owner that refuses, and one whose connection is made late, are waited for.
func TestFastPathDial(t *testing.T) {
	t.Run("refused", func(t *testing.T) {
		addr := freeAddr(t)
		p := startProxy(t, []string{addr}, map[string]string{}, nil)
		conn := p.send(t, "ns-01")
		p.waitHeld(t, 1)
		if n := p.http.Load(); n != 0 {
			t.Errorf("net/http has %d clients while one waits, want 0", n)
		}
		startStub(t, addr, echo)
		mustAnswer(t, conn, 101)
	})
	t.Run("late", func(t *testing.T) {
		var running sync.WaitGroup
		t.Cleanup(running.Wait)
		l := fullListener(t)
		p := startProxy(t, []string{l.Addr().String()}, map[string]string{}, nil)
		conn := p.send(t, "ns-01")
		p.waitHTTP(t) // after fastPathTimeout
		running.Go(func() {
			for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
				running.Go(func() {
					defer conn.Close()
					br := bufio.NewReader(conn)
					if _, err := readHead(br); err == nil {
						echo(conn, br)
					}
				})
			}
		})
		mustAnswer(t, conn, 101)
		conn.Close()
	})
}

// A backend whose address is a name is dialled too.
func TestFastPathDialsByName(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	_, port, _ := net.SplitHostPort(backend.addr)
	p := startProxy(t, []string{"localhost:" + port}, map[string]string{}, nil)
	begun := time.Now()
	conn := p.open(t, "ns-01")
	mustWrite(t, conn, "hello")
	mustRead(t, conn, "hello")
	p.wantNoHTTP(t, begun)
}

// waitHeld returns when so many clients are held on the fast path.
func (p *testProxy) waitHeld(t testing.TB, n int) {
	t.Helper()
	for end := time.Now().Add(patience); ; <-time.After(time.Millisecond) {
		held := 0
		for _, c := range p.fastConns() {
			c.poller.mu.Lock()
			if c.fallBackOnHalfClose {
				held++
			}
			c.poller.mu.Unlock()
		}
		if held == n {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d clients are held, want %d", held, n)
		}
	}
}

// A client that is held is answered as ever: when its owner is there, when it is not in
// time, when the router stops; and one that leaves is forgotten.
func TestFastPathHolds(t *testing.T) {
	start := func(t *testing.T, hold time.Duration) (*testProxy, string) {
		addr := freeAddr(t)
		return startProxy(t, []string{addr, addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
			p.limits.holdTimeout, p.limits.pendingRequests = hold, 4
		}), addr
	}
	after := func(t *testing.T, p *testProxy) {
		t.Helper()
		p.waitPending(t, 0)
		if n := p.headBytes(); n != 0 {
			t.Errorf("%d bytes of heads are counted as held after all, want 0", n)
		}
	}
	t.Run("in vain", func(t *testing.T) {
		t.Parallel()
		p, _ := start(t, 100*time.Millisecond)
		mustAnswer(t, p.send(t, "ns-01"), http.StatusServiceUnavailable)
		p.waitResult(t, resultHoldTimeout)
		after(t, p)
	})
	t.Run("the client leaves", func(t *testing.T) {
		t.Parallel()
		p, _ := start(t, patience)
		conn := p.send(t, "ns-01")
		p.waitHeld(t, 1)
		reset(conn.(*net.TCPConn))
		p.waitResult(t, resultClientGone)
		if n := p.http.Load(); n != 0 {
			t.Errorf("net/http had %d clients, want 0", n)
		}
		after(t, p)
	})
	t.Run("not for longer", func(t *testing.T) {
		t.Parallel()
		var mu sync.Mutex
		until := map[time.Time]bool{} // of the dials, but for the first, which is made before the upgrade is held
		dials := 0
		addr := refusingAddr(t)
		p := startProxy(t, []string{addr}, map[string]string{}, func(p *proxy) {
			p.limits.holdTimeout = dialTimeout - time.Millisecond // the deadline of a dial too
			p.backends.resolve = func(ctx context.Context, _ int) (string, error) {
				mu.Lock()
				defer mu.Unlock()
				if at, _ := ctx.Deadline(); dials > 0 {
					until[at] = true
				}
				dials++
				return addr, nil
			}
		})
		conn := p.send(t, "ns-01")
		p.waitHeld(t, 1)
		p.fastConns()[0].giveUp() // net/http holds it too
		mustAnswer(t, conn, http.StatusServiceUnavailable)
		mu.Lock()
		defer mu.Unlock()
		if len(until) != 1 || p.http.Load() != 1 {
			t.Errorf("the upgrade was held until %v, want one time, on both ways", slices.Collect(maps.Keys(until)))
		}
	})
	t.Run("the router is stopping", func(t *testing.T) {
		t.Parallel()
		p, _ := start(t, patience)
		conn := p.send(t, "ns-01")
		p.waitHeld(t, 1)
		p.fastPath.stop()
		if pending := len(p.fastConns()); pending != 0 || p.http.Load() != 1 {
			t.Errorf("%d clients are still held and net/http has %d, want 0, 1", pending, p.http.Load())
		}
		conn.Close()
		p.waitResult(t, resultClientGone)
		after(t, p)
	})
	t.Run("another owner", func(t *testing.T) {
		t.Parallel()
		p, addr := start(t, patience)
		conn := p.send(t, "ns-01")
		p.waitHeld(t, 1)
		p.tables.update(sourceContent{id: sourceID{name: "test"}, version: "42", overrides: newOverrideSet(map[string]string{"ns-01": "backend-1"})})
		backend := startStub(t, addr, echo)
		mustAnswer(t, conn, http.StatusSwitchingProtocols)
		if head := backend.heads()[0]; !strings.Contains(head, headerBackend+": backend-1\r\n") || !strings.Contains(head, headerTable+": "+p.tables.table().stamp+"\r\n") {
			t.Errorf("the backend got %q, want the second table and its owner", head)
		}
		after(t, p)
		if taken := p.pending.backends(); len(taken) != 0 {
			t.Errorf("slots of the backends %v are taken after all, want none", taken)
		}
	})
	for way, request := range bothWays("/ws/ns-01") {
		t.Run("too many bytes "+way, func(t *testing.T) {
			t.Parallel()
			p, _ := start(t, patience)
			const size = headBytesPerRequest + 1024 // two of them in the bytes of four
			head := strings.Replace(request, "Origin", "X: "+strings.Repeat("x", size)+"\r\nOrigin", 1)
			for i := range 2 {
				conn, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				mustWrite(t, conn, head)
				for end := time.Now().Add(patience); p.headBytes() < (i+1)*size; <-time.After(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("%d bytes are held for %d heads of %d", p.headBytes(), i+1, len(head))
					}
				}
			}
			_, _, resp := p.ask(t, head)
			if resp.StatusCode != http.StatusServiceUnavailable || p.results[resultMaxPending].Load() != 1 {
				t.Errorf("the third head gets %s, want 503 of the limit", resp.Status)
			}
		})
	}
}

// A client that is held stays on the fast path also if it has sent more than one read takes: that
// is no end of its connection.
func TestFastPathHoldsALongRead(t *testing.T) {
	var ready atomic.Bool
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
		p.limits.holdTimeout, p.limits.headerBytes = time.Hour, 2048
		p.backends.queues.backendReady = func(int) error {
			if ready.Load() {
				return nil
			}
			return errors.New("not ready")
		}
	})
	conn, early := dial(t, p.addr), strings.Repeat("x", 3000)
	mustWrite(t, conn, upgradeRequest("/ws/ns-01")+early)
	p.waitHeld(t, 1)
	ready.Store(true)
	p.backends.queues.readinessChanged()
	conn.SetReadDeadline(time.Now().Add(patience))
	br := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("answer %+v, %v; want 101", resp, err)
	}
	got := make([]byte, len(early))
	if _, err := io.ReadFull(br, got); err != nil || string(got) != early {
		t.Errorf("%d bytes came back, and %v; want what was sent before the answer", len(got), err)
	}
	wantEqual(t, "clients that net/http had", p.http.Load(), 0)
}

// A client that has gone before it is held is not held. One that has half-closed its
// connection is net/http's, which holds it for halfClosedHold.
func TestFastPathHoldsNobodyWhoIsGone(t *testing.T) {
	for name, leave := range map[string]func(*net.TCPConn){
		"reset":       func(conn *net.TCPConn) { reset(conn) },
		"half-closed": func(conn *net.TCPConn) { conn.CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p *testProxy
			clients, left := make(chan *net.TCPConn, 1), sync.Once{}
			p = startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(proxy *proxy) {
				proxy.limits.holdTimeout = time.Hour
				proxy.backends.queues.backendReady = func(int) error {
					left.Do(func() { // the client was admitted, and is not held yet
						leave(<-clients)
						p.waitLeft(t)
					})
					return errors.New("not ready")
				}
			})
			conn := p.send(t, "ns-01")
			clients <- conn.(*net.TCPConn)
			p.waitResult(t, resultClientGone)
			if name == "half-closed" {
				mustAnswer(t, conn, http.StatusServiceUnavailable)
			}
		})
	}
}

// A client that leaves just before it is parked does not stay parked: the end of its
// context starts no goroutine, as it is not parked yet.
func TestFastPathParksNobodyWhoIsGone(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
		p.limits.holdTimeout = time.Hour
		var once sync.Once
		p.backends.queues.backendReady = func(int) error {
			once.Do(p.relay.mu.Lock) // the client was admitted; recheckOwner waits
			return errors.New("not ready")
		}
	})
	conn := p.send(t, "ns-01")
	unlock := sync.OnceFunc(p.relay.mu.Unlock)
	defer unlock()
	waitStacks(t, "the client is held", func(stacks []byte) bool {
		return bytes.Contains(stacks, []byte(".recheckOwner("))
	})
	reset(conn.(*net.TCPConn))
	p.waitLeft(t)
	unlock()
	p.waitResult(t, resultClientGone)
}

// waitLeft returns when the poller knows that its only client has gone or half-closed.
func (p *testProxy) waitLeft(t testing.TB) {
	for end := time.Now().Add(patience); ; <-time.After(time.Millisecond) {
		c := p.fastConns()[0]
		c.poller.mu.Lock()
		left := c.halfClosed
		c.poller.mu.Unlock()
		if left {
			return
		}
		if time.Now().After(end) {
			t.Error("the poller does not know that the client has left")
			return
		}
	}
}

// TestProcessHolds has a router, in a process of its own, hold many upgrades as browsers
// send them: each takes no more than 6 KiB.
func TestProcessHolds(t *testing.T) {
	const clients, most = 6000, 36 << 10 // KiB
	request := strings.Replace(upgradeRequest("/ws/ns-01"), "Origin", "Pragma: no-cache\r\nCache-Control: no-cache\r\n"+
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36\r\n"+
		"Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-GB,en;q=0.9,de;q=0.8\r\n"+
		"Cookie: session="+strings.Repeat("0123456789abcdef", 16)+"\r\n"+
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nOrigin", 1)
	for network, listen := range map[string]string{"tcp": "127.0.0.1:0", "unix": "unix:" + filepath.Join(t.TempDir(), "socket")} {
		t.Run(network, func(t *testing.T) {
			p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-listen", listen, "-backends", freeAddr(t), "-overrides", t.TempDir(),
				"-hold", "5m", "-drain-duration", "0"})...)
			p.build(t)
			p.start(t)
			p.await(t)
			p.log.wait(t, "routing table updated", 1)
			before := p.memory(t)["VmRSS"]
			for range clients {
				conn, err := net.Dial(network, p.clientAddr)
				for ; errors.Is(err, syscall.EAGAIN); conn, err = net.Dial(network, p.clientAddr) { // the backlog is full (unix(7))
					<-time.After(time.Millisecond)
				}
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				mustWrite(t, conn, request)
			}
			waitMetrics(t, &p.runningRouter, map[string]float64{"router_pending_upgrades": clients})
			grown := func() int { return p.memory(t)["VmRSS"] - before }
			for end := time.Now().Add(patience); grown() > most && time.Now().Before(end); {
				<-time.After(10 * time.Millisecond)
			}
			t.Logf("%d upgrades of %d bytes: %d KiB, %d at most", clients, len(request), grown(), p.memory(t)["VmHWM"]-before)
			if grown := grown(); grown > most {
				t.Errorf("with %d upgrades of %d bytes the router has %d KiB more, want at most %d", clients, len(request), grown, most)
			}
		})
	}
}

// Both ways give the sockets of a session the same options.
func TestFastPathOptions(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	whole := func(w io.Writer, text string) { io.WriteString(w, text) }
	inTwo := func(w io.Writer, text string) { inTwo(w, text, func() { <-time.After(20 * time.Millisecond) }) }
	for timeout, want := range map[time.Duration]string{time.Minute: "[1 30 15 60000 1]", 0: "[0 0 1]"} {
		r := startRouter(t, "-backends", backend.addr, "-overrides", t.TempDir(), "-tcp-user-timeout", timeout.String())
		r.log.wait(t, "routing table updated", 1)
		for i, write := range []func(io.Writer, string){whole, inTwo} {
			conn, err := net.Dial("tcp", r.clientAddr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			write(conn, upgradeRequest("/ws/ns-01"))
			mustAnswer(t, conn, 101)
			for side, got := range socketsOf(t, r.clientAddr, backend.addr) {
				if got != want {
					t.Errorf("with timeout %s and way %d the socket of the %s has %s, want %s", timeout, i, side, got, want)
				}
			}
			conn.Close()
			r.log.wait(t, "session ended", i+1)
		}
	}
}

// socketsOf returns the options of the router's two sockets of its only session: of
// keepalive if it has that, the user timeout, and no delay.
func socketsOf(t *testing.T, front, backend string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for fd := range 1000 {
		local, lerr := syscall.Getsockname(fd)
		peer, perr := syscall.Getpeername(fd)
		if lerr != nil || perr != nil {
			continue
		}
		side := map[bool]string{true: "client"}[addrString(local) == front] + map[bool]string{true: "backend"}[addrString(peer) == backend]
		if side == "" {
			continue // another test's, or of the other end
		}
		options := [][2]int{{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE}, {syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE},
			{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL}, {syscall.IPPROTO_TCP, optTCPUserTimeout}, {syscall.IPPROTO_TCP, syscall.TCP_NODELAY}}
		if on, _ := syscall.GetsockoptInt(fd, options[0][0], options[0][1]); on == 0 {
			options = slices.Delete(options, 1, 3)
		}
		var values []int
		for _, o := range options {
			value, err := syscall.GetsockoptInt(fd, o[0], o[1])
			if err != nil {
				t.Fatal(err)
			}
			values = append(values, value)
		}
		found[side] = fmt.Sprint(values)
	}
	if len(found) != 2 {
		t.Fatalf("the router has sockets %v, want the client's and the backend's", found)
	}
	return found
}

// When the router stops, all that are on the fast path are answered as ever: it
// waits for no one that is silent.
func TestFastPathStops(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", silent)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	asked := p.send(t, "ns-01")
	p.waitPending(t, 1)
	var quiet []net.Conn
	for _, text := range []string{"", "GET /ws/ns-01 HTTP/1.1\r\n"} {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		mustWrite(t, conn, text)
		quiet = append(quiet, conn)
	}
	for int64(len(p.fastConns()))+p.http.Load() < 3 {
		<-time.After(time.Millisecond)
	}
	p.fastPath.stop()
	if n, pending := p.http.Load(), len(p.fastConns()); n != 3 || pending != 0 {
		t.Errorf("net/http has %d clients and the fast path %d, want all 3", n, pending)
	}
	if _, err := net.Dial("tcp", p.addr); err != nil {
		t.Errorf("the listener is closed: %v; want that net/http does it", err)
	}
	reset(asked.(*net.TCPConn))
	p.waitResult(t, resultClientGone)
	for _, conn := range quiet {
		conn.Close()
	}
}

// fastConns returns those who are on the fast path.
func (p *testProxy) fastConns() (all []*fastConn) {
	for _, poller := range p.relay.engine.pollers {
		poller.mu.Lock()
		for _, at := range poller.slots {
			if at.user != nil {
				all = append(all, at.user.(*fastConn))
			}
		}
		poller.mu.Unlock()
	}
	return all
}

// giveUp ends its time.
func (c *fastConn) giveUp() {
	c.poller.mu.Lock()
	defer c.poller.mu.Unlock()
	c.ctx.end(context.Canceled)
}

// FuzzFastPath holds what is taken by the fast path against net/http's server: it would
// give its handler the same request.
func FuzzFastPath(f *testing.F) {
	for _, request := range []string{
		upgradeRequest("/ws/ns-01"), upgradeRequest("/ws/ns-01") + "early", "GET / HTTP/1.1\nHost: h\n\n",
		"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", "GET http://h/ws/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", "GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "GET / HTTP/1.1\r\nHost: h\r\nX\x00: z\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: h\r\nX: \x7f\r\n\r\n", "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
	} {
		f.Add([]byte(request))
	}
	x := &fastPath{proxy: &proxy{limits: limits{headerBytes: 4 << 10, headerFields: 100}}}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, size := x.parseUpgrade(data)
		if got == nil {
			return
		}
		want, rest := served(t, data)
		if want == nil {
			t.Fatalf("the fast path takes %q, net/http does not", data)
		}
		if got.Method != want.Method || got.RequestURI != want.RequestURI || got.Host != want.Host || got.ContentLength != want.ContentLength ||
			!maps.EqualFunc(got.Header, want.Header, slices.Equal[[]string]) {
			t.Errorf("the fast path has %+v, net/http %+v", got, want)
		}
		if got.ContentLength == 0 && string(data[size:]) != rest {
			t.Errorf("the fast path has %q after the request, net/http %q", data[size:], rest)
		}
	})
}

// served returns the request that net/http's server gives its handler of data, and
// what follows it; nil if it gives none.
func served(t *testing.T, data []byte) (request *http.Request, rest string) {
	t.Helper()
	done := make(chan struct{}, 2)
	conn := &spoken{Reader: bytes.NewReader(data)}
	server := &http.Server{MaxHeaderBytes: 4 << 10, ErrorLog: httpLog(slog.New(slog.DiscardHandler))}
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			done <- struct{}{}
		}
	}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { done <- struct{}{} }()
		request = r.Clone(t.Context())
		if _, rw, err := http.NewResponseController(w).Hijack(); err == nil {
			all, _ := io.ReadAll(rw)
			rest = string(all)
		}
	})
	server.Serve(&oneListener{conn: conn}) // its error is the listener's second
	<-done
	return request, rest
}

// spoken is a connection whose client has said all it will, and hears nothing.
type spoken struct{ *bytes.Reader }

func (*spoken) Write(b []byte) (int, error)      { return len(b), nil }
func (*spoken) Close() error                     { return nil }
func (*spoken) LocalAddr() net.Addr              { return nil }
func (*spoken) RemoteAddr() net.Addr             { return nil }
func (*spoken) SetDeadline(time.Time) error      { return nil }
func (*spoken) SetReadDeadline(time.Time) error  { return nil }
func (*spoken) SetWriteDeadline(time.Time) error { return nil }

// oneListener accepts one connection.
type oneListener struct{ conn net.Conn }

func (l *oneListener) Accept() (net.Conn, error) {
	if conn := l.conn; conn != nil {
		l.conn = nil
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (*oneListener) Close() error   { return nil }
func (*oneListener) Addr() net.Addr { return nil }

// As TestMoveWithinADial, of an upgrade that was held before that dial.
func TestMoveWithinADialOnceHeld(t *testing.T) {
	moveWithinADial(t, upgradeRequest("/ws/ns-01"), true)
}

// A client that has waited for its owner, and whose namespace begins to move within its dial,
// waits on for the rest of -hold: no other time bounds it then.
func TestStepWithinADialOnceParked(t *testing.T) {
	var unknown, moving atomic.Bool // the address is not known at once; a step begins in the next dial
	dialing, began, ends := make(chan struct{}), make(chan struct{}), make(chan struct{})
	old := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching)
		go io.Copy(io.Discard, br)
		select {
		case <-ends:
		case <-t.Context().Done():
		}
	})
	next := startStub(t, "127.0.0.1:0", answer(switching))
	p := startProxy(t, []string{old.addr, next.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
		p.limits.holdTimeout, p.relay.closeTimeout = time.Hour, time.Hour
		uid, resolve := p.backends.podUID, p.backends.resolve
		p.backends.podUID = func(i int) string {
			if !unknown.Load() && moving.CompareAndSwap(true, false) {
				close(dialing)
				<-began
			}
			return uid(i)
		}
		p.backends.resolve = func(ctx context.Context, i int) (string, error) {
			if unknown.CompareAndSwap(true, false) {
				return "", errors.New("not known yet")
			}
			return resolve(ctx, i)
		}
	})
	defer p.open(t, "ns-01").Close()
	moving.Store(true)
	unknown.Store(true)
	waiting := p.send(t, "ns-01")
	<-dialing
	p.moveTo(t, "2", 1)
	eventually(t, "state of ns-01", stateHeld, func() ownerState { return p.mover.assignmentOf("ns-01").state })
	close(began)
	queues := p.backends.queues
	eventually(t, "clients in the queue of held namespaces", 1, func() int {
		queues.mu.Lock()
		defer queues.mu.Unlock()
		return len(queues.queue(queueHeld).waiters)
	})
	c := p.fastConns()[0]
	c.poller.mu.Lock()
	left := time.Until(c.ctx.deadline)
	c.poller.mu.Unlock()
	if left < time.Minute {
		t.Errorf("the client waits for %s more, want the rest of an hour", left)
	}
	close(ends)
	mustAnswer(t, waiting, 101)
}

// The time of a held client ends between its park and its place in the queue of its
// owner. It leaves nothing in the queue: a turn to dial that nobody takes would stop the
// dials of that owner for ever.
func TestFastPathQueuesNobodyWhoIsOver(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // resume runs before park goes on
	for range 8 {                                   // or mostly so
		queueWhoIsOver(t)
	}
}

func queueWhoIsOver(t *testing.T) {
	t.Helper()
	var ready atomic.Bool
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
		p.limits.holdTimeout = time.Hour
		p.backends.queues.backendReady = func(int) error {
			if ready.Load() {
				return nil
			}
			return errors.New("not ready")
		}
	})
	queues := p.backends.queues
	queued := func() [2]int {
		queues.mu.Lock()
		defer queues.mu.Unlock()
		q := queues.queue(0)
		return [2]int{len(q.waiters), q.dialing}
	}
	conn := p.send(t, "ns-01")
	p.waitHeld(t, 1)
	eventually(t, "waiters and dials", [2]int{1, 0}, queued)
	c := p.fastConns()[0]
	p.relay.mu.Lock()
	queues.recheckOwners(func(string) int { return unresolved }) // as if the owner had changed
	waitStacks(t, "park asks for the owner again", func(stacks []byte) bool {
		return bytes.Contains(stacks, []byte(".recheckOwner("))
	})
	queues.mu.Lock() // another client is at the queues
	p.relay.mu.Unlock()
	waitStacks(t, "park comes to the queue", func(stacks []byte) bool {
		return bytes.Contains(stacks, []byte(".enqueue(")) && c.parked.Load()
	})
	queues.mu.Unlock()
	c.ctx.expire() // its time is over
	mustAnswer(t, conn, http.StatusServiceUnavailable)
	p.waitPending(t, 0)
	eventually(t, "waiters and dials", [2]int{0, 0}, queued)
	ready.Store(true)
	queues.readinessChanged()
	if got := queued(); got != [2]int{0, 0} {
		t.Errorf("%v waiters and dials after the owner is ready, want none", got)
	}
}

// A 101 that is longer than the buffer of the client's socket arrives whole, both ways.
func TestUpgradeWithALongResponse(t *testing.T) {
	long := strings.Replace(switching, "\r\n", "\r\nX-Long: "+strings.Repeat("x", 30<<10)+"\r\n", 1)
	small := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 88)
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 2304)
		})
	}}
	for name, request := range bothWays("/ws/ns-01") {
		t.Run(name, func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", answer(long+"early"))
			p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
				p.limits.headerBytes = 66 << 10
			})
			conn, err := small.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			mustWrite(t, conn, request)
			conn.SetReadDeadline(time.Now().Add(patience))
			br := bufio.NewReader(conn)
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || len(resp.Header.Get("X-Long")) != 30<<10 {
				t.Fatalf("the client got %v, %v; want the whole 101", resp, err)
			}
			early := make([]byte, 5)
			if _, err := io.ReadFull(br, early); err != nil || string(early) != "early" {
				t.Errorf("after the 101 the client got %q, %v; want what came with it", early, err)
			}
		})
	}
}

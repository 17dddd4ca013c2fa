package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// freeAddr returns an address where somebody may listen.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// refusingAddr returns an address where nobody listens, or can until the test
// ends: its port is that of a connection.
func refusingAddr(t testing.TB) string {
	t.Helper()
	conn, _ := tcpPair(t)
	return conn.LocalAddr().String()
}

// send writes an upgrade request without waiting for its answer.
func (p *testProxy) send(t testing.TB, namespace string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	mustWrite(t, conn, upgradeRequest("/ws/"+namespace))
	return conn
}

// underWay is how many upgrades are.
func (p *testProxy) underWay() int {
	all, _ := p.waiting.taken(0)
	return all
}

// waitWaiting waits until n upgrades are under way.
func (p *testProxy) waitWaiting(t testing.TB, n int) {
	t.Helper()
	for end := time.Now().Add(patience); p.underWay() != n; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d upgrades under way, want %d", p.underWay(), n)
		}
	}
}

func (p *testProxy) waitSessions(t testing.TB, n int) {
	t.Helper()
	for end := time.Now().Add(patience); p.relay.size() != n; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d sessions, want %d", p.relay.size(), n)
		}
	}
}

func mustAnswer(t testing.TB, conn net.Conn, status int) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != status {
		t.Fatalf("answer %+v, %v; want %d", resp, err, status)
	}
}

func TestHoldUntilTheOwnerIsThere(t *testing.T) {
	addr := freeAddr(t)
	p := startProxy(t, []string{addr}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	p.waitWaiting(t, 1)
	startStub(t, addr, echo)
	mustAnswer(t, conn, 101)
}

func TestHoldEnds(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, func(p *proxy) { p.limits.hold = 200 * time.Millisecond })
	_, _, resp := p.ask(t, upgradeRequest("/ws/ns-01"))
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("status %d, Retry-After %q, %q", resp.StatusCode, resp.Header.Get("Retry-After"), body)
	}
	p.mustTell(t, 503, string(body), "backend-0 could not be reached within 200ms: ")
	p.mustTell(t, 503, string(body), "refused")
	p.waitResult(t, resultHoldTimeout)
}

// A dial that the end of -hold cuts short says nothing about the backend: the log has
// why the dial before it failed, though that was another upgrade's.
func TestHoldEndsWithinADial(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
			p.limits.hold = 200 * time.Millisecond
			p.backends.dialer.ControlContext = func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
				<-ctx.Done()
				return ctx.Err()
			}
		})
		if !p.backends.holds.try(0) {
			t.Fatal("nobody may dial")
		}
		p.backends.holds.done(0, errors.New("why the last dial failed"), false)
		_, _, resp := p.ask(t, request)
		body, _ := io.ReadAll(resp.Body)
		p.mustTell(t, resp.StatusCode, string(body), "within 200ms: why the last dial failed")
	})
}

// lateContext is a context whose deadline passes before it ends.
type lateContext struct {
	context.Context
	late bool
}

func (c *lateContext) Deadline() (time.Time, bool) {
	if c.late {
		return time.Now().Add(-time.Second), true
	}
	return time.Now().Add(time.Hour), true
}

// A dial is cut short too where it sees that the deadline has passed before the context
// ends: package net has a timer of its own for that.
func TestHoldEndsBeforeItsContext(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	ctx := &lateContext{Context: ended}
	b := fixedBackends("backend", []string{"127.0.0.1:1"})
	locate, nowhere := b.locate, errors.New("nowhere")
	b.locate = func(lookup context.Context, ordinal int) (string, error) {
		switch {
		case !ctx.late:
			ctx.late = true
			return "", nowhere
		default:
			return locate(lookup, ordinal)
		}
	}
	b.forget = func(int) { time.AfterFunc(time.Second, end) } // a dial has failed: if it is not the end, this is
	defer end()
	if _, _, err := b.hold(ctx, func() (int, error) { return 0, nil }); !errors.Is(err, nowhere) {
		t.Errorf("it ended with %v, want %v", err, nowhere)
	}
}

// A client that is held when its namespace gets another owner goes there.
func TestHoldFollowsTheTable(t *testing.T) {
	other := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{refusingAddr(t), other.addr}, map[string]string{"ns-01": "backend-0"}, nil)
	conn := p.send(t, "ns-01")
	p.waitWaiting(t, 1)
	p.router.update(entries{source: "test", version: "42", data: pack(map[string]string{"ns-01": "backend-1"})})
	mustAnswer(t, conn, 101)
	stamp := p.router.table().stamp
	if head := other.heads()[0]; !strings.Contains(head, "X-Router-Table: "+stamp+"\r\n") {
		t.Errorf("the backend got %q, want table %s", head, stamp)
	}
}

func TestHoldEndsWithItsClient(t *testing.T) {
	p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	p.waitWaiting(t, 1)
	conn.Close()
	p.waitResult(t, resultClientGone)
	p.waitWaiting(t, 0)
}

// A client that leaves while the backend thinks leaves nothing behind.
func TestHandshakeEndsWithItsClient(t *testing.T) {
	gone := make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.Copy(io.Discard, br)
		close(gone)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	for len(backend.heads()) == 0 {
		<-time.After(time.Millisecond)
	}
	reset(conn.(*net.TCPConn))
	p.waitResult(t, resultClientGone)
	<-gone
}

// A client that half-closes its connection gets the answer of the owner that was asked,
// whoever waits for that, and is there after it.
func TestHalfClosedClientIsAnswered(t *testing.T) {
	forbidden := "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
	for _, tt := range []struct {
		answer string
		status int
		early  bool // it half-closes before its owner is asked
		slow   bool // the owner answers when express has left the client to net/http
	}{{switching, 101, false, false}, {switching, 101, true, false}, {switching, 101, false, true}, {forbidden, 403, false, false}, {forbidden, 403, true, true}} {
		for way, request := range bothWays("/ws/ns-01") {
			t.Run(fmt.Sprintf("%d, early %v, slow %v, %s", tt.status, tt.early, tt.slow, way), func(t *testing.T) {
				t.Parallel()
				var p *testProxy
				asked, ended := make(chan struct{}), make(chan struct{})
				backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
					close(asked)
					<-ended
					for end := time.Now().Add(patience); tt.slow && p.http.Load() == 0 && time.Now().Before(end); {
						<-time.After(time.Millisecond)
					}
					io.WriteString(conn, tt.answer)
					io.Copy(io.Discard, br) // the FIN comes here too
					io.WriteString(conn, "last words")
				})
				p = startProxy(t, []string{backend.addr}, map[string]string{}, nil)
				conn, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				mustWrite(t, conn, request)
				if !tt.early {
					<-asked
				}
				conn.(*net.TCPConn).CloseWrite()
				close(ended)
				conn.SetReadDeadline(time.Now().Add(patience))
				br := bufio.NewReader(conn)
				resp, err := http.ReadResponse(br, nil)
				if err != nil || resp.StatusCode != tt.status {
					t.Fatalf("answer %+v, %v; want %d", resp, err, tt.status)
				}
				if rest, err := io.ReadAll(br); tt.status == 101 && string(rest) != "last words" {
					t.Errorf("%q came after the 101, and %v; want the backend's last words", rest, err)
				}
			})
		}
	}
}

// One that is held gets its answer soon, as most who half-close have left: their
// places are for others.
func TestHalfClosedClientIsNotHeld(t *testing.T) {
	for way, request := range bothWays("/ws/ns-01") {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			p := startProxy(t, []string{refusingAddr(t)}, map[string]string{}, func(p *proxy) { p.limits.hold = time.Hour })
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			mustWrite(t, conn, request)
			p.waitWaiting(t, 1)
			conn.(*net.TCPConn).CloseWrite()
			mustAnswer(t, conn, 503)
			p.waitResult(t, resultClientGone)
			p.waitWaiting(t, 0)
		})
	}
}

// On a Unix socket, where a proxy is, a client that closes is gone at once.
func TestHandshakeEndsWithItsProxy(t *testing.T) {
	for way, request := range bothWays("/ws/ns-01") {
		asked, gone := make(chan struct{}), make(chan struct{})
		backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
			close(asked)
			io.Copy(io.Discard, br)
			close(gone)
		})
		socket := filepath.Join(t.TempDir(), "s")
		r := startRouter(t, "-listen", "unix:"+socket, "-backends", backend.addr, "-overrides", t.TempDir(), "-handshake-timeout", "1h")
		r.log.wait(t, "table", 1)
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, conn, request)
		<-asked
		conn.Close()
		select {
		case <-gone:
		case <-time.After(patience):
			t.Errorf("%s: the backend still has the upgrade of a client that is gone", way)
		}
	}
}

func TestLimits(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	addrs := []string{backend.addr, refusingAddr(t)}
	data := map[string]string{"here": "backend-0", "away": "backend-1"}

	t.Run("sessions", func(t *testing.T) {
		p := startProxy(t, addrs, data, func(p *proxy) { p.limits.sessions = 2 })
		first := p.open(t, "here")
		p.open(t, "here")
		p.waitSessions(t, 2) // the relay has a session a little later than its client
		_, _, resp := p.ask(t, upgradeRequest("/ws/here"))
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("status %d, want 503 with Retry-After", resp.StatusCode)
		}
		p.waitResult(t, resultMaxSessions)
		first.Close()
		p.waitSessions(t, 1)
		p.open(t, "here")
	})
	t.Run("waiting", func(t *testing.T) {
		p := startProxy(t, addrs, data, func(p *proxy) { p.limits.waiting = 4 }) // 1 of its own for each, 1 of the 2 others
		p.send(t, "away")
		p.send(t, "away")
		p.waitWaiting(t, 2)
		_, _, resp := p.ask(t, upgradeRequest("/ws/away"))
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("status %d, want 503 with Retry-After", resp.StatusCode)
		}
		p.mustTell(t, 503, string(body), "2 upgrades to backend-1 are under way, its share of 4, and 2 in all")
		p.waitResult(t, resultMaxWaiting)
		p.open(t, "here")
	})
}

// Backends that are dead, in whatever way, take no places of those that work, even
// if these are one of many and a crowd comes to them.
func TestLimitsOfABackend(t *testing.T) {
	dead := map[string]func(t *testing.T) string{
		"refuses": func(t *testing.T) string { return refusingAddr(t) },
		"silent":  func(t *testing.T) string { return startStub(t, "127.0.0.1:0", silent).addr },
	}
	for kind, addr := range dead {
		for way, request := range bothWays("/ws/") {
			t.Run(kind+", "+way, func(t *testing.T) {
				t.Parallel()
				addrs := []string{addr(t), addr(t), addr(t), startStub(t, "127.0.0.1:0", echo).addr}
				data := map[string]string{"ns-0": "backend-0", "ns-1": "backend-1", "ns-2": "backend-2", "ns-3": "backend-3"}
				p := startProxy(t, addrs, data, func(p *proxy) { p.limits.waiting = 40 })
				to := func(backend int) string {
					return strings.Replace(request, "/ws/", fmt.Sprintf("/ws/ns-%d", backend), 1)
				}
				for backend := range 3 {
					for range 60 {
						conn, err := net.Dial("tcp", p.addr)
						if err != nil {
							t.Fatal(err)
						}
						t.Cleanup(func() { conn.Close() })
						mustWrite(t, conn, to(backend))
					}
				}
				for p.results[resultMaxWaiting].Load() < 100 {
					<-time.After(time.Millisecond)
				}
				var crowd sync.WaitGroup
				for range 5 {
					crowd.Go(func() {
						for range 5 {
							if _, _, resp := p.ask(t, to(3)); resp.StatusCode != 101 {
								t.Errorf("status %d for the client of a backend that works, want 101", resp.StatusCode)
							}
						}
					})
				}
				crowd.Wait()
				if n := p.underWay(); n > 40 {
					t.Errorf("%d upgrades are under way, want at most 40", n)
				}
			})
		}
	}
}

// What is said of places holds after all that can happen to them.
func TestWaitingPlaces(t *testing.T) {
	for _, shape := range []struct{ backends, limit int }{{1, 10}, {2, 10}, {7, 100}, {100, 10_000}, {100, 10}} {
		var p places
		rng := rand.New(rand.NewPCG(1, 2))
		taken, all := map[int]int{}, 0
		for range 50_000 {
			backend := rng.IntN(rng.IntN(shape.backends) + 1) // those that come first have more
			if n := taken[backend]; n > 0 && rng.IntN(3) == 0 {
				p.leave(backend)
				taken[backend]--
				all--
				continue
			}
			own := max(1, shape.limit/2/shape.backends)
			tookAll, tookOwn, ok := p.take(backend, shape.backends, shape.limit)
			if !ok && taken[backend] < own {
				t.Fatalf("%+v: refused with %d places taken of its own %d", shape, taken[backend], own)
			}
			if ok {
				taken[backend]++
				all++
			}
			if pool := shape.limit - own*shape.backends; ok && taken[backend]-own > (max(0, pool)+1)/2 {
				t.Fatalf("%+v: %d places of one backend, want at most half of the %d of the pool", shape, taken[backend]-own, pool)
			}
			gotAll, gotOwn := p.taken(backend)
			if tookAll != all || tookOwn != taken[backend] || gotAll != all || gotOwn != taken[backend] || all > max(shape.limit, shape.backends) {
				t.Fatalf("%+v: %d places and %d of one backend, want %d and %d", shape, gotAll, gotOwn, all, taken[backend])
			}
		}
		for backend, n := range taken {
			for range n {
				p.move(backend, backend+1)
				p.leave(backend + 1)
			}
		}
		if all, _ := p.taken(0); all != 0 || len(p.of) != 0 || p.pooled != 0 {
			t.Errorf("%+v: %d places after all have left, %d backends, %d of the pool", shape, all, len(p.of), p.pooled)
		}
	}
}

// A limit that means something else for another number of backends counts anew.
func TestWaitingPlacesAfterScaling(t *testing.T) {
	var p places
	count := func(backend, backends int) (n int) {
		for {
			if _, _, ok := p.take(backend, backends, 100); !ok {
				return n
			}
			n++
		}
	}
	for i, want := range []struct{ backend, backends, taken int }{
		{0, 2, 50}, // 25, and half of 50
		{1, 2, 38}, // 25, and half of the other 25
		{2, 5, 10}, // its own alone: the first two have 40 and 28 of the 50 of the pool
	} {
		if n := count(want.backend, want.backends); n != want.taken {
			t.Errorf("step %d: %d places, want %d", i, n, want.taken)
		}
	}
}

//go:build !portable && !386

package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// waitGuest returns the only client on the short way, once it has asked its owner.
func (p *testProxy) waitGuest(t testing.TB) *arrival {
	t.Helper()
	p.waitWaiting(t, 1)
	for end := time.Now().Add(patience); ; <-time.After(time.Millisecond) {
		for _, g := range p.guests() {
			a := g.(*arrival)
			a.mu.Lock()
			asked := a.fd[server] >= 0
			a.mu.Unlock()
			if asked {
				return a
			}
		}
		if time.Now().After(end) {
			t.Fatal("nobody is on the short way")
		}
	}
}

// The bound of an answer's head holds on both ways.
func TestExpressBoundsTheAnswer(t *testing.T) {
	long := strings.Replace(switching, "\r\n", "\r\nX-Long: "+strings.Repeat("x", 9<<10)+"\r\n", 1)
	backend := startStub(t, "127.0.0.1:0", answer(long))
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	mustAnswer(t, p.send(t, "ns-01"), http.StatusBadGateway)
	p.waitResult(t, resultBadGateway)
}

// What a client sends beyond its head stays with the kernel until somebody takes it.
func TestExpressReadsAHeadOnly(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", silent)
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mustWrite(t, conn, upgradeRequest("/ws/ns-01")+strings.Repeat("much ", 10_000))
	a := p.waitGuest(t)
	a.mu.Lock()
	defer a.mu.Unlock()
	if n, most := len(a.head), p.limits.headerBytes; n > most {
		t.Errorf("%d bytes of a client are kept, want at most the %d of a head", n, most)
	}
}

// A dial that was given up leaves what others found out about the backend.
func TestExpressGivesUpADial(t *testing.T) {
	l, fill := fullListener(t)
	defer l.Close()
	for _, conn := range fill {
		defer conn.Close()
	}
	p := startProxy(t, []string{l.Addr().String()}, map[string]string{}, nil)
	conn := p.send(t, "ns-01")
	defer conn.Close()
	a, failure := p.waitGuest(t), errors.New("no route")
	if !p.backends.holds.try(0) {
		t.Fatal("the backend may not be dialled twice at once")
	}
	p.backends.dialled(0, failure, false)
	a.leave()
	p.backends.holds.mu.Lock()
	defer p.backends.holds.mu.Unlock()
	if line := p.backends.holds.lines[0]; line.fails != 1 || line.failure != failure {
		t.Errorf("after a dial that was given up the backend has failed %d times, at last by %v; want 1, %v", line.fails, line.failure, failure)
	}
}

// Clients that leave while their owner is dialled give their turns to dial on.
func TestExpressGivesUpItsTurn(t *testing.T) {
	l, fill := fullListener(t)
	defer l.Close()
	for _, conn := range fill {
		defer conn.Close()
	}
	p := startProxy(t, []string{l.Addr().String()}, map[string]string{}, nil)
	for range 2 * dialsMost {
		conn := p.send(t, "ns-01")
		p.waitWaiting(t, 1)
		reset(conn.(*net.TCPConn))
		p.waitWaiting(t, 0)
	}
	dialling := func() int {
		p.backends.holds.mu.Lock()
		defer p.backends.holds.mu.Unlock()
		return p.backends.holds.line(0).dialing
	}
	for end := time.Now().Add(patience); dialling() != 0; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d turns are taken after all have left, want 0", dialling())
		}
	}
}

// The backend is told of a client that has reset its connection where it came
// from, and not only what the client says itself.
func TestExpressForwardsWhoWasReset(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	clients, read := make(chan *net.TCPConn, 1), sync.Once{}
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
		p.namespace = func(r *http.Request) (namespace string, no *refusal) {
			read.Do(func() { // between the read of its head and the hand-over to net/http
				conn := <-clients
				conn.SetLinger(0)
				conn.Close()
				no = refuse(resultNotFound, "so that it is net/http's")
			})
			if no != nil {
				return "", no
			}
			return pathNamespace(r)
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

// While a client and its owner are handed over, they need upgradeDescriptors.
func TestExpressDescriptors(t *testing.T) {
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
	a := p.waitGuest(t)
	for end := time.Now().Add(patience); len(backend.heads()) == 0 && time.Now().Before(end); {
		<-time.After(time.Millisecond)
	}
	a.leave()
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

// The server may close a client's connection while its request begins: the owner's
// is closed once.
func TestFrontConnCloses(t *testing.T) {
	for range 20 {
		near, far := net.Pipe()
		defer far.Close()
		owner := &closes{}
		c := &frontConn{Conn: near, gate: wideGate(t)}
		c.pending.Store(&pending{backend: owner})
		var both sync.WaitGroup
		both.Go(func() { c.Close() })
		both.Go(func() {
			if conn := takePending(context.WithValue(t.Context(), frontKey{}, c)).backend; conn != nil {
				conn.Close()
			}
		})
		both.Wait()
		if owner.n != 1 {
			t.Fatalf("the owner's connection was closed %d times, want once", owner.n)
		}
	}
}

// A head that net/http has read is kept by nobody, though the connection stays.
func TestResumedForgets(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	defer near.Close()
	c := &resumed{near, []byte("head")}
	for _, want := range []string{"hea", "d"} {
		got := make([]byte, 3)
		if n, err := c.Read(got); err != nil || string(got[:n]) != want {
			t.Fatalf("%q was read, and %v; want %q", got[:n], err, want)
		}
	}
	if c.first != nil {
		t.Errorf("%d bytes are kept of a head that was read, want none", cap(c.first[:0]))
	}
}

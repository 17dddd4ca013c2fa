package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// lostAfter is the TCP_USER_TIMEOUT of the connections with a backend that takes nothing. The
// kernel gives up such a connection, with ETIMEDOUT, though its peer is there.
const lostAfter = 100 * time.Millisecond

// tightListener listens until the test ends. For a connection that is not read, the kernel
// takes a few KiB.
func tightListener(t *testing.T) net.Listener {
	t.Helper()
	l := listenLocal(t)
	raw, err := l.(*net.TCPListener).SyscallConn()
	must(t, err)
	raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 1) })
	must(t, err)
	return l
}

// deafBackend gives this answer to a request, and calls more. It reads nothing more, and ends
// nothing before the test ends.
func deafBackend(t *testing.T, answer string, more func(net.Conn)) string {
	t.Helper()
	return serveStub(t, tightListener(t), func(conn net.Conn, _ *bufio.Reader) {
		io.WriteString(conn, answer)
		more(conn)
		<-t.Context().Done()
	}).addr
}

// lostProxy starts a proxy with two backends: backend-0 at addr, which owns ns-01 and is
// given up after lostAfter, and next. The router waits for each flight until it stops.
func lostProxy(t *testing.T, addr string, change func(*proxy)) (p *testProxy, next *stubBackend) {
	t.Helper()
	next = startStub(t, "127.0.0.1:0", echo)
	p = startProxy(t, []string{addr, next.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
		p.backends.dialer = newDialer(lostAfter)
		if change != nil {
			change(p)
		}
	})
	return p, next
}

// mustWaitForLost checks that a step which moves ns-01 from backend-0 waits for what that
// backend may still serve, and that the end of this wait is counted.
func (p *testProxy) mustWaitForLost(t *testing.T, next *stubBackend) {
	t.Helper()
	p.moveTo(t, "3", 1)
	// A session that has not ended is in a later step: until then its clients go to backend-0.
	eventually(t, "state of ns-01", stateHeld, func() ownerState { return p.mover.assignmentOf("ns-01").state })
	waiting := dial(t, p.addr)
	mustWrite(t, waiting, upgradeRequest("/ws/ns-01"))
	eventually(t, "the step waits for backend-0 alone", true, func() bool {
		wait := p.waitsFor()
		return wait.Sessions == 0 && wait.Upgrades+wait.Requests > 0
	})
	if n := len(next.heads()); n > 0 {
		t.Errorf("the new owner got %d requests while the old one may serve the namespace", n)
	}
	wantEqual(t, "ends that are not proven", p.mover.flights.unproven.Load(), 0)
	p.mover.flights.cancel() // as at the end of -handoff-proof-timeout
	mustAnswer(t, waiting, 101)
	if n := p.mover.flights.unproven.Load(); n == 0 {
		t.Error("no end is counted as not proven")
	}
}

// A connection with a backend that the kernel gave up says nothing of the backend, which may
// go on with the session. A step waits as for a backend that is silent, whichever call has
// taken the error from the socket: the next one returns a plain end.
func TestFlightOfLostSession(t *testing.T) {
	frame := lostFrame()
	for name, tt := range map[string]struct {
		data    []byte
		closing bool
	}{
		"read":                   {frame, false},
		"send":                   {bytes.Repeat(frame, 64), false}, // more than the router's socket takes
		"in a closing handshake": {frame, true},
	} {
		t.Run(name, func(t *testing.T) {
			p, next := lostProxy(t, deafBackend(t, switching, func(net.Conn) {}), func(p *proxy) { p.relay.closeTimeout = time.Hour })
			conn := p.open(t, "ns-01")
			s := p.onlySession(t)
			go conn.Write(tt.data)
			if tt.closing {
				eventually(t, "the router has sent the frame", true, func() bool { return s.bytes()[clientSide] >= int64(len(frame)) })
				p.moveTo(t, "2", 1)
			}
			eventually(t, "the session blocks no step", true, s.isOverForSteps)
			p.mustWaitForLost(t, next)
		})
	}
}

// lostFrame is a frame that is more than a deafBackend's socket takes, and less than the router's.
func lostFrame() []byte { return frameBytes(0x82, true, 256<<10, make([]byte, 256<<10)) }

// It is the same with an upgrade that its owner may have.
func TestFlightOfLostUpgrade(t *testing.T) {
	request := strings.Replace(upgradeRequest("/ws/ns-01"), "\r\n\r\n", "\r\nX-Large: "+strings.Repeat("x", 6<<10)+"\r\n\r\n", 1)
	for name, request := range map[string]string{"simple": request, "net/http": strings.Replace(request, "GET ", "GET http://www.mydomain.com", 1)} {
		t.Run(name, func(t *testing.T) {
			p, next := lostProxy(t, tightListener(t).Addr().String(), nil)
			_, _, resp := p.ask(t, request)
			wantEqual(t, "the status of an upgrade whose owner was lost", resp.StatusCode, 504)
			p.mustWaitForLost(t, next)
		})
	}
}

// It is the same with a plain request.
func TestFlightOfLostRequest(t *testing.T) {
	for name, answer := range map[string]string{
		"no answer yet":       "",
		"an answer has begun": "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no",
	} {
		t.Run(name, func(t *testing.T) {
			p, next := lostProxy(t, deafBackend(t, answer, func(net.Conn) {}), nil)
			conn := dial(t, p.addr)
			mustWrite(t, conn, fmt.Sprintf("POST /ws/ns-01 HTTP/1.1\r\nHost: www.mydomain.com\r\nContent-Length: %d\r\n\r\n", 1<<30))
			go io.Copy(conn, endless{})
			eventually(t, "plain requests that failed", int64(1), func() int64 {
				return p.forwarder.results[resultBadGateway].Load() + p.forwarder.results[resultBrokenOff].Load()
			})
			p.mustWaitForLost(t, next)
		})
	}
}

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// A session that ends for its age or for a drain, and whose backend does not answer the Close
// frame in its time, is not over for a step that comes later, or has come already: the backend
// may go on. The step waits until the backend ends its side, its pod is gone, or the router
// waits no longer, which is counted.
func TestFlightOfUnansweredClose(t *testing.T) {
	for name, tt := range map[string]struct {
		cause    cause
		toClient string
		first    bool // the step comes before the time of the answer is over
		unproven int64
		end      func(p *testProxy, release func())
	}{
		"max-age, it ends":           {causeMaxAge, restarts, false, 0, func(_ *testProxy, release func()) { release() }},
		"drain, it ends":             {causeDrain, goesAway, false, 0, func(_ *testProxy, release func()) { release() }},
		"max-age, the step is first": {causeMaxAge, restarts, true, 0, func(_ *testProxy, release func()) { release() }},
		"max-age, given up":          {causeMaxAge, restarts, false, 1, func(p *testProxy, _ func()) { p.mover.flights.cancel() }},
		"max-age, its pod is gone": {causeMaxAge, restarts, false, 0, func(p *testProxy, _ func()) {
			p.relay.setPods(map[int]string{0: "b"})
			p.mover.tableOrPodChanged()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ends := make(chan struct{})
			old := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
				io.WriteString(conn, switching)
				io.Copy(io.Discard, br)
				select {
				case <-ends:
				case <-t.Context().Done():
				}
			})
			next := startStub(t, "127.0.0.1:0", echo)
			p := startProxy(t, []string{old.addr, next.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
				p.relay.closeTimeout = time.Hour
				p.backends.podUID = func(int) string { return "a" }
				p.relay.setPods(map[int]string{0: "a"})
			})
			conn := p.open(t, "ns-01")
			s := p.onlySession(t)
			s.closeGracefully(tt.cause, nil)
			if tt.first {
				p.moveTo(t, "2", 1)
				eventually(t, "the step waits for the session", 1, func() int { return p.waitsFor().Sessions })
			}
			s.closeExpired() // the time for the client's message
			s.closeExpired() // the time for the backend's answer
			mustFrames(t, conn, false, tt.toClient)
			conn.Close()
			eventually(t, "the session has ended", true, s.isOver.Load)
			wantEqual(t, "sessions that were cut", p.relay.cut[tt.cause].Load(), 1)
			p.moveTo(t, "3", 1)
			waiting := dial(t, p.addr)
			mustWrite(t, waiting, upgradeRequest("/ws/ns-01"))
			eventually(t, "the step waits for backend-0 alone", stepWait{Backend: "backend-0", Upgrades: 1}, func() stepWait {
				wait := p.waitsFor()
				wait.Seconds = 0
				return wait
			})
			wantEqual(t, "requests to the new owner", len(next.heads()), 0)
			tt.end(p, func() { close(ends) })
			mustAnswer(t, waiting, 101)
			wantEqual(t, "ends that are not proven", p.mover.flights.unproven.Load()+p.relay.unproven.Load(), tt.unproven)
		})
	}
}

// An owner that refuses an upgrade is not done with it before the end of its answer: until then a
// step waits for it. If the client leaves before, it waits for the end of the owner's side.
func TestFlightOfLongAnswer(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		for name, leaves := range map[string]bool{"read to its end": false, "the client leaves": true} {
			t.Run(name, func(t *testing.T) {
				ends := make(chan struct{})
				old := startStub(t, "127.0.0.1:0", func(conn net.Conn, _ *bufio.Reader) {
					io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nno")
					select {
					case <-ends:
					case <-t.Context().Done():
					}
					io.WriteString(conn, "pe")
				})
				next := startStub(t, "127.0.0.1:0", echo)
				p := startProxy(t, []string{old.addr, next.addr}, map[string]string{"ns-01": "backend-0"}, nil)
				refused := dial(t, p.addr)
				mustWrite(t, refused, request)
				eventually(t, "requests to the old owner", 1, func() int { return len(old.heads()) })
				waitStacks(t, "the answer is passed on", func(stacks []byte) bool {
					return bytes.Contains(stacks, []byte(".passResponse("))
				})
				p.moveTo(t, "2", 1)
				if leaves {
					refused.Close()
				}
				waiting := dial(t, p.addr)
				mustWrite(t, waiting, request)
				eventually(t, "the step waits for backend-0 alone", stepWait{Backend: "backend-0", Upgrades: 1}, func() stepWait {
					wait := p.waitsFor()
					wait.Seconds = 0
					return wait
				})
				wantEqual(t, "requests to the new owner", len(next.heads()), 0)
				close(ends)
				mustAnswer(t, waiting, 101)
				wantEqual(t, "ends that are not proven", p.mover.flights.unproven.Load(), 0)
			})
		}
	})
}

// waitsFor returns for which backend the step waits, if it is one.
func (p *testProxy) waitsFor() (wait stepWait) {
	if waits := p.mover.waitingFor(p.mover.current.Load()); len(waits) == 1 {
		wait = waits[0]
	}
	return wait
}

// onlySession waits for the only session, and returns it.
func (p *testProxy) onlySession(t *testing.T) *session {
	t.Helper()
	p.waitSessions(t, 1)
	return p.relay.filter(func(*session) bool { return true })[0]
}

// An abandoned flight is over once its pod was replaced, also if the router would wait for its
// end for ever: its slot is free, and nothing is unproven.
func TestFlightOfReplacedPod(t *testing.T) {
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprint("lost is ", lost), func(t *testing.T) {
			backend := startStub(t, "127.0.0.1:0", func(net.Conn, *bufio.Reader) { <-t.Context().Done() }) // it ends nothing
			p := startProxy(t, []string{backend.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
				p.mover.flights.proofTimeout = 0
			})
			p.relay.setPods(map[int]string{0: "a"})
			u := &pendingRequest{limit: &p.pending, namespace: "ns-01", assignment: assignment{backend: 0}}
			u.flight = p.mover.flights.add("ns-01", 0, "a", nil)
			if lost {
				u.abandon(nil)
			} else {
				conn := dial(t, backend.addr)
				mustWrite(t, conn, upgradeRequest("/ws/ns-01"))
				u.abandon(conn)
			}
			p.mover.tableOrPodChanged()
			wantEqual(t, "slots that are taken", p.underWay(), 1)
			if p.relay.setPods(map[int]string{0: "b"}) {
				p.mover.tableOrPodChanged()
			}
			p.mover.wake.notify()
			eventually(t, "slots that are taken", 0, p.underWay)
			p.noFlights(t)
			wantEqual(t, "unproven", p.mover.flights.unproven.Load(), 0)
		})
	}
}

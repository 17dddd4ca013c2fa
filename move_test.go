package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The mover closes the sessions whose owner changed, and no others.
func TestMoveExactlyThose(t *testing.T) {
	var addrs []string
	for range 4 {
		addrs = append(addrs, startStub(t, "127.0.0.1:0", echo).addr)
	}
	before := map[string]string{"pinned": "backend-0", "released": "backend-1"}
	after := map[string]string{"pinned": "backend-0", "moved": "backend-3", "bad": "backend-x"}
	p := startProxy(t, addrs, before, nil)
	old := p.tables.table()
	stay, leave := []string{"pinned", "bad"}, []string{"moved", "released"}
	for i := range 20 {
		stay = append(stay, fmt.Sprintf("ns-%02d", i))
	}
	if owner, _ := old.ownerOf("moved"); owner == 3 {
		t.Fatal("the hash has it on backend-3 already")
	}
	if bucket("released", 4) == 1 {
		t.Fatal("the hash has it on backend-1 too")
	}
	var leaving []net.Conn
	for _, namespace := range leave {
		leaving = append(leaving, p.open(t, namespace))
	}
	for _, namespace := range stay {
		conn := p.open(t, namespace)
		defer mustRead(t, conn, "pong")
		defer mustWrite(t, conn, "pong")
	}
	p.override("42", after)
	for _, conn := range leaving {
		mustFrames(t, conn, false, restarts)
		conn.Close()
	}
	p.waitMoved(t, int64(len(leave)))
	if got := p.relay.size(); got != len(stay) {
		t.Errorf("%d sessions left, want %d", got, len(stay))
	}
}

// override makes data the proxy's overrides.
func (p *testProxy) override(version string, data map[string]string) {
	p.tables.update(sourceContent{id: sourceID{name: "test"}, version: version, overrides: newOverrideSet(data)})
}

// waitMoved waits until n sessions have moved.
func (p *testProxy) waitMoved(t *testing.T, n int64) {
	t.Helper()
	eventually(t, "sessions that have moved", n, p.relay.ended[causeMoved].Load)
}

// waitCount waits until backend 0 has this count.
func (p *testProxy) waitCount(t *testing.T, want sessionCounts) {
	t.Helper()
	eventually(t, "sessions of backend-0", want, func() sessionCounts { return p.relay.counts()[0] })
}

// If the table is swapped between the handshake and the hand-over, the session does not
// stay with its old owner.
func TestMoveAtSessionStart(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1", "127.0.0.1:1"}, map[string]string{"ns-01": "backend-0"}, nil)
	p.override("42", map[string]string{"ns-01": "backend-1"})
	eventually(t, "the owner", 1, func() int { return p.mover.assignmentOf("ns-01").backend })
	p.pending.acquire(0, 2, 10)
	pairs, s := newSessionConns(t, "tcp", "tcp"), newSession("ns-01", 0, "")
	u := &pendingRequest{limit: &p.pending, namespace: "ns-01"}
	p.openSession(u, s, func() { pairs.start(p.relay, s, [2][]byte{}) })
	mustFrames(t, pairs.far[backendSide], true, goesAway)
	pairs.far[backendSide].Close()
	mustFrames(t, pairs.far[clientSide], false, restarts)
	pairs.far[clientSide].Close()
	p.waitMoved(t, 1)
}

// pods are two pods of backend-0: the second replaces the first.
type pods struct {
	stubs [2]*stubBackend
	now   atomic.Int32 // the present one
}

// newPods starts the two pods.
func newPods(t *testing.T, first, second func(net.Conn, *bufio.Reader)) *pods {
	t.Helper()
	return &pods{stubs: [2]*stubBackend{startStub(t, "127.0.0.1:0", first), startStub(t, "127.0.0.1:0", second)}}
}

// serve has the proxy find the present pod behind backend 0, with uid a and then b.
func (b *pods) serve(p *proxy) {
	uid, resolve := p.backends.podUID, p.backends.resolve
	p.backends.podUID = func(i int) string {
		if i != 0 {
			return uid(i)
		}
		return []string{"a", "b"}[b.now.Load()]
	}
	p.backends.resolve = func(ctx context.Context, i int) (string, error) {
		if i != 0 {
			return resolve(ctx, i)
		}
		return b.stubs[b.now.Load()].addr, nil
	}
}

// When a pod of a backend is replaced, the sessions with the old pod move, even if that
// pod does not answer. A namespace gets no session with the new pod before. Other
// namespaces need not wait.
func TestMoveToAnotherPod(t *testing.T) {
	for name, old := range map[string]func(net.Conn, *bufio.Reader){"that answers": echo, "that hangs": answer(switching)} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, request string) { moveToAnotherPod(t, old, name == "that hangs", request) })
		})
	}
}

func moveToAnotherPod(t *testing.T, old func(net.Conn, *bufio.Reader), unproven bool, request string) {
	var relay atomic.Pointer[relay]
	pods := newPods(t, old, func(conn net.Conn, br *bufio.Reader) {
		if relay.Load().oldPodSessionsDone("ns-01") != nil {
			io.WriteString(conn, "HTTP/1.1 404 Not Found\r\n\r\n") // to ns-02
		} else {
			echo(conn, br)
		}
	})
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
		relay.Store(p.relay)
		p.relay.closeTimeout = time.Second
		pods.serve(p)
	})
	if p.relay.setPods(map[int]string{0: "a"}) {
		t.Error("setPods reports that the first known pod has replaced another")
	}
	conn, _, _ := p.ask(t, request)
	p.waitSessions(t, 1)
	if !p.relay.setPods(map[int]string{0: "b"}) || p.relay.setPods(map[int]string{0: "b"}) {
		t.Error("setPods does not report a replaced pod, or reports it twice")
	}
	pods.now.Store(1)
	if n := p.relay.counts()[0]; n.open != 1 || n.onOldPod != 1 {
		t.Errorf("%+v, want one session, with the old pod", n)
	}
	waiting := dial(t, p.addr)
	mustWrite(t, waiting, request)
	_, _, other := p.ask(t, upgradeRequest("/ws/ns-02"))
	if other.StatusCode != 404 {
		t.Errorf("ns-02 got %s, want the answer of the new pod", other.Status)
	}
	if heads := pods.stubs[1].heads(); len(heads) != 1 {
		t.Errorf("the new pod was asked by %q, want ns-02 only", heads)
	}
	p.mover.tableOrPodChanged()
	mustFrames(t, conn, false, restarts)
	conn.Close()
	mustAnswer(t, waiting, 101)
	p.waitMoved(t, 1)
	p.waitCount(t, sessionCounts{open: 1, total: 2}) // with the new pod
	if n := p.relay.unproven.Load(); unproven && n != 1 {
		t.Errorf("%d sessions have an end that is not proven, want 1", n)
	}
	p.relay.setPods(map[int]string{0: "c"})
	if n := p.relay.counts()[0]; n.onOldPod != 1 {
		t.Errorf("%+v, want the session with pod b to be on an old pod", n)
	}
}

// If a pod is replaced before there is a table, there is nothing to move.
func TestMoveBeforeTheTable(t *testing.T) {
	b := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{b.addr, b.addr}, nil, nil)
	p.relay.setPods(map[int]string{0: "a"})
	for range 2 { // when run takes the second one, it is done with the first
		if p.mover.tableOrPodChanged(); !p.relay.setPods(map[int]string{0: "b"}) {
			p.relay.setPods(map[int]string{0: "a"})
		}
		eventually(t, "wake-ups that run has not received", 0, func() int { return len(p.mover.wake) })
	}
	p.override("1", map[string]string{"ns-01": "backend-0"})
	p.open(t, "ns-01")
	p.override("2", map[string]string{"ns-01": "backend-1"})
	p.waitMoved(t, 1)
}

// replaced starts a proxy with two backends. backend-0 owns ns-01, whose session,
// with the client old, is with a pod that was replaced by newPod. backend-1 is
// other. The session stays, because the settle time is long and the old pod does
// not answer a Close frame. change, if not nil, may change the proxy before it
// starts.
func replaced(t *testing.T, change func(*proxy)) (p *testProxy, old *net.TCPConn, newPod, other *stubBackend) {
	t.Helper()
	pods := newPods(t, answer(switching), echo)
	other = startStub(t, "127.0.0.1:0", echo)
	p = startProxy(t, []string{"127.0.0.1:1", other.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
		p.mover.settleTime = time.Hour
		pods.serve(p)
		if change != nil {
			change(p)
		}
	})
	p.relay.setPods(map[int]string{0: "a"})
	old = p.openStarted(t)
	p.relay.setPods(map[int]string{0: "b"})
	pods.now.Store(1)
	return p, old, pods.stubs[1], other
}

// openStarted opens the first session, of ns-01, and returns when its start is
// over: from then on it is not closed if its pod is replaced, but by the mover.
func (p *testProxy) openStarted(t *testing.T) *net.TCPConn {
	t.Helper()
	conn := p.open(t, "ns-01")
	mustSend(t, conn, frameBytes(0x82, true, 2, []byte("hi")))
	eventually(t, "the goroutine that starts it carries a frame", true, func() bool { return p.relay.bytes()[clientSide] > 0 })
	p.upgradesInHTTP.wait() // or net/http's does
	return conn
}

// hang sends an upgrade and waits until it waits for the old pod.
func (p *testProxy) hang(t *testing.T, request string) net.Conn {
	t.Helper()
	waiting := dial(t, p.addr)
	mustWrite(t, waiting, request)
	waitStacks(t, "the upgrade waits for the old pod", func(stacks []byte) bool {
		return bytes.Contains(stacks, []byte(".waitForOldPod("))
	})
	return waiting
}

// waitStacks returns when ok is true of the stacks of all goroutines: when what says is so.
func waitStacks(t *testing.T, what string, ok func(stacks []byte) bool) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	eventually(t, what, true, func() bool { return ok(stacks[:runtime.Stack(stacks, true)]) })
}

// An upgrade waits at most -hold for an old pod, as for an owner that is not ready.
func TestHoldEndsWhileTheOldPodStays(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		p, old, _, _ := replaced(t, func(p *proxy) { p.limits.holdTimeout = 2 * time.Second }) // also of the first session
		t.Cleanup(func() { old.Close() })
		_, _, resp := p.ask(t, request)
		body, _ := io.ReadAll(resp.Body)
		p.mustRefuse(t, resp.StatusCode, string(body), "still has a session with the previous pod of backend-0")
		p.waitResult(t, resultHoldTimeout)
		p.waitPending(t, 0)
	})
}

// An upgrade that waits for an old pod is answered when the router stops.
func TestStopAnswersWhoWaitsForTheOldPod(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		p, old, newPod, _ := replaced(t, func(p *proxy) { p.relay.closeTimeout, p.limits.holdTimeout = 100*time.Millisecond, 3*patience })
		waiting := p.hang(t, request)
		stopped := make(chan struct{})
		go func() { p.stop(); close(stopped) }()
		mustAnswer(t, waiting, 503)
		old.Close()
		select {
		case <-stopped:
		case <-time.After(patience):
			t.Fatal("the router does not stop")
		}
		p.waitResult(t, resultDraining)
		if n := p.underWay(); n != 0 {
			t.Errorf("%d upgrades are under way in a router that has stopped", n)
		}
		if heads := newPod.heads(); len(heads) != 0 {
			t.Errorf("the new pod was asked: %.60q", heads)
		}
	})
}

// A namespace is free as soon as its old pod, which does not answer the Close frame, is
// cut off: its client is told, and need not leave before the new pod gets a session.
func TestHoldEndsWhenTheOldPodIsCutOff(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		p, old, newPod, _ := replaced(t, func(p *proxy) { p.relay.closeTimeout = time.Hour })
		waiting := p.hang(t, request)
		open, _ := p.relay.snapshot()
		s := open[0]
		if !s.closeGracefully(causeMoved, nil) {
			t.Fatalf("the session ends already: %v", cause(s.cause.Load()))
		}
		s.closeExpired() // the time for the client's message
		if p.relay.oldPodSessionsDone("ns-01") == nil {
			t.Error("the namespace is free while the old pod may still answer")
		}
		s.closeExpired() // the time for the pod's answer
		mustFrames(t, old, false, restarts)
		if p.relay.oldPodSessionsDone("ns-01") != nil {
			t.Error("the client is told before the namespace is free")
		}
		mustAnswer(t, waiting, 101)
		p.waitCount(t, sessionCounts{open: 2, total: 2}) // the old session is still there
		if heads := newPod.heads(); len(heads) != 1 {
			t.Errorf("the new pod was asked %d times, want once", len(heads))
		}
		old.Close()
		p.waitMoved(t, 1)
	})
}

// An upgrade whose owner is replaced by another pod while it is dialled waits for the
// old one, like any other, though it may have reached the new one already.
func TestMoveWithinADial(t *testing.T) {
	both(t, func(t *testing.T, request string) { moveWithinADial(t, request, false) })
}

// moveWithinADial replaces the owner's pod in the first dial for the request.
// With putOff the fast path has dialled before that, in vain: it did not know the address.
func moveWithinADial(t *testing.T, request string, putOff bool) {
	var unknown, replacing atomic.Bool // the address is not known at once; the next dial finds another pod
	pods := newPods(t, answer(switching), echo)
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, func(p *proxy) {
		p.mover.settleTime = time.Hour
		pods.serve(p)
		uid, resolve := p.backends.podUID, p.backends.resolve
		p.backends.podUID = func(i int) string {
			if !unknown.Load() && replacing.CompareAndSwap(true, false) {
				p.relay.setPods(map[int]string{0: "b"})
				pods.now.Store(1)
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
	wantAsked := func(want [2]int) {
		t.Helper()
		if got := [2]int{len(pods.stubs[0].heads()), len(pods.stubs[1].heads())}; got != want {
			t.Errorf("the pods were asked %d times, want %d", got, want)
		}
	}
	p.relay.setPods(map[int]string{0: "a"})
	old := p.openStarted(t)
	unknown.Store(putOff)
	replacing.Store(true)
	waiting := p.hang(t, request)
	wantAsked([2]int{1, 0})
	p.waitSessions(t, 1)
	old.Close()
	mustAnswer(t, waiting, 101)
	wantAsked([2]int{1, 1})
}

// An upgrade waits at most -hold for a namespace that is handed over, and the log says what it
// has waited for: nobody has dialled the new owner.
func TestHoldEndsWhileHeld(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		old := startStub(t, "127.0.0.1:0", answer(switching)) // it answers no Close frame
		next := startStub(t, "127.0.0.1:0", echo)
		p := startProxy(t, []string{old.addr, next.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
			p.limits.holdTimeout, p.relay.closeTimeout = 2*time.Second, time.Hour
		})
		defer p.open(t, "ns-01").Close()
		p.moveTo(t, "2", 1)
		_, _, resp := p.ask(t, request)
		body, _ := io.ReadAll(resp.Body)
		p.mustRefuse(t, resp.StatusCode, string(body), `"ns-01" was not handed over to backend-1 within 2s: `)
		p.waitResult(t, resultHoldTimeout)
	})
}

// If the table is swapped while an upgrade waits for an old pod, it goes to the new
// owner of its namespace.
func TestMoveOfWhoWaitsForTheOldPod(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		p, old, newPod, other := replaced(t, func(p *proxy) { p.mover.settleTime, p.relay.closeTimeout = 0, 300*time.Millisecond })
		waiting := p.hang(t, request)
		p.override("42", map[string]string{"ns-01": "backend-1"})
		eventually(t, "owner of ns-01", 1, func() int { return p.mover.assignmentOf("ns-01").backend })
		old.Close()
		mustAnswer(t, waiting, 101)
		if n := newPod.heads(); len(n) != 0 {
			t.Errorf("backend-0, which no longer owns ns-01, got %.60q", n)
		}
		if n := other.heads(); len(n) != 1 {
			t.Errorf("backend-1 got %d requests, want 1", len(n))
		}
	})
}

// A session whose old pod has ended its stream does not make an upgrade wait, and
// does not move.
func TestMoveAfterTheOldPod(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1"}, map[string]string{}, nil)
	p.relay.setPods(map[int]string{0: "a"})
	s := newSession("ns-01", 0, "")
	s.podUID = "a"
	c := newSessionConns(t, "tcp", "tcp").start(p.relay, s, [2][]byte{})
	closeWrite(t, c.backend)
	eventually(t, "the pod is done with the session", true, s.backendDone.Load)
	p.relay.setPods(map[int]string{0: "b"})
	if p.relay.oldPodSessionsDone("ns-01") != nil || p.mover.shouldMove(s) {
		t.Error("the session counts as one with an old pod")
	}
	c.client.Close()
}

// moveTest is a mover whose sessions have no sockets.
type moveTest struct {
	*mover
	log     *logTail
	started time.Time

	// Guarded by relay.mu.
	closed []closedSession
	absent map[int]bool // backends that accept no connection
	dials  map[int]int  // by backend
}

// closedSession is one session that the mover closed.
type closedSession struct {
	*session
	at time.Duration // since the start
}

// movesIn runs play in a synctest bubble, with a mover of rate sessions per second, 5
// backends, and each sessions of every namespace in data, which are with their owners. The mover
// has -handoff=single.
func movesIn(t *testing.T, rate, each int, data map[string]string, play func(t *testing.T, m *moveTest)) {
	movesWith(t, false, rate, each, data, play)
}

// movesWith is movesIn, with -handoff=off if off is true.
func movesWith(t *testing.T, off bool, rate, each int, data map[string]string, play func(t *testing.T, m *moveTest)) {
	bubble(t, func(t *testing.T) {
		m := newMoveTest(off, rate, each, data)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { m.run(ctx) })
		synctest.Wait() // else the first timer may see play's table before tableChanged does
		play(t, m)
		cancel()
		running.Wait()
	})
}

// newMoveTest returns what movesWith plays with. Nobody runs the mover.
func newMoveTest(off bool, rate, each int, data map[string]string) *moveTest {
	m := &moveTest{log: newLogTail(), started: time.Now(), absent: map[int]bool{}, dials: map[int]int{}}
	log := slog.New(slog.NewJSONHandler(m.log, nil))
	relay := newRelay(func(i int) string { return backendName("backend", i) }, log)
	router := &tableStore{statefulSet: "backend", backends: backendSet{ordinalRange: ordinalRange{count: 5}}, log: slog.New(slog.DiscardHandler), onSwap: func() {}}
	m.mover = newMover(router, relay, rate, m.dial, func() {}, log)
	m.settleTime, m.closeSession, m.handoffOff = 500*time.Millisecond, m.recordClose, off
	router.onSwap = m.tableOrPodChanged
	m.table(data)
	for namespace := range data {
		owner, _ := router.table().ownerOf(namespace)
		for range each {
			relay.add(&session{namespace: namespace, backend: owner})
		}
	}
	return m
}

func (m *moveTest) dial(_ context.Context, backend int) error {
	m.relay.mu.Lock()
	defer m.relay.mu.Unlock()
	m.dials[backend]++
	if m.absent[backend] {
		return errors.New("nobody there")
	}
	return nil
}

func (m *moveTest) setAbsent(backend int, absent bool) {
	m.relay.mu.Lock()
	defer m.relay.mu.Unlock()
	m.absent[backend] = absent
}

func (m *moveTest) dialsOf(backend int) int {
	m.relay.mu.Lock()
	defer m.relay.mu.Unlock()
	return m.dials[backend]
}

// wantPending checks how many sessions wait for their move.
func (m *moveTest) wantPending(t *testing.T, want int) {
	t.Helper()
	if got := m.queue.size.Load(); got != int64(want) {
		t.Errorf("%d sessions wait for their move, want %d", got, want)
	}
}

// recordClose is closeSession: the session is over 100 ms later. It returns false
// if the session has a cause already.
func (m *moveTest) recordClose(s *session, done func(cut bool)) bool {
	return m.recordCloseIn(100*time.Millisecond, s, done)
}

// recordCloseIn is recordClose with a session that is over after the given time.
func (m *moveTest) recordCloseIn(closing time.Duration, s *session, done func(cut bool)) bool {
	m.relay.mu.Lock()
	defer m.relay.mu.Unlock()
	if !s.setCause(causeMoved) {
		return false
	}
	m.closed = append(m.closed, closedSession{s, time.Since(m.started)})
	time.AfterFunc(closing, func() {
		m.release(s)
		done(len(s.namespace) > 5)
	})
	return true
}

// leave ends the session as its client does, and reports whether that was its end.
func (m *moveTest) leave(s *session) bool {
	if !s.setCause(causeClient) {
		return false
	}
	m.release(s)
	return true
}

// release has the session be over.
func (m *moveTest) release(s *session) {
	s.isOver.Store(true)
	m.relay.onBackendDone()
}

// table makes data the overrides of the router's table.
func (m *moveTest) table(data map[string]string) {
	version := fmt.Sprint(m.tables.swaps.Load())
	m.tables.update(sourceContent{id: sourceID{name: "test"}, version: version, overrides: newOverrideSet(data)})
}

// after waits, and returns the sessions that were closed by then.
func (m *moveTest) after(wait time.Duration) []closedSession {
	time.Sleep(wait)
	synctest.Wait()
	m.relay.mu.Lock()
	defer m.relay.mu.Unlock()
	return slices.Clone(m.closed)
}

// pinned returns overrides of n namespaces to one backend.
func pinned(n, backend int) map[string]string {
	data := map[string]string{}
	for i := range n {
		data[fmt.Sprintf("ns-%02d", i)] = backendName("backend", backend)
	}
	return data
}

// with returns a copy of data with the namespace on another backend.
func with(data map[string]string, namespace string, backend int) map[string]string {
	data = maps.Clone(data)
	data[namespace] = backendName("backend", backend)
	return data
}

// Changes in a row become one move. It starts when they have settled, or after ten
// times the settle time from the first.
func TestMoveSettles(t *testing.T) {
	for name, c := range map[string]struct {
		changes int
		every   time.Duration
		first   time.Duration
	}{
		"one change":                {1, 0, 500 * time.Millisecond},
		"three in a row":            {3, 400 * time.Millisecond, 1300 * time.Millisecond},
		"they do not end":           {30, 400 * time.Millisecond, 5 * time.Second},
		"the second is another one": {2, 600 * time.Millisecond, 500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			movesIn(t, 0, 3, pinned(2, 0), func(t *testing.T, m *moveTest) {
				for i := range c.changes {
					m.table(with(pinned(2, 1), "other", i%2))
					time.Sleep(c.every)
				}
				all := m.after(time.Minute)
				if len(all) != 6 {
					t.Fatalf("%d sessions moved, want 6", len(all))
				}
				for _, s := range all {
					if s.at < c.first || s.at > c.first+2*paceTick {
						t.Errorf("a session moved after %s, want %s", s.at, c.first)
					}
				}
				wantLine(t, m.log.all("move finished"), 1, map[string]any{"moved": 6.0, "namespaces": 2.0, "cancelled": 0.0, "seconds": 0.1})
			})
		})
	}
}

// The mover keeps the pace, even if that is much faster than timers are.
func TestMovePace(t *testing.T) {
	for _, c := range []struct{ rate, sessions int }{{1, 20}, {200, 3000}, {2000, 9000}, {50_000, 9000}} {
		t.Run(fmt.Sprintf("%d of %d per second", c.sessions, c.rate), func(t *testing.T) {
			movesIn(t, c.rate, 1, pinned(c.sessions, 0), func(t *testing.T, m *moveTest) {
				m.table(pinned(c.sessions, 1))
				all := m.after(time.Minute)
				if len(all) != c.sessions {
					t.Fatalf("%d sessions moved, want %d", len(all), c.sessions)
				}
				interval, late := time.Second/time.Duration(c.rate), 0
				for i, s := range all {
					want := m.settleTime + time.Duration(i)*interval
					if s.at < want || s.at > want+interval/2+2*minStepTime+paceTick { // a step takes 100 ms
						t.Fatalf("session %d moved after %s, want %s", i, s.at, want)
					}
					if s.at > want+interval/8 {
						late++
					}
				}
				if interval > 10*paceTick && (late < c.sessions/4 || late == c.sessions) {
					t.Errorf("%d sessions moved late by an eighth of the interval or more, want some jitter", late)
				}
				wantLine(t, m.log.all("move finished"), 1, map[string]any{"overrides_version": "1", "moved": float64(c.sessions), "namespaces": float64(c.sessions)})
			})
		})
	}
}

// All sessions of a namespace move at once, and the namespaces in the same order on every
// router.
func TestMoveByNamespace(t *testing.T) {
	const namespaces, each = 12, 5
	orders := map[string]bool{}
	for range 3 {
		movesIn(t, 100, each, pinned(namespaces, 0), func(t *testing.T, m *moveTest) {
			m.table(pinned(namespaces, 1))
			var order []string
			all := m.after(time.Minute)
			slices.SortStableFunc(all, func(a, b closedSession) int {
				return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(placeOf(hash64(a.namespace)), placeOf(hash64(b.namespace))))
			})
			for _, s := range all {
				order = append(order, s.namespace)
			}
			if len(order) != namespaces*each {
				t.Fatalf("%d sessions moved, want %d", len(order), namespaces*each)
			}
			if order = slices.Compact(order); len(order) != namespaces {
				t.Errorf("namespaces moved in this order, want each once: %q", order)
			}
			orders[fmt.Sprint(order)] = true
		})
	}
	if len(orders) != 1 {
		t.Errorf("three routers have different orders: %v", orders)
	}
}

// An edit that reverts a change cancels the moves that are still to come, and the
// result has their number.
func TestMoveTakenBack(t *testing.T) {
	before, after := pinned(100, 0), pinned(100, 1)
	movesIn(t, 10, 1, before, func(t *testing.T, m *moveTest) {
		var receipts []moveReceipt
		m.reportMove = func(receipt moveReceipt) { receipts = append(receipts, receipt) }
		m.table(after)
		moved := len(m.after(700 * time.Millisecond))
		if moved < 2 || moved > 3 {
			t.Errorf("%d moved, want 2 or 3", moved)
		}
		m.wantPending(t, 100-moved)
		m.table(before)
		if got := len(m.after(time.Minute)); got != moved {
			t.Errorf("%d moved before the change was reverted and %d after", moved, got-moved)
		}
		m.wantPending(t, 0)
		wantLine(t, m.log.all("move finished"), 1, map[string]any{"overrides_version": "1", "moved": float64(moved), "cancelled": float64(100 - moved)})
		e := expositionOf(t, m.writeMetrics)
		if lacks := e.lacks(map[string]float64{"router_moved_sessions_total": float64(moved), "router_move_cancelled_total": float64(100 - moved),
			"router_handoff_step_duration_seconds_count": e.values["router_handoff_steps_total"]}); lacks != "" || e.values["router_handoff_steps_total"] == 0 {
			t.Error(lacks, e.values)
		}
		if len(receipts) != 1 || receipts[0].Moved != moved || receipts[0].Cancelled != 100-moved || receipts[0].Seconds == 0 {
			t.Errorf("receipts %+v, want one, equal to the log", receipts)
		}
	})
}

// If an edit gives sessions that are still queued to a third owner, they move there. Each
// table has a result of its own. All moves share the pace.
func TestMoveTwoBatches(t *testing.T) {
	data := func(first, others int) map[string]string {
		data := pinned(20, first)
		for i := range 20 {
			data[fmt.Sprintf("other-%02d", i)] = backendName("backend", others)
		}
		return data
	}
	movesIn(t, 10, 1, data(0, 2), func(t *testing.T, m *moveTest) {
		m.table(data(1, 2))
		moved := len(m.after(time.Second))
		m.table(data(3, 4))
		all := m.after(time.Minute)
		if len(all) != 40 || all[39].at < 4800*time.Millisecond || all[39].at > 5300*time.Millisecond {
			t.Errorf("%d moved, the last after %s; want 40 at 10 per second, but for half a second", len(all), all[len(all)-1].at)
		}
		lines := m.log.all("move finished")
		wantLine(t, lines, 2, nil)
		for i, want := range []int{moved, 40 - moved} {
			if line := lines[i]; line["moved"] != float64(want) || line["namespaces"] != float64(want) || line["cancelled"] != 0.0 {
				t.Errorf("%v, want %d sessions", line, want)
			}
		}
		if m.dialsOf(1) != 1 || m.dialsOf(3) != 1 || m.dialsOf(4) != 1 || m.dialsOf(0) != 0 {
			t.Errorf("backends were dialled %v times, want each new owner once", m.dials)
		}
	})
}

// Sessions stay until their new owner accepts a connection. Others move meanwhile.
func TestMoveWaitsForTheOwner(t *testing.T) {
	data := with(pinned(1, 0), "other-one", 0)
	movesIn(t, 0, 5, data, func(t *testing.T, m *moveTest) {
		m.setAbsent(1, true)
		m.table(with(with(data, "ns-00", 1), "other-one", 2))
		all := m.after(20 * time.Second)
		if len(all) != 5 || all[0].namespace != "other-one" || all[4].namespace != "other-one" {
			t.Fatalf("%d moved, want the 5 to backend-2", len(all))
		}
		m.wantPending(t, 5)
		if dials := m.dialsOf(1); dials < 20 || dials > 80 {
			t.Errorf("backend-1 was dialled %d times in 20 s, want it with a back-off", dials)
		}
		wantLine(t, m.log.all("new owner unreachable; move delayed"), 1, map[string]any{"level": "WARN", "backend": "backend-1", "error": "nobody there"})
		wantLine(t, m.log.all("move finished"), 0, nil)
		for _, s := range m.relay.sessions {
			if s.namespace == "ns-00" {
				m.leave(s) // one session ends by itself
				break
			}
		}
		m.after(requeueInterval + maxTargetRetry*3/2)
		m.wantPending(t, 4)
		m.setAbsent(1, false)
		if all = m.after(maxTargetRetry * 3 / 2); len(all) != 9 {
			t.Errorf("%d moved, want 9", len(all))
		}
		time.Sleep(time.Second)
		wantLine(t, m.log.all("move finished"), 1, map[string]any{"moved": 9.0, "namespaces": 2.0, "cut": 5.0})
	})
}

// The pod of a new owner restarts in the midst of a change: what has moved to that owner stays
// with it, and what has not moved yet stays where it is, until the owner is back.
func TestMoveToWhoRestarts(t *testing.T) {
	movesIn(t, 10, 1, pinned(40, 0), func(t *testing.T, m *moveTest) {
		m.table(pinned(40, 1))
		moved := m.after(2 * time.Second)
		for _, s := range moved {
			m.relay.add(&session{namespace: s.namespace, backend: 1}) // its client is back
		}
		m.setAbsent(1, true)
		m.tableOrPodChanged()
		if got := len(m.after(20*time.Second)) - len(moved); len(moved) < 5 || got != 0 {
			t.Errorf("%d moved and then %d more; want some and none", len(moved), got)
		}
		for _, s := range moved {
			wantEqual(t, "the owner of "+s.namespace, m.assignmentOf(s.namespace).backend, 1)
		}
		m.wantPending(t, 40-len(moved))
		m.setAbsent(1, false)
		if all := m.after(20 * time.Second); len(all) != 40 {
			t.Errorf("%d moved, want each of the 40 once", len(all))
		}
	})
}

// If an edit gives queued sessions to an owner that is not reachable, they wait
// too, even before the edit has settled.
func TestMoveToWhoIsWaitedFor(t *testing.T) {
	data := with(pinned(39, 0), "other", 0)
	movesIn(t, 10, 1, data, func(t *testing.T, m *moveTest) {
		m.setAbsent(3, true)
		m.table(with(pinned(39, 1), "other", 3))
		moved := len(m.after(time.Second))
		m.table(with(pinned(39, 3), "other", 3))
		if got := len(m.after(50 * time.Second)); moved == 0 || got != moved {
			t.Errorf("%d moved and then %d more; want some and none", moved, got-moved)
		}
		m.wantPending(t, 40-moved)
	})
}

// The progress of a change is not whole while an owner that was away catches up.
func TestProgressWhileAnOwnerIsBehind(t *testing.T) {
	movesIn(t, 10, 1, pinned(100, 0), func(t *testing.T, m *moveTest) {
		m.setAbsent(1, true)
		m.table(pinned(100, 1))
		m.after(5 * time.Second)
		m.setAbsent(1, false)
		m.after(6 * time.Second)
		if s := m.status(); s.Progress == 1 || s.ToMove == 0 {
			t.Errorf("the progress is %v, and %d sessions have to move", s.Progress, s.ToMove)
		}
	})
}

// The rate does not count sessions of a backend that is scaled in: they take no time.
func TestSecondsLeftWithoutScaledIn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMoveTest(false, 10, 0, pinned(1, 0))
		paced, scaledIn, both, oldPod := &session{}, &session{}, &session{}, &session{}
		m.queue.set([]queuedSession{{scaledIn, 0, 1, false}, {paced, 5, 1, false}, {both, 7, 1, true}}, []*session{both, oldPod})
		m.wantPending(t, 4)
		wantEqual(t, "seconds that are left", m.status().SecondsLeft, 0.3)
	})
}

// Also when many new owners fail during a change, one after the other, no session is closed for
// an owner that is away, and none beyond the rate. All others move on.
func TestMoveWhileManyOwnersFail(t *testing.T) {
	data := pinned(100, 0)
	to := with(data, "edit", 0)
	for i := range 100 {
		to[fmt.Sprintf("ns-%02d", i)] = backendName("backend", 1+i%4)
	}
	movesIn(t, 10, 1, data, func(t *testing.T, m *moveTest) {
		for edit := range 2 { // three tables
			m.table(with(to, "edit", 1+edit))
			m.after(1500 * time.Millisecond)
		}
		fail := func(backend int, absent bool) {
			t.Helper()
			m.setAbsent(backend, absent)
			m.tableOrPodChanged() // as its pod was replaced
			before, from := len(m.after(0)), time.Since(m.started)+10*time.Millisecond
			all := m.after(1200 * time.Millisecond)
			for _, s := range all[before:] {
				if owner, _ := m.tables.table().ownerOf(s.namespace); owner == backend && absent && s.at > from {
					t.Fatalf("%s was closed, and backend-%d is away: %v", s.namespace, backend, m.current.Load().records)
				}
			}
			want := 4 // the table has to settle first
			if len(m.absent) == 4 {
				want = 0 // no other owner is left
			}
			if n := len(all) - before; n < want || n > 14 {
				t.Fatalf("%d sessions were closed in 1.2 s, want %d at least, and 10 per second at most", n, want)
			}
		}
		for backend := 1; backend <= 4; backend++ {
			fail(backend, true)
		}
		if m.queue.size.Load() < 40 {
			t.Errorf("%d sessions are left: the test has tested little", m.queue.size.Load())
		}
		for backend := 1; backend <= 4; backend++ {
			m.setAbsent(backend, false)
		}
		before := len(m.after(0))
		if n := len(m.after(1200*time.Millisecond)) - before; n < 4 || n > 14 {
			t.Errorf("%d sessions were closed in 1.2 s once all owners were back, want 10 per second", n)
		}
		m.after(time.Minute)
		if v := m.current.Load(); !v.hasOnlyTable(m.tables.table().ownersHash) {
			t.Errorf("the change has not ended: %v", v.records)
		}
	})
}

// However many edits come while an owner is away, a plan has a few tables only, and the
// owner's namespaces wait for maxAwayTime and not for ever.
func TestMoveOfManyEdits(t *testing.T) {
	data := map[string]string{"ns-00": "backend-0", "ns-01": "backend-0"}
	for name, probe := range map[string]func(ctx context.Context) error{
		"refuses": func(context.Context) error { return errors.New("nobody there") },
		"is silent": func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			<-ctx.Done()
			return ctx.Err()
		},
	} {
		t.Run(name, func(t *testing.T) {
			movesIn(t, 0, 1, data, func(t *testing.T, m *moveTest) {
				m.targets.probe = func(ctx context.Context, backend int) error {
					if backend == 2 {
						return probe(ctx)
					}
					return nil
				}
				edited, most := with(with(data, "ns-00", 2), "ns-01", 1), 0
				for i := range 80 { // two minutes
					edited = with(edited, "edit", i%2)
					m.table(edited)
					m.after(1500 * time.Millisecond)
					most = max(most, len(m.current.Load().records))
				}
				all := m.after(0)
				if len(all) != 2 || all[0].namespace != "ns-01" || all[0].at > 10*time.Second || all[1].at > 80*time.Second {
					t.Errorf("closed are %+v, want ns-01 soon, and ns-00 after a minute", all)
				}
				if most > maxRecords {
					t.Errorf("a plan had %d records, want %d at most", most, maxRecords)
				}
				m.after(time.Minute)
				if v := m.current.Load(); !v.hasOnlyTable(m.tables.table().ownersHash) {
					t.Errorf("the last edit is not in force: %d tables", len(v.records))
				}
			})
		})
	}
}

// The sessions of a backend that is scaled in move at once, before the table has settled, and
// do not take the turns of others.
func TestMoveFromWhoIsScaledIn(t *testing.T) {
	data := pinned(40, 4)
	for i := range 10 {
		data[fmt.Sprintf("stays-%d", i)] = "backend-0"
	}
	next := pinned(40, 1)
	for i := range 10 {
		next[fmt.Sprintf("stays-%d", i)] = "backend-1"
	}
	for _, off := range []bool{false, true} {
		t.Run(fmt.Sprint("off is ", off), func(t *testing.T) {
			movesWith(t, off, 10, 1, data, func(t *testing.T, m *moveTest) {
				m.after(time.Second)
				m.tables.mu.Lock()
				m.tables.backends = backendSet{ordinalRange: ordinalRange{count: 4}}
				m.tables.mu.Unlock()
				m.table(next)
				if all := m.after(100 * time.Millisecond); len(all) != 40 || slices.ContainsFunc(all, func(s closedSession) bool { return s.backend != 4 }) {
					t.Errorf("%d moved at once, want the 40 of backend-4: %v", len(all), all)
				}
				if all := m.after(20 * time.Second); len(all) != 50 || all[49].at-all[40].at < 700*time.Millisecond {
					t.Errorf("%d moved, want 50, and the last ten at 10 per second: %v", len(all), all[40:])
				}
			})
		})
	}
}

// While a step waits for a session that does not end, sessions with a pod that was replaced
// move: nothing else makes them end, and no client of their namespaces is admitted meanwhile.
func TestMoveFromOldPodsWaitsForNoStep(t *testing.T) {
	data := map[string]string{"ns-00": "backend-0", "ns-01": "backend-1"}
	movesIn(t, 0, 1, data, func(t *testing.T, m *moveTest) {
		m.closeSession = func(s *session, done func(cut bool)) bool {
			return s.namespace != "ns-00" && m.recordClose(s, done)
		}
		for _, s := range m.relay.filter(func(s *session) bool { return s.namespace == "ns-01" }) {
			s.podUID = "a"
		}
		m.relay.setPods(map[int]string{1: "a"})
		m.table(with(data, "ns-00", 2))
		m.after(time.Second)
		if v := m.current.Load(); v.done {
			t.Fatal("no step is under way")
		}
		m.relay.setPods(map[int]string{1: "b"})
		m.tableOrPodChanged()
		if all := m.after(time.Second); len(all) != 1 || all[0].namespace != "ns-01" {
			t.Errorf("closed are %v, want the session of ns-01", all)
		}
	})
}

// A session with a pod that was replaced moves also while its namespace waits for a new owner
// that is away: else nobody would be admitted, though the present owner is there.
func TestMoveFromOldPodWhileTheOwnerIsAway(t *testing.T) {
	movesIn(t, 0, 1, map[string]string{"ns-01": "backend-1"}, func(t *testing.T, m *moveTest) {
		m.setAbsent(2, true)
		for _, s := range m.relay.filter(func(*session) bool { return true }) {
			s.podUID = "a"
		}
		m.relay.setPods(map[int]string{1: "a"})
		m.table(map[string]string{"ns-01": "backend-2"})
		m.after(time.Second)
		m.relay.setPods(map[int]string{1: "b"})
		m.tableOrPodChanged()
		if all := m.after(20 * time.Second); len(all) != 1 {
			t.Errorf("%d sessions were closed, want 1", len(all))
		}
		wantEqual(t, "the owner", m.assignmentOf("ns-01").backend, 1)
	})
}

// Sessions with pods that were replaced move at the rate, also if sessions have moved before, and
// share it with those that get another owner.
func TestMoveFromOldPodsAtTheRate(t *testing.T) {
	for name, c := range map[string]struct {
		moving int // sessions that get another owner
		off    bool
	}{"alone": {0, false}, "alone, off": {0, true}, "shared": {60, false}, "shared, off": {60, true}} {
		t.Run(name, func(t *testing.T) {
			data := pinned(60, 0)
			data["before"] = "backend-3"
			for i := range c.moving {
				data[fmt.Sprintf("moves-%02d", i)] = "backend-1"
			}
			movesWith(t, c.off, 10, 1, data, func(t *testing.T, m *moveTest) {
				for _, s := range m.relay.filter(func(s *session) bool { return s.backend == 0 }) {
					s.podUID = "a"
				}
				m.relay.setPods(map[int]string{0: "a"})
				next := with(data, "before", 4)
				m.table(next)
				m.after(10 * time.Second)
				for i := range c.moving {
					next = with(next, fmt.Sprintf("moves-%02d", i), 2)
				}
				m.table(next)
				m.after(3 * time.Second)
				m.relay.setPods(map[int]string{0: "b"})
				m.tableOrPodChanged()
				all := m.after(20 * time.Second)
				for i := range all {
					if j := i + 21; j < len(all) && all[j].at-all[i].at < time.Second {
						t.Fatalf("22 sessions were closed within %s, want 10 per second, and at most a second's more", all[j].at-all[i].at)
					}
				}
				if len(all) != 61+c.moving {
					t.Errorf("%d sessions were closed, want %d", len(all), 61+c.moving)
				}
			})
		})
	}
}

// Sessions with a pod that was replaced move at the rate also while nothing else moves.
func TestMoveFromOldPodsWithoutStep(t *testing.T) {
	movesIn(t, 10, 20, map[string]string{"ns-01": "backend-1"}, func(t *testing.T, m *moveTest) {
		for _, s := range m.relay.filter(func(*session) bool { return true }) {
			s.podUID = "a"
		}
		m.relay.setPods(map[int]string{1: "a"})
		m.after(10 * time.Second)
		m.relay.setPods(map[int]string{1: "b"})
		m.tableOrPodChanged()
		if all := m.after(4 * time.Second); len(all) != 20 {
			t.Errorf("%d sessions were closed in 4 s, want 20 at 10 per second", len(all))
		}
	})
}

// A session whose old pod has ended its side before the session's turn has not been moved back.
func TestMoveFromOldPodThatEnds(t *testing.T) {
	movesIn(t, 1, 5, map[string]string{"ns-01": "backend-1"}, func(t *testing.T, m *moveTest) {
		all := m.relay.filter(func(*session) bool { return true })
		for _, s := range all {
			s.podUID = "a"
		}
		m.relay.setPods(map[int]string{1: "a"})
		m.relay.setPods(map[int]string{1: "b"})
		m.tableOrPodChanged()
		if n := len(m.after(1200 * time.Millisecond)); n == 0 || n == len(all) {
			t.Fatalf("%d sessions were closed, want some", n)
		}
		for _, s := range all {
			m.relay.setBackendDone(s)
		}
		m.after(10 * time.Second)
		wantEqual(t, "cancelled", m.cancelled.Load(), 0)
	})
}

// A pod that was replaced while the plan's newest table was not known here is not forgotten.
func TestMoveFromOldPodOfAnUnknownTable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, now := newMoveTest(false, 0, 1, map[string]string{"ns-01": "backend-1"}), time.Now()
		defer m.targets.close()
		m.ctx = t.Context()
		newest := m.tables.table()
		m.tally = newMoveTally(newest.ownersHash)
		record, unknown := newRecord(newest), newRecord(newest)
		record.before, record.after = mark{upto: 1}, mark{upto: 1}
		unknown.ownersHash, unknown.before, unknown.after = 99, mark{upto: 1}, mark{upto: 1}
		full := &handoffPlan{step: 1, records: []planRecord{newRecord(newest), record, unknown}}
		v := &view{handoffPlan: full, tables: []*table{newest, newest, nil}, done: true}
		m.current.Store(v)
		m.relay.filter(func(*session) bool { return true })[0].podUID = "a"
		m.relay.setPods(map[int]string{1: "a"})
		m.relay.setPods(map[int]string{1: "b"})
		m.prepareNewest(now)
		m.current.Store(newView(newest, v, now))
		m.work(m.current.Load(), newest, now)
		wantEqual(t, "sessions that leave the old pod", len(m.queue.oldPod), 1)
	})
}

// A session with a pod that was replaced moves also while owners change.
func TestMoveToAnotherPodInAChange(t *testing.T) {
	data := map[string]string{"ns-00": "backend-0", "ns-01": "backend-1"}
	movesIn(t, 0, 1, data, func(t *testing.T, m *moveTest) {
		m.after(time.Second)
		for _, s := range m.relay.filter(func(s *session) bool { return s.namespace == "ns-01" }) {
			s.podUID = "a"
		}
		m.relay.setPods(map[int]string{1: "a"})
		m.after(time.Second)
		m.relay.setPods(map[int]string{1: "b"})
		m.table(with(data, "ns-00", 2))
		m.tableOrPodChanged()
		wantEqual(t, "closed sessions", len(m.after(time.Minute)), 2)
	})
}

// A backend that has not read that its client was reset has the session: before a closing
// handshake, and in one.
func TestMoveWaitsForWhoHasNotRead(t *testing.T) {
	for _, closing := range []bool{false, true} {
		t.Run(fmt.Sprint("closing is ", closing), func(t *testing.T) {
			leave := make(chan struct{})
			old := startStub(t, "127.0.0.1:0", func(conn net.Conn, _ *bufio.Reader) {
				io.WriteString(conn, switching)
				<-leave
			})
			next := startStub(t, "127.0.0.1:0", echo)
			p := startProxy(t, []string{old.addr, next.addr}, map[string]string{"ns-01": "backend-0"}, nil)
			end := sync.OnceFunc(func() { close(leave) })
			defer end()
			conn := p.open(t, "ns-01")
			mustSend(t, conn, frameBytes(0x82, true, 1000, make([]byte, 1000))[:500])
			eventually(t, "bytes are carried", true, func() bool { return p.relay.bytes()[clientSide] > 0 })
			if !closing {
				reset(conn)
				p.waitSessions(t, 0)
			}
			p.override("42", map[string]string{"ns-01": "backend-1"})
			if closing {
				isEnding := func() bool { return len(p.relay.filter((*session).isEnding)) == 1 }
				eventually(t, "the session closes", true, isEnding)
				reset(conn)
			}
			eventually(t, "the step waits for an upgrade or session", 1, func() int {
				p.mover.flights.mu.Lock()
				defer p.mover.flights.mu.Unlock()
				return len(p.mover.flights.all)
			})
			waiting := p.send(t, "ns-01")
			eventually(t, "upgrades that wait", 1, func() int { return len(p.backends.queues.waitersOf(queueHeld)) })
			wantEqual(t, "requests at the new owner", len(next.heads()), 0)
			end()
			mustAnswer(t, waiting, 101)
		})
	}
}

// The mover stops dialling an owner when no session has to move there any more.
func TestMoveForgetsTheOwner(t *testing.T) {
	movesIn(t, 0, 5, pinned(1, 0), func(t *testing.T, m *moveTest) {
		m.setAbsent(1, true)
		m.table(pinned(1, 1))
		m.after(2 * time.Second)
		m.table(pinned(1, 0))
		m.after(time.Second)
		dials := m.dialsOf(1)
		if all := m.after(time.Minute); len(all) != 0 || m.dialsOf(1) != dials {
			t.Errorf("%d moved, %d dials more; want none", len(all), m.dialsOf(1)-dials)
		}
		m.wantPending(t, 0)
		wantLine(t, m.log.all("move finished"), 1, map[string]any{"moved": 0.0, "cancelled": 5.0})
	})
}

// A session that ends by itself does not delay the others, and no result counts it.
func TestMoveSkipsWhatEnds(t *testing.T) {
	movesIn(t, 1, 1, pinned(20, 0), func(t *testing.T, m *moveTest) {
		m.table(pinned(20, 1))
		m.after(600 * time.Millisecond)
		left := 0
		for _, s := range m.relay.sessions {
			if left < 10 && m.leave(s) {
				left++
			}
		}
		all := m.after(time.Minute)
		if len(all) != 10 || all[9].at > 10*time.Second {
			t.Errorf("%d moved, the last after %s; want 10 in 10 s", len(all), all[len(all)-1].at)
		}
		wantLine(t, m.log.all("move finished"), 1, map[string]any{"moved": 10.0, "cancelled": 0.0})
	})
}

// The same if a session ends just before closeSession.
func TestMoveSkipsWhatCannotClose(t *testing.T) {
	movesIn(t, 0, 5, pinned(1, 0), func(t *testing.T, m *moveTest) {
		var once sync.Once
		m.closeSession = func(s *session, done func(bool)) bool {
			once.Do(func() { m.leave(s) })
			return m.recordClose(s, done)
		}
		m.table(pinned(1, 1))
		if all := m.after(time.Minute); len(all) != 4 {
			t.Errorf("%d moved, want 4", len(all))
		}
		wantLine(t, m.log.all("move finished"), 1, map[string]any{"moved": 4.0, "cancelled": 0.0})
	})
}

// A drain ends all sessions, spread over its time.
func TestDrain(t *testing.T) {
	const sessions, over = 20, 400 * time.Millisecond
	r := quietRelay(t)
	var leaving sync.WaitGroup
	for range sessions {
		c := startedSession(t, r)
		for i, conn := range c.ends() {
			leaving.Go(func() { // each end closes when it has its Close frame
				conn.SetDeadline(time.Now().Add(patience))
				if got, err := readFrame(conn, side(i) == backendSide); err != nil || got != goesAway {
					t.Errorf("side %d read %s, %v; want %s", i, got, err, goesAway)
				}
				conn.Close()
			})
		}
	}
	begun := time.Now()
	if ended := drain(r, over); ended != sessions {
		t.Errorf("%d ended, want %d", ended, sessions)
	}
	if took := time.Since(begun); took < 3*over/4 || took > closeTimeout/2 {
		t.Errorf("drained in %s, want it spread over %s", took, over)
	}
	leaving.Wait()
	if got := r.ended[causeDrain].Load(); got != sessions || r.size() != 0 || r.cut[causeDrain].Load() != 0 {
		t.Errorf("%d ended by drain, %d left, %d cut; want %d, 0 and 0", got, r.size(), r.cut[causeDrain].Load(), sessions)
	}
}

// An owner that is away is waited for also when the sessions that move to it have left.
func TestMoveWaitsWithoutSessions(t *testing.T) {
	movesIn(t, 0, 1, pinned(2, 0), func(t *testing.T, m *moveTest) {
		m.setAbsent(1, true)
		m.table(pinned(2, 1))
		m.after(time.Second)
		for _, s := range m.relay.sessions {
			m.leave(s)
		}
		m.after(20 * time.Second)
		wantEqual(t, "the owner while the next one is away", m.assignmentOf("ns-00").backend, 0)
		m.setAbsent(1, false)
		m.after(maxTargetRetry * 3 / 2)
		wantEqual(t, "the owner once the next one is back", m.assignmentOf("ns-00").backend, 1)
	})
}

// The wait for an owner that only another router could not reach ends when that one reaches it. If
// it fails later, it is waited for again.
func TestWaitsEnd(t *testing.T) {
	targets, now := newMoveTargets(nil), time.Now()
	target := &moveTarget{backend: 1}
	targets.all[1] = target
	targets.note(dialResult{moveTarget: target}, now)
	targets.startWaits([]int{1}, now)
	begun := now
	for range 3 { // it is dialled anew meanwhile
		now = now.Add(maxAwayTime / 4)
		targets.note(dialResult{moveTarget: target}, now)
		targets.startWaits([]int{1}, now)
	}
	targets.note(dialResult{target, errors.New("refused")}, now)
	away, until := targets.away(now)
	wantEqual(t, "owners that are waited for as long as another router could not reach them", fmt.Sprint(away), "[1]")
	wantEqual(t, "until", until, begun.Add(maxAwayTime))
	targets.note(dialResult{moveTarget: target}, now)
	targets.startWaits(nil, now)
	now = now.Add(2 * maxAwayTime)
	targets.note(dialResult{target, errors.New("refused")}, now)
	away, until = targets.away(now)
	wantEqual(t, "owners that are waited for", fmt.Sprint(away), "[1]")
	wantEqual(t, "until", until, now.Add(maxAwayTime))
}

// With -handoff=off, too, an owner that was reachable meanwhile is waited for again.
func TestMoveWaitsAgain(t *testing.T) {
	movesWith(t, true, 1, 1, with(pinned(90, 0), "late", 3), func(t *testing.T, m *moveTest) {
		data := with(with(pinned(90, 2), "late", 3), "ns-00", 1)
		hasMoved := func(namespace string, wait time.Duration) bool {
			return slices.ContainsFunc(m.after(wait), func(s closedSession) bool { return s.namespace == namespace })
		}
		m.setAbsent(1, true)
		m.table(data)
		wantEqual(t, "ns-00 has moved to an owner that is away", hasMoved("ns-00", 5*time.Second), false)
		m.setAbsent(1, false)
		m.after(maxAwayTime + 5*time.Second)
		m.setAbsent(1, true)
		m.table(with(data, "late", 1))
		wantEqual(t, "late has moved to the owner that is away again", hasMoved("late", maxAwayTime-5*time.Second), false)
		wantEqual(t, "late has moved when the wait was over", hasMoved("late", 10*time.Second), true)
	})
}

// With -handoff=off a table that comes while run raises the step, for a 409, stays in force.
func TestRaisedStepKeepsTheNewTable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMoveTest(true, 0, 0, pinned(2, 0))
		m.ctx = t.Context()
		m.noteStep(fmt.Sprint(time.Now().UnixMilli() + 1000))
		now, v, first := time.Now(), m.current.Load(), m.tables.table()
		p, _ := m.work(v, first, now)
		d := m.decide(v, first, p, now)
		wantEqual(t, "what run does", d.action, actAdopt)
		m.table(pinned(2, 1)) // by a watcher's goroutine
		m.adopt(v, d.view.view, now)
		wantEqual(t, "the owner", m.assignmentOf("ns-00").backend, 1)
	})
}

// A table that comes while run works moves by its own rules: what run had found for the table
// before, which was at rest, allows nothing.
func TestMoveTableComesWhileRunWorks(t *testing.T) {
	movesIn(t, 1, 1, with(pinned(40, 0), "late", 3), func(t *testing.T, m *moveTest) {
		m.setAbsent(1, true)
		swapped := false
		m.closeSession = func(s *session, done func(bool)) bool {
			if !swapped {
				swapped = true
				m.table(with(pinned(40, 1), "late", 3)) // by a watcher's goroutine
				m.lastClosedAt = time.Time{}            // else the next step waits for minStepTime
			}
			return m.recordClose(s, done)
		}
		m.relay.add(&session{namespace: "late", backend: 2})
		m.tableOrPodChanged()
		m.after(600 * time.Millisecond)
		wantEqual(t, "the table has come", swapped, true)
		if all := m.after(10 * time.Second); len(all) != 1 {
			t.Errorf("%d sessions were closed, want that of late alone: the new owner of all others is away", len(all))
		}
		wantEqual(t, "the owner", m.assignmentOf("ns-00").backend, 0)
	})
}

// With -handoff=off a change is taken back, and run works before it gets tableChanged: it closes
// no session, since all are with their owner.
func TestMoveTakenBackBeforeRunSees(t *testing.T) {
	movesWith(t, true, 100, 1, pinned(90, 0), func(t *testing.T, m *moveTest) {
		m.table(pinned(90, 1))
		m.after(700 * time.Millisecond)
		m.tables.onSwap = func() {
			m.current.Store(newView(m.tables.table(), m.current.Load(), time.Now()))
			before := len(m.after(0))
			wantEqual(t, "sessions that were closed", len(m.after(200*time.Millisecond))-before, 0)
			m.tableOrPodChanged()
		}
		m.table(pinned(90, 0))
	})
}

// When a pod is replaced in the midst of a change, -move-settle begins anew: what was proposed
// before is not carried out.
func TestMoveSettlesAfterPodReplaced(t *testing.T) {
	movesIn(t, 100, 1, pinned(90, 0), func(t *testing.T, m *moveTest) {
		m.closeSession = func(s *session, done func(bool)) bool {
			return m.recordCloseIn(5*time.Millisecond, s, done)
		}
		m.table(pinned(90, 1))
		before := len(m.after(640 * time.Millisecond)) // steps begin at 500, 600 and 700 ms
		m.tableOrPodChanged()
		wantEqual(t, "sessions that were closed before -move-settle was over", len(m.after(400*time.Millisecond))-before, 0)
		wantEqual(t, "sessions that were closed", len(m.after(time.Minute)), 90)
	})
}

// A step that is over opens its namespaces before the queue is filled anew, which takes a while
// with many sessions.
func TestMoveOpensBeforeRequeue(t *testing.T) {
	movesIn(t, 10, 1, pinned(60, 0), func(t *testing.T, m *moveTest) {
		opened, late := 0, 0
		var filledAt time.Time // when the step began
		m.mover.onViewChanged = func() {
			switch v := m.current.Load(); {
			case !v.done:
				filledAt = m.queue.filledAt
			case len(v.records) > 1:
				opened++
				if !m.queue.filledAt.Equal(filledAt) {
					late++
				}
			}
		}
		m.table(pinned(60, 1))
		m.after(5 * time.Second)
		if opened < 10 || late > 0 {
			t.Errorf("%d of %d steps opened their namespaces after the queue was filled; want none of at least 10", late, opened)
		}
	})
}

// Sessions do not wait for the first dial of an owner that no session moves to any more.
func TestMoveWaitsForNoDialWithoutSessions(t *testing.T) {
	movesIn(t, 0, 1, with(pinned(5, 0), "gone", 0), func(t *testing.T, m *moveTest) {
		m.targets.probe = func(ctx context.Context, backend int) error {
			if backend == 2 {
				<-ctx.Done()
			}
			return ctx.Err()
		}
		m.table(with(pinned(5, 1), "gone", 2))
		m.after(100 * time.Millisecond)
		for _, s := range m.relay.filter(func(s *session) bool { return s.namespace == "gone" }) {
			m.leave(s)
		}
		for range 15 {
			m.after(200 * time.Millisecond)
			m.wake.notify()
		}
		wantEqual(t, "sessions that were closed", len(m.after(0)), 5)
	})
}

// moveSeeds plays random changes with a router alone, or with -handoff=off, and clients that
// come and go: rounds of them, of the first kinds of moveTest.change, each after at most 5 s. It
// calls check when all moves have had the time to end.
func moveSeeds(t *testing.T, rates []int, each, namespaces, rounds, kinds int, check func(t *testing.T, m *moveTest)) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			data := map[string]string{}
			for i := range namespaces {
				data[fmt.Sprintf("ns-%03d", i)] = backendName("backend", r.IntN(5))
			}
			movesWith(t, seed%2 == 1, rates[r.IntN(len(rates))], each, data, func(t *testing.T, m *moveTest) {
				m.closeSession = func(s *session, done func(bool)) bool {
					return m.recordCloseIn(time.Duration(1+hash64(s.namespace)%150)*time.Millisecond, s, done)
				}
				before := data
				for range rounds {
					time.Sleep(time.Duration(r.IntN(700)) * time.Millisecond)
					if r.IntN(4) == 0 {
						time.Sleep(time.Duration(r.IntN(5)) * time.Second)
					}
					data, before = m.change(r, r.IntN(kinds), data, before)
					m.clientsComeAndGo(r, namespaces)
				}
				m.tables.setBackends(backendSet{ordinalRange: ordinalRange{count: 5}})
				for backend := range 5 {
					m.setAbsent(backend, false)
				}
				m.after(5 * time.Minute)
				check(t, m)
			})
		})
	}
}

// change makes sessions move, or changes how they do, in a way of one of eight kinds. data has the
// overrides, and before those before. It returns what these are then.
func (m *moveTest) change(r *rand.Rand, kind int, data, before map[string]string) (_, _ map[string]string) {
	switch kind {
	case 0, 1:
		before, data = data, maps.Clone(data)
		for range 1 + r.IntN(len(data)/3) {
			data[fmt.Sprintf("ns-%03d", r.IntN(len(data)))] = backendName("backend", r.IntN(5))
		}
		m.table(data)
	case 2:
		before, data = data, before
		m.table(data)
	case 3, 4:
		m.setAbsent(r.IntN(5), r.IntN(2) == 0)
	case 5:
		m.noteStep(fmt.Sprint(m.current.Load().step + int64(r.IntN(50)) - 10))
	case 6:
		m.relay.setPods(map[int]string{r.IntN(5): fmt.Sprint(r.Uint64())})
		m.tableOrPodChanged()
	case 7:
		m.tables.setBackends(backendSet{ordinalRange: ordinalRange{count: 3 + r.IntN(3)}})
	}
	return data, before
}

// clientsComeAndGo ends a few sessions, and adds one for a third of the namespaces that have none.
func (m *moveTest) clientsComeAndGo(r *rand.Rand, namespaces int) {
	has := map[string]bool{}
	for _, s := range m.movableSessions() {
		has[s.namespace] = true
		if r.IntN(20) == 0 {
			m.leave(s)
		}
	}
	for i := range namespaces {
		namespace := fmt.Sprintf("ns-%03d", i)
		if a := m.assignmentOf(namespace); !has[namespace] && a.state == stateOwned && r.IntN(3) == 0 {
			m.relay.add(&session{namespace: namespace, backend: a.backend})
		}
	}
}

// Under random changes all moves end: each session is with its owner, the only table is the
// newest, and nothing is left of the moves.
func TestMoveSeeds(t *testing.T) {
	moveSeeds(t, []int{0, 5, 50, 2000}, 2, 30, 150, 8, func(t *testing.T, m *moveTest) {
		v := m.current.Load()
		wantEqual(t, "the newest table is the only one, and its step is over", v.done && v.hasOnlyTable(m.tables.table().ownersHash), true)
		wantEqual(t, "the step is above those of backends", v.step > m.backendStep.Load(), true)
		m.wantPending(t, 0)
		if m.tally != nil || len(m.targets.all) > 0 || len(m.targets.waitUntil) > 0 || len(m.finishing) > 0 {
			t.Errorf("left are: tally %v, targets %v, waits %v", m.tally, m.targets.all, m.targets.waitUntil)
		}
		misplaced := m.relay.filter(func(s *session) bool { return !s.isEnding() && m.shouldMove(s) })
		wantEqual(t, "sessions that are not with their owner", len(misplaced), 0)
	})
}

// Under random changes no second has more moves than the rate allows, but for those that a pace
// makes up for. (Sessions of backends that are scaled in would: there are none.)
func TestMoveRateSeeds(t *testing.T) {
	const rate = 10
	moveSeeds(t, []int{rate}, 1, 200, 60, 7, func(t *testing.T, m *moveTest) {
		all := m.after(0)
		for _, seconds := range []int{1, 3, 10} {
			first, most := 0, 0
			for i, closed := range all {
				for closed.at-all[first].at > time.Duration(seconds)*time.Second {
					first++
				}
				most = max(most, i-first+1)
			}
			if limit := rate*seconds + rate*int(paceCatchUp/time.Second) + 3; most > limit {
				t.Errorf("%d of %d sessions were closed in %d s, want at most %d", most, len(all), seconds, limit)
			}
		}
	})
}

// A router alone begins steps that close sessions minStepTime apart, also if each is over at once.
func TestMoveStepsAreApart(t *testing.T) {
	movesIn(t, 100, 1, pinned(60, 0), func(t *testing.T, m *moveTest) {
		m.closeSession = func(s *session, done func(bool)) bool {
			return m.recordCloseIn(time.Millisecond, s, done)
		}
		m.table(pinned(60, 1))
		all := m.after(5 * time.Second)
		wantEqual(t, "sessions that were closed", len(all), 60)
		for i, s := range all[1:] {
			if apart := s.at - all[i].at; apart > 0 && apart < minStepTime {
				t.Errorf("a step began %s after the one before, want at least %s", apart, minStepTime)
			}
		}
	})
}

// A 409 raises the step also while a change waits. A step that hands over nothing does not count.
func TestRaisedStepInAChange(t *testing.T) {
	movesIn(t, 0, 1, pinned(2, 0), func(t *testing.T, m *moveTest) {
		m.setAbsent(1, true)
		m.table(pinned(2, 1))
		m.after(time.Second)
		steps, above := m.stepsDone.Load(), m.current.Load().step+5000
		m.noteStep(fmt.Sprint(above))
		m.after(minStepTime)
		v := m.current.Load()
		wantEqual(t, "tables of the plan", len(v.records), 2)
		wantEqual(t, "the step is above that of the backend", v.step > above, true)
		wantEqual(t, "steps that have handed over namespaces", m.stepsDone.Load(), steps)
	})
}

// A router's share of the rate is for the sessions that the rate counts: not for those of a
// backend that is scaled in.
func TestShareWithoutScaledIn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m := newMoveTest(false, 10, 1, map[string]string{"ns-01": "backend-0"})
		m.ctx = t.Context()
		m.relay.add(&session{namespace: "scaled-in", backend: 4})
		m.tables.setBackends(backendSet{ordinalRange: ordinalRange{count: 4}})
		m.table(map[string]string{"ns-01": "backend-1"})
		p, _ := m.work(m.current.Load(), m.tables.table(), time.Now())
		m.wantPending(t, 2)
		wantEqual(t, "sessions that the rate counts", p.toMove, 1)
		m.targets.close()
	})
}

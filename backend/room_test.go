package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
)

// faultyStore is a store whose saves take a while, or fail while failure is set.
type faultyStore struct {
	store
	slow    time.Duration
	failure atomic.Pointer[error]
}

func (s *faultyStore) save(ctx context.Context, namespace string, step int64, state []byte) error {
	time.Sleep(s.slow)
	if failure := s.failure.Load(); failure != nil {
		return *failure
	}
	return s.store.save(ctx, namespace, step, state)
}

// testRooms are rooms with a save delay of a minute, and their store.
func testRooms(s store) *rooms { return newRooms(s, time.Minute, quietLog()) }

// mustEnter enters and begins. The session leaves as soon as it is ended, and ended is
// closed then.
func mustEnter(t *testing.T, rs *rooms, namespace string, step int64) (m *member, ended chan struct{}) {
	t.Helper()
	m, err := rs.enter(t.Context(), namespace, step)
	if err != nil {
		t.Fatalf("enter %s with step %d: %v", namespace, step, err)
	}
	ended = make(chan struct{})
	if !m.begin(sync.OnceFunc(func() { m.leave(); close(ended) })) {
		t.Fatalf("a session of %s with step %d may not begin", namespace, step)
	}
	return m, ended
}

func mustAdd(t *testing.T, m *member, want int64) {
	t.Helper()
	if got, ok := m.add(); !ok || got != want {
		t.Errorf("count %d, %v; want %d", got, ok, want)
	}
}

func mustRelease(t *testing.T, rs *rooms, namespace string, step int64) {
	t.Helper()
	if err := rs.release(t.Context(), []string{namespace}, step); err != nil {
		t.Errorf("release of %s: %v", namespace, err)
	}
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// TestReleaseWaitsForTheStore: a save that takes two seconds is waited for, by each of the
// routers that call.
func TestReleaseWaitsForTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		local := newLocalStore("")
		rs := testRooms(&faultyStore{store: local, slow: 2 * time.Second})
		m, ended := mustEnter(t, rs, "ns-01", 5)
		mustAdd(t, m, 1)
		began := time.Now()
		var routers sync.WaitGroup
		for range 3 {
			routers.Go(func() {
				mustRelease(t, rs, "ns-01", 6)
				if took := time.Since(began); took != 2*time.Second || !isClosed(ended) {
					t.Errorf("released after %v, session ended: %v; want 2s and true", took, isClosed(ended))
				}
			})
		}
		routers.Wait()
		mustLoad(t, local, "ns-01", 6, "1")
	})
}

// TestReleaseWaitsForSessions: nothing is saved while a session may change it. From the
// beginning of the release, nothing counts.
func TestReleaseWaitsForSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		local := newLocalStore("")
		rs := testRooms(local)
		m, err := rs.enter(t.Context(), "ns-01", 5)
		if err != nil {
			t.Fatal(err)
		}
		end := make(chan struct{})
		m.begin(func() { close(end) })
		mustAdd(t, m, 1)
		released := make(chan struct{})
		go func() { mustRelease(t, rs, "ns-01", 6); close(released) }()
		<-end
		synctest.Wait()
		if isClosed(released) {
			t.Error("released while a session was there")
		}
		if count, ok := m.add(); ok {
			t.Errorf("a session that was ended counted %d", count)
		}
		m.leave()
		<-released
		mustLoad(t, local, "ns-01", 6, "1")
	})
}

// TestReleaseDuringHandshake: a session that has entered before the release, and begins
// after it, does not begin.
func TestReleaseDuringHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rs := testRooms(newLocalStore(""))
		m, err := rs.enter(t.Context(), "ns-01", 5)
		if err != nil {
			t.Fatal(err)
		}
		released := make(chan struct{})
		go func() { mustRelease(t, rs, "ns-01", 6); close(released) }()
		synctest.Wait()
		if isClosed(released) {
			t.Error("released while a handshake was under way")
		}
		if m.begin(func() {}) {
			t.Error("a session began after the release")
		}
		m.leave()
		<-released
	})
}

// TestReleaseFailsWithTheStore: as long as the state cannot be saved, the namespace is not
// released; it is with the first save that works.
func TestReleaseFailsWithTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		local := newLocalStore("")
		faulty := &faultyStore{store: local}
		failure := errors.New("disk full")
		faulty.failure.Store(&failure)
		rs := testRooms(faulty)
		for _, namespace := range []string{"ns-01", "ns-02"} {
			m, _ := mustEnter(t, rs, namespace, 5)
			mustAdd(t, m, 1)
		}
		for range 3 {
			err := rs.release(t.Context(), []string{"ns-01", "ns-02", "other"}, 6)
			if err == nil || !strings.Contains(err.Error(), "disk full (and 1 more)") {
				t.Errorf("release with a store that fails: %v", err)
			}
		}
		_, err := rs.enter(t.Context(), "ns-01", 5)
		mustBeStale(t, err, 6)
		faulty.failure.Store(nil)
		mustRelease(t, rs, "ns-01", 6)
		mustLoad(t, local, "ns-01", 6, "1")
		time.Sleep(2 * time.Minute) // ns-02 is saved without a release
		mustLoad(t, local, "ns-02", 6, "1")
	})
}

// TestReleaseIsBounded: a release ends with its request, and says what it waited for.
func TestReleaseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rs := testRooms(newLocalStore(""))
		m, err := rs.enter(t.Context(), "ns-01", 5)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err = rs.release(ctx, []string{"ns-01"}, 6)
		if err == nil || !strings.Contains(err.Error(), "ns-01") {
			t.Errorf("error %v, want ns-01 in it", err)
		}
		m.leave()
	})
}

// TestStepsOfSessions: after a release with step 6, a session needs step 6. A late release
// ends only sessions of its own time.
func TestStepsOfSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rs := testRooms(newLocalStore(""))
		mustRelease(t, rs, "ns-01", 6)
		for _, step := range []int64{0, 5} {
			_, err := rs.enter(t.Context(), "ns-01", step)
			mustBeStale(t, err, 6)
		}
		m, ended := mustEnter(t, rs, "ns-01", 8)
		mustRelease(t, rs, "ns-01", 6)
		mustAdd(t, m, 1)
		mustEnter(t, rs, "ns-01", 7) // of a router that is behind; the owner is the same
		mustRelease(t, rs, "ns-01", 9)
		if !isClosed(ended) {
			t.Error("a session with step 8 is there after the release with step 9")
		}
		mustRelease(t, rs, "ns-01", 6)
		_, err := rs.enter(t.Context(), "ns-01", 8)
		mustBeStale(t, err, 9)
		mustEnter(t, rs, "ns-02", 0) // nothing was said of it
	})
}

// TestSavesAfterDelay: a change is saved a minute later, however many follow it.
func TestSavesAfterDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		local := newLocalStore("")
		rs := testRooms(local)
		m, _ := mustEnter(t, rs, "ns-01", 5)
		for i := range int64(6) { // at 0, 16, ... 80 s
			mustAdd(t, m, i+1)
			if i == 3 {
				mustLoad(t, local, "ns-01", 5, "")
			}
			time.Sleep(16 * time.Second)
		}
		mustLoad(t, local, "ns-01", 5, "4") // at 60 s; the next save is at 124 s
		m.leave()
		time.Sleep(time.Minute)
		mustLoad(t, local, "ns-01", 5, "6")
	})
}

// TestChangeDuringSave: what changes while a save is under way is saved by the next one.
func TestChangeDuringSave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		local := newLocalStore("")
		rs := testRooms(&faultyStore{store: local, slow: 2 * time.Second})
		m, _ := mustEnter(t, rs, "ns-01", 5)
		mustAdd(t, m, 1)
		time.Sleep(time.Minute + time.Second)
		mustAdd(t, m, 2)
		time.Sleep(2 * time.Second)
		mustLoad(t, local, "ns-01", 5, "1")
		time.Sleep(2 * time.Minute)
		mustLoad(t, local, "ns-01", 5, "2")
	})
}

// TestRoomLoadsAgain: what another backend has saved meanwhile is what counts.
func TestRoomLoadsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		local := newLocalStore("")
		rs := testRooms(local)
		m, _ := mustEnter(t, rs, "ns-01", 5)
		mustAdd(t, m, 1)
		m.leave()
		mustSave(t, local, "ns-01", 6, "100") // the other one, without a release here
		m, _ = mustEnter(t, rs, "ns-01", 7)
		mustAdd(t, m, 101)
		mustRelease(t, rs, "ns-01", 8)
		mustLoad(t, local, "ns-01", 8, "101")
	})
}

// TestNewerOwnerEndsSessions: a save that the store refuses ends the sessions, and a
// release does not wait for what can never be saved.
func TestNewerOwnerEndsSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		local := newLocalStore("")
		rs := testRooms(local)
		m, ended := mustEnter(t, rs, "ns-01", 5)
		mustAdd(t, m, 1)
		mustLoad(t, local, "ns-01", 6, "") // the newer owner
		time.Sleep(time.Minute)
		synctest.Wait()
		if !isClosed(ended) {
			t.Error("the session is there after a save was refused")
		}
		if _, ok := m.add(); ok {
			t.Error("the session counts after a save was refused")
		}
		mustRelease(t, rs, "ns-01", 6)
		_, err := rs.enter(t.Context(), "ns-01", 6)
		if err != nil {
			t.Errorf("the owner of step 6: %v", err)
		}
		_, err = testRooms(local).enter(t.Context(), "ns-01", 5)
		mustBeStale(t, err, 6) // a backend that has restarted and knows nothing
	})
}

// postRelease sends what a router sends, and returns the status.
func postRelease(t *testing.T, addr string, step int64, body string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
		"http://"+addr+"/release", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Close = true
	req.Header.Set(stepHeader, fmt.Sprint(step))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestReleaseRequests(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	for name, tt := range map[string]struct {
		head, body string
		code       int
	}{
		"all is well":        {"POST /release HTTP/1.1\r\nX-Router-Step: 6", `{"namespaces":["ns-01"]}`, 204},
		"nothing to release": {"POST /release HTTP/1.1\r\nX-Router-Step: 6", `{}`, 204},
		"no step":            {"POST /release HTTP/1.1", `{"namespaces":["ns-01"]}`, 400},
		"bad step":           {"POST /release HTTP/1.1\r\nX-Router-Step: six", `{}`, 400},
		"no JSON":            {"POST /release HTTP/1.1\r\nX-Router-Step: 6", "ns-01", 400},
		"too long":           {"POST /release HTTP/1.1\r\nX-Router-Step: 6", `{"namespaces":["` + strings.Repeat("x", maxReleaseBytes), 400},
		"no POST":            {"GET /release HTTP/1.1\r\nX-Router-Step: 6", "", 405},
		"another backend":    {"POST /release HTTP/1.1\r\nX-Router-Step: 6\r\nX-Router-Backend: backend-7", `{}`, 421},
	} {
		t.Run(name, func(t *testing.T) {
			resp, body := rawDial(t, s.addr).ask(fmt.Sprintf("%s\r\nHost: b\r\nContent-Length: %d\r\n\r\n%s",
				tt.head, len(tt.body), tt.body))
			if resp.StatusCode != tt.code {
				t.Errorf("%s %q, want %d", resp.Status, body, tt.code)
			}
		})
	}
}

// TestReleaseAnswers is a hand-over as a client and a router see it.
func TestReleaseAnswers(t *testing.T) {
	cfg := quietConfig()
	cfg.saveDelay = time.Hour
	s := startServer(t, cfg, "tcp")
	faulty := &faultyStore{store: s.rooms.store}
	s.rooms.store = faulty
	c := rawOpen(t, s.addr, "/ws/ns-01", "X-Router-Step: 5")
	c.mustCounter(1)
	c.write(frameOf(websocket.TextFrame, "count"))
	if m := c.mustCounter(2); m.Total != 1 {
		t.Errorf("total %d, want 1", m.Total)
	}
	c.write(frameOf(websocket.TextFrame, "counter"))
	if m := c.mustCounter(3); m.Total != 0 {
		t.Errorf("another message has the total %d", m.Total)
	}
	failure := errors.New("disk full")
	faulty.failure.Store(&failure)
	status := make(chan int)
	go func() { status <- postRelease(t, s.addr, 6, `{"namespaces":["ns-01"]}`) }()
	c.mustClose(closeRestart)
	c.write(closeOf(closeRestart, ""))
	if code := <-status; code != 500 {
		t.Errorf("status %d of a release that cannot save, want 500", code)
	}
	s.mustLog(t, "release failed", "step=6", "save ns-01: disk full")
	faulty.failure.Store(nil)
	if code := postRelease(t, s.addr, 6, `{"namespaces":["ns-01"]}`); code != 204 {
		t.Errorf("status %d of a release, want 204", code)
	}
	resp, _ := rawDial(t, s.addr).ask(head("/ws/ns-01", "X-Router-Step: 5"))
	if resp.StatusCode != 409 || resp.Header.Get(stepHeader) != "6" {
		t.Errorf("%s with step %q, want 409 with 6", resp.Status, resp.Header.Get(stepHeader))
	}
	rawOpen(t, s.addr, "/ws/ns-01", "X-Router-Step: 7").mustCounter(1)
}

// TestStoreIsAway: without its state a namespace has no sessions, and no other has less.
func TestStoreIsAway(t *testing.T) {
	s := startServer(t, quietConfig(), "tcp")
	remote := newHTTPStore("http://" + rawClosedAddr(t))
	s.rooms.store = remote
	resp, _ := rawDial(t, s.addr).ask(head("/ws/ns-01"))
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("%s, want 503 with Retry-After", resp.Status)
	}
	if resp, _ := rawDial(t, s.addr).ask(head("/ws/ns-01", "X-Router-Step: x")); resp.StatusCode != 400 {
		t.Errorf("%s for a bad step, want 400", resp.Status)
	}
}

// TestStopSaves: a backend that stops saves what it has.
func TestStopSaves(t *testing.T) {
	cfg := quietConfig()
	cfg.saveDelay = time.Hour
	s := startServer(t, cfg, "tcp")
	local := newLocalStore("")
	s.rooms.store = local
	c := rawOpen(t, s.addr, "/ws/ns-01", "X-Router-Step: 5")
	c.write(frameOf(websocket.TextFrame, "count"))
	c.mustCounter(1)
	c.mustCounter(2)
	go s.stop()
	c.mustClose(closeGoingAway)
	c.write(closeOf(closeGoingAway, ""))
	s.stop()
	mustLoad(t, local, "ns-01", 5, "1")
}

// TestNextOwnerHasAllAcknowledged hands namespaces from one backend to the other and
// back, while clients count as fast as they can, through two routers' worth of sessions.
// Every total that a client has read is in the state with which the next owner begins,
// and no total comes twice.
func TestNextOwnerHasAllAcknowledged(t *testing.T) {
	const namespaces, clients, handOvers = 4, 3, 6
	shared := newLocalStore("")
	var backends [2]*testServer
	for i := range backends {
		cfg := quietConfig()
		cfg.name, cfg.saveDelay = fmt.Sprintf("backend-%d", i), time.Hour
		backends[i] = startServer(t, cfg, "tcp")
		backends[i].rooms.store = serveTestStore(t, shared)
	}
	last := make([]int64, namespaces) // the highest total that a client has read
	for step := int64(1); step <= handOvers; step++ {
		owner := backends[step%2]
		totals := make(chan [2]int64)
		var counting sync.WaitGroup
		var conns []*rawClient // all of them before the release, which refuses later ones
		for i := range namespaces * clients {
			conns = append(conns, rawOpen(t, owner.addr, fmt.Sprintf("/ws/ns-%d", i%namespaces), fmt.Sprintf("X-Router-Step: %d", step)))
		}
		for i, c := range conns {
			counting.Go(func() { countUntilClose(t, c, i%namespaces, totals) })
		}
		go func() { counting.Wait(); close(totals) }()
		released := make(chan struct{})
		before, seen := append([]int64(nil), last...), map[[2]int64]bool{}
		for total := range totals {
			ns, n := total[0], total[1]
			if n <= before[ns] || seen[total] {
				t.Fatalf("step %d: total %d of ns-%d, after %d was acknowledged", step, n, ns, before[ns])
			}
			seen[total], last[ns] = true, max(last[ns], n)
			if len(seen) == 50*namespaces {
				go func() { releaseTwice(t, owner.addr, step+1); close(released) }()
			}
		}
		<-released
	}
}

// countUntilClose counts in a namespace until the backend closes, and sends each total.
func countUntilClose(t *testing.T, c *rawClient, ns int, totals chan<- [2]int64) {
	for {
		c.write(frameOf(websocket.TextFrame, "count"))
		opcode, text, err := c.next()
		if opcode == websocket.CloseFrame {
			c.write(closeOf(closeRestart, ""))
			return
		}
		var m message
		if err == nil {
			err = json.Unmarshal([]byte(text), &m)
		}
		if err != nil {
			t.Errorf("a session ended without a Close: %v", err)
			return
		}
		if m.Total > 0 {
			totals <- [2]int64{int64(ns), m.Total}
		}
	}
}

// releaseTwice releases all namespaces, as two routers do.
func releaseTwice(t *testing.T, addr string, step int64) {
	var routers sync.WaitGroup
	for range 2 {
		routers.Go(func() {
			body := `{"namespaces":["ns-0","ns-1","ns-2","ns-3"]}`
			if code := postRelease(t, addr, step, body); code != 204 {
				t.Errorf("release: %d, want 204", code)
			}
		})
	}
	routers.Wait()
}

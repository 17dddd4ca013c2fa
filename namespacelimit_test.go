package main

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// limitSessions sets -max-sessions-per-namespace.
func limitSessions(p *proxy, limit int) {
	p.namespaceLimiter = newNamespaceLimiter(namespaceLimits{sessions: limit}, p.log)
}

// all returns how many slots are taken, by namespace.
func (n *namespaceSlots) all() map[string]int32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.taken)
}

// mustRefuseNamespace checks the answer for a namespace that is at its limit.
func mustRefuseNamespace(t *testing.T, resp *http.Response, status int) {
	t.Helper()
	if resp.StatusCode != status || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("status %d with Retry-After %q, want %d with 1",
			resp.StatusCode, resp.Header.Get("Retry-After"), status)
	}
}

// TestNamespaceSessions: a namespace has as many sessions as the limit allows, and others
// have theirs.
func TestNamespaceSessions(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		backend := startStub(t, "127.0.0.1:0", echo)
		p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) { limitSessions(p, 2) })
		opened := func(request string) *net.TCPConn {
			t.Helper()
			conn, _, resp := p.ask(t, request)
			wantEqual(t, "the status", resp.StatusCode, http.StatusSwitchingProtocols)
			return conn
		}
		first := opened(request)
		opened(request)
		_, _, resp := p.ask(t, request)
		mustRefuseNamespace(t, resp, http.StatusServiceUnavailable)
		p.waitResult(t, resultMaxSessionsPerNamespace)
		opened(strings.Replace(request, "ns-01", "ns-02", 1))
		p.waitSessions(t, 3)
		first.Close()
		p.waitSessions(t, 2)
		opened(request)
		_, _, resp = p.ask(t, request)
		mustRefuseNamespace(t, resp, http.StatusServiceUnavailable)
		line := p.tail.wait(t, "upgrade failed", 1)
		wantEqual(t, "the error in the log", line["error"],
			any(`"ns-01" has 2 sessions and pending upgrades, the limit of a namespace`))
	})
}

// TestNamespaceSessionsAtOnce: of many clients at once only as many pass as the limit
// allows, as an upgrade counts from its admission.
func TestNamespaceSessionsAtOnce(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		const limit, clients = 3, 20
		goOn := make(chan struct{})
		backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
			<-goOn
			echo(conn, br)
		})
		p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) { limitSessions(p, limit) })
		var conns []net.Conn
		for range clients {
			conn := dial(t, p.addr)
			mustWrite(t, conn, request)
			conns = append(conns, conn)
		}
		eventually(t, "refused", clients-limit, func() int64 { return p.results[resultMaxSessionsPerNamespace].Load() })
		close(goOn)
		statuses := map[int]int{}
		for _, conn := range conns {
			conn.SetReadDeadline(time.Now().Add(patience))
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			must(t, err)
			statuses[resp.StatusCode]++
		}
		if want := map[int]int{101: limit, 503: clients - limit}; !maps.Equal(statuses, want) {
			t.Errorf("answers %v, want %v", statuses, want)
		}
	})
}

// TestNamespaceSessionsAreFreed: whatever becomes of upgrades and sessions, in both ways of
// an upgrade, no slot stays taken, and there are never more than the limit. As many sessions
// as the limit get in afterwards, and no more.
func TestNamespaceSessionsAreFreed(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		const limit = 2
		p := startProxy(t, []string{
			startStub(t, "127.0.0.1:0", echo).addr,
			startStub(t, "127.0.0.1:0", answer("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")).addr,
			startStub(t, "127.0.0.1:0", silent).addr,
			startStub(t, "127.0.0.1:0", func(conn net.Conn, _ *bufio.Reader) { io.WriteString(conn, switching) }).addr,
			refusingAddr(t),
			startStub(t, "127.0.0.1:0", answer(switching)).addr, // it answers no Close frame
		}, map[string]string{"ns-0": "backend-0", "ns-1": "backend-1", "ns-2": "backend-2",
			"ns-3": "backend-3", "ns-4": "backend-4", "ns-5": "backend-5"}, func(p *proxy) {
			limitSessions(p, limit)
			p.limits.holdTimeout, p.limits.upgradeTimeout = 200*time.Millisecond, 200*time.Millisecond
			p.relay.closeTimeout = 100 * time.Millisecond
		})
		seed := randomSeed(t)
		var clients sync.WaitGroup
		for client := range uint64(8) {
			clients.Go(func() {
				random := rand.New(rand.NewPCG(seed, client))
				for range 12 {
					p.playEnd(t, request, random)
					for namespace, taken := range p.namespaceLimiter.sessions.all() {
						if taken < 1 || taken > limit {
							t.Errorf("%s has %d slots, want 1 to %d", namespace, taken, limit)
						}
					}
				}
			})
		}
		clients.Wait()
		eventually(t, "namespaces with slots", 0, func() int { return len(p.namespaceLimiter.sessions.all()) })
		request = strings.Replace(request, "ns-01", "ns-0", 1)
		for range limit { // on a busy machine, the time for an upgrade may be too short
			eventually(t, "the status afterwards", http.StatusSwitchingProtocols, func() int {
				conn := dial(t, p.addr)
				mustWrite(t, conn, request)
				conn.SetReadDeadline(time.Now().Add(patience))
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					return 0
				}
				return resp.StatusCode
			})
		}
		_, _, resp := p.ask(t, request)
		mustRefuseNamespace(t, resp, http.StatusServiceUnavailable)
	})
}

// playEnd has one upgrade of a random namespace, and ends it in a random way.
func (p *testProxy) playEnd(t *testing.T, request string, random *rand.Rand) {
	backend, way := random.IntN(6), random.IntN(6)
	namespace := fmt.Sprintf("ns-%d", backend)
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	io.WriteString(conn, strings.Replace(request, "ns-01", namespace, 1))
	if way == 0 {
		reset(conn.(*net.TCPConn))
		return
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := http.ReadResponse(bufio.NewReader(conn), nil); os.IsTimeout(err) { // without one, its time for the 101 was over, on a busy machine
		t.Errorf("no answer: %v", err)
	}
	of := func(s *session) bool { return s.namespace == namespace }
	for _, s := range p.relay.filter(of) {
		switch way {
		case 1:
			s.closeGracefully(causeMoved, nil)
		case 2:
			s.closeGracefully(causeMaxAge, nil)
		case 3:
			s.end(causeIdle)
		case 4:
			s.closeGracefully(causeMoved, nil)
			s.end(causeDrain)
		}
	}
}

// TestNamespaceSessionsOfAMove: a namespace that is at its limit gets in again when it is
// moved, also while its sessions with the previous owner have not ended.
func TestNamespaceSessionsOfAMove(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		old := startStub(t, "127.0.0.1:0", answer(switching)) // it answers no Close frame
		next := startStub(t, "127.0.0.1:0", echo)
		p := startProxy(t, []string{old.addr, next.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
			limitSessions(p, 1)
			p.relay.closeTimeout = time.Hour
		})
		p.ask(t, request)
		p.waitSessions(t, 1)
		p.override("42", map[string]string{"ns-01": "backend-1"})
		eventually(t, "sessions that are closed", 1, func() int { return len(p.relay.filter((*session).isEnding)) })
		conn := dial(t, p.addr)
		mustWrite(t, conn, request)
		p.waitPending(t, 1)
		p.relay.endAll(causeMoved)
		mustAnswer(t, conn, http.StatusSwitchingProtocols)
		_, _, resp := p.ask(t, request)
		mustRefuseNamespace(t, resp, http.StatusServiceUnavailable)
	})
}

// limitRate sets -max-upgrades-per-second to a limit for interval.
func limitRate(p *proxy, limit int, interval time.Duration) {
	p.namespaceLimiter = newNamespaceLimiter(namespaceLimits{upgradesPerSecond: limit}, p.log)
	rate := p.namespaceLimiter.rate
	rate.interval, rate.size = interval/time.Duration(limit), interval
}

// TestNamespaceRate: a namespace has as many upgrades as the limit allows, and others have
// theirs. An upgrade that waits for its owner counts once.
func TestNamespaceRate(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		addr := freeAddr(t)
		p := startProxy(t, []string{addr}, map[string]string{}, func(p *proxy) { limitRate(p, 2, time.Hour) })
		held := dial(t, p.addr)
		mustWrite(t, held, request)
		p.waitPending(t, 1)
		startStub(t, addr, echo)
		mustAnswer(t, held, http.StatusSwitchingProtocols)
		p.ask(t, request)
		_, _, resp := p.ask(t, request)
		mustRefuseNamespace(t, resp, http.StatusTooManyRequests)
		p.waitResult(t, resultMaxUpgradesPerSecond)
		eventually(t, "upgrades under way", 0, p.underWay) // a client may have its 101 before the count ends
		_, _, resp = p.ask(t, strings.Replace(request, "ns-01", "ns-02", 1))
		wantEqual(t, "the status of another namespace", resp.StatusCode, http.StatusSwitchingProtocols)
		line := p.tail.wait(t, "upgrade failed", 1)
		wantEqual(t, "the error in the log", line["error"],
			any(`"ns-01" has more than 2 upgrades per second, the limit of a namespace`))
	})
}

// TestNamespaceRateIsABucket compares a namespaceRate with token buckets that are never
// dropped.
func TestNamespaceRateIsABucket(t *testing.T) {
	seed, allowed, refused := randomSeed(t), 0, 0
	for _, limit := range []int{1, 2, 7, 1000} {
		bubble(t, func(t *testing.T) {
			n, random := newNamespaceRate(limit, slog.New(slog.DiscardHandler)), rand.New(rand.NewPCG(seed, uint64(limit)))
			interval := int64(time.Second) / int64(limit)
			size := interval * int64(limit)
			filled, last := map[string]int64{}, time.Now() // a token is interval
			for range 5000 {
				wait := time.Duration(random.Int64N(interval/8 + 1))
				if random.IntN(20*limit) == 0 {
					wait = time.Duration(random.Int64N(int64(3 * time.Second)))
				}
				time.Sleep(wait)
				for name := range filled {
					filled[name] = min(size, filled[name]+int64(time.Since(last)))
				}
				last = time.Now()
				namespace := fmt.Sprint(random.IntN(2))
				if _, ok := filled[namespace]; !ok {
					filled[namespace] = size
				}
				want := filled[namespace] >= interval
				if got := n.allow(namespace); got != want {
					t.Fatalf("limit %d, %d allowed, %d refused: allow is %t, want %t", limit, allowed, refused, got, want)
				}
				refused++
				if want {
					filled[namespace] -= interval
					allowed, refused = allowed+1, refused-1
				}
			}
		})
	}
	// The largest limit alone may refuse nothing. The others always do.
	if allowed == 0 || refused == 0 {
		t.Errorf("%d allowed and %d refused: the test shows nothing", allowed, refused)
	}
}

// TestNamespaceRateIsBounded: beyond maxRateNamespaces, namespaces are not limited, and
// those before them are. What was not used for two seconds is dropped.
func TestNamespaceRateIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		tail := newLogTail()
		n := newNamespaceRate(1, nil)
		n.log = slog.New(slog.NewJSONHandler(tail, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if !n.mu.TryLock() {
				t.Fatal("it logs with its lock held, for which all upgrades wait")
			}
			n.mu.Unlock()
			return a
		}}))
		names := manyNamespaces(maxRateNamespaces + 2)
		for _, name := range names {
			if !n.allow(name) {
				t.Fatalf("%s is refused", name)
			}
		}
		for name, want := range map[string]bool{names[0]: false, names[maxRateNamespaces-1]: false,
			names[maxRateNamespaces]: true, names[maxRateNamespaces+1]: true} {
			wantEqual(t, "allow at once, again for "+name, n.allow(name), want)
		}
		wantEqual(t, "buckets", len(n.present), maxRateNamespaces)
		lines := tail.all("too many namespaces at once; upgrades of more are not limited")
		wantLine(t, lines, 1, map[string]any{"max": float64(maxRateNamespaces), "omitted": 0.0})
		time.Sleep(n.size)
		n.allow(names[0])
		wantEqual(t, "buckets of both generations after a second", len(n.present)+len(n.previous), maxRateNamespaces+1)
		time.Sleep(n.size)
		n.allow(names[1])
		wantEqual(t, "buckets after two", len(n.present)+len(n.previous), 2)
		time.Sleep(2 * n.size)
		n.allow(names[1])
		wantEqual(t, "buckets after four", len(n.present)+len(n.previous), 1)
	})
}

// TestNamespaceLimitsAreOff: without flags there is no limit, and nothing to count.
func TestNamespaceLimitsAreOff(t *testing.T) {
	p := startProxy(t, []string{startStub(t, "127.0.0.1:0", echo).addr}, map[string]string{}, nil)
	if p.namespaceLimiter != nil {
		t.Error("there are limits of namespaces without flags")
	}
	var conns []net.Conn
	for range 5 {
		conns = append(conns, p.open(t, "ns-01"))
	}
	p.waitSessions(t, len(conns))
	if slices.Contains(conns, nil) {
		t.Error("a session was refused")
	}
}

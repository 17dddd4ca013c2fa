package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Every way to end: what was on its way arrives, and the session is counted and
// logged once, with the bytes that each side's peer has taken (play returns
// them, -1 for any), the cause and the duration.
//
// It fails if a FIN overtakes what is held, if an RST or a FIN is taken for the
// other, if a second cause replaces the first, if a counter or a line is left
// out, doubled or another's, and if the duration is not in seconds.
func TestRelayEnds(t *testing.T) {
	tests := map[string]struct {
		play func(t *testing.T, c relayed) (taken [2]int64)
		want cause // causeNone: either side's end
	}{
		"client ends its half, backend answers and ends": {func(t *testing.T, c relayed) [2]int64 {
			mustWrite(t, c.client, "question")
			closeWrite(t, c.client)
			mustRead(t, c.backend, "question")
			mustEOF(t, c.backend)
			mustWrite(t, c.backend, "answer")
			c.backend.Close()
			mustRead(t, c.client, "answer")
			mustEOF(t, c.client)
			return [2]int64{8, 6}
		}, causeClient},
		"backend ends its half, client answers and ends": {func(t *testing.T, c relayed) [2]int64 {
			mustWrite(t, c.backend, "question")
			closeWrite(t, c.backend)
			mustRead(t, c.client, "question")
			mustEOF(t, c.client)
			mustWrite(t, c.client, "answer")
			c.client.Close()
			mustRead(t, c.backend, "answer")
			mustEOF(t, c.backend)
			return [2]int64{6, 8}
		}, causeBackend},
		"client closes": {func(t *testing.T, c relayed) [2]int64 {
			c.client.Close()
			mustEOF(t, c.backend)
			c.backend.Close()
			return [2]int64{}
		}, causeClient},
		"backend closes": {func(t *testing.T, c relayed) [2]int64 {
			c.backend.Close()
			mustEOF(t, c.client)
			c.client.Close()
			return [2]int64{}
		}, causeBackend},
		"both end their halves while neither reads": {func(t *testing.T, c relayed) [2]int64 {
			taken := [2]int64{stuff(c.client), stuff(c.backend)}
			closeWrite(t, c.client)
			closeWrite(t, c.backend)
			mustReadAll(t, c.backend, taken[clientSide])
			mustReadAll(t, c.client, taken[backendSide])
			return taken
		}, causeNone}, // on a busy machine the backend's may be seen first: what the relay had no time for is not stuck
		"client breaks": {func(t *testing.T, c relayed) [2]int64 {
			reset(c.client)
			mustBreak(t, c.backend)
			return [2]int64{}
		}, causeClientError},
		"backend breaks": {func(t *testing.T, c relayed) [2]int64 {
			reset(c.backend)
			mustBreak(t, c.client)
			return [2]int64{}
		}, causeBackendError},
		"client breaks, for which bytes are held": {func(t *testing.T, c relayed) [2]int64 {
			stuff(c.backend)
			reset(c.client)
			mustBreak(t, c.backend)
			c.backend.Close()
			return [2]int64{0, -1}
		}, causeClientError},
		"backend breaks, of which bytes are held": {func(t *testing.T, c relayed) [2]int64 {
			stuff(c.backend)
			reset(c.backend)
			c.client.SetReadDeadline(time.Now().Add(patience))
			n, err := io.Copy(io.Discard, c.client)
			if err != nil {
				t.Error(err)
			}
			return [2]int64{0, n}
		}, causeBackendError},
		"client breaks after it ended its half": {func(t *testing.T, c relayed) [2]int64 {
			closeWrite(t, c.client)
			mustEOF(t, c.backend)
			reset(c.client)
			c.backend.Close()
			return [2]int64{}
		}, causeClient},
		"nothing comes after a half-close": {func(t *testing.T, c relayed) [2]int64 {
			closeWrite(t, c.client)
			mustEOF(t, c.backend)
			mustBreak(t, c.client)
			return [2]int64{}
		}, causeHalfClose},
		"nobody reads after a half-close": {func(t *testing.T, c relayed) [2]int64 {
			closeWrite(t, c.client)
			mustEOF(t, c.backend)
			io.Copy(c.backend, endless{}) // until the relay cuts it
			return [2]int64{0, -1}
		}, causeHalfClose},
		"its namespace moves while the router drains": {func(t *testing.T, c relayed) [2]int64 {
			c.end(causeMoved)
			c.end(causeDrain)
			mustBreak(t, c.client)
			mustBreak(t, c.backend)
			return [2]int64{}
		}, causeMoved},
		"the router drains": {func(t *testing.T, c relayed) [2]int64 {
			mustWrite(t, c.client, "question")
			mustRead(t, c.backend, "question")
			c.end(causeDrain)
			mustBreak(t, c.client)
			mustBreak(t, c.backend)
			return [2]int64{8, 0}
		}, causeDrain},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := quietRelay(t)
			tail, least := newLogTail(), time.Duration(0)
			r.log = slog.New(slog.NewJSONHandler(tail, nil))
			if tt.want == causeHalfClose {
				least = 200 * time.Millisecond
				r.halfCloseTimeout = least
			}
			begun := time.Now()
			c := startedSession(t, r, 2, nil, nil)
			if got := r.counts()[2].open; got != 1 {
				t.Errorf("open = %d, want 1", got)
			}
			taken := tt.play(t, c)
			if tt.want == causeNone {
				waitFor(t, r)
				tt.want = causeClient
				if cause(c.cause.Load()) == causeBackend {
					tt.want = causeBackend
				}
			}
			c.wantCause(t, tt.want)
			c.wantAccount(t, tail, taken, least, time.Since(begun))
		})
	}
}

// A half-closed session that goes on talking is not cut.
func TestRelayHalfClosedTalks(t *testing.T) {
	r := quietRelay(t)
	r.halfCloseTimeout = 300 * time.Millisecond
	c := startedSession(t, r, 0, nil, nil)
	closeWrite(t, c.client)
	mustEOF(t, c.backend)
	for end := time.Now().Add(3 * r.halfCloseTimeout); time.Now().Before(end); <-time.After(r.halfCloseTimeout / 10) {
		mustWrite(t, c.backend, "x")
		mustRead(t, c.client, "x")
	}
	c.backend.Close()
	mustEOF(t, c.client)
	c.wantCause(t, causeClient)
}

// gonePairs returns what a session is between, of which the given side can end and
// then be gone: TCP tells of that by a FIN and an RST, and a Unix socket, which only
// the client has, by EPIPE.
func gonePairs(t *testing.T, gone side, unix bool) (ends [2]halfConn, near [2]net.Conn, leave func()) {
	t.Helper()
	for i := range ends {
		if unix && side(i) == gone {
			far, conn := unixPair(t)
			ends[i], near[i] = far, conn
			continue
		}
		far, conn := tcpPair(t)
		ends[i], near[i] = far, conn
	}
	return ends, near, func() {
		if conn, ok := ends[gone].(*net.TCPConn); ok {
			reset(conn)
			return
		}
		ends[gone].Close()
	}
}

// A session of which one side has ended and is then gone has nothing to carry any
// more, whatever the other goes on to say: it ends, long before half-closed ones do,
// and the first cause counts. It fails if only a silence ends it.
func TestRelayEndsWhenBothDirectionsAreDead(t *testing.T) {
	for _, tt := range []struct {
		gone side
		unix bool
	}{{clientSide, false}, {clientSide, true}, {backendSide, false}} {
		t.Run(fmt.Sprintf("%s, unix %t", tt.gone.endCause(), tt.unix), func(t *testing.T) {
			r := quietRelay(t)
			r.halfCloseTimeout = time.Hour
			ends, near, leave := gonePairs(t, tt.gone, tt.unix)
			s := newSession("ns-01", 0, "")
			r.startSession(s, near, [2][]byte{})
			if err := ends[tt.gone].CloseWrite(); err != nil {
				t.Fatal(err)
			}
			mustEOF(t, ends[tt.gone.other()])
			leave()
			for end := time.Now().Add(patience); !s.finished.Load() && time.Now().Before(end); <-time.After(time.Millisecond) {
				io.WriteString(ends[tt.gone.other()], "tick") // fails once the session is over
			}
			relayed{session: s, relay: r}.wantCause(t, tt.gone.endCause())
		})
	}
}

// What a side has sent before it ended and was gone comes to the other, which goes
// on talking all the time. It fails if the session is over, and its sockets reset,
// as soon as nothing more can be carried.
func TestRelayCarriesTheLastBytesOfWhoIsGone(t *testing.T) {
	r := quietRelay(t)
	r.halfCloseTimeout, r.deadTimeout = time.Hour, time.Hour
	ends, near, leave := gonePairs(t, clientSide, true)
	far := ends[backendSide].(*net.TCPConn)
	far.SetReadBuffer(16 << 10)
	s := newSession("ns-01", 0, "")
	r.startSession(s, near, [2][]byte{})
	const last = 150 << 10 // more than is taken by who does not read: a part is in the router's kernel
	mustWrite(t, ends[clientSide], string(make([]byte, last)))
	leave()
	var ticks sync.WaitGroup
	ticks.Go(func() {
		for n := 0; n < 100; n++ {
			io.WriteString(far, "tick")
			<-time.After(time.Millisecond)
		}
	})
	<-time.After(20 * time.Millisecond) // it talks before it reads; more or less of that is right too
	mustReadAll(t, far, last)
	ticks.Wait()
	far.Close()
	waitFor(t, r)
}

func TestRelayEarlyBytes(t *testing.T) {
	c := startedSession(t, quietRelay(t), 0, []byte("from the client"), []byte("from the backend"))
	mustRead(t, c.backend, "from the client")
	mustRead(t, c.client, "from the backend")
	mustWrite(t, c.client, " and more")
	mustWrite(t, c.backend, " and more")
	mustRead(t, c.backend, " and more")
	mustRead(t, c.client, " and more")
	c.end(causeDrain)
	waitFor(t, c.relay)
	if got := c.relay.bytes(); got != [2]int64{24, 25} {
		t.Errorf("bytes = %d, want 24 and 25", got)
	}
}

// What is stuck in both directions flows when both sides read, though nothing
// else happens that could wake the relay.
func TestRelayStuckBothWays(t *testing.T) {
	r := quietRelay(t)
	for round := range 10 {
		c := startedSession(t, r, 0, nil, nil)
		ends := [2]*net.TCPConn{c.client, c.backend}
		var sent [2]int64
		for i, conn := range ends {
			sent[i] = stuff(conn)
		}
		var both sync.WaitGroup
		for i, conn := range ends {
			both.Go(func() {
				conn.SetReadDeadline(time.Now().Add(patience))
				if n, err := io.CopyN(io.Discard, conn, sent[1-i]); err != nil {
					t.Errorf("round %d: read %d bytes of %d: %v", round, n, sent[1-i], err)
				}
			})
		}
		both.Wait()
		c.end(causeDrain)
	}
}

// Ends from several places at once are one end.
func TestRelayEndsOnce(t *testing.T) {
	r := quietRelay(t)
	const sessions = 100
	for range sessions {
		c := startedSession(t, r, 0, nil, nil)
		var all sync.WaitGroup
		for _, end := range []func(){
			func() { c.end(causeMoved) }, func() { c.end(causeDrain) },
			func() { reset(c.client) }, func() { c.backend.Close() },
		} {
			all.Go(end)
		}
		all.Wait()
	}
	waitFor(t, r)
	var total int64
	for i := range r.ended {
		total += r.ended[i].Load()
	}
	if total != sessions || r.ended[causeNone].Load() != 0 {
		t.Errorf("%d ends, %d without a cause; want %d and 0", total, r.ended[causeNone].Load(), sessions)
	}
}

// Both sides end at the same moment, each in one way or another, with bytes on
// their way: one end, of one of the two, and no other session's socket is closed.
//
// It fails if a session is counted twice, or a socket closed twice: the next
// session's, or the bystander's, is closed then.
func TestRelayBothEnd(t *testing.T) {
	const rounds, atOnce = 40, 25
	r := quietRelay(t)
	rng := rand.New(rand.NewPCG(randomSeed(t), 0))
	ways := []func(*net.TCPConn){
		func(conn *net.TCPConn) { conn.Close() },
		reset,
		func(conn *net.TCPConn) {
			conn.CloseWrite()
			io.Copy(io.Discard, conn) // or until the other's RST
			conn.Close()
		},
	}
	bystander := startedSession(t, r, 0, nil, nil)
	for range rounds {
		var all sync.WaitGroup
		for range atOnce {
			c := startedSession(t, r, 0, nil, nil)
			for _, conn := range []*net.TCPConn{c.client, c.backend} {
				way, last := ways[rng.IntN(len(ways))], make([]byte, logUniform(rng, 100_000))
				all.Go(func() {
					conn.SetDeadline(time.Now().Add(patience))
					conn.Write(last) // or until the other's RST
					way(conn)
				})
			}
		}
		all.Wait()
		mustWrite(t, bystander.client, "ping")
		mustRead(t, bystander.backend, "ping")
	}
	bystander.end(causeDrain)
	waitFor(t, r)
	var ends int64
	for _, cause := range []cause{causeClient, causeBackend, causeClientError, causeBackendError} {
		ends += r.ended[cause].Load()
	}
	if ends != rounds*atOnce {
		t.Errorf("%d sessions were ended by their sides, want %d", ends, rounds*atOnce)
	}
}

func BenchmarkRelayMessage(b *testing.B) {
	for _, size := range []int{64, 1024, 64 << 10} {
		b.Run(byteSize(size), func(b *testing.B) {
			r := quietRelay(b)
			c := startedSession(b, r, 0, nil, nil)
			message := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.client.Write(message); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c.backend, message); err != nil {
					b.Fatal(err)
				}
			}
			c.end(causeDrain)
			r.wait()
		})
	}
}

func byteSize(n int) string {
	if n >= 1024 {
		return backendName("KiB", n/1024)
	}
	return backendName("B", n)
}

// A session that carries nothing ends in time; one that carries something now
// and then, in whichever direction, stays for as long as it does.
func TestRelayEndsIdle(t *testing.T) {
	const timeout = 800 * time.Millisecond
	r := quietRelay(t)
	silent := startedSession(t, r, 0, nil, nil)
	spoke := startedSession(t, r, 0, []byte("hello"), []byte("hello"))
	asks, tells := startedSession(t, r, 0, nil, nil), startedSession(t, r, 0, nil, nil)
	begun := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	var looking sync.WaitGroup
	looking.Go(func() { r.endIdle(ctx, timeout) })
	defer looking.Wait()
	defer cancel()

	var ended time.Duration
	for ended == 0 || time.Since(begun) < 3*timeout {
		mustWrite(t, asks.client, "x")
		mustRead(t, asks.backend, "x")
		mustWrite(t, tells.backend, "x")
		mustRead(t, tells.client, "x")
		<-time.After(timeout / 20)
		if ended == 0 && silent.finished.Load() && spoke.finished.Load() {
			ended = time.Since(begun)
		}
		if time.Since(begun) > patience {
			t.Fatalf("%d sessions are open, want those that carry nothing ended", r.size())
		}
	}
	if ended < timeout || ended > 3*timeout/2 {
		t.Errorf("ended after %s, want -idle-timeout %s and at most a quarter more", ended, timeout)
	}
	for name, c := range map[string]relayed{"client sends": asks, "backend sends": tells} {
		if c.isClosing() {
			t.Errorf("%s: ended with cause %v, want open", name, cause(c.cause.Load()))
		}
	}
	waitFor(t, r) // now they are idle too
	if got := r.ended[causeIdle].Load(); got != 4 {
		t.Errorf("%d sessions ended with cause idle, want 4", got)
	}
}

// scanSessions is how many sessions a router is to look through.
const scanSessions = 100_000

// scanFactor is how much longer than of a slice a scan may take: that of a map took
// 10 times as long.
const scanFactor = 4

// scanned returns a relay with scanSessions sessions that are with their owners,
// and a mover for it. They have no sockets, which no process could have for so
// many: they are in the relay's set, and nothing else of them is looked at.
func scanned(t testing.TB, overrides int) (*relay, *mover, []*session) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	router := lookupTable(t, 4, overrides)
	r := newRelay(func(i int) string { return backendName("backend", i) }, log)
	all := make([]*session, scanSessions)
	for i, namespace := range shuffled(manyNamespaces(scanSessions)) {
		owner, _ := router.table().owner(namespace)
		all[i] = &session{namespace: namespace, backend: owner}
		all[i].bytesFrom[clientSide].Store(int64(i))
		all[i].bytesFrom[backendSide].Store(1)
	}
	rng := rand.New(rand.NewPCG(5, 6)) // in memory, sessions are not in the order of the set
	rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, s := range all {
		r.add(s)
	}
	return r, newMover(router, r, 0, nil, log), all
}

// A scan finds exactly the sessions it is to find, also when others have ended
// meanwhile, and takes little more of the processor than to look at them takes.
//
// It fails if a session is left out or comes twice, if another than the one that
// ended is taken out, if the bytes of an ended session are forgotten, and if the
// set is one that takes long to go through, as a map of so many did.
func TestRelayScan(t *testing.T) {
	r, m, all := scanned(t, 1000)
	want := map[*session]bool{}
	for i, s := range all {
		if i%1000 < 2 {
			s.backend = (s.backend + 1) % 4
			want[s] = true
		}
	}
	for i := 1; i < scanSessions; i += 2 {
		r.remove(all[i], all[i].bytes())
		delete(want, all[i])
	}
	if got := r.size(); got != scanSessions/2 {
		t.Errorf("%d sessions, want %d", got, scanSessions/2)
	}
	for _, s := range r.filter(m.shouldMove) {
		if !want[s] {
			t.Errorf("%s was found, and is with its owner, has ended, or was found before", s.namespace)
		}
		delete(want, s)
	}
	if len(want) > 0 {
		t.Errorf("%d sessions were not found", len(want))
	}
	if got, want := r.bytes(), [2]int64{scanSessions * (scanSessions - 1) / 2, scanSessions}; got != want {
		t.Errorf("bytes = %d, want %d", got, want)
	}
	for i := 1; i < scanSessions; i += 2 {
		r.add(all[i])
	}
	wantScanTime(t, r, m, all)
}

// wantScanTime compares what a processor needs for scans with what it needs for the
// same sessions in a slice, in turns, so that other programs have the same part in
// both: in each turn that is more for one, and in the best of them little.
func wantScanTime(t *testing.T, r *relay, m *mover, all []*session) {
	t.Helper()
	each := func(look func(*session)) func() {
		return func() {
			for _, s := range all {
				look(s)
			}
		}
	}
	scans := map[string]struct{ scan, plain func() }{
		"where one flag is set":           {func() { r.filter((*session).isClosing) }, each(func(s *session) { s.isClosing() })},
		"where the owner is another":      {func() { r.filter(m.shouldMove) }, each(func(s *session) { m.shouldMove(s) })},
		"the sum of what they have taken": {func() { r.bytes() }, each(func(s *session) { s.bytes() })},
	}
	for name, tt := range scans {
		best := [2]time.Duration{time.Hour, time.Hour}
		for range 15 {
			for i, scan := range []func(){tt.scan, tt.plain} {
				begun := processorTime(t)
				scan()
				best[i] = min(best[i], processorTime(t)-begun)
			}
		}
		t.Logf("%s: %s, of a slice %s", name, best[0], best[1])
		if best[0] > scanFactor*best[1]+time.Millisecond {
			t.Errorf("%s: a scan takes %s of processor time, want %d times the %s of a slice at most", name, best[0], scanFactor, best[1])
		}
	}
}

// Nothing is computed under the relay's lock: sessions start and end while others
// are matched. Each of those that were there at one moment is matched once.
func TestRelayScanHoldsNoLock(t *testing.T) {
	r := newRelay(func(int) string { return "backend-0" }, slog.New(slog.DiscardHandler))
	var all []*session
	for range 10 {
		all = append(all, &session{})
		r.add(all[len(all)-1])
	}
	matched := map[*session]int{}
	found := r.filter(func(s *session) bool {
		if !r.mu.TryLock() {
			t.Fatal("match is called with the relay's lock held")
		}
		r.mu.Unlock()
		if len(matched) == 0 { // the last takes the place of the first
			r.remove(all[0], [2]int64{})
			r.add(&session{})
		}
		matched[s]++
		return s == all[0] || s == all[9]
	})
	for i, s := range all {
		if matched[s] != 1 {
			t.Errorf("session %d was matched %d times, want once", i, matched[s])
		}
	}
	if len(matched) != len(all) || !slices.Equal(found, []*session{all[0], all[9]}) {
		t.Errorf("%d were matched, %d found; want the 10 that were there and the 2 that match", len(matched), len(found))
	}
}

// The sum of the bytes is right at every time while sessions end: each of them
// counts once, as open or as ended.
func TestRelayBytesWhileSessionsEnd(t *testing.T) {
	r := newRelay(func(int) string { return "backend-0" }, slog.New(slog.DiscardHandler))
	const sessions, each = 5000, 1000
	all := make([]*session, sessions)
	for i := range all {
		all[i] = &session{}
		all[i].bytesFrom[clientSide].Store(each)
		all[i].bytesFrom[backendSide].Store(2 * each)
		r.add(all[i])
	}
	var ending sync.WaitGroup
	ending.Go(func() {
		for _, s := range all {
			r.remove(s, s.bytes())
		}
	})
	want := [2]int64{sessions * each, 2 * sessions * each}
	for open := sessions; open > 0; open = r.size() {
		if got := r.bytes(); got != want {
			t.Errorf("bytes = %d with about %d sessions open, want %d", got, open, want)
		}
	}
	ending.Wait()
	if got := r.bytes(); got != want {
		t.Errorf("bytes = %d at the end, want %d", got, want)
	}
}

// BenchmarkRelayScan is what a table's swap costs for scanSessions sessions that
// stay, by how many overrides the table has, and what the set alone does.
func BenchmarkRelayScan(b *testing.B) {
	for _, overrides := range []int{0, 1_000, 100_000} {
		r, m, _ := scanned(b, overrides)
		b.Run(fmt.Sprintf("misplaced/overrides=%d", overrides), func(b *testing.B) {
			for b.Loop() {
				r.filter(m.shouldMove)
			}
		})
	}
	r, _, _ := scanned(b, 0)
	b.Run("ending", func(b *testing.B) {
		for b.Loop() {
			r.filter((*session).isClosing)
		}
	})
	b.Run("bytes", func(b *testing.B) {
		for b.Loop() {
			r.bytes()
		}
	})
}

// maxHeld is how much the relay may hold of what a side does not take, in bytes.
const maxHeld = 64 << 10

// stuff writes until nothing is taken for a while, and returns how much was.
func stuff(conn net.Conn) (n int64) { return stuffWith(conn, endless{}, 32<<10) }

// stuffWith writes pieces of what r has until nothing is taken for a while, and
// returns how much was: no more than 64 MiB, which no kernel has for a socket.
func stuffWith(conn net.Conn, r io.Reader, piece int) (n int64) {
	for buf := make([]byte, piece); n < 64<<20; {
		io.ReadFull(r, buf) // endless, or long enough
		conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		m, err := conn.Write(buf)
		if n += int64(m); err != nil {
			break
		}
	}
	return n
}

// smallPairs returns what a session is between, as behind nginx: the ends of a
// Unix socket and of a TCP connection, of which the kernel holds little. (A TCP
// socket that takes less than a segment at a time, 64 KiB on the loopback device,
// is slow beyond measure.)
func smallPairs(t testing.TB) (client, near halfConn, far, backend halfConn) {
	t.Helper()
	c, n := unixPair(t)
	f, b := tcpPair(t)
	for _, conn := range []interface{ SetWriteBuffer(int) error }{c, n, f, b} {
		conn.SetWriteBuffer(16 << 10)
	}
	f.SetReadBuffer(64 << 10)
	b.SetReadBuffer(64 << 10)
	return c, n, f, b
}

// stuckSession is a session of smallPairs.
type stuckSession struct{ client, backend halfConn }

func startedSmallSession(t testing.TB, r *relay) stuckSession {
	t.Helper()
	client, near, far, backend := smallPairs(t)
	r.startSession(&session{namespace: "ns-01"}, [2]net.Conn{near, far}, [2][]byte{})
	return stuckSession{client, backend}
}

// A reader that stops stops its sender: of a session whose sockets are full no
// more is taken than maxHeld, and all of it comes when the reader goes on. It
// fails if more is held, or if a side is read while something is held of it.
func TestRelayBackpressure(t *testing.T) {
	client, near, far, backend := smallPairs(t)
	full := [2]int64{stuff(client) + stuff(far), stuff(backend) + stuff(near)}
	near.SetDeadline(time.Time{})
	far.SetDeadline(time.Time{})
	r := quietRelay(t)
	r.startSession(&session{namespace: "ns-01"}, [2]net.Conn{near, far}, [2][]byte{})
	ends := [2]halfConn{client, backend}
	for i, conn := range ends {
		held := stuff(conn)
		t.Logf("side %d: the kernel took %d bytes, and %d more when the session was carried", i, full[i], held)
		if held > maxHeld*5/4 { // the kernel counts in segments
			t.Errorf("side %d: %d bytes were taken for a reader that does not read, want %d", i, held, maxHeld)
		}
		full[i] += held
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	mustReadAll(t, backend, full[0])
	mustReadAll(t, client, full[1])
	waitFor(t, r)
}

// echoing starts sessions whose backends send back what comes, until the test
// ends.
func echoing(t *testing.T, r *relay, count int) []relayed {
	t.Helper()
	all := make([]relayed, count)
	var echoes sync.WaitGroup
	for i := range all {
		c := startedSession(t, r, 0, nil, nil)
		all[i] = c
		echoes.Go(func() { io.Copy(c.backend, c.backend) })
	}
	t.Cleanup(func() {
		for _, c := range all {
			c.client.Close()
		}
		echoes.Wait()
	})
	return all
}

// medianEchoes returns how long an echo takes in the sessions of each relay, in the
// middle of many. They take turns, one echo at a time, so that other programs have
// the same part in both.
func medianEchoes(t *testing.T, relays [2][]relayed) (medians [2]time.Duration) {
	t.Helper()
	const echoes = 3000
	var took [2][]time.Duration
	message := make([]byte, 100)
	for k := range echoes {
		for i, sessions := range relays {
			c := sessions[k%len(sessions)]
			c.client.SetDeadline(time.Now().Add(patience))
			begun := time.Now()
			_, err := c.client.Write(message)
			if _, rerr := io.ReadFull(c.client, message); errors.Join(err, rerr) != nil {
				t.Fatal(errors.Join(err, rerr))
			}
			took[i] = append(took[i], time.Since(begun))
		}
	}
	for i := range took {
		slices.Sort(took[i])
		medians[i] = took[i][echoes/2]
	}
	return medians
}

// wantMedianEchoes checks that an echo takes no more than twice the time in the
// second relay's sessions.
func wantMedianEchoes(t *testing.T, relays [2][]relayed) {
	t.Helper()
	medians := medianEchoes(t, relays)
	t.Logf("half of all echoes took at most %s without stuck sessions and %s with them", medians[0], medians[1])
	if medians[1] > 2*medians[0] {
		t.Errorf("half of all echoes took %s or more with stuck sessions, want twice the %s without at most", medians[1], medians[0])
	}
}

// processorTime returns what this process has used.
func processorTime(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(os.NewSyscallError("getrusage", err))
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Sessions that are stuck in both directions cost the others nothing, and at rest
// no processor time. Latencies are compared with those of a relay without them.
//
// It fails if a poller waits for a socket, or asks again and again for what a
// stuck one has.
func TestRelayStuckStopsItselfOnly(t *testing.T) {
	const others, stuck = 50, 200
	calm, crowded := quietRelay(t), quietRelay(t)
	without, with := echoing(t, calm, others), echoing(t, crowded, others)
	var all sync.WaitGroup
	for range stuck {
		c := startedSmallSession(t, crowded)
		all.Go(func() { stuff(c.client) })
		all.Go(func() { stuff(c.backend) })
	}
	all.Wait()

	wantMedianEchoes(t, [2][]relayed{without, with})
	wantRest(t)
}

// wantRest waits until this process uses a tenth of a processor at most.
func wantRest(t *testing.T) {
	t.Helper()
	const rest = 200 * time.Millisecond
	for end := time.Now().Add(patience); ; {
		begun := processorTime(t)
		<-time.After(rest)
		took := processorTime(t) - begun
		if took <= rest/10 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s of processor time in %s with nothing to do, want a tenth at most", took, rest)
		}
	}
}

// inBatches calls do for 0 to count-1, so many at once that a processor has time
// for each.
func inBatches(count int, do func(i int)) {
	const atOnce = 200
	for first := 0; first < count; first += atOnce {
		var all sync.WaitGroup
		for i := first; i < min(count, first+atOnce); i++ {
			all.Go(func() { do(i) })
		}
		all.Wait()
	}
}

// stuckFlow is what comes from the backend of session i: of every other one
// frames, which a relay may hold in another way than arbitrary bytes.
func stuckFlow(noise []byte, seed uint64, i int) *flow {
	f := newFlow(noise, seed+uint64(i), 64<<20, backendSide, i%2 == 0)
	f.framed = false // where it will stop is not known
	return f
}

// Two thousand stuck sessions take bounded memory, each byte comes when their
// readers go on, and the memory is given back. It fails if what is held is not
// bounded or is lost at the end, and if the relay keeps buffers for ever.
func TestRelayStuckMemory(t *testing.T) {
	const sessions = 2000
	seed := randomSeed(t)
	noise := newNoise(seed)
	r := quietRelay(t)
	all, sent := make([]stuckSession, sessions), make([]int64, sessions)
	before := userMemory()
	for i := range all {
		all[i] = startedSmallSession(t, r)
	}
	open := userMemory()
	inBatches(sessions, func(i int) {
		sent[i] = stuffWith(all[i].backend, stuckFlow(noise, seed, i), 4<<10)
		all[i].backend.CloseWrite()
	})
	full, taken := userMemory(), r.bytes()[backendSide]
	inBatches(sessions, func(i int) {
		flow := stuckFlow(noise, seed, i)
		flow.left = int(sent[i])
		all[i].client.SetReadDeadline(time.Now().Add(patience))
		if err := flow.check(all[i].client, rand.New(rand.NewPCG(seed, uint64(i)))); err != nil {
			t.Errorf("session %d: %v", i, err)
		}
		all[i].client.Close()
	})
	waitFor(t, r)
	after := userMemory()
	var total int64
	for _, n := range sent {
		total += n
	}
	const mega = 1 << 20
	t.Logf("of %d MiB sent %d MiB were taken; memory: %d KiB open, %d MiB full, %d KiB after",
		total/mega, taken/mega, (open-before)>>10, (full-before)/mega, (after-before)>>10)
	if full-before > 100*mega {
		t.Errorf("%d stuck sessions take %d MiB, want 100 at most", sessions, (full-before)/mega)
	}
	if after-before > 20*mega {
		t.Errorf("%d MiB are still in use, want 20 at most", (after-before)/mega)
	}
	if total-taken < sessions*maxHeld {
		t.Errorf("%d bytes were not taken, want at least %d for each session: are they stuck?", total-taken, maxHeld)
	}
	if got := r.bytes(); got != [2]int64{0, total} || r.ended[causeBackend].Load() != sessions {
		t.Errorf("%d bytes and %d clean ends, want %d and %d", got, r.ended[causeBackend].Load(), total, sessions)
	}
}

// noiseSize is prime: what is lost, repeated or in another's place, a multiple of
// some power of two as a rule, does not look like what should be there.
const noiseSize = 1<<20 - 3

// newNoise returns what the flows of a test are cut from.
func newNoise(seed uint64) []byte {
	noise := make([]byte, noiseSize)
	rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), seed))).Read(noise)
	return noise
}

// flow is the bytes of one direction, the same ones for the same seed: arbitrary
// bytes, or what looks like WebSocket frames (RFC 6455 §5.2) to who looks.
type flow struct {
	rng    *rand.Rand
	noise  []byte
	at     int    // in noise, of the next byte
	left   int    // bytes until the end
	mask   byte   // 0x80 if the frames are masked
	framed bool   // it ends where a frame ends
	header []byte // of the frame, what is left of it
	frame  int    // bytes left of the frame's payload
}

func newFlow(noise []byte, seed uint64, size int, from side, framed bool) *flow {
	rng := rand.New(rand.NewPCG(seed, uint64(from)))
	f := &flow{rng: rng, noise: noise, at: rng.IntN(len(noise)), left: size, frame: math.MaxInt}
	if framed {
		f.mask, f.framed, f.frame = []byte{0x80, 0}[from], rng.IntN(2) == 0, 0
	}
	return f
}

// Read fills b, unless the flow ends.
func (f *flow) Read(b []byte) (n int, err error) {
	for n < len(b) && f.left > 0 {
		if len(f.header) == 0 && f.frame == 0 {
			f.begin()
		}
		part := b[n:min(len(b), n+f.left)]
		took := copy(part, f.header)
		f.header = f.header[took:]
		if took == 0 {
			took = copy(part[:min(len(part), f.frame)], f.noise[f.at:])
			f.at = (f.at + took) % len(f.noise)
			f.frame -= took
		}
		n, f.left = n+took, f.left-took
	}
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

// begin makes the next frame: most are tiny, some are of a size that a relay may
// treat in one way or another, some have 16 MiB.
func (f *flow) begin() {
	switch n := f.rng.IntN(60); {
	case n == 0:
		f.frame = 16 << 20
	case n < 15:
		f.frame = logUniform(f.rng, 16<<20)
	case n < 30:
		f.frame = f.rng.IntN(200_000)
	default:
		f.frame = f.rng.IntN(126)
	}
	small := 2 + int(f.mask)/0x80*4 // the header of the last frame
	switch last := f.left - small; {
	case f.framed && last < 126:
		f.frame = max(0, last)
	case f.framed:
		f.frame = min(f.frame, last-14) // the longest header
	}
	f.header = []byte{0x81 + byte(f.rng.IntN(2)), f.mask}
	switch {
	case f.frame < 126:
		f.header[1] |= byte(f.frame)
	case f.frame < 1<<16:
		f.header[1] |= 126
		f.header = binary.BigEndian.AppendUint16(f.header, uint16(f.frame))
	default:
		f.header[1] |= 127
		f.header = binary.BigEndian.AppendUint64(f.header, uint64(f.frame))
	}
	if f.mask != 0 {
		f.header = binary.BigEndian.AppendUint32(f.header, f.rng.Uint32())
	}
}

// first returns the flow's first bytes, up to most.
func (f *flow) first(limit int) []byte {
	b := make([]byte, limit)
	n, _ := f.Read(b) // or all there is
	return b[:n]
}

// flowPiece is the most that is written or read at once, in bytes.
const flowPiece = 128 << 10

// send writes the flow in pieces of random sizes, and ends its half at once.
func (f *flow) send(conn halfConn, rng *rand.Rand) error {
	for buf := make([]byte, flowPiece); f.left > 0; dawdle(rng) {
		n, _ := f.Read(buf[:1+logUniform(rng, len(buf)-1)])
		if _, err := conn.Write(buf[:n]); err != nil {
			return fmt.Errorf("write with %d bytes to come: %w", f.left, err)
		}
	}
	return conn.CloseWrite()
}

// check reads in pieces of random sizes until EOF, and names the first byte that
// is not the flow's.
func (f *flow) check(r io.Reader, rng *rand.Rand) error {
	got, want := make([]byte, flowPiece), make([]byte, flowPiece)
	for at := 0; ; dawdle(rng) {
		n, err := r.Read(got[:1+logUniform(rng, len(got)-1)])
		m, _ := f.Read(want[:n])
		if same := equalBytes(got[:n], want[:m]); same < n {
			return fmt.Errorf("byte %d and on: % x, want % x and %d more", at+same,
				got[same:min(n, same+16)], want[same:min(m, same+16)], f.left)
		}
		at += n
		switch {
		case err == io.EOF && f.left == 0:
			return nil
		case err != nil:
			return fmt.Errorf("%w at byte %d of %d", err, at, at+f.left)
		}
	}
}

// equalBytes returns how many bytes at the start of a and b are the same.
func equalBytes(a, b []byte) int {
	if string(a) == string(b) {
		return len(a)
	}
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// dawdle pauses now and then.
func dawdle(rng *rand.Rand) {
	if rng.IntN(50) == 0 {
		time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
	}
}

// flowEnd is one end of a session.
type flowEnd struct {
	name    string
	seed    uint64
	out, in *flow
	early   []byte // the first of out, which is sent otherwise
}

// run sends and checks at the same time. r reads from conn, and may have read
// ahead.
func (e flowEnd) run(t *testing.T, conn halfConn, r io.Reader) {
	conn.SetDeadline(time.Now().Add(6 * patience))
	var both sync.WaitGroup
	both.Go(func() {
		if err := e.out.send(conn, rand.New(rand.NewPCG(e.seed, 2))); err != nil {
			t.Errorf("from %s: %v", e.name, err)
		}
	})
	both.Go(func() {
		if err := e.in.check(r, rand.New(rand.NewPCG(e.seed, 3))); err != nil {
			t.Errorf("to %s: %v", e.name, err)
			conn.Close() // ends the rest of the session
		}
	})
	both.Wait()
}

// flowSession is a session's flows, of which there are two of each direction:
// one is sent, the other is what should come.
type flowSession struct {
	ends  [2]flowEnd // by side
	total [2]int     // bytes, by the side they come from
}

func newFlowSession(noise []byte, seed uint64, number int, sizes [2]int) *flowSession {
	s := &flowSession{total: sizes}
	var flows [2][2]*flow
	for i := clientSide; i <= backendSide; i++ {
		for j := range 2 {
			flows[i][j] = newFlow(noise, seed+uint64(number), sizes[i], i, number>>(1+i)&1 == 0)
		}
	}
	for i := clientSide; i <= backendSide; i++ {
		e := flowEnd{name: fmt.Sprintf("%s %d", [2]string{"client", "backend"}[i], number), seed: seed + uint64(number)<<32 + uint64(i)}
		e.out, e.in = flows[i][0], flows[i.other()][1]
		e.early = e.out.first(logUniform(rand.New(rand.NewPCG(e.seed, 4)), 4<<10))
		s.ends[i] = e
	}
	return s
}

// flowSizes returns the sizes of the flows of count sessions, 64 MiB at most and
// all together no more than budget.
func flowSizes(rng *rand.Rand, count, budget int) [][2]int {
	sizes := make([][2]int, count)
	sizes[0] = [2]int{64 << 20, 0}
	budget -= 64 << 20
	for n := range sizes[1:] {
		for i := range sizes[1+n] {
			size := logUniform(rng, min(64<<20, budget/4))
			sizes[1+n][i] = size
			budget -= size
		}
	}
	return sizes
}

// Byte by byte the same in both directions at once, from what came with the
// handshake to what came before the FIN: 200 sessions of up to 64 MiB with every
// write, read and pause at random, half of them through the proxy and half from a
// Unix socket as nginx has it, half of the flows WebSocket frames.
//
// It fails if what came first is left out or goes second; if what a side did not
// take is written again from its start, or not at all before the FIN; if a turn
// ends and nothing wakes the poller up; if the sides' counters are swapped.
func TestRelayBytes(t *testing.T) {
	const count = 200
	seed := randomSeed(t)
	noise := newNoise(seed)
	next := make(chan flowEnd, 1) // for the connection that comes to the backend
	start := make(chan struct{})
	begin := sync.OnceFunc(func() { close(start) })
	var served sync.WaitGroup // what comes to the backend
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		e := <-next
		defer served.Done()
		io.WriteString(conn, switching+string(e.early))
		<-start
		e.run(t, conn.(*net.TCPConn), br)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, nil)
	defer begin() // or a failure below would wait for the backend
	var running sync.WaitGroup
	var total [2]int64
	for n, sizes := range flowSizes(rand.New(rand.NewPCG(seed, 5)), count, 512<<20) {
		s := newFlowSession(noise, seed, n, sizes)
		total[clientSide] += int64(sizes[clientSide])
		total[backendSide] += int64(sizes[backendSide])
		ends := s.ends
		if n%2 == 0 {
			served.Add(1)
			next <- ends[backendSide]
			conn, br, _ := p.ask(t, upgradeRequest("/ws/ns-01")+string(ends[clientSide].early))
			running.Go(func() { <-start; ends[clientSide].run(t, conn, br) })
			continue
		}
		near, nearFar := unixPair(t)
		far, farFar := tcpPair(t)
		nearFar.SetWriteBuffer(4 << 10 << (n / 8 % 8)) // little is taken in many parts
		far.SetWriteBuffer(4 << 10 << (n / 8 % 8))
		p.relay.startSession(&session{namespace: "ns-01"}, [2]net.Conn{nearFar, far}, [2][]byte{ends[clientSide].early, ends[backendSide].early})
		running.Go(func() { <-start; ends[clientSide].run(t, near, near) })
		running.Go(func() { <-start; ends[backendSide].run(t, farFar, farFar) })
	}
	begin()
	running.Wait()
	served.Wait() // its last bytes are in its socket when the session is over
	waitFor(t, p.relay)
	if got := p.relay.bytes(); got != total {
		t.Errorf("%d bytes were counted, want %d", got, total)
	}
	if got := p.relay.ended[causeClient].Load() + p.relay.ended[causeBackend].Load(); got != count {
		t.Errorf("%d clean ends, want %d", got, count)
	}
}

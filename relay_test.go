package main

import (
	"bufio"
	"bytes"
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

// step is a part of what happens to a session.
type step = func(t *testing.T, s relayed)

// What one side does.
func closesConn(i side) step { return func(_ *testing.T, s relayed) { s.ends()[i].Close() } }
func halfCloses(i side) step { return func(t *testing.T, s relayed) { closeWrite(t, s.ends()[i]) } }
func resets(i side) step     { return func(_ *testing.T, s relayed) { reset(s.ends()[i]) } }
func says(i side, text string) step {
	return func(t *testing.T, s relayed) { mustWrite(t, s.ends()[i], text); mustRead(t, s.ends()[i.other()], text) }
}

// What one side reads: an end, or a reset as well.
func hasEnd(i side) step { return func(t *testing.T, s relayed) { mustEOF(t, s.ends()[i]) } }
func isCut(i side) step  { return func(t *testing.T, s relayed) { mustBreak(t, s.ends()[i]) } }

// A session can end in many ways. In each of them all bytes on their way arrive, and
// the relay counts and logs the session once, with its cause, its duration, and the
// bytes that each side's peer has taken: play returns them, -1 for any number.
//
// It fails if a FIN overtakes unsent bytes, if an RST and a FIN are confused, if a
// second cause replaces the first, if a counter or a log line is missing, doubled or
// wrong, and if the duration is not in seconds.
func TestRelayEnds(t *testing.T) {
	type end struct {
		play func(t *testing.T, c relayed) (taken [2]int64)
		want cause // causeNone: either side's end
	}
	plays := func(taken [2]int64, steps ...step) func(*testing.T, relayed) [2]int64 {
		return func(t *testing.T, c relayed) [2]int64 {
			for _, step := range steps {
				step(t, c)
			}
			return taken
		}
	}
	const client, backend = clientSide, backendSide
	drains := func(_ *testing.T, c relayed) { c.end(causeDrain) }
	tests := map[string]end{
		"both end their halves while neither reads": {func(t *testing.T, c relayed) [2]int64 {
			taken := [2]int64{stuff(c.client), stuff(c.backend)}
			closeWrite(t, c.client)
			closeWrite(t, c.backend)
			mustReadAll(t, c.backend, taken[clientSide])
			mustReadAll(t, c.client, taken[backendSide])
			return taken
		}, causeNone}, // on a busy machine the relay may see the backend's end first
		"client resets while bytes for it are unsent": {plays([2]int64{0, -1}, func(_ *testing.T, c relayed) { stuff(c.backend) },
			resets(client), isCut(backend), closesConn(backend)), causeClientError},
		"backend resets while bytes from it are unsent": {func(t *testing.T, c relayed) [2]int64 {
			stuff(c.backend)
			reset(c.backend)
			c.client.SetReadDeadline(time.Now().Add(patience))
			n, err := io.Copy(io.Discard, c.client)
			if err != nil {
				t.Error(err)
			}
			return [2]int64{0, n}
		}, causeBackendError},
		"client resets after it ended its half": {plays([2]int64{},
			halfCloses(client), hasEnd(backend), resets(client), closesConn(backend)), causeClient},
		"nothing comes after a half-close": {plays([2]int64{},
			halfCloses(client), hasEnd(backend), isCut(client)), causeHalfClose},
		"nobody reads after a half-close": {plays([2]int64{0, -1}, halfCloses(client), hasEnd(backend),
			func(_ *testing.T, c relayed) { io.Copy(c.backend, endless{}) }), causeHalfClose}, // until the relay ends the session
		"its namespace moves while the router drains": {plays([2]int64{}, func(_ *testing.T, c relayed) { c.end(causeMoved) },
			drains, isCut(client), isCut(backend)), causeMoved},
		"the router drains": {plays([2]int64{8, 0},
			says(client, "question"), drains, isCut(client), isCut(backend)), causeDrain},
	}
	for i, first := range map[side]string{client: "client", backend: "backend"} {
		tests[first+" ends its half, the other side answers and ends"] = end{func(t *testing.T, c relayed) [2]int64 {
			conn, other := c.ends()[i], c.ends()[i.other()]
			mustWrite(t, conn, "question")
			closeWrite(t, conn)
			mustRead(t, other, "question")
			mustEOF(t, other)
			mustWrite(t, other, "answer")
			other.Close()
			mustRead(t, conn, "answer")
			mustEOF(t, conn)
			return map[side][2]int64{client: {8, 6}, backend: {6, 8}}[i]
		}, i.endCause()}
		tests[first+" closes"] = end{plays([2]int64{}, closesConn(i), hasEnd(i.other()), closesConn(i.other())), i.endCause()}
		tests[first+" resets"] = end{plays([2]int64{}, resets(i), isCut(i.other())), i.errorCause()}
	}
	for _, network := range []string{"tcp", "tls", "tls12"} {
		for name, tt := range tests {
			t.Run(network+", "+name, func(t *testing.T) {
				r := quietRelay(t)
				tail, least := newLogTail(), time.Duration(0)
				r.log = slog.New(slog.NewJSONHandler(tail, nil))
				if tt.want == causeHalfClose {
					least = 200 * time.Millisecond
					r.halfCloseTimeout = least
				}
				begun := time.Now()
				c := newSessionConns(t, network, "tcp").start(r, newSession("ns-01", 2, "192.0.2.7"), [2][]byte{})
				wantEqual(t, "open sessions", r.counts()[2].open, 1)
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
}

// A half-closed session in which bytes still come does not end.
func TestRelayHalfClosedTalks(t *testing.T) {
	eachNetwork(t, func(t *testing.T, network string) {
		t.Parallel()
		for talkHalfClosed(t, network) {
			t.Log("the machine was too slow for the time of a half-close: once more")
		}
	}, "tcp", "tls", "tls12")
}

// talkHalfClosed has bytes come in a half-closed session. It reports whether the machine has
// made a pause in that which may have ended the session.
func talkHalfClosed(t *testing.T, network string) (paused bool) {
	t.Helper()
	r := quietRelay(t)
	r.halfCloseTimeout = 300 * time.Millisecond
	c := startedOver(t, r, network, "tcp")
	last := time.Now()
	tooLate := func() bool { return time.Since(last) > r.halfCloseTimeout/2 } // twice that is too long for the relay
	closeWrite(t, c.client)
	mustEOF(t, c.backend)
	for end := last.Add(3 * r.halfCloseTimeout); last.Before(end); <-time.After(r.halfCloseTimeout / 10) {
		_, err := io.WriteString(c.backend, "x")
		c.client.SetReadDeadline(time.Now().Add(patience))
		_, readErr := io.ReadFull(c.client, make([]byte, 1))
		if tooLate() {
			return true
		}
		must(t, err, readErr)
		last = time.Now()
	}
	c.backend.Close()
	mustEOF(t, c.client)
	if tooLate() {
		return true
	}
	c.wantCause(t, causeClient)
	return false
}

// If one side has ended its stream and is then gone, the session is dead, whatever the
// other side goes on to send. It ends long before halfCloseTimeout, and the first cause
// counts. It fails if such a session ends only when the other side is silent.
//
// The relay gets an RST from a TCP connection that is gone, and EPIPE from a Unix socket,
// which only the client has.
func TestRelayEndsWhenBothDirectionsAreDead(t *testing.T) {
	for _, tt := range []struct {
		gone          side
		clientNetwork string
	}{{clientSide, "tcp"}, {clientSide, "unix"}, {clientSide, "tls"}, {clientSide, "tls-unix"}, {backendSide, "tcp"}, {backendSide, "tls"}} {
		t.Run(fmt.Sprint(tt.gone.endCause(), " of ", tt.clientNetwork), func(t *testing.T) {
			r := quietRelay(t)
			r.halfCloseTimeout = time.Hour
			c := startedOver(t, r, tt.clientNetwork, "tcp")
			gone, other := c.ends()[tt.gone], c.ends()[tt.gone.other()]
			closeWrite(t, gone)
			mustEOF(t, other)
			reset(gone)
			eventually(t, "the session is over", true, func() bool {
				io.WriteString(other, "tick") // fails once the session is over
				return c.isOver.Load()
			})
			c.wantCause(t, tt.gone.endCause())
		})
	}
}

// The bytes that a side sent before it was gone arrive at the other side, which goes on
// sending all the time. It fails if the relay closes the sockets as soon as the session
// is dead: that would reset the other side's connection.
func TestRelayCarriesTheLastBytesOfWhoIsGone(t *testing.T) {
	eachNetwork(t, carryLastBytes, "unix", "tls-unix")
}

func carryLastBytes(t *testing.T, network string) {
	r := quietRelay(t)
	r.halfCloseTimeout, r.deadTimeout = time.Hour, time.Hour
	pairs := newSessionConns(t, network, "tcp")
	pairs.far[backendSide].SetReadBuffer(16 << 10)
	c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
	const last = 150 << 10 // more than a socket takes unread: some are in the router's kernel
	mustWrite(t, c.client, string(make([]byte, last)))
	c.client.Close()
	var ticks sync.WaitGroup
	ticks.Go(func() {
		for range 100 {
			io.WriteString(c.backend, "tick")
			<-time.After(time.Millisecond)
		}
	})
	<-time.After(20 * time.Millisecond) // the backend sends before it reads; for how long is not important
	mustReadAll(t, c.backend, last)
	ticks.Wait()
	c.backend.Close()
	waitFor(t, r)
}

// If both sides end at the same moment, in any way, with bytes on their way, the
// session ends once, with the cause of one of them, and no socket of another
// session is closed.
//
// It fails if a session is counted twice, or a socket is closed twice: that closes a
// socket of the next session, or of the bystander.
func TestRelayBothEnd(t *testing.T) {
	const rounds, atOnce = 40, 25
	r := quietRelay(t)
	rng := rand.New(rand.NewPCG(randomSeed(t), 0))
	ways := []func(halfConn){
		func(conn halfConn) { conn.Close() },
		func(conn halfConn) { reset(conn) },
		func(conn halfConn) {
			conn.CloseWrite()
			io.Copy(io.Discard, conn) // or until the other's RST
			conn.Close()
		},
	}
	bystander := startedSession(t, r)
	for range rounds {
		var all sync.WaitGroup
		for n := range atOnce {
			c := startedOver(t, r, []string{"tcp", "tcp", "tls", "tls12"}[n%4], "tcp")
			for _, conn := range c.ends() {
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
	wantEqual(t, "sessions that their sides ended", ends, rounds*atOnce)
}

func BenchmarkRelayMessage(b *testing.B) {
	for _, size := range []int{64, 1024, 64 << 10} {
		b.Run(fmt.Sprint(size, " B"), func(b *testing.B) {
			r := quietRelay(b)
			c := startedSession(b, r)
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

// A session that carries nothing for -idle-timeout ends. A session that carries
// something now and then, in either direction, stays open.
func TestRelayEndsIdle(t *testing.T) {
	const timeout = 800 * time.Millisecond
	r := quietRelay(t)
	silent := startedSession(t, r)
	hello := [2][]byte{[]byte("hello"), []byte("hello")}
	spoke := newSessionConns(t, "tcp", "tcp").start(r, newSession("ns-01", 0, ""), hello)
	clientSends, backendSends := startedSession(t, r), startedSession(t, r)
	begun := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	var checking sync.WaitGroup
	checking.Go(func() { r.endIdle(ctx, timeout) })
	defer checking.Wait()
	defer cancel()

	var ended time.Duration
	for ended == 0 || time.Since(begun) < 3*timeout {
		mustWrite(t, clientSends.client, "x")
		mustRead(t, clientSends.backend, "x")
		mustWrite(t, backendSends.backend, "x")
		mustRead(t, backendSends.client, "x")
		<-time.After(timeout / 20)
		if ended == 0 && silent.isOver.Load() && spoke.isOver.Load() {
			ended = time.Since(begun)
		}
		if time.Since(begun) > patience {
			t.Fatalf("%d sessions are open, want the idle ones to have ended", r.size())
		}
	}
	if ended < timeout {
		t.Errorf("ended after %s, want -idle-timeout %s or more", ended, timeout)
	}
	for name, c := range map[string]relayed{"client sends": clientSends, "backend sends": backendSends} {
		if c.isEnding() {
			t.Errorf("%s: ended with cause %v, want open", name, cause(c.cause.Load()))
		}
	}
	waitFor(t, r) // now they are idle too
	wantEqual(t, "sessions that were idle", r.ended[causeIdle].Load(), 4)
}

// A session is idle when as many checks as the time has, and one more, have found no byte.
func TestRelayChecksIdle(t *testing.T) {
	s := &session{}
	for _, from := range []side{clientSide, backendSide} {
		s.bytesFrom[from].Add(1)
		for n := range idleChecks + 1 {
			if s.checkIdle() {
				t.Errorf("it is idle at check %d after a byte, want check %d", n, idleChecks+1)
			}
		}
		wantEqual(t, "idle", s.checkIdle(), true)
	}
}

// A closing handshake has a time of its own: a session does not end as idle meanwhile.
func TestRelayIdleWhileClosing(t *testing.T) {
	r := quietRelay(t)
	r.closeTimeout = time.Hour
	c := startedSession(t, r)
	wantEqual(t, "the closing handshake began", c.closeGracefully(causeMoved, nil), true)
	mustFrames(t, c.backend, true, goesAway)
	for range 3 * idleChecks {
		if c.checkIdle() {
			t.Fatal("a session whose closing handshake is under way counts as idle")
		}
	}
	reset(c.client)
	reset(c.backend)
	waitFor(t, r)
}

// scanSessions is how many sessions the relay of a scan has.
const scanSessions = 100_000

// scanFactor is how many times as long as a loop over a slice a scan may take. A
// scan of a map took 10 times as long.
const scanFactor = 4

// scanned returns a relay with scanSessions sessions that are with their owners, and a
// mover for it. The sessions have no sockets, because no process can have so many. They
// are only in the relay's slice, and a scan uses nothing else of them.
func scanned(t testing.TB, overrides int) (*relay, *mover, []*session) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	router := lookupTable(t, 4, overrides)
	r := newRelay(func(i int) string { return backendName("backend", i) }, log)
	all := make([]*session, scanSessions)
	for i, namespace := range shuffled(manyNamespaces(scanSessions)) {
		owner, _ := router.table().ownerOf(namespace)
		all[i] = &session{namespace: namespace, backend: owner}
		all[i].bytesFrom[clientSide].Store(int64(i))
		all[i].bytesFrom[backendSide].Store(1)
	}
	rng := rand.New(rand.NewPCG(5, 6)) // in memory, sessions are not in the slice's order
	rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, s := range all {
		r.add(s)
	}
	m := newMover(router, r, 0, nil, func() {}, log)
	m.tableOrPodChanged()
	return r, m, all
}

// A scan finds exactly the sessions that match, also if others have ended before, and
// needs little more processor time than a plain loop over a copy of them.
//
// It fails if a session is missing or comes twice, if remove removes another session
// than the one that ended, if the bytes of an ended session are forgotten, and if the
// sessions are in a container that is slow to scan, as a map was.
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
	wantEqual(t, "sessions", r.size(), scanSessions/2)
	for _, s := range r.filter(m.shouldMove) {
		if !want[s] {
			t.Errorf("%s was found, and is with its owner, has ended, or was found before", s.namespace)
		}
		delete(want, s)
	}
	if len(want) > 0 {
		t.Errorf("%d sessions were not found", len(want))
	}
	wantEqual(t, "bytes", r.bytes(), [2]int64{scanSessions * (scanSessions - 1) / 2, scanSessions})
	for i := 1; i < scanSessions; i += 2 {
		r.add(all[i])
	}
	wantScanTime(t, r, m, all)
}

// wantScanTime compares the processor time of scans with that of loops over copies of a
// slice of the same sessions. The two take turns, so that other programs disturb both alike,
// and the best time of each counts.
func wantScanTime(t *testing.T, r *relay, m *mover, all []*session) {
	t.Helper()
	each := func(do func(*session)) func() {
		return func() {
			for _, s := range slices.Clone(all) { // a scan copies them, too
				do(s)
			}
		}
	}
	scans := map[string]struct{ scan, plain func() }{
		"sessions with a flag":        {func() { r.filter((*session).isEnding) }, each(func(s *session) { s.isEnding() })},
		"sessions with another owner": {func() { r.filter(m.shouldMove) }, each(func(s *session) { m.shouldMove(s) })},
		"sum of bytes":                {func() { r.bytes() }, each(func(s *session) { s.bytes() })},
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

// withoutSockets returns a relay with sessions that are only in its slice. Each has
// carried bytes from the client, and twice as many from the backend.
func withoutSockets(count int, bytes int64) (*relay, []*session) {
	r, all := newRelay(func(int) string { return "backend-0" }, slog.New(slog.DiscardHandler)), make([]*session, count)
	for i := range all {
		all[i] = &session{}
		all[i].bytesFrom[clientSide].Store(bytes)
		all[i].bytesFrom[backendSide].Store(2 * bytes)
		r.add(all[i])
	}
	return r, all
}

// filter calls match without the relay's lock: sessions may start and end meanwhile.
// Each session that was open at one moment is matched once.
func TestRelayScanHoldsNoLock(t *testing.T) {
	r, all := withoutSockets(10, 0)
	matched := map[*session]int{}
	found := r.filter(func(s *session) bool {
		if !r.mu.TryLock() {
			t.Fatal("match is called with the relay's lock held")
		}
		r.mu.Unlock()
		if len(matched) == 0 { // the last one takes the index of the first
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

// The sum of the bytes is right at every moment while sessions end: each session counts
// once, as open or as ended.
func TestRelayBytesWhileSessionsEnd(t *testing.T) {
	const sessions, each = 5000, 1000
	r, all := withoutSockets(sessions, each)
	var ending sync.WaitGroup
	ending.Go(func() {
		for _, s := range all {
			r.remove(s, s.bytes())
		}
	})
	want := [2]int64{sessions * each, 2 * sessions * each}
	for open := sessions; open > 0; open = r.size() {
		wantEqual(t, fmt.Sprint("bytes with about ", open, " sessions open"), r.bytes(), want)
	}
	ending.Wait()
	wantEqual(t, "bytes at the end", r.bytes(), want)
}

// BenchmarkRelayScan measures what a swap of the table costs if all scanSessions
// sessions stay, by the number of overrides, and what the scans alone cost.
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
			r.filter((*session).isEnding)
		}
	})
	b.Run("bytes", func(b *testing.B) {
		for b.Loop() {
			r.bytes()
		}
	})
}

// maxUnsentPerSide is how many unsent bytes from one side the relay may keep.
const maxUnsentPerSide = 64 << 10

// waitStuck waits until the peer of a side takes no more, and returns how many bytes it
// took.
func (c relayed) waitStuck(from side) (n int64) {
	for n = -1; n != c.bytes()[from]; <-time.After(50 * time.Millisecond) {
		n = c.bytes()[from]
	}
	return n
}

// stuff writes until conn takes nothing for a while, and returns how many bytes it
// took.
func stuff(conn net.Conn) (n int64) { return stuffWith(conn, endless{}, 32<<10) }

// stuffWith writes pieces from r until conn takes nothing for a while, and returns how
// many bytes it took: at most 64 MiB, more than any kernel keeps for a socket.
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

// smallSockets are sockets as behind nginx, a Unix socket and a TCP connection, with
// small buffers in the kernel. (A TCP socket that takes less than a segment at a time,
// 64 KiB on the loopback device, is extremely slow.)
func smallSockets(t testing.TB) sessionConns {
	t.Helper()
	c := newSessionConns(t, "unix", "tcp")
	for i := range c.far {
		c.far[i].SetWriteBuffer(16 << 10)
		c.near[i].(halfConn).SetWriteBuffer(16 << 10)
	}
	c.far[backendSide].SetReadBuffer(64 << 10)
	c.near[backendSide].(halfConn).SetReadBuffer(64 << 10)
	return c
}

// startedSmallSession starts a session over small sockets.
func startedSmallSession(t testing.TB, r *relay) relayed {
	t.Helper()
	return smallSockets(t).start(r, newSession("ns-01", 0, ""), [2][]byte{})
}

// A reader that stops makes its sender stop: from a side whose peer's socket is
// full the relay takes at most maxUnsentPerSide bytes, and all of them arrive when
// the reader continues. It fails if the relay keeps more, or reads a side that has
// unsent bytes.
func TestRelayBackpressure(t *testing.T) {
	pairs := smallSockets(t)
	var full [2]int64
	for i := range full { // the way to the relay, and the way on from it
		near := pairs.near[side(i).other()]
		full[i] = stuff(pairs.far[i]) + stuff(near)
		near.SetDeadline(time.Time{})
	}
	r := quietRelay(t)
	c := pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{})
	for i, conn := range c.ends() {
		more := stuff(conn)
		t.Logf("side %d: the kernel took %d bytes, and %d more in a session", i, full[i], more)
		if more > maxUnsentPerSide*5/4 { // the kernel counts in segments
			t.Errorf("side %d: the relay took %d bytes for a reader that does not read, want at most %d",
				i, more, maxUnsentPerSide)
		}
		full[i] += more
		closeWrite(t, conn)
	}
	mustReadAll(t, c.backend, full[0])
	mustReadAll(t, c.client, full[1])
	waitFor(t, r)
}

// echoing starts sessions whose backends send back all that comes, until the test ends.
func echoing(t *testing.T, r *relay, count int) []relayed {
	t.Helper()
	all := make([]relayed, count)
	var echoes sync.WaitGroup
	for i := range all {
		c := startedSession(t, r)
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

// wantMedianEchoes checks that an echo in the second relay's sessions takes at most twice
// the time of one in the first's. The relays take turns, one echo at a time, so that
// other programs disturb both alike.
func wantMedianEchoes(t *testing.T, relays [2][]relayed) {
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
	slices.Sort(took[0])
	slices.Sort(took[1])
	without, with := took[0][echoes/2], took[1][echoes/2]
	t.Logf("half of all echoes took at most %s without stuck sessions and %s with them", without, with)
	if with > 2*without {
		t.Errorf("half of all echoes took %s or more with stuck sessions, want twice the %s without at most", with, without)
	}
}

// processorTime returns the processor time that this process has used.
func processorTime(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(os.NewSyscallError("getrusage", err))
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Sessions that are stuck in both directions do not slow down other sessions, and need
// no processor time while nothing happens. The latencies are compared with those of a
// relay without stuck sessions.
//
// It fails if a poller waits for one socket, or polls a stuck one again and again.
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

// wantRest waits until this process uses at most a tenth of a processor.
func wantRest(t *testing.T) {
	t.Helper()
	eventually(t, "with nothing to do, a tenth of a processor at most is used", true, func() bool {
		begun := processorTime(t)
		<-time.After(200 * time.Millisecond)
		return processorTime(t)-begun <= 20*time.Millisecond
	})
}

// inBatches calls do for 0 to count-1, with a bounded number of calls at once, so
// that a processor has time for each.
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

// stuckSessions are sessions whose clients do not read.
type stuckSessions struct {
	all   []relayed
	sent  []int64 // by the backends
	noise []byte
	seed  uint64
}

func newStuckSessions(t *testing.T, r *relay, count int) *stuckSessions {
	t.Helper()
	seed := randomSeed(t)
	s := &stuckSessions{sent: make([]int64, count), noise: newNoise(seed), seed: seed}
	for range count {
		s.all = append(s.all, startedSmallSession(t, r))
	}
	return s
}

// flow returns what the backend of session i sends. Every other session has frames,
// which a relay may keep in another way than arbitrary bytes.
func (s *stuckSessions) flow(i int) *flow {
	f := newFlow(s.noise, s.seed+uint64(i), 64<<20, backendSide, i%2 == 0)
	f.framed = false // nobody knows where it will stop
	return f
}

// fill has the backends send until nobody takes any more, and then end.
func (s *stuckSessions) fill() {
	inBatches(len(s.all), func(i int) {
		s.sent[i] = stuffWith(s.all[i].backend, s.flow(i), 4<<10)
		s.all[i].backend.CloseWrite()
	})
}

// read has the clients read. It checks that all bytes arrive.
func (s *stuckSessions) read(t *testing.T) {
	t.Helper()
	inBatches(len(s.all), func(i int) {
		flow, client := s.flow(i), s.all[i].client
		flow.left = int(s.sent[i])
		client.SetReadDeadline(time.Now().Add(patience))
		if err := flow.check(client, rand.New(rand.NewPCG(s.seed, uint64(i)))); err != nil {
			t.Errorf("session %d: %v", i, err)
		}
		client.Close()
	})
}

// Two thousand stuck sessions take bounded memory. When their readers continue, each
// byte arrives, and the relay gives the memory back. It fails if unsent bytes are not
// bounded, or are lost at the end, and if the relay keeps buffers for ever.
func TestRelayStuckMemory(t *testing.T) {
	const sessions = 2000
	r := quietRelay(t)
	r.halfCloseTimeout = time.Hour // a slow machine may take longer than usual to fill all
	before := userMemory()
	stuck := newStuckSessions(t, r, sessions)
	open := userMemory()
	stuck.fill()
	full, taken := userMemory(), r.bytes()[backendSide]
	stuck.read(t)
	waitFor(t, r)
	after := userMemory()
	var total int64
	for _, n := range stuck.sent {
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
	if total-taken < sessions*maxUnsentPerSide {
		t.Errorf("%d bytes were not taken, want at least %d for each session: are they stuck?", total-taken, maxUnsentPerSide)
	}
	if got := r.bytes(); got != [2]int64{0, total} || r.ended[causeBackend].Load() != sessions {
		t.Errorf("%d bytes and %d clean ends, want %d and %d; %d by half-closes", got, r.ended[causeBackend].Load(), total, sessions, r.ended[causeHalfClose].Load())
	}
}

// noiseSize is prime. Bytes that are lost, repeated or in a wrong place are mostly
// multiples of a power of two: so they never look like the right ones.
const noiseSize = 1<<20 - 3

// newNoise returns random bytes, of which the flows of a test are parts.
func newNoise(seed uint64) []byte {
	noise := make([]byte, noiseSize)
	rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), seed))).Read(noise)
	return noise
}

// flow is the bytes of one direction, the same for the same seed: arbitrary bytes, or
// WebSocket frames (RFC 6455 §5.2) with arbitrary payload.
type flow struct {
	rng    *rand.Rand
	noise  []byte
	at     int    // in noise, of the next byte
	left   int    // bytes until the end
	masked bool   // the frames are
	framed bool   // it ends where a frame ends
	header []byte // what is left of the frame's header
	frame  int    // bytes left of the frame's payload
}

func newFlow(noise []byte, seed uint64, size int, from side, framed bool) *flow {
	rng := rand.New(rand.NewPCG(seed, uint64(from)))
	f := &flow{rng: rng, noise: noise, at: rng.IntN(len(noise)), left: size, frame: math.MaxInt}
	if framed {
		f.masked, f.framed, f.frame = from == clientSide, rng.IntN(2) == 0, 0
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

// begin begins the next frame. Most frames are tiny, some have a size near a limit
// of the relay, some have 16 MiB.
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
	switch last := f.left - len(frameBytes(0x81, f.masked, 0, nil)); {
	case f.framed && last < 126:
		f.frame = max(0, last)
	case f.framed:
		f.frame = min(f.frame, last-14) // 14: the longest header
	}
	f.header = frameBytes(0x81+byte(f.rng.IntN(2)), f.masked, uint64(f.frame), nil)
}

// first returns the flow's first bytes, up to most.
func (f *flow) first(limit int) []byte {
	b := make([]byte, limit)
	n, _ := f.Read(b) // fewer if the flow has no more
	return b[:n]
}

// flowPiece is how many bytes are written or read at once, at most.
const flowPiece = 128 << 10

// send writes the flow in pieces of random sizes, and then half-closes at once.
func (f *flow) send(conn halfConn, rng *rand.Rand) error {
	for buf := make([]byte, flowPiece); f.left > 0; dawdle(rng) {
		n, _ := f.Read(buf[:1+logUniform(rng, len(buf)-1)])
		if _, err := conn.Write(buf[:n]); err != nil {
			return fmt.Errorf("write with %d bytes to come: %w", f.left, err)
		}
	}
	return conn.CloseWrite()
}

// check reads in pieces of random sizes until EOF. It returns an error that names the
// first byte that differs from the flow.
func (f *flow) check(r io.Reader, rng *rand.Rand) error {
	got, want := make([]byte, flowPiece), make([]byte, flowPiece)
	for at := 0; ; dawdle(rng) {
		n, err := r.Read(got[:1+logUniform(rng, len(got)-1)])
		m, _ := f.Read(want[:n])
		if !bytes.Equal(got[:n], want[:m]) {
			same := 0
			for same < m && got[same] == want[same] {
				same++
			}
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
	early   []byte // the first bytes, which came with the handshake
}

// run sends and checks at the same time. r reads from conn, and may have bytes that it
// read ahead.
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
			conn.Close() // ends the session
		}
	})
	both.Wait()
}

// flowSession has the flows of a session. Each direction has two equal flows: one is
// sent, the other is compared with what comes.
type flowSession struct {
	ends  [2]flowEnd // by side
	total [2]int     // bytes, by the side that sends them
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

// flowSizes returns the sizes of the flows of count sessions: each at most 64 MiB, all
// together at most budget.
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

// All bytes arrive unchanged in both directions at once, from those that came with the
// handshake to the last before the FIN: 200 sessions of up to 64 MiB, with random
// writes, reads and pauses. Half of the sessions go through the proxy, half come from a
// Unix socket as behind nginx. Half of the flows are WebSocket frames.
//
// It fails if early bytes are lost or come second; if unsent bytes are written again
// from their start, or not before the FIN; if a poller stops reading a side and nothing
// wakes it up; if the counters of the sides are swapped.
func TestRelayBytes(t *testing.T) {
	const count = 200
	seed := randomSeed(t)
	noise := newNoise(seed)
	next := make(chan flowEnd, 1) // for the backend's next connection
	start := make(chan struct{})
	begin := sync.OnceFunc(func() { close(start) })
	var served sync.WaitGroup // the backend's connections
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
		pairs := newSessionConns(t, []string{"unix", "tls", "tls12", "tls-unix"}[n/2%4], "tcp")
		for i, conn := range pairs.near {
			socket(conn).SetWriteBuffer(4 << 10 << (n / 8 % 8)) // a small one takes bytes in many parts
			running.Go(func() { <-start; ends[i].run(t, pairs.far[i], pairs.far[i]) })
		}
		pairs.start(p.relay, newSession("ns-01", 0, ""), [2][]byte{ends[clientSide].early, ends[backendSide].early})
	}
	begin()
	running.Wait()
	served.Wait() // it may read its last bytes after the session is over
	waitFor(t, p.relay)
	wantEqual(t, "bytes", p.relay.bytes(), total)
	for c := causeClientError; c < numCauses; c++ {
		wantEqual(t, fmt.Sprint("sessions that ended with the cause ", c), p.relay.ended[c].Load(), 0)
	}
	wantEqual(t, "clean ends", p.relay.ended[causeClient].Load()+p.relay.ended[causeBackend].Load(), count)
}

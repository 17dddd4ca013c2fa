package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// patience bounds every wait of a test that should not wait.
const patience = 10 * time.Second

// tcpPair returns the two ends of a TCP connection.
func tcpPair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	a, b := pair(t, "tcp", "127.0.0.1:0")
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// unixPair returns the two ends of a Unix socket, as nginx and the router have.
func unixPair(t testing.TB) (near, far *net.UnixConn) {
	t.Helper()
	a, b := pair(t, "unix", filepath.Join(t.TempDir(), "s"))
	return a.(*net.UnixConn), b.(*net.UnixConn)
}

// pair returns the two ends of a connection through addr.
func pair(t testing.TB, network, addr string) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if near, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// relayed is a session with the far ends of its sockets.
type relayed struct {
	*session
	relay           *relay
	client, backend *net.TCPConn
}

func quietRelay(t testing.TB) *relay {
	t.Helper()
	name := func(i int) string { return backendName("backend", i) }
	r := newRelay(name, slog.New(slog.DiscardHandler))
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.endAll(causeDrain)
		r.stop()
	})
	return r
}

// carried starts a session in r.
func carried(t testing.TB, r *relay, backend int, fromClient, fromBackend []byte) relayed {
	t.Helper()
	client, clientFar := tcpPair(t)
	server, serverFar := tcpPair(t)
	s := &session{namespace: "ns-01", backend: backend, peer: "192.0.2.7"}
	r.carry(s, [2]net.Conn{clientFar, server}, [2][]byte{fromClient, fromBackend})
	return relayed{session: s, relay: r, client: client, backend: serverFar}
}

// waitFor fails the test if the relay's sessions do not end by themselves.
func waitFor(t testing.TB, r *relay) {
	t.Helper()
	done := make(chan struct{})
	go func() { r.wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%d sessions did not end", r.size())
	}
}

func (c relayed) wantCause(t testing.TB, want cause) {
	t.Helper()
	waitFor(t, c.relay)
	if got := cause(c.why.Load()); got != want {
		t.Errorf("cause = %v, want %v", got, want)
	}
	if got := c.relay.ended[want].Load(); got != 1 {
		t.Errorf("ended[%v] = %d, want 1", want, got)
	}
}

// wantAccount checks what is counted and logged of a session that has ended, the
// only one of its relay.
func (c relayed) wantAccount(t *testing.T, tail *logTail, taken [2]int64, least, most time.Duration) {
	t.Helper()
	r, got := c.relay, c.relay.bytes()
	for i := client; i <= server; i++ {
		if got[i] != taken[i] && taken[i] >= 0 {
			t.Errorf("%d bytes came from side %d, want %d", got[i], i, taken[i])
		}
	}
	wantLine(t, tail.all("session ended"), 1, map[string]any{"level": "INFO", "namespace": c.namespace,
		"backend": r.name(c.session.backend), "cause": cause(c.why.Load()).String(), "client": c.peer,
		"to_backend": float64(got[client]), "to_client": float64(got[server])})
	seconds := tail.all("session ended")[0]["seconds"].(float64)
	if seconds < least.Seconds() || seconds > most.Seconds() {
		t.Errorf("seconds=%v in the log, want %v to %v", seconds, least.Seconds(), most.Seconds())
	}
	var ended int64
	for i := range r.ended {
		ended += r.ended[i].Load()
	}
	count := r.counts()[c.session.backend]
	if ended != 1 || count.total != 1 || count.open != 0 || r.size() != 0 {
		t.Errorf("%d ended of %d, %d and %d open; want 1 of 1, 0 and 0", ended, count.total, count.open, r.size())
	}
}

func mustWrite(t testing.TB, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatalf("write %q: %v", s, err)
	}
}

func mustRead(t testing.TB, conn net.Conn, want string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got[:n], err, want)
	}
}

func mustEOF(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes, %v; want EOF", n, err)
	}
}

// mustReadAll reads until EOF, which is to come after n bytes.
func mustReadAll(t testing.TB, conn net.Conn, n int64) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.Copy(io.Discard, conn); got != n || err != nil {
		t.Fatalf("read %d bytes, %v; want %d and EOF", got, err, n)
	}
}

// mustBreak reads until an error that is not a timeout.
func mustBreak(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatal("the connection is still open")
	}
}

func closeWrite(t testing.TB, conn *net.TCPConn) {
	t.Helper()
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

// reset closes conn with an RST.
func reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

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
			mustReadAll(t, c.backend, taken[client])
			mustReadAll(t, c.client, taken[server])
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
				r.linger = least
			}
			begun := time.Now()
			c := carried(t, r, 2, nil, nil)
			if got := r.counts()[2].open; got != 1 {
				t.Errorf("open = %d, want 1", got)
			}
			taken := tt.play(t, c)
			if tt.want == causeNone {
				waitFor(t, r)
				tt.want = causeClient
				if cause(c.why.Load()) == causeBackend {
					tt.want = causeBackend
				}
			}
			c.wantCause(t, tt.want)
			c.wantAccount(t, tail, taken, least, time.Since(begun))
		})
	}
}

// endless is a source without an end.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// A half-closed session that goes on talking is not cut.
func TestRelayHalfClosedTalks(t *testing.T) {
	r := quietRelay(t)
	r.linger = 300 * time.Millisecond
	c := carried(t, r, 0, nil, nil)
	closeWrite(t, c.client)
	mustEOF(t, c.backend)
	for end := time.Now().Add(3 * r.linger); time.Now().Before(end); <-time.After(r.linger / 10) {
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
	}{{client, false}, {client, true}, {server, false}} {
		t.Run(fmt.Sprintf("%s, unix %t", tt.gone.ended(), tt.unix), func(t *testing.T) {
			r := quietRelay(t)
			r.linger = time.Hour
			ends, near, leave := gonePairs(t, tt.gone, tt.unix)
			s := newSession("ns-01", 0, "")
			r.carry(s, near, [2][]byte{})
			if err := ends[tt.gone].CloseWrite(); err != nil {
				t.Fatal(err)
			}
			mustEOF(t, ends[tt.gone.peer()])
			leave()
			for end := time.Now().Add(patience); !s.gone.Load() && time.Now().Before(end); <-time.After(time.Millisecond) {
				io.WriteString(ends[tt.gone.peer()], "tick") // fails once the session is over
			}
			relayed{session: s, relay: r}.wantCause(t, tt.gone.ended())
		})
	}
}

// What a side has sent before it ended and was gone comes to the other, which goes
// on talking all the time. It fails if the session is over, and its sockets reset,
// as soon as nothing more can be carried.
func TestRelayCarriesTheLastBytesOfWhoIsGone(t *testing.T) {
	r := quietRelay(t)
	r.linger, r.gone = time.Hour, time.Hour
	ends, near, leave := gonePairs(t, client, true)
	far := ends[server].(*net.TCPConn)
	far.SetReadBuffer(16 << 10)
	s := newSession("ns-01", 0, "")
	r.carry(s, near, [2][]byte{})
	const last = 150 << 10 // more than is taken by who does not read: a part is in the router's kernel
	mustWrite(t, ends[client], string(make([]byte, last)))
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
	c := carried(t, quietRelay(t), 0, []byte("from the client"), []byte("from the backend"))
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
		c := carried(t, r, 0, nil, nil)
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
		c := carried(t, r, 0, nil, nil)
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
	bystander := carried(t, r, 0, nil, nil)
	for range rounds {
		var all sync.WaitGroup
		for range atOnce {
			c := carried(t, r, 0, nil, nil)
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
	for _, why := range []cause{causeClient, causeBackend, causeClientError, causeBackendError} {
		ends += r.ended[why].Load()
	}
	if ends != rounds*atOnce {
		t.Errorf("%d sessions were ended by their sides, want %d", ends, rounds*atOnce)
	}
}

func BenchmarkRelayMessage(b *testing.B) {
	for _, size := range []int{64, 1024, 64 << 10} {
		b.Run(byteSize(size), func(b *testing.B) {
			r := quietRelay(b)
			c := carried(b, r, 0, nil, nil)
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
